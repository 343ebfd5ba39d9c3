"""The page of usage. Numbers are those of console.md 10."""

from __future__ import annotations

import csv
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from console import Console
from fake_upstream import FakeUpstream, Json, answer, message
from harness import chat_body
from playwright.sync_api import expect


def figure(page: Any, name: str) -> Any:
    return page.locator(".figure", has=page.get_by_text(name, exact=True)).locator("b")


def call(console: Any, agent: str, **body: Any) -> Any:
    headers = {"User-Agent": agent}
    return console.client.post("/v1/chat/completions", {**chat_body(), **body}, headers=headers)


def test_the_figures_are_those_of_the_gateway(console: Any, upstream: FakeUpstream) -> None:
    before = console.admin("GET", "/usage?tz=UTC")["range"]
    call(console, "OpenAI/Python 2")
    upstream.script(answer(message("no usage told"), usage=None))
    call(console, "curl/8")
    call(console, "curl/8", messages=3)
    page = console.open("usage?range=today", timezone_id="UTC")

    sums = console.admin("GET", "/usage?tz=UTC")["range"]
    assert sums["unknownTokenCount"] == before["unknownTokenCount"] + 1
    expect(figure(page, "Requests")).to_have_text(str(sums["requestCount"]))
    expect(figure(page, "Tokens")).to_have_text(str(sums["totalTokens"]))
    # A call whose tokens nobody told is a number of its own, and no zero.
    expect(figure(page, "No usage reported")).to_have_text(str(sums["unknownTokenCount"]))
    expect(figure(page, "Failed")).to_have_attribute("title", str(sums["failureCount"]))
    rows = page.locator(".card", has_text="By client").locator("tbody tr")
    expect(rows.filter(has_text="OpenAI/Python")).to_have_count(1)
    link = page.locator(".card", has_text="Errors").get_by_role("link", name="invalid")
    expect(link.first).to_have_attribute("href", re.compile(r"#/log\?result=failed&errorType="))


def test_the_view_is_in_the_address(console: Any) -> None:
    call(console, "OpenAI/Python 2")
    page = console.open("usage")
    page.get_by_role("radio", name="30 d").click()
    page.get_by_role("radio", name="Requests").click()
    page.get_by_role("radio", name="Client").click()

    expect(page.locator(".legend")).to_contain_text("OpenAI/Python")
    assert page.url.endswith("#/usage?range=30d&measure=requests&by=client")
    page.reload()
    expect(page.get_by_role("radio", name="30 d")).to_be_checked()
    expect(page.locator(".legend")).to_contain_text("OpenAI/Python")
    page.get_by_role("button", name="Show as table").click()
    table = page.locator(".chart table")
    numbers = table.locator("tbody tr").last.locator("td").all_inner_texts()
    assert sum(map(int, numbers)) == console.admin("GET", "/usage?tz=UTC")["range"]["requestCount"]


def test_what_happens_meanwhile_is_shown(console: Any) -> None:
    page = console.open("usage?range=process")
    count = int(figure(page, "Requests").inner_text())
    call(console, "OpenAI/Python 2")

    expect(figure(page, "Requests")).to_have_text(str(count + 1), timeout=20_000)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_usage(console: Any, theme: str) -> None:
    call(console, "OpenAI/Python 2")
    page = console.open("usage", color_scheme=theme)
    page.locator(".plot svg").wait_for()

    assert console.axe(page) == []


# 37. A browser in Shanghai and a gateway in UTC: a call at 20:00 UTC was made on the day after.


def evening(console: Console) -> datetime:
    """Three calls of two evenings ago, 20:00 UTC, as this gateway would have noted them."""
    at = datetime.now(UTC).replace(hour=20, minute=0, second=0, microsecond=0) - timedelta(days=2)
    tokens = {"input": 10, "cached": 0, "output": 5, "reasoning": 0, "total": 15}
    event: Json = {
        **{"result": "ok", "tokens": tokens, "durationMs": 900, "firstTokenMs": 300, "images": 0},
        **{"accountId": "", "model": "gpt-5.4", "method": "POST", "endpoint": "/v1/responses"},
        **{"errorType": None, "imageRoute": "none", "client": "curl", "attempts": 1},
    }
    folder = console.gateway.state / "usage" / "events"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**event, "at": int(at.timestamp() * 1000) + n}) for n in range(3)]
    (folder / f"{at:%Y-%m-%d}.jsonl").write_text("\n".join(lines) + "\n")
    return at


def test_days_of_the_browser_agree_in_figures_chart_and_table(gateway_console: Any) -> None:
    console: Console = gateway_console(variables={"TZ": "UTC"})
    at = evening(console)
    for zone in ("Asia/Shanghai", "UTC"):
        day = at.astimezone(ZoneInfo(zone))
        page = console.open("usage?range=30d&measure=requests&by=client", timezone_id=zone)
        expect(figure(page, "Requests")).to_have_text("3")
        page.get_by_role("button", name="Show as table").click()
        row = page.locator(".chart tbody tr").filter(has_text=re.compile(r"3$"))
        expect(row).to_have_count(1)
        expect(row.locator("th")).to_have_text(f"{day:%b} {day.day}")
        exact = re.compile(rf"{day.day}, .* {zone}")
        expect(row.locator("th span")).to_have_attribute("title", exact)

        with page.expect_download() as saved:
            page.get_by_role("button", name="Download CSV").click()
        lines = list(csv.DictReader(Path(saved.value.path()).read_text().splitlines()))
        assert [(line["date"], line["requestCount"]) for line in lines] == [
            (f"{day:%Y-%m-%d}", "3")
        ]
