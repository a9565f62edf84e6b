"""The files of a reward function are found by reading its source: each kind of import, and nothing else's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward
from rlhf_core.contracts.trust import accept_config, accept_values
from rlhf_core.rewards.foreign import changed_functions
from rlhf_core.rewards.function import function_digest, load_function, unseen_modules
from rlhf_core.rewards.imports import imported_modules

SCORE = "def score(responses):\n    return [1.0] * len(responses)\n"
TEAM = {"team/__init__.py": "from .politeness import score\n", "team/lexicon.py": "WORDS = ['please']\n"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder beside the folder of a config, ``exp``."""
    (tmp_path / "exp").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def found(module: str, folder: Path | None) -> list[str]:
    return list(imported_modules(module, None if folder is None else str(folder)))


def accepted(component: dict[str, str]) -> RunConfig:
    """The config of a run that its owner has begun here."""
    config = build_config({"reward": {"components": [component]}})
    accept_config(config)
    return config


@pytest.mark.parametrize(
    ("line", "others"),
    [
        ("from . import lexicon", ["team/lexicon.py"]),
        ("from .lexicon import WORDS", ["team/lexicon.py"]),
        ("from .lexicon import *", ["team/lexicon.py"]),
        ("import team.lexicon as words", ["team/lexicon.py"]),
        ("from team import lexicon", ["team/lexicon.py"]),
        ("from .deep.inner import X", ["team/deep/__init__.py", "team/deep/inner.py", "team/lexicon.py"]),
        ("def late():\n    from . import lexicon", ["team/lexicon.py"]),
        ("try:\n    from . import lexicon\nexcept ImportError:\n    pass", ["team/lexicon.py"]),
        ("import importlib\nx = importlib.import_module('team.lexicon')", ["team/lexicon.py"]),
        ("import importlib\nx = importlib.import_module('.lexicon', __package__)", ["team/lexicon.py"]),
        ("x = __import__('team.lexicon')", ["team/lexicon.py"]),
        ("import helper", ["helper.py"]),
        ("import space.inside", ["space/inside.py"]),
        ("from space import inside", ["space/inside.py"]),
        ("import json, torch, no_such_library", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import lexicon", []),
        ("import rlhf_core.contracts.errors", []),
        ("from .. import beyond", []),
        ("name = 'lexicon'\nimport importlib\nx = importlib.import_module(f'team.{name}')", ["team/lexicon.py", "*"]),
        ("import pkgutil\nx = list(pkgutil.iter_modules())", ["team/lexicon.py", "*"]),
        ("import sys\nsys.path.insert(0, 'x')", ["team/lexicon.py", "*"]),
    ],
)
def test_each_kind_of_import(place: Path, line: str, others: list[str]) -> None:
    deep = {"team/deep/__init__.py": "", "team/deep/inner.py": "from .. import lexicon\nX = 1\n", "team/unused.py": ""}
    beside = {"helper.py": "", "unrelated.py": "", "space/inside.py": "", "team/politeness.py": f"{line}\n{SCORE}"}
    write(place / "exp", TEAM | deep | beside)
    if "*" in others:  # all of the package
        others = [*deep, "team/lexicon.py"]
    assert found("team", place / "exp") == sorted(["team/__init__.py", "team/politeness.py", *others])


def test_a_file_alone_that_computes_imports_stands_for_its_folder(place: Path) -> None:
    write(place / "exp", {"mine.py": "import importlib\nimportlib.import_module(str(1))\n", "a.py": "", "lib/b.py": ""})
    assert found("mine", place / "exp") == ["a.py", "lib/b.py", "mine.py"]


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\\q'\n", "\0", "(" * 5000, ""])
def test_what_is_no_python_is_hashed_all_the_same(place: Path, text: str) -> None:
    write(place / "exp", {"mine.py": f"import other\n{SCORE}", "other.py": text})
    assert found("mine", place / "exp") == ["mine.py", "other.py"]


def test_modules_that_import_each_other_are_found_once(place: Path) -> None:
    write(place / "exp", {"a.py": "import b\n", "b.py": "import a\n"})
    assert found("a", place / "exp") == found("b", place / "exp") == ["a.py", "b.py"]


def test_nothing_is_imported(place: Path) -> None:
    write(
        place / "exp", {"mine.py": "import other\nraise SystemExit('ran')\n", "other.py": "raise SystemExit('ran')\n"}
    )
    assert found("mine", place / "exp") == ["mine.py", "other.py"]
    assert "mine" not in sys.modules


def test_the_configs_folder_comes_before_the_working_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / "exp", {"mine.py": SCORE})
    write(place / "work", {"mine.py": "raise SystemExit('the other one')\n", "only_here.py": SCORE})
    monkeypatch.setattr(sys, "path", [str(place / "work"), *sys.path])  # as with `python -m`
    assert imported_modules("mine", str(place / "exp")) == {"mine.py": place / "exp" / "mine.py"}
    here = FunctionReward(function="mine:score", folder=str(place / "exp"))
    assert load_function(here, field="f", columns=[]).function.__code__.co_filename == str(place / "exp" / "mine.py")
    assert imported_modules("only_here", str(place / "exp")) == {"only_here.py": place / "work" / "only_here.py"}


def test_two_configs_of_one_process_have_modules_of_one_name(place: Path) -> None:
    for name, value in (("exp", "1.0"), ("other", "2.0")):
        write(
            place / name,
            {"mine.py": "from words import V\ndef score(responses): return [V]\n", "words.py": f"V = {value}"},
        )
    scores: list[object] = []
    for name in ("exp", "other", "exp"):
        config = FunctionReward(function="mine:score", folder=str(place / name))
        sys.path[:] = [p for p in sys.path if not p.startswith(str(place))]
        scores.append(load_function(config, field="f", columns=[]).function(responses=[]))
    assert scores == [[1.0], [2.0], [1.0]]


