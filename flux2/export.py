"""`export`: encode or decode as one file of plain aten operations, that torch alone reads and runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from flux2.autoencoder import AutoEncoder
from flux2.tensor_files import written_whole

LEAST = 2  # latent positions a side: of sides of one, torch.export makes a program of their own


class _Method(nn.Module):
    """forward(x) is a method of the autoencoder; an exported program is a module's forward."""

    def __init__(self, ae: AutoEncoder, what: str) -> None:
        super().__init__()
        self.ae, self.what = ae, what

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.ae, self.what)(x)


def export(ae: AutoEncoder, what: Literal["encode", "decode"], path: str | Path | None = None):
    """`ae.encode` or `ae.decode` as a torch.export.ExportedProgram, written to `path` (.pt2) if one is given.

    Batch and sides are free: pixels [N, 3, m h, m w] and latents [N, C, h, w] of any N and of h and w from 2,
    m = cfg.multiple. In ae's dtype and on its device. The program has stock operations only, so that
    `torch.export.load(path).module()` runs where neither this project nor Triton is. The file appears complete or not
    at all.

    ValueError on another method or another class; OSError if `path` cannot be written.
    """
    if not isinstance(ae, AutoEncoder):
        raise ValueError(f"export: expected an AutoEncoder, got {type(ae).__name__}")
    if what not in ("encode", "decode"):
        raise ValueError(f"export: expected 'encode' or 'decode', got {what!r}")
    like, multiple = ae.decoder.conv_in.weight, ae.cfg.multiple
    n, h, w = Dim("n"), Dim("h", min=LEAST), Dim("w", min=LEAST)
    if what == "encode":
        shape, free = (2, 3, 2 * multiple, 3 * multiple), {0: n, 2: multiple * h, 3: multiple * w}
    else:
        shape, free = (2, ae.cfg.latent_channels, 2, 3), {0: n, 2: h, 3: w}
    backend = ae.decoder.backend
    ae.set_backend("torch")
    try:
        x = torch.zeros(shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            program = torch.export.export(_Method(ae, what).eval(), (x,), dynamic_shapes={"x": free})
    finally:
        ae.set_backend(backend)
    if path is not None:
        with written_whole(Path(path)) as temporary, temporary.open("wb") as file, warnings.catch_warnings():
            # said of weights in channels_last, each of which is alone in its storage
            warnings.filterwarnings("ignore", "No complete tensor found in the group")
            torch.export.save(program, file)  # pyright: ignore[reportArgumentType]
    return program
