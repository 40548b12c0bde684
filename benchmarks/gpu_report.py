"""What the kernels do on this machine's GPU: are they right, how fast, and what that makes of the autoencoder.

    python benchmarks/gpu_report.py                              # all sections, at most nine minutes; again to go on
    python benchmarks/gpu_report.py --only kernels --minutes 5
    python benchmarks/gpu_report.py --docs                       # only rewrite the tables of docs/kernels.md

Sections, in order: `correctness` (full-size tensors against fp64 in the tests' tolerance, and the same bits twice),
`kernels` (each op against eager, compiled, Liger and a copy), `updates` (AdamW with clipping and an average in one
launch against torch's calls), `autoencoder` (decode, encode and a training step against
stock modules and diffusers). Every row is written to benchmarks/results/gpu-NAME.json as soon as it is measured; a run
with the same GPU, versions and sources goes on where the last one stopped, any other starts anew. Peers that are not
installed are listed as missing. Needs torch, triton, numpy and safetensors.

Exit code: 0 all done; 1 a row failed (nothing is timed while a kernel is wrong); 2 bad input; 3 out of time, run
again; 130 interrupted, likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "tests", ROOT / "benchmarks") if str(p) not in sys.path]
import cases  # noqa: E402 - after the path
import guard  # noqa: E402
import updates  # noqa: E402
import whole_models  # noqa: E402
from cases import Case  # noqa: E402
from gradients import check, eager_norm, run  # noqa: E402
from measure import environment, interleaved, slug  # noqa: E402
from whole_models import Task  # noqa: E402

import kernels  # noqa: E402
from flux2.autoencoder import AUTOENCODERS, AutoencoderConfig  # noqa: E402
from flux2.checkpoints import save_json  # noqa: E402
from kernels.dispatch import interpreting  # noqa: E402
from kernels.timesteps import LAWS  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "kernels.md"
SECTIONS = ("correctness", "kernels", "updates", "autoencoder")
# Seconds that one more row may take: no row is started that may end too late
SECONDS = {"correctness": 20, "kernels": 30, "updates": 30, "autoencoder": 60, "autoencoder, compiled": 420}
SOURCES = (
    "kernels/*.py", "flux2/blocks.py", "flux2/autoencoder.py", "benchmarks/*.py", "tests/gradients.py",
    "tests/tolerance.py",
)  # fmt: skip


def sources() -> str:
    """A hash of the code that is measured and that measures."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# --- correctness ---------------------------------------------------------------------------------------------------

# shape, groups: FLUX.2's widest activation, its deepest, widths that are no power of two, odd sides, a batch
FULL = [
    ((1, 128, 1024, 1024), 32), ((1, 512, 256, 256), 32), ((1, 96, 1000, 999), 32), ((3, 384, 129, 65), 32),
    ((16, 512, 32, 32), 32),
]  # fmt: skip
TINY = [((2, 12, 5, 7), 4)]


def _draw(shape, dtype, device, last=False):
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x


def _as(y, x):
    """y in x's memory format: a convolution's algorithm, and so its rounding, depends on it."""
    return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def _subjects(groups: int, backend: str) -> dict[str, tuple[Callable, Callable, Callable]]:
    """op -> (ours, eager, tensors besides x)"""
    silu, plain = eager_norm(groups), eager_norm(groups, silu=False)

    def norms(c, dtype, device):
        return [_draw((c,), torch.float32, device) for _ in range(3)]

    def convs(c, dtype, device):
        out = min(c, 128)
        weight = (torch.randn(out, c, 3, 3, device=device) / (9 * c) ** 0.5).to(dtype)
        return [*norms(c, dtype, device)[:2], weight, _draw((out,), dtype, device)]

    def upsampled(x, w, b):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1)

    def add(x, residual, bias):
        return kernels.add_bias_group_stats(x, residual, bias, groups, backend=backend)[0]

    return {
        "group_norm": (
            lambda x, w, b, i: kernels.group_norm(x, w, b, groups, input_bias=i, backend=backend), plain, norms
        ),
        "group_norm_silu": (
            lambda x, w, b, i: kernels.group_norm_silu(x, w, b, groups, input_bias=i, backend=backend), silu, norms
        ),
        "norm_silu_conv2d": (
            lambda x, nw, nb, w, b: kernels.norm_silu_conv2d(x, nw, nb, w, b, groups, backend=backend),
            lambda x, nw, nb, w, b: F.conv2d(_as(silu(x, nw, nb), x), w, b, padding=1), convs,
        ),
        "add_bias_group_stats": (
            add, lambda x, r, b: x + r + b.to(x.dtype).view(-1, 1, 1),
            lambda c, dtype, device: [None, _draw((c,), torch.float32, device)],  # None: a residual like x
        ),
        "upsample_conv2d": (kernels.upsample_conv2d, upsampled, lambda c, t, d: convs(c, t, d)[2:]),
    }  # fmt: skip


