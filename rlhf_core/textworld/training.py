"""Tokenizer, policy and reward model of the text world, each fitted from scratch in seconds.

Nothing here reads or writes files. Reviews, pairs and batches are drawn from a generator that the caller passes; first
weights and responses from PyTorch's global CPU generator, which the caller seeds and restores (`world.py`).

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from math import cos, pi, sqrt
from random import Random
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_core.textworld.grammar import BROKEN_QUALITY, Review, annotator_prefers, parse, sample_review, spoil
from rlhf_core.textworld.recipe import Recipe

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|pad|>")
EOS, PAD = SPECIAL_TOKENS
EOS_ID, PAD_ID = 0, 1
"""Special tokens come first in the vocabulary."""

IGNORED: Final = -100
"""Label of a padded position."""

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
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[*SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.context_len,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review]) -> list[Tokens]:
    """Token ids of each review, with EOS behind a finished one.

    Args:
        tokenizer: of the world.
        reviews: one sequence each, in this order.
    Returns: unpadded sequences; the rare one that is longer than the tokenizer's model_max_length loses its end.
    """
    texts = [review.text + EOS * review.finished for review in reviews]
    return [ids[: tokenizer.model_max_length] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def fit_policy(
    reviews: Sequence[Review],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    rng: Random,
    on_step: Progress,
) -> GPT2LMHeadModel:
    """A small GPT-2 fitted to the reviews by next-token cross-entropy.

    Args:
        reviews: what the policy learns to write.
        tokenizer: of the world; its special tokens are written into the model's config.
        recipe: sizes, policy_steps, policy_batch_size and policy_lr are read.
        rng: decides the order of the batches; advanced.
        on_step: told of every step.
    Returns: the policy, in evaluation mode.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.context_len,
        n_embd=recipe.hidden_size,
        n_layer=recipe.num_layers,
        n_head=recipe.num_heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new, in one kernel
        initializer_range=0.02 * sqrt(768 / recipe.hidden_size),  # GPT-2's 0.02, at its width of 768
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    policy = GPT2LMHeadModel(config)
    batches = _batches([(sequence,) for sequence in encode(tokenizer, reviews)], recipe.policy_batch_size, rng)
    _fit(
        policy,
        lambda: _next_token_loss(policy, [sequence for (sequence,) in next(batches)]),
        num_steps=recipe.policy_steps,
        lr=recipe.policy_lr,
        on_step=on_step,
    )
    return policy


def next_token_loss(policy: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review]) -> Tensor:
    """Mean cross-entropy of every token but the first, in nats a token.

    Args:
        policy: the language model.
        tokenizer: of the world.
        reviews: at least one.
    Returns: a scalar.
    """
    return _next_token_loss(policy, encode(tokenizer, reviews))


def respond(policy: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[Review]:
    """Let the policy finish reviews, by plain sampling from PyTorch's global CPU generator.

    Args:
        policy: the language model, a GPT2LMHeadModel.
        tokenizer: of the world.
        prompts: openings; one response each.
    Returns: reviews, of quality `BROKEN_QUALITY` where the response does not parse.
    """
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True)
    prompt_len = encoded["input_ids"].shape[1]
    max_new_tokens = policy.config.n_positions - prompt_len
    ids_BT = policy.generate(**encoded, do_sample=True, top_k=0, max_new_tokens=max_new_tokens)[:, prompt_len:]
    responses = [text.strip() for text in tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]
    finished = (ids_BT == EOS_ID).any(dim=1).tolist()
    return [
        Review(
            prompt,
            response,
            BROKEN_QUALITY if (quality := parse(prompt, response)) is None else quality,
            ended,
        )
        for prompt, response, ended in zip(prompts, responses, finished, strict=True)
    ]


