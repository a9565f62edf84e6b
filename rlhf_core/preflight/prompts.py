"""Checks of the prompts as the policy will read them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.templates import check_template
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.preflight.assembled import MAX_ROWS, Findings, Progress, end_of, read_prompts, render_both
from rlhf_core.preflight.batch_sizes import batch_sizes_that_work
from rlhf_core.prompts.assembly import PromptAssembler
from rlhf_core.prompts.rendering import no_template
from rlhf_core.prompts.sources import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER: Final = "an answer 7f3a91"
"""Stands for the policy's answer in a rendered chat."""
_GIVEN: Final = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"})


def check_prompts(
    config: RunConfig,
    prompt_set: PromptSet,
    tokenizer: PolicyTokenizer,
    longest: int,
    notes: list[str],
    progress: Progress | None = None,
) -> None:
    """Render and tokenize every prompt; refuse what the policy cannot answer, and note what may surprise.

    Args:
        config: of the run.
        prompt_set: all prompts.
        tokenizer: the policy's.
        longest: tokens that fit.
        notes: grows.
        progress: told how many prompts were read.
    Raises: UserError with every problem found.
    """
    entries, wanted = prompt_set.entries, config.prompts.num_prompts
    problems = list(_knob_problems(config, prompt_set, tokenizer))
    if len(entries) < wanted:
        problems.append(
            f"prompts.source {config.prompts.source!r} has {len(entries)} prompts, but an iteration takes {wanted} "
            f"different ones; {batch_sizes_that_work(config, len(entries))}"
        )
    if problems:
        raise UserError(*problems)
    assembler = PromptAssembler(tokenizer.tokenizer, config.prompts, tokenizer.eos_ids)
    if (chat := next((entry for entry in entries if assembler.is_chat(entry)), None)) is not None:
        messages = cast("Any", assembler.entry(chat))
        check_template(tokenizer.tokenizer.chat_template, messages, f"policy.model {config.policy.model!r}")
    found = read_prompts(prompt_set, tokenizer, config.prompts, longest, progress)
    problems = [*_row_problems(config, found, len(entries))]
    if not found.refused:
        problems += _opening_problems(config, prompt_set, assembler, found, notes)
    notes += _notes(config, found, assembler, len(entries))
    if problems:
        raise UserError(*problems)


def _knob_problems(config: RunConfig, prompt_set: PromptSet, tokenizer: PolicyTokenizer) -> Iterator[str]:
    """Knobs of the chat template that nothing would read."""
    prompts, own = config.prompts, tokenizer.tokenizer
    chat = next((entry for entry in prompt_set.entries if not isinstance(entry, str)), None)
    if chat is None and not prompts.as_chat:
        for knob in ("system", "template_options"):
            if getattr(prompts, knob):
                yield (
                    f"prompts.{knob} is set, but prompts.column {prompts.column!r} holds plain texts, which no chat "
                    f"template reads; set prompts.as_chat true, or leave prompts.{knob} out"
                )
        return
    if not own.chat_template:
        yield (
            no_template(own)
            if chat is not None
            else f"prompts.as_chat is true, but the tokenizer of policy.model {config.policy.model!r} has no chat "
            "template; set policy.chat_template, or prompts.as_chat false"
        )
        return
    named = f"policy.model {config.policy.model!r}"
    yield from unread_options(prompts.template_options, "prompts.template_options", own, None, named)


def unread_options(
    options: Iterable[str], field: str, tokenizer: PreTrainedTokenizerBase, template: str | None, named: str
) -> Iterator[str]:
    """Options that a chat template does not read, one sentence each.

    Args:
        options: their names.
        field: where they are set.
        tokenizer: of the model.
        template: Jinja text used instead of the tokenizer's own.
        named: the model.
    """
    try:
        read = _variables(tokenizer.get_chat_template(template))
    except ValueError:  # several templates and no default: told where a chat is rendered
        return
    for name in options:
        if name not in read:
            known = sorted(read - _GIVEN - tokenizer.special_tokens_map.keys())
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it reads {', '.join(known) or 'no option'}"
            yield f"{field} has {name!r}, which the chat template of {named} never reads; {hint}"


def _variables(template: str) -> frozenset[str]:
    """The variables that a template reads from outside."""
    from jinja2 import Environment, TemplateError, meta

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        found = meta.find_undeclared_variables(tree)
    except TemplateError:  # told where it is rendered
        return frozenset(re.findall(r"\w+", template))
    return frozenset(found - {"raise_exception", "strftime_now", "namespace", "range", "dict", "clock_of_run"})


