"""A bundle is replayed where nothing of the run is: another folder, without its models, prompts and functions."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree
from replays import another_advantage, refuse, run_of, state_of
from tiny_world import Tiny, tiny_in

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.replay.bundles import read_bundle_record, unpack_bundle, write_bundle
from rlhf_core.replay.opening import open_bundle, verify_bundle
from tasks.replay.bundle import make_bundle
from tasks.replay.iteration import replay_iteration
from tasks.replay.what_if import ask_what_if

ALL = dict.fromkeys(STAGES, True)
SHAPING = dict.fromkeys(STAGES) | {"shape_rewards": True}


@pytest.fixture(scope="module")
def sent(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of iteration 1 of a run whose folder, models and prompts are gone."""
    root = tmp_path_factory.mktemp("sender")
    own = tiny_in(Path(shutil.copytree(tiny.root, root / "world")))
    run_dir = run_of(own, root / "run", {"prompts": {"source": str(own.prompts), "batch_size": 8}})
    here = tmp_path_factory.mktemp("receiver")
    bundles = {name: here / f"{name}.rlhf.zip" for name in ("whole", "again", "small")}
    before = state_of(run_dir)
    for name, path in bundles.items():
        make_bundle(str(run_dir), 1, str(path), with_models=name != "small")
    assert state_of(run_dir) == before, "packing changes nothing"
    shutil.rmtree(root)
    return bundles


def verdicts(path: Path, **settings: Any) -> dict[str, bool | None]:
    return {stage.stage: stage.is_identical for stage in replay_iteration(str(path), **settings).stages}


