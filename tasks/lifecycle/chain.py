"""A training chain: what the last link was made of, whether there is anything new, and the promotion of its policy.

    RUNS/chain.json     {"links": [{"run": "chain-000001", "inputs": {"prompts": "9f2c...", ...}, ...}]}, sealed
    RUNS/chain-000001/  the run folder of a link
    RUNS/rewards/       reward models that an alias has named, by version

A link is written down before it is begun, and closed with its outcome, so that a chain that was stopped anywhere goes
on with the same call.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json, config_digest
from rlhf_core.contracts.durable import make_folder, remove_leftovers, write_folder
from rlhf_core.contracts.errors import IntegrityError, RlhfError, UserError
from rlhf_core.contracts.locking import holding
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.typed import typed
from rlhf_core.evaluation.gate import Gate
from rlhf_core.identity import identity_drift, model_digest, run_identity
from rlhf_core.preflight import preflight
from tasks.tracking.outbox import Ledger, reason
from tasks.tracking.tracker import connect, download_registered

FILE = "chain.json"
_REGISTERED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)@([A-Za-z0-9_-]+)")


@dataclass(frozen=True)
class Link:
    """One training of a chain."""

    run: str
    """Name of its run folder."""
    inputs: Mapping[str, str]
    """What it is made of -> digest: prompts, models, rewards, config."""
    gate: Mapping[str, Any]
    """What its policy is judged by."""
    outcome: str | None = None
    """What became of it, in a sentence; None while it is not done."""
    num_iterations: int | None = None
    """Of its run when it was judged; None while it is not done, and in the links of earlier releases."""


@dataclass(frozen=True)
class Chain:
    """The content of ``RUNS/chain.json``."""

    links: tuple[Link, ...] = field(default=())

    @classmethod
    def of(cls, runs: Path) -> Chain:
        """The chain of a folder; an empty one where there is none. Raises IntegrityError if it is damaged."""
        path = runs / FILE
        if not path.is_file():
            return cls()
        try:
            return typed(cls, read_record(path))
        except ValueError as error:
            raise IntegrityError(f"{path} is not the record of a chain: {error}; put it back from a copy") from None

    def with_last(self, runs: Path, link: Link, *, instead: bool) -> Chain:
        """The chain with another link at its end, or in the place of its last, written durably."""
        kept = self.links[:-1] if instead else self.links
        changed = Chain((*kept, link))
        write_record(runs / FILE, {"links": [asdict(link) for link in changed.links]})
        return changed


def next_link(runs: Path, config: RunConfig, gate: Gate) -> tuple[Link, list[str]] | None:
    """The link to make, or to go on with, and what is new; None where there is nothing new.

    New is: another digest of the prompts, of a model, of a reward, or of the config; or, without a training, another
    gate or another number of iterations of the last run. A link that is not done goes on while its inputs are the
    same; else it is left, since its run cannot go on. The caller holds the chain.

    Raises: UserError with every problem of the config.
    """
    inputs, judged_by = chain_inputs(config), gate.model_dump()
    chain = Chain.of(runs)
    if not chain.links:
        link = Link("chain-000001", inputs, judged_by)
        chain.with_last(runs, link, instead=False)
        return link, ["this is the first link"]
    last = chain.links[-1]
    if news := identity_drift(last.inputs, inputs):
        if last.outcome is None:
            left = replace(last, outcome="left before it was done: its inputs have changed")
            chain = chain.with_last(runs, left, instead=True)
        link = Link(f"chain-{len(chain.links) + 1:06d}", inputs, judged_by)
        chain.with_last(runs, link, instead=False)
        return link, [f"{line.partition(': ')[0]} is another than in {last.run}" for line in news]
    if last.outcome is None:
        chain.with_last(runs, link := replace(last, gate=judged_by), instead=True)
        return link, [f"{last.run} goes on"]
    if canonical_json(dict(last.gate)) != canonical_json(judged_by):
        chain.with_last(runs, link := replace(last, gate=judged_by, outcome=None), instead=True)
        return link, [f"{last.run} is judged by another gate"]
    if (now := _num_iterations(runs, last)) != last.num_iterations and last.num_iterations is not None:
        chain.with_last(runs, link := replace(last, outcome=None), instead=True)
        return link, [f"{last.run} was judged after {last.num_iterations} iterations, and has {now} now"]
    return None


def close_link(runs: Path, outcome: str) -> None:
    """Write down what became of the last link. The caller holds the chain."""
    chain = Chain.of(runs)
    last = chain.links[-1]
    closed = replace(last, outcome=outcome, num_iterations=_num_iterations(runs, last))
    chain.with_last(runs, closed, instead=True)


def _num_iterations(runs: Path, link: Link) -> int | None:
    """``num_iterations`` of a link's run; as when it was judged, where its folder is gone."""
    path = runs / link.run
    return RunFolder.open(path).config.num_iterations if (path / "run.json").is_file() else link.num_iterations


