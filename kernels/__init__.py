"""Fused operations under a thin PyTorch layer. Imports torch, triton and the standard library only."""

from .upsample_conv import upsample_conv2d

__all__ = ["upsample_conv2d"]
