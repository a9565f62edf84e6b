"""MLflow's sqlite file: made whole or not at all, put aside if half made, and moved together with its runs.

    RUNS/mlflow.db                        the store
    RUNS/.mlflow.db.new-<pid>             the store while its tables are made, renamed when they are complete
    RUNS/mlflow.db.broken-<date>-<time>   a store that was left half made; it never held a run

MLflow takes seconds to make its tables, statement by statement. A process that is killed meanwhile leaves a file that
MLflow neither finishes nor refuses by name. Knows MLflow's tables, and does not import it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote

from rlhf_core.contracts.durable import sync
from tasks.tracking.outbox import RefusalError

logger = logging.getLogger(__name__)

SCHEME: Final = "sqlite:///"
QUIET_S = 10.0
"""Seconds without a write after which nobody is making a half-made store any more."""
LONGEST_WAIT_S = 120.0
POLL_S = 0.2
SIDECARS: Final = ("-journal", "-wal", "-shm")
"""Suffixes of sqlite's own files, which belong to the file of that very name."""
ARTIFACTS: Final = "mlartifacts"
_LOCATIONS: Final = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
"""Columns of MLflow's tables that hold places of files."""

State = Literal["missing", "half-made", "whole", "foreign"]


def database_of(uri: str) -> Path | None:
    """The file of an sqlite address; None for another store, or one in memory."""
    if not uri.startswith(SCHEME):
        return None
    name = unquote(uri.removeprefix(SCHEME).partition("?")[0])
    return Path(name) if name and name != ":memory:" else None


def state_of(database: Path) -> State:
    """Whether MLflow can use the file, as a store of its own or as one that it adds its tables to.

    The default experiment is the last thing that MLflow makes, and is never removed: without an experiment a store is
    not finished, and has nothing in it. Raises RefusalError if the file is damaged, or no database.
    """
    if not database.is_file() or not database.stat().st_size:
        return "missing"
    try:
        with _opened(database) as connection:
            tables = {str(name) for (name,) in connection.execute("select name from sqlite_master where type='table'")}
            if tables and not tables & {"experiments", "alembic_version", "runs"}:
                return "foreign"
            if "experiments" in tables and connection.execute("select 1 from experiments").fetchone():
                return "whole"
            return "half-made"
    except sqlite3.OperationalError as error:  # locked, unreadable, a full disk: not for ever
        raise ConnectionError(f"{database}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise RefusalError(
            f"its store {database} is damaged or no database ({error}); put a copy back, or move it away and remove "
            "mlflow.json from the run folders: their next resume sends everything to a new one"
        ) from None


def make_ready(database: Path, make: Callable[[Path], None], is_over: Callable[[], bool] = lambda: False) -> None:
    """Make a store where there is none, and put one aside that was left half made. The caller holds the store's lock.

    Args:
        database: where the store is to be.
        make: makes all tables in a new file; takes seconds.
        is_over: whether nothing more may be done.
    Raises: ConnectionError while another process makes it; RefusalError if it is damaged.
    """
    database = database.resolve()  # behind a link: the file is made where it points to
    state = _settled_state(database, is_over)
    for leftover in database.parent.glob(f".{database.name}.new-*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    if state == "half-made":
        aside = _put_aside(database)
        logger.warning(
            "%s was left half made by a process that was killed while MLflow made it; it held no run, and is now %s",
            database,
            aside.name,
        )
    if state in ("missing", "half-made"):
        _make(database, make)


def follow_move(database: Path) -> str | None:
    """Let the places of files in a store that was moved or copied with its runs point to where it is now.

    Only places that were beside the store by default, as the runs' own record of their folder proves. The caller
    holds the store's lock.

    Returns: the folder where the store was; None if it was not moved.
    """
    if state_of(database) != "whole":
        return None
    here = database.resolve().parent
    wanted = (here / ARTIFACTS).as_uri()
    with _opened(database) as connection:
        found = connection.execute(
            "select distinct e.artifact_location, t.value from experiments e join runs r using (experiment_id) "
            "join tags t on t.run_uuid = r.run_uuid and t.key = 'rlhf.run_dir' where e.artifact_location != ?",
            (wanted,),
        ).fetchall()
        moved = {
            (str(location), str(Path(run_dir).parent))
            for location, run_dir in found
            if Path(run_dir).is_absolute() and str(location) == (Path(run_dir).parent / ARTIFACTS).as_uri()
        }
        for location, before in moved:
            connection.execute(
                "update tags set value = ? || substr(value, ?) where key = 'rlhf.run_dir' and substr(value, 1, ?) = ?",
                (str(here), len(before) + 1, len(before) + 1, f"{before}/"),
            )
            for table, column in _LOCATIONS:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (wanted, len(location) + 1, location, len(location) + 1, f"{location}/"),
                )
        connection.commit()
    return next((before for _, before in sorted(moved)), None)


