"""Guards in the flow, on a real Prefect server: a run that is stopped, paused, decided upon, and goes on."""

from __future__ import annotations

import contextvars
import io
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flows import guarding
from flows.console import Console
from flows.progress import Silent, watched_by
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import GuardStopError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from tasks.lifecycle.guards import GuardRecord

NUM_ITERATIONS = 4
THRESHOLD = 0.3
TREE: dict[str, Any] = {
    "seed": 3,
    "num_iterations": NUM_ITERATIONS,
    "device": "cpu",
    "num_threads": 1,
    "generation": {"max_new_tokens": 6},
    "ppo": {
        "num_ppo_epochs": 2,
        "num_minibatches": 2,
        "learning_rate": 4e-3,
        "warmup_iterations": 4,
        "embedding_lr_factor": 1.0,
    },
    "shaping": {"gae_lambda": 0.95},
    "checkpoint": {"every": 2, "keep_last": 1, "keep_best": False},
    "guards": {"kl_ceiling": {"threshold": THRESHOLD, "action": "stop"}},
}


class Told(Silent):
    """Remembers what it is told, and answers."""

    def __init__(self, answer: bool | None = None) -> None:
        self.answer = answer
        self.told: list[str] = []
        self.asked: list[str] = []

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        self.told += sentences

    def decide(self, sentences: Sequence[str]) -> bool | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.asked += sentences
        return self.answer


@pytest.fixture(scope="module")
def tree(tiny: Any) -> dict[str, Any]:
    return TREE | {
        "prompts": {"source": str(tiny.prompts), "batch_size": 8},
        "policy": {"model": str(tiny.policy), "critic": {"kind": "shared"}},
        "reward": {"components": [{"kind": "model", "model": str(tiny.reward)}]},
    }


