"""Guard rails: what the numbers of finished iterations say about a run, in sentences.

Everything here is a pure function of (metrics of the iterations so far, config, what a person has accepted), so
that a resumed run comes to the same verdicts. A history is one mapping of metric names to numbers for each
iteration, from 0.

The numbers of iteration i describe the policy that sampled it: the state *before* iteration i. A guard trips in
iteration i when its number has been beyond the threshold for ``patience`` iterations in a row, i among them. What
a person has accepted stays accepted until the number is back within the threshold; then the guard is armed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.guard_config import GuardAction

Metrics = Mapping[str, float]
History = Sequence[Metrics]
Accepted = Mapping[str, int]
"""Guard -> newest iteration in which a person has accepted that it tripped."""

STANDARD_ERRORS = 3.0
"""How far k1 must lie below k3 before chance is ruled out."""
SAMPLER_GAP = 1e-3
"""Nats: recomputed log-probs of a sampler that agrees with the scorer differ by less."""


@dataclass(frozen=True)
class Finding:
    """A guard that has tripped.

    Example: ``Finding("kl_ceiling", 12, 31.5, 30.0, "stop", 1, False, True, "KL to the reference was ...")``
    """

    guard: str
    iteration: int
    value: float
    limit: float
    action: GuardAction
    in_a_row: int
    """Iterations beyond the threshold, this one included."""
    is_accepted: bool
    is_new: bool
    """Whether it trips for the first time in this row of iterations."""
    sentence: str
    """What was seen, the threshold, the likely cause, and what to do."""

    @property
    def acts(self) -> bool:
        """Whether it stops or pauses the run."""
        return self.action != "warn" and not self.is_accepted


@dataclass(frozen=True)
class Rule:
    """How one guard measures and explains itself."""

    measure: Callable[[History, int, RunConfig], float | None]
    """Its number in an iteration; None where there is nothing to compare."""
    explain: Callable[[History, int, RunConfig], tuple[str, str, str]]
    """(what was seen, the likely cause, what to do)."""
    sense: int = 1
    """1: a ceiling; -1: a floor."""
    sign: int = 1
    """Of the threshold."""


def findings(history: History, config: RunConfig, accepted: Accepted) -> list[Finding]:
    """What the guards say of the newest iteration.

    Args:
        history: metrics of all finished iterations, from 0.
        config: its ``guards`` section, and the knobs that explain what is seen.
        accepted: what a person has accepted.
    Returns: one finding a guard that has tripped, in the order of the config.
    """
    found: list[Finding] = []
    newest = len(history) - 1
    for name, guard in config.guards.active.items():
        start = _start_of_row(name, history, newest, config)
        if start is None or newest - start + 1 < guard.patience:
            continue
        rule, in_a_row = RULES[name], newest - start + 1
        value = rule.measure(history, newest, config)
        assert value is not None
        seen, cause, remedy = rule.explain(history, newest, config)
        limit = _limit(name, config)
        row = f" for {in_a_row} iterations" if in_a_row > 1 else ""
        side = "above" if rule.sense > 0 else "below"
        found.append(
            Finding(
                guard=name,
                iteration=newest,
                value=value,
                limit=limit,
                action=guard.action,
                in_a_row=in_a_row,
                is_accepted=accepted.get(name, -1) >= start,
                is_new=in_a_row == guard.patience,
                sentence=f"iteration {newest}: {seen}, {side} guards.{name}.threshold {limit:g}{row}; "
                f"likely cause: {cause}; {remedy}",
            )
        )
    return found


def last_good(history: History, config: RunConfig, accepted: Accepted) -> int | None:
    """The newest iteration whose numbers, and so the state before it, satisfy every guard that may stop the run.

    Args:
        history: metrics of all finished iterations, from 0.
        config: of the run.
        accepted: what a person has accepted, which counts as good.
    Returns: the iteration; None if there is none.
    """
    stopping = [name for name, guard in config.guards.active.items() if guard.action != "warn"]
    for iteration in range(len(history) - 1, -1, -1):
        starts = {name: _start_of_row(name, history, iteration, config) for name in stopping}
        if all(start is None or accepted.get(name, -1) >= start for name, start in starts.items()):
            return iteration
    return None


def _start_of_row(name: str, history: History, iteration: int, config: RunConfig) -> int | None:
    """First iteration of the row beyond the threshold that ends in ``iteration``; None if that one is within it."""
    start = iteration
    while start >= 0 and _is_beyond(name, history, start, config):
        start -= 1
    return start + 1 if start < iteration else None


def _is_beyond(name: str, history: History, iteration: int, config: RunConfig) -> bool:
    value = RULES[name].measure(history, iteration, config)
    return value is not None and RULES[name].sense * (value - _limit(name, config)) > 0


def _limit(name: str, config: RunConfig) -> float:
    threshold = config.guards.active[name].threshold
    assert threshold is not None
    return RULES[name].sign * threshold


def _metric(name: str) -> Callable[[History, int, RunConfig], float | None]:
    def measure(history: History, iteration: int, _config: RunConfig) -> float | None:
        return history[iteration].get(name)

    return measure


def _explain_kl(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    now, kl = history[iteration], config.kl
    seen = f"KL to the reference was {now['objective/kl']:.4g} nats a response"
    threshold = config.guards.kl_ceiling.threshold
    if kl.controller != "fixed" and threshold is not None and threshold <= kl.target:
        cause = f"the controller of β aims at kl.target {kl.target:g}, which is not below the threshold"
        return seen, cause, "raise the threshold or lower kl.target"
    held = "is fixed and too small" if kl.controller == "fixed" else "follows too slowly"
    cause = f"β = {now['kl/beta']:.3g} {held} for ppo.learning_rate {config.ppo.learning_rate:g}"
    return seen, cause, "raise kl.coef or lower ppo.learning_rate"


def _negative_kl(history: History, iteration: int, config: RunConfig) -> float | None:
    """k1, where it lies so far below k3 that chance is ruled out.

        k3 - k1 > 3 √(2 k3 / n)

    Both estimate the same KL, k1 with a variance of about 2 KL, if responses were sampled from the distribution
    whose log-probs are recorded, and the reference's log-probs are normalised over no smaller support.
    """
    k1, k3 = history[iteration]["objective/kl"], history[iteration]["kl/k3"]
    chance = STANDARD_ERRORS * math.sqrt(2 * max(k3, 0.0) / config.prompts.batch_size)
    return k1 if k3 - k1 > chance else None


def _explain_negative_kl(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    now, generation = history[iteration], config.generation
    seen = f"KL was estimated at {now['objective/kl']:.4g} nats a response, with k3 at {now['kl/k3']:.4g}"
    gap = now.get("guard/first_max_abs_log_ratio", 0.0)
    policy, reference = config.policy.dtype, config.reference.dtype or config.policy.dtype
    if gap > SAMPLER_GAP:
        cause = f"the sampler's log-probs differ from a full pass of the same weights by up to {gap:.2g} nats a token"
        remedy = "decode and score in the same dtype: set policy.dtype and reference.dtype to float32"
    elif policy != reference:
        cause = f"policy.dtype is {policy} and reference.dtype {reference}: one model gives two different log-probs"
        remedy = "set both to the same dtype"
    elif generation.top_k is not None or generation.top_p < 1:
        cause = (
            f"unequal supports: with top_k {generation.top_k} and top_p {generation.top_p:g}, responses come from a "
            "truncated support that the recorded log-probs or the reference's do not share"
        )
        remedy = "set generation.top_k null and generation.top_p 1"
    elif generation.temperature != 1:
        cause = (
            f"generation.temperature {generation.temperature:g} divides the logits of the sampler, but not those of "
            "the log-probs of policy or reference"
        )
        remedy = "set generation.temperature 1"
    else:
        cause = (
            "responses were not sampled from the distribution whose log-probs are recorded (another temperature, "
            "support, dtype or set of weights in the sampler), or were selected after sampling"
        )
        remedy = "compare `rlhf inspect --sample` of a response with the model's own log-probs"
    return seen, cause, remedy


def _explain_entropy(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    first, now = history[0]["policy/entropy_avg"], history[iteration]["policy/entropy_avg"]
    seen = f"a token's entropy was {now:.3g} nats, {first:.3g} in iteration 0"
    cause = "the policy has collapsed onto few responses"
    if iteration == 0 or now > 0.5 * first:
        cause = f"the policy is this certain from the start (generation.temperature {config.generation.temperature:g})"
    return seen, cause, "raise kl.coef or ppo.entropy_coef, or lower ppo.learning_rate"


def _distinct_share(history: History, iteration: int, config: RunConfig) -> float | None:
    """distinct-2 of the batch / its mean over the first iterations: a share, since it falls with batch and length."""
    window = config.guards.baseline_iterations
    if iteration < window:
        return None
    return history[iteration]["rollout/distinct_2"] / max(_mean(history[:window], "rollout/distinct_2"), 1e-12)


def _explain_distinct(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    window, now = config.guards.baseline_iterations, history[iteration]
    first = _mean(history[:window], "rollout/distinct_2")
    seen = (
        f"distinct-2 of the batch was {now['rollout/distinct_2']:.3g}, "
        f"{now['rollout/distinct_2'] / max(first, 1e-12):.2f} of the {first:.3g} of the first {window} iterations"
    )
    cause = "mode collapse: different prompts get the same response"
    length, before = now["rollout/response_len"], _mean(history[:window], "rollout/response_len")
    if length > 2 * before:
        cause += f"; or only length: responses have grown from {before:.0f} to {length:.0f} tokens"
    return seen, cause, "read `rlhf inspect --stage generate`; raise kl.coef or ppo.entropy_coef"


def _explain_repetition(history: History, iteration: int, _config: RunConfig) -> tuple[str, str, str]:
    seen = f"{history[iteration]['rollout/repetition']:.0%} of a response's bigrams had been used in it before"
    return (
        seen,
        "responses run in loops that the reward does not mind",
        "raise kl.coef, or add a component against repetition to reward.components",
    )


def _length_correlation(history: History, iteration: int, _config: RunConfig) -> float | None:
    return abs(history[iteration]["rollout/score_length_corr"])


def _explain_length(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    r = history[iteration]["rollout/score_length_corr"]
    liked = "long" if r > 0 else "short"
    remedy = "raise shaping.length_penalty" if r > 0 else "lower shaping.length_penalty"
    if r < 0 and config.shaping.length_penalty == 0:
        remedy = "add a component that asks for length to reward.components"
    return (
        f"score and response length correlated by {r:+.2f}",
        f"the reward likes {liked} responses, whatever they say",
        f"{remedy}, or train the reward model on pairs of equal length",
    )


def _explain_truncation(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    seen = f"{history[iteration]['rollout/truncated_rate']:.0%} of responses were cut at the length limit"
    cause = f"generation.max_new_tokens {config.generation.max_new_tokens} is too short for them"
    remedy = "raise generation.max_new_tokens"
    if history[0]["rollout/truncated_rate"] < 0.5 * history[iteration]["rollout/truncated_rate"]:
        cause = "the policy has learnt not to end its responses"
        remedy = "set shaping.missing_eos_penalty"
    return seen, cause, remedy


def _score_drift(history: History, iteration: int, config: RunConfig) -> float | None:
    fallen = _fallen_component(history, iteration, config)
    return None if fallen is None else min(fallen[0], fallen[1])


def _fallen_component(history: History, iteration: int, config: RunConfig) -> tuple[float, float, str] | None:
    """How far the score has risen, and the component that has fallen most: its fall and its name.

        d(x) = (mean of x over the last w iterations - over the first w) / √((σ²_last + σ²_first) / 2)
        rise = d(score);    fall = -sign(weight) d(component);    drift = min(rise, max over components of fall)

    σ² is the variance over responses, a mean over the w iterations: Cohen's d (1988). A single component never
    drifts: it is the score. None before 2 w iterations, when the two windows would overlap.
    """
    window = config.guards.baseline_iterations
    if iteration + 1 < 2 * window:
        return None
    first, last = history[:window], history[iteration + 1 - window : iteration + 1]
    weights = dict(zip(config.reward.names, (c.weight for c in config.reward.components), strict=True))
    falls = [
        (-math.copysign(1.0, weight) * _effect(first, last, f"reward/{name}", f"spread/{name}"), name)
        for name, weight in weights.items()
        if all(f"reward/{name}" in metrics and f"spread/{name}" in metrics for metrics in (*first, *last))
    ]
    if not falls:
        return None
    fall, name = max(falls)
    return _effect(first, last, "objective/scores", "objective/scores_std"), fall, name


def _explain_drift(history: History, iteration: int, config: RunConfig) -> tuple[str, str, str]:
    fallen = _fallen_component(history, iteration, config)
    assert fallen is not None
    rise, fall, name = fallen
    index = config.reward.names.index(name)
    verb = "fallen" if config.reward.components[index].weight >= 0 else "risen, against its weight,"
    return (
        f"since the first {config.guards.baseline_iterations} iterations the score has risen by {rise:.2f} standard "
        f"deviations, while its component {name} has {verb} by {fall:.2f}",
        f"the policy earns the other components at the cost of {name}",
        f"give reward.components.{index} a weight of greater size",
    )


def _effect(first: History, last: History, name: str, spread: str) -> float:
    """Cohen's d of a metric between two windows; infinite where it has moved and does not spread at all."""
    moved = _mean(last, name) - _mean(first, name)
    variance = sum(metrics[spread] ** 2 for metrics in (*first, *last)) / (len(first) + len(last))
    if variance == 0:
        return math.copysign(math.inf, moved) if moved else 0.0
    return moved / math.sqrt(variance)


def _mean(history: History, name: str) -> float:
    return sum(metrics[name] for metrics in history) / len(history)


RULES: Mapping[str, Rule] = {
    "kl_ceiling": Rule(_metric("objective/kl"), _explain_kl),
    "negative_kl": Rule(_negative_kl, _explain_negative_kl, sense=-1, sign=-1),
    "entropy_floor": Rule(_metric("policy/entropy_avg"), _explain_entropy, sense=-1),
    "distinct_floor": Rule(_distinct_share, _explain_distinct, sense=-1),
    "repetition_ceiling": Rule(_metric("rollout/repetition"), _explain_repetition),
    "length_correlation": Rule(_length_correlation, _explain_length),
    "truncation_ceiling": Rule(_metric("rollout/truncated_rate"), _explain_truncation),
    "score_drift": Rule(_score_drift, _explain_drift),
}
