"""What this user has accepted: in this process, in the environment of those that it starts, and in a file.

    ~/.local/state/rlhf-flow/accepted.jsonl   (or $XDG_STATE_HOME/rlhf-flow/…): one JSON string a line

Where the file cannot be written, a later command asks again. It counts only while nobody else can write to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, cast

VARIABLE: Final = "RLHF_TRUST"
"""JSON list of what a person accepts; processes that this one starts inherit it."""
MAX_BYTES: Final = 4 << 20


def accepted_keys() -> set[str]:
    """Everything that was accepted, now or earlier."""
    return _of_environment() | _of_file()


def remember(keys: Sequence[str]) -> None:
    """Accept these from now on."""
    inherited = _of_environment()
    if not inherited.issuperset(keys):
        os.environ[VARIABLE] = json.dumps(sorted(inherited.union(keys)))
    new = [key for key in dict.fromkeys(keys) if key not in _of_file()]
    file = _file()
    if new and file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write("".join(json.dumps(key) + "\n" for key in new).encode())


def _of_environment() -> set[str]:
    return _texts(_parsed(os.environ.get(VARIABLE, "[]")))


def _of_file() -> set[str]:
    file = _file()
    try:
        if file is None or not _is_ours_alone(file.stat()):
            return set()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return _texts([_parsed(line) for line in lines])


def _is_ours_alone(about: os.stat_result) -> bool:
    is_plain = stat.S_ISREG(about.st_mode) and about.st_size <= MAX_BYTES
    return is_plain and about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _file() -> Path | None:
    try:
        state = os.environ.get("XDG_STATE_HOME", "")
        folder = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:  # there is no home
        return None
    return folder / "rlhf-flow" / "accepted.jsonl"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _texts(values: Any) -> set[str]:
    items = cast("Iterable[Any]", values) if isinstance(values, list) else []
    return {item for item in items if isinstance(item, str)}
