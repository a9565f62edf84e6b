"""A run as tables across its iterations, for polars, pandas, datasets, DuckDB or pyarrow.

    run = open_run("runs/ppo-20261127")
    run.iterations().pandas()                     # one row an iteration: every metric and its stages' seconds
    run.samples().polars().filter(...)            # one row a response, lazy: iterations are read as they are asked for
    run.samples(range(40, 50)).dataset()          # a datasets.Dataset
    run.tokens([7]).arrow()                       # one row a response token
    run.updates().pandas()                        # one row an optimiser step

Everything is read from the stages' artifacts, loose or archived, each checked against its digest. It works while the
run is going: an iteration is there once the stages that the table needs are committed. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute

from rlhf_core.contracts.archive import ITERATION
from rlhf_core.contracts.artifacts import Manifest, read_artifact
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.schemas import GENERATE, PPO_UPDATE, REFERENCE_LOGPROBS, SAMPLE_PROMPTS, SHAPE_REWARDS
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES
from rlhf_core.store.opening import reading

if TYPE_CHECKING:
    import datasets
    import pandas
    import polars

pc: Any = pyarrow.compute
"""Its functions are made when it is imported: no type checker sees them."""
_SCORES: Final = SCHEMAS["score_rewards"]
_SHAPED: Final = [field for field in SHAPE_REWARDS if field.name not in ("sample_id", "score")]

SAMPLES: Final[pa.Schema] = pa.schema(
    [
        ITERATION,
        *(GENERATE.field(name) for name in ("sample_id", "prompt_id", "sample_index")),
        SAMPLE_PROMPTS.field("prompt_text"),
        GENERATE.field("response_text"),
        GENERATE.field("finish_reason"),
        pa.field("num_tokens", pa.int32(), nullable=False),  # of the response
        _SCORES.field("score"),
        *(field for field in _SHAPED if not pa.types.is_list(field.type)),
        _SCORES.field("components"),
        SAMPLE_PROMPTS.field("columns"),
        *(GENERATE.field(name) for name in ("response_tokens", "logprobs", "entropies", "values")),
        REFERENCE_LOGPROBS.field("ref_logprobs"),
        *(field for field in _SHAPED if pa.types.is_list(field.type)),
    ]
)
"""One row a response: what five stages know of it."""

PER_TOKEN: Final[Mapping[str, str]] = {
    "token_id": "response_tokens",
    "logprob": "logprobs",
    "ref_logprob": "ref_logprobs",
    "kl": "token_kl",
    "entropy": "entropies",
    "reward": "rewards",
    "value": "values",
    "advantage": "advantages",
    "return": "returns",
}
"""Column of a table of tokens -> the column of SAMPLES that lists it."""

TOKENS: Final[pa.Schema] = pa.schema(
    [
        ITERATION,
        GENERATE.field("sample_id"),
        pa.field("position", pa.int32(), nullable=False),  # in the response, from 0
        *(
            pa.field(name, SAMPLES.field(column).type.value_type, nullable=name in ("value", "return"))
            for name, column in PER_TOKEN.items()
        ),
    ]
)
"""One row a response token; value and return are null without a critic."""

UPDATES: Final[pa.Schema] = pa.schema([ITERATION, *PPO_UPDATE])
"""One row an optimiser step."""


@dataclass(frozen=True)
class RunTable:
    """A table across iterations, read one at a time when it is asked for."""

    schema: pa.Schema
    iterations: tuple[int, ...]
    read: Callable[[int], pa.Table]
    """One iteration's rows."""

    def batches(self) -> Iterator[pa.Table]:
        """The rows, an iteration at a time, so that memory stays that of one."""
        return (self.read(iteration) for iteration in self.iterations)

    def arrow(self) -> pa.Table:
        """All rows in memory."""
        return pa.concat_tables([self.schema.empty_table(), *self.batches()])

    def pandas(self) -> pandas.DataFrame:
        """All rows as a data frame."""
        return self.arrow().to_pandas()

    def dataset(self) -> datasets.Dataset:
        """All rows as a Hugging Face dataset, without a copy."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        return Dataset(InMemoryTable(self.arrow()))

    def polars(self) -> polars.LazyFrame:
        """A lazy frame: nothing is read before ``collect``, and no more than the iterations and columns it needs.

        Raises: UserError if polars is not installed.
        """
        try:
            import polars
            from polars.io.plugins import register_io_source
        except ImportError:
            raise UserError("polars is not installed: pip install polars, or take .arrow() or .pandas()") from None

        def frames(
            columns: list[str] | None, predicate: polars.Expr | None, n_rows: int | None, _: int | None
        ) -> Iterator[polars.DataFrame]:
            left = n_rows
            for table in self.batches():
                frame = polars.DataFrame(polars.from_arrow(table))
                frame = frame if predicate is None else frame.filter(predicate)
                frame = frame if columns is None else frame.select(columns)
                yield frame if left is None else frame.head(left)
                if left is not None and (left := left - len(frame)) <= 0:
                    return

        empty = polars.DataFrame(polars.from_arrow(self.schema.empty_table()))
        return register_io_source(frames, schema=empty.schema)


@dataclass(frozen=True)
class RunTables:
    """The tables of one run."""

    run: RunFolder

    def iterations(self) -> RunTable:
        """One row a finished iteration: its metrics by name, and ``time/<stage>_s``; null where one has none."""
        rows = {i: _flat(self.run.manifests(i)) for i in range(self.run.num_finished())}
        names = dict.fromkeys(name for row in rows.values() for name in row)
        schema = pa.schema([ITERATION, *(pa.field(name, pa.float64()) for name in names)])
        return RunTable(
            schema, tuple(rows), lambda i: pa.Table.from_pylist([{"iteration": i} | rows[i]], schema=schema)
        )

    def samples(self, iterations: Iterable[int] | None = None) -> RunTable:
        """One row a response: :data:`SAMPLES`. Default: all iterations whose rewards are shaped."""
        return RunTable(SAMPLES, self._with("shape_rewards", iterations), self._samples)

    def tokens(self, iterations: Iterable[int] | None = None) -> RunTable:
        """One row a response token: :data:`TOKENS`."""
        return RunTable(TOKENS, self._with("shape_rewards", iterations), lambda i: explode(self._samples(i)))

    def updates(self, iterations: Iterable[int] | None = None) -> RunTable:
        """One row an optimiser step: :data:`UPDATES`."""
        return RunTable(UPDATES, self._with("ppo_update", iterations), self._updates)

    def _with(self, stage: str, iterations: Iterable[int] | None) -> tuple[int, ...]:
        """Those iterations, if that stage of each is committed. Raises UserError for one that is not."""
        finished = self.run.num_finished()
        begun = [finished] if self.run.manifest(stage, finished) is not None else []
        there = [*range(finished), *begun]
        cleaned = Cleaned.of(self.run.path)
        asked = [i for i in there if not cleaned.lacks(i)] if iterations is None else list(iterations)
        if missing := [i for i in asked if not 0 <= i < len(there)]:
            newest = f"the newest is {there[-1]}" if there else "none is"
            raise UserError(f"{stage} of iteration {missing[0]} is not committed in {self.run.path}; {newest}")
        return tuple(asked)

    def _samples(self, iteration: int) -> pa.Table:
        manifests = self.run.manifests(iteration)
        prompts, rollouts, scores, reference, shaped = (
            read_artifact(self.run.path, manifests[stage].artifact) for stage in list(STAGES)[:5]
        )
        columns: dict[str, Any] = {
            "iteration": pa.array([iteration] * rollouts.num_rows, pa.int32()),
            "num_tokens": pc.list_value_length(rollouts["response_tokens"]),
        }
        for table, key in (
            (_rows_for(rollouts, prompts, "prompt_id"), "prompt_id"),
            (_rows_for(rollouts, shaped, "sample_id"), "sample_id"),
            (_rows_for(rollouts, scores, "sample_id"), "sample_id"),
            (_rows_for(rollouts, reference, "sample_id"), "sample_id"),
            (rollouts, ""),
        ):
            columns |= {name: table[name] for name in table.column_names if name != key}
        return pa.table([columns[name] for name in SAMPLES.names], schema=SAMPLES)

    def _updates(self, iteration: int) -> pa.Table:
        manifest = self.run.manifests(iteration)["ppo_update"]
        table = read_artifact(self.run.path, manifest.artifact)
        return table.add_column(0, ITERATION, pa.array([iteration] * table.num_rows, pa.int32()))


def open_run(path: str | Path) -> RunTables:
    """The tables of a run folder, or of ``s3://bucket/prefix``. Raises UserError if there is no run."""
    return RunTables(RunFolder.open(reading(path, weights=False)))


