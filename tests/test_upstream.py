"""The backend: its errors in every shape, the relay of one event stream, the model catalogue."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trustme
from fake_upstream import codex_models_cache, limit_reached, model_info
from hypothesis import given
from hypothesis import strategies as st
from loopback import STREAM_HEAD, Peer, Script, Server, answer, chunk, once, sized

import azt

Json = dict[str, Any]

NOW = 1_800_000_000.0

# -- Errors of the backend ------------------------------------------------------------------------


def error(status: int, body: Any, **headers: str) -> azt.UpstreamError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return azt.upstream_error(status, named, raw, NOW)


def coded(code: str, message: str = "It failed.", **fields: Any) -> Json:
    return {"error": {"code": code, "message": message, **fields}}


def typed(kind: str, message: str = "It failed.") -> Json:
    return {"error": {"type": kind, "message": message}}


HTML = b"<!DOCTYPE html><html><title>Just a moment...</title></html>"
INVALIDATED = {**coded("token_invalidated", type="invalid_request_error"), "status": 401}
UNSUPPORTED = "The 'x' model is not supported when using Codex with a ChatGPT account."

ANSWERS: dict[str, tuple[int, Any, tuple[int, str, str]]] = {
    "400 detail": (
        400,
        {"detail": "Stream must be true"},
        (400, "invalid_request_error", "request"),
    ),
    "400 coded": (400, coded("invalid_value", param="input[0]"), (400, "invalid_value", "request")),
    "400 typed": (400, typed("invalid_request_error"), (400, "invalid_request_error", "request")),
    "400 html": (400, HTML, (400, "invalid_request_error", "request")),
    "409": (409, coded("conflict"), (400, "conflict", "request")),
    "422": (422, {}, (400, "invalid_request_error", "request")),
    "400 unsupported model": (400, {"detail": UNSUPPORTED}, (404, "model_not_found", "request")),
    "404 model": (404, coded("model_not_found"), (404, "model_not_found", "request")),
    "404 model in words": (404, {"detail": "no such model"}, (404, "model_not_found", "request")),
    "400 context": (
        400,
        coded("context_length_exceeded"),
        (400, "context_length_exceeded", "request"),
    ),
    "400 policy": (400, coded("cyber_policy"), (400, "content_policy_violation", "request")),
    "400 moderation": (400, coded("moderation_blocked"), (400, "moderation_blocked", "request")),
    "401 expired": (401, coded("token_expired"), (401, "account_auth_expired", "token")),
    "401 detail": (401, {"detail": "Unauthorized"}, (401, "account_auth_expired", "token")),
    "401 html": (401, HTML, (401, "account_auth_expired", "token")),
    "401 invalidated": (401, INVALIDATED, (401, "account_auth_expired", "account")),
    "401 revoked": (401, coded("token_revoked"), (401, "account_auth_expired", "account")),
    "402 workspace": (
        402,
        {"detail": {"code": "deactivated_workspace"}},
        (403, "account_unusable", "account"),
    ),
    "402": (402, {"detail": "pay"}, (403, "upstream_forbidden", "account")),
    "403 json": (403, {"detail": "region not supported"}, (403, "upstream_forbidden", "account")),
    "403 workspace": (
        403,
        coded("workspace_access_denied"),
        (403, "account_unusable", "account"),
    ),
    "403 html": (403, HTML, (403, "upstream_forbidden", "request")),
    "413": (413, HTML, (413, "request_too_large", "request")),
    "429 limit": (429, limit_reached(60), (429, "usage_limit_reached", "account")),
    "429 not included": (429, typed("usage_not_included"), (403, "usage_not_included", "account")),
    "429 burst": (429, typed("rate_limit_exceeded"), (429, "rate_limit_exceeded", "account")),
    "429 burst by another name": (
        429,
        typed("rate_limit_error"),
        (429, "rate_limit_exceeded", "account"),
    ),
    "429 html": (429, HTML, (429, "rate_limit_exceeded", "account")),
    "500": (500, coded("server_error"), (502, "upstream_error", "transient")),
    "500 html": (500, HTML, (502, "upstream_error", "transient")),
    "502": (502, b"", (502, "upstream_error", "transient")),
    "503": (503, coded("server_is_overloaded"), (503, "overloaded", "transient")),
    "503 slow down": (503, coded("slow_down"), (503, "overloaded", "transient")),
    "503 html": (503, HTML, (503, "overloaded", "transient")),
    "504": (504, HTML, (502, "upstream_error", "transient")),
    "524": (524, HTML, (502, "upstream_error", "transient")),
    "529": (529, typed("overloaded_error"), (503, "overloaded", "transient")),
    "200 json": (200, {"ok": True}, (502, "upstream_error", "request")),
    "200 html": (200, HTML, (502, "upstream_error", "request")),
    "204": (204, b"", (502, "upstream_error", "request")),
    "302": (302, b"", (502, "upstream_error", "request")),
    "304": (304, b"", (502, "upstream_error", "request")),
}


@pytest.mark.parametrize("status, body, expected", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_no_stream_becomes_this_error(
    status: int, body: Any, expected: tuple[int, str, str]
) -> None:
    got = error(status, body)
    assert (got.status, got.code, got.fault) == expected
    assert got.message
    assert "<" not in got.message, "a page is never passed through"


@pytest.mark.parametrize(
    "status, kind",
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (400, "invalid_request_error"),
        (500, "server_error"),
    ],
)
def test_the_type_is_openais(status: int, kind: str) -> None:
    assert error(status, {"detail": "no"}).type == kind


def test_param_and_message_are_kept() -> None:
    got = error(400, coded("invalid_value", "Bad thing.", param="input[0].content"))
    assert (got.param, got.message) == ("input[0].content", "Bad thing.")


def test_a_code_beats_a_type_and_a_known_type_an_unknown_code() -> None:
    both = {"error": {"code": "server_is_overloaded", "type": "usage_limit_reached"}}
    assert error(503, both).code == "overloaded"
    unknown = {"error": {"code": "brand_new", "type": "usage_limit_reached"}}
    assert error(429, unknown).code == "usage_limit_reached"


def test_a_refused_model_names_the_way_to_the_list() -> None:
    got = error(400, {"detail": UNSUPPORTED})
    assert got.param == "model"
    assert "azt models" in got.message


def test_an_exceeded_context_is_named_in_the_words_agents_look_for() -> None:
    got = error(400, coded("context_length_exceeded", "Too much."))
    assert "context window" in got.message and "context length exceeded" in got.message
    assert got.param == "input"
    said = "Your input exceeds the context window of this model."
    assert error(400, coded("context_length_exceeded", said)).message == said


def test_a_browser_check_is_told_from_other_pages() -> None:
    assert "browser check" in error(403, HTML, cf_mitigated="challenge").message
    assert "browser check" not in error(403, HTML).message
    assert "proxy" in error(403, HTML).message


def test_an_overload_says_when_to_come_back() -> None:
    assert error(503, {}).headers == {"retry-after": "5"}
    assert error(503, {}, retry_after="17").headers == {"retry-after": "17"}
    assert error(503, {}, retry_after="9999").headers == {"retry-after": "60"}


def test_a_long_message_is_cut_and_a_secret_masked() -> None:
    assert len(error(400, {"detail": "x" * 100_000}).message) == 2048
    got = error(400, {"detail": "your token Bearer s3cr3t is bad"})
    assert "s3cr3t" not in json.dumps(azt.error_body(got))


WAITS: dict[str, tuple[Json, str, int]] = {
    "resets_at": ({"resets_at": NOW + 7200}, "", 7200),
    "resets_at before the rest": ({"resets_at": NOW + 10, "resets_in_seconds": 99}, "7", 10),
    "resets_in_seconds": ({"resets_in_seconds": 1800}, "", 1800),
    "a header": ({}, "120", 120),
    "a header with a fraction": ({}, "0.2", 1),
    "a header with a date": ({}, email.utils.formatdate(NOW + 90, usegmt=True), 90),
    "a header with a past date": ({}, email.utils.formatdate(NOW - 90, usegmt=True), 1),
    "a negative header": ({}, "-5", 1),
    "a huge header": ({}, "9" * 30, 604_800),
    "an endless header": ({}, "inf", 300),
    "a header that is none": ({}, "soon", 300),
    "nothing": ({}, "", 300),
    "in the past": ({"resets_at": NOW - 5}, "", 1),
    "zero": ({"resets_at": 0}, "", 300),
    "negative seconds": ({"resets_in_seconds": -9}, "", 1),
    "in a thousand years": ({"resets_at": NOW + 3e10}, "", 604_800),
    "infinite": ({"resets_at": float("inf")}, "", 300),
    "infinite seconds": ({"resets_in_seconds": float("inf")}, "", 300),
    "beyond floats": ({"resets_at": 10**400}, "", 300),
    "a text": ({"resets_at": "soon", "resets_in_seconds": "60"}, "", 300),
    "a boolean": ({"resets_at": True, "resets_in_seconds": True}, "", 300),
    "null": ({"resets_at": None, "resets_in_seconds": None}, "", 300),
}


@pytest.mark.parametrize("fields, header, wait_s", WAITS.values(), ids=WAITS)
def test_the_wait_of_a_usage_limit_is_read_and_bounded(
    fields: Json, header: str, wait_s: int
) -> None:
    inner = {"type": "usage_limit_reached", "message": "Reached.", "plan_type": "plus", **fields}
    raw = json.dumps({"error": inner}).replace("Infinity", "1e999").encode()
    got = error(429, raw, **({"retry_after": header} if header else {}))
    assert got.headers["retry-after"] == str(wait_s)
    assert got.headers.get("x-should-retry") == ("false" if wait_s > 60 else None)
    assert got.extra["resets_in_seconds"] == wait_s
    assert got.extra["resets_at"] == NOW + wait_s
    assert got.extra["plan_type"] == "plus"
    assert got.type == "usage_limit_reached"
    assert "resets at 20" in got.message


@pytest.mark.parametrize(
    "said, wait_s",
    [
        ("Please try again in 2s.", 2),
        ("try again in 1.2 seconds", 2),
        ("Try again in 800ms", 1),
        ("try again in 3 minutes", 180),
        ("try again in 2 m", 120),
        ("try again later", 5),
    ],
)
def test_the_wait_of_a_burst_is_read_from_its_words(said: str, wait_s: int) -> None:
    got = error(429, coded("rate_limit_exceeded", said))
    assert got.headers["retry-after"] == str(wait_s)
    assert got.type == "rate_limit_error"


@given(st.text(max_size=40))
def test_no_retry_after_header_crashes(value: str) -> None:
    wait = int(error(429, {}, retry_after=value).headers["retry-after"])
    assert 1 <= wait <= 604_800


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "error detail code type message param status response resets_at "
                "resets_in_seconds plan_type error_description status_code".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(ANY_JSON, st.sampled_from([200, 400, 401, 402, 403, 404, 429, 500, 503, 999]))
def test_no_body_crashes_the_reading_of_an_error(body: Any, status: int) -> None:
    raw = json.dumps(body).replace("Infinity", "1e999").encode()
    got = error(status, raw)
    assert got.status >= 400
    json.dumps(azt.error_body(got))


@given(st.dictionaries(st.text(max_size=8), ANY_JSON, max_size=5) | ANY_JSON)
def test_no_event_crashes_the_reading_of_an_error(event: Any) -> None:
    if isinstance(event, dict):
        assert azt.event_error(event, NOW).status >= 400


EVENTS: dict[str, tuple[Json, tuple[int, str, str]]] = {
    "overload": (
        {"type": "response.failed", "response": coded("server_is_overloaded")},
        (503, "overloaded", "transient"),
    ),
    "limit": (
        {"type": "response.failed", "response": coded("rate_limit_exceeded", "try again in 9 s")},
        (429, "rate_limit_exceeded", "account"),
    ),
    "quota": (
        {"type": "response.failed", "response": coded("insufficient_quota")},
        (429, "usage_limit_reached", "account"),
    ),
    "prompt": (
        {"type": "response.failed", "response": coded("invalid_prompt")},
        (400, "content_policy_violation", "request"),
    ),
    "image": (
        {"type": "response.failed", "response": coded("invalid_image_format")},
        (400, "invalid_image_format", "request"),
    ),
    "encrypted": (
        {"type": "response.failed", "response": coded("invalid_encrypted_content")},
        (400, "invalid_encrypted_content", "request"),
    ),
    "server": (
        {"type": "response.failed", "response": coded("server_error")},
        (502, "upstream_error", "transient"),
    ),
    "no error": (
        {"type": "response.failed", "response": {"error": None}},
        (502, "upstream_error", "transient"),
    ),
    "no response": ({"type": "response.failed"}, (502, "upstream_error", "transient")),
    "flat": (
        {"type": "error", "code": "context_length_exceeded", "message": "x", "param": None},
        (400, "context_length_exceeded", "request"),
    ),
    "nested": (
        {"type": "error", "status": 400, "error": {"code": "x", "message": "y"}},
        (400, "x", "request"),
    ),
    "nested limit": (
        {"type": "error", "status_code": 429, **limit_reached(60)},
        (429, "usage_limit_reached", "account"),
    ),
    "nested 401": (
        {"type": "error", "status": 401, **coded("token_expired")},
        (401, "account_auth_expired", "token"),
    ),
}


@pytest.mark.parametrize("event, expected", EVENTS.values(), ids=EVENTS)
def test_a_failure_event_becomes_this_error(event: Json, expected: tuple[int, str, str]) -> None:
    got = azt.event_error(event, NOW)
    assert (got.status, got.code, got.fault) == expected
    assert got.message


# -- The relay ------------------------------------------------------------------------------------


def sse(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


CREATED = sse("response.created", response={})
HANDSHAKE = (
    CREATED
    + sse("response.in_progress")
    + sse("keepalive")
    + sse("codex.rate_limits", limit_reached=True)
    + sse("response.metadata")
    + sse("response.queued")
    + b": comment\n\n"
)
COMPLETED = sse("response.completed", response={"usage": {}})
END = b"0\r\n\r\n"


def delta(text: str) -> bytes:
    return sse("response.output_text.delta", delta=text)


WHOLE = HANDSHAKE + delta("Hel") + delta("lo") + COMPLETED


class Words:
    """A translator that keeps it simple: the deltas with bars around them, then `END`."""

    def __init__(self) -> None:
        self.done = self.stopped = False
        self.failure: azt.AztError | None = None
        self.usage: Json | None = None
        self.kinds: list[str] = []
        self.pieces: list[str] = []

    def feed(self, data: bytes) -> bytes:
        event = json.loads(data)
        self.kinds.append(event["type"])
        if event["type"] == "response.completed":
            self.done = True
            return b"END"
        piece = str(event.get("delta", ""))
        if piece == "crash":
            raise KeyError("a mistake in the translator")
        self.stopped = piece == "stop"
        self.pieces.append(piece)
        return f"|{piece}|".encode() if piece else b""

    def absorb(self, data: bytes) -> bytes:
        self.feed(data)
        return b""

    def fail(self, error: azt.AztError) -> bytes:
        self.failure, self.done = error, True
        return f"!{error.code}".encode()

    def result(self) -> Json:
        return {"text": "".join(self.pieces)}


class Wall:
    """A sink that keeps what is written to it."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.finished = 0
        self.was_cut = False
        self.news = asyncio.Event()

    def write(self, data: bytes) -> None:
        assert data and not self.finished
        self.written += data
        self.news.set()

    def finish(self) -> None:
        self.finished += 1
        self.news.set()

    def cut(self) -> None:
        self.was_cut = True
        self.news.set()

    async def until(self, condition: Callable[[Wall], object]) -> None:
        async with asyncio.timeout(5):
            while not condition(self):
                self.news.clear()
                await self.news.wait()


