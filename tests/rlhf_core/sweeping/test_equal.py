"""Why a knob has had no effect: for each rule a config where it is idle, and one where another sentence stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torture.runs import start

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.sweeping.equal import REASONS, idle
from rlhf_core.sweeping.folder import SweepFolder, SweepRecord
from rlhf_core.sweeping.summary import Criterion, summarize
from tasks.session.session import open_session

NEVER = {"policy/clipfrac_avg": [0.0, 0.0], "rollout/truncated_rate": [0.0, 0.0]}
SOMETIMES = {"policy/clipfrac_avg": [0.0, 0.1], "rollout/truncated_rate": [0.0, 0.5]}
UNKNOWN = "has had no effect: what it bounds or selects never occurred in these runs"


def why(key: str, *overrides: str, measured: dict[str, list[float]] | None = None) -> str:
    return idle(key, [build_config({}, list(overrides))], NEVER if measured is None else measured)


@pytest.mark.parametrize(
    ("key", "overrides", "told"),
    [
        ("kl.target", ["kl.controller=fixed"], "it is read by kl.controller adaptive and log_pi, and kl.controller is"),
        ("kl.horizon", ["kl.controller=log_pi"], "it is read by kl.controller adaptive, and kl.controller is log_pi"),
        ("kl.integral_gain", [], "it is read by kl.controller log_pi, and kl.controller is adaptive"),
        ("kl.estimator", ["kl.coef=0", "kl.controller=fixed"], "β is 0"),
        ("shaping.gae_lambda", ["shaping.estimator=value"], "it is read by shaping.estimator gae, and that is value"),
        ("shaping.group_std", [], "it is read by shaping.estimator group, and that is gae"),
        ("shaping.missing_eos_mode", [], "shaping.missing_eos_penalty is null"),
        ("shaping.missing_eos_penalty", [], "no response was cut at the length limit"),
        ("ppo.vf_coef", ["shaping.estimator=reward"], "shaping.estimator reward has no critic"),
        ("policy.critic.init", ["shaping.estimator=reward"], "shaping.estimator reward has no critic"),
        ("ppo.clip_range", ["ppo.num_minibatches=1"], "there is one optimiser step an iteration"),
        ("ppo.clip_range", [], "no ratio ever left the range"),
        ("ppo.target_kl", [], "ppo.num_ppo_epochs is 1"),
        ("ppo.target_kl", ["ppo.num_ppo_epochs=2"], "no epoch's KL came above it"),
        ("ppo.kl_loss_estimator", [], "ppo.kl_loss_coef is 0"),
        ("ppo.importance_cap", [], "the policy that is updated has drawn the responses itself"),
        ("ppo.lr_schedule", ["num_iterations=2", "ppo.warmup_iterations=1"], "every schedule begins at its peak"),
        ("checkpoint.every", [], "it decides what is kept on the disk"),
        ("reference.batch_size", [], "it decides how much is computed at a time"),
        ("ppo.learning_rate", ["num_iterations=1"], "num_iterations is 1: score and KL are those before the only"),
    ],
)
def test_an_idle_knob_is_explained(key: str, overrides: Sequence[str], told: str) -> None:
    said = why(key, *overrides)
    assert said.startswith(f"{key} has no effect, since {told}"), said


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("kl.target", []),
        ("kl.estimator", []),
        ("shaping.gae_lambda", []),
        ("ppo.vf_coef", []),
        ("ppo.clip_range", []),
        ("ppo.kl_loss_estimator", ["ppo.kl_loss_coef=0.1"]),
        ("ppo.importance_cap", ["execution.overlap=true", "execution.num_shards=2"]),
        ("shaping.missing_eos_penalty", ["shaping.missing_eos_penalty=1"]),
        ("ppo.learning_rate", []),
        ("generation.top_p", []),
    ],
)
def test_a_knob_that_is_read_is_not_called_idle_for_a_reason_that_is_none(key: str, overrides: Sequence[str]) -> None:
    assert why(key, *overrides, measured=SOMETIMES) == f"{key} {UNKNOWN}"


def test_every_rule_is_of_a_knob_that_there_is() -> None:
    tree = build_config({}).model_dump()
    for key in REASONS:
        node = tree
        for part in key.split("."):
            node = node[part]


def test_real_points_say_so(tiny_config: Callable[[Sequence[str]], RunConfig], tmp_path: Path) -> None:
    config = tiny_config(["num_iterations=2", "kl.controller=fixed"])
    sweep = SweepFolder.create(tmp_path / "sweep", SweepRecord.of(config, {"kl.target": [2.0, 4.0]}, [0], 1))
    for run in sweep.runs:
        open_session.cache_clear()
        start(run.config, sweep.run_path(run))
    summary = summarize(sweep, Criterion(0.0, None), {})
    assert summary["best"]["note"] == (
        "more seeds would tell nothing: all points came out exactly equal: kl.target has no effect, since it is read "
        "by kl.controller adaptive and log_pi, and kl.controller is fixed"
    )
