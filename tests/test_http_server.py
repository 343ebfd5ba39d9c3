"""The HTTP server over real sockets, with small handlers in place of the gateway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gzip
import http.client
import ipaddress
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

import azt

T = TypeVar("T")

WAIT_S = 10.0
HOST = b"Host: localhost\r\n"
GET = b"GET /v1/echo HTTP/1.1\r\n" + HOST + b"\r\n"

POLICY = azt.Policy(
    own_names=frozenset(),
    allowed_hosts=frozenset(),
    cors_origins=frozenset(),
    lan_api=True,
    loopback_exempt=False,
    own_networks=(),
    keys={},
    admin_token_hash="",
    body_max_bytes=4 * azt.MIB,
)


# -- handlers


class Stream:
    """A stream body that does what the test tells it; every call on it can be waited for."""

    def __init__(self, first: bytes = b"") -> None:
        self.sink: azt.Sink
        self.first = first
        self.may_probe = True
        self.calls: list[str] = []
        self.events = {
            name: threading.Event()
            for name in ("start", "pause", "resume", "probe", "cancel", "stop")
        }

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.events[name].set()

    def start(self, sink: azt.Sink) -> None:
        self.sink = sink
        if self.first:
            sink.write(self.first)
        self._called("start")

    def pause(self) -> None:
        self._called("pause")

    def resume(self) -> None:
        self._called("resume")
        self.sink.finish()

    def probe(self) -> bool:
        self._called("probe")
        if self.may_probe:
            self.sink.write(b": probe\n\n")
        return self.may_probe

    def cancel(self) -> None:
        self._called("cancel")

    def stop(self, error: azt.AztError) -> None:
        self._called("stop")
        self.sink.write(b"stopped: " + str(error.code).encode())
        self.sink.finish()


@dataclass
class Context:
    """What handlers and tests share."""

    requests: list[azt.Request]
    stream: Stream
    started: threading.Event
    cancelled: threading.Event
    go: asyncio.Event
    pieces: AsyncIterator[bytes] | None = None


async def echo(context: Context, request: azt.Request) -> azt.Reply:
    context.requests.append(request)
    return azt.json_reply(
        {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "params": request.params,
            "headers": request.headers,
            "size": len(request.body),
            "crc": zlib.crc32(request.body),
        }
    )


async def wait(context: Context, request: azt.Request) -> azt.Reply:
    context.requests.append(request)
    context.started.set()
    try:
        await context.go.wait()
    except asyncio.CancelledError:
        context.cancelled.set()
        raise
    return azt.json_reply({"waited": True})


async def stream(context: Context, request: azt.Request) -> azt.Reply:
    context.requests.append(request)
    return azt.Reply(200, context.stream, [("content-type", "text/event-stream")])


async def pieces(context: Context, request: azt.Request) -> azt.Reply:
    assert context.pieces is not None
    return azt.Reply(200, context.pieces)


async def refuse(context: Context, request: azt.Request) -> azt.Reply:
    raise azt.AztError(429, "slow_down", "Too fast: wait a second.", headers={"retry-after": "1"})


async def crash(context: Context, request: azt.Request) -> azt.Reply:
    raise ZeroDivisionError("secret details")


async def bad_header(context: Context, request: azt.Request) -> azt.Reply:
    return azt.Reply(200, b"x", [("x-split", "a\r\nset-cookie: b")])


async def own_id(context: Context, request: azt.Request) -> azt.Reply:
    return azt.Reply(200, b"x", [("X-Request-Id", "upstream-1")])


async def empty(context: Context, request: azt.Request) -> azt.Reply:
    return azt.Reply(204)


async def large(context: Context, request: azt.Request) -> azt.Reply:
    return azt.Reply(200, b"x" * (32 * azt.MIB))


async def release(context: Context, request: azt.Request) -> azt.Reply:
    request.release()
    return azt.json_reply({"size": len(request.body)})


ROUTES = [
    azt.Route("DELETE", "/v1/items/{id}", echo, "api"),
    azt.Route("GET", "/", echo, "page"),
    azt.Route("GET", "/_gateway/admin/state", echo, "admin_read"),
    azt.Route("GET", "/_gateway/health", echo, "health"),
    azt.Route("GET", "/codex/v1/{path}", echo, "codex"),
    azt.Route("GET", "/v1/bad-header", bad_header, "api"),
    azt.Route("GET", "/v1/crash", crash, "api"),
    azt.Route("GET", "/v1/echo", echo, "api"),
    azt.Route("GET", "/v1/empty", empty, "api"),
    azt.Route("GET", "/v1/items/{id}", echo, "api"),
    azt.Route("GET", "/v1/items/{id}/parts", echo, "api"),
    azt.Route("GET", "/v1/large", large, "api"),
    azt.Route("GET", "/v1/own-id", own_id, "api"),
    azt.Route("GET", "/v1/pieces", pieces, "api"),
    azt.Route("GET", "/v1/stream", stream, "api"),
    azt.Route("GET", "/v1/wait", wait, "api"),
    azt.Route("POST", "/_gateway/admin/change", echo, "admin_write"),
    azt.Route("POST", "/codex/v1/responses", echo, "codex", raw_body=True),
    azt.Route("POST", "/v1/crash", crash, "api"),
    azt.Route("POST", "/v1/echo", echo, "api"),
    azt.Route("POST", "/v1/refuse", refuse, "api"),
    azt.Route("POST", "/v1/release", release, "api"),
    azt.Route("POST", "/v1/small", echo, "api", body_max_bytes=10),
    azt.Route("POST", "/v1/wait", wait, "api"),
]


# -- a server in a thread, and clients for it


class Server:
    """An HttpServer on a loop of its own; `policy` may be changed by the test."""

    def __init__(self) -> None:
        self.policy = POLICY
        self._runner = asyncio.Runner()
        self.loop = self._runner.get_loop()
        self.context = Context(
            [], Stream(), threading.Event(), threading.Event(), self._runner.run(self._event())
        )
        self.http = azt.HttpServer(ROUTES, self.context, lambda: self.policy)
        self.addresses = self._runner.run(self.http.listen("127.0.0.1", 0))
        self.port = self.addresses[0][1]
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    @staticmethod
    async def _event() -> asyncio.Event:
        return asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, function: Callable[[], T]) -> T:
        async def on_loop() -> T:
            return function()

        return self.run(on_loop())

    def write(self, data: bytes) -> None:
        self.call(lambda: self.context.stream.sink.write(data))

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a state of the loop that no event announces."""

        async def poll() -> None:
            async with asyncio.timeout(WAIT_S):
                while not is_so():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

        self.run(poll())

    def close(self) -> None:
        self.run(self.http.drain(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._runner.close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        return self.json["error"]["code"]


def ask(
    server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(
            response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        )
    finally:
        connection.close()


class Client(socket.socket):
    """A raw client socket with a buffer for whole answers."""

    def __init__(self, server: Server, address: str = "127.0.0.1") -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._rest = b""
        self.settimeout(WAIT_S)
        self.bind((address, 0))
        try:
            self.connect(("127.0.0.1", server.port))
        except OSError:
            self.close()
            raise
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_some(self, most: int = 65536) -> bytes:
        """What has arrived; empty when the server has closed."""
        data, self._rest = self._rest or self.recv(most), b""
        return data

    def read_until(self, end: bytes) -> bytes:
        """Everything up to `end`."""
        received, at = bytearray(), -1
        while at < 0:
            data = self.read_some()
            assert data, f"closed after {received[-1000:]!r}"
            start = max(0, len(received) - len(end))
            received += data
            at = received.find(end, start)
        at += len(end)
        self._rest = bytes(received[at:])
        return bytes(received[:at])

    def read_answer(self) -> Answer:
        """One answer with a content length."""
        head = self.read_until(b"\r\n\r\n").decode()
        lines = head.split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
        size = int(headers.get("content-length", 0))
        return Answer(int(lines[0].split()[1]), headers, self.read_exactly(size))

    def read_exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            data = self.read_some()
            assert data, "closed"
            received += data
        self._rest = bytes(received[size:])
        return bytes(received[:size])

    def read_all(self) -> bytes:
        """Everything until the server closes."""
        received = b""
        while data := self.read_some():
            received += data
        return received


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server) as connected:
        yield connected


def post(path: str, body: bytes, fields: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


# -- which handler


@pytest.mark.parametrize(
    "path",
    [
        "/v1/echo",
        "/v1/echo/",
        "/echo",
        "/echo/",
        "/v1/v1/echo",
        "/v1/v1/v1/echo",
        "//v1//echo",
        "/v1//echo",
        "/v1/echo?a=b",
        "/v1/%65cho",
    ],
)
def test_paths_that_people_get_wrong_are_forgiven(server: Server, path: str) -> None:
    assert ask(server, "GET", path).status == 200


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/items/a", {"id": "a"}),
        ("/v1/items/a/b/c", {"id": "a/b/c"}),
        ("/v1/items/a%2Fb", {"id": "a/b"}),
        ("/items/a%20b", {"id": "a b"}),
        ("/v1/items/a/parts", {"id": "a"}),
        ("/codex/v1/any/thing", {"path": "any/thing"}),
        ("/codex/any", {"path": "any"}),
    ],
)
def test_path_parameters_are_read(server: Server, path: str, params: dict[str, str]) -> None:
    assert ask(server, "GET", path).json["params"] == params


def test_query_and_headers_reach_the_handler(server: Server) -> None:
    answer = ask(server, "GET", "/v1/echo?a=1&b=&a%20c=%C3%A9", headers={"X-One": "1"})
    assert answer.json["query"] == {"a": "1", "b": "", "a c": "é"}
    assert answer.json["headers"]["x-one"] == "1"


def test_repeated_headers_are_joined(client: Client) -> None:
    client.sendall(b"GET /v1/echo HTTP/1.1\r\n" + HOST + b"X-A: 1\r\nx-a: 2\r\n\r\n")
    assert client.read_answer().json["headers"]["x-a"] == "1, 2"


def test_unknown_path_is_told_in_openai_shape(server: Server) -> None:
    answer = ask(server, "POST", "/v1/nope", b"{}")
    assert (answer.status, answer.code) == (404, "unknown_url")
    assert answer.json["error"]["message"] == "Invalid URL (POST /v1/nope)"
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_wrong_method_names_the_right_ones(server: Server) -> None:
    answer = ask(server, "PUT", "/v1/echo", b"{}")
    assert (answer.status, answer.code) == (405, "method_not_supported")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/%00",
        "/v1/../echo",
        "/v1/%2e%2e/echo",
        "/v1/./echo",
        "/v1/a%5cb",
        "/v1/%ff",
        "/v1/%0d%0a",
    ],
)
def test_paths_no_honest_client_sends_are_refused(server: Server, path: str) -> None:
    answer = ask(server, "GET", path)
    assert (answer.status, answer.code) == (400, "invalid_url")


