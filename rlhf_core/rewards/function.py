"""A component that is a Python function of lists, as users of TRL's GRPOTrainer write them."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.metadata
import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import GIVEN, FunctionReward
from rlhf_core.models.reward_model import Conversation
from rlhf_core.rewards.foreign import module_file
from rlhf_core.rewards.ready_made import READY_MADE

Function = Callable[..., Any]
_LIBRARIES = tuple(
    Path(folder).resolve() for folder in {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")}
)


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
    function = _find(config.function, f"{field}.function")
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


def function_digest(config: FunctionReward) -> str:
    """Identity of a function: sha256 of the module named, and of the file that defines it if that is another."""
    if config.function in READY_MADE:  # this package's own source stands in the identity already
        lexicon = importlib.metadata.version("vaderSentiment") if config.function == "sentiment" else ""
        return f"{config.function} {lexicon}".strip()
    source = _source(_find(config.function, "function"))
    module = module_file(config.function.partition(":")[0])
    digests = [hash_file(file) for file in (module, source) if file is not None]
    return " ".join(dict.fromkeys(digests)) or f"{config.function} without source"


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
    if source is not None and not any(source.resolve().is_relative_to(folder) for folder in _LIBRARIES):
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


def _find(name: str, field: str) -> Function:
    if not name:
        raise UserError(f"{field} is not set; give module:callable, or one of {', '.join(READY_MADE)}")
    if name in READY_MADE:
        return READY_MADE[name]
    module_name, sign, path = name.partition(":")
    if not (sign and module_name and path):
        close = difflib.get_close_matches(name, READY_MADE, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{field} {name!r} is neither module:callable nor one of {', '.join(READY_MADE)}{hint}")
    found = _import(module_name, name, field)
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"{field} {name!r}: there is no {path!r} in the module {module_name}")
        found = getattr(found, part)
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"an object of the type {type(found).__name__}"
        raise UserError(f"{field} {name!r} is {kind}; a function is needed")
    return found


def _import(module_name: str, name: str, field: str) -> Any:
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(
            f"{field} {name!r} is in Python's own library, where nothing scores responses; name a function of your own"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that no folder here hides a library
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise UserError(
                f"{field} {name!r}: there is no module {missing}, neither installed nor in the working folder"
            ) from None
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{field} {name!r}: importing {module_name} fails with {type(error).__name__}: {reason}"
        ) from error


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
