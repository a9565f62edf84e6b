"""What a run folder says, as plain rows and as sheets: works while the run is going, and needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from rlhf_core.contracts.artifacts import Manifest, locate_artifact, read_artifact
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import Extension, RunFolder
from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES
from rlhf_core.models.texts import token_texts
from rlhf_core.models.tokenizers import load_tokenizer_of
from rlhf_core.selection import Selection, select_samples, spread
from rlhf_core.tables import RunTables

Row = dict[str, Any]
SIDES: Final = ("prompt", "before", "score_before", "after", "score_after")
"""Columns of responses before and after, in the order in which a person reads them."""


@dataclass(frozen=True)
class Sheet:
    """An answer about a run: a table, and what stands above it."""

    title: str
    table: pa.Table
    facts: Row = field(default_factory=dict[str, Any])
    """Plain JSON."""
    spoken: Callable[[Row], str] = field(default=lambda row: row["prompt_text"], repr=False)
    """What a person reads of the prompt of a row: of a chat, the last message of the user."""

    def iterations(self, limit: int | None = None) -> list[int]:
        """The iterations that the first rows are of, ascending; none where nothing says so."""
        if "iteration" in self.table.column_names:
            return sorted(set(self.table["iteration"].slice(0, limit).to_pylist()))
        return [self.facts["iteration"]] if "iteration" in self.facts else []


def run_sheet(run: RunFolder) -> Sheet:
    """One row a finished iteration; which checkpoints there are, and whether anybody works on it."""
    rows, of = iteration_rows(run), run.config.num_iterations
    facts = {"run": str(run.path), "finished": len(rows), "num_iterations": of}
    facts |= {"checkpoints": run.checkpoints(), "standing": standing(run)}
    if run.extensions:
        facts["extensions"] = [extension_sentence(extension) for extension in run.extensions]
    title = (
        f"{run.path}: {len(rows)} of {of} iterations" if rows else f"{run.path}: no iteration of {of} is finished yet"
    )
    return Sheet(title, pa.Table.from_pylist(rows), facts)


def iteration_sheet(run: RunFolder, iteration: int) -> Sheet:
    """One row a stage, and all metrics. Raises UserError if there is no such iteration."""
    facts = {
        "run": str(run.path),
        "iteration": iteration,
        "metrics": dict(sorted(stage_metrics(run, iteration).items())),
    }
    return Sheet(f"iteration {iteration}", pa.Table.from_pylist(stage_rows(run, iteration)), facts)


def artifact_sheet(run: RunFolder, iteration: int | None, stage: str) -> Sheet:
    """The rows of a stage's artifact. Raises UserError for an unknown stage or iteration."""
    where = latest_iteration(run) if iteration is None else iteration
    table = artifact_table(run, where, stage)
    facts = {"run": str(run.path), "iteration": where, "stage": stage, "total": table.num_rows}
    return Sheet(f"{stage}, iteration {where}", table, facts)


def sample_sheet(run: RunFolder, sample_id: str) -> Sheet:
    """One response token by token. Raises UserError if it is not in the run."""
    facts, tokens = sample_tokens(run, sample_id)
    iteration, spoken = _iteration_of(sample_id), Spoken(run)
    prompt_id = _row_with(run, _manifests(run, iteration)["generate"], "sample_id", sample_id)["prompt_id"]

    def said(row: Row) -> str:
        return spoken(row | {"iteration": iteration, "prompt_id": prompt_id})

    return Sheet(sample_id, pa.Table.from_pylist(tokens), facts, said)


def samples_sheet(run: RunFolder, iterations: Sequence[int] | None, selection: Selection) -> Sheet:
    """The responses chosen. Raises UserError if no rewards are shaped yet.

    Args:
        run: whose.
        iterations: of these; None: of the newest whose rewards are shaped.
        selection: which, in which order.
    """
    chosen, where = _chosen(run, iterations, selection)
    order = f", the {'lowest' if selection.lowest else 'highest'} {selection.by} first" if selection.by else ""
    facts = {"run": str(run.path), "total": chosen.num_rows}
    return Sheet(f"responses of {where}{order}", chosen, facts, Spoken(run))


def histogram_sheet(run: RunFolder, iterations: Sequence[int] | None, selection: Selection) -> Sheet:
    """How scores, KL, lengths, entropies and advantages are spread, over the responses chosen."""
    chosen, where = _chosen(run, iterations, selection)
    if not chosen.num_rows:
        raise UserError(f"no response of {where} is like that")
    title = f"{chosen.num_rows} responses of {where}"
    return Sheet(title, pa.Table.from_pylist(spread(chosen)), {"run": str(run.path), "responses": chosen.num_rows})


