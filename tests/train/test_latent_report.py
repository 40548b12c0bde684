"""`python -m train.evaluate latents`: figures against the probes, tables and pictures of several, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux2 import AUTOENCODERS, AutoEncoder, AutoencoderConfig, save_autoencoder
from flux2.images import from_uint8
from flux2.latents import fit_latent_statistics
from flux2.probes import effective_rank, equivariance_error, linear_probe_r2, radial_spectrum, spectrum_slope
from flux2.rae import RAE, RAES
from flux2.teachers import HOGTeacher
from train import latent_report
from train.data import embedded_photographs
from train.evaluate import main
from train.latent_report import TRANSFORMS, compression, diagnose, pca_sheet, unique_names

AE = AutoencoderConfig(
    z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2, latent_norm="batchnorm"
)


def noise(num, side, seed=0):
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A toy autoencoder and the tiny RAE"""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AE), folder / "ae.safetensors")
    save_autoencoder(RAE(RAES["rae-tiny"]), folder / "runs" / "rae" / "autoencoder.safetensors")
    return folder


def latents(place, out, *flags, aes=("ae.safetensors", "runs/rae/autoencoder.safetensors")):
    paths = [str(place / p) for p in aes]
    small = ["--resolution", "64", "--num", "8"]
    return main(["latents", "--autoencoder", *paths, *small, "--out", str(out), *map(str, flags)])


def test_figures_are_the_probes():
    torch.manual_seed(0)
    ae, teacher = AutoEncoder(AE).eval(), HOGTeacher(16)
    fit, judged = noise(6, 64), noise(5, 64, seed=1)
    with torch.no_grad():
        fit_latent_statistics(ae, [from_uint8(judged)])
        x, x_fit = from_uint8(judged), from_uint8(fit)
        z, raw = ae.encode(x), ae.posterior(x).mode()
        r2 = linear_probe_r2(ae.encode(x_fit), teacher(x_fit), z, teacher(x))
    found = diagnose(ae, fit, judged, teacher, batch=2)
    got = found.figures
    assert got["effective_rank"] == pytest.approx(effective_rank(z), rel=1e-4)
    assert got["probe_r2"] == pytest.approx(r2, abs=1e-4)
    assert got["spectrum_slope"] == pytest.approx(spectrum_slope(raw), rel=1e-3)
    torch.testing.assert_close(found.spectrum[0], radial_spectrum(raw)[0] / 8)  # of pixels, not positions
    errors = [equivariance_error(lambda x: ae.posterior(x).mode(), x, t, 8) for t in TRANSFORMS.values()]
    assert [got[f"equivariance_error, {name}"] for name in TRANSFORMS] == pytest.approx(errors, rel=1e-4)
    assert got["equivariance_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    assert got["equivariance_error, scaled by 3/4"] != got["equivariance_error, scaled by 1/2"]
    torch.testing.assert_close(found.mean, torch.zeros(16, dtype=torch.float64), atol=1e-4, rtol=0)  # fitted on these
    torch.testing.assert_close(found.std, torch.ones(16, dtype=torch.float64), atol=0.05, rtol=0)
    assert got["smallest_std"] == found.std.min() and got["largest_std"] == found.std.max()
    rank = torch.special.entr(found.eigenvalues / found.eigenvalues.sum()).sum().exp()
    assert rank.item() == pytest.approx(got["effective_rank"], rel=1e-9)


def test_compression_of_known_shapes():
    expected = {"sd": (16, 1), "flux.1": (64, 4), "flux.2": (128, 8)}
    for name, (channels, bits) in expected.items():
        with torch.device("meta"):
            got = compression(AutoEncoder(AUTOENCODERS[name]))
        assert got == {"channels": channels, "pixels_per_token": 256, "bits_per_pixel": bits}


def test_several_side_by_side(place, tmp_path, capsys):
    assert latents(place, tmp_path) == 0
    out, err = capsys.readouterr()
    written = json.loads((tmp_path / "latents.json").read_text())
    assert list(written["autoencoders"]) == ["ae", "rae"]
    ae, rae = written["autoencoders"].values()
    assert (ae["channels"], rae["channels"]) == (16, 192) and rae["bits_per_pixel"] == 12
    assert ae["spectrum_slope"] is not None and rae["spectrum_slope"] is None
    assert "rae: no spectrum of fewer than 8 positions a side" in err
    head, *rows = out.splitlines()[-5:-2]
    assert "effective rank" in head and [row.split()[0] for row in rows] == ["ae", "rae"] and " - " in rows[1]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page.replace("data:image/png", "")
    assert f"<td>{ae['effective_rank']:.4g}</td>" in page and "turned 90°" in page
    assert written["protocol"]["judged_on"] == 4 and written["protocol"]["teacher"] == "hog"
    names = {p.name for p in tmp_path.iterdir()}
    pictures = {"channels.png", "spectra.png", "ae-pca.png", "rae-pca.png"}
    assert names == pictures | {"latents.json", "report.html"}
    assert np.asarray(Image.open(tmp_path / "rae-pca.png")).shape == (2 * 66 - 2, 2 * 66 - 2, 3)


def test_components_are_of_the_picture_above(place):
    """A latent that is the picture's mean over blocks: edges stand where the picture has them"""

    class Blocks(torch.nn.Module):
        cfg = AE

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def posterior(self, x):
            z = torch.nn.functional.avg_pool2d(x, 8)
            return type("Point", (), {"mode": lambda self: z})()

    photographs = embedded_photographs()[1]
    sheet = pca_sheet(Blocks(), photographs).astype(float)
    assert sheet.shape == (2 * 258 - 2, 2 * 258 - 2, 3)
    above, below = sheet[:256, :256], sheet[258:, :256]
    grey = above.reshape(32, 8, 32, 8, 3).mean((1, 3, 4)).ravel()
    assert abs(np.corrcoef(grey, below[::8, ::8, 0].ravel())[0, 1]) > 0.9


def test_a_folder_of_pictures(place, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (70, 80 + i, 3), dtype=np.uint8)).save(tmp_path / f"pictures/{i:02d}.png")
    flags = ["--data", tmp_path / "pictures", "--num", 4]
    assert latents(place, tmp_path / "few", *flags, aes=["ae.safetensors"]) == 0  # two held out: centre squares
    assert latents(place, tmp_path / "many", *flags, "--num", 40, aes=["ae.safetensors"]) == 0
    sizes = [json.loads((tmp_path / n / "latents.json").read_text())["protocol"] for n in ("few", "many")]
    assert [(s["fitted_on"], s["judged_on"]) for s in sizes] == [(4, 2), (40, 20)]


