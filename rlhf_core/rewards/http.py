"""A component that is a service: JSON there and back, within a time, a size and a number of tries."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import HttpReward
from rlhf_core.contracts.secrets import HIDDEN
from rlhf_core.contracts.trust import check_door, service
from rlhf_core.models.reward_text import Conversation
from rlhf_core.prompts.entries import shown
from rlhf_core.rewards.function import asked
from rlhf_core.rewards.scoring import Failure, Outcome, checked

if TYPE_CHECKING:
    import httpx

TOO_MANY_REQUESTS = 429


class HttpComponent:
    """POST ``{"prompts": [...], "responses": [...], "columns": {...}}``, get ``{"scores": [...]}``.

    Requests follow one another. Only what another try may cure is tried again: no connection, a time-out, HTTP 429
    and 5xx; waits double, without chance. A failed request fails its own responses alone. The environment's
    proxies, certificates and .netrc are not used, and no redirect is followed.

    Args:
        config: address, limits and tries; its host is allowed.
        token: sent as ``Authorization: Bearer``; None: no such header.
    """

    def __init__(self, config: HttpReward, token: str | None) -> None:
        self.config, self._token = config, token
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    async def score(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """One outcome a response."""
        import httpx

        size = self.config.batch_size
        outcomes: list[Outcome] = []
        async with httpx.AsyncClient(headers=self._headers, timeout=None, trust_env=False) as client:
            for start in range(0, len(conversations), size):
                outcomes += await self._score_batch(client, conversations[start : start + size])
        return [self._without_token(outcome) for outcome in outcomes]

    def _without_token(self, outcome: Outcome) -> Outcome:
        """The outcome; a reason that quotes an answer may repeat our token."""
        if self._token is None or not isinstance(outcome, Failure):
            return outcome
        return Failure(outcome.reason.replace(self._token, HIDDEN), outcome.error)

    async def _score_batch(self, client: httpx.AsyncClient, batch: Sequence[Conversation]) -> list[Outcome]:
        import httpx

        body = json.dumps(
            {
                "prompts": [asked(c) for c in batch],
                "responses": [c.response_text for c in batch],
                "columns": {name: [c.columns[name] for c in batch] for name in batch[0].columns},
            }
        ).encode()
        reason = ""
        for turn in range(self.config.retries + 1):
            if turn:
                await asyncio.sleep(self.config.backoff_s * 2 ** (turn - 1))
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    status, answer = await self._post(client, body)
            except TimeoutError:
                reason = f"gave no whole answer within {self.config.timeout_s:g} s"
            except httpx.TransportError as error:
                reason = f"could not be reached ({' '.join(str(error).split()) or type(error).__name__})"
            else:
                if status != TOO_MANY_REQUESTS and status < 500:
                    return self._read(status, answer, len(batch))
                reason = f"answered HTTP {status}"
        tries = f"in each of {self.config.retries + 1} tries" if self.config.retries else "in its one try"
        return [Failure(f"{reason} {tries}")] * len(batch)

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> tuple[int, bytes | Failure]:
        """Status and body; the body is read as it arrives, and no further than it may be long."""
        limit = self.config.max_response_bytes
        async with client.stream("POST", self.config.url, content=body, follow_redirects=False) as response:
            if not response.is_success:
                return response.status_code, b""
            if "content-encoding" in response.headers:  # a few bytes could unpack to any size
                return response.status_code, Failure("answered in a Content-Encoding that was not asked for")
            answer = b""
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > limit:
                    return response.status_code, Failure(f"answered more than {limit} bytes (max_response_bytes)")
            return response.status_code, answer

    @staticmethod
    def _read(status: int, answer: bytes | Failure, count: int) -> list[Outcome]:
        if isinstance(answer, Failure):
            return [answer] * count
        if 300 <= status < 400:
            return [Failure(f"answered HTTP {status}, a redirect, which is not followed,")] * count
        if not 200 <= status < 300:
            return [Failure(f"answered HTTP {status}")] * count
        try:
            tree: Any = json.loads(answer)
        except (ValueError, RecursionError):
            return [Failure(f"answered {shown(answer[:80].decode(errors='replace'))}, which is no JSON,")] * count
        if not isinstance(tree, dict) or "scores" not in tree:
            return [Failure(f'answered {shown(tree)} without "scores"')] * count
        return checked(tree["scores"], count)


def load_http(config: HttpReward, *, field: str) -> HttpComponent:
    """The component of a section. Raises UserError naming ``field`` if address or token are missing."""
    if not config.url:
        raise UserError(f"{field}.url is not set; give the address of the service")
    check_door(service(config, f"{field}.url"))
    if config.token_env is None:
        return HttpComponent(config, None)
    token = os.environ.get(config.token_env)
    if not token:
        name = config.token_env if config.token_env.isupper() else "a variable (not shown: it may be the token itself)"
        raise UserError(f"{field}.token_env names {name}, which is not set in the environment")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"{field}.token_env names {config.token_env}, whose value holds what a header cannot: take white space "
            "and non-ASCII characters out"
        )
    return HttpComponent(config, token)
