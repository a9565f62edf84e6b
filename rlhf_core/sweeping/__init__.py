"""Many runs of one config: what they are, where they stand, and what they say together."""
