"""The probe: a run's models loaded as the run loads them, and tried on a few rows before anything is written.

It finds what no file tells: weights that are not finite, an architecture that mixes the rows of a batch or decodes from
a cache otherwise than it reads, a reward model without a finite score, a backward pass that fails. ``probe`` is for a
whole config; ``probe_policy`` and ``probe_reward`` are for one folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.checkpoints import Trainer, new_trainer
from rlhf_core.models.devices import using_threads
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_reference
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.reward_text import Conversation, Failure
from rlhf_core.models.sequences import Sequences
from rlhf_core.models.sizes import empty_model
from rlhf_core.models.soundness import (
    ROW_TOLERANCE,
    decoding_distance,
    plain_tokens,
    row_distance,
    rows_of,
)
from rlhf_core.models.tokenizers import vocabulary_digest
from rlhf_core.models.trunk import Trunk
from rlhf_core.preflight.plan import Plan
from rlhf_core.prompts.rendering import render_prompt
from rlhf_core.rewards.loading import load_component
from rlhf_core.rewards.scoring import Component

Found = TypeVar("Found")

BUDGET: Final = {"cpu": 4e11, "cuda": 1e14, "mps": 4e12}
"""Operations that one pass over the probe's rows may take: seconds on each kind of device."""
MIN_ROW: Final = 16
STEPS: Final = 6
"""Tokens that the probe decodes one at a time."""
SCORE_TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of a score beside others and alone, relative to its size (at least 1)."""
ZERO_KL_TOLERANCE: Final = {"float32": 2e-3, "bfloat16": 0.5}
QUESTION, ANSWER = "Which colour has the sky?", " It is blue."
"""What each reward model scores once."""


@dataclass
class Loaded:
    """What a probe has loaded, for a run that goes on with it."""

    trainer: Trainer | None = None
    reference: LanguageModel | None = None
    rewards: list[Component] = field(default_factory=list[Component])
    frozen: FrozenModels = field(default_factory=FrozenModels)


def probe(config: RunConfig, plan: Plan, loaded: Loaded | None = None) -> list[str]:
    """Load the models of a run and try them.

    The random generators are left as they were. Without ``loaded``, and where frozen models leave memory between
    stages, a model is dropped once it has been tried.

    Args:
        config: of the run.
        plan: of its pre-flight.
        loaded: filled with what was loaded.
    Returns: notes on what was tried.
    Raises: UserError with every problem found.
    """
    with _generators_left_alone(), using_threads(plan.num_threads):
        return _Probe(config, plan, Loaded() if loaded is None else loaded).run()


def probe_policy(
    model: LanguageModel, tokens: Sequence[int], *, longest: int, name: str, decodes: bool = True
) -> dict[str, float]:
    """Try a loaded language model on rows of different lengths.

    Args:
        model: of any family.
        tokens: that the rows are made of.
        longest: of the rows, in tokens.
        name: field and value, for errors.
        decodes: whether responses are drawn from its own cache.
    Returns: what was measured -> the largest relative distance of a hidden state from a row alone.
    Raises: UserError if a distance is beyond its tolerance.
    """
    lengths = _lengths(longest, getattr(model.config.get_text_config(), "sliding_window", None))
    rows = rows_of(tokens, lengths)
    limit = ROW_TOLERANCE[_coarsest(model.trunk, model.dtype)]
    with torch.no_grad():
        found = {"rows": row_distance(model.hidden_states, model.alone, rows)}
        if found["rows"] > limit:
            raise UserError(
                f"{name} gives another result for a row beside others than alone (hidden states of rows of "
                f"{', '.join(map(str, lengths))} tokens differ by {found['rows']:.1e} of their length): architecture "
                f"{model.config.model_type!r} mixes rows of a batch; choose another one, or a smaller prompts.max_len"
            )
        if decodes:
            steps = min(STEPS, min(lengths) - 1)

            def begin(prompts: Sequence[Sequence[int]]) -> Any:
                return model.prefix(prompts, 2, steps + 1, pad_id=0)

            found["decoding"] = decoding_distance(begin, model.alone, rows, steps)
            if found["decoding"] > limit:
                raise UserError(
                    f"{name} decodes from its cache otherwise than it reads a whole text (hidden states differ by "
                    f"{found['decoding']:.1e} of their length, prompts of different lengths beside each other): choose "
                    "another architecture, or a smaller prompts.max_len"
                )
    return found


def probe_reward(model: RewardModel, tokens: Sequence[int], *, longest: int, name: str) -> dict[str, float]:
    """Try a loaded reward model on rows of different lengths.

    Args:
        model: of any family.
        tokens: of its vocabulary, that the rows are made of.
        longest: of the rows, in tokens.
        name: field and value, for errors.
    Returns: ``rows`` -> the largest difference of a score from transformers' score of the row alone, relative to it.
    Raises: UserError if a score is not finite, or depends on the rows beside it.
    """
    rows = rows_of(tokens, _lengths(min(longest, model.reader.max_len or longest), None))
    with torch.no_grad():
        found = model.score_ids(rows)
        alone = [model.model(input_ids=torch.tensor([row], device=model.device)).logits[0, 0].float() for row in rows]
    right = torch.stack(alone).cpu()
    if not bool(torch.isfinite(found).all()):
        raise UserError(f"{name} gives a score that is not finite; check its weights, or use dtype float32")
    gap = float(((found - right).abs() / right.abs().clamp(min=1.0)).max())
    dtype, kind = _coarsest(model.model, torch.float32), cast("Any", model.model).config.model_type
    if not gap <= SCORE_TOLERANCE["float32" if dtype is torch.float32 else "bfloat16"]:
        raise UserError(
            f"{name} scores a text beside others otherwise than alone (by {gap:.1e} of the score, rows of "
            f"{', '.join(str(len(row)) for row in rows)} tokens): its architecture {kind!r} does not mask padding; use "
            "batch_size 1 for it, or choose another one"
        )
    return {"rows": gap}


class _Probe:
    def __init__(self, config: RunConfig, plan: Plan, loaded: Loaded) -> None:
        self.config, self.plan, self.loaded = config, plan, loaded
        self.device = torch.device(plan.device)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.tokens, self.expected = self._prompt_tokens()
        self.longest = self.expected

    def run(self) -> list[str]:
        policy = self.attempt(self._policy)
        self.attempt(lambda: self._reference(policy))
        for index, component in enumerate(self.config.reward.components):
            if isinstance(component, ModelReward):
                self.attempt(lambda i=index, c=component: self._reward(i, c))
            elif self._stays:
                self.attempt(lambda i=index: self.loaded.rewards.append(self._load_reward(i)))
        if self.problems:
            raise UserError(*self.problems)
        return self.notes

    @property
    def _stays(self) -> bool:
        return self.config.frozen_models == "keep"

    def attempt(self, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except UserError as error:
            self.problems.extend(problem for problem in error.problems if problem not in self.problems)
        except torch.OutOfMemoryError as error:
            self.problems.append(f"the probe's rows of {self.longest} tokens do not fit the device: {_first(error)}")
        except (RlhfError, OSError):  # a failing disk is no mistake of the config
            raise
        except Exception as error:  # whatever the code of an architecture says
            kind = type(error).__name__
            self.problems.append(f"a model of this config does not run on {self.device.type} ({kind}: {_first(error)})")
        return None

    def _policy(self) -> ActorCritic:
        config = self.config
        if config.execution.update.is_launched:  # its ranks have the optimizer
            actor_critic = ActorCritic.initial(config, self.device)
        else:
            self.loaded.trainer = new_trainer(config, self.device)
            actor_critic = self.loaded.trainer.actor_critic
        policy, name = actor_critic.policy, f"policy.model {config.policy.model!r}"
        self.longest = affordable(policy.trunk, self.expected, self.device)
        decodes = config.generation.engine == "own"
        found = probe_policy(policy, self.tokens, longest=self.longest, name=name, decodes=decodes)
        shown = ", ".join(f"{what} {value:.0e}" for what, value in found.items())
        less = "" if self.longest == self.expected else f" (of up to {self.expected} that may come)"
        self.notes.append(
            f"probe: rows of up to {self.longest} tokens{less}, beside each other and from the cache, against each "
            f"alone: hidden states differ by {shown} of their length"
        )
        self._critic(actor_critic)
        if not config.execution.update.is_launched:
            self._backward(actor_critic)
        self._saving(actor_critic)
        return actor_critic

    def _critic(self, actor_critic: ActorCritic) -> None:
        """A critic whose trunk is not the policy's: rows, and whether a checkpoint of it loads again."""
        critic, init = actor_critic.critic, self.config.critic_init
        if critic is None or critic.trunk is None:
            return
        trunk = Trunk(critic.trunk, dtype=actor_critic.policy.dtype)

        def alone(row: list[int]) -> Tensor:
            return trunk.run(input_ids=torch.tensor([row], device=self.device), use_cache=False)[0]

        limit = ROW_TOLERANCE[_coarsest(critic.trunk, trunk.dtype)]
        with torch.no_grad():
            if (
                init == "reward"
                and row_distance(trunk, alone, rows_of(self.tokens, _lengths(self.longest, None))) > limit
            ):
                raise UserError(
                    "policy.critic.init is reward, but that model's values depend on the rows beside them; use "
                    "policy.critic.init policy"
                )
        again = {n: p.shape for n, p in empty_model(critic.trunk.config, "AutoModel").named_parameters()}
        if again != {n: p.shape for n, p in cast("nn.Module", critic.trunk).named_parameters()}:
            raise UserError(
                f"policy.critic is a model of its own of architecture {critic.trunk.config.model_type!r}, which a "
                "checkpoint's config.json alone does not describe; use policy.critic.kind shared"
            )

    def _backward(self, actor_critic: ActorCritic) -> None:
        sequences = _sequences(self.tokens).to(self.device)
        now = actor_critic.evaluate(sequences, self.config.generation.temperature)
        loss = now.logprobs_BR.mean()
        if actor_critic.critic is not None:
            loss = loss + actor_critic.critic.values(sequences, now.hidden_ND).mean()
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"policy.model {self.config.policy.model!r} gives log-probs or values that are not finite "
                f"({self.config.policy.dtype} on {self.device.type}); check its weights, or use policy.dtype float32"
            )
        try:
            loss.backward()
            named = [(name, p.grad) for name, p in actor_critic.named_parameters()]
            if all(grad is None or not bool(grad.any()) for name, grad in named if name.startswith("policy.")):
                raise UserError(
                    f"policy.model {self.config.policy.model!r} gets no gradient from its log-probs: none would train"
                )
            if broken := [name for name, grad in named if grad is not None and not bool(torch.isfinite(grad).all())]:
                raise UserError(f"the gradient of {broken[0]} is not finite; use policy.dtype float32")
        finally:
            for _, parameter in actor_critic.named_parameters():
                parameter.grad = None

    def _saving(self, actor_critic: ActorCritic) -> None:
        """Whether the config of a checkpoint can be written down; nothing is."""
        try:
            cast("Any", actor_critic.policy.model).config.to_json_string()
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"policy.model {self.config.policy.model!r} has a config.json that does not save again: {_first(error)}"
            ) from None

    def _reference(self, actor_critic: ActorCritic | None) -> None:
        config = self.config
        if actor_critic is None and config.reference_shares_trunk:
            return
        policy = None if actor_critic is None else actor_critic.policy
        reference = load_reference(config, self.device, policy, self.loaded.frozen)
        if self._stays:
            self.loaded.reference = reference
        if policy is None or not config.starts_at_reference:
            return
        sequences = _sequences(self.tokens).to(self.device)
        with torch.no_grad():
            own, theirs = (
                m.response_logprobs(
                    sequences,
                    m.hidden_states(sequences.read, sequences.before_response_N),
                    config.generation.temperature,
                )[0]
                for m in (policy, reference)
            )
        gap = float((own - theirs).abs().max())
        if not gap <= ZERO_KL_TOLERANCE[config.coarsest_dtype]:
            raise UserError(
                f"the reference is the policy that training starts from, but their log-probs differ by {gap:.1e}: KL "
                "would not be 0 in the first iteration; compare the weights of policy.model and reference.model"
            )

    def _load_reward(self, index: int) -> Component:
        return load_component(
            self.config.reward.components[index],
            field=f"reward.components.{index}",
            columns=self.config.prompts.columns,
            policy_vocabulary=vocabulary_digest(self.plan.tokenizer.tokenizer),
            device=self.device,
            frozen=self.loaded.frozen,
            template_date=self.config.prompts.template_date,
        )

    def _reward(self, index: int, component: ModelReward) -> None:
        model = self._load_reward(index)
        assert isinstance(model, RewardModel)
        if self._stays:
            self.loaded.rewards.append(model)
        name = f"reward.components.{index}.model {component.model!r}"
        text = self.plan.tokenizer.decode(list(self.tokens))
        own = cast("list[int]", model.tokenizer(text, add_special_tokens=False)["input_ids"])
        tokens = list(self.tokens) if model.reader.shares_vocabulary else own or plain_tokens(model.model.config, 64)
        pad = model.tokenizer.pad_token_id
        tokens = [token for token in tokens if token != pad] or plain_tokens(model.model.config, 64)
        longest = affordable(model.model, self.expected, self.device)
        asked, said = (self.plan.tokenizer.encode(text, is_chat=True) for text in (QUESTION, ANSWER))
        outcome = model.score([Conversation(QUESTION, ANSWER, (), [*asked, *said], len(asked))])[0]
        if isinstance(outcome, Failure):
            raise UserError(f"{name} {outcome.reason} of a plain question and answer")
        score = float(outcome)
        if not math.isfinite(score) and component.on_error != "fail":
            self.notes.append(f"probe: {name} gives {score} for a plain question and answer")
            return
        if not math.isfinite(score):
            raise UserError(f"{name} gives {score} for a plain question and answer; check its weights and dtype")
        gap = probe_reward(model, tokens, longest=longest, name=name)["rows"]
        self.notes.append(f"probe: {name} scores rows beside each other and alone to {gap:.0e} of the score")

    def _prompt_tokens(self) -> tuple[list[int], int]:
        """Tokens of the longest prompts, and the longest row that training will see."""
        tokenizer = self.plan.tokenizer
        texts: list[tuple[str, bool]] = []
        for entry in self.plan.prompt_set.entries[:512]:
            with contextlib.suppress(Exception):  # one that cannot be rendered is told elsewhere
                texts.append((render_prompt(entry, tokenizer.tokenizer), not isinstance(entry, str)))
        texts = sorted(texts, key=lambda text: -len(text[0]))[:8]
        rows = [tokenizer.encode(text, is_chat=is_chat)[: self.plan.max_prompt_len] for text, is_chat in texts]
        tokens = [t for row in rows for t in row if t not in tokenizer.eos_ids and t != tokenizer.pad_id]
        longest = max(map(len, rows), default=1) + self.config.generation.max_new_tokens
        return tokens or list(range(2, 10)), longest


