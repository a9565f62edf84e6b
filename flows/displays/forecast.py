"""What a run would need on hardware that is not here, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from flows.console import Console

if TYPE_CHECKING:
    from rlhf_core.costs.calibration import Deviation
    from rlhf_core.costs.forecast import Forecast

MOMENTS = {
    "generate": ("generate",),
    "score_rewards": ("passes",),
    "reference_logprobs": ("passes",),
    "ppo_update": ("update", "end of the update"),
}
"""Stage -> moments of a device's memory in it, of which the fuller one is shown."""


TERMS = {
    "products": "matrix products",
    "traffic": "reading and writing activations",
    "logits": "logits",
    "weights": "reading weights",
    "cache": "reading keys and values",
    "sampling": "sampling",
    "decoding_calls": "calls of the layers",
    "calls": "calls of the layers",
    "optimizer": "AdamW",
    "digest": "digests of the weights",
    "stage": "artifacts",
    "start": "beginning to decode",
    "collectives": "gathering and scattering shards",
    "files": "handing out weights as files",
}
"""Term of the cost model -> what a person calls it."""


def show_forecast(console: Console, found: Forecast) -> None:
    """Print seconds and memory by stage, a verdict, and how far predictions of this kind have been off."""
    console.print(_table(found))
    console.print(_verdict(found), highlight=False, soft_wrap=True)
    for line in _grounds(found):
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def _table(found: Forecast) -> Table:
    hardware, memory = found.hardware, found.memory
    nodes = f"{hardware.nodes} nodes of " if hardware.nodes > 1 else ""
    title = f"Forecast for {hardware.name}: {nodes}{hardware.devices_per_node} x {hardware.kind.title}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for stage in [*MOMENTS, "iteration"]:
        table.add_column(stage, justify="right")
    seconds = [_number(found.seconds[stage]) for stage in MOMENTS]
    table.add_row(Text("seconds", "bold"), *seconds, Text(_number(found.iteration_s), "bold"), end_section=True)
    shown = [memory.moments[max(names, key=memory.at)] for names in MOMENTS.values()]
    for part in dict.fromkeys(part for moment in shown for part in moment):
        table.add_row(part, *(_gigabytes(moment.get(part, 0.0)) for moment in shown), "")
    totals = [_gigabytes(sum(moment.values())) for moment in shown]
    peak = Text(_gigabytes(memory.peak_bytes), "bold")
    table.add_row(Text("GB of a device", "bold"), *totals, peak)
    return table


def _verdict(found: Forecast) -> Text:
    memory, device = found.memory, found.hardware.kind.memory_bytes
    slowest = max(MOMENTS, key=lambda stage: found.seconds[stage])
    share = f"{found.seconds[slowest] / found.iteration_s:.0%}".replace("%", " %")
    terms = found.terms[slowest]
    why = TERMS[max(terms, key=lambda name: terms[name])]
    time = f"about {_number(found.iteration_s)} s an iteration, {share} of it {slowest}, above all {why}"
    need = f"{_gigabytes(memory.peak_bytes)} of {_gigabytes(device)} GB a device"
    if found.fits:
        return Text.assemble(("fits:", "green"), f" {need}; {time}")
    stage = next(stage for stage, moments in MOMENTS.items() if memory.fullest in moments)
    return Text.assemble(("would not fit:", "yellow"), f" {stage} needs {need}; {_advice(found)}; if it did, {time}")


def _advice(found: Forecast) -> str:
    ways: list[str] = []
    if found.remedies:
        ways.append("with " + " ".join(f"--set {override}" for override in found.remedies))
    if found.devices_that_fit is not None:
        ways.append(f"as it is on {found.devices_that_fit.name}")
    if ways:
        return "it would " + ", or ".join(ways)
    return "no knob and no number of these devices would do: take a smaller model, or devices with more memory"


def _grounds(found: Forecast) -> list[str]:
    """Where the numbers come from, and what nobody has measured."""
    hardware, fitted, work = found.hardware, found.calibration, found.work
    lines = [
        found.lengths,
        f"fitted to {fitted.fitted_rows} measured times of {fitted.kind} ({fitted.dtype}); held-out error of seconds: "
        f"{_error(found.seconds_error)}; of memory: {_error(found.memory_error)}",
    ]
    if hardware.kind_name != fitted.kind:
        lines.append(
            f"{hardware.kind_name} has never been measured: its published peak and bandwidth, "
            f"and {fitted.kind}'s shares of them"
        )
    if work.policy.dtype != fitted.dtype:
        lines.append(f"{work.policy.dtype} has never been measured there: {fitted.dtype}'s shares of the peak")
    if hardware.kind.is_cpu:
        lines.append("of the process of the stages; Prefect and MLflow take some 0.35 GB beside (docs/performance.md)")
    if hardware.devices > 1:
        lines.append(
            "several devices have never been measured: collectives at 80 % of the published bandwidth, none of them "
            "overlapped; weights, gradients and moments of the update in equal shards, everything else in whole copies"
        )
    if len(work.rewards) < found.components:
        lines.append("reward functions and services are not predicted, nor models that two components share, twice")
    return lines


def _error(deviation: Deviation) -> str:
    if not deviation.count:
        return "nothing was held out"
    over = f"over {deviation.count} measured"
    if deviation.count == 1:
        return f"{deviation.worst:.0%}".replace("%", " %") + f" {over}"
    return f"median {deviation.median:.0%}, worst {deviation.worst:.0%}".replace("%", " %") + f" {over}"


def _gigabytes(num_bytes: float) -> str:
    if not num_bytes:
        return ""
    return (
        f"{num_bytes / 1e9:,.0f}"
        if num_bytes >= 99.5e9
        else f"{num_bytes / 1e9:.1f}"
        if num_bytes >= 1e9
        else f"{num_bytes / 1e9:.2g}"
    )


def _number(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 99.5 else f"{seconds:.3g}"
