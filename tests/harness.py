"""A real `azt` process in a home of its own, and the HTTP client that the tests talk to it with."""

from __future__ import annotations

import http.client
import json as jsonlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_upstream import FakeUpstream, Json, account_file, codex_models_cache

ROOT = Path(__file__).resolve().parent.parent
MODEL = "gpt-5.5"
READY = "azt is ready: "

_FOREIGN = ("AI_ZERO_TOKEN", "AZT_", "CODEX_", "OPENAI_")
_PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


# -- Claims ---------------------------------------------------------------------------------------


class Claim:
    """One row of the table: how often it was tried, and what went wrong."""

    def __init__(self, row: int, text: str, test: str) -> None:
        self.row, self.text, self.test = row, text, test
        self.tried = 0
        self.wrong: list[str] = []
        self.notes: list[str] = []

    def check(self, holds: object, detail: object = "") -> None:
        """Count one try; a wrong one fails the test at its end, after all were tried."""
        self.tried += 1
        if not holds:
            self.wrong.append(str(detail)[:500])

    def note(self, text: str) -> None:
        """A number or a remark that stands in the table beside the counts."""
        self.notes.append(text)


# -- Homes ----------------------------------------------------------------------------------------


def is_foreign(name: str) -> bool:
    """Is this a variable of the person who runs the tests that azt would read?"""
    own = name.startswith("AZT_TEST_")  # how `python3 tests` talks to the tests
    return not own and (name.upper().startswith(_FOREIGN) or name.upper() in _PROXIES)


