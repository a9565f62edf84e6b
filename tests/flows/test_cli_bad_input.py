"""Mistakes on the command line: each ends in one clear sentence, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pytest
import torch

from flows.cli import EXIT_MISTAKE, main
from rlhf_core.contracts.artifacts import commit_stage
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_template, digest_json
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import SCHEMAS

if TYPE_CHECKING:
    from tiny_world import Tiny

ROOT = Path(__file__).parents[2]
EOS, PAD = "<|endoftext|>", "<|pad|>"
MakeConfig = Callable[[Sequence[str]], RunConfig]


class Mistake(NamedTuple):
    """What a sentence about it must say."""

    field: str
    value: str
    remedy: str


class Shell:
    """The command line of a test: an empty working folder with ``run.yaml``, a valid config of the tiny world."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, config: RunConfig, tiny: Tiny) -> None:
        self.capsys, self.folder, self.tiny = capsys, folder, tiny
        self.trains_too = False
        """Whether each mistake is given to ``rlhf train`` as well, and not to ``rlhf check`` alone."""
        self.config = folder / "run.yaml"
        self.config.write_text(config_template(config))

    def train(self, *overrides: str) -> list[str]:
        """The sentences of a refused config; ``rlhf train`` says the same, with or without --run-dir."""
        sets = [word for override in overrides for word in ("--set", override)]
        train = ["train", "--config", str(self.config), *sets]
        before = self.content()
        sentences = self.refused("check", *train[1:])
        if self.trains_too:
            assert self.refused(*train) == self.refused(*train, "--run-dir", "new") == sentences
        assert self.content() == before, "something was written"
        return sentences

    def check(self, *overrides: str) -> int | str | None:
        """The exit code of ``rlhf check``, which says that all is well."""
        sets = [word for override in overrides for word in ("--set", override)]
        with pytest.raises(SystemExit) as caught:
            main(["check", "--config", str(self.config), *sets])
        assert "no problem found" in self.capsys.readouterr().out
        return caught.value.code

    def refused(self, *arguments: str) -> list[str]:
        """The sentences on stderr of a command that exits with EXIT_MISTAKE."""
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == EXIT_MISTAKE
        out, err = self.capsys.readouterr()
        assert "Traceback" not in out + err
        lines = err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    def content(self) -> dict[str, bytes | None]:
        """Everything in the working folder."""
        return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(self.folder.rglob("*"))}

    def broken(self, model: str, change: Callable[[Path], object]) -> str:
        """A copy of one of the tiny models with a mistake in it."""
        folder = self.folder / f"broken-{model}"
        shutil.copytree(getattr(self.tiny, model), folder)
        change(folder)
        return str(folder)

    def prompts(self, *rows: Any, name: str = "some.jsonl") -> str:
        """A file of prompts, one row a line."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


@pytest.fixture(params=["check", pytest.param("train", marks=pytest.mark.exhaustive)])
def shell(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    tiny_config: MakeConfig,
) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flows.commands.training.watch_run", lambda *_: pytest.fail("training began"))
    there = Shell(capsys, tmp_path, tiny_config([]), tiny)
    there.trains_too = request.param == "train"
    return there


def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file in a model folder; None removes one."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))

    return change


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def says(sentences: Sequence[str], *mistakes: Mistake) -> None:
    """One sentence a mistake, in order, with its field, value and remedy."""
    assert len(sentences) == len(mistakes), sentences
    for sentence, (field, value, remedy) in zip(sentences, mistakes, strict=True):
        assert sentence.startswith(field)
        assert value in sentence
        assert remedy in sentence


class TestConfig:
    @pytest.mark.parametrize(
        ("override", "mistake"),
        [
            ("ppo.learnig_rate=1e-5", Mistake("ppo.learnig_rate", "not a known key", "did you mean learning_rate?")),
            ("ppo.learning_rate=fast", Mistake("ppo.learning_rate", "'fast'", "valid number")),
            ("num_iterations=many", Mistake("num_iterations", "'many'", "valid integer")),
            ("device=tpu", Mistake("device", "'tpu'", "'auto', 'cpu', 'cuda' or 'mps'")),
            ("kl.coef=.nan", Mistake("kl.coef", "nan", "finite number")),
            ("kl.horizon=1", Mistake("kl.horizon 1", "prompts.batch_size = 1.6", "use kl.horizon 8 or more")),
            ("ppo.num_minibatches=3", Mistake("prompts.batch_size 8", "ppo.num_minibatches 3", "not a multiple of")),
            ("prompts.batch_size", Mistake("--set", "'prompts.batch_size'", "section.key=value")),
            ("=8", Mistake("--set", "'=8'", "section.key=value")),
            ("policy.model=[", Mistake("--set policy.model", "line 1, column", "expected")),
            ("reward.components.2.weight=1", Mistake("--set", "reward.components.2", "the list has 1 items (from 0)")),
        ],
    )
    def test_override(self, shell: Shell, override: str, mistake: Mistake) -> None:
        says(shell.train(override), mistake)

    def test_in_the_file(self, shell: Shell) -> None:
        shell.config.write_text("kl:\n  coef: 0.1\n  coef: 0.2\n")
        says(shell.train(), Mistake(str(shell.config), "line 3, column 3", 'duplicate key "coef"'))

    def test_no_file(self, shell: Shell) -> None:
        sentences = shell.refused("train", "--config", "none.yaml")
        says(sentences, Mistake("--config none.yaml", "is not a file", "`rlhf config > none.yaml` writes a template"))

    def test_an_untouched_template(self, shell: Shell) -> None:
        """What is left to fill in, all of it."""
        shell.config.write_text(config_template())
        says(
            shell.train(),
            Mistake("policy.model", "is not set", "give a model folder or a hub id"),
            Mistake("reward.components.0.model", "is not set", "give a model folder or a hub id"),
            Mistake("prompts.source", "is not set", ".jsonl"),
        )

    def test_no_reward(self, shell: Shell) -> None:
        says(shell.train("reward.components=[]"), Mistake("reward.components", "is empty", "give at least one"))

    def test_a_device_that_is_not_there(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        says(shell.train("device=cuda"), Mistake("device", "is cuda", "found: "))


class TestPrompts:
    def test_no_file(self, shell: Shell) -> None:
        says(shell.train("prompts.source=./none.jsonl"), Mistake("prompts.source", "'./none.jsonl'", "does not exist"))

    def test_no_column(self, shell: Shell) -> None:
        sentences = shell.train(f"prompts.source={shell.prompts({'text': 'a', 'id': 1})}")
        says(sentences, Mistake("prompts.column", "'prompt'", "whose columns are: text, id"))

    @pytest.mark.parametrize(
        ("prompt", "mistake"),
        [
            ("", Mistake("prompts.source", "line 2: prompt is ''", "must not be empty")),
            (" \n", Mistake("prompts.source", "line 2: prompt is ' \\n'", "must not be white space only")),
            (3, Mistake("prompts.source", "line 2: prompt is 3, a int", "a text or a list of {role, content}")),
            (None, Mistake("prompts.source", "line 2: prompt is null", "a text or a list of {role, content}")),
        ],
    )
    def test_a_prompt_that_is_none(self, shell: Shell, prompt: Any, mistake: Mistake) -> None:
        path = shell.prompts({"prompt": "fine"}, {"prompt": prompt})
        says(shell.train(f"prompts.source={path}"), mistake)

    def test_bad_json(self, shell: Shell) -> None:
        path = shell.folder / "bad.jsonl"
        path.write_text('{"prompt": "a"}\n{"prompt": \n')
        says(shell.train(f"prompts.source={path}"), Mistake("prompts.source", "line 2", "is not JSON"))

    def test_longer_than_the_context(self, shell: Shell) -> None:
        path = shell.prompts(*[{"prompt": f"prompt {i}"} for i in range(8)], {"prompt": "x" * 59})
        says(
            shell.train(f"prompts.source={path}"),
            Mistake("prompts.source", "prompt 8 (from 0) has 59 tokens", "set prompts.over_long to"),
        )

    def test_a_chat_without_a_template(self, shell: Shell) -> None:
        chats = [{"prompt": [{"role": "user", "content": f"Hi {i}"}]} for i in range(8)]
        sentences = shell.train(f"prompts.source={shell.prompts(*chats)}")
        says(sentences, Mistake("prompts.column", "has no chat template", "take a policy.model that has one"))

    def test_fewer_than_a_batch(self, shell: Shell) -> None:
        sentences = shell.train("prompts.batch_size=64")
        says(sentences, Mistake("prompts.source", "has 40 prompts", "lower prompts.batch_size"))
        assert "takes 64 different ones" in sentences[0]


class TestModels:
    def test_no_folder(self, shell: Shell) -> None:
        says(
            shell.train("policy.model=./none", "reward.components.0.model=/none"),
            Mistake("policy.model", "'./none'", "give a model folder or a hub id"),
            Mistake("reward.components.0.model", "'/none'", "give a model folder or a hub id"),
        )

    @pytest.mark.parametrize("field", ["policy.model", "reward.components.0.model", "reference.model"])
    @pytest.mark.parametrize(
        ("change", "remedy"),
        [
            (lambda f: (f / "model.safetensors").unlink(), "is a model folder without weights (*.safetensors)"),
            (pickled_weights, "convert them with model.save_pretrained, which writes safetensors"),
            (lambda f: (f / "config.json").unlink(), "give one written by save_pretrained"),
            (lambda f: (f / "config.json").write_text("{"), "has a config.json that is not JSON"),
        ],
        ids=["no weights", "pickle", "no config", "bad config"],
    )
    def test_a_folder_that_is_no_model(self, shell: Shell, field: str, change: Any, remedy: str) -> None:
        model = "reward" if "reward" in field else "policy"
        broken = shell.broken(model, change)
        sentences = shell.train(f"{field}={broken}")
        says(sentences[:1], Mistake(field, repr(broken), remedy))
        assert len(sentences) <= 1 + (field == "policy.model")

    def test_a_folder_below_home(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(shell.folder))
        shutil.copytree(shell.tiny.policy, shell.folder / "policy")
        assert shell.check("policy.model=~/policy", "reference.model=~/policy") == 0

    def test_a_hub_id_that_is_not_at_hand(self, shell: Shell) -> None:
        sentences = shell.train("policy.model=nobody/nothing")
        says(sentences, Mistake("policy.model", "'nobody/nothing'", "is neither a model folder nor a hub id"))

    def test_two_logits(self, shell: Shell) -> None:
        labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
        broken = shell.broken("reward", edit_json("config.json", **labels))
        sentences = shell.train(f"reward.components.0.model={broken}")
        says(sentences, Mistake("reward.components.0.model", "has 2 logits", "a reward model has one (num_labels: 1"))

    def test_reference_of_another_vocabulary(self, shell: Shell) -> None:
        broken = shell.broken("policy", edit_json("config.json", vocab_size=299))
        sentences = shell.train(f"reference.model={broken}")
        says(sentences, Mistake("reference.model", "a vocabulary of 299", "take the model that the policy"))

    def test_too_many_new_tokens(self, shell: Shell) -> None:
        sentences = shell.train("generation.max_new_tokens=64")
        says(sentences, Mistake("generation.max_new_tokens 64", "context of 64 tokens", "choose at most 63"))

    def test_prompt_and_response_exceed_the_context(self, shell: Shell) -> None:
        sentences = shell.train("prompts.max_len=59")
        says(sentences, Mistake("prompts.max_len 59", "= 65 tokens", "choose prompts.max_len of at most 58"))


class TestTokenizer:
    @pytest.mark.parametrize(("model", "field"), [("policy", "policy.model"), ("reward", "reward.components.0.model")])
    def test_none(self, shell: Shell, model: str, field: str) -> None:
        """transformers would make one without a vocabulary, which reads every text as nothing."""
        broken = shell.broken(model, without_tokenizer)
        says(shell.train(f"{field}={broken}"), Mistake(field, repr(broken), "has no tokenizer"))

    def test_the_pad_that_is_named_is_eos(self, shell: Shell) -> None:
        remedy = "set policy.pad_token to a token of its vocabulary that is not EOS"
        says(shell.train(f"policy.pad_token='{EOS}'"), Mistake("policy.model", f"pads with {EOS!r}", remedy))

    @pytest.mark.parametrize("pad_token", [EOS, None])
    def test_a_pad_is_chosen_where_there_is_none(self, shell: Shell, pad_token: str | None) -> None:
        broken = shell.broken("policy", edit_json("tokenizer_config.json", pad_token=pad_token))
        assert shell.check(f"policy.model={broken}") == 0

    def test_a_pad_that_is_no_token(self, shell: Shell) -> None:
        sentences = shell.train("policy.pad_token=[PAD]".replace("[PAD]", "'[PAD]'"))
        says(sentences, Mistake("policy.pad_token", "'[PAD]'", "set policy.pad_token to a token of its vocabulary"))

    def test_no_eos(self, shell: Shell) -> None:
        broken = shell.broken("policy", edit_json("tokenizer_config.json", eos_token=None))
        sentences = shell.train(f"policy.model={broken}")
        says(sentences, Mistake("policy.model", "a tokenizer without an EOS token", "set eos_token in its tokenizer"))

    def test_the_pad_can_be_named(self, shell: Shell) -> None:
        """The remedy works."""
        broken = shell.broken("policy", edit_json("tokenizer_config.json", pad_token=EOS))
        assert shell.check(f"policy.model={broken}", f"policy.pad_token='{PAD}'") == 0


def test_everything_at_once(shell: Shell) -> None:
    shell.trains_too = True
    policy = shell.broken("policy", edit_json("tokenizer_config.json", eos_token=None))
    says(
        shell.train(
            f"policy.model={policy}",
            "reference.model=./nowhere",
            "reward.components.0.model=./none",
            "prompts.source=./none.jsonl",
            "generation.max_new_tokens=100",
        ),
        Mistake("policy.model", repr(policy), "without an EOS token"),
        Mistake("reference.model", "'./nowhere'", "give a model folder"),
        Mistake("generation.max_new_tokens 100", "context of 64", "choose at most 63"),
        Mistake("reward.components.0.model", "'./none'", "give a model folder"),
        Mistake("prompts.source", "'./none.jsonl'", "does not exist"),
    )


def test_brackets_are_printed_as_they_are(shell: Shell) -> None:
    """Not as rich's markup."""
    shell.trains_too = True
    says(shell.train("policy.model=./[red]x[/]"), Mistake("policy.model", "'./[red]x[/]'", "give a model folder"))


