"""Acceptance cases C01-C40 and S01-S08: what a chat client sees for each upstream stream."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest
from fake_upstream import (
    FakeUpstream,
    Json,
    answer,
    call,
    citation,
    custom_call,
    error_json,
    events,
    failed,
    flat_error,
    image,
    incomplete,
    message,
    nested_error,
    reasoning,
    refusal,
    text,
    usage,
    web_search,
    without,
)
from harness import MODEL, Answer, Client, Gateway, chat_body, make_gateway

WITH_USAGE = {"stream_options": {"include_usage": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
COUNTED = usage(50, 20, cached=30, reasoning_tokens=8)
CHAT_USAGE = {
    "prompt_tokens": 50,
    "completion_tokens": 20,
    "total_tokens": 70,
    "cached": 30,
    "reasoning": 8,
}
PIECES = pytest.mark.parametrize("pieces", [0, 1, 10])


class Weather(pydantic.BaseModel):
    city: str


def without_key(event: Json, name: str) -> Json:
    return {key: value for key, value in event.items() if key != name}


def counts(given: Json) -> Json:
    """The numbers of a chat usage object that the backend has."""
    return {
        "prompt_tokens": given["prompt_tokens"],
        "completion_tokens": given["completion_tokens"],
        "total_tokens": given["total_tokens"],
        "cached": given["prompt_tokens_details"]["cached_tokens"],
        "reasoning": given["completion_tokens_details"]["reasoning_tokens"],
    }


def helper(client: openai.OpenAI, **fields: Any) -> Any:
    """The final completion of the official library's stream helper."""
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    with client.chat.completions.stream(**asked) as stream:
        return stream.get_final_completion()


# -- Text and framing -----------------------------------------------------------------------------


@PIECES
def test_c01_text_streams_with_one_role_one_finish_and_done(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    upstream.script(text("Hel", "lo ", "wörld"), pieces=pieces)

    reply = client.chat_stream()

    assert reply.status == 200
    assert [delta["content"] for delta in reply.deltas if delta.get("content")] == [
        "Hel",
        "lo ",
        "wörld",
    ]
    assert [delta["role"] for delta in reply.deltas if "role" in delta] == ["assistant"]
    assert reply.deltas[0]["role"] == "assistant"
    assert reply.finish == "stop"
    assert reply.data[-1] == "[DONE]"
    assert reply.data.count("[DONE]") == 1
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in reply.chunks}) == 1
    assert {chunk["object"] for chunk in reply.chunks} == {"chat.completion.chunk"}


def test_c01_a_delta_leaves_before_the_next_one_has_come(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("first", "second"), stall=True, after=5)

    with client.open("POST", "/v1/chat/completions", chat_body(stream=True)) as stream:
        early = stream.read_until(b"first")
        upstream.release()
        late = stream.read_rest()

    assert b"second" not in early
    assert b"second" in late.body


@pytest.mark.parametrize("path", ["chat", "responses"])
def test_c01_the_time_to_the_first_delta_is_logged(
    client: Client, gateway: Gateway, upstream: FakeUpstream, path: str
) -> None:
    upstream.script(text("Hel", "lo"))

    reply = client.chat_stream() if path == "chat" else client.responses_stream()

    line = gateway.log_line(reply.headers["x-request-id"])
    assert re.search(r" ttft_ms=\d+ total_ms=\d+$", line), line


def test_c01_the_gaps_between_deltas_are_kept(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text(*(f"w{number} " for number in range(20))), delays=0.1)

    reply = client.chat_stream()

    lasted = reply.arrived[-1] - reply.arrived[0]
    assert lasted > 1.7
    assert len(reply.arrived) > 10


def test_c02_usage_comes_once_after_the_finish_when_asked(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("hi", usage=COUNTED))

    reply = client.chat_stream(**WITH_USAGE)

    assert reply.usage is not None
    assert counts(reply.usage) == CHAT_USAGE
    assert reply.chunks[-1]["choices"] == []
    assert reply.chunks[-1]["usage"] == reply.usage
    assert reply.chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_c02_no_usage_is_streamed_unasked(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("hi", usage=COUNTED))

    reply = client.chat_stream()

    assert reply.usage is None
    assert all(chunk["choices"] for chunk in reply.chunks)


