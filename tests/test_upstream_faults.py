"""Whatever the upstream, or the way to it, does wrong: each fault against each API, both ways.

One oracle judges them all (trust.md 3.3): a well-formed answer or stream end, the status that
belongs to the fault, no token in it, counted once, one line in the log, nothing that stays behind,
and the next request works. The daily run takes a sample, `python3 tests --trust` all of it.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import gzip
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from fake_upstream import (
    CHALLENGE_PAGE,
    CODEX,
    Event,
    FakeUpstream,
    Reply,
    account_file,
    answer,
    error_json,
    failed,
    flat_error,
    image,
    limit_reached,
    nested_error,
    text,
    token_refused,
)
from harness import (
    MODEL,
    Answer,
    Claim,
    Client,
    Gateway,
    Stream,
    chat_body,
    eventually,
    make_gateway,
    make_png,
)
from loopback import STREAM_HEAD, Peer, Server, chunk
from test_outbound import PROXY_FAULTS, UNTRUSTED, tls_for

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]
Json = dict[str, Any]

PNG = base64.b64encode(make_png(8, 8)).decode()
SAID = "Grüße, 日本, \U0001f600 und mehr"
HURRIED = {
    "HEARTBEAT_S": 0.3,
    "HOLD_BACK_S": 0.5,
    "RESOLVE_TIMEOUT_S": 1.0,
    "UPSTREAM_HEAD_TIMEOUT_S": 2.0,
    "UPSTREAM_IDLE_TIMEOUT_S": 2.0,
    "WRITE_STALL_S": 1.0,
}

# -- The three APIs, streaming or not --------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to ask."""

    api: str
    streaming: bool

    @property
    def path(self) -> str:
        paths = {"chat": "chat/completions", "images": "images/generations"}
        return "/v1/" + paths.get(self.api, self.api)

    @property
    def body(self) -> Json:
        asked: Json = {
            "chat": chat_body("hi"),
            "responses": {"model": MODEL, "input": "hi"},
            "images": {"prompt": "a fox"},
        }[self.api]
        return {**asked, "stream": self.streaming}

    def events(self) -> list[Event]:
        """A whole answer of the upstream."""
        return answer(image(PNG)) if self.api == "images" else text(*SAID)

    def is_whole(self, got: Answer) -> bool:
        """Did the client get all of it?"""
        if got.status != 200 or self.failure(got) is not None:
            return False
        if self.api == "chat":
            said = got.content if self.streaming else got.message["content"]
            return bool(said == SAID and got.finish == "stop")
        if self.api == "responses":
            return got.response["status"] == "completed" and got.output_text == SAID
        if self.streaming:
            return bool(json.loads(got.data[-1]).get("b64_json") == PNG)
        return bool(got.json["data"][0]["b64_json"] == PNG)

    def failure(self, got: Answer) -> Json | None:
        """The error inside a stream."""
        if not got.is_stream or self.api == "chat":
            return got.stream_error if got.is_stream else None
        last = json.loads(got.data[-1])
        found: Json | None = last.get("error") or last.get("response", {}).get("error")
        return last if last.get("type") == "error" and not found else found

    def ends_well(self, got: Answer) -> bool:
        """A stream says how it ended, once, and last."""
        if not got.is_stream:
            return True
        if self.api == "chat":
            is_error = got.stream_error is not None
            return ("[DONE]" in got.data) is not is_error and got.data.count("[DONE]") <= 1
        ends = [bool(ENDS.fullmatch(kind)) for kind in got.fields("event")]
        return ends[-1] and (self.api == "images" or ends.count(True) == 1)


ENDS = re.compile(r"response\.(completed|failed|incomplete)|error|image_generation\.completed")
WAYS = [Way(api, streams) for api in ("chat", "responses", "images") for streams in (False, True)]


