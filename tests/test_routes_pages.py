"""The page files, health, and what a path can never reach."""

from __future__ import annotations

import re
import socket

import pytest
from harness import ROOT, Client, Gateway

import azt

# console.md 8.2, word for word.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": (
        "camera=(), microphone=(), geolocation=(), payment=(), usb=(), clipboard-read=(), "
        "clipboard-write=(self)"
    ),
    "cache-control": "no-cache",
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
FILES = sorted(
    path.relative_to(ROOT / "azt_web").as_posix()
    for path in (ROOT / "azt_web").rglob("*")
    if path.suffix in TYPES
)
NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def raw(gateway: Gateway, target: bytes, host: bytes = b"localhost") -> bytes:
    """The whole answer to a GET of exactly these bytes."""
    address, _, port = gateway.url.removeprefix("http://").partition(":")
    head = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (target, host)
    with socket.create_connection((address, int(port)), 20) as connection:
        connection.sendall(head)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize("name", FILES)
def test_every_page_file_is_served_with_its_type_and_headers(client: Client, name: str) -> None:
    file = ROOT / "azt_web" / name

    answer = client.get(f"/{name}")

    assert (answer.status, answer.body) == (200, file.read_bytes())
    assert answer.headers["content-type"] == TYPES[file.suffix]
    assert {key: answer.headers[key] for key in HEADERS} == HEADERS
    assert "access-control-allow-origin" not in answer.headers


def test_the_root_is_the_index(client: Client) -> None:
    root, index = client.get("/"), client.get("/index.html")

    assert root.body == index.body
    assert root.headers["etag"] == index.headers["etag"]


def test_a_known_page_is_not_sent_again(client: Client) -> None:
    first = client.get("/js/main.js")

    again = client.get("/js/main.js", headers={"If-None-Match": first.headers["etag"]})
    changed = client.get("/js/main.js", headers={"If-None-Match": '"another"'})

    assert (again.status, again.body) == (304, b"")
    assert {key: again.headers[key] for key in HEADERS} == HEADERS
    assert again.headers["etag"] == first.headers["etag"]
    assert (changed.status, changed.body) == (200, first.body)


def test_head_has_the_headers_and_no_body(client: Client) -> None:
    whole, head = client.get("/app.css"), client.request("HEAD", "/app.css")

    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.body))
    assert head.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "path", ["/nothing.js", "/js/main.js.bak", "/index", "/azt.py", "/favicon.ico"]
)
def test_an_unknown_page_is_not_found(client: Client, path: str) -> None:
    answer = client.get(path)

    assert (answer.status, answer.error["code"]) == (404, "unknown_url")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_pages_are_only_read(client: Client, method: str) -> None:
    answer = client.request(method, "/js/main.js")

    assert (answer.status, answer.error["code"]) == (405, "method_not_supported")


@pytest.mark.parametrize(
    "target",
    [
        b"/../azt.py",
        b"/./js/main.js",
        b"/%2e%2e/azt.py",
        b"/%2e%2e%2fazt.py",
        b"/..%2f..%2f..%2fetc/passwd",
        b"/..%5cazt.py",
        b"/..\\azt.py",
        b"/%252e%252e/azt.py",
        b"/js/main.js%00.html",
        b"/js/main.js/",
        b"/js/main.js/x",
        b"//etc/passwd",
        b"/%2fetc%2fpasswd",
        b"/file:///etc/passwd",
        b"/.state/admin-token",
        b"/%ff%fe",
        b"/js/main.js%0d%0aX-Evil:%201",
        b"/__pycache__",
        b"/azt_web/js/main.js",
        b"/?file=../azt.py%00",
        b"/" + b"a" * 9_000,
        b"/<script>alert(1)</script>",
    ],
)
def test_a_hostile_path_reaches_no_file(gateway: Gateway, target: bytes) -> None:
    answer = raw(gateway, target)
    head, _, body = answer.partition(b"\r\n\r\n")

    pages = [(ROOT / "azt_web" / name).read_bytes() for name in FILES]
    assert head.split()[1] in (b"200", b"400", b"404", b"414", b"431")
    if head.split()[1] == b"200":
        assert body in pages
    else:
        assert b"content-type: application/json" in head.lower()
    assert b"root:" not in body and b"import argparse" not in body
    assert b"x-evil" not in head.lower()


def test_a_link_from_another_page_opens_the_console_and_a_frame_does_not(client: Client) -> None:
    link = {**NAVIGATION, "Sec-Fetch-Site": "cross-site"}

    assert client.get("/", headers=link).status == 200
    assert client.get("/", headers={**link, "Sec-Fetch-Dest": "iframe"}).status == 403
    assert client.get("/js/main.js", headers={"Sec-Fetch-Site": "cross-site"}).status == 403
    assert client.get("/js/main.js", headers={"Sec-Fetch-Site": "same-origin"}).status == 200


def test_a_foreign_name_for_this_machine_gets_no_page(gateway: Gateway) -> None:
    answer = raw(gateway, b"/", b"rebound.example")

    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"server.allowedHosts" in answer


@pytest.mark.parametrize("path", ["/_gateway/health", "/health", "/healthz", "/v1", "/v1/"])
def test_health_says_only_that_it_is_well(client: Client, path: str) -> None:
    answer = client.get(path)

    assert (answer.status, answer.json) == (200, {"ok": True})


def test_the_pages_name_no_other_host() -> None:
    """Links and namespaces alone, in one list (js/dom.js); snippets name this computer."""
    for name in FILES:
        text = (ROOT / "azt_web" / name).read_text(encoding="utf-8")
        hosts = {*re.findall(r"https?://([\w.-]+)", text)}

        assert hosts <= {"www.w3.org", "localhost", "127.0.0.1", "host.docker.internal"}, name


def test_every_type_of_page_file_is_known() -> None:
    suffixes = {path.suffix for path in (ROOT / "azt_web").rglob("*") if path.is_file()}

    assert suffixes <= {*TYPES}
    assert {"index.html", "js/main.js", "app.css"} <= {*FILES}
    assert azt.OUTBOUND
