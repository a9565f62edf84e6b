"""Model folders that people bring, as policies and as reward models: read as plain transformers and the trainer's own
formula say, or refused with one sentence that says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SMALL, save_random
from safetensors.torch import load_file, save_file
from tolerances import F32_MODEL
from torch import Tensor

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight
from rlhf_core.rewards.loading import load_component

Change = Callable[[Path], object]
Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")
ROWS = [[5, 9, 40, 7, 21, 33], [8, 60, 2]]
BIAS, MEAN, STD = 5.0, -3.0, 2.5


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, a reward model and an encoder's, intact; another test's copy may change."""
    import transformers as t

    root, tokenizer = tmp_path_factory.mktemp("brought"), load_tokenizer(str(tiny.policy), field="x")
    sizes: dict[str, Any] = {**SMALL, "vocab_size": len(tokenizer)}
    one, two = {**sizes, "num_labels": 1}, {**sizes, "num_labels": 2}
    made = {
        "policy": (t.LlamaConfig(**sizes), "AutoModelForCausalLM"),
        "tied": (t.LlamaConfig(**sizes, tie_word_embeddings=True), "AutoModelForCausalLM"),
        "reward": (t.LlamaConfig(**one), "AutoModelForSequenceClassification"),
        "encoder": (t.BertConfig(**one), "AutoModelForSequenceClassification"),
        "masked": (t.BertConfig(**sizes), "AutoModelForMaskedLM"),
        "tokens": (t.LlamaConfig(**one), "AutoModelForTokenClassification"),
        "steps": (t.LlamaConfig(**two), "AutoModelForTokenClassification"),
        "t5": (
            t.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
            "AutoModelForSeq2SeqLM",
        ),
        "experts": (t.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2), "AutoModelForCausalLM"),
    }
    for name, (config, auto_class) in made.items():
        save_random(config, auto_class, root / name, tokenizer)
    return {name: root / name for name in made}


@pytest.fixture
def brought(folders: dict[str, Path], tmp_path: Path) -> Callable[[str, Change], Path]:
    """A changed copy of one of them."""

    def make(name: str, change: Change) -> Path:
        folder = Path(shutil.copytree(folders[name], tmp_path / "brought"))
        change(folder)
        return folder

    return make


