"""Room 11, the answer side: upstream events -> chat chunks and Responses events.

Each folder below `cases/` is one whole stream: the client's request, the upstream's events, what a
streaming client gets (`chunks.jsonl`, `expected.jsonl`) and what a waiting one (`answer.json`).
"""

import itertools
import json
import random
import secrets
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness import Claim
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import azt

NOW = 1795380000.0
CASES = Path(__file__).parent / "cases"
CHAT = sorted(
    folder.name for folder in (CASES / "chat").glob("*/") if (folder / "events.sse").exists()
)
RESPONSES = sorted(
    folder.name for folder in (CASES / "responses").glob("*/") if (folder / "events.sse").exists()
)
FAILING = ["C29_failed_first", "C30_failed_after_deltas", "C31_nested_error"]
OFFICIAL = TypeAdapter(ResponseStreamEvent)


def chat_request(**fields: Any) -> azt.ChatRequest:
    body = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return azt.chat_to_responses(body, {}, "gpt-5.4")


def responses_request(**fields: Any) -> azt.ResponsesRequest:
    body = {"model": "gpt-5.4", "input": "Hi", **fields}
    return azt.responses_to_upstream(body, {}, "gpt-5.4", azt.ResponseStore(), NOW)


def stream_of(kind: str, name: str, fast: bool) -> Any:
    body = json.loads((CASES / kind / name / "request.json").read_text("utf-8"))
    if kind == "chat":
        return azt.ChatStream(chat_request(**body), NOW, fast=fast)
    return azt.ResponsesStream(responses_request(**body), NOW, fast=fast)


def events_of(kind: str, name: str, size: int = 0) -> list[bytes]:
    """The data of the case's events, read in pieces of `size` bytes (0: all at once)."""
    raw = (CASES / kind / name / "events.sse").read_bytes()
    size = size or len(raw)
    parser = azt.SSEParser()
    return [data for at in range(0, len(raw), size) for data in parser.feed(raw[at : at + size])]


def responses() -> azt.ResponsesStream:
    return azt.ResponsesStream(responses_request(), NOW)


def sent(stream: Any, events: list[bytes]) -> bytes:
    return b"".join(stream.feed(data) for data in events)


def lines_of(kind: str, name: str, file: str) -> list[Any]:
    return [
        json.loads(line) for line in (CASES / kind / name / file).read_text("utf-8").splitlines()
    ]


def answer_of(kind: str, name: str) -> Any:
    return json.loads((CASES / kind / name / "answer.json").read_text("utf-8"))


def chat_values(raw: bytes) -> list[Any]:
    return [
        data.decode() if data == b"[DONE]" else json.loads(data)
        for data in azt.SSEParser().feed(raw)
    ]


def event_values(raw: bytes) -> list[Any]:
    return [json.loads(data) for data in azt.SSEParser().feed(raw)]


def event(kind: str, **fields: Any) -> bytes:
    return azt.encode_json({"type": kind, **fields})


def text_delta(text: str, **fields: Any) -> bytes:
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return event("response.output_text.delta", **{**at, "delta": text, **fields})


def content_of(values: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for chunk in values[:-1] for choice in chunk["choices"]
    )


# ---- The cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 10])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", CHAT)
def test_chat_case_streams_its_chunks(name: str, fast: bool, size: int) -> None:
    raw = sent(stream_of("chat", name, fast), events_of("chat", name, size))
    assert chat_values(raw) == lines_of("chat", name, "chunks.jsonl")


@pytest.mark.parametrize("name", CHAT)
def test_chat_case_folds_to_its_answer(name: str) -> None:
    stream = stream_of("chat", name, True)
    assert [stream.absorb(data) for data in events_of("chat", name)].count(b"") > 0
    answer = azt.error_body(stream.failure) if stream.failure else stream.result()
    assert answer == answer_of("chat", name)


