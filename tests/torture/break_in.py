"""Loads payloads, each in a watched child of its own.

python -m torture.break_in FOLDER TINY NAME [NAME ...]      writes FOLDER/report.json

A process of its own, so that nothing says "offline" and nothing is imported that a payload could hide behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tiny_world import tiny_in

LIMIT_S = 40
ROOM_BYTES = 3 << 30
"""What a child may take beyond what it has: a payload that fills the memory is stopped by that, and fails."""


@dataclass(frozen=True)
class Seen:
    """What a payload did.

    Example: ``Seen("yaml[bomb]", "refused", "config.yaml uses a YAML alias ...", ())``
    """

    name: str
    outcome: str
    """refused | harmless, or what must not be: a raw error, killed."""
    said: str
    events: Sequence[str] = ()
    """What the watch saw, and the canary if it was made."""

    @property
    def is_good(self) -> bool:
        """Refused in a sentence, or read as data; and nothing else happened."""
        return self.outcome in {"refused", "harmless"} and not self.events


def main(arguments: Sequence[str]) -> None:
    """Prepare, then load each payload in a child."""
    folder, tiny, *names = arguments
    base = Path(folder)
    for kind in ("cache", "tmp"):
        (base / kind).mkdir(parents=True)
    import tempfile

    tempfile.tempdir = str(base / "tmp")
    sys.dont_write_bytecode = True
    import datasets  # noqa: F401 - here, so that no child reads the code of libraries
    import torch

    torch.set_num_threads(1)
    from torture.lair import Lair
    from torture.payloads import PAYLOADS
    from torture.runs import battery_config, warm

    world = tiny_in(Path(tiny))
    (base / "warm").mkdir()
    warm(battery_config(world), base / "warm")
    finished = base / "warm" / "run"
    seen = [open_door(base, name, Lair(base / str(i), world, finished), PAYLOADS[name]) for i, name in enumerate(names)]
    (base / "report.json").write_text(json.dumps([asdict(one) for one in seen]))


def open_door(base: Path, name: str, lair: object, make: Callable[..., Callable[[], object]]) -> Seen:
    """Make a payload and load it in a child; what the child did."""
    from torture.lair import Lair

    assert isinstance(lair, Lair)
    lair.folder.mkdir()
    log, said = base / "events", base / "said"
    for file in (log, said):
        file.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        status = 9
        with contextlib.suppress(BaseException):
            status = _in_child(base, log, said, lambda: make(lair))
        os._exit(status)
    with _alarm(child):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    events = log.read_text().splitlines() if log.exists() else []
    if lair.canary.exists():
        events.append("the canary was made: the payload ran")
    text = said.read_text() if said.exists() else ""
    outcome = {0: "harmless", 3: "refused", 4: "a raw error"}.get(status, f"ended by {status}")
    return Seen(name, outcome, text, tuple(dict.fromkeys(events)))


def _in_child(base: Path, log: Path, said: Path, make: Callable[[], Callable[[], object]]) -> int:
    from torture.watching import watch

    from rlhf_core.contracts.errors import RlhfError
    from rlhf_core.prompts import render_process

    door = make()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    said.touch()
    out = os.open(said, os.O_WRONLY)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, size + ROOM_BYTES))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    watch(
        lambda line: (os.write(descriptor, line.encode() + b"\n"), None)[1],
        foreign=base,
        writable=[base / "cache", base / "tmp"],
        commands=[[sys.executable, "-P", render_process.__file__]],
    )
    try:
        door()
    except RlhfError as error:
        os.write(out, str(error).encode(errors="replace"))
        return 3
    except BaseException as error:  # whatever else comes out is what is looked for
        os.write(out, f"{type(error).__name__}: {error}".encode(errors="replace")[:2000])
        return 4
    return 0


@contextlib.contextmanager
def _alarm(child: int) -> Iterator[None]:
    """Kill a child that does not come back."""

    def kill(_signal: int, _frame: object) -> None:
        os.kill(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(
    folder: Path, tiny: Path, names: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Seen]:
    """Load payloads in a process of its own. Raises RuntimeError if that process fails as a whole."""
    kept = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    environment = kept | {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "errors").open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "torture.break_in", str(folder), str(tiny), *names],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=errors,
            stderr=errors,
        )
        while child.poll() is None:
            progress(sum(path.name.isdecimal() for path in folder.iterdir()), len(names))
            time.sleep(0.2)
    if child.returncode:
        raise RuntimeError((folder / "errors").read_text()[-3000:])
    return [Seen(**values) for values in json.loads((folder / "report.json").read_text())]


if __name__ == "__main__":
    main(sys.argv[1:])
