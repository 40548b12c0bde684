"""A process of several dies: torchrun starts all again, and they go on from the last checkpoint."""

import os
import signal

import programs
from toy import assert_same_bits

FLAGS = ("--batch", "8", "--repa", "hog", "--steps", "100", "--save-every", "20")


def test_killed_process_is_started_again_to_the_same_bits(soak, tmp_path):
    program = [*programs.FLOW, "--autoencoder", programs.tiny_autoencoder(tmp_path)]
    launcher = programs.torchrun("--nproc-per-node", 2, "--max-restarts", 9)
    code, said = programs.run(program, tmp_path, *FLAGS, name="whole", launcher=launcher)
    assert code == 0, said
    process = programs.start(program, tmp_path, *FLAGS, launcher=launcher)
    kills = soak.rounds(1, 5)
    for i in range(kills):
        wanted = 30 + i * 10
        programs.wait_for(lambda wanted=wanted: programs.steps_logged(tmp_path / "x") >= wanted, process)
        programs.wait_for(lambda: programs.worker(process, 1), process)
        os.kill(programs.worker(process, 1), signal.SIGKILL)
        programs.wait_for(lambda n=wanted: programs.steps_logged(tmp_path / "x") != n, process)
    code, said = programs.finish(process)
    assert code == 0 and said.count("resumed at step") >= kills, said
    assert_same_bits(programs.newest(tmp_path / "whole"), programs.newest(tmp_path / "x"))
    soak.found("A process is killed: torchrun starts all again, to the same bits", kills=kills)