def config(**values: Any) -> Change:
    """Set keys of config.json; None removes one."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        changed = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return change


def weights(change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file) if (folder / file).exists() else {}
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return apply


def renamed(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)

    return weights(change)


def added(file: str = "model.safetensors", **tensors: Tensor) -> Change:
    return weights(lambda there: there.update({key.replace("__", "."): value for key, value in tensors.items()}), file)


def without(*keys: str) -> Change:
    return weights(lambda tensors: [tensors.pop(key) for key in keys])


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def sharded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def of_head(keys: str) -> Change:
    """A trained head under other names, in a file of its own where there is a colon."""
    file, _, prefix = keys.rpartition(":")

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        head = {f"{prefix}.weight": tensors.pop("score.weight"), f"{prefix}.bias": torch.tensor([BIAS])}
        save_file(tensors if file else {**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
        if file:
            save_file(head, folder / file, {"format": "pt"})

    return change


NORMALIZED = {"normalize_reward": True, "mean": MEAN, "std": STD}
READ: dict[str, tuple[str, Change, float, float, float, str]] = {
    # folder, what was done to it, the head's bias, mean, std, what the plan says
    "as transformers saves it": ("reward", config(), 0, 0, 1, ""),
    "OpenRLHF": ("reward", config(**NORMALIZED, value_head_prefix="score"), 0, MEAN, STD, "(logit - -3) / 2.5"),
    "OpenRLHF, moments in lists": (
        "reward",
        config(**{**NORMALIZED, "mean": [MEAN], "std": [STD]}),
        0,
        MEAN,
        STD,
        "/ 2.5",
    ),
    "OpenRLHF, not asked to": ("reward", config(normalize_reward=False, mean=1.0, std=2.0), 0, 0, 1, "are not applied"),
    "OpenRLHF, without labels": (
        "reward",
        config(**NORMALIZED, id2label=None, label2id=None, architectures=["RewardModel"]),
        0,
        MEAN,
        STD,
        "its config.json tells of 2 labels, its head has one",
    ),
    "OpenRLHF, its head elsewhere": (
        "reward",
        both(config(**NORMALIZED, value_head_prefix="my_head"), renamed("score.", "my_head.")),
        0,
        MEAN,
        STD,
        "its score head is my_head.weight of model.safetensors",
    ),
    "a bias": ("reward", added(score__bias=torch.tensor([BIAS])), BIAS, 0, 1, "score.weight and score.bias"),
    "bias and moments": (
        "reward",
        both(added(score__bias=torch.tensor([BIAS])), config(**NORMALIZED)),
        BIAS,
        MEAN,
        STD,
        "score.weight and score.bias",
    ),
    "value_head": ("reward", renamed("score.", "value_head."), 0, 0, 1, "its score head is value_head.weight"),
    "DeepSpeed-Chat": (
        "reward",
        both(renamed("score.", "v_head."), renamed("model.", "rwtransformer.")),
        0,
        0,
        1,
        "its score head is v_head.weight",
    ),
    "TRL's value head": (
        "reward",
        of_head("v_head.summary"),
        BIAS,
        0,
        1,
        "v_head.summary.weight and v_head.summary.bias",
    ),
    "LLaMA-Factory": (
        "reward",
        both(
            of_head("value_head.safetensors:v_head.summary"),
            added(lm_head__weight=torch.ones(300, 32)),
            config(architectures=["LlamaForCausalLM"], id2label=None, label2id=None),
        ),
        BIAS,
        0,
        1,
        "is a language model (LlamaForCausalLM): its score head is v_head.summary.weight",
    ),
    "verl, a token classifier": (
        "reward",
        both(added(score__bias=torch.tensor([BIAS])), config(architectures=["LlamaForTokenClassification"])),
        BIAS,
        0,
        1,
        "is a token classifier (LlamaForTokenClassification)",
    ),
    "an output head that no score needs": ("reward", added(lm_head__weight=torch.ones(300, 32)), 0, 0, 1, ""),
    "old rotary buffers": (
        "reward",
        added(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)),
        0,
        0,
        1,
        "",
    ),
    "a second set of shards": (
        "reward",
        added("model-00001-of-00002.safetensors", model__embed_tokens__weight=torch.ones(2)),
        0,
        0,
        1,
        "model-00001-of-00002.safetensors is not read; transformers takes the weights from model.safetensors",
    ),
    "a file that nobody reads": (
        "reward",
        added("consolidated.safetensors", output__weight=torch.ones(2)),
        0,
        0,
        1,
        "consolidated.safetensors is not read",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_reward_model_is_read_as_its_trainer_wrote_it(
    name: str, folders: dict[str, Path], brought: Any, tiny_config: Configure
) -> None:
    base, change, bias, mean, std, said = READ[name]
    folder = brought(base, change)
    run = tiny_config([f"policy.model={folders['policy']}", f"reward.components.0.model={folder}"])
    notes = [note for note in preflight(run).notes if "brought'" in note]
    assert said in " ".join(notes), notes
    assert bool(notes) == bool(said), notes
    model = load_component(
        run.reward.components[0], field="reward.components.0", columns=[], policy_vocabulary="", device=CPU
    )
    assert isinstance(model, RewardModel)
    expected = [(logit_alone(folders[base], row) + bias - mean) / std for row in ROWS]
    torch.testing.assert_close(model.score_ids(ROWS), torch.tensor(expected), **F32_MODEL)


def logit_alone(folder: Path, row: list[int]) -> float:
    """By transformers' trunk and the stored head, multiplied here."""
    from transformers import AutoModel

    trunk = AutoModel.from_pretrained(folder).eval()
    head = load_file(folder / "model.safetensors")["score.weight"]
    with torch.no_grad():
        return float(trunk(input_ids=torch.tensor([row])).last_hidden_state[0, -1] @ head[0])


