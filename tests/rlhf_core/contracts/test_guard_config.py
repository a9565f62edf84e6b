"""The guards' section: what is on, what is refused, and that it decides no number of a run."""

from __future__ import annotations

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, config_digest
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.guard_config import Guard, GuardsConfig


def test_by_default_guards_only_warn() -> None:
    guards = GuardsConfig()
    assert {guard.action for guard in guards.active.values()} == {"warn"}
    assert not guards.may_stop
    off = {"kl_ceiling", "truncation_ceiling"}
    assert guards.active.keys() == {name for name in type(guards).model_fields if is_guard(name)} - off


def is_guard(name: str) -> bool:
    return isinstance(getattr(GuardsConfig(), name), Guard)


@pytest.mark.parametrize("action", ["stop", "pause"])
def test_a_guard_that_stops_or_pauses_may_stop_the_run_if_it_is_on(action: str) -> None:
    on = build_config({}, [f"guards.entropy_floor.action={action}"])
    assert on.guards.may_stop
    off = build_config({}, [f"guards.entropy_floor.action={action}", "guards.entropy_floor.threshold=null"])
    assert not off.guards.may_stop


@pytest.mark.parametrize(
    "override",
    ["guards.kl_ceiling.threshold=0", "guards.kl_ceiling.threshold=-1", "guards.distinct_floor.threshold=1.1",
     "guards.repetition_ceiling.threshold=2", "guards.length_correlation.threshold=1.01",
     "guards.truncation_ceiling.threshold=1", "guards.kl_ceiling.action=shout", "guards.kl_ceiling.patience=0",
     "guards.kl_ceiling.threshold=.inf", "guards.kl=1", "guards.pause_timeout_s=0",
     "guards.baseline_iterations=0"],
)  # fmt: skip
def test_what_can_never_be_meant_is_refused_by_its_name(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        build_config({}, [override])


def test_guards_are_no_part_of_a_runs_identity() -> None:
    changed = build_config({}, ["guards.kl_ceiling.threshold=3", "guards.kl_ceiling.action=stop"])
    assert config_digest(changed) == config_digest(RunConfig())
