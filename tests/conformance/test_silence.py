"""Acceptance case C33 for the libraries: the comments that fill a silence disturb none of them.

LangChain and LiteLLM read their streams with the official Python library.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, text
from harness import MODEL, Client, Gateway

SILENCE_S = 17.0  # azt sends the first comment after 15 s
STREAMS = 7


@pytest.mark.timeout(180)
def test_c33_every_library_reads_over_a_silence(
    node: Callable[..., Any], gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("before", " after"), delays={5: SILENCE_S}, times=STREAMS)
    url, body = f"{gateway.url}/v1", {"model": MODEL}

    def python() -> str:
        with (
            openai.OpenAI(base_url=url, api_key="any key", max_retries=0) as client,
            client.responses.stream(model=MODEL, input="hi") as stream,
        ):
            return stream.get_final_response().output_text

    with ThreadPoolExecutor(STREAMS) as threads:
        raw = threads.submit(Client(gateway.url, timeout=60.0).chat_stream)
        responses = threads.submit(python)
        chat_helper = threads.submit(
            node, "openai_node.mjs", "chatStreamHelper", url=url, body=body
        )
        helper = threads.submit(node, "openai_node.mjs", "responseStreamHelper", url=url, body=body)
        sdk = [
            threads.submit(node, "ai_sdk.mjs", "stream", url=url, provider=provider, model=MODEL)
            for provider in ("responses", "chat", "compatible")
        ]

    assert b"\n: " in raw.result().body
    assert responses.result() == "before after"
    assert chat_helper.result()["content"] == "before after"
    assert helper.result()["text"] == "before after"
    assert ["".join(each.result()["deltas"]) for each in sdk] == ["before after"] * 3
