"""Signing in and out: through the administration, with the scripted issuer and without a browser.

The callback ports are the two that the real issuer knows, so these tests take turns (`ports`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import CHALLENGE_PAGE, DEVICE, FakeUpstream, Json, account_file, challenge_of
from harness import Answer, Client, Gateway, make_gateway
from hypothesis import given
from hypothesis import strategies as st

import azt

ADMIN = "/_gateway/admin"
MARK = {"X-AZT-Admin": "1"}
BO = ("acct-2", "user-2", "bo@example.com", "pro")


# -- Set-up ---------------------------------------------------------------------------------------


class Admin(Client):
    """Calls below the administration."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.started: list[str] = []

    def call(self, method: str, path: str, json: Any = None) -> Answer:
        return self.request(method, ADMIN + path, json, headers=MARK)

    def login(self, **body: Any) -> Json:
        """Start a sign-in."""
        done = self.call("POST", "/login", body)
        assert done.status == 201, done.body
        assert done.headers["cache-control"] == "no-store"
        self.started.append(done.json["flowId"])
        return dict(done.json)

    def opened(self, **body: Any) -> Json:
        """Start a sign-in and follow its link: the port is open."""
        flow = self.call("POST", f"/login/{self.login(**body)['flowId']}/open", {}).json
        assert flow["listening"] is True, flow
        return dict(flow)

    def paste(self, flow: Json, url: str) -> Answer:
        return self.call("POST", f"/login/{flow['flowId']}/callback", {"url": url})

    def flow(self, flow: Json) -> Json:
        return dict(self.call("GET", f"/login/{flow['flowId']}").json)

    def ended(self, flow: Json, timeout: float = 10.0) -> Json:
        """The sign-in once nothing more happens to it."""
        until = time.monotonic() + timeout
        while (now := self.flow(flow))["status"] in ("waiting", "exchanging"):
            assert time.monotonic() < until, now
            time.sleep(0.02)
        return now

    def accounts(self) -> list[Json]:
        return list(self.call("GET", "/accounts").json["items"])


@pytest.fixture(scope="module")
def running(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path_factory.mktemp("sign-in"), shared_upstream, accounts=[])
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def admin(running: Gateway, upstream: FakeUpstream, ports: None) -> Iterator[Admin]:
    """A gateway without accounts and without a sign-in under way."""
    made = Admin(running.url)
    if ids := [one["id"] for one in made.accounts()]:
        assert made.call("POST", "/accounts/remove", {"ids": ids}).status == 200
    yield made
    for flow in made.started:
        made.call("DELETE", f"/login/{flow}")


@contextlib.contextmanager
def holding(*wanted: int) -> Iterator[None]:
    """Another program has these ports."""
    with contextlib.ExitStack() as stack:
        for port in wanted:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


def state_of(flow: Json) -> str:
    query = urllib.parse.urlsplit(flow["authorizeUrl"]).query
    return dict(urllib.parse.parse_qsl(query))["state"]


def port_of(flow: Json) -> int:
    return int(urllib.parse.urlsplit(flow["redirectUri"]).port or 0)


def visit(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> Answer:
    """Go to a callback address as a browser does."""
    where = urllib.parse.urlsplit(url)
    target = f"{where.path}?{where.query}" if where.query else where.path
    client = Client(f"http://{where.hostname}:{where.port}")
    return client.request(method, target, headers=headers)


def is_refused(port: int) -> bool:
    for host in ("127.0.0.1", "::1"):
        try:
            socket.create_connection((host, port), 2).close()
            return False
        except ConnectionRefusedError:
            continue
        except OSError as error:
            assert error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT), error
    return True


# -- The browser's way ----------------------------------------------------------------------------


def test_the_link_is_what_the_issuer_wants_and_binds_nothing(admin: Admin) -> None:
    flow = admin.login(method="browser", accountId=None)

    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(flow["authorizeUrl"]).query))
    assert (flow["status"], flow["portFree"], flow["listening"]) == ("waiting", True, False)
    assert flow["redirectUri"] == query["redirect_uri"] == "http://localhost:1455/auth/callback"
    assert 590_000 < flow["expiresAt"] - time.time() * 1000 <= 600_000
    assert query["scope"] == "openid profile email offline_access"
    assert query["originator"] == "azt"
    assert len(query["state"]) == 43  # 256 bits
    assert "verifier" not in flow["authorizeUrl"]
    assert is_refused(1455)


