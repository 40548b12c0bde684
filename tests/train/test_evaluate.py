"""`python -m train.evaluate` end to end at toy size: figures against computations beside it, protocols, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux2 import AutoEncoder, AutoencoderConfig, SiT, load_autoencoder, save_autoencoder
from flux2.checkpoint_folders import Checkpoints
from flux2.distances import Moments, frechet_distance
from flux2.features import build_features
from flux2.images import adm_center_crop, find_images, from_uint8, load_image, save_png, to_array, to_uint8
from flux2.metrics import psnr, ssim
from flux2.transformer import TransformerConfig
from train import evaluate_generate, evaluate_reconstruct, sample
from train.evaluate import COMMANDS, main
from train.evaluate_generate import GenerateConfig, Samples
from train.sample import FLOW_FORMAT, load_flow

AE = AutoencoderConfig(
    z_channels=4, ch=4, decoder_ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=2, latent_norm="batchnorm"
)
SHAPE = {"width": 16, "depth": 2, "heads": 2, "repa_depth": 1}
SIDE, NUM = 32, 11


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An autoencoder, eleven pictures, and a run of train.flow that has learnt nothing"""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AE), folder / "ae.safetensors")
    rng = np.random.default_rng(0)
    for i in range(NUM):
        small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((60 + i, 50), Image.Resampling.BICUBIC)
        (folder / "pictures").mkdir(exist_ok=True)
        image.save(folder / "pictures" / f"{i:02d}.png")
    model = SiT(TransformerConfig(**SHAPE), 16, 3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    save_autoencoder(AutoEncoder(AE), folder / "run" / "autoencoder.safetensors")
    plain = {"format": FLOW_FORMAT, "transformer": SHAPE, "in_channels": 16, "classes": ["a", "b", "c"], "grid": 2}
    plain |= {"train_shift": 1.0, "step": 5}
    plain["train"] = {"ema_decays": [0.9], "augmentation": {"crop_scale": [1.0, 2.0], "flip": False}}
    Checkpoints(folder / "run" / "checkpoints", keep=1).save(5, {"ema_0.9": model.state_dict()}, plain)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def reconstruct(out, *flags):
    return main(["reconstruct", "--lpips", "none", "--out", str(out), *map(str, flags)])


def generate(out, *flags):
    return main(["generate", "--steps", "2", "--out", str(out), *map(str, flags)])


def figures(out):
    return json.loads((out / "evaluation.json").read_text())["figures"]


def protocol(out):
    return json.loads((out / "evaluation.json").read_text())["protocol"]


def moments(images):
    found = Moments(120)
    found.add(build_features("hog")(images)["pool"])
    return found


@pytest.fixture(scope="module")
def originals(place):
    """The pictures as ADM crops them"""
    images = [adm_center_crop(load_image(p), SIDE) for p in find_images(place / "pictures")]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def recon(place, originals):
    ae = load_autoencoder(place / "ae.safetensors")
    with torch.no_grad():
        return to_uint8(ae.decode(ae.encode(from_uint8(originals))))


# reconstruct


def test_reconstructions_are_measured(place, tmp_path, originals, recon, capsys):
    flags = ["--autoencoder", place / "ae.safetensors", "--data", place / "pictures", "--resolution", SIDE, "--kid"]
    assert reconstruct(tmp_path, *flags, "--batch", 4) == 0
    got, out = figures(tmp_path), capsys.readouterr()
    assert list(got) == ["PSNR", "SSIM", "rFD-HOG", "KD-HOG"]
    assert got["PSNR"] == pytest.approx(psnr(originals, recon).mean().item(), abs=0.02)
    assert got["SSIM"] == pytest.approx(ssim(originals, recon).mean().item(), abs=1e-3)
    expected = frechet_distance(moments(originals), moments(recon))  # a level of a few pixels differs with the batch
    assert got["rFD-HOG"] == pytest.approx(expected, rel=0.02) and expected > 0.1
    about = protocol(tmp_path)
    assert about["count"] == about["reference_count"] == NUM and about["crop"] == "ADM centre crop to 32 pixels"
    assert about["features"] == "hog-v1" and "posterior mean" in about["notes"]
    assert f"protocol: {NUM} pictures, 8-bit values; reference {about['reference'][:12]}" in out.out
    assert f"{NUM} pictures for 120 numbers of hog: rFD-HOG says little" in out.err and "FID" not in out.out
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 * (3 * 34 - 2), 2 * (8 * 34 - 2), 3)
    assert (strip[:64:2, :64:2] == to_array(originals[0])).all()
    assert (strip[68:132:2, -64::2] == to_array(recon[7 * NUM // 8])).mean() > 0.9


def test_two_folders_say_the_same(place, tmp_path, originals, recon):
    for i, path in enumerate(find_images(place / "pictures")):
        save_png(tmp_path / "made" / path.name, to_array(recon[i]))
    flags = ["--reference", place / "pictures", "--images", tmp_path / "made", "--resolution", SIDE]
    assert reconstruct(tmp_path / "folders", *flags) == 0
    got = figures(tmp_path / "folders")
    assert got["PSNR"] == pytest.approx(psnr(originals, recon).mean().item(), rel=1e-12)
    assert got["rFD-HOG"] == pytest.approx(frechet_distance(moments(originals), moments(recon)), rel=1e-6)
    data = ["--autoencoder", place / "ae.safetensors", "--data", place / "pictures", "--resolution", SIDE]
    assert reconstruct(tmp_path / "ae", *data) == 0
    assert main(["table", str(tmp_path / "folders"), str(tmp_path / "ae")]) == 0  # the same originals


def test_a_folder_against_itself(place, tmp_path, capsys):
    flags = ["--reference", place / "pictures", "--images", place / "pictures", "--resolution", SIDE]
    assert reconstruct(tmp_path, *flags, "--num", 5) == 0
    got = figures(tmp_path)
    assert got["PSNR"] == float("inf") and got["SSIM"] == 1 and got["rFD-HOG"] == pytest.approx(0, abs=1e-9)
    assert protocol(tmp_path)["count"] == 5
    assert reconstruct(tmp_path / "x", *flags[:-2]) == 2  # of several sizes
    assert (
        "crop them with --resolution" in capsys.readouterr().err and not (tmp_path / "x" / "evaluation.json").exists()
    )


def test_photographs_are_the_crops_that_training_reports(place, tmp_path):
    assert reconstruct(tmp_path, "--autoencoder", place / "run" / "autoencoder.safetensors", "--num", 6) == 0
    assert protocol(tmp_path)["crop"] == "crops of 64 pixels of the held-out photographs, native scale, seed 0"


def test_lpips_where_there_are_weights_and_where_not(place, tmp_path, monkeypatch, capsys):
    def missing(net, weights):
        raise FileNotFoundError("LPIPS needs a file")

    flags = ["--autoencoder", place / "ae.safetensors", "--num", 4, "--lpips", "alex"]
    with monkeypatch.context() as m:
        m.setattr(evaluate_reconstruct, "LPIPS", missing)
        assert reconstruct(tmp_path, *flags) == 0
        assert "no LPIPS: LPIPS needs a file" in capsys.readouterr().err and "LPIPS-alex" not in figures(tmp_path)
        assert reconstruct(tmp_path, *flags, "--lpips-weights", "missing.pth") == 2
    with pytest.warns(UserWarning, match="random backbone"):
        assert reconstruct(tmp_path, *flags, "--lpips-weights", "random") == 0
    assert figures(tmp_path)["LPIPS-alex"] > 0
    with pytest.warns(UserWarning, match="random backbone"):
        assert reconstruct(tmp_path, *flags, "--lpips-weights", "random", "--resolution", 16) == 0
    assert "no LPIPS: expected sides of at least 32 pixels" in capsys.readouterr().err


# generate


def test_samples_are_those_of_train_sample(place, tmp_path, capsys):
    """--balanced draws what train.sample writes; the file is judged as the run is"""
    drawn = ["--run", str(place / "run"), "--num", "12", "--steps", "2", "--out", str(tmp_path / "s")]
    assert sample.main(drawn) == 0
    flags = ["--reference", place / "pictures", "--metrics", "fd", "kd", "pr"]
    run = ["--run", place / "run", "--num", 12, "--balanced"]
    assert generate(tmp_path / "run", *run, *flags, "--precision", "fp32") == 0
    assert generate(tmp_path / "small", *run, *flags, "--precision", "fp32", "--batch", 5) == 0
    assert generate(tmp_path / "npz", "--images", tmp_path / "s.npz", *flags) == 0
    images = torch.from_numpy(np.load(tmp_path / "s.npz")["arr_0"]).permute(0, 3, 1, 2)
    paths = find_images(place / "pictures")
    real = torch.from_numpy(np.stack([adm_center_crop(load_image(p), SIDE) for p in paths])).permute(0, 3, 1, 2)
    expected = frechet_distance(moments(images), moments(real))
    assert figures(tmp_path / "npz")["gFD-HOG"] == pytest.approx(expected, rel=1e-9)
    for name in ("run", "small"):  # in bf16 above, perhaps, and of another batch
        assert figures(tmp_path / name)["gFD-HOG"] == pytest.approx(expected, rel=0.05)
    assert list(figures(tmp_path / "run")) == ["gFD-HOG", "KD-HOG", "precision-HOG", "recall-HOG"]
    assert "equal shares of classes, fp32" in protocol(tmp_path / "run")["notes"]
    assert protocol(tmp_path / "run")["crop"] == "ADM centre crop to 32 pixels"
    capsys.readouterr()
    assert main(["table", *(str(tmp_path / n / "evaluation.json") for n in ("run", "small", "npz"))]) == 0
    table = capsys.readouterr().out.splitlines()
    assert (
        len(table) == 5 and table[0].split()[0] == "gFD-HOG" and table[-1].startswith("12 pictures each; features hog")
    )


def test_samples_do_not_depend_on_the_batch(place):
    def images(batch):
        config = GenerateConfig(run=str(place / "run"), num=11, steps=2, batch=batch, precision="fp32")
        return torch.cat(list(Samples(load_flow(place / "run"), config, torch.device("cpu")).batches())).int()

    whole, parts = images(11), images(4)
    assert (whole - parts).abs().max() <= 1 and whole.float().std(0).mean() > 1


def test_random_labels_are_of_all_classes_and_the_seed(place):
    def labels(**changes):
        config = GenerateConfig(run=str(place / "run"), num=600, **changes)
        return Samples(load_flow(place / "run"), config, torch.device("cpu")).labels

    first = labels()
    assert all(abs(n - 200) < 50 for n in torch.bincount(first, minlength=3)) and not torch.equal(
        first, first.sort()[0]
    )
    assert torch.equal(first, labels()) and not torch.equal(first, labels(seed=1))
    assert torch.equal(labels(balanced=True), torch.arange(3).repeat_interleave(200))


def test_photographs_are_cropped_as_the_run_was_trained(place, tmp_path):
    assert generate(tmp_path, "--run", place / "run", "--num", 10, "--metrics", "fd") == 0
    about = protocol(tmp_path)
    assert (
        about["reference_count"] == 10 and "crops of 32 pixels of the training pictures, 1 to 2 source" in about["crop"]
    )
    assert "mirrored" not in about["crop"] and "random classes" in about["notes"]
    flags = ["--crop-scale", "1", "3", "--reference-num", 20]
    assert generate(tmp_path, "--run", place / "run", "--num", 10, *flags) == 0
    assert "1 to 3 source" in protocol(tmp_path)["crop"] and protocol(tmp_path)["reference_count"] == 20
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (2 * (2 * 34 - 2), 2 * (8 * 34 - 2), 3)


def test_a_saved_reference_is_taken(place, tmp_path, capsys):
    flags = ["--images", place / "pictures", "--resolution", SIDE, "--metrics", "fd"]
    assert generate(tmp_path / "a", *flags, "--reference", place / "pictures", "--cache", tmp_path / "cache") == 0
    (saved,) = (tmp_path / "cache").glob("*.safetensors")
    assert generate(tmp_path / "b", *flags, "--reference", saved) == 0
    assert protocol(tmp_path / "a") == protocol(tmp_path / "b")
    assert figures(tmp_path / "a") == figures(tmp_path / "b") and figures(tmp_path / "b")["gFD-HOG"] < 1e-9
    about = saved.with_suffix(".json")
    about.write_text(about.read_text().replace("hog-v1", "hog-v0"))
    assert generate(tmp_path / "c", *flags, "--reference", saved) == 2
    assert "expected features hog-v1, got hog-v0" in capsys.readouterr().err


def test_inception_scores(place, tmp_path, capsys):
    """On random weights, which are never called FID"""
    npz = tmp_path / "reference.npz"
    np.savez(npz, arr_0=np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    flags = ["--features", "inception", "--feature-weights", "random", "--reference", npz, "--num", 6]
    flags += ["--metrics", "kd", "pr", "is"]  # a Frechet distance of 2048 numbers takes seconds
    assert generate(tmp_path, "--images", place / "pictures", "--resolution", SIDE, *flags) == 0
    got = figures(tmp_path)
    names = ["KD-", "precision-", "recall-", "IS-"]
    assert list(got) == [f"{n}inception-random" for n in names] and all(np.isfinite(v) for v in got.values())
    assert "FID" not in capsys.readouterr().out


def test_results_of_other_numbers_are_refused_side_by_side(place, tmp_path, capsys):
    for name, num in (("a", 5), ("b", 6)):
        flags = ["--images", place / "pictures", "--resolution", SIDE, "--num", num, "--reference", place / "pictures"]
        assert generate(tmp_path / name, *flags, "--metrics", "fd") == 0
    capsys.readouterr()
    assert main(["table", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("do not compare: count 5 and 6") and "a/evaluation.json and " in line


# all


@pytest.mark.parametrize("argv", [[], ["train"], ["--help"]])
def test_commands_are_listed(argv, capsys):
    assert main(argv) == (0 if argv == ["--help"] else 2)
    out, err = capsys.readouterr()
    assert all(f"\n  {name} " in out + err for name in COMMANDS) and bool(out) == (argv == ["--help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"python -m train.evaluate {command}" in capsys.readouterr().out


REFUSED = {
    "reconstruct": (["reconstruct"], "expected --autoencoder, or --reference and --images, got neither"),
    "both": (["reconstruct", "--autoencoder", "x", "--images", "y", "--reference", "z"], "got --autoencoder, --ref"),
    "one": (["reconstruct", "--images", "y"], "got --images"),
    "missing": (["reconstruct", "--autoencoder", "none.safetensors"], "none.safetensors: no such file or folder"),
    "generate": (["generate"], "expected either --run or --images, got neither"),
    "no run": (["generate", "--run", "none"], "expected a run of train.flow"),
    "num": (["generate", "--run", "x", "--num", "1"], "num: expected 0, or 2 or more, got 1"),
    "features": (["generate", "--run", "x", "--features", "hogg"], "did you mean 'hog'"),
    "batch": (["generate", "--run", "x", "--batch", "0"], "batch: expected 1 or more, got 0"),
    "table": (["table", "none.json"], "none.json: no such result"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_said_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, reason = REFUSED[case]
    try:
        code = main(argv)
    except SystemExit as stop:  # what the parser of the command line does with flags that do not go together
        code = stop.code
    assert code == 2 and reason in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_npz_is_taken_whole(place, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    for flags in (["--num", 2], ["--resolution", 16]):
        assert generate(tmp_path, "--images", tmp_path / "x.npz", *flags) == 2
        assert "is read whole and as stored, 4 of [8, 8] pixels" in capsys.readouterr().err


def test_an_unwritable_place(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert reconstruct(tmp_path / "file" / "x", "--autoencoder", place / "ae.safetensors", "--num", 2) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("module", [evaluate_reconstruct, evaluate_generate])
def test_ctrl_c_leaves_no_result(place, tmp_path, monkeypatch, module, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "finish", interrupt)
    argv = {
        evaluate_reconstruct: ["reconstruct", "--autoencoder", place / "ae.safetensors", "--lpips", "none"],
        evaluate_generate: ["generate", "--run", place / "run", "--steps", "1", "--metrics", "fd"],
    }[module]
    assert main([*map(str, argv), "--num", "3", "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; no result is written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()
