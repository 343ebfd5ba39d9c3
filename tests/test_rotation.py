"""Choosing an account and renewing its sign-in: once, saved before use, never with a dead token."""

from __future__ import annotations

import asyncio
import email.utils
import gc
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_upstream import (
    CHALLENGE_PAGE,
    FakeUpstream,
    Reply,
    Seen,
    account_file,
    error_json,
    failed,
    limit_reached,
    message,
    refresh_refused,
    text,
    token_claims,
    token_refused,
)
from harness import Answer, Client, Gateway
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

Json = dict[str, Any]

REASONING = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
SAID: Json = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}


class Bench:
    """A Rotation over one or no account, and what it saved."""

    def __init__(self, upstream: FakeUpstream) -> None:
        environment = azt.read_environment({"HOME": "/nowhere", **upstream.environment()})
        self.upstream = upstream
        self.store = azt.AccountStore()
        self.pool = azt.ConnectionPool(azt.Egress(own_hosts=frozenset({"127.0.0.1"})))
        self.calls = azt.WorkerPool("call", 256)
        self.saved: list[Json] = []
        use = (self.store, self.pool, self.calls, environment)
        self.renewals = azt.Renewals(*use, self.save)
        self.rotation = azt.Rotation(*use, self.renewals)

    async def save(self) -> None:
        self.saved.append(json.loads(json.dumps(self.store.to_json())))

    def sign_in(self, exp: float | None = None, **fields: Any) -> azt.Account:
        entry = {**account_file(exp=exp), **fields}
        [account] = azt.to_accounts([entry], time.time())
        account.priority = fields.get("priority", 0)
        self.store.add(account)
        return account

    def sign_in_many(self, *names: str) -> list[azt.Account]:
        """Accounts of these labels, in this order of priority; the first one serves."""
        self.rotation.rules = azt.Rules(enabled=True, order="priority")
        return [
            self.sign_in(**account_file(name, f"user-{name}"), label=name, priority=at + 1)
            for at, name in enumerate(names)
        ]

    @property
    def serving(self) -> str:
        assert self.store.active is not None
        return self.store.active.label

    @property
    def asked(self) -> list[str | None]:
        """The accounts of the model calls."""
        return [seen.account for seen in self.upstream.turns]

    @property
    def refreshes(self) -> list[Seen]:
        return [seen for seen in self.upstream.requests if seen.path == "/oauth/token"]

    def turn(self, *items: Json, streaming: bool = False, keys: tuple[str, ...] = ()) -> azt.Turn:
        asked = azt.chat_to_responses(
            {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}, {}, ""
        )
        body = {**asked.upstream, **({"input": list(items)} if items else {})}
        return azt.Turn(
            azt.encode_json(body),
            "s-1",
            streaming,
            lambda: azt.ChatStream(asked, time.time()),
            keys=keys,
        )

    async def ask(self, turn: azt.Turn | None = None) -> str:
        """The text of a whole answer."""
        relay = await self.rotation.open_turn(turn or self.turn())
        await relay.whole()
        await until(lambda: relay.answer.sock is None)  # the end of the body follows the answer
        content: str = relay.translator.result()["choices"][0]["message"]["content"]
        return content

    async def refused(self, turn: azt.Turn | None = None) -> azt.AztError:
        with pytest.raises(azt.AztError) as caught:
            await self.ask(turn)
        return caught.value


@pytest.fixture
def bench(upstream: FakeUpstream) -> Iterator[Bench]:
    made = Bench(upstream)
    yield made
    made.pool.close()


def run(main: Awaitable[Any]) -> Any:
    async def within() -> Any:
        return await main

    return asyncio.run(asyncio.wait_for(within(), 30))


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.002)


# -- The choice -----------------------------------------------------------------------------------


def test_without_an_account_the_answer_says_how_to_sign_in(bench: Bench) -> None:
    error = run(bench.refused())
    assert (error.status, error.code) == (503, "no_account")
    assert error.headers["x-should-retry"] == "false"
    assert "azt login" in error.message and "azt accounts import" in error.message
    assert bench.upstream.requests == []


def test_the_serving_account_is_picked(bench: Bench) -> None:
    account = bench.sign_in()
    assert bench.rotation.choose() is account


def test_a_rejected_account_is_401_and_names_the_way_back(bench: Bench) -> None:
    bench.sign_in(label="work").rejected = "token_revoked"
    error = run(bench.refused())
    assert (error.status, error.code) == (401, "account_auth_expired")
    assert error.type == "authentication_error"
    assert "work" in error.message and "token_revoked" in error.message
    assert "azt login" in error.message
    assert bench.upstream.requests == []


def test_a_turn_notes_its_account_and_its_attempts(bench: Bench) -> None:
    account, turn = bench.sign_in(), bench.turn()
    assert run(bench.ask(turn)) == "You said: hi"
    assert (turn.account, turn.attempts) == (account, 1)


def test_no_token_shows_in_the_repr_of_a_turn(bench: Bench) -> None:
    assert "hi" not in repr(bench.turn(SAID))


# -- When to renew --------------------------------------------------------------------------------


def test_a_fresh_sign_in_is_not_renewed(bench: Bench) -> None:
    bench.sign_in()
    run(bench.ask())
    assert bench.refreshes == []
    assert bench.saved == []


