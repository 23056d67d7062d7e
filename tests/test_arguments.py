"""The flags: what is read, and what is refused by name, in parsed arguments and in a model's config."""

from argparse import ArgumentParser, Namespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_tiling import TilingConfig, arguments
from megatron_tiling.arguments import (
    REFUSED,
    Refused,
    add_tiling_args,
    naming_what_was_meant,
    reasons,
    refuse,
    validate_tiling_args,
)
from megatron_tiling.config import FLAGS, argument_of
from megatron_tiling.resident.transformer_engine import NOT_IN_TILES

ON = "--use-tiled-linear"
SWITCHES = ("--tiled-linear-fp32-accumulate", "--tiled-fp8-hold-weights")


def parse(line: str, **megatron_args: object) -> TilingConfig | None:
    args = add_tiling_args(ArgumentParser()).parse_args(line.split())
    for name, value in megatron_args.items():
        setattr(args, name, value)
    return validate_tiling_args(args)


def test_off_by_default() -> None:
    assert parse("") is None
    assert validate_tiling_args(Namespace()) is None  # of a parser that lacks our flags


def test_each_flag_sets_its_field() -> None:
    assert parse(ON) == TilingConfig()
    assert parse(
        f"{ON} --tile-factor 3 --tiled-linear-modules fc1 fc2 output --tiled-linear-splits fc1=2x8 fc2=8x2 "
        "--tiled-linear-fp32-accumulate --tiled-mlp-keep 2 --tiled-head-memory-mib 5 --tiled-head-tokens 7 "
        "--tiled-linear-storage resident --tiled-head-keep 9 --tiled-fp8-hold-weights",
        fp8="hybrid",
    ) == TilingConfig(
        3, ("fc1", "fc2", "output"), {"fc1": (2, 8), "fc2": (8, 2)}, None, True, 2, 5, 7, "resident", 9, True
    )
    assert parse(f"{ON} --tiled-tp-overlap 4 --tiled-mlp-keep 0") == TilingConfig(mlp_keep=0, tp_overlap=4)
    for word in ("auto", "off"):
        assert parse(f"{ON} --tiled-tp-overlap {word}") == TilingConfig(tp_overlap=word)
    assert parse(f"{ON} --tiled-linear-modules all") == TilingConfig(modules="all")
    partitioned = parse(f"{ON} --tiled-linear-storage partitioned --tiled-mlp-keep all")
    assert partitioned == TilingConfig(mlp_keep="all", storage="partitioned")
    assert parse(f"{ON} --tiled-linear-storage auto", use_torch_fsdp2=True) == TilingConfig(storage="partitioned")


@pytest.mark.parametrize(
    ("megatron_args", "words"),
    [
        ({}, "does nothing without --fp8-format"),
        ({"fp8": "e4m3", "disable_parameter_transpose_cache": True}, "with --di"),
    ],
)
def test_held_weights_need_fp8_and_its_cache(megatron_args: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"^--tiled-fp8-hold-weights {words}"):
        parse(f"{ON} --tiled-fp8-hold-weights", **megatron_args)


def test_megatron_deepspeeds_spelling() -> None:
    assert parse("--memory-centric-tiled-linear --tile-factor 2") == parse("--use-tiled-linear --tile-factor 2")


def test_lists_that_are_given_twice_add_up() -> None:
    """As a script's own flags and those of its caller; a module that is then there twice is refused."""
    twice = f"{ON} --tiled-linear-splits fc1=1x2 --tiled-linear-splits fc2=2x1"
    assert parse(twice) == TilingConfig(splits={"fc1": (1, 2), "fc2": (2, 1)})
    assert parse(f"{ON} --tiled-linear-modules fc1 --tiled-linear-modules fc2") == TilingConfig(modules=("fc1", "fc2"))


