"""Where a run in an object store is, and where its copy lies on this machine.

    s3://bucket/experiments/run-7   →   ~/.cache/rlhf-flow/bucket-experiments-3f9c1d20/run-7

Runs that are neighbours there are neighbours here, so that what stands beside a run folder (``mlflow.db``) is shared.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rlhf_core.contracts.errors import UserError

CACHE: Final = "RLHF_FLOW_CACHE"
"""Environment variable: the folder of all copies; default: ``~/.cache/rlhf-flow``."""
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PART: Final = re.compile(r"[A-Za-z0-9_=@+,!()-][A-Za-z0-9_.=@+,!()-]{0,199}")
"""One part of a prefix: what is a plain name in a folder and in an address alike."""

_copies: dict[str, str] = {}
"""Copy -> address, of whatever this process has opened."""


@dataclass(frozen=True)
class Address:
    """Of a run in a bucket. Example: ``Address.of("s3://bucket/experiments/run-7")``."""

    bucket: str
    prefix: str
    """Without slashes around it; never empty."""

    @classmethod
    def of(cls, text: str) -> Address:
        """Read ``s3://bucket/prefix``. Raises UserError if it is anything else."""
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        wanted = "give s3://BUCKET/PREFIX"
        if not text.startswith("s3://"):
            raise UserError(f"{text} is no place for a run: of the object stores, s3:// is known; {wanted}")
        if not _BUCKET.fullmatch(bucket):
            raise UserError(f"{text} names the bucket {bucket!r}, which none is called; {wanted}")
        if not prefix:
            raise UserError(f"{text} is a whole bucket, and a run needs a prefix of its own; {wanted}")
        for part in prefix.split("/"):
            if not _PART.fullmatch(part):
                raise UserError(
                    f"{text} has {part!r} in its prefix; use letters, digits, - _ . and single slashes, and no name "
                    "that begins with a dot"
                )
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def copy(self, endpoint: str) -> Path:
        """Folder of this machine that holds the copy. ``endpoint``: of the service; another one has other buckets."""
        home = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "rlhf-flow").expanduser().resolve()
        around, _, name = f"{self.bucket}/{self.prefix}".rpartition("/")
        digest = hashlib.sha256(f"{endpoint} {around}".encode()).hexdigest()[:8]
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", around)[:80]
        return home / f"{readable}-{digest}" / name


def is_url(place: str | Path) -> bool:
    """Whether a place is an address, also one that a Path has shortened to ``s3:/bucket``, instead of a folder."""
    return bool(_SCHEME.match(str(place)))


def on_disk(place: str | Path, what: str) -> Path:
    """A folder or file of this machine. Raises UserError for an address. ``what``: as the user gave it, ``--out``."""
    if is_url(place):
        raise UserError(f"{what} is {place}, but only the folder of a run can be in an object store; give a path")
    return Path(place)


def known_as(copy: Path, address: Address) -> None:
    """From now on this folder is shown by its address."""
    _copies[str(copy)] = str(address)


def shown(text: str | Path) -> str:
    """A text as a user reads it: with the address of a run in a store, where the folder of its copy is named."""
    text = str(text)
    for copy, address in _copies.items():
        text = text.replace(copy, address)
    return text
