"""The request log in a real browser. Numbers are those of console.md 10, T15 that of 1.2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fake_upstream import account_file, limit_reached, text
from harness import eventually
from playwright.sync_api import expect

PEOPLE = [account_file(), account_file("acct-2", "user-2", "lab-02@example.com")]
HOSTILE = "<img/src=x onerror=document.title='hit'>"
KEY_NAME = re.compile(r"\b(log|why|fix|act|ui|play|usage)\.[a-z]\w*(\.\w+)?\b")


def say(console: Any, client: str = "Cline/3.2", model: str = "gpt-5.5") -> Any:
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return console.client.post("/v1/chat/completions", asked, headers={"User-Agent": client})


def row(page: Any, words: str) -> Any:
    return page.locator("tbody tr", has_text=words)


@pytest.fixture
def switching(gateway_console: Any) -> Any:
    """Two accounts, of which another one serves when one cannot."""
    return gateway_console(accounts=PEOPLE, settings={"autoSwitch": {"enabled": True}})


def test_18_a_switch_is_one_call_with_two_attempts(switching: Any) -> None:
    page = switching.page
    page.goto(f"{switching.url}/#/log")
    page.locator(".log").wait_for()
    switching.upstream.script(status=429, json=limit_reached(7200))

    assert say(switching).status == 200

    expect(row(page, "Cline")).to_contain_text("×2")
    expect(row(page, "Cline")).to_contain_text("200")
    expect(page.locator("#toasts")).to_contain_text("Switched from")


def test_19_the_row_says_why_and_excludes_until_then(switching: Any) -> None:
    page = switching.page
    switching.upstream.script(status=429, json=limit_reached(7200))
    say(switching)
    page.goto(f"{switching.url}/#/log")
    row(page, "Cline").get_by_role("link").click()
    sheet = page.get_by_role("dialog")

    verdict = sheet.locator(".verdict")
    expect(verdict).to_have_text(re.compile(r"\S+@example.com could not answer.*got its answer"))
    attempts = sheet.locator(".attempts li")
    expect(attempts).to_have_count(2)
    expect(attempts.first).to_contain_text("usage_limit_reached")
    expect(attempts.first).to_contain_text("switched")
    sheet.get_by_role("button", name=re.compile("Exclude .* until")).click()

    expect(page.locator("#toasts")).to_contain_text("is excluded until")
    failed = attempts.first.get_by_role("link").inner_text()
    listed = {one["email"]: one for one in switching.admin("GET", "/accounts")["items"]}
    assert listed[failed]["status"] == "excluded" and listed[failed]["excludedUntil"]
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    expect(page.locator("#toasts .toast", has_text="is excluded")).to_have_count(0)
    kept = "excludedUntil"
    eventually(lambda: not any(one[kept] for one in switching.admin("GET", "/accounts")["items"]))


def test_20_all_empty_says_who_is_back_first_one_click_from_the_overview(switching: Any) -> None:
    page = switching.page
    for hours in (5, 2):
        switching.upstream.script(status=429, json=limit_reached(hours * 3600))
    assert say(switching).status == 429
    first = min(
        switching.admin("GET", "/accounts")["items"], key=lambda one: one["statusParams"]["until"]
    )
    failed = page.locator("#main table tr", has_text="429")
    expect(failed.first).to_be_visible()

    switching.click(failed.first.get_by_role("link").first)

    assert switching.clicks <= 1  # T15
    sheet = page.get_by_role("dialog")
    expect(sheet.locator(".verdict")).to_have_text(
        re.compile(f"Every account is empty. The first one back is {first['email']} at .*[0-9]")
    )
    link = sheet.get_by_role("link", name="Open account", exact=True)
    expect(link).to_have_attribute("href", f"#/accounts/{first['id']}")


def test_a_failure_of_one_account_offers_another(gateway_console: Any) -> None:
    console = gateway_console(accounts=PEOPLE)
    console.upstream.script(status=429, json=limit_reached(7200))
    say(console)
    page = console.page
    page.goto(f"{console.url}/#/log?result=failed")
    row(page, "429").get_by_role("link").click()
    sheet = page.get_by_role("dialog")
    expect(sheet.locator(".verdict")).to_have_text(
        re.compile(r"@example.com ran out of its quota. It is back at")
    )

    sheet.get_by_role("button", name="Switch account").click()
    page.get_by_role("menuitem").first.click()

    expect(page.locator("#toasts")).to_contain_text("Now serving with")
    assert say(console).status == 200


def test_new_rows_wait_while_someone_reads(console: Any) -> None:
    say(console, "reader/1")
    page = console.open("log")
    first = row(page, "reader").first
    first.hover()

    say(console, "newcomer/1")
    say(console, "newcomer/2")

    fresh = page.get_by_role("button", name="2 new")
    expect(fresh).to_be_visible()
    expect(row(page, "newcomer")).to_have_count(0)
    fresh.click()
    expect(row(page, "newcomer")).to_have_count(2)
    expect(fresh).to_be_hidden()
    page.mouse.move(2, 2)
    page.locator("#title").focus()
    say(console, "later/1")
    expect(row(page, "later")).to_have_count(1)


def test_a_running_call_is_there_and_ends_in_place(console: Any) -> None:
    console.upstream.script(text("a", "b"), stall=True, after=5)
    page = console.open("log?result=running")
    asked = {"model": "gpt-5.5", "input": "hi", "stream": True}
    call = console.client.open("POST", "/v1/responses", asked)
    call.read_until(b"delta")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.goto(f"{console.url}/#/log")
    console.upstream.release()
    call.read_rest()
    call.close()

    expect(page.locator("tbody tr").first).to_contain_text("200")


def test_what_was_missed_is_fetched_when_the_events_begin_anew(console: Any) -> None:
    say(console, "before/1")
    page = console.open("log")
    expect(row(page, "before").first).to_be_visible()

    with page.expect_response(re.compile(r"/admin/requests\?")):
        page.evaluate("import('/js/live.js').then((live) => live.refetch())")

    expect(row(page, "before").first).to_be_visible()


def test_the_network_is_tested_from_the_row(console: Any) -> None:
    page = console.open("settings/network?test=1")

    expect(page.locator(".settings table")).to_be_visible()
    expect(page).to_have_url(re.compile("#/settings/network$"))


def test_filters_are_in_the_address_and_survive_a_reload(console: Any) -> None:
    console.upstream.script(status=429, json=limit_reached(60))
    say(console, "filtered/1")
    say(console, "curl/8")
    page = console.open("log")

    page.get_by_role("button", name="Failed").click()
    expect(row(page, "filtered").first).to_be_visible()
    expect(row(page, "curl")).to_have_count(0)
    page.get_by_role("combobox", name="Client").select_option("filtered")
    page.reload()

    expect(page.get_by_role("button", name="Failed")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("combobox", name="Client")).to_have_value("filtered")
    expect(row(page, "filtered").first).to_be_visible()
    assert "result=failed" in page.url and "client=filtered" in page.url
    page.keyboard.press("/")
    page.keyboard.type("no such thing")
    expect(page.locator(".log .empty")).to_contain_text("Nothing matches")
    page.get_by_role("link", name="Clear filters").click()
    expect(row(page, "curl").first).to_be_visible()
    expect(page.get_by_role("searchbox")).to_have_value("")


def test_34_a_request_has_its_address_and_an_unknown_one_says_so(console: Any) -> None:
    console.allow(404)
    say(console, "linked/1", "no-such-model")
    name = console.admin("GET", "/requests?client=linked")["items"][0]["id"]

    page = console.open(f"log/{name}?result=failed")

    sheet = page.get_by_role("dialog")
    expect(sheet).to_contain_text("asked for no-such-model, which is not in the list")
    page.keyboard.press("Escape")
    expect(sheet).to_have_count(0)
    expect(page).to_have_url(re.compile(r"#/log\?result=failed$"))
    page.goto(f"{console.url}/#/log/req_nothing")
    expect(page.get_by_role("dialog")).to_contain_text("not in the log any more")


def test_the_arrows_lead_to_the_other_failures(console: Any) -> None:
    for number in range(3):
        say(console, f"failing/{number}", f"missing-{number}")
        say(console)
    page = console.open("log?client=failing")
    row(page, "missing-1").get_by_role("link").click()
    sheet = page.get_by_role("dialog")

    sheet.get_by_role("link", name="Older failure").click()
    expect(sheet).to_contain_text("asked for missing-0")
    sheet.get_by_role("link", name="Newer failure").click()
    expect(sheet).to_contain_text("asked for missing-1")
    page.go_back()
    expect(sheet).to_contain_text("asked for missing-0")


def test_a_row_has_its_facts_and_the_call_as_curl(console: Any) -> None:
    say(console, "facts/1")
    page = console.open("log?client=facts")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    sheet = page.get_by_role("dialog")

    expect(sheet.locator(".verdict")).to_contain_text("answered at the first attempt")
    expect(sheet).to_contain_text("12 in (4 cached) · 7 out (2 reasoning)")
    expect(sheet.locator(".waterfall")).to_be_visible()
    sheet.locator("summary", has_text="Request summary").click()
    expect(sheet).to_contain_text("messages, model")
    sheet.get_by_role("button", name="Copy as curl").click()
    expect(sheet.get_by_role("button", name="Copied")).to_be_visible()
    assert "Your prompt here" in page.evaluate("copied") and console.url in page.evaluate("copied")
    sheet.get_by_role("button", name="Copy details").click()
    eventually(lambda: page.evaluate("copied").startswith("{"))
    assert json.loads(page.evaluate("copied"))["client"] == "facts"
    assert not KEY_NAME.search(sheet.inner_text().replace("facts.", "")), sheet.inner_text()


def test_33_names_from_outside_are_text(console: Any) -> None:
    console.allow(404)
    say(console, HOSTILE, HOSTILE)
    say(console, "good/1", HOSTILE)
    page = console.open("log")
    row(page, "good").first.get_by_role("link").click()
    sheet = page.get_by_role("dialog")

    expect(sheet.locator(".verdict")).to_contain_text("<img/src=x")
    assert page.locator("#main img, dialog img").count() == 0
    assert page.title() != "hit"


def test_clearing_asks_first_and_says_what_it_did(gateway_console: Any) -> None:
    console = gateway_console(route="log")
    for _ in range(3):
        say(console)
    page = console.page
    expect(row(page, "Cline")).to_have_count(3)
    kept = console.admin("GET", "/requests")["kept"]
    page.get_by_role("button", name="More", exact=True).last.click()
    page.get_by_role("menuitem", name="Clear the log").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    expect(dialog).to_contain_text(f"{kept} requests")

    dialog.get_by_role("button", name="Clear", exact=True).click()

    expect(page.locator("#toasts")).to_contain_text("requests deleted")
    expect(page.locator(".log .empty")).to_contain_text("No requests yet")
    assert console.admin("GET", "/requests")["kept"] == 0


def test_what_is_shown_can_be_exported(console: Any) -> None:
    say(console, "exported/1")
    say(console, "other/1")
    page = console.open("log?client=exported")
    expect(row(page, "exported")).to_have_count(1)
    page.get_by_role("button", name="More", exact=True).last.click()

    with page.expect_download() as told:
        page.get_by_role("menuitem", name="Export").click()

    lines = Path(told.value.path()).read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == ["exported"]


def test_38_2000_rows_stay_quick_while_events_arrive(console: Any) -> None:
    """Rows come in pages; what is let in while one reads on top does not make the page longer."""
    say(console, "seed/1")
    [seed] = console.admin("GET", "/requests?client=seed")["items"]
    many = [
        {**seed, "id": f"req_{n:024x}", "at": seed["at"] - n, "client": f"client-{n % 7}"}
        for n in range(2000)
    ]

    def serve(route: Any) -> None:
        asked = {key: one[0] for key, one in parse_qs(urlsplit(route.request.url).query).items()}
        start = int(asked["before"][4:], 16) + 1 if "before" in asked else 0
        items = [one for one in many[start:] if asked.get("client") in (None, one["client"])]
        page_, most = items[: int(asked["limit"])], int(asked["limit"])
        more = page_[-1]["id"] if len(items) > most else None
        facets = {"client": sorted({one["client"] for one in many})}
        route.fulfill(json={"items": page_, "next": more, "kept": 2000, "facets": facets})

    page = console.open("overview")
    page.route(re.compile(r"/admin/requests\?"), serve)
    page.goto(f"{console.url}/#/log")
    expect(row(page, "client-1").first).to_be_visible()
    assert page.locator("tbody tr").count() <= 500
    page.evaluate(
        """async (seed) => {
            const {reducers} = await import('/js/store.js');
            for (let n = 0; n < 60; n += 1) {
                reducers[n % 2 ? 'request.finished' : 'request.started']({...seed,
                    id: `req_live${n >> 1}`, at: Date.now(), result: n % 2 ? 'ok' : 'running'});
                await new Promise((done) => setTimeout(done, 50));
            }
        }""",
        seed,
    )
    expect(row(page, "seed")).to_have_count(30)
    page.get_by_role("combobox", name="Client").select_option("client-3")
    expect(row(page, "client-1")).to_have_count(0)
    expect(row(page, "client-3").first).to_be_visible()
    page.get_by_role("combobox", name="Client").select_option("")
    for seen in (400, 700):
        page.mouse.wheel(0, 1_000_000)
        expect(page.locator("tbody tr").nth(seen - 1)).to_be_attached()


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_every_verdict_of_the_gateway_has_its_words(console: Any, language: str) -> None:
    import azt

    page = console.open("log", locale=language)
    verdicts = sorted({entry[0] for entry in azt._VERDICTS.values()})
    kinds = sorted({kind for _, _, fixes in azt._VERDICTS.values() for kind in fixes})
    lacking = page.evaluate(
        """async ([codes, kinds]) => {
            const {known} = await import('/js/i18n.js'), {verdict} = await import('/js/why.js');
            const params = {model: 'm', account: 'a', from: 'a', to: 'b', reason: 'r', status: 500};
            const said = (code) => verdict({why: {code, params, fixes: []}});
            const bad = codes.filter((code) => said(code) === code || /[{}]/.test(said(code)));
            return [...bad, ...kinds.filter((kind) => !known(`fix.${kind}`))];
        }""",
        [[*verdicts, "all_exhausted", "recovered_by_switch", "bad_request", "upstream_5xx"], kinds],
    )

    assert lacking == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_log(console: Any, theme: str) -> None:
    say(console, "axe/1", "missing")
    say(console, "axe/1")
    page = console.open("log", color_scheme=theme)
    expect(row(page, "axe").first).to_be_visible()
    found = console.axe(page)
    row(page, "missing").first.get_by_role("link").click()
    page.locator(".verdict").wait_for()

    assert found + console.axe(page) == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_scrolls_the_log_sideways(console: Any, width: int) -> None:
    say(console, "narrow/1", "missing")
    page = console.open("log", viewport={"width": width, "height": 700})
    expect(page.locator("tbody tr").first).to_be_visible()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("tbody a").first.click()
    page.locator(".verdict").wait_for()
    box = page.locator("dialog").bounding_box()
    assert box["x"] + box["width"] <= width + 1
