"""The only sockets out: pool, framing, TLS trust, proxies, and what becomes of their faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import gzip
import resource
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme
from harness import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import STREAM_HEAD, Peer, Script, Server, answer, chunk, hang, once, sized

import azt

T = TypeVar("T")

OWN = frozenset({"127.0.0.1", "localhost", "::1"})


@pytest.fixture
def pool() -> Iterator[azt.ConnectionPool]:
    made = azt.ConnectionPool(azt.Egress(own_hosts=OWN))
    yield made
    made.close()


WORKERS = azt.WorkerPool("test", 4)


def answered(pool: azt.ConnectionPool, call: azt.Call, wire: azt.Wire | None = None) -> azt.Answer:
    """On the loop, or in a thread where a wire could end it: the same code."""
    if wire is None:
        return asyncio.run(azt.open_answer(pool, WORKERS, call))
    return azt.open_response(pool, call, wire)


def fetch(
    pool: azt.ConnectionPool,
    url: str,
    body: bytes = b"",
    wire: azt.Wire | None = None,
    bytes_max: int = azt.MAX_REPLY_BYTES,
) -> azt.Answer:
    """One GET, or a POST when there is a body."""
    method = "POST" if body else "GET"
    call = azt.Call(method, url, {"x-test": "1"}, body, head_timeout_s=5.0, bytes_max=bytes_max)
    return answered(pool, call, wire)


def refused(pool: azt.ConnectionPool, url: str, body: bytes = b"", **how: Any) -> azt.UpstreamError:
    with pytest.raises(azt.UpstreamError) as caught:
        fetch(pool, url, body, **how)
    return caught.value


def served(*scripts: Script) -> Server:
    return Server(*scripts)


# -- The request ----------------------------------------------------------------------------------


def test_the_request_is_what_was_asked_for(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"ok"))) as server:
        call = azt.Call("POST", server.url + "/a/b?c=d%20e", {"authorization": "Bearer x"}, b"body")
        assert answered(pool, call).body == b"ok"
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /a/b?c=d%20e HTTP/1.1",
        f"host: 127.0.0.1:{server.port}".encode(),
        b"authorization: Bearer x",
        b"content-length: 4",
    ]
    assert body == b"body"


def test_a_bytearray_is_sent_as_it_is(pool: azt.ConnectionPool) -> None:
    body = bytearray(b"x" * 300_000)
    with served(answer(sized(b"ok"))) as server:
        answered(pool, azt.Call("POST", server.url, {}, body))
    assert server.requests[0].endswith(b"\r\n\r\n" + body)


def test_an_empty_post_says_so_and_a_get_does_not(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b""))) as server:
        answered(pool, azt.Call("POST", server.url, {}))
        answered(pool, azt.Call("GET", server.url, {}))
    assert b"content-length: 0" in server.requests[0]
    assert b"content-length" not in server.requests[1]


def test_a_password_in_the_url_never_reaches_the_host_header(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b""))) as server:
        fetch(pool, f"http://user:s3cr3t@127.0.0.1:{server.port}/")
    assert b"s3cr3t" not in server.requests[0]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "http://chatgpt.com.example.com/",
        "https://api.openai.com/v1",
        "http://10.0.0.1/",
        "file:///etc/passwd",
        "/relative",
    ],
)
def test_a_host_that_is_not_in_the_table_is_refused_without_a_socket(url: str) -> None:
    def no_socket(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_socket)
        patch.setattr(socket, "getaddrinfo", no_socket)
        error = refused(azt.ConnectionPool(azt.Egress()), url)
    assert error.code == "upstream_unreachable"
    assert "table of hosts" in error.message


def test_a_blocking_call_refuses_the_loop(pool: azt.ConnectionPool) -> None:
    async def on_the_loop() -> None:
        azt.open_response(pool, azt.Call("GET", "http://127.0.0.1:1/", {}), azt.Wire())

    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(on_the_loop())


# -- Answers --------------------------------------------------------------------------------------


def test_status_headers_and_body_come_back(pool: azt.ConnectionPool) -> None:
    head = b"ETag: W/1\r\nX-Two: a\r\nx-two: b\r\n"
    with served(answer(sized(b"body", "418 Teapot", head))) as server:
        got = fetch(pool, server.url)
    assert (got.status, got.body, got.is_stream) == (418, b"body", False)
    assert got.headers["etag"] == "W/1"
    assert got.headers["x-two"] == "a, b"
    assert got.sock is None


BODIES: dict[str, tuple[bytes, bytes]] = {
    "length": (sized(b"hello"), b"hello"),
    "empty length": (sized(b""), b""),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\n...\r\n0\r\n\r\n",
        b"hello...",
    ),
    "chunked with extension and trailer": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"hello",
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", b""),
    "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + sized(b"x"), b"x"),
    "after 103": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + sized(b"x"), b"x"),
    "after 102 and 100": (
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + sized(b"x"),
        b"x",
    ),
}


@pytest.mark.parametrize("response, body", BODIES.values(), ids=BODIES)
def test_a_body_of_every_framing_is_read_and_the_connection_kept(
    pool: azt.ConnectionPool, response: bytes, body: bytes
) -> None:
    with served(answer(response)) as server:
        assert [fetch(pool, server.url).body for _ in range(3)] == [body] * 3
        assert server.connections == 1


@pytest.mark.parametrize("response, body", BODIES.values(), ids=BODIES)
def test_a_body_that_comes_byte_by_byte_is_the_same(
    pool: azt.ConnectionPool, response: bytes, body: bytes
) -> None:
    def slowly(peer: Peer) -> None:
        while peer.read_request():
            for at in range(len(response)):
                peer.send(response[at : at + 1])

    with served(slowly) as server:
        assert fetch(pool, server.url).body == body


def test_a_body_may_end_with_its_connection(pool: azt.ConnectionPool) -> None:
    with served(once(b"HTTP/1.0 200 OK\r\n\r\nto the end")) as server:
        assert fetch(pool, server.url).body == b"to the end"
        assert fetch(pool, server.url).body == b"to the end"
        assert server.connections == 2


def test_connection_close_is_obeyed(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"x", head=b"Connection: close\r\n"))) as server:
        fetch(pool, server.url)
        fetch(pool, server.url)
        assert server.connections == 2


BROKEN = {
    "another protocol that waits for us": b"SSH-2.0-OpenSSH_9.0\r\n",
    "a line that ends without CR": b"HTTP/1.1 200 OK\r\nx: y\nContent-Length: 1\r\n\r\nx",
    "a CR in a header": b"HTTP/1.1 200 OK\r\nx: y\rz\r\nContent-Length: 1\r\n\r\nx",
    "a folded header": b"HTTP/1.1 200 OK\r\nx: y\r\n z\r\nContent-Length: 1\r\n\r\nx",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\nx",
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx",
    "an unknown transfer coding": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    ),
    "a switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "early hints without end": b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * 3000,
    "garbage": b"hello there\r\n\r\n",
    "half a status line": b"HTTP/1.1 2",
    "status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "cut in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "short of its length": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nonly this",
    "nothing of its length": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n",
    "cut in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nonly",
    "cut between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
    "cut before the last line": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"
    ),
    "bad chunk size": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n"
    ),
    "chunk longer than it says": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n"
    ),
    "10,000 fields": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    "a line of 100 KB": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    "not really gzip": sized(b"plain", head=b"Content-Encoding: gzip\r\n"),
    "cut gzip": sized(gzip.compress(b"x" * 99)[:-9], head=b"Content-Encoding: gzip\r\n"),
    "unknown coding": sized(b"x", head=b"Content-Encoding: br\r\n"),
}


@pytest.mark.parametrize("response", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_an_error_and_is_not_asked_for_again(
    pool: azt.ConnectionPool, response: bytes
) -> None:
    with served(once(response)) as server:
        error = refused(pool, server.url, b"body")
        assert error.status == 502
        assert len(server.requests) == 1


def test_what_follows_a_body_spoils_the_connection(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"mine") + sized(b"not asked for"))) as server:
        assert fetch(pool, server.url).body == b"mine"
        assert fetch(pool, server.url).body == b"mine"
        assert server.connections == 2


def test_an_answer_beyond_the_limit_is_refused(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"x" * 1000)), answer(sized(b"x" * 1001))) as server:
        assert len(fetch(pool, server.url, bytes_max=1000).body) == 1000
        pool.close()
        assert refused(pool, server.url, bytes_max=1000).status == 502


@pytest.mark.parametrize(
    "coding, coded",
    [
        ("gzip", gzip.compress(b"text" * 999)),
        ("x-gzip", gzip.compress(b"text" * 999)),
        ("GZIP", gzip.compress(b"text" * 999)),
        ("deflate", zlib.compress(b"text" * 999)),
        ("deflate", zlib.compress(b"text" * 999)[2:-4]),
        ("identity", b"text" * 999),
    ],
    ids=["gzip", "x-gzip", "capitals", "deflate", "raw deflate", "identity"],
)
def test_a_compressed_answer_is_decoded(
    pool: azt.ConnectionPool, coding: str, coded: bytes
) -> None:
    with served(answer(sized(coded, head=f"Content-Encoding: {coding}\r\n".encode()))) as server:
        assert fetch(pool, server.url).body == b"text" * 999


def test_a_compressed_answer_stops_at_the_limit(pool: azt.ConnectionPool) -> None:
    bomb = gzip.compress(bytes(100_001))
    with served(answer(sized(bomb, head=b"Content-Encoding: gzip\r\n"))) as server:
        assert refused(pool, server.url, bytes_max=100_000).status == 502


def test_a_redirect_is_an_answer_like_any_other(pool: azt.ConnectionPool) -> None:
    head = b"Location: http://127.0.0.1:1/elsewhere\r\n"
    with served(answer(sized(b"", "302 Found", head))) as server:
        assert fetch(pool, server.url).status == 302
        assert len(server.requests) == 1


def test_an_event_stream_comes_back_at_its_head(pool: azt.ConnectionPool) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
        peer.wait_closed()

    with served(script) as server:
        got = fetch(pool, server.url)
        assert got.is_stream and got.framing is not None and got.sock is not None
        body = got.framing.feed(got.rest)
        while not body:
            try:
                body = got.framing.feed(got.sock.recv(100))
            except BlockingIOError:
                continue
        assert body == b"data: 1\n\n"
        assert got.sock.gettimeout() == 0
        got.close()


def test_a_compressed_event_stream_is_refused(pool: azt.ConnectionPool) -> None:
    head = b"Content-Encoding: gzip\r\nContent-Type: text/event-stream\r\n"
    with served(once(sized(gzip.compress(b"data: 1\n\n"), head=head))) as server:
        assert refused(pool, server.url).status == 502


@pytest.mark.parametrize("status", ["400 Bad", "500 Oops"])
def test_an_error_that_calls_itself_an_event_stream_is_read_whole(
    pool: azt.ConnectionPool, status: str
) -> None:
    response = sized(b'{"detail":"no"}', status, b"Content-Type: text/event-stream\r\n")
    with served(answer(response)) as server:
        got = fetch(pool, server.url)
    assert (got.is_stream, got.body) == (False, b'{"detail":"no"}')


# -- Kept connections -----------------------------------------------------------------------------


def test_a_kept_connection_costs_no_connect(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"x"))) as server:
        fetch(pool, server.url)
        fetch(pool, server.url)
        assert server.connections == 1


def test_the_connection_used_last_is_used_first(pool: azt.ConnectionPool) -> None:
    first, second = socket.socketpair()
    third, fourth = socket.socketpair()
    with first, second, third, fourth:
        pool.give(("http", "a", 80), first)
        pool.give(("http", "a", 80), third)
        assert pool.take(("http", "a", 80)) is third
        assert pool.take(("http", "a", 80)) is first
        assert pool.take(("http", "a", 80)) is None


def test_a_connection_serves_only_its_own_scheme_host_and_port(pool: azt.ConnectionPool) -> None:
    kept, other = socket.socketpair()
    with kept, other:
        pool.give(("http", "a", 80), kept)
        for key in (("https", "a", 80), ("http", "b", 80), ("http", "a", 81)):
            assert pool.take(key) is None
        assert pool.take(("http", "a", 80)) is kept


@pytest.mark.parametrize("news", [b"", b"unexpected"])
def test_a_connection_with_news_is_dropped(pool: azt.ConnectionPool, news: bytes) -> None:
    kept, other = socket.socketpair()
    pool.give(("http", "a", 80), kept)
    other.sendall(news) if news else other.close()
    assert pool.take(("http", "a", 80)) is None
    assert kept.fileno() == -1
    other.close()


def test_old_connections_are_closed_when_another_is_kept(
    pool: azt.ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    for near, _ in pairs[:2]:
        pool.give(("http", "a", 80), near)
    monkeypatch.setattr(azt, "POOL_IDLE_S", 0.0)
    pool.give(("http", "a", 80), pairs[2][0])
    assert [near.fileno() == -1 for near, _ in pairs] == [True, True, False]
    assert pool.take(("http", "a", 80)) is None
    for _, far in pairs:
        far.close()


def test_closing_the_pool_closes_what_it_keeps() -> None:
    kept, other = socket.socketpair()
    pool = azt.ConnectionPool(azt.Egress())
    pool.give(("http", "a", 80), kept)
    pool.close()
    assert kept.fileno() == -1
    other.close()


def stale(response: bytes = sized(b"x")) -> Script:
    """Answers once; closes with a reset when the second request has come, without an answer."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(response)
        peer.read_request()
        peer.reset()

    return script


