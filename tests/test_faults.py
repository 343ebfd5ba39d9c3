"""What a kill, a failing disk, a flipped byte or a race may never do: lose a sign-in or a setting.

The counts here are a sample; `python3 tests --trust` tries all of it and prints the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fault_writers as writers
import pytest
from fake_upstream import FakeUpstream, account_file, make_token
from harness import MODEL, ROOT, Claim, Client, Gateway, eventually, home_variables

import azt

Json = dict[str, Any]
NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]
ALL = 10**9

# System calls that may well fail on a real disk; the others of the tracer's classes are only
# points to be killed at.
FAILING = set(
    "close fsync ftruncate getdents64 mkdir mkdirat openat pwrite64 read rename renameat renameat2 "
    "unlink unlinkat write".split()
)
ERRORS = ("ENOSPC", "EIO", "EROFS", "EMFILE")


# -- The tracer -----------------------------------------------------------------------------------


@functools.cache
def can_trace() -> bool:
    """Is strace here, and is tracing allowed?"""
    command = ["strace", "-qq", "-e", "trace=none", "true"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


HOW = "by strace at system calls" if can_trace() else "no ptrace here: at Python's audit events"


class Writers:
    """The process of fault_writers.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.template = folder / "template"
        self.home = folder / "home"
        writers.make_state(self.template)
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fault_writers.py")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        answer: Json = json.loads(self._process.stdout.readline())
        return answer

    def prepare(self, writer: str) -> Path:
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.template, self.home)
        writers.WRITERS[writer][0](self.home)
        return self.home

    def run(self, writer: str, *trace: str, hook: Json | None = None) -> int:
        """Prepare the home, run the writer under these options of strace, or under a hook."""
        order = {"writer": writer, "folder": str(self.prepare(writer)), "hook": hook}
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        child: int = self._answer()["pid"]
        tracer = None
        if trace:
            command = ["strace", "-f", "-qq", "-o", str(self.folder / "trace"), *trace]
            tracer = subprocess.Popen([*command, "-p", str(child)])
            while "\nTracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
                assert tracer.poll() is None
                time.sleep(0.001)  # another process attaches: there is nothing to wait on
        if hook is None:
            os.kill(child, signal.SIGCONT)
        status: int = self._answer()["status"]
        if tracer is not None:
            tracer.wait(20)
        return status

    def calls(self, writer: str) -> Counter[str]:
        """How often one thread at most makes each system call on files, undisturbed."""
        assert self.run(writer, "-e", "trace=%file,%desc") == 0
        counts: dict[str, Counter[str]] = {}
        for line in (self.folder / "trace").read_text().splitlines():
            found = re.match(r"(\d+) +(\w+)\(", line)
            if found:
                counts.setdefault(found[1], Counter())[found[2]] += 1
        return functools.reduce(lambda one, other: one | other, counts.values())

    def trouble(self) -> str:
        return (self.folder / "stderr").read_text()[-2000:]


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    made = Writers(tmp_path_factory.mktemp("writers"))
    yield made
    made.close()


