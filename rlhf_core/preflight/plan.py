"""The pre-flight: every check of a config against its files, and the plan of the run that passes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.critic_start import with_critic_start
from rlhf_core.models.devices import check_ranks, resolve_device, resolve_num_threads
from rlhf_core.models.model_folders import CAUSAL_LM, check_model_folder
from rlhf_core.models.policy_template import with_policy_template
from rlhf_core.models.sizes import memory_parts, notes, parameter_counts, peak_memory, trained_adapter_size
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.models.vocabulary import DrawableTokens
from rlhf_core.preflight.architectures import check_architectures
from rlhf_core.preflight.assembled import Progress
from rlhf_core.preflight.folders import model_config
from rlhf_core.preflight.mathematics import check_mathematics
from rlhf_core.preflight.message_keys import check_message_keys
from rlhf_core.preflight.pins import pinned
from rlhf_core.preflight.policies import (
    check_critic,
    check_reference,
    critic_starts_from_reward,
    prompt_and_context_limits,
)
from rlhf_core.preflight.prompts import check_prompts
from rlhf_core.preflight.reward_prompts import check_reward_prompts
from rlhf_core.preflight.rewards import check_reward
from rlhf_core.preflight.stopping import check_stop
from rlhf_core.preflight.vocabularies import check_policy_rows, check_spelled, rows_of, sampling_note
from rlhf_core.prompts.sources import PromptSet, load_prompt_set

Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it needs. Built only when nothing is wrong."""

    prompt_set: PromptSet
    tokenizer: PolicyTokenizer
    max_prompt_len: int
    context_len: int
    vocab_size: int
    """One more than the largest id that the policy can draw."""
    device: str
    num_threads: int
    parameters: dict[str, int]
    """Model -> number of parameters."""
    memory_bytes: dict[str, int]
    """What -> estimate."""
    peak_bytes: int
    """What is in memory at a time, at most."""
    notes: list[str]


def preflight(config: RunConfig, progress: Progress | None = None, *, begun: bool = False) -> Plan:
    """Check a config against its files and models; load no weights.

    Args:
        config: already valid in itself.
        progress: called with the prompts read so far and the number of all.
        begun: the run exists, and may have settings that a new one is refused.
    Returns: the plan of the run.
    Raises: UserError with every problem found.
    """
    return _plan(config, begun=begun, reads_prompts=True, progress=progress)


def load_plan(config: RunConfig) -> Plan:
    """The plan of a run whose pre-flight was passed before: prompts are loaded, and not read one by one.

    Args:
        config: of the run.
    Raises: UserError with every problem found.
    """
    return _plan(config, begun=True, reads_prompts=False)


@dataclass
class _Findings:
    """What the checks have found so far."""

    problems: list[str]
    notes: list[str]
    """What was chosen for the user, and what may surprise."""

    def attempt(self, check: Callable[[], Found]) -> Found | None:
        """What a check returns; None where it has raised UserError, whose problems are kept."""
        try:
            return check()
        except UserError as error:
            self.problems.extend(problem for problem in error.problems if problem not in self.problems)
            return None


@dataclass(frozen=True)
class _Policy:
    """The policy's shape and tokenizer; None for what could not be read."""

    shape: Any | None
    tokenizer: PolicyTokenizer | None
    tokens: DrawableTokens | None
    limits: tuple[int, int] | None
    """Longest prompt and context, in tokens."""


