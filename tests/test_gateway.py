"""State under stress: parallel changes, failing saves, damaged files; changes in force at once."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Json, account_file
from harness import Answer, Client, Gateway, chat_body, eventually

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
ADA = account_file()
BO = account_file("acct-2", "user-2", "bo@example.com", "pro")


# -- Set-up ---------------------------------------------------------------------------------------


class Admin(Client):
    """Calls of the owner."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.url)
        self.state = gateway.state
        self._proof = gateway.proof()

    def call(self, method: str, path: str, json: Any = None) -> Answer:
        return self.request(method, ADMIN + path, json, headers=self._proof)

    def read(self, path: str) -> Any:
        return self.call("GET", path).json

    def set(self, **values: Any) -> Answer:
        """Dots are written as double underscores: `log__level="debug"`."""
        named = {key.replace("__", "."): value for key, value in values.items()}
        return self.call("PATCH", "/settings", {"values": named})

    def saved(self, name: str) -> Json:
        value: Json = json.loads((self.state / name).read_text())
        return value


@pytest.fixture
def admin(new_gateway: NewGateway) -> Admin:
    gateway = new_gateway(accounts=[])
    made = Admin(gateway)
    assert made.call("POST", "/accounts/import", {"payload": [ADA, BO]}).status == 200
    return made


# -- Many changes at once -------------------------------------------------------------------------


def test_parallel_changes_are_all_kept(admin: Admin) -> None:
    def work(number: int) -> Any:
        kind = number % 4
        if kind == 0:
            return admin.call("POST", "/keys", {"name": f"key {number}"})
        if kind == 1:
            return admin.set(**{"server.allowedHosts": [f"host-{number}"]})
        if kind == 2:
            return admin.set(limits__bodyMb=number)
        return admin.get("/_gateway/health")

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(work, range(1, 121)))

    keys = [one.json for one in answers if one.status == 201]
    assert {one.status for one in answers} == {200, 201}
    assert len(keys) == 30
    assert [one["first"] for one in keys].count(True) == 1
    listed, settings = admin.read("/keys")["items"], admin.read("/settings")
    assert {one["name"] for one in listed} == {one["item"]["name"] for one in keys}
    assert [one["id"] for one in admin.saved("keys.json")["keys"]] == [one["id"] for one in listed]
    for one in keys:
        bearer = {"Authorization": f"Bearer {one['key']}"}
        assert admin.get("/v1/models", headers=bearer).status == 200
    saved = admin.saved("settings.json")
    assert settings["revision"] == saved["revision"] == 60
    assert settings["values"]["limits"]["bodyMb"] == saved["values"]["limits.bodyMb"]
    hosts = settings["values"]["server"]["allowedHosts"]
    assert hosts == saved["values"]["server.allowedHosts"] != []


def test_two_changes_of_one_revision_are_one_change_and_one_refusal(admin: Admin) -> None:
    revision = admin.read("/settings")["revision"]

    def change(megabytes: int) -> int:
        body = {"revision": revision, "values": {"limits.bodyMb": megabytes}}
        return admin.call("PATCH", "/settings", body).status

    with ThreadPoolExecutor(8) as threads:
        statuses = sorted(threads.map(change, range(1, 9)))

    assert statuses == [200] + [409] * 7


def test_accounts_change_while_requests_run(admin: Admin, upstream: FakeUpstream) -> None:
    ids = [one["id"] for one in admin.read("/accounts")["items"]]

    def work(number: int) -> int:
        if number % 3:
            return admin.chat(f"question {number}").status
        return admin.call("POST", f"/accounts/{ids[number % 2]}/activate", {}).status

    with ThreadPoolExecutor(12) as threads:
        statuses = list(threads.map(work, range(60)))

    assert set(statuses) == {200}
    assert len(upstream.turns) == 40
    shown = admin.read("/accounts")["items"]
    assert [one["id"] for one in shown if one["active"]] == [
        admin.saved("accounts.json")["active_id"]
    ]


def in_process(home: Path) -> azt.Gateway:
    """A loaded gateway in this process: what a client cannot time from outside."""
    environment = azt.read_environment({"AI_ZERO_TOKEN_HOME": str(home), "HOME": str(home)})
    gateway = azt.Gateway(environment, {})
    gateway.load()
    return gateway


