"""What `--set` asks: which keys of a config change, which stages they move, and which of them cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, flat_params
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.stage_graph import STAGES

BETA: Final = "kl.coef"
CONTROLLER: Final = "kl.controller"
WEIGHTS: Final = ("weight", "combine", "std_coef")
"""Of `reward`: how raw scores combine, which are stored."""
WARM_UP: Final = "ppo.critic_warmup_iterations"

_NEW_RESPONSES: Final = ("prompts.", "policy.", "generation.", "seed", "execution.overlap")
_CONDITIONS: Final = ("device", "num_threads", "frozen_models", "execution.")
"""Where a run is computed."""
_BETAS: Final = ("ppo.adam_beta1", "ppo.adam_beta2")
_AFTER_RETURNS: Final = ("shaping.whiten_advantages", "shaping.group_std", "shaping.gae_lambda")
"""Of `shaping`: what leaves the returns as a critic expects them."""
_LATER: Final = ("kl.controller", "kl.target", "kl.horizon", "kl.proportional_gain", "kl.integral_gain")
_AROUND: Final = ("checkpoint.", "artifacts.", "guards.", "tracking.")
_SILENT: Final = (
    "name", "allowed_hosts", "retries", "timeout_s", "backoff_s", "max_response_bytes", "token_env"
)  # fmt: skip
"""Of `reward`: what changes no score."""


@dataclass(frozen=True)
class Changes:
    """What is changed, and where it is felt first."""

    config: RunConfig
    keys: Sequence[str]
    kl_coef: float | None
    """β instead of the one in force; None: as it was."""
    stages: Sequence[str]
    """What has to be computed again, in flow order."""
    scores_are_stored: bool
    """Whether the components' raw scores are those of the run."""
    moments_of: Sequence[int]
    """Earlier iterations whose scores make the score moments that this one starts from; none: they are as stored."""
    is_scored_again: bool
    """Whether those scores, too, are others than the stored ones."""
    has_next_kl_coef: bool
    """Whether the β of the next iteration follows from this one alone."""
    notes: Sequence[str]
    """What stays as the run had it, though it would have been another one under these knobs."""


def changes_of(config: RunConfig, overrides: Sequence[str], *, iteration: int, kl_coef: float) -> Changes:
    """Find out what overrides change in one iteration.

    Args:
        config: of the run.
        overrides: ``a.b=c`` each.
        iteration: the one that is asked about.
        kl_coef: β in force there.
    Raises: UserError for keys that are not known, that would need new responses, or that change nothing.
    """
    changed = _changed(config, overrides)
    before, after = flat_params(config), flat_params(changed)
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    named = [override.partition("=")[0].strip() for override in overrides]
    new_kl_coef = changed.kl.coef if BETA in named and changed.kl.coef != kl_coef else None
    keys = [key for key in keys if key != BETA and not (key == CONTROLLER and key not in named)]
    renamed = any(key.startswith("reward.") and key.endswith(".name") for key in keys)
    if any(key.startswith("reward.") and not _is_silent(key) for key in keys):  # a component is given as a whole
        keys = [key for key in keys if key in named or not _is_silent(key)]
    if changed.num_iterations <= iteration:
        raise UserError(f"--set num_iterations={changed.num_iterations} ends before iteration {iteration}; set more")
    if problems := [problem for key in keys if (problem := _refused(key, iteration))]:
        raise UserError(*problems)
    warm_up = max(config.ppo.critic_warmup_iterations, changed.ppo.critic_warmup_iterations)
    if WARM_UP in keys and iteration >= warm_up:
        raise UserError(
            f"--set {WARM_UP} decides the first {warm_up} iterations, and of iteration {iteration} the weights alone "
            "that it starts from, which a replay keeps; train with it: `rlhf train --set`"
        )
    if not keys and new_kl_coef is None:
        raise UserError(_nothing(overrides, named, iteration, kl_coef))
    _check_critic(config, changed)
    felt = {_first_stage(key) for key in keys} | ({"shape_rewards"} if new_kl_coef is not None else set())
    if felt - {"ppo_update"}:
        felt.add("shape_rewards")
    stages = [stage for stage in STAGES if stage in felt | {"ppo_update"}]
    rewards = [key for key in keys if key.startswith("reward.")]
    shown = [*keys, *([BETA] if new_kl_coef is not None else [])]
    last_kl = config.kl.controller == "log_pi" and iteration > 0  # it is compared with the KL of the iteration before
    return Changes(
        changed,
        shown,
        new_kl_coef,
        stages,
        scores_are_stored=not renamed and all(key.rpartition(".")[2] in WEIGHTS for key in rewards),
        moments_of=_moments_of(changed, iteration) if rewards or "shaping.score_normalization" in keys else (),
        is_scored_again=bool(rewards),
        has_next_kl_coef=not (last_kl and "reference_logprobs" in felt),
        notes=_notes(changed, shown),
    )


