"""The view of an experiment's runs that MLflow's pages open by a link: its columns and charts. Knows no tracker.

    SERVER/#/experiments/ID/runs?viewStateShareKey=rlhf

Without that link, the list of runs shows the columns that MLflow has chosen, and no tag of an experiment changes them.
"""

from __future__ import annotations

import json
from typing import Any, Final

KEY: Final = "rlhf"
VIEW_TAG: Final = f"mlflow.sharedViewState.{KEY}"
COLUMNS: Final = {
    "metrics.`achieved/score`": 130,
    "metrics.`achieved/kl`": 110,
    "metrics.`achieved/gain_per_nat`": 180,
    "metrics.`eval/score`": 110,
    "params.`kl.target`": 90,
    "params.`seed`": 70,
    "attributes.`Models`": 190,
}
"""Columns that are shown beside those that always are -> their pixels: all of them fit into 1,400."""
_ALWAYS: Final = {"attributes.`Run Name`": 190}
_BEHIND: Final = {"runDateAndNestInfo": 150, "duration": 80}
CAME_OUT, TRAINING = "rlhf-came-out", "rlhf-training"
"""Ids of the two sections of charts."""


def runs_view() -> str:
    """The state of the page, as MLflow reads it from the tag of an experiment: at most 5,000 characters."""
    charts = [
        _chart(CAME_OUT, "SCATTER", "score against KL", xaxis=_axis("achieved/kl"), yaxis=_axis("achieved/score")),
        _chart(CAME_OUT, "BAR", "score", metricKey="achieved/score"),
        _chart(CAME_OUT, "BAR", "KL", metricKey="achieved/kl"),
        _line("objective/scores", "score"),
        _line("objective/kl", "KL"),
        _line("kl/beta", "β"),
        _line("objective/entropy", "entropy"),
        _line("rollout/response_len", "response length"),
        _line("policy/clipfrac_avg", "clip fraction"),
    ]
    sections = [
        {"uuid": uuid, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
        for uuid, name in ((CAME_OUT, "What came out"), (TRAINING, "Training"))
    ]
    state = {
        "selectedColumns": list(COLUMNS),
        "columnOrder": [*_ALWAYS, *COLUMNS, *_BEHIND],
        "columnWidths": _ALWAYS | COLUMNS | _BEHIND,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow puts its own sections first
    }
    return json.dumps(state, separators=(",", ":"))


def view_page(server: str, experiment_id: str) -> str:
    """Address of that view on a server."""
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}"


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _line(metric: str, name: str) -> dict[str, Any]:
    return _chart(
        TRAINING, "LINE", name, metricKey=metric, selectedMetricKeys=[metric], xAxisKey="step", scaleType="linear",
        lineSmoothness=0, useGlobalLineSmoothing=True, useGlobalXaxisKey=True, xAxisScaleType="linear",
    )  # fmt: skip


def _chart(section: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": f"{section}-{kind.lower()}-{name}".replace(" ", "-"),
        "type": kind,
        "metricSectionId": section,
        "displayName": name,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
    } | more
