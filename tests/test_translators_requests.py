"""Room 11, request side: what a client's dict becomes for the Codex backend."""

import base64
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import azt

UPSTREAM_KEYS = {
    "model",
    "instructions",
    "input",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "text",
    "include",
    "stream",
    "store",
    "prompt_cache_key",
    "service_tier",
    "client_metadata",
}
EFFORTS = {"gpt-5.4": ["low", "medium", "high"]}
NOW = 1_790_000_000.0


def chat(*messages, **fields):
    body = {"model": "gpt-5.4", "messages": list(messages) or [user("hi")], **fields}
    return azt.chat_to_responses(body, EFFORTS, "gpt-5.4")


def responses(store=None, **fields):
    body = {"model": "gpt-5.4", "input": "hi", **fields}
    store = store if store is not None else azt.ResponseStore()
    return azt.responses_to_upstream(body, EFFORTS, "gpt-5.4", store, NOW)


def refusal(call, *args, **fields):
    with pytest.raises(azt.BadRequest) as caught:
        call(*args, **fields)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def call(call_id, name="f", arguments="{}"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def calls(*tool_calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}


def result(call_id, content="ok"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def function(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def message(role, *parts):
    return {"type": "message", "role": role, "content": list(parts)}


def text(value):
    return {"type": "input_text", "text": value}


def data_url(media_type, data):
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


PNG = data_url("image/png", b"\x89PNG not really")


# ---- Chat: messages ------------------------------------------------------------------------------


def test_q01_system_becomes_instructions_and_user_becomes_one_item():
    upstream = chat(system("Be brief."), user("hi")).upstream

    assert upstream["instructions"] == "Be brief."
    assert upstream["input"] == [message("user", text("hi"))]
    assert (upstream["store"], upstream["stream"]) == (False, True)
    assert upstream["include"] == ["reasoning.encrypted_content"]


def test_q02_leading_systems_are_joined_and_a_later_one_stays_in_place():
    upstream = chat(system("One."), system("Two."), user("hi"), system("Three.")).upstream

    assert upstream["instructions"] == "One.\n\nTwo."
    assert upstream["input"] == [message("user", text("hi")), message("developer", text("Three."))]


def test_q03_instructions_are_present_without_a_system_message():
    assert chat(user("hi")).upstream["instructions"] == ""


def test_q04_images_keep_order_and_detail_and_may_be_plain_strings():
    nested = {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}
    plain = {"type": "image_url", "image_url": PNG}

    upstream = chat(user([{"type": "text", "text": "see"}, nested, plain])).upstream

    assert upstream["input"][0]["content"] == [
        text("see"),
        {"type": "input_image", "image_url": PNG, "detail": "high"},
        {"type": "input_image", "image_url": PNG},
    ]


def test_image_data_is_normalised_to_padded_standard_base64():
    odd = {"type": "image_url", "image_url": "data:image/png;base64,-_ -_\n-_8"}

    upstream = chat(user([odd])).upstream

    assert upstream["input"][0]["content"][0]["image_url"] == "data:image/png;base64,+/+/+/8="


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,###", "invalid_base64_image"),
        ("data:image/png;base64,", "invalid_base64_image"),
        ("data:image/png", "invalid_base64_image"),
        ("sediment://file", "invalid_value"),
    ],
)
def test_image_that_upstream_cannot_read_is_refused(url, code):
    part = {"type": "image_url", "image_url": {"url": url}}

    assert refusal(chat, user([part])) == ("messages[0].content[0].image_url.url", code)


def test_anthropic_image_becomes_a_data_url():
    source = {"type": "base64", "media_type": "image/png", "data": PNG.partition(",")[2]}

    upstream = chat(user([{"type": "image", "source": source}])).upstream

    assert upstream["input"][0]["content"] == [{"type": "input_image", "image_url": PNG}]


def test_q06_pdf_keeps_data_and_name():
    data = data_url("application/pdf", b"%PDF")
    named = {"type": "file", "file": {"file_data": data, "filename": "a.pdf"}}
    unnamed = {"type": "file", "file": {"file_data": data}}

    upstream = chat(user([named, unnamed])).upstream

    assert upstream["input"][0]["content"] == [
        {"type": "input_file", "file_data": data, "filename": "a.pdf"},
        {"type": "input_file", "file_data": data, "filename": "file.pdf"},
    ]


def test_text_file_goes_as_text():
    part = {"type": "file", "file": {"file_data": data_url("text/plain", "grüß".encode())}}

    assert chat(user([part])).upstream["input"] == [message("user", text("grüß"))]


def test_q07_file_ids_and_audio_are_refused():
    by_id = {"type": "file", "file": {"file_id": "file-1"}}
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}

    assert refusal(chat, user([by_id]))[0] == "messages[0].content[0].file.file_id"
    assert refusal(chat, user([audio])) == ("messages[0].content[0].type", "unsupported_value")


def test_unknown_part_is_named_by_its_path():
    parts = [{"type": "text", "text": "a"}, {"type": "hologram"}]

    assert refusal(chat, user("x"), user(parts)) == (
        "messages[1].content[1].type",
        "invalid_value",
    )


def test_system_message_takes_text_only():
    part = {"type": "image_url", "image_url": PNG}

    assert refusal(chat, system([part]), user("x"))[0] == "messages[0].content[0].type"


def test_system_message_alone_is_still_sent_as_input():
    upstream = chat(system("Say hi.")).upstream

    assert upstream["input"] == [message("developer", text("Say hi."))]
    assert upstream["instructions"] == ""


