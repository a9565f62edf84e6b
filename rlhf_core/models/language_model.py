"""A causal language model as trunk and projection, so that logits are computed only where they are needed."""

from __future__ import annotations

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
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.prefixes import CachedPrefix, Prefix
from rlhf_core.models.sequences import Sequences
from rlhf_core.models.trunk import Trunk
from rlhf_core.models.untrusted import check_is_data, check_size
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
        self.trunk = cast("nn.Module", model.base_model)
        self._reads = Trunk(self.trunk, dtype=dtype, answering=None if adapters is None else self._answering)
        self.hidden_size = int(self.config.get_text_config().hidden_size)

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
        return LanguageModel(
            self.model, dtype=self.dtype, device=self.device, adapters=self.adapters, answers_as=answers_as
        )

    @property
    def num_tokens(self) -> int:
        """Rows of the output projection: V, padding of the vocabulary included."""
        return int(self.projection().weight_VD.shape[0])

    def projection(self) -> Projection:
        """The output head, with the architecture's own scaling of logits."""
        head = cast("nn.Linear", cast("Any", self.model).get_output_embeddings())
        config = self.config.get_text_config()
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        softcap = None if softcap is None else float(softcap)
        return Projection(head.weight, head.bias, factor / divisor, softcap, dtype=self.dtype)

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
        longest = max(map(len, prompts)) + max_new_tokens
        if (passes := self._reads.written_out) is not None and passes.takes(longest):
            return GPT2Prefix(passes, prompts, samples_per_prompt, max_new_tokens)
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

    def checked(self, name: str, field: str) -> LanguageModel:
        """Itself, if trunk and projection together give the model's own logits on a few tokens.

        Raises: UserError if they do not.
        """
        tokens = torch.arange(4, device=self.device)[None, :] % self.num_tokens
        with torch.no_grad(), computing_in(self.dtype, self.device):
            own = cast("Tensor", self.model(input_ids=tokens, use_cache=False).logits).float()
            ours = self.projection().logits(self.hidden_states(PackedRows.of(tokens.tolist(), self.device)), 1.0)
        scale = max(1.0, float(own.abs().max()))
        tolerance = PROBE_TOLERANCE if self.dtype is torch.float32 else 0.05
        if own[0].shape != ours.shape or float((own[0] - ours).abs().max()) > tolerance * scale:
            kind = self.config.model_type
            raise UserError(
                f"{field} {name!r} is of architecture {kind!r}, whose logits are not a projection of its trunk's "
                "output, or have a scaling this release does not know; choose another architecture"
            )
        return self


def load_transformers_model(auto_class: str, name: str, dtype: torch.dtype, field: str, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: safetensors only, no remote code, one-sentence errors.

    Raises:
        UserError: naming ``field``, if the model does not load or its weights do not fit it.
    """
    import transformers

    folder = folder_of(name, field, with_weights=True)
    check_is_data(name, field, folder)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # it advises attention masks where right padding needs none
    try:
        check_size(auto_class, name, field)
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} does not load as {auto_class}: {reason}") from None
    if (broken := first_not_finite(cast("nn.Module", model).named_parameters())) is not None:
        raise UserError(
            f"{field} {name!r} holds a weight that is NaN or infinite ({broken}); take an intact copy of it"
        )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(f"{field} {name!r} lacks {len(missing)} weights that {auto_class} needs: {shown}")
    model.config.name_or_path = name
    fuse_activations(model)
    return model
