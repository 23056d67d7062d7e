"""Dense Megatron checkpoints out of a ZeRO-3 model, and into one before the engine takes it.

Megatron's own functions save and load; they are given a stand-in for the model, which gathers what ZeRO-3 has
partitioned. Tiles are gathered one by one (``partitioned/checkpoint.py``), norms, biases and embeddings at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tiling.partitioned.modules import MLPTile, tile_modules
from megatron_tiling.tiles.ownership import gathered


class _Whole(torch.nn.Module):
    """A model that ZeRO-3 has partitioned, as Megatron's checkpointing expects a model; it owns no parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's, with copies on the CPU: the gathered parameters are gone when it is saved."""
        (model,) = self._model
        with _untiled(model, write=False):
            state: dict[str, Any] = model.sharded_state_dict(*args, **kwargs)  # type: ignore[operator]
            for name, module in model.named_modules():
                if isinstance(module, MLPTile):  # its weights are there as tiles of the two layers
                    for part, _ in module.named_parameters():
                        state.pop(f"{name}.{part}", None)
            for entry in nested_values(state):
                if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                    assert entry.data is not None
                    entry.data = entry.data.detach().to("cpu", copy=True)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        (model,) = self._model
        with _untiled(model, write=True):
            return model.load_state_dict(state_dict, strict)


@contextmanager
def _untiled(model: torch.nn.Module, write: bool) -> Iterator[None]:
    tiles = {id(parameter) for module in tile_modules(model) for parameter in module.parameters()}
    others: list[Tensor] = [parameter for parameter in model.parameters() if id(parameter) not in tiles]
    with gathered(*others, write=write):
        yield


def save_dense(model: torch.nn.Module, folder: str, iteration: int) -> None:
    """Write the weights as stock Megatron would (collective). It continues from them with ``--load --finetune``."""
    from megatron.training import get_args
    from megatron.training.checkpointing import save_checkpoint

    with _as_arguments(get_args(), save=folder, no_save_optim=True, no_save_rng=True, async_save=False):
        save_checkpoint(iteration, [_Whole(model)], None, None, 0)


def load_dense(model: torch.nn.Module, folder: str) -> None:
    """Read the weights of a dense checkpoint, of any TP size (collective). Before ``zero3.initialize``.

    Raises:
        ValueError: there is no checkpoint in the folder.
    """
    from megatron.training import get_args
    from megatron.training.checkpointing import checkpoint_exists, load_checkpoint

    if not checkpoint_exists(folder):
        raise ValueError(f"zero3.load_dense: there is no Megatron checkpoint in {folder}")
    with _as_arguments(get_args(), load=folder, finetune=True, no_load_optim=True, no_load_rng=True):
        load_checkpoint([_Whole(model)], None, None)


@contextmanager
def _as_arguments(args: Any, **settings: Any) -> Iterator[None]:
    """Megatron's checkpoint functions take their settings from its global arguments."""
    before = {name: getattr(args, name) for name in settings}
    vars(args).update(settings)
    try:
        yield
    finally:
        vars(args).update(before)
