"""Files that go to a tracker, and a look whether they have arrived. Knows no tracker but by its client's methods.

An upload's answer has no content to check: a login page of a proxy in between, with status 200, passes for success.
So each file is looked up afterwards, by name and size, and sent again if it is not there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TABLES_TAG = "mlflow.loggedArtifacts"
TRIES = 4


class NotArrivedError(ConnectionError):
    """Files were sent, nobody complained, and they are not there."""


def send_file(client: Any, run_id: str, file: Path, folder: str | None = None) -> None:
    """Send a file to a folder of a run's artifacts.

    Raises: NotArrivedError, or whatever the tracker raises.
    """
    _send_until_there(
        lambda: client.log_artifact(run_id, str(file), artifact_path=folder),
        lambda: client.list_artifacts(run_id, folder),
        {file.name: file.stat().st_size},
    )


def send_text(client: Any, run_id: str, text: str, name: str) -> None:
    """Send a text as the artifact ``name``, which may have folders. Raises as :func:`send_file`."""
    place = Path(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / place.name
        file.write_text(text, encoding="utf-8")
        send_file(client, run_id, file, place.parent.as_posix() if place.parent.name else None)


def send_table(client: Any, run_id: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Send a table as MLflow shows it. ``client.log_table`` would append to the table of an earlier try."""
    table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    send_text(client, run_id, json.dumps(table, ensure_ascii=False), name)
    listed: Any = None
    with suppress(ValueError):
        listed = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    if not isinstance(listed, list):
        return  # somebody's own: the file is there all the same
    if (entry := {"path": name, "type": "table"}) not in listed:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*listed, entry]))


def send_model(client: Any, model_id: str, folder: Path) -> None:
    """Send a folder as the files of a logged model. Raises as :func:`send_file`."""
    files = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}

    def listed() -> Iterable[Any]:
        for place in sorted({file.parent for file in files}):
            yield from client.list_logged_model_artifacts(model_id, place.as_posix() if place.name else None)

    wanted = {file.as_posix(): size for file, size in files.items()}
    _send_until_there(lambda: client.log_model_artifacts(model_id, str(folder)), listed, wanted)


def _send_until_there(
    send: Callable[[], object], listed: Callable[[], Iterable[Any]], sizes: Mapping[str, int]
) -> None:
    """Send and look, a few times. A store that tells no sizes is believed."""
    missing = list(sizes)
    for _ in range(TRIES):
        send()
        there = {entry.path: entry.file_size for entry in listed() if not entry.is_dir}
        missing = [name for name, size in sizes.items() if not any(_is_it(name, size, *e) for e in there.items())]
        if not missing:
            return
    raise NotArrivedError(f"{', '.join(missing)}: sent {TRIES} times without an error, and not there")


def _is_it(name: str, size: int, path: str, size_there: int | None) -> bool:
    """Whether an entry is the file; listings give paths from the root of the artifacts."""
    return (path == name or path.endswith(f"/{name}")) and size_there in (size, None)
