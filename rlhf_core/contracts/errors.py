"""Every error this project raises on purpose.

    RlhfError
    ├── UserError              a mistake in a config, a file or a model: one sentence each, exit code 2
    ├── IntegrityError         an artifact, manifest or checkpoint is missing, foreign or damaged
    ├── DriftError             a resumed run would not be the run that was stopped
    ├── RunLockedError         another process is working on this run folder
    ├── StorageError           the disk did not take a write; what was committed before is intact
    ├── NumericalError         a value that must not enter the computation (NaN score, ratio != 1, ...)
    └── GuardStopError         a guard rail has stopped the run; everything is on disk; exit code 3

The command line prints the message of any of them without a traceback. ``ValueError`` is kept for a wrong
argument of a public function, ``assert`` for a programmer's mistake.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class RlhfError(Exception):
    """Base of every deliberate error."""


class UserError(RlhfError):
    """One or several mistakes of the user, reported together.

    Args:
        problems: one sentence each; a sentence names the field, the value, and what would be right.
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise ValueError("a UserError needs at least one problem")
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return type(self), tuple(self.problems)


class IntegrityError(RlhfError):
    """An artifact, manifest or checkpoint is missing, foreign or damaged."""


class DriftError(RlhfError):
    """The identity of a resumed run differs from the one it was started with."""


class RunLockedError(RlhfError):
    """Another process holds the lock of the run folder."""


class StorageError(RlhfError):
    """The disk did not take a write: full, read-only, or failing. What was committed before is intact."""

    @classmethod
    def of(cls, error: OSError, path: object) -> StorageError:
        """The error of a write to ``path``, with what to do about it."""
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "look after that disk or its permissions"
        return cls(f"{path} was not written: {reason}; nothing is lost: {remedy}, then run the same again or resume")


class NumericalError(RlhfError):
    """A number that must not enter the computation; the message names rows and the likely cause."""


class GuardStopError(RlhfError):
    """A guard rail has stopped the run: what it saw, where the last good state is, and how to go on."""