def _changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with overrides. A β of 0 may be asked whatever the controller: no controller moves it from there."""
    tree = config.model_dump()
    if any(override.partition("=")[0].strip() == BETA for override in overrides):
        fixed = build_config(tree | {"kl": tree["kl"] | {"controller": "fixed"}}, overrides)
        if fixed.kl.coef == 0:
            return fixed
    return build_config(tree, overrides)


def _refused(key: str, iteration: int) -> str | None:
    """Why a key cannot be asked; None if it can."""
    if key.startswith(_NEW_RESPONSES):
        return (
            f"--set {key} would need new responses, and a replay keeps those of iteration {iteration}; "
            "train with it: `rlhf train --set`"
        )
    if key.startswith(_CONDITIONS):
        return f"--set {key} is where the run is computed, not what; leave it out, and replay on that machine"
    if key in _LATER:
        return (
            f"--set {key} decides β of later iterations and changes nothing in iteration {iteration}; "
            "set kl.coef for another β there"
        )
    if key.startswith(_AROUND) or _is_silent(key):
        return f"--set {key} changes no number of an iteration; leave it out"
    return None


def _is_silent(key: str) -> bool:
    return key.startswith("reward.") and key.rpartition(".")[2] in _SILENT


def _moments_of(changed: RunConfig, iteration: int) -> Sequence[int]:
    """Earlier iterations whose scores a normalisation has measured."""
    measured = {"none": 0, "reference": 1, "running": iteration}[changed.shaping.score_normalization]
    return range(min(measured, iteration))


def _notes(changed: RunConfig, keys: Sequence[str]) -> list[str]:
    found: list[str] = []
    of_returns = [key for key in keys if not key.startswith(("ppo.", "num_iterations")) and key not in _AFTER_RETURNS]
    if of_returns and changed.uses_critic:
        found.append(
            "values are those of the run's critic, which has learned the run's returns: where --set "
            f"{', '.join(of_returns)} gives returns of another size, advantages hold that difference as well"
        )
    if betas := [key for key in keys if key in _BETAS]:
        found.append(
            f"AdamW's moments are averages of the run's gradients by the run's betas: --set {', '.join(betas)} decides "
            "how those of this iteration enter them"
        )
    return found


def _nothing(overrides: Sequence[str], named: Sequence[str], iteration: int, kl_coef: float) -> str:
    if set(named) == {BETA}:
        return f"--set {overrides[-1]} changes nothing: β in force in iteration {iteration} is {kl_coef:g} already"
    return f"--set {', '.join(overrides)} changes nothing: the run has these values already"


def _check_critic(config: RunConfig, changed: RunConfig) -> None:
    if changed.uses_critic and not config.uses_critic:
        raise UserError(
            f"--set shaping.estimator={changed.shaping.estimator} needs the values of a critic, and the run's "
            f"shaping.estimator {config.shaping.estimator} has none; choose reward, rloo, group or reinforce++"
        )


def _first_stage(key: str) -> str:
    if key.startswith("reward."):
        return "score_rewards"
    if key.startswith("reference."):
        return "reference_logprobs"
    return "shape_rewards" if key.startswith(("shaping.", "kl.")) else "ppo_update"
