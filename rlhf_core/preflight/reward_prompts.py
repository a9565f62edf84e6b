"""Checks of reward components against the prompts: what each of them will read, before anything is scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config import PromptsConfig, RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import RAW, ComponentReward, FunctionReward, ModelReward
from rlhf_core.models.reward_text import PROBE, RewardReader, in_a_line
from rlhf_core.models.templates import check_template
from rlhf_core.models.texts import special_ids
from rlhf_core.models.tokenizers import PolicyTokenizer, vocabulary_digest
from rlhf_core.preflight.prompts import unread_options
from rlhf_core.prompts.assembly import PromptAssembler, read_as
from rlhf_core.prompts.entries import PromptEntry, shown
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.rewards.ready_made import READY_MADE, THINK_THEN_ANSWER, opened_by_prompt
from rlhf_core.rewards.scoring import Failure

MARK: Final = re.compile("think|thought|reason|answer|solution|scratchpad|reflect|boxed|tool_call", re.IGNORECASE)
"""In the name of a special token that is likely to mark the parts of a response."""
_TEXT_PARAMS: Final = {"regex": "pattern", "format": "pattern", "exact_match": "extract"}
"""Ready-made functions that look for marks -> the param that names them."""
_PROBE_THINKING: Final = "<think>because</think>answer"
_SHOWN_TOKENS: Final = 4


def check_reward_prompts(
    config: RunConfig,
    tokenizer: PolicyTokenizer,
    prompt_set: PromptSet,
    notes: list[str],
    *,
    template_date: str | None = None,
) -> None:
    """Check what each component will read of these prompts; ``notes`` may grow.

    Args:
        config: of the run.
        tokenizer: the policy's.
        prompt_set: its prompts.
        notes: of the plan.
        template_date: of the run, for templates that show a date.
    Raises: UserError with the problems of all components.
    """
    entries = [read_as(entry, config.prompts) for entry in prompt_set.entries]
    problems: list[str] = []
    for index, component in enumerate(config.reward.components):
        field = f"reward.components.{index}"
        try:
            if isinstance(component, ModelReward):
                reader = RewardReader.load(
                    component,
                    field=field,
                    policy_vocabulary=vocabulary_digest(tokenizer.tokenizer),
                    template_date=template_date,
                )
                if _sources(reader, entries) != {"tokens"}:
                    note_special_tokens(component, field, tokenizer, notes)
                check_reader(reader, component, field, entries, notes)
                continue
            note_special_tokens(component, field, tokenizer, notes)
            if isinstance(component, FunctionReward):
                note_opened(component, field, config.prompts, prompt_set.entries, tokenizer, notes)
                check_answers(component, field, prompt_set.columns, notes)
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)


def check_reader(
    reader: RewardReader, component: ModelReward, field: str, entries: Sequence[PromptEntry], notes: list[str]
) -> None:
    """Settle whose chat template is used, say so, and render every prompt with an answer by it.

    Args:
        reader: of the component.
        component: its section.
        field: its place in the config.
        entries: all prompts.
        notes: grow by what the reward model reads.
    Raises: UserError if a chat would be read without a template, or one is refused by it and ``on_error`` is fail.
    """
    named = f"{field}.model {component.model!r}"
    chats = [row for row, entry in enumerate(entries) if not isinstance(entry, str)]
    if chats and reader.policy is not None and not reader.policy.chat_template:
        return  # told of policy.model
    if chats and reader.source(is_chat=True) is None:
        as_read = "the policy's tokens" if reader.shares_vocabulary else "the policy's rendered text"
        raise UserError(
            f"{named} has no chat template of its own, and prompts.column holds chats, whose markup is the policy's; "
            f"set {field}.chat_template to the form that the model was trained on (Jinja, or a file of it), or to "
            f"{RAW}: it then reads {as_read}, markup included"
        )
    if chats:
        notes.append(f"{named} {_reads(reader)}")
    if component.template_options:
        _check_options(reader, component, field, named, entries)
    sources = {is_chat: reader.source(is_chat=is_chat) for is_chat in (True, False)}
    if "own" in _sources(reader, entries):
        check_template(reader.tokenizer.chat_template, PROBE, reader.named)
    refused: list[tuple[int, str]] = []
    rows = [row for row, entry in enumerate(entries) if sources[not isinstance(entry, str)] in ("own", "given")]
    for row, text in zip(rows, reader.all_rendered([_answered(entries[row]) for row in rows]), strict=True):
        if isinstance(text, Exception):
            refused.append((row, in_a_line(text)))
    if refused:
        row, reason = refused[0]
        problem = (
            f"{named}: its chat template refuses {len(refused)} of {len(entries)} prompts "
            f"(prompt {row} (from 0): {reason})"
        )
        if component.on_error == "fail":
            raise UserError(
                f"{problem}; leave them out, set {field}.chat_template to one that takes them, or {field}.on_error to "
                "drop or substitute"
            )
        notes.append(f"{problem}; on_error is {component.on_error}")
    _note_lost_thinking(reader, named, sources, notes)


def _check_options(
    reader: RewardReader, component: ModelReward, field: str, named: str, entries: Sequence[PromptEntry]
) -> None:
    """Refuse options that nothing reads."""
    if not {"own", "given"} & _sources(reader, entries):
        raise UserError(
            f"{field}.template_options is set, but {named} reads these prompts by no chat template; set "
            f"{field}.chat_template, or leave the options out"
        )
    options = f"{field}.template_options"
    if problems := [*unread_options(component.template_options, options, reader.tokenizer, reader.template, named)]:
        raise UserError(*problems)


def _answered(entry: PromptEntry) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": entry}] if isinstance(entry, str) else list(entry)
    return [*messages, PROBE[1]]


def _sources(reader: RewardReader, entries: Sequence[PromptEntry]) -> set[str | None]:
    kinds = {not isinstance(entry, str) for entry in entries}
    return {reader.source(is_chat=is_chat) for is_chat in kinds}


def _reads(reader: RewardReader) -> str:
    """What a reward model reads of chats, as a sentence without its subject."""
    source = reader.source(is_chat=True)
    if source == "given":
        return "reads chats by the chat_template of the config"
    if source == "own":
        why = "its vocabulary is not the policy's"
        if reader.shares_vocabulary:
            why = "template_options are set" if reader.options else "the policy's is another one"
        return f"reads chats by its own chat template ({why})"
    if reader.raw:
        as_read = "the policy's tokens" if source == "tokens" else "the policy's rendered text"
        return f"reads chats as {as_read}, markup included (chat_template: {RAW})"
    return "reads chats as the policy's tokens: vocabulary and chat template are the same"


def _note_lost_thinking(reader: RewardReader, named: str, sources: dict[bool, str | None], notes: list[str]) -> None:
    """Say so where a template leaves out what an answer has thought."""
    if not {"own", "given"} & set(sources.values()) or not (reader.template or reader.has_own_template):
        return
    try:
        text = reader.rendered([PROBE[0], {"role": "assistant", "content": _PROBE_THINKING}])
    except Exception:  # told for the prompts that it refuses
        return
    if "because" not in text:
        notes.append(f"{named}: its chat template leaves out what stands in <think>…</think> of an answer")


def check_answers(component: FunctionReward, field: str, columns: Sequence[Any], notes: list[str]) -> None:
    """Find the answers that ``numeric_match`` and ``exact_match`` cannot compare with.

    Args:
        component: its section.
        field: its place in the config.
        columns: ``prompts.columns`` of every prompt.
        notes: grow by how many there are, where ``on_error`` is not fail.
    Raises: UserError if there are any and ``on_error`` is fail.
    """
    name = component.params.get("column", "answer")
    if component.function not in ("numeric_match", "exact_match") or not columns or name not in columns[0]:
        return
    answers = [cells[name] for cells in columns]
    outcomes = READY_MADE[component.function](responses=[""] * len(answers), column="answer", answer=answers)
    bad = [
        (row, answer)
        for row, (answer, outcome) in enumerate(zip(answers, outcomes, strict=True))
        if outcome is None or isinstance(outcome, Failure)
    ]
    if not bad:
        return
    wanted = "a number, or a text with one" if component.function == "numeric_match" else "a text or a number"
    row, answer = bad[0]
    problem = (
        f"{field} ({component.function}) needs {wanted} in the column {name!r}, where {len(bad)} of {len(columns)} "
        f"prompts have none (prompt {row} (from 0) has {shown(answer)})"
    )
    if component.on_error == "fail":
        raise UserError(f"{problem}; mend the column, or set {field}.on_error to drop or substitute")
    notes.append(f"{problem}; on_error is {component.on_error}")


def note_opened(
    component: FunctionReward,
    field: str,
    prompts: PromptsConfig,
    entries: Sequence[PromptEntry],
    tokenizer: PolicyTokenizer,
    notes: list[str],
) -> None:
    """Say so where the first prompt has opened what ``format`` wants to find in the response; see opened_by_prompt."""
    if component.function != "format" or not entries:
        return
    try:
        text = PromptAssembler(tokenizer.tokenizer, prompts, tokenizer.eos_ids).text(entries[0])
    except UserError:  # told by the check of the prompts
        return
    if note := opened_by_prompt(component, field, text):
        notes.append(note)


def note_special_tokens(component: ComponentReward, field: str, tokenizer: PolicyTokenizer, notes: list[str]) -> None:
    """Say so where a component that reads text does not see the marks that it is likely to look for."""
    if component.keep_special_tokens:
        return
    names = [
        cast("str", tokenizer.tokenizer.convert_ids_to_tokens(token_id))
        for token_id in sorted(special_ids(tokenizer.tokenizer) - tokenizer.eos_ids - {tokenizer.pad_id})
    ]
    hidden = [name for name in names if MARK.search(name)]
    if isinstance(component, FunctionReward) and component.function in READY_MADE:
        param = _TEXT_PARAMS.get(component.function)
        if param is None:
            return
        default = THINK_THEN_ANSWER if component.function == "format" else ""
        pattern = str(component.params.get(param) or default)
        hidden = [name for name in names if name in pattern or re.escape(name) in pattern]
    if hidden:
        more = " …" if len(hidden) > _SHOWN_TOKENS else ""
        notes.append(
            f"{field} reads responses without special tokens, and {', '.join(hidden[:_SHOWN_TOKENS])}{more} "
            f"{'is one' if len(hidden) == 1 else 'are such'} in the tokenizer of policy.model; set "
            f"{field}.keep_special_tokens: true to let it see them"
        )
