"""Autoencoder files: our own, the original layouts and diffusers'. Foreign key names stand here, RAE's beside it.

Three layouts of the same tensors:

    bfl        native keys, one .safetensors file (FLUX.1, FLUX.2); ours carries its shape in the file's metadata
    ldm        as bfl, but `quant_conv` and `post_quant_conv` at the top, perhaps all under `first_stage_model.`
               (SD, SDXL, VA-VAE)
    diffusers  a folder with config.json and diffusion_pytorch_model.safetensors

Nothing in a file is executed: safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flux2.autoencoder import AUTOENCODERS, BN_EPS, BN_MOMENTUM, AutoEncoder, AutoencoderConfig
from flux2.checkpoint_folders import MANIFEST, Checkpoints, check
from flux2.checkpoints_rae import build_rae
from flux2.rae import RAE, RAES, RAEConfig
from flux2.tensor_files import (
    LISTED,
    dataclass_from_dict,
    load_json,
    load_tensors,
    mismatch,
    nearest,
    save_json,
    save_tensors,
)

FORMAT = "flux2-tokenizer"  # names our own files and folders
METADATA_KEY = "flux2_config"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
LDM_PREFIX = "first_stage_model."
LDM_TRAINING_ONLY = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")  # beside an autoencoder's own tensors


# Configs as plain dicts


def config_to_dict(cfg: AutoencoderConfig | RAEConfig) -> dict[str, Any]:
    """The fields of `cfg`, tuples as lists. Those of an RAE hold kind: rae."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def config_from_dict(fields: Mapping[str, Any]) -> AutoencoderConfig | RAEConfig:
    """Inverse of `config_to_dict`; missing fields take their defaults. ValueError names unknown fields and kinds."""
    values = dict(fields)
    kind = values.pop("kind", None)
    if kind not in (None, "rae"):
        raise ValueError(f"autoencoder config: expected kind rae, or none, got {kind!r}")
    return dataclass_from_dict(RAEConfig if kind == "rae" else AutoencoderConfig, values, "autoencoder config")


# Key names


def diffusers_key(key: str, levels: int) -> str:
    """Native key -> diffusers key; `levels`: resolutions of the network, from which diffusers counts the decoder's."""
    key = re.sub(r"^encoder\.(quant_conv)\.", r"\1.", key)
    key = re.sub(r"^decoder\.(post_quant_conv)\.", r"\1.", key)
    key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
    key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", key)
    key = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", key)
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", key)
    key = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", key)
    if ".attentions." in key:
        key = re.sub(r"\.norm\.", ".group_norm.", key)
        key = re.sub(r"\.([qkv])\.", r".to_\1.", key)
        key = key.replace(".proj_out.", ".to_out.0.")
    return key.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def _current_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pattern = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", k): v for k, v in tensors.items()}


