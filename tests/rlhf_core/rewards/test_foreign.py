"""A run's functions are looked at before they are imported."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import DriftError, UserError
from rlhf_core.contracts.trust import accept_config
from rlhf_core.rewards.foreign import changed_functions, check_functions, module_file

CODE = "raise SystemExit('this ran')\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_rewards.py").write_text(CODE)
    (tmp_path / "their_package").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / "their_package" / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def config(function: str = "their_rewards:score") -> Any:
    found = build_config({"reward": {"components": [{"kind": "function", "function": function, "name": "theirs"}]}})
    accept_config(found)
    return found


def test_the_file_of_a_module_is_found_without_running_it(folder: Path) -> None:
    assert module_file("their_rewards") == folder / "their_rewards.py"
    assert module_file("their_package.inner") == folder / "their_package" / "inner.py"
    assert module_file("their_package.nothing") is None
    assert module_file("no_such_module") is None
    assert "their_package" not in sys.modules


def test_the_file_that_the_run_was_started_with_is_taken(folder: Path) -> None:
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    check_functions(config(), {"rewards": {"theirs": f"{digest} {'0' * 64}"}}, folder / "run")
    check_functions(config("length"), {}, folder / "run")


@pytest.mark.parametrize("identity", [{}, {"rewards": {}}, {"rewards": 3}, {"rewards": {"theirs": "9f2c"}}])
def test_another_file_is_told_and_not_imported(folder: Path, identity: dict[str, Any]) -> None:
    with pytest.raises(DriftError, match=r"(?s)rewards.theirs .*their_rewards.py.*put that file back") as caught:
        check_functions(config(), identity, folder / "run")
    assert "this ran" not in str(caught.value)
    assert "their_rewards" not in sys.modules


def test_no_function_comes_from_the_run_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="inside the run folder, which holds data and no code"):
        changed_functions(config(), {}, folder)
