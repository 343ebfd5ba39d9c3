"""Acceptance cases M01, E01-E11, X01, X02, X04 and X05: models, errors and the rest."""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from fake_upstream import (
    CHALLENGE_PAGE,
    FakeUpstream,
    Json,
    Reply,
    Seen,
    answer,
    call,
    error_json,
    failed,
    limit_reached,
    message,
    usage,
)
from harness import MODEL, Client, Gateway, chat_body

MIB = 1024 * 1024
HI: Any = [{"role": "user", "content": "hi"}]
NewGateway = Callable[..., Gateway]


def library(gateway: Gateway, seen: list[Any] | None = None, **how: Any) -> openai.OpenAI:
    """The official library; `seen` collects the requests that it sends."""
    hooks = {"request": [lambda request: seen.append(request)]} if seen is not None else {}
    web = openai.DefaultHttpxClient(event_hooks=hooks)
    return openai.OpenAI(
        base_url=f"{gateway.url}/v1", **{"api_key": "any key", "http_client": web, **how}
    )


# -- Models ---------------------------------------------------------------------------------------


def test_m01_every_listed_model_has_the_four_keys(client: Client) -> None:
    listed = client.get("/v1/models").json

    assert listed["object"] == "list"
    assert {"gpt-5.5", "gpt-5.4"} <= {model["id"] for model in listed["data"]}
    for model in listed["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)


def test_m01_the_library_lists_and_retrieves(openai_client: openai.OpenAI) -> None:
    assert MODEL in {model.id for model in openai_client.models.list()}
    assert openai_client.models.retrieve(MODEL).id == MODEL


def test_m01_an_unknown_model_is_not_found(client: Client) -> None:
    reply = client.get("/v1/models/gpt-nothing")

    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert client.get("/v1/models/some%2Fthing/else").error["code"] == "model_not_found"


def test_m01_the_list_is_not_empty_without_an_account(new_gateway: NewGateway) -> None:
    client = Client(new_gateway(accounts=[]).url)

    assert client.get("/v1/models").json["data"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_m01_a_model_that_the_backend_refuses_is_not_found(client: Client, path: str) -> None:
    body = {"model": "gpt-nothing", "messages": HI, "input": "hi"}

    reply = client.post(path, body)

    assert reply.status == 404
    assert (reply.error["code"], reply.error["param"]) == ("model_not_found", "model")


# -- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b'{"model": ', b"", b"[1]", b'"text"', b"\xff\xfe{}"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_e01_a_body_that_is_no_json_object_gets_the_envelope(
    client: Client, path: str, body: bytes
) -> None:
    reply = client.post(path, body=body)

    assert reply.status == 400
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["content-type"].startswith("application/json")


def test_e02_a_wrong_key_is_refused_and_not_repeated(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    added = gateway.azt("keys", "add", "test")
    assert added.returncode == 0, added.stderr
    (good,) = re.findall(r"azt_[\w-]+", added.stdout)

    with library(gateway, api_key="sk-wrong-key") as wrong, library(gateway, api_key=good) as right:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.chat.completions.create(model=MODEL, messages=HI)
        said = right.chat.completions.create(model=MODEL, messages=HI)

    assert caught.value.code == "invalid_api_key"
    assert "sk-wrong-key" not in str(caught.value)
    assert said.choices[0].message.content == "You said: hi"


def test_e03_without_an_account_the_library_asks_exactly_once(new_gateway: NewGateway) -> None:
    gateway, requests = new_gateway(accounts=[]), []

    with library(gateway, requests) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI)

    assert len(requests) == 1
    assert caught.value.status_code == 503
    assert caught.value.code == "no_account"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "azt login" in caught.value.message


@pytest.mark.parametrize("absolute", [True, False])
def test_e04_a_used_up_quota_says_when_and_forbids_to_wait_for_it(
    new_gateway: NewGateway, upstream: FakeUpstream, absolute: bool
) -> None:
    upstream.script(status=429, json=limit_reached(7200, absolute=absolute))
    gateway, requests = new_gateway(), []

    with library(gateway, requests) as client, pytest.raises(openai.RateLimitError) as caught:
        started = time.monotonic()
        client.chat.completions.create(model=MODEL, messages=HI)

    assert time.monotonic() - started < 1.0
    assert len(requests) == 1
    headers, error = caught.value.response.headers, caught.value.body
    assert 7190 <= int(headers["retry-after"]) <= 7200
    assert headers["x-should-retry"] == "false"
    assert isinstance(error, dict)
    assert error["code"] == "usage_limit_reached"
    assert abs(error["resets_at"] - time.time() - 7200) < 10
    assert 7190 <= error["resets_in_seconds"] <= 7200
    assert error["plan_type"] == "plus"


def test_e05_a_short_limit_is_waited_out_by_the_library(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    told = "Rate limit reached. Please try again in 2s."
    upstream.script(status=429, json=error_json(told, "rate_limit_exceeded"))
    gateway, requests = new_gateway(), []
    started = time.monotonic()

    with library(gateway, requests) as client:
        said = client.chat.completions.create(model=MODEL, messages=HI)

    assert said.choices[0].message.content == "You said: hi"
    assert 1.5 < time.monotonic() - started < 10.0
    assert len(requests) == 2


def test_e06_two_server_errors_are_retried_by_the_library(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(status=500, json=error_json("Oops.", "server_error"), times=2)

    with library(new_gateway()) as client:
        said = client.chat.completions.create(model=MODEL, messages=HI)

    assert said.choices[0].message.content == "You said: hi"


@pytest.mark.parametrize(
    "how",
    [
        {"status": 400, "json": error_json("Too long.", code="context_length_exceeded")},
        {"events": failed("context_length_exceeded", "Too long.")},
    ],
    ids=["as a status", "as an event"],
)
def test_e07_a_context_error_keeps_its_code_and_names_the_field(
    client: Client, upstream: FakeUpstream, how: Json
) -> None:
    upstream.script(**how, times=2)

    chat, responses = client.chat_stream(), client.responses()

    for reply, param in ((chat, "messages"), (responses, "input")):
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"
        assert reply.error["param"] == param
        assert re.search("context (length|window)", reply.error["message"])


def test_e08_an_html_page_is_never_passed_on(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    page = {"content-type": "text/html", "cf-mitigated": "challenge"}
    upstream.script(status=403, body=CHALLENGE_PAGE, headers=page)
    client = Client(new_gateway().url)

    reply = client.chat_stream()

    assert (reply.status, reply.error["code"]) == (403, "upstream_forbidden")
    assert reply.error["type"] == "permission_error"
    assert b"<" not in reply.body
    assert client.chat().status == 200


def test_e09_an_announced_body_over_the_limit_is_refused_unread(client: Client) -> None:
    connection = client.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(128 * MIB + 1))
    connection.endheaders()

    response = connection.getresponse()
    body = response.read()
    connection.close()

    assert response.status == 413
    assert b"request_too_large" in body


def test_e09_an_unannounced_body_over_the_limit_is_refused(gateway: Gateway) -> None:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    chunk = b"100000\r\n" + b" " * MIB + b"\r\n"
    head = (
        f"POST /v1/responses HTTP/1.1\r\nHost: {host}:{port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )

    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        sent = 0
        while sent < 140 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(chunk)
            sent += 1
        reply = connection.recv(65536)

    assert 128 <= sent < 140
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in reply


def test_e10_an_unknown_path_is_named(client: Client) -> None:
    reply = client.post("/v1/nope", {})

    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    assert "POST /v1/nope" in reply.error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_e10_a_wrong_method_names_the_right_one(client: Client, path: str) -> None:
    reply = client.get(path)

    assert (reply.status, reply.error["code"]) == (405, "method_not_supported")
    assert "POST" in reply.headers["allow"]


def test_e11_embeddings_are_not_offered_and_not_retried(gateway: Gateway) -> None:
    requests: list[Any] = []

    with library(gateway, requests) as client, pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="text-embedding-3-small", input="hi")

    assert caught.value.code == "endpoint_not_supported"
    assert len(requests) == 1


# -- Everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/_gateway/health"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nothing"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/nope"),
        ("OPTIONS", "/v1/models"),
    ],
)
def test_x01_every_answer_has_a_request_id(client: Client, method: str, path: str) -> None:
    first, second = client.request(method, path), client.request(method, path)

    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_x01_answers_of_the_model_have_a_request_id(client: Client) -> None:
    for reply in (client.chat(), client.chat_stream(), client.responses_stream()):
        assert reply.status == 200
        assert reply.headers["x-request-id"]
        assert "set-cookie" not in reply.headers


def test_x01_a_request_id_of_the_client_is_kept(client: Client) -> None:
    reply = client.get("/v1/models", headers={"x-request-id": "mine-1"})

    assert reply.headers["x-request-id"] == "mine-1"


def test_x02_head_of_the_root_has_no_body(client: Client) -> None:
    reply = client.request("HEAD", "/")

    assert (reply.status, reply.body) == (200, b"")


def preflight(client: Client, origin: str) -> Any:
    return client.request(
        "OPTIONS",
        "/v1/chat/completions",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        },
    )


