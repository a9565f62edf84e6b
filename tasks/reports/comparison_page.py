"""The page of several runs: one self-contained HTML file, without a script; light or dark as its reader prefers.

Pointing at a run's name or curve brings it forward in all charts. Names and values of configs are escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from rlhf_core.comparing.comparison import Comparison
from rlhf_core.comparing.outcome import Evaluated, Outcome, smoothed
from rlhf_core.comparing.presentation import CURVES, Line, difference_lines, group_lines, result_lines
from tasks.reports.comparison_figure import color_of, frontiers, reach
from tasks.reports.svg_charts import Chart, Curve, Mark, svg

STYLE: Final = """
:root { color-scheme: light dark; --paper: #fbfbfd; --card: #fff; --ink: #1f2430; --dim: #667085; --line: #e4e7ec;
  --grid: #eef0f4; --good: #1f8a4c; --warn: #b54708; --bad: #c0362c; --zebra: #f8f9fb; }
@media (prefers-color-scheme: dark) { :root { --paper: #101319; --card: #171b23; --ink: #e6e9ef; --dim: #98a2b3;
  --line: #2a303c; --grid: #222834; --good: #4fc283; --warn: #f2a65a; --bad: #f0776c; --zebra: #1b202a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 28px 60px; max-width: 1280px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0 0 2px; letter-spacing: -.01em; }
h2 { font-size: 15px; margin: 0 0 10px; } h2 span { font-weight: 400; color: var(--dim); margin-left: 6px; }
p.sub { color: var(--dim); margin: 0 0 16px; }
ul.runs { list-style: none; display: flex; flex-wrap: wrap; gap: 8px; padding: 0; margin: 0 0 18px; }
ul.runs li { display: flex; align-items: center; gap: 8px; padding: 5px 12px 5px 10px; border: 1px solid var(--line);
  border-radius: 999px; background: var(--card); cursor: default; max-width: 100%; overflow-wrap: anywhere; }
ul.runs li:focus-visible { outline: 2px solid var(--color); outline-offset: 1px; }
.swatch { width: 18px; height: 4px; border-radius: 2px; background: var(--color); flex: none; }
.standing { color: var(--dim); font-size: 12px; white-space: nowrap; }
.working { color: var(--warn); } .stopped { color: var(--bad); } .finished { color: var(--good); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure, section { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure { padding: 14px 14px 8px; } section { padding: 16px 18px; margin-top: 14px; }
.wide { overflow: auto; max-height: 88vh; }
figcaption { font-weight: 600; margin: 0 0 6px 2px; } figcaption span { font-weight: 400; color: var(--dim); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--dim); }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.run { transition: opacity .12s; } .line { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round; }
.faint { fill: none; stroke: var(--color); stroke-width: 1; opacity: .25; } .end { fill: var(--color); }
.hover { fill: transparent; } .hover:hover { fill: var(--color); fill-opacity: .3; }
.bar { stroke: var(--color); stroke-width: 1.2; fill: none; }
.mark { fill: var(--card); stroke: var(--color); stroke-width: 1.8; }
.level { stroke: var(--color, var(--dim)); stroke-dasharray: 5 4; }
svg text.level-label { text-anchor: end; fill: var(--color, var(--dim)); font-size: 10px;
  stroke: var(--card); stroke-width: 3px; paint-order: stroke; stroke-dasharray: none; }
.backdrop { fill: none; stroke: var(--ink); stroke-width: 1.6; } svg text.backdrop-label { text-anchor: end; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 6px; } tbody th { font-weight: 400; color: var(--dim); }
thead th { border-bottom: 1px solid var(--line); white-space: normal; overflow-wrap: anywhere; vertical-align: bottom;
  min-width: 8em; }
thead th i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--color);
  margin-right: 6px; }
tbody tr { background: var(--card); } tbody tr:nth-child(even) { background: var(--zebra); }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); }
th:first-child { position: sticky; left: 0; background: inherit; } thead th:first-child { z-index: 2; }
tbody th { max-width: 22em; overflow: hidden; text-overflow: ellipsis; } td { max-width: 28em; white-space: normal; }
td { overflow-wrap: anywhere; } .note { color: var(--dim); overflow-wrap: anywhere; } .note b { color: var(--warn); }
@media print { .wide { max-height: none; } body { max-width: none; } figure, section { break-inside: avoid; } }
"""


def comparison_page(compared: Comparison) -> bytes:
    """Make the page of a comparison. Returns: HTML in UTF-8."""
    names = [each.name for each in compared.outcomes]
    title = " · ".join(names) if len(names) <= 4 else f"{len(names)} runs"
    tables = [_table(f"Results <span>means of the last {compared.last} iterations ± std</span>", names,
                     result_lines(compared), colored=True)]  # fmt: skip
    if found := difference_lines(compared):
        tables.insert(0, _table("Configs <span>what differs</span>", names, found, colored=True))
    else:
        tables.insert(0, "<section><h2>Configs</h2><p class='note'>all the same</p></section>")
    if compared.groups:
        heads = [group.name for group in compared.groups]
        tables.append(_table("Across seeds <span>mean ± std over runs</span>", heads, group_lines(compared)))
    if compared.notes:
        notes = "".join(f"<p class='note'><b>differs</b> {escape(note)}</p>" for note in compared.notes)
        tables.append(f"<section><h2>Other conditions</h2>{notes}</section>")
    charts = "\n".join(_figure(chart) for chart in charts_of(compared))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: compared</title>
<style>{STYLE}{_run_styles(len(names))}</style>
</head>
<body>
<h1>{len(names)} runs compared</h1>
<p class="sub">Bold lines are means of {compared.last} iterations; the thin ones are each iteration.
Point at a run to bring it forward, at a curve for its numbers.</p>
<ul class="runs">{"".join(_chip(i, each) for i, each in enumerate(compared.outcomes))}</ul>
<div class="charts">
{charts}
</div>
{"".join(tables)}
</body>
</html>
"""
    return page.encode()


