"""Transformer files: our own, and weights of SiT, REPA, LightningDiT, RAE and DiT, turned to our time and sign.

Our tensors have the names of these codes, so that little is renamed; what differs is said by a convention:

    sit, lightningdit  t = 1 is data and v = x - eps
    repa, rae          as ours: t = 0 is data and v = eps - x
    dit                predicts eps of a variance-preserving process at t in 0..999: loaded as it is, to train from

Reversed time is exact in the weights. With t' = 1 - t and a frequency w of the sinusoid

    cos w t' = cos w cos w t + sin w sin w t        sin w t' = sin w cos w t - cos w sin w t

so that a constant matrix takes the features of t to those of t', and goes into the linear map that follows them; the
last layer changes its sign. `learn_sigma`'s second half of the output, which SiT never reads, is dropped. Tables of
positions are compared with ours and dropped. Nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2.tensor_files import dataclass_from_dict, load_tensors, mismatch, save_tensors
from flux2.transformer import TRANSFORMERS, RepaProjector, SiT, TransformerConfig
from flux2.transformer_blocks import rotary_positions, sincos_positions, time_frequencies

METADATA_KEY = "flux2_transformer"
DIT_STEPS = 1000.0  # of DiT's diffusion
REVERSED = {"sit": True, "lightningdit": True, "repa": False, "rae": False, "dit": False}  # time and sign, a convention
PROJECTOR = "projectors.0."
ROTARY = ("feat_rope.", "enc_feat_rope.", "dec_feat_rope.")  # tables in a file: LightningDiT's; RAE's trunk and head


# Our own files


def transformer_to_dict(model: SiT) -> dict[str, Any]:
    """What makes the same network again: {"config": fields, "in_channels", "num_classes"}, for JSON."""
    return {
        "config": dataclasses.asdict(model.cfg),
        "in_channels": model.in_channels,
        "num_classes": model.num_classes,
    }


def build_transformer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiT:
    """The network of `transformer_to_dict` with exactly these tensors, in eval mode.

    ValueError names unknown fields, missing and unexpected tensors, and wrong shapes.
    """
    if fields.keys() != {"config", "in_channels", "num_classes"}:
        raise ValueError(f"transformer: expected config, in_channels and num_classes, got {', '.join(fields)}")
    cfg = dataclass_from_dict(TransformerConfig, fields["config"], "transformer config")
    with torch.device("meta"):
        model = SiT(cfg, fields["in_channels"], fields["num_classes"])
    if problems := mismatch(model.state_dict(), tensors):
        raise ValueError(problems)
    model.load_state_dict(dict(tensors), assign=True)
    return model.requires_grad_().eval()


def save_transformer(model: SiT, path: str | Path) -> None:
    """Writes one .safetensors file that `load_transformer` reads, complete or not at all. OSError if it cannot."""
    save_tensors(path, model.state_dict(), {"format": "pt", METADATA_KEY: json.dumps(transformer_to_dict(model))})


def load_transformer(
    path: str | Path,
    *,
    convention: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SiT:
    """A transformer in eval mode, in our time and sign, from our own file or a published one (.safetensors, .pt).

    convention: "sit", "lightningdit", "repa", "rae" or "dit", of a file that is not ours; tensors do not tell. Training
    checkpoints give their averaged weights (under "ema") where they hold nothing but tensors. FileNotFoundError or
    ValueError, in one sentence, for another kind of file, a missing convention, or not exactly a network's tensors.
    """
    tensors, metadata = load_tensors(path)
    try:
        if METADATA_KEY in metadata:
            if convention is not None:
                raise ValueError(f"convention: expected None for a file of ours, got {convention!r}")
            fields = json.loads(metadata[METADATA_KEY])
        else:
            fields, tensors = from_published(tensors, convention)
        return build_transformer(fields, tensors).to(device=device, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_projector(path: str | Path) -> RepaProjector:
    """The first projector of a REPA checkpoint, fp32. ValueError if the file has none."""
    tensors = _plain_names(load_tensors(path)[0])
    own = {k.removeprefix(PROJECTOR): v.float() for k, v in tensors.items() if k.startswith(PROJECTOR)}
    if "0.weight" not in own or "4.weight" not in own:
        raise ValueError(f"{path}: expected {PROJECTOR}0.weight and the like, got no projector")
    hidden, width = own["0.weight"].shape
    projector = RepaProjector(width, len(own["4.weight"]), hidden)
    try:
        if problems := mismatch(projector.state_dict(), own):
            raise ValueError(problems)
    except ValueError as error:
        raise ValueError(f"{path}: projector: {error}") from None
    projector.load_state_dict(own)
    return projector


# Published files


def from_published(tensors: Mapping[str, Tensor], convention: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields of `build_transformer`, tensors under our names in our time and sign, fp32), of published weights.

    ValueError for an unknown convention, another network, or positions that are not ours.
    """
    if convention not in REVERSED:
        raise ValueError(
            f"convention: expected one of {', '.join(REVERSED)} for a file that is not ours, got {convention!r}"
        )
    given = {k: v.float() for k, v in _plain_names(tensors).items() if not k.startswith("projectors.")}
    try:
        cfg = _infer(given)
        if convention == "dit":
            cfg = dataclasses.replace(cfg, time_scale=DIT_STEPS - 1)  # its times are 0 to 999
        weight = given["x_embedder.proj.weight"]
        fields = {
            "config": dataclasses.asdict(cfg),
            "in_channels": weight.shape[1],
            "num_classes": len(given["y_embedder.embedding_table.weight"]) - 1,
        }
        _drop_positions(given, cfg)
        _drop_sigma(given, cfg.patch**2, weight.shape[1])
        if REVERSED[convention]:
            if cfg.time_embed != "sinusoid":
                raise ValueError(f"convention {convention!r}: expected a sinusoid of t, got a Fourier embedding")
            given["t_embedder.mlp.0.weight"] = reverse_time(given["t_embedder.mlp.0.weight"])
            for name in ("weight", "bias"):
                given[f"final_layer.linear.{name}"] = -given[f"final_layer.linear.{name}"]
    except KeyError as error:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"not a transformer of this family: expected {error.args[0]}, got {some}, ...") from None
    return fields, given


