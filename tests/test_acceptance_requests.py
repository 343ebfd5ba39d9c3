"""Acceptance cases Q01-Q46: what reaches the backend for a chat request, and what is refused.

The scripted backend refuses what the real one would, so a 200 here also says that the whole
upstream body is acceptable, not only the fields that a test looks at.
"""

from __future__ import annotations

import json

import pytest
from fake_upstream import FakeUpstream, Json, Reply, answer, call, custom_call
from harness import MODEL, Client, chat_body

PNG = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0xLjQ="
GRAMMAR = {"syntax": "lark", "definition": 'start: "x"'}


def user(content: object) -> Json:
    return {"role": "user", "content": content}


def function(name: str = "get_weather", **more: object) -> Json:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def asked(*calls: tuple[str, str, str], content: str | None = None) -> Json:
    """An assistant message with tool calls (id, name, arguments)."""
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(call_id: str, content: object) -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def kinds(upstream: FakeUpstream) -> list[str]:
    return [item["type"] for item in upstream.sent["input"]]


def every_key(value: object) -> set[str]:
    """All member names anywhere inside."""
    if isinstance(value, dict):
        return set(value).union(*(every_key(member) for member in value.values()))
    return set().union(*(every_key(item) for item in value)) if isinstance(value, list) else set()


def test_q01_system_text_becomes_instructions(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat([{"role": "system", "content": "Be brief."}, user("hi")])

    assert reply.status == 200
    assert upstream.sent["instructions"] == "Be brief."
    assert upstream.sent["input"] == [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    ]
    assert (upstream.sent["store"], upstream.sent["stream"]) == (False, True)


def test_q02_leading_systems_are_joined_and_a_later_one_stays_in_place(
    client: Client, upstream: FakeUpstream
) -> None:
    client.chat(
        [
            {"role": "system", "content": "One."},
            {"role": "developer", "content": [{"type": "text", "text": "Two."}]},
            user("hi"),
            {"role": "system", "content": "Three."},
            user("again"),
        ]
    )

    assert upstream.sent["instructions"] == "One.\n\nTwo."
    assert [item["role"] for item in upstream.sent["input"]] == ["user", "developer", "user"]
    assert upstream.sent["input"][1]["content"] == [{"type": "input_text", "text": "Three."}]


def test_q03_instructions_are_sent_even_without_a_system_message(
    client: Client, upstream: FakeUpstream
) -> None:
    client.chat("hi")

    assert upstream.sent["instructions"] == ""


def test_q04_text_and_images_keep_their_order_and_detail(
    client: Client, upstream: FakeUpstream
) -> None:
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
        {"type": "image_url", "image_url": "https://example.com/cat.png"},
    ]

    client.chat([user(parts)])

    text, first, second = upstream.sent["input"][0]["content"]
    assert text == {"type": "input_text", "text": "look"}
    assert first == {"type": "input_image", "image_url": PNG, "detail": "high"}
    assert second["type"] == "input_image"
    assert second["image_url"] == "https://example.com/cat.png"


def test_q06_a_pdf_part_becomes_an_input_file(client: Client, upstream: FakeUpstream) -> None:
    client.chat([user([{"type": "file", "file": {"file_data": PDF, "filename": "paper.pdf"}}])])

    (part,) = upstream.sent["input"][0]["content"]
    assert part == {"type": "input_file", "file_data": PDF, "filename": "paper.pdf"}


def test_q07_a_file_id_is_refused_by_its_path(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat([user([{"type": "file", "file": {"file_id": "file-1"}}])])

    assert reply.status == 400
    assert reply.error["param"] == "messages[0].content[0].file.file_id"
    assert upstream.turns == []


def test_q07_audio_input_is_an_unsupported_value(client: Client, upstream: FakeUpstream) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}

    reply = client.chat([user([sound])])

    assert (reply.status, reply.error["code"]) == (400, "unsupported_value")
    assert upstream.turns == []


def test_q09_parallel_calls_and_results_in_reverse_order_are_paired(
    client: Client, upstream: FakeUpstream
) -> None:
    calls = asked(("call_a", "get_weather", '{"city":"Rome"}'), ("call_b", "get_time", "{}"))

    reply = client.chat([user("hi"), calls, result("call_b", "noon"), result("call_a", "warm")])

    assert reply.status == 200
    assert kinds(upstream) == ["message", *["function_call"] * 2, *["function_call_output"] * 2]
    items = upstream.sent["input"][1:]
    assert [item["call_id"] for item in items[:2]] == ["call_a", "call_b"]
    assert items[0]["arguments"] == '{"city":"Rome"}'
    assert {item["call_id"]: item["output"] for item in items[2:]} == {
        "call_a": "warm",
        "call_b": "noon",
    }
    assert "id" not in every_key(upstream.sent["input"])


