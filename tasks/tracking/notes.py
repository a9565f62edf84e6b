"""What the tracker's pages say in words: descriptions in markdown, tags, where models come from. Knows no tracker.

A description that a person has changed is left alone: a tag remembers the digests of our own.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rlhf_core.comparing.outcome import LAST, Spread
from rlhf_core.comparing.presentation import QUANTITIES
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import config_digest, flat_params
from rlhf_core.contracts.hub import split_revision
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.inspection import Row, iteration_rows
from rlhf_core.store.address import shown
from tasks.lifecycle.guards import GuardRecord
from tasks.tracking.view import VIEW_TAG, runs_view

NOTE: Final = "mlflow.note.content"
"""The description of a run or experiment."""
OWN_NOTES: Final = "rlhf.note_sha256"
"""Digests of the descriptions that may be ours."""
SHOWN_DIGITS: Final = 16
"""Of a digest."""
EXPERIMENT_NOTE: Final = """\
Runs of **rlhf-flow**: PPO against a reward model, with a KL penalty towards a frozen reference.

To compare runs, tick them and press *Compare*. Worth a column or an axis:

| metric | meaning |
|---|---|
| `achieved/score`, `achieved/kl` | what came out: means of the last five iterations |
| `achieved/gain_per_nat` | score gained over the reference by each nat of KL |
| `achieved/best_score`, `achieved/best_score_kl` | best mean of five iterations in a row, and its KL |
| `eval/score`, `eval/kl`, `eval/share_of_attainable` | on held-out prompts, once `rlhf evaluate RUN` has run |
| `objective/scores`, `objective/kl`, `kl/beta` | the curves of training, by iteration |

[The runs with these columns and charts](#/experiments/EXPERIMENT_ID/runs?viewStateShareKey=rlhf). In the terminal:
`rlhf compare RUN RUN --out compare.html`.
"""


def created_tags(run: RunFolder) -> dict[str, str]:
    """Tags that a run is created with: who, what, and from what."""
    tags = {
        "mlflow.source.name": "rlhf train",
        "mlflow.source.type": "LOCAL",
        "rlhf.run_dir": shown(run.path.resolve()),
        "rlhf.config_sha256": config_digest(run.config),
        **{f"rlhf.{name}": str(run.identity[name]) for name in ("source", "prompts", "device")},
        **model_tags(run),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def model_tags(run: RunFolder) -> dict[str, str]:
    """``rlhf.model.<role>`` -> each model that the run began with, by name and digest."""
    config = run.config
    named = {"policy": config.policy.model, "reference": config.reference_model}
    named |= {"policy.adapter": config.policy.adapter or "", "reference.adapter": config.reference_adapter or ""}
    rewards = zip(config.reward.names, config.reward.components, strict=True)
    named |= {name: part.model for name, part in rewards if isinstance(part, ModelReward)}
    digests: Mapping[str, str] = run.identity["models"]
    return {f"rlhf.model.{role}": _named(named[role], digests[role]) for role in named if role in digests}


def params(run: RunFolder) -> dict[str, str]:
    """The knobs of a run as MLflow's params, which are texts and never empty."""
    flat = flat_params(run.config).items()
    texts = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in flat}
    return {name: text for name, text in texts.items() if text}


def run_note(run: RunFolder, prefect_run: Mapping[str, str]) -> str:
    """The description of a run: what it is, what came out so far, and what to do with it."""
    config, rows, place = run.config, iteration_rows(run), shown(run.path.resolve())
    rewards = ", ".join(_code(name) for name in config.reward.names)
    beta = "fixed" if config.kl.held_at is None else f"held at {config.kl.held_at:g} nats by `{config.kl.controller}`"
    lines = [
        f"{_state(run, len(rows))} **{len(rows)} of {config.num_iterations}** iterations of "
        f"{config.prompts.batch_size} responses{_headline(rows)}.",
        "",
        f"Policy {_code(config.policy.model)}, rewarded by {rewards}, against the reference "
        f"{_code(config.reference_model)}; prompts of {_code(config.prompts.source)}; β {config.kl.coef:g}, {beta}; "
        f"seed {config.seed}.",
    ]
    if rows:
        lines += ["", *_first_to_last(rows)]
    lines += ["", "```sh", f"rlhf inspect {place}", f"rlhf compare {place} OTHER_RUN --out compare.html",
              f"rlhf evaluate {place}", f"rlhf verify {place}", f"rlhf resume {place}", "```"]  # fmt: skip
    if page := prefect_run.get("flow_run_url"):
        lines += ["", f"[Prefect flow run]({without_credentials(page)})"]
    return "\n".join(lines)


