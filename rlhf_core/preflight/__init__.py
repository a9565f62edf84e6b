"""Everything that can be wrong with a config, found before anything is written or any weight is loaded."""

from rlhf_core.preflight.folders import context_length, model_config
from rlhf_core.preflight.plan import Plan, load_plan, preflight

__all__ = ["Plan", "context_length", "load_plan", "model_config", "preflight"]
