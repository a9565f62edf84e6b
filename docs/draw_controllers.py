"""Draw KL and β against iteration for runs that differ in their controller and seed alone.

Usage: python docs/draw_controllers.py OUT.png RUN RUN ...
Prints each run's overshoot (its largest KL over the target) and the iteration from which on the KL stays within
20 % of the target; a KL is a mean over five consecutive iterations.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import iteration_rows

WINDOW, BAND = 5, 0.2
COLORS = {"adaptive": "#c0392b", "log_pi": "#2458a6", "fixed": "#555555"}
LABELS = {"adaptive": "adaptive (Ziegler)", "log_pi": "log_pi", "fixed": "fixed"}


def smoothed(values: list[float]) -> list[float]:
    """Means over five consecutive iterations."""
    return [mean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def main(out: Path, run_dirs: list[Path]) -> None:
    """Draw and print."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    above, below = figure.subplots(1, 2)
    seen: set[str] = set()
    print("| controller | seed | overshoot | settled at iteration |\n|---|---|---|---|")  # noqa: T201
    for run_dir in run_dirs:
        run = RunFolder.open(run_dir)
        config, rows = run.config, iteration_rows(run)
        name, target = config.kl.controller, config.kl.target
        kl = smoothed([row["kl"] for row in rows])
        outside = [i for i, value in enumerate(kl) if abs(value / target - 1) > BAND]
        settled = outside[-1] + 1 if outside else 0
        shown = str(settled + WINDOW - 1) if settled < len(kl) else "not"
        print(f"| {name} | {config.seed} | {max(kl) / target - 1:+.0%} | {shown} |")  # noqa: T201
        style = {"color": COLORS[name], "lw": 1.4, "label": None if name in seen else LABELS[name]}
        above.plot(range(WINDOW - 1, len(rows)), kl, **style)
        below.plot([row["beta"] for row in rows], **style)
        above.axhline(target, color="#999999", lw=0.8, ls="--")
        seen.add(name)
    for axes, title in ((above, "KL to the reference, nats (mean of five iterations)"), (below, "β")):
        axes.set(title=title, xlabel="iteration")
        axes.spines[["top", "right"]].set_visible(False)
    below.set_yscale("log")
    above.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
