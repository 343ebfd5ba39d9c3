"""Adding accounts: browser, device code, import, drop. Tests 6 to 12 of console.md 10, and the
clicks of T1, T11, T12 and T22."""

from __future__ import annotations

import io
import json
import re
import urllib.parse
import zipfile
from typing import Any

import pytest
from fake_upstream import account_file
from harness import eventually
from loopback import Server, answer, sized
from playwright.sync_api import expect

import azt

ADA, EVE = "ada@example.com", "eve@example.com"
HOSTILE = "<img src=x onerror=alert(1)>"
DROP = """([files]) => {
    const carried = new DataTransfer();
    for (const [name, bytes] of files) carried.items.add(new File([new Uint8Array(bytes)], name));
    const place = document.getElementById('main');
    for (const type of ['dragenter', 'dragover', 'drop']) {
        const how = {bubbles: true, cancelable: true, dataTransfer: carried};
        place.dispatchEvent(new DragEvent(type, how));
    }
}"""


@pytest.fixture
def console(gateway_console: Any, ports: None) -> Any:
    """The console of a gateway with one account, at its overview."""
    return gateway_console(accounts=[account_file()])


def dialog(console: Any) -> Any:
    return console.page.get_by_role("dialog")


def button(console: Any, name: str) -> Any:
    return dialog(console).get_by_role("button", name=name)


def emails(console: Any) -> list[str]:
    return sorted(one["email"] for one in console.admin("GET", "/state")["accounts"])


def add(console: Any, way: str) -> None:
    console.page.goto(f"{console.url}/#/accounts/add/{way}")


def person(console: Any, number: int, email: str) -> None:
    console.upstream.person = (f"acct-{number}", f"user-{number}", email, "team")


def sign_in_at_the_provider(console: Any) -> Any:
    """Follow the link of the dialog, agree there; the page on which that ends."""
    link = dialog(console).get_by_role("link", name="Open sign-in page")
    address = str(link.get_attribute("href"))
    with console.page.context.expect_page() as opened:
        console.click(link)
    provider = opened.value
    way_back(address)
    provider.get_by_role("button", name="Continue").click()
    return provider


def way_back(link: str) -> tuple[str, str]:
    """Where a sign-in ends, and its state, once something listens there: a person takes longer."""
    asked = dict(urllib.parse.parse_qsl(link.partition("?")[2]))
    port = urllib.parse.urlsplit(asked["redirect_uri"]).port
    eventually(lambda: not azt._is_free(port or 0))
    return asked["redirect_uri"], asked["state"]


def drop(console: Any, *files: tuple[str, bytes]) -> None:
    console.page.evaluate(DROP, [[[name, list(body)] for name, body in files]])


def free() -> list[bool]:
    return list(map(azt._is_free, azt.CALLBACK_PORTS))


def clipboard(console: Any) -> str:
    """What was copied. The console itself may not read it."""
    other = console.page.context.new_page()
    other.set_content("<textarea></textarea>")
    other.locator("textarea").press("ControlOrMeta+V")
    pasted = str(other.locator("textarea").input_value())
    other.close()
    return pasted


def one_file(number: int, email: str, **how: Any) -> bytes:
    return json.dumps(account_file(f"acct-{number}", f"user-{number}", email, **how)).encode()


# -- By the browser


def test_the_page_notices_a_finished_sign_in_and_sends_a_test_call(console: Any) -> None:
    person(console, 2, EVE)
    console.page.goto(f"{console.url}/#/accounts")
    console.click("Add account")
    provider = sign_in_at_the_provider(console)

    provider.get_by_role("heading", name="Signed in").wait_for()
    expect(dialog(console)).to_contain_text(f"{EVE} is ready")
    assert console.clicks == 2
    assert emails(console) == [ADA, EVE]
    button(console, "Send a test call").click()
    expect(dialog(console).locator(".answer")).to_have_text("You said: Say OK")
    assert console.upstream.turns[-1].account == "acct-2"
    button(console, "Use for API").click()
    expect(button(console, "Use for API")).to_be_hidden()


