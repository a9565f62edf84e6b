"""Draws the screenshots of the documentation from real runs, servers and pages.

    PYTHONPATH=.:tests python docs/screenshots.py [--folder DIR]       some ten minutes on two cores; needs chromium

A quickstart and two more runs with other targets of KL, shown by a Prefect server, by MLflow's own server, by the page
of `rlhf view` in a browser, and by commands in a terminal. What is in the folder already is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from chromium import Tab, chromium_tab
from rich.console import Console
from rich.text import Text
from ruamel.yaml import YAML

from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder

IMAGES = Path(__file__).parent / "images"
COLUMNS = 118
TARGETS = (2, 8)
"""Nats that the two further runs are held at."""
SPINNER = re.compile("[\u2800-\u28ff] [a-z]")
"""Of a line that is gone once its work is done."""
QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def main() -> None:
    """Train what is missing, then take every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".quickstart"), help="of the text world and its runs")
    folder = parser.parse_args().folder
    os.environ |= QUIET
    with server("prefect", "server", "start", "--host", "127.0.0.1") as prefect:
        os.environ["PREFECT_API_URL"] = f"{prefect}/api"
        runs = trained(folder)
        draw_terminals(runs)
        with chromium_tab() as tab:
            draw_view(tab, runs[0])
            draw_prefect(tab, runs[0], prefect)
            store = f"sqlite:///{(folder / 'runs' / 'mlflow.db').resolve()}"
            with server("mlflow", "server", "--backend-store-uri", store, "--workers", "1") as mlflow:
                draw_mlflow(tab, runs[0], mlflow)


def trained(folder: Path) -> list[Path]:
    """The quickstart's run, and two of its config with other targets."""
    first = folder / "runs" / "quickstart"
    if not first.is_dir():
        rlhf("quickstart", "--folder", folder)
        newest = max((folder / "runs").glob("2*"))
        newest.rename(first)
    runs = [first]
    config = folder / "quickstart.yaml"
    YAML().dump(json.loads(RunFolder.open(first).config.model_dump_json()), config)
    for target in TARGETS:
        runs.append(folder / "runs" / f"target-{target}")
        if not runs[-1].is_dir():
            rlhf("train", "--config", config, "--set", f"kl.target={target}", "--run-dir", runs[-1])
    return runs


def draw_terminals(runs: Sequence[Path]) -> None:
    """Commands with what they print, as pictures of a terminal."""
    draw_terminal(IMAGES / "inspect.svg", "inspect", runs[0], "--by", "kl", "--iteration", 39, "--limit", 4)
    draw_terminal(IMAGES / "compare.svg", "compare", *runs)
    draw_terminal(IMAGES / "replay.svg", "replay", runs[0], "--iteration", 30)


def draw_view(tab: Tab, run: Path) -> None:
    """The page of a run, dark and light."""
    rlhf("view", run)
    for scheme in ("light", "dark"):
        tab.look(width=1440, height=1000, scheme=scheme)
        tab.open(run / "view.html")
        time.sleep(0.5)
        tab.screenshot(IMAGES / f"view-{scheme}.png")


def draw_prefect(tab: Tab, run: Path, server: str) -> None:
    """The page that a flow run keeps in Prefect: its newest Markdown artifact."""
    flow_run = read_record(run / "prefect.json")["flow_run_id"]
    wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "type": {"any_": ["markdown"]}}}
    found = httpx.post(f"{server}/api/artifacts/filter", json=wanted, timeout=30).json()
    page = next(artifact for artifact in found if artifact["key"] != "mlflow-run")
    show(tab, f"{server}/artifacts/artifact/{page['id']}", width=1300, height=1000)
    tab.screenshot(IMAGES / "prefect.png")


def draw_mlflow(tab: Tab, run: Path, server: str) -> None:
    """The runs of an experiment, drawn beside each other by MLflow, with a few of its charts."""
    experiment = read_record(run / "mlflow.json")["experiment_id"]
    show(tab, f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART", width=1500, height=900)
    tab.evaluate("document.querySelector('[aria-label=Close]')?.click()")  # its assistant
    tab.evaluate("document.querySelector('input[placeholder=\"Search metric charts\"]').focus()")
    tab.call("Input.insertText", text="objective/")
    time.sleep(6)
    tab.screenshot(IMAGES / "mlflow.png")


def show(tab: Tab, address: str, *, width: int, height: int) -> None:
    """A page that draws itself when its data has come."""
    tab.look(width=width, height=height)
    tab.call("Page.navigate", url=address)
    time.sleep(12)


def draw_terminal(path: Path, *arguments: Any) -> None:
    """What a command prints, with its colours."""
    said = subprocess.run(
        program("rlhf", *arguments),
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        check=True,
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi("\n".join(line for line in said.stdout.splitlines() if not SPINNER.search(line))))
    console.save_svg(str(path), title=" ".join(["rlhf", *map(str, arguments)]))


def rlhf(*arguments: Any) -> None:
    """Run a command to its end."""
    subprocess.run(program("rlhf", *arguments), check=True)


def program(name: str, *arguments: Any) -> list[str]:
    """A program of this environment with its arguments."""
    return [str(Path(sys.executable).parent / name), *map(str, arguments)]


@contextlib.contextmanager
def server(*command: str) -> Iterator[str]:
    """A server on a free port of this machine, for as long as it is needed; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    own = {"PREFECT_API_URL": f"{address}/api"}  # Prefect's page asks for it
    options = [*program(*command), "--port", str(port)]
    process = subprocess.Popen(options, stdout=subprocess.DEVNULL, env=os.environ | own)
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
