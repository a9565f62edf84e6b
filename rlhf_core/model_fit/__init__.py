"""A config that fits a model, its prompts and this machine, with a reason for each value."""

from rlhf_core.model_fit.choices import Choice, Fit
from rlhf_core.model_fit.fit import fit_config

__all__ = ["Choice", "Fit", "fit_config"]
