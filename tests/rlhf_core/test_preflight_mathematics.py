"""Settings of the mathematics that the pre-flight refuses to a new run, or notes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.preflight import preflight

Configure = Callable[..., RunConfig]
FAST = {
    "kl.horizon=1.6": "kl.horizon 1.6 is below prompts.batch_size 8: β moves by up to 100% an iteration, and vanishes "
    "while the KL is still near 0; use kl.horizon 8 or more (20 %)",
    "kl.horizon=7.9": "kl.horizon 7.9 is below prompts.batch_size 8",
    "kl={controller: log_pi, integral_gain: 1.5}": "kl.integral_gain 1.5 is above 1: log β moves by up to 0.3",
}


@pytest.mark.parametrize(("override", "said"), FAST.items(), ids=FAST.keys())
def test_a_controller_that_is_too_fast(override: str, said: str, tiny_config: Configure) -> None:
    config = tiny_config([override])
    with pytest.raises(UserError) as refused:
        preflight(config)
    assert [problem for problem in refused.value.problems if said in problem]
    assert [note for note in preflight(config, begun=True).notes if said in note], "an old run opens, and says so"


@pytest.mark.parametrize("override", ["kl.horizon=8", "kl={controller: log_pi, integral_gain: 1}", "kl.coef=0.2"])
def test_nothing_is_said_of_what_is_usual(override: str, tiny_config: Configure) -> None:
    assert not [note for note in preflight(tiny_config([override])).notes if "kl." in note or "whiten" in note]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("kl.estimator=k3", "kl.estimator is k3: as a penalty in the reward it has not the gradient of the KL"),
        ("shaping.whiten_rewards=true", "a response's sum depends on its length"),
    ],
)
def test_what_may_surprise_is_noted(override: str, said: str, tiny_config: Configure) -> None:
    assert [note for note in preflight(tiny_config([override])).notes if said in note]
