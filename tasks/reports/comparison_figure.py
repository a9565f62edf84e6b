"""The picture of several runs: score, KL and β by iteration, score against KL, and both tables below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from rlhf_core.comparing.comparison import Comparison
from rlhf_core.comparing.outcome import Outcome, smoothed
from rlhf_core.comparing.presentation import CURVES, Line, difference_lines, group_lines, result_lines

COLORS: Final = ("#2a6fdb", "#e07b00", "#2e9e4f", "#9b51c9", "#b8930b", "#d6336c", "#0f9fb0", "#6b7280")
"""Of the runs, in order, again from the first after the last; each is legible on white and on black."""
INK, DIM = "#1f2430", "#6b7280"
WIDTH, CHARTS_HEIGHT, LINE_HEIGHT = 12.0, 6.8, 0.215
"""Inches."""
WIDEST: Final = 0.2
"""Share of the width that a column takes at most."""
STANDINGS: Final = {"working": "#b54708", "stopped": "#c0362c", "finished": "#1f8a4c"}


def draw_comparison(compared: Comparison) -> bytes:
    """Draw a comparison. Returns: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    tables = [
        ("Results: means of the last " + f"{compared.last} iterations ± std", names(compared), result_lines(compared))
    ]
    if found := difference_lines(compared):
        tables.insert(0, ("Configs: what differs", names(compared), found))
    if compared.groups:
        heads = [(group.name, INK) for group in compared.groups]
        tables.append(("Across seeds: mean ± std over runs", heads, group_lines(compared)))
    num_lines = sum(len(lines) + 3 for _, _, lines in tables) + len(compared.notes)
    height = CHARTS_HEIGHT + num_lines * LINE_HEIGHT + 0.3
    figure = Figure(figsize=(WIDTH, height))
    parts: Any = figure.subfigures(2, 1, height_ratios=[CHARTS_HEIGHT, height - CHARTS_HEIGHT])
    charts, below = parts
    _draw_charts(charts, compared)
    panel = below.add_axes((0.03, 0.0, 0.94, 1.0))
    panel.set_axis_off()
    panel.set(xlim=(0, 1), ylim=(num_lines + 0.5, 0))
    row = 0.5
    for title, heads, lines in tables:
        widest = WIDEST if heads == names(compared) else 2 * WIDEST  # the name of a group is longer
        row = _draw_table(panel, row, title, heads, lines, widest)
    for note in compared.notes:
        panel.text(0, row, f"note: {note}", fontsize=8, color=DIM, va="center", clip_on=True, parse_math=False)
        row += 1
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, facecolor="white")
    return drawn.getvalue()


def color_of(run: int) -> str:
    """The color of a run, wherever it is drawn."""
    return COLORS[run % len(COLORS)]


def names(compared: Comparison) -> list[tuple[str, str]]:
    """Name and color of each run."""
    return [(each.name, color_of(i)) for i, each in enumerate(compared.outcomes)]


def frontiers(compared: Comparison) -> list[tuple[str, Sequence[tuple[float, float]]]]:
    """What is attainable, by evaluation, each once: (whose, points)."""
    found: dict[tuple[tuple[float, float], ...], str] = {}
    for each in compared.outcomes:
        if each.evaluated and each.evaluated.frontier:
            found.setdefault(tuple(each.evaluated.frontier), each.name)
    return [(name, points) for points, name in found.items()]


def reach(compared: Comparison) -> float:
    """The highest KL worth showing: a little beyond what the runs have reached."""
    found = [kl for each in compared.outcomes for kl in smoothed([row["kl"] for row in each.rows], compared.last)]
    found += [each.evaluated.numbers["kl"]["high"] for each in compared.outcomes if each.evaluated]
    return 1.08 * max(*found, 0.1)