def test_the_link_binds_no_port_before_it_is_followed_and_closing_gives_it_up(console: Any) -> None:
    before = free()
    add(console, "browser")
    link = dialog(console).get_by_role("link", name="Open sign-in page")
    expect(link).to_have_attribute("href", re.compile(r"/oauth/authorize\?"))
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    assert free() == before

    button(console, "Copy link").click()
    eventually(lambda: free() != before)
    assert clipboard(console) == link.get_attribute("href")
    console.page.keyboard.press("Escape")

    expect(dialog(console)).to_have_count(0)
    eventually(lambda: free() == before)
    assert console.page.url.endswith("#/accounts")


def test_with_both_ports_taken_the_address_is_pasted(console: Any) -> None:
    person(console, 2, EVE)
    other = answer(sized(b"another program", "404 Not Found"))
    first, second = azt.CALLBACK_PORTS
    with Server(other, port=first), Server(other, port=second):
        add(console, "browser")
        field = dialog(console).get_by_label("Address of the page")
        expect(field).to_be_visible()
        expect(dialog(console)).to_contain_text("Another program uses port 1455")
        provider = sign_in_at_the_provider(console)
        provider.get_by_text("another program").wait_for()
        field.fill(provider.url)
        button(console, "Finish").click()

        expect(dialog(console)).to_contain_text(f"{EVE} is ready")
    kept = console.page.evaluate(
        "JSON.stringify([location.href, {...localStorage}, {...sessionStorage}])"
    )
    assert "code=" not in kept and "state=" not in kept


def test_where_nothing_can_come_back_the_first_choice_is_the_device_code(console: Any) -> None:
    other = answer(sized(b"another program", "404 Not Found"))
    first, second = azt.CALLBACK_PORTS
    with Server(other, port=first), Server(other, port=second):
        console.page.goto(f"{console.url}/#/accounts/add")
        expect(dialog(console)).to_contain_text("Enter this code")

    assert console.page.url.endswith("/add/device")


def test_a_wrong_address_is_refused_and_the_sign_in_goes_on(console: Any) -> None:
    person(console, 2, EVE)
    console.allow(400)
    add(console, "browser")
    dialog(console).get_by_text("Paste its address here").click()
    field = dialog(console).get_by_label("Address of the page")
    for pasted, told in (
        ("http://localhost:1455/auth/callback?state=x", "not the address of a finished sign-in"),
        ("hello", "not the address of a finished sign-in"),
        ("http://localhost:1455/auth/callback?code=c&state=x", "belongs to another sign-in"),
    ):
        field.fill(pasted)
        button(console, "Finish").click()
        expect(dialog(console)).to_contain_text(told)
        expect(field).to_have_value(pasted)

    sign_in_at_the_provider(console)
    expect(dialog(console)).to_contain_text(f"{EVE} is ready")


@pytest.mark.parametrize("choice", ["Keep as a new account", "Discard"])
def test_another_identity_than_asked_for_is_kept_or_discarded(console: Any, choice: str) -> None:
    person(console, 2, EVE)
    account = console.admin("GET", "/state")["accounts"][0]["id"]
    console.page.goto(f"{console.url}/#/accounts/add/browser?account={account}")
    expect(dialog(console)).to_contain_text(f"Sign in again: {ADA}")
    sign_in_at_the_provider(console)
    expect(dialog(console)).to_contain_text(f"You signed in as {EVE}, not as {ADA}.")
    assert emails(console) == [ADA]

    button(console, choice).click()

    if choice == "Discard":
        expect(dialog(console)).to_have_count(0)
        assert emails(console) == [ADA]
    else:
        expect(dialog(console)).to_contain_text(f"{EVE} is ready")
        assert emails(console) == [ADA, EVE]


def test_a_rejected_sign_in_is_renewed_from_the_overview_with_one_click(console: Any) -> None:
    console.upstream.revoke("acct-1")
    console.client.chat()
    console.click(console.page.get_by_role("link", name="Sign in again"))
    assert console.clicks == 1
    console.upstream.reset()

    sign_in_at_the_provider(console)

    expect(dialog(console)).to_contain_text(f"{ADA} is ready")
    assert emails(console) == [ADA]