def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """Wait for something that no one tells us about: another process, a thread of its own."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.002)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def home_variables(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "AI_ZERO_TOKEN_HOME": str(home / ".ai-zero-token"),
        "CODEX_HOME": str(home / ".codex"),
    }


# -- The gateway ----------------------------------------------------------------------------------


class Gateway:
    """A running `azt start` and its home."""

    def __init__(self, home: Path, variables: Mapping[str, str], arguments: list[str]) -> None:
        self.home = home
        self.log_file = home / "azt.log"
        kept = {name: value for name, value in os.environ.items() if not is_foreign(name)}
        self.environment = {
            **kept,
            **home_variables(home),
            "PYTHONDONTWRITEBYTECODE": "",  # or each of the many processes compiles azt.py again
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        self.arguments = arguments
        self.program = [sys.executable, "-m", "azt"]
        self.url = ""

    @property
    def state(self) -> Path:
        return Path(self.environment["AI_ZERO_TOKEN_HOME"]) / ".state"

    def proof(self) -> dict[str, str]:
        """The headers by which the owner of this home makes changes."""
        token = (self.state / "admin-token").read_text().strip()
        return {"X-AZT-Admin": "1", "Authorization": f"Bearer {token}"}

    def azt(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run one `azt` command in this home; `how` is for `subprocess.run`."""
        how = {"env": self.environment, "cwd": self.home, "timeout": 30.0, **how}
        command = [*self.program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, **how)

    def import_account(self, account: Json) -> None:
        file = self.home / f"{account['account_id']}.json"
        file.write_text(jsonlib.dumps(account))
        done = self.azt("accounts", "import", str(file))
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, **how: Any) -> Gateway:
        """`how` is for `subprocess.Popen`."""
        command = [*self.program, "start", "--no-open", *self.arguments]
        how = {"env": self.environment, "cwd": self.home, "stdout": subprocess.PIPE, **how}
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(command, stderr=log, **how)
        self.url = self._read_ready_line(time.monotonic() + 20)
        return self

    def _read_ready_line(self, until: float) -> str:
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))[0]:
            line = self.process.stdout.readline().decode()
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
            if not line:
                break
        self.stop()
        raise AssertionError(f"azt did not start: {self.log()}")

    def stop(self) -> int:
        """End it: politely, and at once when streams still run."""
        for wait_s in (2.0, 5.0):
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait()

    def log_line(self, request_id: str, timeout: float = 5.0) -> str:
        """The one line that the log gets for a request when its answer has ended."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            lines = [line for line in self.log().splitlines() if f" {request_id} " in line]
            if lines:
                assert len(lines) == 1, lines
                return lines[0]
            time.sleep(0.01)  # another process writes the file: there is nothing to wait on
        raise AssertionError(f"no line for {request_id}: {self.log()}")

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""


def hurried(folder: Path, constants: Mapping[str, float]) -> Path:
    """A copy of azt.py in which these constants have other values."""
    room_1, banner, rest = (ROOT / "azt.py").read_text().partition("\n# 2. Errors and logging")
    assert banner and all(f"{name}" in room_1 for name in constants)
    rule_at = room_1.rindex("\n# ====")
    values = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    folder.mkdir()
    (folder / "azt.py").write_text(f"{room_1[:rule_at]}\n{values}{room_1[rule_at:]}{banner}{rest}")
    return folder


def make_gateway(
    home: Path,
    upstream: FakeUpstream,
    *,
    accounts: list[Json] | None = None,
    variables: Mapping[str, str] | None = None,
    arguments: tuple[str, ...] = ("--host", "127.0.0.1", "--port", "0"),
    constants: Mapping[str, float] | None = None,
) -> Gateway:
    """A started gateway. Its model list is the one that Codex left in its home.

    constants  other numbers than those of azt's first room: waits that a test cannot sit out
    """
    codex = home / ".codex"
    codex.mkdir(parents=True, exist_ok=True)
    (codex / "models_cache.json").write_text(jsonlib.dumps(codex_models_cache()))
    pointed = {**upstream.environment(), **(variables or {})}
    if constants:
        pointed["PYTHONPATH"] = f"{hurried(home / 'hurried', constants)}{os.pathsep}{ROOT}"
    gateway = Gateway(home, pointed, list(arguments))
    for account in [account_file()] if accounts is None else accounts:
        gateway.import_account(account)
    return gateway.start()


# -- The client -----------------------------------------------------------------------------------


@dataclass
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    """Lower-case names."""
    body: bytes
    cut: bool = False
    """The transfer broke off before its announced end."""
    arrived: list[float] = field(default_factory=list)
    """Monotonic seconds at which each piece of the body came."""

    @property
    def json(self) -> Any:
        return jsonlib.loads(self.body)

    @property
    def error(self) -> Json:
        return self.json["error"]

    # Chat Completions

    @property
    def message(self) -> Json:
        return self.json["choices"][0]["message"]

    @property
    def finish(self) -> str | None:
        """The one finish reason, streamed or not; None without one."""
        reasons = [
            choice["finish_reason"]
            for chunk in (self.chunks if self.is_stream else [self.json])
            for choice in chunk.get("choices", [])
            if choice["finish_reason"] is not None
        ]
        assert len(reasons) <= 1, reasons
        return reasons[0] if reasons else None

    @property
    def chunks(self) -> list[Json]:
        """The parsed `data:` lines of a chat stream, without `[DONE]`."""
        return [jsonlib.loads(data) for data in self.data if data != "[DONE]"]

    @property
    def deltas(self) -> list[Json]:
        return [chunk["choices"][0]["delta"] for chunk in self.chunks if chunk.get("choices")]

    @property
    def content(self) -> str:
        """The visible text of a chat stream."""
        return "".join(delta.get("content") or "" for delta in self.deltas)

    @property
    def tool_calls(self) -> list[Json]:
        """The calls of a chat stream, put together the way clients do it."""
        calls: dict[int, Json] = {}
        for delta in self.deltas:
            for part in delta.get("tool_calls", []):
                call = calls.setdefault(part["index"], {"arguments": ""})
                call["id"] = call.get("id", "") + part.get("id", "")
                call["name"] = call.get("name", "") + part["function"].get("name", "")
                call["arguments"] += part["function"].get("arguments", "")
        return [calls[index] for index in range(len(calls))]

    @property
    def usage(self) -> Json | None:
        """The usage of a chat stream, which comes once or not at all."""
        sent = [chunk["usage"] for chunk in self.chunks if chunk.get("usage")]
        assert len(sent) <= 1, sent
        return sent[0] if sent else None

    @property
    def stream_error(self) -> Json | None:
        """The error event inside a chat stream."""
        return next((chunk["error"] for chunk in self.chunks if chunk.get("error")), None)

    # Responses

    @property
    def events(self) -> list[Json]:
        """The events of a Responses stream; their names repeat the types."""
        events = [jsonlib.loads(data) for data in self.data]
        assert self.fields("event") == [event["type"] for event in events]
        return events

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]

    @property
    def response(self) -> Json:
        """The final response object, streamed or not."""
        return self.events[-1]["response"] if self.is_stream else self.json

    @property
    def output_text(self) -> str:
        return "".join(
            part["text"]
            for item in self.response["output"]
            if item["type"] == "message"
            for part in item["content"]
            if part["type"] == "output_text"
        )

    # Server-sent events

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def data(self) -> list[str]:
        return self.fields("data")

    def fields(self, name: str) -> list[str]:
        """The values of one SSE field, in order."""
        lines = self.body.decode().split("\n")
        return [line[len(name) + 2 :] for line in lines if line.startswith(f"{name}: ")]


class Stream:
    """An answer that is still running."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection
        self._response = connection.getresponse()
        self.status = self._response.status
        self.headers = _lower(self._response)

    def read_until(self, mark: bytes) -> bytes:
        """The body up to and with `mark`."""
        body = b""
        while mark not in body:
            piece = self._response.read1(65536)
            assert piece, f"ended before {mark!r}: {body!r}"
            body += piece
        return body

    def read_rest(self) -> Answer:
        answer = Answer(self.status, self.headers, b"")
        try:
            while piece := self._response.read1(65536):
                answer.body += piece
                answer.arrived.append(time.monotonic())
        except (http.client.IncompleteRead, ConnectionError):
            answer.cut = True
        return answer

    def close(self) -> None:
        self._response.close()
        self.connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Client:
    """HTTP calls to one server, each on a connection of its own."""

    def __init__(self, url: str, timeout: float = 20.0) -> None:
        self._host = url.removeprefix("http://")
        self._timeout = timeout

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, timeout=self._timeout)

    def open(
        self,
        method: str,
        path: str,
        json: Any = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Stream:
        """Send a request and read the head of its answer."""
        connection = self.connect()
        if json is not None:
            body = jsonlib.dumps(json).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, body, {**kind, **(headers or {})})
            return Stream(connection)
        except BaseException:
            connection.close()
            raise

    def request(self, method: str, path: str, json: Any = None, **how: Any) -> Answer:
        with self.open(method, path, json, **how) as stream:
            return stream.read_rest()

    def get(self, path: str, **how: Any) -> Answer:
        return self.request("GET", path, **how)

    def post(self, path: str, json: Any = None, **how: Any) -> Answer:
        return self.request("POST", path, json, **how)

    def chat(self, messages: list[Json] | str = "hi", **fields: Any) -> Answer:
        """A chat completion; `stream=True` reads the whole stream."""
        return self.post("/v1/chat/completions", chat_body(messages, **fields))

    def chat_stream(self, messages: list[Json] | str = "hi", **fields: Any) -> Answer:
        return self.chat(messages, stream=True, **fields)

    def responses(self, input: Any = "hi", **fields: Any) -> Answer:
        return self.post("/v1/responses", {"model": MODEL, "input": input, **fields})

    def responses_stream(self, input: Any = "hi", **fields: Any) -> Answer:
        return self.responses(input, stream=True, **fields)


def chat_body(messages: list[Json] | str = "hi", **fields: Any) -> Json:
    asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return {"model": MODEL, "messages": asked, **fields}


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


# -- Pictures -------------------------------------------------------------------------------------


def make_png(width: int, height: int, noise: bytes = b"") -> bytes:
    """A grey picture; `noise` in a chunk of its own makes it as large as wanted."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    extra = chunk(b"noIs", noise) if noise else b""
    return PNG_START + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def decode_png(raw: bytes) -> tuple[int, int]:
    """(width, height) of a picture whose every chunk and row is whole."""
    assert raw.startswith(PNG_START)
    at, rows, size, kind = len(PNG_START), b"", (0, 0), b""
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, data = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert raw[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(kind + data))
        if kind == b"IHDR":
            width, height, depth = struct.unpack(">IIB", data[:9])
            size = width, height
        rows += data if kind == b"IDAT" else b""
        at += 12 + length
    assert kind == b"IEND"
    assert len(zlib.decompress(rows)) >= size[1] * (1 + size[0] * depth // 8)
    return size


PNG_START = b"\x89PNG\r\n\x1a\n"