def _plan(config: RunConfig, *, begun: bool, reads_prompts: bool, progress: Progress | None = None) -> Plan:
    held = pinned(config)
    config, found = held.config, _Findings([], [*held.notes])
    found.attempt(lambda: check_mathematics(config, begun=begun, notes=found.notes))
    device = found.attempt(lambda: resolve_device(config.device))
    found.attempt(lambda: device and check_ranks(config.execution.update, device))
    if config.generation.engine == "vllm":
        found.attempt(lambda: vllm_version(config.generation.vllm.interpreter))
    policy = _check_policy(config, found)
    rewards = _check_rewards(config, policy, found)
    prompt_set = found.attempt(lambda: load_prompt_set(config.prompts))
    if prompt_set is not None and policy.tokenizer is not None:
        _check_prompts(config, policy, prompt_set, found, reads_prompts=reads_prompts, progress=progress)
    if policy.shape is not None and policy.limits is not None:
        longest = policy.limits[0] + config.generation.max_new_tokens
        found.attempt(lambda: check_critic(config, rewards, found.notes))
        found.attempt(lambda: check_architectures(config, policy.shape, rewards, longest, found.notes))
    if found.problems:
        raise UserError(*found.problems)
    assert prompt_set is not None, "or there was a problem"
    assert device is not None, "likewise"
    assert policy.tokenizer is not None, "likewise"
    assert policy.tokens is not None, "likewise"
    assert policy.limits is not None, "likewise"
    config = with_critic_start(config)
    parameters = parameter_counts(config, policy.shape, rewards)
    memory = memory_parts(config, policy.shape, parameters, policy.limits[0], device.type)
    return Plan(
        prompt_set=prompt_set,
        tokenizer=policy.tokenizer,
        max_prompt_len=policy.limits[0],
        context_len=policy.limits[1],
        vocab_size=policy.tokens.num_tokens,
        device=device.type,
        num_threads=resolve_num_threads(config.num_threads),
        parameters=parameters,
        memory_bytes=memory,
        peak_bytes=peak_memory(config, memory, device.type),
        notes=[*notes(config, device.type, parameters), *prompt_set.notes, *found.notes],
    )


def _check_policy(config: RunConfig, found: _Findings) -> _Policy:
    section = config.policy
    shape = found.attempt(lambda: model_config(section.model, "policy.model"))
    if shape is None:
        return _Policy(None, None, None, None)
    if not found.attempt(lambda: check_model_folder(CAUSAL_LM, section.model, "policy.model", found.notes)):
        return _Policy(None, None, None, None)
    tokenizer = found.attempt(
        lambda: with_policy_template(
            load_policy_tokenizer(section.model, section.pad_token, adapter=section.adapter), section
        )
    )
    tokens: DrawableTokens | None = None
    if tokenizer is not None:
        found.notes += tokenizer.notes
        found.notes += [note for note in [sampling_note(section.model)] if note]
        tokens = found.attempt(lambda: check_policy_rows(config, shape, tokenizer, found.notes))
        found.attempt(lambda: check_stop(config.generation, tokenizer, found.notes))
    found.attempt(lambda: check_reference(config, shape, tokenizer, tokens, found.notes))
    found.attempt(lambda: trained_adapter_size(config, shape))
    return _Policy(shape, tokenizer, tokens, found.attempt(lambda: prompt_and_context_limits(config, shape)))


def _check_rewards(config: RunConfig, policy: _Policy, found: _Findings) -> list[Any]:
    """The shape of each component's model; None for functions and services."""
    if not config.reward.components:
        found.problems.append("reward.components is empty; give at least one, e.g. [{kind: model, model: FOLDER}]")
    elif config.reward.first_model is None and critic_starts_from_reward(config):
        found.problems.append(
            "policy.critic.init is reward, but no component of reward.components is a model; "
            "use policy.critic.init policy"
        )
    return [
        found.attempt(lambda i=i: check_reward(config, i, policy.tokenizer, policy.tokens, found.notes))
        for i in range(len(config.reward.components))
    ]


def _check_prompts(
    config: RunConfig,
    policy: _Policy,
    prompt_set: PromptSet,
    found: _Findings,
    *,
    reads_prompts: bool,
    progress: Progress | None,
) -> None:
    tokenizer, limits, date = policy.tokenizer, policy.limits, config.prompts.template_date
    assert tokenizer is not None, "asked for where there is one"
    if not reads_prompts:
        return
    if limits is not None:
        found.attempt(lambda: check_prompts(config, prompt_set, tokenizer, limits[0], found.notes, progress))
        found.attempt(lambda: check_message_keys(config, prompt_set, tokenizer))
        found.attempt(lambda: check_spelled(prompt_set, tokenizer, rows_of(policy.shape)))
    found.attempt(lambda: check_reward_prompts(config, tokenizer, prompt_set, found.notes, template_date=date))
