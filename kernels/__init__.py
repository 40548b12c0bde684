"""Fused operations under a thin PyTorch layer. Imports torch, triton and the standard library only."""
