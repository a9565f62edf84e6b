"""A component that is a Python function of lists, as users of TRL's GRPOTrainer write them."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import GIVEN, FunctionReward
from rlhf_core.contracts.trust import check_door, check_place
from rlhf_core.contracts.trust import function as trusted_function
from rlhf_core.models.reward_text import Conversation
from rlhf_core.rewards.foreign import DEFINES
from rlhf_core.rewards.imports import (
    OWN,
    find_module,
    imported_modules,
    is_library,
    make_importable,
    stands_in,
    user_modules,
    walk,
)
from rlhf_core.rewards.ready_made import READY_MADE

Function = Callable[..., Any]


class FunctionComponent:
    """Calls a function with those keyword arguments that it takes.

    ``prompts`` and ``completions`` have TRL's form: texts, or for a chat the list of its messages and
    ``[{"role": "assistant", "content": ...}]``; ``responses`` are always plain texts; ``prompt_ids`` and
    ``completion_ids`` are lists of the policy's tokens; each dataset column is a list; ``params`` are as they
    stand in the config. The function gets copies: what it changes nobody else sees.

    Args:
        function: plain or async; returns one number a response.
        takes: names of its arguments; None: any.
        params: from the config.
    """

    def __init__(self, function: Function, takes: frozenset[str] | None, params: dict[str, Any]) -> None:
        self.function, self.takes, self.params = function, takes, params

    def score(self, conversations: Sequence[Conversation]) -> Any:
        """What the function returns: values, or an awaitable of them."""
        return self.function(**self.arguments(conversations))

    def arguments(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """Its keyword arguments for these responses."""
        made: dict[str, Callable[[Conversation], object]] = {
            "prompts": asked,
            "completions": _answered,
            "responses": lambda c: c.response_text,
            "prompt_ids": lambda c: list(c.policy_tokens[: c.num_prompt_tokens]),
            "completion_ids": lambda c: list(c.policy_tokens[c.num_prompt_tokens :]),
        }
        columns = conversations[0].columns if conversations else {}
        made |= {name: lambda c, name=name: copy.deepcopy(c.columns[name]) for name in columns}
        wanted = {name: make for name, make in made.items() if self.takes is None or name in self.takes}
        return {name: [make(c) for c in conversations] for name, make in wanted.items()} | copy.deepcopy(self.params)


def asked(conversation: Conversation) -> str | list[Message]:
    """A prompt as components see it: its text, or a copy of its chat."""
    return [dict(m) for m in conversation.messages] if conversation.messages else conversation.prompt_text


def _answered(conversation: Conversation) -> str | list[Message]:
    text = conversation.response_text
    return [{"role": "assistant", "content": text}] if conversation.messages else text


def load_function(config: FunctionReward, *, field: str, columns: Sequence[str]) -> FunctionComponent:
    """Import a function and check that it can be called.

    Args:
        config: its name and params.
        field: of the component, for messages.
        columns: ``prompts.columns``.
    Raises: UserError naming ``field`` and what does not fit: no such module or function, an argument that nothing
        fills, a param that it does not take, a bad param of a ready-made one.
    """
    function = _find(config, f"{field}.function")
    named = f"{field}.function {config.function!r}"
    if config.function not in READY_MADE:
        _refuse_library_calls(function, named)
    for name in config.params:
        if name in GIVEN or name in columns:
            taken = "every function gets" if name in GIVEN else "is a dataset column in prompts.columns"
            raise UserError(f"{field}.params has {name!r}, a name that {taken}; rename it")
    takes = _takes(function, named, given={*GIVEN, *columns, *config.params}, has=[*GIVEN, *columns])
    if takes is not None:
        for name in config.params:
            if name not in takes:
                own = sorted(takes - {*GIVEN, *columns})
                close = difflib.get_close_matches(name, own, n=1)
                hint = f"did you mean {close[0]}?" if close else f"its own arguments: {', '.join(own) or 'none'}"
                raise UserError(f"{field}.params has {name!r}, which {config.function} does not take; {hint}")
    component = FunctionComponent(function, takes, config.params)
    if config.function in READY_MADE:  # of no responses, it tells what it thinks of its params
        try:
            function(**component.arguments([]), **{name: [] for name in columns if takes is None or name in takes})
        except ValueError as error:
            raise UserError(f"{field}.params: {error}") from None
    return component


def function_digest(config: FunctionReward) -> str | dict[str, str]:
    """Identity of a function: sha256 of each file of the user's own that importing it runs.

    Returns: label -> digest, as ``{"team_rewards/__init__.py": "9f2c…", "team_rewards/lexicon.py": "51d3…"}``; of one
        file, its digest alone. See :mod:`rlhf_core.rewards.imports` for what is followed.
    """
    if config.function in READY_MADE:  # this package's own source stands in the identity already
        lexicon = importlib.metadata.version("vaderSentiment") if config.function == "sentiment" else ""
        return f"{config.function} {lexicon}".strip()
    function = _find(config, "function")
    files = imported_modules(config.function.partition(":")[0], config.folder)
    source = _source(function)
    if source is not None and source.resolve() not in {file.resolve() for file in files.values()}:
        files |= {f"{source.name}{DEFINES}": source}  # of a decorator, say, that an installed library brings
    digests = {label: hash_file(file) for label, file in files.items()}
    if len(digests) > 1:
        return digests
    return next(iter(digests.values()), f"{config.function} without source")


def unseen_modules(config: FunctionReward) -> list[Path]:
    """Files of the user's own that importing a function has run, and that its source does not name.

    They are not in the run's identity. The function has been imported.
    """
    if config.function in READY_MADE:
        return []
    files = {file.resolve() for file in imported_modules(config.function.partition(":")[0], config.folder).values()}
    return [file for file in _loaded.get(_key(config), ()) if file.resolve() not in files]


def _source(function: Function) -> Path | None:
    """The file that defines a function; None if it is made by C."""
    while isinstance(function, partial):
        function = cast("Function", function.func)
    function = inspect.unwrap(function)
    has_source = inspect.isroutine(function) or inspect.isclass(function)
    try:
        source = inspect.getsourcefile(function if has_source else type(function))
    except TypeError:
        return None
    return Path(source) if source and Path(source).is_file() else None


def _refuse_library_calls(function: Function, named: str) -> None:
    """A config could name any function that is installed, and its arguments: os.system, torch.hub.load.

    One that is not the user's own file is called only if it is made for this: if it takes what is scored, by name.
    """
    source = _source(function)
    if source is not None and not is_library(source):
        return
    try:
        names = inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):  # told next
        return
    if not set(names) & set(GIVEN):
        raise UserError(
            f"{named} is a function of a library that takes none of {', '.join(GIVEN)}: it is not made to score a "
            "response, and could do anything; wrap it in a function of your own"
        )


def _find(config: FunctionReward, field: str) -> Function:
    name = config.function
    if not name:
        raise UserError(f"{field} is not set; give module:callable, or one of {', '.join(READY_MADE)}")
    if name in READY_MADE:
        return READY_MADE[name]
    if ":" in name:
        check_door(trusted_function(config, field))
    module_name, sign, path = name.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise UserError(_as_module(name, field))
    if not (sign and module_name and path):
        raise UserError(
            f"{field} {name!r} is neither module:callable nor one of {', '.join(READY_MADE)}{_meant(name, config)}"
        )
    found = _import(config, module_name, field)
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, _functions_of(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{field} {name!r}: there is no {path!r} in the module {module_name}{hint}")
        found = getattr(found, part)
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"an object of the type {type(found).__name__}"
        raise UserError(f"{field} {name!r} is {kind}; a function is needed")
    return found


def _as_module(name: str, field: str) -> str:
    """The sentence about a file in the place of a module."""
    file, sign, function = name.partition(":")
    module = Path(file).stem
    if not (sign and function):
        return f"{field} {name!r} names a file and no function of it; write {module}:FUNCTION"
    return (
        f"{field} {name!r} is a file that is not here; a function is named as module:callable, {module}:{function}, "
        f"with {module}.py in the config's folder or the working folder, or with "
        f"{field.removesuffix('function')}folder set to the absolute path of its folder"
    )


def _meant(name: str, config: FunctionReward) -> str:
    """A hint for a name without a colon: a ready-made function, or a module and a function of it."""
    module, _, last = name.rstrip(":").rpartition(".")
    if module and find_module(module, config.folder) is not None:
        return f"; did you mean {module}:{last}?"
    if find_module(name.rstrip(":"), config.folder) is not None:
        return f"; which function of the module {name.rstrip(':')} is meant? Write {name.rstrip(':')}:FUNCTION"
    close = difflib.get_close_matches(name, READY_MADE, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _functions_of(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("__") and callable(getattr(found, name, None))]


_loaded: dict[tuple[str, str | None], tuple[Path, ...]] = {}
"""Module and folder -> files of the user's own that its first import in this process has run."""


