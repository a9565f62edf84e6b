"""Folders that somebody else made: looked at before any library reads them, so that only data is read, and read here.

transformers and peft follow what a folder says: other repositories, kernels of a hub, links, templates. With
``trust_remote_code=False`` they import no code of it; what is left to refuse is refused here.

    a link out of the folder, a pipe, a device     would show a foreign file, or never end
    adapter_config.json beside config.json         would send transformers to the base that it names
    attn_implementation: owner/kernel              would be fetched from the hub, and imported
    quantization_config                            a run has float32 or bfloat16, by `dtype`
    *.index.json with a path                       a shard is a file of the folder
    a thousand million layers, labels, positions   would fill the memory, before a weight is read
    a header that lies, a million added tokens     likewise
    a pattern with a loop in a loop                would take for ever on a text that its author knows
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from safetensors import SafetensorError, safe_open

from rlhf_core.contracts.bounds import SPARE_BYTES, at_most
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.hub import MARKS, TEMPLATES, folder_of
from rlhf_core.models.patterns import check_tokenizer

MAX_JSON_BYTES: Final = 1 << 27
"""tokenizer.json of the largest vocabularies has some 40 MB."""
MAX_HEADER_BYTES: Final = 1 << 24
"""Of a safetensors file: 100 bytes a tensor."""
MAX_CONFIG_BYTES: Final = 1 << 24
MAX_TEXT_BYTES: Final = 1 << 20
"""Of a chat template."""
MAX_COUNT: Final = 1 << 10
"""Layers, heads or experts."""
MAX_KEYS: Final = 1 << 10
MAX_COMMAS: Final = 1 << 18
"""Of a JSON file that is not a vocabulary."""
MAX_LABELS: Final = 1 << 16
MAX_BUFFER_BYTES: Final = 1 << 30
"""Of masks and tables of positions, which a model computes and no file holds."""
MAX_SIZE: Final = 1 << 31
"""Any other whole number of a model's config."""
SPARE_ELEMENTS: Final = 1 << 24
"""What may be missing before it is called a lie; transformers names the missing weights themselves."""
ATTENTION: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
EXPERTS: Final = ("eager", "grouped_mm", "batched_mm")
_COUNT: Final = re.compile(r"(num|n)_.*(layer|head|expert|block|group)s?|.*_layers")
_REPEATED: Final = ("attention_types", "num_labels", "_num_labels")
"""Keys whose numbers say how often something is repeated in memory."""
_LAYERS: Final = re.compile(
    r"(text_config\.)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_decoder_layers)"
)
_SHARD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_LARGE: Final = {"tokenizer.json", "vocab.json"}
_OBJECTS: Final = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
}


def check_is_data(name: str, field: str, folder: Path | None = None) -> None:
    """Refuse a folder of a model, tokenizer or adapter that is more than data, or not of this folder.

    Args:
        name: as the config has it.
        field: named in errors.
        folder: that ``folder_of`` has found; None: the name is one.
    Raises: UserError with the first thing that is wrong.
    """
    folder = folder or Path(name).expanduser()
    if not folder.is_dir():
        return
    named = f"{field} {name!r}"
    for file in _files(folder):
        _check_file(file, folder, named)
    if (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{named} holds a config.json and an adapter_config.json, so that it is not clear whose weights these "
                "are; move the adapter into a folder of its own"
            )
        check_model_config(read_small_json(folder / "config.json", named), named)
    for index in folder.glob("*.index.json"):
        _check_index(read_small_json(index, named), index.name, named)


