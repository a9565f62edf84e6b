"""Every family at tiny size: two iterations of the six stages, whole weights and LoRA; reward models of all kinds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from architectures import decoders, encoders, save_random
from iteration import CPU, Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.actor_critic import initial_critic
from rlhf_core.models.causality import is_causal
from rlhf_core.models.critic import Critic
from rlhf_core.models.policy import load_policy
from rlhf_core.models.reward_model import Conversation, RewardModel
from rlhf_core.models.tokenizers import load_tokenizer, vocabulary_digest
from rlhf_core.preflight import preflight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Configure = Callable[..., RunConfig]
TEXTS = ["The film was", "Her first novel began bright but", "A", "This story seemed slow and not what it was, at all"]


@pytest.fixture(scope="module", params=decoders(300))
def family(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(policy, reward model) of one architecture, with the tiny tokenizer."""
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    policy, reward = (decoders(len(tokenizer))[request.param] for _ in range(2))
    reward.num_labels = 1
    return (
        save_random(policy, "AutoModelForCausalLM", root / "policy", tokenizer),
        save_random(reward, "AutoModelForSequenceClassification", root / "reward", tokenizer),
    )


@pytest.mark.parametrize("weights", ["whole", "lora"])
def test_two_iterations(weights: str, family: tuple[Path, Path], tiny_config: Configure) -> None:
    """Cached decoding agrees with full passes before and after an update, and KL is 0 at iteration 0 alone.

    Sequences are longer than the sliding windows of 8 tokens.
    """
    policy, reward = family
    overrides = [f"policy.model={policy}", f"reference.model={policy}", f"reward.components.0.model={reward}"]
    overrides += ["policy.critic.init=reward", "generation.max_new_tokens=20", "ppo.learning_rate=1e-2"]
    bench = Bench.of(tiny_config([*overrides, *(["policy.lora.rank=4"] if weights == "lora" else [])]))
    assert bench.config.starts_at_reference
    names = {name.split(".lora_")[0] for name, _ in bench.trainer.actor_critic.policy_parameters()}
    if weights == "lora":
        linear = [m for m in bench.trainer.actor_critic.policy.trunk.modules() if hasattr(m, "lora_A")]
        assert len(names) == len(linear) >= 2 * 4, "every linear layer of two blocks"
    first = bench.until_experience()
    assert first[1].response_mask_BR.sum() > 100
    assert first[2].token_kl_BR.abs().max() < F32_MODEL["atol"]
    update = bench.update(*first)
    assert update.metrics["guard/first_max_abs_log_ratio"] < F32_MODEL["atol"]
    assert update.metrics["guard/skipped_steps"] == 0
    prompts = bench.prompts(Cursor(0, 8)).batch
    rollouts = bench.rollouts(prompts, iteration=1).batch
    ref_logprobs = bench.ref_logprobs(prompts, rollouts).batch
    second = bench.experience(rollouts, bench.scores(prompts, rollouts).batch, ref_logprobs).batch
    assert second.token_kl_BR.abs().max() > 1e-2, "the policy has left the reference"
    update = bench.update(prompts, rollouts, second, iteration=1)
    assert update.metrics["guard/first_max_abs_log_ratio"] < F32_MODEL["atol"]


def own_scores(folder: Path, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """transformers' own logit of each unpadded row."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([list(row)])).logits[0, 0] for row in rows])


def score_texts(folder: Path, texts: Sequence[str], **settings: Any) -> torch.Tensor:
    """Scores of texts by a model that reads text."""
    config = ModelReward(model=str(folder), **settings)
    model = RewardModel.load(config, field="reward.components.0", policy_vocabulary="another", device=CPU)
    return torch.as_tensor(model.score([Conversation(text[:5], text[5:], [], []) for text in texts]))


def word_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    """Another tokenizer than the policy's: words, between [CLS] and [SEP] as encoders want them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **settings,
    )
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=encoders(40))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of an encoder's architecture with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = word_tokenizer(folder)
    return save_random(encoders(40)[request.param], "AutoModelForSequenceClassification", folder, tokenizer, spread=0.3)


def test_an_encoder_reads_text_through_its_own_tokenizer(encoder: Path) -> None:
    """One by one without padding, and in batches of any composition."""
    tokenizer = load_tokenizer(str(encoder), field="x")
    expected = own_scores(encoder, [cast("list[int]", tokenizer(text)["input_ids"]) for text in TEXTS])
    assert expected.std() > 0.01
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(score_texts(encoder, TEXTS, batch_size=batch_size), expected, **F32_MODEL)
    torch.testing.assert_close(score_texts(encoder, TEXTS[::-1]), expected.flip(0), **F32_MODEL)


def test_a_long_text_loses_its_beginning_and_keeps_what_frames_it(encoder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder), field="x")
    ids = cast("list[int]", tokenizer(TEXTS[3])["input_ids"])
    framed = [ids[0], *ids[-5:]]
    assert (framed[0], framed[-1]) == (2, 3)
    torch.testing.assert_close(score_texts(encoder, TEXTS[3:], max_len=6), own_scores(encoder, [framed]), **F32_MODEL)


def test_a_text_beyond_an_encoders_positions_is_cut_to_them(encoder: Path) -> None:
    long = " ".join(["film slow"] * 60)
    assert torch.isfinite(score_texts(encoder, [long])).all()
    config = json.loads((encoder / "config.json").read_text())
    usable = 64 - (config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0)
    tail = " ".join(long.split()[-(usable - 2) :])
    torch.testing.assert_close(score_texts(encoder, [long]), score_texts(encoder, [tail]), **F32_MODEL)


