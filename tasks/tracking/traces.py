"""The extreme responses of an iteration as MLflow traces, for people to read and to judge. Knows no tracker.

Of the iterations that are due, the responses with the highest score, the lowest score, the largest KL and the largest
change against the reference, and where a prompt is answered more than once, the lowest score on the prompt of the
highest, to be compared with it: up to five traces, one span each. A trace's id follows from the run and the response,
and to send one again changes nothing: so each is there once, whatever is killed. What people say about them comes
back with ``rlhf feedback``.

While the run goes on, all of this takes at most a hundredth of the time that has passed: what does not fit waits, at
the longest until the end of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from rlhf_core.contracts.errors import RlhfError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import artifact_table, last_of_user
from rlhf_core.selection import Selection, select_samples
from rlhf_core.tables import RunTables, pc
from tasks.tracking.outbox import Ledger, reason
from tasks.tracking.refusals import is_final

logger = logging.getLogger(__name__)

SHARE: Final = 0.01
"""Of a run's time, at most, while it trains."""
FIRST_S: Final = 0.2
"""What the traces of an iteration are expected to take, before any were sent."""
EXTREMES: Final = {
    "highest score": Selection(by="score"),
    "lowest score": Selection(by="score", lowest=True),
    "largest KL": Selection(by="kl"),
    "most changed": Selection(by="change"),
}
SAME_PROMPT: Final = "lowest score on the prompt of the highest"
RUN_TAG, SAMPLE_TAG, EXTREME_TAG = "rlhf.trace_of", "rlhf.sample_id", "rlhf.extreme"
"""Tags of a trace: our own name of the run, the response, and why it was chosen."""
NUMBERS: Final = ("score", "kl", "change", "rlhf_reward", "num_tokens")
"""Columns of a response that a trace shows."""
_HEX: Final = 32


class Traces(Protocol):
    """What is asked of a tracker. Each call with the same traces again changes nothing."""

    def start(self, trace: Mapping[str, Any]) -> None:
        """Make a trace that names the logged model that has answered."""
        ...

    def log(self, spans: Sequence[Mapping[str, Any]]) -> None:
        """Send the spans of many traces at once."""
        ...


class TrackedTraces:
    """The traces of a run.

    Args:
        run: the run folder.
        ledger: says which iterations have theirs.
        tracker: takes them.
        traced: writes down, durably, below which iteration all have arrived.
    """

    def __init__(self, run: RunFolder, ledger: Ledger, tracker: Traces, traced: Callable[[int], None]) -> None:
        self.run, self._outbox, self._next = run, ledger.outbox, ledger.traced
        self._tracker, self._traced = tracker, traced
        self._began, self._spent_s, self._expected_s = time.monotonic(), 0.0, FIRST_S
        self._is_refused = False

    def send_due(self, finished: int, models: Mapping[int, str]) -> None:
        """Send the traces of finished iterations, as far as their share of the time goes.

        Args:
            finished: iterations below are committed.
            models: iteration of a checkpoint -> its logged model, which has answered in that iteration.
        """
        while self._spent_s + self._expected_s <= SHARE * (time.monotonic() - self._began):
            if not self._send_next(finished, models):
                return

    def send_rest(self, finished: int, models: Mapping[int, str]) -> None:
        """Send all that is left."""
        while self._send_next(finished, models):
            pass

    def _send_next(self, finished: int, models: Mapping[int, str]) -> bool:
        """Send one iteration's; returns whether there was one."""
        due = next((i for i in due_iterations(self.run) if self._next <= i < finished), None)
        if due is None or self._is_refused:
            return False
        began = time.monotonic()
        try:
            self._send(due, models.get(due))
        except RlhfError as error:  # of the run folder: what is damaged there is not why the rest does not arrive
            logger.warning("no traces of iteration %d: %s", due, reason(error))
        except Exception as error:
            if not (is_final(error) or isinstance(error, NotImplementedError)):
                raise
            self._is_refused = True  # an older server, or a permission: the rest of the run does not wait for it
            logger.warning("MLflow takes no traces (%s): the run goes on without them", reason(error))
            return False
        self._next = due + 1
        self._traced(self._next)
        self._expected_s = time.monotonic() - began
        self._spent_s += self._expected_s
        return True

    def _send(self, iteration: int, model_id: str | None) -> None:
        now_ms = time.time_ns() // 1_000_000
        rows = extreme_responses(self.run, iteration)
        took_ms = _sampling_ms(self.run, iteration)
        if model_id is not None:
            for row in rows:
                self._tracker.start(_info(self._outbox, row, model_id, now_ms, took_ms))
        self._tracker.log([_span(self._outbox, row, now_ms, took_ms) for row in rows])


