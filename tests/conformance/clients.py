"""What the tests of all client libraries share: programs to call, the paced stream, its gaps."""

from __future__ import annotations

import json as jsonlib
import subprocess
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fake_upstream import (
    CHALLENGE_PAGE,
    CODEX,
    FakeUpstream,
    Json,
    error_json,
    limit_reached,
    make_token,
    text,
    usage,
)
from harness import MODEL

QUIET = {
    "DO_NOT_TRACK": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1,localhost,::1",
}
"""Variables that keep libraries on loopback: no telemetry, no proxy."""

HI: Any = [{"role": "user", "content": "hi"}]
COUNTED = usage(50, 20, cached=30, reasoning_tokens=8)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": False}

HTML = {"content-type": "text/html", "cf-mitigated": "challenge"}
FAILURES: dict[str, tuple[Json, str, int, str, int]] = {
    "bad request": (
        {"status": 400, "json": error_json("Bad input.", code="invalid_value")},
        "BadRequestError",
        400,
        "invalid_value",
        1,
    ),
    "forbidden": (
        {"status": 403, "body": CHALLENGE_PAGE, "headers": HTML},
        "PermissionDeniedError",
        403,
        "upstream_forbidden",
        1,
    ),
    "not found": (
        {"status": 404, "json": error_json("No such model.", code="model_not_found")},
        "NotFoundError",
        404,
        "model_not_found",
        1,
    ),
    "long quota": (
        {"status": 429, "json": limit_reached(7200)},
        "RateLimitError",
        429,
        "usage_limit_reached",
        1,
    ),
    "server error": (
        {"status": 500, "json": error_json("Oops.", "server_error")},
        "InternalServerError",
        502,
        "upstream_error",
        3,
    ),
    "bad gateway": (
        {"status": 502, "body": b"Bad Gateway"},
        "InternalServerError",
        502,
        "upstream_error",
        3,
    ),
    "overloaded": (
        {
            "status": 503,
            "json": error_json("Busy.", "server_error", code="server_is_overloaded"),
            "headers": {"retry-after": "1"},
        },
        "InternalServerError",
        503,
        "overloaded",
        3,
    ),
}
"""What the backend answers each time; the class that the official libraries raise for it, with
status and code; how many model calls their two default retries make of it."""

SHORT_LIMIT: Json = {
    "status": 429,
    "json": error_json("Rate limit reached. Please try again in 2s.", "rate_limit_exceeded"),
}


def run_client(command: list[str], folder: Path, given: Json) -> Any:
    """Run a program that reads JSON from stdin and writes JSON to stdout; fail if it fails."""
    done = subprocess.run(
        command, cwd=folder, input=jsonlib.dumps(given), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return jsonlib.loads(done.stdout)


def direct(upstream: FakeUpstream) -> Json:
    """Where and as whom a library reaches the scripted backend itself, without azt."""
    return {
        "url": upstream.url + CODEX,
        "key": make_token(),
        "headers": {"chatgpt-account-id": "acct-1"},
        "body": {
            "model": MODEL,
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "stream": True,
            "store": False,
        },
    }


def script_paced(upstream: FakeUpstream, times: int) -> None:
    """The stream that the gap tests read: 20 deltas, 100 ms apart."""
    upstream.script(text(*(f"word{number} " for number in range(20))), delays=0.1, times=times)


def gaps(arrived: Iterable[float]) -> list[float]:
    """Seconds between the arrivals of neighbours."""
    return [after - before for before, after in pairwise(arrived)]


def assert_same_gaps(through: list[float], reference: list[float]) -> None:
    """Arrivals through azt are spread like those of the direct connection at the same time."""
    assert len(through) == len(reference) == 20
    for arrived in (through, reference):
        assert sum(gap > 0.05 for gap in gaps(arrived)) >= 15, gaps(arrived)
    assert abs(median(gaps(through)) - median(gaps(reference))) < 0.03
