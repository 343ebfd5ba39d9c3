"""A long run under load: `python3 tests --soak [MINUTES]`, 15 by default.

100,000 requests (as many a second in a shorter run), streaming or not, one in twenty with a
fault of the upstream or a client that leaves. Open files, threads and memory of the gateway are
read all along; the run fails when one grows, or an answer is not what belongs to its request.
"""

from __future__ import annotations

import http.client
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fake_upstream import FakeUpstream, Json, Reply, Seen, error_json, failed, limit_reached, text
from harness import MODEL, Answer, Client, make_gateway

REQUESTS, MINUTES, CLIENTS = 100_000, 15.0, 12
WORDS = ("alpha ", "beta ", "gamma ", "delta")
WARM_UP = 0.3  # of the samples: caches, logs and pools fill up to their limits
GROWTH = {"open_fds": 3, "threads": 3, "resident_memory_bytes": 4_000_000}

FAULTS: dict[str, Callable[[], Reply]] = {
    "cut": lambda: Reply(text(*WORDS), cut=True, after=5),
    "cut early": lambda: Reply(text(*WORDS), cut=True, after=1),
    "failed": lambda: Reply(failed("server_is_overloaded", "Busy.")),
    "garbage": lambda: Reply(raw=b"SSH-2.0-x\r\n\r\n", end="close"),
    "limit": lambda: Reply(status=429, json=limit_reached(60)),
    "no end": lambda: Reply(text(*WORDS)[:-1]),
    "page": lambda: Reply(status=502, body=b"<html>", headers={"content-type": "text/html"}),
    "reset": lambda: Reply(raw=b"", end="reset"),
    "server error": lambda: Reply(status=500, json=error_json("x")),
    "slow": lambda: Reply(text(*WORDS), delays=0.05),
}
LEAVES = "the client leaves"


def reply_to(seen: Seen) -> Reply:
    _, _, fault = seen.user_text.partition("fault: ")
    return FAULTS[fault]() if fault in FAULTS else Reply(text(*WORDS))


class Load:
    """The clients: each asks at its moments, on a connection that it keeps."""

    def __init__(self, url: str, seconds: float, requests: int) -> None:
        self.url, self.seconds, self.requests = url, seconds, requests
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.threads = [threading.Thread(target=self._work, args=(n,)) for n in range(CLIENTS)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def _work(self, number: int) -> None:
        chance, client = random.Random(number), Client(self.url, 60)
        for turn in range(number, self.requests, CLIENTS):
            wait_s = self._began + turn / self.requests * self.seconds - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            fault = chance.choice([LEAVES, *FAULTS]) if chance.random() < 0.05 else ""
            streams, api = chance.random() < 0.7, chance.choice(("chat/completions", "responses"))
            asked = f"fault: {fault}" if fault else "hi"
            given = [{"role": "user", "content": asked}] if api.startswith("chat") else asked
            body: Json = {"model": MODEL, "stream": streams}
            body["messages" if api.startswith("chat") else "input"] = given
            try:
                if fault == LEAVES:
                    with client.open("POST", f"/v1/{api}", {**body, "stream": True}):
                        problem = ""
                else:
                    problem = judge(client.post(f"/v1/{api}", body), fault)
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)
            with self._lock:
                self.counts[fault or "none"] += 1
                if problem:
                    self.wrong.append(f"{fault or 'no fault'}: {problem}")


def judge(got: Answer, fault: str) -> str:
    """What is wrong with the answer, "" for nothing."""
    is_whole = got.status == 200 and b"alpha " in got.body and b"error" not in got.body.lower()
    is_error = b'"error"' in got.body or b"response.failed" in got.body
    if fault in ("", "slow"):
        is_fine = got.status == 200 and b"delta" in got.body and not got.cut
        return "" if is_fine else f"{got.status} {got.body[-200:]!r}"
    return "" if is_error and not got.cut and not is_whole else f"{got.status} {got.body[-200:]!r}"


def figures(client: Client) -> dict[str, float]:
    lines = client.get("/metrics").body.decode().splitlines()
    pairs = (line.removeprefix("azt_process_").split(" ") for line in lines)
    return {pair[0]: float(pair[1]) for pair in pairs if pair[0] in GROWTH}


def per_hour(samples: list[dict[str, float]], name: str, step_s: float) -> float:
    """The slope of a straight line through the samples."""
    values = [one[name] for one in samples]
    times = [number * step_s for number in range(len(values))]
    return statistics.linear_regression(times, values).slope * 3600


def main(minutes: float = MINUTES) -> int:
    seconds, count = minutes * 60, int(REQUESTS * minutes / MINUTES)
    step_s = max(1.0, seconds / 120)
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="azt-soak-") as folder, FakeUpstream() as upstream:
        upstream.default = reply_to
        gateway = make_gateway(Path(folder), upstream)
        load, client = Load(gateway.url, seconds, count), Client(gateway.url)
        load.start()
        while any(thread.is_alive() for thread in load.threads):
            time.sleep(step_s)
            samples.append(figures(client))
            upstream.requests.clear()  # the upstream's own memory is not measured, but limited
            upstream.turn_states.clear()
        code = gateway.stop()
    steady = samples[int(len(samples) * WARM_UP) :]
    half = len(steady) // 2
    failures = [f"exit code {code}"] if code else []
    done = sum(load.counts.values())
    print(f"{done:,} requests in {minutes:g} minutes, {done - load.counts['none']:,} with a fault")
    for name, most in GROWTH.items():
        before = statistics.median(one[name] for one in steady[:half])
        after = statistics.median(one[name] for one in steady[half:])
        slope = per_hour(steady, name, step_s)
        print(f"{name:<22} {before:>14,.0f} -> {after:>14,.0f}   {slope:>14,.1f} an hour")
        if after - before > most:
            failures.append(f"{name} grew by {after - before:,.0f}")
    failures += load.wrong[:5] + ([f"{len(load.wrong)} wrong answers"] if load.wrong else [])
    print("\n".join(failures) or "flat, and no answer wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
