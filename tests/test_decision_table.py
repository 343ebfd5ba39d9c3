"""Who may call what, as a table: every route of azt against every caller, through the whole server.

The table is written by hand from trust.md 2; the routes come from azt's own table, so that a new
one is tried without a word here, and a new class of routes fails until it has a column.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import lan_callers
import pytest
from harness import ROOT, Claim
from test_policy import KEY, OPEN, TOKEN, sha256

import azt

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]
Headers = dict[str, str]

LOCAL_COOKIE, LAN_COOKIE = "l" * 43, "n" * 43
SESSIONS = {
    sha256(LOCAL_COOKIE): {"scope": "local", "createdAt": time.time() * 1000},
    sha256(LAN_COOKIE): {"scope": "lan", "createdAt": time.time() * 1000},
}
POLICIES = {
    "open": OPEN,
    "keyed": replace(OPEN, keys={sha256(KEY): {}, sha256("another"): {}}),
    "exempt": replace(OPEN, keys={sha256(KEY): {}}, loopback_exempt=True),
    "no lan": replace(OPEN, lan_api=False),
    "listed": replace(OPEN, cors_origins=frozenset({"https://app.example.com"})),
    "star": replace(OPEN, cors_origins=frozenset({"*", "null"})),
    "star keyed": replace(OPEN, cors_origins=frozenset({"*", "null"}), keys={sha256(KEY): {}}),
    "console": replace(OPEN, lan_console=True, sessions=SESSIONS),
    "locked": replace(OPEN, token_on_loopback=True, sessions=SESSIONS),
}

# -- Callers: addresses of the peer, then what each of its requests carries (one of the variants)

OWN = ["127.0.0.1", "::1", "127.8.9.10", "::ffff:127.0.0.1"]
LAN = ["192.168.1.20", "10.0.0.9", "172.16.0.3", "100.64.0.5", "169.254.7.7", "fd00::7", "fe80::1"]
PUBLIC = ["8.8.8.8", "2001:db8::1", "172.32.0.1", "::ffff:8.8.8.8"]

RELAYS = (
    "Forwarded Via X-Forwarded-For X-Forwarded-Host X-Real-IP CF-Connecting-IP True-Client-IP "
    "X-Client-IP Client-IP X-Original-Host Tailscale-User-Login Fly-Client-IP X-Envoy-External"
).split()
GOOD_KEY = [{"Authorization": f"Bearer {KEY}"}, {"X-Api-Key": KEY}, {"Api-Key": KEY}]
WRONG_KEY = [{"Authorization": "Bearer sk-placeholder"}, {"X-Api-Key": KEY[:-1]}]
PROOF = {"Authorization": f"Bearer {TOKEN}"}
MARK = {"X-AZT-Admin": "1"}
SIGNED_IN = {"Cookie": f"azt_admin_8787={LOCAL_COOKIE}"}
PAIRED = {"Cookie": f"a=b; azt_admin_8787={LAN_COOKIE}"}
AT_8787 = {"Host": "localhost:8787"}


def pages(*origins: str, site: str = "") -> list[Headers]:
    sites = {"Sec-Fetch-Site": site} if site else {}
    return [{"Origin": origin, **sites} for origin in origins]


def each(*groups: list[Headers]) -> list[Headers]:
    """One of each group, in every combination."""
    made: list[Headers] = [{}]
    for group in groups:
        made = [{**one, **other} for one in made for other in group]
    return made


OWN_PAGE = each(
    pages("http://localhost:8787", "http://LOCALHOST:8787"), [{"Host": "localhost:8787"}]
)
LOCAL_PAGES = pages(
    "http://localhost:3000", "https://localhost", "http://127.0.0.1:5173", "http://[::1]:80"
)
FOREIGN_PAGES = pages(
    "https://evil.com",
    "http://192.168.1.99:8787",
    "chrome-extension://abc",
    "file://",
    "http://localhost.evil.com",
    "http://127.0.0.2:1",
    "http://localhost:x",
)
LISTED_PAGE = pages("https://app.example.com", site="cross-site")
STRANGE_HOSTS = ["evil.com", "localhost.evil.com", "box.evil.com", "azt.example.com.evil.com"]
BY_OTHER_NAME = ["192.168.1.20", "box", "box.local", "azt.example.com", "[fd00::7]:8787"]
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

CALLERS: dict[str, tuple[list[str], list[Headers]]] = {
    "own": (
        OWN,
        each(
            [MARK], [{"Host": h} for h in ("localhost", "127.0.0.1:8787", "[::1]", "a.localhost")]
        ),
    ),
    "own, proof": (OWN, [{**MARK, **PROOF}]),
    "own, unmarked": (OWN, [{}, {"X-AZT-Admin": "0"}, {"X-AZT-Admin": "true"}]),
    "own, good key": (OWN, each([MARK], GOOD_KEY)),
    "own, wrong key": (OWN, each([MARK], WRONG_KEY)),
    "own, by another name": (
        OWN,
        each([MARK, {**MARK, **PROOF}], [{"Host": h} for h in BY_OTHER_NAME]),
    ),
    "own, from a container": (OWN, [{**MARK, "Host": "host.docker.internal:8787"}]),
    "own, strange host": (
        OWN,
        each([{**MARK, **PROOF}], [{"Host": h} for h in ["", *STRANGE_HOSTS]]),
    ),
    "rebound page": (
        OWN,
        [{**MARK, **PROOF, "Host": h, "Origin": f"http://{h}"} for h in STRANGE_HOSTS],
    ),
    "own page": (OWN, each([MARK], OWN_PAGE, [{}, {"Sec-Fetch-Site": "same-origin"}])),
    "own page, proof": (OWN, each([{**MARK, **PROOF}], OWN_PAGE)),
    "local page": (
        OWN,
        each([{**MARK, **PROOF, **AT_8787}], LOCAL_PAGES, [{}, {"Sec-Fetch-Site": "cross-site"}]),
    ),
    "local page, good key": (OWN, each([{**MARK, **AT_8787}], LOCAL_PAGES, GOOD_KEY)),
    "listed page": (OWN, each([MARK], LISTED_PAGE)),
    "listed page, good key": (OWN, each([{**MARK, **GOOD_KEY[0]}], LISTED_PAGE)),
    "foreign page": (OWN, each([{**MARK, **PROOF}, {**MARK, **GOOD_KEY[0]}], FOREIGN_PAGES)),
    "page without origin": (OWN, each([{**MARK, **PROOF}, GOOD_KEY[0]], pages("null", ""))),
    "cross-site": (OWN, [{**MARK, **PROOF, "Sec-Fetch-Site": "cross-site"}]),
    "same-site": (OWN, [{**MARK, **PROOF, "Sec-Fetch-Site": "same-site"}]),
    "link": (OWN, [{**MARK, **PROOF, **LINK}]),
    "frame": (OWN, [{**MARK, **PROOF, **LINK, "Sec-Fetch-Dest": "iframe"}]),
    "relayed": (OWN, each([{**MARK, **PROOF}], [{name: "127.0.0.1"} for name in RELAYS])),
    "relayed, good key": (OWN, each([MARK], GOOD_KEY, [{name: "10.1.2.3"} for name in RELAYS])),
    "lan": (LAN, [MARK, {**MARK, "Host": "192.168.1.20:8787"}, {**MARK, "Host": "box.local"}]),
    "lan, proof": (LAN, [{**MARK, **PROOF}]),
    "lan, good key": (LAN, each([MARK], GOOD_KEY)),
    "lan, forged": (LAN, each([{**MARK, **PROOF}], [{name: "127.0.0.1"} for name in RELAYS])),
    "own, session": (OWN, [{**MARK, **SIGNED_IN}]),
    "own, paired": (OWN, [{**MARK, **PAIRED}]),
    "relayed, session": (OWN, [{**MARK, **one, "Via": "x"} for one in (SIGNED_IN, PAIRED)]),
    "lan, session": (LAN, [{**MARK, **one} for one in (SIGNED_IN, PAIRED)]),
    "lan, wrong session": (LAN, [{**MARK, "Cookie": f"azt_admin_8787={'w' * 43}"}]),
    "lan, page elsewhere": (LAN, each([{**MARK, **PAIRED}], FOREIGN_PAGES)),
    "public, session": (PUBLIC, [{**MARK, **one} for one in (SIGNED_IN, PAIRED)]),
    "public": (PUBLIC, [{**MARK, **PROOF}, {**MARK, **PROOF, "X-Forwarded-For": "127.0.0.1"}]),
    "public, good key": (PUBLIC, each([MARK], GOOD_KEY)),
}

# -- What they get.  ok: the route answers   1: 401, proof missing   3: 403, wrong place or page
#    r: only what changes nothing gets through. `session` and the rest are classes `admin_...`

TABLE = """
                        api  codex  health  metrics  page  asset  session  read  write  local  proof