def test_q09_calls_come_first_then_their_outputs_without_ids():
    upstream = chat(
        user("go"), calls(call("a"), call("b")), result("b", "B"), result("a", "A")
    ).upstream

    assert upstream["input"][1:] == [
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "A"},
        {"type": "function_call_output", "call_id": "b", "output": "B"},
    ]


def test_q10_assistant_text_precedes_its_call():
    upstream = chat(user("go"), calls(call("a"), content="Looking."), result("a")).upstream

    assert upstream["input"][1] == message("assistant", {"type": "output_text", "text": "Looking."})
    assert upstream["input"][2]["type"] == "function_call"


def test_q11_orphans_leave_paired_items_only():
    upstream = chat(
        user("go"), calls(call("a")), user("well?"), result("zzz"), calls(call("b"))
    ).upstream

    kinds = [(item["type"], item.get("call_id")) for item in upstream["input"]]
    assert kinds == [
        ("message", None),
        ("function_call", "a"),
        ("function_call_output", "a"),
        ("message", None),
    ]
    assert "No result" in upstream["input"][2]["output"]


def test_last_of_several_outputs_counts():
    upstream = chat(user("go"), calls(call("a")), result("a", "1"), result("a", "2")).upstream

    assert [item["output"] for item in upstream["input"][2:]] == ["2"]


def test_output_before_its_call_is_moved_behind_it():
    upstream = chat(user("go"), result("a", "early"), calls(call("a")), user("on")).upstream

    assert [item["type"] for item in upstream["input"][1:]] == [
        "function_call",
        "function_call_output",
        "message",
    ]


def test_ids_that_start_anew_in_each_turn_are_told_apart():
    turn = [calls(call("call_0")), result("call_0", "first")]
    again = [calls(call("call_0")), result("call_0", "second")]

    items = chat(user("go"), *turn, *again).upstream["input"]

    assert items[1]["call_id"] == items[2]["call_id"] == "call_0"
    assert items[3]["call_id"] == items[4]["call_id"] != "call_0"
    assert (items[2]["output"], items[4]["output"]) == ("first", "second")


def test_q13_tool_content_parts_keep_text_and_images():
    image = {"type": "image_url", "image_url": {"url": PNG}}

    items = chat(
        user("go"),
        calls(call("a"), call("b")),
        result("a", [{"type": "text", "text": "one"}]),
        result("b", [{"type": "text", "text": "two"}, image]),
    ).upstream["input"]

    assert items[3]["output"] == [text("one")]
    assert items[4]["output"] == [text("two"), {"type": "input_image", "image_url": PNG}]


def test_q15_long_call_id_becomes_the_same_short_one_twice():
    long_id = "call_x|fc_" + "y" * 440

    items = chat(user("go"), calls(call(long_id)), result(long_id)).upstream["input"]

    assert items[1]["call_id"] == items[2]["call_id"]
    assert 0 < len(items[1]["call_id"]) <= 64


def test_q16_long_and_odd_tool_names_are_shortened_and_remembered():
    long_one, long_two, dotted = "x" * 70 + "one", "x" * 70 + "two", "files.read"
    tools = [function(name) for name in (long_one, long_two, dotted, "files_read")]

    request = chat(user("go"), calls(call("a", long_two)), result("a"), tools=tools)

    names = [tool["name"] for tool in request.upstream["tools"]]
    assert len(set(names)) == 4
    assert all(len(name) <= 64 for name in names)
    assert names[3] == "files_read"
    assert request.upstream["input"][1]["name"] == names[1]
    assert request.tool_names == {names[0]: long_one, names[1]: long_two, names[2]: dotted}


def test_mcp_name_keeps_its_last_segment():
    name = "mcp__" + "server" * 12 + "__read_file"

    assert chat(tools=[function(name)]).upstream["tools"][0]["name"] == "mcp__read_file"


def test_q44_unknown_role_is_refused_and_extra_message_keys_stay_here():
    extras = {"name": "Ada", "cache_control": {"type": "ephemeral"}, "reasoning_content": "hm"}
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]

    upstream = chat({**user(parts), **extras}, {"role": "assistant", "content": "x", **extras})

    assert refusal(chat, user("x"), {"role": "wizard", "content": "x"}) == (
        "messages[1].role",
        "invalid_value",
    )
    assert set(extras).isdisjoint(json.dumps(upstream.upstream).replace('"', " ").split())


def test_assistant_refusal_is_kept_and_thinking_is_not():
    thinking = {"type": "thinking", "thinking": "hm"}

    upstream = chat(
        user("x"), {"role": "assistant", "content": [thinking], "refusal": "No."}, user("y")
    ).upstream

    assert upstream["input"][1] == message("assistant", {"type": "refusal", "refusal": "No."})


# ---- Chat: tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sent"), [({}, False), ({"strict": None}, False), ({"strict": True}, True)]
)
def test_q18_strict_is_always_said(given, sent):
    assert chat(tools=[function("f", **given)]).upstream["tools"][0]["strict"] is sent


