"""The Markdown table and the picture of a benchmark's JSON record: ``python benchmarks/report.py RECORD.json``."""

import json
import sys
from pathlib import Path

DENSE = "dense Megatron-core"


def write(path: Path) -> None:
    """``RECORD.md`` and, where matplotlib is installed, ``RECORD.png`` next to the record."""
    record = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(record, path.stem))
    try:
        plot(record, path.with_suffix(".png"))
    except ImportError:
        print(f"matplotlib is not installed: run `python benchmarks/report.py {path}` where it is")


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
    for row in run["candidates"]:
        if row["kernels"]:
            lines += ["", f"Kernels of one step, {row['name']}:", "", "| kernel | calls | ms |", "|---|---|---|"]
            lines += [f"| `{kernel[:90]}` | {calls} | {ms:.3f} |" for kernel, calls, ms in row["kernels"][:14]]
            lines.append(f"| all | | {sum(ms for _, _, ms in row['kernels']):.3f} |")
    return lines


def plot(record: dict, path: Path) -> None:
    """Time over memory, both relative to dense: a panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(record["runs"]), figsize=(7 * len(record["runs"]), 5.5), squeeze=False)
    for panel, run in zip(panels[0], record["runs"], strict=True):
        dense = next(row for row in run["candidates"] if row["name"] == DENSE)
        frontier = []
        for row in run["candidates"]:
            if ", fp32" in row["name"]:
                continue
            memory, time = row["memory_mib"] / dense["memory_mib"], row["median"] / dense["median"]
            ours = row["name"].startswith("ours")
            panel.scatter(memory, time, color="tab:green" if ours else "tab:gray", zorder=3)
            panel.annotate(row["name"].removeprefix("ours: "), (memory, time), (5, 4), textcoords="offset points", fontsize=7)
            if "TiledMLP" in row["name"] and ours:
                frontier.append((memory, time))
        panel.plot(*zip(*sorted(frontier), strict=True), color="tab:green", linewidth=0.8)
        panel.set_title(f"h={run['hidden_size']}, ffn={run['ffn_hidden_size']}, {run['tokens']} tokens, {run['gpu']}")
        panel.set_xlabel("peak memory beyond weight gradients, of dense")
        panel.set_ylabel("time forward + backward, of dense")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