class TestRunFolder:
    def test_not_empty(self, shell: Shell) -> None:
        (shell.folder / "used").mkdir()
        (shell.folder / "used" / "thesis.txt").touch()
        before = shell.content()
        sentences = shell.refused("train", "--config", "run.yaml", "--run-dir", "used")
        says(sentences, Mistake("--run-dir used", "is not an empty folder", "choose a new one"))
        assert shell.content() == before

    def test_already_a_run(self, shell: Shell, tiny_config: MakeConfig) -> None:
        RunFolder.create(shell.folder / "run", tiny_config([]), {})
        before = shell.content()
        sentences = shell.refused("train", "--config", "run.yaml", "--run-dir", "run")
        says(sentences, Mistake("--run-dir run", "already holds a run", "continue it with `rlhf resume run`"))
        assert shell.content() == before

    @pytest.mark.parametrize("command", ["resume", "inspect"])
    @pytest.mark.parametrize(("folder", "why"), [("empty", "it has no run.json"), ("none", "there is no such folder")])
    def test_no_run(self, shell: Shell, command: str, folder: str, why: str) -> None:
        (shell.folder / "empty").mkdir()
        before = shell.content()
        says(shell.refused(command, folder), Mistake(folder, "is not a run folder", why))
        assert shell.content() == before

    @pytest.mark.parametrize("command", ["resume", "inspect"])
    def test_a_damaged_run(self, shell: Shell, command: str) -> None:
        (shell.folder / "run").mkdir()
        (shell.folder / "run" / "run.json").write_text('{"config"')
        says(shell.refused(command, "run"), Mistake("run/run.json", "is damaged or foreign", "the seal"))


