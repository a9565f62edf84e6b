"""A policy against its reference."""