class Line:
    """Relays over one server and one pool."""

    def __init__(self, server: Server, pool: azt.ConnectionPool) -> None:
        self.server = server
        self.pool = pool
        self.threads = azt.WorkerPool("call", 8)
        self.relays: list[azt.Relay] = []
        self.words = Words()
        self.wall = Wall()

    async def open(self, streaming: bool = True) -> azt.Relay:
        """A relay at its beginning, not yet held back."""
        self.words, self.wall = Words(), Wall()
        credentials = azt.Credentials("token", "acct-1")
        url, session = self.server.url, "session-1"
        opened = await azt.open_stream(self.pool, self.threads, url, credentials, b"{}", session)
        self.relays.append(azt.Relay(self.pool, opened, self.words, streaming))
        return self.relays[-1]

    def close(self) -> None:
        for relay in self.relays:
            relay.cancel()
        self.pool.close()

    async def start(self, hold_s: float = 5.0) -> azt.Relay:
        """A relay behind its hold-back that writes to the wall."""
        relay = await self.open()
        await relay.ready(hold_s)
        relay.start(self.wall)
        return relay

    async def whole(self) -> bytes:
        """What a streaming client gets from beginning to end."""
        await self.start()
        await self.wall.until(lambda wall: wall.finished)
        return bytes(self.wall.written)

    async def refused(self, hold_s: float = 5.0) -> azt.AztError:
        relay = await self.open()
        with pytest.raises(azt.AztError) as caught:
            await relay.ready(hold_s)
        assert relay.ended
        assert relay.answer.sock is None
        return caught.value

    def kept(self) -> bool:
        """Is there a connection for the next call? (It goes back into the pool.)"""
        key = (self.server.scheme, "127.0.0.1", self.server.port)
        sock = self.pool.take(key)
        if sock is not None:
            self.pool.give(key, sock)
        return sock is not None

    async def until_kept(self) -> None:
        async with asyncio.timeout(5):
            while not self.kept():  # noqa: ASYNC110 - a pool tells nobody
                await asyncio.sleep(0.002)