class TestResume:
    @pytest.fixture
    def run(self, shell: Shell, tiny_config: MakeConfig) -> Path:
        from tasks.lifecycle.start import start_run

        prompts = shell.folder / "prompts.jsonl"
        shutil.copy(shell.tiny.prompts, prompts)
        start_run(tiny_config([f"prompts.source={prompts}"]), "run")
        return shell.folder / "run"

    def test_other_prompts(self, shell: Shell, run: Path) -> None:
        with (shell.folder / "prompts.jsonl").open("a") as file:
            file.write('{"prompt": "one more"}\n')
        before = shell.content()
        with pytest.raises(SystemExit) as caught:
            main(["resume", "run"])
        err = shell.capsys.readouterr().err
        assert caught.value.code == EXIT_MISTAKE
        assert "Traceback" not in err
        assert err.startswith("error: run was started under other conditions")
        assert "\n  prompts: " in err, "the difference"
        assert "--accept-drift" in err
        assert "models" not in err, "only the difference"
        assert shell.content() == before

    def test_the_difference_is_printed_as_it_is(self, shell: Shell, run: Path) -> None:
        """Not as rich's markup."""
        record = read_record(run / "run.json")
        record["identity"]["device"] = "[/bold] card"
        write_record(run / "run.json", record)
        with pytest.raises(SystemExit):
            main(["resume", "run"])
        assert "\n  device: [/bold] card -> cpu\n" in shell.capsys.readouterr().err

    def test_prompts_that_are_gone(self, shell: Shell, run: Path) -> None:
        (shell.folder / "prompts.jsonl").unlink()
        says(shell.refused("resume", "run"), Mistake("prompts.source", "prompts.jsonl'", "does not exist"))


