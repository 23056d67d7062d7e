"""Tile loops and kernels, and ``TiledLinear``: torch only, nothing of Megatron."""
