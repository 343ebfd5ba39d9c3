"""The command `azt` as people run it: processes, output, exit codes, signals and files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import (
    FakeUpstream,
    Json,
    account_file,
    codex_models_cache,
    failed,
    message,
    text,
)
from harness import READY, ROOT, Client, Gateway, Stream, chat_body, eventually

import azt

NewGateway = Callable[..., Gateway]

FIRST_DELTA = 5
"""How many events of `text(...)` come up to and with the first delta."""
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) \S.*")


# -- Set-up ---------------------------------------------------------------------------------------


@pytest.fixture
def new(upstream: FakeUpstream) -> Iterator[NewGateway]:
    """Makes gateways that are not started yet; those that were end with the test."""
    made: list[Gateway] = []

    def make(home: Path, variables: dict[str, str] | None = None, *more: str) -> Gateway:
        where = [*more, "--host", "127.0.0.1", "--port", "0"]
        made.append(Gateway(home, variables or upstream.environment(), where))
        return made[-1]

    yield make
    for gateway in made:
        if gateway.url:
            gateway.stop()
            assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def idle(home: Path, new: NewGateway) -> Gateway:
    """A home in which nothing runs."""
    return new(home)


@pytest.fixture(params=["with a server", "without a server"])
def place(request: pytest.FixtureRequest, idle: Gateway) -> Gateway:
    """Commands give the same answers whether or not a server runs."""
    return idle.start() if request.param == "with a server" else idle


def has_account(gateway: Gateway) -> Gateway:
    if gateway.url:
        gateway.import_account(account_file())
        return gateway
    store, paths = azt.AccountStore(), azt.Paths(gateway.state.parent, gateway.home / ".codex")
    store.add(azt.to_accounts([account_file()], time.time())[0])
    azt.prepare_home(paths)
    azt.write_json(paths.accounts, store.to_json())
    return gateway


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence on stderr of a command that ended with `code`."""
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert re.fullmatch(r"azt: .+\n", done.stderr), done.stderr
    return done.stderr


def ended(gateway: Gateway) -> tuple[int, bytes]:
    """SIGTERM -> exit code, and what stdout held after the ready line."""
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.stdout is not None
    rest = gateway.process.stdout.read()
    return gateway.process.wait(20), rest


def wait_for(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """For what only another process can tell, by a file: there is nothing to wait on."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, "not in time"
        time.sleep(0.01)
    return value


def lock_url(gateway: Gateway) -> str:
    """The address in the lock file; empty until the server listens."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return str(json.loads((gateway.state / "lock").read_text())["url"] or "")
    return ""


def is_refused(gateway: Gateway) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        host, _, port = gateway.url.removeprefix("http://").rpartition(":")
        socket.create_connection((host, int(port)), 5).close()
        return False
    return True


# -- Help and usage -------------------------------------------------------------------------------


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        azt.main(["--help"])

    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for word in ("start", "serve", "status", "ask", "models", "accounts", "settings", "keys"):
        assert re.search(rf"^ +{word}\b", printed, re.MULTILINE), word


def test_version_is_that_of_the_module(idle: Gateway) -> None:
    assert good(idle.azt("--version")) == f"azt {azt.VERSION}\n"
    assert not (idle.home / ".ai-zero-token").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["accounts"], ["keys", "add"], ["start", "--port", "many"], ["ask", "--no"]],
    ids=str,
)
def test_wrong_use_exits_with_2_and_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        azt.main(arguments)

    assert caught.value.code == 2
    assert "usage: azt" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused_by_name(idle: Gateway, port: str) -> None:
    assert "--port accepts 0 to 65535" in refused(idle.azt("start", "--port", port), 2)


def test_missing_packages_are_named_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "azt.py"), "--version"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert re.fullmatch(r"azt .*pip install h11 certifi truststore\n", done.stderr), done.stderr


# -- Starting -------------------------------------------------------------------------------------