def _row_problems(config: RunConfig, found: Findings, total: int) -> Iterator[str]:
    """Prompts that the policy cannot answer."""
    source, wanted = f"prompts.source {config.prompts.source!r}", config.prompts.num_prompts
    for reason, tally in found.refused.items():
        yield f"{source}, {tally.named}: {reason}"
    if found.empty:
        yield (
            f"{source}, {found.empty.named}: the tokenizer of policy.model leaves nothing of it for the policy to "
            f"read ({found.empty.first}); take it out, or take a policy whose tokenizer has its characters"
        )
    if found.twice_bos:
        yield (
            f"{source}, {found.twice_bos.named}: begins with the BOS token twice ({found.twice_bos.first}); write it "
            "once: in the chat template, or in the text of the prompt"
        )
    over_long, usable = found.over_long, total - len(found.over_long)
    if over_long and config.prompts.over_long == "refuse":
        yield (
            f"{source} has {len(over_long)} prompts longer than the {found.longest} tokens that fit (prompt "
            f"{over_long.rows[0]} (from 0) has {over_long.example.removeprefix('of ')}); set prompts.over_long to "
            "truncate_left or drop"
        )
    if over_long and config.prompts.over_long == "drop" and usable < wanted:
        remedy = batch_sizes_that_work(config, usable) if usable else "bring shorter prompts"
        yield (
            f"{source} has too few usable prompts: an iteration needs {wanted} different ones, it has {total} of which "
            f"{len(over_long)} are longer than the {found.longest} tokens that fit and dropped; set "
            f"prompts.over_long to truncate_left, or {remedy}"
        )
    if found.not_truncatable:
        yield (
            f"{source}, {found.not_truncatable.named}: the chat template's own marks leave no room in the "
            f"{found.longest} tokens that fit; raise prompts.max_len, or set prompts.over_long to drop"
        )


def _opening_problems(
    config: RunConfig, prompt_set: PromptSet, assembler: PromptAssembler, found: Findings, notes: list[str]
) -> list[str]:
    """Chats at whose end the policy would not begin an answer, judged by how the template writes an answer itself."""
    ends = [row for row in found.ends_with_eos.rows if assembler.is_chat(prompt_set.entries[row])]
    for row in dict.fromkeys([*list(found.forms.values())[:MAX_ROWS], *ends[:1]]):
        entry = prompt_set.entries[row]
        opened, closed, answered = render_both(assembler, entry, ANSWER)
        follows = answered is not None and answered.startswith(opened) and ANSWER in answered
        between = answered[len(opened) : answered.find(ANSWER, len(opened))] if answered and follows else ""
        named, shown = f"the chat template of policy.model {config.policy.model!r}", end_of(opened)
        if opened == closed and between.strip():
            return [
                f"{named} does not open the assistant's turn: with and without add_generation_prompt a prompt ends "
                f"{shown} (prompt {row}), and {end_of(between)} is missing before the answer, so that the policy "
                "would continue the user's turn; set policy.chat_template to one that reads add_generation_prompt"
            ]
        if row in ends and not (follows and not between.strip()):
            return [
                f"{named} ends prompts with an EOS token ({shown}, prompt {row}), behind which a policy begins another "
                "text; set policy.chat_template to one that ends with the opening of the assistant's turn"
            ]
        if opened == closed and not follows:
            notes.append(
                f"{named} writes the same text with and without add_generation_prompt; a prompt ends {shown} "
                f"(prompt {row}): see whether an answer begins there"
            )
            break
    return []


def _notes(config: RunConfig, found: Findings, assembler: PromptAssembler, total: int) -> Iterator[str]:
    """What was chosen for the user, and what may surprise in prompts that can be trained on."""
    prompts, own = config.prompts, assembler.tokenizer
    if found.over_long and prompts.over_long != "refuse":
        done = "dropped" if prompts.over_long == "drop" else "cut at their beginning"
        yield f"{len(found.over_long)} of {total} prompts are longer than {found.longest} tokens and are {done}"
    if found.own_bos:
        yield (
            f"{len(found.own_bos)} of {total} prompts begin with {assembler.added_text!r} already, which the tokenizer "
            f"would add: it is not added twice ({found.own_bos.first})"
        )
    if assembler.drops_eos and found.num_texts:
        yield (
            f"the tokenizer of policy.model appends {own.decode(assembler.added_behind)!r} to every text: prompts are "
            "read without it, since the policy continues them"
        )
    if found.without_bos:
        yield (
            f"{len(found.without_bos)} of {total} prompts begin without {own.bos_token!r}, which the tokenizer adds to "
            f"texts: the chat template does not write it ({found.without_bos.first})"
        )
    if found.ends_with_eos:
        yield f"{len(found.ends_with_eos)} of {total} prompts end with an EOS token ({found.ends_with_eos.first})"
    if found.plain and own.chat_template:
        yield (
            f"{len(found.plain)} of {total} prompts are plain texts, and policy.model has a chat template: they are "
            f"read as they are; to read each as a user's message, set prompts.as_chat true ({found.plain.first})"
        )
    if found.marks_in_text:
        yield (
            f"{len(found.marks_in_text)} of {total} prompts have special tokens in their text, which the policy reads "
            f"as such ({found.marks_in_text.first})"
        )
    if found.marks_in_chat:
        yield (
            f"{len(found.marks_in_chat)} of {total} prompts have special tokens inside a message, which the policy "
            f"reads as marks of the chat template ({found.marks_in_chat.first})"
        )
    if found.unknown:
        yield (
            f"{len(found.unknown)} of {total} prompts have characters that the policy reads as {own.unk_token!r} "
            f"({found.unknown.first})"
        )
    if found.lost:
        yield (
            f"{len(found.lost)} of {total} prompts have characters that the tokenizer of policy.model leaves out "
            f"({found.lost.first})"
        )