@pytest.mark.parametrize("size", [0, 1, 10])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", RESPONSES)
def test_responses_case_streams_its_events(name: str, fast: bool, size: int) -> None:
    with mock.patch.object(secrets, "token_hex", lambda count: "0" * count):
        raw = sent(stream_of("responses", name, fast), events_of("responses", name, size))
    assert event_values(raw) == lines_of("responses", name, "expected.jsonl")


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_case_folds_to_its_answer(name: str) -> None:
    with mock.patch.object(secrets, "token_hex", lambda count: "0" * count):
        stream = stream_of("responses", name, True)
        assert [stream.absorb(data) for data in events_of("responses", name)].count(b"") > 0
    answer = azt.error_body(stream.failure) if stream.failure else stream.result()
    assert answer == answer_of("responses", name)


@pytest.mark.parametrize("name", [name for name in CHAT if name not in FAILING])
def test_C34_chat_bytes_are_unnamed_one_line_events_that_end_with_done(name: str) -> None:
    raw = sent(stream_of("chat", name, True), events_of("chat", name))
    assert raw.endswith(b"\n\ndata: [DONE]\n\n")
    assert all(
        block.startswith(b"data: ") and b"\n" not in block for block in raw[:-2].split(b"\n\n")
    )
    assert raw.count(b"[DONE]") == 1


@pytest.mark.parametrize("name", FAILING)
def test_failed_chat_streams_have_no_finish_chunk_and_no_done(name: str) -> None:
    stream = stream_of("chat", name, True)
    raw = sent(stream, events_of("chat", name))
    assert stream.done and stream.failure is not None
    assert b"[DONE]" not in raw and b'"finish_reason":"' not in raw


@pytest.mark.parametrize("name", [name for name in RESPONSES])
def test_R04_sequence_numbers_are_dense_and_every_event_is_official(name: str) -> None:
    values = event_values(sent(stream_of("responses", name, True), events_of("responses", name)))
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    assert values[0]["type"] == "response.created" and values[0]["response"]["output"] == []
    assert all(type(OFFICIAL.validate_python(value)).__name__ != "dict" for value in values)


# ---- What the official client library makes of it ------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in CHAT if name not in [*FAILING, "C36_custom_call_nested"]]
)
def test_C04_the_python_helper_accumulates_the_chat_answer(name: str) -> None:
    expected = answer_of("chat", name)["choices"][0]
    state = ChatCompletionStreamState()
    for value in chat_values(sent(stream_of("chat", name, True), events_of("chat", name)))[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate(value))
    choice = state.current_completion_snapshot.choices[0]
    message = choice.message.model_dump()
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]
    assert choice.finish_reason == expected["finish_reason"] and message["role"] == "assistant"
    assert (message["content"] or "") == (expected["message"]["content"] or "")
    assert calls == [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in expected["message"].get("tool_calls", [])
    ]


@pytest.mark.parametrize("name", [name for name in CHAT if name not in FAILING])
def test_whole_chat_answers_are_valid_for_the_python_library(name: str) -> None:
    ChatCompletion.model_validate(answer_of("chat", name), strict=True)


@pytest.mark.parametrize(
    "name", [name for name in RESPONSES if not name.startswith(("R13", "R14"))]
)
def test_R02_the_python_helper_accumulates_the_response(name: str) -> None:
    from openai import omit

    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    raw = sent(stream_of("responses", name, True), events_of("responses", name))
    for value in event_values(raw):
        state.handle_event(OFFICIAL.validate_python(value))
    snapshot = state._completed_response
    expected = Response.model_validate(answer_of("responses", name))
    assert snapshot is not None and snapshot.output_text == expected.output_text
    assert [item.type for item in snapshot.output] == [item.type for item in expected.output]


# ---- Single cases that no folder shows -----------------------------------------------------------


def test_C29_a_failure_before_any_output_has_a_status() -> None:
    stream = stream_of("chat", "C29_failed_first", True)
    sent(stream, events_of("chat", "C29_failed_first"))
    assert stream.failure.status == 502


