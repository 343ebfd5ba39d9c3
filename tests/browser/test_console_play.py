"""The Playground in a real browser. Numbers: console.md 10; T18 and T19: 1.2."""

from __future__ import annotations

import ast
import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import (
    answer,
    call,
    image,
    limit_reached,
    message,
    reasoning,
    text,
    without,
)
from playwright.sync_api import expect

COUNT_URLS = """
window.live = new Set(); window.shown = [];
const make = URL.createObjectURL.bind(URL), drop = URL.revokeObjectURL.bind(URL);
URL.createObjectURL = (blob) => { const url = make(blob); window.live.add(url); return url; };
URL.revokeObjectURL = (url) => { window.live.delete(url); drop(url); };
"""


def png(width: int, height: int, red: int, noise: bytes = b"") -> bytes:
    """A picture of one colour; `noise` behind its end makes the file larger."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = (b"\0" + bytes((red, 30, 40)) * width) * height
    whole = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole + noise


def as_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def send(page: Any, name: str = "Send") -> None:
    page.get_by_role("button", name=name, exact=True).click()


def finished(page: Any, state: str = "done") -> None:
    expect(page.locator(".run-facts span").first).to_have_text(state)


def test_18_two_clicks_from_anywhere_to_an_answer_that_grows(console: Any) -> None:
    console.upstream.script(text(*"one two three four".split()), stall=True, after=5)

    console.click("Playground")
    console.click(console.page.get_by_role("button", name="Send", exact=True))

    said = console.page.locator(".told p.said").last
    expect(said).to_contain_text("one")
    grown = said.inner_text()
    expect(console.page.locator(".run-facts")).to_contain_text("streaming")
    expect(console.page.locator(".run-facts")).to_contain_text("first token")
    expect(console.page.locator(".run-facts")).to_contain_text("by ada@example.com")
    console.upstream.release()
    finished(console.page)
    expect(said).to_have_text("onetwothreefour")
    assert len(grown) < len("onetwothreefour")
    expect(console.page.locator(".run-facts")).to_contain_text("12 in / 7 out")
    assert console.clicks <= 2  # T18


def test_23_stop_ends_the_call_upstream_and_keeps_what_came(console: Any) -> None:
    page = console.open("playground")
    console.upstream.script(text("first ", "second"), stall=True, after=5)
    send(page)
    expect(page.locator(".told")).to_contain_text("first")

    page.get_by_role("button", name="Stop", exact=True).click()

    assert console.upstream.wait_closed()
    finished(page, "stopped")
    expect(page.locator(".told p.said").last).to_contain_text("first")
    page.get_by_role("link", name="Open in log").click()
    expect(page.get_by_role("dialog")).to_contain_text("The client closed the connection")


def test_escape_stops_and_control_enter_sends(console: Any) -> None:
    page = console.open("playground")
    console.upstream.script(text("a", "b"), stall=True, after=5)
    page.get_by_label("Prompt").focus()

    page.keyboard.press("Control+Enter")
    expect(page.locator(".run-facts")).to_contain_text("streaming")
    page.keyboard.press("Escape")

    finished(page, "stopped")


def test_what_is_sent_is_what_the_form_says(console: Any) -> None:
    page = console.open("playground?mode=responses")
    page.get_by_role("combobox", name="Effort").select_option("high")
    page.locator("summary", has_text="System").click()
    page.get_by_label("System").fill("Be brief.")
    page.get_by_role("button", name="Tool call").click()
    call_item = call("get_weather", '{"city":', '"Lisbon"}')
    console.upstream.script(answer(reasoning("Hm."), call_item))

    send(page)
    finished(page)

    sent = console.upstream.sent
    assert sent["instructions"] == "Be brief." and sent["reasoning"]["effort"] == "high"
    assert [tool["name"] for tool in sent["tools"]] == ["get_weather"]
    expect(page.locator(".tool")).to_have_text('get_weather({"city":"Lisbon"})')
    page.locator("summary", has_text="Reasoning").click()
    expect(page.locator(".told")).to_contain_text("Hm.")


def test_a_body_written_by_hand_is_sent_as_it_is(console: Any) -> None:
    page = console.open("playground")
    page.locator("summary", has_text="Raw JSON").click()
    area = page.get_by_label("Raw JSON")
    expect(area).to_have_value(re.compile('"model"'))

    area.fill("{")
    send(page)
    expect(page.locator("#toasts")).to_contain_text("not valid JSON")
    assert console.upstream.turns == []
    hello = '{"model": "gpt-5.5", "messages": [{"role": "user", "content": "by hand"}]}'
    area.fill(hello)
    send(page)

    expect(page.locator(".told p.said").last).to_have_text("You said: by hand")


def test_a_named_account_answers_and_no_other(console: Any) -> None:
    page = console.open("playground")
    page.get_by_role("combobox", name="Account").select_option("work@corp.dev")

    send(page)
    finished(page)

    assert console.upstream.turns[-1].account == "acct-2"
    expect(page.locator(".run-facts")).to_contain_text("by work@corp.dev")


def test_a_switch_while_it_runs_is_a_line_of_the_answer(gateway_console: Any) -> None:
    from fake_upstream import account_file

    people = [account_file(), account_file("acct-2", "user-2", "lab-02@example.com")]
    settings = {"autoSwitch": {"enabled": True}}
    console = gateway_console(accounts=people, settings=settings, route="playground")
    console.upstream.script(status=429, json=limit_reached(7200))

    send(console.page)
    finished(console.page)

    line = console.page.locator(".switched")
    expect(line).to_have_text(re.compile("could not answer.*continued on .*@example.com"))


def test_a_failure_is_told_with_the_way_to_its_explanation(console: Any) -> None:
    console.allow(400)
    page = console.open("playground?model=gpt-5.5")
    page.locator("summary", has_text="Raw JSON").click()
    page.get_by_label("Raw JSON").fill('{"model": "no-such-model", "messages": []}')

    with page.expect_response("**/playground"):
        send(page)

    finished(page, "failed")
    expect(page.locator(".told [role=alert]")).not_to_be_empty()
    page.get_by_role("link", name="Open in log").click()
    expect(page.get_by_role("dialog")).to_contain_text("Copy details")


def test_2000_events_are_a_few_rows_and_each_can_be_read(console: Any) -> None:
    console.upstream.script(text(*[f"{n} " for n in range(2000)]))
    page = console.open("playground?mode=responses")
    send(page)
    finished(page)

    page.get_by_role("radio", name="Events").click()

    expect(page.locator(".event").first).to_contain_text("response.created")
    assert page.locator(".event").count() < 60
    assert page.evaluate("document.querySelector('.roller').scrollHeight") > 2000 * 20
    page.evaluate("document.querySelector('.roller').scrollTop = 1e9")
    last = page.locator(".event", has_text="response.completed")
    expect(last).to_be_visible()
    last.click()
    expect(page.get_by_role("dialog").locator(".code")).to_contain_text(
        '"type":"response.completed"'
    )


def test_the_request_can_be_taken_elsewhere(console: Any) -> None:
    page = console.open("playground?tab=request")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_label("Prompt").fill('it\'s "quoted"\n§ 你好')
    expect(page.locator(".told pre:visible")).to_contain_text(f"POST {console.url}/v1/chat")
    programs = {}
    for name in ("curl", "Python", "JS"):
        page.get_by_role("button", name=f"Copy as {name}").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        programs[name] = page.evaluate("copied")
        expect(page.get_by_role("button", name="Copied")).to_have_count(0)

    ast.parse(programs["Python"])
    for command in (["bash", "-c", programs["curl"]], [sys.executable, "-c", programs["Python"]]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert console.upstream.turns[-1].user_text == 'it\'s "quoted"\n§ 你好'
    assert f'baseURL: "{console.url}/v1"' in programs["JS"]


def test_the_times_of_a_call_are_shown(console: Any) -> None:
    console.upstream.script(text("a", "b", "c"), delays=0.05)
    page = console.open("playground?tab=timing")
    expect(page.locator(".told .empty:visible")).to_contain_text("appear here")

    send(page)

    expect(page.locator(".waterfall")).to_contain_text("Stream")


def test_24_previews_and_picture_in_one_frame(console: Any) -> None:
    pictures = [png(256, 256, red) for red in (60, 120, 200)]
    encoded = [as_base64(one) for one in pictures]
    console.upstream.script(answer(image(encoded[2], encoded[:2])), stall=True, after=6)
    page = console.open("playground")
    page.evaluate(COUNT_URLS)
    console.page, console.clicks = page, 0

    console.click(page.get_by_role("radio", name="Image"))
    console.click(page.get_by_role("button", name="Generate"))

    assert console.clicks <= 2  # T19
    caption, frame = page.locator(".frame figcaption"), page.locator(".frame img")
    expect(caption).to_have_text(re.compile("preview [12] of 3"))
    seen = [frame.get_attribute("src")]
    console.upstream.release()
    expect(caption).to_have_text("finished")
    seen.append(frame.get_attribute("src"))
    expect(frame).to_have_count(1)
    assert len({*seen}) == 2 and page.evaluate("[...live]") == [seen[-1]]
    with page.expect_download() as told:
        page.get_by_role("button", name="Download").click()
    assert Path(told.value.path()).read_bytes() == pictures[2]
    assert told.value.suggested_filename == "picture.png"
    assert console.upstream.sent["tools"][0]["partial_images"] == 2


def test_25_a_picture_is_attached_and_edited(console: Any, tmp_path: Path) -> None:
    page = console.open("playground?mode=image")
    given, made = png(64, 64, 10), png(64, 64, 250)
    console.upstream.script(answer(image(as_base64(made))))
    file = tmp_path / "cat.png"
    file.write_bytes(given)
    page.locator("input[type=file]").set_input_files(file)
    expect(page.locator(".pictures")).to_contain_text("cat.png")

    send(page, "Generate")
    expect(page.locator(".frame:visible figcaption")).to_have_text("finished")

    sent = [one.body for one in console.upstream.requests if one.method == "POST"]
    assert f"data:image/png;base64,{as_base64(given)}" in json.dumps(sent[-1])
    page.get_by_role("button", name="Use as reference").click()
    expect(page.locator(".pictures figure")).to_have_count(2)


def test_25_a_large_picture_is_scaled_only_after_asking(console: Any, tmp_path: Path) -> None:
    page = console.open("playground?mode=image")
    file = tmp_path / "large.png"
    file.write_bytes(png(4000, 3000, 90, noise=bytes(20_000_000)))

    page.locator("input[type=file]").set_input_files(file)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("4000 × 3000")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator(".pictures figure")).to_have_count(0)
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_role("button", name="Scale and add").click()

    expect(page.locator(".pictures figure")).to_have_count(1)
    size = page.evaluate(
        """async () => { const one = document.querySelector('.pictures img');
            await one.decode(); return [one.naturalWidth, one.naturalHeight]; }"""
    )
    assert size == [2048, 1536]


def test_pictures_are_dropped_pasted_and_four_at_most(console: Any) -> None:
    page = console.open("playground")
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const give = (type, target, count) => {
                const files = new DataTransfer();
                for (let n = 0; n < count; n += 1) {
                    const name = `<img src=x onerror=a()>${n}.png`;
                    files.items.add(new File([bytes], name, {type: 'image/png'}));
                }
                const how = {clipboardData: files, dataTransfer: files, bubbles: true};
                const Kind = type === 'paste' ? ClipboardEvent : DragEvent;
                document.querySelector(target).dispatchEvent(new Kind(type, how));
            };
            give('paste', '.ask textarea', 1);
            await new Promise((done) => setTimeout(done, 300));
            give('drop', '.ask', 5);
        }""",
        as_base64(png(32, 32, 77)),
    )

    expect(page.locator(".pictures figure")).to_have_count(4)
    expect(page.locator("#toasts")).to_contain_text("4 pictures at most")
    expect(page.locator(".pictures")).to_contain_text("<img src=x onerror=a()>0.png")
    page.get_by_role("button", name="Remove <img").first.click()
    expect(page.locator(".pictures figure")).to_have_count(3)


