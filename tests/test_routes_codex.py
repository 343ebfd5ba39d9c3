"""The Codex passthrough: the same bytes both ways, rotation before them, errors Codex heeds."""

from __future__ import annotations

import gzip
import json as jsonlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from fake_upstream import (
    CHALLENGE_PAGE,
    CODEX,
    FakeUpstream,
    Json,
    account_file,
    error_json,
    events,
    failed,
    flat_error,
    limit_reached,
    make_token,
    model_info,
    nested_error,
    text,
    token_refused,
)
from harness import MODEL, Answer, Client, Gateway
from loopback import Peer, Server, sized

NewGateway = Callable[..., Gateway]

FIRST, SECOND = account_file(), account_file("acct-2", "user-2", "bob@example.com")
VERSION = "client_version=0.169.0"


def turn(said: str = "hi", **fields: Any) -> Json:
    part = {"type": "input_text", "text": said}
    item = {"type": "message", "role": "user", "content": [part]}
    return {"model": MODEL, "stream": True, "store": False, "input": [item], **fields}


def post(client: Client, said: str = "hi", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/codex/v1/responses", turn(said), headers=named)


@pytest.fixture
def pair(new_gateway: NewGateway) -> Gateway:
    """Two accounts that stand in for each other."""
    gateway = new_gateway(accounts=[FIRST, SECOND])
    assert gateway.azt("settings", "set", "autoSwitch.enabled", "true").returncode == 0
    return gateway


# -- Request and answer go through unchanged ------------------------------------------------------

CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "identity": lambda raw: raw,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("coding", CODINGS)
def test_the_request_body_is_byte_equal(
    client: Client, upstream: FakeUpstream, coding: str
) -> None:
    # Spaces and an escape that no re-encoding would leave as they are.
    raw = CODINGS[coding](jsonlib.dumps(turn("gr\u00fcezi"), indent=3).encode())

    answer = client.post("/codex/v1/responses", body=raw, headers={"Content-Encoding": coding})

    (seen,) = upstream.turns
    assert answer.status == 200
    assert seen.raw == raw
    assert seen.headers["content-encoding"] == coding
    assert seen.user_text == "gr\u00fcezi"


def test_a_body_that_no_one_can_decode_goes_through(client: Client, upstream: FakeUpstream) -> None:
    answer = client.post(
        "/codex/v1/memories/x", body=b"\x00\xff{", headers={"Content-Encoding": "br"}
    )

    assert answer.status == 404
    assert upstream.requests[-1].raw == b"\x00\xff{"


@pytest.mark.parametrize("size", [0, 1, 10])
def test_the_answer_is_byte_equal_in_any_pieces(
    client: Client, upstream: FakeUpstream, size: int
) -> None:
    sent = b": comment\r\n\r\nevent: codex.new\ndata: {\n\ndata:x\r\n\n\xff\x00" + b"y" * 300
    upstream.script([*text("a", "b\u00e9"), sent], pieces=size, vendor=False, done=True)

    body = post(client).body

    assert body.endswith(sent + b"data: [DONE]\n\n")
    assert body.count(b"event: response.output_text.delta\n") == 2
    assert body.startswith(b'event: response.created\ndata: {"type":"response.created"')


FORWARDED = {
    "conversation_id": "conv",
    "openai-beta": "responses=experimental",
    "originator": "codex_exec",
    "session-id": "s1",
    "session_id": "s1",
    "thread-id": "t1",
    "traceparent": "00-1-2-01",
    "user-agent": "codex_exec/0.169.0 (Debian 12)",
    "version": "0.169.0",
    "x-client-request-id": "t1",
    "x-codex-beta-features": "remote_compaction_v2",
    "x-codex-parent-thread-id": "p1",
    "x-codex-routing-hint": "model=gpt-5.5",
    "x-codex-turn-metadata": '{"turn_id": "1"}',
    "x-codex-window-id": "t1:0",
    "x-oai-attestation": "opaque",
    "x-openai-internal-codex-residency": "us",
    "x-openai-memgen-request": "true",
    "x-openai-subagent": "review",
    "x-responsesapi-include-timing-metrics": "true",
}
WITHHELD = {
    "accept-encoding": "gzip, zstd",
    "api-key": "sk-codex",
    "cookie": "session=codex",
    "if-none-match": "*",
    "referer": "codex",
    "x-api-key": "sk-codex",
    "x-openai-fedramp": "true",
}


def test_codexs_own_headers_are_forwarded_and_nothing_else(
    client: Client, upstream: FakeUpstream
) -> None:
    codex = {"authorization": "Bearer of-codex", "chatgpt-account-id": "acct-codex"}

    client.post("/codex/v1/responses", turn(), headers={**FORWARDED, **WITHHELD, **codex})

    seen = upstream.turns[-1].headers
    assert {name: seen.get(name) for name in FORWARDED} == FORWARDED
    assert WITHHELD.keys().isdisjoint(seen)
    assert seen["chatgpt-account-id"] == "acct-1"
    assert upstream.turns[-1].account == "acct-1"
    assert "of-codex" not in str(seen)


def test_the_headers_that_codex_reads_come_back_and_no_cookie(
    client: Client, upstream: FakeUpstream
) -> None:
    family = {"x-codex-bengalfox-primary-used-percent": "3", "x-premium-limit-name": "Premium"}
    upstream.script(text("a"), headers={**family, "x-reasoning-included": "true"})

    headers = post(client).headers

    assert headers["x-codex-primary-used-percent"] == "10.5"
    assert headers["x-codex-turn-state"] == upstream.turns[-1].turn_state
    assert headers["x-models-etag"] == upstream.etag
    assert headers["openai-model"] == MODEL
    assert headers["x-request-id"].startswith("req_0")  # the backend's: Codex shows it
    assert headers["cf-ray"] == "8f00-FRA"
    assert family.items() <= headers.items()
    assert headers["x-azt-account"].startswith("acc_") and headers["x-azt-attempts"] == "1"
    assert "set-cookie" not in headers


@pytest.mark.parametrize("path", ["/codex/v1/responses/", "/codex/responses", "/codex/responses/"])
def test_a_turn_may_be_sent_to_every_spelling(
    client: Client, upstream: FakeUpstream, path: str
) -> None:
    assert client.post(path, turn()).status == 200
    assert len(upstream.turns) == 1


def test_the_record_has_what_the_stream_told(
    client: Client, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("a", model="gpt-5.5-rerouted"))

    line = _line(gateway, lambda: post(client, thread_id="t9", x_client_request_id="t9"))

    assert "POST /codex/v1/responses 200 account=acc_" in line
    assert "model=gpt-5.5-rerouted" in line and "ttft_ms=-" not in line
    assert " t9 " not in line  # the thread's id would name all of its requests


def _line(gateway: Gateway, act: Callable[[], object]) -> str:
    """The log line of what `act` asks for: its answer carries the backend's request id."""
    before = gateway.log()
    act()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        lines = [one for one in gateway.log()[len(before) :].splitlines() if " /codex/" in one]
        if lines:
            return lines[0]
        time.sleep(0.01)  # another process writes the file: there is nothing to wait on
    raise AssertionError(gateway.log())


def test_the_quota_is_learned_from_headers_and_from_the_event(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    client, proof = Client(gateway.url), gateway.proof()

    def windows() -> list[float]:
        (item,) = client.get("/_gateway/admin/accounts", headers=proof).json["items"]
        return [one["usedPercent"] for one in item["quota"]["windows"]]

    windows_event = {"primary": {"used_percent": 42, "window_minutes": 300, "reset_at": 2e9}}
    post(client)
    assert windows() == [10]
    time.sleep(1.1)  # a second reading within one second is left out
    told = {"type": "codex.rate_limits", "plan_type": "plus", "rate_limits": windows_event}
    upstream.script(events(told, text("a")), vendor=False)
    post(client)
    assert windows() == [42]


def test_events_arrive_while_the_answer_runs(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("first", "second"), stall=True, after=5)

    with client.open("POST", "/codex/v1/responses", turn()) as stream:
        assert b'"delta":"first"' in stream.read_until(b"first")
        upstream.release()
        assert b'"delta":"second"' in stream.read_rest().body


# -- Holding back ---------------------------------------------------------------------------------


def test_handshake_events_are_held_and_then_sent_unchanged(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("late"), stall=True, after=2)
    got: list[Answer] = []
    asking = threading.Thread(target=lambda: got.append(post(client)))
    asking.start()
    upstream.wait_turns()
    time.sleep(0.2)  # long enough for what must not come
    assert not got
    upstream.release()
    asking.join(10)

    kinds = got[0].fields("event")
    assert kinds[:2] == ["codex.rate_limits", "response.created"]
    assert b"keep-alive" not in got[0].body


# -- Failures and rotation ------------------------------------------------------------------------


def test_a_usage_limit_comes_back_as_it_is(client: Client, upstream: FakeUpstream) -> None:
    body = limit_reached(7200)
    upstream.script(status=429, json=body, headers={"x-codex-rate-limit-reached-type": "x"})

    answer = post(client)

    assert (answer.status, answer.json) == (429, body)
    assert answer.headers["x-codex-rate-limit-reached-type"] == "x"
    assert len(upstream.turns) == 1


@pytest.mark.parametrize(
    "status, body",
    [
        (400, {"detail": "Unsupported parameter: x"}),
        (403, {"detail": {"code": "workspace_access_denied"}}),
        (404, error_json("The model `x` does not exist", code="model_not_found")),
        (413, {}),
        (500, error_json("It broke", type="server_error")),
        (503, error_json("Busy", code="server_is_overloaded")),
    ],
)
def test_an_error_keeps_its_status_and_body(
    client: Client, upstream: FakeUpstream, status: int, body: Json
) -> None:
    upstream.script(status=status, json=body)

    answer = post(client)

    assert (answer.status, answer.json) == (status, body)
    assert len(upstream.turns) == 1


def test_what_a_side_door_refuses_rests_no_account(pair: Gateway, upstream: FakeUpstream) -> None:
    client = Client(pair.url)
    upstream.script(path="/alpha/search", status=403, json={"detail": "Forbidden"})

    answer = client.post("/codex/v1/alpha/search", {"q": "x"})

    assert (answer.status, answer.json) == (403, {"detail": "Forbidden"})
    assert client.get("/_gateway/admin/state").json["routing"]["skipped"] == []
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [200, 302, 403, 502])
def test_a_page_never_goes_through(client: Client, upstream: FakeUpstream, status: int) -> None:
    kind = {"content-type": "text/html", "cf-mitigated": "challenge", "location": "http://x/"}
    upstream.script(status=status, body=CHALLENGE_PAGE, headers=kind)

    answer = post(client)

    assert answer.status in (403, 502)
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert b"html" not in answer.body.lower().replace(b"an html page", b"")


FAILURES: dict[str, Json] = {
    "usage limit": {"status": 429, "json": limit_reached(3600)},
    "overload": {"status": 503, "json": error_json("Busy", code="server_is_overloaded")},
    "overload in a 200 stream": {"events": failed("server_is_overloaded", "Busy")},
    "limit in a 200 stream": {"events": [nested_error(429, limit_reached(60)["error"])]},
    "error event in a 200 stream": {"events": events(text()[:1], flat_error("slow_down", "x"))},
}


@pytest.mark.parametrize("how", FAILURES.values(), ids=FAILURES)
def test_another_account_stands_in_before_anything_was_sent(
    pair: Gateway, upstream: FakeUpstream, how: Json
) -> None:
    upstream.script(account="acct-1", **how)

    answer = post(Client(pair.url), thread_id="t1")

    assert answer.status == 200
    assert answer.headers["x-azt-attempts"] == "2"
    assert [seen.account for seen in upstream.turns] == ["acct-1", "acct-2"]
    assert upstream.turns[0].raw == upstream.turns[1].raw
    assert answer.fields("event")[-1] == "response.completed"
    assert b"response.failed" not in answer.body and b"slow_down" not in answer.body


@pytest.mark.parametrize("vendor", [True, False])
def test_a_failure_in_the_stream_goes_through_where_no_account_helps(
    client: Client, upstream: FakeUpstream, vendor: bool
) -> None:
    upstream.script(failed("server_is_overloaded", "Busy"), vendor=vendor, done=True)

    answer = post(client)

    assert (answer.status, answer.cut) == (200, False)
    last = jsonlib.loads(answer.data[-2])
    assert last["response"]["error"] == {"code": "server_is_overloaded", "message": "Busy"}
    assert answer.data[-1] == "[DONE]"
    assert len(upstream.turns) == 1


def test_a_failure_of_the_request_itself_goes_through_at_once(
    pair: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(failed("context_length_exceeded", "Too long"))

    answer = post(Client(pair.url))

    assert b"context_length_exceeded" in answer.body
    assert len(upstream.turns) == 1


def test_when_all_are_at_their_limits_codex_gets_the_nearest_reset(
    pair: Gateway, upstream: FakeUpstream
) -> None:
    near = limit_reached(600)
    upstream.script(account="acct-1", status=429, json=limit_reached(7200))
    upstream.script(account="acct-2", status=429, json=near)

    answer = post(Client(pair.url))

    assert (answer.status, answer.json) == (429, near)
    again = post(Client(pair.url))  # no call is spent on it
    assert (again.status, again.error["type"]) == (429, "usage_limit_reached")
    assert abs(again.error["resets_at"] - near["error"]["resets_at"]) <= 2
    assert len(upstream.turns) == 2


def test_an_expired_token_is_renewed_and_the_bytes_are_sent_again(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    upstream.script(status=401, json=token_refused())

    answer = post(Client(new_gateway().url))

    assert answer.status == 200
    assert answer.headers["x-azt-attempts"] == "2"
    assert upstream.turns[0].raw == upstream.turns[1].raw
    assert upstream.turns[0].headers["authorization"] != upstream.turns[1].headers["authorization"]


def test_a_dead_sign_in_is_a_400_that_says_what_to_do(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway(accounts=[{**FIRST, "label": "work"}])
    upstream.revoke("acct-1")

    for _ in range(2):
        answer = post(Client(gateway.url))

        assert answer.status == 400
        assert "work" in answer.error["message"] and "azt login" in answer.error["message"]
        assert "www-authenticate" not in answer.headers
    assert len(upstream.turns) == 1


@pytest.mark.parametrize("path", ["responses", "responses/compact", "models?x=1", "alpha/search"])
def test_no_account_is_a_400_that_says_what_to_do(new_gateway: NewGateway, path: str) -> None:
    client = Client(new_gateway(accounts=[]).url)

    method = "GET" if "models" in path else "POST"
    answer = client.request(method, f"/codex/v1/{path}", turn())

    assert answer.status == 400
    assert "azt login" in answer.error["message"]


def test_an_unreachable_backend_is_a_502(new_gateway: NewGateway) -> None:
    client = Client(new_gateway(variables={"AZT_CODEX_BASE_URL": "http://127.0.0.1:9"}).url)

    answer = post(client)

    assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")


# -- One account for a conversation ---------------------------------------------------------------


def test_a_conversation_stays_with_its_account(pair: Gateway, upstream: FakeUpstream) -> None:
    client = Client(pair.url)
    names = ["thread-id", "session-id", "session_id", "conversation_id"]
    for name in names:
        client.post("/codex/v1/responses", turn(), headers={name: f"old {name}"})
    # The serving account changes, and its first one can serve again after a second.
    upstream.script(account="acct-1", status=429, json=limit_reached(1))
    post(client)
    time.sleep(1.2)
    upstream.requests.clear()

    for age in ("old", "new"):
        for name in names:
            client.post("/codex/v1/responses", turn(), headers={name: f"{age} {name}"})

    assert [seen.account for seen in upstream.turns] == ["acct-1"] * 4 + ["acct-2"] * 4


def test_the_turn_state_goes_back_to_its_own_account_only(
    pair: Gateway, upstream: FakeUpstream
) -> None:
    client = Client(pair.url)
    state = post(client, thread_id="t1").headers["x-codex-turn-state"]
    post(client, thread_id="t1", x_codex_turn_state=state)
    upstream.script(account="acct-1", status=429, json=limit_reached(3600))
    for _ in range(2):  # Codex keeps the first state for the whole turn
        assert post(client, thread_id="t1", x_codex_turn_state=state).status == 200

    sent = [(seen.account, seen.headers.get("x-codex-turn-state")) for seen in upstream.turns]
    assert sent == [
        ("acct-1", None),
        ("acct-1", state),
        ("acct-1", state),
        ("acct-2", None),
        ("acct-2", None),
    ]


def test_a_turn_state_of_somebody_else_is_not_sent(client: Client, upstream: FakeUpstream) -> None:
    assert post(client, x_codex_turn_state="from before the take-over").status == 200
    assert "x-codex-turn-state" not in upstream.turns[-1].headers


def test_a_turn_state_that_came_as_an_event_is_known(pair: Gateway, upstream: FakeUpstream) -> None:
    told = {"type": "response.metadata", "headers": {"x-codex-turn-state": "ts-event"}}
    upstream.script(events(told, text("a")), vendor=False)
    upstream.turn_states["ts-event"] = "acct-1"
    client = Client(pair.url)
    post(client)

    post(client, x_codex_turn_state="ts-event")

    assert upstream.turns[-1].headers["x-codex-turn-state"] == "ts-event"


# -- How a transfer ends --------------------------------------------------------------------------


def test_a_cut_is_passed_on_as_a_cut(
    client: Client, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("a", "b"), cut=True, after=5)
    got: list[Answer] = []

    line = _line(gateway, lambda: got.append(post(client)))

    assert got[0].cut
    assert b'"delta":"a"' in got[0].body and got[0].body.endswith(b"\n\n")
    assert b"event: error" not in got[0].body
    assert "failed upstream_stream_truncated" in line


def test_a_cut_before_anything_was_generated_is_a_502_and_not_repeated(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("a"), cut=True, after=1)

    answer = post(client)

    assert (answer.status, answer.error["code"]) == (502, "upstream_stream_truncated")
    assert len(upstream.turns) == 1


def test_a_proper_end_without_a_terminal_event_stays_a_proper_end(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.script(text("a")[:5])

    answer = post(client)

    assert (answer.status, answer.cut) == (200, False)
    assert b"response.completed" not in answer.body


@pytest.mark.parametrize("is_whole", [True, False])
def test_where_the_connection_ends_the_body_the_last_event_tells(
    client: Client, upstream: FakeUpstream, is_whole: bool
) -> None:
    upstream.script(text("a")[: None if is_whole else 5], framing="close")

    assert post(client).cut is not is_whole


@pytest.mark.parametrize("state", ["held", "open", "head"])
def test_a_client_that_leaves_ends_the_upstream_call(
    client: Client, upstream: FakeUpstream, state: str
) -> None:
    wait = {"held": {"after": 2}, "open": {"after": 5}, "head": {"after": 0, "delay": 5.0}}
    upstream.script(text("a", "b"), stall=True, **wait[state])
    connection = client.connect()
    connection.request("POST", "/codex/v1/responses", jsonlib.dumps(turn()))
    upstream.wait_turns()
    if state == "open":
        response = connection.getresponse()
        response.read1(65536)
        response.close()

    left = time.monotonic()
    connection.close()

    assert upstream.wait_closed() - left < 0.25


def test_a_client_that_only_half_closes_gets_the_same_bytes(
    client: Client, gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(text("a", "b"), stall=True, after=5)
    raw = jsonlib.dumps(turn()).encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as sock:
        head = f"POST /codex/v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
        sock.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + raw)
        got = b""
        while b'"delta":"a"' not in got:
            got += sock.recv(65536)
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.3)  # the gateway looks for a reset meanwhile
        upstream.release()
        while piece := sock.recv(65536):
            got += piece

    body, chunks = b"", got.partition(b"\r\n\r\n")[2]
    while size := int(chunks.partition(b"\r\n")[0], 16):
        chunks = chunks.partition(b"\r\n")[2]
        body, chunks = body + chunks[:size], chunks[size + 2 :]
    assert b'"delta":"b"' in body and b"keep-alive" not in body
    assert body.count(b"\n\n") == body.count(b"event: ")


# -- Models ---------------------------------------------------------------------------------------


def test_the_model_list_is_the_backends_own(client: Client, upstream: FakeUpstream) -> None:
    upstream.models = [model_info("gpt-5.5", new_field={"a": [1]}), model_info("b")]
    upstream.etag = 'W/"own"'

    answer = client.get(f"/codex/v1/models?{VERSION}")

    assert answer.json == {"models": upstream.models}
    assert answer.headers["etag"] == upstream.etag
    assert upstream.requests[-1].query == {"client_version": "0.169.0"}


def test_an_older_client_gets_its_own_list(client: Client, upstream: FakeUpstream) -> None:
    upstream.models = [model_info("new", minimal_client_version="0.150.0"), model_info("old")]
    upstream.etag = 'W/"versions"'

    slugs = [
        [
            model["slug"]
            for model in client.get(f"/codex/models?client_version={version}").json["models"]
        ]
        for version in ("0.149.0", "0.169.0", "0.149.0")
    ]

    assert slugs == [["old"], ["new", "old"], ["old"]]


def test_a_model_list_is_kept_while_its_etag_holds(client: Client, upstream: FakeUpstream) -> None:
    upstream.etag = 'W/"kept"'
    bodies = [client.get(f"/codex/v1/models?{VERSION}").body for _ in range(3)]
    upstream.etag = 'W/"new"'
    upstream.models = [model_info("new")]
    latest = client.get(f"/codex/v1/models?{VERSION}")

    assert [seen.status for seen in upstream.requests] == [200, 304, 304, 200]
    assert len(set(bodies)) == 1
    assert (latest.headers["etag"], len(latest.json["models"])) == ('W/"new"', 1)


def test_a_client_that_has_the_list_is_told_so(client: Client, upstream: FakeUpstream) -> None:
    known = {"If-None-Match": upstream.etag}

    answer = client.get(f"/codex/v1/models?{VERSION}&x=1", headers=known)

    assert (answer.status, answer.body) == (304, b"")
    assert answer.headers["etag"] == upstream.etag
    stale = client.get(f"/codex/v1/models?{VERSION}", headers={"If-None-Match": '"old"'})
    assert stale.status == 200 and stale.json["models"]


def test_each_account_has_its_own_model_list(pair: Gateway, upstream: FakeUpstream) -> None:
    client = Client(pair.url)
    for number in (1, 2):
        body = {"models": [model_info(f"of-{number}")]}
        headers = {"etag": f'"{number}"'}
        upstream.script(path="/models", account=f"acct-{number}", json=body, headers=headers)
    first = client.get(f"/codex/v1/models?{VERSION}")
    upstream.script(path="/models", account="acct-1", status=429, json=limit_reached(3600))
    second = client.get(f"/codex/v1/models?{VERSION}")

    assert first.json["models"][0]["slug"] == "of-1"
    assert second.json["models"][0]["slug"] == "of-2"


# -- Compaction, pictures, and whatever else ------------------------------------------------------


def test_compaction_goes_through(client: Client, upstream: FakeUpstream) -> None:
    asked = {"model": MODEL, "instructions": "", "input": turn("long")["input"]}

    answer = client.post("/codex/v1/responses/compact", asked)

    assert answer.status == 200
    assert [item["type"] for item in answer.json["output"]] == ["message", "compaction"]
    assert answer.headers["x-codex-turn-state"] == upstream.requests[-1].turn_state
    assert answer.headers["x-codex-primary-used-percent"] == "10.5"


def test_compaction_may_stream(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(text("small"), path="/compact")

    answer = client.post("/codex/responses/compact", {"model": MODEL, "input": []})

    assert answer.is_stream and b"small" in answer.body


def test_compaction_as_a_turn_is_a_turn(client: Client, upstream: FakeUpstream) -> None:
    asked = turn("long")
    asked["input"].append({"type": "compaction_trigger"})

    answer = client.post("/codex/v1/responses", asked)

    assert b'"type":"compaction"' in answer.body
    assert answer.fields("event")[-1] == "response.completed"


PICTURE = {"prompt": "a fox", "model": "gpt-image-2"}
EDIT = {**PICTURE, "images": [{"image_url": "data:image/png;base64,aGk="}]}
CALLS: dict[str, tuple[str, str, Json | None, str]] = {
    "picture": ("POST", "images/generations", PICTURE, "b64_json"),
    "edit": ("POST", "images/edits", EDIT, "b64_json"),
    "search": ("POST", "alpha/search", {"id": "1", "model": MODEL}, "encrypted_output"),
    "memories": ("POST", "memories/trace_summarize", {"traces": [{"id": "1"}]}, "trace_summary"),
}


@pytest.mark.parametrize("method, path, body, expected", CALLS.values(), ids=CALLS)
def test_other_calls_go_through(
    client: Client,
    upstream: FakeUpstream,
    method: str,
    path: str,
    body: Json | None,
    expected: str,
) -> None:
    answer = client.request(method, f"/codex/v1/{path}?a=1&a=%2F", body)

    seen = upstream.requests[-1]
    assert answer.status == 200
    assert expected in answer.body.decode()
    assert (seen.method, seen.path, seen.query) == (method, f"{CODEX}/{path}", {"a": "/"})
    assert seen.raw == jsonlib.dumps(body).encode()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_every_method_goes_through(client: Client, upstream: FakeUpstream, method: str) -> None:
    body = None if method == "GET" else b"x"
    upstream.script(path="/something/new", json={"made": True})

    answer = client.request(method, "/codex/v1/something/new", body=body)

    assert answer.json == {"made": True}
    assert (upstream.requests[-1].method, upstream.requests[-1].raw) == (method, body or b"")


def test_head_is_asked_as_get_and_answered_without_a_body(
    client: Client, upstream: FakeUpstream
) -> None:
    answer = client.request("HEAD", f"/codex/v1/models?{VERSION}")

    assert (answer.status, answer.body) == (200, b"")
    assert upstream.requests[-1].method == "GET"


@pytest.mark.parametrize(
    "path, expected",
    [
        ("x%20y/%C3%A9", "x y/\u00e9"),
        ("a%3Fb%23c", "a?b#c"),
        ("http://evil.example/", "http:/evil.example"),
        ("//evil.example/x", "evil.example/x"),
        ("a%252e%252e/b", "a%2e%2e/b"),
    ],
)
def test_a_path_stays_below_the_base_url(
    client: Client, upstream: FakeUpstream, path: str, expected: str
) -> None:
    client.get(f"/codex/v1/{path}")

    assert upstream.requests[-1].path == f"{CODEX}/{expected}"


@pytest.mark.parametrize("path", ["../x", "a/../../x", "%2e%2e/x", "a%2F..%2Fx", "a\\..\\x", "%00"])
def test_a_path_that_could_leave_the_base_url_is_refused(
    client: Client, upstream: FakeUpstream, path: str
) -> None:
    assert client.get(f"/codex/v1/{path}".replace("\\", "%5c")).status == 400
    assert not upstream.requests


def test_a_websocket_is_refused_with_426_at_once(client: Client, upstream: FakeUpstream) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}

    started = time.monotonic()
    answer = client.get("/codex/v1/responses", headers=upgrade)

    assert answer.status == 426
    assert time.monotonic() - started < 0.3
    assert not upstream.requests


# -- Keys -----------------------------------------------------------------------------------------


def test_with_a_key_the_relay_asks_for_it_and_never_forwards_it(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    key = jsonlib.loads(gateway.azt("keys", "add", "codex", "--json").stdout)["key"]
    client = Client(gateway.url)

    assert post(client).status == 401
    assert post(client, authorization=f"Bearer {make_token()}").status == 401
    assert post(client, authorization=f"Bearer {key}").status == 200
    assert key not in str(upstream.turns[-1].headers)
    assert len(upstream.turns) == 1


# -- Large bodies and events ----------------------------------------------------------------------


def test_a_body_beyond_the_limit_is_refused_and_a_compaction_of_that_size_is_not(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway(variables={"AZT_BODY_LIMIT_MB": "1"}).url)
    raw = b" " * (2 * 1024 * 1024) + jsonlib.dumps({"model": MODEL, "input": []}).encode()

    assert client.post("/codex/v1/responses", body=raw).status == 413
    assert client.post("/codex/v1/responses/compact", body=raw).status == 200
    assert upstream.requests[-1].raw == raw


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_a_large_compaction_is_held_once(new_gateway: NewGateway) -> None:
    size = 128 * 1024 * 1024
    got = 0

    def swallow(peer: Peer) -> None:
        """Count the body; `Peer.read_request` would keep it."""
        nonlocal got
        head = b""
        while b"\r\n\r\n" not in head:
            head += peer.sock.recv(1)
        while got < size:
            got += len(peer.sock.recv(1024 * 1024))
        peer.send(sized(b'{"output": []}', head=b"Content-Type: application/json\r\n"))

    with Server(swallow) as backend:
        gateway = new_gateway(variables={"AZT_CODEX_BASE_URL": backend.url})
        before = peak_bytes(gateway)
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as sock:
            head = f"POST /codex/v1/responses/compact HTTP/1.1\r\nContent-Length: {size}\r\n"
            sock.sendall(f"{head}Host: localhost\r\nConnection: close\r\n\r\n".encode())
            for _ in range(size // (1024 * 1024)):
                sock.sendall(b"x" * (1024 * 1024))
            answer = b"".join(iter(lambda: sock.recv(65536), b""))

        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b'{"output": []}')
        assert got == size
        assert peak_bytes(gateway) - before < 1.15 * size


def peak_bytes(gateway: Gateway) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_a_final_event_of_any_size_is_read_for_the_record(
    client: Client, gateway: Gateway, upstream: FakeUpstream, size: int
) -> None:
    upstream.script(text("a", model="big", instructions='\\"\u00e9{[' * (size // 6)))
    got: list[Answer] = []

    line = _line(gateway, lambda: got.append(post(client)))

    assert len(got[0].body) > size and not got[0].cut
    assert "model=big" in line
    assert " failed" not in line