def check_model_config(values: Mapping[str, Any], named: str) -> None:
    """Refuse a model's config that names code of a hub, or sizes that no model has.

    Args:
        values: as config.json has them.
        named: field and value, for errors.
    Raises: UserError.
    """
    if len(values) > MAX_KEYS:
        raise UserError(f"{named} has {len(values)} keys in its config.json; at most {MAX_KEYS} are read")
    if values.get("return_dict") is False or values.get("use_return_dict") is False:
        raise UserError(
            f"{named} says return_dict false in its config.json, so that what it computes has no names; remove it there"
        )
    for key, value in _leaves(values):
        name = key.rpartition(".")[2]
        for suffix, known in (("attn_implementation", ATTENTION), ("experts_implementation", EXPERTS)):
            if any(part.lstrip("_") == suffix for part in key.split(".")) and value is not None and value not in known:
                raise UserError(
                    f"{named} asks in its config.json for {key} {value!r}, which could be code of a hub; "
                    f"leave it out there, or choose {', '.join(known)}"
                )
        limit = MAX_COUNT if _COUNT.fullmatch(name) else MAX_SIZE
        limit = (MAX_COUNT if name == "attention_types" else MAX_LABELS) if name in _REPEATED else limit
        if isinstance(value, int) and abs(value) > limit and not name.endswith(("_id", "_ids", "_len", "_length")):
            raise UserError(f"{named} says {key} {value} in its config.json; at most {limit} is taken")
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{named} is quantized (quantization_config in its config.json); models are read as float32 or bfloat16: "
            "save it with model.dequantize()"
        )


def check_size(auto_class: str, name: str, field: str) -> None:
    """Refuse a model folder whose config needs far more numbers than its weights have: they would be made up.

    Args:
        auto_class: of transformers, that the folder is loaded with.
        name: folder or hub id.
        field: named in errors.
    Raises: UserError, before the memory is taken.
    """
    folder = folder_of(name, field, with_weights=True)
    try:
        if headers := [read_header(file, f"{field} {name!r}") for file in folder.glob("*.safetensors")]:
            values = read_small_json(folder / "config.json", f"{field} {name!r}")
            check_layers(values, sum(map(len, headers)), f"{field} {name!r}")
        model = without_weights(transformers_config(folder), auto_class, f"{field} {name!r}")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} does not load as {auto_class}: {reason}") from None
    needed, there = sum(p.numel() for p in model.parameters()), num_stored(folder, f"{field} {name!r}")
    if needed > 2 * there + SPARE_ELEMENTS:
        raise UserError(
            f"{field} {name!r} describes a model of {needed} parameters in its config.json, and holds {there}; "
            "take both from where the model was saved"
        )


def transformers_config(folder: str | Path) -> Any:
    """The config of a folder as transformers reads it, within a memory. Raises what one that does not load raises."""
    from transformers import AutoConfig

    try:
        with at_most(SPARE_BYTES):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise ValueError(f"it {_too_much()}") from None


def without_weights(config: Any, auto_class: str, named: str) -> Any:
    """A model on the meta device: shapes without weights, within a memory.

    Args:
        config: of transformers.
        auto_class: of transformers.
        named: field and value, for errors.
    Raises: UserError: it would take memory even so, or compute masks and tables that no model has; whatever an
        architecture raises of a config that it does not fit.
    """
    import torch
    import transformers

    kind = getattr(transformers, auto_class)
    with contextlib.suppress(Exception):  # its module takes room of its own, which is no fault of the folder
        kind._model_mapping[type(config)]
    try:
        with at_most(SPARE_BYTES), torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
    except MemoryError:
        raise UserError(f"{named} {_too_much()}") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "bad alloc" not in str(error):
            raise
        raise UserError(f"{named} {_too_much()}") from None
    computed = sum(b.numel() * b.element_size() for b in model.buffers())
    if computed > MAX_BUFFER_BYTES:
        raise UserError(
            f"{named} describes in its config.json masks and tables of {computed} bytes, which are computed; at most "
            f"{MAX_BUFFER_BYTES} are: lower its number of positions to what it was trained with"
        )
    return model


def _too_much() -> str:
    return (
        f"describes in its config.json a model that takes more than {SPARE_BYTES >> 30} GiB before a weight is read; "
        "take its config.json from where the model was saved"
    )


def check_layers(values: Mapping[str, Any], stored: int, named: str) -> None:
    """Refuse more layers than tensors are stored: each is built, and takes time and memory, before any is missed."""
    for key, value in _leaves(values):
        if isinstance(value, int) and value > max(stored, 1) and _LAYERS.fullmatch(key):
            raise UserError(
                f"{named} says {key} {value} in its config.json, and holds {stored} tensors; take both from where the "
                "model was saved"
            )


