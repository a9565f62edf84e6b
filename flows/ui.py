"""MLflow's and Prefect's own pages together, on this machine alone, until a person has seen enough.

Nothing is copied: MLflow's server reads the store that the runs have written, Prefect's the database of this user.
Both are processes of this one, and end with it. What runs already is shown instead of started again.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect.settings import PREFECT_API_URL
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flows.child_processes import Child, end
from flows.console import Console
from flows.displays.terminal import print_warning
from flows.outages import api_answers
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.secrets import without_credentials, without_secrets
from rlhf_core.contracts.trust import is_closed, tracker_at
from tasks.tracking.outbox import RefusalError, store_lock
from tasks.tracking.sqlite_store import state_of
from tasks.tracking.store import DATABASE, address_problem, experiments_in, trackers_in
from tasks.tracking.view import view_page

HOST = "127.0.0.1"
MLFLOW_PORT, PREFECT_PORT = 5000, 4200
"""Theirs, where nobody else has them."""
START_S = 180.0
"""Until a server that has not answered is given up."""
PROBE_S, POLL_S = 2.0, 0.3
LAST_LINES = 15
OK, UNAUTHORIZED, FORBIDDEN, FAILURE = 200, 401, 403, 500
"""HTTP statuses; FAILURE and above are of a server that does not work."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Stores that MLflow's server reads."""
ELSEWHERE = (".quickstart/runs", "*")
"""Where runs may be too, for a hint; patterns."""


@dataclass
class Page:
    """One of the two: its address, and its server if it was started here.

    Example: ``Page("MLflow", "http://127.0.0.1:5000", "runs/mlflow.db", "/health")``
    """

    name: str
    address: str
    about: str
    """What it shows, in a few words."""
    health: str = ""
    """Path that answers 200 once all is there."""
    server: Child | None = None
    has_answered: bool = False


def show_pages(
    console: Console,
    runs: Path | None,
    tracking_uri: str | None,
    *,
    mlflow_port: int | None = None,
    prefect_port: int | None = None,
    is_opened: bool = True,
) -> None:
    """Start what does not run yet, print the addresses, and stay until a signal comes or a server ends.

    Args:
        console: of the person.
        runs: folder of run folders, or one run folder.
        tracking_uri: of a store or a server, instead of the one that the runs use.
        mlflow_port: of the page; None: a free one.
        prefect_port: likewise.
        is_opened: show the pages in a browser, where there is one.
    Raises: UserError for a store that is not there, or a port that is taken.
    """
    uri = tracking_uri or find_tracker(runs or Path("runs"))
    remark = check_tracker(uri)
    for_mlflow = choose_port(mlflow_port, MLFLOW_PORT, "--mlflow-port")
    for_prefect = choose_port(prefect_port, PREFECT_PORT, "--prefect-port")
    if for_mlflow == for_prefect:
        raise UserError(f"--mlflow-port and --prefect-port are both {for_mlflow}; choose two")
    pages: list[Page] = []
    with tempfile.TemporaryDirectory(prefix="rlhf-ui-") as logs:
        try:
            with store_lock(uri):  # until it answers: a run that begins now must not migrate the store too
                pages.append(mlflow_page(uri, for_mlflow, Path(logs)))
                pages[0].about += remark
                pages.append(prefect_page(console, for_prefect, Path(logs)))
                with console.status("starting " + " and ".join(p.name for p in pages if p.server is not None)):
                    wait_for(pages)
            views = [view_page(pages[0].address, each) for each in experiments_in(runs or Path("runs"), uri)]
            print_pages(console, pages, views)
            if is_opened and console.is_terminal and _has_browser():
                for address in (views[0] if len(views) == 1 else pages[0].address, pages[1].address):
                    webbrowser.open(address)
            stay(pages)
        finally:
            end([page.server for page in pages if page.server is not None])


