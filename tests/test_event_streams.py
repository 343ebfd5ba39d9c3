"""SSE and JSON bytes: any split, any line end, any document."""

from __future__ import annotations

import json
import math
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

# -- A simple reference: the WHATWG rules, line by line, over the whole stream ---------------------


def reference(stream: bytes) -> list[bytes]:
    """The data of each complete event."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    events: list[bytes] = []
    data: list[bytes] = []
    for line in lines:
        field, _, value = line.partition(b":")
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
    return events


def parse(pieces: list[bytes]) -> list[bytes]:
    parser = azt.SSEParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def cut(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


STREAMS: dict[str, tuple[bytes, list[bytes]]] = {
    "one event": (b"data: a\n\n", [b"a"]),
    "named": (b'event: x\ndata: {"type":"x"}\n\n', [b'{"type":"x"}']),
    "data first": (b"data: a\nevent: x\n\n", [b"a"]),
    "two events": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "crlf": (b"event: x\r\ndata: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "cr": (b"event: x\rdata: a\r\rdata: b\r\r", [b"a", b"b"]),
    "mixed": (b"data: a\r\n\rdata: b\n\r\ndata: c\r\r\ndata: d\n\r", [b"a", b"b", b"c", b"d"]),
    "several data lines": (b"data: a\ndata: b\ndata:\n\n", [b"a\nb\n"]),
    "several data lines in a named event": (b"event: x\ndata: a\ndata: b\n\n", [b"a\nb"]),
    "no space": (b"data:a\n\n", [b"a"]),
    "two spaces": (b"data:  a\n\n", [b" a"]),
    "no colon": (b"data\n\n", [b""]),
    "empty data": (b"data:\n\ndata: \n\n", [b"", b""]),
    "a colon inside": (b"data: a: b\n\n", [b"a: b"]),
    "comments": (b": hello\n\n:\ndata: a\n: x\ndata: b\n\n: bye\n\n", [b"a\nb"]),
    "a named event without data": (b"event: ping\n\ndata: a\n\n", [b"a"]),
    "other fields": (b"id: 7\nretry: 10\nfoo: bar\nDATA: no\ndata: a\n\n", [b"a"]),
    "field names are exact": (b"datax: no\n data: no\ndata : no\n\n", []),
    "blank lines": (b"\n\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [b"a", b"b"]),
    "bom": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "bom and named": (b"\xef\xbb\xbfevent: x\ndata: a\n\n", [b"a"]),
    "bom twice": (b"\xef\xbb\xbf\xef\xbb\xbfdata: no\n\ndata: a\n\n", [b"a"]),
    "bom later": (b"data: a\n\n\xef\xbb\xbfdata: no\n\n", [b"a"]),
    "nul": (b"data: a\0b\n\n", [b"a\0b"]),
    "broken utf-8": (b"data: a\xffb\n\n", [b"a\xffb"]),
    "multibyte": ("data: grüße 😀 日本\n\n".encode(), ["grüße 😀 日本".encode()]),
    "line separators of unicode": ("data: a\u2028b\x85c\n\n".encode(), ["a\u2028b\x85c".encode()]),
    "no last blank line": (b"data: a\n\ndata: b\n", [b"a"]),
    "no last line end": (b"data: a\n\ndata: b", [b"a"]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize("stream, events", STREAMS.values(), ids=STREAMS)
def test_the_reference_agrees_with_the_table(stream: bytes, events: list[bytes]) -> None:
    assert reference(stream) == events


@pytest.mark.parametrize("stream, events", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_read_in_every_split(stream: bytes, events: list[bytes]) -> None:
    assert parse([stream]) == events
    assert parse(cut(stream, 1)) == events
    assert parse(cut(stream, 10)) == events
    for at in range(len(stream)):
        assert parse([stream[:at], stream[at:]]) == events, at
        assert parse([stream[:at], b"", stream[at:]]) == events, at


FRAGMENTS = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b":", b" ", b"a", b"data", b"\xef\xbb\xbf"),
        *(b"data: x", b"data:y", b"event: z", b"event: z\ndata: w\n\n", b": c", b"id: 1", b"\0"),
        *("é".encode(), b"\xff", b"data: "),
    ]
)
STREAM = st.lists(FRAGMENTS, max_size=40).map(b"".join) | st.binary(max_size=60)


@settings(max_examples=500)
@given(data=st.data(), stream=STREAM)
def test_any_stream_in_any_split_equals_the_reference(data: st.DataObject, stream: bytes) -> None:
    places = st.lists(st.integers(0, len(stream)), max_size=10).map(sorted)
    at = [0, *data.draw(places), len(stream)]
    pieces = [stream[start:end] for start, end in zip(at, at[1:], strict=False)]
    assert parse(pieces) == reference(stream)


def test_events_come_out_as_soon_as_they_are_complete() -> None:
    parser = azt.SSEParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]
    assert parser.feed(b"data: b\r\r") == [b"b"]
    assert parser.feed(b"\ndata: c\n\n") == [b"c"]


def test_an_event_of_20_mb_passes_in_pieces_and_in_three_times_its_size() -> None:
    big = b"x" * 20_000_000
    stream = cut(b"event: image\ndata: " + big + b"\n\ndata: after\n\n", 65536)
    tracemalloc.start()
    started = time.monotonic()
    events = parse(stream)
    took = time.monotonic() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert events == [big, b"after"]
    assert took < 5, "the parser goes over the whole buffer for each piece"
    assert peak < 3.2 * len(big)


def test_an_event_of_64_mb_is_refused_at_the_cap() -> None:
    parser, piece, fed = azt.SSEParser(), b"x" * 1_000_000, 0
    with pytest.raises(azt.UpstreamError) as caught:
        for _ in range(64):
            parser.feed(piece)
            fed += len(piece)
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert 47 * azt.MIB < fed < 49 * azt.MIB


def test_many_small_events_never_add_up_to_the_cap() -> None:
    parser = azt.SSEParser()
    piece = (b"data: " + b"x" * 10_000 + b"\n\n") * 100
    assert sum(len(parser.feed(piece)) for _ in range(60)) == 6_000


# -- Events ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, kind",
    [
        (b'{"type":"response.created"}', "response.created"),
        (b' { "type" : "a.b" , "x": 1}', "a.b"),
        (b'{"x":1,"type":"late"}', "late"),
        (b'{"type":"with \\u0061 escape"}', "with a escape"),
        (b'{"x":{"type":"inner"},"type":"outer"}', "outer"),
        (b'{"error":{"code":"x"}}', "error"),
        (b'{"x":1}', ""),
        (b'{"type":7}', ""),
        (b"[1]", ""),
        (b"[DONE]", ""),
        (b"", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_the_type_of_an_event_is_found(data: bytes, kind: str) -> None:
    assert azt.event_type(data) == kind


@pytest.mark.parametrize(
    "data", [b"", b"[DONE]", b"[1]", b"null", b"{", b'{"a":}', b"[" * 100_000, b'{"a":"\x00"}']
)
def test_a_broken_event_is_none(data: bytes) -> None:
    assert azt.parse_event(data) is None


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    assert azt.parse_event(b'{"a":"x\xffy"}') == {"a": "x\ufffdy"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_an_event_with_something_that_is_no_number_is_broken(number: str) -> None:
    assert azt.parse_event(b'{"a":%b}' % number.encode()) is None


def test_events_are_encoded_by_name() -> None:
    event = {"type": "response.completed", "a": "é\n"}
    assert azt.encode_event(event) == (
        'event: response.completed\ndata: {"type":"response.completed","a":"é\\n"}\n\n'.encode()
    )
    assert azt.encode_data({"a": 1}) == b'data: {"a":1}\n\n'


# -- encode_json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800", "é\ud83dx"])
def test_a_lone_surrogate_stays_an_escape(text: str) -> None:
    encoded = azt.encode_json({"a": text})
    assert b"\\ud" in encoded.lower()
    assert json.loads(encoded.decode()) == {"a": text}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(JSON)
def test_what_was_encoded_is_decoded_again_and_stands_on_one_line(value: Any) -> None:
    encoded = azt.encode_json(value)
    assert b"\n" not in encoded and b"\r" not in encoded
    assert azt.parse_json(encoded) == value


# -- parse_json -----------------------------------------------------------------------------------


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document is large enough to be read member by member."""
    monkeypatch.setattr(azt, "MIB", 0)


