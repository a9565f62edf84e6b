"""The edge of the ``rlhf`` command: what the operating system refuses, and what is odd about where it runs.

The packages below raise what they meet. Here an ``OSError``, a text that is not UTF-8 and the end of the memory become
one sentence with what can be done; RLHF_TRACEBACK=1 shows where it happened.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, Final, cast

from typer import Abort, BadParameter
from typer.rich_utils import rich_abort_error, rich_format_error

from flows import stopping
from flows.console import EXIT_PIPE, silence
from flows.visible import visible
from rlhf_core.contracts.errors import UserError, remedy_of
from rlhf_core.contracts.secrets import without_secrets
from rlhf_core.store.address import shown

_CLICK: Final = BadParameter.__mro__[2]
"""Base of all mistakes in the words of a command line."""
TRACEBACK: Final = "RLHF_TRACEBACK"
"""Environment variable: where it is set, what is told in a sentence is preceded by the traceback."""


_NO_MEMORY: Final = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_?\s?alloc|can't start new thread|"
    r"could not create a (primitive|memory)|Cannot allocate memory|Resource temporarily unavailable"
)
"""torch, oneDNN, MKL and Python's threads raise a RuntimeError with one of these where memory is exhausted."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def check_surroundings(arguments: Sequence[str]) -> None:
    """Refuse to begin where nothing could be done. Raises UserError."""
    try:
        os.getcwd()  # noqa: PTH109 - of this very folder, not of a path
    except OSError as error:
        raise UserError(f"the working folder cannot be used ({error.strerror}); cd to one that is there") from None
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the word {visible(word)} of the command is not UTF-8 text; type it in UTF-8, or rename the file "
                "that it names"
            ) from None


def sentence(error: Exception) -> str | None:
    """What an error of the operating system means to a person; None for another kind of error."""
    is_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
    )
    if (is_memory or isinstance(error, OSError | UnicodeError)) and os.environ.get(TRACEBACK):
        print_traceback(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, UnicodeError):
        return f"a name or text is not UTF-8 ({without_secrets(str(error))}); write it in UTF-8, or rename the file"
    if is_memory:
        return (
            "the memory of this machine does not suffice, or what this process may take of it (ulimit -v, a cgroup); "
            "take a smaller batch, model or file, or more memory"
        )
    return None


def as_exception(error: BaseException) -> Exception | None:
    """What a library in Rust raises where it gives up, past every ``except Exception``; None for anything else."""
    if type(error).__name__ != "PanicException":
        return None
    return UserError(
        f"a library gave up ({' '.join(str(error).split())[:200]}): a tokenizer.json that somebody else made may "
        "ask too much of it; take the tokenizer that the model was trained with"
    )


def quietly_ended(end: SystemExit) -> int:
    """The exit code of a command that ended by itself; of one whose reader has gone, with how to continue."""
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # of typer, where a write met a pipe without a reader
        code = EXIT_PIPE
    if code == EXIT_PIPE and stopping.is_at_work() and (words := stopping.last_words()):
        sys.stderr.write(f"nobody reads the output any more: {visible(words)}\n")
    return code


def ended_by_typer(error: Exception) -> int | None:
    """Say what is wrong with the words of a command, or that nobody reads: the exit code; None for other errors."""
    if isinstance(error, BrokenPipeError):
        silence()
        return EXIT_PIPE
    if isinstance(error, Abort):
        rich_abort_error()
        return 1
    if not isinstance(error, _CLICK):
        return None
    for name, value in vars(error).items():
        if isinstance(value, str):  # the words themselves
            setattr(error, name, visible(value))
    rich_format_error(cast("Any", error))
    return int(getattr(error, "exit_code", 2))


def print_traceback(error: Exception) -> None:
    """Print it without secrets, and as text."""
    sys.stderr.write(visible(shown(without_secrets("".join(traceback.format_exception(error))))))


def _of_system(error: OSError) -> str:
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    if names:
        return f"{' and '.join(names)} cannot be used: {reason}; {remedy_of(error)}"
    if error.errno in _FULL:  # no file was named: what a shell has opened, or a library
        return f"the output, or a temporary file in {_temporary()}, cannot be written: {reason}; {remedy_of(error)}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not os.access("/dev/shm", os.W_OK):
        return (
            f"worker processes share memory in /dev/shm, which cannot be written: {reason}; make it writable, or set "
            "execution.num_workers 0 and leave execution.update out"
        )
    if error.errno is None:
        return f"{without_secrets(reason)}; see to that, and run the same again or resume ({TRACEBACK}=1 shows where)"
    return f"the system refuses: {reason}; {remedy_of(error)} ({TRACEBACK}=1 shows where)"


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return "TMPDIR"
