"""What a flow does when a guard trips: tell, ask a person, or stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prefect.events import emit_event
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.calling import is_bare
from flows.links import leave_note, warn
from flows.outages import GOES_ON, outage
from flows.progress import watcher
from rlhf_core.contracts.errors import GuardStopError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.guards import Finding
from rlhf_core.store.address import shown
from tasks.lifecycle.guards import Guards
from tasks.lifecycle.start import keep_last_good

POLL_S = 10
"""Seconds between two looks at whether a paused run was resumed."""


TRIPPED = "rlhf.guard.tripped"
"""Event of Prefect that automations react to: deployments/kl-ceiling.yaml."""


class Decision(RunInput):
    """What a person answers in the form of a paused flow run. Resumed without an answer, it goes on."""

    decision: Literal["go on", "stop"] = "go on"


def announce(run: RunFolder, found: Sequence[Finding]) -> None:
    """Send Prefect an event for each guard that has just tripped: once, when its iteration is finished.

    A resumed run does not repeat it, so that what an automation has suspended can be resumed.
    """
    if is_bare():
        return
    for finding in found:
        if finding.is_new or finding.acts:
            resource = {
                "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
                "prefect.resource.name": str(flow_run.name),
                "rlhf.guard": finding.guard,
                "rlhf.guard.action": finding.action,
            }
            told = {"iteration": finding.iteration, "value": finding.value, "threshold": finding.limit}
            said = {"guard": finding.guard, "sentence": finding.sentence, "run": shown(run.path.resolve())}
            emit_event(TRIPPED, resource=resource, payload={**told, **said})


def obey(guards: Guards, iteration: int) -> None:
    """Do what the guards say of a finished iteration: go on, ask a person, or stop.

    Raises: GuardStopError if the run ends here; its last good state is kept.
    """
    found = guards.check(iteration)
    new = [finding.sentence for finding in found if finding.is_new and not finding.acts]
    if new:
        watcher().guards_spoke(iteration, new)
        for sentence in new:
            warn(sentence)
    acting = [finding for finding in found if finding.acts]
    if not acting:
        return
    reason = "a guard's action is stop"
    if all(finding.action == "pause" for finding in acting):
        reason = _ask(guards, acting)
    if not reason:
        guards.accept()
        return
    _stop(guards, acting, reason)


def _ask(guards: Guards, acting: Sequence[Finding]) -> str:
    """Why a person wants the run to stop, or nobody could be asked; empty to go on."""
    if PREFECT_API_URL.value() is not None and not is_bare():
        try:
            return _ask_on_server(guards, acting)
        except Exception as error:  # whatever failed, somebody else is asked
            outage.begins(GOES_ON, error)
    decision = watcher().decide([finding.sentence for finding in acting])
    if decision is None:
        return (
            "nobody could be asked: there is neither a Prefect server that answers and outlives this command "
            "(PREFECT_API_URL) nor a terminal"
        )
    return "" if decision else "a person decided to stop"


def _ask_on_server(guards: Guards, acting: Sequence[Finding]) -> str:
    """Pause the flow run until a person resumes it."""
    iteration, timeout_s = acting[0].iteration, guards.run.config.guards.pause_timeout_s
    text = "\n\n".join(finding.sentence for finding in acting)
    where = flow_run.ui_url or f"flow run {flow_run.id}"
    watcher().guards_spoke(iteration, [text, f"the run is paused for up to {timeout_s} s; resume it at {where}"])
    watcher().stage_started(iteration, "paused")
    warn(f"paused for a person's decision: {text}")
    form = Decision.with_initial_data(
        description=f"{text}\n\nThe run folder is `{shown(guards.run.path)}`.", decision="go on"
    )
    key = "-".join(["guards", str(iteration), *(finding.guard.replace("_", "-") for finding in acting)])
    try:
        answer = pause_flow_run(wait_for_input=form, timeout=timeout_s, poll_interval=POLL_S, key=key)
    except FlowPauseTimeout:
        return f"nobody decided within guards.pause_timeout_s {timeout_s}"
    return "" if answer is None or answer.decision == "go on" else "a person decided to stop"


def _stop(guards: Guards, acting: Sequence[Finding], reason: str) -> None:
    """Keep the last good state, say why and how to go on, and end the run. Raises GuardStopError."""
    run_dir, good = shown(guards.run.path), guards.last_good()
    if good is None:
        kept = "no state of this run satisfies the guards, the initial policy included, so none is kept as good"
    else:
        keep_last_good(str(guards.run.path), good)
        kept = f"the last good state, before iteration {good}, is kept in {run_dir}/checkpoints/last_good"
    names = ", ".join(finding.guard for finding in acting)
    lines = [
        *(finding.sentence for finding in acting),
        f"  the run is stopped: {reason}; {kept}",
        f"  go on all the same:          rlhf resume {run_dir} --accept-guards",
        f"  or with another threshold:   rlhf resume {run_dir} --set guards.{acting[0].guard}.threshold=...",
    ]
    guards.stop(names)
    leave_note("guard-stop", "\n\n".join(line.strip() for line in lines), f"Stopped by {names}")
    raise GuardStopError("\n".join(lines))