def test_head_is_get_without_its_body(client: Client) -> None:
    client.sendall(b"HEAD /v1/items/a HTTP/1.1\r\n" + HOST + b"\r\n")
    head = client.read_until(b"\r\n\r\n")
    client.sendall(GET)
    assert b"content-length: 0" not in head
    assert b"content-length: " in head
    assert client.read_answer().status == 200


def test_answer_without_content_has_no_length(client: Client) -> None:
    client.sendall(b"GET /v1/empty HTTP/1.1\r\n" + HOST + b"\r\n")
    head = client.read_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204 ")
    assert b"content-length" not in head
    assert b"transfer-encoding" not in head.lower()


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("TRACE", {}, 405),
        ("TRACE", {"X-A": "1"}, 405),
        ("GET", {"X-HTTP-Method-Override": "DELETE"}, 405),
        ("GET", {"X-HTTP-Method": "DELETE"}, 405),
        ("GET", {"X-Method-Override": "DELETE"}, 405),
        ("GET", {"Connection": "upgrade", "Upgrade": "websocket"}, 400),
        ("GET", {"Connection": "upgrade", "Upgrade": "h2c, websocket"}, 400),
        ("GET", {"Connection": "upgrade", "Upgrade": "h2c"}, 200),
        ("GET", {"Expect": "200-ok"}, 417),
    ],
)
def test_what_azt_does_for_nobody(
    server: Server, method: str, headers: dict[str, str], status: int
) -> None:
    assert ask(server, method, "/v1/echo", headers=headers).status == status


