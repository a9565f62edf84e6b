"""A run in an object store: SIGKILL at a request, just before it and just after it, then resumed on another machine.

The server is moto's, in a process of its own. Another machine is another cache: it has nothing but what the store has.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3_server import S3Server, s3_server
from torture.battery import Effort, Outcome
from torture.deaths import KILLED, torn
from torture.runs import battery_config, fingerprint, in_child, start, start_or_go_on

from rlhf_core.contracts.config import RunConfig
from rlhf_core.store import lease
from rlhf_core.store.address import CACHE
from rlhf_core.store.objects import Objects
from rlhf_core.store.opening import reading, writing

NAME = "kill -9 of a run in an object store"
GOAL = (
    "≥ 200 deaths at requests, before and after, each resumed on another machine: 100 % bit-identical, 0 lost, 0 torn"
)
SMALL = 2
"""Deaths of the small row."""
LEASE_S = "6"
"""Long enough for a machine that is busy with other rows: a holder that is not heard for 4 s ends its run."""


def measure(effort: Effort) -> Outcome:
    """Each death is a process, and each resume another one, which waits until the lease of the dead one is over."""
    config = battery_config(effort.tiny, {"artifacts": {"keep_iterations": 1}})
    failures: list[str] = []
    with s3_server() as server:
        store = Store(server, effort.folder, config)
        on_disk, whole = effort.folder / "disk", f"s3://{server.new_bucket()}/runs/whole"
        if in_child(lambda: start(config, on_disk), log=store.log):
            raise RuntimeError(store.log.read_text())
        expected, count = fingerprint(on_disk), store.count(whole)
        cases = list(itertools.product(range(1, count + 1), (False, True)))
        if not effort.full:
            cases = [cases[(2 * i + 1) * len(cases) // (2 * SMALL)] for i in range(SMALL)]
        for done, (at, after) in enumerate(cases):
            problems = store.die_and_resume(f"s3://{server.new_bucket()}/runs/run", at, expected, after=after)
            when = f"killed {'after' if after else 'before'} request {at} of {count}"
            failures += [f"{when}: {problem}" for problem in problems[:1]]
            effort.progress(done + 1, len(cases))
    return Outcome(
        tried=len(cases),
        passed=len(cases) - len(failures),
        figure=f"{len(cases)} deaths at {count} requests: {len(cases) - len(failures)} of {len(cases)} bit-identical "
        "with a run on a disk",
        goal_size=200,
        failures=failures[:20],
        numbers={"requests": count},
    )


class Store:
    """Lives and deaths of runs in a store."""

    def __init__(self, server: S3Server, folder: Path, config: RunConfig) -> None:
        self.server, self.folder, self.config = server, folder, config
        self.log, self._machines = folder / "log", itertools.count()

    def count(self, url: str) -> int:
        """Make a whole run; returns how many requests changed the store. Raises RuntimeError if it fails."""
        counted = self.folder / "count"
        if self._live(url, lambda number: counted.write_text(str(number)), lambda _number: None):
            raise RuntimeError(self.log.read_text())
        return int(counted.read_text())

    def die_and_resume(self, url: str, at: int, expected: str, *, after: bool) -> list[str]:
        """Whatever is wrong."""

        def die(number: int) -> None:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

        before, behind = (self._nothing, die) if after else (die, self._nothing)
        end = self._live(url, before, behind)
        if end != KILLED:
            return [f"it did not die: exit {end}: {self.log.read_text()[-300:] if end else ''}"]
        records = self._records(url)
        if self._live(url, self._nothing, self._nothing):
            return [f"the resume failed: {self.log.read_text()[-600:]}"]
        problems = [
            f"lost: {name} was in the store, and was written again"
            for name, etag in self._records(url).items()
            if records.get(name, etag) != etag
        ]
        if self._elsewhere(lambda: self._look(url, expected)):
            problems.append(self.log.read_text().strip().splitlines()[-1])
        return problems

    def _look(self, url: str, expected: str) -> None:
        assert fingerprint(reading(url)) == expected, "another result than that of the run on a disk"

    def _live(self, url: str, before: Callable[[int], object], behind: Callable[[int], object]) -> int:
        def work() -> None:
            numbers = itertools.count(1)

            def counted(request: Callable[..., Any]) -> Callable[..., Any]:
                def do(objects: Objects, name: str, *arguments: Any) -> Any:
                    if name == lease.NAME:  # renewed by the clock
                        return request(objects, name, *arguments)
                    number = next(numbers)
                    before(number)
                    answer = request(objects, name, *arguments)
                    behind(number)
                    return answer

                return do

            for name in ("put", "put_new", "put_over", "delete"):
                setattr(Objects, name, counted(getattr(Objects, name)))
            with writing(url) as folder:
                if problems := torn(folder):
                    raise AssertionError(problems[0])
                start_or_go_on(self.config, folder)

        return self._elsewhere(work)

    def _elsewhere(self, work: Callable[[], None]) -> int:
        """Do something in a child that has never seen the run; returns how it ended."""
        cache = self.folder / f"machine-{next(self._machines)}"

        def there() -> None:
            os.environ.update(self.server.environment | {CACHE: str(cache), lease.LEASE: LEASE_S})
            work()

        end = in_child(there, log=self.log)
        shutil.rmtree(cache, ignore_errors=True)
        return end

    def _records(self, url: str) -> dict[str, str]:
        """ETag of each stage's record."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        found = self.server.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/iterations/").get("Contents", ())
        return {each["Key"]: each["ETag"] for each in found if each["Key"].endswith(".json")}

    @staticmethod
    def _nothing(_number: int) -> None:
        pass