def version_note(run: RunFolder, iteration: int) -> str:
    """The description of a registered version."""
    rows = iteration_rows(run, max(0, iteration - LAST), iteration)
    means = {column: Spread.of([row[column] for row in rows]).mean for column in ("score", "kl")}
    return (
        f"{run.path.name} after {iteration} of {run.config.num_iterations} iterations: score {means['score']:.3f} at "
        f"{means['kl']:.2f} nats (means of its last {len(rows)} iterations)."
    )


def leave_note(client: Any, run_id: str, note: str) -> None:
    """Make this the description of a run, unless a person has written one."""
    tags = client.get_run(run_id).data.tags
    there, own = tags.get(NOTE, ""), tags.get(OWN_NOTES, "").split()
    if there == note or (there and _digest(there) not in own):
        return
    client.set_tag(run_id, OWN_NOTES, f"{_digest(there)} {_digest(note)}")  # the note itself may not arrive
    client.set_tag(run_id, NOTE, note)


def introduce_experiment(client: Any, experiment_id: str) -> None:
    """Give an experiment without a description one, the pages of model training, and a view with score and KL."""
    tags = client.get_experiment(experiment_id).tags
    for name, text in (
        (NOTE, EXPERIMENT_NOTE.replace("EXPERIMENT_ID", experiment_id)),
        ("mlflow.experimentKind", "custom_model_development"),
        (VIEW_TAG, runs_view()),
    ):
        if not tags.get(name):
            client.set_experiment_tag(experiment_id, name, text)


def prompts_dataset(prompts: PromptsConfig, digest: str) -> dict[str, str]:
    """The fields of MLflow's Dataset, as its pages read them, for the prompts of a run."""
    is_local, (name, revision) = Path(prompts.source).exists(), split_revision(prompts.source)
    hub = {"path": name, "config_name": prompts.subset, "split": prompts.split}
    hub |= {"revision": revision} if revision else {}
    columns = [{"name": name, "type": "string", "required": True} for name in (prompts.column, *prompts.columns)]
    return {
        "name": Path(prompts.source if is_local else name).name or prompts.source,
        "digest": digest[:SHOWN_DIGITS],
        "source_type": "local" if is_local else "hugging_face",
        "source": json.dumps({"uri": prompts.source} if is_local else hub),
        "schema": json.dumps({"mlflow_colspec": columns}),
    }


def _state(run: RunFolder, finished: int) -> str:
    if stopped := GuardRecord.of(run).stopped:
        return f"Stopped by a guard ({_code(stopped)}) after"
    return "Finished:" if finished == run.config.num_iterations else "Begun; when this was written it had finished"


def _headline(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    first, last = rows[: _edge(rows)], rows[-_edge(rows) :]
    before, score, kl = (
        Spread.of([row[column] for row in part]).mean
        for part, column in ((first, "score"), (last, "score"), (last, "kl"))
    )
    return f": score {before:.2f} → **{score:.2f}** at **{kl:.2f}** nats of KL"


def _edge(rows: Sequence[Row]) -> int:
    """Iterations averaged at the beginning and at the end."""
    return min(LAST, max(1, len(rows) // 2))


def _first_to_last(rows: Sequence[Row]) -> list[str]:
    edge = _edge(rows)
    lines = [f"| means of {edge} iterations | first | last | change |", "|---|---:|---:|---:|"]
    for column, (label, digits) in QUANTITIES.items():
        first, last = (Spread.of([row[column] for row in part]).mean for part in (rows[:edge], rows[-edge:]))
        lines.append(f"| {label} | {first:.{digits}f} | {last:.{digits}f} | {last - first:+.{digits}f} |")
    return lines


def _named(name: str, digest: str) -> str:
    return name if digest == name or name.endswith(f"@{digest}") else f"{name} sha256:{digest[:SHOWN_DIGITS]}"


def _code(text: str) -> str:
    """As code in markdown, whatever it is."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN_DIGITS]