# -- The faults ------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What goes wrong, and what the client may get then.

    script    for `upstream.script`, out of the way that is asked
    status    of an answer that never began; 200: it is whole all the same
    late      the stream may have begun: then it ends with an error event
    place     which of the gateways is asked: each has another way to its upstream
    """

    name: str
    script: Callable[[Way], Json] = lambda way: {}
    status: tuple[int, ...] = (502,)
    late: bool = False
    code: str = ""
    times: int = 3
    place: str = "plain"
    only: str = ""
    large: bool = False
    extra: Json = field(default_factory=dict)


def raw(data: bytes, end: str = "close") -> Callable[[Way], Json]:
    return lambda way: {"raw": data, "end": end}


def http(status: str, headers: str = "", body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers.split("\n")]
    return "\r\n".join([one for one in lines if one] + ["", ""]).encode("latin-1") + body


def sse(stream: list[Event], end: str = "\n") -> bytes:
    """The events as they are, without the backend's own additions."""
    parts = []
    for event in stream:
        if isinstance(event, bytes):
            parts.append(event)
        else:
            data = json.dumps(event, ensure_ascii=False)
            parts.append(f"event: {event['type']}{end}data: {data}{end}{end}".encode())
    return b"".join(parts)


def changed(change: Callable[[list[Event]], list[Event]], **how: Any) -> Callable[[Way], Json]:
    return lambda way: {"events": change(way.events()), **how}


def how(**fields: Any) -> Callable[[Way], Json]:
    return lambda way: {"events": way.events(), **fields}


def status(code: int, body: Json | None = None, **headers: str) -> Callable[[Way], Json]:
    given = body or error_json("It did not work.", type="server_error")
    return lambda way: {"status": code, "json": given, "headers": headers}


def odd_lines(way: Way) -> list[Event]:
    """The same stream with everything in it that a reader has to skip (WHATWG, 9.2)."""
    skipped = b": a comment\n\nid: 7\nretry: 10\nunknown: x\n:\ndata\n\n\n"
    stream = sse(way.events()).replace(b"data: ", b"data:")
    return [b"\xef\xbb\xbf" + skipped + stream.replace(b"\n\n", b"\n\n: ping\n\n", 3)]


def late_date() -> str:
    return email.utils.formatdate(time.time() + 30, usegmt=True)