def test_a_sign_in_adds_an_account_that_serves(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]))

    done = admin.flow(flow)
    assert (page.status, done["status"], done["created"]) == (200, "done", True)
    assert done["account"]["email"] == "ada@example.com"
    assert done["account"]["active"] is True
    assert "authorizeUrl" not in done
    assert admin.chat(model="gpt-5.5").status == 200


def test_whoever_watches_is_told_of_each_step(admin: Admin, upstream: FakeUpstream) -> None:
    with admin.open("GET", f"{ADMIN}/events") as events:
        events.read_until(b"hello")
        flow = admin.opened()
        state = state_of(flow)
        visit(upstream.sign_in(flow["authorizeUrl"]))
        told = events.read_until(b'"created":true}')

    # The event ends there, or the view has grown: then this cannot be parsed.
    steps = [json.loads(line[6:]) for line in told.decode().split("\n") if '"flowId"' in line]
    assert [one["status"] for one in steps] == ["exchanging", "done"]
    assert {one["flowId"] for one in steps} == {flow["flowId"]}
    assert steps[1]["account"]["email"] == "ada@example.com"
    assert state.encode() not in told


def test_the_page_after_it_says_who_and_holds_no_secret(
    admin: Admin, upstream: FakeUpstream
) -> None:
    back = upstream.sign_in(admin.opened()["authorizeUrl"])

    page = visit(back)

    text, code = page.body.decode(), dict(urllib.parse.parse_qsl(back.partition("?")[2]))["code"]
    assert "Signed in" in text and "ada@example.com" in text
    assert code not in text and "eyJ" not in text and "rt_" not in text
    assert "<script" not in text and "://" not in text
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["x-frame-options"] == "DENY"


