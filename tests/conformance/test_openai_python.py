"""The official Python library, sync and async, with its helpers and its error classes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest
from clients import (
    CHAT_TOOL,
    COUNTED,
    FAILURES,
    HI,
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

WITH_USAGE: Any = {"stream_options": {"include_usage": True}}
NewGateway = Callable[..., Gateway]


class Weather(pydantic.BaseModel):
    city: str


WEATHER_TOOL: Any = openai.pydantic_function_tool(Weather, name="get_weather")


@pytest.fixture
def client(openai_client: openai.OpenAI) -> openai.OpenAI:
    return openai_client


@pytest.fixture
def on_loop(gateway: Gateway) -> Callable[..., Any]:
    """Call it with an async function of an `AsyncOpenAI` that is pointed at the gateway."""

    async def scenario(function: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        async with library(openai.AsyncOpenAI, gateway) as client:
            return await function(client)

    return lambda function: asyncio.run(scenario(function))


def library(kind: Any, gateway: Gateway, **how: Any) -> Any:
    return kind(base_url=f"{gateway.url}/v1", **{"api_key": "any key", **how})


def scripted_tool_turns(upstream: FakeUpstream) -> None:
    """First a call, then the answer that uses its result."""
    upstream.script(
        answer(reasoning("Plan"), call("get_weather", '{"city":', '"Rome"}', call_id="call_1"))
    )
    upstream.script(text("Sunny", "."))


def sent_types(upstream: FakeUpstream) -> list[str]:
    return [item["type"] for item in upstream.sent["input"]]


# -- Chat Completions -----------------------------------------------------------------------------


def test_a_chat_completion_has_text_finish_usage_and_request_id(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), usage=COUNTED))

    said = client.chat.completions.create(model=MODEL, messages=HI)

    assert said.choices[0].message.content == "Hello"
    assert said.choices[0].message.model_extra == {"reasoning_content": "Plan"}
    assert said.choices[0].finish_reason == "stop"
    assert said.usage is not None
    assert said.usage.total_tokens == 70
    assert said._request_id


def test_c04_the_stream_helper_sends_every_event_of_an_answer(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    with client.chat.completions.stream(model=MODEL, messages=HI, **WITH_USAGE) as stream:
        events = list(stream)
        final = stream.get_final_completion()

    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert deltas == ["", "Hel", "lo"]
    assert [event.content for event in events if event.type == "content.done"] == ["Hello"]
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == "Hello"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.total_tokens == 70


def test_the_stream_helper_merges_parallel_calls_and_parses_them(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    calls = [call("get_weather", '{"city":', f'"{city}"}}') for city in ("Rome", "Oslo")]
    upstream.script(answer(reasoning("Plan"), *calls, interleaved=True))

    with client.chat.completions.stream(model=MODEL, messages=HI, tools=[WEATHER_TOOL]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()

    assert [event.parsed_arguments for event in done] == [
        Weather(city="Rome"),
        Weather(city="Oslo"),
    ]
    made = final.choices[0].message.tool_calls or []
    assert [each.function.name for each in made] == ["get_weather", "get_weather"]
    assert [each.function.arguments for each in made] == ['{"city":"Rome"}', '{"city":"Oslo"}']
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_parses_the_content(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text('{"city":', '"Rome"}'))

    with client.chat.completions.stream(
        model=MODEL, messages=HI, response_format=Weather
    ) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.parsed == Weather(city="Rome")


def test_the_parse_helper_returns_the_object(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))

    said = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Weather)

    assert said.choices[0].message.parsed == Weather(city="Rome")
    form = upstream.sent["text"]["format"]
    assert (form["type"], form["name"], form["strict"]) == ("json_schema", "Weather", True)


def test_the_parse_helper_reports_a_refusal(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(answer(refusal("I will ", "not.")))

    said = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Weather)

    assert said.choices[0].message.parsed is None
    assert said.choices[0].message.refusal == "I will not."


def test_the_parse_helper_parses_a_call(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(answer(call("get_weather", '{"city":"Rome"}')))

    said = client.chat.completions.parse(model=MODEL, messages=HI, tools=[WEATHER_TOOL])

    (made,) = said.choices[0].message.tool_calls or []
    assert made.function.parsed_arguments == Weather(city="Rome")
    assert upstream.sent["tools"][0]["strict"] is True


def test_a_chat_tool_loop_returns_the_message_object_as_it_came(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    scripted_tool_turns(upstream)

    first = client.chat.completions.create(model=MODEL, messages=HI, tools=[CHAT_TOOL])
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    history: Any = [*HI, first.choices[0].message, result]
    second = client.chat.completions.create(model=MODEL, messages=history, tools=[CHAT_TOOL])

    assert second.choices[0].message.content == "Sunny."
    assert sent_types(upstream) == ["message", "function_call", "function_call_output"]


def test_c23_the_stream_helper_takes_citations_without_raising(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    cited = [citation("https://a/", "A", 4, 5), citation("https://b/", "B", 7, 8)]
    upstream.script(answer(message("See a, b.", annotations=cited)), times=2)

    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model=MODEL, messages=HI)

    for completion in (final, whole):
        found = completion.choices[0].message.annotations or []
        assert [each.url_citation.url for each in found] == ["https://a/", "https://b/"]


def test_c30_a_failure_in_the_stream_is_raised_with_its_message(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))
    heard = []

    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with stream, pytest.raises(openai.APIError, match="It went wrong.") as caught:
        for chunk in stream:
            heard += [choice.delta.content for choice in chunk.choices if choice.delta.content]

    assert heard == ["Hel"]
    assert caught.value.code == "upstream_error"
    assert len(upstream.turns) == 1


def test_c37_the_stream_helper_takes_a_flat_custom_call(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(custom_call("patch", "raw ", "input", call_id="call_1")))
    flat: Any = {"tools": [{"type": "custom", "name": "patch"}]}

    with client.chat.completions.stream(model=MODEL, messages=HI, extra_body=flat) as stream:
        final = stream.get_final_completion()

    (made,) = final.choices[0].message.tool_calls or []
    assert (made.function.name, made.function.arguments) == ("patch", "raw input")


# -- Responses ------------------------------------------------------------------------------------


def test_r01_a_response_has_its_text_and_usage(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    response = client.responses.create(model=MODEL, input="hi")

    assert response.output_text == "Hello"
    assert response.usage is not None
    assert response.usage.total_tokens == 70


def test_r02_a_plain_stream_is_numbered_and_ends_with_the_whole_response(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo")))

    with client.responses.create(model=MODEL, input="hi", stream=True) as stream:
        events: list[Any] = list(stream)

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hello"


def test_r02_the_stream_helper_accumulates_text_and_calls(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    made = call("get_weather", '{"city":', '"Rome"}')
    upstream.script(answer(reasoning("Plan", "Act"), message("Hel", "lo"), made))

    with client.responses.stream(model=MODEL, input="hi", tools=[WEATHER_TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()

    texts = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    arguments = [
        event.snapshot for event in events if event.type == "response.function_call_arguments.delta"
    ]
    assert texts == ["Hel", "Hello"]
    assert arguments == ['{"city":', '{"city":"Rome"}']
    assert final.output_text == "Hello"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert getattr(final.output[2], "parsed_arguments", None) == Weather(city="Rome")


def test_r15_the_stream_helper_parses_the_text(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text('{"city":', '"Rome"}'))

    with client.responses.stream(model=MODEL, input="hi", text_format=Weather) as stream:
        final = stream.get_final_response()

    assert final.output_parsed == Weather(city="Rome")


def test_r15_the_parse_helper_returns_the_object(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))

    response = client.responses.parse(model=MODEL, input="hi", text_format=Weather)

    assert response.output_parsed == Weather(city="Rome")


def test_r13_a_failure_in_the_stream_is_its_last_event(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    with client.responses.create(model=MODEL, input="hi", stream=True) as stream:
        last: Any = list(stream)[-1]

    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error.message == "It went wrong."


def test_a_tool_loop_with_a_previous_response_sends_only_the_output(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    scripted_tool_turns(upstream)

    first = client.responses.create(model=MODEL, input="weather?", tools=[TOOL])
    (made,) = [item for item in first.output if item.type == "function_call"]
    second = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}],
        tools=[TOOL],
    )

    assert second.output_text == "Sunny."
    assert second.previous_response_id == first.id
    assert sent_types(upstream) == ["message", "reasoning", "function_call", "function_call_output"]


def test_a_tool_loop_can_send_the_output_items_back(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    scripted_tool_turns(upstream)
    said: Any = [{"role": "user", "content": "weather?"}]

    first = client.responses.create(model=MODEL, input=said, tools=[TOOL], store=False)
    said += first.output
    said.append({"type": "function_call_output", "call_id": "call_1", "output": "sunny"})
    second = client.responses.create(model=MODEL, input=said, tools=[TOOL], store=False)

    assert second.output_text == "Sunny."
    assert sent_types(upstream)[-2:] == ["function_call", "function_call_output"]


def test_encrypted_reasoning_that_was_asked_for_goes_back_upstream(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    scripted_tool_turns(upstream)
    said: Any = [{"role": "user", "content": "weather?"}]
    asked: Any = {
        "model": MODEL,
        "tools": [TOOL],
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }

    said += client.responses.create(input=said, **asked).output
    said.append({"type": "function_call_output", "call_id": "call_1", "output": "sunny"})
    client.responses.create(input=said, **asked)

    (thought,) = [item for item in upstream.sent["input"] if item["type"] == "reasoning"]
    assert thought["encrypted_content"] == "gAAAA-final"


# -- Models ---------------------------------------------------------------------------------------


def test_m01_an_unknown_model_raises_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-nothing")

    assert caught.value.code == "model_not_found"


# -- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_a_failure_of_chat_raises_its_class_after_the_right_number_of_tries(
    new_gateway: NewGateway, upstream: FakeUpstream, case: tuple[Json, str, int, str, int]
) -> None:
    how, name, status, code, tries = case
    upstream.script(**how, times=3)

    with (
        library(openai.OpenAI, new_gateway()) as client,
        pytest.raises(getattr(openai, name)) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI, stream=True)

    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.request_id
    assert len(upstream.turns) == tries


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_a_failure_of_responses_raises_its_class_on_the_loop_too(
    new_gateway: NewGateway, upstream: FakeUpstream, case: tuple[Json, str, int, str, int]
) -> None:
    how, name, status, code, tries = case
    upstream.script(**how, times=3)

    async def ask(gateway: Gateway) -> None:
        async with library(openai.AsyncOpenAI, gateway) as client:
            await client.responses.create(model=MODEL, input="hi")

    with pytest.raises(getattr(openai, name)) as caught:
        asyncio.run(ask(new_gateway()))

    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert len(upstream.turns) == tries


def test_e02_a_rejected_sign_in_raises_authentication_error_once(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.revoke("acct-1")

    with (
        library(openai.OpenAI, new_gateway()) as client,
        pytest.raises(openai.AuthenticationError, match="azt login") as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI)

    assert caught.value.code == "account_auth_expired"
    assert len(upstream.turns) == 1


def test_an_unreachable_backend_raises_internal_server_error(new_gateway: NewGateway) -> None:
    nowhere = {"AZT_CODEX_BASE_URL": "http://127.0.0.1:9/backend-api/codex"}
    gateway = new_gateway(variables=nowhere)

    with (
        library(openai.OpenAI, gateway, max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI)

    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")


def test_e05_a_short_limit_is_slept_and_then_succeeds(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(**SHORT_LIMIT)

    with library(openai.OpenAI, new_gateway()) as client:
        said = client.responses.create(model=MODEL, input="hi")

    first, second = upstream.turns
    assert said.output_text == "You said: hi"
    assert second.at - first.at >= 1.5


def test_e06_a_stream_is_opened_at_the_third_try(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(status=500, json={"detail": "Oops."}, times=2)

    with (
        library(openai.OpenAI, new_gateway()) as client,
        client.responses.stream(model=MODEL, input="hi") as stream,
    ):
        final = stream.get_final_response()

    assert final.output_text == "You said: hi"
    assert len(upstream.turns) == 3


# -- Time -----------------------------------------------------------------------------------------


def test_a_client_that_times_out_ends_the_upstream_call(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(text("late"), delay=30.0)

    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).responses.create(model=MODEL, input="hi")

    assert upstream.wait_closed()


@pytest.fixture
def endless(upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    upstream.script(text(*(f"w{number} " for number in range(200))), delays=0.05)
    yield upstream


def test_a_closed_stream_ends_the_upstream_call(
    client: openai.OpenAI, endless: FakeUpstream
) -> None:
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        next(stream)
        next(stream)
    left_at = time.monotonic()

    assert endless.wait_closed() - left_at < 1.0


def test_a_cancelled_task_ends_the_upstream_call(
    on_loop: Callable[..., Any], endless: FakeUpstream
) -> None:
    async def listen(client: openai.AsyncOpenAI, heard: asyncio.Event) -> None:
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    heard.set()

    async def leave(client: openai.AsyncOpenAI) -> float:
        heard = asyncio.Event()
        task = asyncio.create_task(listen(client, heard))
        await heard.wait()
        task.cancel()
        await asyncio.wait([task])
        return time.monotonic()

    left_at = on_loop(leave)

    assert endless.wait_closed() - left_at < 1.0


def arrivals(base_url: str, key: str, headers: Json, body: Json) -> list[float]:
    """When the text deltas of a Responses stream came."""
    with (
        openai.OpenAI(base_url=base_url, api_key=key, default_headers=headers) as client,
        client.responses.create(**body) as stream,
    ):
        return [time.monotonic() for event in stream if event.type == "response.output_text.delta"]


def chat_arrivals(client: openai.OpenAI) -> list[float]:
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        return [
            time.monotonic() for chunk in stream if chunk.choices and chunk.choices[0].delta.content
        ]


def test_the_gaps_between_deltas_are_those_of_a_direct_connection(
    client: openai.OpenAI, gateway: Gateway, upstream: FakeUpstream
) -> None:
    way = direct(upstream)
    straight = (way["url"], way["key"], way["headers"], way["body"])
    arrivals(*straight)  # the first streams of a process wait for imports
    chat_arrivals(client)
    script_paced(upstream, times=3)

    with ThreadPoolExecutor() as threads:
        reference = threads.submit(arrivals, *straight)
        responses = threads.submit(arrivals, f"{gateway.url}/v1", "any key", {}, way["body"])
        chat = threads.submit(chat_arrivals, client)

    assert_same_gaps(responses.result(), reference.result())
    assert_same_gaps(chat.result(), reference.result())


# -- Async ----------------------------------------------------------------------------------------


def test_the_async_library_reads_a_chat_stream(
    on_loop: Callable[..., Any], upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    async def ask(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, **WITH_USAGE
        )
        async with stream:
            return [chunk async for chunk in stream]

    chunks = on_loop(ask)

    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "Hello"
    assert [choice.delta.role for choice in choices if choice.delta.role] == ["assistant"]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [70]


def test_the_async_stream_helpers_accumulate(
    on_loop: Callable[..., Any], upstream: FakeUpstream
) -> None:
    made = call("get_weather", '{"city":', '"Rome"}')
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), made), times=2)
    asked: Any = {"model": MODEL, "tools": [WEATHER_TOOL]}

    async def ask(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(messages=HI, **asked) as chat:
            said = await chat.get_final_completion()
        async with client.responses.stream(input="hi", **asked) as responses:
            return said, await responses.get_final_response()

    said, response = on_loop(ask)

    assert said.choices[0].message.content == "Hello"
    assert said.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Rome")
    assert response.output_text == "Hello"
    assert response.output[2].parsed_arguments == Weather(city="Rome")


def test_the_async_parse_helpers_return_the_object(
    on_loop: Callable[..., Any], upstream: FakeUpstream
) -> None:
    upstream.script(text('{"city":', '"Rome"}'), times=2)

    async def ask(client: openai.AsyncOpenAI) -> Any:
        said = await client.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Weather
        )
        response = await client.responses.parse(model=MODEL, input="hi", text_format=Weather)
        return said.choices[0].message.parsed, response.output_parsed

    assert on_loop(ask) == (Weather(city="Rome"), Weather(city="Rome"))


def test_the_async_library_waits_out_a_short_limit(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(**SHORT_LIMIT)

    async def ask(gateway: Gateway) -> Any:
        async with library(openai.AsyncOpenAI, gateway) as client:
            return await client.chat.completions.create(model=MODEL, messages=HI)

    said = asyncio.run(ask(new_gateway()))

    assert said.choices[0].message.content == "You said: hi"
    assert len(upstream.turns) == 2


def test_many_async_streams_at_once_stay_apart(
    on_loop: Callable[..., Any], upstream: FakeUpstream
) -> None:
    async def ask(client: openai.AsyncOpenAI, name: str) -> str:
        async with client.responses.stream(model=MODEL, input=name) as stream:
            return (await stream.get_final_response()).output_text

    async def all_at_once(client: openai.AsyncOpenAI) -> list[str]:
        return await asyncio.gather(*(ask(client, f"name {number}") for number in range(20)))

    assert on_loop(all_at_once) == [f"You said: name {number}" for number in range(20)]
