"""A config that fits a model: what `rlhf config --for-model` prints, with a reason beside each value.

Learning rates, by the parameters of the policy:

| parameters | all weights | LoRA | where from |
|---|---|---|---|
| up to 20 M | 2e-4 | 6e-4 | measured here, 4 M (DECISIONS, "Learning on movie reviews") |
| up to 500 M | 3e-5 | 3e-4 | LoRA measured here at 135 M; all weights: a tenth of it |
| up to 3 B | 1e-5 | 1e-4 | InstructGPT, 1.3 B: 9.65e-6 (arXiv 2203.02155, appendix C.4) |
| up to 20 B | 1e-6 | 2e-5 | OpenRLHF's scripts of PPO at 7 B and 8 B: 5e-7 to 1e-6 |
| more | 5e-7 | 1e-5 | the same |

An adapter takes about ten times the rate of all weights ("LoRA Without Regret", Thinking Machines 2025).
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.bounds import free_bytes
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import is_adapter
from rlhf_core.models.devices import resolve_device
from rlhf_core.models.model_folders import CAUSAL_LM, check_model_folder
from rlhf_core.models.sizes import TRAINED_BYTES, parameter_counts
from rlhf_core.models.tokenizers import load_policy_tokenizer
from rlhf_core.preflight import preflight
from rlhf_core.preflight.folders import context_length, model_config
from rlhf_core.prompts.sources import load_prompt_set
from rlhf_core.rewards.ready_made import READY_MADE

RATES: Final = (
    (20e6, 2e-4, 6e-4),
    (500e6, 3e-5, 3e-4),
    (3e9, 1e-5, 1e-4),
    (20e9, 1e-6, 2e-5),
    (float("inf"), 5e-7, 1e-5),
)
"""Up to so many parameters -> learning rate of all weights, and of an adapter. See the table above."""
ALL_WEIGHTS_UP_TO: Final = 20e6
"""Parameters of a model of which all weights are trained, whatever the memory: an adapter would save nothing."""
SHARE_OF_MEMORY: Final = 0.5
"""Of the free memory, that weights, gradients and moments may take: activations come on top."""
CONTEXT_OF_PROMPTS: Final = 512
COLUMNS: Final = ("prompt", "messages", "conversations", "conversation", "question", "instruction", "query", "text")
MINIBATCHES: Final = 4
WIDTH: Final = 80
"""Columns of what is printed."""
PLACEHOLDER: Final = "PROMPTS.jsonl"
NO_REWARD: Final[dict[str, Any]] = {"reward": {"components": [{"kind": "function", "function": "length"}]}}
"""A reward without a model, for what does not depend on it."""


@dataclass(frozen=True)
class Choice:
    """A value of a config, and why it was chosen.

    Example: ``Choice("policy.lora.rank", 16, "…")``
    """

    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Fit:
    """A config for a model."""

    title: str
    """What the model is, in a line."""
    choices: list[Choice]
    config: RunConfig | None
    """As checked; None where prompts are still to be named."""

    def to_yaml(self) -> str:
        """Return the config as YAML, a reason behind or above each value."""
        lines = textwrap.wrap(self.title, WIDTH, initial_indent="# ", subsequent_indent="# ")
        open_sections: list[str] = []
        for choice in self.choices:
            *sections, name = choice.field.split(".")
            same = next(
                (i for i, (a, b) in enumerate(zip(open_sections, sections, strict=False)) if a != b),
                min(len(open_sections), len(sections)),
            )
            lines += [f"{'  ' * depth}{sections[depth]}:" for depth in range(same, len(sections))]
            open_sections = sections
            indent = "  " * len(sections)
            value = (
                json.dumps(choice.value, ensure_ascii=False)
                if not isinstance(choice.value, float)
                else _number(choice.value)
            )
            lines += textwrap.wrap(choice.reason, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(f"{indent}{name}: {value}")
        return "\n".join(lines) + "\n"


def fit_config(model: str, prompts: str | None = None, reward: str | None = None) -> Fit:
    """Choose the values that depend on a model, its prompts and this machine.

    Args:
        model: folder or hub id of a causal language model.
        prompts: a file or data set of prompts; None: to be named later.
        reward: folder or hub id of a reward model, or the name of a ready-made function; None: to be named later.
    Returns: the choices; with prompts and reward they have passed the pre-flight together.
    Raises: UserError where the folder is none of a policy's, or prompts or reward do not go with it.
    """
    if is_adapter(model):
        raise UserError(
            f"--for-model {model!r} is a LoRA adapter; name the model that it belongs to, and set policy.adapter"
        )
    shape = model_config(model, "--for-model")
    check_model_folder(CAUSAL_LM, model, "--for-model", [])
    tokenizer = load_policy_tokenizer(model, None)
    count = parameter_counts(build_config({"policy": {"model": model}, **NO_REWARD}), shape, [None])["policy"]
    has_template = bool(getattr(tokenizer.tokenizer, "chat_template", None))
    context = context_length(shape)
    of_prompts = _with_batch(_of_prompts(prompts, context, has_template=has_template), count)
    choices = [
        *of_prompts,
        *_of_policy(model, count, tokenizer.notes),
        *_of_reward(reward),
        *_of_training(count, context, of_prompts[-1].value),
    ]
    title = (
        f"{model}: {shape.model_type}, {count / 1e6:,.1f} M parameters, {len(tokenizer.tokenizer):,} tokens, "
        f"{'a context of ' + format(context, ',') + ' tokens' if context else 'a context that it does not tell'}, "
        f"{'with' if has_template else 'without'} a chat template"
    )
    config = build_config(_tree(choices)) if prompts is not None else None
    if config is not None:
        preflight(config)
    return Fit(title, choices, config)


def _of_prompts(prompts: str | None, context: int | None, *, has_template: bool) -> list[Choice]:
    source = PLACEHOLDER if prompts is None else prompts
    told = "to be named: JSONL, CSV, Parquet, Arrow, a data set or a hub id" if prompts is None else "as given"
    found = [Choice("prompts.source", source, told)]
    row = _first_row(prompts)
    column = next((name for name in COLUMNS if row is None or name in row), None)
    if row is not None and column is None:
        if {"chosen", "rejected"} <= row.keys():
            found.append(Choice("prompts.from_preferences", True, "pairs of chosen and rejected, which begin alike"))
        else:
            raise UserError(f"--prompts {prompts} has the columns {', '.join(row)}, and none of {', '.join(COLUMNS)}")
    elif column is not None and column != "prompt":
        found.append(Choice("prompts.column", column, "the column of the file that holds prompts"))
    is_text = (
        row is not None
        and column is not None
        and isinstance(row[column], str)
        and not row[column].lstrip().startswith("[")
    )
    if has_template and is_text:
        found.append(
            Choice(
                "prompts.as_chat", True, "the model has a chat template, the prompts are texts: each is a user's turn"
            )
        )
    elif row is None and has_template:
        found.append(
            Choice("prompts.as_chat", False, "true where prompts are texts: each then is a user's turn of a chat")
        )
    if context is None or context > 2 * CONTEXT_OF_PROMPTS:
        found.append(Choice("prompts.over_long", "drop", "longer ones are left out, and counted"))
        longest = "does not tell its context" if context is None else f"could read {context:,}"
        found.append(
            Choice(
                "prompts.max_len", CONTEXT_OF_PROMPTS, f"tokens; the model {longest}: long prompts cost time and memory"
            )
        )
    return found


def _with_batch(choices: list[Choice], count: int) -> list[Choice]:
    """With the responses of an iteration: no more than there are prompts."""
    wanted = 64 if count <= ALL_WEIGHTS_UP_TO or resolve_device("auto").type == "cuda" else 32
    told = "responses an iteration: their mean can be trusted, and it takes a minute or less"
    if choices[0].value != PLACEHOLDER:
        there = len(load_prompt_set(build_config({**_tree(choices), **NO_REWARD}).prompts).entries)
        if there < wanted:
            wanted = there - there % MINIBATCHES if there >= MINIBATCHES else max(1, there)
            told = f"there are {there} prompts, and {MINIBATCHES if there >= MINIBATCHES else 1} optimiser steps"
    return [*choices, Choice("prompts.batch_size", wanted, told)]


def _of_policy(model: str, count: int, notes: tuple[str, ...]) -> list[Choice]:
    free = free_bytes()
    whole = count * (TRAINED_BYTES + 4)
    fits = whole <= SHARE_OF_MEMORY * free
    found = [Choice("policy.model", model, "; ".join(["as given", *notes]))]
    if count > ALL_WEIGHTS_UP_TO or not fits:
        told = f"training all weights would take {whole / 1e9:,.1f} GB of {free / 1e9:,.1f} GB that are free"
        found += [
            Choice("policy.lora.rank", 16, f"an adapter: {told}" + (", and a step longer" if fits else "")),
            Choice(
                "policy.critic.kind",
                "shared",
                "a value head on the policy's trunk: a critic of its own would double memory and time",
            ),
        ]
    return found


def _of_reward(reward: str | None) -> list[Choice]:
    if reward is None:
        told = "to be replaced: {kind: model, model: FOLDER}, a function of yours, or a service"
    elif _reward(reward)["kind"] == "function":
        told = "a ready-made function"
    else:
        told = "as given"
    return [Choice("reward.components", [_reward(reward)], told)]


def _of_training(count: int, context: int | None, batch: int) -> list[Choice]:
    device = resolve_device("auto").type
    response = min(256 if device == "cuda" else 48, max(8, (context or 1024) // 4))
    whole, adapter = next((whole, adapter) for limit, whole, adapter in RATES if count <= limit)
    has_adapter = count > ALL_WEIGHTS_UP_TO or count * (TRAINED_BYTES + 4) > SHARE_OF_MEMORY * free_bytes()
    rate = adapter if has_adapter else whole
    return [
        Choice("generation.max_new_tokens", response, f"short on purpose, on a {device} device: time grows with it"),
        Choice("kl.controller", "log_pi", "β follows the KL, so that the target is held"),
        Choice("kl.coef", 0.05, "where β begins"),
        Choice("kl.target", 5.0, "nats a response: responses have clearly changed, and still read like the model's"),
        Choice("shaping.gae_lambda", 0.95, "a young critic is believed little"),
        Choice(
            "ppo.learning_rate", rate,
            f"for {'an adapter' if has_adapter else 'all weights'} of {count / 1e6:,.0f} M parameters; halve it if "
            "the clip fraction stays above 0.2",
        ),
        Choice("ppo.num_minibatches", 1 if batch % MINIBATCHES else MINIBATCHES, "optimiser steps an iteration"),
        Choice("num_iterations", 40, "look at the curve before you go on: `rlhf resume RUN --iterations 80`"),
    ]  # fmt: skip


def _reward(reward: str | None) -> dict[str, Any]:
    if reward is None:
        return {"kind": "function", "function": "sentiment"}
    if reward in READY_MADE:
        return {"kind": "function", "function": reward}
    return {"kind": "model", "model": reward}


def _first_row(prompts: str | None) -> dict[str, Any] | None:
    """The first row of a JSONL file; None for anything else."""
    if prompts is None or not prompts.endswith((".jsonl", ".ndjson")) or not Path(prompts).is_file():
        return None
    with Path(prompts).open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None  # the pre-flight says where
    return row if isinstance(row, dict) else None


def _tree(choices: list[Choice]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for choice in choices:
        *sections, name = choice.field.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = choice.value
    return tree


def _number(value: float) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}".replace("e-0", "e-")