def num_stored(folder: Path, named: str) -> int:
    """Elements of all tensors in a folder's weights, by their headers. Raises UserError for a header that lies."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(math.prod(shape) for file in files for shape in read_header(file, named).values())


def read_header(file: Path, named: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file. Raises UserError for a header that lies."""
    try:
        _check_header_size(file)
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{named} holds {file.name}, which is no safetensors file: {error}") from None


def whole_numbers(file: Path) -> dict[str, str]:
    """Name -> type of the weights and biases of a safetensors file that are stored as whole numbers."""
    with safe_open(file, "pt") as tensors:
        types = {key: str(tensors.get_slice(key).get_dtype()) for key in tensors.keys()}  # noqa: SIM118 - not a dict
    return {key: kind for key, kind in types.items() if kind[0] in "IU" and key.endswith((".weight", ".bias"))}


def _check_header_size(file: Path) -> None:
    """Raise ValueError for a header that is longer than that of any model: safetensors takes it at its word."""
    with file.open("rb") as opened:
        told = int.from_bytes(opened.read(8), "little")
    if told > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {told} bytes; at most {MAX_HEADER_BYTES} are read")


def read_small_json(path: Path, named: str) -> dict[str, Any]:
    """A JSON object that a library will read next. Raises UserError if it is none, or too large for one."""
    limit = MAX_JSON_BYTES if path.name in _LARGE else MAX_CONFIG_BYTES
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size} bytes; at most {limit} are read")
        data = path.read_bytes()
        if path.name not in _LARGE and not path.name.endswith(".index.json") and data.count(b",") > MAX_COMMAS:
            raise ValueError(f"{data.count(b',')} values; at most {MAX_COMMAS} are read")
        value = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{named} has a {path.name} that is not JSON: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise UserError(f"{named} has a {path.name} that holds no JSON object; take it from where the model was made")
    return cast("dict[str, Any]", value)


def _files(folder: Path) -> Iterator[Path]:
    """What stands in the folder by a name that libraries read, and its further chat templates."""
    yield from (p for p in sorted(folder.iterdir()) if p.suffix in MARKS)
    templates = folder / TEMPLATES
    if templates.exists():
        yield templates
        yield from sorted(templates.iterdir()) if templates.is_dir() else ()


def _check_file(file: Path, folder: Path, named: str) -> None:
    try:
        real = file.resolve()
        status = real.stat()
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise UserError(f"{named} holds {file.name}, which cannot be read ({error}); remove or mend it") from None
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{named} holds {file.name}, which is no file but a pipe, a device or a socket; remove it")
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"  # where the hub's cache keeps the files that a snapshot links to
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise UserError(
            f"{named} holds {file.name}, a link out of the folder (to {real}); copy the file there, or name its folder"
        )
    limit = MAX_JSON_BYTES if file.name in _LARGE else MAX_CONFIG_BYTES if file.suffix == ".json" else None
    limit = MAX_TEXT_BYTES if file.suffix == ".jinja" else limit
    if limit is not None and status.st_size > limit:
        raise UserError(f"{named} holds {file.name} of {status.st_size} bytes; at most {limit} are read")
    if file.name in _OBJECTS:
        read_small_json(file, named)
    if file.suffix == ".safetensors":
        try:
            _check_header_size(file)
        except ValueError as error:
            raise UserError(f"{named} holds {file.name}, which is no safetensors file: {error}") from None
    if file.name == "tokenizer.json":
        check_tokenizer(file, named)


def _check_index(values: Mapping[str, Any], file: str, named: str) -> None:
    shards: Any = values.get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{named} has a {file} without a weight_map; save the model with save_pretrained")
    for shard in cast("dict[str, object]", shards).values():
        if not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
            raise UserError(
                f"{named} names in {file} the shard {str(shard)[:80]!r}; a shard is a *.safetensors file of that folder"
            )


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in cast("dict[str, object]", value).items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for child in cast("list[object]", value):
            yield from _leaves(child, key)
    else:
        yield key, value
