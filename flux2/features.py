"""Features of pictures, for distances between sets of them: HOG, the Inception of the FID, class tokens of ViTs.

Each takes uint8 pictures and gives one vector a picture. Distances on different features, or weights, do not compare:
`identity` says which were used, and `label` what a Frechet distance on them may be called.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.images import from_uint8
from flux2.teachers import VITS, HOGTeacher
from flux2.tensor_files import nearest

FEATURES = ("hog", "inception", *VITS)
HOG_VERSION = 1  # raised with any change of what its numbers are


class Features(nn.Module):
    """What all features share: frozen, in eval whatever `train` says, the same numbers in any batch and under autocast.

    name: as in FEATURES. label: what a Frechet distance on them is called. channels: D of "pool". identity: name and
    the first 12 digits of the SHA-256 of its weights.
    """

    name: str
    label: str
    channels: int
    identity: str
    multiple = 1
    """Sides must be multiples of it."""

    def train(self, mode: bool = True) -> Features:
        """Stays in eval."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, 3, H, W] -> {"pool": fp32 [N, D]}, of inception also "spatial" and "logits"."""
        m = self.multiple
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"features {self.name}: expected uint8 pictures [N, 3, H, W], got {got}")
        if any(side < m or side % m for side in images.shape[2:]):
            raise ValueError(
                f"features {self.name}: expected sides that are multiples of {m}, got {list(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.features(images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` on checked pictures."""
        raise NotImplementedError


class HOGFeatures(Features):
    """120 numbers a picture: mean histogram of oriented gradients of each quadrant (4 x 27), and its mean R, G, B.

    The histograms are `flux2.teachers.HOGTeacher`'s of 8-pixel cells; colours are in [0, 1]. Blind to anything that
    keeps the quadrants' means: for comparing like with like where no weights are at hand.
    """

    name, label, channels, identity, multiple = "hog", "FD-HOG", 120, f"hog-v{HOG_VERSION}", 16

    def __init__(self) -> None:
        super().__init__()
        self.hog = HOGTeacher(patch=8)
        self.eval()

    def features(self, images: Tensor) -> dict[str, Tensor]:
        histograms = F.adaptive_avg_pool2d(self.hog(from_uint8(images)), 2)  # [N, 27, 2, 2]
        colours = F.adaptive_avg_pool2d(images.float() / 255, 2)  # [N, 3, 2, 2]
        return {"pool": torch.cat([histograms.flatten(1), colours.flatten(1)], 1)}


def build_features(name: str, weights: str = "", device: str | torch.device = "cpu") -> Features:
    """The features `name`, one of FEATURES, on `device`.

    weights: a local file, "random" for tests, or "" for the library's cache or hub. ValueError on an unknown name.
    """
    if name not in FEATURES:
        raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {name!r}{nearest(name, FEATURES)}")
    if name == "hog":
        if weights:
            raise ValueError(f"features 'hog' are computed and have no weights, got {weights}")
        return HOGFeatures().to(device)
    raise NotImplementedError(name)