@pytest.mark.parametrize(
    "given", [{}, {"parameters": None}, {"parameters": {}}, {"parameters": {"type": "object"}}]
)
def test_q19_function_without_parameters_gets_an_empty_object_schema(given):
    tool = chat(tools=[function("f", **given)]).upstream["tools"][0]

    assert tool["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", "auto"),
        ("any", "required"),
        ({"type": "any"}, "required"),
        ({"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}),
        ({"type": "function", "name": "f"}, {"type": "function", "name": "f"}),
        ({"type": "web_search_preview"}, {"type": "web_search"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [function("f")]},
            },
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}],
            },
        ),
    ],
)
def test_q20_tool_choice_becomes_flat(choice, sent):
    upstream = chat(tools=[function("f"), {"type": "web_search"}], tool_choice=choice).upstream

    assert upstream["tool_choice"] == sent


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "other"}},
        {"type": "web_search"},
        "sometimes",
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("x")]}},
    ],
)
def test_q20_choice_of_an_undeclared_tool_is_refused(choice):
    found = refusal(chat, tools=[function("f")], tool_choice=choice)

    assert found == ("tool_choice", "invalid_value")


def test_q23_empty_tools_drop_the_choice_too():
    upstream = chat(tools=[], tool_choice="auto").upstream

    assert {"tools", "tool_choice", "parallel_tool_calls"}.isdisjoint(upstream)


def test_q24_legacy_functions_become_tools_and_their_history_is_paired():
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "f"}}

    request = chat(
        user("go"),
        legacy,
        {"role": "function", "name": "f", "content": "42"},
        functions=[{"name": "f", "parameters": {"type": "object", "properties": {}}}],
        function_call={"name": "f"},
    )

    assert request.legacy_functions
    assert request.upstream["tool_choice"] == {"type": "function", "name": "f"}
    assert request.upstream["parallel_tool_calls"] is False
    made, answer = request.upstream["input"][1:]
    assert (made["type"], made["arguments"]) == ("function_call", "{}")
    assert answer == {
        "type": "function_call_output",
        "call_id": made["call_id"],
        "output": "42",
    }


def test_q26_nested_custom_tool_becomes_flat_with_a_flat_grammar():
    grammar = {"definition": 'start: "x"', "syntax": "lark"}
    custom = {"name": "patch", "format": {"type": "grammar", "grammar": grammar}}

    request = chat(tools=[{"type": "custom", "custom": custom}])

    assert request.upstream["tools"] == [
        {"type": "custom", "name": "patch", "format": {"type": "grammar", **grammar}}
    ]
    assert request.custom_nested == {"patch"}


def test_q27_flat_custom_tool_turns_its_function_history_into_custom_items():
    tool = {"type": "custom", "name": "ApplyPatch", "format": {"type": "text"}}

    request = chat(
        user("go"), calls(call("a", "ApplyPatch", "*** raw")), result("a", "done"), tools=[tool]
    )

    assert request.upstream["tools"] == [tool]
    assert request.custom_nested == set()
    assert request.upstream["input"][1:] == [
        {"type": "custom_tool_call", "call_id": "a", "name": "ApplyPatch", "input": "*** raw"},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "done"},
    ]


def test_custom_calls_of_the_chat_shape_keep_their_input():
    made = {"id": "a", "type": "custom", "custom": {"name": "patch", "input": "raw"}}

    items = chat(user("go"), calls(made), result("a")).upstream["input"]

    assert (items[1]["type"], items[1]["input"]) == ("custom_tool_call", "raw")
    assert items[2]["type"] == "custom_tool_call_output"


@pytest.mark.parametrize(
    ("arguments", "sent"), [("", "{}"), (None, "{}"), ({"a": 1}, '{"a":1}'), ("{bad", "{bad")]
)
def test_arguments_are_always_a_string(arguments, sent):
    items = chat(user("go"), calls(call("a", "f", arguments)), result("a")).upstream["input"]

    assert items[1]["arguments"] == sent


@pytest.mark.parametrize("kind", ["file_search", "code_interpreter", "computer_use", "mcp"])
def test_tools_that_the_backend_lacks_are_refused(kind):
    found = refusal(chat, tools=[function("f"), {"type": kind}])

    assert found == ("tools[1].type", "unsupported_value")


def test_last_of_two_tools_with_one_name_wins():
    tools = [function("f", description="old"), function("g"), function("f", description="new")]

    sent = chat(tools=tools).upstream["tools"]

    assert [(tool["name"], tool.get("description")) for tool in sent] == [
        ("f", "new"),
        ("g", None),
    ]


def test_image_generation_tool_passes_through():
    tool = {"type": "image_generation", "size": "1024x1024"}

    assert chat(tools=[tool]).upstream["tools"] == [tool]


# ---- Chat: output settings -----------------------------------------------------------------------


def test_q28_json_object_adds_one_hint_unless_the_input_says_json():
    fields = {"response_format": {"type": "json_object"}}

    plain = chat(system("Reply in JSON."), user("hi"), **fields)
    said = chat(system("Reply."), user("hi, as Json please"), **fields)

    assert plain.json_format
    assert plain.upstream["text"] == {"format": {"type": "json_object"}}
    assert plain.upstream["instructions"] == "Reply in JSON."
    assert [item["role"] for item in plain.upstream["input"]] == ["developer", "user"]
    assert "JSON" in plain.upstream["input"][0]["content"][0]["text"]
    assert [item["role"] for item in said.upstream["input"]] == ["user"]


def test_q30_json_schema_becomes_flat():
    spec = {"name": "Answer", "schema": {"type": "object"}, "description": "An answer."}

    upstream = chat(response_format={"type": "json_schema", "json_schema": spec}).upstream

    assert upstream["text"] == {"format": {"type": "json_schema", "strict": False, **spec}}


