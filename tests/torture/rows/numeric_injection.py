"""Wrong numbers, put where each of the six stages meets them in a run: refused in words, or handled; never silent.

A cell of the table is a fault at a stage, and what must come of it:

    refused     the run ends with the right error and words, nothing of the refusing stage is committed, and once what
                is broken is deleted as the message says, resuming ends with the undisturbed run's fingerprint
    handled     the run goes on to its end with finite numbers, and with the promised metric, or the very fingerprint
    impossible  the stage has nothing that the fault could hit
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from iteration import tiny_tree
from tiny_world import Tiny
from torture import faults as f
from torture.battery import Effort, Outcome
from torture.faults import ITERATION, Plan
from torture.injection import Cell, Handled, Impossible, Injector, Refused
from torture.runs import warm

from rlhf_core.contracts.artifacts import artifact_path
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.stage_graph import STAGES

NAME = "numeric injection"
GOAL = "25 faults × 6 stages, documented outcome each"
PROMPTS, GENERATE, SCORE, REFERENCE, SHAPE, UPDATE = STAGES
SMALL = 13
"""Every so many-th cell is tried in the small battery: a dozen."""

NO_MODEL = Impossible("no model is in memory: it does arithmetic on what is stored")
ONLY_TEXT = Impossible("no model is in memory: it draws rows of a list and tokenizes them")
AGAIN = Handled("seen on resume, told, and computed again", same=True)
DELETE = "delete that artifact with its manifest .*and resume"
RESUME = "`rlhf resume .*` computes it again"


def measure(effort: Effort) -> Outcome:
    """Plant each fault in a run of its own."""
    table = faults(effort.tiny)
    cells = {(name, stage): table[name][stage] for name in table for stage in STAGES}
    possible = [(*place, *cell) for place, cell in cells.items() if not isinstance(cell, Impossible)]
    chosen = possible if effort.full else possible[::SMALL]

    def configure(overrides: tuple[str, ...]) -> RunConfig:
        tree = tiny_tree(effort.tiny) | {"kl": {"horizon": 50.0, "target": 0.5}, "checkpoint": {"every": 2}}
        return build_config(tree, list(overrides))

    warm(configure(()), effort.folder / "warm")
    injector = Injector(effort.folder, configure)
    failures: list[str] = []
    for done, (name, stage, plan, expected) in enumerate(chosen):
        if wrong := injector.try_out(name, stage, plan, expected):
            failures.append(f"{name} at {stage}: {wrong}")
        effort.progress(done + 1, len(chosen))
    left_out = len(cells) - len(possible)  # documented as impossible: nothing is left to try
    tried = len(chosen) + (left_out if effort.full else 0)
    refused = sum(isinstance(expected, Refused) for *_, expected in chosen)
    return Outcome(
        tried=tried,
        passed=tried - len(failures),
        figure=f"{tried - len(failures)} of {tried} cells as documented: {refused} refused in words, "
        f"{len(chosen) - refused} handled, {tried - len(chosen)} impossible",
        goal_size=len(table) * len(STAGES),
        failures=failures[:20],
        numbers={"faults": len(table), "messages": injector.messages},
    )


def faults(tiny: Tiny) -> dict[str, dict[str, Cell]]:
    """Every fault with its six cells."""
    table: dict[str, dict[str, Cell]] = {}
    for name, value in (("NaN computed", math.nan), ("+inf computed", math.inf), ("-inf computed", -math.inf)):
        table[name] = _computed(value, _not_finite(value))
    table["1e38 computed"] = _computed(1e38, _huge(1e38))
    table["-1e38 computed"] = _computed(-1e38, _huge(-1e38))
    table["denormals and -0.0 computed"] = _tiny_numbers()
    table["garbage in padding"] = _padding()
    table |= _stored()
    table |= _in_memory()
    table["broken file read"] = _broken_files(tiny)
    for name, key, text in (("β in the loop state", "kl_coef", "1e999"), ("moments in the loop state", "m2", "-4.0")):
        table[name] = _loop_state(key, text)
    table |= _knobs()
    table["degenerate batch"] = _degenerate()
    return table


def _computed(value: float, outcomes: Mapping[str, Refused | Handled]) -> dict[str, Cell]:
    """One number of what a stage has computed is ``value``, after all checks of the stage itself."""
    edits = {
        PROMPTS: f.set_metric("prompts/mean_len", value),
        GENERATE: f.set_one("values_BR", value),
        SCORE: f.set_one("score_B", value),
        REFERENCE: f.set_one("ref_logprobs_BR", value),
        SHAPE: f.set_one("advantages_BR", value),
        UPDATE: f.set_step("policy_loss", value),
    }
    cells: dict[str, Cell] = {}
    for stage in STAGES:
        outcome = outcomes[stage]
        later = isinstance(outcome, Refused) and outcome.by  # what is committed by then does not go by itself
        spoils = artifact_path(ITERATION, stage).removesuffix(".arrow") if later else ""
        cells[stage] = (Plan(result=edits[stage], spoils=spoils), outcome)
    return cells


def _not_finite(value: float) -> dict[str, Refused | Handled]:
    columns = {
        GENERATE: "values",
        SCORE: "score",
        REFERENCE: "ref_logprobs",
        SHAPE: "advantages",
        UPDATE: "policy_loss",
    }
    rows = {UPDATE: r"1 of 4 rows \(step 1\)"}
    sample = r"1 of 8 rows \(sample_id i000001-p\d+-s0\)"
    found: dict[str, Refused | Handled] = {
        stage: Refused("NumericalError", f"computed {value:g} in the column {column} of {rows.get(stage, sample)}")
        for stage, column in columns.items()
    }
    return {PROMPTS: Refused("NumericalError", f"computed {value:g} as the metric prompts/mean_len"), **found}


def _huge(value: float) -> dict[str, Refused | Handled]:
    spread = Refused("NumericalError", "inf as the metric advantages/std.*shaping.score_clip", by=SHAPE)
    values = Refused("NumericalError", "-inf as the metric val/explained_variance.*begin again", by=SHAPE)
    log_prob = Refused(
        "NumericalError", rf"computed {re.escape(f'{value:g}')} in the column ref_logprobs of 1 of 8 rows"
    )
    return {
        PROMPTS: Handled("a metric alone: recorded as it is", metrics={"prompts/mean_len": value}),
        GENERATE: values,
        SCORE: spread,
        REFERENCE: log_prob,
        SHAPE: Handled(
            "the gradient overflows: both steps with that row are skipped", metrics={"guard/skipped_steps": 2.0}
        ),
        UPDATE: Handled("a statistic alone: recorded as it is"),
    }


def _tiny_numbers() -> dict[str, Cell]:
    handled = Handled("numbers like any other")
    cells = {stage: (plan, handled) for stage, (plan, _) in _pairs(_computed(1e-45, dict.fromkeys(STAGES, handled)))}
    cells[REFERENCE] = (Plan(result=f.set_one("ref_logprobs_BR", -0.0)), handled)
    cells[SCORE] = (Plan(result=f.set_one("score_B", -0.0)), handled)
    return dict(cells)


def _pairs(cells: Mapping[str, Cell]) -> list[tuple[str, tuple[Plan, Refused | Handled]]]:
    return [(stage, cell) for stage, cell in cells.items() if not isinstance(cell, Impossible)]


def _padding() -> dict[str, Cell]:
    """NaN, and tokens of no vocabulary, wherever what a stage reads is padded."""
    same = Handled("what is padded is never read", same=True)
    cells: dict[str, Cell] = {stage: (Plan(before=f.spoil_inputs), same) for stage in tuple(STAGES)[1:]}
    return {PROMPTS: (Plan(result=f.spoil_result), same), **cells}


def _reads(source: str, edit: f.Edit, words: str) -> Cell:
    """An artifact that is wrong in itself: a resume sees that."""
    return Plan(reads=(source, edit)), Refused("IntegrityError", f"{words}.*{RESUME}")


def _misfits(source: str, edit: f.Edit, words: str) -> Cell:
    """An artifact that is wrong beside the others alone: a person deletes it."""
    spoils = artifact_path(ITERATION, source).removesuffix(".arrow")
    return Plan(reads=(source, edit), spoils=spoils), Refused("IntegrityError", f"{words}.*{DELETE}")


def _own(stage: str, edit: f.Edit) -> Cell:
    return Plan(on_resume=f.poison_own(stage, edit)), AGAIN


def _opened(edit: f.Edit, words: str) -> Cell:
    """The update's artifact is read by people alone."""
    plan = Plan(on_resume=f.poison_own(UPDATE, edit), looks=True)
    return plan, Refused("IntegrityError", f"{words}.*{RESUME}", by="open")


