"""What a run leaves for a person: the same prompts with the same dice before and after, a picture, and a page."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.records import write_record
from rlhf_core.models.devices import using_threads
from rlhf_core.stages.generate import generate
from rlhf_core.stages.score_rewards import score_rewards
from rlhf_core.viewer.page import write_run_page
from tasks.reports.figures import draw_run
from tasks.session.session import Session, open_session


@task(task_run_name="write_report", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def write_report(run_dir: str, limit: int = 5) -> None:
    """Write ``RUN/before_after.json``, ``RUN/report.png`` and ``RUN/view.html``."""
    session = open_session(run_dir)
    rows = compare_samples(session, limit)
    write_record(session.run.path / "before_after.json", {"samples": rows})
    draw_run(session.run, session.run.path / "report.png")
    write_run_page(session.run, session.tokenizer.tokenizer)


def compare_samples(session: Session, limit: int) -> list[dict[str, Any]]:
    """Answer the first prompts of iteration 0 again with the final policy, from the same random numbers.

    Returns: rows of prompt, response and score, before and after.
    """
    config, manifests = session.run.config, session.run.manifests(0)
    prompts = session.prompts(manifests["sample_prompts"].artifact)
    before = session.rollouts(manifests["generate"].artifact, prompts)
    scores_before = session.scores(manifests["score_rewards"].artifact)
    few = _first(prompts, limit)
    with using_threads(session.num_threads):
        after = generate(
            session.policy.trainer(config.num_iterations).actor_critic,
            session.tokenizer,
            few,
            config.generation,
            samples_per_prompt=1,
            seed=config.seed,
            iteration=0,
        ).batch
        scores_after = score_rewards(session.models.reward_components, few, after, config.reward).batch
    return [
        {
            "prompt": few.texts[i],
            "before": before.texts[i * config.prompts.samples_per_prompt],
            "score_before": float(scores_before.score_B[i * config.prompts.samples_per_prompt]),
            "after": after.texts[i],
            "score_after": float(scores_after.score_B[i]),
        }
        for i in range(len(few.prompt_ids))
    ]


def _first(prompts: Prompts, limit: int) -> Prompts:
    return Prompts(**{field.name: getattr(prompts, field.name)[:limit] for field in dataclasses.fields(prompts)})
