"""Acceptance cases R01-R20: the Responses API in front of the scripted backend."""

from __future__ import annotations

from typing import Any

import openai
import pydantic
import pytest
from fake_upstream import (
    FakeUpstream,
    Json,
    Reply,
    answer,
    call,
    custom_call,
    failed,
    incomplete,
    message,
    reasoning,
    text,
    usage,
    web_search,
    without,
)
from harness import MODEL, Answer, Client

PIECES = pytest.mark.parametrize("pieces", [0, 1, 10])
OFFICIAL = (
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.output_item.",
    "response.content_part.",
    "response.output_text.",
    "response.function_call_arguments.",
    "response.custom_tool_call_input.",
    "response.reasoning_summary_part.",
    "response.reasoning_summary_text.",
    "response.web_search_call.",
)


def weather(name: str = "get_weather") -> Json:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "name": name, "parameters": schema, "strict": False}


def said(upstream: FakeUpstream) -> list[tuple[str, str]]:
    """Role and text of the messages that reached the backend."""
    return [
        (item["role"], "".join(part["text"] for part in item["content"]))
        for item in upstream.sent["input"]
        if item["type"] == "message"
    ]


def follow_up(client: Client, first: Answer, input: Any, **fields: Any) -> Answer:
    return client.responses(input, previous_response_id=first.response["id"], **fields)


def test_r01_a_string_becomes_a_list_and_the_library_reads_the_text(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=usage(50, 20, cached=30, reasoning_tokens=8)))

    response = openai_client.responses.create(model=MODEL, input="hi")

    assert response.output_text == "Hello"
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 30
    assert response.usage.output_tokens_details.reasoning_tokens == 8
    assert upstream.sent["input"] == [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    ]
    assert (upstream.sent["stream"], upstream.sent["store"]) == (True, False)


def test_r01_the_response_object_has_all_its_fields(client: Client) -> None:
    response = client.responses().json

    assert set(response) >= {
        "id",
        "object",
        "created_at",
        "completed_at",
        "status",
        "background",
        "error",
        "incomplete_details",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "model",
        "output",
        "parallel_tool_calls",
        "previous_response_id",
        "prompt_cache_key",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "store",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "truncation",
        "usage",
        "user",
        "metadata",
    }
    assert response["object"] == "response"
    assert response["store"] is True
    assert response["model"] == MODEL
    assert response["id"].startswith("resp_")


