"""Reward components: models, Python functions and services that score responses, and what happens when one fails."""
