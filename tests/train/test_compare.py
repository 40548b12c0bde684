"""train.compare: the plan, a small grid end to end, going on after a kill, failures, several workers."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy

from flux2.autoencoder import AUTOENCODERS, AutoEncoder
from flux2.checkpoints import save_autoencoder
from flux2.rae import RAES
from flux2.tensor_files import load_json
from train import compare, compare_work
from train.claims import Claims
from train.compare_config import COMPARE_PRESETS, parse_compare
from train.compare_plan import cached_bytes, cell_cost, plan
from train.compare_rows import read_comparison
from train.compare_work import State

ROOT = Path(__file__).parents[2]
SMALL = ["--flow.transformer.width", "32", "--flow.transformer.depth", "2", "--flow.transformer.heads", "2",
         "--flow.transformer.repa-depth", "1", "--flow.repa-hidden", "16", "--flow.batch", "4", "--flow.steps", "4",
         "--flow.precision", "fp32", "--every", "8", "--samples", "6", "--sample-steps", "2", "--held-out", "8",
         "--crops.resolution", "32", "--crops.cached-crops", "14", "--reference-crops", "16", "--laws", "uniform",
         "--train-shifts", "1", "2.95", "--sampling-shifts", "1", "2", "--jobs", "1", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """`--weights` of two autoencoders of 8 and 16 channels a token, and the flags that make a grid of them."""
    folder = tmp_path_factory.mktemp("autoencoders")
    given = []
    for name, z in (("thin", 2), ("wide", 4)):
        torch.manual_seed(z)
        ae = AutoEncoder(dataclasses.replace(toy.toy().autoencoder, z_channels=z))
        save_autoencoder(ae, folder / f"{name}.safetensors")
        given.append(f"{name}={folder / name}.safetensors")
    return ["--autoencoders", "thin", "wide", "--weights", *given]


def results(folder):
    """What was found, by cell, without what a clock or a machine decides."""
    read = {p.stem: load_json(p) for p in sorted((folder / "results").glob("*.json"))}
    return {name: (r["cell"], r["checkpoints"]) for name, r in read.items()}


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """The folder of a comparison that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert compare.main([*SMALL, *weights, "--out", str(out), "--name", "small"]) == 0
    return out / "small"


def test_small_grid_end_to_end(whole):
    found = read_comparison(whole)
    assert (found.done, found.planned, found.failures) == (8, 8, {})
    assert len(found.rows) == 8 * 2 * 2  # models, checkpoints, sampling shifts
    assert {(r.autoencoder, r.channels) for r in found.rows} == {("thin", 8), ("wide", 16)}
    assert {r.nimg for r in found.rows} == {8, 16}
    assert {r.repa for r in found.rows} == {"none", "hog"}
    about = load_json(whole / "autoencoders" / "wide.json")
    assert (about["channels"], about["tokens"], about["pixels_per_token"]) == (16, 4, 256)
    assert about["bits_per_pixel"] == 1.0 and 5 < about["psnr"] < 60 and about["rfd_count"] == 8
    for path in ("report.html", "summary.json", "autoencoders/thin.png", "cells/wide-uniform-2.95-hog-0/samples.png"):
        assert (whole / path).is_file(), path
    assert not list(whole.glob("cells/*/checkpoints")) and not list(whole.glob("claims/*.json"))


def test_csv_holds_every_figure_in_full(whole):
    with (whole / "cells.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 32 and {line["status"] for line in lines} == {"done"}
    line = next(x for x in lines if (x["autoencoder"], x["train_shift"], x["repa"]) == ("wide", "2.95", "hog"))
    checkpoint = load_json(whole / "results" / "wide-uniform-2.95-hog-0.json")["checkpoints"][0]
    assert float(line["velocity"]) == checkpoint["velocity"] and float(line["fd"]) == checkpoint["fd"]["1.00"]
    assert len(checkpoint["bins"]) == 10 and checkpoint["nimg"] == 8


def test_same_command_again_does_nothing_and_another_config_is_refused(whole, weights, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("results/*.json")}
    command = [*SMALL, *weights, "--out", str(whole.parent), "--name", "small"]
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in whole.glob("results/*.json")}
    assert compare.main([*command, "--samples", "7"]) == 2
    assert "another config; samples: saved 6, now 7" in capsys.readouterr().err


