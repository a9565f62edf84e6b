"""Model folders and hub ids: what a config's models are, read before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import base_of, is_adapter
from rlhf_core.models.hub import folder_of, stored_names
from rlhf_core.models.untrusted import check_is_data, check_model_config, transformers_config


def context_length(model_config: Any) -> int | None:
    """Positions a model was built for, where its config tells."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def model_config(name: str, field: str, *, with_weights: bool = True) -> Any:
    """The transformers config of a folder, or of a hub id; a run's needs weights beside it, a plan's does not.

    Raises: UserError naming ``field``.
    """
    if not name:
        raise UserError(f"{field} is not set; give a model folder or a hub id")
    folder = folder_of(name, field)
    check_is_data(name, field, folder)
    _check_weights(folder, name, field, with_weights=with_weights)
    try:
        config = transformers_config(folder)
        config.name_or_path = name
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} is neither a model folder nor a hub id that loads: {reason}") from None
    check_model_config({"attn_implementation": config._attn_implementation, **config.to_dict()}, f"{field} {name!r}")
    return config


def _check_weights(folder: Path, name: str, field: str, *, with_weights: bool) -> None:
    if is_adapter(str(folder)):
        section = field.partition(".")[0]
        remedy = f"set {field} to its base ({base_of(str(folder))!r}) and {section}.adapter to this folder"
        raise UserError(
            f"{field} {name!r} is a LoRA adapter, not a model; "
            + (remedy if section in ("policy", "reference") else "merge it into its base first")
        )
    if with_weights and any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{field} {name!r} holds GGUF weights, which llama.cpp reads; give the folder of safetensors that they "
            "were converted from"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{field} {name!r} is a folder without config.json; give one written by save_pretrained")
    names = stored_names(name, folder) if with_weights else []
    if not with_weights or any(file.endswith(".safetensors") for file in names):
        return
    if any(file.endswith(".bin") for file in names):
        raise UserError(
            f"{field} {name!r} has its weights as pickle (*.bin), which is never loaded; convert them with "
            "model.save_pretrained, which writes safetensors"
        )
    if (folder / "model.safetensors.index.json").is_file():
        raise UserError(
            f"{field} {name!r} holds model.safetensors.index.json and none of its shards: the copy or download is not "
            "complete; fetch it again"
        )
    raise UserError(f"{field} {name!r} is a model folder without weights (*.safetensors)")
