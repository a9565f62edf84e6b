"""LoRA adapters by peft: reading, fitting to a base, switching, saving, merging.

An adapter is written into the base's layers, so that the transformers model itself answers with it. One base
can carry two: the trained one, and a named frozen one that the reference is.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import split_revision
from rlhf_core.contracts.policy_config import ALL_LINEAR
from rlhf_core.contracts.policy_config import LoraConfig as LoraSection
from rlhf_core.models.hub import folder_of
from rlhf_core.models.untrusted import check_is_data, read_small_json
from rlhf_core.ops.finite import first_not_finite
from rlhf_core.ops.randomness import seeded_generator

if TYPE_CHECKING:
    import peft

TRAINED = "default"
"""peft's name of an adapter that stands alone; it is not written into a saved adapter."""
REFERENCE = "reference"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SHAPE = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"}
PLACE = {
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
}
ORIGIN = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "peft_type",
    "task_type",
}
MAX_PATTERN, MAX_RANK = 256, 1 << 16
REPEAT, SLOW = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")
"""A repetition, and one of a group."""
PLAIN_FIELDS = SHAPE | PLACE | ORIGIN
"""What a LoRA adapter may say of itself; anything else must stand at peft's default."""


class Adapters:
    """The adapters on one base model, and which of them answers.

    Args:
        peft_model: around the base.
        base: its folder or hub id.
    """

    def __init__(self, peft_model: peft.PeftModel, base: str) -> None:
        self.peft_model, self.base = peft_model, base
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def answering_as(self, name: str | None) -> Iterator[None]:
        """Within: the base with the adapter of this name, or with none. The trained one always comes back.

        One thread at a time: who else wants the trunk waits.
        """
        with self._lock:
            if name == TRAINED:
                yield
                return
            try:
                if name is None:
                    with self.peft_model.disable_adapter():
                        yield
                else:
                    self.peft_model.set_adapter(name)
                    yield
            finally:
                self.peft_model.set_adapter(TRAINED)

    def tensors(self) -> dict[str, Tensor]:
        """The trained adapter, under the names that peft saves it by."""
        import peft

        return peft.get_peft_model_state_dict(self.peft_model, adapter_name=TRAINED, save_embedding_layers=False)

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained adapter to a folder as peft does: adapter_config.json, adapter_model.safetensors.

        Args:
            folder: made if it is not there.
            tensors: the adapter; None: as it is in memory.
        """
        folder.mkdir(exist_ok=True)
        named = (self.tensors() if tensors is None else tensors).items()
        save_file({k: v.detach().cpu().contiguous() for k, v in named}, folder / WEIGHTS_FILE, {"format": "pt"})
        config = self.peft_model.peft_config[TRAINED].to_dict()
        place = Path(self.base)
        base, revision = (str(place.resolve()), None) if place.is_dir() else split_revision(self.base)
        config |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id holds a LoRA adapter alone, and no model."""
    try:
        folder = folder_of(name, "")
    except UserError:  # told where it is loaded
        return False
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(name: str) -> str:
    """Folder or hub id, with its revision, of the model that an adapter was trained on."""
    values = read_small_json(folder_of(name, "the adapter") / CONFIG_FILE, repr(name))
    base, revision = str(values.get("base_model_name_or_path")), values.get("revision")
    has_one = isinstance(revision, str) and not Path(base).is_dir() and split_revision(base)[1] is None
    return f"{base}@{revision}" if has_one else base


def base_at_hand(name: str, field: str) -> str:
    """Folder of the base that an adapter names: there, or in the hub's cache. A file of a folder opens no connection.

    Raises: UserError if it is neither.
    """
    base = base_of(name)
    try:
        return str(folder_of(base, field, with_weights=True, offline=True))
    except UserError:
        raise UserError(
            f"{field} {name!r} names the base {base!r} in its {CONFIG_FILE}, which is neither a folder here nor in the "
            "hub's cache; if you trust it, name it as policy.model and this as policy.adapter"
        ) from None


