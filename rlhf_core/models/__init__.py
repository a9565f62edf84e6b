"""Policy, critic, reference and reward models: loading, scoring, decoding, checkpoints."""
