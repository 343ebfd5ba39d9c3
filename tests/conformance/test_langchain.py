"""LangChain's `ChatOpenAI`, on Chat Completions and on Responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from clients import COUNTED, FAILURES, gaps, script_paced
from fake_upstream import FakeUpstream, answer, call, failed, message, reasoning, text
from harness import MODEL, Gateway

APIS = pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
Chat = Callable[..., Any]


class Weather(pydantic.BaseModel):
    """Where the weather is asked for."""

    city: str


@pytest.fixture
def chat(gateway: Gateway) -> Iterator[Chat]:
    """Call it with fields of `ChatOpenAI` for one that is pointed at the gateway."""
    from langchain_openai import ChatOpenAI  # takes seconds: only for the tests that need it

    def make(at: Gateway = gateway, **fields: Any) -> Any:
        where = {"base_url": f"{at.url}/v1", "api_key": "any key", "http_client": web}
        return ChatOpenAI(model=MODEL, **where, **fields)

    with openai.DefaultHttpxClient() as web:  # LangChain's own would be kept until the end
        yield make


def shown(content: Any) -> str:
    """The text of a message, whose content is a string on chat and blocks on Responses."""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


@APIS
def test_c06_an_answer_has_its_text_and_usage(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    said = chat(use_responses_api=responses).invoke("hi")

    assert shown(said.content) == "Hello"
    assert said.usage_metadata["total_tokens"] == 70
    assert said.usage_metadata["input_token_details"]["cache_read"] == 30
    assert said.usage_metadata["output_token_details"]["reasoning"] == 8


@APIS
def test_c06_a_stream_has_its_text_once_and_its_usage_once(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), usage=COUNTED))

    first, *rest = chat(use_responses_api=responses, stream_usage=True).stream("hi")
    said = sum(rest, first)

    assert shown(said.content) == "Hello"
    assert said.usage_metadata["total_tokens"] == 70


def test_the_finish_of_a_chat_stream_is_there_once(chat: Chat, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo"))

    first, *rest = chat().stream("hi")

    assert sum(rest, first).response_metadata["finish_reason"] == "stop"


@APIS
@pytest.mark.parametrize("streamed", [False, True], ids=["invoke", "stream"])
def test_a_bound_tool_is_called(
    chat: Chat, upstream: FakeUpstream, streamed: bool, responses: bool
) -> None:
    made = [call("Weather", '{"city":', f'"{city}"}}') for city in ("Rome", "Oslo")]
    upstream.script(answer(reasoning("Plan"), *made))

    bound = chat(use_responses_api=responses, streaming=streamed).bind_tools([Weather])
    said = bound.invoke("weather?")

    assert [each["name"] for each in said.tool_calls] == ["Weather", "Weather"]
    assert [each["args"] for each in said.tool_calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert said.invalid_tool_calls == []


@APIS
def test_a_tool_loop_sends_the_result_back(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    upstream.script(answer(reasoning("Plan"), call("Weather", '{"city":"Rome"}')))
    upstream.script(text("Sunny", "."))
    bound = chat(use_responses_api=responses).bind_tools([Weather])

    asked = HumanMessage("weather?")
    called = bound.invoke([asked])
    result = ToolMessage("sunny", tool_call_id=called.tool_calls[0]["id"])
    said = bound.invoke([asked, called, result])

    assert shown(said.content) == "Sunny."
    sent = [item["type"] for item in upstream.sent["input"]]
    assert sent[-2:] == ["function_call", "function_call_output"]


@APIS
def test_a_second_turn_carries_the_first(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    upstream.script(answer(reasoning("Plan"), message("First answer.")))
    model = chat(use_responses_api=responses)
    asked = [SystemMessage("Be brief."), HumanMessage("first")]

    first = model.invoke(asked)
    second = model.invoke([*asked, first, HumanMessage("second")])

    assert shown(second.content) == "You said: second"
    roles = [item["role"] for item in upstream.sent["input"] if item["type"] == "message"]
    assert roles[-3:] == ["user", "assistant", "user"]


@APIS
def test_r15_structured_output_is_an_object_without_the_commentary(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))

    model = chat(use_responses_api=responses).with_structured_output(Weather)

    assert model.invoke("where?") == Weather(city="Rome")
    assert upstream.sent["text"]["format"]["type"] == "json_schema"


@APIS
def test_r15_structured_output_in_json_mode_is_an_object(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(text('{"city":', '"Rome"}'))

    model = chat(use_responses_api=responses).with_structured_output(Weather, method="json_mode")

    assert model.invoke("where? Answer in JSON.") == Weather(city="Rome")
    assert upstream.sent["text"]["format"]["type"] == "json_object"


@APIS
def test_r15_structured_output_can_be_a_forced_call(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(answer(call("Weather", '{"city":"Rome"}')))

    model = chat(use_responses_api=responses).with_structured_output(
        Weather, method="function_calling"
    )

    assert model.invoke("where?") == Weather(city="Rome")
    assert upstream.sent["tool_choice"] == {"type": "function", "name": "Weather"}


@APIS
def test_streams_work_on_the_loop(chat: Chat, upstream: FakeUpstream, responses: bool) -> None:
    upstream.script(text("Hel", "lo"))

    async def read() -> str:
        async with openai.DefaultAsyncHttpxClient() as web:
            model = chat(use_responses_api=responses, http_async_client=web)
            return "".join([shown(chunk.content) async for chunk in model.astream("hi")])

    assert asyncio.run(read()) == "Hello"


def test_a_failure_is_raised_with_its_message(
    chat: Chat, new_gateway: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    upstream.script(**FAILURES["long quota"][0])

    with pytest.raises(openai.RateLimitError, match="limit") as caught:
        chat(at=new_gateway()).invoke("hi")

    assert caught.value.code == "usage_limit_reached"
    assert len(upstream.turns) == 1


@APIS
def test_c30_a_failure_in_the_stream_is_raised_with_its_message(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    with pytest.raises(Exception, match="It went wrong."):
        list(chat(use_responses_api=responses).stream("hi"))


@APIS
def test_the_gaps_between_deltas_are_kept(
    chat: Chat, upstream: FakeUpstream, responses: bool
) -> None:
    upstream.script(text("first"))
    script_paced(upstream, times=1)
    model = chat(use_responses_api=responses)

    list(model.stream("hi"))  # the first stream of a process waits for imports
    arrived = [time.monotonic() for chunk in model.stream("hi") if shown(chunk.content)]

    assert len(arrived) == 20
    assert sum(gap > 0.05 for gap in gaps(arrived)) >= 15
