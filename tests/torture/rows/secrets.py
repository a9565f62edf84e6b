"""Secrets: none reaches a file or a log, whether it is used, refused or in the way of an error.

Each canary is a secret in one of the places where people keep them. Afterwards every byte that was written is
searched, also inside Arrow, zstd and sqlite, for the canary as it is, quoted, and in base64.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pyarrow as pa
import ruamel.yaml
from iteration import tiny_tree
from prefect.settings import PREFECT_API_URL, temporary_settings
from torture.battery import Effort, Outcome
from torture.prefect_server import free_port, prefect_server
from torture.rows.mlflow_outages import mlflow_server
from torture.runs import fork

from flows.cli import main

NAME = "secrets"
GOAL = "12 canaries, 0 found in any file or log"
ENVIRONMENT = (
    "HF_TOKEN",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "REWARD_TOKEN",
    "COMPANY_DATABASE",
)
"""Variables that hold a canary each; ``REWARD_TOKEN`` is the reward's ``token_env``."""
ZSTD = b"\x28\xb5\x2f\xfd"
PARAMS_FUNCTION = "length"


def canary(place: str) -> str:
    """A secret that stands nowhere else."""
    return f"Zq7{place.replace('_', '').replace(' ', '').lower()}x9Wv"


def environment(api_port: int, tracker_port: int) -> dict[str, str]:
    """Variables of a person with many secrets."""
    values = {name: canary(name) for name in ENVIRONMENT}
    return values | {
        "MLFLOW_TRACKING_URI": f"http://someone:{canary('tracking uri in the environment')}@127.0.0.1:{tracker_port}",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "PREFECT_API_URL": f"http://someone:{canary('prefect url')}@127.0.0.1:{api_port}/api",
        "PREFECT_LOGGING_LEVEL": "DEBUG",
    }


def refused() -> dict[str, tuple[Mapping[str, Any], str]]:
    """Configs with a secret in them: place -> (changes, what the refusal names)."""
    hosts = ["127.0.0.1"]
    http_reward: dict[str, Any] = {"kind": "http"}

    def reward(component: Mapping[str, Any]) -> dict[str, Any]:
        return {"reward": {"components": [component], "allowed_hosts": hosts}}

    def function(**params: Any) -> dict[str, Any]:
        return reward({"kind": "function", "function": PARAMS_FUNCTION, "params": params})

    first = "reward.components.0."
    return {
        "tracking uri": ({"tracking": {"uri": f"http://me:{canary('tracking uri')}@127.0.0.1:9"}}, "tracking.uri"),
        "tracker as user": ({"tracking": {"uri": f"https://{canary('tracker as user')}@example.org"}}, "tracking.uri"),
        "database": ({"tracking": {"uri": f"postgresql://me:{canary('database')}@127.0.0.1/mlflow"}}, "tracking.uri"),
        "database query": (
            {"tracking": {"uri": f"postgresql://me@127.0.0.1/mlflow?password={canary('database query')}"}},
            "tracking.uri",
        ),
        "url user": (reward({**http_reward, "url": f"http://me:{canary('url user')}@127.0.0.1/s"}), f"{first}url"),
        "url query": (
            reward({**http_reward, "url": f"http://127.0.0.1/s?api_key={canary('url query')}"}),
            f"{first}url",
        ),
        "url broken": (reward({**http_reward, "url": f"http:/me:{canary('url broken')}@127.0.0.1/s"}), f"{first}url"),
        "params": (function(api_key=canary("params")), f"{first}params.api_key"),
        "params deep": (function(headers={"Authorization": canary("params deep")}), f"{first}params.headers"),
        "token env": (
            reward({**http_reward, "url": "http://127.0.0.1/s", "token_env": canary("token env")}),
            f"{first}token_env",
        ),
        "token env odd": (
            reward({**http_reward, "url": "http://127.0.0.1/s", "token_env": f"sk-{canary('token env odd')}"}),
            f"{first}token_env",
        ),
        "anywhere": ({"tracking": {"run_name": f"hf_{canary('anywhere')}AAAABBBBCCCCDDDD"}}, "tracking.run_name"),
    }


