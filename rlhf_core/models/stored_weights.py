"""Weights as a folder stores them, compared with what an architecture takes: by headers alone, no weight is read.

transformers renames, fuses and splits tensors while it loads them (experts of a mixture, old names). So its own loader
makes the comparison, on tensors of the meta device, which have shapes and no memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.quiet import quiet_transformers
from rlhf_core.models.sizes import empty_model
from rlhf_core.models.untrusted import read_header, read_small_json, whole_numbers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 3
Shape = tuple[int, ...]

_BUFFERS: Final = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached|long_inv_freq|original_inv_freq)|position_ids|token_type_ids)$"
)
"""Buffers that older versions of transformers saved, and newer ones compute."""
_MASKS: Final = re.compile(r"(^|\.)(attn|attention|self_attention|attn\.attention)\.(masked_)?bias$")
"""Causal masks, where they have four dimensions or none; anything else of that name is a bias."""
VALUE_HEADS: Final = re.compile(r"^(v_head|value_head)\.")
"""Value heads of TRL, LLaMA-Factory and DeepSpeed-Chat beside a language model."""
_OTHER_HEADS: Final = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|cls|mlm_head|lm_predictions|mask_predictions|generator_predictions|"
    r"generator_lm_head|discriminator_predictions|qa_outputs|pooler|vocab_(transform|layer_norm|projector))\."
)
"""Heads of other tasks: none of them decides a score."""


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a model folder, by the headers of its safetensors files."""

    folder: Path
    shapes: Mapping[str, Shape]
    """Of the files that transformers reads."""
    unread: Mapping[str, Mapping[str, Shape]]
    """File -> its tensors, of the files that transformers leaves alone."""

    @classmethod
    def of(cls, folder: Path, named: str) -> StoredWeights:
        """Read the headers.

        Args:
            folder: of a model.
            named: field and value, for errors.
        Raises: UserError if a file is missing or broken.
        """
        names = _files_read(folder, named)
        shapes: dict[str, Shape] = {}
        for name in names:
            header = read_header(folder / name, named)
            if twice := sorted(header.keys() & shapes.keys()):
                raise UserError(f"{named} holds {twice[0]} in two of its shards; take an intact copy of the model")
            shapes |= header
            for key, kind in whole_numbers(folder / name).items():
                if not is_harmless(key, header[key]):
                    raise UserError(
                        f"{named} stores {key} as whole numbers ({kind}), which would be read as a weight each; take "
                        "the weights from where the model was saved"
                    )
        others = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in names)
        return cls(folder, shapes, {name: read_header(folder / name, named) for name in others})

    @property
    def everywhere(self) -> dict[str, Shape]:
        """All tensors of the folder, those of unread files included."""
        return {key: shape for part in (*self.unread.values(), self.shapes) for key, shape in part.items()}

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        for name, tensors in self.unread.items():
            if key in tensors and key not in self.shapes:
                return self.folder / name
        files = [self.folder / name for name in _files_read(self.folder, repr(str(self.folder)))]
        return next(file for file in files if key in read_header(file, str(file)))


@dataclass(frozen=True)
class Fit:
    """How stored weights fit a class of transformers."""

    architecture: str
    wanted: frozenset[str]
    """Weights and buffers of the class."""
    missing: Sequence[str]
    """Weights of the class that no file holds."""
    unexpected: Sequence[str]
    """Weights of the files that the class has no place for."""
    ignored: Sequence[str]
    """Those among them that transformers drops by a list of its own."""
    differing: Sequence[tuple[str, Shape, Shape]]
    """Name, shape in the file, shape in the class."""


