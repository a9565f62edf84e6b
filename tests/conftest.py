"""What every test shares: a quiet and private environment, a tiny world, and a Prefect server."""

# ruff: noqa: E402 - the environment stands above the imports that read it
from __future__ import annotations

from environment import be_quiet_and_private

be_quiet_and_private()

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
import torch
from iteration import tiny_tree
from s3_server import S3Server, s3_server
from tiers import is_exhaustive
from tiny_world import Tiny, make_tiny

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun with `&`: commands that tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the same examples at each call, so that a change is what makes a test fail; for new ones: --hypothesis-profile=explore
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


LONGEST = (
    "torture/test_battery.py",
    "flows/test_exact_resume.py",
    "flows/test_sharding.py",
    "flows/test_sweep_flow.py",
    "flows/test_ranks.py",
    "flows/test_ppo_flow.py",
    "flows/test_without_prefect.py",
    "flows/test_evaluate_flow.py",
)
"""Files that take the better part of a minute or more, the longest first."""


gc.disable()  # while a million objects of libraries and tests are made, of which none is ever freed


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage: to walk it takes longer than most tests."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what leaves the fast tier; begin with what takes longest, so that no core waits for the last file."""
    root = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(root):
            file, name = item.path.relative_to(root).as_posix(), item.nodeid.partition("::")[2]
            if is_exhaustive(file, name):
                item.add_marker("exhaustive")
    rank = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny world. It is shared: copy a folder before changing anything in it."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_config(tiny: Tiny) -> Callable[[Sequence[str]], RunConfig]:
    """A function from ``a.b=c`` overrides to the config of a three-iteration run on the tiny world."""

    def make(overrides: Sequence[str] = ()) -> RunConfig:
        return build_config(tiny_tree(tiny), overrides)

    return make


@pytest.fixture
def through_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass is written out: what transformers computes alone, bit for bit."""
    monkeypatch.setattr("rlhf_core.models.gpt2.GPT2Passes.of", lambda _module: None)


@pytest.fixture(autouse=True)
def no_tracker_is_left() -> Iterator[None]:
    """``mlflow.set_tracking_uri`` leaves its address in the environment, where the next run would take it for ours."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real server that speaks S3, empty but for what other tests have in buckets of their own."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's with its tables: making them takes seconds. Copy it before writing."""
    from tasks.tracking.tracker import _make_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    _make_store(path)
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a database of its own, for tests that run a flow."""
    from prefect.events.worker import EventsWorker
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
        EventsWorker.drain_all(timeout=60)  # of logs, too; what is left then is dropped: the harness waits without end