def test_the_exchange_proves_the_verifier(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.opened()

    visit(upstream.sign_in(flow["authorizeUrl"]))

    (sent,) = [seen.body for seen in upstream.requests if seen.path == "/oauth/token"]
    assert len(sent["code_verifier"]) == 86
    assert challenge_of(sent["code_verifier"]) in flow["authorizeUrl"]
    assert sent["code_verifier"] != state_of(flow)
    assert sent["redirect_uri"] == flow["redirectUri"]


@pytest.mark.parametrize("how", ["done", "denied", "cancelled"])
def test_the_port_is_closed_after_the_end(admin: Admin, upstream: FakeUpstream, how: str) -> None:
    flow = admin.opened()
    assert not is_refused(1455)

    if how == "done":
        visit(upstream.sign_in(flow["authorizeUrl"]))
    elif how == "denied":
        visit(f"{flow['redirectUri']}?state={state_of(flow)}&error=access_denied")
    else:
        assert admin.call("DELETE", f"/login/{flow['flowId']}").status == 204

    assert is_refused(1455)
    assert admin.flow(flow)["status"] == ("failed" if how == "denied" else how)


def test_a_wrong_state_never_ends_a_sign_in(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.opened()

    for number in range(100):
        forged = [f"state=forged{number}", "", "state=", "error=access_denied&error_description=x"]
        page = visit(f"{flow['redirectUri']}?code=x&{forged[number % 4]}")
        assert page.status == 400
        assert "Not signed in" in page.body.decode()

    assert admin.flow(flow)["status"] == "waiting"
    assert [seen for seen in upstream.requests if seen.path == "/oauth/token"] == []
    assert visit(upstream.sign_in(flow["authorizeUrl"])).status == 200
    assert admin.flow(flow)["status"] == "done"


def test_a_code_is_used_once(admin: Admin, upstream: FakeUpstream) -> None:
    first, second = admin.opened(), admin.opened()
    back = upstream.sign_in(first["authorizeUrl"])

    pages = [visit(back), visit(back)]

    assert [page.status for page in pages] == [200, 400]
    assert len([seen for seen in upstream.requests if seen.path == "/oauth/token"]) == 1
    assert admin.flow(second)["status"] == "waiting"


def test_a_replay_during_the_exchange_changes_nothing(admin: Admin, upstream: FakeUpstream) -> None:
    upstream.script(path="/oauth/token", json=upstream._token, delay=0.5)
    flow = admin.opened()
    back = upstream.sign_in(flow["authorizeUrl"])

    pages: list[Answer] = []
    first = threading.Thread(target=lambda: pages.append(visit(back)))
    first.start()
    upstream.wait_until(lambda: [one for one in upstream.requests if one.path == "/oauth/token"])
    replay = visit(back)
    assert admin.call("DELETE", f"/login/{flow['flowId']}").status == 204  # too late to stop it
    first.join()

    assert (replay.status, pages[0].status) == (400, 200)
    assert admin.flow(flow)["status"] == "done"


def test_a_browser_that_leaves_does_not_lose_the_code(admin: Admin, upstream: FakeUpstream) -> None:
    upstream.script(path="/oauth/token", json=upstream._token, delay=0.3)
    flow = admin.opened()
    where = urllib.parse.urlsplit(upstream.sign_in(flow["authorizeUrl"]))

    connection = Client("http://localhost:1455").connect()
    connection.request("GET", f"{where.path}?{where.query}")
    upstream.wait_until(lambda: [one for one in upstream.requests if one.path == "/oauth/token"])
    connection.close()

    assert admin.ended(flow)["status"] == "done"


def test_two_sign_ins_at_once_share_the_port(admin: Admin, upstream: FakeUpstream) -> None:
    first, second = admin.opened(), admin.opened()
    assert port_of(first) == port_of(second) == 1455

    visit(upstream.sign_in(second["authorizeUrl"]))
    between = (admin.flow(first)["status"], admin.flow(second)["status"], is_refused(1455))
    upstream.person = BO
    visit(upstream.sign_in(first["authorizeUrl"]))

    assert between == ("waiting", "done", False)
    assert is_refused(1455)
    emails = {one["email"]: one["active"] for one in admin.accounts()}
    assert emails == {"ada@example.com": True, "bo@example.com": False}


def test_many_sign_ins_forget_the_oldest(admin: Admin) -> None:
    first, *_, last = [admin.login() for _ in range(azt.LOGINS_MAX + 1)]

    gone = admin.call("GET", f"/login/{first['flowId']}")

    assert (gone.status, gone.error["code"]) == (404, "flow_not_found")
    assert admin.flow(last)["status"] == "waiting"


def test_the_second_port_is_used_when_the_first_is_taken(
    admin: Admin, upstream: FakeUpstream
) -> None:
    with holding(1455):
        flow = admin.opened()
        visit(upstream.sign_in(flow["authorizeUrl"]))

        assert (port_of(flow), flow["portFree"]) == (1457, True)
        assert admin.flow(flow)["status"] == "done"
        assert is_refused(1457)


def test_with_both_ports_taken_the_address_is_pasted(admin: Admin, upstream: FakeUpstream) -> None:
    with holding(1455, 1457):
        flow = admin.login()
        opened = admin.call("POST", f"/login/{flow['flowId']}/open", {}).json
        back = upstream.sign_in(flow["authorizeUrl"])

        done = admin.paste(flow, back)

    assert flow["portFree"] is False
    assert (opened["listening"], opened["listenError"]) == (False, "port_in_use")
    assert (done.status, done.json["status"]) == (200, "done")


def test_a_port_taken_after_the_link_was_made_is_said(admin: Admin) -> None:
    flow = admin.login()
    with holding(1455):
        opened = admin.call("POST", f"/login/{flow['flowId']}/open", {}).json

    assert (opened["listening"], opened["listenError"]) == (False, "port_in_use")
    assert admin.call("POST", f"/login/{flow['flowId']}/open", {}).json["listening"] is True


def test_two_links_followed_at_once_are_both_listened_for(admin: Admin) -> None:
    flows = [admin.login(), admin.login()]
    opened: list[Json] = []

    def follow(flow: Json) -> None:
        opened.append(admin.call("POST", f"/login/{flow['flowId']}/open", {}).json)

    threads = [threading.Thread(target=follow, args=(flow,)) for flow in flows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [(flow["listening"], flow.get("listenError")) for flow in opened] == [(True, None)] * 2


def test_a_gateway_that_stops_waits_for_no_sign_in(
    new_gateway: Callable[..., Gateway], ports: None
) -> None:
    gateway = new_gateway(accounts=[])
    Admin(gateway.url).opened()
    begun = time.monotonic()

    assert gateway.stop() == 0
    assert time.monotonic() - begun < 5
    assert is_refused(1455)


# -- What is refused at the callback port ---------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example:1455", "localhost", "localhost:8787", "127.0.0.1:1457", "[::1]:1455", "x:1455"],
)
def test_the_callback_answers_under_its_own_address_only(
    admin: Admin, upstream: FakeUpstream, host: str
) -> None:
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]), {"Host": host})

    assert page.status == 403
    assert admin.flow(flow)["status"] == "waiting"


