"""Triton kernels, imported only where tensors are on a GPU."""