open
own                     ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own, proof              ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     ok
own, unmarked           ok   ok     ok      ok       ok    ok     r        ok    3      r      3
own, good key           ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own, wrong key          ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own, by another name    ok   ok     ok      3        ok    3      3        3     3      3      3
own, from a container   ok   ok     ok      3        3     3      3        3     3      3      3
own, strange host       3    3      3       3        3     3      3        3     3      3      3
rebound page            3    3      3       3        3     3      3        3     3      3      3
own page                ok   3      ok      ok       ok    ok     ok       ok    ok     ok     1
own page, proof         ok   3      ok      ok       ok    ok     ok       ok    ok     ok     ok
local page              ok   3      3       3        3     3      3        3     3      3      3
local page, good key    ok   3      3       3        3     3      3        3     3      3      3
listed page             3    3      3       3        3     3      3        3     3      3      3
foreign page            3    3      3       3        3     3      3        3     3      3      3
page without origin     3    3      3       3        3     3      3        3     3      3      3
cross-site              3    3      3       3        3     3      3        3     3      3      3
same-site               ok   3      3       3        3     3      3        3     3      3      3
link                    3    3      3       3        ok    3      3        3     3      3      3
frame                   3    3      3       3        3     3      3        3     3      3      3
relayed                 3    3      ok      3        3     3      3        3     3      3      3
relayed, good key       3    3      ok      3        3     3      3        3     3      3      3
lan                     ok   ok     ok      3        ok    3      3        3     3      3      3
lan, proof              ok   ok     ok      3        ok    3      3        3     3      3      3
lan, good key           ok   ok     ok      3        ok    3      3        3     3      3      3
lan, forged             ok   ok     ok      3        ok    3      3        3     3      3      3
public                  3    3      ok      3        3     3      3        3     3      3      3
public, good key        3    3      ok      3        3     3      3        3     3      3      3
keyed
own                     1    1      ok      ok       ok    ok     ok       ok    ok     ok     1
own, proof              ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     ok
own, good key           ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own, wrong key          1    1      ok      ok       ok    ok     ok       ok    ok     ok     1
own, by another name    1    1      ok      1        ok    3      3        3     3      3      3
own, strange host       3    3      3       3        3     3      3        3     3      3      3
rebound page            3    3      3       3        3     3      3        3     3      3      3
own page                1    3      ok      ok       ok    ok     ok       ok    ok     ok     1
local page              1    3      3       3        3     3      3        3     3      3      3
local page, good key    ok   3      3       3        3     3      3        3     3      3      3
listed page, good key   3    3      3       3        3     3      3        3     3      3      3
foreign page            3    3      3       3        3     3      3        3     3      3      3
page without origin     3    3      3       3        3     3      3        3     3      3      3
cross-site              3    3      3       3        3     3      3        3     3      3      3
link                    3    3      3       3        ok    3      3        3     3      3      3
relayed                 1    1      ok      1        3     3      3        3     3      3      3
relayed, good key       ok   ok     ok      ok       3     3      3        3     3      3      3
lan                     1    1      ok      1        ok    3      3        3     3      3      3
lan, proof              1    1      ok      1        ok    3      3        3     3      3      3
lan, good key           ok   ok     ok      ok       ok    3      3        3     3      3      3
lan, forged             1    1      ok      1        ok    3      3        3     3      3      3
public                  1    1      ok      1        3     3      3        3     3      3      3
public, good key        ok   ok     ok      ok       3     3      3        3     3      3      3
exempt
own                     ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own page                ok   3      ok      ok       ok    ok     ok       ok    ok     ok     1
own, by another name    1    1      ok      1        ok    3      3        3     3      3      3
local page              1    3      3       3        3     3      3        3     3      3      3
foreign page            3    3      3       3        3     3      3        3     3      3      3
relayed                 1    1      ok      1        3     3      3        3     3      3      3
relayed, good key       ok   ok     ok      ok       3     3      3        3     3      3      3
lan                     1    1      ok      1        ok    3      3        3     3      3      3
lan, good key           ok   ok     ok      ok       ok    3      3        3     3      3      3
public                  1    1      ok      1        3     3      3        3     3      3      3
no lan
own                     ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
relayed                 3    3      ok      3        3     3      3        3     3      3      3
lan                     3    3      ok      3        ok    3      3        3     3      3      3
lan, good key           3    3      ok      3        ok    3      3        3     3      3      3
public                  3    3      ok      3        3     3      3        3     3      3      3
listed
listed page             ok   3      3       3        3     3      3        3     3      3      3
foreign page            3    3      3       3        3     3      3        3     3      3      3
rebound page            3    3      3       3        3     3      3        3     3      3      3
star
listed page             3    3      3       3        3     3      3        3     3      3      3
foreign page            3    3      3       3        3     3      3        3     3      3      3
page without origin     3    3      3       3        3     3      3        3     3      3      3
star keyed
listed page             1    3      3       3        3     3      3        3     3      3      3
listed page, good key   ok   3      3       3        3     3      3        3     3      3      3
page without origin     3    3      3       3        3     3      3        3     3      3      3
rebound page            3    3      3       3        3     3      3        3     3      3      3
console
own                     ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own, session            ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     ok
own, unmarked           ok   ok     ok      ok       ok    ok     r        ok    3      r      3
own, by another name    ok   ok     ok      3        ok    ok     ok       1     1      3      3
own page                ok   3      ok      ok       ok    ok     ok       ok    ok     ok     1
rebound page            3    3      3       3        3     3      3        3     3      3      3
local page              ok   3      3       3        3     3      3        3     3      3      3
cross-site              3    3      3       3        3     3      3        3     3      3      3
relayed                 3    3      ok      3        ok    ok     ok       1     1      3      3
relayed, session        3    3      ok      3        ok    ok     ok       ok    ok     3      3
lan                     ok   ok     ok      3        ok    ok     ok       1     1      3      3
lan, proof              ok   ok     ok      3        ok    ok     ok       1     1      3      3
lan, forged             ok   ok     ok      3        ok    ok     ok       1     1      3      3
lan, session            ok   ok     ok      3        ok    ok     ok       ok    ok     3      3
lan, wrong session      ok   ok     ok      3        ok    ok     ok       1     1      3      3
lan, page elsewhere     3    3      3       3        3     3      3        3     3      3      3
public                  3    3      ok      3        3     3      3        3     3      3      3
public, session         3    3      ok      3        3     3      3        3     3      3      3
locked
own                     ok   ok     ok      ok       ok    ok     ok       1     1      1      1
own, proof              ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     ok
own, session            ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     ok
own, paired             ok   ok     ok      ok       ok    ok     ok       ok    ok     ok     1
own page                ok   3      ok      ok       ok    ok     ok       1     1      1      1
lan, session            ok   ok     ok      3        ok    3      3        3     3      3      3
relayed, session        3    3      ok      3        3     3      3        3     3      3      3
"""


def read_table() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Policy, caller and what that gets for each class of routes."""
    head, *lines = TABLE.strip("\n").splitlines()
    policy = ""
    for line in lines:
        if line in POLICIES:
            policy = line
        else:
            caller, cells = line[:24].strip(), line[24:].split()
            names = [name if name in CLASSES else f"admin_{name}" for name in head.split()]
            yield policy, caller, dict(zip(names, cells, strict=True))


