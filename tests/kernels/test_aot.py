"""Every kernel compiled for sm_80, sm_90, sm_100 and gfx942, without a GPU: what its code holds, and that it grew not.

tests/kernels/aot.py compiles: all cases for one architecture of each maker, for the others those that most calls are.
What the committed table says of the rest is held to the same limits. `python tests/kernels/aot.py --update` rewrites
the table after a change that is meant, all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

AOT = Path(__file__).with_name("aot.py")
TABLE = json.loads(AOT.with_name("aot_table.json").read_text())
ALL_CASES = ("sm_90", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may ask for
REGISTER_LIMIT = 128  # four blocks of 128 threads a multiprocessor
UNALIGNED = ("last-ragged", "first-ragged", "flat-ragged")  # cannot be read 16 bytes at a time
STORES = (
    "_apply_kernel", "_grad_input_kernel", "_add_bias_stats_kernel", "_flow_match_kernel", "_repa_bwd_kernel",
    "_adamw_kernel",
)  # fmt: skip


def aot(cache: Path, *arguments: str):
    """What aot.py prints, in a process without the interpreter, with that folder as cache of compiled kernels"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    out = subprocess.run([sys.executable, AOT, *arguments], capture_output=True, text=True, timeout=600, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def target(request, tmp_path_factory):
    """(name, rows)"""
    name = request.param
    few = () if name in ALL_CASES else ("--few",)
    return name, aot(tmp_path_factory.mktemp("triton"), name, *few)["targets"][name]


def passes_over_x(rows):
    """Those that read or write all of x."""
    return {name: row for name, row in rows.items() if "_merge_" not in name and "_sample_" not in name}


def test_code(target):
    name, rows = target
    for kernel, row in (TABLE["targets"][name] | rows).items():
        assert row["spilled"] == 0, f"{kernel} on {name} spills {row['spilled']} bytes"
        assert row["fp64"] == 0, f"{kernel} on {name} computes in fp64, with eps handed over as fp64 or without"
        assert row["traps"] == 0 and row["tensor_memory"] <= 512, f"{kernel} on {name} has an empty body"
        assert row["shared"] <= SHARED_LIMIT[name], f"{kernel} on {name} needs {row['shared']} bytes of shared memory"
        assert row["registers"] <= REGISTER_LIMIT, f"{kernel} on {name} needs {row['registers']} registers"


def test_reads_and_writes_16_bytes_at_a_time(target):
    name, rows = target
    for kernel, row in passes_over_x(TABLE["targets"][name] | rows).items():
        if not kernel.startswith(UNALIGNED):
            assert row["loads_128_bit"] > 0, f"{kernel} on {name} does not load 128 bits at a time"
            assert row["stores_128_bit"] > 0 or not any(k in kernel for k in STORES), f"{kernel} on {name}: stores"


def test_no_kernel_needs_more_than_the_table_says(target):
    name, rows = target
    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is of triton {TABLE['triton']}, this is {triton.__version__}")
    known = TABLE["targets"][name]
    same = rows.keys() == known.keys() if name in ALL_CASES else rows.keys() < known.keys() and len(rows) > 30
    assert same, "kernels came or went: python tests/kernels/aot.py --update"
    risen = [
        f"{kernel} on {name}: {key} {known[kernel][key]} -> {row[key]}"
        for kernel, row in rows.items()
        for key in ("registers", "shared", "instructions")
        if row[key] > known[kernel][key]
    ]
    assert not risen, "\n".join(risen)
    fallen = [
        f"{kernel} on {name}: {key} {known[kernel][key]} -> {row[key]}"
        for kernel, row in rows.items()
        for key in ("loads_128_bit", "stores_128_bit")
        if row[key] < known[kernel][key]
    ]
    assert not fallen, "\n".join(fallen)


def test_the_table_has_every_target():
    assert set(TABLE["targets"]) == set(SHARED_LIMIT)
    nvidia = [TABLE["targets"][name].keys() for name in SHARED_LIMIT if name.startswith("sm_")]
    assert nvidia[0] == nvidia[1] == nvidia[2]


def test_resolutions_share_their_code(tmp_path):
    """Seven of them: one compilation where the number of pixels is a multiple of 16, one more where it is not."""
    compiled = aot(tmp_path, "--variants")
    assert len(compiled) > 8 and set(compiled.values()) <= {1, 2}, compiled
