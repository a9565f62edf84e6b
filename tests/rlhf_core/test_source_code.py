"""The digest of source code: what computes something else is another code, what reads otherwise is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.source_code import code_digest, files_digest

CODE = '''"""A module."""

from rlhf_core.ops.kl import token_kl
from math import sqrt

LIMIT = 0.5
"""A limit."""


class Mean:
    """A mean."""

    is_kept = True
    """Whether it is kept."""

    def of(self, values: list[float]) -> float:
        """Return it."""
        return sum(values) / len(values) + sqrt(LIMIT)  # a comment
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another one"),
        ('"""A module."""\n', '"""Another sentence."""\n'),
        ('"""A mean."""', '"""It says more now."""'),
        ('        """Return it."""\n', ""),
        ('    """Whether it is kept."""\n', ""),
        (
            "sum(values) / len(values) + sqrt(LIMIT)",
            "(\n sum(values) / len(values)\n + sqrt(LIMIT))",
        ),
        ("from rlhf_core.ops.kl import", "from rlhf_core.elsewhere import"),
        ("LIMIT = 0.5", "LIMIT = .50"),
    ],
)
def test_what_reads_otherwise_is_the_same_code(old: str, new: str) -> None:
    assert CODE.count(old) == 1
    assert code_digest(CODE.replace(old, new)) == code_digest(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 0.5", "LIMIT = 0.25"),
        ("LIMIT = 0.5", "LIMIT = '0.5'"),
        ("/ len(values)", "* len(values)"),
        ("is_kept = True", "is_kept = 1"),
        ("from math import sqrt", "from cmath import sqrt"),
        ("import token_kl", "import token_k3 as token_kl"),
        ("def of(self, values", "def of(self, *values"),
        ("values: list[float]", "values: list[int]"),
        ("sum(values) / len(values) + sqrt(LIMIT)", "sum(values) / (len(values) + sqrt(LIMIT))"),
        ("        return sum", "        sum"),
    ],
)
def test_what_computes_otherwise_is_another_code(old: str, new: str) -> None:
    assert CODE.count(old) == 1
    assert code_digest(CODE.replace(old, new)) != code_digest(CODE)


def test_files_may_lie_anywhere_but_each_counts(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    places = [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "there/z.py"]
    for place, code in zip(places, (CODE, "x = 1\n", "x = 1\n"), strict=True):
        place.write_text(code)
    first, other, same = places
    assert files_digest([first, other]) == files_digest([same, first])
    assert files_digest([first]) != files_digest([first, other]) != files_digest([first, other, same])


def test_its_form_is_that_of_every_version_of_python() -> None:
    """Written down once: another value means that runs of an earlier release or Python are taken for a drift."""
    assert code_digest("x = f'{1}' + y[0:2]\n") == ("4de02f98ca539fbeb3c6745be75f4274f0515d43a0d26d9d87a8b62e79e504dd")
