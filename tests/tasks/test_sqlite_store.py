"""MLflow's sqlite file is made whole or not at all, whenever its maker is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.tracking import sqlite_store
from tasks.tracking.outbox import RefusalError
from tasks.tracking.sqlite_store import experiment_in, follow_move, make_ready, state_of

STEPS = (
    "create table experiments (experiment_id integer, name text, lifecycle_stage text, artifact_location text)",
    "create table runs (run_uuid text)",
    "create table alembic_version (version_num text)",
    "insert into alembic_version values ('1')",
    "alter table runs add column status text",
    "update alembic_version set version_num = '2'",
    "insert into experiments values (0, 'Default', 'active', '/x')",
)
"""What MLflow does, in short: tables, migrations, and at last an experiment."""


def making(die_at: int | None = None, made: list[str] | None = None) -> Callable[[Path], None]:
    """A maker of stores that dies before a step."""

    def make(path: Path) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        for number, step in enumerate(STEPS):
            if number == die_at:
                os._exit(9)
            connection.execute(step)
            if made is not None:
                made.append(step)
        connection.close()

    return make


def killed(work: Callable[[], object]) -> None:
    """Do work in a child that ends by itself with 9."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "mlflow.db"


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(sqlite_store.logger, "warning", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize("die_at", range(len(STEPS)))
def test_a_maker_that_is_killed_leaves_nothing_in_the_way(database: Path, die_at: int, warned: list[str]) -> None:
    killed(lambda: make_ready(database, making(die_at)))
    assert not database.exists()
    make_ready(database, making())
    assert state_of(database) == "whole"
    assert [path.name for path in database.parent.iterdir()] == ["mlflow.db"]
    assert not warned


@pytest.mark.parametrize("call", ["sync", "link", "unlink", "sync_folder"])
def test_so_does_one_that_is_killed_around_the_rename(
    database: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        os._exit(9)

    def work() -> None:
        if call == "link":
            os.link = die
        elif call == "unlink":
            Path.unlink = die
        else:
            real, wanted = sqlite_store.sync, database.parent if call == "sync_folder" else None
            sqlite_store.sync = lambda path: die() if wanted in (None, path) else real(path)
        make_ready(database, making())

    killed(work)
    make_ready(database, making())
    assert state_of(database) == "whole"
    assert [path.name for path in database.parent.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize("steps", range(1, len(STEPS)))
def test_a_store_that_others_left_half_made_is_put_aside_with_its_journal(
    database: Path, steps: int, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(sqlite_store, "QUIET_S", 0.0)
    with sqlite3.connect(database, isolation_level=None) as connection:
        for step in STEPS[:steps]:
            connection.execute(step)
    connection.close()
    (database.parent / "mlflow.db-wal").write_bytes(b"")
    before = database.read_bytes()
    make_ready(database, making())
    assert state_of(database) == "whole"
    aside, *rest = sorted(database.parent.glob("mlflow.db.broken-*"))
    assert aside.read_bytes() == before, "never deleted"
    assert [path.name for path in rest] == [f"{aside.name}-wal"] or not rest, "sqlite may have removed it itself"
    assert not (database.parent / "mlflow.db-wal").exists()
    (said,) = warned
    assert "was left half made by a process that was killed" in said
    assert aside.name in said


def test_a_journal_never_stays_for_the_next_store(database: Path) -> None:
    for name in ("mlflow.db", "mlflow.db-journal"):
        (database.parent / name).write_bytes(name.encode())
    aside = sqlite_store._put_aside(database)
    assert sorted(path.name for path in database.parent.iterdir()) == [aside.name, f"{aside.name}-journal"]
    (database.parent / "mlflow.db-journal").write_bytes(b"of a store that was removed by hand")
    make_ready(database, making())
    assert state_of(database) == "whole"
    assert not (database.parent / "mlflow.db-journal").exists()


def test_a_new_store_is_on_the_disk_before_it_has_its_name(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(sqlite_store, "sync", lambda path: synced.append((path.name, database.exists())))
    make_ready(database, making())
    assert synced == [(f".mlflow.db.new-{os.getpid()}", False), (database.parent.name, True)]


def test_one_that_somebody_else_is_making_just_now_is_waited_for(
    database: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(sqlite_store, "QUIET_S", 1.0)
    go = threading.Event()

    def other() -> None:
        connection = sqlite3.connect(database, isolation_level=None)
        for step in STEPS:
            connection.execute(step)
            go.set()
            time.sleep(0.1)
        connection.close()

    maker = threading.Thread(target=other)
    maker.start()
    go.wait()
    made: list[str] = []
    make_ready(database, making(made=made))
    maker.join()
    assert (made, warned) == ([], [])
    assert state_of(database) == "whole"


def test_a_store_that_appears_meanwhile_is_not_replaced(database: Path) -> None:
    def make(path: Path) -> None:
        making()(path)
        making()(database)
        with sqlite3.connect(database) as theirs:
            theirs.execute("insert into experiments values (7, 'theirs', 'active', '/y')")
        theirs.close()

    make_ready(database, make)
    assert experiment_in(database, "theirs") == ("7", False, "/y")


def test_a_store_with_anything_in_it_is_never_touched(database: Path) -> None:
    making()(database)
    before = database.read_bytes()
    make_ready(database, lambda _: pytest.fail("made again"))
    assert database.read_bytes() == before


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_file_is_no_store(database: Path, content: bytes | None) -> None:
    if content is not None:
        database.write_bytes(content)
    assert state_of(database) == "missing"
    make_ready(database, making())
    assert state_of(database) == "whole"


def test_a_file_that_is_no_database_is_refused_and_stays(database: Path) -> None:
    database.write_bytes(b"my notes about mlflow " * 100)
    with pytest.raises(RefusalError, match=r"damaged or no database .* put a copy back, or move it away"):
        make_ready(database, making())
    assert database.read_bytes().startswith(b"my notes")


def test_a_database_of_something_else_is_left_to_mlflow(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("create table mine (x)")
    connection.close()
    assert state_of(database) == "foreign"
    assert follow_move(database) is None
    assert follow_move(database.with_name("none.db")) is None
    assert not database.with_name("none.db").exists()
    make_ready(database, lambda _: pytest.fail("made again"))


def test_behind_a_link_it_is_made_where_the_link_points(database: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    database.symlink_to(tmp_path / "elsewhere" / "store.db")
    make_ready(database, making())
    assert state_of(tmp_path / "elsewhere" / "store.db") == "whole"
    assert database.is_symlink()


MAKER = """
import sys
from pathlib import Path
import mlflow
from mlflow.store.tracking import sqlalchemy_store
from tasks.tracking.outbox import store_lock
from tasks.tracking.sqlite_store import make_ready
from tasks.tracking.tracker import _make_store
print("ready", flush=True)
with store_lock(f"sqlite:///{sys.argv[1]}"):
    make_ready(Path(sys.argv[1]), _make_store)
"""


def maker(database: Path) -> Any:
    process = subprocess.Popen([sys.executable, "-c", MAKER, str(database)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_a_real_maker_is_killed_for_real_and_two_others_make_one_store(database: Path, empty_store: Path) -> None:
    first = maker(database)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 50_000 for path in database.parent.glob(".mlflow.db.new-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not database.exists()
    assert list(database.parent.glob(".mlflow.db.new-*")), "it was killed in the middle"
    others = [maker(database), maker(database)]
    assert [other.wait() for other in others] == [0, 0]
    assert sorted(path.name for path in database.parent.iterdir()) == [".mlflow.db.lock", "mlflow.db"]
    with sqlite3.connect(database) as ours, sqlite3.connect(empty_store) as theirs:
        version = "select version_num from alembic_version"
        assert ours.execute(version).fetchall() == theirs.execute(version).fetchall()
    ours.close()
    theirs.close()


def test_the_state_of_a_real_store_is_whole_only_at_its_very_end(empty_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    assert state_of(store) == "whole"
    with sqlite3.connect(store) as connection:
        connection.execute("delete from experiments")
    connection.close()
    assert state_of(store) == "half-made"
