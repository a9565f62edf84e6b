"""Draw score against iteration and against KL for several runs of one config, with the attainable frontier.

Usage: python docs/draw_seeds.py OUT.png FRONTIER.json RUN RUN ...
Prints each run's best mean score over five consecutive iterations, among those with a mean KL of at most 10 nats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import iteration_rows

WINDOW, KL_LIMIT = 5, 10.0
COLORS = ("#2458a6", "#c0392b", "#2e8b57", "#b8860b", "#7b3fa0", "#555555")


def windows(run_dir: Path) -> list[tuple[float, float]]:
    """(score, KL), each a mean over five consecutive iterations."""
    rows = iteration_rows(RunFolder.open(run_dir))
    parts = [rows[i : i + WINDOW] for i in range(len(rows) - WINDOW + 1)]
    return [(mean(r["score"] for r in part), mean(r["kl"] for r in part)) for part in parts]


def main(out: Path, frontier: Path, run_dirs: list[Path]) -> None:
    """Draw and print."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_step, by_kl = figure.subplots(1, 2)
    for color, run_dir in zip(COLORS, run_dirs, strict=False):
        seed = RunFolder.open(run_dir).config.seed
        path = windows(run_dir)
        steps = range(WINDOW - 1, WINDOW - 1 + len(path))
        by_step.plot(steps, [s for s, _ in path], color=color, label=f"seed {seed}")
        by_kl.plot([k for _, k in path], [s for s, _ in path], color=color, linewidth=1)
        score, kl = max((s, k) for s, k in path if k <= KL_LIMIT)
        print(f"seed {seed}: best {score:.2f} at {kl:.2f} nats; last {path[-1][0]:.2f} at {path[-1][1]:.2f} nats")  # noqa: T201
    attainable = json.loads(frontier.read_text())["rows"]
    by_kl.plot([r["kl"] for r in attainable], [r["score"] for r in attainable], "k--", label="attainable")
    by_step.axhline(3.0, color="#999999", linewidth=0.8)
    by_step.set(xlabel="iteration (64 responses each)", ylabel="score, mean of five iterations")
    by_kl.set(xlabel="KL to the reference, nats a response", ylabel="score", xlim=(0, None))
    for panel in (by_step, by_kl):
        panel.legend(frameon=False)
        panel.grid(visible=True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