@pytest.mark.parametrize("what", ["keys", "settings", "accounts"])
def test_a_change_whose_client_leaves_is_in_force_and_on_disk_alike(home: Path, what: str) -> None:
    gateway = in_process(home)
    (account,) = azt.to_accounts([ADA], 0.0)
    changes: dict[str, Callable[[], Any]] = {
        "keys": lambda: gateway.change_keys(lambda keys: [*keys, {"id": "key_1", "hash": "0"}]),
        "settings": lambda: gateway.change_settings({"limits.bodyMb": 7}),
        "accounts": lambda: gateway.change_accounts(lambda store: store.add(account)),
    }

    async def leave() -> None:
        disk = threading.Event()
        slow = asyncio.ensure_future(azt.in_thread(gateway.files, disk.wait))
        change = asyncio.ensure_future(changes[what]())
        for _ in range(5):
            await asyncio.sleep(0)
        change.cancel()
        disk.set()
        await slow
        with pytest.raises(asyncio.CancelledError):
            await change
        await gateway.change_settings({"defaultModel": "gpt-5.5"})  # its turn comes after the other

    asyncio.run(leave())

    again = in_process(home)
    assert gateway.keys == again.keys
    assert gateway.settings.values == again.settings.values
    assert gateway.store.to_json() == again.store.to_json()
    assert (len(again.keys), again.settings["limits.bodyMb"], len(again.store.accounts)) == (
        (what == "keys") * 1,
        7 if what == "settings" else 128,
        (what == "accounts") * 1,
    )


# -- Saves that fail ------------------------------------------------------------------------------


