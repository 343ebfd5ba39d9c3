"""The shell of the console, its first run and its Overview. Numbers are those of console.md 10."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import account_file, limit_reached, text
from playwright.sync_api import expect

PHONE = {"width": 390, "height": 844}


# -- First run -------------------------------------------------------------------------------------


@pytest.fixture
def first(gateway_console: Any, ports: None) -> Any:
    return gateway_console(accounts=[])


def sign_in(console: Any) -> None:
    """Follow the link; at the provider's own page press its button."""
    with console.page.expect_popup() as popup:
        console.click("Open sign-in page")
    popup.value.get_by_role("button", name="Continue").click()
    popup.value.get_by_role("heading", name="Signed in").wait_for()


def test_from_nothing_to_a_streamed_answer_in_two_clicks(first: Any, upstream: Any) -> None:
    """1, 2, 3 and 42 (T1)."""
    page, steps = first.page, first.page.locator(".first li")
    link = page.get_by_role("link", name="Open sign-in page")
    assert link.get_attribute("href").startswith(f"{upstream.url}/oauth/authorize?")
    expect(steps.nth(1)).to_contain_text("Unlocks when")

    sign_in(first)
    expect(steps.nth(0)).to_contain_text("ada@example.com is ready")
    expect(page.locator(".hero")).to_contain_text("ada@example.com")
    upstream.script(text("Count", "ing", " up", " to OK"), delays=0.3)
    first.click("Send a test call")

    seen = {
        page.locator(".answer").inner_text() for _ in range(200) if not page.wait_for_timeout(8)
    }
    expect(steps.nth(1)).to_contain_text("done in")
    assert page.locator(".answer").inner_text() == "Counting up to OK"
    assert len(seen) >= 3, seen
    assert first.clicks == 2


def test_the_first_call_is_made_by_keyboard_alone(first: Any) -> None:
    """35 (T1)."""
    page = first.page
    page.get_by_role("link", name="Open sign-in page").focus()
    with page.expect_popup() as popup:
        page.keyboard.press("Enter")
    popup.value.get_by_role("button", name="Continue").focus()
    popup.value.keyboard.press("Enter")
    send = page.get_by_role("button", name="Send a test call")
    send.focus()
    page.keyboard.press("Enter")

    expect(page.locator(".answer")).to_have_text("You said: Say OK")
    expect(page.get_by_text("done in")).to_be_visible()


def test_the_three_steps_can_be_dismissed_and_stay_so(gateway_console: Any) -> None:
    console = gateway_console()
    console.click("Dismiss")
    expect(console.page.locator(".first")).to_have_count(0)

    console.page.reload()
    expect(console.page.locator(".figures")).to_be_visible()
    expect(console.page.locator(".first")).to_have_count(0)


# -- The overview ----------------------------------------------------------------------------------


def test_it_shows_who_serves_what_is_left_and_who_is_next(console: Any, upstream: Any) -> None:
    """T5: no click."""
    upstream.quotas["acct-1"] = [(38, 11_200), (79, 250_000)]
    console.admin("POST", "/accounts/refresh-quotas", {})
    hero = console.page.locator(".hero")

    expect(hero).to_contain_text("ada@example.com")
    expect(hero).to_contain_text("62% left")
    expect(hero).to_contain_text("21% left")
    expect(hero.locator(".queue li").first).to_contain_text("work@corp.dev")
    meter = hero.get_by_role("meter", name="5-hour window")
    expect(meter).to_have_attribute("aria-valuetext", re.compile(r"62% left, resets .*, On pace"))
    assert console.clicks == 0


def test_the_account_is_switched_with_two_clicks_and_back(console: Any) -> None:
    """13 and T6, by mouse."""
    page, hero = console.page, console.page.locator(".hero p.name")
    console.click("Switch account")
    console.click(page.get_by_role("menuitem", name="work@corp.dev"))

    expect(hero).to_have_text("work@corp.dev")
    assert console.clicks == 2
    console.click(page.locator(".toast").get_by_role("button", name="Undo"))
    expect(hero).to_have_text("ada@example.com")


def test_the_account_is_switched_by_keyboard_alone(console: Any) -> None:
    """35 (T6): focus comes back to what opened the menu."""
    page, switch = console.page, console.page.get_by_role("button", name="Switch account")
    switch.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".hero p.name")).to_have_text("work@corp.dev")
    switch.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")

    expect(switch).to_be_focused()
    console.admin("POST", f"/accounts/{account_id(console, 'ada')}/activate", {})


def account_id(console: Any, name: str) -> str:
    items = console.admin("GET", "/accounts")["items"]
    return next(str(one["id"]) for one in items if one["email"].startswith(name))