class Chunks:
    """A script that sends a stream in steps; the test opens each next step."""

    def __init__(self, *steps: bytes, head: bytes = STREAM_HEAD, close: bool = False) -> None:
        self._steps = steps
        self._head = head
        self._close = close
        self._gates = [threading.Event() for _ in steps]
        self.left_at = 0.0
        self.left = threading.Event()

    def go(self, step: int) -> None:
        self._gates[step].set()

    def __call__(self, peer: Peer) -> None:
        peer.read_request()
        peer.send(self._head)
        for gate, step in zip(self._gates, self._steps, strict=True):
            assert gate.wait(10)
            peer.send(step)
        if not self._close:
            with contextlib.suppress(OSError):
                peer.wait_closed()
            self.left_at = time.monotonic()
            self.left.set()


def stream(body: bytes, end: bytes = END) -> bytes:
    return STREAM_HEAD + chunk(body) + end


def in_pieces(data: bytes, size: int) -> Script:
    """Answer every request with a stream of chunks of `size` bytes, each sent by itself."""

    def script(peer: Peer) -> None:
        while peer.read_request():
            peer.send(STREAM_HEAD)
            for at in range(0, len(data), size):
                peer.send(chunk(data[at : at + size]))
            peer.send(END)

    return script


@contextlib.asynccontextmanager
async def line(*scripts: Script, tls: ssl.SSLContext | None = None, ca_file: str = "") -> Any:
    with Server(*scripts, tls=tls) as server:
        egress = azt.Egress(ca_file=ca_file, own_hosts=frozenset({"127.0.0.1"}))
        with contextlib.closing(Line(server, azt.ConnectionPool(egress))) as made:
            yield made


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(30):
            return await main()

    return asyncio.run(within())


def whole(*scripts: Script) -> tuple[bytes, list[str]]:
    """What a streaming client gets, and the kinds of the events that were translated."""

    async def main() -> tuple[bytes, list[str]]:
        async with line(*scripts) as one:
            written = await one.whole()
            return written, one.words.kinds

    got: tuple[bytes, list[str]] = run(main)
    return got


def refusal(script: Script) -> azt.UpstreamError:
    async def main() -> azt.AztError:
        async with line(script) as one:
            return await one.refused()

    got: azt.UpstreamError = run(main)
    return got


KINDS = [
    "response.created",
    "response.in_progress",
    "keepalive",
    "codex.rate_limits",
    "response.metadata",
    "response.queued",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.completed",
]


@pytest.mark.parametrize("size", [1, 10, 4096])
def test_a_stream_is_relayed_in_any_pieces(size: int) -> None:
    assert whole(in_pieces(WHOLE, size)) == (b"|Hel||lo|END", KINDS)


def test_a_stream_that_comes_with_its_head_is_relayed() -> None:
    assert whole(answer(stream(WHOLE))) == (b"|Hel||lo|END", KINDS)


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_other_line_ends_are_relayed(newline: bytes) -> None:
    body = WHOLE.replace(b"\n", newline) + (b"\n" if newline == b"\r" else b"")
    assert whole(in_pieces(body, 7))[0] == b"|Hel||lo|END"


def test_the_end_of_the_connection_may_end_the_body() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
    assert whole(once(head + WHOLE))[0] == b"|Hel||lo|END"


def test_a_length_may_end_the_body() -> None:
    response = sized(WHOLE, head=b"Content-Type: text/event-stream\r\n")

    async def main() -> bytes:
        async with line(answer(response)) as one:
            assert await one.whole() == b"|Hel||lo|END"
            await one.until_kept()
            written: bytes = await one.whole()
            assert one.server.connections == 1
            return written

    assert run(main) == b"|Hel||lo|END"


def test_an_absorbed_stream_writes_nothing_and_gives_the_whole() -> None:
    async def main() -> Json:
        async with line(answer(stream(WHOLE))) as one:
            relay = await one.open(streaming=False)
            await relay.ready(5.0)
            await relay.whole()
            result: Json = relay.translator.result()
            return result

    assert run(main) == {"text": "Hello"}


