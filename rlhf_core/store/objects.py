"""The objects below ``s3://bucket/prefix``. The only file that imports boto3.

Credentials, region and endpoint are found as boto3 finds them: environment, profile, role, ``AWS_ENDPOINT_URL``. What
fails on the way is tried again by botocore, with growing pauses; then it is one sentence.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.errors import StorageError, UserError
from rlhf_core.contracts.secrets import without_secrets
from rlhf_core.store.address import Address

TRIES: Final = 5
"""Of one request."""
CONNECT_S, READ_S = 5.0, 30.0
"""Without an answer, until a try has failed."""
WHOLE_BYTES: Final = 64 * 2**20
"""A larger file is sent in parts; it appears when all of them are there."""
_CHUNK: Final = 2**20
_REFUSED: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchKey", "404"})
"""What a store says where a condition does not hold, or another request was faster."""
_ANSWERED: Final = re.compile(
    r"An error occurred \((\w+)\) when calling the \w+ operation(?: \([^)]*\))?: |(?<=\w)\?[^\"]*"
)
"""Of botocore's sentences: what says nothing but how it asks; the query of an address too."""
_making: Final = threading.Lock()
"""Around a session, which one thread at a time may use, unlike a client."""
_CREDENTIALS: Final = "give boto3 other credentials: by environment, profile or role"
_REMEDIES: Final = {
    "NoSuchBucket": "make that bucket, or correct its name",
    "AccessDenied": "let these credentials list, read, write and delete there",
    "403": "let these credentials list, read, write and delete there",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
}
"""Error of a store -> what a person does about it."""


class ChangedError(Exception):
    """An object is not what it was when it was listed: look again."""


