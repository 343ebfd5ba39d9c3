"""Renewals over a real home: what is on disk before a token is used, and who else may have it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import (
    FakeUpstream,
    Refused,
    Seen,
    account_file,
    make_token,
    refresh_refused,
)
from harness import MODEL, Client, Gateway, eventually, home_variables

import azt

Json = dict[str, Any]


class Home:
    """A loaded gateway in this process, on a home of its own."""

    def __init__(self, home: Path, upstream: FakeUpstream) -> None:
        self.home, self.upstream = home, upstream
        (home / ".codex").mkdir(exist_ok=True)
        variables = {**home_variables(home), **upstream.environment()}
        self.environment = azt.read_environment(variables)
        self.paths = self.environment.paths
        self.gateway: Any = None
        self.restart()

    def restart(self) -> None:
        """As after a kill: nothing is left but the disk."""
        self.close()
        self.gateway = azt.Gateway(self.environment, {})
        self.gateway.load()

    def close(self) -> None:
        if self.gateway is not None:
            self.gateway.pool.close()

    def sign_in(self, exp: float | None = 1.0, **fields: Any) -> Json:
        entry = {**account_file(exp=exp), **fields}
        self.change(lambda store: [store.add(one) for one in azt.to_accounts([entry], 0.0)])
        return entry

    def change(self, change: Callable[[azt.AccountStore], Any]) -> None:
        asyncio.run(self.gateway.change_accounts(change))

    def renew(self, refused: str = "") -> azt.Account:
        return asyncio.run(self.gateway.renewals.fresh_account(self.account, refused))

    def refused(self) -> azt.AztError:
        with pytest.raises(azt.AztError) as caught:
            self.renew()
        return caught.value

    @property
    def account(self) -> azt.Account:
        [account] = self.gateway.store.accounts.values()
        return account

    @property
    def saved(self) -> list[Json]:
        saved = azt.read_json(self.paths.accounts, 1)
        return saved["accounts"] if saved else []

    @property
    def journal(self) -> list[Json]:
        path = self.paths.renewals
        lines: list[Json] = json.loads(path.read_bytes())["lines"] if path.exists() else []
        return lines

    @property
    def sent(self) -> list[str]:
        """The refresh tokens that went out."""
        return [one.body["refresh_token"] for one in self.upstream.requests if one.body]

    def codex(self, content: bytes | Json) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.paths.codex_auth.write_bytes(raw)


def codex_file(entry: Json) -> Json:
    names = ("id_token", "access_token", "refresh_token", "account_id")
    return {
        "auth_mode": "chatgpt",
        "OPENAI_API_KEY": None,
        "tokens": {name: entry[name] for name in names},
        "last_refresh": "2026-11-22T20:07:07.344251161Z",
    }


def issued(seconds: float, exp: float | None = None, **who: str) -> Json:
    """An account whose token was issued so long after now."""
    token = make_token(exp=exp, iat=time.time() + seconds, **who)
    return {**account_file(exp=exp, **who), "access_token": token, "id_token": token}


@pytest.fixture
def place(home: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setattr(azt, "LOST_ANSWER_PAUSE_S", 0.05)
    made = Home(home, upstream)
    yield made
    made.close()


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    for _ in iter(lambda: bool(condition()), True):
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.005)


def block(path: Path) -> Callable[[], None]:
    """Nothing can be saved here any more, until the result is called."""
    path.unlink(missing_ok=True)
    path.mkdir()
    return path.rmdir


# -- The journal ----------------------------------------------------------------------------------


def test_the_intent_is_on_disk_before_the_call_and_the_answer_before_anyone_uses_it(
    place: Home,
) -> None:
    old = place.sign_in()["refresh_token"]
    seen: list[list[Json]] = []

    def look(request: Seen) -> Json:
        seen.append(place.journal)
        return place.upstream.rotate(request)

    place.upstream.script(path="/oauth/token", json=look)
    kept: list[list[Json]] = []

    async def slow_save() -> None:
        kept.append(place.journal)
        await place.gateway.save_accounts()

    place.gateway.renewals._save = slow_save
    new = place.renew().refresh_token

    [[intent]], [[answer]] = seen, kept
    assert intent["used"] == answer["used"] == azt._fingerprint(old)
    assert "refresh_token" not in intent and old not in json.dumps([intent, answer])
    assert answer["refresh_token"] == new != old
    assert place.journal == []
    assert place.saved[0]["refresh_token"] == new
    assert new not in place.paths.renewals.with_name("renewals.json.bak").read_text()


def test_an_answer_that_only_the_journal_has_is_used_after_a_restart(place: Home) -> None:
    place.sign_in()
    mend = block(place.paths.accounts)
    new = place.renew()
    assert place.journal[0]["refresh_token"] == new.refresh_token
    mend()
    azt.write_json(
        place.paths.accounts, azt.read_json(Path(f"{place.paths.accounts}.bak"), 1) or {}
    )
    assert place.saved[0]["refresh_token"] != new.refresh_token

    place.restart()

    for name in ("access_token", "refresh_token", "id_token", "expires_at", "plan"):
        assert getattr(place.account, name) == getattr(new, name) == place.saved[0][name]
    assert (place.journal, len(place.sent)) == ([], 1)


def test_answers_that_built_on_each_other_are_all_taken_from_the_journal(place: Home) -> None:
    place.sign_in()
    mend = block(place.paths.accounts)
    place.renew()
    newest = place.renew(refused=place.account.access_token).refresh_token
    assert len(place.journal) == 2
    mend()
    azt.write_json(
        place.paths.accounts, azt.read_json(Path(f"{place.paths.accounts}.bak"), 1) or {}
    )
    place.restart()
    assert place.account.refresh_token == place.saved[0]["refresh_token"] == newest


def killed_in_a_call(place: Home) -> str:
    """As if the process had ended between the intent and the answer."""
    old: str = place.sign_in()["refresh_token"]
    line = {"account": place.account.id, "used": azt._fingerprint(old), "at": int(time.time())}
    place.gateway.renewals._note(line)
    return old


def test_after_a_kill_in_the_call_the_old_token_is_tried_once(
    place: Home, caplog: pytest.LogCaptureFixture
) -> None:
    old = killed_in_a_call(place)
    place.restart()
    assert place.renew().refresh_token != old
    assert place.sent == [old]
    assert "tried once more" in caplog.text


def test_a_renewal_that_was_refused_is_not_taken_for_one_that_was_cut_off(
    place: Home, caplog: pytest.LogCaptureFixture
) -> None:
    place.sign_in()
    place.upstream.script(path="/oauth/token", status=401, json=refresh_refused())
    assert place.refused().status == 401
    caplog.clear()
    place.restart()
    assert place.account.rejected
    assert "tried once more" not in caplog.text


def test_a_token_that_the_killed_call_had_used_up_ends_in_a_sign_in_and_no_loop(
    place: Home,
) -> None:
    old = killed_in_a_call(place)
    place.upstream._used.add(old)
    place.restart()
    for _ in range(3):
        assert place.refused().code == "account_auth_expired"
    place.restart()
    assert place.refused().code == "account_auth_expired"
    assert place.sent == [old]
    assert place.saved[0]["rejected"] == "refresh_token_reused"


def test_a_journal_of_an_account_that_has_left_is_no_news(place: Home) -> None:
    killed_in_a_call(place)
    place.change(lambda store: store.remove(place.account))
    place.restart()
    assert (place.gateway.store.accounts, place.journal) == ({}, [])


def test_calls_that_fail_leave_one_line_in_the_journal(place: Home) -> None:
    place.sign_in()
    for _ in range(5):
        place.upstream.script(path="/oauth/token", status=503, json={})
        assert place.refused().status == 502
    assert len(place.journal) == 1


# -- A disk that fails ----------------------------------------------------------------------------


def test_a_full_disk_stops_no_renewal_and_the_console_can_say_so(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = new_gateway(accounts=[account_file(exp=1.0)])
    client = Client(gateway.url)
    mend = [block(gateway.state / name) for name in ("accounts.json", "renewals.json")]
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}

    answers = [client.post("/v1/chat/completions", asked).status for _ in range(3)]
    notices = client.get("/_gateway/admin/state").json["notices"]
    for one in mend:
        one()
    eventually(lambda: not client.get("/_gateway/admin/state").json["notices"], 20)

    assert answers == [200] * 3
    assert len(upstream.rotations) == 1
    assert [one["code"] for one in notices] == ["accounts_unsaved"]
    assert "accounts.json" in notices[0]["params"]["why"]
    saved = azt.read_json(gateway.state / "accounts.json", 1)
    assert saved is not None
    assert saved["accounts"][0]["refresh_token"] == upstream.rotations[0][1]
    assert "only in memory" in gateway.log() and "on disk again" in gateway.log()


def test_the_last_chance_to_save_is_taken_when_the_gateway_stops(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = new_gateway(accounts=[account_file(exp=1.0)])
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    mend = block(gateway.state / "accounts.json")
    assert Client(gateway.url).post("/v1/chat/completions", asked).status == 200
    eventually(lambda: "again in 1 s" in gateway.log())
    mend()
    assert gateway.stop() == 0
    saved = azt.read_json(gateway.state / "accounts.json", 1)
    assert saved and saved["accounts"][0]["refresh_token"] == upstream.rotations[0][1]


def test_a_renewal_under_way_ends_before_the_gateway_does(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = new_gateway(accounts=[account_file(exp=1.0)])
    upstream.script(path="/oauth/token", json=upstream.rotate, delay=1.0)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever it gets from a gateway that stops
            Client(gateway.url).post("/v1/chat/completions", asked)

    asking = threading.Thread(target=ask)
    asking.start()
    upstream.wait_until(lambda: upstream.requests)
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.wait(10)
    asking.join()

    saved = azt.read_json(gateway.state / "accounts.json", 1)
    assert saved and saved["accounts"][0]["refresh_token"] == upstream.rotations[0][1]


def test_the_end_waits_for_a_renewal_and_then_for_the_disk(place: Home) -> None:
    place.sign_in()
    place.upstream.script(path="/oauth/token", json=place.upstream.rotate, delay=0.2)
    mend, renewals = block(place.paths.accounts), place.gateway.renewals

    async def end() -> list[bool]:
        asking = asyncio.create_task(renewals.fresh_account(place.account, ""))
        await until(lambda: place.sent)
        await renewals.settle()
        seen = [asking.done(), bool(renewals.unsaved)]
        mend()
        await renewals.settle()
        return [*seen, bool(renewals.unsaved)]

    assert asyncio.run(end()) == [True, True, False]
    assert place.saved[0]["refresh_token"] == place.upstream.rotations[0][1]


# -- An answer that never came --------------------------------------------------------------------


def test_a_lost_answer_is_asked_for_once_more_with_the_old_token(place: Home) -> None:
    old = place.sign_in()["refresh_token"]
    place.upstream.script(path="/oauth/token", reset_after=20)
    assert place.renew().refresh_token != old
    assert place.sent == [old, old]


def test_two_lost_answers_are_an_error_for_now_and_nothing_is_given_up(place: Home) -> None:
    old = place.sign_in()["refresh_token"]
    place.upstream.script(path="/oauth/token", reset_after=20, times=2)
    assert place.refused().status == 502
    assert (place.account.refresh_token, place.account.rejected) == (old, "")
    assert place.sent == [old, old]
    assert place.renew().refresh_token != old


def swallow(upstream: FakeUpstream) -> None:
    """The provider uses the token up, and its answer gets lost."""
    upstream.script(path="/oauth/token", json=upstream.rotate, reset_after=20)


def test_an_answer_that_was_lost_for_good_ends_in_a_sign_in(place: Home) -> None:
    place.sign_in()
    swallow(place.upstream)
    assert place.refused().code == "account_auth_expired"
    assert place.account.rejected == "refresh_token_reused"
    assert len(place.sent) == 2


# -- Codex has it too -----------------------------------------------------------------------------


def test_a_newer_sign_in_of_codex_is_taken_over_without_a_call(place: Home) -> None:
    place.sign_in()
    newer = issued(60)
    place.codex(codex_file(newer))
    assert place.renew().refresh_token == newer["refresh_token"]
    assert place.saved[0]["access_token"] == newer["access_token"]
    assert place.sent == []


def test_a_newer_sign_in_of_codex_is_taken_over_after_a_401(place: Home) -> None:
    place.sign_in(exp=None)
    newer = issued(60)
    place.codex(codex_file(newer))
    assert place.renew(refused=place.account.access_token).access_token == newer["access_token"]
    assert place.sent == []


def test_a_newer_sign_in_of_codex_that_ends_soon_is_renewed_itself(place: Home) -> None:
    place.sign_in()
    newer = issued(60, exp=time.time() + 100)
    place.codex(codex_file(newer))
    place.renew()
    assert place.sent == [newer["refresh_token"]]
    assert place.saved[0]["refresh_token"] == place.upstream.rotations[0][1]


def test_what_codex_renewed_while_azt_was_away_is_taken_over_at_the_start(place: Home) -> None:
    place.sign_in(exp=None)
    place.account.rejected = "refresh_token_reused"
    newer = issued(60)
    place.codex(codex_file(newer))
    place.restart()
    assert place.account.refresh_token == newer["refresh_token"] == place.saved[0]["refresh_token"]
    assert place.account.rejected == ""


def test_a_token_that_codex_has_used_up_is_replaced_by_the_one_it_got(place: Home) -> None:
    entry = place.sign_in()
    theirs = issued(0)

    def used_up(_seen: Seen) -> Json:
        place.codex(codex_file(theirs))  # meanwhile
        raise Refused(401, refresh_refused())

    place.upstream.script(path="/oauth/token", json=used_up)
    assert place.renew().refresh_token == theirs["refresh_token"]
    assert place.account.rejected == ""
    assert place.sent == [entry["refresh_token"]]


def test_a_lost_answer_is_made_good_by_what_codex_has(place: Home) -> None:
    entry = place.sign_in()
    theirs = issued(60)

    def lost(seen: Seen) -> Json:
        place.codex(codex_file(theirs))
        return place.upstream.rotate(seen)

    place.upstream.script(path="/oauth/token", json=lost, reset_after=20)
    assert place.renew().refresh_token == theirs["refresh_token"]
    assert place.sent == [entry["refresh_token"]]


FOREIGN = {
    "another account": codex_file(issued(60, account_id="acct-2")),
    "another person": codex_file(issued(60, user_id="user-2")),
    "an api key": {"auth_mode": "apikey", "OPENAI_API_KEY": "sk-1", "tokens": None},
    "an older one": codex_file(issued(-3600)),
    "empty": b"",
    "torn": json.dumps(codex_file(issued(60))).encode()[:-20],
    "no object": b"[1, 2]",
    "no tokens": b'{"tokens": {}}',
    "tokens of another type": b'{"tokens": {"access_token": 1, "refresh_token": []}}',
    "too large": json.dumps(codex_file(issued(60))).encode() + b" " * 2**20,
    "too deep": b'{"tokens":' * 5000,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_another_or_a_broken_sign_in_of_codex_is_left_alone(
    place: Home, content: bytes | Json
) -> None:
    old = place.sign_in()["refresh_token"]
    place.codex(content)
    before = place.paths.codex_auth.read_bytes()
    place.restart()
    assert place.account.refresh_token == old
    place.renew()
    assert place.sent == [old]
    assert place.paths.codex_auth.read_bytes() == before


@pytest.mark.parametrize("kind", ["fifo", "folder", "of another user"])
def test_what_is_no_file_of_ours_in_the_place_of_auth_json_is_left_alone(
    place: Home, kind: str
) -> None:
    place.sign_in()
    path = place.paths.codex_auth
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif os.getuid() != 0:
        pytest.skip("only root can give files away")
    else:
        place.codex(codex_file(issued(60)))
        os.chown(path, 65534, 65534)
    place.restart()
    place.renew()
    assert len(place.sent) == 1


def test_an_auth_json_behind_a_link_is_read(place: Home, tmp_path: Path) -> None:
    place.sign_in()
    newer = issued(60)
    (tmp_path / "dotfiles.json").write_text(json.dumps(codex_file(newer)))
    place.paths.codex_auth.symlink_to(tmp_path / "dotfiles.json")
    assert place.renew().refresh_token == newer["refresh_token"]


def test_a_renewal_waits_for_the_program_that_renews_already(place: Home) -> None:
    place.sign_in()
    newer = issued(60)
    holder = os.open(place.paths.codex_auth.parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def end() -> None:
        place.codex(codex_file(newer))
        os.close(holder)

    timer = threading.Timer(0.3, end)
    timer.start()
    assert place.renew().refresh_token == newer["refresh_token"]
    assert place.sent == []
    timer.join()


def test_a_program_that_never_lets_go_stops_no_renewal(place: Home) -> None:
    lock = Path(f"{place.paths.codex_auth}.lock")
    lock.write_text("")
    with lock.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        started = time.monotonic()
        azt.lock_codex(place.paths, 0.2).close()
        assert 0.2 <= time.monotonic() - started < 2
    assert sorted(one.name for one in place.paths.codex_auth.parent.iterdir()) == [lock.name]


def test_who_wants_to_know_is_told_while_other_programs_wait(place: Home) -> None:
    old = place.sign_in()["refresh_token"]
    told: list[tuple[str, str, bool]] = []

    async def note(account: azt.Account, used: str) -> None:
        other = os.open(place.paths.codex_auth.parent, os.O_RDONLY)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = False
        except BlockingIOError:
            is_held = True
        os.close(other)
        told.append((account.refresh_token, used, is_held))

    place.gateway.renewals.on_renewed = note
    new = place.renew().refresh_token
    assert told == [(new, old, True)]


# -- Changes by the person meanwhile --------------------------------------------------------------


def during_a_renewal(
    place: Home, act: Callable[[azt.Gateway], Awaitable[Any]]
) -> azt.AztError | None:
    """Renew, and act while the provider takes its time. The error of the renewal, if any."""
    place.upstream.script(path="/oauth/token", json=place.upstream.rotate, delay=0.2)

    async def main() -> azt.AztError | None:
        renewals = place.gateway.renewals
        task = asyncio.create_task(renewals.fresh_account(place.account))
        await until(lambda: place.upstream.requests)
        await act(place.gateway)
        try:
            await task
        except azt.AztError as error:
            return error
        return None

    return asyncio.run(main())


def test_a_removed_account_does_not_come_back_and_its_token_is_dropped_with_a_word(
    place: Home, caplog: pytest.LogCaptureFixture
) -> None:
    place.sign_in(label="work")
    account = place.account
    during_a_renewal(place, lambda gw: gw.change_accounts(lambda store: store.remove(account)))
    assert (place.gateway.store.accounts, place.saved, place.journal) == ({}, [], [])
    assert "the new tokens of work are dropped" in caplog.text
    new = place.upstream.rotations[0][1]
    assert not any(new in one.read_text() for one in place.paths.state.iterdir())


def test_a_removal_that_is_taken_back_keeps_the_new_tokens(place: Home) -> None:
    place.sign_in()
    account = place.account

    async def remove(gateway: azt.Gateway) -> None:
        mend = block(place.paths.accounts)
        slow = threading.Event()
        stuck = asyncio.ensure_future(azt.in_thread(gateway.files, slow.wait))
        change = gateway.change_accounts(lambda store: store.remove(account))
        removal = asyncio.create_task(change)
        await until(lambda: place.upstream.rotations)
        await asyncio.sleep(0.1)  # the answer is here, and waits for the change to end
        slow.set()
        await stuck
        with pytest.raises(azt.AztError):
            await removal
        mend()

    during_a_renewal(place, remove)
    new = place.upstream.rotations[0][1]
    assert place.account.refresh_token == new
    asyncio.run(place.gateway.renewals.keep())
    assert place.saved[0]["refresh_token"] == new


def test_a_sign_in_that_comes_during_a_renewal_stays(place: Home) -> None:
    place.sign_in()
    [newer] = azt.to_accounts([account_file()], time.time())
    during_a_renewal(place, lambda gw: gw.change_accounts(lambda store: store.add(newer)))
    assert place.account.refresh_token == newer.refresh_token == place.saved[0]["refresh_token"]


def test_the_same_sign_in_imported_during_a_renewal_takes_nothing_away(place: Home) -> None:
    entry = place.sign_in()
    [again] = azt.to_accounts([{**entry, "access_token": make_token(exp=2.0)}], time.time())
    during_a_renewal(place, lambda gw: gw.change_accounts(lambda store: store.add(again)))
    new = place.upstream.rotations[0][1]
    assert place.account.refresh_token == new == place.saved[0]["refresh_token"]


def test_a_label_and_a_choice_made_during_a_renewal_stay(place: Home) -> None:
    place.sign_in()

    def change(store: azt.AccountStore) -> None:
        place.account.label, place.account.priority = "work", 3

    during_a_renewal(place, lambda gw: gw.change_accounts(change))
    [saved] = place.saved
    assert (saved["label"], saved["priority"]) == ("work", 3)
    assert saved["refresh_token"] == place.upstream.rotations[0][1]


def test_a_dead_answer_for_the_old_sign_in_does_not_reject_the_new_one(place: Home) -> None:
    place.sign_in()
    [newer] = azt.to_accounts([account_file()], time.time())
    place.upstream._used.add(place.account.refresh_token)
    error = during_a_renewal(place, lambda gw: gw.change_accounts(lambda store: store.add(newer)))
    assert (error, place.account.rejected) == (None, "")


# -- When it fails for now ------------------------------------------------------------------------


def test_an_early_renewal_that_failed_rests_while_the_token_holds(
    place: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.sign_in(exp=time.time() + 200)
    place.upstream.script(path="/oauth/token", status=503, json={}, times=9)
    for _ in range(5):
        place.renew()
    assert len(place.sent) == 1
    monkeypatch.setattr(azt, "EARLY_RETRY_S", 0.0)
    place.gateway.renewals._rests_until_s.clear()
    place.renew()
    place.renew()
    assert len(place.sent) == 3


def test_a_rest_is_no_reason_to_go_on_with_a_token_that_was_refused(place: Home) -> None:
    place.sign_in(exp=time.time() + 200)
    place.upstream.script(path="/oauth/token", status=503, json={})
    place.renew()
    refused = place.account.access_token
    assert place.renew(refused=refused).access_token != refused


# -- Homes that cannot be used --------------------------------------------------------------------


def start(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    gateway = Gateway(home, variables, [])
    return gateway.azt("accounts", "list")


def test_a_home_that_is_a_link_is_named_and_exit_is_2(home: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (home / ".ai-zero-token").symlink_to(tmp_path / "elsewhere")
    done = start(home)
    assert done.returncode == 2
    assert "symbolic link" in done.stderr and "AI_ZERO_TOKEN_HOME" in done.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_home_below_a_file_is_named_and_exit_is_2(home: Path) -> None:
    (home / "file").write_text("")
    done = start(home, AI_ZERO_TOKEN_HOME=str(home / "file" / "home"))
    assert done.returncode == 2
    assert "cannot be used" in done.stderr and "AI_ZERO_TOKEN_HOME" in done.stderr


def test_a_home_below_a_folder_that_is_missing_is_made(home: Path) -> None:
    done = start(home, AI_ZERO_TOKEN_HOME=str(home / "not" / "yet" / "there"))
    assert done.returncode == 0
    assert (home / "not" / "yet" / "there" / ".state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "variables",
    [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"HOME": ""}, {"AI_ZERO_TOKEN_HOME": "C:\\azt\\home"}],
    ids=["locale C", "no HOME", "a path of Windows"],
)
def test_it_starts_in_an_odd_environment(home: Path, variables: Json) -> None:
    done = start(home, **variables)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_beside_a_gateway_takes_no_file_away_that_is_being_written(
    new_gateway: Callable[..., Gateway],
) -> None:
    gateway = new_gateway()
    half = gateway.state / ".accounts.json.0123456789abcdef.tmp"
    half.write_text("half")
    assert gateway.azt("accounts", "list").returncode == 0
    assert half.exists()
    gateway.stop()
    assert gateway.azt("accounts", "list").returncode == 0
    assert not half.exists()