def _stored() -> dict[str, dict[str, Cell]]:
    """An artifact that a stage reads: its digest and seals are right, and its value is wrong.

    sample_prompts reads none; it meets its own artifact again when the run is resumed.
    """
    per_token = ("response_tokens", "logprobs", "entropies", "values")
    shaped = ("token_kl", "rewards", "advantages", "returns")
    return {
        "NaN stored": {
            PROMPTS: (Plan(on_resume=f.poison_own_manifest(PROMPTS, "prompts/mean_len")), AGAIN),
            GENERATE: _own(GENERATE, f.cell("values", math.nan)),
            SCORE: _reads(GENERATE, f.cell("values", math.nan), "nan in the column values of 1 of 8 rows"),
            REFERENCE: _reads(GENERATE, f.cell("logprobs", math.nan), "nan in the column logprobs of 1 of 8 rows"),
            SHAPE: _reads(REFERENCE, f.cell("ref_logprobs", math.nan), "nan in the column ref_logprobs of 1 of 8"),
            UPDATE: _reads(SHAPE, f.cell("advantages", math.nan), "nan in the column advantages of 1 of 8 rows"),
        },
        "infinity stored": {
            PROMPTS: (Plan(on_resume=f.poison_own_manifest(PROMPTS, "total_s")), AGAIN),
            GENERATE: _own(GENERATE, f.cell("entropies", math.inf)),
            SCORE: _reads(GENERATE, f.cell("entropies", math.inf), "inf in the column entropies of 1 of 8 rows"),
            REFERENCE: _reads(GENERATE, f.cell("values", -math.inf), "-inf in the column values of 1 of 8 rows"),
            SHAPE: _reads(SCORE, f.cell("score", math.inf), "inf in the column score of 1 of 8 rows"),
            UPDATE: _reads(SHAPE, f.cell("returns", -math.inf), "-inf in the column returns of 1 of 8 rows"),
        },
        "row missing": {
            PROMPTS: _own(PROMPTS, lambda table: table.slice(1)),
            GENERATE: _reads(PROMPTS, lambda table: table.slice(1), "7 rows where 8 were committed"),
            SCORE: _reads(GENERATE, lambda table: table.slice(1), "7 rows where 8 were committed"),
            REFERENCE: _reads(GENERATE, lambda table: table.slice(0, 7), "7 rows where 8 were committed"),
            SHAPE: _reads(SCORE, lambda table: table.slice(1), "7 rows where 8 were committed"),
            UPDATE: _reads(SHAPE, lambda table: table.slice(1), "7 rows where 8 were committed"),
        },
        "rows in another order": {
            PROMPTS: _own(PROMPTS, lambda table: f.twice("prompt_id")(f.reverse(table))),
            GENERATE: _own(GENERATE, lambda table: f.twice("sample_id")(f.reverse(table))),
            SCORE: _misfits(GENERATE, f.reverse, "rollouts stand in another order than their prompts"),
            REFERENCE: _misfits(GENERATE, f.reverse, "rollouts stand in another order than their prompts"),
            SHAPE: _misfits(SCORE, f.reverse, "different samples or another order"),
            UPDATE: _misfits(SHAPE, f.reverse, "different samples or another order"),
        },
        "two rows of one name": {
            PROMPTS: _own(PROMPTS, f.twice("prompt_id")),
            GENERATE: _reads(PROMPTS, f.twice("prompt_id"), r"1 prompt_ids more than once \(\d+\)"),
            SCORE: _reads(GENERATE, f.twice("sample_id"), r"1 sample_ids more than once \(i000001"),
            REFERENCE: _reads(GENERATE, f.twice("sample_id"), r"1 sample_ids more than once \(i000001"),
            SHAPE: _reads(REFERENCE, f.twice("sample_id"), r"1 sample_ids more than once \(i000001"),
            UPDATE: _opened(f.twice("step"), "steps that are not 0, 1, 2"),
        },
        "empty list": {
            PROMPTS: _own(PROMPTS, f.emptied("prompt_tokens")),
            GENERATE: _reads(PROMPTS, f.emptied("prompt_tokens"), "empty list in the column prompt_tokens of 1 of 8"),
            SCORE: _reads(GENERATE, f.emptied(*per_token), "empty list in the column response_tokens of 1 of 8"),
            REFERENCE: _reads(GENERATE, f.emptied(*per_token), "empty list in the column response_tokens of 1 of 8"),
            SHAPE: _reads(SCORE, f.emptied("components"), "empty list in the column components of 1 of 8 rows"),
            UPDATE: _reads(SHAPE, f.emptied(*shaped), "empty list in the column token_kl of 1 of 8 rows"),
        },
        "list of another length": {
            PROMPTS: Impossible("a prompt has one list, so there is nothing that it could be longer than"),
            GENERATE: _own(GENERATE, f.longer("logprobs")),
            SCORE: _reads(GENERATE, f.longer("logprobs"), "another length than response_tokens in the column logprobs"),
            REFERENCE: _reads(GENERATE, f.longer("values"), "another length than response_tokens in the column values"),
            SHAPE: _misfits(REFERENCE, f.longer("ref_logprobs"), "ref_logprobs of 1 of 8 rows .* another length"),
            UPDATE: _misfits(SHAPE, f.longer(*shaped), "advantages of 1 of 8 rows .* another length"),
        },
        "negative id or count": {
            PROMPTS: _own(PROMPTS, f.cell("prompt_tokens", -1)),
            GENERATE: _reads(PROMPTS, f.cell("prompt_tokens", -1), "-1 in the column prompt_tokens of 1 of 8 rows"),
            SCORE: _reads(GENERATE, f.cell("response_tokens", -5), "-5 in the column response_tokens of 1 of 8 rows"),
            REFERENCE: _reads(PROMPTS, f.cell("prompt_tokens", -1), "-1 in the column prompt_tokens of 1 of 8 rows"),
            SHAPE: _reads(GENERATE, f.cell("sample_index", -1), "-1 in the column sample_index of 1 of 8 rows"),
            UPDATE: _opened(f.cell("num_tokens", -3), r"-3 in the column num_tokens of 1 of 4 rows \(step 2\)"),
        },
        "token of no vocabulary": {
            PROMPTS: (
                Plan(
                    on_resume=f.poison_own(PROMPTS, f.cell("prompt_tokens", 10_000)),
                    spoils=artifact_path(ITERATION, PROMPTS).removesuffix(".arrow"),
                ),
                Refused("IntegrityError", f"token 10000 in 1 of 8 rows .*vocabulary.*{DELETE}", by=GENERATE),
            ),
            GENERATE: _misfits(PROMPTS, f.cell("prompt_tokens", 10_000), "token 10000 in 1 of 8 rows .*vocabulary"),
            SCORE: _misfits(GENERATE, f.cell("response_tokens", 10_000), "token 10000 in 1 of 8 rows .*vocabulary"),
            REFERENCE: _misfits(GENERATE, f.cell("response_tokens", 10_000), "token 10000 in 1 of 8 rows .*vocabulary"),
            SHAPE: _misfits(GENERATE, f.cell("response_tokens", 10_000), "token 10000 in 1 of 8 rows .*vocabulary"),
            UPDATE: _misfits(GENERATE, f.cell("response_tokens", 10_000), "token 10000 in 1 of 8 rows .*vocabulary"),
        },
    }