def test_x02_a_page_of_this_machine_may_ask(client: Client) -> None:
    reply = preflight(client, "http://localhost:3000")

    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    allowed = {name.strip() for name in reply.headers["access-control-allow-headers"].split(",")}
    assert allowed == {"authorization", "content-type", "x-stainless-os"}
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in reply.headers
    assert "access-control-allow-private-network" not in reply.headers


def test_x02_a_page_from_elsewhere_may_not(client: Client, upstream: FakeUpstream) -> None:
    reply = preflight(client, "https://evil.example")
    called = client.post(
        "/v1/chat/completions", chat_body(), headers={"Origin": "https://evil.example"}
    )

    assert (reply.status, called.status) == (403, 403)
    assert "access-control-allow-origin" not in {**reply.headers, **called.headers}
    assert upstream.turns == []


def numbered(seen: Seen) -> Reply:
    """An answer that can only belong to the request with this number."""
    number = int(seen.user_text)
    counted = usage(number + 1, number + 2)
    made = call(f"tool_{number}", f'{{"n":{number}}}', call_id=f"call_{number}")
    words = [f"{number}-{part} " for part in range(20)]
    return Reply(answer(message(*words), made, usage=counted), delays=0.02)


def test_x04_fifty_parallel_streams_do_not_mix(client: Client, upstream: FakeUpstream) -> None:
    upstream.default = numbered

    def ask(number: int) -> Any:
        return client.chat_stream(str(number), stream_options={"include_usage": True})

    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(ask, range(50)))

    for number, reply in enumerate(replies):
        assert reply.content == "".join(f"{number}-{part} " for part in range(20))
        assert reply.tool_calls == [
            {"id": f"call_{number}", "name": f"tool_{number}", "arguments": f'{{"n":{number}}}'}
        ]
        assert reply.usage["prompt_tokens"] == number + 1
        assert reply.usage["completion_tokens"] == number + 2
    assert len({reply.chunks[0]["id"] for reply in replies}) == 50
    assert len({reply.headers["x-request-id"] for reply in replies}) == 50


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/chat/completions", {"messages": HI}), ("/v1/responses", {"input": "hi"})],
)
def test_x05_the_body_alone_decides_about_streaming(
    client: Client, path: str, fields: Json
) -> None:
    def ask(stream: bool, accept: str) -> Any:
        body = {"model": MODEL, "stream": stream, **fields}
        return client.post(path, body, headers={"Accept": accept})

    streamed = ask(True, "application/json")
    whole = ask(False, "text/event-stream")

    assert streamed.is_stream
    assert whole.headers["content-type"].startswith("application/json")
    assert whole.json
