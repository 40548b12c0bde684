"""Features of pictures, for distances between sets of them: HOG, the Inception of the FID, class tokens of ViTs.

Each takes uint8 pictures and gives one vector a picture. Distances on different features, or weights, do not compare:
`identity` says which were used, and `label` what a Frechet distance on them may be called.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.compat import ensure_torchvision
from flux2.images import from_uint8
from flux2.teachers import RANDOM, VITS, HOGTeacher, ViTConfig, build_vit
from flux2.tensor_files import load_tensors, mismatch, nearest

FEATURES = ("hog", "inception", *VITS)
HOG_VERSION = 1  # raised with any change of what its numbers are
OPTION = "--feature-weights"  # how programs call a file of weights
FID_FILE = "weights-inception-2015-12-05-6726825d.pth"
FID_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FID_FILE}"
FID_SHA256 = "6726825d"  # how the SHA-256 of that file begins; pytorch-fid's file is the same
SPATIAL_CHANNELS = 7  # of sFID
VIT_SIDE = 224  # pixels that a ViT sees


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
        with torch.autocast(images.device.type, enabled=False), _full_precision():
            return self.features(images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` on checked pictures."""
        raise NotImplementedError


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 on a GPU is fp32: cuDNN's convolutions, and matrix products where a program asks for it, round to TF32."""
    backends: Any = torch.backends  # has no types for these
    settings = (backends.cudnn.conv, backends.cuda.matmul)
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 12 digits of the SHA-256 of names, types, shapes and bytes: the same for any kind of file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        total.update(x.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:12]


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


class InceptionFeatures(Features):
    """The FID's Inception of 2015 in torch-fidelity's port: "pool" [N, 2048], "spatial" [N, 2023], "logits" [N, 1008].

    Pictures of any size are resized to 299 pixels as TensorFlow 1 does. spatial, sFID's, is the output of the first
    branch of block mixed_6, its first 7 channels, in the ADM evaluator's order: rows, columns, channels (17 x 17 x 7).
    logits are without the classifier's bias, as the inception score's.

    weights: a file of tensors in torch-fidelity's names; "" takes torch-fidelity's own from torch's cache; nothing is
    fetched; "random" is for tests. label is "FID" with the published weights, known by their file's SHA-256, alone.
    FileNotFoundError without the file, ValueError on weights of another network.
    """

    name, channels = "inception", 2048

    def __init__(self, weights: str | Path = "") -> None:
        super().__init__()
        self.label = "FD-inception"
        if str(weights) == RANDOM:
            self.label += "-random"
            self.net: Any = _random_inception()
        else:
            path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / FID_FILE
            if not weights and not path.is_file():
                raise FileNotFoundError(
                    f"features 'inception' need {FID_FILE}, which is not at {path}: give the file with {OPTION} FILE,"
                    f" or put it there, from {FID_URL}"
                )
            self.net = _inception()
            _load_inception(self.net, path)
            if _is_published(path):
                self.label = "FID"
            elif not weights:
                raise ValueError(f"{path}: expected a file whose SHA-256 begins with {FID_SHA256}, got a damaged one")
        self.identity = f"inception-{_digest(_weights(self.net))}"
        self.spatial: list[Tensor] = []
        self.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: self.spatial.append(output))
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> dict[str, Tensor]:
        self.spatial.clear()
        pool, logits = self.net(images)
        spatial = self.spatial.pop()[:, :SPATIAL_CHANNELS]
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1).float(), "logits": logits}


def _inception() -> Any:
    """torch-fidelity's network with weights to be set: its constructor alone would fetch them, or unpickle a file."""
    ensure_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Inception(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    layers = ["2048", "logits_unbiased"]
    return Inception("inception-v3-compat", layers, feature_extractor_weights_path=nothing)


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """All that says what the network computes."""
    return {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def _load_inception(net: nn.Module, path: Path) -> None:
    tensors = {k: v for k, v in load_tensors(path)[0].items() if not k.endswith("num_batches_tracked")}
    if problems := mismatch(_weights(net), tensors):
        raise ValueError(f"{path}: not the weights of torch-fidelity's Inception, as {FID_FILE} is: {problems}")
    net.load_state_dict(tensors, strict=False)


def _is_published(path: Path) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(FID_SHA256)


def _random_inception() -> Any:
    """Seeded; its values keep their size from layer to layer, and its logits differ from picture to picture."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        net = _inception()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    nn.init.normal_(net.fc.weight, std=0.3, generator=generator)
    nn.init.zeros_(net.fc.bias)
    return net


class ViTFeatures(Features):
    """The class token of a vision transformer of `flux2.teachers.VITS` after its final norm.

    As FD-DINOv2 has it (Stein et al. 2023, arXiv:2306.04675, which takes dinov2-l): pictures are resized to 224 x 224
    pixels, bicubically with antialiasing, to 8 bits, whatever their shape, and normalised as the network was trained. A
    network without a class token gives the mean of its patch tokens. weights as `flux2.teachers.build_vit` takes them.
    """

    def __init__(self, name: str, cfg: ViTConfig, weights: str | Path = "") -> None:
        super().__init__()
        self.name, self.channels = name, cfg.channels
        self.label = f"FD-{name}-random" if str(weights) == RANDOM else f"FD-{name}"
        self.net: Any = build_vit(cfg, weights, OPTION)
        if str(weights) == RANDOM:
            for key, p in self.net.named_parameters():
                if ".gamma" in key:  # layer scales begin so small that the token would say nothing of the picture
                    nn.init.ones_(p)
        self.identity = f"{name}-{_digest(self.net.state_dict())}"
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.net.pretrained_cfg[key]).view(1, 3, 1, 1))
        if "patch14_dinov2" in cfg.model:
            positions = _released_positions(self.net.pos_embed.detach(), VIT_SIDE // cfg.patch)
            self.net.set_input_size((VIT_SIDE, VIT_SIDE))
            self.net.pos_embed = nn.Parameter(positions)
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.float(), (VIT_SIDE, VIT_SIDE), mode="bicubic", antialias=True)
        x = x.round().clamp(0, 255) / 255
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        tokens = self.net.forward_features(x)  # [N, prefix + patches, D]
        return {"pool": (tokens[:, 0] if self.net.num_prefix_tokens else tokens.mean(1)).float()}


def _released_positions(table: Tensor, side: int) -> Tensor:
    """[1, 1 + n^2, D] -> [1, 1 + side^2, D] as DINOv2's release has it: scaled by (side + 0.1) / n, no antialiasing.

    timm resamples by side / n with antialiasing, and so does the release its networks with registers.
    """
    grid = table[:, 1:].unflatten(1, (round((table.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / grid.shape[2]
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def build_features(name: str, weights: str | Path = "", device: str | torch.device = "cpu") -> Features:
    """The features `name`, one of FEATURES, on `device`.

    weights: a local file; "" for the library's cache, or the hub's for a ViT; "random" for tests. FileNotFoundError
    without the file; ValueError on an unknown name, weights of another network or that cannot be had, or any for HOG.
    """
    if name not in FEATURES:
        raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {name!r}{nearest(name, FEATURES)}")
    if name == "hog":
        if weights:
            raise ValueError(f"features 'hog' are computed and have no weights, got {weights}")
        return HOGFeatures().to(device)
    return (InceptionFeatures(weights) if name == "inception" else ViTFeatures(name, VITS[name], weights)).to(device)
