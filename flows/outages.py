"""What a run does while Prefect does not work: it goes on. Files are the truth, Prefect is a view.

    at the start     the whole run goes on as plain functions, told once, with the address
    in the middle    what Prefect fails to do is done as plain functions; it is tried again now and then
    at the end       the work is done, so that is what the caller gets, told that Prefect does not know it

Only errors of Prefect are caught: an error of the work is the caller's, even if the work speaks HTTP too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import httpx
from prefect.settings import PREFECT_API_URL, get_current_settings

from flows.progress import watcher
from rlhf_core.contracts.secrets import without_credentials, without_secrets

PROBE_S = 2.0
"""How long the API may take to say that it is there."""
LOOK_AGAIN_S = 10.0
"""Seconds until the first look at whether it is back; after each relapse, twice as many."""
LONGEST_PAUSE_S = 600.0
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
        what = f"the Prefect API{_address()} does not answer"
        if error is not None and api_answers():
            reason = without_secrets(str(error).strip() or "no reason given").splitlines()[0]
            what = f"Prefect{_address()} failed ({type(error).__name__}: {reason})"
        watcher().warned(f"{what}; {consequence}")


outage = Outage()
"""Of this process: one API, one outage."""


def api_answers() -> bool:
    """Whether the configured API says that it is healthy. True where none is configured: it will be a temporary one."""
    url = PREFECT_API_URL.value()
    if url is None:
        return True
    api = get_current_settings().api
    headers = {"Authorization": f"Bearer {api.key.get_secret_value()}"} if api.key else {}
    try:
        answer = httpx.get(f"{url}/health", timeout=PROBE_S, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.status_code < 500


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


def _address() -> str:
    url = PREFECT_API_URL.value()
    return f" at {without_credentials(url)}" if url else ""