def sample(points: list[Any], count: int) -> list[Any]:
    """At most `count` of the points, spread evenly."""
    step = max(1, -(-len(points) // count))
    return points[::step]


WRITER_NAMES = list(writers.WRITERS)


def before_and_after(faults: Writers, writer: str) -> tuple[Json, Json]:
    before = writers.state(faults.prepare(writer))
    assert faults.run(writer) == 0
    return before, writers.state(faults.home)


def kills(faults: Writers, writer: str, count: int) -> Iterator[tuple[object, int]]:
    """Run the writer again and again, killed one call later each time."""
    if can_trace():
        points = [(name, n + 1) for name, all in faults.calls(writer).items() for n in range(all)]
        for name, at in sample(sorted(points), count):
            inject = f"inject={name}:signal=KILL:when={at}"
            yield (name, at), faults.run(writer, "-e", f"trace={name}", "-e", inject)
        return
    for at in range(1, 1 + min(count, 1000)):
        status = faults.run(writer, hook={"at": at, "error": 0})
        yield at, status
        if status == 0:
            return


@pytest.mark.parametrize("writer", WRITER_NAMES)
def test_a_writer_killed_at_any_system_call_leaves_the_old_or_the_new(
    faults: Writers, claim: NewClaim, many: Many, writer: str
) -> None:
    points = claim(7, "state writers killed at every system call: old or new, whole")
    points.note(HOW)
    before, after = before_and_after(faults, writer)
    assert before["left behind"] == after["left behind"] == []
    for point, status in kills(faults, writer, many(3, ALL)):
        found = writers.state(faults.home)
        whole = all(found[part] in (before[part], after[part]) for part in before)
        points.check(whole and status in (-9, 0), (writer, point, status, found))


@pytest.mark.parametrize("writer", WRITER_NAMES)
def test_a_writer_whose_disk_fails_keeps_the_old_state(
    faults: Writers, claim: NewClaim, many: Many, writer: str
) -> None:
    points = claim(8, "errors of the disk at the same calls: the old state, or the new one said")
    points.note(HOW)
    before, after = before_and_after(faults, writer)
    if can_trace():
        calls = {name: n for name, n in faults.calls(writer).items() if name in FAILING}
        places = [
            (name, at + 1, error)
            for name, n in calls.items()
            for at in range(n)
            for error in ERRORS
        ]
        runs: Iterator[tuple[Any, int]] = (
            (
                place,
                faults.run(
                    writer,
                    "-e",
                    f"trace={place[0]}",
                    "-e",
                    f"inject={place[0]}:error={place[2]}:when={place[1]}",
                ),
            )
            for place in sample(sorted(places), many(5, ALL))
        )
    else:
        hooks = [{"at": at, "error": getattr(errno, e)} for at in range(1, 40) for e in ERRORS]
        runs = ((hook, faults.run(writer, hook=hook)) for hook in sample(hooks, many(5, ALL)))
    for point, status in runs:
        found = writers.state(faults.home)
        expected = {0: after, 3: before}.get(status)
        points.check(found == expected, (writer, point, status, found, faults.trouble()))


AT = r"(?:AT_FDCWD[^,]*, )?"
TRACED = re.compile(
    rf'\d+ +(?:(write|fsync)\(\d+<([^>]*)>|(rename)\w*\({AT}"([^"]*)", {AT}"([^"]*)")'
)


@pytest.mark.skipif(not can_trace(), reason="no ptrace here")
@pytest.mark.parametrize("writer", WRITER_NAMES)
def test_a_power_cut_finds_no_name_whose_content_was_not_synced_before(
    faults: Writers, claim: NewClaim, writer: str
) -> None:
    """The model: what was not synced is gone, and a rename may be on disk before its file."""
    renames = claim(7, "power cut: every file synced before its rename, every folder after it")
    assert faults.run(writer, "-y", "-e", "trace=write,fsync,?rename,?renameat,?renameat2") == 0
    unsynced: set[str] = set()
    open_renames: list[str] = []
    found = TRACED.findall((faults.folder / "trace").read_text())
    for call, path, is_rename, source, target in found:
        if is_rename:
            renames.check(source not in unsynced, (writer, target))
            open_renames.append(target)
        elif call == "write":
            unsynced.add(path)
        elif call == "fsync":
            unsynced.discard(path)
            open_renames = [one for one in open_renames if os.path.dirname(one) != path]
    renames.check(open_renames == [], (writer, open_renames))


# -- Damage ---------------------------------------------------------------------------------------

DAMAGED = {
    "accounts.json": azt.AccountStore.from_json,
    "keys.json": lambda saved: [*saved["keys"]],
    "renewals.json": lambda saved: [one["used"] for one in saved["lines"]],
    "sessions.json": lambda saved: [one["hash"] for one in saved["sessions"]],
    "settings.json": lambda saved: saved["values"].items(),
}


def damages(whole: bytes, prefixes: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """Torn after some byte, and with one bit turned over somewhere."""
    for length in sample(list(range(len(whole))), prefixes):
        yield f"the first {length} bytes", whole[:length]
    chance = random.Random(len(whole))
    for _ in range(flips):
        at, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        yield f"bit {bit} of byte {at}", whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]


@pytest.mark.parametrize("has_copy", [True, False], ids=["with a copy", "without a copy"])
@pytest.mark.parametrize("name", DAMAGED)
def test_no_damage_to_a_state_file_is_taken_for_an_empty_one(
    tmp_path: Path,
    claim: NewClaim,
    many: Many,
    caplog: pytest.LogCaptureFixture,
    name: str,
    has_copy: bool,
) -> None:
    tries = claim(9, "state files torn at every byte and with flipped bits: no silent reset")
    file, copy = tmp_path / name, tmp_path / f"{name}.bak"
    value = writers.content(name, "new")
    azt.write_json(file, value)
    whole = file.read_bytes()
    for damage, raw in damages(whole, many(25, ALL), many(50, 1000)):
        caplog.clear()
        file.write_bytes(raw)
        copy.unlink(missing_ok=True)
        if has_copy:
            copy.write_bytes(whole)
        try:
            found = azt.read_json(file, 1, DAMAGED[name])
        except azt.StateError as error:
            tries.check(not has_copy and name in error.message and file.read_bytes() == raw, damage)
            continue
        kept = [one.read_bytes() for one in tmp_path.glob("*.corrupt-*")]
        # A flip may hit the name of the check sum itself, or what is no content: white space.
        intact = value.items() <= (found or {}).items()
        is_said = kept == [raw] and name in caplog.text if kept else not caplog.text
        tries.check(intact and is_said and (has_copy or not kept), (name, damage, found))
        for one in tmp_path.glob("*.corrupt-*"):
            one.unlink()


# -- Renewals under kill -9 -----------------------------------------------------------------------


class Renewer:
    """The process of renewer.py, and what it said in one run."""

    def __init__(self, home: Path, upstream: FakeUpstream, codex: Path | None = None) -> None:
        self.environment = {**upstream.environment(), **home_variables(home)}
        self.paths = azt.Paths(home / ".ai-zero-token", codex or home / ".codex")
        self.environment["CODEX_HOME"] = str(self.paths.codex_auth.parent)
        azt.prepare_home(self.paths)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "renewer.py")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def sign_in(self, entry: Json | None = None) -> None:
        store = azt.AccountStore()
        store.add(*azt.to_accounts([entry or account_file()], time.time()))
        azt.write_json(self.paths.accounts, store.to_json())

    def run(self, times: int, after: tuple[int, float] | None = None, **how: object) -> list[Json]:
        """The lines of one child, killed after so many of them and so many seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"environment": self.environment, "times": times, **how}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        lines: list[Json] = [json.loads(self._process.stdout.readline())]
        if after is not None:
            while (
                sum("window_ms" in line for line in lines) < after[0] and "status" not in lines[-1]
            ):
                lines.append(json.loads(self._process.stdout.readline()))
            time.sleep(after[1])
            with contextlib.suppress(ProcessLookupError):
                os.kill(lines[0]["pid"], signal.SIGKILL)
        while "status" not in lines[-1]:
            lines.append(json.loads(self._process.stdout.readline()))
        return lines[1:-1]

    def on_disk(self) -> str:
        """The refresh token that the next start will have: the saved one, or the journal's."""
        saved = azt.read_json(self.paths.accounts, 1)
        journal = azt.read_json(self.paths.renewals, 1)
        assert saved is not None
        token: str = saved["accounts"][0]["refresh_token"]
        for line in journal["lines"] if journal else []:
            if line["used"] == azt._fingerprint(token):
                token = line.get("refresh_token") or token
        return token


@pytest.fixture
def renewer(home: Path, upstream: FakeUpstream) -> Iterator[Renewer]:
    made = Renewer(home, upstream)
    yield made
    made.close()


def test_a_renewed_token_outlives_a_kill_at_a_random_moment(
    renewer: Renewer, upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    tries = claim(10, "renewals under kill -9 at random moments: lost outside the window")
    chance, kills, on_the_way, in_window, windows_ms = random.Random(11), 0, 0, 0, []
    renewer.sign_in()
    while tries.tried < many(60, 1000):
        known, first = renewer.on_disk(), len(upstream.rotations)
        many_lines = chance.randrange(5)
        wait_s = chance.uniform(0.0, 0.02 if many_lines else 0.1)
        lines = renewer.run(1000, (many_lines, wait_s))
        kills += 1
        eventually(lambda: not upstream._tasks)  # it has read what the dead one had sent
        chain = [known, *(new for _old, new in upstream.rotations[first:])]
        used = [line["refresh_token"] for line in lines if "window_ms" in line]
        answers, kept = [line.get("answer") for line in lines], renewer.on_disk()
        windows_ms += [line["window_ms"] for line in lines if "window_ms" in line]
        for token in chain[1:-1]:  # the next one was asked for with it: it was on disk before
            tries.check(token in used, "a token was passed over")
        if len(chain) > 1:
            is_lost = kept != chain[-1]
            in_window += is_lost and chain[-1] in answers
            on_the_way += is_lost and chain[-1] not in answers
            tries.check(not is_lost or (kept == chain[-2] and chain[-1] not in used), (used, kept))
            if is_lost:  # tried once more, and then it is the person's turn
                before = len(upstream.requests)
                assert renewer.run(5) == [{"rejected": "refresh_token_reused"}]
                assert renewer.run(5) == [{"rejected": "refresh_token_reused"}]
                assert len(upstream.requests) == before + 1
                renewer.sign_in()
    windows_ms.sort()
    half, most = (windows_ms[int(len(windows_ms) * part)] for part in (0.5, 0.99))
    tries.note(f"kills: {kills}; lost before the answer was read: {on_the_way}")
    tries.note(f"lost in the window from the answer to the disk: {in_window}")
    tries.note(f"that window: median {half:.1f} ms, 99 % below {most:.1f} ms")


# -- Many at once ---------------------------------------------------------------------------------

ASKED = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


async def ask(port: int) -> bool:
    """One chat request on a connection of its own: was it answered?"""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Length: {len(ASKED)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + ASKED)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.startswith(b"HTTP/1.1 200 ") and b"You said: hi" in answer


def test_two_hundred_requests_on_an_expired_token_renew_it_once(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    rounds = claim(11, "200 parallel requests on an expired token: exactly one renewal")
    gateway = new_gateway(accounts=[])
    port, admin = int(gateway.url.rpartition(":")[2]), Client(gateway.url)
    admin_post = functools.partial(admin.post, headers=gateway.proof())

    async def all_at_once() -> list[bool]:
        return await asyncio.gather(*(ask(port) for _ in range(200)))

    for _ in range(many(2, 100)):
        ids = [one["id"] for one in admin.get("/_gateway/admin/accounts").json["items"]]
        if ids:
            admin_post("/_gateway/admin/accounts/remove", {"ids": ids})
        admin_post("/_gateway/admin/accounts/import", {"payload": account_file(exp=1.0)})
        before = len(upstream.rotations)
        answered = asyncio.run(all_at_once())
        renewed = len(upstream.rotations) - before
        rounds.check(all(answered) and renewed == 1, (answered.count(True), renewed))


def test_two_gateways_that_share_a_sign_in_with_codex_renew_it_once(
    home: Path, upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    rounds = claim(11, "two processes, one sign-in: exactly one renewal")
    codex = home / "shared-codex"
    codex.mkdir()
    pair = [Renewer(home / word, upstream, codex) for word in ("one", "other")]
    with ThreadPoolExecutor(2) as threads:
        for number in range(many(5, 100)):
            entry = account_file(exp=1.0)
            # The claims tell the second: whoever renews in it must not look older than it was.
            entry["access_token"] = make_token(exp=1.0, iat=number)
            (codex / "auth.json").write_text(json.dumps({"tokens": entry}))
            for renewer in pair:
                renewer.sign_in(entry)
            before = len(upstream.requests)
            both = list(threads.map(lambda one: one.run(1, at_once=200, shares=True), pair))
            tokens = {lines[-1]["refresh_token"] for lines in both}
            rounds.check(len(upstream.requests) == before + 1 and len(tokens) == 1, both)
    for renewer in pair:
        renewer.close()


def test_commands_without_a_gateway_renew_an_expired_token_once(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    rounds = claim(11, "two processes, one sign-in: exactly one renewal")
    gateway = new_gateway()
    gateway.stop()
    with ThreadPoolExecutor(3) as threads:
        for _ in range(many(1, 10)):
            gateway.azt("accounts", "remove", "ada@example.com")
            gateway.import_account(account_file(exp=1.0))
            before = len(upstream.rotations)
            done = list(threads.map(lambda _: gateway.azt("ask", "hi"), range(3)))
            answered = [one.stdout.strip() for one in done] == ["You said: hi"] * 3
            rounds.check(answered and len(upstream.rotations) == before + 1, done)
