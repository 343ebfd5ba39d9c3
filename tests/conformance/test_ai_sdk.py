"""The Vercel AI SDK: `@ai-sdk/openai` (Responses and chat) and `@ai-sdk/openai-compatible`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clients import COUNTED, FAILURES, gaps, script_paced
from fake_upstream import FakeUpstream, answer, call, failed, message, reasoning, text
from harness import MODEL, Gateway

SCRIPT = "ai_sdk.mjs"
PROVIDERS = pytest.mark.parametrize("provider", ["responses", "chat", "compatible"])
Call = Callable[..., Any]


@pytest.fixture
def sdk(node: Call, gateway: Gateway) -> Call:
    """Call it with a function of the script and a provider."""

    def call(function: str, provider: str, at: Gateway = gateway, **given: Any) -> Any:
        asked = {"url": f"{at.url}/v1", "provider": provider, "model": MODEL, **given}
        return node(SCRIPT, function, **asked)

    return call


def scripted_tool_turns(upstream: FakeUpstream) -> None:
    """First a call, then the answer that uses its result."""
    made = call("get_weather", '{"city":', '"Rome"}', call_id="call_1")
    upstream.script(answer(reasoning("Plan"), made, usage=COUNTED))
    upstream.script(text("Sunny", ".", usage=COUNTED))


@PROVIDERS
def test_c06_generated_text_has_its_finish_and_usage(
    sdk: Call, upstream: FakeUpstream, provider: str
) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    said = sdk("generate", provider)

    assert (said["text"], said["finishReason"]) == ("Hello", "stop")
    assert said["usage"]["inputTokens"] == 50
    assert said["usage"]["outputTokens"] == 20
    assert said["usage"]["totalTokens"] == 70
    assert said["usage"]["inputTokenDetails"]["cacheReadTokens"] == 30
    assert said["usage"]["outputTokenDetails"]["reasoningTokens"] == 8


@PROVIDERS
def test_c06_streamed_text_has_its_finish_and_usage(
    sdk: Call, upstream: FakeUpstream, provider: str
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), usage=COUNTED))

    said = sdk("stream", provider)

    assert ("".join(said["deltas"]), said["finishReason"]) == ("Hello", "stop")
    assert said["usage"]["totalTokens"] == 70


@pytest.mark.parametrize("provider", ["responses", "compatible"])
@pytest.mark.parametrize("function", ["generate", "stream"])
def test_reasoning_is_shown(
    sdk: Call, upstream: FakeUpstream, function: str, provider: str
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hello")))

    assert sdk(function, provider)["reasoning"] == "Plan"


@PROVIDERS
@pytest.mark.parametrize("function", ["toolLoop", "toolLoopStreamed"])
def test_a_tool_loop_runs_the_tool_and_returns_the_answer(
    sdk: Call, upstream: FakeUpstream, function: str, provider: str
) -> None:
    scripted_tool_turns(upstream)

    ran = sdk(function, provider)

    assert (ran["asked"], ran["text"], ran["steps"]) == (["Rome"], "Sunny.", 2)
    sent = upstream.sent["input"]
    assert [item["type"] for item in sent][-2:] == ["function_call", "function_call_output"]
    assert sent[-1]["output"] == "sunny in Rome"


@PROVIDERS
@pytest.mark.parametrize("function", ["object", "outputObject"])
def test_r15_an_object_is_generated(
    sdk: Call, upstream: FakeUpstream, function: str, provider: str
) -> None:
    upstream.script(answer(message("Hm.", phase="commentary"), message('{"city":', '"Rome"}')))

    assert sdk(function, provider) == {"city": "Rome"}
    assert upstream.sent["text"]["format"]["type"] == "json_schema"


def test_an_object_is_generated_without_a_schema_upstream(
    sdk: Call, upstream: FakeUpstream
) -> None:
    upstream.script(text('{"city":', '"Rome"}'))

    made = sdk("object", "compatible", settings={"supportsStructuredOutputs": False})

    assert made == {"city": "Rome"}
    assert upstream.sent["text"]["format"]["type"] == "json_object"


def test_r11_a_second_turn_refers_to_the_items_of_the_first(
    sdk: Call, upstream: FakeUpstream
) -> None:
    upstream.script(answer(reasoning("Plan"), message("First", " answer.")))

    said = sdk("conversation", "responses")

    assert said["text"] == "You said: second"
    assert "item_reference" in [item.get("type") for item in said["sent"]]
    told = [item for item in upstream.sent["input"] if item["type"] == "message"]
    assert [(item["role"], item["content"][0]["text"]) for item in told] == [
        ("user", "first"),
        ("assistant", "First answer."),
        ("user", "second"),
    ]


@pytest.mark.parametrize("provider", ["chat", "compatible"])
def test_a_second_turn_of_chat_carries_the_first(
    sdk: Call, upstream: FakeUpstream, provider: str
) -> None:
    upstream.script(answer(reasoning("Plan"), message("First answer.")))

    said = sdk("conversation", provider)

    assert said["text"] == "You said: second"
    assert [item["role"] for item in upstream.sent["input"]] == ["user", "assistant", "user"]


@PROVIDERS
def test_a_failure_shows_the_message_and_is_not_retried_when_waiting_is_no_use(
    sdk: Call, new_gateway: Callable[..., Gateway], upstream: FakeUpstream, provider: str
) -> None:
    upstream.script(**FAILURES["bad request"][0])

    thrown = sdk("failure", provider, at=new_gateway())

    assert (thrown["status"], thrown["requests"]) == (400, 1)
    assert "Bad input." in thrown["message"]


@PROVIDERS
def test_r13_a_failure_in_the_stream_shows_its_message(
    sdk: Call, upstream: FakeUpstream, provider: str
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    said = sdk("stream", provider)

    assert "".join(said["deltas"]) == "Hel"
    assert said["errors"]
    assert "It went wrong." in said["errors"][0]


@PROVIDERS
def test_the_gaps_between_deltas_are_kept(sdk: Call, upstream: FakeUpstream, provider: str) -> None:
    upstream.script(text("first"))
    script_paced(upstream, times=1)

    arrived = sdk("arrivals", provider)

    assert len(arrived) == 20
    assert sum(gap > 0.05 for gap in gaps(arrived)) >= 15
