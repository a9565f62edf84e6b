"""Write one golden file: who made it, from which versions, the inputs and the expected numbers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write(name: str, packages: list[str], cases: dict[str, Any], *, notes: dict[str, str] | None = None) -> None:
    """Write ``<name>.json`` beside this file; every number keeps all its digits."""
    golden = {
        "made_by": f"tests/golden/make_{name}.py",
        "versions": {package: version(package) for package in packages} | (notes or {}),
        "cases": cases,
    }
    path = Path(__file__).parent / f"{name}.json"
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"{path.name}: {len(cases)} cases")
