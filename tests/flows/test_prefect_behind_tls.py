"""Prefect's server behind a company's door: a certificate of its own, an auth string, a header, a base path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)
from tls_proxy import Door, tls_proxy
from torture.prefect_server import prefect_server

from flows import calling, outages
from flows.calling import flow_body, run_flow
from flows.ppo import train
from flows.progress import Silent, watched_by
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.records import read_record

AUTH = "admin:correct-horse"
BASE = "/prefect"


class Told(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warned(self, sentence: str) -> None:
        self.told.append(sentence)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", AUTH)
        with prefect_server(folder / "prefect") as server:
            patch.undo()
            with tls_proxy(folder, server.port, base=BASE, header=("X-Team", "red")) as door:
                yield door


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = outages.Outage()
    monkeypatch.setattr(outages, "outage", fresh)
    monkeypatch.setattr(calling, "outage", fresh)


def settings(door: Door) -> dict[Any, Any]:
    return {
        PREFECT_API_URL: f"{door.url}/api",
        PREFECT_API_SSL_CERT_FILE: str(door.certificate),
        PREFECT_API_AUTH_STRING: AUTH,
        PREFECT_CLIENT_CUSTOM_HEADERS: dict([door.header]),
    }


def flow_run_state(flow_run_id: str) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(flow_run_id)).state
    return str(state and state.name)


@flow(persist_result=False)
def work() -> str:
    """Return the id of the flow run, if there is one."""
    with flow_body() as ended_with:
        return ended_with(str(flow_run.id))


def test_a_run_is_shown_there(door: Door, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    told = Told()
    with temporary_settings(settings(door)), watched_by(told):
        run_flow(train, tiny_config(["num_iterations=1"]), str(tmp_path / "run"))
        assert told.told == []
        assert flow_run_state(read_record(tmp_path / "run" / "prefect.json")["flow_run_id"]) == "Completed"


def test_whoever_trusts_any_certificate_is_let_in(door: Door) -> None:
    known, told = settings(door), Told()
    del known[PREFECT_API_SSL_CERT_FILE]
    known[PREFECT_API_TLS_INSECURE_SKIP_VERIFY] = True
    with temporary_settings(known), watched_by(told):
        assert flow_run_state(run_flow(work)) == "Completed"
    assert told.told == []


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        (PREFECT_API_SSL_CERT_FILE, None, "its certificate is not trusted: self-signed certificate; name the one to"),
        (PREFECT_API_SSL_CERT_FILE, "/nowhere.pem", "PREFECT_API_SSL_CERT_FILE /nowhere.pem is not there"),
        (PREFECT_API_SSL_CERT_FILE, __file__, f"PREFECT_API_SSL_CERT_FILE {__file__} holds no certificate"),
        (PREFECT_API_AUTH_STRING, "admin:wrong-one", "PREFECT_API_AUTH_STRING, PREFECT_API_KEY or"),
        (PREFECT_CLIENT_CUSTOM_HEADERS, {}, "PREFECT_CLIENT_CUSTOM_HEADERS lets a client in"),
    ],
)
def test_what_is_missing_is_said_once_and_the_run_goes_on(setting: Any, value: Any, sentence: str, door: Door) -> None:
    known, told = settings(door), Told()
    known.pop(setting)
    if value is not None:
        known[setting] = value
    with temporary_settings(known), watched_by(told):
        assert run_flow(work) == "None"
    (said,) = told.told
    assert sentence in said
    assert outages.NOT_SHOWN in said
    assert "wrong-one" not in said
