"""conv3x3 on a CPU with 16 multiplications for four pixels instead of 36: Winograd's F(2x2, 3x3).

Lavin and Gray 2016, arXiv:1509.09308, section 4.1. A tile of 2x2 pixels of y comes from 4x4 of x:

    Y = A^T [sum over channels of (G w G^T) * (B^T X B)] A

where the sum, for all tiles at once, is 16 matrix products, and the transforms are sums of neighbours. In fp32 it is as
close to the true value as the direct sum (docs/log.md). In bf16 the transformed values would be rounded as well, and
aten's products are faster, unless there are none (`kernels/conv.py`): it is for fp32, without gradients.

The weights are transformed in every call: a copy that was kept would not notice `parameter.data.copy_`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import conv2d, in_fp32

LEAST_IN, LEAST_OUT = 128, 256  # channels; narrower layers spend on transforms what they save
LEAST_PIXELS = 64 * 64  # fewer pixels do not pay for the transform of the weights
CHUNK_BYTES = 8 * 2**20  # of transformed tiles at a time
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def may_pay(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `winograd_conv2d` is for such a convolution. Does not look at sides, which would be guards in a graph."""
    fits = weight.shape[2:] == (3, 3) and stride == 1 and padding == 1
    wide = weight.shape[0] >= LEAST_OUT and weight.shape[1] >= LEAST_IN
    return x.device.type == "cpu" and (x.dtype == torch.float32 or in_fp32(x)) and fits and wide


def _of_weight(weight: Tensor) -> Tensor:
    """[C_out, C, 3, 3] -> [16, C, C_out]."""
    g = torch.tensor(_G, dtype=weight.dtype, device=weight.device)  # here: defaults may be others at import
    both = torch.kron(g, g)  # [16, 9]
    taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (both @ taps).view(16, weight.shape[1], weight.shape[0])


def _of_input(d: list[Tensor], out: list[Tensor]) -> None:
    """B^T along one axis: out[i] of d, views of rows or columns 0 to 3 of all tiles."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _of_output(m: list[Tensor], out: list[Tensor]) -> None:
    """A^T along one axis: two of four."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) where `may_pay`; no gradient. [N, C, H, W] -> [N, C_out, H, W] of x's dtype.

    channels_last, whatever x is; fp32 inside. Needs three times CHUNK_BYTES and the transformed weights beside input
    and output, and of 16 bits both of them in fp32, too.
    """
    n, channels, height, width = x.shape
    if height * width < LEAST_PIXELS:
        return conv2d(x, weight, bias, padding=1)
    u, count, dtype = _of_weight(weight.float()), weight.shape[0], x.dtype
    x = x.to(torch.float32, memory_format=torch.channels_last)
    padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2)).permute(0, 2, 3, 1)
    rows, columns = (height + 1) // 2, (width + 1) // 2  # of tiles
    y = x.new_empty(n, 2 * rows, 2 * columns, count)
    step = max(1, min(rows, CHUNK_BYTES // (16 * 4 * columns * max(channels, count))))
    # One scratch for all chunks: fresh memory comes as pages of zeros, which cost a fifth of the whole.
    sizes = ((4, padded.shape[2] * channels), (16, columns * channels), (16, columns * count), (8, columns * count))
    scratch = [x.new_empty(many * step * size) for many, size in sizes]
    for i in range(n):
        for first in range(0, rows, step):
            here = min(step, rows - first)
            by_rows, v, m, by_columns = (
                buffer[: many * here * size] for buffer, (many, size) in zip(scratch, sizes, strict=True)
            )
            by_rows = by_rows.view(4, here, padded.shape[2], channels)
            pixels = padded[i, 2 * first : 2 * (first + here) + 2]
            _of_input([pixels[a : a + 2 * here - 1 : 2] for a in range(4)], list(by_rows))
            v = v.view(4, 4, here, columns, channels)
            _of_input([by_rows[:, :, b : b + 2 * columns - 1 : 2] for b in range(4)], [v[:, b] for b in range(4)])
            torch.bmm(v.view(16, here * columns, channels), u, out=m.view(16, here * columns, count))
            m, by_columns = m.view(4, 4, here, columns, count), by_columns.view(2, 4, here, columns, count)
            _of_output([m[:, b] for b in range(4)], list(by_columns))
            tiles = y[i, 2 * first : 2 * (first + here)].view(here, 2, columns, 2, count)
            for b in range(2):
                _of_output([by_columns[b, a] for a in range(4)], [tiles[:, a, :, b] for a in range(2)])
    y = y[:, :height, :width].permute(0, 3, 1, 2)
    return (y if bias is None else y.add_(bias.view(-1, 1, 1))).to(dtype)
