"""What holds for every view of the console (views.py), in both languages and at every width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from console import Console
from fake_upstream import FakeUpstream
from harness import Client, make_gateway
from views import VIEWS, View, people, scene

# Names that stand in both languages: the other language's own, and clients in the request log.
NAMES = {"简体中文", "English", "Playground", "unknown"}
WIDTHS = (320, 360, 390, 768, 860, 1280, 1920)

# Word by word: what a page in one language may not show of the other, and names of sentences.
SHOWN = """document.body.innerText + [...document.querySelectorAll('[aria-label],[title]')]
    .map((one) => `\\n${one.ariaLabel || ''}\\n${one.title}`).join('')"""


@pytest.fixture(scope="module")
def consoles(
    chromium: Any, shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[bool, Console]]:
    """One gateway with accounts in every state and calls of every kind, and one with nothing."""
    shared_upstream.reset()
    made = {}
    for empty in (False, True):
        accounts = [] if empty else people()
        folder = tmp_path_factory.mktemp("everywhere")
        gateway = make_gateway(folder, shared_upstream, accounts=accounts)
        if not empty:
            scene(shared_upstream, Client(gateway.url), gateway.proof())
        made[empty] = Console(chromium, gateway, shared_upstream)
    yield made
    for console in made.values():
        console.gateway.stop()
        assert "Traceback" not in console.gateway.log(), console.gateway.log()


@pytest.fixture(params=VIEWS, ids=lambda view: view.name)
def view(request: pytest.FixtureRequest, consoles: dict[bool, Console]) -> Iterator[Any]:
    """`view(locale="zh-CN")` -> (console, page) with the view in it."""
    wanted: View = request.param
    console = consoles[wanted.empty]
    console.complaints.clear()
    console.allow(0, 401, 403)

    def show(**context: Any) -> tuple[Console, Any]:
        page = console.open(wanted.route, proof=wanted.proof, **context)
        page.locator(wanted.ready).first.wait_for()
        if wanted.prepare:
            wanted.prepare(page)
        return console, page

    yield show
    console.close()


@pytest.mark.parametrize(("theme", "language"), [("light", "en"), ("dark", "zh-CN")])
def test_a_view_is_whole(view: Any, theme: str, language: str) -> None:
    """36, 39, 40, 41 on one opened page, for each costs seconds: all that is wrong is collected."""
    console, page = view(color_scheme=theme, locale=language)
    wrong = console.axe(page)
    wrong += names_and_ids(page)
    wrong += sentences(page) if language == "zh-CN" else overflow(page)
    page.emulate_media(reduced_motion="reduce")
    wrong += page.evaluate("document.getAnimations().map((one) => `moves: ${one.animationName}`)")
    page.emulate_media(forced_colors="active")
    wrong += outlines(page)

    assert not wrong, "\n".join(wrong)


def names_and_ids(page: Any) -> list[str]:
    """41, beyond what axe looks at."""
    found: list[str] = page.evaluate(
        """() => {
            const all = [...document.querySelectorAll('[id]')].map((one) => one.id);
            const twice = all.filter((one, at) => all.indexOf(one) !== at);
            const mute = [...document.querySelectorAll('[role=meter]:not([aria-valuetext])')];
            const titles = document.querySelectorAll('h1').length;
            return [...twice.map((one) => `id twice: ${one}`), ...mute.map(() => 'a mute meter'),
                ...(titles === 1 ? [] : [`h1: ${titles}`])];
        }"""
    )
    return found


def overflow(page: Any) -> list[str]:
    """39: at 320 CSS pixels too, which is 1280 at 400 %."""
    wide = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(60)
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        wide += [f"{over} px too wide at {width}"] if over > 0 else []
    return wide


def sentences(page: Any) -> list[str]:
    """36: no name of a sentence is shown, and no English is left in Chinese except names."""
    table = page.evaluate("import('/js/strings.js').then((one) => one.STRINGS)")
    shown = {line.strip() for line in page.evaluate(SHOWN).splitlines()}
    english = {first for first, second in table.values() if first != second and len(first) > 3}
    chinese = {second for _, second in table.values()}
    return sorted(f"not worded: {one}" for one in ({*table} | english - chinese - NAMES) & shown)


def outlines(page: Any) -> list[str]:
    """40: in forced colours what is pressed, chosen or current has an outline of its own."""
    chosen = "[aria-pressed=true], [aria-current], .segmented label:has(:checked)"
    found: list[str] = page.evaluate(
        """(chosen) => [...document.querySelectorAll(chosen)]
            .filter((one) => one.checkVisibility() && getComputedStyle(one).outlineStyle === 'none')
            .map((one) => `no outline: ${one.outerHTML.slice(0, 80)}`)""",
        chosen,
    )
    return found
