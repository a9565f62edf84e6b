"""What a model folder is, by its config.json, the files beside it and the names of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

SENTENCE_TRANSFORMERS = ("modules.json", "config_sentence_transformers.json")
"""Files that stand beside an embedding model alone."""
_ENDINGS = {
    "ForSequenceClassification": "a sequence classifier",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model for question answering",
    "ForMultipleChoice": "a model for multiple choice",
    "ForMaskedLM": "an encoder (masked language model)",
    "ForPreTraining": "a model for pre-training",
    "ForCausalLM": "a language model",
    "LMHeadModel": "a language model",
    "ForConditionalGeneration": "a multimodal model",
    "RewardModel": "a reward model",
    "Model": "a model without an output head",
}


def architecture(values: Mapping[str, Any]) -> str:
    """The first entry of ``architectures``; empty where there is none."""
    names = values.get("architectures")
    return str(cast("list[object]", names)[0]) if isinstance(names, list) and names else ""


def is_embedding_model(folder: Path) -> bool:
    """Whether sentence-transformers saved the folder."""
    return any((folder / name).is_file() for name in SENTENCE_TRANSFORMERS)


def kind(folder: Path, values: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A noun for the folder, with its architecture.

    Example: ``a sequence classifier (LlamaForSequenceClassification)``
    """
    name = architecture(values)
    shown = f" ({name})" if name else ""
    if is_embedding_model(folder):
        return f"an embedding model of sentence-transformers{shown}"
    if values.get("is_encoder_decoder"):
        return f"an encoder-decoder{shown}"
    if any(key.endswith((".qweight", ".qzeros")) for key in keys):
        return f"a quantized model (GPTQ or AWQ){shown}"
    noun = next((noun for ending, noun in _ENDINGS.items() if name.endswith(ending)), None)
    if noun is None:
        noun = "a sequence classifier" if "score.weight" in set(keys) else "a model"
    return f"{noun}{shown}"


def needs_own_code(values: Mapping[str, Any]) -> bool:
    """Whether the folder's class is written in files of the folder, and none of transformers'."""
    import transformers

    mapped = values.get("auto_map")
    names = cast("dict[str, object]", mapped) if isinstance(mapped, dict) else {}
    models = [key for key in names if key.startswith("AutoModel")]
    return bool(models) and not hasattr(transformers, architecture(values) or "none")
