"""What Prefect shows of a run while it is going: a progress bar, and one page that is written over and over.

    <run>-progress    how many of its iterations are finished
    <run>             the newest iterations, a few responses, the way to MLflow and files; at the end the result

Two artifacts a flow run, however long it is. They are written by a thread of their own, at most every ``EVERY_S``, so
that no iteration waits; what does not arrive is left out: the run folder has it all, and the next page is newer.
The log of the flow run has a line an iteration, by the same thread.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate, LogCreate
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from flows.calling import is_bare
from flows.markdown import Metrics, code, edges, escaped, log_line, moved, result_page, run_page
from flows.outages import api_answers
from flows.progress import Silent
from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_secrets
from rlhf_core.inspection import before_and_after, extension_sentence, last_of_user
from rlhf_core.store.address import shown
from tasks.tracking.metrics import iteration_metrics
from tasks.tracking.tracker import Tracker

EVERY_S = 10.0
"""At least between two writings."""
CLOSE_S = 3.0
"""How long the end of a run waits for its page."""
BRIEF_S = 0.3
"""The same, where a signal or an error ends it."""
RECENT = 12
"""Iterations shown."""
SAID = 3
"""Sentences of guards shown."""
logger = logging.getLogger("rlhf")


class RunPage(Silent):
    """Watches a run for Prefect's page of this flow run. Does nothing where there is no flow run.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.tracker: Tracker | None = None
        """Set once there is one, for the way to it."""
        self._standing = "running"
        self._read: dict[int, Metrics] = {}
        self._guards: list[str] = []
        self._lines: queue.SimpleQueue[LogCreate] = queue.SimpleQueue()
        self._changed, self._over = threading.Event(), threading.Event()
        self._ids: dict[str, UUID] = {}
        self._has_warned = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Begin to write."""
        if not is_bare():
            target = contextvars.copy_context().run  # with this flow run, and the settings of its API
            self._thread = threading.Thread(target=target, args=(self._work,), name="run page", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the result, or why there is none; wait a bounded time for it."""
        if self._thread is None:
            return
        self._standing = "finished" if error is None else _why(error)
        if error is None and (finished := self.run.num_finished()):
            self._say(f"finished: {moved(*self._edges(finished))}; look into it with  rlhf inspect {self._folder}")
        self._over.set()
        self._changed.set()
        self._thread.join(CLOSE_S if error is None or isinstance(error, Exception | Pause) else BRIEF_S)

    def iteration_finished(self, iteration: int, metrics: Metrics) -> None:
        """There is something new to show; a line of it in the log."""
        if self._thread is not None:
            self._say(log_line(iteration, self.run.config.num_iterations, metrics))
            self._changed.set()

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        """Show what they said."""
        self._guards = [*self._guards, *sentences][-SAID:]
        self._changed.set()

    def warned(self, sentence: str) -> None:
        """Told elsewhere."""

    def _say(self, line: str) -> None:
        """A line in the flow run's log at INFO; also where the process's own loggers are quieter, as in ``rlhf``."""
        log = get_run_logger()
        if log.isEnabledFor(logging.INFO):
            log.info(line)
        elif get_current_settings().logging.to_api.enabled:
            flow_run_id, now = UUID(str(flow_run.id)), datetime.now(UTC)
            known = {"name": log.name, "level": logging.INFO, "flow_run_id": flow_run_id, "timestamp": now}
            self._lines.put(LogCreate(message=line, **known))

    def _send_lines(self, client: SyncPrefectClient) -> None:
        lines = [self._lines.get() for _ in range(self._lines.qsize())]
        if lines:
            client.create_logs(lines)

    def _work(self) -> None:
        try:
            with get_client(sync_client=True) as client:
                while not self._over.is_set():
                    self._attempt(client)
                    self._over.wait(EVERY_S)
                    self._changed.wait()
                    self._changed.clear()
                self._attempt(client)
        except Exception as error:  # the client itself
            self._warn(error)

    def _attempt(self, client: SyncPrefectClient) -> None:
        for send in (self._send_lines, self._write):
            try:
                send(client)
            except Exception as error:  # whatever it is, the run does not need it, and the next page may arrive
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Say once that Prefect does not take the page; an API that is gone is told by whoever needs it."""
        if not self._has_warned and api_answers():
            self._has_warned = True
            reason = without_secrets(str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("Prefect has no new page of %s: %s; the run goes on", shown(self.run.path), reason)

    def _write(self, client: SyncPrefectClient) -> None:
        finished, of = self.run.num_finished(), self.run.config.num_iterations
        is_done = self._standing == "finished"
        page = self._result(finished) if is_done else self._newest(finished)
        slug = key_of(self.run.path)
        self._put(client, f"{slug}-progress", "progress", 100.0 * finished / of, f"{finished} of {of} iterations")
        told = moved(*self._edges(finished)) if finished else "its first iteration is not finished"
        self._put(client, slug, "markdown", page, f"Run {self.run.path.name}: {told}")

    def _put(self, client: SyncPrefectClient, key: str, kind: str, data: Any, description: str) -> None:
        if key in self._ids:
            # as client.update_artifact does, but for its event, which would be kept with the whole page in it
            new = ArtifactUpdate(data=data, description=description).model_dump(mode="json", exclude_unset=True)
            client.request("PATCH", "/artifacts/{id}", json=new, path_params={"id": self._ids[key]})
            return
        made = ArtifactCreate(
            key=key, type=kind, data=data, description=description, flow_run_id=UUID(str(flow_run.id))
        )
        self._ids[key] = client.create_artifact(made).id

    def _facts(self, finished: int) -> list[str]:
        config, folder = self.run.config, self._folder
        how_far = f"**{finished} of {config.num_iterations} iterations** · {escaped(self._standing)}"
        written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        lines = [f"{how_far} · written {written}", f"folder {code(folder)}"]
        if finished:
            lines.insert(1, f"**{moved(*self._edges(finished))}**")
            newest = f"{folder}/iterations/{finished - 1:06d}"
            lines.append(f"artifacts {code(newest)} · look with {code(f'rlhf inspect {folder}')}")
        if self.tracker is not None and (run_id := self.tracker.run_id) is not None:
            page, uri = self.tracker.page, self.tracker.uri
            runs = f"--tracking-uri {uri}" if "://" in folder else f"--runs {Path(folder).parent}"
            file = f"MLflow run {code(run_id)} in {code(uri)} · open with {code(f'rlhf ui {runs}')}"
            lines.append(f"[MLflow run]({page})" if page else file)
        lines += [extension_sentence(extension) for extension in self.run.extensions]
        if self._standing not in ("running", "finished"):
            lines.append(f"go on with {code(f'rlhf resume {folder}')}")
        return lines

    @property
    def _folder(self) -> str:
        return shown(self.run.path.resolve())

    def _edges(self, finished: int) -> tuple[list[Metrics], list[Metrics]]:
        """Metrics of the first and of the last few iterations; what was read is kept."""
        first, last = edges(finished)
        read = self._metrics({*first, *last, *range(max(0, finished - RECENT), finished)})
        return [read[i] for i in first], [read[i] for i in last]

    def _metrics(self, wanted: Iterable[int]) -> dict[int, Metrics]:
        read = self._read = {i: self._read.get(i) or iteration_metrics(self.run, i) for i in wanted}
        return read

    def _newest(self, finished: int) -> str:
        recent = self._metrics(range(max(0, finished - RECENT), finished))
        samples = a_few(self.run, finished - 1) if finished else []
        return run_page(self._facts(finished), recent, samples, self._guards)

    def _result(self, finished: int) -> str:
        return result_page(self._facts(finished), *self._edges(finished), before_and_after(self.run))


def key_of(path: Path) -> str:
    """The name of a folder as Prefect takes it for a key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "run"