def _draw_charts(charts: Any, compared: Comparison) -> None:
    panels = charts.subplots(2, 2, gridspec_kw={
        "left": 0.065, "right": 0.985, "top": 0.85, "bottom": 0.075, "hspace": 0.36, "wspace": 0.16
    })  # fmt: skip
    for panel, (column, label) in zip(panels.flat, CURVES.items(), strict=False):
        for i, each in enumerate(compared.outcomes):
            steps, values = [row["iteration"] for row in each.rows], [row[column] for row in each.rows]
            panel.plot(steps, values, color=color_of(i), linewidth=0.8, alpha=0.28)
            panel.plot(steps, smoothed(values, compared.last), color=color_of(i), linewidth=1.8)
        panel.set_title(f"{label}, by iteration", loc="left", fontsize=11, color=INK)
    for target, colors in _targets(compared.outcomes).items():
        panels[0, 1].axhline(target, color=colors, linestyle=(0, (4, 3)), linewidth=1)
        panels[0, 1].annotate("target", (1, target), xycoords=("axes fraction", "data"), xytext=(-2, 2),
                              textcoords="offset points", fontsize=7.5, color=colors, ha="right")  # fmt: skip
    panels[1, 0].set_ylim(bottom=0.0)
    _draw_score_against_kl(panels[1, 1], compared)
    for panel in panels.flat:
        panel.grid(visible=True, alpha=0.22)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#b8bdc7")
        panel.tick_params(colors=DIM, labelsize=8.5)
    charts.text(
        0.03, 0.965, f"{len(compared.outcomes)} runs compared", fontsize=14, color=INK, weight="bold", va="center"
    )
    charts.text(0.985, 0.965, f"lines are means of {compared.last} iterations; thin: each iteration", fontsize=8.5,
                color=DIM, ha="right", va="center")  # fmt: skip
    lines = panels[0, 0].get_lines()[1::2]  # of each run the second one, which is smoothed
    legend = charts.legend(lines, ["run"] * len(lines), loc="upper left", bbox_to_anchor=(0.02, 0.95),
                           ncols=min(len(lines), 5), frameon=False, fontsize=9, labelcolor=INK)  # fmt: skip
    for text, each in zip(legend.get_texts(), compared.outcomes, strict=True):
        text.set(text=cut(each.name, 40), parse_math=False)


def _draw_score_against_kl(panel: Any, compared: Comparison) -> None:
    limit = reach(compared)
    for _, points in frontiers(compared):
        shown = [point for point in points if point[0] <= limit]
        panel.plot([kl for kl, _ in shown], [score for _, score in shown], color=INK, linewidth=1.5)
        panel.annotate("attainable", shown[-1], xytext=(5, -2), textcoords="offset points", ha="left", fontsize=8,
                       color=INK)  # fmt: skip
    for i, each in enumerate(compared.outcomes):
        kl, score = (smoothed([row[column] for row in each.rows], compared.last) for column in ("kl", "score"))
        panel.plot(kl, score, color=color_of(i), linewidth=1.5, alpha=0.85)
        panel.plot(kl[-1], score[-1], "o", color=color_of(i), markersize=5)
        if each.evaluated:
            found = [each.evaluated.numbers[name] for name in ("kl", "score")]
            reaches = [[[n["mean"] - n["low"]], [n["high"] - n["mean"]]] for n in found]
            panel.errorbar(
                found[0]["mean"], found[1]["mean"], xerr=reaches[0], yerr=reaches[1],
                fmt="D", color=color_of(i), markersize=5, markerfacecolor="white", capsize=2, elinewidth=1,
            )  # fmt: skip
    has_evaluated = any(each.evaluated for each in compared.outcomes)
    panel.set_title("score against KL, nats" + (" (◇ evaluated, 95 %)" if has_evaluated else ""), loc="left",
                    fontsize=11, color=INK)  # fmt: skip


def _targets(outcomes: Sequence[Outcome]) -> dict[float, str]:
    """Each KL that a controller holds, in the color of its run, or grey where several share it."""
    colors: dict[float, str] = {}
    for i, each in enumerate(outcomes):
        if each.kl_target is not None:
            colors[each.kl_target] = DIM if each.kl_target in colors else color_of(i)
    return colors


def _draw_table(
    panel: Any, row: float, title: str, heads: Sequence[tuple[str, str]], lines: Sequence[Line], widest: float
) -> float:
    """Draw a table from a row on; returns the row after it."""
    left, size = 0.22, 8.5 if len(heads) <= 6 else 7
    step = min((1 - left) / len(heads), widest)
    room = int(step * 118 * 8.5 / size)
    rights = [left + (i + 1) * step for i in range(len(heads))]

    def write(x: float, where: float, text: str, **look: Any) -> None:
        panel.text(x, where, text, va="center", parse_math=False, **look)

    write(0, row, title, fontsize=10.5, color=INK, weight="bold")
    for x, (head, color) in zip(rights, heads, strict=True):
        write(x, row + 1, cut(head, room), fontsize=size, color=color, weight="bold", ha="right")
    panel.plot([0, rights[-1]], [row + 1.5, row + 1.5], color="#b8bdc7", linewidth=0.8)
    for where, (label, cells) in enumerate(lines, start=2):
        write(0, row + where, label, fontsize=8.5, color=DIM)
        for x, cell in zip(rights, cells, strict=True):
            color = STANDINGS.get(cell, INK)
            write(x, row + where, cut(cell, room), fontsize=size, color=color, ha="right")
    return row + len(lines) + 3


def cut(text: str, length: int) -> str:
    """The text, its beginning left out where it is longer: the end of a path tells more."""
    return text if len(text) <= length else "…" + text[1 - length :]