CLASSES = set(get_args(azt.Access))
CELLS = list(read_table())

# -- The server, without sockets: its real connections, written to by hand


class Wire(asyncio.Transport):
    """What a connection writes, and whether it has ended."""

    def __init__(self, address: str, sock: socket.socket) -> None:
        ends = {"peername": (address, 50_000), "sockname": ("127.0.0.1", 8787)}
        super().__init__({**ends, "socket": sock})
        self.sent = b""
        self.ended = asyncio.Event()

    def write(self, data: Any) -> None:
        self.sent += data

    def write_eof(self) -> None:
        self.ended.set()

    close = abort = write_eof

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass


@dataclass
class Answer:
    status: int
    headers: Headers
    raw: bytes


async def served(gateway: None, request: azt.Request) -> azt.Reply:
    return azt.json_reply({})


FILES = [azt.Route("GET", "/app.js", azt.get_page, "asset")]  # as `routes_of` makes them
TABLED = (*azt.ROUTES, *azt.CALLBACK_ROUTES, *FILES)
ROUTES = [replace(route, handler=served) for route in TABLED]
ONE_OF_EACH_KIND = list({(route.access, route.method): route for route in ROUTES}.values())


class Server:
    """azt's server with azt's routes, handlers that say 200, and any policy."""

    def __init__(self) -> None:
        self.policy = OPEN
        self._server = azt.HttpServer(ROUTES, None, lambda: self.policy)
        self._loop = asyncio.new_event_loop()
        self._socket = socket.socket()

    def close(self) -> None:
        self._socket.close()
        self._loop.close()

    def ask(self, address: str, method: str, path: str, headers: Headers) -> Answer:
        fields = {"Host": "localhost", "Connection": "close", **headers}
        body = b""
        if method not in ("GET", "HEAD", "OPTIONS"):
            body = b"{}"
            fields = {"Content-Type": "application/json", "Content-Length": "2", **fields}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
        raw = "\r\n".join([*lines, "", ""]).encode() + body
        sent = self._loop.run_until_complete(self._serve(address, raw))
        head, _, _ = sent.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        given = {name.lower(): value for name, _, value in (at.partition(": ") for at in rest)}
        return Answer(int(first.split(" ")[1]), given, sent)

    async def _serve(self, address: str, raw: bytes) -> bytes:
        self._server.guard = azt.Guard()  # each is the first question of its caller
        connection, wire = azt.Connection(self._server, address), Wire(address, self._socket)
        connection.connection_made(wire)
        connection.data_received(raw)
        await wire.ended.wait()
        connection.connection_lost(None)
        return wire.sent


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def path_of(route: azt.Route) -> str:
    return route.path.replace("{id}", "x1").replace("{rest}", "responses").replace("{name}", "x")


