"""TiledMLP in FP8 on two GPUs, with and without sequence parallelism: errors against float64 are those of dense FP8.

torchrun --standalone --nproc-per-node 2 -m tests.resident.check_fp8
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.resident.test_fp8_gpu import FFN, HIDDEN, RECIPES, errors, inputs, stock_mlp, tiled

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def shard(tensor: Tensor, mlp: Any) -> Tensor:
    return tensor.chunk(RANKS)[RANK].contiguous() if mlp.config.sequence_parallel else tensor


def step(mlp: Any, first: bool) -> dict[str, Tensor]:
    """This rank's output and gradients; weights are the rank's own draw."""
    from megatron.core.fp8_utils import get_fp8_context

    hidden, grad_output, _ = inputs()
    hidden = shard(hidden, mlp).requires_grad_()
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.is_first_microbatch = first
        layer.weight.main_grad.zero_()
    with get_fp8_context(mlp.config, 0):
        output = mlp(hidden)[0]
    output.backward(shard(grad_output, mlp))
    grads = {name: getattr(mlp, name).weight.main_grad.clone() for name in ("linear_fc1", "linear_fc2")}
    return {"output": output.detach(), "hidden": hidden.grad, **grads}


def exact(mlp: Any) -> dict[str, Tensor]:
    hidden, grad_output, _ = (tensor.double() for tensor in inputs())
    leaves = [hidden, mlp.linear_fc1.weight.detach().double(), mlp.linear_fc2.weight.detach().double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    gate, up = F.linear(leaves[0], leaves[1]).chunk(2, -1)
    output = F.linear(F.silu(gate) * up, leaves[2])
    dx, dfc1, dfc2 = torch.autograd.grad(output, leaves, grad_output)
    output = output.detach()
    for partial in (output, dx):
        dist.all_reduce(partial)
    return {"output": shard(output, mlp), "hidden": shard(dx, mlp), "linear_fc1": dfc1, "linear_fc2": dfc2}


def check(recipe: str, sequence_parallel: bool, keep: int | None) -> None:
    mlp = stock_mlp(recipe, norm=False, tensor_model_parallel_size=RANKS, sequence_parallel=sequence_parallel)
    draw = torch.Generator("cuda").manual_seed(7 + RANK)
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        assert layer.weight.shape in ((2 * FFN // RANKS, HIDDEN), (HIDDEN, FFN // RANKS))
        with torch.no_grad():
            layer.weight.copy_(0.05 * torch.randn(layer.weight.shape, device="cuda", generator=draw))
    for index in range(4):
        dense = step(mlp, first=index % 2 == 0)
    of_dense = errors(dense, exact(mlp))
    tiled(mlp, 4, keep)
    for index in range(4):
        found = step(mlp, first=index % 2 == 0)
    for name, error in errors(found, exact(mlp)).items():
        assert error <= 1.05 * of_dense[name], f"{recipe} {keep} {name}: {error:.4f}, dense {of_dense[name]:.4f}"
        assert of_dense[name] < 0.2, f"{recipe} {name}: {of_dense[name]:.4f}"


def main() -> None:
    from megatron.core import parallel_state, tensor_parallel

    torch.cuda.set_device(RANK)
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for recipe in RECIPES:
        for sequence_parallel in (False, True):
            for keep in (None, 1):
                check(recipe, sequence_parallel, keep)
    dist.barrier()
    if RANK == 0:
        print("check_fp8: ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
