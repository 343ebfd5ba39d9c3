"""What the tests of client libraries get: loopback only, and calls into other environments.

only_loopback  no telemetry and no proxy; looking up a foreign host fails the test; autouse
node           call a function of one of the Node scripts in this folder
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import QUIET, run_client
from harness import ROOT

SCRIPTS = Path(__file__).parent
PREPARED = ROOT / ".azt-test-env" / "node" / "node_modules"
NODE_MODULES = Path(os.environ.get("AZT_TEST_NODE_MODULES") or PREPARED)


@pytest.fixture(autouse=True)
def only_loopback(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    look_up, foreign = socket.getaddrinfo, []

    def guarded(host: Any, *rest: Any, **how: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", "::1"):
            foreign.append(host)
            raise socket.gaierror(f"the tests stay on loopback: {host}")
        return look_up(host, *rest, **how)

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    yield
    assert foreign == []


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Any]:
    """Call it with a script, one of its functions and what that takes, for what that returns."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")
    assert NODE_MODULES.is_dir(), "The Node libraries are not installed: run `python3 tests` once."
    for script in SCRIPTS.glob("*.mjs"):
        shutil.copy(script, tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)

    def call(script: str, function: str, **given: Any) -> Any:
        return run_client([program, "run.mjs", script, function], tmp_path, given)

    return call
