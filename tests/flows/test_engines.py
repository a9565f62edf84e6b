"""Responses drawn by transformers' continuous batching: the same contract, and what is done about its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import config, rollouts_of
from torture.runs import fingerprint, start
from transformers import AutoModelForCausalLM

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.verification.run import verify_run
from tasks.session.session import open_session


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()


def by_transformers(tiny: Any, *more: str, shards: int = 1) -> Any:
    tree = config(tiny, None if shards == 1 else 0, num_shards=shards).model_dump()
    return build_config(tree, ["generation.engine=transformers", "ppo.learning_rate=1e-3", *more])


@pytest.fixture(scope="module")
def run_dir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "run"
    start(by_transformers(tiny), path)
    return path


def test_its_log_probs_are_those_of_the_policy(run_dir: Path, tiny: Any) -> None:
    prompts, rollouts = rollouts_of(run_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=torch.float32).eval()
    for prompt, response, logprobs in zip(prompts, rollouts["response_tokens"], rollouts["logprobs"], strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        own = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_responses_end_as_they_should(run_dir: Path, tiny: Any) -> None:
    limit = RunFolder.open(run_dir).config.generation.max_new_tokens
    reasons: set[str] = set()
    for iteration in range(3):
        _, rollouts = rollouts_of(run_dir, iteration)
        for response, reason in zip(rollouts["response_tokens"], rollouts["finish_reason"], strict=True):
            reasons.add(reason)
            assert len(response) == limit if reason == "length" else len(response) <= limit
    assert reasons == {"eos", "length"}


@pytest.mark.slow
def test_the_same_run_gives_the_same_and_nothing_of_it_is_damaged(run_dir: Path, tiny: Any, tmp_path: Path) -> None:
    start(by_transformers(tiny), tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(run_dir)
    assert verify_run(run_dir).damage == []
    first, second = (rollouts_of(run_dir, iteration)[1]["response_tokens"] for iteration in (0, 1))
    assert first != second


def test_the_gap_to_the_policy_is_measured_and_corrected_above_a_threshold(
    run_dir: Path, tiny: Any, tmp_path: Path
) -> None:
    gaps = [RunFolder.open(run_dir).manifests(i)["ppo_update"].metrics for i in range(3)]
    assert all(0 < gap["sampler/logprob_gap_avg"] < 1e-4 for gap in gaps), "another order of adding up, no other policy"
    start(by_transformers(tiny, "ppo.importance_threshold=0"), tmp_path / "weighted")
    paths = (run_dir, tmp_path / "weighted")
    updates = [read_artifact(path, RunFolder.open(path).manifests(0)["ppo_update"].artifact) for path in paths]
    losses = [table["policy_loss"].to_pylist() for table in updates]
    assert losses[0] != losses[1], "weights of nearly one change the last digits"
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_stop_sequence_ends_a_response_where_it_is_complete(run_dir: Path, tiny: Any, tmp_path: Path) -> None:
    """The draws are those without it, cut."""
    _, whole = rollouts_of(run_dir)
    letter = next(c for text in whole["response_text"] for c in text if c.isascii() and c.isalpha())
    start(by_transformers(tiny, f'generation.stop=["{letter}"]', "num_iterations=1"), tmp_path / "run")
    _, cut = rollouts_of(tmp_path / "run")
    stopped = 0
    for before, text, after, reason in zip(
        whole["response_tokens"], whole["response_text"], cut["response_tokens"], cut["finish_reason"], strict=True
    ):
        assert before[: len(after)] == after
        assert (letter in text) == (reason == "stop")
        stopped += reason == "stop"
    assert 0 < stopped < len(whole["response_text"])
    texts = [text for text, reason in zip(cut["response_text"], cut["finish_reason"], strict=True) if reason == "stop"]
    assert all(text.count(letter) == 1 for text in texts)


@pytest.mark.slow
def test_it_works_by_shards_with_k_samples_and_no_critic(tiny: Any, tmp_path: Path) -> None:
    changes = ["prompts.samples_per_prompt=2", "shaping.estimator=rloo", "num_iterations=2"]
    start(by_transformers(tiny, *changes, shards=2), tmp_path / "run")
    _, rollouts = rollouts_of(tmp_path / "run", 1)
    pairs = list(zip(rollouts["response_tokens"][::2], rollouts["response_tokens"][1::2], strict=True))
    assert any(first != second for first, second in pairs), "two samples of a prompt are two draws"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["generation.top_k=5"], "does not tell the support of a truncated draw"),
        (["policy.lora.rank=2"], "does not know the adapter"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: list[str], told: str, tiny: Any) -> None:
    with pytest.raises(UserError, match=told):
        by_transformers(tiny, *changes)
