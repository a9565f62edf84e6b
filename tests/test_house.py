"""The house keeps its order: the six names, the layers, the documentation, and what is never used.

Everything here is read from the source text: nothing is imported but the contracts.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from documentation import generated
from pydantic import BaseModel

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.metric_meanings import METRIC_MEANINGS
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS, STAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "rlhf_core")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OPS = sorted((ROOT / "rlhf_core" / "ops").glob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
ARCHITECTURE = ROOT / "docs" / "concepts" / "architecture.md"
MAX_LINES = 400
MAX_FLOW_LINES = 40
ROOMS_OF_TESTS = {"golden", "torture", "benchmarks", "inputs", "families", "mutants"}
"""Folders of tests/ that mirror no package: numbers from outside with the scripts that made them, the battery,
programs that measure time, files and folders that people bring, every model family, and planted bugs."""
SELF_EVIDENT = {
    "reward.components.dtype",
    "ppo.adam_beta1",
    "ppo.adam_beta2",
    "ppo.weight_decay",
    "tracking.enabled",
    "tracking.experiment",
}
"""Knobs whose name and section say all; every other one has a description."""
SECTIONS = ("Args:", "Returns:", "Raises:", "Source:")
METRIC = re.compile(r"[a-z0-9]+/[a-z0-9_<>]+")
PLACEHOLDER = re.compile(r"<[^<>]+>")
SENT_ELSEWHERE = {"checkpoint/value"}
"""Sent by tasks/tracking/models.py, for a model and not for a run."""
PLAIN_METRICS = {"lr", "episode"}
"""Names that the field knows without a slash."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_functions(path: Path) -> dict[str, ast.FunctionDef]:
    body = parsed(path).body
    return {f.name: f for f in body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")}


def dotted(node: ast.expr) -> str:
    """``torch.load`` of the expression that says it; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


class TestSixNames:
    def test_schemas_files_and_modules_mirror_each_other(self) -> None:
        names = list(STAGES)
        assert len(names) == 6
        assert list(FILE_STEMS) == names
        assert [stem[:3] for stem in FILE_STEMS.values()] == [f"{i:02d}_" for i in range(1, 7)], "in flow order"
        stages = {path.stem for path in (ROOT / "rlhf_core" / "stages").glob("*.py")} - {"__init__"}
        assert stages == set(names)
        assert all((ROOT / "tasks" / f"{name}.py").is_file() for name in names)

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("room", ["rlhf_core/stages", "tasks"])
    def test_one_public_function_of_the_same_name(self, room: str, stage: str) -> None:
        assert list(public_functions(ROOT / room / f"{stage}.py")) == [stage]

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_task_is_made_by_stage_task(self, stage: str) -> None:
        """Which gives it its name, its retries, and no cache of Prefect's."""
        function = public_functions(ROOT / "tasks" / f"{stage}.py")[stage]
        assert [dotted(decorator) for decorator in function.decorator_list] == ["stage_task"]

    def test_the_flow_runs_them_in_order(self) -> None:
        function = public_functions(ROOT / "flows" / "ppo.py")["train_iteration"]
        named = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in STAGES]
        assert [node.id for node in sorted(named, key=lambda node: (node.lineno, node.col_offset))] == list(STAGES)

    @pytest.mark.parametrize("stage", STAGES)
    def test_no_column_is_nullable(self, stage: str) -> None:
        def nullable(field: pa.Field) -> Iterator[str]:
            if field.nullable:
                yield field.name
            kind = field.type
            children = [kind.value_field] if pa.types.is_list(kind) else list(kind) if pa.types.is_struct(kind) else []
            for child in children:
                yield from (f"{field.name}.{name}" for name in nullable(child))

        assert [name for field in SCHEMAS[stage] for name in nullable(field)] == []


