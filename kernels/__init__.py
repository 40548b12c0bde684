"""Fused operations under a thin PyTorch layer. Imports torch, triton and the standard library only."""

from .attention import attention
from .conv_block import add_bias_group_stats, norm_silu_conv2d
from .group_norm import group_norm, group_norm_silu
from .repa_loss import repa_loss
from .timesteps import flow_match_inputs, sample_timesteps
from .upsample_conv import upsample_conv2d

__all__ = [
    "add_bias_group_stats",
    "attention",
    "flow_match_inputs",
    "group_norm",
    "group_norm_silu",
    "norm_silu_conv2d",
    "repa_loss",
    "sample_timesteps",
    "upsample_conv2d",
]