def test_names_are_unique():
    paths = ["runs/a", "x/a.safetensors", "runs/b/autoencoder.safetensors", "b"]
    assert unique_names(paths) == ["a", "a-2", "b", "b-2"]


@pytest.mark.parametrize("flags", [["--resolution", "96"], ["--resolution", "128"]])
def test_sizes_that_do_not_go_are_refused(place, tmp_path, flags, capsys):
    assert latents(place, tmp_path / "x", *flags) == 2
    expected = "a multiple of 64, got 96" if "96" in flags else "64, the RAE's own, got 128"
    assert expected in capsys.readouterr().err and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="square crops of a multiple of 64 pixels, got 32"):
        diagnose(AutoEncoder(AE), noise(2, 32), noise(2, 32), HOGTeacher(16))


def test_bad_flags(place, tmp_path, capsys):
    assert latents(place, tmp_path, "--teacher", "hogg") == 2
    assert "did you mean 'hog'" in capsys.readouterr().err
    assert latents(place, tmp_path, aes=["none"]) == 2
    (tmp_path / "file").write_text("")
    assert latents(place, tmp_path / "file", aes=["ae.safetensors"]) == 2


def test_ctrl_c(place, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_report, "diagnose", interrupt)
    assert latents(place, tmp_path) == 130 and "no result is written" in capsys.readouterr().err
    assert not (tmp_path / "latents.json").exists()
