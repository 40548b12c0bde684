"""Fused operations under a thin PyTorch layer. Imports torch, triton and the standard library only."""

from .conv_block import add_bias_group_stats, norm_silu_conv2d
from .group_norm import group_norm, group_norm_silu
from .upsample_conv import upsample_conv2d

__all__ = ["add_bias_group_stats", "group_norm", "group_norm_silu", "norm_silu_conv2d", "upsample_conv2d"]
