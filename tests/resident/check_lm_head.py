"""The tiled LM head in a stock GPTModel, at one tensor-parallel size: tiled equals stock.

    torchrun --standalone --nproc-per-node TP -m tests.resident.check_lm_head

Losses, every gradient, prediction statistics and collectives, over all pairs of options; logits whole are never made.
The loss on its own equals float64 to 1e-10. Whoever looks at logits: see check_lazy_logits.py.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.harness import Counter, all_pairs, megatron, naming, relative_error

TP = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
HIDDEN, VOCABULARY, SEQUENCE, BATCH = 32, 88, 12, 2
LOGITS = SEQUENCE * BATCH * VOCABULARY // TP
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}

OPTIONS: dict[str, list[Any]] = {
    "sequence_parallel": [False, True],
    "tied": [False, True],
    "prediction_heads": [0, 1, 2],
    "detach_heads": [False, True],
    "fp16_lm_cross_entropy": [False, True],
    "loss_fusion": [False, True],
    "main_grad": [None, torch.float32],
    "scale": [None, 0.25],
    "dtype": [torch.float32, torch.bfloat16],
    "tokens": [None, 1, 7, 100],
    "vocabulary": [None, 3, 4],
    "per_token_loss": [False, True],
    "mode": ["train", "train", "eval", "no_grad"],
}


class Whole(TorchDispatchMode):
    """Counts tensors as large as all logits of a rank."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += any(isinstance(leaf, Tensor) and leaf.numel() == LOGITS for leaf in tree_leaves(result))
        return result


def build(case: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    model_parallel_cuda_manual_seed(5)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=48,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=TP,
        sequence_parallel=case["sequence_parallel"] and TP > 1,
        mtp_num_layers=case["prediction_heads"] or None,
        **({"mtp_detach_heads": True} if case["detach_heads"] and case["prediction_heads"] else {}),  # from 0.19 on
        calculate_per_token_loss=case["per_token_loss"],
        cross_entropy_loss_fusion=case["loss_fusion"],
        params_dtype=case["dtype"],
        pipeline_dtype=case["dtype"],
        bf16=case["dtype"] == torch.bfloat16,
    )
    layer = get_gpt_layer_local_spec()
    heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if case["prediction_heads"] else None
    model = GPTModel(
        config,
        layer,
        VOCABULARY,
        SEQUENCE,
        fp16_lm_cross_entropy=case["fp16_lm_cross_entropy"],
        share_embeddings_and_output_weights=case["tied"],
        position_embedding_type="rope",
        mtp_block_spec=heads,
    )
    if case["scale"] is not None:
        config.use_mup, config.mup_output_mult = True, case["scale"]
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(-2, VOCABULARY + 2, (BATCH, SEQUENCE), generator=generator)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE),
        "attention_mask": torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool(),
        "labels": labels,
        "loss_mask": (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.2).float(),
    }


