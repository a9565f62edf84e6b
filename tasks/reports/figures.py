"""The picture of a run: score, KL, β and length by iteration; and that of an evaluation: score against KL."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.comparing.outcome import smoothed
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import BLENDED, split_name
from rlhf_core.inspection import iteration_rows

SMOOTHING = 5
"""Iterations averaged on smooth lines."""


def draw_run(run: RunFolder, path: Path) -> bool:
    """Draw score, KL against its target, β and response length to a PNG. Returns False before the first iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = iteration_rows(run)
    if not rows:
        return False
    steps = [row["iteration"] for row in rows]
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    for panel, column, title, unit in zip(
        panels,
        ("score", "kl", "beta", "length"),
        ("Score", "KL to the reference", "KL coefficient β", "Response length"),
        ("mean score", "nats per response", "β", "tokens"),
        strict=True,
    ):
        values = [row[column] for row in rows]
        panel.plot(steps, values, color="#2458a6", linewidth=1, alpha=0.35)
        panel.plot(steps, smoothed(values, SMOOTHING), color="#2458a6", linewidth=1.8)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("iteration")
        panel.set_ylabel(unit)
        panel.grid(visible=True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if run.config.kl.held_at is not None:
        panels[1].axhline(run.config.kl.target, color="#c0392b", linestyle="--", linewidth=1, label="target")
        panels[1].legend(frameon=False)
    panels[1].set_ylim(bottom=min(0.0, *(row["kl"] for row in rows)))
    panels[2].set_ylim(bottom=0.0)
    title = f"{run.path.name}   thick: means of {SMOOTHING} iterations"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="#555555", parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    write_file(path, drawn.getvalue())
    return True


def draw_evaluation(
    numbers: Mapping[str, Any], frontier: Sequence[Mapping[str, Any]], path: Sequence[tuple[float, float]]
) -> bytes:
    """Draw score against KL: what is attainable, best-of-n, the training path, and what was evaluated.

    Args:
        numbers: the summary of an evaluation.
        frontier: rows of increasing KL.
        path: (KL, score) of each training iteration; empty without a run.
    Returns: a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    panel = figure.subplots()
    trusted = [row for row in frontier if row["trusted"]]
    beyond = trusted[-1:] + [row for row in frontier if not row["trusted"]]
    panel.plot([r["kl"] for r in trusted], [r["score"] for r in trusted], color="#222222", linewidth=1.8,
               label="attainable")  # fmt: skip
    if len(beyond) > 1:
        panel.plot([r["kl"] for r in beyond], [r["score"] for r in beyond], color="#222222", linewidth=1.2,
                   linestyle=(0, (2, 3)), label=f"beyond what {numbers['reference_samples']} samples tell")  # fmt: skip
    best = numbers["best_of_n"]
    panel.plot([b["kl"] for b in best], [b["score"]["mean"] for b in best], "D", color="#b8860b", markersize=4.5,
               label="best-of-n of the reference")  # fmt: skip
    for row in best:
        panel.annotate(str(row["n"]), (row["kl"], row["score"]["mean"]), xytext=(3, -10), textcoords="offset points",
                       fontsize=7.5, color="#8a6508")  # fmt: skip
    smooth = [path[i : i + SMOOTHING] for i in range(len(path) - SMOOTHING + 1)]
    if smooth:
        panel.plot([sum(k for k, _ in part) / SMOOTHING for part in smooth],
                   [sum(s for _, s in part) / SMOOTHING for part in smooth],
                   color="#7fa3d6", linewidth=1.2, label=f"training, mean of {SMOOTHING} iterations")  # fmt: skip
    found = list(numbers["policies"].items())
    for i, line in enumerate(blended_lines(numbers)):
        panel.plot([k for k, _ in line], [s for _, s in line], color="#3a8f5c", linewidth=1.2, linestyle="--",
                   label="_" * i + "weights interpolated to the reference")  # fmt: skip
    panel.errorbar(
        [p["kl"]["mean"] for _, p in found],
        [p["score"]["mean"] for _, p in found],
        xerr=_reach([p["kl"] for _, p in found]),
        yerr=_reach([p["score"] for _, p in found]),
        fmt="o", color="#2458a6", capsize=2, markersize=5, elinewidth=1, label="evaluated, 95 %",
    )  # fmt: skip
    for name, policy in found:
        share = policy["share_of_attainable"]
        text = (name.lstrip("0") or "0").replace(BLENDED, " x ")
        text += f": {share['mean']:.0%}" if share else ""
        panel.annotate(text, (policy["kl"]["mean"], policy["score"]["mean"]), xytext=(6, -11),
                       textcoords="offset points", fontsize=8, color="#2458a6")  # fmt: skip
    panel.plot(0, numbers["reference"]["score"]["mean"], "s", color="#c0392b", markersize=6, label="reference")
    panel.set(xlabel="KL to the reference, nats per response", ylabel="mean score", xlim=(-0.1, None))
    prompts = numbers["prompts"]
    title = f"{numbers['run'] or Path(numbers['policy_model']).name} on {prompts['num_prompts']} prompts of "
    panel.set_title(title + Path(prompts["source"]).name, loc="left", fontsize=10, color="#555555")
    panel.grid(visible=True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8.5, loc="lower right")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140)
    return drawn.getvalue()


def blended_lines(numbers: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """(KL, score) from the reference over its interpolations to each policy that has any, in order."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, policy in numbers["policies"].items():
        line = lines.setdefault(split_name(name)[0], [(0.0, numbers["reference"]["score"]["mean"])])
        line.append((policy["kl"]["mean"], policy["score"]["mean"]))
    return [line for line in lines.values() if len(line) > 2]


def _reach(intervals: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Error bars below and above."""
    return [[i["mean"] - i["low"] for i in intervals], [i["high"] - i["mean"] for i in intervals]]
