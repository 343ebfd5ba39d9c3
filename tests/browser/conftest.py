"""A real Chromium, headless: Debian's, driven by Playwright; and the console in it.

chromium         the browser, of one test module
page             a page of a fresh profile, of no gateway
gateway_console  start a gateway of its own with these accounts and settings, and open its console
console          the console of a gateway that a module's tests share; they leave it as it was

Whatever a console test does, it fails when the page breaks its content policy, writes an error to
the browser's console, asks anything outside this computer, or receives a sign-in secret.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from console import Console
from fake_upstream import FakeUpstream, Json, account_file
from harness import Gateway, make_gateway


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Not for the whole session: while Playwright runs, no other test can run an event loop."""
    program = shutil.which("chromium")
    if program is None:
        assert "CI" not in os.environ and os.geteuid() != 0, "install chromium: apt-get does it"
        pytest.skip("chromium is not installed here")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)  # what holds is seen at once; a machine may be busy
    with sync_playwright() as playwright:
        # Its sandbox does not run as root, and containers have a small /dev/shm.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page of a fresh profile. What it may not do, by its content policy, fails the test."""
    context = chromium.new_context()
    made = context.new_page()
    made.set_default_timeout(20_000)
    complaints: list[str] = []
    made.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    yield made
    context.close()
    assert [one for one in complaints if "Content Security Policy" in one] == []


GatewayConsole = Callable[..., Console]


@pytest.fixture
def gateway_console(chromium: Any, home: Path, upstream: FakeUpstream) -> Iterator[GatewayConsole]:
    """`gateway_console(accounts=[...], settings={...}, route="log", locale="zh-CN")`."""
    made: list[Console] = []

    def start(
        accounts: list[Json] | None = None,
        settings: dict[str, Any] | None = None,
        variables: dict[str, str] | None = None,
        arguments: tuple[str, ...] = ("--host", "127.0.0.1", "--port", "0"),
        route: str = "",
        **context: Any,
    ) -> Console:
        gateway = make_gateway(
            home, upstream, accounts=accounts, variables=variables, arguments=arguments
        )
        made.append(Console(chromium, gateway, upstream))
        if settings:
            made[-1].admin("PATCH", "/settings", {"values": settings})
        made[-1].open(route, **context)
        return made[-1]

    yield start
    for console in made:
        try:
            console.close()
        finally:
            console.gateway.stop()
        assert "Traceback" not in console.gateway.log(), console.gateway.log()


@pytest.fixture(scope="module")
def module_gateway(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    accounts = [
        account_file(),
        account_file("acct-2", "user-2", "work@corp.dev", "team"),
        account_file("acct-3", "user-3", "spare@example.com", "free"),
    ]
    gateway = make_gateway(tmp_path_factory.mktemp("console"), shared_upstream, accounts=accounts)
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def console(chromium: Any, module_gateway: Gateway, upstream: FakeUpstream) -> Iterator[Console]:
    """Three accounts; `console.open(route)` for a page, `console.page` after that."""
    made = Console(chromium, module_gateway, upstream)
    made.open()
    yield made
    made.close()
