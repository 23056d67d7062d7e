"""The MLP on torch's fused ops over gloo, where they are plain collectives and products, beside one of all features.

torchrun --nproc-per-node 2 -m tests.benchmarks.check_tp_overlap_torch
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import tp_overlap_torch
from benchmarks.te_mlp import add_to_main_grad
from tests.support.harness import leave

TOKENS, BATCH, HIDDEN, FFN = 8, 2, 16, 24


def leaf(tensor: Tensor) -> Any:
    return torch.nn.Parameter(tensor.clone())


def all_gather_matmul(
    shard: Tensor, weights: list[Tensor], gather_dim: int, group_name: str, *, return_A: bool = True
) -> tuple[Tensor, list[Tensor]]:
    assert gather_dim == 0 and return_A
    whole = shard.new_empty(shard.shape[0] * dist.get_world_size(), *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard)
    return whole, [whole @ weight for weight in weights]


def matmul_reduce_scatter(whole: Tensor, weight: Tensor, reduce_op: str, scatter_dim: int, group_name: str) -> Tensor:
    assert reduce_op == "sum" and scatter_dim == 0
    product = whole @ weight
    dist.all_reduce(product)
    return product.chunk(dist.get_world_size())[dist.get_rank()].clone()


def check() -> None:
    torch.library.impl("symm_mem::fused_all_gather_matmul", "CPU")(all_gather_matmul)
    torch.library.impl("symm_mem::fused_matmul_reduce_scatter", "CPU")(matmul_reduce_scatter)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    hidden, grad_output = torch.randn(2, TOKENS, BATCH, HIDDEN)
    gate, up, down = torch.randn(3, FFN, HIDDEN)
    norm = torch.rand(HIDDEN)

    exact = [leaf(tensor) for tensor in (hidden, norm, gate, up, down)]
    normalized = F.rms_norm(exact[0], (HIDDEN,), exact[1], 1e-5)
    output = (F.silu(normalized @ exact[2].t()) * (normalized @ exact[3].t())) @ exact[4]
    output.backward(grad_output)

    own = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    features = slice(rank * FFN // ranks, (rank + 1) * FFN // ranks)
    fc1 = SimpleNamespace(
        weight=leaf(torch.cat([gate[features], up[features]])), layer_norm_weight=leaf(norm), eps=1e-5
    )
    fc2 = SimpleNamespace(weight=leaf(down[features].t().contiguous()))
    for parameter in (fc1.weight, fc1.layer_norm_weight, fc2.weight):
        parameter.main_grad = torch.ones_like(parameter)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(add_to_main_grad)
    run = tp_overlap_torch.forward(SimpleNamespace(linear_fc1=fc1, linear_fc2=fc2), dist.group.WORLD)
    shard = leaf(hidden[own])
    found = run(shard)
    found.backward(grad_output[own])

    torch.testing.assert_close(found, output[own])
    torch.testing.assert_close(shard.grad, exact[0].grad[own])
    torch.testing.assert_close(fc2.weight.main_grad - 1, exact[4].grad[features].t())
    expected = torch.cat([exact[2].grad[features], exact[3].grad[features]])
    torch.testing.assert_close(fc1.weight.main_grad - 1, expected)
    of_norm = fc1.layer_norm_weight.main_grad - 1
    dist.all_reduce(of_norm)  # each rank has that of its tokens
    torch.testing.assert_close(of_norm, exact[1].grad)


def main() -> None:
    dist.init_process_group("gloo")
    check()
    print("fused ops hold", flush=True)
    leave()


if __name__ == "__main__":
    main()