def test_nothing_but_the_reader_runs_while_a_stream_is_open() -> None:
    script = Chunks(chunk(delta("a")), chunk(delta("b")))
    script.go(0)

    async def main() -> tuple[int, int]:
        async with line(script) as one:
            threads = threading.active_count()
            await one.start()
            tasks = len(asyncio.all_tasks())
            idle = one.threads.threads
            assert threading.active_count() - threads <= idle + 1  # the server's own thread
            script.go(1)
            await one.wall.until(lambda wall: b"|b|" in wall.written)
            return tasks, len(asyncio.all_tasks())

    assert run(main) == (1, 1)


# Hold-back


def test_handshake_events_are_held_until_something_was_generated() -> None:
    script = Chunks(chunk(HANDSHAKE), chunk(delta("a")), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            relay = await one.open()
            ready = asyncio.ensure_future(relay.ready(10.0))
            await asyncio.wait([ready], timeout=0.1)
            assert not ready.done()
            assert one.words.kinds == []
            script.go(1)
            await ready
            relay.start(one.wall)
            script.go(2)
            await one.wall.until(lambda wall: wall.finished)
            return bytes(one.wall.written)

    assert run(main) == b"|a|END"


def test_a_terminal_event_ends_the_hold_back() -> None:
    assert whole(answer(stream(CREATED + COMPLETED)))[0] == b"END"


def test_an_unknown_event_counts_as_generated() -> None:
    script = Chunks(chunk(CREATED + sse("response.brand_new")), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> list[str]:
        async with line(script) as one:
            await one.start()
            kinds = list(one.words.kinds)
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)
            return kinds

    assert run(main) == ["response.created", "response.brand_new"]


def test_the_hold_back_has_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "MAX_HELD_BYTES", 1000)
    script = Chunks(chunk(sse("response.metadata", x="y" * 1100)), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> None:
        async with line(script) as one:
            await one.start()
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)

    run(main)


@pytest.mark.parametrize("streaming, expected", [(True, b": keep-alive\n\n"), (False, b"")])
def test_when_nothing_comes_the_answer_opens_late(streaming: bool, expected: bytes) -> None:
    script = Chunks(chunk(CREATED), chunk(delta("a") + COMPLETED) + END)
    script.go(0)

    async def main() -> tuple[bytes, bytes]:
        async with line(script) as one:
            relay = await one.open(streaming)
            started = time.monotonic()
            await relay.ready(0.1)
            assert 0.09 < time.monotonic() - started < 2
            relay.start(one.wall)
            first = bytes(one.wall.written)
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)
            return first, bytes(one.wall.written).removeprefix(first)

    first, rest = run(main)
    assert first == expected
    assert rest == (b"|a|END" if streaming else b"")


FAILURES: dict[str, tuple[bytes, tuple[int, str]]] = {
    "overload after the handshake": (
        HANDSHAKE + sse("response.failed", response=coded("server_is_overloaded")),
        (503, "overloaded"),
    ),
    "limit as the first event": (
        sse("error", status=429, **limit_reached(60)),
        (429, "usage_limit_reached"),
    ),
    "a flat error": (
        CREATED + sse("error", code="server_error", message="x"),
        (502, "upstream_error"),
    ),
    "an unnamed error": (b'data: {"error":{"code":"slow_down"}}\n\n', (503, "overloaded")),
    "nothing": (b": only a comment\n\n", (502, "upstream_stream_truncated")),
    "only the handshake": (HANDSHAKE, (502, "upstream_stream_truncated")),
    "half an event": (delta("a")[:-1], (502, "upstream_stream_truncated")),
}


@pytest.mark.parametrize("body, expected", FAILURES.values(), ids=FAILURES)
def test_a_failure_before_anything_was_generated_is_raised(
    body: bytes, expected: tuple[int, str]
) -> None:
    got = refusal(answer(stream(body)))
    assert (got.status, got.code) == expected


@pytest.mark.parametrize(
    "tail",
    [b"", b"5\r\nab", b"zz\r\n", b"2\r\nabc\r\n", b"-5\r\n", b"x" * 400],
    ids=["closed", "cut chunk", "no number", "long chunk", "negative", "endless line"],
)
def test_a_broken_transfer_before_anything_was_generated_is_raised(tail: bytes) -> None:
    got = refusal(once(STREAM_HEAD + chunk(CREATED) + tail))
    assert (got.status, got.code, got.fault) == (502, "upstream_stream_truncated", "network")


def test_a_connection_whose_transfer_broke_is_not_kept() -> None:
    async def main() -> bool:
        async with line(once(STREAM_HEAD + chunk(CREATED) + b"zz\r\n")) as one:
            await one.refused()
            kept: bool = one.kept()
            return kept

    assert not run(main)


def test_an_empty_stream_of_length_zero_is_raised_at_once() -> None:
    started = time.monotonic()
    got = refusal(answer(sized(b"", head=b"Content-Type: text/event-stream\r\n")))
    assert got.code == "upstream_stream_truncated"
    assert time.monotonic() - started < 2


def test_a_reset_before_anything_was_generated_is_raised() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(STREAM_HEAD + chunk(CREATED))
        peer.reset()

    assert refusal(script).status == 502


def test_silence_before_anything_was_generated_is_504(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "UPSTREAM_IDLE_TIMEOUT_S", 0.1)
    script = Chunks(chunk(CREATED))
    script.go(0)
    got = refusal(script)
    assert (got.status, got.code) == (504, "upstream_timeout")


# After the first generated event


@pytest.mark.parametrize(
    "tail",
    [b"", END, b"5\r\nab", b"zz\r\n", chunk(delta("never")[:-1]) + END],
    ids=["closed", "ended", "cut chunk", "no number", "half an event"],
)
def test_a_cut_after_the_first_event_is_an_error_event_and_a_proper_end(tail: bytes) -> None:
    script = Chunks(chunk(HANDSHAKE + delta("a")), tail, close=True)
    script.go(0)

    async def main() -> tuple[bytes, int, bool]:
        async with line(script) as one:
            await one.start()
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)
            assert one.words.failure is not None
            return bytes(one.wall.written), one.wall.finished, one.wall.was_cut

    assert run(main) == (b"|a|!upstream_stream_truncated", 1, False)


def test_an_absorbed_cut_is_raised() -> None:
    async def main() -> azt.AztError:
        async with line(once(STREAM_HEAD + chunk(delta("a")))) as one:
            relay = await one.open(streaming=False)
            await relay.ready(5.0)
            with pytest.raises(azt.AztError) as caught:
                await relay.whole()
            return caught.value

    assert run(main).code == "upstream_stream_truncated"


def test_what_follows_the_terminal_event_is_ignored() -> None:
    body = delta("a") + COMPLETED + COMPLETED + delta("b") + b"data: [DONE]\n\n"
    assert whole(answer(stream(body)))[0] == b"|a|END"


def test_the_terminal_event_needs_no_end_of_the_body() -> None:
    assert whole(once(STREAM_HEAD + chunk(delta("a") + COMPLETED)))[0] == b"|a|END"


def test_silence_in_mid_answer_is_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "UPSTREAM_IDLE_TIMEOUT_S", 0.1)
    script = Chunks(chunk(delta("a")))
    script.go(0)
    assert whole(script)[0] == b"|a|!upstream_timeout"


def test_heartbeats_fill_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "HEARTBEAT_S", 0.03)
    script = Chunks(chunk(delta("a")), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            await one.start()
            await one.wall.until(lambda wall: wall.written.count(azt.HEARTBEAT) >= 3)
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)
            return bytes(one.wall.written)

    written = run(main)
    assert written.startswith(b"|a|" + azt.HEARTBEAT)
    assert written.replace(azt.HEARTBEAT, b"") == b"|a|END"


