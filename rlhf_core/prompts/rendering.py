"""From a prompt to the text the policy reads."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.entries import PromptEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK_CALL: Final = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_CLOCK_MACRO: Final = (
    "{%- macro strftime_now(format) -%}{%- if format not in clock_of_run -%}"
    "{{- raise_exception('the format of strftime_now must stand in its call as text') -}}"
    "{%- endif -%}{{- clock_of_run[format] -}}{%- endmacro -%}"
)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> str:
    """Render a chat, prompt or scored conversation, with a tokenizer's chat template.

    Args:
        tokenizer: of the model that reads the text.
        messages: of {role, content}.
        add_generation_prompt: open the assistant's answer at the end.
        template: Jinja text to use instead of the tokenizer's own.
        options: further variables of the template, such as ``{"enable_thinking": False}``.
        date: YYYY-MM-DD that a template's clock (``strftime_now``) shows; None: the machine's own clock.
    Returns: the text; a template writes its special tokens itself, so tokenize with ``add_special_tokens=False``.
    Raises: whatever the template raises (jinja2's errors, and those of its own expressions).
    """
    variables: dict[str, Any] = dict(options or {})
    own = tokenizer.get_chat_template(template)
    if date is not None and "strftime_now" in own:
        template, variables["clock_of_run"] = _with_clock(own, date)
    text = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=template,
        **variables,
    )
    return cast("str", text)


def _with_clock(template: str, date: str) -> tuple[str, dict[str, str]]:
    """The template with a clock that shows one day, and what the clock shows for each format that the template names.

    transformers passes no callables to a template, so ``strftime_now`` is a macro that reads a table.
    """
    midnight = datetime.datetime.fromisoformat(date)
    shown = {form: midnight.strftime(form) for _, form in _CLOCK_CALL.findall(template)}
    return _CLOCK_MACRO + template, shown


def no_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The problem of chats for a policy without a chat template, in words."""
    return (
        f"prompts.column holds chats, but {_named(tokenizer)} has no chat template; take a policy.model that has "
        "one, set policy.chat_template, or take a prompts.column of plain texts"
    )


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer of policy.model ({tokenizer.name_or_path!r})"


def render_prompt(
    entry: PromptEntry,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> str:
    """The text of a prompt: a text as it is, a chat by the tokenizer's chat template.

    Args:
        entry: text, or messages of {role, content}.
        tokenizer: the policy's; it is asked only for chats.
        options: ``prompts.template_options``.
        date: ``prompts.template_date``.
    Returns: the text, opened for the assistant's answer. A template writes its special tokens itself (BOS,
        role marks), so tokenize a rendered chat with ``add_special_tokens=False``.
    Raises:
        UserError: a chat, and the tokenizer has no chat template or its template refuses the chat.
    """
    if isinstance(entry, str):
        return entry
    if not tokenizer.chat_template:
        raise UserError(no_template(tokenizer))
    try:
        return render_chat(tokenizer, entry, add_generation_prompt=True, options=options, date=date)
    except Exception as error:  # jinja2's, and whatever a template's own expressions raise
        roles = ", ".join(message["role"] for message in entry)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"prompts.column holds a chat of the roles {roles}, which the chat template of {_named(tokenizer)} "
            f"refuses: {reason}"
        ) from error
