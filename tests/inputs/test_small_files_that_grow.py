"""Small files of somebody else that would fill the memory or never end: each is one sentence, in bounded memory."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.contracts.artifacts import ArtifactRef, read_artifact
from rlhf_core.contracts.bounds import at_most, check_is_full, free_bytes
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import parse_yaml
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import IntegrityError, StorageError, UserError
from rlhf_core.contracts.ipc_sizes import read_plain_table
from rlhf_core.contracts.records import read_record
from rlhf_core.models.pattern_cost import searches_long
from rlhf_core.models.untrusted import check_is_data, check_size, read_header, transformers_config
from rlhf_core.prompts.readers import read_file
from rlhf_core.prompts.render_process import Renderer, TemplateLimitError, TemplateRefusedError
from rlhf_core.prompts.rendering import render_prompts

MANY = 2_000_000_000
SECONDS = 20
"""Of a machine that is busy; alone each takes one or two."""
ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def refused(work: Callable[[], Any], *, mib: int = 1200) -> str:
    """What a UserError or IntegrityError says, raised in little time and memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((UserError, IntegrityError, ValueError)) as caught:
        work()
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib * 1024
    assert "\nfound:" in str(caught.value) or len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def write_ipc(path: Path, table: pa.Table, times: int = 1, options: Any = None) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        for _ in range(times):
            writer.write_table(table)


def one(text: str, times: int = 1) -> pa.Table:
    return pa.table({"prompt": pa.array([text] * times)})


def repeated() -> pa.Table:
    return pa.table({"prompt": pa.RunEndEncodedArray.from_arrays(pa.array([MANY], pa.int32()), pa.array(["x"]))})


def indexed() -> pa.Table:
    index = pa.array([0] * 2_000_000, pa.int8())
    return pa.table({"prompt": pa.DictionaryArray.from_arrays(index, pa.array(["x" * 5000]))})


def packed(path: Path, part: bytes, times: int) -> None:
    with gzip.open(path, "wb", 9) as file:
        for _ in range(times):
            file.write(part)


def hollow(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.truncate(1 << 40)


BOMBS: dict[str, Callable[[Path], Any]] = {
    "null.arrow": lambda p: write_ipc(p, pa.table({"prompt": pa.nulls(MANY)})),
    "runs.arrow": lambda p: write_ipc(p, repeated()),
    "index.arrow": lambda p: write_ipc(p, indexed(), options=ZSTD),
    "zstd.arrow": lambda p: write_ipc(p, one("a" * (1 << 28)), 12, ZSTD),
    "dictionary.parquet": lambda p: pq.write_table(indexed(), p, compression="zstd", store_schema=False),
    "rows.parquet": lambda p: pq.write_table(pa.table({"prompt": pa.nulls(20_000_000, pa.string())}), p),
    "lines.jsonl.gz": lambda p: packed(p, b'{"prompt":"' + b"a" * (1 << 20) + b'"}\n', 100),
    "line.txt.gz": lambda p: packed(p, b"a" * (1 << 20), 100),
    "list.json.gz": lambda p: packed(p, b'"",' * (1 << 18), 100),
    "hole.jsonl": hollow,
    "hole.csv": hollow,
    "deep.json": lambda p: p.write_text("[" * 100_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_prompts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    BOMBS[name](path)
    said = refused(lambda: read_file(PromptsConfig(source=str(path)), path, lambda _: ["prompt"]))
    assert said.startswith(f"prompts.source '{path}' cannot be read: ")


def test_prompts_that_are_packed_as_texts_are_packed_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"prompt": f"{i} " * 50}) + "\n" for i in range(5000))
    assert len(read_file(PromptsConfig(source=str(path)), path, lambda _: ["prompt"]).columns["prompt"]) == 5000


def test_an_artifact_holds_every_value_that_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    for table in (pa.table({"x": pa.nulls(MANY)}), repeated(), indexed()):
        write_ipc(path, table)
        assert "take no room" in refused(lambda: read_plain_table(path.read_bytes()))
    write_ipc(path, one("a" * (1 << 24)), options=ZSTD)
    assert "compressed" in refused(lambda: read_plain_table(path.read_bytes()))
    write_ipc(path, one("a", 3))
    assert read_plain_table(path.read_bytes()).num_rows == 3
    write_ipc(path, pa.table({"prompt_id": pa.nulls(MANY)}))
    ref = ArtifactRef("sample_prompts", 0, path.name, hash_file(path), 3)
    assert "another schema" in refused(lambda: read_artifact(tmp_path, ref))