def test_a_probe_writes_something_that_every_client_skips() -> None:
    script = Chunks(chunk(delta("a")), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            relay = await one.start()
            assert relay.probe()
            script.go(1)
            await one.wall.until(lambda wall: wall.finished)
            return bytes(one.wall.written)

    assert run(main) == b"|a|" + azt.HEARTBEAT + b"END"


def test_an_event_beyond_the_limit_is_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "MAX_EVENT_BYTES", 10_000)
    script = Chunks(chunk(delta("a")), chunk(delta("x" * 9_000)[:-2]), chunk(b"y" * 2_000))
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            await one.start()
            script.go(1)
            script.go(2)
            await one.wall.until(lambda wall: wall.finished)
            return bytes(one.wall.written)

    assert run(main) == b"|a|!upstream_error"


@pytest.mark.parametrize("before", [b"", delta("a")], ids=["held", "open"])
def test_a_mistake_in_the_translator_ends_only_its_own_stream(
    before: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    script = Chunks(chunk(before or CREATED), chunk(delta("crash")))
    script.go(0)

    async def main() -> azt.AztError | None:
        async with line(script, answer(stream(WHOLE))) as one:
            if before:
                await one.start()
                script.go(1)
                await one.wall.until(lambda wall: wall.finished)
                failure: azt.AztError | None = one.words.failure
                assert one.wall.written == b"|a|!internal_error"
            else:
                script.go(1)
                failure = await one.refused()
            assert await one.whole() == b"|Hel||lo|END"
            return failure

    failure = run(main)
    assert failure is not None
    assert (failure.status, failure.code) == (500, "internal_error")
    assert "a mistake in the translator" in caplog.text


# Ending


def test_stopping_writes_the_error_and_ends_the_upstream_call() -> None:
    script = Chunks(chunk(delta("a")))
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            relay = await one.start()
            relay.stop(azt.AztError(503, "shutting_down", "azt is going down."))
            relay.stop(azt.AztError(503, "again", "azt is going down."))
            assert one.wall.finished == 1
            assert await asyncio.to_thread(script.left.wait, 1)
            return bytes(one.wall.written)

    assert run(main) == b"|a|!shutting_down"


def test_when_the_rest_is_not_wanted_the_upstream_call_ends_at_once() -> None:
    script = Chunks(chunk(delta("a") + delta("stop") + delta("b")))
    script.go(0)

    async def main() -> tuple[bytes, float]:
        async with line(script) as one:
            await one.start()
            ended = time.monotonic()
            await one.wall.until(lambda wall: wall.finished)
            assert await asyncio.to_thread(script.left.wait, 1)
            assert not one.kept()
            return bytes(one.wall.written), script.left_at - ended

    written, took = run(main)
    assert written == b"|a||stop|"
    assert took < 0.25


@pytest.mark.parametrize("streaming", [True, False])
def test_cancelling_closes_the_upstream_within_a_quarter_second(streaming: bool) -> None:
    script = Chunks(chunk(delta("a")))
    script.go(0)

    async def main() -> float:
        async with line(script) as one:
            relay = await one.open(streaming)
            await relay.ready(5.0)
            relay.start(one.wall)
            before = bytes(one.wall.written)
            left = time.monotonic()
            relay.cancel()
            relay.cancel()
            assert await asyncio.to_thread(script.left.wait, 2)
            assert one.wall.written == before
            assert one.wall.finished == 0
            assert not one.kept()
            return script.left_at - left

    assert run(main) < 0.25


def test_a_cancelled_wait_for_the_whole_closes_the_upstream() -> None:
    script = Chunks(chunk(delta("a")))
    script.go(0)

    async def main() -> None:
        async with line(script) as one:
            relay = await one.open(streaming=False)
            await relay.ready(5.0)
            waiting = asyncio.create_task(relay.whole())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await asyncio.to_thread(script.left.wait, 1)

    run(main)


@pytest.mark.parametrize("how", ["end", "cut", "cancel", "stop"])
def test_the_end_is_reported_once_however_it_comes(how: str) -> None:
    script = Chunks(chunk(delta("a")), chunk(COMPLETED) + END if how == "end" else b"", close=True)
    script.go(0)

    async def main() -> list[tuple[bool, bytes]]:
        async with line(script) as one:
            relay = await one.open()
            reports: list[tuple[bool, bytes]] = []
            relay.on_end = lambda ended: reports.append((ended.ended, bytes(one.wall.written)))
            await relay.ready(5.0)
            relay.start(one.wall)
            if how == "cancel":
                relay.cancel()
            elif how == "stop":
                relay.stop(azt.AztError(503, "shutting_down", "x"))
            script.go(1)
            if how != "cancel":
                await one.wall.until(lambda wall: wall.finished)
            await asyncio.sleep(0.05)  # anything more would come now
            return reports

    written = {"end": b"|a|END", "cut": b"|a|!upstream_stream_truncated", "cancel": b"|a|"}
    assert run(main) == [(True, written.get(how, b"|a|!shutting_down"))]


# Backpressure


def test_a_paused_relay_reads_no_further_and_loses_nothing() -> None:
    count = 1500
    body = b"".join(chunk(delta("x" * 5000)) for _ in range(count))
    script = Chunks(chunk(delta("first")), body, chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> tuple[int, int]:
        async with line(script) as one:
            relay = await one.start()
            relay.pause()
            held = len(one.wall.written)
            script.go(1)
            script.go(2)
            await asyncio.sleep(0.3)  # a relay that did not pause would read now
            grown = len(one.wall.written) - held
            relay.resume()
            await one.wall.until(lambda wall: wall.finished)
            return grown, one.wall.written.count(b"x" * 5000)

    assert run(main) == (0, count)


def test_pausing_again_and_again_loses_and_reorders_nothing() -> None:
    body = b"".join(delta(f"{number:05}") for number in range(5000)) + COMPLETED
    script = in_pieces(body, 3000)

    async def main() -> bytes:
        async with line(script) as one:
            relay = await one.start()
            while not one.wall.finished:
                relay.pause()
                await asyncio.sleep(0)
                relay.resume()
                await asyncio.sleep(0)  # the loop sees that the socket is readable,
                await asyncio.sleep(0)  # and then reads
            return bytes(one.wall.written)

    assert run(main) == b"".join(b"|%05d|" % number for number in range(5000)) + b"END"


def test_the_silence_of_a_paused_relay_is_not_the_upstreams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(azt, "UPSTREAM_IDLE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(azt, "HEARTBEAT_S", 0.05)
    script = Chunks(chunk(delta("a")), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with line(script) as one:
            relay = await one.start()
            relay.pause()
            await asyncio.sleep(0.3)  # three times the limit
            script.go(1)
            relay.resume()
            await one.wall.until(lambda wall: wall.finished)
            return bytes(one.wall.written)

    assert run(main).replace(azt.HEARTBEAT, b"") == b"|a|END"


# The connection afterwards


def test_the_connection_is_kept_only_after_the_end_of_the_body() -> None:
    script = Chunks(chunk(delta("a") + COMPLETED), END)
    script.go(0)

    async def main() -> None:
        async with line(script) as one:
            await one.whole()
            await asyncio.sleep(0.05)  # the socket may not go back now
            assert not one.kept()
            script.go(1)
            await one.until_kept()

    run(main)


def test_a_kept_connection_serves_the_next_stream() -> None:
    async def main() -> int:
        async with line(in_pieces(WHOLE, 50)) as one:
            for _ in range(5):
                assert await one.whole() == b"|Hel||lo|END"
                await one.until_kept()
            connections: int = one.server.connections
            return connections

    assert run(main) == 1


def test_an_end_that_does_not_come_costs_the_connection() -> None:
    script = Chunks(chunk(delta("a") + COMPLETED))
    script.go(0)

    async def main() -> None:
        async with line(script) as one:
            await one.whole()
            assert await asyncio.to_thread(script.left.wait, 3)
            assert not one.kept()

    run(main)


@pytest.mark.parametrize(
    "response",
    [
        stream(WHOLE, END + b"HTTP/1.1 200 OK\r\n"),
        STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunk(WHOLE) + END,
    ],
    ids=["bytes behind the end", "connection close"],
)
def test_a_connection_that_is_spoilt_is_not_kept(response: bytes) -> None:
    async def main() -> None:
        async with line(answer(response)) as one:
            assert await one.whole() == b"|Hel||lo|END"
            await asyncio.sleep(0.05)
            assert not one.kept()

    run(main)


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ssl.SSLContext, str]]:
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("tls") / "root.pem"
    ca.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    yield context, str(path)


@pytest.mark.parametrize("size", [1, 10, 16_000, 100_000])
def test_a_stream_over_tls_is_relayed_and_its_connection_kept(
    tls: tuple[ssl.SSLContext, str], size: int
) -> None:
    body = HANDSHAKE + delta("Hel") + delta("y" * (60_000 if size > 10 else 10)) + COMPLETED
    context, ca_file = tls

    async def main() -> int:
        async with line(in_pieces(body, size), tls=context, ca_file=ca_file) as one:
            for _ in range(2):
                written = await one.whole()
                assert written.startswith(b"|Hel||yyyyyyyyyy") and written.endswith(b"END")
                await one.until_kept()
            connections: int = one.server.connections
            return connections

    assert run(main) == 1


def test_records_that_came_at_once_are_all_read(tls: tuple[ssl.SSLContext, str]) -> None:
    """While OpenSSL still holds bytes nothing makes the socket readable."""
    body = b"".join(chunk(delta(f"{number:04}" * 50)) for number in range(2000))
    script = Chunks(chunk(delta("a")), body + chunk(COMPLETED) + END)
    script.go(0)
    context, ca_file = tls

    async def main() -> bytes:
        async with line(script, tls=context, ca_file=ca_file) as one:
            relay = await one.start()
            relay.pause()
            script.go(1)
            await asyncio.sleep(0.1)
            while not one.wall.finished:
                relay.resume()
                await asyncio.sleep(0.001)
                relay.pause()
            return bytes(one.wall.written)

    expected = b"".join(b"|" + b"%04d" % number * 50 + b"|" for number in range(2000))
    assert run(main) == b"|a|" + expected + b"END"


def test_cancelling_over_tls_closes_the_upstream_within_a_quarter_second(
    tls: tuple[ssl.SSLContext, str],
) -> None:
    script = Chunks(chunk(delta("a")))
    script.go(0)
    context, ca_file = tls

    async def main() -> float:
        async with line(script, tls=context, ca_file=ca_file) as one:
            relay = await one.start()
            left = time.monotonic()
            relay.cancel()
            assert await asyncio.to_thread(script.left.wait, 2)
            return script.left_at - left

    assert run(main) < 0.25


# -- The calls ------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[azt.ConnectionPool]:
    made = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({"127.0.0.1"})))
    yield made
    made.close()