def _in_memory() -> dict[str, dict[str, Cell]]:
    """A model in memory is broken, or one of its passes is."""
    reference = Refused("NumericalError", "log π_ref is not finite in . of 8 rows .*check reference.model")
    sampled = Refused("NumericalError", "a log-prob, entropy or value is not finite in . of 8 rows .*ppo.learning_rate")
    scored = Refused("NumericalError", r"reward component \S+ gave nan for . of 8 samples .*check the model's weights")
    updated = Refused("NumericalError", "log-probs are not finite on the first minibatch.*resume")
    table: dict[str, dict[str, Cell]] = {}
    for name, value in (("NaN weights", math.nan), ("1e38 weights", 1e38)):
        table[name] = {
            PROMPTS: ONLY_TEXT,
            GENERATE: (Plan(before=f.set_weight(GENERATE, value)), sampled),
            SCORE: (Plan(before=f.set_weight(SCORE, value)), scored),
            REFERENCE: (Plan(before=f.set_weight(REFERENCE, value)), reference),
            SHAPE: NO_MODEL,
            UPDATE: (Plan(before=f.set_weight(UPDATE, value)), updated),
        }
    table["one NaN pass"] = {
        PROMPTS: ONLY_TEXT,
        GENERATE: (Plan(before=f.one_bad_pass(GENERATE)), sampled),
        SCORE: (Plan(before=f.one_bad_pass(SCORE)), scored),
        REFERENCE: (Plan(before=f.one_bad_pass(REFERENCE)), reference),
        SHAPE: NO_MODEL,
        UPDATE: (
            Plan(before=f.one_bad_gradient),
            Handled("the step is skipped and counted", metrics={"guard/skipped_steps": 1.0}),
        ),
    }
    return table


