"""What a config starts, imports and contacts, and whether the person at the keyboard has named it.

A config that a person gives (``--config``, ``--set``, the parameter of a flow) is theirs. The record of a run, sweep or
evaluation, and a bundle, may be somebody else's: whatever it starts, imports or contacts is used only after the person
has named it, either when this user began the run or with ``--trust VALUE``. Code inside a run folder is never used.

    uses(config)                  what a config starts, imports and contacts
    accept(uses)                  the person has named these: for this process, its children, and the next commands
    recorded(config, where)       these come from a record: each door refuses them until they are accepted
    check_recorded(config, run)   refuse all of them at once, one sentence each
    check_door(use)               in front of whatever starts, imports or contacts

Limitation: a process of the same user can write to the file of what was accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from rlhf_core.contracts.accepted import accepted_keys, remember
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward, HttpReward
from rlhf_core.contracts.run_places import run_around
from rlhf_core.contracts.update_config import UpdateConfig

if TYPE_CHECKING:
    from rlhf_core.contracts.config import RunConfig

Kind = Literal["program", "function", "service", "tracker", "store", "cluster", "meeting"]
KINDS: Final[tuple[Kind, ...]] = ("program", "function", "service", "tracker", "store", "cluster", "meeting")
SCORING: Final[tuple[Kind, ...]] = ("program", "function", "service")
"""What an evaluation or a blend uses of a run."""
_ENVIRONMENT: Final[dict[Kind, str]] = {"tracker": "MLFLOW_TRACKING_URI", "cluster": "RAY_ADDRESS"}
"""Variables by which a person names the same thing."""
_OF_THIS_MACHINE: Final = frozenset({"auto", "local"})
"""Addresses of Ray that lead nowhere else."""
_SHOWN_PARAMS: Final = 200

_recorded: dict[str, str] = {}
"""Key of what a record names -> the folder of the record."""


@dataclass(frozen=True)
class Use:
    """Something that a config starts, imports or contacts.

    Example: ``Use("program", "generation.vllm.python", "/opt/vllm/bin/python", "a program …", "/opt/vllm/bin/python")``
    """

    kind: Kind
    field: str
    value: str
    """What a person types to accept it."""
    does: str
    """What would happen."""
    key: str
    """Everything that has to be the same for it to be the same thing."""
    file: Path | None = None
    """The program, or the folder of the function's module."""
    fields: tuple[str, ...] = ()
    """Fields that have to be the person's own; default: ``field`` alone."""


def uses(config: RunConfig) -> list[Use]:
    """Everything that a run of this config starts, imports or contacts, apart from the hub and the person's own."""
    return [*_programs(config), *_rewards(config), *_addresses(config)]


def program(python: str) -> Use:
    """The interpreter of an environment with vLLM."""
    does = "a program that would be started"
    return Use("program", "generation.vllm.python", python, does, f"program {python}", Path(python))


def function(component: FunctionReward, field: str = "reward.components.N.function") -> Use:
    """The function of a reward component, with its params."""
    name, folder = component.function, component.folder or _here(component.function)
    value = name if folder is None else f"{folder}/{name}"
    params = json.dumps(component.params, sort_keys=True) if component.params else ""
    called = f" and called with the params {params[:_SHOWN_PARAMS]}" if params else ""
    digest = hashlib.sha256(params.encode()).hexdigest()
    place = None if folder is None else Path(folder)
    does, section = f"Python code that would be imported{called}", field.removesuffix(".function")
    named = [("function", True), ("folder", component.folder), ("params", component.params)]
    fields = tuple(f"{section}.{name}" for name, is_given in named if is_given)
    return Use("function", field, value, does, f"function {value} {digest}", place, fields)


def service(component: HttpReward, field: str = "reward.components.N.url") -> Use:
    """The service of a reward component, with the token that it is sent."""
    token = f" and the token in ${component.token_env}" if component.token_env else ""
    does = f"a service that prompts, responses{token} would be sent to"
    key, section = f"service {component.url} {component.token_env or ''}", field.removesuffix(".url")
    fields = (field, *([f"{section}.token_env"] if component.token_env else []))
    return Use("service", field, component.url, does, key, None, fields)


def cluster(address: str) -> Use:
    """A Ray cluster."""
    does = "a cluster that would be joined, and may run code here"
    return Use("cluster", "execution.ray.address", address, does, f"cluster {address}")


def meeting(update: UpdateConfig) -> Use:
    """Where ranks of several nodes meet."""
    does = "an address that ranks would meet at, and take pickled messages from"
    place = str(update.endpoint)
    return Use("meeting", "execution.update.endpoint", place, does, f"meeting {place}")


def tracker_at(uri: str) -> Use:
    """A tracker: a server, a database or a folder."""
    does = "a tracker that metrics, files and the token in the environment would be sent to"
    return Use("tracker", "tracking.uri", uri, does, f"tracker {uri}")


def tracker(config: RunConfig) -> list[Use]:
    """Where metrics and files are sent."""
    tracking = config.tracking
    found: list[Use] = []
    if tracking.enabled and tracking.uri is not None:
        found.append(tracker_at(tracking.uri))
    if tracking.enabled and tracking.artifact_location is not None:
        place = tracking.artifact_location
        does = "a place that files and checkpoints would be written to"
        found.append(Use("store", "tracking.artifact_location", place, does, f"store {place}"))
    return found