def test_q31_json_schema_without_its_schema_is_refused():
    found = refusal(chat, response_format={"type": "json_schema"})

    assert found == ("response_format.json_schema", "missing_required_parameter")
    assert refusal(chat, response_format={"type": "grammar"})[0] == "response_format.type"


def test_q32_effort_is_clamped_to_what_the_model_lists():
    assert chat(reasoning_effort="xhigh").upstream["reasoning"]["effort"] == "high"


@pytest.mark.parametrize(
    ("effort", "supported", "sent"),
    [
        ("none", ["low", "high"], "low"),
        ("minimal", ["none", "low"], "none"),
        ("xhigh", ["high", "max"], "max"),
        ("medium", ["low", "high"], "low"),
        ("max", [], "max"),
    ],
)
def test_clamping_prefers_cheap_below_and_strong_above(effort, supported, sent):
    body = {"model": "m", "messages": [user("x")], "reasoning_effort": effort}

    request = azt.chat_to_responses(body, {"m": supported}, "")

    assert request.upstream["reasoning"]["effort"] == sent


def test_q33_effort_dialects_and_verbosity():
    assert refusal(chat, reasoning_effort="banana") == ("reasoning_effort", "invalid_value")
    assert chat(reasoning={"effort": "low"}).upstream["reasoning"]["effort"] == "low"
    assert chat(verbosity="low").upstream["text"] == {"verbosity": "low"}


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"reasoning": "high"}, "high"),
        ({"reasoning": {"enabled": False}}, "low"),
        ({"reasoning": {"max_tokens": 5000}}, "medium"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 90000}}, "high"),
        ({"enable_thinking": False}, "low"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "low"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "high"),
        ({}, None),
    ],
)
def test_effort_is_read_from_the_dialects_of_other_servers(fields, sent):
    assert chat(**fields).upstream["reasoning"].get("effort") == sent


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_hidden_reasoning_asks_for_no_summary(fields):
    request = chat(**fields)

    assert not request.show_reasoning
    assert "reasoning" not in request.upstream
    assert chat().upstream["reasoning"] == {"summary": "auto"}


def test_q36_parameters_without_effect_are_accepted_and_named():
    noted = {
        "temperature": 0.5,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "seed": 1,
        "logit_bias": {},
        "logprobs": True,
        "user": "u",
        "prediction": {"type": "content", "content": "x"},
        "max_tokens": 20,
    }
    silent = {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"}

    request = chat(**noted, **silent)

    assert {*noted, *silent}.intersection(request.upstream) == {"store"}
    assert request.upstream["store"] is False
    assert set(request.ignored) == set(noted)
    assert request.metadata == {"a": "b"}


def test_unlimited_spelled_as_minus_one_is_no_limit():
    assert chat(max_tokens=-1, logprobs=False).ignored == ()
    assert refusal(chat, max_tokens="20") == ("max_tokens", "invalid_type")


@pytest.mark.parametrize(
    ("tier", "sent"), [("fast", "priority"), ("priority", "priority"), ("flex", None)]
)
def test_q37_only_the_priority_tier_is_sent(tier, sent):
    assert chat(service_tier=tier).upstream.get("service_tier") == sent


def test_q38_web_search_options_become_a_tool_with_a_flat_location():
    location = {"type": "approximate", "approximate": {"city": "Rome", "country": "IT"}}

    upstream = chat(
        web_search_options={"search_context_size": "low", "user_location": location}
    ).upstream

    assert upstream["tools"] == [
        {
            "type": "web_search",
            "search_context_size": "low",
            "user_location": {"type": "approximate", "city": "Rome", "country": "IT"},
        }
    ]


@pytest.mark.parametrize("n", [2, 0, -1, 1.5, "1", True])
def test_q39_only_one_choice_is_possible(n):
    with pytest.raises(azt.BadRequest) as caught:
        chat(n=n)

    assert azt.error_body(caught.value) == {
        "error": {
            "message": "This gateway returns a single choice; 'n' must be 1.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "unsupported_value",
        }
    }


@pytest.mark.parametrize("n", [None, 1])
def test_q39_one_choice_is_accepted(n):
    assert "n" not in chat(n=n).upstream


def test_q41_audio_output_is_refused():
    found = refusal(chat, modalities=["text", "audio"])

    assert found == ("modalities", "unsupported_value")


def test_q42_stop_is_normalised_and_takes_four_strings():
    assert chat(stop="END").stop == ["END"]
    assert chat(stop=["a", "", "b"]).stop == ["a", "b"]
    assert refusal(chat, stop=list("abcde"))[0] == "stop"
    assert refusal(chat, stop=[1]) == ("stop[0]", "invalid_type")


def test_q43_responses_shaped_body_on_the_chat_route():
    body = {
        "input": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [text("hi")]},
        ],
        "tools": [{"type": "function", "name": "f"}],
        "text": {"verbosity": "high"},
        "stream": True,
    }

    request = azt.chat_to_responses(body, {}, "gpt-5.4")

    assert request.stream
    assert request.upstream["input"] == [
        message("developer", text("Be brief.")),
        message("user", text("hi")),
    ]
    assert request.upstream["text"] == {"verbosity": "high"}
    assert request.upstream["tools"][0]["name"] == "f"


def test_q46_translation_knows_no_content_type():
    request = azt.chat_to_responses(json.loads('{"messages":[{"role":"user"}]}'), {}, "m")

    assert request.upstream["input"] == [message("user", text(""))]