def step(model: Any, mode: str, main_grad: torch.dtype | None = None) -> tuple[dict[str, Tensor], Counter, int]:
    """Losses, gradients and prediction statistics of a step by name; operations counted; whole logits seen."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    model.train(mode == "train")
    for parameter in model.parameters():
        parameter.grad = None
        if main_grad is not None:
            parameter.main_grad = torch.ones_like(parameter, dtype=main_grad)
            parameter.grad_added_to_main_grad = False
    inputs = batch()
    upstream = torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(4)) * inputs["loss_mask"]
    with Whole() as whole, Counter() as counter, torch.set_grad_enabled(mode != "no_grad"):
        losses = model(**inputs)
        if mode != "no_grad":
            losses.backward(upstream)
    found = {"losses": losses.detach()}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter, dtype=torch.float32)
        added = main_grad is not None and parameter.grad_added_to_main_grad
        if added:
            found[name] += parameter.main_grad - 1
        if parameter.grad is not None and (not added or getattr(parameter, "zero_out_wgrad", False)):
            found[name] += parameter.grad
    found |= {f"mtp {name}": value for name, value in MTPLossLoggingHelper.tracker.items() if isinstance(value, Tensor)}
    return found, counter, whole.seen


def tile_head(model: Any, config: Any) -> str:
    """Tile the output layer; what the table says of it."""
    from megatron_tiling import tile
    from megatron_tiling.report import note

    return next(note(row) for row in tile(model, config) if row.name == "output_layer")


def check(case: dict[str, Any]) -> None:
    from megatron_tiling.config import TilingConfig
    from megatron_tiling.resident.lm_head import TiledOutputLayer

    model = build(case)
    dense, dense_counter, dense_whole = step(model, case["mode"])
    splits = {} if case["vocabulary"] is None else {"output": (1, case["vocabulary"])}
    fuse_wgrad = case["main_grad"] is not None
    config = TilingConfig(modules=("output",), splits=splits, fuse_wgrad=fuse_wgrad, head_tokens=case["tokens"])
    assert tile_head(model, config).startswith("loss in tiles of ")
    assert type(model.output_layer) is TiledOutputLayer
    for _ in range(2):  # the second micro-batch meets what the first has left behind
        tiled, counter, whole = step(model, case["mode"], case["main_grad"])
    # Megatron's fused loss rounds its gradients to bf16, whatever the logits are.
    tolerance = TOLERANCE[torch.bfloat16 if case["loss_fusion"] else case["dtype"]]
    assert tiled.keys() == dense.keys()
    for name in dense:
        error = relative_error(tiled[name], dense[name])
        assert error <= tolerance, f"{name}: error {error:.2e}"
    heads = 1 + case["prediction_heads"]
    expected = dict(dense_counter.collectives)
    # One rank needs none; else sums and label logits are reduced together, as in Megatron's fused loss.
    expected["allreduce_"] -= heads * ((2 if case["loss_fusion"] else 3) if TP == 1 else not case["loss_fusion"])
    if case["sequence_parallel"] and case["detach_heads"] and TP > 1 and case["mode"] != "no_grad":
        expected["_allgather_base_"] += case["prediction_heads"]  # the backward pass makes frozen heads' logits too
    expected = {name: count for name, count in expected.items() if count}
    assert counter.collectives == expected, f"{counter.collectives}, expected {expected}"
    assert dense_whole
    if case["vocabulary"] or case["tokens"] not in (None, 100):
        assert not whole, f"{whole} tensors as large as all logits"


def check_refusals() -> None:
    """What cannot be honoured is refused by name, what is no stock head stays as it is; pre-hooks run."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_tiling.config import TilingConfig
    from megatron_tiling.resident.lm_head import check_head

    case = {name: values[0] for name, values in OPTIONS.items()}
    refusals: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"output": (2, 4)}, {}, "--tiled-linear-splits output=2x4: the LM head is tiled over tokens and vocabulary"),
        ({"output": (1, 89)}, {}, "--tiled-linear-splits output=1x89: a rank's vocabulary has"),
        ({}, {"head_tokens": 0}, "--tiled-head-tokens 0: must be a whole number"),
        ({}, {"head_memory_mib": 0}, "--tiled-head-memory-mib 0: must be a whole number"),
    ]
    for splits, sizes, message in refusals:
        model = build(case)
        try:
            check_head(model, TilingConfig(splits=splits, **sizes))
        except ValueError as error:
            assert str(error).startswith(message), error
        else:
            raise AssertionError(f"not refused: {message}")
        assert type(model.output_layer) is ColumnParallelLinear

    model = build(case)
    model.config.cross_entropy_loss_fusion, model.config.cross_entropy_fusion_impl = True, "te"
    assert check_head(model, TilingConfig()) == "--cross-entropy-fusion-impl te"
    model = build(case)
    model.output_layer = torch.nn.Sequential(model.output_layer)
    assert check_head(model, TilingConfig()) == "Sequential is not a stock column layer"
    model = build(case)
    del model.output_layer
    assert check_head(model, TilingConfig()) == "this pipeline stage has no output layer"

    model = build(case)
    assert check_head(model, TilingConfig()) == ""
    assert type(model.output_layer) is ColumnParallelLinear and "compute_language_model_loss" not in vars(model)
    tile_head(model, TilingConfig(modules=("output",)))
    calls: list[Any] = []
    model.output_layer.register_forward_pre_hook(lambda layer, args: calls.append(layer))
    step(model, "train")
    assert calls == [model.output_layer]


def check_float64() -> None:
    """Vocabulary-parallel losses and gradients against one float64 formula, input gathered or not."""
    import torch.distributed as dist

    from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
    from megatron_tiling.tiles.head_cut import HeadTiles
    from megatron_tiling.tiles.linear import ColumnComm

    group = dist.group.WORLD
    assert group is not None
    shard = VOCABULARY // TP
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
        weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
        labels = torch.randint(-3, VOCABULARY + 3, (SEQUENCE, BATCH), generator=generator)
        upstream = torch.randn(SEQUENCE, BATCH, dtype=torch.float64, generator=generator)

        x, w = whole.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = x @ w.t()
        inside = (labels >= 0) & (labels < VOCABULARY)
        largest = logits.detach().max(dim=-1).values
        at_label = logits.gather(-1, labels.where(inside, 0)[..., None]).squeeze(-1)
        expected = logits.logsumexp(-1) - largest - torch.where(inside, at_label - largest, 0.0)
        expected.backward(upstream)

        sequence_parallel = bool(seed % 2)
        rows = slice(RANK * SEQUENCE // TP, (RANK + 1) * SEQUENCE // TP) if sequence_parallel else slice(None)
        columns = slice(RANK * shard, (RANK + 1) * shard)
        x_rank, w_rank = whole[rows].clone().requires_grad_(), weight[columns].clone().requires_grad_()
        comm = ColumnComm(
            group, sequence_parallel, not sequence_parallel, lambda shape, dtype: torch.empty(*shape, dtype=dtype)
        )
        tiles = HeadTiles(tokens=1 + seed, vocabulary_tiles=1 + 3 * seed % shard)
        result = tiled_linear_cross_entropy(x_rank, w_rank, labels, HeadLoop(tiles, group, comm))
        result.loss.backward(upstream)
        for ours, exact in ((result.loss, expected), (x_rank.grad, x.grad[rows]), (w_rank.grad, w.grad[columns])):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        check_float64()
        check_refusals()
        cases = all_pairs(OPTIONS)
        for case in cases:
            with naming(f"rank {RANK}, {case}"):
                check(case)
    if RANK == 0:
        print(f"{len(cases)} cases at TP={TP}: tiled equals stock")


if __name__ == "__main__":
    main()