def explode(samples: pa.Table) -> pa.Table:
    """One row a response token.

    Args:
        samples: rows of :data:`SAMPLES`.
    Returns: rows of :data:`TOKENS`, response after response.
    """
    lens = samples["num_tokens"].to_pylist()
    row = pa.array([i for i, num in enumerate(lens) for _ in range(num)], pa.int32())
    columns: dict[str, Any] = {name: pc.take(samples[name], row) for name in ("iteration", "sample_id")}
    columns["position"] = pa.array([t for num in lens for t in range(num)], pa.int32())
    for name, column in PER_TOKEN.items():
        flat = pc.list_flatten(samples[column])
        is_there = len(flat) == len(row)  # values and returns are empty without a critic
        columns[name] = flat if is_there else pa.nulls(len(row), TOKENS.field(name).type)
    return pa.table([columns[name] for name in TOKENS.names], schema=TOKENS)


def _rows_for(rollouts: pa.Table, other: pa.Table, key: str) -> pa.Table:
    """The other table's row for each rollout."""
    return other.take(pc.index_in(rollouts[key].combine_chunks(), value_set=other[key].combine_chunks()))


def _flat(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """All metrics of an iteration, and the seconds of its stages."""
    seconds = {f"time/{stage}_s": manifest.timing["total_s"] for stage, manifest in manifests.items()}
    return {k: v for manifest in manifests.values() for k, v in manifest.metrics.items()} | seconds
