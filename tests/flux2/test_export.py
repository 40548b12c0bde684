"""Exported programs: equal outputs for any batch and sides, in a process that has torch alone."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from flux2 import AUTOENCODERS, RAE, RAES, AutoEncoder, export

TINY = dataclasses.replace(AUTOENCODERS["flux.2"], ch=8, decoder_ch=8, num_groups=4, ch_mult=(1, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def ae():
    torch.manual_seed(0)
    ae = AutoEncoder(TINY).eval()
    ae.bn.running_mean.normal_()
    ae.bn.running_var.uniform_(0.5, 2)
    return ae


def example(ae, what, n, h, w):
    m = ae.cfg.multiple
    return torch.randn(n, 3, m * h, m * w) if what == "encode" else torch.randn(n, ae.cfg.latent_channels, h, w)


@pytest.fixture(scope="module")
def folder(ae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for what in ("encode", "decode"):
        export(ae, what, folder / f"{what}.pt2")
    assert ae.decoder.backend == "auto"
    return folder


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_round_trip(what, ae, folder):
    run = torch.export.load(folder / f"{what}.pt2").module()
    with torch.no_grad():
        for n, h, w in ((1, 2, 2), (2, 2, 3), (3, 5, 2), (1, 8, 8)):
            x = example(ae, what, n, h, w)
            torch.testing.assert_close(run(x), getattr(ae, what)(x), rtol=1e-4, atol=1e-5)


def test_files_run_where_this_project_is_not(folder):
    """They are alone in their folder, too: nothing half written is left."""
    assert {p.name for p in folder.iterdir()} == {"encode.pt2", "decode.pt2"}
    code = (
        "import sys, torch\nfor name in ('kernels', 'flux2', 'triton'): sys.modules[name] = None\n"
        "encode, decode = (torch.export.load(f'{w}.pt2').module() for w in ('encode', 'decode'))\n"
        "print(list(decode(encode(torch.zeros(1, 3, 12, 16))).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=180)
    assert done.stdout.strip() == "[1, 3, 12, 16]", done.stderr


def test_what_cannot_be_exported_is_an_error(ae, tmp_path):
    with pytest.raises(ValueError, match="export: expected 'encode' or 'decode', got 'forward'"):
        export(ae, "forward")
    with pytest.raises(ValueError, match="export: expected an AutoEncoder, got RAE"):
        export(RAE(RAES["rae-tiny"]), "decode")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        export(ae, "decode", tmp_path / "file" / "decode.pt2")
