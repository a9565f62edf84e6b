"""LoRA: what is trained, what the reference is, what a checkpoint holds, and adapters that do not fit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits_by_peft, save_sft_adapter
from iteration import CPU, Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.adapters import REFERENCE, TRAINED, attach, new_adapter
from rlhf_core.models.checkpoints import new_trainer
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.policy import load_policy, load_reference, save_policy
from rlhf_core.preflight import preflight

Configure = Callable[..., RunConfig]
LORA = ["policy.lora.rank=4", "policy.critic.kind=shared"]
TOKENS = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 53, 54]])


@pytest.fixture(scope="module")
def sft(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT adapter on the tiny policy."""
    return save_sft_adapter(tiny.policy, tmp_path_factory.mktemp("sft") / "sft")


def logits(model: LanguageModel) -> torch.Tensor:
    """Logits by way of trunk and projection."""
    with torch.no_grad():
        hidden_TD = model.hidden_states(PackedRows.of(TOKENS.tolist()))
        return model.projection().logits(hidden_TD, 1.0).reshape(*TOKENS.shape, -1)


def trained(config: RunConfig) -> Bench:
    """A bench after one update: the adapter differs from where it began."""
    bench = Bench.of(config)
    bench.update(*bench.until_experience())
    return bench


def test_the_adapter_alone_is_trained_and_the_base_keeps_its_bits(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(LORA))
    policy = bench.trainer.actor_critic.policy
    names = [name for name, _ in bench.trainer.actor_critic.policy_parameters()]
    assert len(names) == 2 * 4 * 2, "A and B of four linear layers in each of two blocks"
    assert all(".lora_" in name for name in names)
    base = {n: p.clone() for n, p in policy.model.named_parameters() if ".lora_" not in n}
    before, digest = logits(policy), bench.trainer.digest()
    bench.update(*bench.until_experience())
    assert bench.trainer.digest() != digest
    assert (logits(policy) - before).abs().max() > 1e-3
    for name, parameter in policy.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
            assert parameter.grad is None
    optimised = {id(p) for group in bench.trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for _, p in bench.trainer.actor_critic.named_parameters()}


def test_a_fresh_adapter_starts_as_the_base_and_is_drawn_from_the_seed(tiny: Any, tiny_config: Configure) -> None:
    digests = [new_trainer(tiny_config([*LORA, f"seed={seed}"]), CPU).digest() for seed in (7, 7, 8)]
    assert digests[0] == digests[1] != digests[2]
    plain = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=False)
    expected, state = logits(plain), torch.get_rng_state()
    attach(plain.model, "", {}, fresh=new_adapter(tiny_config(LORA).policy.lora, plain.model))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(logits(plain), expected)


def test_alpha_over_rank_scales_the_adapter(tiny_config: Configure) -> None:
    """B = 1 everywhere: the change of the first layer's output is proportional to alpha / rank."""

    def shift(*overrides: str) -> torch.Tensor:
        policy = load_policy(tiny_config([*LORA, "policy.lora.target_modules=[c_attn]", *overrides]), CPU)
        layer: Any = policy.trunk.get_submodule("h.0.attn.c_attn")
        x = torch.ones(1, 32)
        with torch.no_grad():
            before = layer(x)
            layer.lora_B[TRAINED].weight.fill_(1.0)
            return layer(x) - before

    once = shift("policy.lora.alpha=4")
    assert once.abs().max() > 1e-2
    torch.testing.assert_close(shift(), 2 * once, **F32_MODEL)
    torch.testing.assert_close(shift("policy.lora.alpha=12"), 3 * once, **F32_MODEL)


@pytest.mark.usefixtures("through_transformers")
def test_the_reference_is_the_trunk_without_the_adapter_bit_for_bit(tiny: Any, tiny_config: Configure) -> None:
    bench = trained(tiny_config(LORA))
    policy = bench.trainer.actor_critic.policy
    plain = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=False)
    own = logits(policy)
    assert bench.reference.model is policy.model
    assert torch.equal(logits(bench.reference), logits(plain))
    assert (own - logits(plain)).abs().max() > 1e-3
    assert torch.equal(logits(policy), own), "the policy has its adapter back"


@pytest.mark.parametrize("name", [None, REFERENCE])
def test_the_trained_adapter_comes_back_after_an_error_and_trains_on(
    name: str | None, sft: Path, tiny_config: Configure
) -> None:
    policy = load_policy(tiny_config([f"policy.adapter={sft}", "policy.critic.kind=shared"]), CPU)
    own = logits(policy)
    trainable = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert policy.adapters is not None
    with pytest.raises(KeyError), policy.adapters.answering_as(name):
        raise KeyError
    assert torch.equal(logits(policy), own)
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == trainable
    assert trainable
    assert all(f".{TRAINED}." in n for n in trainable)