def test_killed_at_any_moment_goes_on_to_the_same_figures(whole, weights, tmp_path):
    command = [sys.executable, "-m", "train.compare", *SMALL, *weights, "--out", str(tmp_path), "--name", "small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "small"
    for wanted in (1, 4):  # results there are when the kill comes
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(folder.glob("results/*.json"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        while time.monotonic() < deadline:  # held still, to be killed while it has a claim
            process.send_signal(signal.SIGSTOP)
            if claims(tmp_path):
                break
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert claims(tmp_path)  # of a process that is gone: taken over at once
    assert compare.main(command[3:]) == 0
    assert results(folder) == results(whole)


def test_two_workers_share_the_work_to_the_same_figures(whole, weights, tmp_path):
    assert compare.main([*SMALL, *weights, "--out", str(tmp_path), "--name", "small", "--jobs", "2"]) == 0
    assert results(tmp_path / "small") == results(whole)


def test_failed_model_is_recorded_and_the_rest_goes_on(weights, tmp_path, monkeypatch, capsys):
    trained = compare_work.train_cell
    broken = [True]

    def train_cell(config, latents, *args, **kwargs):
        if broken[0] and config.repa == "hog" and latents.channels == 16:
            raise FloatingPointError("the loss was not finite")
        return trained(config, latents, *args, **kwargs)

    monkeypatch.setattr(compare_work, "train_cell", train_cell)
    command = [*SMALL, "--train-shifts", "1", *weights, "--out", str(tmp_path), "--name", "small"]
    assert compare.main(command) == 1
    captured = capsys.readouterr()
    assert "failed: wide-uniform-1.00-hog-0: FloatingPointError: the loss was not finite" in captured.err
    assert "3 of 4 models done, 1 failed" in captured.out
    assert read_comparison(tmp_path / "small").failures.keys() == {"wide-uniform-1.00-hog-0"}
    broken[0] = False
    assert compare.main(command) == 1  # what failed is not tried again unasked
    assert compare.main([*command, "--retry-failed"]) == 0
    assert read_comparison(tmp_path / "small").done == 4


def test_broken_autoencoder_fails_its_models_alone(weights, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    given = ["--autoencoders", "thin", "bad", "--weights", weights[4], f"bad={tmp_path / 'bad.safetensors'}"]
    command = [*SMALL, "--train-shifts", "1", "--repa", "none", *given, "--out", str(tmp_path), "--name", "small"]
    config, options = parse_compare(command)
    folder = options.folder(config)
    folder.mkdir()
    compare.write_header(config, folder, torch.device("cpu"))
    assert compare_work.run_worker(config, options) == 0
    assert State(config, folder).counts() == (2, 1)
    assert "bad failed: ValueError" in load_json(folder / "results" / "bad-uniform-1.00-none-0.json")["error"]


def started(weights, out, jobs, *flags, results=1):
    """A comparison in a process group of its own, once it has that many results, and claims."""
    command = [sys.executable, "-m", "train.compare", *SMALL, *weights, "--out", str(out), "--name", "small"]
    command += ["--flow.steps", "40", "--jobs", str(jobs), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (len(list(out.glob("small/results/*.json"))) >= results and claims(out)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def claims(out):
    return list(out.glob("small/claims/*.json"))


@pytest.mark.parametrize("jobs, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_interruption_gives_claims_back(weights, tmp_path, jobs, number):
    process = started(weights, tmp_path, jobs)
    os.killpg(process.pid, number)  # as a terminal does: all of the group
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number and "the same command goes on" in said
    assert not claims(tmp_path)


@pytest.mark.parametrize("moment", ["acquire", "_release"])
def test_signal_while_a_claim_is_made_or_given_up_leaves_none_behind(weights, tmp_path, monkeypatch, moment):
    acquired = moment == "acquire"
    plain = getattr(Claims, moment)

    def signalled(self, *args):
        result = plain(self, *args) if acquired else None  # its file is there
        os.kill(os.getpid(), signal.SIGTERM)
        return result if acquired else plain(self, *args)

    monkeypatch.setattr(Claims, moment, signalled)
    config, options = parse_compare([*SMALL, *weights, "--out", str(tmp_path), "--name", "small"])
    (tmp_path / "small").mkdir()
    compare.write_header(config, tmp_path / "small", torch.device("cpu"))
    assert compare_work.run_worker(config, options) == 128 + signal.SIGTERM
    assert (tmp_path / "small" / "claims").is_dir() and not claims(tmp_path)


def test_workers_leave_when_their_parent_is_killed(weights, tmp_path):
    process = started(weights, tmp_path, jobs=2)
    process.kill()
    theirs = Claims(tmp_path / "small" / "claims", stale=3600)  # not by going stale
    names, deadline = {path.stem for path in claims(tmp_path)}, time.monotonic() + 60
    while names and time.monotonic() < deadline:  # free: given back, or of a process that is gone
        free = {name for name in names if (claim := theirs.acquire(name)) and [claim.release()]}
        names -= free
        time.sleep(0.05)
    assert not names
    process.communicate(timeout=120)


def trains(out, name):
    """Process that holds a model's claim and has printed something of it since, or None."""
    try:
        claim = load_json(out / "small" / "claims" / f"{name}.json")
        printed = (out / "small" / "cells" / name / "output.txt").stat().st_mtime
    except (FileNotFoundError, ValueError):  # given back, or about to be written
        return None
    return claim.get("pid") if printed > claim["time"] else None


def test_a_model_that_workers_die_of_fails_alone(weights, tmp_path):
    """Killed under whoever takes it, which may be a third before two are counted; the rest is done"""
    process = started(weights, tmp_path, 2, "--train-shifts", "1", "--repa", "none", results=0)
    name, killed = "wide-uniform-1.00-none-0", set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        pid = trains(tmp_path, name)
        if pid and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.02)
    said = process.communicate(timeout=120)[0]
    assert said.count(f"a worker died of SIGKILL at {name}") == len(killed) >= 2, said
    assert process.returncode == 1 and "1 of 2 models done, 1 failed" in said
    failed = load_json(tmp_path / "small" / "results" / f"{name}.json")
    assert failed["error"] == "2 workers died of it, the last of SIGKILL; was there enough memory?"


def test_presets_count_what_the_article_has():
    article = COMPARE_PRESETS["article"]
    per_autoencoder = [c for c in article.cells() if c.autoencoder == "flux.2"]
    assert len(per_autoencoder) == 30 and len(article.sampling_shifts) == 5
    assert article.train_shifts == (1.0, 1.78, 2.95, 4.63, 6.93) and article.repa == ("none", "dinov2-b")
    flow = article.flow_of(per_autoencoder[0])
    assert (flow.batch, flow.lr, flow.weight_decay, flow.ema_decays[0]) == (256, 1e-4, 0.0, 0.9999)
    assert (article.samples, article.sample_steps, article.every) == (50_000, 50, 100_000 * 256)
    assert len({c.id for c in article.cells()}) == 150


@pytest.mark.parametrize("preset", COMPARE_PRESETS)
def test_plans_print_cells_images_and_hours(preset):
    config = COMPARE_PRESETS[preset]
    text = plan(config, 0, 0, 1)
    models = len(config.autoencoders) * len(config.laws) * len(config.train_shifts) * 2 * len(config.seeds)
    assert f"= {models} models" in text and "estimated, not measured" in text
    assert ("weights missing: sd, flux.1" in text) == (preset == "article")
    assert ("latent caches: 5.16 MiB a crop in all, 4.9 TiB for a million pictures" in text) == (preset == "article")


def test_what_the_caches_take():
    article = COMPARE_PRESETS["article"]
    latent = 2 * 2 * 2 * 16 * 16 * 128  # mean and log-variance, with mirror images, in fp16
    assert cached_bytes(article, AUTOENCODERS["flux.2"]) == latent + 2 * 2 * 16 * 16 * 768  # and DINOv2-B's tokens
    assert cached_bytes(article, RAES["rae"]) == 2 * (2 * 2 * 16 * 16 * 768)


def test_precision_of_a_comparison_is_that_of_who_began_it(whole, weights, capsys):
    """Machines that compute in different precisions do not work on one comparison"""
    assert load_json(whole / "comparison.json")["config"]["flow"]["precision"] == "fp32"
    command = [*SMALL, *weights, "--out", str(whole.parent), "--name", "small", "--flow.precision", "bf16"]
    assert compare.main(command) == 2
    assert "another config; flow.precision: saved fp32, now bf16" in capsys.readouterr().err


def test_automatic_precision_is_resolved_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_worker", lambda config, options: 0)
    monkeypatch.setattr(compare, "choose_precision", lambda precision, device: f"of {device}, not {precision}")
    assert compare.main(["--out", str(tmp_path), "--device", "cpu", "--jobs", "1"]) == 0
    saved = load_json(tmp_path / "compare-toy" / "comparison.json")["config"]
    assert saved["flow"]["precision"] == "of cpu, not auto"


def test_cost_of_a_model_grows_with_what_it_is_made_of():
    config = COMPARE_PRESETS["toy"]
    shape = toy.toy().autoencoder
    cost = cell_cost(config, shape)
    twice = dataclasses.replace(config, flow=dataclasses.replace(config.flow, steps=2 * config.flow.steps))
    twice = dataclasses.replace(twice, every=2 * config.every)
    trained = cell_cost(twice, shape).flops - cost.flops
    forward = trained / (3 * config.flow.steps * config.flow.batch)  # operations of one latent
    width, depth = config.flow.transformer.width, config.flow.transformer.depth
    tokens = (config.crops.resolution // shape.multiple) ** 2
    assert 0.9 < forward / (2 * 12 * width**2 * depth * tokens) < 1.6  # matrices of the blocks, and the rest


def changed(**fields):
    return dataclasses.replace(COMPARE_PRESETS["toy"], **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"laws": ("unifrom",)}, "laws: expected one of uniform, .*got 'unifrom'.*uniform"),
        ({"laws": ("uniform", "uniform")}, "laws: expected different values"),
        ({"repa": ("hog", "dinov2-b")}, "repa: expected one teacher at most, got hog, dinov2-b"),
        ({"train_shifts": (1.0, 1.001)}, "train_shifts: expected numbers that differ to two places"),
        ({"sampling_shifts": (0.0,)}, "expected numbers above 0"),
        ({"autoencoders": ("../up",)}, "autoencoders: expected plain names, got '../up'"),
        ({"weights": ("sd",)}, "weights: expected NAME=PATH of sd, .*got 'sd'"),
        ({"weights": ("other=file",)}, "weights: expected NAME=PATH of sd, .*got 'other=file'"),
        ({"features": "inceptoin"}, "features: expected one of .*got 'inceptoin'"),
        ({"every": 0}, "every: expected more than 0, got 0"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
    ],
)
def test_errors_name_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)


def test_unknown_autoencoder_and_missing_pictures_write_nothing(tmp_path, capsys):
    assert compare.main(["--autoencoders", "mine", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "preset 'toy' does not train it; give it with --weights mine=PATH" in capsys.readouterr().err
    assert compare.main(["--preset", "article", "--out", str(tmp_path)]) == 2
    assert "give a folder of pictures with --crops.data" in capsys.readouterr().err
    assert compare.main(["--report", "--out", str(tmp_path)]) == 2
    assert "expected the folder of a comparison" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_without_semantics_differ_from_flux_2_in_one_number():
    training = COMPARE_PRESETS["toy"].training
    assert training["flux.2"].replace("0.1", "0") == training["flux.2-nosem"]