def strict(text: str) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=no_constant)


def outcome(parser: Any, document: Any) -> Any:
    """The value, or that there was none."""
    try:
        return ("value", parser(document))
    except ValueError:
        return "refused"


SPACE = st.text(" \t\r\n", max_size=2)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A random value with random white space between its tokens."""
    value = draw(JSON)

    def spaced(value: Any) -> str:
        if isinstance(value, list):
            inner = ",".join(draw(SPACE) + spaced(one) + draw(SPACE) for one in value)
            return f"[{inner or draw(SPACE)}]"
        if isinstance(value, dict):
            members = (
                draw(SPACE) + json.dumps(name) + draw(SPACE) + ":" + draw(SPACE) + spaced(one)
                for name, one in value.items()
            )
            return "{" + (",".join(members) or draw(SPACE)) + draw(SPACE) + "}"
        return json.dumps(value, ensure_ascii=draw(st.booleans()))

    return draw(SPACE) + spaced(value) + draw(SPACE)


@settings(max_examples=300)
@given(documents())
def test_a_document_read_in_pieces_equals_json_loads(document: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(azt, "MIB", 0)
        body = document.encode("utf-8", "surrogatepass")
        try:
            body.decode()
        except UnicodeDecodeError:
            return
        assert azt.parse_json(body) == json.loads(document)


def test_pieces_of_a_large_document_are_not_gathered_before_they_are_joined() -> None:
    value = {"input": [{"role": "user", "content": "x"} for _ in range(20_000)]}
    tracemalloc.start()
    try:
        body = azt.encode_large_json(value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads(body) == value
    assert peak < 4 * len(body)


TOKENS = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"a"', '"b"', "1", "-", "0.5", "e3", "null", "tru", " ", "\n"]
)


@settings(max_examples=600)
@given(st.lists(TOKENS, max_size=12).map("".join))
def test_pieces_and_whole_refuse_the_same_documents(document: str) -> None:
    whole = outcome(azt.parse_json, document.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(azt, "MIB", 0)
        assert outcome(azt.parse_json, document.encode()) == whole
    assert whole == outcome(strict, document)


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "space": b"  ",
    "two values": b"{} {}",
    "trailing comma in an object": b'{"a":1,}',
    "trailing comma in an array": b"[1,]",
    "leading comma": b"[,1]",
    "no comma": b"[1 2]",
    "no colon": b'{"a" 1}',
    "no value": b'{"a":}',
    "name without quotes": b"{a:1}",
    "number as a name": b"{1:1}",
    "single quotes": b"{'a':1}",
    "open object": b'{"a":1',
    "open array": b"[1",
    "open string": b'["a',
    "wrong closing": b"[1}",
    "comment": b"[1] // x",
    "nan": b'{"a":NaN}',
    "infinity": b"[Infinity]",
    "minus infinity": b"-Infinity",
    "nested nan": b'{"a":{"b":[[NaN]]}}',
    "hexadecimal": b"0x10",
    "leading zero": b"01",
    "plus": b"+1",
    "control in a string": b'"a\x01b"',
    "newline in a string": b'"a\nb"',
    "bad escape": b'"\\x"',
    "huge number": b"9" * 5000,
    "huge number inside": b'{"a":[' + b"9" * 5000 + b"]}",
    "not utf-8": b'{"a":"\xff"}',
    "utf-8 surrogates": b'"\xed\xa0\x80"',
    "overlong utf-8": b'"\xc0\xaf"',
    "utf-16": '{"a":1}'.encode("utf-16"),
    "bom twice": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "very deep array": b"[" * 100_000 + b"]" * 100_000,
    "very deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open and very deep": b"[" * 1_000_000,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_no_json_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        azt.parse_json(body)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_no_json_is_a_value_error_in_pieces_too(body: bytes) -> None:
    with pytest.raises(ValueError):
        azt.parse_json(body)


def marks_of(value: Any) -> int:
    """Strings, openings and commas of its JSON."""
    if isinstance(value, str):
        return 1
    if not isinstance(value, (dict, list)):
        return 0
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return max(1, len(value)) + sum(map(marks_of, inner))


@settings(max_examples=300)
@given(JSON, st.sampled_from([1, 2, 7, 64]))
def test_values_are_counted_exactly_whatever_stands_in_strings(value: Any, size: int) -> None:
    body, marks = json.dumps(value).encode(), marks_of(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(azt, "_MARKS_SLICE_BYTES", size)
        patch.setattr(azt, "MAX_JSON_MARKS", marks)
        assert not azt._has_too_many_marks(body)
        patch.setattr(azt, "MAX_JSON_MARKS", marks - 1)
        assert azt._has_too_many_marks(body)


def test_eight_million_escapes_are_the_limit() -> None:
    fits = b'"' + rb"\n" * azt.MAX_JSON_ESCAPES + b'"'
    assert azt.parse_json(fits) == "\n" * azt.MAX_JSON_ESCAPES
    with pytest.raises(ValueError, match="8000000 escapes"):
        azt.parse_json(fits.replace(b"n", rb"n\n", 1))


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth_64_is_the_limit(opening: str, closing: str) -> None:
    levels = 64 // opening.replace('"a":', "").__len__()
    fits = opening * levels + "1" + closing * levels
    assert azt.parse_json(fits.encode()) == json.loads(fits)
    with pytest.raises(ValueError, match="64"):
        azt.parse_json(f"[{fits}]".encode())


def test_a_byte_order_mark_and_a_bytearray_are_taken() -> None:
    assert azt.parse_json(b'\xef\xbb\xbf{"a":1}') == {"a": 1}
    assert azt.parse_json(bytearray(b'{"a":1}')) == {"a": 1}


def most_memory_of(function: Callable[[], object]) -> int:
    """In bytes, beyond what was there before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_body_that_may_be_emptied_is_never_held_three_times() -> None:
    size = 32 * azt.MIB
    document = b'{"a":"' + b"x" * size + b'"}'
    parse = azt.parse_json
    assert most_memory_of(lambda: parse(bytearray(document), clears=True)) < 2.3 * size


