"""Settings and sharing. Numbers are those of console.md 10, T those of its 1.2."""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from harness import Client, chat_body, eventually, free_port
from playwright.sync_api import Error, expect

SECTIONS = ["General", "Routing", "Codex", "Images", "Network", "Sharing", "Data", "About"]
PHONE = {"X-Forwarded-For": "192.168.1.44"}  # whoever a proxy speaks for is another device


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def close(page: Any) -> None:
    """The open dialog, by its key. It leaves the page a little after it is no longer to be seen."""
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)


def saved(console: Any, key: str) -> Any:
    value = console.admin("GET", "/settings")["values"]
    for part in key.split("."):
        value = value[part]
    return value


# -- Sections and saving --------------------------------------------------------------------------


def test_every_section_has_its_address(console: Any) -> None:
    page = console.open("settings")
    for name in SECTIONS:
        page.get_by_role("navigation", name="Settings").get_by_role("link", name=name).click()
        assert page.url.endswith(f"#/settings/{name.lower()}")
        expect(page.locator(".settings .card").first).to_be_visible()
        expect(page.locator(".dirty")).to_be_hidden()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("section", [name.lower() for name in SECTIONS])
def test_axe_finds_nothing_serious_in_settings(console: Any, section: str, theme: str) -> None:
    page = console.open(f"settings/{section}", color_scheme=theme)
    page.locator(".settings .card").first.wait_for()

    assert console.axe(page) == []


def test_the_default_model_is_saved_in_three_clicks(gateway_console: Any) -> None:
    """T20, and 26: another tab follows."""
    console = gateway_console()
    page, other = console.page, console.open("settings/general")
    console.click(page.get_by_role("link", name="Settings", exact=True))
    console.click(page.get_by_role("combobox", name="Default model"), no_wait_after=True)
    page.get_by_role("combobox", name="Default model").select_option("gpt-5.5")
    console.click(button(page, "Save"))

    expect(page.locator(".toast").last).to_contain_text("Saved")
    expect(page.locator(".dirty")).to_be_hidden()
    expect(other.get_by_role("combobox", name="Default model")).to_have_value("gpt-5.5")
    assert saved(console, "defaultModel") == "gpt-5.5"
    assert console.clicks == 3


def test_what_was_changed_elsewhere_is_asked_about(gateway_console: Any) -> None:
    """26: the merge prompt, taken and left."""
    console = gateway_console(route="settings/routing")
    console.allow(409)
    page, dialog = console.page, console.page.get_by_role("dialog")
    percent = page.get_by_label("Switch before empty, at percent left")
    for mine, verb, left in ((7, "Save mine", 7), (8, "Cancel", 20)):
        percent.fill(str(mine))
        console.admin("PATCH", "/settings", {"values": {"autoSwitch.beforePercent": 20}})
        button(page, "Save").click()
        expect(dialog.get_by_role("row").last).to_contain_text("20")
        expect(dialog.get_by_role("row").last).to_contain_text(str(mine))
        button(dialog, verb).click()
        expect(page.locator(".dirty")).to_be_hidden()
        expect(percent).to_have_value(str(left))
        assert saved(console, "autoSwitch.beforePercent") == left


def test_a_change_is_kept_until_it_is_saved_or_discarded(console: Any) -> None:
    page = console.open("settings/routing")
    at_a_time = page.get_by_label("Quotas read at a time")
    at_a_time.fill("5")
    expect(page.locator(".dirty")).to_contain_text("Unsaved changes in Routing")
    page.get_by_role("link", name="Data", exact=True).click()
    expect(page.locator(".dirty")).to_be_hidden()
    page.get_by_role("link", name="Overview", exact=True).click()
    page.goto(f"{console.url}/#/settings/routing")
    expect(at_a_time).to_have_value("5")
    button(page, "Discard").click()
    expect(at_a_time).to_have_value("16")
    at_a_time.fill("5")
    at_a_time.fill("16")
    expect(page.locator(".dirty")).to_be_hidden()


