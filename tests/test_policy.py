"""The decision table of who may call what, row by row, and what a head says of its caller."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Literal, get_args

import pytest

import azt
from azt import Access, Caller, PeerClass, Policy

KEY = "azt_0123456789abcdef"
TOKEN = "the-admin-token"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


OPEN = Policy(
    own_names=frozenset({"box", "box.local"}),
    allowed_hosts=frozenset({"azt.example.com"}),
    cors_origins=frozenset(),
    lan_api=True,
    loopback_exempt=False,
    own_networks=(),
    keys={},
    admin_token_hash=sha256(TOKEN),
    body_max_bytes=1000,
)
KEYED = replace(OPEN, keys={sha256(KEY): {}, sha256("another"): {}})
EXEMPT = replace(KEYED, loopback_exempt=True)
NO_LAN = replace(OPEN, lan_api=False)
CONSOLE = replace(OPEN, lan_console=True)
LOCKED = replace(OPEN, token_on_loopback=True)
POLICIES = {
    "open": OPEN,
    "keyed": KEYED,
    "exempt": EXEMPT,
    "no lan": NO_LAN,
    "console": CONSOLE,
    "locked": LOCKED,
}

OWN = Caller("own", "localhost")
NEIGHBOUR = Caller("neighbour", "localhost")
RELAYED = Caller("relayed", "localhost")
LAN = Caller("lan", "192.168.1.20")
PUBLIC = Caller("public", "azt.example.com")
CALLERS: dict[str, Caller] = {
    "own": OWN,
    "neighbour": NEIGHBOUR,
    "relayed": RELAYED,
    "lan": LAN,
    "public": PUBLIC,
}
ADMIN = [access for access in get_args(Access) if access.startswith("admin")]
PLAIN = ["admin_session", "admin_read", "admin_write"]
LOCAL = ["admin_local", "admin_proof"]


def status(caller: Caller, access: Access, method: str = "GET", policy: Policy = OPEN) -> int:
    fault = azt.may(caller, access, method, policy)
    return 200 if fault is None else fault.status


# -- rows 1 to 3, 6 to 8, 10, 12 to 14: who x what, in each policy
# columns: own, neighbour, relayed, lan, public

Statuses = tuple[int, int, int, int, int]
EVERYBODY: Statuses = (200, 200, 200, 200, 200)
KEYLESS: Statuses = (401, 401, 401, 401, 401)
OWN_ONLY: Statuses = (200, 403, 403, 403, 403)
GUESTS: Statuses = (200, 401, 401, 401, 403)  # they may come, and have to sign in
PLACES: dict[tuple[str, str, str], Statuses] = {
    **{
        (calls, *row): statuses
        for calls in ("api", "codex")
        for row, statuses in {
            ("none", "open"): (200, 200, 403, 200, 403),
            ("wrong", "open"): (200, 200, 403, 200, 403),
            ("none", "console"): (200, 200, 403, 200, 403),
            ("none", "locked"): (200, 200, 403, 200, 403),
            ("none", "no lan"): (200, 200, 403, 403, 403),
            ("none", "keyed"): KEYLESS,
            ("wrong", "keyed"): KEYLESS,
            ("good", "keyed"): EVERYBODY,
            ("none", "exempt"): (200, 401, 401, 401, 401),
            ("good", "exempt"): EVERYBODY,
        }.items()
    },
    ("metrics", "none", "open"): OWN_ONLY,
    ("metrics", "none", "keyed"): (200, 401, 401, 401, 401),
    ("metrics", "wrong", "keyed"): (200, 401, 401, 401, 401),
    ("metrics", "good", "keyed"): EVERYBODY,
    **{("health", key, policy): EVERYBODY for key in ("none", "good") for policy in POLICIES},
    **{
        ("page", key, policy): (200, 200, 200, 200, 403)
        if policy == "console"
        else (200, 403, 403, 200, 403)
        for key in ("none", "good")
        for policy in POLICIES
    },
    **{
        ("asset", key, policy): (200, 200, 200, 200, 403) if policy == "console" else OWN_ONLY
        for key in ("none", "good")
        for policy in POLICIES
    },
    **{
        (access, key, policy): {"console": GUESTS, "locked": (401, 403, 403, 403, 403)}.get(
            policy, OWN_ONLY
        )
        for access in ("admin_read", "admin_write")
        for key in ("none", "good")
        for policy in POLICIES
    },
    **{
        ("admin_session", key, policy): (200, 200, 200, 200, 403)
        if policy == "console"
        else OWN_ONLY
        for key in ("none", "good")
        for policy in POLICIES
    },
    **{
        ("admin_local", key, policy): (401, 403, 403, 403, 403) if policy == "locked" else OWN_ONLY
        for key in ("none", "good")
        for policy in POLICIES
    },
    **{
        ("admin_proof", key, policy): (401, 403, 403, 403, 403)
        for key in ("none", "good")
        for policy in POLICIES
    },
}


@pytest.mark.parametrize(
    ("row", "statuses"), PLACES.items(), ids=lambda value: " ".join(map(str, value))
)
def test_place_and_key_decide(row: tuple[Access, str, str], statuses: tuple[int, ...]) -> None:
    access, key, policy = row
    seen = tuple(
        status(replace(caller, key=key, marked=True), access, "POST", POLICIES[policy])
        for caller in CALLERS.values()
    )
    assert seen == statuses


def test_every_access_stands_in_the_table() -> None:
    assert {access for access, _, _ in PLACES} == set(get_args(Access))


def test_every_peer_class_is_a_column() -> None:
    assert {caller.peer for caller in CALLERS.values()} == set(get_args(PeerClass))


@pytest.mark.parametrize(
    "access", [access for access in get_args(Access) if access != "admin_proof"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_plain_call_on_loopback_is_never_refused(access: Access, method: str) -> None:
    assert status(replace(OWN, marked=True), access, method) == 200


# -- rows 7 to 9 and 16: changes and proof


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("access", ADMIN)
def test_admin_change_without_its_header_is_refused(access: Access, method: str) -> None:
    assert status(replace(OWN, proof=True), access, method) == 403
    assert status(replace(OWN, proof=True, marked=True), access, method) == 200


def test_secrets_need_proof_for_reading_too() -> None:
    assert status(OWN, "admin_proof") == 401
    assert status(replace(OWN, proof=True), "admin_proof") == 200
    assert status(replace(OWN, session="local"), "admin_proof") == 200
    assert status(replace(OWN, session="lan"), "admin_proof") == 401


ELSEWHERE = [NEIGHBOUR, RELAYED, LAN, PUBLIC, replace(OWN, host="192.168.1.20")]


@pytest.mark.parametrize("caller", ELSEWHERE)
@pytest.mark.parametrize("access", ADMIN)
def test_no_token_and_no_session_opens_the_administration_elsewhere(
    caller: Caller, access: Access
) -> None:
    caller = replace(caller, proof=True, key="good", marked=True, session="local")
    assert status(caller, access, "POST", KEYED) == 403


@pytest.mark.parametrize("caller", ELSEWHERE)
@pytest.mark.parametrize("session", ["none", "lan", "local"])
def test_console_for_other_devices_keeps_what_is_local_and_needs_a_session(
    caller: Caller, session: Literal["none", "lan", "local"]
) -> None:
    guest = replace(caller, session=session, proof=True, key="good", marked=True)
    allowed = caller is not PUBLIC and session != "none"
    seen = {access: status(guest, access, "POST", CONSOLE) for access in ADMIN}
    assert {seen.pop(access) for access in LOCAL} == {403}
    assert seen.pop("admin_session") == (403 if caller is PUBLIC else 200)
    assert set(seen.values()) == {200 if allowed else 403 if caller is PUBLIC else 401}


@pytest.mark.parametrize("access", ["admin_read", "admin_write", "admin_local"])
def test_this_machine_signs_in_where_that_is_asked_for(access: Access) -> None:
    marked = replace(OWN, marked=True)
    assert status(marked, access, "POST", LOCKED) == 401
    assert status(replace(marked, session="lan"), access, "POST", LOCKED) == 200
    assert status(replace(marked, session="local"), access, "POST", LOCKED) == 200
    assert status(replace(marked, proof=True), access, "POST", LOCKED) == 200


@pytest.mark.parametrize("policy", [OPEN, CONSOLE], ids=["off", "on"])
def test_administration_says_the_same_to_everybody_elsewhere(policy: Policy) -> None:
    for access in LOCAL if policy.lan_console else ADMIN:
        faults = {str(azt.may(caller, access, "GET", policy)) for caller in ELSEWHERE}
        assert len(faults) == 1


# -- row 3 of the numbers: the routes that are there


ROUTES = {(one.method, one.path): one.access for one in azt.ROUTES}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_follows_the_rows_of_its_path(method: str, path: str) -> None:
    """Whatever is added to the table of routes is asked for here, by every kind of caller."""
    access = ROUTES[method, path]
    assert access in get_args(Access)
    kinds = {"/_gateway/admin/": "admin_", "/codex/": "codex", "/metrics": "metrics", "/v1/": "api"}
    kind = next((kind for start, kind in kinds.items() if path.startswith(start)), "")
    assert access.startswith(kind) if kind else access in ("health", "page", "api")
    if access.startswith("admin_"):
        assert (method == "GET") is (access == "admin_read") or access in LOCAL + ["admin_session"]
        for caller in ELSEWHERE:
            assert status(replace(caller, proof=True, marked=True), access, method) == 403
        assert status(OWN, access, method) in ((200, 401) if method == "GET" else (403,))
        assert status(replace(OWN, fetch_site="cross-site"), access, method) == 403
    for (row, key, policy), statuses in PLACES.items():
        for caller, expected in zip(CALLERS.values(), statuses, strict=True):
            if row == access:
                asked = replace(caller, key=key, marked=True)
                assert status(asked, access, method, POLICIES[policy]) == expected


def test_the_files_of_the_page_are_assets() -> None:
    gateway = azt.Gateway.__new__(azt.Gateway)
    gateway.pages = {"/": azt.Page(b"", "", ""), "/app.js": azt.Page(b"", "", "")}
    routes = azt.routes_of(gateway)
    assert [one.access for one in routes if one.path in gateway.pages] == ["page", "asset"]


def test_a_route_without_an_access_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="access"):
        azt.Route("GET", "/x", azt.get_page)  # type: ignore[call-arg]


def test_admin_token_serves_as_a_key_on_this_machine_only() -> None:
    assert status(replace(OWN, proof=True, key="wrong"), "api", "POST", KEYED) == 200
    assert status(replace(LAN, proof=True, key="wrong"), "api", "POST", KEYED) == 401


@pytest.mark.parametrize("host", ["box", "box.local", "azt.example.com", "192.168.1.20", "0.0.0.0"])
def test_administration_answers_to_loopback_names_only(host: str) -> None:
    assert status(replace(OWN, host=host), "admin_read") == 403


# -- the Host rule, all rows


@pytest.mark.parametrize("access", get_args(Access))
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize(
    "host", ["", "evil.com", "localhost.evil.com", "box.evil.com", "azt.example.com.evil.com"]
)
def test_foreign_host_is_refused_everywhere(access: Access, caller: Caller, host: str) -> None:
    assert (
        status(
            replace(caller, host=host, key="good", proof=True, marked=True), access, "GET", KEYED
        )
        == 403
    )


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "::1", "localhost", "a.localhost", "10.1.2.3", "fe80::1", "box", "box.local"],
)
@pytest.mark.parametrize("access", ["api", "codex", "health", "page"])
def test_own_names_and_addresses_are_answered(access: Access, host: str) -> None:
    assert status(replace(OWN, host=host), access) == 200


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        ("api", 200),
        ("codex", 200),
        ("health", 200),
        ("page", 403),
        ("asset", 403),
        ("metrics", 403),
        *((access, 403) for access in ADMIN),
    ],
)
def test_internal_names_reach_the_api_only(access: Access, expected: int) -> None:
    assert status(replace(OWN, host="host.docker.internal"), access) == expected


def test_refused_host_is_told_the_setting() -> None:
    fault = azt.may(replace(OWN, host="evil.com"), "api", "GET", OPEN)
    assert fault is not None
    assert "server.allowedHosts" in fault.message


# -- rows 4, 5, 11: pages

FOREIGN = [
    "https://evil.com",
    "http://192.168.1.99:8787",
    "chrome-extension://abc",
    "file://",
    "null",
    "",
    "http://localhost.evil.com",
]


@pytest.mark.parametrize("access", get_args(Access))
@pytest.mark.parametrize("origin", FOREIGN)
def test_foreign_page_is_refused_everywhere(access: Access, origin: str) -> None:
    caller = replace(OWN, origin=origin, key="good", proof=True, marked=True)
    assert status(caller, access, "POST") == 403


@pytest.mark.parametrize("access", get_args(Access))
def test_cross_site_request_without_origin_is_refused_everywhere(access: Access) -> None:
    caller = replace(OWN, fetch_site="cross-site", key="good", proof=True, marked=True)
    assert status(caller, access) == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:3000",
        "https://localhost",
        "http://127.0.0.1:5173",
        "http://[::1]:80",
        "http://localhost",
    ],
)
@pytest.mark.parametrize("site", ["", "same-site", "cross-site"])
def test_page_of_this_machine_may_use_the_api_and_nothing_else(origin: str, site: str) -> None:
    caller = replace(OWN, origin=origin, fetch_site=site, proof=True, marked=True)
    seen = {access: status(caller, access, "POST") for access in get_args(Access)}
    assert seen.pop("api") == 200
    assert set(seen.values()) == {403}


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:x",
        "http://localhost:3000/",
        "http://127.0.0.1.evil.com",
        "http://127.0.0.2:1",
    ],
)
def test_what_only_looks_like_loopback_is_foreign(origin: str) -> None:
    assert status(replace(OWN, origin=origin), "api", "POST") == 403


def test_listed_origin_may_use_the_api_and_nothing_else() -> None:
    listed = replace(OPEN, cors_origins=frozenset({"https://app.example.com"}))
    caller = replace(
        OWN, origin="https://app.example.com", fetch_site="cross-site", proof=True, marked=True
    )
    seen = {access: status(caller, access, "POST", listed) for access in get_args(Access)}
    assert seen.pop("api") == 200
    assert set(seen.values()) == {403}


def test_star_counts_only_while_a_key_exists_and_never_for_null() -> None:
    star = frozenset({"*", "null"})
    page = replace(OWN, origin="https://app.example.com", key="good")
    assert status(page, "api", "POST", replace(OPEN, cors_origins=star)) == 403
    assert status(page, "api", "POST", replace(KEYED, cors_origins=star)) == 200
    assert (
        status(replace(page, origin="null"), "api", "POST", replace(KEYED, cors_origins=star))
        == 403
    )


def test_page_of_this_machine_is_not_exempt_from_keys() -> None:
    assert status(replace(OWN, origin="http://localhost:3000"), "api", "POST", EXEMPT) == 401


@pytest.mark.parametrize(
    "access", ["api", "page", "asset", "metrics", "health", *PLAIN, "admin_local"]
)
@pytest.mark.parametrize("site", ["", "none", "same-origin"])
def test_own_page_may_call(access: Access, site: str) -> None:
    caller = replace(
        OWN, origin="http://localhost:8787", own_origin=True, fetch_site=site, marked=True
    )
    assert status(caller, access, "POST") == 200


@pytest.mark.parametrize("site", ["same-site", "cross-site"])
@pytest.mark.parametrize("access", ["metrics", "page", "asset", "codex", *ADMIN])
def test_neighbour_site_is_refused_outside_the_api(access: Access, site: str) -> None:
    assert status(replace(OWN, fetch_site=site), access) == 403


@pytest.mark.parametrize("site", ["same-origin", "same-site", "cross-site"])
def test_no_page_at_all_may_use_the_codex_routes(site: str) -> None:
    assert status(replace(OWN, fetch_site=site), "codex") == 403
    assert (
        status(replace(OWN, origin="http://localhost:8787", own_origin=True), "codex", "POST")
        == 403
    )


def test_link_from_another_page_opens_the_page_but_no_frame_and_no_form_does() -> None:
    link = replace(OWN, fetch_site="cross-site", navigates=True)
    assert status(link, "page", "GET") == 200
    assert status(link, "page", "POST") == 403
    assert status(replace(link, navigates=False), "page", "GET") == 403
    assert status(link, "asset", "GET") == 403
    assert status(link, "admin_read", "GET") == 403
    assert status(link, "api", "GET") == 403


# -- who the caller is

ADDRESSES = {
    "own": ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"],
    "lan": [
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.9.9",
        "169.254.1.1",
        "100.64.0.1",
        "fd00::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "203.0.113.7",
    ],
    "public": [
        "8.8.8.8",
        "172.32.0.1",
        "100.128.0.1",
        "192.169.0.1",
        "2001:db8::1",
        "::ffff:8.8.8.8",
        "0.0.0.0",
    ],
}


@pytest.mark.parametrize(
    ("place", "address"), [(p, a) for p, addresses in ADDRESSES.items() for a in addresses]
)
def test_address_of_the_peer_tells_the_place(place: str, address: str) -> None:
    assert azt.peer_place(address, (ipaddress.ip_network("203.0.113.0/24"),)) == place


@pytest.mark.parametrize(
    "header",
    [
        "forwarded",
        "via",
        "x-real-ip",
        "x-forwarded-for",
        "x-forwarded-proto",
        "cf-connecting-ip",
        "x-client-ip",
    ],
)
def test_relay_headers_are_seen(header: str) -> None:
    assert azt.is_relayed({"host": "localhost", header: "127.0.0.1"})


def test_ordinary_headers_are_no_relay() -> None:
    assert not azt.is_relayed(
        {"host": "localhost", "user-agent": "curl", "x-request-id": "1", "x-stainless-os": "Linux"}
    )


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8787", "localhost"),
        ("localhost.:8787", "localhost"),
        ("[::1]:8787", "::1"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("", ""),
    ],
)
def test_host_is_read_without_port_and_brackets(host: str, name: str) -> None:
    assert azt.read_caller("own", {"host": host}, OPEN).host == name


@pytest.mark.parametrize(
    ("origin", "own"),
    [
        ("http://localhost:8787", True),
        ("HTTP://LOCALHOST:8787", True),
        ("https://localhost:8787", True),
        ("http://localhost", False),
        ("http://localhost:3000", False),
        ("ws://localhost:8787", False),
        ("null", False),
    ],
)
def test_own_origin_is_that_of_the_host_header(origin: str, own: bool) -> None:
    caller = azt.read_caller("own", {"host": "localhost:8787", "origin": origin}, OPEN)
    assert caller.own_origin is own


@pytest.mark.parametrize(
    ("headers", "key", "proof"),
    [
        ({}, "none", False),
        ({"authorization": f"Bearer {KEY}"}, "good", False),
        ({"authorization": f"bearer  {KEY} "}, "good", False),
        ({"x-api-key": KEY}, "good", False),
        ({"api-key": KEY}, "good", False),
        ({"authorization": "Bearer sk-placeholder", "api-key": KEY}, "good", False),
        ({"authorization": "Bearer sk-placeholder"}, "wrong", False),
        ({"authorization": f"Basic {KEY}"}, "none", False),
        ({"authorization": KEY}, "none", False),
        ({"authorization": "Bearer "}, "none", False),
        ({"authorization": f"Bearer {KEY}x"}, "wrong", False),
        ({"authorization": f"Bearer {sha256(KEY)}"}, "wrong", False),
        ({"authorization": f"Bearer {TOKEN}"}, "wrong", True),
        ({"x-api-key": TOKEN}, "wrong", False),
        ({"authorization": "Bearer caf\xe9"}, "wrong", False),
    ],
)
def test_key_and_proof_are_read_from_the_headers(
    headers: dict[str, str], key: str, proof: bool
) -> None:
    caller = azt.read_caller("own", {"host": "localhost", **headers}, KEYED)
    assert (caller.key, caller.proof) == (key, proof)


def test_empty_admin_token_proves_nothing() -> None:
    without = replace(OPEN, admin_token_hash="")
    headers = {"host": "localhost", "authorization": "Bearer "}
    caller = azt.read_caller("own", headers, without)
    assert not caller.proof


def test_browser_marks_are_read() -> None:
    headers = {
        "host": "localhost",
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
        "x-azt-admin": "1",
    }
    caller = azt.read_caller("own", headers, OPEN)
    framed = azt.read_caller("own", {**headers, "sec-fetch-dest": "iframe"}, OPEN)
    assert (caller.fetch_site, caller.navigates, caller.marked) == ("cross-site", True, True)
    assert not framed.navigates


COOKIE = "c" * 43
SESSION = {"scope": "lan", "createdAt": 1_000_000}
SIGNED = replace(OPEN, sessions={sha256(COOKIE): SESSION})


@pytest.mark.parametrize(
    ("cookie", "now", "session"),
    [
        ("", 1_000.0, "none"),
        (f"azt_admin_8787={COOKIE}", 1_000.0, "lan"),
        (f"azt_admin_8788={'x' * 43}; azt_admin_8787={COOKIE}", 1_000.0, "lan"),
        (f"a=b;azt_admin_1={COOKIE};c=d", 1_000.0, "lan"),
        (f"azt_admin_8787={COOKIE}", 1_000.0 + azt.SESSION_LIFE_S, "none"),
        (f"azt_admin_8787={COOKIE}c", 1_000.0, "none"),
        (f"azt_admin_8787={sha256(COOKIE)}", 1_000.0, "none"),
        (f"other={COOKIE}", 1_000.0, "none"),
        (f"xazt_admin_8787={COOKIE}", 1_000.0, "none"),
    ],
)
def test_a_session_is_read_from_its_cookie_until_it_ends(
    cookie: str, now: float, session: str
) -> None:
    caller = azt.read_caller("own", {"host": "localhost", "cookie": cookie}, SIGNED, now)
    assert caller.session == session
    assert caller.session_hash == (sha256(COOKIE) if session == "lan" else "")


def test_guesses_of_one_ipv6_network_count_together() -> None:
    one = azt.who_guesses("2001:db8::1", "public")
    assert one == azt.who_guesses("2001:db8:0:0:ff::2%eth0", "public")
    assert one != azt.who_guesses("2001:db8:0:1::1", "public")
    assert azt.who_guesses("10.0.0.1", "lan") != azt.who_guesses("10.0.0.2", "lan")
    assert azt.who_guesses("127.0.0.1", "own") != azt.who_guesses("127.0.0.1", "relayed")


@pytest.mark.parametrize("access", get_args(Access))
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_refusal_says_what_to_do_and_names_no_secret(access: Access, policy: Policy) -> None:
    for caller in CALLERS.values():
        for key in ("none", "wrong"):
            fault = azt.may(replace(caller, key=key), access, "POST", policy)
            text = azt.error_body(fault)["error"]["message"] if fault else "Nothing is wrong."
            assert text.endswith(".")
            assert "***" not in text


def test_a_connection_of_this_user_is_nobody_elses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            here, peer = server.accept()
            with here:
                assert not azt.is_other_user(peer, here.getsockname())
                mapped = [(f"::ffff:{host}", port) for host, port in (peer, client.getpeername())]
                assert not azt.is_other_user(*mapped)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user too")
def test_a_connection_of_another_user_is_told() -> None:
    program = "import socket as s, sys; s.create_connection(('127.0.0.1', sys.argv[1])).recv(1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        port = str(server.getsockname()[1])
        with subprocess.Popen([sys.executable, "-c", program, port], user=65534) as other:
            here, peer = server.accept()
            with here:
                assert azt.is_other_user(peer, here.getsockname())
            assert other.wait(10) == 0


def test_a_connection_that_the_system_does_not_know_is_nobody_elses() -> None:
    assert not azt.is_other_user(("127.0.0.1", 1), ("127.0.0.1", 2))


def test_who_cannot_be_asked_for_want_of_files_counts_as_another() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        refused = azt.is_other_user(("127.0.0.1", 1), ("127.0.0.1", 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused
