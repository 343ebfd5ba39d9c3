"""The console of a gateway in a real browser, and what no page of it may ever do."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream
from harness import ROOT, Client, Gateway

PROOF = "/_gateway/admin/session/pair"

# In the page, before its own scripts: what breaks the policy, and what a body must not hold. Only
# four answers may hold a secret, each asked for by a deliberate action (console.md 6).
WATCH = r"""
addEventListener('securitypolicyviolation', (event) => {
  console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`);
});
const plainly = window.fetch;
const allowed = /\/(accounts\/export|keys|session\/pair|session\/rotate-token)$/;
const secret = /eyJhbGciOiAibm9uZSI|rt_[A-Za-z0-9_-]{30}|azt_[A-Za-z0-9_-]{30}/;
window.fetch = async (...given) => {
  const answer = await plainly(...given);
  const copy = answer.body && !allowed.test(new URL(answer.url).pathname) ? answer.clone() : null;
  (async () => {
    const reader = copy.body.pipeThrough(new TextDecoderStream()).getReader();
    let seen = '';
    for (let piece; !(piece = await reader.read()).done;) {
      seen = seen.slice(-4000) + piece.value;
      if (secret.test(seen)) console.error(`a secret in the answer of ${answer.url}`);
    }
  })().catch(() => {});
  return answer;
};
"""


class Console:
    """The console of one gateway, open in a browser.

    page      its page, signed in by a code of `azt open` (unless `proof=False`)
    url       of the gateway, without a slash
    clicks    how often `click` and `press` activated something
    """

    def __init__(self, chromium: Any, gateway: Gateway, upstream: FakeUpstream) -> None:
        self.gateway, self.upstream = gateway, upstream
        self.url, self.home = gateway.url, gateway.home
        self.client = Client(gateway.url)
        self.clicks = 0
        self.complaints: list[str] = []
        self.left_open: list[Any] = []
        self._allowed: set[int] = set()
        self._chromium = chromium
        self.page: Any = None

    def open(self, route: str = "", proof: bool = True, **context: Any) -> Any:
        """A page of a fresh profile at `#/route`. `context`: locale, viewport, color_scheme ..."""
        options = {"locale": "en", "viewport": {"width": 1280, "height": 900}, **context}
        profile = self._chromium.new_context(**options)
        self.left_open.append(profile)
        profile.add_init_script(WATCH)
        profile.on("request", self._check_place)
        profile.grant_permissions(["clipboard-write"], origin=self.url)
        page = profile.new_page()
        page.set_default_timeout(20_000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        code = self.code() if proof else ""
        page.goto(f"{self.url}/#/open/{code}" if code else f"{self.url}/#/{route}")
        if code:
            page.wait_for_url(re.compile("#/(?!open|signin)"))
            if route:
                page.goto(f"{self.url}/#/{route}")
        page.locator("#main > *").first.wait_for()
        self.page = self.page or page
        return page

    def code(self) -> str:
        """What `azt open` puts into the address; empty where the gateway has none."""
        answer = self.client.post(PROOF, {"for": "open"}, headers=self.gateway.proof())
        return str(answer.json["code"]) if answer.status == 200 else ""

    def click(self, target: Any, **how: Any) -> None:
        """Activate something: a locator, or the text of a button or link."""
        if isinstance(target, str):
            target = self.page.get_by_role("button", name=target).or_(
                self.page.get_by_role("link", name=target)
            )
        self.clicks += 1
        target.click(**how)

    def press(self, keys: str) -> None:
        self.clicks += 1
        self.page.keyboard.press(keys)

    def clipboard(self) -> str:
        """What was copied. The console's own policy does not let its pages read it."""
        page = self.page.context.new_page()
        page.goto(f"{self.upstream.url}/codex/device")
        page.context.grant_permissions(["clipboard-read"], origin=self.upstream.url)
        copied = str(page.evaluate("navigator.clipboard.readText()"))
        page.close()
        return copied

    def admin(self, method: str, path: str, json: Any = None) -> Any:
        """A call to the admin API by the owner, past the page."""
        headers = self.gateway.proof()
        answer = self.client.request(method, f"/_gateway/admin{path}", json, headers=headers)
        assert answer.status < 300, answer.body
        return answer.json if answer.body else None

    def allow(self, *statuses: int) -> None:
        """Answers with these are part of the test: the browser's complaint of them is expected."""
        self._allowed |= set(statuses)

    def axe(self, page: Any = None) -> list[str]:
        """The serious violations that axe-core finds in what is shown now."""
        page = page or self.page
        page.evaluate(axe_source())
        found = page.evaluate(
            """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
                .filter((one) => ['serious', 'critical'].includes(one.impact))
                .flatMap((one) => one.nodes.map((at) =>
                    `${one.id}: ${at.target} ${at.any[0]?.message || ''}`))"""
        )
        return list(found)

    def close(self) -> None:
        """End what is open. Raises for anything that a page must not do."""
        for profile in self.left_open:
            for page in profile.pages:
                with contextlib.suppress(Exception):
                    kept = page.evaluate("JSON.stringify([{...localStorage}, location.href])")
                    if re.search(r"eyJ|rt_|azt_\w|@", kept.replace("azt.", "")):
                        self.complaints.append(f"kept in the browser: {kept}")
            profile.close()
        self.left_open = []
        assert self.complaints == [], self.complaints

    def _check_place(self, request: Any) -> None:
        if not re.match(r"(blob:)?http://(127\.0\.0\.1|localhost|\[::1\])[:/]|about:", request.url):
            self.complaints.append(f"outside this computer: {request.url}")

    def _note(self, message: Any) -> None:
        if message.type != "error":
            return
        status = re.search(r"status of (\d+)", message.text)
        if not (status and int(status[1]) in self._allowed) and not (
            0 in self._allowed and "net::ERR_" in message.text
        ):
            self.complaints.append(f"{message.text} {message.location.get('url', '')}")


def axe_source() -> str:
    places = [os.environ.get("AZT_TEST_NODE_MODULES", ""), ROOT / ".azt-test-env/node/node_modules"]
    files = [Path(place, "axe-core/axe.min.js") for place in places if place]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        pytest.skip("axe-core is not installed: `python3 tests` does it where npm is")
    return found.read_text(encoding="utf-8")
