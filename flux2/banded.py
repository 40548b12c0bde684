"""Encoder and decoder in bands of rows: one feature map is held instead of five, and no value is approximated.

A tile of a picture is not decoded as the picture is: its GroupNorms see the statistics of the tile, its convolutions
zeros at its border. Here every norm has the statistics of the whole map, and every convolution the rows above and below
its band. A residual block reads its map twice:

    first    h = conv1(silu(norm1(x))), of which only the moments of norm2's groups are kept
    second   h again, and x <- x + conv2(silu(norm2(h))), written over rows that nothing reads any more

Where the width changes, h goes into the block's output, and the output over h. A convolution keeps the last rows of its
input from one band to the next, so that no row is computed twice in a pass. Nearest-neighbour upsampling and its
convolution are computed anew in each pass over them where storing the result would raise the peak; where storing h, or
the upsampled map, does not raise it, it is stored. Attention sees the whole map, which is the coarsest.

Moments are taken about a value of the band, and merged in fp64 (Chan, Golub & LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.blocks import AttnBlock, Downsample, ResBlock, Upsample
from kernels import group_norm_silu
from kernels.conv import conv2d
from kernels.upsample_conv import phase_kernels, upsample_padded

if TYPE_CHECKING:
    from flux2.autoencoder import Decoder, Encoder

CPU_BAND, GPU_BAND = 2**18, 2**23  # elements of a band: what a core's cache holds; what keeps a GPU busy
LEAST_ROWS = 4, 2  # of the first band, out of which three convolutions in a row have to give something; of the others
BANDS_AT_ONCE = 12  # that the convolutions of a block hold between them, with what they make of them and gaps
WORKSPACE = 64 * 2**20  # bytes: weights as convolutions rearrange them, those of phases, their own buffers
ATTENTION_MAPS = 7  # x, norm(x), q, k, v, the output, and its projection


def band_elements(device: torch.device) -> int:
    return CPU_BAND if device.type == "cpu" else GPU_BAND


class Moments:
    """Mean and variance of groups of channels, of rows that come one band after another."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.empty(0)  # [C] each, in fp64; squares: summed, about the mean

    def add(self, rows: Tensor) -> None:
        """rows: [1, C, h, w]"""
        channels, best = rows.shape[1], torch.float32 if rows.device.type == "mps" else torch.float64
        if not self._count:
            self._mean, self._squares = torch.zeros(2, channels, dtype=best, device=rows.device)
        chunk = max(1, band_elements(rows.device) // channels)
        for part in rows.permute(0, 2, 3, 1).reshape(-1, channels).split(chunk):
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            pivot = part[0]
            part = part - pivot
            mean, more = part.mean(0), len(part)
            squares = part.sub_(mean).square_().sum(0)
            total = self._count + more
            delta = pivot.to(best) + mean - self._mean
            self._squares.add_(squares).addcmul_(delta, delta, value=self._count * more / total)
            self._mean.add_(delta, alpha=more / total)
            self._count = total

    def stats(self, num_groups: int, dtype: torch.dtype) -> Tensor:
        """[1, G, 2], of at least fp32: mean and biased variance, as the norms of `kernels` take them."""
        means, squares = (m.view(num_groups, -1) for m in (self._mean, self._squares))
        mean = means.mean(1, keepdim=True)
        var = (squares / self._count + (means - mean).square()).mean(1)
        return torch.stack((mean[:, 0], var), -1)[None].to(torch.promote_types(dtype, torch.float32))


class Conv:
    """A convolution that is fed the rows of its input in bands, with the GroupNorm and SiLU before it where given.

    It gives rows of the output as soon as all that they need has come, and keeps the rows that the next ones need too.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, stats: Tensor | None = None, backend: str = "auto"
    ) -> None:
        self.conv, self.norm, self.stats, self.backend = conv, norm, stats, backend
        self.stride = conv.stride[0]
        self._tail: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """Next rows of the input [1, C, r, w], and whether they are the last -> next rows of the output."""
        if self.norm is not None:
            norm = self.norm
            rows = group_norm_silu(
                rows, norm.weight, norm.bias, norm.num_groups, norm.eps, self.stats, backend=self.backend
            )
        above = self.stride == 1 and self._tail is None  # a strided convolution has zeros below only
        held = rows if self._tail is None else torch.cat((self._tail, rows), 2)
        held = F.pad(held, (0, 0, int(above), int(last))) if above or last else held
        done = (held.shape[2] - 3) // self.stride + 1
        rest = held[:, :, done * self.stride :]
        if self._tail is not None and self._tail.shape == rest.shape:
            self._tail.copy_(rest)  # in its place: small blocks that outlive bands leave gaps between them
        else:
            self._tail = rest.clone()
        return self._convolve(held)

    def _convolve(self, held: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if self.stride == 1:
            return conv2d(held, weight, bias, padding=(0, 1))
        return conv2d(F.pad(held, (0, 1, 0, 0)), weight, bias, self.stride)


class DoublingConv(Conv):
    """The same of nearest-neighbour upsampling and its convolution: two rows for each that comes."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.kernels = phase_kernels(conv.weight)

    def _convolve(self, held: Tensor) -> Tensor:
        return upsample_padded(F.pad(held, (1, 1, 0, 0)), self.kernels, self.conv.bias)


@dataclass
class Feature:
    """A feature map [1, C, h, w] as bands of its rows: `stored` itself, or what a convolution makes of it.

    stats: of its groups, once they are known.
    """

    stored: Tensor
    stats: Tensor | None = None
    stage: Callable[[], Conv] | None = None
    channels: int = 0
    scale: int = 1  # of its sides to those of `stored`

    def __post_init__(self) -> None:
        self.channels = self.channels or self.stored.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.channels, self.stored.shape[2] * self.scale, self.stored.shape[3] * self.scale

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def bands(self) -> Iterator[tuple[Tensor, bool]]:
        """(rows, whether they are the last), from the first row on."""
        stage = self.stage() if self.stage else None
        height, start = self.stored.shape[2], 0
        fits = band_elements(self.stored.device) // (max(self.numel, self.stored.numel()) // height)
        first, least = (n // self.scale + (self.scale - 1) * (n > 2) for n in LEAST_ROWS)  # 4 doubled rows need 3
        while start < height:
            end = min(start + max(fits, least if start else first), height)
            rows, last = self.stored[:, :, start:end], end == height
            yield (rows if stage is None else stage.push(rows, last)), last
            start = end

    def store(self, num_groups: int) -> None:
        """Stores the map, in place of what it is computed from, and knows its statistics."""
        sink = Sink(self.shape)
        for rows, _ in self.bands():
            sink.put(rows)
        stored = sink.feature(num_groups)
        self.stored, self.stats, self.stage, self.scale = stored.stored, stored.stats, None, 1


class Sink:
    """Takes rows in order, into a map of `shape` that it makes with the first of them, or into one that is there."""

    def __init__(self, shape: tuple[int, ...], into: Tensor | None = None, moments: bool = True) -> None:
        self.shape, self.map, self.filled = shape, into, 0
        self.moments = Moments() if moments else None

    def put(self, rows: Tensor, added: Tensor | None = None) -> None:
        """rows + added"""
        if self.map is None:
            self.map = torch.empty(self.shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)
        room = self.map[:, :, self.filled : self.filled + rows.shape[2]]
        room.copy_(rows if added is None else rows.add_(added))
        self.filled += rows.shape[2]
        if self.moments is not None:
            self.moments.add(room)

    def feature(self, num_groups: int) -> Feature:
        """The map, once all rows have come, with its statistics."""
        assert self.map is not None and self.moments is not None and self.filled == self.shape[2]
        return Feature(self.map, self.moments.stats(num_groups, self.map.dtype))


def _stats(x: Feature, num_groups: int) -> Tensor:
    moments, dtype = Moments(), x.stored.dtype
    for rows, _ in x.bands():
        moments.add(rows)
        dtype = rows.dtype
    return moments.stats(num_groups, dtype)


def _storing(source: int, x: int, out: int, same_width: bool) -> int:
    """Elements held at most where x, computed from `source`, is stored before a block makes `out` of it."""
    return max(source + x, x if same_width else x + out)


def _res_block(block: ResBlock, x: Feature, most: int) -> Feature:
    """The block's output; no more than `most` elements are held in maps."""
    groups, shape = block.num_groups, (1, block.conv1.out_channels, *x.shape[2:])
    out = torch.Size(shape).numel()
    if x.stage is not None and _storing(x.stored.numel(), x.numel, out, block.same_width) <= most:
        x.store(groups)
    stats1 = _stats(x, groups) if x.stats is None else x.stats
    in_place = x.stage is None and block.same_width and x.stored.numel() + out > most
    first, moments = Conv(block.conv1, block.norm1, stats1, block.backend), Moments()
    hidden = Sink(shape, moments=False)
    for rows, last in x.bands():
        h = first.push(rows, last)
        moments.add(h)
        if not in_place:
            hidden.put(h)
    stats2 = moments.stats(groups, h.dtype)
    first, second = (
        Conv(conv, norm, stats, block.backend)
        for conv, norm, stats in ((block.conv1, block.norm1, stats1), (block.conv2, block.norm2, stats2))
    )
    sink = Sink(shape, x.stored if in_place else hidden.map)
    waiting, start = None, 0  # rows of x whose output has not come yet; where the next ones begin
    for rows, last in x.bands():
        end = start + rows.shape[2]
        if in_place:
            h = first.push(rows, last)
        else:
            assert hidden.map is not None
            h = hidden.map[:, :, start:end]
        y, start = second.push(h, last), end
        waiting = rows if waiting is None else torch.cat((waiting, rows), 2)
        skip, waiting = waiting[:, :, : y.shape[2]], waiting[:, :, y.shape[2] :]
        sink.put(y, skip if block.same_width else block.nin_shortcut(skip))
    return sink.feature(groups)


def _attention(block: AttnBlock, x: Feature) -> Feature:
    y, _ = block(x.stored, x.stats)
    return Feature(y, _stats(Feature(y), block.num_groups))


def _downsample(block: Downsample, x: Feature) -> Feature:
    conv, (_, channels, height, width) = Conv(block.conv), x.shape
    sink = Sink((1, channels, height // 2, width // 2))
    for rows, last in x.bands():
        sink.put(conv.push(rows, last))
    return sink.feature(block.num_groups)


def _doubled(block: Upsample, x: Feature) -> Feature:
    return Feature(x.stored, stage=lambda: DoublingConv(block.conv), channels=x.channels, scale=2)


def _through(x: Feature, conv: nn.Conv2d, norm: nn.GroupNorm, backend: str) -> Tensor:
    """conv(SiLU(norm(x)))"""
    stage, sink = Conv(conv, norm, x.stats, backend), Sink((1, conv.out_channels, *x.shape[2:]), moments=False)
    for rows, last in x.bands():
        sink.put(stage.push(rows, last))
    assert sink.map is not None
    return sink.map


def steps(network: Encoder | Decoder) -> Iterator[nn.Module]:
    """Residual blocks, attention and changes of sides, between conv_in and norm_out, in order."""
    middle = (network.mid.block_1, network.mid.attn_1, network.mid.block_2)
    is_decoder = hasattr(network, "up")
    if is_decoder:
        yield from middle
    for level in reversed(network.up) if is_decoder else network.down:  # type: ignore[arg-type]
        for j, block in enumerate(level.block):
            yield block
            if level.attn:
                yield level.attn[j]
        if level.resample != "none":
            yield level.upsample if level.resample == "up" else level.downsample
    if not is_decoder:
        yield from middle


def most_elements(network: Encoder | Decoder, height: int, width: int) -> tuple[int, int]:
    """(elements of the maps held at once, elements of the largest row of a map), of one picture.

    height, width: of the network's own input, pixels or raw latents.
    """
    rows, columns = height, width
    channels, held, widest = network.conv_in.out_channels, 0, 0
    source = network.conv_in.in_channels * rows * columns
    for step in steps(network):
        x = channels * rows * columns
        need = x
        if isinstance(step, ResBlock):
            out = step.conv1.out_channels * rows * columns
            if source:
                need, source = min(_storing(source, x, out, step.same_width), source + out), 0
            elif not step.same_width:
                need = x + out
            widest = max(widest, channels * columns, step.conv1.out_channels * columns)
            channels = step.conv1.out_channels
        elif isinstance(step, AttnBlock):
            need = ATTENTION_MAPS * x
        elif isinstance(step, Downsample):
            need, rows, columns = x + x // 4, rows // 2, columns // 2
        else:
            source, rows, columns = x, rows * 2, columns * 2
        held = max(held, need)
    return held, widest


def most_bytes(network: Encoder | Decoder, height: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that `run` holds at most besides weights, input and result: maps, bands, and one picture's result.

    height, width: of the network's own input, pixels or raw latents.
    """
    maps, row = most_elements(network, height, width)
    change = sum(2 if isinstance(s, Upsample) else -2 if isinstance(s, Downsample) else 0 for s in steps(network))
    result = network.conv_out.out_channels * int(height * width * 2.0**change)
    band = max(band_elements(device), LEAST_ROWS[0] * row) * max(4, dtype.itemsize)  # norms compute in fp32
    return (maps + result) * dtype.itemsize + BANDS_AT_ONCE * band + WORKSPACE


def run(network: Encoder | Decoder, x: Tensor) -> Tensor:
    """The network's body, conv_in to conv_out, without what lies before (post_quant_conv) or after it (quant_conv,
    shortcut): x [N, C, h, w], one picture after another -> as `network.conv_out` gives it. For inference only: under
    torch.no_grad(), it writes over its own intermediate results.
    """
    parts = [_one(network, sample) for sample in x.split(1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one(network: Encoder | Decoder, sample: Tensor) -> Tensor:
    conv_in = network.conv_in
    most, _ = most_elements(network, *sample.shape[2:])
    x = Feature(sample, stage=lambda: Conv(conv_in), channels=conv_in.out_channels)
    for step in steps(network):
        if isinstance(step, ResBlock):
            x = _res_block(step, x, most)
        elif isinstance(step, AttnBlock):
            x = _attention(step, x)
        elif isinstance(step, Downsample):
            x = _downsample(step, x)
        else:
            assert isinstance(step, Upsample)
            x = _doubled(step, x)
    return _through(x, network.conv_out, network.norm_out, network.backend)
