"""A real chat model to run PPO on, without a model hub.

packages  SmolLM2-135M-Instruct out of a package of PyPI
requests  what people ask: chats with one message each
taste     a reward model of that size, from real sentences that people liked and disliked
world     the whole, written into a folder once
"""

from rlhf_core.chatworld.world import ChatWorld, build_chat_world

__all__ = ["ChatWorld", "build_chat_world"]
