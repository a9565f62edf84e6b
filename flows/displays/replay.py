"""What `rlhf replay` and `rlhf bundle` print: stages compared, the first difference, what moves, what is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.narrow import WIDE, Column, print_columns
from flows.visible import write_json
from rlhf_core.replay.outcome import Replay, StageReplay
from rlhf_core.store.address import shown

if TYPE_CHECKING:
    from rlhf_core.replay.bundles import BundleRecord
    from rlhf_core.replay.comparison import ColumnDifference
    from rlhf_core.replay.what_if import Advantages, Quantity, WhatIf

SHOWN_LINES = 8
"""Of what else differs in a stage."""
LONGEST_VALUE = 40
EXACT, SHORT = 9, 4
"""Digits that tell a float32 from its neighbour, and those that show where it is."""
ROUNDING = 1e-7
"""Of a float32, below which a change of a mean says nothing."""


def replay_and_show(
    console: Console,
    path: Path,
    *,
    iteration: int | None,
    first: str | None,
    sample: str | None,
    num_threads: int | None,
    as_json: bool,
    trust: Sequence[str] = (),
    vllm_python: str | None = None,
) -> bool:
    """Compute an iteration again and print how it compares. Returns: whether all of it came back bit for bit."""
    from tasks.replay.iteration import replay_iteration

    with _computing(console, quiet=as_json) as tell:
        replay = replay_iteration(
            str(path), iteration, first=first, sample=sample, num_threads=num_threads, progress=tell, trust=trust,
            vllm_python=vllm_python,
        )  # fmt: skip
    if as_json:
        _print_json(replay.to_json())
    else:
        show_replay(console, replay)
    return replay.is_identical


def what_if_and_show(
    console: Console,
    path: Path,
    overrides: Sequence[str],
    *,
    iteration: int | None,
    sample: str | None,
    as_json: bool,
    trust: Sequence[str] = (),
) -> None:
    """Compute an iteration again under other knobs and print what moves."""
    from tasks.replay.what_if import ask_what_if

    with _computing(console, quiet=as_json) as tell:
        answer = ask_what_if(str(path), iteration, overrides, sample=sample, progress=tell, trust=trust)
    if as_json:
        _print_json(answer.to_json())
    else:
        show_what_if(console, answer)


def bundle_and_show(
    console: Console, run: Path, out: Path, *, iteration: int, with_models: bool, as_json: bool
) -> None:
    """Pack an iteration and print what the bundle holds."""
    from tasks.replay.bundle import make_bundle

    with console.status("packing"):
        record = make_bundle(str(run), iteration, str(out), with_models=with_models)
    _show_bundle(console, out, record, as_json=as_json)
    if not as_json:
        _line(console, f"replay it: rlhf replay {out}")


def verify_and_show_bundle(console: Console, path: Path, *, as_json: bool) -> None:
    """Check every seal and digest of a bundle and print what it holds. Raises IntegrityError if it is damaged."""
    from rlhf_core.replay.opening import verify_bundle

    record = verify_bundle(path)
    _show_bundle(console, path, record, as_json=as_json)
    if not as_json:
        _line(console, "whole", style="green")


def show_replay(console: Console, replay: Replay) -> None:
    """Print a table of stages, then whatever differs, then one last line."""
    _line(console, f"{replay.run}, iteration {replay.iteration}", style="bold")
    _print_stages(console, replay)
    for reason in dict.fromkeys(stage.skipped for stage in replay.stages if stage.skipped is not None):
        names = [stage.stage for stage in replay.stages if stage.skipped == reason]
        verb = "was" if len(names) == 1 else "were"
        _line(console, f"{', '.join(names)} {verb} not replayed: {reason}", style="yellow")
    for stage in replay.stages:
        _show_stage(console, stage)
    if replay.sample is not None:
        _line(console, f"{replay.sample}, token by token", style="bold")
        _print_tokens(console, replay.tokens, "replayed")
    computed = [stage for stage in replay.stages if stage.is_identical is not None]
    where = f"iteration {replay.iteration} of {replay.run}"
    is_part = len(computed) < len(replay.stages)
    what = f"{len(computed)} of {len(replay.stages)} stages" if is_part else _stages(computed)
    what = what if replay.sample is None else f"{replay.sample} in {what}"
    if replay.is_identical:
        _line(console, f"identical: {where}, {what}, bit for bit ({_threads(replay)})", style="green")
        return
    if replay.conditions:
        _line(console, "The run was computed under other conditions:")
        for line in replay.conditions:
            _line(console, f"  {line}")
    else:
        _line(
            console,
            "Machine, libraries, models, prompts and sources are those of the run: look at the artifact itself, or at "
            "what answers from outside, as a service.",
        )
    names = ", ".join(stage.stage for stage in computed if not stage.is_identical)
    _line(console, f"different: {where}, {names} ({_threads(replay)})", style="red")


def show_what_if(console: Console, answer: WhatIf) -> None:
    """Print what was asked, the numbers that move, and whose advantages change most."""
    _line(console, f"What if, iteration {answer.iteration} of {answer.run}", style="bold")
    for line in answer.changes:
        _line(console, f"  {line}")
    _line(console, f"computed again on the same responses: {', '.join(answer.computed)}")
    for stage, reason in answer.skipped.items():
        _line(console, f"{stage} was not: {reason}", style="yellow")
    for note in answer.notes:
        _line(console, f"note: {note}", style="yellow")
    _print_quantities(console, answer.quantities)
    if answer.sample is not None:
        _line(console, f"{answer.sample}: stored → what if", style="bold")
        _print_tokens(console, answer.tokens, "what_if", digits=4)
    if "shape_rewards" in answer.computed:
        _show_advantages(console, answer.advantages)


def _show_advantages(console: Console, moved: Advantages) -> None:
    _line(
        console,
        f"advantages: correlation with the stored ones {moved.correlation:.4f}, {moved.sign_flips} of "
        f"{moved.num_tokens} tokens change sign",
    )
    if not moved.most_changed:
        return
    _line(console, "Samples whose advantage changes most (mean over tokens)", style="bold")
    rows = moved.most_changed
    scores = [(_number(row["score"]["stored"]), _number(row["score"]["what_if"])) for row in rows]
    columns = [
        Column("sample", [row["sample_id"] for row in rows], is_left=True),
        Column("score", [then if then == now else f"{then} → {now}" for then, now in scores]),
        Column("advantage, stored", [_number(row["advantage"]["stored"]) for row in rows]),
        Column("what if", [_number(row["advantage"]["what_if"]) for row in rows]),
    ]
    print_columns(console, columns)


def _print_stages(console: Console, replay: Replay) -> None:
    digits = 12 if console.width >= WIDE else 8
    rows: list[tuple[str | Text, ...]] = []
    if replay.weights is not None:
        weights = replay.weights
        stored = weights.stored[:digits]
        origin = "the models" if weights.checkpoint is None else f"checkpoint {weights.checkpoint}"
        origin += f" + {weights.updates} update{'s' if weights.updates > 1 else ''}" if weights.updates else ""
        rows.append((f"weights, {origin}", "", stored, weights.replayed[:digits], _yes(), f"{weights.seconds:.2f}"))
    for stage in replay.stages:
        seconds = "" if stage.skipped is not None else f"{stage.seconds:.2f}"
        replayed = "" if stage.replayed is None else stage.replayed[:digits]
        rows.append((stage.stage, str(stage.rows), stage.stored[:digits], replayed, _verdict(stage), seconds))
        if stage.weights is not None:
            stored, again = stage.weights
            same = _yes() if stored == again else _no()
            rows.append(("  weights after it", "", stored[:digits], again[:digits], same, ""))
    headings = ("stage", "rows", "stored", "replayed", "identical", "seconds")
    columns = [
        Column(heading, cells, is_name=heading == "stage", is_left=heading not in ("rows", "seconds"))
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    print_columns(console, columns)


def _verdict(stage: StageReplay) -> Text:
    if stage.is_identical is None:
        return Text("not replayed", "yellow")
    return _yes() if stage.is_identical else _no()


def _yes() -> Text:
    return Text("yes", "green")


def _no() -> Text:
    return Text("no", "bold red")


def _show_stage(console: Console, stage: StageReplay) -> None:
    """Everything that differs in one stage."""
    if stage.failed is not None:
        _line(console, f"{stage.stage} could not be computed again: {stage.failed}", style="red")
    if stage.difference is not None:
        columns = stage.difference.columns
        _line(console, f"{stage.stage}: first difference in {_place(columns[0])}", style="bold")
        _print_differences(console, columns)
    for line in stage.others[:SHOWN_LINES]:
        _line(console, f"  {stage.stage}: {line}")
    if len(stage.others) > SHOWN_LINES:
        _line(console, f"  {stage.stage}: and {len(stage.others) - SHOWN_LINES} more lines: --json has all")


def _place(column: ColumnDifference) -> str:
    at = column.first
    token = "" if at.position is None else f", position {at.position}"
    return f"{at.column}, row {at.row} ({at.key}){token}: stored {_value(at.stored)}, replayed {_value(at.replayed)}"


def _print_differences(console: Console, found: Sequence[ColumnDifference]) -> None:
    rows: list[tuple[str, ...]] = []
    for column in found:
        at = column.first
        where = at.key if at.position is None else f"{at.key}[{at.position}]"
        largest = "" if column.largest is None else f"{column.largest:.3g}"
        ulp = "" if column.largest_ulp is None else f"{column.largest_ulp:,}"
        rows.append((at.column, f"{column.num_different:,} of {column.num_values:,}", largest, ulp, where))
    headings = ("column", "values that\ndiffer", "largest\ndifference", "in ulp", "first at")
    columns = [
        Column(heading, cells, is_name=heading == "column", is_left=heading in ("column", "first at"))
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    print_columns(console, columns)


def _print_quantities(console: Console, quantities: Sequence[Quantity]) -> None:
    rows: list[list[Text]] = []
    for quantity in quantities:
        change = _change(quantity.stored, quantity.what_if)
        cells = (quantity.name, _number(quantity.stored), _number(quantity.what_if), change)
        rows.append([Text(cell, "dim" if change in ("", "=", "≈") else "") for cell in cells])
    columns = [
        Column(heading, cells, is_name=heading == "quantity")
        for heading, cells in zip(("quantity", "stored", "what if", "change"), zip(*rows, strict=True), strict=True)
    ]
    print_columns(console, columns)


def _change(stored: float | None, what_if: float | None) -> str:
    if stored is None or what_if is None:
        return ""
    if stored == what_if:
        return "="
    return f"{what_if - stored:+.4g}" if abs(what_if - stored) > ROUNDING * max(1.0, abs(stored)) else "≈"


def _print_tokens(console: Console, tokens: Sequence[Mapping[str, Any]], again: str, *, digits: int = EXACT) -> None:
    """One row a token; a cell is one number where both are the same, else both. The rest of the columns below."""
    names = [name for name in (tokens[0] if tokens else ()) if name not in ("position", "token")]
    place = [f"{row['position']} {row['token']}" for row in tokens]
    columns = [Column("token", place, is_name=True)]
    columns += [Column(name.replace("_", " "), [_pair(row[name], again, digits) for row in tokens]) for name in names]
    print_columns(console, columns)


def _pair(cell: Mapping[str, Any], again: str, digits: int) -> Text:
    then = cell["stored"]
    if again not in cell:
        return Text(_value(then, SHORT), "dim")
    now = cell[again]
    if then == now:
        return Text(_value(then, SHORT))
    return Text(f"{_value(then, digits)} → {_value(now, digits)}", "red")


def _show_bundle(console: Console, path: Path, record: BundleRecord, *, as_json: bool) -> None:
    from rlhf_core.contracts.durable import hash_file

    size, digest, parts = path.stat().st_size, hash_file(path), record.contents()
    if as_json:
        about = {"bundle": str(path), "bytes": size, "sha256": digest, "run": record.run}
        _print_json(about | {"iteration": record.iteration, "with_models": record.with_models, "parts": parts})
        return
    _line(console, f"{path}: iteration {record.iteration} of {record.run}", style="bold")
    table = _table()
    table.add_column("part", no_wrap=True)
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    for row in parts:
        table.add_row(Text(row["part"]), str(row["files"]), _size(row["bytes"]))
    table.add_section()
    table.add_row("the bundle", str(sum(row["files"] for row in parts) + 1), _size(size))
    console.print(table)
    _line(console, f"sha256 {digest}")


def _table() -> Table:
    return Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _line(console: Console, text: str, *, style: str = "") -> None:
    console.print(Text(shown(text), style), soft_wrap=True)


def _stages(stages: Sequence[StageReplay]) -> str:
    return stages[0].stage if len(stages) == 1 else f"all {len(stages)} stages"


def _threads(replay: Replay) -> str:
    used = f"{replay.num_threads} CPU thread{'s' if replay.num_threads > 1 else ''}"
    return (
        f"{used}, as the run"
        if replay.num_threads == replay.threads_of_run
        else f"{used}; {replay.threads_of_run} then"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _value(value: Any, digits: int = EXACT) -> str:
    if value is None:
        return "absent"
    text = f"{value:.{digits}g}" if isinstance(value, float) else str(value) if isinstance(value, int) else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 10_000 else f"{num_bytes:,} B"


def _print_json(values: Mapping[str, Any]) -> None:
    write_json(values)


@contextmanager
def _computing(console: Console, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Name the stage that is computed, where somebody watches."""
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("opening") as status:
        yield lambda stage: status.update(f"computing {stage} again")
