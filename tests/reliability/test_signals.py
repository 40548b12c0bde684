"""SIGINT, SIGTERM and SIGUSR1: the run saves and leaves with 128 + signal, and the same command goes on."""

import os
import re
import signal

import programs
import pytest

CASES = [("vae", "SIGUSR1", 2), ("vae", "SIGTERM", 2), ("flow", "SIGUSR1", 0), ("flow", "SIGTERM", 2)]


@pytest.mark.parametrize(("which", "name", "workers"), CASES, ids=[f"{w}-{n}-{k}" for w, n, k in CASES])
def test_signal_saves_and_the_same_command_goes_on(soak, tmp_path, which, name, workers):
    """Sent to the whole group, as terminals and schedulers do"""
    program = programs.VAE if which == "vae" else [*programs.FLOW, "--autoencoder", programs.tiny_autoencoder(tmp_path)]
    number, folder, stops = getattr(signal, name), tmp_path / "x", []
    flags = ("--steps", "1000000", "--workers", workers, "--save-every", "1000000")
    for _ in range(soak.rounds(2, 5)):
        process = programs.start(list(map(str, program)), tmp_path, *flags)
        at = stops[-1] if stops else 0
        programs.wait_for(lambda at=at: programs.steps_logged(folder) >= at + 10, process)
        os.killpg(process.pid, number)
        code, said = programs.finish(process)
        assert code == 128 + number, said
        assert f"{name}: finishing the step, then saving" in said
        assert "go on with --resume auto --name x" in said.strip().splitlines()[-1]
        resumed = re.search(r"resumed at step (\d+)", said)
        assert (int(resumed[1]) if resumed else 0) == at
        stops.append(programs.store_of(folder).newest())
    assert stops == sorted(set(stops)) and stops[0] >= 10
    soak.found(f"{name} to train.{which}: saved, exit code {128 + number}, gone on with", signals=len(stops))
