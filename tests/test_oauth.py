"""The token endpoint: one round trip, and which answers mean that only a new sign-in helps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from loopback import Peer, Server, answer, hang, once, sized

import azt

Json = dict[str, Any]

GOOD: Json = {"access_token": "new-a", "refresh_token": "new-r", "id_token": "new-i"}


@pytest.fixture
def pool() -> Iterator[azt.ConnectionPool]:
    made = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({"127.0.0.1"})))
    yield made
    made.close()


def response(body: Any, status: str = "200 OK") -> bytes:
    return sized(body if isinstance(body, bytes) else json.dumps(body).encode(), status)


def refresh(
    pool: azt.ConnectionPool, body: Any, status: str = "200 OK"
) -> tuple[azt.Tokens, list[bytes]]:
    with Server(answer(response(body, status))) as server:
        return azt.refresh_tokens(pool, server.url, "rt_old", azt.Wire()), server.requests


def test_the_request_is_that_of_the_public_client(pool: azt.ConnectionPool) -> None:
    _, [request] = refresh(pool, GOOD)
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /oauth/token HTTP/1.1\r\n")
    assert b"content-type: application/json" in head
    assert b"originator: azt" in head and b"user-agent: azt/" in head
    assert json.loads(body) == {
        "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
        "grant_type": "refresh_token",
        "refresh_token": "rt_old",
    }


def test_new_tokens_come_back(pool: azt.ConnectionPool) -> None:
    tokens, _ = refresh(pool, {**GOOD, "expires_in": 864000})
    assert tokens == azt.Tokens("new-a", "new-r", "new-i", 864000)
    for secret in ("new-a", "new-r", "new-i"):
        assert secret not in repr(tokens)


@pytest.mark.parametrize("missing", ["access_token", "refresh_token", "id_token"])
def test_a_field_that_is_left_out_is_none(pool: azt.ConnectionPool, missing: str) -> None:
    tokens, _ = refresh(pool, {name: value for name, value in GOOD.items() if name != missing})
    assert getattr(tokens, missing) is None
    assert [tokens.access_token, tokens.refresh_token, tokens.id_token].count(None) == 1


@pytest.mark.parametrize("value", [5, "", "a b", "a\r\nb", "ä", ["x"], None, {"a": 1}])
def test_a_token_that_could_not_be_a_header_is_as_good_as_left_out(
    pool: azt.ConnectionPool, value: Any
) -> None:
    tokens, _ = refresh(pool, {**GOOD, "refresh_token": value})
    assert tokens.refresh_token is None
    assert tokens.access_token == "new-a"


@pytest.mark.parametrize(
    "expires_in, seconds",
    [(3600, 3600), (3600.9, 3600), ("3600", None), (None, None), (True, None), (-5, None)],
)
def test_the_life_of_the_token_is_seconds(
    pool: azt.ConnectionPool, expires_in: Any, seconds: int | None
) -> None:
    assert refresh(pool, {**GOOD, "expires_in": expires_in})[0].expires_in_s == seconds


@pytest.mark.parametrize("expires_in", [b"1e999", b"-1e999", b"1" + b"0" * 400])
def test_a_life_beyond_measure_loses_no_token(pool: azt.ConnectionPool, expires_in: bytes) -> None:
    body = json.dumps(GOOD).encode()[:-1] + b', "expires_in": ' + expires_in + b"}"
    tokens, _ = refresh(pool, body)
    assert tokens.refresh_token == "new-r"
    assert tokens.expires_in_s is None


DEAD: dict[str, tuple[str, Any, str]] = {
    "reused": ("401 No", {"error": {"code": "refresh_token_reused"}}, "refresh_token_reused"),
    "reused with 400": ("400 No", {"error": {"code": "refresh_token_reused"}}, ""),
    "expired": ("401 No", {"error": {"code": "refresh_token_expired"}}, ""),
    "invalidated": ("401 No", {"code": "refresh_token_invalidated"}, ""),
    "in capitals": ("400 No", {"error": {"code": "Refresh_Token_Expired"}}, ""),
    "invalid grant": ("400 No", {"error": "invalid_grant", "error_description": "x"}, ""),
    "session terminated": ("400 No", {"error": {"code": "app_session_terminated"}}, ""),
    "account deactivated": ("403 No", {"error": {"code": "account_deactivated"}}, ""),
    "any code with 401": ("401 No", {"error": {"code": "brand_new"}}, "brand_new"),
}


@pytest.mark.parametrize("status, body, reason", DEAD.values(), ids=DEAD)
def test_a_dead_token_is_told_apart(
    pool: azt.ConnectionPool, status: str, body: Any, reason: str
) -> None:
    with pytest.raises(azt.SignInRejected) as caught:
        refresh(pool, body, status)
    error = caught.value
    assert (error.status, error.code) == (401, "account_auth_expired")
    assert error.type == "authentication_error"
    assert error.reason == error.reason.lower()
    assert reason in error.reason and error.reason in error.message


def test_a_reason_is_short_and_harmless(pool: azt.ConnectionPool) -> None:
    with pytest.raises(azt.SignInRejected) as caught:
        refresh(pool, {"error": {"code": "\x1b[2J" + "x" * 1000}}, "401 No")
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) == 64


PASSING: dict[str, tuple[str, Any]] = {
    "500": ("500 Oops", {"error": {"code": "server_error"}}),
    "503 html": ("503 Oops", b"<html>Bad gateway</html>"),
    "403 challenge": ("403 Forbidden", b"<!DOCTYPE html><title>Just a moment...</title>"),
    "401 html": ("401 No", b"<html>no</html>"),
    "429": ("429 Slow", {"error": {"code": "rate_limit_exceeded"}}),
    "400 unknown": ("400 No", {"error": {"code": "brand_new"}}),
    "400 string": ("400 No", {"error": "invalid_request"}),
    "200 html": ("200 OK", b"<html>hello</html>"),
    "200 nothing": ("200 OK", b""),
    "200 array": ("200 OK", []),
    "200 torn": ("200 OK", b'{"access_token": "a'),
    "200 without tokens": ("200 OK", {"token_type": "Bearer"}),
    "302": ("302 Found", b""),
    "error of another type": ("400 No", {"error": 5}),
    "error null": ("400 No", {"error": None}),
}


@pytest.mark.parametrize("status, body", PASSING.values(), ids=PASSING)
def test_everything_else_may_pass_and_condemns_nobody(
    pool: azt.ConnectionPool, status: str, body: Any
) -> None:
    with pytest.raises(azt.UpstreamError) as caught:
        refresh(pool, body, status)
    assert (caught.value.status, caught.value.fault) == (502, "transient")
    assert "<" not in caught.value.message


def test_a_cut_answer_is_no_success(pool: azt.ConnectionPool) -> None:
    with (
        Server(once(response(GOOD)[:-1])) as server,
        pytest.raises(azt.UpstreamError),
    ):
        azt.refresh_tokens(pool, server.url, "rt_old", azt.Wire())


def test_no_connection_is_an_upstream_error(pool: azt.ConnectionPool) -> None:
    with Server(hang) as server:
        url = server.url
    with pytest.raises(azt.UpstreamError) as caught:
        azt.refresh_tokens(pool, url, "rt_old", azt.Wire())
    assert (caught.value.code, caught.value.fault) == ("upstream_unreachable", "network")


def test_the_token_is_in_no_message(pool: azt.ConnectionPool) -> None:
    def echo(peer: Peer) -> None:
        request = peer.read_request()
        peer.send(response({"error": {"code": "x", "message": request.decode()}}, "400 No"))

    with Server(echo) as server, pytest.raises(azt.UpstreamError) as caught:
        azt.refresh_tokens(pool, server.url, "rt_s3cr3t", azt.Wire())
    assert "s3cr3t" not in str(caught.value)


def test_every_dead_code_is_spelled_the_way_it_is_compared() -> None:
    assert {code.lower() for code in azt.REFRESH_DEAD} == azt.REFRESH_DEAD


def test_a_single_use_token_is_never_sent_twice(pool: azt.ConnectionPool) -> None:
    def reset(peer: Peer) -> None:
        peer.read_request()
        peer.reset()

    with Server(reset, answer(response(GOOD))) as server:
        with pytest.raises(azt.UpstreamError) as caught:
            azt.refresh_tokens(pool, server.url, "rt_old", azt.Wire())

        assert caught.value.code == "upstream_unreachable"
        assert len(server.requests) == 1
