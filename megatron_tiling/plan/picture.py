"""``--picture FILE``: memory over one step, stacked by part; dense above tiled, on one scale."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from megatron_tiling.plan.run import Run

GIB = 2**30
#: Parts below this share of the highest peak are drawn as one.
SMALL = 0.005
SMALL_PARTS = "what is small"


def reason_not_to_draw(file: str) -> str:
    """Why there will be no picture, before any time is spent on it; empty if there will."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--picture needs matplotlib: pip install 'megatron-tiling[benchmarks]'"
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix[1:].lower() not in known:
        return f"--picture {file}: must end in one of .{', .'.join(sorted(known))}"
    if not Path(file).parent.is_dir():
        return f"--picture {file}: there is no folder {Path(file).parent}"
    return ""


def draw(file: str, runs: Mapping[str, Run], limit: float) -> None:
    """The curves of runs by their names, and a line at ``limit`` bytes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    highest = max(run.peak for run in runs.values())
    largest: dict[str, int] = {}
    for run in runs.values():
        for point in run.curve:
            for part, size in point.parts.items():
                largest[part] = max(size, largest.get(part, 0))
    # What stays the same is at the bottom: first what is no activation.
    steady = {part: min(point.parts.get(part, 0) for run in runs.values() for point in run.curve) for part in largest}
    shown = sorted(
        (part for part, size in largest.items() if size >= SMALL * highest),
        key=lambda part: (":" in part, -steady[part], -largest[part]),
    )
    palette = [colormaps[name](color) for name in ("tab20", "tab20b") for color in range(20)]
    colors = dict(zip([*shown, SMALL_PARTS], palette, strict=False))
    figure = Figure(figsize=(11, 4 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        seconds = [1e3 * point.seconds for point in run.curve]
        sizes = [[point.parts.get(part, 0) / GIB for point in run.curve] for part in shown]
        rest = [point.bytes / GIB - sum(each) for point, each in zip(run.curve, zip(*sizes, strict=True), strict=True)]
        axis.stackplot(seconds, [*sizes, rest], labels=colors, colors=colors.values(), step="post", linewidth=0)
        at = max(run.curve, key=lambda point: point.bytes)
        axis.plot(1e3 * at.seconds, at.bytes / GIB, "k.")
        axis.axhline(limit / GIB, color="black", linestyle="dashed", linewidth=1)
        axis.set_title(f"{name}: {at.bytes / GIB:.1f} GiB, set by {run.phase}", loc="left")
        axis.set_ylabel("GiB")
    axes[-1].set_xlabel("milliseconds of the kernels, estimated, of the micro-batches that were looked at")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
