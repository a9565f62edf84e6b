"""Each configuration killed at several stages of several iterations, each time resumed: for the test of exact resume.

    python -m torture.exactness FOLDER [CASE ...]      prints a JSON object: case -> what is wrong, empty if nothing

It is a program of its own because a test's process has threads, and cannot fork children that compute.
"""

# ruff: noqa: E402 - the environment stands above the imports that read it
from __future__ import annotations

from environment import be_quiet_and_private

be_quiet_and_private()

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_world import Tiny, make_tiny, tiny_in
from torture.configs import CASES, COMBINED, config_of
from torture.deaths import KILLED, done_again, inodes, last_words, live, lost, promises, torn
from torture.runs import fingerprint, in_child, warm

from rlhf_core.contracts.stage_graph import FILE_STEMS


def moments(case: str) -> list[tuple[str, bool]]:
    """Where a case's processes die, in order: the end of a renamed path, and whether the rename was done.

    In each iteration once, at another stage for each case; in some cases at the commit of a checkpoint instead.
    """
    number, stems = [*CASES, *COMBINED].index(case), list(FILE_STEMS.values())
    places = [f"{i:06d}/{stems[(number + 2 * i) % len(stems)]}.json" for i in range(3)]
    if number % 4 == 3:
        places[2] = "checkpoints/000002"
    return [(place, bool((number + i) % 2)) for i, place in enumerate(places)]


def problems_of(tiny: Tiny, case: str, folder: Path) -> list[str]:
    """What is wrong with a run of a case that is killed again and again."""
    config, whole, run_dir, ledger = config_of(tiny, case), folder / "whole", folder / "killed", folder / "ledger"
    if live(config, whole, folder / "ledger-of-whole"):
        return [f"the undisturbed run failed: {last_words(whole)}"]
    problems: list[str] = []
    before: dict[Path, int] = {}
    for at, after in moments(case):
        ended = live(config, run_dir, ledger, at, after=after)
        if ended != KILLED:
            return [*problems, f"it was to die at {at}, but ended with {ended}: {last_words(run_dir)}"]
        held = promises(ledger)
        problems += lost(held) + torn(run_dir)
        before = inodes(held)
    if live(config, run_dir, ledger):
        return [*problems, f"the last resume failed: {last_words(run_dir)}"]
    problems += lost(promises(ledger)) + torn(run_dir) + done_again(before)
    if fingerprint(run_dir) != fingerprint(whole):
        problems.append("the killed run has another result than the undisturbed one")
    return problems


def main(arguments: Sequence[str]) -> None:
    """See the top of the file."""
    folder, cases = Path(arguments[0]), list(arguments[1:]) or list(CASES)
    torch.set_num_threads(1)
    for name in ("tiny", "warm"):
        (folder / name).mkdir()
    in_child(lambda: make_tiny(folder / "tiny"))
    tiny = tiny_in(folder / "tiny")
    warm(config_of(tiny, next(case for case in CASES if case.startswith("LoRA"))), folder / "warm")
    found: dict[str, list[str]] = {}
    for case in cases:
        (folder / "case").mkdir()
        found[case] = problems_of(tiny, case, folder / "case")
        shutil.rmtree(folder / "case")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