def tried_with(caller: str, many: Many) -> Iterator[tuple[str, Headers, azt.Route]]:
    """Address, headers and route: every combination, or a few of them in the daily run."""
    addresses, headers = CALLERS[caller]
    pairs = [(address, one) for address in addresses for one in headers]
    few = [(addresses[0], headers[-1]), (addresses[-1], headers[0])]
    for address, one in many(0, 1) and pairs or few:
        for route in many(0, 1) and ROUTES or ONE_OF_EACH_KIND:
            yield address, one, route


# -- The table


def test_every_class_of_routes_and_every_caller_stands_in_the_table() -> None:
    assert all(set(cells) == CLASSES for _, _, cells in CELLS)
    assert {caller for _, caller, _ in CELLS} == set(CALLERS)
    assert {policy for policy, _, _ in CELLS} == set(POLICIES)
    assert {route.access for route in ROUTES} == CLASSES


def test_every_caller_gets_what_the_table_says_at_every_route(
    server: Server, claim: NewClaim, many: Many
) -> None:
    tries = claim(3, "the decision table: every caller at every route, in every policy")
    expected = {"ok": 200, "1": 401, "3": 403}
    for policy, caller, cells in CELLS:
        server.policy = POLICIES[policy]
        for address, headers, route in tried_with(caller, many):
            for method in {"GET": ("GET", "HEAD")}.get(route.method, (route.method,)):
                got = server.ask(address, method, path_of(route), headers)
                reads = {"r": "ok" if method in ("GET", "HEAD") else "3"}
                wanted = expected[reads.get(cells[route.access], cells[route.access])]
                if caller == "own, unmarked" and route.access == "admin_proof":
                    wanted = expected["1" if method in ("GET", "HEAD") else "3"]
                seen = (policy, caller, address, headers, method, route.path, got.status)
                tries.check(got.status == wanted, seen)