def test_C31_a_nested_error_event_becomes_429_with_a_bounded_wait() -> None:
    stream = stream_of("chat", "C31_nested_error", True)
    sent(stream, events_of("chat", "C31_nested_error"))
    assert stream.failure.status == 429
    assert stream.failure.headers == {"retry-after": "7200", "x-should-retry": "false"}


def test_S01_a_stop_string_ends_the_upstream_call() -> None:
    stream = azt.ChatStream(chat_request(stop="END"), NOW)
    stream.feed(text_delta("abcEN"))
    assert not stream.stopped
    stream.feed(text_delta("D more"))
    assert stream.stopped and stream.done
    assert stream.feed(text_delta("more")) == b""


def test_a_stop_string_is_not_looked_for_across_a_tool_call() -> None:
    stream = azt.ChatStream(
        chat_request(stop="END", tools=[{"type": "function", "function": {"name": "f"}}]), NOW
    )
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}
    raw = stream.feed(text_delta("abE"))
    raw += stream.feed(event("response.output_item.done", output_index=1, item=call))
    raw += stream.feed(text_delta("ND"))
    raw += stream.feed(event("response.completed", response={}))
    assert content_of(chat_values(raw)) == "abEND"


@pytest.mark.parametrize(
    ("param", "renamed"),
    [
        ("input", "messages"),
        ("text.format.schema", "response_format"),
        ("tools", "tools"),
        (None, None),
    ],
)
def test_chat_failures_name_the_field_of_the_chat_client(
    param: str | None, renamed: str | None
) -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    error = {
        "type": "invalid_request_error",
        "code": "invalid_value",
        "message": "no",
        "param": param,
    }
    stream.feed(event("error", status=400, error=error))
    assert stream.failure is not None and stream.failure.param == renamed


def test_F21_a_cut_chat_stream_ends_with_an_error_event() -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    stream.feed(text_delta("Hel"))
    raw = stream.fail(azt.UpstreamError(502, "upstream_stream_truncated", "cut"))
    [value] = chat_values(raw)
    assert value["error"]["code"] == "upstream_stream_truncated"
    assert stream.done and stream.fail(azt.UpstreamError(502, "again", "again")) == b""


def test_F21_a_cut_responses_stream_ends_with_response_failed() -> None:
    stream = azt.ResponsesStream(responses_request(), NOW)
    stream.feed(text_delta("Hel"))
    [value] = event_values(stream.fail(azt.UpstreamError(502, "upstream_stream_truncated", "cut")))
    assert value["type"] == "response.failed"
    assert value["response"]["error"] == {"code": "upstream_stream_truncated", "message": "cut"}
    assert value["response"]["output"][0]["content"][0]["text"] == "Hel"
    assert value["response"]["output"][0]["status"] == "incomplete"


def test_responses_cut_before_anything_still_begin_with_created() -> None:
    stream = azt.ResponsesStream(responses_request(), NOW)
    values = event_values(stream.fail(azt.UpstreamError(504, "upstream_timeout", "late")))
    assert [value["type"] for value in values] == ["response.created", "response.failed"]
    assert values[0]["response"]["id"] == values[1]["response"]["id"]


def test_R20_the_store_gets_the_encrypted_reasoning_that_the_client_does_not_see() -> None:
    stream = stream_of("responses", "R20_encrypted_hidden", True)
    sent(stream, events_of("responses", "R20_encrypted_hidden"))
    assert "encrypted_content" not in stream.response["output"][0]
    assert stream.output_items[0]["encrypted_content"] == "gAAAA-final"


def test_R05_ids_that_upstream_leaves_out_are_made_up_and_kept() -> None:
    stream = azt.ResponsesStream(responses_request(), NOW)
    raw = stream.feed(event("response.output_text.delta", delta="Hi"))
    raw += stream.feed(event("response.completed", response={"output": []}))
    values = event_values(raw)
    ids = {value["item_id"] for value in values if "item_id" in value}
    assert ids == {values[-1]["response"]["output"][0]["id"]}
    assert ids.pop().startswith("msg_") and values[-1]["response"]["id"].startswith("resp_")


