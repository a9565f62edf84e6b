"""A quiet and private environment set before prefect and transformers are imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile


def be_quiet_and_private() -> None:
    """No telemetry, no download, no log lines, and a Prefect home of this process alone."""
    home = tempfile.mkdtemp(prefix="rlhf-tests-prefect-")
    made_by = os.getpid()
    atexit.register(lambda: shutil.rmtree(home, ignore_errors=True) if os.getpid() == made_by else None)
    os.environ |= {
        "DO_NOT_TRACK": "true",
        "PREFECT_HOME": home,
        "XDG_STATE_HOME": home,
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
