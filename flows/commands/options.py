"""What the commands share: options, exit codes, the console, and the environment that they prepare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flows.console import Console
from rlhf_core.contracts.search_path import settle_search_path
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.memory import settle_memory
from rlhf_core.store.address import on_disk


def whole_run(place: str) -> Path:
    """A run to be read; where it is in an object store, the folder of its copy."""
    from rlhf_core.store.opening import reading

    return reading(place)


def looked_at(place: str) -> Path:
    """A run to look into: the same without the weights of its checkpoints."""
    from rlhf_core.store.opening import reading

    return reading(place, weights=False)


console = Console()
EXIT_MISTAKE = 2
EXIT_GUARD = 3
EXIT_INCOMPLETE = 4
"""Of a sweep: some of its runs have failed, and the table says which."""

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file; `rlhf config` prints a template.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key; may be repeated.")]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VALUE",
        help="Accept a program, function or address that the run names and that is not known to be yours; its refusal "
        "shows what to write; may be repeated.",
    ),
]
A_RUN = "A run folder, or s3://BUCKET/PREFIX."
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=A_RUN, parser=whole_run)]
"""Read with its checkpoints; of an object store, through its copy."""
LookedAt = Annotated[Path, typer.Argument(metavar="RUN", help=A_RUN, parser=looked_at)]
"""Without the weights of its checkpoints."""
RunOrBundle = Annotated[
    Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run, or a bundle of one iteration.", parser=whole_run)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def local_only(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Of an option: a path of this machine. Raises UserError for an address."""
    return None if value is None else on_disk(value, param.opts[0])


def split_interpreter(overrides: Sequence[str] | None) -> tuple[list[str], str | None]:
    """The overrides of a run, and apart from them the one that names a program: ``generation.vllm.python``."""
    others, python = list[str](), None
    for override in overrides or ():
        key, sign, value = override.partition("=")
        if key.strip() == "generation.vllm.python" and sign:
            python = value.strip()
        else:
            others.append(override)
    return others, python


def _places() -> dict[str, str]:
    """Where Prefect keeps its settings, if the home folder takes none."""
    if "PREFECT_HOME" in os.environ:
        return {}
    try:
        home = Path.home()
        is_usable = os.access(home / ".prefect" if (home / ".prefect").is_dir() else home, os.W_OK)
    except (OSError, RuntimeError):  # no home
        is_usable = False
    return {} if is_usable else {"PREFECT_HOME": tempfile.mkdtemp(prefix="rlhf-prefect-")}


def prepare_environment() -> None:
    """Quiet and private defaults for the libraries; whatever the user has set stays."""
    settle_memory()
    settle_search_path()
    defaults = _places() | {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never pickle
        "PREFECT_API_REQUEST_TIMEOUT": "10",
        "PREFECT_CLIENT_MAX_RETRIES": "2",  # 2 + 4 s for an API that is gone: the run goes on without it
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the shortest: deployments/zombies.yaml waits for three
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        # A server that records each state of a task run by itself takes 50 ms of a core for it, 18 ms by the second
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors reach the terminal as exceptions, once
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    api = os.environ.get("PREFECT_API_URL", "")
    if without_credentials(api) != api:  # Prefect logs and stores the address of its pages
        defaults["PREFECT_UI_URL"] = without_credentials(api).removesuffix("/").removesuffix("/api")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
