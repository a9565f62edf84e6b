"""Fill in the pages of the documentation, ready for the site's builder.

    python docs/prepare.py build/docs

Copies ``docs/`` and replaces marks:

- ``<!-- generated: config -->`` by a text that is written from the code (``docs/generated.py``),
- ``<!-- file: CONTRIBUTING.md -->`` by a file of the repository,
- ``<!-- source: examples/one_iteration.py -->`` by its content as a block of code.

A link that leaves ``docs/`` for a file of the repository leads to a copy of it in the site, so that the site works
without a network. A link to a file or heading that does not exist ends the program with one sentence for each.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from generated import PAGES

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent
COPIES: Final = "repository"
"""Folder of the site that holds the linked files of the repository."""
MARK = re.compile(r"<!-- (generated|file|source): (\S+) -->")
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:)([^)\s#]*)(#[^)\s]*)?(?=\))")
BLOCK = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)


def pages() -> dict[Path, str]:
    """Every page, filled in: path below ``docs/`` -> text."""
    return {path: filled(path) for path in sorted(DOCS.rglob("*.md"))}


def filled(path: Path) -> str:
    """A page's text with its marks replaced."""
    return MARK.sub(lambda mark: _text(mark[1], mark[2], path.parent), path.read_text(encoding="utf-8"))


def _text(kind: str, name: str, folder: Path) -> str:
    if kind == "generated":
        return PAGES[name]()
    text = (ROOT / name).read_text(encoding="utf-8")
    if kind == "source":
        return f"```{Path(name).suffix.lstrip('.').replace('py', 'python')}\n{text}```"
    return with_links(text, lambda target: os.path.relpath(ROOT / target, folder))


def with_links(text: str, moved: Callable[[str], str]) -> str:
    """The text with the target of each relative link outside blocks of code replaced by ``moved(target)``."""

    def in_prose(part: str) -> str:
        return LINK.sub(lambda link: (moved(link[1]) if link[1] else "") + (link[2] or ""), part)

    return "".join(part if part.startswith("```") else in_prose(part) for part in BLOCK.split(text))


def broken_links(texts: Mapping[Path, str]) -> list[str]:
    """A sentence for each relative link whose file or heading does not exist."""
    found: list[str] = []
    for path, text in texts.items():
        prose = "".join(part for part in BLOCK.split(text) if not part.startswith("```"))
        for link in LINK.finditer(prose):
            target = (path.parent / link[1]).resolve() if link[1] else path
            where = f"{path.relative_to(ROOT)} links to {link[0]!r}"
            if not target.is_file():
                found.append(f"{where}, which is no file")
            elif link[2] and target.suffix == ".md" and link[2][1:] not in _anchors_in(target, texts):
                found.append(f"{where}, and {target.relative_to(ROOT)} has no such heading")
    return found


def _anchors_in(target: Path, texts: Mapping[Path, str]) -> set[str]:
    return anchors(texts.get(target) or target.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as Markdown's ``toc`` names them."""
    prose = "".join(part for part in BLOCK.split(text) if not part.startswith("```"))
    return {_slug(heading) for heading in HEADING.findall(prose)}


def _slug(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def prepare(out: Path) -> None:
    """Write the pages, their images and the linked files of the repository below ``out``."""
    texts = pages()
    if broken := broken_links(texts):
        raise SystemExit("\n".join(f"error: {sentence}" for sentence in broken))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path, text in texts.items():
        copied = out / path.relative_to(DOCS)
        copied.write_text(with_links(text, lambda target, path=path: _inside(path, target, out)), encoding="utf-8")


def _inside(path: Path, target: str, out: Path) -> str:
    """The link as the site has it; a file of the repository is copied there."""
    found = (path.parent / target).resolve()
    if found.is_relative_to(DOCS):
        return target
    name = f"{found.relative_to(ROOT)}" + (".txt" if found.suffix == ".md" else "")
    copy = out / COPIES / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, copy)
    return os.path.relpath(DOCS / COPIES / name, path.parent)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