@dataclass(frozen=True)
class Entry:
    """An object as it is listed."""

    etag: str
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970, by the clock of the store."""


@dataclass(frozen=True)
class Listing:
    """What was there."""

    entries: dict[str, Entry]
    """Name below the prefix -> object."""
    now: float
    """When it was listed: seconds since 1970, by the clock of the store."""


class Objects:
    """The objects of a run; names are relative to its prefix.

    Args:
        address: of the run.
        tries: of each request.
        read_s: seconds without an answer, until a try has failed.
    Raises:
        UserError: boto3 is not there, or not configured as it must be.
        StorageError: from each method, if the store does not do what it is asked to.
    """

    def __init__(self, address: Address, *, tries: int = TRIES, read_s: float = READ_S) -> None:
        self.address = address
        self._client = _client(address, tries, read_s)

    @property
    def endpoint(self) -> str:
        """Address of the service."""
        return str(self._client.meta.endpoint_url)

    def url(self, name: str) -> str:
        """Of an object, as messages name it."""
        return f"{self.address}/{name}"

    def list(self, under: str = "", *, at_most: int | None = None) -> Listing:
        """All objects, those below a folder, or the first few."""
        entries: dict[str, Entry] = {}
        now, start = 0.0, {}
        with self._told(under, "read"):
            while True:
                page = self._client.list_objects_v2(
                    Bucket=self.address.bucket,
                    Prefix=f"{self.address.prefix}/{under}",
                    **({"MaxKeys": at_most} if at_most else {}),
                    **start,
                )
                now = email.utils.parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
                for found in page.get("Contents", ()):
                    name = found["Key"].removeprefix(f"{self.address.prefix}/")
                    entries[name] = Entry(found["ETag"], found["Size"], found["LastModified"].timestamp())
                if at_most or not page.get("IsTruncated"):
                    return Listing(entries, now)
                start = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of a small object and its ETag; None if there is none."""
        with self._told(name, "read"):
            try:
                found = self._client.get_object(**self._named(name))
            except self._client.exceptions.NoSuchKey:
                return None
            return found["Body"].read(), str(_etag(found))

    def fetch(self, name: str, path: Path, etag: str) -> None:
        """Write an object's bytes into a file. Raises ChangedError if it is not the object of this ETag any more."""
        for is_last in (False, False, True):
            with self._told(name, "read"):
                if (found := self._if_it_holds(self._client.get_object, name, IfMatch=etag)) is None:
                    raise ChangedError(name)
                try:
                    _etag(found)
                    with path.open("wb") as file:
                        for chunk in found["Body"].iter_chunks(_CHUNK):
                            file.write(chunk)
                    return
                except _errors():  # the connection broke in the middle, which botocore does not repeat
                    if is_last:
                        raise

    def put(self, name: str, content: bytes | Path) -> str:
        """Write an object, whatever is there; returns its ETag."""
        etag = self._put(name, content)
        assert etag is not None
        return etag

    def put_new(self, name: str, content: bytes | Path) -> str | None:
        """Write an object where there is none; returns its ETag, or None if there is one."""
        return self._put(name, content, IfNoneMatch="*")

    def put_over(self, name: str, content: bytes | Path, etag: str) -> str | None:
        """Replace the object of this ETag; returns the new one's, or None if it is another object by now."""
        return self._put(name, content, IfMatch=etag)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with self._told(name, "removed"):
            self._client.delete_object(**self._named(name))

    def delete_this(self, name: str, etag: str) -> None:
        """Remove the object of this ETag, and no other."""
        with self._told(name, "removed"):
            self._if_it_holds(self._client.delete_object, name, IfMatch=etag)

    def _named(self, name: str) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": f"{self.address.prefix}/{name}"}

    def _put(self, name: str, content: bytes | Path, **condition: str) -> str | None:
        with self._told(name, "written"):
            if isinstance(content, bytes):
                return _etag(self._if_it_holds(self._client.put_object, name, Body=content, **condition))
            if content.stat().st_size <= WHOLE_BYTES:
                with content.open("rb") as file:
                    return _etag(self._if_it_holds(self._client.put_object, name, Body=file, **condition))
            self._client.upload_file(str(content), *self._named(name).values())  # boto3 takes no condition here
            return _etag(self._client.head_object(**self._named(name)))

    def _if_it_holds(self, request: Any, name: str, **conditions: Any) -> Any:
        """The answer, or None where a condition does not hold."""
        try:
            return request(**self._named(name), **conditions)
        except self._client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in _REFUSED:
                return None
            raise

    @contextlib.contextmanager
    def _told(self, name: str, action: str) -> Iterator[None]:
        """Say which object a store could not take or give, and what to do."""
        try:
            yield
        except _errors() as error:
            code = str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))
            remedy = _REMEDIES.get(code, "look after that store, and whether this machine reaches it")
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                remedy = _CREDENTIALS
            reason = _ANSWERED.sub(r"\1: ", without_secrets(str(error)).splitlines()[0])
            comfort = "nothing was changed" if action == "read" else "nothing is lost"
            raise StorageError(
                f"{self.url(name).rstrip('/')} was not {action}: {reason}; {comfort}: {remedy}, then run the same "
                "again or resume"
            ) from None


def _client(address: Address, tries: int, read_s: float) -> Any:
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_S,
        "read_timeout": read_s,
        "retries": {"mode": "standard", "total_max_attempts": tries},
    }
    try:
        from botocore.config import Config

        with _making:
            client = _session().client("s3", config=Config(**settings))
            if "amazonaws.com" not in client.meta.endpoint_url:  # others seldom have a host name for each bucket
                client = _session().client("s3", config=Config(**settings, s3={"addressing_style": "path"}))
            return client
    except ModuleNotFoundError:
        raise UserError(f'{address} needs boto3, which is not installed: pip install "rlhf-flow[s3]"') from None
    except (*_errors(), ValueError) as error:
        why = without_secrets(str(error))
        raise UserError(f"{address} cannot be reached: boto3 is not configured: {why}") from None


@functools.cache
def _session() -> Any:
    """One a process: the first client of each takes a tenth of a second."""
    from boto3.session import Session

    return Session()


def _etag(answer: Any) -> str | None:
    """Of an object that was asked for or written, if it was. Raises an error of boto3 if somebody else has answered."""
    from botocore.exceptions import ClientError

    if answer is None:
        return None
    if not answer.get("ETag"):
        told = {"Error": {"Code": "NoETag", "Message": "what answers there is no object store"}}
        raise ClientError(told, "request")
    return answer["ETag"]


def _errors() -> tuple[type[Exception], ...]:
    """Whatever boto3 raises."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, Boto3Error