def _why(error: BaseException) -> str:
    """How a run has ended that is not finished."""
    if isinstance(error, Pause):
        return "suspended; resumed here, it goes on"
    if isinstance(error, KeyboardInterrupt):
        return "stopped by a signal"
    return f"stopped: {without_secrets(str(error).strip() or type(error).__name__).splitlines()[0]}"


def a_few(run: RunFolder, iteration: int) -> list[dict[str, Any]]:
    """The responses of an iteration with the best, the middle and the worst score."""
    manifests = run.manifests(iteration)

    def rows(stage: str, *columns: str) -> list[dict[str, Any]]:
        return read_artifact(run.path, manifests[stage].artifact).select(list(columns)).to_pylist()

    shaped = sorted(rows("shape_rewards", "sample_id", "score", "kl"), key=lambda row: row["score"], reverse=True)
    chosen = [shaped[i] for i in sorted({0, len(shaped) // 2, len(shaped) - 1})] if shaped else []
    responses = {row["sample_id"]: row for row in rows("generate", "sample_id", "prompt_id", "response_text")}
    prompts = {row["prompt_id"]: row for row in rows("sample_prompts", "prompt_id", "prompt_text", "messages")}
    found = [row | responses[row["sample_id"]] for row in chosen]
    return [row | {"prompt_text": _asked(prompts[row["prompt_id"]])} for row in found]


def _asked(prompt: Mapping[str, Any]) -> str:
    """What a person has asked: of a chat, the last message of the user."""
    return last_of_user(prompt["messages"]) or prompt["prompt_text"]
