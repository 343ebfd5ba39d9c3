"""Connecting clients, and Codex. Numbers are those of console.md 10, T those of its 1.2."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from codex_configs import CONFIGS
from harness import chat_body
from playwright.sync_api import expect

CLIENTS = {
    "python": "OpenAI SDK · Python",
    "js": "OpenAI SDK · JavaScript",
    "curl": "curl",
    "codex": "Codex",
    "openclaw": "OpenClaw",
    "cline": "Cline",
    "openwebui": "Open WebUI",
    "continue": "Continue",
    "langchain": "LangChain",
    "env": "Environment variables",
    "generic": "Any other client",
}


def call(console: Any, agent: str, **body: Any) -> None:
    headers = {"User-Agent": agent}
    console.client.post("/v1/chat/completions", {**chat_body(), **body}, headers=headers)


def copied(page: Any, target: Any) -> str:
    """What a click copies, as a page hears of it that may use no clipboard."""
    page.evaluate(
        """() => {
            Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true});
            window.copied = '';
            const note = () => { window.copied = document.activeElement.value; };
            document.addEventListener('copy', note);
        }"""
    )
    target.click()
    return str(page.evaluate("window.copied"))


# -- Clients --------------------------------------------------------------------------------------


def test_every_client_has_its_address_and_steps(console: Any) -> None:
    page = console.open("connect")
    for name, words in CLIENTS.items():
        page.get_by_role("navigation", name="Client").get_by_role("link", name=words).click()
        assert page.url.endswith(f"#/connect/{name}")
        expect(page.get_by_role("heading", level=1)).to_have_text("Connect")
        path = "/codex/v1" if name == "codex" else "/v1"
        expect(page.locator(".copyline code")).to_have_text(f"{console.url}{path}")
        assert page.locator(".numbered li").count() >= 2
        blocks = page.locator(".code code").all_inner_texts()
        host = "host.docker.internal" if name == "openwebui" else "127.0.0.1"  # a container's
        own = console.url.replace("127.0.0.1", host)
        assert all(own in text for text in blocks)
        assert bool(blocks) == (name not in ("cline", "generic"))


def test_the_fields_and_the_text_are_copied(console: Any) -> None:
    page = console.open("connect/curl")
    assert copied(page, page.get_by_role("button", name="Copy: Base URL")) == f"{console.url}/v1"
    text = copied(page, page.locator(".code").first.get_by_role("button", name="Copy"))
    assert text == page.locator(".code code").first.inner_text()
    assert text.startswith(f"curl -sS '{console.url}/v1/responses'")


def test_what_is_chosen_goes_into_the_text_and_nowhere_else(console: Any) -> None:
    page = console.open("connect/python")
    page.get_by_role("textbox", name="API key").fill("azt_my-own-key")
    page.get_by_role("combobox", name="Model").select_option("gpt-5.5")
    page.get_by_role("radio", name="Docker").click()

    code = page.locator(".code code").first
    expect(code).to_contain_text("http://host.docker.internal:")
    expect(code).to_contain_text('api_key="azt_my-own-key"')
    assert "azt_my" not in page.url + page.evaluate("JSON.stringify({...localStorage})")
    assert page.url.endswith("#/connect/python?at=docker")
    page.reload()
    expect(page.get_by_role("radio", name="Docker")).to_be_checked()
    expect(code).to_contain_text('api_key="local"')


def test_the_client_shown_last_is_shown_again(console: Any) -> None:
    page = console.open("connect/langchain")
    page.get_by_role("link", name="Overview").first.click()
    page.get_by_role("link", name="Connect", exact=True).first.click()

    expect(page.locator(".clients [aria-current]")).to_have_text("LangChain")


def test_a_check_waits_for_a_call_of_that_client(console: Any) -> None:
    page = console.open("connect/cline")
    said = page.locator(".check [role=status]")
    page.get_by_role("button", name="Check it").click()
    expect(said).to_have_text("Waiting for a call from Cline…")
    call(console, "curl/8")
    call(console, "Cline/3.2")
    expect(said).to_contain_text("Received and answered")
    expect(said.get_by_role("link")).to_have_attribute("href", re.compile("#/log/req_"))

    page.get_by_role("button", name="Check it").click()
    call(console, "Cline/3.2", messages=3)
    expect(said).to_contain_text("Received, but it failed")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("route", ["connect/python", "connect/codex"])
def test_axe_finds_nothing_serious_on_connect(console: Any, route: str, theme: str) -> None:
    page = console.open(route, color_scheme=theme)
    page.locator(".code").first.wait_for()

    assert console.axe(page) == []


# -- Codex ----------------------------------------------------------------------------------------


class Codex:
    """A console, and the Codex home that it changes."""

    def __init__(self, console: Any) -> None:
        self.console, self.page = console, console.page
        self.home = Path(console.gateway.environment["CODEX_HOME"])
        self.config, self.auth = self.home / "config.toml", self.home / "auth.json"
        self.dialog = self.page.get_by_role("dialog")
        self.toast = self.page.locator(".toast")

    def click(self, name: str, within: Any = None) -> None:
        within = within or self.page
        self.console.click(within.get_by_role("button", name=name, exact=True))

    def open(self) -> None:
        self.console.click(self.page.get_by_role("link", name="Connect", exact=True))
        self.console.click(self.page.get_by_role("link", name="Codex", exact=True))


@pytest.fixture
def codex(console: Any) -> Iterator[Codex]:
    made = Codex(console)
    forget(made)
    made.home.mkdir()
    made.config.write_text(CONFIGS["everything"])
    yield made
    forget(made)


def forget(codex: Codex) -> None:
    """As if azt had never seen a Codex home: the tests share a gateway."""
    state = codex.console.gateway.state
    for path in (codex.home, *state.glob("codex*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_codex_is_taken_over_and_released(codex: Codex) -> None:
    """15; T16 and T17: four clicks each."""
    before = codex.config.read_bytes()
    codex.open()
    codex.click("Take over")
    expect(codex.dialog.locator(".plus").first).to_contain_text("+ ")
    assert codex.config.read_bytes() == before
    codex.click("Write config.toml")
    expect(codex.toast.last).to_contain_text("Restart Codex")
    assert codex.console.clicks == 4
    config = tomllib.loads(codex.config.read_text())
    assert config["openai_base_url"] == f"{codex.console.url}/codex/v1"
    expect(codex.page.locator(".state.on")).to_contain_text("Codex goes through azt")

    codex.page.get_by_label("Use a separate conversation list").check()
    codex.click("Change the history mode")
    codex.click("Write config.toml")
    expect(codex.page.get_by_text("history mode ai-zero-token")).to_be_visible()
    config = tomllib.loads(codex.config.read_text())
    assert config["model_provider"] == "ai-zero-token"
    kept = {line for line in before.decode().splitlines() if line.startswith("#")}
    assert kept <= set(codex.config.read_text().splitlines())

    codex.page.goto(f"{codex.console.url}/#/overview")
    codex.console.clicks = 0
    codex.open()
    codex.click("Release")
    codex.click("Write config.toml")
    expect(codex.page.locator(".state.on")).to_contain_text("Codex talks to the provider directly")
    assert codex.console.clicks == 4
    assert codex.config.read_bytes() == before


def test_the_toast_takes_a_write_back(codex: Codex) -> None:
    before = codex.config.read_bytes()
    codex.open()
    codex.click("Take over")
    codex.click("Write config.toml")
    expect(codex.page.locator(".state.on")).to_contain_text("Codex goes through azt")
    codex.click("Undo", codex.toast.last)
    expect(codex.page.locator(".state.on")).to_contain_text("Codex talks to the provider directly")
    assert codex.config.read_bytes() == before


def test_a_file_edited_after_the_preview_is_shown_again(codex: Codex) -> None:
    """16."""
    codex.console.allow(409)
    codex.open()
    codex.click("Take over")
    mine = codex.config.read_text() + '\n[profiles.mine]\nmodel = "gpt-5.5"\n'
    codex.config.write_text(mine)
    codex.click("Write config.toml")
    expect(codex.dialog).to_contain_text("The file changed since the preview")
    assert codex.config.read_text() == mine
    codex.click("Write config.toml")
    expect(codex.page.locator(".state.on")).to_contain_text("Codex goes through azt")
    assert "[profiles.mine]" in codex.config.read_text()


def test_another_account_goes_into_codex_and_back(codex: Codex) -> None:
    """14, from the panel."""
    codex.open()
    codex.click("Use another account")
    codex.page.get_by_role("menuitem", name="work@corp.dev").click()
    expect(codex.dialog).to_contain_text("work@corp.dev")
    assert not codex.auth.exists()
    codex.click("Write auth.json")
    expect(codex.page.get_by_text("auth.json holds work@corp.dev")).to_be_visible()
    assert json.loads(codex.auth.read_text())["tokens"]["account_id"] == "acct-2"
    assert stat.S_IMODE(codex.auth.stat().st_mode) == 0o600

    codex.click("Use another account")
    codex.page.get_by_role("menuitem", name="ada@example.com").click()
    codex.click("Write auth.json")
    expect(codex.page.get_by_text("auth.json holds ada@example.com")).to_be_visible()
    codex.click("Undo", codex.toast.last)
    expect(codex.page.get_by_text("auth.json holds work@corp.dev")).to_be_visible()


def test_backups_are_compared_restored_and_deleted(codex: Codex) -> None:
    """T9: three clicks from the panel's page."""
    before = codex.config.read_bytes()
    codex.open()
    codex.click("Take over")
    codex.click("Write config.toml")
    rows = codex.page.locator(".backups li")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("before the take-over")
    codex.page.goto(f"{codex.console.url}/#/connect/python")
    codex.console.clicks = 0
    codex.console.click(codex.page.get_by_role("link", name="Codex", exact=True))
    codex.click("Restore", rows.first)
    expect(codex.dialog.locator(".diff")).to_contain_text("openai_base_url")
    codex.click("Restore", codex.dialog)
    expect(rows).to_have_count(2)
    assert codex.console.clicks == 3
    assert codex.config.read_bytes() == before

    codex.click("Delete the backup of config.toml", rows.first)
    codex.click("Remove", codex.dialog)
    expect(rows).to_have_count(1)


def test_what_the_files_say_is_followed(codex: Codex) -> None:
    codex.open()
    done = codex.console.gateway.azt("codex", "takeover", "--yes")
    assert done.returncode == 0, done.stderr
    expect(codex.page.locator(".state.on")).to_contain_text("Codex goes through azt")
    codex.config.write_text(codex.config.read_text() + "# mine\n")
    codex.click("Release")
    expect(codex.dialog).to_contain_text("edited since the take-over")


@pytest.mark.parametrize("broken", ["config", "folder"])
def test_the_text_for_the_hand_is_there(codex: Codex, broken: str) -> None:
    """Where azt cannot write the file, the panel says why and shows what it has to say."""
    if broken == "folder" and os.geteuid() == 0:
        pytest.skip("nothing is closed to root")
    codex.console.allow(409, 422, 500)
    if broken == "config":
        codex.config.write_text("this is = = no TOML")
    else:
        codex.home.chmod(0o500)
    codex.open()
    if broken == "config":
        expect(codex.page.locator(".codex .notice")).to_contain_text("no valid TOML")
    codex.click("Take over")
    expect(codex.toast.last).to_be_visible()
    expect(codex.page.locator(".code code").first).to_contain_text("openai_base_url")
    codex.home.chmod(0o700)