def test_a_dead_kept_connection_is_replaced_silently(pool: azt.ConnectionPool) -> None:
    with served(stale(), answer(sized(b"fresh"))) as server:
        fetch(pool, server.url, b"1")
        assert fetch(pool, server.url, b"2").body == b"fresh"
        assert server.connections == 2


def test_a_kept_connection_that_was_closed_while_idle_is_never_written_to(
    pool: azt.ConnectionPool,
) -> None:
    with served(once(sized(b"x")), answer(sized(b"fresh"))) as server:
        fetch(pool, server.url)
        deadline = time.monotonic() + 5
        while (kept := pool.take(("http", "127.0.0.1", server.port))) is not None:
            pool.give(("http", "127.0.0.1", server.port), kept)
            assert time.monotonic() < deadline
        assert fetch(pool, server.url).body == b"fresh"


def reset_before_head(peer: Peer) -> None:
    peer.read_request()
    peer.reset()


def close_before_head(peer: Peer) -> None:
    peer.read_request()


@pytest.mark.parametrize("fault", [reset_before_head, close_before_head])
def test_a_reset_before_the_head_is_tried_once_more(
    pool: azt.ConnectionPool, fault: Script
) -> None:
    with served(fault, answer(sized(b"second"))) as server:
        assert fetch(pool, server.url, b"body").body == b"second"
        assert [request.endswith(b"body") for request in server.requests] == [True, True]


