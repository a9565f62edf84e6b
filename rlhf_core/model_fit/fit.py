"""A config that fits a model, its prompts and this machine: what `rlhf config --for-model` prints, with reasons.

Numbers and their sources stand in :mod:`rlhf_core.model_fit.defaults`; :mod:`rlhf_core.model_fit.memory` finds what
memory allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.model_fit.choices import Choice, Fit, number, tree_of
from rlhf_core.model_fit.defaults import (
    ADAPTER_SAVES,
    CONTEXT_OF_PROMPTS,
    HEAD_RATE,
    ITERATIONS,
    LORA_RANK,
    MEASURED_AT,
    MINIBATCHES,
    defaults_of,
    response_length,
    wanted_responses,
)
from rlhf_core.model_fit.memory import Training, choose_training, decoded_at_a_time
from rlhf_core.models.adapters import is_adapter
from rlhf_core.models.devices import resolve_device
from rlhf_core.models.model_folders import CAUSAL_LM, CLASSIFIER, check_model_folder
from rlhf_core.models.sizes import parameter_counts
from rlhf_core.models.templates import check_template
from rlhf_core.models.texts import named_special_tokens
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer, token_names
from rlhf_core.models.vocabulary import vocabulary
from rlhf_core.preflight import preflight
from rlhf_core.preflight.assembled import read_prompts
from rlhf_core.preflight.folders import context_length, model_config
from rlhf_core.preflight.policies import prompt_and_context_limits
from rlhf_core.prompts.columns import PAIR, USUAL
from rlhf_core.prompts.render_process import TemplateLimitError, TemplateRefusedError, renderer
from rlhf_core.prompts.sources import load_prompt_set, read_rows
from rlhf_core.rewards.ready_made import READY_MADE

PLACEHOLDER: Final = "PROMPTS.jsonl"
FIELD: Final = "--for-model"
NO_REWARD: Final[dict[str, Any]] = {"reward": {"components": [{"kind": "function", "function": "length"}]}}
"""A reward without a model, for what does not depend on it."""
PLAIN: Final = "the model has no chat template: it continues plain texts"
_SPOKEN: Final = "QWERTZ"
"""An answer that no chat template writes."""


@dataclass(frozen=True)
class _Model:
    """A policy's folder, as far as a config depends on it."""

    name: str
    shape: Any
    tokenizer: PolicyTokenizer
    count: int
    """Parameters."""
    context: int | None
    device: str

    @property
    def template(self) -> str | None:
        """Its chat template; None for a model of plain texts."""
        found = self.tokenizer.tokenizer.chat_template
        return found if isinstance(found, str) or found is None else next(iter(found.values()), None)


def fit_config(model: str, prompts: str | None = None, reward: str | None = None) -> Fit:
    """Choose the values that depend on a model, its prompts and this machine.

    Args:
        model: folder or hub id of a causal language model.
        prompts: a file or data set of prompts; None: to be named later.
        reward: folder or hub id of a reward model, or the name of a ready-made function; None: to be named later.
    Returns: the choices; with prompts they have passed the pre-flight together.
    Raises: UserError where the folder is none of a policy's, or prompts or reward do not go with it.
    """
    known = _read_model(model)
    rewards = [_reward_shape(reward)]
    length = Choice(
        "generation.max_new_tokens", response_length(known.context, known.device),
        f"short on purpose, on a {known.device} device: time grows with it; at most a quarter of the context",
    )  # fmt: skip
    of_prompts, there = _of_prompts(prompts, known)
    batch = _batch(known, there)
    first = [*of_prompts, batch, Choice("policy.model", model, "as given"), _of_reward(reward), length, _steps(batch)]
    training = choose_training(tree_of(first), known.shape, rewards, count=known.count, device=known.device)
    limits = prompt_and_context_limits(build_config(tree_of(first)), known.shape)
    choices = [
        *first,
        *_of_policy(known, training),
        *_of_generation(known, training, batch.value, limits[0] + length.value),
        *_of_learning(known, training),
        _iterations(batch.value, there),
    ]
    config = build_config(tree_of(choices)) if prompts is not None else None
    if config is not None:
        preflight(config)
    return Fit(_title(known, training), choices, config)


