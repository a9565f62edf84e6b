"""What a page shows, as a JSON value: samples and tokens by column, curves, before and after, what is attainable.

    run             names, how far it is, which iterations are shown
    curves          one list a metric, one entry a finished iteration
    prompts, finish_reasons, vocabulary             texts, each once
    samples         id, response; numbers and components: a column of numbers each
    tokens          a column of numbers each, over all responses, one after another
    before_after    rows of before_after.json
    evaluation      the newest finished one of the run, or null

A column of numbers is its little-endian float32 or uint32 bytes in base64: exactly what the artifacts hold, and half
as long as the same as decimal digits.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import asked_texts, before_and_after, iteration_rows
from rlhf_core.models.texts import token_texts
from rlhf_core.models.tokenizers import load_tokenizer_of
from rlhf_core.store.address import shown
from rlhf_core.tables import PER_TOKEN, SAMPLES, RunTables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS: Final = 2_000_000
"""Response tokens of one page: a hundred megabytes, with which a browser is still quick."""
CURVES: Final = ("iteration", "score", "kl", "beta", "entropy", "length")
NUMBERS: Final[Mapping[str, str]] = {
    "iteration": "iteration",
    "length": "num_tokens",
    "score": "score",
    "score_shaped": "score_shaped",
    "kl": "kl",
    "k3": "k3",
    "rlhf_reward": "rlhf_reward",
}
"""Column of the page's samples -> column of the run's table."""
NO_TOKENIZER = "The policy's tokenizer is not at hand, so tokens are shown by their ids."

Json = dict[str, Any]


def page_contents(
    run: RunFolder,
    iterations: Sequence[int],
    *,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_evaluation: bool,
) -> Json:
    """Everything that the page shows.

    Args:
        run: finished or going.
        iterations: finished ones, ascending.
        limit: responses of each iteration; None for all.
        tokenizer: the policy's; None to load it.
        with_evaluation: also the newest evaluation in the run folder.
    Raises:
        UserError: an iteration is not there, or they are too many for a page.
        IntegrityError: an artifact, the before and after, or the evaluation is damaged.
    """
    samples, num_responses = _samples(run, iterations, limit)
    vocabulary, tokens, note = _tokens(run, samples, tokenizer)
    prompts, finish = (samples[name].combine_chunks().dictionary_encode() for name in ("prompt_text", "finish_reason"))
    numbers = {name: _column(samples[column]) for name, column in NUMBERS.items()}
    numbers |= {"prompt": _column(prompts.indices), "finish_reason": _column(finish.indices)}
    numbers["max_abs_advantage"] = _column(np.array([_largest(row) for row in samples["advantages"]]))
    rows = iteration_rows(run)
    kl = run.config.kl
    return {
        "run": {
            "name": run.path.resolve().name,
            "quoted_path": shlex.quote(shown(run.path)),
            "policy": run.config.policy.model,
            "num_finished": len(rows),
            "num_iterations": run.config.num_iterations,
            "kl_target": None if kl.held_at is None else kl.target,
            "shown": list(iterations),
            "num_responses": num_responses,
            "note": note,
        },
        "curves": {name: [row[name] for row in rows] for name in CURVES},
        "prompts": prompts.dictionary.to_pylist(),
        "asked": _asked(run, iterations, prompts.dictionary.to_pylist()),
        "finish_reasons": finish.dictionary.to_pylist(),
        "vocabulary": vocabulary,
        "samples": {
            "id": samples["sample_id"].to_pylist(),
            "response": samples["response_text"].to_pylist(),
            "numbers": numbers,
            "components": _components(samples["components"]),
        },
        "tokens": tokens,
        "before_after": _before_after(run),
        "evaluation": newest_evaluation(run) if with_evaluation else None,
    }


def newest_evaluation(run: RunFolder) -> Json | None:
    """What the newest finished evaluation in the run folder says of score against KL; None without one.

    Raises: IntegrityError if its files are damaged.
    """
    summaries = sorted(run.path.glob("evaluations/*/summary.json"), key=lambda p: (p.stat().st_mtime_ns, p))
    if not summaries:
        return None
    from rlhf_core.evaluation.folder import EvaluationFolder, split_name  # torch: a run without one does without

    there = EvaluationFolder.open(summaries[-1].parent)
    numbers, frontier = there.summary(), there.frontier()
    return _of_file(
        summaries[-1],
        lambda: {
            "name": there.path.name,
            "reference_score": _finite(numbers["reference"]["score"]["mean"]),
            "frontier": {
                "kl": [_finite(row["kl"]) for row in frontier],
                "score": [_finite(row["score"]) for row in frontier],
                "trusted": [row["trusted"] for row in frontier],
            },
            "best_of_n": [
                {"n": int(row["n"]), "kl": _finite(row["kl"]), "score": _finite(row["score"]["mean"])}
                for row in numbers["best_of_n"]
            ],
            "policies": [
                {
                    "name": name,
                    "base": split_name(name)[0],
                    "kl": _interval(policy["kl"]),
                    "score": _interval(policy["score"]),
                    "share": _finite(policy["share_of_attainable"]["mean"]) if policy["share_of_attainable"] else None,
                }
                for name, policy in numbers["policies"].items()
            ],
        },
    )


def _samples(run: RunFolder, iterations: Sequence[int], limit: int | None) -> tuple[pa.Table, int]:
    """Rows of SAMPLES, and how many responses the iterations have in all."""
    tables: list[pa.Table] = []
    num_responses, num_tokens = 0, 0
    for table in RunTables(run).samples(iterations).batches():
        tables.append(table if limit is None else table.slice(0, limit))
        num_responses += table.num_rows
        num_tokens += int(tables[-1]["num_tokens"].to_numpy().sum())
        if num_tokens > MAX_TOKENS:
            raise UserError(
                f"the responses of these iterations have more than {MAX_TOKENS:,} tokens, too many for one page; "
                "choose fewer --iterations, or responses of each with --limit"
            )
    return pa.concat_tables([SAMPLES.empty_table(), *tables]).combine_chunks(), num_responses


def _tokens(
    run: RunFolder, samples: pa.Table, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[str], Json, str | None]:
    """The texts of all tokens that occur, the columns of tokens, and what is to be said about them."""
    note = None
    columns = {name: samples[column].combine_chunks().flatten() for name, column in PER_TOKEN.items()}
    occurring, indices = np.unique(columns.pop("token_id").to_numpy(), return_inverse=True)
    token_ids = [int(token_id) for token_id in occurring]
    try:
        tokenizer = tokenizer or load_tokenizer_of(run.config.policy.model, run.config.policy.adapter)[0]
        vocabulary = token_texts(tokenizer, token_ids)
    except UserError:
        vocabulary, note = [f"⟨{token_id}⟩" for token_id in token_ids], NO_TOKENIZER
    encoded = {name: _column(values) if len(values) == len(indices) else None for name, values in columns.items()}
    return vocabulary, {"token": _column(indices)} | encoded, note  # value and return are empty without a critic


def _components(components: pa.ChunkedArray) -> Json:
    """The raw score of each reward component, one column each; NaN where it gave none."""
    rows = components.to_pylist()
    names = dict.fromkeys(part["name"] for row in rows for part in row)
    scores = [{part["name"]: part["score"] for part in row} for row in rows]
    return {name: _column(np.array([row.get(name, math.nan) for row in scores])) for name in names}


def _asked(run: RunFolder, iterations: Sequence[int], prompts: Sequence[str]) -> list[str | None]:
    """Of each prompt that is a chat, the last message of the user."""
    found: dict[str, str] = {}
    for iteration in iterations:
        found |= asked_texts(run, iteration)
    return [found.get(prompt) for prompt in prompts]


def _before_after(run: RunFolder) -> list[Json]:
    texts, scores = ("prompt", "before", "after"), ("score_before", "score_after")

    def shown(row: Mapping[str, Any]) -> Json:
        whole = {"prompt_text": str(row["prompt_text"])} if "prompt_text" in row else {}
        return {k: str(row[k]) for k in texts} | whole | {k: _finite(row[k]) for k in scores}

    return _of_file(run.path / "before_after.json", lambda: [shown(row) for row in before_and_after(run)])


def _column(values: pa.ChunkedArray | pa.Array | np.ndarray) -> Json:
    """Numbers as the page decodes them: whole ones as uint32, others as float32."""
    plain = values if isinstance(values, np.ndarray) else values.to_numpy()
    kind = "u4" if np.issubdtype(plain.dtype, np.integer) else "f4"
    return {"type": kind, "base64": base64.b64encode(plain.astype(f"<{kind}").tobytes()).decode()}


def _largest(advantages: pa.ListScalar) -> float:
    values = advantages.values
    return float(np.abs(values.to_numpy()).max()) if len(values) else 0.0


def _interval(found: Mapping[str, Any]) -> Json:
    return {name: _finite(found[name]) for name in ("mean", "low", "high")}


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is no number that can be drawn")
    return number


def _of_file(path: Path, make: Callable[[], Any]) -> Any:
    """What is made of a file's values. Raises IntegrityError if they are not of the kind that this project writes."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{path} does not hold what this release writes there: {error!r}; move it away") from None