def test_a_record_is_small(tmp_path: Path) -> None:
    hollow(tmp_path / "run.json")
    assert "are ever written there" in refused(lambda: read_record(tmp_path / "run.json"))


YAML = {
    "keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "list": "[" + "1," * 400_000 + "1]",
    "flow": "{" + ",".join(f"k{i}" for i in range(120_000)) + "}",
    "deep": "[" * 500_000,
    "question": "? " * 400_000,
    "digits": "a: " + "1" * 900_000,
}


@pytest.mark.parametrize("kind", YAML)
def test_a_config(kind: str) -> None:
    refused(lambda: parse_yaml(YAML[kind], origin="--config x.yaml"))


@pytest.fixture
def model(tmp_path: Path, tiny: Any) -> Path:
    return Path(shutil.copytree(tiny.policy, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NEO = {"model_type": "gpt_neo", "vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "num_labels": {"num_labels": MANY},
    "labels inside": {"text_config": {"num_labels": MANY}},
    "attention_types": NEO | {"attention_types": [[["global", "local"], MANY]]},
    "attention lists": NEO | {"attention_types": [[["global", "local"] * 200_000, 1000]]},
    "buffers": NEO | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 200_000},
    "positions": {"model_type": "gptj", "n_positions": MANY // 10, "n_embd": 64, "n_head": 2, "rotary_dim": 16},
    "layers": {"n_layer": 1000},
    "keys": {f"k{i}": i for i in range(5000)},
    "names": {"return_dict": False},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_models_config(kind: str, model: Path) -> None:
    change(model / "config.json", **CONFIGS[kind])

    def check() -> None:
        check_is_data(str(model), "policy.model")
        transformers_config(model)
        check_size("AutoModelForCausalLM", str(model), "policy.model")

    assert "config.json" in refused(check)


def header(folder: Path, described: Any, *, told: int | None = None) -> Path:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", told or len(text)) + text + bytes(4))
    return path


@pytest.mark.parametrize(
    "described",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' + b" " * (99 << 20) + b"}",
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)},
        {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(2)},
        {"t": {"dtype": "F32", "shape": [1 << 40, 1 << 30], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    ],
    ids=["100 MB", "many", "overlapping", "overflowing", "beyond the end", "backwards", "negative"],
)
def test_a_header_that_lies(described: Any, model: Path) -> None:
    file = header(model, described)
    assert "which is no safetensors file" in refused(lambda: read_header(file, "policy.model 'm'"))


def test_a_header_that_claims_the_memory(model: Path) -> None:
    file = header(model, b"{}", told=(1 << 63) - 1)
    assert "its header has 9223372036854775807 bytes" in refused(lambda: read_header(file, "policy.model 'm'"))
    assert "no safetensors file" in refused(lambda: check_is_data(str(model), "policy.model"))


def test_a_tokenizer_with_a_million_added_tokens(model: Path) -> None:
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["added_tokens"] += [{"id": 1000 + i, "content": f"<{i}>"} for i in range(300_000)]
    path.write_text(json.dumps(tree))
    assert "at most 262144 are read" in refused(lambda: check_is_data(str(model), "policy.model"))


def test_a_tokenizer_with_more_tokens_than_any(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": "," * 2_700_000}}))
    assert "tokens and merges; at most" in refused(lambda: check_is_data(str(model), "policy.model"))


def test_a_pattern_that_could_take_for_ever(model: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(model / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    assert "the pattern '(a+)+$' in its tokenizer.json" in refused(lambda: check_is_data(str(model), "policy.model"))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|a)*$", r"(a|aa)+$", r"(?=(a|aa)+$)b", r"(?:a?)*b", r"(a+)\1+$", r"(?<n>a\g<n>|a\g<n>|a)$", r"\s*\s*\s*x",
        r"(?:a+){20}$", r"(a?){30}a{30}$", r"(?:.|.){20}\b\B", r"a{1,3}+$", r"(?x)(a #)\n|a)*b", r"(?<n>a\g'n'|a)",
        r"(?:a|\Ra)*b", r"(?:a{1,9}){8}b", r"(?:\c(a|a)*b)", r"(?i)(?:x|X)*y", r"(?~a)*b", "(a", "a)",
        r"(?:[a-z]|\w)+$",
    ],
)  # fmt: skip
def test_patterns_that_search_long(pattern: str) -> None:
    assert searches_long(pattern)


@pytest.mark.parametrize("twice", ["aa", "a" * 33])
def test_a_normalizer_that_doubles_a_text(model: Path, twice: str) -> None:
    each = {"type": "Replace", "pattern": {"String": "a"}, "content": twice}
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [each]})
    check_is_data(str(model), "policy.model")
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [each] * 11})
    assert "more than 1024 characters of one" in refused(lambda: check_is_data(str(model), "policy.model"))
    change(model / "tokenizer.json", normalizer=None, decoder={"type": "Sequence", "decoders": [each] * 11})
    assert "more than 1024 characters of one" in refused(lambda: check_is_data(str(model), "policy.model"))