def test_a_refused_page_gets_no_permission_to_read_and_no_page_gets_more_than_the_api(
    server: Server, claim: NewClaim, many: Many
) -> None:
    tries = claim(3, "headers for pages: only what row 4 and 5 allow, never credentials")
    for policy, caller, cells in CELLS:
        server.policy = POLICIES[policy]
        for address, headers, route in tried_with(caller, many):
            if "Origin" not in headers:
                continue
            got = server.ask(address, route.method, path_of(route), headers)
            granted = {name for name in got.headers if name.startswith("access-control-")}
            may_read = route.access == "api" and cells["api"] != "3"
            names = {"access-control-allow-origin", "access-control-expose-headers"}
            is_right = granted == (names if may_read else set())
            echoed = got.headers.get("access-control-allow-origin", headers["Origin"])
            seen = (policy, caller, address, headers, route.path, granted)
            tries.check(is_right and echoed == headers["Origin"], seen)


def test_a_preflight_is_answered_only_where_the_call_would_be_allowed(
    server: Server, claim: NewClaim, many: Many
) -> None:
    tries = claim(3, "preflights: 204 only where the call with its proof would be allowed")
    proofs = {name.lower() for one in (*GOOD_KEY, PROOF, MARK) for name in one}
    for policy, caller, cells in CELLS:
        server.policy = POLICIES[policy]
        for address, headers, route in tried_with(caller, many):
            bare = {name: value for name, value in headers.items() if name.lower() not in proofs}
            if "Origin" not in bare:
                continue
            asked = {**bare, "Access-Control-Request-Method": route.method}
            got = server.ask(address, "OPTIONS", path_of(route), asked)
            wanted = 403 if cells[route.access] == "3" else 204
            is_meagre = b"allow-credentials" not in got.raw and b"private-network" not in got.raw
            seen = (policy, caller, address, asked, route.path, got.status)
            tries.check(got.status == wanted and is_meagre, seen)


