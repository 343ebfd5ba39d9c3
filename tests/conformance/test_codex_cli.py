"""The released Codex CLI against azt: what it prints, what the backend gets, and how soon.

Two set-ups, the two modes of the take-over: its built-in provider with another base URL (its own
ChatGPT sign-in stays, bodies are zstd), and a provider of azt's own (no sign-in, plain bodies).
"""

from __future__ import annotations

import base64
import json as jsonlib
import os
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NODE_MODULES
from fake_upstream import (
    CHATGPT,
    CODEX,
    Event,
    FakeUpstream,
    Json,
    Seen,
    account_file,
    answer,
    call,
    limit_reached,
    reasoning,
    text,
    usage,
)
from harness import MODEL, Gateway, home_variables
from loopback import Tee

NewGateway = Callable[..., Gateway]

FIRST, SECOND = account_file(), account_file("acct-2", "user-2", "bob@example.com")
OWN = account_file("acct-codex", "user-codex", "codex@example.com")
"""Codex's own sign-in: it must never be seen where the model calls arrive."""

LARGE = usage(190_000, 10_000)


class Codex:
    """The Codex CLI in a home of its own."""

    def __init__(self, program: Path, folder: Path, upstream: FakeUpstream) -> None:
        self.program, self.upstream = program, upstream
        self.home, self.work = folder / ".codex", folder / "work"
        self.home.mkdir(exist_ok=True)
        self.work.mkdir()
        self.environment = {
            **home_variables(folder),
            "PATH": os.environ["PATH"],
            # Whatever else it wants to call ends here, not on the network.
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
            "CODEX_REFRESH_TOKEN_URL_OVERRIDE": f"{upstream.url}/oauth/token",
        }

    def configure(self, mode: str, base_url: str, *more: str) -> None:
        """Write config.toml the way the take-over does, and the sign-in of that mode."""
        lines = [f'model = "{MODEL}"', *more, f'model_provider = "{mode}"']
        if mode == "openai":
            # Signed in it asks its backend for the way to its workspace before the first turn.
            lines += [f'openai_base_url = "{base_url}"']
            lines += [f'chatgpt_base_url = "{self.upstream.url}{CHATGPT}/"']
            tokens = {name: OWN[name] for name in ("id_token", "access_token", "refresh_token")}
            now = time.strftime("%Y-%m-%dT%H:%M:%S.0Z", time.gmtime())
            sign_in = {"tokens": {**tokens, "account_id": "acct-codex"}, "last_refresh": now}
            kind = {"auth_mode": "chatgpt", "OPENAI_API_KEY": None}
            (self.home / "auth.json").write_text(jsonlib.dumps({**kind, **sign_in}))
        else:
            lines += [f"[model_providers.{mode}]", 'name = "AI Zero Token"']
            lines += [f'base_url = "{base_url}"', 'wire_api = "responses"']
            lines += ["supports_websockets = false"]
        lines += ["[analytics]", "enabled = false"]
        (self.home / "config.toml").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str) -> Run:
        options = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        command, *rest = arguments
        done = subprocess.run(
            [self.program, "exec", *([command] if command == "resume" else []), *options]
            + (rest if command == "resume" else list(arguments)),
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        return Run(done)


class Run:
    """One `codex exec`, ended: what it printed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.stderr = done.returncode, done.stderr
        self.events: list[Json] = [jsonlib.loads(line) for line in done.stdout.splitlines()]

    @property
    def items(self) -> list[Json]:
        return [event["item"] for event in self.events if event["type"] == "item.completed"]

    @property
    def said(self) -> list[str]:
        return [item["text"] for item in self.items if item["type"] == "agent_message"]

    @property
    def errors(self) -> list[str]:
        """Every message about something that went wrong."""
        told = [event["message"] for event in self.events if event["type"] == "error"]
        return told + [item["message"] for item in self.items if item["type"] == "error"]

    @property
    def thread(self) -> str:
        (started,) = (event for event in self.events if event["type"] == "thread.started")
        return str(started["thread_id"])


@pytest.fixture
def codex(home: Path, upstream: FakeUpstream) -> Codex:
    program = next(NODE_MODULES.glob("@openai/codex-*/vendor/*/bin/codex"), None)
    if program is None:
        assert shutil.which("npm") is None, "Codex is not installed: run `python3 tests` once."
        pytest.skip("without npm there is no Codex")
    return Codex(program, home, upstream)


@pytest.fixture(params=["openai", "ai-zero-token"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tee(codex: Codex, gateway: Gateway, mode: str) -> Iterator[Tee]:
    """What Codex sends to a gateway with one account."""
    with Tee(gateway.url) as between:
        codex.configure(mode, f"{between.url}/codex/v1")
        yield between


@pytest.fixture
def pair(codex: Codex, new_gateway: NewGateway, mode: str) -> Iterator[Tee]:
    """The same with two accounts that stand in for each other."""
    gateway = new_gateway(accounts=[FIRST, SECOND])
    assert gateway.azt("settings", "set", "autoSwitch.enabled", "true").returncode == 0
    with Tee(gateway.url) as between:
        codex.configure(mode, f"{between.url}/codex/v1")
        yield between


def check_relayed(upstream: FakeUpstream, tee: Tee, mode: str, *accounts: str) -> None:
    """What holds for every run: these accounts in this order, and the bytes that Codex sent."""
    turns = upstream.turns
    assert [seen.account for seen in turns if seen.method == "POST"] == list(accounts)
    assert [seen.raw for seen in turns] == tee.posts("/codex/v1/responses")
    for seen in turns:
        assert seen.headers.get("content-encoding") == ("zstd" if mode == "openai" else None)
        assert seen.headers["originator"] == "codex_exec"
        assert seen.headers["user-agent"].startswith("codex_exec/")
        assert seen.headers["session-id"] and seen.headers["thread-id"]
        assert "turn_id" in jsonlib.loads(seen.headers["x-codex-turn-metadata"])
        assert seen.headers["x-codex-window-id"].startswith(seen.headers["thread-id"])
        assert "x-azt-admin" not in seen.headers
    of_codex = OWN["access_token"]
    relayed = [seen for seen in upstream.requests if seen.path.startswith(f"{CODEX}/")]
    assert not [seen for seen in relayed if of_codex in seen.headers["authorization"]]


def shell(command: str, **response: Any) -> list[Event]:
    """An answer that wants a command to be run."""
    return answer(reasoning(), call("exec_command", jsonlib.dumps({"cmd": command})), **response)


def inputs(seen: Seen, kind: str) -> list[Json]:
    return [item for item in seen.body["input"] if item.get("type") == kind]


def test_a_text_turn(codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str) -> None:
    run = codex.run("hello there")

    assert run.code == 0, (run.events, run.stderr)
    assert run.said == ["You said: hello there"]
    assert run.errors == []
    assert run.events[-1]["usage"]["input_tokens"] == 12
    check_relayed(upstream, tee, mode, "acct-1")
    # Signed in, Codex fetches the list of the account, and is content with it.
    listed = [seen for seen in upstream.requests if seen.path == f"{CODEX}/models"]
    assert {seen.account for seen in listed} == ({"acct-1"} if mode == "openai" else set())
    assert "failed to refresh available models" not in run.stderr


def test_a_turn_with_shell_tool_calls(
    codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str
) -> None:
    upstream.script(shell("echo made > made.txt; cat made.txt"))
    upstream.script(shell("rm made.txt"))
    upstream.script(text("All done."))

    run = codex.run("make a file")

    assert run.code == 0, (run.events, run.stderr)
    assert run.said[-1] == "All done."
    check_relayed(upstream, tee, mode, "acct-1", "acct-1", "acct-1")
    (output,) = inputs(upstream.turns[1], "function_call_output")
    assert "made" in output["output"]
    # The state of the turn comes back within it.
    states = [seen.headers.get("x-codex-turn-state") for seen in upstream.turns]
    assert states == [None, upstream.turns[0].turn_state, upstream.turns[0].turn_state]
    assert not (codex.work / "made.txt").exists()


def test_a_turn_with_a_picture(codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str) -> None:
    picture = codex.work / "dot.png"
    picture.write_bytes(png())

    run = codex.run("what is this", "--image", str(picture))

    assert run.code == 0, (run.events, run.stderr)
    check_relayed(upstream, tee, mode, "acct-1")
    urls = [
        part["image_url"]
        for item in inputs(upstream.turns[0], "message")
        for part in item["content"]
        if part["type"] == "input_image"
    ]
    assert len(urls) == 1 and urls[0].startswith("data:image/png;base64,")
    assert base64.b64decode(urls[0].partition(",")[2])[:8] == png()[:8]


def png() -> bytes:
    """A red dot of 8 x 8."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8)
    head = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def test_a_long_turn_is_compacted(
    codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str
) -> None:
    codex.configure(mode, f"{tee.url}/codex/v1", "model_auto_compact_token_limit = 100000")
    upstream.script(shell("echo one", usage=LARGE))

    run = codex.run("a long story")

    assert run.code == 0, (run.events, run.stderr)
    assert len(run.said) == 1
    check_relayed(upstream, tee, mode, "acct-1", "acct-1", "acct-1")
    asked, going_on = upstream.turns[1:]
    if mode == "openai":
        assert asked.body["input"][-1]["type"] == "compaction_trigger"
        assert [one["encrypted_content"] for one in inputs(going_on, "compaction")] == [
            "gAAAA-cmp-acct-1"
        ]
    else:
        assert not inputs(going_on, "function_call")
    assert going_on.headers["x-codex-window-id"].endswith(":1")


def test_a_resumed_session(codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str) -> None:
    first = codex.run("remember the word fox")

    second = codex.run("resume", first.thread, "which word")

    assert (first.code, second.code) == (0, 0), second.stderr
    assert second.said == ["You said: which word"]
    check_relayed(upstream, tee, mode, "acct-1", "acct-1")
    before, after = upstream.turns
    assert after.headers["thread-id"] == before.headers["thread-id"] == first.thread
    assert "remember the word fox" in str(after.body["input"])
    assert "x-codex-turn-state" not in after.headers


def test_an_exhausted_account_is_replaced_without_a_word(
    codex: Codex, upstream: FakeUpstream, pair: Tee
) -> None:
    upstream.script(account="acct-1", status=429, json=limit_reached(7200))
    upstream.script(account="acct-2", events=shell("true"))

    run = codex.run("hello there")

    assert run.code == 0, (run.events, run.stderr)
    assert run.errors == []
    assert len(run.said) == 1
    assert [seen.account for seen in upstream.turns] == ["acct-1", "acct-2", "acct-2"]
    assert upstream.turns[0].raw == upstream.turns[1].raw
    assert [seen.raw for seen in upstream.turns[1:]] == pair.posts("/codex/v1/responses")


def test_when_every_account_is_exhausted_codex_says_when_to_come_back(
    codex: Codex, upstream: FakeUpstream, pair: Tee
) -> None:
    upstream.script(account="acct-1", status=429, json=limit_reached(7200))
    upstream.script(account="acct-2", status=429, json=limit_reached(3600))

    run = codex.run("hello there")

    assert run.code != 0
    assert any("usage limit" in one for one in run.errors), run.errors
    assert len(pair.posts("/codex/v1/responses")) == 1
    assert len(upstream.turns) == 2


def test_a_stream_that_dies_is_sent_again_by_codex_alone(
    codex: Codex, upstream: FakeUpstream, tee: Tee, mode: str
) -> None:
    upstream.script(text("half ", "of it"), cut=True, after=5)

    run = codex.run("hello there")

    assert run.code == 0, (run.events, run.stderr)
    assert run.said == ["You said: hello there"]
    assert any("Reconnecting" in one for one in run.errors), run.errors
    check_relayed(upstream, tee, mode, "acct-1", "acct-1")


def test_without_an_account_codex_prints_what_to_do(
    codex: Codex, upstream: FakeUpstream, new_gateway: NewGateway
) -> None:
    with Tee(new_gateway(accounts=[]).url) as tee:
        codex.configure("openai", f"{tee.url}/codex/v1")

        run = codex.run("hello there")

        assert len(tee.posts("/codex/v1/responses")) == 1
    assert run.code != 0
    assert any("azt login" in one for one in run.errors), run.errors
    assert not upstream.turns
    assert not [seen for seen in upstream.requests if seen.path == "/oauth/token"]


def test_a_dead_sign_in_of_azt_leaves_codexs_own_alone(
    codex: Codex, upstream: FakeUpstream, new_gateway: NewGateway
) -> None:
    upstream.revoke("acct-1")
    with Tee(new_gateway(accounts=[{**FIRST, "label": "work"}]).url) as tee:
        codex.configure("openai", f"{tee.url}/codex/v1")

        run = codex.run("hello there")

        assert len(tee.posts("/codex/v1/responses")) == 1
    assert run.code != 0
    assert any("azt login" in one and "work" in one for one in run.errors), run.errors
    assert not [seen for seen in upstream.requests if seen.path == "/oauth/token"]


def test_the_first_model_request_is_not_later_than_without_azt(
    codex: Codex, upstream: FakeUpstream, gateway: Gateway
) -> None:
    direct = f"http://localhost:{upstream.port}{CODEX}"
    took: dict[str, list[float]] = {direct: [], f"{gateway.url}/codex/v1": []}

    for _ in range(2):
        for base_url, times in took.items():
            codex.configure("openai", base_url)
            upstream.requests.clear()
            started = time.monotonic()
            assert codex.run("hello").code == 0
            times.append(next(one.at for one in upstream.turns if one.method == "POST") - started)

    alone, through = (min(times) for times in took.values())
    assert through - alone < 0.5, took  # one lost WebSocket retry alone would be 6 s
