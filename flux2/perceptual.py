"""LPIPS as a training loss: the lpips package's networks, with a gradient that stays finite (Zhang et al. 2018)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flux2.compat import ensure_torchvision
from flux2.layers import unit
from flux2.tensor_files import load_tensors

LEAST_SIDE = 32  # pixels: AlexNet's and VGG's poolings need that much


class LPIPS(nn.Module):
    """Learned perceptual distance, v0.1 of the lpips package (arXiv:1801.03924), mean over the batch.

    net: "vgg", what autoencoders train on, or "alex", the metric's default. weights: a local file of the backbone in
    torchvision's names (`features.0.weight`, as in vgg16-397923af.pth) or of the whole network in lpips's; "" takes
    torchvision's from its cache or the net; "random" leaves the backbone random, for tests (warns). The linear layers
    are in the lpips package. Frozen, always in eval, kept out of what a trainer saves.

    FileNotFoundError or ValueError, in one sentence, where there are no such weights.
    """

    def __init__(self, net: Literal["vgg", "alex"] = "vgg", weights: str | Path = "") -> None:
        super().__init__()
        if net not in ("vgg", "alex"):
            raise ValueError(f"LPIPS net: expected 'vgg' or 'alex', got {net!r}")
        ensure_torchvision()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision on the arguments that lpips gives it
            import lpips

            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if str(weights) == "random":
            warnings.warn("LPIPS with a random backbone: for tests, its values mean nothing", stacklevel=2)
        else:
            _load_backbone(network, net, weights)
        parts: Any = network  # lpips has no types
        self.slices = nn.ModuleList(getattr(parts.net, f"slice{k + 1}") for k in range(len(parts.chns)))
        self.linears = nn.ModuleList(layer.model[-1] for layer in parts.lins)
        for name in ("shift", "scale"):
            self.register_buffer(name, getattr(parts.scaling_layer, name))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Pixels [N, 3, H, W] in [-1, 1] -> unit features of each layer, fp32 [N, C_k, h_k, w_k]."""
        h, found = (x - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for part in self.slices:
            h = part(h)
            found.append(unit(h.float(), 1))
        return found

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] -> fp32 scalar; gradient to recon only, the target's features keep no graph.

        Equals the mean of lpips.LPIPS()(recon, target). ValueError if shapes differ or a side is below 32.
        """
        _check(recon, target)
        with torch.no_grad():
            wanted = self.features(target)
        total = recon.new_zeros((), dtype=torch.float32)
        for linear, a, b in zip(self.linears, self.features(recon), wanted, strict=True):
            weight = linear.weight.float().view(-1)  # type: ignore[union-attr, operator]
            total = total + ((a - b).square().mean((0, 2, 3)) * weight).sum()
        return total

    @torch.no_grad()
    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """`forward` of each pair, without a gradient: pixels [N, 3, H, W] in [-1, 1] twice -> fp32 [N]."""
        _check(a, b)
        total = a.new_zeros(len(a), dtype=torch.float32)
        for linear, x, y in zip(self.linears, self.features(a), self.features(b), strict=True):
            weight = linear.weight.float().view(-1, 1, 1)  # type: ignore[union-attr, operator]
            total += ((x - y).square() * weight).sum(1).mean((1, 2))
        return total


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < LEAST_SIDE:
        raise ValueError(
            f"LPIPS: expected two equal shapes [N, 3, H, W] with sides of at least {LEAST_SIDE}, got"
            f" {list(a.shape)} and {list(b.shape)}"
        )


def _load_backbone(network: Any, net: str, weights: str | Path) -> None:
    """Fills the backbone of lpips's network, from a file or from torchvision's cache."""
    if weights:
        state = load_tensors(weights)[0]
        source = str(weights)
    else:
        from torchvision.models import AlexNet_Weights, VGG16_Weights

        row = VGG16_Weights.IMAGENET1K_V1 if net == "vgg" else AlexNet_Weights.IMAGENET1K_V1
        source = row.url
        try:
            state = row.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:  # whatever the net, the cache or the hash check raises
            raise FileNotFoundError(
                f"LPIPS needs {row.url} ({type(error).__name__} while fetching it): give the file with --lpips-weights"
            ) from None
    own = network.state_dict()
    if any(k.startswith("features.") for k in state):
        place = {k.split(".", 2)[2]: k for k in own if k.startswith("net.slice")}  # "0.weight" -> "net.slice1.0.weight"
        state = {place[k[9:]]: v for k, v in state.items() if k.startswith("features.") and k[9:] in place}
    needed = {k for k in own if k.startswith("net.")}
    if missing := sorted(needed - state.keys()):
        raise ValueError(
            f"{source}: expected the weights of {net} in torchvision's names (features.0.weight, ...) or lpips's,"
            f" missing {len(missing)} of {len(needed)}, as {missing[0]}"
        )
    for k in sorted(needed):
        if state[k].shape != own[k].shape:
            raise ValueError(f"{source}: {k}: expected {list(own[k].shape)}, got {list(state[k].shape)}")
    network.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