def reverse_time(weight: Tensor) -> Tensor:
    """[D, 256], the map of the sinusoid's features (128 cosines, 128 sines) -> the one that does to t what it did to
    1 - t. Its own inverse, up to rounding."""
    frequencies = time_frequencies().double()
    cos, sin = frequencies.cos(), frequencies.sin()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat((of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos), 1).to(weight.dtype)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put before names."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in tensors.items()}


def _infer(given: Mapping[str, Tensor]) -> TransformerConfig:
    """Config from names and shapes. KeyError names a tensor that every such network has."""
    head = "s_embedder.proj.weight" in given
    embed = given["x_embedder.proj.weight"]
    width = len(given["s_embedder.proj.weight"]) if head else len(embed)
    widths = []
    while (key := f"blocks.{len(widths)}.attn.qkv.weight") in given or not widths:
        widths.append(given[key].shape[1])
    depth = widths.count(width)
    if head and len(embed) == width:
        raise ValueError(f"expected a head of another width than the trunk's {width}, got the same")
    rows = [cfg for cfg in TRANSFORMERS.values() if (cfg.width, cfg.depth) == (width, depth)]
    heads = _heads(given, "blocks.0.", ("feat_rope.", "enc_feat_rope."), width, [cfg.heads for cfg in rows])
    head_heads = 0
    if head:
        known = [cfg.head_heads for cfg in rows if cfg.head_heads]
        head_heads = _heads(given, f"blocks.{depth}.", ("dec_feat_rope.",), len(embed), known)
    swiglu = "blocks.0.mlp.w12.weight" in given
    return TransformerConfig(
        width=width,
        depth=depth,
        heads=heads,
        repa_depth=rows[0].repa_depth if rows else min(8, depth),
        patch=embed.shape[2],
        mlp_ratio=4.0 if swiglu else len(given["blocks.0.mlp.fc1.weight"]) / width,
        norm="rms" if "blocks.0.norm1.weight" in given else "layer",
        mlp="swiglu" if swiglu else "gelu",
        sincos="pos_embed" in given,
        rope=any(k.startswith(ROTARY) for k in given),
        qk_norm="blocks.0.attn.q_norm.weight" in given,
        time_embed="fourier" if "t_embedder.W" in given else "sinusoid",
        head_width=len(embed) if head else 0,
        head_depth=len(widths) - depth if head else 0,
        head_heads=head_heads,
    )


def _heads(given: Mapping[str, Tensor], block: str, tables: tuple[str, ...], width: int, rows: list[int]) -> int:
    """Heads of a width: from a norm of queries, from rotary tables, else as the rows of TRANSFORMERS have them."""
    for key in (f"{block}attn.q_norm.weight", *(f"{t}freqs_cos" for t in tables)):
        if key in given:
            return width // given[key].shape[-1]
    if not rows:
        shapes = ", ".join(f"{cfg.width}x{cfg.depth}" for cfg in TRANSFORMERS.values())
        raise ValueError(f"tensors do not tell the heads: expected width and depth of a row ({shapes}), got {width}")
    return rows[0]


def _drop_positions(given: dict[str, Tensor], cfg: TransformerConfig) -> None:
    """Removes tables of positions on a square grid. ValueError if they are not those that we compute."""
    device, dtype = torch.device("cpu"), torch.float32
    for key in [k for k in given if k == "pos_embed" or k.startswith(ROTARY)]:
        table = given.pop(key)
        side = round(table.shape[-2] ** 0.5)
        if key == "pos_embed":
            expected = sincos_positions(side, side, cfg.width, device, dtype)[None]
        else:
            width, heads = (cfg.head_width, cfg.head_heads) if key.startswith("dec_") else (cfg.width, cfg.heads)
            cos, sin = rotary_positions(side, side, width // heads, False, device, dtype)
            expected = (cos if key.endswith("freqs_cos") else sin).repeat_interleave(2, 1)  # one for each channel
        if table.shape != expected.shape or (table - expected).abs().max() > 1e-4:
            raise ValueError(f"{key}: expected the fixed positions of a square grid, got {list(table.shape)} others")


def _drop_sigma(given: dict[str, Tensor], positions: int, channels: int) -> None:
    """Keeps of a last layer with 2 C channels a position the first C; its rows are (row, column, channel)."""
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(given[key]) == 2 * positions * channels:
            given[key] = given[key].unflatten(0, (positions, 2 * channels))[:, :channels].flatten(0, 1).contiguous()
