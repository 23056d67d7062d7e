"""The planner's own flags, which stand before the script."""

import argparse
import math
from collections.abc import Sequence

from megatron_tiling.plan import routing
from megatron_tiling.plan.automatic import automatic_flags
from megatron_tiling.plan.clock import GPUS
from megatron_tiling.plan.picture import reason_not_to_draw
from megatron_tiling.runner import reason_in_script
from megatron_tiling.trainer.planned import GPU_MEMORY_GIB

USAGE = (
    "python -m megatron_tiling plan [--gpu H100|H200 | --measure] [--gpu-memory-gib N] [--gpus N] [--outside-gib N] "
    "[--expert-imbalance N] [--longest | --picture FILE] [--] SCRIPT [ARGS of the script]"
)
#: By default, of a GPU that is called one of 80 GiB: without NCCL, the largest peak that ran on it was 76.6 GiB, in
#: expandable segments (benchmarks/results/2026-11-27-longest-context-3b.md). What failed beyond has no recorded peak.
OUTSIDE_GIB = 3.5


def gib(text: str) -> float:
    """The value of a flag."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of GiB, such as 80")
    return value


def shared_parser() -> argparse.ArgumentParser:
    """Of flags that say what a run has to fit into, which stand before the script."""
    parser = argparse.ArgumentParser(description="What a training run needs, without a GPU.")
    parser.add_argument(
        "--gpu-memory-gib",
        type=gib,
        help=f"of one GPU (default: {GPU_MEMORY_GIB:g}; with --measure, of the GPUs that are here)",
    )
    parser.add_argument("--gpus", type=int, help="in all (default: as few as the parallelism takes)")
    parser.add_argument(
        "--outside-gib",
        type=gib,
        default=OUTSIDE_GIB,
        help=f"left to what neither torch counts nor this predicts: the driver, NCCL (default: {OUTSIDE_GIB:g})",
    )
    parser.add_argument(
        routing.FLAG,
        type=float,
        help="rows of experts on the fullest rank, relative to a balanced router's (default: 1)",
    )
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def refuse_dashes_behind(parser: argparse.ArgumentParser, argv: Sequence[str], arguments: Sequence[str]) -> None:
    """End at a ``--`` that is the script's: settings are flags that the planner puts behind its arguments.

    Args:
        argv: all there is.
        arguments: those that ``parser`` says are the script's. It leaves out a ``--`` right behind the script.
    """
    before = argv[: len(argv) - len(arguments)]
    if "--" in arguments or before[-1] == "--":
        parser.error(
            "-- among the arguments of the script: flags that the planner puts behind them would be none; leave it "
            "out, or put it before the script, if it is the planner's"
        )


def command_parser() -> argparse.ArgumentParser:
    """Of the user's command: those, and what else it does."""
    parser = shared_parser()
    parser.usage = USAGE
    parser.add_argument("--gpu", choices=GPUS, help="its rates give the times (default: H100)")
    parser.add_argument("--longest", action="store_true", help="the longest sequence that fits, of a few settings")
    parser.add_argument("--picture", metavar="FILE", help="draw memory over a step, dense and tiled: .png, .svg, ...")
    parser.add_argument(
        "--measure", action="store_true", help="also run five steps here, dense and tiled, and time the GPU"
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Of the user's command.

    Raises:
        SystemExit: they do not go together, or there is no such script.
    """
    parser = command_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; those of the script stand behind it")
    refuse_dashes_behind(parser, argv, options.arguments)
    own = set(parser._option_string_actions) - {"-h", "--help"}  # these two a script has, too
    behind = (argument.partition("=")[0] for argument in options.arguments)
    ahead = argv[: -len(options.arguments) - 1]
    if "--" not in ahead and (flag := next((flag for flag in behind if flag in own), None)):
        parser.error(f"{flag} is the planner's: it stands before the script; if the script has one, put -- before it")
    if reason := reason_in_script(options.script):
        parser.error(reason)
    if options.gpu_memory_gib is None and not options.measure:
        options.gpu_memory_gib = GPU_MEMORY_GIB
    if options.gpu_memory_gib is not None and options.gpu_memory_gib <= options.outside_gib:
        parser.error(
            f"--gpu-memory-gib {options.gpu_memory_gib:g}: must be more than --outside-gib {options.outside_gib:g}"
        )
    if options.picture and options.longest:
        parser.error("--picture draws one length: leave out --longest")
    if options.measure and options.longest:
        parser.error("--measure runs one length: leave out --longest")
    if options.measure and options.gpu:
        parser.error(f"--gpu {options.gpu}: --measure times the GPU that is here; leave out one of them")
    if options.picture and (reason := reason_not_to_draw(options.picture)):
        parser.error(reason)
    if options.gpu and options.longest:
        parser.error(f"--gpu {options.gpu}: --longest gives no times; leave out one of them")
    if options.longest and automatic_flags(options.arguments):
        parser.error("--longest: give numbers in the place of auto, which chooses for one length")
    return options
