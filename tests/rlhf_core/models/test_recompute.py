"""Gradient checkpointing: the same gradients, activations computed again, dropout off all the while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import decoders, save_random
from iteration import CPU, Bench
from torch import nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.checkpoints import load_checkpoint, new_trainer, save_checkpoint
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.recompute import recompute_activations
from rlhf_core.models.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("through_transformers")
Configure = Callable[..., RunConfig]
TOKENS = torch.tensor([[40, 41, 42, 43, 44]])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    hidden_BLD = model.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state
    (hidden_BLD * torch.arange(hidden_BLD.shape[-1])).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_calls(module: nn.Module) -> list[int]:
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    module.register_forward_hook(count)
    return calls


def some_norm(trunk: nn.Module) -> nn.Module:
    """A module inside the first layer."""
    return next(m for name, m in trunk.named_modules() if ".0." in name and "norm" in type(m).__name__.lower())


@pytest.mark.parametrize("family", decoders(300))
def test_gradients_have_the_same_bits_and_activations_are_computed_again(
    family: str, tiny: Any, tmp_path: Path
) -> None:
    """GPT-2 and GPT-NeoX ask for dropout of 0.3: were it on, no two gradients would agree."""
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    folder = save_random(decoders(len(tokenizer))[family], "AutoModelForCausalLM", tmp_path, tokenizer)
    model = LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=True)
    plain = gradients(model.model)
    assert len(plain) > 10
    recompute_activations(model.trunk, field="policy.model")
    calls = count_calls(some_norm(model.trunk))
    recomputed = gradients(model.model)
    assert calls == [2], "once forward, once again backward"
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert not any(module.training for module in model.model.modules())


def test_nothing_is_recomputed_without_gradient(tiny: Any) -> None:
    model = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=True)
    recompute_activations(model.trunk, field="policy.model")
    calls = count_calls(some_norm(model.trunk))
    with torch.no_grad():
        model.hidden_states(PackedRows.of(TOKENS.tolist()))
    assert calls == [1]


def test_less_is_kept_for_the_backward_pass(tiny: Any) -> None:
    """Bytes that autograd holds after the forward pass."""

    def kept_bytes(model: LanguageModel) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden_states(PackedRows.of(TOKENS.tolist()))
        return sum(sizes.values())

    model = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=True)
    whole = kept_bytes(model)
    recompute_activations(model.trunk, field="policy.model")
    assert kept_bytes(model) < whole / 4


@pytest.mark.parametrize("overrides", [[], ["policy.lora.rank=4"], ["policy.critic.kind=shared"]], ids=str)
def test_an_update_has_the_same_bits(overrides: list[str], tiny_config: Configure, tmp_path: Path) -> None:
    """Policy and separate critic, as they begin and as a checkpoint brings them back."""
    found = []
    for on in ("false", "true"):
        config = tiny_config([*overrides, f"policy.gradient_checkpointing={on}", "generation.max_new_tokens=12"])
        bench = Bench.of(config)
        bench.update(*bench.until_experience())
        tokenizer, state = bench.plan.tokenizer.tokenizer, start_state()
        save_checkpoint(tmp_path / on, bench.trainer, tokenizer, state)
        bench.trainer = load_checkpoint(tmp_path / on, config, CPU)[0]
        trunks = [bench.trainer.actor_critic.policy.trunk]
        if (critic := bench.trainer.actor_critic.critic) is not None and critic.trunk is not None:
            trunks.append(critic.trunk)
        calls = [count_calls(some_norm(trunk)) for trunk in trunks]
        batch = bench.until_experience()
        forward = [c[0] for c in calls]
        bench.update(*batch)
        steps = 2 * 2
        assert [c[0] - f for c, f in zip(calls, forward, strict=True)] == [steps * (1 + (on == "true"))] * len(trunks)
        found.append(bench.trainer.digest())
    assert found[0] == found[1]


def test_a_model_without_such_layers_is_refused(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(UserError) as caught:
        new_trainer(tiny_config(["policy.gradient_checkpointing=true"]), CPU)
    assert caught.value.problems[0].startswith("policy.gradient_checkpointing is true, but policy.model is of")


def start_state() -> Any:
    from rlhf_core.contracts.loop_state import LoopState

    return LoopState(1, 0.1)
