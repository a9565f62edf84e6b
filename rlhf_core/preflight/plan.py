"""The pre-flight: every check of a config against its files, and the plan of the run that passes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.devices import check_ranks, resolve_device, resolve_num_threads
from rlhf_core.models.sizes import memory_parts, notes, parameter_counts, peak_memory, trained_adapter_size
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.preflight.folders import model_config
from rlhf_core.preflight.mathematics import check_mathematics
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
    device: str
    num_threads: int
    parameters: dict[str, int]
    """Model -> number of parameters."""
    memory_bytes: dict[str, int]
    """What -> estimate."""
    peak_bytes: int
    """What is in memory at a time, at most."""
    notes: list[str]


def preflight(config: RunConfig, *, begun: bool = False) -> Plan:
    """Check a config against its files and models; load no weights.

    Args:
        config: already valid in itself.
        begun: the run exists, and may have settings that a new one is refused.
    Returns: the plan of the run.
    Raises: UserError with every problem found.
    """
    problems: list[str] = []
    found: list[str] = []
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
    tokenizer = policy and attempt(lambda: load_policy_tokenizer(config.policy.model, config.policy.pad_token))
    if policy is not None:
        attempt(lambda: check_reference(config, policy, found))
        attempt(lambda: trained_adapter_size(config, policy))
    rewards = [
        attempt(lambda i=i: check_reward(config, i, tokenizer, found)) for i in range(len(config.reward.components))
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
    if prompt_set is not None and tokenizer is not None and limits is not None:
        attempt(lambda: check_prompts(config, prompt_set, tokenizer, limits[0], found))
    if tokenizer is not None:
        attempt(lambda: check_stop(config.generation, tokenizer, found))
    if prompt_set is not None and tokenizer is not None:
        attempt(lambda: check_reward_prompts(config, tokenizer, prompt_set, found))
    if limits is not None:
        attempt(lambda: check_critic(config, rewards, limits[0] + config.generation.max_new_tokens, found))
    if problems or policy is None or tokenizer is None or limits is None or prompt_set is None or device is None:
        raise UserError(*problems)
    parameters = parameter_counts(config, policy, rewards)
    memory = memory_parts(config, policy, parameters, limits[0], device.type)
    return Plan(
        prompt_set=prompt_set,
        tokenizer=tokenizer,
        max_prompt_len=limits[0],
        context_len=limits[1],
        vocab_size=int(policy.get_text_config().vocab_size),
        device=device.type,
        num_threads=resolve_num_threads(config.num_threads),
        parameters=parameters,
        memory_bytes=memory,
        peak_bytes=peak_memory(config, memory, device.type),
        notes=[*notes(config, device.type, parameters), *found],
    )
