"""What Prefect's page shows of a run and of an evaluation, as Markdown. Texts of models are untrusted: escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flows.displays.terminal import EDGE, sparkline

LONGEST_TEXT = 240
"""Characters of a response that are shown."""
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
COLUMNS = {
    "score": ("objective/scores", 3),
    "KL": ("objective/kl", 2),
    "β": ("kl/beta", 4),
    "length": ("rollout/response_len", 1),
    "seconds": ("time/iteration_s", 2),
}
"""Column of an iteration -> its metric and digits."""
MOVED = ("score", "KL")
"""Columns whose change from the first to the last iterations is the headline."""
Metrics = Mapping[str, float]


def escaped(text: str) -> str:
    """Any text as it reads, on one line, without a link, an image, HTML or a table's end in it."""
    line = "".join(c if c.isprintable() else " ⏎ " if c == "\n" else " " for c in text.strip())
    line = re.sub(r" {2,}", " ", line)
    shown = line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"
    return _PUNCTUATION.sub(r"\\\1", shown)


def code(text: str) -> str:
    """A name or path in fixed width; as it reads, whatever is in it."""
    return escaped(text) if "`" in text or "|" in text or not text.isprintable() else f"`{text}`"


def moved(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    """The headline: "score 0.170 → 2.889, KL 0.36 → 3.61", means of the first and of the last iterations.

    Args:
        first: metrics of the first few iterations; at least one.
        last: as many of the last.
    """
    parts: list[str] = []
    for name in MOVED:
        metric, digits = COLUMNS[name]
        then, now = (sum(m[metric] for m in of) / len(of) for of in (first, last))
        parts.append(f"{name} {then:z.{digits}f} → {now:z.{digits}f}")
    return ", ".join(parts)


def log_line(iteration: int, of: int, metrics: Metrics) -> str:
    """An iteration in the log: "iteration 7 (8 of 40): score 1.234, KL 3.21, β 0.2000"."""
    numbers = (f"{name} {metrics[COLUMNS[name][0]]:z.{COLUMNS[name][1]}f}" for name in ("score", "KL", "β"))
    return f"iteration {iteration} ({iteration + 1} of {of}): {', '.join(numbers)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Rows of cells that are Markdown already; the first ``left`` columns to the left, the others to the right."""
    ruler = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def run_page(
    facts: Sequence[str], recent: Mapping[int, Metrics], samples: Sequence[Mapping[str, Any]], guards: Sequence[str]
) -> str:
    """A run that is going.

    Args:
        facts: Markdown, one paragraph: where it is and how far.
        recent: metrics of the newest iterations, ascending.
        samples: a few responses of the newest: prompt_text, response_text, score, kl.
        guards: what they have said last.
    """
    parts = ["  \n".join(facts)]
    parts += [f"**Guards** · {escaped(sentence)}" for sentence in guards]
    if recent:
        parts.append(_iterations(recent))
    if samples:
        rows = (
            (f"{row['score']:.2f}", f"{row['kl']:.2f}", escaped(row["prompt_text"]), escaped(row["response_text"]))
            for row in samples
        )
        parts += [
            f"### Responses of iteration {max(recent)}: best, middle, worst",
            table(("score", "KL", "prompt", "response"), rows, left=4),
        ]
    return "\n\n".join(parts) + "\n"


def result_page(
    facts: Sequence[str], first: Sequence[Metrics], last: Sequence[Metrics], samples: Sequence[Mapping[str, Any]]
) -> str:
    """A run that is finished: from its first to its last iterations, and the same prompts before and after.

    Args:
        facts: Markdown, one paragraph.
        first: metrics of the first few iterations.
        last: as many of the last.
        samples: prompt, before, score_before, after, score_after.
    """
    parts = ["  \n".join(facts)]
    if first:
        rows: list[tuple[str, ...]] = []
        for name, (metric, digits) in COLUMNS.items():
            then, now = (sum(m[metric] for m in of) / len(of) for of in (first, last))
            rows.append((name, f"{then:.{digits}f}", f"{now:.{digits}f}", f"{now - then:+.{digits}f}"))
        parts += [f"### First → last (means of {len(first)})", table(("", "first", "last", "change"), rows)]
    if samples:
        names = {"before": ("score_before", "before"), "after": ("score_after", "after")}
        parts += ["### Before and after: same prompts, same random numbers", _side_by_side(samples, names)]
    return "\n\n".join(parts) + "\n"


def evaluation_page(where: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """An evaluation: its policies against the reference, and a few responses of both.

    Args:
        where: its folder.
        summary: its summary.json.
        samples: rows of its samples.arrow.
    """
    names = ("score", "gain", "kl", "win_rate", "share_of_attainable", "response_len")
    rows = [
        (name, *(_interval(numbers[key]) for key in names))
        for name, numbers in summary["policies"].items()
        if numbers["blend"] == 1
    ]
    prompts = summary["prompts"]["num_prompts"]
    parts = [
        f"{prompts} prompts x {summary['samples']} responses, in {code(where)}; ± 95 % over prompts",
        table(("policy", "score", "gain", "KL", "win rate", "of the attainable", "length"), rows),
    ]
    if samples:
        names = {"reference": ("ref_score", "ref_response"), "policy": ("score", "response")}
        parts += ["### Same prompt, same random numbers", _side_by_side(samples, names)]
    return "\n\n".join(parts) + "\n"


def edges(num_finished: int) -> tuple[range, range]:
    """The first and the last few iterations of a run."""
    edge = min(EDGE, max(1, num_finished // 2)) if num_finished else 0
    return range(edge), range(num_finished - edge, num_finished)


def _iterations(recent: Mapping[int, Metrics]) -> str:
    """The newest iterations, newest first, with a line of bars above each column but the seconds."""
    rows = [
        (str(i), *(f"{metrics[name]:.{digits}f}" for name, digits in COLUMNS.values()))
        for i, metrics in sorted(recent.items(), reverse=True)
    ]
    bars = [sparkline([metrics[name] for metrics in recent.values()], len(recent)) for name, _ in COLUMNS.values()]
    return table(("iteration", *COLUMNS), [("oldest → newest", *bars), *rows])


def _side_by_side(samples: Sequence[Mapping[str, Any]], names: Mapping[str, tuple[str, str]]) -> str:
    """Two responses to each prompt, one below the other: no cell wraps in Prefect's page, and what is right is cut.

    Args:
        samples: rows with the prompt, and what ``names`` says.
        names: whose response -> its columns of score and text.
    """
    rows = [
        (who, f"{row[score]:.2f}", escaped(row[text]), escaped(row["prompt"]) if who == next(iter(names)) else "")
        for row in samples
        for who, (score, text) in names.items()
    ]
    return table(("", "score", "response", "prompt"), rows, left=4)


def _interval(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} ± {max(value['high'] - value['mean'], value['mean'] - value['low']):.3f}"
    return f"{value:.3f}"
