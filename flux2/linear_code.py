"""The best linear code of a size: PCA of f x f RGB blocks. A yardstick, and a starting point for shortcut="patch"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2.autoencoder import AutoEncoder

WARM_LOGVAR = -8.0  # posterior log-variance a warm-started encoder begins with


@dataclass(frozen=True)
class LinearCode:
    """components [k, 3 f^2] orthonormal rows over blocks (c, row, column); mean [3] of the channels; std [k]; fp32."""

    components: Tensor
    mean: Tensor
    std: Tensor
    block: int

    def encode(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], sides multiples of the block -> code [N, k, H/f, W/f]."""
        blocks = F.pixel_unshuffle(x - self.mean.view(1, 3, 1, 1), self.block)
        return torch.einsum("kd,ndhw->nkhw", self.components, blocks)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], sides multiples of the block -> their projection on the code, clamped to [-1, 1]."""
        blocks = torch.einsum("kd,nkhw->ndhw", self.components, self.encode(x))
        return (F.pixel_shuffle(blocks, self.block) + self.mean.view(1, 3, 1, 1)).clamp(-1, 1)


def fit_linear_code(x: Tensor, *, num_components: int, block: int) -> LinearCode:
    """Closed-form PCA of the blocks of pixels x [N, 3, H, W] in [-1, 1] about the channels' mean, in fp64.

    ValueError on fewer blocks than numbers in a block, or more components than that.
    """
    mean = x.double().mean((0, 2, 3))
    blocks = F.pixel_unshuffle(x.double() - mean.view(1, 3, 1, 1), block).transpose(0, 1).flatten(1)  # [3 f^2, N h w]
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
        blocks = F.pixel_unshuffle(part - code.mean.view(1, 3, 1, 1), code.block).flatten(2)
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
