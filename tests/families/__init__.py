"""`make families`: every family of transformers at tiny size, as policy and as reward model, against transformers."""
