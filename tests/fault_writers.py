"""Every writer of state files, run in children of one process so that a thousand of them are quick.

python fault_writers.py     reads one JSON line per run: {"writer", "folder", "hook"?}, and answers
                            {"pid"} when the child stands still, ready for a tracer and SIGCONT,
                            then {"status"} when it has ended

status   0 done, 3 refused with an error of azt's own, 4 any other exception, negative: a signal
hook     {"at": N, "error": ERRNO or 0}: without a tracer, end (0) or fail at the Nth audit event
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_upstream import account_file

import azt

Json = dict[str, Any]
NOW = 1_800_000_000
URL = "http://127.0.0.1:8787/codex/v1"
CONFIG = 'model = "gpt-5.5"  # mine\n\n[projects."/srv"]\ntrust_level = "trusted"\n'
FILES = (
    "accounts.json",
    "keys.json",
    "models.json",
    "renewals.json",
    "sessions.json",
    "settings.json",
)


def account(word: str) -> azt.Account:
    tokens = (f"at-{word}", f"rt-{word}", f"id-{word}")
    return azt.Account(f"acc_{word}", f"acct-{word}", "user-1", *tokens, label=word, created_at=NOW)


def accounts(*words: str) -> Json:
    store = azt.AccountStore()
    for word in words:
        store.add(account(word))
    return store.to_json()


def content(name: str, word: str) -> Json:
    """What `name` holds before ("old") and after ("new") a save."""
    if name == "accounts.json":
        return accounts("old", *(["new"] if word == "new" else []))
    if name == "keys.json":
        return {"version": 1, "keys": [{"id": f"key_{word}", "name": word, "hash": "0" * 64}]}
    if name == "sessions.json":
        one = {"id": f"ses_{word}", "hash": "0" * 64, "scope": "local", "createdAt": NOW * 1000}
        return {"version": 1, "sessions": [one]}
    if name == "renewals.json":
        return {"version": 1, "lines": [] if word == "old" else journal_lines()}
    if name == "settings.json":
        return {"version": 1, "revision": 1 + (word == "new"), "values": {"defaultModel": word}}
    return {"version": 1, "etag": word, "models": [{"slug": word}] * 20}


def paths(folder: Path) -> azt.Paths:
    return azt.Paths(folder, folder / "codex")


def journal_lines() -> list[Json]:
    used = azt._fingerprint("rt-old")
    intent = {"account": "acc_old", "used": used, "at": NOW}
    answer = {"access_token": "at-renewed", "refresh_token": "rt-renewed", "id_token": None}
    return [intent, intent | answer | {"expires_in_s": 3600}]


def make_state(folder: Path) -> None:
    """A home in use: every file saved once, and an empty journal."""
    where = paths(folder)
    azt.prepare_home(where)
    for name in FILES:
        azt.write_json(where.state / name, content(name, "old"))
    azt.read_or_make_secret(where.admin_token)
    for part in ("usage", "sums", "requests"):
        RECORDS[part]("old")(folder)
    where.codex_home.mkdir()
    where.codex_config.write_text(CONFIG)
    where.codex_auth.write_text(json.dumps({"tokens": account_file(), "mine": 1}))
    where.lock.write_text(json.dumps({"pid": 1, "url": None}))
    where.lock.chmod(0o600)


def batch(word: str) -> azt.Batch:
    """What one request leaves in the usage and in the log."""
    record = azt.RequestRecord(
        f"req_{word}", "POST", "/v1/responses", 1.0, NOW, route="/v1/responses"
    )
    record.status, record.model = 200, "gpt-5.5"
    record.end(2.0)
    return azt.Batch([record])


def record_usage(word: str, with_sums: bool = False) -> Callable[[Path], None]:
    """Append the event of a request, or write the sums over those that are there."""

    def write(folder: Path) -> None:
        usage = azt.UsageStats()
        usage.load(paths(folder))
        if not with_sums:
            usage.add(batch(word))
        usage.save(paths(folder), usage.pending, usage.snapshot() if with_sums else ())

    return write


def record_request(word: str, rows_max: int = 2000) -> Callable[[Path], None]:
    """Append to the request log, or write it anew because most of it is too much."""

    def write(folder: Path) -> None:
        log = azt.RequestLog(rows_max)
        log.load(paths(folder).requests, 0)
        log.add(batch(word).rows)
        if rows_max < 100:
            log.written = 1 << 30
        log.save(paths(folder).requests, log.pending, list(log.lines))

    return write


RECORDS: dict[str, Callable[[str], Callable[[Path], None]]] = {
    "usage": record_usage,
    "sums": lambda word: record_usage(word, with_sums=True),
    "requests": record_request,
}


def route(mode: str) -> Callable[[Path], None]:
    """Send Codex through azt in this mode; "": give its config back."""

    def change(folder: Path) -> None:
        files = azt.CodexFiles(paths(folder))
        files.route(mode, URL, False, files.route(mode, URL, False, "")["base"])

    return change


def sign_codex_in(folder: Path) -> None:
    files, [one] = azt.CodexFiles(paths(folder)), azt.to_accounts([account_file("acct-9")], NOW)
    files.apply(one, files.apply(one, "")["base"])


def codex_state(folder: Path) -> Json:
    """Codex's files, and the config that a release leaves: the one from before the take-over."""
    where = paths(folder)
    if not where.codex_home.exists():
        return {}
    config, auth = where.codex_config.read_text(), json.loads(where.codex_auth.read_text())
    route("")(folder)
    return {
        "codex config": config,
        "codex account": [auth["tokens"]["account_id"], auth["mine"]],
        "codex config, released": where.codex_config.read_text(),
    }


