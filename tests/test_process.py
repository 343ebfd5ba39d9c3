"""The process among others: ports, signals, users, files, disks (trust.md F45, F60 to F72).

What else belongs to these faults stands with its room: signals and lost terminals in
test_command_line, running out of files and the limits in test_http_server, damaged and newer state
in test_state_files and test_gateway, full disks in test_faults and test_usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Json, account_file, text
from harness import Client, Gateway, Stream, chat_body, eventually

import azt

FIRST_DELTA = 5
"""How many events of `text(...)` come up to and with the first delta."""
NOBODY = 65534

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")


@pytest.fixture
def new(home: Path, upstream: FakeUpstream) -> Iterator[Callable[..., Gateway]]:
    """Makes gateways that are not started yet; those that were end with the test."""
    made: list[Gateway] = []

    def make(folder: Path = home, port: int = 0, **variables: str) -> Gateway:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        made.append(Gateway(folder, {**upstream.environment(), **variables}, where))
        return made[-1]

    yield make
    for gateway in made:
        if gateway.url:
            gateway.stop()
            assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def idle(new: Callable[..., Gateway]) -> Gateway:
    """A home in which nothing runs."""
    return new()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user of this machine can reach."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def with_account(gateway: Gateway) -> Gateway:
    gateway.import_account(account_file())
    return gateway


def stalled(gateway: Gateway, upstream: FakeUpstream) -> Stream:
    """A stream that has said "Hel" and waits for the upstream."""
    upstream.script(text("Hel", "lo"), stall=True, after=FIRST_DELTA)
    stream = Client(gateway.url).open("POST", "/v1/chat/completions", chat_body(stream=True))
    stream.read_until(b'"Hel"')
    return stream


def figure(gateway: Gateway, name: str) -> int:
    """One of the gateway's own figures of its process."""
    shown = Client(gateway.url).get("/metrics").body.decode()
    found = re.search(rf"^azt_process_{name} (\d+)$", shown, re.MULTILINE)
    assert found is not None, shown
    return int(found[1])