def _broken_files(tiny: Tiny) -> dict[str, Cell]:
    """A file that the stage's input comes from holds NaN."""
    weight = r"holds a weight that is NaN or infinite \(.*c_fc.weight\); take an intact copy"
    return {
        PROMPTS: (
            Plan(world=("prompts.source", f.broken_prompts(tiny.prompts))),
            Refused("UserError", "broken.jsonl.*line 4.*NaN", by="start"),
        ),
        GENERATE: (
            Plan(world=("policy.model", f.broken_model(tiny.policy))),
            Refused("UserError", f"policy.model '.*broken' {weight}"),
        ),
        SCORE: (
            Plan(world=("reward.components.0.model", f.broken_model(tiny.reward))),
            Refused("UserError", f"reward.components.0.model '.*broken' {weight}"),
        ),
        REFERENCE: (
            Plan(world=("reference.model", f.broken_model(tiny.policy))),
            Refused("UserError", f"reference.model '.*broken' {weight}"),
        ),
        SHAPE: Impossible("it reads artifacts and the loop state alone, which have faults of their own here"),
        UPDATE: (
            Plan(changes=("checkpoint.every=1",), on_resume=f.poison_checkpoint, spoils="checkpoints/000001/"),
            Refused(
                "IntegrityError",
                "000001 holds a number that is not finite, in exp_avg_sq of .*delete it and resume",
                by="",
            ),
        ),
    }