@pytest.fixture(scope="module")
def stopped(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A tracked run that the KL ceiling has stopped after iteration 2."""
    from flows.ppo import train

    run_dir = tmp_path_factory.mktemp("guarded") / "run"
    with pytest.raises(GuardStopError) as stop:
        train(build_config(tree), str(run_dir))
    (run_dir / "said.txt").write_text(str(stop.value))
    return run_dir


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function from overrides to a copy of the stopped run, untracked."""

    def copy(*overrides: str) -> Path:
        run_dir = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
        record = read_record(run_dir / "run.json")
        record["config"] = build_config(record["config"], ["tracking.enabled=false", *overrides]).model_dump()
        write_record(run_dir / "run.json", record)
        return run_dir

    return copy


def kl_of(run_dir: Path) -> list[float]:
    run = RunFolder.open(run_dir)
    shaped = [run.manifest("shape_rewards", i) for i in range(run.num_finished())]
    return [manifest.metrics["objective/kl"] for manifest in shaped if manifest is not None]


def artifacts(run_dir: Path) -> dict[str, str]:
    run = RunFolder.open(run_dir)
    return {m.artifact.path: m.artifact.sha256 for i in range(run.num_finished()) for m in run.manifests(i).values()}


class TestStop:
    def test_ends_the_run_after_the_iteration_with_everything_on_disk(self, stopped: Path) -> None:
        kl = kl_of(stopped)
        assert [value > THRESHOLD for value in kl] == [False, False, True]
        assert RunFolder.open(stopped).manifests(2).keys() == STAGES.keys()
        sentences = (stopped / "said.txt").read_text()
        assert f"KL to the reference was {kl[2]:.4g} nats a response, above guards.kl_ceiling.threshold" in sentences
        assert f"the last good state, before iteration 1, is kept in {stopped}/checkpoints/last_good" in sentences
        assert f"rlhf resume {stopped} --accept-guards" in sentences

    def test_keeps_the_last_good_state_under_an_alias(self, stopped: Path) -> None:
        """Iteration 1 was the last within the threshold: its policy is the state before it, never saved before."""
        from transformers import AutoModelForCausalLM

        from rlhf_core.models.checkpoints import load_checkpoint

        run, alias = RunFolder.open(stopped), stopped / "checkpoints" / "last_good"
        assert (run.last_good, run.checkpoints()) == (1, [1, 2])
        assert alias.resolve() == run.checkpoint_path(1).resolve()
        AutoModelForCausalLM.from_pretrained(alias / "policy")
        trainer, state = load_checkpoint(alias, run.config, torch.device("cpu"))
        committed = run.manifest("ppo_update", 0)
        assert committed is not None
        assert trainer.digest() == committed.inputs["policy_after"]
        assert state.iteration == 1

    def test_is_in_the_tracker(self, stopped: Path) -> None:
        from mlflow.tracking import MlflowClient

        client: Any = MlflowClient(f"sqlite:///{stopped.parent / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("rlhf-flow").experiment_id])
        tripped = client.get_metric_history(run.info.run_id, "guard/kl_ceiling")
        assert [(m.step, m.value) for m in tripped] == [(0, 0.0), (1, 0.0), (2, 1.0)]
        assert (run.info.status, run.data.tags["rlhf.stopped_by"]) == ("KILLED", "kl_ceiling")
        last = {name: run.data.params[name] for name in ("guards.kl_ceiling.threshold", "tracking.experiment")}
        assert list(last.values()) == ["0.3", "rlhf-flow"], "all of more than a hundred params"
        assert len(run.data.params) > 100
        versions = {v.version: int(v.tags["rlhf.iteration"]) for v in client.search_model_versions("")}
        aliased = {a: client.get_model_version_by_alias("rlhf-policy", a).version for a in ("last_good", "newest")}
        assert {alias: versions[version] for alias, version in aliased.items()} == {"last_good": 1, "newest": 2}

    def test_a_resume_comes_to_the_same_verdict(self, stopped: Path, copied: Callable[..., Path]) -> None:
        from flows.ppo import resume

        run_dir = copied()
        with pytest.raises(GuardStopError) as again:
            resume(str(run_dir))
        assert str(again.value).replace(str(run_dir), str(stopped)) == (stopped / "said.txt").read_text()
        assert RunFolder.open(run_dir).num_finished() == 3

    def test_what_was_killed_before_it_was_checked_is_checked_by_the_resume(self, copied: Callable[..., Path]) -> None:
        from flows.ppo import resume

        run_dir = copied()
        (run_dir / "guards.json").unlink()
        with pytest.raises(GuardStopError):
            resume(str(run_dir))
        assert GuardRecord.of(RunFolder.open(run_dir)).tripped == {"2": ["kl_ceiling"]}

    def test_accepted_it_goes_on_to_the_artifacts_of_a_run_without_guards(
        self, tree: dict[str, Any], copied: Callable[..., Path], tmp_path: Path
    ) -> None:
        from flows.ppo import resume, train

        run_dir = copied()
        resume(str(run_dir), accept_guards=True)
        record = GuardRecord.of(RunFolder.open(run_dir))
        assert (record.accepted, record.stopped) == ({"kl_ceiling": 2}, None)
        free = tree | {"guards": {}, "tracking": {"enabled": False}}
        train(build_config(free), str(tmp_path / "free"))
        assert artifacts(run_dir) == artifacts(tmp_path / "free")
        assert len(artifacts(run_dir)) == 6 * NUM_ITERATIONS
        assert RunFolder.open(run_dir).checkpoints() == [1, 2, 4], "1 is the last good one"
        assert not (tmp_path / "free" / "guards.json").exists()

    def test_at_the_end_of_a_run_it_counts_as_well(self, copied: Callable[..., Path]) -> None:
        from flows.ppo import resume

        run_dir = copied("num_iterations=3")
        with pytest.raises(GuardStopError):
            resume(str(run_dir), accept_drift=True)
        assert RunFolder.open(run_dir).checkpoints() == [1, 2], (
            "the final state is no checkpoint before a person says so"
        )
        resume(str(run_dir), accept_drift=True, set_guards=["guards.kl_ceiling.threshold=99"])
        assert RunFolder.open(run_dir).checkpoints() == [1, 2, 3]
        with pytest.raises(UserError, match="no guard is stopping"):
            resume(str(run_dir), accept_drift=True, accept_guards=True)


class TestCommandLine:
    def test_exits_with_3_and_goes_on_with_another_threshold(
        self, copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        from flows.cli import main

        run_dir = copied("num_iterations=3")
        with pytest.raises(SystemExit) as stop:
            main(["resume", str(run_dir), "--accept-drift"])
        assert stop.value.code == 3
        assert "above guards.kl_ceiling.threshold 0.3" in capsys.readouterr().err
        with pytest.raises(SystemExit) as mistake:
            main(["resume", str(run_dir), "--accept-drift", "--set", "ppo.learning_rate=1"])
        assert mistake.value.code == 2
        assert (
            "ppo.learning_rate cannot be changed on resume: only guards.* and execution.update.* can"
            in capsys.readouterr().err
        )
        with pytest.raises(SystemExit) as done:
            main(["resume", str(run_dir), "--accept-drift", "--set", "guards.kl_ceiling.action=warn"])
        assert done.value.code == 0
        assert RunFolder.open(run_dir).config.guards.kl_ceiling.action == "warn", "and so is the next resume's"

    def test_accept_guards_is_an_option(self, copied: Callable[..., Path]) -> None:
        from flows.cli import main

        run_dir = copied("num_iterations=3")
        with pytest.raises(SystemExit) as done:
            main(["resume", str(run_dir), "--accept-drift", "--accept-guards"])
        assert done.value.code == 0


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any] | None], list[Any]]]:
    """A function that makes somebody resume the next paused flow run, with an answer, through the server's API."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    monkeypatch.setattr(guarding, "POLL_S", 1)
    paused: list[Any] = []
    done = threading.Event()
    started: list[threading.Thread] = []

    def answer(run_input: dict[str, Any] | None) -> None:
        with get_client(sync_client=True) as client:
            while not done.wait(0.1):
                wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
                for flow_run in client.read_flow_runs(flow_run_filter=wanted):
                    if flow_run.state and flow_run.state.state_details.run_input_keyset:
                        result = client.resume_flow_run(flow_run.id, run_input)
                        if result.status.value == "ACCEPT":  # the form's schema is saved just after the state
                            paused.append(flow_run)
                            return

    def start(run_input: dict[str, Any] | None) -> list[Any]:
        started.append(threading.Thread(target=contextvars.copy_context().run, args=(answer, run_input)))
        started[-1].start()
        return paused

    yield start
    done.set()
    for thread in started:
        thread.join()


PAUSE = ("guards.kl_ceiling.action=pause", "num_iterations=3", "guards.pause_timeout_s=60")


class TestPause:
    @pytest.mark.parametrize("run_input", [None, {"decision": "go on"}])
    def test_a_run_that_a_person_resumes_goes_on_to_its_end(
        self, copied: Callable[..., Path], answering: Any, run_input: dict[str, Any] | None
    ) -> None:
        from flows.ppo import resume

        run_dir, told = copied(*PAUSE), Told()
        paused = answering(run_input)
        with watched_by(told):
            resume(str(run_dir), accept_drift=True)
        assert [flow_run.name for flow_run in paused] == ["ppo resume · run"], "it was paused, once"
        assert RunFolder.open(run_dir).checkpoints() == [1, 2, 3]
        assert GuardRecord.of(RunFolder.open(run_dir)).accepted == {"kl_ceiling": 2}
        assert "nats a response, above guards.kl_ceiling.threshold" in told.told[0]
        assert told.asked == [], "the terminal is not asked beside the server"

    def test_a_person_may_stop_it(self, copied: Callable[..., Path], answering: Any) -> None:
        from flows.ppo import resume

        run_dir = copied(*PAUSE)
        answering({"decision": "stop"})
        with pytest.raises(GuardStopError, match="a person decided to stop; the last good state, before iteration 1"):
            resume(str(run_dir), accept_drift=True)
        assert GuardRecord.of(RunFolder.open(run_dir)).accepted == {}

    def test_nobody_in_time_is_a_stop(self, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        from flows.ppo import resume

        monkeypatch.setattr(guarding, "POLL_S", 1)
        run_dir = copied(*PAUSE, "guards.pause_timeout_s=2")
        with pytest.raises(GuardStopError, match=r"nobody decided within guards\.pause_timeout_s 2"):
            resume(str(run_dir), accept_drift=True)

    @pytest.mark.parametrize(
        ("answer", "reason"), [(True, None), (False, "a person decided to stop"), (None, "nobody could be asked")]
    )
    def test_on_a_temporary_server_the_terminal_is_asked(
        self, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, answer: bool | None, reason: str | None
    ) -> None:
        from flows.ppo import resume

        class Unset:
            @staticmethod
            def value() -> None:
                return None

        monkeypatch.setattr(guarding, "PREFECT_API_URL", Unset)
        run_dir, told = copied(*PAUSE), Told(answer)
        with watched_by(told):
            if reason is None:
                resume(str(run_dir), accept_drift=True)
                assert RunFolder.open(run_dir).checkpoints() == [1, 2, 3]
            else:
                with pytest.raises(GuardStopError, match=reason):
                    resume(str(run_dir), accept_drift=True)
        assert len(told.asked) == 1

    def test_where_another_guard_says_stop_nobody_is_asked(
        self, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flows.ppo import resume

        monkeypatch.setattr(guarding, "POLL_S", 1)
        entropy = ("guards.entropy_floor.threshold=50", "guards.entropy_floor.action=stop")
        both = (*entropy, "guards.pause_timeout_s=1")
        with pytest.raises(GuardStopError, match="a guard's action is stop; no state of this run satisfies the guards"):
            resume(str(copied(*PAUSE, *both)), accept_drift=True)


def test_a_warning_is_told_once_and_the_run_goes_on(
    copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.ppo import resume
    from tasks.tracking.metrics import iteration_metrics
    from tasks.tracking.tracker import Tracker

    run_dir, told = copied("guards.kl_ceiling.action=warn"), Told()
    sent: list[float] = []
    note = lambda tracker, i: sent.append(iteration_metrics(tracker.run, i)["guard/kl_ceiling"])  # noqa: E731
    monkeypatch.setattr(Tracker, "iteration_done", note)
    with watched_by(told):
        resume(str(run_dir))
    run = RunFolder.open(run_dir)
    assert run.num_finished() == NUM_ITERATIONS
    assert [sentence[:13] for sentence in told.told] == ["iteration 2: "]
    assert kl_of(run_dir)[3] > THRESHOLD, "it was beyond in the next one too"
    assert [iteration_metrics(run, i)["guard/kl_ceiling"] for i in range(4)] == [0, 0, 1, 1]
    assert sent == [1.0], "the verdict stands before the tracker reads it"
    assert "guard/truncation_ceiling" not in iteration_metrics(run, 0), "it is off"


def test_without_a_terminal_nobody_is_asked() -> None:
    from flows.displays.terminal import TerminalWatcher

    out = io.StringIO()
    watcher = TerminalWatcher(Console(file=out, width=200), 2)
    assert watcher.decide(["iteration 3: ..."]) is None
    watcher.guards_spoke(3, ["iteration 3: KL was [b]high[/b]"])
    assert out.getvalue() == "guard: iteration 3: KL was [b]high[/b]\n"


@pytest.mark.parametrize(("typed", "decision"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_at_a_terminal_a_person_is_asked(monkeypatch: pytest.MonkeyPatch, typed: str, decision: bool) -> None:
    from flows.displays.terminal import TerminalWatcher

    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Keyboard(typed))
    out = io.StringIO()
    with TerminalWatcher(Console(file=out, width=200, force_terminal=True), 2) as watcher:
        assert watcher.decide(["iteration 3: KL was high"]) is decision
    assert "KL was high" in out.getvalue()
    assert "Go on?" in out.getvalue()
