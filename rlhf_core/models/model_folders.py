"""A model folder against the role that a config gives it: nothing that it stores is dropped in silence.

A policy or reference must hold a language model, a reward model a head with one logit. Everything is read from
config.json and from the headers of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.folder_kinds import architecture, is_embedding_model, kind, needs_own_code
from rlhf_core.models.score_heads import OWN, ScoreHead, find_score_head
from rlhf_core.models.stored_weights import (
    SINGLE,
    VALUE_HEADS,
    Fit,
    StoredWeights,
    compare,
    is_harmless,
    is_other_head,
    misfit,
    some,
)
from rlhf_core.models.untrusted import check_layers, read_small_json, transformers_config

CAUSAL_LM: Final = "AutoModelForCausalLM"
CLASSIFIER: Final = "AutoModelForSequenceClassification"
_PREFIXES: Final = {"rwtransformer.": "base", "pretrained_model.": ""}
"""What DeepSpeed-Chat and older TRL write before the names of a model's weights -> what stands there instead."""


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded, beside its class."""

    stored: StoredWeights | None = None
    head: ScoreHead | None = None
    options: Mapping[str, Any] | None = None
    """For ``from_pretrained``."""
    is_compared: bool = False
    """Whether the headers told that everything stored has its place; else the load itself tells."""


def check_model_folder(
    auto_class: str, name: str, field: str, notes: list[str] | None = None, *, folder: Path | None = None
) -> Loading:
    """Check a folder against its role.

    Args:
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``.
        name: folder, or a hub id, which is checked once its weights have been fetched.
        field: named in errors.
        folder: where the files of ``name`` are; None: ``name`` itself.
        notes: grows by a sentence for each thing that is left out, or read in an unusual way.
    Returns: how it is loaded.
    Raises: UserError with one sentence that says what the folder is, and what would be right.
    """
    folder = folder or Path(name).expanduser()
    if not folder.is_dir() or auto_class not in (CAUSAL_LM, CLASSIFIER):
        return Loading()
    named, found = f"{field} {name!r}", [] if notes is None else notes
    values = read_small_json(folder / "config.json", named)
    if needs_own_code(values):
        raise UserError(
            f"{named} is a {architecture(values) or 'model'} whose code stands in the folder (auto_map in its "
            "config.json), and it is never run; take a model of a class that transformers has"
        )
    stored = StoredWeights.of(folder, named)
    _check_no_adapter(stored, named)
    check_layers(values, len(stored.shapes), named)
    config = transformers_config(folder)
    said = _Folder(folder, values, stored, named, kind(folder, values, stored.shapes))
    if auto_class == CAUSAL_LM:
        return _check_policy(said, config, found)
    return _check_reward(said, config, found)


def check_nothing_left(auto_class: str, unexpected: Sequence[str], named: str) -> None:
    """Refuse what a load has dropped, where headers could not tell. Raises UserError."""
    is_known = VALUE_HEADS.match if auto_class == CAUSAL_LM else is_other_head
    if left := sorted(key for key in unexpected if not is_harmless(key, None) and not is_known(key)):
        raise UserError(
            f"{named} stores {len(left)} weights that {auto_class} has no place for: {some(left)}; they would be "
            "dropped in silence: take config.json and weights from where the model was saved"
        )


@dataclass(frozen=True)
class _Folder:
    path: Path
    values: Mapping[str, Any]
    stored: StoredWeights
    named: str
    kind: str


def _check_policy(it: _Folder, config: Any, notes: list[str]) -> Loading:
    from transformers.models.auto import modeling_auto

    saved_as, remedy = architecture(it.values), "give a language model (AutoModelForCausalLM)"
    if it.values.get("is_encoder_decoder"):
        raise UserError(f"{it.named} is {it.kind}, and a policy reads prompt and response as one text; {remedy}")
    is_encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", False):
        what = it.kind if "encoder" in it.kind else f"{it.kind} of the encoder {config.model_type}"
        raise UserError(f"{it.named} is {what}, which does not read from left to right; {remedy}")
    if is_embedding_model(it.path):
        raise UserError(f"{it.named} is {it.kind}, which was trained to embed texts and not to write them; {remedy}")
    _check_class(it, config, CAUSAL_LM, remedy)
    fit = compare(config, CAUSAL_LM, it.stored.shapes)
    if fit is None:
        return Loading(it.stored)
    shapes = it.stored.shapes
    classifies = saved_as.endswith(("ForSequenceClassification", "ForTokenClassification", "RewardModel"))
    has_head = any(is_other_head(key) and key in fit.wanted for key in shapes)
    if (classifies and not has_head) or f"{OWN}.weight" in fit.unexpected:
        what = it.kind if classifies else "a sequence classifier"
        raise UserError(
            f"{it.named} is {what}, as reward models are, and no language model; give the language model that it was "
            "trained from, and this folder as reward.components.N.model"
        )
    leftover = [k for k in fit.unexpected if not is_harmless(k, shapes.get(k)) and not VALUE_HEADS.match(k)]
    if (problem := misfit(fit, it.named, leftover)) is not None:
        raise UserError(problem if "language model" in it.kind else f"{problem} (this is {it.kind})")
    if classifies:
        notes.append(f"{it.named} is called {saved_as} in its config.json; its weights are read as {fit.architecture}")
    _note_what_is_left(it, fit, notes, harmless_files=True)
    return Loading(it.stored, is_compared=True)


def _check_reward(it: _Folder, config: Any, notes: list[str]) -> Loading:
    remedy = "give a reward model (AutoModelForSequenceClassification with one label)"
    _check_class(it, config, CLASSIFIER, remedy)
    labels, config.num_labels = int(config.num_labels), 1
    mapping = _key_mapping(it.stored, config)
    fit = compare(config, CLASSIFIER, it.stored.shapes, mapping)
    if fit is None:
        return Loading(it.stored)
    has_score = f"{OWN}.weight" in fit.wanted
    head = find_score_head(it.stored, it.values, it.named) if has_score else None
    _check_head(it, fit, head, has_score=has_score)
    if labels != 1 and {"num_labels", "id2label"} & it.values.keys():
        raise UserError(
            f"{it.named} has {labels} logits by its config.json and one by its weights; a reward model has one "
            "(num_labels: 1 in its config.json)"
        )
    shapes, used = it.stored.shapes, set[str]() if head is None else head.keys
    leftover = [k for k in fit.unexpected if k not in used and not is_harmless(k, shapes.get(k))]
    other_heads = [k for k in leftover if is_other_head(k)]
    elsewhere = f"{OWN}.weight" if head is not None and head.weight != f"{OWN}.weight" else ""
    if problem := misfit(fit, it.named, [k for k in leftover if k not in other_heads], head=elsewhere):
        raise UserError(problem)
    if unused := [k for k in other_heads if not k.startswith(("lm_head.", "embed_out."))]:
        notes.append(f"{it.named}: {some(unused)} belong to another task's head, which no score needs")
    if labels != 1:
        notes.append(f"{it.named}: its config.json tells of {labels} labels, its head has one, which is the score")
    _note_head(it, head, notes)
    _note_what_is_left(it, fit, notes, harmless_files=False, used=used)
    options: dict[str, Any] = {"num_labels": 1} if labels != 1 else {}
    if mapping:
        options["key_mapping"] = mapping
    return Loading(it.stored, None if head is None or head.is_plain else head, options, is_compared=True)


def _check_head(it: _Folder, fit: Fit, head: ScoreHead | None, *, has_score: bool) -> None:
    """Refuse a folder without a head, or with one of several logits."""
    stored_labels = [stored[0] for key, stored, wanted in fit.differing if wanted and wanted[0] == 1 and _is_head(key)]
    if has_score and head is not None:
        stored_labels = [head.num_labels] if head.num_labels != 1 else []
    if stored_labels:
        names: Any = it.values.get("id2label")
        shown = f" ({', '.join(map(str, names.values()))[:80]})" if isinstance(names, dict) else ""
        raise UserError(
            f"{it.named} has {stored_labels[0]} logits{shown}: it is {it.kind}, and a reward model has one; give one "
            "that was trained with one label, which num_labels in its config.json alone does not make"
        )
    missing_head = (has_score and head is None) or (not has_score and any(map(_is_head, fit.missing)))
    if missing_head:
        what = f"{OWN}.weight" if has_score else some(fit.missing)
        raise UserError(
            f"{it.named} is {it.kind} without a score head (no {what} among its weights), and no reward model; train "
            "one from it first (AutoModelForSequenceClassification with one label), and give its folder"
        )
    if not has_score and it.values.get("normalize_reward"):
        raise UserError(
            f"{it.named} asks for normalize_reward in its config.json, known of linear heads named {OWN} alone; "
            f"{fit.architecture} has another: take normalize_reward, mean and std out if they are not meant"
        )


def _note_head(it: _Folder, head: ScoreHead | None, notes: list[str]) -> None:
    if head is None:
        return
    if head.is_normalized:
        notes.append(
            f"{it.named}: the score is (logit - {head.mean:g}) / {head.std:g}, as normalize_reward, mean and std of "
            "its config.json say (OpenRLHF)"
        )
    elif {"mean", "std"} & it.values.keys():
        notes.append(f"{it.named}: mean and std of its config.json are not applied, as normalize_reward is not true")
    if head.weight != f"{OWN}.weight" or head.bias is not None:
        head_of = head.weight if head.bias is None else f"{head.weight} and {head.bias}"
        file = it.stored.file_of(head.weight).name
        notes.append(f"{it.named} is {it.kind}: its score head is {head_of} of {file}, read at the last token")


def _note_what_is_left(
    it: _Folder, fit: Fit, notes: list[str], *, harmless_files: bool, used: set[str] | None = None
) -> None:
    shapes = it.stored.shapes
    if ignored := [k for k in fit.ignored if not is_harmless(k, shapes.get(k)) and not is_other_head(k)]:
        notes.append(f"{it.named}: {fit.architecture} does not use {len(ignored)} of its weights: {some(ignored)}")
    unread = [
        file
        for file, tensors in it.stored.unread.items()
        if not (used or set[str]()) & tensors.keys() and not (harmless_files and all(map(VALUE_HEADS.match, tensors)))
    ]
    if unread:
        read = "the shards of its index" if SINGLE in unread or not (it.path / SINGLE).is_file() else SINGLE
        verb = "is" if len(unread) == 1 else "are"
        notes.append(f"{it.named}: {some(unread)} {verb} not read; transformers takes the weights from {read}")


def _check_class(it: _Folder, config: Any, auto_class: str, remedy: str) -> None:
    """Refuse an architecture that transformers does not open in this role."""
    import transformers

    if type(config) not in getattr(transformers, auto_class)._model_mapping:
        raise UserError(
            f"{it.named} is {it.kind} of type {config.model_type!r}, which transformers does not open as "
            f"{auto_class}; {remedy}"
        )


def _check_no_adapter(stored: StoredWeights, named: str) -> None:
    for file, tensors in (("its weights", stored.shapes), *stored.unread.items()):
        if lora := [key for key in tensors if ".lora_" in key or key.startswith("lora_")]:
            raise UserError(
                f"{named} stores LoRA weights in {file} ({some(lora)}), which a whole model does not read; merge them "
                "into the model, or move them with their adapter_config.json into a folder of their own"
            )


def _key_mapping(stored: StoredWeights, config: Any) -> dict[str, str]:
    import transformers

    mapping: dict[str, str] = {}
    for prefix, instead in _PREFIXES.items():
        if any(key.startswith(prefix) for key in stored.shapes):
            class_ = getattr(transformers, CLASSIFIER)._model_mapping[type(config)]
            mapping[f"^{prefix[:-1]}\\."] = f"{class_.base_model_prefix}." if instead == "base" else ""
    return mapping


def _is_head(key: str) -> bool:
    return key.startswith((OWN, "classifier", "classification_head", "logits_proj", "pre_classifier"))