def test_items_of_the_terminal_output_without_ids_are_those_already_seen() -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    raw = stream.feed(text_delta("Hi", output_index=1))
    message = {"type": "message", "content": [{"type": "output_text", "text": "Hi there"}]}
    raw += stream.feed(event("response.completed", response={"output": [message]}))
    assert content_of(chat_values(raw)) == "Hi there"


def test_two_items_with_one_output_index_are_told_apart_by_their_id() -> None:
    stream = azt.ChatStream(
        chat_request(tools=[{"type": "function", "function": {"name": "f"}}]), NOW
    )
    for number in "12":
        call = {"type": "function_call", "id": f"fc_{number}", "call_id": f"c{number}", "name": "f"}
        stream.absorb(event("response.output_item.added", output_index=0, item=call))
    for number in "21":
        delta = {"item_id": f"fc_{number}", "output_index": 0, "delta": f'{{"n":{number}}}'}
        stream.absorb(event("response.function_call_arguments.delta", **delta))
    stream.absorb(event("response.completed", response={}))
    calls = stream.result()["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"n":1}', '{"n":2}']


def test_a_snapshot_that_differs_from_the_deltas_adds_nothing() -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    stream.absorb(text_delta("Hello"))
    stream.absorb(
        event("response.output_text.done", item_id="msg_1", output_index=0, text="Jello, world")
    )
    stream.absorb(event("response.completed", response={}))
    assert stream.result()["choices"][0]["message"]["content"] == "Hello"


def test_known_service_tiers_are_echoed_and_unknown_ones_are_not() -> None:
    tiers = {}
    for tier in ("priority", "warp"):
        stream = azt.ChatStream(chat_request(), NOW)
        stream.absorb(event("response.completed", response={"service_tier": tier}))
        tiers[tier] = stream.result().get("service_tier")
    assert tiers == {"priority": "priority", "warp": None}


def test_metadata_is_echoed_in_a_whole_chat_answer() -> None:
    stream = azt.ChatStream(chat_request(metadata={"a": "b"}), NOW)
    stream.absorb(event("response.completed", response={}))
    assert stream.result()["metadata"] == {"a": "b"}


def test_a_deeply_nested_annotation_does_not_break_the_stream() -> None:
    nested = b"[" * 900 + b"]" * 900
    data = (
        b'{"type":"response.output_text.annotation.added","annotation":{"type":"x","y":'
        + nested
        + b"}}"
    )
    for stream in (
        azt.ChatStream(chat_request(), NOW),
        azt.ResponsesStream(responses_request(), NOW),
    ):
        raw = stream.feed(data) + stream.feed(text_delta("Hi"))
        assert b'"Hi"' in raw


def test_a_failure_event_with_an_error_of_any_shape_ends_the_stream() -> None:
    for error in (None, "x", [], {"code": [], "message": {}}):
        stream = azt.ResponsesStream(responses_request(), NOW)
        raw = stream.feed(event("response.failed", response={"error": error}))
        assert stream.done and event_values(raw)[-1]["type"] == "response.failed"


def test_times_that_are_no_times_are_replaced() -> None:
    for created_at in (10**400, 1e300, -1, "now"):
        data = event("response.created", response={"id": "resp_1", "created_at": created_at})
        [created] = event_values(azt.ResponsesStream(responses_request(), NOW).feed(data))
        assert created["response"]["created_at"] == int(NOW)


def test_text_after_an_empty_item_done_still_comes() -> None:
    empty = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
    whole = {**empty, "content": [{"type": "output_text", "text": "Hi"}]}
    events = [
        event("response.output_item.done", output_index=0, item=empty),
        event("response.completed", response={"output": [whole]}),
    ]
    chat = azt.ChatStream(chat_request(), NOW)
    assert content_of(chat_values(sent(chat, events))) == "Hi"
    stream = responses()
    kinds = [value["type"] for value in event_values(sent(stream, events))]
    assert kinds.index("response.output_text.delta") < kinds.index("response.output_item.done")
    assert stream.response["output"][0]["content"][0]["text"] == "Hi"


def test_arguments_announced_with_the_item_are_not_taken_for_all_of_them() -> None:
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f"}
    stream = responses()
    sent(
        stream,
        [
            event("response.output_item.added", output_index=0, item={**call, "arguments": "{"}),
            event("response.function_call_arguments.delta", item_id="fc_1", delta='{"a":'),
        ],
    )
    stream.fail(azt.UpstreamError(502, "upstream_stream_truncated", "cut"))
    assert stream.response["output"][0]["arguments"] == '{"a":'


def test_lists_that_upstream_sends_as_null_are_lists_for_the_client() -> None:
    part = {"type": "output_text", "text": "Hi", "annotations": None, "logprobs": None}
    item = {"type": "message", "id": "msg_1", "role": None, "content": [part]}
    stream = responses()
    raw = sent(
        stream,
        [
            event("response.content_part.done", item_id="msg_1", content_index=0, part=part),
            event("response.output_item.done", output_index=0, item=item),
            event("response.completed", response={}),
        ],
    )
    [done] = [
        value["part"]
        for value in event_values(raw)
        if value["type"] == "response.content_part.done"
    ]
    [message] = stream.response["output"]
    assert done["annotations"] == done["logprobs"] == []
    assert message["content"] == [done] and message["role"] == "assistant"


def test_C15_empty_arguments_are_an_empty_object_for_responses_too() -> None:
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": ""}
    stream = responses()
    sent(stream, [event("response.output_item.done", output_index=0, item=call)])
    sent(stream, [event("response.completed", response={})])
    assert stream.response["output"][0]["arguments"] == "{}"


def test_nothing_is_sent_after_a_stop_string_that_a_call_completes() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    stream = azt.ChatStream(chat_request(stop=["EN", "DENT"], tools=[tool]), NOW)
    arguments = event("response.function_call_arguments.delta", item_id="fc_1", delta="{")
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": ""}
    raw = sent(stream, [arguments, text_delta("DEN")])
    raw += stream.feed(event("response.output_item.added", item=call))
    assert content_of(chat_values(raw)) == "D" and stream.stopped
    assert stream.feed(arguments) == b""


@pytest.mark.parametrize("text", ["word", "\n\n", '"', "\\n", "Wörld", "日本", " ", "\t🌍"])
def test_deltas_after_the_first_are_pasted_without_being_decoded(text: str) -> None:
    for stream in (azt.ChatStream(chat_request(), NOW), responses()):
        stream.feed(text_delta("a", obfuscation="xyz", sequence_number=1))
        decoded = stream._out
        raw = stream.feed(text_delta(text, obfuscation="", sequence_number=2))
        assert azt.encode_json(text) in raw and stream._out is decoded


@pytest.mark.parametrize("text", ["word", "\\n", "Wörld", "\t🌍"])
def test_a_whole_answer_has_the_deltas_that_were_not_decoded(text: str) -> None:
    for stream in (azt.ChatStream(chat_request(), NOW), responses()):
        stream.absorb(text_delta("a", sequence_number=1))
        decoded = stream._out
        for number in (2, 3):
            assert stream.absorb(text_delta(text, sequence_number=number)) == b""
        assert stream._out is decoded
        stream.absorb(event("response.completed", response={}))
        assert azt.encode_json("a" + text + text) in azt.encode_json(stream.result())


def test_a_chat_image_is_not_copied_more_than_three_times() -> None:
    size = 4_000_000
    item = {"type": "image_generation_call", "id": "ig_1", "result": "A" * size}
    events = [
        event("response.output_item.done", output_index=0, item=item),
        event("response.completed", response={"output": [item]}),
    ]
    del item
    stream = azt.ChatStream(chat_request(), NOW)
    tracemalloc.start()
    try:
        assert len(sent(stream, events)) > size
        assert tracemalloc.get_traced_memory()[1] < 3.2 * size
    finally:
        tracemalloc.stop()


# ---- Properties ----------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "a",
            "é",
            "\u2028",
            '"',
            "\\",
            "/",
            "\n\t",
            "\0",
            "\x7f",
            "END",
            "🌍",
            "\ud83d",
            "\ude00",
        ]
    ),
)
INDEXES = st.sampled_from([0, 0, 0, 1, 2, -1, True, None, "0", 1.5, [], 10**9])
IDS = st.sampled_from(["msg_1", "msg_1", "msg_2", "fc_1", "", "é\ud800", None, 7, {}])
PART_TYPES: list[Any] = [
    "output_text",
    "refusal",
    "summary_text",
    "reasoning_text",
    "arguments",
    "odd",
    3,
    [],
    None,
]
KINDS = sorted(
    {*azt.ChatStream._handlers, *azt.ResponsesStream._handlers, "codex.rate_limits", "", "odd"}
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(PART_TYPES)},
    optional={
        "text": TEXTS,
        "refusal": TEXTS,
        "annotations": st.sampled_from(
            [None, [], [{"type": "url_citation", "start_index": "x"}], [1]]
        ),
    },
)
ITEMS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            [*azt._BLANK_ITEMS, *azt._BLANK_ITEMS, "image_generation_call", "odd", [], None]
        )
    },
    optional={
        "id": IDS,
        "call_id": IDS,
        "name": st.sampled_from(["f", "g", "", None, 4, {}]),
        "arguments": TEXTS,
        "input": TEXTS,
        "result": TEXTS,
        "status": st.sampled_from(["completed", "incomplete", "in_progress", None]),
        "phase": st.sampled_from(["commentary", "final_answer", None]),
        "content": st.one_of(st.lists(PARTS, max_size=2), st.sampled_from([None, "text", [1]])),
        "summary": st.one_of(st.lists(PARTS, max_size=2), st.none()),
        "encrypted_content": TEXTS,
    },
)
RESPONSE = st.fixed_dictionaries(
    {},
    optional={
        "id": IDS,
        "created_at": st.sampled_from([1.9, 5, None, "now", 1e999, 10**400]),
        "output": st.one_of(st.lists(ITEMS, max_size=3), st.sampled_from([None, {}])),
        "usage": st.sampled_from([None, {}, {"input_tokens": -4, "output_tokens": "x"}, 3]),
        "incomplete_details": st.sampled_from([None, {"reason": "max_output_tokens"}, "x"]),
        "error": st.sampled_from([None, {"code": "server_error", "message": "m"}, "x"]),
    },
)
EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "item_id": IDS,
        "output_index": INDEXES,
        "call_id": IDS,
        "content_index": INDEXES,
        "summary_index": INDEXES,
        "sequence_number": INDEXES,
        "delta": st.one_of(TEXTS, st.sampled_from([None, 5, {}])),
        "text": TEXTS,
        "arguments": TEXTS,
        "item": st.one_of(ITEMS, st.sampled_from([None, []])),
        "part": st.one_of(PARTS, st.none()),
        "response": st.one_of(RESPONSE, st.none()),
        "annotation": st.sampled_from([None, {}, {"type": "url_citation", "end_index": 3}]),
    },
)
WITHOUT_ITEM = ("response.compaction.",)
DELTA_KINDS = [f"response.{known.event}.delta" for known in azt._CHANNELS.values()]


