"""A policy against its reference on given prompts: samples, comparison, and the frontier of what is attainable."""
