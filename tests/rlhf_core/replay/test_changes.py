"""Which keys may be asked, what they move, and what is said of those that may not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.replay.changes import Changes, changes_of

Make = Callable[[Sequence[str]], RunConfig]
ADAPTIVE = ("kl.controller=adaptive", "kl.coef=0.15", "kl.horizon=50", "kl.target=0.5")
SHAPE, UPDATE, SCORE, REFERENCE = "shape_rewards", "ppo_update", "score_rewards", "reference_logprobs"


def asked(make: Make, *overrides: str, kl_coef: float = 0.1, iteration: int = 1) -> Changes:
    return changes_of(make(ADAPTIVE), overrides, iteration=iteration, kl_coef=kl_coef)


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("kl.coef=0.2", [SHAPE, UPDATE]),
        ("kl.estimator=k3", [SHAPE, UPDATE]),
        ("shaping.gae_lambda=0.5", [SHAPE, UPDATE]),
        ("ppo.clip_range=0.1", [UPDATE]),
        ("num_iterations=30", [UPDATE]),
        ("reward.components.0.weight=2.0", [SCORE, SHAPE, UPDATE]),
        ("reward.combine=min", [SCORE, SHAPE, UPDATE]),
        ("reference.dtype=bfloat16", [REFERENCE, SHAPE, UPDATE]),
    ],
)
def test_a_key_and_the_stages_that_it_moves(tiny_config: Make, override: str, stages: list[str]) -> None:
    found = asked(tiny_config, override)
    assert found.stages == stages
    assert found.scores_are_stored


def test_another_reward_model_is_asked_again(tiny_config: Make) -> None:
    assert not asked(tiny_config, "reward.components.0.model=elsewhere").scores_are_stored
    assert not asked(tiny_config, "reward.components.0.max_len=5").scores_are_stored


def test_a_component_as_a_whole_may_have_another_name(tiny_config: Make) -> None:
    found = asked(tiny_config, "reward.components=[{kind: function, function: length, name: len}]")
    assert "reward.components.0.name" not in found.keys
    assert not found.scores_are_stored
    component = tiny_config([]).reward.components[0]
    same = f"{{kind: model, model: {component.model}, weight: 2.0, name: other}}"  # pyright: ignore[reportAttributeAccessIssue]
    found = asked(tiny_config, f"reward.components=[{same}]")
    assert found.keys == ["reward.components.0.weight"]
    assert not found.scores_are_stored, "what is stored stands under the other name"


def test_several_keys_begin_with_the_first_stage(tiny_config: Make) -> None:
    found = asked(tiny_config, "ppo.clip_range=0.1", "reward.combine=min")
    assert found.stages == [SCORE, SHAPE, UPDATE]
    assert found.keys == ["reward.combine", "ppo.clip_range"]


def test_beta_is_the_one_in_force(tiny_config: Make) -> None:
    """Adaptive β has moved from 0.15 to 0.1: the config's own value is a change, that in force is none."""
    assert asked(tiny_config, "kl.coef=0.15").kl_coef == 0.15
    with pytest.raises(UserError, match=r"--set kl\.coef=0\.1 changes nothing: β in force in iteration 1 is 0\.1"):
        asked(tiny_config, "kl.coef=0.1")


def test_no_penalty_at_all_may_be_asked_whatever_the_controller(tiny_config: Make) -> None:
    found = asked(tiny_config, "kl.coef=0")
    assert (found.kl_coef, found.stages, found.keys) == (0.0, [SHAPE, UPDATE], ["kl.coef"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generation.temperature=0.5", "--set generation.temperature would need new responses"),
        ("prompts.batch_size=4", "--set prompts.batch_size would need new responses"),
        ("policy.dtype=bfloat16", "--set policy.dtype would need new responses"),
        ("seed=3", "--set seed would need new responses"),
        ("num_threads=3", "--set num_threads is where the run is computed"),
        ("execution.num_shards=2", "--set execution.num_shards is where the run is computed"),
        (
            "ppo.critic_warmup_iterations=1",
            "decides the first 1 iterations, and of iteration 1 the weights alone",
        ),
        ("kl.target=9.0", "--set kl.target decides β of later iterations and changes nothing in iteration 1"),
        ("checkpoint.every=3", "--set checkpoint.every changes no number"),
        ("tracking.experiment=x", "--set tracking.experiment changes no number"),
        ("reward.components.0.name=x", "--set reward.components.0.name changes no number"),
        ("ppo.clip_range=0.2", "--set ppo.clip_range=0.2 changes nothing: the run has these values already"),
        ("num_iterations=1", "--set num_iterations=1 ends before iteration 1"),
        ("ppo.clip_rang=0.1", "ppo.clip_rang is not a known key; did you mean clip_range?"),
        ("kl.coef", "--set 'kl.coef' is not of the form section.key=value"),
        ("shaping.estimator=rloo", "prompts.samples_per_prompt is 1 and shaping.estimator is rloo"),
    ],
)
def test_what_cannot_be_asked(tiny_config: Make, override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        asked(tiny_config, override)
    assert said in str(refused.value)


def test_the_policy_of_an_overlapped_run_answered_otherwise(tiny_config: Make) -> None:
    with pytest.raises(UserError, match=r"--set execution\.overlap would need new responses"):
        changes_of(tiny_config(["execution={num_shards: 2}"]), ["execution.overlap=true"], iteration=1, kl_coef=0.15)


def test_a_warm_up_that_this_iteration_is_in(tiny_config: Make) -> None:
    assert asked(tiny_config, "ppo.critic_warmup_iterations=2").stages == [UPDATE]


@pytest.mark.parametrize(
    ("run", "override", "moments_of"),
    [
        ("none", "shaping.score_normalization=running", [0, 1, 2, 3, 4]),
        ("none", "shaping.score_normalization=reference", [0]),
        ("running", "shaping.score_normalization=reference", [0]),
        ("reference", "shaping.score_normalization=running", [0, 1, 2, 3, 4]),
        ("running", "shaping.score_normalization=none", []),
        ("running", "reward.components.0.weight=2.0", [0, 1, 2, 3, 4]),
        ("reference", "reward.components.0.model=elsewhere", [0]),
        ("running", "shaping.score_clip=1.0", []),
        ("none", "reward.components.0.weight=2.0", []),
    ],
)
def test_whose_scores_make_the_moments(run: str, override: str, moments_of: list[int], tiny_config: Make) -> None:
    config = tiny_config([*ADAPTIVE, f"shaping.score_normalization={run}", "num_iterations=9"])
    found = changes_of(config, [override], iteration=5, kl_coef=0.15)
    assert list(found.moments_of) == moments_of
    assert found.is_scored_again == override.startswith("reward.")


def test_every_problem_is_told(tiny_config: Make) -> None:
    with pytest.raises(UserError) as refused:
        asked(tiny_config, "seed=3", "kl.target=9.0")
    assert len(refused.value.problems) == 2


def test_a_critic_cannot_be_made_up(tiny_config: Make) -> None:
    config = tiny_config(["shaping.estimator=reinforce++"])
    with pytest.raises(UserError, match=r"shaping\.estimator=gae needs the values of a critic"):
        changes_of(config, ["shaping.estimator=gae"], iteration=1, kl_coef=0.1)