def test_websocket_on_a_codex_responses_route_falls_back_at_once(server: Server) -> None:
    answer = ask(
        server,
        "GET",
        "/codex/v1/responses",
        headers={"Connection": "upgrade", "Upgrade": "websocket"},
    )
    assert (answer.status, answer.code) == (426, "upgrade_refused")


# -- connections


def test_connection_is_kept_for_the_next_request(client: Client) -> None:
    for _ in range(3):
        client.sendall(GET)
        answer = client.read_answer()
        assert answer.status == 200
        assert "connection" not in answer.headers


def test_pipelined_requests_are_answered_in_order(server: Server, client: Client) -> None:
    client.sendall(
        b"GET /v1/wait HTTP/1.1\r\n"
        + HOST
        + b"\r\n"
        + post("/v1/echo", b"abc")
        + b"GET /v1/items/last HTTP/1.1\r\n"
        + HOST
        + b"\r\n"
    )
    assert server.context.started.wait(WAIT_S)
    server.call(server.context.go.set)
    answers = [client.read_answer().json for _ in range(3)]
    assert answers[0] == {"waited": True}
    assert answers[1]["size"] == 3
    assert answers[2]["params"] == {"id": "last"}


def test_many_pipelined_requests_in_one_write_are_all_answered(client: Client) -> None:
    client.sendall(GET * 1500)
    assert all(client.read_answer().status == 200 for _ in range(1500))


def test_pipelining_beyond_the_limit_stops_the_reading_until_the_answer(
    server: Server, client: Client
) -> None:
    client.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
    assert server.context.started.wait(WAIT_S)
    client.sendall(GET * (4 * azt.PIPELINE_BYTES // len(GET)))
    server.until(lambda: len(connections(server)[0]._waiting) > azt.PIPELINE_BYTES)
    assert not connections(server)[0].transport.is_reading()
    server.call(server.context.go.set)
    assert client.read_answer().json == {"waited": True}
    assert client.read_answer().status == 200


def test_client_that_does_not_read_gets_no_further_answers_meanwhile(
    server: Server, client: Client
) -> None:
    client.sendall((b"GET /v1/large HTTP/1.1\r\n" + HOST + b"\r\n") * 3)
    server.until(lambda: any(is_paused(connection) for connection in connections(server)))
    waiting = server.call(lambda: connections(server)[0].transport.get_write_buffer_size())
    assert waiting < 33 * azt.MIB
    for _ in range(3):
        answer = client.read_answer()
        assert len(answer.body) == 32 * azt.MIB


def connections(server: Server) -> list[azt.Connection]:
    return list(server.http.connections)


def is_paused(connection: azt.Connection) -> bool:
    """The client reads too slowly: what was written to it waits in this process."""
    return not connection.can_write.is_set()


def test_client_that_floods_and_does_not_read_is_not_read_from_meanwhile(
    server: Server, client: Client
) -> None:
    client.sendall(b"GET /v1/large HTTP/1.1\r\n" + HOST + b"\r\n")
    server.until(lambda: any(is_paused(connection) for connection in connections(server)))
    connection = connections(server)[0]
    flood = threading.Thread(target=client.sendall, args=(GET * 30_000,))
    flood.start()
    server.until(lambda: not connection.transport.is_reading())
    assert len(connection._waiting) < azt.PIPELINE_BYTES + 300 * azt.KIB
    assert len(client.read_answer().body) == 32 * azt.MIB
    assert all(client.read_answer().status == 200 for _ in range(30_000))
    flood.join()


def test_client_that_asks_to_close_is_closed(client: Client) -> None:
    client.sendall(b"GET /v1/echo HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    received = client.read_all()
    assert b"\r\nconnection: close\r\n" in received.lower()


def test_old_client_is_answered_and_closed(client: Client) -> None:
    client.sendall(b"GET /v1/echo HTTP/1.0\r\n" + HOST + b"\r\n" + GET)
    received = client.read_all()
    assert received.count(b"x-request-id: ") == 1
    assert b"\r\nconnection: close\r\n" in received.lower()


def test_nagle_is_off_and_the_other_loopback_address_is_served(
    server: Server, client: Client
) -> None:
    client.sendall(GET)
    client.read_answer()
    sock = connections(server)[0].transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    if socket.has_ipv6:
        assert server.addresses == [("127.0.0.1", server.port), ("::1", server.port)]
        with socket.create_connection(("::1", server.port), timeout=WAIT_S) as other:
            other.sendall(GET)
            assert other.recv(100).startswith(b"HTTP/1.1 200 ")


def test_taken_port_is_an_error(server: Server) -> None:
    other = azt.HttpServer(ROUTES, None, lambda: POLICY)
    with pytest.raises(OSError, match="in use"):
        server.run(other.listen("127.0.0.1", server.port))


# -- request bodies


def test_body_split_at_every_byte_arrives_whole(client: Client) -> None:
    body = b"0123456789"
    for byte in post("/v1/echo", body):
        client.sendall(bytes([byte]))
    answer = client.read_answer().json
    assert (answer["size"], answer["crc"]) == (len(body), zlib.crc32(body))


@pytest.mark.parametrize("size", [1, 65_536, 3_000_000])
def test_body_in_chunks_arrives_whole(server: Server, size: int) -> None:
    body = bytes(index % 251 for index in range(size))
    steps = (body[at : at + 70_001] for at in range(0, size, 70_001))
    answer = ask(server, "POST", "/v1/echo", steps)
    assert (answer.json["size"], answer.json["crc"]) == (size, zlib.crc32(body))


def test_large_body_arrives_whole(server: Server) -> None:
    server.policy = replace(POLICY, body_max_bytes=64 * azt.MIB)
    body = b"0123456789abcdef" * (2 * azt.MIB)
    answer = ask(server, "POST", "/v1/echo", body)
    assert (answer.json["size"], answer.json["crc"]) == (len(body), zlib.crc32(body))


def test_next_request_follows_a_chunked_body(client: Client) -> None:
    client.sendall(
        b"POST /v1/echo HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        + GET
    )
    assert client.read_answer().json["size"] == 3
    assert client.read_answer().json["method"] == "GET"


def test_client_that_waits_is_told_to_continue(client: Client) -> None:
    client.sendall(
        b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    )
    assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"abc")
    assert client.read_answer().json["size"] == 3


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("/v1/small", 11, 413), ("/v1/echo", 5_000_000, 413), ("/v1/nope", 3, 404)],
)
def test_client_that_waits_is_refused_before_it_sends(
    client: Client, path: str, size: int, status: int
) -> None:
    client.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Expect: 100-continue\r\nContent-Length: {size}\r\n\r\n".encode()
    )
    answer = client.read_answer()
    assert (answer.status, answer.headers["connection"]) == (status, "close")


