"""The doors: a folder is handed through, an address is a copy that is in line with its store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import until
from s3_server import S3Server

from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import RunLockedError, StorageError, UserError
from rlhf_core.contracts.locking import is_held
from rlhf_core.store import lease
from rlhf_core.store.address import CACHE, Address, shown
from rlhf_core.store.objects import Objects
from rlhf_core.store.opening import adding, check_new, copy_of, local, reading, writing

WORK = """
import sys, time
from rlhf_core.contracts.durable import write_file
from rlhf_core.store.opening import writing
with writing(sys.argv[1]) as folder:
    write_file(folder / "run.json", b"{}")
    write_file(folder / "begun", b"")
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.LEASE, "3")


def begin(url: str) -> None:
    with writing(url) as folder:
        write_file(folder / "run.json", b"{}")


def test_a_folder_is_handed_through(tmp_path: Path) -> None:
    with writing(tmp_path) as written, adding(str(tmp_path), "evaluations") as added:
        assert written == added == reading(tmp_path) == copy_of(tmp_path) == tmp_path
    assert local("org/model") == "org/model"
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_there_on_another_machine(url: str, elsewhere: Callable[[], None]) -> None:
    with writing(url) as folder:
        write_file(folder / "run.json", b"{}")
        assert reading(url) == folder
        assert local(url) == str(folder)
        with writing(f"{url}/") as again:
            assert again == folder
    elsewhere()
    there = reading(url)
    assert there != folder
    assert (there / "run.json").read_bytes() == b"{}"
    assert shown(there / "run.json") == f"{url}/run.json"


def test_what_fails_inside_is_told_by_the_address(url: str) -> None:
    with pytest.raises(UserError) as told, writing(url) as folder:
        raise UserError(f"{folder}/x is missing")
    assert str(told.value) == f"{url}/x is missing"
    assert list(told.value.problems) == [f"{url}/x is missing"]


def test_nothing_is_written_where_something_else_is(url: str, objects: Objects) -> None:
    objects.put("data.csv", b"1,2")
    for door in (lambda: check_new(url), lambda: writing(url).__enter__()):
        with pytest.raises(UserError, match=f"--run-dir {url} is neither empty nor a run: it holds data.csv"):
            door()
    with pytest.raises(UserError, match=f"{url} is not a run: it has no run.json"):
        reading(url)
    with pytest.raises(UserError, match=f"{url} is not a run: it has no run.json"):
        writing(url, new=False).__enter__()
    assert list(objects.list().entries) == ["data.csv"]


def test_a_new_run_begins_in_nothing_only(url: str) -> None:
    check_new(url)
    begin(url)
    with pytest.raises(UserError, match=f"already holds a run; continue it with `rlhf resume {url}`"):
        check_new(url)


def test_the_store_is_ahead_after_a_kill_and_the_copy_is_healed(url: str, objects: Objects) -> None:
    begin(url)
    objects.put("guards.json", b"in the store, though its writer was killed before it was here")
    objects.put("checkpoints/000002/.absent", b"")
    objects.put("checkpoints/000002/weights", b"half of it")
    here = reading(url)
    assert sorted(p.name for p in here.iterdir()) == ["guards.json", "run.json"]
    assert "checkpoints/000002/weights" in objects.list().entries
    with writing(url) as folder:
        assert sorted(p.name for p in folder.iterdir()) == ["guards.json", "run.json"]
        assert set(objects.list().entries) == {"guards.json", "run.json", lease.NAME}


def test_a_reader_may_leave_out_the_weights(url: str, objects: Objects) -> None:
    begin(url)
    objects.put("checkpoints/000002/policy/model.safetensors", b"weights")
    objects.put("checkpoints/000002/manifest.json", b"{}")
    light = reading(url, weights=False)
    assert [p.name for p in (light / "checkpoints" / "000002").iterdir()] == ["manifest.json"]
    assert (reading(url) / "checkpoints" / "000002" / "policy" / "model.safetensors").read_bytes() == b"weights"


def test_an_evaluation_adds_its_room_and_nothing_else(
    url: str, objects: Objects, elsewhere: Callable[[], None]
) -> None:
    with writing(url) as folder:
        write_file(folder / "run.json", b"{}")
        elsewhere()
    with adding(url, "evaluations") as folder:
        write_file(folder / "evaluations" / "a" / "summary.json", b"{}")
        write_file(folder / "view.html", b"")
    assert set(objects.list().entries) == {"run.json", "evaluations/a/summary.json", lease.NAME}


class TestTwoProcesses:
    @pytest.fixture
    def other(self, url: str, store: S3Server, tmp_path: Path):
        """A process of another machine that works on the run."""
        environment = {**os.environ, CACHE: str(tmp_path / "other")}
        process = subprocess.Popen([sys.executable, "-c", WORK, url], env=environment)
        until(lambda: "begun" in store.names(url))
        yield process
        process.kill()
        process.wait()

    def test_the_second_is_refused_and_readers_know_that_it_goes_on(self, url: str, other: object) -> None:
        with pytest.raises(RunLockedError, match=rf"process {other.pid} of .* is working on {url}"):  # pyright: ignore
            writing(url).__enter__()
        folder = reading(url)
        assert (folder / "begun").is_file()
        assert is_held(folder / "lock")

    def test_after_a_kill_another_machine_waits_and_goes_on(
        self, url: str, other: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
    ) -> None:
        other.send_signal(signal.SIGKILL)
        other.wait()
        begun = time.monotonic()
        with writing(url) as folder:
            assert time.monotonic() - begun >= 3.0
            assert not is_held(folder / "lock")
            write_file(folder / "guards.json", b"{}")
        assert "watching for 3 s whether that process lives" in caplog.text

    def test_one_that_was_stopped_for_too_long_writes_no_more(
        self, url: str, other: subprocess.Popen[bytes], store: S3Server
    ) -> None:
        other.send_signal(signal.SIGSTOP)
        with writing(url) as folder:
            other.send_signal(signal.SIGCONT)
            write_file(folder / "run.json", b'{"mine": 1}')
            time.sleep(0.5)
        assert (Objects(Address.of(url)).read("run.json") or [b""])[0] == b'{"mine": 1}'


def test_on_one_machine_the_copy_has_one_writer_and_readers_leave_it_alone(
    url: str, store: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORK, url], env=dict(os.environ))
    try:
        until(lambda: "begun" in store.names(url))
        folder = reading(url)
        (folder / "just now.tmp").touch()
        assert reading(url) == folder
        assert (folder / "just now.tmp").exists()
        with pytest.raises(RunLockedError, match=f"another process is working on {url}"):
            writing(url).__enter__()
    finally:
        process.kill()
        process.wait()
    with writing(url):
        assert "watching" not in caplog.text, "the lock has proved that the process is dead"


def test_a_store_that_is_gone_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("rlhf_core.store.objects.TRIES", 1)
    monkeypatch.setattr("rlhf_core.store.place.Objects", lambda address: Objects(address, tries=1))
    with pytest.raises(StorageError, match="look after that store, and whether this machine reaches it"):
        reading(url)
