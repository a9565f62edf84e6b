"""A run or bundle of somebody else: nothing that it names is started, imported or contacted before a person says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from damage import finished_run, flip
from strangers import Marks, chdir_into, from_a_stranger, marks, nothing_is_accepted
from tiny_world import Tiny

from flows.commands.options import split_interpreter
from flows.ui import find_tracker
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.evaluation.request import Request, request_config
from rlhf_core.verification.run import verify_run
from tasks.evaluation.blend import blend
from tasks.evaluation.evaluate import check_evaluation
from tasks.lifecycle.repair import repair_run
from tasks.lifecycle.start import check_resumable, consent, record_drift
from tasks.replay.bundle import make_bundle
from tasks.replay.iteration import replay_iteration
from tasks.session.session import Session, open_session
from tasks.tracking.tracker import connect

Make = Callable[[Marks, Path], dict[str, dict[str, Any]]]
"""Sections of the config of a run that lies in this folder."""


@pytest.fixture(scope="module")
def honest(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("honest") / "run")


@pytest.fixture(autouse=True)
def nobody_has_said_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    nothing_is_accepted(monkeypatch, tmp_path / "state")
    open_session.cache_clear()
    yield
    open_session.cache_clear()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Marks]:
    with marks(tmp_path) as found:
        yield found


def vllm(python: object) -> dict[str, dict[str, Any]]:
    return {"generation": {"engine": "vllm", "vllm": {"python": str(python), "options": {}, "deadline_s": 60.0}}}


def reward(**component: Any) -> dict[str, dict[str, Any]]:
    named = {"name": "theirs", **component}
    return {"reward": {"components": [named], "allowed_hosts": [component.get("host", "127.0.0.1")]}}


def service(there: Marks) -> dict[str, dict[str, Any]]:
    found = reward(kind="http", url=f"http://{there.address}/score", token_env="HOME", retries=0)
    return {"reward": found["reward"] | {"allowed_hosts": [there.address]}}


STRANGE: dict[str, Make] = {
    "program": lambda there, run: vllm(there.program(there.folder / "theirs" / "python")),
    "program in the run": lambda there, run: vllm(there.program(run / "venv" / "bin" / "python")),
    "program by the working folder": lambda there, run: vllm(there.program(run / "bin" / "python") and "bin/python"),
    "function": lambda there, run: reward(
        kind="function", function="theirs:score", folder=str(there.module(there.folder / "code" / "theirs.py").parent)
    ),
    "function in the working folder": lambda there, run: (
        reward(kind="function", function="theirs:score") if there.module(there.folder / "theirs.py") else {}
    ),
    "function in the run": lambda there, run: (
        reward(kind="function", function="theirs:score", folder=str(run)) if there.module(run / "theirs.py") else {}
    ),
    "function of a library": lambda there, run: reward(
        kind="function", function="subprocess:call", params={"args": f"touch {there.mark}", "shell": True}
    ),
    "service": lambda there, run: service(there),
    "tracker": lambda there, run: {"tracking": {"enabled": True, "uri": f"http://{there.address}"}},
    "tracker in a file": lambda there, run: {"tracking": {"enabled": True, "uri": f"sqlite:///{there.mark}"}},
    "place of artifacts": lambda there, run: {
        "tracking": {"enabled": True, "artifact_location": f"file://{there.mark}"}
    },
    "cluster": lambda there, run: {"execution": {"engine": "ray", "num_shards": 2, "ray": {"address": there.address}}},
    "meeting of ranks": lambda there, run: {
        "execution": {"update": {"launcher": "torchrun", "nnodes": 2, "endpoint": there.address, "deadline_s": 1.0}}
    },
}


def stranger(honest: Path, there: Marks, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = there.folder / "run"
    shutil.copytree(honest, run, symlinks=True)
    chdir_into(monkeypatch, run if "working folder" in name and "program" in name else there.folder)
    return from_a_stranger(honest, run, **STRANGE[name](there, run))


def everything_that_a_person_does(run: Path) -> list[Callable[[], object]]:
    place = str(run)
    few: dict[str, Any] = {"num_prompts": 2, "samples": 2, "frontier_samples": 64}
    return [
        lambda: verify_run(run),
        lambda: check_resumable(place, accept_drift=False),
        lambda: check_resumable(place, accept_drift=True),
        lambda: record_drift(place),
        lambda: check_evaluation(Request(place, **few), None),
        lambda: check_evaluation(Request(place, **few), request_config(place, None, ["generation.temperature=0.5"])),
        lambda: blend(place, str(run.parent / "blended"), share=None, kl=0.01),
        lambda: replay_iteration(place, 1),
        lambda: make_bundle(place, 1, str(run.parent / "a.rlhf.zip"), with_models=False),
        lambda: find_tracker(run),
        lambda: (flip(run / "iterations" / "000001" / "03_scores.arrow"), repair_run(place)),
    ]


@pytest.mark.parametrize("name", list(STRANGE))
def test_nothing_is_started_imported_or_contacted(
    name: str, honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stranger(honest, there, name, monkeypatch)
    with pytest.raises(UserError, match=r"you have not; if you trust it|inside the run folder"):
        check_resumable(str(run), accept_drift=True)
    for step in everything_that_a_person_does(run):
        with suppress(RlhfError):
            step()
        assert there.nothing_happened()


@pytest.mark.parametrize("name", ["program", "function", "service", "tracker", "cluster", "meeting of ranks"])
def test_each_door_is_closed_whoever_knocks(
    name: str, honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_core.contracts.run_folder import RunFolder
    from rlhf_core.models.vllm_engine import VllmProcess
    from rlhf_core.rewards.loading import load_component
    from tasks.ranks.group import RankGroup
    from tasks.ray.workers import RayWorkers

    run = RunFolder.open(stranger(honest, there, name, monkeypatch))
    knock: dict[str, Callable[[], object]] = {
        "program": lambda: VllmProcess(run.config.generation.vllm, "float32", "cpu", 1),
        "function": lambda: Session(run).models.reward_components,
        "service": lambda: load_component(
            run.config.reward.components[0], field="f", columns=[], policy_vocabulary="", device=Session(run).device
        ),
        "tracker": lambda: connect(run),
        "cluster": lambda: RayWorkers(run),
        "meeting of ranks": lambda: RankGroup(run.config.execution.update, "cpu", 1)._start(),
    }
    with pytest.raises(UserError, match="you have not; if you trust it, add --trust"):
        knock[name]()
    assert there.nothing_happened()


@pytest.mark.parametrize("name", ["tracker", "tracker in a file"])
def test_the_page_of_a_tracker_is_not_opened(
    name: str, honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stranger(honest, there, name, monkeypatch)
    with pytest.raises(UserError, match="and you have not; if you trust it, give it as --tracking-uri"):
        find_tracker(run)


@pytest.mark.parametrize("name", ["program", "function"])
def test_a_replay_skips_the_stage_and_says_why(
    name: str, honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stranger(honest, there, name, monkeypatch)
    replay = replay_iteration(str(run), 1)
    skipped = {stage.stage: stage.skipped for stage in replay.stages if stage.skipped}
    assert list(skipped) == ["generate" if name == "program" else "score_rewards"]
    assert all("you have not; if you trust it, add --trust" in why for why in skipped.values())
    assert {stage.stage for stage in replay.stages if stage.replayed} >= {"sample_prompts", "reference_logprobs"}


def test_a_bundle_starts_no_program_even_one_that_was_accepted(
    honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stranger(honest, there, "program", monkeypatch)
    bundle = there.folder / "it.rlhf.zip"
    make_bundle(str(run), 0, str(bundle))
    consent(str(run), [str(there.folder / "theirs" / "python")])
    replay = replay_iteration(str(bundle), None)
    (skipped,) = (stage for stage in replay.stages if stage.skipped)
    assert skipped.stage == "generate"
    assert skipped.skipped is not None
    assert "a bundle starts no program: name yours with --set generation.vllm.python=PATH" in skipped.skipped
    assert there.nothing_happened()


def test_what_a_person_names_is_started(honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stranger(honest, there, "program", monkeypatch)
    consent(str(run), [str(there.folder / "theirs" / "python")])
    with pytest.raises(RlhfError, match=r"versions.vllm: absent -> vllm 0.0"):
        check_resumable(str(run), accept_drift=False)
    assert there.mark.exists()


def test_a_person_names_their_own_interpreter(honest: Path, there: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stranger(honest, there, "program in the run", monkeypatch)
    mine = there.folder / "mine" / "python"
    mine.parent.mkdir()
    mine.write_text("#!/bin/sh\necho vllm 0.1\n")
    mine.chmod(0o755)
    others, python = split_interpreter([f"generation.vllm.python={mine}", "guards.kl_ceiling.threshold=3"])
    assert others == ["guards.kl_ceiling.threshold=3"]
    consent(str(run), (), python)
    assert read_record(run / "run.json")["config"]["generation"]["vllm"]["python"] == str(mine)
    with pytest.raises(RlhfError, match=r"versions.vllm: absent -> vllm 0.1"):
        check_resumable(str(run), accept_drift=False)
    assert there.nothing_happened()
    with pytest.raises(UserError, match="inside the run folder"):
        consent(str(run), (), str(run / "venv" / "bin" / "python"))
    assert there.nothing_happened()


def test_ones_own_runs_go_on_with_one_command(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another process, which knows what was accepted from its file alone."""
    from torture.runs import battery_config, start

    (tmp_path / "mine_of_strangers.py").write_text("def score(responses): return [0.0] * len(responses)\n")
    component = {"kind": "function", "function": "mine_of_strangers:score", "folder": str(tmp_path)}
    start(battery_config(tiny, {"num_iterations": 1, "reward": {"components": [component]}}), tmp_path / "run")
    monkeypatch.delenv("RLHF_TRUST")
    check_resumable(str(tmp_path / "run"), accept_drift=False)
    nothing_is_accepted(monkeypatch, tmp_path / "another user")
    with pytest.raises(UserError, match="add --trust"):
        check_resumable(str(tmp_path / "run"), accept_drift=False)
