"""The suite itself: its arithmetic, its list, and that what has no accelerator here still runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.figures import Figure, alternate, log_log_slope, median_of, ratio
from benchmarks.operations import Models, Shape, stage_operations
from benchmarks.processes import measured
from benchmarks.suite import TABLES, Effort, Result, load_table, measure_table, unlisted_tables
from benchmarks.tables.quality import first_window
from benchmarks.world import ROOT, World
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

COUNTED = Shape(linear_parameters=100, layers=2, attention_width=4, hidden_size=4, vocabulary=10)


class TestOperations:
    def test_of_a_pass_by_hand(self) -> None:
        # 3 tokens: 2·100·3 = 600; contexts 1 + 2 + 3 = 6: 4·4·2·6 = 192
        assert COUNTED.trunk(3) == 792
        # the next 2 tokens see 4 and 5: 2·100·2 = 400; 4·4·2·9 = 288
        assert COUNTED.trunk(2, before=3) == 688
        assert COUNTED.trunk(5) == 792 + 688
        assert COUNTED.trunk(0, before=3) == 0
        assert COUNTED.logits(2) == 2 * 4 * 10 * 2
        assert COUNTED.scalars(2) == 2 * 4 * 2

    def test_of_the_stages_by_hand(self) -> None:
        """One prompt of 3 tokens, one response of 2: 4 tokens are read, 5 to score."""
        reward = Shape(linear_parameters=50, layers=1, attention_width=4, hidden_size=4)
        counted = stage_operations(Models(COUNTED, reward, critic=reward), {7: 3}, [(7, 2)], epochs=2)
        taught = 2 * 100 * 4 + 4 * 4 * 2 * 10
        head = 2 * 4 * 10 * 2
        values = 2 * 50 * 4 + 4 * 4 * 1 * 10 + 2 * 4 * 2
        assert counted == {
            "sample_prompts": 0,
            "generate": taught + head + values,
            "score_rewards": 2 * 50 * 5 + 4 * 4 * 1 * 15 + 2 * 4,
            "reference_logprobs": taught + head,
            "shape_rewards": 0,
            "ppo_update": 2 * 3 * (taught + head + values),
        }

    def test_a_prompt_is_read_once_for_its_samples(self) -> None:
        one = stage_operations(Models(COUNTED, COUNTED, None), {0: 3}, [(0, 2)], epochs=1)
        two = stage_operations(Models(COUNTED, COUNTED, None), {0: 3}, [(0, 2), (0, 2)], epochs=1)
        assert two["generate"] == 2 * one["generate"] - COUNTED.trunk(3)
        assert two["ppo_update"] == 2 * one["ppo_update"]

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_reads_the_shape_off_the_layers(self, kind: str) -> None:
        shape = Shape.of(_model(kind))
        assert (shape.layers, shape.attention_width, shape.hidden_size, shape.vocabulary) == (2, 8, 8, 30)
        # GPT-2: D·3D + D·D + D·4D + 4D·D.  Llama: q and o D·D, k and v D·D/2 (half of the heads), three D·20
        by_layer = {"gpt2": 12 * 64, "llama": 2 * 64 + 2 * 32 + 3 * 160}
        assert shape.linear_parameters == 2 * by_layer[kind]

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_is_what_torch_counts(self, kind: str) -> None:
        """But for attention, where torch counts what the causal mask hides, too."""
        model = _model(kind)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 16, dtype=torch.int64, device="meta"))
        shape = Shape.of(model)
        hidden = 4 * shape.attention_width * shape.layers * (16 * 16 - 16 * 17 // 2)
        assert counter.get_total_flops() == shape.trunk(16) + shape.logits(16) + hidden


def _model(kind: str) -> Any:
    """Two layers of width 8, without weights."""
    sizes: dict[str, Any] = {"vocab_size": 30, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "llama":
        sizes |= {"intermediate_size": 20, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class TestFigures:
    @pytest.mark.parametrize(
        ("figure", "met", "verdict"),
        [
            (Figure("", 2.6, 2.5), True, "yes"),
            (Figure("", 2.2, 2.5), False, "12 % below"),
            (Figure("", 2.0, 1.6, "at most"), False, "25 % above"),
            (Figure("", 8.0, 1.6, "at most"), False, "5 times the goal"),
            (Figure("", 1.6, 1.6, "at most"), True, "yes"),
            (Figure("", -3.0, 5.0, "at most", "%"), True, "yes"),
            (Figure("", 7.0, 5.0, "at most", "%"), False, "by 2 %"),
            (Figure("", math.inf, 0.25, "at most"), False, "never reached"),
            (Figure("", None, 2.5), None, "not measured"),
            (Figure("", None, 2.5, why_not="TRL not measured"), None, "TRL not measured"),
            (Figure("", 1.0, 5.0, why_not="no GPU here"), None, "no GPU here"),
            (Figure("", 1.0), None, ""),
        ],
    )
    def test_met_or_by_how_much_not(self, figure: Figure, met: bool | None, verdict: str) -> None:
        assert figure.met is met
        assert figure.verdict == verdict
        json.dumps(figure.to_json(), allow_nan=False)

    def test_texts(self) -> None:
        figure = Figure("", 1234.5, 0.6, "at most", "x TRL")
        assert (figure.goal_text, figure.value_text) == ("≤ 0.6 x TRL", "1,234 x TRL")

    def test_medians_leave_out_what_was_not_measured(self) -> None:
        assert median_of([3.0, None, 1.0, 2.0]) == 2.0
        assert median_of([None]) is None
        assert ratio(3.0, 2.0) == 1.5
        assert ratio(None, 2.0) is None
        assert ratio(1.0, 0.0) is None

    def test_sides_take_turns_and_swap(self) -> None:
        order: list[str] = []

        def side(name: str) -> Callable[[int], str]:
            def measure(turn: int) -> str:
                order.append(name)
                return f"{name}{turn}"

            return measure

        assert alternate({"A": side("A"), "B": side("B")}, 3) == {"A": ["A0", "A1", "A2"], "B": ["B0", "B1", "B2"]}
        assert order == ["A", "B", "B", "A", "A", "B"]

    def test_slope(self) -> None:
        assert log_log_slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1.0)
        assert log_log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)

    def test_the_first_window_at_the_threshold(self) -> None:
        assert first_window([0, 1, 2, 3, 4], 3.0, window=2) == 4
        assert first_window([5, 1, 5], 3.0, window=2) == 1
        assert first_window([5], 3.0, window=2) is None
        assert first_window([1, 1, 1], 3.0, window=2) is None


class TestTables:
    @pytest.mark.parametrize("name", TABLES)
    def test_has_what_a_table_has(self, name: str) -> None:
        table = load_table(name)
        assert table.NAME
        assert table.GOAL
        assert callable(table.measure)

    def test_none_is_forgotten(self) -> None:
        assert unlisted_tables() == []

    def test_one_that_raises_has_failed(self, tmp_path: Path) -> None:
        class Broken:
            NAME: str = "broken"
            GOAL: str = "none"

            def measure(self, effort: Effort) -> Result:
                raise ZeroDivisionError("one by nothing")

        result = measure_table(Broken(), Effort(True, 1, 1, tmp_path, World(tmp_path)))
        assert result.met is None
        assert result.failure == "it raised ZeroDivisionError: one by nothing"

    def test_is_met_only_if_all_that_could_be_judged_is(self) -> None:
        good, bad, unknown = Figure("", 1.0, 1.0), Figure("", 0.5, 1.0), Figure("", None, 1.0)
        assert Result([good, unknown]).met
        assert Result([good, bad]).met is False
        assert Result([unknown]).met is None


def test_a_measured_process_tells_its_memory_and_its_failure(tmp_path: Path) -> None:
    held = "import time; held = b'x' * 50_000_000; time.sleep(0.5)"
    ended = measured([sys.executable, "-c", held], threads=1, folder=tmp_path)
    assert 50e6 < ended.peak_bytes < 500e6
    assert ended.memory
    with pytest.raises(RuntimeError, match="ended with code 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"], threads=1, folder=tmp_path)


def test_the_accelerator_script_runs_where_there_is_none(tmp_path: Path) -> None:
    """In a process of its own, and importing nothing but what the core needs."""
    out = tmp_path / "found.json"
    code = (
        "import sys, runpy\n"
        "sys.argv = ['accelerator', '--small', '--rounds', '1', '--json', sys.argv[1]]\n"
        "runpy.run_module('benchmarks.accelerator', run_name='__main__')\n"
        "assert not {'prefect', 'mlflow', 'trl', 'rich', 'flows', 'tasks'} & set(sys.modules), 'more than the core'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["small"]
    assert found["decode"]["tokens_per_s"].keys() == {"ours", "transformers, autocast", "transformers, cast"}
    assert found["update"]["operations"] > 0
    assert "goal" in done.stdout