def test_one_thread_at_a_time_uses_the_trunk(tiny_config: Configure) -> None:
    policy = trained(tiny_config(LORA)).trainer.actor_critic.policy
    own, seen = logits(policy), []
    assert policy.adapters is not None
    with policy.adapters.answering_as(None):
        other = threading.Thread(target=lambda: seen.append(logits(policy)))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive(), "it waits for the trunk"
    other.join()
    assert torch.equal(seen[0], own)


class TestSftAdapter:
    def test_policy_and_reference_start_as_it(self, sft: Path, tiny: Any, tiny_config: Configure) -> None:
        config = tiny_config([f"policy.adapter={sft}", "policy.critic.kind=shared"])
        assert config.starts_at_reference
        bench = Bench.of(config)
        expected = logits_by_peft(tiny.policy, sft, TOKENS)
        assert (expected - logits_by_peft(tiny.policy, None, TOKENS)).abs().max() > 0.1
        torch.testing.assert_close(logits(bench.trainer.actor_critic.policy), expected, **F32_MODEL)
        prompts, rollouts, experience = bench.until_experience()
        assert experience.token_kl_BR.abs().max() < F32_MODEL["atol"]
        before = logits(bench.reference)
        torch.testing.assert_close(before, expected, **F32_MODEL)
        bench.update(prompts, rollouts, experience)
        assert (logits(bench.trainer.actor_critic.policy) - expected).abs().max() > 1e-3
        assert torch.equal(logits(bench.reference), before), "the frozen original does not move"
        assert bench.reference.model is bench.trainer.actor_critic.policy.model

    def test_the_base_itself_can_be_the_reference(self, sft: Path, tiny: Any, tiny_config: Configure) -> None:
        config = tiny_config([f"policy.adapter={sft}", f"reference.model={tiny.policy}", "policy.critic.kind=shared"])
        assert not config.starts_at_reference
        policy = load_policy(config, CPU)
        reference = load_reference(config, CPU, policy)
        assert reference.model is policy.model
        torch.testing.assert_close(logits(reference), logits_by_peft(tiny.policy, None, TOKENS), **F32_MODEL)

    def test_another_adapter_can_be_the_reference(
        self, sft: Path, tiny: Any, tiny_config: Configure, tmp_path: Path
    ) -> None:
        other = save_sft_adapter(tiny.policy, tmp_path / "other", seed=4, r=5)
        expected = logits_by_peft(tiny.policy, other, TOKENS)
        for start in ([f"policy.adapter={sft}"], ["policy.lora.rank=2"], []):
            config = tiny_config([*start, f"reference.adapter={other}"])
            assert not config.starts_at_reference
            policy = load_policy(config, CPU)
            reference = load_reference(config, CPU, policy)
            assert (reference.model is policy.model) == bool(start), "without LoRA it is a model of its own"
            torch.testing.assert_close(logits(reference), expected, **F32_MODEL)
            assert not any(p.requires_grad for p in reference.model.parameters()) or start

    def test_a_separate_critic_starts_from_the_base_with_it(self, sft: Path, tiny: Any, tiny_config: Configure) -> None:
        critic = new_trainer(tiny_config([f"policy.adapter={sft}"]), CPU).actor_critic.critic
        assert critic is not None
        assert critic.trunk is not None
        with torch.no_grad():
            ours = critic.trunk(input_ids=TOKENS).last_hidden_state
            head = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=False).projection()
        found = torch.stack([head.logits(hidden_LD, 1.0) for hidden_LD in ours])
        torch.testing.assert_close(found, logits_by_peft(tiny.policy, sft, TOKENS), **F32_MODEL)
        assert all(p.requires_grad for p in critic.parameters())

    @pytest.mark.parametrize(
        "shape", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "orthogonal", "r": 4}]
    )
    def test_kinds_of_plain_lora(
        self, shape: dict[str, Any], tiny: Any, tiny_config: Configure, tmp_path: Path
    ) -> None:
        folder = save_sft_adapter(tiny.policy, tmp_path / "a", lora_dropout=0.5, **shape)
        config = tiny_config([f"policy.adapter={folder}", "policy.critic.kind=shared"])
        preflight(config)
        policy = load_policy(config, CPU)
        torch.testing.assert_close(logits(policy), logits_by_peft(tiny.policy, folder, TOKENS), **F32_MODEL)
        assert torch.equal(logits(policy), logits(policy)), "its dropout is off"
        assert policy.adapters is not None
        saved_as: Any = policy.adapters.peft_model.peft_config[TRAINED]
        assert saved_as.lora_dropout == 0.0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