def test_q10_assistant_text_comes_before_its_call(client: Client, upstream: FakeUpstream) -> None:
    turn = asked(("call_a", "get_weather", "{}"), content="Let me look.")

    client.chat([user("hi"), turn, result("call_a", "warm")])

    assert kinds(upstream) == ["message", "message", "function_call", "function_call_output"]
    assert upstream.sent["input"][1]["role"] == "assistant"
    assert upstream.sent["input"][1]["content"] == [{"type": "output_text", "text": "Let me look."}]


def test_q11_an_orphan_call_is_paired_or_dropped(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat([user("hi"), asked(("call_a", "get_weather", "{}")), user("and?")])

    assert reply.status == 200
    assert kinds(upstream).count("function_call") == kinds(upstream).count("function_call_output")


def test_q11_an_orphan_result_is_not_sent_as_an_output(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = client.chat([user("hi"), result("call_x", "nobody asked"), user("and?")])

    assert reply.status == 200
    assert "function_call_output" not in kinds(upstream)


def test_q13_a_result_of_text_parts_keeps_its_text(client: Client, upstream: FakeUpstream) -> None:
    parts = [{"type": "text", "text": "warm, "}, {"type": "text", "text": "dry"}]

    client.chat([user("hi"), asked(("call_a", "get_weather", "{}")), result("call_a", parts)])

    output = upstream.sent["input"][-1]["output"]
    texts = [output] if isinstance(output, str) else [part["text"] for part in output]
    assert "".join(texts) == "warm, dry"


def test_q13_a_result_with_an_image_becomes_a_list(client: Client, upstream: FakeUpstream) -> None:
    parts = [
        {"type": "text", "text": "the map"},
        {"type": "image_url", "image_url": {"url": PNG}},
    ]

    client.chat([user("hi"), asked(("call_a", "get_map", "{}")), result("call_a", parts)])

    text, image = upstream.sent["input"][-1]["output"]
    assert text == {"type": "input_text", "text": "the map"}
    assert (image["type"], image["image_url"]) == ("input_image", PNG)


def test_q15_a_long_call_id_is_shortened_alike_in_call_and_output(
    client: Client, upstream: FakeUpstream
) -> None:
    long_id = "call_" + "x" * 200 + "|fc_" + "y" * 241

    reply = client.chat([user("hi"), asked((long_id, "f", "{}")), result(long_id, "ok")])

    assert reply.status == 200
    made, output = upstream.sent["input"][1:]
    assert made["call_id"] == output["call_id"]
    assert len(made["call_id"]) <= 64


@pytest.mark.parametrize("stream", [False, True])
def test_q16_long_tool_names_are_distinct_upstream_and_original_in_the_reply(
    client: Client, upstream: FakeUpstream, stream: bool
) -> None:
    names = ["n" * 90, "n" * 89 + "2", "mcp__server.one__read"]
    upstream.default = lambda seen: Reply(
        answer(*(call(tool["name"], "{}") for tool in seen.body["tools"]))
    )

    reply = client.chat("hi", tools=[function(name) for name in names], stream=stream)

    sent = [tool["name"] for tool in upstream.sent["tools"]]
    assert len(set(sent)) == 3
    assert all(len(name) <= 64 for name in sent)
    given = (
        [made["name"] for made in reply.tool_calls]
        if stream
        else [made["function"]["name"] for made in reply.message["tool_calls"]]
    )
    assert given == names


def test_q16_a_long_name_in_history_and_choice_is_shortened_alike(
    client: Client, upstream: FakeUpstream
) -> None:
    name = "n" * 90
    history = [user("hi"), asked(("call_a", name, "{}")), result("call_a", "ok")]

    client.chat(
        history,
        tools=[function(name)],
        tool_choice={"type": "function", "function": {"name": name}},
    )

    short = upstream.sent["tools"][0]["name"]
    assert upstream.sent["tool_choice"] == {"type": "function", "name": short}
    assert upstream.sent["input"][1]["name"] == short


@pytest.mark.parametrize(("given", "sent"), [({}, False), ({"strict": None}, False)])
def test_q18_a_function_is_not_strict_unless_asked(
    client: Client, upstream: FakeUpstream, given: Json, sent: bool
) -> None:
    client.chat("hi", tools=[function(**given)])

    assert upstream.sent["tools"][0]["strict"] is sent


def test_q18_a_strict_function_stays_strict(client: Client, upstream: FakeUpstream) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }

    client.chat("hi", tools=[function(strict=True, parameters=schema, description="Weather.")])

    assert upstream.sent["tools"] == [
        {
            "type": "function",
            "name": "get_weather",
            "description": "Weather.",
            "parameters": schema,
            "strict": True,
        }
    ]


@pytest.mark.parametrize("given", [{}, {"parameters": None}, {"parameters": {"type": "object"}}])
def test_q19_missing_parameters_become_an_empty_object_schema(
    client: Client, upstream: FakeUpstream, given: Json
) -> None:
    client.chat("hi", tools=[{"type": "function", "function": {"name": "ping", **given}}])

    assert upstream.sent["tools"][0]["parameters"] == {"type": "object", "properties": {}}


def test_q20_a_function_choice_is_flattened(client: Client, upstream: FakeUpstream) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}

    client.chat("hi", tools=[function()], tool_choice=choice)

    assert upstream.sent["tool_choice"] == {"type": "function", "name": "get_weather"}