def _read_model(model: str) -> _Model:
    """Read a policy's folder. Raises UserError where it is something else."""
    if is_adapter(model):
        raise UserError(
            f"{FIELD} {model!r} is a LoRA adapter; name the model that it belongs to, and set policy.adapter"
        )
    shape = model_config(model, FIELD)
    check_model_folder(CAUSAL_LM, model, FIELD, [])
    try:
        tokenizer = load_policy_tokenizer(model, None)
    except UserError as error:
        raise UserError(*(problem.replace("policy.model", FIELD, 1) for problem in error.problems)) from None
    check_template(tokenizer.tokenizer.chat_template, [{"role": "user", "content": "a"}], f"{FIELD} {model!r}")
    count = parameter_counts(build_config({"policy": {"model": model}, **NO_REWARD}), shape, [None])["policy"]
    return _Model(model, shape, tokenizer, count, context_length(shape), resolve_device("auto").type)


def _reward_shape(reward: str | None) -> Any | None:
    """The transformers config of a reward model; None for a function. Raises UserError where it is something else."""
    if reward is None or reward in READY_MADE:
        return None
    shape = model_config(reward, "--reward")
    check_model_folder(CLASSIFIER, reward, "--reward", [])
    return shape


def _title(known: _Model, training: Training) -> str:
    context = f"a context of {known.context:,} tokens" if known.context else "a context that it does not tell"
    device = known.device + ("" if training.free_bytes == float("inf") else f", {_gb(training.free_bytes)} free")
    return (
        f"{known.name}: {known.shape.model_type}, {known.count / 1e6:,.1f} M parameters, "
        f"{len(known.tokenizer.tokenizer):,} tokens, {context}, {'with' if known.template else 'without'} a chat "
        f"template. Chosen on this machine ({device})."
    )


def _of_prompts(prompts: str | None, known: _Model) -> tuple[list[Choice], int | None]:
    """(choices, prompts that are short enough): the column, and whether they are texts or chats."""
    has_template = known.template is not None
    longest = _max_len(known)
    if prompts is None:
        told = "TO BE NAMED: a file of JSONL, CSV, Parquet or Arrow, a data set's folder or a hub id"
        as_chat = "set it to true where prompts are texts: each is a user's turn then" if has_template else PLAIN
        return [
            Choice("prompts.source", PLACEHOLDER, told),
            Choice("prompts.as_chat", False, as_chat),
            Choice("prompts.over_long", "drop", "longer ones are left out, and counted"),
            longest,
        ], None
    names = _columns(prompts)
    is_pair = tuple(names) == PAIR
    column = (
        Choice("prompts.from_preferences", True, "pairs of chosen and rejected, which begin alike")
        if is_pair
        else Choice("prompts.column", names[0], "the column that holds prompts")
    )
    source = Choice("prompts.source", prompts, "as given")
    prompt_set = load_prompt_set(build_config({**tree_of([source, column]), **NO_REWARD}).prompts)
    total, num_texts = len(prompt_set.entries), sum(isinstance(entry, str) for entry in prompt_set.entries)
    as_chat = (
        PLAIN if not has_template
        else "each text is a user's turn of a chat, through the model's template" if num_texts and not is_pair
        else "what pairs share is read as it stands" if num_texts
        else "they are chats already, and read through the model's template"
    )  # fmt: skip
    chat = Choice("prompts.as_chat", has_template and num_texts > 0 and not is_pair, as_chat)
    section = build_config({**tree_of([source, column, chat]), **NO_REWARD}).prompts
    dropped = 0
    if has_template or num_texts == total:  # the pre-flight refuses chats without a template
        dropped = len(read_prompts(prompt_set, known.tokenizer, section, longest.value).over_long)
    if dropped == total:
        raise UserError(
            f"--prompts {prompts!r}: all {total} prompts are longer than the {longest.value} tokens that fit into "
            f"{known.name!r} beside a response; bring shorter prompts"
        )
    told = f"{dropped:,} of {total:,} prompts are longer, and left out" if dropped else f"none of {total:,} is longer"
    return [source, column, chat, Choice("prompts.over_long", "drop", told), longest], total - dropped