def gateway(folder: Path) -> azt.Gateway:
    variables = {"AI_ZERO_TOKEN_HOME": str(folder), "HOME": str(folder)}
    made = azt.Gateway(azt.read_environment(variables), {})
    made.load()
    return made


def damage(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / ".state" / name).write_bytes(b'{"version": 1, "torn')

    return spoil


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            path = folder / ".state" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def pending_renewal(folder: Path) -> None:
    save("renewals.json")(folder)


def node_home(folder: Path) -> None:
    """What the Node program of the same name leaves: files with our names and another shape."""
    where = paths(folder)
    remove(*(one.name for one in where.state.iterdir()))(folder)
    entry = account_file()
    profile = {"access": entry["access_token"], "refresh": "rt_node", "accountId": "acct-1"}
    store = {"version": 1, "activeProfileId": "one", "profiles": {"one": profile}}
    (where.state / "usage").mkdir(mode=0o700)
    for name, value in {
        "store.json": store,
        "settings.json": {"version": 1, "defaultModel": "new"},
        "usage/lifetime.json": {"version": 1},
    }.items():
        (where.state / name).write_text(json.dumps(value))
        (where.state / name).chmod(0o600)


def leftovers(folder: Path) -> None:
    (folder / ".state" / ".accounts.json.0123456789abcdef.tmp").write_bytes(b"half")


def save(name: str) -> Callable[[Path], None]:
    return lambda folder: azt.write_json(folder / ".state" / name, content(name, "new"))


def read(name: str) -> Callable[[Path], object]:
    return lambda folder: azt.read_json(folder / ".state" / name, 1)


def forget_account(folder: Path) -> None:
    made = gateway(folder)
    change = made.change_accounts(lambda store: store.remove(store.accounts["acc_old"]))
    alike(made, change, lambda: list(made.store.accounts))


def change_settings(folder: Path) -> None:
    made = gateway(folder)
    alike(made, made.change_settings({"defaultModel": "new"}), lambda: made.settings.values)


def change_keys(folder: Path) -> None:
    made = gateway(folder)
    alike(made, made.change_keys(lambda keys: []), lambda: made.keys)


def end_sessions(folder: Path) -> None:
    made = gateway(folder)
    alike(made, made.change_sessions(lambda sessions: []), lambda: made.sessions)


def alike(made: azt.Gateway, change: Any, memory: Callable[[], object]) -> None:
    """A change that fails leaves what is in force as it was."""
    before, loop = memory(), asyncio.new_event_loop()  # never closed: the process ends here
    try:
        loop.run_until_complete(change)
    except azt.AztError:
        assert memory() == before
        raise


