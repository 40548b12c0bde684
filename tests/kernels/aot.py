"""Compiles every Triton kernel, for every row of the tile table, for GPUs that need not be there, and reads the code.

`python tests/kernels/aot.py sm_90` prints what it found as JSON; `--update` writes tests/kernels/aot_table.json for all
targets. The ops run as they are, on CPU tensors, with Triton's driver replaced by one that names the target and its
launch by its compilation: what is compiled is what would be launched there, down to the specialisation of arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels
from kernels import dispatch
from kernels.adamw import adamw_
from kernels.tiles import TILES
from kernels.timesteps import LAWS

TABLE = Path(__file__).with_name("aot_table.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP64 = re.compile(r"\b(add|mul|fma|div|rcp|sqrt|sub|rsqrt)\S*\.f64|v_(add|mul|fma|rcp|rsq|sqrt)_f64")

# row of the tile table, or what is unusual -> x's shape, channels_last, dtypes
CASES = {
    "last-128": ((1, 128, 64, 64), True, (torch.bfloat16, torch.float32, torch.float16)),
    "last-64": ((1, 192, 64, 64), True, (torch.bfloat16,)),
    "last-32": ((1, 96, 64, 64), True, (torch.bfloat16,)),
    "last-16": ((1, 48, 64, 64), True, (torch.bfloat16,)),
    "first-long": ((1, 128, 64, 64), False, (torch.bfloat16, torch.float32)),
    "first-short": ((1, 128, 8, 8), False, (torch.bfloat16,)),
    "last-ragged": ((2, 12, 5, 7), True, (torch.bfloat16,)),
    "first-ragged": ((2, 12, 35, 37), False, (torch.bfloat16,)),
}
FEW = {"last-128": torch.bfloat16, "first-long": torch.bfloat16, "flat": torch.float32}  # what most calls are
FLOW_CASES = ("last-128", "first-long", "last-ragged", "first-ragged")
assert set(TILES) <= set(CASES), "a row of the tile table has no case"


class Driver:
    """Stands in for Triton's driver: names a target, launches nothing."""

    target: GPUTarget

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0


def compiled_kernels(target: GPUTarget, run) -> list:
    """(kernel, compiled) of each launch that run() makes."""
    found, plain = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        found.append((self, plain(self, *args, grid=grid, warmup=True, **options)))

    Driver.target = target
    driver.set_active(Driver())
    JITFunction.run, dispatch._INTERPRETING = compile_only, True
    try:
        run()
    finally:
        JITFunction.run, dispatch._INTERPRETING = plain, False
    return found