def draw_pairs(rng: Random, prompts: Sequence[str], num: int, recipe: Recipe) -> list[tuple[Review, Review]]:
    """Preference pairs: two reviews of one prompt, the one that the annotator preferred first.

    Args:
        rng: source of randomness; advanced.
        prompts: openings to draw from.
        num: how many pairs.
        recipe: spoiled_share, tie_margin and annotator_sharpness are read.
    Returns: (chosen, rejected) pairs.
    """

    def write(prompt: str) -> Review:
        review = sample_review(rng, prompt)
        return spoil(rng, review) if rng.random() < recipe.spoiled_share else review

    pairs: list[tuple[Review, Review]] = []
    while len(pairs) < num:
        prompt = rng.choice(prompts)
        first, second = write(prompt), write(prompt)
        if abs(first.quality - second.quality) < recipe.tie_margin:
            continue
        preferred = annotator_prefers(rng, first, second, sharpness=recipe.annotator_sharpness)
        pairs.append((first, second) if preferred else (second, first))
    return pairs


def fit_reward(
    policy: GPT2LMHeadModel,
    pairs: Sequence[tuple[Review, Review]],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    rng: Random,
    on_step: Progress,
) -> GPT2ForSequenceClassification:
    """A reward model on a copy of the policy's trunk, fitted to preferences.

        loss = -log sigmoid(score_chosen - score_rejected)

    Args:
        policy: where the trunk starts from; left as it is.
        pairs: (chosen, rejected) reviews.
        tokenizer: of the world.
        recipe: reward_steps, reward_batch_size and reward_lr are read.
        rng: decides the order of the batches; advanced.
        on_step: told of every step.
    Returns: the reward model, in evaluation mode.
    Source: arXiv 2203.02155, eq. 1, with K = 2; the head starts as in arXiv 2009.01325, large enough not to bind.
    """
    config = deepcopy(policy.config)
    config.num_labels = 1
    reward = GPT2ForSequenceClassification(config)
    reward.transformer.load_state_dict(policy.transformer.state_dict())
    nn.init.normal_(reward.score.weight, std=1 / sqrt(recipe.hidden_size + 1))
    chosen, rejected = (encode(tokenizer, side) for side in zip(*pairs, strict=True))
    batches = _batches(list(zip(chosen, rejected, strict=True)), recipe.reward_batch_size, rng)

    def loss() -> Tensor:
        chosen, rejected = zip(*next(batches), strict=True)
        margins = _scores(reward, [*chosen, *rejected]).unflatten(0, (2, -1))
        return -functional.logsigmoid(margins[0] - margins[1]).mean()

    _fit(reward, loss, num_steps=recipe.reward_steps, lr=recipe.reward_lr, on_step=on_step)
    return reward


def scores(
    reward: GPT2ForSequenceClassification, tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review]
) -> Tensor:
    """Score of each review, read at its last token: EOS where it is finished.

    Args:
        reward: the reward model.
        tokenizer: of the world.
        reviews: at least one.
    Returns: [B] float32.
    """
    return _scores(reward, encode(tokenizer, reviews))


@torch.no_grad()
def shift_scores(reward: GPT2ForSequenceClassification, *, by: float) -> None:
    """Add a constant to every score; mutates the reward model.

    The head w has no bias, but the layer norm in front of it has one, b, and the score is linear in b:

        b + by * w / |w|^2    gives    score + by

    Args:
        reward: the reward model; its last layer norm is changed.
        by: the constant.
    """
    head = reward.score.weight[0]
    reward.transformer.ln_f.bias.add_(by * head / head.square().sum())


def _next_token_loss(policy: GPT2LMHeadModel, sequences: Sequence[Tokens]) -> Tensor:
    """Cross-entropy of unpadded sequences.

    What stands in for padding does not matter: attention is causal, and the labels are ignored there.
    """
    ids_BT = _pad(sequences, EOS_ID)
    labels_BT = _pad(sequences, IGNORED)
    logits_BTV = policy(input_ids=ids_BT).logits
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def _scores(reward: GPT2ForSequenceClassification, sequences: Sequence[Tokens]) -> Tensor:
    """Scores of unpadded sequences; the model finds each last token by what is not padding."""
    ids_BT = _pad(sequences, PAD_ID)
    return reward(input_ids=ids_BT, attention_mask=ids_BT != PAD_ID).logits[:, 0]


def _pad(sequences: Sequence[Tokens], value: int) -> Tensor:
    """The sequences as one [B, T] tensor, the shorter ones followed by the value."""
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
