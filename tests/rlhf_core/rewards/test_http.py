"""A service as a component, against a real server on this machine."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import HttpReward
from rlhf_core.models.reward_model import Conversation
from rlhf_core.rewards.http import load_http
from rlhf_core.rewards.scoring import Failure, Outcome, score_all

Handler = BaseHTTPRequestHandler


def five(columns: bool = True) -> list[Conversation]:
    chat = [{"role": "user", "content": "well?"}]
    return [
        Conversation(f"ask {i}", f"answer {i} é", chat if i == 4 else [], [], 0, {"gold": i} if columns else {})
        for i in range(5)
    ]


@dataclass
class Service:
    """Answers each request with the next of ``answers``; the last one again and again."""

    port: int
    answers: list[Callable[[Handler, Any], None]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def score(self, **settings: Any) -> list[Outcome]:
        knobs: dict[str, Any] = {"backoff_s": 0.0, "timeout_s": 5.0} | settings
        (found,) = score_all([load_http(HttpReward(url=self.url, **knobs), field="x")], five())
        return found

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"


def reply(body: object, status: int = 200, **headers: str) -> Callable[[Handler, Any], None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: Handler, _request: Any) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def lengths(handler: Handler, request: Any) -> None:
    reply({"scores": [len(text) for text in request["responses"]]})(handler, request)


def hang_up(handler: Handler, _request: Any) -> None:
    handler.connection.close()


def drip(handler: Handler, _request: Any) -> None:
    """A byte now and then: no single wait is long, the whole is."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: Handler, _request: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b" " * 65536)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service(0)

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.headers.append(dict(self.headers.items()))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.bodies.append(body)
            answer = made.answers.pop(0) if len(made.answers) > 1 else made.answers[0]
            try:
                answer(self, body)
            except OSError:  # the client has hung up
                self.close_connection = True

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.port = server.server_port
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def test_prompts_responses_and_columns_go_there_in_batches_and_scores_come_back(service: Service) -> None:
    service.answers = [lengths]
    assert service.score(batch_size=2) == [10.0] * 5
    assert [len(body["responses"]) for body in service.bodies] == [2, 2, 1]
    assert service.bodies[0] == {
        "prompts": ["ask 0", "ask 1"],
        "responses": ["answer 0 é", "answer 1 é"],
        "columns": {"gold": [0, 1]},
    }
    assert service.bodies[2]["prompts"] == [[{"role": "user", "content": "well?"}]]
    assert service.headers[0]["Content-Type"] == "application/json"
    assert not any("Authorization" in headers for headers in service.headers)


def test_the_order_is_that_of_the_responses(service: Service) -> None:
    service.answers = [reply({"scores": [1, 2]}), reply({"scores": [3, 4]}), reply({"scores": [5]})]
    assert service.score(batch_size=2) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_token_is_read_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "abc.def")
    service.answers = [lengths]
    service.score(token_env="JUDGE_TOKEN")
    assert service.headers[0]["Authorization"] == "Bearer abc.def"


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "café"])
def test_a_token_that_is_missing_or_no_header_is_refused_and_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(UserError, match=r"^reward\.components\.2\.token_env names JUDGE_TOKEN, ") as caught:
        load_http(HttpReward(url="http://a", token_env="JUDGE_TOKEN"), field="reward.components.2")
    assert not value or value not in str(caught.value)
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(UserError, match="which is not set in the environment"):
        load_http(HttpReward(url="http://a", token_env="JUDGE_TOKEN"), field="x")


def test_the_environments_proxy_is_not_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    service.answers = [lengths]
    assert service.score() == [10.0] * 5


@pytest.mark.parametrize(
    "bad", [reply({}, 500), reply({}, 503), reply({}, 429), hang_up], ids=["500", "503", "429", ""]
)
def test_what_another_try_may_cure_is_tried_again(service: Service, bad: Any) -> None:
    service.answers = [bad, bad, lengths]
    assert service.score(retries=2) == [10.0] * 5
    assert len(service.bodies) == 3