class TestInspect:
    @pytest.fixture(autouse=True)
    def run(self, shell: Shell, tiny_config: MakeConfig) -> Path:
        """One iteration with two stages."""
        run = RunFolder.create(shell.folder / "run", tiny_config([]), {})
        for stage in ("sample_prompts", "generate"):
            commit_stage(
                run.path, stage, 0, one_row(stage), key="k", inputs={}, seed=0, identity=digest_json({}),
                metrics={"prompts/epoch": 0.0}, state={}, timing={"total_s": 0.1},
            )  # fmt: skip
        return run.path

    @pytest.mark.parametrize(
        ("options", "mistake"),
        [
            (["--iteration", "7"], Mistake("--iteration 7", "is not in run", "the newest is 0")),
            (["--stage", "reward"], Mistake("--stage reward", "is not a stage", "stages: sample_prompts, generate")),
            (
                ["--stage", "ppo_update"],
                Mistake("--stage ppo_update", "iteration 0 is not committed", "committed: sample_prompts, generate"),
            ),
            (["--sample", "seven"], Mistake("--sample 'seven'", "is not a sample id", "i000007-p000123-s0")),
            (["--sample", "i000009-p000000-s0"], Mistake("--iteration 9", "is not in run", "the newest is 0")),
            (["--sample", "i000000-p000099-s0"], Mistake("--sample i000000-p000099-s0", "not in", "02_rollouts")),
        ],
    )
    def test_what_is_not_there(self, shell: Shell, options: list[str], mistake: Mistake) -> None:
        before = shell.content()
        says(shell.refused("inspect", "run", *options), mistake)
        assert shell.content() == before

    def test_a_sample_before_its_response(self, shell: Shell, run: Path) -> None:
        for path in (run / "iterations" / "000000").glob("02_*"):
            path.unlink()
        sentences = shell.refused("inspect", "run", "--sample", "i000000-p000000-s0")
        assert len(sentences) == 1
        assert "generate" in sentences[0] or "02_rollouts" in sentences[0]

    def test_a_missing_artifact(self, shell: Shell, run: Path) -> None:
        (run / "iterations/000000/02_rollouts.arrow").unlink()
        for options in (["--iteration", "0"], ["--stage", "generate"], ["--sample", "i000000-p000000-s0"]):
            sentences = shell.refused("inspect", "run", *options)
            says(sentences, Mistake("run/iterations/000000/02_rollouts.arrow", "is missing", "is committed"))

    def test_a_damaged_artifact(self, shell: Shell, run: Path) -> None:
        with (run / "iterations/000000/02_rollouts.arrow").open("ab") as file:
            file.write(b"!")
        sentences = shell.refused("inspect", "run", "--stage", "generate")
        says(sentences, Mistake("run/iterations/000000/02_rollouts.arrow", "is damaged", "sha256"))

    def test_a_run_without_a_stage(self, shell: Shell, run: Path) -> None:
        shutil.rmtree(run / "iterations")
        says(shell.refused("inspect", "run", "--stage", "generate"), Mistake("run", "has no committed stage", "yet"))