class TestLayers:
    def test_import_linter_has_its_contracts(self) -> None:
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        outer, inner = (c for c in contracts if c["type"] == "layers")
        assert outer["layers"] == list(PACKAGES)
        order = [layer for layer in inner["layers"] if layer in {"stages", "models", "ops", "contracts"}]
        assert order == ["stages", "models", "ops", "contracts"]
        (apart,) = (c for c in contracts if c["type"] == "independence")
        assert set(apart["modules"]) == {f"rlhf_core.stages.{stage}" for stage in STAGES}
        forbidden: dict[str, set[str]] = defaultdict(set)
        for contract in contracts:
            if contract["type"] == "forbidden":
                for source in contract["source_modules"]:
                    forbidden[source] |= set(contract["forbidden_modules"])
        assert forbidden["rlhf_core"] >= {"prefect", "mlflow"}
        assert forbidden["rlhf_core.ops"] >= {"pyarrow", "transformers"}

    def test_every_package_is_in_the_inner_layers(self) -> None:
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        (inner,) = (c for c in contracts if c["type"] == "layers" and c.get("containers") == ["rlhf_core"])
        layered = {name.strip() for layer in inner["layers"] for name in layer.split("|")}
        rooms = {p.stem for p in (ROOT / "rlhf_core").iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py"}
        assert rooms - {"__init__"} == layered

    def test_one_file_imports_mlflow(self) -> None:
        assert [name_of(path) for path in SOURCES if "mlflow" in imports(path)] == ["tasks/tracking/tracker.py"]

    def test_flows_import_no_heavy_library(self) -> None:
        heavy = {"torch", "pyarrow", "transformers", "mlflow"}
        assert {name_of(p) for p in (ROOT / "flows").rglob("*.py") if imports(p) & heavy} == set()

    def test_a_flow_is_short(self) -> None:
        functions = public_functions(ROOT / "flows" / "ppo.py").values()
        assert [f.name for f in functions if f.end_lineno and f.end_lineno - f.lineno > MAX_FLOW_LINES] == []

    def test_tests_mirror_the_packages(self) -> None:
        tests = ROOT / "tests"
        strays: list[str] = []
        for path in tests.rglob("test_*.py"):
            folder = path.parent.relative_to(tests)
            mirrors = folder == Path() or (ROOT / folder / "__init__.py").is_file()
            if not mirrors and not set(folder.parts) & ROOMS_OF_TESTS:
                strays.append(name_of(path))
        assert strays == []
        rooms = {p.name for p in tests.iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert rooms - ROOMS_OF_TESTS <= set(PACKAGES)

    def test_no_room_is_called_utils(self) -> None:
        names = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
        assert [name_of(p) for p in [*SOURCES, *(ROOT / "tests").rglob("*.py")] if p.name in names] == []

    def test_no_file_is_long(self) -> None:
        lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
        assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


class TestSafety:
    """What could run somebody else's code is never used; ``ast`` sees the call, not the word in a comment."""

    MODULES = frozenset({"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"})
    CALLS = frozenset({"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system"})
    CALLS |= {"torch.hub.load", "runpy.run_path", "shutil.unpack_archive", "os.popen", "input"}
    IMPORTERS = frozenset({"rlhf_core/rewards/function.py"})
    """Imports what a config names, once it was looked at: the one place."""
    PLAIN = frozenset({"peft.PeftConfig", "GenerationConfig"})
    """Their from_pretrained reads JSON, and imports nothing."""

    @staticmethod
    def unsafe(tree: ast.Module) -> list[str]:
        found: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                found += [m for m in modules if m.split(".")[0] in TestSafety.MODULES]
                if isinstance(node, ast.ImportFrom):
                    found += [c for a in node.names if (c := f"{node.module}.{a.name}") in TestSafety.CALLS]
            elif isinstance(node, ast.Call):
                name = dotted(node.func)
                keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if name in TestSafety.CALLS:
                    found.append(name)
                if name == "YAML" and keywords.get("typ") != "safe":
                    found.append("YAML that is not safe")
                refused = ("trust_remote_code", "shell", "allow_pickle")
                found += [f"{k}={keywords[k]}" for k in refused if keywords.get(k)]
                attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if attribute in {"extractall", "import_module", "exec_module"}:
                    found.append(attribute)
                loads = attribute in {"from_pretrained", "from_config"}
                loads = loads and name.rpartition(".")[0] not in TestSafety.PLAIN
                if loads and keywords.get("trust_remote_code", True) is not False:
                    found.append(f"{attribute} without trust_remote_code=False")
                found += ["use_safetensors=False"] if keywords.get("use_safetensors", True) is False else []
        return found

    @pytest.mark.parametrize("path", SOURCES, ids=name_of)
    def test_of_a_file(self, path: Path) -> None:
        expected = ["import_module"] if name_of(path) in self.IMPORTERS else []
        assert self.unsafe(parsed(path)) == expected

    @pytest.mark.parametrize(
        "line",
        [
            "import pickle",
            "from pickle import loads",
            "import yaml",
            "from torch import load",
            "torch.load(path, weights_only=True)",
            "eval('1')",
            "YAML().load(text)",
            "YAML(typ='unsafe')",
            "AutoModel.from_pretrained(name, trust_remote_code=True)",
            "AutoModel.from_pretrained(name, use_safetensors=False)",
            "subprocess.run(command, shell=True)",
            "import cloudpickle",
            "from marshal import loads",
            "import shelve",
            "tarfile.open(path).extractall(folder)",
            "np.lib.format.read_array(file, allow_pickle=True)",
            "importlib.import_module(config.module)",
            "AutoModel.from_config(config)",
            "AutoConfig.from_pretrained(path)",
            "input('trust it?')",
        ],
    )
    def test_it_would_be_seen(self, line: str) -> None:
        assert self.unsafe(ast.parse(line))
        assert not self.unsafe(ast.parse("model.eval()\nYAML(typ='safe').load(t)\nf(trust_remote_code=False)\n# eval("))


class TestDocumentation:
    @pytest.mark.parametrize("path", SOURCES, ids=name_of)
    def test_every_file_says_what_it_is(self, path: Path) -> None:
        assert ast.get_docstring(parsed(path))

    @pytest.mark.parametrize("path", [p for p in OPS if p.stem != "__init__"], ids=lambda p: p.stem)
    def test_an_op_has_its_four_sections(self, path: Path) -> None:
        said = {name: ast.get_docstring(function) or "" for name, function in public_functions(path).items()}
        lacking = [(name, section) for name in said for section in SECTIONS if section not in said[name]]
        assert lacking == []

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_stage_names_its_arguments_and_results(self, stage: str) -> None:
        docstring = ast.get_docstring(public_functions(ROOT / "rlhf_core" / "stages" / f"{stage}.py")[stage]) or ""
        assert all(section in docstring for section in ("Args:", "Returns:"))

    def test_every_knob_is_described(self) -> None:
        silent = {knob for knob, description in knobs(RunConfig) if not description}
        assert silent == SELF_EVIDENT

    def test_every_section_of_the_config_is_described(self) -> None:
        assert [s.__name__ for s in sections(RunConfig) if not s.__doc__ or s.__doc__ == BaseModel.__doc__] == []


class TestPages:
    def test_explain_every_metric_and_no_other(self) -> None:
        explained = {PLACEHOLDER.sub("<>", name) for name in METRIC_MEANINGS} - SENT_ELSEWHERE
        assert sorted(metrics() - explained) == [], "not explained"
        assert sorted(explained - metrics()) == [], "explained, but nothing sends it"
        assert [name for name, meaning in METRIC_MEANINGS.items() if len(meaning) < 10 and name != "lr"] == []
        assert set(METRIC_MEANINGS) >= SENT_ELSEWHERE

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_quote_no_metric_that_is_not_sent(self, page: Path) -> None:
        groups = {metric.split("/")[0] for metric in metrics()}
        quoted = {PLACEHOLDER.sub("<>", name) for name in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8"))}
        named = {name for name in quoted if METRIC.fullmatch(name) and name.split("/")[0] in groups}
        assert sorted(named - metrics()) == []

    def test_list_each_knob(self) -> None:
        listed = set(re.findall(r"^\| `([^`]+)` \|", generated.config(), re.MULTILINE))
        plain = {re.sub(r"\.N\([a-z]+\)", "", name) for name in listed}
        assert {name for name, _ in knobs(RunConfig)} == plain

    def test_list_each_metric_column_command_and_error(self) -> None:
        assert all(f"| `{name}` |" in generated.metrics() for name in METRIC_MEANINGS)
        columns = generated.artifacts()
        for stage, schema in SCHEMAS.items():
            table = columns.split(f"### {FILE_STEMS[stage]}.arrow")[1].split("\n### ")[0]
            assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == schema.names
        commands = ROOT / "flows" / "commands"
        public = {name for path in commands.glob("*.py") if path.stem != "options" for name in public_functions(path)}
        listed = set(re.findall(r"^### rlhf (\S+)$", generated.cli(), re.MULTILINE))
        assert len(listed) >= 15
        assert listed <= public
        classes = {n.name for n in parsed(ROOT / "rlhf_core/contracts/errors.py").body if isinstance(n, ast.ClassDef)}
        assert set(re.findall(r"^\| `(\w+)` \|", generated.error_classes(), re.MULTILINE)) == classes

    def test_name_every_room(self) -> None:
        page = ARCHITECTURE.read_text(encoding="utf-8")
        rooms = {p.parent.name for p in SOURCES if p.name == "__init__.py"}
        assert [room for room in sorted(rooms) if f"{room}/" not in page] == []
        assert [name for name in [*STAGES, *FILE_STEMS.values()] if name not in page] == []


def metrics() -> set[str]:
    """Names of metrics, as string literals of the stages and the tracker; ``f"time/{stage}_s"`` is time/<>_s."""
    found: set[str] = set()
    core = ROOT / "rlhf_core"
    senders = [*(core / "stages").glob("*.py"), core / "batch_metrics.py", core / "evaluation" / "summary.py"]
    senders += [ROOT / "tasks" / f"{name}.py" for name in ("tracking/tracker", "tracking/metrics", "lifecycle/guards")]
    for path in senders:
        tree = parsed(path)
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "<>" for p in node.values)
            if METRIC.fullmatch(text) or text in PLAIN_METRICS:
                found.add(text)
    return found


def test_metrics_are_found() -> None:
    known = {"objective/kl", "kl/beta", "policy/clipfrac_avg", "rollout/eos_rate", "time/<>_s", "lr", "episode"}
    assert known <= metrics()


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for child in _sections_in(field.annotation):
            yield from sections(child)


def knobs(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted name, description) of every leaf."""
    for name, field in model.model_fields.items():
        children = _sections_in(field.annotation)
        for child in children:
            yield from knobs(child, f"{prefix}{name}.")
        if not children:
            yield f"{prefix}{name}", field.description


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for a in getattr(annotation, "__args__", ()) for section in _sections_in(a)]
