"""What a run does while Prefect does not work: it goes on. Files are the truth, Prefect is a view.

    at the start     the whole run goes on as plain functions, told once, with the address
    in the middle    what Prefect fails to do is done as plain functions; it is tried again now and then
    at the end       the work is done, so that is what the caller gets, told that Prefect does not know it

Only errors of Prefect are caught: an error of the work is the caller's, even if the work speaks HTTP too.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, get_current_settings

from flows.progress import watcher
from rlhf_core.contracts.secrets import without_credentials, without_secrets

PROBE_S = 2.0
"""How long the API may take to say that it is there."""
LOOK_AGAIN_S = 10.0
"""Seconds until the first look at whether it is back; after each relapse, twice as many."""
LONGEST_PAUSE_S = 600.0
_BROKEN, _UNKNOWN, _FORBIDDEN = 500, 401, 403
"""Status codes of HTTP."""
EPHEMERAL = ("PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE")
"""Both names that Prefect takes."""
GOES_ON = "the run goes on without it; nothing is lost: its folder has everything"
NOT_SHOWN = f"{GOES_ON}, but this run will not be shown there"
NOT_TOLD = "it was not told how the run ended; nothing is lost: the run's folder has everything"


class Outage:
    """Whether Prefect is known not to work, when it was last looked at, and what was told."""

    def __init__(self) -> None:
        self._pause_s = LOOK_AGAIN_S
        self._looked_at: float | None = None

    @property
    def lasts(self) -> bool:
        """Whether Prefect does not work; looks again now and then, and tells when it does."""
        if self._looked_at is None:
            return False
        if time.monotonic() - self._looked_at >= self._pause_s:
            if api_answers():
                self._looked_at, self._pause_s = None, min(2 * self._pause_s, LONGEST_PAUSE_S)
                watcher().warned(f"the Prefect API{_address()} answers again; the run is shown there from here on")
                return False
            self._looked_at = time.monotonic()
        return True

    def begins(self, consequence: str, error: Exception | None = None) -> None:
        """Do without Prefect from here on, and tell a person once why, and what this means."""
        told, self._looked_at = self._looked_at is not None, time.monotonic()
        if told:
            return
        silence = _silence()
        if silence is not None or error is None:
            what = f"the Prefect API{_address()} does not answer{_remedy(silence)}"
        else:
            reason = without_secrets(str(error).strip() or "no reason given").splitlines()[0]
            what = f"Prefect{_address()} failed ({type(error).__name__}: {reason}{_access(error)})"
        watcher().warned(f"{what}; {consequence}")


outage = Outage()
"""Of this process: one API, one outage."""


def api_answers() -> bool:
    """Whether the configured API says that it is healthy. True where none is configured: it will be a temporary one."""
    return _silence() is None


def _silence() -> Exception | None:
    """Why the configured API does not answer; None if it does, or if none is configured.

    Prefect's own client asks, so that certificates, headers, keys and proxies are those that Prefect is told of. It
    asks once: what that client tries again, with pauses of its own, may be a server in maintenance for hours.
    """
    url = PREFECT_API_URL.value()
    if url is None:
        return None
    try:
        with get_client(httpx_settings={"timeout": PROBE_S}, sync_client=True) as client:
            http = client._client
            pool = getattr(http._transport_for_url(httpx.URL(url)), "_pool", None)
            if pool is not None:
                pool._retries = 0
            answer = httpx.Client.send(http, http.build_request("GET", "/health"))
    except Exception as error:  # also a certificate that is no file, and an address that is none
        return error
    return None if answer.status_code < _BROKEN else httpx.HTTPError(f"it answers {answer.status_code}")


def no_server_is_wanted() -> bool:
    """Whether no API is configured, and the environment forbids a temporary one, by Prefect's own variable."""
    is_chosen = any(name in os.environ for name in EPHEMERAL)
    return is_chosen and PREFECT_API_URL.value() is None and not get_current_settings().server.ephemeral.enabled


@contextlib.contextmanager
def telling_prefect() -> Iterator[None]:
    """Around what only tells Prefect something: a failure costs a message, never the run."""
    try:
        yield
    except Exception as error:  # whatever it is, the run does not need it
        outage.begins(GOES_ON, error)


def _remedy(silence: Exception | None) -> str:
    """What can be done where it is not the server that is away; empty where it is, or may be."""
    if isinstance(silence, FileNotFoundError):
        return f" (PREFECT_API_SSL_CERT_FILE {PREFECT_API_SSL_CERT_FILE.value()} is not there)"
    if isinstance(silence, ssl.SSLError):
        return f" (PREFECT_API_SSL_CERT_FILE {PREFECT_API_SSL_CERT_FILE.value()} holds no certificate)"
    if "CERTIFICATE_VERIFY_FAILED" in str(silence):
        reason = str(silence).rpartition("failed: ")[2].partition(" (_ssl")[0]
        return f" (its certificate is not trusted: {reason}; name the one to trust in PREFECT_API_SSL_CERT_FILE)"
    return ""


def _access(error: Exception) -> str:
    """What can be done where the server does not know who asks."""
    answer = getattr(error, "response", None)
    if getattr(answer, "status_code", None) not in (_UNKNOWN, _FORBIDDEN):
        return ""
    return "; PREFECT_API_AUTH_STRING, PREFECT_API_KEY or PREFECT_CLIENT_CUSTOM_HEADERS lets a client in"


def _address() -> str:
    url = PREFECT_API_URL.value()
    return f" at {without_credentials(url)}" if url else ""
