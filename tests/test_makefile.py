"""The Makefile and the Python it meets, tried with programs that play Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAYED = """#!/bin/sh
[ "$1" = -c ] && [ -z "$2" ] && exit 0
[ "$1" = -c ] && echo VERSION && exit 0
[ "$1 $2" = "-m venv" ] && mkdir -p $3/bin && touch $3/pyvenv.cfg && cp "$0" $3/bin/python && exit 0
[ "$1 $2" = "-m pip" ] && echo "$*" >> pip.log
exit 0
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


class Place:
    """A folder with the Makefile, and the only programs that it finds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).touch()
        for name in ("sh", "mkdir", "touch", "cp", "rm", "make"):
            found = shutil.which(name)
            assert found is not None
            (self.programs / name).symlink_to(found)

    def plays(self, name: str, version: str) -> None:
        """Put a program there that says it is this Python."""
        file = self.folder / name if "/" in name else self.programs / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PLAYED.replace("VERSION", version))
        file.chmod(0o755)

    def has_environment(self, version: str) -> None:
        self.plays(".venv/bin/python", version)
        for name in ("pyvenv.cfg", ".installed", "mine"):
            (self.folder / ".venv" / name).touch()

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs / "make", "--no-print-directory", ".venv/.installed", *arguments],
            cwd=self.folder, env={"PATH": str(self.programs), **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def version(self) -> str:
        return (self.folder / ".venv/bin/python").read_text().split("echo ")[1].split(" ")[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("version", ["3.10", "3.9", "2.7"])
def test_too_old_is_told_before_anything_is_made(place: Place, version: str) -> None:
    place.plays("python3", version)
    done = place.make()
    assert done.returncode != 0
    assert f"python3 is Python {version}, and Python 3.11 or newer is needed: install it and run 'make" in done.stderr
    assert not (place.folder / ".venv").exists()


def test_a_newer_one_that_is_there_is_named_and_used(place: Place) -> None:
    place.plays("python3", "3.10")
    place.plays("python3.12", "3.12")
    assert "run 'make .venv/.installed PYTHON=python3.12'" in place.make().stderr
    assert place.make("PYTHON=python3.12").returncode == 0
    assert place.version() == "3.12"
    assert (place.folder / ".venv/.installed").is_file()
    assert place.make().returncode == 0, "the environment decides, not python3"


@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_new_enough(place: Place, version: str) -> None:
    place.plays("python3", version)
    assert place.make().returncode == 0
    assert "install" in (place.folder / "pip.log").read_text()


def test_no_python_at_all(place: Place) -> None:
    assert "python3 is not there, and Python 3.11 or newer is needed" in place.make().stderr


def test_an_environment_of_an_old_one_is_refused_and_kept(place: Place) -> None:
    place.has_environment("3.10")
    place.plays("python3.11", "3.11")
    for arguments in ((), ("PYTHON=python3.11",)):
        done = place.make(*arguments)
        assert done.returncode != 0
        assert (
            ".venv is of Python 3.10, and Python 3.11 or newer is needed: run 'make clean', then 'make" in done.stderr
        )
        assert done.stderr.splitlines()[0].endswith("PYTHON=python3.11'")
        assert (place.folder / ".venv/mine").is_file()


def test_an_environment_whose_python_is_gone_is_refused_and_kept(place: Place) -> None:
    place.has_environment("3.12")
    (place.folder / ".venv/bin/python").unlink()
    place.plays("python3", "3.12")
    assert ".venv is of a Python that does not run" in place.make().stderr
    assert (place.folder / ".venv/mine").is_file()


def test_an_environment_that_could_not_be_made_is_not_left_half_made(place: Place) -> None:
    place.plays("python3", "3.12")
    program = place.programs / "python3"
    program.write_text(program.read_text().replace("&& cp", "&& exit 1 && cp"))
    assert place.make().returncode != 0
    assert not (place.folder / ".venv").exists()


@pytest.mark.parametrize("how", ["command line", "environment"])
def test_an_environment_of_another_one_is_not_taken_in_silence(place: Place, how: str) -> None:
    place.has_environment("3.12")
    place.plays("python3.11", "3.11")
    done = place.make("PYTHON=python3.11") if how == "command line" else place.make(PYTHON="python3.11")
    assert done.returncode != 0
    assert ".venv is of Python 3.12, and PYTHON=python3.11 is Python 3.11: run 'make clean' first" in done.stderr
    assert (place.folder / ".venv/mine").is_file()


def test_nothing_is_done_where_all_is_there(place: Place) -> None:
    place.has_environment("3.12")
    place.plays("python3", "3.10")
    done = place.make()
    assert (done.returncode, done.stderr) == (0, "")
    assert not (place.folder / "pip.log").exists()


def test_lint_builds_the_documentation_strictly(place: Place) -> None:
    place.plays("python3", "3.12")
    told = place.make("--dry-run", "lint").stdout
    assert "docs/prepare.py build/docs" in told
    assert "zensical build --strict" in told
    assert told.index("prepare.py") < told.index("zensical") < told.index("pyright")
