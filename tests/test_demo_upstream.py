"""Room 17: the demo backend speaks the real protocol, so that the gateway cannot tell it apart."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

import azt

RESPONSES = "/backend-api/codex/responses"


class Demo:
    """A demo backend on its own loop and thread, and a plain client for it."""

    def __init__(self, pace_s: float) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.upstream = azt.DemoUpstream(pace_s)
        self.base_url = self.run(self.upstream.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def close(self) -> None:
        self.run(self.upstream.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.base_url.removeprefix("http://"), timeout=10)

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        sent = {"authorization": "Bearer demo"} if headers is None else headers
        connection.request(method, path, data, sent)
        reply = connection.getresponse()
        read = reply.read()
        connection.close()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, read

    def ask(self, said: str, **more: Any) -> list[dict[str, Any]]:
        status, _headers, data = self.send("POST", RESPONSES, turn(said, **more))
        assert status == 200, data
        return events_in(data)


def turn(said: str, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [{"type": "input_text", "text": said}]}
    body = {"model": "gpt-5.4", "input": [message], "stream": True, "store": False}
    return {**body, **more}


def events_in(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event) for event in azt.SSEParser().feed(data)]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types in order, repeated deltas once."""
    found = [event["type"] for event in events]
    return [kind for number, kind in enumerate(found) if number == 0 or found[number - 1] != kind]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def items_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


@pytest.fixture
def demo() -> Iterator[Demo]:
    running = Demo(pace_s=0)
    yield running
    running.close()


def test_a_plain_answer_comes_in_the_order_of_the_real_backend(demo: Demo) -> None:
    events = demo.ask("hello there")

    assert kinds(events) == [
        "codex.rate_limits",
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[-1]["response"]["output"] == []
    assert events[-1]["response"]["usage"]["total_tokens"] > 0
    assert "hello there" in text_of(events)
    assert "demo" in text_of(events)


def test_the_deltas_add_up_to_the_finished_item(demo: Demo) -> None:
    events = demo.ask("one  two\nthree")

    assert items_of(events)[0]["content"][0]["text"] == text_of(events)


def test_words_arrive_as_they_are_made() -> None:
    demo = Demo(pace_s=0.02)
    connection = demo.connect()
    connection.request("POST", RESPONSES, json.dumps(turn("hi")), {"authorization": "Bearer demo"})
    reply = connection.getresponse()
    parser = azt.SSEParser()
    times = []
    while chunk := reply.read1():
        arrived = time.monotonic()
        times += [arrived for data in parser.feed(chunk) if b"output_text.delta" in data]
    connection.close()
    demo.close()

    assert times[-1] - times[0] > 0.015 * (len(times) - 1)


def test_slow_answers_wait_half_a_second_between_words(demo: Demo) -> None:
    connection = demo.connect()
    body = json.dumps(turn("demo:slow"))
    connection.request("POST", RESPONSES, body, {"authorization": "Bearer demo"})
    reply = connection.getresponse()
    parser = azt.SSEParser()
    times: list[float] = []
    while len(times) < 2:
        data = parser.feed(reply.read1())
        times += [time.monotonic() for event in data if b"output_text.delta" in event]
    connection.close()

    assert times[1] - times[0] > 0.4


def test_quota_headers_and_the_rate_limit_event_agree(demo: Demo) -> None:
    _status, headers, data = demo.send("POST", RESPONSES, turn("hi"))
    limits = events_in(data)[0]["rate_limits"]

    assert headers["x-codex-plan-type"] == "plus"
    assert headers["x-codex-primary-used-percent"] == str(limits["primary"]["used_percent"])
    assert headers["x-codex-secondary-window-minutes"] == "10080"
    assert float(headers["x-codex-primary-reset-at"]) > time.time()


TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 2},
        },
    },
}


def test_tool_word_calls_the_first_function_with_fitting_arguments(demo: Demo) -> None:
    other = {**TOOL, "name": "other"}
    events = demo.ask("demo:tool please", tools=[{"type": "web_search"}, TOOL, other])
    item = items_of(events)[0]

    assert kinds(events)[3:-1] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert item["name"] == "get_weather"
    assert json.loads(item["arguments"]) == {"city": "demo city", "unit": "celsius", "days": 2}


def test_custom_tools_get_free_text(demo: Demo) -> None:
    events = demo.ask("demo:tool", tools=[{"type": "custom", "name": "apply"}])

    assert items_of(events)[0]["input"] == "demo input"
    assert "response.custom_tool_call_input.delta" in kinds(events)


