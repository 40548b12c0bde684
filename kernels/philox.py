"""Counter-based randomness: Philox4x32-10 in plain torch (Salmon et al., SC 2011).

Every draw is a pure function of (seed, step, sample index, stream, element): equal on any device, for any split of a
batch over processes, and after any resume. Key: the 64-bit seed, low word first. Counter: (block, index, step, stream).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a * b. The int64 product wraps, but its 64 bits are right, and the mask undoes the sign."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds; words are int64 tensors holding 32-bit values, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul(_M0, c0)
        high1, low1 = _mul(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox_uint32(
    seed: int, step: int, index: Tensor, stream: int, num_blocks: int, device: torch.device | str | None = None
) -> Tensor:
    """int64 [n, 4 num_blocks] holding 32-bit words; row i is that of sample index[i] (int64 [n], below 2^32).

    ValueError if seed is not in [0, 2^64) or step, stream or num_blocks not in [0, 2^32).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected a number in [0, 2^64), got {seed}")
    for name, value in (("step", step), ("stream", stream), ("num_blocks", num_blocks)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}: expected a number in [0, 2^32), got {value}")
    index = index.to(device=device, dtype=torch.int64)[:, None]
    block = torch.arange(num_blocks, device=index.device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=index.device)
    words = philox_4x32((block, index, zero + step, zero + stream), (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)


def uniform(
    seed: int,
    step: int,
    first_index: int,
    n: int,
    count: int,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """fp32 [n, count] in (0, 1): u = ((r >> 9) + 0.5) 2^-23; row i depends on (seed, step, first_index + i, stream).

    ValueError as `philox_uint32`, and if an index is not in [0, 2^32).
    """
    if not 0 <= first_index <= first_index + n <= 2**32:
        raise ValueError(f"first_index: expected indices in [0, 2^32), got {first_index} and {n} of them")
    index = torch.arange(first_index, first_index + n, device=device)
    words = philox_uint32(seed, step, index, stream, -(-count // 4), device)[:, :count]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def normal(
    seed: int,
    step: int,
    first_index: int,
    shape: tuple[int, ...],
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """fp32 standard normals of `shape` = (n, ...); element e of sample i depends on (seed, step, first_index + i, e).

    Box-Muller on pairs of words: elements 2j and 2j + 1 are sqrt(-2 ln u_2j) times cos and sin of 2 pi u_2j+1.
    """
    n, count = shape[0], math.prod(shape[1:])
    u = uniform(seed, step, first_index, n, count + count % 2, stream, device).unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), 2.0 * math.pi * u[..., 1]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(shape)
