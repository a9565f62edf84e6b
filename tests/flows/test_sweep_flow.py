"""`rlhf sweep`: runs as processes of their own, which are started, resumed, skipped and ended; then the results."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from prefect.settings import PREFECT_API_URL, temporary_settings
from tiny_world import Tiny
from torture.runs import start

from flows import cli, sweep
from flows.calling import without_prefect
from flows.commands.options import EXIT_INCOMPLETE, EXIT_MISTAKE
from flows.console import Console
from flows.displays.sweep import SweepWatcher, print_files, print_sweep
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_template, load_config
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.sweeping.folder import SweepFolder, SweepRecord
from rlhf_core.sweeping.grid import SweepRun
from tasks.session.session import open_session
from tasks.sweep.log import SweepTracker
from tasks.tracking.outbox import Ledger

MakeConfig = Callable[[Sequence[str]], RunConfig]
Rlhf = Callable[..., tuple[int, str, str]]
RATES = [1e-3, 1e-2]
GRID = ("--grid", "ppo.learning_rate=1e-3,1e-2", "--seeds", "2")


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """A command line without a server -> its exit code, what it printed, and its errors."""
    for room in ("cli", "commands.sweeping"):
        monkeypatch.setattr(f"flows.{room}.console", Console(width=200))

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, without_prefect():
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def config(tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML of a run of two iterations, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(config_template(tiny_config(["num_iterations=2"])))
    return Path("tiny.yaml")


@pytest.fixture
def there(tiny_config: MakeConfig, tmp_path: Path) -> SweepFolder:
    """A sweep of two points and two seeds, begun; no run of it is."""
    record = SweepRecord.of(tiny_config(["num_iterations=2"]), {"ppo.learning_rate": RATES}, [7, 8], 1)
    return SweepFolder.create(tmp_path / "sweep", record)


def finish(there: SweepFolder, run: SweepRun) -> None:
    open_session.cache_clear()
    start(run.config, there.run_path(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swept")


@pytest.fixture(scope="module")
def swept(tiny: Tiny, folder: Path) -> tuple[SweepFolder, list[str]]:
    from iteration import tiny_tree

    from flows.progress import Silent, watched_by
    from rlhf_core.contracts.config_io import build_config

    tree = tiny_tree(tiny) | {"num_iterations": 2, "tracking": {"experiment": "swept"}}
    config, path = build_config(tree), folder / "sweep"
    there = SweepFolder.create(path, SweepRecord.of(config, {"ppo.learning_rate": RATES}, [7, 8], 1))
    for run in there.runs[:2]:
        finish(there, run)
    shutil.rmtree(there.run_path(there.runs[1]) / "iterations/000001")
    (there.run_path(there.runs[1]) / "before_after.json").unlink()
    shutil.rmtree(there.run_path(there.runs[1]) / "checkpoints")
    there.run_path(there.runs[3]).mkdir()
    (there.run_path(there.runs[3]) / "in the way").touch()
    told: list[str] = []

    class Told(Silent):
        def warned(self, sentence: str) -> None:
            told.append(sentence)

        def stage_started(self, iteration: int, stage: str) -> None:
            told.append(f"{iteration} {stage}")

    with without_prefect(), watched_by(Told()), temporary_settings(restore_defaults={PREFECT_API_URL}):
        sweep.sweep.fn(config, str(path), {"ppo.learning_rate": RATES}, [7, 8], jobs=2, price=0.5)
    return there, told


class TestWhole:
    """One sweep: a run is finished before, one was stopped, two are yet to begin, one of which cannot."""

    def test_each_run_stands_where_it_should(self, swept: tuple[SweepFolder, list[str]]) -> None:
        there, told = swept
        assert [there.standing(run).is_finished for run in there.runs] == [True, True, True, False]
        assert told[0] == f"1 {there.runs[1].name}", "the finished one is not started"
        assert not there.log_path(there.runs[0]).exists()
        record = RunFolder.open(there.run_path(there.runs[2]))
        assert record.config == there.runs[2].config
        assert record.identity["num_threads"] == 1
        assert not (record.path / "prefect.json").exists(), "no temporary server each"

    def test_the_one_that_failed_is_told_and_ends_itself_alone(self, swept: tuple[SweepFolder, list[str]]) -> None:
        there, told = swept
        failed = there.summary()["runs"][3]
        assert failed["failure"].startswith(f"--run-dir {there.run_path(there.runs[3])} is not an empty folder")
        assert failed["failure"].endswith("(exit code 2)")
        assert f"{failed['name']} has failed: {failed['failure']}" in told

    def test_the_numbers_are_those_of_the_runs(self, swept: tuple[SweepFolder, list[str]]) -> None:
        there, _ = swept
        summary = there.summary()
        for run, row in zip(there.runs[:3], summary["runs"], strict=False):
            manifests = [RunFolder.open(there.run_path(run)).manifests(i)["shape_rewards"] for i in (0, 1)]
            first, last = (manifest.metrics for manifest in manifests)
            score, kl = last["objective/scores"], last["objective/kl"]
            assert (row["score"], row["kl"]) == (score, kl), "one iteration is the half of two"
            assert row["gain"] == pytest.approx(score - first["objective/scores"])
            assert row["value"] == pytest.approx(score - 0.5 * kl)
        first, second = summary["points"]
        assert (first["finished"], second["finished"]) == (2, 1)
        assert first["score"]["mean"] == pytest.approx((summary["runs"][0]["score"] + summary["runs"][2]["score"]) / 2)
        assert summary["best"]["point"] == 0, "the other one has a seed that failed"
        assert (there.path / "sweep.png").read_bytes().startswith(b"\x89PNG")
        best = load_config(there.path / "best.yaml")
        assert best == there.config.model_copy(update={"ppo": best.ppo})
        assert best.ppo.learning_rate == RATES[0]

    def test_mlflow_has_a_parent_with_its_children(self, swept: tuple[SweepFolder, list[str]]) -> None:
        from mlflow.tracking import MlflowClient

        there, _ = swept
        client: Any = MlflowClient(f"sqlite:///{there.path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("swept").experiment_id
        ledgers = [Ledger.of(there.run_path(run)) for run in there.runs[1:3]]
        parent = client.get_run(str(Ledger.of(there.path).run_id))
        nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        assert {run.info.run_id for run in nested} >= {ledger.run_id for ledger in ledgers}
        assert {run.info.run_name for run in nested} == {run.name for run in there.runs[:3]}
        assert len(client.search_runs([experiment])) == 4
        assert parent.info.run_name == "sweep"
        assert parent.info.status == "FAILED", "a run of it has"
        assert parent.data.params == {"grid.ppo.learning_rate": "0.001, 0.01", "seeds": "7, 8", "runs": "4"}
        files = {item.path for item in client.list_artifacts(parent.info.run_id)}
        assert files >= {"config.yaml", "points.json", "summary.json", "sweep.png", "best.yaml"}
        assert "ppo.learning_rate=0.001" in parent.data.tags["mlflow.note.content"]
        assert {m.name for m in client.search_registered_models()} == {"rlhf-policy-sweep"}

    def test_the_runs_as_they_go(self, swept: tuple[SweepFolder, list[str]]) -> None:
        there, _ = swept
        run, said = there.runs[0], io.StringIO()
        console = Console(file=said, width=150)
        shown = SweepWatcher(console, there.path, 4)
        console.print(shown.render())
        shown.stage_started(3, there.runs[3].name)
        assert said.getvalue().rstrip().endswith(f"{there.runs[3].name}: begins; 3 runs have ended")
        shown._ended.remove(run.name)
        with RunFolder.open(there.run_path(run)).locked():
            console.print(shown.render())
            shown.stage_started(3, "")
        row, numbers = " ".join(said.getvalue().split()), there.standing(run)
        assert f"{run.name} ━" in row
        assert f" 2/2 score {numbers.score:.3f} KL {numbers.kl:.2f}" in row
        assert "finished" not in row, "its process is still at work"
        shown.stage_started(4, "")
        assert f"{run.name}: finished, score {numbers.score:.3f}" in said.getvalue()

    def test_the_same_command_tries_what_failed_and_nothing_else(
        self,
        swept: tuple[SweepFolder, list[str]],
        folder: Path,
        rlhf: Rlhf,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        there, _ = swept
        monkeypatch.chdir(folder)
        Path("swept.yaml").write_text(config_template(there.config))
        command = ("sweep", "--config", "swept.yaml", *GRID, "--out", "sweep", "--at-kl", "100")
        began: list[str] = []
        real = sweep.start
        monkeypatch.setattr(sweep, "start", lambda there, run: began.append(run.name) or real(there, run))
        code, out, err = rlhf(*command, "--json")
        assert code == EXIT_INCOMPLETE
        assert began == [there.runs[3].name]
        summary = SweepFolder.open(Path("sweep")).summary()
        assert json.loads(out) == summary
        words = " ".join(err.split())
        assert "2 points x 2 seeds = 4 runs, 8 iterations, 64 episodes; 1 at a time, each with 1 thread" in words
        assert "goes on: 3 finished, 0 stopped, 1 to begin" in words
        console = Console(width=200)
        print_sweep(console, summary)
        print_files(console, SweepFolder.open(Path("sweep")))
        shown = " ".join(capsys.readouterr().out.split())
        score = summary["points"][0]["score"]
        assert f"0.001 2 of 2 {score['mean']:.3f} ± {score['high'] - score['mean']:.3f} " in shown
        assert f"not finished: {there.runs[3].name}: --run-dir sweep/" in shown
        assert "best: ppo.learning_rate=0.001, by the highest score among the points whose KL is at most 100" in shown
        assert "rlhf train --config sweep/best.yaml" in shown
        assert "rlhf ui --runs sweep" in shown


class TestProcesses:
    """With programs that pretend to be a run."""

    @pytest.fixture
    def pretended(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def be(code: str) -> None:
            monkeypatch.setattr(sweep, "RLHF", (sys.executable, "-S", "-c", code))
            monkeypatch.setattr(sweep, "POLL_S", 0.02)

        return be

    def test_so_many_at_a_time(self, there: SweepFolder, pretended: Callable[[str], None]) -> None:
        pretended("import sys, time; print(time.monotonic()); time.sleep(0.3); print(time.monotonic()); sys.exit(4)")
        failures = sweep.train_all(there, 2, SweepTracker(there, {}))
        assert set(failures) == {run.name for run in there.runs}
        assert all(why.endswith("(exit code 4)") for why in failures.values())
        spans = [[float(line) for line in there.log_path(run).read_text().split()] for run in there.runs]
        together = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
        assert max(together) == 2

    def test_a_stop_ends_all_of_them(
        self, there: SweepFolder, pretended: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretended("import time; time.sleep(60)")
        children: list[Any] = []
        real = sweep.start
        monkeypatch.setattr(sweep, "start", lambda *of: children.append(real(*of)) or children[-1])

        class Interrupted(SweepTracker):
            def look(self, run: SweepRun) -> None:
                raise KeyboardInterrupt

        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            sweep.train_all(there, 3, Interrupted(there, {}))
        assert time.monotonic() - begun < 40, "not waited for"
        assert len(children) == 3
        assert None not in [child.poll() for child in children]

    def test_why_it_failed(self, there: SweepFolder, pretended: Callable[[str], None]) -> None:
        said = ["iteration 1", "error: KL was 31.5", "error:   more of it"]
        pretended(f"print({chr(10).join(said)!r}); raise SystemExit(3)")
        failures = sweep.train_all(there, 4, SweepTracker(there, {}))
        assert set(failures.values()) == {"KL was 31.5 (exit code 3)"}
        pretended("import os, signal; os.kill(os.getpid(), 9)")
        failures = sweep.train_all(there, 4, SweepTracker(there, {}))
        assert set(failures.values()) == {"it has said nothing (ended by signal 9)"}

    def test_as_a_deployment_runs_it(
        self, prefect_server: None, tiny_config: MakeConfig, tmp_path: Path, pretended: Callable[[str], None]
    ) -> None:
        """Its parameters come as JSON; runs that fail are in its results, and it has done its work."""
        pretended("raise SystemExit(3)")
        config: Any = tiny_config(["num_iterations=1"]).model_dump(mode="json")
        folder = str(tmp_path / "swept")
        assert sweep.sweep(config, folder, {"kl.coef": [0.1, 0.2]}, at_kl=4) == folder
        summary = SweepFolder.open(Path(folder)).summary()
        assert [run["failure"] for run in summary["runs"]] == ["it has said nothing (exit code 3)"] * 2
        assert summary["best"]["note"] == "no point has finished with all of its seeds"
        names = {p.name for p in Path(folder).iterdir()}
        assert names == {"configs", "lock", "logs", "prefect.json", "summary.json", "sweep.json"}

    def test_their_environment(self, there: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "of the sweep")
        monkeypatch.setenv("OMP_NUM_THREADS", "64")
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            chosen = sweep.environment(there.runs[0])
        assert chosen["OMP_NUM_THREADS"] == "1"
        assert "PREFECT__FLOW_RUN_ID" not in chosen
        assert chosen["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "false"
        with temporary_settings({PREFECT_API_URL: "http://there/api"}):
            chosen = sweep.environment(there.runs[0])
        assert chosen["PREFECT_API_URL"] == "http://there/api"
        assert "PREFECT_SERVER_EPHEMERAL_ENABLED" not in chosen


class TestMistakes:
    def refused(self, rlhf: Rlhf, *arguments: object) -> list[str]:
        before = sorted(Path().rglob("*"))
        code, _, err = rlhf("sweep", "--config", "tiny.yaml", *arguments)
        assert code == EXIT_MISTAKE
        assert sorted(Path().rglob("*")) == before, "something was written"
        assert "Traceback" not in err
        return [line.removeprefix("error: ") for line in err.splitlines()]

    def test_of_the_command_line_all_at_once(self, rlhf: Rlhf, config: Path) -> None:
        told = self.refused(
            rlhf, "--set", "kl.coeff=1", "--grid", "kl.target", "--seeds", "x", "--set", "kl.horizon=2"
        )  # fmt: skip
        assert [line.split(" ")[0] for line in told] == ["kl.coeff", "--grid", "--seeds"]

    def test_of_files_and_models_before_anything_begins(self, rlhf: Rlhf, config: Path) -> None:
        told = self.refused(rlhf, "--grid", "policy.model=nowhere/at/all,also/not/here", "--grid", "kl.coef=0.1,0.2")
        assert len(told) == 2, "each once, though two points have it"
        assert told[0].startswith("policy.model 'nowhere/at/all' is not a folder here")
        assert told[0].endswith("(at policy.model=nowhere/at/all, kl.coef=0.1 and 1 more)")

    def test_of_what_is_asked(self, rlhf: Rlhf, config: Path) -> None:
        told = self.refused(rlhf, "--grid", "kl.coef=-2", "--jobs", "0", "--at-kl", "1", "--price", "1")
        assert told[0].startswith("--jobs is 0")
        assert told[1].startswith("--at-kl and --price are both given")
        assert told[2].startswith("kl.coef is -2")

    def test_a_folder_that_holds_another_sweep(self, rlhf: Rlhf, config: Path, there: SweepFolder) -> None:
        (told,) = self.refused(rlhf, *GRID[:2], "--seeds", "3", "--run-dir", there.path)
        assert f"--run-dir {there.path} holds another sweep (seeds are 7, 8 there, and 7, 8, 9 now)" in told
        flip(there.path / "sweep.json")
        (told,) = self.refused(rlhf, *GRID, "--out", there.path)
        assert "is damaged" in told
