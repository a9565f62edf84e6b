"""The tasks of an evaluation as plain functions: whatever the policy is made of, its own weights answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from iteration import CPU, run_with_checkpoints
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.evaluation.request import Request
from rlhf_core.models.checkpoints import new_trainer
from tasks.evaluation.blend import blend
from tasks.evaluation.evaluate import (
    PlannedEvaluation,
    check_evaluation,
    draw_samples,
    start_evaluation,
    write_evaluation,
)
from tasks.reports.figures import blended_lines

MakeConfig = Callable[[Sequence[str]], RunConfig]
SIZES: dict[str, Any] = {"num_prompts": 4, "samples": 3, "frontier_samples": 40}
KINDS = {
    "all weights": (),
    "an adapter": ("policy.lora.rank=4",),
    "a merged adapter": ("policy.lora.rank=4", "policy.lora.save=merged"),
    "the reward model on disk": ("frozen_models=disk",),
}


def evaluated(request: Request, config: RunConfig | None = None) -> tuple[PlannedEvaluation, EvaluationFolder]:
    """All tasks of an evaluation, one after the other."""
    planned = start_evaluation(request, config)
    for policy, part, size in planned.parts:
        draw_samples.fn(planned.folder, policy, planned.policies[policy], part, size)
    write_evaluation.fn(planned)
    return planned, EvaluationFolder.open(Path(planned.folder))


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS.keys())
def test_a_checkpoint_answers_with_its_own_weights(
    overrides: tuple[str, ...], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(["policy.critic.kind=shared", *overrides])
    run, trainer = run_with_checkpoints(tmp_path / "run", config, 1)
    planned, there = evaluated(Request(str(run.path), **SIZES))
    prompts = there.prompts()
    samples = there.samples("000001", planned.policies["000001"], 3)
    reference = new_trainer(config, CPU).actor_critic.policy.model  # before it moved
    for row in range(0, 12, 5):
        prompt = prompts.tokens_QP[row // 3][prompts.mask_QP[row // 3]]
        response = samples.tokens_BR[row][samples.mask_BR[row]]
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            models: list[Any] = [trainer.actor_critic.policy.model, reference]
            mine, its = (
                m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(1).gather(1, response[:, None]).sum()
                for m in models
            )
        assert_close(samples.kl_QK[row // 3, row % 3], mine - its, **F32_MODEL)
    assert float(samples.k3_QK.mean()) > 0.01
    assert float(there.samples("reference", "", 40).kl_QK.abs().max()) == 0.0
    numbers = there.summary()["policies"]["000001"]
    assert numbers["kl"]["mean"] == pytest.approx(float(samples.kl_QK.double().mean()))


def test_an_adapter_is_evaluated_as_a_bare_model(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(["policy.critic.kind=shared", "policy.lora.rank=4"])
    run, _ = run_with_checkpoints(tmp_path / "run", config, 1)
    planned, of_run = evaluated(Request(str(run.path), **SIZES))
    _, bare = evaluated(Request(str(run.checkpoint_path(1) / "policy"), out=str(tmp_path / "bare"), **SIZES), config)
    expected, found = of_run.samples("000001", planned.policies["000001"], 3), bare.samples("model", "", 3)
    assert found.texts == expected.texts
    assert_close(found.kl_QK, expected.kl_QK, **F32_MODEL)


def test_checkpoints_are_chosen_by_name(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_with_checkpoints(tmp_path / "run", tiny_config(["policy.critic.kind=shared"]), 1, 2, 3)
    monkeypatch.setattr("tasks.lifecycle.retention.best_checkpoint", lambda run: 2)

    def chosen(checkpoint: str) -> list[str]:
        planned = check_evaluation(Request(str(run.path), checkpoint=checkpoint, **SIZES), None)
        return [name for name in planned.policies if name != "reference"]

    assert chosen("newest") == ["000003"]
    assert chosen("best") == ["000002"]
    assert chosen("1") == ["000001"]
    run.keep_as_last_good(1)
    assert chosen("last_good") == ["000001"]
    assert chosen("all") == ["000001", "000002", "000003"]
    with pytest.raises(UserError, match=r"--checkpoint 4 is not kept in .*; there are: 1, 2, 3"):
        chosen("4")
    assert not (run.path / "evaluations").exists(), "a look writes nothing"


def test_each_of_several_checkpoints_is_loaded_and_changed_weights_are_drawn_anew(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(["policy.critic.kind=shared"])
    run, _ = run_with_checkpoints(tmp_path / "a", config, 1, 2)
    request = Request(str(run.path), checkpoint="all", out=str(tmp_path / "out"), **SIZES)
    _, there = evaluated(request)
    policies = there.summary()["policies"]
    assert policies["000002"]["k3"]["mean"] > 1.5 * policies["000001"]["k3"]["mean"]
    other, _ = run_with_checkpoints(tmp_path / "b", config, 2)  # moved once: the same weights as the first above
    shutil.rmtree(run.checkpoint_path(2))
    other.checkpoint_path(2).rename(run.checkpoint_path(2))
    _, there = evaluated(request)
    assert there.summary()["policies"]["000002"]["k3"] == policies["000001"]["k3"]


def test_reward_functions_score_with_the_columns_of_the_prompts(tiny_config: MakeConfig, tmp_path: Path) -> None:
    words = "{kind: function, function: length, params: {unit: characters}}"
    config = tiny_config(["policy.critic.kind=shared", f"reward.components=[{words}]"])
    run, _ = run_with_checkpoints(tmp_path / "run", config, 1)
    planned, there = evaluated(Request(str(run.path), **SIZES))
    samples = there.samples("000001", planned.policies["000001"], 3)
    assert len(set(samples.score_QK.flatten().tolist())) > 1


def test_what_lies_between_the_reference_and_a_checkpoint_is_evaluated_beside_it(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(["policy.critic.kind=shared"])
    run, _ = run_with_checkpoints(tmp_path / "run", config, 1)
    request = Request(str(run.path), blend=(0.8, 0.2, 0.8), **SIZES)
    planned, there = evaluated(request)
    assert list(planned.policies) == ["reference", "000001@0.2", "000001@0.8", "000001"]
    assert len(set(planned.policies.values())) == 4, "each a digest of its own"
    policies = there.summary()["policies"]
    assert [numbers["blend"] for numbers in policies.values()] == [0.2, 0.8, 1.0]
    k3 = [numbers["k3"]["mean"] for numbers in policies.values()]
    assert 0 < k3[0] < k3[2] / 4
    blend(str(run.path), str(tmp_path / "out2"), share=0.2, kl=None)
    _, bare = evaluated(Request(str(tmp_path / "out2"), out=str(tmp_path / "bare"), **SIZES), config)
    expected, found = bare.samples("model", "", 3), there.samples("000001@0.2", planned.policies["000001@0.2"], 3)
    assert found.texts == expected.texts
    assert torch.equal(found.kl_QK, expected.kl_QK)
    _, of_bare = evaluated(
        Request(str(run.checkpoint_path(1) / "policy"), out=str(tmp_path / "bare2"), blend=(0.2,), **SIZES), config
    )
    assert of_bare.summary()["policies"]["model@0.2"]["kl"] == policies["000001@0.2"]["kl"]
    (line,) = blended_lines(there.summary())
    assert line[0] == (0.0, there.summary()["reference"]["score"]["mean"])
    assert line[1:] == [(p["kl"]["mean"], p["score"]["mean"]) for p in policies.values()]
    plain = {"reference": there.summary()["reference"], "policies": {"000001": policies["000001"]}}
    assert blended_lines(plain) == [], "a checkpoint alone has no line"
