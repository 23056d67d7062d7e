"""Layers and the LM head by steps of tokens: bit for bit as with blocking collectives, and close to stock's.

torchrun --standalone --nproc-per-node TP -m tests.resident.check_stepped
"""

import copy
import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.support.harness import Counter, all_pairs, megatron, naming, relative_error

TP = int(os.environ.get("WORLD_SIZE", "1"))
IN, OUT, BATCH = 24, 40, 2
OPTIONS = {
    "kind": ["column", "row"],
    "sequence_parallel": [True, False],
    "bias": [True, False],
    "skip_bias_add": [True, False],
    "steps": [2, 3, 5],
    "rows": [24, 20],  # of all ranks; not a multiple of every number of steps
    "frozen": [False, True],
    "fusion": [True, False],
    "input_requires_grad": [True, False],
    "checkpointed": [False, True],
    "dtype": [torch.float64, torch.float32, torch.bfloat16],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def stock_layer(case: dict[str, Any]) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=4, tensor_model_parallel_size=TP,
        sequence_parallel=case["sequence_parallel"], params_dtype=case["dtype"], use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    options: dict[str, Any] = {"config": config, "bias": case["bias"], "skip_bias_add": case["skip_bias_add"]}
    options["init_method"] = torch.nn.init.normal_
    if case["kind"] == "column":
        layer = ColumnParallelLinear(IN, OUT, gather_output=False, **options)
    else:
        layer = RowParallelLinear(IN, OUT, input_is_parallel=True, is_expert=False, **options)
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64) / 2)
        if case["bias"]:
            layer.bias.fill_(0.3)
    layer.weight.requires_grad_(not case["frozen"])
    return layer


def tiled_copy(layer: Any, case: dict[str, Any], steps: int | None, transport: str = "auto") -> Any:
    from megatron_tiling.resident.layers import RESIDENT_CLASSES

    layer = copy.deepcopy(layer, {id(one): one for one in vars(layer).values() if isinstance(one, dist.ProcessGroup)})
    layer.__class__ = RESIDENT_CLASSES[type(layer)]
    layer.set_tiles(*((1, 2) if case["kind"] == "column" else (2, 1)))
    layer.overlap_steps, layer.transport = steps, transport
    if case["fusion"]:
        layer.gradient_accumulation_fusion = True
        wide = torch.promote_types(case["dtype"], torch.float32)
        layer.weight.main_grad = torch.ones_like(layer.weight, dtype=wide)
        layer.weight.grad_added_to_main_grad = False
    return layer