def test_start_prints_exactly_one_line_and_says_where_it_is(idle: Gateway) -> None:
    idle.start()

    lock = json.loads((idle.state / "lock").read_text())
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", idle.url)
    assert Client(idle.url).get("/_gateway/health").json == {"ok": True}
    assert lock == {"pid": idle.process.pid, "url": idle.url}
    assert ended(idle) == (0, b"")
    assert all(LOG_LINE.fullmatch(line) for line in idle.log().splitlines()), idle.log()
    assert "azt login" in idle.log()


def test_a_taken_port_is_explained_and_not_replaced(idle: Gateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        done = idle.azt("start", "--no-open", "--host", "127.0.0.1", "--port", port)

    assert (done.returncode, done.stdout) == (3, "")
    said = done.stderr.splitlines()[-1]
    assert port in said and "--port" in said
    assert "Traceback" not in done.stderr
    assert not (idle.state / "settings.json").exists()


def test_an_address_of_another_machine_is_explained(idle: Gateway) -> None:
    done = idle.azt("start", "--no-open", "--port", "0", "--host", "203.0.113.7")

    assert (done.returncode, done.stdout) == (1, "")
    assert "203.0.113.7" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_second_server_on_one_home_names_the_first(idle: Gateway) -> None:
    idle.start()

    done = idle.azt("start", "--no-open", "--host", "127.0.0.1", "--port", "0")

    assert str(idle.process.pid) in refused(done, 2)
    assert idle.url in done.stderr
    assert Client(idle.url).get("/_gateway/health").status == 200


@pytest.mark.parametrize("arguments", ["start --no-open", "keys list"])
def test_a_home_that_cannot_be_used_exits_with_2(idle: Gateway, arguments: str) -> None:
    (idle.home / "file").write_text("")
    idle.environment["AI_ZERO_TOKEN_HOME"] = str(idle.home / "file")

    assert "AI_ZERO_TOKEN_HOME" in refused(idle.azt(*arguments.split()), 2)


def test_a_variable_with_a_bad_value_exits_with_2(idle: Gateway) -> None:
    idle.environment["AZT_PORT"] = "many"

    assert "AZT_PORT" in refused(idle.azt("start", "--no-open"), 2)


@contextlib.contextmanager
def launch(gateway: Gateway, *command: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command that the test talks to while it runs."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    words = [sys.executable, "-m", "azt", *command]
    with subprocess.Popen(words, env=gateway.environment, cwd=gateway.home, **how) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing happens to one that has ended


@pytest.mark.parametrize("command", ["start", "serve"])
def test_away_from_a_terminal_no_browser_is_opened(idle: Gateway, command: str) -> None:
    with launch(idle, command, "--host", "127.0.0.1", "--port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline().decode().startswith(READY)
        process.terminate()
        rest, log = process.communicate(timeout=20)

    assert not (idle.state / "open.html").exists()
    assert (process.returncode, rest) == (0, b"")
    assert b"Traceback" not in log


def test_without_a_home_and_a_locale_it_starts(tmp_path: Path, new: NewGateway) -> None:
    bare = new(tmp_path)
    bare.environment = {
        "LC_ALL": "C",
        "PATH": os.defpath,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
    }
    (tmp_path / "köy.json").write_text(json.dumps({**account_file(), "label": "Ömer ✓"}))

    bare.start()
    imported = good(bare.azt("accounts", "import", "köy.json", encoding="utf-8"))
    listed = good(bare.azt("accounts", "list", encoding="utf-8"))

    assert "ada@example.com" in imported
    assert "Ömer ✓" in listed
    assert (tmp_path / ".ai-zero-token" / ".state" / "accounts.json").exists()
    assert bare.stop() == 0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_loopback_address_of_the_other_family_answers_too(idle: Gateway, host: str) -> None:
    idle.arguments = ["--host", host, "--port", "0"]
    idle.start()
    port = idle.url.rpartition(":")[2]

    for name in ("127.0.0.1", "[::1]", "localhost"):
        assert Client(f"http://{name}:{port}").get("/v1/models").status == 200
    assert good(idle.azt("status", "--json"))


def test_the_file_alone_serves_the_api_and_says_where_the_pages_are(
    tmp_path: Path, new: NewGateway
) -> None:
    shutil.copy(ROOT / "azt.py", tmp_path / "azt.py")
    alone = new(tmp_path, {"PYTHONPATH": ""}).start()
    client = Client(alone.url)

    page = client.get("/")

    assert client.get("/v1/models").json["data"]
    assert page.status == 200
    assert b"azt_web" in page.body
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/app.js").status == 404
    assert alone.stop() == 0


# -- The demo -------------------------------------------------------------------------------------


def test_the_demo_answers_and_touches_no_home(tmp_path: Path, new: NewGateway) -> None:
    scratch, real, codex = tmp_path / "tmp", tmp_path / ".ai-zero-token", tmp_path / ".codex"
    for folder in (scratch, real / ".state", codex):
        folder.mkdir(parents=True)
    (real / ".state" / "accounts.json").write_text("mine")
    (codex / "auth.json").write_text("mine")
    demo = new(tmp_path, {"TMPDIR": str(scratch)}, "--demo").start()
    client = Client(demo.url)

    with client.open("POST", "/v1/chat/completions", chat_body("hello", stream=True)) as stream:
        stream.read_until(b"content")
        code, printed = ended(demo)
        whole = stream.read_rest()

    assert whole.body.endswith(b"data: [DONE]\n\n")
    assert (code, printed) == (0, b"")
    assert [*scratch.iterdir()] == []
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert files == {".ai-zero-token/.state/accounts.json", ".codex/auth.json", "azt.log"}
    assert all(LOG_LINE.fullmatch(line) for line in demo.log().splitlines()), demo.log()
    assert "a demo: " in demo.log()


def test_the_demo_is_alive_and_signs_in_without_leaving_the_machine(
    tmp_path: Path, new: NewGateway, ports: None
) -> None:
    demo = new(tmp_path, {"TMPDIR": str(tmp_path)}, "--demo").start()
    client, mark = Client(demo.url), {"X-AZT-Admin": "1"}

    def admin(method: str, path: str, json: object = None) -> Any:
        return client.request(method, f"/_gateway/admin{path}", json, headers=mark).json

    begun = admin("GET", "/state")
    flow = admin("POST", "/login", {"method": "browser"})
    admin("POST", f"/login/{flow['flowId']}/open", {})
    with urllib.request.urlopen(flow["authorizeUrl"]) as page:
        assert b"Signed in" in page.read()
    account = admin("GET", f"/login/{flow['flowId']}")["account"]
    job = admin("POST", "/accounts/refresh-quotas", {})["job"]
    eventually(lambda: admin("GET", f"/jobs/{job['id']}")["state"] != "running")
    states = [one["status"] for one in admin("GET", "/state")["accounts"]]

    assert [one["status"] for one in begun["accounts"]] == states[:-1]
    assert states == ["ready", "low", "empty", "login_rejected", "ready", "ready"]
    assert begun["today"]["requestCount"] > 5
    assert len({row["client"] for row in begun["recent"]}) > 1
    assert account["email"] == "new@example.com"
    assert client.chat("demo:image").status == 200


# -- Signals and lost terminals -------------------------------------------------------------------


def stalled(gateway: Gateway, upstream: FakeUpstream, count: int) -> list[Stream]:
    """Streams that have said "Hel" and wait for the upstream."""
    upstream.script(text("Hel", "lo"), stall=True, after=FIRST_DELTA, times=count)
    client, streams = Client(gateway.url), []
    for _ in range(count):
        streams.append(client.open("POST", "/v1/chat/completions", chat_body(stream=True)))
        streams[-1].read_until(b'"Hel"')
    return streams


def begin_to_end(gateway: Gateway) -> None:
    """SIGTERM; back when the server has begun to drain: it closes its idle connections then."""
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(b"GET /_gateway/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        gateway.process.send_signal(signal.SIGTERM)
        assert connection.recv(65536) == b""


def test_running_streams_finish_after_sigterm(idle: Gateway, upstream: FakeUpstream) -> None:
    streams = stalled(has_account(idle).start(), upstream, 10)

    begin_to_end(idle)
    refused_new = is_refused(idle)
    silent = refused(idle.azt("status"), 1)
    upstream.release()
    bodies = [stream.read_rest() for stream in streams]

    assert refused_new
    assert "azt is stopping" in silent and "proxy" not in silent
    assert all(b'"lo"' in one.body and b"[DONE]" in one.body and not one.cut for one in bodies)
    assert ended(idle) == (0, b"")
    assert "Traceback" not in idle.log()
    for stream in streams:
        stream.close()


def test_a_second_sigterm_ends_running_streams_at_once(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    (stream,) = stalled(has_account(idle).start(), upstream, 1)
    begin_to_end(idle)
    started = time.monotonic()

    code, _ = ended(idle)
    body = stream.read_rest()

    assert time.monotonic() - started < 5
    assert code == 0
    assert b"[DONE]" not in body.body
    assert b'"error"' in body.body and not body.cut
    assert " 200 /v1/chat/completions " in good(idle.azt("log"))
    assert "Traceback" not in idle.log()
    assert "never retrieved" not in idle.log()
    stream.close()


def test_a_command_during_the_drain_says_what_happens(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    (stream,) = stalled(has_account(idle).start(), upstream, 1)
    begin_to_end(idle)

    done = idle.azt("keys", "list")

    upstream.release()
    stream.read_rest()
    stream.close()
    assert "azt is stopping" in refused(done, 1)
    assert idle.stop() == 0


def test_a_closed_terminal_does_not_end_it(idle: Gateway) -> None:
    ours, theirs = os.openpty()
    terminal: Json = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    terminal["start_new_session"] = True
    terminal["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with launch(idle, "serve", *idle.arguments, **terminal) as process:
        os.close(theirs)
        url = wait_for(lambda: lock_url(idle))
        os.close(ours)  # the kernel sends SIGHUP, and from now on no write to the terminal works
        statuses = [Client(url).get("/v1/models").status for _ in range(3)]
        process.terminate()
        code = process.wait(20)

    assert (statuses, code) == ([200, 200, 200], 0)


def test_sighup_does_not_end_it(idle: Gateway) -> None:
    idle.start()

    idle.process.send_signal(signal.SIGHUP)

    assert Client(idle.url).get("/v1/models").status == 200
    assert idle.process.poll() is None
    assert idle.stop() == 0


@pytest.mark.parametrize("redirected", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_it_runs_without_anywhere_to_write(idle: Gateway, redirected: str) -> None:
    command = f'exec "{sys.executable}" -m azt serve {" ".join(idle.arguments)} {redirected}'
    with subprocess.Popen(["sh", "-c", command], env=idle.environment, cwd=idle.home) as process:
        try:
            url = wait_for(lambda: lock_url(idle))
            statuses = [Client(url).get(path).status for path in ("/v1/models", "/v1/nothing")]
            process.terminate()
            code = process.wait(20)
        finally:
            process.kill()

    assert (statuses, code) == ([200, 404], 0)


def test_a_reader_that_left_is_no_error(idle: Gateway) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    with launch(idle, "settings", "get", stdout=writer) as process:
        os.close(writer)
        _, complaints = process.communicate(timeout=20)

    assert (process.returncode, complaints) == (0, b"")


# -- status ---------------------------------------------------------------------------------------


def test_status_without_a_server_says_how_to_start_one(idle: Gateway) -> None:
    plain, as_json = idle.azt("status"), idle.azt("status", "--json")

    assert (plain.returncode, as_json.returncode) == (1, 1)
    assert "azt start" in plain.stdout
    assert json.loads(as_json.stdout) == {"running": False}


def test_status_shows_what_runs_on_whatever_port(idle: Gateway) -> None:
    has_account(idle).start()
    # Neither of these leads a command away from the server of its home.
    idle.environment |= {"AZT_PORT": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    idle.environment["HTTPS_PROXY"] = idle.environment["ALL_PROXY"] = "http://127.0.0.1:9"

    shown, state = good(idle.azt("status")), json.loads(good(idle.azt("status", "--json")))

    assert state["running"] is True
    assert state["gateway"]["pid"] == idle.process.pid
    assert state["gateway"]["baseUrl"] == f"{idle.url}/v1"
    for part in (str(idle.process.pid), f"{idle.url}/v1", "ada@example.com", str(idle.state)):
        assert part in shown
    assert idle.stop() == 0


# -- ask ------------------------------------------------------------------------------------------


def test_ask_prints_each_piece_as_it_arrives(place: Gateway, upstream: FakeUpstream) -> None:
    has_account(place)
    upstream.script(text("Hel", "lo ✓"), stall=True, after=FIRST_DELTA)

    with launch(place, "ask", "Say", "hello") as process:
        assert process.stdout is not None
        first = process.stdout.read(3)
        upstream.release()
        rest, complaints = process.communicate(timeout=20)

    assert (first, rest.decode(), complaints) == (b"Hel", "lo ✓\n", b"")
    assert process.returncode == 0
    assert upstream.turns[-1].user_text == "Say hello"
    assert upstream.sent["model"] == "gpt-5.4"


def test_ask_reads_standard_input_and_takes_a_model(idle: Gateway, upstream: FakeUpstream) -> None:
    has_account(idle)

    answer = json.loads(good(idle.azt("ask", "--model", "gpt-5.5", "--json", input="from a pipe")))

    assert answer == {"text": "You said: from a pipe"}
    assert upstream.sent["model"] == "gpt-5.5"


def test_ask_takes_bytes_that_are_no_text(idle: Gateway, upstream: FakeUpstream) -> None:
    has_account(idle)
    idle.environment["PYTHONIOENCODING"] = "utf-8"

    with launch(idle, "ask", stdin=subprocess.PIPE) as process:
        printed, complaints = process.communicate(b"caf\xe9", timeout=20)

    assert (printed.decode(), complaints) == ("You said: caf\\xe9\n", b"")


def test_what_a_terminal_cannot_show_is_escaped_and_not_lost(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    has_account(idle)
    idle.environment["PYTHONIOENCODING"] = "ascii"

    assert good(idle.azt("ask", "œuf")) == "You said: \\u0153uf\n"


@pytest.mark.parametrize("redirected", ["</dev/null", "<&-"])
def test_ask_without_a_question_shows_how_to_ask(idle: Gateway, redirected: str) -> None:
    command = ["sh", "-c", f'exec "{sys.executable}" -m azt ask {redirected}']
    done = subprocess.run(
        command, env=idle.environment, cwd=idle.home, capture_output=True, text=True
    )

    assert "azt ask" in refused(done, 2)


def test_ask_without_an_account_says_what_to_do(idle: Gateway) -> None:
    assert "azt accounts import" in refused(idle.azt("ask", "hi"), 1)


def test_ask_reports_a_failure_after_the_first_words(idle: Gateway, upstream: FakeUpstream) -> None:
    has_account(idle)
    upstream.script(failed("server_error", "The model broke.", message("Hel", "lo")))

    done = idle.azt("ask", "hi")

    assert (done.returncode, done.stdout) == (1, "Hello")
    assert re.fullmatch(r"azt: .+\n", done.stderr)


# -- models ---------------------------------------------------------------------------------------


def test_models_come_from_codex_then_from_the_backend(
    place: Gateway, upstream: FakeUpstream
) -> None:
    has_account(place)
    built_in = json.loads(good(place.azt("models", "--json")))
    (place.home / ".codex").mkdir()
    (place.home / ".codex" / "models_cache.json").write_text(json.dumps(codex_models_cache()))

    first = json.loads(good(place.azt("models", "--refresh", "--json")))
    saved = json.loads((place.state / "models.json").read_text())
    second = json.loads(good(place.azt("models", "--refresh", "--json")))
    listed = good(place.azt("models"))

    asked = [seen.headers.get("if-none-match") for seen in upstream.requests]
    assert (built_in["source"], len(built_in["items"])) == ("built-in", 5)
    assert (first["source"], first["changed"], second["changed"]) == ("azt", True, False)
    assert asked == [None, upstream.etag]
    assert saved["etag"] == upstream.etag
    assert [one["id"] for one in first["items"]] == ["gpt-5.5", "gpt-5.4", "gpt-6-luna"]
    assert re.search(r"^gpt-5\.4 +default +low medium high$", listed, re.MULTILINE)


def test_the_list_of_codex_serves_until_azt_has_its_own(idle: Gateway) -> None:
    (idle.home / ".codex").mkdir()
    cache = idle.home / ".codex" / "models_cache.json"

    cache.write_text(json.dumps(codex_models_cache()))
    codex = json.loads(good(idle.azt("models", "--json")))
    cache.write_text("{broken")
    broken = json.loads(good(idle.azt("models", "--json")))

    assert codex["source"] == "codex"
    assert "codex-auto-review" not in {one["id"] for one in codex["items"]}
    assert broken["source"] == "built-in"


def test_an_empty_list_of_the_backend_is_not_taken_over(
    idle: Gateway, upstream: FakeUpstream
) -> None:
    has_account(idle)
    upstream.models = []

    assert "no models" in refused(idle.azt("models", "--refresh"), 1)
    assert json.loads(good(idle.azt("models", "--json")))["items"]


# -- accounts -------------------------------------------------------------------------------------


def zipped(files: dict[str, Any]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, value in files.items():
            archive.writestr(name, json.dumps(value))
    return packed.getvalue()


def as_codex(account: Json) -> Json:
    tokens = {
        name: account[name] for name in ("access_token", "refresh_token", "id_token", "account_id")
    }
    return {"OPENAI_API_KEY": None, "tokens": tokens, "last_refresh": "2026-11-22T10:00:00Z"}


def test_every_known_shape_is_imported(place: Gateway) -> None:
    people = [account_file(f"acct-{at}", f"user-{at}", f"p{at}@example.com") for at in range(8)]
    shapes: dict[str, bytes] = {
        "object.json": json.dumps(people[0]).encode(),
        "array.json": json.dumps(people[1:3]).encode(),
        "profiles.json": json.dumps({"profiles": people[3:5]}).encode("utf-8-sig"),
        "auth.json": json.dumps(as_codex(people[5])).encode(),
        "many.zip": zipped({"a.json": people[6], "deep/b.json": [people[7]]}),
    }
    for name, raw in shapes.items():
        (place.home / name).write_bytes(raw)

    result = json.loads(good(place.azt("accounts", "import", *shapes, "--json")))
    listed = json.loads(good(place.azt("accounts", "list", "--json")))

    assert {word: n for word, n in result["summary"].items() if n} == {"new": 8}
    assert [one["email"] for one in listed["items"]] == [one["email"] for one in people]
    assert [one["active"] for one in listed["items"]] == [True] + [False] * 7
    assert stat.S_IMODE((place.state / "accounts.json").stat().st_mode) == 0o600
    for person in people:
        assert person["access_token"] not in json.dumps([result, listed])
        assert person["refresh_token"] not in json.dumps([result, listed])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"hello", "JSON"),
        (b"[]", "no account"),
        (b"PK\x03\x04broken", "ZIP"),
    ],
    ids=["missing", "no JSON", "empty", "broken ZIP"],
)
def test_a_file_without_an_account_is_explained(
    idle: Gateway, content: bytes | None, told: str
) -> None:
    if content is not None:
        (idle.home / "bad.json").write_bytes(content)

    done = idle.azt("accounts", "import", "bad.json")

    assert (done.returncode in (1, 2), done.stdout) == (True, "")
    assert re.fullmatch(rf"azt: .*{told}.*\n", done.stderr)
    assert not (idle.state / "accounts.json").exists()


def test_one_bad_file_among_good_ones_imports_nothing(place: Gateway) -> None:
    (place.home / "good.json").write_text(json.dumps(account_file()))
    (place.home / "bad.json").write_text(json.dumps({"access_token": "a"}))

    said = refused(place.azt("accounts", "import", "good.json", "bad.json"), 1)

    assert "Entry 2 (bad.json): It has no refresh_token. Nothing was imported." in said
    assert not (place.state / "accounts.json").exists()


def test_accounts_are_used_and_removed_by_any_of_their_names(place: Gateway) -> None:
    both = [account_file(), {**account_file("acct-2", "user-2", "bo@example.com"), "label": "Work"}]
    (place.home / "both.json").write_text(json.dumps(both))
    imported = json.loads(good(place.azt("accounts", "import", "both.json", "--json")))
    ids = [one["id"] for one in imported["items"]]

    used = good(place.azt("accounts", "use", "work"))
    listed = good(place.azt("accounts", "list"))
    empty = refused(place.azt("accounts", "remove", ""), 1)
    removed = good(place.azt("accounts", "remove", "bo@example.com", ids[1]))
    left = json.loads(good(place.azt("accounts", "list", "--json")))["items"]

    assert "Work serves the API." in used
    assert re.search(rf"^\* +{ids[1]} +Work +plus +unknown +-$", listed, re.MULTILINE)
    assert "Name the accounts" in empty
    assert removed == "Removed: 1.\n"
    assert [(one["id"], one["active"]) for one in left] == [(ids[0], True)]


def test_accounts_are_excluded_and_taken_back(place: Gateway) -> None:
    has_account(place)

    out = good(place.azt("accounts", "exclude", "ada@example.com"))
    ids = json.loads(good(place.azt("settings", "get", "autoSwitch.excludedIds")))
    back = json.loads(good(place.azt("accounts", "include", "ada@example.com", "--json")))

    assert re.search(r"^\* +acc_\w+ +ada@example.com +plus +excluded ", out, re.MULTILINE)
    assert ids == [back["id"]]
    assert (back["excluded"], back["status"]) == (False, "unknown")


def test_what_is_left_is_asked_for_with_progress(place: Gateway, upstream: FakeUpstream) -> None:
    has_account(place)

    done = place.azt("accounts", "refresh")
    listed = good(place.azt("accounts", "list"))
    again = json.loads(good(place.azt("accounts", "refresh", "ada@example.com", "--json")))

    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "1 of 1")
    row = r"^\* +acc_\w+ +ada@example.com +plus +ready +5 h 90% \(\w+ \d+:\d+\), 7 d 80% \(.+\)$"
    assert re.search(row, done.stdout, re.MULTILINE)
    assert listed == done.stdout
    assert (again["job"]["state"], again["job"]["total"]) == ("done", 1)
    assert upstream.turns == []


def test_a_quota_that_cannot_be_read_is_said(place: Gateway, upstream: FakeUpstream) -> None:
    has_account(place)
    upstream.script(path="/wham/usage", status=503, json={})

    done = place.azt("accounts", "refresh")

    assert done.returncode == 1
    assert re.search(r"^acc_\w+: The upstream answered 503", done.stdout, re.MULTILINE)
    assert "No account matches" in refused(place.azt("accounts", "refresh", "nobody"), 1)


# -- settings -------------------------------------------------------------------------------------


def test_settings_are_shown_and_changed(place: Gateway) -> None:
    everything = good(place.azt("settings", "get")).splitlines()
    assert [line.partition(" = ")[0] for line in everything if "hasPassword" not in line] == [
        *azt.SETTINGS
    ]

    changed = [
        good(place.azt("settings", "set", *pair))
        for pair in (
            ("log.level", "warning"),
            ("server.corsOrigins", "https://a.test,https://b.test"),
        )
    ]
    group = json.loads(good(place.azt("settings", "get", "server", "--json")))
    saved = json.loads((place.state / "settings.json").read_text())

    assert changed[0] == 'log.level = "warning"\n'
    assert changed[1] == 'server.corsOrigins = ["https://a.test", "https://b.test"]\n'
    assert group["server.corsOrigins"] == ["https://a.test", "https://b.test"]
    assert set(group) == {key for key in azt.SETTINGS if key.startswith("server.")}
    assert saved["revision"] == 2
    assert saved["values"] == {
        "log.level": "warning",
        "server.corsOrigins": ["https://a.test", "https://b.test"],
    }


def test_a_bad_setting_is_refused_with_what_it_accepts(idle: Gateway) -> None:
    assert "azt settings get" in refused(idle.azt("settings", "set", "no.such", "1"), 2)
    assert "azt settings get" in refused(idle.azt("settings", "get", "no.such"), 2)
    assert "true or false" in refused(idle.azt("settings", "set", "server.lanApi", "maybe"), 2)
    assert not (idle.state / "settings.json").exists()


def test_a_setting_that_a_variable_fixes_is_refused_by_its_name(idle: Gateway) -> None:
    idle.environment["AZT_BODY_LIMIT_MB"] = "7"

    assert good(idle.azt("settings", "get", "limits.bodyMb")) == "7\n"
    assert "AZT_BODY_LIMIT_MB" in refused(idle.azt("settings", "set", "limits.bodyMb", "9"), 1)


def test_a_new_port_is_said_to_wait_for_the_next_start(idle: Gateway) -> None:
    idle.arguments = ["--host", "127.0.0.1"]
    good(idle.azt("settings", "set", "server.port", "0"))
    idle.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    said = good(idle.azt("settings", "set", "server.port", str(port)))
    other = good(idle.azt("settings", "set", "defaultModel", "gpt-5.5"))
    still = good(idle.azt("status"))
    idle.stop()
    idle.start()

    assert said.splitlines() == [
        f"server.port = {port}",
        "server.port takes effect at the next start.",
    ]
    assert "next start" not in other
    assert str(port) not in still
    assert idle.url == f"http://127.0.0.1:{port}"


# -- keys -----------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_a_hash(place: Gateway) -> None:
    first = good(place.azt("keys", "add", "laptop"))
    second = json.loads(good(place.azt("keys", "add", "my phone", "--json")))
    listed = good(place.azt("keys", "list"))
    kept = (place.state / "keys.json").read_text()

    key = first.splitlines()[0]
    assert re.fullmatch(r"azt_[\w-]{43}", key)
    assert "apiKeys.loopbackExempt" in first
    assert second["first"] is False
    assert key[:8] in listed and "laptop" in listed and "my phone" in listed
    for secret in (key, second["key"]):
        assert secret not in listed + kept
        assert hashlib.sha256(secret.encode()).hexdigest() in kept
    good(place.azt("keys", "revoke", "my phone"))
    assert "my phone" not in (place.state / "keys.json").read_text()


def test_a_key_is_needed_from_its_making_until_it_is_revoked(idle: Gateway) -> None:
    idle.start()
    client = Client(idle.url)

    def statuses(*keys: str) -> list[int]:
        sent = [{"Authorization": f"Bearer {key}"} for key in keys]
        return [client.get("/v1/models", headers=one).status for one in ({}, *sent)]

    assert statuses("anything") == [200, 200]
    laptop = good(idle.azt("keys", "add", "laptop")).splitlines()[0]
    phone = good(idle.azt("keys", "add", "phone")).splitlines()[0]
    assert statuses("anything", laptop, phone) == [401, 401, 200, 200]
    good(idle.azt("keys", "revoke", "phone"))
    assert statuses(laptop, phone) == [401, 200, 401]
    good(idle.azt("settings", "set", "apiKeys.loopbackExempt", "true"))
    assert statuses(phone) == [200, 200]
    assert laptop not in idle.log()
    assert idle.stop() == 0


# -- log ------------------------------------------------------------------------------------------


def test_a_log_without_a_request_says_so(place: Gateway) -> None:
    assert good(place.azt("log")) == "No requests yet.\n"
    assert good(place.azt("log", "--json")) == ""
