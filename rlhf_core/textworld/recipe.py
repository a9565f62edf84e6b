"""How a text world is made: the sizes, counts and rates of its tokenizer, policy and reward model."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_core.textworld.grammar import openings


@dataclass(frozen=True)
class Recipe:
    """Everything but the seed that decides what a world is.

    With the defaults a world takes less than half a minute of one CPU core. Its policy mostly speaks the grammar, and
    its reward model sides with the annotator nearly as often as the truth does. Tests pass smaller numbers.

    Attributes:
        vocab_size: entries of the byte-level BPE tokenizer, special tokens included.
        context_len: longest sequence of either model, in tokens.
        hidden_size: width of both models; a multiple of num_heads.
        num_layers: transformer blocks of both models.
        num_heads: attention heads of a block.
        num_reviews: reviews that the policy is fitted to.
        num_heldout: reviews, and as many pairs, to measure the models on.
        num_eval_prompts: openings kept for measuring; neither model is fitted to a review that starts with one.
        policy_steps: optimizer steps of the policy.
        policy_batch_size: reviews of a step.
        policy_lr: peak learning rate of the policy.
        num_pairs: preference pairs that the reward model is fitted to.
        spoiled_share: share of the reviews in those pairs that are broken, so that broken texts score low.
        tie_margin: pairs closer in quality than this are not put to the annotator.
        annotator_sharpness: how well the simulated annotator tells qualities apart.
        reward_steps: optimizer steps of the reward model.
        reward_batch_size: pairs of a step.
        reward_lr: peak learning rate of the reward model.
        num_policy_samples: responses of the finished policy to centre the scores on, and as many to measure.
    """

    vocab_size: int = 1024
    context_len: int = 64
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_reviews: int = 16_384
    num_heldout: int = 512
    num_eval_prompts: int = 64
    policy_steps: int = 2_400
    policy_batch_size: int = 16
    policy_lr: float = 5e-3
    num_pairs: int = 8_000
    spoiled_share: float = 0.06
    tie_margin: float = 0.3
    annotator_sharpness: float = 3.0
    reward_steps: int = 500
    reward_batch_size: int = 16
    reward_lr: float = 1.5e-3
    num_policy_samples: int = 256

    def __post_init__(self) -> None:
        """Refuse a recipe that makes no world.

        Raises: ValueError, naming the field.
        """
        for name, value in asdict(self).items():
            if not (value > 0 or (value == 0 and name in ("spoiled_share", "tie_margin", "annotator_sharpness"))):
                raise ValueError(f"{name} is out of range, got {value}")
        if self.vocab_size < 258:
            raise ValueError(f"vocab_size must hold 256 bytes and 2 special tokens, got {self.vocab_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_eval_prompts >= len(openings()):
            raise ValueError(f"num_eval_prompts leaves none of {len(openings())}, got {self.num_eval_prompts}")
        if self.spoiled_share >= 1:
            raise ValueError(f"spoiled_share must be below 1, got {self.spoiled_share}")

    def digest(self, seed: int) -> str:
        """SHA-256 over the recipe, the seed and the source of this package: what a world is known by.

        Args:
            seed: the seed that the world is made with.
        Returns: 64 hexadecimal digits.
        """
        sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
        content = json.dumps({"recipe": asdict(self), "seed": seed, "sources": sources}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