@pytest.mark.parametrize("left_s", [-1000, -1, 1, 290])
def test_a_sign_in_that_has_ended_or_ends_soon_is_renewed_first(bench: Bench, left_s: int) -> None:
    account = bench.sign_in(exp=time.time() + left_s)
    before = account.access_token, account.refresh_token
    assert run(bench.ask()) == "You said: hi"
    assert len(bench.refreshes) == 1
    kept = bench.store.accounts[account.id]
    assert (kept.access_token, kept.refresh_token) != before
    assert kept.expires_at > time.time() + 1000
    assert kept.refreshed_at == pytest.approx(time.time(), abs=5)
    assert bench.upstream.turns[0].headers["authorization"] == f"Bearer {kept.access_token}"


def test_the_new_tokens_are_saved_before_they_are_used(bench: Bench) -> None:
    bench.sign_in(exp=1.0)
    turns_at_save: list[int] = []
    save = bench.save

    async def slow_save() -> None:
        turns_at_save.append(len(bench.upstream.turns))
        await asyncio.sleep(0.05)
        turns_at_save.append(len(bench.upstream.turns))
        await save()

    bench.renewals._save = slow_save
    run(bench.ask())
    assert turns_at_save == [0, 0]
    [saved] = bench.saved
    [account] = bench.store.accounts.values()
    assert saved["accounts"][0]["refresh_token"] == account.refresh_token