def test_a_wrong_value_is_told_at_its_field(console: Any) -> None:
    console.allow(400)
    page = console.open("settings/network")
    page.get_by_label("Proxy", exact=True).fill("socks://nowhere")
    button(page, "Save").click()

    expect(page.locator("[data-key='networkProxy.url'] .wrong")).to_contain_text("http://host:port")
    expect(page.get_by_label("Proxy", exact=True)).to_have_attribute("aria-invalid", "true")
    button(page, "Discard").click()


def test_what_is_fixed_elsewhere_says_by_what(gateway_console: Any) -> None:
    console = gateway_console(route="settings/network", variables={"AZT_BODY_LIMIT_MB": "64"})
    field = console.page.get_by_label("Largest request in MB")

    expect(field).to_have_value("64")
    expect(field).to_be_disabled()
    expect(console.page.get_by_text("Fixed by AZT_BODY_LIMIT_MB")).to_be_visible()


def test_an_account_is_excluded_and_included(gateway_console: Any) -> None:
    console = gateway_console(route="settings/routing")
    page = console.page
    page.get_by_text("Excluded accounts").click()
    page.get_by_label("ada@example.com").check()
    button(page, "Save").click()
    expect(page.locator(".toast").last).to_contain_text("Saved")
    assert len(saved(console, "autoSwitch.excludedIds")) == 1
    page.get_by_label("ada@example.com").uncheck()
    button(page, "Save").click()
    expect(page.locator(".dirty")).to_be_hidden()
    assert saved(console, "autoSwitch.excludedIds") == []


def test_language_theme_and_zone_belong_to_the_browser(console: Any) -> None:
    page = console.open("settings/general", timezone_id="UTC")
    page.get_by_role("combobox", name="Theme").select_option("dark")
    page.get_by_role("combobox", name="Time zone").select_option("Asia/Shanghai")
    page.get_by_role("combobox", name="Language").select_option("zh-CN")
    expect(page.get_by_role("heading", level=1)).to_have_text("设置")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    expect(page.get_by_role("combobox", name="时区")).to_have_value("Asia/Shanghai")
    expect(page.get_by_role("combobox", name="主题")).to_have_value("dark")


# -- Network, data, about, restart ----------------------------------------------------------------


def test_the_network_is_tested_step_by_step(console: Any) -> None:
    page = console.open("settings/network")
    button(page, "Test the network").click()

    row = page.locator(".settings table tbody tr").first
    expect(row).to_contain_text("127.0.0.1", timeout=20_000)
    expect(row.locator(".good")).to_be_visible()


def is_well(port: int) -> bool:
    with contextlib.suppress(OSError):
        return Client(f"http://127.0.0.1:{port}").get("/_gateway/health").status == 200
    return False


def test_a_new_port_takes_a_restart_and_the_page_follows(gateway_console: Any) -> None:
    """27."""
    console = gateway_console(route="settings/sharing", arguments=("--host", "127.0.0.1"))
    console.allow(0)
    page, port = console.page, free_port()
    page.get_by_label("Port", exact=True).fill(str(port))
    button(page, "Save").click()
    notice = page.locator(".notice", has_text="Takes effect after a restart: Port")
    button(notice, "Restart the gateway").click()
    button(page.get_by_role("dialog"), "Restart the gateway").click()

    # It can ask nothing there beforehand: a slow machine makes it arrive too early.
    with contextlib.suppress(Error):
        page.wait_for_url(f"http://127.0.0.1:{port}/**", timeout=40_000)
    eventually(lambda: is_well(port), 30)
    if page.locator("#live").count() == 0:
        page.reload()
    expect(page.locator("#live")).to_have_text("Live")
    assert page.url == f"http://127.0.0.1:{port}/#/settings/sharing"


def test_log_and_statistics_are_cleared(gateway_console: Any) -> None:
    console = gateway_console(route="settings/data")
    page, dialog = console.page, console.page.get_by_role("dialog")
    for _ in range(3):
        console.client.post("/v1/chat/completions", chat_body())
    for name in ("Clear the request log", "Clear the statistics"):
        button(page, name).click()
        expect(dialog).to_contain_text("3 requests are forgotten")
        expect(button(dialog, "Cancel")).to_be_focused()
        button(dialog, "Clear").click()
        expect(page.locator(".toast").last).to_contain_text("Cleared")
    assert console.admin("GET", "/requests")["items"] == []
    assert console.admin("GET", "/usage")["lifetime"]["requestCount"] == 0


