"""The six stages as one table: what each reads, what its key is made of, and what it writes.

    sample_prompts → generate ─┬→ score_rewards ──────┬→ shape_rewards → ppo_update
                               └→ reference_logprobs ─┘

Tasks, verification, replay and the documentation take their knowledge of the stages from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from rlhf_core.contracts.schemas import (
    GENERATE,
    PPO_UPDATE,
    REFERENCE_LOGPROBS,
    SAMPLE_PROMPTS,
    SCORE_REWARDS,
    SHAPE_REWARDS,
)


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Example: ``StageSpec("score_rewards", "scores", "03_scores", SCORE_REWARDS, reads=("prompts", "rollouts"), …)``
    """

    name: str
    artifact: str
    """Name of its artifact, as later stages know it."""
    file_stem: str
    """Name of its files, without the ending."""
    schema: pa.Schema
    reads: tuple[str, ...]
    """Artifacts that its task is given, in the order of the arguments."""
    inputs: tuple[str, ...]
    """Names of the digests in its key: of artifacts, of the loop ``state``, of the ``policy``'s weights."""
    outputs: tuple[str, ...] = ()
    """Names of digests of results that are not in the artifact; its manifest has them beside the inputs."""


_SPECS: Final = (
    StageSpec("sample_prompts", "prompts", "01_prompts", SAMPLE_PROMPTS, reads=(), inputs=("state",)),
    StageSpec("generate", "rollouts", "02_rollouts", GENERATE, reads=("prompts",), inputs=("prompts", "policy")),
    StageSpec(
        "score_rewards",
        "scores",
        "03_scores",
        SCORE_REWARDS,
        reads=("prompts", "rollouts"),
        inputs=("prompts", "rollouts"),
    ),
    StageSpec(
        "reference_logprobs",
        "ref_logprobs",
        "04_ref_logprobs",
        REFERENCE_LOGPROBS,
        reads=("prompts", "rollouts"),
        inputs=("prompts", "rollouts"),
    ),
    StageSpec(
        "shape_rewards",
        "experience",
        "05_experience",
        SHAPE_REWARDS,
        reads=("prompts", "rollouts", "scores", "ref_logprobs"),
        inputs=("rollouts", "scores", "ref_logprobs", "state"),  # the rollouts' digest covers the prompts
    ),
    StageSpec(
        "ppo_update",
        "update",
        "06_update",
        PPO_UPDATE,
        reads=("prompts", "rollouts", "experience"),
        inputs=("prompts", "rollouts", "experience", "policy", "state"),
        outputs=("policy_after",),
    ),
)

STAGES: Final[dict[str, StageSpec]] = {spec.name: spec for spec in _SPECS}
"""Stage name -> its row, in flow order."""

WRITER_OF: Final[dict[str, str]] = {spec.artifact: spec.name for spec in _SPECS}
"""Name of an artifact -> the stage that writes it."""

READS: Final[dict[str, tuple[str, ...]]] = {
    spec.name: tuple(WRITER_OF[artifact] for artifact in spec.reads) for spec in _SPECS
}
"""Stage name -> the stages whose artifacts its task is given, in the order of the arguments."""

SCHEMAS: Final[dict[str, pa.Schema]] = {spec.name: spec.schema for spec in _SPECS}
FILE_STEMS: Final[dict[str, str]] = {spec.name: spec.file_stem for spec in _SPECS}