def complaint(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The sentence on stderr of a command that ended with `code`."""
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


# -- F45: homes that cannot be used ---------------------------------------------------------------


@as_root
@pytest.mark.parametrize("command", ["start --no-open", "accounts list"])
def test_a_home_that_may_not_be_written_is_named(
    new: Callable[..., Gateway], public: Path, command: str
) -> None:
    gateway = new(public)

    done = gateway.azt(*command.split(), user=NOBODY, group=NOBODY, extra_groups=[])

    assert str(public / ".ai-zero-token") in complaint(done, 2)
    assert "AI_ZERO_TOKEN_HOME" in done.stderr


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_a_home_that_is_no_folder_is_named(idle: Gateway, tmp_path: Path, kind: str) -> None:
    home = Path(idle.environment["AI_ZERO_TOKEN_HOME"])
    if kind == "file":
        home.write_text("")
    else:
        home.symlink_to(tmp_path)

    assert str(home) in complaint(idle.azt("start", "--no-open"), 2)
    assert not (tmp_path / ".state").exists()


def test_a_missing_home_is_made(idle: Gateway) -> None:
    idle.environment["AI_ZERO_TOKEN_HOME"] = str(idle.home / "deep" / "down")

    idle.start()

    assert (idle.state / "lock").exists()
    assert idle.state.stat().st_mode & 0o777 == 0o700


# -- F60, F61: signals ----------------------------------------------------------------------------


def test_what_does_not_end_in_the_time_of_a_drain_is_told_so(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    driver = idle.home / "driver.py"
    driver.write_text("import azt\nazt.DRAIN_S = 0.5\nraise SystemExit(azt.main())\n")
    with_account(idle).program = [sys.executable, str(driver)]
    stream = stalled(idle.start(), upstream)

    idle.process.send_signal(signal.SIGTERM)
    body = stream.read_rest()
    stream.close()

    assert b'"error"' in body.body and b"[DONE]" not in body.body
    assert not body.cut
    assert idle.process.wait(20) == 0


@pytest.mark.parametrize("name", ["SIGHUP", "SIGPIPE"])
def test_these_signals_end_no_stream(idle: Gateway, upstream: FakeUpstream, name: str) -> None:
    stream = stalled(with_account(idle).start(), upstream)

    idle.process.send_signal(getattr(signal, name))
    status = Client(idle.url).get("/v1/models").status
    upstream.release()
    body = stream.read_rest()
    stream.close()

    assert status == 200
    assert body.body.endswith(b"data: [DONE]\n\n")
    assert idle.process.poll() is None


# -- F62: a port that is taken --------------------------------------------------------------------


@on_linux
def test_whoever_holds_the_port_is_named(idle: Gateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        idle.arguments[-1] = str(holder.getsockname()[1])
        said = complaint(idle.azt("start", "--no-open", *idle.arguments), 3)

    assert f"process {os.getpid()}, " in said
    assert "--port" in said


def test_another_azt_on_the_port_is_called_one(
    new: Callable[..., Gateway], idle: Gateway, tmp_path: Path
) -> None:
    idle.start()
    other = new(tmp_path, int(idle.url.rpartition(":")[2]))

    said = complaint(other.azt("start", "--no-open", *other.arguments), 3)

    is_named = f"azt of the home {idle.state.parent}" in said and str(idle.process.pid) in said
    assert is_named or "an azt, listens there" in said  # where its user may not look: it answers
    assert not (other.state / "settings.json").exists()
    assert Client(idle.url).get("/_gateway/health").status == 200


# -- F63, F64: files ------------------------------------------------------------------------------


@on_linux
def test_without_a_file_left_running_streams_go_on_and_one_line_tells(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    stream = stalled(with_account(idle).start(), upstream)
    limits = resource.prlimit(idle.process.pid, resource.RLIMIT_NOFILE)
    few = figure(idle, "open_fds") + 4
    resource.prlimit(idle.process.pid, resource.RLIMIT_NOFILE, (few, limits[1]))
    host, port = idle.url.removeprefix("http://").split(":")

    socks = [socket.create_connection((host, int(port)), 20) for _ in range(20)]
    turned_away = [sock for sock in socks if not can_wait(sock)]
    eventually(lambda: "Too many open files" in idle.log())
    upstream.release()
    body = stream.read_rest()
    for sock in socks:
        sock.close()
    resource.prlimit(idle.process.pid, resource.RLIMIT_NOFILE, limits)

    assert body.body.endswith(b"data: [DONE]\n\n")
    assert turned_away
    eventually(lambda: is_answered(idle))
    assert idle.log().count("Too many open files") == 1
    stream.close()


def can_wait(sock: socket.socket) -> bool:
    """False when the other side has closed this idle connection."""
    sock.settimeout(0.3)
    try:
        return bool(sock.recv(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def is_answered(gateway: Gateway) -> bool:
    try:
        return Client(gateway.url).get("/_gateway/health").status == 200
    except (OSError, ValueError):
        return False


@on_linux
def test_idle_and_reset_connections_leave_no_file_behind(idle: Gateway) -> None:
    before = figure(idle.start(), "open_fds")
    host, port = idle.url.removeprefix("http://").split(":")
    idle_ones = [socket.create_connection((host, int(port)), 20) for _ in range(300)]
    head = b"GET /_gateway/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sock in idle_ones:
        sock.sendall(head)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    during = figure(idle, "open_fds")

    linger = b"\1\0\0\0\0\0\0\0"
    for number, sock in enumerate(idle_ones):
        if number % 2:  # half of them with a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()

    assert during >= before + 300
    eventually(lambda: figure(idle, "open_fds") <= before, 30)


# -- F65: little memory ---------------------------------------------------------------------------


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 300 MB."""
    for base, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path("/sys/fs/cgroup", base, f"azt-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                (folder / limit).write_text(str(300 << 20))
                break
            folder.rmdir()
    else:
        pytest.skip("no control group may be made here")
    yield folder
    eventually(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


@on_linux
def test_large_bodies_are_refused_before_the_memory_of_its_group_is_full(
    small_group: Path, home: Path, upstream: FakeUpstream
) -> None:
    join = f'echo $$ > {small_group}/cgroup.procs; exec "$@"'
    gateway = Gateway(home, upstream.environment(), ["--host", "127.0.0.1", "--port", "0"])
    gateway.program = ["sh", "-c", join, "sh", *gateway.program]
    gateway.start()
    address = gateway.url.removeprefix("http://").split(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    socks = [socket.create_connection((address[0], int(address[1])), 20) for _ in range(8)]

    def sent(sock: socket.socket) -> bytes:
        with contextlib.suppress(OSError):
            sock.sendall(head % (60 << 20) + b" " * (50 << 20))
        sock.settimeout(0.5)
        with contextlib.suppress(OSError):
            return sock.recv(4096)
        return b""

    answers = [sent(sock) for sock in socks]
    status = Client(gateway.url).get("/_gateway/health").status
    for sock in socks:
        sock.close()

    assert answers.count(b"") == 1  # the first fits
    assert sum(b" 503 " in one and b"retry-after" in one.lower() for one in answers) >= 6
    assert status == 200
    assert gateway.stop() == 0


# -- F67: files that have grown beyond use --------------------------------------------------------


@on_linux
def test_a_log_of_a_gigabyte_without_a_line_in_it_is_no_obstacle(idle: Gateway) -> None:
    idle.azt("keys", "list")
    day = idle.state / "usage" / "events" / "2026-01-01.jsonl"
    day.parent.mkdir(parents=True)
    for path, size in ((idle.state / "requests.jsonl", 1 << 30), (day, 64 << 20)):
        with path.open("wb") as file:
            file.truncate(size)

    idle.start()

    assert figure(idle, "resident_memory_bytes") < 200 << 20
    assert Client(idle.url).get("/v1/models").status == 200


# -- F68: a slow disk -----------------------------------------------------------------------------


@as_root  # only root may trace a process that hides its memory
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_a_disk_that_takes_seconds_to_sync_holds_up_nobody_else(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    with_account(idle).start()
    slow = ["strace", "-qq", "-f", "-p", str(idle.process.pid), "-e", "trace=fsync"]
    trace = idle.home / "trace"
    inject = ["-e", "inject=fsync:delay_enter=20000000", "-o", str(trace)]
    body = {"values": {"defaultModel": "gpt-5.5"}}
    with subprocess.Popen([*slow, *inject], stderr=subprocess.DEVNULL) as tracer:
        try:
            status = Path(f"/proc/{idle.process.pid}/status")
            eventually(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text())
            with contextlib.closing(Client(idle.url).connect()) as connection:
                headers = {**idle.proof(), "Content-Type": "application/json"}
                path = "/_gateway/admin/settings"
                connection.request("PATCH", path, json.dumps(body), headers)
                answered = [Client(idle.url).chat().status for _ in range(3)]
                is_saved = select.select([connection.sock], [], [], 0)[0]
                tracer.terminate()
                changed = connection.getresponse().status
        finally:
            tracer.terminate()

    assert not is_saved  # the change itself waits for its disk
    assert answered == [200] * 3
    assert changed == 200


# -- F71: addresses -------------------------------------------------------------------------------

NO_IPV4, NO_IPV6 = (
    "ip address del 127.0.0.1/8 dev lo",
    "sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
)
NETWORKS: dict[str, tuple[str, list[str], str]] = {
    "IPv4 only": (NO_IPV6, ["--host", "127.0.0.1"], "127.0.0.1"),
    "IPv4 only, no host": (NO_IPV6, [], "127.0.0.1"),
    "IPv6 only": (NO_IPV4, ["--host", "::1"], "[::1]"),
    "IPv6 only, all addresses": (NO_IPV4, ["--host", "::"], "[::1]"),
    "both, no host": ("true", [], "127.0.0.1"),
}


def can_unshare() -> bool:
    tools = all(map(shutil.which, ("ip", "sysctl", "unshare")))
    return tools and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="no network of one's own here")
@pytest.mark.parametrize("change, asked, told", NETWORKS.values(), ids=NETWORKS)
def test_it_binds_where_there_is_one_family_only(
    idle: Gateway, change: str, asked: list[str], told: str
) -> None:
    idle.program = ["unshare", "-n", "sh", "-c", f'ip link set lo up; {change}; exec "$@"', "sh"]
    idle.program += [sys.executable, "-m", "azt"]
    idle.arguments = [*asked, "--port", "0"]

    idle.start()  # it says where it is; nobody outside that network can ask it
    inside = ["nsenter", "-t", str(idle.process.pid), "-n", sys.executable, "-m", "azt", "status"]
    done = subprocess.run(inside, env=idle.environment, capture_output=True, text=True, timeout=60)

    assert idle.url.startswith(f"http://{told}:")
    assert done.returncode == 0, done.stderr
    assert f"{idle.url}/v1" in done.stdout


# -- F72: a newer azt was here --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accounts.json", "keys.json"])
def test_state_of_a_newer_azt_is_left_alone(idle: Gateway, name: str) -> None:
    with_account(idle)
    idle.azt("keys", "add", "phone")
    path = idle.state / name
    value: Json = json.loads(path.read_text())
    value.pop("sum")
    path.write_text(json.dumps({**value, "version": 99}))
    newer = path.read_bytes()

    said = complaint(idle.azt("start", "--no-open", *idle.arguments), 2)
    asked = complaint(idle.azt("accounts", "list"), 2)

    for sentence in (said, asked):
        assert "newer azt" in sentence and str(path) in sentence
    assert path.read_bytes() == newer


# -- Secrets in memory ----------------------------------------------------------------------------


@as_root
@on_linux
def test_no_other_program_of_its_user_reads_its_memory(
    new: Callable[..., Gateway], public: Path
) -> None:
    os.chown(public, NOBODY, NOBODY)
    gateway = new(public)
    user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}

    gateway.start(**user)
    memory = f"/proc/{gateway.process.pid}/mem"
    code = f"open({memory!r}, 'rb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **user)

    assert "PermissionError" in done.stderr
    assert figure(gateway, "open_fds") > 5  # what the system hides now, it tells itself


@on_linux
def test_a_core_of_it_is_never_written() -> None:
    code = "import azt, ctypes; azt.main(['keys', 'list']); print(ctypes.CDLL(None).prctl(3))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "0", done.stderr


def test_the_figures_of_a_process_are_its_own() -> None:
    assert azt.process_figures()["threads"] >= 1


# -- A command at work ----------------------------------------------------------------------------


def test_a_start_waits_a_while_for_a_command_and_then_names_it(idle: Gateway) -> None:
    idle.azt("keys", "list")
    lock = azt.HomeLock(idle.state / "lock")
    assert lock.acquire() is None
    try:
        said = complaint(idle.azt("start", "--no-open", *idle.arguments), 2)
    finally:
        lock.release()

    assert f"(pid {os.getpid()}) is at work in this home" in said
