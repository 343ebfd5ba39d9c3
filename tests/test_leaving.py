"""Who leaves in the middle: the client, or the gateway itself. Nothing else may notice."""

from __future__ import annotations

import json
import math
import random
import signal
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fake_upstream import FakeUpstream, text
from harness import MODEL, Answer, Claim, Client, Gateway, chat_body, eventually
from test_upstream_faults import WAYS, Way, figures

NewClaim = Callable[[int, str], Claim]
Many = Callable[[int, int], int]

# -- The client ------------------------------------------------------------------------------------

PHASES = ("in its head", "in its body", "before the upstream's head", "in mid-stream", "at the end")


class Leaving:
    """One client that leaves in a phase of its request."""

    def __init__(self, gateway: Gateway, upstream: FakeUpstream, way: Way, phase: str) -> None:
        self.upstream, self.way, self.phase = upstream, way, phase
        self.sock = socket.create_connection(
            ("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=20
        )

    def close(self, resets: bool) -> float:
        """When, in monotonic seconds."""
        if resets:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()
        return time.monotonic()

    def request(self) -> bytes:
        body = json.dumps(self.way.body).encode()
        head = f"POST {self.way.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        return f"{head}\r\n\r\n".encode() + body

    def read_until(self, is_enough: Callable[[bytes], bool]) -> None:
        read = b""
        while not is_enough(read):
            data = self.sock.recv(65536)
            assert data, read
            read += data

    def leave(self, resets: bool) -> float | None:
        try:
            return self.run(resets)
        finally:
            self.sock.close()

    def run(self, resets: bool) -> float | None:
        """Milliseconds until the upstream call was cancelled; None where none was to be."""
        upstream, raw, events = self.upstream, self.request(), self.way.events()
        before = len(upstream.turns)
        if self.phase in PHASES[:2]:
            self.sock.sendall(raw[: 30 if self.phase == PHASES[0] else -9])
            self.close(resets)
            return None
        if self.phase == PHASES[2]:
            upstream.script(delay=60.0, path="/responses")
        elif self.phase == PHASES[3]:
            upstream.script(events, stall=True, after=5, path="/responses")
        else:
            upstream.script(events, path="/responses")
        self.sock.sendall(raw)
        seen = upstream.wait_turns(before + 1, 20)[before]
        if self.phase == PHASES[3] and self.way.streaming:
            self.read_until(lambda read: b"data: " in read)
        if self.phase == PHASES[4]:
            upstream.wait_until(lambda: seen.finished_at, 20)
            end = b"\r\n0\r\n\r\n" if self.way.streaming else b"}"
            self.read_until(lambda read: read.endswith(end))
            self.close(resets)
            return None
        left_at = self.close(resets)
        closed_at: float = upstream.wait_until(lambda: seen.closed_at, 20)
        return max(0.0, closed_at - left_at) * 1000


def test_a_client_that_leaves_cancels_its_upstream_call_and_leaves_nothing_behind(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    tries = claim(14, "clients that leave, in 5 phases: upstream cancelled, no retry")
    gateway = new_gateway()
    client, chance, took_ms = Client(gateway.url), random.Random(14), []
    ways = [way for way in WAYS if way.api != "images"]
    client.chat()
    before = figures(client)
    for number in range(many(25, 1000)):
        way, phase = chance.choice(ways), PHASES[number % len(PHASES)]
        turns = len(upstream.turns)
        spent_ms = Leaving(gateway, upstream, way, phase).leave(resets=chance.random() < 0.5)
        took_ms += [] if spent_ms is None else [spent_ms]
        wanted = turns if phase in PHASES[:2] else turns + 1
        tries.check(len(upstream.turns) == wanted, (way, phase, len(upstream.turns) - turns))
    took_ms.sort()
    p99_ms = took_ms[math.ceil(len(took_ms) * 0.99) - 1]
    tries.note(f"upstream cancelled after {p99_ms:.0f} ms at p99, {took_ms[-1]:.0f} ms at most")

    def is_quiet() -> bool:
        now = figures(client)
        names = ("azt_process_open_fds", "azt_process_threads")
        return not now["azt_running_requests"] and all(now[n] <= before[n] + 3 for n in names)

    eventually(is_quiet, many(20, 2))
    tries.check(p99_ms < 250 or not many(0, 1), f"{p99_ms} ms")  # a busy machine is no failure
    tries.check(client.chat().status == 200, "the next request")


# -- The gateway -----------------------------------------------------------------------------------

WORDS = [f"word{number} " for number in range(40)]


def is_whole(got: Answer) -> bool:
    if got.status != 200 or got.cut:
        return False
    if "chat.completion" in got.body[:400].decode():
        said = got.content if got.is_stream else got.message["content"]
        ended = not got.is_stream or got.data[-1] == "[DONE]"
        return ended and said == "".join(WORDS) and got.finish == "stop"
    return got.response["status"] == "completed" and got.output_text == "".join(WORDS)


def test_running_streams_end_whole_though_the_gateway_is_told_to_stop(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    tries = claim(16, "50 streams running at a SIGTERM: whole within 30 s, exit 0")
    for round_ in range(1, many(2, 5)):
        gateway = new_gateway()
        client, count = Client(gateway.url, 60), many(12, 50)
        upstream.reset()
        upstream.script(text(*WORDS), times=count, delays=0.06)

        def ask(number: int, client: Client = client) -> Answer:
            streams = number % 10 != 0
            if number % 2:
                return client.responses("hi", stream=streams)
            return client.post("/v1/chat/completions", chat_body("hi", stream=streams, model=MODEL))

        with ThreadPoolExecutor(count) as threads:
            answers = [threads.submit(ask, number) for number in range(count)]
            upstream.wait_turns(count, 30)
            began = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            for answer in answers:
                got = answer.result()
                tries.check(is_whole(got), (got.status, got.cut, got.body[-300:]))
        tries.check(gateway.process.wait(40) == 0, "the exit code")
        tries.check(time.monotonic() - began < 35, "it took more than 30 s")
        lines = [
            line for line in gateway.log().splitlines() if " POST " in line and " 200 " in line
        ]
        tries.check(len(lines) == count * round_, f"{len(lines)} lines in the log")


def test_what_is_counted_is_on_disk_when_the_gateway_has_stopped(
    new_gateway: Callable[..., Gateway], upstream: FakeUpstream, claim: NewClaim, many: Many
) -> None:
    tries = claim(16, "what ran at a SIGTERM stands in the usage afterwards, once")
    gateway = new_gateway()
    client, count = Client(gateway.url, 60), many(5, 50)
    upstream.script(text(*WORDS), times=count, delays=0.02)
    with ThreadPoolExecutor(count) as threads:
        answers = [threads.submit(client.chat_stream) for _ in range(count)]
        upstream.wait_turns(count, 30)
        gateway.process.send_signal(signal.SIGTERM)
        assert all(answer.result().status == 200 for answer in answers)
    assert gateway.process.wait(40) == 0
    found: Any = json.loads(gateway.azt("usage", "--json").stdout)
    total = json.dumps(found)
    tries.check(f'"requestCount": {count}' in total, total[:500])
