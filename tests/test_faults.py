"""What a kill, a failing disk, a flipped byte or a race may never do: lose a sign-in or a setting.

The counts here are a sample; `python3 tests --trust` tries all of it and prints the table.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_writers as writers
import pytest
from conftest import Claim
from harness import ROOT

Json = dict[str, Any]
NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]
ALL = 10**9

# System calls that may well fail on a real disk; the others of the tracer's classes are only
# points to be killed at.
FAILING = set(
    "openat read write pwrite64 fsync rename close unlink ftruncate mkdir getdents64".split()
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


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Writers]:
    made = Writers(tmp_path)
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
    for point, status in kills(faults, writer, many(4, ALL)):
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
            for place in sample(sorted(places), many(8, ALL))
        )
    else:
        hooks = [{"at": at, "error": getattr(errno, e)} for at in range(1, 40) for e in ERRORS]
        runs = ((hook, faults.run(writer, hook=hook)) for hook in sample(hooks, many(8, ALL)))
    for point, status in runs:
        found = writers.state(faults.home)
        expected = {0: after, 3: before}.get(status)
        points.check(found == expected, (writer, point, status, found, faults.trouble()))
