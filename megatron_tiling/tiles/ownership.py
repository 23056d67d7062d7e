"""What an engine may own of a parameter. ZeRO-3 leaves an empty tensor behind, whose shape says nothing.

All knowledge of how DeepSpeed marks such parameters (``ds_id``, ``ds_shape``) is here; what gathers them for itself
(zero3/gather.py) knows their shards besides.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: DeepSpeed counts here how many of its own contexts hold a parameter gathered.
_GATHERED_BY_CALLER = "_ds_z3_gathered_param_context_depth"


def is_owned(parameter: Any) -> bool:
    """Whether ZeRO-3 owns a parameter, and may have partitioned it away."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, also while it is partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_size(parameter: Any) -> int:
    """Elements of a parameter, also while it is partitioned."""
    return whole_shape(parameter).numel()


def tags(parameter: Any) -> dict[str, Any]:
    """The attributes that Megatron and others have given a parameter, without ZeRO-3's own."""
    if not is_owned(parameter):
        return dict(vars(parameter))
    own = ("ds_", "_ds_", "is_external_param", "nvme_swapper")
    return {name: value for name, value in vars(parameter).items() if not (name.startswith(own) or callable(value))}


def copy_param(param: Any, value: Tensor) -> None:
    """Copy into a parameter, also one that ZeRO-3 has partitioned; that is a collective."""
    with gathered(param, write=True):
        param.copy_(value)


def gathered(*params: Any, write: bool = False) -> AbstractContextManager[Any]:
    """Parameters are whole inside, also those that ZeRO-3 has partitioned; that is a collective.

    ``write`` keeps what was written: the values of data-parallel rank 0.
    """
    # DeepSpeed refuses to nest: who loads a state dict into a gathered model has gathered them.
    owned = [param for param in params if is_owned(param) and not getattr(param, _GATHERED_BY_CALLER, 0)]
    if not owned:
        return nullcontext()
    import deepspeed  # a parameter that ZeRO-3 owns: deepspeed is loaded already

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(owned, modifier_rank=0 if write else None)
    return whole