#: A flag, bad values, and what the line says after flag and value.
BAD_VALUES = (
    ("--tile-factor", ("0", "-2", "2.5", "many", "1e3"), "must be a whole number of at least 1; the flag can be auto"),
    ("--tiled-mlp-keep", ("-1", "none", "1.5"), "must be a whole number of at least 0, or all; the flag can be auto"),
    ("--tiled-head-keep", ("-1", "none", "1.5"), "must be a whole number of at least 0, or all"),
    ("--tiled-head-memory-mib", ("0", "-1", "272MiB"), "must be a whole number of at least 1"),
    ("--tiled-head-tokens", ("0", "-1", "all"), "must be a whole number of at least 1"),
    ("--tiled-tp-overlap", ("0", "1", "-2", "on", "2.5"), "must be a whole number of at least 2, auto, or off"),
    ("--tiled-linear-storage", ("disk", "0"), "must be resident or partitioned; the flag alone"),
    ("--tiled-linear-modules", ("fc1 mlp", "fc1 fc1", "0", "fc1 --tiled-linear-modules fc1"), "must be some of qkv"),
    ("--tiled-linear-splits", ("fc1", "fc1=8", "fc1=1x-2", "fc1=0x2", "0"), "write MODULE=INxOUT, both whole numbers"),
    ("--tiled-linear-splits", ("mlp=1x2",), "unknown module 'mlp', choose from qkv, proj"),
    ("--tiled-linear-splits", ("fc1=1x2 fc1=1x4", "fc1=1x2 --tiled-linear-splits fc1=1x2"), "fc1 is given twice"),
)  # fmt: skip


@pytest.mark.parametrize(("flag", "values", "words"), BAD_VALUES)
def test_bad_values_are_refused_in_one_line(flag: str, values: tuple[str, ...], words: str) -> None:
    for value in values:
        with pytest.raises(ValueError) as refusal:
            parse(f"{ON} {flag} {value}")
        message = str(refusal.value)
        assert message.startswith(f"{flag} ") and words in message and "\n" not in message, message
        assert value.split()[-1] in message


def test_bad_values_of_every_flag_are_tried() -> None:
    assert {flag for flag, _, _ in BAD_VALUES} == set(FLAGS.values()) - set(SWITCHES)
    options = add_tiling_args(ArgumentParser())._option_string_actions
    assert {argument_of(flag) for flag in FLAGS.values()} == {options[flag].dest for flag in FLAGS.values()}


@pytest.mark.parametrize("flag", FLAGS.values())
def test_a_flag_alone_is_refused(flag: str) -> None:
    values = {"--tiled-linear-splits": "fc1=1x2", "--tiled-linear-modules": "fc1"} | dict.fromkeys(SWITCHES, "")
    for value in {values.get(flag, "4"), values.get(flag, "0")}:
        with pytest.raises(ValueError, match=f"^{flag} does nothing without --use-tiled-linear; add that flag or"):
            parse(f"{flag} {value}")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^--tiled-mlp-keep 2 with --tiled-tp-overlap 4: .* give all or 0$"):
        parse(f"{ON} --tiled-tp-overlap 4 --tiled-mlp-keep 2")
    for modules in ("fc1", "experts"):
        words = "^--tiled-tp-overlap 4: qkv, proj and output are not tiled, and fc1 and fc2 are not both tiled; leave"
        with pytest.raises(ValueError, match=words):
            parse(f"{ON} --tiled-tp-overlap 4 --tiled-linear-modules {modules}")
    assert parse(f"{ON} --tiled-tp-overlap 4 --tiled-linear-modules output").tiled_modules == ("output",)
    assert parse(f"{ON} --tiled-tp-overlap off --tiled-linear-modules fc1 --tiled-linear-storage partitioned")
    memory = "--tiled-head-memory-mib 8"
    for companion in ("--tiled-tp-overlap 4", "--tiled-linear-fp32-accumulate", "--tiled-head-tokens 8", memory):
        with pytest.raises(ValueError, match=f"^{companion.split()[0]}.*: .* or give --tiled-linear-storage resident"):
            parse(f"{ON} --tiled-linear-storage partitioned {companion}")
    with pytest.raises(ValueError, match=r"^--tiled-head-tokens: the output layer is not tiled"):
        parse(f"{ON} --tiled-linear-modules fc1 --tiled-head-tokens 8")


def test_head_tokens_within_a_micro_batch() -> None:
    sizes = {"seq_length": 32, "micro_batch_size": 4, "context_parallel_size": 2}
    assert parse("--use-tiled-linear --tiled-head-tokens 64", **sizes) is not None
    with pytest.raises(ValueError, match="--tiled-head-tokens 65: a micro-batch has 64 tokens"):
        parse("--use-tiled-linear --tiled-head-tokens 65", **sizes)


