"""pages.py RESULTS_DIR name=newname ...: copy result pages into the lead worktree, with the hand note where flash ran."""
import sys, json, re
from pathlib import Path
DATE = "2026-11-28"  # of the run
R, D = Path(sys.argv[1]), Path("benchmarks/results")
NOTE = """**Added by hand.** TransformerEngine 2.17.1 hands flash-attn-4 4.0.0b36 the window (-1, 0), which that build takes for one
without keys (TransformerEngine#3528). One line was put into flash-attn-4: a negative left window is none. {more}
"""
for arg in sys.argv[2:]:
    name, new, *more = arg.split("=")
    for p in R.glob(f"{DATE}-{name}.*"):
        q = D / f"{DATE}-{new}{p.suffix}"
        if p.suffix == ".png": q.write_bytes(p.read_bytes()); continue
        t = p.read_text().replace("/tmp/q/", "").replace("/tmp/q", "OUT")
        if p.suffix == ".md" and ("flash-attn-4 4" in t or more):
            note = NOTE.format(more=more[0] if more else "Nothing else ran on the machine.").strip() + "\n" if "flash-attn-4 4" in t else f"**Added by hand.** {more[0]}\n"
            lines = t.split("\n"); i = max(k for k, l in enumerate(lines) if l.startswith("    "))
            t = "\n".join(lines[:i+2]) + "\n" + note + "\n" + "\n".join(lines[i+2:])
        q.write_text(t); print(q)
