"""Works that share nothing, in a thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from iteration import Bench
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.models.devices import side_by_side, using_threads


def seen() -> tuple[int, bool, str]:
    return torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name


@pytest.mark.parametrize(("threads", "share"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("with_grad", [True, False])
def test_each_has_its_share_of_threads_and_the_callers_grad_mode(threads: int, share: int, with_grad: bool) -> None:
    with using_threads(threads), torch.set_grad_enabled(with_grad):
        first, second = side_by_side([seen, seen])
        assert torch.get_num_threads() == threads
    assert first[:2] == second[:2] == (share, with_grad)
    assert first[2] != second[2]


def test_on_one_thread_they_come_one_after_the_other() -> None:
    order: list[int] = []
    with using_threads(1):
        found = side_by_side([lambda: order.append(0) or seen(), lambda: order.append(1) or seen()])
    assert order == [0, 1]
    assert found[0] == found[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_the_first_that_fails_raises(threads: int) -> None:
    def fail(word: str) -> Callable[[], Any]:
        def work() -> None:
            raise ValueError(word)

        return work

    with using_threads(threads), pytest.raises(ValueError, match="first"):
        side_by_side([fail("first"), fail("second")])
    with using_threads(threads), pytest.raises(ValueError, match="second"):
        side_by_side([seen, fail("second")])


def test_policy_and_critic_learn_the_same_beside_each_other(tiny_config: Callable[..., Any]) -> None:
    """On one thread or on two: the same but for the order of sums; on two, the same bits each time."""
    config = tiny_config(["policy.critic.kind=separate", "generation.max_new_tokens=12"])
    digests, weights = [], []
    for threads in (1, 2, 2):
        bench = Bench.of(config)
        assert bench.trainer.actor_critic.critic is not None
        assert bench.trainer.actor_critic.critic.trunk is not None
        batch = bench.until_experience()
        with using_threads(threads):
            bench.update(*batch)
        digests.append(bench.trainer.digest())
        weights.append(torch.cat([p.detach().flatten() for _, p in bench.trainer.actor_critic.named_parameters()]))
    assert digests[1] == digests[2]
    assert_close(weights[0], weights[1], **F32_MODEL)