@contextmanager
def no_file_may_grow(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Every write to a file fails in that process, as on a disk that is full: also its log."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_change_that_cannot_be_saved_is_refused_and_taken_back(new_gateway: NewGateway) -> None:
    gateway = new_gateway(accounts=[])
    admin = Admin(gateway)
    ids = [
        one["id"]
        for one in admin.call("POST", "/accounts/import", {"payload": [ADA, BO]}).json["items"]
    ]
    key = admin.call("POST", "/keys", {"name": "phone"}).json
    admin.set(apiKeys__loopbackExempt=True)
    new = account_file("acct-3", "user-3", "cy@example.com")
    before = {path: admin.read(path) for path in ("/accounts", "/settings", "/keys", "/models")}
    files = {path.name: path.read_bytes() for path in admin.state.iterdir() if path.is_file()}
    changes: list[tuple[str, str, Any]] = [
        ("POST", "/accounts/import", {"payload": [new, account_file()]}),
        ("POST", f"/accounts/{ids[1]}/activate", {}),
        ("POST", "/accounts/remove", {"ids": ids}),
        ("PATCH", "/settings", {"values": {"server.lanApi": False}}),
        ("POST", "/keys", {"name": "tablet"}),
        ("DELETE", f"/keys/{key['item']['id']}", None),
    ]

    with no_file_may_grow(gateway.process):
        answers = [admin.call(*change) for change in changes]
        job = admin.call("POST", "/models/refresh", {}).json["job"]
        eventually(lambda: admin.read(f"/jobs/{job['id']}")["state"] == "failed")
        during = {path: admin.read(path) for path in before}
        served = admin.chat()

    assert {(one.status, one.error["code"]) for one in answers} == {(500, "state_not_saved")}
    assert all(str(admin.state) in one.error["message"] for one in answers)
    assert during == before
    assert served.status == 200
    assert {
        path.name: path.read_bytes() for path in admin.state.iterdir() if path.is_file()
    } == files
    assert admin.call("POST", f"/accounts/{ids[1]}/activate", {}).json["activeId"] == ids[1]
    assert admin.set(server__lanApi=False).json["values"]["server"]["lanApi"] is False


# -- Damaged files --------------------------------------------------------------------------------


@pytest.fixture
def used(new_gateway: NewGateway) -> Gateway:
    """A home with an account, a key and a setting, whose server has ended."""
    gateway = new_gateway(accounts=[])
    admin = Admin(gateway)
    for _ in range(2):
        admin.call("POST", "/accounts/import", {"payload": [ADA]})
    admin.call("POST", "/keys", {"name": "phone"})
    admin.set(limits__bodyMb=7)
    assert gateway.stop() == 0
    return gateway


DAMAGE = {"empty": b"", "torn": b'{"version": 1, "acc', "nulls": b"\0" * 500, "a list": b"[]"}


def damage(gateway: Gateway, name: str, content: bytes, *, backup: bool) -> None:
    (gateway.state / name).write_bytes(content)
    if backup:
        (gateway.state / f"{name}.bak").write_bytes(content)


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_damaged_accounts_and_keys_are_read_from_their_copies(
    used: Gateway, content: bytes
) -> None:
    damage(used, "accounts.json", content, backup=False)
    damage(used, "keys.json", content, backup=False)

    admin = Admin(used.start())

    assert [one["email"] for one in admin.read("/accounts")["items"]] == ["ada@example.com"]
    assert [one["name"] for one in admin.read("/keys")["items"]] == ["phone"]
    assert admin.get("/v1/models").status == 401
    assert len(list(admin.state.glob("accounts.json.corrupt-*"))) == 1
    assert "accounts.json was damaged" in used.log()


@pytest.mark.parametrize("name", ["accounts.json", "keys.json"])
def test_without_a_good_copy_it_refuses_to_start_and_touches_nothing(
    used: Gateway, name: str
) -> None:
    damage(used, name, b"{broken", backup=True)
    files = {
        path.name: path.read_bytes()
        for path in used.state.iterdir()
        if path.is_file() and path.name != "lock"
    }

    started = used.azt("start", "--no-open", *used.arguments)
    asked = used.azt("accounts", "list")

    for done in (started, asked):
        assert (done.returncode, done.stdout) == (2, "")
        assert name in done.stderr and "Traceback" not in done.stderr
    assert {
        path.name: path.read_bytes()
        for path in used.state.iterdir()
        if path.is_file() and path.name != "lock"
    } == files


@pytest.mark.parametrize(
    "content", [b"{broken", b'{"version": 99, "values": {}}'], ids=["damaged", "newer"]
)
def test_unreadable_settings_are_defaults_and_never_overwritten(
    used: Gateway, content: bytes
) -> None:
    damage(used, "settings.json", content, backup=True)

    admin = Admin(used.start())
    refused = admin.set(limits__bodyMb=9)

    assert admin.read("/settings")["values"]["limits"]["bodyMb"] == 128
    assert [one["email"] for one in admin.read("/accounts")["items"]] == ["ada@example.com"]
    assert "settings.json" in used.log()
    assert (refused.status, refused.error["code"]) == (500, "state_unusable")
    assert "settings.json" in refused.error["message"]
    assert (admin.state / "settings.json").read_bytes() == content
    (admin.state / "settings.json").unlink()
    assert admin.set(limits__bodyMb=9).json["values"]["limits"]["bodyMb"] == 9


def test_a_broken_model_cache_is_no_more_than_none(used: Gateway) -> None:
    (used.state / "models.json").write_bytes(b"\xff{")

    admin = Admin(used.start())

    assert admin.read("/models")["source"] == "codex"


# -- In force at once -----------------------------------------------------------------------------


def test_changed_settings_are_in_force_for_the_next_request(
    admin: Admin, upstream: FakeUpstream
) -> None:
    page = {"Origin": "https://app.example"}

    def statuses() -> list[int]:
        return [
            admin.get("/v1/models", headers=page).status,
            admin.get("/v1/models", headers={"Host": "azt.example"}).status,
            admin.post("/v1/chat/completions", chat_body("x" * 2 * azt.MIB)).status,
        ]

    before = statuses()
    admin.set(
        server__corsOrigins=["https://app.example"],
        server__allowedHosts=["azt.example"],
        limits__bodyMb=1,
    )
    after = statuses()

    assert (before, after) == ([403, 403, 200], [200, 200, 413])


def test_a_new_default_model_is_used_at_once(admin: Admin, upstream: FakeUpstream) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]}

    assert admin.post("/v1/chat/completions", asked).status == 200
    admin.set(defaultModel="gpt-5.5")
    assert admin.post("/v1/chat/completions", asked).status == 200
    admin.set(defaultModel="never-heard-of")
    assert admin.post("/v1/responses", {"input": "hi"}).status == 200

    assert [turn.body["model"] for turn in upstream.turns] == ["gpt-5.4", "gpt-5.5", "gpt-5.5"]


