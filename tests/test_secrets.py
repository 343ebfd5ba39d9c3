"""Canaries: every token, key and password of a run is known, and none of them may turn up outside.

One gateway does all that azt can do, faults included. Its answers, its log, its files but for those
that keep the secrets, the outputs of the commands and the arguments and variables of all processes
are searched for them.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Json, Reply, Seen, account_file, error_json, failed
from harness import Answer, Claim, Client, Gateway
from test_upstream_faults import FAULTS, HURRIED, WAYS

import azt

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]

PASSWORD = "hunter2-of-the-proxy"
KEEPERS = (  # of secrets, by their purpose; each readable by its owner only
    re.compile(r"\.state/(accounts|renewals|settings)\.json(\.bak)?$"),
    re.compile(r"\.state/(admin-token|codex-backups/.*)$"),
    re.compile(r"\.codex/auth\.json$"),
    re.compile(r"acct-\w+\.json$"),  # what the test imports
)
COMMANDS = (
    "status",
    "accounts list",
    "accounts list --json",
    "accounts label ada@example.com Ada",
    "accounts refresh",
    "codex status",
    "keys list",
    "log",
    "log --json",
    "models --refresh",
    "settings get",
    "settings get --json",
    "settings get networkProxy.url",
    "usage",
    "usage --by account",
    "usage --json",
    "ask hi",
    "doctor",
    "doctor --json",
    "no-such-command",
)


class Canaries:
    """What must not be seen, and where it was looked for."""

    def __init__(self, gateway: Gateway, tries: Claim) -> None:
        self.gateway, self.tries = gateway, tries
        self._known: set[str] = {PASSWORD, "secret-cookie"}
        self._lock = threading.Lock()

    def learn(self, *secrets: str) -> None:
        """Those given, and those that the gateway holds by now."""
        state = self.gateway.state
        found = [*secrets, (state / "admin-token").read_text().strip()]
        with contextlib.suppress(FileNotFoundError, ValueError):
            for one in json.loads((state / "accounts.json").read_text())["accounts"]:
                found += [one[f"{kind}_token"] for kind in ("access", "refresh", "id")]
        with self._lock:
            # Of a long one its middle: part of it is too much already.
            self._known.update(one if len(one) < 60 else one[-44:-8] for one in found if one)

    def look(self, where: str, data: bytes | str) -> None:
        text = data if isinstance(data, str) else data.decode("utf-8", "replace")
        with self._lock:
            hits = [one for one in self._known if one in text]
        self.tries.check(not hits, (where, hits))

    def answer(self, where: str, got: Answer) -> Answer:
        self.look(where, json.dumps(got.headers))
        self.look(where, got.body)
        return got

    @contextlib.contextmanager
    def watching_processes(self) -> Iterator[None]:
        """Look at the arguments and variables of every process again and again."""
        over, seen = threading.Event(), set()

        def watch() -> None:
            while not over.wait(0.01):
                for folder in Path("/proc").glob("[0-9]*"):
                    for name in ("cmdline", "environ"):
                        with contextlib.suppress(OSError):
                            seen.add(((folder / name).read_bytes(), f"{name} of a process"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        for data, where in seen:
            self.look(where, data)

    def look_into_files(self) -> None:
        for file in self.gateway.home.rglob("*"):
            name = str(file.relative_to(self.gateway.home))
            if file.is_file() and not any(keeper.search(name) for keeper in KEEPERS):
                self.look(name, file.read_bytes())


def echo(seen: Seen) -> Json:
    """An upstream that says back what it was told, in every form."""
    told = " ".join(f"{name}: {value}" for name, value in seen.headers.items())
    return error_json(f"Denied: {told}", code="x", authorization=seen.headers["authorization"])


def hostile_answers(upstream: FakeUpstream) -> Iterator[None]:
    for status in (400, 401, 403, 404, 429, 500, 503):
        upstream.script(status=status, json=echo, path="/responses", times=3)
        yield
        upstream.reset()
    upstream.default = lambda seen: Reply(failed("x", f"Failed: {seen.headers['authorization']}"))
    yield
    upstream.default = lambda seen: Reply(
        status=502,
        body=f"<html>{seen.headers['authorization']}</html>".encode(),
        headers={"content-type": "text/html", "x-echo": seen.headers["authorization"]},
    )
    yield
    upstream.reset()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are seen in /proc")
def test_no_secret_turns_up_anywhere(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    tries = claim(15, "canaries in answers, logs, files, outputs, arguments: none is seen")
    people = [
        account_file(f"acct-{n}", f"user-{n}", f"{name}@example.com", plan)
        for n, (name, plan) in enumerate((("ada", "plus"), ("bob", "free"), ("eve", "pro")), 1)
    ]
    gateway = new_gateway(
        accounts=people,
        arguments=("--host", "127.0.0.1", "--port", "0", "--log-level", "debug"),
        constants=HURRIED,
    )
    canaries, client = Canaries(gateway, tries), Client(gateway.url, 30)
    canaries.learn()
    proxy = f"http://ada:{PASSWORD}@127.0.0.1:9"
    with canaries.watching_processes():
        made = json.loads(gateway.azt("keys", "add", "laptop", "--json").stdout)
        key = max(_strings(made), key=len)
        assert key.startswith("azt_")
        canaries.learn(key)
        allowed = {"Authorization": f"Bearer {key}"}
        values = {"networkProxy.url": proxy, "autoSwitch.enabled": True}
        for name, value in values.items():
            canaries.answer(name, _change_setting(client, gateway, name, value))

        def ask(where: str, **more: Any) -> None:
            for way in WAYS[:: many(2, 1)]:
                got = client.post(way.path, {**way.body, **more}, headers=allowed)
                canaries.answer(f"{where}, {way}", got)

        ask("a good call")
        for _ in hostile_answers(upstream):
            ask("an echo")
            canaries.learn()
        plain = [one for one in FAULTS if one.place == "plain" and not one.large and not one.extra]
        for fault in random.Random(15).sample(plain, len(plain))[: many(6, len(plain))]:
            for way in WAYS[:: many(5, 1)]:
                upstream.reset()
                upstream.default = lambda seen, way=way: Reply(way.events())
                scripted = fault.script(way)
                if scripted.get("after", 0) == -1:
                    scripted["after"] = 2
                upstream.script(times=fault.times, path="/responses", **scripted)
                got = client.post(way.path, way.body, headers=allowed)
                canaries.answer(f"{fault.name}, {way}", got)
                canaries.learn()
        upstream.reset()
        _ask_wrongly(client, canaries, key)
        _visit_the_administration(client, gateway, canaries)
        for command in COMMANDS[:: many(3, 1)]:
            done = gateway.azt(*command.split())
            canaries.look(command, done.stdout + done.stderr)
        time.sleep(0.05)
    gateway.stop()
    canaries.learn()
    for command in ("status", "accounts list", "log", "usage"):
        done = gateway.azt(*command.split())
        canaries.look(f"{command}, without a gateway", done.stdout + done.stderr)
    canaries.look_into_files()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _change_setting(client: Client, gateway: Gateway, name: str, value: Any) -> Answer:
    revision = client.get("/_gateway/admin/settings").json["revision"]
    body = {"revision": revision, "values": {name: value}}
    got = client.request("PATCH", "/_gateway/admin/settings", body, headers=gateway.proof())
    assert got.status == 200, got.body
    return got


def _ask_wrongly(client: Client, canaries: Canaries, key: str) -> None:
    """Secrets in places where a careless client puts them."""
    for path in (f"/v1/models?key={key}", f"/v1/models?api_key={key}", f"/v1/models?token={key}"):
        canaries.answer("a key in the query", client.get(path))
    for headers in (
        {"Authorization": f"Bearer {key}x"},
        {"Authorization": f"Basic {key}"},
        {"Cookie": f"session={key}"},
        {"X-Api-Key": key, "Origin": f"https://evil.example/?token={key}"},
    ):
        canaries.answer("a wrong header", client.chat("hi"))
        canaries.answer("a wrong header", client.get("/v1/models", headers=headers))
    broken = json.dumps({"authorization": f"Bearer {key}"}).encode()[:-1]
    canaries.answer("broken JSON", client.post("/v1/chat/completions", body=broken))


def _visit_the_administration(client: Client, gateway: Gateway, canaries: Canaries) -> None:
    ids = [one["id"] for one in client.get("/_gateway/admin/accounts").json["items"]]
    for route in azt.ROUTES:
        if route.method != "GET" or route.path.endswith("/events"):
            continue
        for name in [ids[0], "x1"] if "{" in route.path else [""]:
            path = re.sub(r"\{\w+\}", name, route.path)
            canaries.answer(path, client.get(path, headers=gateway.proof()))
    for path in ("accounts/refresh-quotas", "models/refresh", "codex/takeover", "codex/auth"):
        body = {"ids": ids, "dryRun": True, "mode": "openai", "account": ids[0], "id": ids[0]}
        got = client.post(f"/_gateway/admin/{path}", body, headers=gateway.proof())
        canaries.answer(path, got)