CREDENTIALS = azt.Credentials("access-1", "acct-1")


def open_stream(pool: azt.ConnectionPool, base_url: str, body: bytes) -> azt.Answer:
    workers = azt.WorkerPool("call", 1)
    return asyncio.run(azt.open_stream(pool, workers, base_url, CREDENTIALS, body, "s-1"))


def test_a_turn_is_posted_under_azts_own_name(pool: azt.ConnectionPool) -> None:
    with Server(once(stream(WHOLE))) as server:
        base = server.url + "/backend-api/codex"
        open_stream(pool, base, b'{"a":1}').close()
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    fields = dict(line.decode().split(": ", 1) for line in head.split(b"\r\n")[1:])
    assert head.startswith(b"POST /backend-api/codex/responses HTTP/1.1\r\n")
    assert body == b'{"a":1}'
    assert fields["authorization"] == "Bearer access-1"
    assert fields["chatgpt-account-id"] == "acct-1"
    assert fields["originator"] == "azt"
    assert fields["user-agent"].startswith("azt/")
    assert fields["accept"] == "text/event-stream"
    assert fields["content-type"] == "application/json"
    assert fields["session-id"] == fields["session_id"] == "s-1"
    assert "accept-encoding" not in fields


@pytest.mark.parametrize(
    "response, expected",
    [
        (sized(json.dumps(limit_reached(60)).encode(), "429 Slow"), (429, "usage_limit_reached")),
        (sized(HTML, "403 No", b"cf-mitigated: challenge\r\n"), (403, "upstream_forbidden")),
        (sized(b"{}", "200 OK", b"Content-Type: application/json\r\n"), (502, "upstream_error")),
        (sized(HTML, "200 OK", b"Content-Type: text/html\r\n"), (502, "upstream_error")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (502, "upstream_error")),
        (sized(b"", "302 Found", b"Location: http://127.0.0.1:1/\r\n"), (502, "upstream_error")),
    ],
    ids=["limit", "challenge", "json", "page", "nothing", "redirect"],
)
def test_an_answer_without_a_stream_is_raised_and_its_connection_kept(
    pool: azt.ConnectionPool, response: bytes, expected: tuple[int, str]
) -> None:
    with Server(answer(response)) as server:
        for _ in range(2):
            with pytest.raises(azt.UpstreamError) as caught:
                open_stream(pool, server.url, b"{}")
            assert (caught.value.status, caught.value.code) == expected
        assert server.connections == 1


def models_answer(models: Any, etag: str = 'W/"1"') -> bytes:
    body = json.dumps({"models": models}).encode()
    return sized(body, head=f"ETag: {etag}\r\n".encode())


def test_the_catalogue_is_fetched_with_its_etag(pool: azt.ConnectionPool) -> None:
    with Server(answer(models_answer([model_info("gpt-5.5"), "broken"]))) as server:
        got = azt.fetch_models(pool, server.url, CREDENTIALS, 'W/"0"', azt.Wire())
    assert got is not None
    assert [model["slug"] for model in got[0]] == ["gpt-5.5"]
    assert got[1] == 'W/"1"'
    head = server.requests[0]
    assert head.startswith(b"GET /models?client_version=")
    assert b'if-none-match: W/"0"' in head
    assert b"originator: azt" in head


def test_a_catalogue_that_has_not_changed_is_none(pool: azt.ConnectionPool) -> None:
    with Server(answer(b'HTTP/1.1 304 Not Modified\r\nETag: W/"1"\r\n\r\n')) as server:
        assert azt.fetch_models(pool, server.url, CREDENTIALS, 'W/"1"', azt.Wire()) is None


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"models": {}}', b""])
def test_a_catalogue_of_another_shape_is_an_error(pool: azt.ConnectionPool, body: bytes) -> None:
    with Server(answer(sized(body))) as server, pytest.raises(azt.UpstreamError) as caught:
        azt.fetch_models(pool, server.url, CREDENTIALS, "", azt.Wire())
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert b"if-none-match" not in server.requests[0]


