"""What people write into their first config: each mistake is one sentence with the field, the value and what is right.

The right outcomes were written by hand, from the names of the knobs and the rules of YAML.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_world import Tiny

from flows.cli import main
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.config_places import naming_places
from rlhf_core.contracts.errors import DriftError, UserError
from rlhf_core.contracts.reward_config import FunctionReward
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.preflight import preflight
from rlhf_core.rewards.foreign import check_functions
from rlhf_core.rewards.function import load_function
from tasks.lifecycle.start import check_resumable, start_run

SCORE = "def score(responses):\n    return [float(len(r)) for r in responses]\n"

MISTAKES = {
    # keys in the wrong place, or of other trainers
    "learning_rate: 1e-5": "learning_rate is not a known key; did you mean ppo.learning_rate?",
    "model: gpt2": "model is not a known key; did you mean policy.model, reward.components.N.model or reference.model?",
    "reward: {model: gpt2}": "reward.model is not a known key; did you mean reward.components.N.model?",
    "ppo: {lr: 1e-5}": "ppo.lr is not a known key; did you mean learning_rate?",
    "lr: 1e-5": "lr is not a known key; did you mean ppo.learning_rate?",
    "beta: 0.1": "beta is not a known key; did you mean kl.coef?",
    "policy: {lora: {r: 16}}": "policy.lora.r is not a known key; did you mean rank?",
    "policy: {lora_r: 16}": "policy.lora_r is not a known key; did you mean lora.rank?",
    "policy: {critic: {initt: zero}}": "policy.critic.initt is not a known key; did you mean init?",
    "policy.model: gpt2": "policy.model is one key with a dot in it; write model as a key of the section policy",
    "Policy: {model: x}": "Policy is not a known key; did you mean policy?",
    "rewards: {}": "rewards is not a known key; did you mean reward?",
    "ppo: {learning-rate: 1}": "ppo.learning-rate is not a known key; did you mean learning_rate?",
    "generation: {max_length: 9}": "generation.max_length is not a known key; did you mean max_new_tokens?",
    "prompts: {max_length: 9}": "prompts.max_length is not a known key; did you mean max_len?",
    "output_dir: x": "output_dir is not a known key; did you mean --run-dir of rlhf train?",
    "ppo: {xyzzy: 1}": "ppo.xyzzy is not a known key; known keys: learning_rate, ",
    # components
    "reward: {components: [{function: length, model: m}]}": "reward.components.0.function is a key of the kind "
    "function, and reward.components.0.kind is model; set reward.components.0.kind: function",
    "reward: {components: [{kind: http, function: length}]}": "is a key of the kind function, and "
    "reward.components.0.kind is http; set reward.components.0.kind: function",
    "reward: {components: [{functionn: length}]}": "components.0.functionn is not a known key; did you mean "
    "reward.components.N.function?",
    "reward: {components: [length]}": "so a mapping of keys is needed: {kind: function, function: length}",
    "reward: {components: length}": "input should be a valid list; write [{kind: function, function: length}]",
    "reward: {components: mine:score}": "write [{kind: function, function: mine:score}]",
    "reward: {components: {model: m}}": "begin each item with `- `, also where there is one alone",
    "reward: models/rm": "reward is 'models/rm': it is a section, so a mapping of keys is needed: "
    "{components: [{kind: model, model: models/rm}]}",
    "reward: [{model: m}]": "its list is reward.components",
    # values of another type
    "ppo: {learning_rate: '1e-5'}": "ppo.learning_rate is '1e-5': input should be a valid number; write it without "
    "quotes: 1e-5",
    "prompts: {batch_size: '8'}": "prompts.batch_size is '8': input should be a valid integer; write it without",
    "prompts: {batch_size: 8.0}": "prompts.batch_size is 8.0: input should be a valid integer; write 8",
    "prompts: {shuffle: yes}": "prompts.shuffle is 'yes': input should be a valid boolean; write true or false",
    "prompts: {shuffle: 1}": "prompts.shuffle is 1: input should be a valid boolean; write true or false",
    "prompts: {columns: answer}": "prompts.columns is 'answer': input should be a valid list; write ['answer']",
    "generation: {stop: '###'}": "generation.stop is '###': input should be a valid list; write ['###']",
    "prompts: {source: 3}": "prompts.source is 3: input should be a valid string; write it in quotes: '3'",
    "policy: gpt2": "policy is 'gpt2': it is a section, so a mapping of keys is needed: {model: gpt2}",
    "prompts: data.csv": "prompts is 'data.csv': it is a section, so a mapping of keys is needed: {source: data.csv}",
    "tracking: false": "tracking is False: it is a section, so a mapping of keys is needed: {enabled: false}",
    "policy: {lora: 16}": "policy.lora is 16: it is a section, so a mapping of keys is needed: {rank: 16}",
    "policy:\nseed: 1": "policy is null: it is a section, so a mapping of keys is needed; indent its keys below it",
    # choices
    "device: gpu": "device is 'gpu': input should be 'auto', 'cpu', 'cuda' or 'mps'; did you mean cuda?",
    "device: cuda:1": "write cuda, and choose the card by CUDA_VISIBLE_DEVICES=1",
    "policy: {dtype: bf16}": "policy.dtype is 'bf16': input should be 'float32' or 'bfloat16'; did you mean bfloat16?",
    "reference: {dtype: bf16}": "'float32' or 'bfloat16'; did you mean bfloat16?",
    "reward: {components: [{model: m, dtype: bf16}]}": "reward.components.0.dtype is 'bf16': input should be "
    "'float32' or 'bfloat16'; did you mean bfloat16?",
    "kl: {controller: Adaptive}": "kl.controller is 'Adaptive': input should be 'fixed', 'adaptive' or 'log_pi'; did "
    "you mean adaptive?",
    "shaping: {estimator: grpo}": "did you mean group?",
    "ppo: {lr_schedule: cosin}": "did you mean cosine?",
    # numbers that do not go together
    "prompts: {batch_size: 7}": "prompts.batch_size 7 is not a multiple of ppo.num_minibatches 4; use "
    "prompts.batch_size 4 or 8, or ppo.num_minibatches 1 or 7",
    "prompts: {batch_size: 3}": "use prompts.batch_size 4, or ppo.num_minibatches 3",
    "prompts: {batch_size: 10, samples_per_prompt: 3}": "prompts.batch_size 10 is not a multiple of "
    "prompts.samples_per_prompt 3 nor of ppo.num_minibatches 4; use prompts.batch_size 12, or "
    "prompts.samples_per_prompt 2 or 5 and ppo.num_minibatches 2 or 5",
    # YAML and JSON
    "ppo:\n\tlearning_rate: 1": "line 2, column 1: found character '\\t' that cannot start any token; indent with",
    "ppo: learning_rate: 1": "mapping values are not allowed here; put a value that holds a colon and a space in",
    "ppo:\n  vf_coef: 1\n gamma: 2": "look at how far that line and those above it are indented",
    'policy: {model: "C:\\models"}': "put text that holds a backslash in single quotes",
    "just text": "holds a str; a mapping of sections is needed",
    '{"seed": 1,': "is not valid YAML",
}  # fmt: skip


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught, naming_places(path):
        load_config(path, overrides)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("text", MISTAKES)
def test_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert MISTAKES[text] in refused(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rate=1e-5", "did you mean ppo.learning_rate?"),
        ("ppo.learning_rat=1", "ppo.learning_rat is not a known key; did you mean learning_rate?"),
        ("ppo.learning_rate:1", "--set 'ppo.learning_rate:1' is not of the form section.key=value"),
        ("policy.lora.rnk=3", "policy.lora.rnk is not a known key; did you mean rank?"),
        ("reward.component.0.model=x", "reward.component is not a known key; did you mean components?"),
        ("prompts.columns=answer", "write ['answer']"),
        ("device=gpu", "did you mean cuda?"),
    ],
)
def test_an_override_with_a_mistake(override: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.touch()
    assert said in refused(path, override)


def test_a_path_that_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    assert f"is a folder; `rlhf config > {tmp_path}/exp/config.yaml` writes a template" in refused(tmp_path / "exp")
    (tmp_path / "exp" / "config.yaml").touch()
    assert f"is a folder; name a file in it: {tmp_path}/exp/config.yaml" in refused(tmp_path / "exp")
    assert f"is not a file; did you mean {tmp_path}/exp/config.yaml?" in refused(tmp_path / "exp" / "configg.yaml")
    assert "is not a file; `rlhf config > " in refused(tmp_path / "none" / "x")
    (tmp_path / "exp" / "run.json").touch()
    assert "it holds a run, which goes on by `rlhf resume" in refused(tmp_path / "exp")


@pytest.mark.parametrize(
    "text", ['{\n\t"seed": 5,\n\t"ppo": {"vf_coef": 0.5}\n}', "seed: 5\nppo: {vf_coef: 0.5}", "\ufeffseed: 5"]
)
def test_json_is_a_config_too(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert load_config(path).seed == 5


def test_an_empty_config_says_all_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.touch()
    with pytest.raises(UserError) as caught:
        preflight(load_config(path))
    said = "\n".join(caught.value.problems)
    for field in ("policy.model is not set", "reward.components is empty", "prompts.source is not set"):
        assert field in said


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("mine:scor", "there is no 'scor' in the module mine; did you mean score?"),
        ("mine.score", "did you mean mine:score?"),
        ("mine", "which function of the module mine is meant? Write mine:FUNCTION"),
        ("mine.py", "names a file and no function of it; write mine:FUNCTION"),
        ("./minee.py:score", "is a file that is not here; a function is named as module:callable, minee:score"),
        (
            "minee:score",
            "neither installed nor in EXP (the config's folder) nor in WORK (the working folder); did you mean",
        ),
        ("regexx", "did you mean regex?"),
    ],
)
def test_a_function_that_is_not_found(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp, work = tmp_path / "exp", tmp_path / "work"
    exp.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for folder in (exp, work):
        (folder / "mine.py").write_text(SCORE)
    (exp / "config.yaml").write_text(f"reward: {{components: [{{function: '{function}'}}]}}")
    component = load_config(exp / "config.yaml").reward.components[0]
    assert isinstance(component, FunctionReward)
    with pytest.raises(UserError) as caught, naming_places(exp / "config.yaml"):
        load_function(component, field="reward.components.0", columns=[])
    (problem,) = caught.value.problems
    assert said.replace("EXP", str(exp)).replace("WORK", str(work)) in problem
    sys.modules.pop("mine", None)


def test_a_nightly_job_starts_in_another_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is named relative to the config; cron's working folder is another one. Then the lexicon changes."""
    exp, work = tmp_path / "exp", tmp_path / "work"
    (exp / "team").mkdir(parents=True)
    work.mkdir()
    (exp / "models").symlink_to(tiny.policy.parent)
    (exp / "prompts.csv").write_text("prompt\n" + "".join(f"The film was number {i}\n" for i in range(8)))
    (exp / "team" / "__init__.py").write_text("from .polite import score\n")
    (exp / "team" / "polite.py").write_text(f"from . import lexicon\n{SCORE}")
    (exp / "team" / "lexicon.py").write_text("WORDS = ['please']\n")
    tree = {
        "num_threads": 1,
        "device": "cpu",
        "prompts": {"source": "prompts.csv", "batch_size": 8},
        "policy": {"model": f"models/{tiny.policy.name}"},
        "reward": {"components": [{"function": "team:score", "name": "polite"}]},
        "generation": {"max_new_tokens": 4},
    }
    (exp / "config.yaml").write_text(json.dumps(tree))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(work)
    with pytest.raises(SystemExit) as caught:
        main(["check", "--config", "../exp/config.yaml"])
    assert (caught.value.code, "no problem found" in capsys.readouterr().out) == (0, True)
    start_run(load_config(Path("../exp/config.yaml")), str(work / "run"))
    monkeypatch.chdir(tmp_path)
    assert check_resumable("work/run", accept_drift=False).policy.model == str(exp / "models" / tiny.policy.name)
    (exp / "team" / "lexicon.py").write_text("WORDS = ['thanks']\n")
    with pytest.raises(DriftError, match=rf"rewards\.polite \({exp}/team/lexicon\.py\): \w+ -> \w+\n"):
        check_resumable("work/run", accept_drift=False)
    with pytest.raises(DriftError, match=r"team/lexicon\.py"):
        check_functions(RunFolder.open(work / "run").config, RunFolder.open(work / "run").identity, work / "run")
    (exp / "team" / "lexicon.py").write_text("WORDS = ['please']\n")
    check_resumable("work/run", accept_drift=False)
    for name in [name for name in sys.modules if name == "team" or name.startswith("team.")]:
        del sys.modules[name]


def test_a_config_whose_files_are_nowhere_says_both_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    tree = {
        "prompts": {"source": "none.csv"},
        "policy": {"model": "./models/sft"},
        "reward": {"components": [{"model": "./models/rm"}, {"function": "none:score"}]},
    }
    (tmp_path / "exp" / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "../exp/config.yaml"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert "Traceback" not in out + err
    both = f"{tmp_path}/exp (the config's folder)", f"{tmp_path}/work (the working folder)"
    sentences = err.splitlines()
    fields = ("policy.model './models", "reward.components.0.model", "reward.components.1.function", "prompts.source")
    for sentence, field in zip(sentences, fields, strict=True):
        assert sentence.startswith(f"error: {field}")
        assert all(place in sentence for place in both), sentence