def test_q20_allowed_tools_are_flattened_with_their_mode(
    client: Client, upstream: FakeUpstream
) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "a"}}]}

    client.chat(
        "hi",
        tools=[function("a"), function("b")],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )

    assert upstream.sent["tool_choice"] == {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "a"}],
    }


def test_q20_a_choice_of_an_unknown_tool_is_refused(client: Client, upstream: FakeUpstream) -> None:
    choice = {"type": "function", "function": {"name": "nothing"}}

    reply = client.chat("hi", tools=[function()], tool_choice=choice)

    assert (reply.status, reply.error["param"]) == (400, "tool_choice")
    assert upstream.turns == []


def test_q23_an_empty_tool_list_is_not_sent(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat("hi", tools=[], tool_choice="auto")

    assert reply.status == 200
    assert not {"tools", "tool_choice"} & set(upstream.sent)


@pytest.mark.parametrize("stream", [False, True])
def test_q24_legacy_functions_get_a_legacy_answer(
    client: Client, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.script(answer(call("get_weather", '{"city":', '"Rome"}')))
    schema = {"type": "object", "properties": {}}

    reply = client.chat(
        "hi",
        functions=[{"name": "get_weather", "parameters": schema}],
        function_call={"name": "get_weather"},
        stream=stream,
    )

    assert upstream.sent["tools"] == [
        {"type": "function", "name": "get_weather", "parameters": schema, "strict": False}
    ]
    assert upstream.sent["tool_choice"] == {"type": "function", "name": "get_weather"}
    assert upstream.sent["parallel_tool_calls"] is False
    assert reply.finish == "function_call"
    if stream:
        parts = [delta["function_call"] for delta in reply.deltas if "function_call" in delta]
        assert parts[0] == {"name": "get_weather", "arguments": ""}
        assert all(set(part) == {"arguments"} for part in parts[1:])
        assert "".join(part["arguments"] for part in parts) == '{"city":"Rome"}'
        assert "tool_calls" not in every_key(reply.chunks)
    else:
        made = {"name": "get_weather", "arguments": '{"city":"Rome"}'}
        assert reply.message["function_call"] == made
        assert "tool_calls" not in reply.message


def test_q24_legacy_history_becomes_paired_items(client: Client, upstream: FakeUpstream) -> None:
    made = {"name": "get_weather", "arguments": "{}"}

    reply = client.chat(
        [
            user("hi"),
            {"role": "assistant", "content": None, "function_call": made},
            {"role": "function", "name": "get_weather", "content": "warm"},
        ],
        functions=[{"name": "get_weather", "parameters": {"type": "object", "properties": {}}}],
    )

    assert reply.status == 200
    called, output = upstream.sent["input"][1:]
    assert (called["type"], called["name"]) == ("function_call", "get_weather")
    assert (output["type"], output["output"]) == ("function_call_output", "warm")
    assert called["call_id"] == output["call_id"]


def test_q26_a_nested_custom_tool_is_flattened_with_its_grammar(
    client: Client, upstream: FakeUpstream
) -> None:
    form = {"type": "grammar", "grammar": GRAMMAR}
    tool = {"type": "custom", "custom": {"name": "patch", "description": "Edit.", "format": form}}

    client.chat("hi", tools=[tool])

    assert upstream.sent["tools"] == [
        {
            "type": "custom",
            "name": "patch",
            "description": "Edit.",
            "format": {"type": "grammar", **GRAMMAR},
        }
    ]


def test_q27_a_flat_custom_tool_and_its_function_shaped_history_stay_custom(
    client: Client, upstream: FakeUpstream
) -> None:
    tool = {"type": "custom", "name": "ApplyPatch", "format": {"type": "grammar", **GRAMMAR}}

    reply = client.chat(
        [
            user("hi"),
            asked(("call_a", "ApplyPatch", "*** Begin")),
            result("call_a", "done"),
        ],
        tools=[tool],
    )

    assert reply.status == 200
    assert upstream.sent["tools"] == [tool]
    called, output = upstream.sent["input"][1:]
    assert called == {
        "type": "custom_tool_call",
        "call_id": "call_a",
        "name": "ApplyPatch",
        "input": "*** Begin",
    }
    assert (output["type"], output["output"]) == ("custom_tool_call_output", "done")


def test_q28_json_object_adds_one_hint_where_the_word_is_missing(
    client: Client, upstream: FakeUpstream
) -> None:
    messages = [{"role": "system", "content": "Answer in JSON."}, user("List two colours.")]

    reply = client.chat(messages, response_format={"type": "json_object"})

    assert reply.status == 200
    assert upstream.sent["text"]["format"] == {"type": "json_object"}
    assert upstream.sent["instructions"] == "Answer in JSON."
    hints = [item for item in upstream.sent["input"] if item["role"] == "developer"]
    assert len(hints) == 1
    assert "Answer in JSON." not in json.dumps(upstream.sent["input"])


def test_q28_json_object_adds_nothing_where_the_word_stands(
    client: Client, upstream: FakeUpstream
) -> None:
    client.chat("List two colours as JSON.", response_format={"type": "json_object"})

    assert [item["role"] for item in upstream.sent["input"]] == ["user"]


def test_q30_a_json_schema_is_flattened_and_not_strict_unless_asked(
    client: Client, upstream: FakeUpstream
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    described = {"name": "thing", "description": "A thing.", "schema": schema}

    client.chat("hi", response_format={"type": "json_schema", "json_schema": described})

    assert upstream.sent["text"]["format"] == {
        "type": "json_schema",
        "name": "thing",
        "description": "A thing.",
        "schema": schema,
        "strict": False,
    }


def test_q30_a_schema_that_the_backend_refuses_is_called_response_format(
    client: Client, upstream: FakeUpstream
) -> None:
    loose = {"name": "thing", "strict": True, "schema": {"type": "object", "properties": {}}}

    reply = client.chat("hi", response_format={"type": "json_schema", "json_schema": loose})

    assert (reply.status, reply.error["code"]) == (400, "invalid_json_schema")
    assert reply.error["param"].startswith("response_format")


def test_q31_a_json_schema_without_the_schema_is_refused(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = client.chat("hi", response_format={"type": "json_schema"})

    assert reply.status == 400
    assert reply.error["code"] == "missing_required_parameter"
    assert reply.error["param"] == "response_format.json_schema"
    assert upstream.turns == []


def test_q32_an_effort_above_the_models_highest_is_clamped(
    client: Client, upstream: FakeUpstream
) -> None:
    reply = client.chat("hi", model="gpt-5.4", reasoning_effort="xhigh")

    assert reply.status == 200
    assert upstream.sent["reasoning"]["effort"] == "high"


def test_q33_an_unknown_effort_is_refused(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat("hi", reasoning_effort="banana")

    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == ("reasoning_effort", "invalid_value")
    assert upstream.turns == []


def test_q33_an_effort_inside_reasoning_counts(client: Client, upstream: FakeUpstream) -> None:
    client.chat("hi", reasoning={"effort": "low"})

    assert upstream.sent["reasoning"]["effort"] == "low"


def test_q33_verbosity_goes_to_text(client: Client, upstream: FakeUpstream) -> None:
    client.chat("hi", verbosity="low")

    assert upstream.sent["text"]["verbosity"] == "low"


def test_q36_parameters_without_effect_are_accepted_and_named(
    client: Client, upstream: FakeUpstream
) -> None:
    noted = {
        "temperature": 0.2,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "seed": 7,
        "logit_bias": {"50256": -100},
        "logprobs": True,
        "max_tokens": 50,
        "user": "someone",
        "prediction": {"type": "content", "content": "x"},
    }
    silent = {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"}

    reply = client.chat("hi", **noted, **silent)

    assert reply.status == 200
    assert not {*noted, "metadata", "service_tier", "max_output_tokens"} & set(upstream.sent)
    assert upstream.sent["store"] is False
    named = {name.strip() for name in reply.headers["x-azt-ignored-params"].split(",")}
    assert named == set(noted)


def test_q37_the_fast_tier_is_called_priority(client: Client, upstream: FakeUpstream) -> None:
    client.chat("hi", service_tier="fast")

    assert upstream.sent["service_tier"] == "priority"


def test_q38_web_search_options_become_the_tool(client: Client, upstream: FakeUpstream) -> None:
    place = {"city": "Rome", "country": "IT", "region": "Lazio", "timezone": "Europe/Rome"}
    located = {"type": "approximate", "approximate": place}

    client.chat("hi", web_search_options={"search_context_size": "low", "user_location": located})

    assert upstream.sent["tools"] == [
        {
            "type": "web_search",
            "search_context_size": "low",
            "user_location": {"type": "approximate", **place},
        }
    ]


def test_q39_two_choices_are_refused_without_a_call(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat("hi", n=2)

    assert reply.status == 400
    assert reply.json == {
        "error": {
            "message": "This gateway returns a single choice; 'n' must be 1.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "unsupported_value",
        }
    }
    assert upstream.turns == []


@pytest.mark.parametrize("n", [None, 1])
def test_q39_one_choice_is_accepted(client: Client, upstream: FakeUpstream, n: int | None) -> None:
    assert client.chat("hi", n=n).status == 200
    assert "n" not in upstream.sent


def test_q41_audio_output_is_refused(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat("hi", modalities=["text", "audio"], audio={"voice": "x", "format": "wav"})

    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == ("modalities", "unsupported_value")
    assert upstream.turns == []


def test_q42_five_stop_strings_are_refused(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat("hi", stop=["a", "b", "c", "d", "e"])

    assert (reply.status, reply.error["param"]) == (400, "stop")
    assert upstream.turns == []


@pytest.mark.parametrize("stream", [False, True])
def test_q43_a_responses_body_on_the_chat_route_gets_a_chat_answer(
    client: Client, upstream: FakeUpstream, stream: bool
) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    body = {
        "model": MODEL,
        "input": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "ping"}]},
        ],
        "tools": [tool],
        "stream": stream,
    }

    reply = client.post("/v1/chat/completions", body)

    assert reply.status == 200
    assert (reply.content if stream else reply.message["content"]) == "You said: ping"
    kind = (reply.chunks[0] if stream else reply.json)["object"]
    assert kind == ("chat.completion.chunk" if stream else "chat.completion")
    assert upstream.sent["tools"][0]["name"] == "f"


def test_q44_an_unknown_role_is_refused_by_its_path(client: Client, upstream: FakeUpstream) -> None:
    reply = client.chat([user("hi"), {"role": "narrator", "content": "Meanwhile"}])

    assert (reply.status, reply.error["param"]) == (400, "messages[1].role")
    assert upstream.turns == []


def test_q44_extra_message_keys_stay_here(client: Client, upstream: FakeUpstream) -> None:
    extra = {"name": "ada", "cache_control": {"type": "ephemeral"}, "reasoning_content": "hm"}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}

    reply = client.chat(
        [
            {**user([part]), **extra},
            {"role": "assistant", "content": "ok", "timestamp": 1, **extra},
            user("go on"),
        ]
    )

    assert reply.status == 200
    assert not {*extra, "timestamp"} & every_key(upstream.sent["input"])


def test_q46_the_content_type_does_not_matter(client: Client) -> None:
    body = json.dumps(chat_body("hi")).encode()

    reply = client.post(
        "/v1/chat/completions", body=body, headers={"Content-Type": "text/plain; charset=utf-8"}
    )

    assert reply.status == 200
    assert reply.message["content"] == "You said: hi"


def test_q27_a_flat_custom_tool_is_answered_as_a_function(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("ApplyPatch", "*** ", "Begin", call_id="call_p")))

    reply = client.chat("hi", tools=[{"type": "custom", "name": "ApplyPatch"}])

    assert reply.message["tool_calls"] == [
        {
            "id": "call_p",
            "type": "function",
            "function": {"name": "ApplyPatch", "arguments": "*** Begin"},
        }
    ]
