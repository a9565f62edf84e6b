"""Sentences about what is wrong in a config: field, value, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.reward_config import FunctionReward, RewardConfig
from rlhf_core.contracts.secrets import without_secrets

MAX_NAMED: Final = 3
"""Keys that a hint names."""
ELSEWHERE: Final[Mapping[str, str]] = {
    "actor_learning_rate": "ppo.learning_rate",
    "apply_chat_template": "prompts.as_chat",
    "apply_chat_template_kwargs": "prompts.template_options",
    "beta": "kl.coef",
    "chat_template_kwargs": "prompts.template_options",
    "cliprange": "ppo.clip_range",
    "cliprange_value": "ppo.value_clip_range",
    "data": "prompts.source",
    "dataset": "prompts.source",
    "dataset_name": "prompts.source",
    "epochs": "ppo.num_ppo_epochs",
    "init_kl_coef": "kl.coef",
    "kl_coef": "kl.coef",
    "kl_target": "kl.target",
    "lam": "shaping.gae_lambda",
    "lora_alpha": "policy.lora.alpha",
    "lora_r": "policy.lora.rank",
    "lora_rank": "policy.lora.rank",
    "lr": "ppo.learning_rate",
    "lr_scheduler_type": "ppo.lr_schedule",
    "max_length": "generation.max_new_tokens",
    "mini_batch_size": "ppo.num_minibatches",
    "missing_eos_penalty": "shaping.missing_eos_penalty",
    "model_name_or_path": "policy.model",
    "num_epochs": "ppo.num_ppo_epochs",
    "num_generations": "prompts.samples_per_prompt",
    "num_mini_batches": "ppo.num_minibatches",
    "num_steps": "num_iterations",
    "num_train_epochs": "ppo.num_ppo_epochs",
    "output_dir": "--run-dir of rlhf train",
    "per_device_train_batch_size": "ppo.micro_batch_size",
    "prompt_column": "prompts.column",
    "r": "policy.lora.rank",
    "ref_model": "reference.model",
    "response_length": "generation.max_new_tokens",
    "reward_funcs": "reward.components.N.function",
    "reward_model": "reward.components.N.model",
    "reward_model_path": "reward.components.N.model",
    "run_dir": "--run-dir of rlhf train",
    "sft_model_path": "policy.model",
    "steps": "num_iterations",
    "stop_token": "generation.stop",
    "system_prompt": "prompts.system",
    "total_episodes": "num_iterations",
    "vf_clip": "ppo.value_clip_range",
}
"""Names that other trainers give to a knob -> the key here."""
_VALUES: Final[Mapping[str, str]] = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "gpu": "cuda",
    "grpo": "group",
    "ppo": "gae",
    "reinforce": "reinforce++",
    "truncate": "truncate_left",
}
"""Names of a choice that are usual elsewhere -> the choice here."""
_MAIN: Final[Mapping[str, str]] = {
    "kl": "coef",
    "policy": "model",
    "policy.lora": "rank",
    "prompts": "source",
    "reference": "model",
    "tracking": "enabled",
}
"""Section -> the key that is meant where the section itself is given a value."""


def sentences(error: ValidationError) -> list[str]:
    """One sentence or several for each problem of a config."""
    return [sentence for detail in error.errors(include_url=False) for sentence in _sentence(detail)]


def _sentence(detail: ErrorDetails) -> list[str]:
    where = ".".join(str(part) for i, part in enumerate(detail["loc"]) if not _is_kind(detail["loc"], i))
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":  # our own validators already name field, value and remedy
        return [
            s if "." in s.split(" ")[0] else f"{where}: {s}"
            for s in str(detail.get("ctx", {}).get("error", detail["msg"])).split("\n")
        ]
    if kind == "extra_forbidden":
        return [_unknown_key(where, detail["loc"])]
    if kind == "union_tag_invalid":
        given = "null" if value["kind"] is None else repr(value["kind"])
        close = difflib.get_close_matches(str(value["kind"]), RewardConfig.KINDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return [f"{where}.kind is {given}, which is no kind of component; known are {_and(RewardConfig.KINDS)}{hint}"]
    if kind == "string_pattern_mismatch" and where.endswith("token_env"):
        return [
            f"{where} is not the name of an environment variable (and is not shown: it may be the token itself); "
            "put the token into a variable, and name that here"
        ]
    shown = "missing" if kind == "missing" else "null" if value is None else without_secrets(repr(value))
    if kind in ("model_type", "model_attributes_type"):
        return [f"{where} is {shown}: it is a section, so a mapping of keys is needed{_as_section(where, value)}"]
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return [f"{where} is {shown}: {message}{_remedy(detail, where)}"]


def _unknown_key(where: str, loc: Sequence[int | str]) -> str:
    name, known = str(loc[-1]), known_keys(loc[:-1])
    if other := _other_kind(loc, name):
        *path, _ = where.split(".")
        component = ".".join(path)
        return f"{where} is a key of the kind {other}, and {component}.kind is {loc[3]}; set {component}.kind: {other}"
    if "." in name and name in _all_keys():
        section, _, inner = name.partition(".")
        return f"{where} is one key with a dot in it; write {inner} as a key of the section {section}"
    return f"{where} is not a known key; {_hint(where, name, known)}"


def _hint(where: str, name: str, known: Sequence[str]) -> str:
    meant = _meant(where.rpartition(".")[0], name.lower().replace("-", "_"), known)
    return f"did you mean {_or(meant[:MAX_NAMED])}?" if meant else f"known keys: {', '.join(known)}"


def _meant(section: str, name: str, known: Sequence[str]) -> Sequence[str]:
    """Keys that an unknown one may stand for, the likeliest kind of mistake first; none if there is no such key."""
    if name in known:
        return [name]
    every = _all_keys()
    if anywhere := [key for key in every if key.rpartition(".")[2] == name]:
        return [key for key in anywhere if section and key.startswith(f"{section}.")] or anywhere
    there = ELSEWHERE.get(name, "")
    if there and there.startswith(section):
        return [there.removeprefix(f"{section}.")]
    if close := difflib.get_close_matches(name, known, n=1):
        return close
    leaves = sorted({key.rpartition(".")[2] for key in every})
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.8)
    return [there] if there else [key for key in every if key.rpartition(".")[2] in near]


def _other_kind(loc: Sequence[int | str], name: str) -> str | None:
    """The kind of component that has this key, where the component's own kind has not."""
    if not (len(loc) > 4 and _is_kind(loc, 3)):
        return None
    kinds = [kind for kind, model in RewardConfig.KINDS.items() if name in model.model_fields]
    return kinds[0] if len(kinds) == 1 else None