def _to_native(tensors: Mapping[str, Tensor], cfg: AutoencoderConfig, native_keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors under native names where they have one, else under their own; 1x1 convolutions as [out, in, 1, 1]."""
    if _is_diffusers(tensors):
        names = {diffusers_key(k, len(cfg.ch_mult)): k for k in native_keys}
    else:
        names = {re.sub(r"^(encoder|decoder)\.((post_)?quant_conv)\.", r"\2.", k): k for k in native_keys}
    return {names.get(k, k): _as_convolution(names.get(k, k), v) for k, v in tensors.items()}


def _as_convolution(key: str, value: Tensor) -> Tensor:
    """Attention projections may be stored as linear layers."""
    is_projection = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key)
    return value[:, :, None, None] if is_projection and value.ndim == 2 else value


def _is_diffusers(tensors: Iterable[str]) -> bool:
    return any(".down_blocks." in key for key in tensors)


def _without_ldm_extras(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole LDM checkpoint's autoencoder, or the file itself less what only LDM's training needs."""
    inside = {k.removeprefix(LDM_PREFIX): v for k, v in tensors.items() if k.startswith(LDM_PREFIX)}
    return {k: v for k, v in (inside or tensors).items() if not k.startswith(LDM_TRAINING_ONLY)}


# Shape from content

_NETWORK = (
    "z_channels", "ch", "decoder_ch", "ch_mult", "num_res_blocks", "attn_levels", "quant_conv", "shortcut", "channels"
)  # fmt: skip


def _network_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What names and shapes say of the network: the fields in _NETWORK. ValueError if it is no such autoencoder."""
    block, attention = r"encoder.down.{}.block.{}.", "encoder.down.{}.attn."
    if _is_diffusers(tensors):
        block, attention = "encoder.down_blocks.{}.resnets.{}.", "encoder.down_blocks.{}.attentions."

    def count(pattern: str, *before: int) -> int:
        return next(i for i in range(100) if not any(k.startswith(pattern.format(*before, i, 0)) for k in tensors))

    try:
        levels = count(block)
        ch, channels = tensors["encoder.conv_in.weight"].shape[:2]
        widths = [tensors[block.format(i, 0) + "conv1.weight"].shape[0] for i in range(levels)]
        ch_mult = tuple(w // ch for w in widths)
        top = tensors["decoder.conv_in.weight"].shape[0]
        z_channels = tensors["encoder.conv_out.weight"].shape[0] // 2
        per_level = sum(any(k.startswith(block.format(0, j)) for k in tensors) for j in range(100))
        attn_levels = tuple(i for i in range(levels) if any(k.startswith(attention.format(i)) for k in tensors))
    except (KeyError, IndexError, StopIteration):
        levels = 0
    if not levels or any(w % ch for w in widths) or top % ch_mult[-1]:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"not an autoencoder of this family: expected encoder.conv_in.weight and the like, got {some}, ..."
        )
    shortcut = tensors.get("encoder.shortcut.inner.weight")
    return {
        "channels": channels,
        "z_channels": z_channels,
        "ch": ch,
        "decoder_ch": top // ch_mult[-1],
        "ch_mult": ch_mult,
        "num_res_blocks": per_level,
        "attn_levels": attn_levels,
        "quant_conv": "quant_conv.weight" in tensors or "encoder.quant_conv.weight" in tensors,
        "shortcut": "patch" if shortcut is not None else "none",
        **({"shortcut_width": shortcut.shape[0]} if shortcut is not None else {}),
    }


def _same_network(name: str, fields: Mapping[str, Any]) -> bool:
    return all(getattr(AUTOENCODERS[name], f) == fields[f] for f in _NETWORK)


def infer_config(tensors: Mapping[str, Tensor], preset: str | None = None) -> AutoencoderConfig:
    """Config of a file that carries none, from tensor names and shapes, matched to the preset rows.

    ValueError if it is another kind of network, if it does not fit `preset`, or if several rows fit.
    """
    fields = _network_fields(tensors)
    fitting = [name for name in AUTOENCODERS if _same_network(name, fields)]
    if preset in RAES:
        raise ValueError(f"not a {preset} autoencoder: those are read from this project's own files, which say so")
    if preset is not None:
        if preset not in fitting:
            expected = {f: getattr(AUTOENCODERS[preset], f) for f in _NETWORK}
            wrong = [f"{f} {expected[f]}, got {fields[f]}" for f in _NETWORK if expected[f] != fields[f]]
            raise ValueError(f"not a {preset} autoencoder: expected {'; '.join(wrong)}")
        return AUTOENCODERS[preset]
    if "bn.running_mean" in tensors:
        patch = math.isqrt(tensors["bn.running_mean"].shape[0] // fields["z_channels"])
        return AutoencoderConfig(**fields, patch=patch, latent_norm="batchnorm")
    if len(fitting) > 1:
        rows = " and ".join(fitting)
        raise ValueError(f"{rows} have the same tensors and differ only in latent scale: say which with preset=")
    if not fitting:
        raise ValueError(
            f"no preset has this shape, and the file does not say how its latents are normalised: {fields}"
        )
    return AUTOENCODERS[fitting[0]]


def _config_from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AutoencoderConfig:
    fields = _network_fields(tensors)
    if "bn.running_mean" in tensors:
        eps = config.get("batch_norm_eps", BN_EPS)
        if eps != BN_EPS:
            raise ValueError(f"batch_norm_eps: expected {BN_EPS}, got {eps}")
        latent: dict[str, Any] = {"latent_norm": "batchnorm", "patch": config.get("patch_size", [2, 2])[0]}
    else:
        row = next((AUTOENCODERS[name] for name in AUTOENCODERS if _same_network(name, fields)), None)
        latent = {"patch": row.patch if row else 2}
        if (means := config.get("latents_mean")) is not None:
            latent = {"latent_norm": "stats", "patch": math.isqrt(len(means) // fields["z_channels"])}
        else:
            latent |= {"scale": config.get("scaling_factor", 1.0), "shift": config.get("shift_factor") or 0.0}
    return AutoencoderConfig(**fields, **latent, num_groups=config.get("norm_num_groups", 32))


# Loading


def load_autoencoder(
    path: str | Path,
    *,
    preset: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder | RAE:
    """An autoencoder in eval mode from any of the layouts above, a run folder or a checkpoint folder of train.vae.

    What a path holds is recognised from content. From a run the newest checkpoint is taken, and from a checkpoint the
    averaged (EMA) weights. preset: a key of AUTOENCODERS or RAES, needed only where a file fits several (sd, sdxl),
    checked otherwise. FileNotFoundError or ValueError, in one sentence, if the path holds something else, another
    architecture, or not exactly the tensors of its own.
    """
    path = Path(path)
    rows = AUTOENCODERS | RAES
    if preset is not None and preset not in rows:
        raise ValueError(f"preset: expected one of {', '.join(rows)}, got {preset!r}{nearest(preset, rows)}")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a .safetensors file, a diffusers folder, or a run of train.vae"
        )
    tensors, cfg, source = _read(path, preset)
    if preset is not None and not _fits(cfg, rows[preset]):
        raise ValueError(f"{path}: expected the shape of {preset} ({rows[preset]}), got {cfg}")
    try:
        return _build(cfg, tensors).to(device=device, dtype=dtype).eval()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _fits(cfg: AutoencoderConfig | RAEConfig, row: AutoencoderConfig | RAEConfig) -> bool:
    """Whether both are the same network, whatever their latent normalisation and noise."""
    fields = _NETWORK if isinstance(row, AutoencoderConfig) else ("encoder", "decoder", "resolution")
    return type(cfg) is type(row) and all(getattr(cfg, f) == getattr(row, f) for f in fields)


def _read(path: Path, preset: str | None) -> tuple[dict[str, Tensor], AutoencoderConfig | RAEConfig, Path]:
    """(tensors, config, the file they are from)"""
    if path.is_file():
        tensors, metadata = load_tensors(path)
        try:
            if METADATA_KEY in metadata:
                return tensors, config_from_dict(json.loads(metadata[METADATA_KEY])), path
            tensors = _current_diffusers(_without_ldm_extras(tensors))
            return tensors, infer_config(tensors, preset), path
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if (path / MANIFEST).is_file():
        check(path, optimisers=False)
    if (path / "config.json").is_file():
        return _read_folder(path, preset)
    if (path / "vae" / "config.json").is_file():  # a whole diffusers pipeline
        return _read_folder(path / "vae", preset)
    for checkpoints in (Checkpoints(path / "checkpoints"), Checkpoints(path)):
        if (newest := checkpoints.newest(optimisers=False)) is not None:
            return _read_folder(checkpoints.path(newest), preset)
    raise ValueError(
        f"{path}: expected a diffusers folder (config.json and {DIFFUSERS_WEIGHTS}) or a run of train.vae"
        " (checkpoints/step_*), got a folder with neither"
    )


def _read_folder(folder: Path, preset: str | None) -> tuple[dict[str, Tensor], AutoencoderConfig | RAEConfig, Path]:
    config = load_json(folder / "config.json")
    if config.get("format") == FORMAT:
        file = next(
            (p for n in ("ema", "model") if (p := folder / f"{n}.safetensors").is_file()), folder / "ema.safetensors"
        )
        return load_tensors(file)[0], config_from_dict(config["autoencoder"]), file
    if "block_out_channels" not in config:
        kind = config.get("_class_name", "none of the known fields")
        raise ValueError(f"{folder}/config.json: expected AutoencoderKL or AutoencoderKLFlux2 of diffusers, got {kind}")
    file = folder / DIFFUSERS_WEIGHTS
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:LISTED])
        raise FileNotFoundError(f"{folder}: expected {DIFFUSERS_WEIGHTS} beside config.json, got {there}")
    tensors = _current_diffusers(load_tensors(file)[0])
    try:
        cfg = _config_from_diffusers(config, tensors)
        if cfg.latent_norm == "stats":
            for name, key in (("latent_mean", "latents_mean"), ("latent_std", "latents_std")):
                tensors[name] = torch.tensor(config[key], dtype=torch.float32)
        return tensors, cfg, file
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _build(cfg: AutoencoderConfig | RAEConfig, tensors: Mapping[str, Tensor]) -> AutoEncoder | RAE:
    """The network with exactly these tensors. ValueError names missing and unexpected ones and wrong shapes."""
    if isinstance(cfg, RAEConfig):
        return build_rae(cfg, tensors)
    with torch.device("meta"):
        ae = AutoEncoder(cfg)
    expected = ae.state_dict()
    given = _to_native(tensors, cfg, expected) if set(tensors) != set(expected) else dict(tensors)
    if "bn.num_batches_tracked" in expected:
        given.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.long))
    if cfg.latent_norm == "stats" and "latent_mean" not in given:
        warnings.warn("the file has no latent statistics: latents are left as they are (mean 0, std 1)", stacklevel=3)
        given |= {"latent_mean": torch.zeros(cfg.latent_channels), "latent_std": torch.ones(cfg.latent_channels)}
    if problems := mismatch(expected, given):
        raise ValueError(problems)
    ae.load_state_dict(given, assign=True)
    return ae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# Saving


def diffusers_config(cfg: AutoencoderConfig) -> dict[str, Any]:
    """config.json of the same network in diffusers. ValueError if diffusers has no such network."""
    if cfg.shortcut != "none":
        raise ValueError(f"diffusers has no counterpart of shortcut={cfg.shortcut!r}; save with layout='bfl'")
    down = ["AttnDownEncoderBlock2D" if i in cfg.attn_levels else "DownEncoderBlock2D" for i in range(len(cfg.ch_mult))]
    up = ["AttnUpDecoderBlock2D" if i in cfg.attn_levels else "UpDecoderBlock2D" for i in range(len(cfg.ch_mult))]
    config: dict[str, Any] = {
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [cfg.ch * m for m in cfg.ch_mult],
        "layers_per_block": cfg.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": cfg.z_channels,
        "norm_num_groups": cfg.num_groups,
        "sample_size": 1024 if cfg.latent_norm == "batchnorm" else 256,
        "force_upcast": True,
        "use_quant_conv": cfg.quant_conv,
        "use_post_quant_conv": cfg.quant_conv,
        "mid_block_add_attention": True,
    }
    if cfg.latent_norm == "batchnorm":
        del config["force_upcast"]  # not a field of this class
        config |= {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": BN_EPS, "batch_norm_momentum": BN_MOMENTUM}
        config |= {"patch_size": [cfg.patch, cfg.patch]}
        if cfg.decoder_ch != cfg.ch:
            config["decoder_block_out_channels"] = [cfg.decoder_ch * m for m in cfg.ch_mult]
        return config
    if cfg.decoder_ch != cfg.ch:
        raise ValueError(f"diffusers' AutoencoderKL has one width; got ch={cfg.ch}, decoder_ch={cfg.decoder_ch}")
    config |= {"_class_name": "AutoencoderKL", "scaling_factor": cfg.scale, "shift_factor": cfg.shift or None}
    return config


def save_autoencoder(ae: AutoEncoder | RAE, path: str | Path, layout: Literal["bfl", "diffusers"] = "bfl") -> None:
    """Writes `ae` as one .safetensors file (bfl) or as a diffusers folder; files appear complete or not at all.

    An RAE is written with its frozen encoder, so that no hub is needed to read it; only as one file.
    ValueError on another layout, on a path of the wrong kind, or if diffusers has no such network; OSError if the place
    cannot be written.
    """
    path, state = Path(path), ae.state_dict()
    if layout == "bfl":
        if path.is_dir():
            raise ValueError(f"{path}: layout 'bfl' is one file, and this is a folder")
        save_tensors(path, state, {"format": "pt", METADATA_KEY: json.dumps(config_to_dict(ae.cfg))})
    elif layout == "diffusers":
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: layout 'diffusers' is a folder, and this is a file")
        if isinstance(ae, RAE):
            raise ValueError("an RAE is not written in diffusers' layout; save with layout='bfl'")
        config = diffusers_config(ae.cfg)
        if ae.cfg.latent_norm == "stats":
            config |= {
                "latents_mean": state.pop("latent_mean").tolist(),
                "latents_std": state.pop("latent_std").tolist(),
            }
        renamed = {diffusers_key(k, len(ae.cfg.ch_mult)): v for k, v in state.items()}
        linear = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
        renamed = {k: v.flatten(1) if k.endswith(linear) else v for k, v in renamed.items()}
        save_tensors(path / DIFFUSERS_WEIGHTS, renamed, {"format": "pt"})
        save_json(path / "config.json", config)
    else:
        raise ValueError(f"layout: expected 'bfl' or 'diffusers', got {layout!r}")
