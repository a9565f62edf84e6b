"""`rlhf view`: writes the page of a run, and says where it is and what it shows."""

from __future__ import annotations

from pathlib import Path

from flows.console import Console
from flows.displays.terminal import print_warning
from rlhf_core.choice import ALL, chosen_iterations, first_middle_last
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.viewer.page import NAME, check_out, write_page


def write_view(console: Console, path: Path, *, iterations: str | None, out: Path | None, limit: int | None) -> None:
    """Write the page of a run and print its path. Nothing is written if anything is wrong.

    Raises: UserError for what is not there, or a page that cannot be.
    """
    run = RunFolder.open(path)
    page = out or path / NAME
    check_out(page)
    finished = run.num_finished()
    if finished == 0:
        raise UserError(f"{path} has no finished iteration yet; a page needs one")
    chosen = first_middle_last(finished) if iterations is None else chosen_iterations(iterations, finished)
    if iterations in (None, ALL):
        cleaned = Cleaned.of(path)
        chosen = [iteration for iteration in chosen if not cleaned.lacks(iteration)]
    written = write_page(run, page, chosen, limit=limit)
    if written.note:
        print_warning(console, written.note)
    named = ", ".join(map(str, chosen)) if len(chosen) <= 6 else f"{chosen[0]} to {chosen[-1]} ({len(chosen)} of them)"
    some = "" if written.num_samples == written.num_responses else f" of {written.num_responses:,}"
    console.print(
        f"{written.num_samples:,}{some} responses of iterations {named}; {written.num_bytes / 1e6:,.1f} MB, complete "
        "in itself: open it in a browser",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(str(page), highlight=False, markup=False, soft_wrap=True)