def find_tracker(runs: Path) -> str:
    """The tracker of the runs in a folder. Raises UserError if there is none yet, or more than one."""
    found = trackers_in(runs)
    if len(found) == 1:
        if is_closed(tracker_at(found[0])):
            raise UserError(
                f"--runs {runs} names the tracker {without_credentials(found[0])}, and you have not; if you trust it, "
                "give it as --tracking-uri"
            )
        return found[0]
    if found:
        shown = ", ".join(without_credentials(uri) for uri in found)
        raise UserError(
            f"--runs {runs}: its runs use {len(found)} trackers ({shown}); give one of them as --tracking-uri"
        )
    others = [path for pattern in ELSEWHERE for path in sorted((runs if pattern == "*" else Path()).glob(pattern))]
    hint = next((f"; there are some with --runs {path}" for path in others if trackers_in(path)), "")
    what = "holds no run that MLflow knows" if runs.is_dir() else "is not there: no run has been made"
    raise UserError(f"--runs {runs} {what} yet{hint or '; `rlhf quickstart` or `rlhf train` makes one'}")


def check_tracker(uri: str) -> str:
    """Look whether there is anything to show.

    Returns: a remark for a person; mostly empty.
    Raises: UserError if an empty store would be made, a store is half made, or a server does not answer or refuses.
    """
    scheme, mark, rest = uri.partition("://")
    shown = without_credentials(uri)
    if scheme in ("http", "https"):
        return _check_server(uri, shown)
    if problem := address_problem(uri):
        raise UserError(problem)
    if not mark or scheme.partition("+")[0] not in DATABASES:
        raise UserError(
            f"the tracker {without_secrets(shown)!r} is neither a server (http://...) nor a database that MLflow reads "
            f"({', '.join(DATABASES)}); give --tracking-uri sqlite:///FOLDER/{DATABASE}, say"
        )
    database = Path(rest.removeprefix("/").partition("?")[0])
    if scheme == "sqlite" and not database.is_file():
        raise UserError(f"the tracking database {database} is not there: no run has been tracked in it yet")
    if scheme == "sqlite" and _state_of(database) == "half-made":
        raise UserError(
            f"the tracking database {database} was left half made, and holds no run: the next run beside it, or "
            "`rlhf resume` of one, puts it aside and makes another"
        )
    return ""


def _state_of(database: Path) -> str:
    try:
        return state_of(database)
    except (RefusalError, ConnectionError) as error:
        raise UserError(str(error)) from None


def _check_server(uri: str, shown: str) -> str:
    status = _status(uri, trusted=True)
    if status == UNAUTHORIZED:
        return "; it asks for a user and password"
    if status == FORBIDDEN:
        raise UserError(
            f"the MLflow server at {shown} refuses (403): it does not accept that address, or this user; ask who runs "
            "it for its --allowed-hosts, or for the permission"
        )
    if status is None or status >= FAILURE:
        what = "does not answer" if status is None else f"fails ({status})"
        raise UserError(f"the MLflow server at {shown} {what}; start it, or give --tracking-uri")
    if status != OK:
        raise UserError(f"{shown} does not answer as an MLflow server ({status}); give --tracking-uri")
    return ""


def choose_port(asked: int | None, usual: int, option: str) -> int:
    """The port asked for, the usual one if it is free, or any. Raises UserError if the one asked for is taken."""
    if asked is not None:
        if not _is_free(asked):
            raise UserError(
                f"{option} {asked} is in use, or not allowed; choose another, or leave it out for a free one"
            )
        return asked
    if _is_free(usual):
        return usual
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def mlflow_page(uri: str, port: int, logs: Path) -> Page:
    """MLflow's page: that of the server that the tracker is, or of one that is started on it."""
    if uri.startswith("http"):
        return Page("MLflow", without_credentials(uri), "runs already", has_answered=True)
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not among the arguments, which every user of the machine can read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes of 270 MB
        "DO_NOT_TRACK": "true",
    }
    if uri.startswith("sqlite:///"):  # of experiments that are made on the page: where those of the runs are
        artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = str(artifacts)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    server = Child(command, logs / "mlflow.log", environment)
    about = without_credentials(uri).removeprefix("sqlite:///")
    return Page("MLflow", f"http://{HOST}:{port}", about, "/health", server)


