"""Updates by ranks: the same run as one process makes, whichever of them dies, and whoever made it before."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import S3Server
from safetensors.torch import load_file
from tolerances import F32_SUM, RANKS_LOSS, RANKS_WEIGHT
from torture.runs import battery_config, fingerprint, go_on, start

from flows.ppo import train, train_iteration
from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config_io import build_config, config_digest
from rlhf_core.contracts.errors import DriftError, NumericalError, UserError, WorkerError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.store.address import CACHE
from rlhf_core.store.opening import reading, writing
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.start import record_drift
from tasks.ranks import group as rank_group
from tasks.ranks.group import RankGroup
from tasks.replay.iteration import replay_iteration
from tasks.replay.what_if import ask_what_if
from tasks.session.session import Session, open_session

ROOT = Path(__file__).parents[2]
TWO: dict[str, Any] = {"launcher": "torchrun", "nproc_per_node": 2, "deadline_s": 30.0}
LORA: dict[str, Any] = {"lora": {"rank": 2}, "critic": {"kind": "shared"}}
PPO: dict[str, Any] = {"num_ppo_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-3, "embedding_lr_factor": 1.0}

CASES: dict[str, dict[str, Any]] = {
    # in bfloat16 the rows of a pass decide bits: a pass of two rows is what a rank has of a minibatch of four
    "bfloat16": {"policy": {"dtype": "bfloat16", "critic": {"init": "policy"}}, "ppo": PPO | {"micro_batch_size": 2}},
}
MORE_CASES: dict[str, dict[str, Any]] = {
    "lora, shared critic, fewer rows than ranks": {"policy": LORA, "ppo": PPO | {"num_minibatches": 8}},
    "shared critic": {"policy": {"critic": {"kind": "shared"}}},
    "lora in bfloat16": {"policy": LORA | {"dtype": "bfloat16"}, "ppo": PPO | {"micro_batch_size": 2}},
    "merged lora, separate critic": {"policy": {"lora": {"rank": 2, "save": "merged"}, "critic": {"init": "policy"}}},
    "sequence level": {"ppo": PPO | {"level": "sequence"}, "shaping": {"level": "sequence", "estimator": "value"}},
    "micro-batches": {"ppo": PPO | {"micro_batch_size": 1, "entropy_coef": 0.01, "kl_loss_coef": 0.1}},
    "early stop": {"ppo": PPO | {"num_ppo_epochs": 4, "target_kl": 1e-3}},
    "recomputed activations": {"policy": {"gradient_checkpointing": True, "critic": {"init": "policy"}}},
    "critic warm-up": {"ppo": PPO | {"critic_warmup_iterations": 2}},
    "k samples, truncated support, no critic": {
        "prompts": {"batch_size": 8, "samples_per_prompt": 2},
        "shaping": {"estimator": "rloo"},
        "generation": {"max_new_tokens": 6, "top_k": 20},
        "ppo": PPO | {"num_minibatches": 8},
    },
    "shards as well": {"execution": {"num_shards": 2, "num_workers": 0}},
    "shards that answer ahead": {"execution": {"num_shards": 2, "num_workers": 0, "overlap": True}},
}


def config(tiny: Any, update: Mapping[str, Any] | None = None, sections: Mapping[str, Any] | None = None) -> Any:
    places = {"prompts": {"source": str(tiny.prompts)}, "policy": {"model": str(tiny.policy)}}
    tree = {name: places.get(name, {}) | section for name, section in (sections or {}).items()}
    if update is not None:
        tree["execution"] = tree.get("execution", {}) | {"update": dict(update)}
    return battery_config(tiny, tree)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()


@pytest.fixture(scope="module")
def two() -> Iterator[None]:
    """Two ranks for several runs: to start them takes longer than a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.ppo.ranks_end", contextlib.nullcontext)
        yield
    rank_group.end_ranks()


@pytest.fixture(scope="module")
def undisturbed(two: None, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two ranks to which nothing happens."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    start(config(tiny, TWO), run_dir)
    return run_dir


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = RunFolder.open(run_dir).checkpoint_path(3)
    return {
        f"{file.name}|{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def check_close(one: Path, two: Path) -> None:
    """Losses of all steps to 1e-6, weights behind three iterations to 1e-5."""
    for iteration in range(3):
        tables = [
            read_artifact(run, RunFolder.open(run).manifests(iteration)["ppo_update"].artifact) for run in (one, two)
        ]
        assert tables[0].num_rows == tables[1].num_rows
        for name in ("loss", "policy_loss", "value_loss"):
            torch.testing.assert_close(*(torch.tensor(t[name].to_pylist()) for t in tables), **RANKS_LOSS)
        for name in ("grad_norm", "critic_grad_norm"):
            torch.testing.assert_close(*(torch.tensor(t[name].to_pylist()) for t in tables), **F32_SUM)
        for name in ("num_tokens", "num_samples", "skipped"):
            assert tables[0][name] == tables[1][name]
    mine, theirs = final_tensors(one), final_tensors(two)
    assert mine.keys() == theirs.keys(), "the format is the same"
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], **RANKS_WEIGHT, msg=lambda m, n=name: f"{n}: {m}")


