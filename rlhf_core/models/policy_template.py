"""The chat template of ``policy.chat_template``, for policies that have none of their own."""

from __future__ import annotations

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.policy_config import PolicyConfig
from rlhf_core.contracts.reward_config import RAW
from rlhf_core.models.reward_text import chat_template_text
from rlhf_core.models.templates import check_template
from rlhf_core.models.tokenizers import PolicyTokenizer

FIELD = "policy.chat_template"
_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "question"},)


def with_policy_template(tokenizer: PolicyTokenizer, config: PolicyConfig) -> PolicyTokenizer:
    """Give the policy's tokenizer the chat template of the config; checkpoints save it with the tokenizer.

    Args:
        tokenizer: the policy's; it is changed.
        config: its section; a null ``chat_template`` leaves the tokenizer as it is.
    Returns: the same tokenizer.
    Raises: UserError: neither Jinja nor a file of it, or a template that is too slow.
    """
    if config.chat_template == RAW:
        raise UserError(f"{FIELD} is {RAW}, which only a reward model can have; give Jinja or a file of it, or null")
    if config.chat_template is not None:
        template = chat_template_text(config.chat_template, field=FIELD)
        check_template(template, _QUESTION, FIELD)
        tokenizer.tokenizer.chat_template = template
    return tokenizer


def policy_template_digest(config: PolicyConfig) -> str:
    """Identity of the text of ``policy.chat_template``, wherever its file stands."""
    return digest_json(config.chat_template and chat_template_text(config.chat_template, field=FIELD))
