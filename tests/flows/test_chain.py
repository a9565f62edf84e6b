"""The training chain without a server: what is new, what is promoted, and that it goes on wherever it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from iteration import tiny_tree
from tiny_world import Tiny
from torture.runs import fingerprint

from flows import chain as flows_chain
from flows.calling import without_prefect
from flows.cli import main
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, config_template
from rlhf_core.contracts.errors import IntegrityError, RunLockedError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.gate import Gate
from tasks.lifecycle import chain as tasks_chain
from tasks.lifecycle.chain import Chain, holding_chain, next_link, with_registered_reward
from tasks.session.session import open_session

chain = flows_chain.chain.fn
"""As a plain function: nothing here is a matter of Prefect."""
OPEN: dict[str, Any] = {"min_win_rate": 0.0, "max_kl": 1e6}
SHUT: dict[str, Any] = {"min_win_rate": 0.0, "max_kl": 1e-6}


@pytest.fixture(autouse=True)
def bare() -> Iterator[None]:
    open_session.cache_clear()
    with without_prefect():
        yield


def world_in(tiny: Tiny, folder: Path) -> Path:
    """A copy of the tiny world that may be changed, with held-out prompts."""
    world = Path(shutil.copytree(tiny.root, folder / "world"))
    lines = tiny.prompts.read_text().splitlines()
    (world / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines[:30]))
    (world / "held_out.jsonl").write_text("".join(f"{line}\n" for line in lines[30:36]))
    return world


def config_of(world: Path, **changes: Any) -> RunConfig:
    tiny = Tiny(world, world / "policy", world / "reward", world / "prompts.jsonl")
    return build_config({**tiny_tree(tiny), "num_iterations": 2, "tracking": {}, **changes})


def gate_of(world: Path, **changes: Any) -> Gate:
    few = {"num_prompts": 4, "samples": 2, "frontier_samples": 20}
    return Gate(prompts=str(world / "held_out.jsonl"), **{**few, **OPEN, **changes})


def aliases(runs: Path) -> dict[str, int]:
    """Alias -> iteration of the version that has it, of all runs of the tracker beside them."""
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    versions = {str(v.version): v for v in client.search_model_versions("name = 'rlhf-policy'")}
    found = client.get_registered_model("rlhf-policy").aliases
    return {alias: int(versions[str(version)].tags["rlhf.iteration"]) for alias, version in found.items()}


@pytest.fixture(scope="module")
def linked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and a chain of one link that was promoted."""
    folder = tmp_path_factory.mktemp("linked")
    world = world_in(tiny, folder)
    with without_prefect():
        said = chain(config_of(world), str(folder / "runs"), gate_of(world))
    assert said == "promoted: rlhf-policy version 1 is production"
    return folder


def test_the_first_link_is_trained_evaluated_and_promoted(linked: Path) -> None:
    runs = linked / "runs"
    (link,) = Chain.of(runs).links
    assert (link.run, link.outcome) == ("chain-000001", "promoted: rlhf-policy version 1 is production")
    assert {"config", "prompts", "models.policy", "models.reward0", "rewards.reward0"} <= set(link.inputs)
    assert RunFolder.open(runs / link.run).num_finished() == 2
    assert len(list((runs / link.run / "evaluations").iterdir())) == 1
    assert aliases(runs)["production"] == 2


