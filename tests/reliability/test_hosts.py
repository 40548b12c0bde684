"""Two hosts, made of network namespaces of one machine: a run across them goes on when one is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import programs
import pytest

from train.loop import read_log
from train.scaling import ddp_bytes, fsdp_bytes

FLAGS = ("--batch", "8", "--steps", "100000", "--save-every", "20", "--peer-timeout", "30")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def hosts():
    """Names of two network namespaces that see each other as 10.77.0.1 and 10.77.0.2."""
    names = [f"flux2-{os.getpid()}-{i}" for i in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        veth = ("type", "veth", "peer", "name", "eth", "netns", names[1])
        ip("-n", names[0], "link", "add", "eth", *veth)
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth")
            for device in ("lo", "eth"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def may_make_hosts():
    with contextlib.suppress(OSError, subprocess.CalledProcessError), hosts():
        return True
    return False


def lose(name, *, cable=False):
    """Kills all that runs on a host; cable: after its network, so that the other host hears nothing of it."""
    if cable:
        ip("-n", name, "link", "set", "eth", "down")
    found = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout
    for pid in found.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def received(name):
    """Bytes that a host has received over its network."""
    command = ["ip", "netns", "exec", name, "cat", "/sys/class/net/eth/statistics/rx_bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def on_host(number, name, program, out, *flags):
    """One host's part of a run of one or two hosts, which meet at the first."""
    which, *arguments = map(str, program)
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    command += ["--rdzv-endpoint", "10.77.0.1:29400", "--local-addr", f"10.77.0.{number}"]
    command += ["--rdzv-conf", f"is_host={int(number == 1)},last_call_timeout=4,keep_alive_interval=1"]
    command += [str(programs.FAULTS), which, "none", "0", *arguments, "--out", str(out), "--name", "x"]
    command += ["--resume", "auto", *map(str, flags)]
    environment = {**programs.ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth", "TP_SOCKET_IFNAME": "eth"}
    log = (out / f"host-{number}.txt").open("w")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.skipif(not may_make_hosts(), reason="may not make network namespaces")
def test_run_across_two_hosts_survives_the_loss_of_one(soak, tmp_path):
    program = [*programs.FLOW, "--autoencoder", programs.tiny_autoencoder(tmp_path)]
    with hosts() as names:
        first = on_host(1, names[0], program, tmp_path, *FLAGS)
        second = on_host(2, names[1], program, tmp_path, *FLAGS)
        said = lambda: (tmp_path / "host-1.txt").read_text()  # noqa: E731
        try:
            wait(lambda: programs.steps_logged(tmp_path / "x") >= 40 and received(names[1]) > 100_000, said)
            files = [programs.newest(tmp_path / "x")[f"{n}.safetensors"] for n in ("model", "projector")]
            parameters = sum(t.numel() for file in files for t in file.values())
            began, count = programs.steps_logged(tmp_path / "x"), received(names[1])
            wait(lambda: programs.steps_logged(tmp_path / "x") >= began + 50, said)
            a_step = (received(names[1]) - count) / (programs.steps_logged(tmp_path / "x") - began)
            lose(names[1], cable=soak.long)
            wait(lambda: "resumed at step" in said(), said)
            at = max(programs.store_of(tmp_path / "x").steps())
            wait(lambda: programs.steps_logged(tmp_path / "x") >= at + 60, said)
        finally:
            for name, process in zip(names, (first, second), strict=True):
                lose(name)
                process.wait()
    steps = [r["step"] for r in read_log(tmp_path / "x" / "log.jsonl") if "loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] >= at + 60
    predicted = ddp_bytes(parameters, 2)
    assert predicted < 1.3 * a_step and a_step < 1.5 * predicted  # the log is read a few steps late; headers
    soak.found(
        "A run across two hosts goes on when one is lost; bytes between them a step are those of the model",
        hosts_lost=1, steps_after=steps[-1] - at, bytes_a_step=round(a_step), predicted=round(predicted),
    )  # fmt: skip


@pytest.mark.skipif(not may_make_hosts(), reason="may not make network namespaces")
def test_fsdp_moves_the_bytes_of_the_model(soak, tmp_path):
    program = [*programs.FLOW, "--autoencoder", programs.tiny_autoencoder(tmp_path), "--parallel", "fsdp"]
    with hosts() as names:
        flags = (*FLAGS, "--save-every", "100000")  # plans of checkpoints are exchanged, too
        runs = [on_host(i, name, program, tmp_path, *flags) for i, name in enumerate(names, 1)]
        said = lambda: (tmp_path / "host-1.txt").read_text()  # noqa: E731
        try:
            wait(lambda: programs.steps_logged(tmp_path / "x") >= 25, said)
            began, count, steps = programs.steps_logged(tmp_path / "x"), received(names[1]), soak.rounds(50, 300)
            wait(lambda: programs.steps_logged(tmp_path / "x") >= began + steps, said)
            a_step = (received(names[1]) - count) / (programs.steps_logged(tmp_path / "x") - began)
        finally:
            for name, process in zip(names, runs, strict=True):
                lose(name)
                process.wait()
    parameters = int(re.findall(r"([\d,]+) parameters", said())[0].replace(",", ""))
    predicted = fsdp_bytes(parameters, 2, bf16=False) + 2 * parameters  # gloo scatters sums by an all-reduce
    assert predicted < 1.3 * a_step and a_step < 1.5 * predicted
    soak.found(
        "FSDP2 between two hosts: bytes a step are those of the model",
        bytes_a_step=round(a_step), predicted=round(predicted),
    )  # fmt: skip


def wait(what, said):
    deadline = time.monotonic() + programs.LONG
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
