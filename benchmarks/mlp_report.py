"""The Markdown table and the picture of a benchmark's JSON record: ``python -m benchmarks.mlp_report RECORD.json``."""

import json
import sys
from pathlib import Path

DENSE = "dense Megatron-core"
MEMORY = "memory_with_main_grad_mib"


def write(path: Path) -> None:
    """``RECORD.md`` and, where matplotlib is installed, ``RECORD.png`` next to the record."""
    record = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(record, path.stem))
    try:
        plot(record, path.with_suffix(".png"))
    except ImportError:
        print(f"matplotlib is not installed: run `python -m benchmarks.mlp_report {path}` where it is")


def markdown(record: dict, stem: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# SwiGLU MLP forward + backward, {record['date']}",
        "",
        f"{record['runs'][0]['gpu']}; {versions}. Command: `{record['command']}`",
        "",
        "bf16, random data; medians of interleaved runs in random order, one process a size. Memory: the peak beyond",
        "weights, input and output gradient, less the bytes of the weight gradients, which are made anew by each step;",
        "'with main_grad': the same where gradients are held all the time and added to, as Megatron's DDP does (ours:",
        "fused, peers: a hook), and nothing is subtracted. Errors: relative RMS against float64, over dense's, of the",
        "output and of the gradients of input (dx), fc1 (dU) and fc2 (dW).",
        "",
        f"![time and memory]({stem}.png)",
    ]
    if note := record.get("note"):
        lines += ["", note]
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
    lines += ["", "Activation kernels of a feature tile, TB/s (each operand read or written once):", ""]
    lines += ["| | features | forward | backward |", "|---|---|---|---|"]
    lines += [f"| {name} | {width} | {fwd:.2f} | {bwd:.2f} |" for name, width, fwd, bwd in run["activations"]]
    for row in run["candidates"]:
        if row["kernels"]:
            lines += ["", f"Kernels of one step, {row['name']}:", "", "| kernel | calls | ms |", "|---|---|---|"]
            lines += [f"| `{kernel[:90]}` | {calls} | {ms:.3f} |" for kernel, calls, ms in row["kernels"][:14]]
            lines.append(f"| all | | {sum(ms for _, _, ms in row['kernels']):.3f} |")
    return lines


def plot(record: dict, path: Path) -> None:
    """Time over memory, both relative to dense: a panel a size. The line joins what nothing beats on both axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(record["runs"]), figsize=(7 * len(record["runs"]), 5.5), squeeze=False)
    for panel, run in zip(panels[0], record["runs"], strict=True):
        dense = next(row for row in run["candidates"] if row["name"] == DENSE)
        points = {
            row["name"]: (row[MEMORY] / dense[MEMORY], row["median"] / dense["median"])
            for row in run["candidates"]
            if ", fp32" not in row["name"]
        }
        for name, (memory, time) in points.items():
            panel.scatter(memory, time, color="tab:green" if name.startswith("ours") else "tab:gray", zorder=3)
            label, left = name.removeprefix("ours: ").replace("Megatron-core, ", ""), memory > 0.85
            offset, side = ((-6, 3), "right") if left else ((6, 3), "left")
            panel.annotate(label, (memory, time), offset, textcoords="offset points", ha=side, fontsize=7)
        frontier = [point for point in points.values() if not any(_better(other, point) for other in points.values())]
        panel.plot(*zip(*sorted(frontier), strict=True), color="tab:green", linewidth=0.8)
        panel.set_title(f"h={run['hidden_size']}, ffn={run['ffn_hidden_size']}, {run['tokens']} tokens, {run['gpu']}")
        panel.set_xlabel("peak memory beyond weights and main_grad, of dense")
        panel.set_ylabel("time forward + backward, of dense")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _better(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] <= point[1]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
