"""`rlhf blend`: the folder it writes, the KL it finds, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_sft_adapter
from iteration import CPU, run_with_checkpoints
from safetensors.torch import load_file
from tolerances import F32_OP
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.cli import EXIT_MISTAKE, main
from rlhf_core.contracts.artifacts import check_folder
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.blending import TOLERANCE, kl_to_reference
from rlhf_core.evaluation.request import Request, prepare
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_reference
from tasks.evaluation.blend import blend

MakeConfig = Callable[[Sequence[str]], RunConfig]
SHARED = "policy.critic.kind=shared"


@pytest.fixture
def run(tiny_config: MakeConfig, tmp_path: Path) -> RunFolder:
    """A run with two checkpoints, which have moved."""
    return run_with_checkpoints(tmp_path / "run", tiny_config([SHARED]), 1, 2)[0]


def test_the_folder_is_whole_and_is_committed_at_once(run: RunFolder, tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    blend(str(run.path), str(out), share=0.3, kl=None, checkpoint="1")
    assert {"model.safetensors", "config.json", "tokenizer.json", "blend.json"} <= set(check_folder(out)["files"])
    start, end, found = (
        load_file(folder / "model.safetensors") for folder in (tiny.policy, run.checkpoint_path(1) / "policy", out)
    )
    for name, value in found.items():
        assert_close(value, start[name] + 0.3 * (end[name] - start[name]), **F32_OP)
    record = json.loads((out / "blend.json").read_text())
    assert (record["checkpoint"], record["share"], record["kl"]) == (1, 0.3, None)
    AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert tokenizer("The film")["input_ids"] == AutoTokenizer.from_pretrained(tiny.policy)("The film")["input_ids"]
    assert [p.name for p in out.parent.iterdir()] == ["out"], "nothing is left beside it"


KINDS = {
    "all weights": (),
    "an adapter": ("policy.lora.rank=4",),
    "a merged adapter": ("policy.lora.rank=4", "policy.lora.save=merged"),
    "an adapter whose reference has one too": ("policy.adapter={sft}",),
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS.keys())
def test_the_policy_has_the_kl_that_was_asked_for(
    overrides: tuple[str, ...], tiny: Any, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    sft = save_sft_adapter(tiny.policy, tmp_path / "sft") if "{sft}" in str(overrides) else None
    config = tiny_config([SHARED, *(o.format(sft=sft) for o in overrides)])
    run, trainer = run_with_checkpoints(tmp_path / "run", config, 1, 2)
    policy = trainer.actor_critic.policy
    prepared = prepare(Request(str(run.path)), config, trained_on=config.prompts, model=None)
    reference = load_reference(config, CPU, policy)

    def kl_of(model: LanguageModel) -> float:
        found = kl_to_reference(model, reference, prepared.plan.tokenizer, prepared.prompts, prepared.config)
        return found.mean

    own = kl_of(policy)
    target = own / 3
    found = blend(str(run.path), str(tmp_path / "out"), share=None, kl=target)
    assert (found.iteration, found.num_prompts, found.num_samples) == (2, 40, 16)
    assert 0.2 < found.share < 0.9
    assert found.kl is not None
    assert found.kl.mean == pytest.approx(target, rel=TOLERANCE)
    written = LanguageModel.load(str(tmp_path / "out"), dtype="float32", device=CPU, trainable=False)
    assert kl_of(written) == pytest.approx(found.kl.mean, abs=1e-3), "the folder is what was measured"


def test_the_command_says_what_it_found(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["blend", str(run.path), "--share", "1", "--checkpoint", "best", "--out", str(tmp_path / "a")])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "1 of the way to checkpoint 2" in out
    assert "KL" not in out
    with pytest.raises(SystemExit):
        main(["blend", str(run.path), "--kl", "0.3", "--out", str(tmp_path / "b")])
    record = json.loads((tmp_path / "b/blend.json").read_text())
    out = capsys.readouterr().out
    assert f"{record['share']:.4g} of the way to checkpoint 2" in out
    assert f"KL to the reference: {record['kl']:.2f} ± " in out
    assert "on 40 prompts x 16 responses" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}"], "neither of --share and --kl given; give one of them"),
        (["{run}", "--share", "0.5", "--kl", "1"], "both of --share and --kl given; give one of them"),
        (["{run}", "--share", "1.5"], "--share is 1.5; it must be in 0 (the reference) .. 1 (the checkpoint)"),
        (["{run}", "--share", "nan"], "--share is nan; it must be in 0"),
        (["{run}", "--kl", "0"], "--kl is 0; it must be at least 0.01 nats; the reference itself is --share 0"),
        (["{run}", "--kl", "0.005"], "--kl is 0.005; it must be at least 0.01 nats"),
        (["{run}", "--kl", "nan"], "--kl is nan; it must be at least 0.01 nats"),
        (["{run}", "--kl", "500"], "--kl is 500, but checkpoint 2 itself is "),
        (["{run}", "--share", "0.5", "--out", "there"], "--out there exists already; choose a new folder"),
        (["{run}", "--share", "0.5", "--checkpoint", "7"], "--checkpoint 7 is not kept in {run}; there are: 1, 2"),
        (["{run}", "--share", "0.5", "--checkpoint", "last"], "--checkpoint is 'last'; choose newest, best, last_good"),
        (["{run}", "--share", "0.5", "--checkpoint", "all"], "--checkpoint is 'all'; choose one: newest, best"),
        (["there", "--share", "0.5"], "there is not a run folder: it has no run.json"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    arguments: list[str], said: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    filled = [a.format(run=run.path) for a in arguments]
    with pytest.raises(SystemExit) as caught:
        main(["blend", *filled, *([] if "--out" in filled else ["--out", "new"])])
    assert caught.value.code == EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said.format(run=run.path)}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused(run: RunFolder, tmp_path: Path) -> None:
    file = run.checkpoint_path(2) / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(IntegrityError, match="is damaged"):
        blend(str(run.path), str(tmp_path / "out"), share=0.5, kl=None)
    assert not (tmp_path / "out").exists()


def test_the_run_is_left_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    blend(str(run.path), str(tmp_path / "out"), share=None, kl=0.3)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    assert torch.is_grad_enabled()
