"""A home that the Node program of the same name left is taken over once, whole, at any crash."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, account_file, make_token
from harness import Client, Gateway, make_gateway

import azt

Json = dict[str, Any]

EXP = 1_900_000_000


def profile(account_id: str, user_id: str, email: str, **fields: Any) -> Json:
    """As the Node program saves one."""
    account = account_file(account_id, user_id, email, exp=EXP)
    return {
        "provider": "openai-codex",
        "profileId": f"openai-codex:{account_id}",
        "mode": "oauth_account",
        "access": account["access_token"],
        "refresh": account["refresh_token"],
        "expires": EXP * 1000,
        "accountId": account_id,
        "email": email,
        **fields,
    }


QUOTA = {"capturedAt": 1_763_817_900_000, "planType": "plus", "primaryUsedPercent": 38}
AUDIT = {
    "exported": True,
    "count": 2,
    "firstExportedAt": 1_763_740_000_000,
    "lastExportedAt": 1_763_748_000_000,
    "lastExportKind": "batch",
}
PROFILES = [
    profile("acct-1", "user-1", "ada@example.com", quota=QUOTA, exportAudit=AUDIT),
    profile(
        "acct-2",
        "user-2",
        "bo@example.com",
        idToken=make_token("acct-2", "user-2", "bo@example.com", exp=EXP),
        authStatus={"state": "ok", "checkedAt": 1_763_818_000_000},
    ),
    profile("acct-3", "user-3", "cy@example.com"),
]
STORE: Json = {
    "version": 1,
    "activeProfileId": "openai-codex:acct-2",
    "profiles": {one["profileId"]: one for one in PROFILES},
}
SETTINGS: Json = {
    "version": 1,
    "defaultProvider": "openai-codex",
    "defaultModel": "gpt-5.5",
    "networkProxy": {"enabled": False, "url": "socks5://x:1", "noProxy": "localhost,127.0.0.1,::1"},
    "autoSwitch": {"enabled": True, "excludedProfileIds": ["openai-codex:acct-3", "gone"]},
    "runtime": {"quotaSyncConcurrency": 3},
    "server": {"host": "127.0.0.1", "port": 8799},
}
USAGE: Json = {"version": 1, "updatedAt": 1, "aggregate": {"requestCount": 3}, "byAccount": {}}
IDS = {f"acct-{n}": azt.account_id_of(f"acct-{n}", f"user-{n}") for n in (1, 2, 3)}


def leave(home: Path, store: Any = STORE, settings: Any = SETTINGS) -> Path:
    """The state folder as the Node program left it: readable for everyone."""
    state = home / ".state"
    (state / "usage" / "events").mkdir(parents=True)
    state.chmod(0o755)
    for name, content in (("store.json", store), ("settings.json", settings)):
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content, indent=2).encode()
            (state / name).write_bytes(raw)
    (state / "usage" / "lifetime.json").write_text(json.dumps(USAGE))
    (state / "usage" / "events" / "2026-11-22.jsonl").write_text('{"id":"a"}\n')
    return state


def loaded(home: Path) -> azt.Gateway:
    names = {"AI_ZERO_TOKEN_HOME": str(home), "HOME": str(home)}
    gateway = azt.Gateway(azt.read_environment(names), {})
    gateway.load()
    return gateway


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tmp_path / "old"


# -- What is taken over ---------------------------------------------------------------------------


def test_accounts_and_settings_are_taken_over(old: Path) -> None:
    leave(old)

    gateway = loaded(old)

    accounts = gateway.store.accounts
    assert [one.email for one in accounts.values()] == [one["email"] for one in PROFILES]
    assert [one.id for one in accounts.values()] == list(IDS.values())
    assert gateway.store.active_id == IDS["acct-2"]
    first = accounts[IDS["acct-1"]]
    assert (first.access_token, first.refresh_token) == (
        PROFILES[0]["access"],
        PROFILES[0]["refresh"],
    )
    assert (first.plan, first.expires_at) == ("plus", EXP)
    assert accounts[IDS["acct-2"]].id_token == PROFILES[1]["idToken"]
    changed = {
        key: value
        for key, value in gateway.settings.values.items()
        if value != azt.SETTINGS[key].default
    }
    assert changed == {
        "autoSwitch.enabled": True,
        "autoSwitch.excludedIds": [IDS["acct-3"]],
        "defaultModel": "gpt-5.5",
        "quota.concurrency": 3,
        "server.host": "127.0.0.1",
        "server.port": 8799,
    }


def test_what_was_left_is_kept_aside_and_private(old: Path) -> None:
    state = leave(old)

    loaded(old)

    before = state / "before-azt"
    assert json.loads((before / "settings.json").read_text()) == SETTINGS
    assert json.loads((before / "usage" / "lifetime.json").read_text()) == USAGE
    assert (before / "usage" / "events" / "2026-11-22.jsonl").exists()
    assert json.loads((before / "store.json").read_text()) == STORE
    assert json.loads((state / "store.json").read_text()) == STORE
    assert not (state / "usage").exists()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state, before)} == {0o700}
    files = [path for path in (*state.iterdir(), *before.iterdir()) if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_it_happens_once(old: Path) -> None:
    state = leave(old)
    first = loaded(old).store.to_json()
    (state / "usage").mkdir()
    (state / "usage" / "lifetime.json").write_text('{"ours": 1}')
    renewed = {**STORE, "profiles": {"x": profile("acct-9", "user-9", "late@example.com")}}
    (state / "store.json").write_text(json.dumps(renewed))

    again = loaded(old)

    assert again.store.to_json() == first
    assert (state / "usage" / "lifetime.json").read_text() == '{"ours": 1}'


def test_accounts_that_were_moved_away_do_not_come_back(old: Path) -> None:
    state = leave(old)
    loaded(old)
    for name in ("accounts.json", "accounts.json.bak"):
        (state / name).unlink()

    assert loaded(old).store.accounts == {}


@pytest.mark.parametrize("missing", ["store", "settings"])
def test_a_home_with_half_of_it_is_taken_over_too(old: Path, missing: str) -> None:
    leave(old, **{missing: None})

    gateway = loaded(old)

    assert len(gateway.store.accounts) == (0 if missing == "store" else 3)
    assert gateway.settings["server.port"] == (8787 if missing == "settings" else 8799)


def test_a_new_home_is_left_alone(old: Path) -> None:
    loaded(old)
    assert not {"before-azt", "accounts.json", "settings.json"} & set(os.listdir(old / ".state"))


def test_settings_of_our_own_shape_stay(old: Path) -> None:
    ours = {"version": 1, "revision": 4, "values": {"server.port": 1234}}
    leave(old, settings=ours)

    gateway = loaded(old)

    assert (gateway.settings["server.port"], gateway.settings.revision) == (1234, 4)
    assert len(gateway.store.accounts) == 3


def test_an_entry_that_cannot_be_read_is_named_and_the_others_come(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {**PROFILES[2], "refresh": ""}
    profiles = {**STORE["profiles"], "openai-codex:acct-3": broken, "odd": 5}
    leave(old, store={**STORE, "profiles": profiles})

    assert len(loaded(old).store.accounts) == 2

    told = [one.message for one in caplog.records if "left out" in one.message]
    assert len(told) == 2 and "no refresh_token" in told[0]


def test_a_process_takes_it_over_and_serves_with_it(home: Path, upstream: FakeUpstream) -> None:
    leave(home / ".ai-zero-token", settings={**SETTINGS, "server": {}})
    gateway = make_gateway(home, upstream, accounts=[], variables={"AZT_HOST": "127.0.0.1"})
    try:
        assert Client(gateway.url).chat().status == 200
        assert upstream.turns[-1].account == "acct-2"
        listed = json.loads(gateway.azt("accounts", "list", "--json").stdout)["items"]
        assert [one["active"] for one in listed] == [False, True, False]
    finally:
        gateway.stop()


def test_a_command_takes_it_over_without_a_server(home: Path, upstream: FakeUpstream) -> None:
    leave(home / ".ai-zero-token")
    gateway = Gateway(home, upstream.environment(), [])
    done = gateway.azt("settings", "get", "server.port")
    assert (done.returncode, done.stdout) == (0, "8799\n")


# -- Damage ---------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


RAW = json.dumps(STORE, indent=2).encode()


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0" * 50, b"[]", b"5", b'{"version": 1}', b'{"profiles": []}', b'{"profiles": 5}']
    + [RAW[: len(RAW) * part // 7] for part in range(1, 7)]
    + [RAW[:-2], RAW.replace(b'"version": 1', b'"version": NaN')],
)
def test_a_damaged_store_is_an_error_and_nothing_is_touched(old: Path, raw: bytes) -> None:
    state = leave(old, store=raw)
    before = everything(state)

    for _ in range(2):
        with pytest.raises(azt.StateError, match=r"store\.json.*damaged"):
            loaded(old)
        assert everything(state) == before

    (state / "store.json").write_bytes(RAW)
    assert len(loaded(old).store.accounts) == 3


def test_damaged_settings_are_never_overwritten(old: Path) -> None:
    state = leave(old, settings=b'{"version": 1, "server": {')

    gateway = loaded(old)

    assert len(gateway.store.accounts) == 3
    assert gateway.settings["server.port"] == 8787
    assert (state / "settings.json").read_bytes() == b'{"version": 1, "server": {'


def test_a_store_behind_a_symlink_is_refused(old: Path, tmp_path: Path) -> None:
    state = leave(old, store=None)
    (tmp_path / "elsewhere.json").write_bytes(RAW)
    (state / "store.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(azt.StateError, match="cannot be read"):
        loaded(old)


# -- Crashes --------------------------------------------------------------------------------------

CRASHER = """
import os, pathlib, shutil, sys, azt
left, home = map(pathlib.Path, sys.argv[1:])
dying = ("open", "fsync", "replace", "close", "mkdir")

