"""Signing in with a real browser: at the scripted issuer, and back to the callback port."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream
from harness import Client, Gateway
from loopback import Server, answer, sized
from test_sign_in_command import LINK, Command, is_free

import azt

MARK = {"X-AZT-Admin": "1"}


@pytest.fixture(params=["with a server", "without a server"])
def place(
    request: pytest.FixtureRequest, home: Path, upstream: FakeUpstream, ports: None
) -> Iterator[Gateway]:
    gateway = Gateway(home, upstream.environment(), ["--host", "127.0.0.1", "--port", "0"])
    if request.param == "with a server":
        gateway.start()
    yield gateway
    if gateway.url:
        gateway.stop()
        assert "Traceback" not in gateway.log(), gateway.log()


def emails(gateway: Gateway) -> list[str]:
    listed = json.loads(gateway.azt("accounts", "list", "--json").stdout)["items"]
    return [one["email"] for one in listed]


def test_the_browser_signs_in(place: Gateway, page: Any) -> None:
    with Command(place, "login", "--no-browser") as command:
        page.goto(command.read_until(LINK))
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("heading", name="Signed in").wait_for()
        text, address = page.inner_text("body"), page.url
        code, shown = command.end()

    assert code == 0, shown
    assert "ada@example.com" in text and "You can close this tab" in text
    assert address.startswith("http://localhost:1455/auth/callback?")
    assert emails(place) == ["ada@example.com"]
    assert is_free(1455)


def test_a_device_signs_in_with_the_code_that_a_person_enters(place: Gateway, page: Any) -> None:
    with Command(place, "login", "--device") as command:
        code = command.read_until(r"ABCD-\d{5}")
        address = re.search(r"http://\S+/codex/device", command.shown)
        assert address
        page.goto(address[0])
        page.get_by_label("Code").fill(code.lower())
        page.get_by_role("button", name="Continue").click()
        page.get_by_text("Device connected").wait_for()
        exit_code, shown = command.end()

    assert exit_code == 0, shown
    assert emails(place) == ["ada@example.com"]


def test_with_both_ports_taken_the_address_of_the_browser_is_pasted(
    place: Gateway, page: Any
) -> None:
    other = answer(sized(b"another program", "404 Not Found"))
    first, second = azt.CALLBACK_PORTS
    with Server(other, port=first), Server(other, port=second):
        with Command(place, "login", "--no-browser", terminal=True) as command:
            page.goto(command.read_until(LINK))
            page.get_by_role("button", name="Continue").click()
            page.get_by_text("another program").wait_for()
            command.type(page.url)
            code, shown = command.end()

    assert code == 0, shown
    assert emails(place) == ["ada@example.com"]


def test_a_hostile_page_that_knows_the_state_cannot_end_a_sign_in(
    new_gateway: Any, upstream: FakeUpstream, ports: None, page: Any
) -> None:
    admin = Client(new_gateway().url)
    start = "/_gateway/admin/login"
    flow = admin.post(start, {}, headers=MARK).json
    admin.post(f"{start}/{flow['flowId']}/open", {}, headers=MARK)
    state = re.search(r"state=([\w-]+)", flow["authorizeUrl"])
    assert state
    target = f"{flow['redirectUri']}?state={state[1]}&error=access_denied"

    page.goto(f"{upstream.url}/codex/device")
    page.evaluate(
        """async target => {
            const image = new Image(), frame = document.createElement("iframe");
            image.src = frame.src = target;
            document.body.append(image, frame);
            await fetch(target, {mode: "no-cors"}).catch(() => 0);
            await fetch(target).catch(() => 0);
            await fetch(target, {method: "POST", mode: "no-cors", body: "x"}).catch(() => 0);
        }""",
        target,
    )
    time.sleep(0.3)  # the frame and the picture say nothing when they are done

    assert admin.get(f"{start}/{flow['flowId']}").json["status"] == "waiting"
    assert admin.request("DELETE", f"{start}/{flow['flowId']}", headers=MARK).status == 204