def charts_of(compared: Comparison) -> list[Chart]:
    """Score, KL and β by iteration, then score against KL."""
    charts = [_by_iteration(compared, column, label) for column, label in CURVES.items()]
    limit = reach(compared)
    backdrops = [("attainable", [p for p in points if p[0] <= limit]) for _, points in frontiers(compared)]
    curves: list[Curve] = []
    for i, each in enumerate(compared.outcomes):
        kl, score = (smoothed([row[column] for row in each.rows], compared.last) for column in ("kl", "score"))
        tips = [f"{each.name}, iteration {t}: score {s:.3f} at {k:.2f} nats" for t, (k, s) in
                enumerate(zip(kl, score, strict=True))]  # fmt: skip
        curves.append(Curve(i, list(zip(kl, score, strict=True)), tips))
    marks = [_mark(i, each.name, each.evaluated) for i, each in enumerate(compared.outcomes) if each.evaluated]
    against = Chart(
        "Score against KL" + (", ◇ evaluated with 95 % intervals" if marks else ""), "KL to the reference, nats",
        "score", curves, backdrops=backdrops, marks=marks, ends=True,
    )  # fmt: skip
    return [*charts, against]


def _mark(run: int, name: str, evaluated: Evaluated) -> Mark:
    kl, score = evaluated.numbers["kl"], evaluated.numbers["score"]
    tip = f"{name}, evaluated: score {score['mean']:.3f} at {kl['mean']:.2f} nats"
    at, low, high = ((kl[bound], score[bound]) for bound in ("mean", "low", "high"))
    return run, at, low, high, tip


def _by_iteration(compared: Comparison, column: str, label: str) -> Chart:
    curves: list[Curve] = []
    targets: dict[float, str] = {}
    for i, each in enumerate(compared.outcomes):
        steps, values = [row["iteration"] for row in each.rows], [row[column] for row in each.rows]
        smooth = smoothed(values, compared.last)
        tips = [f"{each.name}, iteration {t}: {label} {v:.4g}" for t, v in zip(steps, values, strict=True)]
        faint = list(zip(steps, values, strict=True))
        curves.append(Curve(i, list(zip(steps, smooth, strict=True)), tips, faint))
        if column == "kl" and each.kl_target is not None:
            targets[each.kl_target] = "" if each.kl_target in targets else f"run run-{i}"
    levels = [(target, f"target {target:g}", classes) for target, classes in targets.items()]
    return Chart(label.replace("score", "Score"), "iteration", label, curves, levels, from_zero=column == "beta")


def _figure(chart: Chart) -> str:
    head, _, rest = chart.title.partition(", ")
    note = f" <span>{escape(rest)}</span>" if rest else ""
    return f"<figure><figcaption>{escape(head)}{note}</figcaption>\n{svg(chart)}</figure>"


def _chip(run: int, each: Outcome) -> str:
    standing = f"{each.standing}, {len(each.rows)} of {each.run.config.num_iterations}"
    return (
        f'<li class="chip-{run} color-{run}" tabindex="0"><span class="swatch"></span>{escape(each.name)}'
        f'<span class="standing {each.standing}">{standing}</span></li>'
    )


def _table(title: str, heads: Sequence[str], lines: Sequence[Line], *, colored: bool = False) -> str:
    def head(i: int, name: str) -> str:
        dot = "<i></i>" if colored else ""
        return f'<th scope="col" class="color-{i}">{dot}{escape(name)}</th>'

    def cell(text: str) -> str:
        return f'<td class="{text}">{text}</td>' if text in STANDINGS else f"<td>{escape(text)}</td>"

    def row(label: str, cells: Sequence[str]) -> str:
        name = escape(label)
        return f'<tr><th scope="row" title="{name}">{name}</th>{"".join(map(cell, cells))}</tr>'

    rows = "\n".join(row(label, cells) for label, cells in lines)
    columns = "".join(head(i, name) for i, name in enumerate(heads))
    return (
        f'<section><h2>{title}</h2><div class="wide" tabindex="0"><table><thead><tr><th></th>{columns}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div></section>"
    )


STANDINGS: Final = ("working", "stopped", "finished")


def _run_styles(num_runs: int) -> str:
    """Colors of the runs; what is pointed at comes forward in every chart."""
    rules = [f".run-{i}, .color-{i} {{ --color: {color_of(i)}; }}" for i in range(num_runs)]
    for i in range(num_runs):
        pointed = f":is(.chip-{i}:hover, .chip-{i}:focus-visible, .run-{i}:hover)"
        rules.append(f"body:has({pointed}) .run:not(.run-{i}) {{ opacity: .13; }}")
    return "\n".join(rules)
