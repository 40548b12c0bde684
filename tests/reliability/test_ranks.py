"""Several processes train what one would: the same samples, gradients, terms, weights and averages, up to rounding."""

import json
import os
import signal

import programs
import pytest

from flux2.tensor_files import load_tensors
from train.loop import read_log

EVERYTHING = ["--batch", "8", "--accumulate", "2", "--gan.lecam", "0.1", "--gan.r1", "0.1", "--gan.r1-every", "3",
              "--gan.augment", "0.5", "--vf-weight", "0.1", "--eq-probability", "0.5", "--eq-scales", "1.0",
              "--learn-logvar", "--ema-decays", "0.9", "0.5", "--steps", "20", "--lr", "1e-4"]  # fmt: skip
FLOW = ["--batch", "8", "--accumulate", "2", "--repa", "hog", "--steps", "20", "--lr", "1e-4"]
CLOCKS = {"images_per_second", "peak_memory_bytes"}


def trained(which, folder, count, name, *flags, program=programs.VAE, fault=None):
    folder.mkdir(parents=True, exist_ok=True)
    launcher = programs.torchrun("--nproc-per-node", count) if count > 1 else ()
    fault = fault or ("record", str(folder / f"recorded-{name}"))
    if fault[0] == "record":
        (folder / f"recorded-{name}").mkdir(exist_ok=True)
    code, said = programs.run(program, folder, *flags, name=name, launcher=launcher, fault=fault)
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Runs of one and of two processes, at the same batch"""
    folder = tmp_path_factory.mktemp("vae")
    for count, name in ((1, "one"), (2, "two")):
        trained("vae", folder, count, name, *EVERYTHING, "--stop-after", "10")
    return folder


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Of one process; of two; of four that two go on from; spread over two, then gone on with by one"""
    folder = tmp_path_factory.mktemp("flow")
    program = [*programs.FLOW, "--autoencoder", programs.tiny_autoencoder(folder)]
    stop = ("--stop-after", "10")
    trained("flow", folder, 1, "one", *FLOW, *stop, program=program)
    trained("flow", folder, 2, "two", *FLOW, *stop, program=program)
    trained("flow", folder, 4, "resized", *FLOW, "--stop-after", "5", program=program)
    trained("flow", folder, 2, "resized", *FLOW, *stop, program=program)
    spread = (*FLOW, "--parallel", "fsdp", "--checkpoint-activations")
    trained("flow", folder, 2, "spread", *spread, "--stop-after", "5", program=program)
    trained("flow", folder, 2, "spread", *spread, "--stop-after", "7", program=program)
    trained("flow", folder, 1, "spread", *FLOW, *stop, program=program)
    return folder


def distance(a, b):
    return ((a - b).double().norm() / a.double().norm().clamp(min=1e-30)).item()


def assert_same_gradients(folder, name):
    """Of the first two updates of each optimiser; the worst relative error"""
    worst = 0.0
    files = sorted((folder / "recorded-one").glob("*.safetensors"))
    for file in files:
        one, two = load_tensors(file)[0], load_tensors(folder / f"recorded-{name}" / file.name)[0]
        assert one.keys() == two.keys()
        largest = max(g.double().norm() for g in one.values())
        for key in one:
            if one[key].double().norm() > 1e-5 * largest:  # others are the rounding of a zero
                worst = max(worst, distance(one[key], two[key]))
    assert files and worst < 2e-3
    return worst


def assert_same_log(folder, name):
    worst = 0.0
    one, two = (
        [r for r in read_log(folder / n / "log.jsonl") if "loss" in r or "held_out_psnr" in r] for n in ("one", name)
    )
    one, two = ({(r["step"], k): v for r in records for k, v in r.items()} for records in (one, two))
    for key in one.keys() & two.keys():
        if isinstance(one[key], float) and key[1] not in CLOCKS:
            worst = max(worst, abs(one[key] - two[key]) / (abs(one[key]) + 1e-3))
    assert (10, "loss") in one.keys() & two.keys() and worst < 1e-2
    return worst


def assert_same_weights(folder, name, files):
    """By how far they went: for what begins at zero a difference is a share of what ten steps changed, and Adam makes
    full steps of gradients that are no more than rounding, more of them on some processors (4e-4 and 2e-3 were seen)"""
    worst, one, two = 0.0, programs.newest(folder / "one"), programs.newest(folder / name)
    assert one.keys() == two.keys()
    for file in files:
        for key in one[file]:
            if one[file][key].ndim > 1:
                worst = max(worst, distance(one[file][key], two[file][key]))
    assert worst < 1e-2
    return worst


