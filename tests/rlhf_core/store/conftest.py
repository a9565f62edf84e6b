"""A store and its objects for these tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import S3Server

from rlhf_core.store.address import CACHE, Address
from rlhf_core.store.objects import Objects


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server, where boto3 finds it; and a machine that has no copy of anything."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return s3


@pytest.fixture
def url(store: S3Server) -> str:
    return f"s3://{store.new_bucket()}/experiments/run"


@pytest.fixture
def objects(url: str) -> Objects:
    return Objects(Address.of(url), tries=2)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """From now on this is another machine."""
    return lambda: monkeypatch.setenv(CACHE, str(tmp_path / "another"))
