"""The bench's upstream and load client where there is no C compiler or no epoll: load.c in asyncio.

The command line, the knob in the message text, the markers and the JSON line are those of load.c.
Both cost far more CPU than their C twins: a table made with them says little about a fast gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

KNOB = re.compile(rb"bench n=(\d+) gap_ms=(\d+) size=(\d+)")
# The closing events of the upstream repeat the whole text: a marker after "text" is no delta.
MARKER = re.compile(rb'(?<!"text":)(?<!"text": )"@(\d+):(\d+);')
CARRY = 96
PADDING = " lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do"
PART = {"item_id": "msg_bench", "output_index": 0, "content_index": 0}
MESSAGE = {"id": "msg_bench", "type": "message", "role": "assistant", "phase": "final_answer"}
RESPONSE = {"id": "resp_bench", "object": "response", "created_at": 1795380000, "model": "gpt-5.4"}


def now_us() -> int:
    return time.monotonic_ns() // 1000


def event(kind: str, sequence: int, **members: Any) -> bytes:
    data = {"type": kind, "sequence_number": sequence, **members}
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def opening() -> bytes:
    part = {"type": "output_text", "text": "", "annotations": []}
    item = {**MESSAGE, "status": "in_progress", "content": []}
    response = {**RESPONSE, "status": "in_progress", "output": []}
    return (
        event("response.created", 0, response=response)
        + event("response.in_progress", 1, response=response)
        + event("response.output_item.added", 2, output_index=0, item=item)
        + event("response.content_part.added", 3, **PART, part=part)
    )


def closing(sequence: int, text: str, deltas: int) -> bytes:
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {**MESSAGE, "status": "completed", "content": [part]}
    usage = {"input_tokens": 20, "output_tokens": deltas, "total_tokens": deltas + 20}
    response = {**RESPONSE, "status": "completed", "output": [], "usage": usage}
    return (
        event("response.output_text.done", sequence, **PART, text=text)
        + event("response.content_part.done", sequence + 1, **PART, part=part)
        + event("response.output_item.done", sequence + 2, output_index=0, item=item)
        + event("response.completed", sequence + 3, response=response)
    )


async def write_answer(writer: asyncio.StreamWriter, count: int, gap_s: float, size: int) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(opening())
    )
    started = time.monotonic()
    text = ""
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number * gap_s - time.monotonic()) if gap_s else 0)
        delta = f"@{number}:{now_us()};"
        delta += PADDING[: max(0, size - len(delta))]
        text += delta
        writer.write(chunk(event("response.output_text.delta", number + 4, **PART, delta=delta)))
        await writer.drain()
    writer.write(chunk(closing(count + 4, text, count)) + b"0\r\n\r\n")
    await writer.drain()


async def read_knob(reader: asyncio.StreamReader, left: int) -> tuple[int, int, int]:
    """Read a body without keeping it -> (deltas, milliseconds between them, characters of each)."""
    found = None
    kept = b""
    while left > 0:
        data = await reader.read(min(left, 1 << 20))
        if not data:
            raise ConnectionResetError
        left -= len(data)
        kept = kept[-CARRY:] + data
        knob = KNOB.search(kept)
        if knob and (left == 0 or knob.end() < len(kept)):  # else its last number may be cut in two
            found = knob
    count, gap_ms, size = (int(number) for number in found.groups()) if found else (1, 0, 24)
    return count, gap_ms, size


async def serve_peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"\r\ncontent-length: *(\d+)", head)
            if head.startswith(b"get "):
                writer.write(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n"
                    + b'{"detail":"Not Found"}'
                )
                continue
            count, gap_ms, size = await read_knob(reader, int(length[1]) if length else 0)
            await write_answer(writer, count, gap_ms / 1000, size)
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


async def serve() -> None:
    server = await asyncio.start_server(serve_peer, "127.0.0.1", 0, limit=1 << 20, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


class Load:
    """The counters of one client run; times in microseconds."""

    def __init__(self, port: int, request: bytes, options: dict[str, int]) -> None:
        self.port, self.request, self.options = port, request, options
        self.begun = self.finished = now_us()
        self.asked = self.complete = self.failed = self.deltas = self.kept = 0
        self.lost = self.reordered = self.gap_max = 0
        self.ttft: list[int] = []
        self.lag: list[int] = []
        self.took: list[int] = []

    def may_ask(self) -> bool:
        wanted, seconds = self.options["requests"], self.options["seconds"]
        if self.failed > 100 or (wanted and self.asked >= wanted):
            return False
        return not seconds or now_us() - self.begun < seconds * 1_000_000

    async def run(self) -> None:
        peers = (self.peer(number) for number in range(self.options["connections"]))
        everything = asyncio.gather(*peers)
        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, everything.cancel)
        with contextlib.suppress(asyncio.CancelledError):  # SIGTERM: report what there is
            try:
                await asyncio.wait_for(everything, self.options["timeout_s"])
            except TimeoutError:
                self.failed += self.asked - self.complete - self.failed

    async def peer(self, number: int) -> None:
        await asyncio.sleep(number * self.options["ramp_ms"] / 1000)
        writer = None
        while self.may_ask():
            self.asked += 1
            started = now_us()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", self.port, limit=1 << 20
                    )
                writer.write(self.request)
                count = await self.read_answer(reader, started)
            except (OSError, ValueError, asyncio.IncompleteReadError):
                writer, count = None, -1
            self.finished = now_us()
            if count >= self.options["expect"]:
                self.complete += 1
                self.took.append(self.finished - started)
            else:
                self.failed += 1

    async def read_answer(self, reader: asyncio.StreamReader, started: int) -> int:
        """Read one response -> its deltas, -1 when its status is not 200."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head)
        seen = Answer(self, started)
        if length:
            seen.scan(await reader.readexactly(int(length[1])))
        else:
            while size := int(await reader.readline(), 16):
                seen.scan((await reader.readexactly(size + 2))[:-2])
            await reader.readline()
        self.lost += max(0, seen.next_sequence - seen.count)
        return seen.count if head.startswith(b"http/1.1 200") else -1

    def report(self) -> dict[str, float]:
        numbers: dict[str, float] = {
            "requests": self.complete,
            "seconds": (self.finished - self.begun) / 1e6,
            "gap_max_ms": self.gap_max / 1000,
        }
        for name in ("failed", "deltas", "kept", "lost", "reordered"):
            numbers[name] = getattr(self, name)
        for name in ("ttft", "lag", "took"):
            samples = sorted(getattr(self, name)) or [0]
            numbers[f"{name}_p50_ms"] = samples[len(samples) // 2] / 1000
            numbers[f"{name}_p99_ms"] = samples[len(samples) * 99 // 100] / 1000
        return numbers


class Answer:
    """The deltas of one response."""

    def __init__(self, load: Load, started: int) -> None:
        self.load, self.started = load, started
        self.count = self.next_sequence = self.last = 0
        self.kept = b""

    def scan(self, data: bytes) -> None:
        data = self.kept + data
        now = now_us()
        end = 0
        for found in MARKER.finditer(data):
            self.add(int(found[1]), int(found[2]), now)
            end = found.end()
        self.kept = data[max(end, len(data) - CARRY) :]

    def add(self, sequence: int, sent_at: int, now: int) -> None:
        load = self.load
        if self.count == 0:
            load.ttft.append(now - self.started)
        else:
            load.gap_max = max(load.gap_max, now - self.last)
        self.last = now
        self.count += 1
        if sequence < self.next_sequence:
            load.reordered += 1
        self.next_sequence = max(self.next_sequence, sequence + 1)
        load.deltas += 1
        window = load.options["window_ms"]
        load.kept += not window or now - load.begun <= window * 1000
        load.lag.append(now - sent_at)


def main() -> None:
    if sys.argv[1:] == ["upstream"]:
        asyncio.run(serve())
        return
    options = dict.fromkeys(("requests", "seconds", "expect", "ramp_ms", "window_ms"), 0)
    options |= {"connections": 1, "timeout_s": 120}
    options |= {name: int(value) for name, value in (word.split("=") for word in sys.argv[4:])}
    load = Load(int(sys.argv[2]), Path(sys.argv[3]).read_bytes(), options)
    asyncio.run(load.run())
    sys.stdout.write(json.dumps(load.report()) + "\n")


if __name__ == "__main__":
    main()
