"""What a file must not be able to do: run code, take all memory, name a place outside, or go in half read."""

import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save

from flux2 import load_autoencoder
from flux2.__main__ import main as flux2_main
from flux2.tensor_files import load_json, load_tensors


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def malicious(tmp_path):
    """Files that make a folder `owned` when they are unpickled, as trainers of other projects write them"""
    bad = {"state_dict": {"w": torch.zeros(2)}, "x": Touch(tmp_path / "owned")}
    torch.save(bad, tmp_path / "zip.pt")
    torch.save(bad, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(bad))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(bad))
    with zipfile.ZipFile(tmp_path / "zip.pt") as good, zipfile.ZipFile(tmp_path / "moved.pth", "w") as moved:
        for name in good.namelist():
            moved.writestr(name, good.read(name))
    return [tmp_path / n for n in ("zip.pt", "legacy.ckpt", "plain.bin", "named.safetensors", "moved.pth")]


def test_malicious_pickles_are_refused_and_nothing_runs(soak, tmp_path, capsys):
    files = malicious(tmp_path)
    for path in files:
        with pytest.raises(ValueError, match=rf"{path.name}: .*(tensors alone|\.safetensors)"):
            load_tensors(path)
        assert flux2_main(["reconstruct", str(path), "--weights", str(path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "owned").exists()
    pickle.loads(files[2].read_bytes())
    assert (tmp_path / "owned").is_dir()  # they would have
    soak.found("Malicious pickles, whatever they are called: refused by name, nothing runs", files=len(files))


GOOD = save({"w": torch.arange(8.0)})
HEADER = json.loads(GOOD[8 : 8 + struct.unpack("<Q", GOOD[:8])[0]])


def with_header(header, data=b"\0" * 32):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(**changes):
    return {"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32], **changes}}


BAD = {
    "2^63 bytes": struct.pack("<Q", 2**63) + GOOD[8:],
    "2^60 bytes": struct.pack("<Q", 2**60) + GOOD[8:],
    "longer than the file": struct.pack("<Q", len(GOOD)) + GOOD[8:],
    "200 MB that are not there": struct.pack("<Q", 200 * 2**20) + GOOD[8:],
    "no length": GOOD[:5],
    "not JSON": with_header(b"{" + b"x" * 60),
    "nested without end": with_header(b'{"a":' * 50_000),
    "a list": with_header([]),
    "data outside": with_header(row(data_offsets=[0, 4000])),
    "negative offsets": with_header(row(data_offsets=[-8, 24])),
    "backwards": with_header(row(data_offsets=[32, 0])),
    "shape of another size": with_header(row(shape=[9])),
    "2^62 elements": with_header(row(shape=[2**31, 2**31])),
    "elements that overflow": with_header(row(shape=[2**33, 2**33, 4])),
    "unknown dtype": with_header(row(dtype="PICKLE")),
    "overlapping": with_header({**row(), "v": row()["w"]}),
    "a hole": with_header({"w": {**row()["w"], "shape": [4], "data_offsets": [16, 32]}}),
    "trailing bytes": GOOD + b"\0" * 100,
}


def test_damaged_safetensors_are_refused_by_name(soak, tmp_path):
    for name, content in BAD.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        for load in (load_tensors, load_autoencoder):
            with pytest.raises(ValueError, match=rf"{re.escape(name)}.safetensors: "):
                load(path)
    soak.found("Damaged or hostile safetensors headers: refused by name", files=len(BAD))


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"", b"[1]", b"{"])
def test_json_that_is_none_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json: "):
        load_json(path)
    with pytest.raises(ValueError, match="config.json"):
        load_autoencoder(tmp_path)


def test_json_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**33)  # sparse
    with pytest.raises(ValueError, match="config.json: expected at most .* bytes of JSON, got 8589934592"):
        load_json(tmp_path / "config.json")