def take_lock(folder: Path) -> None:
    lock = azt.HomeLock(paths(folder).lock)
    assert lock.acquire() is None
    lock.write("http://127.0.0.1:8787")


def state(folder: Path) -> Json:
    """What a start finds: this is what a fault must not lose. It also tidies up."""
    where = paths(folder)
    lock = azt.HomeLock(where.lock)
    assert lock.acquire() is None
    try:
        found = gateway(folder)
        models = azt.read_json(where.models, 1)
    finally:
        lock.release()
    codex = codex_state(folder)
    files = [one for one in where.state.rglob("*") if one.is_file()]
    loose = [one.name for one in files if one.stat().st_mode & 0o177]
    return {
        "accounts": {one.id: one.refresh_token for one in found.store.accounts.values()},
        "keys": [key["id"] for key in found.keys],
        "sessions": [one["id"] for one in found.sessions],
        "settings": found.settings.text("defaultModel"),
        "models": models and models["etag"],
        "has a secret": len(found.admin_token) > 32,
        "requests": [json.loads(line)["id"] for line in found.requests.lines],
        "usage": found.usage.lifetime.total["requestCount"],
        "usage by day": {
            day: found.usage.day(day).total["requestCount"] for day in found.usage.days
        },
        **codex,
        "left behind": [one.name for one in where.state.rglob(".*")] + loose,
    }


def nothing(folder: Path) -> None:
    pass


# Writer -> what the home is like before it, and the writer. Each is one row of the fault tests.
WRITERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    **{f"{name} is saved": (nothing, save(name)) for name in FILES},
    **{f"{name} is saved first": (remove(name, f"{name}.bak"), save(name)) for name in FILES},
    **{f"{name} is damaged": (damage(name), read(name)) for name in FILES},
    "a key is removed": (nothing, change_keys),
    "a session is ended": (nothing, end_sessions),
    "a request is counted": (nothing, record_usage("new")),
    "a request is logged": (nothing, record_request("new")),
    "the request log is written anew": (nothing, record_request("new", 1)),
    "the sums of the usage are saved": (record_usage("new"), RECORDS["sums"]("new")),
    **{f"Codex is sent through azt, {mode}": (nothing, route(mode)) for mode in azt.CODEX_MODES},
    **{f"Codex is released, {mode}": (route(mode), route("")) for mode in azt.CODEX_MODES},
    "Codex is signed in": (nothing, sign_codex_in),
    "a secret is made": (
        remove("admin-token"),
        lambda folder: azt.read_or_make_secret(paths(folder).admin_token),
    ),
    "a home of the Node program is taken over": (node_home, gateway),
    "an account is removed": (nothing, forget_account),
    "settings are changed": (nothing, change_settings),
    "the first start": (
        lambda folder: remove(*(one.name for one in (folder / ".state").iterdir()))(folder),
        gateway,
    ),
    "the lock is taken": (leftovers, take_lock),
    "the start after a kill in a renewal": (pending_renewal, gateway),
}


def run(writer: Callable[[Path], object], folder: Path) -> int:
    try:
        writer(folder)
    except azt.AztError:
        return 3
    except BaseException:  # noqa: BLE001 - the parent gets the status, a person the traceback
        traceback.print_exc()
        return 4
    return 0


def hook_into(at: int, number: int) -> None:
    """The way without a tracer: end or fail at the Nth file event that Python itself reports."""
    count = 0
    kinds = ("open", "os.", "shutil.", "fcntl.")

    def hook(event: str, _arguments: Any) -> None:
        nonlocal count
        if event.startswith(kinds):
            count += 1
            if count == at:
                if not number:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(number, os.strerror(number))

    sys.addaudithook(hook)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            hook = order.get("hook")
            if hook:
                hook_into(hook["at"], hook["error"])
            else:
                os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(run(WRITERS[order["writer"]][1], Path(order["folder"])))
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        print(json.dumps({"pid": child}), flush=True)  # noqa: T201
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status}), flush=True)  # noqa: T201


if __name__ == "__main__":
    azt.log.disabled = True
    main()
