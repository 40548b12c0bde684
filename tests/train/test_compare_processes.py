"""The processes of a comparison: a lost GPU, a worker that dies of nothing, and signals, with stand-ins for workers."""

import dataclasses
import multiprocessing
import os
import signal
import time

import pytest
import torch

from train import compare_processes, compare_work
from train.compare_config import COMPARE_PRESETS, CompareOptions
from train.compare_processes import Crew
from train.compare_work import DEVICE_LOST, DeviceLost, Worker

CPU = torch.device("cpu")


# Each stands in for worker_process.
def leave_with(config, options, threads, tell):
    os._exit(int(config.preset))


def lose_the_device(config, options, threads, tell):
    os._exit(DEVICE_LOST)


def die_of_nothing(config, options, threads, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_the_reference(config, options, threads, tell):
    if (options.folder(config) / "failures" / "reference.json").is_file():
        os._exit(0)
    tell.send("reference")
    os.kill(os.getpid(), signal.SIGUSR2)


def write_environment(config, options, threads, tell):
    (options.out / str(os.getpid())).write_text(f"{os.environ['OMP_NUM_THREADS']} {threads} {options.device}")
    os._exit(0)


def wait_for_a_signal(config, options, threads, tell):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    (options.out / str(os.getpid())).touch()
    time.sleep(60)


def crew(tmp_path, monkeypatch, stand_in, count=1, preset="toy"):
    """A crew of stand-ins, forked: what they import is there"""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(compare_processes.multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(compare_processes, "worker_process", stand_in)
    config = dataclasses.replace(COMPARE_PRESETS["toy"], preset=preset)
    return Crew(config, CompareOptions(out=tmp_path, name="x"), CPU, count)


@pytest.mark.parametrize("code", [0, 2, 143])
def test_exit_code_is_the_workers(tmp_path, monkeypatch, code):
    assert crew(tmp_path, monkeypatch, leave_with, preset=str(code)).run() == code


def test_a_worker_that_dies_of_no_task_is_replaced_once(tmp_path, monkeypatch, capsys):
    assert crew(tmp_path, monkeypatch, die_of_nothing).run() == 137
    assert capsys.readouterr().out == "a worker died of SIGKILL at no task: another takes its place\n"


def test_a_task_that_workers_die_of_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    assert crew(tmp_path, monkeypatch, die_of_the_reference).run() == 0
    assert capsys.readouterr().out.count("a worker died of SIGUSR2 at reference: another takes its place") == 2
    failure = (tmp_path / "x" / "failures" / "reference.json").read_text()
    assert "2 workers died of it, the last of SIGUSR2" in failure and "memory" not in failure


def test_no_worker_is_started_on_a_gpu_that_was_lost_again_and_again(tmp_path, monkeypatch):
    crew_ = crew(tmp_path, monkeypatch, lose_the_device)
    assert crew_.run() == DEVICE_LOST and crew_.losses == {0: 3}


def test_workers_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_processes, "cores", lambda: 7)
    before = dict(os.environ)
    assert crew(tmp_path, monkeypatch, write_environment, count=2).run() == 0
    assert [p.read_text() for p in tmp_path.iterdir() if p.is_file()] == ["3 3 cpu"] * 2
    assert dict(os.environ) == before


def test_a_signal_reaches_all_workers(tmp_path, monkeypatch):
    crew_ = crew(tmp_path, monkeypatch, wait_for_a_signal, count=2)
    waited = compare_processes.wait
    monkeypatch.setattr(compare_processes, "wait", lambda s, timeout: [send(), waited(s, timeout=timeout)])

    def send():
        if not crew_.signal and len(list(tmp_path.iterdir())) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    assert crew_.run() == 130 and time.monotonic() - began < 50


def test_a_worker_leaves_when_its_gpu_refuses_all_work(monkeypatch):
    worker = object.__new__(Worker)
    worker.device = CPU
    worker._check_device()  # a CPU is not lost
    worker.device = torch.device("cuda")

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    worker._check_device()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        worker._check_device()

    def work(self):
        raise DeviceLost("gone")

    monkeypatch.setattr(compare_work.Worker, "__init__", lambda self, *_: None)
    monkeypatch.setattr(compare_work.Worker, "work", work)
    assert compare_work.run_worker(COMPARE_PRESETS["toy"], CompareOptions(device="cpu")) == DEVICE_LOST