def prefect_page(console: Console, port: int, logs: Path) -> Page:
    """Prefect's page: that of the configured server, or of one that is started on this user's database."""
    configured = PREFECT_API_URL.value()
    if configured and api_answers():
        address = without_credentials(configured).removesuffix("/").removesuffix("/api")
        return Page("Prefect", address, "runs already", has_answered=True)
    if configured:
        print_warning(
            console, f"PREFECT_API_URL {without_credentials(configured)} does not answer; another server is started"
        )
    address = f"http://{HOST}:{port}"
    environment = os.environ | {
        "PREFECT_API_URL": f"{address}/api",  # the page asks for it
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",  # what it says before it dies is shown
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "true",
    }
    server = Child([sys.executable, "-P", "-m", "prefect", "server", "start"], logs / "prefect.log", environment)
    return Page("Prefect", address, "flow runs of this user", "/api/health", server)


def wait_for(pages: Sequence[Page]) -> None:
    """Until all of them answer. Raises UserError if a server ends before, or does not answer in time."""
    until = time.monotonic() + START_S
    while not all(page.has_answered for page in pages):
        for page in pages:
            if page.server is not None:
                _check_lives(page, page.server)
                page.has_answered = page.has_answered or (
                    _answers(page.address + page.health) and _answers(page.address)
                )
                if time.monotonic() > until and not page.has_answered:
                    raise UserError(
                        f"{page.name} has not answered for {START_S:g} s; it has said:", *_said(page.server)
                    )
        time.sleep(POLL_S)


def stay(pages: Sequence[Page], pause: Callable[[float], None] = time.sleep) -> None:
    """Until a signal comes. Raises UserError if a server ends by itself."""
    while True:
        for page in pages:
            if page.server is not None:
                _check_lives(page, page.server)
        pause(POLL_S)


def print_pages(console: Console, pages: Sequence[Page], views: Sequence[str] = ()) -> None:
    """The addresses, how runs get there, and how it ends."""
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for page in pages:
        table.add_row(Text(page.name, style="bold"), Text(page.address, style=f"link {page.address}"), Text(page.about))
    console.print(table)
    for view in views:
        console.print(f"runs with score and KL  {view}", highlight=False, markup=False, soft_wrap=True)
    (prefect,) = (page for page in pages if page.name == "Prefect")
    console.print("runs appear in Prefect while they go, from a terminal where you type", highlight=False)
    console.print(f"  export PREFECT_API_URL={prefect.address}/api", highlight=False, markup=False, soft_wrap=True)
    if any(page.server is not None for page in pages):
        console.print("Ctrl-C ends what was started here", highlight=False)


def _check_lives(page: Page, server: Child) -> None:
    code = server.poll()
    if code is not None:
        raise UserError(f"{page.name} has ended by itself (exit code {code}); it has said:", *_said(server))


def _said(server: Child) -> list[str]:
    return [f"  {line}" for line in server.last_lines(LAST_LINES)] or ["  nothing"]


def _answers(address: str) -> bool:
    return _status(address) == OK


def _status(address: str, *, trusted: bool = False) -> int | None:
    """The HTTP status of an address; None if nobody answers. ``trusted``: by MLflow's own password and certificate."""
    named: dict[str, Any] = {}
    if trusted:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
        if user and password:
            named["auth"] = (user, password)
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            named["headers"] = {"Authorization": f"Bearer {token}"}
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
            named["verify"] = False
        elif certificate := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
            named["verify"] = certificate
    try:
        return httpx.get(address, timeout=PROBE_S, follow_redirects=True, **named).status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError:
            return False
    return True


def _has_browser() -> bool:
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