def due_iterations(run: RunFolder) -> list[int]:
    """The iterations of a run whose extremes become traces: one in ``trace_every``, and the last one."""
    every, last = run.config.tracking.trace_every, run.config.num_iterations - 1
    return [] if every is None else sorted({*range(0, last + 1, every), last})


def extreme_responses(run: RunFolder, iteration: int) -> list[dict[str, Any]]:
    """The extreme responses of an iteration, each once, with the reasons why it was chosen as ``extreme``."""
    samples = RunTables(run).samples([iteration]).arrow()
    prompts = {row["prompt_id"]: row["messages"] for row in _prompts(run, iteration)}
    chosen: dict[str, dict[str, Any]] = {}
    for extreme, selection in EXTREMES.items():
        (row,) = select_samples([samples], selection).slice(0, 1).to_pylist()
        kept = chosen.setdefault(row["sample_id"], row | {"extreme": [], "messages": prompts[row["prompt_id"]]})
        kept["extreme"].append(extreme)
    best = next(iter(chosen.values()))
    same = samples.filter(pc.equal(samples["prompt_id"], best["prompt_id"]))
    (row,) = select_samples([same], EXTREMES["lowest score"]).slice(0, 1).to_pylist()
    if row["score"] < best["score"]:
        kept = chosen.setdefault(row["sample_id"], row | {"extreme": [], "messages": best["messages"]})
        kept["extreme"].append(SAME_PROMPT)
    return list(chosen.values())


def trace_id(outbox: str, sample_id: str) -> str:
    """The id of a response's trace: the same at every try."""
    return f"tr-{hashlib.sha256(f'{outbox} {sample_id}'.encode()).hexdigest()[:_HEX]}"


def _prompts(run: RunFolder, iteration: int) -> list[dict[str, Any]]:
    return artifact_table(run, iteration, "sample_prompts").select(["prompt_id", "messages"]).to_pylist()


def _sampling_ms(run: RunFolder, iteration: int) -> int:
    manifest = run.manifest("generate", iteration)
    return max(1, round(1000 * manifest.timing["total_s"])) if manifest is not None else 1


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the policy was asked: ``messages``, which MLflow shows as a chat, or a plain text as ``prompt``."""
    return {"messages": row["messages"]} if row["messages"] else {"prompt": row["prompt_text"]}


def _preview(row: Mapping[str, Any]) -> str:
    """What a list of traces shows of the request: of a chat the last message of the user."""
    return last_of_user(row["messages"]) or json.dumps(_asked(row), ensure_ascii=False)


def _tags(outbox: str, row: Mapping[str, Any]) -> dict[str, str]:
    tags = {RUN_TAG: outbox, SAMPLE_TAG: row["sample_id"], EXTREME_TAG: ", ".join(row["extreme"])}
    numbers = {name: float(row[name]) for name in NUMBERS}
    tags |= {f"rlhf.{name}": f"{value:.4g}" for name, value in numbers.items() if math.isfinite(value)}
    return tags | {"rlhf.iteration": str(row["iteration"]), "rlhf.finish_reason": row["finish_reason"]}


def _span(outbox: str, row: Mapping[str, Any], now_ms: int, took_ms: int) -> dict[str, Any]:
    """A response as the only span of its trace, as MLflow's Span.from_dict reads it."""
    own = trace_id(outbox, row["sample_id"])
    attributes: dict[str, Any] = {
        "mlflow.traceRequestId": own,
        "mlflow.spanType": "LLM",
        "mlflow.spanInputs": _asked(row),
        "mlflow.spanOutputs": {"response": row["response_text"]},
        **{name: row[name] for name in ("iteration", "sample_id", "finish_reason", *NUMBERS)},
        "components": {part["name"]: part["score"] for part in row["components"]},
        **{f"mlflow.traceTag.{name}": value for name, value in _tags(outbox, row).items()},
    }
    return {
        "name": "response",
        "trace_id": own,
        "span_id": own[-16:],
        "parent_span_id": None,
        "start_time_unix_nano": (now_ms - took_ms) * 1_000_000,
        "end_time_unix_nano": now_ms * 1_000_000,
        "status": {"code": "OK"},
        "attributes": {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items()},
    }


def _info(outbox: str, row: Mapping[str, Any], model_id: str, now_ms: int, took_ms: int) -> dict[str, Any]:
    """What is known of a trace as a whole, as the arguments of MLflow's TraceInfo."""
    return {
        "trace_id": trace_id(outbox, row["sample_id"]),
        "request_time": now_ms - took_ms,
        "execution_duration": took_ms,
        "request_preview": _preview(row)[:1000],
        "response_preview": json.dumps({"response": row["response_text"]}, ensure_ascii=False)[:1000],
        "trace_metadata": {"mlflow.modelId": model_id},
        "tags": _tags(outbox, row),
    }
