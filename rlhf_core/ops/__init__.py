"""Tensors in, tensors out: the mathematics of the pipeline, each function with its source."""
