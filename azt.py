#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["certifi", "h11", "truststore"]
# ///
"""azt (AI Zero Token): your own ChatGPT/Codex sign-in as an OpenAI-compatible API on your machine.

What it does: `azt start` listens on one port and answers `/v1/models`, `/v1/chat/completions` and
`/v1/responses` by calling the Codex backend with the account that you imported, translating requests
and streaming every delta on as soon as it has arrived.

What it does not do: no telemetry, no update check, no prompt or answer on disk, no call to any host
that is not in the table `OUTBOUND` (room 1) unless you set it, no browser impersonation.

The file reads from top to bottom in rooms. A room uses only names from rooms above it.

     1  Constants            limits with units, every outbound host
     2  Errors and logging   one error tree, one log, redaction
     3  Threads              the only bridge between loop and worker threads
     4  State files          the only code that writes to disk
     5  Settings             defaults < file < environment < flags
     6  Outbound HTTP        TLS trust, proxy, connection pool; the only sockets out
     7  Event streams        JSON and SSE bytes <-> dicts, pure
     8  Accounts             who is signed in, import
     9  OAuth                refresh of the tokens
    10  Upstream             speak to the Codex backend for one given account
    11  Translators          dict to dict, pure: 11a chat, 11b responses
    12  Rotation             choose an account, try it, move to the next
    13  Usage and request log  one line per request
    14  Gateway              the one owner of mutable state
    15  HTTP server          h11 and asyncio; the route table is passed in
    16  Routes               16a OpenAI, 16c admin, 16d pages, then the table
    17  Demo upstream        a fake Codex backend on loopback
    18  Command line         argparse, exit codes, the only print
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import importlib.resources
import io
import ipaddress
import json
import logging
import math
import os
import platform
import queue
import re
import resource
import secrets
import select
import signal
import socket
import ssl
import stat
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import webbrowser
import zipfile
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

try:
    import h11
except ModuleNotFoundError:
    sys.exit("azt needs three packages: python3 -m pip install h11 certifi truststore")

P = ParamSpec("P")
T = TypeVar("T")

# ==================================================================================================
# 1. Constants
#    Limits with their units and every host that azt may call. Holds no state.
# ==================================================================================================

VERSION = "0.1.0"

Json = dict[str, Any]
"""A JSON object from outside: checked once where it enters, trusted inside."""

OUTBOUND = {
    "auth.openai.com": "refresh of the tokens",
    "chatgpt.com": "model calls and the model list",
}
"""Every host that azt calls, and what for. `open_response` refuses any other, unless the user named it
himself: a proxy, or a base URL from the environment (mirrors, company relays, the demo)."""

CODEX_BASE_URL = "https://chatgpt.com/backend-api/codex"
CHATGPT_BASE_URL = "https://chatgpt.com/backend-api"
AUTH_BASE_URL = "https://auth.openai.com"
OAUTH_CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"

# The backend hides models from clients older than their `minimal_client_version`, so the catalogue is
# asked for as a recent Codex would ask. Only the list depends on it, no model call carries it.
CATALOGUE_CLIENT_VERSION = "0.169.0"

KIB = 1024
MIB = 1024 * KIB

MAX_HEAD_BYTES = 32 * KIB
MAX_HEAD_FIELDS = 100
MAX_BODY_BYTES = 128 * MIB
MAX_BODIES_BYTES = 512 * MIB
MAX_TRAILER_BYTES = 8 * KIB
MAX_CHUNK_EXTENSION_BYTES = 256
MAX_CODING_LAYERS = 2
ZSTD_WINDOW_LOG = 23
MAX_JSON_DEPTH = 64
MAX_EVENT_BYTES = 48 * MIB
MAX_HELD_BYTES = 1 * MIB
MAX_REPLY_BYTES = 64 * MIB
MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_PEER = 128
MAX_CONNECTIONS_LOOPBACK = 2048
MAX_LAN_STREAMS = 64
MAX_CALL_THREADS = 1024

WRITE_BUFFER_BYTES = 256 * KIB
READ_BYTES = 64 * KIB
PIPELINE_BYTES = 64 * KIB
LISTEN_BACKLOG = 1024

# A refused client may still be sending. Reading on for a while lets it see the answer instead of a reset:
# briefly where the framing was broken, long enough for a large upload where only the request was refused.
LINGER_BYTES = 64 * KIB
LINGER_S = 1.0
LINGER_REFUSED_BYTES = 256 * MIB
LINGER_REFUSED_S = 5.0

HEAD_TIMEOUT_S = 20.0
BODY_STALL_S = 30.0
BODY_MIN_BYTES_PER_S = 1024
KEEP_ALIVE_S = 75.0
WRITE_STALL_S = 60.0
TICK_S = 0.5
ACCEPT_PAUSE_S = 0.1
HALF_CLOSE_CHECKS_S = (0.02, 0.06, 0.15)
DRAIN_S = 30.0

CONNECT_TIMEOUT_S = 10.0
RESOLVE_TIMEOUT_S = 5.0
UPSTREAM_HEAD_TIMEOUT_S = 180.0
UPSTREAM_IDLE_TIMEOUT_S = 300.0
POOL_IDLE_S = 90.0
HOLD_BACK_S = 15.0
HEARTBEAT_S = 15.0
REFRESH_AHEAD_S = 300.0
ATTEMPTS_MAX = 3
ATTEMPTS_WINDOW_S = 20.0

STORED_RESPONSES_MAX = 1000
STORED_RESPONSES_BYTES = 64 * MIB
STORED_RESPONSES_TTL_S = 24 * 3600.0

OWN_HEADERS = {
    "originator": "azt",
    "user-agent": f"azt/{VERSION} (Python {platform.python_version()}; {platform.system()} {platform.machine()})",
}
"""How azt names itself to the upstream: honestly (design.md 4)."""
# ==================================================================================================
# 2. Errors and logging
#    One error tree, one log, one redaction. Never prints, never knows a route.
# ==================================================================================================

log = logging.getLogger("azt")


class AztError(Exception):
    """An error that has an answer: an HTTP status, a code for programs and a sentence for people.

    status   HTTP status of the answer
    code     stable word for programs, or None where OpenAI has none
    type     OpenAI's error class; None derives it from the status
    param    the offending request field as a path (`messages[2].content[0].type`)
    headers  extra response headers (`retry-after`, `x-should-retry`, `allow`)
    extra    extra keys inside the error object (`resets_at`, `plan_type`)
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        extra: Json | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or _ERROR_TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.param = param
        self.headers = headers or {}
        self.extra = extra or {}


_ERROR_TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
}


class BadRequest(AztError):
    """The client sent something that cannot be served as it is; `param` names the field."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = "invalid_value",
        *,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message, param=param, headers=headers)


class UpstreamError(AztError):
    """The backend, or the way to it, failed.

    `fault` is what rotation decides by:
      "account"    this account cannot serve now (usage limit, plan, sign-in); another one may
      "token"      the access token was refused: refresh once, then try again
      "transient"  overload or a server error: another account may work
      "network"    no connection, or reset before the response head
      "request"    the request itself was refused: no other account helps
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        fault: Fault = "request",
        type: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        extra: Json | None = None,
    ) -> None:
        super().__init__(
            status, code, message, type=type, param=param, headers=headers, extra=extra
        )
        self.fault: Fault = fault


Fault = Literal["account", "token", "transient", "network", "request"]


class StateError(AztError):
    """State on disk cannot be used as it is; never treated as empty."""

    def __init__(self, message: str) -> None:
        super().__init__(500, "state_unusable", message)


def error_body(error: AztError) -> Json:
    """The OpenAI error envelope: all four keys always present."""
    inner: Json = {
        "message": mask(error.message),
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    inner.update(error.extra)
    return {"error": inner}


# What must never leave in a message or a log line. Order matters: the first rule eats the value.
_SECRETS = [
    (re.compile(r"(?i)(cookie[\"']?\s*[=:]\s*).+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+"), r"\1 ***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w.-]*"), "***jwt***"),
    (re.compile(r"\b(sk-|rt_|azt_)[\w.-]{6,}"), r"\1***"),
    (
        # The backslashes: JSON inside a JSON string.
        re.compile(
            r"(?i)((?:access_?token|refresh_?token|id_?token|code_?verifier|client_?secret|password"
            r"|api[_-]?key|authorization)\\*[\"']?\s*[=:]\s*\\*[\"']?(?:basic\s+)?)[^\s\"'&,;}\\]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b((?:code|state|token|key)=)[^\s&#\"']+"), r"\1***"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/\"']+@"), r"\1***@"),
]
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def mask(text: str) -> str:
    """Text that may leave: secrets starred out, control characters escaped. Newlines become spaces."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    text = text.replace("\n", " ").replace("\t", " ")
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _MaskingFormatter(logging.Formatter):
    """Scrubs every line. Those of a traceback are indented, so that none can pass for a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return mask(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {mask(line)}" for line in super().formatException(ei).splitlines())


def start_logging(level: str) -> None:
    """Send the log to stderr. A closed stderr must never take the server down."""
    handler = logging.StreamHandler()
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
    logging.raiseExceptions = False
# ==================================================================================================
# 3. Threads
#    The only bridge between the event loop and worker threads. Knows nothing of HTTP or accounts.
#
#    Who waits for whom: a coroutine awaits a future that a worker fulfils through
#    `call_soon_threadsafe`. A worker never waits for the loop, so the two cannot lock each other.
# ==================================================================================================


def blocking(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that waits for a socket, a file or a clock: it refuses to run on the loop."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        # `_get_running_loop` is the documented cheap form: None instead of an exception off the loop.
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(f"{function.__name__} blocks and must not run on the event loop")
        return function(*args, **kwargs)

    return guarded


class WorkerPool:
    """Threads that are reused last in, first out, so that a quiet gateway keeps a few warm ones.

    An executor of the standard library hands work out first in, first out and starts at most a handful of
    threads by default; one stalled upstream would then starve every other call. Threads are daemons: a
    call that hangs in the kernel must not keep the process alive after a drain.
    """

    def __init__(
        self, name: str, threads_max: int, waiting_max: int = 1 << 20, idle_s: float = 30.0
    ) -> None:
        self._name = name
        self._threads_max = threads_max
        self._waiting_max = waiting_max
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], None]]] = []
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()
        self.threads = 0

    def submit(self, job: Callable[[], None]) -> bool:
        """Run `job` on a worker, in order of arrival; False when no thread is free and none may wait."""
        with self._lock:
            if self._idle:
                inbox = self._idle.pop()
            elif self.threads < self._threads_max:
                inbox = queue.SimpleQueue()
                worker = threading.Thread(
                    target=self._work, args=(inbox,), name=f"azt-{self._name}", daemon=True
                )
                try:
                    worker.start()
                except RuntimeError:  # the system gives no more threads
                    return False
                self.threads += 1
            elif len(self._waiting) < self._waiting_max:
                self._waiting.append(job)
                return True
            else:
                return False
        inbox.put(job)
        return True

    def _work(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            try:
                job: Callable[[], None] | None = inbox.get(timeout=self._idle_s)
            except queue.Empty:
                with self._lock:
                    # `submit` may have taken this inbox between the timeout and the lock.
                    if inbox not in self._idle:
                        continue
                    self._idle.remove(inbox)
                    self.threads -= 1
                return
            while job is not None:  # None: an idle thread must not keep the last request body alive
                job()
                with self._lock:
                    job = self._waiting.popleft() if self._waiting else None
                    if job is None:
                        self._idle.append(inbox)


async def in_thread(pool: WorkerPool, function: Callable[..., T], *args: Any) -> T:
    """Run a `@blocking` function on a worker and await its value or its exception.

    Cancelling the await does not stop the worker: whoever may cancel passes a `Wire` (room 6) along and
    shuts its socket, which makes the worker's read raise. A late result is closed, where it can be.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def fulfil(value: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            getattr(value, "close", lambda: None)()  # it may hold a connection
            return
        if isinstance(error, StopIteration):  # a future does not take it: the await would hang
            error = RuntimeError("the call raised StopIteration")
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, value))

    def job() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = function(*args)
        except BaseException as caught:  # noqa: BLE001 - handed to the awaiting coroutine
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(fulfil, value, error)

    if not pool.submit(job):
        raise AztError(
            503,
            "overloaded",
            "Too many calls are waiting for the upstream. Try again in a few seconds.",
            headers={"retry-after": "5"},
        )
    return await future
# ==================================================================================================
# 4. State files
#    The only code that writes to disk: whole files, atomic, mode 0600. Knows no file's meaning.
# ==================================================================================================


class Paths:
    """Every file azt reads or writes, as a field."""

    def __init__(self, home: Path, codex_home: Path) -> None:
        self.home = home
        self.state = home / ".state"
        self.accounts = self.state / "accounts.json"
        self.admin_token = self.state / "admin-token"
        self.keys = self.state / "keys.json"
        self.lock = self.state / "lock"
        self.models = self.state / "models.json"
        self.settings = self.state / "settings.json"
        self.codex_models = codex_home / "models_cache.json"


@blocking
def prepare_home(paths: Paths) -> None:
    """Make the folders 0700; mend a looser mode with a message.

    raises  StateError when the home cannot be used, saying why
    """
    try:
        for folder in (paths.home, paths.state):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = paths.state.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise StateError(f"{paths.state} is a symbolic link. Put a folder in its place.")
        if status.st_uid != os.getuid():
            raise StateError(
                f"{paths.state} belongs to another user. Set AI_ZERO_TOKEN_HOME to a folder of your own."
            )
        if status.st_mode & 0o077:
            paths.state.chmod(0o700)
            log.warning("%s was open to other users; its mode is 0700 now", paths.state)
        for leftover in paths.state.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(
            f"The folder {paths.state} cannot be used ({error.strerror}). Set AI_ZERO_TOKEN_HOME to a writable folder."
        ) from None


@blocking
def read_json(path: Path, version: int) -> Json | None:
    """The object in a state file; None when there is no such file.

    An unreadable file never reads as an empty one: it is kept as `.corrupt-<time>` and the last good copy
    (`.bak`, written after every save) takes its place.
    raises  StateError when neither can be used, or the file is from a newer azt
    """
    value = _read_object(path)
    damage = value if isinstance(value, str) else ""
    if damage:
        value = _read_object(_backup(path))
        if not isinstance(value, dict):
            raise StateError(f"{path} is damaged ({damage}) and so is its copy. Move it away, then import again.")
    if isinstance(value, dict) and value["version"] > version:
        raise StateError(f"{path} was written by a newer azt. Update azt, or set AI_ZERO_TOKEN_HOME to another folder.")
    if damage:
        # A copy, not a rename: dying in between must not leave a missing file, which reads as a new home.
        kept = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}")
        write_bytes(kept, _read_own_file(path))
        write_json(path, cast(Json, value))
        log.error("%s was damaged (%s): kept as %s, using the last good copy", path, damage, kept.name)
    return cast(Json | None, value)


def _backup(path: Path) -> Path:
    return path.with_name(path.name + ".bak")


def _read_object(path: Path) -> Json | str | None:
    """The object; None where there is no file; the reason as text where it cannot be read."""
    try:
        raw = _read_own_file(path)
    except FileNotFoundError:
        return None
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "no valid JSON"
    is_ours = isinstance(value, dict) and isinstance(value.get("version"), int)
    return value if is_ours else "not the expected object"


def _open_own(path: str, flags: int) -> int:
    # O_NONBLOCK: a pipe in place of a state file would hold the start for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _read_own_file(path: Path) -> bytes:
    """Bytes of a regular file of this user, mended to 0600. Raises FileNotFoundError and StateError."""
    try:
        with open(path, "rb", opener=_open_own) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "not a regular file")
            if status.st_uid != os.getuid():
                raise OSError(0, "it belongs to another user")
            if status.st_mode & 0o077:
                os.fchmod(file.fileno(), 0o600)
                log.warning("%s was open to other users; its mode is 0600 now", path)
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}). Mend its owner and mode (0600).") from None


@blocking
def read_foreign(path: Path, bytes_max: int) -> bytes:
    """A file of the user or of another program, bounded. Raises OSError."""
    with open(path, "rb") as file:
        raw = file.read(bytes_max + 1)
    if len(raw) > bytes_max:
        raise OSError(0, f"larger than {bytes_max // MIB} MiB")
    return raw


@blocking
def write_json(path: Path, value: Json) -> None:
    """Replace a state file so that a crash leaves the old or the new content whole, then its copy."""
    raw = json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"
    write_bytes(path, raw)
    try:
        write_bytes(_backup(path), raw)
    except AztError as error:  # saved all the same: only the copy for the day of damage is an older one
        log.error("%s", error.message)


@blocking
def write_bytes(path: Path, raw: bytes) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder; mode 0600 from the start.

    raises  AztError 507 (disk full) or 500; the old content is then still there
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise AztError(
            507 if full else 500,
            "state_not_saved",
            f"{path} could not be written ({error.strerror}); the old content is kept. Free some space or mend its mode.",
        ) from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@blocking
def read_or_make_secret(path: Path) -> str:
    """A 256-bit secret in a 0600 file, made at its first use."""
    try:
        secret = _read_own_file(path).decode("ascii", "replace").strip()
    except FileNotFoundError:
        secret = ""
    if len(secret) < 32:
        secret = "azt_admin_" + secrets.token_urlsafe(32)
        write_bytes(path, secret.encode() + b"\n")
    return secret


class HomeLock:
    """The file `lock`, held by the one process that may write this home. It dies with the process.

    The content names the holder: {"pid": int, "url": str | null}; the server fills in its address.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    @blocking
    def acquire(self) -> Json | None:
        """None when the lock is ours now, else what its holder wrote."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(
                f"{self._path} cannot be opened ({error.strerror}). Set AI_ZERO_TOKEN_HOME to a writable folder."
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(handle)
            os.close(handle)
            return holder
        self._handle = handle
        self.write(None)
        return None

    @blocking
    def write(self, url: str | None) -> None:
        """Tell other processes who holds the lock and where the server listens."""
        assert self._handle is not None
        raw = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.pwrite(self._handle, raw, 0)
        os.ftruncate(self._handle, len(raw))

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _holder(handle: int) -> Json:
    try:
        value = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"pid": 0, "url": None}


@dataclass(frozen=True, slots=True)
class Page:
    """One static file of the console, in memory: no request ever touches the file system."""

    body: bytes
    content_type: str
    etag: str


_PAGE_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

_NO_PAGES = b"""<!doctype html><meta charset="utf-8"><title>azt</title>
<p>azt is running and its API answers under <code>/v1</code>. The console's pages are not beside
<code>azt.py</code>: install the package (<code>pipx install azt</code>) or put the folder <code>azt_web</code> next to it.
"""


@blocking
def read_pages() -> dict[str, Page]:
    """Request path -> page, for every file in `azt_web` of a known type."""
    folder = Path(__file__).resolve().parent / "azt_web"
    files = {
        f"/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*")
        if path.is_file()
    }
    pages = {
        name: _page(path.read_bytes(), _PAGE_TYPES[path.suffix])
        for name, path in files.items()
        if path.suffix in _PAGE_TYPES
    }
    pages["/"] = pages.get("/index.html") or _page(_NO_PAGES, _PAGE_TYPES[".html"])
    return pages


def _page(body: bytes, content_type: str) -> Page:
    return Page(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
# ==================================================================================================
# 5. Settings
#    Defaults < file < environment < flags. The only reader of the environment. Never writes.
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class Setting:
    """One dotted key: its default, what it may be, and the environment variable that pins it."""

    default: Any
    check: Callable[[Any], bool]
    allowed: str
    env: str = ""
    widens: bool = False
    """A change needs proof: it can let more callers in or send traffic elsewhere (trust.md row 9)."""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2048 and value.isprintable()


def _is_words(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 256
        and all(_is_text(word) and word for word in value)
    )


def _is_origins(value: Any) -> bool:
    return _is_words(value) and all(
        word == "*"
        or re.fullmatch(r"https?://[^/\s*]+", word)
        or re.fullmatch(r"[a-z-]+-extension://[a-zA-Z0-9-]+", word)
        for word in value
    )


def _is_proxy(value: Any) -> bool:
    return _is_text(value) and (value == "" or bool(re.fullmatch(r"https?://[^\s/]+/?", value)))


def _in_range(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


_YES_NO = "true or false"
_TEXT = "a text"
_WORDS = "a list of texts"

SETTINGS: dict[str, Setting] = {
    "apiKeys.loopbackExempt": Setting(False, _is_bool, _YES_NO, widens=True),
    "defaultModel": Setting("gpt-5.4", _is_text, _TEXT),
    "limits.bodyMb": Setting(128, _in_range(1, 4096), "1 to 4096", "AZT_BODY_LIMIT_MB"),
    "log.level": Setting(
        "info",
        lambda value: value in ("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        "AZT_LOG_LEVEL",
    ),
    "networkProxy.enabled": Setting(False, _is_bool, _YES_NO, widens=True),
    "networkProxy.noProxy": Setting("localhost,127.0.0.1,::1", _is_text, _TEXT, widens=True),
    "networkProxy.url": Setting(
        "", _is_proxy, "http://host:port or https://host:port", widens=True
    ),
    "server.allowedHosts": Setting([], _is_words, _WORDS, widens=True),
    "server.corsOrigins": Setting(
        [],
        _is_origins,
        "a list of origins such as https://app.example",
        "AZT_CORS_ORIGIN",
        widens=True,
    ),
    "server.host": Setting("0.0.0.0", _is_text, "an address to listen on", "AZT_HOST", widens=True),
    "server.lanApi": Setting(True, _is_bool, _YES_NO, widens=True),
    "server.port": Setting(8787, _in_range(0, 65535), "0 to 65535", "AZT_PORT", widens=True),
}
"""Every knob. Sorted; one entry a line where it fits."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says, read once at the start."""

    paths: Paths
    codex_base_url: str
    chatgpt_base_url: str
    auth_base_url: str
    ca_file: str
    proxy_url: str
    no_proxy: str
    fast: bool
    pinned: Mapping[str, Any]
    """Settings that an environment variable fixes: key -> value."""


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """raises  BadRequest naming a variable whose value cannot be used"""
    env = os.environ if environ is None else environ
    user_home = Path(env.get("HOME") or tempfile.gettempdir())
    home = Path(env.get("AI_ZERO_TOKEN_HOME") or user_home / ".ai-zero-token").expanduser()
    codex_home = Path(env.get("CODEX_HOME") or user_home / ".codex").expanduser()
    return Environment(
        paths=Paths(home, codex_home),
        codex_base_url=_base_url(env, "AZT_CODEX_BASE_URL", CODEX_BASE_URL),
        chatgpt_base_url=_base_url(env, "AZT_CHATGPT_BASE_URL", CHATGPT_BASE_URL),
        auth_base_url=_base_url(env, "AZT_AUTH_BASE_URL", AUTH_BASE_URL),
        ca_file=env.get("AZT_CA_FILE", ""),
        proxy_url=env.get("HTTPS_PROXY")
        or env.get("https_proxy")
        or env.get("ALL_PROXY")
        or env.get("all_proxy")
        or "",
        no_proxy=env.get("NO_PROXY") or env.get("no_proxy") or "",
        fast=env.get("AZT_SLOW_PATHS") != "1",
        pinned={
            key: parse_setting(key, env[setting.env], setting.env)
            for key, setting in SETTINGS.items()
            if setting.env and env.get(setting.env)
        },
    )


def _base_url(env: Mapping[str, str], name: str, default: str) -> str:
    url = (env.get(name) or default).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise BadRequest(f"{name} must be an http or https URL.", name)
    return url


def parse_setting(key: str, text: str, source: str = "") -> Any:
    """Text from the command line or the environment -> a checked value. Bare words need no quotes.

    raises  BadRequest naming the key and what it accepts
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    default = SETTINGS[key].default if key in SETTINGS else None
    if isinstance(default, list) and not isinstance(value, list):
        value = [word.strip() for word in text.split(",") if word.strip()]
    elif isinstance(default, str) and not isinstance(value, str):
        value = text
    return check_setting(key, value, source)


def check_setting(key: str, value: Any, source: str = "") -> Any:
    """The value itself when `key` accepts it. Raises BadRequest."""
    setting = SETTINGS.get(key)
    if setting is None:
        raise BadRequest(f"There is no setting {key!r}. `azt settings get` lists them all.", key)
    if not setting.check(value):
        raise BadRequest(f"{source or key} accepts {setting.allowed}.", key)
    return value


@dataclass(frozen=True, slots=True)
class Settings:
    """The values in force. Dotted keys; `fixed` names what pins a value above the file."""

    values: Mapping[str, Any]
    fixed: Mapping[str, str]
    revision: int = 0

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def text(self, key: str) -> str:
        return cast(str, self.values[key])

    def flag(self, key: str) -> bool:
        return cast(bool, self.values[key])

    def number(self, key: str) -> int:
        return cast(int, self.values[key])

    def words(self, key: str) -> frozenset[str]:
        return frozenset(self.values[key])


def load_settings(
    saved: Json | None, environment: Environment, flags: Mapping[str, Any]
) -> Settings:
    """Merge the four layers. A saved value that no longer fits is named in the log and left out."""
    values = {key: setting.default for key, setting in SETTINGS.items()}
    stored = (saved or {}).get("values")
    for key, value in stored.items() if isinstance(stored, dict) else ():
        setting = SETTINGS.get(key)
        if setting is not None and setting.check(value):
            values[key] = value
        else:
            log.warning(
                "settings.json: %s is not usable and is left out; the default is in force", key
            )
    values.update(environment.pinned)
    values.update(flags)
    fixed = {key: SETTINGS[key].env for key in environment.pinned}
    fixed.update(dict.fromkeys(flags, "command line"))
    revision = (saved or {}).get("revision", 0)
    return Settings(values, fixed, revision if isinstance(revision, int) else 0)


def nested(values: Mapping[str, Any]) -> Json:
    """Dotted keys -> the nested object of the admin API."""
    tree: Json = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Json:
    """The nested object of the admin API -> dotted keys; also takes dotted keys as they are."""
    flat: Json = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
# ==================================================================================================
# 6. Outbound HTTP
#    TLS trust, proxy, connection pool: the only sockets out. Knows no account and no translator.
#
#    A call is made in a worker thread up to the response head. An event stream is then handed to the
#    loop as a non-blocking socket; every other answer is read to its end in the thread.
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class Call:
    """One outbound request. A plain value, so that it may cross threads and be sent again."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | bytearray = b""
    head_timeout_s: float = UPSTREAM_HEAD_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Egress:
    """How azt gets out: a proxy, a company root, and the hosts the user named beyond `OUTBOUND`."""

    proxy_url: str = ""
    no_proxy: str = ""
    ca_file: str = ""
    own_hosts: frozenset[str] = frozenset()


class Wire:
    """The thread's socket, so that the loop can end a call that nobody waits for any more.

    `shutdown` wakes a thread that is blocked in `recv`; `close` would not, and the descriptor's number
    could meanwhile belong to another connection (performance.md 3).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._ended = False

    def attach(self, sock: socket.socket | None) -> None:
        with self._lock:
            self._sock = sock
            ended = self._ended
        if ended and sock is not None:
            _shut(sock)
            raise ConnectionAbortedError("the call was ended")

    def end(self) -> None:
        with self._lock:
            self._ended = True
            sock = self._sock
        if sock is not None:
            _shut(sock)


def _shut(sock: socket.socket) -> None:
    # Not `sock.shutdown`: on a TLS socket that drops the TLS layer, and the reader would get ciphertext.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


_Key = tuple[str, str, int]
"""Scheme, host, port: what a kept connection is good for."""


class ConnectionPool:
    """Kept connections, last used first. The only door to the network."""

    def __init__(self, egress: Egress) -> None:
        self.egress = egress
        self._lock = threading.Lock()
        self._idle: dict[_Key, list[tuple[float, socket.socket]]] = {}
        self._context: ssl.SSLContext | None = None

    def tls(self) -> ssl.SSLContext:
        """The trust store: the system's, else certifi's, plus AZT_CA_FILE. Built once and late: 40 ms."""
        with self._lock:
            if self._context is None:
                self._context = _tls_context(self.egress.ca_file)
            return self._context

    def take(self, key: _Key) -> socket.socket | None:
        """A kept connection that is still open, or None."""
        while True:
            with self._lock:
                kept = self._idle.get(key)
                if not kept:
                    return None
                since, sock = kept.pop()
            if time.monotonic() - since < POOL_IDLE_S and not _has_news(sock):
                return sock
            sock.close()

    def give(self, key: _Key, sock: socket.socket) -> None:
        """Keep a connection whose last answer was read to its very end; close those kept for too long."""
        now = time.monotonic()
        with self._lock:
            kept = self._idle.setdefault(key, [])
            while kept and now - kept[0][0] >= POOL_IDLE_S:
                kept.pop(0)[1].close()
            kept.append((now, sock))

    def close(self) -> None:
        with self._lock:
            kept = [sock for socks in self._idle.values() for _, sock in socks]
            self._idle.clear()
        for sock in kept:
            sock.close()


def _tls_context(ca_file: str) -> ssl.SSLContext:
    import certifi
    import truststore

    context: ssl.SSLContext
    if ca_file:
        # truststore asks the system alone on some systems, so a company root joins certifi's list instead.
        context = ssl.create_default_context(cafile=certifi.where())
        context.load_default_certs()
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            reason = getattr(error, "reason", "") or error.strerror
            raise UpstreamError(
                502, "upstream_tls", f"AZT_CA_FILE {ca_file} holds no usable certificate ({reason}).", fault="network"
            ) from None
    elif sys.platform == "linux" and not _has_system_roots():
        context = ssl.create_default_context(cafile=certifi.where())
    else:
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _has_system_roots() -> bool:
    places = ssl.get_default_verify_paths()
    return bool(places.cafile or (places.capath and any(Path(places.capath).glob("*.0"))))


def _has_news(sock: socket.socket) -> bool:
    """Readable while idle means closed by the other side (or garbage): not reusable either way."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


@dataclass(slots=True)
class Answer:
    """A response whose head was read. `body` is whole, unless `is_stream`: then the socket carries it."""

    status: int
    headers: dict[str, str]
    """Lower-case names; of a repeated one the values are joined with ", "."""
    body: bytes = b""
    is_stream: bool = False
    sock: socket.socket | None = None
    key: _Key = ("", "", 0)
    rest: bytes = b""
    """Body bytes that came along with the head."""
    framing: Framing | None = None
    keep: bool = False
    """The connection may be used again once the body has ended."""
    connect_ms: int = 0

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


# RFC 9112 7.1, read strictly: what is lenient here is how requests are smuggled (trust.md 1.5).
_CHUNK_HEAD = re.compile(
    rb"([0-9A-Fa-f]{1,12})(?:;[\t\x20-\x7e]{0,%d})?\r\n" % (MAX_CHUNK_EXTENSION_BYTES - 1)
)
_TRAILER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")


class Framing:
    """Takes a body out of its transfer coding, request or response, in any split of bytes. Pure.

        SIZE --n--> DATA --CRLF--> SIZE --0--> TRAILERS --empty line--> ended

    ended   the last byte of the body was seen: only then may the connection be used again
    rest    what came behind the body
    left    bytes still to come of the announced length or of the chunk being read
    raises  ValueError for anything but the exact chunk syntax
    """

    __slots__ = ("_chunked", "_in_chunk", "_partial", "_trailer_bytes", "ended", "left", "rest")

    def __init__(self, chunked: bool, length: int | None) -> None:
        self._chunked = chunked
        self._in_chunk = False
        self._partial = b""
        self._trailer_bytes = -1
        self.left = 0 if chunked else -1 if length is None else length
        self.ended = length == 0 and not chunked
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if self._chunked:
            return self._dechunk(data)
        if self.left < 0:
            return data
        taken, self.rest = (
            (data[: self.left], data[self.left :]) if len(data) > self.left else (data, b"")
        )
        self.left -= len(taken)
        self.ended = not self.left
        return taken

    def _dechunk(self, data: bytes) -> bytes:
        data = self._partial + data if self._partial else data
        parts: list[bytes] = []
        at = 0
        while not self.ended:
            if self.left:
                parts.append(data[at : at + self.left])
                at += len(parts[-1])
                self.left -= len(parts[-1])
                if self.left:
                    break
            line, at = self._line(data, at)
            if not line:
                break
            self._take_line(line)
        self._partial, self.rest = (b"", data[at:]) if self.ended else (data[at:], b"")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _line(self, data: bytes, at: int) -> tuple[bytes, int]:
        """The line at `at` and the position behind it; b"" while it is incomplete."""
        longest = 2 if self._in_chunk else MAX_CHUNK_EXTENSION_BYTES + 14
        longest = longest if self._trailer_bytes < 0 else MAX_TRAILER_BYTES - self._trailer_bytes
        end = data.find(b"\n", at, at + longest) + 1
        if not end and len(data) - at >= longest:
            raise ValueError("a line of the chunked body is malformed or too long")
        return (data[at:end], end) if end else (b"", at)

    def _take_line(self, line: bytes) -> None:
        if self._trailer_bytes >= 0:
            self._trailer_bytes += len(line)
            self.ended = line == b"\r\n"
            if not self.ended and not _TRAILER_LINE.fullmatch(line):
                raise ValueError("a trailer of the chunked body is malformed")
        elif self._in_chunk:
            if line != b"\r\n":
                raise ValueError("a chunk of the body is longer than it says")
            self._in_chunk = False
        else:
            size = _CHUNK_HEAD.fullmatch(line)
            if size is None:
                raise ValueError("a chunk size of the body is malformed")
            self.left = int(size[1], 16)
            self._in_chunk = self.left > 0
            self._trailer_bytes = -1 if self.left else 0


@blocking
def open_response(pool: ConnectionPool, call: Call, wire: Wire) -> Answer:
    """Send `call`, read the response head, and the body unless it is an event stream.

    A kept connection that turns out to be dead is replaced silently once, a fresh one that is reset before
    any response byte once as well; nothing else is ever sent twice.
    raises  UpstreamError
    """
    parts = urllib.parse.urlsplit(call.url)
    host = parts.hostname or ""
    _check_outbound(host, pool.egress)
    key = (parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80))
    started = time.monotonic()
    sock = pool.take(key)
    for last_try in (False, True):
        is_kept = sock is not None
        try:
            if sock is None:
                sock = _open_socket(pool, key, wire)
            else:
                wire.attach(sock)
            answer = _exchange(sock, key, call, parts)
            answer.connect_ms = 0 if is_kept else round((time.monotonic() - started) * 1000)
            break
        except _NoAnswer as error:
            if sock is not None:
                sock.close()
                sock = None
            if last_try:
                raise _unreachable(host, error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if sock is not None:
                sock.close()
            raise _outbound_error(host, error) from None
    wire.attach(None)
    if not answer.is_stream:
        _settle(pool, answer)
    return answer


def _check_outbound(host: str, egress: Egress) -> None:
    if host not in OUTBOUND and host not in egress.own_hosts:
        raise UpstreamError(
            502,
            "upstream_unreachable",
            f"azt does not call {host}: it is not in its table of hosts.",
        )


class _NoAnswer(Exception):
    """The connection broke before the first response byte: the request was not answered at all."""


class _HeadReader(io.BufferedReader):
    """http.client takes the end of the connection for the end of the head."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.IncompleteRead(line)
        return line


class _Response(http.client.HTTPResponse):
    """http.client takes 102 and 103 for the final answer and hides whether any byte had come."""

    _heard = False

    def _read_status(self) -> tuple[str, int, str]:
        if not self._heard:
            self.fp = _HeadReader(self.fp.detach())  # type: ignore[arg-type]  # a SocketIO
            try:
                self._heard = bool(self.fp.peek(1))
            except (ConnectionError, ssl.SSLEOFError) as error:
                raise _NoAnswer(str(error)) from None
            if not self._heard:
                raise _NoAnswer("the connection was closed")
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # not in typeshed
            if not 102 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)


class _Connection(http.client.HTTPConnection):
    """One exchange over a socket that azt opened. The socket stays ours: closing is room 6's business."""

    response_class = _Response
    body: bytes | bytearray = b""

    def close(self) -> None:
        # http.client would close the socket under a stream whose head said `Connection: close`.
        pass

    def send(self, data: Any) -> None:
        """The head, which http.client sends alone: with a small body it is one packet, one call."""
        if len(self.body) > READ_BYTES:
            self.sock.sendall(data)
            data = b""
        self.sock.sendall(data + self.body if data else self.body)


def _exchange(
    sock: socket.socket, key: _Key, call: Call, parts: urllib.parse.SplitResult
) -> Answer:
    """One request and its response head over an open socket."""
    sock.settimeout(call.head_timeout_s)
    connection = _Connection(key[1], key[2])
    connection.sock, connection.body = sock, call.body
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.putrequest(call.method, target, skip_host=True, skip_accept_encoding=True)
    connection.putheader("host", parts.netloc.rpartition("@")[2])
    for name, value in call.headers.items():
        connection.putheader(name, value)
    if call.body or call.method in ("POST", "PUT"):
        connection.putheader("content-length", str(len(call.body)))
    # Refused in mid-upload the answer may be there all the same, a 413 say: the reader finds out.
    with contextlib.suppress(ConnectionError):
        connection.endheaders()
    # Closes the reader only; the socket goes on.
    with contextlib.closing(cast(_Response, connection.getresponse())) as response:
        return _answer(sock, key, response)


def _answer(sock: socket.socket, key: _Key, response: _Response) -> Answer:
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    is_stream = response.status == 200 and headers.get("content-type", "").lower().startswith(
        "text/event-stream"
    )
    length = response.length
    framing = Framing(bool(response.chunked) and length is None, length)
    answer = Answer(response.status, headers, b"", is_stream, sock, key, b"", framing, not response.will_close)
    if is_stream:
        if headers.get("content-encoding", "identity") != "identity":
            raise ValueError("a compressed event stream that nobody asked for")
        sock.settimeout(0)
        answer.rest = _buffered(response)
        return answer
    answer.body = _read_body(response, framing)
    sock.settimeout(0)
    answer.keep = answer.keep and framing.ended and not (framing.rest or _buffered(response))
    if headers.get("content-encoding"):
        answer.body = decoded(answer.body, headers["content-encoding"], MAX_REPLY_BYTES)
    return answer


def _read_body(response: _Response, framing: Framing) -> bytes:
    """The body to its end. http.client would take a cut one for whole and malformed chunks for good ones."""
    body = bytearray()
    while not framing.ended:
        data = response.fp.read1(READ_BYTES)
        if not data and framing.left < 0:
            break  # the connection's end is the body's end
        if not data:
            raise http.client.IncompleteRead(b"")
        body += framing.feed(data)
        if len(body) > MAX_REPLY_BYTES:
            raise ValueError("an answer larger than azt accepts")
    return bytes(body)


def _buffered(response: _Response) -> bytes:
    """What the reader holds beyond what was taken. The socket is non-blocking by now."""
    try:
        return bytes(response.fp.peek())
    except OSError:  # a TLS socket without a record, or a connection that has just died
        return b""


def _settle(pool: ConnectionPool, answer: Answer) -> None:
    """Keep or close the connection of an answer that was read in the thread."""
    if answer.sock is not None and answer.keep:
        pool.give(answer.key, answer.sock)
        answer.sock = None
    answer.close()


def decoded(body: bytes | bytearray, coding: str, bytes_max: int) -> bytes:
    """Undo one gzip or deflate content coding, never holding more than `bytes_max`.

    raises  ValueError for another coding, broken data or too much of it
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return bytes(body)
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"content coding {coding!r}")
    window = 31 if coding.endswith("gzip") else 15
    try:
        return _inflate_once(body, window, bytes_max)
    except zlib.error as error:
        if coding != "deflate":
            raise ValueError(f"broken {coding} data ({error})") from None
    try:
        # Quirk: some senders mean raw deflate without the zlib frame.
        return _inflate_once(body, -15, bytes_max)
    except zlib.error as error:
        raise ValueError(f"broken {coding} data ({error})") from None


def _inflate_once(body: bytes | bytearray, window: int, bytes_max: int) -> bytes:
    engine = zlib.decompressobj(window)
    whole = engine.decompress(body, bytes_max + 1)
    if len(whole) > bytes_max:
        raise ValueError("too large")
    if not engine.eof:
        raise ValueError("the compressed data is cut off")
    return whole


def _open_socket(pool: ConnectionPool, key: _Key, wire: Wire) -> socket.socket:
    scheme, host, port = key
    proxy = _proxy_for(pool.egress, host)
    if proxy is None:
        sock = _dial(host, port, wire)
    else:
        sock = _dial_proxy(pool, proxy, host, port, wire)
    return _wrap(pool, sock, host, wire) if scheme == "https" else sock


def _wrap(pool: ConnectionPool, sock: socket.socket, host: str, wire: Wire) -> ssl.SSLSocket:
    secure: ssl.SSLSocket | None = None
    try:
        # The handshake takes the descriptor out of `sock`; a second one lets the loop end it meanwhile.
        with sock.dup() as twin:
            wire.attach(twin)
            secure = pool.tls().wrap_socket(sock, server_hostname=host)
            wire.attach(secure)
        return secure
    except BaseException:
        (secure or sock).close()
        raise


def _dial(host: str, port: int, wire: Wire) -> socket.socket:
    error: OSError = OSError("no address")
    for family, kind, proto, _, address in _resolve(host, port):
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.attach(sock)
            sock.connect(address)
            return sock
        except OSError as caught:
            sock.close()
            error = caught
            if isinstance(caught, ConnectionAbortedError):
                break
    raise _ConnectFailed(error)


class _ConnectFailed(OSError):
    """No connection came about; the cause is the argument."""


_Address = tuple[Any, Any, int, str, Any]


def _resolve(host: str, port: int) -> list[_Address]:
    """getaddrinfo has no timeout of its own: a dead resolver would hold the call for half a minute."""
    inbox: queue.SimpleQueue[list[_Address] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            inbox.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            inbox.put(OSError(str(error)))

    if _is_address(host):
        look_up()
    else:
        threading.Thread(target=look_up, name="azt-resolve", daemon=True).start()
    try:
        found = inbox.get(timeout=RESOLVE_TIMEOUT_S)
    except queue.Empty:
        raise _ConnectFailed(OSError(f"the name {host} could not be looked up in time")) from None
    if isinstance(found, OSError):
        raise _ConnectFailed(found)
    return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _proxy_for(egress: Egress, host: str) -> urllib.parse.SplitResult | None:
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # not in typeshed

    if not egress.proxy_url or proxy_bypass_environment(host, {"no": egress.no_proxy}):
        return None
    return urllib.parse.urlsplit(
        egress.proxy_url if "://" in egress.proxy_url else f"http://{egress.proxy_url}"
    )


def _dial_proxy(
    pool: ConnectionPool, proxy: urllib.parse.SplitResult, host: str, port: int, wire: Wire
) -> socket.socket:
    """A tunnel through the proxy: CONNECT, also for plain http, so that the rest never notices it."""
    name = f"{proxy.hostname}:{proxy.port or (443 if proxy.scheme == 'https' else 80)}"
    sock: socket.socket | None = None
    try:
        sock = _dial(
            proxy.hostname or "", proxy.port or (443 if proxy.scheme == "https" else 80), wire
        )
        if proxy.scheme == "https":
            sock = _wrap(pool, sock, proxy.hostname or "", wire)
        status = _connect_request(
            sock, proxy, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        )
    except (OSError, http.client.HTTPException) as error:
        if sock is not None:
            sock.close()
        raise _proxy_failed(name, str(error)) from None
    if status != 200:
        sock.close()
        raise _proxy_failed(name, f"it answered {status}")
    # One TLS layer cannot wrap another in Python: a pump in the middle turns the outer one into a plain socket.
    return _pumped(sock) if isinstance(sock, ssl.SSLSocket) else sock


def _proxy_failed(name: str, why: str) -> UpstreamError:
    return UpstreamError(
        502,
        "proxy_failed",
        f"The proxy {name} did not work: {mask(why)}. Check `azt settings get networkProxy` and HTTPS_PROXY.",
        fault="network",
    )


def _connect_request(sock: socket.socket, proxy: urllib.parse.SplitResult, authority: str) -> int:
    head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
    if proxy.username:
        pair = (
            f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
        )
        head += f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
    sock.sendall(head.encode("latin-1") + b"\r\n")
    with contextlib.closing(http.client.HTTPResponse(sock, method="CONNECT")) as response:
        response.begin()
        return response.status


def _pumped(outer: ssl.SSLSocket) -> socket.socket:
    """A plain socket whose bytes travel through `outer`; one daemon thread moves them."""
    near, far = socket.socketpair()

    def pump() -> None:
        outer.settimeout(None)
        try:
            while True:
                ready = [outer] if outer.pending() else select.select([outer, far], [], [])[0]
                for source in ready:
                    data = source.recv(READ_BYTES)
                    if not data:
                        return
                    (far if source is outer else outer).sendall(data)
        except OSError:
            return
        finally:
            far.close()
            outer.close()

    threading.Thread(target=pump, name="azt-proxy", daemon=True).start()
    return near


def _unreachable(host: str, error: BaseException) -> UpstreamError:
    return UpstreamError(
        502,
        "upstream_unreachable",
        f"azt could not reach {host}: {mask(str(error)) or 'the connection was closed'}. "
        "Check the network, or set a proxy with `azt settings set networkProxy.url`.",
        fault="network",
    )


def _outbound_error(host: str, error: BaseException) -> UpstreamError:
    """Foreign exceptions under azt's own names."""
    if isinstance(error, UpstreamError):
        return error
    if isinstance(error, _ConnectFailed):
        return _unreachable(host, error.args[0])
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "verify_message", "") or error.reason or "handshake failed"
        return UpstreamError(
            502,
            "upstream_tls",
            f"No trusted TLS connection to {host}: {reason}. If a company proxy opens TLS, name its root "
            "certificate in AZT_CA_FILE.",
            fault="network",
        )
    if isinstance(error, TimeoutError):
        return UpstreamError(
            504, "upstream_timeout", f"{host} did not answer in time. Try again.", fault="network"
        )
    if isinstance(error, (http.client.HTTPException, ValueError)):
        return UpstreamError(
            502,
            "upstream_error",
            f"{host} answered with something that is no valid HTTP ({type(error).__name__}).",
        )
    return _unreachable(host, error)
