"""``--picture FILE``: memory over one step, stacked by part; dense above tiled, on one scale.

With ``--measure`` what was allocated is a line over it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tiling.plan.measure import Measured
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


def draw(file: str, runs: Mapping[str, Run], limit: float, found: Mapping[str, Measured] | None = None) -> None:
    """The curves of runs by their names, a line at ``limit`` bytes, and what was measured of some of the runs."""
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
        title = f"{name}: {at.bytes / GIB:.1f} GiB, set by {run.phase}"
        if found and (measured := found.get(name)):
            title += f". Line: measured, {measured.peak / GIB:.1f} GiB, set by {measured.phase}"
            _draw_history(axis, measured, seconds[-1])
        axis.set_title(title, loc="left", fontsize="medium")
        axis.set_ylabel("GiB")
    stretched = ";\nmeasured steps are stretched to the same length" * bool(found)
    axes[-1].set_xlabel(f"milliseconds of the kernels, estimated, of the micro-batches that were looked at{stretched}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)


def _draw_history(axis: Any, measured: Measured, end: float) -> None:
    last = measured.history[-1][0] or 1.0
    times = [end * seconds / last for seconds, _ in measured.history]
    axis.step(times, [size / GIB for _, size in measured.history], where="post", color="black", linewidth=0.8)
