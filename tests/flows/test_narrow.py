"""In 80 columns every table can be read: no number is broken, names are shortened in the middle, chats are spoken."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_policies import CHATML, chat_policy, chats, config_for
from damage import finished_run
from made_runs import made_evaluation, made_run
from rich.cells import cell_len
from tiny_world import Tiny
from torture.runs import start

from flows.console import Console
from flows.displays.comparison import compare_and_show
from flows.displays.inspection import Question, show_run
from flows.displays.narrow import Column, apart, cell_text, fitted, is_number, middle, print_columns, print_rows
from flows.displays.replay import show_replay, show_what_if
from flows.displays.runs import show_runs
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import iteration_rows, sample_tokens, stage_metrics
from rlhf_core.selection import Selection
from rlhf_core.tables import open_run
from tasks.session.session import open_session

WIDTH = 80
LONG = "a-run-with-a-very-long-name-{}-20261122-101500-learning-rate-0.00001"


def printed(show: Callable[[Console], object], width: int = WIDTH) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width))
    text = out.getvalue()
    assert text
    return text


def fits(text: str, *, sentences: bool = False) -> None:
    """No line of a table is wider than the terminal. Sentences wrap where the terminal does."""
    wide = [line for line in text.splitlines() if cell_len(line.rstrip()) > WIDTH]
    assert not wide or sentences, wide
    assert all(re.search(r"^\S.*(rlhf |: )", line) for line in wide), wide


def whole(text: str, numbers: Sequence[str]) -> None:
    """Each number stands on a line as a word of its own."""
    missing = [n for n in numbers if not re.search(rf"(?<![\w.-]){re.escape(n)}(?![\w.])", text)]
    assert not missing, text


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    open_session.cache_clear()
    return finished_run(tiny, tmp_path_factory.mktemp("narrow") / "run")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatting")
    model = chat_policy(folder / "policy", CHATML)
    asked = [[*chat[:1], {"role": "assistant", "content": "felt slow"}, {"role": "user", "content": f"why {i}"}]
             for i, chat in enumerate(chats("The film was", "This story felt", system="be brief"))]  # fmt: skip
    rows = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "The film"}, *chat[1:]]
            for chat in asked]  # fmt: skip
    open_session.cache_clear()
    start(config_for(model, rows), folder / "run")
    return folder / "run"


class TestColumns:
    def test_a_name_gives_way_and_a_number_never(self) -> None:
        columns = [Column("run", [LONG]), Column("name", [LONG], is_name=True), Column("n", ["123.456"])]
        assert fitted(columns, 100)[0] == len(LONG)
        assert fitted(columns, 100)[2] == 7
        assert fitted(columns, 40) == [len(LONG), 8, 7]

    def test_a_number_among_names_is_whole(self) -> None:
        columns = [
            Column("a", ["x" * 60, "0.0000012345"], is_name=True),
            Column("b", ["y" * 60, "-1.5e-05"], is_name=True),
        ]
        text = printed(lambda console: print_columns(console, columns), width=25)
        whole(text, ["0.0000012345", "-1.5e-05"])

    def test_what_does_not_fit_beside_follows_below(self) -> None:
        columns = [Column("name", ["a"], is_name=True), *(Column(f"n{i}", [f"{i}.123456789"]) for i in range(12))]
        text = printed(lambda console: print_columns(console, columns))
        fits(text)
        whole(text, [f"{i}.123456789" for i in range(12)])
        assert len([line for line in text.splitlines() if line.strip().startswith("a ")]) == 3

    def test_numbers_stand_at_the_right(self) -> None:
        text = printed(lambda console: print_columns(console, [Column("n", ["1", "100"])]))
        assert "   1" in text

    @pytest.mark.parametrize("width", range(1, 30))
    def test_the_middle_goes_first(self, width: int) -> None:
        for text in ("learning_rate=0.001_seed=12", "日本語のとても長い名前です", "a"):
            short = middle(text, width)
            assert cell_len(short) <= width or text == short
            assert short == text or "…" in short
        if width >= 9:
            assert middle("learning_rate=0.001_seed=12", width).endswith("=12" if width < 27 else "12")

    def test_shortened_names_are_still_told_apart(self) -> None:
        names = [LONG.format(word) for word in ("one", "other", "third")]
        for width in range(10, 70):
            assert len(set(apart(names, width))) == 3, width

    def test_what_is_a_number(self) -> None:
        for text in ("1", "-2.889 ± 0.031", "3 of 40", "1.2 GB", "1.0e-05", "nan".replace("nan", "0"), "5 min"):
            assert is_number(text), text
        for text in ("", "a-policy", "run 7", "stopped", "e" * 50):
            assert not is_number(text), text


class TestInspect:
    def test_iterations(self, run_dir: Path) -> None:
        text = printed(lambda console: show_run(console, run_dir, Question()))
        fits(text, sentences=True)
        for row in iteration_rows(RunFolder.open(run_dir)):
            whole(text, [cell_text(row[name]) for name in ("score", "kl", "beta", "entropy", "length", "seconds")])

    def test_an_iteration_and_its_metrics(self, run_dir: Path) -> None:
        text = printed(lambda console: show_run(console, run_dir, Question(iteration=1)))
        fits(text)
        metrics = stage_metrics(RunFolder.open(run_dir), 1)
        whole(text, [f"{metrics['objective/scores']:.3f}", f"{metrics['objective/kl']:.3f}"])
        assert "ppo_update" in text

    @pytest.mark.parametrize("stage", ["sample_prompts", "generate", "shape_rewards", "ppo_update", "score_rewards"])
    def test_the_rows_of_a_stage(self, run_dir: Path, stage: str) -> None:
        fits(printed(lambda console: show_run(console, run_dir, Question(stage=stage))), sentences=True)

    def test_samples(self, run_dir: Path) -> None:
        question = Question(selection=Selection("kl", False, None, None))
        text = printed(lambda console: show_run(console, run_dir, question))
        fits(text, sentences=True)
        rows = open_run(run_dir).samples([2]).arrow().to_pylist()
        for row in rows:
            whole(text, [row["sample_id"], f"{row['score']:.2f}", f"{row['kl']:.2f}"])
            assert " ".join(row["prompt_text"].split())[:20] in text

    def test_a_sample_token_by_token(self, run_dir: Path) -> None:
        sample = open_run(run_dir).samples([2]).arrow()["sample_id"][0].as_py()
        text = printed(lambda console: show_run(console, run_dir, Question(sample=sample)))
        fits(text)
        _, tokens = sample_tokens(RunFolder.open(run_dir), sample)
        for row in tokens:
            whole(text, [f"{row[n]:.3f}" for n in ("logprob", "ref_logprob", "advantage") if abs(row[n]) >= 1e-3])

    def test_a_chat_is_shown_by_its_last_user_message(self, chatting: Path) -> None:
        question = Question(samples=True)
        for width in (WIDTH, 140):
            text = printed(lambda console: show_run(console, chatting, question), width=width)
            assert "why 0" in text
            assert "im_start" not in text
        sample = open_run(chatting).samples([0]).arrow()["sample_id"][0].as_py()
        text = printed(lambda console: show_run(console, chatting, Question(sample=sample)))
        assert re.search(r"prompt +why \d", text)
        assert "im_start" not in text
        assert "--json has it as the policy reads it" in text

    def test_the_rest_is_one_step_away(self, chatting: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sample = open_run(chatting).samples([0]).arrow()["sample_id"][0].as_py()
        show_run(Console(), chatting, Question(sample=sample), as_json=True)
        assert "<|im_start|>system\nbe brief" in json.loads(capsys.readouterr().out)["prompt"]

    @pytest.mark.parametrize(
        ("question", "told"),
        [
            (Question(selection=Selection("kl", False, None, None)), " of iteration 2, "),
            (Question(samples=True, iterations="all"), " of iterations 0 to 2, "),
            (Question(samples=True, iterations="0,2"), " of iterations 0, 2, "),
            (Question(stage="generate", iteration=1), " of iteration 1, "),
            (Question(), " of iterations 0 to 2, "),
        ],
    )
    def test_to_says_which_iterations_it_wrote(
        self, run_dir: Path, tmp_path: Path, question: Question, told: str
    ) -> None:
        text = printed(lambda console: show_run(console, run_dir, question, to=tmp_path / "t.jsonl"))
        assert told in text

    def test_to_with_a_limit_says_what_it_wrote(self, run_dir: Path, tmp_path: Path) -> None:
        question = Question(samples=True, iterations="0,2")
        text = printed(lambda console: show_run(console, run_dir, question, to=tmp_path / "t.jsonl", limit=8))
        assert "8 rows" in text
        assert " of iteration 0, " in text


class TestReplay:
    def test_a_difference(self, run_dir: Path) -> None:
        from rlhf_core.replay.comparison import ColumnDifference, Place, TableDifference
        from rlhf_core.replay.outcome import StageReplay, Weights

        place = Place("advantages", 1234, "i000007-p000123-s0", 1017, -0.123456789, -0.123456791)
        column = ColumnDifference(1_234_567, 12_345_678, 1.2345e-05, 1_234_567, place)
        stages = [
            StageReplay("generate", 512, "a" * 64, "b" * 64, 1234.56, difference=TableDifference((column,))),
        ]  # fmt: skip
        cell = {"stored": -12.3456789, "replayed": -12.3456781}
        tokens = [{"position": i, "token": "word" * 9} | dict.fromkeys("abcdefghij", cell) for i in (0, 1024)]
        replay = SimpleNamespace(
            run="runs/x", iteration=7, weights=Weights("c" * 64, "c" * 64, 6, 1, 12.34), stages=stages,
            sample="i000007-p000123-s0", tokens=tokens, is_identical=False, conditions=[], num_threads=2,
            threads_of_run=2,
        )  # fmt: skip
        text = printed(lambda console: show_replay(console, replay))  # pyright: ignore[reportArgumentType]
        fits(text, sentences=True)
        whole(text, ["1234.56", "12.34", "1,234,567 of 12,345,678", "1.23e-05", "1,234,567"])
        assert text.count("-12.3456789 → -12.3456781") == 20
        assert "weights, checkpoint 6 + 1 update " in text

    def test_a_what_if(self) -> None:
        from rlhf_core.replay.what_if import Advantages, Quantity

        row = {"sample_id": "i000007-p000123-s0", "score": {"stored": -1.23456, "what_if": 2.34567},
               "advantage": {"stored": 0.123456, "what_if": -0.654321}}  # fmt: skip
        cell = {"stored": 1.0, "what_if": 2.5}
        answer = SimpleNamespace(
            iteration=7, run="runs/x", changes=["kl.coef: 0.1 -> 0.2"], computed=["shape_rewards"], skipped={},
            notes=[], quantities=[Quantity("policy/a_metric_with_quite_a_long_name", 1.23456789, 12345.6789)],
            sample="s", tokens=[{"position": 0, "token": "x"} | dict.fromkeys("abcdefgh", cell)],
            advantages=Advantages(0.5, 3, 9, [row]),
        )  # fmt: skip
        text = printed(lambda console: show_what_if(console, answer))  # pyright: ignore[reportArgumentType]
        fits(text, sentences=True)
        whole(text, ["1.23457", "12345.7", "+1.234e+04", "-1.23456 → 2.34567", "-0.654321"])


class TestCompareAndRuns:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> list[Path]:
        up = [0.0, 1.0, 2.0, 3.0, 4.0, 123.456]
        kls = [0.1, 0.2, 11.5, 22.25, 33.0, 1234.5]
        made = list[RunFolder]()
        for i, name in enumerate((LONG.format("one"), LONG.format("other"), "c", "d")):
            policy = f"/home/somebody/models/in/a/folder/far/away/policy-{i}b-instruct"
            changes = [f"seed={i}", f"policy.model={policy}", f"ppo.learning_rate=1.23{i}e-05"]
            made.append(made_run(tmp_path / "runs" / name, [-s * 10**i for s in up], kls, changes=changes))
        made_evaluation(made[-1], "held-out", score=1.9, kl=2.0)
        return sorted((tmp_path / "runs").iterdir())

    def test_compare(self, runs: list[Path]) -> None:
        text = printed(lambda console: compare_and_show(console, runs, last=3, out=None, as_json=False))
        fits(text, sentences=True)
        whole(text, ["-43.485 ± 69.258", "-43485.333 ± 69258.434", "429.92 ± 696.81", "1.231e-05", "1.900 ± 0.200"])
        assert "…" in text
        assert "0 to 1.23e+03" in text

    def test_runs(self, runs: list[Path]) -> None:
        text = printed(lambda console: show_runs(console, runs[0].parent, as_json=False))
        fits(text, sentences=True)
        whole(text, ["6/6", "-123.456", "-1234.560", "1234.50"])
        assert "4 finished" in text
        names = [line.split()[0] for line in text.splitlines() if "6/6" in line]
        assert len(set(names)) == 4, "shortened, they are still told apart"

    def test_runs_as_json(self, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        show_runs(Console(), runs[0].parent, as_json=True)
        told = json.loads(capsys.readouterr().out)["runs"]
        assert {run["state"] for run in told} == {"finished"}
        assert {run["finished"] for run in told} == {6}
        assert all(run["bytes"] > 1_000 and run["kl"] == 1234.5 for run in told)


def test_rows_of_any_kind_fit() -> None:
    rows: list[Any] = [{"name": "x" * 200, "a_long_heading": 1.5, "none": None, "list": [1.0, 2.0], "flag": True}]
    text = printed(lambda console: print_rows(console, rows))
    fits(text)
    whole(text, ["1.500", "2 x 1.500"])
