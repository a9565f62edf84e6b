"""Every error this project raises on purpose.

    RlhfError
    ├── UserError              a mistake in a config, a file or a model: one sentence each, exit code 2
    ├── IntegrityError         an artifact, manifest or checkpoint is missing, foreign or damaged
    ├── DriftError             a resumed run would not be the run that was stopped
    ├── RunLockedError         another process is working on this run folder
    ├── StorageError           the disk did not take or give something; what was committed before is intact
    ├── WorkerError            worker processes die, one after the other, of the same shard or update
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
    """The disk did not take or give something: full, read-only, or failing. What was committed before is intact."""

    @classmethod
    def of(cls, error: OSError, path: object, action: str = "written") -> StorageError:
        """The error at ``path``, with what to do about it.

        Args:
            error: of the operating system.
            path: the file or folder.
            action: what was not done to it: written, read, removed, cleaned.
        """
        reason = error.strerror or str(error)
        remedy = remedy_of(error)
        comfort = "nothing was changed" if action == "read" else "nothing is lost"
        return cls(f"{path} was not {action}: {reason}; {comfort}: {remedy}, then run the same again or resume")


def remedy_of(error: OSError) -> str:
    """What a person does about an error of the operating system."""
    return _REMEDIES.get(error.errno or 0, "look after that disk")


_REMEDIES = {
    errno.ENOSPC: "free some space or inodes",
    errno.EDQUOT: "free some space or raise the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.ESTALE: "mount the network's disk again",
    errno.ENOENT: "make it, or name another one",
    errno.EISDIR: "name a file",
    errno.ENOMEM: "close other programs, or take less",
    errno.ENOSYS: "choose a disk that can do it",
    errno.EOPNOTSUPP: "choose a disk that can do it",
    errno.ENOLCK: "choose a disk that has locks",
    errno.EACCES: "give yourself the permission",
    errno.EPERM: "give yourself the permission",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that has its name",
    errno.ENOTDIR: "move away what is there, or choose another path",
    errno.ENOTEMPTY: "move away what is there, or choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
}
"""Error of the operating system -> what a person does about it."""


class WorkerError(RlhfError):
    """One shard has ended several workers in a row, or one update all ranks several times."""


class NumericalError(RlhfError):
    """A number that must not enter the computation; the message names rows and the likely cause."""


class GuardStopError(RlhfError):
    """A guard rail has stopped the run: what it saw, where the last good state is, and how to go on."""
