"""Begins the recording in each process that a recorded test starts (:mod:`mutants.recording`)."""

import os

if os.environ.get("RLHF_RECORD") and os.environ.get("PYTEST_CURRENT_TEST"):
    from mutants import recording

    recording.start()