def test_the_diagnostics_are_a_file_without_secrets(console: Any) -> None:
    page = console.open("settings/data")
    with page.expect_download() as download:
        button(page, "Download diagnostics").click()
    raw = Path(download.value.path()).read_bytes()
    text = raw
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as bundle:
            text = b"".join(bundle.read(name) for name in bundle.namelist())

    assert b"ada@example.com" not in text
    assert not re.search(rb"rt_\w{20}|eyJ\w{20}", text)


def test_an_update_is_looked_for_on_click_only(console: Any) -> None:
    page = console.open()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url) if "/version/" in one.url else None)
    page.route(
        "**/version/check",
        lambda route: route.fulfill(json={"current": "0.1.0", "latest": "9.9.9", "newer": True}),
    )
    page.goto(f"{console.url}/#/settings/about")
    expect(button(page, "Check for an update")).to_be_visible()
    assert asked == []
    button(page, "Check for an update").click()
    expect(page.get_by_text("9.9.9 is available.")).to_be_visible()


# -- Sharing --------------------------------------------------------------------------------------


def switch(page: Any, name: str) -> Any:
    return page.get_by_role("switch", name=name)


def test_the_truth_about_the_network_is_told(gateway_console: Any) -> None:
    console = gateway_console(route="settings/sharing", arguments=("--port", "0"))
    page = console.page
    expect(page.get_by_text("Devices on the local network may call /v1.")).to_be_visible()
    expect(page.get_by_text("Plain HTTP can be read")).to_be_visible()
    switch(page, "API for other devices").click()
    expect(page.get_by_text("Closed: /v1 answers only on this computer.")).to_be_visible()
    assert saved(console, "server.lanApi") is False

    switch(page, "API for other devices").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("No key exists")
    for one in console.admin("GET", "/share")["addresses"]:
        expect(dialog).to_contain_text(one["baseUrl"])
    button(dialog, "Cancel").click()
    expect(switch(page, "API for other devices")).not_to_be_checked()
    switch(page, "API for other devices").click()
    button(dialog, "Turn on").click()
    expect(page.get_by_text("Devices on the local network may call /v1.")).to_be_visible()
    assert saved(console, "server.lanApi") is True


def test_a_key_is_shown_once(gateway_console: Any) -> None:
    console = gateway_console(route="settings/sharing")
    page, dialog = console.page, console.page.get_by_role("dialog")
    console.allow(400)
    button(page, "New key").click()
    dialog.get_by_label("Name").fill("*")
    button(dialog, "New key").click()
    expect(dialog.locator(".wrong")).to_contain_text("1 to 64 letters")
    dialog.get_by_label("Name").fill("phone")
    page.keyboard.press("Enter")
    key = dialog.locator(".secret").inner_text()
    expect(dialog.locator("code").last).to_have_text(re.compile("^http://.*/v1$"))
    button(dialog, "Copy").first.click()
    assert console.clipboard() == key
    close(page)
    assert key not in page.content()

    header = {"Authorization": f"Bearer {key}"}
    models = console.client.get("/v1/models", headers=header)
    refused = console.client.get("/v1/models", headers={"Authorization": "Bearer other"})
    assert (models.status, refused.status) == (200, 401)
    row = page.locator("tr", has_text="phone")
    expect(row).to_contain_text(key[:7])
    button(row, "Revoke").click()
    expect(dialog).to_contain_text("It is the last key")
    button(dialog, "Revoke").click()
    expect(page.get_by_text("none: any text works as a key")).to_be_visible()
    assert console.client.get("/v1/models").status == 200


