"""`azt login` and `azt logout` as people run them: terminals, browsers, Ctrl-C, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_upstream import FakeUpstream, Json, account_file
from harness import Client, Gateway

import azt

LINK = re.compile(r"http://127\.0\.0\.1:\d+/oauth/authorize\?\S+")


# -- Set-up ---------------------------------------------------------------------------------------


@pytest.fixture(params=["with a server", "without a server"])
def place(request: pytest.FixtureRequest, idle: Gateway) -> Iterator[Gateway]:
    if request.param == "with a server":
        idle.start()
    yield idle


@pytest.fixture
def idle(home: Path, upstream: FakeUpstream, ports: None) -> Iterator[Gateway]:
    """A home in which nothing runs, on a machine without a browser."""
    variables = {**upstream.environment(), "BROWSER": "", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    arguments = ["--host", "127.0.0.1", "--port", "0"]
    gateway = Gateway(home, {**variables, "PATH": "", "TERM": "dumb"}, arguments)
    yield gateway
    if gateway.url:
        gateway.stop()
        assert "Traceback" not in gateway.log(), gateway.log()


class Command:
    """One running command: on a terminal, or with pipes."""

    def __init__(self, gateway: Gateway, *words: str, terminal: bool = False) -> None:
        self.shown = ""
        self._master, slave = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "azt", *words],
            env=gateway.environment,
            cwd=gateway.home,
            stdin=slave if terminal else subprocess.DEVNULL,
            stdout=slave,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, pattern: str | re.Pattern[str], timeout: float = 20.0) -> str:
        """Wait until the output matches and return the match."""
        until = time.monotonic() + timeout
        while not (found := re.search(pattern, self.shown)):
            left = until - time.monotonic()
            assert left > 0 and self._read(left), f"no {pattern!r} in {self.shown!r}"
        return found[0]

    def _read(self, timeout: float) -> bool:
        if not select.select([self._master], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # a terminal that nobody has open any more
            return False
        self.shown += data.decode()
        return bool(data)

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def end(self) -> tuple[int, str]:
        """(exit code, everything that it showed)."""
        while self._read(20.0):
            pass
        return self.process.wait(20), self.shown

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def ports_taken() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for port in azt.CALLBACK_PORTS:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


def come_back(url: str) -> None:
    """Do what the browser does at the end of a sign-in."""
    base, _, target = url.partition("/auth")
    assert Client(base).get(f"/auth{target}").status == 200


def is_free(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 2).close()
        return False
    return True


def accounts(gateway: Gateway) -> list[Json]:
    return list(json.loads(gateway.azt("accounts", "list", "--json").stdout)["items"])


# -- Signing in -----------------------------------------------------------------------------------


def test_the_link_is_printed_and_the_browser_comes_back(
    place: Gateway, upstream: FakeUpstream
) -> None:
    with Command(place, "login", "--no-browser") as command:
        come_back(upstream.sign_in(command.read_until(LINK)))
        code, shown = command.end()

    assert code == 0, shown
    assert "ada@example.com is signed in (plus)." in shown
    assert [one["email"] for one in accounts(place)] == ["ada@example.com"]
    assert is_free(1455)


def test_a_second_account_is_added_beside_the_serving_one(
    place: Gateway, upstream: FakeUpstream
) -> None:
    place.import_account(account_file())
    upstream.person = ("acct-2", "user-2", "bo@example.com", "pro")

    with Command(place, "login") as command:
        come_back(upstream.sign_in(command.read_until(LINK)))
        code, shown = command.end()

    assert code == 0, shown
    added = re.search(r"`azt accounts use (\w+)`", shown)
    assert added
    assert {one["id"]: one["active"] for one in accounts(place)}[added[1]] is False


def test_without_any_browser_program_it_goes_on(idle: Gateway, upstream: FakeUpstream) -> None:
    with Command(idle, "login", terminal=True) as command:
        come_back(upstream.sign_in(command.read_until(LINK)))
        code, shown = command.end()

    assert (code, "Traceback" in shown) == (0, False)


@pytest.fixture
def opened(idle: Gateway) -> Path:
    """A pipe that the browser of this home writes its address to; it never ends by itself."""
    pipe, browser = idle.home / "opened", idle.home / "browser"
    os.mkfifo(pipe)
    browser.write_text(f'#!/bin/sh\necho "$1" > {pipe}\nexec sleep 30\n')
    browser.chmod(0o700)
    idle.environment |= {"BROWSER": f"{browser} %s", "PATH": os.defpath}
    return pipe


def test_the_browser_gets_the_link_that_is_printed(
    place: Gateway, opened: Path, upstream: FakeUpstream
) -> None:
    with Command(place, "login") as command:
        link = opened.read_text().strip()
        assert command.read_until(LINK) == link
        come_back(upstream.sign_in(link))
        command.read_until("is signed in")
        assert command.process.wait(20) == 0  # though its browser still runs


@pytest.mark.parametrize("name", ["lynx", "www-browser"])
def test_a_browser_inside_the_terminal_is_left_alone(
    idle: Gateway, upstream: FakeUpstream, name: str
) -> None:
    folder = idle.home / "bin"
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\ntouch {idle.home}/taken-over\n")
    (folder / name).chmod(0o700)
    del idle.environment["BROWSER"]
    idle.environment |= {"PATH": str(folder), "TERM": "xterm"}

    with Command(idle, "login", terminal=True) as command:
        come_back(upstream.sign_in(command.read_until(LINK)))
        code, _ = command.end()

    assert code == 0
    assert not (idle.home / "taken-over").exists()


def test_json_is_all_there_is_on_stdout(place: Gateway, upstream: FakeUpstream) -> None:
    words = [sys.executable, "-m", "azt", "login", "--no-browser", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=place.environment, cwd=place.home, **pipes) as process:
        told = ""
        while not LINK.search(told):
            line = process.stderr.readline()
            assert line, told
            told += line
        come_back(upstream.sign_in(LINK.search(told)[0]))
        out, rest = process.communicate(timeout=20)

    result = json.loads(out)
    assert process.returncode == 0, rest
    assert (result["status"], result["account"]["email"]) == ("done", "ada@example.com")


def test_with_both_ports_taken_a_line_is_pasted(place: Gateway, upstream: FakeUpstream) -> None:
    with ports_taken(), Command(place, "login", terminal=True) as command:
        back = upstream.sign_in(command.read_until(LINK))
        command.type("http://localhost:1455/auth/callback?code=x&state=forged")
        command.read_until("does not belong")
        command.type(back)
        code, shown = command.end()

    assert code == 0, shown
    assert "ada@example.com is signed in" in shown


def test_with_both_ports_taken_and_no_terminal_it_says_what_helps(place: Gateway) -> None:
    with ports_taken(), Command(place, "login") as command:
        code, shown = command.end()

    assert code == 3
    assert "azt login --device" in shown


def test_the_end_of_the_terminal_does_not_spin(idle: Gateway, upstream: FakeUpstream) -> None:
    with Command(idle, "login", terminal=True) as command:
        link = command.read_until(LINK)
        command.type("\x04")  # Ctrl-D on a line of its own ends the input
        command.type("\x04")
        time.sleep(1.5)
        ticks = Path(f"/proc/{command.process.pid}/stat")
        if ticks.exists():
            before = sum(map(int, ticks.read_text().rpartition(")")[2].split()[11:13]))
            time.sleep(1.0)
            after = sum(map(int, ticks.read_text().rpartition(")")[2].split()[11:13]))
            assert after - before < 50
        come_back(upstream.sign_in(link))
        assert command.end()[0] == 0


def test_a_device_code_is_shown_and_waited_for(place: Gateway, upstream: FakeUpstream) -> None:
    with Command(place, "login", "--device") as command:
        code = command.read_until(r"ABCD-\d{5}")
        assert f"{upstream.url}/codex/device" in command.shown
        upstream.enter(code)
        exit_code, shown = command.end()

    assert (exit_code, "ada@example.com is signed in" in shown) == (0, True)


@pytest.mark.parametrize("state, words", [("denied", "unknown"), ("expired", "expired")])
def test_a_device_code_that_comes_to_nothing_fails(
    idle: Gateway, upstream: FakeUpstream, state: str, words: str
) -> None:
    with Command(idle, "login", "--device") as command:
        upstream.enter(command.read_until(r"ABCD-\d{5}"), state)
        code, shown = command.end()

    assert code == 1
    assert words in shown and "Traceback" not in shown


def test_a_refusal_is_the_exit_code(place: Gateway) -> None:
    with Command(place, "login") as command:
        link = command.read_until(LINK)
        state = re.search(r"state=([\w-]+)", link)
        assert state
        told = "error=access_denied&error_description=No+thanks"
        come_back(f"http://localhost:1455/auth/callback?state={state[1]}&{told}")
        code, shown = command.end()

    assert (code, shown.strip().splitlines()[-1]) == (1, "azt: No thanks")
    assert accounts(place) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_it_and_frees_the_port(place: Gateway, terminal: bool) -> None:
    with Command(place, "login", terminal=terminal) as command:
        command.read_until(LINK)
        time.sleep(0.2)
        command.process.send_signal(signal.SIGINT)
        code, shown = command.end()

    assert (code, shown.strip().splitlines()[-1]) == (130, "azt: Interrupted.")
    assert "Traceback" not in shown
    assert is_free(1455)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc here")
def test_no_secret_is_in_the_arguments_of_a_process(
    place: Gateway, opened: Path, upstream: FakeUpstream
) -> None:
    seen: list[bytes] = []
    upstream.script(path="/oauth/token", json=upstream._token, delay=0.3)
    with Command(place, "login") as command:
        opened.read_text()
        back = upstream.sign_in(command.read_until(LINK))
        come_back(back)
        while command.process.poll() is None:
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.append(file.read_bytes())
            command._read(0.05)

    (sent,) = [one.body for one in upstream.requests if one.path == "/oauth/token"]
    everything = b"".join(seen) + command.shown.encode()
    assert b"azt" in everything
    for secret in (sent["code"], sent["code_verifier"], "rt_", "eyJ"):
        assert secret.encode() not in everything


# -- Signing out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ada@example.com", "{id}"])
def test_signing_out_ends_the_sign_in(place: Gateway, upstream: FakeUpstream, name: str) -> None:
    place.import_account(account_file())
    name = name.format(id=accounts(place)[0]["id"])

    done = place.azt("logout", name)

    assert (done.returncode, done.stdout.strip()) == (0, "ada@example.com is signed out.")
    assert upstream.revoked == {"acct-1"}
    assert accounts(place) == []


def test_signing_out_says_when_the_provider_could_not_be_told(
    place: Gateway, upstream: FakeUpstream
) -> None:
    place.import_account(account_file())
    upstream.script(path="/oauth/revoke", status=503, body=b"")

    done = place.azt("logout", "ada@example.com", "--json")

    result = json.loads(done.stdout)
    assert (done.returncode, result["revoked"], result["activeId"]) == (0, False, None)
    assert accounts(place) == []


def test_signing_out_nobody_changes_nothing(place: Gateway, upstream: FakeUpstream) -> None:
    place.import_account(account_file())

    done = place.azt("logout", "nobody")

    assert (done.returncode, "azt accounts list" in done.stderr) == (1, True)
    assert len(accounts(place)) == 1
    assert upstream.revoked == set()


def test_a_start_without_an_account_points_to_the_sign_in(idle: Gateway) -> None:
    idle.start()

    assert "`azt login`" in idle.log()
    assert "azt login" in idle.azt("accounts", "list").stdout
