"""What a run's config decides once: who holds the weights, and who computes the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.session.policy_state import PolicyState
from tasks.session.whole_stages import WholeStages

if TYPE_CHECKING:
    from tasks.session.session import Session


def policy_state(session: Session) -> PolicyState:
    """Where policy, critic and optimizer are: in this process, with copies for workers, or in ranks."""
    execution = session.run.config.execution
    if execution.update.is_launched:
        from tasks.ranks.policy import RankedPolicyState

        return RankedPolicyState(session)
    if execution.is_sharded:
        from tasks.shards.handed_policy import HandedPolicyState

        return HandedPolicyState(session)
    return PolicyState(session)


def stage_work(session: Session) -> WholeStages:
    """Who computes the stages that look at each response for itself: this process, or shards."""
    if session.run.config.execution.is_sharded:
        from tasks.shards.stages import ShardedStages

        return ShardedStages(session)
    return WholeStages(session)