def test_a_refusal_at_the_provider_is_told_and_another_link_is_offered(console: Any) -> None:
    add(console, "browser")
    link = dialog(console).get_by_role("link", name="Open sign-in page").get_attribute("href")
    button(console, "Copy link").click()
    address, state = way_back(str(link))
    back = console.page.context.new_page()
    back.goto(f"{address}?error=access_denied&state={state}")

    expect(dialog(console)).to_contain_text("declined at the provider")
    button(console, "Try again").click()
    expect(dialog(console).get_by_role("link", name="Open sign-in page")).to_be_visible()


# -- By a code


def test_a_device_code_is_shown_counts_down_and_signs_in(console: Any) -> None:
    person(console, 2, EVE)
    console.page.goto(f"{console.url}/#/accounts/add/browser")
    dialog(console).get_by_role("radio", name="Device code").click()
    code = dialog(console).locator("code").inner_text()
    assert re.fullmatch(r"ABCD-\d{5}", code)
    expect(dialog(console)).to_contain_text("15 min left")
    dialog(console).get_by_role("button", name="Copy").last.click()
    assert clipboard(console) == code
    with console.page.context.expect_page() as opened:
        dialog(console).get_by_role("link", name="/codex/device").click()
    opened.value.get_by_label("Code").fill(code)
    opened.value.get_by_role("button", name="Continue").click()

    expect(dialog(console)).to_contain_text(f"{EVE} is ready")
    assert emails(console) == [ADA, EVE]


def test_a_code_that_ran_out_is_replaced_in_place(console: Any) -> None:
    console.upstream.device_answer = {"interval": "1", "expires_in": 2}
    add(console, "device")
    expect(dialog(console)).to_contain_text("The time for this sign-in is over.")
    console.upstream.device_answer = {"interval": "1"}

    button(console, "Get a new link").click()

    expect(dialog(console)).to_contain_text("15 min left")


# -- Files


def test_a_file_dropped_on_the_overview_is_shown_first_and_imported_by_one_click(
    console: Any,
) -> None:
    expect(console.page.get_by_role("heading", level=1)).to_have_text("Overview")
    drop(console, ("eve.json", one_file(2, EVE)))
    expect(dialog(console)).to_contain_text("eve.json")
    assert emails(console) == [ADA]

    console.click(button(console, "Import 1 account"))

    assert console.clicks == 1
    expect(dialog(console)).to_contain_text(f"{EVE} is ready")
    assert emails(console) == [ADA, EVE]


def test_a_zip_gets_a_verdict_for_each_entry_and_only_the_chosen_ones_are_saved(
    console: Any,
) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.json", one_file(2, EVE))
        archive.writestr("b/same.json", one_file(1, ADA))
        archive.writestr("old.json", one_file(3, "old@example.com", exp=1_700_000_000))
        archive.writestr(f"{HOSTILE}.json".replace("/", ""), b'{"access_token": "x"}')
        archive.writestr("two.json", one_file(4, f"{HOSTILE}@example.com"))
        archive.writestr("__MACOSX/._a.json", b"junk")
    add(console, "import")
    dialog(console).locator("input[type=file]").set_input_files(
        {"name": "pool.zip", "mimeType": "application/zip", "buffer": raw.getvalue()}
    )

    summary = dialog(console).get_by_role("status").last
    for verdict in ("2 new", "1 update", "1 expired", "1 unreadable"):
        expect(summary).to_contain_text(verdict)
    expect(dialog(console)).to_contain_text(HOSTILE)
    expect(dialog(console)).to_contain_text("no refresh token")
    assert console.page.locator("img[src=x]").count() == 0
    dialog(console).get_by_role("checkbox", name=EVE).click()
    dialog(console).get_by_role("checkbox", name="old@example.com").click()
    dialog(console).get_by_role("switch", name="Check each account").click()
    button(console, "Import 3 accounts").click()

    expect(dialog(console)).to_contain_text("3 accounts imported")
    assert emails(console) == sorted([f"{HOSTILE}@example.com", ADA, "old@example.com"])
    console.page.keyboard.press("Escape")
    checked = console.page.locator(".accounts tbody tr").filter(has_text="onerror")
    expect(checked).to_contain_text("90% left")


