"""A config whose models and prompts lie elsewhere: which fields name a place, and the same run with other places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.places import model_places, put_place
from rlhf_core.contracts.reward_config import RAW, ModelReward
from rlhf_core.models.hub import files_of, folder_of
from rlhf_core.models.reward_text import chat_template_text
from rlhf_core.preflight import Plan, load_plan
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.replay.bundles import PROMPTS, BundleRecord

Item = TypeVar("Item")


def template_texts(config: RunConfig) -> dict[str, str]:
    """Field -> text of every chat template that a config names by its file. Raises UserError if it is gone."""
    return {
        field: chat_template_text(template, field=field)
        for field, template in _templates(config).items()
        if _is_file(template)
    }


def model_files(place: str, field: str) -> dict[str, Path]:
    """Name -> file of everything that libraries read of a model: of its folder, or of the hub's cache.

    Raises: UserError naming ``field`` if it is not here.
    """
    folder = folder_of(place, field, with_weights=True, offline=True)
    return {str(file.relative_to(folder)): file for file in files_of(folder)}


def prompt_lines(prompt_set: PromptSet, rows: Sequence[int], config: RunConfig) -> bytes:
    """Some rows of a prompt source as JSONL: the prompt under :func:`prompt_column`, then ``prompts.columns``."""
    column = prompt_column(config)
    lines = [canonical_json({column: prompt_set.entries[row], **prompt_set.columns[row]}) for row in rows]
    return b"".join(line + b"\n" for line in lines)


def prompt_column(config: RunConfig) -> str:
    """A name for the prompts' column that none of ``prompts.columns`` has."""
    name = "prompt"
    while name in config.prompts.columns:
        name = f"_{name}"
    return name


def relocated(config: RunConfig, record: BundleRecord, folder: Path, *, own: Sequence[str] = ()) -> RunConfig:
    """The config of an unpacked bundle: every place is in its folder, so that nothing else of this machine is read.

    Args:
        config: as the bundle's run.json has it, or with changes.
        record: where everything is.
        folder: that it was unpacked into.
        own: fields that whoever replays has set himself.
    Raises: IntegrityError if the config names what the bundle does not hold.
    """
    tree: dict[str, Any] = config.model_dump() | {"device": "auto"}
    if not record.with_models:
        return build_config(tree)
    for field in model_places(config):
        if field in own:
            continue
        if (place := record.models.get(field)) is None or not (folder / place).is_dir():
            raise IntegrityError(f"the bundle's config names {field}, and the bundle does not hold it")
        put_place(tree, field, str(folder / place))
    for field, template in _templates(config).items():
        if _is_file(template) and field not in own:
            if _is_file(record.templates.get(field, "")):
                raise IntegrityError(f"the bundle's config names {field}, and the bundle does not hold it")
            put_place(tree, field, record.templates[field])
    tree["prompts"] |= {
        "source": str(folder / PROMPTS),
        "column": prompt_column(config),
        "from_preferences": False,
        "subset": None,
        "split": "train",
    }
    return build_config(tree)


def bundle_plan(config: RunConfig, record: BundleRecord) -> Plan:
    """The plan of a relocated config: its prompts stand in the rows that they had in the whole source.

    Raises: UserError with every problem of its models; IntegrityError if its prompts are not those it lists.
    """
    plan = load_plan(config)
    some = plan.prompt_set
    if len(some.entries) != len(record.prompt_rows):
        raise IntegrityError(f"the bundle holds {len(some.entries)} prompts and lists {len(record.prompt_rows)}")
    entries = _SomeRows(dict(zip(record.prompt_rows, some.entries, strict=True)), record.num_prompts)
    columns = _SomeRows(dict(zip(record.prompt_rows, some.columns, strict=True)), record.num_prompts)
    return replace(plan, prompt_set=replace(some, entries=entries, columns=columns))


class _SomeRows(Sequence[Item]):
    """A long sequence of which only some items are here."""

    def __init__(self, items: Mapping[int, Item], length: int) -> None:
        self.items, self.length = items, length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if index not in self.items:
            raise IntegrityError(f"prompt {index} of the source is not in the bundle, and the iteration draws it")
        return self.items[index]


class ReadRows(Sequence[Item]):
    """A sequence that remembers which of its items were read, in ``read``."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.read: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        rows = range(*index.indices(len(self))) if isinstance(index, slice) else [index]
        self.read |= dict.fromkeys(rows)
        return self.items[index]


def _templates(config: RunConfig) -> dict[str, str]:
    own = {"policy.chat_template": config.policy.chat_template} if config.policy.chat_template else {}
    return own | {
        f"reward.components.{index}.chat_template": component.chat_template
        for index, component in enumerate(config.reward.components)
        if isinstance(component, ModelReward) and component.chat_template
    }


def _is_file(template: str) -> bool:
    return template != RAW and "{{" not in template and "{%" not in template
