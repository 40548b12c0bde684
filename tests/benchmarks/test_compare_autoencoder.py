"""The comparison with diffusers at a tiny size: its rows, what it goes on with, and what it says of floors."""

import dataclasses
import json

import compare_autoencoder
import pytest
import torch
from compare_autoencoder import CONTESTANTS, below, breakdown, kept_bytes, main, table
from whole_models import Entrant

from flux2 import AUTOENCODERS

TINY = dataclasses.replace(AUTOENCODERS["flux.2"], ch=16, decoder_ch=16, num_groups=8, num_res_blocks=1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("compare") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_autoencoder, "AUTOENCODERS", {"flux.2": TINY})
        patch.setattr(compare_autoencoder, "FLOORS", dict.fromkeys(compare_autoencoder.FLOORS, 1e-9))
        patch.setattr(compare_autoencoder, "KEPT_AT_MOST", 1e9)
        assert main(["--size", "16", "--rounds", "1", "--dtype", "fp32", "--out", str(out)]) == 0
        before = out.read_bytes()
        assert main(["--size", "16", "--rounds", "1", "--dtype", "fp32", "--out", str(out)]) == 0
        assert out.read_bytes() == before  # nothing was measured again
        assert main(["--size", "16", "--rounds", "1", "--dtype", "bf16", "--only", "decode", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_every_row_has_its_figures(ran):
    rows = ran["rows"]
    assert [(r["kind"], r["dtype"]) for r in rows.values()] == [
        *((kind, "fp32") for kind in compare_autoencoder.KINDS),
        ("decode", "bf16"),
    ]
    for row in rows.values():
        if row["kind"] == "attention":
            assert row["ms"].keys() == row["held_bytes"].keys() and max(row["difference"].values()) < 1e-5
            continue
        assert (
            set(row["ms"]) | set(row["missing"]) == set(CONTESTANTS)
            and row["peer"] in CONTESTANTS[1:]
            and row["ratio"] > 0
        )
        parts = row["parts_ms"]
        assert set(parts) == {"ours", row["peer"]} and all(p["convolutions"] > 0 < p["norms"] for p in parts.values())
        assert ("kept_ratio" in row) == (row["kind"] == "train step")
    assert rows["decode 16 fp32"]["difference"] < 1e-4
    assert ran["environment"]["commit"] and ran["environment"]["sources"]
    text = table(ran)
    assert "| decode 16, fp32 |" in text and "| 4 tokens, fp32 | sdpa |" in text


def test_a_format_of_hopeless_convolutions_is_left_out_and_named(monkeypatch):
    times = {"diffusers NCHW": [700.0], "diffusers channels_last": [10.0]}
    monkeypatch.setattr(compare_autoencoder, "interleaved", lambda *a, **k: times)
    assert compare_autoencoder.hopeless(torch.float32) == {
        "diffusers NCHW": "convolutions take 70 times the other format's"
    }
    times["diffusers NCHW"] = [90.0]
    assert compare_autoencoder.hopeless(torch.float32) == {}


def test_what_is_below_its_floor():
    row = {"kind": "decode", "dtype": "fp32", "ratio": 1.14}
    assert below(row) == ["decode fp32: 1.14 is below 1.15"] and below(row | {"ratio": 1.15}) == []
    step = {"kind": "train step", "dtype": "bf16", "ratio": 1.2, "kept_ratio": 0.46}
    assert below(step) == ["train step bf16: 0.46 of diffusers' bytes kept, above 0.45"]
    assert below(step | {"kept_ratio": 0.45}) == [] and below({"kind": "attention", "dtype": "fp32"}) == []


def test_kept_bytes_are_those_of_activations_once_each():
    module = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def call():
        y = module(x)
        (y * y * y).sum().backward()

    entrant = Entrant(module, module, module, False)
    assert kept_bytes(call, entrant) == 4 * (3 * 32)  # x, y, y * y


def test_breakdown_names_the_operations():
    x, w = torch.randn(1, 8, 32, 32), torch.randn(8, 8, 3, 3)
    parts = breakdown(lambda: torch.nn.functional.silu(torch.nn.functional.conv2d(x, w)))
    assert parts["convolutions"] > 0 and parts["SiLU"] > 0 and parts["norms"] == parts["attention"] == 0


def test_bad_input_is_named(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    for argv, message in (
        (["--size", "20"], "expected a positive multiple of 16 and a round or more, got --size 20"),
        (["--out", str(tmp_path / "a.json")], "expected a report of this program or no file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
