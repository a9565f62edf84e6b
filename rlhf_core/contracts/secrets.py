"""Secrets come from the environment alone: they are refused in a config, and cut out of what is shown or stored.

A config is copied into the run folder, the tracker and the orchestrator, where everybody reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from rlhf_core.contracts.secret_shapes import ADDRESS, SHAPED, connection_secret, names_a_secret, shaped_secret

_USERINFO: Final = re.compile(r"(?<=://)[^\s'\"<>]*@")
"""Of an address in a text: up to the last @, since a password may hold what it should not."""
_QUERY: Final = re.compile(r"([?&;])([^=&;#\s'\"]+)=([^&;#\s'\"<>)]*)")
_SHORTEST: Final = 6
"""A shorter value of a variable is not looked for in texts: it could stand anywhere."""
HIDDEN: Final = "***"
_FREE: Final = re.compile(r"\.(?:params|template_options|options|labels|custom)(?:\.|$)")
"""Fields whose keys are anybody's."""
_PROSE: Final = re.compile(r"^prompts\.system$|\.chat_template$|^generation\.stop\.|\.template_options\.")
"""Fields that hold what people or templates write."""
_PASSWORD: Final = re.compile(r"(?:password|passwd|passphrase|pwd|pin)$", re.IGNORECASE)
"""Names of what may be a number."""
_NAMES_OF_PAIRS: Final = ("name", "key", "header")


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
    for field, name, value in _entries("", "", tree):
        if found := _secret(field, name, value):
            problems.append(f"{field} {found}, and a config is stored as it is; {_remedy(field)}")
    return problems


def _secret(field: str, name: str, value: str) -> str | None:
    """How a value is a secret, as the middle of a sentence; None if it is none."""
    if found := shaped_secret(value):
        return f"holds what looks like a secret ({found})"
    is_prose = bool(_PROSE.search(field))
    for address in [value] if "://" in value and " " not in value else ADDRESS.findall(value):
        found = url_secret(address)
        if found and not (is_prose and _has_placeholder(address)):
            return f"is an address with {found} in it"
    if _FREE.search(field) and value and names_a_secret(name):
        return "is named like a secret"
    if not is_prose and (found := connection_secret(value)):
        return f"holds {found}"
    return None


def _has_placeholder(address: str) -> bool:
    return any(sign in address for sign in ("{", "$", "%(", "["))


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
    return SHAPED.sub(HIDDEN, text)


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


def _entries(field: str, name: str, value: Any, *, in_list: bool = False) -> Iterator[tuple[str, str, str]]:
    """(field, name, text) of each text; also of a key that has the shape of a secret, at its parent's field."""
    if isinstance(value, str):
        yield field, name, value
    elif isinstance(value, dict):
        table = cast("dict[object, Any]", value)
        label = next((table[key] for key in _NAMES_OF_PAIRS if isinstance(table.get(key), str)), "")
        for key, child in table.items():
            if shaped_secret(str(key)):
                yield field, "", str(key)
                yield from _entries(f"{field}.***", "", child)
            else:
                yield from _entries(
                    f"{field}.{key}" if field else str(key), label if key == "value" else str(key), child
                )
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        is_pair = in_list and len(items) == 2 and isinstance(items[0], str) and names_a_secret(items[0])
        for index, child in enumerate(items):
            yield from _entries(f"{field}.{index}", items[0] if is_pair and index else "", child, in_list=True)
    elif isinstance(value, int) and _PASSWORD.search(name):
        yield field, name, str(value)


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
