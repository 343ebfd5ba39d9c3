"""What holds for every view of the console (views.py), in both languages and at every width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from console import Console
from fake_upstream import FakeUpstream
from harness import Client, make_gateway
from views import VIEWS, View, people, scene

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
def test_axe_finds_nothing_serious(view: Any, theme: str, language: str) -> None:
    """41, with the names of all controls and the contrast of what is shown."""
    console, page = view(color_scheme=theme, locale=language)

    assert console.axe(page) == []
    assert page.locator("h1").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    meters = page.locator("[role=meter]").all()
    assert all(one.get_attribute("aria-valuetext") for one in meters)


def test_no_width_scrolls_sideways(view: Any) -> None:
    """39: at 320 CSS pixels too, which is 1280 at 400 %."""
    _, page = view()
    wide = {}
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(60)
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if over > 0:
            wide[width] = over

    assert wide == {}


def test_no_sentence_is_missing_or_in_the_other_language(view: Any) -> None:
    """36: no name of a sentence, and no English left in Chinese except names."""
    _, page = view(locale="zh-CN")
    table = page.evaluate("import('/js/strings.js').then((one) => one.STRINGS)")
    shown = {line.strip() for line in page.evaluate(SHOWN).splitlines()}

    assert [key for key in table if key in shown] == []
    english = {first for first, second in table.values() if first != second and len(first) > 3}
    chinese = {second for _, second in table.values()}
    assert sorted((english - chinese) & shown) == []


def test_reduced_motion_stops_everything_that_moves(view: Any) -> None:
    """40."""
    _, page = view(reduced_motion="reduce")

    assert page.evaluate("document.getAnimations().length") == 0


def test_forced_colours_keep_edges_and_states(view: Any) -> None:
    """40: what is pressed, chosen or current has an outline of its own."""
    _, page = view(forced_colors="active")
    chosen = "[aria-pressed=true], [aria-current], [role=radio][aria-checked=true]"
    widths = page.evaluate(
        "(chosen) => [...document.querySelectorAll(chosen)]"
        ".map((one) => getComputedStyle(one).outlineStyle)",
        chosen,
    )

    assert set(widths) <= {"solid"}