# ---- Chat: the rest ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "sent"), [("openai/gpt-5.4", "gpt-5.4"), ("azt/x", "x"), (None, "preset")]
)
def test_model_loses_its_prefix_upstream_and_keeps_it_for_the_client(named, sent):
    request = azt.chat_to_responses({"model": named, "messages": [user("x")]}, {}, "preset")

    assert request.upstream["model"] == sent
    assert request.model == (named or "preset")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": []}, "model", "missing_required_parameter"),
        ({"model": 1}, "model", "invalid_type"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        ({"model": "m", "messages": []}, "messages", "invalid_value"),
        ({"model": "m", "messages": "hi"}, "messages", "invalid_type"),
        ({"model": "m", "messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"model": "m", "messages": [{}]}, "messages[0].role", "missing_required_parameter"),
        ({"model": "m", "messages": [user("x")], "stream": "yes"}, "stream", "invalid_type"),
    ],
)
def test_first_problem_is_reported_by_its_path(body, param, code):
    assert refusal(azt.chat_to_responses, body, {}, "") == (param, code)


def test_roles_are_checked_before_tools():
    found = refusal(chat, {"role": "wizard"}, tools=[{"type": "mcp"}])

    assert found[0] == "messages[0].role"


def test_session_key_is_stable_per_conversation_and_told_apart_by_user():
    opening = [system("Be brief."), user("hi")]
    first = chat(*opening).upstream["prompt_cache_key"]
    later = chat(*opening, {"role": "assistant", "content": "Hi!"}, user("more"))
    other_model = azt.chat_to_responses({"model": "m", "messages": opening}, {}, "")

    assert later.upstream["prompt_cache_key"] == first
    assert other_model.upstream["prompt_cache_key"] == first
    assert chat(*opening, user="ada").upstream["prompt_cache_key"] != first
    assert [len(part) for part in first.split("-")] == [8, 4, 4, 4, 12]


def test_session_key_of_the_client_is_sent_unless_no_header_could_carry_it():
    assert chat(prompt_cache_key="mine").upstream["prompt_cache_key"] == "mine"
    assert "\n" not in chat(prompt_cache_key="a\nb").upstream["prompt_cache_key"]


def test_extra_body_is_merged_one_level():
    request = chat(extra_body={"reasoning_effort": "low", "model": "other"})

    assert request.upstream["reasoning"]["effort"] == "low"
    assert request.model == "gpt-5.4"


def test_stream_options_ask_for_usage():
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True).include_usage


# ---- Responses -----------------------------------------------------------------------------------


def test_r06_missing_instructions_are_empty_upstream_and_null_for_the_client():
    request = responses(input=[{"role": "system", "content": "Be brief."}, user("hi")])

    assert request.upstream["instructions"] == ""
    assert request.echo["instructions"] is None
    assert request.upstream["input"] == [
        message("developer", text("Be brief.")),
        message("user", text("hi")),
    ]


def test_r08_parameters_without_effect_are_echoed_and_not_sent():
    given = {
        "temperature": 0.3,
        "truncation": "auto",
        "metadata": {"a": "b"},
        "max_output_tokens": 100,
        "user": "u",
    }

    request = responses(**given)

    assert set(given).isdisjoint(request.upstream)
    assert {name: request.echo[name] for name in given} == given
    assert set(request.ignored) == {"temperature", "truncation", "max_output_tokens"}


def stored(store, response_id, output, now=NOW, **fields):
    request = responses(store, **fields)
    store.put({"id": response_id, "output": output}, request.input_items, output, now)
    return request


ANSWER = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hello.", "annotations": []}],
}
MADE = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}


def test_r09_previous_response_is_expanded():
    store = azt.ResponseStore()
    stored(store, "resp_1", [THOUGHT, ANSWER], instructions="Old.")

    request = responses(store, previous_response_id="resp_1", input="more")

    assert request.upstream["instructions"] == ""
    assert request.upstream["input"] == [
        message("user", text("hi")),
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        message("assistant", {"type": "output_text", "text": "Hello."}),
        message("user", text("more")),
    ]
    assert request.echo["previous_response_id"] == "resp_1"
    assert refusal(responses, store, previous_response_id="resp_2") == (
        "previous_response_id",
        "previous_response_not_found",
    )


def test_r10_follow_up_with_only_an_output_pairs_with_the_stored_call():
    store = azt.ResponseStore()
    stored(store, "resp_1", [MADE])
    output = {"type": "function_call_output", "call_id": "call_1", "output": "42"}

    request = responses(store, previous_response_id="resp_1", input=[output])

    assert request.upstream["input"][1:] == [
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        output,
    ]


def test_r11_references_are_replaced_by_stored_items():
    store = azt.ResponseStore()
    stored(store, "resp_1", [THOUGHT, ANSWER])
    references = [{"type": "item_reference", "id": "rs_gone"}, {"id": "msg_1"}]

    request = responses(store, input=[user("hi"), *references, user("more")])

    assert [item["role"] for item in request.upstream["input"]] == ["user", "assistant", "user"]
    with pytest.raises(azt.BadRequest, match="msg_gone") as caught:
        responses(store, input=[{"type": "item_reference", "id": "msg_gone"}])
    assert caught.value.param == "input[0].id"


