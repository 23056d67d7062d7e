"""Models of TransformerEngine's layer specs, dense and tiled, at TP=2 and TP=1, on stand-ins for its layers.

PYTHONPATH=tests/stand_ins torchrun --standalone --nproc-per-node 2 -m tests.resident.check_transformer_engine
"""

import copy
import itertools
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import transformer_engine
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from transformer_engine import pytorch

from megatron_tiling import TilingConfig, tile
from megatron_tiling.config import MODULE_OF_ATTRIBUTE
from megatron_tiling.resident import stepped
from megatron_tiling.resident.mlp import TiledMLP
from megatron_tiling.resident.transformer_engine import TILED_CLASSES
from megatron_tiling.spec import TiledSpecProvider
from megatron_tiling.tiles import step_comm
from tests.check_models import assert_same, by_name, expect_error, step
from tests.support.harness import Counter, megatron, relative_error
from tests.support.te_models import EXPERTS, LLAMA, entries, inputs, settings, te_gpt, tp

LINEARS = TilingConfig(factor=3, modules=("qkv", "proj", "fc1", "fc2"))
ALL = TilingConfig(factor=3, modules="all")
OFFLOADS = {"fine_grained_activation_offloading": True}


def check_steps() -> None:
    """The same parameters under the same names, outputs, gradients, marks on them, and checkpoint entries."""
    for changes in settings():
        dense, tiled = te_gpt(**changes), te_gpt(**changes)
        parameters, state = dict(tiled.named_parameters()), torch.get_rng_state()
        grids = by_name(tile(tiled, LINEARS))
        assert torch.equal(state, torch.get_rng_state())
        assert list(parameters) == [name for name, _ in tiled.named_parameters()]
        assert all(parameter is parameters[name] for name, parameter in tiled.named_parameters())
        assert grids["decoder.layers.1.self_attention.linear_qkv"] == "1x3"
        assert grids["decoder.layers.1.self_attention.linear_proj"] == "3x1"
        experts = "experts.local_experts.0." if "num_moe_experts" in changes else ""
        assert grids[f"decoder.layers.0.mlp.{experts}linear_fc1"] == "1x3"
        left = {type(module) for module in tiled.modules()} & set(TILED_CLASSES)
        assert not left, left
        assert any(isinstance(module, te.TEDotProductAttention) for module in tiled.modules())
        assert sum(isinstance(module, TiledMLP) for module in tiled.modules()) == (10 if experts else 2)
        assert entries(tiled) == entries(dense)
        with Counter() as counter:
            found = step(tiled, **inputs())
        wanted = step(dense, **inputs())
        assert_same(found, wanted)
        assert any("layer_norm_weight" in name for name in found)
        assert counter.gemms > 0
        for (name, parameter), other in zip(tiled.named_parameters(), dense.parameters(), strict=True):
            marks = ("sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
            assert all(getattr(parameter, mark, 0) == getattr(other, mark, 0) for mark in marks), name


def check_steps_of_tokens() -> None:
    """Communication behind products, of attention's layers and MLPs: as dense, bit for bit as if it blocked."""
    sizes, tiling = {"LEAST_STEP_TOKENS": 4, "TOKEN_MULTIPLE": 2}, TilingConfig(factor=3, tp_overlap=3)
    for changes, fuses, sequence_parallel in itertools.product(({}, LLAMA), (True, False), {False, tp() > 1}):
        changes = changes | {"sequence_parallel": sequence_parallel}
        dense, tiled, blocking = (te_gpt(**changes) for _ in range(3))
        for model in (tiled, blocking):
            tile(model, replace(tiling, fuse_wgrad=fuses))
            if fuses:
                for parameter in model.parameters():
                    parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
        for module in blocking.modules():
            module.transport = "blocking"
        with patch.multiple(step_comm, **sizes), patch.object(stepped, "steps_for", wraps=step_comm.steps_for) as seen:
            found, same = step(tiled, **inputs()), step(blocking, **inputs())
        wanted = step(dense, **inputs())
        assert seen.call_count == 2 * 2 * (sequence_parallel + (tp() > 1)), seen.call_count
        for model, grads in ((tiled, found), (blocking, same)):
            if fuses:
                parameters = model.named_parameters()
                fused = {name: one.main_grad for name, one in parameters if one.grad_added_to_main_grad}
                assert len(fused) == 4 * 2 + 1, fused.keys()
                grads.update(fused)
        assert_same(found, wanted)
        assert all(torch.equal(found[name], same[name]) for name in found)


def check_collectives() -> None:
    """As many as dense has; without sequence parallelism, where the stand-in keeps what it has gathered."""
    for changes in ({}, LLAMA):
        counts = []
        for tiled in (False, True):
            model = te_gpt(**changes)
            if tiled:
                tile(model, LINEARS)
            with Counter() as counter:
                step(model, **inputs())
            counts.append(sum(counter.collectives.values()))
        assert counts[0] == counts[1], counts


def check_remade_norms() -> None:
    """The norm before fc1 runs once more in the backward pass, and nothing keeps its output."""
    for keep in ("all", 1, 0):
        dense, tiled = te_gpt(**LLAMA), te_gpt(**LLAMA)
        tile(tiled, TilingConfig(factor=3, modules=LINEARS.modules, mlp_keep=keep))
        layer = tiled.decoder.layers[0].mlp.linear_fc1
        outputs: list[Any] = []
        norm = layer._norm.norm
        norm.register_forward_hook(lambda module, args, output, seen=outputs: seen.append(weakref.ref(output)))
        unlabelled = inputs() | {"labels": None}  # stock's loss allows one backward pass
        forward = tiled(**unlabelled)
        assert len(outputs) == 1 and outputs[0]() is None
        forward.sum().backward(retain_graph=True)
        assert len(outputs) == 2
        tiled.zero_grad()
        forward.sum().backward()
        dense(**unlabelled).sum().backward()
        assert_same(*({name: p.grad for name, p in model.named_parameters()} for model in (tiled, dense)))


def check_state_dicts() -> None:
    """Dense loads what tiled saves, tiled what dense saves, an FP8 run's extra state included."""
    for changes in ({}, LLAMA):
        dense, tiled = te_gpt(**changes), te_gpt(**changes)
        tile(tiled, LINEARS)
        assert list(tiled.state_dict()) == list(dense.state_dict())
        key = "decoder.layers.0.self_attention.linear_qkv._extra_state"
        assert torch.equal(tiled.state_dict()[key], dense.state_dict()[key])
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.add_(0.01)
        saved = dense.state_dict()
        saved[key] = torch.tensor([1, 2, 3], dtype=torch.uint8)
        tiled.load_state_dict(saved)
        assert_same(step(tiled, **inputs()), step(dense, **inputs()))
        fresh = te_gpt(**changes)
        fresh.load_state_dict(tiled.state_dict())
        assert torch.equal(fresh.state_dict()[key], saved[key])
        dense.zero_grad()
        assert_same(step(fresh, **inputs()), step(dense, **inputs()))


def check_what_layers_say() -> None:
    """Every attribute that a stock layer has, and its classes; TransformerEngine's shapes and nobody else's."""
    dense, tiled = te_gpt(**LLAMA), te_gpt(**LLAMA)
    tile(tiled, LINEARS)
    for (name, layer), other in zip(tiled.named_modules(), dense.modules(), strict=True):
        if type(other) not in TILED_CLASSES:
            continue
        assert isinstance(layer, type(other)), name
        missing = vars(other).keys() - vars(layer).keys() - {"bias"}
        assert not missing, missing
        for attribute, value in vars(other).items():
            if isinstance(value, (bool, int, str, float, type(None))):
                assert getattr(layer, attribute) == value, attribute
        assert type(other).__name__.removeprefix("TE") in type(layer).__name__
        assert layer.tensor_model_parallel and layer.partition_dim == layer.weight.partition_dim
        assert not hasattr(layer, "input_size") and not isinstance(layer, (ColumnParallelLinear, RowParallelLinear))


def check_norm_output() -> None:
    """Returned when asked after construction, in each of stock's four forms, with its gradient; gathered once."""
    for bias, sequence_parallel, gathered in itertools.product((False, True), (False, tp() > 1), (False, True)):
        changes = LLAMA | {"add_bias_linear": bias, "sequence_parallel": sequence_parallel}
        results, collectives = [], []
        for tiled in (False, True):
            model = te_gpt(**changes)
            if tiled:
                tile(model, LINEARS)
            for layer in (model.decoder.layers[0].self_attention.linear_qkv, model.decoder.layers[0].mlp.linear_fc1):
                layer.return_layernorm_output = True
                layer.return_layernorm_output_gathered = gathered
                torch.manual_seed(3 + parallel_state.get_tensor_model_parallel_rank() * sequence_parallel)
                x = torch.randn(6, 2, 32, requires_grad=True)
                with Counter() as counter:
                    output, layer_bias, *more = layer(x)
                    output, normed = (output, *more) if more else output
                    assert (layer_bias is None) == (not layer.te_return_bias)
                    generator = torch.Generator().manual_seed(4)
                    weights = [torch.randn(one.shape, generator=generator) for one in (output, normed)]
                    sum((one * weight).sum() for one, weight in zip((output, normed), weights, strict=True)).backward()
                collectives.append(sum(counter.collectives.values()))
                results.append([output, normed, x.grad, layer.weight.grad, layer.layer_norm_weight.grad])
        for found, expected in zip(results[2:], results[:2], strict=True):
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape
                assert relative_error(one, other) < 5e-6
        if sequence_parallel and not gathered:  # the same, by steps of tokens
            layer = model.decoder.layers[0].self_attention.linear_qkv
            layer.overlap_steps = 3
            with patch.multiple(step_comm, LEAST_STEP_TOKENS=4, TOKEN_MULTIPLE=2), Counter() as counter:
                output, _, *more = layer(x)
            assert relative_error(output if more else output[0], results[2][0]) < 5e-6
            assert counter.gemms == 3, counter.counts
        # Ungathered, the tiles gather once more for the weight gradient, where the stand-in kept what it had gathered.
        assert collectives[2:] == collectives[:2] or (sequence_parallel and not gathered), collectives


def check_an_mlp_whose_norm_output_is_asked_for() -> None:
    """Stock's MLP cannot use it; neither does the tile loop swallow it."""
    for tiled in (False, True):
        model = te_gpt(**LLAMA)
        if tiled:
            tile(model, LINEARS)
        mlp = model.decoder.layers[0].mlp
        mlp.linear_fc1.return_layernorm_output = True
        try:
            mlp(torch.randn(6, 2, 32))
        except (AttributeError, TypeError, ValueError):
            continue
        raise AssertionError(f"tiled={tiled}: the norm's output was dropped")


def check_fp8_at_call_time() -> None:
    model = te_gpt()
    tile(model, LINEARS)
    layer = model.decoder.layers[0].self_attention.linear_proj
    stock = te.FP8GlobalStateManager.is_fp8_enabled
    te.FP8GlobalStateManager.is_fp8_enabled = staticmethod(lambda: True)
    try:
        for call in (lambda: layer(torch.randn(6, 2, 32 // tp())), lambda: step(model, **inputs())):
            try:
                call()
            except RuntimeError as error:
                assert "FP8" in str(error)
                continue
            raise AssertionError("computed without FP8")
    finally:
        te.FP8GlobalStateManager.is_fp8_enabled = staticmethod(stock)


def check_wgrad_fusion() -> None:
    """Weight gradients go into main_grad; the norm's stay where they were."""
    dense, tiled = te_gpt(**LLAMA), te_gpt(**LLAMA)
    tile(tiled, TilingConfig(factor=3, modules=LINEARS.modules, fuse_wgrad=True))
    for parameter in tiled.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
    step(tiled, **inputs())
    expected = step(dense, **inputs())
    for name, parameter in tiled.named_parameters():
        fused = name.startswith("decoder.layers") and name.endswith(".weight")
        assert parameter.grad_added_to_main_grad == fused, name
        assert relative_error(parameter.main_grad if fused else parameter.grad, expected[name]) < 5e-6, name


def check_replaced_forwards() -> None:
    """What somebody puts in the place of Megatron's or TransformerEngine's runs, in a layer and in an MLP."""
    for owner in (te.TELinear, te.TELayerNormColumnParallelLinear, pytorch.Linear, pytorch.LayerNormLinear):
        forward = owner.forward

        def doubled(*args: Any, forward: Any = forward, **options: Any) -> Any:
            output = forward(*args, **options)
            return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

        dense, tiled = te_gpt(**LLAMA), te_gpt(**LLAMA)
        tile(tiled, LINEARS)
        mlp, plain = tiled.decoder.layers[0].mlp, step(dense, **inputs())
        dense.zero_grad()
        with patch.object(owner, "forward", doubled):
            words = f"has a {owner.__name__}.forward that is not its own, but of {__file__}"
            assert words in mlp.reason_for_stock_forward()
            assert_same(step(tiled, **inputs()), step(dense, **inputs()))
            reports = tile(te_gpt(**LLAMA), LINEARS)
            assert any(words in report.reason for report in reports)
        tiled.zero_grad()
        assert not mlp.reason_for_stock_forward()
        assert_same(step(tiled, **inputs()), plain)


def check_what_stays_dense() -> None:
    """What is not asked for; hooks stay on layers that are tiled."""
    changes = EXPERTS | {"sequence_parallel": tp() > 1}
    dense, tiled = te_gpt(grouped=True, **changes), te_gpt(grouped=True, **changes)
    calls: list[Any] = []
    tiled.decoder.layers[0].self_attention.linear_proj.register_forward_hook(lambda *arguments: calls.append(1))
    grids = by_name(tile(tiled, TilingConfig(factor=2, modules=("proj", "fc1", "fc2"))))
    assert grids["decoder.layers.0.mlp.experts"] == "dense: not in --tiled-linear-modules"
    assert grids["decoder.layers.0.mlp.shared_experts.linear_fc2"] == "2x1"
    assert grids["decoder.layers.0.self_attention.linear_qkv"] == "dense: not in --tiled-linear-modules"
    assert grids["decoder.layers.0.self_attention.linear_proj"] == "2x1"
    assert_same(step(tiled, **inputs()), step(dense, **inputs()))
    assert calls == [1]


def te_layers(model: Any) -> set[str]:
    """Modules of the first layer, as flags call them, that are TransformerEngine's own."""
    layers = model.decoder.layers[0].named_modules()
    return {MODULE_OF_ATTRIBUTE[name.rpartition(".")[2]] for name, layer in layers if type(layer) in TILED_CLASSES}


def check_layers_whose_options_tiles_do_not_honour() -> None:
    """They stay TransformerEngine's, say why, and compute as before; the other layers and the output are tiled."""
    every = {"qkv", "proj", "fc1", "fc2"}
    for options, words, concerned in (
        ({"fp8": "hybrid"}, "--fp8-format hybrid", every),
        ({"fp4": "e2m1"}, "--fp4-format e2m1", every),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute", every),
        ({"cpu_offloading": True}, "--cpu-offloading-num-layers", every),
        ({"symmetric_ar_type": "one_shot"}, "--symmetric-ar-type one_shot", {"proj", "fc2"}),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser", {"fc1", "fc2"}),
        ({"cache_mla_latents": True}, "--cache-mla-latents", {"qkv"}),
        (OFFLOADS | {"offload_modules": ["core_attn", "mlp_norm"]}, "", set()),
        (OFFLOADS | {"offload_modules": ["qkv_linear"]}, "--offload-modules ['qkv_linear']", {"qkv"}),
        (OFFLOADS | {"offload_modules": ["core_attn", "attn_proj"]}, "--offload-modules [", {"proj"}),
        ({"offload_modules": ["qkv_linear"]}, "", set()),
    ):
        model = te_gpt(**LLAMA)
        vars(model.config).update(options)
        reports = [report for report in tile(model, ALL) if ".0." in report.name or report.name == "output_layer"]
        assert te_layers(model) == {report.module for report in reports if report.grid is None} == concerned, options
        assert all(report.reason.startswith(words) for report in reports if report.grid is None), reports
        assert all("fuser" not in report.reason for report in reports if report.grid is not None)
        vars(model.config).update(dict.fromkeys(options, False))
        assert_same(step(model, **inputs()), step(te_gpt(**LLAMA), **inputs()))


def check_layers_with_options_of_their_own() -> None:
    """A quantization recipe that matches some layers, and overlaps that are off for some, stay with those."""
    for attribute, value, words in (
        ("te_quant_params", object(), "--te-precision-config-file: "),
        ("ub_overlap_rs_fprop", True, "--tp-comm-overlap: "),
    ):
        model = te_gpt()
        setattr(model.decoder.layers[0].mlp.linear_fc2, attribute, value)
        model.config.tp_comm_overlap = True
        grids = by_name(tile(model, ALL))
        assert grids["decoder.layers.0.mlp.linear_fc2"].startswith(f"dense: {words}")
        assert grids["decoder.layers.1.mlp.linear_fc2"] == grids["decoder.layers.0.self_attention.linear_proj"] == "3x1"


def check_refusals() -> None:
    """A grid that does not fit, and a spec that asks for tiles of what stays dense; no layer is changed."""
    model = te_gpt()
    expect_error(lambda: tile(model, TilingConfig(factor=300)), "--tile-factor 300")
    assert not any("Tiled" in type(module).__name__ for module in model.modules())
    if hasattr(model.config, "use_transformer_engine_op_fuser"):  # from 0.18 on
        expect_error(
            lambda: te_gpt(rewrite=TiledSpecProvider(factor=2).tiled, use_transformer_engine_op_fuser=True),
            "the model's spec asks for tiles of fc1, with --use-transformer-engine-op-fuser: ",
        )


def check_casts_and_copies() -> None:
    """The norm uses the layer's own parameters after the model is cast, copied, or given new ones."""
    model = te_gpt()
    tile(model, LINEARS)
    layer = model.decoder.layers[0].mlp.linear_fc1
    x = torch.randn(3, 1, 32)
    before = layer(x)[0]
    model.bfloat16()
    assert relative_error(layer(x.bfloat16())[0].float(), before) < 2e-2
    model.float()
    layer.layer_norm_weight = torch.nn.Parameter(2 * layer.layer_norm_weight.detach())
    layer.layer_norm_bias = torch.nn.Parameter(2 * layer.layer_norm_bias.detach())
    assert relative_error(layer(x)[0], 2 * before) < 2e-2
    group = layer.tp_group
    layer.tp_group = layer._tp_group = None
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one.tp_group = one._tp_group = group
    torch.nn.init.zeros_(twin.layer_norm_weight)
    torch.nn.init.zeros_(twin.layer_norm_bias)
    assert twin(x)[0].abs().sum() == 0 and layer(x)[0].abs().sum() > 0


def check_spec_provider() -> None:
    """A spec rewritten by TiledSpecProvider builds the same model, tiled, layer by layer."""
    for changes in settings():
        tiled = te_gpt(rewrite=TiledSpecProvider(factor=2, modules="all").tiled, **changes)
        assert str(tiled.decoder.layers[0].self_attention.linear_proj.grid) == "2x1"
        provider = TiledSpecProvider(factor=2, splits={"proj": (4, 1)}, modules="all")
        assert str(te_gpt(rewrite=provider.tiled, **changes).decoder.layers[0].self_attention.linear_proj.grid) == "4x1"
        assert not {type(module) for module in tiled.modules()} & set(TILED_CLASSES)
        assert_same(step(tiled, **inputs()), step(te_gpt(**changes), **inputs()))


def main() -> None:
    assert "stand_ins" in transformer_engine.__file__
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    with megatron(tensor_model_parallel_size=2):
        for size in (2, 1):
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(size)
            for check in checks:
                check()
            if torch.distributed.get_rank() == 0:
                print(f"{len(checks)} TransformerEngine checks passed at TP={size}", flush=True)


if __name__ == "__main__":
    main()
