"""The code that guards tokens and files has no branch that no test takes.

The tests of these functions run once more, in processes of their own, under coverage.py.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, Claim

# Part of azt -> the tests that back it, and its functions: names and classes, or below a banner.
PARTS: dict[str, tuple[str, str]] = {
    "policy": (
        "test_policy.py test_keys.py test_sessions.py",
        "# -- who may call",
    ),
    "gate": (
        "test_gate.py test_forms.py test_outbound.py test_http_server.py",
        "# -- the gate",
    ),
    "state": (
        "test_state_files.py test_gateway.py test_command_line.py test_usage.py test_codex_files.py"
        " test_adoption.py test_renewals.py",
        "# 4. State files",
    ),
    "refresh": (
        "test_renewals.py test_oauth.py test_rotation.py test_gateway.py",
        "Renewals _take_tokens _fingerprint refresh_tokens _sign_in_again",
    ),
}
SETTINGS = """
[run]
branch = true
concurrency = thread
data_file = {data}
include = {file}
parallel = true
patch = subprocess, _exit
"""  # the gateways and commands that the tests start count too
LINES = (ROOT / "azt.py").read_text().splitlines()


def functions_of(names: str) -> dict[str, range]:
    """The functions, by their name, and their lines."""
    numbers = range(1, len(LINES) + 1)
    if names.startswith("# "):
        first = next(n for n in numbers if LINES[n - 1].startswith(names))
        ends = "# --" if names.startswith("# --") else "# ===="
        last = next(n for n in numbers[first + 3 :] if LINES[n - 1].startswith(("# ====", ends)))
        numbers = range(first, last)
    found: dict[str, range] = {}
    for node in ast.parse("\n".join(LINES)).body:
        for one in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) and one.lineno in numbers:
                if names.startswith("# ") or {one.name, getattr(node, "name", "")} & {
                    *names.split()
                }:
                    prefix = f"{node.name}." if one is not node else ""
                    found[prefix + one.name] = range(one.lineno, (one.end_lineno or 0) + 1)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_branch_is_taken_by_a_test(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    claim: Callable[[int, str], Claim],
    many: Callable[[int, int], int],
    part: str,
) -> None:
    if part != "policy" and not many(0, 1):
        pytest.skip("with --trust: the tests run a second time")
    tests, names = PARTS[part]
    branches = claim(18, "branches of policy, gate, state and refresh: taken by a test")
    functions = functions_of(names)
    known = {word for name in functions for word in name.split(".")}
    assert functions and (names.startswith("# ") or known >= set(names.split()))
    settings = tmp_path / "settings"
    settings.write_text(SETTINGS.format(data=tmp_path / "data", file=ROOT / "azt.py"))
    run = [sys.executable, "-m", "coverage"]
    where = {**os.environ, "COVERAGE_RCFILE": str(settings), "PYTHONPATH": str(ROOT)}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600"]
    files = [str(ROOT / "tests" / name) for name in tests.split()]
    done = subprocess.run(
        [*run, "run", *command, *files], cwd=ROOT, env=where, capture_output=True, text=True
    )
    # 1: a test failed; that is told where it runs by itself.
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-1000:]
    subprocess.run([*run, "combine", "-q"], cwd=ROOT, env=where, check=True)
    report = tmp_path / "report.json"
    subprocess.run([*run, "json", "-q", "-o", str(report)], cwd=ROOT, env=where, check=True)
    (seen,) = json.loads(report.read_text())["files"].values()
    for name, lines in functions.items():
        taken = [pair for pair in seen["executed_branches"] if pair[0] in lines]
        missing = [pair for pair in seen["missing_branches"] if pair[0] in lines]
        unseen = [line for line in seen["missing_lines"] if line in lines]
        for pair in taken:
            branches.check(True, pair)
        for start, end in missing:
            branches.check(False, f"{name}: line {start} -> {end}: {LINES[start - 1].strip()}")
        branches.check(not unseen, f"{name}: lines {unseen}")
