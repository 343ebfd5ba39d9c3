"""Signing in at the console: sessions, their codes and cookies, who is slowed, and `azt open`."""

from __future__ import annotations

import json
import os
import pty
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import READY, Answer, Client, Gateway, Stream, eventually, make_gateway

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
MARK = {"X-AZT-Admin": "1"}
RELAYED = {"X-Forwarded-For": "192.168.1.44"}
"""Makes a caller on loopback one from elsewhere: a stand-in for another device."""
IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) AppleWebKit/605.1 Version/19 Safari/604"
)


class Browser(Client):
    """Keeps the one cookie that it was given, and sends what a page of azt sends."""

    def __init__(self, url: str, **headers: str) -> None:
        super().__init__(url)
        self.headers = {**MARK, **headers}
        self.cookie = ""

    def call(self, method: str, path: str, json: Any = None, **headers: str) -> Answer:
        cookie = {"Cookie": self.cookie} if self.cookie else {}
        sent = {**self.headers, **cookie, **headers}
        answer = self.request(method, ADMIN + path, json, headers=sent)
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def sign_in(self, **what: str) -> Answer:
        return self.call("POST", "/session", what)

    @property
    def session(self) -> Any:
        return self.call("GET", "/session").json


def refused(answer: Answer, status: int, code: str) -> Any:
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    return answer.error


@pytest.fixture(scope="module")
def running(shared_upstream: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path_factory.mktemp("sessions"), shared_upstream)
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


def token_of(gateway: Gateway) -> str:
    return (gateway.state / "admin-token").read_text().strip()


def code_for(gateway: Gateway, **what: str) -> Any:
    answer = Client(gateway.url).post(ADMIN + "/session/pair", what, headers=gateway.proof())
    assert answer.status == 200, answer.body
    return answer.json


def change(gateway: Gateway, **values: Any) -> None:
    done = Client(gateway.url).request(
        "PATCH", ADMIN + "/settings", {"values": {"server": values}}, headers=gateway.proof()
    )
    assert done.status == 200, done.body


@pytest.fixture
def console(running: Gateway) -> Iterator[Gateway]:
    """The console is on for other devices."""
    change(running, lanConsole=True)
    yield running
    change(running, lanConsole=False)


# -- This machine ---------------------------------------------------------------------------------


def test_this_machine_is_signed_in_without_a_cookie_but_proves_nothing(running: Gateway) -> None:
    browser = Browser(running.url)

    assert browser.session == {
        "signedIn": True,
        "via": "loopback",
        "scope": "local",
        "expiresAt": None,
        "can": {"write": True, "export": False, "codex": False},
        "lan": {"apiOn": True, "consoleOn": False},
        "version": azt.VERSION,
    }
    refused(browser.call("POST", "/accounts/export", {"all": True}), 401, "proof_needed")


def test_code_of_azt_open_gives_a_session_that_proves(running: Gateway) -> None:
    browser = Browser(running.url)
    made = code_for(running, **{"for": "open"})

    signed = browser.sign_in(code=made["code"])

    assert (signed.status, signed.body) == (204, b"")
    assert signed.headers["cache-control"] == "no-store"
    port = running.url.rpartition(":")[2]
    assert re.fullmatch(
        rf"azt_admin_{port}=[\w-]{{43}}; Path=/_gateway/admin; HttpOnly; SameSite=Strict; "
        r"Max-Age=2592000",
        signed.headers["set-cookie"],
    )
    session = browser.session
    assert (session["via"], session["scope"]) == ("open", "local")
    assert session["can"] == {"write": True, "export": True, "codex": True}
    assert session["expiresAt"] > time.time() * 1000 + 29 * 86_400_000
    assert browser.call("POST", "/accounts/export", {"all": True}).status == 200


def test_a_code_works_once_and_the_next_one_ends_it(running: Gateway) -> None:
    first = code_for(running, **{"for": "open"})["code"]
    second = code_for(running, **{"for": "open"})["code"]

    assert Browser(running.url).sign_in(code=second).status == 204
    for spent in (first, second):
        refused(Browser(running.url).sign_in(code=spent), 401, "pairing_expired")
    assert Browser(running.url).sign_in(token=token_of(running)).status == 204