def test_r02_the_python_stream_helper_gets_the_text_although_the_output_is_empty(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), call("f", '{"a":', "1}")))

    with openai_client.responses.stream(model=MODEL, input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()

    assert deltas == ["Hel", "lo"]
    assert final.output_text == "Hello"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[2].arguments == '{"a":1}'


@PIECES
def test_r04_vendor_events_are_filtered_and_the_numbers_stay_dense(
    client: Client, upstream: FakeUpstream, pieces: int
) -> None:
    stream = answer(
        reasoning("Plan"), web_search("x"), message("Hel", "lo"), call("f", "{}"), custom_call("p")
    )
    upstream.script(stream, pieces=pieces, newline="\r\n", done=True)

    reply = client.responses_stream()

    assert reply.types == [event["type"] for event in stream]
    assert all(kind.startswith(OFFICIAL) for kind in reply.types)
    numbers = [event["sequence_number"] for event in reply.events]
    assert numbers == list(range(len(numbers)))
    assert reply.output_text == "Hello"
    assert b"[DONE]" not in reply.body
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_r04_the_final_output_repeats_the_finished_items(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(message("Hello"), call("f", "{}")))

    reply = client.responses_stream()

    finished = [
        event["item"] for event in reply.events if event["type"] == "response.output_item.done"
    ]
    assert reply.response["output"] == finished
    assert len(finished) == 2


GAPS = {
    "no response.created": ("response.created",),
    "no lifecycle events": ("response.created", "response.in_progress"),
    "no content_part.added": ("content_part.added",),
    "no output_item.added": ("output_item.added", "content_part.added"),
    "no output_item.done": ("output_item.done",),
    "deltas only": (".created", ".in_progress", ".added", ".done"),
}


@pytest.mark.parametrize("dropped", GAPS.values(), ids=GAPS.keys())
def test_r05_missing_events_are_made_up_for(
    openai_client: openai.OpenAI, client: Client, upstream: FakeUpstream, dropped: tuple[str, ...]
) -> None:
    upstream.script(without(text("Hel", "lo"), *dropped), times=2)

    reply = client.responses_stream()
    with openai_client.responses.stream(model=MODEL, input="hi") as stream:
        final = stream.get_final_response()

    assert reply.types[0] == "response.created"
    assert reply.events[0]["response"]["output"] == []
    wanted = [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [kind for kind in reply.types if kind in wanted] == wanted
    numbers = [event["sequence_number"] for event in reply.events]
    assert numbers == list(range(len(numbers)))
    assert reply.output_text == "Hello"
    assert final.output_text == "Hello"


def test_r05_missing_reasoning_and_call_events_are_made_up_for(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    stream = answer(reasoning(["Pl", "an"]), call("f", '{"a":', "1}"))
    upstream.script(without(stream, "summary_part.added", "arguments.done"))

    with openai_client.responses.stream(model=MODEL, input="hi") as helper:
        final = helper.get_final_response()

    thought, made = final.output
    assert thought.summary[0].text == "Plan"
    assert made.arguments == '{"a":1}'


def test_r06_absent_instructions_are_empty_upstream_and_null_in_the_echo(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = client.responses(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    )

    assert reply.status == 200
    assert upstream.sent["instructions"] == ""
    assert said(upstream) == [("developer", "Be brief."), ("user", "hi")]
    assert reply.json["instructions"] is None


def test_r06_instructions_are_sent_and_echoed(client: Client, upstream: FakeUpstream) -> None:
    reply = client.responses(instructions="Be brief.")

    assert upstream.sent["instructions"] == "Be brief."
    assert reply.json["instructions"] == "Be brief."


def test_r06_text_parts_are_named_after_their_role(client: Client, upstream: FakeUpstream) -> None:
    swapped = [
        {"role": "user", "content": [{"type": "output_text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "input_text", "text": "hello"}]},
        {"role": "assistant", "content": "again"},
        {"role": "user", "content": [{"type": "text", "text": "go on"}]},
    ]

    assert client.responses(swapped).status == 200
    assert said(upstream) == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("assistant", "again"),
        ("user", "go on"),
    ]


def test_r08_fields_without_effect_are_echoed_and_not_forwarded(
    client: Client, upstream: FakeUpstream
) -> None:
    fields = {
        "temperature": 0.2,
        "top_p": 0.9,
        "truncation": "auto",
        "metadata": {"a": "b"},
        "max_output_tokens": 100,
        "user": "someone",
    }

    reply = client.responses(**fields)

    assert reply.status == 200
    assert not set(fields) & set(upstream.sent)
    assert {name: reply.json[name] for name in fields} == fields


def test_r09_a_previous_response_is_expanded(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(reasoning(encrypted="gAAAA-1"), message("Hello.")))
    first = client.responses("hi", instructions="Old.")

    second = follow_up(client, first, "and?")

    assert second.status == 200
    assert said(upstream) == [("user", "hi"), ("assistant", "Hello."), ("user", "and?")]
    assert [item["type"] for item in upstream.sent["input"]] == [
        "message",
        "reasoning",
        "message",
        "message",
    ]
    assert upstream.sent["input"][1]["encrypted_content"] == "gAAAA-1"
    assert upstream.sent["instructions"] == ""
    assert "previous_response_id" not in upstream.sent
    assert second.json["previous_response_id"] == first.json["id"]


def test_r09_a_chain_of_responses_keeps_everything(client: Client, upstream: FakeUpstream) -> None:
    first = client.responses_stream("one")
    second = follow_up(client, first, "two")

    follow_up(client, second, "three")

    texts = [spoken for role, spoken in said(upstream) if role == "user"]
    assert texts == ["one", "two", "three"]


def test_r09_an_unknown_previous_response_is_refused(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = client.responses("hi", previous_response_id="resp_unknown")

    assert reply.status == 400
    assert reply.error["code"] == "previous_response_not_found"
    assert reply.error["param"] == "previous_response_id"
    assert upstream.turns == []


def test_r09_a_response_that_was_not_to_be_stored_is_unknown(client: Client) -> None:
    first = client.responses("hi", store=False)

    assert first.json["store"] is False
    assert follow_up(client, first, "and?").status == 400


def test_r10_an_output_alone_finds_its_stored_call(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(answer(call("get_weather", "{}", call_id="call_1")))
    first = client.responses("hi", tools=[weather()])
    output = {"type": "function_call_output", "call_id": "call_1", "output": "warm"}

    second = follow_up(client, first, [output], tools=[weather()])

    assert second.status == 200
    made, given = upstream.sent["input"][1:]
    assert (made["type"], made["call_id"], made["name"]) == (
        "function_call",
        "call_1",
        "get_weather",
    )
    assert (given["type"], given["call_id"], given["output"]) == (
        "function_call_output",
        "call_1",
        "warm",
    )


def test_r11_a_reference_is_replaced_by_the_stored_item(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hello."))
    item_id = client.responses("hi").json["output"][0]["id"]

    reply = client.responses(
        [
            {"role": "user", "content": "hi"},
            {"type": "item_reference", "id": item_id},
            {"role": "user", "content": "and?"},
        ]
    )

    assert reply.status == 200
    assert said(upstream) == [("user", "hi"), ("assistant", "Hello."), ("user", "and?")]


def test_r11_an_unknown_reference_is_named(client: Client, upstream: FakeUpstream) -> None:
    reply = client.responses(
        [{"type": "item_reference", "id": "msg_unknown"}, {"role": "user", "content": "hi"}]
    )

    assert reply.status in (400, 404)
    assert "msg_unknown" in reply.error["message"]
    assert upstream.turns == []


def test_r12_background_is_refused(client: Client, upstream: FakeUpstream) -> None:
    reply = client.responses(background=True)

    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == ("background", "unsupported_parameter")
    assert upstream.turns == []


def test_r13_a_failure_after_output_is_a_failed_event(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    reply = client.responses_stream()

    last = reply.events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"] == "It went wrong."
    assert isinstance(last["response"]["error"]["code"], str)
    assert last["response"]["id"] == reply.events[0]["response"]["id"]
    numbers = [event["sequence_number"] for event in reply.events]
    assert numbers == list(range(len(numbers)))
    assert "response.completed" not in reply.types


def test_r13_a_cut_stream_is_a_failed_event(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo"), cut=True, after=5)

    reply = client.responses_stream()

    assert reply.types[-1] == "response.failed"
    assert reply.response["error"]["code"] == "upstream_stream_truncated"
    assert not reply.cut


def test_r13_a_failure_before_output_is_an_http_error(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(failed("invalid_prompt", "Not this."))

    reply = client.responses_stream()

    assert (reply.status, reply.error["code"]) == (400, "content_policy_violation")


def test_r13_a_failure_fails_a_whole_answer(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    reply = client.responses()

    assert (reply.status, reply.error["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("reason", ["max_output_tokens", "content_filter"])
def test_r14_an_incomplete_response_keeps_its_reason(
    client: Client, upstream: FakeUpstream, reason: str
) -> None:
    upstream.script(incomplete(message("cut"), reason=reason), times=2)

    streamed, whole = client.responses_stream(), client.responses()

    assert streamed.types[-1] == "response.incomplete"
    for reply in (streamed, whole):
        assert reply.status == 200
        assert reply.response["status"] == "incomplete"
        assert reply.response["incomplete_details"] == {"reason": reason}
        assert reply.output_text == "cut"


class Colours(pydantic.BaseModel):
    names: list[str]


def test_r15_the_python_parse_helper_returns_the_object(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(
        answer(message("Let me think.", phase="commentary"), message('{"names":', '["red"]}'))
    )

    response = openai_client.responses.parse(model=MODEL, input="colours", text_format=Colours)

    assert response.output_parsed == Colours(names=["red"])
    assert upstream.sent["text"]["format"]["type"] == "json_schema"
    assert upstream.sent["text"]["format"]["strict"] is True


def test_r16_a_stored_response_can_be_read_and_deleted(client: Client) -> None:
    stored = client.responses("hi").json
    path = f"/v1/responses/{stored['id']}"

    assert client.get(path).json == stored
    assert client.request("DELETE", path).json == {
        "id": stored["id"],
        "object": "response",
        "deleted": True,
    }
    assert client.get(path).status == 404
    assert client.request("DELETE", path).status == 404


def test_r16_the_input_items_of_a_stored_response_are_listed(client: Client) -> None:
    asked = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    stored = client.responses(asked).json
    path = f"/v1/responses/{stored['id']}/input_items"

    newest_first = client.get(path).json
    page = client.get(f"{path}?order=asc&limit=1").json

    assert newest_first["object"] == "list"
    texts = [item["content"][0]["text"] for item in newest_first["data"]]
    assert texts == ["two", "one"]
    assert newest_first["first_id"] == newest_first["data"][0]["id"]
    assert newest_first["last_id"] == newest_first["data"][-1]["id"]
    assert newest_first["has_more"] is False
    assert [item["content"][0]["text"] for item in page["data"]] == ["one"]
    assert page["has_more"] is True
    rest = client.get(f"{path}?order=asc&after={page['last_id']}").json
    assert [item["content"][0]["text"] for item in rest["data"]] == ["two"]


def test_r16_the_library_reads_lists_and_deletes(openai_client: openai.OpenAI) -> None:
    stored = openai_client.responses.create(model=MODEL, input="hi")

    assert openai_client.responses.retrieve(stored.id).output_text == "You said: hi"
    assert len(list(openai_client.responses.input_items.list(stored.id))) == 1
    openai_client.responses.delete(stored.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(stored.id)


@pytest.mark.parametrize("path", ["/v1/responses/resp_no", "/v1/responses/resp_no/input_items"])
def test_r16_an_unknown_response_is_not_found(client: Client, path: str) -> None:
    reply = client.get(path)

    assert reply.status == 404
    assert set(reply.error) >= {"message", "type", "param", "code"}


def test_r17_input_tokens_are_estimated_without_a_call(
    client: Client, upstream: FakeUpstream
) -> None:
    body = {"model": MODEL, "input": "hello there " * 100, "tools": [weather()]}

    reply = client.post("/v1/responses/input_tokens", body)

    assert reply.status == 200
    assert reply.json["object"] == "response.input_tokens"
    assert 100 < reply.json["input_tokens"] < 1000
    assert upstream.turns == []


def test_r18_the_preview_search_tool_and_choice_get_their_new_name(
    client: Client, upstream: FakeUpstream
) -> None:
    preview = {"type": "web_search_preview", "search_context_size": "low"}

    reply = client.responses(tools=[preview], tool_choice={"type": "web_search_preview"})

    assert reply.status == 200
    assert upstream.sent["tools"] == [{"type": "web_search", "search_context_size": "low"}]
    assert upstream.sent["tool_choice"] == {"type": "web_search"}


def test_r19_a_long_tool_name_is_original_in_items_and_tools(
    client: Client, upstream: FakeUpstream
) -> None:
    name = "n" * 80
    upstream.default = lambda seen: Reply(answer(call(seen.body["tools"][0]["name"], "{}")))

    streamed = client.responses_stream(tools=[weather(name)])
    whole = client.responses(tools=[weather(name)])

    assert len(upstream.sent["tools"][0]["name"]) <= 64
    for reply in (streamed, whole):
        assert reply.response["output"][0]["name"] == name
        assert reply.response["tools"][0]["name"] == name
    named = [event["item"]["name"] for event in streamed.events if "item" in event]
    assert named == [name, name]


def test_r19_a_long_tool_name_in_history_is_shortened_alike(
    client: Client, upstream: FakeUpstream
) -> None:
    name = "n" * 80
    history = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": name, "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "ok"},
    ]

    assert client.responses(history, tools=[weather(name)]).status == 200
    assert upstream.sent["input"][1]["name"] == upstream.sent["tools"][0]["name"]


def test_r20_encrypted_reasoning_is_hidden_unless_asked_for(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hi")), times=3)

    streamed, whole = client.responses_stream(), client.responses()
    shown = client.responses_stream(include=["reasoning.encrypted_content"])

    assert upstream.turns[0].body["include"] == ["reasoning.encrypted_content"]
    assert b"gAAAA" not in streamed.body
    assert b"gAAAA" not in whole.body
    assert shown.response["output"][0]["encrypted_content"] == "gAAAA-final"