def test_transformer_engine_needs_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="not installed; install it, or use --transformer-impl local"):
        parse("--use-tiled-linear", transformer_impl="transformer_engine")
    monkeypatch.setattr(arguments, "find_spec", lambda module: object())
    assert parse("--use-tiled-linear", transformer_impl="transformer_engine") is not None


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--tiled-factor 4", "unrecognized arguments: --tiled-factor 4; is --tiled-factor --tile-factor?"),
        ("--use_tiled_linear", "--use_tiled_linear; is --use_tiled_linear --use-tiled-linear?"),
        ("--tiled-splits=fc1=1x8 --more", "--more; is --tiled-splits=fc1=1x8 --tiled-linear-splits?"),
        ("--tensor-parallel 2", "unrecognized arguments: --tensor-parallel 2"),
        ("--tiled-linear-modules", "argument --tiled-linear-modules: expected at least one argument"),
    ],
)
def test_a_flag_that_is_spelled_like_ours(given: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = naming_what_was_meant(add_tiling_args(ArgumentParser(allow_abbrev=False)))
    with pytest.raises(SystemExit):
        parser.parse_args(given.split())
    assert capsys.readouterr().err.endswith(f"{answer}\n")


@pytest.mark.feature("`{flag}`", refused=True)
@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("transformer_impl", "inference_optimized", "--transformer-impl inference_optimized"),
        ("defer_embedding_wgrad_compute", True, "--defer-embedding-wgrad-compute"),
        ("batch_invariant_mode", True, "--batch-invariant-mode"),
        ("tensor_parallel_num_weight_shards", 2, "--tensor-parallel-num-weight-shards 2"),
        ("expert_tensor_parallel_num_weight_shards", 4, "--expert-tensor-parallel-num-weight-shards 4"),
    ],
)
def test_unsupported_megatron_flags_are_refused_by_name(name: str, value: object, flag: str) -> None:
    with pytest.raises(ValueError, match=f"--use-tiled-linear with {flag}: "):
        parse("--use-tiled-linear", **{name: value})
    assert parse("", **{name: value}) is None


def test_weight_shards_are_those_of_tensor_parallelism() -> None:
    """Megatron fills the numbers in, in the arguments and in a config, and may validate again what it has filled in."""
    config = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "tensor_model_parallel_size": 2}
    experts = {"num_moe_experts": 4, "expert_tensor_parallel_size": 1, "add_bias_linear": False}
    filled = {"tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_num_weight_shards": 1}
    assert parse(ON, tensor_model_parallel_size=2, expert_tensor_parallel_size=1, **filled) == TilingConfig()
    for settings in (
        config,
        config | {"tensor_parallel_num_weight_shards": 2},
        config | experts,
        config | experts | filled,
    ):
        refuse(MLATransformerConfig(**settings), REFUSED["tiled layers"])
    with pytest.raises(ValueError, match="with --tensor-parallel-num-weight-shards 4: a tiled layer needs its weight"):
        refuse(MLATransformerConfig(**config, tensor_parallel_num_weight_shards=4), REFUSED["tiled layers"])
    experts["expert_tensor_parallel_num_weight_shards"] = 2
    with pytest.raises(ValueError, match="with --expert-tensor-parallel-num-weight-shards 2: a tiled layer needs its"):
        refuse(MLATransformerConfig(**config, **experts), REFUSED["tiled layers"])