def samples(folder, name):
    """{step: {index in the batch: hash}} of all processes that recorded"""
    found = {}
    for file in (folder / f"recorded-{name}").glob("samples-*.json"):
        for step, hashes in json.loads(file.read_text()):
            found.setdefault(step, {}).update({int(i): h for i, h in hashes.items()})
    return found


def test_two_processes_train_the_autoencoder_that_one_trains(soak, vae):
    assert samples(vae, "two") == samples(vae, "one") and len(samples(vae, "one")[0]) == 8
    gradients = assert_same_gradients(vae, "two")
    assert len(list((vae / "recorded-two").glob("*.safetensors"))) == 4  # two updates of G and of D
    terms = assert_same_log(vae, "two")
    files = ("model.safetensors", "ema.safetensors", "ema_0.5.safetensors", "discriminator.safetensors")
    weights = assert_same_weights(vae, "two", files)
    soak.found(
        "train.vae: 2 processes equal 1 at the same batch (G, D, adaptive weights, averages, metrics)",
        worst_gradient=f"{gradients:.1e}", worst_term=f"{terms:.1e}", worst_weight=f"{weights:.1e}",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["two", "resized", "spread"])
def test_any_number_of_processes_trains_the_flow_model_that_one_trains(soak, flow, name):
    assert samples(flow, name) == samples(flow, "one") and sorted(samples(flow, name)) == list(range(10))
    found = {"weight": assert_same_weights(flow, name, ("model.safetensors", "ema_0.99.safetensors"))}
    if name == "two":  # the others' log has other windows, and their first updates are several processes' or spread
        found |= {"gradient": assert_same_gradients(flow, name), "term": assert_same_log(flow, name)}
    how = {
        "two": "2 processes equal 1",
        "resized": "4 processes, then 2, equal 1",
        "spread": "FSDP2 on 2, then 1 alone",
    }
    soak.found(
        f"train.flow: {how[name]}; the samples in the same order",
        **{f"worst_{what}": f"{error:.1e}" for what, error in found.items()},
    )  # fmt: skip


def test_all_processes_skip_together_and_the_one_is_named(soak, tmp_path):
    flags = ("--batch", "8", "--steps", "50", "--stop-after", "10")
    trained("vae", tmp_path, 2, "x", *flags, fault=("nan", "2"))
    skipped = [r for r in read_log(tmp_path / "x" / "log.jsonl") if "skipped" in r]
    assert [(r["step"], r["broke"], r["ranks"], len(r["samples"])) for r in skipped] == [
        (4, ["l1"], [1], 4),
        (5, ["l1"], [1], 4),
    ]
    steps = programs.newest(tmp_path / "x")["optimiser.safetensors"]
    assert {int(v) for k, v in steps.items() if k.endswith(".step")} == {8}  # of 10
    code, said = programs.run(
        programs.VAE, tmp_path, *flags, "--patience", "3", name="y", fault=("nan", "9"),
        launcher=programs.torchrun("--nproc-per-node", 2),
    )  # fmt: skip
    assert code == 1 and "in a row were skipped" in said and "Traceback" not in said.split("error: ")[0]
    soak.found("A NaN on one process: all skip, the term, the process and its samples are named", skipped=2)


def test_signal_to_one_process_stops_all_after_the_same_step(soak, tmp_path):
    flags = ("--steps", "1000000", "--save-every", "1000000", "--batch", "4")
    launcher = programs.torchrun("--nproc-per-node", 2)
    stops = []
    for _ in range(soak.rounds(1, 5)):
        process = programs.start(programs.VAE, tmp_path, *flags, launcher=launcher)
        at = stops[-1] if stops else 0
        programs.wait_for(lambda at=at: programs.steps_logged(tmp_path / "x") >= at + 10, process)
        os.kill(programs.worker(process, 1), signal.SIGUSR1)
        _, said = programs.finish(process)
        assert "go on with --resume auto --name x" in said, said
        stops.append(programs.store_of(tmp_path / "x").newest())
    assert stops == sorted(set(stops)) and stops[0] >= 10
    soak.found("SIGUSR1 to one process: all stop after the same step, saved", signals=len(stops))


def test_batch_that_cannot_be_shared_is_refused(soak, tmp_path):
    code, said = programs.run(programs.VAE, tmp_path, "--batch", "3", launcher=programs.torchrun("--nproc-per-node", 2))
    assert code == 1 and "error: batch: expected a multiple of 2 (1 parts, 2 processes), got 3" in said
    assert not (tmp_path / "x").exists()
    soak.found("A batch that the processes cannot share: refused before anything is written", faults=1)
