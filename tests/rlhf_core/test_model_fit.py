"""The config that is printed for a model passes the pre-flight as it stands, whatever its family."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from adapters import save_sft_adapter
from chat_policies import CHATML, chat_policy
from families.models import save_tiny, tiny_config

from flows.cli import EXIT_MISTAKE, main
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.model_fit import fit_config, memory
from rlhf_core.model_fit.choices import Fit
from rlhf_core.model_fit.defaults import BY_SIZE, LORA_RANK, SHARE_OF_MEMORY, defaults_of, wanted_responses
from rlhf_core.model_fit.memory import decoded_at_a_time
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight

SHORT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "gpt_neox", "mistral"]
TEXTS = [{"prompt": f"the film {i}"} for i in range(6)]


def saved(tiny: Any, folder: Path, family: str, *, template: str | None = None, classifier: bool = False) -> str:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    tokenizer.chat_template = template
    kind = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    config = tiny_config(family, tokenizer, num_labels=1 if classifier else None)
    return str(save_tiny(config, kind, folder, tokenizer))


def written(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(fit: Fit, folder: Path) -> Any:
    """The config as a person gets it: printed, read again, checked; the plan that comes of it is beside it."""
    (folder / "fit.yaml").write_text(fit.to_yaml())
    config = load_config(folder / "fit.yaml")
    assert config == fit.config
    return config, preflight(config)


@pytest.fixture(scope="module")
def llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny, tmp_path_factory.mktemp("llama") / "m", "llama", template=SHORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_printed_passes_the_preflight(family: str, tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "m", family)
    config, plan = loaded(fit_config(model, written(tmp_path, *TEXTS), str(tiny.reward)), tmp_path)
    assert (config.prompts.batch_size, config.ppo.num_minibatches) == (4, 4), "of six prompts"
    assert config.prompts.max_len + config.generation.max_new_tokens == 64, "of its context"
    assert config.generation.max_new_tokens == 16, "a quarter of it"
    assert config.policy.lora.rank is None, "so small a model needs no adapter"
    assert config.policy.critic.kind == "separate"
    assert (config.ppo.learning_rate, config.ppo.critic_learning_rate) == (2e-4, 1e-4)
    assert config.reward.components[0].kind == "model"
    assert not config.prompts.as_chat
    assert plan.tokenizer.pad_id == plan.tokenizer.tokenizer.convert_tokens_to_ids(config.policy.pad_token)


def test_every_value_has_a_reason_in_80_columns(llama: str) -> None:
    fit = fit_config(llama)
    lines = fit.to_yaml().splitlines()
    assert max(len(line) for line in lines if line.lstrip().startswith("#")) <= 80
    for before, line in itertools.pairwise(lines):
        if line.rstrip()[-1] != ":" and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line
    assert all(choice.reason for choice in fit.choices)
    assert {choice.field for choice in fit.choices} >= {
        "prompts.source", "prompts.as_chat", "prompts.max_len", "prompts.batch_size", "policy.pad_token",
        "policy.dtype", "policy.lora.rank", "policy.critic.kind", "generation.max_new_tokens", "generation.stop",
        "ppo.learning_rate", "ppo.micro_batch_size", "kl.controller", "kl.coef", "kl.target", "shaping.gae_lambda",
    }  # fmt: skip
    sections = [line for line in lines if line and line[0] not in "# "]
    assert len(sections) == len(set(sections)), "each section once"


def test_what_is_missing_is_named(llama: str) -> None:
    fit = fit_config(llama)
    assert fit.config is None
    assert {c.field for c in fit.choices if "TO BE NAMED" in c.reason} == {"prompts.source", "reward.components"}


CHAT = [{"role": "user", "content": "the film"}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "the film"}, {"as_chat": True}),
        ({"prompt": CHAT}, {"as_chat": False}),
        ({"prompt": json.dumps(CHAT)}, {"as_chat": False}),
        ({"messages": CHAT}, {"as_chat": False, "column": "messages"}),
        ({"question": "the film"}, {"as_chat": True, "column": "question"}),
        ({"chosen": "the film is good", "rejected": "the film is bad"}, {"from_preferences": True, "as_chat": False}),
    ],
)
def test_prompts_are_read_as_they_are(row: dict[str, Any], wanted: dict[str, Any], llama: str, tmp_path: Path) -> None:
    config, _ = loaded(fit_config(llama, written(tmp_path, row, row), "length"), tmp_path)
    assert {name: getattr(config.prompts, name) for name in wanted} == wanted


@pytest.mark.parametrize("ending", ["csv", "parquet", "txt", "json"])
def test_columns_are_found_in_any_file(ending: str, llama: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pa.table({"id": [1, 2], "question": ["the film", "a book"]}), path)
    else:
        path.write_text({"csv": "id,question\n1,the film\n2,a book\n", "txt": "the film\na book\n",
                         "json": json.dumps([{"question": "the film"}, {"question": "a book"}])}[ending])  # fmt: skip
    config, plan = loaded(fit_config(llama, str(path), "length"), tmp_path)
    assert config.prompts.column == ("prompt" if ending == "txt" else "question")
    assert list(plan.prompt_set.entries) == ["the film", "a book"]
    assert config.prompts.batch_size == 2


def test_long_prompts_do_not_count(llama: str, tmp_path: Path) -> None:
    prompts = written(tmp_path, *TEXTS, *({"prompt": "the film " * 40} for _ in range(9)))
    fit = fit_config(llama, prompts, "length")
    config, _ = loaded(fit, tmp_path)
    assert config.prompts.batch_size == 4, "of the six short ones"
    assert any("9 of 15 prompts are longer" in choice.reason for choice in fit.choices)
    with pytest.raises(UserError, match="all 1 prompts are longer than the 48 tokens"):
        fit_config(llama, written(tmp_path, {"prompt": "the film " * 40}), "length")


def test_memory_decides(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seen = written(tmp_path, *TEXTS, *TEXTS, *TEXTS, *TEXTS), []
    for free in (1e9, 1.6e6, 1.2e6, 6e5, 1e3):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        fit = fit_config(llama, prompts, "length")
        config, plan = loaded(fit, tmp_path)
        fits = plan.peak_bytes <= SHARE_OF_MEMORY * free
        assert fits != any("THIS DOES NOT FIT" in choice.reason for choice in fit.choices)
        seen.append((config.policy.lora.rank, config.ppo.micro_batch_size, config.policy.gradient_checkpointing, fits))
    assert seen[0] == (None, None, False, True)
    assert seen[-1] == (LORA_RANK, 1, True, False)
    ranks = [rank for rank, *_ in seen]
    assert ranks == sorted(ranks, key=lambda rank: rank or 0), "an adapter where all weights do not fit"
    assert any(micro for _, micro, *_ in seen[:-1]), "and small micro-batches before that"


def test_large_policies_get_an_adapter_on_a_cpu(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALL", 1)
    fit = fit_config(llama, written(tmp_path, *TEXTS), "length")
    config, _ = loaded(fit, tmp_path)
    assert (config.policy.lora.rank, config.policy.critic.kind) == (LORA_RANK, "shared")
    assert (config.ppo.learning_rate, config.ppo.critic_learning_rate) == (6e-4, 1e-3)
    assert any("be slow" in choice.reason for choice in fit.choices)


def test_decoding_is_cut_where_keys_and_values_are_many(tiny: Any) -> None:
    shape = tiny_config("llama", load_tokenizer(str(tiny.policy), field="x"))
    a_row = 2 * 2 * 1 * 16 * 100 * 4
    """Keys and values of two layers, one head of 16, 100 tokens, float32."""
    assert decoded_at_a_time(shape, 32, 100, "float32", 32 * a_row * 4) == (32, 32 * a_row)
    assert decoded_at_a_time(shape, 32, 100, "float32", 32 * a_row * 3.9) == (16, 32 * a_row)
    assert decoded_at_a_time(shape, 32, 100, "bfloat16", 32 * a_row * 2)[0] == 32


def test_rates_fall_with_size_and_an_adapter_takes_more() -> None:
    limits = [line.up_to for line in BY_SIZE]
    assert limits == sorted(limits)
    for name in ("all_weights", "adapter"):
        rates = [getattr(line, name) for line in BY_SIZE]
        assert rates == sorted(rates, reverse=True)
    assert all(line.adapter > line.all_weights for line in BY_SIZE)
    assert defaults_of(1_300_000_000).all_weights < 8.05e-6, "InstructGPT's PPO diverged above"
    assert defaults_of(134_500_000).adapter == 3e-4
    assert [wanted_responses(n, d) for n, d in ((1, "cpu"), (135_000_000, "cpu"), (1, "cuda"))] == [64, 32, 256]


def test_pad_and_ends_are_said(tmp_path: Path) -> None:
    """A tokenizer like SmolLM2's: ChatML, PAD is the EOS; and one whose template ends answers by no EOS."""
    model = chat_policy(tmp_path / "m", CHATML)
    files = {name: json.loads((model / name).read_text()) for name in ("tokenizer_config.json", "config.json")}
    fit = fit_config(str(model))
    (stop,) = (choice for choice in fit.choices if choice.field == "generation.stop")
    assert stop.value == ["<|im_end|>"]
    files["tokenizer_config.json"] |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    files["config.json"] |= {"eos_token_id": 4, "pad_token_id": 4}
    for name, values in files.items():
        (model / name).write_text(json.dumps(values))
    (model / "generation_config.json").unlink()
    rows = written(tmp_path, {"prompt": CHAT}, {"prompt": [{"role": "user", "content": "a book"}]})
    fit = fit_config(str(model), rows, "length")
    loaded(fit, tmp_path)
    chosen = {choice.field: choice for choice in fit.choices}
    assert chosen["generation.stop"].value == []
    assert "'<|im_end|>' (4)" in chosen["generation.stop"].reason
    assert chosen["policy.pad_token"].value not in ("<|im_end|>", None)
    assert "also ends a response" in chosen["policy.pad_token"].reason


