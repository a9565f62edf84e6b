"""Runs in an object store: the store is the truth, a folder of this machine is its copy."""
