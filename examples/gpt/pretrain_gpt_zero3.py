r"""Pretrain a GPT with DeepSpeed's engine: ZeRO-3 over data-parallel ranks, each of them a tensor-parallel group.

    torchrun --standalone --nproc-per-node 4 -m megatron_tiling examples/gpt/pretrain_gpt_zero3.py \
        --tensor-model-parallel-size 2 --use-tiled-linear --deepspeed-config examples/gpt/zero3.json MEGATRON_FLAGS

Arguments, data sets, model, loss, learning rate and evaluation are Megatron's; the engine owns parameters,
gradients and optimizer states, on the GPU or offloaded. With `--use-tiled-linear` each tile is a parameter of its own,
and no more than two tiles are gathered at a time; without it, this is dense ZeRO-3.

`--save` and `--load` hold DeepSpeed's checkpoints, which continue a run at the same TP size. `--save-dense` and
`--load-dense` hold Megatron's: a stock Megatron run at any TP size loads them with `--load DIR --finetune`.

Hazard: every rank must take the same path through the model, since gathering a parameter is a collective.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize_megatron, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.training import (
    build_train_valid_test_data_iterators,
    evaluate_and_print_results,
    get_optimizer_param_scheduler,
)
from megatron.training.utils import print_rank_last

# The batches and the data sets are those of the example for Megatron's own trainer.
from pretrain_gpt import dataset_kind, datasets_of, get_batch

from megatron_tiling import cpu, zero3
from megatron_tiling.arguments import REFUSED, Refused, refuse
from megatron_tiling.config import TilingConfig
from megatron_tiling.convert import tile
from megatron_tiling.report import table
from megatron_tiling.unused import settings_without_effect
from megatron_tiling.zero3.agreement import require_agreement
from megatron_tiling.zero3.config import engine_config

if __name__ == "__main__" and not torch.cuda.is_available() and not cpu.installed():
    sys.exit(f"No GPU here: start this script with `torchrun ... -m megatron_tiling {sys.argv[0]} ...`")

TILING_FLAGS = ("use_tiled_linear", "tile_factor", "tiled_linear_modules", "tiled_linear_splits")
"""What decides which parameters there are, the same on every rank or the run would hang."""

_OWN_LOOP = "the loop of this script does not look at it"
_WHOLE_CHECKPOINTS = "--load continues a run with all of its states"
REFUSED_HERE = (
    Refused("--optimizer", "this script trains with AdamW", (None, "adam")),
    Refused("--pretrained-checkpoint", "the engine loads no Megatron checkpoint", remedy="give --load-dense"),
    Refused("--finetune", _WHOLE_CHECKPOINTS, remedy="give --load-dense to start from weights"),
    Refused("--no-load-optim", _WHOLE_CHECKPOINTS, remedy="give --load-dense to start from weights"),
    Refused("--no-load-rng", _WHOLE_CHECKPOINTS),
    Refused("--no-save-optim", _WHOLE_CHECKPOINTS, remedy="give --save-dense for weights alone"),
    Refused("--no-save-rng", _WHOLE_CHECKPOINTS),
    Refused("--ckpt-step", "the engine loads its latest checkpoint"),
    Refused("--train-samples", "this script counts iterations", remedy="give --train-iters"),
    Refused("--exit-duration-in-mins", _OWN_LOOP, remedy="give --exit-interval"),
    Refused("--exit-signal-handler", _OWN_LOOP),
    Refused("--check-for-spiky-loss", _OWN_LOOP),
    Refused("--save-retain-interval", _OWN_LOOP),
    Refused("--non-persistent-save-interval", _OWN_LOOP),
    Refused("--profile", _OWN_LOOP),
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.set_defaults(gradient_accumulation_fusion=False)  # the engine collects gradients, there is no main_grad
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed-config", required=True, metavar="JSON", help="engine configuration, ZeRO stage 3")
    group.add_argument("--save-dense", metavar="DIR", help="write a dense Megatron checkpoint here at the end")
    group.add_argument("--load-dense", metavar="DIR", help="start from the weights of a dense Megatron checkpoint")
    return parser


def make_optimizer(args: Any, config: zero3.Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, as Megatron's; DeepSpeed's own where it is offloaded, unless the configuration allows torch's."""
    options = {"lr": args.lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
    offloaded = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloaded and config.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def build_model(args: Any, config: zero3.Config) -> torch.nn.Module:
    """Megatron's GPTModel, its parameters partitioned, its linear layers tiled if asked for."""
    model_config = gpt_config_from_args(args)
    builder = GPTModelBuilder(model_config)

    def build() -> torch.nn.Module:
        model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
        if args.use_tiled_linear:
            tiling = TilingConfig.from_args(args, storage="partitioned")
            reports = tile(model, tiling)
            lines = [table(reports), *settings_without_effect(tiling, reports)]
            print_rank_0("megatron_tiling: tiled linear layers:\n" + "\n".join(lines))
        return model

    return zero3.build(build, model_config.transformer, config)


def train_step(engine: Any, data: Iterator[dict] | None, micro_batches: int) -> torch.Tensor:
    """Forward and backward of a global batch, and the optimizer's step. Returns [sum of losses, tokens]."""
    logged = torch.zeros(2, device=engine.device)
    for _ in range(micro_batches):
        total, tokens = batch_loss(engine, data)
        engine.backward(total / tokens)
        engine.step()  # changes parameters after the last of the micro-batches only
        logged += torch.stack([total.detach(), tokens])
    torch.distributed.all_reduce(logged, group=mpu.get_data_parallel_group())
    return logged


def batch_loss(engine: Any, data: Iterator[dict] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the unmasked tokens' losses of one micro-batch, and their number."""
    batch = get_batch(data, engine.module.config, None)
    mask = batch["loss_mask"]
    losses = engine(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    mask = mask.reshape(-1).float()
    return torch.sum(losses.reshape(-1).float() * mask), mask.sum()


def evaluate(engine: Any, data: Any, prefix: str, iteration: int, verbose: bool = False) -> None:
    """As Megatron's trainer evaluates, `--eval-iters` global batches, and prints it."""

    def step(data: Any, model: torch.nn.Module) -> Any:
        total, tokens = batch_loss(engine, data)
        return total, lambda total: (total, tokens.int(), {"lm loss": torch.stack([total, tokens])})

    model = engine.module
    evaluate_and_print_results(prefix, step, data, [model], iteration, None, model.config, verbose=verbose)


def log(args: Any, iteration: int, engine: Any, logged: torch.Tensor, seconds: float) -> None:
    """A line as Megatron's trainer prints it."""
    norm, rate = engine.get_global_grad_norm(), engine.optimizer.param_groups[0]["lr"]
    print_rank_last(
        f" [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {iteration:8d}/{args.train_iters:8d} |"
        f" consumed samples: {args.consumed_train_samples:12d} | elapsed time per iteration (ms): {seconds * 1e3:.1f} |"
        f" learning rate: {rate:.6E} | global batch size: {args.global_batch_size:5d} |"
        f" lm loss: {float(logged[0] / logged[1]):.6E} | loss scale: {float(engine.optimizer.cur_scale):.1f} |"
        f" grad norm: {float(norm):.3f} | number of skipped iterations: {engine.skipped_steps:3d} |"
    )


def random_states() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def save(args: Any, engine: Any, scheduler: Any, iteration: int) -> None:
    state = {
        "iteration": iteration,
        "consumed_train_samples": args.consumed_train_samples,
        "learning_rate": scheduler.state_dict(),
        "random": random_states(),
    }
    engine.save_checkpoint(args.save, tag=f"iter_{iteration:07d}", client_state=state)


def load(args: Any, engine: Any, scheduler: Any) -> dict[str, Any] | None:
    """Continue from DeepSpeed's checkpoint in `--load`, if there is one yet. Returns its random states."""
    try:
        path, state = zero3.load_checkpoint(engine, args.load)
    except ValueError as error:
        sys.exit(f"megatron_tiling: --load {args.load}: {error}; here by --save-dense, --load-dense")
    if path is None:
        print_rank_0(f"no checkpoint in --load {args.load}: starting from the beginning")
        return None
    args.iteration, args.consumed_train_samples = state["iteration"], state["consumed_train_samples"]
    scheduler.load_state_dict(state["learning_rate"])
    random: dict[str, Any] = state["random"]
    return random


def train(args: Any, engine: Any, scheduler: Any) -> int:
    """Returns the last iteration."""
    args.iteration = 0
    random = load(args, engine, scheduler) if args.load else None
    data, validation, test = build_train_valid_test_data_iterators(datasets_of(dataset_kind(args)))
    if random is not None:  # now that the data loaders have drawn their seeds
        restore_random_states(random)
    micro_batches = args.global_batch_size // (args.micro_batch_size * mpu.get_data_parallel_world_size())
    engine.train()
    evaluates = args.do_valid and args.eval_interval
    iteration, start, last = args.iteration, time.time(), not args.do_train
    while iteration < args.train_iters and not last:
        logged = train_step(engine, data, micro_batches)
        scheduler.step(increment=args.global_batch_size)
        iteration += 1
        args.consumed_train_samples += args.global_batch_size
        if iteration % args.log_interval == 0:
            log(args, iteration, engine, logged, (time.time() - start) / args.log_interval)
            start = time.time()
        if evaluates and iteration % args.eval_interval == 0 and iteration >= (args.start_eval_at_iter or 0):
            evaluate(engine, validation, f"iteration {iteration}", iteration)
        last = iteration == args.train_iters or (args.exit_interval and iteration % args.exit_interval == 0)
        if args.save and (last or (args.save_interval and iteration % args.save_interval == 0)):
            save(args, engine, scheduler, iteration)
    if not args.do_train or iteration == args.train_iters:
        for wanted, samples, name in ((args.do_valid, validation, "validation"), (args.do_test, test, "test")):
            if wanted:
                evaluate(engine, samples, f"iteration {iteration} on {name} set", iteration, verbose=True)
    return iteration


def main() -> None:
    args = parse_and_validate_args(add_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    try:
        refuse(args, (*REFUSED["ZeRO-3"], *REFUSED_HERE), "ZeRO-3")
        initialize_megatron(allow_no_cuda=True)
        require_agreement({"--" + name.replace("_", "-"): getattr(args, name) for name in TILING_FLAGS})
        config = engine_config(args.deepspeed_config, args, mpu.get_data_parallel_world_size())
        model = build_model(args, config)
        if args.load_dense:
            zero3.load_dense(model, args.load_dense)
        engine = zero3.initialize(model, lambda groups: make_optimizer(args, config, groups), config)
    except ValueError as error:  # a bad setting: what is wrong, not where it was found
        sys.exit(f"megatron_tiling: {error}")
    scheduler = get_optimizer_param_scheduler(engine.optimizer)
    iteration = train(args, engine, scheduler)
    if args.save_dense:
        zero3.save_dense(model, args.save_dense, iteration)


if __name__ == "__main__":
    main()