def test_reference_to_an_item_of_the_chain_is_not_sent_twice():
    store = azt.ResponseStore()
    stored(store, "resp_1", [ANSWER])

    request = responses(
        store,
        previous_response_id="resp_1",
        input=[{"type": "item_reference", "id": "msg_1"}, user("more")],
    )

    assert [item["role"] for item in request.upstream["input"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("background", True), ("conversation", "conv_1"), ("prompt", {"id": "pmpt_1"})],
)
def test_r12_what_needs_a_server_side_state_is_refused(name, value):
    assert refusal(responses, **{name: value}) == (name, "unsupported_parameter")


def test_r18_preview_names_of_the_search_tool_are_normalised():
    upstream = responses(
        tools=[{"type": "web_search_preview", "search_context_size": "low"}],
        tool_choice={"type": "web_search_preview"},
    ).upstream

    assert upstream["tools"] == [{"type": "web_search", "search_context_size": "low"}]
    assert upstream["tool_choice"] == {"type": "web_search"}


def test_r19_long_tool_name_is_echoed_as_the_client_wrote_it():
    tool = {"type": "function", "name": "n" * 80, "parameters": {"type": "object"}}

    request = responses(tools=[tool])

    assert request.echo["tools"] == [tool]
    assert request.tool_names == {request.upstream["tools"][0]["name"]: "n" * 80}


def test_r20_encrypted_reasoning_is_shown_only_where_asked_for():
    quiet = responses()
    asked = responses(include=["reasoning.encrypted_content", "message.output_text.logprobs"])

    assert not quiet.show_encrypted
    assert asked.show_encrypted
    assert quiet.upstream["include"] == ["reasoning.encrypted_content"]
    assert asked.upstream["include"] == ["reasoning.encrypted_content"]


def test_function_is_strict_by_default_only_with_a_closed_schema():
    closed = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    nested = {**closed, "properties": {"a": {"type": "object", "properties": {}}}}
    schemas = [closed, nested, {"type": "object"}, None]

    tools = [{"type": "function", "name": f"f{i}", "parameters": s} for i, s in enumerate(schemas)]
    sent = responses(tools=tools).upstream["tools"]

    assert [tool["strict"] for tool in sent] == [True, False, False, False]


def test_responses_asks_for_a_summary_only_when_the_client_does():
    assert "reasoning" not in responses().upstream
    reasoning = {"effort": "minimal", "generate_summary": "concise"}

    request = responses(reasoning=reasoning)

    assert request.upstream["reasoning"] == {"effort": "low", "summary": "concise"}
    assert request.echo["reasoning"] == {"effort": "minimal", "summary": "concise"}


def test_input_may_be_missing_only_with_a_chain_or_messages():
    with_messages = responses(input=None, messages=[system("S."), user("hi")])

    assert with_messages.upstream["instructions"] == "S."
    assert with_messages.upstream["input"] == [message("user", text("hi"))]
    assert refusal(responses, input=None) == ("input", "missing_required_parameter")


def test_parts_are_repaired_for_the_role_that_says_them():
    upstream = responses(
        input=[
            {"role": "user", "content": [{"type": "output_text", "text": "a"}]},
            {"role": "assistant", "phase": "commentary", "content": [text("b")]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]},
        ]
    ).upstream

    assert upstream["input"] == [
        message("user", text("a")),
        {**message("assistant", {"type": "output_text", "text": "b"}), "phase": "commentary"},
        message("user", {"type": "input_image", "image_url": PNG}),
    ]


def test_reasoning_without_encrypted_content_is_not_sent():
    thought = {"type": "reasoning", "id": "rs_2", "summary": []}

    assert len(responses(input=[user("a"), thought, user("b")]).upstream["input"]) == 2


def test_other_items_are_forwarded_without_their_ids():
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    compaction = {"type": "compaction", "encrypted_content": "gAAA"}

    upstream = responses(input=[user("a"), search, compaction]).upstream

    assert upstream["input"][1:] == [
        {"type": "web_search_call", "status": "completed", "action": {}},
        compaction,
    ]


def test_input_items_have_ids_and_parts():
    request = responses(input="hi")

    (item,) = request.input_items
    assert item["id"].startswith("msg_")
    assert (item["role"], item["content"]) == ("user", [text("hi")])


# ---- Store ---------------------------------------------------------------------------------------


def test_store_forgets_the_oldest_beyond_its_count(monkeypatch):
    monkeypatch.setattr(azt, "STORED_RESPONSES_MAX", 2)
    store = azt.ResponseStore()

    for number in range(3):
        store.put({"id": f"resp_{number}"}, [], [], NOW)

    assert store.get("resp_0", NOW) is None
    assert store.get("resp_2", NOW).response == {"id": "resp_2"}


def test_store_forgets_the_oldest_beyond_its_bytes(monkeypatch):
    monkeypatch.setattr(azt, "STORED_RESPONSES_BYTES", 10_000)
    store = azt.ResponseStore()
    item = {"type": "message", "id": "msg_a", "content": "x" * 6_000}

    store.put({"id": "resp_0"}, [item], [], NOW)
    store.put({"id": "resp_1"}, [], [{**item, "id": "msg_b"}], NOW)
    store.put({"id": "resp_2"}, [{**item, "id": "msg_c", "content": "x" * 20_000}], [], NOW)

    assert store.get("resp_0", NOW) is None
    assert store.item("msg_a", NOW) is None
    assert store.item("msg_b", NOW)["id"] == "msg_b"
    assert store.get("resp_2", NOW) is None
    assert 0 < store.size_bytes <= 10_000


