"""Where Python looks for modules, here and in every process that is started: never in a folder by chance.

``cd RUN && rlhf resume .`` must not import the run folder's ``torch.py``. Python looks in the working folder for
``python -m`` and ``python -c`` unless ``PYTHONSAFEPATH`` is set, and for each empty or relative entry of
``PYTHONPATH``; and multiprocessing, torchrun, Ray, uvicorn and MLflow start Python in these ways.

    settle_search_path()   at the beginning of a command, flow or worker: this process, and all that it starts
    child_environment()    of a process that runs this package
    others_environment()   of one that runs another Python

The folder of a reward function comes last, and only where one is asked for: ``rewards.imports.make_importable``.
Limitation: what Python has imported before the first line here, as ``sitecustomize`` of a relative ``PYTHONPATH``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Final

from rlhf_core.contracts.run_places import run_around

ROOT: Final = str(Path(__file__).parents[2])
"""The folder that this very package is imported from."""

_FINDER: Final = "__editable__."
"""Stands for a finder of packages that were installed to be edited, and for no folder."""


def settle_search_path() -> None:
    """Take folders that are here by chance out of this process's path and out of what others inherit."""
    if not sys.flags.safe_path and sys.path and _is_working_folder(sys.path[0]):  # `python -m`, in whatever folder
        del sys.path[0]
    by_chance = {os.path.abspath(place) for place in _listed(os.environ) if not os.path.isabs(place)}  # noqa: PTH100, PTH117
    by_chance -= {ROOT, *filter(os.path.isabs, _listed(os.environ))}  # `site` has made all of them absolute
    sys.path[:] = [place for place in _plain(sys.path) if place not in by_chance]
    if ROOT not in sys.path and not _is_installed():
        sys.path.append(ROOT)
    _settle(os.environ)


def child_environment() -> dict[str, str]:
    """The environment for a Python of ours: it finds this package, and nothing in a folder by chance."""
    return settled(os.environ)


def settled(inherited: Mapping[str, str]) -> dict[str, str]:
    """The same of another environment than this process's."""
    environment = dict(inherited)
    _settle(environment)
    if not _is_installed():
        places = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*filter(None, places), ROOT]))
    return environment


def others_environment() -> dict[str, str]:
    """The environment for the Python of another environment, whose packages are not ours."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return environment | {"PYTHONSAFEPATH": "1"}


def _settle(environment: MutableMapping[str, str]) -> None:
    environment["PYTHONSAFEPATH"] = "1"
    if kept := _plain(_listed(environment)):
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    else:
        environment.pop("PYTHONPATH", None)


def _listed(environment: Mapping[str, str]) -> list[str]:
    return environment.get("PYTHONPATH", "").split(os.pathsep)


def _plain(places: Iterable[str]) -> list[str]:
    """Those that are the same from everywhere, and no part of a run folder."""
    return [
        place
        for place in places
        if place.startswith(_FINDER) or (Path(place).is_absolute() and run_around(Path(place)) is None)
    ]


def _is_working_folder(place: str) -> bool:
    try:
        return place != ROOT and place in ("", str(Path.cwd()))
    except OSError:  # it was removed
        return place == ""


def _is_installed() -> bool:
    return Path(ROOT).name in ("site-packages", "dist-packages")
