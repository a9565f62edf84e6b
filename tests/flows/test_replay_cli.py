"""`rlhf replay`, `rlhf bundle` and `rlhf verify BUNDLE` as a person at the terminal sees them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from replays import another_advantage, run_of
from tiny_world import Tiny

from flows import cli
from flows.commands.replaying import EXIT_DIFFERENT
from rlhf_core.contracts.run_folder import RunFolder

Answer = tuple[int, str, str]
Rlhf = Callable[..., Answer]


@pytest.fixture(scope="module")
def place(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two iterations."""
    folder = tmp_path_factory.mktemp("terminal")
    run_of(tiny, folder / "run", {"num_iterations": 2})
    return folder


@pytest.fixture
def rlhf(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """A command line in that folder -> its exit code, what it printed, and its errors."""
    monkeypatch.chdir(place)
    for room in ("cli", "commands.looking", "commands.replaying"):
        monkeypatch.setattr(f"flows.{room}.console", cli.Console(width=160))

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_identical(rlhf: Rlhf) -> None:
    code, out, err = rlhf("replay", "run", "--iteration", "1")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == (
        "identical: iteration 1 of run, all 6 stages, bit for bit (1 CPU thread, as the run)"
    )
    digest = RunFolder.open(Path("run")).manifests(1)["generate"].artifact.sha256[:12]
    assert out.count(digest) == 2, "stored and replayed"
    assert "weights after it" in out


def test_different(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    another_advantage(monkeypatch)
    code, out, _ = rlhf("replay", "run", "--iteration", "1", "--from", "shape_rewards")
    assert code == EXIT_DIFFERENT
    assert "shape_rewards: first difference in advantages, row 3 (i000001-p" in out
    assert "position 0: stored " in out
    assert "Machine, libraries, models, prompts and sources are those of the run" in out
    assert out.splitlines()[-1].startswith("different: iteration 1 of run, shape_rewards (1 CPU thread")


def test_json_and_nothing_else(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = rlhf("replay", "run", "--iteration", "1", "--from", "ppo_update", "--json")
    told = json.loads(out)
    assert (code, told["identical"], [stage["stage"] for stage in told["stages"]]) == (0, True, ["ppo_update"])
    another_advantage(monkeypatch)
    code, out, _ = rlhf("replay", "run", "--iteration", "1", "--from", "shape_rewards", "--json")
    told = json.loads(out)
    assert (code, told["identical"]) == (EXIT_DIFFERENT, False)
    (column,) = told["stages"][0]["differences"]
    assert (column["first"]["column"], column["largest_ulp"]) == ("advantages", 1)


def test_one_sample(rlhf: Rlhf) -> None:
    sample = rlhf("replay", "run", "--iteration", "1", "--sample", "x")[2].split("samples are ")[1].split(" ")[0]
    code, out, _ = rlhf("replay", "run", "--iteration", "1", "--from", "shape_rewards", "--sample", sample)
    assert code == 0
    assert f"{sample}, token by token" in out


def test_what_if(rlhf: Rlhf) -> None:
    code, out, err = rlhf("replay", "run", "--iteration", "1", "--set", "kl.coef=0.9")
    assert (code, err) == (0, "")
    assert "β in force in iteration 1 (--set kl.coef): " in out
    assert "computed again on the same responses: shape_rewards, ppo_update" in out
    assert "advantages: correlation with the stored ones" in out
    assert "Samples whose advantage changes most" in out
    assert "KL penalty (β·KL), mean" in out
    told = json.loads(rlhf("replay", "run", "--iteration", "1", "--set", "kl.coef=0.9", "--json")[1])
    assert told["computed"] == ["shape_rewards", "ppo_update"]


def test_bundle_verify_replay(rlhf: Rlhf, place: Path) -> None:
    code, out, err = rlhf("bundle", "run", "--iteration", "1")
    assert (code, err) == (0, "")
    name = "run-i000001.rlhf.zip"
    assert f"{name}: iteration 1 of run" in out
    assert out.splitlines()[-1] == f"replay it: rlhf replay {name}"
    code, out, _ = rlhf("verify", name)
    assert (code, out.splitlines()[-1]) == (0, "whole")
    told = json.loads(rlhf("verify", name, "--json")[1])
    assert told["bytes"] == (place / name).stat().st_size
    assert rlhf("replay", name)[0] == 0
    assert rlhf("bundle", "run", "--iteration", "1")[2] == (
        f"error: --out {name} is there already; choose another name, or remove it first\n"
    )
    with zipfile.ZipFile(place / name, "a") as archive:
        archive.writestr("../evil", "x")
    for command in (("verify", name), ("replay", name)):
        assert rlhf(*command)[0::2] == (
            2, f"error: {name} holds an entry named '../evil', which no bundle has; nothing was unpacked\n",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay", "nowhere", "--iteration", "1"], "nowhere is not a run folder: there is no such folder"),
        (["replay", "run"], "--iteration is missing: finished are 0 to 1"),
        (["replay", "run", "--iteration", "7"], "--iteration 7 is not in run: finished are 0 to 1"),
        (["replay", "run", "--iteration", "1", "--from", "x"], "--from x is not a stage; stages: sample_prompts, "),
        (["replay", "run", "--iteration", "1", "--set", "seed=1"], "--set seed would need new responses"),
        (["replay", "run", "--iteration", "1", "--set", "kl.coef=9", "--from", "generate"], "do not go together"),
        (["replay", "run/run.json"], "run/run.json is neither a run folder nor a bundle: `rlhf bundle` makes one"),
        (["verify", "run/run.json"], "run/run.json is neither a run folder nor a bundle"),
        (["bundle", "run", "--iteration", "5"], "--iteration 5 is not in run: finished are 0 to 1"),
        (["bundle", "nowhere", "--iteration", "5"], "nowhere is not a run folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(rlhf: Rlhf, arguments: list[str], said: str) -> None:
    code, out, err = rlhf(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
