"""What transformers prints by itself: nothing, wherever a model is loaded or compared with its files."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Draw no progress bars and print no advice: the pre-flight and the flow report what matters themselves."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it advises attention masks where right padding needs none
