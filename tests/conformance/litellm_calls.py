"""Calls functions with LiteLLM: each line in is [function, arguments], each line out its result.

Runs in an environment of its own, because LiteLLM holds back the version of the openai library, and
for many calls, because its import takes seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a price list at import

_look_up = socket.getaddrinfo


def _loopback_only(host: Any, *rest: Any, **how: Any) -> Any:
    if host not in ("127.0.0.1", "localhost", "::1"):
        sys.stderr.write(f"The tests stay on loopback, but {host} was looked up.\n")
        os._exit(3)
    return _look_up(host, *rest, **how)


socket.getaddrinfo = _loopback_only

import litellm  # noqa: E402 - reads the environment and opens sockets from its first line on

litellm.suppress_debug_info = True
Json = dict[str, Any]


def _asked(given: Json) -> Json:
    hi = [{"role": "user", "content": "hi"}]
    return {"api_base": given["url"], "api_key": "any key", "messages": hi, **given["body"]}


def complete(given: Json) -> Any:
    return litellm.completion(**_asked(given)).model_dump()


def complete_on_the_loop(given: Json) -> Any:
    return asyncio.run(litellm.acompletion(**_asked(given))).model_dump()


def stream(given: Json) -> Any:
    """The chunks, and the whole that LiteLLM builds of them."""
    chunks = list(litellm.completion(**_asked(given), stream=True))
    whole = litellm.stream_chunk_builder(chunks).model_dump()
    return {"chunks": [chunk.model_dump() for chunk in chunks], "whole": whole}


def arrivals(given: Json) -> Any:
    """When the chunks with text came, in the second of two streams.

    At its very first chunk LiteLLM loads more of itself for up to a second; what arrives meanwhile
    is then handed out all at once.
    """
    for _ in litellm.completion(**_asked(given), stream=True):
        pass
    return [
        time.monotonic()
        for chunk in litellm.completion(**_asked(given), stream=True)
        if chunk.choices and chunk.choices[0].delta.content
    ]


def respond(given: Json) -> Any:
    asked = _asked(given)
    del asked["messages"]
    response = litellm.responses(input="hi", **asked)
    return {"text": response.output_text, "total": response.usage.total_tokens}


def fail(given: Json) -> Any:
    """The exception of a call, in the middle of its stream or before."""
    try:
        for _ in litellm.completion(**_asked(given), stream=True):
            pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the test compares it
        status = getattr(error, "status_code", None)
        return {"name": type(error).__name__, "status": status, "message": str(error)}
    return None


FUNCTIONS: dict[str, Callable[[Json], Any]] = {
    function.__name__: function
    for function in (arrivals, complete, complete_on_the_loop, fail, respond, stream)
}

if __name__ == "__main__":
    # What LiteLLM prints must not stand between the results.
    results, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        results.write(json.dumps(FUNCTIONS[name](arguments)) + "\n")
        results.flush()