def test_store_forgets_after_its_time():
    store = azt.ResponseStore()
    store.put({"id": "resp_0"}, [], [ANSWER], NOW)

    assert store.get("resp_0", NOW + azt.STORED_RESPONSES_TTL_S - 1) is not None
    assert store.get("resp_0", NOW + azt.STORED_RESPONSES_TTL_S) is None
    assert store.item("msg_1", NOW) is None
    assert store.size_bytes == 0


def test_store_deletes_once():
    store = azt.ResponseStore()
    store.put({"id": "resp_0"}, [], [ANSWER], NOW)

    assert store.delete("resp_0")
    assert not store.delete("resp_0")
    assert store.item("msg_1", NOW) is None


def test_items_of_a_chain_outlive_its_first_response():
    store = azt.ResponseStore()
    store.put({"id": "resp_0"}, [], [ANSWER], NOW)
    store.put({"id": "resp_1"}, [ANSWER], [], NOW + 1)

    store.delete("resp_0")

    assert store.item("msg_1", NOW + 1) == ANSWER


def paged(query, count=5):
    items = [{"type": "message", "id": f"msg_{number}"} for number in range(count)]
    page = azt.input_items_page(azt.StoredResponse({}, items, [], 0, 0.0), query)
    return [item["id"] for item in page["data"]], page["has_more"]


def test_input_items_are_paged_newest_first():
    assert paged({}) == (["msg_4", "msg_3", "msg_2", "msg_1", "msg_0"], False)
    assert paged({"limit": "2"}) == (["msg_4", "msg_3"], True)
    assert paged({"limit": "2", "after": "msg_3"}) == (["msg_2", "msg_1"], True)
    assert paged({"order": "asc", "after": "msg_3"}) == (["msg_4"], False)
    assert paged({}, count=25)[1]


def test_input_items_page_names_its_ends():
    page = azt.input_items_page(azt.StoredResponse({}, [ANSWER, MADE], [], 0, 0.0), {})

    assert (page["object"], page["first_id"], page["last_id"]) == ("list", "fc_1", "msg_1")


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "m"}])
def test_wrong_page_is_refused_by_name(query):
    assert refusal(paged, query)[0] == next(iter(query))


def test_input_items_hide_encrypted_reasoning_unless_asked():
    kept = azt.StoredResponse({}, [THOUGHT], [], 0, 0.0)

    hidden = azt.input_items_page(kept, {})
    shown = azt.input_items_page(kept, {"include[]": "reasoning.encrypted_content"})

    assert "encrypted_content" not in hidden["data"][0]
    assert shown["data"] == [THOUGHT]


# ---- Tokens --------------------------------------------------------------------------------------


def test_usage_is_renamed_for_chat():
    usage = azt.usage_from(
        {
            "input_tokens": 50,
            "input_tokens_details": {"cached_tokens": 30},
            "output_tokens": 20,
            "output_tokens_details": {"reasoning_tokens": 5},
            "total_tokens": 70,
        }
    )

    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        50,
        20,
        70,
    )
    assert usage["prompt_tokens_details"]["cached_tokens"] == 30
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5


@pytest.mark.parametrize(
    "usage", [None, {}, {"input_tokens": -5, "output_tokens": None, "input_tokens_details": None}]
)
def test_usage_is_never_null_or_negative(usage):
    renamed = azt.usage_from(usage)

    assert (renamed["prompt_tokens"], renamed["total_tokens"]) == (0, 0)
    assert all(count >= 0 for count in renamed["prompt_tokens_details"].values())


def test_usage_total_is_the_sum_where_upstream_gives_none():
    assert azt.usage_from({"input_tokens": 2, "output_tokens": 3})["total_tokens"] == 5


def test_estimate_grows_with_text_and_not_with_image_bytes():
    short = azt.estimate_input_tokens(chat(user("hi")).upstream)
    long = azt.estimate_input_tokens(chat(user("word " * 4000)).upstream)
    part = {"type": "image_url", "image_url": data_url("image/png", b"x" * 400_000)}
    image = azt.estimate_input_tokens(chat(user([part])).upstream)

    assert 0 < short < 100
    assert 4000 < long < 8000
    assert image < 3000


# ---- Properties ----------------------------------------------------------------------------------

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)


def shaped(required, **optional):
    return st.fixed_dictionaries(required, optional=optional)


def few(strategy):
    return st.lists(strategy, max_size=4)


