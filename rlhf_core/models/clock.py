"""Chat templates that read the clock (``strftime_now``): which models have one, and what day their clock shows.

Llama 3.2, Granite and gpt-oss write today's date into every prompt. A run takes one day for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.hub import folder_of
from rlhf_core.models.reward_text import chat_template_text
from rlhf_core.models.untrusted import MAX_CONFIG_BYTES

CLOCK: Final = "strftime_now"
_TEMPLATE_FILES: Final = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


def clock_readers(config: RunConfig) -> list[str]:
    """Fields of a config whose chat template reads the clock: ``["policy.model"]``.

    A model that is not there is left out: loading it tells.
    """
    places = {"policy.model": config.policy.model, "policy.adapter": config.policy.adapter}
    found: list[str] = []
    if (template := config.policy.chat_template) is not None:
        places = dict[str, str | None]()
        found = ["policy.chat_template"] if CLOCK in _own_template(template, "policy.chat_template") else []
    for index, component in enumerate(config.reward.components):
        field = f"reward.components.{index}"
        if not isinstance(component, ModelReward):
            continue
        if component.chat_template is None:
            name = "model" if component.tokenizer is None else "tokenizer"
            places[f"{field}.{name}"] = component.tokenizer or component.model
        elif CLOCK in _own_template(component.chat_template, f"{field}.chat_template"):
            found.append(f"{field}.chat_template")
    return sorted([*found, *(field for field, name in places.items() if name and _reads_clock(name, field))])


def clock_day() -> str:
    """Today as chat templates see it, as YYYY-MM-DD: asked of the clock that transformers gives them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [[{"role": "user", "content": ""}]], chat_template="{{ " + CLOCK + "('%Y-%m-%d') }}"
    )
    return cast("str", rendered[0][0])


def _reads_clock(name: str, field: str) -> bool:
    try:
        folder = folder_of(name, field)
    except UserError:
        return False
    return any(CLOCK.encode() in _bytes(folder / file) for file in _TEMPLATE_FILES)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes() if file.is_file() and file.stat().st_size <= MAX_CONFIG_BYTES else b""
    except OSError:
        return b""


def _own_template(template: str, field: str) -> str:
    try:
        return chat_template_text(template, field=field)
    except UserError:
        return ""
