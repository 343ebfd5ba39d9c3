"""Bodies made to break a parser, to fill the memory, or to be read in two ways."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MODEL, Answer, Claim, Client, Gateway, chat_body

import azt

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]
MIB = 1024 * 1024

APIS = ("/v1/chat/completions", "/v1/responses", "/v1/images/generations", "/v1/images/edits")

# -- Documents: the idea of the public JSONTestSuite, with a set of our own ------------------------

# No JSON at all: 400, wherever they are sent.
BROKEN: list[bytes] = [
    *(
        text.encode()
        for text in (
            "",
            " ",
            "[",
            "]",
            "{",
            "}",
            '"',
            ",",
            ":",
            "[1",
            "[1,",
            "[1,,2]",
            "[,1]",
            "[,]",
            "[1,]",
            "[1,,]",
            "[1 2]",
            "[1;2]",
            "[1:2]",
            "[1}",
            "[1]]",
            "[1],",
            "[[1]",
            "[[1],",
            "[1]x",
            "[1]//",
            "[1]/* */",
            "[1]#",
            '{"a"',
            '{"a":',
            '{"a":1',
            '{"a":1,',
            '{"a":1,}',
            '{"a":1,,"b":2}',
            '{,"a":1}',
            '{"a" 1}',
            '{"a"::1}',
            '{"a":1:2}',
            '{"a",1}',
            '{"a" "b"}',
            '{"a":"b" "c"}',
            '{"a":1 "b":2}',
            '{"a":1;"b":2}',
            '{"a":1]',
            '{"a":1}}',
            '{"a":1}{',
            '{"a":1}{}',
            '{"a":1}"',
            '{"a":1} x',
            '{"a":1}/*x*/',
            '{"a":1}//x',
            '{/*x*/"a":1}',
            "{a:1}",
            "{'a':1}",
            "{\"a':1}",
            "{1:1}",
            "{null:1}",
            "{true:1}",
            "{[]:1}",
            '{"a":a}',
            '{"a":b"}',
            '{"a":"b}',
            '{"a":tru}',
            '{"a":True}',
            '{"a":TRUE}',
            '{"a":nul}',
            '{"a":None}',
            '{"a":undefined}',
            '{"a":NaN}',
            '{"a":-NaN}',
            '{"a":nan}',
            '{"a":Infinity}',
            '{"a":-Infinity}',
            '{"a":+Infinity}',
            '{"a":Inf}',
            '{"a":+1}',
            '{"a":++1}',
            '{"a":--1}',
            '{"a":-}',
            '{"a":- 1}',
            '{"a":-01}',
            '{"a":01}',
            '{"a":00}',
            '{"a":012.5}',
            '{"a":.5}',
            '{"a":-.5}',
            '{"a":1.}',
            '{"a":1.e1}',
            '{"a":1.e}',
            '{"a":1e}',
            '{"a":1e+}',
            '{"a":1e-}',
            '{"a":1ee1}',
            '{"a":1e1.5}',
            '{"a":1.2.3}',
            '{"a":1_000}',
            '{"a":1 000}',
            '{"a":0x1}',
            '{"a":0b1}',
            '{"a":0o1}',
            '{"a":1L}',
            '{"a":1n}',
            '{"a":1f}',
            '{"a":\u0661}',
            '{"a":\uff11}',
            '{"a":"\\x41"}',
            '{"a":"\\u00"}',
            '{"a":"\\u00g0"}',
            '{"a":"\\u{41}"}',
            '{"a":"\\U0041"}',
            '{"a":"\\a"}',
            '{"a":"\\\'"}',
            '{"a":"\\0"}',
            '{"a":"\\"}',
            '{"a":"\\',
            '{"a":"\\u',
            '{"a":"\t"}',
            '{"a":"\n"}',
            '{"a":"\r"}',
            '{"a":"\x00"}',
            '{"a":"\x1f"}',
            '{"a":\x00}',
            '{"a":1}\x00',
            '\x00{"a":1}',
            '{"a":1}\x1a',
            '\x0c{"a":1}',
            '\x0b{"a":1}',
            '\u00a0{"a":1}',
            '\u2028{"a":1}',
            '{"a":1}\u2029',
            '\u200b{"a":1}',
            '\ufeff\ufeff{"a":1}',
            "<html></html>",
            "a=1&b=2",
            "--x\r\n",
            "data: {}\n\n",
            "{" * 100_000,
            "[" * 100_000,
            "[" * 100_000 + "]" * 100_000,
            '{"a":' * 100_000,
            '{"a":' * 100_000 + "1" + "}" * 100_000,
            '[{"a":' * 50_000,
            '{"a":' + "[" * 65 + "]" * 65 + "}",
            '{"a":' + "9" * 5_000 + "}",
            '{"a":-' + "9" * 5_000 + "}",
            '{"a":' + "9" * 1_000_000 + "}",
        )
    ),
    b'{"a":"\xff"}',
    b'{"a":"\x80"}',
    b'{"a":"\xc3"}',
    b'{"a":"\xc3\x28"}',
    b'{"a":"\xc0\xaf"}',
    b'{"a":"\xe0\x80\xaf"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xf4\x90\x80\x80"}',
    b'{"a":"\xf8\x88\x80\x80\x80"}',
    b'{"\xff":1}',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xef\xbb",
    b"\xfe\xff\x00{\x00}",
    '{"a":1}'.encode("utf-16"),
    '{"a":1}'.encode("utf-32"),
    '{"a":"\u00e9"}'.encode("latin-1"),
    b"\x1f\x8b\x08\x00",
    b"\x28\xb5\x2f\xfd",
    b"PK\x03\x04",
]

# JSON: any answer but a word about its syntax, for none of them is a request.
LEGAL: list[str] = [
    "{}",
    " {} ",
    "\r\n\t {}\n",
    '{"a":1,"a":2}',
    '{"":0}',
    '{"a":[]}',
    '{"a":[[],[[]]]}',
    '{"a":"\\u0000"}',
    '{"a":"\\ud800"}',
    '{"a":"\\udfff\\ud800"}',
    '{"a":"\\ud83d\\ude00"}',
    '{"a":"\U0001f600"}',
    '{"a":"\\uDBFF\\uDFFE"}',
    '{"a":"\\uffff\ufffe"}',
    '{"a":"\u2028\u2029\x7f"}',
    '{"a":"\\"\\\\\\/\\b\\f\\n\\r\\t"}',
    '{"a":-0}',
    '{"a":-0.0e-0}',
    '{"a":1E+2}',
    '{"a":1e400}',
    '{"a":-1e400}',
    '{"a":1e-400}',
    '{"a":0.' + "1" * 10_000 + "}",
    '{"a":1e' + "9" * 1_000 + "}",
    '{"a":123456789012345678901234567890}',
    '{"a":' + "9" * 4_000 + "}",
    '{"__proto__":{"x":1},"constructor":{"prototype":{}}}',
    '{"__class__":"os.system","py/object":"x"}',
    '{"$ref":"#"}',
    '{"a":' + "[" * 60 + "]" * 60 + "}",
    '{"a":"' + "x" * MIB + '"}',
    '{"a":"' + "\\u0041" * 100_000 + '"}',
    "{" + ",".join(f'"k{n}":{n}' for n in range(50_000)) + "}",
    '{"a":[' + ",".join(["1"] * 100_000) + "]}",
    "[]",
    "null",
    "true",
    "1",
    '"a"',
    "[{}]",
]

# Values in places where something else belongs.
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    float("1e300"),
    "",
    "x",
    "\x00",
    "\ud800",
    "\u202e\u2066",
    "../../etc/passwd",
    "x\r\nSet-Cookie: a=b",
    "x" * 100_000,
    [],
    [None],
    [[]],
    [{}],
    {},
    {"": None},
    {"type": None},
    {"type": "text"},
    {"type": "x" * 1_000, "text": [1]},
    {"role": "user", "content": {"content": {"content": []}}},
]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat_body(
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        tool_choice="auto",
        response_format={"type": "text"},
        stream_options={"include_usage": True},
        reasoning_effort="low",
        stop=["x"],
        metadata={},
        max_tokens=5,
        temperature=1,
        n=1,
        user="u",
        parallel_tool_calls=True,
        verbosity="low",
        service_tier="auto",
        modalities=["text"],
        stream=False,
    ),
    "/v1/responses": {
        "model": MODEL,
        "input": [{"type": "message", "role": "user", "content": "hi"}],
        "instructions": "x",
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "include": [],
        "metadata": {},
        "previous_response_id": None,
        "prompt_cache_key": "k",
        "truncation": "auto",
        "store": True,
        "stream": False,
    },
    "/v1/images/generations": {
        "model": "gpt-image-2",
        "prompt": "x",
        "n": 1,
        "size": "1024x1024",
        "quality": "low",
        "background": "auto",
        "output_format": "png",
        "output_compression": 50,
        "response_format": "b64_json",
        "partial_images": 0,
        "stream": False,
    },
    "/v1/images/edits": {"prompt": "x", "images": [{"image_url": "data:image/png;base64,AA=="}]},
}


def mutations(value: Any) -> Iterator[Any]:
    """The value with something odd in each of its places, one at a time."""
    if isinstance(value, (dict, list)):
        for at in value if isinstance(value, dict) else range(len(value)):
            for odd in (*ODD, *mutations(value[at])):
                changed = value.copy()
                changed[at] = odd
                yield changed


def post(client: Client, path: str, body: bytes, **headers: str) -> Answer:
    return client.post(path, body=body, headers={"Content-Type": "application/json", **headers})


def is_json_error(answer: Answer) -> bool:
    return answer.status == 400 and "is not valid JSON" in answer.error["message"]


def test_broken_json_is_refused_wherever_it_is_sent(
    client: Client, gateway: Gateway, claim: NewClaim, many: Many
) -> None:
    tries = claim(5, "broken JSON at the API: 400 with a word about its syntax")
    assert len(set(BROKEN)) == len(BROKEN) > 150
    for body in BROKEN[:: many(9, 1)]:
        for path in APIS[: many(1, 4)]:
            answer = post(client, path, body)
            tries.check(is_json_error(answer), (path, body[:80], answer.status, answer.body[:200]))


def test_broken_json_changes_nothing_in_the_administration(
    client: Client, gateway: Gateway, claim: NewClaim, many: Many
) -> None:
    tries = claim(5, "broken JSON at every route of the administration: no 5xx")
    routes = [
        route
        for route in azt.ROUTES
        if route.access.startswith("admin")
        and route.method in ("PATCH", "POST", "PUT")
        and not route.path.endswith("/restart")  # it takes no body, and does what it says
    ]
    for route in routes:
        for body in BROKEN[:: many(40, 1)]:
            path = route.path.replace("{id}", "x1")
            answer = client.request(
                route.method,
                path,
                body=body,
                headers={**gateway.proof(), "Content-Type": "application/json"},
            )
            tries.check(answer.status < 500, (path, body[:80], answer.status, answer.body[:200]))


def test_legal_json_that_is_no_request_is_no_failure(
    client: Client, claim: NewClaim, many: Many
) -> None:
    tries = claim(5, "odd but legal JSON at the API: no 5xx, and it is read as JSON")
    for text in LEGAL[:: many(4, 1)]:
        for path in APIS[: many(1, 4)]:
            answer = post(client, path, text.encode("utf-8", "surrogatepass"))
            is_fine = answer.status < 500 and not is_json_error(answer)
            tries.check(is_fine, (path, text[:80], answer.status, answer.body[:200]))


@pytest.mark.parametrize("path", APIS)
def test_an_odd_value_anywhere_in_a_request_is_no_failure(
    client: Client, claim: NewClaim, many: Many, path: str
) -> None:
    tries = claim(5, "requests with an odd value in any place: no 5xx of azt's own")
    found = list(mutations(GOOD[path]))
    for body in found[:: many(1 + len(found) // 40, 1)]:
        answer = post(client, path, json.dumps(body).encode())
        # What azt passes on may be refused by the backend; that is never a 5xx either.
        tries.check(answer.status < 500, (path, str(body)[:300], answer.status, answer.body[:200]))


# -- Bombs: little that becomes much ---------------------------------------------------------------

LIMIT = azt.MAX_BODY_BYTES


def filled(head: bytes, unit: bytes, tail: bytes, size: int) -> Iterator[bytes]:
    """A document of about `size` bytes, in pieces."""
    yield head
    count = (size - len(head) - len(tail)) // len(unit)
    many = unit * min(count, MIB)
    for _ in range(count // MIB):
        yield many
    yield many[: count % MIB * len(unit)] + tail


def packed(pieces: Iterator[bytes], *codings: str) -> bytes:
    for coding in codings:
        window = {"gzip": 31, "deflate": 15, "raw deflate": -15}[coding]
        engine = zlib.compressobj(9 if len(codings) > 1 else 1, zlib.DEFLATED, window)
        pieces = iter([b"".join(map(engine.compress, pieces)) + engine.flush()])
    return b"".join(pieces)


def zstd_bomb(size: int) -> bytes:
    """A frame of blocks that repeat one byte: 128 KiB in four bytes (RFC 8878 3.1.1.2)."""
    blocks = [struct.pack("<I", (128 * 1024) << 3 | 1 << 1)[:3] + b" "] * (size // (128 * 1024))
    last = struct.pack("<I", 1 << 3 | 1 << 1 | 1)[:3] + b" "
    return struct.pack("<I", 0xFD2FB528) + b"\x00\x58" + b"".join(blocks) + last


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{
        f"{size} MiB of {name}, {coding}": (
            coding.removeprefix("raw ").replace("+", ", "),
            functools.partial(
                lambda unit, size, coding: packed(
                    filled(b'{"a":', unit, b"}", size * MIB), *coding.split("+")
                ),
                *(unit, size, coding),
            ),
        )
        for size, name, unit, coding in (
            (1024, "white space", b" ", "gzip"),
            (1024, "white space", b" ", "deflate"),
            (1024, "white space", b" ", "raw deflate"),
            (1024, "white space", b" ", "gzip+gzip"),
            (1024, "white space", b" ", "deflate+gzip"),
            (129, "openings", b"[", "gzip"),
            (1024, "openings", b"[", "gzip"),
            (1024, "zeros", b"\x00", "gzip"),
        )
    },
    **{
        f"{LIMIT // MIB} MiB of {name}": (
            "gzip",
            functools.partial(lambda *parts: packed(filled(*parts, LIMIT - 1), "gzip"), *parts),
        )
        for name, parts in {
            "arrays": (b'{"a":[', b"[],", b"1]}"),
            "objects": (b'{"a":[', b'{"a":1},', b"1]}"),
            "arrays, deep": (b'{"a":{"a":{"a":{"a":[', b"[],", b"1]}}}}"),
            "numbers": (b'{"a":[', b"7,", b"1]}"),
            "fractions": (b'{"a":[', b"0.5,", b"1]}"),
            "strings": (b'{"a":[', b'"ab",', b'""]}'),
            "empty strings": (b'{"a":[', b'"",', b'""]}'),
            "names": (b"{", b'"a":1,', b'"b":1}'),
            "one string": (b'{"a":"', b"x", b'"}'),
            "one string of escapes": (b'{"a":"', b"\\u0041", b'"}'),
            "one string of quotes": (b'{"a":"', b'\\",', b'"}'),
            "one string of commas": (b'{"a":"', b"x,", b'"}'),
            "one string of wide characters": (b'{"a":"', "\U0001f600".encode(), b'"}'),
            "one number": (b'{"a":', b"9", b"}"),
            "one fraction": (b'{"a":0.', b"9", b"}"),
            "messages": (
                b'{"model":"gpt-5.5","messages":[',
                b'{"role":"user","content":"x"},',
                b'{"role":"user","content":"x"}]}',
            ),
            "parts": (
                b'{"model":"gpt-5.5","messages":[{"role":"user","content":[',
                b'{"type":"text","text":"x"},',
                b'{"type":"text","text":"x"}]}]}',
            ),
            "items": (b'{"model":"gpt-5.5","input":[', b'{"role":"user","content":"x"},', b"{}]}"),
        }.items()
    },
    "as many escapes as are taken": (
        "gzip",
        lambda: packed(
            filled(b'{"a":"' + b'\\",' * azt.MAX_JSON_ESCAPES, b"x,", b'"}', LIMIT - 1), "gzip"
        ),
    ),
    "1 GiB, zstd": ("zstd", lambda: zstd_bomb(1024 * MIB)),
    "1 GiB, brotli": ("br", lambda: b"\x5b\xff\xff\xff\x03" + b"\x00" * 800),
    "gzip that ends early": ("gzip", lambda: gzip.compress(b"[" * MIB)[:-9]),
    "gzip behind gzip": ("gzip", lambda: gzip.compress(b"{}") * 10_000),
    "gzip with a name of 32 MiB": (
        "gzip",
        lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * (32 * MIB),
    ),
    "nine layers": (", ".join(["gzip"] * 9), lambda: b"x"),
}
SMALL_BOMBS = ["1024 MiB of white space, gzip", f"{LIMIT // MIB} MiB of arrays", "1 GiB, zstd"]


@functools.cache
def bomb(name: str) -> bytes:
    return BOMBS[name][1]()


def memory(gateway: Gateway) -> tuple[int, int]:
    """The most that its process has ever held, and what it holds now, in bytes."""
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    peak, now = (int(status.partition(name)[2].split()[0]) for name in ("VmHWM:", "VmRSS:"))
    return peak * 1024, now * 1024


def cpu_s(gateway: Gateway) -> float:
    """What its process has used. Of the clock a busy machine takes more."""
    ticks = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / 100


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_bomb_costs_more_than_the_limit_of_memory_or_two_seconds(
    new_gateway: Callable[..., Gateway], claim: NewClaim, many: Many
) -> None:
    tries = claim(5, "bombs up to 1 GiB: 4xx, < 2 s, < limit of all bodies + 100 MB of memory")
    gateway = new_gateway()
    client, before, longest_s, most = Client(gateway.url, 60), memory(gateway)[1], 0.0, 0
    for name in SMALL_BOMBS if not many(0, 1) else BOMBS:
        coding, body = BOMBS[name][0], bomb(name)
        for path in APIS[: many(1, 4)]:
            began_s = cpu_s(gateway)
            answer = post(client, path, body, **{"Content-Encoding": coding})
            spent_s = cpu_s(gateway) - began_s
            longest_s = max(longest_s, spent_s)
            seen = (name, path, answer.status, round(spent_s, 2), answer.body[:200])
            tries.check(400 <= answer.status < 500 and spent_s < 2, seen)
            most = memory(gateway)[0] - before
    tries.check(most < azt.MAX_BODIES_BYTES + 100_000_000, f"{most} bytes")
    tries.note(f"the longest took {longest_s:.1f} s of CPU, the most memory was {most >> 20} MiB")
    tries.check(client.chat().message["content"] == "You said: hi", "the next request")
