"""Every view of the console: as a picture, by axe, for overflow, in two languages.

A page joins by a line in `VIEWS`. `prepare` gets the open page and does what leads to the view.
`scene` is what they are all shown with: accounts in every state, and calls that went well and not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fake_upstream import FakeUpstream, Json, account_file, limit_reached, text
from harness import Client


@dataclass(frozen=True)
class View:
    """`route` behind `#/`; `ready`: what is there when it is all there; `empty`: no account."""

    name: str
    route: str
    ready: str
    prepare: Callable[[Any], None] | None = None
    empty: bool = False
    proof: bool = True


def _open_box(page: Any) -> None:
    page.keyboard.press("Control+k")
    page.get_by_role("option").first.wait_for()


def _answer(page: Any) -> None:
    page.get_by_role("button", name=re.compile("^(Send|发送)$")).click()
    page.locator(".run-facts span", has_text=re.compile("^(done|完成)$")).wait_for()


def _open_failure(page: Any) -> None:
    page.locator("tbody tr", has_text="429").first.get_by_role("link").click()
    page.locator(".attempts").wait_for()


def _cut_off(page: Any) -> None:
    page.route("**/_gateway/admin/**", lambda route: route.abort())
    page.evaluate("import('/js/live.js').then((live) => live.retryNow())")
    page.locator("#offline").wait_for()


def _codex_diff(page: Any) -> None:
    page.locator(".codex .btn.primary").click()
    page.locator("dialog .diff").wait_for()


def _unsaved(page: Any) -> None:
    page.locator(".switch").first.click()
    page.locator(".dirty").wait_for()


def _choose_two(page: Any) -> None:
    page.get_by_role("radio").last.click()
    for box in page.locator(".accounts tbody input").all()[:2]:
        box.click()
    page.locator(".bulk").wait_for()


def _open_sheet(page: Any) -> None:
    page.locator(".accounts a.name").first.click()
    page.locator("dialog summary:visible").first.click()
    page.locator("dialog .facts").wait_for()


def _paste_accounts(page: Any) -> None:
    pasted = [account_file("acct-77", "user-77", "new@example.com", "team"), {"no": "account"}]
    page.locator("textarea").fill(json.dumps(pasted))
    page.locator("dialog .found table").wait_for()


VIEWS = [
    View("overview", "overview", ".figures + .cols .plot svg"),
    View("overview-first-run", "overview", ".first .btn.primary", empty=True),
    View("overview-offline", "overview", ".figures", _cut_off),
    View("command-box", "overview", ".figures", _open_box),
    View("accounts", "accounts", ".accounts .meter.ok"),
    View("accounts-table", "accounts", ".accounts .meter.ok", _choose_two),
    View("accounts-none", "accounts", ".empty", empty=True),
    View("account-sheet", "accounts", ".accounts .meter.ok", _open_sheet),
    View("add-browser", "accounts/add/browser", "dialog .btn.primary"),
    View("add-device", "accounts/add/device", "dialog .steps"),
    View("add-import", "accounts/add/import", "dialog textarea", _paste_accounts),
    View("usage", "usage", ".usage .plot svg"),
    View("connect", "connect/python", ".connect-page .code"),
    View("connect-codex", "connect/codex", ".codex .line", _codex_diff),
    View("settings-general", "settings", ".settings .form"),
    View("settings-routing", "settings/routing", ".settings .form", _unsaved),
    View("settings-images", "settings/images", ".settings .form"),
    View("settings-network", "settings/network", ".settings .form"),
    View("settings-sharing", "settings/sharing", ".settings .card + .card"),
    View("settings-data", "settings/data", ".settings .form"),
    View("settings-about", "settings/about", ".settings .form"),
    View("playground", "playground?mode=responses", ".controls select", _answer),
    View("playground-events", "playground?mode=responses&tab=events", ".controls select", _answer),
    View("playground-image", "playground?mode=image", ".controls select:visible"),
    View("log", "log", ".log tbody tr"),
    View("log-detail", "log", ".log tbody tr", _open_failure),
    View("sign-in", "signin", ".signin form"),
    View("not-found", "nowhere", ".empty"),
]

PEOPLE = {
    "ada@example.com": ("plus", [(38, 11_200), (79, 250_000)]),
    "work@corp.example": ("team", [(6, 16_860), (12, 500_000)]),
    "lab-02@example.com": ("plus", [(29, 17_700), (20, 520_000)]),
    "spare@example.com": ("free", [(60, 9_000), (31, 400_000)]),
    "night@example.net": ("plus", [(100, 1_440), (64, 300_000)]),
    "a-very-long-name-of-a-laboratory-that-goes-on@research.example.org": (
        "pro",
        [(97, 7_200), (50, 90_000)],
    ),
}


def people() -> list[Json]:
    return [
        account_file(f"acct-{at}", f"user-{at}", email, plan)
        for at, (email, (plan, _)) in enumerate(PEOPLE.items(), 1)
    ]


def scene(upstream: FakeUpstream, client: Client, proof: dict[str, str]) -> None:
    """Read all quotas, and make calls of several clients, some of which fail."""
    for at, (_, windows) in enumerate(PEOPLE.values(), 1):
        upstream.quotas[f"acct-{at}"] = windows
    client.post("/_gateway/admin/accounts/refresh-quotas", {}, headers=proof)
    calls = [("OpenAI/Python 2.0", 9), ("Cline/3.2", 5), ("curl/8.5", 2)]
    for agent, times in calls:
        for _ in range(times):
            asked = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "Say OK"}]}
            client.post("/v1/chat/completions", asked, headers={"User-Agent": agent})
    upstream.script(text("O", "K"), delays=0.05)
    client.responses_stream("Count to 20")
    upstream.script(status=429, json=limit_reached(7200))
    client.post("/v1/responses", {"model": "gpt-5.5", "input": "hi"})
    client.post("/v1/responses", {"model": "no-such-model", "input": "hi"})
    client.post("/v1/chat/completions", {"model": "gpt-5.5"})
