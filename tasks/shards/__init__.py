"""Stages computed in parts, by workers beside the process of a run."""
