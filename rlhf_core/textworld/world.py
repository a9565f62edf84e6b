"""Build a text world into a folder, once: grammar -> tokenizer -> policy -> reward model -> files.

A world appears whole or not at all. It is written into a hidden sibling folder, synced to disk, and renamed into place;
`world.json`, which names the recipe and the SHA-256 of every other file, decides whether a folder can be used again.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Final

from rlhf_core.textworld import training
from rlhf_core.textworld.grammar import openings, sample_review
from rlhf_core.textworld.recipe import Recipe

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total); the phases are "grammar", "policy", "reward" and "measure", in this order."""

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
            reward_mean_on_policy, reward_std_on_policy, policy_grammatical, policy_quality, response_len, eos_rate;
            seconds, the time to build.
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

    The same seed, recipe and thread count give the same files on the same machine. PyTorch's random state is left as
    it was found. Processes that ask for the same folder wait for the one that builds it.

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
    if world := _load(directory, digest):
        return world

    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        if world := _load(directory, digest):  # another process has built it in the meantime
            return world
        _refuse_strangers(directory)
        building = directory.with_name(f".{directory.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir()
        try:
            metrics = _build(building, seed, recipe, on_progress or (lambda phase, done, total: None))
            content = {"digest": digest, "seed": seed, "recipe": asdict(recipe), "metrics": metrics}
            content["files"] = _file_digests(building)
            (building / "world.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _sync_tree(building)
            _put_in_place(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _world(directory, metrics)


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
    with _torch_seeded(seed):
        policy = training.fit_policy(reviews, tokenizer, recipe, rng=rng, on_step=partial(on_progress, "policy"))
        pairs = training.draw_pairs(rng, prompts, recipe.num_pairs, recipe)
        reward = training.fit_reward(policy, pairs, tokenizer, recipe, rng=rng, on_step=partial(on_progress, "reward"))
        on_progress("measure", 0, 1)
        with torch.no_grad():
            own_reviews = _respond(policy, tokenizer, rng.choices(prompts, k=recipe.num_policy_samples))
            training.shift_scores(reward, by=-float(training.score(reward, own_reviews, tokenizer).mean()))
            metrics = _measure(policy, reward, tokenizer, prompts_eval, recipe, rng)
        on_progress("measure", 1, 1)

    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, lines in (("prompts.jsonl", prompts), ("prompts_eval.jsonl", prompts_eval)):
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return metrics | {"seconds": time.monotonic() - start}
