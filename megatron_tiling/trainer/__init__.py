"""Megatron's trainer: the hook, and what ``install`` wraps."""
