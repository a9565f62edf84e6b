"""Floating-point operations that an iteration needs: of real tokens only, a multiplication and an addition each.

Of one pass of a model over a sequence, with P parameters in the linear layers of its trunk (embeddings and output head
apart), L layers and A = heads x head size, the width of attention (D in most models):

    linear layers     2 · P · tokens
    attention         4 · A · L · Σ context      of each token read, itself included: scores and their weighted sum
    output head       2 · D · V · positions      where logits are needed: of response tokens only
    value, score      2 · D · positions
    backward          2 x forward                so that a training pass is 3 x forward

A sequence of p prompt and r response tokens is read up to the last token but one, p + r - 1: what follows the last one
is not asked for. Only the reward model reads all p + r.

    generate              policy over p + r - 1 (a prompt once for its k samples), head on r; critic over p + r - 1
    score_rewards         reward model over p + r, one score
    reference_logprobs    reference over p + r - 1, head on r
    ppo_update            epochs x 3 x (policy over p + r - 1, head on r; critic over p + r - 1, values on r)

A critic on the policy's trunk has its values only. Softmax, norms, activations, the optimizer: not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.untrusted import transformers_config, without_weights


@dataclass(frozen=True)
class Shape:
    """Of a transformer, as far as it decides the count.

    Example: GPT-2 with D = 4, 1 layer and V = 10 has ``linear_parameters`` 4·12 + 4·4 + 4·16 + 16·4 = 192.
    """

    linear_parameters: int
    layers: int
    attention_width: int
    hidden_size: int
    vocabulary: int = 0
    """Rows of the output head; 0 without one."""
    heads: int = 1
    kv_width: int = 0
    """Keys and values that a layer caches of a token: 2 x key-value heads x head size."""
    mlp_width: int = 0
    """Hidden units of a layer's feed-forward part."""
    is_gated: bool = False
    """Whether that part has a gate (SwiGLU, GeGLU)."""
    linear_edges: int = 0
    """Inputs + outputs of the trunk's linear layers: a LoRA adapter of rank r has r times as many parameters."""

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a transformers model; its weights are not read, so that it may be on the meta device.

        Raises: UserError for a mixture of experts, of which a token passes only some.
        """
        from transformers.pytorch_utils import Conv1D

        config, trunk = model.config.get_text_config(), model.base_model
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise UserError(f"model type {config.model_type!r} is a mixture of experts, whose cost is not modelled")
        linear = [module for module in trunk.modules() if isinstance(module, nn.Linear | Conv1D)]
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        head_size = int(getattr(config, "head_dim", None) or hidden // heads)
        mlp_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return cls(
            linear_parameters=sum(module.weight.numel() for module in linear),
            layers=int(config.num_hidden_layers),
            attention_width=heads * head_size,
            hidden_size=hidden,
            vocabulary=0 if output is None else int(output.weight.shape[0]),
            heads=heads,
            kv_width=2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            mlp_width=int(mlp_width),
            is_gated=any("gate" in name.rpartition(".")[2] for name, _ in trunk.named_modules()),
            linear_edges=sum(sum(module.weight.shape) for module in linear),
        )

    @classmethod
    def in_folder(cls, folder: Path, auto_class: str) -> Shape:
        """Of a model on disk; no weights are loaded. ``auto_class``: AutoModelForCausalLM, AutoModel, say."""
        return cls.of(without_weights(transformers_config(folder), auto_class, str(folder)))

    def trunk(self, read: int, before: int = 0) -> int:
        """Forward over ``read`` tokens of one sequence, with ``before`` tokens in the cache."""
        contexts = read * before + read * (read + 1) // 2
        return 2 * self.linear_parameters * read + 4 * self.attention_width * self.layers * contexts

    def logits(self, positions: int) -> int:
        """Of the output head."""
        return 2 * self.hidden_size * self.vocabulary * positions

    def scalars(self, positions: int) -> int:
        """Of a value or score head."""
        return 2 * self.hidden_size * positions


@dataclass(frozen=True)
class Models:
    """Of a run."""

    policy: Shape
    reward: Shape
    critic: Shape | None
    """None: a head on the policy's trunk."""


def stage_operations(
    models: Models, prompts: Mapping[int, int], responses: Sequence[tuple[int, int]], *, epochs: int
) -> dict[str, int]:
    """Operations of each stage of one iteration.

    Args:
        models: of the run.
        prompts: prompt id -> tokens.
        responses: (prompt id, tokens) of each response.
        epochs: of the update.
    """
    policy, reward = models.policy, models.reward
    decoding = sum(policy.trunk(p) for p in prompts.values())
    scored = taught = head = values = 0
    for prompt, r in responses:
        p = prompts[prompt]
        decoding += policy.trunk(r - 1, before=p)
        scored += reward.trunk(p + r) + reward.scalars(1)
        taught += policy.trunk(p + r - 1)
        head += policy.logits(r)
        values += (
            policy.scalars(r) if models.critic is None else models.critic.trunk(p + r - 1) + models.critic.scalars(r)
        )
    return {
        "sample_prompts": 0,
        "generate": decoding + head + values,
        "score_rewards": scored,
        "reference_logprobs": taught + head,
        "shape_rewards": 0,
        "ppo_update": epochs * 3 * (taught + head + values),
    }