def test_announced_body_over_the_limit_is_refused_and_the_sender_sees_it(client: Client) -> None:
    client.sendall(post("/v1/echo", b"x" * (12 * azt.MIB)))
    answer = client.read_answer()
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert client.read_all() == b""


def test_unannounced_body_over_the_limit_is_refused_and_the_sender_sees_it(client: Client) -> None:
    client.sendall(b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(12):
        client.sendall(b"100000\r\n" + b"x" * azt.MIB + b"\r\n")
    assert client.read_answer().status == 413
    assert client.read_all() == b""


def test_chunk_over_the_limit_is_refused_when_it_is_announced(client: Client) -> None:
    client.sendall(
        b"POST /v1/small HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n"
    )
    answer = client.read_answer()
    assert (answer.status, answer.code) == (413, "request_too_large")


def test_limit_of_a_route_counts_before_that_of_the_policy(server: Server) -> None:
    assert ask(server, "POST", "/v1/small", b"x" * 10).status == 200
    assert ask(server, "POST", "/v1/small", b"x" * 11).status == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_refused_request_with_a_small_body_keeps_the_connection(
    client: Client, chunked: bool
) -> None:
    body = b"3\r\nabc\r\n0\r\n\r\n" if chunked else b"abc"
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 3\r\n"
    client.sendall(b"POST /v1/nope HTTP/1.1\r\n" + HOST + framing + b"\r\n" + body + GET)
    assert client.read_answer().status == 404
    assert client.read_answer().status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_refused_request_with_a_large_body_keeps_its_reason(server: Server, chunked: bool) -> None:
    body = b"x" * (3 * azt.MIB)
    sent: Any = iter([body[:100], body]) if chunked else body
    answer = ask(server, "POST", "/v1/nope", sent)
    assert (answer.status, answer.code) == (404, "unknown_url")


def test_bodies_together_are_capped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "MAX_BODIES_BYTES", 1_500_000)
    with Client(server) as first:
        first.sendall(post("/v1/wait", b"x" * 1_000_000))
        assert server.context.started.wait(WAIT_S)
        refused = ask(server, "POST", "/v1/echo", b"x" * 1_000_000)
        server.call(server.context.go.set)
        assert first.read_answer().status == 200
    assert (refused.status, refused.code) == (503, "overloaded")
    assert refused.headers["retry-after"] == "5"
    assert ask(server, "POST", "/v1/echo", b"x" * 1_000_000).status == 200
    server.until(lambda: server.http.bodies_bytes == 0)


def test_handler_may_free_the_body_early(server: Server) -> None:
    assert ask(server, "POST", "/v1/release", b"abc").json == {"size": 0}
    server.until(lambda: server.http.bodies_bytes == 0)


# -- compressed bodies

TEXT = b'{"model": "m", "messages": []}' * 1000


def gz(data: bytes, level: int = 9) -> bytes:
    return gzip.compress(data, level, mtime=0)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gz(TEXT)),
        ("x-gzip", gz(TEXT)),
        ("GZIP", gz(TEXT)),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", raw_deflate(TEXT)),
        ("gzip, deflate", zlib.compress(gz(TEXT))),
        ("identity", TEXT),
        ("gzip", gz(b"")),
    ],
)
def test_compressed_body_is_unpacked(server: Server, coding: str, body: bytes) -> None:
    answer = ask(server, "POST", "/v1/echo", body, {"Content-Encoding": coding})
    assert answer.status == 200
    assert answer.json["crc"] in (zlib.crc32(TEXT), zlib.crc32(b""))


def test_large_compressed_body_is_unpacked_in_a_thread(server: Server) -> None:
    text = bytes(index % 256 for index in range(3 * azt.MIB))
    answer = ask(server, "POST", "/v1/echo", gz(text, 1), {"Content-Encoding": "gzip"})
    assert (answer.json["size"], answer.json["crc"]) == (len(text), zlib.crc32(text))
    assert server.http.workers.threads == 1


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"x", 415),
        ("compress", b"x", 415),
        ("gzip, gzip, gzip", b"x", 415),
        ("gzip", b"not gzip", 400),
        ("deflate", b"not deflate", 400),
        ("gzip", gz(TEXT)[:-1], 400),
        ("gzip", gz(TEXT)[:30], 400),
        ("deflate", zlib.compress(TEXT)[:-1], 400),
        ("gzip", gz(TEXT) + b"x", 400),
        ("gzip", gz(TEXT) * 2, 400),
        ("gzip, gzip", gz(TEXT), 400),
        ("gzip", gz(bytes(5 * azt.MIB)), 413),
        ("gzip, gzip", gz(gz(bytes(1000 * azt.MIB), 1)), 413),
        ("deflate", raw_deflate(bytes(64 * azt.MIB)), 413),
    ],
)
def test_hostile_compressed_body_is_refused(
    server: Server, coding: str, body: bytes, status: int
) -> None:
    answer = ask(server, "POST", "/v1/echo", body, {"Content-Encoding": coding})
    assert answer.status == status
    assert ask(server, "GET", "/v1/echo").status == 200


def test_zstd_is_unpacked_where_python_can_and_refused_with_advice_elsewhere(
    server: Server,
) -> None:
    zstd = azt.find_zstd()
    body = zstd.compress(TEXT) if zstd else b"\x28\xb5\x2f\xfd"
    answer = ask(server, "POST", "/v1/echo", body, {"Content-Encoding": "zstd"})
    if zstd:
        assert answer.json["crc"] == zlib.crc32(TEXT)
        for damaged in (body[:-1], body + b"x", body * 2, b"x" + body):
            assert (
                ask(server, "POST", "/v1/echo", damaged, {"Content-Encoding": "zstd"}).status == 400
            )
        bomb = zstd.compress(bytes(100 * azt.MIB))
        assert ask(server, "POST", "/v1/echo", bomb, {"Content-Encoding": "zstd"}).status == 413
    else:
        assert answer.status == 415
        assert "3.14" in answer.json["error"]["message"]
        assert answer.headers["accept-encoding"] == "gzip, deflate"


