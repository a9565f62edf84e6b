"""The `reward` section of the config: components of three kinds, and how they combine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_core.contracts.hub import with_revisions
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.contracts.section import Dtype, ModelName, Positive, PositiveFloat, Section
from rlhf_core.contracts.template_options import plain_template_options

FLOAT32_MAX = 3.4028234663852886e38
GIVEN = ("prompts", "completions", "responses", "prompt_ids", "completion_ids")
"""Arguments that every reward function may take, beside dataset columns and its own params."""
RAW = "raw"
"""A ``chat_template`` that stands for none: what the policy has read and written, as it is."""

_HOST = r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])"
_ALLOWED = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
_URL = re.compile(rf"https?://{_HOST}(?::[0-9]{{1,5}})?(?:[/?][!$-;=?-Z_a-z~]*)?", re.IGNORECASE | re.ASCII)
"""What every parser of URLs reads alike: no user, no backslash, no fragment, no space."""


class ComponentSection(Section):
    """What components of all kinds have."""

    kind: str = Field(default="", description="where the score comes from")
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="null: rewardN")
    weight: float = Field(default=1.0, description="factor of the raw score, before components combine")
    keep_special_tokens: bool = Field(
        default=False,
        description="the response's text has its special tokens, such as <think> where that is one; without the one "
        "that ended it",
    )
    on_error: Literal["fail", "drop", "substitute"] = Field(
        default="fail",
        description="on a response that it cannot score: stop the run, leave it out there, or take `substitute`",
    )
    substitute: Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)] | None = Field(
        default=None, description="score that stands in, with on_error: substitute"
    )

    @model_validator(mode="after")
    def _substitute_is_there(self) -> Self:
        if self.on_error == "substitute" and self.substitute is None:
            raise ValueError("on_error is substitute and substitute is null; give the score that stands in")
        if self.on_error != "substitute" and self.substitute is not None:
            raise ValueError(
                f"substitute is {self.substitute:g} and on_error is {self.on_error}, which does not use it; "
                "set on_error: substitute or leave substitute out"
            )
        return self


class ModelReward(ComponentSection):
    """A reward model: one logit, read at the last token of prompt + response."""

    kind: Literal["model"] = Field(default="model", description="a sequence classifier")  # pyright: ignore[reportIncompatibleVariableOverride]
    model: ModelName = Field(default="", description="AutoModelForSequenceClassification folder or hub id")
    revision: str | None = Field(default=None, description="of the model, as policy.revision")
    tokenizer: ModelName | None = Field(default=None, description="folder or hub id; null: the model's")
    tokenizer_revision: str | None = Field(default=None, description="of the tokenizer, as policy.revision")
    chat_template: str | None = Field(
        default=None,
        description="Jinja text or a file of it, for chats, and for plain prompts as a user's; raw: chats as the "
        "policy has them; null: the tokenizer's, for chats alone",
    )
    template_options: dict[str, Any] = Field(
        default={}, description="variables of the chat template: {enable_thinking: false}"
    )
    dtype: Dtype = "float32"
    batch_size: Positive = Field(default=64, description="responses scored at a time")
    max_len: Positive | None = Field(default=None, description="tokens read; null: the model's context length")

    @field_validator("template_options")
    @classmethod
    def _options_can_be_passed(cls, options: dict[str, Any]) -> dict[str, Any]:
        return plain_template_options(options)

    @model_validator(mode="before")
    @classmethod
    def _names_with_revisions(cls, tree: Any) -> Any:
        return with_revisions(tree, {"model": "revision", "tokenizer": "tokenizer_revision"})


class FunctionReward(ComponentSection):
    """A Python function, plain or async, of lists: prompts, completions, and each dataset column by its name."""

    kind: Literal["function"] = Field(default="function", description="a Python function")  # pyright: ignore[reportIncompatibleVariableOverride]
    function: str = Field(
        default="",
        description="module:callable, or length, regex, format, exact_match, numeric_match, sentiment, repetition",
    )
    folder: str | None = Field(
        default=None,
        description="absolute path of the folder that holds the module; null: the config's own folder where the "
        "module is in it, then the working folder, then Python's path",
    )
    params: dict[str, Any] = Field(default={}, description="more keyword arguments")

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith("/"):
            raise ValueError(f"the folder {folder!r} is no absolute path; give one that begins with /")
        return folder

    @field_validator("params")
    @classmethod
    def _plain(cls, params: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(params, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("a param is not plain JSON, or a number in it is not finite") from None
        return params


class HttpReward(ComponentSection):
    """A service: POST {prompts, responses, columns} as JSON, get {scores}. Its host stands in allowed_hosts."""

    kind: Literal["http"] = Field(default="http", description="a service")  # pyright: ignore[reportIncompatibleVariableOverride]
    url: str = Field(default="", description="http or https; redirects are not followed")
    timeout_s: PositiveFloat = Field(default=30.0, description="seconds a try may take, from connecting to the end")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=3, description="further tries after no connection, a time-out, HTTP 429 or 5xx"
    )
    backoff_s: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="seconds before the first of them, doubled each time"
    )
    batch_size: Positive = Field(default=64, description="responses a request; one request at a time")
    max_response_bytes: Positive = Field(default=1 << 20, description="a longer answer is refused while it arrives")
    token_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="name of the environment variable that holds a bearer token; null: none is sent",
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        if url and not (_URL.fullmatch(url) and _port_fits(url)):
            shown = "(not shown: a password may be in it)" if "@" in url else repr(without_credentials(url))
            raise ValueError(f"the address {shown} is not plain http or https, as http://localhost:8000/score")
        return url

    @property
    def host(self) -> tuple[str, int]:
        """Host and port that the url leads to."""
        parts = urlsplit(self.url.lower())
        if parts.port is None:
            return parts.netloc, _PORTS[parts.scheme]
        return parts.netloc.rpartition(":")[0], parts.port


_PORTS = {"http": 80, "https": 443}


def _port_fits(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # above 65535
        return False


def _any_of(schema: dict[str, Any]) -> None:
    """``anyOf`` for ``oneOf``: a form draws it, and a component whose kind is left out is not ambiguous."""
    schema["anyOf"] = schema.pop("oneOf")


ComponentReward = Annotated[
    ModelReward | FunctionReward | HttpReward,
    Field(discriminator="kind", json_schema_extra=_any_of),
]


class RewardConfig(Section):
    """The score of a response: what its components say, combined."""

    KINDS: ClassVar[dict[str, type[ComponentSection]]] = {
        "model": ModelReward,
        "function": FunctionReward,
        "http": HttpReward,
    }

    components: list[ComponentReward] = Field(default=[], description="at least one component")
    combine: Literal["weighted_sum", "min", "mean_minus_std"] = Field(
        default="weighted_sum",
        description="of weight x raw score: the sum, the least, or mean - std_coef x std (ensembles)",
    )
    std_coef: Annotated[float, Field(ge=0)] = Field(default=1.0, description="λ of mean_minus_std")
    allowed_hosts: list[str] = Field(
        default=[], description="host or host:port that components of the kind http may send responses to"
    )

    @field_validator("components", mode="before")
    @classmethod
    def _kind_left_out(cls, components: object) -> object:
        if not isinstance(components, list):
            return components
        items = cast("list[object]", components)
        return [{"kind": _kind_of(c), **cast("dict[str, Any]", c)} if isinstance(c, dict) else c for c in items]

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not _ALLOWED.fullmatch(host):
                raise ValueError(f"the entry {host!r} is not host or host:port in small letters, as localhost:8000")
        return hosts

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"reward.components have the same name twice: {', '.join(names)}")
        for name in names:
            if f"{name}_failed" in names:
                raise ValueError(
                    f"reward.components are named {name} and {name}_failed, which is a metric of the first"
                )
        return self

    @model_validator(mode="after")
    def _only_allowed_hosts(self) -> Self:
        problems = [
            f"reward.components.{i}.url {c.url!r} leads to {host}:{port}, which is not in reward.allowed_hosts "
            f"({_listed(self.allowed_hosts)}); add {host!r} or '{host}:{port}' if responses may be sent there"
            for i, c in enumerate(self.components)
            if isinstance(c, HttpReward) and c.url
            for host, port in [c.host]
            if host not in self.allowed_hosts and f"{host}:{port}" not in self.allowed_hosts
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def names(self) -> list[str]:
        """Name of each component, in order."""
        return [c.name or f"reward{i}" for i, c in enumerate(self.components)]

    @property
    def first_model(self) -> ModelReward | None:
        """The component that a critic may start from."""
        return next((c for c in self.components if isinstance(c, ModelReward)), None)


def _kind_of(component: Mapping[str, Any]) -> str:
    """The kind of a component that does not say it, by the one key that names what scores."""
    named = [kind for key, kind in (("function", "function"), ("url", "http")) if component.get(key)]
    return named[0] if len(named) == 1 and not component.get("model") else "model"


def _listed(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) or "empty"
