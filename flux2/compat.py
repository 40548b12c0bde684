"""Makes `import torchvision` work where its compiled operators do not load."""

from __future__ import annotations

import importlib.util

import torch

_KEPT: list[torch.library.Library] = []  # a Library's definitions end with it


def ensure_torchvision() -> None:
    """Call before importing timm or lpips, which import torchvision. Does nothing where torchvision's operators load.

    With a CPU build of torch beside the ordinary torchvision wheel, torchvision's extension cannot be loaded, and its
    Python part then fails while describing operators that were never declared. Declaring their schemas is enough: none
    of them is called by timm's or lpips's models.
    """
    if _KEPT or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401 - imported to see whether it can be
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
        _KEPT.append(library)