def test_c04_the_python_stream_helper_accumulates_the_answer(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    final = helper(openai_client, **WITH_USAGE)

    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == "Hello"
    assert final.usage.total_tokens == 70


def test_c06_plain_iteration_of_the_python_library_gets_text_finish_and_usage(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    with openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "Hello"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [70]


@PIECES
def test_c34_a_chat_stream_is_bare_data_lines(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    upstream.script(
        answer(reasoning("Hm"), message("a", "b"), call("f", "{}")), pieces=pieces, newline="\r\n"
    )

    reply = client.chat_stream(**WITH_USAGE)

    blocks = reply.body.decode().removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in reply.headers
    assert "content-encoding" not in reply.headers


@PIECES
def test_c35_characters_split_across_reads_stay_whole(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    said = ["naïve ", "日本語", " 🦊🏳️‍🌈 ", "e\u0301"]
    upstream.script(text(*said), pieces=pieces)

    reply = client.chat_stream()

    assert reply.content == "".join(said)


def test_c38_a_float_creation_time_becomes_an_integer(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("hi", created_at=1730000000.75), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert {chunk["created"] for chunk in streamed.chunks} == {1730000000}
    assert whole.json["created"] == 1730000000


@pytest.mark.parametrize("alias", [f"openai/{MODEL}", f"azt/{MODEL}"])
def test_c39_the_requested_model_name_is_echoed_in_every_chunk(
    client: Client, upstream: FakeUpstream, alias: str
) -> None:
    streamed, whole = client.chat_stream(model=alias), client.chat(model=alias)

    assert upstream.sent["model"] == MODEL
    assert {chunk["model"] for chunk in streamed.chunks} == {alias}
    assert whole.json["model"] == alias


def test_c40_a_client_that_leaves_ends_the_upstream_call(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text(*(f"w{number} " for number in range(200))), delays=0.05)

    with client.open("POST", "/v1/chat/completions", chat_body(stream=True)) as stream:
        stream.read_until(b"w1 ")
    left_at = time.monotonic()

    assert upstream.wait_closed() - left_at < 1.0


def test_c40_a_client_that_leaves_a_whole_answer_ends_the_upstream_call(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("a", "b"), stall=True, after=5)

    connection = client.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(chat_body()))
    upstream.wait_turns()
    connection.close()
    left_at = time.monotonic()

    assert upstream.wait_closed() - left_at < 1.0


# -- Tool calls -----------------------------------------------------------------------------------


@PIECES
def test_c07_a_call_streams_its_head_once_and_its_arguments_once(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    made = call("get_weather", '{"city":', '"Rome"}', call_id="call_1")
    upstream.script(answer(made), pieces=pieces)

    reply = client.chat_stream(tools=[TOOL])

    parts = [part for delta in reply.deltas for part in delta.get("tool_calls", [])]
    assert parts[0] == {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert all(set(part) == {"index", "function"} for part in parts[1:])
    assert all(set(part["function"]) == {"arguments"} for part in parts[1:])
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city":"Rome"}'
    assert reply.finish == "tool_calls"


def test_c07_a_call_is_whole_in_a_whole_answer(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(call("get_weather", '{"city":', '"Rome"}', call_id="call_1")))

    reply = client.chat(tools=[TOOL])

    assert reply.message["tool_calls"] == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
        }
    ]
    assert reply.message["content"] is None
    assert reply.finish == "tool_calls"


def test_c07_the_python_tool_helper_parses_the_call(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Hm"), call("get_weather", '{"city":', '"Rome"}')))

    final = helper(
        openai_client, tools=[openai.pydantic_function_tool(Weather, name="get_weather")]
    )

    (made,) = final.choices[0].message.tool_calls
    assert made.function.name == "get_weather"
    assert made.function.parsed_arguments == Weather(city="Rome")


LATE_CALLS = {
    "arguments only in their done event": without(
        answer(call("f", '{"a":1}', call_id="call_1")), "arguments.delta"
    ),
    "the call only in its item's done event": without(
        answer(call("f", '{"a":1}', call_id="call_1")), "arguments.delta", "arguments.done", "added"
    ),
    "the call only in the final output": without(
        answer(call("f", '{"a":1}', call_id="call_1"), filled=True),
        "arguments.delta",
        "arguments.done",
        "output_item.added",
        "output_item.done",
    ),
}


@pytest.mark.parametrize("stream", LATE_CALLS.values(), ids=LATE_CALLS.keys())
def test_c08_a_late_call_is_still_delivered_once_before_the_finish(
    client: Client, upstream: FakeUpstream, stream: list[Any]
) -> None:
    upstream.script(stream, times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.tool_calls == [{"id": "call_1", "name": "f", "arguments": '{"a":1}'}]
    assert streamed.finish == "tool_calls"
    assert streamed.chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert whole.message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}


def test_c11_interleaved_calls_keep_their_own_arguments(
    client: Client, upstream: FakeUpstream
) -> None:
    calls = call("f", '{"a":', "1}", call_id="c1"), call("g", '{"b":', "2", "}", call_id="c2")
    upstream.script(answer(*calls, interleaved=True))

    reply = client.chat_stream()

    assert reply.tool_calls == [
        {"id": "c1", "name": "f", "arguments": '{"a":1}'},
        {"id": "c2", "name": "g", "arguments": '{"b":2}'},
    ]


def test_c12_the_tool_index_counts_calls_only(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(reasoning(), call("f", "{}")))

    reply = client.chat_stream()

    indexes = {part["index"] for delta in reply.deltas for part in delta.get("tool_calls", [])}
    assert indexes == {0}


def test_c13_deltas_with_only_an_output_index_find_their_call(
    client: Client, upstream: FakeUpstream
) -> None:
    stream = answer(call("f", "1"), call("g", "2", "3"), interleaved=True)
    upstream.script([without_key(event, "item_id") for event in stream])

    reply = client.chat_stream()

    made = [(found["name"], found["arguments"]) for found in reply.tool_calls]
    assert made == [("f", "1"), ("g", "23")]


def test_c13_deltas_before_their_item_wait_for_its_name(
    client: Client, upstream: FakeUpstream
) -> None:
    created, progress, added, first, second, *rest = answer(call("f", '{"a":', "1}"))
    upstream.script([created, progress, first, second, added, *rest])

    reply = client.chat_stream()

    parts = [part for delta in reply.deltas for part in delta.get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "f"
    assert reply.tool_calls[0]["arguments"] == '{"a":1}'


def test_c15_empty_arguments_become_an_empty_object(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(call("f")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.tool_calls[0]["arguments"] == "{}"
    assert whole.message["tool_calls"][0]["function"]["arguments"] == "{}"


def test_c16_text_before_a_call_is_kept(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(message("Let me ", "look."), call("f", "{}")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert (streamed.content, streamed.finish) == ("Let me look.", "tool_calls")
    assert (whole.message["content"], whole.finish) == ("Let me look.", "tool_calls")


def test_c36_a_nested_custom_tool_is_answered_as_custom(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("patch", "raw ", "input", call_id="call_1")))

    reply = client.chat(tools=[{"type": "custom", "custom": {"name": "patch"}}])

    assert reply.message["tool_calls"] == [
        {"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": "raw input"}}
    ]
    assert reply.finish == "tool_calls"


def test_c37_a_flat_custom_tool_streams_as_a_function(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("patch", "raw ", "input", call_id="call_1")))

    reply = client.chat_stream(tools=[{"type": "custom", "name": "patch"}])

    assert reply.tool_calls == [{"id": "call_1", "name": "patch", "arguments": "raw input"}]
    types = [part.get("type") for delta in reply.deltas for part in delta.get("tool_calls", [])]
    assert types[0] == "function"
    assert "custom" not in types


def test_c37_the_python_stream_helper_takes_a_flat_custom_call(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("patch", "raw ", "input", call_id="call_1")))

    final = helper(openai_client, extra_body={"tools": [{"type": "custom", "name": "patch"}]})

    (made,) = final.choices[0].message.tool_calls
    assert (made.id, made.function.arguments) == ("call_1", "raw input")


# -- What was said and when -----------------------------------------------------------------------


def test_c17_text_that_comes_only_when_done_is_delivered_once(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(without(text("Hello"), ".delta"), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.content == "Hello"
    assert whole.message["content"] == "Hello"


def test_c18_snapshots_do_not_repeat_the_deltas(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo", filled=True), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.content == "Hello"
    assert whole.message["content"] == "Hello"


def test_c19_an_empty_final_output_does_not_empty_the_answer(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    reply = client.chat()

    assert reply.message == {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "annotations": [],
    }
    assert reply.finish == "stop"
    assert counts(reply.json["usage"]) == CHAT_USAGE
    assert reply.json["object"] == "chat.completion"


def test_c20_nothing_at_all_is_an_empty_answer(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert (streamed.content, streamed.finish) == ("", "stop")
    assert streamed.deltas[0]["role"] == "assistant"
    assert (whole.message["content"], whole.finish) == ("", "stop")


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("max_output_tokens", "length"),
        ("content_filter", "content_filter"),
        ("max_messages", "stop"),
    ],
)
def test_c21_an_incomplete_answer_says_why(
    client: Client, upstream: FakeUpstream, reason: str, finish: str
) -> None:
    upstream.script(incomplete(message("cut"), reason=reason), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert (streamed.content, streamed.finish) == ("cut", finish)
    assert (whole.message["content"], whole.finish) == ("cut", finish)


def test_c22_a_refusal_is_no_content(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(refusal("I will ", "not.")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    said = "".join(delta.get("refusal") or "" for delta in streamed.deltas)
    assert (said, streamed.content, streamed.finish) == ("I will not.", "", "stop")
    assert whole.message["refusal"] == "I will not."
    assert whole.message["content"] is None
    assert whole.finish == "stop"


CITED = answer(
    web_search("rome"),
    message(
        "See a, b.",
        annotations=[citation("https://a/", "A", 4, 5), citation("https://b/", "B", 7, 8)],
    ),
)
NESTED = [
    {
        "type": "url_citation",
        "url_citation": {"url": "https://a/", "title": "A", "start_index": 4, "end_index": 5},
    },
    {
        "type": "url_citation",
        "url_citation": {"url": "https://b/", "title": "B", "start_index": 7, "end_index": 8},
    },
]


def test_c23_citations_are_nested_and_streamed_in_one_chunk(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(CITED, times=2)

    streamed, whole = client.chat_stream(), client.chat()

    lists = [delta["annotations"] for delta in streamed.deltas if delta.get("annotations")]
    assert lists == [NESTED]
    assert whole.message["annotations"] == NESTED


def test_c23_the_python_stream_helper_takes_the_citations(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(CITED)

    assert helper(openai_client).choices[0].message.content == "See a, b."


def test_c24_reasoning_parts_are_joined_by_a_blank_line(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning(["Pl", "an"], "Act"), message("Done")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    thought = "".join(delta.get("reasoning_content") or "" for delta in streamed.deltas)
    assert thought == "Plan\n\nAct"
    assert whole.message["reasoning_content"] == "Plan\n\nAct"
    assert (streamed.content, whole.message["content"]) == ("Done", "Done")


@pytest.mark.parametrize("off", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_c24_reasoning_is_absent_where_the_client_wants_none(
    client: Client, upstream: FakeUpstream, off: Json
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Done")), times=2)

    streamed, whole = client.chat_stream(**off), client.chat(**off)

    assert all("reasoning_content" not in delta for delta in streamed.deltas)
    assert "reasoning_content" not in whole.message


def test_c24_reasoning_alone_still_has_content(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(reasoning("Plan")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.deltas[0]["content"] == ""
    assert streamed.finish == "stop"
    assert whole.message["content"] == ""


def test_c26_a_picture_comes_beside_the_content(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(message("Here."), image("aWJt", ["cGFydA=="])), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    shown = [delta["images"] for delta in streamed.deltas if delta.get("images")]
    assert len(shown) == 1
    for images in (shown[0], whole.message["images"]):
        assert [picture["image_url"]["url"] for picture in images] == ["data:image/png;base64,aWJt"]
    assert (streamed.content, whole.message["content"]) == ("Here.", "Here.")


def test_c27_commentary_and_answer_are_both_delivered_in_order(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(message("Looking.", phase="commentary"), message("Found.")), times=2)

    streamed, whole = client.chat_stream(), client.chat()

    assert streamed.content == "Looking.\n\nFound."
    assert whole.message["content"] == "Looking.\n\nFound."


def test_c27_commentary_stays_out_of_json(client: Client, upstream: FakeUpstream) -> None:
    stream = answer(message("Looking.", phase="commentary"), message('{"a":1}'))
    upstream.script(stream, times=2)
    form = {"response_format": {"type": "json_object"}}

    streamed, whole = client.chat_stream("json", **form), client.chat("json", **form)

    assert streamed.content == '{"a":1}'
    assert whole.message["content"] == '{"a":1}'
    assert whole.message["reasoning_content"] == "Looking."


@PIECES
def test_c28_what_is_unknown_or_broken_is_passed_over(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    created, progress, *rest = text("Hel", "lo")
    noise = [
        b": a comment\n\n",
        b"event: ping\n\n",
        b'data: {"type":"response.output_text.delta","delta":\n\n',
        {"type": "response.brand_new.delta", "delta": "no", "output_index": 0},
        {"type": "codex.other", "response": {"id": "no"}},
        b"id: 7\nretry: 5\n\n",
    ]
    mixed = [part for event in [progress, *rest] for part in (*noise, event)]
    upstream.script([*noise, created, *mixed], pieces=pieces, done=True)

    reply = client.chat_stream()

    assert (reply.content, reply.finish) == ("Hello", "stop")
    assert "no" not in [delta.get("content") for delta in reply.deltas]


# -- Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "ours"),
    [
        ("server_error", 502, "upstream_error"),
        ("server_is_overloaded", 503, "overloaded"),
        ("invalid_prompt", 400, "content_policy_violation"),
    ],
)
def test_c29_a_failure_before_any_output_is_an_http_error(
    new_gateway: Any, upstream: FakeUpstream, code: str, status: int, ours: str, stream: bool
) -> None:
    upstream.script(failed(code, "It went wrong."))
    client = Client(new_gateway().url)

    reply = client.chat(stream=stream)

    assert (reply.status, reply.error["code"]) == (status, ours)
    assert set(reply.error) >= {"message", "type", "param", "code"}
    assert "It went wrong." in reply.error["message"]


def test_c29_an_error_as_the_first_event_is_an_http_error(
    new_gateway: Any, upstream: FakeUpstream
) -> None:
    upstream.script([flat_error("server_error", "It went wrong.")])
    client = Client(new_gateway().url)

    reply = client.chat_stream()

    assert (reply.status, reply.error["code"]) == (502, "upstream_error")


def test_c30_a_failure_after_deltas_is_an_error_event_without_a_finish(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    reply = client.chat_stream()

    assert (reply.status, reply.content, reply.finish) == (200, "Hel", None)
    assert reply.stream_error is not None
    assert reply.stream_error["message"] == "It went wrong."
    assert set(reply.stream_error) >= {"message", "type", "param", "code"}
    assert "[DONE]" not in reply.data
    assert not reply.cut


def test_c30_the_python_library_raises_the_message(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    with pytest.raises(openai.APIError, match="It went wrong."):
        helper(openai_client)


@pytest.mark.parametrize("path", ["chat", "responses"])
def test_c30_a_stream_that_failed_is_logged_as_failed(
    client: Client, gateway: Gateway, upstream: FakeUpstream, path: str
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    reply = client.chat_stream() if path == "chat" else client.responses_stream()

    assert gateway.log_line(reply.headers["x-request-id"]).endswith(" failed upstream_error")


def test_c30_a_failure_after_deltas_fails_a_whole_answer(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    reply = client.chat()

    assert (reply.status, reply.error["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("stream", [False, True])
def test_c31_a_nested_error_event_keeps_its_status(
    new_gateway: Any, upstream: FakeUpstream, stream: bool
) -> None:
    told = error_json("Slow down.", type="rate_limit_exceeded")["error"]
    created = text("x")[:1]
    upstream.script(events(created, nested_error(429, told)))
    client = Client(new_gateway().url)

    reply = client.chat(stream=stream)

    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("how", [{"cut": True, "after": 5}, {"reset_after": 8000}])
def test_c32_a_cut_stream_ends_with_an_error_event(
    client: Client, upstream: FakeUpstream, how: Json
) -> None:
    upstream.script(text("Hel", "lo" * 4000), **how)

    reply = client.chat_stream()

    assert (reply.content, reply.finish) == ("Hel", None)
    assert reply.stream_error is not None
    assert reply.stream_error["code"] == "upstream_stream_truncated"
    assert "[DONE]" not in reply.data
    assert not reply.cut


def test_c32_a_stream_that_just_ends_is_cut_too(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo")[:5])

    reply = client.chat_stream()

    assert reply.stream_error is not None
    assert reply.stream_error["code"] == "upstream_stream_truncated"


def test_c32_a_cut_whole_answer_is_a_bad_gateway(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo"), cut=True, after=5)

    reply = client.chat()

    assert (reply.status, reply.error["code"]) == (502, "upstream_stream_truncated")


# -- Silence --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def silence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """Streams with 40 s of silence after the first delta, running while the other tests run.

    They have a gateway and an upstream of their own: the shared ones are reset between tests.
    """
    with FakeUpstream() as upstream, ThreadPoolExecutor() as threads:
        upstream.script(text("before", " after"), delays={5: 40.0}, times=3)
        gateway = make_gateway(tmp_path_factory.mktemp("silence"), upstream)
        patient = Client(gateway.url, timeout=70.0)
        yield {
            "raw": threads.submit(patient.chat_stream),
            "responses": threads.submit(patient.responses_stream),
            "python": threads.submit(python_helper, gateway),
        }
        gateway.stop()


def python_helper(gateway: Gateway) -> Any:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any key", max_retries=0) as client:
        return helper(client)


# -- Stop strings ---------------------------------------------------------------------------------


def stopped(client: Client, upstream: FakeUpstream, stop: Any, *deltas: str) -> Answer:
    upstream.script(text(*deltas))
    return client.chat_stream(stop=stop)


def test_s01_a_stop_string_across_deltas_ends_the_text(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = stopped(client, upstream, "END", "abcE", "N", "Dxyz")

    assert (reply.content, reply.finish) == ("abc", "stop")
    assert reply.data[-1] == "[DONE]"
    assert "stop" not in upstream.sent


def test_s02_the_beginning_of_a_stop_string_is_given_out_at_the_end(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = stopped(client, upstream, "END", "abcEN")

    assert (reply.content, reply.finish) == ("abcEN", "stop")


def test_s03_what_is_held_back_for_several_stops_is_given_out(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = stopped(client, upstream, ["\n\n", "###"], "a#", "#b")

    assert reply.content == "a##b"


def test_s03_a_stop_at_the_first_character_leaves_nothing(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = stopped(client, upstream, ["END"], "END of it")

    assert (reply.content, reply.finish) == ("", "stop")


def test_s05_a_stop_string_inside_arguments_has_no_effect(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(call("f", '{"a":"', 'END"}')), times=2)

    streamed, whole = client.chat_stream(stop="END"), client.chat(stop="END")

    assert streamed.tool_calls[0]["arguments"] == '{"a":"END"}'
    assert streamed.finish == "tool_calls"
    assert whole.message["tool_calls"][0]["function"]["arguments"] == '{"a":"END"}'


def test_s05_a_call_after_the_stop_is_dropped(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(message("abcEND"), call("f", "{}")), times=2)

    streamed, whole = client.chat_stream(stop="END"), client.chat(stop="END")

    assert (streamed.content, streamed.tool_calls, streamed.finish) == ("abc", [], "stop")
    assert (whole.message["content"], whole.finish) == ("abc", "stop")
    assert "tool_calls" not in whole.message


def test_s07_a_whole_answer_is_cut_and_has_usage(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("abcE", "NDxyz"))

    reply = client.chat(stop=["END"])

    assert (reply.message["content"], reply.finish) == ("abc", "stop")
    assert reply.json["usage"]["total_tokens"] >= 0
    assert counts(reply.json["usage"])["prompt_tokens"] >= 0


def test_s07_a_stopped_stream_has_usage_when_asked(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("abcE", "NDxyz"))

    reply = client.chat_stream(stop=["END"], **WITH_USAGE)

    assert reply.usage is not None
    assert reply.usage["total_tokens"] >= 0


def test_s08_an_empty_stop_string_is_ignored(client: Client, upstream: FakeUpstream) -> None:
    reply = stopped(client, upstream, ["", "END"], "abcENDx")

    assert reply.content == "abc"


def test_s08_a_null_stop_string_is_refused(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat(stop=["", None])

    assert reply.status == 400
    assert reply.error["param"].startswith("stop")
    assert upstream.turns == []


# Last, so that the silence passes while the tests above run.


def test_c33_a_long_silence_is_filled_with_comments(silence: dict[str, Future[Any]]) -> None:
    raw, responses = silence["raw"].result(70), silence["responses"].result(70)

    assert (raw.content, raw.finish) == ("before after", "stop")
    assert responses.output_text == "before after"
    for reply in (raw, responses):
        middle = reply.body.split(b"before", 1)[1].split(b"after", 1)[0]
        comments = [line for line in middle.split(b"\n") if line.startswith(b":")]
        assert len(comments) >= 2
        assert b"\nid:" not in reply.body


def test_c33_the_python_library_reads_over_the_silence(silence: dict[str, Future[Any]]) -> None:
    assert silence["python"].result(70).choices[0].message.content == "before after"
