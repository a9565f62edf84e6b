"""The pre-flight: every check of a config against its files, and the plan of the run that passes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

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
    return _plan(config, functools.partial(check_prompts, progress=progress), begun=begun)


def load_plan(config: RunConfig) -> Plan:
    """The plan of a run whose pre-flight was passed before: prompts are loaded, and not read one by one.

    Args:
        config: of the run.
    Raises: UserError with every problem found.
    """
    return _plan(config, None, begun=True)


def _plan(
    config: RunConfig,
    read_prompts: Callable[[RunConfig, PromptSet, PolicyTokenizer, int, list[str]], None] | None,
    *,
    begun: bool,
) -> Plan:
    problems: list[str] = []
    held = pinned(config)
    config, found = held.config, [*held.notes]
    """Notes of the plan: what was chosen for the user, and what may surprise."""

    def attempt(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except UserError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return None

    attempt(lambda: check_mathematics(config, begun=begun, notes=found))
    device = attempt(lambda: resolve_device(config.device))
    attempt(lambda: device and check_ranks(config.execution.update, device))
    if config.generation.engine == "vllm":
        attempt(lambda: vllm_version(config.generation.vllm.interpreter))
    policy = attempt(lambda: model_config(config.policy.model, "policy.model"))
    if policy is not None and not attempt(
        lambda: check_model_folder(CAUSAL_LM, config.policy.model, "policy.model", found)
    ):
        policy = None
    section = config.policy
    tokenizer = policy and attempt(
        lambda: with_policy_template(
            load_policy_tokenizer(section.model, section.pad_token, adapter=section.adapter), section
        )
    )
    tokens: DrawableTokens | None = None
    if policy is not None and tokenizer is not None:
        found += tokenizer.notes
        found += [note for note in [sampling_note(section.model)] if note]
        tokens = attempt(lambda: check_policy_rows(config, policy, tokenizer, found))
    if policy is not None:
        attempt(lambda: check_reference(config, policy, tokenizer, tokens, found))
        attempt(lambda: trained_adapter_size(config, policy))
    rewards = [
        attempt(lambda i=i: check_reward(config, i, tokenizer, tokens, found))
        for i in range(len(config.reward.components))
    ]
    if not config.reward.components:
        problems.append("reward.components is empty; give at least one, e.g. [{kind: model, model: FOLDER}]")
    elif config.reward.first_model is None and critic_starts_from_reward(config):
        problems.append(
            "policy.critic.init is reward, but no component of reward.components is a model; "
            "use policy.critic.init policy"
        )
    prompt_set = attempt(lambda: load_prompt_set(config.prompts))
    limits = policy and attempt(lambda: prompt_and_context_limits(config, policy))
    if read_prompts is not None and prompt_set is not None and tokenizer is not None and limits is not None:
        attempt(lambda: read_prompts(config, prompt_set, tokenizer, limits[0], found))
        attempt(lambda: check_message_keys(config, prompt_set, tokenizer))
        attempt(lambda: check_spelled(prompt_set, tokenizer, rows_of(policy)))
    if tokenizer is not None:
        attempt(lambda: check_stop(config.generation, tokenizer, found))
    if read_prompts is not None and prompt_set is not None and tokenizer is not None:
        date = config.prompts.template_date
        attempt(lambda: check_reward_prompts(config, tokenizer, prompt_set, found, template_date=date))
    if limits is not None:
        attempt(lambda: check_critic(config, rewards, found))
        attempt(
            lambda: (
                policy
                and check_architectures(config, policy, rewards, limits[0] + config.generation.max_new_tokens, found)
            )
        )
    if problems or policy is None or tokenizer is None or limits is None or prompt_set is None or device is None:
        raise UserError(*problems)
    assert tokens is not None, "or there was a problem"
    config = with_critic_start(config)
    parameters = parameter_counts(config, policy, rewards)
    memory = memory_parts(config, policy, parameters, limits[0], device.type)
    return Plan(
        prompt_set=prompt_set,
        tokenizer=tokenizer,
        max_prompt_len=limits[0],
        context_len=limits[1],
        vocab_size=tokens.num_tokens,
        device=device.type,
        num_threads=resolve_num_threads(config.num_threads),
        parameters=parameters,
        memory_bytes=memory,
        peak_bytes=peak_memory(config, memory, device.type),
        notes=[*notes(config, device.type, parameters), *prompt_set.notes, *found],
    )