def test_mistakes_are_one_sentence_each(llama: str, tiny: Any, tmp_path: Path) -> None:
    classifier = saved(tiny, tmp_path / "c", "bert", classifier=True)
    bare = Path(saved(tiny, tmp_path / "bare", "llama"))
    for file in bare.glob("*token*"):
        file.unlink()
    adapter = save_sft_adapter(Path(llama), tmp_path / "a")
    texts = written(tmp_path, *TEXTS)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,x\n")
    mistakes: list[tuple[tuple[Any, ...], str]] = [
        ((str(tmp_path / "none"),), "--for-model"),
        ((str(tmp_path),), "without config.json"),
        ((classifier,), "--for-model"),
        ((str(tiny.reward),), "--for-model"),
        ((str(adapter),), "is a LoRA adapter"),
        ((str(bare),), "--for-model"),
        ((llama, str(tmp_path / "none.jsonl"), "length"), "does not exist"),
        ((llama, str(other), "length"), "has the columns a, b, and none of prompt"),
        ((llama, texts, llama), "--reward"),
        ((llama, None, str(tmp_path / "none")), "--reward"),
    ]
    for arguments, said in mistakes:
        with pytest.raises(UserError) as caught:
            fit_config(*arguments)
        (problem,) = caught.value.problems
        assert said in problem, problem


def test_the_command(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rlhf(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    path = tmp_path / "my.yaml"
    code, out, _ = rlhf("config", "--for-model", llama, "--prompts", written(tmp_path, *TEXTS), "--reward", "length")
    path.write_text(out)
    assert (code, rlhf("check", "--config", str(path))[0]) == (0, 0), out
    for wrong in (("--prompts", "x"), ("--for-model", str(tmp_path / "none")), ("--for-model", str(tmp_path))):
        code, out, err = rlhf("config", *wrong)
        assert (code, out) == (EXIT_MISTAKE, "")
        assert err.startswith("error: ")
        assert "Traceback" not in err