def test_a_refused_catalogue_is_the_refusal(pool: azt.ConnectionPool) -> None:
    response = sized(json.dumps(coded("token_expired")).encode(), "401 No")
    with Server(answer(response)) as server, pytest.raises(azt.UpstreamError) as caught:
        azt.fetch_models(pool, server.url, CREDENTIALS, "", azt.Wire())
    assert (caught.value.status, caught.value.fault) == (401, "token")


# -- The catalogue --------------------------------------------------------------------------------


def cache(*slugs: str, **fields: Any) -> Json:
    return {"models": [model_info(slug) for slug in slugs], **fields}


def slugs(catalogue: azt.Catalogue) -> list[str]:
    return [entry["slug"] for entry in catalogue.entries]


def test_azts_own_cache_comes_first() -> None:
    got = azt.Catalogue.read(cache("own", etag="e", fetched_at=7), cache("codex"))
    assert (slugs(got), got.source, got.etag, got.fetched_at) == (["own"], "azt", "e", 7)


BROKEN: list[Any] = [
    None,
    {},
    {"models": None},
    {"models": []},
    {"models": {}},
    {"models": "x"},
    {"models": [None, 5, "x", {}, {"slug": None}, {"slug": ""}, {"slug": 5}]},
]


@pytest.mark.parametrize("own", BROKEN)
def test_codexs_cache_stands_in_for_a_missing_or_broken_one(own: Any) -> None:
    got = azt.Catalogue.read(own, codex_models_cache())
    assert got.source == "codex"
    assert "gpt-5.5" in slugs(got)
    assert got.fetched_at == 0


@pytest.mark.parametrize("own", BROKEN)
@pytest.mark.parametrize("codex", BROKEN)
def test_a_built_in_list_stands_in_for_both(own: Any, codex: Any) -> None:
    got = azt.Catalogue.read(own, codex)
    assert got.source == "built-in"
    assert "gpt-5.4" in slugs(got)


def test_broken_entries_are_left_out() -> None:
    got = azt.Catalogue.read({"models": [None, {"slug": 5}, model_info("good")]}, None)
    assert slugs(got) == ["good"]


def test_a_cache_survives_the_disk() -> None:
    first = azt.Catalogue.read(cache("a", "b", etag="e", fetched_at=7), None)
    again = azt.Catalogue.read(json.loads(json.dumps(first.to_json())), None)
    assert again == first


def test_hidden_models_are_not_listed_and_the_rest_stands_in_the_backends_order() -> None:
    got = azt.Catalogue.read(
        {
            "models": [
                model_info("third", priority=3),
                model_info("hidden", visibility="hide", priority=0),
                model_info("first", priority=1),
                {"slug": "last"},
                model_info("odd", priority="2"),
            ]
        },
        None,
    )
    assert [entry["slug"] for entry in got.listed] == ["first", "third", "last", "odd"]
    assert [entry["id"] for entry in got.openai_models()["data"]] == [
        "first",
        "third",
        "last",
        "odd",
        "gpt-image-2",
    ]


def test_a_list_of_hidden_models_is_better_than_none() -> None:
    got = azt.Catalogue.read({"models": [model_info("hidden", visibility="hide")]}, None)
    assert [entry["id"] for entry in got.openai_models()["data"]] == ["hidden", "gpt-image-2"]
    assert got.default("gpt-5.4") == "hidden"


@pytest.mark.parametrize("wanted, default", [("b", "b"), ("gone", "a"), ("", "a"), ("hidden", "a")])
def test_the_default_is_the_wanted_model_when_it_is_listed(wanted: str, default: str) -> None:
    got = azt.Catalogue.read(
        {
            "models": [
                model_info("b", priority=2),
                model_info("a", priority=1),
                model_info("hidden", visibility="hide", priority=0),
            ]
        },
        None,
    )
    assert got.default(wanted) == default


def test_the_built_in_list_offers_the_default_model() -> None:
    built_in = azt.Catalogue.read(None, None)
    wanted = azt.SETTINGS["defaultModel"].default
    assert built_in.default(wanted) == wanted


def test_efforts_are_read_from_every_shape() -> None:
    got = azt.Catalogue.read(
        {
            "models": [
                model_info("a", "low high"),
                {"slug": "b"},
                {"slug": "c", "supported_reasoning_levels": "x"},
                {
                    "slug": "d",
                    "supported_reasoning_levels": [None, {}, {"effort": 5}, {"effort": "low"}],
                },
            ]
        },
        None,
    )
    assert got.efforts == {"a": ("low", "high"), "b": (), "c": (), "d": ("low",)}


def test_a_model_has_the_four_official_keys_and_what_pickers_look_for() -> None:
    model = azt.Catalogue.read(cache("gpt-5.5"), None).find("gpt-5.5")
    assert list(model)[:4] == ["id", "object", "created", "owned_by"]
    assert (model["id"], model["object"]) == ("gpt-5.5", "model")
    assert isinstance(model["created"], int)
    assert model["context_window"] == model["context_length"] == 272_000
    assert model["name"] == "gpt-5.5"


def test_a_hidden_model_is_found_by_its_name() -> None:
    got = azt.Catalogue.read(codex_models_cache(), None)
    assert got.find("codex-auto-review")["id"] == "codex-auto-review"


@pytest.mark.parametrize("name", ["gpt-0", "", "GPT-5.5", "x" * 10_000])
def test_an_unknown_model_is_404_and_names_what_there_is(name: str) -> None:
    with pytest.raises(azt.AztError) as caught:
        azt.Catalogue.read(codex_models_cache(), None).find(name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert caught.value.param == "model"
    assert "gpt-5.4" in caught.value.message
    assert len(caught.value.message) < 400


# -- The scanner beside a passthrough -------------------------------------------------------------


def scanned(raw: bytes, sizes: list[int]) -> azt.Scanner:
    """The scanner after these bytes, in pieces of these sizes, over and over."""
    scanner, at, number = azt.Scanner(NOW), 0, 0
    while at < len(raw):
        size = sizes[number % len(sizes)]
        piece = raw[at : at + size]
        assert scanner.feed(piece) == piece
        at, number = at + size, number + 1
    return scanner


def noted(scanner: azt.Scanner) -> Json:
    names = "response_id model state turn_state usage limits".split()
    failure = scanner.failure
    found = {name: getattr(scanner, name) for name in names}
    return {**found, "failure": (failure.status, failure.code) if failure else None}


SPENT = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 1}
LIMITS = sse("codex.rate_limits", rate_limits={"primary": {"used_percent": 3}}, promo=None)
META = sse("response.metadata", headers={"x-codex-turn-state": "ts-1"})
OPENED = sse("response.created", response={"id": "resp_1", "model": "asked", "usage": None})


def ended(kind: str, **fields: Any) -> bytes:
    response = {"id": "resp_1", "model": "served", "tools": [{"a": [1]}] * 9, "usage": SPENT}
    return sse(f"response.{kind}", response={**response, **fields})


