"""Killed with SIGKILL three times and resumed each time, a run of any configuration ends as an undisturbed one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torture.configs import CASES, COMBINED
from torture.exactness import moments

from rlhf_core.contracts.stage_graph import FILE_STEMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong with each case that was asked for."""
    asked = [
        str(item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torture.exactness", str(tmp_path_factory.mktemp("exact")), *asked],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*COMBINED, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES)])
def test_killed_and_resumed_again_and_again_it_is_the_undisturbed_run(
    case: str, problems: dict[str, list[str]]
) -> None:
    assert problems[case] == []


def test_a_few_cases_hold_the_state_of_all() -> None:
    combined = {change for changes in COMBINED.values() for change in changes}
    states = {change.partition("=")[0] for changes in CASES.values() for change in changes}
    assert states - {change.partition("=")[0] for change in combined} == set()


def test_together_the_cases_die_at_every_stage_of_every_iteration_before_and_after() -> None:
    died = {moment for case in CASES for moment in moments(case)}
    places = {f"{i:06d}/{stem}.json" for i in range(3) for stem in FILE_STEMS.values()}
    assert {place for place, _ in died} == places | {"checkpoints/000002"}
    assert {after for _, after in died} == {False, True}
