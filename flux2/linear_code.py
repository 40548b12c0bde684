"""The best linear code of a size: PCA of f x f RGB blocks. A yardstick, and a starting point for shortcut="patch"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2.autoencoder import AutoEncoder

WARM_LOGVAR = -8.0  # posterior log-variance a warm-started encoder begins with
ENERGY_GAIN = 1.0  # standard deviation of a warm-started hidden unit before its SiLU


@dataclass(frozen=True)
class LinearCode:
    """components [k, 3 f^2] orthonormal rows over blocks (c, row, column); mean [3] of the channels; std [k]; fp32."""

    components: Tensor
    mean: Tensor
    std: Tensor
    block: int

    def encode(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], sides multiples of the block -> code [N, k, H/f, W/f]."""
        blocks = F.pixel_unshuffle(x - self.mean.view(1, -1, 1, 1), self.block)
        return torch.einsum("kd,ndhw->nkhw", self.components, blocks)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], sides multiples of the block -> their projection on the code, clamped to [-1, 1]."""
        blocks = torch.einsum("kd,nkhw->ndhw", self.components, self.encode(x))
        return (F.pixel_shuffle(blocks, self.block) + self.mean.view(1, -1, 1, 1)).clamp(-1, 1)

    def first(self, k: int) -> LinearCode:
        """The best linear code of k numbers: components are in the order of their variance."""
        return LinearCode(self.components[:k], self.mean, self.std[:k], self.block)


def fit_linear_code(x: Tensor, *, num_components: int, block: int) -> LinearCode:
    """Closed-form PCA of the blocks of pixels x [N, 3, H, W] in [-1, 1] about the channels' mean, in fp64.

    ValueError on fewer blocks than numbers in a block, or more components than that.
    """
    mean = x.double().mean((0, 2, 3))
    blocks = F.pixel_unshuffle(x.double() - mean.view(1, -1, 1, 1), block).transpose(0, 1).flatten(1)  # [3 f^2, N h w]
    size, count = blocks.shape
    if count <= size:
        raise ValueError(f"PCA of {size} numbers a block needs more blocks than that, got {count}")
    if num_components > size:
        raise ValueError(f"PCA: at most {size} components in a block of {block}x{block}, got {num_components}")
    values, vectors = torch.linalg.eigh(blocks @ blocks.T / count)  # ascending
    values, vectors = values.flip(0)[:num_components], vectors.flip(1)[:, :num_components].T
    sign = torch.sign(vectors.sum(1, keepdim=True))  # an eigenvector's sign is arbitrary: fix it
    vectors = vectors * torch.where(sign == 0, 1.0, sign)
    std = values.clamp(min=1e-12).sqrt()
    return LinearCode(vectors.float(), mean.float(), std.float(), block)


def fit_context_decoder(code: LinearCode, x: Tensor) -> Tensor:
    """Least-squares conv3x3 from the code of pixels x [N, 3, H, W] to their blocks: fp32 [3 f^2, k, 3, 3].

    Neighbouring codes say what a block's own leaves out; the code is continued past the border by its edge.
    """
    k, size = code.components.shape
    normal = torch.zeros(9 * k, 9 * k, dtype=torch.float64)
    right = torch.zeros(9 * k, size, dtype=torch.float64)
    for part in x.split(256):
        around = F.unfold(F.pad(code.encode(part), (1, 1, 1, 1), mode="replicate"), 3)  # [n, 9 k, h w]
        blocks = F.pixel_unshuffle(part - code.mean.view(1, -1, 1, 1), code.block).flatten(2)
        around, blocks = (t.transpose(0, 1).flatten(1).double() for t in (around, blocks))
        normal += around @ around.T
        right += around @ blocks.T
    ridge = 1e-6 * normal.diagonal().mean() * torch.eye(9 * k, dtype=torch.float64)
    return torch.linalg.solve(normal + ridge, right).T.float().view(size, k, 3, 3)


@torch.no_grad()
def warm_start(ae: AutoEncoder, code: LinearCode, decoder: Tensor) -> None:
    """Sets an autoencoder with shortcut="patch" to compute exactly a linear code; its networks start by adding zero.

    decoder: conv3x3 [3 f^2, k, 3, 3] from the code to blocks, as `fit_context_decoder` gives. Component i is divided
    by std_i^(1/2) on the way in: half-way between an orthonormal code, whose latents differ 50-fold in size, and a
    whitened one, whose weights do. ValueError if the shapes do not fit.
    """
    if ae.cfg.shortcut != "patch":
        raise ValueError(f"warm start needs shortcut='patch', got {ae.cfg.shortcut!r}")
    z, f = ae.cfg.z_channels, ae.cfg.downsample
    if code.block != f or len(code.components) != z:
        raise ValueError(
            f"warm start: expected {z} components of {f}x{f} blocks,"
            f" got {len(code.components)} of {code.block}x{code.block}"
        )
    scale = code.std.clamp(min=1e-3).sqrt()
    mean_block = code.mean.repeat_interleave(f * f)
    into = code.components / scale[:, None]
    state = ae.state_dict()  # tensors that share the weights' memory
    state["encoder.shortcut.linear.weight"].zero_()
    state["encoder.shortcut.linear.weight"][:, :, 1, 1] = into
    state["encoder.shortcut.linear.bias"].copy_(-(into @ mean_block))
    state["decoder.shortcut.linear.weight"].copy_(decoder * scale.view(1, z, 1, 1))
    state["decoder.shortcut.linear.bias"].copy_(mean_block)
    for last in ("encoder.conv_out", "decoder.conv_out", "encoder.shortcut.outer", "decoder.shortcut.outer"):
        state[f"{last}.weight"].zero_()
        state[f"{last}.bias"].zero_()
    logvar_bias = state["encoder.quant_conv.bias" if ae.cfg.quant_conv else "encoder.conv_out.bias"]
    logvar_bias[:z].zero_()
    logvar_bias[z:].fill_(WARM_LOGVAR)


@torch.no_grad()
def warm_start_energies(ae: AutoEncoder, code: LinearCode) -> None:
    """Sets the hidden units of the encoder's shortcut to pairs SiLU(u), SiLU(-u) of the code's whitened components.

    Their sum, u tanh(u / 2), is even: about |u|, the energy of a component, which says where structure is and in which
    direction whatever its contrast's sign. What a teacher sees can be read from such units linearly, from hidden units
    of random weights hardly (docs/log.md). Nothing reads them yet, so that the code stays as it is. The first
    component, a block's brightness, is left out; as many pairs as there are components and room, the rest stays random.
    ValueError if the shapes do not fit.
    """
    if ae.cfg.shortcut != "patch":
        raise ValueError(f"warm start needs shortcut='patch', got {ae.cfg.shortcut!r}")
    if code.block != (f := ae.cfg.downsample):
        raise ValueError(f"warm start: expected components of {f}x{f} blocks, got {code.block}x{code.block}")
    state = ae.state_dict()
    weight, bias = state["encoder.shortcut.inner.weight"], state["encoder.shortcut.inner.bias"]
    pairs = min(len(weight) // 2, len(code.components) - 1)
    rows = code.components[1 : pairs + 1] / code.std[1 : pairs + 1, None].clamp(min=1e-3) * ENERGY_GAIN
    offset = rows @ code.mean.repeat_interleave(code.block**2)
    for i, sign in enumerate((1.0, -1.0)):
        part = slice(i * pairs, (i + 1) * pairs)
        weight[part] = 0
        weight[part, :, 1, 1] = sign * rows
        bias[part] = -sign * offset
