"""The training chain: when there are new prompts or a new reward model, train, evaluate, and promote what passes.

    look ── nothing new ──▶ the end
      └──▶ train ──▶ evaluate on held-out prompts ──▶ gate ──▶ the alias `production`, or why not

Stopped anywhere, the same call goes on: the training from its last committed stage, the evaluation from its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from flows.artifacts import key_of
from flows.calling import call, flow_body
from flows.evaluate import measure
from flows.links import leave_note, run_name
from flows.markdown import escaped, table
from flows.ppo import SIDE_BY_SIDE, iterate
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.trust import accept_config
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.evaluation.gate import Check, Gate
from rlhf_core.store.address import on_disk
from tasks.lifecycle.chain import (
    check_promotable,
    close_link,
    holding_chain,
    next_link,
    promote,
    with_registered_reward,
)
from tasks.lifecycle.start import check_resumable, start_run


@flow(
    name="chain",
    flow_run_name=run_name("chain", "runs"),
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
    result_serializer="json",
)
def chain(config: RunConfig, runs: str, gate: Gate, reward_model: str | None = None) -> str:
    """Train if prompts, models or config are new; evaluate; promote the policy if it passes the gate.

    Args:
        config: of the training.
        runs: folder of the chain: its record, and a run folder for each training.
        gate: held-out prompts, and what the policy must show on them.
        reward_model: NAME@ALIAS of a reward model in MLflow's registry; default: the config's own.
    Returns: what became of it, in a sentence.
    """
    with flow_body() as ended_with:
        check_promotable(config)
        with holding_chain(on_disk(runs, "runs")):
            config = with_registered_reward(config, Path(runs), reward_model)
            found = next_link(Path(runs), config, gate)
            if found is None:
                return ended_with(f"nothing new since the last link of {runs}: prompts, models and config are the same")
            link, news = found
            run_dir = str(Path(runs) / link.run)
            train_link(config, run_dir)
            outcome, checks = judge(gate, run_dir)
            close_link(Path(runs), outcome)
        leave_note(f"{key_of(Path(run_dir))}-gate", gate_page(run_dir, news, checks, outcome), outcome)
        return ended_with(outcome)


def train_link(config: RunConfig, run_dir: str) -> None:
    """Begin the training of a link, or go on with it."""
    if (Path(run_dir) / "run.json").is_file():
        accept_config(config)
        check_resumable(run_dir, accept_drift=False)
    else:
        start_run(config, run_dir)
    iterate(run_dir)


def judge(gate: Gate, run_dir: str) -> tuple[str, Sequence[Check]]:
    """Evaluate a run's newest checkpoint, and promote it if it passes. Returns: what became of it, and why."""
    policies: Mapping[str, Any] = EvaluationFolder.open(Path(measure(gate.request(run_dir), None))).summary()[
        "policies"
    ]
    (newest,) = policies
    checks = gate.judge(policies[newest])
    if all(check.passed for check in checks):
        version = call(promote, run_dir, int(newest), gate.alias)
        return f"promoted: {version} is {gate.alias}", checks
    why = "; ".join(check.sentence for check in checks if not check.passed)
    return f"not promoted, {gate.alias} stays what it was: {why}", checks


def gate_page(run_dir: str, news: Sequence[str], checks: Sequence[Check], outcome: str) -> str:
    """What Prefect shows of a link."""
    rows = [
        (check.name, f"{check.mean:.3f}", f"{check.bound:.3f}", check.wanted, "yes" if check.passed else "**no**")
        for check in checks
    ]
    header = ("", "mean", "unfavourable end of its interval", "wanted", "passed")
    lines = [f"**{escaped(outcome)}**", table(header, rows), f"run {escaped(run_dir)}", "What was new:"]
    return "\n\n".join([*lines, *(f"- {escaped(what)}" for what in news)]) + "\n"