def test_a_save_that_fails_is_told_and_the_new_tokens_are_used_and_saved_later(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    account = bench.sign_in(exp=1.0)
    before, save = account.refresh_token, bench.save

    async def full() -> None:
        raise azt.AztError(507, "state_not_saved", "The disk is full.")

    async def main() -> None:
        bench.renewals._save = full
        assert await bench.ask() == "You said: hi"
        assert bench.renewals.unsaved == "The disk is full."
        bench.renewals._save = save
        await until(lambda: not bench.renewals.unsaved)

    run(main())
    [saved] = bench.saved[-1]["accounts"]
    assert saved["refresh_token"] == bench.store.accounts[account.id].refresh_token != before
    assert len(bench.refreshes) == 1
    assert "only in memory" in caplog.text and before not in caplog.text


def test_a_401_renews_once_and_tries_again(bench: Bench) -> None:
    account, turn = bench.sign_in(), bench.turn()
    before = account.access_token
    bench.upstream.script(status=401, json=token_refused())
    assert run(bench.ask(turn)) == "You said: hi"
    assert len(bench.refreshes) == 1
    sent = [seen.headers["authorization"] for seen in bench.upstream.turns]
    assert sent[0] == f"Bearer {before}" and sent[1] != sent[0]
    assert turn.attempts == 2


def test_a_second_401_ends_in_a_new_sign_in(bench: Bench) -> None:
    account = bench.sign_in()
    bench.upstream.script(status=401, json=token_refused(), times=2)
    error = run(bench.refused())
    assert (error.status, error.code) == (401, "account_auth_expired")
    assert (len(bench.refreshes), len(bench.upstream.turns)) == (1, 2)
    assert bench.store.accounts[account.id].rejected
    assert bench.saved[-1]["accounts"][0]["rejected"]


def test_a_revoked_token_is_not_renewed(bench: Bench) -> None:
    account = bench.sign_in()
    bench.upstream.revoke("acct-1")
    error = run(bench.refused())
    assert (error.status, error.code) == (401, "account_auth_expired")
    assert bench.refreshes == []
    assert bench.store.accounts[account.id].rejected
    run(bench.refused())
    assert len(bench.upstream.turns) == 1


@pytest.mark.parametrize("status", [400, 401])
def test_a_dead_refresh_token_is_never_tried_again(bench: Bench, status: int) -> None:
    account = bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", status=status, json=refresh_refused())
    for _ in range(3):
        error = run(bench.refused())
        assert (error.status, error.code) == (401, "account_auth_expired")
        assert "refresh_token_reused" in error.message
    assert len(bench.refreshes) == 1
    assert bench.upstream.turns == []
    assert bench.saved[-1]["accounts"][0]["rejected"] == "refresh_token_reused"
    assert bench.store.accounts[account.id].refresh_token == account.refresh_token


def test_a_new_import_ends_the_rejection(bench: Bench) -> None:
    account = bench.sign_in()
    account.rejected = "refresh_token_reused"
    bench.sign_in()
    assert run(bench.ask()) == "You said: hi"


def test_a_renewal_that_fails_for_now_is_tried_at_the_next_request(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", status=500, json={})
    error = run(bench.refused())
    assert error.status == 502
    assert bench.store.accounts[account.id].rejected == ""
    assert run(bench.ask()) == "You said: hi"
    assert len(bench.refreshes) == 2


def test_a_token_that_still_holds_is_used_when_its_early_renewal_fails(bench: Bench) -> None:
    bench.sign_in(exp=time.time() + 200)
    bench.upstream.script(path="/oauth/token", status=503, json={})
    assert run(bench.ask()) == "You said: hi"
    assert len(bench.refreshes) == 1


def test_a_401_whose_renewal_fails_is_the_failure_of_the_renewal(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(status=401, json=token_refused())
    bench.upstream.script(path="/oauth/token", status=500, json={})
    error = run(bench.refused())
    assert error.status == 502
    assert len(bench.upstream.turns) == 1


def test_a_renewal_without_a_new_refresh_token_keeps_the_old_one(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    before = account.refresh_token
    new = account_file()["access_token"]
    bench.upstream.script(path="/oauth/token", json={"access_token": new, "expires_in": 3600})
    assert run(bench.ask()) == "You said: hi"
    kept = bench.store.accounts[account.id]
    assert (kept.refresh_token, kept.access_token) == (before, new)
    assert kept.id_token


def test_a_token_that_does_not_tell_its_end_lives_as_long_as_the_answer_says(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    bench.upstream.script(
        path="/oauth/token", json={"access_token": "opaque", "expires_in": 1000, "id_token": "x"}
    )
    run(bench.renewals.fresh_account(account))
    assert bench.store.accounts[account.id].expires_at == pytest.approx(time.time() + 1000, abs=5)
    assert bench.store.accounts[account.id].plan == "plus"


# -- Single flight --------------------------------------------------------------------------------


def test_two_hundred_requests_with_an_expired_token_renew_it_once(bench: Bench) -> None:
    bench.sign_in(exp=1.0)

    async def main() -> list[str]:
        return await asyncio.gather(*(bench.ask() for _ in range(200)))

    assert run(main()) == ["You said: hi"] * 200
    assert len(bench.refreshes) == 1
    assert len(bench.saved) == 1


def test_refusals_that_come_late_do_not_renew_a_second_time(bench: Bench) -> None:
    account = bench.sign_in()
    old = f"Bearer {account.access_token}"
    for number in range(40):
        bench.upstream.script(
            status=401,
            json=token_refused(),
            delay=0.01 * number,
            when=lambda seen: seen.headers["authorization"] == old,
        )

    async def main() -> list[str]:
        return await asyncio.gather(*(bench.ask() for _ in range(40)))

    assert run(main()) == ["You said: hi"] * 40
    assert len(bench.refreshes) == 1


def test_all_who_waited_for_a_dead_refresh_token_get_the_same_answer(bench: Bench) -> None:
    bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", status=401, json=refresh_refused(), delay=0.05)

    async def main() -> list[azt.AztError]:
        return await asyncio.gather(*(bench.refused() for _ in range(20)))

    assert {(error.status, error.code) for error in run(main())} == {(401, "account_auth_expired")}
    assert len(bench.refreshes) == 1


def test_the_renewals_of_several_accounts_come_one_after_another(bench: Bench) -> None:
    accounts = azt.to_accounts(
        [account_file(f"acct-{n}", f"user-{n}", exp=1.0) for n in range(5)], time.time()
    )
    running, most = [0], [0]

    def slow(seen: Seen) -> Json:
        running[0] -= 1
        return bench.upstream.rotate(seen)

    def came(seen: Seen) -> bool:
        running[0] += 1
        most[0] = max(most[0], running[0])
        return True

    bench.upstream.script(path="/oauth/token", json=slow, when=came, delay=0.02, times=5)

    async def main() -> None:
        for account in accounts:
            bench.store.add(account)
        await asyncio.gather(*(bench.renewals.fresh_account(account) for account in accounts))

    run(main())
    assert len(bench.refreshes) == 5
    assert most[0] == 1


def test_a_renewal_survives_the_client_that_asked_for_it(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    before = account.refresh_token
    bench.upstream.script(path="/oauth/token", json=bench.upstream.rotate, delay=0.1)

    async def main() -> None:
        asking = asyncio.create_task(bench.ask())
        await until(lambda: bench.refreshes)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: bench.saved)
        assert await bench.ask() == "You said: hi"

    run(main())
    assert len(bench.refreshes) == 1
    assert bench.saved[0]["accounts"][0]["refresh_token"] != before


def test_a_renewal_that_fails_after_its_client_left_makes_no_noise(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", status=500, json={}, delay=0.1)

    async def main() -> None:
        asking = asyncio.create_task(bench.ask())
        await until(lambda: bench.refreshes)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not bench.renewals._refreshes)
        gc.collect()

    run(main())
    assert "never retrieved" not in caplog.text


def test_an_account_that_was_removed_meanwhile_does_not_come_back(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", json=bench.upstream.rotate, delay=0.1)

    async def main() -> None:
        asking = asyncio.create_task(bench.refused())
        await until(lambda: bench.refreshes)
        bench.store.remove(account)
        await asyncio.wait([asking])

    run(main())
    assert bench.store.accounts == {}
    assert all(saved["accounts"] == [] for saved in bench.saved)


def test_a_sign_in_imported_during_a_renewal_is_not_overwritten(bench: Bench) -> None:
    account = bench.sign_in(exp=1.0)
    bench.upstream.script(path="/oauth/token", json=bench.upstream.rotate, delay=0.1)

    async def main() -> azt.Account:
        asking = asyncio.create_task(bench.ask())
        await until(lambda: bench.refreshes)
        imported = bench.sign_in()
        await asyncio.wait([asking])
        return imported

    imported = run(main())
    assert bench.store.accounts[account.id].refresh_token == imported.refresh_token


# -- What is tried again and what is not ----------------------------------------------------------


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "usage limit": ({"status": 429, "json": limit_reached(3600)}, 429, "usage_limit_reached"),
    "bad request": ({"status": 400, "json": error_json("no", code="x")}, 400, "x"),
    "server error": ({"status": 500, "json": {}}, 502, "upstream_error"),
    "overload in the stream": (
        {"events": failed("server_is_overloaded", "busy")},
        503,
        "overloaded",
    ),
}


@pytest.mark.parametrize("how, status, code", REFUSALS.values(), ids=REFUSALS)
def test_with_one_account_a_refusal_is_passed_on(
    bench: Bench, how: dict[str, Any], status: int, code: str
) -> None:
    bench.sign_in()
    bench.upstream.script(**how)
    error = run(bench.refused())
    assert (error.status, error.code) == (status, code)
    assert len(bench.upstream.turns) == 1


ENCRYPTED = error_json(
    "The encrypted content could not be verified.", code="invalid_encrypted_content"
)


@pytest.mark.parametrize(
    "how",
    [
        {"status": 400, "json": ENCRYPTED},
        {"events": failed("invalid_encrypted_content", "could not be verified")},
    ],
    ids=["status", "event"],
)
def test_foreign_reasoning_is_left_out_at_the_second_try(bench: Bench, how: dict[str, Any]) -> None:
    bench.sign_in()
    bench.upstream.script(**how)
    assert run(bench.ask(bench.turn(REASONING, SAID))) == "You said: hi"
    first, second = (seen.body for seen in bench.upstream.turns)
    assert [item["type"] for item in first["input"]] == ["reasoning", "message"]
    assert second == {**first, "input": [SAID]}


def test_foreign_reasoning_is_left_out_only_once(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(status=400, json=ENCRYPTED, times=5)
    error = run(bench.refused(bench.turn(REASONING, SAID)))
    assert (error.status, error.code) == (400, "invalid_encrypted_content")
    assert len(bench.upstream.turns) == 2


def test_without_reasoning_there_is_nothing_to_leave_out(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(status=400, json=ENCRYPTED)
    assert run(bench.refused()).code == "invalid_encrypted_content"
    assert len(bench.upstream.turns) == 1


def test_a_request_that_is_only_reasoning_is_not_emptied(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(status=400, json=ENCRYPTED)
    assert run(bench.refused(bench.turn(REASONING))).status == 400
    assert len(bench.upstream.turns) == 1


def test_a_client_that_leaves_before_the_head_ends_the_upstream_call(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(text("late"), delay=30)

    async def main() -> float:
        asking = asyncio.create_task(bench.ask())
        await until(lambda: bench.upstream.turns)
        left = time.monotonic()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        closed = await asyncio.to_thread(bench.upstream.wait_closed)
        return closed - left

    assert run(main()) < 0.25


def test_a_client_that_leaves_during_the_hold_back_ends_the_upstream_call(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(text("late"), after=2, stall=True)

    async def main() -> float:
        asking = asyncio.create_task(bench.ask(bench.turn(streaming=True)))
        await until(lambda: bench.upstream.turns)
        await asyncio.sleep(0.05)  # the handshake events come
        left = time.monotonic()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        closed = await asyncio.to_thread(bench.upstream.wait_closed)
        return closed - left

    assert run(main()) < 0.25


def test_a_client_that_leaves_just_as_the_head_comes_ends_the_upstream_call(bench: Bench) -> None:
    bench.sign_in()
    bench.upstream.script(text("late"), after=2, stall=True, delay=0.05)

    async def main() -> float:
        asking = asyncio.create_task(bench.ask())
        await until(lambda: bench.upstream.turns)
        time.sleep(0.2)  # noqa: ASYNC251 - the loop is busy while the worker comes back
        left = time.monotonic()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        closed = await asyncio.to_thread(bench.upstream.wait_closed)
        return closed - left

    assert run(main()) < 0.25


def test_a_full_pool_of_threads_is_503_and_asks_nobody(bench: Bench) -> None:
    bench.sign_in()
    bench.rotation._calls = azt.WorkerPool("full", 0, waiting_max=0)
    error = run(bench.refused())
    assert (error.status, error.code) == (503, "overloaded")
    assert bench.upstream.requests == []


def test_a_token_of_one_account_never_goes_out_with_the_id_of_another(bench: Bench) -> None:
    bench.upstream.default = lambda seen: Reply(text("ok"))
    for number in range(3):
        bench.sign_in(**account_file(f"acct-{number}", f"user-{number}"))
    for account_id in list(bench.store.accounts):
        bench.store.active_id = account_id
        assert run(bench.ask()) == "ok"
    for seen in bench.upstream.turns:
        claims = token_claims(seen.headers["authorization"].removeprefix("Bearer "))
        named = claims["https://api.openai.com/auth"]["chatgpt_account_id"]
        assert seen.headers["chatgpt-account-id"] == named


# -- The next account -----------------------------------------------------------------------------

LIMIT: dict[str, Any] = {"status": 429, "json": limit_reached(3600)}
MOVES: dict[str, tuple[dict[str, Any], str]] = {
    "429 usage limit": (LIMIT, "quota_exhausted"),
    "429 of a moment": (
        {"status": 429, "json": error_json("slow", code="rate_limit_exceeded")},
        "rate_limited",
    ),
    "403 plan": (
        {"status": 403, "json": error_json("no", "usage_not_included")},
        "usage_not_included",
    ),
    "402 workspace": (
        {"status": 402, "json": {"detail": {"code": "deactivated_workspace"}}},
        "account_unusable",
    ),
    "limit in the stream": (
        {"events": failed("rate_limit_exceeded", "try again in 2s")},
        "rate_limited",
    ),
}
STANDS_IN = {
    **{str(status): {"status": status, "json": {}} for status in (500, 502, 503, 504, 529)},
    "an HTML page": {"status": 502, "body": b"<html>bad gateway</html>"},
    "overload in the stream": {"events": failed("server_is_overloaded", "busy")},
}


@pytest.mark.parametrize("how, reason", MOVES.values(), ids=MOVES)
def test_the_next_account_serves_where_one_cannot(
    bench: Bench, how: dict[str, Any], reason: str
) -> None:
    first, second, _ = bench.sign_in_many("a", "b", "c")
    bench.upstream.script(account="a", **how)
    turn = bench.turn()
    assert run(bench.ask(turn)) == "You said: hi"
    assert (bench.asked, turn.attempts, turn.account) == (["a", "b"], 2, second)
    assert bench.serving == "b"
    assert first.cooldown_reason == reason and first.cooldown_until > time.time()
    [switch] = bench.rotation.switches
    assert (switch["from"], switch["to"]) == (first.id, second.id)
    assert (switch["reason"], switch["until"]) == (reason, first.cooldown_until)
    assert run(bench.ask()) and bench.asked[-1] == "b"


@pytest.mark.parametrize("how", STANDS_IN.values(), ids=STANDS_IN)
def test_a_server_error_is_tried_once_elsewhere_and_the_account_goes_on_later(
    bench: Bench, how: dict[str, Any]
) -> None:
    first, *_ = bench.sign_in_many("a", "b", "c")
    bench.upstream.script(account="a", **how)
    assert run(bench.ask()) == "You said: hi"
    assert (bench.asked, bench.serving) == (["a", "b"], "a")
    assert bench.rotation.switches[0]["reason"] == "upstream_5xx"
    first.cooldown_until = int(time.time())
    assert run(bench.ask()) and bench.asked[-1] == "a"
    bench.upstream.script(**how, times=3)
    error = run(bench.refused())
    assert error.status in (502, 503) and len(bench.asked) == 5


def test_a_conversation_stays_with_its_account(bench: Bench) -> None:
    first, second = bench.sign_in_many("a", "b")
    bench.upstream.script(account="a", **LIMIT)
    chat, other = bench.turn(keys=("chat",)), bench.turn(keys=("other",))
    assert run(bench.ask(chat))
    bench.store.active_id, first.cooldown_until = first.id, 0
    assert run(bench.ask(other)) and run(bench.ask(chat))
    assert bench.asked == ["a", "b", "a", "b"]


def test_a_conversation_comes_home_after_a_server_error(bench: Bench) -> None:
    first, second = bench.sign_in_many("a", "b")
    chat = bench.turn(keys=("chat", "thread"))
    assert run(bench.ask(chat))
    bench.store.active_id = second.id
    bench.upstream.script(account="a", status=500, json={})
    assert run(bench.ask(bench.turn(keys=("thread",))))
    first.cooldown_until = 0
    assert run(bench.ask(chat))
    assert bench.asked == ["a", "a", "b", "a"]


def test_a_conversation_moves_for_good_with_an_empty_account(bench: Bench) -> None:
    first, second, third = bench.sign_in_many("a", "b", "c")
    assert run(bench.ask(bench.turn(keys=("chat",))))
    bench.upstream.script(account="a", **LIMIT)
    assert run(bench.ask(bench.turn(keys=("chat",))))
    first.cooldown_until, bench.store.active_id = 0, third.id
    assert run(bench.ask(bench.turn(keys=("chat",))))
    assert bench.asked == ["a", "a", "b", "b"]


def test_another_account_does_not_get_reasoning_that_it_cannot_read(bench: Bench) -> None:
    bench.sign_in_many("a", "b")
    assert run(bench.ask(bench.turn(REASONING, SAID, keys=("chat",))))
    bench.upstream.script(account="a", **LIMIT)
    assert run(bench.ask(bench.turn(REASONING, SAID, keys=("chat",))))
    kinds = [[item["type"] for item in seen.body["input"]] for seen in bench.upstream.turns]
    assert kinds == [["reasoning", "message"], ["reasoning", "message"], ["message"]]


def test_the_newest_conversations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "STICKY_MAX", 3)
    sticky = azt.Stickiness()
    for name in "abc":
        sticky.bind([name], name.upper())
    assert sticky.find(["x", "a"]) == "A"
    sticky.bind(["a"], "A")
    sticky.bind(["d", "y" * 5000], "D")
    assert [sticky.find([name]) for name in "abcd"] == ["A", "", "", "D"]
    assert sticky.find(["y" * 5000]) == "D"


# -- What ends the search -------------------------------------------------------------------------


def test_three_accounts_are_tried_and_then_the_client_may_come_again(bench: Bench) -> None:
    bench.sign_in_many("a", "b", "c", "d")
    bench.upstream.script(times=3, **LIMIT)
    error = run(bench.refused())
    assert (error.status, error.code, error.headers["retry-after"]) == (503, "overloaded", "1")
    assert bench.asked == ["a", "b", "c"]
    assert run(bench.ask()) and bench.asked[-1] == "d"


def test_no_try_begins_later_than_twenty_seconds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert azt.LAST_TRY_S == 20.0
    monkeypatch.setattr(azt, "LAST_TRY_S", 0.05)
    bench.sign_in_many("a", "b")
    bench.upstream.script(delay=0.06, **LIMIT)
    run(bench.refused())
    assert bench.asked == ["a"]


@pytest.mark.parametrize(
    "how, status, code",
    [
        ({"status": 400, "json": error_json("no", code="x")}, 400, "x"),
        ({"status": 413, "json": {}}, 413, "request_too_large"),
        ({"events": failed("context_length_exceeded", "too long")}, 400, "context_length_exceeded"),
        ({"status": 404, "json": error_json("?", code="model_not_found")}, 404, "model_not_found"),
        (
            {"status": 403, "body": CHALLENGE_PAGE, "headers": {"cf-mitigated": "challenge"}},
            403,
            "upstream_forbidden",
        ),
        ({"events": text("a"), "after": 1, "cut": True}, 502, "upstream_stream_truncated"),
        ({"status": 200, "body": b"<html>"}, 502, "upstream_error"),
        ({"reset_after": 40}, 502, "upstream_unreachable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_another_account_would_meet_too_is_final(
    bench: Bench, how: dict[str, Any], status: int, code: str
) -> None:
    first, _ = bench.sign_in_many("a", "b")
    bench.upstream.script(**how)
    error = run(bench.refused())
    assert (error.status, error.code) == (status, code)
    assert "<html" not in error.message
    assert bench.asked == ["a"] and bench.serving == "a"
    assert (first.cooldown_until, first.rejected) == (0, "")
    assert not bench.rotation.switches


def test_an_upstream_that_cannot_be_reached_is_said_at_once(bench: Bench) -> None:
    bench.sign_in_many("a", "b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nowhere = {"AZT_CODEX_BASE_URL": f"http://127.0.0.1:{port}"}
    bench.rotation._environment = azt.read_environment({"HOME": "/nowhere", **nowhere})
    begun = time.monotonic()
    turn = bench.turn()
    error = run(bench.refused(turn))
    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert turn.attempts == 1 and time.monotonic() - begun < 1


def test_after_the_first_output_nothing_is_tried_again(bench: Bench) -> None:
    bench.sign_in_many("a", "b")
    bench.upstream.script(failed("server_is_overloaded", "busy", message("part")))
    assert run(bench.refused()).code == "overloaded"
    assert bench.asked == ["a"]


def test_without_the_setting_one_account_answers_for_itself(bench: Bench) -> None:
    first, second = bench.sign_in_many("a", "b")
    bench.rotation.rules = azt.Rules()
    bench.upstream.script(times=2, **LIMIT)
    for _ in range(2):
        error = run(bench.refused())
        assert (error.status, error.code) == (429, "usage_limit_reached")
    assert first.cooldown_reason == "quota_exhausted"
    assert bench.asked == ["a", "a"] and bench.serving == "a"
    first.rejected = "token_revoked"
    assert run(bench.refused()).code == "account_auth_expired"


# -- When nobody can serve ------------------------------------------------------------------------


def test_when_all_are_empty_the_answer_names_the_least_wait(bench: Bench) -> None:
    accounts = bench.sign_in_many("a", "b", "c")
    for account, wait_s in zip(accounts, (9000, 50, 4000), strict=True):
        bench.upstream.script(account=account.label, status=429, json=limit_reached(wait_s))
    error = run(bench.refused())
    assert (error.status, error.code) == (429, "usage_limit_reached")
    assert 45 <= int(error.headers["retry-after"]) <= 50
    assert "x-should-retry" not in error.headers and " b." in error.message
    assert error.extra["resets_at"] == accounts[1].cooldown_until
    accounts[1].cooldown_until += 100
    error = run(bench.refused())
    assert error.headers["x-should-retry"] == "false" and len(bench.asked) == 3


def test_when_all_are_rejected_the_answer_names_one(bench: Bench) -> None:
    bench.sign_in_many("a", "b")
    bench.upstream.revoke("a")
    bench.upstream.revoke("b")
    error = run(bench.refused())
    assert (error.status, error.code) == (401, "account_auth_expired")
    assert "Account a needs to sign in again" in error.message
    assert bench.asked == ["a", "b"]


def test_when_all_are_excluded_the_answer_says_how_to_take_one_back(bench: Bench) -> None:
    accounts = bench.sign_in_many("a", "b")
    bench.rotation.rules = azt.Rules(True, excluded=frozenset(one.id for one in accounts))
    error = run(bench.refused())
    assert (error.status, error.code) == (503, "no_account")
    assert "azt accounts include" in error.message


def test_a_server_error_says_more_than_the_rests_of_others(bench: Bench) -> None:
    bench.sign_in_many("a", "b", "c")
    bench.upstream.script(account="a", events=failed("server_is_overloaded", "busy"))
    bench.upstream.revoke("b")
    bench.upstream.script(account="c", **LIMIT)
    assert run(bench.refused()).code == "overloaded"
    assert bench.asked == ["a", "b", "c"]


# -- How long an account rests --------------------------------------------------------------------

DAY_S = 24 * 3600
WAITS: dict[str, tuple[dict[str, str], Json, int]] = {
    "seconds": ({"retry-after": "120"}, {}, 120),
    "a date": ({"retry-after": "@600"}, {}, 600),
    "nothing": ({}, {}, 300),
    "a huge number": ({"retry-after": "99999999999"}, {}, 7 * DAY_S),
    "a negative number": ({"retry-after": "-5"}, {}, 1),
    "a date that is over": ({"retry-after": "@-600"}, {}, 1),
    "nonsense": ({"retry-after": "soon"}, {}, 300),
    "resets_in_seconds": ({"retry-after": "7"}, {"resets_in_seconds": 4000}, 4000),
    "the window in the headers": (
        {"x-codex-primary-used-percent": "100", "x-codex-primary-reset-after-seconds": "5000"},
        {},
        5000,
    ),
}


@pytest.mark.parametrize("headers, body, wait_s", WAITS.values(), ids=WAITS)
def test_an_account_rests_as_long_as_its_429_says(
    bench: Bench, headers: dict[str, str], body: Json, wait_s: int
) -> None:
    first, _ = bench.sign_in_many("a", "b")
    said = headers.get("retry-after", "")
    if said.startswith("@"):
        headers = {"retry-after": email.utils.formatdate(time.time() + int(said[1:]), usegmt=True)}
    inner = {"error": {"type": "usage_limit_reached", "message": "empty", **body}}
    quiet = {"x-codex-primary-used-percent": "", "x-codex-primary-reset-after-seconds": ""}
    bench.upstream.script(account="a", status=429, json=inner, headers={**quiet, **headers})
    assert run(bench.ask()) == "You said: hi"
    assert first.cooldown_until == pytest.approx(time.time() + wait_s, abs=3)


def test_a_rest_is_not_shortened_by_a_later_failure(bench: Bench) -> None:
    first, _ = bench.sign_in_many("a", "b")
    bench.rotation._blame(first, azt.event_error({"code": "usage_limit_reached"}, time.time()))
    until = first.cooldown_until
    for code in ("rate_limit_exceeded", "server_is_overloaded", "usage_not_included"):
        bench.rotation._blame(first, azt.event_error({"code": code}, time.time()))
    assert (first.cooldown_until, first.cooldown_reason) == (until, "quota_exhausted")


def test_quota_is_learnt_from_headers_events_and_refusals(bench: Bench) -> None:
    first, second = bench.sign_in_many("a", "b")
    used = {"x-codex-primary-used-percent": "100", "x-codex-primary-window-minutes": "300"}
    bench.upstream.script(account="a", headers=used, **LIMIT)
    assert run(bench.ask())
    assert (first.quota["left"], first.quota["source"]) == (0, "response_headers")
    event = {"rate_limits": {"primary": {"used_percent": 30, "window_minutes": 300}}}
    bench.rotation.learn(second, used, event)
    assert (second.quota["left"], second.quota["source"]) == (70, "rate_limit_event")


# -- The pure choice ------------------------------------------------------------------------------

NOW = 1_800_000_000.0
TIMES = st.sampled_from([0, int(NOW) - 10, int(NOW), int(NOW) + 10, int(NOW) + 900])


@st.composite
def accounts_of_all_kinds(draw: st.DrawFn) -> dict[str, azt.Account]:
    found = {}
    for number in range(draw(st.integers(0, 6))):
        account = azt.Account(f"acc_{number}", "x", "y", "a", "r")
        account.rejected = draw(st.sampled_from(["", "", "token_revoked"]))
        account.priority = draw(st.integers(0, 3))
        account.cooldown_until = draw(TIMES)
        account.cooldown_reason = draw(
            st.sampled_from(["quota_exhausted", "rate_limited", "upstream_5xx", "excluded"])
        )
        if draw(st.booleans()):
            windows = [
                {"key": "primary", "minutes": 300, "used": used, "resets_at": draw(TIMES) or 1}
                for used in draw(st.lists(st.sampled_from([0.0, 50.0, 96.0, 97.0, 100.0])))
            ]
            azt.learn_quota(account, {"windows": windows, "captured_at": NOW - 1000})
        found[account.id] = account
    return found


IDS = st.sampled_from([f"acc_{number}" for number in range(7)])
RULES = st.builds(
    azt.Rules,
    st.just(True),
    st.sampled_from(["most_left", "soonest_reset", "priority"]),
    st.just(3),
    st.frozensets(IDS, max_size=2),
)


def rank(account: azt.Account, rules: azt.Rules) -> int:
    """0: nothing hinders it; 1: asked last; 2: never asked."""
    reason, _ = azt.hindrance(account, NOW, rules)
    never = {"login_rejected", "excluded", "quota_exhausted", "rate_limited"}
    return 2 if reason in never else 1 if reason else 0


@given(accounts_of_all_kinds(), RULES, st.lists(IDS, max_size=2), st.sets(IDS, max_size=3))
@settings(max_examples=500)
def test_the_choice_is_the_best_that_can_serve(
    accounts: dict[str, azt.Account], rules: azt.Rules, wanted: list[str], tried: set[str]
) -> None:
    picked = azt.pick_account(accounts, NOW, rules, wanted, tried)
    left = {name: rank(one, rules) for name, one in accounts.items() if name not in tried}
    best = min(left.values(), default=2)
    assert (picked is None) == (best == 2)
    if picked is not None:
        assert left[picked.id] == best
        welcome = [name for name in wanted if left.get(name) == 0]
        assert picked.id == welcome[0] if welcome else True


@given(accounts_of_all_kinds(), RULES)
@settings(max_examples=300)
def test_every_wait_ends(accounts: dict[str, azt.Account], rules: azt.Rules) -> None:
    for account in accounts.values():
        reason, until = azt.hindrance(account, NOW, rules)
        if until:
            assert until > NOW and azt.hindrance(account, until, rules)[1] in (0, NOW + 900)
        else:
            assert reason in ("", "login_rejected", "excluded")


def known(name: str, used: float, resets_at: float, priority: int = 0) -> azt.Account:
    account = azt.Account(name, "x", "y", "a", "r", priority=priority)
    window = {"key": "primary", "minutes": 300, "used": used, "resets_at": int(resets_at)}
    azt.learn_quota(account, {"windows": [window], "captured_at": int(NOW)})
    return account


@pytest.mark.parametrize(
    "order, queue", [("most_left", "bacdn"), ("soonest_reset", "dcabn"), ("priority", "dcban")]
)
def test_each_order_ranks_the_accounts(order: str, queue: str) -> None:
    accounts = {
        "a": known("a", 40, NOW + 200),
        "n": azt.Account("n", "x", "y", "a", "r"),
        "b": known("b", 10, NOW + 300, 3),
        "c": known("c", 60, NOW + 100, 2),
        "d": known("d", 98, NOW + 50, 1),
    }
    found: list[str] = []
    while account := azt.pick_account(accounts, NOW, azt.Rules(True, order), (), found):
        found.append(account.id)
    assert "".join(found) == queue


def test_an_account_is_left_before_it_is_empty_and_asked_again_when_all_are() -> None:
    low, full = known("low", 97, NOW + 100), known("full", 40, NOW + 100)
    accounts, rules = {"low": low, "full": full}, azt.Rules(True, "most_left", 3)
    assert azt.pick_account(accounts, NOW, rules, ("low",)) is full
    assert azt.pick_account(accounts, NOW + 101, rules, ("low",)) is low
    full.cooldown_until, full.cooldown_reason = int(NOW + 9), "rate_limited"
    assert azt.pick_account(accounts, NOW, rules, ("low",)) is low


# -- Over real sockets ----------------------------------------------------------------------------


def test_five_accounts_of_which_three_fail_serve_without_an_error(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    """500 requests, 16 at once: 100 while each of the five is the serving one."""
    kinds = {"ok": "ok", "empty": "ok", "revoked": "ok", "expired": "expired", "busy": "ok"}
    entries = [
        account_file(kind, f"user-{kind}", exp=1.0 if kind == "expired" else None) | {"label": kind}
        for kind in kinds
    ]
    upstream.revoke("revoked")
    upstream.script(account="empty", status=429, json=limit_reached(9000), times=500)
    upstream.script(failed("server_is_overloaded", "busy"), account="busy", times=500)
    gateway = new_gateway(accounts=[])
    client, proof = Client(gateway.url), gateway.proof()

    def admin(method: str, path: str, body: Json) -> Answer:
        answer = client.request(method, f"/_gateway/admin{path}", body, headers=proof)
        assert answer.status == 200, answer.body
        return answer

    admin("POST", "/accounts/import", {"payload": entries})
    admin("PATCH", "/settings", {"values": {"autoSwitch": {"enabled": True, "order": "priority"}}})
    for serving, expected in kinds.items():
        admin("POST", f"/accounts/{serving}/activate", {})
        with ThreadPoolExecutor(16) as threads:
            answers = list(
                threads.map(lambda n: client.chat(f"no {n}", stream=n % 2 > 0), range(100))
            )
        assert {answer.status for answer in answers} == {200}
        assert {answer.headers["x-azt-account"] for answer in answers} == {expected}
        said = [one.content if one.is_stream else one.message["content"] for one in answers]
        assert said == [f"You said: no {n}" for n in range(100)]
    assert len([seen for seen in upstream.requests if seen.path == "/oauth/token"]) == 1
    state = client.get("/_gateway/admin/state", headers=proof).json
    switches = [(one["from"], one["reason"]) for one in state["routing"]["switches"]]
    names = {one["label"]: one["id"] for one in state["accounts"]}
    reasons = {"empty": "quota_exhausted", "revoked": "login_rejected", "busy": "upstream_5xx"}
    assert set(switches) == {(names[label], reason) for label, reason in reasons.items()}
    assert "switched from empty to ok: quota_exhausted until 20" in gateway.log()