def chain_inputs(config: RunConfig) -> dict[str, str]:
    """What a training is made of -> digest; software and machine are not among it: an upgrade is nothing new.

    A model of the hub is known by its commit, a data set by its content: a branch that has moved is new.
    """
    model_digest.cache_clear()  # a process that serves for long must look again
    identity = run_identity(config, preflight(config).prompt_set)
    found = {"config": config_digest(config), "prompts": str(identity["prompts"])}
    for kind in ("models", "rewards"):
        found |= {f"{kind}.{name}": str(digest) for name, digest in identity[kind].items()}
    return found


def holding_chain(runs: Path) -> contextlib.AbstractContextManager[None]:
    """Let no other process work on the chain. Raises RunLockedError at once if one does."""
    make_folder(runs)
    return holding(runs / "chain.lock", f"the chain in {runs}")


def check_promotable(config: RunConfig) -> None:
    """Raise UserError where there is no registered model to promote."""
    if not config.tracking.enabled:
        raise UserError("tracking.enabled is false, and a chain promotes a registered model of MLflow; set it true")


def with_registered_reward(config: RunConfig, runs: Path, name: str | None) -> RunConfig:
    """The config with the reward model that an alias of MLflow's registry names, fetched once for each version.

    The caller holds the chain.

    Args:
        config: its first component of the kind model is given that model; the config as it is, if ``name`` is None.
        runs: where fetched models are kept, in ``rewards/NAME-VERSION``.
        name: ``NAME@ALIAS``.
    Raises: UserError if there is no such model, alias or component.
    """
    if name is None:
        return config
    found = _REGISTERED.fullmatch(name)
    if found is None:
        raise UserError(f"reward_model is {name!r}; give a registered model and its alias: NAME@ALIAS")
    index = next((i for i, c in enumerate(config.reward.components) if isinstance(c, ModelReward)), None)
    if index is None:
        raise UserError(f"reward_model is {name!r}, but no component of reward.components is of the kind model")
    model, alias = found.groups()
    at_home = RunFolder(runs / "chain", config, {})  # knows the tracker; nothing is at its path
    with _asking_mlflow(f"reward_model is {name!r}, which MLflow does not give"):
        client, _ = connect(at_home)
        version = str(client.get_model_version_by_alias(model, alias).version)
        folder = runs / "rewards" / f"{model}-{version}"
        if not folder.is_dir():
            make_folder(folder.parent)
            remove_leftovers(folder.parent, deep=False)
            write_folder(folder, lambda new: download_registered(at_home, model, version, new / "model"), _as_manifest)
    return build_config(config.model_dump(), [f"reward.components.{index}.model={folder / 'model'}"])


@task(
    task_run_name="promote-{iteration}-{alias}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json"
)
def promote(run_dir: str, iteration: int, alias: str) -> str:
    """Give the registered version of a checkpoint an alias.

    Returns: the version, as ``rlhf-policy version 3``.
    Raises: UserError if MLflow does not have it yet.
    """
    run = RunFolder.open(Path(run_dir))
    name, ledger = run.config.tracking.registered_model, Ledger.of(run.path)
    run_id = ledger.run_id
    with _asking_mlflow(f"MLflow did not promote checkpoint {iteration} of {run_dir}, and the same call goes on"):
        client, _ = connect(run, experiment_id=ledger.experiment_id)
        found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'") if run_id else []
        versions = [str(version.version) for version in found if version.tags.get("rlhf.iteration") == str(iteration)]
        if not versions:
            raise UserError(
                f"MLflow does not have checkpoint {iteration} of {run_dir}; `rlhf resume {run_dir}` sends it, and the "
                "chain goes on with the same call"
            )
        version = max(versions, key=int)
        client.set_registered_model_alias(name, alias, version)
    return f"{name} version {version}"


@contextlib.contextmanager
def _asking_mlflow(problem: str) -> Iterator[None]:
    """Around what needs an answer of MLflow: its failure is told in a sentence."""
    try:
        yield
    except RlhfError:
        raise
    except Exception as error:  # MLflow's own, which only tasks/tracking/tracker.py knows
        raise UserError(f"{problem}: {reason(error)}") from None


def _as_manifest(digests: Mapping[str, str]) -> bytes:
    return canonical_json({"files": dict(digests)})
