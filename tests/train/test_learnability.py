"""The learnability probe: its interval and rank correlation in closed form, a small run, what it refuses."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch
import toy
import yaml

from flux2.autoencoder import AutoEncoder
from flux2.checkpoints import save_autoencoder
from flux2.features import build_features
from flux2.images import save_png
from flux2.schedules import auto_shifts
from flux2.tensor_files import load_json, save_json
from train import evaluate, learnability
from train.learnability import (
    PROBE_PRESETS,
    ProbeOptions,
    interval,
    named_paths,
    rank_correlation,
    summary,
    table,
)

SMALL = ["--flow.transformer.width", "32", "--flow.transformer.depth", "2", "--flow.transformer.heads", "2",
         "--flow.transformer.repa-depth", "1", "--flow.batch", "4", "--flow.steps", "4", "--flow.precision", "fp32",
         "--every", "8", "--samples", "6", "--sample-steps", "2", "--held-out", "8", "--crops.resolution", "32",
         "--crops.cached-crops", "14", "--reference-crops", "16", "--seeds", "2", "--device", "cpu"]  # fmt: skip


def test_interval_is_students():
    # mean 2, standard deviation 1, n = 3: t(97.5 %, 2 degrees) = 4.302653
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    mean, half = interval([5.0])
    assert mean == 5.0 and math.isnan(half)


@pytest.mark.parametrize(
    "b, expected",
    [
        ({"p": 10, "q": 20, "r": 30, "s": 40}, 1.0),
        ({"p": 4, "q": 3, "r": 2, "s": 1}, -1.0),
        ({"p": 1, "q": 2, "r": 4, "s": 3}, 0.8),  # 1 - 6 * 2 / (4 * 15)
        ({"p": 1, "q": 2}, math.nan),
        ({"p": 1, "q": 1, "r": 1, "s": 1}, math.nan),
    ],
)
def test_rank_correlation_is_spearmans(b, expected):
    found = rank_correlation({"p": 0.1, "q": 0.2, "r": 0.3, "s": 9.0, "other": 1.0}, b)
    assert found == pytest.approx(expected, nan_ok=True)


def test_summary_is_over_seeds():
    seeds = [[{"nimg": 8, "velocity": v, "fd": 2 * v, "bins": [v, 0.0]}] for v in (1.0, 2.0, 3.0)]
    (point,) = summary(seeds)
    assert point["nimg"] == 8 and point["velocity"]["mean"] == 2.0 and point["fd"]["mean"] == 4.0
    assert point["fd"]["half_width"] == pytest.approx(2 * point["velocity"]["half_width"])
    assert point["bins"] == [2.0, 0.0]


def test_table_is_ordered_by_velocity_loss():
    measures = {"x": (0.9, 1.0), "y": (0.2, 3.0), "z": (0.5, 2.0)}
    entries = {
        n: {"channels": 4, "train_shift": 1.0, "sampling_shift": 2.95, "points": summary([[
            {"nimg": 8, "velocity": v, "fd": fd, "bins": [v]}]])}
        for n, (v, fd) in measures.items()
    }  # fmt: skip
    header, rows = table({"features": {"label": "FD-HOG"}, "autoencoders": entries})
    assert [r[0] for r in rows] == ["y", "z", "x"] and header[-1] == "FD-HOG"
    assert rows[0][1:] == ["4", "1.00 / 2.95", "0.2000", "3.000"]


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoders")
    for name, z in (("a", 2), ("b", 4), ("c", 8)):
        torch.manual_seed(z)
        save_autoencoder(
            AutoEncoder(dataclasses.replace(toy.toy().autoencoder, z_channels=z)), folder / f"{name}.safetensors"
        )
    return folder


def test_small_probe_goes_on_and_correlates_with_a_comparison(autoencoders, tmp_path, capsys):
    out, compared = tmp_path / "out", tmp_path / "compared"
    given = [str(autoencoders / f"{n}.safetensors") for n in "ab"]
    command = ["learnability", *SMALL, "--out", str(out)]
    assert evaluate.main([*command, "--autoencoder", *given]) == 0
    first = load_json(out / "learnability.json")
    assert list(first["autoencoders"]) == ["a", "b"] and first["autoencoders"]["b"]["channels"] == 16
    points = first["autoencoders"]["a"]["points"]
    assert [p["nimg"] for p in points] == [8, 16] and len(points[0]["bins"]) == 10
    assert all(p["velocity"]["half_width"] > 0 and p["fd"]["mean"] > 0 for p in points)
    seeds = first["autoencoders"]["a"]["seeds"]
    assert seeds[0] != seeds[1] and points[-1]["velocity"]["mean"] == pytest.approx(
        (seeds[0][-1]["velocity"] + seeds[1][-1]["velocity"]) / 2
    )
    assert (out / "learnability.png").is_file()
    velocity = {n: e["points"][-1]["velocity"]["mean"] for n, e in first["autoencoders"].items()}

    # a third joins: what is there is kept; ranked as a comparison ranks them
    compared.mkdir()
    names = {"autoencoders": ["a", "b", "c"], "weights": [f"{n}={autoencoders / n}.safetensors" for n in "abc"]}
    save_json(compared / "comparison.json", {"config": names})
    save_json(compared / "summary.json", {"best": {n: {"best": {"fd": i}} for i, n in enumerate("abc")}})
    capsys.readouterr()
    assert evaluate.main([*command, "--comparison", str(compared)]) == 0
    second = load_json(out / "learnability.json")
    assert {n: second["autoencoders"][n]["seeds"] for n in "ab"} == {n: first["autoencoders"][n]["seeds"] for n in "ab"}
    shift = auto_shifts(32)[0]
    trained = yaml.safe_load((out / "models" / "c-0" / "config.yaml").read_text())
    assert shift > 1 and second["autoencoders"]["c"]["train_shift"] == trained["shift"] == shift
    velocity["c"] = second["autoencoders"]["c"]["points"][-1]["velocity"]["mean"]
    expected = rank_correlation(velocity, {"a": 0, "b": 1, "c": 2})
    assert second["comparison"]["velocity"] == pytest.approx(expected) and second["comparison"]["autoencoders"] == 3
    assert "rank correlation with the comparison's best FD over 3 autoencoders" in capsys.readouterr().out

    assert evaluate.main([*command, "--comparison", str(compared), "--samples", "7"]) == 2
    assert "another config; samples: saved 6, now 7" in capsys.readouterr().err


def test_other_features_or_pictures_do_not_join_a_table(autoencoders, tmp_path, capsys, monkeypatch):
    """Regression: with the same names in the config, rows were put beside those of other features or pictures."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(4):
        save_png(pictures / f"{i}.png", np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    command = ["learnability", *SMALL, "--seeds", "1", "--crops.data", str(pictures), "--out", str(out)]
    assert evaluate.main([*command, "--autoencoder", str(autoencoders / "a.safetensors")]) == 0
    saved = (out / "learnability.json").read_bytes()
    command += ["--autoencoder", str(autoencoders / "b.safetensors")]

    def others(*args):
        features = build_features(*args)
        features.identity = "hog-others"
        return features

    with monkeypatch.context() as patch:
        patch.setattr(learnability, "build_features", others)
        assert evaluate.main(command) == 2
    assert "features.identity: saved hog-v1, now hog-others" in capsys.readouterr().err
    for number, words in ((0, "pictures.held_out: saved"), (1, "pictures.training: saved")):  # the first is held out
        time = (pictures / f"{number}.png").stat().st_mtime_ns
        os.utime(pictures / f"{number}.png", ns=(time + 10**9,) * 2)
        assert evaluate.main(command) == 2
        assert words in capsys.readouterr().err
        os.utime(pictures / f"{number}.png", ns=(time,) * 2)
    assert (out / "learnability.json").read_bytes() == saved and not (out / "latents" / "b").exists()


def test_errors_name_what_was_expected(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected --autoencoder PATH ..., or --comparison FOLDER; got neither"):
        named_paths(ProbeOptions())
    with pytest.raises(ValueError, match="'mine' is given twice"):
        named_paths(ProbeOptions(autoencoder=("runs/mine", "mine.safetensors")))
    with pytest.raises(ValueError, match="expected PATH or NAME=PATH, got '=x'"):
        named_paths(ProbeOptions(autoencoder=("=x",)))
    with pytest.raises(ValueError, match="expected the folder of a comparison"):
        named_paths(ProbeOptions(comparison=str(tmp_path)))
    with pytest.raises(ValueError, match="seeds: expected 1 or more, got 0"):
        dataclasses.replace(PROBE_PRESETS["toy"], seeds=0)
    missing = ["--autoencoder", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "out")]
    assert evaluate.main(["learnability", *missing]) == 2
    assert "none.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()
