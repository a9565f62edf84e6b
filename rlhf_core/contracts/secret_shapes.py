"""Secrets by their shape, wherever they stand in a text: keys of services, tokens, passwords of connections.

A text that people or templates write (a system message, a chat template, a stop sequence) may speak of passwords: of
those only what has the unmistakable form of a key, a token or an address with a password is refused.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

NAMED: Final = re.compile(
    r"password|passwd|passphrase|secret|credential|authorization|bearer|auth[_-]?string|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|account[_-]?key|shared[_-]?access|(?:^|[_-])(?:pwd|auth|apikey|sig|signature)$|pwd$|token$",
    re.IGNORECASE,
)
"""Names of what is a secret."""
TEXT_TOKEN: Final = re.compile(
    r"(?:eos|bos|pad|unk|sep|cls|mask|stop|start|end|begin|first|last|special|think|answer|target|class)[_-]?token$",
    re.IGNORECASE,
)
"""Tokens of a vocabulary, which are none."""
_KEYS: Final = "|".join(
    (
        r"\bhf_[A-Za-z0-9]{20,}",
        r"\bsk-(?:[A-Za-z0-9]+[-_])*?(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{16,}[\w-]*",
        r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",
        r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}|\bglpat-[\w-]{20,}",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}",
        r"\bxox[abeprs]-[A-Za-z0-9-]{10,}|\bxapp-[A-Za-z0-9-]{20,}|\bSG\.[\w-]{16,}\.[\w-]{16,}",
        r"\bpn[ub]_[A-Za-z0-9]{30,}|\bnpm_[A-Za-z0-9]{30,}|\bpypi-Ag[\w-]{30,}|\bdapi[0-9a-f]{32}\b|\bdop_v1_[0-9a-f]{40,}",
    )
)
_JWT: Final = r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)*"
_PRIVATE: Final = (
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:[\s\S]*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----)?"
)
_HEADER: Final = (
    r"\bBearer\s+(?=[\w.~+/=-]*[0-9])[\w.~+/=-]{16,}|\bBasic\s+(?=[A-Za-z0-9+/]*[0-9=])[A-Za-z0-9+/]{12,}={0,2}"
    r"|\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:Bearer|Basic|Token|ApiKey)\s+[\w.~+/=-]{6,}"
)
SHAPED: Final = re.compile("|".join((_KEYS, _JWT, _PRIVATE, _HEADER)))
"""Values that well-known services give out."""
_KINDS: Final = (
    (re.compile(_KEYS), "a key of a service"),
    (re.compile(_JWT), "a JSON web token"),
    (re.compile(_PRIVATE), "a private key"),
    (re.compile(_HEADER), "an Authorization header"),
)
ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_PAIR: Final = re.compile(r"(?:^|[;&?\s{\"'])([A-Za-z][\w .-]{0,40}?)\s*=\s*[\"'{]?([^;&\s,()\"'{}]+)")
_PLACEHOLDER: Final = re.compile(
    r"(?:\W.*|[xX*.]+|none|null|true|false|required?|optional|prefer|yes|no|your[\w-]*|changeme)$", re.IGNORECASE
)
_ALONE: Final = re.compile(r"\s*--?[\w-]+[= ]\S+\s*|\s*[A-Za-z][\w-]*\s*=\s*\S+\s*")
_OPTION: Final = re.compile(r"(?:^|\s)--?([A-Za-z][\w-]*)[= ]([^\s-]\S*)")
_MEMBER: Final = re.compile(r"[\"']([\w-]+)[\"']\s*:\s*[\"']([^\"']{4,})[\"']")
_THIN: Final = re.compile(r":thin:[^/\s@]+/([^@\s]+)@")


def names_a_secret(name: str) -> bool:
    """Whether a field, param, query parameter or variable of this name holds a secret."""
    return bool(NAMED.search(name)) and not TEXT_TOKEN.search(name) and not name.lower().endswith("_env")


def shaped_secret(text: str) -> str | None:
    """What in a text has the form of a secret that a service gives out; None if nothing has."""
    return next((kind for pattern, kind in _KINDS if pattern.search(text)), None)


def connection_secret(text: str) -> str | None:
    """What in a text for a machine is a secret: "a password of a connection", or None.

    Such texts are ``host=db user=me password=…``, ``DRIVER=…;PWD=…``, ``AccountName=…;AccountKey=…``, ``--token …``,
    and ``{"api_key": "…"}`` in quotes; also where ``=`` and ``;`` are percent-encoded.
    """
    for form in dict.fromkeys((text, unquote(text), unquote(unquote(text)))):
        if _THIN.search(form):
            return "a password of a connection"
        pairs = [(name.split()[-1], value) for name, value in _PAIR.findall(form) if name.strip()]
        is_plain = bool(_ALONE.fullmatch(form))
        if (len(pairs) > 1 or is_plain) and any(_is_secret(*pair) for pair in pairs):
            return "a password of a connection"
        if any(_is_secret(*pair) for pattern in (_OPTION, _MEMBER) for pair in pattern.findall(form)):
            return "a password"
    return None


def _is_secret(name: str, value: str) -> bool:
    is_long = len(value) > (5 if value.isdecimal() else 1)
    return names_a_secret(name) and is_long and not _PLACEHOLDER.match(value)