def test_a_critic_from_a_normalised_reward_model_has_its_values(
    folders: dict[str, Path], brought: Any, tiny_config: Configure
) -> None:
    folder = brought("reward", both(added(score__bias=torch.tensor([BIAS])), config(**NORMALIZED)))
    run = tiny_config(
        [f"policy.model={folders['policy']}", f"reward.components.0.model={folder}", "policy.critic.init=reward"]
    )
    critic = ActorCritic.initial(run, CPU).critic
    assert critic is not None
    assert critic.trunk is not None
    with torch.no_grad():
        hidden_LD = critic.trunk(input_ids=torch.tensor([ROWS[0]])).last_hidden_state[0]
        value = float(critic.head.values(hidden_LD)[-1])
    assert value == pytest.approx((logit_alone(folders["reward"], ROWS[0]) + BIAS - MEAN) / STD, abs=1e-4)


def biased(value: float) -> Change:
    """Attention biases that config.json does not tell of."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("q_proj.weight")]:
            tensors[key.replace("weight", "bias")] = torch.full((32,), value)

    return weights(change)


def more_layers(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        tensors[key.replace(".layers.1.", ".layers.2.")] = tensors[key].clone()


def half_downloaded(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def only_an_index(folder: Path) -> None:
    sharded(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only(suffix: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / f"model{suffix}")


DROPPED = "they would be dropped in silence"
REFUSED: dict[str, tuple[str, str, Change, str]] = {
    # role, folder, what was done to it, what the sentence says
    "biases that the config does not know": ("policy", "policy", biased(3.0), DROPPED),
    "the same in a reward model": (
        "reward",
        "reward",
        biased(3.0),
        "q_proj.bias, model.layers.1.self_attn.q_proj.bias",
    ),
    "more layers than the config has": ("policy", "policy", weights(more_layers), "model.layers.2."),
    "fewer": ("policy", "policy", config(num_hidden_layers=3), "lacks 9 weights that LlamaForCausalLM needs"),
    "other widths": ("policy", "policy", config(intermediate_size=48), "as 32 x 64 (and 5 others)"),
    "a reward model of another vocabulary than its weights": (
        "reward",
        "reward",
        config(vocab_size=310),
        "310 x 32 there",
    ),
    "experts that are not there": ("policy", "experts", config(num_local_experts=3), "brought'"),
    "a LoRA in the weights": (
        "policy",
        "policy",
        added(base_model__model__q_proj__lora_A__weight=torch.ones(2, 2)),
        "stores LoRA weights in its weights",
    ),
    "a LoRA without its config": (
        "policy",
        "policy",
        added("adapter_model.safetensors", q__lora_A__weight=torch.ones(2, 2)),
        "stores LoRA weights in adapter_model.safetensors",
    ),
    "no output head": ("policy", "policy", without("lm_head.weight"), "lacks 1 weights that LlamaForCausalLM needs"),
    "a classifier as policy": ("policy", "reward", config(), "a sequence classifier (LlamaForSequenceClassification)"),
    "one with a tied head": (
        "policy",
        "reward",
        config(tie_word_embeddings=True),
        "give the language model that it was trained from",
    ),
    "one that calls itself a language model": (
        "policy",
        "tied",
        added(score__weight=torch.ones(1, 32)),
        "is a sequence classifier, as reward models are",
    ),
    "a token classifier as policy": ("policy", "tokens", config(), "a token classifier (LlamaForTokenClassification)"),
    "an encoder as policy": ("policy", "masked", config(), "does not read from left to right"),
    "an encoder's classifier as policy": ("policy", "encoder", config(), "does not read from left to right"),
    "an encoder-decoder as policy": ("policy", "t5", config(), "is an encoder-decoder (T5ForConditionalGeneration)"),
    "an embedding model": (
        "policy",
        "policy",
        lambda folder: (folder / "modules.json").write_text("[]"),
        "is an embedding model of sentence-transformers",
    ),
    "half a download": ("policy", "policy", half_downloaded, "of the"),
    "an index alone": ("policy", "policy", only_an_index, "none of its shards"),
    "a file that is cut short": ("policy", "policy", cut_short, "which is no safetensors file"),
    "a name that transformers does not read": (
        "policy",
        "policy",
        only("-fp16.safetensors"),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickle": ("policy", "policy", only(".bin"), "which is never loaded"),
    "GGUF": ("policy", "policy", only(".gguf"), "holds GGUF weights"),
    "GPTQ": ("policy", "policy", config(quantization_config={"quant_method": "gptq"}), "is quantized"),
    "a language model as reward model": ("reward", "policy", config(), "without a score head (no score.weight"),
    "the same, told to have one label": ("reward", "policy", config(num_labels=1), "train one from it first"),
    "a masked language model as reward model": ("reward", "masked", config(num_labels=1), "without a score head"),
    "two logits": (
        "reward",
        "reward",
        both(config(num_labels=2), weights(lambda t: t.update({"score.weight": torch.ones(2, 32)}))),
        "has 2 logits",
    ),
    "two labels in an encoder's config": ("reward", "encoder", config(num_labels=2), "has 2 logits by its config.json"),
    "a process reward model": ("reward", "steps", config(), "is a token classifier (LlamaForTokenClassification)"),
    "code of its own": (
        "reward",
        "reward",
        config(
            architectures=["LlamaForRewardModelWithGating"],
            auto_map={"AutoModelForSequenceClassification": "modeling.LlamaForRewardModelWithGating"},
        ),
        "is a LlamaForRewardModelWithGating whose code stands in the folder",
    ),
    "a gate that the class does not have": ("reward", "reward", added(gating__weight=torch.ones(2, 2)), DROPPED),
    "a head that is not there": ("reward", "reward", config(value_head_prefix="value"), "stores no value.weight"),
    "a std of 0": ("reward", "reward", config(**{**NORMALIZED, "std": 0.0}), "std 0"),
    "a mean that is no number": ("reward", "reward", config(**{**NORMALIZED, "mean": "a"}), "mean 'a'"),
    "a normalised encoder": ("reward", "encoder", config(**NORMALIZED), "asks for normalize_reward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_its_role_is_refused_in_one_sentence(
    name: str, folders: dict[str, Path], brought: Any, tiny_config: Configure
) -> None:
    role, base, change, said = REFUSED[name]
    given = {**folders, role: brought(base, change)}
    with pytest.raises(UserError) as caught:
        preflight(tiny_config([f"policy.model={given['policy']}", f"reward.components.0.model={given['reward']}"]))
    field = "policy.model" if role == "policy" else "reward.components.0.model"
    problems = [problem for problem in caught.value.problems if problem.startswith(f"{field} '{given[role]}' ")]
    assert len(problems) == 1, caught.value.problems
    assert said in problems[0]


TAKEN: dict[str, tuple[str, Change]] = {
    "a value head in the weights": ("policy", added(v_head__summary__weight=torch.ones(1, 32))),
    "a value head beside them": ("policy", added("value_head.safetensors", v_head__summary__weight=torch.ones(1, 32))),
    "shards": ("policy", sharded),
    "experts in the files' own layout": ("experts", config()),
    "a head of its own, tied by the config": (
        "policy",
        config(tie_word_embeddings=True),
    ),
    "called by a class of another task, with the language model's head": (
        "policy",
        config(architectures=["LlamaForSequenceClassification"]),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_language_model_is_taken(name: str, folders: dict[str, Path], brought: Any, tiny_config: Configure) -> None:
    from transformers import AutoModelForCausalLM

    base, change = TAKEN[name]
    folder = brought(base, change)
    run = tiny_config([f"policy.model={folder}", f"reward.components.0.model={folders['reward']}"])
    preflight(run)
    policy = ActorCritic.initial(run, CPU).policy
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([ROWS[0]])).logits[0]
        found = policy.projection().logits(policy.alone(ROWS[0]), 1.0)
    torch.testing.assert_close(found, expected, **F32_MODEL)