def new_adapter(section: LoraSection, model: Any) -> peft.LoraConfig:
    """The peft config of a fresh adapter.

    Args:
        section: ``policy.lora``, with a rank.
        model: the base; may be on the meta device.
    Raises: UserError if ``policy.lora.target_modules`` names what is not there.
    """
    import peft

    assert section.rank is not None
    targets = section.target_modules
    there = _adaptable_layers(model)
    for target in [] if targets == [ALL_LINEAR] else targets:
        if not any(name == target or name.endswith(f".{target}") for name in there):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
            raise UserError(
                f"policy.lora.target_modules names {target!r}, but no layer of policy.model that can have an adapter "
                f"is called so; use {ALL_LINEAR}, or some of {known}"
            )
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=section.rank,
        lora_alpha=section.alpha or 2 * section.rank,  # pyright: ignore[reportArgumentType] - any number will do
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=0.0,
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in there.values()),
    )


def read_adapter(name: str, field: str) -> tuple[peft.LoraConfig, Path]:
    """The peft config of a saved adapter, and its weights file.

    Args:
        name: folder or hub id.
        field: named in errors.
    Raises: UserError if there is none, or it is more than plain LoRA on a causal language model.
    """
    import peft

    folder = folder_of(name, field, with_weights=True)
    check_is_data(name, field, folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} is not an adapter that loads ({CONFIG_FILE}): {reason}") from None
    if not isinstance(config, peft.LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"{field} {name!r} is an adapter of type {kind}; only LORA is supported")
    if config.task_type not in (None, "CAUSAL_LM"):
        task = getattr(config.task_type, "value", config.task_type)
        raise UserError(f"{field} {name!r} was trained for {task}; an adapter of a policy is for CAUSAL_LM")
    _check_patterns(config, f"{field} {name!r}")
    default = peft.LoraConfig().to_dict()
    special = [k for k, v in config.to_dict().items() if k not in PLAIN_FIELDS and v != default[k] and v]
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        special.append("init_lora_weights")
    if special:
        raise UserError(
            f"{field} {name!r} is more than plain LoRA: it sets {', '.join(special)} in its {CONFIG_FILE}, so that the "
            "base without it would not be the base; merge it into its base and train on that"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{field} {name!r} has no {WEIGHTS_FILE}; save it with PeftModel.save_pretrained")
    config.lora_dropout = 0.0
    config.init_lora_weights = True
    return config, folder / WEIGHTS_FILE


def _check_patterns(config: peft.LoraConfig, named: str) -> None:
    """Refuse what peft would use as a pattern and could search for ever, and a rank that no layer has."""
    texts: list[Any] = [config.target_modules, config.exclude_modules, config.layers_pattern]
    texts += [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    for text in texts:
        if not isinstance(text, str):
            continue
        if len(text) > MAX_PATTERN or SLOW.search(text) or len(REPEAT.findall(text)) > 4:
            raise UserError(
                f"{named} has the pattern {text[:60]!r} in its {CONFIG_FILE}, which could take for ever to "
                "search; list the names of the layers instead"
            )
    ranks: list[Any] = [config.r, *(config.rank_pattern or {}).values()]
    if any(not isinstance(rank, int) or rank > MAX_RANK for rank in ranks):
        raise UserError(
            f"{named} has the rank {max(map(str, ranks), key=len)[:20]} in its {CONFIG_FILE}; at most {MAX_RANK}"
        )


def add_adapter(
    model: Any, config: peft.LoraConfig, name: str, *, seed: int = 0, peft_model: peft.PeftModel | None = None
) -> peft.PeftModel:
    """Write an adapter into a base's layers.

    Args:
        model: the base, changed in place.
        config: its shape.
        name: its name on this base.
        seed: of its first weights, drawn without touching the global generator.
        peft_model: of the base, where it has an adapter already.
    Returns: the peft model around the base.
    """
    import peft

    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft speaks of fan_in_fan_out and of tied weights, which it handles
        torch.manual_seed(int(seeded_generator(seed, "adapter").integers(np.iinfo(np.int64).max)))
        if peft_model is None:
            return cast("peft.PeftModel", peft.get_peft_model(model, config, adapter_name=name))
        peft_model.add_adapter(name, config)
    return peft_model


def check_fit(peft_model: peft.PeftModel, adapter: str, weights: Path, *, name: str, field: str) -> None:
    """Compare a saved adapter with its place on a base, tensor by tensor.

    Args:
        peft_model: the base with that place; may be on the meta device.
        adapter: name of the place.
        weights: the saved adapter's weights file.
        name: of the saved adapter, for errors.
        field: named in errors.
    Raises: UserError with the first tensor that is missing, left over, or of another shape.
    """
    import peft

    place = peft.get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in place.items()}
    try:
        with safe_open(weights, "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field} {name!r} has a {WEIGHTS_FILE} that does not load: {error}") from None
    base: Any = peft_model.get_base_model()
    _check_head(base, name, field)
    problem = ""
    if left_over := sorted(saved.keys() - wanted.keys()):
        problem = f"its {left_over[0]} has no place there"
    elif missing := sorted(wanted.keys() - saved.keys()):
        problem = f"it lacks {missing[0]}"
    elif other := sorted(key for key in saved if saved[key] != wanted[key]):
        problem = f"its {other[0]} is {_size(saved[other[0]])}, there it would be {_size(wanted[other[0]])}"
    if problem:
        raise UserError(f"{field} {name!r} does not fit its base ({base.config.model_type}): {problem}")


def attach(
    model: Any,
    base: str,
    names: Mapping[str, tuple[str, str]],
    *,
    fresh: peft.LoraConfig | None = None,
    seed: int = 0,
) -> Adapters:
    """Adapters on a frozen base, each loaded or fresh; the trained one answers.

    Args:
        model: the base, changed in place.
        base: its folder or hub id.
        names: place on the base -> (folder or hub id of a saved adapter, field for errors).
        fresh: shape of a new trained adapter, which starts as zero.
        seed: of the new adapter.
    Returns: the adapters, in float32.
    Raises: UserError if one does not fit.
    """
    import peft

    peft_model = None if fresh is None else add_adapter(model, fresh, TRAINED, seed=seed)
    for place, (name, field) in names.items():
        peft_model = _add_saved(model, place, name, field, peft_model)
        weights = read_adapter(name, field)[1]
        check_fit(peft_model, place, weights, name=name, field=field)
        tensors = _float32(load_file(weights))
        if (broken := first_not_finite(tensors.items())) is not None:
            raise UserError(
                f"{field} {name!r} holds a weight that is NaN or infinite ({broken}); take an intact copy of it"
            )
        peft.set_peft_model_state_dict(peft_model, tensors, adapter_name=place)
    assert peft_model is not None, "an adapter to attach"
    peft_model.set_adapter(TRAINED)
    return Adapters(peft_model, base)


def check_adapter(model: Any, name: str, field: str) -> int:
    """Whether a saved adapter fits a base on the meta device, which is changed.

    Returns: its number of parameters.
    Raises: UserError if it does not fit.
    """
    peft_model = _add_saved(model, TRAINED, name, field, None)
    check_fit(peft_model, TRAINED, read_adapter(name, field)[1], name=name, field=field)
    return count_adapter(peft_model)


def count_adapter(peft_model: peft.PeftModel) -> int:
    """Parameters of the trained adapter."""
    return sum(p.numel() for name, p in peft_model.named_parameters() if f".{TRAINED}." in f"{name}.")


def merged(model: Any, adapter: str, field: str) -> Any:
    """The base with an adapter added to its weights: a plain model again. Raises UserError if it does not fit."""
    adapters = attach(model, "", {TRAINED: (adapter, field)})
    return cast("Any", adapters.peft_model).merge_and_unload()


def _add_saved(model: Any, place: str, name: str, field: str, peft_model: peft.PeftModel | None) -> peft.PeftModel:
    config, _ = read_adapter(name, field)
    try:
        return add_adapter(model, config, place, peft_model=peft_model)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} does not fit its base ({model.config.model_type}): {reason}") from None


def _adaptable_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers by name, the output head left out: its logits are computed apart from the trunk."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in cast("nn.Module", model).named_modules()
        if layer is not head and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    }


def _check_head(model: Any, name: str, field: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"{field} {name!r} also adapts the output head, whose logits are computed apart from the trunk here; "
            "merge it into its base and train on that"
        )


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in tensors.items()}


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