@pytest.mark.parametrize(
    "pattern", [r"((a)*)*b", r"(?:a*){2,}$", r"([a-z]+)*\d", r"(?:(?:x+)y?)+$", r"(a{1,})+", r"(.*)*x", r"(?:[)]+)*"]
)
def test_loops_in_loops(pattern: str) -> None:
    assert searches_long(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
        r" ?[^(\s|[.,!?…。])]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+| ?[\p{P}\p{S}]+[\r\n]*",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)",
        r"(?=(\d{3})+(?!\d))",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)",
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]+[\p{Ll}\p{M}]*(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[\p{P}\$\+<=>\^~\|`]+",
        r"[^(\\s|[.,!?…。])]+",
        r"\{\}|\{a\}|{|}",
        r"<\|start\|>|[\p{L}]+|[^\s\p{L}\p{N}]+",
    ],
)
def test_patterns_in_use_are_taken(pattern: str) -> None:
    assert not searches_long(pattern)


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "multiplied": "{{ ('a' * 99999999) * 99999 }}",
    "doubled": "{% set n = namespace(t='a') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "formatted": "{{ '%2000000000d' % 1 }}",
    "long": "{{ 'a' * 90000000 }}",
}


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind != "loops"])
def test_a_template(kind: str) -> None:
    renderer = Renderer()
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateLimitError):
        renderer.render(TEMPLATES[kind], [chat], add_generation_prompt=True)
    began = time.monotonic()
    with pytest.raises(TemplateLimitError):  # it is known now
        renderer.render(TEMPLATES[kind], [chat], add_generation_prompt=True)
    assert time.monotonic() - began < 0.1
    assert renderer.render("{{ messages[0].content }}", [chat] * 3, add_generation_prompt=True) == ["Hi"] * 3
    refusal = renderer.render("{{ raise_exception('no') }}", [chat], add_generation_prompt=True)
    assert isinstance(refusal[0], TemplateRefusedError)
    assert str(refusal[0]) == "no"
    renderer.close()


def test_a_template_that_loops_for_the_second_prompt_only(model: Path) -> None:
    from rlhf_core.models.tokenizers import load_tokenizer

    loops = f"{{% if messages[0].content == 'b' %}}{TEMPLATES['loops']}{{% endif %}}{{{{ messages[0].content }}}}"
    (model / "chat_template.jinja").write_text(loops)
    tokenizer = load_tokenizer(str(model), field="policy.model")
    chats: list[Any] = [[{"role": "user", "content": text}] for text in "abc"]
    said = refused(lambda: render_prompts(chats, tokenizer))
    assert "does not render a conversation within 5 seconds and 1 GiB" in said


FORKS = """
import multiprocessing
from rlhf_core.prompts.render_process import renderer

def text(template):
    return renderer.render(template, [[{"role": "user", "content": "Hi"}]], add_generation_prompt=True)

def in_fork():
    assert text("x") == ["x"]
    assert renderer._process is not process

assert text("{{ messages[0].content }}") == ["Hi"]
process = renderer._process
fork = multiprocessing.get_context("fork").Process(target=in_fork)
fork.start()
fork.join(30)
assert fork.exitcode == 0
assert text("{{ messages[0].role }}") == ["user"]
assert renderer._process is process
"""


def test_the_renderer_of_a_fork_is_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_that_is_bounded_is_given_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), at_most(1 << 28):
        bytes(1 << 35)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert 0 < free_bytes() < float("inf")


def test_a_file_that_is_there_is_no_hole(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a" * (1 << 20))
    assert check_is_full(tmp_path / "p.txt") == 1 << 20


def test_an_artifact_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    from rlhf_core.contracts.durable import read_file as read_bytes

    hollow(tmp_path / "01_prompts.arrow")
    with pytest.raises(StorageError, match="more than the memory that is free"):
        read_bytes(tmp_path / "01_prompts.arrow")
