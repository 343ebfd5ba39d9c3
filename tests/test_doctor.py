"""`azt doctor`, and what the administration does for it: the way out, the version, a restart, a
bundle to hand on."""

from __future__ import annotations

import io
import json
import re
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from fake_upstream import FakeUpstream, Json, account_file, text
from harness import Answer, Client, Gateway, chat_body, eventually
from loopback import Internet, Server, answer, hang, once, sized
from test_outbound import tls_for, tunnel

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
WHERE = ("--host", "127.0.0.1", "--port", "0")


class Owner(Client):
    """Calls of the owner, with proof."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.url)
        self.gateway = gateway

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        return self.request(method, ADMIN + path, body, headers=self.gateway.proof())

    def tested(self, body: Json | None = None) -> Json:
        """The result of a network test."""
        job = self.call("POST", "/network/test", body or {}).json["job"]

        def ended() -> Json | None:
            now: Json = self.call("GET", f"/jobs/{job['id']}").json
            return now if now["state"] != "running" else None

        done = eventually(ended, 30)
        assert (done["kind"], done["state"]) == ("network_test", "done")
        result: Json = done["result"]
        return result


@pytest.fixture
def gateway(new_gateway: NewGateway) -> Gateway:
    return new_gateway()


@pytest.fixture
def owner(gateway: Gateway) -> Owner:
    return Owner(gateway)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def internet(ca: trustme.CA, upstream: FakeUpstream) -> Iterator[Internet]:
    names = [name for name in azt.OUTBOUND if "*" not in name]
    with Internet(upstream.url, tls_for(ca.issue_cert(*names))) as made:
        yield made


@pytest.fixture
def abroad(home: Path, internet: Internet, ca: trustme.CA) -> Iterator[Gateway]:
    """A gateway that calls the real names, and reaches this machine only."""
    ca.cert_pem.write_to_path(str(home / "root.pem"))
    variables = {"HTTPS_PROXY": internet.url, "AZT_CA_FILE": str(home / "root.pem")}
    gateway = Gateway(home, variables, [*WHERE]).start()
    yield gateway
    gateway.stop()


# -- The way out ----------------------------------------------------------------------------------


def test_every_host_is_tried_step_by_step_through_the_proxy(
    abroad: Gateway, internet: Internet
) -> None:
    result = Owner(abroad).tested()

    assert result["via"] == "proxy"
    assert sorted(one["target"] for one in result["steps"]) == ["auth.openai.com", "chatgpt.com"]
    for step in result["steps"]:
        assert step["ok"] and step["status"] < 500
        assert all(step[stage] >= 0 for stage in ("dns", "connect", "tls", "http"))
    assert internet.called == {"auth.openai.com:443", "chatgpt.com:443"}


def test_no_credentials_are_sent_to_try_a_host(owner: Owner, upstream: FakeUpstream) -> None:
    steps = owner.tested()["steps"]

    [seen] = upstream.requests
    assert [one["target"] for one in steps] == ["127.0.0.1"]
    assert (seen.method, seen.path) == ("GET", "/robots.txt")
    assert not {"authorization", "cookie", "chatgpt-account-id"} & set(seen.headers)


FAULTS: dict[str, tuple[Any, str, str]] = {
    "nobody listens": (None, "connect", "proxy_failed"),
    "it refuses": (once(sized(b"", "407 Proxy Authentication Required")), "tls", "proxy_failed"),
    "it closes": (lambda peer: peer.read_request(), "tls", "proxy_failed"),
}


@pytest.mark.parametrize("script, stage, code", FAULTS.values(), ids=FAULTS)
def test_a_proxy_is_tried_before_it_is_saved(
    owner: Owner, script: Any, stage: str, code: str
) -> None:
    with Server(script or hang) as server:
        port = server.port if script else free_port()
        wish = {"enabled": True, "url": f"http://user:hidden@127.0.0.1:{port}", "noProxy": ""}
        result = owner.tested({"networkProxy": wish})

    [step] = result["steps"]
    assert (result["via"], step["ok"], step["code"]) == ("proxy", False, code)
    assert step["stage"] in (stage, "http")  # plain http has no TLS
    assert "hidden" not in json.dumps(result)
    assert owner.call("GET", "/settings").json["values"]["networkProxy"]["url"] == ""


def test_a_good_proxy_is_told_as_one(owner: Owner) -> None:
    with Server(tunnel) as proxy:
        wish = {"enabled": True, "url": proxy.url, "noProxy": "", "hasPassword": False}
        result = owner.tested({"networkProxy": wish})

    assert (result["via"], result["steps"][0]["ok"]) == ("proxy", True)


@pytest.mark.parametrize("wish", [[1], {"url": "ftp://x"}, {"urls": "http://x"}, {"enabled": 1}])
def test_a_proxy_that_is_none_is_refused_by_its_field(owner: Owner, wish: Any) -> None:
    assert owner.call("POST", "/network/test", {"networkProxy": wish}).status == 400


# -- The version ----------------------------------------------------------------------------------


@pytest.mark.parametrize("latest, newer", [("99.0", True), (azt.VERSION, False), ("0.0.9", False)])
def test_the_newest_version_is_asked_for_on_wish(
    abroad: Gateway, internet: Internet, upstream: FakeUpstream, latest: str, newer: bool
) -> None:
    upstream.script(path="/pypi/azt/json", json={"info": {"version": latest}})
    assert "pypi.org:443" not in internet.called

    told = Owner(abroad).call("POST", "/version/check", {}).json

    assert "pypi.org:443" in internet.called
    assert (told["current"], told["latest"], told["newer"]) == (azt.VERSION, latest, newer)
    assert abs(told["checkedAt"] / 1000 - time.time()) < 3600


@pytest.mark.parametrize("how", [{"status": 404, "json": {}}, {"json": {"info": {"version": 7}}}])
def test_an_answer_without_a_version_is_an_error(
    abroad: Gateway, upstream: FakeUpstream, how: Json
) -> None:
    upstream.script(path="/pypi/azt/json", **how)

    failed = Owner(abroad).call("POST", "/version/check", {})

    assert (failed.status, failed.error["code"]) == (502, "upstream_error")


# -- A restart ------------------------------------------------------------------------------------


def is_new(gateway: Gateway, before: int) -> bool:
    """Whether the gateway answers and has started after that time."""
    try:
        state = Owner(gateway).call("GET", "/state")
        return state.status == 200 and state.json["gateway"]["startedAt"] > before
    except (OSError, ValueError):
        return False


def test_a_restart_lets_streams_end_and_keeps_process_port_and_state(
    gateway: Gateway, owner: Owner, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo"), stall=True, after=5)
    stream = owner.open("POST", "/v1/chat/completions", chat_body(stream=True))
    stream.read_until(b'"Hel"')
    before = owner.call("GET", "/state").json["gateway"]

    told = owner.call("POST", "/gateway/restart", {"drainMs": 20_000})
    upstream.release()
    body = stream.read_rest()

    where = gateway.url.removeprefix("http://")
    assert (told.status, told.json) == (202, {"from": where, "to": where})
    assert body.body.endswith(b"data: [DONE]\n\n")
    eventually(lambda: is_new(gateway, before["startedAt"]), 30)
    after = owner.call("GET", "/state").json
    assert before["restartSupported"] and after["gateway"]["restartSupported"]
    assert (after["gateway"]["pid"], len(after["accounts"])) == (gateway.process.pid, 1)
    assert owner.chat().status == 200
    assert len(owner.call("GET", "/requests").json["items"]) == 2
    stream.close()
    assert gateway.stop() == 0


def test_what_does_not_end_in_its_time_is_ended_and_watchers_are_told(
    gateway: Gateway, owner: Owner, upstream: FakeUpstream
) -> None:
    upstream.script(text("Hel", "lo"), stall=True, after=5)
    stream = owner.open("POST", "/v1/chat/completions", chat_body(stream=True))
    stream.read_until(b'"Hel"')
    watcher = owner.open("GET", f"{ADMIN}/events", headers=gateway.proof())
    before = owner.call("GET", "/state").json["gateway"]["startedAt"]

    owner.call("POST", "/gateway/restart", {"drainMs": 100})
    body, events = stream.read_rest(), watcher.read_rest()

    assert b'"error"' in body.body and b"[DONE]" not in body.body
    assert b'"restarting"' in events.body and b"event: bye" in events.body
    eventually(lambda: is_new(gateway, before), 30)
    stream.close()
    watcher.close()


def test_a_restart_follows_to_the_new_port(home: Path, upstream: FakeUpstream) -> None:
    ports = [free_port(), free_port()]
    gateway = Gateway(home, {**upstream.environment()}, ["--host", "127.0.0.1"])
    gateway.azt("settings", "set", "server.port", str(ports[0]))
    gateway.start()
    try:
        owner = Owner(gateway)
        before = owner.call("GET", "/state").json["gateway"]["startedAt"]
        owner.call("PATCH", "/settings", {"values": {"server.port": ports[1]}})
        told = owner.call("POST", "/gateway/restart", {}).json
        gateway.url = f"http://127.0.0.1:{ports[1]}"
        eventually(lambda: is_new(gateway, before), 30)
    finally:
        gateway.stop()

    assert told == {"from": f"127.0.0.1:{ports[0]}", "to": f"127.0.0.1:{ports[1]}"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_restart_to_a_taken_port_is_refused_and_nothing_ends(
    home: Path, upstream: FakeUpstream
) -> None:
    gateway = Gateway(home, {**upstream.environment()}, ["--host", "127.0.0.1"])
    gateway.azt("settings", "set", "server.port", str(free_port()))
    gateway.start()
    try:
        owner = Owner(gateway)
        with socket.create_server(("127.0.0.1", 0)) as holder:
            taken = holder.getsockname()[1]
            owner.call("PATCH", "/settings", {"values": {"server.port": taken}})
            told = owner.call("POST", "/gateway/restart", {})
        assert (told.status, told.error["code"]) == (422, "port_in_use")
        assert owner.get("/_gateway/health").status == 200
    finally:
        gateway.stop()


@pytest.mark.parametrize("drain", ["1", -1, True, 1e9])
def test_a_drain_that_is_no_time_is_refused(owner: Owner, drain: Any) -> None:
    assert owner.call("POST", "/gateway/restart", {"drainMs": drain}).status == 400


# -- Diagnostics ----------------------------------------------------------------------------------


def test_the_bundle_says_all_and_names_nobody(gateway: Gateway, owner: Owner) -> None:
    account = {**account_file(), "label": "Alexandra"}
    owner.call("POST", "/accounts/import", {"payload": [account]})
    owner.call("POST", "/keys", {"name": "phone"})
    proxy = {"networkProxy.url": "http://user:hidden@proxy.corp:3128"}
    owner.call("PATCH", "/settings", {"values": proxy})
    owner.call("POST", "/accounts/refresh-quotas", {})
    owner.chat()
    owner.post("/v1/chat/completions", {"model": "ada@example.com", "messages": []})

    got = owner.call("GET", "/diagnostics")

    with zipfile.ZipFile(io.BytesIO(got.body)) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert got.headers["cache-control"] == "no-store"
    assert sorted(files) == [
        "accounts.json",
        "doctor.json",
        "jobs.json",
        "requests.jsonl",
        "settings.json",
    ]
    values = {name: [json.loads(line) for line in raw.splitlines()] for name, raw in files.items()}
    assert values["settings.json"][0]["values"]["defaultModel"] == "gpt-5.4"
    [[shown]] = values["accounts.json"]
    assert shown["plan"] == "plus"
    assert re.fullmatch(r"id-[0-9a-f]{10}", shown["id"])
    assert any(one["name"] == "version" for one in values["doctor.json"][0]["checks"])
    assert {row["account"] for row in values["requests.jsonl"]} <= {None, shown["label"]}
    whole, token = "".join(files.values()), gateway.proof()["Authorization"].split()[1]
    for secret in (
        *("ada@", "Alexandra", "hidden", "acc_", token, str(gateway.home), "acct-1"),
        *(account[name] for name in ("access_token", "refresh_token", "id_token")),
    ):
        assert secret not in whole, secret
    assert "audit: diagnostics" in gateway.log()


def test_the_bundle_needs_proof(gateway: Gateway) -> None:
    refused = Client(gateway.url).get(f"{ADMIN}/diagnostics", headers={"X-AZT-Admin": "1"})

    assert (refused.status, refused.error["code"]) == (401, "proof_needed")


# -- The command ----------------------------------------------------------------------------------


@pytest.fixture(params=["with a server", "without a server"])
def place(request: pytest.FixtureRequest, new_gateway: NewGateway) -> Gateway:
    gateway = new_gateway()
    if request.param == "without a server":
        gateway.stop()
    return gateway


def checks(found: Json) -> dict[str, Json]:
    return {one["name"]: one for one in found["checks"]}


def test_everything_is_checked_with_and_without_a_server(place: Gateway) -> None:
    done = place.azt("doctor", "--json")
    found = json.loads(done.stdout)
    shown = place.azt("doctor")

    seen = checks(found)
    assert (done.returncode, shown.returncode) == (0, 0), done.stdout
    assert seen.keys() >= {"TLS", "account", "network", "port", "proxy", "state"}
    assert seen.keys() >= {"version", "zstd", "Codex"}
    assert seen["zstd"]["level"] == ("ok" if azt.find_zstd() else "warn")
    assert {one["level"] for name, one in seen.items() if name != "zstd"} == {"ok"}
    assert all(one["advice"] for one in found["checks"] if one["level"] == "warn")
    for one in [one for one in found["checks"] if one["name"] != "network"]:
        assert one["text"].replace("\n", " ")[:60] in shown.stdout


def test_the_decisions_are_those_in_force(place: Gateway) -> None:
    def told() -> Json:
        decisions: Json = json.loads(place.azt("doctor", "--json").stdout)["decisions"]
        return decisions

    before = told()
    place.azt("keys", "add", "phone")
    place.azt("settings", "set", "server.lanApi", "false")
    after, lines = told(), place.azt("doctor").stdout.splitlines()

    here, lan = "a program on this machine", "your network"
    assert (before[here]["api"], before[lan]["api"]) == (None, None)
    assert after[here]["api"]["status"] == 401
    assert after[lan]["api"] == {"status": 403, "code": "lan_off"}
    assert before["the internet"]["api"]["code"] == "api_key_needed"
    assert after["the internet, with a key"]["api"] is None
    assert before[here]["admin_proof"]["code"] == "proof_needed"
    assert before["the same with the admin token"]["admin_proof"] is None
    assert {route.access for route in azt.ROUTES} == set(before[here])
    [row] = [line for line in lines if line.startswith(f"{lan}  ")]
    assert row.split().count("403") == sum(
        one["status"] == 403 for one in after[lan].values() if one
    )


def test_what_is_bad_is_said_with_what_to_do(home: Path, upstream: FakeUpstream) -> None:
    gateway = Gateway(home, {**upstream.environment()}, [])
    gateway.environment["AZT_AUTH_BASE_URL"] = f"http://127.0.0.1:{free_port()}"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        gateway.environment["AZT_PORT"] = str(holder.getsockname()[1])
        done = gateway.azt("doctor", "--json")
    seen = checks(json.loads(done.stdout))

    assert done.returncode == 1
    assert (seen["accounts"]["level"], seen["accounts"]["advice"]) == ("bad", "run `azt login`")
    assert (seen["port"]["level"], "held by" in seen["port"]["text"]) == ("warn", True)
    assert any(
        one["level"] == "bad" and "could not reach" in one["text"]
        for one in json.loads(done.stdout)["checks"]
        if one["name"] == "network"
    )


def test_a_home_that_cannot_be_used_is_a_finding_too(home: Path, upstream: FakeUpstream) -> None:
    gateway = Gateway(home, {**upstream.environment()}, [])
    (home / ".ai-zero-token").write_text("")

    done = gateway.azt("doctor")

    assert (done.returncode, done.stderr) == (1, "")
    assert re.match(r"bad +azt +.*AI_ZERO_TOKEN_HOME", done.stdout)


def test_files_that_others_can_read_are_named(gateway: Gateway) -> None:
    (gateway.state / "stray").touch(0o644)

    done = gateway.azt("doctor", "--json")

    state = checks(json.loads(done.stdout))["state"]
    assert (done.returncode, state["level"]) == (1, "bad")
    assert "stray" in state["advice"] and "chmod" in state["advice"]


def test_a_wrong_clock_is_seen_by_the_answers_of_others(gateway: Gateway) -> None:
    date = b"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
    with Server(answer(sized(b"", head=date))) as server:
        gateway.stop()
        gateway.environment["AZT_AUTH_BASE_URL"] = server.url
        clock = checks(json.loads(gateway.azt("doctor", "--json").stdout))["clock"]

    assert clock["level"] == "warn"
    assert "127.0.0.1" in clock["text"]


def test_a_report_can_be_pasted_anywhere(place: Gateway) -> None:
    for words in (("doctor", "--report"), ("doctor", "--report", "--json")):
        shown = place.azt(*words).stdout

        assert "id-" in shown and "~/.ai-zero-token" in shown
        for name in ("acc_", "ada@", str(place.home)):
            assert name not in shown


def test_the_doctor_too_shows_what_it_contacts_and_writes(place: Gateway) -> None:
    done = place.azt("doctor", "--audit")

    assert done.returncode == 0, done.stderr
    assert "azt audit: connects to 127.0.0.1:" in done.stderr
    assert "REFUSED" not in done.stderr and "not azt's own" not in done.stderr