def test_calls_show_as_they_happen(console: Any) -> None:
    row = console.page.locator("table.rows tbody tr").first
    console.client.chat("hi", model="gpt-5.5")
    expect(row).to_contain_text("/v1/chat/completions")
    expect(row.locator(".code")).to_have_text("200")
    console.client.post("/v1/responses", {"model": "no-such-model", "input": "hi"})

    expect(row).to_contain_text("/v1/responses")
    expect(row.locator(".code.failed")).to_be_visible()
    expect(console.page.locator(".figure").first).to_contain_text("ok ·")


def test_an_automatic_switch_is_told_with_its_reason(gateway_console: Any, upstream: Any) -> None:
    """18, the part of the Overview."""
    accounts = [account_file(), account_file("acct-2", "user-2", "work@corp.dev", "team")]
    console = gateway_console(accounts=accounts, settings={"autoSwitch": {"enabled": True}})
    upstream.script(status=429, json=limit_reached(7200), account="acct-1")

    assert console.client.chat("hi").status == 200

    toast = console.page.locator(".toast")
    expect(toast).to_contain_text("Switched from ada@example.com to work@corp.dev")
    expect(console.page.locator(".hero p.name")).to_have_text("work@corp.dev")
    expect(toast.get_by_role("button", name="Switch back")).to_be_visible()


# -- Copying ---------------------------------------------------------------------------------------


def test_the_base_url_is_copied_with_one_click_and_a_snippet_with_one(console: Any) -> None:
    """4, T2, T3."""
    page = console.page
    console.click(page.locator("#base button"))
    assert console.clipboard() == f"{console.url}/v1"
    console.click(page.locator("figure.code").get_by_role("button", name="Copy"))

    copied = console.clipboard()
    assert f'base_url="{console.url}/v1"' in copied
    assert console.clicks == 2


def test_without_a_clipboard_the_text_is_copied_all_the_same(console: Any) -> None:
    """5: what a page at http://192.168.1.20 has."""
    page = console.page
    page.evaluate(
        """() => {
            Object.defineProperty(navigator, 'clipboard', {value: undefined});
            document.addEventListener('copy', () => { window.copied = getSelection() + '' ||
                document.activeElement.value; });
        }"""
    )
    console.click(page.locator("#base button"))

    expect(page.locator("#said")).to_have_text("Copied")
    assert page.evaluate("window.copied") == f"{console.url}/v1"


# -- The stream of events --------------------------------------------------------------------------


def test_a_gateway_that_comes_back_is_found_again(gateway_console: Any, upstream: Any) -> None:
    """28: no reload, and the log goes on."""
    console = gateway_console()
    console.allow(0)
    page, gateway = console.page, console.gateway
    page.evaluate("window.same = 'page'")
    gateway.stop()
    expect(page.locator("#offline")).to_contain_text("Gateway not reachable")
    expect(page.locator("#live")).to_have_text("Not reachable")
    expect(page.locator(".hero")).to_contain_text("ada@example.com")

    gateway.arguments = ["--host", "127.0.0.1", "--port", console.url.rpartition(":")[2]]
    gateway.start()

    expect(page.locator("#offline")).to_have_count(0, timeout=30_000)
    console.client.chat("after")
    expect(page.locator("table.rows tbody tr").first).to_contain_text("/v1/chat/completions")
    assert page.evaluate("window.same") == "page"


