"""Secrets are refused in a config, by field and without their value, and cut out of what is shown."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.secret_shapes import names_a_secret
from rlhf_core.contracts.secrets import config_secrets, url_secret, without_credentials, without_secrets

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


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
SHAPES: dict[str, str] = {
    "odbc": f"mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BSERVER%3Dh%3BUID%3Dme%3BPWD%3D{VALUE}",
    "odbc plain": f"DRIVER={{ODBC Driver 18}};SERVER=h;DATABASE=d;UID=me;PWD={VALUE}",
    "odbc encoded twice": f"odbc_connect=DRIVER%253DODBC%253BUID%253Dme%253BPWD%253D{VALUE}",
    "azure storage": f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={VALUE}==;EndpointSuffix=core",
    "azure storage alone": f"AccountKey={VALUE}",
    "azure bus": f"Endpoint=sb://h/;SharedAccessKeyName=me;SharedAccessKey={VALUE}=",
    "azure shared access": f"BlobEndpoint=https://h;SharedAccessSignature=sv=2020&sig={VALUE}",
    "azure url": f"https://me.blob.core.windows.net/c?sv=2020-08-04&sig={VALUE}",
    "azure query": f"sv=2020-08-04&ss=b&sig={VALUE}",
    "dsn": f"host=db user=me password={VALUE} dbname=mlflow",
    "dsn quoted": f"host='db' user='me' password='{VALUE}'",
    "dsn alone": f"password={VALUE}",
    "jdbc": f"jdbc:sqlserver://h:1433;databaseName=d;user=me;password={VALUE}",
    "jdbc oracle": f"jdbc:oracle:thin:scott/{VALUE}@//h:1521/d",
    "database": f"postgresql://me:{VALUE}@h/d",
    "database in a sentence": f"see postgresql://me:{VALUE}@h/d for more",
    "redis": f"redis://:{VALUE}@h:6379/0",
    "mongo": f"mongodb+srv://me:{VALUE}@h",
    "signed url": f"https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Signature={VALUE}",
    "aws pairs": f"aws_access_key_id=ID aws_secret_access_key={VALUE}",
    "option": f"serve --port 80 --api-key {VALUE}",
    "option with a sign": f"--token={VALUE}",
    "json": f'{{"user": "me", "api_key": "{VALUE}"}}',
    "bearer": f"Bearer {VALUE}0123456789",
    "basic": "Authorization: Basic bWU6WnE3eDlX",
    "jwt": JWT,
    "jwt in a text": f"send {JWT} with it",
    "openai": f"sk-{VALUE}abcdef",
    "openai project": "sk-proj-a1B2c3D4e5F6g7H8i9J0-k1L2m3N4",
    "anthropic": "sk-ant-api03-a1B2c3D4e5F6g7H8i9J0",
    "stripe": "sk_live_a1B2c3D4e5F6g7H8",
    "hub": "hf_abcdefghijABCDEFGHIJ",
    "aws": "AKIAABCDEFGHIJKLMNOP",
    "github": "ghp_" + "a1B2c3" * 6,
    "google": "AIza" + "a1B2c" * 7,
    "slack": "xoxb-1234567890-abc",
    "pypi": "pypi-AgEIcHlwaS5vcmcCJGFiY2RlZi0xMjM0NTY3OA",
    "databricks": "dapi" + "0123abcd" * 4,
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "openssh key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_secret_is_found_by_its_shape_wherever_it_stands(name: str) -> None:
    value = SHAPES[name]
    trees: list[dict[str, Any]] = [
        function(text=value),
        function(deep=[{"x": [value]}]),
        {"tracking": {"uri": value}},
        {"tracking": {"artifact_location": value}},
        {"generation": {"vllm": {"options": {"kv_cache_dtype": value}}}},
        {"prompts": {"source": value}},
    ]
    for tree in trees:
        (problem,) = config_secrets(tree)
        assert "a config is stored as it is" in problem
        assert value not in problem
        assert VALUE not in problem


@pytest.mark.parametrize(
    "params",
    [
        {"headers": [["Authorization", f"Bearer {VALUE}"]]},
        {"headers": [["Accept", "a"], ["X-Api-Key", VALUE]]},
        {"headers": [{"name": "Authorization", "value": VALUE}]},
        {"headers": {"Authorization": VALUE}},
        {"db": {"password": 4711123}},
        {"db": {"userPwd": VALUE}},
        {"AccountKey": VALUE},
    ],
)
def test_a_secret_is_found_by_its_name_in_dictionaries_and_pairs(params: dict[str, Any]) -> None:
    (problem,) = config_secrets(function(**params))
    assert "is named like a secret" in problem or "an Authorization header" in problem
    assert VALUE not in problem


def test_a_key_of_a_dictionary_that_is_a_secret_is_not_shown() -> None:
    (problem,) = config_secrets(function(hf_abcdefghijABCDEFGHIJ="a"))
    assert "hf_abc" not in problem


HARMLESS: tuple[str, ...] = (
    "", "runs/2026-11-28", "/home/me@work/models/policy", "meta-llama/Llama-3.2-1B", "owner/name@main",
    "9f2c1b4d9f2c1b4d9f2c1b4d9f2c1b4d9f2c1b4d", "sk-learn-baseline-experiment-of-november", "sqlite:////srv/mlflow.db",
    "postgresql://me@h/d?sslmode=require", "http://localhost:5000/score?model=a&max_tokens=5", "s3://bucket/prefix",
    "hf_transfer", "host=db user=me dbname=mlflow sslmode=require", "password=${DB_PASSWORD}", "password=***",
    "host=db password=<yours> user=me", r"token=(\w+);key=(\d+)", r"(?i)password\s*=", "A password is not told to you.",
    "Write a poem about a bearer of good tidings, and of secrets.", "Bearer of the ring", "a=1;b=2",
    "The key = 3 and the token = 42 are numbers of this puzzle", "x = 5 and y = 7", "login(user=me, password=pwd)",
    "def login(user=None, password=None)", "eyJ is how a token begins", "Authorization is needed",
    "Basic understanding of English",
    "<think>keep it secret</think>", "kl.coef=0.05_seed=1", "a--b", "--max-tokens 5 --stop-token END", "AKIA", "dapi",
    "https://example.org/a?q=tokens#part", "{\"prompt\": \"a\", \"answer\": \"b\"}", "numpy.random:default_rng",
)  # fmt: skip


@pytest.mark.parametrize("value", HARMLESS)
def test_what_is_no_secret_is_taken_wherever_it_stands(value: str) -> None:
    assert config_secrets(function(text=value, words=["password", "secret"], pairs=[["a", value]])) == []
    assert config_secrets({"tracking": {"run_name": value, "experiment": value}, "prompts": {"source": value}}) == []


@pytest.mark.parametrize(
    "text",
    [
        "You are asked for a password: answer password=hunter2 user=me and no other",
        "{% if token %}{{ token }}{% endif %}{% set password = 'a' %}{{ 'key=' + api_key }}",
        '{"password": "hunter2", "user": "me"}',
        "See https://{{ user }}:{{ password }}@example.org",
        "--password hunter2",
    ],
)
def test_people_and_templates_may_speak_of_passwords(text: str) -> None:
    tree = {"prompts": {"system": text}, "policy": {"chat_template": text}, "generation": {"stop": [text]}}
    assert config_secrets(tree) == []
    (problem,) = config_secrets({"prompts": {"system": f"{text} {JWT}"}})
    assert problem.startswith("prompts.system holds what looks like a secret (a JSON web token)")