def compare(tiny: Any, tmp_path: Path, sections: Mapping[str, Any]) -> None:
    start(config(tiny, None, sections), tmp_path / "one")
    start(config(tiny, TWO, sections), tmp_path / "two")
    check_close(tmp_path / "one", tmp_path / "two")
    assert verify_run(tmp_path / "two").damage == []


def test_two_ranks_compute_what_one_process_does_with_a_separate_critic(
    undisturbed: Path, tiny: Any, tmp_path: Path
) -> None:
    start(config(tiny), tmp_path / "one")
    check_close(tmp_path / "one", undisturbed)
    assert verify_run(undisturbed).damage == []


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_process_does(case: str, tiny: Any, tmp_path: Path) -> None:
    compare(tiny, tmp_path, CASES[case])


@pytest.mark.slow
@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("case", MORE_CASES)
def test_two_ranks_compute_what_one_process_does_in_more_cases(case: str, tiny: Any, tmp_path: Path) -> None:
    compare(tiny, tmp_path, MORE_CASES[case])


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_what_ranks_write_is_in_the_store(
    tiny: Any, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They commit checkpoints by disks of their own, which know of no store."""
    start(config(tiny, TWO), tmp_path / "disk")
    for name, value in {**s3.environment, CACHE: str(tmp_path / "here")}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3.new_bucket()}/run"
    with writing(url) as folder:
        start(config(tiny, TWO), folder)
    monkeypatch.setenv(CACHE, str(tmp_path / "elsewhere"))
    assert fingerprint(reading(url)) == fingerprint(tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_a_run_moves_from_one_process_to_ranks_and_back(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the run that it would have been, to last bits; where it has moved, it is exact again."""
    start(config(tiny), tmp_path / "one")
    run_dir = tmp_path / "moved"
    stop_before(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        start(config(tiny), run_dir)
    to_two = [f"execution.update.{name}={value}" for name, value in TWO.items()]
    with pytest.raises(DriftError, match=r"(?s)update\.ranks: absent -> 2.*--accept-drift"):
        record_drift(str(run_dir), to_two, accepted=False)
    assert record_drift(str(run_dir), to_two) == [
        "update.nnodes: absent -> 1",
        "update.ranks: absent -> 2",
        "update.threads_per_rank: absent -> 1",
    ]
    stop_before(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        go_on(run_dir)
    assert RunFolder.open(run_dir).num_finished() == 2
    assert record_drift(str(run_dir), ["execution.update.deadline_s=31"], accepted=False) == [], "no number changes"
    back = ["execution.update.launcher=inprocess", "execution.update.nproc_per_node=1"]
    assert "update.ranks: 2 -> absent" in record_drift(str(run_dir), back)
    monkeypatch.undo()
    go_on(run_dir)
    check_close(tmp_path / "one", run_dir)
    assert len(RunFolder.open(run_dir).drifts) == 2
    assert verify_run(run_dir).damage == []


def stop_before(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    def stopping(run_dir: str, i: int, *before: Any) -> Any:
        if i == iteration:
            raise KeyboardInterrupt
        return train_iteration(run_dir, i, *before)

    monkeypatch.setattr("flows.ppo.train_iteration", stopping)


def test_a_rank_that_dies_in_an_update_changes_nothing(
    undisturbed: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it matter that the weights before it must be computed again: the newest checkpoint is older."""
    kill_in_update(monkeypatch, iteration=1, after_s=0.2)
    start(config(tiny, TWO), tmp_path / "killed")
    assert "rank 1 of 2" in caplog.text
    assert "died in ppo_update of iteration 1; all ranks are started again" in caplog.text
    assert fingerprint(tmp_path / "killed") == fingerprint(undisturbed)
    replayed = replay_iteration(str(tmp_path / "killed"), 1)
    assert replayed.is_identical, "a replay asks the ranks, too"
    assert ask_what_if(str(tmp_path / "killed"), 1, ["ppo.clip_range=0.1"]).computed == ["ppo_update"]


def kill_in_update(
    monkeypatch: pytest.MonkeyPatch, iteration: int, after_s: float, number: int = signal.SIGKILL
) -> None:
    """Send a signal to the second rank, once."""
    asked, done = RankGroup._ask, threading.Event()

    def disturbed(self: RankGroup, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        if (request["do"], request["iteration"]) == ("update", iteration) and not done.is_set():
            done.set()
            threading.Timer(after_s, os.kill, (self.process_ids()[1], number)).start()
        return asked(self, request, what)

    monkeypatch.setattr(RankGroup, "_ask", disturbed)


@pytest.mark.usefixtures("two")
def test_a_rank_that_stops_is_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "MAX_LOSSES", 1)
    start_run_until_update = config(tiny, TWO)
    kill_in_update(monkeypatch, iteration=0, after_s=0.0, number=signal.SIGSTOP)
    asked = RankGroup._ask

    def impatient(self: RankGroup, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        self.update = self.update.model_copy(update={"deadline_s": 4.0})
        return asked(self, request, what)

    monkeypatch.setattr(RankGroup, "_ask", impatient)
    with pytest.raises(
        WorkerError, match=r"rank 1 of 2 \(pid \d+ on .*\) has not answered for 4 s in ppo_update of iter"
    ):
        start(start_run_until_update, tmp_path / "run")
    group = rank_group._current
    assert group is not None
    assert group.process_ids() == []


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_what_is_not_finite_is_skipped_by_all_ranks_and_raised_as_the_sentence_that_it_is(
    tiny: Any, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"ppo": PPO | {"learning_rate": 1e12, "max_skipped_steps": 2}}
    messages: list[str] = []
    for name, update in (("one", None), ("two", TWO)):
        with pytest.raises(NumericalError) as raised:
            start(config(tiny, update, sections), tmp_path / name)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 0.5])
def test_a_rank_may_die_at_any_time(
    after_s: float, undisturbed: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_in_update(monkeypatch, iteration=2, after_s=after_s)
    start(config(tiny, TWO), tmp_path / "killed")
    assert fingerprint(tmp_path / "killed") == fingerprint(undisturbed)


@pytest.mark.slow
def test_through_prefect_it_is_the_same_run(undisturbed: Path, tiny: Any, tmp_path: Path, prefect_server: None) -> None:
    train(config(tiny, TWO), str(tmp_path / "run"))
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


@pytest.mark.slow
def test_two_nodes_meet(tiny: Any, tmp_path: Path) -> None:
    """As far as two agents of torchrun on one machine are two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    options = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id rlhf --rdzv-endpoint {endpoint}"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), "-m", "tasks.ranks.process"]
    start(config(tiny), tmp_path / "one")
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        other = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        start(config(tiny, TWO | {"nnodes": 2, "nproc_per_node": 1, "endpoint": endpoint}), tmp_path / "two")
        assert other.wait(90) == 0, "it ends with the run"
    finally:
        other.kill()
    check_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.gpu
def test_ranks_on_gpus_compute_what_one_process_does(tiny: Any, tmp_path: Path) -> None:
    """NCCL, on as many GPUs as there are."""
    update = TWO | {"nproc_per_node": torch.cuda.device_count()}
    for name, ranks in (("one", None), ("two", update)):
        start(build_config(config(tiny, ranks).model_dump(), ["device=cuda"]), tmp_path / name)
    check_close(tmp_path / "one", tmp_path / "two")


def test_only_the_layout_is_part_of_what_a_run_is(tiny: Any, tmp_path: Path) -> None:
    plain = config(tiny)
    assert config_digest(config(tiny, TWO)) == config_digest(plain), "it has an entry of its own"
    from rlhf_core.identity import run_identity
    from rlhf_core.preflight import preflight

    prompts = preflight(plain).prompt_set
    identities = {
        name: run_identity(config(tiny, update), prompts)
        for name, update in {"one": None, "two": TWO, "patient": TWO | {"deadline_s": 300.0}}.items()
    }
    assert "update" not in identities["one"]
    assert identities["two"] == identities["patient"]
    assert identities["two"]["update"] == {"ranks": 2, "nnodes": 1, "threads_per_rank": 1}


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        (
            {"nproc_per_node": 2},
            r"execution\.update\.nproc_per_node is 2, but execution\.update\.launcher is inprocess",
        ),
        (
            {"launcher": "torchrun", "nnodes": 2},
            r"execution\.update\.nnodes is 2, but execution\.update\.endpoint is null",
        ),
        ({"launcher": "torchrun", "endpoint": "node0"}, r"execution\.update\.endpoint is 'node0'; write host:port"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(update: dict[str, Any], sentence: str, tiny: Any) -> None:
    with pytest.raises(UserError, match=sentence):
        config(tiny, update)


def test_a_run_with_ranks_keeps_no_trainer_in_its_own_process(tiny: Any, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config(tiny, TWO), {"num_threads": 1})
    session = Session(run)
    assert session.policy.behaviour(0) is session.policy.behaviour(0)
    assert session.policy._trainer is None
