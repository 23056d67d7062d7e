"""The page and the picture of a benchmark's JSON record: ``python -m benchmarks.mlp_report RECORD.json``."""

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.record import Origin, kernel_lines

DENSE = "dense Megatron-core"
MEMORY = "memory_with_main_grad_mib"


def write(path: Path) -> None:
    """``RECORD.md`` and, where matplotlib is installed, ``RECORD.png`` next to the record."""
    record = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(record, path.stem))
    try:
        plot(record).savefig(path.with_suffix(".png"), dpi=130)
    except ImportError:
        print(f"matplotlib is not installed: run `python -m benchmarks.mlp_report {path}` where it is")


def markdown(record: dict, stem: str) -> str:
    lines = [
        *Origin(**record["origin"]).head("SwiGLU MLP forward + backward"),
        "bf16, random data; medians of interleaved runs in random order, one process a size. Memory: the peak beyond",
        "weights, input and output gradient, less the bytes of the weight gradients, which are made anew by each step;",
        "'with main_grad': the same where gradients are held all the time and added to, as Megatron's DDP does (ours:",
        "fused, peers: a hook), and nothing is subtracted. Errors: relative RMS against float64, over dense's, of the",
        "output and of the gradients of input (dx), fc1 (dU) and fc2 (dW).",
        "",
        f"![time and memory]({stem}.png)",
    ]
    for paragraph in record.get("notes", []):
        lines += ["", paragraph]
    for run in record["runs"]:
        lines += ["", *_section(run)]
    return "\n".join(lines) + "\n"


def _section(run: dict) -> list[str]:
    dense = next(row for row in run["candidates"] if row["name"] == DENSE)
    title = f"## h={run['hidden_size']}, ffn={run['ffn_hidden_size']}, {run['tokens']} tokens, {run['repeats']} runs"
    lines = [
        title, "",
        "| | ms (± half the quartiles' distance) | time | MiB | memory | with main_grad | error: y, dx, dU, dW |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in run["candidates"]:
        ratios = ", ".join(f"{row['errors'][name] / dense['errors'][name]:.2f}" for name in row["errors"])
        lines.append(
            f"| {row['name']} | {row['median']:.2f} ± {row['spread']:.2f} | {row['median'] / dense['median']:.3f} "
            f"| {row['memory_mib']:.0f} | {row['memory_mib'] / dense['memory_mib']:.3f} "
            f"| {row['memory_with_main_grad_mib']:.0f} | {ratios} |"
        )
    absolute = ", ".join(f"{name} {value:.2e}" for name, value in dense["errors"].items())
    lines += ["", f"Dense's errors: {absolute}."]
    lines += [f"Left out: {name} ({reason})." for name, reason in run["missing"].items()]
    if run["activations"]:
        lines += ["", "Activation kernels of a feature tile, TB/s (each operand read or written once):", ""]
        lines += ["| | features | forward | backward |", "|---|---|---|---|"]
        lines += [f"| {name} | {width} | {fwd:.2f} | {bwd:.2f} |" for name, width, fwd, bwd in run["activations"]]
    for row in run["candidates"]:
        if row["kernels"]:
            lines += kernel_lines(f"Kernels of one step, {row['name']}", row["kernels"][:14])
            lines.append(f"| all | | {sum(ms for _, _, ms in row['kernels']):.3f} |")
    return lines


def plot(record: dict) -> Any:
    """Time over memory, both relative to dense: a panel a size. The line joins what nothing beats on both axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(record["runs"]), figsize=(7 * len(record["runs"]), 6), squeeze=False)
    named: dict[Any, dict[str, tuple[float, float]]] = {}
    for panel, run in zip(panels[0], record["runs"], strict=True):
        dense = next(row for row in run["candidates"] if row["name"] == DENSE)
        points = {
            row["name"]: (row[MEMORY] / dense[MEMORY], row["median"] / dense["median"])
            for row in run["candidates"]
            if ", fp32" not in row["name"]
        }
        for name, point in points.items():
            panel.scatter(*point, color="tab:green" if name.startswith("ours") else "tab:gray", zorder=3)
        frontier = [point for point in points.values() if not any(_better(other, point) for other in points.values())]
        panel.plot(*zip(*sorted(frontier), strict=True), color="tab:green", linewidth=0.8)
        panel.set_title(f"h={run['hidden_size']}, ffn={run['ffn_hidden_size']}, {run['tokens']} tokens, {run['gpu']}")
        panel.set_xlabel("peak memory beyond weights and main_grad, of dense")
        panel.set_ylabel("time forward + backward, of dense")
        panel.margins(0.12)
        panel.grid(alpha=0.3)
        named[panel] = points
    figure.tight_layout()
    for panel, points in named.items():  # when all sizes are settled
        label(panel, points)
    return figure


def _better(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def label(panel: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside the points of a panel, each at the nearest place where it covers no point and no other name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = panel.figure.canvas.get_renderer()
    pixels = panel.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    for name, point in points.items():
        text = name.removeprefix("ours: ").replace("Megatron-core, ", "")
        line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        note = panel.annotate(text, point, (0, 0), textcoords="offset points", fontsize=7, arrowprops=line)
        for offset, side, height in _places():
            note.set(position=offset, horizontalalignment=side, verticalalignment=height)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1)
            inside = panel.bbox.contains(box.x0, box.y0) and panel.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            raise ValueError(f"no room in the picture for {name!r}")


def _places() -> Iterator[tuple[tuple[float, float], str, str]]:
    """Offsets from a point, in points of 1/72 inch, with the side of the text that is there; the nearest first."""
    for distance in range(6, 120, 6):
        for x, y in product((1, -1, 0), (0, 1, -1)):
            if x or y:
                side, height = {1: "left", -1: "right", 0: "center"}[x], {1: "bottom", -1: "top", 0: "center"}[y]
                yield (x * distance, y * distance), side, height


if __name__ == "__main__":
    parser = ArgumentParser(description="The page and the picture of a benchmark's JSON record.")
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    write(parser.parse_args().record)
