"""The pages of the documentation: their examples run, their links lead somewhere, and what they quote exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
import warnings
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import typer
from damage import finished_run
from documentation import DOCS, ROOT, prepare
from ruamel.yaml import YAML
from tiny_world import Tiny

from flows.cli import app
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError

PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
ELSEWHERE = "mlflow.set_tracking_uri"
"""Marks the block that needs a registered policy: tests/tasks/test_tracking.py loads one from the registry."""
OWN_TEST = {"tutorials/your-models.md", "extend/reward.md", "extend/estimator.md"}
"""Pages whose blocks build on each other: test_tutorial.py, and below."""


def blocks(page: str, language: str) -> list[tuple[str | None, str]]:
    """(title, text) of a page's blocks in one language."""
    return [(title or None, text) for kind, title, text in FENCE.findall(PAGES[page]) if kind == language]


PYTHON = [(page, n) for page in PAGES if page not in OWN_TEST for n in range(len(blocks(page, "python")))]
YAMLS = [(page, n) for page in PAGES for n in range(len(blocks(page, "yaml")))]


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("docs") / "run")


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_an_example_runs(
    page: str, number: int, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = blocks(page, "python")[number][1]
    if ELSEWHERE in block:
        return
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run_dir)
    names: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "example", type(sys)("example"))
    names["__name__"] = "example"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that the examples show
        exec(compile(block, page, "exec"), names)


def test_there_are_examples_to_run() -> None:
    assert len(PYTHON) >= 4
    assert sum(ELSEWHERE in blocks(page, "python")[number][1] for page, number in PYTHON) == 1


@pytest.mark.parametrize(("page", "number"), YAMLS)
def test_an_example_of_a_config_is_one(page: str, number: int) -> None:
    """As part of a config that is whole: names and values are checked, files are not."""
    tree = YAML(typ="safe").load(blocks(page, "yaml")[number][1])
    assert set(tree) <= set(RunConfig.model_fields)
    whole: dict[str, Any] = {"prompts": {"source": "p.jsonl"}, "policy": {"model": "m"}, "reward": {"components": []}}
    whole["reward"]["components"] = [{"kind": "model", "model": "r"}]
    for section, values in tree.items():
        whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
    build_config(whole, [])


COMMAND = re.compile(r"(?:^|[\s/])rlhf ((?:[a-z]+)\b[^#\n|>&]*)")


def test_the_commands_of_the_pages_exist_with_their_options() -> None:
    commands: Any = typer.main.get_command(app)
    known = {
        name: {o for p in command.params for o in p.opts + p.secondary_opts}
        for name, command in commands.commands.items()
    }
    texts = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **PAGES}
    shown = [
        (page, line)
        for page, text in texts.items()
        for kind, _, block in FENCE.findall(text)
        if kind in ("bash", "sh")
        for line in COMMAND.findall(block.replace("\\\n", " "))
    ]
    assert len(shown) >= 60
    used = [(page, line, line.split()[0], re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) for page, line in shown]
    assert [(page, line) for page, line, name, _ in used if name not in known] == []
    assert [(page, line, o) for page, line, name, options in used for o in options if o not in known[name]] == []
    unshown = set(known) - {name for _, _, name, _ in used}
    assert unshown <= {"feedback"}, "a command without an example"