def test_waits_double(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("rlhf_core.rewards.http.asyncio.sleep", sleep)
    service.answers = [reply({}, 503)]
    assert service.score(retries=3, backoff_s=0.5) == [Failure("answered HTTP 503 in each of 4 tries")] * 5
    assert waits == [0.5, 1.0, 2.0]


def test_no_more_tries_than_allowed(service: Service) -> None:
    service.answers = [reply({}, 500), reply({}, 500), lengths]
    assert service.score(retries=1) == [Failure("answered HTTP 500 in each of 2 tries")] * 5
    assert len(service.bodies) == 2
    service.answers = [reply({}, 500), lengths]
    assert service.score(retries=0) == [Failure("answered HTTP 500 in its one try")] * 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply({"scores": [1] * 5}, 404), "answered HTTP 404"),
        (reply({"scores": [1] * 5}, 400), "answered HTTP 400"),
        (reply({"scores": [1] * 5}, 302, Location="/other"), "answered HTTP 302, a redirect, which is not followed,"),
        (reply({"scores": [1] * 5}, 307, Location="/other"), "answered HTTP 307, a redirect, which is not followed,"),
        (reply(b"<html>"), "answered '<html>', which is no JSON,"),
        (reply(b"[" * 100_000), f"answered '{'[' * 58}…, which is no JSON,"),
        (reply(b"\xff\xfe"), "answered '��', which is no JSON,"),
        (reply([1, 2, 3, 4, 5]), 'answered [1, 2, 3, 4, 5] without "scores"'),
        (reply({"score": []}), "answered {'score': []} without \"scores\""),
        (reply({"scores": [1, 2]}), "gave 2 values for 5 responses"),
        (reply({"scores": "12345"}), "gave '12345', a str, where a list of numbers is needed"),
        (
            reply(gzip.compress(b'{"scores": [1, 1, 1, 1, 1]}'), Content_Encoding="gzip"),
            "answered in a Content-Encoding that was not asked for",
        ),
    ],
)
def test_what_no_other_try_would_cure_fails_at_once(service: Service, answer: Any, reason: str) -> None:
    service.answers = [answer]
    assert service.score() == [Failure(reason)] * 5
    assert len(service.bodies) == 1


def test_a_bad_score_fails_its_own_response(service: Service) -> None:
    service.answers = [reply(b'{"scores": [1, null, "2", NaN, 5]}')]
    assert service.score() == [1.0, Failure("gave None"), Failure("gave '2', a str,"), Failure("gave nan"), 5.0]


def test_a_failed_request_fails_its_own_responses(service: Service) -> None:
    service.answers = [reply({"scores": [1, 2]}), reply({}, 404), reply({"scores": [5]})]
    assert service.score(batch_size=2) == [1.0, 2.0, *[Failure("answered HTTP 404")] * 2, 5.0]


def test_an_answer_that_takes_too_long_in_all(service: Service) -> None:
    service.answers = [drip]
    started = time.monotonic()
    found = service.score(timeout_s=0.2, retries=1)
    assert found == [Failure("gave no whole answer within 0.2 s in each of 2 tries")] * 5
    assert time.monotonic() - started < 2.5
    assert len(service.bodies) == 2


def test_an_answer_without_end_is_not_read_to_its_end(service: Service) -> None:
    service.answers = [endless]
    started = time.monotonic()
    assert service.score(max_response_bytes=1000) == [Failure("answered more than 1000 bytes (max_response_bytes)")] * 5
    assert time.monotonic() - started < 10.0


def test_an_answer_of_just_the_size_is_read(service: Service) -> None:
    body = b'{"scores": [1, 2, 3, 4, 5]}'
    service.answers = [reply(body)]
    assert service.score(max_response_bytes=len(body)) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert service.score(max_response_bytes=len(body) - 1)[0] == Failure(
        f"answered more than {len(body) - 1} bytes (max_response_bytes)"
    )


def test_nobody_is_there() -> None:
    config = HttpReward(url="http://127.0.0.1:9/", retries=1, backoff_s=0.0)
    ((failure, *_),) = score_all([load_http(config, field="x")], five())
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("could not be reached (")
    assert failure.reason.endswith(") in each of 2 tries")


def test_two_services_are_asked_at_the_same_time(service: Service) -> None:
    """Each answers only once both have been asked."""
    both = threading.Barrier(2, timeout=5)

    def together(handler: Handler, request: Any) -> None:
        both.wait()
        lengths(handler, request)

    service.answers = [together]
    component = load_http(HttpReward(url=service.url, retries=0), field="x")
    assert score_all([component, component], five(columns=False)) == [[10.0] * 5] * 2


def test_the_address_must_be_set() -> None:
    with pytest.raises(UserError, match=r"^reward\.components\.1\.url is not set; give the address of the service"):
        load_http(HttpReward(), field="reward.components.1")