def _max_len(known: _Model) -> Choice:
    """Tokens of the longest prompt."""
    new = response_length(known.context, known.device)
    if known.context is None or known.context > 2 * CONTEXT_OF_PROMPTS:
        could = "does not tell its context" if known.context is None else f"could read {known.context:,}"
        told = f"tokens; the model {could}: long prompts cost time and memory"
        return Choice("prompts.max_len", CONTEXT_OF_PROMPTS, told)
    told = f"tokens: its context of {known.context:,} without a response of {new}"
    return Choice("prompts.max_len", known.context - new, told)


def _columns(prompts: str) -> Sequence[str]:
    """The column of a source that holds prompts, or the two of a preference pair."""
    chosen: list[Sequence[str]] = []

    def choose(names: Sequence[str]) -> Sequence[str]:
        usual = [name for name in USUAL if name in names][:1]
        pair = PAIR if all(name in names for name in PAIR) else ()
        if not usual and not pair:
            raise UserError(
                f"--prompts {prompts} has the columns {', '.join(names)}, and none of {', '.join(USUAL)}; rename one"
            )
        chosen.append(usual or pair)
        return chosen[-1]

    try:
        rows = read_rows(PromptsConfig(source=prompts), choose)
    except UserError as error:
        raise UserError(*(problem.replace("prompts.source", "--prompts", 1) for problem in error.problems)) from None
    return chosen[-1] if chosen else tuple(rows.columns)[:1]


def _batch(known: _Model, there: int | None) -> Choice:
    """Responses of an iteration: no more than there are prompts."""
    wanted = wanted_responses(known.count, known.device)
    told = f"responses an iteration, on a {known.device} device: their mean can be trusted, and time grows with it"
    if there is not None and there < wanted:
        wanted = there - there % MINIBATCHES if there >= MINIBATCHES else max(1, there)
        told = f"responses an iteration: {there} prompts are short enough, each is answered once"
    return Choice("prompts.batch_size", wanted, told)


def _steps(batch: Choice) -> Choice:
    steps = 1 if batch.value % MINIBATCHES else MINIBATCHES
    return Choice(
        "ppo.num_minibatches", steps, f"optimiser steps an iteration, of {batch.value // steps} responses each"
    )


def _of_policy(known: _Model, training: Training) -> list[Choice]:
    tokenizer, free = known.tokenizer, _gb(training.free_bytes)
    pad = next(token for token, id_ in vocabulary(tokenizer.tokenizer).items() if id_ == tokenizer.pad_id)
    why = next((note for note in tokenizer.notes if note.startswith("masked cells")), "the tokenizer's own PAD")
    found = [Choice("policy.pad_token", pad, why)]
    half = "float32 master weights, products in bfloat16: what a GPU is fast at"
    lean = (
        "nothing larger fits into memory"
        if training.dtype == "bfloat16"
        else "exact; bfloat16 would halve what frozen models take"
    )
    found.append(Choice("policy.dtype", training.dtype, half if known.device == "cuda" else lean))
    needs = f"the plan's estimate is {_gb(training.peak_bytes)} of {free} free"
    if training.has_adapter:
        no_room = training.whole_bytes > training.free_bytes
        whole = f"all weights with a critic of their own would take {_gb(training.whole_bytes)}"
        saves = f", and be slow: {ADAPTER_SAVES}" if known.device == "cpu" and not no_room else ""
        found += [
            Choice("policy.lora.rank", LORA_RANK, f"an adapter: {needs}; {whole}{saves}"),
            Choice("policy.critic.kind", "shared", "a value head on the policy's trunk, which stays frozen: no memory"),
        ]
    else:
        start = "the reward model" if training.critic_init == "reward" else "the policy's trunk"
        found += [
            Choice("policy.lora.rank", None, f"all weights are trained: {needs}"),
            Choice("policy.critic.kind", "separate", f"a model of its own, which starts as {start}"),
        ]
    if training.has_checkpointing:
        found.append(Choice("policy.gradient_checkpointing", True, "memory for time: without it, it would not fit"))
    micro = "responses of a forward pass: more would not fit" if training.micro_batch else "whole minibatches fit"
    if not training.fits:
        micro = f"THIS DOES NOT FIT: {needs}, and nothing smaller is known; take a larger machine or a smaller model"
    found.append(Choice("ppo.micro_batch_size", training.micro_batch, micro))
    return found


