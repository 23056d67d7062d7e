"""TiledLinear for DeepSpeed's class: under autograd, transformed, traced, compiled, recomputed, copied, watched."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.tiles.drop_in import GRIDS, Activated, Case, Grid, Returns, check, input_of, make, tensors_in, trained


def kept_output_changed(lib: Any, grid: Grid) -> Any:
    """A hook keeps the tiles' outputs; later they are changed in place."""
    layer, kept = make(lib, grid), []
    for row in layer.linears:
        for tile in row:
            tile.register_forward_hook(lambda module, args, output: kept.append(output))
    output = layer(input_of())
    with torch.no_grad():
        for tensor in kept:
            tensor.zero_()
    return output, len(kept)


def output_changed(lib: Any, grid: Grid) -> Any:
    layer, kept = make(lib, grid, linear_cls=Activated), []
    layer.linears[0][0].register_forward_hook(lambda module, args, output: kept.append(output))
    output = layer(input_of()).mul_(3).relu_()
    output.sum().backward()
    return output, kept, [parameter.grad for parameter in layer.parameters()]


def list_changed(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid, linear_cls=Returns, combine_out_splits=False)
    given = input_of()
    outputs = layer(given)
    for output in outputs:
        output.detach().zero_()
    return given, outputs


def double_backward(lib: Any, grid: Grid) -> Any:
    layer, given = make(lib, grid, linear_cls=Activated), input_of(requires_grad=True)
    (first,) = torch.autograd.grad(layer(given).square().sum(), given, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), [given, *layer.parameters()], allow_unused=True)


def batched_gradients(lib: Any, grid: Grid) -> Any:
    layer, given = make(lib, grid), input_of(requires_grad=True)
    output = layer(given)
    return torch.autograd.grad(output, given, input_of(5, *output.shape), is_grads_batched=True)


def undefined_gradient(lib: Any, grid: Grid) -> Any:
    layer, given = make(lib, grid, combine_out_splits=False), input_of(requires_grad=True)
    return torch.autograd.grad(layer(given)[0].sum(), [given, *layer.parameters()], allow_unused=True)


def loss(layer: Any) -> Any:
    return lambda x: layer(x).square().sum()


def per_sample_gradients(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    of_parameters = torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum())
    return torch.func.vmap(of_parameters, (None, 0))(dict(layer.named_parameters()), input_of())


def ensemble(lib: Any, grid: Grid) -> Any:
    """Batched over one tile's weight: its output is, the others are not."""
    layer = make(lib, grid)
    name = f"linears.{grid[1] - 1}.{grid[0] - 1}.weight"
    weights, x = torch.stack([dict(layer.named_parameters())[name].detach()] * 3) * input_of(3, 1, 1), input_of()
    return torch.func.vmap(lambda weight: torch.func.functional_call(layer, {name: weight}, x))(weights)


def dual(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(layer(forward_ad.make_dual(input_of(), input_of() + 1))))


def dual_of_last_tile(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    tile = layer.linears[-1][0]
    weight = tile.weight.detach()
    del tile.weight
    with forward_ad.dual_level():
        tile.weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        return tuple(forward_ad.unpack_dual(layer(input_of())))


def compiled(lib: Any, grid: Grid) -> Any:
    return trained(torch.compile(make(lib, grid), backend="eager", fullgraph=True))  # type: ignore[arg-type]


def traced(lib: Any, grid: Grid) -> Any:
    layer, file = make(lib, grid), io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, input_of()), file)
    file.seek(0)
    return torch.jit.load(file)(input_of(7, 16))


def symbolically_traced(lib: Any, grid: Grid) -> Any:
    return torch.fx.symbolic_trace(make(lib, grid))(input_of(7, 16))


def made_fx(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    graph = make_fx(layer)(input_of())
    return graph(2 * input_of())


def exported(lib: Any, grid: Grid) -> Any:
    dynamic = ({0: torch.export.Dim("tokens", max=99)},)
    return torch.export.export(make(lib, grid), (input_of(),), dynamic_shapes=dynamic).module()(input_of(7, 16))


def fake(lib: Any, grid: Grid) -> Any:
    with torch._subclasses.FakeTensorMode():
        output = make(lib, grid)(torch.empty(4, 16))
    return type(output).__name__, tuple(output.shape)


def on_meta(lib: Any, grid: Grid) -> Any:
    output = make(lib, grid, device="meta")(torch.empty(4, 16, device="meta", requires_grad=True))
    output.sum().backward()
    return tuple(output.shape), output.device.type


def recomputed(**options: Any) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid)
        return trained(layer, call=lambda given: checkpoint(layer, given, **options))

    return case