def accept(named: Collection[Use]) -> None:
    """The person has named these: in this process, in those that it starts, and in later commands of this user."""
    if named:
        remember([use.key for use in named])


def accept_config(config: RunConfig) -> None:
    """The person has given this config."""
    accept(uses(config))


def accept_overrides(overrides: Sequence[str], config: RunConfig) -> None:
    """The person has changed a recorded config by ``a.b=c``: what they have named themselves is theirs.

    Args:
        overrides: as they were typed.
        config: with them.
    """
    typed = [override.partition("=")[0].strip() for override in overrides]

    def is_typed(field: str) -> bool:
        return any(field == key or field.startswith(f"{key}.") for key in typed)

    accept([use for use in uses(config) if all(map(is_typed, use.fields or (use.field,)))])


def accept_values(values: Sequence[str], config: RunConfig, where: Path) -> None:
    """Accept what a person has typed after ``--trust``. Raises UserError if the config names no such thing."""
    found = uses(config)
    if unknown := [value for value in values if all(use.value != value for use in found)]:
        there = ", ".join(shlex.quote(use.value) for use in found) or "nothing"
        raise UserError(*(f"--trust {value!r} is nothing that {where} names; it names {there}" for value in unknown))
    accept([use for use in found if use.value in values])


def recorded(config: RunConfig, where: Path) -> None:
    """Note that a config was read from a record: its doors are closed until the person has named what is behind."""
    for use in uses(config):
        _recorded[use.key] = str(where)


def refused(config: RunConfig, where: Path, kinds: Collection[Kind] = KINDS) -> list[Use]:
    """What a recorded config names that nobody here has accepted, or that lies inside a run folder."""
    found = [use for use in uses(config) if use.kind in kinds]
    return [use for use in found if _inside(use, where) is not None or not _is_accepted(use)]


def check_recorded(config: RunConfig, where: Path, kinds: Collection[Kind] = KINDS) -> None:
    """Refuse a recorded config that names what nobody here has accepted.

    Args:
        config: as it is recorded.
        where: folder or file of the record.
        kinds: that will be used.
    Raises: UserError, one sentence a use.
    """
    if found := refused(config, where, kinds):
        raise UserError(*(sentence(use, where) for use in found))


def check_door(use: Use) -> None:
    """Refuse what a record names and nobody has accepted. Whatever a person's own config names passes."""
    if is_closed(use):
        raise UserError(sentence(use, Path(_recorded[use.key])))


def is_closed(use: Use) -> bool:
    """Whether a record read by this process names it, and nobody here has accepted it."""
    where = _recorded.get(use.key)
    return where is not None and (_inside(use, Path(where)) is not None or not _is_accepted(use))


def check_place(file: Path, named: str, run_dir: Path | None = None) -> None:
    """Raise UserError for code that lies inside a run folder, by any of its names.

    Args:
        file: that would be run.
        named: field and value.
        run_dir: of the run in question, whatever it holds.
    """
    if run_around(file, run_dir) is not None:
        raise UserError(_inside_sentence(named, file))


def sentence(use: Use, where: Path) -> str:
    """Why something is not used, and what can be done."""
    named = f"{use.field} {use.value!r}"
    if use.file is not None and _inside(use, where) is not None:
        return _inside_sentence(named, use.file)
    own = ", or name yours with --set generation.vllm.python=PATH" if use.kind == "program" else ""
    return (
        f"{named} is {use.does}: {where} names it, and you have not; if you trust it, add "
        f"--trust {shlex.quote(use.value)}{own}"
    )


def _programs(config: RunConfig) -> Iterator[Use]:
    generation = config.generation
    if generation.engine == "vllm" and generation.vllm.python:
        yield program(generation.vllm.interpreter)


def _rewards(config: RunConfig) -> Iterator[Use]:
    for index, component in enumerate(config.reward.components):
        field = f"reward.components.{index}"
        if isinstance(component, FunctionReward) and ":" in component.function:  # ready-made ones have none
            yield function(component, f"{field}.function")
        elif isinstance(component, HttpReward) and component.url:
            yield service(component, f"{field}.url")


def _addresses(config: RunConfig) -> Iterator[Use]:
    yield from tracker(config)
    execution = config.execution
    if execution.engine == "ray" and execution.ray.address and execution.ray.address not in _OF_THIS_MACHINE:
        yield cluster(execution.ray.address)
    if execution.update.is_launched and execution.update.nnodes > 1:
        yield meeting(execution.update)


def _is_accepted(use: Use) -> bool:
    variable = _ENVIRONMENT.get(use.kind)
    if variable is not None and os.environ.get(variable) == use.value:
        return True
    return not accepted_keys().isdisjoint({use.key, use.value})


def _inside(use: Use, where: Path) -> Path | None:
    return None if use.file is None else run_around(use.file, where)


def _inside_sentence(named: str, file: Path) -> str:
    return (
        f"{named} would be taken from {file}, inside the run folder, which holds data and no code; if you trust it, "
        "put it elsewhere and start from there"
    )


def _here(name: str) -> str | None:
    """The working folder, where it has the module of a function for which a config names no folder."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        here = Path.cwd()
        return str(here) if (here / f"{top}.py").exists() or (here / top).is_dir() else None
    except OSError:
        return None