def test_a_new_log_level_is_in_force_at_once(new_gateway: NewGateway) -> None:
    gateway = new_gateway(accounts=[])
    admin = Admin(gateway)

    assert admin.set(log__level="error").status == 200
    quiet = admin.get("/v1/models").headers["x-request-id"]
    assert admin.set(log__level="info").status == 200
    loud = admin.get("/v1/models").headers["x-request-id"]

    gateway.log_line(loud)
    assert quiet not in gateway.log()


def test_a_proxy_of_the_settings_is_used_at_once_and_left_again(admin: Admin) -> None:
    direct = admin.chat()
    admin.set(networkProxy__url="http://127.0.0.1:9", networkProxy__noProxy="")
    not_yet = admin.chat()
    admin.set(networkProxy__enabled=True)
    proxied = admin.chat()
    admin.set(networkProxy__enabled=False)
    again = admin.chat()

    assert (direct.status, not_yet.status, proxied.status, again.status) == (200, 200, 502, 200)
    assert "proxy" in proxied.error["message"]


# -- What is saved later --------------------------------------------------------------------------


def test_nothing_is_written_on_the_way_to_an_answer_but_all_is_saved_at_the_end(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    before = {path.name: path.stat().st_mtime_ns for path in gateway.state.iterdir()}
    for number in range(5):
        assert Client(gateway.url).chat(f"no {number}").status == 200
    after = {path.name: path.stat().st_mtime_ns for path in gateway.state.iterdir()}
    gateway.stop()
    [account] = json.loads((gateway.state / "accounts.json").read_text())["accounts"]

    assert before == after
    assert account["last_used_at"] and account["quota"]["left"] == 90


def test_changes_are_saved_once_for_all_of_a_while(
    home: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "SAVE_LATER_S", 0.05)
    gateway = azt.Gateway(azt.read_environment(), {})
    azt.prepare_home(gateway.paths)

    async def main() -> list[int]:
        times = []
        for _ in range(2):
            for _ in range(50):
                gateway.save_soon()
            assert not times or gateway.paths.accounts.stat().st_mtime_ns == times[-1]
            await asyncio.sleep(0.3)
            times.append(gateway.paths.accounts.stat().st_mtime_ns)
        await gateway.save_now()
        assert gateway.paths.accounts.stat().st_mtime_ns == times[-1]
        return times

    first, second = asyncio.run(main())
    assert first < second


def test_quotas_are_read_in_the_background_only_when_the_setting_says_so(
    home: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azt, "MINUTE_S", 0.02)
    gateway = azt.Gateway(azt.read_environment(upstream.environment() | {"HOME": str(home)}), {})
    azt.prepare_home(gateway.paths)
    gateway.store.add(azt.to_accounts([ADA], 0.0)[0])
    gateway.store.add(azt.to_accounts([BO], 0.0)[0])
    gateway.store.accounts[gateway.store.find("bo@example.com").id].rejected = "token_revoked"

    async def main() -> None:
        watching = asyncio.create_task(gateway.watch_quotas())
        await asyncio.sleep(0.2)
        assert upstream.requests == []
        await gateway.change_settings({"quota.everyMinutes": 1})
        await asyncio.to_thread(upstream.wait_until, lambda: len(upstream.requests) >= 3)
        watching.cancel()
        await gateway.change_settings({"quota.everyMinutes": 0})

    asyncio.run(main())
    gateway.pool.close()
    assert {(seen.path, seen.account) for seen in upstream.requests} == {
        ("/backend-api/wham/usage", "acct-1")
    }


def test_only_a_person_ends_the_rest_of_an_empty_account(
    home: Path, upstream: FakeUpstream
) -> None:
    gateway = azt.Gateway(azt.read_environment(upstream.environment() | {"HOME": str(home)}), {})
    azt.prepare_home(gateway.paths)
    gateway.store.add(azt.to_accounts([ADA], 0.0)[0])
    (account,) = gateway.store.accounts.values()
    rests: list[int] = []

    async def main() -> None:
        for by_person, reason in (
            (False, "quota_exhausted"),
            (True, "excluded"),
            (True, "quota_exhausted"),
        ):
            account.cooldown_until, account.cooldown_reason = 2_000_000_000, reason
            await gateway.refresh_quota(account.id, by_person)
            rests.append(account.cooldown_until)

    asyncio.run(main())
    gateway.pool.close()
    assert rests == [2_000_000_000, 2_000_000_000, 0]