# ==================================================================================================
# 7. Event streams
#    JSON and SSE bytes <-> dicts. Pure: no I/O, no clock.
# ==================================================================================================


def encode_json(value: Any) -> bytes:
    """Compact JSON as UTF-8. Lone surrogates, which no UTF-8 can carry, stay `\\uXXXX` escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def encode_large_json(value: Any) -> bytes:
    """The same bytes, made in pieces: one call of the encoder for all of it would stop every stream."""
    parts: list[bytes] = []
    _encode_pieces(value, parts)
    return b"".join(parts)


def _encode_pieces(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, str):
        pieces = (encode_json(value[at : at + MIB])[1:-1] for at in range(0, len(value), MIB))
        parts += [b'"', *pieces, b'"']
    elif isinstance(value, (dict, list)) and value:
        is_object = isinstance(value, dict)
        for at, key in enumerate(value):
            parts.append(b"," if at else b"{" if is_object else b"[")
            if is_object:
                parts.append(encode_json(key) + b":")
            _encode_pieces(value[key] if is_object else key, parts)
        parts.append(b"}" if is_object else b"]")
    else:
        parts.append(encode_json(value))


def encode_data(value: Any) -> bytes:
    """One unnamed SSE event (Chat Completions)."""
    return b"data: " + encode_json(value) + b"\n\n"


def encode_event(event: Json) -> bytes:
    """One SSE event named after its `type` (Responses, Images)."""
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode_json(event) + b"\n\n"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def parse_json(body: bytes | bytearray) -> Any:
    """Bytes from a client -> a JSON value.

    raises  ValueError (also for NaN, numbers of more than 4,300 digits, not UTF-8, too deep)
    """
    try:
        text = str(body, "utf-8-sig")
        value = _parse_pieces(text) if len(text) > MIB else _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _parse_pieces(text: str, levels: int = 2) -> Any:
    """Decode a large document member by member for the outer levels.

    The C scanner holds the interpreter lock for as long as one call takes: a 128 MiB document in one
    call stops every stream for a second. Between members other threads get their turn.
    """
    value, end = _parse_value(text, _skip(text, 0), levels)
    if _skip(text, end) != len(text):
        raise ValueError("extra data after the JSON value")
    return value


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _parse_value(text: str, at: int, levels: int) -> tuple[Any, int]:
    opening = text[at : at + 1]
    if levels == 0 or opening not in ("{", "["):
        return _DECODER.raw_decode(text, at)
    is_object = opening == "{"
    closing = "}" if is_object else "]"
    members: Json = {}
    items: list[Any] = []
    at = _skip(text, at + 1)
    if text[at : at + 1] == closing:
        return (members if is_object else items), at + 1
    while True:
        if is_object:
            if text[at : at + 1] != '"':
                raise ValueError(f"a member name is missing at character {at}")
            name, at = _DECODER.raw_decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] != ":":
                raise ValueError(f"':' is missing at character {at}")
            members[name], at = _parse_value(text, _skip(text, at + 1), levels - 1)
        else:
            item, at = _parse_value(text, at, levels - 1)
            items.append(item)
        at = _skip(text, at)
        separator = text[at : at + 1]
        if separator == closing:
            return (members if is_object else items), at + 1
        if separator != ",":
            raise ValueError(f"',' or '{closing}' is missing at character {at}")
        at = _skip(text, at + 1)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether containers nest deeper than `levels`. Walks level by level, so it never recurses."""
    layer = [value] if isinstance(value, (dict, list)) else []
    while layer:
        if levels == 0:
            return True
        levels -= 1
        layer = [
            child
            for parent in layer
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return False


class SSEParser:
    """SSE bytes in any split -> the data of each complete event (WHATWG rules).

    Knows CRLF, CR and LF line ends, also mixed; a BOM; comments; `data` without a space; several data
    lines. An event is complete at its blank line; what follows the last one is never reported, and
    `has_rest` tells that the stream was cut. Event names are dropped: the JSON repeats them as `type`.

    raises  UpstreamError when one event exceeds MAX_EVENT_BYTES
    """

    __slots__ = ("_after_cr", "_at_start", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at_start = True
        self._after_cr = False

    @property
    def has_rest(self) -> bool:
        return bool(self._buffer.strip(b"\n"))

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that `chunk` completes."""
        if b"\r" in chunk or self._after_cr:
            chunk = self._newlines(chunk)
        buffer = self._buffer
        searched = max(len(buffer) - 1, 0)
        buffer += chunk
        if self._at_start:
            if len(buffer) < 3 and b"\xef\xbb\xbf".startswith(buffer):
                return []
            self._at_start = False
            if buffer.startswith(b"\xef\xbb\xbf"):
                del buffer[:3]
                searched = 0
        end = buffer.rfind(b"\n\n", searched)
        if end < 0:
            if len(buffer) > MAX_EVENT_BYTES:
                raise UpstreamError(
                    502,
                    "upstream_error",
                    "The upstream sent an event larger than azt accepts.",
                    fault="transient",
                )
            return []
        blocks = bytes(buffer[:end])
        del buffer[: end + 2]
        return [data for block in blocks.split(b"\n\n") if (data := _block_data(block)) is not None]

    def _newlines(self, chunk: bytes) -> bytes:
        """Every line end as LF, also a CRLF that two chunks share."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
            if not chunk:
                return chunk
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _block_data(block: bytes) -> bytes | None:
    """The data of one event block, or None where it has none (a comment, a bare `event:` line)."""
    # The usual form, `event: x` and one `data: y`, without a loop over lines.
    if block.startswith(b"event: "):
        second = block.find(b"\n") + 1
        if second and block.startswith(b"data: ", second) and block.find(b"\n", second) < 0:
            return block[second + 6 :]
    lines = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value[1:] if value.startswith(b" ") else value)
    return b"\n".join(lines) if lines else None


_TYPE = re.compile(rb'\s*\{\s*"type"\s*:\s*"([^"\\]*)"')


def event_type(data: bytes) -> str:
    """The `type` of an event without decoding it where it stands first, as the backend writes it."""
    found = _TYPE.match(data)
    if found:
        return found[1].decode("utf-8", "replace")
    event = parse_event(data)
    if event is None:
        return ""
    kind = event.get("type")
    return kind if isinstance(kind, str) else "error" if "error" in event else ""


def parse_event(data: bytes) -> Json | None:
    """The event as a dict, or None for what is no JSON object: a broken event is skipped, not fatal."""
    try:
        event = _DECODER.decode(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
# ==================================================================================================
# 8. Accounts
#    Who is signed in, and the reading of account files. Pure: loading and saving are done by room 14.
# ==================================================================================================

ACCOUNTS_VERSION = 1
IMPORT_MAX_BYTES = 16 * MIB
IMPORT_MAX_ENTRIES = 1000
IMPORT_MEMBER_MAX_BYTES = 1 * MIB
IMPORT_BUDGET_S = 5.0


@dataclass(slots=True)
class Account:
    """One signed-in identity: an account id together with a user id (two members of a workspace are two)."""

    id: str
    account_id: str
    user_id: str
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    id_token: str = field(repr=False, default="")
    email: str = ""
    plan: str = "unknown"
    label: str = ""
    expires_at: int = 0
    """Unix seconds; 0 when the access token does not say."""
    created_at: int = 0
    refreshed_at: int = 0
    rejected: str = ""
    """Why the provider no longer accepts the sign-in; empty while it does."""

    @property
    def name(self) -> str:
        """What logs and headers may show: the label, else the short id, never the e-mail."""
        return self.label or self.id


def account_id_of(account_id: str, user_id: str) -> str:
    return "acc_" + hashlib.sha256(f"{account_id}|{user_id}".encode()).hexdigest()[:10]


class AccountStore:
    """All accounts and which one serves. Owned by the loop; `to_json` makes a snapshot for the disk."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.active_id: str | None = None

    @property
    def active(self) -> Account | None:
        return self.accounts.get(self.active_id or "")

    def add(self, account: Account) -> Literal["new", "update", "same"]:
        """Add or renew an account. What the user set on it stays; the serving one stays unless there was none."""
        old = self.accounts.get(account.id)
        if old is None:
            self.accounts[account.id] = account
            self.active_id = self.active_id or account.id
            return "new"
        if (old.access_token, old.refresh_token) == (account.access_token, account.refresh_token):
            return "same"
        self.accounts[account.id] = replace(
            account,
            label=account.label or old.label,
            email=account.email or old.email,
            id_token=account.id_token or old.id_token,
            created_at=old.created_at,
        )
        return "update"

    def remove(self, account: Account) -> None:
        self.accounts.pop(account.id, None)
        if self.active_id == account.id:
            self.active_id = next(iter(self.accounts), None)

    def find(self, name: str) -> Account:
        """An account by label, e-mail or the beginning of its id. Raises AztError."""
        wanted = name.casefold()
        start = wanted.removeprefix("acc_")
        everyone = list(self.accounts.values()) if start else []
        found = [
            one for one in everyone if wanted in (one.label.casefold(), one.email.casefold(), one.id)
        ] or [one for one in everyone if one.id.removeprefix("acc_").startswith(start)]
        if len(found) == 1:
            return found[0]
        what = "Several accounts match" if found else "No account matches"
        raise AztError(
            404, "account_not_found", f"{what} {name!r}. `azt accounts list` shows their ids."
        )

    def to_json(self) -> Json:
        entries = [
            {slot: getattr(one, slot) for slot in Account.__slots__}
            for one in self.accounts.values()
        ]
        return {"version": ACCOUNTS_VERSION, "active_id": self.active_id, "accounts": entries}

    @classmethod
    def from_json(cls, saved: Json | None) -> AccountStore:
        """raises  StateError when the content is not what `to_json` writes"""
        store = cls()
        if saved is None:
            return store
        try:
            known = set(Account.__slots__)
            for entry in saved["accounts"]:
                account = Account(**{name: value for name, value in entry.items() if name in known})
                for name, kind in Account.__annotations__.items():
                    if type(getattr(account, name)).__name__ != kind:
                        raise TypeError(f"{name} is no {kind}")
                store.accounts[account.id] = account
            store.active_id = saved["active_id"] if saved["active_id"] in store.accounts else None
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"accounts.json has an unknown shape ({error}). Move it away and import again."
            ) from None
        store.active_id = store.active_id or next(iter(store.accounts), None)
        return store


def token_claims(token: str) -> Json:
    """The payload of a JWT, unverified (only the provider can verify it); {} when it is none."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def read_entries(raw: bytes) -> list[Json]:
    """An account file in any known shape -> its entries, unchecked.

    in      one object; an array; {"profiles": [...]}; Codex's auth.json; a ZIP of such files
    raises  BadRequest
    """
    entries = [entry for name, text in _import_files(raw) for entry in import_entries(text, name)]
    if len(entries) > IMPORT_MAX_ENTRIES:
        raise BadRequest(
            f"More than {IMPORT_MAX_ENTRIES} accounts in one file.", "file", "too_large"
        )
    return entries


def to_accounts(entries: list[Json], now: float) -> list[Account]:
    """Entries of an account file -> accounts. All or nothing: raises BadRequest naming the first bad entry."""
    if not entries:
        raise BadRequest("There is no account in this file.", "file", "nothing_to_import")
    return [_to_account(f"Entry {at + 1}", entry, now) for at, entry in enumerate(entries)]


def _import_files(raw: bytes) -> list[tuple[str, bytes]]:
    """(name prefix, bytes) of each JSON document. A ZIP is read in memory, its names only serve messages."""
    if len(raw) > IMPORT_MAX_BYTES:
        raise BadRequest("The file is larger than 16 MiB.", "file", "too_large")
    if not raw.startswith(b"PK"):
        return [("", raw)]
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return _zip_members(archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        EOFError,
        ValueError,
        OSError,
    ) as error:
        raise BadRequest(
            f"The ZIP file cannot be read ({mask(str(error))[:120]}).", "file", "unreadable_zip"
        ) from None


def _zip_members(archive: zipfile.ZipFile) -> list[tuple[str, bytes]]:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if len(members) > IMPORT_MAX_ENTRIES:
        raise ValueError("too many members")
    deadline = time.monotonic() + IMPORT_BUDGET_S
    found: list[tuple[str, bytes]] = []
    total = end = 0
    for member in members:
        if member.header_offset < end:
            raise ValueError("overlapping members")
        end = member.header_offset + member.compress_size
        base = member.filename.rsplit("/", 1)[-1]
        if member.is_dir() or base.startswith("._") or member.filename.startswith("__MACOSX"):
            continue
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ValueError("encrypted, or an unusual compression")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG) or not base.endswith(
            ".json"
        ):
            raise ValueError("members other than .json files")
        with archive.open(member) as file:
            text = file.read(IMPORT_MEMBER_MAX_BYTES + 1)
        total += len(text)
        if (
            len(text) > IMPORT_MEMBER_MAX_BYTES
            or total > IMPORT_MAX_BYTES
            or time.monotonic() > deadline
        ):
            raise ValueError("too large once unpacked")
        found.append((f"{mask(member.filename)[:80]}: ", text))
    return found


def import_entries(document: bytes | Any, name: str = "") -> list[Json]:
    """The entries of one document, as bytes or already parsed."""
    value: Any = document
    if isinstance(document, bytes):
        try:
            value = parse_json(document)
        except ValueError as error:
            raise BadRequest(
                f"{name}this is not valid JSON ({error}).", "file", "not_json"
            ) from None
    if isinstance(value, dict) and isinstance(value.get("profiles"), list):
        value = value["profiles"]
    entries: list[Any] = value if isinstance(value, list) else [value]
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadRequest(f"{name}entry {at + 1} is no object.", "file", "unknown_format")
    return entries


# Our field -> the spellings in use (Codex, other gateways, the Node program).
_IMPORT_NAMES = {
    "access_token": ("access_token", "accessToken", "access"),
    "account_id": ("account_id", "accountId", "chatgpt_account_id"),
    "email": ("email",),
    "expires": ("expires_at", "expiresAt", "expired", "expires"),
    "id_token": ("id_token", "idToken"),
    "label": ("label",),
    "refresh_token": ("refresh_token", "refreshToken", "refresh"),
}
_SECRET_TEXT = re.compile(r"[\x21-\x7e]{1,16384}")
_ACCOUNT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_YEAR_2200_S = 7_258_118_400
_AUTH_CLAIM = "https://api.openai.com/auth"
_PROFILE_CLAIM = "https://api.openai.com/profile"


def _to_account(where: str, entry: Json, now: float) -> Account:
    """One import entry, typed and sized field by field: tokens become header values."""
    tokens = entry.get("tokens")
    source = {**entry, **tokens} if isinstance(tokens, dict) else entry
    fields: Json = {
        ours: next((source[name] for name in names if source.get(name) is not None), None)
        for ours, names in _IMPORT_NAMES.items()
    }
    for secret in ("access_token", "refresh_token"):
        if not fields[secret]:
            raise BadRequest(f"{where} has no {secret}.", "file", f"no_{secret}")
    for secret in ("access_token", "refresh_token", "id_token"):
        value = fields[secret]
        if value and not (isinstance(value, str) and _SECRET_TEXT.fullmatch(value)):
            raise BadRequest(f"{where}: {secret} is no token.", "file", "unknown_format")
    account = account_from_tokens(
        fields["access_token"], fields["refresh_token"], fields["id_token"] or "", now
    )
    if isinstance(fields["account_id"], str) and not account.account_id:
        account.account_id = fields["account_id"]
        account.id = account_id_of(account.account_id, account.user_id)
    if not _ACCOUNT_ID.fullmatch(account.account_id):
        raise BadRequest(f"{where} names no account id.", "file", "no_account_id")
    account.expires_at = account.expires_at or _expiry(where, fields["expires"])
    for text in ("email", "label"):
        if isinstance(fields[text], str) and not getattr(account, text):
            setattr(account, text, _shown(fields[text], 256))
    return account


def account_from_tokens(
    access_token: str, refresh_token: str, id_token: str, now: float
) -> Account:
    """Identity, plan and expiry as the token claims tell them (codex-upstream.md 1.9)."""
    access, identity = token_claims(access_token), token_claims(id_token)
    auth: Json = {}
    for claims in (identity, access):
        part = claims.get(_AUTH_CLAIM)
        auth.update(
            {name: value for name, value in part.items() if value} if isinstance(part, dict) else {}
        )
    profile = access.get(_PROFILE_CLAIM)
    email = (
        identity.get("email")
        or access.get("email")
        or (profile.get("email") if isinstance(profile, dict) else "")
    )
    account_id = str(auth.get("chatgpt_account_id") or "")
    user_id = str(auth.get("chatgpt_user_id") or auth.get("user_id") or "")[:256]
    exp = access.get("exp")
    is_time = type(exp) in (int, float) and 0 <= exp < _YEAR_2200_S
    return Account(
        id=account_id_of(account_id, user_id),
        account_id=account_id,
        user_id=user_id,
        access_token=access_token,
        refresh_token=refresh_token,
        id_token=id_token,
        email=_shown(email or "", 256),
        plan=_shown(auth.get("chatgpt_plan_type") or "unknown", 64),
        expires_at=int(exp) if is_time else 0,
        created_at=int(now),
    )


def _shown(value: Any, length: int) -> str:
    """Foreign text as terminals, logs and pages may show it."""
    return "".join(one for one in str(value) if one.isprintable())[:length]


def _expiry(where: str, value: Any) -> int:
    """Unix seconds out of seconds, milliseconds or an ISO date; 0 where nothing is said."""
    if value is None or isinstance(value, bool):
        return 0
    try:
        seconds = float(value)
        seconds = seconds / 1000 if seconds > 1e11 else seconds
    except (TypeError, ValueError, OverflowError):
        try:
            seconds = datetime.fromisoformat(str(value)).timestamp()
        except (ValueError, OverflowError):
            seconds = -1.0
    if not 0 <= seconds < _YEAR_2200_S:
        raise BadRequest(
            f"{where}: the expiry is no time between 1970 and 2200.", "file", "bad_expiry"
        )
    return int(seconds)
# ==================================================================================================
# 9. OAuth
#    The token endpoint. Knows no store: tokens in, tokens out.
# ==================================================================================================

# What the token endpoint says when a refresh token is dead for good (codex-upstream.md 1.5).
REFRESH_DEAD = {
    "account_deactivated",
    "account_deleted",
    "account_session_expired",
    "account_suspended",
    "app_session_terminated",
    "invalid_grant",
    "refresh_token_expired",
    "refresh_token_invalidated",
    "refresh_token_reused",
    "token_expired",
    "token_invalidated",
    "token_revoked",
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """An answer of the token endpoint; a field it left out is None and keeps its old value."""

    access_token: str | None = field(repr=False)
    refresh_token: str | None = field(repr=False)
    id_token: str | None = field(repr=False)
    expires_in_s: int | None


class SignInRejected(AztError):
    """The refresh token is dead: only a new sign-in helps. `reason` is the provider's code."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            401,
            "account_auth_expired",
            f"The provider no longer accepts this sign-in ({reason}).",
            type="authentication_error",
        )
        self.reason = reason


@blocking
def refresh_tokens(
    pool: ConnectionPool, auth_base_url: str, refresh_token: str, wire: Wire
) -> Tokens:
    """One round trip. The refresh token is single use: never call this twice with the same one at once.

    raises  SignInRejected when it is dead, UpstreamError for everything that may pass
    """
    body: Json = {
        "client_id": OAUTH_CLIENT_ID,
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
    }
    headers = {"content-type": "application/json", "accept": "application/json"}
    call = Call(
        "POST", f"{auth_base_url}/oauth/token", headers | OWN_HEADERS, encode_json(body), 30.0
    )
    answer = open_response(pool, call, wire)
    value = parse_event(answer.body)
    tokens = _tokens(value or {})
    if answer.status == 200 and (tokens.access_token or tokens.refresh_token):
        return tokens
    code = _refresh_code(value)
    if code in REFRESH_DEAD or (answer.status == 401 and code):
        raise SignInRejected(code)
    raise UpstreamError(
        502,
        "upstream_error",
        f"The sign-in could not be renewed: the provider answered {answer.status}. Try again.",
        fault="transient",
    )


def _tokens(value: Json) -> Tokens:
    texts = {
        name: value[name]
        if isinstance(value.get(name), str) and _SECRET_TEXT.fullmatch(value[name])
        else None
        for name in ("access_token", "refresh_token", "id_token")
    }
    life_s = value.get("expires_in")
    is_life = type(life_s) in (int, float) and 0 < life_s < _YEAR_2200_S
    return Tokens(**texts, expires_in_s=int(life_s) if is_life else None)


def _refresh_code(value: Json | None) -> str:
    error = (value or {}).get("error")
    code = error.get("code") if isinstance(error, dict) else error
    return _shown(code or (value or {}).get("code") or "", 64).lower()
# ==================================================================================================
# 10. Upstream
#     Speaks to the Codex backend for one given account. Never chooses an account.
# ==================================================================================================

RETRY_AFTER_MAX_S = 7 * 24 * 3600

# What the backend calls an error -> (our status, our code, fault). Everything else goes by its status.
# Sources: codex-upstream.md 2.8, 4.10, 5.2, 5.3; openai-api.md 7.2.
_UPSTREAM_CODES: dict[str, tuple[int, str, Fault]] = {
    "account_deactivated": (401, "account_auth_expired", "account"),
    "bio_policy": (400, "content_policy_violation", "request"),
    "content_policy_violation": (400, "content_policy_violation", "request"),
    "context_length_exceeded": (400, "context_length_exceeded", "request"),
    "cyber_policy": (400, "content_policy_violation", "request"),
    "deactivated_workspace": (403, "account_unusable", "account"),
    "insufficient_quota": (429, "usage_limit_reached", "account"),
    "invalid_prompt": (400, "content_policy_violation", "request"),
    "misalignment_policy_violation": (400, "content_policy_violation", "request"),
    "model_not_found": (404, "model_not_found", "request"),
    "moderation_blocked": (400, "moderation_blocked", "request"),
    "overloaded_error": (503, "overloaded", "transient"),
    "rate_limit_error": (429, "rate_limit_exceeded", "account"),
    "rate_limit_exceeded": (429, "rate_limit_exceeded", "account"),
    "server_is_overloaded": (503, "overloaded", "transient"),
    "slow_down": (503, "overloaded", "transient"),
    "token_expired": (401, "account_auth_expired", "token"),
    "token_invalidated": (401, "account_auth_expired", "account"),
    "token_revoked": (401, "account_auth_expired", "account"),
    "usage_limit_reached": (429, "usage_limit_reached", "account"),
    "usage_not_included": (403, "usage_not_included", "account"),
    "workspace_access_denied": (403, "account_unusable", "account"),
}

_NOT_FOR_CHATGPT = "not supported when using Codex with a ChatGPT account"
_WAIT_IN_TEXT = re.compile(r"try again in (\d+(?:\.\d+)?)\s*(ms|mi?|s)", re.IGNORECASE)
_UNIT_S = {"m": 60, "mi": 60, "ms": 0.001, "s": 1}


def upstream_error(
    status: int, headers: Mapping[str, str], body: bytes, now: float
) -> UpstreamError:
    """A backend answer that is no event stream -> the error for the client.

    headers  lower-case names
    body     parsed as `{"error": {...}}`, `{"detail": "..."}` or `{"detail": {"code"}}`; HTML is dropped
    """
    inner = _error_object(body)
    retry_after = _retry_after(headers.get("retry-after"), now)
    if 200 <= status < 400:
        return UpstreamError(
            502,
            "upstream_error",
            f"The upstream answered {status} without an event stream.",
            fault="transient",
        )
    if status == 403 and not any(inner.values()):
        reason = "a browser check" if "cf-mitigated" in headers else "an HTML page"
        return UpstreamError(
            403,
            "upstream_forbidden",
            f"The upstream refused the connection with {reason}. This is about the network or the "
            "region, not about your account: try another network or set a proxy.",
        )
    return _classify(status, inner, retry_after, now)


def event_error(event: Json, now: float) -> UpstreamError:
    """A `response.failed` or `error` event, flat or nested -> the error for the client."""
    response = event.get("response")
    inner = response.get("error") if isinstance(response, dict) else event.get("error")
    if not isinstance(inner, dict):
        inner = {name: event.get(name) for name in ("code", "message", "param")}
    status = event.get("status", event.get("status_code"))
    return _classify(status if isinstance(status, int) else 0, inner, None, now)


def _error_object(body: bytes) -> Json:
    """The error out of the shapes in use, as {"code"?, "type"?, "message"?, ...}; {} for HTML."""
    value = parse_event(body) or {}
    inner = value.get("error", value.get("detail", value))
    if isinstance(inner, dict):
        return inner
    described = value.get("error_description") or value.get("message")
    text = inner if isinstance(inner, str) else ""
    return {"code": text, "message": described} if described else {"message": text}


def _classify(status: int, inner: Json, retry_after: int | None, now: float) -> UpstreamError:
    kinds = [str(inner[name]) for name in ("code", "type") if inner.get(name)]
    kind = next((one for one in kinds if one in _UPSTREAM_CODES), kinds[0] if kinds else "")
    message = str(inner.get("message") or inner.get("detail") or "")
    param = inner.get("param")
    param = param if isinstance(param, str) else None
    if _NOT_FOR_CHATGPT in message or (status == 404 and "model" in message):
        kind = "model_not_found"
    known = _UPSTREAM_CODES.get(kind)
    if known is None:
        known = _by_status(status, kind)
    own_status, code, fault = known
    if own_status == 429:
        return _limit_error(code, message, inner, retry_after, now)
    if code == "context_length_exceeded":
        message = _naming_context(message)
        param = param or "input"
    if code == "model_not_found":
        param = "model"
        message = f"{message or 'The upstream does not know this model.'} `azt models` lists what this account offers."
    headers = {"retry-after": str(min(retry_after or 5, 60))} if own_status == 503 else {}
    error_type = "authentication_error" if own_status == 401 else None
    return UpstreamError(
        own_status,
        code,
        message[:2048] or f"The upstream answered {status or 'with an error'}.",
        fault=fault,
        type=error_type,
        param=param,
        headers=headers,
    )


_BY_STATUS: dict[int, tuple[int, str, Fault]] = {
    401: (401, "account_auth_expired", "token"),
    402: (403, "upstream_forbidden", "account"),
    403: (403, "upstream_forbidden", "account"),
    413: (413, "request_too_large", "request"),
    429: (429, "rate_limit_exceeded", "account"),
    503: (503, "overloaded", "transient"),
    529: (503, "overloaded", "transient"),
}


def _by_status(status: int, kind: str) -> tuple[int, str, Fault]:
    # Inside a stream there is no status: faults of the input name themselves, the rest is the server's.
    named = status == 0 and ("image" in kind or kind.startswith("invalid_"))
    if named or status in (400, 409, 422):
        return 400, kind or "invalid_request_error", "request"
    return _BY_STATUS.get(status, (502, "upstream_error", "transient"))


def _limit_error(
    code: str, message: str, inner: Json, retry_after: int | None, now: float
) -> UpstreamError:
    """A 429 with the wait in every form clients read. A long one forbids the SDKs to sleep it out."""
    resets_at, resets_in = inner.get("resets_at"), inner.get("resets_in_seconds")
    said = _WAIT_IN_TEXT.search(message)
    known = [
        resets_at - now if isinstance(resets_at, (int, float)) and resets_at > 0 else None,
        resets_in if isinstance(resets_in, (int, float)) else None,
        retry_after,
        float(said[1]) * _UNIT_S[said[2].lower()] if said else None,
        300 if code == "usage_limit_reached" else 5,
    ]
    wait_s = next(one for one in known if one is not None)
    wait = max(1, min(math.ceil(wait_s), RETRY_AFTER_MAX_S))
    headers = {"retry-after": str(wait), **({"x-should-retry": "false"} if wait > 60 else {})}
    extra: Json = {"resets_at": int(now) + wait, "resets_in_seconds": wait}
    if isinstance(inner.get("plan_type"), str):
        extra["plan_type"] = inner["plan_type"]
    error_type = "rate_limit_error"
    message = message or f"Too many requests: try again in {wait} s."
    if code == "usage_limit_reached":
        error_type = code
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + wait))
        message = f"{message.rstrip('.')}. It resets at {when}."
    return UpstreamError(
        429, code, message, fault="account", type=error_type, headers=headers, extra=extra
    )


def _naming_context(message: str) -> str:
    """Agents look for these words to start their own compaction."""
    if re.search(r"context (length|window)", message):
        return message
    return f"{message} The input exceeds the context window of this model (context length exceeded).".strip()


def _retry_after(value: str | None, now: float) -> int | None:
    """Seconds out of a Retry-After header: a number or an HTTP date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0, min(math.ceil(seconds), RETRY_AFTER_MAX_S)) if math.isfinite(seconds) else None


class Sink(Protocol):
    """Where a `Relay` writes: the server's side of one response (room 15)."""

    def write(self, data: bytes) -> None:
        """Body bytes for the client; framing is the sink's."""

    def finish(self) -> None:
        """The body is complete."""

    def cut(self) -> None:
        """The body ends here unfinished: the client must see a broken transfer, not a short success."""


class Translator(Protocol):
    """One upstream event stream -> one answer (room 11). All of it pure."""

    done: bool
    """A terminal event was seen; what follows is ignored."""
    stopped: bool
    """The rest is not wanted (a stop string was hit): the upstream call can be ended."""
    failure: AztError | None
    """Why the answer failed, once it did."""
    usage: Json | None
    """The `usage` of the terminal event as upstream sent it, when it did."""

    def feed(self, data: bytes) -> bytes:
        """The data of one upstream SSE event -> bytes for a streaming client."""

    def absorb(self, data: bytes) -> bytes:
        """The same for a client that waits for the whole answer: keeps it, returns b""."""

    def fail(self, error: AztError) -> bytes:
        """The stream broke: the bytes that tell a streaming client so."""

    def result(self) -> Json:
        """The whole answer of a call that was absorbed."""
# What stands in when neither azt nor Codex has fetched a list: (id, name, reasoning efforts). The backend
# decides what an account may use; `azt models --refresh` asks it.
_BUILT_IN_EFFORTS = ("low", "medium", "high", "xhigh")
_BUILT_IN_MODELS = (
    ("gpt-5.4", "GPT-5.4", _BUILT_IN_EFFORTS),
    ("gpt-5.5", "GPT-5.5", _BUILT_IN_EFFORTS),
    ("gpt-6-luna", "GPT-6 Luna", (*_BUILT_IN_EFFORTS, "max")),
    ("gpt-6-sol", "GPT-6 Sol", (*_BUILT_IN_EFFORTS, "max")),
    ("gpt-6.1-sol", "GPT-6.1 Sol", (*_BUILT_IN_EFFORTS, "max")),
)


@dataclass(frozen=True)
class Catalogue:
    """The models as the backend describes them (codex-upstream.md 6.2), and where the list is from."""

    entries: tuple[Json, ...]
    source: Literal["azt", "codex", "built-in"]
    etag: str = ""
    fetched_at: int = 0

    @classmethod
    def read(cls, own: Json | None, codex: Json | None) -> Catalogue:
        """azt's own cache, else Codex's, else the built-in list. A broken one is passed over."""
        caches: tuple[tuple[Literal["azt", "codex"], Json | None], ...] = (
            ("azt", own),
            ("codex", codex),
        )
        for source, cache in caches:
            models = (cache or {}).get("models")
            entries = (
                tuple(one for one in models if _is_model(one)) if isinstance(models, list) else ()
            )
            if entries:
                fetched_at = (cache or {}).get("fetched_at")
                fetched = fetched_at if isinstance(fetched_at, int) else 0
                return cls(entries, source, str((cache or {}).get("etag") or ""), fetched)
        built_in = [
            {
                "slug": slug,
                "display_name": name,
                "supported_reasoning_levels": [{"effort": one} for one in efforts],
            }
            for slug, name, efforts in _BUILT_IN_MODELS
        ]
        return cls(tuple(built_in), "built-in")

    def to_json(self) -> Json:
        return {
            "version": 1,
            "etag": self.etag,
            "fetched_at": self.fetched_at,
            "models": list(self.entries),
        }

    @functools.cached_property
    def listed(self) -> list[Json]:
        """The entries a person may pick, in the backend's order."""
        shown = [one for one in self.entries if one.get("visibility", "list") == "list"]
        return sorted(
            shown,
            key=lambda one: priority if isinstance(priority := one.get("priority"), int) else 1_000,
        )

    @functools.cached_property
    def efforts(self) -> dict[str, tuple[str, ...]]:
        """Model id -> the reasoning efforts it supports."""
        table: dict[str, tuple[str, ...]] = {}
        for entry in self.entries:
            levels = entry.get("supported_reasoning_levels")
            named = (
                [one.get("effort") for one in levels if isinstance(one, dict)]
                if isinstance(levels, list)
                else []
            )
            table[entry["slug"]] = tuple(one for one in named if isinstance(one, str))
        return table

    def default(self, wanted: str) -> str:
        """The configured model when it is listed, else the first listed one."""
        names = [entry["slug"] for entry in self.listed or self.entries]
        return wanted if wanted in names else names[0]

    def openai_model(self, entry: Json) -> Json:
        """One entry of `/v1/models`: the four official keys, then what pickers look for."""
        window = entry.get("context_window")
        model: Json = {
            "id": entry["slug"],
            "object": "model",
            "created": 1686935002,
            "owned_by": "openai",
        }
        extras = {
            "name": entry.get("display_name"),
            "description": entry.get("description"),
            "context_length": window,
            "context_window": window,
            "max_model_len": window,
            "input_modalities": entry.get("input_modalities"),
        }
        model.update({name: value for name, value in extras.items() if value})
        return model

    def openai_models(self) -> Json:
        return {
            "object": "list",
            "data": [self.openai_model(entry) for entry in self.listed or self.entries],
        }

    def find(self, model_id: str) -> Json:
        """raises  AztError 404 naming what there is"""
        for entry in self.entries:
            if entry["slug"] == model_id:
                return self.openai_model(entry)
        known = ", ".join(entry["slug"] for entry in self.listed[:8])
        raise AztError(
            404,
            "model_not_found",
            f"The model {model_id[:80]!r} is not in the list: {known}.",
            param="model",
        )


def _is_model(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("slug"), str) and bool(entry["slug"])
@dataclass(frozen=True, slots=True)
class Credentials:
    """What one model call needs of an account. A value: it crosses threads."""

    access_token: str = field(repr=False)
    account_id: str

    def headers(self) -> dict[str, str]:
        return {
            "authorization": f"Bearer {self.access_token}",
            "chatgpt-account-id": self.account_id,
        }


@blocking
def open_stream(
    pool: ConnectionPool,
    base_url: str,
    credentials: Credentials,
    body: bytes,
    session: str,
    wire: Wire,
) -> Answer:
    """POST one turn and read the head of its answer.

    body     encoded Responses request
    session  stable per conversation: with `prompt_cache_key` it is what keeps prompt caches warm
    raises   UpstreamError also for an answer that is no event stream
    """
    headers = {
        **credentials.headers(),
        **OWN_HEADERS,
        "accept": "text/event-stream",
        "content-type": "application/json",
        "session-id": session,
        "session_id": session,
    }
    answer = open_response(pool, Call("POST", f"{base_url}/responses", headers, body), wire)
    if not answer.is_stream:
        raise upstream_error(answer.status, answer.headers, answer.body, time.time())
    return answer


@blocking
def fetch_models(
    pool: ConnectionPool, base_url: str, credentials: Credentials, etag: str, wire: Wire
) -> tuple[list[Json], str] | None:
    """The catalogue of one account and its ETag; None when `etag` is still current."""
    headers = {**credentials.headers(), **OWN_HEADERS, "accept": "application/json"}
    if etag:
        headers["if-none-match"] = etag
    url = f"{base_url}/models?client_version={CATALOGUE_CLIENT_VERSION}"
    answer = open_response(pool, Call("GET", url, headers, head_timeout_s=30.0), wire)
    if answer.status == 304:
        return None
    if answer.status != 200:
        raise upstream_error(answer.status, answer.headers, answer.body, time.time())
    value = parse_event(answer.body)
    models = (value or {}).get("models")
    if not isinstance(models, list):
        raise UpstreamError(
            502, "upstream_error", "The upstream's model list has an unknown shape."
        )
    return [model for model in models if isinstance(model, dict)], answer.headers.get("etag", "")


# Events that come before anything was generated. Overload and limits are reported after them, inside
# the 200 stream, so they are held back: until then the status is still ours (performance.md 2.10).
_HANDSHAKE = {
    "keepalive",
    "response.created",
    "response.in_progress",
    "response.metadata",
    "response.queued",
}
_FAILURES = {"error", "response.failed"}

HEARTBEAT = b": keep-alive\n\n"
"""A comment: the one form of heartbeat that every client library skips (openai-api.md 2.8)."""


def _is_handshake(kind: str) -> bool:
    return kind in _HANDSHAKE or kind.startswith(("codex.", "responsesapi."))


class Relay:
    """One upstream event stream, on the loop: socket -> Framing -> SSEParser -> Translator -> Sink.

        HELD ---first generated event, terminal event, or 15 s---> OPEN ---terminal---> ENDED
          \\--- failure event, cut, stall: `ready` raises              \\--- cut, stall: error event

    Bytes in, bytes out: no task and no thread while it runs. Nothing reaches the client in HELD, so that a
    failure can still become a status or another attempt. Ended, it reads on for the end of the body, for
    then the connection can be kept.
    """

    def __init__(
        self, pool: ConnectionPool, answer: Answer, translator: Translator, streaming: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._framing = cast(Framing, answer.framing)
        self._feed = translator.feed if streaming else translator.absorb
        self._streaming = streaming
        self._parser = SSEParser()
        self._held: list[bytes] | None = []
        self._held_bytes = 0
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._out = bytearray()
        self._sink: Sink | None = None
        self._has_content = False
        self._paused = False
        self._watching = False
        self._timer: asyncio.TimerHandle | None = None
        self.answer = answer
        self.translator = translator
        self.ended = False
        self.first_output_s: float | None = None
        self.started_s = self._last_read_s = self._last_write_s = self._loop.time()
        self.on_end: Callable[[Relay], None] | None = None

    # -- what rotation and the handlers call

    async def ready(self, hold_s: float) -> None:
        """Wait out the hold-back. Raises UpstreamError when the stream failed before it generated anything.

        hold_s  how long handshake events may be held; then the answer opens without content
        """
        rest, self.answer.rest = self.answer.rest, b""
        if rest:
            self._receive(rest)
        if self.answer.sock is not None:
            self._watch()
        opening = self._loop.call_later(hold_s, self._open_late)
        try:
            await self._ready
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            opening.cancel()

    async def whole(self) -> None:
        """Wait for the end of an absorbed answer. Raises its failure."""
        try:
            await self._over
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.translator.failure is not None:
            raise self.translator.failure

    # -- what the server calls (StreamBody)

    def start(self, sink: Sink) -> None:
        self._sink = sink
        self._flush()
        if self.ended:
            self._report()
            sink.finish()
        elif self._timer is None:
            self._tick()

    def pause(self) -> None:
        self._paused = True
        self._unwatch()

    def resume(self) -> None:
        self._paused = False
        self._last_read_s = self._loop.time()
        self._watch()

    def probe(self) -> bool:
        self._out += HEARTBEAT
        self._flush()
        return True

    def cancel(self) -> None:
        """The client left: end the upstream call now."""
        self._sink = None
        self._end()
        self._report()
        self._drop()

    def stop(self, error: AztError) -> None:
        self._fail(error)

    # -- reading

    def _watch(self) -> None:
        sock = self.answer.sock
        if sock is not None and not self._watching and not self._paused:
            self._loop.add_reader(sock.fileno(), self._readable)
            self._watching = True
            if isinstance(sock, ssl.SSLSocket) and sock.pending():
                self._loop.call_soon(self._readable)
        if self._timer is None and not self.ended:
            self._tick()

    def _unwatch(self) -> None:
        if self._watching and self.answer.sock is not None:
            self._loop.remove_reader(self.answer.sock.fileno())
        self._watching = False

    def _readable(self) -> None:
        """Take what has come. A TLS socket may hold more than one record without being readable again."""
        sock = self.answer.sock
        if sock is None or not self._watching:
            return
        try:
            data = sock.recv(READ_BYTES)
            if data and isinstance(sock, ssl.SSLSocket) and sock.pending():
                self._loop.call_soon(self._readable)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            data = b""
        self._last_read_s = self._loop.time()
        self._receive(data)

    def _receive(self, data: bytes) -> None:
        """Bytes off the socket, b"" at its end."""
        try:
            body = self._framing.feed(data) if data else b""
            events = self._parser.feed(body) if body and not self.ended else []
        except (ValueError, UpstreamError) as error:
            self._drop()
            self._fail(error if isinstance(error, UpstreamError) else _truncated())
            return
        if not self.ended:
            self._take(events)
            self._flush()
        if self._framing.ended or not data:
            self._body_over(clean=bool(data) and self.answer.keep and not self._framing.rest)

    def _take(self, events: list[bytes]) -> None:
        translator, out, feed = self.translator, self._out, self._feed
        for data in events:
            if self._held is not None:
                self._hold(data)
            elif piece := feed(data):
                out += piece
                self._has_content = True
            if translator.done or translator.stopped or self.ended:
                self._end()
                if translator.stopped:
                    self._drop()
                return

    def _hold(self, data: bytes) -> None:
        held = cast(list[bytes], self._held)
        kind = event_type(data)
        if kind in _FAILURES:
            self._fail_ready(event_error(parse_event(data) or {}, time.time()))
            return
        held.append(data)
        self._held_bytes += len(data)
        if not _is_handshake(kind) or self._held_bytes > MAX_HELD_BYTES:
            self._has_content = True
            self._open()

    def _open(self) -> None:
        """End the hold-back: what was held goes through the translator."""
        if self._held is None or self.ended:
            return
        held, self._held = self._held, None
        for data in held:
            self._out += self._feed(data)
        if not self._ready.done():
            self._ready.set_result(None)
        self._flush()

    def _open_late(self) -> None:
        """The wait is over without content: a heartbeat tells the client that someone is at work."""
        if self._held is not None and self._streaming:
            self._out += HEARTBEAT
        self._open()

    def _body_over(self, clean: bool) -> None:
        """The upstream's body or connection is at its end."""
        if clean and self.answer.sock is not None:
            self._unwatch()
            sock, self.answer.sock = self.answer.sock, None
            sock.settimeout(CONNECT_TIMEOUT_S)
            self._pool.give(self.answer.key, sock)
        self._drop()
        if not self.ended:
            self._fail(_truncated())

    # -- ending

    def _fail(self, error: AztError) -> None:
        if self.ended:
            return
        if self._held is not None:
            self._fail_ready(error)
            return
        self._out += self.translator.fail(error)
        self._end()
        self._drop()

    def _fail_ready(self, error: AztError) -> None:
        self.translator.fail(error)
        self._end()
        self._drop()
        if not self._ready.done():
            self._ready.set_exception(error)

    def _end(self) -> None:
        """The answer is complete for the client, however it went."""
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush()
        if not self._over.done():
            self._over.set_result(None)
        if self._sink is not None:
            self._report()
            self._sink.finish()
        if self.answer.sock is not None:
            # The end of the body follows the terminal event at once; who is late is not kept.
            self._loop.call_later(1.0, self._drop)

    def _report(self) -> None:
        """Tell once that the answer has ended for the client, with what was written by then."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self)

    def _drop(self) -> None:
        self._unwatch()
        self.answer.close()

    # -- writing

    def _flush(self) -> None:
        if self._sink is None or not self._out:
            return
        data = bytes(self._out)
        self._out.clear()
        self._last_write_s = self._loop.time()
        if self._has_content and self.first_output_s is None:
            self.first_output_s = self._last_write_s
        self._sink.write(data)

    def _tick(self) -> None:
        """Heartbeat and idle limit; runs only as often as the nearer of the two can come."""
        now = self._loop.time()
        if not self._paused and now - self._last_read_s >= UPSTREAM_IDLE_TIMEOUT_S:
            self._timer = None
            self._fail(
                UpstreamError(
                    504,
                    "upstream_timeout",
                    "The upstream fell silent in mid-answer.",
                    fault="transient",
                )
            )
            return
        if self._sink is not None and now - self._last_write_s >= HEARTBEAT_S:
            self.probe()
        beat = self._last_write_s + HEARTBEAT_S if self._sink is not None else now + HEARTBEAT_S
        idle = now + HEARTBEAT_S if self._paused else self._last_read_s + UPSTREAM_IDLE_TIMEOUT_S
        self._timer = self._loop.call_at(max(min(beat, idle), now + 0.01), self._tick)


def _truncated() -> UpstreamError:
    return UpstreamError(
        502,
        "upstream_stream_truncated",
        "The upstream closed the connection before the answer was complete. Send the request again.",
        fault="transient",
    )
# ==================================================================================================
# 11. Translators
#     Client requests -> Codex requests, upstream events -> answers: dict to dict. Never opens a
#     socket, never knows an account. This part is what chat and responses share.
# ==================================================================================================

REASONING_INCLUDE = "reasoning.encrypted_content"

_TYPE_WORDS = {bool: "boolean", dict: "object", float: "number", int: "integer", list: "array"}
# The fields that have one type wherever they are given; null always counts as absent.
_FIELD_TYPES: dict[type, str] = {
    bool: "background parallel_tool_calls store stream",
    dict: "metadata stream_options text web_search_options",
    int: "max_completion_tokens max_output_tokens max_tokens",
    list: "functions include messages modalities tools",
    str: "instructions previous_response_id prompt_cache_key",
}
_LIMITS = _FIELD_TYPES[int].split()

_Asked = tuple[Any, str]
"""What the client gave, or None, and the parameter that it came from."""
_Placed = tuple[Json, str]
"""A tool or an input item in Responses shape, with the client's own names; its path for errors."""
_Said = tuple[str, list[_Placed]]
"""Instructions and input items."""
_Efforts = Mapping[str, Sequence[str]]
"""Model id -> the reasoning efforts that it supports; a model may be missing."""


def _unsupported(param: str, message: str) -> BadRequest:
    return BadRequest(message, param, "unsupported_value")


def _expect(value: Any, kind: type[T], param: str) -> T:
    """`value` itself if it is exactly of this type (a boolean is no integer); null is missing."""
    if value is None:
        message = f"Missing required parameter: '{param}'."
        raise BadRequest(message, param, "missing_required_parameter")
    if type(value) is kind:
        return value
    wanted, got = (_TYPE_WORDS.get(given, "string") for given in (kind, type(value)))
    message = f"Invalid type for '{param}': expected {wanted}, got {got}."
    raise BadRequest(message, param, "invalid_type")


def _named(value: Any, param: str) -> str:
    """A name, an id or the like: a string that is not empty."""
    return _expect(value or None, str, param)


def _one_of(allowed: Iterable[str], value: Any, param: str) -> Any:
    """`value` itself if it is allowed; null is."""
    known = tuple(allowed)
    if value is None or value in known:
        return value
    listed = ", ".join(known)
    raise BadRequest(f"'{param}' is {str(value)[:60]!r}. Supported values are: {listed}.", param)


def _first(parent: Json, places: str, path: str = "") -> _Asked:
    """What stands at the first of these places that has anything; `a.b` is the member b of a."""
    for place in places.split():
        value: Any = parent
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            return value, path + place
    return None, path + places.split()[0]


def _object(parent: Any, name: str) -> Json:
    """A member that is an object, else an empty one."""
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def _flat(value: Json, path: str = "") -> _Placed:
    """Chat's `{"type": K, K: {...}}` as `{"type": K, ...}`, fresh; both are taken everywhere."""
    kind = value.get("type")
    inner = _object(value, kind) if isinstance(kind, str) else {}
    return ({**inner, "type": kind}, f"{path}.{kind}") if inner else ({**value}, path)


def _given(fields: Json) -> Json:
    """The members that say something."""
    return {name: value for name, value in fields.items() if value is not None}


def _without(fields: Json, names: Iterable[str]) -> Json:
    return {name: value for name, value in fields.items() if name not in names}


def _walk(value: Any) -> Iterator[Any]:
    """A JSON value and all values inside it, in no order to rely on."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        waiting += value.values() if isinstance(value, dict) else ()
        waiting += value if isinstance(value, list) else ()


def _digest(value: Any) -> str:
    return hashlib.sha256(encode_json(value)).hexdigest()


def _check_fields(body: Json, default_model: str) -> tuple[str, str]:
    """What both routes check first. Returns the model as the client and as upstream call it."""
    named = body.get("model")
    named = default_model if named is None else _expect(named, str, "model")
    model = _named(named.strip().removeprefix("openai/").removeprefix("azt/"), "model")
    for kind, names in _FIELD_TYPES.items():
        for name in names.split():
            if body.get(name) is not None:
                _expect(body[name], kind, name)
    return named, model


def _ignored(body: Json, names: Iterable[str]) -> tuple[str, ...]:
    """The parameters of these that were really set; a limit of -1 or 0 means "unlimited"."""
    given = [name for name in names if body.get(name) is not None and body[name] is not False]
    return tuple(name for name in given if name not in _LIMITS or body[name] > 0)


# ---- Content parts -------------------------------------------------------------------------------

_BASE64 = re.compile(r"[A-Za-z0-9+/]++={0,2}+")
_DETAILS = ("auto", "low", "high", "original")


def _data_url(url: str, param: str, code: str) -> str:
    """A data URL with its base64 in the standard alphabet, padded, without white space."""
    start = url.find(",") + 1
    if not start:
        raise BadRequest(f"'{param}' is no complete data URL: the ',' is missing.", param, code)
    is_base64 = url[:start].lower().endswith(";base64,")
    if not is_base64 or (_BASE64.fullmatch(url, start) and (len(url) - start) % 4 == 0):
        return url
    payload = re.sub(r"\s+", "", url[start:]).replace("-", "+").replace("_", "/").rstrip("=")
    if not _BASE64.fullmatch(payload) or len(payload) % 4 == 1:
        raise BadRequest(f"'{param}' is not valid base64 data.", param, code)
    return url[:start] + payload + "=" * (-len(payload) % 4)


def _image_part(part: Json, path: str) -> Json:
    """Chat `image_url` (object, string), Responses `input_image`, Anthropic `source`, `image`."""
    url, param = _first(part, "image_url.url image_url image source.url source.data", path)
    url = _named(url, param)
    if param.endswith(".data"):
        url = f"data:{_first(part, 'source.media_type')[0] or 'image/png'};base64,{url}"
    if url[:5].lower() == "data:":
        url = _data_url(url, param, "invalid_base64_image")
    elif not url[:8].lower().startswith(("http://", "https://")):
        raise BadRequest(f"'{param}' must be an http(s) URL or a data URL.", param)
    detail = _one_of(_DETAILS, *_first(part, "detail image_url.detail", path))
    return _given({"type": "input_image", "image_url": url, "detail": detail})


def _file_part(part: Json, path: str) -> Json:
    """Chat `file` (nested) or `input_file` (flat). A text file goes as text."""
    data, param = _first(part, "file.file_data file_data", path)
    link, name = (_first(part, f"file.{member} {member}")[0] for member in ("file_url", "filename"))
    if data is None and isinstance(link, str):
        return {"type": "input_file", "file_url": link}
    data = _named(data, param)
    if data[:5].lower() != "data:":
        data = f"data:application/pdf;base64,{data}"
    data = _data_url(data, param, "invalid_value")
    head = data[:100].partition(",")[0]
    if head.startswith("data:text/") and head.endswith(";base64"):
        with contextlib.suppress(ValueError):
            return {"type": "input_text", "text": base64.b64decode(data[len(head) + 1 :]).decode()}
    name = name if isinstance(name, str) and name else "file.pdf"
    return {"type": "input_file", "filename": name, "file_data": data}


_MEDIA = {"input_file": _file_part, "input_image": _image_part}
_TEXTS = ("text", "input_text", "output_text")
_INPUT_TEXTS = dict.fromkeys(_TEXTS, "input_text")
_FILES = dict.fromkeys(("file", "input_file"), "input_file")
_IMAGES = dict.fromkeys(("image", "image_url", "input_image"), "input_image")
_THOUGHTS = dict.fromkeys(("reasoning", "redacted_thinking", "thinking"), "")
# Role -> the client's name of a part -> upstream's. "" drops it: thinking is only sent encrypted.
_PARTS = {
    "assistant": {**dict.fromkeys(_TEXTS, "output_text"), **_THOUGHTS, "refusal": "refusal"},
    "developer": _INPUT_TEXTS,
    "user": {**_INPUT_TEXTS, **_FILES, **_IMAGES},
}


def _content_parts(content: Any, role: str, path: str) -> list[Json]:
    """Message content (string, null, array of parts and strings) -> fresh upstream parts."""
    parts: list[Json] = []
    content = [content or ""] if content is None or isinstance(content, str) else content
    for index, part in enumerate(_expect(content, list, path)):
        at = f"{path}[{index}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else _expect(part, dict, at)
        name = _named(part.get("type"), f"{at}.type")
        file_id, param = _first(part, "file_id file.file_id source.file_id", f"{at}.")
        if name == "input_audio":
            raise _unsupported(f"{at}.type", "The Codex models take no audio: send text or images.")
        if file_id is not None:
            raise _unsupported(param, "azt keeps no uploaded files: send the data as a data URL.")
        kind = _PARTS[role][_one_of(_PARTS[role], name, f"{at}.type")]
        if kind in _MEDIA:
            parts.append(_MEDIA[kind](part, f"{at}."))
        elif kind:
            field = "refusal" if kind == "refusal" else "text"
            parts.append({"type": kind, field: _expect(part.get(field), str, f"{at}.{field}")})
    if role == "assistant":  # upstream wants no empty text from it
        return [part for part in parts if "" not in part.values()]
    return parts or [{"type": "input_text", "text": ""}]


# ---- Tools ---------------------------------------------------------------------------------------

_SAFE_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TOOL_ALIASES = dict.fromkeys(
    ("web_search_preview", "web_search_preview_2025_03_11", "web_search_2025_08_26"), "web_search"
)
_REFUSED_TOOLS = re.compile(r"file_search|code_interpreter|computer.*|mcp")
_CHOICES = {"any": "required", "auto": "auto", "none": "none", "required": "required"}
_NAMED_TOOLS = {"custom": "custom_tool_call", "function": "function_call"}
_NOT_FOR_UPSTREAM = ("cache_control", "prompt_cache_breakpoint")


def _flat_tools(body: Json, field: str) -> Iterator[_Placed]:
    """The tools of `tools` or `functions`, fresh and in flat form."""
    for index, tool in enumerate(body.get(field) or []):
        path = f"{field}[{index}]"
        kind = _expect(tool, dict, path).get("type")
        if kind is None and ("function" in tool or "name" in tool):
            kind = "function"
        kind = _named(kind, f"{path}.type")
        if _REFUSED_TOOLS.fullmatch(kind):
            message = f"The Codex backend has no {kind!r} tool: remove it, or declare a function."
            raise _unsupported(f"{path}.type", message)
        tool, path = _flat({**tool, "type": kind}, path)
        yield {**tool, "type": _TOOL_ALIASES.get(kind, kind)}, path


class _Tools:
    """The tools of one request: what goes upstream, and the client's names there and back.

    Upstream wants names of `_SAFE_NAME`, tool hubs send longer and dotted ones. They are shortened
    the same way in every request with the same tools, so that prompts stay cacheable.

    kinds    client's name -> "custom" or "function"
    renamed  upstream name -> client's name, where they differ
    """

    def __init__(self, tools: Iterable[_Placed]) -> None:
        tools = list(tools)
        self.kinds: dict[str, str] = {}
        for tool, path in tools:
            if tool["type"] in _NAMED_TOOLS:
                self.kinds[_named(tool.get("name"), f"{path}.name")] = tool["type"]
        # Names that are fine keep themselves, whatever another one is shortened to.
        self._short = {name: name for name in self.kinds if _SAFE_NAME.fullmatch(name)}
        self.renamed: dict[str, str] = {}
        sent: dict[tuple[str, str], Json] = {}
        for tool, path in tools:  # upstream refuses duplicates: the last wins
            kind = "" if tool["type"] in _NAMED_TOOLS else tool["type"]
            sent[kind, str(tool.get("name"))] = self._upstream_tool(tool, path)
        self.upstream = list(sent.values())

    def short(self, name: str) -> str:
        """The upstream name of a tool, also of one that only the history knows."""
        if name not in self._short:
            short = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
            if len(short) > 64 and short.startswith("mcp__"):
                short = "mcp__" + short.rpartition("__")[2]
            short = short[:64]
            if short in self._short or short in self.renamed:
                short = f"{short[:51]}_{_digest(name)[:12]}"
            self._short[name] = short
            if short != name:
                self.renamed[short] = name
        return self._short[name]

    def _upstream_tool(self, tool: Json, path: str) -> Json:
        kind = tool["type"]
        if kind not in _NAMED_TOOLS:
            if place := _object(tool, "user_location"):
                tool["user_location"], _ = _flat({"type": "approximate", **place})
            return _without(tool, _NOT_FOR_UPSTREAM)
        sent = {"type": kind, "name": self.short(tool["name"])}
        if isinstance(tool.get("description"), str):
            sent["description"] = tool["description"]
        if kind == "function":
            schema = _expect(tool.get("parameters") or {}, dict, f"{path}.parameters")
            if schema.get("type") in (None, "object"):
                schema = {**schema, "type": "object", "properties": schema.get("properties") or {}}
            sent |= {"parameters": schema, "strict": tool.get("strict") is True}
        elif tool.get("format") is not None:
            sent["format"], _ = _flat(_expect(tool["format"], dict, f"{path}.format"))
        return sent

    def choice(self, choice: Any, param: str) -> str | Json | None:
        """`tool_choice`, or one of its allowed tools, for upstream; nothing where there are none."""
        if choice is None or not self.upstream:
            return None
        if isinstance(choice, str):
            choice = {"type": _one_of(_CHOICES, choice, param)}
        choice, _ = _flat(_expect(choice, dict, param))
        name, kind = choice.get("name"), str(choice.get("type"))
        kind = _TOOL_ALIASES.get(kind, kind)
        if kind in _CHOICES:
            return _CHOICES[kind]
        if kind == "allowed_tools":
            tools = (
                _expect(tool, dict, param) for tool in _expect(choice.get("tools"), list, param)
            )
            mode = _one_of(("auto", "required"), choice.get("mode") or "auto", param)
            return {
                "type": kind,
                "mode": mode,
                "tools": [self.choice(tool, param) for tool in tools],
            }
        if isinstance(name, str) and name in self.kinds:
            return {"type": self.kinds[name], "name": self.short(name)}
        if kind not in _NAMED_TOOLS and any(tool["type"] == kind for tool in self.upstream):
            return {**choice, "type": kind}
        raise BadRequest(f"'{param}' names a tool that is not in 'tools'. Add it there.", param)


# ---- Input items ---------------------------------------------------------------------------------

_ROLES = {"assistant": "assistant", "developer": "developer", "system": "developer", "user": "user"}
_PHASES = ("commentary", "final_answer")
_CALL_FIELDS = {"custom_tool_call": "input", "function_call": "arguments"}
_OUTPUTS = tuple(f"{kind}_output" for kind in _CALL_FIELDS)
_NO_RESULT = "No result was recorded for this call."


def _client_items(value: Any, find: Callable[[str], Json | None]) -> Iterator[_Placed]:
    """Responses `input` -> typed items; `find` knows the items that are only referred to."""
    value = [{"role": "user", "content": value}] if isinstance(value, str) else value
    for index, item in enumerate(_expect(value, list, "input")):
        path = f"input[{index}]"
        kind = _expect(item, dict, path).get("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference" if "id" in item else None
        kind = _named(kind, f"{path}.type")
        if kind == "message":
            _one_of(_ROLES, _named(item.get("role"), f"{path}.role"), f"{path}.role")
        if kind != "item_reference":
            yield {**item, "type": kind}, path
            continue
        item_id = _named(item.get("id"), f"{path}.id")
        if found := find(item_id):
            yield found, path
        elif not item_id.startswith("rs_"):  # reasoning can be spared, the rest cannot
            message = f"No item has the id '{item_id[:100]}': azt keeps items for a day at most."
            raise BadRequest(f"{message} Send the item itself (AI SDK: store false).", f"{path}.id")


def _upstream_item(item: Json, path: str, tools: _Tools) -> Json | None:
    """One item -> a fresh upstream item; None where nothing of it may be sent.

    Ids are dropped: with one, upstream asks for the reasoning item that belonged to it.
    """
    kind = item["type"]
    if kind == "message":
        role = _ROLES[item["role"]]
        parts = _content_parts(item.get("content"), role, f"{path}.content")
        has_phase = role == "assistant" and item.get("phase") in _PHASES
        phase = {"phase": item["phase"]} if has_phase else {}
        return {"type": kind, "role": role, "content": parts, **phase} if parts else None
    if kind in _CALL_FIELDS:
        name = _named(item.get("name"), f"{path}.name")
        text = _as_text(item.get(_CALL_FIELDS[kind]))
        # Cursor gets calls of its flat custom tools as functions and sends them back as such.
        kind = "custom_tool_call" if tools.kinds.get(name) == "custom" else kind
        text = text or ("{}" if kind == "function_call" else "")
        call = {"type": kind, "call_id": _call_id(item, path), "name": tools.short(name)}
        return {**call, _CALL_FIELDS[kind]: text}
    if kind in _OUTPUTS:
        output, is_chat = item.get("output"), path.startswith("messages")
        if isinstance(output, list):
            output = _content_parts(output, "user", path + (".content" if is_chat else ".output"))
        output = output if isinstance(output, list) else _as_text(output)
        return {"type": kind, "call_id": _call_id(item, path), "output": output}
    if kind == "reasoning":
        summary, encrypted = item.get("summary") or [], item.get("encrypted_content")
        sealed = {"type": kind, "summary": summary, "encrypted_content": encrypted}
        return sealed if encrypted else None
    return _without(item, _NOT_FOR_UPSTREAM + (() if kind == "image_generation_call" else ("id",)))


def _as_text(value: Any) -> str:
    """Some clients send objects where strings belong."""
    return value or "" if value is None or isinstance(value, str) else encode_json(value).decode()


def _call_id(item: Json, path: str) -> str:
    """Longer and odd ids, which upstream refuses, become a digest: the same for call and output."""
    call_id = _named(item.get("call_id"), f"{path}.call_id")
    return call_id if _SAFE_NAME.fullmatch(call_id) else f"call_{_digest(call_id)[:40]}"


def _pair_calls(items: Iterable[Json]) -> list[Json]:
    """Every call with exactly one output right after its batch; upstream refuses anything else.

    Of several outputs the last counts. An output without a call is dropped, so are calls without an
    output at the very end; elsewhere a missing output is replaced by a neutral sentence.
    """
    paired: list[Json] = []
    batch: list[Json] = []  # the outputs of the calls that end `paired`
    is_answered = False
    outputs: dict[str, Json] = {}  # the client's call id -> the output of its newest call
    for item in items:
        kind = item["type"]
        if kind in _OUTPUTS:
            outputs.setdefault(item["call_id"], {})["output"] = item["output"]
            is_answered = True
            continue
        if is_answered or kind not in ("reasoning", *_CALL_FIELDS):
            paired += batch
            batch, is_answered = [], False
        if kind in _CALL_FIELDS:
            given = item["call_id"]
            known = outputs.get(given, {})
            if known.get("output") == _NO_RESULT:
                continue  # the same call again
            if "call_id" in known:  # some clients count their ids anew in each turn
                known, item = {}, {**item, "call_id": f"call_{_digest([given, len(paired)])[:40]}"}
            answer = {"type": f"{kind}_output", "call_id": item["call_id"], "output": _NO_RESULT}
            outputs[given] = {**answer, **known}
            batch.append(outputs[given])
        paired.append(item)
    while len(paired) > 1 and (
        paired[-1]["type"] == "reasoning" or (batch and batch[-1]["output"] == _NO_RESULT)
    ):
        if paired.pop()["type"] in _CALL_FIELDS:
            batch.pop()
    return paired + batch


# ---- The upstream body ---------------------------------------------------------------------------

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SUMMARIES = ("auto", "concise", "detailed")
_VERBOSITIES = ("low", "medium", "high")
_FORMATS = ("text", "json_object", "json_schema")


def _upstream_body(
    body: Json, model: str, efforts: _Efforts, said: _Said, tools: _Tools, asked: dict[str, _Asked]
) -> Json:
    """The body for the backend, made of what it is known to take; what is absent is not sent."""
    instructions, placed = said
    form = _text_format(*asked["format"])
    text = _given({"format": form, "verbosity": _one_of(_VERBOSITIES, *asked["verbosity"])})
    effort = _clamp_effort(_one_of(_EFFORTS, *asked["effort"]), efforts.get(model, ()))
    reasoning = _given({"effort": effort, "summary": _one_of(_SUMMARIES, *asked["summary"])})
    converted = (_upstream_item(item, path, tools) for item, path in placed)
    items = _pair_calls(item for item in converted if item is not None)
    if not items and instructions:
        items, instructions = [_developer_item(instructions)], ""
    if not items:
        message = "Nothing to answer: send a message. Tool outputs need their calls."
        raise BadRequest(message, "messages" if body.get("messages") else "input")
    if form == {"type": "json_object"}:
        # Quirk: upstream wants the word in the input; the instructions do not count.
        contents = (item["content"] for item in items if item["type"] == "message")
        texts = (part.get("text", "") for content in contents for part in content)
        if not any("json" in text.lower() for text in texts):
            items.insert(0, _developer_item("Answer with a JSON object."))
    is_fast = body.get("service_tier") in ("priority", "fast")  # upstream refuses every other tier
    parallel = body.get("parallel_tool_calls") is not False
    sent = {
        **{"model": model, "instructions": instructions, "input": items},
        "tools": tools.upstream or None,
        "tool_choice": tools.choice(*asked["choice"]),
        "parallel_tool_calls": parallel if tools.upstream else None,
        "reasoning": reasoning or None,
        "text": text or None,
        **{"include": [REASONING_INCLUDE], "stream": True, "store": False},
        "prompt_cache_key": _session_key(body, instructions, items),
        "service_tier": "priority" if is_fast else None,
    }
    return _given(sent)


def _clamp_effort(effort: str | None, supported: Sequence[str]) -> str | None:
    """The nearest effort that the model lists; of two, the cheaper one except for xhigh and max."""
    known = [level for level in _EFFORTS if level in supported]
    if effort is None or not known:
        return effort
    wanted = _EFFORTS.index(effort)
    preferred = known[::-1] if effort in ("xhigh", "max") else known
    return min(preferred, key=lambda level: abs(_EFFORTS.index(level) - wanted))


def _text_format(value: Any, param: str) -> Json | None:
    """`response_format` (nested schema) or `text.format` (flat) -> the latter; None is text."""
    value = {"type": value} if isinstance(value, str) else value or {"type": "text"}
    kind = _named(_expect(value, dict, param).get("type"), f"{param}.type")
    if _one_of(_FORMATS, kind, f"{param}.type") != "json_schema":
        return {"type": kind} if kind == "json_object" else None
    if param == "response_format":
        _expect(value.get(kind), dict, f"{param}.{kind}")
    value, param = _flat(value, param)
    about = value.get("description")
    return {
        "type": kind,
        "name": re.sub(r"[^A-Za-z0-9_-]", "_", str(value.get("name") or "response"))[:64],
        "schema": _expect(value.get("schema"), dict, f"{param}.schema"),
        "strict": value.get("strict") is True,
        **({"description": about} if isinstance(about, str) else {}),
    }


def _developer_item(text: str) -> Json:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "role": "developer", "content": content}


def _session_key(body: Json, instructions: str, items: list[Json]) -> str:
    """One key per conversation: the backend caches and routes by it, also as a header."""
    key = body.get("prompt_cache_key")
    if isinstance(key, str) and re.fullmatch(r"[\x21-\x7e]{1,64}", key):
        return key
    first = next((item for item in items if item.get("role") == "user"), {})
    # The start of each part tells conversations apart; whole images are not worth hashing.
    values = (value for part in first.get("content", []) for value in part.values())
    opening = [str(value)[:4096] for value in values]
    return str(uuid.UUID(_digest([key, instructions, opening, body.get("user")])[:32]))


# ---- Tokens --------------------------------------------------------------------------------------

_IMAGE_BYTES = 4096  # an image or a file counts as about 1,000 tokens, whatever its size in base64
_OUTPUT_COUNTS = (
    "reasoning_tokens audio_tokens accepted_prediction_tokens rejected_prediction_tokens"
).split()


def usage_from(usage: Json | None) -> Json:
    """Upstream `usage` -> chat `usage`. Missing and odd counts are 0, never null or negative."""

    def count(source: Json, name: str) -> int:
        value = source.get(name)
        return max(0, value) if type(value) is int else 0

    usage = usage if isinstance(usage, dict) else {}
    inputs, outputs = (_object(usage, f"{side}_tokens_details") for side in ("input", "output"))
    prompt, completion = count(usage, "input_tokens"), count(usage, "output_tokens")
    input_counts = ("cached_tokens", "audio_tokens", *({"cache_write_tokens"} & inputs.keys()))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": count(usage, "total_tokens") or prompt + completion,
        "prompt_tokens_details": {name: count(inputs, name) for name in input_counts},
        "completion_tokens_details": {name: count(outputs, name) for name in _OUTPUT_COUNTS},
    }


def estimate_input_tokens(upstream: Json) -> int:
    """About one token per 4 bytes of text and tool schemas, and 4 per item. Never exact."""
    items = upstream.get("input", [])
    size = len(encode_json(upstream.get("tools", [])))
    for text in _walk([upstream.get("instructions"), items]):
        if isinstance(text, str):
            is_data = text.startswith("data:")
            size += _IMAGE_BYTES if is_data else len(text.encode("utf-8", "replace"))
    return max(1, size // 4 + 4 * len(items))
# --------------------------------------------------------------------------------------------------
# 11a. Chat Completions
# --------------------------------------------------------------------------------------------------

_CHAT_IGNORED = (
    "temperature top_p presence_penalty frequency_penalty seed logit_bias logprobs top_logprobs"
    " user prediction moderation max_tokens max_completion_tokens max_output_tokens"
).split()
# Thinking budgets of other dialects, in tokens: the first limit that holds names the effort.
_BUDGETS = ((0, "none"), (512, "minimal"), (1024, "low"), (8192, "medium"), (24576, "high"))
_SWITCHES = ("reasoning.enabled", "enable_thinking", "chat_template_kwargs.enable_thinking")


@dataclass(slots=True)
class ChatRequest:
    """A translated chat request: the upstream body, and all that the answer side must know.

    model          as the client named it; every chunk repeats it
    stop           stop strings, emulated here
    tool_names     upstream tool name -> client's name, only where they differ
    custom_nested  client's names of tools declared `{"type": "custom", "custom": {...}}`
    custom_flat    and of those declared flat (Cursor), which wants their calls as functions
    json_format    the content must be JSON only: commentary stays out of it
    ignored        parameters that have no effect upstream, for `x-azt-ignored-params`
    """

    model: str
    upstream: Json
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    tool_names: dict[str, str]
    custom_nested: frozenset[str]
    custom_flat: frozenset[str]
    legacy_functions: bool
    json_format: bool
    show_reasoning: bool
    metadata: Json | None
    ignored: tuple[str, ...]


def chat_to_responses(body: Json, efforts: _Efforts, default_model: str) -> ChatRequest:
    """Chat Completions request -> Responses request.

    body     the client's JSON, never changed. With `input` in place of `messages` it is
             Responses-shaped (Cursor) and still gets a chat answer.
    raises   BadRequest naming the first offending field

    mapped   model, messages, input, instructions, tools, functions, tool_choice, function_call,
             parallel_tool_calls, response_format, verbosity, text, reasoning_effort, reasoning,
             thinking, enable_thinking, web_search_options, prompt_cache_key, user (as a seed of
             that key only), service_tier (priority and fast)
    local    stream, stream_options.include_usage, stop, metadata, include_reasoning, extra_body
    dropped  `_CHAT_IGNORED` (refused upstream, told in `ignored`); safety_identifier, store,
             prompt_cache_retention, cache_control; every other key (upstream has an allow-list)
    refused  n other than 1, audio, file ids, unknown roles and parts, more than 4 stop strings,
             `_REFUSED_TOOLS`, previous_response_id (no state)
    source   platform.openai.com/docs/api-reference/chat
    """
    body = {**_object(body, "extra_body"), **body}
    named, model = _check_fields(body, default_model)
    stop = _check_chat(body)
    said = _chat_items(body)
    tools = _Tools(_chat_tools(body))
    # Only then the answer has the shape of before tools: `function_call`, one call.
    is_legacy = bool(body.get("functions")) and not body.get("tools")
    is_hidden = _first(body, "reasoning.exclude")[0] is True
    show_reasoning = body.get("include_reasoning") is not False and not is_hidden
    summary, _ = _first(body, "reasoning.summary")
    summary = summary if summary in _SUMMARIES else "auto"
    asked = {
        "choice": _first(body, "function_call" if is_legacy else "tool_choice"),
        "effort": _asked_effort(body),
        "format": _first(body, "response_format text.format"),
        "summary": (summary if show_reasoning else None, ""),
        "verbosity": _first(body, "verbosity text.verbosity"),
    }
    if is_legacy:
        body["parallel_tool_calls"] = False
    upstream = _upstream_body(body, model, efforts, said, tools, asked)
    custom = {name for name, kind in tools.kinds.items() if kind == "custom"}
    nested = custom & {_first(tool, "custom.name")[0] for tool in body.get("tools") or ()}
    return ChatRequest(
        model=named,
        upstream=upstream,
        stream=body.get("stream") is True,
        include_usage=_first(body, "stream_options.include_usage")[0] is True,
        stop=stop,
        tool_names=tools.renamed,
        custom_nested=frozenset(nested),
        custom_flat=frozenset(custom - nested),
        legacy_functions=is_legacy,
        json_format="format" in upstream.get("text", {}),
        show_reasoning=show_reasoning,
        metadata=body.get("metadata"),
        ignored=_ignored(body, _CHAT_IGNORED),
    )


def _check_chat(body: Json) -> tuple[str, ...]:
    """Refuse what one text answer cannot be. Returns the stop strings."""
    if "audio" in (body.get("modalities") or ()):
        raise _unsupported("modalities", "The Codex models give no audio: ask for text only.")
    if body.get("n") is not None and (body["n"] is True or body["n"] != 1):
        raise _unsupported("n", "This gateway returns a single choice; 'n' must be 1.")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else _expect(stops, list, "stop")
    if len(stops) > 4:
        raise BadRequest("'stop' takes at most 4 strings.", "stop")
    checked = [_expect(stop, str, f"stop[{index}]") for index, stop in enumerate(stops)]
    return tuple(filter(None, checked))


def _chat_tools(body: Json) -> Iterator[_Placed]:
    yield from _flat_tools(body, "tools")
    yield from _flat_tools(body, "functions")
    if (options := body.get("web_search_options")) is not None:
        known = {name: options.get(name) for name in ("search_context_size", "user_location")}
        yield {"type": "web_search", **_given(known)}, "web_search_options"


def _asked_effort(body: Json) -> _Asked:
    """The effort as OpenAI, OpenRouter, Anthropic or Qwen clients write it."""
    effort, param = _first(body, "reasoning_effort reasoning.effort reasoning")
    if effort is not None and (param != "reasoning" or isinstance(effort, str)):
        return effort, param
    is_off = any(_first(body, switch)[0] is False for switch in _SWITCHES)
    if is_off or _first(body, "thinking.type")[0] == "disabled":
        return "none", "reasoning"
    budget, param = _first(body, "reasoning.max_tokens thinking.budget_tokens")
    if type(budget) is not int:
        return None, param
    return next((word for most, word in _BUDGETS if budget <= most), "xhigh"), param


# ---- Messages ------------------------------------------------------------------------------------


def _chat_items(body: Json) -> _Said:
    """(instructions, items): leading system messages are instructions, others keep their place."""
    given = body.get("instructions") or ""
    if not body.get("messages") and body.get("input") is not None:
        if body.get("previous_response_id") is not None:
            message = "Only /v1/responses continues a stored response: send the whole input."
            raise _unsupported("previous_response_id", message)
        return given, list(_client_items(body["input"], lambda item_id: None))
    messages = _expect(body.get("messages"), list, "messages")
    if not messages:
        raise BadRequest("'messages' is empty: send at least one message.", "messages")
    placed = list(_message_items(messages))
    texts = [given]
    while placed and placed[0][0].get("role") in ("system", "developer"):
        item, path = placed.pop(0)
        parts = _content_parts(item["content"], "developer", f"{path}.content")
        texts.append("\n".join(part["text"] for part in parts))
    return "\n\n".join(filter(None, texts)), placed


def _message_items(messages: list[Any]) -> Iterator[_Placed]:
    """Chat messages -> items in Responses shape; contents stay as the client wrote them."""
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = _named(_expect(message, dict, path).get("role"), f"{path}.role")
        _one_of((*_ROLES, "tool", "function"), role, f"{path}.role")
        content = message.get("content")
        if role == "assistant":
            yield from _assistant_items(message, path)
        elif role in _ROLES:
            yield {"type": "message", "role": role, "content": content}, path
        else:
            call_id, param = _first(message, "tool_call_id toolCallId call_id", f"{path}.")
            if role == "function":  # such calls have no ids: the name finds them
                call_id = "call_fn_" + _named(message.get("name"), f"{path}.name")
            call_id = _named(call_id, param)
            yield {"type": _OUTPUTS[0], "call_id": call_id, "output": content}, path


def _assistant_items(message: Json, path: str) -> Iterator[_Placed]:
    """The text, then one item per call."""
    content = message.get("content") or []
    parts = [content] if isinstance(content, str) else _expect(content, list, f"{path}.content")
    if isinstance(message.get("refusal"), str):
        parts = [*parts, {"type": "refusal", "refusal": message["refusal"]}]
    yield {"type": "message", "role": "assistant", "content": parts}, path
    calls = _expect(message.get("tool_calls") or [], list, f"{path}.tool_calls")
    made = [(call, f"{path}.tool_calls[{number}]") for number, call in enumerate(calls)]
    if message.get("function_call") is not None:
        at = f"{path}.function_call"
        legacy = _expect(message["function_call"], dict, at)
        made.append(({**legacy, "type": "function", "id": f"call_fn_{legacy.get('name')}"}, at))
    for call, at in made:
        kind = _expect(call, dict, at).get("type") or "function"
        item_kind = _NAMED_TOOLS[_one_of(_NAMED_TOOLS, kind, f"{at}.type")]
        field = _CALL_FIELDS[item_kind]
        call_id = _named(call.get("id"), f"{at}.id")
        spec, at = _flat({**call, "type": kind}, at)
        item = {"type": item_kind, "call_id": call_id, "name": spec.get("name")}
        yield {**item, field: spec.get(field)}, at
# --------------------------------------------------------------------------------------------------
# Upstream events -> answer: what the chat and the Responses translator share, then the chat one.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Channel:
    """How one kind of growing text travels upstream: `response.<event>.delta` and `.done`.

    text   the field with the whole text, in the done event and in the part or item
    index  the event field that numbers the part; a call has one text only
    part   the events that open and close the part, where there are any
    """

    event: str
    text: str
    group: str
    index: str = ""
    part: str = ""


_CHANNELS = {
    "arguments": _Channel("function_call_arguments", "arguments", "call"),
    "input": _Channel("custom_tool_call_input", "input", "call"),
    "output_text": _Channel("output_text", "text", "message", "content_index", "content_part"),
    "reasoning_text": _Channel(
        "reasoning_text", "text", "reasoning", "content_index", "content_part"
    ),
    "refusal": _Channel("refusal", "refusal", "message", "content_index", "content_part"),
    "summary_text": _Channel(
        "reasoning_summary_text", "text", "reasoning", "summary_index", "reasoning_summary_part"
    ),
}
"""Every growing text, by the `type` of its part (for calls: by the item's field)."""

_CALL_TEXTS = {"custom_tool_call": "input", "function_call": "arguments"}


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _kind(event: Json) -> str:
    """The `type` of an event. A bare `{"error": {...}}` is an error event too."""
    return _str(event.get("type")) or ("error" if "error" in event else "")


def _group(value: Json) -> str:
    """Items of one group may answer to the same event keys."""
    return "call" if value.get("type") in _CALL_TEXTS else _str(value.get("type"))


@dataclass(slots=True)
class _Part:
    """One growing text: the inside of its JSON string literal, in pieces as they came."""

    pieces: list[bytes] = field(default_factory=list)
    annotations: list[Json] = field(default_factory=list)
    start: int = 0
    """Chat: where it begins in the whole content, in code points."""
    opened: bool = False
    told: bool = False
    closed: bool = False
    """Responses: its part was added; its text, its part was reported done."""

    def add(self, text: str) -> None:
        self.pieces.append(encode_json(text)[1:-1])

    def text(self) -> str:
        return cast(str, json.loads(b'"' + b"".join(self.pieces) + b'"'))

    def rest(self, whole: str) -> str:
        """What a snapshot adds to the text; nothing where it differs, as deltas only append."""
        said = self.text()
        return whole[len(said) :] if whole.startswith(said) else ""


@dataclass(slots=True)
class _Item:
    """One output item, as far as it is known."""

    group: str
    id: str = ""
    call_id: str = ""
    name: str = ""
    phase: str = ""
    keyed: bool = False
    parts: dict[tuple[str, int], _Part] = field(default_factory=dict)
    value: Json = field(default_factory=dict)
    """The newest snapshot from upstream."""
    index: int = -1
    """Its place in the answer, once the client was told of it."""
    custom: bool = False
    held: list[str] = field(default_factory=list)
    """Chat: call text that waits for its turn."""
    done: bool = False

    def part(self, channel: str, index: int) -> _Part:
        return self.parts.setdefault((channel, index), _Part())


class _Items:
    """The items of one answer, found by any key that an event carries (openai-api.md 3.2)."""

    def __init__(self) -> None:
        self.all: list[_Item] = []
        self._by_key: dict[tuple[str, str | int], _Item] = {}
        self._last: dict[str, _Item] = {}

    def find(self, group: str, item_id: Any, call_id: Any, index: Any) -> _Item:
        """The item that any of the keys names, else a new one. An `item_id` outranks an index."""
        keys = [
            (group, key)
            for key in (item_id, call_id, index)
            if isinstance(key, (str, int)) and key != ""
        ]
        item = next((found for key in keys if (found := self._by_key.get(key))), None)
        if item is not None and item.id and _str(item_id) not in ("", item.id):
            item = None
        if item is None:
            item = self._last.get(group)
            if item is None or (keys and item.keyed):
                item = _Item(group)
                self.all.append(item)
        item.id = item.id or _str(item_id)
        item.call_id = item.call_id or _str(call_id)
        item.keyed = item.keyed or bool(keys)
        self._by_key.update(dict.fromkeys(keys, item))
        self._last[group] = item
        return item

    def of_value(self, value: Json, index: Any) -> _Item:
        return self.find(_group(value), value.get("id"), value.get("call_id"), index)

    def of_output(self, output: Any) -> list[tuple[_Item, Json]]:
        """The items of a terminal `output`; one without an id goes by its place in its group."""
        found = []
        counts: dict[str, int] = {}
        for index, value in enumerate(_dicts(output)):
            group = _group(value)
            alike = [item for item in self.all if item.group == group]
            place = counts.get(group, 0)
            counts[group] = place + 1
            nameless = not (value.get("id") or value.get("call_id"))
            item = alike[place] if nameless and place < len(alike) else self.of_value(value, index)
            found.append((item, value))
        return found


def _is_part(part: Json) -> bool:
    kind = _str(part.get("type"))
    return kind in _CHANNELS and _CHANNELS[kind].part != ""


def _texts_of(value: Json) -> list[tuple[str, int, Json]]:
    """The texts in an item: (channel, index, the object that holds the text)."""
    call_text = _CALL_TEXTS.get(_str(value.get("type")))
    if call_text:
        return [(call_text, 0, value)]
    return [
        (part["type"], index, part)
        for parts in (value.get("summary"), value.get("content"))
        for index, part in enumerate(_dicts(parts))
        if _is_part(part)
    ]


# The values that a delta event may have for the fast path. Each is canonical JSON: `json` reads it
# and writes the same bytes again. So no \u and no \/ in the delta, and no number that is too long.
_LITERAL = rb'"([^"\\\x00-\x1f]*+(?:\\["\\bfnrt][^"\\\x00-\x1f]*+)*+)"'
_DELTA_FIELDS = {
    "content_index": rb"(0|[1-9]\d{0,8})",
    "delta": _LITERAL,
    "item_id": rb'"([!#-\[\]-~]*+)"',
    "logprobs": rb"\[\]",
    "obfuscation": rb'"[ !#-\[\]-~]*+"',
    "output_index": rb"(0|[1-9]\d{0,8})",
    "sequence_number": rb"(?:0|[1-9]\d{0,14})",
    "summary_index": rb"(0|[1-9]\d{0,8})",
    "type": rb'"(response\.[a-z_.]+)"',
}
_KEY_FIELDS = ("content_index", "item_id", "output_index", "summary_index", "type")
_MARK = "\0\u00e9"
_MARK_BYTES = b"\\u0000\xc3\xa9"


@functools.lru_cache(maxsize=64)
def _delta_shape(
    names: tuple[str, ...], space: bytes
) -> tuple[re.Pattern[bytes], int, tuple[int, ...]] | None:
    """A pattern for delta events with these members in this order.

    returns  the pattern, the group of the delta, the groups that tell whose delta it is; None when
             a member is not known
    """
    if "type" not in names or "delta" not in names or not _DELTA_FIELDS.keys() >= set(names):
        return None
    members = [b'"' + name.encode() + b'":' + space + _DELTA_FIELDS[name] for name in names]
    caught = [name for name in names if name == "delta" or name in _KEY_FIELDS]
    keys = tuple(place for place, name in enumerate(caught, 1) if name != "delta")
    pattern = re.compile(rb"\{" + (b"," + space).join(members) + rb"\}")
    return pattern, caught.index("delta") + 1, keys


@dataclass(frozen=True, slots=True)
class _Paste:
    """How a delta just like the one before becomes bytes without being decoded."""

    match: Callable[[bytes], re.Match[bytes] | None]
    delta: int
    keys: tuple[int, ...]
    known: Any
    part: _Part
    head: bytes
    tail: bytes


class _EventStream:
    """One upstream event stream -> one answer: what both protocols share.

    An event is parsed, given to the handler of its type, and what that emits is encoded. Fast path:
    after a delta whose handler did nothing but wrap the text (it sets `_plain`), a delta event with
    the same members and the same keys is pasted into the same bytes. Any other event ends that.
    """

    _handlers: Mapping[str, Callable[..., None]] = {}

    def __init__(self, now: float, fast: bool) -> None:
        self.done = False
        self.stopped = False
        self.failure: AztError | None = None
        self.usage: Json | None = None
        self._now = now
        self._fast = fast
        self._items = _Items()
        self._out: list[Json] = []
        self._plain: tuple[_Part, Json] | None = None
        self._paste: _Paste | None = None

    def _encode(self, chunk: Json) -> bytes:
        raise NotImplementedError

    def _pasted(self, paste: _Paste, literal: bytes) -> bytes:
        return paste.head + literal + paste.tail

    def _hear(self, item: _Item, channel: str, index: int, text: str) -> None:
        """Take in new text of a part."""
        raise NotImplementedError

    def _fold(self, chunk: Json) -> None:
        """Keep what the whole answer needs of a chunk."""

    def _give_up(self, error: AztError) -> None:
        """Emit the failure."""
        raise NotImplementedError

    def translate(self, event: Json) -> list[Json]:
        """One upstream event -> the chunks (chat) or events (Responses) that it causes."""
        self._out = []
        self._plain = self._paste = None
        handler = None if self.done else self._handlers.get(_kind(event))
        if handler is not None:
            handler(self, event)
        return self._out

    def feed(self, data: bytes) -> bytes:
        paste = self._paste
        if paste is not None:
            found = paste.match(data)
            if found is not None and found.group(*paste.keys) == paste.known:
                literal = found[paste.delta]
                if literal and (literal.isascii() or _is_utf8(literal)):
                    paste.part.pieces.append(literal)
                    return self._pasted(paste, literal)
        event = None if self.done else parse_event(data)
        if event is None:
            return b""
        out = b"".join(map(self._encode, self.translate(event)))
        if self._fast and self._plain is not None:
            self._arm(event, data, *self._plain)
        return out

    def absorb(self, data: bytes) -> bytes:
        event = None if self.done else parse_event(data)
        if event is not None:
            for chunk in self.translate(event):
                self._fold(chunk)
        return b""

    def fail(self, error: AztError) -> bytes:
        self._out = []
        self._paste = None
        if not self.done:
            self._give_up(error)
        return b"".join(map(self._encode, self._out))

    def _failed(self, event: Json) -> None:
        self._give_up(event_error(event, self._now))

    def _of(self, event: Json, group: str) -> _Item:
        return self._items.find(
            group, event.get("item_id"), event.get("call_id"), event.get("output_index")
        )

    def _place(self, event: Json, channel: str) -> tuple[_Item, str, int]:
        """Whose text an event is about: item, channel, index of the part."""
        known = _CHANNELS[channel]
        return self._of(event, known.group), channel, _int(event.get(known.index))

    def _delta(self, event: Json, channel: str) -> None:
        self._hear(*self._place(event, channel), _str(event.get("delta")))

    def _arm(self, event: Json, data: bytes, part: _Part, sample: Json) -> None:
        """Prepare the fast path for deltas like `data`; `sample` is a chunk with _MARK as text."""
        space = b" " if data.find(b": ") == data.find(b":") else b""
        shape = _delta_shape(tuple(event), space)
        found = shape and shape[0].fullmatch(data)
        head, mark, tail = self._encode(sample).rpartition(_MARK_BYTES)
        # A name in the chunk that is no valid Unicode makes encode_json escape all of it: no paste.
        if shape and found and mark:
            pattern, delta, keys = shape
            self._paste = _Paste(
                pattern.fullmatch, delta, keys, found.group(*keys), part, head, tail
            )


def _of_channels(
    delta: Callable[..., None], whole: Callable[..., None]
) -> dict[str, Callable[..., None]]:
    """The handlers of all delta and done events; each is told its channel."""
    endings = (("delta", delta), ("done", whole))
    return {
        f"response.{known.event}.{ending}": functools.partial(handler, channel=channel)
        for channel, known in _CHANNELS.items()
        for ending, handler in endings
    }


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _estimated_usage(upstream: Json, items: list[_Item]) -> Json:
    """Usage in upstream's shape, at four bytes a token, for an answer that came without."""
    asked = estimate_input_tokens(upstream)
    pieces = [piece for item in items for part in item.parts.values() for piece in part.pieces]
    said = math.ceil(sum(map(len, pieces)) / 4)
    return {"input_tokens": asked, "output_tokens": said, "total_tokens": asked + said}


class StopMatcher:
    """Visible text -> the part of it that may be sent (openai-api.md 1.11).

    Keeps back what may be the beginning of a stop string; `hit` once one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit = False
        self._stops = [stop for stop in stops if stop]
        self._pending = ""

    def push(self, text: str) -> str:
        pending = self._pending + text
        found = self._find(pending)
        keep = max((self._overlap(pending, stop) for stop in self._stops), default=0)
        # A longer stop string that began earlier comes first: wait until it is complete or is not.
        if 0 <= found <= len(pending) - keep:
            return self._cut(pending, found)
        self._pending = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        pending, self._pending = self._pending, ""
        found = self._find(pending)
        return pending if found < 0 else self._cut(pending, found)

    def _find(self, text: str) -> int:
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)

    def _cut(self, pending: str, at: int) -> str:
        self.hit = True
        self._pending = ""
        return pending[:at]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop` without completing it."""
        longest = min(len(stop) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


_FINISH_REASONS = {
    "content_filter": "content_filter",
    "max_output_tokens": "length",
    "max_tokens": "length",
}
"""Why an answer is incomplete -> finish_reason; every other reason counts as a normal end."""

_CHAT_PARAMS = [
    ("input", "messages"),
    ("instructions", "messages"),
    ("reasoning.effort", "reasoning_effort"),
    ("text.format", "response_format"),
    ("text.verbosity", "verbosity"),
]
"""Upstream request field (as a prefix of the error's param) -> the field of the chat client."""

_SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")
_WITHOUT_CONTENT = {"function_call", "refusal", "tool_calls"}


class ChatStream(_EventStream):
    """Upstream events -> Chat Completions chunks, or their fold (openai-api.md 2, 3).

        nothing sent --first delta--> role sent --deltas--> finish, usage, [DONE]
              \\_______________failure_______\\___________> error event, no [DONE]

    Calls go out one at a time in the order in which they got a name: `_queue` holds those not
    finished, its first one streams, the others keep their text in `held`.
    mapped   text, refusals, reasoning, function and custom calls, citations, images, usage
    dropped  hosted tool progress, partial images, encrypted reasoning, vendor events
    """

    def __init__(self, request: ChatRequest, now: float, *, fast: bool = True) -> None:
        super().__init__(now, fast)
        self._request = request
        self._envelope: Json = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(now),
            "model": request.model,
        }
        self._begun = False
        self._service_tier = ""
        self._stops = StopMatcher(request.stop)
        self._content: tuple[_Item, _Part] | None = None
        self._reasoned = False
        self._queue: list[_Item] = []
        self._calls = 0
        self._images: list[Json] = []
        self._finish_reason = "stop"
        self._texts: dict[str, list[str]] = {}
        self._folded_calls: list[tuple[Json, list[str]]] = []
        self._extras: Json = {}

    # What goes out

    def _encode(self, chunk: Json) -> bytes:
        """The SSE event of a chunk; the last chunk of a whole answer brings the [DONE] with it."""
        ended = self.done and self.failure is None and chunk is self._out[-1]
        return encode_data(chunk) + (b"data: [DONE]\n\n" if ended else b"")

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._envelope, "choices": [choice], "system_fingerprint": None}

    def _emit(self, delta: Json, finish_reason: str | None = None) -> None:
        if self.done:
            return
        if not self._begun:
            self._begun = True
            content = None if _WITHOUT_CONTENT & delta.keys() else ""
            self._out.append(self._chunk({"role": "assistant", "content": content}))
        self._out.append(self._chunk(delta, finish_reason))

    def _finish(self, finish_reason: str) -> None:
        if self.done:
            return
        self._emit({}, finish_reason)
        if self._request.include_usage:
            usage: Json = {"choices": [], "usage": self._usage(), "system_fingerprint": None}
            self._out.append({**self._envelope, **usage})
        self.done = True

    def _usage(self) -> Json:
        return usage_from(self.usage or _estimated_usage(self._request.upstream, self._items.all))

    def _give_up(self, error: AztError) -> None:
        renamed = (ours for theirs, ours in _CHAT_PARAMS if (error.param or "").startswith(theirs))
        error.param = next(renamed, error.param)
        self.failure = error
        self.done = True
        self._out.append(error_body(error))

    # Text

    def _whole(self, event: Json, channel: str) -> None:
        """Quirk: deltas may be missing and only the snapshot be there (C08, C17, C18)."""
        item, _, index = self._place(event, channel)
        self._catch_up(item, channel, index, event)
        # An empty snapshot does not end a call: the item itself may still bring the arguments.
        if item.group == "call" and item.part(channel, 0).pieces:
            item.done = True
            self._drain()

    def _part_done(self, event: Json) -> None:
        part = _dict(event.get("part"))
        if _is_part(part):
            self._catch_up(*self._place(event, part["type"]), part)

    def _catch_up(self, item: _Item, channel: str, index: int, holder: Json) -> None:
        part = item.part(channel, index)
        self._hear(item, channel, index, part.rest(_str(holder.get(_CHANNELS[channel].text))))
        # Each list is a snapshot of the same citations: only its surplus is new.
        part.annotations += _dicts(holder.get("annotations"))[len(part.annotations) :]

    def _hear(self, item: _Item, channel: str, index: int, text: str) -> None:
        if text:
            part = item.part(channel, index)
            part.add(text)
            _CHAT_SPEAKERS[channel](self, item, part, text)

    def _say_content(self, item: _Item, part: _Part, text: str) -> None:
        if self._is_aside(item):
            self._say_reasoning(item, part, text)
            return
        if len(part.pieces) == 1:
            text = self._gap_before(item, part) + text
        self._say_allowed(self._stops.push(text))
        if not self._request.stop:
            self._plain = part, self._chunk({"content": _MARK})

    def _say_allowed(self, text: str) -> None:
        """Content that passed the stop strings; the answer ends with the first of them."""
        if text:
            self._emit({"content": text})
        if self._stops.hit and not self.done:
            self.stopped = True
            self._finish("stop")

    def _is_aside(self, item: _Item) -> bool:
        """Commentary in front of JSON would make the content unreadable (openai-api.md 4.7)."""
        return item.phase == "commentary" and self._request.json_format

    def _gap_before(self, item: _Item, part: _Part) -> str:
        """Begin a part of the content: messages are set apart by a blank line."""
        gap = ""
        if self._content is not None:
            before, last = self._content
            said = last.text()
            gap = "" if before is item or said.endswith("\n") else "\n\n"
            part.start = last.start + len(said) + len(gap)
        self._content = item, part
        return gap

    def _say_refusal(self, item: _Item, part: _Part, text: str) -> None:
        self._emit({"refusal": text})
        self._plain = part, self._chunk({"refusal": _MARK})

    def _say_reasoning(self, item: _Item, part: _Part, text: str) -> None:
        if not self._request.show_reasoning:
            return
        gap = "\n\n" if self._reasoned and len(part.pieces) == 1 else ""
        self._reasoned = True
        self._emit({"reasoning_content": gap + text})
        self._plain = part, self._chunk({"reasoning_content": _MARK})

    def _cite(self, event: Json) -> None:
        item, channel, index = self._place(event, "output_text")
        item.part(channel, index).annotations += _dicts([event.get("annotation")])

    # Items and calls

    def _item_added(self, event: Json) -> None:
        value = _dict(event.get("item"))
        item = self._items.of_value(value, event.get("output_index"))
        item.phase = _str(value.get("phase"))
        item.value = value
        if item.group == "call":
            self._name(item, value)
            self._drain()

    def _item_done(self, event: Json) -> None:
        value = _dict(event.get("item"))
        self._take(self._items.of_value(value, event.get("output_index")), value)

    def _take(self, item: _Item, value: Json) -> None:
        """A finished item: whatever of it was not sent yet."""
        item.phase = item.phase or _str(value.get("phase"))
        if item.group == "call":
            self._name(item, value)
            self._end_call(item, value, value.get("status") != "incomplete")
        elif item.group == "image_generation_call":
            self._keep_image(item, value)
        else:
            for channel, index, holder in _texts_of(value):
                self._catch_up(item, channel, index, holder)

    def _name(self, item: _Item, value: Json) -> None:
        """A call can start once its name is known.

        Quirk: arguments may come before the item that names it (C13_arguments_before_item).
        """
        name = _str(value.get("name"))
        if item.name or not name:
            return
        item.name = self._request.tool_names.get(name, name)
        item.call_id = item.call_id or item.id or f"call_{secrets.token_hex(12)}"
        is_custom = value.get("type") == "custom_tool_call"
        item.custom = is_custom and item.name in self._request.custom_nested
        item.value = item.value or value
        # The legacy answer has room for one call.
        if not (self._request.legacy_functions and (self._queue or self._calls)):
            self._queue.append(item)

    def _say_call(self, item: _Item, part: _Part, text: str) -> None:
        item.held.append(text)
        self._drain()
        if self._queue and self._queue[0] is item:
            self._plain = part, self._chunk(self._call_delta(item, _MARK))

    def _end_call(self, item: _Item, value: Json, is_whole: bool) -> None:
        """Arguments that only the item has; `{}` where a whole call has none: clients parse it."""
        if item.done or not item.name:
            return
        channel = (
            _CALL_TEXTS[item.value["type"]]
            if item.value.get("type") in _CALL_TEXTS
            else "arguments"
        )
        whole = _str(value.get(channel)) or _str(item.value.get(channel))
        self._hear(item, channel, 0, item.part(channel, 0).rest(whole))
        if is_whole and channel == "arguments" and not item.part(channel, 0).pieces:
            self._hear(item, channel, 0, "{}")
        item.done = True
        self._drain()

    def _drain(self) -> None:
        """Send what the first unfinished call holds; start the next one when it is finished.

        Quirk: parallel calls may come interleaved (C11_interleaved_calls).
        """
        while self._queue and not self.done:
            call = self._queue[0]
            if call.index < 0:
                self._start(call)
            if call.held:
                self._emit(self._call_delta(call, "".join(call.held)))
                call.held.clear()
            if not call.done:
                return
            self._queue.pop(0)

    def _start(self, call: _Item) -> None:
        self._say_allowed(self._stops.flush())
        call.index = self._calls
        self._calls += 1
        delta = self._call_delta(call, "")
        if self._request.legacy_functions:
            delta["function_call"] = {"name": call.name, **delta["function_call"]}
        else:
            [entry] = delta["tool_calls"]
            kind = "custom" if call.custom else "function"
            head = {"index": call.index, "id": call.call_id, "type": kind}
            delta["tool_calls"] = [{**head, kind: {"name": call.name, **entry[kind]}}]
        self._emit(delta)

    def _call_delta(self, call: _Item, text: str) -> Json:
        if self._request.legacy_functions:
            return {"function_call": {"arguments": text}}
        # A flat custom tool is a function to its client, as no SDK reads custom chunks.
        inner = {"custom": {"input": text}} if call.custom else {"function": {"arguments": text}}
        return {"tool_calls": [{"index": call.index, **inner}]}

    def _keep_image(self, item: _Item, value: Json) -> None:
        data = _str(value.get("result"))
        if data and not item.done:
            item.done = True
            url = f"data:image/{_str(value.get('output_format')) or 'png'};base64,{data}"
            self._images.append({"type": "image_url", "image_url": {"url": url}})

    # The beginning and the end

    def _remember(self, event: Json) -> None:
        response = _dict(event.get("response"))
        self._service_tier = _str(response.get("service_tier")) or self._service_tier
        if self._begun:
            return
        if _str(response.get("id")):
            self._envelope["id"] = f"chatcmpl-{response['id'].removeprefix('resp_')}"
        created = response.get("created_at")
        if isinstance(created, (int, float)) and math.isfinite(created):
            self._envelope["created"] = int(created)

    def _end(self, event: Json) -> None:
        self._remember(event)
        response = _dict(event.get("response"))
        self.usage = _dict(response.get("usage")) or None
        for item, value in self._items.of_output(response.get("output")):
            self._take(item, value)
        reason = _str(_dict(response.get("incomplete_details")).get("reason"))
        for call in list(self._queue):
            self._end_call(call, {}, event["type"] == "response.completed" and not reason)
        if self._content is None and not self._calls:
            self._say_asides()
        self._say_allowed(self._stops.flush())
        self._emit_extras()
        normal = "stop" if not self._calls else "tool_calls"
        if self._calls and self._request.legacy_functions:
            normal = "function_call"
        self._finish(_FINISH_REASONS.get(reason, normal))

    def _say_asides(self) -> None:
        """Commentary that turned out to be the only text is the answer."""
        asides = [item for item in self._items.all if self._is_aside(item)]
        texts = [part.text() for item in asides for part in item.parts.values()]
        if texts:
            self._emit({"content": "\n\n".join(texts)})

    def _emit_extras(self) -> None:
        """All citations in one chunk, all images in one: SDK helpers cannot merge several."""
        cited = [
            _citation(annotation, part.start)
            for item in self._items.all
            for (channel, _), part in item.parts.items()
            for annotation in part.annotations
            if channel == "output_text" and annotation.get("type") == "url_citation"
        ]
        if cited:
            self._emit({"annotations": cited})
        if self._images:
            self._emit({"images": self._images})

    # The whole answer

    def _fold(self, chunk: Json) -> None:
        for choice in chunk.get("choices", ()):
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            for name, value in choice["delta"].items():
                if name in ("content", "reasoning_content", "refusal"):
                    self._texts.setdefault(name, []).append(value or "")
                elif name == "function_call":
                    self._fold_call({"index": 0, "function_call": value})
                elif name == "tool_calls":
                    self._fold_call(value[0])
                elif name != "role":
                    self._extras[name] = value

    def _fold_call(self, call: Json) -> None:
        if call["index"] == len(self._folded_calls):
            self._folded_calls.append((call, []))
        first, texts = self._folded_calls[call["index"]]
        texts += [
            call[kind][_CHAT_CALL_TEXTS[kind]] for kind in call.keys() & _CHAT_CALL_TEXTS.keys()
        ]

    def result(self) -> Json:
        texts = {name: "".join(pieces) for name, pieces in self._texts.items()}
        calls = [_joined_call(call, texts) for call, texts in self._folded_calls]
        content = texts.get("content") or (None if calls or texts.get("refusal") else "")
        message: Json = {
            "role": "assistant",
            "content": content,
            "refusal": texts.get("refusal"),
            "annotations": [],
            **self._extras,
        }
        if texts.get("reasoning_content"):
            message["reasoning_content"] = texts["reasoning_content"]
        if calls and self._request.legacy_functions:
            message["function_call"] = calls[0]["function_call"]
        elif calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason,
        }
        tier = {"service_tier": self._service_tier} if self._service_tier in _SERVICE_TIERS else {}
        return {
            **self._envelope,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
            **tier,
            "system_fingerprint": None,
        }


_CHAT_CALL_TEXTS = {"custom": "input", "function": "arguments", "function_call": "arguments"}


def _joined_call(call: Json, texts: list[str]) -> Json:
    """The first chunk of a call with the text of all of them."""
    [kind] = call.keys() & _CHAT_CALL_TEXTS.keys()
    whole = {**call, kind: {**call[kind], _CHAT_CALL_TEXTS[kind]: "".join(texts)}}
    del whole["index"]
    return whole


def _citation(annotation: Json, start: int) -> Json:
    """A flat upstream citation, nested as chat has it, with offsets into the whole content."""
    return {
        "type": "url_citation",
        "url_citation": {
            "start_index": _int(annotation.get("start_index")) + start,
            "end_index": _int(annotation.get("end_index")) + start,
            "url": _str(annotation.get("url")),
            "title": _str(annotation.get("title")),
        },
    }


_CHAT_SPEAKERS = {
    "arguments": ChatStream._say_call,
    "input": ChatStream._say_call,
    "output_text": ChatStream._say_content,
    "reasoning_text": ChatStream._say_reasoning,
    "refusal": ChatStream._say_refusal,
    "summary_text": ChatStream._say_reasoning,
}

ChatStream._handlers = {
    "error": ChatStream._failed,
    "response.completed": ChatStream._end,
    "response.content_part.done": ChatStream._part_done,
    "response.created": ChatStream._remember,
    "response.failed": ChatStream._failed,
    "response.in_progress": ChatStream._remember,
    "response.incomplete": ChatStream._end,
    "response.output_item.added": ChatStream._item_added,
    "response.output_item.done": ChatStream._item_done,
    "response.output_text.annotation.added": ChatStream._cite,
    "response.queued": ChatStream._remember,
    "response.reasoning_summary_part.done": ChatStream._part_done,
    **_of_channels(ChatStream._delta, ChatStream._whole),
}
# --------------------------------------------------------------------------------------------------
# 11b. Responses
# --------------------------------------------------------------------------------------------------

_RESPONSES_IGNORED = (
    "temperature top_p top_logprobs truncation max_tool_calls max_output_tokens"
).split()
_RESPONSES_REFUSED = {
    "background": "azt runs no background jobs: leave 'background' out and stream the answer.",
    "conversation": "azt keeps no conversations: use 'previous_response_id' or send all of it.",
    "prompt": "azt keeps no prompt templates: send 'instructions' and 'input'.",
}
_INCLUDES = (
    "code_interpreter_call.outputs computer_call_output.output.image_url file_search_call.results"
    f" message.input_image.image_url web_search_call.action.sources {REASONING_INCLUDE}"
).split()
# What a Response object repeats of its request, and what it says where the request said nothing.
_ECHO_NULLS = (
    "instructions max_output_tokens max_tool_calls previous_response_id prompt_cache_key"
    " safety_identifier user"
).split()
_ECHO_DEFAULTS: Json = {
    **dict.fromkeys(_ECHO_NULLS),
    **{"background": False, "metadata": {}, "parallel_tool_calls": True, "service_tier": "default"},
    **{"store": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_logprobs": 0},
    **{"top_p": 1.0, "truncation": "disabled"},
}
_ID_PREFIXES = {
    **{"custom_tool_call": "ctc", "custom_tool_call_output": "ctco", "function_call": "fc"},
    **{"function_call_output": "fco", "image_generation_call": "ig", "message": "msg"},
    **{"reasoning": "rs", "web_search_call": "ws"},
}
_ASKED = {
    **{"choice": "tool_choice", "effort": "reasoning.effort", "format": "text.format"},
    "summary": "reasoning.summary reasoning.generate_summary",
    "verbosity": "text.verbosity",
}


@dataclass(slots=True)
class ResponsesRequest:
    """A translated Responses request: the upstream body, and all that the answer side must know.

    store           the client's view (absent means True); upstream never stores
    echo            the fields of the Response object that repeat the client's request
    tool_names      upstream tool name -> client's name, only where they differ
    input_items     the whole input in client shape, earlier turns included, each item with an id
    show_encrypted  the client asked to see encrypted reasoning
    ignored         parameters that have no effect upstream, for `x-azt-ignored-params`
    """

    model: str
    upstream: Json
    stream: bool
    store: bool
    echo: Json
    tool_names: dict[str, str]
    input_items: list[Json]
    show_encrypted: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: Json
    """The Response object as the client got it."""
    input_items: list[Json]
    output_items: list[Json]
    """With encrypted reasoning, also where the client did not see it."""
    size_bytes: int
    expires_at: float


class ResponseStore:
    """Finished responses in memory, for `previous_response_id` and `item_reference`.

    Bounded by count, bytes and age; the oldest goes first. Never on disk: prompts are private.
    """

    def __init__(self) -> None:
        self._responses: dict[str, StoredResponse] = {}
        self._items: dict[str, tuple[str, Json]] = {}
        self.size_bytes = 0

    def put(
        self, response: Json, input_items: list[Json], output_items: list[Json], now: float
    ) -> None:
        """Remember a response under its id. One that exceeds the bound alone is not kept."""
        response_id = response["id"]
        self.delete(response_id)
        # Roughly the memory of its values, without encoding them.
        values = _walk([response, input_items, output_items])
        size = sum(100 + len(value) if isinstance(value, str) else 100 for value in values)
        if size > STORED_RESPONSES_BYTES:
            return
        self.size_bytes += size
        self._responses[response_id] = StoredResponse(
            response, input_items, output_items, size, now + STORED_RESPONSES_TTL_S
        )
        for item in (*input_items, *output_items):
            self._items[item["id"]] = (response_id, item)
        self._make_room(now)

    def get(self, response_id: str, now: float) -> StoredResponse | None:
        self._make_room(now)
        return self._responses.get(response_id)

    def item(self, item_id: str, now: float) -> Json | None:
        """An input or output item of any stored response."""
        self._make_room(now)
        return self._items.get(item_id, (None, None))[1]

    def delete(self, response_id: str) -> bool:
        """Forget a response and its items; False when there was none."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self.size_bytes -= stored.size_bytes
        for item in (*stored.input_items, *stored.output_items):
            # A later turn repeats the items of an earlier one and owns them from then on.
            if self._items.get(item["id"], ("", {}))[0] == response_id:
                del self._items[item["id"]]
        return True

    def _make_room(self, now: float) -> None:
        while self._responses:
            oldest, stored = next(iter(self._responses.items()))
            too_many = len(self._responses) > STORED_RESPONSES_MAX
            too_large = self.size_bytes > STORED_RESPONSES_BYTES
            if not too_many and not too_large and now < stored.expires_at:
                return
            self.delete(oldest)


def input_items_page(stored: StoredResponse, query: Mapping[str, str]) -> Json:
    """One page of GET /v1/responses/{id}/input_items: limit (1..100), order, after, include."""
    limit = query.get("limit", "20")
    if not re.fullmatch(r"[1-9][0-9]?|100", limit):
        raise BadRequest("'limit' must be a number from 1 to 100.", "limit")
    order = _one_of(("asc", "desc"), query.get("order", "desc"), "order")
    items = stored.input_items[:: 1 if order == "asc" else -1]
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise BadRequest(f"No input item has the id {after[:100]!r}.", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    shown = query.get("include", "") + query.get("include[]", "")
    return {
        "object": "list",
        "data": page if REASONING_INCLUDE in shown else [*map(_without_encrypted, page)],
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def _without_encrypted(item: Json) -> Json:
    return _without(item, ["encrypted_content"]) if item["type"] == "reasoning" else item


def responses_to_upstream(
    body: Json, efforts: _Efforts, default_model: str, store: ResponseStore, now: float
) -> ResponsesRequest:
    """Responses request -> the subset that the Codex backend takes.

    body     the client's JSON, never changed
    raises   BadRequest naming the first offending field

    mapped   model, input, messages (where input is missing), instructions, tools, tool_choice,
             parallel_tool_calls, reasoning (effort, summary, generate_summary), text, include
             (known values, always with encrypted reasoning), prompt_cache_key, service_tier
             (priority, fast), strict of a function (absent: true where the schema allows it)
    local    stream, store, metadata, previous_response_id and item_reference (out of `store`)
    dropped  `_RESPONSES_IGNORED` (refused upstream; in `ignored` and echoed); user,
             safety_identifier, stream_options and every other key (upstream has an allow-list);
             reasoning items without encrypted content and item ids (upstream stores nothing)
    refused  `_RESPONSES_REFUSED`, `_REFUSED_TOOLS`, audio, unknown response, item and file ids
    source   platform.openai.com/docs/api-reference/responses
    """
    named, model = _check_fields(body, default_model)
    _expect(body.get("reasoning") or {}, dict, "reasoning")
    for name, reason in _RESPONSES_REFUSED.items():
        if body.get(name) not in (None, False):
            raise BadRequest(reason, name, "unsupported_parameter")
    said = _chain(body, store, now)
    tools = _Tools(map(_strict_by_default, _flat_tools(body, "tools")))
    asked = {name: _first(body, places) for name, places in _ASKED.items()}
    upstream = _upstream_body(body, model, efforts, said, tools, asked)
    include = [known for known in _INCLUDES if known in (body.get("include") or [])]
    upstream["include"] = [*dict.fromkeys((*include, REASONING_INCLUDE))]
    echo = {name: body[name] for name in _ECHO_DEFAULTS if body.get(name) is not None}
    text = {"format": {"type": "text"}, "verbosity": "medium", **_given(_object(body, "text"))}
    reasoning = {name: asked[name][0] for name in ("effort", "summary")}
    return ResponsesRequest(
        model=named,
        upstream=upstream,
        stream=body.get("stream") is True,
        store=body.get("store") is not False,
        echo={**_ECHO_DEFAULTS, **echo, "model": named, "reasoning": reasoning, "text": text},
        tool_names=tools.renamed,
        input_items=[item for item, _ in said[1]],
        show_encrypted=REASONING_INCLUDE in include,
        ignored=_ignored(body, _RESPONSES_IGNORED),
    )


def _chain(body: Json, store: ResponseStore, now: float) -> _Said:
    """(instructions, the earlier and the new items in client shape, each with an id)."""
    instructions, previous = body.get("instructions") or "", body.get("previous_response_id")
    earlier: list[Json] = []
    if previous is not None:
        stored = store.get(previous, now)
        if stored is None:
            message = f"Previous response with id '{previous[:100]}' not found: azt keeps responses"
            message += " for a day at most. Send the whole input instead."
            raise BadRequest(message, "previous_response_id", "previous_response_not_found")
        earlier = [*stored.input_items, *stored.output_items]
    value = body.get("input")
    if value is None and body.get("messages") is not None:
        instructions, new = _chat_items(body)
    else:
        value = [] if value is None and previous is not None else value
        new = list(_client_items(value, lambda item_id: store.item(item_id, now)))
    chain = [(item, "previous_response_id") for item in earlier]
    # A client may send the previous id and, all the same, references to its items.
    known = {item["id"] for item in earlier}
    placed = ((_with_id(item), path) for item, path in new)
    return instructions, chain + [(item, path) for item, path in placed if item["id"] not in known]


def _with_id(item: Json) -> Json:
    """The item as `input_items` lists it: with an id, its content as parts."""
    kind, item_id = item["type"], item.get("id")
    if not isinstance(item_id, str) or not item_id:
        item_id = f"{_ID_PREFIXES.get(kind, 'item')}_{secrets.token_hex(20)}"
    item = {**item, "id": item_id}
    if kind == "message" and isinstance(item.get("content"), str):
        said = "output_text" if item["role"] == "assistant" else "input_text"
        item["content"] = [{"type": said, "text": item["content"]}]
    return item


def _strict_by_default(placed: _Placed) -> _Placed:
    """Responses functions are strict unless they say otherwise, where their schema can be."""
    tool, _ = placed
    if tool["type"] == "function" and tool.get("strict") is None:
        schema = _object(tool, "parameters")
        tool["strict"] = "properties" in schema and all(map(_is_closed, _walk(schema)))
    return placed


def _is_closed(value: Any) -> bool:
    """Whether an object schema forbids extra properties and requires all that it has."""
    schema = value if isinstance(value, dict) else {}
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") != "object" and "properties" not in schema:
        return True
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    return schema.get("additionalProperties") is False and {*properties} <= {*map(str, required)}
_BLANK_ITEMS: dict[str, Json] = {
    "custom_tool_call": {"status": "in_progress", "input": ""},
    "function_call": {"status": "in_progress", "arguments": ""},
    "message": {"status": "in_progress", "role": "assistant", "content": []},
    "reasoning": {"summary": []},
}
"""What an item is when it is announced: its texts follow as deltas."""

_HOSTED_EVENTS = {
    "audio": ("", "delta done"),
    "audio.transcript": ("", "delta done"),
    "code_interpreter_call": ("code_interpreter_call", "in_progress interpreting completed"),
    "code_interpreter_call_code": ("code_interpreter_call", "delta done"),
    "compaction": ("", "compacting"),
    "file_search_call": ("file_search_call", "in_progress searching completed"),
    "image_generation_call": (
        "image_generation_call",
        "in_progress generating partial_image completed",
    ),
    "mcp_call": ("mcp_call", "in_progress completed failed"),
    "mcp_call_arguments": ("mcp_call", "delta done"),
    "mcp_list_tools": ("mcp_list_tools", "in_progress completed failed"),
    "shell_call_command": ("shell_call", "added delta done"),
    "shell_call_output_content": ("shell_call_output", "delta done"),
    "web_search_call": ("web_search_call", "in_progress searching completed"),
}
"""Official events that are passed on: `response.<name>.<ending>` -> the type of their item."""


class ResponsesStream(_EventStream):
    """Upstream events -> Responses events as the SDK helpers demand them (openai-api.md 4.3 - 4.5).

        nothing sent --> created --> per item: added, deltas, done --> completed | incomplete
                            \\_________________failure______________> failed

    What upstream leaves out is made up: `created`, `added` and `done` of items and parts, deltas
    that only a snapshot has, ids, the final `output`. Items are numbered as they appear.
    mapped   every official event, renumbered; items with the client's tool names
    dropped  vendor events and obfuscation; encrypted reasoning, unless the client asked for it
    """

    def __init__(self, request: ResponsesRequest, now: float, *, fast: bool = True) -> None:
        super().__init__(now, fast)
        self._request = request
        self.response: Json = {}
        """The final object, once `done`."""
        self.output_items: list[Json] = []
        """Its output with encrypted reasoning, for the store."""
        self._id = f"resp_{secrets.token_hex(24)}"
        self._created_at = int(now)
        self._upstream: Json = {}
        self._begun = False
        self._sequence = 0
        self._opened: list[_Item] = []
        self._ahead = self._between = b""

    # What goes out

    def _encode(self, chunk: Json) -> bytes:
        return encode_event(chunk)

    def _arm(self, event: Json, data: bytes, part: _Part, sample: Json) -> None:
        super()._arm(event, data, part, sample)
        if self._paste is not None:
            self._ahead, _, self._between = self._paste.head.partition(b'"sequence_number":0')

    def _pasted(self, paste: _Paste, literal: bytes) -> bytes:
        number = b'"sequence_number":%d' % self._sequence
        self._sequence += 1
        return self._ahead + number + self._between + literal + paste.tail

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._send("response.created", {"response": self._response("in_progress", [])})

    def _send(self, kind: str, fields: Json) -> None:
        self._begin()
        self._out.append({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1

    def _response(self, status: str, output: list[Json]) -> Json:
        """The Response object: the client's own request back, and what became of it."""
        came = {name: self._upstream[name] for name in _FROM_UPSTREAM if self._upstream.get(name)}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self._request.echo,
            "model": self._request.model,
            **came,
            "output": output,
            "usage": None,
        }

    def _shown(self, item: _Item, value: Json) -> Json:
        """An item as the client sees it: its own tool names, ids that never change."""
        shown = {**value, "id": item.id}
        if item.group == "call":
            shown["call_id"] = item.call_id
            shown["name"] = self._request.tool_names.get(value["name"], value["name"])
        return shown

    def _visible(self, item: _Item, value: Json) -> Json:
        shown = self._shown(item, value)
        return shown if self._request.show_encrypted else _without_encrypted(shown)

    # Items and parts

    def _open(self, item: _Item) -> bool:
        """Announce the item. False while a call has no name to be announced by."""
        if item.index >= 0:
            return True
        if item.group == "call" and not _str(item.value.get("name")):
            return False
        kind = _str(item.value.get("type")) or item.group
        blank = _BLANK_ITEMS.get(kind, {"status": "in_progress"})
        item.value = {"type": kind, **item.value}
        item.id = item.id or f"{_ID_PREFIXES.get(kind, 'item')}_{secrets.token_hex(24)}"
        item.call_id = item.call_id or item.id
        item.index = len(self._opened)
        self._opened.append(item)
        added = self._visible(item, {**item.value, **blank})
        self._send("response.output_item.added", {"output_index": item.index, "item": added})
        for (channel, index), part in item.parts.items():
            if part.pieces:
                self._grow(item, channel, index, part.text())
        return True

    def _at(self, item: _Item, channel: str, index: int) -> Json:
        at = {"item_id": item.id, "output_index": item.index}
        name = _CHANNELS[channel].index
        return {**at, name: index} if name else at

    def _open_part(self, item: _Item, channel: str, index: int) -> None:
        part = item.part(channel, index)
        if not part.opened and _CHANNELS[channel].part:
            part.opened = True
            blank = _part_value(channel, _Part())
            self._send(
                f"response.{_CHANNELS[channel].part}.added",
                {**self._at(item, channel, index), "part": blank},
            )

    def _hear(self, item: _Item, channel: str, index: int, text: str) -> None:
        """New text: sent as a delta, or kept until its call has a name."""
        if text and not item.done:
            opened = self._open(item)
            item.part(channel, index).add(text)
            if opened:
                self._grow(item, channel, index, text)

    def _grow(self, item: _Item, channel: str, index: int, text: str) -> None:
        self._open_part(item, channel, index)
        fields = {**self._at(item, channel, index), "delta": text}
        if channel == "output_text":
            fields["logprobs"] = []
        kind = f"response.{_CHANNELS[channel].event}.delta"
        self._send(kind, fields)
        sample = {"type": kind, "sequence_number": 0, **fields, "delta": _MARK}
        self._plain = item.part(channel, index), sample

    def _tell(self, item: _Item, channel: str, index: int, holder: Json) -> bool:
        """A text is complete: what was missing of it, then its done event, once."""
        known = _CHANNELS[channel]
        part = item.part(channel, index)
        whole = _str(holder.get(known.text)) or part.text()
        self._hear(item, channel, index, part.rest(whole))
        if item.done or not self._open(item):
            return False
        self._open_part(item, channel, index)
        if not part.told:
            part.told = True
            fields = {**self._at(item, channel, index), known.text: whole}
            if channel == "output_text":
                fields["logprobs"] = []
            if channel == "arguments":
                fields["name"] = self._shown(item, item.value)["name"]
            self._send(f"response.{known.event}.done", fields)
        return True

    def _settle(self, item: _Item, channel: str, index: int, holder: Json) -> None:
        """A text and the part around it are complete."""
        known = _CHANNELS[channel]
        if not self._tell(item, channel, index, holder) or not known.part:
            return
        part = item.part(channel, index)
        if not part.closed:
            part.closed = True
            value = {**_part_value(channel, part), **holder}
            self._send(
                f"response.{known.part}.done", {**self._at(item, channel, index), "part": value}
            )

    def _close(self, item: _Item, status: str) -> None:
        """An item is complete: its texts, then its done event, once."""
        if item.done or not self._open(item):
            return
        item.value = self._complete(item, status)
        for channel, index, holder in _texts_of(item.value):
            self._settle(item, channel, index, holder)
        item.done = True
        shown = self._visible(item, item.value)
        self._send("response.output_item.done", {"output_index": item.index, "item": shown})

    def _complete(self, item: _Item, status: str) -> Json:
        """The item with everything that its type must have; gaps are filled from the deltas."""
        kind = item.value["type"]
        value: Json = {"id": item.id, "type": kind, **_BLANK_ITEMS.get(kind, {}), **item.value}
        built: dict[str, list[Json]] = {}
        for (channel, _), part in sorted(item.parts.items(), key=lambda entry: entry[0][1]):
            if not _CHANNELS[channel].part:
                value[_CHANNELS[channel].text] = (
                    _str(value.get(_CHANNELS[channel].text)) or part.text()
                )
            elif part.opened:
                place = "summary" if channel == "summary_text" else "content"
                built.setdefault(place, []).append(_part_value(channel, part))
        for place, parts in built.items():
            value[place] = value.get(place) or parts
        if kind == "message":
            value["content"] = [
                {**_part_value(_str(part.get("type")), _Part()), **part}
                for part in _dicts(value["content"])
            ]
        if kind != "reasoning" and value.get("status") in (None, "in_progress"):
            value["status"] = status
        return value

    # Events

    def _lifecycle(self, event: Json) -> None:
        self._remember(event)
        if event["type"] != "response.created":
            self._send(event["type"], {"response": self._response("in_progress", [])})
        else:
            self._begin()

    def _remember(self, event: Json) -> None:
        self._upstream = {**self._upstream, **_dict(event.get("response"))}
        if not self._begun:
            self._id = _str(self._upstream.get("id")) or self._id
            created = self._upstream.get("created_at")
            if isinstance(created, (int, float)) and math.isfinite(created):
                self._created_at = int(created)

    def _item_added(self, event: Json) -> None:
        item = self._item_of(event)
        if item is not None and not item.done:
            self._open(item)

    def _item_done(self, event: Json) -> None:
        item = self._item_of(event)
        if item is not None:
            self._close(item, "completed")

    def _item_of(self, event: Json) -> _Item | None:
        value = _dict(event.get("item"))
        if not _str(value.get("type")):
            return None
        item = self._items.of_value(value, event.get("output_index"))
        if not item.done:
            item.value = {**item.value, **value}
        return item

    def _part_added(self, event: Json) -> None:
        part = _dict(event.get("part"))
        if _is_part(part):
            item, channel, index = self._place(event, part["type"])
            if not item.done and self._open(item):
                self._open_part(item, channel, index)

    def _part_done(self, event: Json) -> None:
        part = _dict(event.get("part"))
        if _is_part(part):
            self._settle(*self._place(event, part["type"]), part)

    def _whole(self, event: Json, channel: str) -> None:
        self._tell(*self._place(event, channel), event)

    def _cite(self, event: Json) -> None:
        item, channel, index = self._place(event, "output_text")
        if item.done:
            return
        self._open(item)
        self._open_part(item, channel, index)
        cited = item.part(channel, index).annotations
        annotation = _dict(event.get("annotation"))
        at = {**self._at(item, channel, index), "annotation_index": len(cited)}
        cited.append(annotation)
        self._send("response.output_text.annotation.added", {**at, "annotation": annotation})

    def _pass_on(self, event: Json, item_type: str) -> None:
        fields = {
            name: value for name, value in event.items() if name not in ("type", "sequence_number")
        }
        if item_type:
            item = self._of(event, item_type)
            self._open(item)
            fields |= {"item_id": item.id, "output_index": item.index}
        self._send(event["type"], fields)

    # The end

    def _end(self, event: Json) -> None:
        self._remember(event)
        self.usage = _dict(self._upstream.get("usage")) or None
        status = event["type"].removeprefix("response.")
        for item, value in self._items.of_output(self._upstream.get("output")):
            # Quirk: the terminal output is often empty or partial (R02_output_empty).
            told = {name: field for name, field in value.items() if field not in (None, "", [], {})}
            item.value = {**item.value, **told}
            self._close(item, status)
        for item in self._items.all:
            self._close(item, status)
        self._conclude(status)

    def _give_up(self, error: AztError) -> None:
        self.failure = error
        self._conclude("failed")

    def _conclude(self, status: str) -> None:
        values = [(item, self._complete(item, "incomplete")) for item in self._opened]
        self.output_items = [self._shown(item, value) for item, value in values]
        self.response = self._response(
            status, [self._visible(item, value) for item, value in values]
        )
        if self.failure is not None:
            code = _SDK_CODES.get(self.failure.code, self.failure.code)
            self.response["error"] = {"code": code, "message": mask(self.failure.message)}
        else:
            usage = self.usage or _estimated_usage(self._request.upstream, self._items.all)
            self.response["usage"] = _whole_usage(usage)
        if status == "completed":
            self.response["completed_at"] = self.response["completed_at"] or max(
                int(self._now), self._created_at
            )
        self._send(f"response.{status}", {"response": self.response})
        self.done = True

    def result(self) -> Json:
        return self.response


_SDK_CODES = {None: "server_error", "upstream_error": "server_error"}
"""Our error code -> the one in the SDKs' type, where that says the same."""

_FROM_UPSTREAM = ("completed_at", "incomplete_details", "service_tier", "tool_usage")
"""Fields of the upstream's response object that the client's request does not decide."""


def _part_value(channel: str, part: _Part) -> Json:
    """A part in full, with the lists that clients insist on."""
    if channel not in _CHANNELS:
        return {}
    value: Json = {"type": channel, _CHANNELS[channel].text: part.text()}
    if channel == "output_text":
        value |= {"annotations": list(part.annotations), "logprobs": []}
    return value


def _whole_usage(usage: Json) -> Json:
    """Upstream `usage` with all counts that the SDK types require."""
    counts = usage_from(usage)
    return {
        **usage,
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            **_dict(usage.get("input_tokens_details")),
        },
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": 0,
            **_dict(usage.get("output_tokens_details")),
        },
        "total_tokens": counts["total_tokens"],
    }


