#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["certifi", "h11", "truststore"]
# ///
"""azt (AI Zero Token): your own ChatGPT/Codex sign-in as an OpenAI-compatible API on your machine.

What it does: `azt start` listens on one port and answers `/v1/models`, `/v1/chat/completions`,
`/v1/responses` and `/v1/images/*` by calling the Codex backend with the account that you signed in;
it translates the requests and streams every delta on as soon as it has arrived. What Codex sends to
`/codex/v1` goes through unchanged. The page at `/` shows and changes all of it.

What it does not do: no telemetry, no update check by itself, no prompt or answer on disk, no call
to any host that is not in the table `OUTBOUND` (room 1) unless you set it, no browser
impersonation.

The file reads from top to bottom in rooms. A room uses only names from rooms above it.

     1  Constants            limits with units, every outbound host
     2  Errors and logging   one error tree, one log, redaction
     3  Threads              the only bridge between loop and worker threads
     4  State files          the only code that writes to disk
     5  Settings             defaults < file < environment < flags
     6  Outbound HTTP        TLS trust, proxy, connection pool; the only sockets out
     7  Event streams        JSON and SSE bytes <-> dicts, pure
     8  Accounts             8a who is signed in, quota, import, export; 8b Codex's own files
     9  OAuth                sign in and refresh
    10  Upstream             speak to the Codex backend for one given account
    11  Translators          dict to dict, pure: 11a chat, 11b responses, 11c images
    12  Rotation             choose an account, try it, move to the next
    13  Usage and request log  one line per request
    14  Gateway              the one owner of mutable state
    15  HTTP server          h11 and asyncio; the route table is passed in
    16  Routes               16a OpenAI, 16b Codex, 16c admin, 16d pages, then the table
    17  Demo upstream        a fake Codex backend on loopback
    18  Command line         argparse, exit codes, the only print
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import difflib
import email.utils
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import http
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import platform
import queue
import random
import re
import resource
import secrets
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import tomllib
import urllib.parse
import uuid
import webbrowser
import zipfile
import zlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as dt_time
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

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
    "*.oaiusercontent.com": "pictures to and from the ChatGPT web site, where that is on",
    "auth.openai.com": "sign-in and sign-out, refresh of the tokens",
    "chatgpt.com": "model calls, the model list and the quota",
    "pypi.org": "whether there is a newer azt, only when you ask",
}
"""Every host that azt calls, and what for; "*" is one name. `open_response` refuses any other,
unless the user named it himself: a proxy, or a base URL from the environment (mirrors, company
relays, the demo)."""

CODEX_BASE_URL = "https://chatgpt.com/backend-api/codex"
CHATGPT_BASE_URL = "https://chatgpt.com/backend-api"
AUTH_BASE_URL = "https://auth.openai.com"
VERSIONS_URL = "https://pypi.org/pypi/azt/json"
OAUTH_CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"

# The backend hides models from clients older than their `minimal_client_version`, so the catalogue
# is asked for as a recent Codex would ask. Only the list depends on it, no model call carries it.
CATALOGUE_CLIENT_VERSION = "0.169.0"

KIB, MIB = 1024, 1024 * 1024

# What a client may send.
MAX_HEAD_BYTES, MAX_HEAD_FIELDS = 32 * KIB, 100
MAX_BODY_BYTES, MAX_BODIES_BYTES = 128 * MIB, 512 * MIB  # of one request, of all at once
MAX_TRAILER_BYTES, MAX_CHUNK_EXTENSION_BYTES = 8 * KIB, 256
MAX_CODING_LAYERS, ZSTD_WINDOW_LOG = 2, 23
MAX_JSON_DEPTH, MAX_JSON_MARKS, MAX_JSON_ESCAPES = 64, 600_000, 8_000_000
MAX_LINE_BYTES = 256 * KIB  # of our own logs
JSON_PIECES_MAX, HEADS_KEPT_MAX = 10_000, 256
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER, MAX_CONNECTIONS_LOOPBACK = 4096, 128, 2048
MAX_LAN_STREAMS, MAX_CALL_THREADS, LISTEN_BACKLOG = 64, 1024, 1024

# What the upstream may send, and what is held of it until the client has its status.
MAX_ANSWER_HEAD_BYTES = 64 * KIB
MAX_EVENT_BYTES, MAX_HELD_BYTES, MAX_REPLY_BYTES = 48 * MIB, 1 * MIB, 64 * MIB
MANY_CHUNKS_BYTES = 4 * KIB
READ_BYTES, WRITE_BUFFER_BYTES, PIPELINE_BYTES = 64 * KIB, 256 * KIB, 64 * KIB

# A refused client may still be sending. Reading on for a while lets it see the answer instead of a
# reset: briefly where the framing was broken, long enough for a large upload where only the request
# was refused.
LINGER_BYTES, LINGER_S = 64 * KIB, 1.0
LINGER_REFUSED_BYTES, LINGER_REFUSED_S = 256 * MIB, 5.0

HEAD_TIMEOUT_S, BODY_STALL_S, WRITE_STALL_S, KEEP_ALIVE_S = 20.0, 30.0, 60.0, 75.0
BODY_MIN_BYTES_PER_S = 1024
TICK_S, ACCEPT_PAUSE_S, DRAIN_S = 0.5, 0.1, 30.0
HALF_CLOSE_CHECKS_S = (0.02, 0.06, 0.15)

CONNECT_TIMEOUT_S, RESOLVE_TIMEOUT_S = 10.0, 5.0
UPSTREAM_HEAD_TIMEOUT_S, UPSTREAM_IDLE_TIMEOUT_S = 180.0, 300.0
POOL_IDLE_S, HOLD_BACK_S, HEARTBEAT_S, REFRESH_AHEAD_S = 90.0, 15.0, 15.0, 300.0

# Pictures of the ChatGPT web site: the largest one, how often and how long it is asked for them.
MAX_WEB_PICTURE_BYTES = 20 * MIB
WEB_POLL_S, WEB_POLLS_S = 4.0, 120.0

IMPORT_MAX_FILES, PREVIEW_TTL_S, UNDO_TTL_S, SHELF_MAX = 50, 900.0, 600.0, 16

# Both ports are registered with the issuer; it redirects to no other one.
CALLBACK_PORTS = (1455, 1457)
LOGIN_LIFE_S, DEVICE_LIFE_S, DEVICE_INTERVAL_S = 600.0, 900.0, 5.0
LOGINS_MAX, LOGIN_POLL_S = 20, 1.0

STORED_RESPONSES_MAX, STORED_RESPONSES_BYTES = 1000, 64 * MIB
STORED_RESPONSES_TTL_S = 24 * 3600.0

_PYTHON = f"Python {platform.python_version()}; {platform.system()} {platform.machine()}"
OWN_HEADERS = {"originator": "azt", "user-agent": f"azt/{VERSION} ({_PYTHON})"}
"""How azt names itself to the upstream: honestly (design.md 4)."""
# ==================================================================================================
# 2. Errors and logging
#    One error tree, one log, one redaction. Never prints, never knows a route.
# ==================================================================================================

log = logging.getLogger("azt")

Fault = Literal["account", "token", "transient", "network", "request"]
_ERROR_TYPES = {403: "permission_error", 429: "rate_limit_error"}


@dataclass(eq=False, repr=False)
class AztError(Exception):
    """An error with an answer: an HTTP status, a code for programs and a sentence for people."""

    status: int
    code: str | None  # stable word for programs, or None where OpenAI has none
    message: str
    _: KW_ONLY
    type: str | None = None  # OpenAI's error class; None derives it from the status
    param: str | None = None  # the offending field as a path (`messages[2].content[0].type`)
    headers: dict[str, str] = field(default_factory=dict)  # `retry-after`, `x-should-retry`
    extra: Json = field(default_factory=dict)  # further keys inside the error (`resets_at`)

    def __post_init__(self) -> None:
        super().__init__(self.message)
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        self.type = self.type or _ERROR_TYPES.get(self.status, other)


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
        super().__init__(status, code, message, param=param, headers=headers or {})


@dataclass(eq=False, repr=False)
class UpstreamError(AztError):
    """The backend, or the way to it, failed. `fault` is what rotation decides by:

    "account"    this account cannot serve now (usage limit, plan, sign-in); another one may
    "token"      the access token was refused: refresh once, then try again
    "transient"  overload or a server error: another account may work
    "network"    no connection, or a broken one
    "request"    the request itself was refused: no other account helps

    `quota` is what its headers tell of the account's quota (room 8); `host` could not be reached;
    by `upstream_id` the provider finds the call in its own logs.
    """

    upstream_id: str | None = field(default=None, kw_only=True)
    host: str = field(default="", kw_only=True)
    fault: Fault = field(default="request", kw_only=True)
    quota: Json = field(default_factory=dict, kw_only=True)


class StateError(AztError):
    """State on disk cannot be used as it is; never treated as empty."""

    def __init__(self, message: str) -> None:
        super().__init__(500, "state_unusable", message)


def error_body(error: AztError) -> Json:
    """The OpenAI error envelope: all four keys always present."""
    inner = {"message": mask(error.message), "type": error.type, "param": error.param}
    return {"error": inner | {"code": error.code} | error.extra}


# What must never leave in a message or a log line. Order matters: the first rule eats the value.
_SECRETS = [
    (re.compile(r"(?i)(cookie[\"']?\s*[=:]\s*).+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+"), r"\1 ***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w.-]*"), "***jwt***"),
    (re.compile(r"\b(sk-|rt_|azt_)[\w.=-]{6,}"), r"\1***"),
    (
        # The backslashes: JSON inside a JSON string.
        re.compile(
            r"(?i)((?:[a-z\"']_?token|(?:user|device|authorization)_?code|code_?verifier|password"
            r"|[a-z]_?secret|api[_-]?key|authorization)\\*[\"']?\s*[=:]\s*\\*[\"']?(?:basic\s+)?)"
            r"[^\s\"'&,;}\\]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b((?:code|state|token|key)=)[^\s&#\"']+"), r"\1***"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/\"']+@"), r"\1***@"),
]
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def mask(text: str) -> str:
    """Text that may leave, on one line: secrets starred out, control characters escaped."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    text = text.replace("\n", " ").replace("\t", " ")
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


_PERSON = re.compile(r"[^\s\"'<>(),;:@]+@[^\s\"'<>(),;:@]+|\bacc_\w+")


def anonymous(text: str) -> str:
    """`mask` for what a stranger may read: no e-mail, no id of an account, no name of the home."""
    home = os.path.expanduser("~")
    text = _PERSON.sub(lambda one: unnamed(one[0]), mask(text))
    return text.replace(home, "~") if home.strip("/") else text


def unnamed(name: str) -> str:
    return "id-" + hashlib.sha256(name.encode()).hexdigest()[:10]


class _MaskingFormatter(logging.Formatter):
    """Scrubs every line. Those of a traceback are indented: none can pass for a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return mask(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {mask(line)}" for line in super().formatException(ei).splitlines())


def start_logging(level: str) -> None:
    """Send the log to stderr. A closed stderr must never take the server down."""
    handler = logging.StreamHandler()
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate, logging.raiseExceptions = False, False
    log.setLevel(level.upper())


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
        # `_get_running_loop` is the cheap form: None instead of an exception off the loop.
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(f"{function.__name__} blocks and must not run on the event loop")
        return function(*args, **kwargs)

    return guarded


class WorkerPool:
    """Threads that are reused last in, first out, so that a quiet gateway keeps a few warm ones.

    An executor of the standard library hands work out first in, first out. Threads are daemons: a
    call that hangs in the kernel must not keep the process alive after a drain.
    """

    def __init__(
        self, name: str, threads_max: int, waiting_max: int = 1 << 20, idle_s: float = 30.0
    ) -> None:
        self._name, self._idle_s = name, idle_s
        self._threads_max, self._waiting_max = threads_max, waiting_max
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], None]]] = []
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()
        self.threads = 0

    def submit(self, job: Callable[[], None]) -> bool:
        """Run `job` on a worker, in order of arrival; False when all are busy and none may wait."""
        with self._lock:
            if self._idle:
                inbox = self._idle.pop()
            elif self.threads < self._threads_max:
                inbox = queue.SimpleQueue()
                name, work = f"azt-{self._name}", functools.partial(self._work, inbox)
                try:
                    threading.Thread(target=work, name=name, daemon=True).start()
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
            while job is not None:  # None: an idle thread must not keep the last body alive
                job()
                with self._lock:
                    job = self._waiting.popleft() if self._waiting else None
                    if job is None:
                        self._idle.append(inbox)


def _discard(value: Any) -> None:
    """Drop a result that came too late; it may hold a connection."""
    getattr(value, "close", lambda: None)()


async def in_thread(pool: WorkerPool, function: Callable[..., T], *args: Any) -> T:
    """Run a `@blocking` function on a worker and await its value or its exception.

    Cancelling the await does not stop the worker: whoever may cancel passes a `Wire` (room 6) along
    and shuts its socket: the worker's read raises. A late result is closed, where it can be.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def fulfil(value: Any, error: BaseException | None) -> None:
        if future.cancelled():
            _discard(value)
        elif isinstance(error, StopIteration):  # a future does not take it: the await would hang
            future.set_exception(RuntimeError("the call raised StopIteration"))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def job() -> None:
        value, error = None, None
        try:
            value = function(*args)
        except BaseException as caught:  # noqa: BLE001 - handed to the awaiting coroutine
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(fulfil, value, error)
        error = None  # its traceback holds this frame, and the frame a body in `args`

    if not pool.submit(job):
        text = "azt is busy with too many calls. Try again in a few seconds."
        raise AztError(503, "overloaded", text, headers={"retry-after": "5"})
    try:
        return await future
    except asyncio.CancelledError:
        # Cancelled between the arrival of the value and its taking.
        if future.done() and not future.cancelled() and future.exception() is None:
            _discard(future.result())
        raise
    except BaseException:
        del future  # it holds the error, whose traceback holds this frame: see `job`
        raise


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
        self.before = self.state / "before-azt"
        self.codex = self.state / "codex.json"
        self.codex_backups = self.state / "codex-backups"
        self.keys = self.state / "keys.json"
        self.lock = self.state / "lock"
        self.models = self.state / "models.json"
        self.open_page = self.state / "open.html"
        self.renewals = self.state / "renewals.json"
        self.requests = self.state / "requests.jsonl"
        self.sessions = self.state / "sessions.json"
        self.settings = self.state / "settings.json"
        self.usage_daily = self.state / "usage" / "daily.json"
        self.usage_events = self.state / "usage" / "events"
        self.usage_lifetime = self.state / "usage" / "lifetime.json"
        self.codex_auth = codex_home / "auth.json"
        self.store = self.state / "store.json"
        self.codex_config = codex_home / "config.toml"
        self.codex_home = codex_home
        self.codex_models = codex_home / "models_cache.json"


_OTHER_HOME = "Set AI_ZERO_TOKEN_HOME to a folder of your own."


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk refuses, as a StateError that names the file."""
    try:
        yield
    except OSError as error:
        text = f"{error.filename or 'The home'} cannot be used ({error.strerror}). {_OTHER_HOME}"
        raise StateError(text) from None


@blocking
@disk_errors()
def prepare_home(paths: Paths) -> None:
    """Make the folders 0700; mend a looser mode. Raises StateError when they cannot be used."""
    state = paths.state
    for folder in (paths.home, state):
        if folder.is_symlink():
            raise StateError(f"{folder} is a symbolic link. {_OTHER_HOME}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = state.lstat()
    if status.st_uid != os.getuid():
        raise StateError(f"{state} belongs to another user. {_OTHER_HOME}")
    if status.st_mode & 0o077:
        state.chmod(0o700)
        log.warning("%s was open to other users; its mode is 0700 now", state)


_UNFIT = (AttributeError, LookupError, TypeError, ValueError, RecursionError, StateError)


def _seal(value: Json, indent: int | None = 1) -> bytes:
    """The content of a state file. Its last member, `sum`, shows that a byte has flipped."""
    return json.dumps({**value, "sum": _sum(value)}, indent=indent).encode() + b"\n"


def _sum(value: Json) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@blocking
def read_json(path: Path, version: int, check: Callable[[Json], object] = bool) -> Json | None:
    """The object in a state file; None when there is no such file.

    An unreadable file never reads as an empty one: it is kept as `.corrupt-<time>` and the last
    good copy (`.bak`, written after every save) takes its place.
    check   raises what stands in `_UNFIT` for an object of another shape
    raises  StateError when neither can be used, or the file is from a newer azt
    """
    value, damage = _read_object(path, version, check)
    if damage:
        value, _ = _read_object(Path(f"{path}.bak"), version, check)
    if damage and value is None:
        raise StateError(f"{path} is damaged ({damage}), its copy too. Move it away, import again.")
    if value is not None and value["version"] > version:
        raise StateError(f"{path} was written by a newer azt. Update azt. {_OTHER_HOME}")
    if value is not None and damage:
        # A copy, not a rename: dying in between must not leave a missing file: that is a new home.
        kept = path.with_name(f"{path.name}.corrupt-{datetime.now():%Y%m%d-%H%M%S-%f}")
        write_bytes(kept, _read_own_file(path))
        write_json(path, value)
        log.error("%s was damaged (%s), kept as %s; its copy serves", path, damage, kept.name)
    return value


def _read_object(
    path: Path, version: int, check: Callable[[Json], object]
) -> tuple[Json | None, str]:
    """(object, ""); (None, "") where there is no file; (None, what is wrong with it)."""
    try:
        raw = _read_own_file(path)
    except FileNotFoundError:
        return None, ""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        if value.pop("sum", None) not in (None, _sum(value)):
            raise ValueError("its check sum is wrong: who edits it by hand removes the `sum`")
        if value["version"] <= version:
            check(value)
        return value, ""
    except _UNFIT as error:
        return None, str(error)[:200]


def _open_own(path: str | Path, flags: int) -> int:
    # Through no link, 0600 from the start; O_NONBLOCK, for a pipe here would hold us for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def _read_own_file(path: Path) -> bytes:
    """A regular file of this user, mended to 0600. Raises FileNotFoundError and StateError."""
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
        text = f"{path} cannot be read ({error.strerror}). Mend its owner and mode (0600)."
        raise StateError(text) from None


@blocking
def read_foreign(path: Path | int, bytes_max: int) -> bytes:
    """A file of the user or of another program, or a descriptor; bounded. Raises OSError."""
    with open(path, "rb") as file:
        raw = file.read(bytes_max + 1)
    if len(raw) > bytes_max:
        raise OSError(0, f"larger than {bytes_max // MIB} MiB")
    return raw


@blocking
def write_json(path: Path, value: Json, indent: int | None = 1) -> None:
    """Replace a state file (a crash leaves the old or the new content whole), then its copy."""
    raw = _seal(value, indent)
    write_bytes(path, raw)
    try:
        write_bytes(Path(f"{path}.bak"), raw)
    except AztError as error:  # saved all the same: only the copy is an older one
        log.error("%s", error.message)


@blocking
def write_bytes(
    path: Path, raw: bytes, mode: int = 0o600, last_look: Callable[[], None] = lambda: None
) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder.

    last_look  raises AztError when the file must not be replaced after all
    raises     AztError 507 (disk full) or 500; the old content is then still there
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=_open_own) as file:
            file.write(raw)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        last_look()
        os.replace(temporary, path)
    except (AztError, OSError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, AztError):
            raise
        raise _not_saved(path, error) from None
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:  # everyone reads the new content already: there is no way back
        log.error("%s is saved, but a power cut could undo it (%s)", path, error.strerror)


def _not_saved(path: Path, error: OSError) -> AztError:
    status = 507 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 500
    text = f"{path} could not be written ({error.strerror}). Look at its folder and the space left."
    return AztError(status, "state_not_saved", text)


@blocking
def append_bytes(path: Path, lines: bytes, sync: bool = False) -> int:
    """Add whole lines; the size of the file then. Raises AztError; nothing of them is there then.

    A line that a crash has torn before is closed first, so that it spoils none of these.
    """
    handle = -1
    try:
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        handle = _open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        if os.write(handle, lines) < len(lines):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(handle)
        return size + len(lines)
    except OSError as error:
        raise _not_saved(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


@blocking
def read_from(path: Path, start: int) -> Iterator[bytes]:
    """The lines of one of our files from that byte on, one at a time; none without the file.

    What is longer than any line of ours (a power cut can leave a gigabyte of NULs) is skipped.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb", opener=_open_own) as file:
        file.seek(start)
        is_inside = False
        while line := file.readline(MAX_LINE_BYTES):
            is_long = len(line) == MAX_LINE_BYTES
            if not is_inside and not is_long:
                yield line
            is_inside = is_long


@blocking
def delete_file(path: Path) -> None:
    """What cannot be deleted stays."""
    with contextlib.suppress(OSError):
        path.unlink()


@blocking
@disk_errors()
def adopt_home(paths: Paths, convert: Callable[[bytes | None, Json], tuple[Json, Json]]) -> None:
    """Take over, once, what the Node program of the same name left in this home (design.md 3).

    convert  its `store.json` and `settings.json` -> ours; nothing is touched before it is content
    Each step may be repeated, and `accounts.json` comes last: a crash changes nothing in the end.
    """
    settings, usage, raw = _read_object(paths.settings, 1, bool)[0], paths.state / "usage", None
    is_left = settings is not None and "values" not in settings  # ours has them
    moved = [paths.settings] * is_left + [usage] * usage.is_dir()
    is_ours = paths.accounts.exists() or paths.admin_token.exists()
    if is_ours or not (moved or paths.store.exists() or paths.before.exists()):
        return
    if not is_left:
        settings = _read_object(paths.before / paths.settings.name, 1, bool)[0]
    for store in (paths.before / paths.store.name, paths.store):
        with contextlib.suppress(FileNotFoundError):
            raw = _read_own_file(store)
    accounts, values = convert(raw, settings or {})
    paths.before.mkdir(mode=0o700, exist_ok=True)
    for path in moved:
        os.replace(path, paths.before / path.name)
    if raw is not None:
        write_bytes(paths.before / paths.store.name, raw)
    if values["values"]:
        write_json(paths.settings, values)
    write_json(paths.accounts, accounts)
    log.info("took over what the Node program left; its files are in %s", paths.before)


@blocking
def find_foreign(path: Path) -> bytes | None:
    """A small file of the user's other programs; None where there is none. Raises AztError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            raise OSError(0, "it is no file of yours")
        return read_foreign(path, MIB)
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"{path} cannot be read ({error.strerror}). Mend that, then try again."
        raise AztError(422, "not_readable", text, extra={"params": {"path": str(path)}}) from None


@blocking
def replace_foreign(path: Path, raw: bytes | None, seen: bytes | None) -> None:
    """Replace a file of another program (None: take it away), through links, keeping its mode.

    seen    what stood there when the change was worked out
    raises  AztError 409 when something else stands there now, 422 when it cannot be written
    """

    def last_look() -> None:
        if find_foreign(path) != seen:
            text = f"{path} was changed meanwhile. Nothing was written: look at it and try again."
            raise AztError(409, "file_changed", text)

    try:
        target, mode = path.resolve(), 0o600
        if seen is not None:
            mode = stat.S_IMODE(target.stat().st_mode)
            homes = Path(os.path.expanduser("~")).resolve(), path.parent.resolve()
            if not any(map(target.is_relative_to, homes)):
                raise OSError(0, "it is a link out of your home")
            if not mode & 0o200:
                raise OSError(0, "it is read-only: `chmod u+w`")
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.{'[0-9a-f]' * 16}.tmp"):
            leftover.unlink()
        if raw is not None:
            return write_bytes(target, raw, mode, last_look)
        last_look()
        target.unlink(missing_ok=True)
    except OSError as error:
        text = f"{path} cannot be written ({error.strerror}). Mend that, then try again."
        raise AztError(422, "not_writable", text, extra={"params": {"path": str(path)}}) from None


@blocking
def keep_copy(folder: Path, file: str, reason: str, raw: bytes) -> Path:
    """Keep what a foreign file holds before it changes: five copies, the very first among them."""
    with contextlib.suppress(OSError):  # then the copy cannot be written, which says it better
        folder.mkdir(mode=0o700, exist_ok=True)
    copy = folder / f"{file}-{time.time_ns() // 1_000_000}-{reason}"
    write_bytes(copy, raw)
    for surplus in sorted(folder.glob(f"{file}-*"))[1:-4]:
        surplus.unlink(missing_ok=True)
    return copy


@blocking
def in_database(path: Path, sql: str, copy: Path | None = None) -> int:
    """Run one statement in a SQLite file of another program: the number that it selects.

    copy    changes rows; this file of ours gets the database as it was before
    raises  AztError, and nothing was changed
    """
    import sqlite3  # only here: some builds of Python come without it

    def opened(file: Path, mode: str) -> contextlib.closing[sqlite3.Connection]:
        where = f"{file.resolve().as_uri()}?mode={mode}"
        return contextlib.closing(sqlite3.Connection(where, 2.0, isolation_level=None, uri=True))

    try:
        with opened(path, "rw" if copy else "ro") as database:
            if copy is None:
                return int(database.execute(sql).fetchone()[0])
            database.execute("BEGIN IMMEDIATE")
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("it is damaged")
            # By a connection of its own: that of an open transaction would wait for itself.
            with opened(path, "ro") as source, opened(copy, "rw") as kept:
                source.backup(kept)
            changed = database.execute(sql).rowcount
            database.execute("COMMIT")
            return changed
    except sqlite3.Error as error:
        text = f"{path} is left as it is ({error}). Close Codex, then try again."
        raise AztError(409, "history_unusable", text) from None


@blocking
def read_or_make_secret(path: Path) -> str:
    """A 256-bit secret in a 0600 file, made at its first use."""
    with contextlib.suppress(FileNotFoundError):
        secret = _read_own_file(path).decode("ascii", "replace").strip()
        if len(secret) >= 32:
            return secret
        log.error("%s was damaged; a new secret takes its place", path)
    return make_secret(path)


@blocking
def make_secret(path: Path) -> str:
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
    @disk_errors()
    def acquire(self) -> Json | None:
        """None when the lock is ours now, else what its holder wrote. Raises StateError."""
        handle = _open_own(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = None
            with contextlib.suppress(ValueError, RecursionError):
                holder = json.loads(os.pread(handle, 4096, 0))
            os.close(handle)
            return holder if isinstance(holder, dict) else {"pid": 0, "url": None}
        self._handle = handle
        self.write(None)
        for leftover in self._path.parent.rglob(".*.????????????????.tmp"):
            leftover.unlink()  # of a writer that was killed
        return None

    @blocking
    @disk_errors()
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


@blocking
def lock_codex(paths: Paths, wait_s: float = 60.0) -> contextlib.ExitStack:
    """Keep other programs from renewing Codex's sign-in too, until the result is closed.

    Another azt locks the folder, Codex the file beside its auth.json; nothing is created. Who holds
    on for longer than a renewal may take hangs, and is no reason to hang as well.
    """
    held, deadline = contextlib.ExitStack(), time.monotonic() + wait_s
    for path in (paths.codex_auth.parent, f"{paths.codex_auth}.lock"):
        with contextlib.suppress(OSError):  # no Codex here, or a file system without locks
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            held.callback(os.close, handle)
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
    return held


def hide_memory() -> None:
    """Tokens will be in it: no core dump, and no other program of this user reads it (Linux)."""
    with contextlib.suppress(AttributeError, ImportError, OSError):
        import ctypes  # only here: some builds of Python come without it

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


@blocking
def port_holder(port: int) -> str:
    """Who listens there, as far as the system tells this user (Linux); "" where it does not."""
    found: dict[str, str] = {}  # socket -> user id
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for fields in map(str.split, Path(table).read_text().splitlines()[1:]):
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found[f"socket:[{fields[9]}]"] = fields[7]
    for folder in Path("/proc").glob("[0-9]*/fd") if found else ():
        with contextlib.suppress(OSError):  # of another user, or it has just ended
            files = {os.readlink(one) for one in folder.iterdir()}
            if not files.isdisjoint(found):
                name = (folder.parent / "comm").read_text().strip()
                locks = [Path(one).parents[1] for one in files if one.endswith("/.state/lock")]
                who = f"the azt of the home {locks[0]}" if locks else name
                return f"process {folder.parent.name}, {who}"
    return f"a program of the user {next(iter(found.values()))}" if found else ""


def memory_limit() -> int:
    """How many bytes the control group of this process may have, where there is one (Linux)."""
    limits = [1 << 62]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, group = line.split(":", 2)
            file = f"memory{group}/memory.limit_in_bytes" if kind else f"{group}/memory.max"
            with contextlib.suppress(OSError, ValueError):  # "max"; or of another kind
                limits.append(int(Path(f"/sys/fs/cgroup/{file}").read_text()))
    return min(limits)


@blocking
def process_figures() -> dict[str, int]:
    """What this process holds, where the system tells (Linux): memory, open files, threads."""
    figures = {"threads": threading.active_count()}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        figures["resident_memory_bytes"] = pages * resource.getpagesize()
        figures["open_fds"] = len(os.listdir("/proc/self/fd"))
    return figures


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
    ".txt": "text/plain; charset=utf-8",
}
_NO_PAGES = b"""<!doctype html><meta charset="utf-8"><title>azt</title>
<p>azt is running and its API answers under <code>/v1</code>. The console's pages are not beside
<code>azt.py</code>: install the package (<code>pipx install azt</code>) or put the folder
<code>azt_web</code> next to it.
"""


@blocking
def read_pages() -> dict[str, Page]:
    """Request path -> page, for every file in `azt_web` of a known type."""
    folder = Path(__file__).resolve().parent / "azt_web"
    files = {
        f"/{path.relative_to(folder).as_posix()}": (path.read_bytes(), _PAGE_TYPES[path.suffix])
        for path in folder.rglob("*")
        if path.suffix in _PAGE_TYPES and path.is_file()
    }
    files["/"] = files.get("/index.html", (_NO_PAGES, _PAGE_TYPES[".html"]))
    return {
        name: Page(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
        for name, (body, content_type) in files.items()
    }


# ==================================================================================================
# 5. Settings
#    Defaults < file < environment < flags. The only reader of the environment. Never writes.
# ==================================================================================================


_Kind = tuple[Callable[[Any], bool], str]  # what a setting may be: as a test, and in words


@dataclass(frozen=True, slots=True)
class Setting:
    """One dotted key: its default, what it may be, and the environment variable that pins it."""

    default: Any
    check: Callable[[Any], bool]
    allowed: str
    env: str = ""
    widens: bool = False  # a change needs proof: it may let in more callers (trust.md row 9)


def _text(words: str, pattern: str = ".*") -> _Kind:
    def check(value: Any) -> bool:
        is_text = isinstance(value, str) and len(value) <= 2048 and value.isprintable()
        return is_text and re.fullmatch(pattern, value) is not None

    return check, words


def _texts(words: str, pattern: str) -> _Kind:
    one, _ = _text(words, pattern)
    return (
        lambda value: isinstance(value, list) and len(value) <= 256 and all(map(one, value)),
        words,
    )


def _number(low: int, high: int) -> _Kind:
    return lambda value: type(value) is int and low <= value <= high, f"{low} to {high}"


_YES_NO: _Kind = (lambda value: isinstance(value, bool), "true or false")
_ORIGIN = r"\*|https?://[^/\s*]+|[a-z-]+-extension://[a-zA-Z0-9-]+"
_ORIGINS = _texts("a list of origins such as https://app.example", _ORIGIN)
_PROXY = _text("http://host:port or https://host:port", r"(https?://[^\s/]+/?)?")
_ORDER = _text("most_left, soonest_reset or priority", "most_left|soonest_reset|priority")
_LEVEL = _text("debug, info, warning or error", "debug|info|warning|error")
_MASK = _text("lan, always or never", "lan|always|never")
_WORDS = _texts("a list of texts", ".+")
_TEXT = _text("a text")

_WEB_PICTURES = "image.freeAccountWebGenerationEnabled"
SETTINGS: dict[str, Setting] = {
    "apiKeys.loopbackExempt": Setting(False, *_YES_NO, widens=True),
    "autoSwitch.beforePercent": Setting(3, *_number(0, 99)),
    "autoSwitch.enabled": Setting(False, *_YES_NO),
    "autoSwitch.excludedIds": Setting([], *_WORDS),
    "autoSwitch.order": Setting("most_left", *_ORDER),
    "defaultModel": Setting("gpt-5.4", *_TEXT),
    _WEB_PICTURES: Setting(False, *_YES_NO),
    "image.orchestratorModel": Setting("", *_TEXT),
    "limits.bodyMb": Setting(128, *_number(1, 4096), "AZT_BODY_LIMIT_MB"),
    "log.keepDays": Setting(30, *_number(1, 3650)),
    "log.keepRows": Setting(2000, *_number(0, 100_000)),
    "log.level": Setting("info", *_LEVEL, "AZT_LOG_LEVEL"),
    "networkProxy.enabled": Setting(False, *_YES_NO, widens=True),
    "networkProxy.noProxy": Setting("localhost,127.0.0.1,::1", *_TEXT, widens=True),
    "networkProxy.url": Setting("", *_PROXY, widens=True),
    "quota.concurrency": Setting(16, *_number(1, 32)),
    "quota.everyMinutes": Setting(0, *_number(0, 10_080)),
    "server.allowedHosts": Setting([], *_WORDS, widens=True),
    "server.corsOrigins": Setting([], *_ORIGINS, "AZT_CORS_ORIGIN", widens=True),
    "server.host": Setting("0.0.0.0", *_text("an address to listen on"), "AZT_HOST", widens=True),
    "server.lanApi": Setting(True, *_YES_NO, widens=True),
    "server.lanConsole": Setting(False, *_YES_NO, widens=True),
    "server.port": Setting(8787, *_number(0, 65535), "AZT_PORT", widens=True),
    "server.tokenOnLoopback": Setting(False, *_YES_NO, widens=True),
    "ui.maskEmails": Setting("lan", *_MASK),
    "usage.keepDays": Setting(365, *_number(1, 3650)),
    "usage.keepMb": Setting(512, *_number(1, 100_000)),
}
"""Every knob, sorted."""


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
    time_zone: str  # its IANA name, "" where it has none
    pinned: Mapping[str, Any]  # settings that an environment variable fixes


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """raises  BadRequest naming a variable whose value cannot be used"""
    env = os.environ if environ is None else environ

    def first(*names: str) -> str:
        return next((env[name] for name in names if env.get(name)), "")

    user_home = first("HOME") or tempfile.gettempdir()
    home = first("AI_ZERO_TOKEN_HOME") or f"{user_home}/.ai-zero-token"
    codex_home = first("CODEX_HOME") or f"{user_home}/.codex"
    return Environment(
        paths=Paths(Path(os.path.expanduser(home)), Path(os.path.expanduser(codex_home))),
        codex_base_url=_base_url(env, "AZT_CODEX_BASE_URL", CODEX_BASE_URL),
        chatgpt_base_url=_base_url(env, "AZT_CHATGPT_BASE_URL", CHATGPT_BASE_URL),
        auth_base_url=_base_url(env, "AZT_AUTH_BASE_URL", AUTH_BASE_URL),
        ca_file=first("AZT_CA_FILE"),
        proxy_url=first("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"),
        no_proxy=first("NO_PROXY", "no_proxy"),
        fast=env.get("AZT_SLOW_PATHS") != "1",
        time_zone=_zone_name(first("TZ")),
        pinned={
            key: parse_setting(key, env[setting.env], setting.env)
            for key, setting in SETTINGS.items()
            if setting.env and env.get(setting.env)
        },
    )


def _zone_name(chosen: str) -> str:
    """Of this machine's time zone: as `TZ` says it, or as the system's file is called."""
    name = chosen.lstrip(":") or os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2]
    with contextlib.suppress(ValueError, OSError, ZoneInfoNotFoundError):
        return ZoneInfo(name).key
    return ""


def _base_url(env: Mapping[str, str], name: str, default: str) -> str:
    url = (env.get(name) or default).rstrip("/")
    with contextlib.suppress(ValueError):  # a port or an IPv6 address that is none
        parts = urllib.parse.urlsplit(url)
        is_web = re.fullmatch(r"https?://[^\s/]+(/\S*)?", url)
        if is_web and parts.hostname and parts.port != 0:
            return url
    raise BadRequest(f"{name} must be an http or https URL.", name)


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
            log.warning("settings.json: %s cannot be used; its default is in force", key)
    values.update(environment.pinned)
    values.update(flags)
    fixed = {key: SETTINGS[key].env for key in environment.pinned}
    fixed |= dict.fromkeys(flags, "command line")
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
        key = prefix + name
        flat |= flattened(value, key + ".") if isinstance(value, dict) else {key: value}
    return flat


# ==================================================================================================
# 6. Outbound HTTP
#    TLS trust, proxy, connection pool: the only sockets out. Knows no account and no translator.
#
#    A worker thread connects. The loop sends the request and waits for the answer: a whole one, or
#    an event stream as a non-blocking socket.
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class Call:
    """One outbound request. A plain value, so that it may cross threads and be sent again.

    once       it carries something single use: a fresh connection, and never sent a second time
    bytes_max  the largest body of an answer that is no stream
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | bytearray = b""
    head_timeout_s: float = UPSTREAM_HEAD_TIMEOUT_S
    once: bool = False
    bytes_max: int = MAX_REPLY_BYTES


@dataclass(frozen=True, slots=True)
class Egress:
    """How azt gets out: a proxy, a company root, hosts that the user named beyond `OUTBOUND`."""

    proxy_url: str = ""
    no_proxy: str = ""
    ca_file: str = ""
    own_hosts: frozenset[str] = frozenset()


class Wire:
    """The thread's socket, so that the loop can end a call that nobody waits for any more.

    `shutdown` wakes a thread that is blocked in `recv`; `close` would not, and the descriptor's
    number could meanwhile belong to another connection (performance.md 3).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._ended = False
        self.stages: dict[str, float] = {}  # how far a new connection came, and when

    def note(self, stage: Literal["dns", "connect", "tls"]) -> None:
        self.stages[stage] = time.monotonic()

    def attach(self, sock: socket.socket | None) -> None:
        """What `end` shuts from now on. Raises ConnectionAbortedError when the call was ended."""
        with self._lock:
            self._sock = sock
            if self._ended and sock is not None:
                raise ConnectionAbortedError("the call was ended")

    def end(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._ended = True
            # Not `sock.shutdown`: that drops the TLS layer, and the reader would get ciphertext.
            if self._sock is not None:
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


def _is_listed(host: str) -> bool:
    return not {host, "*." + host.partition(".")[2]}.isdisjoint(OUTBOUND)


_Key = tuple[str, str, int]  # scheme, host, port: what a kept connection is good for
_PORTS = {"http": 80, "https": 443}
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ConnectionPool:
    """Kept connections, last used first. The only door to the network."""

    def __init__(self, egress: Egress) -> None:
        self.egress = egress
        self._lock = threading.Lock()
        self._idle: dict[_Key, list[tuple[float, socket.socket]]] = {}
        self._context: ssl.SSLContext | None = None

    def tls(self) -> ssl.SSLContext:
        """The trust store, built once and late: that takes 40 ms."""
        with self._lock:
            self._context = self._context or _tls_context(self.egress.ca_file)
            return self._context

    def take(self, key: _Key) -> socket.socket | None:
        """A kept connection that is still open, or None."""
        while True:
            with self._lock:
                if not self._idle.get(key):
                    return None
                since, sock = self._idle[key].pop()
            # Readable while idle means closed by the other side, or garbage.
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            if time.monotonic() - since < POOL_IDLE_S and not poller.poll(0):
                return sock
            sock.close()

    def key(self, url: str) -> _Key:
        """What connects to `url`. Raises UpstreamError for a host that nobody has named."""
        host = "what is no http address"
        with contextlib.suppress(KeyError, ValueError):  # an answer may have named it
            parts = urllib.parse.urlsplit(url)
            key = parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme]
            host = key[1]
            if host in self.egress.own_hosts or (_is_listed(host) and key == ("https", host, 443)):
                return key
        text = f"azt does not call {host[:80]}: it is not in its table of hosts."
        raise UpstreamError(502, "upstream_unreachable", text)

    def settle(self, answer: Answer, key: _Key, sock: socket.socket) -> Answer:
        """The answer with its connection when it is a stream, which is kept or closed otherwise."""
        if answer.is_stream:
            sock.settimeout(0)
            answer.sock, answer.key = sock, key
        elif answer.keep:
            self.give(key, sock)
        else:
            sock.close()
        return answer

    def give(self, key: _Key, sock: socket.socket) -> None:
        """Keep a connection whose last answer was read to its end; close those kept too long."""
        now = time.monotonic()
        with self._lock:
            kept = self._idle.setdefault(key, [])
            while kept and now - kept[0][0] >= POOL_IDLE_S:
                kept.pop(0)[1].close()
            kept.append((now, sock))

    def close(self) -> None:
        with self._lock:
            kept, self._idle = self._idle, {}
        for socks in kept.values():
            for _, sock in socks:
                sock.close()


def _has_roots() -> bool:
    places = ssl.get_default_verify_paths()
    found = places.cafile or (places.capath and any(Path(places.capath).glob("*.0")))
    return sys.platform != "linux" or bool(found)


def trust_store(ca_file: str) -> str:
    """In words, what `_tls_context` trusts."""
    if ca_file:
        return f"the system's roots, those of certifi, and AZT_CA_FILE {ca_file}"
    return "the system's roots" if _has_roots() else "the roots of certifi: the system has none"


def _tls_context(ca_file: str) -> ssl.SSLContext:
    """What is trusted: the system's roots, else certifi's; with AZT_CA_FILE both and that file."""
    import certifi
    import truststore

    context: ssl.SSLContext
    if ca_file:
        # truststore asks the system alone on some systems: the file joins certifi's list instead.
        context = ssl.create_default_context(cafile=certifi.where())
        context.load_default_certs()
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            reason = getattr(error, "reason", "") or error.strerror
            text = f"AZT_CA_FILE {ca_file} holds no usable certificate ({reason})."
            raise UpstreamError(502, "upstream_tls", text, fault="network") from None
    elif not _has_roots():
        context = ssl.create_default_context(cafile=certifi.where())
    else:
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(slots=True)
class Answer:
    """A response whose head was read. `body` is whole; of a stream `sock` carries it instead."""

    status: int
    headers: dict[str, str]  # lower-case names; values of a repeated one are joined with ", "
    framing: Framing
    is_stream: bool
    keep: bool  # the connection may be used again once the body has ended
    body: bytes = b""
    rest: bytes = b""  # body bytes that came along with the head of a stream
    sock: socket.socket | None = None
    key: _Key = ("", "", 0)
    connect_ms: int = 0  # 0: the connection was a kept one

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


# What two programs could read differently is not read at all, in either direction: what is lenient
# here is how requests are smuggled (RFC 9112 7.1, trust.md 1.5).
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_FIELD = _TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n"
_TRAILER = re.compile(rb"(?:" + _FIELD + rb")|\r\n")
_LINE_END = re.compile(rb"\r\n")
_ANSWER_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n(?:" + _FIELD + rb")*+\r\n"
)
_SINGLES = frozenset("content-length content-type host origin transfer-encoding".split())
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK_HEAD = re.compile(
    rb"([0-9A-Fa-f]{1,12})(?:;[\t\x20-\x7e]{0,%d})?\r\n" % (MAX_CHUNK_EXTENSION_BYTES - 1)
)
_CHUNK_SIZES = re.compile(rb"(?:[1-9A-Fa-f][0-9A-Fa-f]{0,11},)+")


def read_fields(head: bytes) -> dict[str, str]:
    """A head of good syntax -> its fields, like `Answer.headers`.

    raises  ValueError when there are too many, or two of one kind that may stand there once
    """
    lines = head[:-4].decode("latin-1").split("\r\n")
    if len(lines) > MAX_HEAD_FIELDS + 1:
        raise ValueError(f"The head has more than {MAX_HEAD_FIELDS} fields.")
    fields: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in fields:
            if name in _SINGLES:
                raise ValueError(f"The header {name} appears more than once.")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return fields


class Framing:
    """Takes a body out of its transfer coding, request or response, in any split of bytes. Pure.

        SIZE --n--> DATA --CRLF--> SIZE --0--> TRAILERS --empty line--> ended

    ended   the last byte of the body was seen: only then may the connection be used again
    rest    what came behind the body
    left    bytes still to come of the announced length or of the chunk being read
    raises  ValueError for anything but the exact chunk syntax
    """

    __slots__ = ("_chunked", "_line", "_longest", "_partial", "ended", "left", "rest")

    def __init__(self, chunked: bool, length: int | None) -> None:
        self._chunked = chunked
        self._line, self._longest = _CHUNK_HEAD, MAX_CHUNK_EXTENSION_BYTES + 14  # what comes next
        self._partial = b""
        self.left = 0 if chunked else -1 if length is None else length
        self.ended = length == 0 and not chunked
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if self._chunked:
            return self._dechunk(data)
        if self.left < 0:
            return data
        taken, self.rest = data[: self.left], data[self.left :]
        self.left -= len(taken)
        self.ended = not self.left
        return taken

    def _dechunk(self, data: bytes) -> bytes:
        data = self._partial + data if self._partial else data
        parts: list[bytes] = []
        at, many = 0, MANY_CHUNKS_BYTES
        while not self.ended:
            if self.left:
                parts.append(data[at : at + self.left])
                at += len(parts[-1])
                self.left -= len(parts[-1])
                if self.left:
                    break
            elif self._line is _CHUNK_HEAD and len(data) - at > many:
                many = len(data)  # one look is enough
                at += _take_chunks(data[at:], parts)
            found = self._line.match(data, at, at + self._longest)
            if found is None and b"\n" not in data[at:] and len(data) - at < self._longest:
                break  # incomplete
            if found is None:
                raise ValueError("a line of the chunked body is malformed or too long")
            start = at = found.end()
            if self._line is _CHUNK_HEAD:
                at += int(found[1], 16)
                if at > start and data.startswith(b"\r\n", at):  # a whole chunk: the usual case
                    parts.append(data[start:at])
                    at += 2
                    continue
                self.left, at = at - start, start
                self._line, self._longest = (
                    (_LINE_END, 2) if self.left else (_TRAILER, MAX_TRAILER_BYTES)
                )
            elif self._line is _LINE_END:
                self._line, self._longest = _CHUNK_HEAD, MAX_CHUNK_EXTENSION_BYTES + 14
            else:
                self._longest -= len(found[0])
                self.ended = found[0] == b"\r\n"
        self._partial, self.rest = (b"", data[at:]) if self.ended else (data[at:], b"")
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _take_chunks(data: bytes, parts: list[bytes]) -> int:
    """Append all chunks at one look, in half the time; how many bytes of `data` they were.

    0 where it takes a closer look: an extension, a chunk with a CRLF inside, the last chunk.
    """
    lines = data.split(b"\r\n")
    del lines[(len(lines) - 1) // 2 * 2 :]  # what is not whole yet
    sizes, chunks = lines[::2], lines[1::2]
    if not _CHUNK_SIZES.fullmatch(b",".join([*sizes, b""])):
        return 0
    if [int(size, 16) for size in sizes] != [len(chunk) for chunk in chunks]:
        return 0
    parts += chunks
    return sum(map(len, lines)) + 2 * len(lines)


class _Unanswered(ConnectionError):
    """The connection ended before any byte of an answer: the request may be sent once more."""


class _Reply:
    """The bytes of one response, in any split -> its head, then its body. Pure.

    raises  ValueError for what is no valid HTTP, or is cut; _Unanswered when nothing had come
    """

    __slots__ = ("_body", "_bytes_max", "_head_bytes", "_unread", "answer")

    def __init__(self, bytes_max: int = MAX_REPLY_BYTES) -> None:
        self._bytes_max = bytes_max
        self._unread, self._body = b"", bytearray()
        self._head_bytes = 0  # of interim answers
        self.answer: Answer | None = None

    @property
    def was_heard(self) -> bool:
        return bool(self._unread or self._head_bytes or self.answer)

    def head(self, data: bytes) -> Answer | None:
        """The answer once its head is complete. `data` b"": the connection has ended."""
        self._unread += data
        while True:
            head, mark, rest = self._unread.partition(b"\r\n\r\n")
            if self._head_bytes + len(head) > MAX_ANSWER_HEAD_BYTES:
                raise ValueError("a head larger than azt accepts")
            if not head.startswith(b"HTTP/1."[: len(head)]):
                raise ValueError("no HTTP/1.1")
            if not mark:
                break
            head += mark
            found = _ANSWER_HEAD.fullmatch(head)
            if found is None or found[2] == b"101":
                raise ValueError("a malformed head")
            self._unread = rest
            self._head_bytes += len(head)
            if found[2][:1] != b"1":
                self.answer = _answer(int(found[2]), read_fields(head), found[1] == b"1")
                return self.answer
        if not data:
            raise ValueError("cut in the head") if self.was_heard else _Unanswered("it was closed")
        return None

    def feed(self, data: bytes) -> Answer | None:
        """The answer once it is complete; a stream is so at its head."""
        is_over, answer = not data, self.answer
        if answer is None:
            answer = self.head(data)
            if answer is None:
                return None
            data, self._unread = self._unread, b""
            if answer.is_stream:
                answer.rest = data
                return answer
        framing = answer.framing
        self._body += framing.feed(data)
        if len(self._body) > self._bytes_max:
            raise ValueError("an answer larger than azt accepts")
        if is_over and not framing.ended and framing.left >= 0:
            raise ValueError("cut in the body")
        if not (framing.ended or is_over):
            return None
        answer.keep = answer.keep and framing.ended and not framing.rest
        answer.body = bytes(self._body)
        return answer


def _answer(status: int, headers: dict[str, str], is_modern: bool) -> Answer:
    length, coding = headers.get("content-length"), headers.get("transfer-encoding", "").lower()
    if coding not in ("", "chunked") or (length and not _LENGTH.fullmatch(length)):
        raise ValueError("a body of unknown length")
    kind = headers.get("content-type", "").lower()
    is_stream = status == 200 and kind.startswith("text/event-stream")
    if is_stream and headers.get("content-encoding", "identity") != "identity":
        raise ValueError("a compressed event stream that nobody asked for")
    is_empty = status in (204, 304)
    size = 0 if is_empty else int(length) if length and not coding else None
    framing = Framing(bool(coding) and not is_empty, size)
    keep = is_modern and "close" not in headers.get("connection", "").lower()
    return Answer(status, headers, framing, is_stream, keep and not (coding and length))


def _request(call: Call) -> list[bytes | bytearray]:
    """The bytes of a request, a small body in one piece with its head."""
    parts = urllib.parse.urlsplit(call.url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{call.method} {target} HTTP/1.1", f"host: {parts.netloc.rpartition('@')[2]}"]
    lines += [f"{name}: {value}" for name, value in call.headers.items()]
    if call.body or call.method in ("POST", "PUT"):
        lines.append(f"content-length: {len(call.body)}")
    head = "\r\n".join(lines)
    if head.count("\n") + head.count("\r") != 2 * len(lines) - 2:
        raise ValueError("a line break in the head of a request")
    start = f"{head}\r\n\r\n".encode("latin-1")
    return [start + call.body] if len(call.body) <= READ_BYTES else [start, call.body]


def _receive(sock: socket.socket, reply: _Reply) -> Answer | None:
    """One read of a response; the answer when it is complete."""
    try:
        data = sock.recv(READ_BYTES)
    except (ConnectionError, ssl.SSLEOFError):
        if reply.was_heard:
            raise
        data = b""
    return reply.feed(data)


async def open_answer(
    pool: ConnectionPool, workers: WorkerPool, call: Call, wire: Wire | None = None
) -> Answer:
    """Send `call`, read the response head, and the body unless it is an event stream.

    A worker connects, but none waits for the answer: two changes of threads cost half a ms.
    Cancelled, it closes the connection at once.
    A kept connection that turns out to be dead is replaced silently once, a fresh one that is reset
    before any response byte once as well; nothing else is ever sent twice.
    raises  UpstreamError
    """
    key, wire, connect_ms = pool.key(call.url), wire or Wire(), 0
    for last_try in (True,) if call.once else (False, True):
        sock = None if last_try else pool.take(key)
        try:
            if sock is None:
                began_s = time.monotonic()
                sock = await in_thread(workers, _connect, pool, key, wire)
                connect_ms = round((time.monotonic() - began_s) * 1000)
            wire.attach(sock)
            answer = await _exchange(sock, call)
            answer.connect_ms = connect_ms
            if coding := answer.headers.get("content-encoding"):
                unpack = (decoded, answer.body, coding, call.bytes_max)
                answer.body = bytes(await in_thread(workers, *unpack))
            wire.attach(None)
            return pool.settle(answer, key, sock)
        except BaseException as error:  # a cancelled call too must not leave its connection open
            if sock is not None:
                sock.close()
            if not isinstance(error, (OSError, ValueError)):
                wire.end()  # nobody waits any more
                raise
            if last_try or not isinstance(error, _Unanswered):
                raise _outbound_error(key[1], error) from None
    raise AssertionError  # the last try has ended either way


@blocking
def open_response(pool: ConnectionPool, call: Call, wire: Wire) -> Answer:
    """`open_answer` for a thread; `wire` can end it."""
    return asyncio.run(open_answer(pool, WorkerPool("connect", 1, idle_s=0.0), call, wire))


async def _exchange(sock: socket.socket, call: Call) -> Answer:
    loop, number = asyncio.get_running_loop(), sock.fileno()
    over: asyncio.Future[Answer] = loop.create_future()
    reply, unsent = _Reply(call.bytes_max), [memoryview(piece) for piece in _request(call)]

    def moved() -> None:
        """From now on only the upstream is waited for."""
        limit.reschedule(loop.time() + call.head_timeout_s)

    def send() -> None:
        try:
            unsent[0] = unsent[0][sock.send(unsent[0]) :]
            if not unsent[0]:
                del unsent[0]
        except _NOT_NOW:
            return
        except OSError:  # the answer may be there all the same, a 413 say: the reader finds out
            unsent.clear()

    def send_more() -> None:
        if not over.done():
            send()
            moved()
        if not unsent:
            loop.remove_writer(number)

    def receive() -> None:
        try:
            answer = None if over.done() else _receive(sock, reply)
        except _NOT_NOW:
            return
        except (OSError, ValueError) as error:
            over.set_exception(error)
            return
        if answer is not None:
            answer.keep = answer.keep and not unsent
            over.set_result(answer)
        elif reply.answer is not None:  # a head that drips in gets no more time than a silent one
            moved()

    sock.settimeout(0)
    try:
        async with asyncio.timeout(call.head_timeout_s) as limit:
            loop.add_reader(number, receive)
            send()
            if unsent:
                loop.add_writer(number, send_more)
            return await over
    finally:
        loop.remove_reader(number)
        if unsent:
            loop.remove_writer(number)


class TooLarge(ValueError):
    """Unpacked, the data is larger than allowed."""


@functools.cache
def find_zstd() -> Any:
    """The zstd module of Python 3.14 or its backport, where one is installed; else None."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def decoded(body: bytes | bytearray, coding: str, bytes_max: int) -> bytes | bytearray:
    """Undo one content coding in bounded memory: gzip, deflate, and zstd where Python has it.

    raises  TooLarge; ValueError for other codings and data that is broken, cut or followed by more
    """
    coding = coding.strip().lower().removeprefix("x-")
    if coding in ("", "identity"):
        return body
    # Quirk: some senders mean raw deflate without the zlib frame.
    windows = {"gzip": (31,), "deflate": (15, -15)}.get(coding, ())
    engines: list[Any] = [zlib.decompressobj(window) for window in windows]
    zstd = find_zstd()
    if coding == "zstd" and zstd is not None:
        options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        engines = [zstd.ZstdDecompressor(options=options)]
    for engine in engines:
        with contextlib.suppress(zlib.error, getattr(zstd, "ZstdError", zlib.error)):
            return _inflated(body, engine, bytes_max)
    raise ValueError(f"broken data, or an unknown content coding: {coding!r}")


def _inflated(body: bytes | bytearray, engine: Any, bytes_max: int) -> bytearray:
    whole = bytearray()
    # In slices, so that no single one of a bomb is large, nor what an engine copies for later.
    for start in range(0, len(body), 8 * KIB):
        if engine.eof:
            raise ValueError("the compressed data is followed by more")
        piece = body[start : start + 8 * KIB]
        whole += engine.decompress(piece, bytes_max + 1 - len(whole))
        if len(whole) > bytes_max:
            raise TooLarge("too large")
    if not engine.eof or engine.unused_data:
        raise ValueError("the compressed data is cut off or followed by more")
    return whole


@blocking
def _connect(pool: ConnectionPool, key: _Key, wire: Wire) -> socket.socket:
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # no stub

    scheme, host, port = key
    egress = pool.egress
    sys.audit("azt.call", host, port, egress)
    if egress.proxy_url and not proxy_bypass_environment(host, {"no": egress.no_proxy}):
        sock = _dial_proxy(pool, host, port, wire)
    else:
        sock = _dial(host, port, wire)
    return _wrap(pool, sock, host, wire) if scheme == "https" else sock


def _wrap(pool: ConnectionPool, sock: socket.socket, host: str, wire: Wire) -> ssl.SSLSocket:
    secure: ssl.SSLSocket | None = None
    try:
        # The handshake takes the descriptor out of `sock`: by a second one `end` reaches it.
        with sock.dup() as twin:
            wire.attach(twin)
            secure = pool.tls().wrap_socket(sock, server_hostname=host)
            wire.attach(secure)
            wire.note("tls")
        return secure
    except BaseException:  # whatever ended the handshake: nobody else knows the socket
        (secure or sock).close()
        raise


def _dial(host: str, port: int, wire: Wire) -> socket.socket:
    error: OSError = OSError("no address")
    addresses = _resolve(host, port)
    wire.note("dns")
    for family, kind, proto, _, address in addresses:
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.attach(sock)
            sys.audit("azt.dial", host)
            sock.connect(address)
            wire.note("connect")
            return sock
        except OSError as caught:
            sock.close()
            error = caught
            if isinstance(caught, ConnectionAbortedError):
                break
    raise ConnectionError(str(error))  # also of a timeout: only a connected host may be silent


def _resolve(host: str, port: int) -> list[Any]:
    """getaddrinfo has no timeout: a dead resolver would hold the call for half a minute."""
    found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.set_exception(ConnectionError(str(error)))

    threading.Thread(target=look_up, name="azt-resolve", daemon=True).start()
    try:
        return found.result(RESOLVE_TIMEOUT_S)
    except TimeoutError:
        raise ConnectionError(f"the name {host} could not be looked up in time") from None


def _dial_proxy(pool: ConnectionPool, host: str, port: int, wire: Wire) -> socket.socket:
    """A tunnel through the proxy: CONNECT, for plain http too, so that the rest never notices."""
    url = pool.egress.proxy_url
    sock: socket.socket | None = None
    try:
        proxy = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if proxy.scheme not in _PORTS:
            raise ValueError("azt speaks to http:// and https:// proxies only")
        sock = _dial(proxy.hostname or "", proxy.port or _PORTS[proxy.scheme], wire)
        if proxy.scheme == "https":
            sock = _wrap(pool, sock, proxy.hostname or "", wire)
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
        if proxy.username:
            pair = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
            head += f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
        sock.sendall(f"{head}\r\n".encode("latin-1"))
        reply = _Reply()
        while (answer := reply.head(sock.recv(READ_BYTES))) is None:
            pass
        if answer.status != 200:
            raise OSError(f"it answered {answer.status}")
    except (OSError, ValueError) as error:
        if sock is not None:
            sock.close()
        name = url.rpartition("@")[2]
        text = f"The proxy {name} did not work: {mask(str(error))}. "
        text += "Check `azt settings get networkProxy` and HTTPS_PROXY."
        raise UpstreamError(502, "proxy_failed", text, fault="network") from None
    # One TLS layer cannot wrap another in Python: a pump turns the outer one into a plain socket.
    return _pumped(sock) if isinstance(sock, ssl.SSLSocket) else sock


def _pumped(outer: ssl.SSLSocket) -> socket.socket:
    """A plain socket whose bytes travel through `outer`; one daemon thread moves them."""
    near, far = socket.socketpair()
    ways = {outer.fileno(): (outer, far), far.fileno(): (far, outer)}
    poller = select.poll()
    for number in ways:
        poller.register(number, select.POLLIN)

    def pump() -> None:
        outer.settimeout(None)
        with outer, far, contextlib.suppress(OSError):
            while True:
                ready = [(outer.fileno(), 0)] if outer.pending() else poller.poll()
                for number, _ in ready:
                    source, target = ways[number]
                    data = source.recv(READ_BYTES)
                    if not data:
                        return
                    target.sendall(data)

    threading.Thread(target=pump, name="azt-proxy", daemon=True).start()
    return near


def _outbound_error(host: str, error: Exception) -> UpstreamError:
    """Foreign exceptions under azt's own names."""
    if isinstance(error, ssl.SSLError):
        why = getattr(error, "verify_message", "") or error.reason or "handshake failed"
        text = f"No trusted TLS connection to {host}: {why}. "
        text += "If a company proxy opens TLS, name its root certificate in AZT_CA_FILE."
        return UpstreamError(502, "upstream_tls", text, fault="network", host=host)
    if isinstance(error, TimeoutError):
        text = f"{host} did not answer in time. Try again."
        return UpstreamError(504, "upstream_timeout", text, fault="network", host=host)
    if not isinstance(error, OSError):
        text = f"{host} answered with something that is no valid HTTP: {error}."
        return UpstreamError(502, "upstream_error", text)
    text = f"azt could not reach {host}: {mask(str(error)) or 'the connection was closed'}. "
    text += "Check the network, or set a proxy with `azt settings set networkProxy.url`."
    return UpstreamError(502, "upstream_unreachable", text, fault="network", host=host)


_STAGES = ("dns", "connect", "tls", "http")


async def try_route(pool: ConnectionPool, workers: WorkerPool, url: str) -> Json:
    """Call that host once, without any credentials: how far it came, and in how many ms.

    {"target", "dns", "connect", "tls", "http", "status", "ok"}; where it failed {"stage", "code",
    "message"} instead of what follows. `clockMs`: by how much its clock is ahead of ours.
    """
    parts, wire, last = urllib.parse.urlsplit(url), Wire(), time.monotonic()
    target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/robots.txt"
    step: Json = {"target": parts.hostname}
    call = Call("GET", target, OWN_HEADERS, head_timeout_s=CONNECT_TIMEOUT_S, once=True)
    try:
        answer = await open_answer(pool, workers, call, wire)
        wire.stages["http"] = time.monotonic()
        step |= {"status": answer.status, "ok": answer.status < 500}
        told = email.utils.parsedate_tz(answer.headers.get("date", ""))
        if told is not None:
            step["clockMs"] = round((email.utils.mktime_tz(told) - time.time()) * 1000)
        answer.close()
    except UpstreamError as error:
        ways = ("dns", "connect", "http") if parts.scheme == "http" else _STAGES
        stage = next(one for one in ways if one not in wire.stages)
        step |= {"ok": False, "stage": stage, "code": error.code, "message": error.message}
    for stage in _STAGES:
        if stage in wire.stages:
            step[stage] = round((wire.stages[stage] - last) * 1000)
            last = wire.stages[stage]
    return step


# -- see for yourself: what the interpreter itself reports (`azt start --audit`)

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    f"os.{name}" for name in "chmod link mkdir remove rename rmdir symlink truncate".split()
}
_LOCAL_NAMES = {"", "localhost", "0.0.0.0", "::", "127.0.0.1", "::1"}


class Audit:
    """Tells on stderr what this process connects to, listens on, writes and starts, and refuses
    every host that is neither in `OUTBOUND` nor named by the user. There is no way back.

    It sees all Python code of this process, not what another program does that azt starts.
    folders  where azt may write; a write elsewhere is marked
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = [os.path.realpath(folder) + os.sep for folder in folders]
        self._named, self._here = set(_LOCAL_NAMES), threading.local()
        sys.dont_write_bytecode = True
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "azt.call":
            host, port, egress = args
            proxy = urllib.parse.urlsplit(egress.proxy_url).hostname or ""
            if _is_listed(host) or host in egress.own_hosts:
                self._named |= {host, proxy}
            self._judge(f"calls {host}:{port}", host)
        elif event == "azt.dial":
            self._here.host = args[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            if isinstance(args[1], tuple):
                host = self._here.__dict__.pop("host", args[1][0])
                self._judge(f"connects to {host}:{args[1][1]} at {args[1][0]}", host)
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = args[0].decode() if isinstance(args[0], bytes) else args[0] or ""
            if not re.fullmatch(r"[\d.]+|.*:.*", host) and host not in self._named:
                self._judge(f"looks up {host}", host)
        elif event == "azt.listen":
            self._named.add(args[0])
        elif event == "socket.bind" and isinstance(args[1], tuple):
            self._tell(f"listens on {args[1][0]}:{args[1][1]}")
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
            self._tell(f"starts {args[0] or args[1]}: what that does is not seen here")
        else:
            self._file(event, args)

    def _file(self, event: str, args: tuple[Any, ...]) -> None:
        paths = [os.fsdecode(one) for one in args[:2] if isinstance(one, str | bytes | Path)]
        opened = self._here.__dict__.pop("opened", None)
        if event == "open":
            path, mode, flags = args
            if paths and flags & _WRITES and path not in (os.devnull, opened):
                self._here.opened = mode and path  # an `opener` of it is no second opening
                self._written("writes", paths[:1])
        elif event in _CHANGES:
            if event in ("os.remove", "os.rmdir") and args[1] != -1:  # seen from an open folder
                with contextlib.suppress(OSError):
                    paths[0] = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), paths[0])
            self._written(event.removeprefix("os.") + "s", paths)
        elif event == "sqlite3.connect" and "mode=ro" not in str(args[0]):
            self._written("writes", [urllib.parse.urlsplit(str(args[0])).path])

    def _written(self, does: str, paths: list[str]) -> None:
        where = os.path.realpath(paths[-1]) + os.sep if paths else ""  # none: an open file
        is_ours = any(where.startswith(folder) for folder in self._folders)
        if where:
            self._tell(f"{does} {' -> '.join(paths)}" + ("" if is_ours else "  <- not azt's own"))

    def _judge(self, does: str, host: str) -> None:
        is_known = host in self._named
        self._tell(does if is_known else f"REFUSED: {does}")
        if not is_known:
            raise PermissionError(errno.EACCES, "--audit: it is not in the table of hosts")

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"azt audit: {mask(text)}\n".encode(errors="replace"))


# ==================================================================================================
# 7. Event streams
#    JSON and SSE bytes <-> dicts. Pure: no I/O, no clock.
# ==================================================================================================


_UTF8, _ASCII = (json.JSONEncoder(ensure_ascii=a, separators=(",", ":")) for a in (False, True))


def encode_json(value: Any) -> bytes:
    """Compact JSON as UTF-8. Lone surrogates, which no UTF-8 can carry, stay `\\uXXXX` escapes."""
    try:
        return _UTF8.encode(value).encode()
    except UnicodeEncodeError:
        return _ASCII.encode(value).encode()


def encode_large_json(value: Any) -> bytes:
    """The same bytes, made in pieces: one call of the encoder would stop every stream."""
    whole = io.BytesIO()  # unlike a list it keeps no piece, and its value is no copy
    whole.writelines(_pieces(value))
    return whole.getvalue()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield b'"'
        yield from (encode_json(value[at : at + MIB])[1:-1] for at in range(0, len(value), MIB))
        yield b'"'
    elif isinstance(value, (dict, list)) and value:
        is_object = isinstance(value, dict)
        for at, one in enumerate(value):
            yield b"," if at else b"{" if is_object else b"["
            if is_object:
                yield encode_json(one) + b":"
            yield from _pieces(value[one] if is_object else one)
        yield b"}" if is_object else b"]"
    else:
        yield encode_json(value)


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
_NO_MARKS = bytes(set(range(256)) - set(b'"[{,'))
_MARKS_SLICE_BYTES = 1 << 20


def _has_too_many_marks(body: bytes | bytearray) -> bool:
    """Strings, and openings and commas outside of them: 128 MiB of "[]," are 3 GiB of lists."""
    count, start, inside = 0.0, 0, 0
    while start < len(body) and count <= MAX_JSON_MARKS:
        end = start + _MARKS_SLICE_BYTES
        while body[end - 1 : end] == b"\\":
            end += 1  # never between the two bytes of an escape
        marks = body[start:end].replace(rb"\\", b"  ").replace(rb"\"", b"  ")
        pieces = marks.translate(None, _NO_MARKS).split(b'"')
        count += (len(pieces) - 1) / 2 + sum(map(len, pieces[inside::2]))
        start, inside = end, (inside + len(pieces) - 1) % 2
    return count > MAX_JSON_MARKS


def parse_json(body: bytes | bytearray, clears: bool = False) -> Any:
    """Bytes from a client -> a JSON value.

    clears  empty a bytearray as soon as it is a text: a large body is then not held three times
    raises  ValueError (also for NaN, numbers of more than 4,300 digits, not UTF-8, too deep, too
            many values or escapes)
    """
    if body.count(b"\\") > MAX_JSON_ESCAPES:  # each takes as long as 20 plain characters
        raise ValueError(f"more than {MAX_JSON_ESCAPES} escapes")
    if len(body) > MAX_JSON_MARKS and _has_too_many_marks(body):
        raise ValueError(f"more than {MAX_JSON_MARKS} strings and values")
    try:
        text = str(body, "utf-8-sig")
        if clears and isinstance(body, bytearray):
            body.clear()
        # The C scanner holds the interpreter lock for as long as one call takes: a 128 MiB document
        # in one call stops every stream for a second. Between members other threads get their turn.
        value, end = _parse_value(text, _skip(text, 0), 2 if len(text) > MIB else 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _skip(text, end) != len(text):
        raise ValueError("extra data after the JSON value")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _skip(text: str, at: int, mark: str = "") -> int:
    """The position behind `mark`, which must stand at `at`, and white space."""
    if not text.startswith(mark, at):
        raise ValueError(f"{mark} is missing at character {at}")
    return cast(re.Match[str], _SPACE.match(text, at + len(mark))).end()


def _parse_value(text: str, at: int, levels: int) -> tuple[Any, int]:
    """The value at `at` and the position behind it; the outer `levels` member by member."""
    opening = text[at : at + 1]
    if levels == 0 or opening not in ("{", "["):
        return _DECODER.raw_decode(text, at)
    closing = "}" if opening == "{" else "]"
    names: list[str] = []
    values: list[Any] = []
    start, at = at, _skip(text, at, opening)
    while not text.startswith(closing, at):
        at = _skip(text, at, ",") if values else at
        if opening == "{":
            _skip(text, at, '"')
            name, at = _DECODER.raw_decode(text, at)
            names.append(name)
            at = _skip(text, _skip(text, at), ":")
        value, at = _parse_value(text, at, levels - 1)
        values.append(value)
        at = _skip(text, at)
        if len(values) > JSON_PIECES_MAX:  # many small members: one call of the scanner is faster
            return _DECODER.raw_decode(text, start)
    return dict(zip(names, values, strict=True)) if opening == "{" else values, at + 1


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether containers nest deeper than `levels`; goes no deeper itself."""
    if levels == 0 or not isinstance(value, (dict, list)):
        return isinstance(value, (dict, list))
    children = value.values() if isinstance(value, dict) else value
    inner = (child for child in children if isinstance(child, (dict, list)))
    return any(_is_deeper(child, levels - 1) for child in inner)


class SSEParser:
    """SSE bytes in any split -> the data of each complete event (WHATWG rules).

    Knows CRLF, CR and LF line ends, also mixed; a BOM; comments; `data` without a space; several
    data lines. An event is complete at its blank line; what follows the last one is never reported.
    Event names are dropped: the JSON has a `type`.

    raises  UpstreamError when one event exceeds MAX_EVENT_BYTES
    """

    __slots__ = ("_after_cr", "_at_start", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at_start, self._after_cr = True, False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that `chunk` completes."""
        if b"\r" in chunk or self._after_cr:
            chunk = self._newlines(chunk)
        buffer = self._buffer
        searched = max(len(buffer) - 1, 0)
        buffer += chunk
        end = buffer.rfind(b"\n\n", searched)
        if end < 0:
            if len(buffer) > MAX_EVENT_BYTES:
                text = "The upstream sent an event larger than azt accepts."
                raise UpstreamError(502, "upstream_error", text, fault="transient")
            return []
        blocks = bytes(buffer[:end])
        del buffer[: end + 2]
        if self._at_start:
            blocks, self._at_start = blocks.removeprefix(b"\xef\xbb\xbf"), False
        return [data for block in blocks.split(b"\n\n") if (data := _block_data(block)) is not None]

    def _newlines(self, chunk: bytes) -> bytes:
        """Every line end as LF, also a CRLF that two chunks share."""
        if self._after_cr and chunk:
            chunk, self._after_cr = chunk.removeprefix(b"\n"), False
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
    """The `type` of an event; not decoded where it stands first, as the backend writes it."""
    found = _TYPE.match(data)
    if found:
        return found[1].decode("utf-8", "replace")
    event = parse_event(data) or {}
    kind = event.get("type")
    return kind if isinstance(kind, str) else "error" if event.get("error") else ""


def parse_event(data: bytes | bytearray) -> Json | None:
    """The event as a dict, or None for what is no JSON object: it is skipped, not fatal."""
    try:
        event = _DECODER.decode(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


# ==================================================================================================
# 8. Accounts
#    Who is signed in; reading and writing of account files. Pure: room 14 loads and saves them.
# ==================================================================================================

ACCOUNTS_VERSION = 1
IMPORT_MAX_BYTES, IMPORT_MEMBER_MAX_BYTES, IMPORT_MAX_ENTRIES = 16 * MIB, 1 * MIB, 1000
IMPORT_BUDGET_S = 5.0


@dataclass(slots=True)
class Account:
    """One signed-in identity: an account id with a user id (two members of a workspace are two)."""

    id: str
    account_id: str
    user_id: str
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    id_token: str = field(repr=False, default="")
    email: str = ""
    plan: str = "unknown"
    label: str = ""
    expires_at: int = 0  # unix seconds; 0 when the access token does not say
    created_at: int = 0
    refreshed_at: int = 0
    rejected: str = ""  # why the provider no longer accepts the sign-in
    priority: int = 0  # the person's own order: 1 is first, 0 says nothing
    last_used_at: int = 0
    cooldown_until: int = 0  # unix seconds; the account rests until then
    cooldown_reason: str = ""
    quota: Json = field(default_factory=dict)  # the last reading; {} before the first
    exports: Json = field(default_factory=dict)  # {"count", "lastAt", "lastKind"}

    @property
    def name(self) -> str:
        """What logs and headers may show: the label, else the short id, never the e-mail."""
        return self.label or self.id


# `x-codex-primary-used-percent`; other limits than the plan's own put their name after the x.
_LIMIT_HEADER = re.compile(
    r"x-(.+)-(primary|secondary)-(used-percent|window-minutes|reset-after-seconds|reset-at)"
)


def quota_from_headers(headers: Mapping[str, str], now: float) -> Json:
    """A reading out of the headers of any answer (codex-upstream.md 5.1); {} without one."""
    limits: dict[str, Json] = {}
    for name, value in headers.items():
        if found := _LIMIT_HEADER.fullmatch(name.lower()):
            window = limits.setdefault(found[1], {}).setdefault(found[2], {})
            window[found[3].replace("-", "_")] = value
    names = {"has_credits": "has-credits", "unlimited": "unlimited", "balance": "balance"}
    credit = {ours: headers.get(f"x-codex-credits-{name}") for ours, name in names.items()}
    return _reading("response_headers", limits, credit, headers.get("x-codex-plan-type"), now)


def quota_from_body(body: Json, now: float) -> Json:
    """A reading out of a `codex.rate_limits` event or an answer of `wham/usage` (4.11, 5.4)."""
    name = body.get("metered_limit_name") or body.get("limit_name") or "codex"
    limits = {str(name): body.get("rate_limits") or body.get("rate_limit")}
    limits["code_review"] = body.get("code_review_rate_limits") or body.get(
        "code_review_rate_limit"
    )
    more = body.get("additional_rate_limits")
    if isinstance(more, list):
        more = {
            str(one.get("metered_feature") or one.get("limit_name")): one.get("rate_limit")
            for one in map(_as_object, more)
        }
    source = "rate_limit_event" if "rate_limits" in body else "usage_endpoint"
    credit = _as_object(body.get("credits"))
    return _reading(source, limits | _as_object(more), credit, body.get("plan_type"), now)


def _reading(source: str, limits: Mapping[str, Any], credit: Json, plan: Any, now: float) -> Json:
    """What is known of the quota, as it is kept with the account.

    out     {"source", "captured_at", "plan", "windows": [window], "extra": [window], "credits",
            "left", "until"}; a window is {"key", "minutes", "used", "resets_at"}, unix seconds.
            `left` (percent of the tightest window) holds until `until`, the first reset
    """
    reading: Json = {"windows": [], "extra": []}
    for name, limit in limits.items():
        for key in ("primary", "secondary"):
            raw = _as_object(limit).get(key) or _as_object(limit).get(f"{key}_window")
            if window := _window(key if name == "codex" else name, _as_object(raw), now):
                reading["windows" if name == "codex" else "extra"].append(window)
    words = [str(credit.get(name)).lower() for name in ("has_credits", "unlimited")]
    if {*words} <= {"true", "false", "1", "0"}:
        has, unlimited = (word in ("true", "1") for word in words)
        balance = str(credit["balance"]) if credit.get("balance") else None
        reading["credits"] = {"has": has, "unlimited": unlimited, "balance": balance}
    reading["plan"] = _shown(plan, 64) if isinstance(plan, str) else ""
    reading = {name: value for name, value in reading.items() if value}
    return reading and {**reading, "source": source, "captured_at": int(now)}


def _window(key: str, raw: Json, now: float) -> Json | None:
    """One window, out of numbers or of their texts; None for one that says nothing."""
    names = "used_percent window_minutes limit_window_seconds reset_at reset_after_seconds".split()
    used, minutes, seconds, resets_at, after = (_quantity(raw.get(name)) for name in names)
    minutes = minutes or math.ceil((seconds or 0) / 60)
    if used is None or not (used or minutes or resets_at or after):
        return None
    # The wait stands a clock that is wrong, the time does not; no window outlasts its length.
    latest = now + (minutes or 300) * 60
    resets_at = min(now + after if after else resets_at or latest, latest)
    used = min(used, 100.0)
    return {"key": key[:64], "minutes": int(minutes), "used": used, "resets_at": int(resets_at)}


def _quantity(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if value is not True and 0 <= float(value) < 1e11:
            return float(value)
    return None


def learn_quota(account: Account, reading: Json) -> None:
    """Keep a reading; what it does not speak of stays as it was."""
    known = account.quota.get("windows", ())
    quota = account.quota = {**account.quota, **reading}
    if reading.get("source") == "response_headers" and (told := reading.get("windows")):
        # Quirk: headers may tell of one window alone; the other is still there until it is over.
        keys, at = [one["key"] for one in told], quota["captured_at"]
        left = [one for one in known if one["key"] not in keys and one["resets_at"] > at]
        quota["windows"] = sorted(told + left, key=operator.itemgetter("key"))
    account.plan = quota.get("plan", account.plan)
    resets = [one["resets_at"] for one in quota.get("windows", ()) if one["resets_at"]]
    quota["until"] = min(resets, default=0)
    quota["left"] = percent_left(quota, quota["captured_at"])


def percent_left(quota: Json, now: float) -> float:
    """What is left in the tightest window, 0 to 100; -1 when nothing is known. A window whose reset
    time has passed counts as full again."""
    windows = quota.get("windows", ())
    used = [one["used"] for one in windows if not 0 < one["resets_at"] <= now]
    if quota.get("credits", {}).get("unlimited"):
        return 100.0
    return 100.0 - max(used, default=0.0) if windows else -1.0


def pace(window: Json, now: float) -> Json:
    """Will a window last? (console.md 6.3) {"timeLeftPercent", "verdict", "emptyAt"}, in ms."""
    whole, to_go, used = window["minutes"] * 60.0, window["resets_at"] - now, window["used"]
    if not whole or to_go <= 0:
        return {"timeLeftPercent": None, "verdict": "unknown", "emptyAt": None}
    is_early = whole - to_go < 0.05 * whole or used < 5
    empty_at = math.inf if is_early else now + (100 - used) / used * (whole - to_go)
    is_fast = empty_at < window["resets_at"] - 0.05 * whole
    return {
        "timeLeftPercent": round(to_go / whole * 100),
        "verdict": "empty" if used >= 100 else "fast" if is_fast else "ok",
        "emptyAt": None if is_early else int(empty_at * 1000),
    }


def account_id_of(account_id: str, user_id: str) -> str:
    return "acc_" + hashlib.sha256(f"{account_id}|{user_id}".encode()).hexdigest()[:10]


class AccountStore:
    """All accounts and which one serves. Owned by the loop; the disk gets `to_json`, a snapshot."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.active_id: str | None = None

    @property
    def active(self) -> Account | None:
        return self.accounts.get(self.active_id or "")

    def add(
        self, account: Account, unless_newer: bool = False
    ) -> Literal["new", "update", "same", "older"]:
        """Add or renew. What the user set stays, and so does the serving one, if there is one.

        unless_newer  a sign-in that is here already and expires later is left as it is
        """
        old = self.accounts.get(account.id)
        if old is None:
            is_taken = self.named(account.label)
            self.accounts[account.id] = replace(account, label="") if is_taken else account
            self.active_id = self.active_id or account.id
            return "new"
        if (old.access_token, old.refresh_token) == (account.access_token, account.refresh_token):
            return "same"
        # A dead sign-in loses nothing by another one, however old that is.
        if unless_newer and not old.rejected and 0 < account.expires_at < old.expires_at:
            return "older"
        names = "access_token refresh_token id_token expires_at refreshed_at email plan".split()
        values = {name: getattr(account, name) for name in names}
        known = {name: value for name, value in values.items() if value not in ("", "unknown")}
        self.accounts[account.id] = replace(old, rejected="", **known)
        return "update"

    def remove(self, account: Account) -> None:
        self.accounts.pop(account.id, None)
        if self.active_id == account.id:
            self.active_id = next(iter(self.accounts), None)

    def named(self, name: str) -> list[Account]:
        """Whose label, e-mail or id this is."""
        if not name or name in self.accounts:
            return [self.accounts[name]] if name else []
        wanted, everyone = name.casefold(), self.accounts.values()
        return [a for a in everyone if wanted in (a.label.casefold(), a.email.casefold())]

    def find(self, name: str) -> Account:
        """An account by label, e-mail or the beginning of its id. Raises AztError."""
        start = name.casefold().removeprefix("acc_")
        everyone = list(self.accounts.values()) if start else []
        found = self.named(name)
        found = found or [a for a in everyone if a.id.removeprefix("acc_").startswith(start)]
        if len(found) == 1:
            return found[0]
        text = "Several accounts match" if found else "No account matches"
        text += f" {name!r}. `azt accounts list` shows their ids."
        raise AztError(404, "account_not_found", text, extra={"params": {"id": name}})

    def to_json(self) -> Json:
        entries = [
            {slot: getattr(account, slot) for slot in Account.__slots__}
            for account in self.accounts.values()
        ]
        return {"version": ACCOUNTS_VERSION, "active_id": self.active_id, "accounts": entries}

    @classmethod
    def from_json(cls, saved: Json | None) -> AccountStore:
        """raises  StateError when the content is not what `to_json` writes"""
        store = cls()
        if saved is None:
            return store
        try:
            for entry in saved["accounts"]:
                known = {name: entry[name] for name in Account.__slots__ if name in entry}
                account = Account(**known)
                for name, kind in Account.__annotations__.items():
                    if type(getattr(account, name)).__name__ != kind.replace("Json", "dict"):
                        raise TypeError(f"{name} is no {kind}")
                if account.quota:
                    learn_quota(account, {})
                store.accounts[account.id] = account
            store.active_id = saved["active_id"] if saved["active_id"] in store.accounts else None
        except (KeyError, TypeError, AttributeError) as error:
            text = f"accounts.json has an unknown shape ({error}). Move it away and import again."
            raise StateError(text) from None
        store.active_id = store.active_id or next(iter(store.accounts), None)
        return store


def _bad_file(code: str, message: str) -> BadRequest:
    return BadRequest(message, "file", code)


_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, OSError)

Found = tuple[str, Any]
"""The name of a file, and what is in it: in the end an `Account`, or why there is none."""


def read_accounts(files: Iterable[Found], now: float) -> list[Found]:
    """Account files, as bytes or parsed JSON -> (file, Account or BadRequest) for every entry.

    in      one object; an array; {"profiles": [...]}, also as an object (the Node program's
            `store.json`); Codex's `auth.json`; a ZIP of such files
    raises  BadRequest when there are too many of them
    """
    unpacked = functools.partial(_unpacked, deadline=time.monotonic() + IMPORT_BUDGET_S)
    found: Iterable[Found] = files
    for step in (unpacked, _entries, functools.partial(_account, now=now)):
        found = _each(found, step)
    accounts = list(itertools.islice(found, IMPORT_MAX_ENTRIES + 1))
    if len(accounts) > IMPORT_MAX_ENTRIES:
        raise _bad_file("too_large", f"There are more than {IMPORT_MAX_ENTRIES} accounts.")
    return accounts


def _each(found: Iterable[Found], step: Callable[[str, Any], list[Found]]) -> Iterator[Found]:
    """Take every file one step further; what is unreadable stays in its place as the reason."""
    for file, content in found:
        try:
            is_bad = isinstance(content, BadRequest)
            done = [(file, content)] if is_bad else step(file, content)
        except BadRequest as error:
            # A fresh one: its traceback would hold the whole file.
            done = [(file, _bad_file(str(error.code), error.message))]
        yield from done
        done.clear()  # or the next file is unpacked while this one is still held


def _unpacked(file: str, raw: Any, deadline: float) -> list[Found]:
    """The members of a ZIP, for anything else itself. Nothing is ever written to disk."""
    if not isinstance(raw, (bytes, memoryview)):
        return [(file, raw)]
    if len(raw) > IMPORT_MAX_BYTES:
        raise _bad_file("too_large", "The file is larger than 16 MiB.")
    raw = bytes(raw)
    if not raw.startswith(b"PK"):
        return [(file, raw)]
    if raw.count(b"PK\x01\x02") > IMPORT_MAX_ENTRIES:  # before anything looks at each
        raise _bad_file("too_large", "The ZIP file has too many members.")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return list(_zip_members(file, archive, deadline))
    except _ZIP_ERRORS as error:
        text = f"The ZIP file cannot be read ({mask(str(error))[:120]})."
        raise _bad_file("unknown_format", text) from None


def _zip_members(file: str, archive: zipfile.ZipFile, deadline: float) -> Iterator[Found]:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    total = end = 0
    for member in members:
        if member.header_offset < end:
            raise ValueError("overlapping members")
        end = member.header_offset + member.compress_size
        name = member.filename  # perhaps "", which `is_dir` stumbles over
        base = name.rsplit("/", 1)[-1]
        if name.endswith("/") or base.startswith("._") or name.startswith("__MACOSX"):
            continue
        if member.flag_bits & 1 or member.compress_type not in _ZIP_METHODS:
            raise ValueError("encrypted, or an unusual compression")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or not base.endswith(".json"):
            raise ValueError("members other than .json files")
        with archive.open(member) as opened:
            text = opened.read(IMPORT_MEMBER_MAX_BYTES + 1)
        total += len(text)
        is_large = len(text) > IMPORT_MEMBER_MAX_BYTES or total > IMPORT_MAX_BYTES
        if is_large or time.monotonic() > deadline:
            raise _bad_file("too_large", "The ZIP file has too much in it once unpacked.")
        yield f"{file}/{name}" if file else name, text


def _entries(file: str, document: Any) -> list[Found]:
    try:
        document = parse_json(document) if isinstance(document, bytes) else document
    except ValueError as error:
        raise _bad_file("not_json", f"This is no valid JSON ({error}).") from None
    inner = document.get("profiles") if isinstance(document, dict) else document
    inner = [*inner.values()] if isinstance(inner, dict) else inner
    entries = inner if isinstance(inner, list) else [document]
    return [(file, entry) for entry in entries[: IMPORT_MAX_ENTRIES + 1]]


# Every field of an export -> the spellings in use (ours, Codex, other gateways, the Node program).
_IMPORT_NAMES = {
    "access_token": ("access_token", "accessToken", "access"),
    "account_id": ("account_id", "accountId", "chatgpt_account_id"),
    "email": ("email",),
    "expires_at": ("expires_at", "expiresAt", "expired", "expires"),
    "id_token": ("id_token", "idToken"),
    "label": ("label",),
    "plan": ("plan", "plan_type", "planType"),
    "priority": ("priority",),
    "refresh_token": ("refresh_token", "refreshToken", "refresh"),
    "user_id": ("user_id", "chatgpt_user_id"),
}
_LABEL = r"(?!\s|\.\.?$)[^/\\]{0,64}(?<!\s)|"  # fits into a header, a log line and a path
# What a person may set on an account -> what is allowed, as a test and in words; and empty.
USER_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "label": (*_text("a name of up to 64 characters without slashes", _LABEL), ""),
    "priority": (*_number(0, 1000), 0),
}
_SECRET_TEXT = re.compile(r"[\x21-\x7e]{1,16384}")
_ACCOUNT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_YEAR_2200_S = 7_258_118_400


def to_accounts(entries: list[Json], now: float) -> list[Account]:
    """Entries of an account file -> accounts: all, or BadRequest for the first bad one."""
    return [_account("", entry, now)[0][1] for entry in entries]


def _account(file: str, entry: Any, now: float) -> list[Found]:
    """One import entry, typed and sized field by field: tokens become header values."""
    if not isinstance(entry, dict):
        raise _bad_file("unknown_format", "It is no object.")
    source = entry | _as_object(entry.get("tokens"))
    fields: Json = {
        ours: next((source[name] for name in names if source.get(name) is not None), None)
        for ours, names in _IMPORT_NAMES.items()
    }
    for secret in ("access_token", "refresh_token", "id_token"):
        value = fields[secret] = fields[secret] or ""
        if not value and secret != "id_token":
            raise _bad_file(f"no_{secret}", f"It has no {secret}.")
        if value and not (isinstance(value, str) and _SECRET_TEXT.fullmatch(value)):
            raise _bad_file("unknown_format", f"Its {secret} is no token.")
    tokens = (fields["access_token"], fields["refresh_token"], fields["id_token"])
    account = account_from_tokens(*tokens, now)
    for name in ("account_id", "user_id", "email", "plan"):
        if isinstance(fields[name], str) and getattr(account, name) in ("", "unknown"):
            shown = fields[name] if name == "account_id" else _shown(fields[name], 256)
            setattr(account, name, shown)
    account.id = account_id_of(account.account_id, account.user_id)
    if not _ACCOUNT_ID.fullmatch(account.account_id):
        raise _bad_file("no_account_id", "It names no account id.")
    account.expires_at = account.expires_at or _expiry(fields["expires_at"])
    fields["label"] = _shown(fields["label"] or "", 64).strip()
    for name, (is_good, _, empty) in USER_FIELDS.items():
        setattr(account, name, fields[name] if is_good(fields[name]) else empty)
    return [(file, account)]


def import_accounts(store: AccountStore, found: Mapping[int, Found], now: float) -> list[Json]:
    """Add what was found, and say of each entry what came of it (console.md 6.3).

    result  "new", "update", "expired" (one of these, but its access token is over), "same" (left
            as it is; with a `code` where its tokens are others), "unreadable" (`code`, `message`)
    """
    items = []
    for index, (file, one) in found.items():
        item: Json = {"index": index, "file": mask(file)[-80:] or None, "result": "unreadable"}
        if isinstance(one, Account):
            result: str = store.add(one, unless_newer=True)
            if result == "older":
                item |= {"code": result, "message": "azt has a newer sign-in of this account."}
            is_over = result in ("new", "update") and 0 < one.expires_at < now
            item["result"] = "expired" if is_over else result.replace("older", "same")
            items.append(item | {"id": one.id, "email": one.email, "plan": one.plan})
        else:
            items.append(item | {"code": one.code, "message": one.message})
    return items


def export_accounts(accounts: Sequence[Account], as_zip: bool = False) -> bytes:
    """A file that `read_accounts` takes: one account, a bundle, or a ZIP with a file for each."""
    entries = [{name: getattr(account, name) for name in _IMPORT_NAMES} for account in accounts]
    if not as_zip:
        bundle = entries[0] if len(entries) == 1 else {"profiles": entries}
        return json.dumps(bundle, indent=1).encode() + b"\n"
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for account, entry in zip(accounts, entries, strict=True):
            archive.writestr(f"{account.id}.json", json.dumps(entry, indent=1))
    return raw.getvalue()


# Settings of the Node program that have another name here.
_NODE_SETTINGS = {
    "autoSwitch.excludedProfileIds": "autoSwitch.excludedIds",
    "runtime.quotaSyncConcurrency": "quota.concurrency",
}


def from_node(raw: bytes | None, settings: Json, now: float) -> tuple[Json, Json]:
    """The Node program's `store.json` and `settings.json` -> our `accounts.json`, `settings.json`.

    in      {"activeProfileId": str, "profiles": {id: {"access", "refresh", ...}}}
    raises  StateError: what cannot be read is never taken for empty
    """
    store, ids = AccountStore(), {}
    try:
        left = {"profiles": {}} if raw is None else parse_json(raw)
        found = zip([*left["profiles"].keys()], read_accounts([("", left)], now), strict=True)
    except (AttributeError, BadRequest, LookupError, TypeError, ValueError):
        text = "store.json, left by the Node program, is damaged. Mend it or move it away."
        raise StateError(text) from None
    for profile_id, (_, one) in found:
        if isinstance(one, Account):
            store.add(one)
            ids[profile_id] = one.id
        else:
            log.warning("store.json: an account is left out. %s", one.message)
    store.active_id = ids.get(left.get("activeProfileId"), store.active_id)
    values = {_NODE_SETTINGS.get(key, key): value for key, value in flattened(settings).items()}
    if isinstance(excluded := values.get("autoSwitch.excludedIds"), list):
        values["autoSwitch.excludedIds"] = [ids[one] for one in excluded if one in ids]
    values = {key: value for key, value in values.items() if key in SETTINGS}
    return store.to_json(), {"version": 1, "revision": 1, "values": values}


def account_from_tokens(
    access_token: str, refresh_token: str, id_token: str, now: float
) -> Account:
    """Identity, plan and expiry as the token claims tell them (codex-upstream.md 1.9)."""
    access, identity = token_claims(access_token), token_claims(id_token)
    auth: Json = {}
    for claims in (identity, access):
        said = _as_object(claims.get("https://api.openai.com/auth"))
        auth |= {name: value for name, value in said.items() if value}
    profile = _as_object(access.get("https://api.openai.com/profile"))
    account_id = str(auth.get("chatgpt_account_id") or "")
    user_id = str(auth.get("chatgpt_user_id") or auth.get("user_id") or "")[:256]
    email = identity.get("email") or access.get("email") or profile.get("email") or ""
    return Account(
        id=account_id_of(account_id, user_id),
        account_id=account_id,
        user_id=user_id,
        access_token=access_token,
        refresh_token=refresh_token,
        id_token=id_token,
        email=_shown(email, 256),
        plan=_shown(auth.get("chatgpt_plan_type") or "unknown", 64),
        expires_at=_as_seconds(access.get("exp")),
        created_at=int(now),
    )


def token_claims(token: str) -> Json:
    """The payload of a JWT, unverified (only the provider can verify it); {} when it is none."""
    try:
        part = token.split(".")[1]
        return _as_object(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))))
    except (IndexError, ValueError, RecursionError):
        return {}


def _as_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _shown(value: Any, length: int) -> str:
    """Foreign text as terminals, logs and pages may show it."""
    return "".join(one for one in str(value) if one.isprintable())[:length]


def _as_seconds(value: Any) -> int:
    """A foreign number of seconds; 0 for anything that is no time before 2200."""
    return int(value) if type(value) in (int, float) and 0 <= value < _YEAR_2200_S else 0


def _expiry(value: Any) -> int:
    """Unix seconds out of seconds, milliseconds or an ISO date; 0 where nothing is said."""
    if value is None or isinstance(value, bool):
        return 0
    seconds = -1.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = datetime.fromisoformat(str(value)).timestamp()
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        seconds = float(value)
        seconds = seconds / 1000 if seconds > 1e11 else seconds
    if not 0 <= seconds < _YEAR_2200_S:
        raise _bad_file("bad_expiry", "Its expiry is no time between 1970 and 2200.")
    return int(seconds)


# --------------------------------------------------------------------------------------------------
# 8b. Codex's own files
#     The take-over of its config.toml, the sign-in in its auth.json, and the way back. The text is
#     edited, never written anew: `tomllib` proves that nothing but the intended keys has changed.
# --------------------------------------------------------------------------------------------------

CODEX_MODES = ("openai", "ai-zero-token")  # the provider under which Codex files conversations
_KeyPath = tuple[str, ...]


def _codex_keys(mode: str, base_url: str) -> dict[_KeyPath, Any]:
    """What Codex has to be told (codex-upstream.md 2.2). A table's last key first."""
    if mode == "openai":
        return {("model_provider",): mode, ("openai_base_url",): base_url}
    return {
        ("model_provider",): mode,
        ("model_providers", mode, "supports_websockets"): False,
        ("model_providers", mode, "wire_api"): "responses",
        ("model_providers", mode, "base_url"): base_url,
        ("model_providers", mode, "name"): "AI Zero Token",
    }


def parse_toml(text: str | bytes) -> Json:
    """Codex's config. Floats stay texts, for a `nan` equals nothing. Raises AztError."""
    try:
        text = text if isinstance(text, str) else text.decode()
        return tomllib.loads(text.removeprefix("\ufeff"), parse_float=str)
    except (ValueError, RecursionError) as error:
        message = f"Codex's config.toml is no valid TOML ({error}). Mend it, then try again."
        raise AztError(409, "config_unusable", message) from None


def _apart(text: str) -> tuple[dict[_KeyPath, Any], Json]:
    """A config as our keys and all the rest, without a table that held nothing else."""
    ours: dict[_KeyPath, Any] = {}
    rest = parse_toml(text)
    providers = _as_object(rest.get("model_providers"))
    own = _as_object(providers.get("ai-zero-token"))
    for path in (path for mode in CODEX_MODES for path in _codex_keys(mode, "")):
        table = own if path[:-1] else rest
        if path[-1] in table:
            ours[path] = table.pop(path[-1])
    if not own:
        providers.pop("ai-zero-token", None)
    if not providers:
        rest.pop("model_providers", None)
    return ours, rest


def _proved(
    texts: Iterable[str], ours: dict[_KeyPath, Any], rest: Json, wish: dict[_KeyPath, Any]
) -> str:
    """The first of these texts that says exactly this. Raises AztError that tells the wish."""
    for text in texts:
        with contextlib.suppress(AztError):
            if _apart(text) == (ours, rest):
                return text
    told = [f"{'.'.join(path)} = {json.dumps(wish[path], default=str)}" for path in sorted(wish)]
    message = (
        "Codex's config.toml is written in a way that azt cannot change without touching other "
        "settings, so nothing was written. Edit it: of model_provider, openai_base_url and "
        f"[model_providers.ai-zero-token] it has to say {'; '.join(told) or 'nothing'}"
    )
    raise AztError(409, "config_unusable", message)


def _edits(text: str, path: _KeyPath, value: Any, is_there: bool) -> Iterator[str]:
    """The text with one key set, in each way that may be right; `_proved` knows which one is."""
    said, line_end = json.dumps(value), "\r\n" if "\r\n" in text else "\n"
    if is_there:  # only the value: what stands around it stays
        key = rf"""\b{path[-1]}["']?[ \t]*=[ \t]*("[^"\\\n]*"|'[^'\n]*'|[\w.+-]+)"""
        for found in re.finditer(key, text):
            yield text[: found.start(1)] + said + text[found.end(1) :]
        return
    line, lines = f"{path[-1]} = {said}{line_end}", re.findall(r"[^\n]*\n|[^\n]+", text)
    if path[:-1]:
        header = r"""\s*\[\s*["']?model_providers["']?\s*\.\s*["']?ai-zero-token["']?\s*\]"""
        places = [(at + 1, line) for at, one in enumerate(lines) if re.match(header, one)]
        blank = line_end if text and lines[-1].strip() else ""
        places.append((len(lines), f"{blank}[{'.'.join(path[:-1])}]{line_end}{line}"))
    else:
        top = int(text.startswith("#:"))  # the schema for editors has to stay the first line
        at = next((at for at, one in enumerate(lines) if one.lstrip()[:1] == "["), len(lines))
        while at > top and re.fullmatch(r"\s*(#.*)?\s*", lines[at - 1]):
            at -= 1
        places = [(at, line), (top, line)]
    for at, new in places:
        above = "".join(lines[:at])
        above += "" if not above or above.endswith("\n") else line_end
        yield above + new + "".join(lines[at:])


def take_over(text: str, mode: str, base_url: str) -> str:
    """Codex's config with our keys in it; all else stays, byte for byte. Raises AztError."""
    mark = text[: text.startswith("\ufeff")]
    text = text.removeprefix(mark)
    ours, rest = _apart(text)
    wanted = _codex_keys(mode, base_url)
    for path, value in wanted.items():
        if ours.get(path) != value:
            edits = _edits(text, path, value, path in ours)
            ours[path] = value
            text = _proved(edits, ours, rest, ours | wanted)
    return mark + text


def put_back(text: str, after: str, before: str) -> str:
    """Codex's config where a take-over made `after` out of `before`, and the person edited on.

    What azt wrote becomes what stood there; a key that has another value by now is the person's.
    raises  AztError
    """
    (ours, rest), (written, _), (former, _) = map(_apart, (text, after, before))
    wanted = {path: value for path, value in ours.items() if written.get(path) != value}
    wanted |= {path: former[path] for path in former if written.get(path) == ours.get(path)}
    mark = text[: text.startswith("\ufeff")]
    now, was, old = (one.removeprefix("\ufeff").split("\n") for one in (text, after, before))
    plain = [[line.rstrip("\r") for line in lines] for lines in (now, was, old)]
    blocks = difflib.SequenceMatcher(None, plain[1], plain[0]).get_matching_blocks()
    place = {one.a + at: one.b + at for one in blocks for at in range(one.size)}
    changes = difflib.SequenceMatcher(None, plain[1], plain[2]).get_opcodes()

    def merged(brings_all: bool) -> str:
        lines = [[line] for line in now]
        for tag, start, end, *span in changes:
            at = [place[line] for line in range(start, end) if line in place]
            if tag != "equal" and at:
                is_whole = brings_all or len(at) == end - start
                for line in at:
                    lines[line] = []
                lines[at[0]] = old[slice(*span)] if is_whole else []
        return mark + "\n".join(itertools.chain(*lines)).removesuffix("\r")

    # A change of which the person has rewritten a part may take the old lines back, or not.
    return _proved(map(merged, (True, False)), wanted, rest, wanted)


def codex_route(config: Json) -> tuple[str, str]:
    """(provider, base URL) by which this config makes Codex send its requests; "" by default."""
    provider = str(config.get("model_provider") or "openai")
    table = _as_object(_as_object(config.get("model_providers")).get(provider))
    url = config.get("openai_base_url") if provider == "openai" else table.get("base_url")
    return provider, str(url or "")


def codex_auth(old: Json, account: Account, now: float) -> Json:
    """Codex's auth.json with this sign-in (codex-upstream.md 2.1); what else it says stays."""
    kept = _as_object(old.get("tokens"))
    kept = kept if kept.get("account_id") == account.account_id else {}
    names = ("id_token", "access_token", "refresh_token", "account_id")
    tokens = {**kept, **{name: getattr(account, name) for name in names}}
    at = datetime.fromtimestamp(account.refreshed_at or now, UTC).isoformat()
    sign_in = {"auth_mode": "chatgpt", "tokens": tokens, "last_refresh": at.replace("+00:00", "Z")}
    return {"OPENAI_API_KEY": None, **old, **sign_in}


def _auth_of(raw: bytes | None) -> Json:
    auth = parse_event(raw) if raw else {}
    if auth is None:
        message = "Codex's auth.json is no JSON object. Move it away, then try again."
        raise AztError(409, "auth_unusable", message)
    return auth


@blocking
def read_codex_sign_in(path: Path) -> Account | None:
    """The account in Codex's auth.json; None where it is missing, foreign or holds no tokens."""
    with contextlib.suppress(AztError):
        for _, found in read_accounts([("", find_foreign(path))], time.time()):
            return found if isinstance(found, Account) else None
    return None


def _diff(old: str, new: str) -> list[Json]:
    """The lines that differ and two around them, without secrets (console.md 6.5)."""
    lines = [*difflib.unified_diff(old.splitlines(), new.splitlines(), n=2, lineterm="")][2:]
    return [{"op": line[0], "text": mask(line[1:])} for line in lines if line[0] != "@"]


class CodexFiles:
    """Codex's files, and what azt remembers of its changes to them in `codex.json`.

    Every method runs in the one thread for files: nothing comes between two steps. Their order
    makes a crash harmless: a copy of the file, then how to undo the change, then the file itself.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def _saved(self) -> Json:
        return read_json(self._paths.codex, 1) or {"version": 1}

    @blocking
    def look(self, own_url: str) -> Json:
        """What is so, as the files themselves tell it (console.md 6.5)."""
        paths, problem = self._paths, None
        saved: Json = {}
        config, auth, raw, refreshed_at = saved, saved, b"", 0
        try:
            saved, raw = self._saved(), find_foreign(paths.codex_config) or b""
            config, auth = parse_toml(raw), _auth_of(find_foreign(paths.codex_auth))
        except AztError as error:
            problem = error.message
        with contextlib.suppress(BadRequest):
            refreshed_at = _expiry(auth.get("last_refresh"))
        taken, account = _as_object(saved.get("takeover")), read_codex_sign_in(paths.codex_auth)
        provider, url = codex_route(config)
        written = taken.get("written") or [""]
        is_on = bool(url) and url in (own_url, codex_route(parse_toml(written[-1]))[1])
        mode = "chatgpt" if account else "apikey" if auth.get("OPENAI_API_KEY") else None
        return {
            "home": str(paths.codex_home),
            "installed": paths.codex_home.is_dir(),
            "problem": problem,
            "takeover": {
                "on": is_on,
                "historyMode": provider if is_on else None,
                "provider": provider,
                "baseUrl": url or None,
                "gatewayUrl": own_url,
                "matchesGateway": url == own_url,
                "path": str(paths.codex_config),
                "since": taken.get("since") if is_on else None,
                "editedSince": is_on and bool(taken) and raw.decode() not in written,
            },
            "auth": {
                "path": str(paths.codex_auth),
                "exists": paths.codex_auth.exists(),
                "mode": auth.get("auth_mode") or mode,
                "accountId": account.id if account else None,
                "email": account.email if account else None,
                "lastRefresh": refreshed_at * 1000 or None,
                "applied": account is not None and saved.get("applied") == account.id,
            },
        }

    @blocking
    def kept(self) -> Json:
        """The backups, newest first (an empty one: there was no file), and the other history."""
        found = []
        for path in self._paths.codex_backups.glob("*-*-*"):
            file, at, reason = path.name.rsplit("-", 2)
            account = read_codex_sign_in(path) if file == "auth.json" else None
            item = {"id": path.name, "file": file, "at": int(at), "reason": reason}
            item |= {"email": account.email if account else None, "size": path.stat().st_size}
            found.append(item)
        backups = sorted(found, key=lambda one: str(one["at"]), reverse=True)
        return {"backups": backups, "history": self._history()}

    def _history(self, moves: bool = False) -> Json:
        """Conversations under `ai-zero-token`; `moves` files them under `openai` again."""
        which, count, note = "WHERE model_provider = 'ai-zero-token'", 0, None
        for path in sorted(self._paths.codex_home.glob("state_*.sqlite")):
            try:
                found = in_database(path, f"SELECT count(*) FROM threads {which}")
                if found and moves:
                    copy = keep_copy(self._paths.codex_backups, path.name, "history", b"")
                    in_database(path, f"UPDATE threads SET model_provider = 'openai' {which}", copy)
                count += found
            except AztError as error:
                if moves:
                    raise
                note = error.message
        return {"toMigrate": count, "note": note}

    def _change(
        self, path: Path, old: bytes | None, new: bytes | None, reason: str, saved: Json, base: str
    ) -> Json:
        """Copy, memory, file. `base` is that of the dry run, or "any"; "" makes a dry run."""
        known = "sha256:" + hashlib.sha256(old or b"").hexdigest()
        changed = old != new
        if base not in ("", "any", known):
            message = f"{path} was changed since you looked at it. Look again, then confirm."
            raise AztError(409, "file_changed", message)
        told: Json = {"dryRun": not base, "path": str(path), "base": known}
        if base and changed:
            copy = keep_copy(self._paths.codex_backups, path.name, reason, old or b"")
            told |= {"backup": {"id": copy.name, "file": path.name}}
            write_json(self._paths.codex, saved)
            replace_foreign(path, new, old)
        return told | {"changed": changed, "willBackup": changed}

    @blocking
    @disk_errors()
    def route(self, mode: str, own_url: str, moves: bool, base: str) -> Json:
        """Take over, or release ("" for `mode`). `base` as in `_change`. Raises AztError."""
        path, saved = self._paths.codex_config, self._saved()
        taken, raw = saved.get("takeover"), find_foreign(path)
        config, text = parse_toml(raw or b""), (raw or b"").decode()
        before = None if raw is None else text
        if taken and text in taken["written"]:
            before = taken["before"]
        elif taken and raw is not None:
            try:
                before = put_back(text, taken["written"][-1], taken["before"] or "")
            except AztError:
                if not mode:
                    raise
            before = None if taken["before"] is None and not (before or "").strip() else before
        elif not mode and codex_route(config)[1] == own_url:
            message = f"azt does not know what {path} said before it sent Codex here: edit it."
            raise AztError(409, "not_ours", message)
        after = take_over(before or "", mode, own_url) if mode else before
        if mode:
            made = taken["madeFolder"] if taken else not path.parent.exists()
            new = {"since": time.time_ns() // 1_000_000, "before": before, "madeFolder": made}
            saved = saved | {"takeover": new | {"written": [text, after]}}
        if moves and base:
            self._history(moves=True)
        history = self._history()  # told after the change, which it must not fail then
        wanted = None if after is None else after.encode()
        done = self._change(path, raw, wanted, "takeover" if mode else "release", saved, base)
        if base and taken and not mode:
            if taken["madeFolder"]:
                with contextlib.suppress(OSError):  # Codex has put something there meanwhile
                    path.parent.rmdir()
            with contextlib.suppress(AztError):  # it is released: an old memory does no harm
                write_json(self._paths.codex, saved | {"takeover": None})
        texts = text.splitlines(), (after or "").splitlines()
        lines = [*difflib.unified_diff(*texts, n=2, lineterm="")][2:]
        diff = [{"op": line[0], "text": mask(line[1:])} for line in lines if line[0] != "@"]
        further = {"history": history, "installed": self._paths.codex_home.is_dir()}
        return done | {"diff": diff, **further}

    @blocking
    @disk_errors()
    def apply(self, account: Account, base: str) -> Json:
        """Sign Codex in with this account. `base` as in `_change`. Raises AztError."""
        path, raw = self._paths.codex_auth, find_foreign(self._paths.codex_auth)
        if account.rejected or not token_claims(account.id_token):
            why = "its sign-in is over" if account.rejected else "Codex needs an id token"
            message = f"{account.name} cannot be used in Codex: {why}. Run `azt login`."
            raise AztError(409, "account_unusable", message)
        config = parse_toml(find_foreign(self._paths.codex_config) or b"")
        store = config.get("cli_auth_credentials_store", "file")
        if store != "file" and (store != "auto" or raw is None):
            message = f"Codex keeps its sign-in in the {store}: set cli_auth_credentials_store"
            raise AztError(409, "not_supported", f'{message} to "file" in its config.toml first.')
        old, was = _auth_of(raw), read_codex_sign_in(path)
        new: bytes | None = json.dumps(codex_auth(old, account, time.time()), indent=2).encode()
        if was and was.refresh_token == account.refresh_token:
            new = raw  # it is there: another copy would stand before the one to go back to
        saved = self._saved() | {"applied": account.id}
        told = {"from": {"email": was.email} if was else None, "to": {"email": account.email}}
        done = self._change(path, raw, new, "apply", saved, base)
        if base and not done["changed"]:
            write_json(self._paths.codex, saved)
        return done | told

    @blocking
    def follow(self, account: Account, refresh_token_used: str) -> None:
        """Give Codex the tokens that azt has just got, where both share this sign-in.

        Only while the account is applied and the file still holds the token that is used up: what
        Codex or the person has put there since is theirs.
        """
        path = self._paths.codex_auth
        raw = find_foreign(path) if self._saved().get("applied") == account.id else None
        old = _auth_of(raw)
        if _as_object(old.get("tokens")).get("refresh_token") == refresh_token_used:
            new = json.dumps(codex_auth(old, account, time.time()), indent=2).encode()
            replace_foreign(path, new, raw)

    @blocking
    def restore(self, name: str, deletes: bool = False, base: str = "any") -> Json:
        """Put a backup back: by its id, or the newest of a file. What is there is kept first, and
        told beside what would come (config.toml: the lines). `base` as in `_change`."""
        paths = self._paths
        files = {path.name: path for path in (paths.codex_auth, paths.codex_config)}
        names = [one["id"] for one in self.kept()["backups"]]
        found = next((one for one in names if name in (one, one.rsplit("-", 2)[0])), "")
        path, copy = files.get(found.rsplit("-", 2)[0]), paths.codex_backups / found
        if not found or (path is None and not deletes):
            message = f"There is no backup {name!r} to put back. `azt codex status` lists them."
            raise AztError(404, "backup_not_found", message)
        raw = find_foreign(copy)
        if path is None or deletes:
            replace_foreign(copy, None, raw)
            return {"id": found}
        saved, now = self._saved(), find_foreign(path)
        if path == paths.codex_config:
            told: Json = {
                "diff": _diff(*(text.decode(errors="replace") for text in (now or b"", raw or b"")))
            }
        else:
            saved |= {"applied": None}
            signed_in = zip(("from", "to"), map(read_codex_sign_in, (path, copy)), strict=True)
            told = {side: {"email": who.email} if who else None for side, who in signed_in}
        done = self._change(path, now, raw or None, "restore", saved, base)
        return done | {"restored": path.name, "id": found} | told


# ==================================================================================================
# 9. OAuth
#    Signing in and the token endpoint. Knows no store: whoever signed in is handed to a callback.
# ==================================================================================================

# What the token endpoint says when a refresh token is dead for good (codex-upstream.md 1.5).
REFRESH_DEAD = set(
    "account_deactivated account_deleted account_session_expired account_suspended "
    "app_session_terminated invalid_grant refresh_token_expired refresh_token_invalidated "
    "refresh_token_reused token_expired token_invalidated token_revoked".split()
)


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
        text = f"The provider no longer accepts this sign-in ({reason})."
        super().__init__(401, "account_auth_expired", text, type="authentication_error")
        self.reason = reason


@blocking
def ask_issuer(
    pool: ConnectionPool, url: str, body: Json, wire: Wire, as_form: bool = False
) -> tuple[int, Json]:
    """One POST to the issuer, never sent twice: (status, the JSON answer or {}).

    raises  UpstreamError when nobody answered
    """
    kind = "application/x-www-form-urlencoded" if as_form else "application/json"
    raw = urllib.parse.urlencode(body).encode() if as_form else encode_json(body)
    headers = {"content-type": kind, "accept": "application/json"} | OWN_HEADERS
    call = Call("POST", url, headers, raw, 30.0, once=True)
    answer = open_response(pool, call, wire)
    return answer.status, parse_event(answer.body) or {}


@blocking
def refresh_tokens(
    pool: ConnectionPool, auth_base_url: str, refresh_token: str, wire: Wire
) -> Tokens:
    """One round trip. The refresh token is single use: never two calls with the same one at once.

    raises  SignInRejected when it is dead, UpstreamError for everything that may pass
    """
    secret = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    body = {"client_id": OAUTH_CLIENT_ID, **secret}
    status, value = ask_issuer(pool, f"{auth_base_url}/oauth/token", body, wire)
    tokens = _tokens(value)
    if status == 200 and (tokens.access_token or tokens.refresh_token):
        return tokens
    code, _ = _complaint(value)
    if code in REFRESH_DEAD or (status == 401 and code):
        raise SignInRejected(code)
    text = f"The sign-in could not be renewed: the provider answered {status}. Try again."
    raise UpstreamError(502, "upstream_error", text, fault="transient")


def _complaint(value: Json) -> tuple[str, str]:
    """(code in lower case, sentence) of an error of the issuer, in both of its shapes."""
    error = value.get("error")
    inner = error if isinstance(error, dict) else {"code": error or value.get("code")}
    text = value.get("error_description") or inner.get("message") or ""
    return _shown(inner.get("code") or "", 64).lower(), _shown(text, 300)


def _tokens(value: Json) -> Tokens:
    secrets_found: dict[str, str | None] = {}
    for name in ("access_token", "refresh_token", "id_token"):
        one = value.get(name)
        secrets_found[name] = one if isinstance(one, str) and _SECRET_TEXT.fullmatch(one) else None
    return Tokens(**secrets_found, expires_in_s=_as_seconds(value.get("expires_in")) or None)


# -- Signing in: codex-upstream.md 1.2 to 1.4 and 1.8, trust.md 1.8 --------------------------------

_AUTHORIZE = (
    "response_type=code&code_challenge_method=S256&scope=openid+profile+email+offline_access"
    "&id_token_add_organizations=true&codex_cli_simplified_flow=true&originator=azt"
)


@dataclass(eq=False, repr=False, slots=True)
class Login:
    """One sign-in. What comes with a wrong state changes nothing; a code needs our verifier.

    waiting --code--> exchanging --tokens--> done
       +-- refused --> failed <--+-- refused, unreachable, somebody else
       +-- too late --> expired, given up --> cancelled
    """

    wanted_id: str | None  # the account that is to sign in again
    code: asyncio.Future[str]  # brought by the callback, or pasted
    id: str = field(default_factory=lambda: "lgn_" + secrets.token_hex(6))
    state: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(64))
    redirect_uri: str = ""
    port: int = 0  # where its browser comes back to; 0 for a device
    opened: bool = False  # its link was followed: the port is needed
    shown: Json = field(default_factory=dict)  # what the person needs, as the API says it
    status: Literal["waiting", "exchanging", "done", "failed", "expired", "cancelled"] = "waiting"
    error: AztError | None = None
    account: Account | None = None  # who came
    created: bool = False
    task: asyncio.Task[None] | None = None
    on_change: Callable[[], None] = lambda: None


def authorize_url(auth_base_url: str, login: Login) -> str:
    challenge = base64.urlsafe_b64encode(hashlib.sha256(login.verifier.encode()).digest())
    own = {"client_id": OAUTH_CLIENT_ID, "redirect_uri": login.redirect_uri, "state": login.state}
    query = urllib.parse.urlencode(own | {"code_challenge": challenge.rstrip(b"=")})
    return f"{auth_base_url}/oauth/authorize?{_AUTHORIZE}&{query}"


def read_callback(text: str) -> dict[str, str]:
    """The callback's address, `code=..&state=..`, `code#state` or a bare code -> parameters."""
    text = "".join(text.split()).strip("\"'<>")  # terminals and mails break long lines
    if re.search(r"(?:^|[?&#])(?:code|error|state)=", text):
        return dict(urllib.parse.parse_qsl(text.rpartition("?")[2].partition("#")[0]))
    code, mark, state = text.partition("#")
    return {"code": code} | ({"state": state} if mark else {})


def finish_login(logins: Iterable[Login], said: Mapping[str, str], pasted: bool = False) -> Login:
    """Give what a callback said, or a person pasted, to the one of `logins` that waits for it.

    raises  AztError 400 or 410, and then everything is as before
    """
    is_bare = pasted and set(said) == {"code"}  # the verifier alone decides whether the code fits
    state = said.get("state", "").encode("utf-8", "replace")
    waiting = [one for one in logins if one.port and not one.code.done()]
    found = [one for one in waiting if is_bare or hmac.compare_digest(one.state.encode(), state)]
    if not found:
        text = "This does not belong to a sign-in that is waiting. Start again from its link."
        raise AztError(*((400, "state_mismatch") if waiting else (410, "flow_expired")), text)
    error, told = _complaint({**said, "code": ""})
    if "missing_codex_entitlement" in told.lower():
        told = "This workspace has no access to Codex: ask its administrator."
    if error:
        found[0].code.set_exception(AztError(403, "denied", told or f"It was refused: {error}."))
    elif _SECRET_TEXT.fullmatch(said.get("code", "")):
        found[0].code.set_result(said["code"])
    else:
        text = "There is no code in it. Paste the whole address that the browser shows."
        raise AztError(400, "bad_callback_url", text)
    return found[0]


def _is_free(port: int) -> bool:
    """Whether no program listens there, at either loopback address."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # any other: this machine lacks that family
                return False
    return True


@dataclass(eq=False, slots=True)
class Logins:
    """The sign-ins under way and those that ended lately, the oldest first. Lives on the loop."""

    _pool: ConnectionPool
    _calls: WorkerPool
    _base_url: str
    _add: Callable[[Account], Awaitable[bool]]  # True when the account is a new one
    flows: dict[str, Login] = field(default_factory=dict)
    # Callback port -> what closes it; room 16 listens there once a link is followed.
    ports: dict[int, Callable[[float], Coroutine[Any, Any, None]]] = field(default_factory=dict)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    async def _ask(self, path: str, body: Json, as_form: bool = False) -> tuple[int, Json]:
        call = (self._pool, self._base_url + path, body, Wire(), as_form)
        return await in_thread(self._calls, ask_issuer, *call)

    async def start(self, on_device: bool, wanted_id: str | None) -> Login:
        """A sign-in that waits. Binds nothing. Raises AztError when the issuer gives no code."""
        login = Login(wanted_id, asyncio.get_running_loop().create_future())
        code: Awaitable[str] = login.code
        life_s, interval_s = LOGIN_LIFE_S, DEVICE_INTERVAL_S
        if on_device:
            client = {"client_id": OAUTH_CLIENT_ID}
            status, value = await self._ask("/api/accounts/deviceauth/usercode", client)
            user_code = _shown(value.get("user_code") or value.get("usercode") or "", 64)
            if status != 200 or not user_code:
                text = f"The provider gave no code for a device ({status}). Use `azt login`, or "
                text += "allow device codes in the security settings of ChatGPT."
                raise AztError(502, "device_not_enabled", text)
            life_s = DEVICE_LIFE_S
            with contextlib.suppress(TypeError, ValueError):  # foreign numbers, written as text
                interval_s = min(60.0, max(1.0, float(value.get("interval") or interval_s)))
                life_s = min(life_s, max(1.0, float(value.get("expires_in") or life_s)))
            login.redirect_uri = f"{self._base_url}/deviceauth/callback"
            asked = {"device_auth_id": value.get("device_auth_id"), "user_code": user_code}
            code = self._poll(login, asked, interval_s)
            page = {"verificationUrl": f"{self._base_url}/codex/device", "userCode": user_code}
            login.shown = {**page, "intervalMs": round(interval_s * 1000)}
        else:
            free = [port for port in CALLBACK_PORTS if port in self.ports or _is_free(port)]
            login.port = (free or CALLBACK_PORTS)[0]
            login.redirect_uri = f"http://localhost:{login.port}/auth/callback"
            uri = {"redirectUri": login.redirect_uri, "portFree": bool(free)}
            login.shown = {"authorizeUrl": authorize_url(self._base_url, login), **uri}
        login.shown["expiresAt"] = round((time.time() + life_s) * 1000)
        login.task = asyncio.create_task(self._run(login, code, life_s))
        self.flows[login.id] = login
        if len(self.flows) > LOGINS_MAX:
            await self.give_up(self.flows.pop(next(iter(self.flows))))
        return login

    async def _poll(self, login: Login, asked: Json, interval_s: float) -> str:
        """Ask whether the person has entered the code, as often as the issuer wants it."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                status, value = await self._ask("/api/accounts/deviceauth/token", asked)
            except AztError:
                continue  # the network may be back before the time is over
            reason, told = _complaint(value)
            if status == 200:
                login.verifier = str(value.get("code_verifier"))
                return str(value.get("authorization_code"))
            if status == 429 or reason == "slow_down":
                interval_s += 5.0  # RFC 8628 3.5
            elif reason == "expired_token":
                raise TimeoutError
            # 403 and 404 are this issuer's "not yet"; what is broken at its side may pass.
            elif reason == "access_denied" or (status not in (403, 404) and status < 500):
                raise AztError(403, "denied", told or f"The code was refused ({status}).")

    async def _run(self, login: Login, code: Awaitable[str], life_s: float) -> None:
        """In a task of its own: a browser that leaves must not take a single-use code with it."""
        try:
            async with asyncio.timeout(life_s):
                found = await code
            login.status = "exchanging"
            login.on_change()
            login.account = account = await self._exchange(login, found)
            if login.wanted_id not in (None, account.id):
                text = f"{account.email or account.id} signed in: another account was asked for."
                raise AztError(409, "account_mismatch", text)
            login.created, login.status = await self._add(account), "done"
        except (TimeoutError, asyncio.CancelledError) as error:
            login.status = "expired" if isinstance(error, TimeoutError) else "cancelled"
        except AztError as error:
            code_word = "network" if isinstance(error, UpstreamError) else error.code
            login.status, login.error = "failed", AztError(502, code_word, error.message)
        except Exception:  # the one catch-all around sign-ins
            log.exception("the sign-in %s failed", login.id)
            text = "azt failed on this sign-in. Its log says why."
            login.status, login.error = "failed", AztError(500, "internal_error", text)
        login.state = login.verifier = ""
        self.close_unneeded()
        login.on_change()
        log.info("sign-in %s: %s", login.id, login.error.code if login.error else login.status)

    async def _exchange(self, login: Login, code: str) -> Account:
        form = {"grant_type": "authorization_code", "client_id": OAUTH_CLIENT_ID, "code": code}
        form |= {"redirect_uri": login.redirect_uri, "code_verifier": login.verifier}
        status, value = await self._ask("/oauth/token", form, as_form=True)
        found, now = _tokens(value), int(time.time())
        texts = (found.access_token or "", found.refresh_token or "", found.id_token or "")
        account = account_from_tokens(*texts, now)
        if status != 200 or not all(texts[:2]) or not _ACCOUNT_ID.fullmatch(account.account_id):
            reason, told = _complaint(value)
            text = f"The provider did not accept the sign-in ({told or reason or status})."
            raise AztError(502, "exchange_failed", f"{text} Try again.")
        account.expires_at = account.expires_at or now + (found.expires_in_s or -now)  # 0: unknown
        account.refreshed_at = now
        return account

    async def give_up(self, login: Login) -> None:
        """End it unless its code has come: that is single use, so good use is made of it."""
        if login.task is not None and login.status == "waiting":
            login.task.cancel()
            await asyncio.wait({login.task})

    def close_unneeded(self) -> None:
        """Stop listening where no sign-in waits for its browser."""
        under_way = [one for one in self.flows.values() if one.status in ("waiting", "exchanging")]
        for port in self.ports.keys() - {one.port for one in under_way if one.opened}:
            task = asyncio.create_task(self.ports.pop(port)(LINGER_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def revoke(self, refresh_token: str) -> bool:
        """Tell the issuer that a sign-in is over: best effort; False when it did not take it."""
        body = {"token": refresh_token, "token_type_hint": "refresh_token"}
        with contextlib.suppress(AztError):
            status, _ = await self._ask("/oauth/revoke", body | {"client_id": OAUTH_CLIENT_ID})
            return status == 200
        return False


# ==================================================================================================
# 10. Upstream
#     Speaks to the Codex backend for one given account. Never chooses an account.
# ==================================================================================================

RETRY_AFTER_MAX_S = 7 * 24 * 3600

_Outcome = tuple[int, str, Fault]
"""Our status, our code, and what rotation decides by."""

# What an error of the backend is to us, by its code or type, else by its status.
# Sources: codex-upstream.md 2.8, 4.10, 5.2, 5.3; openai-api.md 7.2.
_SIGNS: dict[_Outcome, str] = {
    (400, "content_policy_violation", "request"): "bio_policy content_policy_violation "
    "cyber_policy invalid_prompt misalignment_policy_violation",
    (400, "context_length_exceeded", "request"): "context_length_exceeded",
    (400, "moderation_blocked", "request"): "moderation_blocked",
    (401, "account_auth_expired", "account"): "account_deactivated token_invalidated token_revoked",
    (401, "account_auth_expired", "token"): "401 token_expired",
    (403, "account_unusable", "account"): "deactivated_workspace workspace_access_denied",
    (403, "upstream_forbidden", "account"): "402 403",
    (403, "usage_not_included", "account"): "usage_not_included",
    (404, "model_not_found", "request"): "model_not_found",
    (413, "request_too_large", "request"): "413",
    (429, "rate_limit_exceeded", "account"): "429 rate_limit_error rate_limit_exceeded",
    (429, "usage_limit_reached", "account"): "insufficient_quota usage_limit_reached",
    (503, "overloaded", "transient"): "503 529 overloaded_error server_is_overloaded slow_down",
}
_OUTCOMES = {sign: outcome for outcome, signs in _SIGNS.items() for sign in signs.split()}

_NOT_FOR_CHATGPT = "not supported when using Codex with a ChatGPT account"
_WAIT_IN_TEXT = re.compile(r"try again in (\d+(?:\.\d+)?)\s*(ms|mi?|s)", re.IGNORECASE)
_UNIT_S = {"m": 60, "mi": 60, "ms": 0.001, "s": 1}


def upstream_error(
    status: int, headers: Mapping[str, str], body: bytes, now: float
) -> UpstreamError:
    """A backend answer that is no event stream -> the error for the client.

    headers  lower-case names
    body     `{"error": {...}}`, `{"detail": "..."}` or `{"detail": {"code"}}`; HTML is dropped
    """
    inner, known_as = _error_object(body), upstream_id(headers)
    if 200 <= status < 400:
        message = f"The upstream answered {status} without an event stream."
        return UpstreamError(502, "upstream_error", message, upstream_id=known_as)
    if status == 403 and not any(inner.values()):
        reason = "a browser check" if "cf-mitigated" in headers else "an HTML page"
        message = (
            f"The upstream refused the connection with {reason}. This is about the network or the "
            "region, not about your account: try another network or set a proxy."
        )
        return UpstreamError(403, "upstream_forbidden", message, upstream_id=known_as)
    quota = quota_from_headers(headers, now)
    full = [one["resets_at"] for one in quota.get("windows", ()) if one["used"] >= 100]
    if status == 429 and full and "resets_in_seconds" not in inner:
        inner = {"resets_at": max(full), **inner}
    error = _classify(status, inner, _retry_after(headers.get("retry-after"), now), now)
    error.quota, error.upstream_id = quota, known_as
    return error


def upstream_id(headers: Mapping[str, str]) -> str | None:
    """How the provider names this call: the order is Codex's own."""
    names = ("x-request-id", "x-oai-request-id", "cf-ray")
    return next((_shown(headers[name], 80) for name in names if headers.get(name)), None)


def event_error(event: Json, now: float) -> UpstreamError:
    """A `response.failed` or `error` event, flat or nested -> the error for the client."""
    response = event.get("response")
    inner = response.get("error") if isinstance(response, dict) else event.get("error")
    if not isinstance(inner, dict):
        text = inner if isinstance(inner, str) else event.get("message")
        inner = {"code": event.get("code"), "message": text, "param": event.get("param")}
    status = event.get("status", event.get("status_code"))
    error = _classify(status if isinstance(status, int) else 0, inner, None, now)
    error.quota = quota_from_headers(_as_object(event.get("headers")), now)
    return error


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
    kind = next((one for one in kinds if one in _OUTCOMES), kinds[0] if kinds else "")
    message = str(inner.get("message") or inner.get("detail") or "")
    param = inner["param"] if isinstance(inner.get("param"), str) else None
    if _NOT_FOR_CHATGPT in message or (status == 404 and "model" in message):
        kind = "model_not_found"
    # A stream has no status: faults of the input name themselves, the rest is the server's.
    is_named = status == 0 and ("image" in kind or kind.startswith("invalid_"))
    outcome = _OUTCOMES.get(str(status), (502, "upstream_error", "transient"))
    if is_named or status in (400, 409, 422):
        outcome = 400, kind or "invalid_request_error", "request"
    own_status, code, fault = _OUTCOMES.get(kind, outcome)
    if own_status == 429:
        return limit_error(code, message, inner, retry_after, now)
    if code == "context_length_exceeded":
        param = param or "input"
        if not re.search(r"context (length|window)", message):
            # Agents look for these words to start their own compaction.
            told = "The input exceeds the context window of this model (context length exceeded)."
            message = f"{message} {told}".strip()
    if code == "model_not_found":
        param = "model"
        message = message or "The upstream does not know this model."
        message += " `azt models` lists what this account offers."
    message = message[:2048] or f"The upstream answered {status or 'with an error'}."
    headers = {"retry-after": str(min(retry_after or 5, 60))} if own_status == 503 else {}
    kind = "authentication_error" if own_status == 401 else ""
    return UpstreamError(
        own_status, code, message, fault=fault, type=kind or None, param=param, headers=headers
    )


def limit_error(
    code: str, message: str, inner: Json, retry_after: int | None, now: float
) -> UpstreamError:
    """A 429 with the wait in every form clients read. A long one forbids SDKs to sleep it out."""
    resets_at = _seconds(inner.get("resets_at"))
    said = _WAIT_IN_TEXT.search(message)
    known = (
        resets_at - now if resets_at else None,
        _seconds(inner.get("resets_in_seconds")),
        retry_after,
        float(said[1]) * _UNIT_S[said[2].lower()] if said else None,
        300 if code == "usage_limit_reached" else 5,
    )
    wait_s = next(one for one in known if one is not None)
    wait = max(1, min(math.ceil(wait_s), RETRY_AFTER_MAX_S))
    headers = {"retry-after": str(wait), **({"x-should-retry": "false"} if wait > 60 else {})}
    extra: Json = {"resets_at": int(now) + wait, "resets_in_seconds": wait}
    if isinstance(inner.get("plan_type"), str):
        extra["plan_type"] = inner["plan_type"]
    kind, message = "rate_limit_error", message or f"Too many requests: try again in {wait} s."
    if code == "usage_limit_reached":
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + wait))
        kind, message = code, f"{message.rstrip('.')}. It resets at {when}."
    return UpstreamError(
        429, code, message, fault="account", type=kind, headers=headers, extra=extra
    )


def _seconds(value: Any) -> float | None:
    """A number that can be a time or a wait, else None."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e12 else None


def _retry_after(value: str | None, now: float) -> int | None:
    """Seconds out of a Retry-After header: a number or an HTTP date."""
    try:
        if re.fullmatch(r"[-+]?\d+(\.\d*)?", value or ""):
            seconds = float(value or "")
        else:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - now
    except (ValueError, OverflowError):
        return None
    return max(0, min(math.ceil(seconds), RETRY_AFTER_MAX_S)) if math.isfinite(seconds) else None


class Sink(Protocol):
    """Where a `Relay` writes: the server's side of one response (room 15).

    write   body bytes for the client; the framing is the sink's
    finish  the body is complete
    cut     the body ends unfinished: the client must see a broken transfer, not a short success
    """

    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def cut(self) -> None: ...


class Translator(Protocol):
    """One upstream event stream -> one answer (room 11). All of it pure.

    done     a terminal event was seen; what follows is ignored
    stopped  the rest is not wanted (a stop string was hit): the upstream call can be ended
    failure  why the answer failed, once it did
    usage    the `usage` of the terminal event as upstream sent it, when it did
    limits   the newest `codex.rate_limits` event
    feed     the data of one upstream event -> bytes for a streaming client
    absorb   the same for a client that waits for the whole answer, `result`: keeps it, returns b""
    fail     the stream broke: the bytes that tell a streaming client so
    """

    done: bool
    stopped: bool
    failure: AztError | None
    usage: Json | None
    limits: Json | None

    def feed(self, data: bytes) -> bytes: ...
    def absorb(self, data: bytes) -> bytes: ...
    def fail(self, error: AztError) -> bytes: ...
    def result(self) -> Json: ...


IMAGE_MODEL = "gpt-image-2"
_IMAGE_ENTRY = {"slug": IMAGE_MODEL, "display_name": "GPT Image 2"}

# What stands in when neither azt nor Codex has fetched a list: (id, name, reasoning efforts). The
# backend decides what an account may use; `azt models --refresh` asks it.
_BUILT_IN_MODELS = (
    ("gpt-5.4", "GPT-5.4", "low medium high xhigh"),
    ("gpt-5.5", "GPT-5.5", "low medium high xhigh"),
    ("gpt-6-luna", "GPT-6 Luna", "low medium high xhigh max"),
    ("gpt-6-sol", "GPT-6 Sol", "low medium high xhigh max"),
    ("gpt-6.1-sol", "GPT-6.1 Sol", "low medium high xhigh max"),
)


@dataclass(frozen=True)
class Catalogue:
    """The models as the backend describes them (codex-upstream.md 6.2), and their source."""

    entries: tuple[Json, ...]
    source: Literal["azt", "codex", "built-in"]
    etag: str = ""
    fetched_at: int = 0

    @classmethod
    def read(cls, own: Json | None, codex: Json | None) -> Catalogue:
        """azt's own cache, else Codex's, else the built-in list. A broken one is passed over."""
        for cache in (own or {}, codex or {}):
            models, fetched_at = cache.get("models"), cache.get("fetched_at")
            if isinstance(models, list) and (entries := usable_models(models)):
                fetched_at = fetched_at if isinstance(fetched_at, int) else 0
                source: Literal["azt", "codex"] = "azt" if cache is own else "codex"
                return cls(entries, source, str(cache.get("etag") or ""), fetched_at)
        built_in = (
            {
                "slug": slug,
                "display_name": name,
                "supported_reasoning_levels": [{"effort": one} for one in efforts.split()],
            }
            for slug, name, efforts in _BUILT_IN_MODELS
        )
        return cls(tuple(built_in), "built-in")

    def to_json(self) -> Json:
        kept = {"etag": self.etag, "fetched_at": self.fetched_at, "models": list(self.entries)}
        return {"version": 1, **kept}

    @functools.cached_property
    def listed(self) -> list[Json]:
        """The entries a person may pick, in the backend's order."""

        def rank(entry: Json) -> int:
            priority = entry.get("priority")
            return priority if isinstance(priority, int) else 1_000

        shown = (one for one in self.entries if one.get("visibility", "list") == "list")
        return sorted(shown, key=rank)

    @functools.cached_property
    def efforts(self) -> dict[str, tuple[str, ...]]:
        """Model id -> the reasoning efforts it supports."""
        table: dict[str, tuple[str, ...]] = {}
        for entry in self.entries:
            levels = entry.get("supported_reasoning_levels")
            levels = levels if isinstance(levels, list) else []
            named = (one.get("effort") for one in levels if isinstance(one, dict))
            table[entry["slug"]] = tuple(one for one in named if isinstance(one, str))
        return table

    def default(self, wanted: str) -> str:
        """The configured model when it is listed, else the first listed one."""
        names = [entry["slug"] for entry in self.listed or self.entries]
        return wanted if wanted in names else names[0]

    def openai_model(self, entry: Json) -> Json:
        """One entry of `/v1/models`: the four official keys, then what pickers look for."""
        model = {
            "id": entry["slug"],
            "object": "model",
            "created": 1686935002,
            "owned_by": "openai",
        }
        extras = {"name": entry.get("display_name"), "description": entry.get("description")}
        for name in ("context_length", "context_window", "max_model_len"):
            extras[name] = entry.get("context_window")
        extras["input_modalities"] = entry.get("input_modalities")
        return {**model, **{name: value for name, value in extras.items() if value}}

    def openai_models(self, only: Sequence[str] | None = None) -> Json:
        every = [*(self.listed or self.entries), _IMAGE_ENTRY]
        shown = [entry for entry in every if not only or entry["slug"] in only]
        return {"object": "list", "data": list(map(self.openai_model, shown))}

    def find(self, model_id: str) -> Json:
        """raises  AztError 404 naming what there is"""
        for entry in (*self.entries, _IMAGE_ENTRY):
            if entry["slug"] == model_id:
                return self.openai_model(entry)
        known = ", ".join(entry["slug"] for entry in self.listed[:8])
        message = f"The model {model_id[:80]!r} is not in the list: {known}."
        raise AztError(404, "model_not_found", message, param="model")


def usable_models(models: list[Any]) -> tuple[Json, ...]:
    """The entries of a list from outside that name a model."""
    named = (one for one in models if isinstance(one, dict) and isinstance(one.get("slug"), str))
    return tuple(one for one in named if one["slug"])


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one model call needs of an account. A value: it crosses threads."""

    access_token: str = field(repr=False)
    account_id: str

    def headers(self, accept: str) -> dict[str, str]:
        named = {"chatgpt-account-id": self.account_id, "accept": accept, **OWN_HEADERS}
        return {"authorization": f"Bearer {self.access_token}", **named}


async def open_stream(
    pool: ConnectionPool,
    workers: WorkerPool,
    base_url: str,
    credentials: Credentials,
    body: bytes,
    session: str,
) -> Answer:
    """POST one turn and read the head of its answer.

    body     encoded Responses request
    session  stable per conversation: with `prompt_cache_key` it is what keeps prompt caches warm
    raises   UpstreamError also for an answer that is no event stream
    """
    headers = credentials.headers("text/event-stream")
    headers |= {"content-type": "application/json", "session-id": session, "session_id": session}
    call = Call("POST", f"{base_url}/responses", headers, body)
    answer = await open_answer(pool, workers, call)
    if not answer.is_stream:
        raise upstream_error(answer.status, answer.headers, answer.body, time.time())
    return answer


@blocking
def fetch_models(
    pool: ConnectionPool, base_url: str, credentials: Credentials, etag: str, wire: Wire
) -> tuple[tuple[Json, ...], str] | None:
    """The catalogue of one account and its ETag; None when `etag` is still current."""
    headers = credentials.headers("application/json") | ({"if-none-match": etag} if etag else {})
    url = f"{base_url}/models?client_version={CATALOGUE_CLIENT_VERSION}"
    answer = open_response(pool, Call("GET", url, headers, head_timeout_s=30.0), wire)
    if answer.status == 304:
        return None
    if answer.status != 200:
        raise upstream_error(answer.status, answer.headers, answer.body, time.time())
    models = (parse_event(answer.body) or {}).get("models")
    if not isinstance(models, list):
        message = "The upstream's model list has an unknown shape."
        raise UpstreamError(502, "upstream_error", message)
    return usable_models(models), answer.headers.get("etag", "")


@blocking
def fetch_quota(
    pool: ConnectionPool, chatgpt_base_url: str, credentials: Credentials, wire: Wire
) -> Json:
    """What is left of one account's quota, read without a model call: a reading of room 8.

    raises  UpstreamError
    """
    headers = credentials.headers("application/json")
    call = Call("GET", f"{chatgpt_base_url}/wham/usage", headers, head_timeout_s=30.0)
    answer = open_response(pool, call, wire)
    body, now = parse_event(answer.body) or {}, time.time()
    if answer.status != 200:
        raise upstream_error(answer.status, answer.headers, answer.body, now)
    reading = quota_from_body(body, now)
    if not reading:
        raise UpstreamError(502, "upstream_error", "The upstream's quota has an unknown shape.")
    return reading


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What `web_images` is asked for; a value of which nothing is left to check.

    size        "auto" or "1024x1536": width x height in pixels
    references  (content, media type such as "image/png") of each picture to start from
    mask        the same, or None: where it is transparent the first reference may change
    """

    prompt: str = field(repr=False)
    size: str = "auto"
    n: int = 1
    references: tuple[tuple[bytes, str], ...] = field(default=(), repr=False)
    mask: tuple[bytes, str] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Pictures as base64 PNG, and the prompt that they were made from in the end."""

    images: tuple[str, ...] = field(repr=False)
    revised_prompt: str = field(default="", repr=False)


# Events that come before anything was generated, and those whose type begins with "codex." or
# "responsesapi.". Overload and limits are reported after them, inside the 200 stream, so they are
# held back: until then the status is still ours (performance.md 2.10).
_HANDSHAKE = frozenset(
    "keepalive response.created response.in_progress response.metadata response.queued".split()
)
_FAILURES = {"error", "response.failed"}


def _is_handshake(kind: str) -> bool:
    return kind in _HANDSHAKE or kind.startswith(("codex.", "responsesapi."))


HEARTBEAT = b": keep-alive\n\n"
"""A comment: the one form of heartbeat that every client library skips (openai-api.md 2.8)."""


class Relay:
    """One upstream event stream, on the loop: socket -> Framing -> SSEParser -> Translator -> Sink.

        HELD ---first generated event, terminal event, or 15 s---> OPEN ---terminal---> ENDED
          \\--- failure event, cut, stall: `ready` raises              \\--- cut, stall: error event

    Bytes in, bytes out: no task and no thread while it runs. Nothing reaches the client in HELD, so
    that a failure can still become a status or another attempt. Ended, it reads on for the end of
    the body, for then the connection can be kept.
    """

    def __init__(
        self, pool: ConnectionPool, answer: Answer, translator: Translator, streaming: bool
    ) -> None:
        self._loop, self._pool = asyncio.get_running_loop(), pool
        self._framing = answer.framing
        self._feed = translator.feed if streaming else translator.absorb
        self._streaming = streaming
        self._parser = SSEParser()
        self._held: list[bytes] | None = []
        self._held_bytes = 0
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._out = bytearray()
        self._sink: Sink | None = None
        self._has_content = self._paused = False
        self._watched = -1  # the descriptor that the loop tells about
        self._timer: asyncio.TimerHandle | None = None
        self._last_read_s = self._last_write_s = self._loop.time()
        self.answer, self.translator, self.ended = answer, translator, False
        self.first_output_s: float | None = None
        self.on_end: Callable[[Relay], None] | None = None

    # -- what rotation and the handlers call

    async def ready(self, hold_s: float) -> None:
        """Wait out the hold-back. Raises AztError when the stream failed while it was held.

        hold_s  how long handshake events may be held; then the answer opens without content
        """
        rest, self.answer.rest = self.answer.rest, b""
        if rest or self._framing.ended:
            self._receive(rest)
        if self._ready.done():  # the first delta came with the head: `start` watches
            return self._ready.result()
        self._watch()
        opening = self._loop.call_later(hold_s, self._open_late)
        try:
            await self._until(self._ready)
        finally:
            opening.cancel()

    async def whole(self) -> None:
        """Wait for the end of an absorbed answer. Raises its failure."""
        self._watch()
        await self._until(self._over)
        if self.translator.failure is not None:
            raise self.translator.failure

    async def _until(self, future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            self.cancel()
            raise

    # -- what the server calls (StreamBody)

    def start(self, sink: Sink) -> None:
        self._sink = sink
        self._flush()
        if self.ended:
            self._report()
        self._watch()

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
        if self.answer.sock is not None and not self._paused and self._watched < 0:
            self._watched = self.answer.sock.fileno()
            self._loop.add_reader(self._watched, self._readable)
            if self._timer is None:
                self._tick()

    def _unwatch(self) -> None:
        if self._watched >= 0:
            self._loop.remove_reader(self._watched)
            self._watched = -1

    def _readable(self) -> None:
        """Take what has come: with TLS a record, which is never larger than what is asked for."""
        try:
            data = cast(socket.socket, self.answer.sock).recv(READ_BYTES)
        except _NOT_NOW:
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
            self._fail(error if isinstance(error, UpstreamError) else _truncated())
            self._drop()
            return
        if events:
            self._translate(self._take, events)
        if self._framing.ended or not data:
            self._body_over(clean=bool(data) and self.answer.keep and not self._framing.rest)

    def _translate(self, step: Callable[[list[bytes]], None], events: list[bytes]) -> None:
        try:
            step(events)
        except Exception:  # a mistake in the translator must not leave the client waiting
            log.exception("an event of the upstream could not be translated")
            self._fail(AztError(500, "internal_error", "azt made a mistake; its log tells more."))
        self._flush()

    def _take(self, events: list[bytes]) -> None:
        translator, out, feed = self.translator, self._out, self._feed
        for data in events:
            if self._held is not None:
                self._hold(self._held, data)
            elif piece := feed(data):
                out += piece
                self._has_content = True
            if translator.done or translator.stopped or self.ended:
                self._end()
                if translator.stopped:
                    self._drop()
                return

    def _hold(self, held: list[bytes], data: bytes) -> None:
        kind = event_type(data)
        if kind in _FAILURES:
            self._fail(event_error(parse_event(data) or {}, time.time()))
            return
        held.append(data)
        self._held_bytes += len(data)
        if not _is_handshake(kind) or self._held_bytes > MAX_HELD_BYTES:
            self._has_content = True
            self._open(held)

    def _open(self, held: list[bytes]) -> None:
        """End the hold-back: what was held goes through the translator."""
        self._held = None
        for data in held:
            self._out += self._feed(data)
        if not self._ready.done():
            self._ready.set_result(None)

    def _open_late(self) -> None:
        """The wait is over without content: a heartbeat tells that someone is at work."""
        if self._held is None or self.ended:
            return
        if self._streaming:
            self._out += HEARTBEAT
        self._translate(self._open, self._held)

    def _body_over(self, clean: bool) -> None:
        """The upstream's body or connection is at its end."""
        sock = self.answer.sock
        if clean and sock is not None:
            self._unwatch()
            self.answer.sock = None
            self._pool.give(self.answer.key, sock)
        self._drop()
        if not self.ended:
            self._fail(_truncated())

    # -- ending

    def _fail(self, error: AztError) -> None:
        """Held, the failure is raised by `ready`; open, it is the last event."""
        if self.ended:
            return
        self._out += self.translator.fail(error)
        self._end()
        self._drop()
        if not self._ready.done():
            self._ready.set_exception(error)

    def _end(self) -> None:
        """The answer is complete for the client, however it went."""
        if self.ended:
            return
        self.ended = True
        self._flush()
        if not self._over.done():
            self._over.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        # The end of the body follows at once; a connection where it is late is closed.
        self._timer = self._loop.call_later(1.0, self._drop)
        if self._sink is not None:
            self._report()

    def _report(self) -> None:
        """Tell once that the answer has ended for the client, with what was written by then."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            try:
                on_end(self)
            except Exception:  # a mistake in the bookkeeping must not cost the client its end
                log.exception("the end of an answer could not be noted")
        if self._sink is not None:
            self._sink.finish()

    def _drop(self) -> None:
        """Let go of the connection, and of the timer, which would keep this relay in memory."""
        self._unwatch()
        self.answer.close()
        if self._timer is not None:
            self._timer.cancel()

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
        """Heartbeat and idle limit; runs only as often as the nearer of the two can come.

        While the client reads too slowly there is neither: nothing is read, nothing may be written.
        """
        now = self._loop.time()
        later = now + HEARTBEAT_S
        idle_at = later if self._paused else self._last_read_s + UPSTREAM_IDLE_TIMEOUT_S
        if now >= idle_at:
            message = "The upstream fell silent in mid-answer. Send the request again."
            self._fail(UpstreamError(504, "upstream_timeout", message, fault="transient"))
            return
        beats = self._sink is not None and not self._paused
        if beats and now >= self._last_write_s + HEARTBEAT_S:
            self.probe()
        beat_at = self._last_write_s + HEARTBEAT_S if beats else later
        self._timer = self._loop.call_at(max(min(beat_at, idle_at), now + 0.01), self._tick)


def _truncated() -> UpstreamError:
    message = "The upstream broke off before the answer was complete. Send the request again."
    return UpstreamError(502, "upstream_stream_truncated", message, fault="network")


# -- the Codex passthrough: what came in goes out, byte for byte

_FORWARDED = re.compile(
    r"accept|content-(?:encoding|language|type)|(?:conversation|session|thread)[-_]id|openai-beta"
    r"|originator|trace(?:parent|state)|user-agent|version|x-client-request-id|x-codex-[\w-]+"
    r"|x-oai-attestation|x-openai-(?:internal-codex-[\w-]+|memgen-request|subagent)"
    r"|x-responsesapi-[\w-]+"
)
_RETURNED = re.compile(
    r"cache-control|cf-ray|content-(?:disposition|type)|etag|openai-model|retry-after|x-codex-[\w-]+"
    r"|x-[\w-]+-(?:limit-name|(?:primary|secondary)-[\w-]+)|x-error-json|x-models-etag"
    r"|x-(?:oai-)?request-id|x-openai-[\w-]+|x-reasoning-included|x-should-retry"
)


def relayed_headers(headers: Mapping[str, str], credentials: Credentials) -> dict[str, str]:
    """The request headers that are Codex's own (codex-upstream.md 2.6), and who pays for it.

    `accept-encoding` stays out: a compressed stream could not be looked into.
    """
    own = {name: headers[name] for name in headers if _FORWARDED.fullmatch(name)}
    return credentials.headers("*/*") | own


def returned_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The answer's headers that Codex looks at (codex-upstream.md 4.11, 5.1); never a cookie."""
    return [one for one in headers.items() if _RETURNED.fullmatch(one[0]) and one[1].isascii()]


_SCANNED = re.compile(
    rb'\n(?:event: ?TYPE\n{1,2}data: ?(?=\{)|\ndata: ?(?=\{\s*"type"\s*:\s*"TYPE"))'.replace(
        b"TYPE",
        rb"(?:error|response\.(?:completed|created|failed|incomplete|metadata)"
        rb"|codex\.(?:rate_limits|response\.metadata))",
    )
)
_SCAN_BACK_BYTES, _SCANNED_MAX_BYTES = 120, MIB
# A JSON string that is short or may yet be, or else a long one between its quotes.
_STRINGS = re.compile(rb'("(?:[^"\\]|\\.){0,99}+(?:"|\\?\Z))|(")(?:[^"\\]|\\.)*+("?)')


class Scanner:
    """Looks at an event stream on its way and notes what the records need. Pure.

    Of the few events that matter the line of JSON is kept until it ends; one that grows large keeps
    its short strings only, so memory is bounded. They are found by their name, or by the type that
    comes first in the JSON, as the backend writes them. As a `Translator` it hands on what it gets.

    state       "completed", "failed" or "incomplete" once the terminal event was seen
    turn_state  what the backend wants back on the next request of the same turn
    """

    done = stopped = False

    def __init__(self, now: float) -> None:
        self._now = now
        self.response_id = self.model = self.state = self.turn_state = ""
        self.usage: Json | None = None
        self.limits: Json | None = None
        self.failure: AztError | None = None
        self._passed = b"\n\n"  # the end of what was searched
        self._event: bytearray | None = None

    def feed(self, data: bytes) -> bytes:
        raw, data = data, data.replace(b"\r", b"\n") if b"\r" in data else data
        while data:
            if self._event is None:
                data = self._passed + data
                found = _SCANNED.search(data)
                if found is None:
                    self._passed = data[-_SCAN_BACK_BYTES:]
                    break
                self._event, data = bytearray(), data[found.end() :]
            line, end, data = data.partition(b"\n")
            self._event += line
            if len(self._event) > _SCANNED_MAX_BYTES:
                self._event = bytearray(_STRINGS.sub(rb"\1\2\3", self._event))
                if len(self._event) > _SCANNED_MAX_BYTES // 2:
                    self._event.clear()  # hopeless
            if end:
                self.note(parse_event(self._event) or {})
                self._event, self._passed = None, end
        return raw

    absorb = feed

    def fail(self, error: AztError) -> bytes:
        self.failure = self.failure or error
        return b""

    def result(self) -> Json:
        return {}

    def note(self, event: Json) -> None:
        kind, response = str(event.get("type")), _as_object(event.get("response"))
        named = _as_object(event.get("headers"))
        self.turn_state = str(named.get("x-codex-turn-state") or self.turn_state)
        self.response_id = str(response.get("id") or self.response_id)
        self.model = str(response.get("model") or self.model)[:80]
        if kind == "codex.rate_limits":
            self.limits = event
        elif kind in ("response.completed", "response.failed", "response.incomplete"):
            self.state = kind.removeprefix("response.")
            self.usage = _as_object(response.get("usage")) or None
        if kind in _FAILURES:
            self.failure = event_error(event, self._now)
        elif self.state == "completed":  # after an `error` event, which Codex does not heed
            self.failure = None


class _Unparsed(SSEParser):
    """Where a `Relay` parses: the bytes of a passthrough are its events."""

    def feed(self, chunk: bytes) -> list[bytes]:
        return [chunk]


class Passthrough(Relay):
    """A relay that changes nothing: status, bytes and the way it ends are the upstream's.

    A failure among the held events that another account may not have is raised by `ready`, and
    kept: `pass_on` sends it after all. A broken transfer stays one. An answer that is no stream is
    ready at once; its body is in `answer`.
    """

    def __init__(self, pool: ConnectionPool, answer: Answer) -> None:
        self.scanner = Scanner(time.time())
        # Not streaming: whatever the wait, nothing is added.
        super().__init__(pool, answer, self.scanner, streaming=False)
        self._events, self._parser = self._parser, _Unparsed()
        self.is_broken = False
        self.scanner.note({"headers": answer.headers})
        self.scanner.model = answer.headers.get("openai-model", "")[:80]

    async def ready(self, hold_s: float) -> None:
        if self.answer.is_stream:
            await super().ready(hold_s)
        elif self.answer.status < 300 and len(self.answer.body) < MIB:
            # A compaction, and pictures, say what they cost in the same place as a response.
            whole = parse_event(self.answer.body)
            self.scanner.note({"type": "response.completed", "response": whole})

    def pass_on(self) -> None:
        """Open, though the answer failed."""
        if self._held is not None:
            self._open(self._held)
        self.resume()

    def probe(self) -> bool:
        self._last_write_s = self._loop.time()  # asked again as if something had been written
        return False

    def _hold(self, held: list[bytes], data: bytes) -> None:
        held.append(data)
        self._held_bytes += len(data)
        # In slices: what comes behind the first generated event needs no look.
        parsed = (self._events.feed(data[at : at + KIB]) for at in range(0, len(data), KIB))
        events = (one for some in parsed for one in some if not _is_handshake(event_type(one)))
        event, error = next(events, None), None
        if event is not None and event_type(event) in _FAILURES:
            error = event_error(parse_event(event) or {}, time.time())
        if error is not None and error.fault != "request":
            self.pause()
            if not self._ready.done():
                self._ready.set_exception(error)
        elif event is not None or self._held_bytes > MAX_HELD_BYTES:
            self._has_content = True
            self._open(held)

    def _body_over(self, clean: bool) -> None:
        # Where only the end of the connection ends the body, the last event tells whether it did.
        is_whole = self._framing.ended or (self._framing.left < 0 and self.scanner.state)
        if is_whole and (self._held is None or self._ready.done()):
            self._end()
        super()._body_over(clean)

    def _fail(self, error: AztError) -> None:
        self.is_broken = self.is_broken or not self.ended
        super()._fail(error)

    def _report(self) -> None:
        sink, self._sink = self._sink, None
        super()._report()
        if sink is not None:
            (sink.cut if self.is_broken else sink.finish)()


# -- pictures by way of the ChatGPT web site: the plain calls of codex-upstream.md 10 under azt's
#    own name. Its step 1 is left out: that page only serves to pass for a browser.

_ASSET = re.compile(r"(file-service|sediment)://([\w-]{1,128})", re.ASCII)


def _picture_size(data: bytes) -> tuple[int, int]:
    """Width and height as the head of a PNG, JPEG or WEBP tells them; (0, 0) for all else."""
    at, kind = 2, data[8:16] if data[:4] == b"RIFF" else b""
    width = height = 0
    with contextlib.suppress(struct.error):  # cut
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", data, 16)
        elif kind == b"WEBPVP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
        elif kind == b"WEBPVP8L":
            [bits] = struct.unpack_from("<I", data, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"WEBPVP8X":
            width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        for _ in range(1000 if data.startswith(b"\xff\xd8") else 0):  # the segments of a JPEG
            marker, size, *shape = struct.unpack_from(">HHxHH", data, at)
            at += 2 + size
            if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
                height, width = shape
                break
    return (width, height) if width else (0, 0)


_BROWSER_CHECK = (
    "The ChatGPT web site asks for a browser check. azt is no browser and does not answer such "
    "checks. Make the picture at chatgpt.com, or with an account on a paid plan."
)


@dataclass(frozen=True, slots=True)
class _Site:
    """The ChatGPT web site for one given account."""

    pool: ConnectionPool
    workers: WorkerPool
    base_url: str
    credentials: Credentials

    async def send(
        self, method: str, url: str, body: Json | bytes = b"", headers: Mapping[str, str] = {}
    ) -> Answer:
        """One call. `url`: a path below the base, or an address that an answer named.

        raises  UpstreamError for what is no 2xx; 403 `browser_check_required`
        """
        url = self.base_url + url if url.startswith("/") else url
        # Nobody but the site itself gets the token (trust.md 1.6).
        is_site = self.pool.key(url) == self.pool.key(self.base_url)
        own = self.credentials.headers("application/json") if is_site else {**OWN_HEADERS}
        if isinstance(body, dict):
            body, own["content-type"] = encode_json(body), "application/json"
        call = Call(method, url, {**own, **headers}, body, bytes_max=MAX_WEB_PICTURE_BYTES)
        answer = await open_answer(self.pool, self.workers, call)
        if 200 <= answer.status < 300 and answer.is_stream == ("x-conduit-token" in headers):
            return answer
        answer.close()
        is_page = answer.status == 403 and "html" in answer.headers.get("content-type", "")
        if is_page or "cf-mitigated" in answer.headers:
            raise UpstreamError(403, "browser_check_required", _BROWSER_CHECK)
        if is_site:
            raise upstream_error(answer.status, answer.headers, answer.body, time.time())
        message = f"{self.pool.key(url)[1]} answered {answer.status} instead of taking or giving a"
        raise UpstreamError(502, "image_generation_failed", f"{message} picture. Try again.")

    async def told(self, name: str, *call: Any) -> str:
        """What a call answers under a name, for the next call."""
        return _member(parse_event((await self.send(*call)).body) or {}, name)

    async def admission(self) -> dict[str, str]:
        """The headers that open a conversation, where the site gives them without a check."""
        # "p" is where a browser proves to be one. azt has nothing to say there.
        answer = await self.send("POST", "/sentinel/chat-requirements", {"p": ""})
        given = parse_event(answer.body) or {}
        checks = (_as_object(given.get(one)) for one in ("proofofwork", "turnstile", "arkose"))
        if any(one.get("required") for one in checks):
            raise UpstreamError(403, "browser_check_required", _BROWSER_CHECK)
        return {"openai-sentinel-chat-requirements-token": _member(given, "token")}

    async def upload(self, at: int, content: bytes, media_type: str) -> tuple[Json, Json]:
        """One picture to start from, as a message names it: among its attachments, in its parts."""
        width, height = _picture_size(content)
        if not width or len(content) > MAX_WEB_PICTURE_BYTES:
            message = "The ChatGPT web site takes PNG, JPEG and WebP up to 20 MiB. Convert picture"
            raise BadRequest(f"{message} {at}.", "image", "unsupported_value")
        name, size = f"picture-{at}", {"width": width, "height": height}
        about = {"file_name": name, "file_size": len(content), "use_case": "multimodal", **size}
        file = parse_event((await self.send("POST", "/files", about)).body) or {}
        blob = {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2020-04-08"}
        blob["content-type"] = media_type
        await self.send("PUT", _member(file, "upload_url"), content, blob)
        path = f"/files/{urllib.parse.quote(_member(file, 'file_id'), '')}/uploaded"
        await self.send("POST", path, {})
        attached = {"id": file["file_id"], "name": name, "mimeType": media_type}
        pointer = {"asset_pointer": f"file-service://{file['file_id']}", "size_bytes": len(content)}
        pointer["content_type"] = "image_asset_pointer"
        return {**attached, "size": len(content), **size}, {**pointer, **size}

    async def converse(
        self, admitted: dict[str, str], prompt: str, files: list[tuple[Json, Json]]
    ) -> list[str]:
        """One conversation: its pictures as base64."""
        text: Json = {"content_type": "text", "parts": [prompt]}
        parts = [*(pointer for _, pointer in files), prompt]
        content = {"content_type": "multimodal_text", "parts": parts} if files else text
        message = {"id": str(uuid.uuid4()), "author": {"role": "user"}}
        shared = {
            **{"action": "next", "conversation_mode": {"kind": "primary_assistant"}},
            **{"model": "auto", "parent_message_id": str(uuid.uuid4())},
            **{"system_hints": ["picture_v2"], "timezone": "UTC", "timezone_offset_min": 0},
            # Whole messages, not the changes of them.
            **{"supported_encodings": [], "supports_buffering": False},
        }
        asked = shared | {"partial_query": message | {"content": text}}
        headers = {**admitted, "accept": "text/event-stream"}
        prepare = "POST", "/f/conversation/prepare", asked, admitted
        headers["x-conduit-token"] = await self.told("conduit_token", *prepare)
        message |= {"content": content, "metadata": {"attachments": [one for one, _ in files]}}
        asked = shared | {"client_contextual_info": {"app_name": "azt"}, "messages": [message]}
        answer = await self.send("POST", "/f/conversation", asked, headers)
        try:
            return await self._pictures(answer)
        except UpstreamError as error:
            error.fault = "request"  # what has begun is not begun again elsewhere
            raise

    async def _pictures(self, answer: Answer) -> list[str]:
        loop, turn = asyncio.get_running_loop(), _WebTurn(time.time())
        relay = Relay(self.pool, answer, turn, streaming=False)
        try:
            await relay.ready(HOLD_BACK_S)
            await relay.whole()
        finally:
            relay.cancel()
        path = f"/conversation/{urllib.parse.quote(_member(vars(turn), 'conversation_id'), '')}"
        until = loop.time() + WEB_POLLS_S
        while not (turn.assets or (turn.is_idle and turn.said)) and loop.time() < until:
            await asyncio.sleep(WEB_POLL_S)
            try:
                turn.absorb((await self.send("GET", path)).body)
            except UpstreamError as error:
                if error.fault not in ("network", "transient"):
                    raise
        pictures = []
        for kind, name in turn.assets:
            source = "/files" if kind == "file-service" else f"{path}/attachment"
            url = await self.told("download_url", "GET", f"{source}/{name}/download")
            content = (await self.send("GET", url)).body
            if _picture_size(content) == (0, 0):
                raise no_picture("")
            pictures.append(base64.b64encode(content).decode())
        if not pictures:
            raise no_picture(turn.said)
        return pictures


def _member(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if isinstance(value, str) and value:
        return value
    raise UpstreamError(502, "upstream_error", f"The ChatGPT web site told no {name}. Try again.")


def no_picture(said: str, code: str = "image_refused") -> UpstreamError:
    """No picture came. said: the model's own words, a refusal or a limit, where there are any."""
    if said:
        return UpstreamError(400, code, said[:2048], type="image_generation_user_error")
    message = "The upstream made no picture. Send the request again."
    return UpstreamError(502, "image_generation_failed", message)


class _WebTurn(Scanner):
    """What the events of a conversation, and then the conversation itself, tell.

    assets   (kind, id) of each picture, in order
    said     the newest text of the assistant
    is_idle  the site says that no tool is at work
    """

    def __init__(self, now: float) -> None:
        super().__init__(now)
        self.done = self.is_idle = False
        self.conversation_id = self.said = ""
        self.assets: dict[tuple[str, str], None] = {}

    def absorb(self, data: bytes) -> bytes:
        values: list[Any] = [parse_event(data)]
        for value in values:  # grows meanwhile, so that no nesting is too deep
            if isinstance(value, dict):
                self.note(value)
                values += value.values()
            elif isinstance(value, list):
                values += value
        if values[0] and values[0].get("error"):
            self.failure = event_error(values[0], self._now)
        self.done = data == b"[DONE]" or self.failure is not None
        return b""

    def fail(self, error: AztError) -> bytes:
        # Where a conversation is known, it can be asked for what the stream did not tell.
        return b"" if self.conversation_id else super().fail(error)

    def note(self, event: Json) -> None:
        role, about = _as_object(event.get("author")).get("role"), _as_object(event.get("metadata"))
        parts = _as_object(event.get("content")).get("parts")
        parts = parts if isinstance(parts, list) else []
        kind, blocked = event.get("type"), _as_object(event.get("moderation_response")) | event
        if isinstance(named := event.get("conversation_id"), str):
            self.conversation_id = named or self.conversation_id
        if role == "assistant":
            said = "".join(one for one in parts if isinstance(one, str)).strip()
            self.said = said or self.said
        elif role == "tool" and about.get("async_task_type") == "image_gen":
            pointers = (str(_as_object(one).get("asset_pointer")) for one in parts)
            found = (_ASSET.fullmatch(one) for one in pointers)
            self.assets |= {(one[1], one[2]): None for one in found if one}
        elif kind == "server_ste_metadata":
            self.is_idle = about.get("tool_invoked") is False
        elif kind == "moderation" and blocked.get("blocked"):
            said = self.said or "The moderation of the ChatGPT web site blocked this request."
            self.failure = no_picture(said, "moderation_blocked")


async def web_images(
    pool: ConnectionPool,
    workers: WorkerPool,
    base_url: str,
    credentials: Credentials,
    asked: ImageRequest,
    on_progress: Callable[[str], None],
) -> ImageResult:
    """Pictures as the ChatGPT web site makes them: for accounts that have no image tool.

    raises  UpstreamError; BadRequest for a picture that the site does not take
    """
    site, prompt = _Site(pool, workers, base_url, credentials), asked.prompt
    on_progress("asking the ChatGPT web site")
    admitted = await site.admission()
    if asked.size != "auto":
        width, height = map(int, asked.size.split("x"))
        shared = math.gcd(width, height)
        prompt += f"\n\nAspect ratio: {width // shared}:{height // shared}."
    pictures = asked.references
    if asked.mask is not None:
        pictures = (*pictures, asked.mask)
        prompt += "\n\nThe last picture is a mask: change the first one where it is transparent."
    files = [await site.upload(at, *one) for at, one in enumerate(pictures, 1)]
    on_progress("making the picture")
    turns = [asyncio.create_task(site.converse(admitted, prompt, files)) for _ in range(asked.n)]
    try:
        made = await asyncio.gather(*turns)
    finally:
        for turn in turns:
            turn.cancel()
    return ImageResult(tuple(itertools.chain(*made)), asked.prompt)


# ==================================================================================================
# 11. Translators
#     Client requests -> Codex requests, upstream events -> answers: dict to dict. Never opens a
#     socket, never knows an account. This part is what chat and responses share.
# ==================================================================================================

REASONING_INCLUDE = "reasoning.encrypted_content"

_TYPE_WORDS = {bool: "boolean", dict: "object", float: "number", int: "integer", list: "array"}
# The fields that have one type wherever they are given; null always counts as absent.
_FIELD_TYPES: dict[str, type] = {
    **dict.fromkeys(("background", "parallel_tool_calls", "store", "stream"), bool),
    **dict.fromkeys(("metadata", "stream_options", "text", "web_search_options"), dict),
    **dict.fromkeys(("max_completion_tokens", "max_output_tokens", "max_tokens"), int),
    **dict.fromkeys(("functions", "include", "messages", "modalities", "tools"), list),
    **dict.fromkeys(("instructions", "previous_response_id", "prompt_cache_key"), str),
}

# What the client gave, or None, and the parameter that it came from.
_Asked = tuple[Any, str]
# A tool or an input item in Responses shape, with the client's own names; its path for errors.
_Placed = tuple[Json, str]
# Model id -> the reasoning efforts that it supports; a model may be missing.
_Efforts = Mapping[str, Sequence[str]]


def _expect(value: Any, kind: type[T], param: str) -> T:
    """`value` itself if it is exactly of this type (a boolean is no integer); null is missing."""
    if type(value) is kind:
        return value
    if value is None:
        message = f"Missing required parameter: '{param}'."
        raise BadRequest(message, param, "missing_required_parameter")
    wanted, got = (_TYPE_WORDS.get(given, "string") for given in (kind, type(value)))
    message = f"Invalid type for '{param}': expected {wanted}, got {got}."
    raise BadRequest(message, param, "invalid_type")


def _named(parent: Json, name: str, path: str = "") -> str:
    """A member that is a name, an id or the like: a string that is not empty."""
    return _expect(parent.get(name) or None, str, path + name)


def _one_of(allowed: Iterable[str], value: Any, param: str) -> Any:
    """`value` itself if it is allowed; null is."""
    if value is None or value in (known := tuple(allowed)):
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


def _get(parent: Json, name: str, kind: type[T]) -> T:
    """A member, or an empty value where it is missing or of another type."""
    value = parent.get(name)
    return value if isinstance(value, kind) else kind()


def _dicts(parent: Json, name: str) -> list[Json]:
    return [value for value in _get(parent, name, list) if isinstance(value, dict)]


def _flat(value: Json, path: str = "") -> _Placed:
    """Chat's `{"type": K, K: {...}}` as `{"type": K, ...}`, fresh; both are taken everywhere."""
    kind = value.get("type")
    inner = _get(value, kind, dict) if isinstance(kind, str) else {}
    return ({**inner, "type": kind}, f"{path}.{kind}") if inner else ({**value}, path)


def _given(fields: Json) -> Json:
    """The members that say something."""
    return {name: value for name, value in fields.items() if value is not None}


def _without(fields: Json, *names: str) -> Json:
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


# ---- Content parts -------------------------------------------------------------------------------

_BASE64 = re.compile(r"[A-Za-z0-9+/]++={0,2}+")


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


def picture_content(url: Any, param: str) -> tuple[bytes, str]:
    """Content and media type of a picture for the ChatGPT web site, which follows no links."""
    found = re.match(r"(?i)data:(image/[\w.+-]+);base64,", url) if isinstance(url, str) else None
    if found is None:
        message = f"On this account '{param}' must be the picture itself, as a data URL."
        raise BadRequest(message, param, "unsupported_value")
    data = _data_url(found.string, param, "invalid_base64_image")
    return base64.b64decode(data[found.end() :]), found[1].lower()


def codex_picture(body: Any) -> ImageRequest | None:
    """What a Responses request that can only call the image tool asks for; None for any other.

    Only the last user message counts: the ChatGPT web site gets a new conversation.
    raises  BadRequest for a picture that is linked to
    """
    body = _as_object(body)
    choice, tools = body.get("tool_choice"), body.get("tools")
    tools = [_as_object(one) for one in tools] if isinstance(tools, list) else []
    is_forced = _as_object(choice).get("type") == "image_generation"
    tool: Json = next((one for one in tools if one.get("type") == "image_generation"), {})
    if not (is_forced or (tools == [tool] and choice != "none")):
        return None
    given = body.get("input")
    given = given if isinstance(given, list) else [{"role": "user", "content": given}]
    users = (at for at, one in enumerate(given) if _as_object(one).get("role") == "user")
    if (at := max(users, default=-1)) < 0:
        return None
    parts = given[at].get("content") or []
    parts = parts if isinstance(parts, list) else [{"text": parts}]
    parts = [_as_object(one) for one in parts]
    said = "\n".join(str(one["text"]) for one in parts if one.get("text"))
    pictures = [
        picture_content(one.get("image_url"), f"input[{at}].content[{index}].image_url")
        for index, one in enumerate(parts)
        if one.get("type") == "input_image"
    ]
    size = str(tool.get("size"))
    size = size if re.fullmatch(r"[1-9]\d{1,3}x[1-9]\d{1,3}", size) else "auto"
    return ImageRequest(said, size, references=tuple(pictures)) if said else None


def _image_part(part: Json, path: str) -> Json:
    """Chat `image_url` (object, string), Responses `input_image`, Anthropic `source`, `image`."""
    url, param = _first(part, "image_url.url image_url image source.url source.data", path)
    url = _expect(url or None, str, param)
    if param.endswith(".data"):
        url = f"data:{_first(part, 'source.media_type')[0] or 'image/png'};base64,{url}"
    if url[:5].lower() == "data:":
        url = _data_url(url, param, "invalid_base64_image")
    elif not url[:8].lower().startswith(("http://", "https://")):
        raise BadRequest(f"'{param}' must be an http(s) URL or a data URL.", param)
    detail, param = _first(part, "detail image_url.detail", path)
    detail = _one_of(("auto", "low", "high", "original"), detail, param)
    return _given({"type": "input_image", "image_url": url, "detail": detail})


def _file_part(part: Json, path: str) -> Json:
    """Chat `file` (nested) or `input_file` (flat). A text file goes as text."""
    part, path = _flat(part, path[:-1])
    if part.get("file_data") is None and isinstance(part.get("file_url"), str):
        return {"type": "input_file", "file_url": part["file_url"]}
    data = _named(part, "file_data", f"{path}.")
    data = data if data[:5].lower() == "data:" else f"data:application/pdf;base64,{data}"
    data = _data_url(data, f"{path}.file_data", "invalid_value")
    if text := re.match(r"data:text/[^,]{0,80};base64,", data):
        with contextlib.suppress(ValueError):
            return {"type": "input_text", "text": base64.b64decode(data[text.end() :]).decode()}
    name = _get(part, "filename", str) or "file.pdf"
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
    is_text = content is None or isinstance(content, str)  # by far the most frequent
    parts: list[Json] = [{"type": _PARTS[role]["text"], "text": content or ""}] if is_text else []
    for index, part in enumerate([] if is_text else _expect(content, list, path)):
        at = f"{path}[{index}]."
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        name = _named(_expect(part, dict, at[:-1]), "type", at)
        file_id, param = _first(part, "file_id file.file_id source.file_id", at)
        if name == "input_audio":
            message, param = "The Codex models take no audio: send text or images.", f"{at}type"
            raise BadRequest(message, param, "unsupported_value")
        if file_id is not None:
            message = "azt keeps no uploaded files: send the data as a data URL."
            raise BadRequest(message, param, "unsupported_value")
        kind = _PARTS[role][_one_of(_PARTS[role], name, f"{at}type")]
        if kind in _MEDIA:
            parts.append(_MEDIA[kind](part, at))
        elif kind:
            field = "refusal" if kind == "refusal" else "text"
            parts.append({"type": kind, field: _expect(part.get(field), str, at + field)})
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
        if _expect(tool, dict, path).get("type") is None and ("function" in tool or "name" in tool):
            tool = {**tool, "type": "function"}
        kind = _named(tool, "type", f"{path}.")
        if _REFUSED_TOOLS.fullmatch(kind):
            message = f"The Codex backend has no {kind!r} tool: remove it, or declare a function."
            raise BadRequest(message, f"{path}.type", "unsupported_value")
        tool, path = _flat(tool, path)
        yield {**tool, "type": _TOOL_ALIASES.get(kind, kind)}, path


class _Tools:
    """The tools of one request: what goes upstream, and the client's names there and back.

    Upstream wants names of `_SAFE_NAME`, tool hubs send longer and dotted ones. They are shortened
    the same way in every request with the same tools, so that prompts stay cacheable.
    """

    def __init__(self, tools: Iterable[_Placed]) -> None:
        tools = list(tools)
        named = [(tool, path) for tool, path in tools if tool["type"] in _NAMED_TOOLS]
        # Client's name -> "custom" or "function".
        self.kinds = {_named(tool, "name", f"{path}."): tool["type"] for tool, path in named}
        # Names that are fine keep themselves, whatever another one is shortened to.
        self._short = {name: name for name in self.kinds if _SAFE_NAME.fullmatch(name)}
        self.renamed: dict[str, str] = {}  # upstream name -> client's name, where they differ
        sent: dict[tuple[str, str], Json] = {}
        for tool, path in tools:  # upstream refuses duplicates: the last wins
            kind = "" if tool["type"] in _NAMED_TOOLS else tool["type"]
            sent[kind, str(tool.get("name"))] = self._upstream_tool(tool, path)
        self.upstream = list(sent.values())

    def _upstream_tool(self, tool: Json, path: str) -> Json:
        kind, about = tool["type"], tool.get("description")
        if kind not in _NAMED_TOOLS:
            if place := _get(tool, "user_location", dict):
                tool["user_location"], _ = _flat({"type": "approximate", **place})
            return _without(tool, *_NOT_FOR_UPSTREAM)
        sent = {"type": kind, "name": self.short(tool["name"])}
        sent |= {"description": about} if isinstance(about, str) else {}
        if kind == "function":
            schema = _expect(tool.get("parameters") or {}, dict, f"{path}.parameters")
            if schema.get("type") in (None, "object"):
                schema = {**schema, "type": "object", "properties": schema.get("properties") or {}}
            sent |= {"parameters": schema, "strict": tool.get("strict") is True}
        elif tool.get("format") is not None:
            sent["format"], _ = _flat(_expect(tool["format"], dict, f"{path}.format"))
        return sent

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
            self.renamed |= {short: name} if short != name else {}
        return self._short[name]

    def choice(self, choice: Any, param: str) -> str | Json | None:
        """`tool_choice`, or one of its allowed tools, for upstream; None where there is none."""
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
            mode = _one_of(("auto", "required"), choice.get("mode") or "auto", param)
            allowed = _expect(choice.get("tools"), list, param)
            tools = [self.choice(_expect(tool, dict, param), param) for tool in allowed]
            return {"type": kind, "mode": mode, "tools": tools}
        if isinstance(name, str) and name in self.kinds:
            return {"type": self.kinds[name], "name": self.short(name)}
        if kind not in _NAMED_TOOLS and any(tool["type"] == kind for tool in self.upstream):
            return {**choice, "type": kind}
        raise BadRequest(f"'{param}' names a tool that is not in 'tools'. Add it there.", param)


# ---- Input items ---------------------------------------------------------------------------------

_ROLES = {"assistant": "assistant", "developer": "developer", "system": "developer", "user": "user"}
_CALL_FIELDS = {"custom_tool_call": "input", "function_call": "arguments"}
_OUTPUTS = tuple(f"{kind}_output" for kind in _CALL_FIELDS)
_NO_RESULT = "No result was recorded for this call."


def _client_items(value: Any, find: Callable[[str], Json | None]) -> Iterator[_Placed]:
    """Responses `input` -> typed items; `find` knows the items that are only referred to."""
    value = [{"role": "user", "content": value}] if isinstance(value, str) else value
    for index, item in enumerate(_expect(value, list, "input")):
        path = f"input[{index}]"
        if _expect(item, dict, path).get("type") is None and ("role" in item or "id" in item):
            item = {**item, "type": "message" if "role" in item else "item_reference"}
        kind = _named(item, "type", f"{path}.")
        if kind == "message":
            _one_of(_ROLES, _named(item, "role", f"{path}."), f"{path}.role")
        if kind != "item_reference":
            yield item, path
            continue
        item_id = _named(item, "id", f"{path}.")
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
        has_phase = role == "assistant" and item.get("phase") in ("commentary", "final_answer")
        phase = {"phase": item["phase"]} if has_phase else {}
        return {"type": kind, "role": role, "content": parts, **phase} if parts else None
    if kind == "reasoning":
        sealed = {"type": kind, "summary": item.get("summary") or []}
        encrypted = item.get("encrypted_content")
        return {**sealed, "encrypted_content": encrypted} if encrypted else None
    if kind not in _CALL_FIELDS and kind not in _OUTPUTS:
        id_too = () if kind == "image_generation_call" else ("id",)
        return _without(item, *_NOT_FOR_UPSTREAM, *id_too)
    name = _named(item, "name", f"{path}.") if kind in _CALL_FIELDS else ""
    call_id = _named(item, "call_id", f"{path}.")
    if not _SAFE_NAME.fullmatch(call_id):  # the same digest for the call and its output
        call_id = f"call_{_digest(call_id)[:40]}"
    field = _CALL_FIELDS.get(kind, "output")
    value = item.get(field)
    if field == "output" and isinstance(value, list):
        at = f"{path}.content" if path.startswith("messages") else f"{path}.output"
        value = _content_parts(value, "user", at)
    elif not isinstance(value, str):  # some clients send objects where strings belong
        value = "" if value is None else encode_json(value).decode()
    if field == "output":
        return {"type": kind, "call_id": call_id, field: value}
    # Cursor gets calls of its flat custom tools as functions and sends them back as such.
    kind = "custom_tool_call" if tools.kinds.get(name) == "custom" else kind
    value = value or ("{}" if kind == "function_call" else "")
    return {"type": kind, "call_id": call_id, "name": tools.short(name), _CALL_FIELDS[kind]: value}


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


def _checked(body: Json, default_model: str, ignored: str) -> tuple[str, str, tuple[str, ...]]:
    """What both routes check first.

    Returns the model as the client and as upstream call it, and which of `ignored` were really set.
    """
    named = default_model if body.get("model") is None else _expect(body["model"], str, "model")
    model = {"model": named.strip().removeprefix("openai/").removeprefix("azt/")}
    for name, value in body.items():
        if value is not None and name in _FIELD_TYPES:
            _expect(value, _FIELD_TYPES[name], name)
    given = [name for name, value in body.items() if value is not None and value is not False]
    noted = (name for name in ignored.split() if name in given)
    noted = (name for name in noted if name not in _FIELD_TYPES or body[name] > 0)  # 0, -1: none
    return named, _named(model, "model"), tuple(noted)


def _upstream_body(
    body: Json,
    model: str,
    efforts: Sequence[str],
    said: tuple[str, list[_Placed]],
    tools: _Tools,
    asked: Mapping[str, _Asked],
) -> Json:
    """The body for the backend, made of what it is known to take; what is absent is not sent."""
    instructions, placed = said
    form = _text_format(*asked["format"])
    verbosity = _one_of(("low", "medium", "high"), *asked["verbosity"])
    effort = _clamp_effort(_one_of(_EFFORTS, *asked["effort"]), efforts)
    summary = _one_of(_SUMMARIES, *asked["summary"])
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
        "reasoning": _given({"effort": effort, "summary": summary}) or None,
        "text": _given({"format": form, "verbosity": verbosity}) or None,
        **{"include": [REASONING_INCLUDE], "stream": True, "store": False},
        "prompt_cache_key": _session_key(body, instructions, items),
        "service_tier": "priority" if is_fast else None,
    }
    return _given(sent)


def _developer_item(text: str) -> Json:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "role": "developer", "content": content}


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
    kind = _named(_expect(value, dict, param), "type", f"{param}.")
    if _one_of(("text", "json_object", "json_schema"), kind, f"{param}.type") != "json_schema":
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


def usage_from(usage: Json | None) -> Json:
    """Upstream `usage` -> chat `usage`. Missing and odd counts are 0, never null or negative."""

    def count(source: Json, name: str) -> int:
        value = source.get(name)
        return max(0, value) if type(value) is int else 0

    usage = usage if isinstance(usage, dict) else {}
    inputs, outputs = (_get(usage, f"{side}_tokens_details", dict) for side in ("input", "output"))
    prompt, completion = count(usage, "input_tokens"), count(usage, "output_tokens")
    input_counts = ("cached_tokens", "audio_tokens", *({"cache_write_tokens"} & inputs.keys()))
    output_counts = (
        "reasoning_tokens audio_tokens accepted_prediction_tokens rejected_prediction_tokens"
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": count(usage, "total_tokens") or prompt + completion,
        "prompt_tokens_details": {name: count(inputs, name) for name in input_counts},
        "completion_tokens_details": {name: count(outputs, name) for name in output_counts.split()},
    }


def estimate_input_tokens(upstream: Json) -> int:
    """About one token per 4 bytes of text and tool schemas, and 4 per item. Never exact."""
    items = upstream.get("input", [])
    size = len(encode_json(upstream.get("tools", [])))
    for text in _walk([upstream.get("instructions"), items]):
        if isinstance(text, str):  # an image or a file counts as 1,000 tokens, whatever its size
            size += 4096 if text.startswith("data:") else len(text.encode("utf-8", "replace"))
    return max(1, size // 4 + 4 * len(items))


# --------------------------------------------------------------------------------------------------
# 11a. Chat Completions
# --------------------------------------------------------------------------------------------------

_CHAT_IGNORED = (
    "temperature top_p presence_penalty frequency_penalty seed logit_bias logprobs top_logprobs"
    " user prediction moderation max_tokens max_completion_tokens max_output_tokens"
)
# Thinking budgets of other dialects, in tokens: the first limit that holds names the effort.
_BUDGETS = ((0, "none"), (512, "minimal"), (1024, "low"), (8192, "medium"), (24576, "high"))
_SWITCHES = ("reasoning.enabled", "enable_thinking", "chat_template_kwargs.enable_thinking")


@dataclass(slots=True)
class ChatRequest:
    """A translated chat request: the upstream body, and all that the answer side must know."""

    model: str  # as the client named it; every chunk repeats it
    upstream: Json
    stream: bool
    include_usage: bool
    stop: list[str]  # emulated here
    tool_names: dict[str, str]  # upstream tool name -> client's name, only where they differ
    custom_nested: set[str]  # the tools declared `{"type": "custom", "custom": {...}}`
    legacy_functions: bool  # the answer has the shape of before tools: `function_call`, one call
    json_format: bool  # the content must be JSON only: commentary stays out of it
    show_reasoning: bool
    metadata: Json | None
    ignored: tuple[str, ...]  # parameters without effect upstream, for `x-azt-ignored-params`


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
    body = {**_get(body, "extra_body", dict), **body}
    named, model, ignored = _checked(body, default_model, _CHAT_IGNORED)
    if "audio" in (body.get("modalities") or ()):
        message = "The Codex models give no audio: ask for text only."
        raise BadRequest(message, "modalities", "unsupported_value")
    if body.get("n") is not None and (body["n"] is True or body["n"] != 1):
        message = "This gateway returns a single choice; 'n' must be 1."
        raise BadRequest(message, "n", "unsupported_value")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else _expect(stops, list, "stop")
    if len(stops) > 4:
        raise BadRequest("'stop' takes at most 4 strings.", "stop")
    stops = [_expect(stop, str, f"stop[{index}]") for index, stop in enumerate(stops)]
    said = _chat_items(body)
    flat = [*_flat_tools(body, "tools"), *_flat_tools(body, "functions")]
    if (options := body.get("web_search_options")) is not None:
        known = {name: options.get(name) for name in ("search_context_size", "user_location")}
        flat.append(({"type": "web_search", **_given(known)}, "web_search_options"))
    tools = _Tools(flat)
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
    body |= {"parallel_tool_calls": False} if is_legacy else {}
    upstream = _upstream_body(body, model, efforts.get(model, ()), said, tools, asked)
    nested = {_first(tool, "custom.name")[0] for tool in body.get("tools") or ()}
    return ChatRequest(
        model=named,
        upstream=upstream,
        stream=body.get("stream") is True,
        include_usage=_first(body, "stream_options.include_usage")[0] is True,
        stop=list(filter(None, stops)),
        tool_names=tools.renamed,
        custom_nested={name for name in nested if tools.kinds.get(name) == "custom"},
        legacy_functions=is_legacy,
        json_format="format" in upstream.get("text", {}),
        show_reasoning=show_reasoning,
        metadata=body.get("metadata"),
        ignored=ignored,
    )


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


def _chat_items(body: Json) -> tuple[str, list[_Placed]]:
    """(instructions, items): leading system messages are instructions, others keep their place."""
    given = body.get("instructions") or ""
    if not body.get("messages") and body.get("input") is not None:
        if body.get("previous_response_id") is not None:
            message = "Only /v1/responses continues a stored response: send the whole input."
            raise BadRequest(message, "previous_response_id", "unsupported_value")
        return given, list(_client_items(body["input"], lambda item_id: None))
    messages = _expect(body.get("messages"), list, "messages")
    if not messages:
        raise BadRequest("'messages' is empty: send at least one message.", "messages")
    placed: list[_Placed] = []
    for index, message in enumerate(messages):
        placed += _message_items(message, f"messages[{index}]")
    texts = [given]
    for item, path in placed:
        if item.get("role") not in ("system", "developer"):
            break
        parts = _content_parts(item["content"], "developer", f"{path}.content")
        texts.append("\n".join(part["text"] for part in parts))
    return "\n\n".join(filter(None, texts)), placed[len(texts) - 1 :]


def _message_items(message: Any, path: str) -> Iterator[_Placed]:
    """A chat message -> items in Responses shape; contents stay as the client wrote them."""
    role = _named(_expect(message, dict, path), "role", f"{path}.")
    _one_of((*_ROLES, "tool", "function"), role, f"{path}.role")
    content = message.get("content")
    if role not in _ROLES:
        call_id, param = _first(message, "tool_call_id toolCallId call_id", f"{path}.")
        if role == "function":  # such calls have no ids: the name finds them
            call_id = "call_fn_" + _named(message, "name", f"{path}.")
        call_id = _expect(call_id or None, str, param)
        yield {"type": _OUTPUTS[0], "call_id": call_id, "output": content}, path
        return
    if role == "assistant" and isinstance(message.get("refusal"), str):
        parts = [content] if isinstance(content, str) else content or []
        refusal = {"type": "refusal", "refusal": message["refusal"]}
        content = [*_expect(parts, list, f"{path}.content"), refusal]
    yield {"type": "message", "role": role, "content": content}, path
    if role != "assistant":
        return
    calls = _expect(message.get("tool_calls") or [], list, f"{path}.tool_calls")
    made = [(call, f"{path}.tool_calls[{number}]") for number, call in enumerate(calls)]
    if message.get("function_call") is not None:
        at = f"{path}.function_call"
        legacy = _expect(message["function_call"], dict, at)
        made.append(({**legacy, "type": "function", "id": f"call_fn_{legacy.get('name')}"}, at))
    for call, at in made:
        kind = _expect(call, dict, at).get("type") or "function"
        item_kind = _NAMED_TOOLS[_one_of(_NAMED_TOOLS, kind, f"{at}.type")]
        call_id, field = _named(call, "id", f"{at}."), _CALL_FIELDS[item_kind]
        call, at = _flat({**call, "type": kind}, at)
        item = {"type": item_kind, "call_id": call_id, "name": call.get("name")}
        yield {**item, field: call.get(field)}, at


# ---- Upstream events -> answer: what both protocols share ----------------------------------------


class _Channel(NamedTuple):
    """How one kind of growing text travels upstream: `response.<event>.delta` and `.done`."""

    name: str  # the `type` of its part; a call has one text and no parts: the item's field
    event: str
    text: str  # the field with the whole text, in the done event and in the part or item
    chat: str  # the field of a chat delta
    group: str  # the items that have it, as events find them
    place: str = ""  # the item's list of such parts; `<place>_index` numbers them in events


_CHANNELS = {
    row.split()[0]: _Channel(*row.split())
    for row in (
        "arguments function_call_arguments arguments tool_calls call",
        "input custom_tool_call_input input tool_calls call",
        "output_text output_text text content message content",
        "reasoning_text reasoning_text text reasoning_content reasoning content",
        "refusal refusal refusal refusal message content",
        "summary_text reasoning_summary_text text reasoning_content reasoning summary",
    )
}
_DELTAS = {f"response.{channel.event}.delta": channel for channel in _CHANNELS.values()}
_WHOLES = {f"response.{channel.event}.done": channel for channel in _CHANNELS.values()}
_PART_DONE = ("response.content_part.done", "response.reasoning_summary_part.done")
_LIFECYCLE = ("response.created", "response.in_progress", "response.queued")
_CALLS = {"custom_tool_call": _CHANNELS["input"], "function_call": _CHANNELS["arguments"]}


def _group(value: Json) -> str:
    """Items of one group may answer to the same event keys."""
    kind = _get(value, "type", str)
    return "call" if kind in _CALLS else kind


@dataclass(slots=True)
class _Part:
    """One growing text: the inside of its JSON string literal, in pieces as they came."""

    channel: _Channel
    index: int = 0
    pieces: list[bytes] = field(default_factory=list)
    unsaid: int = 0  # how many of the last pieces the client has not got yet
    whole: str = ""  # the newest snapshot
    annotations: list[Json] = field(default_factory=list)
    opened: bool = False  # Responses: its part was announced
    closed: bool = False  # Responses: so was its end
    start: int = 0  # chat: where it begins in the whole content, in code points

    def text(self, last: int = 0) -> str:
        """All of it, or what the last pieces say."""
        return cast(str, json.loads(b'"' + b"".join(self.pieces[-last:]) + b'"'))

    def learn(self, holder: Json) -> None:
        self.whole = _get(holder, self.channel.text, str) or self.whole
        # Each list is a snapshot of the same citations: only its surplus is new.
        self.annotations += _dicts(holder, "annotations")[len(self.annotations) :]

    def full(self) -> str:
        """The snapshot, unless it is only the beginning: calls may be announced with one."""
        text = self.text()
        return text if text.startswith(self.whole) else self.whole

    def value(self) -> Json:
        """The part as the Responses API has it, with the lists that clients insist on."""
        is_answer = self.channel.name == "output_text"
        lists = {"annotations": list(self.annotations), "logprobs": []} if is_answer else {}
        return {"type": self.channel.name, self.channel.text: self.full(), **lists}


@dataclass(slots=True, eq=False)
class _Item:
    """One output item, as far as it is known."""

    group: str
    id: str = ""
    call_id: str = ""
    name: str = ""  # of a call, as the client named the tool
    value: Json = field(default_factory=dict)  # all that snapshots told
    parts: dict[tuple[str, int], _Part] = field(default_factory=dict)
    index: int = -1  # its place in the answer, once it is announced
    done: bool = False

    def part(self, channel: _Channel | None = None, index: int = 0) -> _Part:
        """A text of the item; without a channel the one of a call that has a name."""
        channel = channel or _CALLS[self.value["type"]]
        return self.parts.setdefault((channel.name, index), _Part(channel, index))

    def texts(self) -> list[_Part]:
        return sorted(
            self.parts.values(), key=lambda part: (part.channel.place != "summary", part.index)
        )

    def learn(self, value: Json) -> None:
        """Take in a snapshot. Quirk: it may lack what an older one had (R02_output_empty)."""
        for name, new in value.items():
            is_news = new not in (None, "", [], {}) or name not in self.value
            if is_news and (name != "type" or isinstance(new, str)):
                self.value[name] = new
        if self.group == "call":
            self.part().learn(value)
        for place in ("content", "summary"):
            for index, holder in enumerate(_dicts(value, place)):
                channel = _CHANNELS.get(_get(holder, "type", str))
                if channel and channel.place == place:
                    self.part(channel, index).learn(holder)


# What differs between deltas of one text. All that stands between must be as in the delta before;
# what is matched is canonical JSON, so that `json` would write the same bytes: no \u, no \/.
_VARYING = re.compile(
    rb'"delta":"((?!")[^"\\\x00-\x1f]*+(?:\\["\\bfnrt][^"\\\x00-\x1f]*+)*+)"'
    rb'|"obfuscation":"[ !#-\[\]-~]*+"|"sequence_number":(?:0|[1-9]\d{0,14})(?=[,}])'
)


class _EventStream:
    """Upstream events -> one answer in the order that clients want, for both protocols.

    Whatever upstream leaves out or repeats, a protocol sees each item `_added`, its new texts in
    `_say`, each of them in `_settle` and the item `_closed` when they are complete, then
    `_conclude`. What these put into `_out` is encoded.
    Fast path: after a delta whose `_say` did nothing but wrap the text (it sets `_plain`), the text
    of a delta event that differs in nothing else is pasted into the same bytes.
    """

    _added: Callable[[_Item], None]
    _say: Callable[[_Item, _Part, str], None]
    _closed: Callable[[_Item, str], None]
    _conclude: Callable[[str], None]
    """Gets `completed`, `incomplete` or, with `failure` set, `failed`."""
    _encode: Callable[[Json], bytes]

    def __init__(self, request: Any, now: float, *, fast: bool = True) -> None:
        self.done = self.stopped = False
        self.failure: AztError | None = None
        self.usage: Json | None = None
        self.limits: Json | None = None
        self._request: Any = request  # what each protocol knows of the request
        self._now, self._fast = now, fast
        self._items: list[_Item] = []
        self._by_key: dict[tuple[str, str | int], _Item] = {}
        self._latest: dict[str, _Item] = {}
        self._opened: list[_Item] = []
        self._upstream: Json = {}
        self._out: list[Json] = []
        self._sequence = 0
        self._plain: _Part | None = None
        self._paste: Callable[[bytes], bytes | None] | None = None
        self._model: tuple[bytes, _Part, bytes] | None = None  # for `_arm`

    @property
    def outline(self) -> Json:
        """For the request log: how it ended and which tools it calls, no word of it."""
        calls = [item.name for item in self._items if item.group == "call"]
        reason = _as_object(self._upstream.get("incomplete_details")).get("reason")
        finish = reason or ("tool_calls" if calls else "stop" if self.done else None)
        return {"finish": finish, "toolCalls": calls[:20]}

    def feed(self, data: bytes) -> bytes:
        if self._model is not None:
            self._arm(*self._model)
        if self._paste is not None and (pasted := self._paste(data)) is not None:
            return pasted
        self._translate(data)
        encoded = [self._encode(chunk) for chunk in self._out]
        if self._fast and self._plain is not None and not self.done:
            self._model = data, self._plain, encoded[-1]
        return b"".join(encoded)

    def absorb(self, data: bytes) -> bytes:
        """The same for an answer that is only wanted whole: deltas that are alike count as one."""
        if self._model is not None:
            self._arm(*self._model)
        if self._paste is not None and self._plain is not None and self._paste(data) is not None:
            self._plain.unsaid += 1
            return b""
        for item in self._opened if self._paste is not None else ():
            self._speak(item)
        self._translate(data)
        if self._fast and self._plain is not None and not self.done:
            self._model = data, self._plain, b'"%b"' % self._plain.pieces[-1]
        return b""

    def _translate(self, data: bytes) -> None:
        """One event into `_out`. What nobody handles is not decoded."""
        self._out, self._plain, self._paste, self._model = [], None, None, None
        handler = None if self.done else self._handlers.get(event_type(data))
        if handler and (event := parse_event(data)) is not None:
            getattr(self, handler)(event)

    def fail(self, error: AztError) -> bytes:
        self._out, self._paste, self._model = [], None, None
        if not self.done:
            self._failed({}, error)
        return b"".join(map(self._encode, self._out))

    def _arm(self, data: bytes, part: _Part, out: bytes) -> None:
        """Prepare the fast path for deltas like `data`, which became `out` and has left by now."""
        self._model = None
        split, pieces, literal = _VARYING.split, part.pieces, part.pieces[-1]
        known, quoted = split(data), b'"%s"' % literal
        # Every second one of `known` is a text, or None. A name in the chunk that is no valid
        # Unicode makes encode_json escape all of it: then nothing can be pasted.
        is_clear = data.count(b'"delta"') == out.count(quoted) == 1 and b"\\ud" not in out
        if not is_clear or literal not in known[1::2]:
            return
        at, size = known.index(literal, 1), len(known)
        known[at] = None
        head, _, tail = out.partition(quoted)
        start, numbered, head = head.rpartition(b'"sequence_number":%d' % (self._sequence - 1))

        def paste(data: bytes) -> bytes | None:
            found = split(data)
            if len(found) != size:
                return None
            literal, found[at] = found[at], None
            if literal is None or found != known:
                return None
            try:
                literal.isascii() or literal.decode()
            except UnicodeDecodeError:
                return None
            pieces.append(literal)
            number = b""
            if numbered:
                number = b'"sequence_number":%d' % self._sequence
                self._sequence += 1
            return start + number + head + b'"' + literal + b'"' + tail

        self._paste = paste

    # Finding items

    def _find(self, group: str, holder: Json, index: Any = None) -> _Item:
        """The item that an event or a snapshot is about: any of its keys may name it, an `item_id`
        outranks an index, and without any it is the latest of its group (openai-api.md 3.2)."""
        item_id = _get(holder, "item_id", str) or _get(holder, "id", str)
        call_id, index = _get(holder, "call_id", str), holder.get("output_index", index)
        keys: list[tuple[str, str | int]] = [(group, key) for key in (item_id, call_id) if key]
        if isinstance(index, int):
            keys.append((group, index))
        item = next((self._by_key[key] for key in keys if key in self._by_key), None)
        if item is None or (item.id and item_id not in ("", item.id)):
            item = self._latest.get(group)
            if item is None or (keys and item in self._by_key.values()):
                item = _Item(group)
                self._items.append(item)
        item.id, item.call_id = item.id or item_id, item.call_id or call_id
        self._by_key.update(dict.fromkeys(keys, item))
        self._latest[group] = item
        return item

    def _place(self, event: Json, channel: _Channel) -> tuple[_Item, _Part]:
        """Whose text an event is about."""
        item = self._find(channel.group, event)
        return item, item.part(channel, _get(event, f"{channel.place}_index", int))

    # Events

    def _remember(self, event: Json) -> None:
        """What the upstream says of the answer as a whole."""
        self._upstream |= _given(_without(_get(event, "response", dict), "output"))

    def _item_event(self, event: Json) -> None:
        value = _get(event, "item", dict)
        if _group(value):
            item = self._find(_group(value), value, event.get("output_index"))
            item.learn(value)
            if event["type"] == "response.output_item.added":
                self._open(item)
            elif item.parts or item.group != "message":  # an empty one may come in the output
                self._close(item, "completed")

    def _delta(self, event: Json) -> None:
        self._hear(*self._place(event, _DELTAS[event["type"]]), _get(event, "delta", str))

    def _whole(self, event: Json) -> None:
        """Quirk: deltas may be missing, or all of them (C08, C17, C18)."""
        holder = _get(event, "part", dict) or event
        channel = _WHOLES.get(event["type"]) or _CHANNELS.get(_get(holder, "type", str))
        if channel:
            item, part = self._place(event, channel)
            part.learn(holder)
            self._settle(item, part)

    def _cite(self, event: Json) -> None:
        _, part = self._place(event, _CHANNELS["output_text"])
        part.annotations.append(_get(event, "annotation", dict))

    def _end(self, event: Json) -> None:
        self._remember(event)
        self.usage = _get(self._upstream, "usage", dict) or None
        status, counts = event["type"].removeprefix("response."), dict[str, int]()
        for index, value in enumerate(_dicts(_get(event, "response", dict), "output")):
            group = _group(value)
            place = counts[group] = counts.get(group, -1) + 1
            alike = [item for item in self._items if item.group == group][place : place + 1]
            # One without an id goes by its place among those of its group.
            has_id = value.get("id") or value.get("call_id") or not alike
            item = self._find(group, value, index) if has_id else alike[0]
            item.learn(value)
            self._close(item, status)
        for item in self._items:
            self._close(item, status)
        self._conclude(status)
        self.done = True

    def _limits(self, event: Json) -> None:
        self.limits = event

    def _failed(self, event: Json, error: AztError | None = None) -> None:
        self.failure = error or event_error(event, self._now)
        self._conclude("failed")
        self.done = True

    _handlers = {  # event type -> method
        **dict.fromkeys(("error", "response.failed"), "_failed"),
        **dict.fromkeys(("response.completed", "response.incomplete"), "_end"),
        **dict.fromkeys(_LIFECYCLE, "_remember"),
        **dict.fromkeys(("response.output_item.added", "response.output_item.done"), "_item_event"),
        "response.output_text.annotation.added": "_cite",
        "codex.rate_limits": "_limits",
        **dict.fromkeys(_DELTAS, "_delta"),
        **dict.fromkeys((*_WHOLES, *_PART_DONE), "_whole"),
    }

    # Items and their texts

    def _open(self, item: _Item) -> bool:
        """Announce the item, then say what is new of it. False while a call has no name yet.

        Quirk: arguments may come before the item that names the call (C13_arguments_before_item).
        """
        if item.index < 0:
            name = _get(item.value, "name", str)
            if item.group == "call" and not name:
                return False
            item.name = self._request.tool_names.get(name, name)
            item.value.setdefault("type", item.group)
            item.index = len(self._opened)
            self._opened.append(item)
            self._added(item)
        self._speak(item)
        return True

    def _hear(self, item: _Item, part: _Part, text: str) -> None:
        if text and not item.done:
            part.pieces.append(encode_json(text)[1:-1])
            part.unsaid += 1
            self._open(item)

    def _speak(self, item: _Item) -> None:
        for part in item.texts():
            if part.unsaid:
                text, part.unsaid = part.text(part.unsaid), 0
                self._say(item, part, text)

    def _settle(self, item: _Item, part: _Part) -> None:
        """Hear what the snapshot adds; nothing if it differs, as deltas only append."""
        said = part.text() if part.whole else ""
        if part.whole.startswith(said):
            self._hear(item, part, part.whole[len(said) :])

    def _close(self, item: _Item, status: str) -> None:
        """What was not said of the item, then its end. `status` is for one that has none."""
        if item.done or not self._open(item):
            return
        own = item.value.get("status")
        status = status if own in (None, "in_progress") else own
        if item.value["type"] == "function_call" and status != "incomplete":
            part = item.part()
            part.whole = part.whole or ("" if part.pieces else "{}")  # clients parse it as JSON
        for part in item.texts():
            self._settle(item, part)
        item.done = True
        self._closed(item, status)

    # The answer as a whole

    def _created_at(self) -> int:
        at = self._upstream.get("created_at")
        return int(at if isinstance(at, (int, float)) and 0 <= at < 1e12 else self._now)

    def _counted(self) -> Json:
        """Usage in upstream's shape; an estimate at four bytes a token where it sent none."""
        if self.usage:
            return self.usage
        asked = estimate_input_tokens(self._request.upstream)
        parts = [part for item in self._items for part in item.parts.values()]
        said = math.ceil(sum(len(piece) for part in parts for piece in part.pieces) / 4)
        return {"input_tokens": asked, "output_tokens": said, "total_tokens": asked + said}


# ---- Chat ----------------------------------------------------------------------------------------


class StopMatcher:
    """Visible text -> the part of it that may be sent (openai-api.md 1.11).

    Keeps back what may be the beginning of a stop string; `hit` once one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit, self._stops, self._pending = False, stops, ""

    def push(self, text: str, *, is_last: bool = False) -> str:
        text = self._pending + text
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        end = len(text) if is_last else len(text) - max(begun, default=0)
        # A longer stop string that began earlier comes first: wait until it is complete or is not.
        self.hit = 0 <= found <= end
        end = found if self.hit else end
        self._pending = "" if self.hit else text[end:]
        return text[:end]

    def flush(self) -> str:
        return self.push("", is_last=True)


# Why an answer is incomplete -> finish_reason; every other reason counts as a normal end.
_FINISH_REASONS = dict.fromkeys(("max_output_tokens", "max_tokens"), "length")
_FINISH_REASONS["content_filter"] = "content_filter"
# Upstream request field (as a prefix of the error's param) -> the field of the chat client.
_CHAT_PARAMS = {
    **dict.fromkeys(("input", "instructions"), "messages"),
    **{"reasoning.effort": "reasoning_effort", "text.format": "response_format"},
    "text.verbosity": "verbosity",
}
_SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")


class ChatStream(_EventStream):
    """Upstream events -> Chat Completions chunks, or their fold (openai-api.md 2, 3).

        nothing sent --first delta--> role sent --deltas--> finish, usage, [DONE]
              \\_______________failure_______\\___________> error event, no [DONE]

    Calls go out one at a time in the order in which they got a name: the last of `_calls` streams,
    those in `_queue` wait.
    mapped   text, refusals, reasoning, function and custom calls, citations, images, usage
    dropped  hosted tool progress, partial images, encrypted reasoning, vendor events
    """

    _request: ChatRequest

    def __init__(self, request: ChatRequest, now: float, *, fast: bool = True) -> None:
        super().__init__(request, now, fast=fast)
        self._envelope: Json = {}
        self._stops = StopMatcher(request.stop)
        self._last: dict[str, tuple[_Item, _Part]] = {}
        self._calls: list[_Item] = []
        self._queue: list[_Item] = []
        self._finish_reason = ""
        names = ("content", "refusal", "reasoning_content", "annotations", "images")
        self._said: dict[str, list[Any]] = {name: [] for name in names}

    # What goes out

    def _encode(self, chunk: Json) -> bytes:
        return encode_data(chunk) if chunk else b"data: [DONE]\n\n"

    def _emit(self, delta: Json, finish_reason: str | None = None) -> None:
        if self.done:
            return
        if not self._envelope:
            upstream_id = _get(self._upstream, "id", str).removeprefix("resp_")
            self._envelope = {
                "id": f"chatcmpl-{upstream_id or secrets.token_hex(12)}",
                "object": "chat.completion.chunk",
                "created": self._created_at(),
                "model": self._request.model,
            }
            has_text = not {"function_call", "refusal", "tool_calls"} & delta.keys()
            self._emit({"role": "assistant", "content": "" if has_text else None})
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        self._out.append({**self._envelope, "choices": [choice], "system_fingerprint": None})
        for name in delta.keys() & self._said.keys():
            self._said[name] += [delta[name]] if delta[name] else []

    def _finish(self, reason: str) -> None:
        if not self.done:
            self._finish_reason = reason
            self._emit({}, reason)
            if self._request.include_usage:
                usage = {"choices": [], "usage": usage_from(self._counted())}
                self._out.append({**self._envelope, **usage, "system_fingerprint": None})
            self._out.append({})
            self.done = True

    def _say(self, item: _Item, part: _Part, text: str) -> None:
        name = part.channel.chat
        if name == "content" and self._is_aside(item):
            name = "reasoning_content"
        if name == "tool_calls":
            self._emit_call(text)
        elif name == "reasoning_content" and not self._request.show_reasoning:
            return
        else:
            text = self._gap(name, item, part) + text
            if name == "content" and self._request.stop:
                self._say_allowed(self._stops.push(text))
                return
            self._emit({name: text})
        self._plain = part

    def _say_allowed(self, text: str) -> None:
        """Content that passed the stop strings; the answer ends with the first of them."""
        if text:
            self._emit({"content": text})
        if self._stops.hit and not self.done:
            self.stopped = True
            self._finish("stop")

    def _is_aside(self, item: _Item) -> bool:
        """Commentary in front of JSON would make the content unreadable (openai-api.md 4.7)."""
        return self._request.json_format and item.value.get("phase") == "commentary"

    def _gap(self, name: str, item: _Item, part: _Part) -> str:
        """The blank line before a new message, or before every new part of the reasoning."""
        gap = ""
        if len(part.pieces) == 1:
            if name in self._last:
                before, last = self._last[name]
                said = last.text()
                goes_on = before is item or said.endswith("\n")
                gap = "" if goes_on and name != "reasoning_content" else "\n\n"
                part.start = last.start + len(said) + len(gap)
            self._last[name] = item, part
        return gap

    # Calls

    def _added(self, item: _Item) -> None:
        # The legacy answer has room for one call.
        is_full = self._request.legacy_functions and (self._calls or self._queue)
        if item.group == "call" and not is_full:
            item.call_id = item.call_id or item.id or f"call_{secrets.token_hex(12)}"
            self._queue.append(item)
            self._drain()

    def _speak(self, item: _Item) -> None:
        if item.group != "call" or item in self._calls[-1:]:
            super()._speak(item)

    def _drain(self) -> None:
        """When the streaming call is finished, start the next one with what was heard of it.

        Quirk: parallel calls may come interleaved (C11_interleaved_calls).
        """
        while self._queue and not self.done and not (self._calls and not self._calls[-1].done):
            self._say_allowed(self._stops.flush())
            if not self.done:
                self._calls.append(self._queue.pop(0))
                self._emit_call("", is_first=True)
                self._speak(self._calls[-1])

    def _closed(self, item: _Item, status: str) -> None:
        self._drain()

    def _call(self, call: _Item, text: str) -> Json:
        # A flat custom tool is a function to its client, as no SDK reads custom chunks.
        is_custom = call.value["type"] == "custom_tool_call"
        is_custom = is_custom and call.name in self._request.custom_nested
        kind, field = ("custom", "input") if is_custom else ("function", "arguments")
        return {"id": call.call_id, "type": kind, kind: {"name": call.name, field: text}}

    def _emit_call(self, text: str, *, is_first: bool = False) -> None:
        """Emit a delta of the call that streams."""
        call = self._call(self._calls[-1], text)
        if not is_first:
            del call[call["type"]]["name"], call["type"], call["id"]
        if self._request.legacy_functions:
            self._emit({"function_call": call["function"]})
        else:
            self._emit({"tool_calls": [{"index": len(self._calls) - 1, **call}]})

    # The end

    def _conclude(self, status: str) -> None:
        if self.failure is not None:
            param = self.failure.param or ""
            renamed = (ours for theirs, ours in _CHAT_PARAMS.items() if param.startswith(theirs))
            self.failure.param = next(renamed, self.failure.param)
            self._out.append(error_body(self.failure))
            return
        asides = (item.texts() for item in self._opened if self._is_aside(item))
        aside = "\n\n".join(part.text() for texts in asides for part in texts)
        if aside and not self._calls and "content" not in self._last:
            self._emit({"content": aside})  # commentary, but there is nothing else
        self._say_allowed(self._stops.flush())
        citations: list[Json] = []
        images: list[Json] = []
        for item in self._items:
            for part in item.texts():
                for cited in part.annotations:
                    if cited.get("type") == "url_citation":
                        # Flat upstream, with offsets into the part; chat's count from the start.
                        told: Json = {name: _get(cited, name, str) for name in ("title", "url")}
                        for name in ("start_index", "end_index"):
                            told[name] = _get(cited, name, int) + part.start
                        citations.append({"type": "url_citation", "url_citation": told})
            if item.group == "image_generation_call" and _get(item.value, "result", str):
                kind = _get(item.value, "output_format", str) or "png"
                # Removed from the item: one of 20 MB should not be kept twice.
                url = f"data:image/{kind};base64,{item.value.pop('result')}"
                images.append({"type": "image_url", "image_url": {"url": url}})
        # All citations in one chunk, all images in one: SDK helpers cannot merge several.
        for name, values in (("annotations", citations), ("images", images)):
            if values:
                self._emit({name: values})
        normal = "function_call" if self._request.legacy_functions else "tool_calls"
        reason = _get(_get(self._upstream, "incomplete_details", dict), "reason", str)
        self._finish(_FINISH_REASONS.get(reason, normal if self._calls else "stop"))

    def result(self) -> Json:
        texts = ("content", "refusal", "reasoning_content")
        content, refusal, reasoning = ("".join(self._said[name]) for name in texts)
        calls = [self._call(call, call.part().text()) for call in self._calls]
        is_legacy = self._request.legacy_functions
        rest = {
            "reasoning_content": reasoning,
            "images": sum(self._said["images"], []),
            "function_call": calls[0]["function"] if calls and is_legacy else None,
            "tool_calls": [] if is_legacy else calls,
        }
        message: Json = {
            "role": "assistant",
            "content": content or (None if calls or refusal else ""),
            "refusal": refusal or None,
            "annotations": sum(self._said["annotations"], []),
            **{name: value for name, value in rest.items() if value},
        }
        tier = self._upstream.get("service_tier")
        tier = tier if tier in _SERVICE_TIERS else None
        choice = {"index": 0, "logprobs": None, "finish_reason": self._finish_reason}
        return {
            **self._envelope,
            "object": "chat.completion",
            "choices": [{**choice, "message": message}],
            "system_fingerprint": None,
            **_given({"metadata": self._request.metadata, "service_tier": tier}),
            "usage": usage_from(self._counted()),
        }


# --------------------------------------------------------------------------------------------------
# 11b. Responses
# --------------------------------------------------------------------------------------------------

_RESPONSES_IGNORED = "temperature top_p top_logprobs truncation max_tool_calls max_output_tokens"
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
_ECHO_DEFAULTS: Json = {
    **dict.fromkeys(
        ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id")
    ),
    **dict.fromkeys(("prompt_cache_key", "safety_identifier", "user")),
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
    """A translated Responses request: the upstream body, and all that the answer side must know."""

    model: str  # as the client named it
    upstream: Json
    stream: bool
    store: bool  # the client's view (absent means True); upstream never stores
    echo: Json  # the fields of the Response object that repeat the client's request
    tool_names: dict[str, str]  # upstream tool name -> client's name, only where they differ
    input_items: list[Json]  # in client shape, earlier turns included, each item with an id
    show_encrypted: bool  # the client asked to see encrypted reasoning
    ignored: tuple[str, ...]  # parameters without effect upstream, for `x-azt-ignored-params`


class StoredResponse(NamedTuple):
    response: Json  # as the client got it
    input_items: list[Json]
    output_items: list[Json]  # with encrypted reasoning, also where the client did not see it
    size_bytes: int
    expires_at: float
    session: str = ""  # the cache key of its conversation, which the next turn goes on with


class ResponseStore:
    """Finished responses in memory, for `previous_response_id` and `item_reference`.

    Bounded by count, bytes and age; the oldest goes first. Never on disk: prompts are private.
    """

    def __init__(self) -> None:
        self._responses: dict[str, StoredResponse] = {}
        self._items: dict[str, tuple[str, Json]] = {}  # item id -> its newest response, the item
        self.size_bytes = 0

    def put(
        self, response: Json, inputs: list[Json], outputs: list[Json], now: float, session: str = ""
    ) -> None:
        """Remember a response under its id. One that exceeds the bound alone is not kept."""
        response_id = response["id"]
        self.delete(response_id)
        # Roughly the memory of its values, without encoding them.
        values = _walk([response, inputs, outputs])
        size = sum(100 + len(value) if isinstance(value, str) else 100 for value in values)
        if size <= STORED_RESPONSES_BYTES:
            self.size_bytes += size
            self._responses[response_id] = StoredResponse(
                response, inputs, outputs, size, now + STORED_RESPONSES_TTL_S, session
            )
            for item in (*inputs, *outputs):
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
            is_full = len(self._responses) > STORED_RESPONSES_MAX
            is_full = is_full or self.size_bytes > STORED_RESPONSES_BYTES
            if now < stored.expires_at and not is_full:
                return
            self.delete(oldest)


def _visible(item: Json, show_encrypted: bool) -> Json:
    is_whole = show_encrypted or item["type"] != "reasoning"
    return item if is_whole else _without(item, "encrypted_content")


def input_items_page(stored: StoredResponse, query: Mapping[str, str]) -> Json:
    """One page of GET /v1/responses/{id}/input_items: limit (1..100), order, after, include."""
    limit, after = query.get("limit", "20"), query.get("after")
    if not re.fullmatch(r"[1-9][0-9]?|100", limit):
        raise BadRequest("'limit' must be a number from 1 to 100.", "limit")
    order = _one_of(("asc", "desc"), query.get("order", "desc"), "order")
    items = stored.input_items[:: 1 if order == "asc" else -1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise BadRequest(f"No input item has the id {after[:100]!r}.", "after")
    rest = items[0 if after is None else ids.index(after) + 1 :]
    page = rest[: int(limit)]
    is_shown = REASONING_INCLUDE in query.get("include", "") + query.get("include[]", "")
    return {
        "object": "list",
        "data": [_visible(item, is_shown) for item in page],
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(rest) > len(page),
    }


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
    named, model, ignored = _checked(body, default_model, _RESPONSES_IGNORED)
    _expect(body.get("reasoning") or {}, dict, "reasoning")
    for name, reason in _RESPONSES_REFUSED.items():
        if body.get(name) not in (None, False):
            raise BadRequest(reason, name, "unsupported_parameter")
    stored, previous = None, body.get("previous_response_id")
    if previous is not None and (stored := store.get(previous, now)) is None:
        message = f"Previous response with id '{previous[:100]}' not found: azt keeps responses"
        message += " for a day at most. Send the whole input instead."
        raise BadRequest(message, "previous_response_id", "previous_response_not_found")
    said = _chain(body, stored, lambda item_id: store.item(item_id, now))
    flat = list(_flat_tools(body, "tools"))
    for (
        tool,
        _,
    ) in flat:  # functions are strict unless they say otherwise, where their schema can be
        if tool["type"] == "function" and tool.get("strict") is None:
            schema = _get(tool, "parameters", dict)
            tool["strict"] = "properties" in schema and all(map(_is_closed, _walk(schema)))
    tools = _Tools(flat)
    asked = {name: _first(body, places) for name, places in _ASKED.items()}
    upstream = _upstream_body(body, model, efforts.get(model, ()), said, tools, asked)
    include = [known for known in _INCLUDES if known in (body.get("include") or [])]
    upstream["include"] = [*dict.fromkeys((*include, REASONING_INCLUDE))]
    if stored and stored.session and not body.get("prompt_cache_key"):
        upstream["prompt_cache_key"] = stored.session
    echo = {name: body[name] for name in _ECHO_DEFAULTS if body.get(name) is not None}
    text = {"format": {"type": "text"}, "verbosity": "medium", **_given(_get(body, "text", dict))}
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
        ignored=ignored,
    )


def _is_closed(value: Any) -> bool:
    """Whether an object schema forbids extra properties and requires all that it has."""
    schema = value if isinstance(value, dict) else {}
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") != "object" and "properties" not in schema:
        return True
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    return schema.get("additionalProperties") is False and {*properties} <= {*map(str, required)}


def _chain(
    body: Json, stored: StoredResponse | None, find: Callable[[str], Json | None]
) -> tuple[str, list[_Placed]]:
    """(instructions, the earlier and the new items in client shape, each with an id)."""
    instructions, value = body.get("instructions") or "", body.get("input")
    if value is None and body.get("messages") is not None:
        instructions, new = _chat_items(body)
    else:
        new = list(_client_items([] if value is None and stored else value, find))
    earlier = stored.input_items + stored.output_items if stored else []
    # A client may send the previous id and, all the same, references to its items.
    known = {item["id"] for item in earlier}
    placed = ((_with_id(item), path) for item, path in new)
    chain = [(item, "previous_response_id") for item in earlier]
    return instructions, chain + [(item, path) for item, path in placed if item["id"] not in known]


def _new_id(kind: str) -> str:
    return f"{_ID_PREFIXES.get(kind, 'item')}_{secrets.token_hex(24)}"


def _with_id(item: Json) -> Json:
    """The item as `input_items` lists it: with an id, its content as parts."""
    item = {**item, "id": _get(item, "id", str) or _new_id(item["type"])}
    if item["type"] == "message" and isinstance(item.get("content"), str):
        said = "output_text" if item["role"] == "assistant" else "input_text"
        item["content"] = [{"type": said, "text": item["content"]}]
    return item


# What an item is when it is announced: its texts follow as deltas.
_BLANK_ITEMS: dict[str, Json] = {
    "custom_tool_call": {"status": "in_progress", "input": ""},
    "function_call": {"status": "in_progress", "arguments": ""},
    "message": {"status": "in_progress", "role": "assistant", "content": []},
    "reasoning": {"summary": []},
}
_LOGPROBS: dict[str, Json] = {"output_text": {"logprobs": []}}
_PART_EVENTS = {"content": "content_part", "summary": "reasoning_summary_part"}
# Official events that are passed on -> the type of their item.
_HOSTED = {
    f"response.{kind}{ending}": kind
    for kind, endings in {
        "compaction": ".compacting",
        "image_generation_call": ".in_progress .generating .partial_image .completed",
        "shell_call": "_command.added _command.delta _command.done",
        "shell_call_output": "_content.delta _content.done",
        "web_search_call": ".in_progress .searching .completed",
    }.items()
    for ending in endings.split()
}
# Our error code -> the one in the SDKs' type, where that says the same.
_SDK_CODES = {None: "server_error", "upstream_error": "server_error"}
# Fields of the upstream's response object that the client's request does not decide.
_FROM_UPSTREAM = ("completed_at", "incomplete_details", "service_tier", "tool_usage")


class ResponsesStream(_EventStream):
    """Upstream events -> Responses events as the SDK helpers demand them (openai-api.md 4.3 - 4.5).

        nothing sent --> created --> per item: added, deltas, done --> completed | incomplete
                            \\_________________failure______________> failed

    mapped   every official event, renumbered, missing ones made up; items with the client's tool
             names, made up ids, and an `output_index` in the order in which they appear
    dropped  vendor events and obfuscation; encrypted reasoning, unless the client asked for it;
             progress of `_REFUSED_TOOLS` and audio, which cannot come
    """

    _request: ResponsesRequest
    _encode = staticmethod(encode_event)
    response: Json
    """The final object, once `done`."""
    output_items: list[Json]
    """Its output with encrypted reasoning, for the store."""
    _head: Json = {}

    # What goes out

    def _send(self, kind: str, **fields: Any) -> None:
        if not self._sequence and kind != "response.created":
            self._send("response.created", response=self._response("in_progress", []))
        self._out.append({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1

    def _send_item(self, ending: str, item: _Item, value: Json) -> None:
        value = _visible(value, self._request.show_encrypted)
        self._send(f"response.output_item.{ending}", output_index=item.index, item=value)

    def _tell(self, item: _Item, part: _Part, kind: str, /, **fields: Any) -> None:
        """Send an event about a text."""
        place = part.channel.place
        index = {f"{place}_index": part.index} if place else {}
        self._send(kind, item_id=item.id, output_index=item.index, **index, **fields)

    def _response(self, status: str, output: list[Json]) -> Json:
        """The Response object: the client's own request back, and what became of it."""
        if not self._head:
            self._head = {
                "id": _get(self._upstream, "id", str) or f"resp_{secrets.token_hex(24)}",
                "object": "response",
                "created_at": self._created_at(),
            }
        came = {name: self._upstream[name] for name in _FROM_UPSTREAM if self._upstream.get(name)}
        return {
            **self._head,
            **dict.fromkeys(("completed_at", "error", "incomplete_details", "usage")),
            **self._request.echo,
            **came,
            **{"model": self._request.model, "output": output, "status": status},
        }

    # Items and their texts

    def _added(self, item: _Item) -> None:
        item.id = item.id or _new_id(item.value["type"])
        item.call_id = item.call_id or item.id
        blank = _BLANK_ITEMS.get(item.value["type"], {"status": "in_progress"})
        self._send_item("added", item, {**self._complete(item, "in_progress"), **blank})

    def _closed(self, item: _Item, status: str) -> None:
        item.value = self._complete(item, status)
        self._send_item("done", item, item.value)

    def _complete(self, item: _Item, status: str) -> Json:
        """The item with all that its type must have, gaps filled, under the client's names."""
        blank = _BLANK_ITEMS.get(item.value["type"], {})
        gaps = {name: value for name, value in blank.items() if not item.value.get(name)}
        whole: Json = {**item.value, **gaps, "id": item.id}
        if item.group == "call":
            part = item.part()
            whole |= {"call_id": item.call_id, "name": item.name, part.channel.text: part.full()}
        for place in _PART_EVENTS:
            parts = [part.value() for part in item.texts() if part.channel.place == place]
            whole |= {place: parts} if parts else {}
        if item.group != "reasoning" and whole.get("status") in (None, "in_progress"):
            whole["status"] = status
        return whole

    def _say(self, item: _Item, part: _Part, text: str) -> None:
        self._open_part(item, part)
        logprobs = _LOGPROBS.get(part.channel.name, {})
        self._tell(item, part, f"response.{part.channel.event}.delta", delta=text, **logprobs)
        self._plain = part

    def _open_part(self, item: _Item, part: _Part) -> None:
        name = _PART_EVENTS.get(part.channel.place)
        if name and not part.opened:
            part.opened = True
            self._tell(item, part, f"response.{name}.added", part=_Part(part.channel).value())

    def _settle(self, item: _Item, part: _Part) -> None:
        super()._settle(item, part)
        if part.closed or item.done or not self._open(item):
            return
        part.closed = True
        self._open_part(item, part)
        channel = part.channel
        fields = {channel.text: part.full(), **_LOGPROBS.get(channel.name, {})}
        if channel.name == "arguments":
            fields["name"] = item.name
        self._tell(item, part, f"response.{channel.event}.done", **fields)
        if name := _PART_EVENTS.get(channel.place):
            self._tell(item, part, f"response.{name}.done", part=part.value())

    # Events

    def _remember(self, event: Json) -> None:
        super()._remember(event)
        # The first event is always `created`, and there is only one.
        if event["type"] in _LIFECYCLE[bool(self._sequence) :]:
            self._send(event["type"], response=self._response("in_progress", []))

    def _cite(self, event: Json) -> None:
        item, part = self._place(event, _CHANNELS["output_text"])
        if not item.done and self._open(item):
            self._open_part(item, part)
            index, annotation = len(part.annotations), _get(event, "annotation", dict)
            self._tell(item, part, event["type"], annotation_index=index, annotation=annotation)
        super()._cite(event)

    def _pass_on(self, event: Json) -> None:
        fields = _without(event, "obfuscation", "sequence_number", "type")
        kind = _HOSTED[event["type"]]
        if kind != "compaction":
            item = self._find(kind, event)
            self._open(item)
            fields |= {"item_id": item.id, "output_index": item.index}
        self._send(event["type"], **fields)

    _handlers = {**_EventStream._handlers, **dict.fromkeys(_HOSTED, "_pass_on")}

    # The end

    def _conclude(self, status: str) -> None:
        self.output_items = [self._complete(item, "incomplete") for item in self._opened]
        is_shown = self._request.show_encrypted
        response = self._response(status, [_visible(item, is_shown) for item in self.output_items])
        self.response = response
        if self.failure is not None:
            code = _SDK_CODES.get(self.failure.code, self.failure.code)
            response["error"] = {"code": code, "message": mask(self.failure.message)}
        else:
            usage = self._counted()
            counts = usage_from(usage)  # the SDK types require them all
            cached = {"cached_tokens": 0, "cache_write_tokens": 0}
            response["usage"] = {
                **usage,
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": cached | _get(usage, "input_tokens_details", dict),
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0}
                | _get(usage, "output_tokens_details", dict),
                "total_tokens": counts["total_tokens"],
            }
        if status == "completed" and not response["completed_at"]:
            response["completed_at"] = max(int(self._now), response["created_at"])
        self._send(f"response.{status}", response=response)

    def result(self) -> Json:
        return self.response


# --------------------------------------------------------------------------------------------------
# 11c. Images
# --------------------------------------------------------------------------------------------------

IMAGES_MAX, REFERENCES_MAX, REFERENCE_BYTES = 4, 16, 50 * MIB
_IMAGE_CHOICES = {"background": "auto opaque transparent", "input_fidelity": "high low"}
_IMAGE_CHOICES |= {"moderation": "auto low", "output_format": "png jpeg webp"}
_IMAGE_CHOICES |= {"quality": "auto low medium high xhigh max hd standard"}
_IMAGE_CHOICES |= {"response_format": "b64_json url"}
IMAGE_NUMBERS = {"n": (1, 10), "output_compression": (0, 100), "partial_images": (0, 3)}
_SIZES = ("auto", "1024x1024", "1024x1536", "1536x1024")
# What many programs ask for because DALL-E had it.
_OLD_SIZES = {"1024x1792": "1024x1536", "1792x1024": "1536x1024"}
_OLD_SIZES |= dict.fromkeys(("256x256", "512x512"), "1024x1024")
_OLD_QUALITIES = {"hd": "high", "standard": "medium"}
_BASE64_IMAGES = {"/9j/": "jpeg", "UklGR": "webp", "iVBORw0KGgo": "png"}  # how bare base64 begins
_LOOKS = ("background", "output_format", "quality", "size")
_NO_TOOL = re.compile(r"(?is)image_generation.*(not |unsupported)|unsupported.*image_generation")


@dataclass(slots=True)
class PictureRequest:
    """A checked request of the Images API, for whichever way upstream makes the pictures."""

    prompt: str
    n: int
    looks: Json  # what the image tool is told (model, size, ...), without what is its default
    images: list[str]  # data and https URLs to start from; none: a new picture
    mask: str | None
    stream: bool
    as_url: bool
    session: str
    ignored: tuple[str, ...]  # parameters without effect upstream, for `x-azt-ignored-params`
    fields: tuple[str, ...]  # where each of `images` and then the mask was given, for errors
    tool_names: ClassVar[dict[str, str]] = {}


def images_to_request(body: Json, is_edit: bool) -> PictureRequest:
    """Images request (JSON, or the fields of a form as such) -> what is wanted.

    mapped   all other fields; sizes, qualities and names of DALL-E become the nearest of today
    dropped  style, user, safety_identifier; what has no effect there: previews without a stream,
             compression of PNG, input_fidelity of gpt-image-2 and of new pictures
    refused  n above 4, or above 1 with stream; pictures that are no PNG, JPEG or WebP
    """
    if len(prompt := _named(body, "prompt")) > 32_000:
        raise BadRequest("'prompt' takes at most 32000 characters.", "prompt")
    named = model = _expect(body.get("model") or IMAGE_MODEL, str, "model")
    if not re.fullmatch(r"gpt-image-(1|1-mini|1\.5|2.*)|chatgpt-image-latest", named):
        model = IMAGE_MODEL
        if not named.startswith(("dall-e-", "gpt-image-")):
            raise BadRequest(f"{named[:80]!r} makes no pictures: use {IMAGE_MODEL!r}.", "model")
    for name, words in _IMAGE_CHOICES.items():
        _one_of(words.split(), body.get(name), name)
    for name, (low, high) in IMAGE_NUMBERS.items():
        if body.get(name) is not None and not low <= _expect(body[name], int, name) <= high:
            raise BadRequest(f"'{name}' must be {low} to {high}.", name)
    stream, n = _expect(body.get("stream") or False, bool, "stream"), body.get("n") or 1
    if n > (1 if stream else IMAGES_MAX):
        message = f"azt makes {IMAGES_MAX} pictures at once at most, and 1 in a stream."
        raise BadRequest(message, "n", "unsupported_value")
    kind, quality = body.get("output_format") or "png", body.get("quality")
    idle = ["safety_identifier", "style", "user"]
    idle += ["input_fidelity"] if not is_edit or model.startswith("gpt-image-2") else []
    idle += ["output_compression"] if kind == "png" else []
    idle += [] if stream else ["partial_images"]
    told = {name: body.get(name) for name in (*_IMAGE_CHOICES, *IMAGE_NUMBERS)} | {"model": model}
    told |= {"quality": _OLD_QUALITIES.get(str(quality), quality)}
    told |= {"size": _size(_expect(body.get("size") or "auto", str, "size"), model)}
    looks = _without(told, "n", "response_format", *idle)
    looks = {name: one for name, one in looks.items() if one not in (None, "auto", "png")}
    given = _references(body) if is_edit else {}
    images, mask = [*given.values()], None
    if is_edit and body.get("mask") is not None:
        field, mask = _reference(body["mask"], "mask")
        given |= {field: mask}
    session = str(uuid.UUID(_digest([prompt, body.get("user")])[:32]))
    ignored = tuple(name for name in idle if body.get(name))
    as_url = body.get("response_format") == "url"
    fields = tuple(given)
    return PictureRequest(prompt, n, looks, images, mask, stream, as_url, session, ignored, fields)


def _size(size: str, model: str) -> str:
    """The size that upstream takes: any within the limits of gpt-image-2, else one of three."""
    pixels = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size)
    if pixels and model.startswith("gpt-image-2"):
        short, long = sorted(map(int, pixels.groups()))
        has_shape = short % 16 == long % 16 == 0 and long <= min(3840, 3 * short)
        if has_shape and 655_360 <= short * long <= 8_294_400:
            return size
    if (size := _OLD_SIZES.get(size, size)) in _SIZES:
        return size
    message = f"'size' must be one of {', '.join(_SIZES)}, or within the limits of gpt-image-2."
    raise BadRequest(message, "size")


def _references(body: Json) -> dict[str, str]:
    """Parameter -> the picture that it gives."""
    given, param = _first(body, "image images")
    if not isinstance(given, list) or not given:
        return dict([_reference(given or None, param)])
    if len(given) > REFERENCES_MAX:
        raise BadRequest(f"At most {REFERENCES_MAX} pictures can be edited at once.", param)
    return dict(_reference(one, f"{param}[{index}]") for index, one in enumerate(given))


def _reference(value: Any, param: str) -> tuple[str, str]:
    """A picture as a URL that upstream takes, https or data, after the parameter that gives it."""
    if isinstance(value, dict):
        value, param = value.get("image_url"), f"{param}.image_url"
    url = _expect(value or None, str, param)
    kind = picture_kind(url)
    url = f"data:image/{kind};base64,{url}" if kind else url
    if len(url) > REFERENCE_BYTES * 4 // 3 + 100:
        raise BadRequest("A picture has 50 MiB at most.", param, "request_too_large", status=413)
    if re.match(r"(?i)data:image/(png|jpe?g|webp);base64,", url):
        return param, _data_url(url, param, "invalid_base64_image")
    if url[:8].lower() != "https://":
        raise BadRequest(f"'{param}' must be a PNG, JPEG or WebP, or an https link to one.", param)
    return param, url


def picture_kind(data: str) -> str:
    """ "png", "jpeg" or "webp", by how the base64 begins; "" for anything else."""
    return next((kind for start, kind in _BASE64_IMAGES.items() if data.startswith(start)), "")


def picture_to_web(asked: PictureRequest) -> ImageRequest:
    """What the ChatGPT web site is asked for. Raises BadRequest for a link."""
    urls = [*asked.images, asked.mask] if asked.mask else asked.images
    pictures = [picture_content(*one) for one in zip(urls, asked.fields, strict=True)]
    mask = pictures.pop() if asked.mask else None
    size = asked.looks.get("size", "auto")
    return ImageRequest(asked.prompt, size, asked.n, tuple(pictures), mask)


def picture_to_direct(asked: PictureRequest) -> Json | None:
    """The body of the backend's own image endpoints; None where something is wanted that Codex
    never sends there: they may ignore it, the tool is known to take it (codex-upstream.md 9.4)."""
    fields = {name: asked.looks.get(name, "auto") for name in ("background", "quality", "size")}
    fields |= {"prompt": asked.prompt, "model": asked.looks["model"]}
    has_links = any(not url.startswith("data:") for url in asked.images)
    if asked.stream or asked.mask or has_links or asked.looks.keys() - fields.keys():
        return None
    images = [{"image_url": url} for url in asked.images] or None
    return _given(fields | {"n": asked.n if asked.n > 1 else None, "images": images})


def picture_to_responses(asked: PictureRequest, model: str) -> Json:
    """A Responses request in which `model` has nothing to do but to call the image tool."""
    tool = {"type": "image_generation", "action": "edit" if asked.images else "generate"}
    mask = {"input_image_mask": {"image_url": asked.mask}} if asked.mask else {}
    parts = [{"type": "input_image", "image_url": url} for url in asked.images]
    content = [{"type": "input_text", "text": asked.prompt}, *parts]
    told = "Call the image_generation tool exactly once, with the user's prompt unchanged."
    return {
        **{"model": model, "instructions": told, "store": False, "stream": True},
        "input": [{"type": "message", "role": "user", "content": content}],
        "tools": [{**tool, **asked.looks, **mask}],
        "tool_choice": {"type": "image_generation"},
        "prompt_cache_key": asked.session,
    }


def image_error(error: AztError) -> AztError:
    """The error itself, in the words of the Images API."""
    if error.code in ("content_policy_violation", "moderation_blocked"):
        error.code, error.type = "moderation_blocked", "image_generation_user_error"
    elif error.status in (400, 403) and _NO_TOOL.search(error.message):
        error.status, error.code = 403, "image_generation_unavailable"
        error.message += " Use an account whose plan makes pictures: `azt accounts use ACCOUNT`."
    if error.param:  # `tools[0].size`, say
        error.param = "prompt" if error.param == "input" else error.param.rpartition(".")[2]
    return error


def image_answer(
    asked: PictureRequest, created: int, pictures: list[Json], about: Json, usages: list[Json]
) -> Json:
    """The whole answer. `pictures`, `about` and `usages` are as upstream told them."""
    looks = {name: about[name] for name in _LOOKS if about.get(name) not in (None, "", "auto")}
    start = f"data:image/{looks.get('output_format', 'png')};base64," if asked.as_url else ""
    name, data = "url" if asked.as_url else "b64_json", []
    for one in pictures:
        picture = {name: start + (one.get("result") or one["b64_json"])}
        data.append(picture | _given({"revised_prompt": one.get("revised_prompt")}))
    usage = {"usage": image_usage(usages)} if any(usages) else {}
    return {"created": created, **looks, "data": data, **usage}


def image_usage(usages: list[Json]) -> Json:
    """The sums, with all counts that the SDK types require."""
    names = ("input_tokens", "output_tokens", "total_tokens")
    whole: Json = {name: sum(_get(one, name, int) for one in usages) for name in names}
    for side in ("input_tokens_details", "output_tokens_details"):
        told, kinds = [_get(one, side, dict) for one in usages], ("image_tokens", "text_tokens")
        whole[side] = {kind: sum(_get(one, kind, int) for one in told) for kind in kinds}
    return whole


class ImageStream(_EventStream):
    """Upstream events of one call of the image tool -> events of the Images API, or the answer.

    mapped   previews, the picture with what it looks like, the usage of the tool
    dropped  progress, reasoning; text, unless it is all that came: then it is the reason
    """

    _request: PictureRequest
    _preview: Json = {}

    def _added(self, *about: Any) -> None:
        """Nothing is told of an item before the end."""

    _say = _closed = _added

    @property
    def picture(self) -> Json:
        calls = (item.value for item in self._items if item.group == "image_generation_call")
        return next((one for one in calls if one.get("result")), {})

    @property
    def tool_usage(self) -> Json:
        return _get(_get(self._upstream, "tool_usage", dict), "image_gen", dict)

    def _encode(self, event: Json) -> bytes:
        return b"event: error\n" + encode_data(event) if "error" in event else encode_event(event)

    def _emit(self, step: str, picture: Json, more: Json) -> None:
        asked = self._request
        if asked.stream:
            known = {"output_format": "png", **asked.looks, **_given(picture)}
            looks: Json = {name: known.get(name, "auto") for name in _LOOKS}
            looks["created_at"] = self._created_at()
            kind = f"image_{'edit' if asked.images else 'generation'}.{step}"
            self._out.append({"type": kind, "b64_json": picture["result"], **looks, **more})

    def _show_preview(self, event: Json) -> None:
        self._preview = {**event, "result": event.get("partial_image_b64")}
        index = {"partial_image_index": _get(event, "partial_image_index", int)}
        self._emit("partial_image", self._preview, index)

    _preview_type = "response.image_generation_call.partial_image"
    _handlers = {**_EventStream._handlers, _preview_type: "_show_preview"}

    def _conclude(self, status: str) -> None:
        if not self._items and self._preview and self.failure is None:  # better than nothing
            self._find("image_generation_call", {}).learn(self._preview)
        if self.picture:
            self.failure = None  # what broke after it does not matter
            self._emit("completed", self.picture, {"usage": image_usage([self.tool_usage])})
            return
        told = [error for item in self._items if (error := _get(item.value, "error", dict))]
        said = "".join(part.full() for item in self._items for part in item.texts()).strip()
        reason = no_picture(said, "moderation_blocked" if said else "image_generation_failed")
        reason = event_error({"error": told[0]}, self._now) if told else reason
        self.failure = image_error(self.failure or reason)
        self._out += [error_body(self.failure)] if self._request.stream else []

    def result(self) -> Json:
        picture, usage = self.picture, self.tool_usage
        return image_answer(self._request, self._created_at(), [picture], picture, [usage])


# ==================================================================================================
# 12. Rotation
#     Chooses an account, tries it, refreshes its token, and says what may be tried again. Takes no
#     HTTP request and returns no HTTP reply.
# ==================================================================================================

STICKY_MAX, STICKY_KEY_MAX, SWITCHES_MAX = 10_000, 128, 200
TRIED_ACCOUNTS_MAX, LAST_TRY_S, TRY_JITTER_S = 3, 20.0, 0.1
REST_S = {"account": 300, "transient": 30}  # where the failure does not tell how long


@dataclass(slots=True)
class Turn:
    """One model request to its end, whatever protocol asked for it.

    body        the encoded upstream request: kept as bytes, because another attempt may send it
    session     stable per conversation, for the upstream's caches
    translator  what a `Relay` of `open_turn` writes through; a passthrough needs none
    on_news     told when `account` or `attempts` has changed
    keys        what names the conversation (its session, an earlier response, a Codex thread): it
                stays with one account while that one can serve
    pinned      the id of the account that a person chose for this turn: no other is tried
    """

    body: bytes = field(repr=False)
    session: str
    streaming: bool = True
    translator: Callable[[], Translator] | None = None
    on_news: Callable[[Turn], None] = lambda turn: None
    keys: tuple[str, ...] = ()
    pinned: str = ""
    account: Account | None = None
    attempts: int = 0
    tries: list[Json] = field(default_factory=list)  # for the request log: of each attempt
    left: str = ""  # the id of the conversation's own account, where another one is tried


@dataclass(frozen=True, slots=True)
class Rules:
    """How to choose, out of the settings `autoSwitch.*`. Not enabled: one account serves."""

    enabled: bool = False
    order: str = "most_left"  # or soonest_reset, priority
    before_percent: int = 0
    excluded: frozenset[str] = frozenset()


# An account that rests for one of these reasons is not even asked; for any other it is asked last.
_RESTS_HARD = frozenset(("excluded", "quota_exhausted", "rate_limited"))
_RESTS_SHORT = "upstream_5xx"  # others stand in meanwhile: it stays the serving one


def hindrance(account: Account, now: float, rules: Rules) -> tuple[str, int]:
    """Why others come first, and until when (unix seconds; 0: until a person acts); ("", 0) is
    nothing. A wait whose time has come is none."""
    if account.rejected:
        return "login_rejected", 0
    if account.id in rules.excluded:
        return "excluded", 0
    if account.cooldown_until > now:
        return account.cooldown_reason, account.cooldown_until
    left, used = percent_left(account.quota, now), 100 - rules.before_percent
    if not 0 <= left <= rules.before_percent:
        return "", 0
    tight = (one["resets_at"] for one in account.quota["windows"] if one["used"] >= used)
    return "quota_low" if left else "quota_empty", max(tight)


def pick_account(
    accounts: Mapping[str, Account],
    now: float,
    rules: Rules,
    wanted: Sequence[str] = (),
    tried: Collection[str] = (),
) -> Account | None:
    """The account that serves next; None when none can.

    wanted  ids: the conversation's account, then the serving one, which alone may serve where the
            rules are not enabled. Each is taken while nothing hinders it; else the order decides.
    tried   ids of those that failed for this request

    One pass without calls: 300 accounts take less than 100 us (performance.md 4).
    """
    if not rules.enabled:
        alone = accounts.get(wanted[-1]) if wanted else None
        return alone if alone and not alone.rejected and alone.id not in tried else None
    asked = [accounts[name] for name in wanted if name in accounts and name not in tried]
    for account in asked:
        if not hindrance(account, now, rules)[0]:
            return account
    best, best_score = None, -math.inf
    out, order, before = rules.excluded.union(tried), rules.order, rules.before_percent
    for account in accounts.values():
        if account.rejected or account.id in out:
            continue
        quota, left, score = account.quota, -1.0, 0.0
        if quota:
            left = quota["left"] if now < quota["until"] else percent_left(quota, now)
            if 0 <= left <= before:
                score = -1e13
        if account.cooldown_until > now:
            if account.cooldown_reason in _RESTS_HARD:
                continue
            score -= 1e12
        if order == "most_left":
            score += left  # the unknown come after those that are known to have something left
        elif order == "priority":
            score -= account.priority or 1e6
        else:
            score -= quota["until"] if left >= 0 and quota["until"] > now else 1e11
        # Of two alike the one that the person put first.
        if score > best_score or (
            best and score == best_score and 0 < account.priority < (best.priority or 1e6)
        ):
            best, best_score = account, score
    # Where all are hindered in the same way, a change would help nobody.
    reason = best and hindrance(best, now, rules)[0]
    return next((one for one in asked if hindrance(one, now, rules)[0] == reason), best)


def _sign_in_again(account: Account) -> AztError:
    message = (
        f"Account {account.name} needs to sign in again ({account.rejected}): run `azt login`, "
        "or import a fresh sign-in with `azt accounts import FILE`."
    )
    return AztError(401, "account_auth_expired", message, type="authentication_error")


LOST_ANSWER_PAUSE_S, EARLY_RETRY_S, SETTLE_S = 2.0, 30.0, 35.0


def _fingerprint(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


@dataclass(eq=False, slots=True)
class Renewals:
    """Keeps sign-ins fresh. A refresh token is single use, so the new one is never only hoped for:

        intent in the journal -> call -> result in the journal -> accounts saved -> used
             |                    |              |                      |
             +-- killed: the old token is tried once    +-- killed: the journal is read at the start

    on_renewed  told, while the lock on Codex's home is held, about an account that was renewed and
                the refresh token that this used up; raises nothing
    unsaved     why the newest sign-ins are only in memory; "" when they are on disk
    """

    _store: AccountStore
    _pool: ConnectionPool
    _calls: WorkerPool
    _environment: Environment
    _save: Callable[[], Awaitable[None]]
    on_renewed: Callable[[Account, str], Awaitable[None]] | None = None
    unsaved: str = ""
    _refreshes: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _rests_until_s: dict[str, float] = field(default_factory=dict)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    _saving: asyncio.Task[None] | None = None
    _journal: list[Json] = field(default_factory=list)

    async def fresh_account(self, account: Account, refused: str = "") -> Account:
        """The account with a token that can be used now.

        refused  an access token that the upstream turned down: renew it though it has not expired
        raises   AztError when the sign-in is dead, or its renewal failed and the old token is over
        """
        account = self._store.accounts.get(account.id, account)
        if account.rejected:
            raise _sign_in_again(account)
        now = time.time()
        ends_soon = account.expires_at and account.expires_at - now < REFRESH_AHEAD_S
        # Just renewed and over all the same: the clock is wrong, and only a 401 may renew it again.
        is_new = abs(now - account.refreshed_at) < REFRESH_AHEAD_S
        rests_until_s = self._rests_until_s.get(account.id, 0.0)  # it failed a moment ago
        is_new |= account.expires_at > now and time.monotonic() < rests_until_s
        if account.access_token != refused and (is_new or not ends_soon):
            return account
        task = self._refreshes.get(account.id)
        if task is None:
            task = asyncio.create_task(self._refresh(account.id, account.access_token))
            self._refreshes[account.id] = task
            task.add_done_callback(functools.partial(self._refreshed, account.id))
        # Not awaited itself: a client that leaves must not take the new, single-use refresh token
        # with it.
        await asyncio.wait({task})
        error = task.exception()
        is_useless = bool(refused) or account.expires_at <= time.time()
        if error is not None and (is_useless or not isinstance(error, UpstreamError)):
            raise error
        return self._store.accounts.get(account.id, account)

    def _refreshed(self, account_id: str, task: asyncio.Task[None]) -> None:
        del self._refreshes[account_id]
        # Looked at here, for perhaps nobody waits for it any more.
        has_failed = not task.cancelled() and task.exception() is not None
        self._rests_until_s[account_id] = time.monotonic() + EARLY_RETRY_S * has_failed

    async def _refresh(self, account_id: str, stale_token: str) -> None:
        """Renew one sign-in: one at a time over all accounts and all programs on Codex's home."""
        async with self._one_at_a_time:
            with await in_thread(self._calls, lock_codex, self._environment.paths):
                await self._renew(account_id, stale_token)

    async def _renew(self, account_id: str, stale_token: str) -> None:
        """Take a newer sign-in over from Codex, else call, until the stale token is replaced.

        raises  AztError when the sign-in is dead, UpstreamError for what may pass
        """
        codex_auth, dead, was_lost = self._environment.paths.codex_auth, "", False
        while True:
            found = await in_thread(self._calls, read_codex_sign_in, codex_auth)
            account = self._store.accounts.get(account_id)
            if account is None or account.access_token != stale_token:
                return  # removed, or signed in anew
            is_same = found is not None and found.id == account_id
            if is_same and self.adopt(found, even_as_old=bool(dead)):
                await self.keep()
                if account.expires_at - time.time() > REFRESH_AHEAD_S:
                    return
                dead, stale_token = "", account.access_token
                continue
            if dead:
                raise await self.reject(account, dead)
            used = account.refresh_token
            try:
                tokens = await in_thread(self._calls, self._call, account_id, used)
            except SignInRejected as error:
                dead = error.reason
            except UpstreamError as error:
                # No answer at all: the token may be used up, or not. The old one is tried once.
                if error.fault == "transient" or was_lost:
                    raise
                was_lost = True
                await asyncio.sleep(LOST_ANSWER_PAUSE_S)
            else:
                return await self._renewed(account, used, tokens)

    @blocking
    def _call(self, account_id: str, refresh_token: str) -> Tokens:
        """The call, with the journal around it. A disk that fails does not stop it."""
        line = {"account": account_id, "used": _fingerprint(refresh_token), "at": int(time.time())}
        self._note(line)
        base_url = self._environment.auth_base_url
        tokens = refresh_tokens(self._pool, base_url, refresh_token, Wire())
        self._note(line | {name: getattr(tokens, name) for name in Tokens.__slots__})
        return tokens

    @blocking
    def _note(self, *lines: Json) -> None:
        """Put a line in the place of what was noted of the same token; none: all is saved."""
        kept = [one for one in self._journal if lines and one["used"] != lines[0]["used"]]
        self._journal = [*kept, *lines]
        try:
            write_json(self._environment.paths.renewals, {"version": 1, "lines": self._journal})
        except AztError as error:
            log.error("%s", error.message)

    async def _renewed(self, account: Account, used: str, tokens: Tokens) -> None:
        """New tokens -> the account as it is by now, the disk, and who wants to know."""
        current = self._store.accounts.get(account.id)
        # `account` as well: a removal or an import that cannot be saved brings it back.
        holders = [one for one in (account, current) if one and one.refresh_token == used]
        for one in holders:
            _take_tokens(one, tokens, int(time.time()))
        if await self.keep():
            await in_thread(self._calls, self._note)
        if current not in holders:
            log.warning("the new tokens of %s are dropped: it has left meanwhile", account.name)
            return
        log.info("the sign-in of %s was renewed", account.name)
        if self.on_renewed is not None:
            await self.on_renewed(current or account, used)

    @blocking
    def recover(self) -> None:
        """At the start: what a process that was killed, or Codex, knew better -> the accounts."""
        paths = self._environment.paths
        saved = read_json(paths.renewals, 1, lambda saved: [one["used"] for one in saved["lines"]])
        self._journal = saved["lines"] if saved else []
        is_news = self.adopt(read_codex_sign_in(paths.codex_auth))
        for line in self._journal:
            account = self._store.accounts.get(line["account"])
            if account is None or _fingerprint(account.refresh_token) != line["used"]:
                continue
            if "access_token" in line:
                _take_tokens(account, Tokens(*map(line.get, Tokens.__slots__)), line["at"])
                is_news = True
            elif not account.rejected:
                log.warning("no answer came to a renewal of %s: tried once more", account.name)
        if is_news:
            write_json(paths.accounts, self._store.to_json())
        if self._journal:
            self._note()

    def adopt(self, found: Account | None, even_as_old: bool = False) -> bool:
        """Take a newer sign-in of an account over that is here already. The caller saves."""
        of = self._store.accounts.get(found.id) if found else None
        if found is None or of is None or found.refresh_token == of.refresh_token:
            return False
        ours, theirs = (token_claims(one.access_token).get("iat") for one in (of, found))
        if _as_seconds(theirs) < _as_seconds(ours) + (not even_as_old):
            return False
        tokens = Tokens(found.access_token, found.refresh_token, found.id_token, None)
        _take_tokens(of, tokens, of.refreshed_at)
        log.info("the sign-in of %s was taken over from Codex, which had renewed it", of.name)
        return True

    async def reject(self, account: Account, reason: str) -> AztError:
        """Remember that only a new sign-in helps, so that the dead token is never tried again."""
        account.rejected = reason
        await self.keep()
        log.warning("account %s needs to sign in again (%s)", account.name, reason)
        return _sign_in_again(account)

    async def keep(self) -> bool:
        """Save. What cannot be saved is in force all the same, and tried until it is on disk."""
        try:
            await self._save()
            self.unsaved = ""
        except AztError as error:
            self.unsaved = error.message
            if self._saving is None or self._saving.done():
                self._saving = asyncio.create_task(self._keep_trying())
        return not self.unsaved

    async def _keep_trying(self) -> None:
        pause_s = 1.0
        while self.unsaved:
            log.error("%s Sign-ins are only in memory; again in %d s.", self.unsaved, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 60.0)
            await self.keep()
        log.warning("the sign-ins are on disk again")

    async def settle(self) -> None:
        """Before the process ends: renewals under way come to their end, and to the disk."""
        if self._refreshes:
            await asyncio.wait(self._refreshes.values(), timeout=SETTLE_S)
        if self.unsaved:
            await self.keep()


def _take_tokens(account: Account, tokens: Tokens, now: int) -> None:
    """An answer of the token endpoint, or of the journal, into the account."""
    for name in ("access_token", "refresh_token", "id_token"):
        setattr(account, name, getattr(tokens, name) or getattr(account, name))
    new = account_from_tokens(account.access_token, account.refresh_token, account.id_token, now)
    account.expires_at = new.expires_at or (now + tokens.expires_in_s if tokens.expires_in_s else 0)
    account.plan = new.plan if new.plan != "unknown" else account.plan
    account.refreshed_at, account.rejected = now, ""


class Stickiness:
    """Which account each conversation is with: the newest ones, in memory only."""

    def __init__(self) -> None:
        self._homes: dict[str, str] = {}

    def find(self, keys: Iterable[str]) -> str:
        """The id of the account, "" for a conversation that is not known."""
        return next(filter(None, (self._homes.get(key[:STICKY_KEY_MAX]) for key in keys)), "")

    def bind(self, keys: Iterable[str], account_id: str) -> None:
        for key in keys:
            self._homes.pop(key[:STICKY_KEY_MAX], None)
            self._homes[key[:STICKY_KEY_MAX]] = account_id
        while len(self._homes) > STICKY_MAX:
            del self._homes[next(iter(self._homes))]


@dataclass(eq=False, slots=True)
class Rotation:
    """Turns to relays: chooses, tries, moves on.

    changed   told when an account has: it is saved soon, never on the way to the first byte
    rules     in force; replaced when the settings change
    switches  the newest automatic ones: {"at", "from", "to", "reason", "until"}, unix seconds
    """

    _store: AccountStore
    _pool: ConnectionPool
    _calls: WorkerPool
    _environment: Environment
    _renewals: Renewals
    changed: Callable[[], None] = lambda: None
    rules: Rules = Rules()
    sticky: Stickiness = field(default_factory=Stickiness)
    switches: list[Json] = field(default_factory=list)

    async def open_turn(self, turn: Turn) -> Relay:
        """A translated turn. Raises AztError: the failure, when nothing more may be tried."""
        return await self.try_accounts(turn, functools.partial(self.attempt, turn))

    async def try_accounts(
        self, turn: Turn, attempt: Callable[[Account, float], Awaitable[T]]
    ) -> T:
        """The one retry rule (trust.md 3.2): another account only while nothing reached the client,
        TRIED_ACCOUNTS_MAX at most, and none begun later than LAST_TRY_S after the request.

        attempt  one try of `turn.body` on an account with a fresh token; it may hold back what
                 comes for the given seconds. Once it returns, the answer is final; whatever of it
                 failed before is raised as UpstreamError
        raises   AztError: the failure, when nothing more may be tried
        """
        loop = asyncio.get_running_loop()
        began, body, home = loop.time(), turn.body, turn.pinned or self.sticky.find(turn.keys)
        tried: dict[str, AztError] = {}
        while True:
            account = self._store.find(home) if turn.pinned else self.choose(home, tried)
            turn.body = body
            if home and account.id != home:
                turn.left = home
                turn.body = await in_thread(self._calls, _without_reasoning, body)
            try:
                result = await self._try(turn, account, attempt, began + HOLD_BACK_S)
            except AztError as error:
                tried[account.id] = error
                self._blame(account, error)
                if turn.pinned:
                    raise
                pause_s = random.uniform(0, TRY_JITTER_S)
                if loop.time() + pause_s - began > LAST_TRY_S or not self._moves_on(tried):
                    raise self._failure(tried) from None
                await asyncio.sleep(pause_s)
            else:
                self._praise(() if turn.pinned else turn.keys, account, home)
                return result

    def choose(self, home: str = "", tried: dict[str, AztError] | None = None) -> Account:
        """The account to try next, which becomes the serving one where that can serve no longer.

        home    the id of the conversation's own account
        raises  AztError when none can serve
        """
        now, store, tried = time.time(), self._store, tried or {}
        left, wanted = store.active, (home, store.active_id or "")
        account = pick_account(store.accounts, now, self.rules, wanted, tried)
        if account is None:
            raise self._failure(tried)
        reason, until = hindrance(left, now, self.rules) if left else ("", 0)
        if left and account.id not in wanted and reason not in ("", _RESTS_SHORT):
            store.active_id = account.id
            self.changed()
        elif left := store.accounts.get(next(reversed(tried), "")):
            reason, until = hindrance(left, now, self.rules)
        switch = {"from": left and left.id, "to": account.id, "reason": reason, "until": until}
        # Once for all requests that move at the same time, for the same reason.
        if left and (not self.switches or self.switches[-1] | switch != self.switches[-1]):
            self.switches[:] = [*self.switches[1 - SWITCHES_MAX :], {"at": now, **switch}]
            when = time.strftime(" until %Y-%m-%dT%H:%M:%SZ", time.gmtime(until)) if until else ""
            log.info("switched from %s to %s: %s%s", left.name, account.name, reason, when)
        return account

    async def _try(
        self,
        turn: Turn,
        account: Account,
        attempt: Callable[[Account, float], Awaitable[T]],
        opens_at: float,
    ) -> T:
        """One account, again only with a renewed token or without reasoning it cannot read."""
        turn.account, refused = account, ""
        turn.on_news(turn)
        while True:
            account = await self._renewals.fresh_account(account, refused)
            token = account.access_token  # another turn may renew it before the answer is here
            turn.attempts += 1
            turn.on_news(turn)
            try:
                hold_s = opens_at - asyncio.get_running_loop().time()
                return await self._noted(turn, account, attempt(account, max(hold_s, 0.0)))
            except UpstreamError as error:
                body = turn.body
                if error.code == "invalid_encrypted_content":
                    turn.body = await in_thread(self._calls, _without_reasoning, body)
                if error.fault == "token" and not refused:
                    refused = token
                elif error.status == 401:
                    raise await self._renewals.reject(account, error.code or "401") from None
                elif turn.body is body:
                    raise

    async def _noted(self, turn: Turn, account: Account, attempt: Awaitable[T]) -> T:
        """The attempt, with its entry for the request log. No text that could quote the request."""
        entry: Json = {"accountId": account.id, "account": account.name, "status": 200}
        turn.tries.append(entry)
        entry["startedAt"], began_s = int(time.time() * 1000), time.monotonic()
        try:
            result = await attempt
            answer = getattr(result, "answer", None)
            entry["connectMs"] = getattr(answer, "connect_ms", None)
            entry["upstreamRequestId"] = answer and upstream_id(answer.headers)
            return result
        except AztError as error:
            until = error.extra.get("resets_at")
            entry |= {
                "status": error.status,
                "errorType": error.code,
                "until": until and until * 1000,
                "upstreamRequestId": getattr(error, "upstream_id", None),
            }
            raise
        finally:
            entry["durationMs"] = round((time.monotonic() - began_s) * 1000)

    def _moves_on(self, tried: Mapping[str, AztError]) -> bool:
        """May another account be tried after the newest of these failures?"""
        *_, newest = tried.values()
        # A server error is perhaps that of the whole upstream: once elsewhere tells.
        faults = [getattr(error, "fault", "account") for error in tried.values()]
        moves = faults[-1] == "account" and newest.status in (401, 403, 429)
        moves |= faults[-1] == "transient" and faults.count("transient") == 1
        return moves and self.rules.enabled and len(tried) < TRIED_ACCOUNTS_MAX

    def _failure(self, tried: Mapping[str, AztError]) -> AztError:
        """What the client gets: the newest failure that is not about one account alone, else why
        none can serve."""
        errors, store, rules, now = list(tried.values()), self._store, self.rules, time.time()
        others = [error for error in errors if error.status not in (401, 429)]
        if tried and (others or not rules.enabled):
            return (others or errors)[-1]
        if tried and pick_account(store.accounts, now, rules, (), tried) is not None:
            message = f"{len(tried)} accounts could not serve. Send it again: another one is next."
            return AztError(503, "overloaded", message, headers={"retry-after": "1"})
        known = [one for one in store.accounts.values() if rules.enabled or one is store.active]
        inside = [one for one in known if not rules.enabled or one.id not in rules.excluded]
        first = min(
            (one for one in inside if not one.rejected),
            key=lambda one: one.cooldown_until,
            default=None,
        )
        if first is not None:
            is_short = first.cooldown_reason == "rate_limited"
            code = "rate_limit_exceeded" if is_short else "usage_limit_reached"
            message = f"No account can serve now; the first one back is {first.name}."
            return limit_error(code, message, {"resets_at": first.cooldown_until}, None, now)
        if inside:
            return _sign_in_again(inside[0])
        message = "No account is signed in: run `azt login`, or `azt accounts import FILE`."
        if known:
            message = "Every account is excluded: `azt accounts include ACCOUNT` takes one back."
        return AztError(503, "no_account", message, headers={"x-should-retry": "false"})

    def _blame(self, account: Account, error: AztError) -> None:
        """Let the account rest as long as its failure says."""
        now, account = time.time(), self._store.accounts.get(account.id, account)
        fault, reason = getattr(error, "fault", ""), error.code or ""
        if quota := getattr(error, "quota", None):
            learn_quota(account, quota)
        if error.status == 429:
            reason = "quota_exhausted" if reason == "usage_limit_reached" else "rate_limited"
        elif fault not in REST_S or error.status == 401:
            return
        elif fault == "transient":
            reason = _RESTS_SHORT
        until = error.extra.get("resets_at") or int(now) + REST_S.get(fault, 0)
        rests = account.cooldown_until > now and account.cooldown_reason in _RESTS_HARD
        if not rests or until > account.cooldown_until:
            account.cooldown_reason, account.cooldown_until = reason, until
            self.changed()

    def learn(
        self, account: Account, headers: Mapping[str, str], event: Json | None = None
    ) -> None:
        """Keep what an answer says of the quota: its headers, or a later `codex.rate_limits`."""
        account, now = self._store.accounts.get(account.id, account), time.time()
        if account.quota.get("captured_at") == int(now):
            return  # many short answers in a second say the same
        for reading in (quota_from_headers(headers, now), quota_from_body(event or {}, now)):
            if reading:
                learn_quota(account, reading)
                self.changed()

    def _praise(self, keys: tuple[str, ...], account: Account, home: str) -> None:
        """It served. The conversation stays with it, unless it only stood in for a short while."""
        now, account = time.time(), self._store.accounts.get(account.id, account)
        account.last_used_at = int(now)
        if account.cooldown_reason not in _RESTS_HARD:
            account.cooldown_until, account.cooldown_reason = 0, ""
        owner = self._store.accounts.get(home)
        reason = hindrance(owner, now, self.rules)[0] if owner else "removed"
        self.sticky.bind(keys, home if reason in ("", _RESTS_SHORT) else account.id)
        self.changed()

    async def attempt(self, turn: Turn, account: Account, hold_s: float) -> Relay:
        base_url = self._environment.codex_base_url
        translator = cast("Callable[[], Translator]", turn.translator)()
        credentials = Credentials(account.access_token, account.account_id)
        call = (base_url, credentials, turn.body, turn.session)
        try:
            answer = await open_stream(self._pool, self._calls, *call)
        except UpstreamError as error:
            translator.fail(error)  # puts the client's own field name into `param`
            raise
        relay = Relay(self._pool, answer, translator, turn.streaming)
        try:
            await relay.ready(hold_s)
        except AztError:
            self.learn(account, answer.headers)
            raise
        return relay


def _without_reasoning(body: bytes) -> bytes:
    """The request without its encrypted reasoning, which another account cannot read.

    Itself where that leaves nothing out, or nothing over.
    """
    request = parse_event(body) or {}
    items = request.get("input")
    items = items if isinstance(items, list) else []
    kept = [item for item in items if item.get("type") != "reasoning"]
    return encode_json({**request, "input": kept}) if 0 < len(kept) < len(items) else body


# ==================================================================================================
# 13. Usage and request log
#     What happened to each request: a log line, an event on disk, a row of the request log, and
#     the sums over them. Metadata only: never a prompt, an answer, a tool argument or a token.
# ==================================================================================================

USAGE_KEYS_MAX, USAGE_DAYS_MAX, USAGE_DETAIL_DAYS = 64, 400, 92
HISTORY_DAYS, HISTORY_MAX = 14, 336
USAGE_PENDING_MAX, USAGE_SERIES_MAX = 20_000, 2_000
_DURATIONS_MS = (100, 300, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 120_000)
_BUCKET_KEYS = (*map(str, _DURATIONS_MS), "inf")

# How a client is known: the first match in its user agent, originator, referer or title.
_CLIENTS = [
    (re.compile(pattern, re.I), name)
    for pattern, name in {
        r"codex": "Codex",
        r"openclaw|clawdbot|moltbot": "OpenClaw",
        r"\bcline\b": "Cline",
        r"roo-?code|roo-cline|roocode": "Roo Code",
        r"open[- ]?webui": "Open WebUI",
        r"\baider\b": "aider",
        r"cursor": "Cursor",
        r"\bcontinue(dev)?\b": "Continue",
        r"langchain": "LangChain",
        r"litellm": "LiteLLM",
        r"\bai-sdk|^ai/\d": "AI SDK",
        r"openai/python": "OpenAI/Python",
        r"openai/js": "OpenAI/JS",
        r"azt-console": "console",
        r"azt-cli": "azt",
        r"^curl/": "curl",
    }.items()
]


CLIENT_HEADERS = ("user-agent", "originator", "x-title", "http-referer", "referer")


@functools.lru_cache(1000)
def client_name(*marks: str) -> str:
    """What calls, by the values of `CLIENT_HEADERS`; unknown ones by the name of their product."""
    everything = " ".join(marks)
    known = next((name for pattern, name in _CLIENTS if pattern.search(everything)), None)
    product = re.match(r"[\w.+-]{1,40}", marks[0])
    return known or (product[0] if product else "unknown")


_FIELD_PATH = re.compile(r"[a-z][\w.\[\]]{0,79}")


@dataclass(slots=True)
class RequestRecord:
    """One request from its head to the last byte of its answer. Metadata only.

    started_s    monotonic clock, like every duration here; `at` is the wall clock
    complete_s   when the last byte of the request was here
    route        the template of its path; "" for what is not counted (pages, administration)
    account      label or short id, never the e-mail
    ttft_ms      from the complete request to the first content delta written
    usage        the upstream's own, as the Responses API spells it; None when it told nothing
    tries        one entry for each attempt (console.md 6.6)
    request, response   what the request log shows of them: counts, sizes, names
    """

    id: str
    method: str
    path: str
    started_s: float
    at: float = 0.0
    complete_s: float = 0.0
    status: int = 0
    route: str = ""
    client: str = "unknown"
    remote: str = ""
    key_id: str | None = None
    account: str = "-"
    account_id: str = ""
    plan: str = ""
    model: str = "-"
    asked_model: str = "-"
    streams: bool = False
    attempts: int = 0
    head_ms: int | None = None
    ttft_ms: int | None = None
    total_ms: int | None = None
    result: Literal["running", "ok", "failed", "cancelled"] = "running"
    error_code: str | None = None
    failure: Json = field(default_factory=dict)  # see `fail`
    left: str = ""  # the id of the account that the conversation was with, and could not stay
    conversation: str = ""  # what names it to the rotation
    is_listed: bool = True  # the model that was asked for
    alternative: str = ""  # the default model, where another one was asked for
    headers: Json = field(default_factory=dict)  # of the request: what it says of its program
    usage: Json | None = None
    images: int = 0
    image_route: str = "none"
    request_bytes: int = 0
    response_bytes: int = 0
    tries: list[Json] = field(default_factory=list)
    request: Json = field(default_factory=dict)
    response: Json = field(default_factory=dict)

    def fail(self, error: AztError) -> None:
        """Take over why it failed. Values: the error itself holds on to all that its code saw."""
        self.error_code, field_ = error.code or "error", error.param or ""
        self.failure = {
            "until": (error.extra.get("resets_at") or 0) * 1000,
            "field": field_ if _FIELD_PATH.fullmatch(field_) else "",
            "host": getattr(error, "host", ""),
            "is_dns": isinstance(error.__context__, socket.gaierror),
        }

    def end(self, now_s: float) -> bool:
        """Close the record and write its one log line. A second call does nothing: False."""
        if self.total_ms is not None:
            return False
        self.total_ms = round((now_s - self.started_s) * 1000)
        if self.result == "running":
            self.result = "ok" if self.status < 400 else "failed"
        request = f"{self.id} {self.method} {self.path} {self.status or '-'}"
        ttft_ms = "-" if self.ttft_ms is None else self.ttft_ms
        spent = f"ttft_ms={ttft_ms} total_ms={self.total_ms}"
        why = "" if self.result == "ok" else f" {self.result} {self.error_code or ''}".rstrip()
        log.info("%s account=%s model=%s %s%s", request, self.account, self.model, spent, why)
        return True

    def event(self) -> Json:
        """The line of `usage/events/`, which is also what the lists show (console.md 6.6)."""
        failure = _shown(self.error_code or f"http_{self.status}", 64)
        return {
            "id": self.id,
            "at": int(self.at * 1000),
            "method": self.method,
            "endpoint": self.route,
            "model": _shown(self.model, 80),
            "requestedModel": _shown(self.asked_model, 80),
            "accountId": self.account_id or None,
            "account": self.account if self.account_id else None,
            "plan": self.plan or None,
            "client": self.client,
            "status": self.status,
            "result": self.result,
            "errorType": None if self.result == "ok" else failure,
            "stream": self.streams,
            "attempts": self.attempts,
            "durationMs": self.total_ms,
            "firstTokenMs": self.ttft_ms,
            "tokens": _token_counts(self.usage),
            "images": self.images,
            "imageRoute": self.image_route,
        }

    def row(self, event: Json) -> Json:
        """The row of the request log: the event, and what explains it (console.md 6.6)."""
        tries, tokens = self.tries, event["tokens"]
        for number, one in enumerate(tries):
            is_last = number == len(tries) - 1
            one |= {"n": number + 1, "action": "done" if is_last else "switched"}
            if not is_last and tries[number + 1]["accountId"] == one["accountId"]:
                one["action"] = "retried"
        stream_ms = None if self.ttft_ms is None else max(0, (self.total_ms or 0) - self.ttft_ms)
        rate = tokens["output"] * 1000 / stream_ms if tokens and stream_ms else None
        timing = {
            "queueMs": tries[0]["startedAt"] - event["at"] if tries else None,
            "connectMs": tries[-1].get("connectMs") if tries else None,
            "firstByteMs": self.head_ms,
            "firstTokenMs": self.ttft_ms,
            "streamMs": stream_ms,
            "tokensPerSecond": rate and round(rate, 1),
        }
        return event | {
            "attemptList": tries,
            "timing": timing,
            "why": explain(self),
            "request": {"bytes": self.request_bytes, **self.request},
            "response": {"bytes": self.response_bytes, **self.response},
            "headers": self.headers,
            "keyId": self.key_id,
            "remote": self.remote,
            "upstreamRequestId": tries[-1].get("upstreamRequestId") if tries else None,
            "sessionHint": unnamed(self.conversation) if self.conversation else None,
        }


def _token_counts(usage: Json | None) -> Json | None:
    if not isinstance(usage, dict):
        return None
    counts = usage_from(usage)
    return {
        "input": counts["prompt_tokens"],
        "cached": counts["prompt_tokens_details"]["cached_tokens"],
        "output": counts["completion_tokens"],
        "reasoning": counts["completion_tokens_details"]["reasoning_tokens"],
        "total": counts["total_tokens"],
    }


_BODY_KEY, _EFFORT = re.compile(r"[a-z][a-z0-9_]{0,39}"), re.compile(r"[a-z]{1,16}")


def request_summary(body: Json) -> Json:
    """What a request asks for, by counts and by the names of its fields alone."""
    items: Any = next((body[name] for name in ("messages", "input") if name in body), [])
    items = items if isinstance(items, list) else [items]
    contents = (item.get("content") for item in items if isinstance(item, dict))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    reasoning, tools = body.get("reasoning"), body.get("tools")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    effort = str(effort or body.get("reasoning_effort"))
    return {
        "messages": len(items),
        "tools": len(tools) if isinstance(tools, list) else 0,
        "images": sum(kind in ("image_url", "input_image") for kind in kinds),
        "effort": effort if effort != "None" and _EFFORT.fullmatch(effort) else None,
        "keys": sorted(name for name in body if _BODY_KEY.fullmatch(name))[:40],
    }


# Code of the verdict, our error codes | its sentence | what may help (console.md, appendix B)
_VERDICTS = {
    code: (names.split()[0], text, fixes.split())
    for line in """
quota_exhausted usage_limit_reached|{account} ran out of its quota.|switch_account exclude_until
all_exhausted|Every account is empty.|open_accounts add_account
recovered_by_switch|{from} could not answer ({reason}); {to} did.|exclude_until open_account
sticky_lost|Its account cannot be used now; it continued as a new one.|open_account
rate_limited_short rate_limit_exceeded|The provider asked to wait: too much in a short time.|
login_rejected account_auth_expired|The provider no longer accepts the sign-in of {account}.|login
token_expired_offline|The sign-in of {account} expired and could not be renewed.|test_network login
no_account|There is no account that can serve.|add_account
model_not_available model_not_found|{model} is not available to {account}.|use_model sync_models
model_unknown|{model} is not in the list of models.|copy_model sync_models
image_not_in_plan image_generation_unavailable|{account} makes no pictures.|image_settings
image_not_in_plan browser_check_required|The web site asks for a browser.|image_settings
context_too_long context_length_exceeded|The conversation is longer than {model} accepts.|
body_too_large request_too_large|The request is larger than the limit.|raise_limit
bad_request|The client sent something that this endpoint does not accept.|copy_details
unsupported_field unsupported_value|{field} is not supported here.|endpoint_notes
unsupported_field unsupported_parameter|{field} is not supported here.|endpoint_notes
content_refused content_filter|The provider declined this request.|copy_details
content_refused content_policy_violation|The provider declined this request.|copy_details
content_refused moderation_blocked|The provider declined this request.|copy_details
network_connect upstream_unreachable|The provider could not be reached.|test_network open_proxy
network_dns|The name of the provider's machine could not be found.|test_network open_proxy
network_tls upstream_tls|No trusted connection to the provider.|test_network open_proxy
network_timeout upstream_timeout|The provider did not answer in time.|test_network open_proxy
proxy_failed|The proxy did not work.|open_proxy
stream_cut upstream_stream_truncated|The answer broke off.|send_again
upstream_5xx|The provider had an error ({status}).|send_again
client_gone client_closed_request|The client closed the connection.|
key_missing api_key_missing api_key_needed|A caller came without a key.|open_keys
key_wrong invalid_api_key|A caller came with a wrong key.|open_keys
internal internal_error|azt made a mistake.|copy_details diagnostics
internal shutting_down|azt was stopping.|send_again
""".strip().split("\n")
    for names, text, fixes in [line.split("|")]
    for code in names.split()
}


_LIMITS = ("usage_limit_reached", "rate_limit_exceeded")


def explain(record: RequestRecord) -> Json | None:
    """Why it ended as it did, in a sentence, with what may help. None where all went well."""
    tries, account_id = record.tries, record.account_id
    failed = next((one for one in tries if one["accountId"] != account_id), None)
    params: Json = {"account": account_id, "model": record.model, "status": record.status}
    params |= {"plan": record.plan, "n": len(tries), "d": record.total_ms, **record.failure}
    code, is_dns = record.error_code or "", params.pop("is_dns", False)
    if record.result == "ok" and failed:
        code, account_id = "recovered_by_switch", failed["accountId"]
        params |= {"from": account_id, "to": record.account_id, "until": failed.get("until")}
        params["reason"] = failed.get("errorType")
    elif record.result == "ok":
        code, account_id = "sticky_lost" * bool(record.left), record.left
        params["account"] = record.left
    elif code in _LIMITS and len({account_id, *(one["accountId"] for one in tries)} - {""}) != 1:
        code, account_id = "all_exhausted", ""
    elif code.startswith("upstream_") and account_id and not tries:
        code, params["reason"] = "token_expired_offline", code
    elif is_dns:
        code = "network_dns"
    elif code == "model_not_found" and not record.is_listed:
        code = "model_unknown"
    elif code not in _VERDICTS:
        code = "bad_request" if 400 <= record.status < 500 else "upstream_5xx"
    if not code:
        return None
    if code == "rate_limit_exceeded" and params.get("until"):
        params["d"] = params["until"] - int(record.at * 1000)
    verdict, text, fixes = _VERDICTS[code]
    shown = params | {"account": record.account, "field": params.get("field") or "A field"}
    about = {"accountId": account_id or None}
    if record.alternative and "model" in verdict:
        about["model"] = record.alternative
    return {
        "code": verdict,
        "text": text.format_map(collections.defaultdict(lambda: "-", shown)),
        "params": {
            name: value for name, value in params.items() if value not in (None, "", "-", 0)
        },
        "fixes": [{"kind": kind, **about} for kind in fixes],
    }


# The sums over requests are one flat Counter: a name of these, or a bucket, to its count.
SUMS = (
    "requestCount successCount failureCount cancelledCount inputTokens cachedInputTokens "
    "outputTokens reasoningTokens totalTokens unknownTokenCount imageCount totalDurationMs"
).split()
_BUCKETS = ("durationBuckets", "firstTokenBuckets")
Sums = collections.Counter[str]
DIMENSIONS = ("byAccount", "byModel", "byEndpoint", "byError", "byImageRoute", "bySource")


def read_sums(value: Json) -> Sums:
    """Sums as JSON, ours or the Node program's. Raises TypeError or ValueError for other shapes."""
    sums = Sums({name: int(value.get(name, 0)) for name in SUMS})
    for name in _BUCKETS:
        sums.update({f"{name} {key}": int(n) for key, n in value.get(name, {}).items()})
    return sums


def _nested(sums: Sums) -> Json:
    """What is not zero, as JSON; a bucket inside of its histogram."""
    value: Json = {}
    for name, amount in sums.items():
        if " " in name:
            histogram, key = name.split()
            value.setdefault(histogram, {})[key] = amount
        elif amount:
            value[name] = amount
    return value


def sums_view(sums: Sums) -> Json:
    """Every member of console.md 6.9, the derived ones as well."""
    view: Json = dict.fromkeys(SUMS, 0) | {name: {} for name in _BUCKETS} | _nested(sums)
    view["averageDurationMs"] = round(sums["totalDurationMs"] / (sums["requestCount"] or 1))
    view["p95DurationMs"] = _quantile(view["durationBuckets"], 0.95) or 0
    view["firstTokenMedianMs"] = _quantile(view["firstTokenBuckets"], 0.5)
    return view


def _bucket(duration_ms: int) -> str:
    return _BUCKET_KEYS[bisect.bisect_left(_DURATIONS_MS, duration_ms)]


def _quantile(buckets: Mapping[str, int], part: float) -> int | None:
    """The upper bound of the bucket in which this part of all lies; None where there are none."""
    wanted = math.ceil(sum(buckets.values()) * part)
    seen = itertools.accumulate(buckets.get(key, 0) for key in _BUCKET_KEYS[:-1])
    limits = (limit for limit, count in zip(_DURATIONS_MS, seen, strict=True) if count >= wanted)
    return next(limits, _DURATIONS_MS[-1]) if wanted else None


class Tally:
    """The sums of a stretch of time: of all requests, and by each dimension."""

    __slots__ = ("by", "total")

    def __init__(self, value: Json | None = None) -> None:
        """Empty, or as `to_json` wrote it; the Node program's days have no dimensions."""
        value = value or {}
        self.total = read_sums(value.get("aggregate", value))
        self.by: dict[str, dict[str, Sums]] = {
            name: {
                key[:80]: read_sums(row["aggregate"]) for key, row in value.get(name, {}).items()
            }
            for name in DIMENSIONS
        }

    def add(self, keys: Sequence[str | None], amounts: Mapping[str, int]) -> None:
        self._grow(self.total, amounts)
        for rows, key in zip(self.by.values(), keys, strict=True):
            if key is not None:
                self._grow(self._row(rows, key), amounts)

    @classmethod
    def of_events(cls, events: Iterable[Json]) -> Tally:
        tally = cls()
        for event in events:
            tally.add(*_parts(event))
        return tally

    @staticmethod
    def _grow(sums: Sums, amounts: Mapping[str, int]) -> None:
        for name, amount in amounts.items():  # five times as fast as Counter.update
            sums[name] = sums.get(name, 0) + amount

    @staticmethod
    def _row(rows: dict[str, Sums], key: str) -> Sums:
        """Bounded: whoever invents model names must not fill the memory."""
        key = key if key in rows or len(rows) < USAGE_KEYS_MAX else "other"
        return rows.setdefault(key, Sums())

    def merge(self, other: Tally) -> None:
        self._grow(self.total, other.total)
        for name, rows in other.by.items():
            for key, row in rows.items():
                self._grow(self._row(self.by[name], key), row)

    def to_json(self) -> Json:
        value: Json = {"aggregate": _nested(self.total)}
        for name, rows in self.by.items():
            value[name] = {key: {"aggregate": _nested(row)} for key, row in rows.items()}
        return value


def _parts(event: Json) -> tuple[list[str | None], dict[str, int]]:
    """What an event adds: its key in each dimension, and the amounts that are not zero."""
    result, tokens, duration_ms = event["result"], event["tokens"], event["durationMs"]
    keys = [event["accountId"] or "-", event["model"], f"{event['method']} {event['endpoint']}"]
    keys += [event["errorType"], event["imageRoute"], event["client"]]
    told, ttft_ms = tokens or {}, event["firstTokenMs"]
    spent = (told.get(name, 0) for name in ("input", "cached", "output", "reasoning", "total"))
    counts = (
        *(1, result == "ok", result == "failed", result == "cancelled"),
        *(*spent, event["attempts"] > 0 and tokens is None, event["images"], duration_ms),
    )
    amounts = {name: n for name, n in zip(SUMS, counts, strict=True) if n}
    amounts[f"durationBuckets {_bucket(duration_ms)}"] = 1
    if ttft_ms is not None:
        amounts[f"firstTokenBuckets {_bucket(ttft_ms)}"] = 1
    return keys, amounts


class Batch:
    """What some records say, worked out in a thread: on the loop it would take from every stream.

    tallies  by day; lines: (day, line of its file of events), rows: lines of the request log
    """

    __slots__ = ("events", "lines", "rows", "tallies")

    def __init__(self, records: Iterable[RequestRecord]) -> None:
        self.tallies: dict[str, Tally] = {}
        self.lines: list[tuple[str, bytes]] = []
        self.events: list[Json] = []
        self.rows: list[bytes] = []
        for record in records:
            event = record.event()
            day = _day(event["at"])
            self.tallies.setdefault(day, Tally()).add(*_parts(event))
            self.lines.append((day, encode_json(event) + b"\n"))
            self.rows.append(encode_json(record.row(event)) + b"\n")
            self.events.append(event)


class UsageStats:
    """The sums, and what is still to be written. Owned by the loop; the disk gets snapshots.

    The events are the truth: `lifetime.json` and `daily.json` each say how far into which file of
    events they have counted (`through`), and a start counts on from there. So a kill at any moment
    neither loses nor doubles what an event on disk says.
    """

    def __init__(self) -> None:
        self.startup, self.lifetime = Tally(), Tally()
        self.days: dict[str, Tally | Json] = {}
        self.through: dict[str, int] = {}
        self.pending: list[tuple[str, bytes]] = []  # (day, line)
        self._unsynced: set[Path] = set()

    def add(self, batch: Batch) -> None:
        for day, fresh in batch.tallies.items():
            for tally in (self.startup, self.lifetime, self.day(day)):
                tally.merge(fresh)
        self.pending += batch.lines
        del self.pending[:-USAGE_PENDING_MAX]  # the disk has been full for long

    def day(self, name: str) -> Tally:
        """The sums of a day; parsed at their first use, for most are never asked for."""
        found = self.days.get(name, {})
        if not isinstance(found, Tally):
            found = self.days[name] = Tally(found)
        return found

    def between(self, first: str, last: str) -> Tally:
        tally = Tally()
        for name in [day for day in self.days if first <= day <= last]:
            tally.merge(self.day(name))
        return tally

    def snapshot(self) -> tuple[Json, Json]:
        """What goes into lifetime.json and daily.json: exactly the events handed out so far."""
        names = sorted(self.days)[-USAGE_DAYS_MAX:]
        self.days = {name: self.days[name] for name in names}
        days = {}
        for at, name in enumerate(names):
            value = self.days[name]
            value = value.to_json() if isinstance(value, Tally) else value
            has_detail = at >= len(names) - USAGE_DETAIL_DAYS
            days[name] = value if has_detail else {"aggregate": value.get("aggregate", value)}
        lifetime = {"version": 1, **self.lifetime.to_json()}
        return lifetime, {"version": 1, "days": days}

    @blocking
    @disk_errors()
    def load(self, paths: Paths) -> None:
        """The sums as they were saved, and every event since."""
        for sums in (paths.usage_lifetime, paths.usage_daily):
            before = paths.before / "usage" / sums.name  # at the first start after the Node program
            try:
                saved = read_json(sums, 1, Tally) or read_json(before, 1, Tally) or {}
            except AztError as error:  # nothing is lost: the events are counted again
                log.error("%s The sums are made anew from the events.", error.message)
                saved = {}
            if is_daily := sums == paths.usage_daily:
                self.days = dict(saved.get("days", {}))
            else:
                self.lifetime = Tally(saved)
            through = saved.get("through", {})
            for path in sorted(paths.usage_events.glob("*.jsonl")):
                for event in read_events(path, through.get(path.name, 0)):
                    tally = self.day(_day(event["at"])) if is_daily else self.lifetime
                    tally.add(*_parts(event))
                self.through[path.name] = path.stat().st_size

    @blocking
    def save(self, paths: Paths, lines: list[tuple[str, bytes]], sums: Sequence[Json]) -> None:
        """Append the lines to the files of their days, then replace the sums, where some are given.

        raises  AztError when a line is not on disk; then nothing of its file is
        """
        by_day: dict[str, list[bytes]] = {}
        for day, line in lines:
            by_day.setdefault(day, []).append(line)
        for day, of_day in by_day.items():
            path = paths.usage_events / f"{day}.jsonl"
            self.through[path.name] = append_bytes(path, b"".join(of_day))
            self._unsynced.add(path)
            lines[:] = [one for one in lines if one[0] != day]
        sums = sums if self.through else ()  # of no event: there is nothing to say
        if sums:  # a power cut must not leave sums of more events than there are
            for path in self._unsynced:
                append_bytes(path, b"", sync=True)
            self._unsynced.clear()
        for path, value in zip((paths.usage_lifetime, paths.usage_daily), sums, strict=False):
            write_json(path, value | {"through": dict(self.through)}, None)

    @blocking
    def wipe(self, paths: Paths) -> None:
        for path in (paths.usage_lifetime, paths.usage_daily):  # first, or the events count anew
            write_json(path, {"version": 1})
        for path in paths.usage_events.glob("*.jsonl"):
            delete_file(path)


def _day(at_ms: int) -> str:
    """The day of this machine's own calendar."""
    return time.strftime("%Y-%m-%d", time.localtime(at_ms / 1000))


@blocking
def read_events(path: Path, start: int = 0) -> Iterator[Json]:
    """The events of a file from that byte on. Torn and foreign lines are skipped."""
    for line in read_from(path, start):
        try:
            event = json.loads(line)
            _parts(event)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        yield event


@blocking
def read_quotas(folder: Path, account_id: str, since_ms: int) -> list[Json]:
    """What was left of an account's windows, hour by hour: the lines of `Gateway.note_quotas`."""
    mark, points = b'{"quota":"%b"' % account_id.encode(), []
    for path in sorted(folder.glob("*.jsonl")):
        lines = read_from(path, 0) if path.stem >= _day(since_ms) else ()
        points += [parse_event(line) or {} for line in lines if line.startswith(mark)]
    return [{k: v for k, v in one.items() if k != "quota"} for one in points][-HISTORY_MAX:]


# -- charts and tables, folded from the events of their stretch of time

_MEASURES: dict[str, Callable[[Json], int]] = {
    "failures": lambda event: event["result"] == "failed",
    "images": lambda event: event["images"],
    "requests": lambda event: 1,
    "tokens": lambda event: (event["tokens"] or {}).get("total", 0),
}
_STEPS = {"minute": 60, "hour": 3600, "day": 86400}


def bucket_starts(first_ms: int, last_ms: int, bucket: str, zone: tzinfo) -> list[int]:
    """Where the buckets of a stretch begin. A day is as long as its zone makes it: 23 to 25 h.

    raises  BadRequest when they are more than USAGE_SERIES_MAX
    """
    if (last_ms - first_ms) / 1000 > _STEPS[bucket] * USAGE_SERIES_MAX:
        raise BadRequest("Too many points: ask for a shorter time, or larger buckets.", "bucket")
    at = datetime.fromtimestamp(first_ms / 1000, zone).replace(second=0, microsecond=0)
    at = at if bucket == "minute" else at.replace(minute=0)
    at = at.replace(hour=0) if bucket == "day" else at
    step, starts = timedelta(seconds=_STEPS[bucket]), []
    while (start := int(at.timestamp() * 1000)) < last_ms:
        starts.append(start)
        # A day goes by the wall clock of its zone.
        at = at + step if bucket == "day" else (at.astimezone(UTC) + step).astimezone(zone)
    return starts


def series(events: Iterable[Json], starts: Sequence[int], by: str, measure: str, top: int) -> Json:
    """Chart data (console.md 6.9): a value for each bucket and each of the `top` largest keys."""
    sums: dict[str, list[int]] = {}
    for event in events:
        row = sums.setdefault(str(event[by] or "-"), [0] * len(starts))
        row[bisect.bisect_right(starts, event["at"]) - 1] += _MEASURES[measure](event)
    largest = sorted(sums, key=lambda key: (-sum(sums[key]), key))
    rows = [sums[key] for key in largest[:top]]
    keys: list[Json] = [{"key": key, "label": key} for key in largest[:top]]
    if largest[top:]:
        keys.append({"key": "_other", "label": None})
        rows.append([sum(some) for some in zip(*(sums[key] for key in largest[top:]), strict=True)])
    points = [{"t": t, "v": [row[at] for row in rows]} for at, t in enumerate(starts)]
    return {"keys": keys, "points": points, "totals": [sum(row) for row in rows]}


def usage_table(events: Iterable[Json], zone: tzinfo) -> Iterator[list[Any]]:
    """Rows of the CSV export, its heads first: a day, what it is split by, the sums."""
    split = ("accountId", "model", "endpoint", "client")
    rows: dict[tuple[str, ...], Sums] = {}
    for event in events:
        day = datetime.fromtimestamp(event["at"] / 1000, zone).strftime("%Y-%m-%d")
        key = (day, *(str(event[name] or "-") for name in split))
        rows.setdefault(key, Sums()).update(_parts(event)[1])
    yield ["date", *split, *SUMS]
    for key in sorted(rows):
        yield [*key, *(rows[key][name] for name in SUMS)]


class RequestLog:
    """The newest requests, each with what explains it. In memory as encoded lines: a page is read
    seldom, a request recorded often."""

    def __init__(self, rows_max: int) -> None:
        self.lines: collections.deque[bytes] = collections.deque(maxlen=rows_max)
        self.pending: list[bytes] = []
        self.written = 0  # lines in the file, with those that are too many

    def add(self, lines: list[bytes]) -> None:
        self.lines.extend(lines)
        self.pending += lines
        most = self.lines.maxlen or 0
        del self.pending[: -most or None]

    def rows(self) -> Iterator[Json]:
        """Newest first. Callable from any thread: a copy of a deque is taken at one stroke."""
        return map(json.loads, reversed(list(self.lines)))

    @blocking
    @disk_errors()
    def load(self, path: Path, since_ms: int) -> None:
        size, most = path.stat().st_size if path.exists() else 0, self.lines.maxlen or 0
        start = max(0, size - max(most, 100) * 16 * KIB)
        self.written = 1 << 30 if start else 0  # so far too long that it is written anew
        for line in read_from(path, start):
            self.written += 1
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["at"] >= since_ms:
                    self.lines.append(line)

    @blocking
    def save(self, path: Path, lines: list[bytes], kept: list[bytes]) -> None:
        """Append, or write the file anew where half of it is no longer wanted."""
        if self.written + len(lines) > 2 * max(len(kept), 100):
            write_bytes(path, b"".join(kept))
            self.written = len(kept)
        else:
            append_bytes(path, b"".join(lines))
            self.written += len(lines)


# ==================================================================================================
# 14. Gateway
#     The one owner of mutable state. Its fields are all that requests share; module level holds
#     constants only. Everything but `load` runs on the loop.
# ==================================================================================================


SAVE_LATER_S, MINUTE_S, JOB_KEPT_S = 5.0, 60.0, 600.0


@dataclass(slots=True)
class Job:
    """Long work for many things, with its progress. `result` is what the work on one told last."""

    id: str
    kind: str
    total: int
    started_at: float
    state: Literal["running", "done", "cancelled", "failed"] = "running"
    done: int = 0
    failures: list[Json] = field(default_factory=list)
    ended_at: float = 0.0
    result: Json | None = None
    task: asyncio.Task[None] | None = None

    async def run(
        self, ids: Iterable[str], work: Callable[[str], Awaitable[Any]], at_once: int
    ) -> None:
        waiting = iter(ids)

        async def worker() -> None:
            for one in waiting:
                try:
                    told = await work(one)
                    self.result = told if isinstance(told, dict) else self.result
                except AztError as error:
                    self.failures.append({"id": one, "code": error.code, "message": error.message})
                self.done += 1

        try:
            await asyncio.gather(*(worker() for _ in range(at_once)))
            self.state = "failed" if 0 < self.total == len(self.failures) else "done"
        except Exception:  # a mistake in the work must show in the job
            log.exception("job %s failed", self.kind)
            self.state = "failed"
        except asyncio.CancelledError:
            self.state = "cancelled"
        finally:
            self.ended_at = time.time()


FLUSH_PAUSE_S, SUMS_EVERY_S = 0.5, 60.0
EVENTS_KEPT, WATCHERS_MAX, WATCHER_WAITING_MAX, PING_S = 500, 8, 1000, 15.0
WATCH_LINGER_S, TELL_EVERY_S, CODEX_EVERY_S, TOLD_AT_ONCE_MAX = 60.0, 0.25, 3.0, 100


class Events:
    """What the console and `azt log -f` watch: numbered events, the newest kept for who returns."""

    def __init__(self) -> None:
        self.newest_id = 0
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=EVENTS_KEPT)
        self._watchers: list[tuple[str, asyncio.Queue[bytes]]] = []  # session, what it shall get
        self.watched_s = -math.inf  # monotonic: when somebody last watched

    def publish(self, name: str, data: Json) -> None:
        self.newest_id += 1
        raw = b"id: %d\nevent: %b\ndata: %b\n\n"
        event = raw % (self.newest_id, name.encode(), encode_json(data))
        self._kept.append((self.newest_id, event))
        for watcher in list(self._watchers):
            if watcher[1].qsize() < WATCHER_WAITING_MAX:
                watcher[1].put_nowait(event)
            else:
                self._end(watcher)  # it does not read: it may come back, and catch up

    def is_watched(self) -> bool:
        """Or was a moment ago: who returns then is told what happened meanwhile."""
        now_s = time.monotonic()
        self.watched_s = now_s if self._watchers else self.watched_s
        return now_s - self.watched_s < WATCH_LINGER_S

    def forget(self) -> None:
        """From here on nobody is told of everything: who returns later begins anew."""
        self.newest_id += 1
        self._kept.clear()

    def end(self, reason: str, session: str | None = None) -> None:
        """End the streams of a session, or all of them."""
        for watcher in [one for one in self._watchers if session in (None, one[0])]:
            self._end(watcher, reason)

    def _end(self, watcher: tuple[str, asyncio.Queue[bytes]], reason: str = "too_many") -> None:
        self._watchers.remove(watcher)
        watcher[1].put_nowait(b'event: bye\ndata: {"reason":"%b"}\n\n' % reason.encode())
        watcher[1].put_nowait(b"")

    async def watch(
        self,
        hello: Json,
        last_id: int | None,
        session: str = "",
        shown: Callable[[bytes], bytes] = bytes,
    ) -> AsyncIterator[bytes]:
        """The events as they come, first those since `last_id`. Too old for that: `resync`.

        shown  what the one who watches may see of an event
        """
        own = [one for one in self._watchers if one[0] == session]
        for watcher in own[: max(0, len(own) + 1 - WATCHERS_MAX)]:
            self._end(watcher)
        mine: asyncio.Queue[bytes] = asyncio.Queue()
        self._watchers.append((session, mine))
        hello = {"eventId": self.newest_id, **hello}
        missed = [event for number, event in self._kept if number > (last_id or 0)]
        is_known = last_id is None or self.newest_id - last_id <= len(missed)
        first = b"".join(missed if last_id else []) if is_known else b"event: resync\ndata: {}\n\n"
        try:
            yield b"retry: 2000\nevent: hello\ndata: %b\n\n%b" % (encode_json(hello), shown(first))
            while True:
                try:
                    event = await asyncio.wait_for(mine.get(), PING_S)
                except TimeoutError:
                    event = b": ping\n\n"
                if not event:
                    return
                yield shown(event)
        finally:
            with contextlib.suppress(ValueError):
                self._watchers.remove((session, mine))


SESSION_LIFE_S, SESSIONS_MAX, CODE_LIFE_S = 30 * 86400, 100, {"open": 60.0, "pair": 300.0}
GUESSES_MAX, GUESS_PAUSE_S, GUESS_WAIT_S, BAN_S = 5, 1.0, 10.0, 1800.0
_CODE_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # none is mistaken for another


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Guard:
    """Who guesses secrets waits for his turn, one in a second for all, and is banned in the end."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}  # who -> how many, counted until when
        self._free_s = 0.0

    async def turn(self, who: str) -> float:
        """Wait for it; or how many seconds to stay away: too many failures, or others who wait."""
        give_up_s = time.monotonic() + GUESS_WAIT_S
        while True:
            now = time.monotonic()
            count, until_s = self._failures.get(who, (0, 0.0))
            if count >= GUESSES_MAX and until_s > now:
                return until_s - now
            if self._free_s <= now or now > give_up_s:
                return GUESS_WAIT_S if self._free_s > now else 0.0
            await asyncio.sleep(self._free_s - now)

    def failed(self, who: str) -> None:
        now = time.monotonic()
        self._free_s = now + GUESS_PAUSE_S
        count, until_s = self._failures.pop(who, (0, 0.0))
        self._failures[who] = (count + 1 if until_s > now else 1, now + BAN_S)
        if len(self._failures) > 10_000:
            del self._failures[next(iter(self._failures))]

    def forgive(self, who: str) -> None:
        self._failures.pop(who, None)


class Codes:
    """Codes that sign a browser in, once: of `azt open`, and of pairing. Kept as hashes."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[str, float]] = {}  # what for -> hash, when it ends (unix)

    def make(self, purpose: str) -> tuple[str, float]:
        """A new one, and when it ends. The one before for the same purpose ends now."""
        letters = "".join(secrets.choice(_CODE_LETTERS) for _ in range(8))  # a person may type it
        code = f"{letters[:4]}-{letters[4:]}" if purpose == "pair" else secrets.token_urlsafe(32)
        self.live[purpose] = hashed(code), time.time() + CODE_LIFE_S[purpose]
        return code, self.live[purpose][1]

    def spend(self, code: str) -> str:
        """What this live code is for; it is used up. "" for any other."""
        for purpose, (kept, ends_at) in list(self.live.items()):
            typed = code.strip().upper() if purpose == "pair" else code
            if ends_at < time.time():
                del self.live[purpose]
            elif hmac.compare_digest(hashed(typed), kept):
                del self.live[purpose]
                return purpose
        return ""


Interface = tuple[str, ipaddress.IPv4Interface | ipaddress.IPv6Interface]
"""Its name; its address with the network behind it."""


class Gateway:
    """State, pools and what saves them. Made by room 18, handed to every handler."""

    def __init__(self, environment: Environment, flags: Mapping[str, Any]) -> None:
        self.environment, self.paths, self.flags = environment, environment.paths, flags
        self.settings = self.started_settings = load_settings(None, environment, flags)
        self.store = AccountStore()
        self.catalogue = Catalogue.read(None, None)
        self.keys: list[Json] = []
        self.sessions: list[Json] = []
        self.codes, self.guard = Codes(), Guard()
        self._uses_saved_ms = 0
        self.interfaces: list[Interface] = []
        self.admin_token = ""
        self.pages: dict[str, Page] = {}
        self.responses = ResponseStore()
        self.codex_lists: dict[str, tuple[str, Answer]] = {}  # account id -> query, model list
        self.no_images: set[str] = (
            set()
        )  # ways to a picture that were refused: see `_make_pictures`
        self.previews: dict[str, Any] = {}  # name -> what an import would bring, by index
        self.removed: dict[str, Any] = {}  # name -> what was removed, and who served
        self.pool = ConnectionPool(_egress(environment, self.settings))
        self.calls = WorkerPool("call", MAX_CALL_THREADS, waiting_max=0)
        self.short = WorkerPool("short", 16)
        self.files = WorkerPool("file", 1)
        use = (self.store, self.pool, self.calls, environment)
        # In turn: a change by a person that is taken back must not take new tokens with it.
        self.renewals = Renewals(*use, functools.partial(self._in_turn, self.save_accounts))
        self.rotation = Rotation(*use, self.renewals, self.save_soon)
        self.logins = Logins(self.pool, self.calls, environment.auth_base_url, self.add_account)
        self.codex = CodexFiles(self.paths)
        self.codex_seen: Json = {}  # Codex's files as they were when somebody last looked
        self.renewals.on_renewed = functools.partial(in_thread, self.files, self.codex.follow)
        self.started_at = time.time()
        # The calls of the API that are being answered, told by who serves.
        self.running: Callable[[], list[RequestRecord]] = list
        # Drain for so many seconds, then start anew; None for a gateway that a command has started.
        self.restart: Callable[[float], None] | None = None
        self.usage, self.requests = UsageStats(), RequestLog(0)
        self.events = Events()
        self.telling: asyncio.Task[None] | None = None  # who watches of changes (room 16c)
        self.minute = {"t": 0, "ok": 0, "failed": 0}  # the newest in which a request has ended
        self.ended: list[RequestRecord] = []  # and not counted yet
        self._counting = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None
        self._sums_saved_s = time.monotonic()
        self.listening: list[tuple[str, int]] = []
        self.damaged: list[str] = []  # state files that were kept for the person to look at
        self.jobs: dict[str, Job] = {}
        self._changing = asyncio.Lock()
        self._saving: asyncio.TimerHandle | asyncio.Future[None] | None = None

    @property
    def default_model(self) -> str:
        return self.catalogue.default(self.settings.text("defaultModel"))

    @property
    def url(self) -> str:
        """The address of this gateway for programs on this machine, running or not."""
        host, port = self.settings.text("server.host"), self.settings.number("server.port")
        host, port = self.listening[0] if self.listening else (host, port)
        return f"http://{_near(host, port)}"

    async def with_codex(self, work: Callable[..., Json], *arguments: Any) -> Json:
        """One piece of work on Codex's files, in the thread that all file work shares."""
        done = await in_thread(self.files, work, *arguments)
        await self.look_at_codex()
        return done

    async def look_at_codex(self) -> None:
        """What is so by now. A sign-in that azt has lost and Codex has anew comes back."""
        self.codex_seen = await in_thread(self.files, self.codex.look, f"{self.url}/codex/v1")
        ours = self.store.accounts.get(str(self.codex_seen["auth"]["accountId"]))
        if ours is not None and ours.rejected:
            found = await in_thread(self.files, read_codex_sign_in, self.paths.codex_auth)
            if ours.rejected and self.renewals.adopt(found):
                await self.renewals.keep()

    @blocking
    @disk_errors()
    def load(self) -> None:
        """Read every state file once. Raises StateError rather than start with less."""
        paths = self.paths
        prepare_home(paths)
        adopt_home(paths, functools.partial(from_node, now=time.time()))
        try:
            saved = read_json(paths.settings, 1)
        except StateError as error:  # unlike accounts they can be typed again
            log.error("%s The defaults are in force.", error.message)
            saved = None
        self._apply_settings(saved)
        self.started_settings = self.settings
        shape = AccountStore.from_json
        loaded = shape(read_json(paths.accounts, ACCOUNTS_VERSION, shape))
        self.store.accounts, self.store.active_id = loaded.accounts, loaded.active_id
        saved = read_json(paths.keys, 1, lambda saved: [one["hash"] for one in saved["keys"]])
        self.keys = saved["keys"] if saved else []
        needed = operator.itemgetter("id", "hash", "scope", "createdAt")
        try:
            saved = read_json(paths.sessions, 1, lambda saved: [*map(needed, saved["sessions"])])
        except StateError as error:  # unlike accounts they are made again at once
            log.error("%s Every browser has to sign in again.", error.message)
            saved = None
        self.sessions = saved["sessions"] if saved else []
        delete_file(paths.open_page)
        self.interfaces = own_interfaces()
        self.catalogue = Catalogue.read(_read_cache(paths.models), _read_cache(paths.codex_models))
        self.admin_token = read_or_make_secret(paths.admin_token)
        self.pages = read_pages()
        self.usage.load(paths)
        self.requests = RequestLog(self.settings.number("log.keepRows"))
        self.requests.load(paths.requests, self._days_ago_ms("log.keepDays"))
        self.renewals.recover()
        self.damaged = sorted(one.name for one in paths.state.rglob("*.corrupt-*"))
        self.codex_seen = self.codex.look(f"{self.url}/codex/v1")

    @property
    def notices(self) -> list[Json]:
        """What the person should know, the most urgent first (console.md 6.2)."""
        found: list[Json] = [
            {"code": "state_damaged", "level": "error", "params": {"file": name}}
            for name in self.damaged
        ]
        if why := self.renewals.unsaved:
            found.insert(0, {"code": "accounts_unsaved", "level": "error", "params": {"why": why}})
        for one in itertools.islice((a for a in self.store.accounts.values() if a.rejected), 20):
            params = {"id": one.id, "account": one.name, "reason": one.rejected}
            action = {"kind": "login", "accountId": one.id}
            wish: Json = {"code": "login_rejected", "level": "warn", "params": params}
            found.append(wish | {"action": action})
        ids = (":".join((one["code"], *one["params"].values())) for one in found)
        return [{"id": name, **one} for name, one in zip(ids, found, strict=True)]

    def _apply_settings(self, saved: Json | None) -> None:
        self.settings = load_settings(saved, self.environment, self.flags)
        log.setLevel(self.settings.text("log.level").upper())
        enabled, order, before, excluded = (
            self.settings[f"autoSwitch.{name}"]
            for name in ("enabled", "order", "beforePercent", "excludedIds")
        )
        self.rotation.rules = Rules(enabled, order, before, frozenset(excluded))
        egress = _egress(self.environment, self.settings)
        if egress != self.pool.egress:
            self.pool.egress = egress
            self.pool.close()

    # -- what happened

    def recorded(self, record: RequestRecord) -> None:
        """A request has ended. It is counted and written soon, with others, off the loop."""
        if record.route:
            self.ended.append(record)
            self._flush_later()

    def _flush_later(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_soon())

    def note_quotas(self) -> None:
        """Once an hour what is left of each account, among the events: its chart shows it."""
        for account in self.store.accounts.values():
            quota, at = account.quota, account.quota.get("captured_at", 0)
            if at // 3600 > quota.get("noted", 0):
                quota["noted"] = at // 3600
                left = {one["key"]: 100 - round(one["used"]) for one in quota.get("windows", ())}
                point = encode_json({"quota": account.id, "at": at * 1000, **left}) + b"\n"
                self.usage.pending.append((_day(at * 1000), point))
                self._flush_later()

    async def forget_usage(self) -> None:
        """Clear the statistics, on disk too."""
        async with self._counting:
            self.ended, self.usage = [], UsageStats()
            await in_thread(self.files, self.usage.wipe, self.paths)

    async def forget_requests(self, before_ms: int) -> int:
        """Take the rows before that time (0: all) out of the log, on disk too; how many."""
        await self.counted()
        rows = self.requests
        lines = list(rows.lines)
        kept = [one for one in lines if before_ms and json.loads(one)["at"] >= before_ms]
        rows.lines.clear()
        rows.lines.extend(kept)
        rows.pending, rows.written = [], 1 << 30  # the file is written anew
        await in_thread(self.files, rows.save, self.paths.requests, [], kept)
        return len(lines) - len(kept)

    async def _flush_soon(self) -> None:
        """Write what has ended, a batch at a time, and try again as long as the disk is full."""
        pause_s = FLUSH_PAUSE_S
        while self.ended or self.usage.pending or self.requests.pending:
            await asyncio.sleep(pause_s)
            try:
                await self.flush(time.monotonic() - self._sums_saved_s > SUMS_EVERY_S)
                pause_s = FLUSH_PAUSE_S
            except AztError as error:
                log.error("%s The records of requests wait in memory.", error.message)
                pause_s = min(pause_s * 2, 60.0)

    async def flush(self, with_sums: bool = False) -> UsageStats:
        """Count what has ended so far, tell who watches, write it; the sums as well if asked.

        raises  AztError when it is not on disk; it is counted all the same, and written later
        """
        async with self._counting:
            usage, rows, paths = self.usage, self.requests, self.paths
            records, self.ended = self.ended, []
            batch = await in_thread(self.files, Batch, records)
            usage.add(batch)
            rows.add(batch.rows)
            for event in batch.events:
                self.events.publish("request.finished", event)
                minute = (event["at"] + event["durationMs"]) // 60_000 * 60_000
                if minute > self.minute["t"]:
                    self.minute = {"t": minute, "ok": 0, "failed": 0}
                if event["result"] in self.minute:
                    self.minute[event["result"]] += 1
            lines, usage.pending = usage.pending, []
            sums = usage.snapshot() if with_sums else ()  # of exactly these lines and all before
            try:
                await in_thread(self.files, usage.save, paths, lines, sums)
                new, rows.pending = rows.pending, []
                await in_thread(self.files, rows.save, paths.requests, new, list(rows.lines))
            finally:
                usage.pending[:0] = lines  # `save` takes out what is on disk
            if with_sums:
                self._sums_saved_s = time.monotonic()
                await in_thread(self.files, self._prune)
            return usage

    async def counted(self) -> UsageStats:
        """The sums with everything that has ended. A full disk does not matter to who asks."""
        with contextlib.suppress(AztError):
            await self.flush()
        return self.usage

    @blocking
    def _prune(self) -> None:
        """Delete the files of events that are too old, or too many bytes before the newest."""
        through, left = self.usage.through, self.settings.number("usage.keepMb") * MIB
        oldest = _day(self._days_ago_ms("usage.keepDays"))
        for name in sorted(through, reverse=True):
            left -= through[name]
            if name < oldest or (left < 0 and name != max(through)):
                delete_file(self.paths.usage_events / name)
                del through[name]

    def _days_ago_ms(self, setting: str) -> int:
        return int((time.time() - self.settings.number(setting) * 86400) * 1000)

    async def save_accounts(self) -> None:
        """On disk before anyone goes on. A failure is loud; memory keeps the newer state."""
        await in_thread(self.files, write_json, self.paths.accounts, self.store.to_json())

    def save_soon(self) -> None:
        """Save what changes with every request (quota, rests), once for all of SAVE_LATER_S."""

        def save() -> None:
            self._saving = asyncio.ensure_future(self.save_now())

        if self._saving is None:
            self._saving = asyncio.get_running_loop().call_later(SAVE_LATER_S, save)

    async def save_now(self) -> None:
        """What `save_soon` has put off."""
        if self._saving is not None:
            self._saving = None
            self.note_quotas()
            await self.renewals.keep()

    async def refresh_quota(self, account_id: str, by_person: bool = True) -> Account:
        """Ask the backend what is left. A person's wish also ends a rest that this proves wrong;
        a timer's does not, for the backend promises more than it keeps (asks.md 1.7)."""
        account = await self.renewals.fresh_account(self.store.find(account_id))
        credentials = Credentials(account.access_token, account.account_id)
        call = (self.pool, self.environment.chatgpt_base_url, credentials, Wire())
        reading = await in_thread(self.short, fetch_quota, *call)
        account = self.store.accounts.get(account.id, account)
        learn_quota(account, reading)
        is_empty = account.cooldown_reason == "quota_exhausted"
        if by_person and is_empty and account.quota["left"] > 0:
            account.cooldown_until = 0
        self.save_soon()
        return account

    def ready_for(self, kind: str) -> None:
        """Raises AztError 409 while a job of this kind runs."""
        for job in self.jobs.values():
            if job.kind == kind and not job.ended_at:
                text = f"This is being done already: job {job.id}."
                raise AztError(409, "already_running", text, extra={"params": {"jobId": job.id}})

    def start_job(
        self,
        kind: str,
        ids: Collection[str],
        work: Callable[[str], Awaitable[Any]],
        at_once: int = 1,
    ) -> Job:
        """Long work on each of `ids`, with a progress to look at until JOB_KEPT_S after its end.

        raises  AztError 409 while another job of this kind runs
        """
        self.ready_for(kind)
        job = Job(f"job_{secrets.token_hex(4)}", kind, len(ids), time.time())
        later = asyncio.get_running_loop().call_later
        job.task = asyncio.create_task(job.run(ids, work, at_once))
        job.task.add_done_callback(lambda _: later(JOB_KEPT_S, self.jobs.pop, job.id, None))
        self.jobs[job.id] = job
        return job

    def refresh_quotas(
        self, accounts: Iterable[Account], by_person: bool = True, kind: str = "refresh_quotas"
    ) -> Job:
        """As a job, some accounts at once. Raises AztError 409 while another such job runs."""
        work = functools.partial(self.refresh_quota, by_person=by_person)
        at_once = self.settings.number("quota.concurrency")
        return self.start_job(kind, [one.id for one in accounts], work, at_once)

    async def watch_quotas(self) -> None:
        """Read all quotas as often as the setting says, by default never; tidy up now and then."""
        waited = 0.0  # minutes
        while True:
            waited += (step := random.uniform(0.5, 1))
            await asyncio.sleep(step * MINUTE_S)
            await self.save_uses()
            self.interfaces = await in_thread(self.short, own_interfaces)
            if self.codes.live.get("open", ("", 0.0))[1] < time.time():
                await in_thread(self.files, delete_file, self.paths.open_page)
            if 0 < self.settings.number("quota.everyMinutes") <= waited:
                waited = 0.0
                with contextlib.suppress(AztError):  # a person has just asked for the same
                    good = [one for one in self.store.accounts.values() if not one.rejected]
                    self.refresh_quotas(good, by_person=False)

    async def _in_turn(self, change: Callable[[], Awaitable[T]]) -> T:
        """One change by a person at a time, and to its end though the client leaves: what is in
        force and what is on disk stay the same."""

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

    async def add_account(self, account: Account) -> bool:
        """Add who signed in, or renew it. Whether it is a new one."""
        is_new = account.id not in self.store.accounts
        await self.change_accounts(lambda store: store.add(account))
        return is_new

    async def change_settings(self, changes: Json, revision: Any = None) -> None:
        """Merge checked values into the file and put them in force.

        raises  AztError 409 when `revision` is given and no longer ours; StateError rather than
                write over a file that cannot be read
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
            await self._save_list(self.paths.keys, "keys", keys)
            self.keys = keys

        await self._in_turn(save)

    async def change_sessions(self, change: Callable[[list[Json]], list[Json]]) -> int:
        """What is taken out ends, with the events that it watches; how many."""

        async def save() -> int:
            before, kept = self.sessions, change(self.sessions)[-SESSIONS_MAX:]
            await self._save_list(self.paths.sessions, "sessions", kept)
            self.sessions = kept
            ended = {one["id"] for one in before} - {one["id"] for one in kept}
            for name in ended:
                self.events.end("session_ended", name)
            return len(ended)

        return await self._in_turn(save)

    async def _save_list(self, path: Path, name: str, items: list[Json]) -> None:
        copies = [dict(one) for one in items]  # uses are noted in them meanwhile
        await in_thread(self.files, write_json, path, {"version": 1, name: copies})

    async def save_uses(self) -> None:
        """When keys and sessions were last used, and how often: noted in memory, saved at times."""
        latest = max((one.get("lastUsedAt") or 0 for one in self.keys + self.sessions), default=0)
        if latest > self._uses_saved_ms:
            self._uses_saved_ms = latest
            with contextlib.suppress(AztError):  # said in the log by the next change
                if self.keys:
                    await self.change_keys(list)
                if self.sessions:
                    await self.change_sessions(list)

    async def open_page(self) -> tuple[Json, Path]:
        """A code of `azt open`, and the file that takes a browser of this machine there: in no
        process's arguments. It is gone when the code is."""
        code, ends_at = self.codes.make("open")
        made = {"code": code, "url": f"{self.url}/#/open/{code}", "expiresAt": int(ends_at * 1000)}
        text = f'<!doctype html><meta http-equiv="refresh" content="0;url={made["url"]}">azt'
        await in_thread(self.files, write_bytes, self.paths.open_page, text.encode())
        return made, self.paths.open_page

    async def refresh_models(self) -> bool:
        """Ask the backend for the catalogue; False when ours is still current."""
        account = await self.renewals.fresh_account(self.rotation.choose())
        credentials = Credentials(account.access_token, account.account_id)
        etag = self.catalogue.etag if self.catalogue.source == "azt" else ""
        call = (self.pool, self.environment.codex_base_url, credentials, etag, Wire())
        fetched = await in_thread(self.calls, fetch_models, *call)
        if fetched is None:
            return False
        models, etag = fetched
        if not models:
            text = "The upstream lists no models for this account; the old list is kept."
            raise UpstreamError(502, "upstream_error", text)
        catalogue = Catalogue(models, "azt", etag, int(time.time()))
        await in_thread(self.files, write_json, self.paths.models, catalogue.to_json())
        self.catalogue = catalogue
        return True


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@blocking
def own_interfaces() -> list[Interface]:
    """The addresses of this machine, as far as the system tells."""
    found: list[Interface] = []
    # SIOCGIFADDR, SIOCGIFNETMASK
    codes = (0xC0206921, 0xC0206925) if sys.platform == "darwin" else (0x8915, 0x891B)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as system:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                raw = struct.pack("40s", name.encode())
                parts = [fcntl.ioctl(system, code, raw)[20:24] for code in codes]
                text = "/".join(str(ipaddress.IPv4Address(part)) for part in parts)
                found.append((name, ipaddress.IPv4Interface(text)))
    with contextlib.suppress(OSError):
        for line in read_foreign(Path("/proc/net/if_inet6"), MIB).decode().splitlines():
            address, _, size, *_, name = line.split()
            text = f"{ipaddress.IPv6Address(bytes.fromhex(address))}/{int(size, 16)}"
            found.append((name, ipaddress.IPv6Interface(text)))
    return found


def _near(host: str, port: int) -> str:
    """By what address programs on this machine reach who listens there."""
    is_here = host == "localhost" or host.startswith("127.") or host == "::1"
    return _address(host if is_here else "::1" if host == "::" else "127.0.0.1", port)


def _egress(environment: Environment, settings: Settings) -> Egress:
    """The proxy of the settings when it is on, else that of the environment."""
    bases = (environment.codex_base_url, environment.chatgpt_base_url, environment.auth_base_url)
    own = frozenset(urllib.parse.urlsplit(base).hostname or "" for base in bases)
    proxy_url = settings.text("networkProxy.url")
    if settings.flag("networkProxy.enabled") and proxy_url:
        return Egress(proxy_url, settings.text("networkProxy.noProxy"), environment.ca_file, own)
    no_proxy = f"{environment.no_proxy},localhost,127.0.0.1,::1"
    return Egress(environment.proxy_url, no_proxy, environment.ca_file, own)


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

PeerClass = Literal["own", "neighbour", "relayed", "lan", "public"]
"""own: loopback. neighbour: loopback, but another user of this machine (told on Linux only).
relayed: loopback, but a proxy's header says that it speaks for somebody else.
lan: private, on-link or an own network. public: the rest (trust.md 2)."""

Access = Literal[
    Literal["api", "codex", "health", "metrics", "page", "asset"],
    Literal["admin_session", "admin_read", "admin_write", "admin_local", "admin_proof"],
]
"""Which rows of the decision table a route follows (`may`)."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class StreamBody(Protocol):
    """A body that writes itself on the loop, without a task; `Relay` (room 10) is one."""

    def start(self, sink: Sink) -> None: ...  # the head is rendered: write from now on
    def pause(self) -> None: ...  # the client reads too slowly: write nothing until `resume`
    def resume(self) -> None: ...
    def probe(self) -> bool: ...  # the client half-closed: write something harmless if you may
    def cancel(self) -> None: ...  # the client left: stop at once, the sink is dead
    def stop(self, error: AztError) -> None: ...  # the server ends: write an error event, finish


@dataclass(slots=True)
class Request:
    """One request with its whole body."""

    id: str
    method: str
    path: str  # percent-decoded once, without the query; slashes as the client sent them
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names; repeated ones joined with ", "
    peer: str
    peer_class: PeerClass
    record: RequestRecord
    held: Callable[[int], None] = field(repr=False)  # told how the memory held for bodies changes
    body: bytes | bytearray = b""
    target: str = ""  # the request target as it was sent
    params: dict[str, str] = field(default_factory=dict)
    who: str = ""  # whose failures count with those of this caller (`Guard`)
    is_own: bool = False
    has_proof: bool = False  # by the admin token, or a session that stands for it
    session: Json | None = None  # of the console, by its cookie
    key: Json | None = None  # the API key that was sent
    pinned: str = ""  # the id of the account that the Playground has named

    def release(self) -> None:
        """Free the body before the answer is complete: a stream may run for an hour."""
        self.held(-self.record.request_bytes)
        self.body = b""


@dataclass(slots=True)
class Reply:
    """What a handler returns. A body of bytes is sent at once, the others are streamed."""

    status: int = 200
    body: bytes | StreamBody | AsyncIterator[bytes] = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


Handler = Callable[[Any, Request], Awaitable[Reply]]


def json_reply(value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Reply:
    return Reply(status, encode_json(value), [("content-type", "application/json"), *headers])


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the route table."""

    method: str
    path: str  # "/v1/models/{id}": `{name}` is one segment, at the end the rest (ids have "/")
    handler: Handler
    access: Access
    body_max_bytes: int = 0  # 0: the limit of the policy
    raw_body: bool = False  # a compressed body is handed on as it came
    takes_form: bool = False  # of the administration: multipart/form-data as well as JSON


# -- every refusal: code -> status, sentence. Those of malformed bytes stand with the gate.

_KEY_ADVICE = "`azt keys add NAME` on the machine that azt runs on makes one."
_BODY_ADVICE = "The setting limits.bodyMb (AZT_BODY_LIMIT_MB) raises this."
_LOCAL = "The administration answers only on the machine that azt runs on."
_ZSTD_ADVICE = "For zstd azt needs Python 3.14 or the package backports.zstd."
_REFUSALS = {
    "bad_token": (401, "This is not the admin token. The file .state/admin-token holds it."),
    "csrf_header_missing": (403, "Changes need the header `X-AZT-Admin: 1`."),
    "lan_console_off": (403, _LOCAL),
    "local_only": (403, _LOCAL),
    "not_signed_in": (401, "Sign in first: with `azt open`, or the admin token."),
    "pairing_expired": (401, "This code is wrong, used up or too old: make a new one."),
    "proof_needed": (401, "Run `azt open`, or send what .state/admin-token holds as the key."),
    "slow_down": (429, "Too many wrong tries came from this address. Wait {minutes} minutes."),
    "api_key_expired": (401, f"This API key has expired. {_KEY_ADVICE}"),
    "api_key_spent": (429, "This API key has made all its requests of today; tomorrow it may."),
    "api_key_missing": (401, f"An API key is needed in the authorization header. {_KEY_ADVICE}"),
    "api_key_needed": (403, f"From outside or through a proxy an API key is needed. {_KEY_ADVICE}"),
    "concurrency_limit": (429, "{most} requests of this address are running: wait for one."),
    "expectation_failed": (417, "The only expectation that azt meets is 100-continue."),
    "host_not_allowed": (403, "The setting server.allowedHosts does not have {host!r}: add it."),
    "internal_error": (500, "azt failed on this request. Its log names the reason under {id}."),
    "invalid_api_key": (401, f"This API key is not known. {_KEY_ADVICE}"),
    "invalid_body": (400, "The {coding} body is damaged or incomplete."),
    "invalid_url": (400, "The path has odd characters or segments, or too many parameters."),
    "lan_off": (403, "The API is off for other machines: the setting server.lanApi turns it on."),
    "method_not_supported": (405, "{path} does not take {method}: use {allow}."),
    "metrics_not_here": (403, f"Metrics are for this machine, or for an API key. {_KEY_ADVICE}"),
    "origin_not_allowed": (403, "Pages of {origin!r} may not call this (server.corsOrigins)."),
    "overloaded": (503, "azt serves too many {things} at once. Try again in a few seconds."),
    "page_not_here": (403, "This page is for the machine that azt runs on and its own network."),
    "request_timeout": (408, "The request came too slowly. Send it again."),
    "request_too_large": (413, f"The request body is larger than {{limit}} bytes. {_BODY_ADVICE}"),
    "shutting_down": (503, "azt is shutting down. Try again when it is back."),
    "unknown_url": (404, "Invalid URL ({method} {path})"),
    "unsupported_content_encoding": (415, f"Send it plain or as {{known}}. {_ZSTD_ADVICE}"),
    "unsupported_media_type": (415, "Send the body as application/json."),
    "upgrade_refused": (400, "azt does not switch protocols: use plain HTTP/1.1."),
}
_ADDED = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}


def _refusal(code: str, headers: dict[str, str] | None = None, **words: object) -> AztError:
    status, sentence = _REFUSALS[code]
    # OpenAI has no code for a key that was not sent.
    shown = None if code == "api_key_missing" else code
    headers = headers or _ADDED.get(status, {})
    return AztError(status, shown, sentence.format(**words), headers=headers)


def slow_down(left_s: float) -> AztError:
    minutes, seconds = math.ceil(left_s / 60), math.ceil(left_s)
    error = _refusal("slow_down", {"retry-after": str(seconds)}, minutes=minutes)
    error.extra = {"params": {"retryAfterMs": seconds * 1000}}
    return error


# -- the gate: a head that two programs could read differently is never read at all

_REQUEST_HEAD = re.compile(
    rb"(" + _TOKEN + rb"++) ([\x21-\x7e]++) HTTP/1\.([01])\r\n(?:" + _FIELD + rb")*+\r\n"
)
_OTHER_VERSION = re.compile(rb"[^\r]* HTTP/(?!1\.[01]\r)[0-9]\.[0-9]\r\n")
_HOST = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{1,5}))?"
)


def _malformed(message: str, status: int = 400) -> AztError:
    message = f"{message} The connection is closed."
    return AztError(status, "malformed_request", message, type="invalid_request_error")


def find_head(data: bytes) -> int:
    """Where the head at the start of `data` ends; 0 while it is incomplete. Pure.

    The verdict is the same for every split of the bytes: what is refused early is looked at in the
    order in which it stands. Raises AztError 400, 431.
    """
    if not data[:1].isalpha():
        raise _malformed("This is no HTTP request: azt speaks http://, not https://.")
    end = data.find(b"\r\n\r\n") + 4
    size = end if end > 3 else len(data)
    known = min(size, MAX_HEAD_BYTES)
    if data.count(b"\n", 0, known) != data.count(b"\r\n", 0, known):
        raise _malformed("A line of the request head ends without CR.")
    if size > MAX_HEAD_BYTES:
        raise _malformed(f"The request head is larger than {MAX_HEAD_BYTES} bytes.", 431)
    return end if end > 3 else 0


def read_head(head: bytes) -> tuple[str, str, bool, dict[str, str]]:
    """The strict gate: bytes up to CRLFCRLF, every rule of trust.md 1.5. Pure.

    out     method, target, whether it is HTTP/1.1, headers like those of `Request`
    raises  AztError 400, 405 (CONNECT), 431, 501 (transfer coding), 505
    """
    found = _REQUEST_HEAD.fullmatch(head)
    if found is None and _OTHER_VERSION.match(head):
        raise _malformed("azt speaks HTTP/1.1 and HTTP/1.0.", 505)
    if found is None:
        raise _malformed("The request line or a header line is malformed.")
    if head.count(b"\r\n") - 2 > MAX_HEAD_FIELDS:
        raise _malformed(f"The request head has more than {MAX_HEAD_FIELDS} fields.", 431)
    try:
        headers = read_fields(head)
    except ValueError as error:
        raise _malformed(str(error)) from None
    method, target = found[1].decode(), found[2].decode()
    is_modern = found[3] == b"1"
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    # RFC 9112 6.1: this is how requests are smuggled, so the connection ends with it.
    is_ambiguous = coding is not None and (length is not None or not is_modern)
    is_number = length is None or _LENGTH.fullmatch(length)
    host = headers.get("host", "?" if is_modern else "")
    scheme, _, rest = target.lower().partition("://")
    is_here = host and (scheme, rest.partition("/")[0]) == ("http", host.lower())
    faults = (
        (is_ambiguous, "Transfer-Encoding with Content-Length or HTTP/1.0 is ambiguous.", 400),
        (coding not in (None, "chunked"), "azt takes no transfer coding but `chunked`.", 501),
        (not is_number, "Content-Length is not a number.", 400),
        (host and not _is_host(host), "The Host header is missing or malformed.", 400),
        (method == "CONNECT", "azt is no proxy: send the request itself.", 405),
        (target[:1] != "/" and not is_here, "The target is no path and no URL of this Host.", 400),
        ("#" in target, "The request target contains '#': encode it as %23.", 400),
    )
    for is_so, message, status in faults:
        if is_so:
            raise _malformed(message, status)
    return method, target, is_modern, headers


def _is_host(host: str) -> bool:
    found = _HOST.fullmatch(host)
    if found is None or int(found[2] or 0) > 65535:
        return False
    return not found[1] or (":" in found[1] and _host_kind(found[1]) != "name")


@functools.lru_cache(maxsize=512)
def _host_kind(name: str) -> Literal["loopback", "address", "name"]:
    if name == "localhost" or name.endswith(".localhost"):
        return "loopback"
    try:
        return "loopback" if ipaddress.ip_address(name).is_loopback else "address"
    except ValueError:
        return "name"


def content_codings(header: str) -> list[str]:
    """`content-encoding` -> the codings to undo, in that order. Raises AztError 415."""
    known = ["gzip", "deflate", *(["zstd"] if find_zstd() else [])]
    names = [name.strip().lower().removeprefix("x-") for name in reversed(header.split(","))]
    names = [name for name in names if name not in ("", "identity")]
    if len(names) <= MAX_CODING_LAYERS and set(names) <= set(known):
        return names
    listed = ", ".join(known)
    raise _refusal("unsupported_content_encoding", {"accept-encoding": listed}, known=listed)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form; a file where it has a file name. `body` is a view, not a copy."""

    name: str
    filename: str | None
    content_type: str
    body: memoryview


def _bad_form(message: str) -> BadRequest:
    return BadRequest(f"The multipart/form-data body is damaged: {message}.", None, "invalid_body")


def parse_form(body: bytes | bytearray, content_type: str, parts_max: int) -> list[Part]:
    """A `multipart/form-data` body (RFC 7578): whole, without anything before or behind it.

    raises  BadRequest
    """
    named = re.search(
        r"""(?i);\s*boundary=("?)([\w'()+,./:=? -]{1,70})\1\s*(?:;|$)""", content_type
    )
    if not named or not content_type.lower().startswith("multipart/form-data"):
        raise _bad_form("its content type names no boundary")
    mark = f"\r\n--{named[2]}".encode()
    if not body.startswith(mark[2:]):
        raise _bad_form("it does not begin with its boundary")
    parts: list[Part] = []
    at, view = len(mark) - 2, memoryview(body)
    while body.startswith(b"\r\n", at):
        head_end = body.find(b"\r\n\r\n", at, at + MAX_TRAILER_BYTES)
        end = body.find(mark, head_end + 4)
        if head_end < 0 or end < 0:
            raise _bad_form("a part is incomplete, or its head too large")
        if len(parts) == parts_max:
            raise _bad_form(f"it has more than {parts_max} parts")
        parts.append(_form_part(bytes(view[at + 2 : head_end]), view[head_end + 4 : end]))
        at = end + len(mark)
    if bytes(view[at:][:5]) not in (b"--", b"--\r\n"):
        raise _bad_form("it does not end with its boundary")
    return parts


def _form_part(raw: bytes, body: memoryview) -> Part:
    head = raw.decode("utf-8", "replace")
    fields = email.message_from_string(head)
    coding = fields.get("content-transfer-encoding", "binary").lower()
    # As many fields as lines: none of them is folded, without a name, or anything else.
    is_whole = len(fields) == head.count("\r\n") + 1 and head.replace("\r\n", "").isprintable()
    with contextlib.suppress(LookupError, TypeError, ValueError):  # odd parameters (RFC 2231)
        name = fields.get_param("name", header="content-disposition")
        part = Part(str(name), fields.get_filename(), fields.get_content_type(), body)
        is_form = fields.get_content_disposition() == "form-data" and isinstance(name, str)
        if is_form and is_whole and coding in ("7bit", "8bit", "binary"):
            return part
    raise _bad_form("a part has a head that azt does not read")


# -- who may call: the decision table of trust.md 2


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide, as values. Asked for at each request, so a change acts at once."""

    own_names: frozenset[str]  # this machine's host name and `<it>.local`, lower case
    allowed_hosts: frozenset[str]
    cors_origins: frozenset[str]
    lan_api: bool
    loopback_exempt: bool
    own_networks: tuple[Network, ...]
    keys: Mapping[str, Json]  # by their hash; empty: no key is needed
    admin_token_hash: str
    body_max_bytes: int
    lan_console: bool = False
    token_on_loopback: bool = False
    sessions: Mapping[str, Json] = field(default_factory=dict)  # by the hash of their cookie


@dataclass(frozen=True, slots=True)
class Caller:
    """What the table looks at."""

    peer: PeerClass
    host: str  # the name in the Host header: lower case, no port, no brackets; "" without one
    origin: str | None = None
    own_origin: bool = False  # `origin` names the Host of this request
    fetch_site: str = ""
    navigates: bool = False  # the browser opens this as a page of its own, not inside another one
    key: Literal["none", "wrong", "good", "expired", "spent"] = "none"
    key_hash: str = ""
    proof: bool = False  # the admin token was sent
    marked: bool = False  # X-AZT-Admin: 1, which no form and no simple request of a page can send
    session: Literal["none", "lan", "local"] = "none"  # its scope; local ones prove as a token does
    session_hash: str = ""

    @property
    def own(self) -> bool:
        """This machine, addressed as such, not a page of somebody else."""
        at_loopback = self.peer == "own" and _host_kind(self.host) == "loopback"
        return at_loopback and (self.origin is None or self.own_origin)

    @property
    def proven(self) -> bool:
        return self.own and (self.proof or self.session == "local")


_LOOPBACK_NETWORKS = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))
_LAN = "10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 fc00::/7 fe80::/10"
_LAN_NETWORKS = tuple(map(ipaddress.ip_network, _LAN.split()))
_RELAY_HEADERS = tuple(
    "cdn-loop cf- client-ip fastly- fly-client- forwarded tailscale- true-client-ip via "
    "x-client-ip x-cluster-client- x-envoy- x-forwarded- x-original- x-proxyuser- x-real-ip".split()
)
_LOOPBACK_ORIGIN = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?")


def peer_place(address: str, own_networks: Sequence[Network]) -> Literal["own", "lan", "public"]:
    """Where a socket's peer is. Headers never count: they are the caller's own words."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if any(found in network for network in _LOOPBACK_NETWORKS):
        return "own"
    is_near = any(found in network for network in (*_LAN_NETWORKS, *own_networks))
    return "lan" if is_near else "public"


def is_relayed(headers: Mapping[str, str]) -> bool:
    """Whether a proxy passed the request on: behind it the peer of the socket says nothing."""
    return any(name.startswith(_RELAY_HEADERS) for name in headers)


def who_guesses(address: str, peer: PeerClass) -> str:
    """Whose failures count together. One machine has a whole /64 of IPv6 addresses."""
    if "." not in address:
        address = ipaddress.ip_address(address.partition("%")[0]).exploded[:19]
    return f"{peer} {address}"


_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_other_user(peer: tuple[Any, ...], here: tuple[Any, ...]) -> bool:
    """Whether neither this user nor root holds the other end of a connection on this machine.

    Linux answers at once (sock_diag(7)). Elsewhere, or where it knows no such socket (the host of a
    virtual machine), there is nobody to tell apart. A socket without a process waits for no answer.
    """
    ends = [ipaddress.ip_address(str(one[0]).partition("%")[0]) for one in (peer, here)]
    raw = [(getattr(one, "ipv4_mapped", None) or one).packed for one in ends]
    family = socket.AF_INET if len(raw[0]) == 4 else socket.AF_INET6
    asked = struct.pack("=BBHI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
    asked += struct.pack(">HH16s16s", peer[1], here[1], *raw) + struct.pack("=Iq", 0, -1)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as system:
            system.setblocking(False)
            system.send(struct.pack("=IHHII", 16 + len(asked), 20, 1, 0, 0) + asked)
            told = system.recv(4096)
    except (AttributeError, OSError) as error:
        return isinstance(error, OSError) and error.errno in _OUT_OF_FILES
    uid, inode = struct.unpack_from("=II", told, 80) if len(told) >= 88 else (0, 1)
    return inode == 0 or uid not in (0, os.getuid())


_COOKIE = re.compile(r"\bazt_admin_\d+=([\w-]{43})(?![\w-])", re.ASCII)


def _key_state(key: Json, now: float) -> Literal["good", "expired", "spent"]:
    if key.get("expiresAt") and key["expiresAt"] <= now * 1000:
        return "expired"
    is_spent = key.get("limit") and key.get("today", 0) >= key["limit"]
    return "spent" if is_spent and key["day"] == _day(int(now * 1000)) else "good"


def count_use(key: Json, now: float) -> None:
    """Of a key or a session; in memory, where others read it. Saved at times."""
    day = _day(int(now * 1000))
    today = key.get("today", 0) + 1 if key.get("day") == day else 1
    requests = key.get("requests", 0) + 1
    key |= {"requests": requests, "today": today, "day": day, "lastUsedAt": int(now * 1000)}


def read_caller(
    peer: PeerClass, headers: Mapping[str, str], policy: Policy, now: float = 0.0
) -> Caller:
    """The head of a request -> what the table looks at."""
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    sent = [bearer, headers.get("x-api-key", ""), headers.get("api-key", "")]
    hashes = [hashlib.sha256(value.encode()).hexdigest() for value in sent if value]
    # Each with every other, in constant time.
    known = [key for one in hashes for key in policy.keys if hmac.compare_digest(one, key)]
    session, session_hash, cookie = None, "", headers.get("cookie")
    for session_hash in map(hashed, _COOKIE.findall(cookie) if cookie else ()):
        session = policy.sessions.get(session_hash)
        if session and session["createdAt"] / 1000 + SESSION_LIFE_S > now:
            break
        session = None
    return Caller(
        peer=peer,
        host=name.removesuffix("."),
        origin=origin,
        own_origin=bool(host) and (origin or "").lower() in (f"http://{host}", f"https://{host}"),
        fetch_site=headers.get("sec-fetch-site", ""),
        navigates=headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document",
        key=_key_state(policy.keys[known[0]], now) if known else "wrong" if hashes else "none",
        key_hash=known[0] if known else "",
        proof=bool(bearer) and hmac.compare_digest(hashes[0], policy.admin_token_hash),
        marked=headers.get("x-azt-admin") == "1",
        session=session["scope"] if session else "none",
        session_hash=session_hash if session else "",
    )


def may(caller: Caller, access: Access, method: str, policy: Policy) -> AztError | None:
    """The decision table: None, or why not. Pure. The numbers are the rows of trust.md 2.

    403 = wrong place or page, nothing the caller sends can help; 401 = right place, proof missing.
    """
    peer, own = caller.peer, caller.own
    near = peer in ("own", "neighbour", "lan")
    admin, calls = access.startswith("admin"), access in ("api", "codex")
    changes = method not in ("GET", "HEAD")
    exempt = own and (access == "metrics" or caller.proof or policy.loopback_exempt)
    open_api = not policy.keys
    needs_key = (calls or access == "metrics") and not open_api and not exempt
    # Who may come to the console from elsewhere, and sign in there.
    guest = policy.lan_console and peer != "public"
    by_place = own and (caller.proof or not policy.token_on_loopback)
    known = not admin or access == "admin_session" or caller.session != "none" or by_place
    here_only = access in ("admin_local", "admin_proof")
    page = access in ("page", "asset")
    rows = (
        ("host_not_allowed", not _knows_host(caller.host, access, policy)),
        ("origin_not_allowed", not _admits_page(caller, access, method, policy)),  # 4, 5, 11
        ("local_only", admin and not own and (here_only or (policy.lan_console and not guest))),
        ("lan_console_off", admin and not own and not guest),  # 10
        ("csrf_header_missing", admin and changes and not caller.marked),  # 7
        ("not_signed_in", not known),  # 6, 7, 10
        ("proof_needed", access == "admin_proof" and not caller.proven),  # 8, 9
        ("page_not_here", page and peer not in ("own", "lan") and not guest),  # 14
        ("lan_console_off", access == "asset" and not own and not guest),  # 14
        ("lan_off", calls and peer == "lan" and not policy.lan_api),  # 1
        ("api_key_missing", needs_key and caller.key == "none"),  # 1, 2, 3, 13
        ("invalid_api_key", needs_key and caller.key == "wrong"),
        ("api_key_expired", needs_key and caller.key == "expired"),
        ("api_key_spent", needs_key and caller.key == "spent"),
        ("metrics_not_here", access == "metrics" and open_api and not own),  # 13
        ("api_key_needed", calls and open_api and not near),  # 2, 3
    )
    code = next((code for code, refused in rows if refused), None)
    origin = (caller.origin or "elsewhere")[:100]
    return _refusal(code, host=caller.host, origin=origin) if code else None


def _knows_host(name: str, access: Access, policy: Policy) -> bool:
    """DNS rebinding: a foreign name that points here. An address has no record to flip."""
    is_known = _host_kind(name) != "name" or name in policy.own_names | policy.allowed_hosts
    # Reserved for private use: host.docker.internal and the like.
    is_private = name.endswith(".internal") and access in ("api", "codex", "health")
    return bool(name) and (is_known or is_private)


def _admits_page(caller: Caller, access: Access, method: str, policy: Policy) -> bool:
    """The browser rule: a page may call what it belongs to, or the API where that is allowed."""
    origin, site, listed = caller.origin, caller.fetch_site, policy.cors_origins
    if access == "page" and caller.navigates and method in ("GET", "HEAD") and origin is None:
        return True  # a link from another page is cross-site by nature
    if access == "codex":
        return origin is None and site in ("", "none")
    if access != "api":
        return (origin is None or caller.own_origin) and site in ("", "none", "same-origin")
    if origin in (None, "", "null"):
        return origin is None and site != "cross-site"
    is_known = caller.own_origin or origin in listed or ("*" in listed and policy.keys)
    return bool(is_known or _LOOPBACK_ORIGIN.fullmatch(origin))


# -- which handler

_ODD_PATH = re.compile(r"[\x00-\x1f\x7f\\]|(?:^|/)\.\.?(?:/|$)")
_OVERRIDES = frozenset(("x-http-method", "x-http-method-override", "x-method-override"))


def read_path(target: str) -> tuple[str, dict[str, str]]:
    """Request target -> (path, query), decoded once. Raises AztError 400."""
    raw, _, query = target.partition("?")
    if not raw.startswith("/"):
        raw = "/" + raw.partition("://")[2].partition("/")[2]
    try:
        path = urllib.parse.unquote_to_bytes(raw).decode() if "%" in raw else raw
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=100)
        if _ODD_PATH.search(path):
            raise ValueError
    except ValueError:
        raise _refusal("invalid_url") from None
    return path, dict(pairs)


def _path_finder(routes: Sequence[Route]) -> Callable[[str], list[tuple[Route, dict[str, str]]]]:
    """The look-up of a path: its routes and parameters, exact ones first, then the longest."""
    ordered = sorted(routes, key=lambda at: ("{" in at.path, -at.path.count("/"), -len(at.path)))
    table = []
    for route in ordered:
        middle = re.sub(r"\\{(\w+)\\}(?=/)", r"(?P<\1>[^/]+)", re.escape(route.path))
        table.append((re.compile(re.sub(r"\\{(\w+)\\}$", r"(?P<\1>.+)", middle)), route))

    @functools.lru_cache(maxsize=256)
    def find(path: str) -> list[tuple[Route, dict[str, str]]]:
        # `/v1` missing or twice and odd slashes are forgiven.
        path = re.sub("/{2,}", "/", path).rstrip("/") or "/"
        path = re.sub("^(?:/v1)+(?=/v1(?:/|$))", "", path)
        twin = f"/codex/v1{path[6:]}" if path.startswith("/codex/") else f"/v1{path}"
        for name in (path, twin):
            if found := [(at, hit.groupdict()) for rx, at in table if (hit := rx.fullmatch(name))]:
                return found
        return []

    return find


def _refuse_oddities(request: Request) -> None:
    """Row 18: what azt does for nobody."""
    # RFC 9110 7.8: an upgrade may be ignored. Java's client offers h2c with each request.
    if request.headers.get("upgrade", "").lower() not in ("", "h2c"):
        error = _refusal("upgrade_refused")
        # Codex tries a WebSocket first and falls back to HTTP without delay on a 426 only.
        if request.path.rstrip("/").endswith("/responses"):
            error.status, error.headers = 426, {"upgrade": "HTTP/1.1"}
        raise error
    if request.headers.get("expect", "100-continue").lower() != "100-continue":
        raise _refusal("expectation_failed")


def _cors_headers(origin: str, headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a page may see and send: for its call, and more for the question before it."""
    exposed = "retry-after, x-azt-attempts, x-azt-ignored-params, x-request-id"
    granted = {"allow-origin": origin, "expose-headers": exposed}
    if "access-control-request-method" in headers:
        asked = headers.get("access-control-request-headers", "")
        is_safe = re.fullmatch(r"[\w!#$%&'*+.^`|~, -]{1,4096}", asked, re.ASCII)
        granted["allow-headers"] = asked if is_safe else "authorization, content-type"
        granted |= {"allow-methods": "GET, POST, DELETE, OPTIONS", "max-age": "600"}
    return [("vary", "Origin"), *((f"access-control-{name}", granted[name]) for name in granted)]


# -- one request, one connection

_ADMIN_CODES: dict[str | None, str] = {  # where console.md 6 has a word of its own
    **{None: "bad_json", "invalid_type": "bad_json", "invalid_value": "bad_field"},
    **{"host_not_allowed": "bad_host", "origin_not_allowed": "bad_origin"},
    "request_too_large": "too_large",
}
_SAFE_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}


@functools.lru_cache(maxsize=HEADS_KEPT_MAX)
def _checked_head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Status line and headers. Raises what h11 raises where they cannot be sent.

    Those of one program repeat, and checking them was a good part of the way to the first token.
    """
    checked = h11.Response(status_code=status, headers=list(headers)).headers
    lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b""))]
    return b"\r\n".join([*lines, *(b"%b: %b" % pair for pair in checked), b""])


class _Exchange:
    """One request and its answer; the `Sink` of a streamed body.

        read head -> decided (`route` or `error`) -> run: the handler -> send -> ended
                                                          \\--- cut, client left --/

    `end` is reached once on every path: it closes the record and gives back what the request held.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection, self.server = connection, connection.server
        name, peer, place = "req_" + secrets.token_hex(12), connection.address, connection.place
        record = RequestRecord(name, "-", "-", time.monotonic(), time.time(), remote=peer)
        self.request = Request(name, "-", "-", {}, {}, peer, place, record, self.hold)
        self.route: Route | None = None  # without one and without an error: OPTIONS
        self.error: AztError | None = None
        self.limit = LINGER_BYTES  # so little of the body of a refused request is skipped
        self.codings: list[str] = []
        self.cors: list[tuple[str, str]] = []
        self.is_modern = False  # HTTP/1.1: a stream is sent in chunks
        self.keep = False  # the connection outlives this exchange
        self.ended = False
        self.stream: StreamBody | None = None
        self.task: asyncio.Task[None] | None = None
        self._held = 0  # bytes of this request that count as memory held for bodies
        self._unsent = b""  # the head of a stream, until its first bytes

    def read(self, head: bytes) -> None:
        """Let the server decide about a head. Raises AztError when it is malformed."""
        method, target, self.is_modern, headers = read_head(head)
        request = self.request
        request.method, request.headers = method[:20], headers
        request.path = target.partition("?")[0][:200]
        request.record.method, request.record.path = request.method, request.path
        given = headers.get("x-request-id") or headers.get("x-client-request-id", "")
        if _SAFE_ID.fullmatch(given):
            request.id = request.record.id = given
        tokens = headers.get("connection", "").lower().replace(" ", "").split(",")
        self.keep = self.is_modern and "close" not in tokens
        if request.peer_class in ("own", "neighbour") and is_relayed(headers):
            request.peer_class = "relayed"
        request.who = who_guesses(self.connection.address, request.peer_class)
        try:
            self.server.decide(self, target)
        except AztError as error:
            self.error = error

    def hold(self, size: int) -> None:
        """Account for body memory. Raises AztError 503 when all bodies together exceed the cap."""
        self._held += size
        self.server.bodies_bytes += size
        if size > 0 and self.server.bodies_bytes > min(MAX_BODIES_BYTES, self.server.bodies_max):
            raise _refusal("overloaded", things="large requests")

    # -- the answer

    def begin(self) -> None:
        """The body is complete: answer in a task of its own."""
        connection, server = self.connection, self.server
        is_far = connection.place not in ("own", "neighbour")
        if is_far and self.route and self.route.access in ("api", "codex"):
            # A cap for each address of the network; none for this machine.
            peers = [one for one in server.connections if one.address == connection.address]
            if sum(one.state == "ANSWER" for one in peers) > MAX_LAN_STREAMS:
                self.error = self.error or _refusal("concurrency_limit", most=MAX_LAN_STREAMS)
        server.running += 1
        self.request.record.complete_s = time.monotonic()
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            if self.error is not None:
                raise await self._slowed(self.error)
            for coding in self.codings:
                await self._inflate(coding)
            if self.route is None:
                reply = Reply(204)
            else:
                reply = await self.route.handler(self.server.context, self.request)
        except asyncio.CancelledError:
            if self.ended:  # the client left
                return
            reply = self.failed(_refusal("shutting_down"))
        except AztError as error:
            # Whoever keeps the error (`tried` of rotation) would keep the frames, and their bodies.
            reply = self.failed(error.with_traceback(None))
        except Exception:  # the one catch-all around handlers
            log.exception("%s failed", self.request.id)
            reply = self.failed(_refusal("internal_error", id=self.request.id))
        self.send(reply)
        if isinstance(reply.body, AsyncIterator) and not self.ended:
            await self._pump(reply.body)

    async def _slowed(self, error: AztError) -> AztError:
        """Whoever tries wrong keys hears of it more and more slowly; a good key always counts."""
        if error.code == "invalid_api_key":
            guard, who = self.server.guard, self.request.who
            if left_s := await guard.turn(who):
                return slow_down(left_s)
            guard.failed(who)
        return error

    def failed(self, error: AztError) -> Reply:
        self.request.record.fail(error)
        body = error_body(error)
        if self.request.path.startswith("/_gateway/admin"):  # console.md 6
            params: Json = (
                {"field": error.param, "reason": mask(error.message)} if error.param else {}
            )
            params |= {"limit": self.limit} if error.status == 413 else {}
            params |= error.extra.get("params", {})
            code = _ADMIN_CODES.get(error.code, error.code)
            body["error"] |= {"code": code, "params": params, "requestId": self.request.id}
        return json_reply(body, error.status, error.headers.items())

    async def _inflate(self, coding: str) -> None:
        """Undo one content coding, in a thread: a small body may be a large document."""
        request, workers = self.request, self.server.workers
        before = len(request.body)
        try:
            request.body = await in_thread(workers, decoded, request.body, coding, self.limit)
        except TooLarge:
            raise _refusal("request_too_large", limit=self.limit) from None
        except ValueError:
            raise _refusal("invalid_body", coding=coding) from None
        self.hold(len(request.body) - before)

    def send(self, reply: Reply) -> None:
        """Write the answer, or at least its head when the body is a stream."""
        body, write = reply.body, self.connection.transport.write
        is_empty = self.request.method == "HEAD" or reply.status in (204, 304)
        size = len(body) if isinstance(body, (bytes, bytearray)) else None
        head = b"" if self.ended else self._head(reply, size)
        if isinstance(body, (bytes, bytearray, AsyncIterator)):
            if head:  # one packet, one system call; with an iterator `_run` goes on
                write(head if is_empty or isinstance(body, AsyncIterator) else head + body)
        elif is_empty or not head:
            body.cancel()  # nobody reads it
            write(head)
        else:
            self.stream, self._unsent = body, head  # it leaves with the first bytes of the body
            try:
                body.start(self)
            except Exception:  # a broken body must not take the loop down
                log.exception("%s: the stream did not start", self.request.id)
                self.cut()
            if self._unsent and not self.ended:
                write(self._unsent)
                self._unsent = b""
        if not (self.ended or head):
            self.send(self.failed(_refusal("internal_error", id=self.request.id)))
        elif not self.ended and (is_empty or size is not None):
            self.connection.answered(self)

    def _head(self, reply: Reply, size: int | None) -> bytes:
        """The response head, b"" where one of its headers cannot be sent."""
        self.keep = self.keep and not self.server.draining
        try:
            head = _checked_head(reply.status, (*reply.headers, *self.cors))
        except (h11.LocalProtocolError, UnicodeEncodeError):
            log.exception("%s: the answer has a header that cannot be sent", self.request.id)
            self.keep = False
            return b""
        record = self.request.record
        record.status = reply.status
        # These are safe by their making, and differ from answer to answer.
        own = self.server.common_headers + ("" if self.keep else "connection: close\r\n")
        if b"\r\nx-request-id: " not in head:
            own += f"x-request-id: {self.request.id}\r\n"
        if size is not None:
            record.response_bytes = size
            spent_ms = round((time.monotonic() - record.started_s) * 1000)
            own += f"openai-processing-ms: {spent_ms}\r\n"
        if reply.status not in (204, 304):
            if size is not None:
                own += f"content-length: {size}\r\n"
            elif self.is_modern:
                own += "transfer-encoding: chunked\r\n"
        return head + f"{own}\r\n".encode("ascii")

    def write(self, data: bytes) -> None:
        if data:
            self._put(data)

    def _put(self, data: bytes) -> None:
        """Body bytes, or b"" for their end, with the head where it has not left yet."""
        if not self.ended:
            framed = b"%x\r\n%b\r\n" % (len(data), data) if self.is_modern else data
            self.connection.transport.write(self._unsent + framed)
            self._unsent = b""
            self.request.record.response_bytes += len(data)

    def finish(self) -> None:
        self._put(b"")
        if not self.ended:
            self.connection.answered(self)

    def cut(self) -> None:
        if self.ended:
            return
        self.request.record.result = "failed"
        self.end()
        if self.is_modern:
            self.connection.close()  # what was written still arrives, the last chunk never does
        else:
            self.connection.transport.abort()  # a plain close would mean: complete

    async def _pump(self, body: AsyncIterator[bytes]) -> None:
        try:
            async for piece in body:
                self.write(piece)
                await self.connection.can_write.wait()
            self.finish()
        except asyncio.CancelledError:
            self.finish()  # the server stops; when the client left, this exchange has ended already
        except Exception:  # the status is sent: all that is left is to cut
            log.exception("%s: the body failed", self.request.id)
            self.cut()
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()

    def end(self) -> None:
        """Close the record and give back what the request held. A second call does nothing."""
        if self.ended:
            return
        self.ended = True
        self.stream = None
        self.server.bodies_bytes -= self._held
        self.request.body = b""
        self.server.running -= 1 if self.task else 0
        self.server.changed.set()
        if self.request.record.end(time.monotonic()):
            self.server.recorded(self.request.record)

    def client_left(self) -> None:
        """Stop whatever runs for a client that is gone."""
        if self.ended:
            return
        record = self.request.record
        record.status = record.status or 499
        record.result, record.error_code = "cancelled", "client_closed_request"
        if self.stream is not None:
            self.stream.cancel()  # before the record closes: the stream knows what was delivered
        self.end()
        if self.task is not None:
            self.task.cancel()

    def stop(self, error: AztError) -> None:
        """The server ends: a stream says so in its own words, a waiting handler is answered for."""
        if self.stream is not None:
            self.stream.stop(error)
        elif self.task is not None:
            self.task.cancel()

    def probe(self) -> bool:
        """Write something harmless, to which a client that is gone reacts with a reset."""
        if self.stream is not None:
            if not self.stream.probe() and self.is_modern:
                # The body may not grow: a first digit of the next chunk's size, then.
                self.connection.transport.write(b"0")
        elif self.request.record.status:
            return False  # an iterator feeds a page that stays open, and no browser half-closes
        elif self.is_modern:
            # RFC 9110 15.2: a client must take any number of 1xx answers, asked for or not.
            self.connection.transport.write(_CONTINUE)
        return True


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
    looks at it; no timer runs per connection. What arrives in ANSWER waits, up to PIPELINE_BYTES.
    """

    def __init__(self, server: HttpServer, address: str) -> None:
        self.server = server
        self.address = address
        self.place: PeerClass = peer_place(address, server.policy().own_networks)
        self.owner_known = False
        self.transport: asyncio.Transport
        self.can_write = asyncio.Event()
        self.can_write.set()
        self.deadline = time.monotonic() + HEAD_TIMEOUT_S
        self.state: Literal["HEAD", "BODY", "ANSWER", "CLOSING"] = "HEAD"
        self.exchange: _Exchange | None = None
        self._framing = Framing(False, 0)
        self._waiting = b""
        self._got_eof, self._linger_bytes, self._unwritten = False, LINGER_BYTES, 0
        self._moved_s = time.monotonic()  # when the client last took some of what is unwritten

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        connections, is_own = self.server.connections, self.place == "own"
        most = MAX_CONNECTIONS_LOOPBACK if is_own else MAX_CONNECTIONS_PER_PEER
        here = sum(other.address == self.address for other in connections)
        if len(connections) >= self.server.connections_max or here >= most:
            self._refuse(_refusal("overloaded", things="connections"))
            self.transport.close()
        else:
            connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.state == "CLOSING":
            self._linger_bytes -= len(data)
            if self._linger_bytes < 0:
                self.transport.abort()
            return
        self._waiting += data
        if self.state != "ANSWER":
            self._advance()
        if len(self._waiting) > PIPELINE_BYTES:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """True keeps the connection: the client may have closed its sending side only."""
        # Or it is gone: then its kernel answers with a reset once something is written to it.
        self._got_eof = True
        if self.state != "ANSWER" or self.exchange is None or not self.exchange.probe():
            return False
        for delay_s in HALF_CLOSE_CHECKS_S:
            asyncio.get_running_loop().call_later(delay_s, self._look_for_reset)
        return True

    def _look_for_reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        is_open = self.state == "ANSWER" and sock.fileno() >= 0
        if is_open and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.state, self._waiting = "CLOSING", b""
        self.server.connections.discard(self)
        self.server.changed.set()
        self.can_write.set()
        if self.exchange is not None:
            self.exchange.client_left()

    def is_own(self) -> bool:
        """Whether the peer on this machine is this user (or root); asked of the system once."""
        if not self.owner_known:
            sock, *ends = map(self.transport.get_extra_info, ("socket", "peername", "sockname"))
            is_other = is_other_user(ends[0], ends[1])
            # A peer that has reset the connection is found no more.
            is_other = is_other or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
            self.owner_known, self.place = True, "neighbour" if is_other else "own"
        return self.place == "own"

    def pause_writing(self) -> None:
        self.can_write.clear()
        self._moved_s = time.monotonic()
        if self.exchange is not None and self.exchange.stream is not None:
            self.exchange.stream.pause()

    def resume_writing(self) -> None:
        self.can_write.set()
        if self.exchange is not None and self.exchange.stream is not None:
            self.exchange.stream.resume()
        elif self.state == "HEAD" and self._waiting:
            self._advance()

    # -- requests

    def _advance(self) -> None:
        """Read on in what has arrived, until bytes are missing or a request is complete."""
        try:
            if self.state == "HEAD":
                self._read_head()
            if self.state == "BODY":
                self._read_body()
        except AztError as error:
            # A refused request whose body is too large even to be skipped: the first reason counts.
            known = self.exchange.error if self.exchange and error.status == 413 else None
            self._refuse(known or error)

    def _read_head(self) -> None:
        if not self.can_write.is_set():
            return  # the client does not read its answers: no more of them
        self.transport.resume_reading()
        end = find_head(self._waiting)
        if not end:
            self.deadline = min(self.deadline, time.monotonic() + HEAD_TIMEOUT_S)
            if self._got_eof:
                self.close()
            return
        head, self._waiting = self._waiting[:end], self._waiting[end:]
        self.exchange = exchange = _Exchange(self)
        exchange.read(head)
        headers, limit = exchange.request.headers, exchange.limit
        length, is_chunked = int(headers.get("content-length", "0")), "transfer-encoding" in headers
        waits = "expect" in headers and exchange.is_modern and not self._waiting
        waits = waits and (is_chunked or length > 0)
        if length > limit or (waits and exchange.error):
            raise exchange.error or _refusal("request_too_large", limit=limit)
        if waits:
            self.transport.write(_CONTINUE)
        self.state, self._framing = "BODY", Framing(is_chunked, length)
        exchange.request.body = bytearray()

    def _read_body(self) -> None:
        exchange, framing = cast(_Exchange, self.exchange), self._framing
        try:
            data = framing.feed(self._waiting)
        except ValueError as error:
            raise _malformed(f"The body is malformed: {error}.") from None
        self._waiting = framing.rest
        exchange.hold(len(data))
        exchange.request.body += data
        size = len(exchange.request.body)
        if size + framing.left > exchange.limit:  # a chunk is refused as soon as it is announced
            raise _refusal("request_too_large", limit=exchange.limit)
        if framing.ended:
            self.state, self.deadline = "ANSWER", math.inf
            exchange.begin()
            return
        if self._got_eof:
            self.close()
        begun_s = exchange.request.record.started_s
        slowest_s = begun_s + BODY_STALL_S + size / BODY_MIN_BYTES_PER_S
        self.deadline = min(time.monotonic() + BODY_STALL_S, slowest_s)

    def answered(self, exchange: _Exchange) -> None:
        """The answer has been handed to the kernel or to the write buffer."""
        exchange.end()
        if self.state == "CLOSING":
            return
        if not exchange.keep or self.server.draining:
            self.close(half=True)
            return
        self.exchange, self.state = None, "HEAD"
        self.deadline = time.monotonic() + KEEP_ALIVE_S
        if self._waiting:
            self._advance()
        elif self._got_eof:
            self.close()

    def _refuse(self, error: AztError) -> None:
        """Answer and close: what follows on this connection is never read as a request."""
        exchange = self.exchange
        if exchange is None or exchange.ended:
            exchange = self.exchange = _Exchange(self)
        exchange.keep = False
        self.state = "ANSWER"
        exchange.send(exchange.failed(error))
        if error.code != "malformed_request" and exchange.request.method != "-":
            self._linger_bytes = LINGER_REFUSED_BYTES
            self.deadline = time.monotonic() + LINGER_REFUSED_S

    def close(self, half: bool = False) -> None:
        """End. `half`: shut the writing side only and wait for the client to do the same."""
        self.state, self._waiting = "CLOSING", b""
        self.deadline = time.monotonic() + LINGER_S
        if not half or self._got_eof:
            self.transport.close()
            return
        self.transport.resume_reading()
        # Python 3.11 raises where the peer has reset the connection meanwhile.
        with contextlib.suppress(OSError):
            self.transport.write_eof()

    def tick(self, now: float) -> None:
        """Look at the deadlines; called by the server's ticker."""
        unwritten, before = self.transport.get_write_buffer_size(), self._unwritten
        self._unwritten = unwritten
        # The client has to take what is there; that may take its time as long as it goes on.
        is_stuck = unwritten and (self.state == "CLOSING" or not self.can_write.is_set())
        if not is_stuck or unwritten < before:
            self._moved_s = now
        if now - self._moved_s >= WRITE_STALL_S:
            self.transport.abort()
        elif now < self.deadline or is_stuck:
            return
        elif self.state == "CLOSING":
            self.transport.abort()
        elif self.state == "BODY" or self._waiting:
            self._refuse(_refusal("request_timeout"))
        else:
            self.close()


# -- the server

_TWINS = {"0.0.0.0": "::1", "127.0.0.1": "::1", "::": "0.0.0.0", "::1": "127.0.0.1"}


def _raise_file_limit() -> int:
    """Allow as many open files as the system lets us; how many that are."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (65536 if one == resource.RLIM_INFINITY else one for one in limits)
    with contextlib.suppress(OSError, ValueError):
        wanted = max(soft, min(hard, 65536))
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
        return wanted
    return soft


class HttpServer:
    """Listeners, connections, ticker. Handlers get `context`; each request asks `policy` anew."""

    def __init__(
        self,
        routes: Sequence[Route],
        context: Any,
        policy: Callable[[], Policy],
        recorded: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self.context = context
        self.recorded = recorded  # told about each exchange once, when it has ended
        self.policy = policy
        self.workers = WorkerPool("inflate", 4)
        self.guard = Guard()  # against wrong API keys
        self.draining = False
        self.bodies_bytes, self.bodies_max = 0, memory_limit() // 4  # a parsed one takes more
        self.running = 0
        self.changed = asyncio.Event()  # fewer exchanges or connections than before
        self.common_headers = ""
        self._find = _path_finder(routes)
        self.connections: set[Connection] = set()
        self.connections_max = MAX_CONNECTIONS
        self._listeners: list[socket.socket] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle
        self._reserve: socket.socket
        self._complained_s = -math.inf

    # -- deciding

    def decide(self, exchange: _Exchange, target: str) -> None:
        """What the head alone decides: `route`, `limit`, `codings`, `cors`. Raises AztError."""
        if self.draining:
            raise _refusal("shutting_down")
        request, headers = exchange.request, exchange.request.headers
        request.path, request.query = read_path(target)
        request.target = target
        request.record.path = request.path[:200]
        _refuse_oddities(request)
        policy, method = self.policy(), request.method
        if is_preflight := method == "OPTIONS":
            method = headers.get("access-control-request-method", "")
        found = self._find(request.path)
        wanted = "GET" if method == "HEAD" else method
        match = next((pair for pair in found if pair[0].method == wanted), None)
        # A path that is not there follows the rows of the API: strangers learn nothing from a 404.
        access: Access = (match or found[0])[0].access if found else "api"
        by_itself = not found and headers.get("sec-fetch-dest", "empty") != "empty"  # a tab's icon
        if access in ("api", "codex") and not by_itself:
            request.record.route = (match or found[0])[0].path if found else "other"
            request.record.client = client_name(*(headers.get(name, "") for name in CLIENT_HEADERS))
            told = ((name, headers.get(name)) for name in ("user-agent", "content-type"))
            request.record.headers = {name: _shown(value, 200) for name, value in told if value}
        caller = read_caller(request.peer_class, headers, policy, request.record.at)
        if is_preflight:
            # It carries no proof: the question is whether the call with it would be allowed.
            caller = replace(caller, key="good", proof=True, marked=True, session="local")
        fault = self._judge(exchange, caller, access, method, policy)
        if caller.key_hash:
            self.guard.forgive(request.who)
        if caller.origin and access == "api" and not (fault and fault.status == 403):
            exchange.cors = _cors_headers(caller.origin, headers)
        if fault is not None:
            raise fault
        if match and not is_preflight and _OVERRIDES.isdisjoint(headers):
            exchange.route, request.params = match
            request.is_own, request.has_proof = caller.own, caller.proven
            request.session = policy.sessions.get(caller.session_hash)
            request.key = policy.keys.get(caller.key_hash) if access in ("api", "codex") else None
            if request.key is not None:
                request.record.key_id = request.key.get("id")
            for used in filter(None, (request.key, request.session)):
                count_use(used, request.record.at)
            self._accept_body(exchange, exchange.route, policy)
            return
        words: Json = {"method": request.method, "path": request.path[:200]}
        if not found:
            raise _refusal("unknown_url", **words)
        methods = {"OPTIONS", *(route.method for route, _ in found)}
        allow = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
        if not is_preflight or (method and not match):
            raise _refusal("method_not_supported", {"allow": allow}, allow=allow, **words)
        exchange.cors.append(("allow", allow))

    def _judge(
        self, exchange: _Exchange, caller: Caller, access: Access, method: str, policy: Policy
    ) -> AztError | None:
        fault = may(caller, access, method, policy)
        is_exempt = caller.proof or policy.loopback_exempt or access not in ("api", "codex")
        if not fault and caller.own and is_exempt and not exchange.connection.owner_known:
            # Whose connection it is matters only where another user would get less.
            fault = may(replace(caller, peer="neighbour"), access, method, policy)
            if fault is not None and exchange.connection.is_own():
                fault = None
        if fault is not None and fault.code == "api_key_spent":
            at = exchange.request.record.at
            ends = datetime.combine(datetime.fromtimestamp(at), dt_time.max)
            fault.headers = {"retry-after": str(int(ends.timestamp() - at) + 1)}
        return fault

    def _accept_body(self, exchange: _Exchange, route: Route, policy: Policy) -> None:
        headers = exchange.request.headers
        if route.access.startswith("admin") and route.method not in ("GET", "DELETE"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in ["application/json", *["multipart/form-data"] * route.takes_form]:
                raise _refusal("unsupported_media_type")
        if not route.raw_body and "content-encoding" in headers:
            exchange.codings = content_codings(headers["content-encoding"])
        exchange.limit = route.body_max_bytes or policy.body_max_bytes
        if route.raw_body:
            exchange.limit = max(exchange.limit, policy.body_max_bytes)

    # -- connections

    def calls(self) -> list[RequestRecord]:
        """The calls of the API that are being answered."""
        open_ones = (one.exchange for one in self.connections if one.state == "ANSWER")
        records = [one.request.record for one in open_ones if one and not one.ended]
        return [record for record in records if record.route]

    async def listen(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen there, and on the loopback address of the other family where it can be had.

        Port 0 picks a free one. Returns (address, port) of every listener, that asked for first.
        raises  OSError when the address is taken or is not this machine's
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = str(found[0][4][0])
        port = self._bind(address, port)
        if address in _TWINS:
            with contextlib.suppress(OSError):
                self._bind(_TWINS[address], port)
        else:  # for the command line and the console of this machine
            self._bind("127.0.0.1", port)
        self.connections_max = min(MAX_CONNECTIONS, max(16, (_raise_file_limit() - 64) // 2))
        self._reserve = socket.socket()
        for listener in self._listeners:
            self._watch(listener)
        self._tick()
        return [listener.getsockname()[:2] for listener in self._listeners]

    def _bind(self, address: str, port: int) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family, backlog=LISTEN_BACKLOG)
        except OSError as error:  # Python's own sentence repeats the address
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None
        listener.setblocking(False)
        self._listeners.append(listener)
        return int(listener.getsockname()[1])

    def _watch(self, listener: socket.socket) -> None:
        if listener in self._listeners:  # not closed meanwhile
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(LISTEN_BACKLOG):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_FILES:
                    raise
                self._turn_away(listener)
                return
            task = asyncio.get_running_loop().create_task(self._adopt(sock, str(address[0])))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    async def _adopt(self, sock: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock.setblocking(False)
            # asyncio leaves this off for a listener that it has not made (performance.md 3).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(lambda: Connection(self, address), sock)
        except OSError:
            sock.close()

    def _turn_away(self, listener: socket.socket) -> None:
        """No file is left for a new connection: close it with the reserved one, then rest."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if now - self._complained_s > 10:
            self._complained_s = now
            log.error("Too many open files: new connections are turned away (see ulimit -n).")
        self._reserve.close()
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._reserve = socket.socket()
        loop.remove_reader(listener)
        loop.call_later(ACCEPT_PAUSE_S, self._watch, listener)

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self.common_headers = (  # of every answer
            f"date: {email.utils.formatdate(usegmt=True)}\r\n"
            "x-content-type-options: nosniff\r\ncross-origin-resource-policy: same-origin\r\n"
        )
        now = time.monotonic()
        for connection in list(self.connections):
            connection.tick(now)

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, let running requests end within `timeout_s`, then end them."""
        self.draining = True
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listeners.clear()
        self._reserve.close()
        for connection in list(self.connections):
            if connection.state == "HEAD" and not connection._waiting:
                connection.close()
        await self._until(lambda: not self.running, timeout_s)
        for connection in list(self.connections):
            if connection.exchange is not None:
                connection.exchange.stop(_refusal("shutting_down"))
        await self._until(lambda: not self.connections, 3 * LINGER_S)
        for connection in list(self.connections):
            connection.transport.abort()
        await self._until(lambda: not self.connections, LINGER_S)
        self._ticker.cancel()

    async def _until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_so():
                    self.changed.clear()
                    await self.changed.wait()


# ==================================================================================================
# 16. Routes
#     16a OpenAI, 16b Codex passthrough, 16c admin, 16d pages, then the table. Handlers are thin:
#     read, call, reply.
# ==================================================================================================

_STREAM_HEADERS = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache, no-transform"),
    ("x-accel-buffering", "no"),
]


def _private_reply(value: Json, status: int = 200) -> Reply:
    """What no cache may keep."""
    return json_reply(value, status, [("cache-control", "no-store")])


def _view(view: Callable[[Gateway, Request], Json], is_counted: bool = False) -> Handler:
    """The handler that answers with a view of what is in memory."""

    async def show(gw: Gateway, request: Request) -> Reply:
        if is_counted:  # every request that has ended is in it
            await gw.counted()
        return _private_reply(view(gw, request))

    return show


_counted_view = functools.partial(_view, is_counted=True)


async def read_object(gw: Gateway, request: Request) -> Json:
    """The body as a JSON object, whatever its content type says. Frees the raw bytes.

    A large document is parsed in a thread: on the loop it would stop every stream meanwhile.
    """
    request.record.request_bytes = len(request.body)
    try:
        if len(request.body) > MIB:
            value = await in_thread(gw.short, parse_json, request.body, True)
        else:
            value = parse_json(request.body)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {str(error)[:200]}.", None, None) from None
    request.release()
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.", None, "invalid_type")
    if request.record.route:
        request.record.request = request_summary(value)
        request.record.asked_model = request.record.model = str(value.get("model") or "-")
    return value


def _note_turn(record: RequestRecord, turn: Turn) -> None:
    # At once: the record of a client that leaves is closed before its turn has ended.
    record.attempts, record.tries = turn.attempts, turn.tries
    if (account := turn.account) is not None:
        record.account, record.account_id, record.plan = account.name, account.id, account.plan
    record.left, record.conversation = turn.left, turn.keys[-1] if turn.keys else ""


def _note_end(gw: Gateway, request: Request, turn: Turn, relay: Relay) -> None:
    record = request.record
    record.usage = relay.translator.usage
    if turn.account is not None:
        gw.rotation.learn(turn.account, relay.answer.headers, relay.translator.limits)
    if relay.first_output_s is not None:
        record.ttft_ms = round((relay.first_output_s - record.complete_s) * 1000)
    record.response = getattr(relay.translator, "outline", {})
    if failure := relay.translator.failure:
        record.result = "failed"
        record.fail(failure)


def _own_headers(request: Request, ignored: Sequence[str] = ()) -> list[tuple[str, str]]:
    headers = [("x-azt-attempts", str(request.record.attempts))]
    if ignored:
        headers.append(("x-azt-ignored-params", ", ".join(ignored)))
    if request.peer_class == "own" or request.record.client == PLAYGROUND:
        headers.append(("x-azt-account", urllib.parse.quote(request.record.account)))
    return headers


# -- 16a. OpenAI -----------------------------------------------------------------------------------


def _admit_model(request: Request, model: str) -> None:
    """Raises AztError 403 where the key of this request is for other models."""
    models = (request.key or {}).get("models")
    if models and model not in models:
        text = f"This API key is for {', '.join(models)}, not for {model[:80] or 'what was sent'}."
        raise AztError(403, "model_not_allowed", text, param="model")


async def _translated(gw: Gateway, request: Request, translate: Callable[..., T], *more: Any) -> T:
    """The body as `translate` makes it, on the loop, or in a thread when it is large."""
    arguments = (await read_object(gw, request), gw.catalogue.efforts, gw.default_model, *more)
    if request.record.request_bytes > MIB:
        return await in_thread(gw.short, translate, *arguments)
    return translate(*arguments)


LOW_PERCENT, QUEUE_SHOWN, SWITCHES_SHOWN, RECENT_SHOWN = 20, 5, 20, 10
PLAYGROUND = "Playground"
MODELS_OLD_S, QUOTA_STALE_S = 7 * 24 * 3600, 3600


async def _run_turn(
    gw: Gateway,
    request: Request,
    asked: ChatRequest | ResponsesRequest,
    kind: Callable[..., Translator],
    keep: Callable[[Any], None] = lambda stream: None,
) -> Reply:
    """Open the upstream turn of a translated request and reply with its stream, or its whole.

    kind  makes the translator of an attempt
    keep  takes the translator of the answer when it has ended
    """
    record, upstream = request.record, asked.upstream
    record.model = asked.model
    _admit_model(request, asked.model)
    if record.asked_model == "-":
        record.asked_model = asked.model
    record.streams = asked.stream
    record.is_listed = asked.model in gw.catalogue.efforts
    record.alternative = gw.default_model if asked.model != gw.default_model else ""
    translator = functools.partial(kind, asked, time.time(), fast=gw.environment.fast)
    session = str(upstream["prompt_cache_key"])
    if record.request_bytes > MIB:
        body = await in_thread(gw.short, encode_large_json, upstream)
        upstream.clear()  # the bytes are what is sent, also on another try: one copy is enough
    else:
        body = encode_json(upstream)

    def note_end(relay: Relay) -> None:
        _note_end(gw, request, turn, relay)
        keep(relay.translator)

    note_turn = functools.partial(_note_turn, record)
    turn = Turn(body, session, asked.stream, translator, note_turn, (session,), request.pinned)
    relay = await gw.rotation.open_turn(turn)
    record.head_ms = round((time.monotonic() - record.complete_s) * 1000)
    turn.body = b""
    del body  # nor does anything else keep it while the answer runs
    headers = _own_headers(request, asked.ignored)
    if asked.stream:
        relay.on_end = note_end
        return Reply(200, relay, _STREAM_HEADERS + headers)
    await relay.whole()
    note_end(relay)
    return json_reply(relay.translator.result(), headers=headers)


async def post_chat_completions(gw: Gateway, request: Request) -> Reply:
    chat = await _translated(gw, request, chat_to_responses)
    return await _run_turn(gw, request, chat, ChatStream)


async def post_responses(gw: Gateway, request: Request) -> Reply:
    now = time.time()
    asked = await _translated(gw, request, responses_to_upstream, gw.responses, now)

    session = asked.upstream["prompt_cache_key"]

    def keep(stream: ResponsesStream) -> None:
        if asked.store and stream.done and stream.failure is None:
            items = asked.input_items, stream.output_items
            gw.responses.put(stream.response, *items, time.time(), session)

    return await _run_turn(gw, request, asked, ResponsesStream, keep)


async def post_input_tokens(gw: Gateway, request: Request) -> Reply:
    asked = await _translated(gw, request, responses_to_upstream, gw.responses, time.time())
    count = estimate_input_tokens(asked.upstream)
    return json_reply({"object": "response.input_tokens", "input_tokens": count})


get_models = _view(lambda gw, one: gw.catalogue.openai_models((one.key or {}).get("models")))
get_model = _view(lambda gw, request: gw.catalogue.find(request.params["id"]))


def _stored(gw: Gateway, request: Request) -> StoredResponse:
    name = request.params["id"]
    stored = gw.responses.get(name, time.time())
    if stored is None:
        message = f"There is no response {name[:80]!r} in memory: azt keeps the newest for a day."
        raise AztError(404, "response_not_found", message, param="response_id")
    return stored


@_view
def get_response(gw: Gateway, request: Request) -> Json:
    if request.query.get("stream") == "true":
        message = "A stored response cannot be streamed again; leave out 'stream'."
        raise BadRequest(message, "stream", "unsupported_value")
    return _stored(gw, request).response


@_view
def delete_response(gw: Gateway, request: Request) -> Json:
    response_id = _stored(gw, request).response["id"]
    gw.responses.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


get_response_input_items = _view(
    lambda gw, request: input_items_page(_stored(gw, request), request.query)
)


@_view
def post_response_cancel(gw: Gateway, request: Request) -> Json:
    _stored(gw, request)
    raise BadRequest("Cannot cancel a synchronous response.", None, None)


def _form_object(body: bytes | bytearray, content_type: str) -> Json:
    """The form of an edit, as SDKs send it, as the JSON object that says the same."""
    fields: Json = {}
    for part in parse_form(body, content_type, 64):
        raw = bytes(part.body) if part.filename is None else base64.b64encode(part.body)
        value: Any = raw.decode("utf-8", "replace")
        if part.name in IMAGE_NUMBERS and re.fullmatch(r"\d{1,9}", value):
            value = int(value)
        value = value.lower() == "true" if part.name == "stream" else value
        if re.fullmatch(r"image(\[\d*\])?", part.name):
            fields.setdefault("image", []).append(value)
        elif value != "":
            fields[part.name] = value
    return fields


async def _post_images(is_edit: bool, gw: Gateway, request: Request) -> Reply:
    record, kind = request.record, request.headers.get("content-type", "")
    if kind.lower().startswith("multipart/form-data"):
        record.request_bytes = len(request.body)
        body = await in_thread(gw.short, _form_object, request.body, kind)
        request.release()
    else:
        body = await read_object(gw, request)
    asked = await in_thread(gw.short, images_to_request, body, is_edit)
    record.request = {**request_summary(body), "images": len(asked.images)}
    record.streams = asked.stream
    record.asked_model = record.model = str(body.get("model") or IMAGE_MODEL)
    _admit_model(request, record.model)
    del body
    stream = functools.partial(ImageStream, asked, time.time())
    told, keys = functools.partial(_note_turn, record), (asked.session,)
    turn = Turn(b"", asked.session, asked.stream, stream, told, keys, request.pinned)
    made = await gw.rotation.try_accounts(turn, _Drawing(gw, record, turn, asked).attempt)
    turn.body = b""
    record.head_ms = round((time.monotonic() - record.complete_s) * 1000)
    idle = asked.looks.keys() - {"model", "size"} if record.image_route == "chatgpt-web" else ()
    headers = _own_headers(request, (*asked.ignored, *sorted(idle)))

    def note_end(relay: Relay) -> None:
        _note_end(gw, request, turn, relay)
        record.images = int(relay.translator.done and relay.translator.failure is None)

    if isinstance(made, Relay):
        made.on_end = note_end
    if not isinstance(made, dict):
        return Reply(200, made, _STREAM_HEADERS + headers)
    record.images = len(made["data"])
    whole = await in_thread(gw.short, encode_large_json, made)
    return Reply(200, whole, [("content-type", "application/json"), *headers])


@dataclass(slots=True)
class _Drawing:
    """One request for pictures. `gw.no_images` keeps what was refused, "ACCOUNT MODEL", or
    "ACCOUNT" for the backend's own endpoints: the same is not asked again in this process."""

    gw: Gateway
    record: RequestRecord
    turn: Turn
    asked: PictureRequest

    async def attempt(self, account: Account, hold_s: float) -> Relay | AsyncIterator[bytes] | Json:
        """One try on one account: a stream, or the whole answer."""
        gw, record, asked, is_free = self.gw, self.record, self.asked, account.plan == "free"
        if is_free and gw.settings.flag(_WEB_PICTURES):
            record.image_route = "chatgpt-web"
            return await self._from_web(account, hold_s)
        direct = None if is_free or account.id in gw.no_images else picture_to_direct(asked)
        if direct and (answer := await self._from_endpoint(account, direct)):
            record.image_route = "codex-images"
            return answer
        record.image_route = "codex-tool"
        wanted = gw.settings.text("image.orchestratorModel")
        # Those of "Responses Lite" refuse a forced tool: they come last.
        listed = sorted(gw.catalogue.listed, key=lambda one: bool(one.get("use_responses_lite")))
        models = [wanted] if wanted else [one["slug"] for one in listed[:3]]
        models = [one for one in models if f"{account.id} {one}" not in gw.no_images] or models
        while True:
            model = models.pop(0)
            upstream = picture_to_responses(asked, model)
            self.turn.body = await in_thread(gw.short, encode_large_json, upstream)
            try:
                if asked.stream:
                    return await gw.rotation.attempt(self.turn, account, hold_s)
                return await self._from_tool(account)
            except UpstreamError as error:
                is_its = error.code in ("image_generation_unavailable", "model_not_found")
                if not is_its or not models:
                    raise
                gw.no_images.add(f"{account.id} {model}")

    async def _from_endpoint(self, account: Account, body: Json) -> Json | None:
        gw, path = self.gw, "images/edits" if self.asked.images else "images/generations"
        credentials = Credentials(account.access_token, account.account_id)
        headers = credentials.headers("application/json") | {"content-type": "application/json"}
        raw = await in_thread(gw.short, encode_large_json, body)
        call = Call("POST", f"{gw.environment.codex_base_url}/{path}", headers, raw, _SLOW_CALL_S)
        answer = await open_answer(gw.pool, gw.calls, call)
        if answer.status in (403, 404, 405):
            if "html" not in answer.headers.get("content-type", ""):  # that is about the network
                gw.no_images.add(account.id)
            return None  # it is not open to the account
        if answer.status != 200:
            error = upstream_error(answer.status, answer.headers, answer.body, time.time())
            raise image_error(error)
        gw.rotation.learn(account, answer.headers)
        told = await in_thread(gw.short, parse_event, answer.body) or {}
        data = [_as_object(one) for one in told.get("data") or []]
        if not data or not all(one.get("b64_json") for one in data):
            raise no_picture("")
        usage = self.record.usage = _as_object(told.get("usage"))
        return image_answer(self.asked, _as_seconds(told.get("created")), data, told, [usage])

    async def _from_tool(self, account: Account) -> Json:
        """It makes one picture in a call: as many calls at once as are wanted."""

        async def one() -> Relay:
            relay = await self.gw.rotation.attempt(self.turn, account, HOLD_BACK_S)
            await relay.whole()
            return relay

        calls = [asyncio.create_task(one()) for _ in range(self.asked.n)]
        try:
            relays = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
        made = [cast(ImageStream, relay.translator) for relay in relays]
        self.gw.rotation.learn(account, relays[0].answer.headers, made[0].limits)
        self.record.usage = image_usage([one.usage or {} for one in made])
        usages, pictures = [one.tool_usage for one in made], [one.picture for one in made]
        return image_answer(self.asked, int(time.time()), pictures, pictures[0], usages)

    async def _from_web(self, account: Account, hold_s: float) -> AsyncIterator[bytes] | Json:
        """Nobody can tell the site how the picture shall look: the answer claims nothing of it."""
        asked = await in_thread(self.gw.short, picture_to_web, self.asked)
        wait_s = hold_s if self.asked.stream else _SLOW_CALL_S
        making = await _web_attempt(self.gw, asked, account, wait_s)
        stream = ImageStream(replace(self.asked, looks={}), time.time())

        async def events() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(web_stream(self.record, making)) as pieces:
                async for piece in pieces:
                    data = piece.partition(b"\ndata: ")[2].strip()
                    why = making.exception() if making.done() else None
                    told = stream.fail(why) if isinstance(why, AztError) else stream.feed(data)
                    yield told if data else piece

        if self.asked.stream:
            return events()
        told = await making
        made = told.images[: asked.n]  # a conversation may make more than the one wanted
        pictures = [{"result": one, "revised_prompt": told.revised_prompt} for one in made]
        about = {"output_format": picture_kind(made[0])}
        return image_answer(self.asked, int(time.time()), pictures, about, [])


# OpenAI paths that clients try and azt does not offer -> why.
_NOT_OFFERED = {
    f"/v1/{name}{rest}": why
    for why, names in {
        "azt does not relay voice": "realtime",
        "azt stores no files; send file data inline": "files uploads vector_stores",
        "the backend has none": "assistants batches embeddings fine_tuning moderations threads",
        "the backend takes no audio": "audio",
        "it was DALL-E 2's; send an edit": "images/variations",
        "use /v1/chat/completions": "completions",
    }.items()
    for name in names.split()
    for rest in ("", "/{rest}")
}


# What the Playground may call.
_PLAYED: dict[str, Handler] = {
    "/v1/chat/completions": post_chat_completions,
    "/v1/images/edits": functools.partial(_post_images, True),
    "/v1/images/generations": functools.partial(_post_images, False),
    "/v1/models": get_models,
    "/v1/responses": post_responses,
}


def _refused(why: str) -> Handler:
    """The handler of what is not offered. 404, not 501: client libraries repeat every 5xx."""

    async def refuse(gw: Gateway, request: Request) -> Reply:
        message = f"azt does not offer {request.path}: {why}."
        raise AztError(404, "endpoint_not_supported", message)

    return refuse


# -- 16b. Codex passthrough ------------------------------------------------------------------------

_SLOW_CALL_S = 600.0  # compaction, images
_CODEX_CALLS = ("images/edits", "images/generations", "models", "responses", "responses/compact")
_KEPT_WITH = ("x-codex-turn-state", "thread-id", "session-id", "session_id", "conversation_id")


@blocking
def _sent_model(body: bytes | bytearray, coding: str) -> str:
    """The model in a body that is otherwise passed on unread; "" where it cannot be told."""
    with contextlib.suppress(ValueError, AztError):
        value = parse_json(decoded(body, coding, MAX_BODY_BYTES))
        return str(value.get("model") or "") if isinstance(value, dict) else ""
    return ""


async def codex_call(gw: Gateway, request: Request) -> Reply:
    """Any call of Codex: the same bytes go to the backend, its answer comes back as it is."""
    record, sent = request.record, request.headers
    if request.id == sent.get("x-client-request-id"):  # its thread: the same for many requests
        request.id = record.id = "req_" + secrets.token_hex(12)
    record.request_bytes, name = len(request.body), request.params.get("rest", "")
    if request.key and request.key.get("models") and request.method != "GET":
        coding = sent.get("content-encoding", "")
        _admit_model(request, await in_thread(gw.short, _sent_model, request.body, coding))
    record.route = f"/codex/v1/{name}" if name in _CODEX_CALLS else record.route
    keys = tuple(sent[name] for name in _KEPT_WITH if sent.get(name))
    turn = Turn(b"", "", on_news=functools.partial(_note_turn, record), keys=keys)
    picture = await _asked_picture(gw, request) if name == "responses" else None
    relay = await _codex_answer(gw, request, turn, picture)
    request.release()
    if isinstance(relay, asyncio.Task):
        record.streams, record.image_route = True, "chatgpt-web"
        record.model = record.asked_model = "gpt-image-2"
        return Reply(200, web_stream(record, relay), _STREAM_HEADERS + _own_headers(request))
    answer, owner = relay.answer, cast(Account, turn.account)
    record.streams = answer.is_stream
    record.head_ms = round((time.monotonic() - record.complete_s) * 1000)
    headers = returned_headers(answer.headers) + _own_headers(request)

    def note_end(relay: Relay) -> None:
        scanner = cast(Scanner, relay.translator)
        if state := scanner.turn_state:
            gw.rotation.sticky.bind((state, f"turn {state}"), owner.id)
        record.model = record.asked_model = scanner.model or record.model
        _note_end(gw, request, turn, relay)

    if answer.is_stream:
        relay.on_end = note_end
        return Reply(answer.status, relay, headers)
    note_end(relay)
    if answer.headers.get("etag", "") == sent.get("if-none-match"):
        return Reply(304, b"", headers)
    return Reply(answer.status, answer.body, headers)


_Wish = ImageRequest | BadRequest | None


async def _asked_picture(gw: Gateway, request: Request) -> _Wish:
    """What a request of Codex asks of the ChatGPT web site, where that is on; else None.

    Why it cannot be asked there counts only where a free account is to serve.
    """

    def look() -> _Wish:
        coding = request.headers.get("content-encoding", "")
        try:
            raw = decoded(request.body, coding, MAX_BODY_BYTES)
            return codex_picture(parse_json(raw)) if b"image_generation" in raw else None
        except BadRequest as error:
            return error
        except ValueError:  # zstd without a decoder, say: that is relayed
            return None

    if not gw.settings.flag(_WEB_PICTURES) or request.method != "POST":
        return None
    has_free = any(one.plan == "free" for one in gw.store.accounts.values())
    return await in_thread(gw.short, look) if has_free else None


async def web_stream(
    record: RequestRecord, made: asyncio.Task[ImageResult]
) -> AsyncGenerator[bytes]:
    """Pictures of the ChatGPT web site as the events that Codex knows; heartbeats meanwhile."""
    response: Json = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "output": []}
    response |= {"created_at": int(time.time()), "model": record.model, "status": "in_progress"}
    numbers = itertools.count()

    def event(kind: str, **more: Any) -> bytes:
        return encode_event({"type": kind, "sequence_number": next(numbers), **more})

    try:
        yield event("response.created", response=response)
        while not (await asyncio.wait({made}, timeout=HEARTBEAT_S))[0]:
            yield HEARTBEAT
        result = made.result()
        for at, picture in enumerate(result.images):
            item = {"id": f"ig_{secrets.token_hex(12)}", "type": "image_generation_call"}
            begun = item | {"status": "in_progress"}
            yield event("response.output_item.added", output_index=at, item=begun)
            item |= {"status": "completed", "result": picture}
            item["output_format"] = picture_kind(picture)
            item["revised_prompt"] = result.revised_prompt
            yield event("response.output_item.done", output_index=at, item=item)
            response["output"].append(item)
        record.images = len(result.images)
        yield event("response.completed", response=response | {"status": "completed"})
    except AztError as error:
        record.result = "failed"
        record.fail(error)
        why = {"code": error.code, "message": mask(error.message)}
        yield event("response.failed", response=response | {"status": "failed", "error": why})
    finally:
        made.cancel()


async def _web_attempt(
    gw: Gateway, asked: ImageRequest | BadRequest, account: Account, hold_s: float
) -> asyncio.Task[ImageResult]:
    """Pictures in the making: what failed within `hold_s` is raised, so that another may try."""
    if isinstance(asked, BadRequest):
        raise asked
    credentials = Credentials(account.access_token, account.account_id)
    way = gw.pool, gw.calls, gw.environment.chatgpt_base_url, credentials
    made = asyncio.create_task(web_images(*way, asked, lambda text: None))
    try:
        if (await asyncio.wait({made}, timeout=hold_s))[0]:
            made.result()
    except asyncio.CancelledError:
        made.cancel()
        raise
    return made


async def _codex_answer(
    gw: Gateway, request: Request, turn: Turn, picture: _Wish
) -> Passthrough | asyncio.Task[ImageResult]:
    """What the first account has that can serve, else the failure that says most to Codex.

    Never a 401 about an account of azt, nor "none is signed in": Codex would renew its own sign-in
    again and again. A 400 ends its turn at once, and it prints the text.
    """
    failures: list[tuple[UpstreamError, Passthrough]] = []
    relay: Passthrough | asyncio.Task[ImageResult] | None = None
    try:
        attempt = functools.partial(_codex_attempt, gw, request, failures, picture)
        relay = await gw.rotation.try_accounts(turn, attempt)
    except AztError as error:
        if error.status == 401 or error.code == "no_account":
            raise BadRequest(error.message, None, error.code) from None
        # Where all accounts are at their limits, the answer for the one that is back first.
        told = [one for one in failures if one[0] is error or one[0].status == error.status == 429]
        told.sort(key=lambda one: one[0].extra.get("resets_at", 0))
        if not told:
            raise
        relay = told[0][1]
        request.record.fail(error)
        told[0][1].pass_on()
    finally:
        for _, failed in failures:
            if failed is not relay:
                failed.cancel()
    return relay


async def _codex_attempt(
    gw: Gateway,
    request: Request,
    failures: list[tuple[UpstreamError, Passthrough]],
    picture: _Wish,
    account: Account,
    hold_s: float,
) -> Passthrough | asyncio.Task[ImageResult]:
    if picture is not None and account.plan == "free":
        return await _web_attempt(gw, picture, account, hold_s)
    name, (_, mark, query) = request.params.get("rest", ""), request.target.partition("?")
    path = urllib.parse.quote(name or "responses/compact", safe="/:@!$&'()*+,;=~") + mark + query
    credentials = Credentials(account.access_token, account.account_id)
    headers = relayed_headers(request.headers, credentials)
    if gw.rotation.sticky.find([f"turn {headers.get('x-codex-turn-state')}"]) != account.id:
        headers.pop("x-codex-turn-state", None)  # another account's
    listed = gw.codex_lists.get(account.id) if name == "models" else None
    if listed and listed[0] == path:
        headers["if-none-match"] = listed[1].headers["etag"]
    wait_s = UPSTREAM_HEAD_TIMEOUT_S if name == "responses" else _SLOW_CALL_S
    url = f"{gw.environment.codex_base_url}/{path}"
    method = "GET" if request.method == "HEAD" else request.method
    call = Call(method, url, headers, request.body, wait_s)
    answer = await open_answer(gw.pool, gw.calls, call)
    if listed and answer.status == 304:
        answer = replace(listed[1], headers=listed[1].headers | answer.headers)
    if name == "models" and answer.status == 200 and "etag" in answer.headers:
        gw.codex_lists[account.id] = path, answer
    relay, is_page = Passthrough(gw.pool, answer), "html" in answer.headers.get("content-type", "")
    try:
        if is_page or answer.status >= 300:
            raise upstream_error(answer.status, answer.headers, answer.body, time.time())
        await relay.ready(hold_s)
    except UpstreamError as error:
        if error.status == 403 and name not in ("", "responses"):
            error.fault = "request"  # of a side door: the account may still serve turns
        # Pages are for browsers, and a redirect leads past azt.
        if not (is_page or relay.is_broken or 300 <= answer.status < 400):
            failures.append((error, relay))
        raise
    return relay


# -- 16c. Admin ------------------------------------------------------------------------------------


_EMAIL = re.compile(rb"([\w.+%\x80-\xff-])[\w.+%\x80-\xff-]*@([\w-]+(?:\.[\w-]+)+)")


def _email_rule(gw: Gateway, request: Request) -> Callable[[bytes], bytes]:
    """How e-mail addresses are shown to this caller: as they are, or `a***@example.com`."""
    mode = gw.settings.text("ui.maskEmails")
    if mode == "always" or (mode == "lan" and request.peer_class != "own"):
        return functools.partial(_EMAIL.sub, rb"\1***@\2")
    return bytes


def _discreet(handler: Handler) -> Handler:
    """The handler whose JSON keeps to `_email_rule`; files and the Playground's answers do not."""

    async def answer(gw: Gateway, request: Request) -> Reply:
        reply = await handler(gw, request)
        if isinstance(reply.body, bytes) and request.path.startswith(ADMIN):
            is_file = any(name == "content-disposition" for name, _ in reply.headers)
            reply.body = reply.body if is_file else _email_rule(gw, request)(reply.body)
        return reply

    return answer


def _ms(seconds: float) -> int | None:
    return int(seconds * 1000) if seconds else None


_AUTH = ("auth_error", "expired", "login_rejected")
_STATUS = {
    **dict.fromkeys(("account_unusable", "upstream_forbidden", "usage_not_included"), "auth_error"),
    **dict.fromkeys(("quota_empty", "quota_exhausted", "rate_limited"), "empty"),
    **{"excluded": "excluded", "login_rejected": "login_rejected"},
}
"""Why an account is passed over -> its status; what is missing here is the upstream's fault."""


def _account_status(gw: Gateway, account: Account, now: float) -> tuple[str, Json]:
    """The most severe of the states of an account, with what is to be said of it."""
    reason, until = hindrance(account, now, gw.rotation.rules)
    if not account.rejected and 0 < account.expires_at < now:
        return "expired", {}
    if status := _STATUS.get(reason):
        return status, {"reason": account.rejected or reason} | (
            {"until": _ms(until)} if until else {}
        )
    left = percent_left(account.quota, now)
    return "unknown" if left < 0 else "low" if left <= LOW_PERCENT else "ready", {}


def _quota_view(quota: Json, now: float, trusted: bool) -> Json:
    def view(window: Json) -> Json:
        over = 0 < window["resets_at"] <= now
        used = 0 if over else round(window["used"])
        shown = {"usedPercent": used, "remainingPercent": 100 - used, "pace": pace(window, now)}
        times = {"minutes": window["minutes"], "resetsAt": _ms(0 if over else window["resets_at"])}
        return {"key": window["key"], **times, **shown}

    return {
        "capturedAt": _ms(quota["captured_at"]),
        "source": quota["source"],
        "trusted": trusted,
        "windows": list(map(view, quota.get("windows", ()))),
        "extra": list(map(view, quota.get("extra", ()))),
        "credits": quota.get("credits"),
    }


def _routing_view(gw: Gateway) -> Json:
    """Who serves, who is next, who is passed over and why."""
    now, rules, store = time.time(), gw.rotation.rules, gw.store
    queue: list[str] = []
    wanted, ready = [store.active_id or ""], replace(rules, enabled=True)
    while len(queue) < QUEUE_SHOWN and (
        one := pick_account(store.accounts, now, ready, (), wanted + queue)
    ):
        queue.append(one.id)
    skipped = [
        {"id": one.id, "reason": reason, "until": _ms(until)}
        for one in store.accounts.values()
        for reason, until in [hindrance(one, now, rules)]
        if reason not in ("", "quota_low")
    ]
    return {
        "autoSwitch": rules.enabled,
        "order": rules.order,
        "activeId": store.active_id,
        "queue": [{"id": one, "reason": rules.order} for one in queue],
        "skipped": skipped,
        "switches": [
            {**one, "at": _ms(one["at"]), "until": _ms(one["until"])}
            for one in gw.rotation.switches[-SWITCHES_SHOWN:]
        ],
    }


def _job_view(job: Job) -> Json:
    spent_s = (job.ended_at or time.time()) - job.started_at
    left_s = spent_s / job.done * (job.total - job.done) if job.done else None
    return {
        **{"id": job.id, "kind": job.kind, "state": job.state},
        **{"done": job.done, "total": job.total, "failed": len(job.failures)},
        **{"startedAt": _ms(job.started_at), "etaMs": None if left_s is None else _ms(left_s)},
        **{"cancellable": not job.ended_at, "failures": job.failures, "result": job.result},
    }


_GONE = {
    "flow_not_found": "There is no such sign-in any more: start anew.",
    "job_not_found": "There is no such job, or it ended some time ago.",
    "preview_expired": "This preview is gone: send the files again.",
    "undo_expired": "It is too late to undo this: import them again.",
}


def _found(kept: Mapping[str, T], name: Any, code: str) -> T:
    """What is kept under that name. Raises AztError 404, with that code, when it is gone."""
    if str(name) not in kept:
        raise AztError(404, code, _GONE[code])
    return kept[str(name)]


def _images_view(gw: Gateway, account: Account) -> Json:
    """By which way an account makes pictures, and whether it can."""
    if account.plan == "free":
        return {"route": "chatgpt_web", "ok": gw.settings.flag(_WEB_PICTURES)}
    return {"route": "responses_tool" if account.id in gw.no_images else "codex_images", "ok": True}


def _account_view(gw: Gateway, account: Account) -> Json:
    now = time.time()
    status, params = _account_status(gw, account, now)
    reason, until = hindrance(account, now, replace(gw.rotation.rules, before_percent=0))
    proven = account.last_used_at, account.refreshed_at, account.quota.get("captured_at", 0)
    return {
        "id": account.id,
        "email": account.email,
        "accountId": account.account_id,
        "label": account.label or None,
        "plan": account.plan,
        "status": status,
        "statusParams": params,
        "excluded": "excluded" in (status, reason),
        "excludedUntil": _ms(until) if reason == "excluded" else None,
        "lastUsedAt": _ms(account.last_used_at),
        "auth": {
            "state": status if status in _AUTH else "ok",
            "code": account.rejected or None,
            "checkedAt": _ms(max(proven)),
        },
        "images": _images_view(gw, account),
        "quota": _quota_view(account.quota, now, status not in _AUTH) if account.quota else None,
        "active": gw.store.active_id == account.id,
        "priority": account.priority or None,
        "inCodex": gw.codex_seen["auth"]["accountId"] == account.id,
        "createdAt": _ms(account.created_at),
        "tokenExpiresAt": _ms(account.expires_at),
        "exports": account.exports or None,
    }


_NOT_LISTED = {"accountId", "createdAt", "credits", "source", "tokenExpiresAt", "usedPercent"}


def _slim(view: Any) -> Any:
    """What the list of everything needs (console.md 6.2): nothing empty, no details."""
    if isinstance(view, dict):
        kept = ((k, v) for k, v in view.items() if (v or v == 0) and k not in _NOT_LISTED)
        return {k: _slim(v) if isinstance(v, (dict, list)) else v for k, v in kept}
    return [_slim(one) for one in view]


def _by_windows(view: Json, name: str, missing: float) -> float:
    windows = (view["quota"] or {}).get("windows", ())
    return min((one[name] or missing for one in windows), default=missing)


# `sort` -> the key of a view; without it they come as they were added.
_SORTS: dict[str, Callable[[Json], Any]] = {
    "": lambda view: 0,
    "left": lambda view: -_by_windows(view, "remainingPercent", 0),
    "name": lambda view: (view["label"] or view["email"]).casefold(),
    "reset": lambda view: _by_windows(view, "resetsAt", math.inf),
    "used": lambda view: -(view["lastUsedAt"] or 0),
}
_SERVES = ("ready", "low", "unknown", "expired")  # the last one is renewed on the way
_STATUSES = "ready low empty unknown login_rejected auth_error expired excluded".split()


@_view
def admin_get_accounts(gw: Gateway, request: Request) -> Json:
    query, everyone = request.query, [_account_view(gw, a) for a in gw.store.accounts.values()]
    states = collections.Counter(view["status"] for view in everyone)
    wanted, said = query.get("q", "").casefold(), operator.itemgetter("email", "id", "accountId")
    found = [
        view
        for view in everyone
        if all(query.get(name) in (None, "", view[name]) for name in ("status", "plan"))
        and wanted in " ".join([view["label"] or "", *said(view)]).casefold()
    ]
    found.sort(key=_SORTS[_word_in(query, "sort", _SORTS, "")])
    at = next((n for n, view in enumerate(found, 1) if view["id"] == query.get("cursor")), 0)
    page = found[at : at + _number_in(query, "limit", len(found))]
    return {
        "items": page,
        "next": page[-1]["id"] if page and page[-1] is not found[-1] else None,
        "total": len(found),
        "counts": {"all": len(everyone), **{name: states[name] for name in _STATUSES}},
    }


async def admin_get_account(gw: Gateway, request: Request) -> Reply:
    """One account with what was left of it, hour by hour, and its last requests."""
    account = gw.store.find(request.params["id"])
    since_ms, folder = int(time.time() - HISTORY_DAYS * 86400) * 1000, gw.paths.usage_events
    await gw.counted()

    def details() -> Json:
        rows = (_row_of(row) for row in gw.requests.rows() if row["accountId"] == account.id)
        history = read_quotas(folder, account.id, since_ms)
        return {"history": history, "requests": list(itertools.islice(rows, RECENT_SHOWN))}

    more = await in_thread(gw.short, details)
    return _private_reply({**_account_view(gw, account), **more})


_SAMPLE = Account("", "optional", "", "eyJ...", "rt_...", "eyJ...", "you@example.com", "plus")
get_template = _view(lambda gw, request: parse_json(export_accounts([_SAMPLE])))


def _file_reply(body: bytes, content_type: str, name: str = "") -> Reply:
    headers = [("content-type", content_type), ("cache-control", "no-store")]
    if name:
        headers.append(("content-disposition", f'attachment; filename="{name}"'))
    return Reply(200, body, headers)


def _shelve(shelf: dict[str, Any], value: Any, ttl_s: float) -> Json:
    """Keep a value in memory for a while, under a name that cannot be guessed."""
    if len(shelf) >= SHELF_MAX:
        del shelf[next(iter(shelf))]
    name = secrets.token_urlsafe(12)
    shelf[name] = value
    asyncio.get_running_loop().call_later(ttl_s, shelf.pop, name, None)
    return {"token": name, "expiresAt": _ms(time.time() + ttl_s)}


async def _sent_accounts(gw: Gateway, request: Request) -> tuple[dict[int, Found], Json]:
    """What a request brings to import, or brought before as a preview; and its other fields."""
    kind, body = request.headers["content-type"], Json()
    if kind.lower().startswith("multipart"):
        parts = parse_form(request.body, kind, IMPORT_MAX_FILES)
        files: list[Found] = [(part.filename or "", part.body) for part in parts]
    else:
        body = await read_object(gw, request)
        files = [("", body.get("payload"))]
    if "previewId" not in body:
        return dict(enumerate(await in_thread(gw.short, read_accounts, files, time.time()))), body
    return _found(gw.previews, body["previewId"], "preview_expired"), body


async def admin_post_import(gw: Gateway, request: Request) -> Reply:
    """With `dryRun=1` what an import would do, else the import: all of it or nothing."""
    is_dry = request.query.get("dryRun") == "1"
    found, body = await _sent_accounts(gw, request)
    try:
        chosen = {at: found[at] for at in body.get("indexes", found)}
    except (KeyError, TypeError):
        raise BadRequest("`indexes` lists entries of the file.", "indexes", "bad_field") from None
    if not chosen:
        raise _bad_file("nothing_to_import", "There is no account in this file.")

    def add(store: AccountStore) -> list[Json]:
        items = import_accounts(store, chosen, time.time())
        bad = next((one for one in items if one["result"] == "unreadable"), None)
        if bad and not is_dry:
            where = f"Entry {bad['index'] + 1}" + f" ({bad['file']})" * bool(bad["file"])
            raise _bad_file(bad["code"], f"{where}: {bad['message']} Nothing was imported.")
        return items

    is_job = body.get("check") is True or ("previewId" in body and len(chosen) > 5)
    if is_job and not is_dry:
        gw.ready_for("import")
    if is_dry:
        items = add(AccountStore.from_json(gw.store.to_json()))  # to a copy
    else:
        items = await gw.change_accounts(add)
    counts = dict.fromkeys(("new", "update", "same", "expired", "unreadable"), 0)
    counts |= collections.Counter(item["result"] for item in items)
    reply: Json = {"dryRun": is_dry, "summary": counts, "items": items}
    if is_dry:
        kept = _shelve(gw.previews, found, PREVIEW_TTL_S)
        reply |= {"previewId": kept["token"], "expiresAt": kept["expiresAt"]}
    elif is_job:
        checked = [one["id"] for one in items if body.get("check") is True]
        job = gw.refresh_quotas(map(gw.store.find, checked), kind="import")
        job.result = {"summary": counts, "items": items}
        reply["job"] = _job_view(job)
    return _private_reply(reply, 202 if "job" in reply else 200)


def _chosen(store: AccountStore, names: Any) -> list[Account]:
    """The accounts that a request names, each once."""
    # An empty name would fit any account: what a script sends whose variable is empty.
    if not isinstance(names, list) or not names or not all(names):
        raise BadRequest("Name the accounts; `azt accounts list` shows them.", "ids", "bad_field")
    return list({account.id: account for account in map(store.find, map(str, names))}.values())


async def admin_post_export(gw: Gateway, request: Request) -> Reply:
    """The only answer with tokens in it. Each account remembers how often it was exported."""
    body = await read_object(gw, request)
    kind = body.get("format", "json")
    if kind not in ("json", "zip"):
        raise BadRequest("The format is json or zip.", "format", "bad_field")

    def count(store: AccountStore) -> list[Account]:
        chosen = _chosen(store, [*store.accounts] if body.get("all") is True else body.get("ids"))
        latest = {"lastAt": _ms(time.time()), "lastKind": "batch" if chosen[1:] else "single"}
        for one in chosen:
            exports = {"count": one.exports.get("count", 0) + 1, **latest}
            store.accounts[one.id] = replace(one, exports=exports)
        return chosen

    chosen = await gw.change_accounts(count)
    log.info("audit: exported as %s: %s", kind, ", ".join(one.name for one in chosen))
    raw = await in_thread(gw.short, export_accounts, chosen, kind == "zip")
    name = time.strftime(f"azt-accounts-%Y-%m-%d.{kind}")
    return _file_reply(raw, f"application/{kind}", name)


async def _exclude(gw: Gateway, account: Account, changes: Json) -> None:
    """Take `excluded` and `excludedUntil` (ms) out of a change of an account and obey them."""
    excluded, until = changes.pop("excluded", None), changes.pop("excludedUntil", None)
    if excluded not in (None, True, False) or not isinstance(until, int | None):
        text = "'excluded' is true or false, 'excludedUntil' a time in milliseconds."
        raise BadRequest(text, "excluded", "bad_field")
    if until or (excluded is not None and account.cooldown_reason == "excluded"):
        account.cooldown_until, account.cooldown_reason = (until or 0) // 1000, "excluded"
        gw.save_soon()
    if excluded is not None:
        ids = gw.settings.words("autoSwitch.excludedIds") - {account.id}
        ids |= {account.id} if excluded and not until else set()
        await gw.change_settings({"autoSwitch.excludedIds": sorted(ids)})


async def admin_patch_account(gw: Gateway, request: Request) -> Reply:
    asked = await read_object(gw, request)
    changes = {name: asked.pop(name) for name in USER_FIELDS if name in asked}
    for name in asked.keys() - {"excluded", "excludedUntil"}:
        raise BadRequest(f"An account has no {name[:64]!r} to set.", name, "bad_field")
    for name, value in changes.items():
        is_good, words, empty = USER_FIELDS[name]
        changes[name] = empty if value is None else value
        if not is_good(changes[name]):
            raise BadRequest(f"{name!r} accepts {words}.", name, "bad_field")

    def change(store: AccountStore) -> Account:
        account = store.find(request.params["id"])
        if any(other is not account for other in store.named(changes.get("label", ""))):
            raise BadRequest("Another account has this name already.", "label", "bad_field")
        store.accounts[account.id] = changed = replace(account, **changes)
        return changed

    account = await gw.change_accounts(change)
    await _exclude(gw, account, asked)
    return _private_reply(_account_view(gw, account))


async def admin_post_activate(gw: Gateway, request: Request) -> Reply:
    is_forced = bool(request.body) and (await read_object(gw, request)).get("force") is True

    def activate(store: AccountStore) -> tuple[str | None, Account]:
        previous, account = store.active_id, store.find(request.params["id"])
        status, params = _account_status(gw, account, time.time())
        if status not in _SERVES and not is_forced:
            text = f'{account.name} cannot serve now ({status}). Send {{"force": true}} to insist.'
            told = {"params": {"id": account.id, "reason": status, **params}}
            raise AztError(409, "account_unusable", text, extra=told)
        store.active_id = account.id
        gw.rotation.sticky = Stickiness()  # the person's choice is for running conversations too
        return previous, account

    previous, account = await gw.change_accounts(activate)
    view = _account_view(gw, account)
    return _private_reply({"activeId": account.id, "previousId": previous, "account": view})


async def admin_post_refresh_quota(gw: Gateway, request: Request) -> Reply:
    return _private_reply(_account_view(gw, await gw.refresh_quota(request.params["id"])))


async def admin_post_refresh_quotas(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    names, everyone = body.get("ids"), gw.store.accounts.values()
    if names is not None and not (isinstance(names, list) and all(names)):
        raise BadRequest("Name the accounts, or leave 'ids' out for all.", "ids", "bad_field")
    chosen = [*everyone] if names is None else [gw.store.find(str(name)) for name in names]
    if body.get("staleOnly") is True:
        last = time.time() - QUOTA_STALE_S
        chosen = [one for one in chosen if one.quota.get("captured_at", 0) < last]
    return _private_reply({"job": _job_view(gw.refresh_quotas(chosen))}, 202)


async def admin_job(gw: Gateway, request: Request) -> Reply:
    """Look at a job, or end it."""
    job, ends = _found(gw.jobs, request.params["id"], "job_not_found"), request.method == "DELETE"
    if ends and job.task is not None:
        job.task.cancel()
    return _private_reply(_job_view(job), 202 if ends else 200)


async def admin_post_remove(gw: Gateway, request: Request) -> Reply:
    names = (await read_object(gw, request)).get("ids")

    def remove(store: AccountStore) -> tuple[list[Account], str | None, str | None]:
        chosen, serving = _chosen(store, names), store.active_id
        for account in chosen:
            store.remove(account)
        return chosen, serving, store.active_id

    done = await gw.change_accounts(remove)
    undo = _shelve(gw.removed, done, UNDO_TTL_S)
    gw.removed[undo["token"]] = (*done, undo)
    return _private_reply({"removed": len(done[0]), "activeId": gw.store.active_id, "undo": undo})


async def admin_post_restore(gw: Gateway, request: Request) -> Reply:
    """Undo a removal, also who served, unless that was changed since."""
    name = str((await read_object(gw, request)).get("token"))
    accounts, serving, then, _ = _found(gw.removed, name, "undo_expired")

    def restore(store: AccountStore) -> list[Account]:
        back = [account for account in accounts if account.id not in store.accounts]
        is_unchanged = store.active_id == then
        for account in back:
            store.add(account)
        store.active_id = serving if is_unchanged else store.active_id
        return back

    views = [_account_view(gw, account) for account in await gw.change_accounts(restore)]
    gw.removed.pop(name, None)
    return _private_reply({"restored": len(views), "accounts": views})


async def admin_post_logout(gw: Gateway, request: Request) -> Reply:
    """Forget an account and end its sign-in at the provider, if that can be reached."""
    account = gw.store.find(str((await read_object(gw, request)).get("id") or ""))
    await gw.change_accounts(lambda store: store.remove(account))
    revoked = await gw.logins.revoke(account.refresh_token)
    view = {"account": _account_view(gw, account), "activeId": gw.store.active_id}
    return _private_reply({**view, "revoked": revoked})


def _login_view(gw: Gateway, login: Login) -> Json:
    shown: Json = {"flowId": login.id, "method": "browser" if login.port else "device"}
    shown["status"] = login.status
    if login.status == "waiting":
        shown |= {**login.shown, "listening": login.opened and login.port in gw.logins.ports}
        if login.opened and not shown["listening"]:
            shown["listenError"] = "port_in_use"
    if login.account is not None:
        account = gw.store.accounts.get(login.account.id, login.account)
        shown |= {"account": _account_view(gw, account), "created": login.created}
    if login.error is not None:
        shown["error"] = {"code": login.error.code, "message": mask(login.error.message)}
    return shown


async def admin_post_login(gw: Gateway, request: Request) -> Reply:
    body = await read_object(gw, request)
    method, wanted = body.get("method", "browser"), body.get("accountId")
    if method not in ("browser", "device"):
        raise BadRequest("The method is `browser` or `device`.", "method", "bad_field")
    wanted_id = gw.store.find(str(wanted)).id if wanted else None
    login = await gw.logins.start(method == "device", wanted_id)
    login.on_change = lambda: gw.events.publish("login", _login_view(gw, login))
    return _private_reply(_login_view(gw, login), 201)


async def admin_login(gw: Gateway, request: Request) -> Reply:
    """Look at a sign-in, or go on with it: open, callback (what was pasted, or keep), DELETE."""
    body = await read_object(gw, request) if request.method == "POST" else {}
    login = _found(gw.logins.flows, request.params["id"], "flow_not_found")
    last = request.path.rstrip("/").rpartition("/")[2]
    if request.method == "DELETE":
        await gw.logins.give_up(login)
        return Reply(204)
    if last == "open":
        login.opened = True  # the link was followed: listen where its browser comes back to
        if login.port and login.port not in gw.logins.ports:
            server = HttpServer(CALLBACK_ROUTES, gw, policy_source(gw))
            with contextlib.suppress(OSError):  # taken meanwhile: the view says so
                await server.listen("127.0.0.1", login.port)
                gw.logins.ports[login.port] = server.drain
            gw.logins.close_unneeded()  # it may have ended while this waited
    elif last == "callback" and body.get("keep") is True and login.account and login.error:
        login.created = await gw.add_account(login.account)  # another than asked for, but wanted
        login.status, login.error = "done", None
        login.on_change()
    elif last == "callback":
        url = body.get("url")
        said = read_callback(url if isinstance(url, str) else "")
        await asyncio.wait({cast(Any, finish_login([login], said, pasted=True).task)})
    return _private_reply(_login_view(gw, login))


async def get_login_callback(gw: Gateway, request: Request) -> Reply:
    """The one page at the callback port: plain text for a person, whatever has happened."""
    host, _, port = request.headers.get("host", "").partition(":")
    if host not in ("localhost", "127.0.0.1") or port not in map(str, gw.logins.ports):
        raise AztError(403, "host_not_allowed", "This address is not that of the sign-in.")
    if (request.method, request.path) != ("GET", "/auth/callback"):
        raise AztError(404, "unknown_url", "Here is nothing but the end of a sign-in.")
    status, title = 200, "Not signed in"
    try:
        login = finish_login(gw.logins.flows.values(), request.query)
        await asyncio.wait({cast(Any, login.task)})
        text = login.error.message if login.error else "It was given up."
        if login.status == "done" and login.account is not None:
            title, text = "Signed in", f"{login.account.email or login.account.id} is in azt now."
    except AztError as error:
        status, text = 400, error.message
    page = f"<!doctype html><meta charset=utf-8><title>azt</title><h1>{title}</h1>"
    page += f"<p>{html.escape(mask(text))}</p><p>You can close this tab.</p>"
    own = {"cache-control": "no-store", "content-type": "text/html; charset=utf-8"}
    return Reply(status, page.encode(), [*(_PAGE_HEADERS | own).items()])


def _models_view(gw: Gateway) -> Json:
    items = [
        {
            "id": entry["slug"],
            "name": entry.get("display_name") or entry["slug"],
            "input": entry.get("input_modalities") or ["text"],
            "default": entry["slug"] == gw.default_model,
            "efforts": gw.catalogue.efforts[entry["slug"]],
            "source": "built_in" if gw.catalogue.source == "built-in" else "synced",
        }
        for entry in gw.catalogue.listed
    ]
    return {"items": items, "syncedAt": _ms(gw.catalogue.fetched_at), "source": gw.catalogue.source}


admin_get_models = _view(lambda gw, request: _models_view(gw))


async def admin_post_refresh(gw: Gateway, request: Request) -> Reply:
    async def refresh(what: str) -> Json:
        return {"changed": await gw.refresh_models(), "count": len(gw.catalogue.listed)}

    return _private_reply({"job": _job_view(gw.start_job("models", ["catalogue"], refresh))}, 202)


@_view
def admin_get_settings(gw: Gateway, request: Request) -> Json:
    settings, before = gw.settings, gw.started_settings
    values = {key: settings[key] for key in SETTINGS}
    url = settings.text("networkProxy.url")
    values["networkProxy.hasPassword"] = "@" in url
    values["networkProxy.url"] = re.sub(r"//[^/]*@", "//", url)
    bound = [key for key in ("server.host", "server.port") if key not in settings.fixed]
    return {
        "revision": settings.revision,
        "restartNeeded": [key for key in bound if gw.listening and settings[key] != before[key]],
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
        if SETTINGS[key].widens and not request.is_own:
            raise _refusal("local_only")
        if SETTINGS[key].widens and not request.has_proof:
            message = f"Changing {key} needs the admin token: use `azt settings set`."
            raise AztError(401, "proof_needed", message, param=key)
        if key in gw.settings.fixed:
            message = f"{key} is fixed by {gw.settings.fixed[key]}; change it there."
            raise AztError(409, "setting_fixed", message, param=key)
    await gw.change_settings(changes, body.get("revision"))
    if wider := sorted(key for key in changes if SETTINGS[key].widens):
        log.info("audit: settings were changed: %s", ", ".join(wider))
    return await admin_get_settings(gw, request)


def _models_told(gw: Gateway) -> Json:
    catalogue = gw.catalogue
    is_old = catalogue.fetched_at < time.time() - MODELS_OLD_S
    known = {"count": len(catalogue.listed), "syncedAt": _ms(catalogue.fetched_at)}
    return {**known, "stale": is_old, "source": catalogue.source}


def _gateway_told(gw: Gateway, status: str = "running") -> Json:
    listen = [_address(*one) for one in gw.listening]
    told = {"status": status, "running": len(gw.running()), "listen": listen}
    if status == "restarting":  # who watches goes where it will be
        host, port = gw.settings.text("server.host"), gw.settings.number("server.port")
        told["to"] = _near(host, port or gw.listening[0][1])
    return told


def _today(gw: Gateway) -> Json:
    return sums_view(gw.usage.day(_day(int(time.time() * 1000))).total)


@_counted_view
def admin_get_state(gw: Gateway, request: Request) -> Json:
    codex, lifetime = gw.codex_seen, gw.usage.lifetime
    # Another device uses the address by which it came here.
    base = gw.url if request.peer_class == "own" else f"http://{request.headers.get('host')}"
    gateway = {
        "version": VERSION,
        "startedAt": _ms(gw.started_at),
        "pid": os.getpid(),
        **_gateway_told(gw),
        "baseUrl": f"{base}/v1",
        "codexBaseUrl": f"{base}/codex/v1",
        "adminUrl": f"{base}/",
        "stateDir": str(gw.paths.state),
        "timeZone": gw.environment.time_zone,
        "restartSupported": gw.restart is not None,
        "lanApi": gw.settings.flag("server.lanApi"),
        "keys": len(gw.keys),
    }
    clients = (one for one in lifetime.by["bySource"] if one not in _OWN_CLIENTS)
    begun = {"hasAccount": bool(gw.store.accounts), "hasCalled": lifetime.total["requestCount"] > 0}
    _watch_changes(gw)  # what happens from now on follows by events
    return {
        "eventId": gw.events.newest_id,
        "now": _ms(time.time()),
        "gateway": gateway,
        "defaultModel": gw.default_model,
        "routing": _routing_view(gw),
        "jobs": [_job_view(job) for job in gw.jobs.values()],
        "accounts": _slim([_account_view(gw, one) for one in gw.store.accounts.values()]),
        "codex": {"takeover": codex["takeover"], "authAccountId": codex["auth"]["accountId"]},
        "today": _today(gw),
        "recent": list(map(_row_of, itertools.islice(gw.requests.rows(), RECENT_SHOWN))),
        "models": _models_told(gw),
        "notices": gw.notices,
        "firstRun": {**begun, "clientSeen": next(clients, None)},
        "removed": [
            {"label": (gone[0].label or gone[0].email), "count": len(gone), **undo}
            for gone, _, _, undo in gw.removed.values()
        ],
    }


async def admin_post_playground(gw: Gateway, request: Request) -> Reply:
    """A real call: the request becomes one of a public endpoint, perhaps with a pinned account."""
    asked, record = await read_object(gw, request), request.record
    path, body, name = asked.get("path"), asked.get("body", {}), asked.get("accountId")
    if path not in _PLAYED or not isinstance(body, dict):
        text = f"Send a 'path' ({', '.join(_PLAYED)}) and a 'body'."
        raise BadRequest(text, "path" if isinstance(body, dict) else "body", "bad_field")
    request.pinned = gw.store.find(str(name)).id if name else ""
    request.body = await in_thread(gw.short, encode_large_json, body)
    request.held(len(request.body))
    request.path = record.path = record.route = path
    record.method = "GET" if path == "/v1/models" else "POST"
    record.client = PLAYGROUND
    return await _PLAYED[path](gw, request)


# -- live: what the console shows is compared, a few times a second, with what it was told

_OWN_CLIENTS = (PLAYGROUND, "azt", "console", "unknown")
_WHOLE_ACCOUNT = operator.attrgetter(*Account.__slots__)
_Tellable = dict[tuple[str, str], tuple[Any, Callable[[], Json]]]
"""(event, of what) -> (what it depends on, what is told when that has changed)"""


def _tellable(gw: Gateway) -> _Tellable:
    found: _Tellable = {}
    now, in_codex = time.time(), gw.codex_seen["auth"]["accountId"]
    for one in gw.store.accounts.values():
        places = one.id == gw.store.active_id, one.id == in_codex, one.id in gw.no_images
        depends = _WHOLE_ACCOUNT(one), places, _account_status(gw, one, now)
        found["account", one.id] = depends, functools.partial(_account_view, gw, one)
    for record in gw.running():
        found["request.started", record.id] = True, record.event
    for job in gw.jobs.values():
        found["job", job.id] = (job.state, job.done), functools.partial(_job_view, job)
    plain = {("notice", one["id"]): one for one in gw.notices}
    plain["routing", ""], plain["codex", ""] = _routing_view(gw), gw.codex_seen
    plain["models", ""], plain["gateway", ""] = _models_told(gw), _gateway_told(gw)
    plain["settings", ""] = {"revision": gw.settings.revision}
    found |= {key: (value, functools.partial(dict, value)) for key, value in plain.items()}
    return found


def _tell_changes(gw: Gateway, seen: _Tellable, now: _Tellable) -> None:
    """Publish how `_tellable` differs from what it was."""
    tell, gone = gw.events.publish, [key for key in seen if key not in now]
    changed = [key for key in now if key not in seen or seen[key][0] != now[key][0]]
    if len(changed) > TOLD_AT_ONCE_MAX:
        return tell("resync", {})
    for key in changed:
        data = now[key][1]()
        if key[0] == "routing" and data["activeId"] != seen[key][0]["activeId"]:
            switch = data["switches"][-1:]
            if switch and switch != seen[key][0]["switches"][-1:]:  # azt did it, not the person
                data["cause"] = {"code": switch[0]["reason"], **switch[0]}
        tell(key[0], data)
    if ids := [name for kind, name in gone if kind == "account"]:
        undos = [undo for left, *_, undo in gw.removed.values() if left[0].id in ids]
        tell("account.removed", {"ids": ids, "undo": undos[-1] if undos else None})
    for kind, name in gone:
        if kind == "notice":
            tell("notice.cleared", {"id": name})


def _watch_changes(gw: Gateway) -> None:
    """Have the changes told from now on, for as long as somebody watches."""

    async def watch() -> None:
        events, counted, looked_s = gw.events, 0, time.monotonic()
        seen, told_s = first, looked_s
        while events.is_watched():
            await asyncio.sleep(TELL_EVERY_S)
            now_s, count = time.monotonic(), gw.usage.startup.total["requestCount"]
            if now_s - looked_s > CODEX_EVERY_S:
                await gw.look_at_codex()
                looked_s = now_s
            if count != counted and now_s - told_s > 1:
                events.publish("usage", {"today": _today(gw), "minute": gw.minute})
                counted, told_s = count, now_s
            now = _tellable(gw)
            _tell_changes(gw, seen, now)
            seen = now

    gw.events.watched_s = time.monotonic()
    if gw.telling is None or gw.telling.done():
        gw.events.forget()
        first = _tellable(gw)
        gw.telling = asyncio.create_task(watch())


async def admin_get_events(gw: Gateway, request: Request) -> Reply:
    last_id = request.headers.get("last-event-id") or request.query.get("lastEventId", "")
    _watch_changes(gw)
    hello = {"now": _ms(time.time()), "version": VERSION, "pid": os.getpid()}
    session = request.session["id"] if request.session else ""
    body = gw.events.watch(
        hello, int(last_id) if last_id.isdecimal() else None, session, _email_rule(gw, request)
    )
    return Reply(200, body, _STREAM_HEADERS)


_AGENTS = (
    ("Edg", "OPR", "Firefox", "Chrome", "Safari"),
    (*("iPhone", "iPad", "Android", "Windows", "Mac", "Linux"),),
)


@_view
def admin_get_session(gw: Gateway, request: Request) -> Json:
    """Who calls and what that one may do. Never 401."""
    settings, session = gw.settings, request.session
    console_on, proven = settings.flag("server.lanConsole"), request.has_proof
    known = session or proven or (request.is_own and not settings.flag("server.tokenOnLoopback"))
    shown = {"signedIn": bool(known), "scope": "local" if request.is_own else "lan"}
    lan = {"apiOn": settings.flag("server.lanApi"), "consoleOn": console_on}
    if not known:
        return {**shown, "methods": ["token", "pair"], "lan": {"consoleOn": console_on}}
    ends_at = session["createdAt"] + SESSION_LIFE_S * 1000 if session else None
    can = {"write": True, "export": proven, "codex": proven}
    via = session["via"] if session else "token" if proven else "loopback"
    return {**shown, "via": via, "expiresAt": ends_at, "can": can, "lan": lan, "version": VERSION}


def _cookie(gw: Gateway, value: str, life_s: int, origin: str) -> tuple[str, str]:
    """Only a relay with TLS in front makes a page come by https."""
    port = gw.listening[0][1] if gw.listening else 0
    attributes = f"Path={ADMIN}; HttpOnly; SameSite=Strict; Max-Age={life_s}"
    secure = "; Secure" if origin.startswith("https:") else ""
    return "set-cookie", f"azt_admin_{port}={value}; {attributes}{secure}"


async def admin_post_session(gw: Gateway, request: Request) -> Reply:
    """Sign a browser in with the admin token or a code. Wrong ones are slowed and banned."""
    body = await read_object(gw, request)
    token, code = (str(body.get(name) or "") for name in ("token", "code"))
    if left_s := await gw.guard.turn(request.who):
        raise slow_down(left_s)
    is_token = hmac.compare_digest(token.strip().encode(), gw.admin_token.encode())
    via = "token" if is_token else gw.codes.spend(code)
    if not via or (via == "open" and not request.is_own):
        gw.guard.failed(request.who)
        log.info("audit: a sign-in from %s was refused", request.peer)
        raise _refusal("bad_token" if token else "pairing_expired")
    gw.guard.forgive(request.who)
    headers, cookie, now_ms = request.headers, secrets.token_urlsafe(32), int(time.time() * 1000)
    agent = headers.get("user-agent", "")
    names = (next((one for one in kind if one in agent), "") for kind in _AGENTS)
    session = {
        "id": "ses_" + secrets.token_hex(4),
        "hash": hashed(cookie),
        "scope": "local" if request.is_own and via != "pair" else "lan",
        "via": via,
        "agent": ", ".join(filter(None, names)) or client_name(agent),
        "address": request.peer,
        **{"createdAt": now_ms, "lastUsedAt": now_ms},
    }

    def keep(kept: list[Json]) -> list[Json]:
        oldest = now_ms - SESSION_LIFE_S * 1000
        good = (one for one in kept if one is not request.session and one["createdAt"] > oldest)
        return [*good, session]

    await gw.change_sessions(keep)
    if via == "open":
        await in_thread(gw.files, delete_file, gw.paths.open_page)
    log.info("audit: signed in with %s from %s (%s)", via, request.peer, session["id"])
    set_cookie = _cookie(gw, cookie, SESSION_LIFE_S, headers.get("origin", ""))
    return Reply(204, b"", [set_cookie, ("cache-control", "no-store")])


async def _end_sessions(gw: Gateway, request: Request, ends: Callable[[Json], bool]) -> int:
    ended = await gw.change_sessions(lambda kept: [one for one in kept if not ends(one)])
    log.info("audit: %d sessions ended from %s", ended, request.peer)
    return ended


async def admin_delete_session(gw: Gateway, request: Request) -> Reply:
    """With an id: that session; without: this browser's."""
    wanted = request.params.get("id") or (request.session or {}).get("id")
    if not await _end_sessions(gw, request, lambda one: one["id"] == wanted) and request.params:
        raise AztError(404, "session_not_found", f"There is no session {wanted!r}.")
    leaves = [] if request.params else [_cookie(gw, "", 0, "")]
    return Reply(204, b"", [*leaves, ("cache-control", "no-store")])


_LINKS = {"wl": "Wi-Fi", "en": "Ethernet", "et": "Ethernet", "tu": "VPN", "wg": "VPN"}
_NO_LINKS = ("br-", "docker", "lo", "veth", "virbr")  # of containers and virtual machines


async def admin_get_share(gw: Gateway, request: Request) -> Reply:
    """The addresses by which other devices reach azt."""
    gw.interfaces = await in_thread(gw.short, own_interfaces)
    hosts, addresses = {host: port for host, port in gw.listening}, []
    for name, own in gw.interfaces:
        port = hosts.get(str(own.ip), hosts.get("0.0.0.0" if own.version == 4 else "::"))
        if port is None or own.is_loopback or own.is_link_local or name.startswith(_NO_LINKS):
            continue
        base, kind = f"http://{_address(str(own.ip), port)}", _LINKS.get(name[:2])
        urls = {
            "baseUrl": f"{base}/v1",
            "codexBaseUrl": f"{base}/codex/v1",
            "consoleUrl": f"{base}/",
        }
        label = f"{kind} ({name})" if kind else name
        addresses.append({"host": str(own.ip), "label": label, **urls})
    flags = {name: gw.settings.flag(f"server.{name}") for name in ("lanApi", "lanConsole")}
    listen = [_address(*one) for one in gw.listening]
    return _private_reply({**flags, "listen": listen, "addresses": addresses, "tls": False})


_SESSION_SHOWN = ("id", "via", "scope", "agent", "address", "createdAt", "lastUsedAt")
_KEY_SHOWN = (
    *("id", "name", "prefix", "createdAt", "lastUsedAt", "requests"),
    *("limit", "models", "expiresAt"),
)


@_view
def admin_get_sessions(gw: Gateway, request: Request) -> Json:
    items = [
        {name: one.get(name) for name in _SESSION_SHOWN} | {"current": one is request.session}
        for one in gw.sessions
    ]
    return {"items": items}


async def admin_post_pair(gw: Gateway, request: Request) -> Reply:
    """A code for one sign-in: of another device, or with `{"for": "open"}` of this machine."""
    body = await read_object(gw, request)
    if body.get("for") == "open":
        made, file = await gw.open_page()
        return _private_reply({**made, "file": str(file)})
    if not gw.settings.flag("server.lanConsole"):
        message = "The console is off for other devices: `azt settings set server.lanConsole true`."
        raise AztError(403, "lan_console_off", message)
    address = str(body.get("address") or "")
    if _host_kind(address) != "address":
        raise BadRequest("Send an address of this machine.", "address", "bad_field")
    code, ends_at = gw.codes.make("pair")
    log.info("audit: a pairing code was made")
    url = f"http://{_address(address, gw.listening[0][1])}/#/pair/{code}"
    return _private_reply({"code": code, "url": url, "expiresAt": _ms(ends_at)})


async def admin_post_rotate_token(gw: Gateway, request: Request) -> Reply:
    """A new admin token; every browser but this one has to sign in again."""
    await read_object(gw, request)
    gw.admin_token = await in_thread(gw.files, make_secret, gw.paths.admin_token)
    log.info("audit: the secret of the administration was made anew")
    ended = await _end_sessions(gw, request, lambda one: one is not request.session)
    return _private_reply({"token": gw.admin_token, "sessionsEnded": ended})


@_view
def admin_get_keys(gw: Gateway, request: Request) -> Json:
    return {"items": [{name: key.get(name) for name in _KEY_SHOWN} for key in gw.keys]}


async def admin_post_keys(gw: Gateway, request: Request) -> Reply:
    """The key itself is in this one answer and nowhere else: only its hash is kept."""
    body, now_ms = await read_object(gw, request), int(time.time() * 1000)
    name, terms = body.get("name"), {}
    for field_name, (is_fit, words) in {
        "name": _text("1 to 64 letters, digits, spaces or . @ - _", r"[\w .@-]{1,64}"),
        "models": _texts("a list of models", r"[\w.:/-]{1,128}"),
        "limit": _number(1, 1_000_000_000),
        "expiresAt": _number(now_ms, 1 << 52),
    }.items():
        if (given := body.get(field_name)) not in (None, []) or field_name == "name":
            if not is_fit(given):
                raise BadRequest(f"{field_name} accepts {words}.", field_name, "bad_field")
            terms[field_name] = given
    key = "azt_" + secrets.token_urlsafe(32)
    ident = "key_" + secrets.token_hex(4)
    item = {"id": ident, **terms, "prefix": key[:8], "createdAt": now_ms, "requests": 0}
    kept = {**item, "hash": hashed(key)}
    await gw.change_keys(lambda keys: [*keys, kept])
    log.info("audit: a key was made: %s (%s)", name, ident)
    return _private_reply({"item": item, "key": key, "first": gw.keys == [kept]}, 201)


async def admin_delete_key(gw: Gateway, request: Request) -> Reply:
    wanted = request.params["id"]

    def revoke(keys: list[Json]) -> list[Json]:
        kept = [key for key in keys if wanted not in (key.get("id"), key.get("name"))]
        if len(kept) == len(keys):
            message = f"There is no key {wanted!r}. `azt keys list` shows them."
            raise AztError(404, "key_not_found", message)
        return kept

    await gw.change_keys(revoke)
    log.info("audit: a key was revoked: %s", wanted)
    return Reply(204)


def _word_in(query: Mapping[str, str], name: str, words: Collection[str], default: str) -> str:
    value = query.get(name) or default
    if value not in words:
        text = f"{name} is one of {', '.join(words)}."
        raise BadRequest(text, name, "bad_field")
    return value


def _number_in(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isdecimal() and len(text) < 16):
        raise BadRequest(f"{name} is a whole number.", name, "bad_field")
    return int(text)


def _stretch(query: Mapping[str, str], days: int) -> tuple[int, int, tzinfo]:
    """`from`, `to` (milliseconds, or days of the zone) and `tz` of a query. Raises BadRequest."""
    name, last = query.get("tz", ""), time.time() * 1000
    try:
        zone: tzinfo = ZoneInfo(name) if name else datetime.now().astimezone().tzinfo or UTC
        at = {"from": last - days * 86_400_000, "to": last}
        for word, text in ((word, query[word]) for word in at if query.get(word)):
            day = None if text.isdigit() else datetime.fromisoformat(text).replace(tzinfo=zone)
            at[word] = int(text) if day is None else day.timestamp() * 1000
        if not 0 <= at["from"] <= at["to"] < _YEAR_2200_S * 1000:
            raise ValueError
    except (ValueError, OverflowError, OSError, ZoneInfoNotFoundError):
        text = "from and to are milliseconds or dates, from first; tz is a name such as UTC."
        raise BadRequest(text, "from", "bad_field") from None
    return int(at["from"]), int(at["to"]), zone


async def admin_get_usage(gw: Gateway, request: Request) -> Reply:
    """The sums. With `from` (and `to`) the rows and `range` are of that time alone: of days of this
    machine, or with `tz` of the moments that a chart of the same query has."""
    usage, query, now = await gw.counted(), request.query, int(time.time() * 1000)
    today, first, shown = _day(now), query.get("from", ""), usage.lifetime
    if query.get("tz"):
        first_ms, last_ms, _ = _stretch(query, 1)
        shown = await _with_events(gw, first_ms, last_ms, Tally.of_events)
    elif first:
        shown = usage.between(first, query.get("to") or today)
    names = {account.id: account.name for account in gw.store.accounts.values()}
    rows = {
        name: [
            {"key": key, "label": names.get(key, key), "aggregate": sums_view(row)}
            for key, row in sorted(rows.items(), key=lambda pair: -pair[1]["requestCount"])
        ]
        for name, rows in shown.by.items()
    }
    newest = sorted(usage.days, reverse=True)[:90]
    value = {
        "generatedAt": now,
        "startedAt": _ms(gw.started_at),
        "todayDate": today,
        "storageDir": str(gw.paths.usage_events.parent),
        "startup": sums_view(usage.startup.total),
        "today": sums_view(usage.day(today).total),
        "lifetime": sums_view(usage.lifetime.total),
        "range": sums_view(shown.total),
        "daily": [{"date": day, "aggregate": sums_view(usage.day(day).total)} for day in newest],
        **rows,
    }
    return _private_reply(value)


async def _with_events(
    gw: Gateway, first_ms: int, last_ms: int, fold: Callable[[Iterator[Json]], T]
) -> T:
    """`fold` over the events of a stretch of time, in a thread."""
    await gw.counted()
    days = _day(first_ms - 86_400_000), _day(last_ms + 86_400_000)

    def run() -> T:
        paths = sorted(gw.paths.usage_events.glob("*.jsonl"))
        some = (read_events(path) for path in paths if days[0] <= path.stem <= days[1])
        events = itertools.chain.from_iterable(some)
        return fold(event for event in events if first_ms <= event["at"] < last_ms)

    return await in_thread(gw.short, run)


async def admin_delete_usage(gw: Gateway, request: Request) -> Reply:
    await gw.forget_usage()
    log.info("audit: the statistics were cleared")
    return Reply(204)


async def admin_get_usage_series(gw: Gateway, request: Request) -> Reply:
    query = request.query
    first_ms, last_ms, zone = _stretch(query, 1)
    bucket = _word_in(query, "bucket", _STEPS, "hour")
    measure = _word_in(query, "measure", _MEASURES, "tokens")
    by = _word_in(query, "by", ("account", "client", "endpoint", "model", "result"), "model")
    top = min(_number_in(query, "top", 4), 20)
    starts = bucket_starts(first_ms, last_ms, bucket, zone)
    by = "accountId" if by == "account" else by
    value = await _with_events(
        gw, first_ms, last_ms, lambda events: series(events, starts, by, measure, top)
    )
    for row in value["keys"] if by == "accountId" else ():
        account = gw.store.accounts.get(row["key"])
        row["label"] = account.name if account else row["label"]
    now_ms, ends = time.time() * 1000, [*starts, last_ms][1:]
    for point, end in zip(value["points"], ends, strict=True):
        point["partial"] = point["t"] <= now_ms < end or (end == last_ms and now_ms - last_ms < 1e3)
    return _private_reply({"bucketMs": _STEPS[bucket] * 1000, "tz": str(zone), **value})


async def admin_get_usage_export(gw: Gateway, request: Request) -> Reply:
    first_ms, last_ms, zone = _stretch(request.query, 3650)
    rows = await _with_events(gw, first_ms, last_ms, lambda events: [*usage_table(events, zone)])
    text = io.StringIO()
    # A spreadsheet must not take a name for a formula.
    safe = (["'" + str(one) if str(one)[:1] in "=+-@" else one for one in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(safe)
    return _file_reply(text.getvalue().encode(), "text/csv; charset=utf-8", "azt-usage.csv")


_ROW_SEARCHED = ("id", "model", "client", "endpoint", "errorType")
_ROW_FILTERS = ("accountId", "client", "endpoint", "errorType", "model", "result", "status")


def _rows(gw: Gateway, query: Mapping[str, str]) -> Iterator[Json]:
    """The rows of the request log that a query asks for, newest first."""
    asked = {**query, "accountId": query.get("account")}
    wanted = {name: value for name in _ROW_FILTERS if (value := asked.get(name))}
    since, until = (_number_in(query, name, 0) for name in ("since", "until"))
    text, rows = query.get("q", "").casefold(), gw.requests.rows()
    if before := query.get("before"):
        rows = itertools.islice(itertools.dropwhile(lambda row: row["id"] != before, rows), 1, None)
    for row in rows:
        said = " ".join(str(row[name]) for name in _ROW_SEARCHED).casefold()
        fits = all(str(row[name]) == value for name, value in wanted.items())
        if fits and text in said and since <= row["at"] < (until or row["at"] + 1):
            yield row


_ROW_DETAIL = ("attemptList", "timing", "why", "request", "response", "keyId", "remote")


def _row_of(row: Json) -> Json:
    return {name: value for name, value in row.items() if name not in _ROW_DETAIL}


async def admin_get_requests(gw: Gateway, request: Request) -> Reply:
    query, most = request.query, min(_number_in(request.query, "limit", 50), 500)

    def page() -> Json:
        found = list(itertools.islice(_rows(gw, query), most + 1))
        items = list(map(_row_of, found[:most]))
        everything = list(gw.requests.rows())
        facets = {
            name: sorted({str(row[name]) for row in everything if row[name]})[:USAGE_KEYS_MAX]
            for name in ("model", "client", "errorType")
        }
        more = items[-1]["id"] if len(found) > most and items else None
        oldest = everything[-1]["at"] if everything else None
        kept = {"kept": len(everything), "oldestAt": oldest}
        return {"items": items, "next": more, **kept, "facets": facets}

    await gw.counted()
    return _private_reply(await in_thread(gw.short, page))


@_counted_view
def admin_get_request(gw: Gateway, request: Request) -> Json:
    wanted = request.params["id"]
    row = next((row for row in gw.requests.rows() if row["id"] == wanted), None)
    if row is None:
        text = f"There is no request {wanted[:60]!r} in the log: it keeps the newest ones."
        raise AztError(404, "request_not_found", text)
    return row


async def admin_get_requests_export(gw: Gateway, request: Request) -> Reply:
    await gw.counted()
    lines = [encode_json(row) + b"\n" for row in _rows(gw, request.query)]
    return _file_reply(b"".join(lines), "application/x-ndjson", "azt-requests.jsonl")


async def admin_delete_requests(gw: Gateway, request: Request) -> Reply:
    before_ms = _number_in(request.query, "before", 0)
    return _private_reply({"deleted": await gw.forget_requests(before_ms)})


async def get_metrics(gw: Gateway, request: Request) -> Reply:
    """Prometheus text. Counters are of this process; who may read it is row 13 of trust.md 2."""
    startup, now = (await gw.counted()).startup, time.time()
    total, accounts = startup.total, gw.store.accounts.values()
    left = {account.name: percent_left(account.quota, now) for account in accounts}
    kinds = ("input", "cachedInput", "output", "reasoning")
    results = {"ok": "successCount", "failed": "failureCount", "cancelled": "cancelledCount"}
    families: dict[str, dict[str, float]] = {  # name, type, label -> its value -> the sample
        "requests_total counter result": {word: total[name] for word, name in results.items()},
        "tokens_total counter kind": {kind: total[f"{kind}Tokens"] for kind in kinds},
        "errors_total counter type": {
            key: row["requestCount"] for key, row in startup.by["byError"].items()
        },
        "quota_left_percent gauge account": {name: n for name, n in left.items() if n >= 0},
        "running_requests gauge ": {"": len(gw.running())},
        "start_time_seconds gauge ": {"": gw.started_at},
    }
    for name, value in (await in_thread(gw.short, process_figures)).items():
        families[f"process_{name} gauge "] = {"": value}
    limits = [*(str(limit / 1000) for limit in _DURATIONS_MS), "+Inf"]
    counts = itertools.accumulate(total[f"firstTokenBuckets {key}"] for key in _BUCKET_KEYS)
    below = dict(zip(limits, counts, strict=True))
    families["first_token_seconds_bucket histogram le"] = cast(dict[str, float], below)
    families["first_token_seconds_count  "] = {"": below["+Inf"]}
    lines = []
    for family, samples in families.items():
        name, kind, label = family.split(" ")
        lines += [f"# TYPE azt_{name.removesuffix('_bucket')} {kind}"] if kind else []
        for key, sample in samples.items():
            safe = key.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f"azt_{name}" + (f'{{{label}="{safe}"}}' if label else "") + f" {sample}")
    body = "\n".join([*lines, ""]).encode()
    return _file_reply(body, "text/plain; version=0.0.4; charset=utf-8")


async def admin_get_codex(gw: Gateway, request: Request) -> Reply:
    kept = await gw.with_codex(gw.codex.kept)
    return _private_reply({**gw.codex_seen, **kept, "gatewayRunning": bool(gw.listening)})


async def admin_post_codex(gw: Gateway, request: Request) -> Reply:
    """Take-over, release, sign-in: first a dry run, then the same again with the `base` it told."""
    body, what = await read_object(gw, request), request.path.rpartition("/")[2]
    base, own_url = "", f"{gw.url}/codex/v1"
    if body.get("dryRun") is False and not (base := str(body.get("base") or "")):
        raise BadRequest("Send the `base` of the dry run.", "base", "bad_field")
    if what == "auth":
        account = gw.store.find(str(body.get("accountId") or ""))
        done = await gw.with_codex(gw.codex.apply, account, base)
    else:
        mode = body.get("historyMode", CODEX_MODES[0]) if what == "takeover" else ""
        if what == "takeover" and mode not in CODEX_MODES:
            raise BadRequest(f"It is one of {CODEX_MODES}.", "historyMode", "bad_field")
        if body.get("baseUrl") not in (None, own_url):
            raise BadRequest(f"It is null or {own_url}.", "baseUrl", "bad_field")
        if mode and own_url.endswith(":0/codex/v1"):
            message = "azt is not running and has no fixed port: start it with `azt start` first."
            raise AztError(409, "not_running", message)
        moves = body.get("moveHistory") is True
        done = await gw.with_codex(gw.codex.route, mode, own_url, moves, base)
        exempt = gw.settings.flag("apiKeys.loopbackExempt")
        done["keyNeeded"] = bool(mode and gw.keys and not exempt)
    if base:
        log.info("audit: %s was written (%s)", done["path"], what)
    return _private_reply(done | {"auth": gw.codex_seen["auth"]})


async def admin_post_backup(gw: Gateway, request: Request) -> Reply:
    deletes = request.method == "DELETE"
    body = {} if deletes else await read_object(gw, request)
    base = "" if body.get("dryRun") is True else str(body.get("base") or "any")
    done = await gw.with_codex(gw.codex.restore, request.params["id"], deletes, base)
    if base:
        log.info("audit: %s of the backup %s", request.method, done["id"])
    return _private_reply(done)


# -- the gateway itself: its way out, its version, its restart, what can be told of it


async def admin_post_network_test(gw: Gateway, request: Request) -> Reply:
    """Call the upstream's hosts, and no other, by the saved way out or by the one that is sent."""
    sent = (await read_object(gw, request)).get("networkProxy") or {}
    if not isinstance(sent, dict):
        raise BadRequest("Send the proxy's settings as an object.", "networkProxy", "bad_field")
    if sent and not request.is_own:
        raise _refusal("local_only")
    changes = {f"networkProxy.{key}": value for key, value in sent.items() if key != "hasPassword"}
    changes = {key: check_setting(key, value) for key, value in changes.items()}
    environment, settings = gw.environment, gw.settings
    settings = replace(settings, values={**settings.values, **changes})
    pool, steps = ConnectionPool(_egress(environment, settings)), list[Json]()
    bases = environment.auth_base_url, environment.chatgpt_base_url, environment.codex_base_url
    urls = {urllib.parse.urlsplit(base).netloc: base for base in bases}
    via = "proxy" if pool.egress.proxy_url else "direct"

    async def work(url: str) -> Json:
        steps.append(await try_route(pool, gw.calls, url))
        pool.close()
        return {"steps": steps, "via": via}

    job = gw.start_job("network_test", list(urls.values()), work, len(urls))
    return _private_reply({"job": _job_view(job)}, 202)


async def admin_post_version_check(gw: Gateway, request: Request) -> Reply:
    """Ask PyPI for the newest azt. Only a person does that: nothing else calls this."""
    await read_object(gw, request)
    call = Call("GET", VERSIONS_URL, OWN_HEADERS, head_timeout_s=CONNECT_TIMEOUT_S)
    answer = await open_answer(gw.pool, gw.calls, call)
    answer.close()
    latest = _as_object((parse_event(answer.body) or {}).get("info")).get("version")
    if answer.status != 200 or not isinstance(latest, str) or not latest[:1].isdecimal():
        text = f"pypi.org names no version of azt (status {answer.status}). Try again later."
        raise UpstreamError(502, "upstream_error", text)
    numbers = [[int(n) for n in re.findall(r"\d+", one)] for one in (latest, VERSION)]
    told = {"current": VERSION, "latest": latest[:40], "newer": numbers[0] > numbers[1]}
    return _private_reply(told | {"checkedAt": _ms(time.time())})


async def admin_post_restart(gw: Gateway, request: Request) -> Reply:
    """Let running requests end for `drainMs`, then begin anew, at the address set by now."""
    drain_ms = (await read_object(gw, request)).get("drainMs", 10_000)
    if type(drain_ms) is not int or not 0 <= drain_ms <= 600_000:
        raise BadRequest("It is a number of milliseconds, to 600000.", "drainMs", "bad_field")
    if gw.restart is None:
        text = "Only a gateway of `azt start` starts anew."
        raise AztError(501, "not_supported", text)
    now, host, port = gw.listening[0], gw.settings.text("server.host"), gw.settings["server.port"]
    if port not in (0, now[1]):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            text = f"azt could not listen on {_address(host, port)} then ({error.strerror})."
            raise AztError(422, "port_in_use", text) from None
    log.info("audit: a restart was asked for")
    gw.restart(drain_ms / 1000)
    return _private_reply({"from": _near(*now), "to": _near(host, port or now[1])}, 202)


# Who calls, as the table of decisions shows it. An address is as good as any of its kind.
_HERE, _PAGE = Caller("own", "127.0.0.1", marked=True), "http://localhost:3000"
_CALLERS = {
    "a program on this machine": _HERE,
    "the same with the admin token": replace(_HERE, proof=True),
    "azt's own page": replace(_HERE, origin="http://127.0.0.1", own_origin=True),
    "a page of localhost": replace(_HERE, origin=_PAGE, marked=False),
    "any other page": replace(_HERE, origin="https://a.example", marked=False),
    "another user of this machine": replace(_HERE, peer="neighbour"),
    "through a proxy here": replace(_HERE, peer="relayed"),
    "your network": replace(_HERE, peer="lan", host="192.168.1.2"),
    "your network, signed in": replace(_HERE, peer="lan", host="192.168.1.2", session="lan"),
    "your network, with a key": replace(_HERE, peer="lan", host="192.168.1.2", key="good"),
    "the internet": replace(_HERE, peer="public", host="192.168.1.2"),
    "the internet, with a key": replace(_HERE, peer="public", host="192.168.1.2", key="good"),
}


def _decisions(policy: Policy) -> Json:
    """caller -> class of routes -> null, or the code of the refusal: what `may` says right now."""
    methods = {route.access: route.method for route in sorted(ROUTES, key=lambda one: one.method)}
    found: Json = {}
    for name, caller in _CALLERS.items():
        faults = {
            access: may(caller, access, methods[access], policy) for access in sorted(methods)
        }
        found[name] = {
            access: fault and {"status": fault.status, "code": fault.code}
            for access, fault in faults.items()
        }
    return found


@blocking
def _findings(gw: Gateway) -> Iterator[tuple[str, str, str, str]]:
    """(what, how it is, what to do about it, how bad that is) of everything but the network."""
    from importlib.metadata import version  # only here: it takes 20 ms

    packages = ", ".join(f"{name} {version(name)}" for name in ("h11", "certifi", "truststore"))
    yield "version", f"azt {VERSION}, {_PYTHON}, {packages}", "", ""
    state, me = gw.paths.state, os.getuid()
    stats = [(one.name, one.lstat()) for one in (state, *state.rglob("*")) if one.exists()]
    loose = [name for name, one in stats if one.st_uid != me or one.st_mode & 0o077]
    advice = f"others can read {', '.join(loose[:5])}: chmod -R go= {state}" if loose else ""
    yield "state", f"{state}, {len(stats)} files", advice, "bad"
    for name in gw.damaged:
        yield "state", f"{name} was kept when its copy took over", "look at it, delete it", "warn"
    if why := gw.renewals.unsaved:
        yield "state", f"the accounts cannot be saved: {why}", "make room on the disk", "bad"
    host, port = gw.settings.text("server.host"), gw.settings.number("server.port")
    listens = ", ".join(_address(*one) for one in gw.listening)
    holder = "" if listens else port_holder(port)
    where = f"azt listens on {listens}" if listens else f"{_address(host, port)} is free"
    advice = "stop it, or set another server.port" if holder else ""
    yield "port", f"{port} is held by {holder}" if holder else where, advice, "warn"
    egress = gw.pool.egress
    yield "proxy", mask(egress.proxy_url) or "none: hosts are called directly", "", ""
    try:
        gw.pool.tls()
        yield "TLS", f"azt trusts {trust_store(egress.ca_file)}", "", ""
    except UpstreamError as error:
        yield "TLS", error.message, "correct AZT_CA_FILE", "bad"
    zstd = find_zstd()
    advice = "" if zstd else "use Python 3.14, or install backports.zstd"
    what = f"{zstd.__name__} looks into compressed bodies" if zstd else "no zstd: compressed bodies"
    yield "zstd", what + ("" if zstd else " are relayed only"), advice, "warn"
    codex = gw.codex_seen
    route = codex["takeover"]
    is_lost = route["on"] and not route["matchesGateway"]
    what = codex["problem"] or f"requests go to {route['baseUrl'] or route['provider']}"
    what = what if codex["installed"] else f"there is no {codex['home']}"
    advice = "run `azt codex takeover`, azt is elsewhere" if is_lost else ""
    yield "Codex", what, "mend the file" if codex["problem"] else advice, "warn"
    yield from _account_findings(gw)


def _account_findings(gw: Gateway) -> Iterator[tuple[str, str, str, str]]:
    now, able = time.time(), 0
    for one in gw.store.accounts.values():
        status, params = _account_status(gw, one, now)
        is_lost = status in ("auth_error", "login_rejected")
        able += not is_lost
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.expires_at))
        status = "ready" if status == "unknown" else status  # of its quota
        what = f"{one.id} is {' '.join((status, params.get('reason', '')))}".strip()
        advice = "run `azt login` with this account" if is_lost else ""
        yield "account", f"{what}, {one.plan}, its token lasts until {until}", advice, "warn"
    if not able:
        yield "accounts", "no account can serve", "run `azt login`", "bad"


async def _report(gw: Gateway) -> Json:
    found = await in_thread(gw.short, lambda: list(_findings(gw)))
    checks = [
        {"name": name, "level": level if advice else "ok", "text": text, "advice": advice or None}
        for name, text, advice, level in found
    ]
    return {"checks": checks, "decisions": _decisions(policy_source(gw)())}


async def admin_get_doctor(gw: Gateway, request: Request) -> Reply:
    return _private_reply(await _report(gw))


def _without_names(value: Any) -> Any:
    """JSON for strangers: no secret, and what names a person or a device becomes a hash."""
    if isinstance(value, list):
        return list(map(_without_names, value))
    if not isinstance(value, dict):
        return anonymous(value) if isinstance(value, str) else value
    names = ("account", "accountId", "email", "label", "remote")
    return {
        key: unnamed(one) if key in names and isinstance(one, str) else _without_names(one)
        for key, one in value.items()
    }


async def admin_get_diagnostics(gw: Gateway, request: Request) -> Reply:
    """A ZIP to hand on: how azt is and what it did lately, without a secret or a person's name."""
    await gw.counted()
    settings = parse_event(cast(bytes, (await admin_get_settings(gw, request)).body))
    parts: dict[str, list[Any]] = {
        "accounts.json": [[_account_view(gw, one) for one in gw.store.accounts.values()]],
        "doctor.json": [await _report(gw)],
        "jobs.json": [[_job_view(job) for job in gw.jobs.values()]],
        "requests.jsonl": [*itertools.islice(gw.requests.rows(), 200)],
        "settings.json": [settings],
    }

    @blocking
    def pack() -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in parts.items():
                lines = (json.dumps(_without_names(one), ensure_ascii=False) for one in values)
                archive.writestr(name, "".join(f"{line}\n" for line in lines))
        return packed.getvalue()

    log.info("audit: diagnostics were handed out")
    name = time.strftime("azt-diagnostics-%Y-%m-%d.zip")
    return _file_reply(await in_thread(gw.short, pack), "application/zip", name)


get_health = _view(lambda gw, request: {"ok": True})


# -- 16d. Pages ------------------------------------------------------------------------------------

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), "
    "clipboard-read=(), clipboard-write=(self)",
    "cache-control": "no-cache",
}


_NOT_HERE = Page(
    b'<!doctype html><html lang="en"><meta charset="utf-8"><title>azt</title><h1>azt</h1>'
    b"<p>The API answers here. This console answers on the machine that azt runs on: use "
    b"http://127.0.0.1 and the port there, or <code>azt open</code>. To use it from other devices, "
    b"run <code>azt settings set server.lanConsole true</code> there, then load this page again.",
    "text/html; charset=utf-8",
    '"azt-not-here"',
)
"""What other devices see until the console is on for them. No secret, no file."""


async def get_page(gw: Gateway, request: Request) -> Reply:
    is_off = not (request.is_own or gw.settings.flag("server.lanConsole"))
    page = _NOT_HERE if is_off else gw.pages.get(request.path)
    if page is None:
        raise AztError(404, "unknown_url", f"There is no page {request.path[:80]!r}.")
    headers = [*_PAGE_HEADERS.items(), ("etag", page.etag)]
    if request.headers.get("if-none-match") == page.etag:
        return Reply(304, b"", headers)
    return Reply(200, page.body, [("content-type", page.content_type), *headers])


# -- The table -------------------------------------------------------------------------------------

ADMIN = "/_gateway/admin"

ROUTES: list[Route] = sorted(
    [
        Route("DELETE", "/v1/responses/{id}", delete_response, "api"),
        Route("DELETE", f"{ADMIN}/codex/backups/{{id}}", admin_post_backup, "admin_proof"),
        Route("DELETE", f"{ADMIN}/keys/{{id}}", admin_delete_key, "admin_proof"),
        Route("DELETE", f"{ADMIN}/jobs/{{id}}", admin_job, "admin_write"),
        Route("DELETE", f"{ADMIN}/login/{{id}}", admin_login, "admin_write"),
        Route("GET", "/", get_page, "page"),
        Route("GET", "/_gateway/health", get_health, "health"),
        Route("GET", "/health", get_health, "health"),
        Route("GET", "/healthz", get_health, "health"),
        Route("GET", "/v1", get_health, "health"),
        Route("GET", "/v1/models", get_models, "api"),
        Route("GET", "/v1/models/{id}", get_model, "api"),
        Route("GET", "/v1/responses/{id}", get_response, "api"),
        Route("GET", "/v1/responses/{id}/input_items", get_response_input_items, "api"),
        Route("GET", "/metrics", get_metrics, "metrics"),
        Route("DELETE", f"{ADMIN}/requests", admin_delete_requests, "admin_write"),
        Route("GET", f"{ADMIN}/diagnostics", admin_get_diagnostics, "admin_proof"),
        Route("GET", f"{ADMIN}/doctor", admin_get_doctor, "admin_read"),
        Route("POST", f"{ADMIN}/gateway/restart", admin_post_restart, "admin_local"),
        Route("POST", f"{ADMIN}/network/test", admin_post_network_test, "admin_write"),
        Route("POST", f"{ADMIN}/version/check", admin_post_version_check, "admin_write"),
        Route("GET", f"{ADMIN}/events", admin_get_events, "admin_read"),
        Route("GET", f"{ADMIN}/requests", admin_get_requests, "admin_read"),
        Route("GET", f"{ADMIN}/requests/export", admin_get_requests_export, "admin_read"),
        Route("GET", f"{ADMIN}/requests/{{id}}", admin_get_request, "admin_read"),
        Route("DELETE", f"{ADMIN}/usage", admin_delete_usage, "admin_local"),
        Route("GET", f"{ADMIN}/usage", admin_get_usage, "admin_read"),
        Route("GET", f"{ADMIN}/usage/export", admin_get_usage_export, "admin_read"),
        Route("GET", f"{ADMIN}/usage/series", admin_get_usage_series, "admin_read"),
        Route("GET", f"{ADMIN}/accounts", admin_get_accounts, "admin_read"),
        Route("GET", f"{ADMIN}/accounts/{{id}}", admin_get_account, "admin_read"),
        Route("GET", f"{ADMIN}/jobs/{{id}}", admin_job, "admin_read"),
        Route("GET", f"{ADMIN}/accounts/import/template", get_template, "admin_read"),
        Route("GET", f"{ADMIN}/codex", admin_get_codex, "admin_read"),
        Route("GET", f"{ADMIN}/keys", admin_get_keys, "admin_read"),
        Route("GET", f"{ADMIN}/login/{{id}}", admin_login, "admin_read"),
        Route("GET", f"{ADMIN}/models", admin_get_models, "admin_read"),
        Route("DELETE", f"{ADMIN}/session", admin_delete_session, "admin_session"),
        Route("GET", f"{ADMIN}/session", admin_get_session, "admin_session"),
        Route("POST", f"{ADMIN}/session", admin_post_session, "admin_session"),
        Route("POST", f"{ADMIN}/session/pair", admin_post_pair, "admin_proof"),
        Route("POST", f"{ADMIN}/session/rotate-token", admin_post_rotate_token, "admin_proof"),
        Route("GET", f"{ADMIN}/sessions", admin_get_sessions, "admin_local"),
        Route("DELETE", f"{ADMIN}/sessions/{{id}}", admin_delete_session, "admin_local"),
        Route("GET", f"{ADMIN}/settings", admin_get_settings, "admin_read"),
        Route("GET", f"{ADMIN}/share", admin_get_share, "admin_read"),
        Route("GET", f"{ADMIN}/state", admin_get_state, "admin_read"),
        Route("PATCH", f"{ADMIN}/accounts/{{id}}", admin_patch_account, "admin_write"),
        Route("PATCH", f"{ADMIN}/settings", admin_patch_settings, "admin_write"),
        Route("POST", "/v1/chat/completions", post_chat_completions, "api"),
        Route("POST", "/v1/images/edits", functools.partial(_post_images, True), "api"),
        Route("POST", "/v1/images/generations", functools.partial(_post_images, False), "api"),
        Route("POST", "/v1/responses", post_responses, "api"),
        Route("POST", "/v1/responses/input_tokens", post_input_tokens, "api"),
        Route("POST", "/v1/responses/{id}/cancel", post_response_cancel, "api"),
        Route("POST", f"{ADMIN}/accounts/export", admin_post_export, "admin_proof"),
        Route(
            *("POST", f"{ADMIN}/accounts/import", admin_post_import, "admin_write"),
            body_max_bytes=32 * MIB,
            takes_form=True,
        ),
        Route("POST", f"{ADMIN}/accounts/logout", admin_post_logout, "admin_write"),
        Route("POST", f"{ADMIN}/accounts/refresh-quotas", admin_post_refresh_quotas, "admin_write"),
        Route("POST", f"{ADMIN}/accounts/remove", admin_post_remove, "admin_write"),
        Route("POST", f"{ADMIN}/accounts/restore", admin_post_restore, "admin_write"),
        Route("POST", f"{ADMIN}/accounts/{{id}}/activate", admin_post_activate, "admin_write"),
        Route(
            "POST",
            f"{ADMIN}/accounts/{{id}}/refresh-quota",
            admin_post_refresh_quota,
            "admin_write",
        ),
        Route("POST", f"{ADMIN}/codex/auth", admin_post_codex, "admin_proof"),
        Route("POST", f"{ADMIN}/codex/backups/{{id}}/restore", admin_post_backup, "admin_proof"),
        Route("POST", f"{ADMIN}/codex/release", admin_post_codex, "admin_proof"),
        Route("POST", f"{ADMIN}/codex/takeover", admin_post_codex, "admin_proof"),
        Route("POST", f"{ADMIN}/keys", admin_post_keys, "admin_proof"),
        Route("POST", f"{ADMIN}/login", admin_post_login, "admin_write"),
        Route("POST", f"{ADMIN}/login/{{id}}/callback", admin_login, "admin_write"),
        Route("POST", f"{ADMIN}/login/{{id}}/open", admin_login, "admin_write"),
        Route("POST", f"{ADMIN}/models/refresh", admin_post_refresh, "admin_write"),
        Route("POST", f"{ADMIN}/playground", admin_post_playground, "admin_write"),
        Route("POST", "/codex/v1/responses/compact", codex_call, "codex", 256 * MIB, True),
        *(
            Route(method, "/codex/v1/{rest}", codex_call, "codex", raw_body=True)
            for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        ),
        *(
            Route(method, path, _refused(why), "api")
            for path, why in _NOT_OFFERED.items()
            for method in ("DELETE", "GET", "POST")
        ),
    ],
    key=lambda route: (route.path, route.method),
)


CALLBACK_ROUTES = [Route("GET", "/auth/callback", get_login_callback, "page")]
"""All that the callback port answers (trust.md 1.8), while a sign-in needs it."""


def routes_of(gw: Gateway) -> list[Route]:
    """The table, and one route for each page that was found at the start."""
    pages = (name for name in sorted(gw.pages) if name != "/")
    admin = ((one, one.access.startswith("admin")) for one in ROUTES)
    routes = [
        replace(one, handler=_discreet(one.handler)) if is_admin else one for one, is_admin in admin
    ]
    return routes + [Route("GET", name, get_page, "asset") for name in pages]


def policy_source(gw: Gateway) -> Callable[[], Policy]:
    """The settings as values for the pure decision table of room 15; made anew after a change."""
    name = socket.gethostname().lower()
    known: tuple[tuple[object, ...], Policy] | None = None

    def current() -> Policy:
        nonlocal known
        settings, keys = gw.settings, gw.keys
        parts = (settings, keys, gw.sessions, gw.admin_token, gw.interfaces)
        if known is None or any(map(operator.is_not, known[0], parts)):
            policy = Policy(
                own_names=frozenset({name, f"{name}.local"}),
                allowed_hosts=settings.words("server.allowedHosts"),
                cors_origins=settings.words("server.corsOrigins"),
                lan_api=settings.flag("server.lanApi"),
                loopback_exempt=settings.flag("apiKeys.loopbackExempt"),
                # A network of a whole provider is nobody's own.
                own_networks=tuple(
                    own.network
                    for _, own in gw.interfaces
                    if own.network.prefixlen >= (16 if own.version == 4 else 48)
                ),
                keys={key["hash"]: key for key in keys},
                admin_token_hash=hashed(gw.admin_token),
                body_max_bytes=settings.number("limits.bodyMb") * MIB,
                lan_console=settings.flag("server.lanConsole"),
                token_on_loopback=settings.flag("server.tokenOnLoopback"),
                sessions={one["hash"]: one for one in gw.sessions},
            )
            known = parts, policy
        return known[1]

    return current


# ==================================================================================================
# 17. Demo upstream
#     A fake Codex backend on loopback for `azt start --demo`: no account, no network. It speaks the
#     real protocol; to the gateway it is only another base URL. Never contacts anything.
# ==================================================================================================

_DEMO_PACE_S, _DEMO_SLOW_PACE_S, _DEMO_TOKEN_S = 0.035, 0.5, 10 * 24 * 3600
_DEMO_REST_S = 90
"""Of `demo:limit`. Over a minute, so that SDKs report the limit at once and do not sleep it out."""

_DEMO_HELP = (
    "This is the demo backend of azt: no account, no network. Start a message with one of "
    "demo:tool, demo:reason, demo:image, demo:limit, demo:overload, demo:cut, demo:incomplete, "
    "demo:slow or demo:refuse to see how your program takes it."
)
# Account id -> e-mail, plan, percent used of both windows. The first serves, one is dead, and the
# last is who signs in at the demo.
_DEMO_ACCOUNTS = {
    "demo-account": ("demo@example.com", "plus", 12, 31),
    "demo-team": ("team@example.com", "team", 84, 55),
    "demo-night": ("night@example.com", "plus", 100, 64),
    "demo-old": ("old-laptop@example.com", "plus", 40, 72),
    "demo-guest": ("guest@example.com", "free", 45, 20),
    "demo-new": ("new@example.com", "pro", 1, 3),
}
_DEMO_CALLS, _DEMO_CLAIM = 80, "https://api.openai.com/auth"
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
        self._since, self._pace_s = int(time.time()), pace_s
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    def _windows(self, ident: str) -> Json:
        _, _, primary, secondary = _DEMO_ACCOUNTS[ident]
        ends = self._since + 9_000, self._since + 300_000
        return {
            "primary": {"used_percent": primary, "window_minutes": 300, "reset_at": ends[0]},
            "secondary": {"used_percent": secondary, "window_minutes": 10_080, "reset_at": ends[1]},
        }

    def headers(self, ident: str) -> dict[str, str]:
        """Sent with every answer, whichever the real backend sends them with."""
        headers = {"etag": _DEMO_ETAG, "x-models-etag": _DEMO_ETAG}
        headers["x-codex-plan-type"] = _DEMO_ACCOUNTS[ident][1]
        for window, state in self._windows(ident).items():
            for name, value in state.items():
                headers[f"x-codex-{window}-{name.replace('_', '-')}"] = str(value)
        return headers

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
            call, _, query = head.partition(" HTTP")[0].partition("?")
            form = dict(urllib.parse.parse_qsl(data.decode("latin-1") or query))
            claims = token_claims(headers.get("authorization", ""))
            ident = str(_as_object(claims.get(_DEMO_CLAIM)).get("chatgpt_account_id"))
            ident = ident if ident in _DEMO_ACCOUNTS else "demo-account"
            status, answer = self._answer(call, headers, parse_event(data) or form, ident)
            kind = "text/event-stream" if answer is None else "application/json"
            fields = self.headers(ident) | {"content-type": kind, "connection": "close"}
            if status == 302 and answer:
                fields["location"] = answer["location"]
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            writer.write(f"HTTP/1.1 {status} Demo\r\n{lines}\r\n".encode())
            if answer is None:
                await self._stream(parse_event(data) or {}, writer, ident)
            elif status != 304:
                writer.write(encode_json(answer))

    def _answer(self, call: str, headers: Json, body: Json, ident: str) -> tuple[int, Json | None]:
        """(status, JSON to send); None: the events of a turn instead."""
        if "/backend-api/" in call and "authorization" not in headers:
            return 401, {"detail": "Unauthorized"}
        windows = self._windows(ident)
        if call == "POST /backend-api/codex/responses":
            full = windows["primary"]["used_percent"] >= 100
            return _demo_refusal(body, windows["primary"]["reset_at"] if full else 0)
        if call == "GET /backend-api/codex/models":
            is_known = headers.get("if-none-match") == _DEMO_ETAG
            return 304 if is_known else 200, {"models": list(_DEMO_MODELS.values())}
        if call == "GET /backend-api/wham/usage":
            windows = {
                f"{name}_window": state | {"limit_window_seconds": state["window_minutes"] * 60}
                for name, state in windows.items()
            }
            return 200, {"plan_type": _DEMO_ACCOUNTS[ident][1], "rate_limit": windows}
        back = str(body.get("redirect_uri"))
        if call == "GET /oauth/authorize" and back.startswith("http://localhost:"):
            code = urllib.parse.urlencode({"code": "demo-new", "state": body.get("state", "")})
            return 302, {"location": f"{back}?{code}"}
        if call != "POST /oauth/token":
            return 404, {"detail": "Not Found"}
        _, mark, whose = str(body.get("refresh_token")).partition("rt_demo")
        ident = str(body.get("code") or whose.partition("-")[2] or "demo-account")
        if (mark or "code" in body) and ident in _DEMO_ACCOUNTS and ident != "demo-old":
            return 200, demo_account(time.time(), ident) | {"expires_in": _DEMO_TOKEN_S}
        return 401, {"error": {"code": "refresh_token_invalidated", "message": "Not a demo token."}}

    async def _stream(self, body: Json, writer: asyncio.StreamWriter, ident: str) -> None:
        """The events of one turn at the pace of a model, or as far as `demo:cut` lets them."""
        _said, word = _demo_said(body)
        limits = {"type": "codex.rate_limits", "rate_limits": self._windows(ident)}
        limits["plan_type"] = _DEMO_ACCOUNTS[ident][1]
        words = 0
        for number, event in enumerate((limits, *_demo_events(body, word))):
            writer.write(encode_event(event | {"sequence_number": number}))
            if event["type"].endswith(".delta"):
                words += 1
                if word == "cut" and words == 5:
                    return
                await writer.drain()
                await asyncio.sleep(_DEMO_SLOW_PACE_S if word == "slow" else self._pace_s)


def _demo_refusal(body: Json, empty_until: int) -> tuple[int, Json | None]:
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
    if _demo_said(body)[1] != "limit" and not empty_until:
        return 200, None
    error = {"type": "usage_limit_reached", "message": "The usage limit has been reached"}
    return 429, {"error": error | {"resets_at": empty_until or int(time.time()) + _DEMO_REST_S}}


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
    elif word == "image" or (body.get("tool_choice") or {}) == {"type": "image_generation"}:
        head = {"type": "image_generation_call", "revised_prompt": said, "output_format": "png"}
        items = [head | {"size": "64x64", "result": _DEMO_PNG}]
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
        preview = {"partial_image_index": 0, "partial_image_b64": grown}
        yield {"type": "response.image_generation_call.partial_image", **at, **preview}
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


def demo_account(now: float, ident: str = "demo-account") -> Json:
    """A demo account as `azt accounts import` takes it: unsigned, worthless elsewhere."""
    email_, plan, *_ = _DEMO_ACCOUNTS[ident]
    auth = {"chatgpt_account_id": ident, "chatgpt_plan_type": plan}
    claims = {"email": email_, _DEMO_CLAIM: auth, "exp": int(now) + _DEMO_TOKEN_S}
    parts = (encode_json({"alg": "none"}), encode_json(claims), b"unsigned")
    token = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    refresh_token = f"rt_demo{int(now)}-{ident}"
    return {"access_token": token, "refresh_token": refresh_token, "id_token": token}


def demo_store(demo: DemoUpstream, now: float) -> AccountStore:
    """The accounts that a demo begins with: ready, low, empty, rejected and free."""
    store = AccountStore()
    for ident in [*_DEMO_ACCOUNTS][:-1]:
        [account] = to_accounts([demo_account(now, ident)], now)
        learn_quota(account, quota_from_headers(demo.headers(ident), now))
        account.rejected = "refresh_token_invalidated" if ident == "demo-old" else ""
        store.add(account)
    return store


def demo_past(store: AccountStore, now: float) -> Batch:
    """Two days of calls that nobody made, as they would have been recorded."""
    dice, records = random.Random(5), []
    able = [one for one in store.accounts.values() if not one.rejected]
    routes = {"Codex": "/codex/v1/responses", "OpenAI/Python": "/v1/responses"}
    for number in range(_DEMO_CALLS, 0, -1):
        client, account = dice.choice([*routes, "Cline", "Open WebUI"]), dice.choice(able)
        route = routes.get(client, "/v1/chat/completions")
        name, at = f"req_demo{number:03}", now - 40 * number**1.9
        record = RequestRecord(name, "POST", route, 0.0, at, 0.0, 200, route, client, "127.0.0.1")
        record.account, record.account_id, record.plan = account.name, account.id, account.plan
        record.model = record.asked_model = dice.choice([*_DEMO_MODELS])
        record.attempts, record.streams = 1, True
        record.head_ms, record.ttft_ms = 240, dice.randint(400, 1500)
        record.total_ms = record.ttft_ms + dice.randint(300, 9000)
        one_try = {"accountId": account.id, "account": account.name, "status": 200}
        record.tries = [one_try | {"startedAt": int(at * 1000), "durationMs": record.total_ms}]
        read, written = dice.randint(200, 30_000), dice.randint(20, 1500)
        cached = {"cached_tokens": read * 2 // 3}
        record.usage = {"input_tokens": read, "input_tokens_details": cached}
        record.usage |= {"output_tokens": written, "total_tokens": read + written}
        record.result = "ok"
        if number % 13 == 0:
            record.result, record.status, record.usage = "failed", 429, None
            record.error_code = record.tries[0]["errorType"] = "usage_limit_reached"
        records.append(record)
    return Batch(records)


# ==================================================================================================
# 18. Command line
#     argparse, exit codes, and the only print. Every command but `start` speaks to a gateway over
#     HTTP: the running one, else a private one that lives, and holds the lock, as long as it does.
# ==================================================================================================

BROWSER_WAIT_S = 3.0
EXIT_OK, EXIT_FAILED, EXIT_UNUSABLE, EXIT_PORT_TAKEN = range(4)


def say(text: str, end: str = "\n", to_stderr: bool = False) -> None:
    """The only print. A reader that left (`azt models | head`) or a lost terminal ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr if to_stderr else sys.stdout, flush=True)


# Inside a terminal, which they would take over; the provider's page needs a real one.
_TEXT_BROWSERS = {"elinks", "links", "lynx", "w3m", "www-browser"}


@blocking
def _browse(url: str) -> bool:
    """Show a page in the person's browser, if there is one."""
    with contextlib.suppress(webbrowser.Error):  # there is none
        if getattr(webbrowser.get(), "name", "") not in _TEXT_BROWSERS:
            # In a thread: some commands last as long as their browser.
            thread = threading.Thread(target=webbrowser.open, args=(url,), daemon=True)
            thread.start()
            thread.join(BROWSER_WAIT_S)
            return True
    return False


# -- Serving ---------------------------------------------------------------------------------------


@blocking
def _port_holder(port: int) -> str:
    """Who keeps us from listening there; "" where nobody tells."""
    who, call = port_holder(port), f"http://127.0.0.1:{port}/_gateway/health"
    pool = ConnectionPool(Egress(own_hosts=frozenset({"127.0.0.1"})))
    with contextlib.suppress(UpstreamError):  # an azt hides its files, also from its own user
        got = open_response(pool, Call("GET", call, {}, head_timeout_s=1.0, once=True), Wire())
        if got.body == b'{"ok":true}' and " azt " not in who:
            return f"{who}, an azt".removeprefix(", ")
    return who


@contextlib.asynccontextmanager
async def _serving(gw: Gateway, host: str, port: int) -> AsyncIterator[tuple[HttpServer, str]]:
    """A loaded gateway that listens, and its address for this machine."""
    server = HttpServer(routes_of(gw), gw, policy_source(gw), gw.recorded)
    gw.running = server.calls
    sys.audit("azt.listen", host)
    try:
        gw.listening = await server.listen(host, port)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        code, why = "port_in_use" if is_taken else "cannot_listen", error.strerror
        if is_taken and (holder := await in_thread(gw.short, _port_holder, port)):
            why = f"{holder}, listens there"
        message = (
            f"azt cannot listen on {host}:{port} ({why}). Choose another `--host` "
            "or `--port` (`--port 0` picks a free port), or stop what is in the way."
        )
        raise AztError(500, code, message) from None
    try:
        yield server, gw.url
    finally:
        gw.listening = []
        await gw.renewals.settle()
        await gw.save_now()
        await gw.save_uses()
        await in_thread(gw.files, delete_file, gw.paths.open_page)
        with contextlib.suppress(AztError):
            await gw.flush(with_sums=bool(gw.ended or gw.usage.startup.total))
        gw.pool.close()


_Again = list[str] | None
"""Arguments to start anew with, beside those of now; None: this was the end."""


@blocking
def _acquire(lock: HomeLock) -> Json | None:
    """As `lock.acquire`; a command that is at work is waited for, as it takes a moment."""
    for _ in range(50):
        holder = lock.acquire()
        if holder is None or holder.get("url"):
            break
        time.sleep(0.1)
    return holder


async def _serve(gw: Gateway, lock: HomeLock, opens_browser: bool) -> _Again:
    """Listen until a signal; then finish what runs, for at most DRAIN_S or until the next one.

    The administration may ask for the same, and for a new start after it.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[tuple[float, bool]] = asyncio.Queue()  # how long to drain, if to return
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, (DRAIN_S, False))
    gw.restart = lambda drain_s: signals.put_nowait((drain_s, True))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal does not end the gateway
    settings = gw.settings
    where = settings.text("server.host"), settings.number("server.port")
    async with _serving(gw, *where) as (server, url):
        await in_thread(gw.files, lock.write, url)
        # What the start has made stays: looking through it again and again was felt in each answer.
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        log.info("base URL for clients: %s/v1", url)
        if gw.store.active is None:
            log.info("no account yet: `azt login` signs in")
        if gw.listening[0][0] not in ("127.0.0.1", "::1"):
            who = "open to this network" if settings.flag("server.lanApi") else "for this machine"
            key = "with a key" if gw.keys else "without a key (`azt keys add NAME` sets one)"
            console = "whoever signs in" if settings.flag("server.lanConsole") else "this machine"
            log.info("API: %s, %s. Administration: %s only.", who, key, console)
        say(f"azt is ready: {url}")  # last: who waits for it may read the log at once
        if opens_browser:
            await in_thread(gw.short, _browse, (await gw.open_page())[1].as_uri())
        watching = asyncio.create_task(gw.watch_quotas())
        drain_s, returns = await signals.get()
        watching.cancel()
        gw.restart = None
        # To a port of its own choice it would not return, and who watches would not find it.
        further = [] if gw.settings["server.port"] else ["--port", url.rpartition(":")[2]]
        gw.events.publish("gateway", _gateway_told(gw, "restarting" if returns else "draining"))
        gw.events.end("shutdown")  # no stream of events keeps the gateway waiting
        log.info("stopping: %d requests are still running", len(gw.running()))
        drain, again = (
            asyncio.ensure_future(server.drain(drain_s)),
            asyncio.create_task(signals.get()),
        )
        await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
        returns = returns and not again.done()
        for task in (drain, again):
            task.cancel()
        await server.drain(0.0)  # a second signal: what still runs is told, and counted
    for number in (signal.SIGINT, signal.SIGTERM):
        # It ends by itself now: a late signal must not turn exit 0 into a kill.
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL if returns else signal.SIG_IGN)
    return further if returns else None


async def _run(environment: Environment, flags: Json, opens_browser: bool) -> _Again:
    gw = Gateway(environment, flags)
    start_logging(gw.settings.text("log.level"))
    lock = HomeLock(gw.paths.lock)
    await in_thread(gw.files, prepare_home, gw.paths)
    holder = await in_thread(gw.files, _acquire, lock)
    if holder is not None:
        url = holder.get("url")  # None: of a command, say `azt login` that waits for its browser
        does = f"serves this home at {url}" if url else "is at work in this home"
        message = f"Another azt (pid {holder['pid']}) {does}. Use it, or stop it first."
        raise StateError(message)
    try:
        await in_thread(gw.files, gw.load)
        return await _serve(gw, lock, opens_browser)
    finally:
        lock.release()


async def _run_demo(environment: Environment, flags: Json, opens_browser: bool) -> _Again:
    """The gateway with the embedded upstream, in a throw-away home: touches no file of yours."""
    demo, files = DemoUpstream(), WorkerPool("file", 1)
    base = await demo.start()
    with tempfile.TemporaryDirectory(prefix="azt-demo-") as folder:
        environment = replace(
            environment,
            paths=Paths(Path(folder, "home"), Path(folder, "codex")),
            codex_base_url=f"{base}/backend-api/codex",
            chatgpt_base_url=f"{base}/backend-api",
            auth_base_url=base,
        )
        paths, store = environment.paths, demo_store(demo, time.time())
        past = demo_past(store, time.time())
        await in_thread(files, prepare_home, paths)
        await in_thread(files, write_json, paths.accounts, store.to_json())
        await in_thread(files, UsageStats().save, paths, past.lines, ())
        await in_thread(files, RequestLog(0).save, paths.requests, past.rows, past.rows)
        start_logging("info")
        log.info("a demo: gone at its end; commands need AI_ZERO_TOKEN_HOME=%s", folder + "/home")
        try:
            return await _run(environment, flags, opens_browser)
        finally:
            await demo.stop()


def _start(args: argparse.Namespace) -> int:
    flags: Json = {}
    for flag, key in (("host", "server.host"), ("port", "server.port"), ("log_level", "log.level")):
        if (value := getattr(args, flag)) is not None:
            flags[key] = check_setting(key, value, "--" + flag.replace("_", "-"))
    is_watched = sys.stdout is not None and sys.stdout.isatty()  # not a service, not a script
    opens_browser = args.command == "start" and not args.no_open and is_watched
    environment = read_environment()
    if args.audit:
        paths = environment.paths
        Audit(*([Path(tempfile.gettempdir())] if args.demo else [paths.home, paths.codex_home]))
    again = asyncio.run((_run_demo if args.demo else _run)(environment, flags, opens_browser))
    if again is not None:
        again += ["--no-open"] * opens_browser  # the page is open
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])
    return EXIT_OK


# -- Speaking to a gateway -------------------------------------------------------------------------


_Body = Json | list[Found] | None
"""JSON, or files (name, bytes) for a form."""


@dataclass(frozen=True, slots=True)
class _Link:
    """HTTP to a gateway of this home, with proof. Raises AztError in the gateway's words."""

    url: str
    admin_token: str = field(repr=False)

    @blocking
    def open(self, method: str, path: str, body: _Body = None) -> Answer:
        kind, raw = "application/json", b""
        if isinstance(body, list):
            mark = secrets.token_hex(16)
            kind = f"multipart/form-data; boundary={mark}"
            head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename='
            for name, content in body:
                raw += f"{head}{_json(mask(name))}\r\n\r\n".encode() + content + b"\r\n"
            raw += f"--{mark}--\r\n".encode()
        elif body is not None:
            raw = encode_json(body)
        headers = {
            "authorization": f"Bearer {self.admin_token}",
            "content-type": kind,
            "user-agent": f"azt-cli/{VERSION}",
            "x-azt-admin": "1",
        }
        host = urllib.parse.urlsplit(self.url).hostname or ""
        pool = ConnectionPool(Egress(own_hosts=frozenset({host})))
        try:
            answer = open_response(pool, Call(method, self.url + path, headers, raw), Wire())
        except UpstreamError:
            raise AztError(503, "silent", "azt is stopping, or stuck. Try again.") from None
        pool.close()
        if answer.status >= 400:
            raise _answered(answer.status, parse_event(answer.body) or {})
        return answer

    def admin(self, method: str, path: str, body: _Body = None) -> Json:
        """One call of the administration and its JSON answer."""
        return parse_event(self.open(method, ADMIN + path, body).body) or {}


@blocking
def _events(answer: Answer) -> Iterator[Json]:
    """The events of a streamed answer, as they arrive."""
    sock, framing = cast(socket.socket, answer.sock), answer.framing
    sock.settimeout(None)
    parser, data = SSEParser(), answer.rest
    while True:
        yield from filter(None, map(parse_event, parser.feed(framing.feed(data))))
        if framing.ended or not (data := sock.recv(READ_BYTES)):
            return answer.close()


def _answered(status: int, value: Json) -> AztError:
    error = value.get("error")
    inner = error if isinstance(error, dict) else {}
    message = str(inner.get("message") or f"The gateway answered {status}.")
    return AztError(status, inner.get("code"), message)


def _on_gateway(function: Callable[[_Link], T], must_run: bool = False) -> T:
    """Run `function` with the running gateway to call, else with a private one just for it."""
    environment = read_environment()
    prepare_home(environment.paths)
    lock = HomeLock(environment.paths.lock)
    holder = _acquire(lock)
    try:
        if holder is None:
            if must_run:
                raise AztError(503, "not_running", "azt is not running. Start it with `azt start`.")
            return asyncio.run(_privately(environment, function))
        if not holder.get("url"):
            raise StateError(f"Another azt (pid {holder['pid']}) is using this home. Try again.")
        admin_token = read_or_make_secret(environment.paths.admin_token)
        return function(_Link(str(holder["url"]), admin_token))
    finally:
        lock.release()


def _admin_call(method: str, path: str, body: _Body = None, must_run: bool = False) -> Json:
    return _on_gateway(lambda link: link.admin(method, path, body), must_run)


async def _privately(environment: Environment, function: Callable[[_Link], T]) -> T:
    """A gateway on a free loopback port for as long as `function` runs, in a thread."""
    gw = Gateway(environment, {})
    start_logging("warning")
    logging.disable(logging.INFO)  # whatever log.level says: this is the log of one command
    await in_thread(gw.files, gw.load)
    async with _serving(gw, "127.0.0.1", 0) as (server, url):
        gw.listening = []  # what it says of itself is about the next `azt start`
        try:
            return await in_thread(gw.short, function, _Link(url, gw.admin_token))
        finally:
            await server.drain(1.0)


# -- Commands --------------------------------------------------------------------------------------


def _show(args: argparse.Namespace, value: Any, lines: Iterable[str]) -> int:
    """The value as JSON with `--json`, else the lines for people."""
    for line in [_json(value, 2)] if args.json else lines:
        say(line)
    return EXIT_OK


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _table(*rows: Sequence[str]) -> list[str]:
    """Columns as wide as their widest cell; control characters never reach the terminal."""
    clean = [[mask(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in clean]


def _listing(
    empty: str, head: Sequence[str], cells: Callable[[Json], Sequence[str]]
) -> Callable[[Json], list[str]]:
    """The lines of a listing: one row for each of its items, or `empty` where there is none."""
    return lambda shown: _table(head, *map(cells, shown["items"])) if shown["items"] else [empty]


def _when(ms: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000)) if ms else "-"


_Run = Callable[[argparse.Namespace], int]


def _admin(
    method: str,
    path: str,
    lines: Callable[[Json], Iterable[str]],
    body: Callable[[argparse.Namespace], _Body] | None = None,
) -> _Run:
    """A command that is one admin call; {name} in `path` is an argument of the command line."""

    def run(args: argparse.Namespace) -> int:
        words = ((name, value) for name, value in vars(args).items() if isinstance(value, str))
        texts = {name: urllib.parse.quote(value, safe="") for name, value in words}
        sent = body(args) if body else None if method == "GET" else {}
        result = _admin_call(method, path.format(**texts), sent)
        return _show(args, result, lines(result))

    return run


def _status(args: argparse.Namespace) -> int:
    try:
        state = _admin_call("GET", "/state", must_run=True)
    except AztError as error:
        if error.code != "not_running":
            raise
        return _show(args, {"running": False}, [error.message]) or EXIT_FAILED
    gateway, models, today = state["gateway"], state["models"], state["today"]
    active = [one for one in state["accounts"] if one["active"]]
    serving = [f"{_called(one)} ({one['plan']}, {_state_cell(one)})" for one in active]
    rows = {
        "azt": f"{gateway['version']}, pid {gateway['pid']}, since {_when(gateway['startedAt'])}",
        "base URL": gateway["baseUrl"],
        "listens on": ", ".join(gateway["listen"]),
        "keys": str(gateway["keys"] or "none: the API asks for none"),
        "serving": "".join(serving) or "no account",
        "accounts": str(len(state["accounts"])),
        "model": f"{state['defaultModel']} ({models['count']} listed, from {models['source']})",
        "today": f"{today['requestCount']:,} requests, {today['totalTokens']:,} tokens",
        "state": gateway["stateDir"],
    }
    return _show(args, {"running": True, **state}, _table(*rows.items()))


def _open(args: argparse.Namespace) -> int:
    """The browser gets a file that leads there: no process sees the code among its arguments."""
    made = _admin_call("POST", "/session/pair", {"for": "open"}, must_run=True)
    page = made["url"].partition("#")[0]
    told = [f"{page} opens in your browser, signed in."]
    if args.json or not _browse(Path(made["file"]).as_uri()):
        told = [f"Open this page within a minute, it works once: {made['url']}"]
        port = urllib.parse.urlsplit(page).port
        told.append(f"On another computer, first: ssh -L {port}:127.0.0.1:{port} and this machine.")
    return _show(args, made, told)


def _draw(args: argparse.Namespace, prompt: str) -> int:
    """`azt ask --image`: make a picture and write it to a file, telling how far it is."""
    path = Path(os.path.expanduser(args.output or time.strftime("azt-%Y-%m-%d-%H%M%S.png")))
    if os.path.lexists(path) and not args.force:
        raise BadRequest(f"{path} exists. Name another file with `-o`, or add `--force`.")
    body: Json = {"prompt": prompt, "model": args.model, "stream": True, "partial_images": 2}
    body["output_format"] = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:] or "png")

    def draw(link: _Link) -> Json:
        say("Asked for the picture; it may take three minutes.", to_stderr=True)
        event: Json = {}
        for event in _events(link.open("POST", "/v1/images/generations", body)):
            if "error" in event:
                raise _answered(502, event)
            say(event["type"].rpartition(".")[2].replace("_", " "), to_stderr=True)
        return event

    write_bytes(path, base64.b64decode(_on_gateway(draw)["b64_json"]))
    return _show(args, {"file": str(path)}, [f"Written to {path}."])


def _ask(args: argparse.Namespace) -> int:
    piped = sys.stdin is not None and not sys.stdin.isatty()
    text = " ".join(args.text) or (sys.stdin.read() if piped else "")
    if not text.strip():
        raise BadRequest('Say what to ask: azt ask "What is a lock file?"', "text")
    if args.image:
        return _draw(args, text)
    body: Json = {"messages": [{"role": "user", "content": text}], "stream": True}
    if args.model:
        body["model"] = args.model
    parts: list[str] = []

    def converse(link: _Link) -> None:
        for chunk in _events(link.open("POST", "/v1/chat/completions", body)):
            if "error" in chunk:
                raise _answered(502, chunk)
            for choice in chunk.get("choices", []):
                parts.append(choice["delta"].get("content") or choice["delta"].get("refusal") or "")
                if not args.json:
                    say(parts[-1], end="")

    _on_gateway(converse)
    return _show(args, {"text": "".join(parts)}, [""])


def _sign_in(args: argparse.Namespace) -> int:
    tell = functools.partial(say, to_stderr=args.json)

    def run(link: _Link) -> Json:
        ask = link.admin
        flow = ask("POST", "/login", {"method": "device" if args.device else "browser"})
        path = f"/login/{flow['flowId']}"
        reads = not args.device and sys.stdin is not None and sys.stdin.isatty()
        try:
            if args.device:
                tell(f"Open {flow['verificationUrl']} and enter this code: {flow['userCode']}")
            else:
                flow = ask("POST", f"{path}/open", {})
                tell(f"Open this page to sign in:\n\n{flow['authorizeUrl']}\n")
            if reads:
                tell("If the browser cannot show the page after that, paste its address here.")
            elif flow.get("listenError"):
                text = f"Ports {CALLBACK_PORTS} are taken: use `azt login --device`, or a terminal."
                raise AztError(500, "port_in_use", text)
            if not (args.device or args.no_browser):
                _browse(flow["authorizeUrl"])
            while flow["status"] in ("waiting", "exchanging"):
                typed = select.select([sys.stdin] if reads else [], [], [], LOGIN_POLL_S)[0]
                line = sys.stdin.readline() if typed else " "
                reads = reads and line != ""  # the end of the terminal
                try:
                    if line.strip():
                        ask("POST", f"{path}/callback", {"url": line})
                    flow = ask("GET", path)
                except AztError as error:
                    if error.status not in (400, 410):  # what was pasted did not fit
                        raise
                    tell(mask(error.message))
            return flow
        finally:  # Ctrl-C: its port is free again at once
            with contextlib.suppress(AztError):
                ask("DELETE", path)

    flow = _on_gateway(run)
    if flow["status"] != "done":
        text = f"The sign-in is {flow['status']}. Start it again with `azt login`."
        error = flow.get("error", {"code": flow["status"], "message": text})
        raise AztError(500, error["code"], error["message"])
    account = flow["account"]
    told = [f"{_called(account)} is signed in ({account['plan']})."]
    if not account["active"]:
        told.append(f"`azt accounts use {account['id']}` serves the API with it.")
    return _show(args, flow, told)


def _called(account: Json) -> str:
    return str(account.get("label") or account.get("email") or account["id"])


def _signed_out(result: Json) -> list[str]:
    told = "" if result["revoked"] else " The provider did not hear it: end it in its settings too."
    return [f"{_called(result['account'])} is signed out.{told}"]


def _import(args: argparse.Namespace) -> int:
    files: list[Found] = []
    for name in args.file:
        path = 0 if name == "-" else Path(os.path.expanduser(name))
        try:
            files.append((os.path.basename(name), read_foreign(path, IMPORT_MAX_BYTES)))
        except OSError as error:
            message = f"{name} cannot be read ({error.strerror or error})."
            raise BadRequest(message, "file") from None
    query = "?dryRun=1" if args.dry_run else ""
    return _admin("POST", f"/accounts/import{query}", _import_lines, lambda _: files)(args)


def _export(args: argparse.Namespace) -> int:
    kind = "zip" if args.zip else "json"
    if args.all == bool(args.account) or (args.zip and args.output == "-"):
        raise BadRequest("Name the accounts, or give `--all`. A ZIP needs a file.")
    path = Path(os.path.expanduser(args.output or time.strftime(f"azt-accounts-%Y-%m-%d.{kind}")))
    if args.output != "-" and os.path.lexists(path) and not args.force:
        raise BadRequest(f"{path} exists. Name another file with `-o`, or add `--force`.")
    body = {"ids": args.account, "all": args.all, "format": kind}
    raw = _on_gateway(lambda link: link.open("POST", f"{ADMIN}/accounts/export", body).body)
    if args.output == "-":
        say(raw.decode(), end="")
        return EXIT_OK
    write_bytes(path, raw)
    told = f"Written to {path}, which only you can read. Whoever has it can use the accounts."
    return _show(args, {"file": str(path), "format": kind}, [told])


def _settings_get(args: argparse.Namespace) -> int:
    values, key = flattened(_admin_call("GET", "/settings")["values"]), args.key or ""
    if key in values:
        return _show(args, values[key], [_json(values[key])])
    found = {name: values[name] for name in sorted(values) if name.startswith(key and key + ".")}
    if not found:
        check_setting(key, None)
    return _show(args, found, [f"{name} = {_json(value)}" for name, value in found.items()])


def _settings_set(args: argparse.Namespace) -> int:
    key, value = args.key, parse_setting(args.key, args.value)
    told = [f"{key} = {_json(value)}", f"{key} takes effect at the next start."]

    def lines(result: Json) -> list[str]:
        return told if key in result["restartNeeded"] else told[:1]

    code = _admin("PATCH", "/settings", lines, lambda _: {"values": {key: value}})(args)
    if (key, value, code) == (_WEB_PICTURES, True, EXIT_OK):
        say(
            "Pictures of free accounts are now made through the ChatGPT web site under the "
            "person's own account, which is experimental and may end in browser_check_required.",
            to_stderr=True,
        )
    return code


def _key_terms(args: argparse.Namespace) -> Json:
    terms: Json = {"name": args.name, "limit": args.per_day, "expiresAt": None}
    terms["models"] = list(filter(None, (args.models or "").split(","))) or None
    with contextlib.suppress(ValueError, OverflowError):
        if args.expires:
            text, day_s = args.expires, 86400
            day = time.time() + int(text) * day_s if text.isdecimal() else 0.0
            terms["expiresAt"] = int((day or datetime.fromisoformat(text).timestamp()) * 1000)
    if args.expires and not terms["expiresAt"]:
        raise BadRequest("`--expires` is a number of days, or a day such as 2030-12-31.", "expires")
    return terms


def _new_key_lines(result: Json) -> list[str]:
    told = [result["key"], "Shown only this once. Clients send it as their API key."]
    if result["first"]:
        told.append("From now on every call needs a key, also on this machine.")
        told.append("`azt settings set apiKeys.loopbackExempt true` exempts this machine.")
    return told


def _state_cell(account: Json) -> str:
    params, status = account.get("statusParams") or {}, str(account["status"])
    until = f" until {_when(params['until'])}" if "until" in params else ""
    return f"sign in again ({params['reason']})" if status == "login_rejected" else status + until


def _left_cell(account: Json) -> str:
    """What is left in each window and when it resets: `5 h 62% (14:20), 7 d 21% (Sun 9:15)`."""
    cells = []
    for window in (account["quota"] or {}).get("windows", ()):
        minutes, at = window["minutes"], window["resetsAt"]
        length = f"{minutes // 1440} d" if minutes >= 1440 else f"{minutes // 60} h"
        back = time.strftime(" (%a %H:%M)", time.localtime(at / 1000)) if at else ""
        cells.append(f"{length} {window['remainingPercent']}%{back}")
    return ", ".join(cells) or "-"


def _codex_lines(state: Json) -> list[str]:
    route, auth, moved = state["takeover"], state["auth"], state["history"]["toMigrate"]
    to, since = route["baseUrl"], _when(route["since"])
    here = route["on"] and route["matchesGateway"]
    facts = {
        f"cannot be told: {state['problem']}": state["problem"],
        f"no {state['home']} yet: start Codex once, or set CODEX_HOME": not state["installed"],
        f"go to {route['provider']}; `azt codex takeover` sends them through azt": not to,
        f"go to {to}, azt is at {route['gatewayUrl']}: run `azt codex takeover`": not here,
        f"go through azt (list {route['historyMode']}, since {since})": True,
    }
    held = auth["email"] or auth["accountId"] or auth["mode"] or "nobody"
    rows = [
        ("requests", next(text for text, is_so in facts.items() if is_so)),
        ("sign-in", held + (", kept fresh by azt" if auth["applied"] else "")),
    ]
    further = {
        ("", "azt is not running: start it with `azt start`"): here and not state["gatewayRunning"],
        ("", "config.toml was edited since; a release keeps the edits"): route["editedSince"],
        ("history", f"{moved} conversations are listed under ai-zero-token only"): moved,
        **{("backup", f"{one['id']} {one['email'] or ''}"): True for one in state["backups"]},
    }
    return _table(*rows, *(row for row, is_so in further.items() if is_so))


def _codex_change(path: str) -> _Run:
    """A command that shows what would change in a file of Codex, and then changes it."""
    names = {"account": "accountId", "mode": "historyMode", "move_history": "moveHistory"}

    def run(args: argparse.Namespace) -> int:
        asked = {names[name]: value for name, value in vars(args).items() if name in names}
        plan = _admin_call("POST", path, asked | {"dryRun": True})
        moves = asked.get("moveHistory") and plan["history"]["toMigrate"]
        emails = [f"{way} {(plan.get(way) or {}).get('email') or '-'}" for way in ("from", "to")]
        diff = [f"{one['op']} {one['text']}" for one in plan.get("diff", ())]
        lines = [plan["path"], *(diff if "diff" in plan else emails)]
        lines += [f"{moves} conversations move to openai."] if moves else []
        if not plan.get("installed", True):
            lines.append(
                "No Codex has been here yet: start it once, or set CODEX_HOME to its home."
            )
        if plan.get("keyNeeded"):
            lines.append("azt asks for a key, Codex sends none. To let this machine in without:")
            lines.append("    azt settings set apiKeys.loopbackExempt true")
        if args.dry_run or not (plan["changed"] or moves):
            told = "Nothing was written." if plan["changed"] or moves else "Nothing to change."
            return _show(args, plan, [*lines, told])
        if "keyNeeded" in plan and not getattr(args, "yes", True):
            if args.json or sys.stdin is None or not sys.stdin.isatty():
                raise BadRequest("Nobody to ask: add --yes to write, or --dry-run to look.")
            say("\n".join([*lines, "Write this? [y/N] "]), end="")
            lines = []
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                return _show(args, plan, ["Nothing was written."])
        done = _admin_call("POST", path, asked | {"dryRun": False, "base": plan["base"]})
        lines.append("Written. Codex reads its files when it starts: restart it.")
        return _show(args, done, lines)

    return run


_account_lines = _listing(
    "No account yet: `azt login` signs in.",
    ("", "ID", "ACCOUNT", "PLAN", "STATE", "LEFT (RESETS)"),
    lambda one: (
        *("*" if one["active"] else "", one["id"], _called(one), one["plan"]),
        *(_state_cell(one), _left_cell(one)),
    ),
)

_import_lines = _listing(
    "Nothing was imported.",
    ("RESULT", "ID", "ACCOUNT", "PLAN", ""),
    lambda one: (
        *(one["result"], one.get("id", ""), one.get("email") or one["file"] or ""),
        *(one.get("plan", ""), one.get("message", "")),
    ),
)
_PERIODS = {"today": 1, "7 days": 7, "lifetime": 0}


def _usage(args: argparse.Namespace) -> int:
    """The sums of three periods; with --by the rows of one dimension beside each other."""
    now, shown = time.time() * 1000, {}

    def fetch(link: _Link) -> None:
        for period, days in _PERIODS.items():
            query = f"?from={_day(int(now - (days - 1) * 86_400_000))}" if days else ""
            shown[period] = link.admin("GET", f"/usage{query}")

    _on_gateway(fetch)
    if args.by:
        name = {"client": "bySource"}.get(args.by, f"by{args.by.title()}")
        value: Any = {period: view[name] for period, view in shown.items()}
        sums = [{(row["key"], row["label"]): row["aggregate"] for row in v} for v in value.values()]
        rows = [["", *(f"{one} {word}".upper() for one in shown for word in ("req", "tokens"))]]
        for key in dict.fromkeys(itertools.chain(*sums)):
            members = ("requestCount", "totalTokens")
            counts = (one.get(key, {}).get(member, 0) for one in sums for member in members)
            rows.append([key[1], *(f"{count:,}" for count in counts)])
    else:
        value = {period: view["range"] for period, view in shown.items()}
        rows = [["", *(period.upper() for period in value)]]
        for text, member in _USAGE_ROWS.items():
            rows.append([text, *(f"{one[member]:,}" for one in value.values())])
    return _show(args, value, _table(*rows))


_USAGE_ROWS = {
    "requests": "requestCount",
    "failed": "failureCount",
    "cancelled": "cancelledCount",
    "input tokens": "inputTokens",
    "of them cached": "cachedInputTokens",
    "output tokens": "outputTokens",
    "of them reasoning": "reasoningTokens",
    "all tokens": "totalTokens",
    "no usage reported": "unknownTokenCount",
    "images": "imageCount",
}


def _log_line(row: Json) -> str:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(row["at"] / 1000))
    tokens = f"{row['tokens']['total']} tokens" if row["tokens"] else "-"
    end = row["result"] if row["result"] == "ok" else f"{row['result']}: {row['errorType']}"
    who = f"{row['client']} -> {row['account'] or '-'}"
    spent = f"{row['durationMs']} ms, {tokens}"
    return f"{when} {row['status']} {row['endpoint']} {row['model']} {who} {spent}, {end}"


def _log(args: argparse.Namespace) -> int:
    def follow(link: _Link) -> None:
        rows: Iterable[Json] = link.admin("GET", "/requests?limit=50")["items"][::-1]
        if not rows and not args.json:
            say("No requests yet." + " Each will be shown when it ends." * args.follow)
        if args.follow:
            live = _events(link.open("GET", f"{ADMIN}/events"))
            rows = itertools.chain(rows, (event for event in live if "durationMs" in event))
        for row in rows:
            say(json.dumps(row) if args.json else _log_line(row))

    _on_gateway(follow, must_run=args.follow)
    return EXIT_OK


def _doctor(args: argparse.Namespace) -> int:
    paths = read_environment().paths
    if args.audit:
        Audit(paths.home, paths.codex_home)

    def look(link: _Link) -> Json:
        job = link.admin("POST", "/network/test", {})["job"]
        while job["state"] == "running":
            time.sleep(0.1)
            job = link.admin("GET", f"/jobs/{job['id']}")
        return link.admin("GET", "/doctor") | {"network": job["result"]}

    try:
        found = _on_gateway(look)
    except AztError as error:
        broken = {"name": "azt", "level": "bad", "text": error.message, "advice": None}
        found = {"checks": [broken], "decisions": {}, "network": {"steps": [], "via": None}}
    checks = found["checks"]
    for step in found["network"]["steps"]:
        spent = ", ".join(f"{one} {step[one]} ms" for one in _STAGES if one in step)
        text = f"{step['target']} answers {step.get('status')} ({spent})"
        level, clock_s = "ok" if step["ok"] else "bad", abs(step.get("clockMs", 0)) // 1000
        checks.append({"name": "network", "level": level, "text": step.get("message", text)})
        if clock_s > 60:
            text = f"it differs by {clock_s} s from the one of {step['target']}: set it"
            checks.append({"name": "clock", "level": "warn", "text": text})
    rows = []
    for one in checks:
        rows.append((one["level"], one["name"], one["text"]))
        rows += [("", "", f"-> {one['advice']}")] if one.get("advice") else []
    classes = list(next(iter(found["decisions"].values()), {}))
    cells = [
        (name, *("yes" if not told[one] else str(told[one]["status"]) for one in classes))
        for name, told in found["decisions"].items()
    ]
    lines = [*_table(*rows), "", *_table(("WHO MAY CALL", *classes), *cells)]
    _show(args, *map(_without_names, (found, lines)) if args.report else (found, lines))
    return EXIT_FAILED if any(one["level"] == "bad" for one in checks) else EXIT_OK


_key_lines = _listing(
    "No keys: the API asks for none. `azt keys add NAME` adds one.",
    ("ID", "NAME", "KEY", "MADE", "LAST USED", "REQUESTS", "A DAY", "ENDS", "MODELS"),
    lambda one: (
        *(one["id"], one["name"], one["prefix"] + "…", _when(one["createdAt"])),
        *(_when(one["lastUsedAt"]), str(one["requests"] or 0), str(one["limit"] or "-")),
        *(_when(one["expiresAt"]), " ".join(one["models"] or ["all"])),
    ),
)
_model_lines = _listing(
    "No models. `azt models --refresh` asks for them.",
    ("MODEL", "", "REASONING EFFORTS"),
    lambda one: (one["id"], "default" if one["default"] else "", " ".join(one["efforts"])),
)


def _row(account: Json) -> list[str]:
    return _account_lines({"items": [account]})


def _followed(link: _Link, path: str, body: Json, is_quiet: bool) -> Json:
    """A job from its start to its end, with its progress unless quiet."""
    job = cast(Json, link.admin("POST", path, body)["job"])
    while job["state"] == "running":
        time.sleep(0.1)
        job = link.admin("GET", f"/jobs/{job['id']}")
        if job["total"] and not is_quiet:
            end = "" if job["state"] == "running" else "\n"
            say(f"\r{job['done']} of {job['total']}", end=end, to_stderr=True)
    return job


def _refresh_quotas(args: argparse.Namespace) -> int:
    def work(link: _Link) -> tuple[Json, Json]:
        path, body = "/accounts/refresh-quotas", {"ids": args.account or None}
        return _followed(link, path, body, args.json), link.admin("GET", "/accounts")

    job, accounts = _on_gateway(work)
    missed = [f"{one['id']}: {one['message']}" for one in job["failures"]]
    _show(args, {**accounts, "job": job}, [*_account_lines(accounts), *missed])
    return EXIT_FAILED if missed else EXIT_OK


def _models(args: argparse.Namespace) -> int:
    def refresh(link: _Link) -> Json:
        job = _followed(link, "/models/refresh", {}, is_quiet=True)
        for one in job["failures"]:
            raise AztError(502, one["code"], one["message"])
        return {**link.admin("GET", "/models"), **job["result"]}

    if not args.refresh:
        return _admin("GET", "/models", _model_lines)(args)
    shown = _on_gateway(refresh)
    return _show(args, shown, _model_lines(shown))


_use = _admin(
    "POST",
    "/accounts/{account}/activate",
    lambda it: [f"{_called(it['account'])} serves the API."],
    lambda _: {"force": True},
)
_label = _admin("PATCH", "/accounts/{account}", _row, lambda args: {"label": args.label})
_logout = _admin("POST", "/accounts/logout", _signed_out, lambda args: {"id": args.account})
_remove = _admin(
    "POST",
    "/accounts/remove",
    lambda done: [f"Removed: {done['removed']}."],
    lambda args: {"ids": args.account},
)
_leave_out = _admin("PATCH", "/accounts/{account}", _row, lambda _: {"excluded": True})
_include = _admin("PATCH", "/accounts/{account}", _row, lambda _: {"excluded": False})
_codex = _admin("GET", "/codex", _codex_lines)
_restore = _admin("POST", "/codex/backups/{backup}/restore", lambda done: [f"Back: {done['id']}"])
_add_key = _admin("POST", "/keys", _new_key_lines, _key_terms)
_revoke_key = _admin("DELETE", "/keys/{name}", lambda _: ["Revoked. With no key the API is open."])

# Every argument of every command: a switch (`-`) or a word by what it is for, the rest in
# argparse's terms. A word's last sign tells how many: `*` any number, `...` one or more, `?` one
# or none.
_ARGUMENTS: dict[str, str | Json] = {
    "--all": "all accounts",
    "--audit": "print each connection and each file written; refuse hosts outside the table",
    "--by": {"choices": ("model", "account", "client", "endpoint"), "help": "split the sums"},
    "--demo": "play the upstream too: no account, no network",
    "--device": "sign in with a code, on any device",
    "--dry-run": "only show what would change",
    "--force": "replace a file that exists",
    "--host": {"help": "address to listen on (default 0.0.0.0)"},
    "--json": "print JSON instead of text",
    "--log-level": {
        "choices": ("debug", "info", "warning", "error"),
        "help": "how much to log (default info)",
    },
    "--image": "make a picture of it, in the file of -o",
    "--mode": {
        "choices": CODEX_MODES,
        "default": CODEX_MODES[0],
        "help": "openai keeps Codex's list of conversations, ai-zero-token begins one of its own",
    },
    "--model": {"help": "the model to ask (default: the setting defaultModel)"},
    "--models": {"metavar": "A,B", "help": "the only models that this key is for"},
    "--per-day": {"type": int, "metavar": "N", "help": "at most so many requests a day"},
    "--expires": {"metavar": "DAYS", "help": "in so many days, or a day such as 2030-12-31"},
    "--move-history": "list what was said under ai-zero-token under openai again (copied first)",
    "--no-browser": "print the link, open no browser",
    "--no-open": "do not open azt's page in a browser",
    "--port": {"type": int, "help": "port to listen on (default 8787; 0 picks a free one)"},
    "--report": "leave out what names you, to paste it somewhere",
    "--refresh": "ask the upstream for the current list",
    "--yes": "write without asking",
    "--zip": "a ZIP with one file for each account",
    "-f": {"dest": "follow", "action": "store_true", "help": "go on with each that ends"},
    "-o": {"dest": "output", "metavar": "FILE", "help": "where to; - is standard output"},
    "ACCOUNT": "label, e-mail or the beginning of an id",
    "ACCOUNT*": "label, e-mail or the beginning of an id; none: all",
    "ACCOUNT...": "label, e-mail or the beginning of an id",
    "BACKUP?": {
        "default": "auth.json",
        "help": "as `azt codex status` lists it (default: the newest of auth.json)",
    },
    "FILE...": "JSON such as Codex's auth.json, or a ZIP of such; - is input",
    "KEY": "a setting such as defaultModel",
    "KEY?": "a setting such as defaultModel, or a group such as server",
    "LABEL": "a short name; empty quotes take it away",
    "NAME": "what the key is for; `revoke` takes its id too",
    "TEXT*": "the question; read from standard input when left out",
    "VALUE": "a JSON value; bare words need no quotes",
}

# Command, its arguments | what it is for. All but `start` and `serve` also take --json.
_COMMANDS: dict[str, _Run] = {
    "start --host --port --demo --audit --log-level --no-open | start the gateway": _start,
    "serve --host --port --demo --audit --log-level | start the gateway without a browser": _start,
    "login --device --no-browser | sign in with an account": _sign_in,
    "logout ACCOUNT | end the sign-in of an account and forget it": _logout,
    "open | open azt's page in your browser, signed in": _open,
    "status | show what runs and which account serves": _status,
    "ask TEXT* --model --image -o --force | ask a model, or for a picture": _ask,
    "usage --by | show what was used: today, in 7 days, ever": _usage,
    "log -f | show the newest requests": _log,
    "models --refresh | list the models": _models,
    "accounts list | list the accounts": _admin("GET", "/accounts", _account_lines),
    "accounts import FILE... --dry-run | add accounts from files": _import,
    "accounts export ACCOUNT* --all -o --zip --force | write accounts to a file": _export,
    "accounts label ACCOUNT LABEL | give an account a name of your own": _label,
    "accounts use ACCOUNT | serve the API with this account": _use,
    "accounts exclude ACCOUNT | never switch to this account": _leave_out,
    "accounts include ACCOUNT | switch to this account again": _include,
    "accounts refresh ACCOUNT* | ask what is left of the quota": _refresh_quotas,
    "accounts remove ACCOUNT... | forget accounts": _remove,
    "codex status | tell where Codex sends its requests, and who is signed in there": _codex,
    "codex takeover --mode --move-history --dry-run --yes | send Codex's requests through azt": (
        _codex_change("/codex/takeover")
    ),
    "codex release --move-history --dry-run | put back what Codex's config.toml said before": (
        _codex_change("/codex/release")
    ),
    "codex apply ACCOUNT --dry-run | sign Codex in with this account": _codex_change("/codex/auth"),
    "codex restore BACKUP? | put a file of Codex back as it was": _restore,
    "doctor --report --audit | check everything, and show who may call what": _doctor,
    "settings get KEY? | show one setting, a group, or all": _settings_get,
    "settings set KEY VALUE | change one setting": _settings_set,
    "keys list | list the keys of clients": _admin("GET", "/keys", _key_lines),
    "keys add NAME --models --per-day --expires | make a key for a client; it is shown once": (
        _add_key
    ),
    "keys revoke NAME | make a key useless": _revoke_key,
}
_GROUPS = {
    "accounts": "show, add, choose and remove accounts",
    "codex": "send Codex through azt, sign it in, and undo both",
    "keys": "show, make and revoke the keys that clients use",
    "settings": "show and change the settings",
}


def _parser() -> argparse.ArgumentParser:
    about = "Your own ChatGPT/Codex sign-in as an OpenAI-compatible API on your machine."
    parser = argparse.ArgumentParser(prog="azt", description=about)
    parser.add_argument("--version", action="version", version=f"azt {VERSION}")
    top = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    groups: dict[str, Any] = {}
    for line, run in _COMMANDS.items():
        usage, purpose = line.split(" | ")
        name, *words = usage.split() if run is _start else [*usage.split(), "--json"]
        place: Any = top
        if name in _GROUPS:
            if name not in groups:
                group = top.add_parser(name, help=_GROUPS[name], description=_GROUPS[name])
                groups[name] = group.add_subparsers(required=True, metavar="ACTION")
            place, name, *words = groups[name], *words
        command = place.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(run=run)
        for word in words:
            argument, plain = _ARGUMENTS[word], word.rstrip(".?*")
            terms: Json = {"help": argument} if isinstance(argument, str) else {**argument}
            if plain != word:
                terms["nargs"] = word[-1].replace(".", "+")
            if not word.startswith("-"):
                terms["metavar"] = plain
            elif isinstance(argument, str):
                terms["action"] = "store_true"
            command.add_argument(plain.lower(), **terms)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `azt`. Exit codes: 0 fine, 1 failed, 2 wrong use or bad state, 3 port taken."""
    hide_memory()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not None, as a closed one is
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        for package in ("certifi", "truststore"):  # h11 was imported at the top
            if importlib.util.find_spec(package) is None:
                raise StateError(
                    f"The package {package} is missing: {sys.executable} -m pip install {package}"
                )
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