def correctness(shape, groups, op, dtype, last, device) -> dict[str, Any]:
    """Values, all gradients and, of add_bias_group_stats, the statistics; then the same bits again."""
    torch.manual_seed(0)
    backend = "triton" if device.type != "cpu" or interpreting() else "torch"
    if op == "upsample_conv2d":  # four times the pixels
        shape = (*shape[:2], *(max(2, side // 2) for side in shape[2:]))
    ours, eager, others = _subjects(groups, backend)[op]
    x = _draw(shape, dtype, device, last)
    tensors = [x, *(_draw(shape, dtype, device, last) if t is None else t for t in others(shape[1], dtype, device))]
    dy = torch.randn_like(eager(*tensors))
    check(ours, eager, tensors, dy)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # its gradients of weights
        first, second = run(ours, tensors, dy), run(ours, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs gave different bits"
    if op == "add_bias_group_stats":
        y, stats = kernels.add_bias_group_stats(*tensors, groups, backend=backend)
        values = y.double().reshape(shape[0], groups, -1)
        torch.testing.assert_close(stats[..., 0].double(), values.mean(2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats[..., 1].double(), values.var(2, correction=0), rtol=1e-5, atol=0)
    return {"backend": backend}


def draws(shape, dtype, last, device) -> dict[str, Any]:
    """Times and noise of the kernels against those of plain torch on the same device."""
    backend = "triton" if device.type != "cpu" or interpreting() else "torch"
    torch.manual_seed(0)
    x = _draw(shape, dtype, device, last)
    where = {"shift": 4.63, "seed": 2**63 + 5, "step": 2**31 + 9, "first_index": 2**32 - 4096}
    for law in LAWS:
        a, b = (kernels.sample_timesteps(4096, law, **where, device=device, backend=k) for k in (backend, "torch"))
        torch.testing.assert_close(a, b, rtol=0, atol=0 if law == "uniform" else 1e-6)
    got = kernels.flow_match_inputs(x, **where, backend=backend)
    again = kernels.flow_match_inputs(x, **where, backend=backend)
    truth = kernels.flow_match_inputs(x.double(), **where, backend="torch")
    for a, b, t in zip(got, again, truth, strict=True):
        assert torch.equal(a, b), "two runs gave different bits"
        error = (a.double() - t).abs() - torch.finfo(a.dtype).eps * t.abs()
        assert error.max() <= 1e-5, f"off by {error.max().item():.1e} more than rounding"
    return {"backend": backend}


def alignment(shape, dtype, device) -> dict[str, Any]:
    """repa_loss, values and both gradients, against F.cosine_similarity; then the same bits again."""
    backend = "triton" if device.type != "cpu" or interpreting() else "torch"
    torch.manual_seed(0)
    p, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    dy = torch.ones((), device=device)

    def ours(p, y):
        return kernels.repa_loss(p, y, backend=backend)

    def eager(p, y):
        acc = torch.promote_types(p.dtype, torch.float32)
        return -F.cosine_similarity(p.to(acc), y.to(acc), dim=-1).mean()

    check(ours, eager, [p, y], dy)
    first, second = run(ours, [p, y], dy), run(ours, [p, y], dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs gave different bits"
    return {"backend": backend}


# --- sections ------------------------------------------------------------------------------------------------------


def micro(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    made = cases.contest(case, device)
    cases.check(made, case)
    return cases.summary(case, interleaved(made.calls, device, rounds=rounds, head_start=True), made.missing, device)


TINY_AUTOENCODER = AutoencoderConfig(
    z_channels=4, ch=8, decoder_ch=8, num_groups=4, ch_mult=(1, 2), num_res_blocks=1, latent_norm="batchnorm"
)


def rows_of(section: str, device: torch.device, tiny: bool) -> dict[str, tuple[Callable[[], dict[str, Any]], int]]:
    """name -> (what measures it, seconds that may take), in the order they are measured."""
    if section == "correctness":
        rows = {
            f"{op} {'x'.join(map(str, shape))} {str(dtype)[6:]} {'channels_last' if last else 'NCHW'}":
                (lambda a=(shape, groups, op, dtype, last, device): correctness(*a), SECONDS[section])
            for shape, groups in (TINY if tiny else FULL)
            for op in _subjects(1, "torch")
            for dtype in (torch.bfloat16, torch.float32)
            for last in (True, False)
        }  # fmt: skip
        shape = (2, 8, 5, 6) if tiny else (64, 128, 16, 17)
        features = [(2, 3, 20)] if tiny else [(64, 256, d) for d in (384, 768, 1000, 1536)]
        for dtype in (torch.bfloat16, torch.float32):
            for last in (True, False):
                name = f"timesteps {'x'.join(map(str, shape))} {str(dtype)[6:]} {'channels_last' if last else 'NCHW'}"
                rows[name] = (lambda a=(shape, dtype, last, device): draws(*a), SECONDS[section])
            for sizes in features:
                name = f"repa_loss {'x'.join(map(str, sizes))} {str(dtype)[6:]}"
                rows[name] = (lambda a=(sizes, dtype, device): alignment(*a), SECONDS[section])
        backend = "triton" if device.type != "cpu" or interpreting() else "torch"
        rows["adamw_"] = (lambda: updates.check(device, backend), SECONDS[section])
        return rows
    if section == "updates":
        if tiny:
            return {
                "tiny": (lambda: updates.compare("tiny", device, rounds=3, shapes=[(5, 7), (3,)]), SECONDS[section])
            }
        return {m: (lambda m=m: updates.compare(m, device, rounds=50), SECONDS[section]) for m in updates.MODELS}
    if section == "kernels":
        every = [case for op in cases.OPS for case in cases.cases(op, device)]
        if tiny:
            every = [Case(op, (1, 8, 6, 6), "fp32", "forward") for op in cases.OPS]
            every.append(Case("group_norm_silu", (1, 8, 6, 6), "fp32", "backward"))
        return {str(c): (lambda c=c: micro(c, device, 3 if tiny else 50), SECONDS[section]) for c in every}
    cfg = TINY_AUTOENCODER if tiny else AUTOENCODERS["flux.2"]
    sides, batches = ((8,), (1,)) if tiny else ((256, 512, 1024), (1, 4, 16, 32))
    tasks = [Task(kind, side, 1, compiled=False) for kind in ("decode", "encode") for side in sides]
    tasks += [Task("train step", sides[0], b, compiled=False) for b in batches]
    # Those that compile for minutes come last, largest first
    tasks += [dataclasses.replace(t, compiled=True) for t in reversed(tasks) if not tiny or t.kind == "decode"]
    return {
        str(t): (
            lambda t=t: whole_models.compare(t, cfg, device, rounds=3 if tiny else 15),
            SECONDS["autoencoder, compiled" if t.compiled else section],
        )
        for t in tasks
    }


def answers(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access every call of the process fails."""
    try:
        return torch.ones(1, device=device).add(1).item() == 2
    except RuntimeError:
        return False


def measure(report: dict[str, Any], sections: tuple[str, ...], device, tiny: bool, deadline: float, save) -> int:
    """Measures what the report lacks; returns the exit code."""
    for section in sections:
        rows = report["sections"].setdefault(section, {})
        every = rows_of(section, device, tiny)
        new = {name: row for name, row in every.items() if name not in rows}
        todo = new | {name: every[name] for name in rows if name in every and not rows[name]["ok"]}  # failed ones again
        for i, (name, (call, seconds)) in enumerate(todo.items(), 1):
            left = deadline - time.monotonic()
            if left < seconds:
                print(f"{section}: {len(todo) - i + 1} rows left and {left:.0f} s; run again to go on")
                return 3
            began = time.monotonic()
            try:
                rows[name] = {"ok": True, **call()}
            except Exception as error:  # Triton's and Inductor's errors have no common base
                rows[name] = {"ok": False, "why": str(error).strip().splitlines()[0] if str(error).strip() else "?"}
                traceback.print_exc()
            rows[name]["seconds"] = round(time.monotonic() - began, 2)
            save()
            state = "ok" if rows[name]["ok"] else f"WRONG: {rows[name]['why']}"
            print(f"{section} {i}/{len(todo)} {name}: {state}, {rows[name]['seconds']} s", flush=True)
            if not rows[name]["ok"] and not answers(device):
                print("the device no longer answers; run again to go on", file=sys.stderr)
                return 1
            gc.collect()  # modules and their compiled functions hold each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if section == "correctness" and (wrong := [n for n, row in rows.items() if not row["ok"]]):
            print(f"{len(wrong)} wrong; nothing is timed before they are right: {', '.join(wrong)}", file=sys.stderr)
            return 1
    failed = [name for section in sections for name, row in report["sections"][section].items() if not row["ok"]]
    if failed:
        print(f"{len(failed)} rows failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# --- tables --------------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    env, sections = report["environment"], report["sections"]
    packages = ", ".join(f"{k} {v}" for k, v in env["packages"].items())
    out = [
        f"### {env['device']}",
        "",
        f"Driver {env['driver']}, CUDA {env['cuda']}, {packages}; commit {env['commit']}.",
        "",
    ]
    rows = sections.get("correctness", {})
    if rows:
        good = sum(row["ok"] for row in rows.values())
        out += [f"{good} of {len(rows)} comparisons with fp64 pass, values and all gradients, same bits twice.", ""]
        out += [f"- wrong: {name}: {row['why']}" for name, row in rows.items() if not row["ok"]]
    for section, table in (
        ("kernels", cases.lines), ("updates", updates.lines), ("autoencoder", whole_models.lines)
    ):  # fmt: skip
        rows = sections.get(section, {})
        if good := [row for row in rows.values() if row["ok"]]:
            out += [*table(good), ""]
        out += [f"- failed: {name}: {row['why']}" for name, row in rows.items() if not row["ok"]]
    return "\n".join(out).rstrip() + "\n"


def gpu_tables() -> str:
    """Tables of all committed reports."""
    reports = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        try:
            reports.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: expected a report of this program ({error})") from None
    reports = [report for report in reports if not report["environment"]["tiny"]]
    return "\n".join(map(markdown, reports)) if reports else "No GPU has run the report yet: no figure is claimed.\n"


def with_tables(text: str) -> str:
    """The page with what stands between <!-- NAME --> and <!-- /NAME --> anew. ValueError if a mark is missing."""
    for name, table in (("gpu", gpu_tables), ("guard", guard.table)):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{DOCS.name}: expected the marks {start.strip()} and {end}")
        text = text[: text.index(start) + len(start)] + table() + text[text.index(end) :]
    return text


# --- program -------------------------------------------------------------------------------------------------------


def same_run(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether b's rows may stand beside a's."""
    keys = ("device", "driver", "cuda", "packages", "sources", "tiny")
    return all(a["environment"].get(k) == b["environment"].get(k) for k in keys)


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; may be given several times")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no row that may end later")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    parser.add_argument("--device", default="cuda", help="cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the report works")
    parser.add_argument("--commit", help="to be written into the report where git does not know it")
    parser.add_argument("--docs", action="store_true", help="rewrite the tables of docs/kernels.md and stop")
    args = parser.parse_args(argv)
    if args.docs:
        try:
            DOCS.write_text(with_tables(DOCS.read_text()))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {args.minutes}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: expected --tiny with it; full sizes are for a GPU")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this machine has no CUDA device (--device cpu --tiny tries the report)")
    if args.tiny and not args.out:
        parser.error("--tiny: expected --out FILE with it, away from measured results")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, for all contestants
    out: Path = args.out or RESULTS / f"gpu-{slug(device)}.json"
    env = environment(device) | {"sources": sources(), "tiny": args.tiny}
    if args.commit:
        env["commit"] = args.commit
    report: dict[str, Any] = {"environment": env, "sections": {}}
    if out.exists():
        try:
            before = json.loads(out.read_text())
            before["environment"], before["sections"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--out {out}: expected a report of this program or no file ({error!r})")
        if same_run(before, report):
            report = before
            print(f"going on with {out}: {sum(map(len, before['sections'].values()))} rows are there")
        else:
            print(f"{out} is of another GPU, other versions or sources: starting anew")
    print(f"{env['device']}, commit {env['commit']}, sources {env['sources']}", flush=True)

    def save():
        save_json(out, report)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save()
    except OSError as error:
        parser.error(f"--out {out}: cannot be written ({error})")
    sections = tuple(s for s in SECTIONS if not args.only or s in args.only)
    try:
        code = measure(report, sections, device, args.tiny, began + 60 * args.minutes, save)
    except KeyboardInterrupt:
        print("interrupted: rows that were measured are kept; run again to go on", file=sys.stderr)
        return 130
    print(markdown(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
