"""The config tree: its defaults, the rules between knobs, and the sentence of every mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_core.contracts.config import KLConfig, RunConfig
from rlhf_core.contracts.config_io import build_config, flat_params
from rlhf_core.contracts.errors import UserError

DESIGN_DEFAULTS: dict[str, Any] = {
    # as docs/concepts/implementation-details.md has them, from Ziegler et al. 2019, "The N+ Implementation Details" and
    # peers
    "ppo.clip_range": 0.2,
    "ppo.clip_range_high": None,
    "ppo.value_clip_range": 0.2,
    "ppo.vf_coef": 0.1,
    "shaping.gamma": 1.0,
    "shaping.gae_lambda": 0.9,
    "ppo.num_ppo_epochs": 1,
    "ppo.num_minibatches": 4,
    "kl.coef": 0.15,
    "kl.target": 6.0,
    "kl.horizon": 10_000.0,
    "kl.estimator": "k1",
    "kl.controller": "adaptive",
    "generation.temperature": 1.0,
    "generation.top_k": None,
    "generation.top_p": 1.0,
    "ppo.adam_eps": 1e-5,
    "ppo.adam_beta1": 0.9,
    "ppo.adam_beta2": 0.999,
    "ppo.weight_decay": 0.0,
    "ppo.max_grad_norm": 1.0,
    "ppo.entropy_coef": 0.0,
    "ppo.level": "token",
    "shaping.level": "token",
    "shaping.estimator": "gae",
    "shaping.whiten_advantages": True,
    "shaping.whiten_rewards": False,
    "shaping.score_normalization": "none",
    "shaping.missing_eos_penalty": None,
}


def problems_of(tree: dict[str, Any]) -> Sequence[str]:
    with pytest.raises(UserError) as caught:
        build_config(tree)
    return caught.value.problems


@pytest.mark.parametrize("knob", DESIGN_DEFAULTS)
def test_default(knob: str) -> None:
    value = flat_params(RunConfig())[knob]
    assert value == DESIGN_DEFAULTS[knob]
    assert type(value) is type(DESIGN_DEFAULTS[knob])


def test_defaults_are_valid_together() -> None:
    assert build_config({}) == RunConfig()


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"prompts": {"batch_size": 10, "samples_per_prompt": 4}},
            "prompts.batch_size 10 is not a multiple of prompts.samples_per_prompt 4 nor of ppo.num_minibatches 4; use "
            "prompts.batch_size 8 or 12, or prompts.samples_per_prompt 2 or 5 and ppo.num_minibatches 2 or 5",
        ),
        (
            {"prompts": {"batch_size": 10}},
            "prompts.batch_size 10 is not a multiple of ppo.num_minibatches 4; use prompts.batch_size 8 or 12, or "
            "ppo.num_minibatches 2 or 5",
        ),
        (
            {"kl": {"coef": 0.0}},
            "kl.coef is 0 and kl.controller is adaptive: β would stay 0; use kl.controller fixed",
        ),
        (
            {"prompts": {"batch_size": 100}, "kl": {"horizon": 19.9}},
            "kl.horizon 19.9 is below 0.2 x prompts.batch_size = 20: β could turn negative; use kl.horizon 100 or more",
        ),
        (
            {"ppo": {"level": "sequence"}},
            "ppo.level is sequence and shaping.estimator is gae: a sequence-level ratio needs one "
            "advantage per response; use shaping.estimator value, reward, rloo or group",
        ),
        (
            {"ppo": {"level": "sequence", "loss_aggregation": "fixed_length"}, "shaping": {"estimator": "reward"}},
            "ppo.level is sequence and ppo.loss_aggregation is fixed_length: a response has one ratio, and there are "
            "no tokens to aggregate; use ppo.loss_aggregation token_mean",
        ),
        (
            {"shaping": {"estimator": "rloo"}},
            "prompts.samples_per_prompt is 1 and shaping.estimator is rloo: each response is compared with the others "
            "to its prompt; use prompts.samples_per_prompt 4, say",
        ),
        (
            {"shaping": {"estimator": "group"}},
            "prompts.samples_per_prompt is 1 and shaping.estimator is group: each response is compared with the "
            "others to its prompt; use prompts.samples_per_prompt 4, say",
        ),
        (
            {"prompts": {"batch_size": 64, "samples_per_prompt": 3}, "ppo": {"num_minibatches": 1}},
            "prompts.batch_size 64 is not a multiple of prompts.samples_per_prompt 3; use prompts.batch_size 63 or 66, "
            "or prompts.samples_per_prompt 2 or 4",
        ),
        (
            {"shaping": {"estimator": "reinforce++", "whiten_advantages": False}},
            "shaping.whiten_advantages is false and shaping.estimator is reinforce++: the batch is its baseline; set "
            "shaping.whiten_advantages true",
        ),
        (
            {"ppo": {"critic_warmup_iterations": 2}, "shaping": {"estimator": "reward"}},
            "ppo.critic_warmup_iterations is 2 and shaping.estimator is reward, which has no critic; use 0, or "
            "shaping.estimator gae or value",
        ),
        (
            {"ppo": {"critic_warmup_iterations": 5}, "num_iterations": 5},
            "ppo.critic_warmup_iterations 5 leaves none of num_iterations 5 to the policy; use fewer",
        ),
        (
            {"kl": {"coef": 0.0, "controller": "log_pi"}},
            "kl.coef is 0 and kl.controller is log_pi: β would stay 0; use kl.controller fixed",
        ),
        (
            {
                "policy": {"model": "p"},
                "reference": {"model": "r"},
                "shaping": {"score_normalization": "reference"},
            },
            "shaping.score_normalization is reference, but the first batch is sampled from "
            "policy.model 'p', not from reference.model 'r'; use running",
        ),
        (
            {"reward": {"components": [{"name": "reward1"}, {}]}},  # the second one's default name
            "reward.components have the same name twice: reward1, reward1",
        ),
        (
            {"generation": {"stop": ["\n", ""]}},
            "generation.stop: an empty stop sequence would end every response at once",
        ),
    ],
)
def test_rule_between_knobs(tree: dict[str, Any], sentence: str) -> None:
    assert problems_of(tree) == (sentence,)


@pytest.mark.parametrize(
    "tree",
    [
        {"prompts": {"batch_size": 12, "samples_per_prompt": 4}},
        {"kl": {"coef": 0.0, "controller": "fixed"}},
        {"prompts": {"batch_size": 100}, "kl": {"horizon": 20.0}},
        {"prompts": {"batch_size": 100}, "kl": {"horizon": 1.0, "controller": "fixed"}},
        {"ppo": {"level": "sequence"}, "shaping": {"estimator": "reward"}},
        {"ppo": {"level": "sequence"}, "shaping": {"estimator": "value"}},
        {"ppo": {"level": "sequence"}, "shaping": {"estimator": "rloo"}, "prompts": {"samples_per_prompt": 2}},
        {"shaping": {"estimator": "group", "group_std": False}, "prompts": {"samples_per_prompt": 2}},
        {"ppo": {"critic_warmup_iterations": 4}, "num_iterations": 5},
        {"shaping": {"score_normalization": "reference"}},
        {"policy": {"model": "p"}, "reference": {"model": "p"}, "shaping": {"score_normalization": "reference"}},
        {"reward": {"components": [{}, {}]}},
    ],
)
def test_just_inside_a_rule(tree: dict[str, Any]) -> None:
    build_config(tree)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"ppo": {"learnig_rate": 1e-5}}, "ppo.learnig_rate is not a known key; did you mean learning_rate?"),
        ({"policies": {}}, "policies is not a known key; did you mean policy?"),
        ({"policy": {"critic": {"knd": "shared"}}}, "policy.critic.knd is not a known key; did you mean kind?"),
        (
            {"reward": {"components": [{}, {"models": "r"}]}},
            "reward.components.1.models is not a known key; did you mean model?",
        ),
        ({"checkpoint": {"xyz": 1}}, "checkpoint.xyz is not a known key; known keys: every, keep_last, keep_best"),
    ],
)
def test_unknown_key_with_a_hint(tree: dict[str, Any], sentence: str) -> None:
    assert problems_of(tree) == (sentence,)


@pytest.mark.parametrize(
    ("knob", "value", "reason"),
    [
        ("seed", "7", "valid integer"),
        ("seed", True, "valid integer"),
        ("seed", 7.0, "valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
        ("num_iterations", 0, "greater than 0"),
        ("num_iterations", None, "valid integer"),
        ("device", "gpu", "'auto', 'cpu', 'cuda' or 'mps'"),
        ("prompts.shuffle", "no", "valid boolean"),
        ("prompts.shuffle", 1, "valid boolean"),
        ("prompts.source", None, "valid string"),
        ("policy.model", 3, "valid string"),
        ("policy.dtype", "float16", "'float32' or 'bfloat16'"),
        ("ppo.learning_rate", "1e-5", "valid number"),
        ("ppo.learning_rate", 0.0, "greater than 0"),
        ("ppo.learning_rate", float("nan"), "finite number"),
        ("ppo.learning_rate", float("inf"), "finite number"),
        ("ppo.num_minibatches", 4.0, "valid integer"),
        ("ppo.clip_range", 1.0, "less than 1"),
        ("ppo.adam_beta2", 1.0, "less than 1"),
        ("ppo.vf_coef", -0.1, "greater than or equal to 0"),
        ("kl.coef", float("nan"), "finite number"),
        ("kl.coef", -0.1, "greater than or equal to 0"),
        ("kl.target", 0.0, "greater than 0"),
        ("kl.horizon", float("inf"), "finite number"),
        ("shaping.gamma", 0.0, "greater than 0"),
        ("shaping.gamma", 1.1, "less than or equal to 1"),
        ("shaping.gae_lambda", 1.1, "less than or equal to 1"),
        ("shaping.missing_eos_penalty", float("nan"), "finite number"),
        ("generation.temperature", 0.0, "greater than 0"),
        ("generation.top_k", 0, "greater than 0"),
        ("generation.top_p", 0.0, "greater than 0"),
        ("generation.stop", "END", "valid list"),
        ("reward.components", "model", "valid list"),
        ("checkpoint.keep_last", 0, "greater than 0"),
        ("tracking.experiment", "", "at least 1 character"),
        ("tracking.registered_model", "../policy", "match pattern"),
    ],
)
def test_wrong_value(knob: str, value: Any, reason: str) -> None:
    *sections, key = knob.split(".")
    tree = {key: value}
    for section in reversed(sections):
        tree = {section: tree}
    (sentence,) = problems_of(tree)
    assert sentence.startswith(f"{knob} is {'null' if value is None else repr(value)}: ")
    assert reason in sentence


@pytest.mark.parametrize(
    ("value", "shown", "remedy"),
    [
        (None, "null", "; indent its keys below it, or leave it out"),
        (5, "5", ": {coef: 5}"),
        (["a"], "['a']", ""),
    ],
)
def test_a_section_that_is_no_mapping(value: Any, shown: str, remedy: str) -> None:
    said = f"kl is {shown}: it is a section, so a mapping of keys is needed{remedy}"
    assert list(problems_of({"kl": value})) == [said]


def test_values_inside_lists() -> None:
    assert problems_of({"generation": {"stop": ["a", 3]}}) == (
        "generation.stop.1 is 3: input should be a valid string; write it in quotes: '3'",
    )
    assert problems_of({"reward": {"components": [{"weight": float("nan")}]}}) == (
        "reward.components.0.weight is nan: input should be a finite number",
    )


def test_an_integer_is_a_number() -> None:
    """Somebody writes ``kl: {target: 6}``."""
    assert build_config({"kl": {"target": 6}}) == RunConfig()


def test_all_problems_at_once() -> None:
    problems = problems_of(
        {
            "seed": "x",
            "kl": {"coef": -1.0, "tarket": 3.0},
            "reward": {"components": [{"name": "a"}, {"name": "a"}]},
            "ppo": {"learning_rate": float("inf")},
        }
    )
    named = {problem.split(" ")[0] for problem in problems}
    assert named == {"seed", "kl.coef", "kl.tarket", "reward.components", "ppo.learning_rate"}


def test_rules_between_sections_are_reported_together() -> None:
    problems = problems_of({"prompts": {"batch_size": 6}, "kl": {"horizon": 1.0}, "ppo": {"level": "sequence"}})
    assert [problem.split(" ")[0] for problem in problems] == ["prompts.batch_size", "kl.horizon", "ppo.level"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().kl.coef = 0.0


def test_what_the_tree_derives() -> None:
    config = build_config(
        {
            "prompts": {"batch_size": 12, "samples_per_prompt": 3},
            "policy": {"model": "p"},
            "reward": {"components": [{"name": "help"}, {}]},
        }
    )
    assert config.prompts.num_prompts == 4
    assert config.reward.names == ["help", "reward1"]
    assert config.reference_model == "p"
    assert config.starts_at_reference
    other = build_config({"policy": {"model": "p"}, "reference": {"model": "r", "dtype": "bfloat16"}})
    assert (other.reference_model, other.starts_at_reference, other.coarsest_dtype) == ("r", False, "bfloat16")
    assert config.coarsest_dtype == "float32"
    estimators = {e: build_config({"shaping": {"estimator": e}}).uses_critic for e in ("gae", "value", "reward")}
    assert estimators == {"gae": True, "value": True, "reward": False}


def test_a_controller_holds_its_target_and_a_fixed_beta_none() -> None:
    held = {name: KLConfig(controller=name, target=4.0).held_at for name in ("fixed", "adaptive", "log_pi")}
    assert held == {"fixed": None, "adaptive": 4.0, "log_pi": 4.0}


def test_the_critic_starts_as_the_reward_model_where_there_is_one() -> None:
    def init(**tree: Any) -> str:
        return build_config(tree).critic_init

    function = {"components": [{"kind": "function", "function": "length"}]}
    model = {"components": [{"kind": "function", "function": "length"}, {"kind": "model", "model": "r"}]}
    assert init(reward=model) == "reward"
    assert init(reward=function) == "policy"
    assert init(reward=model, policy={"critic": {"init": "zero"}}) == "zero"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_token", "a"), ("api_key", "a"), ("trust_remote_code", True), ("worker_extension_cls", "os.system"),
        ("worker_cls", "a.b"), ("load_format", "evil"), ("model", "a"), ("tokenizer", "a"), ("hf_overrides", "a"),
        ("distributed_executor_backend", "a.B"), ("compilation_config", 3), ("download_dir", "/"), ("dtype", "float16"),
        ("seed", 3), ("logprobs_mode", "raw_logprobs"), ("skip_tokenizer_init", False), ("quantization", "evil"),
        ("enable_sleep_mode", True), ("misfortune", "dies"), ("", 1), ("kv_transfer_config", "a"),
    ],
)  # fmt: skip
def test_an_option_of_vllm_that_could_do_more_is_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=r"no argument of vllm.LLM that a config may set|named like a secret") as told:
        build_config({"generation": {"vllm": {"options": {name: value}}}})
    assert str(told.value).startswith("generation.vllm")


def test_options_of_vllm_are_numbers_and_switches() -> None:
    harmless = {"gpu_memory_utilization": 0.5, "max_model_len": 2048, "enforce_eager": True, "kv_cache_dtype": "fp8"}
    assert build_config({"generation": {"vllm": {"options": harmless}}}).generation.vllm.options == harmless
    for name in ("max_model_len", "kv_cache_dtype"):
        with pytest.raises(UserError, match=f"the option {name} is a text; give "):
            build_config({"generation": {"vllm": {"options": {name: "evil.plugin"}}}})
    with pytest.raises(UserError, match=r"did you mean gpu_memory_utilization\?"):
        build_config({"generation": {"vllm": {"options": {"gpu_memory_utilisation": 0.5}}}})