class Spoken:
    """Finds the last user message of a chat for a row of a response; a plain prompt is shown as it is."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._said: dict[int, dict[int, str]] = {}

    def __call__(self, row: Row) -> str:
        """Return what the person of a row of a response has asked."""
        iteration = row["iteration"]
        if iteration not in self._said:
            prompts = read_artifact(self._run.path, self._run.manifests(iteration)["sample_prompts"].artifact)
            chats = prompts.select(["prompt_id", "messages"]).to_pylist()
            self._said[iteration] = {chat["prompt_id"]: last_of_user(chat["messages"]) for chat in chats}
        return self._said[iteration].get(row["prompt_id"]) or row["prompt_text"]


def last_of_user(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last message of the user in a chat; empty where there is none, as in a plain text."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else ""


def _chosen(run: RunFolder, iterations: Sequence[int] | None, selection: Selection) -> tuple[pa.Table, str]:
    """Responses, and of which iterations they are, in words."""
    tables = RunTables(run)
    there = tables.samples().iterations
    if not there:
        raise UserError(f"{run.path} has no response yet whose rewards are shaped")
    asked = [there[-1]] if iterations is None else iterations
    where = f"iteration {asked[0]}" if len(asked) == 1 else f"{len(asked)} iterations"
    return select_samples(tables.samples(asked).batches(), selection), where


def iteration_rows(run: RunFolder, first: int = 0, after: int | None = None) -> list[Row]:
    """One row a finished iteration from ``first``, up to but not with ``after``: its main numbers."""
    rows: list[Row] = []
    for iteration in range(first, run.num_finished() if after is None else after):
        manifests = run.manifests(iteration)
        metrics = {k: v for manifest in manifests.values() for k, v in manifest.metrics.items()}
        rows.append(
            {
                "iteration": iteration,
                "score": metrics["objective/scores"],
                "kl": metrics["objective/kl"],
                "beta": metrics["kl/beta"],
                "entropy": metrics["objective/entropy"],
                "length": metrics["rollout/response_len"],
                "eos_rate": metrics["rollout/eos_rate"],
                "clip_fraction": metrics["policy/clipfrac_avg"],
                "seconds": sum(manifest.timing["total_s"] for manifest in manifests.values()),
            }
        )
    return rows


def stage_rows(run: RunFolder, iteration: int) -> list[Row]:
    """One row a stage of an iteration: its file, rows, digest and seconds. Raises UserError if there is none."""
    manifests = _manifests(run, iteration)
    rows: list[Row] = []
    for stage, manifest in manifests.items():
        path, data, _ = locate_artifact(run.path, manifest.artifact)
        rows.append(
            {
                "stage": stage,
                "file": str(path.relative_to(run.path)),
                "rows": manifest.artifact.rows,
                "bytes": len(data),
                "sha256": manifest.artifact.sha256,
                "seconds": manifest.timing["total_s"],
            }
        )
    return rows


def stage_metrics(run: RunFolder, iteration: int) -> dict[str, float]:
    """All metrics of an iteration by name. Raises UserError if there is no such iteration."""
    return {k: v for manifest in _manifests(run, iteration).values() for k, v in manifest.metrics.items()}


def artifact_rows(run: RunFolder, iteration: int, stage: str, limit: int) -> list[Row]:
    """The first rows of an artifact. Raises UserError for an unknown stage or iteration."""
    return artifact_table(run, iteration, stage).slice(0, limit).to_pylist()


def artifact_table(run: RunFolder, iteration: int, stage: str) -> pa.Table:
    """An artifact, checked. Raises UserError for an unknown stage or iteration."""
    if stage not in STAGES:
        raise UserError(f"--stage {stage} is not a stage; stages: {', '.join(STAGES)}")
    manifests = _manifests(run, iteration)
    if stage not in manifests:
        raise UserError(
            f"--stage {stage} of iteration {iteration} is not committed yet; committed: {', '.join(manifests)}"
        )
    return read_artifact(run.path, manifests[stage].artifact)


def sample_tokens(run: RunFolder, sample_id: str) -> tuple[Row, list[Row]]:
    """One response: its facts, and one row a token.

    Raises: UserError if the id is malformed, or not in the run.
    """
    iteration = _iteration_of(sample_id)
    manifests = _manifests(run, iteration)
    if "generate" not in manifests:
        raise UserError(f"--sample {sample_id}: generate of iteration {iteration} is not committed yet")
    joined: Row = {}
    for stage in ("generate", "score_rewards", "reference_logprobs", "shape_rewards"):
        if stage in manifests:
            joined |= _row_with(run, manifests[stage], "sample_id", sample_id)
    prompt = _row_with(run, manifests["sample_prompts"], "prompt_id", joined["prompt_id"])
    per_token = {
        "token": "response_tokens",
        "logprob": "logprobs",
        "ref_logprob": "ref_logprobs",
        "kl": "token_kl",
        "reward": "rewards",
        "value": "values",
        "advantage": "advantages",
        "return": "returns",
        "entropy": "entropies",
    }
    columns: Mapping[str, Sequence[Any]] = {
        name: joined[column] for name, column in per_token.items() if joined.get(column)
    }
    texts = _token_texts(run, joined["response_tokens"])
    tokens = [{"text": texts[t]} | {name: values[t] for name, values in columns.items()} for t in range(len(texts))]
    facts = {"prompt": prompt["prompt_text"], "response": joined["response_text"]}
    facts |= {k: joined[k] for k in ("finish_reason", "score", "kl", "rlhf_reward") if k in joined}
    return facts, tokens


def before_and_after(run: RunFolder) -> list[Row]:
    """Responses to the same prompts before and after training; empty until the run is finished.

    Returns: rows of prompt, response and score, before and after. Where prompts are chats, a row's prompt is the last
        message of the user, and its prompt_text what the policy reads.
    """
    path = run.path / "before_after.json"
    samples = read_record(path)["samples"] if path.is_file() else []
    asked = asked_texts(run, 0) if samples else {}
    read = [{name: row[name] for name in SIDES} for row in samples]
    return with_asked(read, [asked.get(row["prompt"], "") for row in read])


def asked_texts(run: RunFolder, iteration: int) -> dict[str, str]:
    """Text that the policy reads -> last message of the user, for each prompt of an iteration that is a chat.

    Empty where the artifacts of the iteration were removed by ``rlhf clean``, or cannot be read: what is shown then is
    the prompt as the policy reads it, and ``rlhf verify`` says what is damaged.
    """
    manifest = run.manifests(iteration).get("sample_prompts")
    if manifest is None or Cleaned.of(run.path).lacks(iteration):
        return {}
    try:
        rows = read_artifact(run.path, manifest.artifact).select(["prompt_text", "messages"]).to_pylist()
    except IntegrityError:
        return {}
    return {row["prompt_text"]: said for row in rows if (said := last_of_user(row["messages"]))}


def with_asked(rows: Sequence[Row], asked: Sequence[str]) -> list[Row]:
    """Rows as a person reads them: ``prompt`` is what was asked, and ``prompt_text`` the prompt as the policy reads it.

    Args:
        rows: with a ``prompt``.
        asked: last user message of each; empty for a plain prompt, which stays. Rows without any chat stay as they are.
    """
    if not any(asked):
        return list(rows)
    return [
        row | {"prompt": said or row["prompt"], "prompt_text": row["prompt"]}
        for row, said in zip(rows, asked, strict=True)
    ]


def standing(run: RunFolder) -> str:
    """Whether a process is working on the run, or it has stopped, or is finished: one sentence, and what to do."""
    finished, of = run.num_finished(), run.config.num_iterations
    if run.is_locked():
        return f"a process is working on it, in iteration {finished} of {of}"
    guards = run.path / "guards.json"
    if guards.is_file() and (reason := read_record(guards).get("stopped")):
        return f"stopped by a guard after {finished} iterations: {reason}"
    if finished < of:
        return f"stopped in iteration {finished} of {of}: nobody works on it; continue with  rlhf resume {run.path}"
    if not (run.path / "before_after.json").is_file():
        return f"stopped before its report: nobody works on it; finish it with  rlhf resume {run.path}"
    return "finished"


def extension_sentence(extension: Extension) -> str:
    """What an extension has changed, and when."""
    return (
        f"num_iterations: {extension.before} -> {extension.after}, given on {extension.date} after "
        f"{extension.iteration} iterations"
    )


def _token_texts(run: RunFolder, token_ids: list[int]) -> list[str]:
    """Text of each token; "?" where the policy's tokenizer is not at hand."""
    try:
        tokenizer = load_tokenizer_of(run.config.policy.model, run.config.policy.adapter)[0]
    except UserError:
        return ["?"] * len(token_ids)
    return [repr(text)[1:-1] for text in token_texts(tokenizer, token_ids)]


def latest_iteration(run: RunFolder) -> int:
    """The newest iteration with anything committed. Raises UserError if there is none."""
    finished = run.num_finished()
    if run.manifests(finished):
        return finished
    if finished == 0:
        raise UserError(f"{run.path} has no committed stage yet")
    return finished - 1


def _manifests(run: RunFolder, iteration: int) -> dict[str, Manifest]:
    manifests = run.manifests(iteration)
    if not manifests:
        raise UserError(f"--iteration {iteration} is not in {run.path}; the newest is {latest_iteration(run)}")
    return manifests


def _row_with(run: RunFolder, manifest: Manifest, key: str, value: Any) -> Row:
    for row in read_artifact(run.path, manifest.artifact).to_pylist():
        if row[key] == value:
            return row
    stem = FILE_STEMS[manifest.artifact.stage]
    raise UserError(f"--sample {value} is not in {stem}.arrow of iteration {manifest.artifact.iteration}")


def _iteration_of(sample_id: str) -> int:
    head = sample_id.partition("-")[0]
    if not (head.startswith("i") and head[1:].isdecimal()):
        raise UserError(f"--sample {sample_id!r} is not a sample id; they look like i000007-p000123-s0")
    return int(head[1:])