ResponsesStream._handlers = {
    "error": ResponsesStream._failed,
    "response.completed": ResponsesStream._end,
    "response.content_part.added": ResponsesStream._part_added,
    "response.content_part.done": ResponsesStream._part_done,
    "response.created": ResponsesStream._lifecycle,
    "response.failed": ResponsesStream._failed,
    "response.in_progress": ResponsesStream._lifecycle,
    "response.incomplete": ResponsesStream._end,
    "response.output_item.added": ResponsesStream._item_added,
    "response.output_item.done": ResponsesStream._item_done,
    "response.output_text.annotation.added": ResponsesStream._cite,
    "response.queued": ResponsesStream._lifecycle,
    "response.reasoning_summary_part.added": ResponsesStream._part_added,
    "response.reasoning_summary_part.done": ResponsesStream._part_done,
    **_of_channels(ResponsesStream._delta, ResponsesStream._whole),
    **{
        f"response.{name}.{ending}": functools.partial(
            ResponsesStream._pass_on, item_type=item_type
        )
        for name, (item_type, endings) in _HOSTED_EVENTS.items()
        for ending in endings.split()
    },
}
# ==================================================================================================
# 12. Rotation
#     Chooses an account, tries it, refreshes its token, and says what may be tried again. Takes no HTTP
#     request and returns no HTTP reply.
# ==================================================================================================