def measure(effort: Effort) -> Outcome:
    """Refusals, then a run that uses its secrets and meets errors; then the search."""
    _prove_the_search(effort.folder / "proof")
    place = effort.folder / "place"
    place.mkdir()
    failures = _refusals(effort, place)
    with _reward_server(place) as port:
        failures += _runs(effort, place, port)
    canaries = {name: canary(name) for name in (*ENVIRONMENT, "tracking uri in the environment", "prefect url")}
    canaries |= {name: canary(name) for name in refused()}
    configs = place / "configs"
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and configs not in path.parents]
    found = search(files, canaries)
    failures += [f"the canary {name!r} is in {path.relative_to(place)}" for name, path in found]
    read = sum(path.stat().st_size for path in files)
    leaked = {name for name, _ in found}
    return Outcome(
        tried=len(canaries),
        passed=len(canaries) - max(len(leaked), bool(failures)),
        figure=f"{len(canaries)} canaries, {len(leaked)} found in {len(files)} files and logs ({read / 1e6:.1f} MB)",
        goal_size=12,
        failures=failures[:20],
        numbers={"files": len(files), "bytes": read},
    )


def _refusals(effort: Effort, place: Path) -> list[str]:
    failures: list[str] = []
    (place / "configs").mkdir()
    for number, (name, (changes, field)) in enumerate(refused().items()):
        config, log = place / "configs" / f"{number}.yaml", place / f"refused-{number}.log"
        _write_yaml(config, tiny_tree(effort.tiny) | {"tracking": {"enabled": False}} | dict(changes))
        status = _command(["check", "--config", str(config)], {}, log)
        said = log.read_text()
        if status != 2 or field not in said or "Traceback" in said:
            failures.append(f"{name}: exit {status} and not one sentence about {field}: {said[:300]!r}")
    return failures


def _runs(effort: Effort, place: Path, port: int) -> list[str]:
    """A run with an http reward that repeats our token, a tracker that is not there, and a resume of it."""
    tree = tiny_tree(effort.tiny) | {
        "num_iterations": 2,
        "tracking": {"enabled": True},
        "reward": {
            "allowed_hosts": ["127.0.0.1"],
            "components": [
                {
                    "kind": "http", "url": f"http://127.0.0.1:{port}/score", "token_env": "REWARD_TOKEN",
                    "retries": 0, "on_error": "substitute", "substitute": 0.5,
                },
                {"kind": "model", "model": str(effort.tiny.reward)},
            ],
        },
    }  # fmt: skip
    tree["policy"] = {"model": str(effort.tiny.policy), "critic": {"init": "policy"}}
    config = place / "run.yaml"
    _write_yaml(config, tree)
    train = ["train", "--config", str(config), "--run-dir"]
    strict = ["--set", "reward.components.0.on_error=fail", "--set", "reward.components.0.substitute=null"]
    few = ["--num-prompts", "2", "--samples", "1", "--frontier-samples", "20"]
    home = {"PREFECT_HOME": str(place / "prefect")}
    nobody = environment(free_port(), free_port()) | home
    run = str(place / "run")
    if not effort.full:
        done = [(_command, [*train, run], nobody, 0), (_command, [*train, str(place / "strict"), *strict], nobody, 2)]
        return _done(place, done)
    with prefect_server(place / "server") as api, mlflow_server(place / "mlflow") as tracker:
        there = environment(api.port, tracker) | home
        failures = _done(place, [
            (_real_command, [*train, run], there, 0),
            (_real_command, ["evaluate", run, *few], there, 0),
            (_real_command, [*train, str(place / "strict"), *strict], there, 2),
        ])  # fmt: skip
    return failures + _done(place, [
        (_real_command, [*train, str(place / "other")], nobody, 0),
        (_real_command, ["resume", run], nobody, 0),
        (_real_command, ["inspect", run], nobody, 0),
        (_real_command, ["evaluate", str(place / "other"), *few], nobody, 0),
    ])  # fmt: skip


def _done(place: Path, commands: Sequence[tuple[Callable[..., int], list[str], Mapping[str, str], int]]) -> list[str]:
    """Run commands, each with a log of its own; what ended otherwise than it should."""
    failures: list[str] = []
    for how, arguments, variables, wanted in commands:
        log = place / f"{len(list(place.glob('command-*.log')))}-{arguments[0]}.log"
        log = place / f"command-{log.name}"
        status = how(arguments, variables, log)
        if status != wanted:
            failures.append(f"rlhf {arguments[0]} ended with {status}, not {wanted}: {log.read_text()[-400:]!r}")
    return failures