class TestSavedForms:
    @pytest.mark.parametrize("start", ["fresh", "sft"])
    def test_the_adapter_alone_opens_by_peft_transformers_and_here(
        self, start: str, sft: Path, tiny: Any, tiny_config: Configure, tmp_path: Path
    ) -> None:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        overrides = LORA if start == "fresh" else [f"policy.adapter={sft}", "policy.critic.kind=shared"]
        policy = trained(tiny_config(overrides)).trainer.actor_critic.policy
        save_policy(policy, tmp_path, merge=False)
        folder = tmp_path / "policy"
        assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(tiny.policy)
        assert written["target_modules"] == sorted(written["target_modules"]), "a set has no order to rely on"
        with torch.no_grad():
            by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS).logits
            by_transformers = AutoModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS).logits
        here = LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=False)
        assert not any(p.requires_grad for p in here.model.parameters())
        for found in (by_peft, by_transformers, logits(here)):
            torch.testing.assert_close(found, logits(policy), **F32_MODEL)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_merged_policy_is_a_plain_float32_model_with_the_adapter_beside_it(
        self, dtype: str, tiny: Any, tiny_config: Configure, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        policy = trained(tiny_config([*LORA, f"policy.dtype={dtype}"])).trainer.actor_critic.policy
        save_policy(policy, tmp_path, merge=True)
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        assert plain.dtype == torch.float32, "an adapter's small steps would be lost in bfloat16 weights"
        assert not (tmp_path / "policy" / "adapter_config.json").exists()
        with torch.no_grad():
            found = plain(input_ids=TOKENS).logits
        expected = logits_by_peft(tiny.policy, tmp_path / "adapter", TOKENS)
        assert (expected - logits_by_peft(tiny.policy, None, TOKENS)).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, **F32_MODEL)


def test_target_modules_choose_the_layers(tiny_config: Configure) -> None:
    trainer = new_trainer(tiny_config([*LORA, "policy.lora.target_modules=[c_attn, mlp.c_fc]"]), CPU)
    layers = {name.split(".lora_")[0] for name, _ in trainer.actor_critic.policy_parameters()}
    assert layers == {f"policy.transformer.h.{i}.{layer}" for i in (0, 1) for layer in ("attn.c_attn", "mlp.c_fc")}


def test_a_plan_counts_the_adapter_and_no_second_trunk(sft: Path, tiny: Any, tiny_config: Configure) -> None:
    plain, lora, with_sft = (
        preflight(tiny_config(overrides)) for overrides in ([], ["policy.lora.rank=4"], [f"policy.adapter={sft}"])
    )
    for plan, overrides in ((lora, ["policy.lora.rank=4"]), (with_sft, [f"policy.adapter={sft}"])):
        trainer = new_trainer(tiny_config(overrides), CPU)
        real = sum(p.numel() for _, p in trainer.actor_critic.policy_parameters())
        assert plan.parameters["adapter"] == real
        assert plan.memory_bytes["adapter, gradients, AdamW"] == 16 * real
        assert plan.memory_bytes["policy's frozen trunk"] == 4 * plain.parameters["policy"]
        assert "reference" not in plan.memory_bytes
        assert any("the reference is the policy's trunk" in note for note in plan.notes)
    assert plain.memory_bytes["reference"] == 4 * plain.parameters["policy"]
    assert plain.notes == []
    rounded = preflight(tiny_config(["policy.lora.rank=4", "policy.dtype=bfloat16"]))
    assert rounded.memory_bytes["policy's frozen trunk"] == 2 * plain.parameters["policy"]


def test_bfloat16_stores_the_base_in_half_and_trains_a_float32_adapter(tiny_config: Configure) -> None:
    overrides = ["policy.lora.rank=4", "policy.dtype=bfloat16", "policy.gradient_checkpointing=true"]
    for critic in ("policy.critic.kind=shared", "policy.critic.init=reward", "policy.critic.init=zero"):
        bench = Bench.of(tiny_config([*overrides, critic]))
        actor_critic = bench.trainer.actor_critic
        assert {p.dtype for n, p in actor_critic.policy.model.named_parameters() if ".lora_" not in n} == {
            torch.bfloat16
        }
        assert {p.dtype for _, p in actor_critic.named_parameters()} == {torch.float32}
        prompts, rollouts, experience = bench.until_experience()
        assert experience.token_kl_BR.abs().max() < 0.1
        digest = bench.trainer.digest()
        result = bench.update(prompts, rollouts, experience)
        assert bench.trainer.digest() != digest
        assert result.metrics["guard/skipped_steps"] == 0
        assert result.metrics["guard/first_max_abs_log_ratio"] < 0.1
