"""The picture of a sweep: score against KL, a point a run, and the mean of each combination with its intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#2458a6", "#c0392b", "#3a8f5c", "#b8860b", "#7d5ba6", "#2a9d9d", "#d2691e", "#6b6b6b")
MARKS = ("o", "s", "D", "^", "v", "P")
"""Colours and marks change together, so that neither alone has to tell points apart."""
MOST_NAMED = 16
"""Points that a legend names; with more the marks stand for themselves."""


def draw_sweep(summary: Mapping[str, Any], title: str) -> bytes | None:
    """Draw the results of a sweep.

    Args:
        summary: as ``rlhf_core.sweeping.summary.summarize`` gives it.
        title: of the picture.
    Returns: a PNG; None while no run is finished.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    points = [point for point in summary["points"] if point["finished"]]
    if not points:
        return None
    is_named = len(points) <= MOST_NAMED
    figure = Figure(figsize=(9.2 if is_named else 7.6, 4.8), layout="constrained")
    panel = figure.subplots()
    for point in points:
        colour, mark = COLOURS[point["point"] % len(COLOURS)], MARKS[point["point"] // len(COLOURS) % len(MARKS)]
        runs = [run for run in summary["runs"] if run["point"] == point["point"] and run["finished"]]
        if len(runs) > 1:
            panel.plot([r["kl"] for r in runs], [r["score"] for r in runs], mark, color=colour, alpha=0.5,
                       markersize=5, markeredgewidth=0)  # fmt: skip
        kl, score = point["kl"], point["score"]
        is_best = point["point"] == summary["best"]["point"]
        label = _plain(point["label"])
        label += "" if point["finished"] == point["of"] else f" ({point['finished']} of {point['of']} seeds)"
        panel.errorbar(
            kl["mean"], score["mean"], xerr=_reach(kl), yerr=_reach(score), fmt=mark, color=colour, capsize=2.5,
            markersize=7, elinewidth=1.1, label=f"{label}: best" if is_best else label,
        )  # fmt: skip
        if is_best:
            panel.plot(kl["mean"], score["mean"], "o", markersize=15, markerfacecolor="none", markeredgecolor="#222222",
                       markeredgewidth=1.3)  # fmt: skip
    frontier = sorted((p["kl"]["mean"], p["score"]["mean"]) for p in points if p["on_frontier"])
    if len(frontier) > 1:
        panel.plot([kl for kl, _ in frontier], [score for _, score in frontier], color="#222222", linewidth=0.9,
                   linestyle=(0, (2, 3)), zorder=0, label="no other has more at less KL")  # fmt: skip
    _draw_criterion(panel, summary)
    panel.set(xlabel="KL to the reference at the end, nats per response", ylabel="mean score at the end")
    num_seeds = len(summary["seeds"])
    means = f"{num_seeds} seeds, means ± 95 %" if num_seeds > 1 else "one seed"
    panel.set_title(f"{_plain(title)}: {means}", loc="left", fontsize=10, color="#555555")
    panel.grid(visible=True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if is_named:
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140)
    return drawn.getvalue()


def _draw_criterion(panel: Any, summary: Mapping[str, Any]) -> None:
    """The KL that was allowed, or the line of what is worth as much as the best point."""
    best, criterion = summary["best"]["point"], summary["criterion"]
    if criterion["at_kl"] is not None:
        panel.axvline(criterion["at_kl"], color="#888888", linewidth=0.9, linestyle="--", zorder=0,
                      label=f"KL at most {criterion['at_kl']:g}")  # fmt: skip
    elif best is not None and criterion["price"] > 0:
        point = summary["points"][best]
        panel.axline((point["kl"]["mean"], point["score"]["mean"]), slope=criterion["price"], color="#888888",
                     linewidth=0.9, linestyle="--", zorder=0,
                     label=f"worth as much at {criterion['price']:g} a nat")  # fmt: skip


def _plain(text: str) -> str:
    """A text in which no dollar sign begins a formula."""
    return text.replace("$", r"\$")


def _reach(interval: Mapping[str, float | None]) -> Sequence[Sequence[float]] | None:
    """Error bars below and above; none of one seed."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    return None if mean is None or low is None or high is None else [[mean - low], [high - mean]]