def test_a_reward_is_written_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = blocks("extend/reward.md", "python")
    for title, text in parts:
        if title is not None:
            (tmp_path / title).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (example,) = [text for title, text in parts if title is None]
    exec(compile(example, "extend/reward.md", "exec"), {})
    names: dict[str, Any] = {"__name__": "service"}
    exec(compile((tmp_path / "service.py").read_text(), "service.py", "exec"), names)
    with HTTPServer(("127.0.0.1", 0), names["Scores"]) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        asked = json.dumps({"prompts": ["a", "b"], "responses": ["yes!", "no"], "columns": {}}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/score", asked, timeout=10) as answer:
            assert json.load(answer) == {"scores": [1.0, 0.0]}


ITERATION = """
import sys
from pathlib import Path
from iteration import Bench, tiny_tree
from tiny_world import make_tiny
from rlhf_core.contracts.config_io import build_config
import rlhf_core
assert Path(rlhf_core.__file__).is_relative_to(Path.cwd()), "the copy is what runs"
tree = tiny_tree(make_tiny(Path(sys.argv[1])))
tree["prompts"]["samples_per_prompt"] = 2
bench = Bench.of(build_config(tree, sys.argv[2:]))
prompts, rollouts, experience = bench.until_experience()
steps = bench.update(prompts, rollouts, experience).batch.steps
print(len(rollouts.texts), len(steps), float(experience.advantages_BR.abs().max()) > 0)
"""


@pytest.mark.parametrize(
    ("page", "override"),
    [("extend/estimator.md", "shaping.estimator=opo"), ("extend/engine.md", "generation.engine=padded")],
)
def test_a_change_applies_and_an_iteration_runs_with_it(page: str, override: str, tmp_path: Path) -> None:
    copy, world = tmp_path / "copy", tmp_path / "world"
    world.mkdir()
    for package in ("flows", "tasks", "rlhf_core"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": f"{copy}:{ROOT / 'tests'}", "GIT_CEILING_DIRECTORIES": str(tmp_path)}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)

    with pytest.raises(UserError, match=re.escape(override.partition("=")[0])):  # the sources do not have it yet
        build_config({"prompts": {"source": "p.jsonl"}, "policy": {"model": "m"}}, [override])
    for number, (_, change) in enumerate(blocks(page, "diff")):
        (copy / f"{number}.diff").write_text(change)
        applied = run("git", "apply", "--verbose", f"{number}.diff")
        assert applied.returncode == 0, applied.stderr
    examples = "".join(text for _, text in blocks(page, "python"))
    done = run(sys.executable, "-c", examples + ITERATION, world, override)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "4", "True"]


def test_the_links_of_every_page_lead_somewhere() -> None:
    texts = prepare.pages()
    assert prepare.broken_links(texts) == []
    assert "<!-- generated:" not in "".join(texts.values())


def test_numerics_names_lines_that_exist() -> None:
    page = DOCS / "concepts" / "numerics.md"
    named = re.findall(r"\]\(([^)]+\.py)\): `([^`]+)`", page.read_text(encoding="utf-8"))
    assert len(named) >= 12
    sources = {target: (page.parent / target).read_text(encoding="utf-8") for target, _ in named}
    assert [(target, word) for target, word in named if word not in sources[target]] == []


def test_a_broken_link_is_found() -> None:
    page = DOCS / "index.md"
    text = "# A head\n[a](nothing.md) [b](glossary.md#no-such) [c](#a-head) [d](#b)\n```text\n[e](f.md)\n```\n"
    assert [sentence.split("links to ")[1].split("'")[1] for sentence in prepare.broken_links({page: text})] == [
        "nothing.md",
        "glossary.md#no-such",
        "#b",
    ]


def test_the_site_is_prepared_whole(tmp_path: Path) -> None:
    prepare.prepare(tmp_path / "docs")
    written = {str(path.relative_to(tmp_path / "docs")) for path in (tmp_path / "docs").rglob("*.md")}
    assert written == set(PAGES)
    assert "| `kl.coef` |" in (tmp_path / "docs/reference/config.md").read_text()
    assert "def one_iteration" in (tmp_path / "docs/tutorials/one-iteration.md").read_text()
    deploy = (tmp_path / "docs/guides/schedule-and-deploy.md").read_text()
    assert "](../repository/deployments/zombies.yaml)" in deploy
    assert (tmp_path / "docs/repository/deployments/zombies.yaml").is_file()
    assert not list((tmp_path / "docs").glob("*.py"))


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(PAGES) - {"models.md"}), "models.md is what `make families` has written here"


@pytest.mark.parametrize("page", [p for p in PAGES if p.split("/")[0] in ("guides", "tutorials", "extend", "concepts")])
def test_promises_have_their_limits(page: str) -> None:
    assert "\n## Limitations\n" in PAGES[page]


def sentences() -> list[str]:
    """Sentences that the page of troubleshooting quotes: the second cell of its rows."""
    rows = [line.split(" | ") for line in PAGES["troubleshooting.md"].splitlines() if line.startswith("| ")]
    return [cells[1].strip("`") for cells in rows if cells[1].startswith("`")]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Texts of the sources; a value that is put into one stands as ``…``."""
    found: list[str] = []
    for package in ("flows", "tasks", "rlhf_core"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


@pytest.mark.parametrize("sentence", sentences())
def test_a_quoted_sentence_is_printed_by_the_code(sentence: str, messages: list[str]) -> None:
    parts = [part.strip() for part in sentence.split("…") if part.strip(" :;()")]
    assert max(map(len, parts)) >= 12
    wanted = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(wanted.search(message) for message in messages)


def test_sentences_are_quoted() -> None:
    assert len(sentences()) >= 15
