"""Work that shares nothing with what is computed beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from iteration import Bench
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.models.devices import beside, using_threads


def seen() -> tuple[int, bool, str]:
    return torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name


@pytest.mark.parametrize(("threads", "share"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("with_grad", [True, False])
def test_each_has_its_share_of_threads_and_the_callers_grad_mode(threads: int, share: int, with_grad: bool) -> None:
    with using_threads(threads), torch.set_grad_enabled(with_grad):
        with beside(seen) as other:
            body = seen()
        work = other()
        assert torch.get_num_threads() == threads
    assert body[:2] == work[:2] == (share, with_grad)
    assert body[2] != work[2]


def test_they_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    with using_threads(2):
        with beside(meeting.wait) as other:
            here = meeting.wait()
        assert {here, other()} == {0, 1}


def test_on_one_thread_the_work_comes_after_the_body() -> None:
    order: list[str] = []
    with using_threads(1):
        with beside(lambda: order.append("work") or seen()) as other:
            order.append("body")
            body = seen()
        assert order == ["body"]
        assert other() == body
    assert order == ["body", "work"]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_fails_is_raised(threads: int) -> None:
    def fail() -> None:
        raise ValueError("work")

    with using_threads(threads):
        with pytest.raises(ValueError, match="body"), beside(fail):
            raise ValueError("body")
        with beside(fail) as other:
            pass
        with pytest.raises(ValueError, match="work"):
            other()
        assert torch.get_num_threads() == threads


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
