"""A training step of `train.flow` against the loop that SiT and REPA publish, on this CPU or GPU.

    python benchmarks/compare_flow.py                                 # both types, eager and compiled
    python benchmarks/compare_flow.py --docs                          # docs/flow.md, from what was measured
    python benchmarks/compare_flow.py --depth 28 --width 1152 --heads 16 --batch 32 --dtype bf16 --mode compiled

The peer is their structure on stock modules: timm's Attention and Mlp, LayerNorm and modulation apart, uniform times,
`randn_like`, the cosine sample by sample after `F.normalize`, `clip_grad_norm_`, AdamW, the average parameter by
parameter; compiled is `torch.compile(model)`, as people do. Ours is `FlowTrainer.step`: the same sizes, losses and
updates, on `kernels`. Contestants take turns; a row holds medians and the median over rounds of the peer's time over
ours.

Calls and bytes are counted where aten is called, views left out: on a GPU a call is about a launch, and its bytes are
what goes in and out of it. Of a block: what one more block adds, forward and backward. Graphs are those that Dynamo
hands on in the first compiled step, recompilations those of the steps after it. Results go to
benchmarks/results/flow-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "benchmarks")) if p not in sys.path]
from gpu_report import sources  # noqa: E402 - after the path
from measure import DEVICE, environment, interleaved, slug  # noqa: E402

from flux2.compat import ensure_torchvision  # noqa: E402

ensure_torchvision()
from timm.layers import Mlp  # noqa: E402
from timm.models.vision_transformer import Attention  # noqa: E402

from flux2 import AutoEncoder, AutoencoderConfig, TransformerConfig  # noqa: E402
from flux2.tensor_files import save_json  # noqa: E402
from flux2.transformer import RepaProjector  # noqa: E402
from flux2.transformer_blocks import FinalLayer, LabelEmbed, PatchEmbed, TimeEmbed, sincos_positions  # noqa: E402
from train.flow_config import FlowConfig, FlowOptions  # noqa: E402
from train.flow_trainer import FlowTrainer  # noqa: E402

CLASSES, SIDE, TEACHER = 1000, 16, 768
DOCS = ROOT / "docs" / "flow.md"
MARKED = re.compile(r"(<!-- step -->\n).*?(<!-- /step -->)", re.DOTALL)
MODES, DTYPES = ("eager", "compiled"), ("fp32", "bf16")


class Step(NamedTuple):
    """call: one update. parameters: how many numbers it trains."""

    call: Callable[[], Tensor]
    parameters: int


class PeerBlock(nn.Module):
    """SiT's block as published."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1))
        return x + gate2.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1))