def test_a_body_is_left_as_it_is_unless_it_may_be_emptied() -> None:
    body = bytearray(b"[1]")
    assert azt.parse_json(body) == [1]
    assert body == b"[1]"


def test_encoding_a_large_document_takes_no_more_memory_than_its_bytes() -> None:
    size = 32 * azt.MIB
    value = {"a": ["x" * size, 1], "b": "y"}
    assert most_memory_of(lambda: azt.encode_large_json(value)) < 1.3 * size
    assert azt.encode_large_json(value) == azt.encode_json(value)


def test_of_a_name_given_twice_the_last_value_counts() -> None:
    assert azt.parse_json(b'{"a":1,"a":2}') == {"a": 2}


@pytest.mark.usefixtures("in_pieces")
def test_of_a_name_given_twice_the_last_value_counts_in_pieces_too() -> None:
    assert azt.parse_json(b'{"a":1,"a":2}') == {"a": 2}


def test_large_numbers_are_kept_exactly() -> None:
    assert azt.parse_json(b"123456789012345678901234567890") == 123456789012345678901234567890
    assert azt.parse_json(b"1e400") == math.inf


def test_a_document_above_a_mebibyte_lets_other_threads_run() -> None:
    body = azt.encode_json({"input": [list(range(10_000_000, 10_004_000)) for _ in range(100)]})
    beats, over = [0], threading.Event()

    def beat() -> None:
        while not over.is_set():
            time.sleep(0.0001)
            beats[0] += 1

    other = threading.Thread(target=beat)
    other.start()
    before = beats[0]
    value = azt.parse_json(body)
    during = beats[0] - before
    over.set()
    other.join()
    assert value == json.loads(body)
    assert during >= 3, "one call that holds the interpreter for the whole document"