def affordable(model: nn.Module, longest: int, device: torch.device) -> int:
    """How long the longest row of a probe may be: its cost has a bound, whatever the model's size."""
    parameters = sum(p.numel() for p in model.parameters())
    return min(longest, max(MIN_ROW, int(BUDGET.get(device.type, 4e11) / (4 * max(1, parameters)))))


def _lengths(longest: int, window: int | None) -> list[int]:
    """Different lengths, the longest first; one of them just beyond a sliding window."""
    beyond = [window + STEPS // 2] if window is not None and window + STEPS // 2 < longest else []
    return sorted({longest, max(2, longest * 5 // 8), max(2, min(5, longest)), *beyond}, reverse=True)


def _sequences(tokens: Sequence[int]) -> Sequences:
    """Two short rows, prompt and response each."""
    rows = torch.tensor([(tokens[i % len(tokens)], tokens[(i + 3) % len(tokens)]) for i in range(6)]).t()
    mask_BR = torch.tensor([[True, True, True], [True, True, False]])
    response_BR = rows[:, 3:] * mask_BR
    tokens_BL = torch.cat([rows[:, :3], response_BR], dim=1)
    return Sequences(tokens_BL, torch.tensor([3, 3]), response_BR, mask_BR)


def _coarsest(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    is_coarse = dtype is not torch.float32 or any(p.dtype is not torch.float32 for p in model.parameters())
    return torch.bfloat16 if is_coarse else torch.float32


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


@contextlib.contextmanager
def _generators_left_alone() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
