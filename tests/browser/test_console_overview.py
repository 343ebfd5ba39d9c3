"""The shell of the console and its Overview. Numbers are those of console.md 10."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect


def test_the_overview_shows_who_serves_and_what_is_left(console: Any) -> None:
    page = console.page

    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    expect(page.locator(".hero")).to_contain_text("ada@example.com")
    expect(page.locator("#live")).to_have_text("Live")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_overview(console: Any, theme: str) -> None:
    page = console.open(color_scheme=theme)
    page.locator(".figures").wait_for()

    assert console.axe(page) == []
