"""The tiled LM head on a GPU: its kernels against the torch form in float64, its errors, a stock model."""

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles.head import HeadLoop, softmax_for, tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.softmax import LogitScale, Statistics, TokenGradients
from tests.support import harness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
"""Rounding of a gradient stored in the dtype, a little over half its epsilon."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 1000, 0), (64, 8192, 300), (5, 4097, 8192), (3, 1, 0)])
@pytest.mark.parametrize("scale", [LogitScale(), LogitScale(-0.5), LogitScale(1.0, 5.0, 0.8)])
@pytest.mark.parametrize("k", [1, 3])
def test_kernels_equal_float64(dtype, shape, scale, k):
    tokens, columns, first = shape
    logits = (torch.randn(tokens, columns + 7, device="cuda") * 3).to(dtype)[:, :columns]
    labels = torch.randint(-2, columns + first + 5, (tokens, k), device="cuda")
    upstream = torch.linspace(-1, 1, tokens, device="cuda")
    found = [_run(logits.to(wide), first, labels, scale, upstream) for wide in (dtype, torch.float64)]
    for ours, exact in zip(*found, strict=True):
        if ours.is_floating_point():
            tolerance = DTYPES[dtype] if ours.dtype == dtype else 2e-6
            assert (ours.double() - exact).norm() <= tolerance * exact.norm() + 1e-6  # of one logit, most are 0
        else:
            assert torch.equal(ours, exact)


def _run(products: Tensor, first: int, columns: Tensor, scale: LogitScale, upstream: Tensor) -> tuple[Tensor, ...]:
    """Statistics of two equal tiles of logits, and the gradient of one."""
    form, wide = softmax_for(products), torch.float64 if products.dtype == torch.float64 else torch.float32
    statistics = Statistics.of_no_logits(columns, wide, weighted=True, argmax=True)
    for _ in range(2):
        form.update_statistics(products, first, columns, scale, statistics)
    gradient = products.clone()
    log_sum = statistics.sum_exp.log()
    given = TokenGradients(
        statistics.largest + log_sum, upstream.to(wide)[:, None].expand(columns.shape), upstream.to(wide),
        log_sum - statistics.weighted / statistics.sum_exp,
    )  # fmt: skip
    form.logits_to_gradient(gradient, gradient, first, columns, scale, given)
    return *vars(statistics).values(), gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("tiles", [HeadTiles(), HeadTiles(tokens=500, vocabulary_tiles=7), HeadTiles(memory_mib=8)])
def test_no_further_from_float64_than_dense(dtype, main_grad, tiles):
    hidden = torch.randn(512, 2, 768, device="cuda").to(dtype)
    weight = (torch.randn(10007, 768, device="cuda") * 0.05).to(dtype)
    labels = torch.randint(0, 10007, (512, 2), device="cuda")
    upstream = torch.rand(512, 2, device="cuda")

    def dense(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
        return logits.logsumexp(dim=-1) - logits.gather(-1, labels[..., None]).squeeze(-1)

    def tiled(hidden: Tensor, weight: Tensor) -> Tensor:
        if main_grad:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        loop = HeadLoop(tiles, fuse_wgrad=main_grad)
        return tiled_linear_cross_entropy(hidden, weight, labels, loop).loss

    def errors(losses_of, exact=None, wide=dtype):
        x, w = (tensor.detach().to(wide).requires_grad_() for tensor in (hidden, weight))
        losses = losses_of(x, w)
        losses.backward(upstream.to(losses.dtype))
        found = [losses.detach(), x.grad, w.main_grad if hasattr(w, "main_grad") else w.grad]
        return (
            found if exact is None else [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
        )

    exact = errors(dense, wide=torch.float64)
    # One weight gradient that is narrower than float32 and sums over token tiles is rounded once a tile.
    rounded_often = tiles.tokens is not None and not main_grad and dtype != torch.float32
    for name, ours, theirs in zip(
        ("loss", "hidden", "weight"), errors(tiled, exact), errors(dense, exact), strict=True
    ):
        slack = 2.0 if name == "weight" and rounded_often else 1.05
        assert ours <= slack * theirs + 1e-6, f"{name}: {ours:.2e}, dense {theirs:.2e}"


@pytest.fixture(scope="module")
def megatron():
    """One process with Megatron's process groups."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with harness.world_of_one("nccl"):
        model_parallel_cuda_manual_seed(1234)
        yield


@pytest.mark.feature("LM head kernels, in a stock model")
@pytest.mark.parametrize("prediction_heads", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_stock_model_trains_alike(megatron, tied, prediction_heads):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_tiling import TilingConfig, tile

    config = TransformerConfig(
        num_layers=1, hidden_size=256, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, bf16=True,
        params_dtype=torch.bfloat16, mtp_num_layers=prediction_heads or None, masked_softmax_fusion=False,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec()
    heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if prediction_heads else None
    model = GPTModel(
        config, layer, 5120, 128, share_embeddings_and_output_weights=tied, position_embedding_type="rope",
        mtp_block_spec=heads,
    ).bfloat16().cuda()  # fmt: skip
    tokens, labels = torch.randint(0, 5120, (2, 2, 128), device="cuda")
    positions = torch.arange(128, device="cuda").expand(2, 128)
    mask = torch.ones(1, 1, 128, 128, device="cuda").triu(1).bool()

    def step() -> list[Tensor]:
        model.zero_grad()
        losses = model(tokens, positions, mask, labels=labels)
        losses.mean().backward()
        return [losses.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    dense = step()
    table = tile(model, TilingConfig(modules=("output",), splits={"output": (1, 5)}, head_tokens=100))
    assert all(row.loss_tiles is not None for row in table if row.name == "output_layer")
    for ours, theirs in zip(step(), dense, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.double().norm()
