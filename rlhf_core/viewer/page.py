"""The page: one file of HTML with its style, its script and its data inside.

What models wrote is data. It stands in a script element of type ``application/json`` with ``<``, ``>`` and ``&``
escaped, becomes text nodes and nothing else, and a Content-Security-Policy lets only this style and this script
through, by their sha256. Equal runs in equal folders give equal bytes: the page holds no clock and no host.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rlhf_core.choice import first_middle_last
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.viewer.contents import page_contents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME: Final = "view.html"
SCRIPTS: Final = (
    "numbers.js", "data.js", "measures.js", "dom.js", "charts.js", "curves.js", "samples.js", "detail.js", "page.js",
)  # fmt: skip
"""In the order in which they stand in the page: each uses what is above it."""
SMALL_BYTES: Final = 2_000_000
"""A page that a run writes by itself is smaller."""
EMPTY_BYTES: Final = 70_000
"""Of a page without samples."""
SAMPLE_BYTES: Final = 250
"""For each response: its id, its numbers, and its prompt."""
TOKEN_BYTES: Final = 54
"""For each response token: nine numbers, and its part of the text."""


@dataclass(frozen=True)
class Written:
    """A page that was written."""

    path: Path
    num_bytes: int
    iterations: Sequence[int]
    num_samples: int
    num_responses: int
    """Of these iterations in all."""
    note: str | None
    """What the page lacks, and why."""


def write_page(run: RunFolder, path: Path, iterations: Sequence[int], *, limit: int | None) -> Written:
    """Write a page about some iterations of a run, durably; what is at ``path`` is replaced.

    Args:
        run: finished or going.
        path: of the page.
        iterations: finished ones, ascending.
        limit: responses of each iteration; None for all.
    Raises:
        UserError: the iterations are too many for a page.
        IntegrityError: something that it shows is damaged.
        StorageError: the disk does not take it.
    """
    contents = page_contents(run, iterations, limit=limit, with_evaluation=True)
    return _written(path, page_of(contents), contents)


def write_run_page(run: RunFolder, tokenizer: PreTrainedTokenizerBase | None = None) -> Written | None:
    """Write the small page that a run leaves as ``RUN/view.html``, from its stages alone.

    Args:
        run: finished or stopped.
        tokenizer: the policy's; None to load it.
    Returns: None while no iteration is finished.
    Raises: as :func:`write_page`.
    """
    cleaned = Cleaned.of(run.path)
    iterations = [i for i in first_middle_last(run.num_finished()) if not cleaned.lacks(i)]
    if not iterations:
        return None
    limit = _small_limit(run, iterations)
    while True:
        contents = page_contents(run, iterations, limit=limit, tokenizer=tokenizer, with_evaluation=False)
        page = page_of(contents)
        if len(page) <= SMALL_BYTES or limit == 1:
            return _written(run.path / NAME, page, contents)
        limit = max(1, int(0.9 * limit * SMALL_BYTES / len(page)))


def run_page_bytes(num_iterations: int, num_samples: int, response_len: int) -> int:
    """About the size of the page that a run leaves.

    Args:
        num_iterations: of the run.
        num_samples: responses of an iteration.
        response_len: tokens of each.
    """
    shown = len(first_middle_last(num_iterations)) * num_samples
    return min(SMALL_BYTES, EMPTY_BYTES + shown * (SAMPLE_BYTES + response_len * TOKEN_BYTES))


def check_out(path: Path) -> None:
    """Raise UserError unless a page may be written there."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, as in {path / NAME}")
    if path.suffix != ".html":
        raise UserError(f"--out {path} does not end in .html; name a page, as in {path.with_suffix('.html')}")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise UserError(f"--out {path} cannot be written: {above} is a file, not a folder")


def page_of(contents: Mapping[str, Any]) -> bytes:
    """The bytes of a page that shows these contents."""
    style, script = _text("page.css"), "\n".join(map(_text, SCRIPTS))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'sha256-{_digest(script)}'",
            f"style-src 'sha256-{_digest(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    page = _text("page.html")
    for name, part in (("POLICY", policy), ("STYLE", style), ("SCRIPT", script), ("DATA", embedded(contents))):
        page = page.replace(f"<!--{name}-->", part)
    return page.encode()


def embedded(contents: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in: ASCII, and without ``<``, ``>`` and ``&``."""
    text = json.dumps(contents, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _small_limit(run: RunFolder, iterations: Sequence[int]) -> int:
    """Responses of each iteration that give about a small page, by their mean length."""
    tokens_of_one = 0.0
    for iteration in iterations:
        rollouts = run.manifests(iteration)["generate"]
        tokens_of_one += rollouts.metrics["rollout/num_tokens"] / max(rollouts.artifact.rows, 1)
    of_one = len(iterations) * SAMPLE_BYTES + tokens_of_one * TOKEN_BYTES
    return max(1, int((SMALL_BYTES - EMPTY_BYTES) / of_one))


def _written(path: Path, page: bytes, contents: Mapping[str, Any]) -> Written:
    write_file(path, page)
    about = contents["run"]
    samples = len(contents["samples"]["id"])
    return Written(path, len(page), about["shown"], samples, about["num_responses"], about["note"])


def _text(name: str) -> str:
    return files("rlhf_core.viewer").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
