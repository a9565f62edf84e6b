"""A small world to run PPO in, made on the spot: nothing is downloaded.

lexicon   the words, and what they are worth
grammar   film reviews with a latent quality: sample, spoil, parse
recipe    sizes and step counts
training  tokenizer, policy and reward model from the grammar
world     the whole, written into a folder once and verified on every use
"""

from rlhf_core.textworld.recipe import Recipe
from rlhf_core.textworld.world import OnProgress, TextWorld, build_text_world

__all__ = ["OnProgress", "Recipe", "TextWorld", "build_text_world"]
