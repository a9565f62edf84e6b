"""Where the machine says no, the command says one sentence: no traceback, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import edge
from flows.cli import main
from flows.console import EXIT_PIPE
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError

RLHF = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]
ROOT = Path(__file__).parents[2]


def rlhf(*arguments: str | bytes, cwd: Path | None = None, stdout: Any = subprocess.PIPE, **environment: str) -> Any:
    """A command in a process of its own."""
    own = {"PYTHONPATH": str(ROOT), **environment}
    words = [*RLHF, *arguments]
    return subprocess.run(
        words, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | own, check=False, timeout=120
    )


def sentence(done: Any, code: int = 2) -> str:
    """The only line on stderr of a command that failed."""
    assert done.returncode == code, done
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_a_full_disk_behind_the_output() -> None:
    with Path("/dev/full").open("w") as full:
        said = sentence(rlhf("config", stdout=full))
    assert "the output" in said
    assert "cannot be written: No space left on device; free some space" in said


def test_an_output_that_is_closed_ends_nothing() -> None:
    command = " ".join(f"'{word}'" for word in [*RLHF, "config"])
    done = subprocess.run(f"{command} >&-", shell=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["config"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = rlhf(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode in (EXIT_PIPE, 1)
    assert done.stderr == b""


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = " ".join(f"'{word}'" for word in [*RLHF, "config"])
    done = subprocess.run(
        ["/bin/sh", "-c", f"cd '{gone}' && rmdir '{gone}' && exec {command}"], capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"error: the working folder cannot be used (No such file or directory); cd to one" in done.stderr


@pytest.mark.parametrize("arguments", [["inspect", b"run\xff"], ["inspect", ".", "--contains", b"\xff\xfe"]])
def test_words_that_are_no_text(arguments: list[Any], tmp_path: Path) -> None:
    assert "is not UTF-8 text; type it in UTF-8" in sentence(rlhf(*arguments, cwd=tmp_path))


def test_a_latin_terminal_prints_the_template() -> None:
    done = rlhf("config", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "coefficient beta" in done.stdout.decode("latin-1")


@pytest.mark.parametrize(
    "words", [["check", "--config", "{}"], ["inspect", "{}"], ["train", "--config", "run.yaml", "--run-dir", "{}"]]
)
def test_a_name_that_no_disk_takes(words: list[str], tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> None:
    from rlhf_core.contracts.config_io import config_template

    (tmp_path / "run.yaml").write_text(config_template(tiny_config([])))
    said = sentence(rlhf(*(word.format("n" * 300) for word in words), cwd=tmp_path))
    assert "File name too long; choose a shorter name" in said or "nnn" in said


def test_markup_and_escapes_in_a_path_are_text() -> None:
    assert "no/x[/b]\\x1b]8;;y" in sentence(rlhf("check", "--config", "no/x[/b]\x1b]8;;y"))
    done = rlhf("config", "\x1b]0;evil\x85\u202e")
    assert done.returncode == 2
    assert b"\x1b]" not in done.stderr
    assert b"\\x1b]0;evil\\x85\\u202e" in done.stderr


ERRORS = [
    (
        PermissionError(errno.EACCES, "Permission denied", "run/run.json"),
        "run/run.json cannot be used: Permission denied",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), "the output, or a temporary file"),
    (OSError(errno.ESTALE, "Stale file handle", "/net/x"), "mount the network's disk again"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
    (MemoryError(), "the memory of this machine does not suffice"),
    (RuntimeError("can't start new thread"), "the memory of this machine does not suffice"),
    (RuntimeError("could not create a primitive"), "the memory of this machine does not suffice"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory of this machine does not"),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "is not UTF-8"),
    (OSError("https://user:hunter2@host is away"), "is away; see to that"),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=[type(error).__name__ + said[:12] for error, said in ERRORS])
def test_what_the_system_refuses_is_a_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("rlhf_core.contracts.config_io.config_template", refuse)
    with pytest.raises(SystemExit) as caught:
        main(["config"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "hunter2" not in err
    monkeypatch.setenv(edge.TRACEBACK, "1")
    with pytest.raises(SystemExit):
        main(["config"])
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise KeyError("a programmer's mistake")

    monkeypatch.setattr("rlhf_core.contracts.config_io.config_template", refuse)
    with pytest.raises(KeyError):
        main(["config"])


def test_a_library_in_rust_that_gives_up_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("retry-limit-in-match over")

    monkeypatch.setattr("rlhf_core.contracts.config_io.config_template", panic)
    with pytest.raises(SystemExit) as caught:
        main(["config"])
    assert caught.value.code == 2
    assert "a library gave up (retry-limit-in-match over)" in capsys.readouterr().err


def test_a_home_that_takes_nothing_gets_another_place_for_prefect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.commands.options import _places

    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _places() == {}
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert Path(_places()["PREFECT_HOME"]).is_dir()


def test_a_disk_without_shared_memory_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != "/dev/shm")
    said = edge.sentence(OSError(errno.EROFS, "Read-only file system"))
    assert said is not None
    assert "share memory in /dev/shm, which cannot be written" in said


def test_surroundings_that_are_fine_are_no_matter() -> None:
    edge.check_surroundings(["train", "--config", "größe.yaml"])
    with pytest.raises(UserError, match="is not UTF-8"):
        edge.check_surroundings(["\udcff"])