def drawn(shape: Any, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(case: dict[str, Any]) -> torch.Tensor:
    column = case["kind"] == "column"
    shards = column and case["sequence_parallel"]
    shape = case["rows"] // TP if shards else case["rows"], BATCH, IN if column else IN // TP
    input_ = drawn(shape, 3 + dist.get_rank() * (shards or not column), case["dtype"])
    return input_.requires_grad_(case["input_requires_grad"])


def run(layer: Any, case: dict[str, Any], passes: int = 1) -> dict[str, Any]:
    """Output and gradients of ``passes`` backward passes over one graph."""
    input_ = tokens(case)
    if case["checkpointed"]:
        output, bias = torch.utils.checkpoint.checkpoint(layer, input_, use_reentrant=False)
    else:
        output, bias = layer(input_)
    if output.requires_grad:
        shards = case["kind"] == "row" and case["sequence_parallel"]
        differs = shards or case["kind"] == "column"
        upstream = drawn(output.shape, 5 + dist.get_rank() * differs, output.dtype)
        for left in reversed(range(passes)):
            output.backward(upstream, retain_graph=left > 0)
    weight = layer.weight
    grads = {"weight": None if case["frozen"] else getattr(weight, "main_grad", weight.grad), "input": input_.grad}
    if case["bias"] and not case["frozen"]:  # stock drops the gradient of a bias beside a frozen weight
        grads["bias grad"] = layer.bias.grad
    return {"output": output.detach(), "bias": bias} | grads


def check(case: dict[str, Any]) -> None:
    from megatron_tiling.resident import stepped

    stock = stock_layer(case)
    layer, blocking = (tiled_copy(stock, case, case["steps"], how) for how in ("auto", "blocking"))
    exposed = case["kind"] == "row" or case["sequence_parallel"]
    is_row = case["kind"] == "row"
    assert stepped._steps_now(layer, tokens(case), is_row) == (case["steps"] if exposed else 1)
    expected, found, plain = run(blocking, case), run(layer, case), run(tiled_copy(stock, case, None), case)
    dense = run(stock, case) if not case["fusion"] else plain
    for name, value in expected.items():
        assert (found[name] is None) == (value is None) == (dense[name] is None) == (plain[name] is None), name
        if value is not None:
            assert torch.equal(found[name], value), f"{name}: other bits than with blocking collectives"
            for without in (plain, dense):
                error = relative_error(found[name], without[name])
                assert error < TOLERANCE[case["dtype"]], f"{name}: {error:.1e} from the layer without steps"
    if case["dtype"] == torch.float64 and not case["checkpointed"]:
        twice, doubled = (run(tiled_copy(stock, case, steps), case, passes=2) for steps in (case["steps"], None))
        for name, value in doubled.items():
            assert value is None or relative_error(twice[name], value) < 1e-12, f"{name}, of two backward passes"


def check_products() -> None:
    """Forward, steps in place of tiles, without stock's collectives; backward one product for the weight."""
    case = {name: values[0] for name, values in OPTIONS.items()} | {"steps": 3, "fusion": False, "bias": False}
    for kind in OPTIONS["kind"]:
        layer = tiled_copy(stock_layer(case | {"kind": kind}), case | {"kind": kind}, 3)
        with Counter() as forward, torch.no_grad():
            output, _ = layer(tokens(case | {"kind": kind}))
        assert 3 <= forward.gemms <= 4, forward.counts  # one more where ranks go on from the first within a step
        others = {name for name in forward.collectives if name not in ("send", "recv_")}
        assert not others and not output.requires_grad, forward.collectives


def check_what_runs_as_before() -> None:
    """Few tokens, one token, autocast, lists, layers of experts, gathered outputs."""
    from megatron_tiling.resident.stepped import _steps_now, reason_for_no_steps
    from megatron_tiling.tiles import step_comm

    case = {name: values[0] for name, values in OPTIONS.items()} | {"fusion": False}
    for kind in OPTIONS["kind"]:
        case["kind"], is_row = kind, kind == "row"
        layer, input_ = tiled_copy(stock_layer(case), case, 4), tokens(case).detach()
        assert _steps_now(layer, input_, is_row) == 4
        ranks = 1 if is_row else TP
        few = step_comm.LEAST_STEP_TOKENS * 3 // ranks // BATCH
        assert _steps_now(layer, input_[:few], is_row) == 3
        for other in (input_[: TP // ranks].repeat(1, 1, 1)[:, :1], input_[0, 0], [*input_.chunk(2, -1)]):
            assert _steps_now(layer, other, is_row) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert _steps_now(layer, input_, is_row) == 1
        assert not reason_for_no_steps(layer, is_row)
        layer.explicit_expert_comm = True
        assert reason_for_no_steps(layer, is_row) == "an expert" and _steps_now(layer, input_, is_row) == 1
        layer.explicit_expert_comm = False
        if is_row:
            parts = list(input_.chunk(2, -1))
            assert relative_error(layer(parts)[0], layer(input_)[0]) < 1e-12
            layer.input_is_parallel = False
            assert reason_for_no_steps(layer, is_row) == "splits its input itself"
        else:
            layer.return_layernorm_output = True
            assert not reason_for_no_steps(layer, is_row)
            layer.return_layernorm_output_gathered = True
            assert reason_for_no_steps(layer, is_row) == "an adapter takes the gathered input too"
            layer.return_layernorm_output = False
            layer.gather_output = True
            assert reason_for_no_steps(layer, is_row) == "gathers its output"


def check_head() -> None:
    """Losses whose input is gathered behind the first tile's product, where that has all tokens."""
    from megatron_tiling.tiles import step_comm
    from megatron_tiling.tiles.comm import ColumnComm
    from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
    from megatron_tiling.tiles.head_cut import HeadTiles
    from megatron_tiling.tiles.stepped_linear import LinearSteps

    group, vocabulary, rows = dist.group.WORLD, 48, 24
    comm = ColumnComm(group, True, False, lambda shape, dtype: torch.full(tuple(shape), torch.nan, dtype=dtype))
    labels = torch.randint(vocabulary, (rows, BATCH), generator=torch.Generator().manual_seed(9))

    def losses(tiles: HeadTiles, dtype: torch.dtype, wide: bool, steps: LinearSteps | None) -> list[torch.Tensor]:
        hidden = drawn((rows // TP, BATCH, IN), 3 + dist.get_rank(), dtype).requires_grad_()
        weight = drawn((vocabulary // TP, IN), 50 + dist.get_rank(), dtype).requires_grad_()
        loop = HeadLoop(tiles, group, comm, steps, logits_in_fp32=wide)
        loss = tiled_linear_cross_entropy(hidden, weight, labels, loop).loss
        loss.backward(drawn(loss.shape, 4, loss.dtype))
        return [loss.detach(), hidden.grad, weight.grad]

    for dtype in (torch.float64, torch.bfloat16):
        for tiles in (HeadTiles(), HeadTiles(vocabulary_tiles=3), HeadTiles(vocabulary_tiles=2, keep=0)):
            for steps in (2, 3, 5):
                how = tiles, dtype, steps == 3
                found, blocking = (losses(*how, LinearSteps(steps, comm, False, by)) for by in ("auto", "blocking"))
                assert all(map(torch.equal, found, blocking)), f"{how}: other bits than with blocking collectives"
                for ours, without in zip(found, losses(*how, None), strict=True):
                    error = relative_error(ours, without)
                    assert error < TOLERANCE[dtype], f"{how}: {error:.1e} from the head without steps"
    least = step_comm.LEAST_STEP_TOKENS
    # The backward pass gathers at once, under a product; so does the forward pass of token tiles, and of few tokens.
    for tiles, tokens, at_once in ((HeadTiles(), least, 1), (HeadTiles(tokens=16), least, 2), (HeadTiles(), 48, 2)):
        step_comm.LEAST_STEP_TOKENS = tokens
        with Counter() as counter:
            losses(tiles, torch.float64, False, LinearSteps(3, comm))
        gathers = sum(count for name, count in counter.collectives.items() if "allgather" in name.replace("_", ""))
        assert gathers == at_once, counter.collectives
    step_comm.LEAST_STEP_TOKENS = least


def check_models() -> None:
    """What the table says is what runs; attention in a model, dense against tiled."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import note
    from megatron_tiling.resident import stepped
    from megatron_tiling.tiles import step_comm
    from megatron_tiling.tiles.stepped_linear import LinearSteps
    from tests.check_models import assert_same, batch, gpt, make_config, step

    overlaps = f"at most 3 token steps, communication behind products from {2 * step_comm.LEAST_STEP_TOKENS} tokens on"
    exposed = "no overlap: without sequence parallelism nothing is exposed"
    seen: list[int] = []
    gathers: list[torch.Tensor] = []
    steps_now, gather = stepped._steps_now, LinearSteps.gather

    def noting(layer: Any, input_: Any, is_row: bool) -> int:
        seen.append(steps_now(layer, input_, is_row))
        return seen[-1]

    def noting_gather(loop: LinearSteps, shard: torch.Tensor, *arguments: Any) -> None:
        gathers.append(shard)
        gather(loop, shard, *arguments)

    patches = patch.object(stepped, "_steps_now", noting), patch.object(LinearSteps, "gather", noting_gather)
    for one in patches:
        one.start()
    for sequence_parallel in (True, False):
        config = {"tensor_model_parallel_size": TP, "sequence_parallel": sequence_parallel}
        dense, tiled = gpt(make_config(**config)), gpt(make_config(**config))
        tiling = TilingConfig(factor=2, tp_overlap=3)
        for reports in (tile(tiled, tiling), tile(tiled, TilingConfig(factor=2))):  # the second finds what there is
            notes = {report.name.rpartition(".")[2]: (str(report.grid), note(report)) for report in reports}
            assert notes["linear_qkv"] == ("1x1", overlaps if sequence_parallel else exposed), notes
            assert notes["linear_proj"] == ("1x1", overlaps), notes
            head = notes["output_layer"][1]
            ends = f"{overlaps}, where one tile of logits has all tokens" if sequence_parallel else exposed
            assert head.startswith("loss in tiles") and head.endswith(ends), head
            if sequence_parallel is False:
                break  # why not is told where it is asked for
        seen.clear()
        gathers.clear()
        assert_same(step(tiled, **batch()), step(dense, **batch()))
        layers = len(tiled.decoder.layers)
        assert len(gathers) == (layers + 1 if sequence_parallel else 0)  # proj's backward, and the head's forward
        assert seen == ([3, 3] if sequence_parallel else [3]) * layers, seen
        seen.clear()
        tiled.zero_grad()
        for layer in tiled.decoder.layers:  # with a hook on fc1, layers of an MLP run one by one
            layer.mlp.linear_fc1.register_forward_hook(lambda *arguments: None)
        dense.zero_grad()
        assert_same(step(tiled, **batch()), step(dense, **batch()))
        assert seen == ([3] * 4 if sequence_parallel else [3] * 2) * layers, seen
    for one in patches:
        one.stop()


def check_auto(qkv_goes: bool, mlp_goes: bool) -> None:
    """A layer, and an MLP, goes by steps from the tokens on that the table names, which its own size says."""
    from megatron_tiling import TilingConfig, convert, tile
    from megatron_tiling.report import note
    from megatron_tiling.resident import stepped
    from megatron_tiling.resident.mlp import TiledMLP
    from tests.check_models import assert_same, batch, gpt, make_config, step

    config = {"tensor_model_parallel_size": TP, "sequence_parallel": True}
    dense, tiled = gpt(make_config(**config)), gpt(make_config(**config))
    layer, tokens = dense.decoder.layers[0], batch()["input_ids"].numel()
    qkv = layer.self_attention.linear_qkv.weight.numel()
    mlp = layer.mlp.linear_fc1.weight.numel() + layer.mlp.linear_fc2.weight.numel()
    least = {"qkv": tokens + (not qkv_goes), "fc1": tokens + (not mlp_goes)}
    rule = {"LEAST_LAYER_OPERATIONS": 6 * qkv * least["qkv"], "LEAST_MLP_OPERATIONS": 6 * mlp * least["fc1"]}
    with patch.multiple(convert, **rule):
        found = tile(tiled, TilingConfig(factor=2, tp_overlap="auto"))
    assert tile(tiled, TilingConfig(factor=2)) == found  # tiled before
    notes = {report.module: note(report) for report in found}
    assert all(f"from {least[module]} tokens on" in notes[module] for module in least), (notes, least)
    went: dict[str, list[int]] = {"qkv": [], "mlp": []}
    steps_now, mlp_steps_now = stepped._steps_now, TiledMLP.steps_now

    def noting(layer: Any, input_: Any, is_row: bool) -> int:
        steps = steps_now(layer, input_, is_row)
        went["qkv"] += [] if is_row else [steps]
        return steps

    def noting_mlp(mlp: TiledMLP, *arguments: Any) -> int:
        went["mlp"].append(mlp_steps_now(mlp, *arguments))
        return went["mlp"][-1]

    with patch.object(stepped, "_steps_now", noting), patch.object(TiledMLP, "steps_now", noting_mlp):
        assert_same(step(tiled, **batch()), step(dense, **batch()))
    assert {steps > 1 for steps in went["mlp"]} == {mlp_goes}, went
    assert {steps > 1 for steps in went["qkv"][: len(tiled.decoder.layers)]} == {qkv_goes}, went


class Adapter(torch.nn.Module):
    """Around a layer as Megatron-Bridge's, with a factor in place of a low rank."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.to_wrap = layer

    def forward(self, *arguments: Any) -> Any:
        output, bias = self.to_wrap(*arguments)
        return 1.5 * output, bias


def check_adapters() -> None:
    """qkv and proj overlap under adapters, which come before or after ``tile``; the table says so."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import note
    from tests.check_models import assert_same, batch, gpt, make_config, step

    config = {"tensor_model_parallel_size": TP, "sequence_parallel": True}
    tiling = TilingConfig(modules=("qkv", "proj"), tp_overlap=3)
    for first in (tile, None):
        dense, tiled = gpt(make_config(**config)), gpt(make_config(**config))
        if first is not None:
            tile(tiled, tiling)
        for model in (dense, tiled):
            for attention in (layer.self_attention for layer in model.decoder.layers):
                attention.linear_qkv = Adapter(attention.linear_qkv)
                attention.linear_proj = Adapter(attention.linear_proj)
        notes = [note(report) for report in tile(tiled, tiling) if report.module in ("qkv", "proj")]
        assert all(one.startswith("at most 3 token steps") for one in notes), notes
        with Counter() as counter:
            found = step(tiled, **batch())
        assert counter.collectives["send"] >= 6 * len(dense.decoder.layers), counter.collectives
        assert_same(found, step(dense, **batch()))


def check_after_inference() -> None:
    """A model trains after the first use of the shared buffer was in inference mode."""
    from megatron.core.parallel_state import get_global_memory_buffer

    from megatron_tiling import TilingConfig, tile
    from tests.check_models import assert_same, batch, gpt, make_config, step

    config = {"tensor_model_parallel_size": TP, "sequence_parallel": True}
    dense, tiled = gpt(make_config(**config)), gpt(make_config(**config))
    tile(tiled, TilingConfig(factor=2, tp_overlap=3))
    get_global_memory_buffer().buffer.clear()
    with torch.inference_mode():
        tiled(**(batch() | {"labels": None}))
    assert_same(step(tiled, **batch()), step(dense, **batch()))


def check_heads() -> None:
    """An output layer with a weight of its own and with the embedding's, in a loss and as logits."""
    from megatron_tiling import TilingConfig, tile
    from tests.check_models import assert_same, batch, gpt, make_config, step

    config = {"tensor_model_parallel_size": TP, "sequence_parallel": True}
    for tied in (False, True):
        dense, tiled = (gpt(make_config(**config), share_embeddings_and_output_weights=tied) for _ in range(2))
        tile(tiled, TilingConfig(factor=2, modules=("output",), tp_overlap=3))
        for labels in ({}, {"labels": None}):
            with naming(f"TP={TP}, tied={tied}, {labels}"):
                dense.zero_grad()
                tiled.zero_grad()
                with Counter() as counter:
                    found = step(tiled, **(batch() | labels))
                assert counter.collectives["send"] > 0, counter.collectives
                assert_same(found, step(dense, **(batch() | labels)))


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        from megatron_tiling.tiles import step_comm

        step_comm.TOKEN_MULTIPLE = 2
        step_comm.LEAST_STEP_TOKENS = 8
        cases = [case for seed in range(int(os.environ.get("SEEDS", "3"))) for case in all_pairs(OPTIONS, seed)]
        for case in cases:
            with naming(f"TP={TP}, {case}"):
                check(case)
        check_products()
        check_what_runs_as_before()
        check_head()
        check_models()
        check_auto(qkv_goes=True, mlp_goes=False)
        check_auto(qkv_goes=False, mlp_goes=True)
        check_heads()
        check_adapters()
        check_after_inference()
        if dist.get_rank() == 0:
            print(f"{len(cases)} cases passed at TP={TP}")


if __name__ == "__main__":
    main()