def test_a_run_with_an_encoder_as_reward_model(encoder: Path, tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config([f"reward.components.0.model={encoder}"]))
    prompts, rollouts, experience = bench.until_experience()
    assert torch.isfinite(experience.score_B).all()
    bench.update(prompts, rollouts, experience)


def test_decoders_score_rows_of_any_composition_like_transformers(family: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(family[1]), field="x")
    rows = [cast("list[int]", tokenizer(text)["input_ids"]) for text in TEXTS]
    expected = own_scores(family[1], rows)
    assert expected.std() > 0.1
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(score_texts(family[1], TEXTS, batch_size=batch_size), expected, **F32_MODEL)
    config = ModelReward(model=str(family[1]))
    model = RewardModel.load(config, field="x", policy_vocabulary=vocabulary_digest(tokenizer), device=CPU)
    assert model.is_decoder
    found = model.score([Conversation("", "", [], row) for row in rows])
    torch.testing.assert_close(found, expected, **F32_MODEL)


def test_a_critic_starts_as_a_decoder_that_scores(family: tuple[Path, Path], tiny_config: Configure) -> None:
    """V of a whole text is its score."""
    config = tiny_config(
        [f"policy.model={family[0]}", f"reward.components.0.model={family[1]}", "policy.critic.init=reward"]
    )
    critic = initial_critic(config, load_policy(config, CPU), CPU)
    tokenizer = load_tokenizer(str(family[1]), field="x")
    ids = cast("list[int]", tokenizer(TEXTS[1])["input_ids"])
    assert critic.trunk is not None
    with torch.no_grad():
        hidden_1LD = critic.trunk(input_ids=torch.tensor([ids])).last_hidden_state
        value = critic.head.values(hidden_1LD[0, -1:])
    torch.testing.assert_close(value, own_scores(family[1], [ids]), **F32_MODEL)


def test_a_critic_does_not_start_as_an_encoder(
    encoder: Path, tiny: Any, tiny_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would see the future. The vocabulary is made the policy's, so that this alone is wrong."""
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    kind = json.loads((encoder / "config.json").read_text())["model_type"]
    folder = tmp_path / "encoder"
    save_random(encoders(len(tokenizer))[kind], "AutoModelForSequenceClassification", folder, tokenizer, spread=0.3)
    monkeypatch.setattr("rlhf_core.models.actor_critic.is_causal", lambda _: True)  # its head alone gives it away
    config = tiny_config(["policy.critic.init=reward", f"reward.components.0.model={folder}"])
    policy = load_policy(tiny_config(), CPU)
    for attempt in (lambda: preflight(config), lambda: initial_critic(config, policy, CPU)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith("policy.critic.init is reward, but reward.components.0.model")
        assert "does not read from left to right" in caught.value.problems[0]


def test_a_critic_that_reads_less_than_the_policy_writes_is_refused(
    tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    config = decoders(len(tokenizer))["gpt2"]
    config.n_positions, config.num_labels = 32, 1
    save_random(config, "AutoModelForSequenceClassification", tmp_path / "short", tokenizer)
    overrides = ["policy.critic.init=reward", f"reward.components.0.model={tmp_path / 'short'}"]
    with pytest.raises(UserError, match=r"context of 32 tokens, .* may have 64; .* prompts\.max_len to at most 26"):
        preflight(tiny_config(overrides))
    preflight(tiny_config([*overrides, "prompts.max_len=26"]))


def test_a_bidirectional_model_with_a_score_head_is_no_decoder(
    tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    """Gemma 3 can be told to see the future: its config and head look like a decoder's."""
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    config = decoders(len(tokenizer))["gemma3"]
    config.num_labels, config.use_bidirectional_attention = 1, True
    save_random(config, "AutoModelForSequenceClassification", tmp_path / "both", tokenizer)
    model = RewardModel.load(ModelReward(model=str(tmp_path / "both")), field="x", policy_vocabulary="", device=CPU)
    assert not model.is_decoder
    run = tiny_config(["policy.critic.init=reward", f"reward.components.0.model={tmp_path / 'both'}"])
    with pytest.raises(UserError, match="does not read from left to right"):
        initial_critic(run, load_policy(tiny_config(), CPU), CPU)


def test_decoders_are_causal(family: tuple[Path, Path]) -> None:
    from transformers import AutoModel

    assert is_causal(AutoModel.from_pretrained(family[0]).eval())


def test_encoders_are_not_causal(encoder: Path) -> None:
    from transformers import AutoModel

    assert not is_causal(_AcceptsCache(AutoModel.from_pretrained(encoder).eval()))


class _AcceptsCache:
    """Some encoders do not know ``use_cache``, which causal trunks are told."""

    def __init__(self, trunk: Any) -> None:
        self.trunk, self.config, self.parameters = trunk, trunk.config, trunk.parameters

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.trunk(input_ids=input_ids)


def test_a_shared_critic_reads_the_adapted_trunk(tiny_config: Configure) -> None:
    """V changes with the adapter although the head does not."""
    bench = Bench.of(tiny_config(["policy.lora.rank=4", "policy.critic.kind=shared"]))
    prompts, rollouts, experience = bench.until_experience()
    critic = cast("Critic", bench.trainer.actor_critic.critic)

    def values() -> torch.Tensor:
        with torch.no_grad():
            critic.head.weight.copy_(torch.linspace(-1, 1, 32)[None])
            critic.head.bias.zero_()
        values_BR = bench.rollouts(prompts).batch.values_BR
        assert values_BR is not None
        return values_BR[:, 0]

    before = values()
    bench.update(prompts, rollouts, experience)
    assert (values() - before).abs().max() > 1e-3