CROSS: dict[str, str] = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {**CROSS, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {**CROSS, "Sec-Fetch-Dest": "iframe"},
        {"X-Forwarded-For": "203.0.113.9"},
    ],
)
def test_no_page_but_a_navigation_reaches_the_callback(
    admin: Admin, upstream: FakeUpstream, headers: dict[str, str]
) -> None:
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]), headers)

    assert page.status == 403
    assert admin.flow(flow)["status"] == "waiting"


def test_the_redirect_of_the_issuer_is_a_navigation(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]), {**CROSS, "Sec-Fetch-Dest": "document"})

    assert (page.status, admin.flow(flow)["status"]) == (200, "done")


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_the_callback_takes_nothing_but_get(
    admin: Admin, upstream: FakeUpstream, method: str
) -> None:
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]), method=method)

    assert page.status in (204, 404, 405)
    assert admin.flow(flow)["status"] == "waiting"


@pytest.mark.parametrize(
    "path",
    [*("/", "/cancel", "/success", "/v1/models", "/_gateway/health", "/auth/callback/x")]
    + [f"{ADMIN}/state", "/v1/auth/callback", "//auth/callback", "/auth/callback/"],
)
def test_the_callback_port_has_one_path(admin: Admin, path: str) -> None:
    flow = admin.opened()

    page = visit(f"http://localhost:1455{path}?state={state_of(flow)}&code=x")

    assert page.status == 404
    assert admin.flow(flow)["status"] == "waiting"


HOSTILE = {
    "long code": "code=" + "a" * 20_000 + "&state={state}",
    "code with a break": "code=a%0d%0ab&state={state}",
    "no code": "state={state}",
    "empty code": "code=&state={state}",
    "two states": "code=x&state={state}&state=forged",
    "control bytes": "code=%00&state={state}",
    "not unicode": "code=%ff%fe&state={state}",
    "state in capitals": "code=x&STATE={state}",
    "state with a tail": "code=x&state={state}%00",
    "state beyond ASCII": "code=x&state=%C3%A4",
    "many parameters": "state={state}&" + "&".join(f"code{n}=x" for n in range(99)),
}


@pytest.mark.parametrize("query", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_callback_changes_nothing(
    admin: Admin, upstream: FakeUpstream, query: str
) -> None:
    flow = admin.opened()

    page = visit(f"{flow['redirectUri']}?{query.format(state=state_of(flow))}")

    assert page.status == 400
    assert admin.flow(flow)["status"] == "waiting"
    assert [seen for seen in upstream.requests if seen.path == "/oauth/token"] == []


def test_what_the_issuer_says_is_text_on_the_page(admin: Admin) -> None:
    flow = admin.opened()
    said = urllib.parse.quote("<script>alert(1)</script> Bearer abcdef rt_0123456789\x1b[2J")

    page = visit(
        f"{flow['redirectUri']}?state={state_of(flow)}&error=server_error&error_description={said}"
    )

    text = page.body.decode()
    assert "&lt;script&gt;" in text and "<script" not in text
    assert "abcdef" not in text and "0123456789" not in text and "\x1b" not in text
    assert admin.flow(flow)["error"]["code"] == "denied"


def test_the_network_cannot_reach_the_callback(admin: Admin) -> None:
    admin.opened()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]

    with pytest.raises(OSError):
        socket.create_connection((address, 1455), 2)


