"""Strict YAML, ``--set``, the template and the names of a config."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import (
    MAX_CONFIG_BYTES,
    MAX_DEPTH,
    build_config,
    canonical_json,
    config_digest,
    config_template,
    digest_json,
    flat_params,
    load_config,
    parse_yaml,
)
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.policy_config import PolicyConfig
from rlhf_core.contracts.reward_config import ModelReward

EXAMPLES = settings(max_examples=50)
FULL: dict[str, Any] = {
    "seed": 2**63 - 1,
    "device": "cpu",
    "prompts": {"source": "a: b #c", "column": "no", "batch_size": 8, "max_len": 12, "shuffle": False},
    "policy": {"model": "café 🙂", "pad_token": "<|pad|>", "critic": {"kind": "shared"}},
    "reference": {"model": "~", "dtype": "bfloat16"},
    "reward": {"components": [{"name": "a", "model": "x"}, {"weight": -0.5, "max_len": 9}]},
    "generation": {"stop": ["\n\n", '"', "null", " "], "top_k": 5},
    "kl": {"coef": 1e-7, "horizon": 1e30},
    "ppo": {"learning_rate": 3e-6, "clip_range_high": 0.28, "max_grad_norm": None},
}


def read(path: Path, text: str | bytes, overrides: Sequence[str] = ()) -> RunConfig:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


class TestYaml:
    @pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff# with a byte-order mark"])
    def test_nothing_is_all_defaults(self, file: Path, text: str) -> None:
        assert read(file, text) == RunConfig()

    @pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001"])
    def test_a_number_in_any_notation(self, file: Path, text: str) -> None:
        rate = read(file, f"ppo: {{learning_rate: {text}}}").ppo.learning_rate
        assert rate == 1e-5
        assert isinstance(rate, float)

    @pytest.mark.parametrize("text", ["no", "yes", "on", "off", "NO", "1:30", "2024-01-01", "'null'", "'3'", "0x"])
    def test_text_stays_text(self, file: Path, text: str) -> None:
        plain = text.strip("'")
        config = read(file, f"policy: {{pad_token: {text}}}\ngeneration: {{stop: [{text}]}}")
        assert (config.policy.pad_token, config.generation.stop) == (plain, [plain])

    @pytest.mark.parametrize("text", ["true", "3", "1.5", "[no]", "{a: b}"])
    def test_what_is_no_text_is_not_taken_for_one(self, file: Path, text: str) -> None:
        with pytest.raises(UserError, match=r"^policy\.pad_token.*valid string|^policy\.pad_token\.a is not a known"):
            read(file, f"policy: {{pad_token: {text}}}")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("seed: 1\nseed: 1", r'not valid YAML at line 2, column 1: found duplicate key "seed"'),
            ("kl: {coef: 1.0, coef: 2.0}", r'at line 1, column 17: found duplicate key "coef"'),
            ("seed: &x 1\nnum_iterations: *x", r"uses a YAML alias \(\*name\), which is not accepted"),
            ("seed: [1", r"at line 1, column \d+: expected ',' or '\]'"),
            ("\tseed: 1", r"at line 1, column 1: found character '\\t'"),
            ("seed: 1\n---\nseed: 2", r"at line 2, column 1: but found another document"),
            ("seed: !python/object:os.system 3", r"at line 1, column 7: could not determine a constructor"),
            ("seed: !!python/object/apply:os.system [ls]", r"at line 1, column 7: could not determine a constructor"),
            ("seed: " + "9" * 5000, r"not valid YAML: Exceeds the limit"),
            ("- seed", "holds a list; a mapping of sections is needed"),
            ("seed", "holds a str; a mapping of sections is needed"),
        ],
    )
    def test_refused(self, file: Path, text: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            read(file, text)
        assert str(file) in str(caught.value)
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            "seed: \x07",
            "seed: \x00",
            "a: !!binary aGk=",
            "a: !!set {b}",
            "? [a]\n: 3",
            "? {a: b}\n: 3",
            "null: 3",
            "1: 2",
        ],
    )
    def test_what_json_does_not_have_is_a_sentence_too(self, file: Path, text: str) -> None:
        with pytest.raises(UserError):
            read(file, text)

    def test_depth(self, file: Path) -> None:
        with pytest.raises(UserError, match="seed is "):  # parsed, and then refused for its type
            read(file, "seed: " + "[" * 10 + "]" * 10)
        for too_many in (MAX_DEPTH, 100_000):
            with pytest.raises(UserError, match=f"nested more than {MAX_DEPTH} levels deep"):
                read(file, "seed: " + "[" * too_many + "]" * too_many)

    def test_size(self, file: Path) -> None:
        assert read(file, "#" * MAX_CONFIG_BYTES) == RunConfig()
        with pytest.raises(UserError, match=f"larger than {MAX_CONFIG_BYTES} bytes"):
            read(file, "#" * (MAX_CONFIG_BYTES + 1))

    def test_not_utf_8(self, file: Path) -> None:
        with pytest.raises(UserError, match=r"run\.yaml is not UTF-8 text \(byte 6\)"):
            read(file, b"seed: \xff")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is not a file; `rlhf config > .* writes a template"):
            load_config(tmp_path / "none.yaml")

    @EXAMPLES
    @given(st.text(max_size=40) | st.text(alphabet="{}[]:-,?&*!|>'\"%@` \n\ta1#~", max_size=40))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        with contextlib.suppress(UserError):
            tree = parse_yaml(text, origin="it")
            build_config(tree if isinstance(tree, dict) else {})


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "knob", "value"),
        [
            ("ppo.learning_rate=1e-5", "ppo.learning_rate", 1e-5),
            ("ppo.learning_rate = 2 ", "ppo.learning_rate", 2.0),
            ("policy.critic.kind=shared", "policy.critic.kind", "shared"),
            ("policy.pad_token=no", "policy.pad_token", "no"),
            ("policy.pad_token=", "policy.pad_token", None),
            ("policy.model=a=b", "policy.model", "a=b"),
            ("generation.stop=[no, 'x']", "generation.stop", ["no", "x"]),
            ("generation.stop.0=no", "generation.stop", ["no"]),
            ("reward.components.0.model=m", "reward.components.0.model", "m"),
            ("policy={model: m}", "policy.model", "m"),
        ],
    )
    def test_sets(self, override: str, knob: str, value: Any) -> None:
        assert flat_params(build_config({}, [override]))[knob] == value

    def test_into_a_list(self) -> None:
        tree = {"reward": {"components": [{"model": "a", "weight": 2.0}]}}
        overrides = ["reward.components.0.weight=0.5", "reward.components.1.model=b", "reward.components.1.name=second"]
        first, second = build_config(tree, overrides).reward.components
        assert first == ModelReward(model="a", weight=0.5)
        assert second == ModelReward(model="b", name="second")
        assert tree == {"reward": {"components": [{"model": "a", "weight": 2.0}]}}, "the caller's tree is its own"

    def test_replaces_a_list_item(self) -> None:
        assert build_config({"generation": {"stop": ["a", "b"]}}, ["generation.stop.1=c"]).generation.stop == ["a", "c"]

    def test_the_last_one_wins_and_the_file_loses(self, file: Path) -> None:
        assert read(file, "seed: 1", ["seed=2", "seed=3"]).seed == 3

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("seed", "--set 'seed' is not of the form section.key=value"),
            ("=3", "--set '=3' is not of the form section.key=value"),
            ("", "--set '' is not of the form section.key=value"),
            (
                "reward.components.2.model=x",
                "--set reward.components.2.model: reward.components.2 does not exist; the list has 1 items (from 0)",
            ),
            (
                "reward.components.first.model=x",
                "--set reward.components.first.model: reward.components.first does not exist; the list has 1 items "
                "(from 0)",
            ),
            ("ppo.clip_range.low=1", "--set ppo.clip_range.low: ppo.clip_range is 0.1, which has no keys"),
            ("ppo.clip_rage=0.1", "ppo.clip_rage is not a known key; did you mean clip_range?"),
            ("ppo.clip_range=a", "ppo.clip_range is 'a': input should be a valid number"),
        ],
    )
    def test_refused(self, override: str, sentence: str) -> None:
        tree = {"reward": {"components": [{"model": "a"}]}, "ppo": {"clip_range": 0.1}}
        with pytest.raises(UserError) as caught:
            build_config(tree, [override])
        assert caught.value.problems == (sentence,)

    @pytest.mark.parametrize("value", ["[1", "*a", "{", "a: b: c", "\x00", "\x07", "!!python/name:os.system x"])
    def test_a_value_that_is_no_yaml(self, value: str) -> None:
        with pytest.raises(UserError, match=r"^--set policy\.model "):
            build_config({}, [f"policy.model={value}"])


class TestTemplate:
    def test_is_the_defaults(self, file: Path) -> None:
        assert read(file, config_template(RunConfig())) == RunConfig()

    @pytest.mark.parametrize("tree", [FULL, {"reward": {"components": [{}]}}])
    def test_reads_back_as_the_same_config(self, file: Path, tree: dict[str, Any]) -> None:
        config = build_config(tree)
        assert read(file, config_template(config)) == config

    @EXAMPLES
    @given(st.text(max_size=12))
    def test_any_text_reads_back(self, text: str) -> None:
        config = RunConfig(policy=PolicyConfig(model=text))
        tree = parse_yaml(config_template(config), origin="template")
        assert build_config(tree) == config

    def test_without_a_config_it_shows_one_component(self, file: Path) -> None:
        assert read(file, config_template()) == build_config({"reward": {"components": [{}]}})

    def test_has_every_knob_with_its_documentation(self) -> None:
        lines = [line.strip().removeprefix("# ").strip().removeprefix("- ") for line in config_template().splitlines()]
        missing = [name for name, _ in knobs(RunConfig) if not any(line.startswith(f"{name}:") for line in lines)]
        assert not missing
        undocumented = [d for _, d in knobs(RunConfig) if d and not any(line.endswith(d) for line in lines)]
        assert not undocumented

    def test_has_no_key_that_is_no_knob(self) -> None:
        tree = parse_yaml(config_template(), origin="template")
        assert flat(tree) == flat_params(build_config({"reward": {"components": [{}]}})).keys()


class TestNames:
    def test_digest_knows_no_tracking_and_no_order(self) -> None:
        tree = {"seed": 3, "ppo": {"learning_rate": 1e-4, "vf_coef": 0.5}}
        turned = {"ppo": {"vf_coef": 0.5, "learning_rate": 1e-4}, "seed": 3, "tracking": {"enabled": False, "uri": "x"}}
        assert config_digest(build_config(tree)) == config_digest(build_config(turned))
        assert config_digest(build_config({"kl": {"target": 6}})) == config_digest(RunConfig()), "6 is 6.0"

    @pytest.mark.parametrize("override", ["seed=1", "ppo.vf_coef=0.2", "reward.components.0.weight=2", "device=cpu"])
    def test_digest_knows_every_other_knob(self, override: str) -> None:
        assert config_digest(build_config({}, [override])) != config_digest(RunConfig())

    def test_canonical_json(self) -> None:
        assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"é","b":[1,2.5,null,true]}'.encode()
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="not JSON compliant"):
                canonical_json({"x": value})

    def test_digest_is_the_sha256_of_it(self) -> None:
        # printf '{"a":1}' | sha256sum
        assert digest_json({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"

    def test_half_a_surrogate_pair_is_refused(self) -> None:
        """YAML can write it, the UTF-8 of a digest cannot."""
        with pytest.raises(UserError):
            build_config({"policy": {"model": "\ud800"}})

    def test_flat_params(self) -> None:
        params = flat_params(build_config(FULL))
        assert params["ppo.learning_rate"] == 3e-6
        assert params["policy.critic.kind"] == "shared"
        assert params["reward.components.1.weight"] == -0.5
        assert params["generation.stop"] == ["\n\n", '"', "null", " "]
        assert params["policy.model"] == "café 🙂"
        assert not any(isinstance(value, dict) for value in params.values())
        json.dumps(params)


def knobs(section: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """(name, description) of every knob."""
    for name, field in section.model_fields.items():
        yield name, field.description
        for child in sections_in(field.annotation):
            yield from knobs(child)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Those that a field holds, alone, in a list or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for a in getattr(annotation, "__args__", ()) for section in sections_in(a)]


def flat(tree: Any, prefix: str = "") -> set[str]:
    """Dotted keys of the leaves."""
    sections = isinstance(tree, list) and any(isinstance(item, dict) for item in tree)
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if sections else None
    if items is None:
        return {prefix}
    return {leaf for key, value in items for leaf in flat(value, f"{prefix}.{key}" if prefix else str(key))}
