"""What the suite trains on: a policy, a reward model and prompts, and the config that both sides of `peer` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESPONSE_LEN = 24
EPOCHS = MINIBATCHES = 4
BATCH_SIZE = 64
KL_COEF = 0.05
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class World:
    """A folder with policy/, reward/ (one tokenizer) and prompts.jsonl, lines of {"prompt": …}."""

    root: Path
    is_given: bool = False
    """By --assets; else the suite has built it."""

    @property
    def policy(self) -> Path:
        """AutoModelForCausalLM folder."""
        return self.root / "policy"

    @property
    def reward(self) -> Path:
        """AutoModelForSequenceClassification folder with one label."""
        return self.root / "reward"

    @property
    def prompts(self) -> Path:
        """JSONL."""
        return self.root / "prompts.jsonl"

    def missing(self) -> list[str]:
        """What the folder lacks."""
        return [path.name for path in (self.policy, self.reward, self.prompts) if not path.exists()]

    def settings(self) -> dict[str, object]:
        """The config entries that name its parts."""
        return {
            "prompts.source": self.prompts,
            "prompts.column": "prompt",
            "policy.model": self.policy,
            "reward.components.0.model": self.reward,
        }


def default_world(folder: Path, *, small: bool) -> World:
    """The quickstart's text world, built once; with small sizes the tests' tiny world."""
    if small:
        return tiny_world(folder)
    from tasks.worlds.text_world import prepare_text_world

    root = ROOT / ".quickstart" / "world"
    prepare_text_world(root, lambda phase, done, total: None)
    return World(root)


def tiny_world(folder: Path) -> World:
    """The tests' tiny world, in a new folder."""
    import transformers
    from tiny_world import make_tiny

    transformers.logging.disable_progress_bar()
    folder.mkdir(parents=True)
    make_tiny(folder)
    return World(folder)


def same_work(world: World, *, critic: str, threads: int, small: bool) -> dict[str, object]:
    """The work of `peer`, `limit`, `orchestration` and `startup`, as overrides of ``rlhf train``.

    Args:
        world: models and prompts.
        critic: separate (starts as the reward model) or shared (a head on the policy's trunk).
        threads: CPU threads.
        small: 8 episodes instead of 64.
    """
    return world.settings() | {
        "seed": 1,
        "num_threads": threads,
        "device": "cpu",
        "prompts.batch_size": 8 if small else BATCH_SIZE,
        "policy.critic.kind": critic,
        "policy.critic.init": "reward" if critic == "separate" else "null",
        "generation.max_new_tokens": RESPONSE_LEN,
        "generation.temperature": 1.0,
        "kl.coef": KL_COEF,
        "kl.controller": "fixed",
        "shaping.gae_lambda": 0.95,
        "ppo.learning_rate": LEARNING_RATE,
        "ppo.embedding_lr_factor": 1.0,
        "ppo.lr_schedule": "constant",
        "ppo.num_ppo_epochs": EPOCHS,
        "ppo.num_minibatches": MINIBATCHES,
        "checkpoint.every": 1000,  # at the end only: the peer saves nothing, either
    }
