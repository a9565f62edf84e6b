"""Checkpoints: complete, loadable by others, refused when damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, NumericalError
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.models.checkpoints import Trainer, load_checkpoint, new_trainer, save_checkpoint
from rlhf_core.models.tokenizers import load_tokenizer

CPU = torch.device("cpu")
STATE = LoopState(3, 0.125, episodes=24, cursor=Cursor(1, 8), moments=ScoreMoments(24, 0.5, 2.25))
CRITICS = {
    "shared": ["policy.critic.kind=shared"],
    "separate": ["policy.critic.kind=separate"],
    "from zero": ["policy.critic.init=zero"],
    "from reward": ["policy.critic.init=reward"],
    "none": ["shaping.estimator=reward"],
    "lora": ["policy.lora.rank=4", "policy.critic.kind=shared"],
    "lora merged": ["policy.lora.rank=4", "policy.lora.save=merged"],
    "lora in bfloat16": ["policy.lora.rank=4", "policy.dtype=bfloat16", "shaping.estimator=reward"],
}
Configure = Callable[..., RunConfig]


def take_steps(trainer: Trainer, number: int) -> None:
    """Some optimiser steps on a loss that reaches every parameter."""
    for _ in range(number):
        trainer.optimizer.zero_grad()
        sum((p**2).sum() + p.sum() for _, p in trainer.actor_critic.named_parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        trainer.optimizer.step()
    trainer.iteration = STATE.iteration


@pytest.mark.parametrize("overrides", CRITICS.values(), ids=CRITICS.keys())
def test_a_loaded_checkpoint_goes_on_bit_for_bit(
    overrides: list[str], tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    config = tiny_config(overrides)
    trainer = new_trainer(config, CPU)
    take_steps(trainer, 2)
    tokenizer, merge = load_tokenizer(str(tiny.policy), field="x"), config.policy.lora.save == "merged"
    save_checkpoint(tmp_path / "000003", trainer, tokenizer, STATE, merge_adapter=merge)
    loaded, state = load_checkpoint(tmp_path / "000003", config, CPU)
    assert state == STATE
    assert loaded.iteration == 3
    assert loaded.digest() == trainer.digest()
    take_steps(trainer, 2)
    take_steps(loaded, 2)
    assert loaded.digest() == trainer.digest()


def test_the_policy_folder_loads_plainly_and_speaks(tiny: Any, tiny_config: Configure, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_checkpoint(tmp_path / "c", new_trainer(tiny_config(), CPU), load_tokenizer(str(tiny.policy), field="x"), STATE)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c" / "policy")
    ids = tokenizer("The film", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]


def test_a_critic_from_the_reward_model_starts_as_the_reward_model(tiny_config: Configure) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(["policy.critic.init=reward"])
    critic = new_trainer(config, CPU).actor_critic.critic
    assert critic is not None
    assert critic.trunk is not None
    component = config.reward.first_model
    assert component is not None
    reward = AutoModelForSequenceClassification.from_pretrained(component.model).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        value = critic.head.values(critic.trunk(input_ids=tokens).last_hidden_state[:, -1])
        assert torch.allclose(value, reward(tokens).logits[:, 0])


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_other_critics_start_at_zero(kind: str, tiny_config: Configure) -> None:
    critic = new_trainer(tiny_config([f"policy.critic.kind={kind}"]), CPU).actor_critic.critic
    assert critic is not None
    assert critic.head.values(torch.randn(4, 32)).abs().max().item() == 0.0


def test_a_random_critic_comes_from_the_seed_alone(tiny_config: Configure) -> None:
    torch.manual_seed(99)
    first, second, other = (
        new_trainer(tiny_config(["policy.critic.init=zero", f"seed={seed}"]), CPU).digest() for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(
    "name", ["policy/model.safetensors", "critic/critic.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_flipped_byte_is_refused(name: str, tiny: Any, tiny_config: Configure, tmp_path: Path) -> None:
    config = tiny_config()
    trainer = new_trainer(config, CPU)
    take_steps(trainer, 1)
    save_checkpoint(tmp_path / "c", trainer, load_tokenizer(str(tiny.policy), field="x"), STATE)
    file = tmp_path / "c" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{Path(name).name} is damaged"):
        load_checkpoint(tmp_path / "c", config, CPU)


def test_a_parameter_that_is_not_finite_is_never_saved(tiny: Any, tiny_config: Configure, tmp_path: Path) -> None:
    trainer = new_trainer(tiny_config(), CPU)
    with torch.no_grad():
        next(iter(trainer.actor_critic.policy.model.parameters()))[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        save_checkpoint(tmp_path / "c", trainer, load_tokenizer(str(tiny.policy), field="x"), STATE)
    assert not list(tmp_path.iterdir())
