"""Megatron's layers, MLP and LM head in tiles that are views of the stock weights."""