def die_at(number):
    count = 0
    def guard(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in dying:
        setattr(os, name, guard(getattr(os, name)))

def load():
    names = {"AI_ZERO_TOKEN_HOME": str(home), "HOME": str(home)}
    gateway = azt.Gateway(azt.read_environment(names), {})
    azt.prepare_home(gateway.paths)
    lock = azt.HomeLock(gateway.paths.lock)
    assert lock.acquire() is None
    gateway.load()
    lock.release()
    for account in gateway.store.accounts.values():
        account.created_at = 0
    return repr((gateway.store.to_json(), dict(gateway.settings.values)))

for number in range(1, 200):
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(left, home)
    child = os.fork()
    if child == 0:
        die_at(number)
        load()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    taken = load()
    # The copy of the last file may be missing until its next save.
    left_over = sorted(str(path) for path in home.rglob("*") if path.suffix != ".bak")
    print(status, hash((taken, load() == taken, tuple(left_over))), flush=True)
    if status == 0:
        break
"""


def test_a_crash_at_any_system_call_ends_in_the_same_home(old: Path, tmp_path: Path) -> None:
    leave(old)
    command = [sys.executable, "-c", CRASHER, str(old), str(tmp_path / "home")]
    names = {"PYTHONPATH": str(Path(azt.__file__).parent), "PYTHONHASHSEED": "0"}

    done = subprocess.run(
        command, env={**os.environ, **names}, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert [status for status, _ in outcomes] == ["9"] * (len(outcomes) - 1) + ["0"]
    assert len(outcomes) > 30
    assert len({state for _, state in outcomes}) == 1
    assert len(loaded(tmp_path / "home").store.accounts) == 3
    shutil.rmtree(tmp_path / "home")
