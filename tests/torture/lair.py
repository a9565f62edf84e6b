"""A folder that somebody else made: everything in it looks as it should, but for what a payload changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iteration import tiny_tree
from tiny_world import Tiny

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.records import read_record, seal


@dataclass(frozen=True)
class Lair:
    """Where a payload lies.

    Args:
        folder: empty; the payload's own.
        tiny: the tiny world.
        run: a finished run of it, which is copied.
    """

    folder: Path
    tiny: Tiny
    finished: Path

    @property
    def canary(self) -> Path:
        """The file that a payload makes once it runs."""
        return self.folder / "canary"

    @property
    def command(self) -> str:
        """The shell command that makes it."""
        return f"touch {self.canary}"

    @property
    def code(self) -> str:
        """Python that makes it, and has every class that one could ask for."""
        return (
            f"open({str(self.canary)!r}, 'w').close()\n"
            "class Evil:\n    def __init__(self, *a, **k): pass\n"
            "    from_pretrained = classmethod(lambda cls, *a, **k: cls())\n"
            "EvilConfig = EvilModel = EvilTokenizer = EvilTokenizerFast = Evil\n"
            "def score(completions, **kwargs): return [0.0] * len(completions)\n"
        )

    @property
    def pickled(self) -> bytes:
        """A pickle that calls os.system."""
        return b"cposix\nsystem\n(V" + self.command.encode() + b"\ntR."

    def write(self, name: str, data: bytes | str) -> Path:
        """A file of the lair."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def model(self, kind: str = "policy", name: str = "model") -> Path:
        """A copy of a model of the tiny world."""
        return Path(shutil.copytree(getattr(self.tiny, kind), self.folder / name))

    def changed(self, file: Path, values: Mapping[str, Any]) -> None:
        """Change keys of a JSON file, sealed or not."""
        there = json.loads(file.read_text())
        if there.pop("seal", None) is None:
            file.write_text(json.dumps({**there, **values}))
        else:
            file.write_bytes(seal({**read_record(file), **values}))

    def run(self) -> Path:
        """A copy of the finished run."""
        return Path(shutil.copytree(self.finished, self.folder / "run", symlinks=True))

    def change_config(self, run: Path, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the config in a run's record, and seal it again."""
        config = read_record(run / "run.json")["config"]
        change(config)
        self.changed(run / "run.json", {"config": config})

    def reseal_checkpoint(self, path: Path) -> None:
        """Give a checkpoint the digests of what lies in it now."""
        files = {
            str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != "manifest.json"
        }
        self.changed(path / "manifest.json", {"files": files})

    def tree(self, **changes: Any) -> dict[str, Any]:
        """The config of a run on the tiny world, with other sections."""
        return tiny_tree(self.tiny) | changes

    def config(self, **changes: Any) -> Any:
        """The same, as a config."""
        return build_config(self.tree(**changes))