@st.composite
def raw_events(draw: Any) -> bytes:
    """One event as bytes: mostly deltas as the backend writes them, else anything."""
    if draw(st.integers(0, 3)):
        fields = {
            "type": draw(st.sampled_from(["response.output_text.delta", *DELTA_KINDS])),
            "item_id": draw(st.sampled_from(["msg_1", "msg_1", "msg_1", "fc_1", "m\\é"])),
            "output_index": draw(st.sampled_from([0, 0, 0, 1])),
            "content_index": 0,
            "delta": draw(TEXTS),
            "logprobs": draw(st.sampled_from([[], [], [], [{}]])),
            "obfuscation": draw(st.sampled_from(["", "aB3", "\u2028"])),
            "sequence_number": draw(st.integers(0, 99)),
        }
        left_out = draw(
            st.sets(st.sampled_from(["logprobs", "obfuscation", "content_index"]), max_size=2)
        )
        names = [name for name in fields if name not in left_out]
        if draw(st.integers(0, 4)) == 0:
            names = draw(st.permutations(names))
        value = {name: fields[name] for name in names}
    else:
        value = {"type": draw(st.sampled_from(KINDS)), **draw(EVENTS)}
    spaced, escaped = draw(st.sampled_from([(False, False)] * 4 + [(True, False), (False, True)]))
    separators = (", ", ": ") if spaced else (",", ":")
    text = json.dumps(value, ensure_ascii=escaped, separators=separators)
    raw = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 15)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = (
            raw[:at]
            + draw(st.sampled_from([b"\xff", b'"', b"}", b"\\", b",", b" ", b'"delta":"x",']))
            + raw[at:]
        )
    return raw


