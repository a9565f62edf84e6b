"""The continuous integration runs the README's test command, and the exhaustive tests when the change asks for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST, ALL = ["make test"], ["make test", "make exhaustive"]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


class Repository:
    """A repository with one commit on main, and the script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")
        (folder / ".ci").mkdir()
        shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
        self.commit("README.md")

    def git(self, *arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=self.folder, capture_output=True, check=True)

    def change(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("changed\n")

    def commit(self, name: str) -> None:
        self.change(name)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", name)

    def plan(self) -> list[str]:
        done = subprocess.run(
            [self.folder / ".ci/run", "--plan"], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_without_a_commit_before_every_test_runs(repository: Repository) -> None:
    assert repository.plan() == ALL


def test_without_git_every_test_runs(repository: Repository) -> None:
    shutil.rmtree(repository.folder / ".git")
    assert repository.plan() == ALL


@pytest.mark.parametrize(
    "name",
    [
        "rlhf_core/contracts/durable.py",
        "rlhf_core/store/lease.py",
        "rlhf_core/storage/archive.py",
        "rlhf_core/stages/generate.py",
        "rlhf_core/identity.py",
        "tasks/stage.py",
        "tasks/execution/ranks/rank_group.py",
        "tasks/lifecycle/resume.py",
        "tasks/ppo_update.py",
        "tasks/session/policy_state.py",
        "tasks/ranks/policy.py",
        "tasks/tracking/outbox.py",
        "rlhf_core/updating/losses.py",
        "rlhf_core/source_code.py",
        "tests/torture/rows/races.py",
    ],
)
def test_a_change_of_what_runs_write_needs_every_test(repository: Repository, name: str) -> None:
    repository.commit(name)
    assert repository.plan() == ALL


@pytest.mark.parametrize(
    "name", ["README.md", "flows/displays/plan.py", "tasks/reports/figures.py", "tests/test_house.py"]
)
def test_another_change_does_not(repository: Repository, name: str) -> None:
    repository.commit(name)
    assert repository.plan() == FAST


def test_a_branch_is_compared_with_main_and_not_with_its_last_commit(repository: Repository) -> None:
    repository.commit("docs/a.md")
    repository.git("switch", "--quiet", "--create", "branch")
    repository.commit("rlhf_core/identity.py")
    repository.commit("docs/b.md")
    assert repository.plan() == ALL


def test_what_is_not_committed_counts(repository: Repository) -> None:
    repository.commit("docs/a.md")
    assert repository.plan() == FAST
    repository.change("rlhf_core/stages/generate.py")
    assert repository.plan() == ALL
