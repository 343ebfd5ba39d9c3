"""`python3 tests --screenshots`: every view in light and dark, both languages, desktop and phone.

The pictures go to `.azt-screenshots` (ignored by git), to be looked at: console.md 11 has the list.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent), str(HERE)]

from console import Console  # noqa: E402
from fake_upstream import FakeUpstream  # noqa: E402
from harness import ROOT, Client, make_gateway  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from views import VIEWS, people, scene  # noqa: E402

SIZES = {"1280": {"width": 1280, "height": 900}, "390": {"width": 390, "height": 844}}


def main(wanted: list[str]) -> int:
    folder = ROOT / ".azt-screenshots"
    folder.mkdir(exist_ok=True)
    views = [view for view in VIEWS if not wanted or any(one in view.name for one in wanted)]
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    with FakeUpstream() as upstream, sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        for empty in (False, True):
            accounts = [] if empty else people()
            home = Path(tempfile.mkdtemp(prefix="azt-scene-"))
            gateway = make_gateway(home, upstream, accounts=accounts)
            if not empty:
                scene(upstream, Client(gateway.url), gateway.proof())
            console = Console(browser, gateway, upstream)
            for view in views:
                for size, viewport in SIZES.items() if view.empty == empty else ():
                    for theme in ("light", "dark"):
                        for language in ("en", "zh-CN"):
                            page = console.open(
                                view.route,
                                proof=view.proof,
                                viewport=viewport,
                                color_scheme=theme,
                                locale=language,
                            )
                            page.locator(view.ready).first.wait_for()
                            if view.prepare:
                                view.prepare(page)
                            page.wait_for_timeout(300)
                            name = f"{view.name}-{size}-{theme}-{language[:2]}.png"
                            page.screenshot(path=folder / name)
                            page.context.close()
                            console.left_open.clear()
            gateway.stop()
            shutil.rmtree(home, ignore_errors=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