SCANS: dict[str, tuple[bytes, Json]] = {
    "a whole answer": (
        LIMITS + OPENED + META + delta("response.failed \\n\\nevent: error") + ended("completed"),
        {
            "response_id": "resp_1",
            "model": "served",
            "state": "completed",
            "turn_state": "ts-1",
            "usage": SPENT,
            "limits": json.loads(LIMITS.partition(b"data: ")[2]),
        },
    ),
    "incomplete": (ended("incomplete"), {"state": "incomplete", "usage": SPENT}),
    "failed": (
        OPENED + ended("failed", error={"code": "server_is_overloaded"}, usage=None),
        {"state": "failed", "usage": None, "failure": (503, "overloaded")},
    ),
    "an error event": (sse("error", code="slow_down"), {"failure": (503, "overloaded")}),
    "an error that Codex does not heed": (
        sse("error", code="slow_down") + ended("completed"),
        {"state": "completed", "failure": None},
    ),
    "without names": (
        ended("completed").partition(b"\n")[2],
        {"state": "completed", "model": "served", "usage": SPENT},
    ),
    "CRLF": (ended("completed").replace(b"\n", b"\r\n"), {"state": "completed", "usage": SPENT}),
    "CR": (ended("completed").replace(b"\n", b"\r"), {"state": "completed", "usage": SPENT}),
    "no space": (ended("completed").replace(b": ", b":", 2), {"state": "completed"}),
    "broken, then whole": (
        b'event: response.completed\ndata: {"type":"response.comp\n\n' + ended("incomplete"),
        {"state": "incomplete"},
    ),
    "cut": (OPENED + ended("completed")[:-20], {"response_id": "resp_1", "state": ""}),
    "nothing of interest": (delta("x") * 50 + b"data: [DONE]\n\n", {"state": "", "usage": None}),
}


@pytest.mark.parametrize("raw, expected", SCANS.values(), ids=SCANS)
def test_a_scanner_notes_the_same_in_any_split(raw: bytes, expected: Json) -> None:
    whole = noted(scanned(raw, [len(raw)]))
    assert expected.items() <= whole.items()
    for size in (*range(1, 40), 64, 100, 1000):
        assert noted(scanned(raw, [size])) == whole


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_a_scanner_notes_the_same_in_random_splits(sizes: list[int]) -> None:
    for raw, _ in SCANS.values():
        assert noted(scanned(raw, sizes)) == noted(scanned(raw, [len(raw)]))


@given(st.binary(max_size=300), st.integers(1, 30))
def test_no_bytes_crash_a_scanner(raw: bytes, size: int) -> None:
    scanned(b"event: response.completed\ndata: {" + raw + b"\n\n" + raw, [size])


LARGE_EVENTS: dict[str, Json] = {
    "a picture": {"output": [{"type": "image_generation_call", "result": "A" * 8_000_000}]},
    "escapes": {"instructions": '\\"{[}]\u00e9\n' * 400_000},
    "many words": {"output": [{"text": "word " * 60} for _ in range(20_000)]},
}


@pytest.mark.parametrize("fields", LARGE_EVENTS.values(), ids=LARGE_EVENTS)
@pytest.mark.parametrize("size", [777, 65_536])
def test_a_scanner_reads_an_event_of_any_size_in_bounded_memory(fields: Json, size: int) -> None:
    head = OPENED + b'event: response.completed\ndata: {"type":"response.completed","response":'
    response = {"id": "resp_1", **fields, "model": "served", "usage": SPENT}
    raw = head + json.dumps(response, ensure_ascii=False).encode() + b"}\n\n"
    scanner, most = azt.Scanner(NOW), 0
    for at in range(0, len(raw), size):
        scanner.feed(raw[at : at + size])
        most = max(most, len(scanner._event or b""))

    assert len(raw) > 3_000_000
    assert (scanner.state, scanner.model, scanner.usage) == ("completed", "served", SPENT)
    assert most <= azt.MIB


# -- The passthrough of one stream ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def passing(*scripts: Script) -> Any:
    """A passthrough of what the scripts send, and the wall it writes to."""
    with Server(*scripts) as server:
        pool = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({"127.0.0.1"})))
        threads = azt.WorkerPool("call", 4)
        answer = await azt.open_answer(pool, threads, azt.Call("POST", server.url, {}, b"{}"))
        try:
            yield azt.Passthrough(pool, answer), Wall()
        finally:
            answer.close()
            pool.close()


@pytest.mark.parametrize("size", [1, 10, 4096])
def test_a_passthrough_changes_no_byte_in_any_pieces(size: int) -> None:
    raw = (
        b"\xef\xbb\xbf: hi\r\n\r\n"
        + HANDSHAKE
        + delta("a\u00e9")
        + b"\xff\x00\r"
        + COMPLETED
        + b"x"
    )

    async def main() -> bytes:
        async with passing(in_pieces(raw, size)) as (relay, wall):
            await relay.ready(5.0)
            relay.start(wall)
            await wall.until(lambda wall: wall.finished)
            return bytes(wall.written)

    assert run(main) == raw


def test_a_passthrough_holds_what_it_does_not_know_only_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(azt, "MAX_HELD_BYTES", 1000)
    script = Chunks(chunk(b": " + b"x" * 2000), chunk(b"\n\n" + COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with passing(script) as (relay, wall):
            await relay.ready(5.0)
            relay.start(wall)
            before = bytes(wall.written)
            script.go(1)
            await wall.until(lambda wall: wall.finished)
            return before

    assert run(main) == b": " + b"x" * 2000


def test_a_passthrough_opens_late_without_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "HEARTBEAT_S", 0.05)
    script = Chunks(chunk(CREATED), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with passing(script) as (relay, wall):
            await relay.ready(0.1)
            relay.start(wall)
            await asyncio.sleep(0.2)  # four heartbeats long
            script.go(1)
            await wall.until(lambda wall: wall.finished)
            return bytes(wall.written)

    assert run(main) == CREATED + COMPLETED


def test_silence_in_an_open_passthrough_is_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "UPSTREAM_IDLE_TIMEOUT_S", 0.2)
    script = Chunks(chunk(delta("a")), END)
    script.go(0)

    async def main() -> tuple[bytes, str | None]:
        async with passing(script) as (relay, wall):
            await relay.ready(5.0)
            relay.start(wall)
            await wall.until(lambda wall: wall.was_cut)
            script.go(1)
            return bytes(wall.written), relay.translator.failure.code

    assert run(main) == (delta("a"), "upstream_timeout")


def test_the_connection_of_a_passthrough_is_kept_after_its_body() -> None:
    async def main() -> int:
        with Server(answer(stream(delta("a") + COMPLETED))) as server:
            pool = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({"127.0.0.1"})))
            threads = azt.WorkerPool("call", 4)
            for _ in range(3):
                call = azt.Call("POST", server.url, {}, b"{}")
                relay = azt.Passthrough(pool, await azt.open_answer(pool, threads, call))
                await relay.ready(5.0)
                wall = Wall()
                relay.start(wall)
                await wall.until(lambda wall: wall.finished)
            pool.close()
            return server.connections

    assert run(main) == 1


@pytest.mark.parametrize("first", [b"data: no json\n\n", b'data: {"a": 1}\n\n', delta("a")])
def test_an_event_of_any_kind_opens_a_passthrough(first: bytes) -> None:
    script = Chunks(chunk(HANDSHAKE + first), chunk(COMPLETED) + END)
    script.go(0)

    async def main() -> bytes:
        async with passing(script) as (relay, wall):
            await relay.ready(60.0)
            relay.start(wall)
            before = bytes(wall.written)
            script.go(1)
            await wall.until(lambda wall: wall.finished)
            return before

    assert run(main) == HANDSHAKE + first