def test_nothing_new_is_said_and_nothing_is_done(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr(flows_chain, "train_link", never)
    before = fingerprint(linked / "runs" / "chain-000001")
    said = chain(config_of(linked / "world"), str(linked / "runs"), gate_of(linked / "world"))
    assert said.startswith(f"nothing new since the last link of {linked / 'runs'}")
    assert fingerprint(linked / "runs" / "chain-000001") == before


def test_another_gate_judges_the_same_policy_again(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = linked / "runs"
    drawn: list[str] = []
    monkeypatch.setattr("rlhf_core.evaluation.folder.EvaluationFolder.commit", lambda *_: drawn.append("a part"))
    said = chain(config_of(linked / "world"), str(runs), gate_of(linked / "world", **SHUT))
    assert said.startswith("not promoted, production stays what it was: KL ")
    assert said.endswith("at most 1e-06 is wanted")
    assert drawn == [], "its samples are there"
    assert len(Chain.of(runs).links) == 1
    assert aliases(runs)["production"] == 2


class TestNews:
    """What makes a new link; nothing is trained here."""

    @pytest.mark.parametrize(
        ("change", "news"),
        [
            (lambda world: (world / "prompts.jsonl").write_text((world / "held_out.jsonl").read_text() * 2), "prompts"),
            (lambda world: flip(world / "reward" / "model.safetensors"), "models.reward0"),
            (lambda world: flip(world / "policy" / "model.safetensors"), "models.policy"),
        ],
        ids=["prompts", "reward model", "policy"],
    )
    def test_other_data_or_models_are_new(
        self, change: Callable[[Path], object], news: str, tiny: Tiny, tmp_path: Path
    ) -> None:
        world, runs = world_in(tiny, tmp_path), tmp_path / "runs"
        first, second = self._before_and_after(world, runs, change)
        assert second is not None
        assert second[0].run == "chain-000002"
        assert f"{news} is another than in chain-000001" in second[1]
        assert first[1] == ["this is the first link"]

    def _before_and_after(self, world: Path, runs: Path, change: Callable[[Path], object]) -> Any:
        small = {"prompts": {"source": str(world / "prompts.jsonl"), "batch_size": 4}}
        first = next_link(runs, config_of(world, **small), gate_of(world))
        tasks_chain.close_link(runs, "promoted")
        assert next_link(runs, config_of(world, **small), gate_of(world)) is None
        change(world)
        return first, next_link(runs, config_of(world, **small), gate_of(world))

    def test_another_config_is_new_and_what_changes_no_number_is_not(self, tiny: Tiny, tmp_path: Path) -> None:
        world, runs = world_in(tiny, tmp_path), tmp_path / "runs"
        next_link(runs, config_of(world), gate_of(world))
        tasks_chain.close_link(runs, "promoted")
        assert next_link(runs, config_of(world, tracking={"run_name": "other"}), gate_of(world)) is None
        found = next_link(runs, config_of(world, seed=8), gate_of(world))
        assert found is not None
        assert found[1] == ["config is another than in chain-000001"]

    def test_a_link_that_is_not_done_goes_on_or_is_left(self, tiny: Tiny, tmp_path: Path) -> None:
        world, runs = world_in(tiny, tmp_path), tmp_path / "runs"
        next_link(runs, config_of(world), gate_of(world))
        found = next_link(runs, config_of(world), gate_of(world))
        assert found is not None
        assert (found[0].run, found[1]) == ("chain-000001", ["chain-000001 goes on"])
        found = next_link(runs, config_of(world, seed=8), gate_of(world))
        assert found is not None
        assert found[0].run == "chain-000002"
        assert Chain.of(runs).links[0].outcome == "left before it was done: its inputs have changed"


def test_a_link_whose_run_was_extended_is_judged_again(linked: Path, tmp_path: Path) -> None:
    from tasks.lifecycle.extension import extend_run

    runs = Path(shutil.copytree(linked / "runs", tmp_path / "runs"))
    chain(config_of(linked / "world"), str(runs), gate_of(linked / "world"))
    open_session.cache_clear()
    extend_run(str(runs / "chain-000001"), 3)
    found = next_link(runs, config_of(linked / "world"), gate_of(linked / "world"))
    assert found is not None
    assert found[1] == ["chain-000001 was judged after 2 iterations, and has 3 now"]
    said = chain(config_of(linked / "world"), str(runs), gate_of(linked / "world"))
    assert said == "promoted: rlhf-policy version 2 is production"
    assert RunFolder.open(runs / "chain-000001").num_finished() == 3
    assert next_link(runs, config_of(linked / "world"), gate_of(linked / "world")) is None


@pytest.mark.parametrize("where", ["in the training", "in the evaluation", "before the promotion"])
def test_stopped_anywhere_the_same_call_goes_on(
    where: str, linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import evaluate, ppo

    world, runs = linked / "world", tmp_path / "runs"
    runs.mkdir()
    shutil.copy(linked / "runs" / "mlflow.db", runs)  # a new one takes seconds to make
    arguments = (config_of(world), str(runs), gate_of(world))
    room, name = {
        "in the training": (ppo, "train_iteration"),
        "in the evaluation": (evaluate, "write_evaluation"),
        "before the promotion": (flows_chain, "promote"),
    }[where]
    whole, calls = getattr(room, name), list[int]()

    def stopped(*given: Any) -> Any:
        calls.append(1)
        if where != "in the training" or len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    setattr(stopped, "fn", stopped)  # noqa: B010 - where it is a task
    monkeypatch.setattr(room, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        chain(*arguments)
    monkeypatch.undo()
    (link,) = Chain.of(runs).links
    assert link.outcome is None
    open_session.cache_clear()
    assert chain(*arguments).startswith("promoted: rlhf-policy version ")
    assert fingerprint(runs / "chain-000001") == fingerprint(linked / "runs" / "chain-000001")


def test_a_reward_model_comes_from_the_registry_by_its_alias_once_a_version(
    linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{linked / 'runs' / 'mlflow.db'}"
    mlflow.set_tracking_uri(store)
    config = config_of(linked / "world", tracking={"uri": store})
    client: Any = MlflowClient(store)
    experiment = client.get_experiment_by_name("rlhf-flow").experiment_id
    for name in ("first", "second"):
        model = client.create_logged_model(experiment, name=name)
        client.log_model_artifacts(model.model_id, str(linked / "world" / "reward"))
        client.finalize_logged_model(model.model_id, "READY")
        if name == "first":
            client.create_registered_model("taste")
        version = client.create_model_version("taste", f"models:/{model.model_id}", model_id=model.model_id)
    client.set_registered_model_alias("taste", "champion", "1")
    found = with_registered_reward(config, tmp_path, "taste@champion").reward.components[0]
    folder = tmp_path / "rewards" / "taste-1" / "model"
    assert getattr(found, "model", None) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == (linked / "world/reward/model.safetensors").read_bytes()
    monkeypatch.setattr(tasks_chain, "download_registered", lambda *_: pytest.fail("it was fetched"))
    with_registered_reward(config, tmp_path, "taste@champion")
    monkeypatch.undo()
    client.set_registered_model_alias("taste", "champion", str(version.version))
    found = with_registered_reward(config, tmp_path, "taste@champion").reward.components[0]
    assert getattr(found, "model", None) == str(tmp_path / "rewards" / "taste-2" / "model")
    with pytest.raises(UserError, match="reward_model is 'taste@gone', which MLflow does not give: "):
        with_registered_reward(config, tmp_path, "taste@gone")


def test_what_mlflow_does_not_have_is_not_promoted_and_the_remedy_is_named(tiny: Tiny, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", build_config(tiny_tree(tiny)), {})
    with pytest.raises(UserError, match=r"MLflow does not have checkpoint 3 of .*; `rlhf resume .*` sends it"):
        tasks_chain.promote.fn(str(run.path), 3, "production")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        holding_chain(tmp_path),
        pytest.raises(RunLockedError, match="another process is working on the chain"),
        holding_chain(tmp_path),
    ):
        pass


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text('{"links":[]}')
    with pytest.raises(IntegrityError, match=r"chain\.json is damaged or foreign"):
        Chain.of(tmp_path)


@pytest.fixture
def rlhf(
    linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command without a server -> its exit code, what it printed, and its errors."""
    monkeypatch.setattr("flows.calling.run_flow", lambda flow, *arguments: flow.fn(*arguments))
    (tmp_path / "own.yaml").write_text(config_template(config_of(linked / "world")))
    held_out = linked / "world" / "held_out.jsonl"

    def call(*arguments: str) -> tuple[int, str, str]:
        command = ["chain", "--config", str(tmp_path / "own.yaml"), "--held-out", str(held_out), *arguments]
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_the_command_says_what_became_of_it(rlhf: Callable[..., tuple[int, str, str]], linked: Path) -> None:
    few = ("--num-prompts", "4", "--samples", "2", "--frontier-samples", "20")
    code, out, err = rlhf("--runs", str(linked / "runs"), *few, "--min-win-rate", "0", "--max-kl", "1e6")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] in {
        "promoted: rlhf-policy version 1 is production",  # judged again: another gate has judged it last
        f"nothing new since the last link of {linked / 'runs'}: prompts, models and config are the same",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min-win-rate", "1.5"], "gate.min_win_rate is 1.5: Input should be less than or equal to 1"),
        (["--max-kl", "0"], "gate.max_kl is 0.0: Input should be greater than 0"),
        (["--alias", "best"], "gate.alias is 'best': it has another meaning"),
        (["--set", "tracking.enabled=false"], "tracking.enabled is false, and a chain promotes a registered model"),
        (["--set", "policy.model=nowhere/at/all"], "policy.model 'nowhere/at/all' is not a folder here"),
        (["--reward-model", "taste"], "reward_model is 'taste'; give a registered model and its alias: NAME@ALIAS"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_trained(
    arguments: list[str], said: str, rlhf: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = rlhf("--runs", str(tmp_path / "runs"), *arguments)
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"error: {said}")
    assert "Traceback" not in out
    assert not (tmp_path / "runs" / "chain.json").exists()


def test_the_page_names_each_check(linked: Path) -> None:
    gate = Gate(prompts="x", min_win_rate=0.6, max_kl=4)
    numbers = {"win_rate": {"mean": 0.7, "low": 0.65, "high": 0.8}, "kl": {"mean": 3.0, "low": 2.0, "high": 5.0}}
    page = flows_chain.gate_page("runs/a", ["prompts is another"], gate.judge(numbers), "not promoted: KL")
    assert "| win rate | 0.700 | 0.650 | at least 0.6 | yes |" in page
    assert "| KL | 3.000 | 5.000 | at most 4 | **no** |" in page
    assert json.dumps(page)
