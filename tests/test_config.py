"""TilingConfig and the flags: what is read, and what is refused by name."""

from argparse import ArgumentParser, Namespace

import pytest

from megatron_tiling import TilingConfig, arguments
from megatron_tiling.arguments import add_tiling_args, validate_tiling_args
from megatron_tiling.config import storage_of


def parse(line: str, **megatron_args: object) -> TilingConfig | None:
    args = add_tiling_args(ArgumentParser()).parse_args(line.split())
    for name, value in megatron_args.items():
        setattr(args, name, value)
    return validate_tiling_args(args)


def test_off_by_default() -> None:
    assert parse("") is None


def test_defaults() -> None:
    config = parse("--use-tiled-linear")
    assert config is not None
    assert [config.splits_of(module) for module in ("qkv", "proj", "fc1", "fc2", "output")] == [
        (1, 4), (4, 1), (1, 4), (4, 1), (1, 4),
    ]  # fmt: skip


def test_megatron_deepspeeds_spelling() -> None:
    assert parse("--memory-centric-tiled-linear --tile-factor 2") == parse("--use-tiled-linear --tile-factor 2")


def test_splits_override_the_factor() -> None:
    config = parse("--use-tiled-linear --tile-factor 3 --tiled-linear-splits fc1=2x8 --tiled-linear-modules fc1 fc2")
    assert config is not None
    assert config.modules == ("fc1", "fc2")
    assert config.splits_of("fc1") == (2, 8)
    assert config.splits_of("fc2") == (3, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--use-tiled-linear --tile-factor 0", "--tile-factor 0: must be at least 1"),
        ("--use-tiled-linear --tile-factor -2", "--tile-factor -2: must be at least 1"),
        ("--tile-factor 4", "--tile-factor does nothing without --use-tiled-linear"),
        ("--tiled-linear-modules fc1", "--tiled-linear-modules does nothing without"),
        ("--tiled-linear-splits fc1=1x2", "--tiled-linear-splits does nothing without"),
        ("--tiled-linear-fp32-accumulate", "--tiled-linear-fp32-accumulate does nothing without"),
        ("--tiled-mlp-keep all", "--tiled-mlp-keep does nothing without"),
        ("--tiled-head-tokens 5", "--tiled-head-tokens does nothing without"),
        ("--tiled-head-memory-mib 5", "--tiled-head-memory-mib does nothing without"),
        ("--use-tiled-linear --tiled-mlp-keep -1", "--tiled-mlp-keep -1: write a number of tiles, or all"),
        ("--use-tiled-linear --tiled-mlp-keep none", "--tiled-mlp-keep none: write a number of tiles, or all"),
        ("--use-tiled-linear --tiled-head-tokens 0", "--tiled-head-tokens 0: must be at least 1"),
        ("--use-tiled-linear --tiled-head-memory-mib 0", "--tiled-head-memory-mib 0: must be at least 1"),
        ("--use-tiled-linear --tiled-linear-modules fc1 mlp", "--tiled-linear-modules mlp: choose from qkv"),
        ("--use-tiled-linear --tiled-linear-splits fc1", "fc1: write MODULE=INxOUT"),
        ("--use-tiled-linear --tiled-linear-splits fc1=8", "fc1=8: write MODULE=INxOUT"),
        ("--use-tiled-linear --tiled-linear-splits fc1=1x2x3", "fc1=1x2x3: write MODULE=INxOUT"),
        ("--use-tiled-linear --tiled-linear-splits fc1=1x-2", "fc1=1x-2: write MODULE=INxOUT"),
        ("--use-tiled-linear --tiled-linear-splits mlp=1x2", "unknown module 'mlp'"),
        ("--use-tiled-linear --tiled-linear-splits fc1=0x2", "both numbers must be at least 1"),
        ("--use-tiled-linear --tiled-linear-splits fc1=1x2 fc1=1x4", "fc1 is given twice"),
        ("--use-tiled-linear --tiled-linear-modules fc2 --tiled-linear-splits fc1=1x2", "fc1 is not among the modules"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(line)
    assert message in str(refusal.value)


def test_head_tokens_within_a_micro_batch() -> None:
    sizes = {"seq_length": 32, "micro_batch_size": 4, "context_parallel_size": 2}
    assert parse("--use-tiled-linear --tiled-head-tokens 64", **sizes) is not None
    with pytest.raises(ValueError, match="--tiled-head-tokens 65: a micro-batch has 64 tokens"):
        parse("--use-tiled-linear --tiled-head-tokens 65", **sizes)


@pytest.mark.parametrize(("keep", "tiles"), [("all", None), ("0", 0), ("3", 3)])
def test_mlp_keep(keep: str, tiles: int | None) -> None:
    config = parse(f"--use-tiled-linear --tiled-mlp-keep {keep}")
    assert config is not None and config.kept_tiles == tiles


def test_storage() -> None:
    """Partitioned tiles where Megatron partitions weights, or where asked for; they recompute by default."""
    flags = "--use-tiled-linear --tiled-linear-storage"
    for text, partitioned in ((flags + " partitioned", True), (flags + " auto", False), ("--use-tiled-linear", False)):
        config = parse(text)
        assert config is not None and config.partitioned == partitioned
        assert config.kept_tiles == (0 if partitioned else None)
    fsdp = {"tiled_linear_storage": None, "use_megatron_fsdp": True}
    for strategy, storage in (("optim_grads_params", "partitioned"), ("optim_grads", "resident")):
        assert storage_of(Namespace(**fsdp, data_parallel_sharding_strategy=strategy)) == storage
    assert storage_of(Namespace(tiled_linear_storage="auto", use_torch_fsdp2=True)) == "partitioned"
    for companion in ("--tiled-linear-fp32-accumulate", "--tiled-head-tokens 8", "--tiled-head-memory-mib 8"):
        with pytest.raises(ValueError, match=companion.split()[0]):
            parse(f"{flags} partitioned {companion}")
    with pytest.raises(ValueError, match="partitioned with --optimizer muon"):
        parse(f"{flags} partitioned", optimizer="muon")
    assert parse(f"{flags} resident", optimizer="muon") is not None


def test_transformer_engine_needs_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="not installed; install it, or use --transformer-impl local"):
        parse("--use-tiled-linear", transformer_impl="transformer_engine")
    monkeypatch.setattr(arguments, "find_spec", lambda module: object())
    assert parse("--use-tiled-linear", transformer_impl="transformer_engine") is not None


@pytest.mark.feature("`{flag}`", refused=True)
@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("fp8", "hybrid", "--fp8-format hybrid"),
        ("fp4", "e2m1", "--fp4-format e2m1"),
        ("te_precision_config_file", "file.yaml", "--te-precision-config-file file.yaml"),
        ("tp_comm_overlap", True, "--tp-comm-overlap"),
        ("delay_wgrad_compute", True, "--delay-wgrad-compute"),
        ("symmetric_ar_type", "two_shot", "--symmetric-ar-type two_shot"),
        ("use_transformer_engine_op_fuser", True, "--use-transformer-engine-op-fuser"),
        ("cpu_offloading_num_layers", 1, "--cpu-offloading-num-layers"),
        ("fine_grained_activation_offloading", True, "--fine-grained-activation-offloading"),
        ("transformer_impl", "inference_optimized", "--transformer-impl inference_optimized"),
        ("defer_embedding_wgrad_compute", True, "--defer-embedding-wgrad-compute"),
        ("tensor_parallel_num_weight_shards", 2, "--tensor-parallel-num-weight-shards 2"),
        ("expert_tensor_parallel_num_weight_shards", 4, "--expert-tensor-parallel-num-weight-shards 4"),
    ],
)
def test_unsupported_megatron_flags_are_refused_by_name(name: str, value: object, flag: str) -> None:
    with pytest.raises(ValueError, match=f"--use-tiled-linear with {flag}: "):
        parse("--use-tiled-linear", **{name: value})
    assert parse("", **{name: value}) is None