def experiment_in(database: Path, name: str) -> tuple[str, bool, str] | None:
    """Id, whether it is deleted, and place of files of an experiment; None where the store has none of that name."""
    with contextlib.suppress(sqlite3.Error), _opened(database) as connection:
        row = connection.execute(
            "select experiment_id, lifecycle_stage, artifact_location from experiments where name = ?", (name,)
        ).fetchone()
        return (str(row[0]), row[1] == "deleted", str(row[2])) if row else None
    return None


def experiments_with(database: Path, tag: str) -> list[str]:
    """Ids of the experiments that have a tag, and are not deleted."""
    with contextlib.suppress(sqlite3.Error), _opened(database) as connection:
        found = connection.execute(
            "select e.experiment_id from experiments e join experiment_tags t using (experiment_id) "
            "where t.key = ? and e.lifecycle_stage = 'active' order by e.experiment_id",
            (tag,),
        ).fetchall()
        return [str(experiment_id) for (experiment_id,) in found]
    return []


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    address = f"{database.absolute().as_uri()}?mode=rw"  # never made by looking at it
    with contextlib.closing(sqlite3.connect(address, timeout=20, uri=True)) as connection:
        yield connection


def _settled_state(database: Path, is_over: Callable[[], bool]) -> State:
    """The state once nobody is making the store: a server that somebody starts makes it without our lock."""
    until = time.monotonic() + LONGEST_WAIT_S
    while (state := state_of(database)) == "half-made":
        if time.time() - _last_write(database) >= QUIET_S:
            break
        if is_over() or time.monotonic() > until:
            raise ConnectionError(f"{database} is being made by another process")
        time.sleep(POLL_S)
    return state


def _last_write(database: Path) -> float:
    times: list[float] = []
    for name in (database, *_sidecars(database)):
        with contextlib.suppress(FileNotFoundError):
            times.append(name.stat().st_mtime)
    return max(times, default=0.0)


def _put_aside(database: Path) -> Path:
    """Rename a store and what sqlite keeps beside it: its journal would be played back into the next one."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    names = (f"{database.name}.broken-{stamp}" + (f"-{n}" if n else "") for n in range(1000))
    aside = next(path for name in names if not (path := database.with_name(name)).exists())
    database.rename(aside)
    for sidecar in _sidecars(database):
        if sidecar.exists():
            sidecar.rename(aside.with_name(aside.name + sidecar.name.removeprefix(database.name)))
    sync(database.parent)
    return aside


def _make(database: Path, make: Callable[[Path], None]) -> None:
    new = database.with_name(f".{database.name}.new-{os.getpid()}")
    try:
        make(new)
        sync(new)
        for sidecar in _sidecars(database):  # of a store that somebody removed: not of this one
            if sidecar.exists():
                _put_aside(sidecar)
        if database.exists() and not database.stat().st_size:
            database.unlink()
        try:
            os.link(new, database)  # unlike a rename, it replaces nothing that somebody else has made meanwhile
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not database.exists():
                new.rename(database)
        sync(database.parent)
    finally:
        for path in (new, *_sidecars(new)):
            path.unlink(missing_ok=True)


def _sidecars(database: Path) -> list[Path]:
    return [database.with_name(database.name + suffix) for suffix in SIDECARS]
