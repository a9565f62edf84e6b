"""What a config would need on some hardware: memory of a device, seconds of an iteration, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.costs.calibration import Calibration, Deviation, calibration, points
from rlhf_core.costs.hardware import Hardware
from rlhf_core.costs.memory import DeviceMemory, Overhead, device_memory
from rlhf_core.costs.reading import read_workload
from rlhf_core.costs.seconds import stage_terms
from rlhf_core.costs.workload import LORA_RANK, Workload

USABLE: Final = 0.92
"""Of a device's memory: the rest goes to its driver's context and to fragments. Assumed."""
BETWEEN_STAGES_S: Final = 0.15
"""Prefect, MLflow and arithmetic, an iteration: measured on CPU2 (docs/performance.md)."""
HOST_THREADS: Final = 16
"""Of a GPU's host, where num_threads does not say: what the measured one had."""
MOST_DEVICES: Final = 1024

Remedy = Callable[[Workload, int], tuple[str, Workload]]


def _fewer_decoded(whole: Workload, devices: int) -> tuple[str, Workload]:
    rows = max(1, whole.on(devices).decoding_rows // 4)
    return f"generation.batch_size={rows}", replace(whole, decoding_rows=rows)


REMEDIES: Final[tuple[Remedy, ...]] = (
    lambda w, _: ("ppo.micro_batch_size=1", replace(w, micro_batch_rows=1)),
    lambda w, _: ("policy.gradient_checkpointing=true", replace(w, recomputes=True)),
    lambda w, _: ("frozen_models=cpu", replace(w, frozen_stay=False)),
    _fewer_decoded,
    lambda w, _: ("policy.critic.kind=shared", w.with_shared_critic()),
    lambda w, _: (f"policy.lora.rank={LORA_RANK}", w.with_lora()),
)
"""(workload of all devices, number of them) -> an override that saves memory, and what it makes; mild ones first."""


@dataclass(frozen=True)
class Forecast:
    """A run's iteration on some hardware."""

    hardware: Hardware
    work: Workload
    """Of one device."""
    memory: DeviceMemory
    seconds: dict[str, float]
    """Stage (and what lies between) -> seconds."""
    iteration_s: float
    terms: dict[str, dict[str, float]]
    """Stage -> term -> seconds."""
    calibration: Calibration
    seconds_error: Deviation
    memory_error: Deviation
    lengths: str
    """Where lengths come from, in words."""
    remedies: list[str]
    """Overrides that would make it fit, all together; empty if it fits, or if nothing does."""
    components: int
    """Of the reward, models or not."""
    devices_that_fit: Hardware | None
    """More of the same, unchanged; None if it fits, or if no number of them would do."""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.peak_bytes <= USABLE * self.hardware.kind.memory_bytes


def forecast(config: RunConfig, hardware: Hardware) -> Forecast:
    """Predict an iteration; reads config.json files, loads no weights, and needs none.

    Args:
        config: of the run.
        hardware: that it would have.
    Raises: UserError if a model's config does not load, lengths are not known, or this arithmetic is not known there.
    """
    threads = config.num_threads or (2 if hardware.kind.is_cpu else HOST_THREADS)
    whole, lengths = read_workload(config, threads)
    missing = {m.dtype for m in (whole.policy, whole.reference, *whole.rewards)} - set(hardware.kind.flop_per_s)
    if missing:
        raise UserError(
            f"--hardware {hardware.name}: {', '.join(sorted(missing))} was never measured on {hardware.kind_name}; "
            "set policy.dtype, reference.dtype and reward.components.0.dtype to float32"
        )
    fitted = calibration(hardware.kind_name)
    overhead = fitted.overhead
    work = whole.on(hardware.devices)
    terms = {
        stage: {name: fitted.coefficients[name] * ideal for name, ideal in each.items()}
        for stage, each in stage_terms(work, hardware, threads).items()
    }
    seconds = {stage: sum(each.values()) for stage, each in terms.items()}
    pair = seconds["score_rewards"], seconds["reference_logprobs"]
    together = max(pair) if hardware.kind.is_cpu else sum(pair)
    memory = device_memory(work, hardware, overhead)
    fits = memory.peak_bytes <= USABLE * hardware.kind.memory_bytes
    errors = fitted.deviations(points())
    return Forecast(
        hardware=hardware,
        work=work,
        memory=memory,
        seconds={**seconds, "between stages": BETWEEN_STAGES_S},
        iteration_s=seconds["generate"] + together + seconds["ppo_update"] + BETWEEN_STAGES_S,
        terms=terms,
        calibration=fitted,
        seconds_error=errors[0],
        memory_error=errors[1],
        lengths=lengths,
        components=len(config.reward.components),
        remedies=[] if fits else _remedies(whole, hardware, overhead),
        devices_that_fit=None if fits else _more_devices(whole, hardware, overhead),
    )


def _overflows(whole: Workload, hardware: Hardware, overhead: Overhead) -> bool:
    return _peak(whole, hardware, overhead) > USABLE * hardware.kind.memory_bytes


def _peak(whole: Workload, hardware: Hardware, overhead: Overhead) -> float:
    return device_memory(whole.on(hardware.devices), hardware, overhead).peak_bytes


def _remedies(whole: Workload, hardware: Hardware, overhead: Overhead) -> list[str]:
    """As few of the overrides as make it fit, the mild ones first; none if all of them do not."""
    taken: list[Remedy] = []
    for remedy in REMEDIES:
        without = _changed(whole, taken, hardware)[1]
        changed = _changed(whole, [*taken, remedy], hardware)[1]
        if _peak(changed, hardware, overhead) < _peak(without, hardware, overhead):
            taken.append(remedy)
        if not _overflows(changed, hardware, overhead):
            break
    else:
        return []
    for remedy in list(taken):
        fewer = [other for other in taken if other is not remedy]
        if not _overflows(_changed(whole, fewer, hardware)[1], hardware, overhead):
            taken = fewer
    return _changed(whole, taken, hardware)[0]


def _changed(whole: Workload, remedies: list[Remedy], hardware: Hardware) -> tuple[list[str], Workload]:
    overrides: list[str] = []
    for remedy in remedies:
        override, whole = remedy(whole, hardware.devices)
        overrides.append(override)
    return overrides, whole


def _more_devices(whole: Workload, hardware: Hardware, overhead: Overhead) -> Hardware | None:
    more = (h for h in _doubled(hardware) if not _overflows(whole, h, overhead))
    return None if hardware.kind.is_cpu else next(more, None)


def _doubled(hardware: Hardware) -> Iterator[Hardware]:
    larger = hardware.times(2)
    while larger.devices <= MOST_DEVICES:
        yield larger
        larger = larger.times(2)
