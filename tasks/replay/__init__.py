"""An iteration computed again beside its run."""
