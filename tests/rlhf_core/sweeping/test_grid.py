"""From options to runs: every combination is built, and every mistake told, before anything begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.sweeping.grid import parse_grid, parse_seeds, plan_runs, point_label, together

MakeConfig = Callable[[Sequence[str]], RunConfig]


def refused(work: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        work()
    return list(caught.value.problems)


def test_values_are_yaml() -> None:
    grid = parse_grid(["kl.coef=0.02,5e-2", "prompts.shuffle=true,false", "generation.stop=[a],[b, c]", "device=cpu"])
    assert grid == {
        "kl.coef": [0.02, 0.05],
        "prompts.shuffle": [True, False],
        "generation.stop": [["a"], ["b", "c"]],
        "device": ["cpu"],
    }


def test_every_mistake_of_the_options_is_told_at_once() -> None:
    texts = ["kl.coef", "kl.target=", "ppo.level=token,sequence", "ppo.level=token", "a.b=[1"]
    told = refused(lambda: parse_grid(texts, ["ppo.level=token", "ppo={}"]))
    assert told[0] == "--grid 'kl.coef' is not of the form section.key=value,value"
    assert told[1].startswith("--grid 'kl.target='")
    assert told[2] == "--grid ppo.level is given twice; give all of its values at once"
    assert told[3].startswith("--grid a.b is not valid YAML")
    assert told[4].startswith("--grid ppo.level and --set ppo.level are of the same key")
    assert told[5].startswith("--grid ppo.level and --set ppo are of the same key")
    assert len(told) == 6


@pytest.mark.parametrize(
    ("text", "seeds"), [(None, [4]), ("3", [4, 5, 6]), ("1,2,5", [1, 2, 5]), ("7,", [7]), (" 0 , 9 ", [0, 9])]
)
def test_seeds_are_a_number_of_them_or_named(text: str | None, seeds: list[int]) -> None:
    assert parse_seeds(text, 4) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,a", "1001", "1;2", "1,,2"])
def test_seeds_that_are_neither(text: str) -> None:
    (told,) = refused(lambda: parse_seeds(text, 0))
    assert told.startswith(f"--seeds is {text!r}" if not text.isdecimal() else f"--seeds is {text}")


def test_seed_by_seed_the_last_key_changing_fastest(tiny_config: MakeConfig) -> None:
    config = tiny_config(["tracking.registered_model=mine"])
    runs = plan_runs(config, {"kl.coef": [0.1, 0.2], "ppo.learning_rate": [1e-4, 1e-3]}, [3, 5])
    assert [(run.seed, run.point, run.config.kl.coef, run.config.ppo.learning_rate) for run in runs] == [
        (seed, point, coef, rate)
        for seed in (3, 5)
        for point, (coef, rate) in enumerate([(0.1, 1e-4), (0.1, 1e-3), (0.2, 1e-4), (0.2, 1e-3)])
    ]
    assert [run.config.seed for run in runs] == [3] * 4 + [5] * 4
    assert runs[0].name == runs[0].config.tracking.run_name == "kl.coef=0.1_ppo.learning_rate=0.0001_seed=3"
    assert runs[0].config.tracking.registered_model == "mine-sweep", "a trial does not move the aliases of others"
    assert runs[0].config.generation == config.generation


def test_names_that_would_be_alike_or_too_long_are_numbers(tiny_config: MakeConfig) -> None:
    alike = plan_runs(tiny_config([]), {"generation.stop": [["a/b"], ["a:b"]]}, [0])
    assert [run.name for run in alike] == ["point=000_seed=0", "point=001_seed=0"]
    by_case = plan_runs(tiny_config([]), {"generation.stop": [["end"], ["End"]]}, [0])
    assert [run.name for run in by_case] == ["point=000_seed=0", "point=001_seed=0"], "some disks take them for one"
    long = plan_runs(tiny_config([]), {"generation.stop": [["x" * 150], ["y"]]}, [0])
    assert [run.name for run in long] == ["point=000_seed=0", "point=001_seed=0"]
    hostile = plan_runs(tiny_config([]), {"policy.model": ["../../etc", "b"]}, [0])
    assert [run.name for run in hostile] == ["policy.model=etc_seed=0", "policy.model=b_seed=0"]


def test_without_a_grid_there_is_one_point(tiny_config: MakeConfig) -> None:
    runs = plan_runs(tiny_config([]), {}, [1, 2])
    assert [(run.name, run.point, run.seed) for run in runs] == [("seed=1", 0, 1), ("seed=2", 0, 2)]
    assert point_label(runs[0].values) == "the config"


@pytest.mark.parametrize(
    ("grid", "seeds", "told"),
    [
        ({"seed": [1, 2]}, [0], ["--grid seed is not a point of its own"]),
        ({"kl.coef": []}, [0], ["--grid kl.coef has no values"]),
        ({"kl.coef": [0.1, 0.2, 0.1]}, [0, 0], ["--grid kl.coef has the value 0.1 twice", "--seeds has 0 twice"]),
        ({"kl": [{}], "kl.coef": [0.1]}, [], ["--grid kl and --grid kl.coef are of the same key", "--seeds is empty"]),
        ({"tracking.experiment": ["a", "b"]}, [0], ["--grid: the points tracking.experiment=a and tracking.experi"]),
        ({"kl.coef": [0.1, 0.2]}, list(range(40)), ["--grid and --seeds give 2 kl.coef x 40 seeds = 80 runs, more"]),
        ({"kl.coef": [-1.0, 0.1], "ppo.clip_rang": [1]}, [0, 1],
         ["kl.coef is -1.0: input should be greater than or equal to 0 (at kl.coef=-1.0, ppo.clip_rang=1)",
          "ppo.clip_rang is not a known key; did you mean clip_range?"]),
        ({"kl.coef.x": [1]}, [0], ["--grid kl.coef.x: kl.coef is"]),
        ({"kl.coef": [0.1]}, [-3], ["seed is -3"]),
    ],
)  # fmt: skip
def test_mistakes_of_every_combination(
    grid: dict[str, list[Any]], seeds: list[int], told: list[str], tiny_config: MakeConfig
) -> None:
    found = refused(lambda: plan_runs(tiny_config([]), grid, seeds))
    assert len(found) == len(told), found
    for sentence, begins in zip(found, told, strict=True):
        assert sentence.startswith(begins)


def test_a_mistake_of_all_points_is_told_without_them() -> None:
    assert together([("a", ["x", "y"]), ("b", ["x"]), ("c", ["x", "z"]), ("d", ["x", "z"])]) == [
        "x", "y (at a)", "z (at c and 1 more)",
    ]  # fmt: skip


def test_more_runs_than_usual_must_be_meant(tiny_config: MakeConfig) -> None:
    assert len(plan_runs(tiny_config([]), {"kl.coef": [0.1, 0.2]}, list(range(40)), max_runs=80)) == 80