def test_a_tool_output_is_answered_in_text(demo: Demo) -> None:
    call = items_of(demo.ask("demo:tool", tools=[TOOL]))[0]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "12 degrees"}
    items = [*turn("demo:tool")["input"], call, result]

    events = demo.ask("", input=items, tools=[TOOL])

    assert text_of(events) == "The tool answered: 12 degrees"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_tool_is_called_without_the_word(demo: Demo, choice: Any) -> None:
    events = demo.ask("hello", tools=[TOOL], tool_choice=choice)

    assert items_of(events)[0]["type"] == "function_call"


def test_reason_word_streams_a_summary_before_the_text(demo: Demo) -> None:
    events = demo.ask("demo:reason")
    reasoning, message = items_of(events)

    assert reasoning["type"] == "reasoning"
    assert reasoning["encrypted_content"]
    assert message["type"] == "message"
    assert "response.reasoning_summary_text.delta" in kinds(events)


def test_image_word_makes_a_real_png(demo: Demo) -> None:
    picture = base64.b64decode(items_of(demo.ask("demo:image"))[0]["result"])
    rows = zlib.decompress(picture[picture.index(b"IDAT") + 4 : picture.index(b"IEND") - 8])

    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(rows) == 64 * (1 + 64 // 8)


def test_refuse_word_refuses(demo: Demo) -> None:
    events = demo.ask("demo:refuse")

    assert items_of(events)[0]["content"][0]["type"] == "refusal"
    assert "response.refusal.delta" in kinds(events)
    assert events[-1]["type"] == "response.completed"


def test_incomplete_word_ends_at_the_token_limit(demo: Demo) -> None:
    last = demo.ask("demo:incomplete")[-1]

    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_limit_word_answers_429_with_its_end(demo: Demo) -> None:
    status, headers, data = demo.send("POST", RESPONSES, turn("demo:limit"))
    error = json.loads(data)["error"]

    assert status == 429
    assert error["type"] == "usage_limit_reached"
    assert error["resets_at"] > time.time() + 60
    assert "x-codex-primary-used-percent" in headers


def test_overload_word_fails_inside_the_stream_after_the_handshake(demo: Demo) -> None:
    events = demo.ask("demo:overload")

    assert kinds(events)[1:] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "server_is_overloaded"


def test_cut_word_breaks_the_connection_within_the_answer(demo: Demo) -> None:
    connection = demo.connect()
    body = json.dumps(turn("demo:cut"))
    connection.request("POST", RESPONSES, body, {"authorization": "Bearer demo"})
    reply = connection.getresponse()

    events = events_in(reply.read())
    connection.close()

    assert len(text_of(events).split()) == 5
    assert events[-1]["type"] == "response.output_text.delta"


def test_a_json_schema_gets_a_value_that_fits(demo: Demo) -> None:
    schema = {
        "type": "object",
        "required": ["steps", "next", "mood", "done", "when", "score", "kind", "plain"],
        "properties": {
            "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}, "minItems": 2},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            "mood": {"type": ["string", "null"]},
            "done": {"type": "boolean"},
            "when": {"type": "string", "format": "date"},
            "score": {"type": "number"},
            "kind": {"const": "k"},
            "plain": {},
        },
        "$defs": {"step": {"type": "object", "properties": {"text": {"type": "string"}}}},
    }
    wanted = {"type": "json_schema", "name": "plan", "schema": schema}

    value = json.loads(text_of(demo.ask("plan", text={"format": wanted})))

    assert value["steps"] == [{"text": "demo text"}, {"text": "demo text"}]
    assert value["mood"] == "demo mood"
    assert value["done"] is True
    assert value["when"] == "2026-01-31"
    assert value["score"] == 1
    assert value["kind"] == "k"
    assert value["plain"] == "demo plain"
    assert value["next"]["kind"] == "k"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {
            "type": "object",
            "required": ["child"],
            "properties": {"child": {"type": "array", "items": {"$ref": "#"}}},
        },
    ],
)
def test_a_recursive_schema_ends(demo: Demo, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "name": "tree", "schema": schema}

    assert "child" in json.loads(text_of(demo.ask("x", text={"format": wanted})))


def test_json_object_mode_gets_an_object(demo: Demo) -> None:
    events = demo.ask("say json", text={"format": {"type": "json_object"}})

    assert json.loads(text_of(events)) == {"you_said": "say json"}


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"stream": False}, "Stream must be set to true"),
        ({"store": True}, "Store must be set to false"),
        ({"input": "hi"}, "Input must be a list"),
        ({"temperature": 1}, "Unsupported parameter: temperature"),
        (
            {"model": "nope"},
            "The 'nope' model is not supported when using Codex with a ChatGPT account.",
        ),
    ],
)
def test_faulty_requests_are_refused_as_by_the_real_backend(
    demo: Demo, change: dict[str, Any], detail: str
) -> None:
    status, _headers, data = demo.send("POST", RESPONSES, turn("hi", **change))

    assert status == 400
    assert json.loads(data) == {"detail": detail}