def compare(
    model_config: Any, auto_class: str, shapes: Mapping[str, Shape], key_mapping: dict[str, str] | None = None
) -> Fit | None:
    """Let transformers load tensors without memory, and report what did not fit.

    Args:
        model_config: of the folder.
        auto_class: of transformers, that the folder is loaded with.
        shapes: stored tensors.
        key_mapping: pattern -> replacement, as ``from_pretrained`` takes it.
    Returns: the fit, or None where transformers converts weights in a way that shapes alone do not tell.
    Raises: UserError if the architecture has no such class.
    """
    quiet_transformers()
    model = empty_model(copy.deepcopy(model_config), auto_class)
    dropped: list[str] = []

    def adjust(self: Any, info: Any) -> None:
        before = set(info.unexpected_keys)
        type(model)._adjust_missing_and_unexpected_keys(self, info)
        dropped.extend(sorted(before - set(info.unexpected_keys)))

    # a subclass of the same name: transformers looks conversions up by it
    recording = type(type(model).__name__, (type(model),), {"_adjust_missing_and_unexpected_keys": adjust})
    recording.__module__ = type(model).__module__
    try:
        with torch.random.fork_rng(devices=[]):
            _, info = cast("Any", recording).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict={key: torch.empty(shape, device="meta") for key, shape in shapes.items()},
                device_map={"": "meta"},
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                key_mapping=key_mapping,
            )
    except Exception:  # a conversion that needs the numbers: the load itself will say
        return None
    differing = sorted((key, tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"])
    named = {key for key, *_ in differing}
    return Fit(
        type(model).__name__,
        frozenset(model.state_dict()),
        sorted(set(info["missing_keys"]) - named),
        sorted(info["unexpected_keys"]),
        dropped,
        differing,
    )


def is_harmless(key: str, shape: Shape | None) -> bool:
    """Whether a tensor of a file is a buffer that the architecture computes by itself."""
    return bool(_BUFFERS.search(key) or (_MASKS.search(key) and (shape is None or len(shape) in (0, 4))))


def is_other_head(key: str) -> bool:
    """Whether a tensor belongs to a head of another task, which decides no score."""
    return _OTHER_HEADS.search(key) is not None


def misfit(fit: Fit, named: str, leftover: Sequence[str], *, head: str = "") -> str | None:
    """One sentence on weights that do not fit, or None.

    Args:
        fit: of the stored weights.
        named: field and value.
        leftover: the unexpected weights that matter.
        head: the weight that another part of the folder gives.
    """
    remedy = "take config.json and weights from where the model was saved"
    if fit.differing:
        key, stored, wanted = fit.differing[0]
        more = f" (and {len(fit.differing) - 1} others)" if len(fit.differing) > 1 else ""
        return (
            f"{named} stores {key} as {_size(stored)}{more}, while its config.json describes {fit.architecture} with "
            f"{_size(wanted)} there; {remedy}"
        )
    if missing := [key for key in fit.missing if key != head]:
        return f"{named} lacks {len(missing)} weights that {fit.architecture} needs: {some(missing)}; {remedy}"
    if leftover:
        return (
            f"{named} stores {len(leftover)} weights that {fit.architecture}, as its config.json describes it, has no "
            f"place for: {some(leftover)}; they would be dropped in silence: {remedy}"
        )
    return None


def some(keys: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(keys[:SHOWN]) + (" …" if len(keys) > SHOWN else "")


def _files_read(folder: Path, named: str) -> list[str]:
    """The files that ``from_pretrained`` reads. Raises UserError if they are not all there."""
    single, index = folder / SINGLE, folder / INDEX
    shards: list[str] = []
    if index.is_file():
        shards = sorted(set(map(str, cast("dict[str, object]", read_small_json(index, named)["weight_map"]).values())))
    missing = [name for name in shards if not (folder / name).is_file()]
    if single.is_file():  # comes first for transformers, whatever an index beside it says
        return [SINGLE]
    if missing:
        raise UserError(
            f"{named} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names ({some(missing)}): the copy "
            "or download is not complete; fetch it again"
        )
    if not shards:
        there = some(sorted(p.name for p in folder.glob("*.safetensors")))
        raise UserError(
            f"{named} holds {there}, but neither {SINGLE} nor {INDEX}, which transformers reads; save the model with "
            "save_pretrained"
        )
    return shards


def _size(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"
