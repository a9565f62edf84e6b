"""A finished run goes on: exactly, recorded as what it is, and what came before it stays what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from damage import flip, remove
from tiny_world import Tiny
from torture.runs import battery_config, fingerprint, go_on, start

from flows.calling import without_prefect
from flows.cli import main
from flows.ppo import resume
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import Drift, Extension, RunFolder
from rlhf_core.inspection import run_sheet, standing
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.extension import extend_run, plan_extension
from tasks.lifecycle.repair import repair_run
from tasks.replay.iteration import replay_iteration
from tasks.session.session import Session, open_session

BEFORE, AFTER = 3, 5
LINEAR = {"num_iterations": BEFORE, "ppo": {"lr_schedule": "linear", "learning_rate": 1e-3, "num_minibatches": 2}}
CONSTANT = {"ppo": {"lr_schedule": "constant", "learning_rate": 1e-3, "num_minibatches": 2}}


def extend(run_dir: Path, num_iterations: int) -> None:
    """What ``rlhf resume --iterations`` does, in this process, with nothing remembered."""
    open_session.cache_clear()
    with without_prefect():
        resume.fn(str(run_dir), num_iterations=num_iterations)


@pytest.fixture(scope="module")
def ended(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three iterations, whose learning rate has fallen."""
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    open_session.cache_clear()
    start(battery_config(tiny, LINEAR), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def extended(ended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on to five."""
    run_dir = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(ended, run_dir)
    extend(run_dir, AFTER)
    return run_dir


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def make(run_dir: Path) -> Path:
        open_session.cache_clear()
        return Path(shutil.copytree(run_dir, tmp_path / "run", symlinks=True))

    return make


def weights(run_dir: Path) -> list[str]:
    """Digests of the weights after each iteration."""
    run = RunFolder.open(run_dir)
    return [run.manifests(i)["ppo_update"].inputs["policy_after"] for i in range(run.num_finished())]


def rates(run_dir: Path) -> list[float]:
    run = RunFolder.open(run_dir)
    return [run.manifests(i)["ppo_update"].metrics["lr"] for i in range(run.num_finished())]


@pytest.mark.parametrize("overlap", [False, True])
def test_with_a_constant_rate_it_ends_as_a_run_that_had_the_number_from_the_start(
    overlap: bool, tiny: Tiny, tmp_path: Path
) -> None:
    execution = {"num_shards": 2, "num_workers": 0, "overlap": True} if overlap else {}
    changes = {**CONSTANT, "execution": execution}
    open_session.cache_clear()
    start(battery_config(tiny, {**changes, "num_iterations": AFTER}), tmp_path / "whole")
    open_session.cache_clear()
    start(battery_config(tiny, {**changes, "num_iterations": BEFORE}), tmp_path / "run")
    extend(tmp_path / "run", AFTER)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    one, other = (RunFolder.open(tmp_path / name).state_before(AFTER) for name in ("run", "whole"))
    assert one == other, "β, moments and cursor"
    assert verify_run(tmp_path / "run").findings == []


def test_the_learning_rate_follows_the_new_number_from_there_on(extended: Path) -> None:
    falls = [1e-3 * (1 - i / BEFORE) for i in range(BEFORE)] + [1e-3 * (1 - i / AFTER) for i in range(BEFORE, AFTER)]
    assert rates(extended) == pytest.approx(falls)


def test_it_is_recorded_as_what_it_is(ended: Path, extended: Path) -> None:
    before, run = RunFolder.open(ended), RunFolder.open(extended)
    assert run.extensions == (Extension(BEFORE, BEFORE, AFTER, date.today().isoformat(), before.identity),)
    record = read_record(extended / "run.json")["extensions"]
    assert [(e["iteration"], e["before"], e["after"]) for e in record] == [(BEFORE, BEFORE, AFTER)]
    assert "extensions" not in read_record(ended / "run.json"), "other runs keep the record that they had"
    assert [run.num_iterations_at(i) for i in range(AFTER + 1)] == [3, 3, 3, 5, 5, 5]
    assert (run.identity_at(BEFORE - 1), run.identity_at(BEFORE)) == (before.identity, run.identity)
    assert run.identity["config"] != before.identity["config"]
    assert run_sheet(run).facts["extensions"][0].startswith("num_iterations: 3 -> 5, given on ")
    assert standing(run) == "finished"


def test_what_was_computed_before_stays_byte_for_byte(ended: Path, extended: Path) -> None:
    for path in ended.glob("iterations/*/*"):
        assert path.read_bytes() == (extended / path.relative_to(ended)).read_bytes()


def test_the_result_is_that_of_the_new_end(ended: Path, extended: Path) -> None:
    before, after = (json.loads((path / "before_after.json").read_text()) for path in (ended, extended))
    assert before["samples"][0]["before"] == after["samples"][0]["before"]
    assert before["samples"] != after["samples"]


@pytest.mark.parametrize(
    "moment", ["before its first stage", "in its first iteration", "in its second iteration", "before its report"]
)
def test_stopped_in_the_extension_and_resumed_it_ends_bit_identical(
    moment: str, ended: Path, extended: Path, copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy(ended)
    if moment == "before its first stage":
        extend_run(str(run_dir), AFTER)
    else:
        with monkeypatch.context() as patch:
            if moment == "before its report":
                patch.setattr("tasks.reports.report.compare_samples", _stop_after(0))
            else:
                patch.setattr("tasks.shape_rewards.core.shape_rewards", _stop_after("second" in moment))
            with pytest.raises(InterruptedError):
                extend(run_dir, AFTER)
    assert not (run_dir / "before_after.json").exists() or moment == "before its first stage"
    assert standing(RunFolder.open(run_dir)).startswith("stopped")
    if moment == "in its second iteration":
        extend(run_dir, AFTER)  # the same command again
    else:
        go_on(run_dir)
    assert fingerprint(run_dir) == fingerprint(extended)
    assert len(RunFolder.open(run_dir).extensions) == 1
    assert verify_run(run_dir).findings == []


def _stop_after(calls: int) -> Callable[..., Any]:
    from rlhf_core.stages.shape_rewards import shape_rewards

    done: list[int] = []

    def call(*arguments: Any, **settings: Any) -> Any:
        done.append(1)
        if len(done) > calls:
            raise InterruptedError
        return shape_rewards(*arguments, **settings)

    return call


def test_verify_and_every_weight_computed_again_use_the_old_number_before_it(
    extended: Path, copy: Callable[[Path], Path]
) -> None:
    run_dir = copy(extended)
    assert verify_run(run_dir).findings == []
    remove(run_dir / "checkpoints")
    session = Session(RunFolder.open(run_dir))
    for iteration in (BEFORE, AFTER):
        assert session.policy.trainer(iteration).digest() == weights(run_dir)[iteration - 1]


@pytest.mark.parametrize("iteration", [BEFORE - 1, BEFORE])
def test_an_iteration_on_either_side_replays_exactly(iteration: int, extended: Path) -> None:
    open_session.cache_clear()
    with without_prefect():
        outcome = replay_iteration(str(extended), iteration)
    assert outcome.is_identical, outcome


@pytest.mark.parametrize("name", ["iterations/000001/03_scores.arrow", "iterations/000004/05_experience.arrow"])
def test_damage_on_either_side_is_repaired(name: str, extended: Path, copy: Callable[[Path], Path]) -> None:
    run_dir = copy(extended)
    flip(run_dir / name)
    assert repair_run(str(run_dir))
    assert fingerprint(run_dir) == fingerprint(extended)
    assert verify_run(run_dir).findings == []


def test_a_checkpoint_of_the_earlier_end_is_no_surprise(ended: Path, copy: Callable[[Path], Path]) -> None:
    run_dir = copy(ended)
    extend_run(str(run_dir), 20)
    assert verify_run(run_dir).findings == []
    remove(run_dir / "checkpoints/000003/policy/model.safetensors")
    assert repair_run(str(run_dir)) == ["checkpoints/000003 was rebuilt"]


def test_a_stopped_run_is_extended_or_ended(ended: Path, copy: Callable[[Path], Path]) -> None:
    run_dir = copy(ended)
    extend_run(str(run_dir), 9)
    extend_run(str(run_dir), 4)
    extend(run_dir, 4)
    run = RunFolder.open(run_dir)
    assert [(e.before, e.after) for e in run.extensions] == [(3, 9), (9, 4)]
    assert (run.num_finished(), standing(run)) == (4, "finished")
    assert rates(run_dir)[3] == pytest.approx(1e-3 / 4)
    assert verify_run(run_dir).findings == []


def test_a_number_that_is_behind_is_refused(ended: Path, copy: Callable[[Path], Path]) -> None:
    run_dir = copy(ended)
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"--iterations is 2, and .* has finished 3 iterations already; .* 4 or more"):
        extend_run(str(run_dir), 2)
    assert extend_run(str(run_dir), BEFORE) == []
    assert (run_dir / "run.json").read_bytes() == before


def test_what_the_rate_will_be_is_told(ended: Path) -> None:
    run = RunFolder.open(ended)
    assert plan_extension(run, 30).sentences == [
        "num_iterations: 3 -> 30, from iteration 3 on",
        "ppo.lr_schedule linear now falls to 0 over 30 iterations: the learning rate is 0.0009 in iteration 3, after "
        "0.000333 in iteration 2, and 3.33e-05 in iteration 29",
    ]
    constant = run.config.ppo.model_copy(update={"lr_schedule": "constant"})
    flat = replace(run, config=run.config.model_copy(update={"ppo": constant}))
    assert plan_extension(flat, 30).sentences[1] == (
        "ppo.lr_schedule constant: the learning rate is 0.001, whatever the number"
    )


def test_drifts_and_extensions_keep_their_order() -> None:
    drift = Drift(2, {"n": 0}, ["n: 0 -> 1"], "w")
    later = Drift(5, {"n": 2}, ["n: 2 -> 3"], "w")
    one, other = Extension(2, 2, 5, "", {"n": 1}, num_drifts=1), Extension(7, 5, 9, "", {"n": 3}, num_drifts=2)
    from made_runs import TREE

    from rlhf_core.contracts.config_io import build_config

    run = RunFolder(Path("r"), build_config(TREE), {"n": 4}, (drift, later), (one, other))
    assert [run.identity_at(i)["n"] for i in range(9)] == [0, 0, 2, 2, 2, 3, 3, 4, 4]
    assert len(run.identities) == 5


def test_from_the_command_line(
    ended: Path, extended: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy(ended)
    with pytest.raises(SystemExit) as end:
        main(["resume", str(run_dir), "--iterations", "2"])
    assert end.value.code == 2
    assert "error: --iterations is 2, and" in capsys.readouterr().err
    with without_prefect(), pytest.raises(SystemExit) as end:
        main(["resume", str(run_dir), "--iterations", str(AFTER)])
    said = capsys.readouterr()
    assert end.value.code == 0, said
    assert "num_iterations: 3 -> 5, from iteration 3 on" in said.out
    assert "the learning rate is 0.0004 in iteration 3" in said.out
    assert fingerprint(run_dir) == fingerprint(extended)
