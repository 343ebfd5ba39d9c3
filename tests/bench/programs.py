"""Start, measure and end the programs of the bench: the upstream and every gateway."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

psutil: Any = None
if sys.platform != "linux":  # there /proc tells
    with contextlib.suppress(ImportError):
        psutil = importlib.import_module("psutil")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHAT = "/v1/chat/completions"
TURN, COMPACT = "/codex/v1/responses", "/codex/v1/responses/compact"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
MIB = 1 << 20

NGINX = """
worker_processes 1; error_log stderr crit; pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_max_body_size 1g; keepalive_requests 1000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream bench {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://bench; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""


def load_command(folder: Path) -> list[str]:
    """How to run the upstream and the client: load.c where it can be compiled, else load.py."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler and sys.platform == "linux":
        program = folder / "load"
        done = subprocess.run([compiler, "-O2", "-o", program, HERE / "load.c"], check=False)
        if done.returncode == 0:
            return [str(program)]
    return [sys.executable, str(HERE / "load.py")]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without proxies and without settings that would reach the gateways."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and not name.startswith(("AZT_", "AI_ZERO_TOKEN"))
    }
    # An installed program is compiled once, not at each start.
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, **more}


@dataclass
class Program:
    """A running program that listens on a port of loopback; `own` is False for the upstream itself,
    whose processor time and memory say nothing about a gateway."""

    name: str
    process: subprocess.Popen[str]
    port: int
    idle_mib: float | None = None
    own: bool = True

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def cpu_s(self) -> float | None:
        """Processor seconds so far, in user and kernel mode."""
        if not self.own:
            return None
        if sys.platform == "linux":
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        if psutil is None:
            return None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def memory_mib(self) -> float | None:
        """Resident memory now."""
        if not self.own:
            return None
        if sys.platform == "linux":
            return self._status_mib("VmRSS")
        return psutil.Process(self.process.pid).memory_info().rss / MIB if psutil else None

    def peak_mib(self) -> float | None:
        """The highest resident memory since `forget_peak`."""
        return self._status_mib("VmHWM") if self.own and sys.platform == "linux" else None

    def _status_mib(self, name: str) -> float | None:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else None

    def forget_peak(self) -> None:
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def start(name: str, command: Sequence[str], environment: dict[str, str], port: int = 0) -> Program:
    """Start a program and wait until it listens: on `port`, or on the one that it prints."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    program = Program(name, process, port)
    assert process.stdout is not None
    while not program.port:
        line = process.stdout.readline()
        found = re.search(r"(\d+)/?$", line.strip())
        if found:
            program.port = int(found[1])
        elif not line:
            raise SystemExit(f"{name} ended before it was ready (exit code {process.wait()})")
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", program.port), 5).close()
            return program
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{name} does not listen on port {program.port}") from None
            time.sleep(0.005)


def ask_once(program: Program) -> None:
    """One short chat request and its whole answer; it must be a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=60)
    connection.request(
        "POST", CHAT, chat_body("bench n=4 gap_ms=0 size=24"), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{program.name} answers {answer.status}: {text[:500]!r}")


def chat_body(text: str, stream: bool = False, padded_to: int = 0) -> bytes:
    """A chat request of one message, with an image that brings it to `padded_to` bytes."""
    content: object = text
    if padded_to:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        content = [image, {"type": "text", "text": text}]
    body = {
        "model": "gpt-5.4",
        "stream": stream,
        "messages": [{"role": "user", "content": content}],
    }
    encoded = json.dumps(body).encode()
    filling = (padded_to - len(encoded)) // 4 * 4
    return (
        encoded.replace(b"iVBORw0KGgo=", b"iVBORw0KGgoA" + b"A" * filling) if padded_to else encoded
    )


def codex_body(text: str, padded_to: int = 0) -> bytes:
    """A request as Codex sends it; azt looks at no byte of it."""
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    filling = {"type": "reasoning", "summary": [], "encrypted_content": "A" * padded_to}
    body = {"model": "gpt-5.4", "stream": True, "store": False, "input": [filling, item]}
    return json.dumps(body).encode()


def write_request(path: Path, port: int, body: bytes, target: str) -> None:
    head = (
        f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    path.write_bytes(head.encode() + body)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_account(path: Path) -> None:
    """A Codex sign-in that nobody issued and that expires in the far future."""
    auth = {
        "chatgpt_account_id": "acct-bench",
        "chatgpt_plan_type": "plus",
        "chatgpt_user_id": "user-bench",
    }
    claims = {
        "sub": "user-bench",
        "email": "bench@example.com",
        "exp": 4102444800,
        "https://api.openai.com/auth": auth,
    }
    parts = ({"alg": "none", "typ": "JWT"}, claims)
    words = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts
    ]
    token = ".".join([*words, "c2ln"])
    account = {
        "access_token": token,
        "id_token": token,
        "refresh_token": "bench",
        "account_id": "acct-bench",
    }
    path.write_text(json.dumps(account))


@dataclass
class Launch:
    """A gateway that is ready to be started; `port` is 0 where it picks and prints its own."""

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int = 0

    def start(self) -> Program:
        return start(self.name, self.command, self.environment, self.port)


def installed_gateways() -> list[str]:
    """azt, and the yardsticks that this machine happens to have."""
    nginx = ["nginx"] if shutil.which("nginx") else []
    return ["azt", *nginx, *(["aiohttp"] if importlib.util.find_spec("aiohttp") else [])]


def prepare(name: str, folder: Path, upstream: Program) -> Launch:
    """Everything that comes before the start, in a folder of its own."""
    folder.mkdir()
    return {"azt": _prepare_azt, "nginx": _prepare_nginx, "aiohttp": _prepare_aiohttp}[name](
        folder, upstream
    )


def _prepare_azt(folder: Path, upstream: Program) -> Launch:
    url = f"http://127.0.0.1:{upstream.port}"
    environment = clean_environment(
        AI_ZERO_TOKEN_HOME=str(folder),
        CODEX_HOME=str(folder / "codex"),
        AZT_CODEX_BASE_URL=f"{url}/backend-api/codex",
        AZT_CHATGPT_BASE_URL=f"{url}/backend-api",
        AZT_AUTH_BASE_URL=url,
        AZT_LOG_LEVEL="warning",
        PYTHONPYCACHEPREFIX=str(folder.parent / "bytecode"),
    )
    write_account(folder / "account.json")
    azt = [sys.executable, "-m", "azt"]
    subprocess.run(
        [*azt, "accounts", "import", str(folder / "account.json")],
        env=environment,
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return Launch(
        "azt", [*azt, "start", "--no-open", "--host", "127.0.0.1", "--port", "0"], environment
    )


def _prepare_nginx(folder: Path, upstream: Program) -> Launch:
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, upstream=upstream.port, port=port))
    options = ["-e", "stderr", "-p", str(folder), "-c", str(config)]
    command = ["nginx", *options, "-g", "daemon off; master_process off;"]
    return Launch("nginx", command, clean_environment(), port)


def _prepare_aiohttp(folder: Path, upstream: Program) -> Launch:
    url = f"http://127.0.0.1:{upstream.port}/responses"
    return Launch(
        "aiohttp", [sys.executable, str(HERE / "relay_aiohttp.py"), url], clean_environment()
    )