class Peer(nn.Module):
    """SiT with REPA's projector; what is not a block is ours, which is theirs."""

    def __init__(self, cfg: TransformerConfig, channels: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(channels, cfg.width, 1)
        self.t_embedder, self.y_embedder = TimeEmbed(cfg.width), LabelEmbed(CLASSES, cfg.width)
        self.register_buffer("positions", sincos_positions(SIDE, SIDE, cfg.width, torch.device("cpu"), torch.float32))
        self.blocks = nn.ModuleList(PeerBlock(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg.width, channels, "layer")
        self.projector = RepaProjector(cfg.width, TEACHER)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x_embedder(z) + self.positions
        c = self.t_embedder(t) + self.y_embedder(y)
        features = x
        for i, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if i == self.cfg.repa_depth:
                features = self.projector(x)
        return self.final_layer(x, c.unsqueeze(1)).transpose(1, 2).reshape(z.shape), features


def peer_step(cfg: TransformerConfig, data: dict[str, Tensor], dtype: str, compiled: bool) -> Step:
    """REPA's loop."""
    torch.manual_seed(0)
    model = Peer(cfg, 4 * data["mean"].shape[1]).to(DEVICE)
    average = copy.deepcopy(model).requires_grad_(False)
    run = torch.compile(model, dynamic=False) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)

    def call() -> Tensor:
        x, tokens = F.pixel_unshuffle(data["mean"], 2), data["tokens"].flatten(2).transpose(1, 2)
        y = torch.where(torch.rand(len(x), device=DEVICE) < 0.1, CLASSES, data["labels"])
        t = torch.rand(len(x), 1, 1, 1, device=DEVICE)
        noise = torch.randn_like(x)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
            pred, features = run((1 - t) * x + t * noise, t.flatten(), y)
        loss = ((pred - (noise - x)) ** 2).flatten(1).mean(1).mean()
        aligned = torch.zeros((), device=DEVICE)
        for own, theirs in zip(features, tokens, strict=True):
            own, theirs = F.normalize(own.float(), dim=-1), F.normalize(theirs, dim=-1)
            aligned = aligned - (own * theirs).sum(-1).mean()
        loss = loss + 0.5 * aligned / len(x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            named = dict(average.named_parameters())
            for name, p in model.named_parameters():
                named[name].mul_(0.9999).add_(p, alpha=1 - 0.9999)
        return loss.detach()

    return Step(call, sum(p.numel() for p in model.parameters()))


def own_step(cfg: TransformerConfig, data: dict[str, Tensor], dtype: str, compiled: bool) -> Step:
    """`FlowTrainer.step` on a cache's latents and tokens, with REPA's settings but the law."""
    ae = AutoEncoder(AutoencoderConfig(z_channels=32, ch=8, decoder_ch=8, num_groups=4, num_res_blocks=1))
    config = FlowConfig(
        preset="flow", transformer=cfg, batch=len(data["mean"]), precision=dtype, repa="dinov2-b", lr=1e-4, warmup=0,
        clip=1.0, betas=(0.9, 0.999), weight_decay=0.0, ema_decays=(0.9999,), sample_posterior=False, repa_hidden=2048,
    )  # fmt: skip
    options = FlowOptions(compile=compiled)
    trainer = FlowTrainer(config, ae, CLASSES, DEVICE, options=options, token_channels=TEACHER)
    steps = itertools.count(1)

    def call() -> Tensor:
        trainer.seen.clear()
        return trainer.step(next(steps), data)["loss"]

    return Step(call, sum(p.numel() for guard in trainer.guards.values() for p in guard.named.values()))


CONTESTANTS = {"ours": own_step, "SiT/REPA": peer_step}


class Calls(TorchDispatchMode):
    """Counts what aten is called for, views left out, and the bytes of the tensors that go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        held = {t.untyped_storage().data_ptr() for t in given}
        view = made and all(t.untyped_storage().data_ptr() in held for t in made) and not func._schema.is_mutable
        if not view and made:
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in given + made)
        return out


def counted(name: str, cfg: TransformerConfig, data: dict[str, Tensor], dtype: str) -> dict[str, int]:
    """Calls and bytes of a step, and of one block in it."""
    found = []
    for depth in (cfg.depth, cfg.depth + 1):
        more = TransformerConfig(width=cfg.width, depth=depth, heads=cfg.heads, repa_depth=cfg.repa_depth)
        call = CONTESTANTS[name](more, data, dtype, False).call
        call()
        with Calls() as calls:
            call()
        found.append(calls)
    return {
        "calls": found[0].calls, "bytes": found[0].bytes,
        "block_calls": found[1].calls - found[0].calls, "block_bytes": found[1].bytes - found[0].bytes,
    }  # fmt: skip


def inputs(batch: int) -> dict[str, Tensor]:
    """Latents, a teacher's tokens and labels, as `train.data cache` leaves them."""
    torch.manual_seed(0)
    tokens = torch.randn(batch, TEACHER, SIDE, SIDE)
    data = {
        "mean": torch.randn(batch, 32, 2 * SIDE, 2 * SIDE),
        "tokens": tokens,
        "labels": torch.arange(batch) % CLASSES,
    }
    return {name: t.to(DEVICE) for name, t in data.items()}


def compare(cfg: TransformerConfig, batch: int, dtype: str, mode: str, rounds: int) -> dict[str, Any]:
    """One row. AssertionError if the contestants do not train as many parameters."""
    data = inputs(batch)
    row: dict[str, Any] = {"dtype": dtype, "mode": mode, "batch": batch, "rounds": rounds}
    torch.compiler.reset()
    calls: dict[str, Callable[[], Any]] = {}
    for name, make in CONTESTANTS.items():
        counters.clear()
        step = make(cfg, data, dtype, mode == "compiled")
        assert step.parameters == row.setdefault("parameters", step.parameters), name
        calls[name] = step.call
        calls[name]()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        for _ in range(3):
            calls[name]()
        if mode == "compiled":
            again = counters["stats"]["unique_graphs"] - graphs
            row[name] = {"graphs": graphs, "graph_breaks": breaks, "recompilations": again}
        else:
            row[name] = counted(name, cfg, data, dtype)
    samples = interleaved(calls, DEVICE, rounds=rounds, warmup=0)
    row["ms"] = {name: round(statistics.median(times), 2) for name, times in samples.items()}
    ratios = [theirs / ours for theirs, ours in zip(samples["SiT/REPA"], samples["ours"], strict=True)]
    return row | {"ratio": round(statistics.median(ratios), 3)}


def table(report: dict[str, Any]) -> str:
    """Markdown: times and ratio, then what was counted."""
    out = [
        "| step | SiT/REPA, ms | ours, ms | times as fast | graphs, breaks, recompilations of ours |",
        "|---" * 5 + "|",
    ]
    for row in report["rows"].values():
        ours = row["ours"]
        seen = "" if "calls" in ours else f"{ours['graphs']}, {ours['graph_breaks']}, {ours['recompilations']}"
        ms = row["ms"]
        out.append(
            f"| {row['dtype']}, {row['mode']} | {ms['SiT/REPA']:.0f} | {ms['ours']:.0f} | {row['ratio']:.2f} | {seen} |"
        )
    out += ["", "| aten, eager | calls of a step | of a block | MiB of a step | of a block |", "|---" * 5 + "|"]
    for row in report["rows"].values():
        for name in CONTESTANTS:
            if (c := row[name]).get("calls"):
                mib = [f"{c[key] / 2**20:,.0f}" for key in ("bytes", "block_bytes")]
                out.append(f"| {name}, {row['dtype']} | {c['calls']:,} | {c['block_calls']} | {mib[0]} | {mib[1]} |")
    env, size = report["environment"], report["size"]
    about = (
        f"width {size['width']}, depth {size['depth']}, {SIDE * SIDE} tokens, batch {size['batch']}. {env['device']}"
    )
    about += f", threads {env['threads']}, torch {env['packages']['torch']}, commit {env['commit']}."
    return "\n".join([*out, "", about, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 384), ("depth", 4), ("heads", 6), ("batch", 8), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both by default")
    parser.add_argument("--mode", choices=MODES, action="append", help="both by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"flow-{slug(DEVICE)}.json")
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured and stop")
    parser.add_argument("--docs", action="store_true", help="write them into docs/flow.md and stop")
    args = parser.parse_args(argv)
    if args.table or args.docs:
        text = table(json.loads(args.out.read_text()))
        if args.docs:
            DOCS.write_text(MARKED.sub(lambda m: m[1] + text + m[2], DOCS.read_text()))
        print(text)
        return 0
    if min(args.depth, args.batch, args.rounds) < 1:
        parser.error(f"expected positive numbers, got depth {args.depth}, batch {args.batch}, rounds {args.rounds}")
    try:
        half = max(1, args.depth // 2)
        cfg = TransformerConfig(width=args.width, depth=args.depth, heads=args.heads, repa_depth=half)
    except ValueError as error:
        parser.error(str(error))
    size = {name: getattr(args, name) for name in ("width", "depth", "heads", "batch")}
    report = {"environment": environment(DEVICE) | {"sources": sources()}, "size": size, "rows": {}}
    for dtype in args.dtype or DTYPES:
        for mode in args.mode or MODES:
            print(f"{dtype} {mode}: {args.rounds} rounds", flush=True)
            report["rows"][f"{dtype} {mode}"] = compare(cfg, args.batch, dtype, mode, args.rounds)
            save_json(args.out, report)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
