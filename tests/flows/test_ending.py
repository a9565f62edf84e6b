"""How the process of a command ends: exit handlers run, and then it is gone, with its code."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import atexit, os, sys
from flows import cli

class TornDown:
    def __del__(self):
        os.write(2, b"torn down")
        os._exit(99)

kept = TornDown()
run = cli._run

def registering(arguments):
    atexit.register(print, "exit handler")
    return run(arguments)

cli._run = registering
sys.argv = ["rlhf", *{arguments!r}]
cli.main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, "rlhf-flow 0."),
        (["config"], 0, "num_iterations"),
        (["inspect", "/nowhere"], 2, "is not a run folder"),
        ([], 2, "Usage"),
    ],
)
def test_exit_handlers_run_and_nothing_is_torn_down(arguments: list[str], code: int, said: str) -> None:
    """A thread inside a C++ library would abort the process there."""
    child = [sys.executable, "-c", CHILD.format(arguments=arguments)]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, "torn down" in ended.stderr) == (code, False), ended.stderr
    assert ended.stdout.endswith("exit handler\n")
    assert said in ended.stdout + ended.stderr