def _key(config: FunctionReward) -> tuple[str, str | None]:
    return config.function.partition(":")[0], config.folder


def _import(config: FunctionReward, module_name: str, field: str) -> Any:
    name, top = config.function, module_name.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(
            f"{field} {name!r} is in Python's own library, where nothing scores responses; name a function of your own"
            + (f", and rename {top} in {config.folder}" if config.folder and stands_in(config.folder, top) else "")
        )
    make_importable(config.folder)
    for file in imported_modules(module_name, config.folder).values():
        check_place(file, f"{field} {name!r}")
    _refuse_hidden(config, top, f"{field} {name!r}")
    _forget_others(module_name, config.folder)
    before = set(sys.modules)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            close = difflib.get_close_matches(missing, user_modules(config.folder), n=1)
            raise UserError(
                f"{field} {name!r}: there is no module {missing}, neither installed nor in the working folder"
                + (f"; did you mean {close[0]}?" if close else "")
            ) from None
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{field} {name!r}: importing {module_name} fails with {type(error).__name__}: {reason}"
        ) from error
    _loaded.setdefault(_key(config), _user_files(set(sys.modules) - before))
    return module


def _refuse_hidden(config: FunctionReward, top: str, named: str) -> None:
    """Refuse a module of the user's whose name an installed library has: Python would import the library."""
    found = find_module(top, config.folder)
    if config.folder is None or found is None or found.file is None or not is_library(found.file):
        return
    if stands_in(config.folder, top) and not found.file.is_relative_to(config.folder):
        raise UserError(
            f"{named}: {top} in {config.folder} has the name of an installed library ({found.file.parent}), which "
            "Python imports in its place; rename yours"
        )


