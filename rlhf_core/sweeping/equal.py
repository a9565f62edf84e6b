"""Points of a sweep that came out exactly equal, and why: which knob has had no effect there.

Equal to the last bit is no chance, so that more seeds would tell nothing: the knob between them is not read in this
config, or bounds what never came near it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import flat_params
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.sweeping.folder import SweepFolder
from rlhf_core.sweeping.grid import point_label

NUMBERS: Final = ("score", "kl", "gain")
LEARNING: Final = ("ppo.", "shaping.", "kl.", "policy.critic.")
"""Sections that act through the update."""
Measured = Mapping[str, Sequence[float]]
"""Metric -> its value in each iteration."""
Reason = Callable[[RunConfig, Measured], str | None]


def equal_points(
    there: SweepFolder, points: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups of finished points whose every seed has the same numbers.

    Args:
        there: the sweep.
        points: rows of ``summarize``.
        runs: likewise.
    Returns: for each group its points, the first in order first, and ``why`` in a sentence.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for point in points:
        if point["finished"] == point["of"]:
            own = sorted((r for r in runs if r["point"] == point["point"]), key=lambda r: r["seed"])
            groups.setdefault(tuple((r["seed"], *(r[n] for n in NUMBERS)) for r in own), []).append(point["point"])
    return [
        {"points": alike, "why": why_equal(there, alike, len(points))} for alike in groups.values() if len(alike) > 1
    ]


def why_equal(there: SweepFolder, alike: Sequence[int], num_points: int) -> str:
    """One sentence about points that came out equal: the knobs between them, each with what made it idle."""
    configs = [next(run.config for run in there.runs if run.point == index) for index in alike]
    flat = [flat_params(config) for config in configs]
    keys = [key for key in dict.fromkeys(k for each in flat for k in each) if len({repr(f.get(key)) for f in flat}) > 1]
    keys = [key for key in keys if not key.startswith("tracking.")]
    run = next(run for run in there.runs if run.point == alike[0])
    measured = _measured(RunFolder.open(there.run_path(run)))
    reasons = list(dict.fromkeys(idle(key, configs, measured) for key in keys))
    whose = "all points" if len(alike) == num_points else "; ".join(point_label(there.points[i]) for i in alike)
    return f"{whose} came out exactly equal: {'; '.join(reasons)}"


def idle(key: str, configs: Sequence[RunConfig], measured: Measured) -> str:
    """Why a knob has had no effect under any of these configs.

    Args:
        key: dotted.
        configs: that differ in it, and came out equal.
        measured: by one of the runs.
    """
    if key.startswith(LEARNING) and all(config.num_iterations == 1 for config in configs):
        return f"{key} has no effect, since num_iterations is 1: score and KL are those before the only update"
    rule = next((REASONS[prefix] for prefix in _prefixes(key) if prefix in REASONS), None)
    found = {rule(config, measured) for config in configs} if rule is not None else {None}
    told = next(iter(found)) if len(found) == 1 else None
    if told is not None:
        return f"{key} has no effect, since {told}"
    return f"{key} has had no effect: what it bounds or selects never occurred in these runs"


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _measured(run: RunFolder) -> Measured:
    found: dict[str, list[float]] = {}
    for iteration in range(run.num_finished()):
        for manifest in run.manifests(iteration).values():
            for name, value in manifest.metrics.items():
                found.setdefault(name, []).append(value)
    return found


def _controller(*readers: str) -> Reason:
    def reason(config: RunConfig, _: Measured) -> str | None:
        if config.kl.controller in readers:
            return None
        return f"it is read by kl.controller {' and '.join(readers)}, and kl.controller is {config.kl.controller}"

    return reason


def _estimator(*readers: str) -> Reason:
    def reason(config: RunConfig, _: Measured) -> str | None:
        if config.shaping.estimator in readers:
            return None
        return f"it is read by shaping.estimator {' and '.join(readers)}, and that is {config.shaping.estimator}"

    return reason


def _critic(config: RunConfig, _: Measured) -> str | None:
    return None if config.uses_critic else f"shaping.estimator {config.shaping.estimator} has no critic"


def _clipping(config: RunConfig, measured: Measured) -> str | None:
    if config.ppo.num_ppo_epochs * config.ppo.num_minibatches == 1:
        return "there is one optimiser step an iteration (ppo.num_ppo_epochs 1 x num_minibatches 1), whose ratio is 1"
    if _never(measured, "policy/clipfrac_avg"):
        return "no ratio ever left the range: policy/clipfrac_avg is 0 in every iteration"
    return None


def _target_kl(config: RunConfig, _: Measured) -> str | None:
    if config.ppo.num_ppo_epochs == 1:
        return "ppo.num_ppo_epochs is 1: there is no epoch left to skip"
    return "no epoch's KL came above it"


def _kl_loss(config: RunConfig, _: Measured) -> str | None:
    return "ppo.kl_loss_coef is 0" if config.ppo.kl_loss_coef == 0 else None


def _importance(config: RunConfig, _: Measured) -> str | None:
    is_own = config.generation.engine == "own" and not config.execution.overlap
    return "the policy that is updated has drawn the responses itself (no overlap, engine own)" if is_own else None


def _missing_eos(_: RunConfig, measured: Measured) -> str | None:
    return "no response was cut at the length limit" if _never(measured, "rollout/truncated_rate") else None


def _missing_eos_mode(config: RunConfig, measured: Measured) -> str | None:
    if config.shaping.missing_eos_penalty is None:
        return "shaping.missing_eos_penalty is null"
    return _missing_eos(config, measured)


def _penalty_form(config: RunConfig, _: Measured) -> str | None:
    return "β is 0 (kl.coef 0, kl.controller fixed)" if config.kl.coef == 0 else None


def _schedule(config: RunConfig, _: Measured) -> str | None:
    is_short = config.num_iterations - config.ppo.warmup_iterations <= 1
    return "every schedule begins at its peak, and there is one iteration after the warm-up" if is_short else None


def _fixed(sentence: str) -> Reason:
    return lambda _config, _measured: sentence


def _never(measured: Measured, name: str) -> bool:
    values = measured.get(name, ())
    return bool(values) and not any(values)


_PLACE = _fixed("it decides how much is computed at a time, not what comes out")
_KEPT = _fixed("it decides what is kept on the disk, not what is computed")
REASONS: Final[Mapping[str, Reason]] = {
    "kl.target": _controller("adaptive", "log_pi"),
    "kl.horizon": _controller("adaptive"),
    "kl.proportional_gain": _controller("log_pi"),
    "kl.integral_gain": _controller("log_pi"),
    "kl.estimator": _penalty_form,
    "shaping.gae_lambda": _estimator("gae"),
    "shaping.group_std": _estimator("group"),
    "shaping.missing_eos_penalty": _missing_eos,
    "shaping.missing_eos_mode": _missing_eos_mode,
    "policy.critic": _critic,
    "ppo.vf_coef": _critic,
    "ppo.value_clip_range": _critic,
    "ppo.critic_learning_rate": _critic,
    "ppo.clip_range": _clipping,
    "ppo.clip_range_high": _clipping,
    "ppo.dual_clip": _clipping,
    "ppo.target_kl": _target_kl,
    "ppo.kl_loss_estimator": _kl_loss,
    "ppo.importance_cap": _importance,
    "ppo.importance_threshold": _importance,
    "ppo.lr_schedule": _schedule,
    "ppo.max_skipped_steps": _fixed("no optimiser steps in a row were skipped"),
    "ppo.micro_batch_size": _PLACE,
    "policy.gradient_checkpointing": _PLACE,
    "reference.batch_size": _PLACE,
    "generation.batch_size": _PLACE,
    "checkpoint": _KEPT,
}
"""Knob, or section -> why it is idle under a config; None where it is read."""
