"""Rewards of a replay: which are here, told without importing or calling anything; and what they said then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from iteration import tiny_tree
from replays import refuse
from tiny_world import Tiny

from rlhf_core.contracts.batches import Scores
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.trust import accept_config
from rlhf_core.replay.rewards import stored_components, unavailable_rewards, with_models_alone
from rlhf_core.rewards.scoring import Failure, score_all

SERVICE = {"kind": "http", "name": "judge", "url": "http://localhost:9/score"}
FOREIGN = {"kind": "function", "name": "mine", "function": "no_such_module_anywhere:score"}


def config_with(tiny: Tiny, *components: dict[str, Any], with_model: bool = True) -> RunConfig:
    tree = tiny_tree(tiny)
    model = tree["reward"]["components"] if with_model else []
    found = build_config(tree | {"reward": {"components": [*model, *components], "allowed_hosts": ["localhost"]}})
    accept_config(found)
    return found


class TestUnavailable:
    @pytest.fixture(autouse=True)
    def nothing_is_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rlhf_core.rewards.function._import", refuse)
        monkeypatch.setattr("rlhf_core.rewards.http.load_http", refuse)

    def test_models_and_ready_made_functions_are_here(self, tiny: Tiny, tmp_path: Path) -> None:
        config = config_with(tiny, {"kind": "function", "function": "length"})
        assert unavailable_rewards(config, {}, tmp_path, calls_services=False) == []

    def test_a_service_is_called_for_a_run_of_ones_own_alone(self, tiny: Tiny, tmp_path: Path) -> None:
        config = config_with(tiny, SERVICE)
        (line,) = unavailable_rewards(config, {}, tmp_path, calls_services=False)
        assert line == "judge is a service, and a bundle's responses are sent to nobody"
        assert unavailable_rewards(config, {}, tmp_path, calls_services=True) == []

    def test_a_module_that_is_not_here(self, tiny: Tiny, tmp_path: Path) -> None:
        (line,) = unavailable_rewards(config_with(tiny, FOREIGN), {}, tmp_path, calls_services=True)
        assert line == (
            "mine is the function no_such_module_anywhere:score, and there is no module no_such_module_anywhere here"
        )

    def test_one_of_the_same_name_and_another_content(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "same_name_of_replays.py").write_text("raise SystemExit\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        config = config_with(tiny, FOREIGN | {"function": "same_name_of_replays:score"})
        (line,) = unavailable_rewards(config, {"rewards": {"mine": "0" * 64}}, tmp_path / "run", calls_services=True)
        assert line.startswith("the function is not the one of the run: rewards.mine (")


def test_a_config_with_models_alone(tiny: Tiny) -> None:
    kept = with_models_alone(config_with(tiny, SERVICE, FOREIGN))
    assert [component.kind for component in kept.reward.components] == ["model"]
    stand_in = with_models_alone(config_with(tiny, SERVICE, FOREIGN, with_model=False))
    assert [component.kind for component in stand_in.reward.components] == ["function"]


def test_components_say_again_what_they_said() -> None:
    scores = Scores(
        ["a", "b"], ["two", "one"], torch.tensor([[2.5, 0.0], [3.5, 1.25]]),
        torch.tensor([[True, False], [True, True]]), torch.zeros(2),
    )  # fmt: skip
    said = score_all(stored_components(scores, ["one", "two", "three"]), [None, None])  # pyright: ignore[reportArgumentType]
    assert said[1] == [2.5, 3.5]
    assert said[0][1] == 1.25
    assert [type(outcome) for outcome in (said[0][0], *said[2])] == [Failure] * 3
