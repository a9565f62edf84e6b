"""What came out of a run, on its page in MLflow: description, figure, page and samples. Knows no tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import before_and_after
from rlhf_core.viewer.page import NAME as PAGE
from rlhf_core.viewer.page import write_run_page
from tasks.reports.figures import draw_run
from tasks.tracking import notes as tracker_notes
from tasks.tracking.files import send_file, send_table


def send_results(client: Any, run_id: str, run: RunFolder, prefect_run: Mapping[str, str]) -> None:
    """Send what is made at a run's end. Raises whatever the tracker raises.

    Args:
        client: of the tracker.
        run_id: of the run there.
        run: the run folder.
        prefect_run: id and page of the flow run; empty outside Prefect.
    """
    if samples := before_and_after(run):
        send_table(client, run_id, samples, "samples.json")
    tracker_notes.leave_note(client, run_id, tracker_notes.run_note(run, prefect_run))
    figure = run.path / "report.png"
    if figure.is_file() or draw_run(run, figure):
        send_file(client, run_id, figure)
    page, is_whole = run.path / PAGE, (run.path / "before_after.json").is_file()
    if (is_whole and page.is_file()) or write_run_page(run):  # a run that a guard has stopped has written none
        send_file(client, run_id, page)
