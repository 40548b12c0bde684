"""Models that no process holds whole (FSDP2), and their checkpoints, in the format of those that one process writes.

torch.distributed.checkpoint lets each process write its own shards as safetensors; process 0 then joins them, file by
file, into what `Checkpoints.save` would have written. So any number of processes can go on from any other's checkpoint,
and every program reads it. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flux2.checkpoint_folders import Checkpoints
from flux2.tensor_files import save_json, save_tensors
from train import dist


def shard(model: nn.Module, blocks: nn.ModuleList, *, precision: str) -> None:
    """Spreads a model over all processes, block by block; a block is whole only while it computes.

    precision: "bf16" gathers weights in bf16; gradients are always summed in fp32.
    """
    # SiT's result is a view, and nothing here writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32
    )
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    # also what lies outside of blocks: an average is never run backwards, which would spread it again
    fully_shard(model, mp_policy=policy, reshard_after_forward=True)


def is_sharded(tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a checkpoint's tensors lie on several processes."""
    return any(isinstance(t, DTensor) for group in tensors.values() for t in group.values())


def save_sharded(
    store: Checkpoints, step: int, tensors: Mapping[str, Mapping[str, Tensor]], config: dict[str, Any]
) -> None:
    """As `Checkpoints.save`, called on all processes; the folder is on a disk that all of them see."""
    if dist.from_main(lambda: store.path(step).exists()):
        return
    folder = Path(dist.from_main(lambda: str(_made(store.temporary(step)))))
    try:
        for name, group in tensors.items():
            if not is_sharded({name: group}):
                dist.from_main(lambda name=name, group=group: save_tensors(folder / f"{name}.safetensors", group))
                continue
            part = folder / f"{name}.parts"
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True, enable_consolidation=True)
            save({k: t.detach() for k, t in group.items()}, storage_writer=writer)
            scalars = {k: t for k, t in group.items() if t.ndim == 0}
            dist.from_main(
                lambda part=part, name=name, scalars=scalars: _take(part, folder / f"{name}.safetensors", scalars)
            )
        dist.from_main(lambda: save_json(folder / "config.json", config))
        dist.from_main(lambda: store.finish(step, folder))
    except BaseException:
        if dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _made(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _take(part: Path, file: Path, scalars: Mapping[str, Tensor]) -> None:
    """Moves the joined file out of a folder of shards, which goes.

    Joining (torch 2.13) leaves tensors without dimensions zero: they are written again here.
    """
    (whole,) = part.glob("*.safetensors")
    with whole.open("r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        for name, value in scalars.items():
            content.seek(8 + length + header[name]["data_offsets"][0])
            content.write(value.detach().cpu().reshape(1).view(torch.uint8).numpy().tobytes())
    whole.rename(file)
    shutil.rmtree(part)


class _OneFile(HuggingFaceStorageReader):
    """Reads one file of a checkpoint's folder."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file.parent))
        self.fs.ls = lambda path: [str(file)]  # type: ignore[method-assign]


def load_into(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, whole or spread over processes, from a file of a checkpoint; each process reads its own part."""
    load({k: t.detach() for k, t in tensors.items()}, storage_reader=_OneFile(file))


def load_optimiser(file: Path, optimiser: torch.optim.Optimizer) -> None:
    """Fills an optimiser over parameters that may be spread over processes; keys as `train.loop.optimiser_tensors`."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(str(file), framework="pt") as content:
        for name in content.keys():  # noqa: SIM118
            index, key = name.split(".", 1)
            shape = content.get_slice(name).get_shape()
            like = parameters[int(index)]
            empty = torch.zeros_like(like) if tuple(shape) == tuple(like.shape) else torch.zeros(shape)
            state.setdefault(int(index), {})[key] = empty.detach()
    load_into(file, {f"{i}.{key}": value for i, fields in state.items() for key, value in fields.items()})
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
