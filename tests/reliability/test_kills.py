"""SIGKILL at any moment, inside a save as well: the run goes on from a whole checkpoint to the same weights."""

import itertools
import random
import signal
import time

import programs
from toy import assert_same_bits

WRITES = 150  # fsyncs, renames and tensor files of a run of these steps
STEPS = ("--steps", "12", "--save-every", "3")


def test_killed_runs_end_with_the_bits_of_a_run_that_was_not(soak, tmp_path):
    code, said = programs.run(programs.VAE, tmp_path, *STEPS, name="whole")
    assert code == 0, said
    random_moments, kills, inside = random.Random(0), soak.rounds(3, 30), 0
    folder, restarts = tmp_path / "x", []
    moments = [(random_moments.randint(10, WRITES), None) for _ in range(kills - kills // 3)]  # at a write,
    moments += [(0, random_moments.uniform(1, 6)) for _ in range(kills // 3)]  # or when the clock says
    for number, seconds in moments:
        process = programs.start(programs.VAE, tmp_path, *STEPS, fault=("kill", str(number)))
        if seconds:
            time.sleep(seconds)
            process.kill()
        code, said = programs.finish(process)
        assert code in (-signal.SIGKILL, 0), said  # 0: the run had so little left that it came to its end
        inside += len(list(folder.glob("checkpoints/.tmp-*")))
        store = programs.store_of(folder)
        restarts.append(store.newest() or 0)
        assert restarts[-1] == max(store.steps(), default=0)  # none of a final name is damaged
        if code == 0 and len(restarts) < kills:  # the rest of the kills hits a new run
            assert_same_bits(programs.newest(tmp_path / "whole"), programs.newest(folder))
            folder.rename(tmp_path / f"done-{len(restarts)}")
    code, said = programs.run(programs.VAE, tmp_path, *STEPS)
    assert code == 0 and "held-out PSNR" in said
    assert_same_bits(programs.newest(tmp_path / "whole"), programs.newest(folder))
    steps = [r["step"] for r in programs.read_log(folder / "log.jsonl") if "loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    soak.found(
        "SIGKILL at any moment: the run goes on from a whole checkpoint, to the same bits",
        kills=kills, inside_a_save=inside, damaged_checkpoints=0,
    )  # fmt: skip


def test_killed_inside_a_save_keeps_the_checkpoint_before(soak, tmp_path):
    """At each write of the second save in turn, up to the one that completes it; in `make test` at two of them"""
    code, said = programs.run(programs.VAE, tmp_path, *STEPS, "--stop-after", "3")
    assert code == 0, said
    store, kills = programs.store_of(tmp_path / "x"), 0
    for number in itertools.count(4) if soak.long else (4, 7):
        process = programs.start(programs.VAE, tmp_path, *STEPS, "--stop-after", "6", fault=("kill", str(number)))
        code, said = programs.finish(process)
        if 6 in store.steps():
            break
        assert code == -signal.SIGKILL, said
        assert store.steps() == [3] and store.newest() == 3
        assert list((tmp_path / "x" / "checkpoints").glob(".tmp-*"))
        kills += 1
    assert kills >= soak.rounds(2, 10)
    code, said = programs.run(programs.VAE, tmp_path, *STEPS, "--stop-after", "9")
    assert code == 0 and store.steps() == [6, 9]
    assert not list((tmp_path / "x" / "checkpoints").glob(".tmp-*"))  # swept by the save that followed
    soak.found("SIGKILL inside a save: the checkpoint before is whole, the half one is swept", kills=kills)


def test_a_damaged_newest_is_named_and_the_one_before_taken(soak, tmp_path):
    code, said = programs.run(programs.VAE, tmp_path, *STEPS, name="whole")
    assert code == 0, said
    code, said = programs.run(programs.VAE, tmp_path, *STEPS, "--stop-after", "6")
    store = programs.store_of(tmp_path / "x")
    with (store.path(6) / "optimiser.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    code, said = programs.run(programs.VAE, tmp_path, *STEPS)
    assert code == 0 and "step_00000006/optimiser.safetensors: expected SHA-256" in said, said
    assert f"taken, {store.path(3)}" in said and "resumed at step 3" in said
    assert_same_bits(programs.newest(tmp_path / "whole"), programs.newest(tmp_path / "x"))
    assert (tmp_path / "x" / "checkpoints" / "damaged-step_00000006").is_dir()
    soak.found("A damaged newest checkpoint: named, set aside, the one before taken, to the same bits", damaged=1)