def _as_section(where: str, value: object) -> str:
    """How a section is written that was given something else."""
    if value is None:
        return "; indent its keys below it, or leave it out"
    if where.startswith("reward.components.") and isinstance(value, str):
        return f": {{{_component(value)}}}"
    if where == "reward" and isinstance(value, str):
        return f": {{components: [{{{_component(value)}}}]}}"
    if where == "reward":
        return "; its list is reward.components"
    if where in _MAIN and isinstance(value, str | int):
        shown = str(value).lower() if isinstance(value, bool) else without_secrets(str(value))
        return f": {{{_MAIN[where]}: {shown}}}"
    return ""


def _component(name: str) -> str:
    ready_made = (FunctionReward.model_fields["function"].description or "").replace(",", "").split()
    kind = "http" if "://" in name else "function" if ":" in name or name in ready_made else "model"
    field = {"http": "url"}.get(kind, kind)
    return f"kind: {kind}, {field}: {without_secrets(name)}"


def _remedy(detail: ErrorDetails, where: str) -> str:
    """What would be right instead of a value of another type, or of none of the choices."""
    value = detail["input"]
    if detail["type"] == "literal_error":
        return _choice(where, value)
    if detail["type"] == "list_type":
        return _as_list(where, value)
    match detail["type"], value:
        case "bool_type", str() | int():
            remedy = "write true or false"
        case "float_type" | "int_type", str() if _is_number(value):
            remedy = f"write it without quotes: {value.strip()}"
        case "int_type", float() if value.is_integer():
            remedy = f"write {int(value)}"
        case "string_type", int() | float() if not isinstance(value, bool):
            remedy = f"write it in quotes: '{value}'"
        case _:
            return ""
    return f"; {remedy}"


def _as_list(where: str, value: object) -> str:
    """How a list is written that was given as one item."""
    if isinstance(value, dict):
        return "; begin each item with `- `, also where there is one alone"
    if isinstance(value, str) and where == "reward.components":
        return f"; write [{{{_component(value)}}}]"
    return f"; write [{without_secrets(repr(value))}]" if isinstance(value, str | int | float) else ""


def _choice(where: str, value: object) -> str:
    model, name = _model_of(where.split(".")[:-1]), where.rpartition(".")[2]
    field = model.model_fields.get(name) if model is not None else None
    choices = [c for c in _literals(field.annotation if field is not None else None) if isinstance(c, str)]
    text = str(value).lower()
    if where == "device" and text.startswith("cuda:"):
        return f"; write cuda, and choose the card by CUDA_VISIBLE_DEVICES={text.removeprefix('cuda:')}"
    usual = _VALUES.get(text)
    close = [usual] if usual in choices else difflib.get_close_matches(text, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _literals(annotation: Any) -> list[Any]:
    """Choices of a Literal, also of one that may be null."""
    found: list[Any] = []
    for argument in get_args(annotation):
        found += _literals(argument) or ([argument] if isinstance(argument, str) else [])
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_kind(loc: Sequence[int | str], index: int) -> bool:
    """Whether pydantic has put the component's kind there: ("reward", "components", 0, "http", "url")."""
    return index == 3 and tuple(loc[:2]) == ("reward", "components")


def known_keys(loc: Sequence[int | str]) -> list[str]:
    """Keys of the section at a place that pydantic names."""
    kind = loc[3] if len(loc) > 3 and _is_kind(loc, 3) else None
    parts = [str(part) for i, part in enumerate(loc) if not _is_kind(loc, i)]
    model = RewardConfig.KINDS[str(kind)] if kind is not None else _model_of(parts)
    return list(model.model_fields) if model is not None else []


def _model_of(parts: Sequence[str]) -> type[BaseModel] | None:
    """The section at a dotted place; of a component, whose kind is not part of the place, the first that fits."""
    model: type[BaseModel] = RunConfig
    for part in parts:
        field = model.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
        elif part.isdecimal():
            return next(iter(RewardConfig.KINDS.values()))
        elif model is not RewardConfig:
            return None
    return model


def _all_keys() -> list[str]:
    """Every key of a config; those of components have N for their number."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(field.annotation, f"{prefix}{name}.")
            elif (model, name) == (RewardConfig, "components"):
                for kind in RewardConfig.KINDS.values():
                    yield from walk(kind, f"{prefix}{name}.N.")
            else:
                yield f"{prefix}{name}"

    return list(dict.fromkeys(walk(RunConfig, "")))


def _and(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}"


def _or(names: Sequence[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} or {last}" if some else last
