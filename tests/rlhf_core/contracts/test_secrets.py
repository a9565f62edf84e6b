"""Secrets are refused in a config, by field and without their value, and cut out of what is shown."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.secrets import names_a_secret, url_secret, without_credentials, without_secrets

VALUE = "Zq7x9WvSECRET"


def component(**values: Any) -> dict[str, Any]:
    return {"reward": {"components": [values], "allowed_hosts": ["h"]}}


def function(**params: Any) -> dict[str, Any]:
    return component(kind="function", function="length", params=params)


@pytest.mark.parametrize(
    ("tree", "begins", "remedy"),
    [
        (
            {"tracking": {"uri": f"http://me:{VALUE}@h"}},
            "tracking.uri is an address with a user name",
            "MLFLOW_TRACKING_",
        ),
        (
            {"tracking": {"uri": f"https://{VALUE}@h"}},
            "tracking.uri is an address with a user name",
            "MLFLOW_TRACKING_",
        ),
        ({"tracking": {"uri": f"postgresql://me:{VALUE}@h/d"}}, "tracking.uri is an address", "MLFLOW_TRACKING_URI"),
        ({"tracking": {"uri": f"mysql://h/d?password={VALUE}"}}, "tracking.uri is an address", "MLFLOW_TRACKING_URI"),
        (component(kind="http", url=f"http://h/s?token={VALUE}"), "reward.components.0.url is an address", "token_env"),
        (component(kind="http", url=f"http://me:{VALUE}@h/s"), "reward.components.0.url is an address", "token_env"),
        (function(api_key=VALUE), "reward.components.0.params.api_key is named like a secret", "api_key_env"),
        (function(a=[{"db_password": VALUE}]), "reward.components.0.params.a.0.db_password is", "db_password_env"),
        ({"tracking": {"run_name": f"hf_{VALUE}AAAABBBBCCCC"}}, "tracking.run_name holds what looks", "MLFLOW"),
        (
            {"prompts": {"source": f"s3://AKIA{'A' * 16}:{VALUE}@h"}},
            "prompts.source holds what",
            "environment variable",
        ),
    ],
)
def test_a_secret_is_refused_by_field_without_its_value(tree: dict[str, Any], begins: str, remedy: str) -> None:
    with pytest.raises(UserError) as refused:
        build_config(tree)
    (sentence,) = refused.value.problems
    assert sentence.startswith(begins)
    assert remedy in sentence
    assert VALUE not in sentence


def test_prefect_too_is_told_without_the_value() -> None:
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"tracking": {"uri": f"http://me:{VALUE}@h"}})
    assert "tracking.uri is an address" in str(refused.value)
    assert VALUE not in str(refused.value)


def test_a_value_of_a_wrong_type_is_not_in_pydantics_own_message() -> None:
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"tracking": {"uri": {"password": VALUE}}})
    assert VALUE not in str(refused.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"tracking": {"uri": "http://localhost:5000"}},
        {"tracking": {"uri": "sqlite:////home/me@work/mlflow.db"}},
        {"tracking": {"uri": "postgresql://me@h/d?sslmode=require"}},
        component(kind="http", url="http://h/score?model=a&max_tokens=5", token_env="REWARD_TOKEN"),
        function(eos_token="</s>", max_tokens=3, api_key_env="OPENAI_API_KEY", keywords=["a"], token=""),
    ],
)
def test_what_is_no_secret_is_taken(tree: dict[str, Any]) -> None:
    build_config(tree)


def test_names() -> None:
    secret = ("api_key", "apiKey", "HF_TOKEN", "token", "access-token", "PASSWORD", "client_secret", "Authorization")
    assert [name for name in secret if not names_a_secret(name)] == []
    plain = ("eos_token", "stop_token", "max_tokens", "num_tokens", "keyword", "author", "api_key_environment"[:6])
    assert [name for name in plain if names_a_secret(name)] == []


def test_what_in_an_address_is_a_secret() -> None:
    assert url_secret("no address") is None
    assert url_secret("http://h/p?key=a") == "the query parameter 'key'"
    assert url_secret("http://[::1/p") == "something that cannot be read as an address"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:p@ss/w#rd@h:5000/x", "http://h:5000/x"),
        ("https://tok@h", "https://h"),
        ("postgresql://me:pw@h:5432/d?sslmode=a&password=pw", "postgresql://h:5432/d?sslmode=a&password=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("databricks", "databricks"),
    ],
)
def test_an_address_is_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_a_text_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    monkeypatch.setenv("DATABASE", "postgresql://me:p%40ssw0rd@h/d")
    text = "GET http://u:p@h/x?token=t7 with abcdef123456 and p@ssw0rd, p%40ssw0rd, a banana"
    assert without_secrets(text) == "GET http://***@h/x?token=*** with *** and ***, ***, a banana"
