"""Names of the Hugging Face hub, ``owner/name`` or ``owner/name@revision``, and the commit that a revision is.

A place in the config (a model, an adapter, a tokenizer, a data set) is one string that carries its revision, so that
no load can forget it. The knobs called ``revision`` are the same in two words: they are written into that string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.errors import UserError

NEWEST: Final = "main"
"""The revision of a name without one."""
_TIMEOUT_S: Final = 20.0
_REPO: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.-]+)?"
_REVISION: Final = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./+-]{0,200}"
_NAME: Final = re.compile(rf"({_REPO})(?:@({_REVISION}))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision`` into its two parts; the revision is None where the name has none."""
    found = _NAME.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2])


def looks_like_hub_name(name: str) -> bool:
    """Whether a text has the form of a hub id; a folder may have it, too."""
    return _NAME.fullmatch(name) is not None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def with_revisions(tree: Any, knobs: Mapping[str, str]) -> Any:
    """Write the revisions of a section into the names that they belong to, before the section is validated.

    Args:
        tree: the section as it was given; anything but a mapping is left to pydantic.
        knobs: name of a place -> name of its revision: ``{"model": "revision"}``.
    Raises: ValueError if a revision stands beside no hub id, or beside another revision.
    """
    if not isinstance(tree, Mapping):
        return tree
    values = dict(cast("Mapping[str, Any]", tree))
    for place, knob in knobs.items():
        revision = values.get(knob)
        if not isinstance(revision, str):  # None, or a wrong type that pydantic refuses
            continue
        name = values.get(place)
        if not re.fullmatch(_REVISION, revision):
            raise ValueError(f"{knob} {revision!r} is no branch, tag or commit of the hub")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{knob} is {revision!r}, but {place} is not set: a revision belongs to a hub id")
        repo, own = split_revision(name)
        if not looks_like_hub_name(name):
            raise ValueError(
                f"{knob} is {revision!r}, but {place} {name!r} is a path, and only a hub id has revisions; leave it out"
            )
        if own not in (None, revision):
            raise ValueError(
                f"{knob} is {revision!r}, but {place} {name!r} names another revision; leave one of them out"
            )
        values |= {place: f"{repo}@{revision}", knob: None}
    return values


def refuse_revision_of_folder(name: str, field: str) -> None:
    """Raise UserError if ``owner/name@revision`` is a folder here with a revision behind it."""
    repo, revision = split_revision(name)
    if revision is not None and Path(repo).exists():
        raise UserError(
            f"{field} {repo!r} is here on the disk, and has no revision {revision!r}: only a hub id has revisions; "
            "leave the revision out"
        )


def commit_of(name: str, repo_type: str) -> str:
    """The commit that a hub id stands for now.

    The hub is asked where it can be reached; else the cache of this machine tells what it was the last time.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.
        repo_type: model or dataset.
    Returns: 40 hexadecimal digits.
    Raises: whatever huggingface_hub raises where there is no such repository or revision, or no network and no cache.
    """
    import huggingface_hub

    repo, revision = split_revision(name)
    if revision is not None and is_commit(revision):
        return revision
    with quietly():
        try:
            info: Any = huggingface_hub.HfApi().repo_info(
                repo, revision=revision, repo_type=repo_type, timeout=_TIMEOUT_S
            )
            return str(info.sha)
        except Exception as error:
            if was_answered(error):
                raise
            cached = huggingface_hub.snapshot_download(
                repo, revision=revision, repo_type=repo_type, local_files_only=True, allow_patterns=[]
            )
            return Path(cached).name


def was_answered(error: Exception) -> bool:
    """Whether the hub itself said no: no such repository or revision, no permission. Else it was not reached."""
    response: Any = getattr(error, "response", None)
    return isinstance(error, ValueError) or (response is not None and int(response.status_code) < 500)


@contextmanager
def quietly() -> Iterator[None]:
    """Within: huggingface_hub draws no progress bars. Used where what is fetched is small."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