def _of_generation(known: _Model, training: Training, rows: int, tokens: int) -> list[Choice]:
    at_once, cache = decoded_at_a_time(known.shape, rows, tokens, training.dtype, training.free_bytes)
    told = f"the keys and values of {rows} responses take {_gb(cache)} at most"
    decoded = (
        Choice("generation.batch_size", None, f"all at a time: {told}")
        if at_once == rows
        else Choice("generation.batch_size", at_once, f"responses decoded at a time: {told}")
    )
    tokenizer = known.tokenizer
    ends = f"a response ends at {token_names(tokenizer.tokenizer, tokenizer.eos_ids)} or at its longest"
    if (turn := _end_of_turn(known)) is not None:
        return [
            decoded,
            Choice("generation.stop", [turn], f"the chat template ends an answer so, and it is no EOS; {ends}"),
        ]
    return [decoded, Choice("generation.stop", [], f"{ends}: no text has to end it")]


def _end_of_turn(known: _Model) -> str | None:
    """The special token that a chat template writes behind an answer, where it is no EOS of the policy."""
    if known.template is None:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SPOKEN}]
    try:
        (text,) = renderer.render(known.template, [chat], add_generation_prompt=False)
    except TemplateLimitError:
        raise UserError(f"{FIELD} {known.name!r} has a chat template that takes too long for an answer") from None
    if isinstance(text, TemplateRefusedError) or _SPOKEN not in text:
        return None
    behind = text.rpartition(_SPOKEN)[2].lstrip()
    tokenizer = known.tokenizer
    named = named_special_tokens(tokenizer.tokenizer, [behind])
    ends = [(id_, name) for id_, name in named.items() if behind.startswith(name)]
    return (
        None if not ends or any(id_ in tokenizer.eos_ids for id_, _ in ends) else max(ends, key=lambda e: len(e[1]))[1]
    )


def _of_reward(reward: str | None) -> Choice:
    if reward is None:
        told = "TO BE NAMED, this is an example: {kind: model, model: FOLDER}, a function of yours, or a service"
        return Choice("reward.components", [{"kind": "function", "function": "sentiment"}], told)
    if reward in READY_MADE:
        return Choice(
            "reward.components", [{"kind": "function", "function": reward}], "a ready-made function, as given"
        )
    return Choice("reward.components", [{"kind": "model", "model": reward}], "a reward model, as given")


def _of_learning(known: _Model, training: Training) -> list[Choice]:
    line = defaults_of(known.count)
    whole = f"all weights {number(line.all_weights)} ({line.all_weights_from})"
    adapter = f"an adapter {number(line.adapter)} ({line.adapter_from})"
    mine, other = (adapter, whole) if training.has_adapter else (whole, adapter)
    rate = line.adapter if training.has_adapter else line.all_weights
    critic = HEAD_RATE if training.has_adapter else line.critic
    why = "of the value head, which starts at zero: measured at 135 M" if training.has_adapter else line.critic_from
    return [
        Choice(
            "ppo.learning_rate", rate,
            f"up to {_count(line.up_to)} parameters, {mine}; {other}; halve it if the clip fraction stays above 0.2",
        ),
        Choice("ppo.critic_learning_rate", critic, why),
        Choice("kl.controller", "log_pi", "β follows the KL, so that the target is held"),
        Choice("kl.coef", 0.05, "where β begins"),
        Choice("kl.target", 5.0, f"nats a response: changed clearly, and still the model's language; {MEASURED_AT}"),
        Choice("shaping.gae_lambda", 0.9, "the better one on short answers here; 0.95 to 1 for hundreds of tokens"),
    ]  # fmt: skip


def _iterations(batch: int, there: int | None) -> Choice:
    passes = "" if there is None else f"{ITERATIONS * batch / there:,.1f} passes over the prompts; "
    told = f"{ITERATIONS * batch:,} responses, {passes}look at the curve, then `rlhf resume RUN --iterations 80`"
    return Choice("num_iterations", ITERATIONS, told)


def _count(parameters: float) -> str:
    return "any number of" if parameters == float("inf") else f"{parameters / 1e6:,.0f} M"


def _gb(count: float) -> str:
    return "an unknown amount" if count == float("inf") else f"{count / 1e9:,.1f} GB"
