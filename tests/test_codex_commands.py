"""`azt codex …` and its administration, as a person, a page and the real Codex meet them."""

from __future__ import annotations

import json
import os
import pty
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from codex_configs import CONFIGS
from fake_upstream import FakeUpstream, Json, account_file
from harness import ROOT, Answer, Client, Gateway, home_variables
from loopback import Peer, Server, sized

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
CODEX = shutil.which("codex") or str(ROOT / ".azt-test-env/node/node_modules/.bin/codex")


class Person:
    """A running azt, its command line, its administration and a Codex home."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.client = Client(gateway.url)
        self.url = f"{gateway.url}/codex/v1"
        self.home = Path(gateway.environment["CODEX_HOME"])
        self.config, self.auth = self.home / "config.toml", self.home / "auth.json"

    def codex(self, *words: str, fails: int = 0, **how: Any) -> str:
        done = self.gateway.azt("codex", *words, **how)
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        proof = headers or self.gateway.proof()
        return self.client.request(method, f"{ADMIN}/codex{path}", body, headers=proof)

    def status(self) -> Json:
        state: Json = json.loads(self.codex("status", "--json"))
        return state


@pytest.fixture
def person(new_gateway: NewGateway) -> Person:
    return Person(new_gateway())


# -- Commands -------------------------------------------------------------------------------------


def test_a_person_takes_over_and_releases(person: Person) -> None:
    text = CONFIGS["everything"]
    person.config.write_text(text)

    shown = person.codex("takeover", "--dry-run")
    assert f'+ openai_base_url = "{person.url}"' in shown
    assert person.config.read_text() == text

    told = person.codex("takeover", "--yes")
    assert "restart" in told
    assert azt.codex_route(azt.parse_toml(person.config.read_text())) == ("openai", person.url)
    assert "go through azt" in person.codex("status")

    person.codex("release")
    assert person.config.read_text() == text
    assert "go to openai" in person.codex("status")
    assert "audit: " in person.gateway.log()


def test_nobody_to_ask_means_nothing_is_written(person: Person) -> None:
    assert "--yes" in person.codex("takeover", fails=2, stdin=subprocess.DEVNULL)
    assert "--yes" in person.codex("takeover", "--json", fails=2, stdin=subprocess.DEVNULL)
    assert not person.config.exists()


def test_where_codex_has_never_been_a_take_over_says_what_to_do(person: Person) -> None:
    shutil.rmtree(person.home)

    told = person.codex("takeover", "--dry-run")

    assert "start it once, or set CODEX_HOME" in told
    assert not person.home.exists()


@pytest.mark.parametrize(("typed", "is_written"), [("y\n", True), ("\n", False), ("n\n", False)])
def test_a_terminal_is_shown_the_change_and_asked(
    person: Person, typed: str, is_written: bool
) -> None:
    person.config.write_text('model_provider = "local" # mine\n')
    leader, follower = pty.openpty()
    os.write(leader, typed.encode())

    shown = person.codex("takeover", stdin=follower)

    os.close(leader)
    os.close(follower)
    assert '- model_provider = "local" # mine' in shown
    assert "[y/N]" in shown
    assert ("openai_base_url" in person.config.read_text()) is is_written


def test_a_mode_of_its_own_is_written_and_shown(person: Person) -> None:
    done = json.loads(person.codex("takeover", "--mode", "ai-zero-token", "--yes", "--json"))

    assert done["backup"]["file"] == "config.toml"
    assert person.status()["takeover"]["historyMode"] == "ai-zero-token"


def test_a_key_that_codex_cannot_send_is_said(person: Person) -> None:
    person.gateway.azt("keys", "add", "laptop")

    assert "apiKeys.loopbackExempt" in person.codex("takeover", "--yes")

    person.gateway.azt("settings", "set", "apiKeys.loopbackExempt", "true")
    assert "apiKeys.loopbackExempt" not in person.codex("takeover", "--mode=ai-zero-token", "--yes")


def test_the_status_says_when_codex_goes_elsewhere_or_azt_is_not_running(person: Person) -> None:
    person.codex("takeover", "--yes")
    person.config.write_text(person.config.read_text().replace(person.url, "http://127.0.0.1:9/v1"))
    assert "go to http://127.0.0.1:9/v1, azt is at" in person.codex("status")
    person.config.write_text("broken =\n")
    assert "no valid TOML" in person.codex("status")

    person.config.unlink()
    person.gateway.stop()
    person.gateway.azt("settings", "set", "server.port", "8799")
    fixed = {**person.gateway.environment, "AZT_PORT": "8799"}
    person.codex("takeover", "--yes", env=fixed)
    assert '"http://127.0.0.1:8799/codex/v1"' in person.config.read_text()
    assert "azt is not running" in person.codex("status", env=fixed)
    unknown = {**fixed, "AZT_PORT": "0"}
    assert "azt start" in person.codex("takeover", "--yes", fails=1, env=unknown)
    person.gateway.start()


def test_an_account_is_applied_and_taken_back(person: Person) -> None:
    person.auth.write_text(json.dumps({"OPENAI_API_KEY": "sk-kept", "extra": 1}))
    raw = person.auth.read_bytes()

    told = person.codex("apply", "ada@example.com")

    assert "to ada@example.com" in told
    tokens = json.loads(person.auth.read_text())["tokens"]
    assert tokens["account_id"] == "acct-1"
    assert "rt_" not in told
    assert "ada@example.com, kept fresh by azt" in person.codex("status")
    [shown] = json.loads(person.gateway.azt("accounts", "list", "--json").stdout)["items"]
    assert shown["inCodex"] is True

    person.codex("restore")
    assert person.auth.read_bytes() == raw


def test_what_azt_renews_reaches_codex(
    new_gateway: NewGateway, upstream: FakeUpstream, home: Path
) -> None:
    person = Person(new_gateway(accounts=[account_file(exp=time.time() + 60)]))
    person.codex("apply", "ada@example.com")
    before = json.loads(person.auth.read_text())["tokens"]

    assert person.client.chat().status == 200

    now = json.loads(person.auth.read_text())["tokens"]
    saved = json.loads((person.gateway.state / "accounts.json").read_text())["accounts"][0]
    assert now["refresh_token"] == saved["refresh_token"] != before["refresh_token"]
    assert now["access_token"] == saved["access_token"]
    assert stat.S_IMODE(person.auth.stat().st_mode) == 0o600


# -- The administration ---------------------------------------------------------------------------


def test_a_backup_is_compared_before_it_is_put_back(person: Person) -> None:
    person.config.write_text('model = "gpt-5.4"\n')
    person.codex("takeover", "--yes")
    person.codex("apply", "ada@example.com")
    ids = {one["file"]: one["id"] for one in person.call("GET", "").json["backups"]}
    written, path = person.config.read_bytes(), f"/backups/{ids['config.toml']}/restore"

    plan = person.call("POST", path, {"dryRun": True}).json
    assert {"op": "-", "text": f'openai_base_url = "{person.url}"'} in plan["diff"]
    assert (plan["dryRun"], plan["willBackup"]) == (True, True)
    told = person.call("POST", f"/backups/{ids['auth.json']}/restore", {"dryRun": True}).json
    assert (told["from"], told["to"]) == ({"email": "ada@example.com"}, None)
    assert person.config.read_bytes() == written

    person.config.write_bytes(written + b"# mine\n")
    answer = person.call("POST", path, {"dryRun": False, "base": plan["base"]})
    assert (answer.status, answer.error["code"]) == (409, "file_changed")
    assert person.call("POST", path, {}).status == 200
    assert person.config.read_text() == 'model = "gpt-5.4"\n'


def test_a_change_needs_proof_and_the_base_of_its_dry_run(person: Person) -> None:
    for method, path in (
        ("POST", "/takeover"),
        ("POST", "/release"),
        ("POST", "/auth"),
        ("POST", "/backups/x/restore"),
        ("DELETE", "/backups/x"),
    ):
        answer = person.call(method, path, {}, **{"X-AZT-Admin": "1"})
        assert (answer.status, answer.error["code"]) == (401, "proof_needed")

    plan = person.call("POST", "/takeover", {"dryRun": True}).json
    assert (plan["dryRun"], plan["changed"]) == (True, True)
    for body in ({"dryRun": False}, {"dryRun": False, "base": "sha256:00"}):
        assert person.call("POST", "/takeover", body).status in (400, 409)
    assert not person.config.exists()

    person.config.write_text("model = 'm'\n")
    late = person.call("POST", "/takeover", {"dryRun": False, "base": plan["base"]})
    assert (late.status, late.error["code"]) == (409, "file_changed")
    assert person.config.read_text() == "model = 'm'\n"


@pytest.mark.parametrize(
    "fields",
    [
        {"baseUrl": "https://evil.example/v1"},
        {"baseUrl": "http://127.0.0.1:1/codex/v1"},
        {"historyMode": "other"},
        {"historyMode": ""},
        {"historyMode": ["openai"]},
    ],
)
def test_only_our_own_address_and_the_two_modes_are_accepted(person: Person, fields: Json) -> None:
    answer = person.call("POST", "/takeover", fields)

    assert (answer.status, answer.error["code"]) == (400, "bad_field")
    assert answer.error["param"] in fields


def test_the_host_of_a_request_never_gets_into_the_config(person: Person) -> None:
    port = person.gateway.url.rpartition(":")[2]
    headers = {**person.gateway.proof(), "Host": f"localhost:{port}"}

    plan = person.call("POST", "/takeover", {}, **headers).json

    assert {"op": "+", "text": f'openai_base_url = "{person.url}"'} in plan["diff"]


def test_the_page_sees_no_token(person: Person) -> None:
    person.codex("apply", "ada@example.com")
    person.codex("takeover", "--yes")

    state = person.call("GET", "").body

    assert b"rt_" not in state
    assert b"eyJ" not in state
    assert json.loads(state)["auth"]["email"] == "ada@example.com"
    assert [one["file"] for one in json.loads(state)["backups"]] == ["config.toml", "auth.json"]


def test_a_demo_never_looks_at_the_codex_of_the_person(home: Path) -> None:
    codex = home / ".codex"
    codex.mkdir()
    (codex / "config.toml").write_text("broken =\n")
    demo = Gateway(home, {}, ["--demo", "--host", "127.0.0.1", "--port", "0"]).start()
    try:
        state = Client(demo.url).get(f"{ADMIN}/codex").json
    finally:
        demo.stop()

    assert state["problem"] is None
    assert not Path(state["home"]).is_relative_to(home)
    assert [path.name for path in codex.iterdir()] == ["config.toml"]


# -- The real Codex -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path(CODEX).exists(), reason="the Codex command line is not installed")
@pytest.mark.parametrize("mode", azt.CODEX_MODES)
@pytest.mark.parametrize("name", ["bom and crlf", "everything", "fake headers in strings"])
def test_codex_itself_accepts_what_was_written(home: Path, mode: str, name: str) -> None:
    codex = home / ".codex"
    codex.mkdir()

    def refuse(peer: Peer) -> None:
        while request := peer.read_request():
            status = "426 Upgrade Required" if request[:3] == b"GET" else "400 Bad Request"
            peer.send(sized(b'{"detail":"asked azt"}', status))

    text = CONFIGS[name].replace('name = "search"\n', "")
    with Server(refuse) as server:
        taken = azt.take_over(text, mode, f"{server.url}/codex/v1")
        (codex / "config.toml").write_bytes(taken.encode())
        done = subprocess.run(
            [CODEX, "exec", "--skip-git-repo-check", "hi"],
            env={**os.environ, **home_variables(home), "CODEX_API_KEY": "sk-none"},
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert f"provider: {mode}" in done.stdout + done.stderr
    assert any(b"POST /codex/v1/responses" in one for one in server.requests)
    assert "asked azt" in done.stdout + done.stderr