REQUESTS = st.sampled_from(
    [
        {},
        {"stop": "END"},
        {"response_format": {"type": "json_object"}},
        {"include_reasoning": False},
        {"functions": [{"name": "f"}]},
        {"model": "m\ud800"},
        {"model": 'a"\\u0000é'},
        {
            "tools": [{"type": "custom", "custom": {"name": "f"}}],
            "stream_options": {"include_usage": True},
        },
    ]
)
OPTIONS = {"max_examples": 100, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def pieces_of(raw: bytes, chance: random.Random) -> Iterator[list[bytes]]:
    """Bytes one by one, ten at a time, cut inside of each wide character, then at random."""
    for size in (1, 10):
        yield [raw[at : at + size] for at in range(0, len(raw), size)]
    wide = [at for at in range(len(raw)) if 0x80 <= raw[at] < 0xC0]
    yield [raw[start:end] for start, end in itertools.pairwise([0, *wide, len(raw)])]
    while True:
        cuts = sorted(chance.choices(range(len(raw)), k=chance.choice((1, 2, 5, 30, 300))))
        yield [raw[start:end] for start, end in itertools.pairwise([0, *cuts, len(raw)])]


def test_an_answer_does_not_depend_on_where_the_upstream_bytes_are_split(
    claim: Callable[[int, str], Claim], many: Callable[[int, int], int]
) -> None:
    tries = claim(13, "recorded streams in 1 byte, 10 bytes, inside UTF-8, at random: equal output")
    cases = [("chat", name) for name in CHAT] + [("responses", name) for name in RESPONSES]
    each = -(-many(600, 100_000) // (3 * len(cases)))
    with mock.patch.object(secrets, "token_hex", lambda count: "0" * count):
        for case, newline in itertools.product(cases, (b"\n", b"\r\n", b"\r")):
            raw = (CASES / case[0] / case[1] / "events.sse").read_bytes()
            whole = sent(stream_of(*case, True), events_of(*case))
            splits = pieces_of(raw.replace(b"\n", newline), random.Random(str(case)))
            for pieces in itertools.islice(splits, each):
                parser = azt.SSEParser()
                split = [data for piece in pieces for data in parser.feed(piece)]
                got = sent(stream_of(*case, True), split)
                tries.check(got == whole, (case, newline, pieces[:5]))


@settings(**OPTIONS)
@given(st.lists(raw_events(), max_size=12), REQUESTS)
def test_fast_and_slow_chat_streams_send_the_same_bytes(events: list[bytes], fields: Any) -> None:
    with mock.patch.object(secrets, "token_hex", lambda count: "0" * count):
        fast, slow = (
            azt.ChatStream(chat_request(**fields), NOW, fast=fast) for fast in (True, False)
        )
        assert [fast.feed(data) for data in events] == [slow.feed(data) for data in events]
        assert fast.fail(azt.AztError(502, "x", "x")) == slow.fail(azt.AztError(502, "x", "x"))


@settings(**OPTIONS)
@given(st.lists(raw_events(), max_size=12), st.booleans())
def test_fast_and_slow_responses_streams_send_the_same_bytes(
    events: list[bytes], stored: bool
) -> None:
    with mock.patch.object(secrets, "token_hex", lambda count: "0" * count):
        fast, slow = (
            azt.ResponsesStream(responses_request(store=stored), NOW, fast=fast)
            for fast in (True, False)
        )
        assert [fast.feed(data) for data in events] == [slow.feed(data) for data in events]
        assert fast.fail(azt.AztError(502, "x", "x")) == slow.fail(azt.AztError(502, "x", "x"))
        assert fast.output_items == slow.output_items


@settings(**OPTIONS)
@given(st.lists(raw_events(), max_size=20))
@example([b'{"type":"response.incomplete","response":{"output":[{"type":[]}]}}'])
@example([b'{"type":"response.output_item.added","item":{"type":{},"id":"msg_1"}}'])
def test_any_events_leave_dense_sequence_numbers_and_items_announced_before_use(
    events: list[bytes],
) -> None:
    stream = azt.ResponsesStream(responses_request(), NOW)
    values = event_values(sent(stream, events) + stream.fail(azt.AztError(502, "x", "x")))
    added = [
        value["output_index"] for value in values if value["type"] == "response.output_item.added"
    ]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    assert added == list(range(len(added)))
    about_items = [value for value in values if not value["type"].startswith(WITHOUT_ITEM)]
    assert {value["output_index"] for value in about_items if "output_index" in value} <= set(added)
    assert values[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")


@settings(**OPTIONS)
@given(st.lists(raw_events(), max_size=20))
def test_any_events_leave_one_role_dense_calls_and_at_most_one_finish(events: list[bytes]) -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    values = [value for value in chat_values(sent(stream, events)) if "choices" in value]
    deltas = [choice["delta"] for value in values for choice in value["choices"]]
    starts = [
        call["index"] for delta in deltas for call in delta.get("tool_calls", []) if "id" in call
    ]
    finishes = [
        choice["finish_reason"]
        for value in values
        for choice in value["choices"]
        if choice["finish_reason"]
    ]
    assert sum("role" in delta for delta in deltas) == (1 if deltas else 0)
    assert starts == list(range(len(starts)))
    assert len(finishes) == (1 if stream.done and stream.failure is None else 0)


@settings(**OPTIONS)
@given(
    st.lists(
        TEXTS.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)), max_size=10
    )
)
def test_C01_the_deltas_together_are_the_text(texts: list[str]) -> None:
    stream = azt.ChatStream(chat_request(), NOW)
    raw = sent(stream, [*map(text_delta, texts), event("response.completed", response={})])
    assert content_of(chat_values(raw)) == "".join(texts)


@settings(**OPTIONS)
@given(
    st.text("abE", max_size=30),
    st.lists(st.text("abE", min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(
    text: str, stops: list[str], data: Any
) -> None:
    matcher = azt.StopMatcher(stops)
    out, at = "", 0
    while at < len(text) and not matcher.hit:
        size = data.draw(st.integers(1, 5))
        out += matcher.push(text[at : at + size])
        at += size
    out += matcher.flush()
    starts = [text.index(stop) for stop in stops if stop in text]
    assert out == text[: min(starts, default=len(text))]