def test_a_hidden_tab_holds_no_stream(console: Any) -> None:
    """29, in virtual time."""
    page = console.page
    page.clock.install()
    streams: list[str] = []
    page.on("request", lambda one: streams.append("open") if "/events" in one.url else None)
    page.on("requestfailed", lambda one: streams.append("shut") if "/events" in one.url else None)
    hide = """(hidden) => {
        Object.defineProperty(document, 'hidden', {get: () => hidden, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(hide, True)
    page.clock.fast_forward(29_000)
    assert streams == []
    page.clock.fast_forward(2_000)
    page.wait_for_timeout(300)
    assert streams == ["shut"]

    console.client.chat("while hidden")
    page.evaluate(hide, False)
    page.clock.run_for(1_000)

    expect(page.locator("table.rows tbody tr").first).to_contain_text("/v1/chat/completions")
    assert streams == ["shut", "open"]


def test_events_arrive_whole_however_they_are_cut(console: Any) -> None:
    found = console.page.evaluate(
        r"""async () => {
            const {sseReader} = await import('/js/api.js');
            const text = ': ping\r\n\r\nid: 7\nevent: one\ndata: {"a":\ndata: "ü\\n"}\n\n'
                + 'data:tight\r\rretry: 5\nevent\ndata: x\ndata\n\nevent: none\n\ndata: open';
            const of = (pieces) => {
                const events = [], feed = sseReader((event) => events.push({...event}));
                for (const piece of pieces) feed(piece);
                return JSON.stringify(events);
            };
            const ways = [[text], [...text]];
            for (let at = 1; at < text.length; at += 1) {
                ways.push([text.slice(0, at), text.slice(at)]);
            }
            return [...new Set(ways.map(of))];
        }"""
    )

    assert len(found) == 1
    assert found[0] == (
        '[{"event":"one","data":"{\\"a\\":\\n\\"ü\\\\n\\"}","id":"7"},'
        '{"event":"message","data":"tight","id":"7"},'
        '{"event":"message","data":"x\\n","id":"7"}]'
    )


# -- Finding one's way -----------------------------------------------------------------------------


def test_back_and_forward_go_through_the_pages_and_focus_the_title(console: Any) -> None:
    """34."""
    page, title = console.page, console.page.get_by_role("heading", level=1)
    page.goto(f"{console.url}/#/overview")
    page.get_by_role("link", name="Accounts", exact=True).first.click()
    expect(title).to_have_text("Accounts")
    expect(title).to_be_focused()
    page.goto(f"{console.url}/#/nowhere/%E0%A4%A")
    expect(title).to_have_text("Not found")
    page.go_back()
    expect(title).to_have_text("Accounts")
    page.go_back()
    expect(title).to_have_text("Overview")
    page.go_forward()

    expect(title).to_have_text("Accounts")
    expect(page).to_have_title(re.compile("Accounts · azt"))


def test_the_command_box_finds_pages_accounts_and_actions(console: Any) -> None:
    """T23, and 35 for the shell."""
    page = console.page
    page.keyboard.press("Control+k")
    page.keyboard.type("serve work")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator(".hero p.name")).to_have_text("work@corp.dev")
    page.keyboard.press("Control+k")
    page.keyboard.type("recent mess")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Now serving with work@corp.dev")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Keyboard shortcuts")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.get_by_role("dialog")).to_contain_text("Add account")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("u")
    expect(page.get_by_role("heading", level=1)).to_have_text("Usage")
    page.keyboard.press("?")
    page.get_by_role("switch", name="Single letters").click()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("o")
    expect(page.get_by_role("heading", level=1)).to_have_text("Usage")
    page.evaluate("localStorage.clear()")
    page.keyboard.press("g")
    page.keyboard.press("a")

    expect(page.get_by_role("heading", level=1)).to_have_text("Accounts")
    console.admin("POST", f"/accounts/{account_id(console, 'ada')}/activate", {})


def test_the_skip_link_is_first_and_goes_to_the_content(console: Any) -> None:
    page = console.page
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")

    expect(page.locator("main")).to_be_focused()
    assert page.url.endswith("#/overview")


def test_language_and_theme_change_in_place_and_are_remembered(console: Any) -> None:
    """36."""
    page = console.page
    page.evaluate("window.same = 'page'")
    page.get_by_role("radio", name="中文").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("概览")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="切换明暗主题").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert page.evaluate("window.same") == "page"

    page.reload()

    expect(page.get_by_role("heading", level=1)).to_have_text("概览")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


# -- On a phone ------------------------------------------------------------------------------------


def test_a_phone_has_a_bar_below_and_everything_else_under_more(console: Any) -> None:
    page = console.open(viewport=PHONE)
    bar = page.locator("#nav")
    expect(bar.get_by_role("link", name="Request log")).to_be_visible()
    expect(bar.get_by_role("link", name="Usage")).to_be_hidden()
    page.get_by_role("button", name="More").click()
    page.get_by_role("dialog").get_by_role("link", name="Settings").click()

    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.url.endswith("#/settings")


# -- Who is not trusted ----------------------------------------------------------------------------


def test_the_admin_token_signs_in_and_leaves_no_trace(gateway_console: Any, home: Path) -> None:
    console = gateway_console(settings={"server": {"tokenOnLoopback": True}}, proof=False)
    console.allow(401)
    page, field = console.page, console.page.get_by_label("Admin token")
    field.fill("azt_admin_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator(".field .wrong")).to_contain_text("That is not the admin token")
    field.fill(console.gateway.proof()["Authorization"].partition(" ")[2])
    page.get_by_role("button", name="Sign in").click()

    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


def test_the_code_of_azt_open_is_gone_from_the_address(gateway_console: Any) -> None:
    console = gateway_console(proof=False)
    code, page = console.code(), console.page
    page.goto(f"{console.url}/#/open/{code}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    assert code not in page.url
    page.go_back()

    assert code not in page.url
    assert console.page.evaluate("history.length") <= 3