@pytest.mark.parametrize(
    ("name", "said"), [("regex", "has the name of an installed library"), ("json", "rename json in")]
)
def test_the_name_of_a_library_is_refused(place: Path, name: str, said: str) -> None:
    write(place / "exp", {f"{name}.py": SCORE})
    with pytest.raises(UserError, match=said):
        load_function(FunctionReward(function=f"{name}:score", folder=str(place / "exp")), field="f", columns=[])


def test_the_identity_names_each_file(place: Path) -> None:
    write(place / "exp", TEAM | {"team/politeness.py": f"from . import lexicon\n{SCORE}"})
    config = FunctionReward(function="team:score", folder=str(place / "exp"))
    before = function_digest(config)
    assert isinstance(before, dict)
    assert list(before) == ["team/__init__.py", "team/lexicon.py", "team/politeness.py"]
    assert function_digest(config) == before
    write(place / "exp", {"team/lexicon.py": "WORDS = ['thanks']\n"})
    after = function_digest(config)
    assert isinstance(after, dict)
    assert [label for label in after if after[label] != before[label]] == ["team/lexicon.py"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"team/lexicon.py": "WORDS = []\n"}, ["team/lexicon.py"]),
        ({"team/lexicon.py": None}, ["team/lexicon.py"]),
        ({"team/unused.py": "X = 1\n"}, []),
        ({"team/politeness.py": f"from . import lexicon, unused\n{SCORE}"}, ["team/politeness.py", "team/unused.py"]),
    ],
)
def test_what_has_changed_is_named_before_anything_runs(
    place: Path, change: dict[str, str | None], said: list[str]
) -> None:
    write(place / "exp", TEAM | {"team/politeness.py": f"from . import lexicon\n{SCORE}", "team/unused.py": ""})
    component = {"kind": "function", "function": "team:score", "folder": str(place / "exp"), "name": "polite"}
    config = accepted(component)
    identity = {"rewards": {"polite": function_digest(FunctionReward(**component))}}  # type: ignore[arg-type]
    for name, text in change.items():
        if text is None:
            (place / "exp" / name).unlink()
        else:
            write(place / "exp", {name: text})
    changed = changed_functions(config, identity, place / "run")
    assert len(changed) == len(said)
    assert all(line.startswith("rewards.polite (") and name in line for line, name in zip(changed, said, strict=True))


def test_an_older_record_has_the_digest_of_one_file(place: Path) -> None:
    write(place / "exp", TEAM | {"team/politeness.py": f"from . import lexicon\n{SCORE}"})
    component = {"kind": "function", "function": "team:score", "folder": str(place / "exp"), "name": "polite"}
    config = accepted(component)
    digests = function_digest(FunctionReward(**component))  # type: ignore[arg-type]
    assert isinstance(digests, dict)
    old = f"{digests['team/__init__.py']} {digests['team/politeness.py']}"
    assert changed_functions(config, {"rewards": {"polite": old}}, place / "run") == []
    assert len(changed_functions(config, {"rewards": {"polite": "0" * 64}}, place / "run")) == 1


def test_a_helper_in_the_run_folder_is_refused(place: Path) -> None:
    write(place / "exp", {"mine.py": f"import runs.helper\n{SCORE}", "runs/helper.py": ""})
    component = {"kind": "function", "function": "mine:score", "folder": str(place / "exp")}
    config = accepted(component)
    with pytest.raises(UserError, match=r"runs/helper\.py, inside the run folder, which holds data and no code"):
        changed_functions(config, {}, place / "exp" / "runs")


def test_code_that_a_record_alone_names_is_used_once_a_person_has_accepted_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place / "exp", {"mine.py": SCORE})
    component = {"kind": "function", "function": "mine:score", "folder": str(place / "exp")}
    config = build_config({"reward": {"components": [component]}})
    monkeypatch.chdir(place / "exp")
    with pytest.raises(UserError, match=rf"you have not; if you trust it, add --trust {place / 'exp'}/mine:score"):
        changed_functions(config, {}, place / "run")
    accept_values([f"{place / 'exp'}/mine:score"], config, place / "run")
    assert len(changed_functions(config, {}, place / "run")) == 1


def test_what_no_import_names_is_told(place: Path) -> None:
    code = f"load = getattr(__import__('importlib'), 'import_' + 'module')\nload('hid' + 'den')\n{SCORE}"
    write(place / "exp", {"mine.py": code, "hidden.py": ""})
    config = FunctionReward(function="mine:score", folder=str(place / "exp"))
    load_function(config, field="f", columns=[])
    assert unseen_modules(config) == [place / "exp" / "hidden.py"]


def test_the_found_files_are_those_that_python_loads(place: Path) -> None:
    """Judged by a process that imports the package and lists what it has loaded from the folder."""
    write(
        place / "exp",
        TEAM
        | {
            "team/politeness.py": f"import helper\nfrom .deep import inner\nfrom space import inside\n{SCORE}",
            "team/deep/__init__.py": "", "team/deep/inner.py": "from ..lexicon import WORDS\n",
            "helper.py": "import json\n", "space/inside.py": "", "team/unused.py": "", "unrelated.py": "",
        },
    )  # fmt: skip
    program = (
        "import sys, os; import team; root = sys.argv[1] + os.sep\n"
        "files = [getattr(m, '__file__', None) or '' for m in sys.modules.values()]\n"
        "print(*sorted(f[len(root):] for f in files if f.startswith(root)))"
    )
    folder = str(place / "exp")
    loaded = subprocess.run(
        [sys.executable, "-c", program, folder], env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True
    )
    assert found("team", place / "exp") == loaded.stdout.split()