def _forget_others(module_name: str, folder: str | None) -> None:
    """Drop modules of the same names that this process has imported from other files, as for another config."""
    for module in list(walk(module_name, folder)):
        there = getattr(sys.modules.get(module.name), "__file__", None)
        if module.file is not None and there is not None and Path(there).resolve() != module.file.resolve():
            del sys.modules[module.name]


def _user_files(names: set[str]) -> tuple[Path, ...]:
    """Source files of modules that belong to no library and not to this project."""
    found = [(name, getattr(sys.modules.get(name), "__file__", None)) for name in sorted(names)]
    files = [Path(file) for name, file in found if file is not None and name.partition(".")[0] not in OWN]
    return tuple(file for file in files if file.is_file() and not is_library(file))


def _takes(function: Function, named: str, *, given: set[str], has: Sequence[str]) -> frozenset[str] | None:
    """Names of the arguments that a function takes; None: any. Raises UserError if one of them stays unfilled."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"{named} does not tell its arguments; wrap it in a Python function") from None
    for p in parameters:
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.kind is p.POSITIONAL_ONLY:
            raise UserError(f"{named} takes {p.name!r} by position alone; arguments are passed by name")
        if p.name not in given:
            raise UserError(
                f"{named} needs the argument {p.name!r}, which nothing fills; name a dataset column of that name in "
                f"prompts.columns, or set it in params (there are {', '.join(has)})"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
