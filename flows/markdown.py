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
        rows = [
            (
                escaped(row["prompt"]), escaped(row["before"]), f"{row['score_before']:.2f}", escaped(row["after"]),
                f"{row['score_after']:.2f}",
            )
            for row in samples
        ]  # fmt: skip
        parts += [
            "### Before and after: same prompts, same random numbers",
            table(("prompt", "before", "score", "after", "score"), rows, left=5),
        ]
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
        shown = [
            (
                escaped(row["prompt"]), escaped(row["ref_response"]), f"{row['ref_score']:.2f}",
                escaped(row["response"]), f"{row['score']:.2f}",
            )
            for row in samples
        ]  # fmt: skip
        parts += [
            "### Same prompt, same random numbers",
            table(("prompt", "reference", "score", "policy", "score"), shown, left=5),
        ]
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


def _interval(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} ± {max(value['high'] - value['mean'], value['mean'] - value['low']):.3f}"
    return f"{value:.3f}"