def keep_all(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What is kept of an operation must not be changed in place."""
    return CheckpointPolicy.MUST_SAVE


def within(context: Callable[[], Any], **options: Any) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid, **options)
        with context():
            output = layer(input_of())
            return output, output.is_inference()

    return case


def autocast(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input_of())
    output.float().sum().backward()
    return output, [parameter.grad for parameter in layer.parameters()]


def saved_tensors(lib: Any, grid: Grid) -> Any:
    shapes: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return make(lib, grid)(input_of()), shapes


def copied(copy_layer: Callable[[Any], Any]) -> Case:
    return lambda lib, grid: trained(copy_layer(make(lib, grid)))


def state(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    again = make(lib, grid, bias=True)
    missing = again.load_state_dict(layer.state_dict())
    public = sorted((name, value) for name, value in vars(layer).items() if not name.startswith("_"))
    return dict(layer.state_dict()), list(missing), public, str(layer), trained(again)


def all_hooks(lib: Any, grid: Grid) -> Any:
    layer, seen = make(lib, grid), []

    def saw(place: str) -> Any:
        return lambda module, *values: seen.append((place, [tuple(t.shape) for v in values for t in tensors_in(v)]))

    for name, module in layer.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_pre_hook(saw(f"{name} before"))
            module.register_forward_hook(saw(f"{name} after"))
            module.register_full_backward_pre_hook(saw(f"{name} before backward"))
            module.register_full_backward_hook(saw(f"{name} after backward"))
    return trained(layer), seen


def replacing_hooks(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    layer.linears[-1][-1].register_forward_hook(lambda module, args, output: 2 * output)
    layer.linears[0][0].register_full_backward_hook(lambda module, grads, outputs: tuple(3 * g for g in grads))
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return trained(layer)


def gradient_hooks_on_tile_outputs(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid)
    for row in layer.linears:
        row[0].register_forward_hook(lambda module, args, output: output.register_hook(lambda grad: 2 * grad) and None)
    return trained(layer)


USES: dict[str, Case] = {
    "tiles' outputs changed afterwards": kept_output_changed,
    "output changed in place": output_changed,
    "listed outputs changed in place": list_changed,
    "double backward": double_backward,
    "batched gradients": batched_gradients,
    "undefined gradients": undefined_gradient,
    "expanded upstream gradient": lambda lib, grid: trained(
        make(lib, grid), upstream=lambda grad: grad[:1, :1].expand_as(grad)
    ),
    "transposed upstream gradient": lambda lib, grid: trained(
        make(lib, grid), upstream=lambda grad: grad.t().contiguous().t()
    ),
    "vectorised jacobian": lambda lib, grid: torch.autograd.functional.jacobian(
        make(lib, grid), input_of(), vectorize=True
    ),
    "forward mode jacobian": lambda lib, grid: torch.autograd.functional.jacobian(
        make(lib, grid), input_of(), vectorize=True, strategy="forward-mode"
    ),
    "functional.jvp": lambda lib, grid: torch.autograd.functional.jvp(make(lib, grid), input_of(), input_of()),
    "functional.hessian": lambda lib, grid: torch.autograd.functional.hessian(loss(make(lib, grid)), input_of(1, 16)),
    "per-sample gradients": per_sample_gradients,
    "ensemble of one tile": ensemble,
    "func.jvp": lambda lib, grid: torch.func.jvp(make(lib, grid), (input_of(),), (input_of(),)),
    "func.jacrev": lambda lib, grid: torch.func.jacrev(make(lib, grid))(input_of()),
    "func.hessian": lambda lib, grid: torch.func.hessian(loss(make(lib, grid)))(input_of(1, 16)),
    "func.linearize": lambda lib, grid: torch.func.linearize(make(lib, grid), input_of())[1](input_of()),
    "dual input": dual,
    "dual weight of the last tile": dual_of_last_tile,
    "compile": compiled,
    "jit.trace": traced,
    "fx": symbolically_traced,
    "make_fx": made_fx,
    "export": exported,
    "fake tensors": fake,
    "meta tensors": on_meta,
    "checkpoint": recomputed(use_reentrant=False),
    "reentrant checkpoint": recomputed(use_reentrant=True),
    "selective checkpoint": recomputed(
        use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_all)
    ),
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "anomaly detection": lambda lib, grid: _in_anomaly_mode(lambda: trained(make(lib, grid))),
    "autocast": autocast,
    "saved tensors": saved_tensors,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda layer: pickle.loads(pickle.dumps(layer))),
    "state": state,
    "hooks": all_hooks,
    "hooks that replace": replacing_hooks,
    "hooks on tiles' outputs": gradient_hooks_on_tile_outputs,
}


def _in_anomaly_mode(run: Callable[[], Any]) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return run()


#: What DeepSpeed's class refuses on one of the grids at least.
REFUSED = ("fx",)
SLOW = ("compile", "export")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
def test_as_deepspeeds(name: str) -> None:
    check(USES[name], refused=name in REFUSED, grids=GRIDS[1::2] if name in SLOW else GRIDS)