def _loop_state(key: str, text: str) -> dict[str, Cell]:
    """A number of the loop state that the iteration starts from, in the sealed manifest of the update before.

    score_rewards and reference_logprobs read no loop state, and generate reads the digest of the weights alone, from
    the same manifest: a number that is no float is seen by whoever reads the manifest first.
    """
    spoils = artifact_path(ITERATION - 1, UPDATE).removesuffix(".arrow") + ".json"  # then it is repaired
    words = "1e999 is too large for a number" if text == "1e999" else "not a loop state: moments.m2 is -4.0.*delete"
    later = {SCORE: SHAPE, REFERENCE: SHAPE} | ({GENERATE: SHAPE} if text != "1e999" else {})
    return {
        stage: (
            Plan(before=f.poison_loop_state(key, text), spoils=spoils),
            Refused("IntegrityError", words, by=later.get(stage, "")),
        )
        for stage in STAGES
    }


def _knobs() -> dict[str, dict[str, Cell]]:
    """Knobs of each stage at the far ends of what a config may say."""
    return {
        "huge knob": {
            PROMPTS: (
                Plan(changes=("prompts.batch_size=1000", "kl.horizon=1000")),
                Refused("UserError", "has 40 prompts, but an iteration takes 1000", by="start"),
            ),
            GENERATE: (
                Plan(changes=("generation.temperature=1e30",)),
                Handled("every token is as likely as any other"),
            ),
            SCORE: (
                Plan(changes=("reward.components.0.weight=3e38",)),
                Refused("NumericalError", "inf as the metric objective/scores.*weights of reward.components", by=SHAPE),
            ),
            REFERENCE: (
                Plan(changes=("reference.dtype=bfloat16",)),
                Handled("a coarse reference: KL within 0.5 a token"),
            ),
            SHAPE: (
                Plan(changes=("kl.coef=1e30", "kl.controller=fixed")),
                Refused(
                    "NumericalError", "3 optimiser steps in a row had a loss or gradient that is not finite", by=UPDATE
                ),
            ),
            UPDATE: (Plan(changes=("ppo.learning_rate=1e38",)), Refused("NumericalError", "ppo.learning_rate")),
        },
        "tiny knob": {
            PROMPTS: (
                Plan(changes=("prompts.max_len=1", "prompts.over_long=truncate_left")),
                Handled("prompts of one token", metrics={"prompts/mean_len": 1.0}),
            ),
            GENERATE: (
                Plan(changes=("generation.temperature=1e-40",)),
                Refused("NumericalError", "is not finite in 8 of 8 rows.*generation.temperature is too small"),
            ),
            SCORE: (Plan(changes=("reward.components.0.weight=1e-45",)), Handled("all scores are 0")),
            REFERENCE: (
                Plan(changes=("generation.top_k=1",)),
                Handled("one token is possible: entropy and KL are 0", metrics={"objective/kl": 0.0}),
            ),
            SHAPE: (
                Plan(changes=("kl.coef=0", "kl.controller=fixed")),
                Handled("no penalty", metrics={"kl/beta": 0.0, "objective/non_score_reward": 0.0}),
            ),
            UPDATE: (Plan(changes=("ppo.learning_rate=1e-45",)), Handled("the policy stays where it is")),
        },
    }


