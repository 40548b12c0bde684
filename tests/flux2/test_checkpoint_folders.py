"""Folders of checkpoints: written whole or not at all, checked, and the newest whole one found."""

import json
import os

import pytest
import torch

from flux2 import checkpoint_folders
from flux2.checkpoint_folders import MANIFEST, Checkpoints, check


def store_of(folder, *steps, keep=9):
    store = Checkpoints(folder, keep=keep)
    for step in steps:
        store.save(step, {"model": {"w": torch.full((64,), float(step))}}, {"step": step})
    return store


def test_the_last_are_kept_and_come_back(tmp_path):
    store = store_of(tmp_path / "c", keep=2)
    assert store.steps() == [] and store.newest() is None
    store_of(tmp_path / "c", 5, 10, 15, keep=2)
    assert store.steps() == [10, 15] and store.newest() == 15 and store.newest(12) == 10
    tensors, config = store.load(15)
    assert tensors["model"]["w"].unique().tolist() == [15] and config == {"step": 15}
    manifest = json.loads((store.path(15) / MANIFEST).read_text())
    assert manifest["step"] == 15 and manifest["files"].keys() == {"config.json", "model.safetensors"}


def test_save_that_fails_leaves_the_older_ones(tmp_path, monkeypatch):
    store = store_of(tmp_path, 1, keep=1)

    def full(path, group):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folders, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(2, {"model": {"w": torch.ones(1)}}, {})
    assert store.newest() == 1 and [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / ".tmp-1-step_00000003").mkdir()
    store_of(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    """Files and manifest, then the folder; the rename; then the folder above"""
    done, plain, rename = [], os.fsync, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda fd: [done.append(os.readlink(f"/proc/self/fd/{fd}")), plain(fd)][1])
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, to: [done.append("rename"), rename(self, to)][1])
    store_of(tmp_path, 7)
    names = [os.path.basename(name) for name in done]
    at = names.index("rename")
    assert {"model.safetensors", "config.json"} <= set(names[:at]) and any(MANIFEST in name for name in names[:at])
    assert names[at - 1].startswith(".tmp-") and names[at + 1 :] == [tmp_path.name]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    "truncated": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
    "one bit": lambda f: flip(f / "model.safetensors", -1),
    "missing": lambda f: (f / "model.safetensors").unlink(),
    "empty": lambda f: (f / "config.json").write_bytes(b""),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "half a manifest": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:40]),
    "a list": lambda f: (f / MANIFEST).write_text("[]"),
    "nested without end": lambda f: (f / MANIFEST).write_text("[" * 100_000),
    "other format": lambda f: (f / MANIFEST).write_text('{"format": "x", "files": {}}'),
    "no files": lambda f: edit(f, lambda m: m["files"].clear()),
    "no checksum": lambda f: edit(f, lambda m: m["files"].update({"config.json": {"bytes": 1}})),
    "outside": lambda f: edit(f, lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, damage):
    store = store_of(tmp_path, 1, 2, 3)
    damage(store.path(3))
    with pytest.raises(ValueError, match="step_00000003"):
        check(store.path(3))
    assert store.newest() == 2
    said = capsys.readouterr().err
    assert "damaged checkpoint: " in said and "step_00000003" in said and f"taken, {store.path(2)}" in said
    store.set_aside_after(2)
    assert store.steps() == [1, 2] and (tmp_path / "damaged-step_00000003").is_dir()
    assert store_of(tmp_path, 3).newest() == 3


def test_who_takes_weights_alone_does_not_read_optimisers(tmp_path):
    store = Checkpoints(tmp_path, keep=9)
    for step in (1, 2):
        store.save(step, {"model": {"w": torch.zeros(9)}, "optimiser": {"m": torch.ones(9)}}, {})
    flip(store.path(2) / "optimiser.safetensors", -1)
    assert store.newest() == 1 and store.newest(optimisers=False) == 2
    flip(store.path(2) / "model.safetensors", -1)
    assert store.newest(optimisers=False) == 1


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    store = store_of(tmp_path, 1, 2)
    for step in (1, 2):
        flip(store.path(step) / "config.json", 0)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint.*00002/config.json.*00001/config.json"):
        store.newest()
