"""Secrets come from the environment alone: they are refused in a config, and cut out of what is shown or stored.

A config is copied into the run folder, the tracker and the orchestrator, where everybody reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

_NAMED: Final = re.compile(
    r"password|passwd|passphrase|secret|credential|authorization|bearer|auth[_-]?string|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|(?:^|[_-])(?:pwd|auth|apikey|sig|signature)$|token$",
    re.IGNORECASE,
)
"""Names of what is a secret."""
_TEXT_TOKEN: Final = re.compile(
    r"(?:eos|bos|pad|unk|sep|cls|mask|stop|start|end|begin|first|last|special|think|answer|target|class)[_-]?token$",
    re.IGNORECASE,
)
"""Tokens of a vocabulary, which are none."""
_SHAPED: Final = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bpn[ub]_[A-Za-z0-9]{30,}|\bglpat-[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Values that well-known services give out."""
_USERINFO: Final = re.compile(r"(?<=://)[^\s'\"<>]*@")
"""Of an address in a text: up to the last @, since a password may hold what it should not."""
_QUERY: Final = re.compile(r"([?&;])([^=&;#\s'\"]+)=([^&;#\s'\"<>)]*)")
_SHORTEST: Final = 6
"""A shorter value of a variable is not looked for in texts: it could stand anywhere."""
HIDDEN: Final = "***"


def names_a_secret(name: str) -> bool:
    """Whether a field, param, query parameter or variable of this name holds a secret."""
    return bool(_NAMED.search(name)) and not _TEXT_TOKEN.search(name) and not name.lower().endswith("_env")


def url_secret(url: str) -> str | None:
    """What in an address is a secret: "a user name or password", "the query parameter 'key'", or None.

    A user name alone is none in the address of a database, and one in that of a web service, where it may be a token.
    """
    if "://" not in url:
        return None
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return "something that cannot be read as an address"
    user, at, _ = parts.netloc.rpartition("@")
    if at and (parts.scheme.lower() in ("http", "https") or ":" in user):
        return "a user name or password"
    for name, value in pairs:
        if value and (names_a_secret(name) or name.lower() in ("key", "code")):
            return f"the query parameter {name!r}"
    return None


def config_secrets(tree: Any) -> list[str]:
    """One sentence for each secret in a plain config: its field and the remedy, never its value."""
    problems: list[str] = []
    for field, value in _texts("", tree):
        name = field.rpartition(".")[2]
        if _SHAPED.search(value):
            problems.append(
                f"{field} holds what looks like a secret, and a config is stored as it is; {_remedy(field)}"
            )
        elif found := url_secret(value):
            problems.append(
                f"{field} is an address with {found} in it, and a config is stored as it is; {_remedy(field)}"
            )
        elif ".params." in field and value and names_a_secret(name):
            problems.append(f"{field} is named like a secret, and a config is stored as it is; {_remedy(field)}")
    return problems


def without_credentials(url: str) -> str:
    """An address as it may be shown: no user, no password, no value of a secret query parameter."""
    scheme, mark, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):
        rest = rest.rpartition("@")[2]
    elif mark:
        place, slash, path = rest.partition("/")
        rest = place.rpartition("@")[2] + slash + path
    return _QUERY.sub(_hide_value, scheme + mark + rest)


def without_secrets(text: str) -> str:
    """A text as it may be shown: addresses without credentials, and no value of a secret environment variable."""
    text = _QUERY.sub(_hide_value, _USERINFO.sub(f"{HIDDEN}@", text))
    for value in sorted(_environment_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _SHAPED.sub(HIDDEN, text)


def _environment_secrets() -> set[str]:
    """Values of variables that are named like secrets, and the credentials inside addresses."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if names_a_secret(name):
            found.add(value)
        elif "://" in value:
            try:
                password = urlsplit(value).password or ""
            except ValueError:
                continue
            found |= {password, unquote(password)}
    return {value for value in found if len(value) >= _SHORTEST}


def _hide_value(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    is_secret = value and (names_a_secret(name) or name.lower() in ("key", "code"))
    return f"{mark}{name}={HIDDEN if is_secret else value}"


def _texts(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, dict):
        for key, child in cast("dict[object, Any]", value).items():
            yield from _texts(f"{prefix}.{key}" if prefix else str(key), child)
    elif isinstance(value, list):
        for index, child in enumerate(cast("list[Any]", value)):
            yield from _texts(f"{prefix}.{index}", child)


def _remedy(field: str) -> str:
    if field.startswith("tracking."):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), "
            "or leave it out and put the whole address into MLFLOW_TRACKING_URI"
        )
    if field.endswith(".url"):
        return "take it out, put the token into an environment variable and name that in token_env"
    if ".params." in field:
        return "put it into an environment variable and pass its name, as {}_env: MY_SECRET".format(
            field.rpartition(".")[2]
        )
    return "take it out and put it into an environment variable"
