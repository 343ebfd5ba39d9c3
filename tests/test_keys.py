"""Keys of clients: what each may do, who is slowed for wrong ones, and what the list shows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from harness import Answer, Client, Gateway

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
CHAT = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}


def make_key(gateway: Gateway, **terms: Any) -> dict[str, str]:
    """The header that sends a new key."""
    made = Client(gateway.url).post(
        ADMIN + "/keys", {"name": "phone", **terms}, headers=gateway.proof()
    )
    assert made.status == 201, made.body
    return {"Authorization": f"Bearer {made.json['key']}"}


def listed(gateway: Gateway) -> Any:
    return Client(gateway.url).get(ADMIN + "/keys").json["items"]


def refused(answer: Answer, status: int, code: str) -> Answer:
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    assert set(answer.error) >= {"message", "type", "param", "code"}
    return answer


# -- What a key is for ----------------------------------------------------------------------------


def test_a_key_is_for_its_models_on_every_path(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    key = make_key(gateway, models=["gpt-5.5"])
    turn = {"model": "gpt-5.4", "input": "hi"}
    codex = {**turn, "input": [], "stream": True, "store": False}

    assert client.post("/v1/chat/completions", CHAT, headers=key).status == 200
    for path, body in {
        "/v1/chat/completions": {**CHAT, "model": "gpt-5.4"},
        "/v1/responses": turn,
        "/v1/images/generations": {"prompt": "a cat"},
        "/codex/v1/responses": codex,
        "/codex/v1/responses/compact": codex,
    }.items():
        error = refused(client.post(path, body, headers=key), 403, "model_not_allowed").error
        assert "gpt-5.5" in error["message"], path
    assert (
        client.post("/v1/chat/completions", {**CHAT, "model": None}, headers=key).status == 403
    )  # the default is another one
    listed = client.get("/v1/models", headers=key).json["data"]
    assert [model["id"] for model in listed] == ["gpt-5.5"]
    unread = client.post(
        "/codex/v1/responses",
        body=b"(\xb5/\xfd not to be read",
        headers={**key, "Content-Encoding": "zstd"},
    )
    refused(unread, 403, "model_not_allowed")
    assert (
        client.post("/codex/v1/responses", {**codex, "model": "gpt-5.5"}, headers=key).status == 200
    )
    assert client.get("/v1/models", headers=key).status == 200


def test_a_key_makes_so_many_requests_a_day(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client, key = Client(gateway.url), make_key(gateway, limit=2)

    for _ in range(2):
        assert client.get("/v1/models", headers=key).status == 200
    spent = refused(client.get("/v1/models", headers=key), 429, "api_key_spent")
    assert spent.error["type"] == "rate_limit_error"

    midnight = datetime.combine(datetime.now(), datetime.min.time()) + timedelta(days=1)
    assert abs(midnight.timestamp() - time.time() - int(spent.headers["retry-after"])) < 60
    assert client.get("/v1/models", headers=make_key(gateway)).status == 200
    gateway.stop()
    gateway.start()
    refused(Client(gateway.url).get("/v1/models", headers=key), 429, "api_key_spent")


def test_a_key_ends() -> None:
    policy = azt.Policy(
        frozenset(),
        frozenset(),
        frozenset(),
        lan_api=True,
        loopback_exempt=False,
        own_networks=(),
        keys={azt.hashed("azt_k"): {"expiresAt": 5_000}},
        admin_token_hash="",
        body_max_bytes=1,
    )
    headers = {"host": "localhost", "authorization": "Bearer azt_k"}

    before, after = (azt.read_caller("own", headers, policy, now) for now in (4.9, 5.0))

    assert azt.may(before, "api", "POST", policy) is None
    fault = azt.may(after, "api", "POST", policy)
    assert fault is not None
    assert (fault.status, fault.code) == (401, "api_key_expired")


def test_tomorrow_a_key_may_again() -> None:
    noon = datetime(2030, 6, 1, 12).timestamp()
    key: azt.Json = {"limit": 1}
    azt.count_use(key, noon)

    assert azt._key_state(key, noon + 3600) == "spent"
    assert azt._key_state(key, noon + 86400) == "good"
    azt.count_use(key, noon + 86400)
    assert (key["requests"], key["today"]) == (2, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", "gpt-5.5"),
        ("models", ["a b"]),
        ("limit", 0),
        ("limit", "5"),
        ("limit", True),
        ("expiresAt", 1),
        ("expiresAt", "2030-01-01"),
    ],
)
def test_terms_that_no_key_can_have_are_refused(
    gateway: Gateway, client: Client, field: str, value: Any
) -> None:
    body = {"name": "phone", field: value}

    answer = client.post(ADMIN + "/keys", body, headers=gateway.proof())

    error = refused(answer, 400, "bad_field").error
    assert error["params"]["field"] == field
    assert listed(gateway) == []


# -- Who used it ----------------------------------------------------------------------------------


def test_the_list_shows_when_and_how_often_a_key_was_used(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client, key = Client(gateway.url), make_key(gateway)
    (fresh,) = listed(gateway)
    assert (fresh["lastUsedAt"], fresh["requests"], fresh["limit"]) == (None, 0, None)

    for _ in range(3):
        assert client.post("/v1/chat/completions", CHAT, headers=key).status == 200

    (used,) = listed(gateway)
    assert used["requests"] == 3
    assert abs(used["lastUsedAt"] - time.time() * 1000) < 60_000
    row = client.get(ADMIN + "/requests").json["items"][0]["id"]
    assert client.get(f"{ADMIN}/requests/{row}").json["keyId"] == used["id"]
    assert "requests" not in json.loads((gateway.state / "keys.json").read_text())["keys"][0] or (
        json.loads((gateway.state / "keys.json").read_text())["keys"][0]["requests"] == 0
    )  # not on disk with every request
    gateway.stop()
    assert json.loads((gateway.state / "keys.json").read_text())["keys"][0]["requests"] == 3


# -- Wrong ones -----------------------------------------------------------------------------------

WRONG = {"Authorization": "Bearer sk-placeholder"}


def test_wrong_keys_are_slowed_and_banned_and_a_good_one_counts_at_once(
    new_gateway: NewGateway,
) -> None:
    gateway = new_gateway()
    client, key = Client(gateway.url), make_key(gateway)
    begun = time.monotonic()

    for _ in range(azt.GUESSES_MAX):
        refused(client.get("/v1/models", headers=WRONG), 401, "invalid_api_key")
    assert time.monotonic() - begun >= (azt.GUESSES_MAX - 1) * azt.GUESS_PAUSE_S
    banned = refused(client.get("/v1/models", headers=WRONG), 429, "slow_down")
    assert 1_700 < int(banned.headers["retry-after"]) <= 1_800

    assert client.get("/v1/models", headers=key).status == 200
    assert client.get("/v1/models", headers=gateway.proof()).status == 200
    refused(client.get("/v1/models", headers=WRONG), 401, "invalid_api_key")


def test_without_keys_a_placeholder_is_never_counted(gateway: Gateway, client: Client) -> None:
    for _ in range(2 * azt.GUESSES_MAX):
        assert client.get("/v1/models", headers=WRONG).status == 200


def test_a_banned_placeholder_is_let_in_when_this_machine_is_exempt(
    new_gateway: NewGateway,
) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    make_key(gateway)
    for _ in range(azt.GUESSES_MAX):
        client.get("/v1/models", headers=WRONG)
    refused(client.get("/v1/models", headers=WRONG), 429, "slow_down")

    exempt = {"values": {"apiKeys": {"loopbackExempt": True}}}
    client.request("PATCH", ADMIN + "/settings", exempt, headers=gateway.proof())

    assert client.get("/v1/models", headers=WRONG).status == 200


# -- The command line -----------------------------------------------------------------------------


def test_keys_are_made_with_their_terms_on_the_command_line(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    begun = time.time()

    made = gateway.azt(
        *("keys", "add", "phone", "--models", "gpt-5.5,gpt-5.4"),
        *("--per-day", "50", "--expires", "30", "--json"),
    )
    dated = gateway.azt("keys", "add", "tablet", "--expires", "2040-01-31")
    bad = gateway.azt("keys", "add", "tv", "--expires", "soon")
    shown = gateway.azt("keys", "list")

    item = json.loads(made.stdout)["item"]
    assert (item["models"], item["limit"]) == (["gpt-5.5", "gpt-5.4"], 50)
    assert abs(item["expiresAt"] / 1000 - begun - 30 * 86400) < 60
    assert dated.returncode == 0, dated.stderr
    assert (bad.returncode, "2030-12-31" in bad.stderr) == (2, True)
    assert "gpt-5.5 gpt-5.4" in shown.stdout
    assert "2040-01-31 00:00" in shown.stdout


def test_the_first_key_says_that_this_machine_is_asked_too(new_gateway: NewGateway) -> None:
    gateway = new_gateway()

    first, second = (gateway.azt("keys", "add", name).stdout for name in ("phone", "tablet"))

    assert "also on this machine" in first
    assert "azt settings set apiKeys.loopbackExempt true" in first
    assert "also on this machine" not in second
    log = gateway.log()
    assert "audit: a key was made: phone" in log
    assert first.splitlines()[0] not in log