@pytest.mark.parametrize("fault", [reset_before_head, close_before_head])
def test_a_second_reset_before_the_head_is_the_end(pool: azt.ConnectionPool, fault: Script) -> None:
    with served(fault) as server:
        error = refused(pool, server.url, b"body")
        assert (error.status, error.code, error.fault) == (502, "upstream_unreachable", "network")
        assert len(server.requests) == 2


PARTIAL = {
    "one byte": b"H",
    "part of the status line": b"HTTP/1.1 2",
    "part of the head": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\n\r\n",
    "the head": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "part of the body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe",
}


@pytest.mark.parametrize("sent", PARTIAL.values(), ids=PARTIAL)
@pytest.mark.parametrize("is_kept", [False, True])
def test_nothing_is_sent_again_after_the_first_byte_of_an_answer(
    pool: azt.ConnectionPool, sent: bytes, is_kept: bool
) -> None:
    arrived = threading.Event()

    def script(peer: Peer) -> None:
        if is_kept:
            peer.read_request()
            peer.send(sized(b"x"))
        peer.read_request()
        peer.send(sent)
        arrived.wait(5)
        peer.reset()

    with served(script, answer(sized(b"never"))) as server:
        if is_kept:
            fetch(pool, server.url)
        result: list[object] = []
        caller = threading.Thread(target=lambda: result.append(refused(pool, server.url, b"2")))
        caller.start()
        wait_for_bytes_to_arrive()
        arrived.set()
        caller.join(5)
        [error] = result
        assert isinstance(error, azt.UpstreamError)
        assert error.status == 502
        assert len(server.requests) == 1 + is_kept


def wait_for_bytes_to_arrive() -> None:
    """The reader must have taken the bytes before the reset: nothing outside tells when it has."""
    time.sleep(0.05)


def test_an_answer_to_a_half_sent_upload_is_read(pool: azt.ConnectionPool) -> None:
    def early(peer: Peer) -> None:
        peer.sock.recv(1000)
        peer.send(sized(b"too large", "413 Too Large", b"Connection: close\r\n"))
        peer.sock.shutdown(socket.SHUT_WR)
        peer.sock.recv(1000)

    with served(early, answer(sized(b"never"))) as server:
        got = fetch(pool, server.url, b"x" * 30_000_000)
        assert (got.status, got.body) == (413, b"too large")
        assert server.connections == 1


