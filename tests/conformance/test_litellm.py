"""LiteLLM as a client: `openai/<model>` with azt as its `api_base`."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest
from clients import CHAT_TOOL, COUNTED, FAILURES, QUIET, gaps, script_paced
from fake_upstream import FakeUpstream, Json, answer, call, failed, message, reasoning, text
from harness import MODEL, ROOT, Gateway, is_foreign

PREPARED = ROOT / ".azt-test-env" / "litellm" / "bin" / "python"
PYTHON = Path(os.environ.get("AZT_TEST_LITELLM_PYTHON") or PREPARED)
SCRIPT = Path(__file__).with_name("litellm_calls.py")
COMPLETIONS = pytest.mark.parametrize("function", ["complete", "complete_on_the_loop"])

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="LiteLLM is not installed: `python3 tests` makes its environment"
)
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Call it with a function of the script and its arguments; one process answers them all."""
    folder = tmp_path_factory.mktemp("litellm")
    kept = {name: value for name, value in os.environ.items() if not is_foreign(name)}
    log = folder / "litellm.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [PYTHON, SCRIPT],
            cwd=folder,
            env={**kept, **QUIET, "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        asking, answering = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        def call(function: str, given: Json) -> Any:
            asking.write(jsonlib.dumps([function, given]) + "\n")
            asking.flush()
            line = answering.readline()
            assert line, log.read_text()
            return jsonlib.loads(line)

        yield call
        asking.close()


@pytest.fixture
def litellm(gateway: Gateway, ask: Call) -> Call:
    """Call it with a function of the script and request fields."""

    def call(function: str, at: Gateway = gateway, **body: Any) -> Any:
        return ask(function, {"url": f"{at.url}/v1", "body": {"model": f"openai/{MODEL}", **body}})

    return call


def only_message(said: Json) -> Json:
    (choice,) = said["choices"]
    return choice["message"]


@COMPLETIONS
def test_c06_an_answer_has_its_text_finish_usage_and_reasoning(
    litellm: Call, upstream: FakeUpstream, function: str
) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), usage=COUNTED))

    said = litellm(function)

    assert only_message(said)["content"] == "Hello"
    assert only_message(said)["reasoning_content"] == "Plan"
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["total_tokens"] == 70
    assert upstream.sent["model"] == MODEL


def test_c06_a_stream_has_its_text_finish_and_usage(litellm: Call, upstream: FakeUpstream) -> None:
    upstream.script(answer(reasoning("Plan"), message("Hel", "lo"), usage=COUNTED))

    read = litellm("stream", stream_options={"include_usage": True})

    assert only_message(read["whole"])["content"] == "Hello"
    assert only_message(read["whole"])["reasoning_content"] == "Plan"
    finishes = [
        chunk["choices"][0]["finish_reason"] for chunk in read["chunks"] if chunk["choices"]
    ]
    assert [finish for finish in finishes if finish] == ["stop"]
    assert read["whole"]["usage"]["total_tokens"] == 70


def test_a_tool_is_called_and_its_result_sent_back(litellm: Call, upstream: FakeUpstream) -> None:
    made = call("get_weather", '{"city":', '"Rome"}', call_id="call_1")
    upstream.script(answer(reasoning("Plan"), made))
    upstream.script(text("Sunny", "."))
    asked: Json = {"role": "user", "content": "weather?"}

    called = only_message(litellm("complete", messages=[asked], tools=[CHAT_TOOL]))
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    said = litellm("complete", messages=[asked, called, result], tools=[CHAT_TOOL])

    assert called["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"city":"Rome"}',
    }
    assert only_message(said)["content"] == "Sunny."
    sent = [item["type"] for item in upstream.sent["input"]]
    assert sent == ["message", "function_call", "function_call_output"]


def test_streamed_parallel_calls_are_merged(litellm: Call, upstream: FakeUpstream) -> None:
    made = [call("get_weather", '{"city":', f'"{city}"}}') for city in ("Rome", "Oslo")]
    upstream.script(answer(reasoning("Plan"), *made, interleaved=True))

    whole = litellm("stream", tools=[CHAT_TOOL])["whole"]

    calls = only_message(whole)["tool_calls"]
    assert [each["function"]["name"] for each in calls] == ["get_weather", "get_weather"]
    assert [each["function"]["arguments"] for each in calls] == [
        '{"city":"Rome"}',
        '{"city":"Oslo"}',
    ]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


def test_r01_a_response_has_its_text_and_usage(litellm: Call, upstream: FakeUpstream) -> None:
    upstream.script(text("Hel", "lo", usage=COUNTED))

    assert litellm("respond") == {"text": "Hello", "total": 70}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("bad request", "BadRequestError"),
        ("forbidden", "APIError"),  # it has no class of its own for 403 from an OpenAI API
        ("not found", "NotFoundError"),
        ("long quota", "RateLimitError"),
        ("server error", "BadGatewayError"),
        ("overloaded", "ServiceUnavailableError"),
    ],
)
def test_a_failure_raises_its_class(
    litellm: Call,
    new_gateway: Callable[..., Gateway],
    upstream: FakeUpstream,
    case: str,
    name: str,
) -> None:
    how, _, status, _, _ = FAILURES[case]
    upstream.script(**how, times=3)

    raised = litellm("fail", at=new_gateway(), max_retries=0)

    assert (raised["name"], raised["status"]) == (name, status)
    assert len(upstream.turns) == 1


def test_c30_a_failure_in_the_stream_is_raised_with_its_message(
    litellm: Call, upstream: FakeUpstream
) -> None:
    upstream.script(failed("server_error", "It went wrong.", message("Hel")))

    assert "It went wrong." in litellm("fail")["message"]


def test_the_gaps_between_deltas_are_kept(litellm: Call, upstream: FakeUpstream) -> None:
    upstream.script(text("first"))
    script_paced(upstream, times=1)

    arrived = litellm("arrivals")

    assert len(arrived) == 20
    assert sum(gap > 0.05 for gap in gaps(arrived)) >= 15
