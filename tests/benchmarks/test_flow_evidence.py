"""The evidence command at tiny size: resumes cell by cell, and says what its numbers say."""

import json

import flow_evidence
import numpy as np
import pytest
import torch
from flow_evidence import LAWS, SHIFTS, TEACHERS, Table, features, main, name_of

from flux2 import AutoEncoder, AutoencoderConfig, save_autoencoder


def test_tiny_grid_resumes_prints_and_draws(tmp_path, monkeypatch, capsys):
    for name, value in {"SAMPLES": 4, "SAMPLE_STEPS": 1, "LAWS": LAWS[:2], "TEACHERS": TEACHERS}.items():
        monkeypatch.setattr(flow_evidence, name, value)
    monkeypatch.setattr(flow_evidence.Budget, "__init__", _small(flow_evidence.Budget.__init__))
    monkeypatch.setattr(flow_evidence, "draw", lambda cells, path: path.write_text(str(len(cells))))
    shape = {"ch": 4, "decoder_ch": 4, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "num_groups": 2}
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AutoencoderConfig(z_channels=4, **shape)), tmp_path / "16.safetensors")
    flags = ["--out", str(tmp_path / "e.json"), "--picture", str(tmp_path / "e.png"), "--work", str(tmp_path)]
    flags += ["--autoencoders", str(tmp_path / "16.safetensors"), "--steps", "2", "--crops", "1", "--held-out", "2"]
    flags += ["--resolution", "32", "--seeds", "1"]
    real, calls = flow_evidence.run_cell, []

    def counted(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(flow_evidence, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    assert len(json.loads((tmp_path / "e.json").read_text())["cells"]) == 2
    assert main(flags) == 0
    assert len(calls) == 1 + 2 * 2 * 2  # one was interrupted, eight cells were done once
    cells = json.loads((tmp_path / "e.json").read_text())["cells"]
    assert set(cells) == {name_of(16, a, s, r, 0) for a in LAWS[:2] for s in SHIFTS for r in TEACHERS}
    assert all(np.isfinite(c["held_out"]) and len(c["bins"]) == 10 and c["frechet"] >= 0 for c in cells.values())
    out = capsys.readouterr().out
    assert "16 channels: shift 1 beats 2.95" in out and "16 channels: REPA helps" in out
    with pytest.raises(SystemExit, match="is of another budget"):
        main([*flags, "--crops", "2"])


def _small(init):
    return lambda self, **given: init(self, **given, width=16, depth=2, batch=2)


def planted(noise=1e-4):
    """Cells with the article's ordering for 128 channels, and its opposite in law and shift for 16"""
    rng, cells = np.random.default_rng(0), {}
    for channels in (16, 128):
        sign = 1 if channels == 128 else -1
        for law in LAWS:
            for shift in SHIFTS:
                for repa in TEACHERS:
                    for seed in range(3):
                        value = 0.5 - sign * 0.05 * (law != "uniform") - 0.03 * (shift > 2) * (channels == 128)
                        value += 0.03 * (shift < 2) * (channels == 16) - 0.01 * (repa == "hog")
                        cells[name_of(channels, law, shift, repa, seed)] = {"held_out": value + noise * rng.normal()}
    return cells


def test_claims_follow_the_numbers():
    table = Table(planted(), "held_out")
    verdicts = {line[:45].strip(): line[46:66].strip() for line in table.claims()}
    assert verdicts == {
        "16 channels: logit-normal beats uniform": "the opposite shows",
        "16 channels: plateau beats uniform": "the opposite shows",
        "128 channels: logit-normal beats uniform": "shows",
        "128 channels: plateau beats uniform": "shows",
        "16 channels: shift 1 beats 2.95": "the opposite shows",
        "128 channels: shift 2.95 beats 1": "shows",
        "16 channels: REPA helps": "shows",
        "128 channels: REPA helps": "shows",
        "shift 2.95 suits 128 channels better than 16": "no difference",
    }
    gain, error = table.compare(128, {"law": "logit_normal"}, {"law": "uniform"})
    assert gain == pytest.approx(0.05, abs=1e-3) and error < 1e-3
    assert sum("no difference" in line for line in Table(planted(noise=0.5), "held_out").claims()) >= 4
    harmed = {
        k: {"held_out": v["held_out"] + 0.1 * k.startswith("16/") * ("/2.95/" in k)} for k, v in planted().items()
    }
    assert Table(harmed, "held_out").claims()[-1].split()[-4] == "shows"
    assert len(table.rows()) == 1 + 2 * 3 * 2 and "0.4200" not in table.rows()[1]


def test_picture_shows_all_cells(tmp_path):
    from PIL import Image

    cells = {k: {**v, "frechet": 1 + v["held_out"]} for k, v in planted().items()}
    flow_evidence.draw(cells, tmp_path / "e.png")
    assert np.asarray(Image.open(tmp_path / "e.png")).std() > 20


def test_features_tell_colour_contrast_and_detail_apart():
    flat = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    checks = flat.clone()
    checks[:, :, ::2, ::2] = 200
    a, b = features(flat)[0], features(checks)[0]
    assert a.shape == (18,) and np.allclose(a[3:], 0, atol=1e-6) and (b[3:9] > 0.1).all() and b[6] > 2 * b[15]