ODD: list[tuple[str, Headers, tuple[int, ...]]] = [
    ("TRACE", {}, (405,)),
    ("CONNECT", {}, (405,)),
    ("PROPFIND", {}, (405,)),
    ("GET", {"Upgrade": "websocket", "Connection": "close, Upgrade"}, (400, 426)),
    *(
        (method, {name: "DELETE"}, (405,))
        for method in ("GET", "POST")
        for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override")
    ),
]


def test_nobody_gets_another_method_or_protocol(server: Server, claim: NewClaim) -> None:
    tries = claim(3, "row 18: TRACE, CONNECT, method override, upgrade refused at every route")
    for route in ROUTES:
        for method, headers, statuses in ODD:
            got = server.ask("127.0.0.1", method, path_of(route), {**MARK, **PROOF, **headers})
            tries.check(got.status in statuses, (route.path, method, headers, got.status))


HOSTS = ["local host", "user@localhost", "localhost/", "[::1", "localhost:99999", "a,localhost"]


def test_a_malformed_host_is_400_everywhere(server: Server, claim: NewClaim) -> None:
    tries = claim(3, "a malformed Host is 400 at every route")
    for route in ROUTES:
        for host in HOSTS:
            got = server.ask("127.0.0.1", route.method, path_of(route), {**MARK, "Host": host})
            tries.check(got.status == 400, (route.path, host, got.status))


def test_a_path_that_is_not_there_tells_strangers_nothing(server: Server, claim: NewClaim) -> None:
    tries = claim(3, "an unknown path: as at the API, and a 404 only for those who may call that")
    for policy, caller, cells in CELLS:
        server.policy = POLICIES[policy]
        addresses, (*_, headers) = CALLERS[caller]
        for address, method in zip(addresses, ("GET", "POST", "PUT"), strict=False):
            got = server.ask(address, method, "/v1/no/such/path", headers)
            wanted = {"ok": 404, "1": 401, "3": 403}[cells["api"]]
            tries.check(got.status == wanted, (policy, caller, headers, method, got.status))


# -- The administration and the network


def test_no_forged_header_opens_the_administration_to_another_machine(
    server: Server, claim: NewClaim
) -> None:
    tries = claim(4, "addresses of other machines, every admin route, 4 forged relay headers")
    admin = [route for route in ROUTES if route.access.startswith("admin")]
    for address in (*LAN, *PUBLIC):
        for name, value in lan_callers.FORGED.items():
            for route in admin:
                headers = {**MARK, **PROOF, name: value}
                got = server.ask(address, route.method, path_of(route), headers)
                tries.check(got.status == 403, (address, name, route.path, got.status))


def namespace() -> list[str]:
    """The command that gives a program a network of its own; [] where that is not allowed."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("ip") and shutil.which("unshare"):
            if subprocess.run([*command, "ip", "link"], capture_output=True).returncode == 0:
                return command
    return []


def own_addresses() -> list[str]:
    """Of this machine, other than loopback. Nothing is sent to find out."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((far, 9))
                found.append(sock.getsockname()[0])
            except OSError:
                continue
    return found


def test_no_real_peer_of_the_network_gets_into_the_administration(
    home: Path, claim: NewClaim, many: Many
) -> None:
    command, addresses, kind = namespace(), ["10.9.8.7", "192.168.77.2", "fd00:77::2"], "own"
    if not command:
        addresses, kind = own_addresses(), "shared"
    if not addresses:
        pytest.skip("this machine has no address but loopback, and no network may be made")
    tries = claim(4, "real peers over sockets, every admin route, 4 forged relay headers")
    done = subprocess.run(
        [*command, sys.executable, str(ROOT / "tests" / "lan_callers.py"), kind, str(home)]
        + addresses[: many(1, 3)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[0] == "peer"] == addresses[: many(1, 3)]
    for line in lines:
        if line[0] != "peer":
            *_, status, text = line
            tries.check(status == 403 and azt._LOCAL in json.loads(text)["error"]["message"], line)