def use_norms(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    """Every kernel of the norms, with each of its switches on; and forward with them off."""
    x = torch.zeros(shape, dtype=dtype).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    groups = 4 if shape[1] == 12 else 16
    w, b, input_bias = (torch.zeros(shape[1], requires_grad=True) for _ in range(3))
    for shift in (input_bias, None):
        y = kernels.group_norm_silu(x.requires_grad_(), w, b, groups, input_bias=shift, backend="triton")
        y.backward(torch.zeros_like(y))
    kernels.add_bias_group_stats(x, None, b, groups, backend="triton")
    y, stats = kernels.add_bias_group_stats(x, x, b, groups, backend="triton")
    y = kernels.group_norm(x, w, b, groups, stats=stats, backend="triton")
    y.backward(torch.zeros_like(y))


def use_flow_ops(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    """The kernels that have no row of the tile table, with their switches on and off."""
    x = torch.zeros(shape, dtype=dtype).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    for noise, t in ((None, None), (x, torch.zeros(len(x)))):
        kernels.flow_match_inputs(x, noise=noise, t=t, backend="triton")
    for law in LAWS:
        kernels.sample_timesteps(64, law, backend="triton")
    width = 100 if shape[1] % 16 else 768
    p, y = (torch.zeros(4, 9, width, dtype=dtype, requires_grad=True) for _ in range(2))
    kernels.repa_loss(p, y, backend="triton").backward()
    kernels.repa_loss(p, y.detach(), backend="triton").backward()


def use_adamw(offset: int) -> None:
    """With two averages and all switches on, and with all off; memory begins `offset` elements after an aligned one."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "backend": "triton"}
    p, broken = [torch.zeros(5000)[offset:]], torch.zeros((), dtype=torch.bool)
    adamw_(p, p, p, p, [torch.zeros(())], [p, p], weights=(0.1, 0.1), factor=p[0][0], skip=broken, **settings)
    adamw_(p, p, p, p, [torch.zeros(())], **settings)


def switches(kernel, compiled) -> str:
    """The constexprs that are on."""
    on = {k[0]: v for k, v in compiled.src.constants.items()}
    names = [p.name for p in kernel.params]
    laws = [LAWS[v] for i, v in on.items() if names[i] == "LAW"]
    return "+".join(laws + [names[i] for i, v in sorted(on.items()) if v is True and names[i] != "REVERSE"])


def read_nvidia(compiled) -> dict:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "instructions": len(re.findall(r"^\s+(?:@!?%\w+ )?[a-z][a-z0-9_.:]*\s[^;]*;", ptx, re.M)),
        "loads_128_bit": len(re.findall(r"\bld\.global\S*\.v4\.b32", ptx)),
        "stores_128_bit": len(re.findall(r"\bst\.global\S*\.v4\.b32", ptx)),
        "fp64": len(FP64.findall(ptx)),
        "traps": len(re.findall(r"^\s*trap;", ptx, re.M)),
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
    }


def read_amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def count(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": count("vgpr_count"),
        "spilled": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "instructions": len(re.findall(r"^\s+[sv]_\w+|^\s+(?:global|buffer|ds|flat)_\w+", text, re.M)),
        "loads_128_bit": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "stores_128_bit": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        "fp64": len(FP64.findall(text)),
        "traps": len(re.findall(r"s_trap", text)),
        "tensor_memory": 0,
    }


def takes_numbers(compiled) -> bool:
    """Whether a float is among its arguments."""
    return "fp32" in compiled.src.signature.values()


def with_fp64_numbers(kernel, compiled, target: GPUTarget):
    """The kernel as callers compile it that hand Python's floats over as fp64."""
    src = compiled.src
    signature = {name: "fp64" if kind == "fp32" else kind for name, kind in src.signature.items()}
    source = ASTSource(kernel, signature, src.constants, src.attrs)
    return triton.compile(source, target=target, options={"num_warps": compiled.metadata.num_warps})


def report(target_name: str, few: bool = False) -> dict[str, dict]:
    """'case dtype kernel switches' -> what its code holds. few: of the cases in FEW."""
    target = TARGETS[target_name]
    read = read_amd if target.backend == "hip" else read_nvidia
    rows = {}

    def add(case, dtype, found):
        for kernel, compiled in found:
            name = f"{case} {str(dtype)[6:]} {kernel.__name__} {switches(kernel, compiled)}".strip()
            if name not in rows:
                rows[name] = read(compiled) | {"shared": compiled.metadata.shared}
                if case in ("last-128", "flat") and takes_numbers(compiled):
                    rows[name]["fp64"] += read(with_fp64_numbers(kernel, compiled, target))["fp64"]

    for case, (shape, channels_last, dtypes) in CASES.items():
        for dtype in dtypes:
            if few and FEW.get(case) != dtype:
                continue
            found = compiled_kernels(target, lambda s=shape, c=channels_last, d=dtype: use_norms(s, c, d))
            if case in FLOW_CASES:
                found += compiled_kernels(target, lambda s=shape, c=channels_last, d=dtype: use_flow_ops(s, c, d))
            add(case, dtype, found)
    for case, offset in (("flat", 0), ("flat-ragged", 1))[: 1 if few else 2]:
        add(case, torch.float32, compiled_kernels(target, lambda o=offset: use_adamw(o)))
    return rows


def variants() -> dict[str, int]:
    """How many times each kernel is compiled for sm_90 when seven resolutions of one network's shape come by."""
    sides = ((32, 32), (48, 64), (64, 64), (40, 56), (128, 96), (33, 35), (17, 64))

    def use_all():
        for height, width in sides:
            use_norms((1, 128, height, width), True, torch.bfloat16)

    found = compiled_kernels(TARGETS["sm_90"], use_all)
    hashes = {(kernel.__name__, switches(kernel, compiled)): set() for kernel, compiled in found}
    for kernel, compiled in found:
        hashes[kernel.__name__, switches(kernel, compiled)].add(compiled.hash)
    return {" ".join(name).strip(): len(different) for name, different in hashes.items()}


def as_json(targets: dict[str, dict[str, dict]]) -> str:
    """One line a row."""
    text = json.dumps({"triton": triton.__version__, "targets": targets}, indent=1)
    return re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS, help="all, if not given")
    parser.add_argument("--few", action="store_true", help=f"the cases {', '.join(FEW)} only")
    parser.add_argument("--variants", action="store_true", help="compilations of each kernel over five resolutions")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    args = parser.parse_args()
    if args.variants:
        print(json.dumps(variants()))
        return
    if args.few and args.update:
        parser.error("--few: expected without --update, which writes all rows")
    text = as_json({target: report(target, args.few) for target in ([args.target] if args.target else TARGETS)})
    if args.update:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
