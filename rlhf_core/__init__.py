"""The policy-optimisation stage of RLHF: what is computed, free of any orchestrator or tracker.

Layers, each importing only from those to its right: stages -> models -> ops -> contracts.
"""

__version__ = "0.1.0"
