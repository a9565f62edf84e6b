"""Dataset folders that somebody else made: looked at before `datasets` reads them and follows what they say.

A dataset card may list files of other folders, of hosts and of archives; a saved dataset may name its files by any
path. A folder of prompts holds its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.config_io import parse_yaml
from rlhf_core.contracts.errors import UserError

MAX_CARD_BYTES: Final = 1 << 20
CARDS: Final = ("README.md", ".huggingface.yaml")
_FRONT: Final = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def check_dataset_folder(folder: Path, named: str) -> None:
    """Refuse a folder whose files are pipes or devices, or that names files elsewhere.

    Args:
        folder: of a dataset.
        named: field and value, for errors.
    Raises: UserError with the first thing that is wrong.
    """
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise UserError(
                f"{named} holds {path.name}, which is no file but a pipe, a device or a broken link; remove it"
            )
    for name in CARDS:
        if (folder / name).is_file():
            _check_card(folder / name, named)
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json", named).get("splits")
        for split in cast("list[object]", splits) if isinstance(splits, list) else []:
            _check_name(split, "dataset_dict.json", named)
    for state in [folder / "state.json", *folder.glob("*/state.json")]:
        if state.is_file():
            files: Any = _json(state, named).get("_data_files")
            for file in cast("list[Any]", files) if isinstance(files, list) else []:
                _check_name(file.get("filename") if isinstance(file, dict) else file, "state.json", named)


def _check_card(path: Path, named: str) -> None:
    if path.stat().st_size > MAX_CARD_BYTES:
        raise UserError(f"{named} has a {path.name} of more than {MAX_CARD_BYTES} bytes; shorten it, or move it away")
    text = path.read_text(encoding="utf-8", errors="replace")
    front = _FRONT.match(text) if path.suffix == ".md" else None
    head = front[1] if front else "" if path.suffix == ".md" else text
    card: Any = parse_yaml(head, origin=f"{path.name} of {named}") if head.strip() else None
    configs: Any = cast("dict[str, Any]", card).get("configs") if isinstance(card, dict) else None
    for file in _texts(configs):
        if "://" in file or "::" in file or file.startswith(("/", "~")) or ".." in file.split("/"):
            raise UserError(
                f"{named} lists in its {path.name} the file {file[:100]!r}, which is not in the folder; name that "
                "source itself in prompts.source, if you trust it"
            )


def _check_name(name: object, file: str, named: str) -> None:
    if not isinstance(name, str) or name in {"", ".", ".."} or "/" in name or "\\" in name:
        raise UserError(f"{named} names in its {file} the file {str(name)[:100]!r}, which is not in the folder")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in (
            cast("dict[str, object]", value).values() if isinstance(value, dict) else cast("list[object]", value)
        ):
            yield from _texts(child)


def _json(path: Path, named: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} has a {path.name} that is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{named} has a {path.name} that holds no JSON object; save the dataset again")
    return cast("dict[str, Any]", value)