def _command(arguments: list[str], variables: Mapping[str, str], log: Path) -> int:
    """The command line in a forked child, with everything that it prints in a file. It finds no Prefect API."""

    def work() -> None:
        _into(log)
        os.environ.update(variables)
        with temporary_settings({PREFECT_API_URL: variables.get("PREFECT_API_URL", "")}):
            main(arguments)

    return os.waitstatus_to_exitcode(os.waitpid(fork(lambda: _exit_with(work), log=log.with_suffix(".raised")), 0)[1])


def _exit_with(work: Callable[[], None]) -> None:
    """End the process as the interpreter would."""
    try:
        work()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else bool(error.code))


def _real_command(arguments: list[str], variables: Mapping[str, str], log: Path) -> int:
    """The command line in a process of its own."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    with log.open("w") as out:
        return subprocess.run(command, env=os.environ | variables, stdout=out, stderr=out, check=False).returncode


def _into(log: Path) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


@contextlib.contextmanager
def _reward_server(place: Path) -> Iterator[int]:
    """A service that answers every request with its own headers; gives its port."""
    port = free_port()
    child = fork(lambda: http.server.HTTPServer(("127.0.0.1", port), _Echo).serve_forever(), log=place / "echo.raised")
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield port
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class _Echo(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = f"no scores for {self.headers['Authorization']}".encode()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Say nothing."""


def search(files: list[Path], canaries: Mapping[str, str]) -> list[tuple[str, Path]]:
    """(name, file) wherever a canary stands, in the bytes of a file or in what they unpack to."""
    forms = {name: _forms(value) for name, value in canaries.items()}
    found: list[tuple[str, Path]] = []
    for path in files:
        contents = list(_contents(path))
        found += [
            (name, path)
            for name, looks in forms.items()
            if any(look in content for content in contents for look in looks)
        ]
    return found


def _forms(value: str) -> list[bytes]:
    """A text as it is, quoted, and in base64 wherever it begins in a longer one."""
    plain = value.encode()
    coded = [base64.b64encode(b"\0" * shift + plain)[4 * bool(shift) : -4] for shift in range(3)]
    return [plain, quote(value, safe="").encode(), *coded]


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data.startswith(ZSTD):
        yield pa.input_stream(pa.py_buffer(data), compression="zstd").read()
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if data.startswith(b"ARROW1"):
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        yield json.dumps(table.to_pylist(), default=str).encode() + str(table.schema.metadata).encode()
    if data.startswith(b"SQLite format 3\0"):  # a long text may lie on several pages
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            yield "\n".join(database.iterdump()).encode(errors="replace")


def _prove_the_search(folder: Path) -> None:
    """Raise RuntimeError unless a canary is found wherever one could be."""
    folder.mkdir()
    secret = canary("proof")
    (folder / "plain").write_text(f"x {secret} y")
    (folder / "quoted").write_text(quote(f"p@ss/{secret}"))
    (folder / "base64").write_bytes(base64.b64encode(f"someone:{secret}".encode()))
    (folder / "zstd").write_bytes(pa.Codec("zstd").compress(f"{'a' * 500}{secret}{'a' * 500}".encode(), asbytes=True))
    table = pa.table({"text": [f"{'b' * 300}{secret}"] * 50})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(folder / "arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    with contextlib.closing(sqlite3.connect(folder / "sqlite")) as database:
        database.execute("create table t (x)")
        database.execute("insert into t values (?)", (f"{'c' * 4050}{secret}{'c' * 9000}",))
        database.commit()
    files = sorted(folder.iterdir())
    seen = {path for _, path in search(files, {"proof": secret})}
    if missed := [path.name for path in files if path not in seen]:
        raise RuntimeError(f"the search does not find a canary in {', '.join(missed)}")


def _write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    with path.open("w") as out:
        cast("Any", ruamel.yaml.YAML(typ="safe", pure=True)).dump(dict(tree), out)
