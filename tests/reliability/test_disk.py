"""A disk that is full, read-only or gone: one clear error, and the last checkpoint whole."""

import os
import resource
import shutil
import subprocess
import sys

import programs
import pytest

FLAGS = ("--steps", "100000", "--save-every", "10")


def may_mount():
    try:
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not may_mount(), reason="may not mount a file system")


def last_line(said):
    return said.strip().splitlines()[-1]


def test_files_that_may_not_grow(soak, tmp_path):
    """As a quota does it: EFBIG in the middle of a tensor file"""
    process = programs.start(programs.VAE, tmp_path, *FLAGS)
    store = programs.store_of(tmp_path / "x")
    programs.wait_for(store.steps, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    code, said = programs.finish(process)
    assert code == 2 and "Traceback" not in said, said
    assert last_line(said).startswith("error: ") and "File too large" in said
    assert f"{store.path(store.steps()[-1])} is whole, go on with --resume auto --name x" in last_line(said)
    assert store.newest() == store.steps()[-1] and not list(store.folder.glob(".tmp-*"))
    soak.found("A quota that ends inside a checkpoint: named, exit code 2, the last one whole", faults=1)


def in_a_mount(tmp_path, options, then):
    """Runs at toy size on a file system of its own; (what was said, then the exit code, then what `then` prints)"""
    flags = " ".join(map(str, (*programs.VAE[1:], *FLAGS)))
    script = f"""
        mount -t tmpfs -o {options} tmpfs {tmp_path}
        python {programs.FAULTS} vae none 0 {flags} --out {tmp_path} --name x --resume auto
        echo exit code $?
        {then}
    """
    environment = {**programs.ENVIRONMENT, "PATH": f"{sys.exec_prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=programs.LONG,
        env=environment,
    )
    return done.stderr + done.stdout


@needs_mounts
def test_full_disk(soak, tmp_path):
    """Room for two checkpoints and a half"""
    check = "from flux2.checkpoint_folders import Checkpoints as C; from pathlib import Path; import os;"
    check += f"c = C(Path('{tmp_path}/x/checkpoints'));"
    check += "print('whole', c.newest() == c.steps()[-1], *sorted(os.listdir(c.folder)))"
    said = in_a_mount(tmp_path, "size=45m", f'python -c "{check}"')
    assert "exit code 2" in said and "whole True" in said and "Traceback" not in said, said
    assert "No space left on device" in said and "is whole, go on with --resume auto --name x" in said
    assert said.split()[-2:] == ["step_00000010", "step_00000020"]  # and nothing half
    soak.found("A full disk: named, exit code 2, the last checkpoint whole, nothing half", faults=1)


@needs_mounts
def test_read_only_disk(soak, tmp_path):
    said = in_a_mount(tmp_path, "ro,size=80m", "true")
    assert "exit code 2" in said and "error: " in said and "Read-only file system" in said, said
    assert "Traceback" not in said
    soak.found("A read-only disk: named before the first step, exit code 2", faults=1)


def test_folder_that_vanishes_while_it_runs(soak, tmp_path):
    process = programs.start(programs.VAE, tmp_path, *FLAGS)
    programs.wait_for(lambda: programs.steps_logged(tmp_path / "x") >= 10, process)
    shutil.rmtree(tmp_path / "x")
    code, said = programs.finish(process)
    assert code == 2 and "Traceback" not in said, said
    assert "No such file or directory" in last_line(said) and "no checkpoint is left" in last_line(said)
    soak.found("An output folder that vanishes: named, exit code 2", faults=1)


def test_file_where_the_folder_should_be(soak, tmp_path):
    (tmp_path / "runs").write_text("a file")
    code, said = programs.run(programs.VAE, tmp_path / "runs", *FLAGS)
    assert code == 2 and last_line(said).startswith("error: ") and str(tmp_path / "runs") in last_line(said), said
    soak.found("A file where the output folder should be: named, exit code 2", faults=1)
