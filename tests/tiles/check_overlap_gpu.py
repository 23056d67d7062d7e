"""The stepped loops over NCCL and symmetric memory: the same bits as with blocking collectives.

torchrun --standalone --nproc-per-node TP -m tests.tiles.check_overlap_gpu auto|collectives

Ranks are delayed at random, two MLPs, each after a column and a row layer, follow each other, the LM head follows them,
and sizes change between passes: whatever is read too early or overwritten too early shows in the numbers.
"""

import itertools
import os
import random
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tiling.tiles.activation import Activation, Formula
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
from megatron_tiling.tiles.stepped_linear import LinearSteps, stepped_column, stepped_row
from megatron_tiling.tiles.stepped_mlp import SteppedLoop, stepped_mlp
from megatron_tiling.tiles.symmetric import symmetric_bytes

HIDDEN, FFN, QKV, WORDS = 512, 768, 384, 640  # those of a rank, but HIDDEN
ROWS = (512, 256, 768)  # of a shard: the workspace grows, and is larger than what a pass needs
PASSES = 3


def swiglu(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate) * up


_buffers: dict[torch.dtype, Tensor] = {}


def gathered(shape: Any, dtype: torch.dtype) -> Tensor:
    """One memory for all layers, as Megatron's."""
    size = torch.Size(shape).numel()
    if dtype not in _buffers or _buffers[dtype].numel() < size:
        _buffers[dtype] = torch.empty(size, dtype=dtype, device="cuda")
    return _buffers[dtype][:size].view(*shape)


def weights(dtype: torch.dtype, layers: int = 2) -> list[Tensor]:
    """qkv, proj, fc1 and fc2 of each layer, and the head's, this rank's shard."""
    generator = torch.Generator("cuda").manual_seed(11 + dist.get_rank())
    shapes = [(QKV, HIDDEN), (HIDDEN, QKV), (2 * FFN, HIDDEN), (HIDDEN, FFN)] * layers + [(WORDS, HIDDEN)]
    drawn = [torch.randn(shape, device="cuda", generator=generator) * 0.05 for shape in shapes]
    return [weight.to(dtype).requires_grad_() for weight in drawn]


def run(parameters: list[Tensor], rows: int, late: random.Random | None, **how: Any) -> list[Tensor]:
    """Outputs, losses and gradients of ``PASSES`` passes forward and backward through all layers and the head."""
    activation = Activation(gated=True, function=swiglu, formula=Formula("silu"))
    comm = ColumnComm(dist.group.WORLD, how.pop("sequence_parallel"), True, gathered)
    if comm.sequence_parallel:
        comm = ColumnComm(dist.group.WORLD, True, False, gathered)
    loop = SteppedLoop(activation, comm=comm, fuse_fc1_wgrad=True, fuse_fc2_wgrad=True, **how)
    linear = LinearSteps(loop.steps, comm, fuse_wgrad=True, transport=loop.transport)
    one_tile = TileLoop(TileGrid(HIDDEN, QKV, 1, 1), fuse_wgrad=True, comm=comm)
    steps = linear if comm.sequence_parallel else None
    head = HeadLoop(HeadTiles(vocabulary_tiles=2), dist.group.WORLD, comm, steps, fuse_wgrad=True)
    found = []
    for parameter in parameters:
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad = None
    for index in range(PASSES):
        shared = 0 if not comm.sequence_parallel else dist.get_rank()
        generator = torch.Generator("cuda").manual_seed(5 + index + 100 * shared)
        hidden = torch.randn(rows, 1, HIDDEN, device="cuda", generator=generator).to(parameters[0].dtype)
        hidden.requires_grad_()
        output = hidden
        for qkv, proj, fc1, fc2 in itertools.batched(parameters[:-1], 4):
            delay(late)
            columns = (
                stepped_column(output, qkv, None, linear)
                if comm.sequence_parallel
                else tiled_linear(output, qkv, None, one_tile)
            )
            delay(late)
            output = output + stepped_row(F.silu(columns), proj, linear)
            delay(late)
            output = output + stepped_mlp(output, fc1, None, fc2, loop)
        delay(late)
        every = rows * linear.comm.shards
        losses = tiled_linear_cross_entropy(output, parameters[-1], labels(every), head).loss
        (output.square().sum() + losses.sum()).backward()
        found += [output.detach(), hidden.grad, losses.detach()]
    return found + [parameter.main_grad for parameter in parameters]


def labels(tokens: int) -> Tensor:
    """``[tokens, 1]``, of all ranks' words."""
    return (7 * torch.arange(tokens, device="cuda") % (WORDS * dist.get_world_size())).unsqueeze(1)


def delay(late: random.Random | None) -> None:
    if late is not None:
        torch.cuda._sleep(late.randrange(2_000_000))


def dense(parameters: list[Tensor], rows: int) -> list[Tensor]:
    """Under sequence parallelism, the first pass, in float64: output and input gradient of this rank's rows."""
    every = [gather(parameter.detach()).double() for parameter in parameters]
    shards = []
    for rank in range(dist.get_world_size()):
        generator = torch.Generator("cuda").manual_seed(5 + 100 * rank)
        shards.append(torch.randn(rows, 1, HIDDEN, device="cuda", generator=generator).to(parameters[0].dtype))
    hidden = torch.cat(shards).double().requires_grad_()
    output = hidden
    for qkv, proj, fc1, fc2 in itertools.batched(every[:-1], 4):
        output = output + sum(F.linear(F.silu(F.linear(output, q)), p) for q, p in zip(qkv, proj, strict=True))
        output = output + sum(
            F.linear(swiglu(F.linear(output, u), None, None), w) for u, w in zip(fc1, fc2, strict=True)
        )
    logits = F.linear(output[:, 0], every[-1].flatten(0, 1))
    losses = F.cross_entropy(logits, labels(len(logits))[:, 0], reduction="sum")
    (output.square().sum() + losses).backward()
    return [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in (output.detach(), hidden.grad)]


def gather(tensor: Tensor) -> Tensor:
    every = tensor.new_empty(dist.get_world_size(), *tensor.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), tensor.contiguous())
    return every


def main() -> None:
    transport = sys.argv[1]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    late = random.Random(dist.get_rank())
    options = itertools.product((torch.bfloat16, torch.float32), (True, False), (True, False), (2, 3, 6))
    count = 0
    for dtype, sequence_parallel, keeps, steps in options:
        parameters = weights(dtype)
        for rows in ROWS:
            how = {"sequence_parallel": sequence_parallel, "keeps": keeps, "steps": steps}
            expected = run(parameters, rows, None, transport="blocking", **how)
            found = run(parameters, rows, late, transport=transport, **how)
            same = [torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
            assert all(same), f"rank {dist.get_rank()}, {dtype}, {rows} rows, {how}: {same}"
            if sequence_parallel:
                tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3  # float32 products may be in TF32
                for ours, exact in zip(found, dense(parameters, rows), strict=False):
                    error = float((ours.double() - exact).norm() / exact.norm())
                    assert error < tolerance, f"{dtype}, {rows} rows, {how}: {error:.1e} from dense"
            count += 1
    torch.cuda.synchronize()
    dist.barrier()
    if dist.get_rank() == 0:
        moved = "symmetric memory" if symmetric_bytes() else "NCCL alone"
        print(f"{count} cases have the same bits at TP={dist.get_world_size()}: {moved}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
