"""The page and the picture of a record of ``tp_overlap``, or of several as one, which then is written too.

    python -m benchmarks.tp_overlap_report RECORD.json
    python -m benchmarks.tp_overlap_report RECORD.json RECORD.json ... --into RECORD.json

Sizes that take a process each become one page so.
"""

import json
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from benchmarks.record import Origin

DENSE = "TransformerEngine"
DENSE_STILL = "TransformerEngine, without communication"
USERBUFFERS, FUSED_OPS = "TransformerEngine, --tp-comm-overlap", "torch's fused ops"
PEERS = USERBUFFERS, FUSED_OPS
OURS = "ours, whole"
TRACED = (DENSE, OURS, "ours, 4 steps", "ours, 4 steps, by NCCL")
COLOURS = {"products": "tab:blue", "NCCL": "tab:red", "copies": "tab:green", "barriers": "black", "others": "tab:gray"}


def write(path: Path) -> str:
    """``RECORD.md`` and, where matplotlib is installed, ``RECORD.png`` next to the record; the page."""
    record = json.loads(path.read_text())
    page = markdown(record, path.stem)
    path.with_suffix(".md").write_text(page)
    if any(run["traces"] for run in record["runs"]):
        try:
            draw(next(run for run in record["runs"] if run["traces"])).savefig(path.with_suffix(".png"), dpi=130)
        except ImportError:
            print(f"matplotlib is not installed: run `python -m benchmarks.tp_overlap_report {path}` where it is")
    return page


def joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record with the runs of all, and the traces of the first: of sizes that take a process each.

    Raises:
        ValueError: they differ in more than commands and runs.
    """
    first, *others = records
    for other in others:
        for key in first["origin"].keys() - {"command"}:
            if other["origin"][key] != first["origin"][key]:
                raise ValueError(f"{key}: {first['origin'][key]!r} and {other['origin'][key]!r}; pages of their own")
        for key in (first.keys() | other.keys()) - {"origin", "runs"}:
            if other.get(key) != first.get(key):
                raise ValueError(f"{key}: {first.get(key)!r} and {other.get(key)!r}; pages of their own")
    commands = "\n    ".join(record["origin"]["command"] for record in records)
    runs = [run if record is first else run | {"traces": {}} for record in records for run in record["runs"]]
    return first | {"origin": first["origin"] | {"command": commands}, "runs": runs}


def markdown(record: dict[str, Any], stem: str) -> str:
    connections = f"CUDA_DEVICE_MAX_CONNECTIONS={record.get('connections', 1)}"
    setting = f"TP={record['tp']} with sequence parallelism, {connections}, main_grad held"
    what, measured = "an MLP", "fc1 with its norm, SwiGLU and fc2"
    if record.get("what") == "layer":
        what = "a transformer layer"
        measured = f"{what}: RMSNorm, rotary positions, {record['query_groups']} query groups, SwiGLU; causal "
        measured += f"attention ({record['attention']}) in sequences of {record['sequence']} tokens"
    lines = [
        *Origin(**record["origin"]).head(f"Communication beside {what}'s products", setting),
        f"Forward and backward of {measured}, bf16, random data; medians of {record['repeats']} "
        "interleaved runs, of the slowest rank. Exposed: the time above dense without communication, over dense's. "
        "Host: the CPU's time to launch one step, for which ms do not wait. "
        "MiB: the peak beyond weights, gradients and input; held: what stays between steps besides, symmetric memory "
        "and Megatron's buffer for gathers, which other layers use too. Differences: relative RMS from dense's output, "
        f"and the largest of those of the gradients. Steps move their bytes by {record['transport']}, unless said.",
    ]
    for run in record["runs"]:
        lines += ["", *_section(run)]
    if any(run["traces"] for run in record["runs"]):
        lines += ["", f"![kernels and copies of one step, by stream]({stem}.png)"]
    return "\n".join(lines) + "\n"


def _section(run: dict[str, Any]) -> list[str]:
    medians = {row["name"]: statistics.median(row["milliseconds"]) for row in run["rows"]}
    dense, floor = medians[DENSE], medians[DENSE_STILL]
    lines = [
        f"## h={run['shape'][0]}, ffn={run['shape'][1]}, {run['tokens']} tokens", "",
        "| | ms (quartiles) | time | exposed | host, ms | MiB | held | output | gradients |", "|---" * 9 + "|",
    ]  # fmt: skip
    for row in run["rows"]:
        median, (low, _, high) = medians[row["name"]], statistics.quantiles(row["milliseconds"], n=4)
        exposed = (median - floor) / (dense - floor) if dense > floor else float("nan")
        found = dict(row["differences"])
        host = f"{statistics.median(row['host_milliseconds']):.2f}" if "host_milliseconds" in row else ""
        errors = f"{found.pop('output'):.1e} | {max(found.values()):.1e}" if found else "|"
        lines.append(
            f"| {row['name']} | {median:.2f} ({low:.2f} to {high:.2f}) | {median / dense:.3f} | {exposed:.2f} | "
            f"{host} | {row['peak_mib']:.0f} | {row['held_mib']:.0f} | {errors} |"
        )
    lines += ["", f"Dense's exposed communication: {dense - floor:.2f} ms, {(dense - floor) / dense:.1%} of it."]
    for name, error in run.get("left_out", {}).items():
        lines += ["", f"Left out: {name}: `{error}`"]
    return lines


def kind(name: str) -> str:
    lowered = name.lower()
    if "nccl" in lowered:
        return "NCCL"
    if "barrier" in lowered or "signal" in lowered:
        return "barriers"
    if lowered.startswith("memcpy"):
        return "copies"
    return "products" if any(part in lowered for part in ("nvjet", "gemm", "cutlass", "xmma")) else "others"


def draw(run: dict[str, Any]) -> Any:
    """Kernels and copies of one step, a panel for each candidate, a line for each stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    traces = run["traces"]
    figure, panels = plt.subplots(len(traces), 1, figsize=(14, 1.7 * len(traces) + 0.8), squeeze=False, sharex=True)
    for panel, (name, events) in zip(panels[:, 0], traces.items(), strict=True):
        streams = sorted({stream for _, stream, _, _ in events})
        for event, stream, start, duration in events:
            of_kind = COLOURS[kind(event)]
            panel.barh(streams.index(stream), duration / 1000, left=start / 1000, height=0.8, color=of_kind)
        end = max(start + duration for _, _, start, duration in events) / 1000
        panel.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
        panel.set_title(f"{name}: {end:.2f} ms", loc="left", fontsize=10)
        panel.invert_yaxis()
    panels[-1, 0].set_xlabel("ms, one forward and backward pass under the profiler, rank 0")
    shape, tokens = run["shape"], run["tokens"]
    figure.suptitle(f"h={shape[0]}, ffn={shape[1]}, {tokens} tokens", x=0.01, horizontalalignment="left")
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="upper right", ncol=len(patches))
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    parser.add_argument("--into", type=Path, metavar="RECORD.json", help="where several become one")
    args = parser.parse_args()
    if (len(args.records) > 1) != (args.into is not None):
        parser.error("several records take --into, one does not")
    if args.into:
        args.into.write_text(json.dumps(joined([json.loads(path.read_text()) for path in args.records])) + "\n")
    print(write(args.into or args.records[0]))
