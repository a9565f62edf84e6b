"""A causal language model as trunk and projection, so that logits are computed only where they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.activations import fuse_activations
from rlhf_core.models.adapters import TRAINED, Adapters, attach, base_at_hand, is_adapter
from rlhf_core.models.devices import computing_in
from rlhf_core.models.gpt2 import GPT2Prefix
from rlhf_core.models.hub import folder_of
from rlhf_core.models.llama import LlamaPrefix
from rlhf_core.models.model_folders import check_model_folder, check_nothing_left
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.prefixes import CachedPrefix, Prefix
from rlhf_core.models.quiet import quiet_transformers
from rlhf_core.models.sequences import Sequences
from rlhf_core.models.soundness import (
    ROW_TOLERANCE,
    SHORT_ROWS,
    STEPS,
    causal_distance,
    decoding_distance,
    plain_tokens,
    row_distance,
    rows_of,
)
from rlhf_core.models.stored_weights import some
from rlhf_core.models.trunk import Trunk, trunk_of
from rlhf_core.models.untrusted import check_is_data, check_size
from rlhf_core.models.vocabulary import DrawableTokens
from rlhf_core.ops.finite import first_not_finite
from rlhf_core.ops.logprobs import Projection, token_logprobs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_TOLERANCE = 1e-3


class LanguageModel:
    """An ``AutoModelForCausalLM`` whose trunk and output projection are used apart.

    Knows nothing of rewards, PPO or files. Dropout is always off.

    Args:
        model: the transformers model.
        dtype: of the computation; a trained model keeps float32 weights and computes under autocast.
        device: where it lives.
        adapters: LoRA adapters in the model's layers.
        answers_as: which of them this language model is; None: the base without any.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Adapters | None = None,
        answers_as: str | None = TRAINED,
    ) -> None:
        self.model = cast("nn.Module", model.to(device).eval())
        self.adapters, self.answers_as = adapters, answers_as
        self.config: Any = model.config
        self.dtype, self.device = dtype, device
        self.trunk = trunk_of(model)
        answering, adapter = (None, None) if adapters is None else (self._answering, answers_as)
        self._reads = Trunk(self.trunk, dtype=dtype, answering=answering, adapter=adapter)
        self._drawable: DrawableTokens | None = None

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, trainable: bool, field: str = "policy.model"
    ) -> LanguageModel:
        """Load from a folder or hub id.

        Args:
            name: folder or hub id; safetensors only, no remote code. A folder with a LoRA adapter alone, such as a
                checkpoint's, is loaded with its base, frozen.
            dtype: float32 or bfloat16, of the computation.
            device: where it lives.
            trainable: float32 master weights with gradients; otherwise weights in ``dtype``, frozen.
            field: named in errors.
        Raises:
            UserError: it does not load, or its logits are not a projection of its trunk's output.
        """
        if is_adapter(name):
            if trainable:
                raise UserError(f"{field} {name!r} is a LoRA adapter; name its base there and this as policy.adapter")
            return cls.adapted(base_at_hand(name, field), name, dtype=dtype, device=device, field=field)
        stored = torch.float32 if trainable else DTYPES[dtype]
        model = load_transformers_model("AutoModelForCausalLM", name, stored, field)
        model.requires_grad_(trainable)
        return cls(model, dtype=DTYPES[dtype], device=device).checked(name, field)

    @classmethod
    def adapted(cls, base: str, adapter: str, *, dtype: str, device: torch.device, field: str) -> LanguageModel:
        """A frozen base with a frozen adapter. Raises UserError if either does not load, or they do not fit."""
        model = load_transformers_model("AutoModelForCausalLM", base, DTYPES[dtype], field)
        adapters = attach(model, base, {TRAINED: (adapter, field)})
        model.requires_grad_(False)
        return cls(model, dtype=DTYPES[dtype], device=device, adapters=adapters).checked(base, field)

    def view(self, answers_as: str | None) -> LanguageModel:
        """The same weights in memory, answering with another of their adapters."""
        assert self.adapters is not None, "only a model with adapters has views"
        view = LanguageModel(
            self.model, dtype=self.dtype, device=self.device, adapters=self.adapters, answers_as=answers_as
        )
        view._drawable = self._drawable
        return view

    def drawing_only(self, tokens: DrawableTokens) -> LanguageModel:
        """Itself, giving every other id the probability 0. A model whose rows are those tokens computes as before.

        Raises: ValueError if a token has no row.
        """
        rows = int(self.projection().weight_VD.shape[0])
        if tokens.num_tokens > rows:
            raise ValueError(f"{tokens.num_tokens} tokens for an output projection of {rows} rows")
        self._drawable = None if tokens == DrawableTokens(rows) else tokens
        return self

    @property
    def hidden_size(self) -> int:
        """D, the width that the trunk gives and the projection takes; configs may tell another one."""
        return int(self.projection().weight_VD.shape[1])

    @property
    def num_tokens(self) -> int:
        """V: one more than the largest id that can be drawn."""
        projection = self.projection()
        return projection.num_tokens or int(projection.weight_VD.shape[0])

    @property
    def drawable(self) -> DrawableTokens | None:
        """The ids that can be drawn; None where every row is a token."""
        return self._drawable

    def projection(self) -> Projection:
        """The output head, with the architecture's own scaling of logits."""
        head = cast("nn.Linear", cast("Any", self.model).get_output_embeddings())
        config = self.config.get_text_config()
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        softcap = None if softcap is None else float(softcap)
        projection = Projection(head.weight, head.bias, factor / divisor, softcap, dtype=self.dtype)
        if self._drawable is None:
            return projection
        holes = self._drawable.holes
        holes_H = torch.tensor(holes, device=head.weight.device) if holes else None
        return dataclasses.replace(projection, num_tokens=self._drawable.num_tokens, holes_H=holes_H)

    def leave_to_transformers(self) -> None:
        """Compute with whatever parameters the modules have at each call."""
        self._reads.leave_to_transformers()

    def embedding_ids(self) -> set[int]:
        """``id`` of the parameters that stand for single tokens: input embeddings and output head, often tied."""
        model = cast("Any", self.model)
        modules: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
        return {id(parameter) for module in modules for parameter in module.parameters()}

    def hidden_states(self, rows: PackedRows, wanted_N: Tensor | None = None) -> Tensor:
        """[T, D]: the trunk's output for rows of any lengths, or [N, D] at the tokens asked for."""
        return self._reads(rows, wanted_N)

    def prefix(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int, *, pad_id: int
    ) -> Prefix:
        """Prompts, read, k times each, and ready to go on."""
        if (written_out := self._written_out_prefix(prompts, samples_per_prompt, max_new_tokens)) is not None:
            return written_out
        begun = CachedPrefix(self._reads.run, self.config, self.device, prompts, samples_per_prompt, pad_id=pad_id)
        if self.device.type != "cuda":
            return begun
        from rlhf_core.models.graphed_prefix import GraphedPrefix

        suits = GraphedPrefix.suits(self._reads, begun)
        return GraphedPrefix(self._reads, begun, max_new_tokens, captures=True) if suits else begun

    def _answering(self) -> AbstractContextManager[Any]:
        assert self.adapters is not None, "only a model with adapters answers as one of them"
        return self.adapters.answering_as(self.answers_as)

    def response_logprobs(self, sequences: Sequences, hidden_ND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropies_N) of the real response tokens, from the trunk's output before each of them."""
        return token_logprobs(
            hidden_ND,
            self.projection(),
            sequences.response_tokens_BR[sequences.response_mask_BR],
            temperature=temperature,
            support_NV=sequences.support_mask(self.num_tokens),
        )

    @torch.no_grad()
    def checked(self, name: str, field: str) -> LanguageModel:
        """Itself, if trunk and projection give the model's own logits, and rows beside each other do not mix.

        Raises: UserError if they do not.
        """
        tokens = torch.arange(4, device=self.device)[None, :] % int(self.config.get_text_config().vocab_size)
        row, other = rows_of(plain_tokens(self.config, 64), SHORT_ROWS)
        try:
            with computing_in(self.dtype, self.device):
                own = cast("Tensor", self.model(input_ids=tokens, use_cache=False).logits).float()
            ours = self.projection().logits(self.hidden_states(PackedRows.of(tokens.tolist(), self.device)), 1.0)
            is_causal = self._is_close(causal_distance(self.alone, row))
            rows_agree = self._is_close(row_distance(self.hidden_states, self.alone, [row, other]))
        except Exception as error:  # whatever an architecture says of inputs that every causal language model takes
            reason = " ".join(str(error).split())[:200]
            raise self._refused(name, field, f"which does not run as trunk and projection ({reason})") from None
        scale = max(1.0, float(own.abs().max()))
        tolerance = PROBE_TOLERANCE if self.dtype is torch.float32 else 0.05
        if own[0].shape != ours.shape or float((own[0] - ours).abs().max()) > tolerance * scale:
            problem = (
                "whose logits are not a projection of its trunk's output, or have a scaling this release does not know"
            )
            raise self._refused(name, field, problem)
        if not is_causal:
            raise self._refused(name, field, "which does not read from left to right")
        if not rows_agree:
            raise self._refused(name, field, "where a row's result depends on the rows beside it")
        return self

    @torch.no_grad()
    def checked_decoding(self, name: str, field: str) -> LanguageModel:
        """Itself, if two prompts of different lengths go on from its cache as one pass over the whole texts says.

        Raises: UserError if they do not.
        """
        rows = rows_of(plain_tokens(self.config, 64), SHORT_ROWS)
        try:
            decodes = self._is_close(decoding_distance(self._prefix_of_own_cache, self.alone, rows, STEPS))
        except Exception:  # it has no such cache, or does not take it with padding on the left
            decodes = False
        if not decodes:
            problem = (
                "whose decoding from a cache, with prompts padded on the left, does not give what one pass over the "
                "whole text gives (as with state-space and recurrent models)"
            )
            raise self._refused(name, field, problem)
        return self

    def alone(self, row: list[int]) -> Tensor:
        """[L, D]: the trunk's output for one row by transformers, without padding or cache."""
        return self._reads.run(input_ids=torch.tensor([row], device=self.device), use_cache=False)[0]

    def _prefix_of_own_cache(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """As :meth:`prefix`, without capturing graphs."""
        written_out = self._written_out_prefix(prompts, 2, STEPS + 1)
        return written_out or CachedPrefix(self._reads.run, self.config, self.device, prompts, 2, pad_id=0)

    def _written_out_prefix(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int
    ) -> Prefix | None:
        """The prompts, read by passes of our own; None where there are none for this model and these lengths."""
        longest = max(map(len, prompts)) + max_new_tokens
        if (passes := self._reads.written_out) is not None and passes.takes(longest):
            return GPT2Prefix(passes, prompts, samples_per_prompt, max_new_tokens)
        if (reading := self._reads.reading) is not None and reading.takes(longest):
            return LlamaPrefix(reading, prompts, samples_per_prompt, max_new_tokens)
        return None

    def _is_close(self, distance: float) -> bool:
        is_coarse = any(p.dtype is not torch.float32 for p in self.trunk.parameters())
        return distance <= ROW_TOLERANCE[torch.bfloat16 if is_coarse else self.dtype]

    def _refused(self, name: str, field: str, problem: str) -> UserError:
        kind = self.config.model_type
        return UserError(f"{field} {name!r} is of architecture {kind!r}, {problem}; choose another architecture")


def load_transformers_model(auto_class: str, name: str, dtype: torch.dtype, field: str, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: safetensors only, no remote code, one-sentence errors.

    Raises:
        UserError: naming ``field``, if the model does not load or its weights do not fit it.
    """
    import transformers

    folder = folder_of(name, field, with_weights=True)
    check_is_data(name, field, folder)
    quiet_transformers()
    try:
        check_size(auto_class, name, field)
        loading = check_model_folder(auto_class, name, field, folder=folder)
        with torch.random.fork_rng(devices=[]):  # a head that the files name otherwise is drawn, and replaced
            model, info = getattr(transformers, auto_class).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **{**(loading.options or {}), **options},
            )
        missing = set(info["missing_keys"])
        if loading.head is not None and loading.stored is not None:
            loading.head.install(model, loading.stored)
            missing -= {"score.weight"}
        if not loading.is_compared:
            check_nothing_left(auto_class, info["unexpected_keys"], f"{field} {name!r}")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} does not load as {auto_class}: {reason}") from None
    if (broken := first_not_finite(cast("nn.Module", model).named_parameters())) is not None:
        raise UserError(
            f"{field} {name!r} holds a weight that is NaN or infinite ({broken}); take an intact copy of it"
        )
    if missing:
        raise UserError(
            f"{field} {name!r} lacks {len(missing)} weights that {auto_class} needs: {some(sorted(missing))}"
        )
    model.config.name_or_path = name
    fuse_activations(model)
    return model
