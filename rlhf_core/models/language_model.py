"""A causal language model as trunk and projection, so that logits are computed only where they are needed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.devices import computing_in
from rlhf_core.models.sequences import Sequences
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
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        self.model = cast("nn.Module", model.to(device).eval())
        self.config: Any = model.config
        self.dtype, self.device = dtype, device
        self.trunk = cast("nn.Module", model.base_model)
        self.hidden_size = int(self.config.get_text_config().hidden_size)

    @classmethod
    def load(
        cls, name: str, *, dtype: str, device: torch.device, trainable: bool, field: str = "policy.model"
    ) -> LanguageModel:
        """Load from a folder or hub id.

        Args:
            name: folder or hub id; safetensors only, no remote code.
            dtype: float32 or bfloat16, of the computation.
            device: where it lives.
            trainable: float32 master weights with gradients; otherwise weights in ``dtype``, frozen.
            field: named in errors.
        Raises:
            UserError: it does not load, or its logits are not a projection of its trunk's output.
        """
        stored = torch.float32 if trainable else DTYPES[dtype]
        model = load_transformers_model("AutoModelForCausalLM", name, stored, field)
        model.requires_grad_(trainable)
        loaded = cls(model, dtype=DTYPES[dtype], device=device)
        loaded._check_projection(name, field)
        return loaded

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
        return Projection(head.weight, head.bias, factor / divisor, None if softcap is None else float(softcap))

    def hidden_states(self, tokens_BL: Tensor) -> Tensor:
        """[B, L, D]: the trunk's output for right-padded rows. Real tokens never see the padding."""
        with computing_in(self.dtype, self.device):
            return cast("Tensor", self.trunk(input_ids=tokens_BL, use_cache=False).last_hidden_state)

    def response_logprobs(self, sequences: Sequences, hidden_BLD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropies_N) of the real response tokens, from the trunk's output."""
        return token_logprobs(
            sequences.before_response(hidden_BLD),
            self.projection(),
            sequences.response_tokens_BR[sequences.response_mask_BR],
            temperature=temperature,
            support_NV=sequences.support_mask(self.num_tokens),
        )

    def _check_projection(self, name: str, field: str) -> None:
        """Compare our split of trunk and projection with the model's own logits on a few tokens."""
        tokens = torch.arange(4, device=self.device)[None, :] % self.num_tokens
        with torch.no_grad(), computing_in(self.dtype, self.device):
            own = cast("Tensor", self.model(input_ids=tokens, use_cache=False).logits).float()
            ours = self.projection().logits(self.hidden_states(tokens)[0], 1.0)
        scale = max(1.0, float(own.abs().max()))
        tolerance = PROBE_TOLERANCE if self.dtype is torch.float32 else 0.05
        if own[0].shape != ours.shape or float((own[0] - ours).abs().max()) > tolerance * scale:
            kind = self.config.model_type
            raise UserError(
                f"{field} {name!r} is of architecture {kind!r}, whose logits are not a projection of its trunk's "
                "output, or have a scaling this release does not know; choose another architecture"
            )


def load_transformers_model(auto_class: str, name: str, dtype: torch.dtype, field: str, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained``: safetensors only, no remote code, one-sentence errors.

    Raises:
        UserError: naming ``field``, if the model does not load or its weights do not fit it.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # it advises attention masks where right padding needs none
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} does not load as {auto_class}: {reason}") from None
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(f"{field} {name!r} lacks {len(missing)} weights that {auto_class} needs: {shown}")
    return model