def one_row(stage: str) -> pa.Table:
    """A row of the stage's schema: 0, "x", lists of one, and no support."""

    def some(name: str, kind: Any) -> Any:
        if pa.types.is_list(kind):
            return [] if name.startswith("support") else [some(name, kind.value_type)]
        if pa.types.is_struct(kind):
            return {field.name: some(field.name, field.type) for field in kind}
        return "x" if pa.types.is_string(kind) else 0

    row = {field.name: [some(field.name, field.type)] for field in SCHEMAS[stage]}
    return pa.table(row | {"columns": ["{}"]} if "columns" in row else row, schema=SCHEMAS[stage])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train"], "--config"),
        (["tarin"], "No such command"),
        (["train", "--confg", "x"], "No such option"),
        (["inspect"], "RUN"),
        (["inspect", "run", "--iteration", "-1"], "--iteration"),
        (["inspect", "run", "--limit", "0"], "--limit"),
        (["inspect", "run", "--iteration", "last"], "--iteration"),
    ],
)
def test_usage(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Typer's own refusals keep to the same exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == EXIT_MISTAKE
    err = capsys.readouterr().err
    assert complaint in err
    assert "Traceback" not in err


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The same through the interpreter: nothing but the sentence on stderr, no warning of a library."""
    (tmp_path / "run.yaml").write_text("ppo: {learnig_rate: 1e-5}")
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "train", "--config", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == EXIT_MISTAKE
    assert done.stderr == "error: ppo.learnig_rate is not a known key; did you mean learning_rate?\n"
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