def test_pasting_takes_three_clicks(console: Any) -> None:
    console.page.goto(f"{console.url}/#/accounts")
    console.click("Add account")
    console.click(dialog(console).get_by_role("radio", name="Import"))
    dialog(console).get_by_label("Or paste JSON").fill(one_file(2, EVE).decode())
    console.click(button(console, "Import 1 account"))

    assert console.clicks == 3
    expect(dialog(console)).to_contain_text(f"{EVE} is ready")


def test_pasted_text_that_is_no_json_or_has_no_account_is_told_where_it_stands(
    console: Any,
) -> None:
    console.allow(400)
    add(console, "import")
    field = dialog(console).get_by_label("Or paste JSON")
    field.fill("{not json")
    expect(dialog(console)).to_contain_text("not valid JSON")
    field.fill("[]")
    expect(dialog(console)).to_contain_text("There is no account in these files")
    field.fill('{"access_token": "x"}')
    expect(dialog(console)).to_contain_text("no refresh token")
    expect(button(console, "Import 0 accounts")).to_be_disabled()


def test_the_example_is_filled_in(console: Any) -> None:
    add(console, "import")
    button(console, "Fill in example").click()

    expect(dialog(console).get_by_label("Or paste JSON")).to_have_value(
        re.compile('"refresh_token"')
    )


@pytest.mark.parametrize("size", [17, 60], ids=["17 MiB", "60 MiB"])
def test_a_file_that_is_too_large_is_refused_and_the_page_stays_usable(
    console: Any, size: int
) -> None:
    add(console, "import")
    console.page.evaluate(
        """(size) => {
            const carried = new DataTransfer(), input = document.querySelector('input[type=file]');
            carried.items.add(new File([new Uint8Array(size)], 'large.json'));
            input.files = carried.files;
            input.dispatchEvent(new Event('change'));
        }""",
        size * 2**20,
    )
    expect(dialog(console)).to_contain_text("too large")

    drop(console, ("eve.json", one_file(2, EVE)))
    button(console, "Import 1 account").click()
    expect(dialog(console)).to_contain_text(f"{EVE} is ready")


def test_a_zip_bomb_saves_nothing(console: Any) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.json", b" " * (64 << 20))
    drop(console, ("bomb.zip", raw.getvalue()))

    expect(dialog(console)).to_contain_text("too large")
    expect(button(console, "Import 0 accounts")).to_be_disabled()
    assert emails(console) == [ADA]


# -- Looks


@pytest.mark.parametrize("way", ["browser", "device", "import"])
def test_axe_finds_nothing_serious_in_the_dialog(console: Any, way: str) -> None:
    add(console, way)
    if way == "import":
        drop(console, ("eve.json", one_file(2, EVE)), ("bad.json", b"{}"))
        button(console, "Import 1 account").wait_for()
    else:
        dialog(console).get_by_text(re.compile(r"\d+ min left")).wait_for()
    for theme in ("light", "dark"):
        console.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        assert console.axe() == []


def test_in_chinese_the_dialog_is_chinese(gateway_console: Any, ports: None) -> None:
    console = gateway_console(accounts=[account_file()], locale="zh-CN")
    shown = ""
    for way in ("browser", "device", "import"):
        add(console, way)
        dialog(console).locator(".add > *").first.wait_for()
        if way == "import":
            drop(console, ("eve.json", one_file(2, EVE)))
            button(console, "导入 1 个账号").wait_for()
        shown += re.sub(r"http\S+|ABCD-\d+", "", dialog(console).inner_text())

    english = set(re.findall(r"[A-Za-z]{3,}", shown))
    assert english <= {"azt", "JSON", "Plus", "eve", "example", "com", "json"}
