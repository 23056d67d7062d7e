"""Trainers built on Megatron: a thin file each, which names the function that it hooks, and what it was tested with.

``MEGATRON_TILING="factor=8 keep=0"`` says what to tile wherever no ``TilingConfig`` can be given; see ``settings``.
"""