def chunked(way: Way, broken: bytes) -> Json:
    stream = sse(way.events())
    half = stream.index(b"\n\n", len(stream) // 2) + 2
    return {"raw": STREAM_HEAD + chunk(stream[:half]) + broken, "end": "close"}


def sized_stream(way: Way, more: int) -> Json:
    stream = sse(way.events())
    head = STREAM_HEAD.replace(
        b"Transfer-Encoding: chunked", b"Content-Length: %d" % (len(stream) + more)
    )
    return {"raw": head + stream, "end": "close"}


def first_half(way: Way, tail: bytes) -> list[Event]:
    return [sse(way.events()[:-1]) + tail]


BAD_JSON = b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta"\n\n'
BAD_UTF8 = b"event: codex.x\ndata: \xff\xfe\xed\xa0\x80\n\n"
NUL = b'event: codex.x\ndata: {"type": "codex.x", "x": "\x00"}\n\n'
SURROGATE = b'event: codex.x\ndata: {"type": "codex.x", "x": "\\ud800"}\n\n'
UNKNOWN = {"type": "response.brand_new.delta", "delta": "x", "output_index": 99}
TERMINAL = {"type": "response.completed", "response": {"status": "completed", "output": []}}
GARBAGE = b"SSH-2.0-OpenSSH_9.0\r\n\r\n"
PLAIN = b"<html><title>An error</title><p>secret</html>"

FAULTS: list[Fault] = [
    Fault("F01 connect refused", place="refused", code="upstream_unreachable"),
    Fault("F02 connect black hole", place="black hole", code="upstream_unreachable"),
    Fault("F03 a name that leads nowhere", place="no name", code="upstream_unreachable"),
    *(
        Fault(f"F04 TLS, {name}", place="tls", code=code, extra={"tls": name})
        for name, code in {
            **dict.fromkeys(UNTRUSTED, "upstream_tls"),
            "plain HTTP": "upstream_tls",
            "handshake cut": "",
        }.items()
    ),
    *(
        Fault(f"F05 the proxy: {name}", place="proxy", code="proxy_failed", extra={"proxy": name})
        for name in PROXY_FAULTS
    ),
    Fault("F06 reset before the head, again and again", raw(b"", "reset")),
    Fault("F06 reset before the head, once", raw(b"", "reset"), (200,), times=1),
    Fault("F06 closed before the head, again and again", raw(b"")),
    Fault("F07 the kept connection was closed meanwhile", status=(200,), extra={"stale": True}),
    *(
        Fault(f"F08 reset after {size} bytes", how(reset_after=size), late=True)
        for size in (1, 20, 300, 900, 1500, 2500, 3500, 4500)
    ),
    *(
        Fault(f"F08 cut after event {after}", how(cut=True, after=after), late=True)
        for after in (0, 1, 2, 3, 4, 5, 6, 7)
    ),
    Fault("F08 reset in the last event", how(cut=True, after=-1), late=True),
    Fault("F09 a stall before the head", how(delay=30.0), (504,), times=1),
    *(
        Fault(f"F09 a stall after event {after}", how(stall=True, after=after), (504,), late=True)
        for after in (1, 2, 5)
    ),
    Fault("F10 a drip of single bytes", how(pieces=1, obfuscation=False), (200,)),
    *(
        Fault(
            f"F11 429, Retry-After {value or 'missing'}",
            lambda way, value=value: status(
                429,
                error_json("Slow down.", type="rate_limit_exceeded", code="rate_limit_exceeded"),
                **({"retry-after": value or late_date()} if value != "-" else {}),
            )(way),
            (429,),
        )
        for value in ("7", "", "-", "999999999999", "-5", "x")
    ),
    Fault(
        "F12 usage limit, with its reset", lambda way: status(429, limit_reached(7200))(way), (429,)
    ),
    Fault("F12 usage limit, no time", lambda way: status(429, limit_reached(None))(way), (429,)),
    Fault(
        "F12 usage limit inside a stream",
        lambda way: {"events": failed("usage_limit_reached", "The usage limit has been reached")},
        (429,),
    ),
    Fault(
        "F13 401 token expired, once",
        lambda way: status(401, token_refused())(way),
        (200,),
        times=1,
    ),
    Fault(
        "F14 401 again and again",
        lambda way: status(401, token_refused())(way),
        (401,),
        extra={"dies": True},
    ),
    Fault(
        "F14 401 invalidated",
        lambda way: status(401, {**token_refused("token_invalidated"), "status": 401})(way),
        (401,),
        extra={"dies": True},
    ),
    Fault(
        "F15 403 of the plan", status(403, {"detail": "Your plan does not include this."}), (403,)
    ),
    Fault(
        "F15 403 of the region",
        status(403, error_json("x", code="unsupported_country_region_territory")),
        (403,),
    ),
    Fault(
        "F15 403 challenge page",
        lambda way: {
            "status": 403,
            "body": CHALLENGE_PAGE,
            "headers": {"content-type": "text/html"},
        },
        (403,),
        code="upstream_forbidden",
    ),
    *(Fault(f"F16 {code}", status(code), (502, 503)) for code in (500, 502, 503, 504, 529)),
    Fault("F16 500 with a page", lambda way: {"status": 500, "body": PLAIN}, (502, 503)),
    Fault(
        "F16 overload inside a stream",
        lambda way: {"events": failed("server_is_overloaded", "Busy.")},
        (502, 503),
        late=True,
    ),
    Fault(
        "F16 a flat error event",
        lambda way: {"events": [flat_error("server_error", "Broken.")]},
        (502, 503),
    ),
    Fault(
        "F16 a nested error event",
        lambda way: {"events": [nested_error(500, error_json("x")["error"])]},
        (502, 503),
    ),
    Fault(
        "F17 200 with a JSON error",
        raw(http("200 OK", "Content-Type: application/json", b'{"error":{"message":"x"}}'), "keep"),
    ),
    Fault(
        "F17 200 with JSON", raw(http("200 OK", "Content-Type: application/json", b"[1]"), "keep")
    ),
    Fault("F17 200 with a page", raw(http("200 OK", "Content-Type: text/html", PLAIN), "keep")),
    Fault("F17 200 with nothing", raw(http("200 OK"), "keep")),
    Fault("F17 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n", "keep")),
    Fault("F17 304", raw(b"HTTP/1.1 304 Not Modified\r\n\r\n", "keep")),
    *(
        Fault(
            f"F17 {code}", raw(http(f"{code} Moved", "Location: http://127.0.0.1:9/evil"), "keep")
        )
        for code in (301, 302, 303, 307, 308)
    ),
    *(Fault(f"F18 pieces of {size} bytes", how(pieces=size), (200,)) for size in (2, 3, 5)),
    Fault("F19 CRLF", how(newline="\r\n"), (200,)),
    Fault("F19 CR", how(newline="\r"), (200,)),
    Fault(
        "F19 BOM, comments, other fields, no space", lambda way: {"events": odd_lines(way)}, (200,)
    ),
    Fault(
        "F19 line ends mixed",
        changed(lambda all: [sse(all[:3], "\r\n"), sse(all[3:5], "\r"), sse(all[5:])]),
        (200,),
    ),
    Fault(
        "F20 the last event without its empty line",
        lambda way: {"events": [sse(way.events())[:-1]]},
        late=True,
    ),
    Fault(
        "F20 the last event without its line end",
        lambda way: {"events": [sse(way.events())[:-2]]},
        late=True,
    ),
    Fault("F21 no terminal event", changed(lambda all: all[:-1]), late=True),
    Fault("F21 no terminal event but [DONE]", changed(lambda all: all[:-1], done=True), late=True),
    Fault("F21 an empty stream", lambda way: {"events": []}),
    Fault(
        "F22 an event of 20 MB",
        lambda way: {"events": answer(image("A" * 20_000_000))},
        (200,),
        only="images",
        large=True,
    ),
    Fault(
        "F22 an event of 64 MB",
        lambda way: {"events": answer(image("A" * 64_000_000))},
        (502, 504),  # a slow machine may look silent
        late=True,
        only="images",
        large=True,
    ),
    Fault(
        "F22 an event that never ends",
        lambda way: {"events": [b"data: ", *[b"x" * 1_000_000] * 60]},
        late=True,
        large=True,
    ),
    *(
        Fault(
            f"F23 {name}",
            changed(lambda all, odd=odd: [*all[:4], odd, *all[4:]]),
            (200,),
        )
        for name, odd in (
            ("NUL", NUL),
            ("a lone surrogate", SURROGATE),
            ("no UTF-8", BAD_UTF8),
            ("broken JSON", BAD_JSON),
        )
    ),
    Fault("F24 the terminal event twice", changed(lambda all: [*all, all[-1]]), (200,)),
    Fault("F24 events behind the terminal one", changed(lambda all: [*all, *all[2:6]]), (200,)),
    Fault("F24 failed behind completed", changed(lambda all: [*all, failed("x", "y")[-1]]), (200,)),
    Fault("F24 unknown events", changed(lambda all: [all[0], UNKNOWN, *all[1:], UNKNOWN]), (200,)),
    Fault("F25 a chunk is cut", lambda way: chunked(way, b"fff\r\nxx"), late=True),
    *(
        Fault(f"F25 {name}", lambda way, broken=broken: chunked(way, broken), late=True)
        for name, broken in (
            ("a chunk size that is none", b"zz\r\nxx\r\n"),
            ("a negative chunk size", b"-1\r\nxx\r\n"),
            ("a chunk without its end", b"2\r\nxxxx\r\n"),
            ("a huge chunk size", b"ffffffffffffffff\r\nxx\r\n"),
            ("no last chunk", b""),
        )
    ),
    Fault("F25 a length that is too long", lambda way: sized_stream(way, 100), (200, 502)),
    Fault("F25 a length that is too short", lambda way: sized_stream(way, -60), late=True),
    Fault(
        "F26 gzip that nobody asked for",
        lambda way: {
            "raw": STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
            + chunk(gzip.compress(sse(way.events())))
            + b"0\r\n\r\n"
        },
        (200, 502),
    ),
    Fault(
        "F26 gzip that is none",
        raw(http("500 X", "Content-Encoding: gzip\nContent-Type: application/json", b"{}"), "keep"),
        (502,),
    ),
    Fault(
        "F26 a gzip bomb",
        lambda way: {
            "raw": http("500 X", "Content-Encoding: gzip", gzip.compress(bytes(100_000_000), 9))
        },
        large=True,
    ),
    Fault("F27 a head of 200 KB", raw(http("200 OK", "X: " + "a" * 200_000))),
    Fault("F27 10,000 fields", raw(http("200 OK", "\n".join(f"X{n}: y" for n in range(10_000))))),
    Fault(
        "F27 CR in a field",
        raw(b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n"),
    ),
    Fault(
        "F27 a line without colon", raw(b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 0\r\n\r\n")
    ),
    Fault("F27 no HTTP at all", raw(GARBAGE)),
    Fault("F27 a status that is none", raw(b"HTTP/1.1 abc X\r\n\r\n")),
    Fault("F28 100 before the head", how(before=b"HTTP/1.1 100 Continue\r\n\r\n"), (200,)),
    Fault(
        "F28 103 before the head",
        how(before=b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
        (200,),
    ),
    Fault(
        "F28 trailers",
        lambda way: {
            "raw": STREAM_HEAD + chunk(sse(way.events())) + b"0\r\nX: y\r\nSet-Cookie: a=b\r\n\r\n",
            "end": "keep",
        },
        (200,),
    ),
    Fault("F31 the client half-closes", how(), (200,), extra={"half-close": True}),
    Fault("F34 a token of 1970", how(), (200,), extra={"exp": 1.0}),
    Fault("F34 a token of 2199", how(), (200,), extra={"exp": 7.2e9}),
    Fault(
        "F35 asleep while its connections were closed",
        status=(200,),
        extra={"stale": True, "sleeps": True},
    ),
]


# -- The gateways, one for each way to an upstream -------------------------------------------------


class Places:
    """Gateways whose waits are short, started when one is needed."""

    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self._folder, self.upstream = folder, upstream
        self._made: dict[str, Gateway] = {}
        self._closing = contextlib.ExitStack()
        self.mode = ""
        self._ca = trustme.CA()
        self._contexts = {name: tls_for(issue(self._ca)) for name, issue in UNTRUSTED.items()}

    def close(self) -> None:
        for gateway in self._made.values():
            gateway.stop()
            assert "Traceback" not in gateway.log(), gateway.log()
        self._closing.close()

    def __getitem__(self, place: str) -> Gateway:
        if place not in self._made:
            home = self._folder / place.replace(" ", "-")
            home.mkdir()
            self._made[place] = make_gateway(
                home,
                self.upstream,
                accounts=[account_file(plan="free")],
                variables=self._variables(place),
                constants=HURRIED | ({"CONNECT_TIMEOUT_S": 1.0} if place == "black hole" else {}),
            )
        return self._made[place]

    def _variables(self, place: str) -> dict[str, str]:
        base = {
            "plain": "",
            "refused": f"http://127.0.0.1:{closed_port()}",
            "black hole": "",
            "no name": f"http://{'a' * 64}.example",
        }
        if place == "black hole":
            listener = self._closing.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                filler = self._closing.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            base[place] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if place == "tls":
            server = self._closing.enter_context(Server(self._tls))
            base[place] = f"https://127.0.0.1:{server.port}"
            self._ca.cert_pem.write_to_path(str(self._folder / "root.pem"))
        if place == "proxy":
            server = self._closing.enter_context(Server(lambda peer: PROXY_FAULTS[self.mode](peer)))
            url = f"http://ada:s3cr3t@127.0.0.1:{server.port}"
            # A name that only the proxy would resolve.
            return {"HTTPS_PROXY": url, "AZT_CODEX_BASE_URL": f"https://upstream.example{CODEX}"}
        pointed = {"AZT_CODEX_BASE_URL": base[place] + CODEX} if base[place] else {}
        return (
            {**pointed, "AZT_CA_FILE": str(self._folder / "root.pem")}
            if place == "tls"
            else pointed
        )

    def _tls(self, peer: Peer) -> None:
        if self.mode == "plain HTTP":
            peer.send(http("400 Bad Request"))
        elif self.mode == "handshake cut":
            peer.sock.recv(100)
        else:
            self._contexts[self.mode].wrap_socket(peer.sock, server_side=True).close()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def places(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Places]:
    made = Places(tmp_path_factory.mktemp("places"), shared_upstream)
    yield made
    made.close()


# -- The oracle ------------------------------------------------------------------------------------


def figures(client: Client) -> dict[str, float]:
    lines = client.get("/metrics").body.decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def counted(figures: dict[str, float]) -> float:
    return sum(value for name, value in figures.items() if name.startswith("azt_requests_total"))


SECRETS = re.compile(
    rb"eyJ[\w-]{8,}\.[\w-]{4,}\.|\brt_|secret-cookie|__cf_bm|s3cr3t|Traceback|<html|<p>"
)


def problems(fault: Fault, way: Way, got: Answer, line: str) -> list[str]:
    """What is wrong with an answer to this fault, in words."""
    found = []
    if got.cut:
        found.append("the transfer broke off")
    head = json.dumps(got.headers).encode()
    if hit := SECRETS.search(head + got.body):
        found.append(f"a secret or a page: {hit[0]!r}")
    if not found and got.status == 200:
        if not way.ends_well(got):
            found.append("the stream has no proper end")
        failure = way.failure(got)
        if failure is not None and not (fault.late and failure.get("message")):
            found.append(f"failed late: {failure}")
        # A picture that is there is whole, whatever follows it.
        is_fine = 200 in fault.status or way.api == "images" or fault.large
        if failure is None and not is_fine:
            found.append("passed for a success")
        if failure is None and not fault.large and not way.is_whole(got):
            found.append("not whole")
    elif not found:
        if got.status not in fault.status:
            found.append(f"not {fault.status}")
        error = got.json.get("error", {})
        if set(error) < {"message", "type", "param", "code"} or not error["message"]:
            found.append("no error of OpenAI's shape")
        if fault.code and error.get("code") != fault.code:
            found.append(f"code {error.get('code')}")
        if got.status == 429 and not 0 < int(got.headers.get("retry-after", "0")) < 10**7:
            found.append(f"retry-after {got.headers.get('retry-after')}")
    if f" {got.status} " not in line:
        found.append(f"the log says {line!r}")
    return [f"{one} ({got.status}: {got.body[-300:]!r})" for one in found]


class Trial:
    """One fault against one way to ask."""

    def __init__(self, places: Places, fault: Fault, way: Way) -> None:
        self.places, self.fault, self.way = places, fault, way
        self.upstream, self.gateway = places.upstream, places[fault.place]
        self.client = Client(self.gateway.url, 30)

    def sign_in(self, exp: float | None = None) -> None:
        """The account anew, with a token of its own."""
        entry = account_file(plan="free", exp=exp)
        proof = self.gateway.proof()
        done = self.client.post(
            "/_gateway/admin/accounts/import", {"payload": entry}, headers=proof
        )
        assert done.status == 200, done.body

    def arrange(self) -> None:
        fault, upstream = self.fault, self.upstream
        upstream.reset()
        upstream.default = lambda seen: Reply(self.way.events())
        self.places.mode = fault.extra.get("tls") or fault.extra.get("proxy") or ""
        if "exp" in fault.extra:
            self.sign_in(fault.extra["exp"])
        if "stale" in fault.extra:
            upstream.script(self.way.events(), end="close")
            assert self.way.is_whole(self.ask())
        if "sleeps" in fault.extra:
            self.gateway.process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            self.gateway.process.send_signal(signal.SIGCONT)
        scripted = fault.script(self.way)
        if scripted and fault.place == "plain":
            if scripted.get("after", 0) == -1:
                scripted["after"] = len(scripted["events"]) - 1
            upstream.script(times=fault.times, path="/responses", **scripted)

    def ask(self) -> Answer:
        way = self.way
        if "half-close" not in self.fault.extra:
            return self.client.post(way.path, way.body)
        connection = self.client.connect()
        connection.request(
            "POST", way.path, json.dumps(way.body), {"Content-Type": "application/json"}
        )
        connection.sock.shutdown(socket.SHUT_WR)
        with Stream(connection) as stream:
            return stream.read_rest()

    def run(self) -> list[str]:
        self.arrange()
        before = counted(figures(self.client))
        try:
            got = self.ask()
        except Exception as error:  # noqa: BLE001 - this is what the client sees: no answer
            return [f"no answer: {error!r}"]
        line = self.gateway.log_line(got.headers["x-request-id"])
        found = problems(self.fault, self.way, got, line)
        eventually(lambda: counted(figures(self.client)) > before)
        after = figures(self.client)
        if counted(after) != before + 1:
            found.append(f"counted {counted(after) - before} times")
        if after["azt_running_requests"]:
            found.append("it still runs")
        if "exp" in self.fault.extra and len(self.upstream.rotations) > 1:
            found.append(f"{len(self.upstream.rotations)} renewals")
        self.upstream.reset()
        self.upstream.default = lambda seen: Reply(self.way.events())
        if "dies" in self.fault.extra:
            self.sign_in()
        if self.fault.place == "plain" and not self.way.is_whole(
            self.client.post(self.way.path, self.way.body)
        ):
            found.append("the next request fails")
        return found


def test_every_fault_of_the_upstream_ends_well_for_every_client(
    places: Places, claim: NewClaim, many: Many
) -> None:
    tries = claim(12, "faults F01-F35 x stream or not x chat, responses, images")
    cases = [(fault, way) for fault in FAULTS for way in WAYS if fault.only in ("", way.api)]
    if not many(0, 1):
        cases = [case for case in cases if case[0].place == "plain" and not case[0].large]
        cases = random.Random(12).sample(cases, 30)
    for fault, way in cases:
        found = Trial(places, fault, way).run()
        tries.check(not found, (fault.name, way, found))


# -- Faults of clients, and of many at once --------------------------------------------------------


def test_a_client_that_reads_nothing_holds_up_nobody(
    places: Places, claim: NewClaim, many: Many
) -> None:
    tries = claim(12, "F30: a client that reads nothing: upstream paused, little held, then cut")
    upstream, gateway = places.upstream, places["plain"]
    client = Client(gateway.url, 30)
    for way in WAYS[1 :: many(6, 1)] + WAYS[: many(0, 1)]:
        upstream.reset()
        upstream.default = lambda seen, way=way: Reply(way.events())
        big = text(*["x" * 10_000] * 2_000)
        if way.api == "images":
            big = answer(image("A" * 8_000_000, ["B" * 8_000_000] * 2))
        upstream.script(big, path="/responses")
        before = figures(client)
        body = json.dumps(way.body).encode()
        head = f"POST {way.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(head.encode() + body)
            eventually(lambda: counted(figures(client)) > counted(before), 30)  # noqa: B023
            after = figures(client)
        memory = "azt_process_resident_memory_bytes"
        is_quiet = counted(after) == counted(before) + 1 and not after["azt_running_requests"]
        grown, most = after[memory] - before[memory], 120e6 if way.streaming else 300e6
        tries.check(is_quiet and grown < most, (way, grown, before, after))
        tries.check(way.is_whole(client.post(way.path, way.body)), (way, "the next request"))


def test_stalled_calls_hold_up_nobody_else(places: Places, claim: NewClaim, many: Many) -> None:
    tries = claim(12, "F32, F33: requests beside many whose upstream never answers")
    upstream, gateway = places.upstream, places["plain"]
    client, stalled = Client(gateway.url, 30), many(20, 300)
    for way in WAYS[:: many(4, 1)]:
        upstream.reset()
        upstream.default = lambda seen, way=way: Reply(way.events())
        upstream.script(times=stalled, path="/responses", delay=60.0)
        with ThreadPoolExecutor(stalled) as threads:
            waiting = [threads.submit(client.post, way.path, way.body) for _ in range(stalled)]
            upstream.wait_until(lambda: len(upstream.turns) >= stalled, 30)
            for _ in range(10):
                tries.check(way.is_whole(client.post(way.path, way.body)), way)
            for one in waiting:
                got = one.result()
                tries.check(got.status == 504 and got.error["message"], (got.status, got.body))
        tries.check(figures(client)["azt_running_requests"] == 0, "still running")


def test_nothing_is_left_after_all_the_faults(places: Places, claim: NewClaim) -> None:
    """The last one here: files and threads of the gateway that met them."""
    tries = claim(12, "after all of them: no open file, no thread, no running request is left")
    client = Client(places["plain"].url)

    def is_quiet() -> bool:
        now = figures(client)
        few = now["azt_process_open_fds"] < 40 and now["azt_process_threads"] < 40
        return few and not now["azt_running_requests"]

    places.upstream.reset()
    with contextlib.suppress(AssertionError):
        eventually(is_quiet, 40)  # an idle thread ends after 30 s, and several are fine
    tries.check(is_quiet(), figures(client))
