"""A real Chromium, headless: Debian's, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Not for the whole session: while Playwright runs, no other test can run an event loop."""
    program = shutil.which("chromium")
    if program is None:
        assert "CI" not in os.environ and os.geteuid() != 0, "install chromium: apt-get does it"
        pytest.skip("chromium is not installed here")
    from playwright.sync_api import sync_playwright

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
