"""Choosing an account and renewing its sign-in: once, saved before use, never with a dead token."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from fake_upstream import (
    FakeUpstream,
    Reply,
    Seen,
    account_file,
    error_json,
    failed,
    limit_reached,
    refresh_refused,
    text,
    token_claims,
    token_refused,
)

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

    def turn(self, *items: Json, streaming: bool = False) -> azt.Turn:
        asked = azt.chat_to_responses(
            {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}, {}, ""
        )
        body = {**asked.upstream, **({"input": list(items)} if items else {})}
        return azt.Turn(
            azt.encode_json(body), "s-1", streaming, lambda: azt.ChatStream(asked, time.time())
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
    assert (switch.from_id, switch.to_id) == (first.id, second.id)
    assert (switch.reason, switch.until) == (reason, first.cooldown_until)
    assert run(bench.ask()) and bench.asked[-1] == "b"


@pytest.mark.parametrize("how", STANDS_IN.values(), ids=STANDS_IN)
def test_a_server_error_is_tried_once_elsewhere_and_the_account_goes_on_later(
    bench: Bench, how: dict[str, Any]
) -> None:
    first, *_ = bench.sign_in_many("a", "b", "c")
    bench.upstream.script(account="a", **how)
    assert run(bench.ask()) == "You said: hi"
    assert (bench.asked, bench.serving) == (["a", "b"], "a")
    assert bench.rotation.switches[0].reason == "upstream_5xx"
    first.cooldown_until = int(time.time())
    assert run(bench.ask()) and bench.asked[-1] == "a"
    bench.upstream.script(**how, times=3)
    error = run(bench.refused())
    assert error.status in (502, 503) and len(bench.asked) == 5


def test_a_conversation_stays_with_its_account(bench: Bench) -> None:
    first, second = bench.sign_in_many("a", "b")
    bench.upstream.script(account="a", **LIMIT)
    chat, other = (bench.turn() for _ in range(2))
    chat.keys, other.keys = ("chat",), ("other",)
    assert run(bench.ask(chat))
    bench.store.active_id, first.cooldown_until = first.id, 0
    assert run(bench.ask(other)) and run(bench.ask(chat))
    assert bench.asked == ["a", "b", "a", "b"]
