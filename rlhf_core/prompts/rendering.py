"""From a prompt to the text the policy reads."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.entries import PromptEntry
from rlhf_core.prompts.render_process import WITHIN, TemplateLimitError, renderer

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

    Args: as :func:`render_chats`, of one.
    Returns: the text; a template writes its special tokens itself, so tokenize with ``add_special_tokens=False``.
    Raises:
        UserError: the template takes too long, or too much memory.
        Exception: whatever the template raises.
    """
    (found,) = render_chats(
        tokenizer,
        [messages],
        add_generation_prompt=add_generation_prompt,
        template=template,
        options=options,
        date=date,
    )
    if isinstance(found, Exception):
        raise found
    return found


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> list[str | Exception]:
    """Render many chats.

    Args:
        tokenizer: of the model that reads the texts.
        chats: of {role, content}.
        add_generation_prompt: open the assistant's answer at the end.
        template: Jinja text to use instead of the tokenizer's own.
        options: further variables of the template, such as ``{"enable_thinking": False}``.
        date: YYYY-MM-DD that a template's clock (``strftime_now``) shows; None: the machine's own clock.
    Returns: the text of each, or what the template says against it.
    Raises:
        UserError: the template takes too long, or too much memory.
        ValueError: there is no template.
    """
    from transformers import PreTrainedTokenizerBase

    if not chats:
        return []
    variables: dict[str, Any] = dict(options or {})
    own = tokenizer.get_chat_template(template)
    if date is not None and "strftime_now" in own:
        own, variables["clock_of_run"] = _with_clock(own, date)
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return [_by_library(tokenizer, chat, own, variables, opened=add_generation_prompt) for chat in chats]
    try:
        return list(
            renderer.render(
                own,
                [[{key: value for key, value in m.items() if value is not None} for m in chat] for chat in chats],
                add_generation_prompt=add_generation_prompt,
                variables={**cast("dict[str, Any]", tokenizer.special_tokens_map), **variables},
            )
        )
    except TemplateLimitError:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} does not render a conversation {WITHIN}; take the "
            "template of a model you trust"
        ) from None


def _by_library(
    tokenizer: PreTrainedTokenizerBase,
    chat: Sequence[Message],
    template: str,
    variables: Mapping[str, Any],
    *,
    opened: bool,
) -> str | Exception:
    """By a tokenizer whose class renders chats itself, as Mistral's does: code of a library, not of a folder."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in chat],
            tokenize=False,
            add_generation_prompt=opened,
            chat_template=template,
            **variables,
        )
        return cast("str", text)
    except Exception as error:  # whatever it says of this chat
        return error


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
    (found,) = render_prompts([entry], tokenizer, options=options, date=date)
    if isinstance(found, UserError):
        raise found
    return found


def render_prompts(
    entries: Sequence[PromptEntry],
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> list[str | UserError]:
    """The texts of many prompts, as :func:`render_prompt` gives them, or what is wrong with each.

    Raises: UserError: a chat, and the tokenizer has no chat template, or one without an end.
    """
    chats = [entry for entry in entries if not isinstance(entry, str)]
    if chats and not tokenizer.chat_template:
        raise UserError(no_template(tokenizer))
    rendered: Iterator[str | Exception] = iter(())
    if chats:
        try:
            rendered = iter(render_chats(tokenizer, chats, add_generation_prompt=True, options=options, date=date))
        except ValueError as error:  # several templates by name, and none of them the default
            rendered = iter([error] * len(chats))
    found: list[str | UserError] = []
    for entry in entries:
        text = entry if isinstance(entry, str) else next(rendered)
        found.append(_refused(tokenizer, entry, text) if isinstance(text, Exception) else text)
    return found


def _refused(tokenizer: PreTrainedTokenizerBase, entry: PromptEntry, error: Exception) -> UserError:
    roles = ", ".join(message["role"] for message in entry if not isinstance(message, str))
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"prompts.column holds a chat of the roles {roles}, which the chat template of {_named(tokenizer)} "
        f"refuses: {reason}"
    )