words = st.text(max_size=9)
call_ids = st.sampled_from(["a", "b", "c", "x" * 80])
tool_names = st.sampled_from(["f", "g.h", "n" * 80, "patch"])
parts = st.one_of(
    shaped({"type": st.sampled_from(["text", "input_text"]), "text": words}),
    shaped(
        {"type": st.just("image_url"), "image_url": st.just(PNG) | shaped({"url": st.just(PNG)})}
    ),
    shaped({"type": st.just("file"), "file": shaped({"file_data": st.just(PNG)})}),
)
contents = words | few(parts)
tool_calls = st.one_of(
    shaped({"id": call_ids, "function": shaped({"name": tool_names}, arguments=words)}),
    shaped(
        {
            "id": call_ids,
            "type": st.just("custom"),
            "custom": shaped({"name": tool_names}, input=words),
        }
    ),
)
texts = words | few(shaped({"type": st.just("text"), "text": words}))
messages = st.one_of(
    shaped({"role": st.just("user"), "content": contents}),
    shaped({"role": st.sampled_from(["system", "developer"]), "content": texts}),
    shaped(
        {"role": st.just("assistant")},
        content=texts,
        tool_calls=few(tool_calls),
        function_call=shaped({"name": tool_names}, arguments=words),
    ),
    shaped({"role": st.just("tool"), "tool_call_id": call_ids, "content": contents}),
    shaped({"role": st.just("function"), "name": tool_names, "content": words}),
)
tools = st.one_of(
    shaped(
        {
            "type": st.just("function"),
            "function": shaped({"name": tool_names}, parameters=shaped({})),
        }
    ),
    shaped({"type": st.just("custom"), "name": tool_names}),
    shaped({"type": st.sampled_from(["web_search_preview", "image_generation"])}),
)
items = st.one_of(
    shaped({"role": st.just("user"), "content": contents}, id=words),
    shaped({"role": st.just("assistant"), "content": texts}),
    shaped({"type": st.just("function_call"), "call_id": call_ids, "name": tool_names}),
    shaped({"type": st.just("custom_tool_call"), "call_id": call_ids, "name": tool_names}),
    shaped({"type": st.just("function_call_output"), "call_id": call_ids, "output": contents}),
    shaped({"type": st.just("custom_tool_call_output"), "call_id": call_ids}, output=contents),
    shaped({"type": st.just("reasoning")}, encrypted_content=words, id=words),
    shaped({"type": st.just("item_reference"), "id": st.sampled_from(["rs_1", "fc_1", "rs_x"])}),
    shaped({"type": st.just("web_search_call")}, id=words),
)
common = {
    "instructions": words,
    "tools": few(tools),
    "tool_choice": st.sampled_from(["auto", "any", {"type": "none"}]),
    "parallel_tool_calls": st.booleans(),
    "reasoning": shaped({}, effort=st.just("low"), summary=st.just("auto")),
    "text": shaped({}, format=st.just({"type": "json_object"}), verbosity=st.just("low")),
    "prompt_cache_key": words,
    "user": words,
    "metadata": shaped({}),
}
chat_bodies = st.one_of(
    shaped({"messages": few(messages)}, functions=few(shaped({"name": tool_names})), **common),
    shaped({"input": words | few(items)}, **common),
)
responses_bodies = shaped(
    {"input": words | few(items)},
    include=few(words),
    previous_response_id=st.just("resp_1"),
    store=st.booleans(),
    **common,
)
FIELDS = """background conversation enable_thinking extra_body function_call functions include input
instructions max_tokens messages metadata modalities model n previous_response_id prompt reasoning
reasoning_effort response_format stop store stream_options text thinking tool_choice tools verbosity
web_search_options""".split()
arbitrary = st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4)


@st.composite
def spoilt(draw, bodies):
    """A good body in which up to two values, at any depth, became anything."""
    body = copy.deepcopy(draw(bodies))
    for _ in range(draw(st.integers(0, 2))):
        node = body
        while node:
            key = draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            if not isinstance(node[key], (dict, list)) or draw(st.booleans()):
                node[key] = draw(anything)
                break
            node = node[key]
    return body


def check_upstream(upstream):
    assert set(upstream) <= UPSTREAM_KEYS
    assert upstream["stream"] is True
    assert upstream["store"] is False
    assert upstream["input"]
    azt.encode_json(upstream)
    assert azt.estimate_input_tokens(upstream) > 0
    kinds = [item["type"] for item in upstream["input"]]
    made = [
        item["call_id"]
        for item in upstream["input"]
        if item["type"] in ("function_call", "custom_tool_call")
    ]
    answered = [
        item["call_id"]
        for item in upstream["input"]
        if item["type"] in ("function_call_output", "custom_tool_call_output")
    ]
    assert len(set(made)) == len(made)
    assert sorted(made) == sorted(answered)
    assert all(0 < len(call_id) <= 64 for call_id in made)
    for at, item in enumerate(upstream["input"]):
        assert item.get("role") != "system"
        if item["type"] in ("function_call", "custom_tool_call"):
            assert f"{item['type']}_output" in kinds[at:]


@given(spoilt(chat_bodies) | arbitrary)
def test_chat_translation_is_safe_for_any_body(body):
    before = copy.deepcopy(body)

    try:
        request = azt.chat_to_responses(body, EFFORTS, "gpt-5.4")
    except azt.BadRequest as error:
        assert azt.error_body(error)["error"]["message"]
    else:
        check_upstream(request.upstream)

    assert body == before


@given(spoilt(responses_bodies) | arbitrary)
def test_responses_translation_is_safe_for_any_body(body):
    before = copy.deepcopy(body)
    store = azt.ResponseStore()
    store.put({"id": "resp_1"}, [], [THOUGHT, MADE], NOW)

    try:
        request = azt.responses_to_upstream(body, EFFORTS, "gpt-5.4", store, NOW)
    except azt.BadRequest as error:
        assert azt.error_body(error)["error"]["message"]
    else:
        check_upstream(request.upstream)
        store.put({"id": "resp_2"}, request.input_items, [], NOW)
        azt.input_items_page(store.get("resp_2", NOW), {})

    assert body == before


@given(st.lists(st.tuples(st.sampled_from(["call", "result", "text"]), call_ids), min_size=1))
def test_any_history_of_calls_is_paired(steps):
    made = {
        "call": lambda call_id: calls(call(call_id)),
        "result": result,
        "text": lambda call_id: user(call_id),
    }

    request = chat(user("go"), *[made[kind](call_id) for kind, call_id in steps])

    check_upstream(request.upstream)
