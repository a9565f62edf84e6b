"""Build a text world into a folder, once: grammar -> tokenizer -> policy -> reward model -> files.

A world appears whole or not at all; `world.json`, which names the recipe and the SHA-256 of every other file, decides
whether a folder can be used again.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Final

import torch
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from rlhf_core.contracts.made_folder import make_once
from rlhf_core.textworld import training
from rlhf_core.textworld.grammar import openings, parse, sample_review
from rlhf_core.textworld.recipe import Recipe

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total). The phases are "grammar", "policy", "reward" and "measure", in this order."""

_CONTENTS: Final = {"policy", "reward", "prompts.jsonl", "prompts_eval.jsonl", "world.json"}


@dataclass(frozen=True)
class TextWorld:
    """Where a text world lies, and how good it is.

    Attributes:
        policy: folder of a causal language model that speaks the grammar, with its tokenizer.
        reward: folder of a sequence classifier with one label, with the same tokenizer.
        prompts: JSON lines {"prompt": ...}, unique openings of reviews.
        prompts_eval: as many as `Recipe.num_eval_prompts` openings that neither model has seen in training.
        metrics: heldout_loss (policy, nats a token, unseen reviews of unseen openings), reward_pair_accuracy (unseen
            pairs, against the annotator), annotator_accuracy (the annotator against the true quality: the most that
            can be asked of a model), reward_quality_correlation, and on the policy's own responses to unseen openings
            reward_mean_on_policy, reward_std_on_policy, policy_grammatical (share that parses), policy_quality (the
            true one), response_len (tokens, EOS included), eos_rate; and seconds, the time to build.
    """

    policy: Path
    reward: Path
    prompts: Path
    prompts_eval: Path
    metrics: dict[str, float]


def build_text_world(
    directory: Path, *, seed: int = 0, recipe: Recipe | None = None, on_progress: OnProgress | None = None
) -> TextWorld:
    """The text world in a folder, built first where there is none, or another, or a damaged one.

    The same seed and recipe give the same files on the same machine, whatever the number of threads; PyTorch's random
    state and thread count are left as they were found. Processes that ask for one folder wait for the first of them.

    Args:
        directory: the world's own folder; missing parents are made. An older world in it is replaced, but only once
            the new one is complete.
        seed: decides every draw, at least 0.
        recipe: sizes and step counts; the full-size `Recipe()` if None.
        on_progress: told of every step.
    Returns: the world; its paths are absolute.
    Raises: ValueError for a negative seed, or for a directory that is no folder or holds files of another kind.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    recipe = recipe or Recipe()
    directory = Path(directory).resolve()
    digest = recipe.digest(seed)

    def make(building: Path) -> dict[str, object]:
        metrics = _build(building, seed, recipe, on_progress or _ignore_progress)
        return {"seed": seed, "recipe": asdict(recipe), "metrics": metrics}

    made = make_once(directory, digest, make, record="world.json", contents=_CONTENTS, kind="text world")
    return _world(directory, {str(name): float(value) for name, value in made["metrics"].items()})


def _ignore_progress(_phase: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def _build(folder: Path, seed: int, recipe: Recipe, on_progress: OnProgress) -> dict[str, float]:
    """Make a world and write all of it but world.json into the folder; returns its metrics."""
    start = time.monotonic()
    rng = Random(seed)
    prompts = rng.sample(list(openings()), len(openings()))
    prompts_eval, prompts = prompts[: recipe.num_eval_prompts], prompts[recipe.num_eval_prompts :]

    on_progress("grammar", 0, 1)
    reviews = [sample_review(rng, rng.choice(prompts)) for _ in range(recipe.num_reviews)]
    tokenizer = training.fit_tokenizer([review.text for review in reviews], recipe)
    on_progress("grammar", 1, 1)
    with _reproducible_torch(seed):
        policy = training.fit_policy(reviews, tokenizer, recipe, rng=rng, on_step=partial(on_progress, "policy"))
        pairs = training.draw_pairs(rng, prompts, recipe.num_pairs, recipe)
        reward = training.fit_reward(policy, pairs, tokenizer, recipe, rng=rng, on_step=partial(on_progress, "reward"))
        on_progress("measure", 0, 1)
        with torch.no_grad():
            responses = training.respond(policy, tokenizer, rng.choices(prompts, k=recipe.num_policy_samples))
            training.shift_scores(reward, by=-training.scores(reward, tokenizer, responses).mean().item())
            metrics = _measure(policy, reward, tokenizer, prompts_eval, recipe, rng)
        on_progress("measure", 1, 1)

    with _quiet():
        for name, model in (("policy", policy), ("reward", reward)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    for name, lines in (("prompts.jsonl", prompts), ("prompts_eval.jsonl", prompts_eval)):
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return metrics | {"seconds": round(time.monotonic() - start, 2)}


def _measure(
    policy: GPT2LMHeadModel,
    reward: GPT2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    recipe: Recipe,
    rng: Random,
) -> dict[str, float]:
    """Every metric of `TextWorld` but the seconds, on prompts that neither model was fitted to."""
    heldout = [sample_review(rng, rng.choice(prompts)) for _ in range(recipe.num_heldout)]
    pairs = training.draw_pairs(rng, prompts, recipe.num_heldout, replace(recipe, spoiled_share=0.0))
    chosen, rejected = (training.scores(reward, tokenizer, side) for side in zip(*pairs, strict=True))
    responses = training.respond(policy, tokenizer, rng.choices(prompts, k=recipe.num_policy_samples))
    lengths = [len(tokenizer(f" {review.response}")["input_ids"]) + review.finished for review in responses]
    own = training.scores(reward, tokenizer, responses)
    qualities = torch.tensor([[review.quality for review in heldout]])
    return {
        "heldout_loss": training.next_token_loss(policy, tokenizer, heldout).item(),
        "reward_pair_accuracy": (chosen > rejected).float().mean().item(),
        "annotator_accuracy": fmean(first.quality > second.quality for first, second in pairs),
        "reward_quality_correlation": torch.corrcoef(
            torch.cat([qualities, training.scores(reward, tokenizer, heldout)[None]])
        )[0, 1].item(),
        "reward_mean_on_policy": own.mean().item(),
        "reward_std_on_policy": own.std().item(),
        "policy_quality": fmean(review.quality for review in responses),
        "policy_grammatical": fmean(parse(review.prompt, review.response) is not None for review in responses),
        "response_len": fmean(lengths),
        "eos_rate": fmean(review.finished for review in responses),
    }


def _world(directory: Path, metrics: dict[str, float]) -> TextWorld:
    """The record of a world that lies in the directory."""
    return TextWorld(
        policy=directory / "policy",
        reward=directory / "reward",
        prompts=directory / "prompts.jsonl",
        prompts_eval=directory / "prompts_eval.jsonl",
        metrics=metrics,
    )


@contextmanager
def _reproducible_torch(seed: int) -> Iterator[None]:
    """Seed PyTorch's global CPU generator, compute on one thread, and restore both afterwards.

    On matrices this small a second thread gains little, loses much where the machine is busy, and would change the last
    bits of the weights.
    """
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    torch.default_generator.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_rng_state(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for a file of two megabytes."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
