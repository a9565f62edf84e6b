"""Models, adapters, reward models and prompts that are named by an id of the hub, which moves."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from adapters import save_sft_adapter
from hub_double import A, B, into_cache
from iteration import Bench, tiny_tree

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import model_digest, run_identity
from rlhf_core.preflight import preflight
from rlhf_core.prompts import hub as prompts_hub
from rlhf_core.prompts.sources import load_prompt_set
from tasks.lifecycle.start import check_resumable, start_run
from tasks.session.session import Session
from tasks.sweep.runs import SweepRequest, start_sweep

Folder = Callable[[str, str], Path]
ID = "someone/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the hub itself is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("tasks.lifecycle.start._told", set())
    return tmp_path / "hub"


@pytest.fixture
def moved(cache: Path, tiny: Any, tmp_path: Path) -> Path:
    """``someone/tiny`` with two commits of other weights, and ``main`` at the second."""
    into_cache(cache, ID, A, tiny.policy)
    into_cache(cache, ID, B, with_other_weights(tiny.policy, tmp_path / "other", "AutoModelForCausalLM"))
    return cache


def with_other_weights(source: Path, folder: Path, auto_class: str) -> Path:
    import transformers

    shutil.copytree(source, folder)
    model = getattr(transformers, auto_class).from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(folder)
    return folder


def snapshot(cache: Path, commit: str, repo: str = ID) -> Path:
    return cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def point(cache: Path, commit: str, repo: str = ID) -> None:
    (cache / f"models--{repo.replace('/', '--')}" / "refs" / "main").write_text(commit)


def config_of(tiny: Any, *overrides: str, **sections: Any) -> RunConfig:
    tree = tiny_tree(tiny)
    tree["reward"] = {"components": [{"kind": "function", "function": "length"}]}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return build_config(tree, overrides)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in cast("torch.nn.Module", model).named_parameters()}


def plain_weights(folder: Path, auto_class: str = "AutoModelForCausalLM") -> dict[str, torch.Tensor]:
    import transformers

    return weights_of(getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(config: RunConfig) -> list[str]:
    with pytest.raises(UserError) as caught:
        preflight(config)
    return list(caught.value.problems)


class TestWhichCommitIsLoaded:
    @pytest.mark.parametrize(
        ("policy", "commit"),
        [
            ({"model": ID}, B),
            ({"model": ID, "revision": "main"}, B),
            ({"model": ID, "revision": A}, A),
            ({"model": f"{ID}@{A}"}, A),
            ({"model": f"{ID}@{B}"}, B),
        ],
    )
    def test_of_the_policy_and_its_reference(self, moved: Path, tiny: Any, policy: dict[str, str], commit: str) -> None:
        bench = Bench.of(config_of(tiny, policy=policy))

        expected = plain_weights(snapshot(moved, commit))
        assert_same(weights_of(bench.trainer.actor_critic.policy.model), expected)
        assert_same(weights_of(bench.reference.model), expected)

    def test_of_a_reference_of_its_own(self, moved: Path, tiny: Any) -> None:
        bench = Bench.of(config_of(tiny, policy={"model": ID}, reference={"model": ID, "revision": A}))

        assert_same(weights_of(bench.trainer.actor_critic.policy.model), plain_weights(snapshot(moved, B)))
        assert_same(weights_of(bench.reference.model), plain_weights(snapshot(moved, A)))

    @pytest.mark.parametrize(("revision", "commit"), [(None, B), (A, A)])
    def test_of_a_reward_model_with_the_tokenizer_of_another(
        self, cache: Path, tiny: Any, tmp_path: Path, revision: str | None, commit: str
    ) -> None:
        auto_class = "AutoModelForSequenceClassification"
        into_cache(cache, "someone/rm", A, tiny.reward)
        into_cache(cache, "someone/rm", B, with_other_weights(tiny.reward, tmp_path / "rm", auto_class))
        into_cache(cache, "someone/tok", A, tiny.policy)
        component = {"model": "someone/rm", "revision": revision, "tokenizer": "someone/tok", "tokenizer_revision": A}
        bench = Bench.of(build_config({**tiny_tree(tiny), "reward": {"components": [component]}}))

        expected = plain_weights(snapshot(cache, commit, "someone/rm"), auto_class)
        assert_same(weights_of(cast("Any", bench.rewards[0]).model), expected)

    def test_a_folder_of_that_name_comes_first(
        self, moved: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(tiny.policy, tmp_path / ID)
        assert_same(
            weights_of(Bench.of(config_of(tiny, policy={"model": ID})).trainer.actor_critic.policy.model),
            plain_weights(tiny.policy),
        )
        (problem,) = refused(config_of(tiny, policy={"model": ID, "revision": A}))
        assert problem.startswith(f"policy.model {ID!r} is here on the disk, and has no revision {A!r}")


class TestChecksOfFoldersHoldForTheHub:
    """Each check of a folder, with the same folder as a commit of the hub."""

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
            (lambda f: edit(f / "config.json", attn_implementation="owner/kernel"), "could be code of a hub"),
            (lambda f: (f / "chat_template.jinja").symlink_to("/etc/hostname"), "a link out of the folder"),
            (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "weights as pickle"),
            (lambda f: (f / "model.safetensors").unlink(), "is a model folder without weights"),
            (lambda f: (f / "config.json").unlink(), "without config.json"),
            (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer that"),
            (lambda f: edit(f / "generation_config.json", eos_token_id=["x"]), "which is no token id"),
        ],
    )
    def test_it_is_refused(self, moved: Path, tiny: Any, change: Callable[[Path], None], said: str) -> None:
        change(snapshot(moved, A))
        problem = refused(config_of(tiny, policy={"model": ID, "revision": A}))[0]

        assert problem.startswith(f"policy.model '{ID}@{A}'")
        assert said in problem

    @pytest.mark.parametrize("name", ["someone/other", f"{ID}@{'c' * 40}", f"{ID}@no-such-branch"])
    def test_what_is_not_there(self, moved: Path, tiny: Any, name: str) -> None:
        problems = refused(config_of(tiny, policy={"model": name}))

        assert len(problems) == 1
        assert problems[0].startswith(f"policy.model {name!r} is n")


class TestIdentity:
    def test_an_id_without_a_revision_is_known_by_its_commit(self, moved: Path, tiny: Any) -> None:
        config = config_of(tiny, policy={"model": ID})
        found: list[dict[str, Any]] = []
        for commit in (A, B):
            point(moved, commit)
            found.append(run_identity(config, preflight(config).prompt_set))

        assert [identity["models"] for identity in found] == [
            {"policy": A, "reference": A},
            {"policy": B, "reference": B},
        ]

    @pytest.mark.parametrize(
        "file",
        ["config.json", "generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
         "merges.txt", "qwen.tiktoken", "spiece.model", "bpe.codes", "vocab.bpe", "source.spm",
         "model-00001-of-00002.safetensors"],
    )  # fmt: skip
    def test_every_file_that_libraries_read_is_in_a_folders_digest(self, tmp_path: Path, file: str) -> None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        digests: list[str] = []
        for content in ("1", "2"):
            (tmp_path / file).write_text(content)
            model_digest.cache_clear()
            digests.append(model_digest(str(tmp_path)))

        assert digests[0] != digests[1]

    def test_a_file_that_changes_is_seen_by_the_same_process(self, tiny: Any, tmp_path: Path) -> None:
        shutil.copytree(tiny.policy, tmp_path / "model")
        config = config_of(tiny, policy={"model": str(tmp_path / "model")})
        prompt_set = preflight(config).prompt_set
        before = run_identity(config, prompt_set)
        edit(tmp_path / "model" / "generation_config.json", temperature=0.5)

        assert run_identity(config, prompt_set)["models"] != before["models"]

    def test_what_chooses_how_torch_multiplies(self, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """MKL_CBWR=COMPATIBLE gives other bits of the same matrix product, on the same instruction set."""
        config = config_of(tiny)
        prompt_set = preflight(config).prompt_set
        assert "settings" not in run_identity(config, prompt_set)
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
        assert run_identity(config, prompt_set)["settings"] == {"MKL_CBWR": "COMPATIBLE"}
        monkeypatch.delenv("MKL_CBWR")
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            assert run_identity(config, prompt_set)["settings"] == {"float32_matmul_precision": "high"}
        finally:
            torch.set_float32_matmul_precision(precision)


class TestARun:
    @pytest.fixture
    def begun(self, moved: Path, tiny: Any, tmp_path: Path) -> Path:
        """A run that began at the first commit; the branch is at the second now."""
        point(moved, A)
        start_run(config_of(tiny, policy={"model": ID}), str(tmp_path / "run"))
        point(moved, B)
        return tmp_path / "run"

    def test_keeps_its_commit_and_names_the_move(
        self, begun: Path, moved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="tasks.lifecycle.start"):
            config = check_resumable(str(begun), accept_drift=False)
            check_resumable(str(begun), accept_drift=False)

        assert config.policy.model == f"{ID}@{A}"
        assert [r.getMessage() for r in caplog.records] == [
            f"policy.model {ID!r} has moved: main is commit {B} now, and the run keeps {A}"
        ]
        session = Session(RunFolder.open(begun))
        assert_same(weights_of(session.policy.trainer(0).actor_critic.policy.model), plain_weights(snapshot(moved, A)))

    def test_says_nothing_where_nothing_moved(self, begun: Path, moved: Path, caplog: pytest.LogCaptureFixture) -> None:
        point(moved, A)
        with caplog.at_level(logging.WARNING, logger="tasks.lifecycle.start"):
            check_resumable(str(begun), accept_drift=False)

        assert caplog.records == []

    def test_whose_commit_is_gone_is_refused_in_a_sentence(self, begun: Path, moved: Path) -> None:
        shutil.rmtree(snapshot(moved, A))
        with pytest.raises(UserError) as caught:
            check_resumable(str(begun), accept_drift=False)

        (problem,) = caught.value.problems
        assert problem.startswith(f"policy.model '{ID}@{A}' is not in the hub's cache at that commit")

    def test_records_what_was_asked(self, begun: Path, tiny: Any) -> None:
        run = RunFolder.open(begun)

        assert run.unpinned == {"policy.model": ID}
        assert run.asked_config == config_of(tiny, policy={"model": ID})

    def test_from_folders_has_no_pins(self, tiny: Any, tmp_path: Path) -> None:
        start_run(config_of(tiny), str(tmp_path / "run"))

        assert b"unpinned" not in (tmp_path / "run" / "run.json").read_bytes()
        assert "template_date" not in RunFolder.open(tmp_path / "run").identity


class TestASweep:
    def test_goes_on_with_the_commit_that_it_began_with(self, moved: Path, tiny: Any, tmp_path: Path) -> None:
        point(moved, A)
        config = config_of(tiny, policy={"model": ID})
        request = SweepRequest(str(tmp_path / "sweep"), {"kl.coef": [0.1, 0.2]})
        first = start_sweep(request, config)
        start_run(first.runs[0].config, str(first.run_path(first.runs[0])))
        point(moved, B)
        again = start_sweep(request, config)

        assert {run.config.policy.model for run in again.runs} == {f"{ID}@{A}"}

    def test_over_revisions_has_each_of_them(self, moved: Path, tiny: Any, tmp_path: Path) -> None:
        request = SweepRequest(str(tmp_path / "sweep"), {"policy.revision": [A, B]})
        there = start_sweep(request, config_of(tiny, policy={"model": ID}))

        assert [run.config.policy.model for run in there.runs] == [f"{ID}@{A}", f"{ID}@{B}"]


class TestPromptsOfTheHub:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """The hub says that main is at the first commit; `datasets` gives 20 prompts."""
        import datasets

        calls: list[dict[str, Any]] = []

        def load(repo: str, _subset: str | None, **more: Any) -> datasets.Dataset:
            calls.append({"repo": repo, **more})
            return datasets.Dataset.from_list([{"prompt": f"Text {i}"} for i in range(20)])

        class Info:
            sha = A

        monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: Info())
        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    def test_are_read_at_the_commit_of_the_start(self, calls: list[dict[str, Any]], tiny: Any, tmp_path: Path) -> None:
        start_run(config_of(tiny, prompts={"source": "someone/prompts"}), str(tmp_path / "run"))

        assert RunFolder.open(tmp_path / "run").config.prompts.source == f"someone/prompts@{A}"
        assert calls == [{"repo": "someone/prompts", "split": "train", "revision": A}]

    def test_take_a_revision(self, calls: list[dict[str, Any]], tiny: Any) -> None:
        config = config_of(tiny, prompts={"source": "someone/prompts", "revision": B})
        load_prompt_set(config.prompts)

        assert calls == [{"repo": "someone/prompts", "split": "train", "revision": B}]

    def test_of_another_commit_than_asked_are_refused(self, tmp_path: Path) -> None:
        """Without network `datasets` gives what it has prepared last, whatever revision it is asked for."""

        prepared = SimpleNamespace(
            cache_files=[{"filename": str(tmp_path / "default" / "0.0.0" / B / "p-train.arrow")}]
        )
        refuse: Any = prompts_hub._refuse_other_commit
        refuse(prepared, B)
        refuse(prepared, "main")
        with pytest.raises(ValueError, match=f"holds commit {B}"):
            refuse(prepared, A)

    def test_a_file_has_no_revision(self, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        shutil.copy(tiny.prompts, tmp_path / "data" / "prompts")
        (problem,) = refused(config_of(tiny, prompts={"source": "data/prompts", "revision": "v1"}))

        assert problem.startswith("prompts.source 'data/prompts' is here on the disk, and has no revision 'v1'")


class TestAnAdapterOfTheHub:
    def test_is_loaded_at_its_commit_and_names_its_bases(self, moved: Path, tiny: Any, tmp_path: Path) -> None:
        import peft
        from safetensors.torch import load_file

        save_sft_adapter(snapshot(moved, A), tmp_path / "adapter")
        into_cache(moved, "someone/lora", A, tmp_path / "adapter")
        config = config_of(
            tiny,
            policy={"model": ID, "revision": A, "adapter": "someone/lora", "adapter_revision": A},
        )
        policy = Bench.of(config).trainer.actor_critic.policy

        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert policy.adapters is not None
        found = policy.adapters.tensors()
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        policy.adapters.save(tmp_path / "saved")
        told = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert (told["base_model_name_or_path"], told["revision"]) == (ID, A)
        # and plain peft finds that base by it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation inside of peft
            again: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", cache_dir=moved)
        assert_same(
            {n: p for n, p in weights_of(again.get_base_model()).items() if "wte" in n},
            {n: p for n, p in plain_weights(snapshot(moved, A)).items() if "wte" in n},
        )


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
