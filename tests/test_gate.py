"""The strict gate: malformed requests, whole and split at every byte, pure and over sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness import Claim
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]

GOOD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOST = b"Host: localhost\r\n"


def get(fields: bytes = b"", *, target: bytes = b"/v1/models", host: bytes = HOST) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + host + fields + b"\r\n"


def post(fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /v1/echo HTTP/1.1\r\n" + HOST + fields + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", body)


# Every control but tab; CR and LF have vectors of their own.
CONTROLS = [bytes([byte]) for byte in (*range(9), 11, 12, *range(14, 32), 127)]

MALFORMED: list[tuple[int, bytes]] = [
    # the request line
    *[
        (400, line + b"\r\n" + HOST + b"\r\n")
        for line in (
            b"GET /v1/models",
            b"GET",
            b"GET /",
            b"GET HTTP/1.1",
            b"GET  /v1/models HTTP/1.1",
            b"GET /v1/models  HTTP/1.1",
            b"GET /v1/models HTTP/1.1 ",
            b"GET\t/v1/models\tHTTP/1.1",
            b"GET /v1/models\tHTTP/1.1",
            b"GET /v1/ models HTTP/1.1",
            b"GET /v1/models http/1.1",
            b"GET /v1/models Http/1.1",
            b"GET /v1/models HTTP/1",
            b"GET /v1/models HTTP/1.",
            b"GET /v1/models HTTP/.1",
            b"GET /v1/models HTTP/1.1.1",
            b"GET /v1/models HTTP/11",
            b"GET /v1/models HTTP/1.10",
            b"GET /v1/models HTTP/01.1",
            b"GET /v1/models HTTP/+1.1",
            b"GET /v1/models HTTP/1,1",
            b"GET /v1/models HTTP 1.1",
            b"GET /v1/models HTTPS/1.1",
            b"GET /v1/models XTTP/1.1",
            b"GET /v1/models HTTP/1.1HTTP/1.1",
            b"GET /v1/models HTTP/1.1, HTTP/1.1",
            b"G(ET /v1/models HTTP/1.1",
            b"G/T /v1/models HTTP/1.1",
            b"G,T /v1/models HTTP/1.1",
            b'G"T /v1/models HTTP/1.1',
            b"G:T /v1/models HTTP/1.1",
            b"GET: /v1/models HTTP/1.1",
            b"G\xc3\x89T /v1/models HTTP/1.1",
            b"GET /caf\xc3\xa9 HTTP/1.1",
            b"GET /v1/models\x85 HTTP/1.1",
            b"GET /v1/models HTTP/1.1\xa0",
        )
    ],
    *[
        (505, b"GET /v1/models " + version + b"\r\n" + HOST + b"\r\n")
        for version in (
            b"HTTP/0.9",
            b"HTTP/1.2",
            b"HTTP/1.9",
            b"HTTP/2.0",
            b"HTTP/3.0",
            b"HTTP/9.9",
            b"HTTP/0.0",
        )
    ],
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *[
        (400, get(target=target))
        for target in (
            b"*",
            b"v1/models",
            b"?x=1",
            b"http://other/v1/models",
            b"http://localhost:1/v1/models",
            b"http://localhost@other/",
            b"http:///v1/models",
            b"http:/v1/models",
            b"http:localhost/v1/models",
            b"https://localhost/v1/models",
            b"ftp://localhost/v1/models",
            b"//localhost/v1/models#x"[1:],
            b"/v1/models#fragment",
            b"localhost:443",
            b"\\v1\\models",
            b"@/v1/models",
        )
    ],
    (400, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
    (405, b"CONNECT localhost:443 HTTP/1.1\r\n" + HOST + b"\r\n"),
    (405, b"CONNECT /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"),
    # what starts as no request at all
    (400, b"\r\n" + GOOD),
    (400, b"\n" + GOOD),
    (400, b"\r\n\r\n" + GOOD),
    (400, b" " + GOOD),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    (400, b"\x00" + GOOD),
    (400, b"\xef\xbb\xbf" + GOOD),
    (400, b"0\r\n\r\n" + GOOD),
    (400, b"\x80\x80"),
    # line ends
    (400, GOOD.replace(b"\r\n", b"\n")),
    (400, b"GET /v1/models HTTP/1.1\nHost: localhost\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\n\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\n"),
    (400, b"GET /v1/models HTTP/1.1\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\rHost: localhost\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\r\nHost: localhost\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\r\n\r\n"),
    (400, get(b"X: a\rb\r\n")),
    (400, get(b"X: a\nTransfer-Encoding: chunked\r\n")),
    (400, get(b"X: a\r\rTransfer-Encoding: chunked\r\n")),
    # controls, in every place where a program may cut or merge text
    *[(400, get(b"X: a" + control + b"b\r\n")) for control in CONTROLS],
    *[(400, get(b"X" + control + b": a\r\n")) for control in CONTROLS],
    *[(400, get(target=b"/v1/" + control + b"models")) for control in CONTROLS],
    (400, post(b"Content-Length: 5\x00\r\n", b"hello")),
    (400, post(b"Content-Length: \x0b5\r\n", b"hello")),
    # header lines
    *[
        (400, get(line + b"\r\n"))
        for line in (
            b"X",
            b": value",
            b":",
            b" X: y",
            b"\tX: y",
            b"X : y",
            b"X\t: y",
            b"X Y: z",
            b"X(: y",
            b"X;: y",
            b'"X": y',
            b"X@: y",
            b"X/Y: y",
            b"X[1]: y",
            b"X=: y",
            b"{X}: y",
            b"\xc3\xa9: y",
            b"X\xa0: y",
            b"Transfer-Encoding : chunked",
            b"Content-Length : 3",
            b"Host : other",
        )
    ],
    (400, get(b"X: a\r\n folded\r\n")),
    (400, get(b"X: a\r\n\tfolded\r\n")),
    (400, get(b"X: a\r\n \r\n")),
    (400, get(b"Transfer-Encoding:\r\n chunked\r\n")),
    (400, get(b"Content-Length:\r\n 3\r\n")),
    (400, b"GET /v1/models HTTP/1.1\r\n " + HOST + b"\r\n"),
    # size
    (431, get(b"X: " + b"a" * azt.MAX_HEAD_BYTES + b"\r\n")),
    (431, get(target=b"/" + b"a" * azt.MAX_HEAD_BYTES)),
    (431, get(b"a:\r\n" * azt.MAX_HEAD_FIELDS)),
    (431, get(b"Cookie: a=b\r\n" * 1000)),
    (431, get(b"X: y\r\n" * 10_000)),
    # Host
    *[
        (400, get(host=b"Host: " + host + b"\r\n"))
        for host in (
            b"local host",
            b"localhost:",
            b"localhost:x",
            b"localhost:-1",
            b"localhost:99999",
            b"localhost:80:80",
            b"user@localhost",
            b"localhost/",
            b"localhost/v1",
            b"http://localhost",
            b"localhost?x",
            b"localhost#x",
            b"localhost,other",
            b"localhost, other",
            b"localhost;other",
            b"localhost\\other",
            b"[::1",
            b"::1",
            b"[::1]x",
            b"[::g]",
            b"[:::::]",
            b"[1.2.3.4]",
            b"[::1]:99999",
            b"[fe80::1%25eth0]",
            b"local\thost",
            b"%6cocalhost",
            b"-localhost",
            b".localhost",
            b"localhost*",
            b"'localhost'",
            b'"localhost"',
            b"<localhost>",
            b"lo\xc3\xa7alhost",
            b"a" * 300,
        )
    ],
    (400, b"GET /v1/models HTTP/1.1\r\n\r\n"),
    (400, b"GET /v1/models HTTP/1.1\r\nX: y\r\n\r\n"),
    # more than one of what must be one
    (400, get(b"Host: localhost\r\n")),
    (400, get(b"host: other\r\n")),
    (400, get(b"HOST:\r\n")),
    (400, get(b"Origin: http://localhost\r\nOrigin: http://evil\r\n")),
    (400, post(b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc")),
    (400, post(b"Content-Length: 3\r\nContent-Length: 30\r\n", b"abc")),
    (400, post(b"Content-Length: 0\r\ncontent-length: 3\r\n", b"abc")),
    (
        400,
        post(
            b"Content-Type: application/json\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n"
        ),
    ),
    (400, post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n")),
    (400, post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"0\r\n\r\n")),
    # framing
    *[
        (400, post(b"Content-Length:" + value + b"\r\n", b"hello"))
        for value in (
            b"",
            b" ",
            b" +5",
            b" -5",
            b" 5,5",
            b" 5, 5",
            b" 5 5",
            b" 0x5",
            b" 5.0",
            b" 5e0",
            b" 5_0",
            b" five",
            b' "5"',
            b" 5;",
            b" 5\t5",
            b" 9999999999999999",
            b" 00000000000000005",
            b" 18446744073709551616",
            b" \xd9\xa5",
        )
    ],
    (400, post(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n")),
    (400, post(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n")),
    (400, post(b"Content-Length: 5\r\nTransfer-Encoding: identity\r\n", b"hello")),
    (400, post(b"content-length: 0\r\ntransfer-ENCODING: chunked\r\n", b"0\r\n\r\n")),
    (400, b"POST /v1/echo HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    *[
        (501, post(b"Transfer-Encoding:" + value + b"\r\n", b"0\r\n\r\n"))
        for value in (
            b"",
            b" Chunked",
            b" CHUNKED",
            b" chunked, chunked",
            b" chunked,",
            b" ,chunked",
            b" chunked;q=1",
            b" chunked chunked",
            b" gzip, chunked",
            b" chunked, gzip",
            b" gzip",
            b" identity",
            b" identity, chunked",
            b" xchunked",
            b" chunkedx",
            b" chunk",
            b' "chunked"',
            b" 'chunked'",
            b" \xc2\xa0chunked",
            b" x",
        )
    ],
    # chunked bodies
    *[
        (400, chunked(body))
        for body in (
            b"\r\n",
            b"x\r\n",
            b"g\r\nabc\r\n",
            b"-3\r\nabc\r\n",
            b"+3\r\nabc\r\n",
            b"0x3\r\nabc\r\n",
            b"3 \r\nabc\r\n",
            b" 3\r\nabc\r\n",
            b"3\t;x\r\nabc\r\n",
            b"3\nabc\n",
            b"3\n\r\nabc\r\n",
            b"3\rabc\r\n",
            b"3\r\r\nabc\r\n",
            b"3\r\nabcX\r\n",
            b"3\r\nabc\n0\r\n\r\n",
            b"3\r\nabcd\r\n0\r\n\r\n",
            b"3\r\nabc\r\rx",
            b"3\r\nabc0\r\n\r\n",
            b"3\r\nab\r\n0\r\n\r\n",
            b"3,3\r\nabc\r\n",
            b"3_0\r\nabc\r\n",
            b"0000000000003\r\nabc\r\n",
            b"FFFFFFFFFFFFF\r\n",
            b"3;\x00\r\nabc\r\n",
            b"3;a=\x7f\r\nabc\r\n",
            b"3;\xe9\r\nabc\r\n",
            b"3;a\nb\r\nabc\r\n",
            b"3;a\rb\r\nabc\r\n",
            b"3;" + b"a" * 256 + b"\r\nabc\r\n",
            b"3;" + b"a" * 9999,
            b"3" * 300,
            b"0\r\nX\r\n\r\n",
            b"0\r\n X: y\r\n\r\n",
            b"0\r\nX : y\r\n\r\n",
            b"0\r\nX: a\nb\r\n\r\n",
            b"0\r\nX: \x00\r\n\r\n",
            b"0\r\n\n",
            b"0\n\r\n",
            b"0\r\n: x\r\n\r\n",
            b"0\r\nX: " + b"a" * azt.MAX_TRAILER_BYTES + b"\r\n\r\n",
            b"0\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
            b"1\r\na\r\n\xd9\xa3\r\nabc\r\n",
        )
    ],
]

WELL_FORMED = [
    GOOD,
    b"GET / HTTP/1.0\r\n\r\n",
    get(target=b"http://localhost/v1/models"),
    get(target=b"http://localhost"),
    get(host=b"host:localhost:8787\r\n"),
    get(host=b"Host: [::1]:8787\r\n"),
    get(host=b"Host: 127.0.0.1\t\r\n"),
    get(host=b"Host: my_box-2.local.\r\n"),
    get(host=b"Host:\r\n"),
    get(b"X:\r\nY: \t\r\nZ: caf\xc3\xa9 \xff\r\n"),
    get(b"a:\r\n" * (azt.MAX_HEAD_FIELDS - 1)),
    get(target=b"/v1/models/%7Ba%7D?x=[1]|{2}^`"),
    get(b"!#$%&'*+-.^_`|~09azAZ: odd but legal\r\n"),
    post(b"Content-Length: 5\r\n", b"hello"),
    post(b"Content-Length:\t5 \r\n", b"hello"),
    post(b"Content-Length: 000000000000005\r\n", b"hello"),
    chunked(b"5\r\nhello\r\n0\r\n\r\n"),
    chunked(b"2;a=b\r\nhe\r\n00000000003\r\nllo\r\n0;x\r\nX-Trailer: y\r\n\r\n"),
    chunked(b"2;" + b"a" * 255 + b"\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
]


@dataclass
class Verdict:
    """What the gate makes of some bytes: a status (0: nothing wrong) and the body it read."""

    status: int = 0
    body: bytes = b""
    complete: bool = False


def judge(pieces: list[bytes]) -> Verdict:
    """Feed the pieces as a connection would: head, gate, body; stop at the first fault."""
    verdict, waiting = Verdict(), b""
    framing: azt.Framing | None = None
    try:
        for piece in pieces:
            waiting += piece
            if framing is None and waiting:
                end = azt.find_head(waiting)
                if not end:
                    continue
                head, waiting = waiting[:end], waiting[end:]
                azt.read_head(head)
                framing = body_framing(head)
                verdict.complete = framing.ended
            if framing is not None and not framing.ended:
                verdict.body += framing.feed(waiting)
                waiting = framing.rest
                verdict.complete = framing.ended
    except azt.AztError as error:
        verdict = Verdict(error.status)
    except ValueError:  # malformed chunks
        verdict = Verdict(400)
    return verdict


def body_framing(head: bytes) -> azt.Framing:
    lines = head.lower().split(b"\r\n")
    lengths = [line.partition(b":")[2] for line in lines if line.startswith(b"content-length:")]
    is_chunked = b"transfer-encoding: chunked" in lines
    return azt.Framing(is_chunked, int(lengths[0]) if lengths else 0)


def test_there_are_more_than_two_hundred_vectors() -> None:
    assert len(MALFORMED) >= 200
    assert len({raw for _, raw in MALFORMED}) == len(MALFORMED)


@pytest.mark.parametrize(("status", "raw"), MALFORMED)
def test_malformed_request_is_refused_whole(claim: NewClaim, status: int, raw: bytes) -> None:
    tries = claim(1, "malformed requests, whole: refused with the status that fits")
    tries.check(judge([raw]).status == status, raw)


@pytest.mark.parametrize(("status", "raw"), MALFORMED)
def test_malformed_request_is_refused_split_at_every_byte(
    claim: NewClaim, status: int, raw: bytes
) -> None:
    tries = claim(1, "the same in two pieces, split at every byte")
    # Long runs of filler add nothing: cut within the first and last bytes and at the limits.
    size = len(raw)
    for at in range(1, size):
        if at < 400 or size - at < 200 or abs(at - azt.MAX_HEAD_BYTES) < 3:
            tries.check(judge([raw[:at], raw[at:]]).status == status, (raw, at))


@pytest.mark.parametrize(("status", "raw"), [(s, raw) for s, raw in MALFORMED if len(raw) < 2000])
def test_malformed_request_is_refused_byte_by_byte(
    claim: NewClaim, status: int, raw: bytes
) -> None:
    tries = claim(1, "the same in pieces of one byte")
    tries.check(judge([raw[at : at + 1] for at in range(len(raw))]).status == status, raw)


@pytest.mark.parametrize("raw", WELL_FORMED)
def test_well_formed_request_passes_in_every_split(raw: bytes) -> None:
    whole = judge([raw])
    splits = [judge([raw[:at], raw[at:]]) for at in range(1, len(raw))]
    drip = judge([raw[at : at + 1] for at in range(len(raw))])
    assert whole.status == 0
    assert all(split == whole for split in [*splits, drip])


def test_body_is_what_was_sent_in_chunks() -> None:
    verdict = judge([chunked(b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nX: y\r\n\r\n")])
    assert (verdict.body, verdict.complete) == (b"hello!", True)


def test_framing_stops_at_the_end_of_the_body() -> None:
    framing = azt.Framing(True, None)
    framing.feed(b"1\r\na\r\n0\r\n\r\nGET / HTTP/1.1\r\n")
    assert (framing.ended, framing.rest) == (True, b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("status", "raw"),
    [
        (501, post(b"Transfer-Encoding: gzip\r\n")),
        (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
    ],
)
def test_what_azt_does_not_implement_is_still_the_fault_of_the_request(
    status: int, raw: bytes
) -> None:
    with pytest.raises(azt.AztError) as caught:
        azt.read_head(raw)
    assert (caught.value.status, caught.value.type) == (status, "invalid_request_error")


def test_head_of_exactly_the_limit_passes() -> None:
    filler = azt.MAX_HEAD_BYTES - len(get(b"X: \r\n"))
    assert judge([get(b"X: " + b"a" * filler + b"\r\n")]).status == 0
    assert judge([get(b"X: " + b"a" * (filler + 1) + b"\r\n")]).status == 431


# -- random requests

PIECES = st.sampled_from(
    [
        b"GET",
        b"POST",
        b" ",
        b"/v1/models",
        b"*",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b"\t",
        b":",
        b"Host: localhost",
        b"Content-Length: 3",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding:",
        b"chunked",
        b"X: y",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"abc",
        b"\x00",
        b"\xff",
        GOOD[:-2],
        GOOD,
        post(b"Content-Length: 3\r\n"),
        chunked(b""),
    ]
)
RANDOM = st.one_of(
    st.lists(PIECES, max_size=12).map(b"".join),
    st.binary(max_size=60),
    st.tuples(st.sampled_from(WELL_FORMED), st.integers(0, 300), st.binary(max_size=2)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
    ),
)


CUTS = st.lists(st.integers(0, 400), max_size=6)


def test_any_bytes_get_the_same_verdict_whole_and_split(claim: NewClaim, many: Many) -> None:
    tries = claim(2, "random requests to the gate: no crash, whole and split judged alike")

    @settings(max_examples=many(2000, 100_000), database=None)
    @given(RANDOM, CUTS)
    def property(raw: bytes, cuts: list[int]) -> None:
        edges = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
        pieces = [raw[start:end] for start, end in zip(edges, edges[1:], strict=False)]
        tries.check(judge(pieces) == judge([raw]), (raw, cuts))

    property()


def test_what_passes_the_gate_is_the_same_to_h11(claim: NewClaim, many: Many) -> None:
    tries = claim(2, "what the gate lets through is the same request to h11")

    @settings(max_examples=many(1000, 20_000), database=None)
    @given(RANDOM)
    def property(raw: bytes) -> None:
        try:
            end = azt.find_head(raw) if raw else 0
            found = azt.read_head(raw[:end]) if end else None
        except azt.AztError:
            return
        if found is not None:
            tries.check(found == read_by_h11(raw[:end]), raw)

    property()


def read_by_h11(head: bytes) -> tuple[str, str, bool, dict[str, str]]:
    import h11

    connection = h11.Connection(h11.SERVER, azt.MAX_HEAD_BYTES)
    connection.receive_data(head)
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Request)
    merged: dict[str, list[str]] = {}
    for name, value in theirs.headers:
        merged.setdefault(name.decode(), []).append(value.decode("latin-1"))
    headers = {name: ", ".join(values) for name, values in merged.items()}
    is_modern = theirs.http_version == b"1.1"
    return theirs.method.decode(), theirs.target.decode(), is_modern, headers


# -- over a real socket


async def echo(context: None, request: azt.Request) -> azt.Reply:
    return azt.json_reply({"bytes": len(request.body)})


POLICY = azt.Policy(
    own_names=frozenset(),
    allowed_hosts=frozenset(),
    cors_origins=frozenset(),
    lan_api=True,
    loopback_exempt=False,
    own_networks=(),
    keys={},
    admin_token_hash="",
    body_max_bytes=azt.MAX_BODY_BYTES,
)
ROUTES = [azt.Route("GET", "/v1/models", echo, "api"), azt.Route("POST", "/v1/echo", echo, "api")]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with asyncio.Runner() as runner:
        server = azt.HttpServer(ROUTES, None, lambda: POLICY)
        address = runner.run(server.listen("127.0.0.1", 0))[0]
        serving = Serving(runner)
        yield address[1]
        serving.stop()
        runner.run(server.drain(0))


class Serving:
    """Runs the loop in a thread until `stop`."""

    def __init__(self, runner: asyncio.Runner) -> None:
        import threading

        self._loop = runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def answers(port: int, pieces: list[bytes]) -> bytes:
    """Everything that the server says until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        received = b""
        while data := sock.recv(65536):
            received += data
        return received


def is_refused_once(received: bytes, status: int) -> bool:
    """One answer with this status and the last word: what followed was not read as a request."""
    return (
        received.startswith(b"HTTP/1.1 %d " % status)
        and received.count(b"\r\nx-request-id: ") == 1
        and b"\r\nconnection: close\r\n" in received.lower()
        and b'{"error":{"message":' in received
    )


def test_malformed_request_gets_one_answer_and_a_closed_connection(
    port: int, claim: NewClaim, many: Many
) -> None:
    tries = claim(1, "over a socket, a good request behind them: one refusal, closed")
    for status, raw in MALFORMED[:: many(8, 1)]:
        tries.check(is_refused_once(answers(port, [raw + GOOD]), status), raw)


def test_malformed_request_in_two_packets_gets_the_same_answer(
    port: int, claim: NewClaim, many: Many
) -> None:
    tries = claim(1, "over a socket in two packets, split at every byte")
    for status, raw in [vector for vector in MALFORMED if len(vector[1]) < 400][:: many(16, 1)]:
        middle = len(raw) // 2
        for at in range(1, len(raw)) if many(0, 1) else [middle]:
            tries.check(is_refused_once(answers(port, [raw[:at], raw[at:]]), status), (raw, at))