FSDP = {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": "optim_grads_params"}
FSDP2 = {"use_torch_fsdp2": True, "torch_fsdp2_reshard_after_forward": True, "ckpt_format": "torch_dist"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FSDP | {"data_parallel_sharding_strategy": "optim"}, "with --data-parallel-sharding-strategy optim: "),
        (FSDP | {"megatron_fsdp_version": 2}, "--use-megatron-fsdp with --megatron-fsdp-version 2: tiles are"),
        (FSDP | {"nccl_ub": True}, "--use-megatron-fsdp with --use-nccl-ub: "),
        (FSDP | {"load": "/nowhere"}, "--use-megatron-fsdp with --load /nowhere: "),
        (FSDP | {"init_model_with_meta_device": True}, "--use-megatron-fsdp with --init-model-with-meta-device: "),
        (FSDP2 | {"init_model_with_meta_device": True}, "--use-torch-fsdp2 with --init-model-with-meta-device: "),
        (FSDP2 | {"ckpt_format": "torch_dcp"}, "--use-torch-fsdp2 with --ckpt-format torch_dcp: "),
        (FSDP2 | {"torch_fsdp2_reshard_after_forward": False}, "--torch-fsdp2-no-reshard-after-forward: all tiles"),
        (FSDP2 | {"num_experts": 2, "save": "/nowhere"}, "--use-torch-fsdp2 --num-experts 2 with --save /nowhere: "),
        (FSDP2 | {"optimizer": "muon"}, "--tiled-linear-storage partitioned with --optimizer muon: "),
    ],
)  # fmt: skip
def test_what_sharded_tiles_do_not_work_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(ON, **settings)
    assert message in str(refusal.value)


def test_what_sharded_tiles_work_with() -> None:
    assert parse(ON, **FSDP) == parse(ON, **FSDP2, save="/nowhere") == TilingConfig(storage="partitioned")
    assert parse(ON, optimizer="muon", nccl_ub=True, save="/nowhere", num_experts=2) is not None  # not sharded


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("pipeline_model_parallel_size", 2, "--pipeline-model-parallel-size 2: "),
        ("context_parallel_size", 2, "--context-parallel-size 2: "),
        ("num_experts", 4, "--num-experts 4: "),
        ("mtp_num_layers", 1, "--mtp-num-layers 1: "),
        ("use_distributed_optimizer", True, "--use-distributed-optimizer: "),
        ("use_megatron_fsdp", True, "--use-megatron-fsdp: "),
        ("use_torch_fsdp2", True, "--use-torch-fsdp2: "),
        ("tiled_linear_storage", "resident", "--tiled-linear-storage resident: "),
        ("overlap_grad_reduce", True, "--overlap-grad-reduce: "),
        ("overlap_param_gather", True, "--overlap-param-gather: "),
        ("rampup_batch_size", ["2", "2", "8"], "--rampup-batch-size ['2', '2', '8']: "),
        ("decoupled_lr", 0.1, "--decoupled-lr 0.1: "),
        ("cpu_offloading_num_layers", 1, "--cpu-offloading-num-layers 1: "),
    ],
)
def test_flags_that_deepspeeds_engine_does_not_follow(argument: str, value: Any, words: str) -> None:
    refuse(Namespace(optimizer="sgd", eval_iters=10), REFUSED["ZeRO-3"])  # the business of whoever trains
    with pytest.raises(ValueError) as refusal:
        refuse(Namespace(**{argument: value}), REFUSED["ZeRO-3"], "ZeRO-3")
    assert str(refusal.value).startswith(f"ZeRO-3 with {words}")


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return add_tiling_args(add_megatron_arguments(ArgumentParser()))


CONCERNS = [row for row, _ in NOT_IN_TILES if row.flag != "--offload-modules"]  # lists: check_transformer_engine
ROWS = {row: None for rows in (*REFUSED.values(), CONCERNS) for row in rows}  # a set in the table's order


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.flag)
def test_a_row_names_a_flag_of_megatrons_and_its_default_is_fine(row: Refused, parser: ArgumentParser) -> None:
    if row.flag == "--megatron-fsdp-version":
        pytest.skip("a flag of Megatron-LM's main branch")
    action = parser._option_string_actions[row.flag]
    assert action.dest == (row.names or (argument_of(row.flag),))[0]
    assert list(reasons(parser.parse_args([]), [row])) == []


@pytest.mark.parametrize("row", [*REFUSED["tiled layers"], *CONCERNS], ids=lambda row: row.flag)
def test_a_row_about_layers_is_found_in_a_models_config(row: Refused) -> None:
    config = MLATransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    assert list(reasons(config, [row])) == []
    name = (row.names or (argument_of(row.flag),))[-1]
    assert hasattr(config, name)
    for value in (7, object()):
        setattr(config, name, value)
        with pytest.raises(ValueError) as refusal:
            refuse(config, [row])
        shown = f"{row.flag} 7" if value == 7 else row.flag
        assert str(refusal.value) == f"--use-tiled-linear with {shown}: {row.reason}; {row.remedy}"
