"""Read the losses out of Megatron's log: watch one run, or lay two over each other.

    torchrun ... | python examples/gpt/plot_loss.py follow
    python examples/gpt/plot_loss.py compare tiled.log dense.log loss.png

Needs logs of --log-interval 1. (The second loss that Megatron logs is the mean of two iterations, in any run.)
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

LOSS = re.compile(r" iteration +(\d+)/ *(\d+) .* lm loss: (\S+)")
# what megatron_tiling prints: its messages, the startup table of modules, shapes and grids, and what no layer follows
OURS = re.compile(r"megatron_tiling:|module +layers |\S+ +\d+ +\d+ x \d+ |--.* has no effect here: ")


def follow(lines: Iterable[str], every: int) -> None:
    """Print what megatron_tiling says and one loss in `every` as they come, and nothing else."""
    for line in lines:
        if match := LOSS.search(line):
            iteration, last, loss = int(match[1]), int(match[2]), float(match[3])
            if iteration == 1 or iteration % every == 0 or iteration == last:
                print(f"iteration {iteration:4d}/{last}   lm loss {loss:.4f}", flush=True)
        elif OURS.match(line):
            print(line, end="", flush=True)


def read_losses(log: Path) -> dict[int, float]:
    """The loss of each iteration of a run that was logged with --log-interval 1."""
    losses = {int(match[1]): float(match[3]) for match in map(LOSS.search, log.open()) if match}
    if not losses:
        raise ValueError(f"{log}: no losses in it")
    if bad := [iteration for iteration, loss in losses.items() if not math.isfinite(loss)]:
        raise ValueError(f"{log}: the loss is not a number at iteration {bad[0]}")
    return losses


def compare(tiled_log: Path, dense_log: Path, picture: Path) -> str:
    """Draw both curves and their difference; returns a line that sums them up."""
    tiled, dense = read_losses(tiled_log), read_losses(dense_log)
    if tiled.keys() != dense.keys():
        raise ValueError(f"{tiled_log} has {len(tiled)} iterations, {dense_log} {len(dense)}: not comparable")
    iterations = sorted(tiled)
    gaps = [abs(dense[i] - tiled[i]) for i in iterations]
    draw(iterations, [dense[i] for i in iterations], [tiled[i] for i in iterations], gaps, picture)
    first, last, end = iterations[0], iterations[-1], iterations[-20:]
    return (
        f"tiled: first loss {tiled[first]:.4f}, last {tiled[last]:.4f} at iteration {last} "
        f"(mean of the last {len(end)}: {sum(tiled[i] for i in end) / len(end):.4f}); "
        f"largest |dense - tiled| {max(gaps):.1e}; curves in {picture}"
    )


def draw(x: list[int], dense: list[float], tiled: list[float], gaps: list[float], picture: Path) -> None:
    """Dense wide and pale, tiled thin and dark on top of it; below, how far apart they are."""
    import matplotlib  # here, so that `follow` starts at once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    top.plot(x, dense, color="tab:orange", alpha=0.5, linewidth=6, label="dense")
    top.plot(x, tiled, color="tab:blue", linewidth=1.5, label="tiled")
    top.set(ylabel="lm loss", title="The same GPT, dense and with --use-tiled-linear")
    top.legend()
    bottom.plot(x, gaps, color="tab:gray")
    bottom.set(xlabel="iteration", ylabel="|dense - tiled|", ylim=(0, None))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("follow", help="filter a log on its way from a pipe to the terminal")
    watch.add_argument("--every", type=int, default=20, help="iterations from one loss to the next")
    two = commands.add_parser("compare", help="draw two runs and print how far apart they are")
    for name in ("tiled", "dense", "picture"):
        two.add_argument(name, type=Path)
    args = parser.parse_args()
    if args.command == "follow":
        follow(sys.stdin, args.every)
        return
    try:
        print(compare(args.tiled, args.dense, args.picture))
    except (OSError, ValueError) as error:
        sys.exit(f"plot_loss.py: {error}")


if __name__ == "__main__":
    main()