class TestWhole:
    def test_all_six_stages_come_back_elsewhere(self, sent: dict[str, Path]) -> None:
        """The weights before iteration 1 stood in no checkpoint: they were computed for the bundle."""
        assert verdicts(sent["whole"]) == ALL

    def test_equal_runs_equal_bundles(self, sent: dict[str, Path]) -> None:
        assert sent["whole"].read_bytes() == sent["again"].read_bytes()

    def test_it_holds_each_model_once_and_the_prompts_that_it_draws(self, sent: dict[str, Path]) -> None:
        record = verify_bundle(sent["whole"])
        assert dict(record.models) == {
            "policy.model": "models/policy.model",
            "reward.components.0.model": "models/reward.components.0.model",
        }
        assert len(record.prompt_rows) == 8
        assert record.num_prompts == 40
        parts = {row["part"] for row in record.contents()}
        assert {"run/checkpoints/000001", "run/iterations/000001", "run/iterations/000000", "prompts.jsonl"} <= parts

    def test_what_if_of_a_bundle(self, sent: dict[str, Path]) -> None:
        answer = ask_what_if(str(sent["whole"]), None, ["kl.coef=1.0"])
        assert answer.computed == ["shape_rewards", "ppo_update"]
        assert not answer.skipped

    def test_a_difference_is_found_and_the_machine_is_compared(
        self, sent: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        another_advantage(monkeypatch)
        replay = replay_iteration(str(sent["whole"]))
        assert {s.stage for s in replay.stages if s.is_identical is False} == {"shape_rewards"}
        assert replay.conditions == (), "models and prompts lie elsewhere, and are the same"

    def test_another_iteration_is_not_in_it(self, sent: dict[str, Path]) -> None:
        with pytest.raises(UserError, match=r"--iteration 2 is not in .*, which holds iteration 1"):
            replay_iteration(str(sent["whole"]), 2)


class TestSmall:
    def test_shaping_alone(self, sent: dict[str, Path]) -> None:
        replay = replay_iteration(str(sent["small"]))
        assert {stage.stage: stage.is_identical for stage in replay.stages} == SHAPING
        assert replay.stages[0].skipped == "the bundle was made --without-models"
        assert sent["small"].stat().st_size < sent["whole"].stat().st_size / 10

    def test_a_difference_is_found_and_the_libraries_are_compared(
        self, sent: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        another_advantage(monkeypatch)
        monkeypatch.setattr("tasks.replay.source.source_digest", lambda: "another")
        replay = replay_iteration(str(sent["small"]))
        assert [stage.stage for stage in replay.stages if stage.is_identical is False] == ["shape_rewards"]
        (line,) = replay.conditions
        assert line.startswith("source: ")
        assert line.endswith(" -> another")

    def test_what_if_of_shaping_and_weights(self, sent: dict[str, Path]) -> None:
        for override in ("kl.coef=1.0", "reward.components.0.weight=3.0"):
            answer = ask_what_if(str(sent["small"]), None, [override])
            assert answer.skipped.keys() == {"ppo_update"}
            assert answer.advantages.correlation < 1

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            (
                "ppo.clip_range=0.1",
                r"moves the update alone, and that needs models: the bundle was made --without-models",
            ),
            ("reward.components.0.max_len=5", r"needs score_rewards, which cannot be computed here"),
        ],
    )
    def test_what_needs_models(self, sent: dict[str, Path], override: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            ask_what_if(str(sent["small"]), None, [override])
        with pytest.raises(UserError, match="nothing of it can be computed here: the bundle was made --without-models"):
            replay_iteration(str(sent["small"]), first="ppo_update")

    def test_a_sample_without_a_tokenizer(self, sent: dict[str, Path]) -> None:
        record_of = replay_iteration(str(sent["small"]), sample=_first_sample(sent["small"]))
        assert {row["token"] for row in record_of.tokens} == {"?"}


def _first_sample(bundle: Path) -> str:
    with pytest.raises(UserError) as refused:
        replay_iteration(str(bundle), sample="x")
    return str(refused.value).split("samples are ")[1].split(" ")[0]


class TestOfOtherKinds:
    def test_lora_with_several_responses_and_columns(self, tiny: Tiny, tmp_path: Path) -> None:
        prompts = {"source": str(tiny.prompts), "batch_size": 8, "samples_per_prompt": 2, "columns": ["prompt"]}
        changes = {
            "prompts": prompts, "shaping": {"estimator": "group"}, "artifacts": {"keep_iterations": 1},
            "policy": {"model": str(tiny.policy), "lora": {"rank": 2}},
            "generation": {"max_new_tokens": 4}, "num_iterations": 2,
        }  # fmt: skip
        run_dir = run_of(tiny, tmp_path / "run", changes)
        for iteration in (0, 1):
            bundle = tmp_path / f"{iteration}.rlhf.zip"
            make_bundle(str(run_dir), iteration, str(bundle))
            assert verdicts(bundle) == ALL

    def test_a_function_and_a_service_are_not_called(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "code"
        place.mkdir()
        module = place / "own_scorer_of_bundles.py"
        module.write_text("def scorer(responses, **_):\n    return [float(len(r)) for r in responses]\n")
        monkeypatch.syspath_prepend(str(place))
        tree = tiny_tree(tiny)["reward"]["components"] + [{"kind": "function", "function": f"{module.stem}:scorer"}]
        run_dir = run_of(tiny, tmp_path / "run", {"reward": {"components": tree}, "num_iterations": 1})
        bundle = tmp_path / "a.rlhf.zip"
        make_bundle(str(run_dir), 0, str(bundle))
        assert module.stem not in str(read_bundle_record(bundle).files), "no code is packed"
        assert verdicts(bundle) == ALL, "who has the function calls it"
        monkeypatch.delitem(sys.modules, module.stem)
        module.unlink()
        monkeypatch.setattr("rlhf_core.rewards.function._import", refuse)
        replay = replay_iteration(str(bundle))
        assert {s.stage: s.is_identical for s in replay.stages} == ALL | {"score_rewards": None}
        answer = ask_what_if(str(bundle), None, ["reward.components.1.weight=0.5"])
        assert answer.computed == ["score_rewards", "shape_rewards", "ppo_update"], "what it said is stored"


class TestMistakes:
    def test_a_model_that_is_gone(self, tiny: Tiny, tmp_path: Path) -> None:
        own = tiny_in(Path(shutil.copytree(tiny.root, tmp_path / "world")))
        changes = {"prompts": {"source": str(own.prompts), "batch_size": 8}, "num_iterations": 1}
        run_dir = run_of(own, tmp_path / "run", changes)
        shutil.rmtree(own.reward)
        with pytest.raises(UserError, match=r"reward\.components\.0\.model .* is not a folder here"):
            make_bundle(str(run_dir), 0, str(tmp_path / "a.rlhf.zip"))
        make_bundle(str(run_dir), 0, str(tmp_path / "small.rlhf.zip"), with_models=False)
        shutil.rmtree(run_dir)
        assert verdicts(tmp_path / "small.rlhf.zip") == SHAPING
        assert not (tmp_path / "a.rlhf.zip").exists()

    def test_a_config_that_names_more_than_the_bundle_holds(self, sent: dict[str, Path], tmp_path: Path) -> None:
        """It would send the receiver to a folder, or a hub, of the sender's choice."""
        (tmp_path / "x").mkdir()
        record = unpack_bundle(sent["whole"], tmp_path / "x")
        sources = {name: tmp_path / "x" / name for name in record.files}
        fewer = {field: place for field, place in record.models.items() if field != "policy.model"}
        write_bundle(tmp_path / "evil.rlhf.zip", sources, replace(record, models=fewer))
        with pytest.raises(IntegrityError, match=r"names policy\.model, and the bundle does not hold it"):
            replay_iteration(str(tmp_path / "evil.rlhf.zip"))

    def test_a_checkpoint_of_other_weights(self, sent: dict[str, Path], tmp_path: Path) -> None:
        """Sealed again by whoever has changed it; the run says which weights they must be."""
        (tmp_path / "x").mkdir()
        record = unpack_bundle(sent["whole"], tmp_path / "x")
        update = tmp_path / "x/run/iterations/000000/06_update.json"
        values = read_record(update)
        write_record(update, values | {"inputs": {**values["inputs"], "policy_after": "0" * 64}})
        write_bundle(tmp_path / "b.rlhf.zip", {name: tmp_path / "x" / name for name in record.files}, record)
        replay = replay_iteration(str(tmp_path / "b.rlhf.zip"), first="ppo_update")
        assert "the weights before iteration 1 have the digest" in str(replay.stages[0].failed)


def test_the_record_is_that_of_the_run(sent: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    run, record = open_bundle(sent["whole"], tmp_path / "x")
    assert isinstance(run, RunFolder)
    assert record.run == "run"
    assert read_artifact(run.path, run.manifests(1)["generate"].artifact).num_rows == 8