def test_cookie_proves_only_with_the_mark_and_only_to_its_own_page(running: Gateway) -> None:
    browser = Browser(running.url)
    browser.sign_in(token=token_of(running))

    unmarked = browser.call("POST", "/accounts/export", {"all": True}, **{"X-AZT-Admin": "0"})
    neighbour = browser.call(
        "POST", "/accounts/export", {"all": True}, Origin="http://127.0.0.1:3000"
    )
    relayed = browser.call("POST", "/accounts/export", {"all": True}, **RELAYED)

    refused(unmarked, 403, "csrf_header_missing")
    refused(neighbour, 403, "bad_origin")
    refused(relayed, 403, "local_only")


def test_cookie_opens_nothing_of_the_api(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    browser = Browser(gateway.url)
    browser.sign_in(token=token_of(gateway))
    assert browser.call("POST", "/keys", {"name": "phone"}).status == 201

    assert browser.get("/v1/models", headers={"Cookie": browser.cookie}).status == 401


def test_sessions_are_listed_ended_and_kept_without_their_cookies(running: Gateway) -> None:
    browser, other = Browser(running.url), Browser(running.url, **{"User-Agent": IPHONE})
    for one in (browser, other):
        assert one.sign_in(token=token_of(running)).status == 204
    *_, mine, theirs = browser.call("GET", "/sessions").json["items"]

    assert (mine["current"], theirs["current"]) == (True, False)
    assert (theirs["via"], theirs["agent"], theirs["address"]) == (
        "token",
        "Safari, iPhone",
        "127.0.0.1",
    )
    assert theirs["createdAt"] <= theirs["lastUsedAt"] <= time.time() * 1000
    kept = (running.state / "sessions.json").read_text()
    assert stat.S_IMODE((running.state / "sessions.json").stat().st_mode) == 0o600
    for one in (browser, other):
        assert one.cookie.partition("=")[2] not in kept
    assert browser.call("DELETE", f"/sessions/{theirs['id']}").status == 204
    assert other.session["via"] == "loopback"
    assert browser.session["via"] == "token"
    refused(browser.call("DELETE", "/sessions/ses_none"), 404, "session_not_found")


def test_signing_out_ends_the_session_and_takes_the_cookie_away(running: Gateway) -> None:
    browser = Browser(running.url)
    browser.sign_in(token=token_of(running))
    cookie = browser.cookie

    done = browser.call("DELETE", "/session")

    assert done.status == 204
    assert "Max-Age=0" in done.headers["set-cookie"]
    browser.cookie = cookie
    assert browser.session["via"] == "loopback"


def test_signing_in_again_replaces_the_session_of_that_browser(running: Gateway) -> None:
    browser = Browser(running.url)
    browser.sign_in(token=token_of(running))
    before = len(browser.call("GET", "/sessions").json["items"])

    browser.sign_in(token=token_of(running))

    assert len(browser.call("GET", "/sessions").json["items"]) == before


def test_sessions_outlive_the_gateway(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    browser = Browser(gateway.url)
    browser.sign_in(token=token_of(gateway))
    gateway.stop()

    browser = Browser(gateway.start().url)
    (session,) = json.loads((gateway.state / "sessions.json").read_text())["sessions"]

    assert browser.session["via"] == "loopback"
    assert session["via"] == "token"
    browser.call("GET", "/state")


def test_damaged_sessions_are_no_sessions(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    gateway.stop()
    for name in ("sessions.json", "sessions.json.bak"):
        (gateway.state / name).write_text('{"version": 1, "sessions": [{}]}')

    assert Browser(gateway.start().url).session["signedIn"] is True
    assert "Every browser has to sign in again." in gateway.log()


def test_a_new_token_ends_the_old_one_and_every_other_session(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    browser, other = Browser(gateway.url), Browser(gateway.url)
    old = token_of(gateway)
    for one in (browser, other):
        one.sign_in(token=old)

    done = browser.call("POST", "/session/rotate-token", {})

    assert done.json["sessionsEnded"] == 1
    assert done.json["token"] == token_of(gateway) != old
    assert stat.S_IMODE((gateway.state / "admin-token").stat().st_mode) == 0o600
    assert (browser.session["via"], other.session["via"]) == ("token", "loopback")
    refused(Browser(gateway.url).sign_in(token=old), 401, "bad_token")
    assert gateway.azt("accounts", "export", "--all", "-o", "-").returncode == 0
    assert old not in gateway.log()
    assert done.json["token"] not in gateway.log()


def test_an_ended_session_ends_the_events_that_it_watches(running: Gateway) -> None:
    browser, other = Browser(running.url), Browser(running.url)
    for one in (browser, other):
        one.sign_in(token=token_of(running))
    streams = [
        one.open("GET", ADMIN + "/events", headers={"Cookie": one.cookie})
        for one in (browser, other)
    ]
    for stream in streams:
        stream.read_until(b"event: hello")

    browser.call("DELETE", "/session")

    assert streams[0].read_rest().body.endswith(b'event: bye\ndata: {"reason":"session_ended"}\n\n')
    for stream in streams:
        stream.close()


def test_a_session_may_watch_eight_times(running: Gateway) -> None:
    browser, other = Browser(running.url), Browser(running.url)
    for one in (browser, other):
        one.sign_in(token=token_of(running))

    def watch(who: Browser) -> Stream:
        stream = who.open("GET", ADMIN + "/events", headers={"Cookie": who.cookie})
        stream.read_until(b"event: hello")
        return stream

    elsewhere, *streams = [watch(other), *(watch(browser) for _ in range(9))]

    assert streams[0].read_rest().body.endswith(b'data: {"reason":"too_many"}\n\n')
    for stream in (elsewhere, *streams):
        stream.close()


# -- Asking for the token on this machine ---------------------------------------------------------


def test_this_machine_signs_in_when_the_owner_wants_that(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    change(gateway, tokenOnLoopback=True)
    browser = Browser(gateway.url)

    assert browser.session == {
        "signedIn": False,
        "scope": "local",
        "methods": ["token", "pair"],
        "lan": {"consoleOn": False},
    }
    refused(browser.call("GET", "/state"), 401, "not_signed_in")
    refused(browser.call("GET", "/sessions"), 401, "not_signed_in")
    assert browser.chat().message["content"] == "You said: hi"
    assert gateway.azt("status").returncode == 0
    assert browser.sign_in(code=code_for(gateway, **{"for": "open"})["code"]).status == 204
    assert browser.call("GET", "/state").status == 200


# -- Other devices --------------------------------------------------------------------------------


def test_other_devices_have_no_console_until_it_is_on(running: Gateway) -> None:
    phone = Browser(running.url, **RELAYED)

    refused(phone.call("GET", "/session"), 403, "lan_console_off")
    refused(phone.sign_in(token=token_of(running)), 403, "lan_console_off")
    refused(phone.call("GET", "/state"), 403, "lan_console_off")
    assert phone.get("/", headers=RELAYED).status == 403


def test_pairing_lets_another_device_in_with_fewer_rights(console: Gateway) -> None:
    phone = Browser(console.url, **RELAYED, **{"User-Agent": IPHONE})
    shown = phone.session
    assert (shown["signedIn"], shown["scope"]) == (False, "lan")
    refused(phone.call("GET", "/state"), 401, "not_signed_in")
    made = code_for(console, address="192.168.1.20")
    assert re.fullmatch(
        r"http://192\.168\.1\.20:\d+/#/pair/[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}",
        made["url"],
    )

    assert phone.sign_in(code=made["code"].lower()).status == 204

    session = phone.session
    assert (session["via"], session["scope"]) == ("pair", "lan")
    assert session["can"] == {"write": True, "export": False, "codex": False}
    state = phone.call("GET", "/state", Host="192.168.1.20:8787")
    assert state.json["gateway"]["baseUrl"] == "http://192.168.1.20:8787/v1"
    assert phone.call("PATCH", "/settings", {"values": {"log.keepRows": 2000}}).status == 200
    assert phone.get("/", headers=RELAYED).status == 200


LOCAL = [
    ("POST", "/accounts/export", {"all": True}),
    ("POST", "/codex/takeover", {"dryRun": True}),
    ("POST", "/keys", {"name": "x"}),
    ("POST", "/session/pair", {"for": "open"}),
    ("POST", "/session/rotate-token", {}),
    ("GET", "/sessions", None),
    ("PATCH", "/settings", {"values": {"server.lanApi": True}}),
]


@pytest.mark.parametrize("how", ["token", "pair"])
@pytest.mark.parametrize(("method", "path", "body"), LOCAL)
def test_what_is_local_stays_here_whatever_another_device_shows(
    console: Gateway, how: str, method: str, path: str, body: Any
) -> None:
    phone = Browser(console.url, **RELAYED)
    code = code_for(console, address="192.168.1.20")["code"]
    shown = {"token": token_of(console)} if how == "token" else {"code": code}
    assert phone.sign_in(**shown).status == 204

    refused(phone.call(method, path, body, **console.proof()), 403, "local_only")


def test_session_of_another_device_ends_with_the_setting(console: Gateway) -> None:
    phone = Browser(console.url, **RELAYED)
    phone.sign_in(token=token_of(console))
    assert phone.call("GET", "/state").status == 200

    change(console, lanConsole=False)

    refused(phone.call("GET", "/state"), 403, "lan_console_off")


def test_code_of_azt_open_is_of_no_use_elsewhere(console: Gateway) -> None:
    made = code_for(console, **{"for": "open"})

    refused(Browser(console.url, **RELAYED).sign_in(code=made["code"]), 401, "pairing_expired")


@pytest.mark.parametrize("address", ["", "evil.example", "localhost", "127.0.0.1"])
def test_a_pairing_code_is_for_an_address_of_the_network(console: Gateway, address: str) -> None:
    answer = Client(console.url).post(
        ADMIN + "/session/pair", {"address": address}, headers=console.proof()
    )

    error = refused(answer, 400, "bad_field")
    assert error["params"]["field"] == "address"
    assert error["requestId"] == answer.headers["x-request-id"]


def test_no_pairing_while_the_console_is_off_elsewhere(running: Gateway) -> None:
    answer = Client(running.url).post(
        ADMIN + "/session/pair", {"address": "192.168.1.20"}, headers=running.proof()
    )

    refused(answer, 403, "lan_console_off")


# -- Guessing -------------------------------------------------------------------------------------


def test_five_wrong_codes_ban_an_address_and_nobody_else(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    change(gateway, lanConsole=True)
    made = code_for(gateway, address="192.168.1.20")
    phone = Browser(gateway.url, **RELAYED)
    begun = time.monotonic()

    for _ in range(azt.GUESSES_MAX):
        refused(phone.sign_in(code="0000-0000"), 401, "pairing_expired")
    spent = time.monotonic() - begun
    banned = phone.sign_in(code=made["code"])

    assert spent >= (azt.GUESSES_MAX - 1) * azt.GUESS_PAUSE_S
    error = refused(banned, 429, "slow_down")
    assert 1_700_000 < error["params"]["retryAfterMs"] <= 1_800_000
    assert int(banned.headers["retry-after"]) * 1000 == error["params"]["retryAfterMs"]
    assert Browser(gateway.url).sign_in(code=made["code"]).status == 204
    assert gateway.log().count("audit: a sign-in from 127.0.0.1 was refused") == azt.GUESSES_MAX


# -- azt open -------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The browser of this test: a program that notes what it was started with, and what it saw."""
    script, seen = tmp_path / "browser", tmp_path / "seen.json"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys, urllib.parse, urllib.request\n"
        "path = urllib.parse.urlsplit(sys.argv[1]).path\n"
        f"note = {{'arguments': sys.argv[1:], 'environment': dict(os.environ),\n"
        "        'mode': os.stat(path).st_mode & 0o777, 'page': open(path).read()}\n"
        f"open({str(seen)!r} + '.new', 'w').write(json.dumps(note))\n"
        f"os.rename({str(seen)!r} + '.new', {str(seen)!r})\n"
    )
    script.chmod(0o700)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    return seen


def code_in(note: Any, gateway: Gateway) -> str:
    found = re.search(rf'url={re.escape(gateway.url)}/#/open/([\w-]{{43}})"', note["page"])
    assert found, note["page"]
    return found[1]


def test_azt_open_hands_the_browser_a_file_and_no_process_its_code(
    new_gateway: NewGateway, seen: Path
) -> None:
    gateway = new_gateway()

    done = gateway.azt("open", env={**gateway.environment, "BROWSER": os.environ["BROWSER"]})

    assert done.returncode == 0, done.stderr
    note = json.loads(eventually(lambda: seen.exists() and seen.read_text()))
    file, code = gateway.state / "open.html", code_in(note, gateway)
    assert note["arguments"] == [file.as_uri()]
    assert note["mode"] == 0o600
    assert code not in done.stdout + done.stderr + json.dumps(note["environment"])
    browser = Browser(gateway.url)
    assert browser.sign_in(code=code).status == 204
    assert browser.session["via"] == "open"
    assert not file.exists()
    assert code not in gateway.log()


def test_azt_open_without_a_browser_says_what_to_do(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    bare = {**gateway.environment, "PATH": "/nonexistent", "BROWSER": ""}
    bare.pop("DISPLAY", None)

    told = gateway.azt("open", env=bare)
    shown = gateway.azt("open", "--json")

    assert told.returncode == shown.returncode == 0, told.stderr
    assert re.search(rf"{re.escape(gateway.url)}/#/open/[\w-]{{43}}", told.stdout)
    made = json.loads(shown.stdout)
    assert Browser(gateway.url).sign_in(code=made["code"]).status == 204


def test_azt_open_needs_a_gateway(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    gateway.stop()

    done = gateway.azt("open")

    assert done.returncode == 1
    assert "azt start" in done.stderr


def test_a_page_that_nobody_opened_is_gone_after_a_restart(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    code_for(gateway, **{"for": "open"})
    assert (gateway.state / "open.html").exists()

    gateway.stop()

    assert not (gateway.state / "open.html").exists()


@pytest.mark.parametrize("arguments", [[], ["--no-open"]], ids=["open", "no-open"])
def test_azt_start_at_a_terminal_opens_the_browser(
    new_gateway: NewGateway, seen: Path, arguments: list[str]
) -> None:
    gateway = new_gateway()
    gateway.stop()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "azt", "start", "--host", "127.0.0.1", "--port", "0", *arguments],
        env={**gateway.environment, "BROWSER": os.environ["BROWSER"]},
        cwd=gateway.home,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    try:
        said = b""
        while not (ready := re.search(rf"{READY}(http://\S+)\r?\n".encode(), said)):
            said += os.read(ours, 4096)
        gateway.url = ready[1].decode()
        if arguments:
            assert Client(gateway.url).get("/_gateway/health").status == 200
            assert not (gateway.state / "open.html").exists()
        else:
            note = json.loads(eventually(lambda: seen.exists() and seen.read_text()))
            assert Browser(gateway.url).sign_in(code=code_in(note, gateway)).status == 204
            assert b"#/open/" not in said
    finally:
        process.terminate()
        assert process.wait(10) == 0
        os.close(ours)
        os.close(theirs)
    assert seen.exists() is not bool(arguments)


# -- Other users of this machine ------------------------------------------------------------------

AS_NOBODY = """
import encodings.idna, http.client, json, os, sys
if sys.argv[2] != "root": os.setuid(65534)
results = []
for method, path in json.loads(sys.argv[3]):
    connection = http.client.HTTPConnection(sys.argv[1], timeout=20)
    headers = {"X-AZT-Admin": "1", "Content-Type": "application/json", **json.loads(sys.argv[4])}
    connection.request(method, path, b"{}" if method != "GET" else None, headers)
    results.append(connection.getresponse().status)
print(json.dumps(results))
"""


def as_user(gateway: Gateway, who: str, calls: list[tuple[str, str]], **headers: str) -> list[int]:
    host = gateway.url.removeprefix("http://")
    arguments = [host, who, json.dumps(calls), json.dumps(headers)]
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, *arguments], stdout=subprocess.PIPE)
    statuses: list[int] = json.loads(done.stdout)
    return statuses


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_of_this_machine_has_the_api_and_not_the_administration(
    running: Gateway,
) -> None:
    open_to_all = [("GET", "/v1/models"), ("GET", "/_gateway/health")]
    own = [
        ("GET", "/metrics"),
        ("GET", "/"),
        ("GET", ADMIN + "/session"),
        ("GET", ADMIN + "/state"),
    ]
    changes = [("POST", ADMIN + "/accounts/export"), ("POST", ADMIN + "/models/refresh")]

    seen = as_user(running, "nobody", open_to_all + own + changes, **running.proof())

    assert seen == [200] * len(open_to_all) + [403] * len(own + changes)
    assert as_user(running, "root", open_to_all + own) == [200] * len(open_to_all + own)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_is_not_exempt_from_keys(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    assert gateway.azt("keys", "add", "phone").returncode == 0
    assert gateway.azt("settings", "set", "apiKeys.loopbackExempt", "true").returncode == 0

    calls = [("GET", "/v1/models")]

    assert as_user(gateway, "root", calls) == [200]
    assert as_user(gateway, "nobody", calls) == [401]


# -- The network ----------------------------------------------------------------------------------


def own_ipv4() -> str:
    found = [own.ip for _, own in azt.own_interfaces() if own.version == 4]
    return next((str(ip) for ip in found if not ip.is_loopback), "")


def test_the_interfaces_of_this_machine_are_found() -> None:
    found = {str(own.ip): (name, own.network) for name, own in azt.own_interfaces()}

    assert found["127.0.0.1"][0].startswith("lo")
    assert found["127.0.0.1"][1].prefixlen == 8


@pytest.mark.skipif(not own_ipv4(), reason="this machine has no address but loopback")
def test_on_one_address_the_commands_and_the_console_of_this_machine_work_too(
    new_gateway: NewGateway,
) -> None:
    address = own_ipv4()
    gateway = new_gateway(arguments=("--host", address, "--port", "0"))
    port = gateway.url.rpartition(":")[2]

    assert gateway.url == f"http://127.0.0.1:{port}"
    state = Client(gateway.url).get(ADMIN + "/state").json["gateway"]
    assert state["listen"] == [f"{address}:{port}", f"127.0.0.1:{port}"]
    assert gateway.azt("status").returncode == 0
    assert Client(f"http://{address}:{port}").get("/_gateway/health").status == 200
    share = Client(gateway.url).get(ADMIN + "/share").json
    (shown,) = share["addresses"]
    assert (shown["host"], shown["baseUrl"]) == (address, f"http://{address}:{port}/v1")


def test_addresses_for_other_devices_are_shown(new_gateway: NewGateway) -> None:
    gateway = new_gateway(arguments=("--host", "0.0.0.0", "--port", "0"))
    port = gateway.url.rpartition(":")[2]

    share = Client(gateway.url).get(ADMIN + "/share").json

    assert {name: share[name] for name in ("lanApi", "lanConsole", "tls")} == {
        "lanApi": True,
        "lanConsole": False,
        "tls": False,
    }
    assert share["listen"][0] == f"0.0.0.0:{port}"
    hosts = {one["host"] for one in share["addresses"]}
    assert hosts == {own_ipv4()} - {""} or own_ipv4() in hosts
    for one in share["addresses"]:
        assert one["consoleUrl"] == f"http://{one['host']}:{port}/"
        assert one["codexBaseUrl"] == f"http://{one['host']}:{port}/codex/v1"


def test_on_this_machine_only_there_is_nothing_to_share(running: Gateway) -> None:
    assert Client(running.url).get(ADMIN + "/share").json["addresses"] == []


@pytest.mark.skipif(not own_ipv4(), reason="this machine has no address but loopback")
def test_other_devices_see_how_to_turn_the_console_on_and_then_the_console(
    new_gateway: NewGateway,
) -> None:
    gateway = new_gateway(arguments=("--host", "0.0.0.0", "--port", "0"))
    device = Client(f"http://{own_ipv4()}:{gateway.url.rpartition(':')[2]}")
    script = re.findall(r'src="([^"]+)"', Client(gateway.url).get("/").body.decode())[0]

    told, asset = device.get("/"), device.get("/" + script.lstrip("/"))
    if told.status == 200:  # 403 where the address is a public one
        assert b"server.lanConsole" in told.body
        assert "default-src 'none'" in told.headers["content-security-policy"]
    refused(asset, 403, "lan_console_off")
    change(gateway, lanConsole=True)

    if told.status == 200:
        assert device.get("/").body == Client(gateway.url).get("/").body != told.body
        assert device.get("/" + script.lstrip("/")).status == 200


def test_a_network_of_ones_own_is_near_and_a_providers_is_not() -> None:
    gateway = azt.Gateway(azt.read_environment({"HOME": "/nonexistent"}), {})
    wide, narrow, six = (
        azt.ipaddress.ip_interface(text)
        for text in ("8.0.0.1/8", "198.51.100.7/24", "2001:db8::1/64")
    )
    gateway.interfaces = [("a", wide), ("b", narrow), ("c", six)]

    own = azt.policy_source(gateway)().own_networks

    assert own == (narrow.network, six.network)
    assert azt.peer_place("198.51.100.99", own) == "lan"
    assert azt.peer_place("8.8.8.8", own) == "public"
