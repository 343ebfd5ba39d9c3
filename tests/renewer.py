"""A gateway's renewals without the gateway around them: renews one sign-in again and again until
it is killed. Children of one process, so that a thousand kills are quick.

python renewer.py      reads one JSON line per run: {"environment", "times"}, answers {"pid"}, then
                       one line for each renewal that came back and may be used by now:
                       {"refresh_token", "window_ms"}: the time from the answer to its being on disk
                       or {"rejected"} when only a new sign-in helps; {"answer"} says what the
                       provider has just given, on disk or not; {"status"} ends the run
"""

from __future__ import annotations

import asyncio
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
    """Time from the return of `refresh_tokens` to the return of the first `write_bytes` after it."""

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


async def renew(environment: azt.Environment, times: int) -> None:
    watch, gateway = Stopwatch(), azt.Gateway(environment, {})
    await azt.in_thread(gateway.files, gateway.load)
    [account] = gateway.store.accounts.values()
    for _ in range(times):
        try:
            account = await gateway.renewals.fresh_account(account, account.access_token)
        except azt.AztError:
            say({"rejected": account.rejected})
            return
        say({"refresh_token": account.refresh_token, "window_ms": watch.window_s * 1000})


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            asyncio.run(renew(azt.read_environment(order["environment"]), order["times"]))
            os._exit(0)
        say({"pid": child})
        say({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


if __name__ == "__main__":
    azt.log.disabled = True
    main()
