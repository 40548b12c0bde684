"""RAE files: the network from its own tensors, and the decoder and latent statistics that bytetriper/RAE publishes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2.rae import RAE, RAEConfig
from flux2.tensor_files import load_tensors, mismatch
from flux2.vit_decoder import ViTDecoder, sincos_positions


def build_rae(cfg: RAEConfig, tensors: Mapping[str, Tensor]) -> RAE:
    """The network with exactly these tensors. ValueError names missing and unexpected ones and wrong shapes."""
    with torch.device("meta"):
        rae = RAE(cfg, encoder_weights=None)
    if problems := mismatch(rae.state_dict(), tensors):
        raise ValueError(problems)
    rae.load_state_dict(dict(tensors), assign=True)
    return rae


_LAYER = {  # of a block: ours -> ViT-MAE's; qkv is stored as three
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}


def official_state(decoder: ViTDecoder) -> dict[str, Tensor]:
    """The decoder's tensors, sharing its memory, under the names of bytetriper/RAE; without the fixed positions."""
    state = {"trainable_cls_token": decoder.cls_token.detach()}
    for key, value in decoder.state_dict().items():
        parts = key.split(".")
        if parts[0] in ("embed", "norm", "pred"):
            state[f"decoder_{key}"] = value
        elif parts[0] == "blocks":
            block, kind = f"decoder_layers.{parts[1]}", parts[3]
            if parts[2] == "qkv":
                for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    state[f"{block}.attention.attention.{name}.{kind}"] = third
            else:
                state[f"{block}.{_LAYER[parts[2]]}.{kind}"] = value
    return state


@torch.no_grad()
def load_official_decoder(rae: RAE, path: str | Path) -> None:
    """Sets the decoder from a decoder file of bytetriper/RAE (`decoder_embed.weight`, ...), as torch or safetensors.

    FileNotFoundError if there is none; ValueError, in one sentence, if it is another network, or was trained with other
    positions than the fixed ones.
    """
    given, state = load_tensors(path)[0], official_state(rae.decoder)
    positions = given.pop("decoder_pos_embed", None)
    if problems := mismatch(state, given):
        raise ValueError(f"{path}: not a decoder {rae.cfg.decoder!r} of RAE: {problems}")
    if positions is not None:
        side = math.isqrt(positions.shape[1])  # the class token has a row too, of zeros
        fixed = sincos_positions(side, side, positions.shape[2], positions.device)
        if not torch.allclose(positions.float(), F.pad(fixed, (0, 0, 1, 0))[None], atol=1e-4):
            raise ValueError(f"{path}: decoder_pos_embed: expected fixed sine-cosine positions, got others")
    for name, tensor in state.items():
        tensor.copy_(given[name])


def load_official_statistics(rae: RAE, path: str | Path) -> None:
    """Sets the latent statistics from a file of bytetriper/RAE: a dict of mean and var, [C, h, w] each.

    FileNotFoundError if there is none; ValueError, in one sentence, on other names or shapes.
    """
    tensors = load_tensors(path)[0]
    given = {f"latent_{k}": v.squeeze(0) if v.ndim == 4 else v for k, v in tensors.items()}
    expected = {k: rae.get_buffer(k) for k in ("latent_mean", "latent_var")}
    if problems := mismatch(expected, given):
        raise ValueError(f"{path}: not the latent statistics of {rae.cfg}: {problems}")
    for name, buffer in expected.items():
        buffer.copy_(given[name])
