"""What is replayed: a run folder as it is, or a bundle in a temporary folder, and what of it can be computed here."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.artifacts import Manifest
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.contracts.trust import accept_values, refused, sentence
from rlhf_core.identity import FINGERPRINT, identity_drift, run_identity, source_digest
from rlhf_core.models.devices import using_threads
from rlhf_core.models.fingerprint import fingerprint
from rlhf_core.models.texts import token_texts
from rlhf_core.preflight import Plan, load_plan
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.replay.bundles import BundleRecord, is_bundle
from rlhf_core.replay.opening import open_bundle
from rlhf_core.replay.outcome import Weights
from rlhf_core.replay.relocation import bundle_plan, relocated
from rlhf_core.replay.rewards import unavailable_rewards, with_models_alone
from tasks.lifecycle.start import INTERPRETER, named_interpreter
from tasks.replay.shadow import as_it_was
from tasks.session.session import Session

MODEL_STAGES = ("sample_prompts", "generate", "score_rewards", "reference_logprobs", "ppo_update")
"""What needs a model or a tokenizer."""


@dataclass(frozen=True)
class Source:
    """A finished iteration with what it was computed from."""

    name: str
    """Of the folder or file, as it was given."""
    run: RunFolder
    """As it was when the iteration was computed, with the config of its run.json."""
    iteration: int
    manifests: Mapping[str, Manifest]
    bundle: BundleRecord | None = None
    folder: Path = Path()
    """That the bundle was unpacked into."""
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    """Stage -> why it cannot be computed here."""

    def located(self, config: RunConfig, own: Sequence[str] = ()) -> RunConfig:
        """A config of the run whose places are on this machine; ``own``: fields that were set here."""
        return config if self.bundle is None else relocated(config, self.bundle, self.folder, own=own)

    def without_foreign(self, config: RunConfig) -> RunConfig:
        """A located config without rewards that are not here: nothing of them is imported or called."""
        return with_models_alone(config) if "score_rewards" in self.missing else config

    def without_program(self, config: RunConfig) -> RunConfig:
        """A config for what reads models and prompts alone: where vLLM is not started, it is not asked either."""
        if self.starts_program or config.generation.engine != "vllm":
            return config
        generation = config.generation.model_copy(update={"engine": "own"})
        return config.model_copy(update={"generation": generation})

    @property
    def starts_program(self) -> bool:
        """Whether the vLLM of this machine draws the responses again."""
        return "generate" not in self.missing

    @cached_property
    def config(self) -> RunConfig:
        """What the stages are computed with here."""
        return self.without_foreign(self.located(self.run.config))

    @cached_property
    def plan(self) -> Plan:
        """Of that config. Raises UserError with everything that is not there."""
        return self.plan_of(self.config)

    def plan_of(self, config: RunConfig) -> Plan:
        """The plan of a located config."""
        config = self.without_program(config)
        if self.bundle is None:
            return load_plan(config)
        return bundle_plan(config, self.bundle) if self.bundle.with_models else _of_arithmetic(self.bundle.vocab_size)

    def decode(self, token: int) -> str:
        """The text of a token, as it is written in Python; "?" where there is no tokenizer."""
        if self.bundle is not None and not self.bundle.with_models:
            return "?"
        return repr(token_texts(self.plan.tokenizer.tokenizer, [token])[0])[1:-1]

    def conditions(self, num_threads: int) -> list[str]:
        """What differs between the identity of the run and that of this machine, one line each.

        Args:
            num_threads: that the replay has computed with, whatever the machine has.
        """
        then = self.run.identity
        if self.bundle is not None and not self.bundle.with_models:
            versions = {name: importlib.metadata.version(name) for name in then["versions"]}
            here = {**then, "source": source_digest(), "versions": versions, "num_threads": num_threads}
            if FINGERPRINT in then:
                here[FINGERPRINT] = fingerprint(num_threads)
            return identity_drift(then, here)
        config = self.without_program(self.config).model_copy(update={"num_threads": num_threads})
        here = run_identity(config, self.plan.prompt_set)
        if not self.starts_program and "vllm" in then["versions"]:  # told already
            here["versions"] = here["versions"] | {"vllm": then["versions"]["vllm"]}
        here |= {"config": config_digest(self.run.config), "num_threads": num_threads}
        if self.bundle is not None:  # sealed; and the name of a hub is no digest of a folder
            here |= {"prompts": then["prompts"], "models": then["models"]}
        if "score_rewards" in self.missing:  # told already
            here["rewards"] = then["rewards"]
        return identity_drift(then, here)


@contextmanager
def opened(
    path: str, iteration: int | None, *, trust: Sequence[str] = (), vllm_python: str | None = None
) -> Iterator[Source]:
    """A run folder or a bundle, ready to be computed from.

    Args:
        path: of the folder or file.
        iteration: finished; a bundle holds one, which need not be named.
        trust: programs, functions and addresses that it names, and that the person accepts.
        vllm_python: interpreter of an environment with vLLM that the person names.
    Raises: UserError if there is no such run, bundle or iteration; IntegrityError if it is damaged.
    """
    if not is_bundle(Path(path)):
        run = RunFolder.open(Path(path))
        if iteration is None:
            raise UserError(f"--iteration is missing: {_finished(run, path)}")
        accept_values(trust, run.config, run.path)
        yield _with_what_is_here(_as_then(path, run, iteration), vllm_python)
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-bundle-") as folder:
        run, record = open_bundle(Path(path), Path(folder))
        if iteration not in (None, record.iteration):
            raise UserError(f"--iteration {iteration} is not in {path}, which holds iteration {record.iteration}")
        accept_values(trust, run.config, Path(path))
        source = replace(_as_then(path, run, record.iteration), bundle=record, folder=Path(folder))
        if record.with_models:
            yield _with_what_is_here(source, vllm_python)
        else:
            yield replace(source, missing=dict.fromkeys(MODEL_STAGES, "the bundle was made --without-models"))


def load_weights(session: Session, iteration: int) -> Weights:
    """Load the weights that an iteration starts from. Raises IntegrityError unless they are the committed ones."""
    started = time.perf_counter()
    with using_threads(session.num_threads):
        digest, committed = session.policy.trainer(iteration).digest(), session.policy_digest(iteration)
    if committed not in ("initial", "", digest):
        raise IntegrityError(
            f"the weights before iteration {iteration} have the digest {digest[:12]}…, {committed[:12]}… was committed"
        )
    checkpoint = max((i for i in session.run.checkpoints() if i <= iteration), default=None)
    return Weights(committed, digest, checkpoint, iteration - (checkpoint or 0), time.perf_counter() - started)


def _as_then(name: str, run: RunFolder, iteration: int) -> Source:
    then = as_it_was(run, iteration)
    manifests = then.manifests(iteration) if iteration >= 0 else {}
    if len(manifests) == len(STAGES):
        return Source(name, then, iteration, manifests)
    if manifests and iteration == run.num_finished():
        raise UserError(
            f"--iteration {iteration} of {name} is not finished: of its six stages only {', '.join(manifests)} are "
            f"committed; {_finished(run, name)}"
        )
    raise UserError(f"--iteration {iteration} is not in {name}: {_finished(run, name)}")


def _finished(run: RunFolder, name: str) -> str:
    finished = run.num_finished()
    if finished == 0:
        return f"no iteration of {name} is finished yet"
    return f"finished {'is 0' if finished == 1 else f'are 0 to {finished - 1}'}"


def _with_what_is_here(source: Source, vllm_python: str | None) -> Source:
    """The source with the reason for each stage that would start, import or call what nobody here has named."""
    run, missing = source.run, dict[str, str]()
    if vllm_python is not None:
        run = named_interpreter(run, vllm_python)
    elif why := _why_no_program(source):
        missing["generate"] = why
    is_bundle = source.bundle is not None
    if lines := unavailable_rewards(run.config, run.identity, run.path, calls_services=not is_bundle):
        missing["score_rewards"] = "; ".join(lines)
    return replace(source, run=run, missing=missing)


def _why_no_program(source: Source) -> str:
    """Why vLLM is not started; "" if it may be, or none is asked."""
    config, named = source.run.config, f"--set {INTERPRETER}=PATH"
    if config.generation.engine != "vllm":
        return ""
    if source.bundle is not None:
        return f"vLLM has drawn the responses, and a bundle starts no program: name yours with {named}"
    found = refused(config, source.run.path, ("program",))
    return sentence(found[0], source.run.path) if found else ""


def _of_arithmetic(vocab_size: int) -> Plan:
    """What shaping reads of a plan: how many tokens there are. There is no tokenizer and no prompt."""
    return Plan(
        prompt_set=PromptSet([], "", 0, []),
        tokenizer=cast("Any", None),
        max_prompt_len=0,
        context_len=0,
        vocab_size=vocab_size,
        device="cpu",
        num_threads=1,
        parameters={},
        memory_bytes={},
        peak_bytes=0,
        notes=[],
    )