def test_earlier_runs_are_text_in_this_tab_and_come_back(console: Any) -> None:
    page = console.open("playground")
    for number in range(22):
        page.get_by_label("Prompt").fill(f"question {number}")
        send(page)
        expect(page.locator(".told p.said").last).to_have_text(f"You said: question {number}")
        finished(page)

    page.reload()
    page.locator("summary", has_text="Earlier runs").click()
    expect(page.locator(".past")).to_have_count(20)
    page.locator(".past", has_text="question 20").click()

    expect(page.locator(".told p.said").last).to_have_text("You said: question 20")
    expect(page.get_by_label("Prompt")).to_have_value("question 20")
    assert page.evaluate("Object.keys(sessionStorage)") == ["azt.play"]
    page.get_by_role("button", name="Clear", exact=True).click()
    assert page.evaluate("sessionStorage.length") == 0


def test_screenshot_mode_keeps_no_history(console: Any) -> None:
    page = console.open("playground")
    page.evaluate("import('/js/format.js').then((format) => format.setMasking(true))")

    send(page)
    finished(page)

    assert page.evaluate("sessionStorage.length") == 0


def test_another_language_or_page_loses_neither_text_nor_answer(console: Any) -> None:
    page = console.open("playground")
    page.get_by_label("Prompt").fill("kept")
    send(page)
    finished(page)

    page.evaluate("import('/js/i18n.js').then((i18n) => i18n.setLang('zh-CN'))")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator(".told p.said").last).to_have_text("You said: kept")
    expect(page.locator(".run-facts span").first).to_have_text("完成")
    shown = page.inner_text("#main")
    page.goto(f"{console.url}/#/overview")
    page.goto(f"{console.url}/#/playground")
    expect(page.locator(".ask textarea").first).to_have_value("kept")

    assert not re.search(r"\b(play|log|act|ui)\.\w+", shown), shown


def test_the_models_that_clients_see_are_listed(console: Any) -> None:
    page = console.open("playground?mode=models")

    send(page, "List models")

    expect(page.locator(".told table")).to_contain_text("gpt-5.5")
    expect(page.get_by_label("Prompt")).to_be_hidden()


def test_an_answer_whose_end_is_missing_is_a_failure_with_its_text(console: Any) -> None:
    console.upstream.script(without(answer(message("half ")), ".completed"), cut=True)
    page = console.open("playground?mode=responses")

    send(page)

    finished(page, "failed")
    expect(page.locator(".told p.said").last).to_contain_text("half")
    expect(page.locator(".told [role=alert]")).not_to_be_empty()


@pytest.mark.parametrize("mode", ["chat", "image", "models"])
def test_axe_finds_nothing_serious_in_the_playground(console: Any, mode: str) -> None:
    page = console.open(f"playground?mode={mode}", color_scheme="dark")
    page.get_by_role("combobox", name="Account").wait_for()

    assert console.axe(page) == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_scrolls_the_playground_sideways(console: Any, width: int) -> None:
    page = console.open("playground", viewport={"width": width, "height": 700})
    send(page)
    finished(page)

    for tab in ("Events", "Request", "Timing"):
        page.get_by_role("radio", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
