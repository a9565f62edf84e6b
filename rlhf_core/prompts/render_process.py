"""Chat templates are programs of somebody else, so a process apart renders them, each within a time and a memory.

transformers renders in jinja2's sandbox, which keeps a template from anything outside; but a loop or a text without end
is no crime there, and it may begin with any conversation. The process starts with the first chat (0.7 s), stays, and
ends with its parent; a template that has once been too much is not tried again.

    python -P render_process.py     requests and answers as JSON, each behind its length; it says first that it began
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast

MAX_SECONDS: Final = 5
"""Of a core."""
MAX_MEMORY_BYTES: Final = 1 << 30
MAX_TEXT_BYTES: Final = 1 << 26
"""Of a rendered conversation."""
AT_ONCE: Final = 64
"""Conversations of a request, which have that time and memory together: a usual one takes 0.02 ms."""
Conversation = Sequence[Mapping[str, Any]]
WITHIN: Final = f"within {MAX_SECONDS} seconds and {MAX_MEMORY_BYTES >> 30} GiB"
_WAIT_S: Final = 60
"""For an answer, on a machine that is busy."""
_LENGTH: Final = struct.Struct("<Q")


class TemplateRefusedError(Exception):
    """What a template, or jinja2 about it, says of a conversation."""


class TemplateLimitError(Exception):
    """A template took more time or memory for a conversation than any template needs."""


class Renderer:
    """The process that renders, as its parent sees it. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0
        self._known: set[str] = set()
        self._too_much: set[str] = set()

    def render(
        self,
        template: str,
        conversations: Sequence[Conversation],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> list[str | TemplateRefusedError]:
        """Render conversations.

        Args:
            template: Jinja.
            conversations: each of messages of {role, content}.
            add_generation_prompt: open the assistant's answer at the end.
            variables: further ones of the template, of JSON's types.
        Returns: the text of each, or what the template says against it.
        Raises: TemplateLimitError: one of them took too long or too much memory, now or before.
        """
        told = {"add_generation_prompt": add_generation_prompt, **(variables or {})}
        found: list[str | TemplateRefusedError] = []
        for start in range(0, len(conversations), AT_ONCE):
            found += self._asked(template, conversations[start : start + AT_ONCE], told)
        return found

    def _asked(
        self, template: str, conversations: Sequence[Conversation], variables: Mapping[str, Any]
    ) -> list[str | TemplateRefusedError]:
        digest = hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            if digest in self._too_much:
                raise TemplateLimitError
            process = self._started()
            asked: dict[str, Any] = {"template": digest, "conversations": conversations, "variables": variables}
            if digest not in self._known:
                asked["text"] = template
            try:
                self._known.add(digest)
                _send(cast("IO[bytes]", process.stdin), asked)
                pipe = cast("IO[bytes]", process.stdout)
                answers = cast("list[dict[str, str]]", _receive(pipe)["answers"])
            except BaseException as error:
                self._end()
                if not isinstance(error, OSError | EOFError | ValueError):
                    raise  # an interrupt: the answer would be taken for that to the next question
                self._too_much.add(digest)
                raise TemplateLimitError from None
        return [TemplateRefusedError(each["error"]) if "error" in each else each["text"] for each in answers]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._parent != os.getpid():  # a fork of the process that started it
            self._process, self._parent = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            from rlhf_core.contracts.search_path import child_environment  # not where this file is the script

            self._known = set()
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
            )
            try:
                _receive(cast("IO[bytes]", self._process.stdout))
            except (OSError, EOFError, ValueError) as error:
                self._end()
                raise RuntimeError("the process that renders chat templates did not start") from error
        return self._process

    def close(self) -> None:
        """End the process. The next conversation starts another one."""
        if self._parent == os.getpid():
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


renderer = Renderer()
"""Of this process."""
atexit.register(renderer.close)


def _send(pipe: IO[bytes], values: Mapping[str, Any]) -> None:
    data = json.dumps(values).encode()
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> dict[str, Any]:
    """An answer. Raises EOFError, TimeoutError (an OSError), or ValueError for one that is too long."""
    ends = time.monotonic() + _WAIT_S
    (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size, ends))
    if length > 6 * MAX_TEXT_BYTES:  # JSON writes a character as up to six
        raise ValueError("it is too long")
    return cast("dict[str, Any]", json.loads(_read(pipe, length, ends)))


def _read(pipe: IO[bytes], length: int, ends: float) -> bytes:
    parts: list[bytes] = []
    while length:
        ready, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(pipe.fileno(), min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def serve() -> None:
    """Answer until the parent is gone. A conversation that takes too long ends the process: SIGPROF does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked as well, and decides
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        most = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    templates: dict[str, str] = {}
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else is an answer
    _send(answers, {})
    while head := sys.stdin.buffer.read(_LENGTH.size):
        asked = json.loads(sys.stdin.buffer.read(_LENGTH.unpack(head)[0]))
        template = templates.setdefault(asked["template"], asked.get("text", ""))
        found_of_all: list[dict[str, str]] = []
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        for conversation in asked["conversations"]:
            try:
                found, _ = render_jinja_template([conversation], chat_template=template, **asked["variables"])
                answer = {"text": found[0]}
                if len(found[0]) > MAX_TEXT_BYTES:
                    raise MemoryError
            except MemoryError:
                sys.exit(1)
            except Exception as error:  # jinja2's, and whatever a template's own expressions raise
                answer = {"error": str(error)[:MAX_TEXT_BYTES] or type(error).__name__}
            found_of_all.append(answer)
        _send(answers, {"answers": found_of_all})
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve()