# -- No way there ---------------------------------------------------------------------------------


def test_a_refused_connect_is_502_within_a_second(pool: azt.ConnectionPool) -> None:
    started = time.monotonic()
    error = refused(pool, f"http://127.0.0.1:{free_port()}/")
    assert time.monotonic() - started < 1
    assert (error.status, error.code, error.fault) == (502, "upstream_unreachable", "network")
    assert "127.0.0.1" in error.message and "networkProxy.url" in error.message


def test_a_black_hole_ends_at_the_connect_timeout(
    pool: azt.ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        started = time.monotonic()
        error = refused(pool, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        took = time.monotonic() - started
        for filler in fillers:
            filler.close()
    assert 0.2 <= took < 2
    assert (error.status, error.code) == (502, "upstream_unreachable")


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "fe80::1%nosuchlink"])
def test_a_name_that_leads_nowhere_is_502(host: str) -> None:
    pool = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({host})))
    error = refused(pool, f"http://[{host}]:9/" if ":" in host else f"http://{host}/")
    assert (error.status, error.code, error.fault) == (502, "upstream_unreachable", "network")


def test_a_name_that_does_not_exist_is_502(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    error = refused(azt.ConnectionPool(azt.Egress()), "https://chatgpt.com/")
    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert "Name or service not known" in error.message


def test_a_resolver_that_never_answers_holds_nobody_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    monkeypatch.setattr(azt, "RESOLVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: over.wait(10) and [])
    started = time.monotonic()
    error = refused(azt.ConnectionPool(azt.Egress()), "https://chatgpt.com/")
    over.set()
    assert time.monotonic() - started < 2
    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert "looked up in time" in error.message


def test_the_next_address_of_a_name_is_tried(
    pool: azt.ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def two_addresses(host: str, port: int, *args: object, **kwargs: int) -> list[object]:
        dead = real("127.0.0.1", free_port(), type=socket.SOCK_STREAM)
        return [*dead, *real("127.0.0.1", port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    with served(answer(sized(b"ok"))) as server:
        assert fetch(pool, f"http://localhost:{server.port}/").body == b"ok"


def test_silence_before_the_head_is_504(pool: azt.ConnectionPool) -> None:
    with served(hang) as server:
        call = azt.Call("POST", server.url, {}, b"x", head_timeout_s=0.1)
        with pytest.raises(azt.UpstreamError) as caught:
            answered(pool, call)
        assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
        assert len(server.requests) <= 1


def test_a_head_that_drips_in_has_no_more_time_than_a_silent_one(pool: azt.ConnectionPool) -> None:
    def drip(peer: Peer) -> None:
        peer.read_request()
        for letter in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 10_000:
            peer.send(bytes([letter]))
            time.sleep(0.02)

    with served(drip) as server:
        started = time.monotonic()
        with pytest.raises(azt.UpstreamError) as caught:
            answered(pool, azt.Call("POST", server.url, {}, b"x", head_timeout_s=0.3))
        assert 0.3 <= time.monotonic() - started < 1
        assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")


def test_a_body_may_take_longer_than_its_head_as_long_as_it_goes_on(
    pool: azt.ConnectionPool,
) -> None:
    def slowly(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for letter in b"0123456789":
            time.sleep(0.05)
            peer.send(bytes([letter]))

    with served(slowly) as server:
        call = azt.Call("POST", server.url, {}, b"x", head_timeout_s=0.3)
        assert answered(pool, call).body == b"0123456789"


# -- On the loop ----------------------------------------------------------------------------------


def on_loop(main: Callable[[azt.ConnectionPool], Awaitable[T]], ca_file: str = "") -> T:
    async def within() -> T:
        pool = azt.ConnectionPool(azt.Egress(ca_file=ca_file, own_hosts=OWN))
        with contextlib.closing(pool):
            async with asyncio.timeout(10):
                return await main(pool)

    return asyncio.run(within())


class Silent:
    """Answers the first request when `is_kept`, and never the next one; sees the client leave."""

    def __init__(self, is_kept: bool) -> None:
        self._is_kept = is_kept
        self.came, self.left = threading.Event(), threading.Event()

    def __call__(self, peer: Peer) -> None:
        if self._is_kept:
            peer.read_request()
            peer.send(sized(b"x"))
        peer.read_request()
        self.came.set()
        with contextlib.suppress(OSError):
            peer.wait_closed()
        self.left.set()


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("is_secure", [False, True])
def test_a_call_that_nobody_waits_for_is_closed_within_a_quarter_second(
    is_kept: bool, is_secure: bool, ca_file: str, server_tls: ssl.SSLContext
) -> None:
    script = Silent(is_kept)

    async def main(pool: azt.ConnectionPool) -> None:
        with Server(script, tls=server_tls if is_secure else None) as server:
            call = azt.Call("POST", server.url, {}, b"x")
            if is_kept:
                await azt.open_answer(pool, WORKERS, call)
            waiting = asyncio.ensure_future(azt.open_answer(pool, WORKERS, call))
            assert await asyncio.to_thread(script.came.wait, 5)
            waiting.cancel()
            assert await asyncio.to_thread(script.left.wait, 0.25)
            assert await asyncio.gather(waiting, return_exceptions=True) != [None]
            assert waiting.cancelled()
            assert len(server.requests) == 1 + is_kept

    on_loop(main, ca_file)


def test_a_handshake_that_nobody_waits_for_is_ended_within_a_quarter_second() -> None:
    came, left = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.sock.recv(1000)
        came.set()
        peer.wait_closed()
        left.set()

    async def main(pool: azt.ConnectionPool) -> None:
        with served(script) as server:
            call = azt.Call("POST", server.url.replace("http:", "https:"), {}, b"x")
            waiting = asyncio.ensure_future(azt.open_answer(pool, WORKERS, call))
            assert await asyncio.to_thread(came.wait, 5)
            waiting.cancel()
            assert await asyncio.to_thread(left.wait, 0.25)
            await asyncio.gather(waiting, return_exceptions=True)

    on_loop(main)


def test_no_thread_waits_for_an_answer() -> None:
    script = Silent(is_kept=False)

    async def main(pool: azt.ConnectionPool) -> None:
        with served(script, answer(sized(b"x"))) as server:
            one = azt.WorkerPool("one", 1, waiting_max=0)
            call = azt.Call("POST", server.url, {}, b"x")
            waiting = asyncio.ensure_future(azt.open_answer(pool, one, call))
            assert await asyncio.to_thread(script.came.wait, 5)
            assert (await azt.open_answer(pool, one, call)).body == b"x"
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    on_loop(main)


def test_the_loop_goes_on_while_a_large_body_is_sent() -> None:
    received = threading.Event()

    def slow_reader(peer: Peer) -> None:
        assert received.wait(5)
        peer.read_request()
        peer.send(sized(b"ok"))

    async def main(pool: azt.ConnectionPool) -> None:
        with served(slow_reader) as server:
            call = azt.Call("POST", server.url, {}, bytes(8_000_000))
            waiting = asyncio.ensure_future(azt.open_answer(pool, WORKERS, call))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            received.set()
            assert (await waiting).body == b"ok"
            assert server.requests[0].endswith(b"\r\n\r\n" + call.body)

    on_loop(main)


def test_an_answer_that_came_before_the_whole_upload_spoils_the_connection() -> None:
    seen = threading.Event()

    def early(peer: Peer) -> None:
        peer.sock.recv(1000)
        peer.send(sized(b"too large", "413 Too Large"))
        assert seen.wait(5)
        peer.wait_closed()

    async def main(pool: azt.ConnectionPool) -> None:
        with served(early, answer(sized(b"second"))) as server:
            call = azt.Call("POST", server.url, {}, bytes(8_000_000))
            assert (await azt.open_answer(pool, WORKERS, call)).status == 413
            seen.set()
            small = azt.Call("POST", server.url, {}, b"x")
            assert (await azt.open_answer(pool, WORKERS, small)).body == b"second"
            assert server.connections == 2

    on_loop(main)


# -- Wire -----------------------------------------------------------------------------------------


class Caller:
    """A call on a thread of its own."""

    def __init__(self, pool: azt.ConnectionPool, url: str) -> None:
        self.wire = azt.Wire()
        self.error: BaseException | None = None
        self._pool, self._url = pool, url
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            fetch(self._pool, self._url, b"body", self.wire)
        except azt.UpstreamError as error:
            self.error = error

    def end(self) -> float:
        """End the call; the seconds until its thread has come back."""
        started = time.monotonic()
        self.wire.end()
        self._thread.join(5)
        assert not self._thread.is_alive()
        return time.monotonic() - started


def test_ending_the_wire_wakes_a_blocked_read(pool: azt.ConnectionPool) -> None:
    came, left = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        came.set()
        peer.wait_closed()
        left.set()

    with served(script) as server:
        caller = Caller(pool, server.url)
        assert came.wait(5)
        assert caller.end() < 0.25
        assert left.wait(0.25)
        assert isinstance(caller.error, azt.UpstreamError)
        assert len(server.requests) == 1


def test_ending_the_wire_wakes_a_blocked_body(pool: azt.ConnectionPool) -> None:
    came = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\npart")
        came.set()
        peer.wait_closed()

    with served(script) as server:
        caller = Caller(pool, server.url)
        assert came.wait(5)
        assert caller.end() < 0.25


def test_ending_the_wire_wakes_a_blocked_tls_handshake(
    pool: azt.ConnectionPool,
) -> None:
    came = threading.Event()

    def script(peer: Peer) -> None:
        peer.sock.recv(1000)
        came.set()
        peer.wait_closed()

    with served(script) as server:
        caller = Caller(pool, server.url.replace("http:", "https:"))
        assert came.wait(5)
        assert caller.end() < 0.25


def test_a_wire_that_was_ended_before_the_call_opens_nothing(pool: azt.ConnectionPool) -> None:
    with served(answer(sized(b"x"))) as server:
        wire = azt.Wire()
        wire.end()
        with pytest.raises(azt.UpstreamError):
            fetch(pool, server.url, wire=wire)
        assert server.requests == []


def test_ending_a_wire_after_its_call_leaves_the_kept_connection_alone(
    pool: azt.ConnectionPool,
) -> None:
    with served(answer(sized(b"x"))) as server:
        wire = azt.Wire()
        fetch(pool, server.url, wire=wire)
        wire.end()
        fetch(pool, server.url)
        assert server.connections == 1


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "root.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


def tls_for(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture(scope="module")
def server_tls(ca: trustme.CA) -> ssl.SSLContext:
    return tls_for(ca.issue_cert("localhost", "127.0.0.1"))


@pytest.fixture
def trusting(ca_file: str) -> Iterator[azt.ConnectionPool]:
    made = azt.ConnectionPool(azt.Egress(ca_file=ca_file, own_hosts=OWN))
    yield made
    made.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_company_root_in_the_ca_file_is_trusted(
    trusting: azt.ConnectionPool, server_tls: ssl.SSLContext, host: str
) -> None:
    with Server(answer(sized(b"secret")), tls=server_tls) as server:
        for _ in range(3):
            assert fetch(trusting, f"https://{host}:{server.port}/").body == b"secret"
        assert server.connections == 1


def test_a_stream_over_tls_comes_back_at_its_head(
    trusting: azt.ConnectionPool, server_tls: ssl.SSLContext
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(STREAM_HEAD)
        peer.wait_closed()

    with Server(script, tls=server_tls) as server:
        got = fetch(trusting, server.url)
        assert got.is_stream
        assert got.rest == b""
        got.close()


def test_a_dead_kept_tls_connection_is_replaced_silently(
    trusting: azt.ConnectionPool, server_tls: ssl.SSLContext
) -> None:
    with Server(stale(), answer(sized(b"fresh")), tls=server_tls) as server:
        fetch(trusting, server.url, b"1")
        assert fetch(trusting, server.url, b"2").body == b"fresh"


def yesterday() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


UNTRUSTED: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "another root": lambda ca: trustme.CA().issue_cert("127.0.0.1"),
    "expired": lambda ca: ca.issue_cert(
        "127.0.0.1", not_before=yesterday() - datetime.timedelta(days=9), not_after=yesterday()
    ),
    "wrong name": lambda ca: ca.issue_cert("other.example"),
}


@pytest.mark.parametrize("issue", UNTRUSTED.values(), ids=UNTRUSTED)
def test_a_certificate_that_does_not_hold_is_upstream_tls_and_is_not_tried_again(
    trusting: azt.ConnectionPool, ca: trustme.CA, issue: Callable[[trustme.CA], trustme.LeafCert]
) -> None:
    with Server(answer(sized(b"x")), tls=tls_for(issue(ca))) as server:
        error = refused(trusting, server.url, b"body")
        assert (error.status, error.code, error.fault) == (502, "upstream_tls", "network")
        assert "AZT_CA_FILE" in error.message
        assert server.requests == []
        assert server.connections == 1


def test_without_the_ca_file_the_company_root_is_not_trusted(
    pool: azt.ConnectionPool, server_tls: ssl.SSLContext
) -> None:
    with Server(answer(sized(b"x")), tls=server_tls) as server:
        assert refused(pool, server.url).code == "upstream_tls"


def test_plain_http_where_tls_is_expected_is_upstream_tls(pool: azt.ConnectionPool) -> None:
    def plain(peer: Peer) -> None:
        peer.sock.recv(1000)
        peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with served(plain) as server:
        url = server.url.replace("http:", "https:")
        assert refused(pool, url).code == "upstream_tls"


def test_a_handshake_that_is_cut_is_an_error(pool: azt.ConnectionPool) -> None:
    def cut(peer: Peer) -> None:
        peer.sock.recv(1000)

    with served(cut) as server:
        error = refused(pool, server.url.replace("http:", "https:"))
        assert (error.status, error.fault) == (502, "network")


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_ca_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "root.pem"
    if content is not None:
        path.write_text(content)
    with served(hang) as server:
        pool = azt.ConnectionPool(azt.Egress(ca_file=str(path), own_hosts=OWN))
        error = refused(pool, server.url.replace("http:", "https:"))
    assert (error.status, error.code) == (502, "upstream_tls")
    assert "AZT_CA_FILE" in error.message and str(path) in error.message


# -- Proxies --------------------------------------------------------------------------------------


def tunnel(peer: Peer) -> None:
    """A proxy: takes the CONNECT, then moves bytes both ways."""
    request = peer.read_request()
    host, _, port = request.split(b" ")[1].decode().rpartition(":")
    with socket.create_connection((host, int(port))) as target:
        peer.send(b"HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
        back = threading.Thread(target=pump, args=(target, peer.sock))
        back.start()
        pump(peer.sock, target)
        back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    finally:
        for sock in (source, target):
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass


def through(proxy_url: str, ca_file: str = "", no_proxy: str = "") -> azt.ConnectionPool:
    return azt.ConnectionPool(azt.Egress(proxy_url, no_proxy, ca_file, OWN))


def test_a_plain_call_goes_through_the_proxy_too() -> None:
    with served(answer(sized(b"there"))) as server, served(tunnel) as proxy:
        pool = through(proxy.url)
        assert fetch(pool, server.url).body == b"there"
        assert fetch(pool, server.url).body == b"there"
        pool.close()
    assert len(proxy.requests) == 1
    head = proxy.requests[0].split(b"\r\n")
    assert head[0] == f"CONNECT 127.0.0.1:{server.port} HTTP/1.1".encode()
    assert head[1] == f"Host: 127.0.0.1:{server.port}".encode()


def test_a_proxy_without_a_scheme_is_an_http_proxy() -> None:
    with served(answer(sized(b"there"))) as server, served(tunnel) as proxy:
        pool = through(proxy.url.removeprefix("http://"))
        assert fetch(pool, server.url).body == b"there"
        pool.close()


def test_tls_goes_through_an_http_proxy(ca_file: str, server_tls: ssl.SSLContext) -> None:
    with Server(answer(sized(b"there")), tls=server_tls) as server, served(tunnel) as proxy:
        pool = through(proxy.url, ca_file)
        assert [fetch(pool, server.url).body for _ in range(2)] == [b"there"] * 2
        assert (proxy.connections, server.connections) == (1, 1)
        pool.close()


def test_tls_goes_through_a_tls_proxy(ca_file: str, server_tls: ssl.SSLContext) -> None:
    big = bytes(range(256)) * 4000
    with (
        Server(answer(sized(big)), tls=server_tls) as server,
        Server(tunnel, tls=server_tls) as proxy,
    ):
        pool = through(proxy.url, ca_file)
        assert [fetch(pool, server.url, big).body for _ in range(3)] == [big] * 3
        assert (proxy.connections, server.connections) == (1, 1)
        pool.close()
    assert server.requests[0].endswith(big)


def test_a_tls_proxy_works_beyond_a_thousand_open_files(
    ca_file: str, server_tls: ssl.SSLContext
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2048:
        pytest.skip("this user may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        first = stack.enter_context(socket.socket())
        for _ in range(1100):
            stack.enter_context(first.dup())
        server = stack.enter_context(Server(answer(sized(b"there")), tls=server_tls))
        proxy = stack.enter_context(Server(tunnel, tls=server_tls))
        pool = through(proxy.url, ca_file)
        stack.callback(pool.close)
        assert fetch(pool, server.url).body == b"there"


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:1", "http://127.0.0.1:port", "http://[::1"])
def test_a_proxy_that_azt_cannot_use_is_named(url: str) -> None:
    error = refused(through(url), "https://chatgpt.com/")
    assert (error.status, error.code, error.fault) == (502, "proxy_failed", "network")
    assert url in error.message


def test_a_plain_call_goes_through_a_tls_proxy(ca_file: str, server_tls: ssl.SSLContext) -> None:
    with served(answer(sized(b"there"))) as server, Server(tunnel, tls=server_tls) as proxy:
        pool = through(proxy.url, ca_file)
        assert fetch(pool, server.url).body == b"there"
        pool.close()


def test_the_threads_of_a_tls_proxy_end_with_their_connection(
    ca_file: str, server_tls: ssl.SSLContext
) -> None:
    with (
        Server(answer(sized(b"x")), tls=server_tls) as server,
        Server(tunnel, tls=server_tls) as proxy,
    ):
        pool = through(proxy.url, ca_file)
        fetch(pool, server.url)
        pool.close()
        deadline = time.monotonic() + 5
        while any(thread.name == "azt-proxy" for thread in threading.enumerate()):
            assert time.monotonic() < deadline


def test_an_untrusted_tls_proxy_is_refused(server_tls: ssl.SSLContext) -> None:
    with served(hang) as server, Server(tunnel, tls=server_tls) as proxy:
        error = refused(through(proxy.url), server.url)
        assert error.code == "proxy_failed"
        assert server.connections == 0


def test_the_certificate_behind_a_proxy_is_checked(ca_file: str) -> None:
    other = tls_for(trustme.CA().issue_cert("127.0.0.1"))
    with Server(answer(sized(b"x")), tls=other) as server, served(tunnel) as proxy:
        assert refused(through(proxy.url, ca_file), server.url).code == "upstream_tls"


def test_the_password_of_the_proxy_goes_to_the_proxy_alone() -> None:
    with served(answer(sized(b"there"))) as server, served(tunnel) as proxy:
        pool = through(proxy.url.replace("http://", "http://ada:p%40ss:wo@"))
        fetch(pool, server.url)
        pool.close()
    pair = base64.b64encode(b"ada:p@ss:wo")
    assert b"Proxy-Authorization: Basic " + pair in proxy.requests[0]
    assert b"roxy" not in server.requests[0]


PROXY_FAULTS: dict[str, Script] = {
    "407": once(sized(b"", "407 Proxy Authentication Required")),
    "403": once(sized(b"no", "403 Forbidden")),
    "502": once(sized(b"", "502 Bad Gateway")),
    "closes": once(b""),
    "garbage": once(b"SSH-2.0-OpenSSH_9.0\r\n"),
    "resets": reset_before_head,
}


@pytest.mark.parametrize("fault", PROXY_FAULTS.values(), ids=PROXY_FAULTS)
def test_a_proxy_that_refuses_is_named_without_its_password(fault: Script) -> None:
    with served(hang) as server, served(fault) as proxy:
        error = refused(through(proxy.url.replace("//", "//ada:s3cr3t@")), server.url, b"body")
        assert (error.status, error.code, error.fault) == (502, "proxy_failed", "network")
        assert f"127.0.0.1:{proxy.port}" in error.message
        assert "s3cr3t" not in error.message and "ada" not in error.message
        assert server.connections == 0
        assert proxy.connections == 1


def test_a_proxy_that_asks_for_a_password_says_so() -> None:
    with served(PROXY_FAULTS["407"]) as proxy:
        assert "407" in refused(through(proxy.url), "http://127.0.0.1:1/").message


def test_a_proxy_that_is_not_there_is_named() -> None:
    port = free_port()
    error = refused(through(f"http://127.0.0.1:{port}"), "https://chatgpt.com/")
    assert (error.status, error.code) == (502, "proxy_failed")
    assert f"127.0.0.1:{port}" in error.message


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "other,127.0.0.1", "*", "localhost, 127.0.0.1"])
def test_no_proxy_goes_straight(no_proxy: str) -> None:
    with served(answer(sized(b"direct"))) as server, served(hang) as proxy:
        pool = through(proxy.url, no_proxy=no_proxy)
        assert fetch(pool, server.url).body == b"direct"
        assert proxy.connections == 0
        pool.close()


@pytest.mark.parametrize("no_proxy", ["", "example.com", "27.0.0.1"])
def test_other_names_do_not_bypass_the_proxy(no_proxy: str) -> None:
    with served(answer(sized(b"x"))) as server, served(tunnel) as proxy:
        pool = through(proxy.url, no_proxy=no_proxy)
        fetch(pool, server.url)
        assert proxy.connections == 1
        pool.close()


# -- Framing --------------------------------------------------------------------------------------


def run(framing: azt.Framing, pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """(body, what came behind it, ended) after feeding the pieces until the end."""
    body = b""
    for at, piece in enumerate(pieces):
        body += framing.feed(piece)
        if framing.ended:
            return body, framing.rest + b"".join(pieces[at + 1 :]), True
    return body, framing.rest, False


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """In two pieces at every byte, then in pieces of one, of ten and of all bytes."""
    yield from ([data[:at], data[at:]] for at in range(len(data) + 1))
    yield from (
        [data[at : at + size] for at in range(0, len(data), size)]
        for size in (1, 10, len(data) or 1)
    )


CHUNKED = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "no chunk": (b"0\r\n\r\n", b""),
    "many zeros": (b"00000000000a\r\n0123456789\r\n000\r\n\r\n", b"0123456789"),
    "both cases": (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    "line ends inside": (b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n\r\n"),
    "extensions": (b'1;a\r\nx\r\n1;b="c;d"\r\ny\r\n0;e=f\r\n\r\n', b"xy"),
    "trailers": (b"1\r\nx\r\n0\r\nA: b\r\nC:d\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("coded, body", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize("behind", [b"", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_chunked_body_is_the_same_in_every_split(
    coded: bytes, body: bytes, behind: bytes
) -> None:
    for pieces in every_split(coded + behind):
        assert run(azt.Framing(True, None), pieces) == (body, behind, True)


@pytest.mark.parametrize("coded, body", CHUNKED.values(), ids=CHUNKED)
def test_a_chunked_body_has_not_ended_before_its_last_byte(coded: bytes, body: bytes) -> None:
    for length in range(len(coded)):
        assert not run(azt.Framing(True, None), [coded[:length]])[2]


MALFORMED = [
    b"\r\n",
    b"x\r\n",
    b"-1\r\n",
    b"+1\r\nx\r\n",
    b"0x1\r\nx\r\n",
    b" 1\r\nx\r\n",
    b"1 \r\nx\r\n",
    b"1_0\r\n",
    b"1\nx\r\n",
    b"1\rx",
    b"1\r\nxy\r\n",
    b"1\r\nx\n0\r\n\r\n",
    b"1\r\nx0\r\n\r\n",
    b"1\r\nx\r\n\r\n0\r\n\r\n",
    b"1;a=\x00\r\nx\r\n",
    b"1;" + b"a" * 256 + b"\r\n",
    b"1234567890abc\r\n",
    b"1" * 400,
    b"0\r\nno colon\r\n\r\n",
    b"0\r\n folded: line\r\n\r\n",
    b"0\r\na: b\n\r\n",
    b"0\r\na: \x00\r\n\r\n",
    b"0\r\n\n",
    b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    b"0\r\na: " + b"b" * 9000,
]


@pytest.mark.parametrize("coded", MALFORMED, ids=lambda coded: repr(coded[:20]))
def test_malformed_chunks_are_refused_in_every_split(coded: bytes) -> None:
    padded = coded + b"\r\n" * 3
    for pieces in every_split(padded) if len(padded) < 300 else ([padded], [coded[:5], padded[5:]]):
        with pytest.raises(ValueError):
            run(azt.Framing(True, None), pieces)


def test_a_chunk_line_without_an_end_is_refused_and_not_stored() -> None:
    framing = azt.Framing(True, None)
    with pytest.raises(ValueError):
        for _ in range(1000):
            framing.feed(b"1")


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_body_of_a_known_length_is_the_same_in_every_split(length: int) -> None:
    for pieces in every_split(b"x" * length + b"behind"):
        framing = azt.Framing(False, length)
        body, rest, ended = run(framing, pieces) if length else (b"", b"behind", framing.ended)
        assert (body, rest, ended) == (b"x" * length, b"behind", True)


def test_the_bytes_still_to_come_are_counted() -> None:
    framing = azt.Framing(False, 5)
    framing.feed(b"ab")
    assert (framing.left, framing.ended) == (3, False)


def test_a_body_without_a_length_never_ends_by_itself() -> None:
    framing = azt.Framing(False, None)
    assert run(framing, [b"a", b"b" * 1000]) == (b"a" + b"b" * 1000, b"", False)


def splits(data: bytes) -> st.SearchStrategy[list[bytes]]:
    cuts = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)
    return cuts.map(lambda at: [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)])


@given(data=st.data(), parts=st.lists(st.binary(max_size=40), max_size=8), behind=st.binary())
def test_any_chunked_body_comes_out_of_any_split(
    data: st.DataObject, parts: list[bytes], behind: bytes
) -> None:
    coded = b"".join(chunk(part) for part in parts if part) + b"0\r\n\r\n" + behind
    pieces = data.draw(splits(coded))
    for many in (0, 4096):  # all chunks at one look, and one by one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(azt, "MANY_CHUNKS_BYTES", many)
            assert run(azt.Framing(True, None), pieces) == (b"".join(parts), behind, True)


CHUNK_ALPHABET = st.sampled_from([b"0", b"1", b"2", b"a", b"\r\n", b"\r", b"\n", b";", b":", b" "])


@settings(max_examples=300)
@given(data=st.data(), parts=st.lists(CHUNK_ALPHABET, max_size=20))
def test_whole_and_split_agree_on_anything_chunk_like(
    data: st.DataObject, parts: list[bytes]
) -> None:
    coded = b"".join(parts)

    def outcome(pieces: list[bytes], many: int) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(azt, "MANY_CHUNKS_BYTES", many)
            try:
                return run(azt.Framing(True, None), pieces)
            except ValueError:
                return "refused"

    pieces = data.draw(splits(coded))
    expected = outcome([coded], 4096)
    assert [outcome([coded], 0), outcome(pieces, 0), outcome(pieces, 4096)] == [expected] * 3


# -- decoded --------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_no_bytes_crash_the_decoder(data: bytes, coding: str) -> None:
    try:
        assert len(azt.decoded(data, coding, 1000)) <= 1000
    except ValueError:
        pass


def test_a_body_of_exactly_the_limit_passes() -> None:
    assert azt.decoded(gzip.compress(b"x" * 1000), "gzip", 1000) == b"x" * 1000
    with pytest.raises(ValueError, match="too large"):
        azt.decoded(gzip.compress(b"x" * 1001), "gzip", 1000)
