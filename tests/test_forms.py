"""Forms (`multipart/form-data`): read whole and strictly, whatever is sent."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import azt

KIND = "multipart/form-data; boundary=b0"


def part(head: str, body: bytes = b"x", boundary: str = "b0") -> bytes:
    return f"--{boundary}\r\n{head}\r\n\r\n".encode() + body + b"\r\n"


def disposition(words: str) -> str:
    return f"Content-Disposition: form-data; {words}"


FILE = disposition('name="file"; filename="a.json"')
ONE = part(FILE) + b"--b0--\r\n"


def parts(body: bytes, kind: str = KIND, most: int = 100) -> list[azt.Part]:
    return azt.parse_form(body, kind, most)


def refused(body: bytes, kind: str = KIND, most: int = 100) -> str:
    with pytest.raises(azt.BadRequest) as caught:
        parts(body, kind, most)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")
    assert caught.value.message.isprintable()
    return caught.value.message


# -- What is read ---------------------------------------------------------------------------------


def test_a_form_of_a_browser_is_read() -> None:
    text, file = parts(
        part('Content-Disposition: form-data; name="model"', b"gpt-image")
        + part(FILE + "\r\nContent-Type: application/json", b'{"a": 1}')
        + b"--b0--\r\n"
    )

    assert (text.name, text.filename, bytes(text.body)) == ("model", None, b"gpt-image")
    assert (file.name, file.filename, bytes(file.body)) == ("file", "a.json", b'{"a": 1}')
    assert file.content_type == "application/json"


def test_no_body_is_copied() -> None:
    body = bytearray(ONE)
    [file] = azt.parse_form(body, KIND, 1)
    body[body.index(b"\r\n\r\n") + 4] = ord("y")
    assert bytes(file.body) == b"y"


@pytest.mark.parametrize(
    "kind",
    [
        KIND,
        "Multipart/Form-Data;boundary=b0",
        'multipart/form-data; boundary="b0"',
        'multipart/form-data; charset=utf-8; Boundary="b0" ; x=y',
    ],
)
def test_the_boundary_is_found(kind: str) -> None:
    assert len(parts(ONE, kind)) == 1


@pytest.mark.parametrize(
    ("words", "name", "filename"),
    [
        ("name=file; filename=a.json", "file", "a.json"),
        ('name="image[]"; filename=""', "image[]", ""),
        (r'name="a\"b"; filename="c\\d.json"', 'a"b', "c\\d.json"),
        ('name="a;b"; filename="x; y.json"', "a;b", "x; y.json"),
        ('filename="ä 猫.json"; name="ü"', "ü", "ä 猫.json"),
        ("name=\"f\"; filename*=UTF-8''%e2%82%ac.json", "f", "€.json"),
        ("name=\"f\"; filename*=nonsense''%ff.json", "f", None),
    ],
)
def test_names_are_read_in_every_spelling(words: str, name: str, filename: str | None) -> None:
    [read] = parts(part(disposition(words)) + b"--b0--")
    assert read.name == name
    assert filename is None or read.filename == filename


def test_heads_are_read_whatever_their_case_and_order() -> None:
    head = 'CONTENT-TYPE: Text/Plain; charset=x\r\ncontent-disposition:FORM-DATA; NAME="f"'
    [read] = parts(part(head) + b"--b0--")
    assert (read.name, read.content_type) == ("f", "text/plain")


bodies = st.binary(max_size=200) | st.sampled_from(
    [b"", b"\r\n", b"--b", b"\r\n--", b"\r\n--b\r\n"]
)


@given(
    st.lists(bodies, max_size=5), st.from_regex(r"[a-zA-Z0-9'()+_,./:=?-]{1,70}", fullmatch=True)
)
def test_what_is_put_in_comes_out(contents: list[bytes], boundary: str) -> None:
    mark = b"\r\n--" + boundary.encode()
    contents = [one for one in contents if mark not in b"\r\n" + one + b"\r\n"]
    raw = b"".join(part(FILE, one, boundary) for one in contents) + f"--{boundary}--\r\n".encode()
    if not contents:
        raw = f"--{boundary}--".encode()
    read = parts(raw, f'multipart/form-data; boundary="{boundary}"')
    assert [bytes(one.body) for one in read] == contents


# -- What is refused ------------------------------------------------------------------------------

HEADS = {
    "no head": "",
    "no disposition": "Content-Type: text/plain",
    "no name": disposition('filename="a"'),
    "another disposition": 'Content-Disposition: attachment; name="file"',
    "a folded line": 'Content-Disposition: form-data;\r\n name="file"',
    "a line without a colon": FILE + "\r\nhello",
    "a nul": disposition('name="a\0b"'),
    "a bare line feed": disposition('name="a\nb"'),
    "a bare return": disposition('name="a\rb"'),
    "an escape": disposition('name="\x1b[2J"'),
    "base64": FILE + "\r\nContent-Transfer-Encoding: base64",
    "a split name": disposition("name*0=a; name*1=b; name*=utf-8''x"),
    "too large": disposition(f'name="{"a" * 9000}"'),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_part_with_an_odd_head_is_refused(head: str) -> None:
    refused(part(head) + b"--b0--\r\n")


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "only the end of a boundary": b"--b0",
    "a preamble": b"hello\r\n" + ONE,
    "an empty line before": b"\r\n" + ONE,
    "an epilogue": ONE + b"hello",
    "two forms": ONE + ONE,
    "no closing boundary": part(FILE),
    "another boundary": part(FILE, boundary="b1") + b"--b1--\r\n",
    "a longer boundary": part(FILE, boundary="b00") + b"--b00--\r\n",
    "bare line feeds": ONE.replace(b"\r\n", b"\n"),
    "no line end before the boundary": b"--b0\r\n" + FILE.encode() + b"\r\n\r\nx--b0--\r\n",
    "no empty line after the head": b"--b0\r\n" + FILE.encode() + b"\r\nx\r\n--b0--\r\n",
    "padding after the boundary": ONE.replace(b"--b0\r", b"--b0 \r"),
    "one dash at the end": part(FILE) + b"--b0-\r\n",
}


@pytest.mark.parametrize("body", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_form_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize("end", range(len(ONE) - 2))
def test_a_form_cut_anywhere_is_refused(end: int) -> None:
    refused(ONE[:end])


@pytest.mark.parametrize(
    "kind",
    [
        *("", "application/json", "multipart/form-data", "multipart/mixed; boundary=b0"),
        *("multipart/form-data; boundary=", 'multipart/form-data; boundary="b0'),
        *("multipart/form-data; boundary=" + "a" * 71, "multipart/form-data; boundary=b\x000"),
        *("multipart/form-data; boundary=bö", "multipart/form-data; xboundary=b0"),
    ],
)
def test_a_content_type_without_a_good_boundary_is_refused(kind: str) -> None:
    refused(ONE, kind)


def test_ten_thousand_parts_are_refused_at_the_limit_and_read_below_it() -> None:
    raw = part(FILE) * 10_000 + b"--b0--\r\n"
    started = time.monotonic()
    assert "more than 50 parts" in refused(raw, most=50)
    assert time.monotonic() - started < 0.5
    assert len(parts(raw, most=10_000)) == 10_000
    assert time.monotonic() - started < 10


def test_a_long_body_that_almost_has_boundaries_is_read_in_linear_time() -> None:
    content = b"\r\n--b" * 1_000_000
    started = time.monotonic()
    [read] = parts(part(FILE, content) + b"--b0--\r\n")
    assert len(read.body) == len(content)
    assert time.monotonic() - started < 2


pieces = st.sampled_from(
    [b"--b0", b"--", b"\r\n", b"\r", b"\n", b":", b";", b'"', b"\\", b"=", b"*", b"'", b"\0", b"%"]
    + [
        b"Content-Disposition",
        b"form-data",
        b"name",
        b"filename",
        b"file",
        b"utf-8''x",
        b" ",
        b"\xff",
    ]
    + [FILE.encode(), ONE, b"name*0*=", b"filename*1=", b"content-type", b"charset*=x'y'z"]
)


@given(st.lists(pieces | st.binary(max_size=8), max_size=30).map(b"".join), st.text(max_size=60))
def test_anything_else_gives_parts_or_a_refusal(raw: bytes, kind: str) -> None:
    heads = [raw, ONE + raw, part(raw.decode("latin-1")) + b"--b0--\r\n", raw + ONE]
    for body in heads:
        for named in (KIND, f"multipart/form-data; boundary={kind}"):
            told: Any = None
            try:
                read = parts(body, named)
            except azt.BadRequest as error:
                told = error.code
            assert told == "invalid_body" or all(one.name is not None for one in read)


def test_the_boundary_pattern_is_linear() -> None:
    started = time.monotonic()
    refused(ONE, "multipart/form-data" + "; boundary=" * 20_000 + re.escape("b" * 60_000))
    assert time.monotonic() - started < 2
