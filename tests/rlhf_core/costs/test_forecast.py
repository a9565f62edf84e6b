"""What a plan says of models that nobody has downloaded, on hardware that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_folders import llama_tree

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.costs.calibration import calibration
from rlhf_core.costs.forecast import BETWEEN_STAGES_S, USABLE, Forecast, forecast
from rlhf_core.costs.hardware import parse_hardware


def of(tree: dict[str, Any], hardware: str, *overrides: str) -> Forecast:
    return forecast(build_config(tree, list(overrides)), parse_hardware(hardware))


def test_one_billion_fits_one_h200_as_counted_by_hand(tmp_path: Path) -> None:
    """1.50 B of policy and 1.24 B of critic, 12 bytes each, 4 of gradients (16 micro-batches); frozen in two bytes."""
    found = of(llama_tree(tmp_path, "1B"), "1xH200")
    update = found.memory.moments["update"]
    policy, critic = 1_498_482_688, 1_498_482_688 - 128_256 * 2048
    assert update["trained weights"] == 4 * (policy + critic)
    assert update["AdamW's moments"] == 8 * (policy + critic)
    assert update["gradients"] == 4 * (policy + critic)
    assert (update["reference"], update["reward models"]) == (2 * policy, 2 * (critic + 2048))
    assert found.fits
    assert (found.remedies, found.devices_that_fit) == ([], None)
    stages = sum(found.seconds.values())
    assert found.iteration_s == pytest.approx(stages)
    assert found.seconds["between stages"] == BETWEEN_STAGES_S
    assert all(sum(found.terms[stage].values()) == pytest.approx(found.seconds[stage]) for stage in found.terms)


@pytest.mark.parametrize(("size", "hardware"), [("7B", "1xH200"), ("7B", "4x8xH100")])
def test_its_advice_makes_it_fit(tmp_path: Path, size: str, hardware: str) -> None:
    tree = llama_tree(tmp_path, size)
    found = of(tree, hardware)
    assert not found.fits
    assert found.remedies
    advised = of(tree, hardware, *found.remedies, *_consistent(found.remedies))
    assert advised.fits
    assert advised.memory.peak_bytes <= USABLE * advised.hardware.kind.memory_bytes
    for left_out in found.remedies:
        fewer = [override for override in found.remedies if override != left_out]
        assert not of(tree, hardware, *fewer, *_consistent(fewer)).fits, f"{left_out} is not needed"
    if found.devices_that_fit is not None:
        assert of(tree, found.devices_that_fit.name).fits


def _consistent(overrides: list[str]) -> list[str]:
    return ["policy.critic.init=null"] if "policy.critic.kind=shared" in overrides else []


def test_seventy_billion_fit_nowhere_and_it_says_so(tmp_path: Path) -> None:
    """A worker generates with a whole copy: 141 GB of bfloat16, 282 of float32."""
    found = of(llama_tree(tmp_path, "70B"), "4x8xH100")
    assert not found.fits
    assert (found.remedies, found.devices_that_fit) == ([], None)


def test_more_devices_need_less_each_and_take_less_time(tmp_path: Path) -> None:
    tree = llama_tree(tmp_path, "1B")
    one, eight, nodes = (of(tree, name) for name in ("1xH100", "8xH100", "4x8xH100"))
    for less, more in ((eight, one), (nodes, eight)):
        assert less.memory.at("update") < more.memory.at("update")
        assert less.seconds["reference_logprobs"] < more.seconds["reference_logprobs"]
    assert eight.seconds["ppo_update"] < one.seconds["ppo_update"]


def test_an_h200_is_measured_and_an_h100_stands_on_it(tmp_path: Path) -> None:
    tree = llama_tree(tmp_path, "1B")
    h200, h100 = of(tree, "H200"), of(tree, "H100")
    assert h200.calibration == h100.calibration == calibration("H200")
    assert h100.seconds["generate"] > h200.seconds["generate"], "its memory is slower"
    assert h100.terms["ppo_update"]["products"] == pytest.approx(h200.terms["ppo_update"]["products"])


def test_arithmetic_that_was_never_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bfloat16 was never measured on CPU2; set policy\.dtype"):
        of(llama_tree(tmp_path, "1B"), "CPU2")
