"""Chat templates of somebody else: tried once in a process that may not take long, nor much memory.

transformers renders them in jinja2's sandbox, which keeps them from anything outside; but a loop or a text without
end is no crime there. So a template renders one conversation here first, where both have an end.

    python -P -m rlhf_core.models.templates < {"template": ..., "messages": [...]}
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.contracts.bound_processes import end_with_parent
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.search_path import child_environment
from rlhf_core.models.untrusted import MAX_TEXT_BYTES

MAX_SECONDS = 5
MAX_MEMORY_BYTES = 2 << 30
_WAIT_SECONDS = 60
_REFUSED = 3
"""Exit code where the template itself says no: its caller, who renders it again, tells why."""


def check_template(template: object, messages: Sequence[Mapping[str, Any]], named: str) -> None:
    """Refuse a chat template that takes too long or too much memory for a conversation.

    Args:
        template: Jinja, or what a tokenizer has in its place: none, or several by name.
        messages: of {role, content}.
        named: field and value, for errors.
    Raises: UserError. A template that merely refuses this conversation is left to whoever renders it.
    """
    for text in template.values() if isinstance(template, Mapping) else [template]:
        if isinstance(text, str):
            _check(text, json.dumps(list(messages)), named)


@functools.lru_cache(maxsize=64)
def _check(template: str, messages: str, named: str) -> None:
    if len(template) > MAX_TEXT_BYTES:
        raise UserError(f"{named} has a chat template of {len(template)} characters; at most {MAX_TEXT_BYTES} are read")
    asked = json.dumps({"template": template, "messages": json.loads(messages)})
    command = [sys.executable, "-P", "-m", "rlhf_core.models.templates", str(os.getpid())]
    try:
        done = subprocess.run(
            command, input=asked.encode(), capture_output=True, check=False, timeout=_WAIT_SECONDS,
            env=child_environment(),
        )  # fmt: skip
        ended = done.returncode
    except subprocess.TimeoutExpired:
        ended = 1
    if ended not in (0, _REFUSED):
        raise UserError(
            f"{named} has a chat template that does not render a conversation of {len(json.loads(messages))} messages "
            f"within {MAX_SECONDS} seconds and {MAX_MEMORY_BYTES >> 30} GiB; take the template of a model you trust"
        )


def render(asked: Mapping[str, Any]) -> int:
    """Render a conversation and forget it, within bounds; returns the exit code."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, hard))
    used = resource.getrusage(resource.RUSAGE_SELF)
    soon = int(used.ru_utime + used.ru_stime) + 1 + MAX_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soon, soon + 1))
    try:
        render_jinja_template([list(asked["messages"])], chat_template=asked["template"], add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, RecursionError, KeyError, AttributeError, IndexError):
        return _REFUSED
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        end_with_parent(int(sys.argv[1]))
    sys.exit(render(json.load(sys.stdin)))
