"""The official Node library with its helpers and its error classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clients import (
    CHAT_TOOL,
    COUNTED,
    FAILURES,
    SHORT_LIMIT,
    TOOL,
    assert_same_gaps,
    direct,
    script_paced,
)
from fake_upstream import (
    FakeUpstream,
    Json,
    answer,
    call,
    citation,
    custom_call,
    failed,
    message,
    reasoning,
    refusal,
    text,
)
from harness import MODEL, Gateway

NewGateway = Callable[..., Gateway]
Call = Callable[..., Any]
WEATHER = {"city": "Rome"}
SCRIPT = "openai_node.mjs"


@pytest.fixture
def library(node: Call, gateway: Gateway) -> Call:
    """Call it with a function of the script and request fields."""

    def call(function: str, **body: Any) -> Any:
        return node(SCRIPT, function, url=f"{gateway.url}/v1", body={"model": MODEL, **body})

    return call


@pytest.fixture
def failure(node: Call) -> Call:
    """Call it with a gateway for what the library throws and after how many requests."""

    def call(gateway: Gateway, **given: Any) -> Any:
        asked = {"url": f"{gateway.url}/v1", "body": {"model": MODEL}, **given}
        return node(SCRIPT, "failure", **asked)

    return call


def weather_call() -> Any:
    return call("get_weather", '{"city":', '"Rome"}', call_id="call_1")


def scripted_tool_turns(upstream: FakeUpstream) -> None:
    """First a call, then the answer that uses its result."""
    upstream.script(answer(reasoning("Plan"), weather_call()))
    upstream.script(text("Sunny", "."))


# -- Chat Completions -----------------------------------------------------------------------------


def test_a_chat_completion_has_text_finish_and_usage(library: Call, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    said = library("chat")

    assert said["choices"][0]["message"]["content"] == "Hello"
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["total_tokens"] == 70


def test_a_plain_chat_stream_has_one_role_one_finish_one_usage(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    chunks = library("chatStream", stream_options={"include_usage": True})

    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]] == [
        "assistant"
    ]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Hello"
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert [chunk["usage"]["total_tokens"] for chunk in chunks if chunk.get("usage")] == [70]


def test_c04_the_stream_helper_resolves_all_its_finals(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    final = library("chatStreamHelper", stream_options={"include_usage": True})

    assert final["completion"]["choices"][0]["finish_reason"] == "stop"
    assert final["message"]["role"] == "assistant"
    assert final["content"] == "Hello"
    assert final["snapshots"] == ["Hel", "Hello"]
    assert final["usage"]["total_tokens"] == 70


def test_the_stream_helper_merges_parallel_calls(library: Call, upstream: FakeUpstream) -> None:
    other = call("get_time", '{"zone":', '"UTC"}', call_id="call_2")
    upstream.script(answer(reasoning("Plan"), weather_call(), other, interleaved=True))

    final = library("chatStreamHelper", tools=[CHAT_TOOL])

    made = final["message"]["tool_calls"]
    assert [(each["id"], each["type"], each["function"]["name"]) for each in made] == [
        ("call_1", "function", "get_weather"),
        ("call_2", "function", "get_time"),
    ]
    assert [each["function"]["arguments"] for each in made] == ['{"city":"Rome"}', '{"zone":"UTC"}']
    assert final["completion"]["choices"][0]["finish_reason"] == "tool_calls"
    assert final["call"]["name"] == "get_time"


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_runs_the_tool_and_returns_the_answer(
    library: Call, upstream: FakeUpstream, stream: bool
) -> None:
    scripted_tool_turns(upstream)

    ran = library("chatRunTools", stream=stream)

    assert ran["asked"] == ["Rome"]
    assert ran["result"] == "sunny in Rome"
    assert ran["content"] == "Sunny."
    assert ran["roles"] == ["user", "assistant", "tool", "assistant"]
    assert upstream.sent["input"][-1]["output"] == "sunny in Rome"


def test_the_parse_helpers_of_chat_return_the_object(library: Call, upstream: FakeUpstream) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))
    upstream.script(answer(weather_call()))

    assert library("chatParse") == WEATHER
    assert upstream.sent["text"]["format"]["strict"] is True
    assert library("chatParseTool") == WEATHER
    assert upstream.sent["tools"][0]["strict"] is True


def test_c22_the_stream_helper_takes_a_refusal(library: Call, upstream: FakeUpstream) -> None:
    upstream.script(answer(refusal("I will ", "not.")))

    final = library("chatStreamHelper")

    assert final["message"]["refusal"] == "I will not."
    assert not final["message"]["content"]


def test_c23_the_stream_helper_takes_citations_and_reasoning(
    library: Call, upstream: FakeUpstream
) -> None:
    cited = [citation("https://a/", "A", 4, 5), citation("https://b/", "B", 7, 8)]
    upstream.script(answer(reasoning("Plan"), message("See a, b.", annotations=cited)))

    assert library("chatStreamHelper")["content"] == "See a, b."


def test_c30_a_failure_in_the_stream_is_thrown_with_its_message(
    node: Call, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    thrown = node(SCRIPT, "streamFailure", url=f"{gateway.url}/v1", body={"model": MODEL})

    assert thrown["name"] == "APIError"
    assert "It went wrong." in thrown["message"]
    assert thrown["code"] == "upstream_error"
    assert "".join(thrown["heard"]) == "Hel"
    assert len(upstream.turns) == 1


def test_c37_the_stream_helper_takes_a_flat_custom_call(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("patch", "raw ", "input", call_id="call_1")))

    final = library("chatStreamHelper", tools=[{"type": "custom", "name": "patch"}])

    (made,) = final["message"]["tool_calls"]
    assert made["function"] == {"name": "patch", "arguments": "raw input"}


# -- Responses ------------------------------------------------------------------------------------


def test_r01_a_response_has_its_text_and_usage(library: Call, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    response = library("response")

    assert response["text"] == "Hello"
    assert response["usage"]["total_tokens"] == 70


def test_r02_a_plain_stream_is_numbered_and_ends_completed(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo")))

    events = library("responseStream")

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"


def test_r02_the_stream_helper_accumulates_text_and_calls(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan", "Act"), message("Hel", "lo"), weather_call()))

    final = library("responseStreamHelper")

    assert final["snapshots"] == ["Hel", "Hello"]
    assert final["text"] == "Hello"
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    assert final["output"][2]["parsed_arguments"] == WEATHER


@pytest.mark.parametrize("function", ["responseParse", "responseStreamParse"])
def test_r15_the_parse_helpers_return_the_object(
    library: Call, upstream: FakeUpstream, function: str
) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))

    assert library(function) == WEATHER


def test_r13_a_failure_reaches_the_stream_helper_as_its_last_event(
    library: Call, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    last = library("streamHelperFailure")

    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "It went wrong."


def test_a_tool_loop_with_a_previous_response_sends_only_the_output(
    library: Call, upstream: FakeUpstream
) -> None:
    scripted_tool_turns(upstream)

    said = library("responseToolLoop", tools=[TOOL])

    assert said == "Sunny."
    sent = [item["type"] for item in upstream.sent["input"]]
    assert sent == ["message", "reasoning", "function_call", "function_call_output"]


# -- Models and errors ----------------------------------------------------------------------------


def test_m01_the_models_are_listed(library: Call) -> None:
    assert MODEL in library("models")


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_a_failure_throws_its_class_after_the_right_number_of_tries(
    failure: Call,
    new_gateway: NewGateway,
    upstream: FakeUpstream,
    case: tuple[Json, str, int, str, int],
) -> None:
    how, name, status, code, tries = case
    upstream.script(**how, times=3)

    thrown = failure(new_gateway())

    assert (thrown["name"], thrown["status"], thrown["code"]) == (name, status, code)
    assert thrown["requestID"]
    assert (thrown["requests"], len(upstream.turns)) == (tries, tries)


def test_e02_a_wrong_key_throws_authentication_error_once(
    failure: Call, new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    assert gateway.azt("keys", "add", "test").returncode == 0

    thrown = failure(gateway, key="sk-wrong-key")

    assert (thrown["name"], thrown["code"]) == ("AuthenticationError", "invalid_api_key")
    assert (thrown["requests"], upstream.turns) == (1, [])


def test_e03_without_an_account_exactly_one_request_is_made(
    failure: Call, new_gateway: NewGateway
) -> None:
    thrown = failure(new_gateway(accounts=[]))

    assert (thrown["name"], thrown["status"]) == ("InternalServerError", 503)
    assert thrown["code"] == "no_account"
    assert "azt login" in thrown["message"]
    assert thrown["requests"] == 1


def test_e04_a_long_quota_wait_is_not_slept(
    failure: Call, new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(**FAILURES["long quota"][0])

    thrown = failure(new_gateway())

    assert thrown["code"] == "usage_limit_reached"
    assert thrown["requests"] == 1
    assert thrown["took_s"] < 3.0


def test_e05_a_short_limit_is_slept_and_then_succeeds(
    node: Call, new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(**SHORT_LIMIT)

    said = node(SCRIPT, "response", url=f"{new_gateway().url}/v1", body={"model": MODEL})

    first, second = upstream.turns
    assert said["text"] == "You said: hi"
    assert second.at - first.at >= 1.5


# -- Time -----------------------------------------------------------------------------------------


def test_a_client_that_times_out_ends_the_upstream_call(
    failure: Call, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("late"), delay=30.0)

    thrown = failure(gateway, options={"timeout": 500, "maxRetries": 0})

    assert thrown["name"] == "APIConnectionTimeoutError"
    assert upstream.wait_closed()


def test_a_left_stream_ends_the_upstream_call(library: Call, upstream: FakeUpstream) -> None:
    upstream.script(text(*(f"w{number} " for number in range(200))), delays=0.05)

    assert library("leaveAfterTwoEvents") == 2

    assert upstream.wait_closed()


def test_the_gaps_between_deltas_are_those_of_a_direct_connection(
    node: Call, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("first"), times=3)
    script_paced(upstream, times=3)

    arrived = node(SCRIPT, "gaps", url=f"{gateway.url}/v1", direct=direct(upstream))

    assert_same_gaps(arrived["responses"], arrived["reference"])
    assert_same_gaps(arrived["chat"], arrived["reference"])
