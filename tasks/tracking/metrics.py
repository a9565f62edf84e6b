"""The numbers of a run by the names that the tracker knows them by: all of them follow from files. Knows no tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_core.comparing.outcome import outcome
from rlhf_core.contracts.artifacts import Manifest
from rlhf_core.contracts.run_folder import RunFolder
from tasks.lifecycle.guards import guard_metrics

SENTINEL = "episode"
"""Sent with every iteration: the steps that have it have arrived."""
MAX_METRICS = 1000
"""MLflow takes no more at a time."""
MEGABYTE = 1e6
RESULT_STEP = 0
"""Step of what came out: MLflow draws a bar for each run where every step is 0, and else a line of a single point."""


def iteration_metrics(run: RunFolder, iteration: int) -> dict[str, float]:
    """All numbers of a committed iteration, by their MLflow names."""
    manifests = run.manifests(iteration)
    metrics: dict[str, float] = {SENTINEL: float(run.state_before(iteration + 1).episodes)}
    for stage, manifest in manifests.items():
        metrics |= manifest.metrics
        metrics[f"time/{stage}_s"] = manifest.timing["total_s"]
    metrics["time/iteration_s"] = sum(manifest.timing["total_s"] for manifest in manifests.values())
    epochs = metrics["update/num_steps"] / run.config.ppo.num_minibatches
    for stage, passes in (("generate", 1), ("score_rewards", 1), ("reference_logprobs", 1), ("ppo_update", epochs)):
        tokens = passes * metrics["rollout/num_tokens"]
        metrics[f"rate/{stage}_tokens_per_s"] = tokens / max(metrics[f"time/{stage}_s"], 1e-9)
    return metrics | system_metrics(manifests) | guard_metrics(run, iteration)


def system_metrics(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """What the process took of the machine during an iteration; nothing where an older release has committed it."""
    clocks = [manifest.timing for manifest in manifests.values()]
    if any("cpu_s" not in clock for clock in clocks):
        return {}
    seconds = math.fsum(clock["total_s"] for clock in clocks)
    found = {
        "system/process_cpu_percentage": 100 * math.fsum(clock["cpu_s"] for clock in clocks) / max(seconds, 1e-9),
        "system/process_memory_megabytes": max(clock["memory_bytes"] for clock in clocks) / MEGABYTE,
        "system/process_peak_memory_megabytes": max(clock["peak_memory_bytes"] for clock in clocks) / MEGABYTE,
    }
    if all("peak_gpu_memory_bytes" in clock for clock in clocks):
        peak = max(clock["peak_gpu_memory_bytes"] for clock in clocks)
        found["system/gpu_peak_memory_megabytes"] = peak / MEGABYTE
    return found


def batch_of_metrics(run: RunFolder, first: int, after: int) -> dict[int, dict[str, float]]:
    """Metrics of iterations from ``first``, as many as a batch takes; what is not finite is left out and counted."""
    found: dict[int, dict[str, float]] = {}
    for iteration in range(first, after):
        values = iteration_metrics(run, iteration)
        dropped = sum(not math.isfinite(value) for value in values.values())
        values["guard/dropped_metrics"] = float(dropped)
        if found and sum(map(len, found.values())) + len(values) > MAX_METRICS:
            break
        found[iteration] = {name: value for name, value in values.items() if math.isfinite(value)}
    return found


def missing_metrics(client: Any, run_id: str, values: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Those by their step that the tracker does not have, metric by metric: a batch may be taken in part."""
    names = sorted(set().union(*values.values()))
    had = {(name, metric.step) for name in names for metric in client.get_metric_history(run_id, name)}
    return {step: {k: v for k, v in of.items() if (k, step) not in had} for step, of in values.items()}


def result_metrics(run: RunFolder) -> dict[int, dict[str, float]]:
    """What came out, by its step: means of the last iterations, so that runs compare by more than their last one.

    Their names come first in the alphabet, which is how MLflow's pages order charts and choose what to compare by. Four
    digits of each, which its columns have room for.
    """
    if run.num_finished() == 0:
        return {}
    came = outcome(run, run.path.name)
    values = {
        "achieved/score": came.end["score"].mean,
        "achieved/kl": came.end["kl"].mean,
        "achieved/beta": came.end["beta"].mean,
        "achieved/entropy": came.end["entropy"].mean,
        "achieved/response_len": came.end["length"].mean,
        "achieved/best_score": came.best_score,
        "achieved/best_score_kl": came.best_kl,
        "achieved/iteration_s": came.seconds_per_iteration,
    }
    if came.gain_per_nat is not None:
        values["achieved/gain_per_nat"] = came.gain_per_nat
    return {RESULT_STEP: {name: float(f"{value:.4g}") for name, value in values.items()}}