def test_a_call_without_credentials_is_refused(demo: Demo) -> None:
    status, _headers, data = demo.send("POST", RESPONSES, turn("hi"), headers={})

    assert (status, json.loads(data)) == (401, {"detail": "Unauthorized"})


def test_models_come_with_an_etag_that_is_honoured(demo: Demo) -> None:
    path = "/backend-api/codex/models?client_version=1.0.0"
    status, headers, data = demo.send("GET", path)
    known = {"authorization": "Bearer demo", "if-none-match": headers["etag"]}
    again, _headers, rest = demo.send("GET", path, headers=known)

    assert status == 200
    assert [model["slug"] for model in json.loads(data)["models"]][0] == "gpt-5.4"
    assert len(json.loads(data)["models"]) >= 3
    assert (again, rest) == (304, b"")


def test_usage_shows_both_windows(demo: Demo) -> None:
    _status, _headers, data = demo.send("GET", "/backend-api/wham/usage")
    limit = json.loads(data)["rate_limit"]

    assert limit["primary_window"]["limit_window_seconds"] == 18000
    assert limit["secondary_window"]["used_percent"] > 0


def test_refresh_renews_the_tokens(demo: Demo) -> None:
    status, _headers, data = demo.send("POST", "/oauth/token", {"refresh_token": "rt_demo1"})

    assert status == 200
    assert json.loads(data)["access_token"].count(".") == 2
    assert json.loads(data)["refresh_token"].startswith("rt_demo")


def test_a_foreign_refresh_token_is_refused(demo: Demo) -> None:
    status, _headers, data = demo.send("POST", "/oauth/token", {"refresh_token": "rt_real"})

    assert status == 401
    assert json.loads(data)["error"]["code"] == "refresh_token_invalidated"


def test_other_paths_are_not_found(demo: Demo) -> None:
    status, _headers, data = demo.send("GET", "/backend-api/else")

    assert (status, json.loads(data)) == (404, {"detail": "Not Found"})


def test_the_demo_account_carries_the_claims_of_a_plus_plan() -> None:
    [account] = azt.to_accounts([azt.demo_account(1_800_000_000.0)], 1_800_000_000.0)

    assert account.plan == "plus"
    assert account.account_id == "demo-account"
    assert account.email == "demo@example.com"
    assert account.expires_at == 1_800_000_000 + 864_000


def bearer(ident: str) -> dict[str, str]:
    return {"authorization": f"Bearer {azt.demo_account(0.0, ident)['access_token']}"}


def test_each_account_has_a_quota_of_its_own(demo: Demo) -> None:
    left = {}
    for ident, (_, plan, primary, _) in azt._DEMO_ACCOUNTS.items():
        _, headers, data = demo.send("GET", "/backend-api/wham/usage", headers=bearer(ident))
        told = json.loads(data)
        left[ident] = told["rate_limit"]["primary_window"]["used_percent"]
        assert (told["plan_type"], left[ident]) == (plan, primary)
        assert headers["x-codex-primary-used-percent"] == str(primary)
    status, _, data = demo.send("POST", RESPONSES, turn("hi"), bearer("demo-night"))

    assert len(set(left.values())) == len(left)
    assert status == 429
    assert json.loads(data)["error"]["type"] == "usage_limit_reached"


def test_who_signs_in_comes_back_with_an_account_and_goes_nowhere_else(demo: Demo) -> None:
    back = "http://localhost:1455/auth/callback"
    query = f"redirect_uri={back}&state=abc"
    status, headers, _ = demo.send("GET", f"/oauth/authorize?{query}", headers={})
    elsewhere, _, _ = demo.send("GET", "/oauth/authorize?redirect_uri=http://evil/", headers={})
    form = b"grant_type=authorization_code&code=demo-new"
    _, _, data = demo.send("POST", "/oauth/token", form, {})

    assert (status, headers["location"]) == (302, f"{back}?code=demo-new&state=abc")
    assert elsewhere == 404
    [account] = azt.to_accounts([json.loads(data)], 0.0)
    assert account.account_id == "demo-new"


def test_stopping_ends_running_streams() -> None:
    demo = Demo(pace_s=5)
    connection = demo.connect()
    connection.request("POST", RESPONSES, json.dumps(turn("hi")), {"authorization": "Bearer demo"})
    reply = connection.getresponse()
    reply.read1()

    demo.close()
    rest = reply.read()
    connection.close()

    assert b"response.completed" not in rest


def test_stopping_is_silent_while_a_connection_idles(caplog: pytest.LogCaptureFixture) -> None:
    demo = Demo(pace_s=0)
    idle = demo.connect()
    idle.connect()
    # The demo accepts in order: after this answer it waits for a call of the idle connection.
    demo.ask("hello")

    demo.close()
    idle.close()

    assert caplog.records == []
