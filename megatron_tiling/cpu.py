"""Run stock Megatron on a machine without a GPU: gloo and CPU tensors.

For tests, laptops and the example; `python -m megatron_tiling` calls `install()` when it sees no GPU. Every
patch does one of three things and computes nothing:

1. reads the *name* "cuda" as "cpu" (`torch.zeros(..., device="cuda")`, `x.cuda()`, an index as a device);
2. answers what Megatron asks the CUDA runtime (how many devices, which stream, which RNG state);
3. drops a step that makes sense on a GPU only (kernel builds, JIT warm-up).

`torch.cuda.is_available()` stays False. What is not listed here raises torch's own "no NVIDIA driver" error,
on purpose: a gap shall be seen.

Hazards. The patches are global and stay for the life of the process: tests use subprocesses. Two of them, the
RNG state and the JIT warm-up, fail silently when they are wrong: the random numbers drawn then depend on
the TP size: compare a TP=1 with a TP=2 loss after touching them. Attributes are wrapped, rather than torch
functions caught by a TorchFunctionMode, because autograd runs backward with the mode off.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = [
    *["tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye"],
    *["rand", "randn", "randint", "randperm"],
    *["empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"],
]
_NEW_FACTORIES = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
_done: set[str] = set()


def install(train: bool = True) -> None:
    """Patch torch, megatron.core and (with `train`) megatron.training. Idempotent.

    `train=False` is for code that uses layers without the trainer, and for wheels that ship none (0.16).

    Raises:
        RuntimeError: there is a GPU, and half a run on each device would be wrong without a word.
    """
    if torch.cuda.is_available():
        raise RuntimeError("CPU mode: this machine has a GPU; set CUDA_VISIBLE_DEVICES= to hide it")
    steps = {"torch": _patch_torch, "megatron.core": _patch_core}
    if train:
        steps["megatron.training"] = _patch_training
    for name, patch in steps.items():
        if name not in _done:
            patch()
            _done.add(name)


def installed() -> bool:
    """Whether `install()` has patched the trainer too."""
    return "megatron.training" in _done


def with_default_args(argv: Sequence[str]) -> list[str]:
    """`argv` and the Megatron flags that a run without a GPU needs, whatever the script, unless it sets them itself.

    >>> with_default_args(["--lr", "1"])
    ['--lr', '1', '--distributed-backend', 'gloo']
    >>> with_default_args(["--distributed-backend=mpi"])
    ['--distributed-backend=mpi']
    """
    given = {argument.partition("=")[0] for argument in argv}
    if "--use-megatron-fsdp" in given:
        argv = [*argv, "--no-gradient-reduce-div-fusion"]  # gloo cannot multiply while it adds
    return [*argv, *(() if "--distributed-backend" in given else ("--distributed-backend", "gloo"))]


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)  # an index, from current_device()


def _on_cpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with a `device=` that names CUDA read as the CPU."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return fn(*args, **kwargs)

    return call


class _Stream:
    """Stands for a stream and for an event: a CPU op has run when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> "_Stream":
        return self


def _patch_torch() -> None:
    import torch._dynamo.config
    import torch.distributed.nn  # noqa: F401 (later, defaults of its functions would keep gloo's group and threads)

    torch._dynamo.config.disable = True  # Megatron's jit_fuser is torch.compile: minutes of C++ on a CPU
    _patch_device_names()
    cuda: Any = torch.cuda
    # deepspeed asks torch to answer this from NVML, which is to say from device_count
    cuda.is_available = lambda: False
    # topology: one pretended device a local rank
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    # order
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _Stream
    cuda.Event = _Stream  # MoE, --log-straggler
    cuda.current_stream = lambda device=None: _Stream()
    # random numbers: the CPU generator is the only one, so it is also "the CUDA generator"
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    _patch_device_meshes()


def _patch_device_names() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    stock_to, stock_type = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        return stock_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is not None:
            if isinstance(dtype, str):
                dtype = dtype.replace("torch.cuda.", "torch.")
            return stock_type(self, dtype, non_blocking)
        name = stock_type(self)
        # Megatron's optimizers, and no one else here, sort parameters by the name 'torch.cuda.FloatTensor'.
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.") if asker.startswith("megatron.core.optimizer") else name

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *args, **kwargs: self


def _patch_device_meshes() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    def on_cpu(from_group: Callable[..., DeviceMesh]) -> Any:
        def call(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
            return from_group(group, "cpu" if _names_cuda(device_type) else device_type, *args, **kwargs)

        return staticmethod(call)

    mesh: Any = DeviceMesh
    mesh.from_group = on_cpu(mesh.from_group)  # both FSDPs make their meshes of Megatron's groups


def _saving_worker(*args: Any) -> None:
    """The process that writes asynchronous checkpoints, which starts bare and asks the CUDA runtime."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    _patch_torch()
    PersistentAsyncCaller.async_loop(*args)


def _patch_core() -> None:
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils
    import megatron.core.tensor_parallel.random as tp_random
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import AllGatherPipeline

    from megatron_tiling.trainer.norm import allow_sequence_parallel

    def set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    tp_random._set_cuda_rng_state = set_rng_state
    if hasattr(async_utils, "PersistentAsyncCaller"):
        async_utils.PersistentAsyncCaller.async_loop = _saving_worker

    # Gathers that gloo does in threads of its own, while tiles are computed, seem to end one run of thirty in a crash.
    pipeline: Any = AllGatherPipeline
    pipeline.all_gather_params = functools.partialmethod(pipeline.all_gather_params, async_param_gather=False)

    allow_sequence_parallel()  # a CPU has no fused norm


def _patch_training() -> None:
    import megatron.training.arguments as arguments
    import megatron.training.training as training

    from megatron_tiling.trainer.versions import drop_cuda_kernel_builds

    drop_cuda_kernel_builds()
    if not {"--use-megatron-fsdp", "--use-torch-fsdp2"} & set(sys.argv):  # which want anything but 1
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # validate_args insists, for TP > 1 ...
    arguments.get_device_arch_version = lambda: 8  # ... on what it takes for an Ampere GPU
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda tp_size=None: None  # warm-up; its random draws depend on TP