def _degenerate() -> dict[str, Cell]:
    """Batches that say nothing: one response, one token, one score for all, none that ends."""
    return {
        PROMPTS: (
            Plan(changes=("prompts.batch_size=1", "ppo.num_minibatches=1", "kl.horizon=50")),
            Handled("a batch of one", metrics={"objective/scores_std": 0.0}),
        ),
        GENERATE: (
            Plan(changes=("generation.max_new_tokens=1",)),
            Handled("responses of one token", metrics={"rollout/response_len": 1.0}),
        ),
        SCORE: (
            Plan(result=f.set_all("score_B", 0.25)),
            Handled("scores are equal", metrics={"objective/scores_std": 0.0, "objective/scores": 0.25}),
        ),
        REFERENCE: (
            Plan(result=f.set_all("ref_logprobs_BR", -300.0)),
            Handled("a huge KL: the controller's step is bounded"),
        ),
        SHAPE: (
            Plan(
                changes=(
                    "prompts.batch_size=1",
                    "ppo.num_minibatches=1",
                    "generation.max_new_tokens=1",
                    "kl.horizon=50",
                )
            ),
            Handled("one number alone: centred, not divided, and counted", metrics={"guard/flat_batch": 1.0}),
        ),
        UPDATE: (
            Plan(reads=(SHAPE, f.zeroed("advantages"))),
            Handled("nothing to learn: the critic alone moves", metrics={"guard/skipped_steps": 0.0}),
        ),
    }
