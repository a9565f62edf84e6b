"""Tokenizer, policy and reward model of the text world, each fitted from scratch in seconds.

Nothing here reads or writes files, and every draw comes from a generator that the caller passes. Weights start from
PyTorch's global CPU generator; the caller seeds it, and restores it (`rlhf_core.textworld.world`).

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from math import cos, pi
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_core.textworld.grammar import Review, annotator_prefers, sample_review, spoil
from rlhf_core.textworld.recipe import Recipe

EOS = "<|endoftext|>"
PAD = "<|pad|>"

IGNORED = -100
"""Label of a padded position; `torch.nn.functional.cross_entropy` skips it."""

Tokens = list[int]
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def fit_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts, so any text encodes and decodes back to itself.

    Args:
        texts: what the merges are learned from.
        recipe: vocab_size and context_len are read.
    Returns: a tokenizer that pads on the left, as generation wants; EOS, also BOS, and PAD are distinct.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.context_len,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review]) -> list[Tokens]:
    """Token ids of each review, with EOS behind a finished one.

    Args:
        tokenizer: of the world.
        reviews: one sequence each, in this order.
    Returns: unpadded sequences.
    Raises: ValueError for a sequence longer than the tokenizer's model_max_length.
    """
    eos = tokenizer.convert_tokens_to_ids(EOS)
    encoded = tokenizer([review.text for review in reviews])["input_ids"]
    sequences = [ids + [eos] * review.finished for ids, review in zip(encoded, reviews, strict=True)]
    longest = max(map(len, sequences))
    if longest > tokenizer.model_max_length:
        raise ValueError(f"a review takes {longest} tokens, but context_len is {tokenizer.model_max_length}")
    return sequences


def fit_policy(
    sequences: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    rng: Random,
    on_step: Progress,
) -> GPT2LMHeadModel:
    """A small GPT-2 fitted to the reviews by next-token cross-entropy.

    Args:
        sequences: token ids of reviews, EOS included.
        tokenizer: of the world; its special tokens are written into the config.
        recipe: sizes, policy_steps, policy_batch_size and policy_lr are read.
        rng: decides the order of the batches; advanced.
        on_step: told of every step.
    Returns: the policy, in evaluation mode; none of its dropouts is on.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.context_len,
        n_embd=recipe.hidden_size,
        n_layer=recipe.num_layers,
        n_head=recipe.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new, in one kernel
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy = GPT2LMHeadModel(config)
    batches = _batches([(sequence,) for sequence in sequences], recipe.policy_batch_size, rng)
    _fit(
        policy,
        lambda: next_token_loss(policy, [sequence for (sequence,) in next(batches)]),
        num_steps=recipe.policy_steps,
        lr=recipe.policy_lr,
        on_step=on_step,
    )
    return policy


def next_token_loss(policy: GPT2LMHeadModel, sequences: Sequence[Tokens]) -> Tensor:
    """Mean cross-entropy of every token but the first, in nats a token.

    Args:
        policy: a causal language model.
        sequences: unpadded token ids, at least 2 tokens each.
    Returns: a scalar.
    """
    ids_BT = pad(sequences, policy.config.pad_token_id)
    labels_BT = pad(sequences, IGNORED)
    logits_BTV = policy(input_ids=ids_BT).logits  # causal attention: no real token sees the padding on its right
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def draw_pairs(rng: Random, prompts: Sequence[str], num: int, recipe: Recipe) -> list[tuple[Review, Review]]:
    """Preference pairs: two reviews of one prompt, the one that the annotator preferred first.

    Args:
        rng: source of randomness; advanced.
        prompts: openings to draw from.
        num: how many pairs.
        recipe: spoiled_share and annotator_sharpness are read.
    Returns: (chosen, rejected) pairs.
    """

    def write(prompt: str) -> Review:
        review = sample_review(rng, prompt)
        return spoil(rng, review) if rng.random() < recipe.spoiled_share else review

    pairs = []
    for _ in range(num):
        prompt = rng.choice(prompts)
        first, second = write(prompt), write(prompt)
        preferred = annotator_prefers(rng, first, second, sharpness=recipe.annotator_sharpness)
        pairs.append((first, second) if preferred else (second, first))
    return pairs


def fit_reward(
    policy: GPT2LMHeadModel,
    pairs: Sequence[tuple[Tokens, Tokens]],
    recipe: Recipe,
    *,
    rng: Random,
    on_step: Progress,
) -> GPT2ForSequenceClassification:
    """A reward model on a copy of the policy's trunk, fitted to preferences.

        loss = -log sigmoid(score_chosen - score_rejected)        (Bradley and Terry, 1952; arXiv 2203.02155, eq. 1)

    Args:
        policy: where the trunk starts from; left as it is.
        pairs: (chosen, rejected) token ids.
        recipe: reward_steps, reward_batch_size and reward_lr are read.
        rng: decides the order of the batches; advanced.
        on_step: told of every step.
    Returns: the reward model, in evaluation mode.
    """
    config = GPT2Config.from_dict(policy.config.to_dict() | {"num_labels": 1, "architectures": None})
    reward = GPT2ForSequenceClassification(config)
    reward.transformer.load_state_dict(policy.transformer.state_dict())
    nn.init.zeros_(reward.score.weight)
    batches = _batches(pairs, recipe.reward_batch_size, rng)

    def loss() -> Tensor:
        batch = next(batches)
        scores = score(reward, [*(chosen for chosen, _ in batch), *(rejected for _, rejected in batch)])
        chosen, rejected = scores.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    _fit(reward, loss, num_steps=recipe.reward_steps, lr=recipe.reward_lr, on_step=on_step)
    return reward


def score(reward: GPT2ForSequenceClassification, sequences: Sequence[Tokens]) -> Tensor:
    """Scores of the sequences, each read at its last token.

    Args:
        reward: a sequence classifier with one label.
        sequences: unpadded token ids.
    Returns: [B] float32.
    """
    return reward(input_ids=pad(sequences, reward.config.pad_token_id)).logits[:, 0]


@torch.no_grad()
def shift_scores(reward: GPT2ForSequenceClassification, by: float) -> None:
    """Add a constant to every score; mutates the reward model.

    The score head has no bias, but it reads what the last layer norm adds its bias b to, so with head weights w

        b + by * w / |w|^2    gives    score + by

    Args:
        reward: its final layer norm is changed.
        by: the constant.
    """
    head = reward.score.weight[0]
    reward.transformer.ln_f.bias += by * head / head.square().sum()


def pad(sequences: Sequence[Tokens], value: int) -> Tensor:
    """The sequences as one tensor, padded on the right.

    Args:
        sequences: unpadded token ids, at least one sequence.
        value: what stands behind the end of a shorter sequence.
    Returns: [B, T] int64, T the longest.
    """
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


def _batches(
    examples: Sequence[tuple[Tokens, ...]], batch_size: int, rng: Random
) -> Iterator[list[tuple[Tokens, ...]]]:
    """Endless shuffled batches of examples of like length, so little of a batch is padding."""
    while True:
        by_length = sorted(rng.sample(examples, len(examples)), key=lambda example: max(map(len, example)))
        batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _fit(model: nn.Module, loss: Callable[[], Tensor], *, num_steps: int, lr: float, on_step: Progress) -> None:
    """AdamW under a cosine with a short warm-up. In evaluation mode: with dropout at 0 it is the same, and faster."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    num_warmup = max(1, num_steps // 20)
    model.eval()
    with torch.enable_grad():
        for step in range(num_steps):
            factor = min((step + 1) / num_warmup, 0.5 + 0.5 * cos(pi * step / num_steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            on_step(step + 1, num_steps)