def test_raw_route_takes_a_compressed_body_as_it_came(server: Server) -> None:
    answer = ask(
        server, "POST", "/codex/v1/responses", b"\x28\xb5\x2f\xfd", {"Content-Encoding": "zstd"}
    )
    assert answer.json["size"] == 4
    assert answer.json["headers"]["content-encoding"] == "zstd"


# -- answers


def test_error_of_a_handler_has_the_openai_shape(server: Server) -> None:
    answer = ask(server, "POST", "/v1/refuse", b"{}")
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    assert answer.json == {
        "error": {
            "message": "Too fast: wait a second.",
            "type": "rate_limit_error",
            "param": None,
            "code": "slow_down",
        }
    }


def test_crash_of_a_handler_is_one_500_without_details(server: Server, client: Client) -> None:
    client.sendall(b"GET /v1/crash HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
    crashed, after = client.read_answer(), client.read_answer()
    assert (crashed.status, crashed.code) == (500, "internal_error")
    assert b"secret details" not in crashed.body
    assert crashed.headers["x-request-id"] in crashed.json["error"]["message"]
    assert after.status == 200


def test_header_that_would_split_the_answer_is_a_500(server: Server) -> None:
    answer = ask(server, "GET", "/v1/bad-header")
    assert answer.status == 500
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", ["x-request-id", "x-client-request-id"])
def test_request_id_of_the_client_is_kept(server: Server, name: str) -> None:
    assert (
        ask(server, "GET", "/v1/echo", headers={name: "abc-123"}).headers["x-request-id"]
        == "abc-123"
    )


def test_request_id_of_a_handler_stands_alone(client: Client) -> None:
    client.sendall(b"GET /v1/own-id HTTP/1.1\r\n" + HOST + b"\r\n")
    head = client.read_until(b"\r\n\r\n").lower()
    assert head.count(b"x-request-id: ") == 1
    assert b"x-request-id: upstream-1" in head


@pytest.mark.parametrize("value", ["a b", "a" * 129, "<x>", "caf\xe9"])
def test_unsafe_request_id_is_replaced(server: Server, value: str) -> None:
    given = ask(server, "GET", "/v1/echo", headers={"x-request-id": value}).headers["x-request-id"]
    assert given.startswith("req_")


def test_every_answer_carries_the_common_headers(server: Server) -> None:
    for answer in (ask(server, "GET", "/v1/echo"), ask(server, "GET", "/v1/nope")):
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert int(answer.headers["openai-processing-ms"]) >= 0
        assert answer.headers["date"].endswith(" GMT")


def test_record_is_closed_once_with_what_happened(server: Server) -> None:
    ask(server, "GET", "/v1/echo?secret=1")
    record = server.context.requests[0].record
    server.until(lambda: record.total_ms is not None)
    assert (record.method, record.path, record.status, record.result) == (
        "GET",
        "/v1/echo",
        200,
        "ok",
    )
    assert server.http.running == 0


# -- who may call, over the wire


def test_foreign_host_is_refused_with_the_setting(server: Server) -> None:
    answer = ask(server, "GET", "/v1/echo", headers={"Host": "evil.com"})
    assert (answer.status, answer.code) == (403, "host_not_allowed")


def test_unknown_path_tells_strangers_nothing(server: Server) -> None:
    assert ask(server, "GET", "/v1/nope", headers={"Host": "evil.com"}).status == 403


def test_page_of_this_machine_gets_its_origin_echoed(server: Server) -> None:
    answer = ask(server, "GET", "/v1/echo", headers={"Origin": "http://localhost:3000"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


def test_page_of_this_machine_can_read_errors(server: Server) -> None:
    for path in ("/v1/nope", "/v1/crash"):
        answer = ask(server, "POST", path, b"{}", {"Origin": "http://localhost:3000"})
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


@pytest.mark.parametrize(
    "path", ["/v1/echo", "/_gateway/admin/state", "/_gateway/health", "/", "/codex/v1/x"]
)
def test_foreign_page_gets_no_cors_headers(server: Server, path: str) -> None:
    for method in ("GET", "OPTIONS"):
        answer = ask(server, method, path, headers={"Origin": "https://evil.com"})
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_preflight_is_answered_where_the_call_would_be_allowed(server: Server) -> None:
    server.policy = replace(POLICY, keys={"0" * 64: {}})
    asked = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    answer = ask(server, "OPTIONS", "/v1/echo", headers=asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert answer.headers["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert "access-control-allow-private-network" not in answer.headers
    assert "access-control-allow-credentials" not in answer.headers


def test_preflight_for_a_method_that_is_not_there_is_refused(server: Server) -> None:
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "PUT"}
    assert ask(server, "OPTIONS", "/v1/echo", headers=asked).status == 405


def test_options_without_a_page_says_what_is_allowed(server: Server) -> None:
    answer = ask(server, "OPTIONS", "/v1/items/a")
    assert (answer.status, answer.headers["allow"]) == (204, "DELETE, GET, HEAD, OPTIONS")
    assert ask(server, "OPTIONS", "/v1/nope").status == 404


def test_relayed_request_needs_a_key(server: Server) -> None:
    answer = ask(server, "GET", "/v1/echo", headers={"X-Forwarded-For": "127.0.0.1"})
    assert (answer.status, answer.code) == (403, "api_key_needed")


def test_missing_and_wrong_key_are_told_apart(server: Server) -> None:
    server.policy = replace(POLICY, keys={"0" * 64: {}})
    missing, wrong = (
        ask(server, "GET", "/v1/echo"),
        ask(server, "GET", "/v1/echo", headers={"api-key": "x"}),
    )
    assert (missing.status, missing.code, missing.headers["www-authenticate"]) == (
        401,
        None,
        "Bearer",
    )
    assert (wrong.status, wrong.code) == (401, "invalid_api_key")


def test_admin_change_must_be_json(server: Server) -> None:
    marked = {"X-AZT-Admin": "1"}
    assert ask(server, "POST", "/_gateway/admin/change", b"{}", marked).status == 415
    plain = {**marked, "Content-Type": "text/plain"}
    assert ask(server, "POST", "/_gateway/admin/change", b"{}", plain).status == 415
    right = {**marked, "Content-Type": "application/json; charset=utf-8"}
    assert ask(server, "POST", "/_gateway/admin/change", b"{}", right).status == 200


# -- streams


def open_stream(
    server: Server, client: Client, first: bytes = b"", version: bytes = b"1.1"
) -> Stream:
    """A running stream whose head has been read."""
    server.context.stream = body = Stream(first)
    client.sendall(b"GET /v1/stream HTTP/" + version + b"\r\n" + HOST + b"\r\n")
    head = client.read_until(b"\r\n\r\n")
    assert (b"transfer-encoding: chunked" in head.lower()) == (version == b"1.1")
    assert body.events["start"].wait(WAIT_S)
    return body


def test_stream_is_written_in_chunks_and_the_connection_kept(
    server: Server, client: Client
) -> None:
    body = open_stream(server, client, b"first")
    assert client.read_until(b"first\r\n") == b"5\r\nfirst\r\n"
    server.write(b"")
    server.write(b"x" * 300)
    assert client.read_until(b"x\r\n") == b"12c\r\n" + b"x" * 300 + b"\r\n"
    server.call(body.sink.finish)
    assert client.read_until(b"\r\n\r\n") == b"0\r\n\r\n"
    client.sendall(GET)
    assert client.read_answer().status == 200
    assert "cancel" not in body.calls


def test_stream_to_an_old_client_ends_with_the_connection(server: Server, client: Client) -> None:
    body = open_stream(server, client, b"first", version=b"1.0")
    server.write(b"second")
    server.call(body.sink.finish)
    assert client.read_all() == b"firstsecond"


def test_head_and_first_bytes_of_a_stream_are_one_write(server: Server, client: Client) -> None:
    server.context.stream = Stream(b"first")
    client.sendall(b"GET /v1/stream HTTP/1.1\r\n" + HOST + b"\r\n")
    assert client.recv(65536).endswith(b"\r\n\r\n5\r\nfirst\r\n")


def test_cut_stream_is_seen_as_broken(server: Server, client: Client) -> None:
    body = open_stream(server, client, b"first")
    server.call(body.sink.cut)
    assert client.read_all() == b"5\r\nfirst\r\n"
    record = server.context.requests[0].record
    assert (record.result, record.status) == ("failed", 200)


def test_cut_stream_to_an_old_client_is_seen_as_broken(server: Server, client: Client) -> None:
    body = open_stream(server, client, version=b"1.0")
    server.call(
        lambda: (
            connections(server)[0]
            .transport.get_extra_info("socket")
            .setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        )
    )
    server.call(body.sink.cut)
    with pytest.raises(ConnectionResetError):
        client.read_all()


def test_head_of_a_stream_is_answered_without_running_it(server: Server, client: Client) -> None:
    server.context.stream = body = Stream()
    client.sendall(b"HEAD /v1/stream HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
    assert b"transfer-encoding: chunked" in client.read_until(b"\r\n\r\n").lower()
    assert client.read_answer().status == 200
    assert body.calls == ["cancel"]


def test_stream_that_fails_to_start_is_cut(server: Server, client: Client) -> None:
    class Broken(Stream):
        def start(self, sink: azt.Sink) -> None:
            raise ZeroDivisionError

    server.context.stream = Broken()
    client.sendall(b"GET /v1/stream HTTP/1.1\r\n" + HOST + b"\r\n")
    assert b"0\r\n\r\n" not in client.read_all()
    assert ask(server, "GET", "/v1/echo").status == 200


def test_slow_reader_pauses_the_stream_and_resumes_it(server: Server, client: Client) -> None:
    body = open_stream(server, client)
    piece = b"x" * 65536
    while not body.events["pause"].is_set():
        server.write(piece)
    waiting = server.call(lambda: connections(server)[0].transport.get_write_buffer_size())
    assert waiting <= azt.WRITE_BUFFER_BYTES + len(piece) + 16
    assert "resume" not in body.calls
    assert client.read_until(b"0\r\n\r\n")
    assert body.events["resume"].wait(WAIT_S)


def test_iterator_is_sent_piece_by_piece(server: Server, client: Client) -> None:
    async def three() -> AsyncIterator[bytes]:
        yield b"one"
        await server.context.go.wait()
        yield b""
        yield b"two"

    server.context.pieces = three()
    client.sendall(b"GET /v1/pieces HTTP/1.1\r\n" + HOST + b"\r\n")
    client.read_until(b"\r\n\r\n")
    assert client.read_until(b"one\r\n") == b"3\r\none\r\n"
    server.call(server.context.go.set)
    assert client.read_until(b"0\r\n\r\n") == b"3\r\ntwo\r\n0\r\n\r\n"


def test_iterator_waits_for_a_slow_reader(server: Server, client: Client) -> None:
    made = []

    async def many() -> AsyncIterator[bytes]:
        for _ in range(400):
            made.append(65536)
            yield b"x" * 65536

    server.context.pieces = many()
    client.sendall(b"GET /v1/pieces HTTP/1.1\r\n" + HOST + b"\r\n")
    server.until(lambda: any(is_paused(connection) for connection in connections(server)))
    before = len(made)
    server.call(lambda: None)
    assert len(made) == before < 400
    assert client.read_until(b"0\r\n\r\n")
    assert len(made) == 400


def test_iterator_that_fails_cuts_the_answer(server: Server, client: Client) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"one"
        raise ZeroDivisionError

    server.context.pieces = failing()
    client.sendall(b"GET /v1/pieces HTTP/1.1\r\n" + HOST + b"\r\n")
    assert client.read_all().endswith(b"3\r\none\r\n")


def test_iterator_is_closed_when_the_client_leaves(server: Server) -> None:
    closed = threading.Event()

    async def waiting() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await server.context.go.wait()
        finally:
            closed.set()

    server.context.pieces = waiting()
    with Client(server) as client:
        client.sendall(b"GET /v1/pieces HTTP/1.1\r\n" + HOST + b"\r\n")
        client.read_until(b"one\r\n")
    assert closed.wait(WAIT_S) is True


# -- the client leaves, or only stops sending


def test_client_that_leaves_cancels_the_handler_at_once(server: Server) -> None:
    with Client(server) as client:
        client.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
        assert server.context.started.wait(WAIT_S)
    left_s = time.monotonic()
    assert server.context.cancelled.wait(WAIT_S)
    assert time.monotonic() - left_s < 0.25
    record = server.context.requests[0].record
    server.until(lambda: server.http.running == 0)
    assert (record.status, record.result, record.error_code) == (
        499,
        "cancelled",
        "client_closed_request",
    )


def test_client_that_leaves_a_stream_cancels_it_at_once(server: Server) -> None:
    with Client(server) as client:
        body = open_stream(server, client, b"first")
        client.read_until(b"first\r\n")
    left_s = time.monotonic()
    assert body.events["cancel"].wait(WAIT_S)
    assert time.monotonic() - left_s < 0.25
    assert server.context.requests[0].record.result == "cancelled"


def test_client_that_resets_a_stream_cancels_it(server: Server) -> None:
    client = Client(server)
    body = open_stream(server, client)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert body.events["cancel"].wait(WAIT_S)


@pytest.mark.parametrize(
    "sent",
    [b"GET /v1/echo HT", b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\nabc"],
)
def test_client_that_leaves_inside_its_request_is_forgotten(server: Server, sent: bytes) -> None:
    with Client(server) as client:
        client.sendall(sent)
        server.until(lambda: bool(connections(server)))
    server.until(lambda: not connections(server) and not server.http.bodies_bytes)


def test_half_closed_client_is_still_answered(server: Server, client: Client) -> None:
    client.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
    client.shutdown(socket.SHUT_WR)
    # The probe came, and its checks have found nothing, before the answer is there.
    assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    passed = server.begin(asyncio.sleep(2 * azt.HALF_CLOSE_CHECKS_S[-1]))
    passed.result(WAIT_S)
    server.call(server.context.go.set)
    assert client.read_answer().json == {"waited": True}
    assert client.read_all() == b""
    assert not server.context.cancelled.is_set()


def test_half_closed_client_gets_all_pipelined_answers(client: Client) -> None:
    client.sendall(GET * 5)
    client.shutdown(socket.SHUT_WR)
    received = client.read_all()
    assert received.count(b"HTTP/1.1 200 ") == 5


@pytest.mark.parametrize("may_probe", [True, False])
def test_half_closed_stream_goes_on(server: Server, client: Client, may_probe: bool) -> None:
    body = open_stream(server, client)
    body.may_probe = may_probe
    client.shutdown(socket.SHUT_WR)
    assert body.events["probe"].wait(WAIT_S)
    server.begin(asyncio.sleep(2 * azt.HALF_CLOSE_CHECKS_S[-1])).result(WAIT_S)
    server.write(b"more")
    server.call(body.sink.finish)
    assert client.read_all().endswith(b"4\r\nmore\r\n0\r\n\r\n")
    assert "cancel" not in body.calls


# -- time limits


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time limit is over at the next tick but one."""
    monkeypatch.setattr(azt, "TICK_S", 0.02)
    for name in (
        "HEAD_TIMEOUT_S",
        "BODY_STALL_S",
        "KEEP_ALIVE_S",
        "WRITE_STALL_S",
        "LINGER_S",
        "LINGER_REFUSED_S",
    ):
        monkeypatch.setattr(azt, name, 0.1)


def test_slow_head_is_refused(quick: None, server: Server, client: Client) -> None:
    client.sendall(b"GET /v1/echo HTTP/1.1\r\n")
    assert client.read_all().startswith(b"HTTP/1.1 408 ")


def test_slow_second_head_is_refused(quick: None, server: Server, client: Client) -> None:
    client.sendall(GET)
    client.read_answer()
    client.sendall(b"G")
    assert client.read_all().startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", GET])
def test_idle_connection_is_closed_without_a_word(
    quick: None, server: Server, client: Client, sent: bytes
) -> None:
    client.sendall(sent)
    if sent:
        client.read_answer()
    assert client.read_all() == b""


def test_stalled_body_is_refused(quick: None, server: Server, client: Client) -> None:
    client.sendall(b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\nabc")
    assert client.read_all().startswith(b"HTTP/1.1 408 ")


def test_dripping_body_is_refused(quick: None, server: Server, client: Client) -> None:
    client.sendall(b"POST /v1/echo HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n")
    client.setblocking(False)
    received = b""
    while not received:
        client.send(b"x")
        try:
            received = client.recv(65536)
        except BlockingIOError:
            server.begin(asyncio.sleep(0.02)).result(WAIT_S)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_reader_that_stops_reading_is_cut(quick: None, server: Server, client: Client) -> None:
    body = open_stream(server, client)
    while not body.events["pause"].is_set():
        server.write(b"x" * 65536)
    assert body.events["cancel"].wait(WAIT_S)
    server.until(lambda: not connections(server))


def test_slow_reader_of_a_large_answer_gets_all_of_it(
    quick: None, server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "WRITE_STALL_S", 2.0)
    client.sendall(b"GET /v1/large HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    client.read_until(b"\r\n\r\n")
    size = 0
    while data := client.read_some(2 * azt.MIB):
        size += len(data)
        server.begin(asyncio.sleep(0.02)).result(WAIT_S)
    assert size == 32 * azt.MIB


def test_client_that_never_closes_is_aborted_after_its_answer(
    quick: None, server: Server, client: Client
) -> None:
    client.sendall(b"GET /v1/echo HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    client.read_all()
    server.until(lambda: not connections(server))


def test_client_that_floods_after_a_malformed_request_is_cut(
    server: Server, client: Client
) -> None:
    client.sendall(b"\x00")
    with pytest.raises(OSError):
        for _ in range(1000):
            client.sendall(b"x" * 65536)


# -- how many


def test_connections_of_one_peer_are_capped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "MAX_CONNECTIONS_LOOPBACK", 2)
    with Client(server) as first, Client(server) as second:
        for client in (first, second):
            client.sendall(GET)
            assert client.read_answer().status == 200
        with Client(server) as third:
            assert third.read_all().startswith(b"HTTP/1.1 503 ")
    server.until(lambda: not connections(server))
    assert ask(server, "GET", "/v1/echo").status == 200


def test_connections_of_one_network_address_are_capped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "MAX_CONNECTIONS_PER_PEER", 1)
    monkeypatch.setattr(azt, "_LOOPBACK_NETWORKS", (ipaddress.ip_network("127.0.0.1/32"),))
    server.policy = replace(POLICY, own_networks=(ipaddress.ip_network("127.0.0.0/8"),))
    with Client(server, "127.0.0.2") as first:
        first.sendall(GET)
        assert first.read_answer().status == 200
        with Client(server, "127.0.0.2") as second, Client(server, "127.0.0.3") as other:
            refused = second.read_all()
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 5\r\n" in refused
            other.sendall(GET)
            assert other.read_answer().status == 200


def test_connections_together_are_capped(server: Server) -> None:
    server.http.connections_max = 2
    with Client(server) as first, Client(server) as second:
        for client in (first, second):
            client.sendall(GET)
            assert client.read_answer().status == 200
        with Client(server) as third:
            assert third.read_all().startswith(b"HTTP/1.1 503 ")


def test_requests_of_one_network_address_are_capped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "MAX_LAN_STREAMS", 1)
    # Other loopback addresses stand in for the network.
    monkeypatch.setattr(azt, "_LOOPBACK_NETWORKS", (ipaddress.ip_network("127.0.0.1/32"),))
    server.policy = replace(POLICY, own_networks=(ipaddress.ip_network("127.0.0.0/8"),))
    with (
        Client(server, "127.0.0.2") as first,
        Client(server, "127.0.0.2") as second,
        Client(server, "127.0.0.3") as other,
    ):
        first.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
        assert server.context.started.wait(WAIT_S)
        second.sendall(GET)
        other.sendall(GET)
        refused = second.read_answer()
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (
            429,
            "concurrency_limit",
            "1",
        )
        assert other.read_answer().status == 200
        server.call(server.context.go.set)
        assert first.read_answer().status == 200
        second.sendall(GET)
        assert second.read_answer().status == 200


def test_own_machine_has_no_cap_on_requests(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "MAX_LAN_STREAMS", 0)
    assert ask(server, "GET", "/v1/echo").status == 200


OUT_OF_FILES = """
import asyncio, dataclasses, resource, socket, sys
import azt

async def main():
    none = frozenset()
    policy = azt.Policy(none, none, none, True, False, (), {}, "", 1000)
    async def ok(context, request):
        return azt.json_reply({})
    server = azt.HttpServer([azt.Route("GET", "/v1/x", ok, "api")], None, lambda: policy)
    port = (await server.listen("127.0.0.1", 0))[0][1]
    kept = await asyncio.open_connection("127.0.0.1", port)
    async def ask(reader, writer):
        writer.write(b"GET /v1/x HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        return await reader.readuntil(b"{}")
    await ask(*kept)
    hogs = []
    clients = [socket.socket() for _ in range(20)]
    soft = max(client.fileno() for client in clients) + 3
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    loop = asyncio.get_running_loop()
    for client in clients:
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
    turned_away = await asyncio.wait_for(loop.sock_recv(clients[10], 10), 10)
    assert turned_away == b"", turned_away
    assert b" 200 " in await ask(*kept)
    for client in clients:
        client.close()
    while True:
        try:
            fresh = await asyncio.open_connection("127.0.0.1", port)
            assert b" 200 " in await ask(*fresh)
            break
        except (ConnectionError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.05)
    fresh[1].close()
    kept[1].close()
    await server.drain(0)
    print("survived")

asyncio.run(asyncio.wait_for(main(), 20))
"""


def test_running_out_of_files_turns_new_connections_away_and_nothing_else() -> None:
    folder = str(Path(azt.__file__).parent)
    script = f"import sys; sys.path.insert(0, {folder!r})\n{OUT_OF_FILES}"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.returncode) == ("survived\n", 0), ran.stderr
    assert ran.stderr.count("Too many open files") == 1


# -- stopping


def test_drain_closes_idle_connections_and_lets_running_ones_finish(server: Server) -> None:
    with Client(server) as idle, Client(server) as running:
        idle.sendall(GET)
        idle.read_answer()
        running.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
        assert server.context.started.wait(WAIT_S)
        drained = server.begin(server.http.drain(WAIT_S))
        assert idle.read_all() == b""
        with pytest.raises(ConnectionRefusedError):
            Client(server)
        server.call(server.context.go.set)
        answer = running.read_answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert running.read_all() == b""
    drained.result(WAIT_S)


def test_drain_ends_what_does_not_finish_in_time(server: Server) -> None:
    with Client(server) as streaming, Client(server) as waiting:
        body = open_stream(server, streaming)
        waiting.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
        assert server.context.started.wait(WAIT_S)
        drained = server.begin(server.http.drain(0.05))
        assert streaming.read_all() == b"16\r\nstopped: shutting_down\r\n0\r\n\r\n"
        answer = waiting.read_answer()
        assert (answer.status, answer.code, answer.headers["connection"]) == (
            503,
            "shutting_down",
            "close",
        )
    drained.result(WAIT_S)
    assert body.calls == ["start", "stop"]
    assert not connections(server)


def test_new_request_on_a_kept_connection_is_told_of_the_shutdown(server: Server) -> None:
    with Client(server) as running, Client(server) as late:
        running.sendall(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
        assert server.context.started.wait(WAIT_S)
        late.sendall(GET[:-2])
        server.until(lambda: any(connection._waiting for connection in connections(server)))
        drained = server.begin(server.http.drain(WAIT_S))
        server.until(lambda: server.http.draining)
        late.sendall(GET[-2:])
        answer = late.read_answer()
        assert (answer.status, answer.code, answer.headers["connection"]) == (
            503,
            "shutting_down",
            "close",
        )
        server.call(server.context.go.set)
        assert running.read_answer().status == 200
    drained.result(WAIT_S)