# -- What the issuer refuses ----------------------------------------------------------------------


def test_a_refusal_of_the_person_ends_it(admin: Admin) -> None:
    flow = admin.opened()

    page = visit(f"{flow['redirectUri']}?state={state_of(flow)}&error=access_denied")

    assert (page.status, "access_denied" in page.body.decode()) == (200, True)
    assert admin.flow(flow)["error"]["code"] == "denied"


def test_a_workspace_without_codex_is_explained(admin: Admin) -> None:
    flow = admin.opened()
    why = "error=access_denied&error_description=Missing_Codex_Entitlement"

    visit(f"{flow['redirectUri']}?state={state_of(flow)}&{why}")

    assert "administrator" in admin.flow(flow)["error"]["message"]


REFUSALS: dict[str, dict[str, Any]] = {
    "string error": {"status": 400, "json": {"error": "invalid_grant"}},
    "object error": {"status": 400, "json": {"error": {"code": "token_exchange_user_error"}}},
    "challenge page": {"status": 403, "body": CHALLENGE_PAGE},
    "server error": {"status": 500, "body": b"oops"},
    "torn JSON": {"body": b'{"access_token": "'},
    "no refresh token": {"json": {"access_token": account_file()["access_token"]}},
    "no account": {"json": {"access_token": "a", "refresh_token": "r"}},
    "error in 200": {"json": {"error": "slow"}},
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
def test_an_exchange_that_fails_adds_nobody(
    admin: Admin, upstream: FakeUpstream, answer: dict[str, Any]
) -> None:
    upstream.script(path="/oauth/token", **answer)
    flow = admin.opened()

    page = visit(upstream.sign_in(flow["authorizeUrl"]))

    assert "Not signed in" in page.body.decode()
    assert admin.flow(flow)["error"]["code"] == "exchange_failed"
    assert admin.accounts() == []
    assert is_refused(1455)


def test_a_code_given_out_for_somebody_else_is_worth_nothing(
    admin: Admin, upstream: FakeUpstream
) -> None:
    ours, other = admin.opened(), admin.login()
    code = upstream.sign_in(other["authorizeUrl"]).partition("code=")[2].partition("&")[0]

    visit(f"{ours['redirectUri']}?state={state_of(ours)}&code={code}")

    assert admin.flow(ours)["error"]["code"] == "exchange_failed"
    assert admin.accounts() == []


def test_a_lost_answer_of_the_exchange_is_a_network_error(
    admin: Admin, upstream: FakeUpstream
) -> None:
    upstream.script(path="/oauth/token", json=upstream._token, reset_after=0)
    flow = admin.opened()

    visit(upstream.sign_in(flow["authorizeUrl"]))

    assert admin.flow(flow)["error"]["code"] == "network"
    assert len([seen for seen in upstream.requests if seen.path == "/oauth/token"]) == 1


# -- Pasting --------------------------------------------------------------------------------------


PASTED = {
    "address": "{uri}?code={code}&scope=openid&state={state}",
    "address with a fragment": "{uri}?code={code}&state={state}#top",
    "address in a mail": " <{uri}?code={code}&\n  state={state}>\n",
    "query": "code={code}&state={state}",
    "query with a mark": "?code={code}&state={state}",
    "code and state": "{code}#{state}",
    "bare code": "{code}",
}


@pytest.mark.parametrize("shape", PASTED.values(), ids=PASTED)
def test_every_shape_of_an_answer_can_be_pasted(
    admin: Admin, upstream: FakeUpstream, shape: str
) -> None:
    flow = admin.login()
    said = dict(urllib.parse.parse_qsl(upstream.sign_in(flow["authorizeUrl"]).partition("?")[2]))

    done = admin.paste(flow, shape.format(uri=flow["redirectUri"], **said))

    assert (done.status, done.json["status"]) == (200, "done")


@pytest.mark.parametrize(
    "pasted, code",
    [
        ("http://localhost:1455/auth/callback?code=x&state=forged", "state_mismatch"),
        ("x#forged", "state_mismatch"),
        ("error=access_denied", "state_mismatch"),
        ("code=x&scope=openid", "state_mismatch"),
        ("", "bad_callback_url"),
        ("hello\x00there", "bad_callback_url"),
        (5, "bad_callback_url"),
    ],
)
def test_what_cannot_be_the_answer_changes_nothing(admin: Admin, pasted: Any, code: str) -> None:
    flow = admin.login()

    refused = admin.paste(flow, pasted)

    assert (refused.status, refused.error["code"]) == (400, code)
    assert admin.flow(flow)["status"] == "waiting"


def test_nothing_can_be_pasted_after_the_end(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.login()
    back = upstream.sign_in(flow["authorizeUrl"])
    assert admin.paste(flow, back).json["status"] == "done"

    refused = admin.paste(flow, back)

    assert (refused.status, refused.error["code"]) == (410, "flow_expired")


@given(st.text() | st.text("#?&=code \ud800%/:state", max_size=30))
def test_whatever_is_pasted_is_no_surprise(text: str) -> None:
    async def paste() -> None:
        login = azt.Login(None, asyncio.get_running_loop().create_future(), port=1455)
        said = azt.read_callback(text)
        assert all(isinstance(one, str) for pair in said.items() for one in pair)
        with contextlib.suppress(azt.AztError):
            azt.finish_login([login], {**said, "state": said.get("state", "x")}, pasted=True)
        assert not login.code.done()

    asyncio.run(paste())


def test_the_answer_of_another_sign_in_is_refused(admin: Admin, upstream: FakeUpstream) -> None:
    flow, other = admin.login(), admin.login()

    refused = admin.paste(flow, upstream.sign_in(other["authorizeUrl"]))

    assert (refused.status, refused.error["code"]) == (400, "state_mismatch")
    assert [admin.flow(one)["status"] for one in (flow, other)] == ["waiting", "waiting"]


# -- Signing in again -----------------------------------------------------------------------------


def test_signing_in_again_makes_a_rejected_account_usable(
    admin: Admin, upstream: FakeUpstream
) -> None:
    visit(upstream.sign_in(admin.opened()["authorizeUrl"]))
    (account,) = admin.accounts()
    upstream.revoke("acct-1")
    assert admin.chat().status == 401
    assert admin.accounts()[0]["status"] == "login_rejected"
    upstream.revoked.clear()

    flow = admin.opened(accountId=account["id"])
    visit(upstream.sign_in(flow["authorizeUrl"]))

    done = admin.flow(flow)
    assert (done["status"], done["created"]) == ("done", False)
    assert done["account"]["id"] == account["id"]
    assert done["account"]["status"] in ("ready", "unknown")  # its quota was not read yet
    assert admin.chat().status == 200


def test_another_account_than_asked_for_is_kept_only_on_wish(
    admin: Admin, upstream: FakeUpstream
) -> None:
    visit(upstream.sign_in(admin.opened()["authorizeUrl"]))
    (ada,) = admin.accounts()
    upstream.person = BO

    flow = admin.opened(accountId="ada@example.com")
    page = visit(upstream.sign_in(flow["authorizeUrl"]))
    refused, before = admin.flow(flow), admin.accounts()
    kept = admin.call("POST", f"/login/{flow['flowId']}/callback", {"keep": True}).json

    assert "Not signed in" in page.body.decode()
    assert (refused["status"], refused["error"]["code"]) == ("failed", "account_mismatch")
    assert refused["account"]["email"] == "bo@example.com"
    assert [one["id"] for one in before] == [ada["id"]]
    assert (kept["status"], kept["created"], kept["account"]["active"]) == ("done", True, False)
    assert len(admin.accounts()) == 2


def test_nothing_is_kept_of_a_sign_in_that_waits(admin: Admin) -> None:
    flow = admin.login()

    refused = admin.call("POST", f"/login/{flow['flowId']}/callback", {"keep": True})

    assert (refused.status, refused.error["code"]) == (400, "bad_callback_url")
    assert admin.flow(flow)["status"] == "waiting"


@pytest.mark.parametrize(
    "body, status, code",
    [
        ({"method": "telepathy"}, 400, "bad_field"),
        ({"method": ["browser"]}, 400, "bad_field"),
        ({"accountId": "nobody"}, 404, "account_not_found"),
    ],
)
def test_a_sign_in_that_makes_no_sense_is_refused(
    admin: Admin, body: Json, status: int, code: str
) -> None:
    refused = admin.call("POST", "/login", body)

    assert (refused.status, refused.error["code"]) == (status, code)


# -- A device -------------------------------------------------------------------------------------


def test_a_device_signs_in_with_a_code(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.login(method="device")
    upstream.enter(flow["userCode"])

    done = admin.ended(flow)

    assert re.fullmatch(r"ABCD-\d{5}", flow["userCode"])
    assert flow["verificationUrl"] == f"{upstream.url}/codex/device"
    assert flow["intervalMs"] == 1000
    assert 890_000 < flow["expiresAt"] - time.time() * 1000 <= 900_000
    assert (done["status"], done["account"]["email"]) == ("done", "ada@example.com")
    assert is_refused(1455)


def test_the_interval_of_the_issuer_is_kept(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.login(method="device")

    polls = upstream.wait_until(
        lambda: (
            len(found := [one for one in upstream.requests if "/token" in one.path]) > 2 and found
        )
    )
    upstream.enter(flow["userCode"])

    assert admin.ended(flow)["status"] == "done"
    assert all(later.at - one.at > 0.95 for one, later in zip(polls, polls[1:], strict=False))


def test_slow_down_adds_five_seconds(admin: Admin, upstream: FakeUpstream) -> None:
    upstream.script(path=f"{DEVICE}/token", status=400, json={"error": "slow_down"})
    flow = admin.login(method="device")
    upstream.enter(flow["userCode"])

    assert admin.ended(flow, timeout=15)["status"] == "done"

    first, second = [one.at for one in upstream.requests if one.path == f"{DEVICE}/token"]
    assert 5.9 < second - first < 9


@pytest.mark.parametrize(
    "state, status, code",
    [("denied", "failed", "denied"), ("expired", "expired", None), ("used", "failed", None)],
)
def test_the_issuer_ends_the_wait(
    admin: Admin, upstream: FakeUpstream, state: str, status: str, code: str | None
) -> None:
    flow = admin.login(method="device")
    upstream.enter(flow["userCode"], state)

    ended = admin.ended(flow)

    assert ended["status"] == status
    assert code is None or ended["error"]["code"] == code
    assert admin.accounts() == []


def test_a_code_is_over_when_the_issuer_said_so(admin: Admin, upstream: FakeUpstream) -> None:
    upstream.device_answer = {"interval": "1", "expires_in": 1.5}
    flow = admin.login(method="device")

    assert admin.ended(flow)["status"] == "expired"


def test_trouble_on_the_way_does_not_end_the_wait(admin: Admin, upstream: FakeUpstream) -> None:
    upstream.script(path=f"{DEVICE}/token", reset_after=0, json={})
    upstream.script(path=f"{DEVICE}/token", status=502, body=b"<html>")
    flow = admin.login(method="device")
    upstream.enter(flow["userCode"])

    assert admin.ended(flow)["status"] == "done"


def test_a_device_that_gave_up_asks_no_more(admin: Admin, upstream: FakeUpstream) -> None:
    flow = admin.login(method="device")
    upstream.wait_until(lambda: [one for one in upstream.requests if "/token" in one.path])

    assert admin.call("DELETE", f"/login/{flow['flowId']}").status == 204
    asked = len(upstream.requests)
    time.sleep(1.3)

    assert admin.flow(flow)["status"] == "cancelled"
    assert len(upstream.requests) == asked


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 404, "json": {"detail": "Not Found"}},
        {"status": 500, "body": b"oops"},
        {"json": {"interval": "5"}},
        {"body": CHALLENGE_PAGE},
    ],
)
def test_an_issuer_without_device_codes_says_so(
    admin: Admin, upstream: FakeUpstream, answer: dict[str, Any]
) -> None:
    upstream.script(path=f"{DEVICE}/usercode", **answer)

    refused = admin.call("POST", "/login", {"method": "device"})

    assert (refused.status, refused.error["code"]) == (502, "device_not_enabled")


@pytest.mark.parametrize(
    "told, interval_ms",
    [({}, 5000), ({"interval": 7}, 7000), ({"interval": "nan"}, 1000), ({"interval": "x"}, 5000)]
    + [({"interval": "1e9"}, 60_000), ({"interval": "0"}, 1000), ({"interval": [1]}, 5000)],
)
def test_an_odd_interval_is_made_sense_of(
    admin: Admin, upstream: FakeUpstream, told: Json, interval_ms: int
) -> None:
    answer = {"device_auth_id": "dev_1", "usercode": "ABCD-1", **told}
    upstream.script(path=f"{DEVICE}/usercode", json=answer)

    flow = admin.login(method="device")

    assert (flow["userCode"], flow["intervalMs"]) == ("ABCD-1", interval_ms)


# -- Time -----------------------------------------------------------------------------------------


def test_a_sign_in_is_over_after_its_time(
    home: Path, upstream: FakeUpstream, ports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "LOGIN_LIFE_S", 0.05)
    for name, value in upstream.environment().items():
        monkeypatch.setenv(name, value)

    async def scenario() -> azt.Login:
        gateway = azt.Gateway(azt.read_environment(), {})
        login = await gateway.logins.start(False, None)
        assert login.task is not None
        await asyncio.wait({login.task})
        with pytest.raises(azt.AztError, match="does not belong") as caught:
            azt.finish_login([login], {"code": "x", "state": login.state})
        assert caught.value.code == "flow_expired"
        return login

    login = asyncio.run(scenario())

    assert login.status == "expired"
    assert (login.state, login.verifier) == ("", "")


# -- Signing out ----------------------------------------------------------------------------------


def test_signing_out_revokes_and_forgets(admin: Admin, upstream: FakeUpstream) -> None:
    visit(upstream.sign_in(admin.opened()["authorizeUrl"]))
    (account,) = admin.accounts()

    done = admin.call("POST", "/accounts/logout", {"id": account["id"]})

    assert (done.status, done.json["revoked"], done.json["activeId"]) == (200, True, None)
    assert upstream.revoked == {"acct-1"}
    assert admin.accounts() == []


@pytest.mark.parametrize("answer", [{"status": 500, "body": b""}, {"reset_after": 0, "json": {}}])
def test_an_account_is_forgotten_though_the_issuer_did_not_hear_it(
    admin: Admin, upstream: FakeUpstream, answer: dict[str, Any]
) -> None:
    visit(upstream.sign_in(admin.opened()["authorizeUrl"]))
    upstream.script(path="/oauth/revoke", **answer)

    done = admin.call("POST", "/accounts/logout", {"id": "ada@example.com"})

    assert (done.status, done.json["revoked"]) == (200, False)
    assert admin.accounts() == []


# -- Secrets --------------------------------------------------------------------------------------


def test_no_secret_is_in_the_log_or_an_answer(
    admin: Admin, running: Gateway, upstream: FakeUpstream
) -> None:
    flow, _other = admin.opened(), admin.opened()
    back = upstream.sign_in(flow["authorizeUrl"])
    answers = [visit(back), visit(back), admin.paste(admin.login(), back)]
    answers += [admin.call("GET", f"/login/{flow['flowId']}"), admin.call("GET", "/accounts")]

    (sent,) = [seen.body for seen in upstream.requests if seen.path == "/oauth/token"]
    saved = (running.state / "accounts.json").read_text()
    tokens = re.findall(r'"(?:access|refresh|id)_token": "(.+?)"', saved)
    assert len(tokens) == 3
    shown = running.log() + "".join(one.body.decode() for one in answers)
    for secret in (sent["code"], sent["code_verifier"], state_of(flow), *tokens):
        assert secret not in shown
    assert "@" not in running.log()