@dataclass(slots=True)
class Turn:
    """One model request to its end, whatever protocol asked for it."""

    body: bytes = field(repr=False)
    """The encoded upstream request: kept as bytes, because another attempt may send it again."""
    session: str
    streaming: bool
    translator: Callable[[], Translator]
    account: Account | None = None
    attempts: int = 0


def pick_account(store: AccountStore, tried: set[str]) -> Account:
    """The serving account, unless it was tried or cannot serve.

    raises  AztError that says what the person can do
    """
    account = store.active
    if account is None:
        raise AztError(
            503,
            "no_account",
            "No account is signed in. Run `azt login`, or `azt accounts import FILE` with a Codex auth.json.",
            headers={"x-should-retry": "false"},
        )
    if account.rejected:
        raise _sign_in_again(account)
    if account.id in tried:
        raise AztError(503, "no_account", "No other account can serve this request.")
    return account


def _sign_in_again(account: Account) -> AztError:
    return AztError(
        401,
        "account_auth_expired",
        f"Account {account.name} needs to sign in again ({account.rejected}): run `azt login`, "
        "or import a fresh sign-in with `azt accounts import FILE`.",
        type="authentication_error",
    )


class Rotation:
    """Turns to relays. Owns no state but the refreshes under way."""

    def __init__(
        self,
        store: AccountStore,
        pool: ConnectionPool,
        calls: WorkerPool,
        environment: Environment,
        save: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._pool = pool
        self._calls = calls
        self._environment = environment
        self._save = save
        self._refreshes: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def open_turn(self, turn: Turn) -> Relay:
        """The one retry rule (trust.md 3.2): another try only while no byte has reached the client.

        raises  AztError: the last failure, when nothing more may be tried
        """
        started_s = asyncio.get_running_loop().time()
        tried: set[str] = set()
        renewed: set[str] = set()
        while True:
            account = turn.account = pick_account(self._store, tried)
            account = await self.fresh_account(account)
            token = account.access_token  # another turn may renew it before the answer is here
            turn.attempts += 1
            elapsed_s = asyncio.get_running_loop().time() - started_s
            try:
                return await self._attempt(account, turn, max(HOLD_BACK_S - elapsed_s, 0))
            except UpstreamError as error:
                if error.fault == "token" and account.id not in renewed:
                    renewed.add(account.id)
                    await self.fresh_account(account, refused=token)
                    continue
                if error.code == "invalid_encrypted_content" and (
                    body := _without_reasoning(turn.body)
                ):
                    turn.body = body
                    continue
                if error.status == 401:
                    raise await self._reject(account, error.code or "401") from None
                tried.add(account.id)
                raise

    async def _attempt(self, account: Account, turn: Turn, hold_s: float) -> Relay:
        wire, translator = Wire(), turn.translator()
        credentials = Credentials(account.access_token, account.account_id)
        base_url = self._environment.codex_base_url
        try:
            answer = await in_thread(
                self._calls,
                open_stream,
                self._pool,
                base_url,
                credentials,
                turn.body,
                turn.session,
                wire,
            )
        except asyncio.CancelledError:
            wire.end()
            raise
        except UpstreamError as error:
            translator.fail(error)  # puts the client's own field name into `param`
            raise
        relay = Relay(self._pool, answer, translator, turn.streaming)
        await relay.ready(hold_s)
        return relay

    async def fresh_account(self, account: Account, refused: str = "") -> Account:
        """The account with a token that can be used now.

        refused  an access token that the upstream turned down: renew it although it has not expired
        raises   AztError when the sign-in is dead, or its renewal failed and the old token is no use
        """
        account = self._store.accounts.get(account.id, account)
        ends_soon = account.expires_at and account.expires_at - time.time() < REFRESH_AHEAD_S
        if not ends_soon and account.access_token != refused:
            return account
        task = self._refreshes.get(account.id)
        if task is None:
            task = asyncio.create_task(self._refresh(account.id, account.access_token))
            self._refreshes[account.id] = task
            task.add_done_callback(functools.partial(self._refreshed, account.id))
        try:
            # Shielded: a client that leaves must not take the new, single-use refresh token with it.
            await asyncio.shield(task)
        except UpstreamError:
            if refused or account.expires_at <= time.time():
                raise
        return self._store.accounts.get(account.id, account)

    def _refreshed(self, account_id: str, task: asyncio.Task[None]) -> None:
        self._refreshes.pop(account_id, None)
        if not task.cancelled():
            task.exception()  # seen, for perhaps nobody waits for it any more

    async def _refresh(self, account_id: str, stale_token: str) -> None:
        """Renew one sign-in: one at a time over all accounts, on disk before anyone uses it."""
        async with self._one_at_a_time:
            account = self._store.accounts.get(account_id)
            if account is None or account.access_token != stale_token:
                return
            auth_base_url = self._environment.auth_base_url
            try:
                tokens = await in_thread(
                    self._calls,
                    refresh_tokens,
                    self._pool,
                    auth_base_url,
                    account.refresh_token,
                    Wire(),
                )
            except SignInRejected as error:
                raise await self._reject(account, error.reason) from None
            self._apply(account, tokens, time.time())
            await self._save()
            log.info("the sign-in of %s was renewed", account.name)

    def _apply(self, account: Account, tokens: Tokens, now: float) -> None:
        renewed = account_from_tokens(
            tokens.access_token or account.access_token,
            tokens.refresh_token or account.refresh_token,
            tokens.id_token or account.id_token,
            now,
        )
        account.access_token = renewed.access_token
        account.refresh_token = renewed.refresh_token
        account.id_token = renewed.id_token
        account.expires_at = renewed.expires_at or (
            int(now) + tokens.expires_in_s if tokens.expires_in_s else 0
        )
        account.plan = renewed.plan if renewed.plan != "unknown" else account.plan
        account.refreshed_at = int(now)

    async def _reject(self, account: Account, reason: str) -> AztError:
        """Remember that only a new sign-in helps, so that the dead token is never tried again."""
        account.rejected = reason
        await self._save()
        log.warning("account %s needs to sign in again (%s)", account.name, reason)
        return _sign_in_again(account)


def _without_reasoning(body: bytes) -> bytes | None:
    """The request without its encrypted reasoning, which another account cannot read; None if it has none."""
    request = parse_event(body) or {}
    items = request.get("input")
    kept = (
        [item for item in items if item.get("type") != "reasoning"]
        if isinstance(items, list)
        else []
    )
    if not kept or len(kept) == len(cast(list[Any], items)):
        return None
    return encode_json({**request, "input": kept})
# ==================================================================================================
# 13. Usage and request log
#     What happened to each request: one line in the log. Never a prompt, an answer or a token.
# ==================================================================================================


@dataclass(slots=True)
class RequestRecord:
    """One request from its head to the last byte of its answer. Metadata only."""

    id: str
    method: str
    path: str
    started_s: float
    """Monotonic clock, like every duration here."""
    status: int = 0
    account: str = "-"
    """Label or short id, never the e-mail."""
    model: str = "-"
    client: str = "-"
    attempts: int = 0
    ttft_ms: int | None = None
    """From the complete request to the first content delta written."""
    total_ms: int | None = None
    result: Literal["running", "ok", "failed", "cancelled"] = "running"
    error_code: str | None = None
    usage: Json | None = None
    request_bytes: int = 0

    def end(self, now_s: float) -> None:
        """Close the record and write its one log line. A second call does nothing."""
        if self.total_ms is not None:
            return
        self.total_ms = round((now_s - self.started_s) * 1000)
        if self.result == "running":
            self.result = "ok" if self.status < 400 else "failed"
        log.info(
            "%s %s %s %s account=%s model=%s ttft_ms=%s total_ms=%s%s",
            self.id,
            self.method,
            self.path,
            self.status or "-",
            self.account,
            self.model,
            "-" if self.ttft_ms is None else self.ttft_ms,
            self.total_ms,
            "" if self.result == "ok" else f" {self.result} {self.error_code or ''}".rstrip(),
        )
# ==================================================================================================
# 14. Gateway
#     The one owner of mutable state. Its fields are all that requests share; module level holds
#     constants only. Everything but `load` runs on the loop.
# ==================================================================================================


class Gateway:
    """State, pools and what saves them. Made by room 18, handed to every handler."""

    def __init__(self, environment: Environment, flags: Mapping[str, Any]) -> None:
        self.environment = environment
        self.paths = environment.paths
        self.flags = flags
        self.settings = self.started_settings = load_settings(None, environment, flags)
        self.store = AccountStore()
        self.catalogue = Catalogue.read(None, None)
        self.keys: list[Json] = []
        self.admin_token = ""
        self.pages: dict[str, Page] = {}
        self.responses = ResponseStore()
        self.pool = ConnectionPool(_egress(environment, self.settings))
        self.calls = WorkerPool("call", MAX_CALL_THREADS, waiting_max=0)
        self.short = WorkerPool("short", 16)
        self.files = WorkerPool("file", 1)
        self.rotation = Rotation(self.store, self.pool, self.calls, environment, self.save_accounts)
        self.started_at = time.time()
        self.listening: list[tuple[str, int]] = []
        self._changing = asyncio.Lock()

    @blocking
    def load(self) -> None:
        """Read every state file once. Raises StateError rather than start with less than there is."""
        paths = self.paths
        prepare_home(paths)
        self._apply_settings(_read_settings(paths))
        self.started_settings = self.settings
        loaded = AccountStore.from_json(read_json(paths.accounts, ACCOUNTS_VERSION))
        self.store.accounts, self.store.active_id = loaded.accounts, loaded.active_id
        self.keys = (read_json(paths.keys, 1) or {}).get("keys", [])
        self.catalogue = Catalogue.read(_read_cache(paths.models), _read_cache(paths.codex_models))
        self.admin_token = read_or_make_secret(paths.admin_token)
        self.pages = read_pages()

    def _apply_settings(self, saved: Json | None) -> None:
        self.settings = load_settings(saved, self.environment, self.flags)
        log.setLevel(self.settings.text("log.level").upper())
        egress = _egress(self.environment, self.settings)
        if egress != self.pool.egress:
            self.pool.egress = egress
            self.pool.close()

    async def save_accounts(self) -> None:
        """On disk before anyone goes on. A failure is loud, and the state in memory stays the newer one."""
        await in_thread(self.files, write_json, self.paths.accounts, self.store.to_json())

    async def _in_turn(self, change: Callable[[], Awaitable[T]]) -> T:
        """One change by a person at a time, and to its end though the client leaves: what is in force
        and what is on disk stay the same."""

        async def run() -> T:
            async with self._changing:
                return await change()

        return await asyncio.shield(run())

    async def change_accounts(self, change: Callable[[AccountStore], T]) -> T:
        """Taken back when it cannot be saved."""
        store = self.store

        async def save() -> T:
            before, active_id = dict(store.accounts), store.active_id
            try:
                result = change(store)
                await self.save_accounts()
            except AztError:
                store.accounts, store.active_id = before, active_id
                raise
            return result

        return await self._in_turn(save)

    async def change_settings(self, changes: Json, revision: Any = None) -> None:
        """Merge checked values into the file and put them in force.

        raises  AztError 409 when `revision` is given and no longer ours; StateError rather than write
                over a file that cannot be read
        """

        async def save() -> None:
            if revision not in (None, self.settings.revision):
                text = "Someone else changed the settings meanwhile: read them again."
                raise AztError(409, "stale_revision", text)
            saved = await in_thread(self.files, read_json, self.paths.settings, 1) or {}
            values = {**saved.get("values", {}), **changes}
            merged = {"version": 1, "revision": self.settings.revision + 1, "values": values}
            await in_thread(self.files, write_json, self.paths.settings, merged)
            self._apply_settings(merged)

        await self._in_turn(save)

    async def change_keys(self, change: Callable[[list[Json]], list[Json]]) -> None:
        async def save() -> None:
            keys = change(self.keys)
            await in_thread(self.files, write_json, self.paths.keys, {"version": 1, "keys": keys})
            self.keys = keys

        await self._in_turn(save)

    async def refresh_models(self) -> bool:
        """Ask the backend for the catalogue; False when ours is still current."""
        account = await self.rotation.fresh_account(pick_account(self.store, set()))
        credentials = Credentials(account.access_token, account.account_id)
        etag = self.catalogue.etag if self.catalogue.source == "azt" else ""
        base_url = self.environment.codex_base_url
        fetched = await in_thread(
            self.calls, fetch_models, self.pool, base_url, credentials, etag, Wire()
        )
        if fetched is None:
            return False
        entries, etag = fetched
        models = tuple(one for one in entries if _is_model(one))
        if not models:
            text = "The upstream lists no models for this account; the old list is kept."
            raise UpstreamError(502, "upstream_error", text)
        catalogue = Catalogue(models, "azt", etag, int(time.time()))
        await in_thread(self.files, write_json, self.paths.models, catalogue.to_json())
        self.catalogue = catalogue
        return True

    @property
    def default_model(self) -> str:
        return self.catalogue.default(self.settings.text("defaultModel"))


def _egress(environment: Environment, settings: Settings) -> Egress:
    """The proxy of the settings when it is on, else that of the environment."""
    bases = (environment.codex_base_url, environment.chatgpt_base_url, environment.auth_base_url)
    own = frozenset(urllib.parse.urlsplit(base).hostname or "" for base in bases)
    if settings.flag("networkProxy.enabled") and settings.text("networkProxy.url"):
        return Egress(
            settings.text("networkProxy.url"),
            settings.text("networkProxy.noProxy"),
            environment.ca_file,
            own,
        )
    no_proxy = f"{environment.no_proxy},localhost,127.0.0.1,::1"
    return Egress(environment.proxy_url, no_proxy, environment.ca_file, own)


def _read_settings(paths: Paths) -> Json | None:
    """Settings that cannot be read are defaults, said loudly: unlike accounts they can be typed again."""
    try:
        return read_json(paths.settings, 1)
    except StateError as error:
        log.error("%s The defaults are in force.", error.message)
        return None


def _read_cache(path: Path) -> Json | None:
    """A model cache, ours or Codex's: only a cache, so a broken one is as good as none."""
    try:
        return parse_event(read_foreign(path, 16 * MIB))
    except OSError:
        return None
# ==================================================================================================
# 15. HTTP server
#     Bytes from a client -> Request -> handler -> Reply -> bytes. Decides who may call; the route
#     table is passed in. Knows nothing of accounts or the upstream.
# ==================================================================================================

PeerClass = Literal["own", "relayed", "lan", "public"]
"""own: loopback. relayed: loopback, but a proxy's header says that it speaks for somebody else.
lan: private, on-link or an own network. public: the rest (trust.md 2)."""

Access = Literal[
    "api", "codex", "admin_read", "admin_write", "admin_proof", "health", "metrics", "page"
]
"""Which rows of the decision table a route follows (`may`)."""

KeyState = Literal["none", "wrong", "good"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class StreamBody(Protocol):
    """A body that writes itself on the loop, without a task; `Relay` (room 10) is one.

    start   the head is rendered: write to the sink from now on
    pause   the client reads too slowly: write nothing until `resume`
    probe   the client half-closed: write something harmless; False when nothing may be written
    cancel  the client left: stop at once, the sink is dead
    stop    the server ends: write an error event and finish
    """

    def start(self, sink: Sink) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def probe(self) -> bool: ...
    def cancel(self) -> None: ...
    def stop(self, error: AztError) -> None: ...


@dataclass(slots=True)
class Request:
    """One request with its whole body."""

    id: str
    method: str
    path: str
    """Percent-decoded once, without the query; slashes as the client sent them."""
    target: str
    """As it stood in the request line, for relays."""
    query: dict[str, str]
    headers: dict[str, str]
    """Lower-case names; repeated ones joined with ", "."""
    peer: str
    peer_class: PeerClass
    record: RequestRecord
    body: bytes | bytearray = b""
    params: dict[str, str] = field(default_factory=dict)
    has_proof: bool = False
    """The caller knows the admin token."""
    held: Callable[[int], None] = field(default=lambda size: None, repr=False)
    """Told by how many bytes the memory held for bodies changes."""

    def release(self) -> None:
        """Free the body before the answer is complete: a stream may run for an hour."""
        self.held(-len(self.body))
        self.body = b""


@dataclass(slots=True)
class Reply:
    """What a handler returns. A body of bytes is sent at once, the others are streamed."""

    status: int = 200
    body: bytes | StreamBody | AsyncIterator[bytes] = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


def json_reply(value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Reply:
    return Reply(status, encode_json(value), [("content-type", "application/json"), *headers])


def _error_reply(error: AztError) -> Reply:
    return json_reply(error_body(error), error.status, error.headers.items())


Handler = Callable[[Any, Request], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the route table.

    path            "/v1/models/{id}": `{name}` is one segment, at the end the rest (ids have "/")
    body_max_bytes  0: the limit of the policy
    raw_body        a compressed body is handed on as it came, with its content-encoding header
    types           what the content type of an admin change may be
    """

    method: str
    path: str
    handler: Handler
    access: Access
    body_max_bytes: int = 0
    raw_body: bool = False
    types: tuple[str, ...] = ("application/json",)


# -- the gate: a head that two programs could read differently is never read at all

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb"++) ([\x21-\x7e]++) HTTP/1\.([01])")
_FIELD_LINE = re.compile(_TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+")
_HEAD = re.compile(_REQUEST_LINE.pattern + rb"\r\n(?:" + _FIELD_LINE.pattern + rb"\r\n)*+\r\n")
_OTHER_VERSION = re.compile(rb".* HTTP/(?!1\.[01]$)[0-9]\.[0-9]", re.DOTALL)
_SINGLES = re.compile(
    rb"\r\n(content-length|content-type|host|origin|transfer-encoding):[ \t]*+([^\r]*)",
    re.IGNORECASE,
)
_HOST = re.compile(
    rb"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{1,5}))?"
)
_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


def _malformed(message: str, status: int = 400) -> BadRequest:
    return BadRequest(
        f"{message} The connection is closed.", code="malformed_request", status=status
    )


def find_head(data: bytes) -> int:
    """Where the head at the start of `data` ends; 0 while it is incomplete. Pure.

    The verdict is the same for every split of the bytes: what is refused early (no letter first, a
    bare LF, too long) is looked at in the order in which it stands.
    raises  BadRequest 400, 431
    """
    if data[0] not in _LETTERS:
        raise _malformed(
            "This is no HTTP request. azt speaks plain HTTP: use http://, not https://."
        )
    end = data.find(b"\r\n\r\n") + 4
    size = end if end > 3 else len(data)
    known = min(size, MAX_HEAD_BYTES)
    if data.count(b"\n", 0, known) != data.count(b"\r\n", 0, known):
        raise _malformed("A line of the request head ends without CR.")
    if size > MAX_HEAD_BYTES:
        raise _malformed(f"The request head is larger than {MAX_HEAD_BYTES} bytes.", 431)
    return end if end > 3 else 0


def check_head(head: bytes) -> None:
    """The strict gate in front of h11: bytes up to CRLFCRLF, every rule of trust.md 1.5. Pure.

    raises  BadRequest 400, 405 (CONNECT), 431, 501 (transfer coding), 505
    """
    found = _HEAD.fullmatch(head)
    if found is None:
        raise _head_fault(head)
    if head.count(b"\r\n") - 2 > MAX_HEAD_FIELDS:
        raise _malformed(f"The request head has more than {MAX_HEAD_FIELDS} fields.", 431)
    single: dict[bytes, bytes] = {}
    for name, value in _SINGLES.findall(head):
        name = name.lower()
        if name in single:
            raise _malformed(f"The header {name.decode()} appears more than once.")
        single[name] = value.rstrip(b" \t")
    method, target, minor = found.groups()
    _check_framing(single, minor)
    _check_host(single.get(b"host"), minor)
    _check_target(method, target, single.get(b"host", b""))


def _head_fault(head: bytes) -> BadRequest:
    """Why `_HEAD` did not match."""
    first, *fields = head[:-4].split(b"\r\n")
    if not _REQUEST_LINE.fullmatch(first):
        if _OTHER_VERSION.fullmatch(first):
            return _malformed("azt speaks HTTP/1.1 and HTTP/1.0.", 505)
        return _malformed("The request line is malformed.")
    bad = next((line for line in fields if not _FIELD_LINE.fullmatch(line)), b"")
    if bad[:1] in (b" ", b"\t"):
        return _malformed("A header is folded over two lines.")
    name = bad.partition(b":")[0][:40].decode("ascii", "replace")
    return _malformed(f"The header line {name!r} is malformed.")


def _check_framing(single: Mapping[bytes, bytes], minor: bytes) -> None:
    length = single.get(b"content-length")
    coding = single.get(b"transfer-encoding")
    if coding is not None and (length is not None or minor == b"0"):
        # RFC 9112 6.1: this is how requests are smuggled, so the connection ends with it.
        raise _malformed("Transfer-Encoding together with Content-Length or HTTP/1.0 is ambiguous.")
    if coding is not None and coding != b"chunked":
        raise _malformed("The only transfer coding that azt takes is `chunked`.", 501)
    if length is not None and not re.fullmatch(rb"[0-9]{1,15}", length):
        raise _malformed("Content-Length is not a number.")


def _check_host(host: bytes | None, minor: bytes) -> None:
    if host is None and minor == b"1":
        raise _malformed("The Host header is missing.")
    if not host:
        return
    found = _HOST.fullmatch(host)
    if found is None or int(found[2] or 0) > 65535:
        raise _malformed("The Host header is malformed.")
    if found[1]:
        try:
            ipaddress.IPv6Address(found[1].decode())
        except ValueError:
            raise _malformed("The Host header is malformed.") from None


def _check_target(method: bytes, target: bytes, host: bytes) -> None:
    if method == b"CONNECT":
        raise _malformed("azt is no proxy: send the request itself.", 405)
    if not target.startswith(b"/"):
        scheme, _, rest = target.partition(b"://")
        authority = rest.partition(b"/")[0].lower()
        if scheme.lower() != b"http" or not host or authority != host.lower():
            raise _malformed("The request target is neither a path nor a URL of this Host.")
    if b"#" in target:
        raise _malformed("The request target contains '#': encode it as %23.")


# -- request bodies: azt's own framing


class LengthBody:
    """A body of `length` bytes. The buffer grows with what arrives, not with what was announced."""

    __slots__ = ("_length", "body", "complete")

    def __init__(self, length: int) -> None:
        self._length = length
        self.body: bytes | bytearray = b""
        self.complete = length == 0

    def feed(self, data: bytes, at: int) -> int:
        """Take the body's share of `data` from `at` on; the position behind it."""
        end = min(len(data), at + self._length - len(self.body))
        if isinstance(self.body, bytearray):
            with memoryview(data) as view:
                self.body += view[at:end]
        elif end - at == self._length:
            self.body = data[at:end]
        else:
            self.body = bytearray(data[at:end])
        self.complete = len(self.body) == self._length
        return end


_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,12})(?:;[\t\x20-\x7e]{0,%d})?" % (MAX_CHUNK_EXTENSION_BYTES - 1)
)
_CHUNK_LINE_MAX = 12 + MAX_CHUNK_EXTENSION_BYTES + 2


class ChunkedBody:
    """A chunked body, read strictly (trust.md 1.5). Pure: any split of the bytes gives the same.

        SIZE --n--> n bytes, END --empty line--> SIZE --0--> TRAILER --empty line--> complete

    raises  BadRequest 400; 413 as soon as the chunk that exceeds `limit` is announced
    """

    __slots__ = ("_left", "_limit", "_line", "_room", "body", "complete")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = 0
        self._line: Literal["SIZE", "END", "TRAILER"] = "SIZE"
        self._room = _CHUNK_LINE_MAX
        """How long the next line may be, with its end."""
        self.body: bytes | bytearray = bytearray()
        self.complete = False

    def feed(self, data: bytes, at: int) -> int:
        """Take what is complete from `at` on; the position of the first byte to show again."""
        while not self.complete and at < len(data):
            if self._left:
                end = min(len(data), at + self._left)
                with memoryview(data) as view:
                    self.body += view[at:end]
                self._left -= end - at
            else:
                end = data.find(b"\n", at, at + self._room) + 1
                if not end and len(data) - at < self._room:
                    break
                if end - at < 2 or data[end - 2] != 13:
                    raise _malformed("The chunks of the body are malformed.")
                self._take_line(data[at : end - 2])
            at = end
        return at

    def _take_line(self, line: bytes) -> None:
        if self._line == "SIZE":
            found = _CHUNK_LINE.fullmatch(line)
            if found is None:
                raise _malformed("A chunk size of the body is malformed.")
            self._left = int(found[1], 16)
            if len(self.body) + self._left > self._limit:
                raise _too_large(self._limit)
            self._line, self._room = ("END", 2) if self._left else ("TRAILER", MAX_TRAILER_BYTES)
        elif self._line == "END":
            self._line, self._room = "SIZE", _CHUNK_LINE_MAX
        elif line and not _FIELD_LINE.fullmatch(line):
            raise _malformed("A trailer of the body is malformed.")
        else:
            self._room -= len(line) + 2
            self.complete = not line


def _too_large(limit: int) -> BadRequest:
    advice = "The setting limits.bodyMb (AZT_BODY_LIMIT_MB) raises this."
    message = f"The request body is larger than {limit} bytes. {advice}"
    return BadRequest(message, code="request_too_large", status=413)


# -- compressed bodies

_CODINGS = {"deflate": "deflate", "gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}


def _find_zstd() -> Any:
    """The zstd module of Python 3.14 or its backport, where one is installed; else None."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def content_codings(header: str, zstd: Any) -> list[str]:
    """`content-encoding` -> the codings to undo, in that order. Raises BadRequest 415."""
    names = [name.strip().lower() for name in reversed(header.split(","))]
    names = [name for name in names if name not in ("", "identity")]
    known = "gzip, deflate" if zstd is None else "gzip, deflate, zstd"
    reason = ""
    if len(names) > MAX_CODING_LAYERS:
        reason = f"The body is compressed more than {MAX_CODING_LAYERS} times."
    elif "zstd" in names and zstd is None:
        reason = (
            "zstd bodies need Python 3.14 or the package backports.zstd beside azt: send it plain."
        )
    elif any(name not in _CODINGS for name in names):
        reason = f"azt reads bodies that are plain or compressed as {known}."
    if reason:
        code, headers = "unsupported_content_encoding", {"accept-encoding": known}
        raise BadRequest(reason, code=code, status=415, headers=headers)
    return [_CODINGS[name] for name in names]


def inflate(body: bytes | bytearray, coding: str, limit: int, zstd: Any = None) -> bytearray:
    """Undo one coding. Memory stays below `limit` plus one piece whatever the body claims.

    raises  BadRequest 413 above `limit`, 400 for a body that is damaged, cut or followed by more
    """
    try:
        if coding == "zstd":
            options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
            return _unpack(body, zstd.ZstdDecompressor(options=options), limit)
        if coding == "gzip":
            return _unpack(body, zlib.decompressobj(31), limit)
        try:
            return _unpack(body, zlib.decompressobj(15), limit)
        except zlib.error:  # "deflate" without the zlib wrapper, as some clients send it
            return _unpack(body, zlib.decompressobj(-15), limit)
    except (zlib.error, getattr(zstd, "ZstdError", zlib.error), EOFError):
        message = f"The {coding} body is damaged or incomplete."
        raise BadRequest(message, code="invalid_body") from None


def _unpack(body: bytes | bytearray, decoder: Any, limit: int) -> bytearray:
    """Run a decoder of zlib or zstd. Raises EOFError for a body that is cut or followed by more."""
    out = bytearray()
    # In slices: zlib hands back what it has not used; of a whole body that is too much to copy.
    for start in range(0, len(body), READ_BYTES):
        piece = bytes(body[start : start + READ_BYTES])
        if decoder.eof:
            raise EOFError
        while (piece or not getattr(decoder, "needs_input", True)) and not decoder.eof:
            out += decoder.decompress(piece, READ_BYTES)
            piece = getattr(decoder, "unconsumed_tail", b"")  # zstd keeps it inside
            if len(out) > limit:
                raise _too_large(limit)
        if decoder.unused_data:
            raise EOFError
    if hasattr(decoder, "flush"):
        out += decoder.flush()
    if not decoder.eof:
        raise EOFError
    if len(out) > limit:
        raise _too_large(limit)
    return out


# -- who may call: the decision table of trust.md 2


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide, as values. Asked for at each request, so a change acts at once."""

    own_names: frozenset[str]
    """This machine's host name and `<it>.local`, lower case."""
    allowed_hosts: frozenset[str]
    cors_origins: frozenset[str]
    lan_api: bool
    loopback_exempt: bool
    own_networks: tuple[Network, ...]
    key_hashes: frozenset[str]
    """sha256, hex. Empty: no key is needed."""
    admin_token_hash: str
    body_max_bytes: int


@dataclass(frozen=True, slots=True)
class Caller:
    """What the table looks at."""

    peer: PeerClass
    host: str
    """The name in the Host header: lower case, no port, no brackets; empty where there is none."""
    origin: str | None = None
    own_origin: bool = False
    """`origin` names the Host of this request."""
    fetch_site: str = ""
    navigates: bool = False
    """The browser opens this as a page of its own, not inside another one."""
    key: KeyState = "none"
    proof: bool = False
    """The admin token was sent."""
    marked: bool = False
    """X-AZT-Admin: 1 was sent, which no form and no simple request of a page can do."""


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(name) for name in text.split())


_LOOPBACK_NETWORKS = _networks("127.0.0.0/8 ::1/128")
_LAN_NETWORKS = _networks(
    "10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 fc00::/7 fe80::/10"
)
_RELAY_HEADERS = frozenset(
    "cdn-loop cf-connecting-ip cf-connecting-ipv6 cf-ray cf-visitor client-ip fastly-client-ip "
    "fly-client-ip forwarded tailscale-user-login tailscale-user-name true-client-ip via "
    "x-client-ip x-cluster-client-ip x-envoy-external-address x-original-forwarded-for "
    "x-original-host x-proxyuser-ip x-real-ip".split()
)
_OVERRIDES = frozenset(("x-http-method", "x-http-method-override", "x-method-override"))
_LOOPBACK_ORIGIN = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?")
_SAFE_METHODS = ("GET", "HEAD")


def peer_place(address: str, own_networks: Sequence[Network]) -> Literal["own", "lan", "public"]:
    """Where a socket's peer is. Headers never count: they are the caller's own words."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if any(found in network for network in _LOOPBACK_NETWORKS):
        return "own"
    near = (*_LAN_NETWORKS, *own_networks)
    return "lan" if any(found in network for network in near) else "public"


def is_relayed(headers: Mapping[str, str]) -> bool:
    """Whether a proxy passed the request on: behind it the peer of the socket says nothing."""
    forwarded = any(name.startswith("x-forwarded-") for name in headers)
    return forwarded or not _RELAY_HEADERS.isdisjoint(headers)


@functools.lru_cache(maxsize=512)
def _host_kind(name: str) -> Literal["loopback", "address", "name"]:
    if name == "localhost" or name.endswith(".localhost"):
        return "loopback"
    try:
        return "loopback" if ipaddress.ip_address(name).is_loopback else "address"
    except ValueError:
        return "name"


def read_caller(
    peer: PeerClass, headers: Mapping[str, str], policy: Policy, access: Access
) -> Caller:
    """The head of a request -> what the table looks at."""
    host = headers.get("host", "").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    origin = headers.get("origin")
    key: KeyState = "none"
    proof = False
    if policy.key_hashes or access.startswith("admin"):
        key, proof = _read_key(headers, policy)
    mode, dest = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return Caller(
        peer=peer,
        host=name.removesuffix("."),
        origin=origin,
        own_origin=bool(host and origin)
        and str(origin).lower() in (f"http://{host}", f"https://{host}"),
        fetch_site=headers.get("sec-fetch-site", ""),
        navigates=mode == "navigate" and dest == "document",
        key=key,
        proof=proof,
        marked=headers.get("x-azt-admin") == "1",
    )


def _read_key(headers: Mapping[str, str], policy: Policy) -> tuple[KeyState, bool]:
    """(API key, admin token sent): each compared with every hash, in constant time."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    sent = [bearer, headers.get("x-api-key", ""), headers.get("api-key", "")]
    hashes = [hashlib.sha256(value.encode()).hexdigest() for value in sent if value]
    good = False
    for known in policy.key_hashes:
        for digest in hashes:
            good |= hmac.compare_digest(digest, known)
    proof = bool(bearer) and hmac.compare_digest(hashes[0], policy.admin_token_hash)
    return ("good" if good else "wrong" if hashes else "none"), proof


# Why a caller is refused: code -> status, sentence.
_REFUSALS: dict[str, tuple[int, str]] = {
    "admin_header_missing": (400, "Changes need the header `X-AZT-Admin: 1`."),
    "admin_not_here": (403, "The administration answers only on the machine that azt runs on."),
    "admin_proof_needed": (401, "Send what .state/admin-token holds in the authorization header."),
    "api_key_missing": (401, "An API key is needed in the authorization header. {advice}"),
    "api_key_needed": (403, "From outside or through a proxy an API key is needed. {advice}"),
    "host_not_allowed": (403, "The setting server.allowedHosts does not have {host!r}: add it."),
    "invalid_api_key": (401, "This API key is not known. {advice}"),
    "lan_off": (403, "The API is off for other machines: the setting server.lanApi turns it on."),
    "metrics_not_here": (403, "Metrics are for this machine, or for an API key. {advice}"),
    "origin_not_allowed": (403, "Pages of {origin!r} may not call this (server.corsOrigins)."),
    "page_not_here": (403, "This page is for the machine that azt runs on and its own network."),
}
_KEY_ADVICE = "`azt keys add NAME` on the machine that azt runs on makes one."


def may(caller: Caller, access: Access, method: str, policy: Policy) -> AztError | None:
    """The decision table: None, or why not. Pure.

    403 = wrong place or page, nothing the caller sends can help; 401 = right place, proof missing.
    """
    code = (
        _host_fault(caller, access, policy)
        or _page_fault(caller, access, method, policy)
        or _place_fault(caller, access, method, policy)
    )
    if not code:
        return None
    status, sentence = _REFUSALS[code]
    origin = (caller.origin or "elsewhere")[:100]
    message = sentence.format(advice=_KEY_ADVICE, host=caller.host, origin=origin)
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    kind = None if status == 403 else "invalid_request_error"
    # OpenAI has no code for a key that was not sent.
    shown = None if code == "api_key_missing" else code
    return AztError(status, shown, message, type=kind, headers=headers)


def _host_fault(caller: Caller, access: Access, policy: Policy) -> str:
    """DNS rebinding: a foreign name that points here. An address has no record to flip."""
    name = caller.host
    if name and (_host_kind(name) != "name" or name in policy.own_names | policy.allowed_hosts):
        return ""
    if name.endswith(".internal") and access in ("api", "codex", "health"):
        return ""  # reserved for private use: host.docker.internal and the like
    return "host_not_allowed"


def _page_fault(caller: Caller, access: Access, method: str, policy: Policy) -> str:
    """The browser rule: a page may call what it belongs to, or the API where that is allowed."""
    origin, site = caller.origin, caller.fetch_site
    if access == "page" and caller.navigates and method in _SAFE_METHODS and origin is None:
        return ""  # a link from another page is cross-site by nature
    if access == "api":
        allowed = site != "cross-site" if origin is None else _is_api_origin(caller, policy)
    elif access == "codex":
        allowed = origin is None and site in ("", "none")
    else:
        allowed = (origin is None or caller.own_origin) and site in ("", "none", "same-origin")
    return "" if allowed else "origin_not_allowed"


def _is_api_origin(caller: Caller, policy: Policy) -> bool:
    origin = caller.origin or "null"
    if origin == "null":
        return False
    if caller.own_origin or origin in policy.cors_origins or _LOOPBACK_ORIGIN.fullmatch(origin):
        return True
    return "*" in policy.cors_origins and bool(policy.key_hashes)


def _place_fault(caller: Caller, access: Access, method: str, policy: Policy) -> str:
    """Who is where, with which proof: rows 1 to 3, 6 to 8, 10, 12 to 14."""
    # This machine, addressed as such, not a page of somebody else.
    own = (
        caller.peer == "own"
        and _host_kind(caller.host) == "loopback"
        and (caller.origin is None or caller.own_origin)
    )
    if access.startswith("admin"):
        if not own:
            return "admin_not_here"
        if access != "admin_read" and method not in _SAFE_METHODS and not caller.marked:
            return "admin_header_missing"
        return "admin_proof_needed" if access == "admin_proof" and not caller.proof else ""
    if access == "page":
        return "" if caller.peer in ("own", "lan") else "page_not_here"
    if access == "health" or (
        own and (access == "metrics" or caller.proof or policy.loopback_exempt)
    ):
        return ""
    if access != "metrics" and caller.peer == "lan" and not policy.lan_api:
        return "lan_off"
    if policy.key_hashes:
        return {"good": "", "none": "api_key_missing", "wrong": "invalid_api_key"}[caller.key]
    if access == "metrics":
        return "metrics_not_here"
    return "" if caller.peer in ("own", "lan") else "api_key_needed"


# -- which handler


_ODD_PATH = re.compile(r"[\x00-\x1f\x7f\\]|(?:^|/)\.\.?(?:/|$)")


def read_path(target: str) -> tuple[str, dict[str, str]]:
    """Request target -> (path, query), decoded once. Raises BadRequest 400."""
    raw, _, query = target.partition("?")
    if not raw.startswith("/"):
        raw = "/" + raw.partition("://")[2].partition("/")[2]
    try:
        path = urllib.parse.unquote_to_bytes(raw).decode() if "%" in raw else raw
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        message = "The request target is not valid UTF-8 or has too many parameters."
        raise BadRequest(message, code="invalid_url") from None
    if _ODD_PATH.search(path):
        message = "The path contains '.', '..', '\\' or control characters."
        raise BadRequest(message, code="invalid_url")
    return path, dict(pairs)


@dataclass(slots=True)
class _Match:
    """What the table has for a path: the route when the method fits, and what else fits there."""

    route: Route | None = None
    params: dict[str, str] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    # A path that is not there follows the rows of the API: strangers learn nothing from a 404.
    access: Access = "api"


class _RouteTable:
    """Routes by path. Exact paths first, then patterns, the longest first."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._exact: dict[str, list[Route]] = {}
        patterns: dict[str, list[Route]] = {}
        for route in routes:
            kind = patterns if "{" in route.path else self._exact
            kind.setdefault(route.path, []).append(route)
        ordered = sorted(patterns, key=lambda path: (-path.count("/"), -len(path)))
        self._patterns = [(self._compile(path), patterns[path]) for path in ordered]

    @staticmethod
    def _compile(path: str) -> re.Pattern[str]:
        middle = re.sub(r"\\{(\w+)\\}(?=/)", r"(?P<\1>[^/]+)", re.escape(path))
        return re.compile(re.sub(r"\\{(\w+)\\}$", r"(?P<\1>.+)", middle))

    def find(self, path: str, method: str) -> _Match:
        """The best entry for a path. `/v1` missing or twice and odd slashes are forgiven."""
        path = re.sub("/{2,}", "/", path).rstrip("/") or "/"
        while f"{path}/".startswith("/v1/v1/"):
            path = path[3:]
        twin = f"/codex/v1{path[6:]}" if path.startswith("/codex/") else f"/v1{path}"
        found = self._match(path, method)
        return found if found.methods else self._match(twin, method)

    def _match(self, path: str, method: str) -> _Match:
        fitting = [(self._exact[path], dict[str, str]())] if path in self._exact else []
        for pattern, routes in self._patterns:
            if named := pattern.fullmatch(path):
                fitting.append((routes, named.groupdict()))
        match = _Match()
        for routes, params in fitting:
            for route in routes:
                if not match.methods or (route.method == method and match.route is None):
                    match.access = route.access
                if route.method == method and match.route is None:
                    match.route, match.params = route, params
                match.methods.add(route.method)
        if "GET" in match.methods:
            match.methods.add("HEAD")
        return match


def _refuse_oddities(request: Request) -> None:
    """Row 18: what azt does for nobody."""
    upgrade = request.headers.get("upgrade", "")
    # RFC 9110 7.8: an upgrade may be ignored. Java's client offers h2c with each request.
    if upgrade and upgrade.lower() != "h2c":
        # Codex tries a WebSocket first and falls back to HTTP without delay on a 426 only.
        if request.path.rstrip("/").endswith("/responses"):
            status, headers = 426, {"upgrade": "HTTP/1.1"}
        else:
            status, headers = 400, {}
        message = "azt does not switch protocols: use plain HTTP/1.1."
        raise BadRequest(message, code="upgrade_refused", status=status, headers=headers)
    if request.method == "TRACE" or not _OVERRIDES.isdisjoint(request.headers):
        raise _wrong_method(request, {"GET", "POST"})
    if request.headers.get("expect", "100-continue").lower() != "100-continue":
        message = "The only expectation that azt meets is 100-continue."
        raise BadRequest(message, code="expectation_failed", status=417)


def _wrong_method(request: Request, methods: set[str]) -> BadRequest:
    allow = ", ".join(sorted(methods | {"OPTIONS"}))
    message = f"{request.path[:200]} does not take {request.method}: use {allow}."
    return BadRequest(message, code="method_not_supported", status=405, headers={"allow": allow})


_ASKED_METHOD = "access-control-request-method"
_EXPOSED = "retry-after, x-azt-attempts, x-azt-ignored-params, x-request-id"


def _cors_headers(origin: str) -> list[tuple[str, str]]:
    return [
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", _EXPOSED),
        ("vary", "Origin"),
    ]


def _preflight_headers(asked: str) -> list[tuple[str, str]]:
    is_safe = re.fullmatch(r"[\w!#$%&'*+.^`|~, -]{1,4096}", asked, re.ASCII)
    return [
        ("access-control-allow-headers", asked if is_safe else "authorization, content-type"),
        ("access-control-allow-methods", "GET, POST, DELETE, OPTIONS"),
        ("access-control-max-age", "600"),
    ]


async def _nothing(context: Any, request: Request) -> Reply:
    return Reply(204)


_OPTIONS = Route("OPTIONS", "", _nothing, "api")


# -- one request, one connection

_SAFE_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_JOIN_BYTES = 64 * KIB
"""Up to this size head and body are one write: one packet, one system call."""


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request and its answer; the `Sink` of a streamed body.

        read head -> decided (`route` or `error`) -> run: the handler -> send -> ended
                                                          \\--- cut, client left --/

    `end` is reached once on every path: it closes the record and gives back what the request held.
    """

    connection: Connection
    server: HttpServer
    request: Request
    route: Route | None = None
    error: AztError | None = None
    limit: int = LINGER_BYTES
    """Of the body; this little of the body of a refused request is skipped."""
    codings: list[str] = field(default_factory=list)
    cors: list[tuple[str, str]] = field(default_factory=list)
    is_modern: bool = False
    """The client speaks HTTP/1.1."""
    keep: bool = False
    """The connection outlives this exchange."""
    head_sent: bool = False
    ended: bool = False
    stream: StreamBody | None = None
    pump: AsyncIterator[bytes] | None = None
    task: asyncio.Task[None] | None = None
    stopping: AztError | None = None
    # h11 reads one head and writes one head; it never sees a body (performance.md 2.1).
    _wire: h11.Connection = field(
        default_factory=lambda: h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
    )
    _chunked: bool = False
    _counted: Literal["", "running", "lan"] = ""
    _held: int = 0
    """Bytes of this request that count as memory held for bodies."""
    _pending: bytes = b""
    """The head of a stream, until its first bytes."""

    def read(self, head: bytes) -> None:
        """Gate and parse the head, then let the server decide. Raises BadRequest when malformed."""
        check_head(head)
        try:
            self._wire.receive_data(head)
            parsed = self._wire.next_event()
        except h11.RemoteProtocolError as error:
            raise _malformed(f"The request is malformed: {error}.") from None
        if not isinstance(parsed, h11.Request):
            raise _malformed("The request head is malformed.")
        request, headers = self.request, self.request.headers
        for raw_name, raw_value in parsed.headers:
            name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        request.method = request.record.method = parsed.method.decode("ascii")[:20]
        request.target = parsed.target.decode("ascii")
        request.path = request.record.path = request.target.partition("?")[0][:200]
        given = headers.get("x-request-id") or headers.get("x-client-request-id", "")
        if _SAFE_ID.fullmatch(given):
            request.id = request.record.id = given
        self.is_modern = parsed.http_version == b"1.1"
        tokens = headers.get("connection", "").lower().replace(" ", "").split(",")
        self.keep = self.is_modern and "close" not in tokens
        if request.peer_class == "own" and is_relayed(headers):
            request.peer_class = "relayed"
        self.server.decide(self)

    def hold(self, size: int) -> None:
        """Account for body memory. Raises AztError 503 when all bodies together exceed the cap."""
        self._held += size
        self.server.bodies_bytes += size
        if size > 0 and self.server.bodies_bytes > MAX_BODIES_BYTES:
            message = "Too many large requests are being read at once. Try again in a few seconds."
            raise AztError(503, "overloaded", message, headers={"retry-after": "5"})

    # -- the answer

    def begin(self) -> None:
        """The body is complete: answer in a task of its own."""
        self.server.running += 1
        self._counted = "running"
        self.request.held = self.hold
        if self.route and self.route.access in ("api", "codex"):
            self._count_stream(self.request)
        self.task = asyncio.get_running_loop().create_task(self._run())

    def _count_stream(self, request: Request) -> None:
        """A cap for each address of the network; none for this machine."""
        if request.peer_class not in ("lan", "public"):
            return
        streams = self.server.lan_streams
        if streams.get(request.peer, 0) >= MAX_LAN_STREAMS:
            message = f"{MAX_LAN_STREAMS} requests of this address are running: wait for one."
            self.error = AztError(429, "concurrency_limit", message, headers={"retry-after": "1"})
            return
        streams[request.peer] = streams.get(request.peer, 0) + 1
        self._counted = "lan"

    async def _run(self) -> None:
        try:
            reply = await self._handle()
        except asyncio.CancelledError:
            if self.stopping is None:
                return  # the client left; `client_left` has ended this exchange
            reply = self.failed(self.stopping)
        if self.ended:
            self._discard(reply.body)
            return
        self.send(reply)
        if self.pump is not None:
            await self._pump(self.pump)

    async def _handle(self) -> Reply:
        try:
            if self.error or self.route is None:
                raise self.error or AztError(500, "internal_error", "The request has no handler.")
            if self.codings:
                await self._inflate()
            return await self.route.handler(self.server.context, self.request)
        except AztError as error:
            return self.failed(error)
        except Exception:  # the one catch-all around handlers
            log.exception("%s failed", self.request.id)
            return self.failed(_internal_error(self.request.id))

    def failed(self, error: AztError) -> Reply:
        self.request.record.error_code = error.code or "error"
        return _error_reply(error)

    async def _inflate(self) -> None:
        """Undo the content codings. What is small is done at once, more in a thread."""
        request, zstd = self.request, self.server.zstd
        for coding in self.codings:
            before = len(request.body)
            try:
                request.body = inflate(request.body, coding, min(self.limit, MIB), zstd)
            except BadRequest as error:
                if error.status != 413 or self.limit <= MIB:
                    raise
                async with self.server.inflating:
                    request.body = await in_thread(
                        self.server.workers, inflate, request.body, coding, self.limit, zstd
                    )
            self.hold(len(request.body) - before)

    def send(self, reply: Reply) -> None:
        """Write the answer, or at least its head when the body is a stream."""
        body = reply.body
        head = self._render(reply, len(body) if isinstance(body, (bytes, bytearray)) else None)
        if head is None:
            self.send(self.failed(_internal_error(self.request.id)))
            return
        self.head_sent = True
        write = self.connection.transport.write
        if self.request.method == "HEAD" or reply.status in (204, 304):
            self._discard(body)
            write(head)
            self._over()
        elif isinstance(body, (bytes, bytearray)):
            if len(body) <= _JOIN_BYTES:
                write(head + body)
            else:
                write(head)
                write(body)
            self._over()
        elif isinstance(body, AsyncIterator):
            self.pump = body
            write(head)
        else:
            self._start(body, head)

    def _render(self, reply: Reply, size: int | None) -> bytes | None:
        """The response head; None when a handler gave headers that cannot be sent."""
        record = self.request.record
        self.keep = self.keep and not self.server.draining
        headers = [*reply.headers, *self.cors]
        if size is not None and reply.status not in (204, 304):
            headers.append(("content-length", str(size)))
        if not self.keep:
            headers.append(("connection", "close"))
        try:
            reason = http.client.responses.get(reply.status, "").encode()
            response = h11.Response(status_code=reply.status, headers=headers, reason=reason)
            head = self._wire.send(response)
        except (h11.LocalProtocolError, UnicodeEncodeError):
            log.exception("%s: the answer has a header that cannot be sent", self.request.id)
            self._wire = h11.Connection(h11.SERVER)
            self.keep = False
            return None
        record.status = reply.status
        self._chunked = size is None and self.is_modern
        # Lines that are safe by their making are added here: h11 would check each of them twice.
        own = f"{self.server.common_headers}\r\n"
        if all(name.lower() != "x-request-id" for name, _ in reply.headers):
            own = f"x-request-id: {self.request.id}\r\n{own}"
        if size is not None:
            spent_ms = round((time.monotonic() - record.started_s) * 1000)
            own = f"openai-processing-ms: {spent_ms}\r\n{own}"
        return head[:-2] + own.encode("ascii")

    def _start(self, stream: StreamBody, head: bytes) -> None:
        self.stream = stream
        self._pending = head  # leaves with the first bytes of the body when `start` has some
        try:
            stream.start(self)
        except Exception:  # a broken body must not take the loop down
            log.exception("%s: the stream did not start", self.request.id)
            self.cut()
        if self._pending and not self.ended:
            self.connection.transport.write(self._pending)
            self._pending = b""

    def write(self, data: bytes) -> None:
        if self.ended or not data:
            return
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if self._pending:
            framed = self._pending + framed
            self._pending = b""
        self.connection.transport.write(framed)

    def finish(self) -> None:
        if self.ended:
            return
        last = self._pending + (b"0\r\n\r\n" if self._chunked else b"")
        self._pending = b""
        if last:
            self.connection.transport.write(last)
        self._over()

    def cut(self) -> None:
        if self.ended:
            return
        self.request.record.result = "failed"
        self.end()
        if self._chunked:
            self.connection.close()  # what was written still arrives, the last chunk never does
        else:
            self.connection.transport.abort()  # a plain close would mean: complete

    async def _pump(self, body: AsyncIterator[bytes]) -> None:
        try:
            async for piece in body:
                self.write(piece)
                await self.connection.writable()
            self.finish()
        except asyncio.CancelledError:
            self.finish()  # the server stops; when the client left, this exchange has ended already
        except Exception:  # the status is sent: all that is left is to cut
            log.exception("%s: the body failed", self.request.id)
            self.cut()
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()

    @staticmethod
    def _discard(body: bytes | StreamBody | AsyncIterator[bytes]) -> None:
        """Nobody reads this body: a stream is told so; an iterator has not begun."""
        if not isinstance(body, (bytes, bytearray, AsyncIterator)):
            body.cancel()

    # -- its end

    def _over(self) -> None:
        self.end()
        self.connection.answered(self)

    def end(self) -> None:
        """Close the record and give back what the request held. A second call does nothing."""
        if self.ended:
            return
        self.ended = True
        self.stream = None
        self.server.bodies_bytes -= self._held
        self.request.body = b""
        if self._counted == "lan":
            streams, peer = self.server.lan_streams, self.request.peer
            streams[peer] -= 1
            if not streams[peer]:
                del streams[peer]
        if self._counted:
            self.server.count_down()
        self.request.record.end(time.monotonic())

    def client_left(self) -> None:
        """Stop whatever runs for a client that is gone."""
        if self.ended:
            return
        record, stream = self.request.record, self.stream
        record.status = record.status or 499
        record.result = "cancelled"
        record.error_code = "client_closed_request"
        if stream is not None:
            stream.cancel()  # before the record closes: the stream knows what was delivered
        self.end()
        if self.task is not None:
            self.task.cancel()

    def stop(self, error: AztError) -> None:
        """The server ends: a stream says so in its own words, a waiting handler is answered for."""
        self.stopping = error
        self.keep = False
        if self.stream is not None:
            self.stream.stop(error)
        elif self.task is not None:
            self.task.cancel()

    def probe(self) -> None:
        """Write something harmless, to which a client that is gone reacts with a reset."""
        if self.stream is not None:
            self.stream.probe()
        elif not self.head_sent and self.is_modern:
            # RFC 9110 15.2: a client must take any number of 1xx answers, asked for or not.
            self.connection.transport.write(_CONTINUE)


def _internal_error(request_id: str) -> AztError:
    message = f"azt failed on this request. Its log names the reason under {request_id}."
    return AztError(500, "internal_error", message)


class Connection(asyncio.Protocol):
    """One client connection. Requests are answered one after the other, in order.

            +------------- kept ---------------+
            v                                  |
          HEAD --gated--> BODY --complete--> ANSWER --last or refused--> CLOSING --> lost
            |               |                  |                            ^
            +---------------+-- malformed, ----+----------------------------+
                                too slow

    HEAD and BODY have a deadline, CLOSING too: the writing side is shut, what still comes is
    dropped for a while, so that the client can read its answer before a reset. The server's ticker
    looks at the deadline; no timer runs per connection. What arrives in ANSWER waits, up to
    PIPELINE_BYTES.
    """

    def __init__(self, server: HttpServer, address: str) -> None:
        self.server = server
        self.address = address
        self.place = peer_place(address, server.policy().own_networks)
        self.is_paused = False
        self.deadline = math.inf
        self._state: Literal["HEAD", "BODY", "ANSWER", "CLOSING"] = "HEAD"
        self.transport: asyncio.Transport
        self._exchange: _Exchange | None = None
        self._reader: LengthBody | ChunkedBody | None = None
        self._waiting = b""
        self._head_begun = True
        self._reading = True
        self._got_eof = False
        self._body_started_s = 0.0
        self._linger_bytes = LINGER_BYTES
        self._write_deadline = math.inf
        self._unwritten = 0
        self._writable: asyncio.Future[None] | None = None

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.deadline = time.monotonic() + HEAD_TIMEOUT_S
        if not self.server.admit(self):
            message = "Too many connections. Try again in a few seconds."
            self._refuse(AztError(503, "overloaded", message))
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._state == "CLOSING":
            self._linger_bytes -= len(data)
            if self._linger_bytes < 0:
                self.transport.abort()
            return
        self._waiting = self._waiting + data if self._waiting else data
        if self._state != "ANSWER":
            self._advance()
        if len(self._waiting) > PIPELINE_BYTES and self._state == "ANSWER" and self._reading:
            self._reading = False
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """True keeps the connection: the client may have closed its sending side only.

        Whether it did, or is gone altogether, shows only when something is written to it: the
        kernel of a client that is gone answers with a reset.
        """
        self._got_eof = True
        exchange = self._exchange
        if self._state != "ANSWER" or exchange is None or exchange.pump is not None:
            return False  # an iterator feeds a page that stays open, and no browser half-closes
        exchange.probe()
        loop = asyncio.get_running_loop()
        for delay_s in HALF_CLOSE_CHECKS_S:
            loop.call_later(delay_s, self._look_for_reset)
        return True

    def _look_for_reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        if self._state != "ANSWER" or sock.fileno() < 0:
            return
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._state = "CLOSING"
        self.server.forget(self)
        self._wake_writer()
        if self._exchange is not None:
            self._exchange.client_left()
        self._waiting = b""

    def pause_writing(self) -> None:
        self.is_paused = True
        self._unwritten = self.transport.get_write_buffer_size()
        self._write_deadline = time.monotonic() + WRITE_STALL_S
        if self._exchange is not None and self._exchange.stream is not None:
            self._exchange.stream.pause()

    def resume_writing(self) -> None:
        self.is_paused = False
        self._write_deadline = math.inf
        self._wake_writer()
        if self._exchange is not None and self._exchange.stream is not None:
            self._exchange.stream.resume()
        elif self._state == "HEAD" and self._waiting:
            self._advance()

    # -- requests

    def _advance(self) -> None:
        """Read on in what has arrived, until bytes are missing or a request is complete."""
        try:
            if self._state == "HEAD" and not self._read_head():
                return
            if self._state == "BODY":
                self._read_body()
        except AztError as error:
            # A refused request whose body is too large even to be skipped: the first reason counts.
            known = self._exchange.error if self._exchange and error.status == 413 else None
            self._refuse(known or error)

    def _read_head(self) -> bool:
        """Whether a whole head was there."""
        if self.is_paused:
            return False  # the client does not read its answers: no more of them
        end = find_head(self._waiting)
        if not end:
            if not self._head_begun:
                self._head_begun = True
                self.deadline = time.monotonic() + HEAD_TIMEOUT_S
            if self._got_eof:
                self.close()
            return False
        head, self._waiting = self._waiting[:end], self._waiting[end:]
        self._exchange = exchange = self._new_exchange()
        exchange.read(head)
        self._expect_body(exchange)
        return True

    def _new_exchange(self) -> _Exchange:
        name = "req_" + secrets.token_hex(12)
        record = RequestRecord(name, "-", "-", time.monotonic())
        request = Request(name, "-", "-", "-", {}, {}, self.address, self.place, record)
        return _Exchange(self, self.server, request)

    def _expect_body(self, exchange: _Exchange) -> None:
        headers = exchange.request.headers
        length = int(headers.get("content-length", "0"))
        is_chunked = "transfer-encoding" in headers
        if not length and not is_chunked:
            self._answer(exchange)
            return
        waits = "expect" in headers and exchange.is_modern and not self._waiting
        if length > exchange.limit or (waits and exchange.error):
            raise exchange.error or _too_large(exchange.limit)
        if waits:
            self.transport.write(_CONTINUE)
        self._reader = ChunkedBody(exchange.limit) if is_chunked else LengthBody(length)
        self._state = "BODY"
        self._body_started_s = time.monotonic()

    def _read_body(self) -> None:
        reader, exchange = self._reader, self._exchange
        if reader is None or exchange is None:
            return
        before = len(reader.body)
        at = reader.feed(self._waiting, 0)
        self._waiting = self._waiting[at:]
        exchange.hold(len(reader.body) - before)
        if reader.complete:
            exchange.request.body = reader.body
            self._reader = None
            self._answer(exchange)
            return
        if self._got_eof:
            self.close()
        now = time.monotonic()
        slowest = self._body_started_s + BODY_STALL_S + len(reader.body) / BODY_MIN_BYTES_PER_S
        self.deadline = min(now + BODY_STALL_S, slowest)

    def _answer(self, exchange: _Exchange) -> None:
        self._state = "ANSWER"
        self.deadline = math.inf
        exchange.begin()

    def answered(self, exchange: _Exchange) -> None:
        """The answer has been handed to the kernel or to the write buffer."""
        if self._state == "CLOSING":
            return
        if not exchange.keep or self.server.draining:
            self._linger(LINGER_S)
            return
        self._exchange = None
        self._state = "HEAD"
        self._head_begun = False
        self.deadline = time.monotonic() + KEEP_ALIVE_S
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()
        if self._waiting:
            self._advance()
        elif self._got_eof:
            self.close()

    def _refuse(self, error: AztError) -> None:
        """Answer and close: what follows on this connection is never read as a request."""
        exchange = self._exchange
        if exchange is None or exchange.ended:
            exchange = self._exchange = self._new_exchange()
        well_formed = error.code != "malformed_request" and exchange.request.method != "-"
        exchange.keep = False
        self._reader = None
        self._state = "ANSWER"
        if well_formed:
            self._linger_bytes = LINGER_REFUSED_BYTES
        exchange.send(exchange.failed(error))
        if well_formed:
            self.deadline = time.monotonic() + LINGER_REFUSED_S

    # -- endings

    def _linger(self, seconds: float) -> None:
        """Shut the writing side and wait for the client to do the same."""
        self._state = "CLOSING"
        self._waiting = b""
        self.deadline = time.monotonic() + seconds
        if self._got_eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        if not self._reading:
            self.transport.resume_reading()
        # Python 3.11 raises where the peer has reset the connection meanwhile.
        with contextlib.suppress(OSError):
            self.transport.write_eof()

    def close(self) -> None:
        """End without an answer: nothing was asked."""
        self._state = "CLOSING"
        self.deadline = time.monotonic() + LINGER_S
        self.transport.close()

    def close_idle(self) -> None:
        if self._state == "HEAD" and not self._waiting:
            self.close()

    def stop(self, error: AztError) -> None:
        if self._state == "ANSWER" and self._exchange is not None and not self._exchange.ended:
            self._exchange.stop(error)

    def tick(self, now: float) -> None:
        """Look at the deadlines; called by the server's ticker."""
        if now >= self._write_deadline:
            unwritten = self.transport.get_write_buffer_size()
            if unwritten >= self._unwritten:
                self.transport.abort()
                return
            self._unwritten = unwritten
            self._write_deadline = now + WRITE_STALL_S
        if now < self.deadline:
            return
        if self._state == "CLOSING":
            unwritten = self.transport.get_write_buffer_size()
            if not unwritten:
                self.transport.abort()
            elif self._write_deadline == math.inf:
                # The answer is still being read: that may take its time as long as it goes on.
                self._unwritten = unwritten
                self._write_deadline = now + WRITE_STALL_S
        elif self._state == "BODY" or self._waiting:
            message = "The request came too slowly. Send it again."
            self._refuse(AztError(408, "request_timeout", message))
        else:
            self.close()

    async def writable(self) -> None:
        """Wait until the client has caught up, or is gone."""
        while self.is_paused and self._state != "CLOSING":
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable

    def _wake_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


# -- the server

_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _raise_file_limit() -> int:
    """Allow as many open files as the system lets us; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 65536 if soft == resource.RLIM_INFINITY else soft


def _common_headers() -> str:
    """What every answer carries, up to and with the line end."""
    return (
        f"date: {email.utils.formatdate(usegmt=True)}\r\n"
        "x-content-type-options: nosniff\r\ncross-origin-resource-policy: same-origin\r\n"
    )


class HttpServer:
    """Listeners, connections and the ticker. `routes`, `context` and `policy` are the caller's.

    context  handed to every handler
    policy   called for each request
    workers  threads for large compressed bodies
    """

    def __init__(
        self,
        routes: Sequence[Route],
        context: Any,
        policy: Callable[[], Policy],
        workers: WorkerPool | None = None,
    ) -> None:
        self.context = context
        self.policy = policy
        self.workers = workers or WorkerPool("inflate", 4)
        self.inflating = asyncio.Semaphore(4)
        self.zstd = _find_zstd()
        self.running = 0
        self.draining = False
        self.bodies_bytes = 0
        self.lan_streams: dict[str, int] = {}
        self.common_headers = _common_headers()
        self._table = _RouteTable(routes)
        self._connections: set[Connection] = set()
        self._by_peer: dict[str, int] = {}
        self._listeners: list[socket.socket] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._reserve = -1
        self._complained_s = -math.inf
        self._connections_max = MAX_CONNECTIONS

    # -- deciding

    def decide(self, exchange: _Exchange) -> None:
        """What the head alone decides: `route`, `limit`, `codings`, `cors`, or `error`."""
        try:
            self._decide(exchange, exchange.request)
        except AztError as error:
            exchange.error = error

    def _decide(self, exchange: _Exchange, request: Request) -> None:
        if self.draining:
            raise _shutting_down()
        request.path, request.query = read_path(request.target)
        request.record.path = request.path[:200]
        _refuse_oddities(request)
        policy, headers, method = self.policy(), request.headers, request.method
        is_preflight = method == "OPTIONS"
        if is_preflight:
            method = headers.get(_ASKED_METHOD, "GET")
        match = self._table.find(request.path, "GET" if method == "HEAD" else method)
        caller = read_caller(request.peer_class, headers, policy, match.access)
        if is_preflight:
            # It carries no proof: the question is whether the call with it would be allowed.
            caller = replace(caller, key="good", proof=True, marked=True)
        fault = may(caller, match.access, method, policy)
        if caller.origin and match.access == "api" and not (fault and fault.status == 403):
            exchange.cors = _cors_headers(caller.origin)
        if fault is not None:
            raise fault
        if not match.methods:
            message = f"Invalid URL ({request.method} {request.path[:200]})"
            raise AztError(404, "unknown_url", message)
        if match.route is None and (not is_preflight or _ASKED_METHOD in headers):
            raise _wrong_method(request, match.methods)
        if match.route is None or is_preflight:
            if exchange.cors:
                asked = headers.get("access-control-request-headers", "")
                exchange.cors += _preflight_headers(asked)
            exchange.cors.append(("allow", ", ".join(sorted(match.methods | {"OPTIONS"}))))
            exchange.route = _OPTIONS
            return
        self._accept_body(exchange, match.route, policy)
        request.params, request.has_proof = match.params, caller.proof
        exchange.route = match.route

    def _accept_body(self, exchange: _Exchange, route: Route, policy: Policy) -> None:
        headers = exchange.request.headers
        if route.access.startswith("admin") and route.method not in ("GET", "DELETE"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in route.types:
                types = " or ".join(route.types)
                message = f"Send the body as {types}."
                raise BadRequest(message, code="unsupported_media_type", status=415)
        if not route.raw_body and "content-encoding" in headers:
            exchange.codings = content_codings(headers["content-encoding"], self.zstd)
        exchange.limit = route.body_max_bytes or policy.body_max_bytes

    # -- connections

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; False when there are too many of them."""
        peer, here = connection.address, connection.place == "own"
        most = MAX_CONNECTIONS_LOOPBACK if here else MAX_CONNECTIONS_PER_PEER
        if len(self._connections) >= self._connections_max or self._by_peer.get(peer, 0) >= most:
            return False
        self._connections.add(connection)
        self._by_peer[peer] = self._by_peer.get(peer, 0) + 1
        return True

    def forget(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._by_peer[connection.address] -= 1
        if not self._by_peer[connection.address]:
            del self._by_peer[connection.address]
        self._changed.set()

    def count_down(self) -> None:
        self.running -= 1
        self._changed.set()

    # -- listening

    async def listen(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen there, and on the loopback address of the other family where it can be had.

        host     an address or a name; port 0 picks a free one
        returns  (address, port) of every listener, the one asked for first
        raises   OSError when the address is taken or is not this machine's
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        family, *_, address = found[0]
        first = self._bind(family, str(address[0]), port)
        port = first.getsockname()[1]
        twins = {"0.0.0.0": "::1", "127.0.0.1": "::1", "::": "0.0.0.0", "::1": "127.0.0.1"}
        twin = twins.get(str(address[0]))
        if twin is not None:
            other = socket.AF_INET6 if ":" in twin else socket.AF_INET
            with contextlib.suppress(OSError):
                self._bind(other, twin, port)
        self._connections_max = min(MAX_CONNECTIONS, max(16, (_raise_file_limit() - 64) // 2))
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for listener in self._listeners:
            loop.add_reader(listener, self._accept, listener)
        self._tick()
        return [listener.getsockname()[:2] for listener in self._listeners]

    def _bind(self, family: int, address: str, port: int) -> socket.socket:
        # With proto=IPPROTO_TCP, or asyncio leaves TCP_NODELAY off (performance.md 3).
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind((address, port))
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listeners.append(listener)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(LISTEN_BACKLOG):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_FILES:
                    raise
                self._out_of_files(listener)
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._adopt(sock, str(address[0])))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    async def _adopt(self, sock: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: Connection(self, address), sock)
        except OSError:
            sock.close()

    def _out_of_files(self, listener: socket.socket) -> None:
        """No file is left for a new connection: turn it away with the reserved one, then rest."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if now - self._complained_s > 10:
            self._complained_s = now
            log.error("Too many open files: new connections are turned away (see ulimit -n).")
        if self._reserve >= 0:
            os.close(self._reserve)
            with contextlib.suppress(OSError):
                listener.accept()[0].close()
            self._reserve = -1
        with contextlib.suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        loop.remove_reader(listener)
        loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self.common_headers = _common_headers()
        now = time.monotonic()
        for connection in list(self._connections):
            connection.tick(now)

    # -- stopping

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, let running requests end within `timeout_s`, then end them."""
        self.draining = True
        self._stop_listening()
        for connection in list(self._connections):
            connection.close_idle()
        await self._until(lambda: not self.running, timeout_s)
        for connection in list(self._connections):
            connection.stop(_shutting_down())
        await self._until(lambda: not self.running, LINGER_S)
        await self._until(lambda: not self._connections, 2 * LINGER_S)
        for connection in list(self._connections):
            connection.transport.abort()
        await self._until(lambda: not self._connections, LINGER_S)
        if self._ticker is not None:
            self._ticker.cancel()

    def _stop_listening(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    async def _until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_so():
                    self._changed.clear()
                    await self._changed.wait()


def _shutting_down() -> AztError:
    message = "azt is shutting down. Try again when it is back."
    return AztError(503, "shutting_down", message, headers={"retry-after": "5"})
# ==================================================================================================
# 16. Routes
#     16a OpenAI, 16c admin, 16d pages, then the table. Handlers are thin: read, call, reply.
# ==================================================================================================

# -- 16a. OpenAI ------------------------------------------------------------------------------------

_STREAM_HEADERS = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache, no-transform"),
    ("x-accel-buffering", "no"),
]


async def read_object(gw: Gateway, request: Request) -> Json:
    """The body as a JSON object, whatever its content type says. Frees the raw bytes.

    A large document is parsed in a thread: on the loop it would stop every stream meanwhile.
    """
    try:
        if len(request.body) > MIB:
            value = await in_thread(gw.short, parse_json, request.body)
        else:
            value = parse_json(request.body)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {str(error)[:200]}.", None, None) from None
    request.record.request_bytes = len(request.body)
    request.release()
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.", None, "invalid_type")
    return value


async def _translated(
    gw: Gateway, request: Request, translate: Callable[..., T], body: Json, *more: Any
) -> T:
    """A request translated on the loop, or in a thread when it is large."""
    arguments = (body, gw.catalogue.efforts, gw.default_model, *more)
    if request.record.request_bytes > MIB:
        return await in_thread(gw.short, translate, *arguments)
    return translate(*arguments)


async def _start_turn(
    gw: Gateway,
    request: Request,
    upstream: Json,
    streaming: bool,
    translator: Callable[[], Translator],
) -> Relay:
    """Open the upstream turn of a request and keep its record."""
    session = str(upstream.get("prompt_cache_key") or uuid.uuid4())
    is_large = request.record.request_bytes > MIB
    if is_large:
        body = await in_thread(gw.short, encode_large_json, upstream)
        upstream.clear()  # the bytes are what is sent, also on another try: one copy is enough
    else:
        body = encode_json(upstream)
    turn = Turn(body, session, streaming, translator)
    del body
    record = request.record
    try:
        relay = await gw.rotation.open_turn(turn)
    finally:
        record.attempts = turn.attempts
        record.account = turn.account.name if turn.account else "-"
    return relay


def _turn_headers(request: Request, ignored: Sequence[str]) -> list[tuple[str, str]]:
    headers = [("x-azt-attempts", str(request.record.attempts))]
    if request.peer_class == "own":
        headers.append(("x-azt-account", urllib.parse.quote(request.record.account)))
    if ignored:
        headers.append(("x-azt-ignored-params", ", ".join(ignored)))
    return headers


def _note_end(record: RequestRecord, relay: Relay) -> None:
    """What the record learns when an answer has ended, however it ended."""
    translator = relay.translator
    record.usage = translator.usage
    if relay.first_output_s is not None:
        record.ttft_ms = round((relay.first_output_s - record.started_s) * 1000)
    if translator.failure is not None:
        record.result, record.error_code = "failed", translator.failure.code


async def get_models(gw: Gateway, request: Request) -> Reply:
    return json_reply(gw.catalogue.openai_models())


async def get_model(gw: Gateway, request: Request) -> Reply:
    return json_reply(gw.catalogue.find(request.params["id"]))


async def post_chat_completions(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    chat = await _translated(gw, request, chat_to_responses, body)
    del body
    record, now = request.record, time.time()
    record.model = chat.model
    fast = gw.environment.fast
    relay = await _start_turn(
        gw, request, chat.upstream, chat.stream, lambda: ChatStream(chat, now, fast=fast)
    )
    headers = _turn_headers(request, chat.ignored)
    if chat.stream:
        relay.on_end = functools.partial(_note_end, record)
        return Reply(200, relay, _STREAM_HEADERS + headers)
    await relay.whole()
    _note_end(record, relay)
    return json_reply(relay.translator.result(), headers=headers)


async def post_responses(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    now = time.time()
    asked = await _translated(gw, request, responses_to_upstream, body, gw.responses, now)
    del body
    record = request.record
    record.model = asked.model
    fast = gw.environment.fast

    def finish(relay: Relay) -> None:
        _note_end(record, relay)
        stream = cast(ResponsesStream, relay.translator)
        if asked.store and stream.done and stream.failure is None:
            gw.responses.put(stream.response, asked.input_items, stream.output_items, time.time())

    relay = await _start_turn(
        gw, request, asked.upstream, asked.stream, lambda: ResponsesStream(asked, now, fast=fast)
    )
    headers = _turn_headers(request, asked.ignored)
    if asked.stream:
        relay.on_end = finish
        return Reply(200, relay, _STREAM_HEADERS + headers)
    await relay.whole()
    finish(relay)
    return json_reply(relay.translator.result(), headers=headers)


def _stored(gw: Gateway, request: Request) -> StoredResponse:
    response_id = request.params["id"]
    stored = gw.responses.get(response_id, time.time())
    if stored is None:
        raise AztError(
            404,
            "response_not_found",
            f"There is no response {response_id[:80]!r} in memory: azt keeps the newest for a day.",
            param="response_id",
        )
    return stored


async def get_response(gw: Gateway, request: Request) -> Reply:
    if request.query.get("stream") == "true":
        raise BadRequest(
            "A stored response cannot be streamed again; leave out 'stream'.",
            "stream",
            "unsupported_value",
        )
    return json_reply(_stored(gw, request).response)


async def delete_response(gw: Gateway, request: Request) -> Reply:
    stored = _stored(gw, request)
    gw.responses.delete(request.params["id"])
    return json_reply({"id": stored.response["id"], "object": "response", "deleted": True})


async def get_response_input_items(gw: Gateway, request: Request) -> Reply:
    return json_reply(input_items_page(_stored(gw, request), request.query))


async def post_response_cancel(gw: Gateway, request: Request) -> Reply:
    _stored(gw, request)
    raise BadRequest("Cannot cancel a synchronous response.", None, None)


async def post_input_tokens(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    asked = await _translated(gw, request, responses_to_upstream, body, gw.responses, time.time())
    count = estimate_input_tokens(asked.upstream)
    return json_reply({"object": "response.input_tokens", "input_tokens": count})


# OpenAI paths below /v1 that clients try and azt does not offer -> why.
_NOT_OFFERED = {
    "assistants": "the Codex backend has no assistants",
    "audio": "the Codex backend takes no audio",
    "batches": "the Codex backend has no batches",
    "completions": "use /v1/chat/completions",
    "embeddings": "the Codex backend has no embedding model",
    "files": "azt stores no files; send file data inline",
    "fine_tuning": "the Codex backend has no fine-tuning",
    "moderations": "the Codex backend has no moderation endpoint",
    "realtime": "azt does not relay voice",
    "threads": "the Codex backend has no threads",
    "uploads": "azt stores no files; send file data inline",
    "vector_stores": "azt stores no files",
}


async def _not_offered(gw: Gateway, request: Request) -> Reply:
    why = _NOT_OFFERED[request.path.strip("/").removeprefix("v1/").partition("/")[0]]
    # 404 and not 501: client libraries send every 5xx again.
    raise AztError(404, "endpoint_not_supported", f"azt does not offer {request.path}: {why}.")


# -- 16c. Admin -------------------------------------------------------------------------------------


def _ms(seconds: float) -> int | None:
    return int(seconds * 1000) if seconds else None


def _private_reply(value: Json, status: int = 200) -> Reply:
    """What no cache may keep."""
    return json_reply(value, status, [("cache-control", "no-store")])


def _account_view(gw: Gateway, account: Account) -> Json:
    expired = bool(account.expires_at) and account.expires_at < time.time()
    return {
        "id": account.id,
        "email": account.email,
        "accountId": account.account_id,
        "label": account.label or None,
        "plan": account.plan,
        "status": "login_rejected" if account.rejected else "expired" if expired else "ready",
        "statusParams": {"reason": account.rejected} if account.rejected else {},
        "active": gw.store.active_id == account.id,
        "createdAt": _ms(account.created_at),
        "tokenExpiresAt": _ms(account.expires_at),
    }


async def admin_get_accounts(gw: Gateway, request: Request) -> Reply:
    items = [_account_view(gw, account) for account in gw.store.accounts.values()]
    return _private_reply({"items": items, "next": None, "total": len(items)})


async def admin_post_accounts_import(gw: Gateway, request: Request) -> Reply:
    """All or nothing: every entry is checked before the first one is added."""
    body = await read_object(gw, request)
    now = time.time()
    accounts = to_accounts(import_entries(body.get("payload")), now)
    results = await gw.change_accounts(lambda store: [store.add(one) for one in accounts])
    items = [
        {
            "index": at,
            "id": account.id,
            "email": account.email,
            "plan": account.plan,
            "result": result,
        }
        for at, (account, result) in enumerate(zip(accounts, results, strict=True))
    ]
    return _private_reply(
        {
            "summary": {word: results.count(word) for word in ("new", "update", "same")},
            "items": items,
        }
    )


async def admin_post_account_activate(gw: Gateway, request: Request) -> Reply:
    def activate(store: AccountStore) -> tuple[str | None, Account]:
        previous, account = store.active_id, store.find(request.params["id"])
        store.active_id = account.id
        return previous, account

    previous, account = await gw.change_accounts(activate)
    view = _account_view(gw, account)
    return _private_reply({"activeId": account.id, "previousId": previous, "account": view})


async def admin_post_accounts_remove(gw: Gateway, request: Request) -> Reply:
    names = (await read_object(gw, request)).get("ids")
    # An empty name would fit any account: what a script sends whose variable is empty.
    if not isinstance(names, list) or not names or not all(names):
        raise BadRequest("Name the accounts to remove.", "ids", "bad_field")

    def remove(store: AccountStore) -> int:
        chosen = {account.id: account for account in map(store.find, map(str, names))}
        for account in chosen.values():
            store.remove(account)
        return len(chosen)

    removed = await gw.change_accounts(remove)
    return _private_reply({"removed": removed, "activeId": gw.store.active_id})


async def admin_get_models(gw: Gateway, request: Request) -> Reply:
    return _private_reply(_models_view(gw))


async def admin_post_models_refresh(gw: Gateway, request: Request) -> Reply:
    changed = await gw.refresh_models()
    return _private_reply({"changed": changed, **_models_view(gw)})


def _models_view(gw: Gateway) -> Json:
    efforts = gw.catalogue.efforts
    items = [
        {
            "id": entry["slug"],
            "name": entry.get("display_name") or entry["slug"],
            "input": entry.get("input_modalities") or ["text"],
            "default": entry["slug"] == gw.default_model,
            "efforts": efforts[entry["slug"]],
        }
        for entry in gw.catalogue.listed
    ]
    return {"items": items, "syncedAt": _ms(gw.catalogue.fetched_at), "source": gw.catalogue.source}


async def admin_get_settings(gw: Gateway, request: Request) -> Reply:
    return _private_reply(_settings_view(gw))


def _settings_view(gw: Gateway) -> Json:
    settings = gw.settings
    values = {key: settings[key] for key in SETTINGS}
    values["networkProxy.hasPassword"] = "@" in settings.text("networkProxy.url")
    values["networkProxy.url"] = re.sub(r"//[^/@]*@", "//", settings.text("networkProxy.url"))
    restart = [
        key for key in ("server.host", "server.port") if key not in settings.fixed and gw.listening
    ]
    changed = [key for key in restart if settings[key] != gw.started_settings[key]]
    return {
        "revision": settings.revision,
        "restartNeeded": changed,
        "values": nested(values),
        "fixed": dict(settings.fixed),
    }


async def admin_patch_settings(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    values = body.get("values")
    if not isinstance(values, dict):
        raise BadRequest('Send the changes as {"values": {...}}.', "values", "bad_field")
    changes = flattened(values)
    for key, value in changes.items():
        check_setting(key, value)
        if SETTINGS[key].widens and not request.has_proof:
            raise AztError(
                401,
                "proof_needed",
                f"Changing {key} needs the admin token: use `azt settings set`.",
                param=key,
            )
        if key in gw.settings.fixed:
            raise AztError(
                409,
                "setting_fixed",
                f"{key} is fixed by {gw.settings.fixed[key]}; change it there.",
                param=key,
            )
    await gw.change_settings(changes, body.get("revision"))
    return _private_reply(_settings_view(gw))


async def admin_get_state(gw: Gateway, request: Request) -> Reply:
    port = gw.listening[0][1] if gw.listening else gw.settings.number("server.port")
    base = f"http://127.0.0.1:{port}"
    gateway = {
        "version": VERSION,
        "startedAt": _ms(gw.started_at),
        "pid": os.getpid(),
        "listen": [
            f"[{host}]:{at}" if ":" in host else f"{host}:{at}" for host, at in gw.listening
        ],
        "baseUrl": f"{base}/v1",
        "adminUrl": f"{base}/",
        "stateDir": str(gw.paths.state),
        "lanApi": gw.settings.flag("server.lanApi"),
        "keys": len(gw.keys),
    }
    accounts = [_account_view(gw, account) for account in gw.store.accounts.values()]
    models = {
        "count": len(gw.catalogue.listed),
        "syncedAt": _ms(gw.catalogue.fetched_at),
        "source": gw.catalogue.source,
    }
    routing = {"autoSwitch": False, "activeId": gw.store.active_id}
    return _private_reply(
        {
            "now": _ms(time.time()),
            "gateway": gateway,
            "defaultModel": gw.default_model,
            "routing": routing,
            "accounts": accounts,
            "models": models,
        }
    )


async def admin_get_keys(gw: Gateway, request: Request) -> Reply:
    shown = ("id", "name", "prefix", "createdAt")
    return _private_reply({"items": [{name: key.get(name) for name in shown} for key in gw.keys]})


async def admin_post_keys(gw: Gateway, request: Request) -> Reply:
    """The key itself is in this one answer and nowhere else: only its hash is kept."""
    name = (await read_object(gw, request)).get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w .@-]{1,64}", name):
        raise BadRequest(
            "A key needs a name of 1 to 64 letters, digits, spaces or . @ - _", "name", "bad_field"
        )
    key = "azt_" + secrets.token_urlsafe(32)
    item = {
        "id": "key_" + secrets.token_hex(4),
        "name": name,
        "prefix": key[:8],
        "hash": hashlib.sha256(key.encode()).hexdigest(),
        "createdAt": _ms(time.time()),
    }
    await gw.change_keys(lambda keys: [*keys, item])
    public = {part: value for part, value in item.items() if part != "hash"}
    return _private_reply({"item": public, "key": key, "first": gw.keys[:1] == [item]}, 201)


async def admin_delete_key(gw: Gateway, request: Request) -> Reply:
    wanted = request.params["id"]

    def revoke(keys: list[Json]) -> list[Json]:
        kept = [key for key in keys if wanted not in (key.get("id"), key.get("name"))]
        if len(kept) == len(keys):
            raise AztError(
                404, "key_not_found", f"There is no key {wanted!r}. `azt keys list` shows them."
            )
        return kept

    await gw.change_keys(revoke)
    return Reply(204)


async def get_health(gw: Gateway, request: Request) -> Reply:
    return json_reply({"ok": True})


# -- 16d. Pages -------------------------------------------------------------------------------------

_PAGE_HEADERS = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    (
        "permissions-policy",
        "camera=(), microphone=(), geolocation=(), payment=(), usb=(), clipboard-read=(), clipboard-write=(self)",
    ),
    ("cache-control", "no-cache"),
]


async def get_page(gw: Gateway, request: Request) -> Reply:
    page = gw.pages.get(request.path)
    if page is None:
        raise AztError(404, "unknown_url", f"There is no page {request.path[:80]!r}.")
    headers = [*_PAGE_HEADERS, ("etag", page.etag)]
    if request.headers.get("if-none-match") == page.etag:
        return Reply(304, b"", headers)
    return Reply(200, page.body, [("content-type", page.content_type), *headers])


# -- The table --------------------------------------------------------------------------------------

ADMIN = "/_gateway/admin"

ROUTES: list[Route] = sorted(
    [
        Route("DELETE", "/v1/responses/{id}", delete_response, "api"),
        Route("DELETE", f"{ADMIN}/keys/{{id}}", admin_delete_key, "admin_proof"),
        Route("GET", "/", get_page, "page"),
        Route("GET", "/_gateway/health", get_health, "health"),
        Route("GET", "/health", get_health, "health"),
        Route("GET", "/healthz", get_health, "health"),
        Route("GET", "/v1", get_health, "health"),
        Route("GET", "/v1/models", get_models, "api"),
        Route("GET", "/v1/models/{id}", get_model, "api"),
        Route("GET", "/v1/responses/{id}", get_response, "api"),
        Route("GET", "/v1/responses/{id}/input_items", get_response_input_items, "api"),
        Route("GET", f"{ADMIN}/accounts", admin_get_accounts, "admin_read"),
        Route("GET", f"{ADMIN}/keys", admin_get_keys, "admin_read"),
        Route("GET", f"{ADMIN}/models", admin_get_models, "admin_read"),
        Route("GET", f"{ADMIN}/settings", admin_get_settings, "admin_read"),
        Route("GET", f"{ADMIN}/state", admin_get_state, "admin_read"),
        Route("PATCH", f"{ADMIN}/settings", admin_patch_settings, "admin_write"),
        Route("POST", "/v1/chat/completions", post_chat_completions, "api"),
        Route("POST", "/v1/responses", post_responses, "api"),
        Route("POST", "/v1/responses/input_tokens", post_input_tokens, "api"),
        Route("POST", "/v1/responses/{id}/cancel", post_response_cancel, "api"),
        Route(
            "POST",
            f"{ADMIN}/accounts/import",
            admin_post_accounts_import,
            "admin_write",
            2 * IMPORT_MAX_BYTES,
        ),
        Route("POST", f"{ADMIN}/accounts/remove", admin_post_accounts_remove, "admin_write"),
        Route(
            "POST", f"{ADMIN}/accounts/{{id}}/activate", admin_post_account_activate, "admin_write"
        ),
        Route("POST", f"{ADMIN}/keys", admin_post_keys, "admin_proof"),
        Route("POST", f"{ADMIN}/models/refresh", admin_post_models_refresh, "admin_write"),
        *(
            Route(method, f"/v1/{name}{rest}", _not_offered, "api")
            for name in _NOT_OFFERED
            for method in ("DELETE", "GET", "POST")
            for rest in ("", "/{rest}")
        ),
    ],
    key=lambda route: (route.path, route.method),
)


def routes_of(gw: Gateway) -> list[Route]:
    """The table, and one route for each page that was found at the start."""
    return ROUTES + [
        Route("GET", name, get_page, "page") for name in sorted(gw.pages) if name != "/"
    ]


def policy_source(gw: Gateway) -> Callable[[], Policy]:
    """The settings as values for the pure decision table of room 15; made anew after a change."""
    known: tuple[Settings, list[Json], Policy] | None = None

    def current() -> Policy:
        nonlocal known
        if known is None or known[0] is not gw.settings or known[1] is not gw.keys:
            known = gw.settings, gw.keys, _policy(gw.settings, gw.keys, gw.admin_token)
        return known[2]

    return current


def _policy(settings: Settings, keys: list[Json], admin_token: str) -> Policy:
    name = socket.gethostname().lower()
    return Policy(
        own_names=frozenset({name, f"{name}.local"}),
        allowed_hosts=settings.words("server.allowedHosts"),
        cors_origins=settings.words("server.corsOrigins"),
        lan_api=settings.flag("server.lanApi"),
        loopback_exempt=settings.flag("apiKeys.loopbackExempt"),
        own_networks=(),
        key_hashes=frozenset(str(key.get("hash")) for key in keys),
        admin_token_hash=hashlib.sha256(admin_token.encode()).hexdigest(),
        body_max_bytes=settings.number("limits.bodyMb") * MIB,
    )
# ==================================================================================================
# 17. Demo upstream
#     A fake Codex backend on loopback for `azt start --demo`: no account, no network. It speaks the
#     real protocol; to the gateway it is only another base URL. Never contacts anything.
# ==================================================================================================

_DEMO_PACE_S = 0.035
_DEMO_SLOW_PACE_S = 0.5
_DEMO_TOKEN_S = 10 * 24 * 3600
_DEMO_REST_S = 90
"""Of `demo:limit`. Over a minute, so that SDKs report the limit at once and do not sleep it out."""

_DEMO_HELP = (
    "This is the demo backend of azt: no account, no network. Start a message with one of "
    "demo:tool, demo:reason, demo:image, demo:limit, demo:overload, demo:cut, demo:incomplete, "
    "demo:slow or demo:refuse to see how your program takes it."
)
_DEMO_ETAG = 'W/"azt-demo-1"'
_DEMO_MODELS = {entry["slug"]: entry for entry in Catalogue.read(None, None).entries}
# A few of what the real backend refuses: codex-upstream.md 3.6.
_DEMO_REFUSED = ("max_output_tokens", "metadata", "previous_response_id", "temperature", "top_p")
_DEMO_FORMATS = {"date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "email": "demo@a.test"}
# A chessboard of 64 x 64 pixels.
_DEMO_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEUoWqDw8Ovn8FlmAAAAF0lEQVR42mNg+A+FFDKo"
    "ZAzDqHuGlHsA8wL/AYF093AAAAAASUVORK5CYII="
)
# Word -> how its last event differs from a completed response.
_DEMO_OVERLOAD = {"code": "server_is_overloaded", "message": "Our servers are overloaded."}
_DEMO_ENDINGS: dict[str, Json] = {
    "incomplete": {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
    "overload": {"status": "failed", "error": _DEMO_OVERLOAD},
}
# Type of what has text -> the event of its text; for a part also its own event and index.
_DEMO_TEXTS = {
    "custom_tool_call": ("custom_tool_call_input", "", ""),
    "function_call": ("function_call_arguments", "", ""),
    "output_text": ("output_text", "content_part", "content_index"),
    "refusal": ("refusal", "content_part", "content_index"),
    "summary_text": ("reasoning_summary_text", "reasoning_summary_part", "summary_index"),
}


class DemoUpstream:
    """Serves the Codex backend, wham/usage and /oauth/token on a free loopback port."""

    def __init__(self, pace_s: float = _DEMO_PACE_S) -> None:
        now = int(time.time())
        self._pace_s = pace_s
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()
        self._windows: Json = {
            "primary": {"used_percent": 12, "window_minutes": 300, "reset_at": now + 9_000},
            "secondary": {"used_percent": 31, "window_minutes": 10_080, "reset_at": now + 300_000},
        }
        # Sent with every answer, whichever the real backend sends them with.
        self._headers = {"etag": _DEMO_ETAG, "x-models-etag": _DEMO_ETAG}
        self._headers["x-codex-plan-type"] = "plus"
        for window, state in self._windows.items():
            for name, value in state.items():
                self._headers[f"x-codex-{window}-{name.replace('_', '-')}"] = str(value)

    async def start(self) -> str:
        """Listen; the base URL (`http://127.0.0.1:PORT`)."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio logs an error when one that it made itself is cancelled.
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call as azt sends it, with a length and no coding; the answer ends with a close."""
        with contextlib.closing(writer), contextlib.suppress(OSError, EOFError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            headers = {name.lower(): value for name, value in re.findall(r"(\S+): *(.*)\r\n", head)}
            data = await reader.readexactly(int(headers.get("content-length", 0)))
            body = parse_event(data) or {}
            status, answer = self._answer(re.split(r"\?| HTTP", head)[0], headers, body)
            kind = "text/event-stream" if answer is None else "application/json"
            fields = self._headers | {"content-type": kind, "connection": "close"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            writer.write(f"HTTP/1.1 {status} Demo\r\n{lines}\r\n".encode())
            if answer is None:
                await self._stream(body, writer)
            elif status != 304:
                writer.write(encode_json(answer))

    def _answer(self, call: str, headers: Json, body: Json) -> tuple[int, Json | None]:
        """(status, JSON to send); None: the events of a turn instead."""
        if "/backend-api/" in call and "authorization" not in headers:
            return 401, {"detail": "Unauthorized"}
        if call == "POST /backend-api/codex/responses":
            return _demo_refusal(body)
        if call == "GET /backend-api/codex/models":
            is_known = headers.get("if-none-match") == _DEMO_ETAG
            return 304 if is_known else 200, {"models": list(_DEMO_MODELS.values())}
        if call == "GET /backend-api/wham/usage":
            windows = {
                f"{name}_window": state | {"limit_window_seconds": state["window_minutes"] * 60}
                for name, state in self._windows.items()
            }
            return 200, {"plan_type": "plus", "rate_limit": windows}
        if call != "POST /oauth/token":
            return 404, {"detail": "Not Found"}
        if str(body.get("refresh_token")).startswith("rt_demo"):
            return 200, demo_account(time.time()) | {"expires_in": _DEMO_TOKEN_S}
        return 401, {"error": {"code": "refresh_token_invalidated", "message": "Not a demo token."}}

    async def _stream(self, body: Json, writer: asyncio.StreamWriter) -> None:
        """The events of one turn at the pace of a model, or as far as `demo:cut` lets them."""
        _said, word = _demo_said(body)
        limits = {"type": "codex.rate_limits", "plan_type": "plus", "rate_limits": self._windows}
        words = 0
        for number, event in enumerate((limits, *_demo_events(body, word))):
            writer.write(encode_event(event | {"sequence_number": number}))
            if event["type"].endswith(".delta"):
                words += 1
                if word == "cut" and words == 5:
                    return
                await writer.drain()
                await asyncio.sleep(_DEMO_SLOW_PACE_S if word == "slow" else self._pace_s)


def _demo_refusal(body: Json) -> tuple[int, Json | None]:
    """What the backend refuses before any stream: faulty calls (codex-upstream.md 3.6), a limit."""
    model = body.get("model")
    faults = {
        "Stream must be set to true": body.get("stream") is not True,
        "Store must be set to false": body.get("store") is not False,
        "Input must be a list": not isinstance(body.get("input"), list),
        **{f"Unsupported parameter: {name}": name in body for name in _DEMO_REFUSED},
        f"The '{model}' model is {_NOT_FOR_CHATGPT}.": model not in _DEMO_MODELS,
    }
    if fault := next((detail for detail, is_fault in faults.items() if is_fault), None):
        return 400, {"detail": fault}
    if _demo_said(body)[1] != "limit":
        return 200, None
    error = {"type": "usage_limit_reached", "message": "The usage limit has been reached"}
    return 429, {"error": error | {"resets_at": int(time.time()) + _DEMO_REST_S}}


def _demo_said(body: Json) -> tuple[str, str]:
    """The text of the last user message, and the word after its `demo:`."""
    said = [item["content"] for item in body["input"] if item.get("role") == "user"][-1:]
    parts = said[0] if said and isinstance(said[0], list) else [{"text": text} for text in said]
    text = " ".join(part["text"] for part in parts if "text" in part).strip()
    return text, "".join(re.findall(r"\bdemo:(\w+)", text)[:1])


def _demo_events(body: Json, word: str) -> Iterator[Json]:
    """The events of one turn in the order of the real backend, `output` of the last one empty."""
    ident = secrets.token_hex(8)
    response: Json = {"id": f"resp_{ident}", "object": "response", "created_at": int(time.time())}
    response |= {"model": body["model"], "status": "in_progress", "output": [], "usage": None}
    for step in ("created", "in_progress"):
        yield {"type": f"response.{step}", "response": response}
    items = [] if word == "overload" else _demo_items(body, word, ident)
    for index, item in enumerate(items):
        yield from _demo_item_events(item, index)
    read, written = len(encode_json(body["input"])) // 4, len(encode_json(items)) // 4
    usage: Json = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    ending = {"status": "completed", "usage": usage} | _DEMO_ENDINGS.get(word, {})
    yield {"type": f"response.{ending['status']}", "response": response | ending}


def _demo_items(body: Json, word: str, ident: str) -> list[Json]:
    """The finished items of an answer. The last member of an item and of its part is what grows."""
    output = body["input"][-1].get("output") if body["input"] else None
    wanted = (body.get("text") or {}).get("format") or {"type": "text"}
    said, _word = _demo_said(body)
    text = f'You said: "{said[:200]}". {_DEMO_HELP}'
    if wanted["type"] != "text":
        schema = wanted.get("schema") or {"properties": {"you_said": {"const": said}}}
        text = json.dumps(_demo_value(schema, schema), ensure_ascii=False)
    elif output is not None:
        text = f"The tool answered: {str(output)[:200]}"
    part: Json = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    if word == "refuse":
        part = {"type": "refusal", "refusal": "I cannot help with that (demo)."}
    items: list[Json] = [{"type": "message", "role": "assistant", "content": [part]}]
    if output is None and (call := _demo_call(body, word)):
        items = [{"call_id": f"call_{ident}", **call}]
    elif word == "image":
        items = [{"type": "image_generation_call", "output_format": "png", "result": _DEMO_PNG}]
    elif word == "reason":
        thought = "**Reading the message** It asks for a demonstration: a short answer will do."
        summary = [{"type": "summary_text", "text": thought}]
        items.insert(0, {"type": "reasoning", "encrypted_content": "ZGVtbw==", "summary": summary})
    return [{"id": f"{item['type']}_{ident}", "status": "completed", **item} for item in items]


def _demo_call(body: Json, word: str) -> Json | None:
    """The call that this turn makes, for `demo:tool` or forced by `tool_choice`."""
    choice = body.get("tool_choice")
    name = choice.get("name") if isinstance(choice, dict) else None
    is_wanted = word == "tool" or choice == "required" or name
    for tool in body.get("tools") or [] if is_wanted else []:
        if tool["type"] == "function" and name in (None, tool["name"]):
            schema = tool.get("parameters") or {}
            arguments = json.dumps(_demo_value(schema, schema))
            return {"type": "function_call", "name": tool["name"], "arguments": arguments}
        if tool["type"] == "custom" and name in (None, tool["name"]):
            return {"type": "custom_tool_call", "name": tool["name"], "input": "demo input"}
    return None


def _demo_item_events(item: Json, index: int) -> Iterator[Json]:
    """A finished item -> the events by which it grows (codex-upstream.md 4.2 to 4.9)."""
    at = {"item_id": item["id"], "output_index": index}
    grows, grown = list(item.items())[-1]
    hollow = item | {"status": "in_progress", grows: type(grown)()}
    yield {"type": "response.output_item.added", "output_index": index, "item": hollow}
    if grows == "result":
        yield {"type": "response.image_generation_call.generating", **at}
    else:
        part = grown[0] if isinstance(grown, list) else item
        inside, around, place = _DEMO_TEXTS[part["type"]]
        member, text = list(part.items())[-1]
        if around:
            at[place] = 0
            yield {"type": f"response.{around}.added", **at, "part": part | {member: ""}}
        for word in re.findall(r"\S+\s*|\s+", text):
            yield {"type": f"response.{inside}.delta", **at, "delta": word}
        yield {"type": f"response.{inside}.done", **at, member: text}
        if around:
            yield {"type": f"response.{around}.done", **at, "part": part}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _demo_value(schema: Json, root: Json, name: str = "demo", depth: int = 0) -> Any:
    """A value that fits a JSON Schema, for the keywords that structured output allows."""
    # Far down, take what ends a recursive schema: the last option (`null`), required members only.
    place = -1 if depth > 4 else 0
    if "$ref" in schema:
        schema = functools.reduce(dict.__getitem__, schema["$ref"].split("/")[1:], root)
    if options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return _demo_value(options[place], root, name, depth + 1)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema or depth == 0 else "string")
    kind = kind[place] if isinstance(kind, list) else kind
    if kind == "object":
        members = schema.get("properties") or {}
        wanted = members if place == 0 else schema.get("required", ())
        return {key: _demo_value(members[key], root, key, depth + 1) for key in wanted}
    if kind == "array":
        items = [schema.get("items") or {}] * max(schema.get("minItems", 0), 1 + place)
        return [_demo_value(one, root, name, depth + 1) for one in items]
    number = schema.get("minimum", 1)
    text = _DEMO_FORMATS.get(schema.get("format", ""), f"demo {name}")
    return {"integer": number, "number": number, "boolean": True, "null": None}.get(kind, text)


def demo_account(now: float) -> Json:
    """The demo's account as `azt accounts import` takes it: unsigned, worthless elsewhere."""
    auth = {"chatgpt_account_id": "demo-account", "chatgpt_plan_type": "plus"}
    person = {"email": "demo@example.com", "https://api.openai.com/auth": auth}
    claims = person | {"exp": int(now) + _DEMO_TOKEN_S}
    parts = (encode_json({"alg": "none"}), encode_json(claims), b"unsigned")
    token = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    return {"access_token": token, "refresh_token": f"rt_demo{int(now)}", "id_token": token}
# ==================================================================================================
# 18. Command line
#     argparse, exit codes, and the only print. Every command but `start` speaks to the gateway over HTTP:
#     the running one, else a private one that lives as long as the command and holds the same lock.
# ==================================================================================================

EXIT_OK, EXIT_FAILED, EXIT_UNUSABLE, EXIT_PORT_TAKEN = range(4)


def say(text: str, end: str = "\n", to_stderr: bool = False) -> None:
    """The only print. A reader that left (`azt models | head`) or a closed terminal ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr if to_stderr else sys.stdout, flush=True)


# -- Serving ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _serving(gw: Gateway, host: str, port: int) -> AsyncIterator[HttpServer]:
    """A loaded gateway that listens; on the way out it drains."""
    server = HttpServer(routes_of(gw), gw, policy_source(gw))
    try:
        gw.listening = await server.listen(host, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise AztError(
            500,
            "port_in_use" if taken else "cannot_listen",
            f"azt cannot listen on {host}:{port} ({error.strerror}). Stop the program that holds the "
            f"port, or start azt with another `--host` or `--port` (`--port 0` picks a free port).",
        ) from None
    try:
        yield server
    finally:
        gw.listening = []


def _local_url(listening: list[tuple[str, int]]) -> str:
    host, port = listening[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


async def _serve(gw: Gateway, lock: HomeLock, opens_browser: bool) -> None:
    """Listen until a signal comes; then finish what runs, for at most DRAIN_S. A second signal ends at once."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal does not end the gateway
    async with _serving(
        gw, gw.settings.text("server.host"), gw.settings.number("server.port")
    ) as server:
        url = _local_url(gw.listening)
        await in_thread(gw.files, lock.write, url)
        say(f"azt is ready: {url}")
        _log_situation(gw, url)
        if opens_browser:
            await in_thread(gw.short, webbrowser.open, url)
        await signals.get()
        log.info("stopping: %d requests are still running", server.running)
        drained = asyncio.ensure_future(server.drain(DRAIN_S))
        hurry = asyncio.ensure_future(signals.get())
        await asyncio.wait({drained, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, hurry):
            task.cancel()


def _log_situation(gw: Gateway, url: str) -> None:
    log.info("base URL for clients: %s/v1", url)
    if gw.store.active is None:
        log.info(
            "no account yet: `azt accounts import ~/.codex/auth.json` takes over that of Codex"
        )
    if gw.listening[0][0] not in ("127.0.0.1", "::1"):
        who = "open to this network" if gw.settings.flag("server.lanApi") else "for this machine"
        lock = "with a key" if gw.keys else "without a key (`azt keys add NAME` sets one)"
        log.info("API: %s, %s. Administration: this machine only.", who, lock)


def _start(args: argparse.Namespace) -> int:
    environment = read_environment()
    flags: Json = {}
    for flag, key in (("host", "server.host"), ("port", "server.port"), ("log_level", "log.level")):
        if (value := getattr(args, flag)) is not None:
            flags[key] = check_setting(key, value, "--" + flag.replace("_", "-"))
    opens_browser = args.command == "start" and not args.no_open
    if args.demo:
        with tempfile.TemporaryDirectory(prefix="azt-demo-") as folder:
            asyncio.run(_run_demo(environment, flags, Path(folder), opens_browser))
    else:
        asyncio.run(_run(environment, flags, opens_browser))
    return EXIT_OK


async def _run(environment: Environment, flags: Json, opens_browser: bool) -> None:
    gw = Gateway(environment, flags)
    start_logging(gw.settings.text("log.level"))
    lock = HomeLock(gw.paths.lock)
    await in_thread(gw.files, prepare_home, gw.paths)
    holder = await in_thread(gw.files, lock.acquire)
    if holder is not None:
        where = f" at {holder['url']}" if holder.get("url") else ""
        raise StateError(
            f"Another azt (pid {holder['pid']}) serves this home{where}. Use it, or stop it first."
        )
    await in_thread(gw.files, gw.load)
    try:
        await _serve(gw, lock, opens_browser)
    finally:
        lock.release()
        gw.pool.close()


async def _run_demo(
    environment: Environment, flags: Json, folder: Path, opens_browser: bool
) -> None:
    """The gateway with the embedded upstream, in a throw-away home: it never touches the person's files."""
    demo = DemoUpstream()
    base = await demo.start()
    environment = replace(
        environment,
        paths=Paths(folder / "home", folder / "codex"),
        codex_base_url=f"{base}/backend-api/codex",
        chatgpt_base_url=f"{base}/backend-api",
        auth_base_url=base,
    )
    seed = AccountStore()
    seed.add(to_accounts([demo_account(time.time())], time.time())[0])
    files = WorkerPool("file", 1)
    await in_thread(files, prepare_home, environment.paths)
    await in_thread(files, write_json, environment.paths.accounts, seed.to_json())
    try:
        await _run(environment, flags, opens_browser)
    finally:
        await demo.stop()


# -- Speaking to a gateway ---------------------------------------------------------------------------


class _Client:
    """HTTP to a gateway of this home, with the proof of the admin token."""

    def __init__(self, url: str, admin_token: str) -> None:
        self.url = url
        host = urllib.parse.urlsplit(url).hostname or ""
        self._pool = ConnectionPool(Egress(own_hosts=frozenset({host})))
        self._headers = {
            "authorization": f"Bearer {admin_token}",
            "content-type": "application/json",
            "user-agent": f"azt-cli/{VERSION}",
            "x-azt-admin": "1",
        }

    @blocking
    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """One request, its JSON answer. Raises AztError with the gateway's own sentence."""
        return parse_event(self._open(method, path, body).body) or {}

    @blocking
    def events(self, path: str, body: Json) -> Iterator[Json]:
        """The events of a streamed answer, as they arrive."""
        answer = self._open("POST", path, body)
        sock, framing = cast(socket.socket, answer.sock), cast(Framing, answer.framing)
        sock.settimeout(None)
        parser, data = SSEParser(), answer.rest
        while True:
            yield from filter(None, map(parse_event, parser.feed(framing.feed(data))))
            if framing.ended or not (data := sock.recv(READ_BYTES)):
                return answer.close()

    def _open(self, method: str, path: str, body: Json | None) -> Answer:
        raw = b"" if body is None else encode_json(body)
        answer = open_response(
            self._pool, Call(method, self.url + path, self._headers, raw), Wire()
        )
        if answer.status >= 400:
            raise _answered(answer.status, parse_event(answer.body) or {})
        return answer


def _answered(status: int, value: Json) -> AztError:
    error = value.get("error")
    inner = error if isinstance(error, dict) else {}
    message = str(inner.get("message") or f"The gateway answered {status}.")
    return AztError(status, inner.get("code"), message)


def _on_gateway(function: Callable[[_Client], T], must_run: bool = False) -> T:
    """Run `function` with a client of the running gateway, else of a private one that ends with it."""
    environment = read_environment()
    prepare_home(environment.paths)
    lock = HomeLock(environment.paths.lock)
    for _ in range(50):
        holder = lock.acquire()
        if holder is None or holder.get("url"):
            break
        time.sleep(0.1)  # another command is at work; it takes a moment
    else:
        raise StateError(
            f"Another azt (pid {holder['pid'] if holder else '?'}) is using this home. Try again."
        )
    try:
        if holder is not None:
            return function(
                _Client(str(holder["url"]), read_or_make_secret(environment.paths.admin_token))
            )
        if must_run:
            raise AztError(503, "not_running", "azt is not running. Start it with `azt start`.")
        return asyncio.run(_privately(environment, function))
    finally:
        lock.release()


async def _privately(environment: Environment, function: Callable[[_Client], T]) -> T:
    """A gateway on a free loopback port for as long as `function` runs, which does so in a thread."""
    gw = Gateway(environment, {})
    start_logging("warning")
    logging.disable(logging.INFO)  # whatever log.level says: this is the log of one command
    await in_thread(gw.files, gw.load)
    async with _serving(gw, "127.0.0.1", 0) as server:
        client = _Client(_local_url(gw.listening), gw.admin_token)
        try:
            return await in_thread(gw.short, function, client)
        finally:
            await server.drain(1.0)
            gw.pool.close()


# -- Commands ----------------------------------------------------------------------------------------


def _show(args: argparse.Namespace, value: Any, lines: Iterable[str]) -> int:
    """The value as JSON with `--json`, else the lines for people."""
    for line in [json.dumps(value, indent=2, ensure_ascii=False)] if args.json else lines:
        say(line)
    return EXIT_OK


def _table(*rows: Sequence[str]) -> list[str]:
    """Columns as wide as their widest cell; control characters never reach the terminal."""
    clean = [[mask(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in clean
    )
    return [line.rstrip() for line in lines]


def _when(ms: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000)) if ms else "-"


_Run = Callable[[argparse.Namespace], int]


def _admin(
    method: str,
    path: str,
    lines: Callable[[Json], Iterable[str]],
    body: Callable[[argparse.Namespace], Json] | None = None,
) -> _Run:
    """A command that is one admin call; {name} in `path` is an argument of the command line."""

    def run(args: argparse.Namespace) -> int:
        words = ((name, value) for name, value in vars(args).items() if isinstance(value, str))
        texts = {name: urllib.parse.quote(value, safe="") for name, value in words}
        sent = body(args) if body else None if method == "GET" else {}
        result = _on_gateway(lambda client: client.call(method, ADMIN + path.format(**texts), sent))
        return _show(args, result, lines(result))

    return run


def _status(args: argparse.Namespace) -> int:
    try:
        state = _on_gateway(lambda client: client.call("GET", f"{ADMIN}/state"), must_run=True)
    except AztError as error:
        if error.code != "not_running":
            raise
        _show(args, {"running": False}, [error.message])
        return EXIT_FAILED
    gateway, models, accounts = state["gateway"], state["models"], state["accounts"]
    active = next((one for one in accounts if one["active"]), None)
    rows = (
        ("azt", f"{gateway['version']}, pid {gateway['pid']}, since {_when(gateway['startedAt'])}"),
        ("base URL", gateway["baseUrl"]),
        ("listens on", ", ".join(gateway["listen"])),
        ("keys", str(gateway["keys"] or "none: the API asks for none")),
        (
            "serving",
            f"{active['email'] or active['id']} ({active['plan']}, {active['status']})"
            if active
            else "no account",
        ),
        ("accounts", str(len(accounts))),
        ("model", f"{state['defaultModel']} ({models['count']} listed, from {models['source']})"),
        ("state", gateway["stateDir"]),
    )
    return _show(args, {"running": True, **state}, _table(*rows))


def _ask(args: argparse.Namespace) -> int:
    piped = sys.stdin is not None and not sys.stdin.isatty()
    text = " ".join(args.text) or (sys.stdin.read() if piped else "")
    if not text.strip():
        raise BadRequest('Say what to ask: azt ask "What is a lock file?"', "text")
    body: Json = {"messages": [{"role": "user", "content": text}], "stream": True}
    if args.model:
        body["model"] = args.model
    parts: list[str] = []

    def converse(client: _Client) -> None:
        for chunk in client.events("/v1/chat/completions", body):
            if "error" in chunk:
                raise _answered(502, chunk)
            for choice in chunk.get("choices", []):
                parts.append(choice["delta"].get("content") or choice["delta"].get("refusal") or "")
                if not args.json:
                    say(parts[-1], end="")

    _on_gateway(converse)
    return _show(args, {"text": "".join(parts)}, [""])


def _models(args: argparse.Namespace) -> int:
    method, path = ("POST", "/models/refresh") if args.refresh else ("GET", "/models")
    return _admin(method, path, _model_lines)(args)


def _model_lines(models: Json) -> list[str]:
    rows = [
        (one["id"], "default" if one["default"] else "", " ".join(one["efforts"]))
        for one in models["items"]
    ]
    return _table(("MODEL", "", "REASONING EFFORTS"), *rows)


def _account_lines(accounts: Json) -> list[str]:
    rows = [
        (
            "*" if one["active"] else "",
            one["id"],
            one["label"] or one["email"],
            one["plan"],
            one["status"],
            _when(one["tokenExpiresAt"]),
        )
        for one in accounts["items"]
    ]
    if not rows:
        return [
            "No account yet. `azt accounts import ~/.codex/auth.json` takes over the sign-in of Codex."
        ]
    return _table(("", "ID", "ACCOUNT", "PLAN", "STATE", "TOKEN UNTIL"), *rows)


def _import_body(args: argparse.Namespace) -> Json:
    entries: list[Json] = []
    for name in args.file:
        try:
            entries += read_entries(read_foreign(Path(os.path.expanduser(name)), IMPORT_MAX_BYTES))
        except OSError as error:
            raise BadRequest(
                f"{name} cannot be read ({error.strerror or error}).", "file"
            ) from None
    return {"payload": entries}


def _import_lines(result: Json) -> list[str]:
    return _table(
        *[(one["result"], one["id"], one["email"], one["plan"]) for one in result["items"]]
    )


def _now_serving(result: Json) -> str:
    return f"{result['account']['email'] or result['activeId']} serves the API now."


def _removed_lines(result: Json) -> list[str]:
    return [f"Removed: {result['removed']}."]


def _settings_get(args: argparse.Namespace) -> int:
    values = flattened(
        _on_gateway(lambda client: client.call("GET", f"{ADMIN}/settings"))["values"]
    )
    key = args.key or ""
    if key in values:
        return _show(args, values[key], [json.dumps(values[key], ensure_ascii=False)])
    found = {
        name: value for name, value in sorted(values.items()) if name.startswith(key and key + ".")
    }
    if not found:
        check_setting(key, None)
    return _show(
        args,
        found,
        [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in found.items()],
    )


def _settings_set(args: argparse.Namespace) -> int:
    value = parse_setting(args.key, args.value)
    late = f"{args.key} takes effect at the next start."

    def lines(result: Json) -> list[str]:
        changed = f"{args.key} = {json.dumps(value, ensure_ascii=False)}"
        return [changed, late] if args.key in result["restartNeeded"] else [changed]

    return _admin("PATCH", "/settings", lines, lambda _: {"values": {args.key: value}})(args)


def _key_lines(keys: Json) -> list[str]:
    rows = [
        (one["id"], one["name"], one["prefix"] + "…", _when(one["createdAt"]))
        for one in keys["items"]
    ]
    return (
        _table(*rows) if rows else ["No keys: the API asks for none. `azt keys add NAME` adds one."]
    )


def _new_key_lines(result: Json) -> list[str]:
    lines = [result["key"], "Shown only this once. Clients send it as their API key."]
    if result["first"]:
        lines.append("From now on every call needs a key, also on this machine.")
        lines.append(
            "`azt settings set apiKeys.loopbackExempt true` exempts programs on this machine."
        )
    return lines


# Every argument of every command, in argparse's terms.
_ARGUMENTS: dict[str, Json] = {
    "--demo": {"action": "store_true", "help": "embedded upstream: no account, no network"},
    "--host": {"help": "address to listen on (default 0.0.0.0)"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--log-level": {"choices": ("debug", "info", "warning", "error"), "help": "default info"},
    "--model": {"help": "default: the setting defaultModel"},
    "--no-open": {"action": "store_true", "help": "do not open the console in a browser"},
    "--port": {"type": int, "help": "port to listen on (default 8787; 0 picks a free one)"},
    "--refresh": {"action": "store_true", "help": "ask the upstream for the current list"},
    "ACCOUNT": {"help": "label, e-mail or the beginning of an id"},
    "ACCOUNT...": {"nargs": "+", "help": "label, e-mail or the beginning of an id"},
    "FILE...": {"nargs": "+", "help": "JSON such as Codex's auth.json, or a ZIP of such files"},
    "KEY": {"help": "a setting such as defaultModel"},
    "KEY?": {"nargs": "?", "help": "a setting such as defaultModel, or a group such as server"},
    "NAME": {"help": "what the key is for, or its id"},
    "TEXT*": {"nargs": "*", "help": "the question; read from standard input when left out"},
    "VALUE": {"help": "a JSON value; bare words need no quotes"},
}

# Command, with its arguments -> what it is for, and what runs.
_COMMANDS: dict[str, tuple[str, _Run]] = {
    "start --host --port --demo --log-level --no-open": ("start the gateway", _start),
    "serve --host --port --demo --log-level": ("start it without opening a browser", _start),
    "status --json": ("what runs, and who serves", _status),
    "ask TEXT* --model --json": ("ask a model; the answer streams to the terminal", _ask),
    "models --refresh --json": ("list the models", _models),
    "accounts list --json": ("list them", _admin("GET", "/accounts", _account_lines)),
    "accounts import FILE... --json": (
        "add accounts from files",
        _admin("POST", "/accounts/import", _import_lines, _import_body),
    ),
    "accounts use ACCOUNT --json": (
        "serve the API with this one",
        _admin("POST", "/accounts/{account}/activate", lambda result: [_now_serving(result)]),
    ),
    "accounts remove ACCOUNT... --json": (
        "forget them",
        _admin("POST", "/accounts/remove", _removed_lines, lambda args: {"ids": args.account}),
    ),
    "settings get KEY? --json": ("show one, a group, or all", _settings_get),
    "settings set KEY VALUE --json": ("change one", _settings_set),
    "keys list --json": ("list them", _admin("GET", "/keys", _key_lines)),
    "keys add NAME --json": (
        "make one; it is shown once",
        _admin("POST", "/keys", _new_key_lines, lambda args: {"name": args.name}),
    ),
    "keys revoke NAME --json": (
        "make one useless",
        _admin("DELETE", "/keys/{name}", lambda _: ["It is revoked."]),
    ),
}
_GROUPS = {"accounts": "who is signed in", "keys": "keys of clients", "settings": "every knob"}


def _parser() -> argparse.ArgumentParser:
    about = "Your own ChatGPT/Codex sign-in as an OpenAI-compatible API on your machine."
    parser = argparse.ArgumentParser(prog="azt", description=about)
    parser.add_argument("--version", action="version", version=f"azt {VERSION}")
    top = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    groups: dict[str, Any] = {}
    for line, (text, run) in _COMMANDS.items():
        name, *words = line.split()
        place: Any = top
        if name in _GROUPS:
            if name not in groups:
                group = top.add_parser(name, help=_GROUPS[name], description=_GROUPS[name])
                groups[name] = group.add_subparsers(required=True, metavar="ACTION")
            place, name, *words = groups[name], *words
        command = place.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for word in words:
            plain = word.rstrip(".?*")
            shown = {} if word.startswith("--") else {"metavar": plain}
            command.add_argument(plain.lower(), **shown, **_ARGUMENTS[word])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `azt`. Exit codes: 0 fine, 1 failed, 2 wrong use or state unusable, 3 port taken."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not None, as a closed one is
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        return cast(int, args.run(args))
    except (BadRequest, StateError) as error:
        code, message = EXIT_UNUSABLE, error.message
    except AztError as error:
        code = EXIT_PORT_TAKEN if error.code == "port_in_use" else EXIT_FAILED
        message = error.message
    except KeyboardInterrupt:
        code, message = 130, "Interrupted."
    say(f"azt: {mask(message)}", to_stderr=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
