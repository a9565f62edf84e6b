"""Updates that are computed again from their artifacts: they must lead to the weights that they have committed."""

from __future__ import annotations

from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import Trainer


def check_replayed(run: RunFolder, trainer: Trainer, iteration: int, committed: str) -> None:
    """Raise IntegrityError unless an update that was computed again gives the weights that it gave before.

    Args:
        run: of the update.
        trainer: after it.
        iteration: of the update.
        committed: digest of the weights that it committed.
    """
    expected, newest = committed, run.drifts[-1] if run.drifts else None
    if newest is not None and trainer.iteration <= newest.iteration:
        # computed under other conditions then: what counts is where they lead; "" while a drift is being accepted
        expected = newest.weights if trainer.iteration == newest.iteration else ""
    if expected and trainer.digest() != expected:
        raise IntegrityError(
            f"the update of iteration {iteration}, computed again from its artifacts, gives other weights than it "
            "committed: the machine, its threads or its libraries differ, or a checkpoint was changed; "
            f"`rlhf verify {run.path}` reads everything again"
        )