def test_how_far_a_key_goes_is_told(gateway_console: Any) -> None:
    console = gateway_console()
    terms = {"models": ["gpt-5.4", "gpt-5.5"], "limit": 1, "expiresAt": 4_102_444_800_000}
    console.admin("POST", "/keys", {"name": "guest", **terms})
    console.admin("POST", "/keys", {"name": "free"})
    page = console.open("settings/sharing", timezone_id="UTC")

    words = "1 request a day · only gpt-5.4, gpt-5.5 · until Jan 1, 2100"
    expect(page.locator("tr", has_text="guest")).to_contain_text(words)
    expect(page.locator("tr", has_text="free")).to_contain_text("no limits")


def test_the_console_is_closed_to_other_devices(gateway_console: Any) -> None:
    """30: words, and nothing else."""
    console = gateway_console()
    client = Client(console.url)
    page = client.get("/", headers={**PHONE, "Accept": "text/html"})
    assert page.status == 403
    assert b"the machine that azt runs on" in page.body
    for path in ("/js/main.js", "/app.css", "/_gateway/admin/state"):
        assert client.get(path, headers=PHONE).status == 403


def test_a_phone_is_paired_once_and_may_do_less(gateway_console: Any) -> None:
    """31, and T21: four clicks to the code."""
    console = gateway_console(arguments=("--port", "0"))
    page = console.page
    console.click(page.get_by_role("link", name="Settings", exact=True))
    console.click(page.get_by_role("link", name="Sharing", exact=True))
    console.click(switch(page, "Console for other devices"))
    console.click(button(page.get_by_role("dialog"), "Turn on"))
    address = page.locator(".secret").inner_text()
    assert console.clicks == 4
    code = address.rpartition("/")[2]
    expect(page.get_by_text(" left")).to_be_visible()

    console.allow(401)
    phone = console.open(
        proof=False, extra_http_headers=PHONE, viewport={"width": 390, "height": 844}
    )
    expect(phone.get_by_role("heading", name="This browser is not paired")).to_be_visible()
    phone.goto(f"{console.url}/#/pair/{code}")
    phone.locator(".figures").wait_for()
    assert code not in phone.url
    history = phone.evaluate("history.length")
    for _ in range(history - 1):
        phone.go_back()
        assert code not in phone.url
    [cookie] = [one for one in phone.context.cookies() if one["name"].startswith("azt_admin")]
    flags = (cookie["httpOnly"], cookie["sameSite"], cookie["path"])
    assert flags == (True, "Strict", "/_gateway/admin")

    phone.goto(f"{console.url}/#/connect/codex")
    expect(button(phone, "Take over")).to_be_disabled()
    expect(phone.get_by_text("Only on the computer that runs azt").first).to_be_visible()
    phone.goto(f"{console.url}/#/settings/sharing")
    expect(button(phone, "New key")).to_be_disabled()
    expect(switch(phone, "Console for other devices")).to_be_disabled()
    expect(phone.get_by_label("Port", exact=True)).to_be_disabled()

    second = console.open(f"pair/{code}", proof=False, extra_http_headers=PHONE)
    expect(second.get_by_role("alert").first).to_contain_text("used already or is too old")

    button(page, "Pair a device").click()
    expect(page.locator(".secret")).not_to_have_text(address)
    typed = page.locator(".secret").inner_text().rpartition("/")[2].lower()
    second.get_by_label("Admin token or pairing code").fill(typed)
    button(second, "Sign in").click()
    second.locator(".figures").wait_for()

    page.reload()
    row = page.locator("tr", has_text="pairing")
    button(row.first, "Revoke").click()
    button(page.get_by_role("dialog"), "Revoke").click()
    expect(row).to_have_count(1)
    expect(phone.get_by_role("heading", name="This browser is not paired")).to_be_visible()


def test_a_new_admin_token_is_shown_once(gateway_console: Any) -> None:
    console = gateway_console(route="settings/sharing")
    page, dialog = console.page, console.page.get_by_role("dialog")
    old = console.gateway.proof()["Authorization"]
    button(page, "New admin token").click()
    expect(button(dialog, "Cancel")).to_be_focused()
    button(dialog, "New admin token").click()
    token = dialog.locator(".secret").inner_text()
    close(page)

    assert console.gateway.proof()["Authorization"] == f"Bearer {token}" != old
    assert token not in page.content()
