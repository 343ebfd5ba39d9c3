"""A gateway's renewals without the gateway around them: renews one sign-in again and again until
it is killed. Children of one process, so that a thousand kills are quick.

python renewer.py   reads one JSON line per run, answers {"pid"}, lines, and {"status"} at the end

{"environment", "times", "at_once"?, "shares"?}   what to run. At once: as often in parallel, and
                    only if the token has expired. Shares: into Codex's auth.json too, as for an
                    account that Codex uses
{"refresh_token", "window_ms"}   a renewal came back and may be used by now; the time from the
                    answer to its being on disk
{"answer"}          what the provider has just given, on disk or not
{"rejected"}        only a new sign-in helps
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from typing import Any

import azt

Json = dict[str, Any]


def say(line: Json) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


class Stopwatch:
    """Time from the return of `refresh_tokens` to that of the first `write_bytes` after it."""

    def __init__(self) -> None:
        self.received_s = self.window_s = 0.0
        self._refresh_tokens, self._write_bytes = azt.refresh_tokens, azt.write_bytes
        azt.refresh_tokens, azt.write_bytes = self.refresh_tokens, self.write_bytes

    def refresh_tokens(self, *call: Any) -> azt.Tokens:
        tokens = self._refresh_tokens(*call)
        say({"answer": tokens.refresh_token})
        self.received_s = time.perf_counter()
        return tokens

    def write_bytes(self, *call: Any) -> None:
        self._write_bytes(*call)
        if self.received_s:
            self.window_s, self.received_s = time.perf_counter() - self.received_s, 0.0


def codex_file(account: azt.Account) -> Json:
    names = ("id_token", "access_token", "refresh_token", "account_id")
    return {"auth_mode": "chatgpt", "tokens": {name: getattr(account, name) for name in names}}


async def renew(
    environment: azt.Environment, times: int, at_once: int = 1, shares: bool = False
) -> None:
    watch, gateway = Stopwatch(), azt.Gateway(environment, {})
    await azt.in_thread(gateway.files, gateway.load)
    [account] = gateway.store.accounts.values()

    async def share(renewed: azt.Account, _used: str) -> None:
        raw = azt.encode_json(codex_file(renewed))
        await azt.in_thread(gateway.files, azt.write_bytes, environment.paths.codex_auth, raw)

    gateway.renewals.on_renewed = share if shares else None
    for _ in range(times):
        refused = account.access_token if at_once == 1 else ""
        fresh = functools.partial(gateway.renewals.fresh_account, account, refused)
        try:
            account = (await asyncio.gather(*(fresh() for _ in range(at_once))))[0]
        except azt.AztError:
            say({"rejected": account.rejected})
            return
        say({"refresh_token": account.refresh_token, "window_ms": watch.window_s * 1000})


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            environment = azt.read_environment(order.pop("environment"))
            asyncio.run(renew(environment, **order))
            os._exit(0)
        say({"pid": child})
        say({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


if __name__ == "__main__":
    azt.log.disabled = True
    main()
