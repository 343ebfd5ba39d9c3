"""`--audit`: what azt contacts and writes, as the interpreter reports it, against the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import trustme
from fake_upstream import FakeUpstream, account_file
from harness import ROOT, Client, Gateway
from loopback import Internet
from test_outbound import tls_for

README = (ROOT / "README.md").read_text(encoding="utf-8")
HOSTS = re.findall(r"^\| `([*\w-]+(?:\.[\w-]+)+)` \| ", README.partition("| host |")[2], re.M)
FILES = re.findall(r"^\| `([\w.-]+)/?` \|", README.partition("| file | content |")[2], re.M)
TOLD = re.compile(r"^azt audit: (.+)$", re.MULTILINE)


def told(log: str, *does: str) -> list[str]:
    """What follows one of these words in the lines of an audit."""
    found = (line.partition(" ") for line in TOLD.findall(log))
    return [what for verb, _, what in found if verb in does]


def written(log: str) -> set[str]:
    """The files that were made, replaced or removed, by the names that they had in the end."""
    names = set()
    for what in told(log, "writes", "renames", "removes", "mkdirs", "chmods", "truncates"):
        path = Path(what.partition("  <- ")[0].rpartition(" -> ")[2])
        temporary = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", path.name)
        path = path.with_name(temporary[1]) if temporary else path
        names.add(str(path).removesuffix(".bak"))
    return names


def use_everything(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The main job: what people do with azt, each once."""
    client, upstream.issuer = Client(gateway.url), "https://auth.openai.com"
    upstream.script(path="/pypi/azt/json", json={"info": {"version": "0.1.0"}})
    (gateway.home / ".codex").mkdir()
    for path, body in (
        ("accounts/import", {"payload": [account_file()]}),
        ("models/refresh", {}),
        ("accounts/refresh-quotas", {}),
        ("keys", {"name": "phone"}),
        ("version/check", {}),
    ):
        path = f"/_gateway/admin/{path}"
        assert client.post(path, body, headers=gateway.proof()).status < 300, path
    assert gateway.azt("keys", "revoke", "phone").returncode == 0
    for words in (
        "codex takeover --yes",
        "codex apply ada@example.com",
        "codex release",
        "codex restore",
        "settings set defaultModel gpt-5.5",
    ):
        done = gateway.azt(*words.split())
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    with subprocess.Popen(
        [*gateway.program, "login", "--device"],
        env=gateway.environment,
        cwd=gateway.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as command:
        assert command.stdout is not None
        found = re.search(r"ABCD-\d{5}", command.stdout.readline().decode())
        assert found is not None
        upstream.enter(found[0])
        assert command.wait(20) == 0, command.stdout.read()
    assert client.chat().status == 200
    assert client.chat_stream().content
    assert client.responses_stream().output_text
    picture = {"model": "gpt-image-2", "prompt": "a fox"}
    assert client.post("/v1/images/generations", picture).status == 200
    assert client.post("/codex/v1/responses", {"model": "gpt-5.5", "stream": True}).status


def test_the_main_job_contacts_and_writes_what_the_readme_says(
    home: Path, upstream: FakeUpstream, tmp_path: Path
) -> None:
    ca, root = trustme.CA(), tmp_path / "root.pem"
    ca.cert_pem.write_to_path(str(root))
    with Internet(upstream.url, tls_for(ca.issue_cert(*HOSTS))) as internet:
        variables = {"HTTPS_PROXY": internet.url, "AZT_CA_FILE": str(root)}
        where = ["--audit", "--host", "127.0.0.1", "--port", "0"]
        gateway = Gateway(home, variables, where).start()
        use_everything(gateway, upstream)
        assert gateway.stop() == 0
    log = gateway.log()
    state = os.path.realpath(gateway.state) + "/"

    called = {name.rpartition(":")[0] for name in told(log, "calls")}
    assert called == {name.rpartition(":")[0] for name in internet.called}
    assert all(any(fnmatch(host, one) for one in HOSTS) for host in called), called
    assert called == {host for host in HOSTS if "*" not in host}
    proxy = internet.url.removeprefix("http://")
    assert {what.partition(" ")[0] for what in told(log, "connects", "looks")} == {"to"}
    assert {what.split()[1] for what in told(log, "connects")} == {proxy}

    names = {name.removeprefix(state) for name in written(log)}
    own = {name.partition("/")[0] for name in names if not name.startswith("/")}
    assert own - {""} <= set(FILES), own
    assert own >= {"accounts.json", "codex.json", "codex-backups", "keys.json", "lock"}
    assert own >= {"models.json", "requests.jsonl", "settings.json", "usage"}
    codex, folders = home / ".codex", {gateway.state, gateway.state.parent, home / ".codex"}
    outside = {Path(name) for name in names if name.startswith("/")} - folders
    assert outside == {codex / "auth.json", codex / "config.toml"}
    assert told(log, "REFUSED:", "starts") == []
    assert "not azt's own" not in log
    assert "Traceback" not in log


PROBES = {
    "an address": "socket.create_connection(('192.0.2.1', 443))",
    "an address of IPv6": "socket.create_connection(('2001:db8::1', 443))",
    "a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "a name": "socket.getaddrinfo('elsewhere.example', 443)",
    "a library": "urllib.request.urlopen('http://192.0.2.1/')",
    "azt itself": "azt._connect(azt.ConnectionPool(azt.Egress()), "
    "('https', 'elsewhere.example', 443), azt.Wire())",
    "a name that is none of ours": "sys.audit('azt.dial', 'chatgpt.com') or "
    "socket.create_connection(('192.0.2.1', 443))",
}


def under_audit(folder: Path, *pieces: str) -> list[tuple[str, list[str]]]:
    """Run code in a Python of its own, under an audit whose folder is `folder`: for each piece the
    exception it ended with, if any, and what the audit told meanwhile."""
    code = "import os, socket, subprocess, sys, urllib.request; from pathlib import Path\n"
    code += f"import azt; azt.Audit(Path({str(folder)!r}))\n"
    for piece in pieces:
        code += (
            f"try:\n    {piece}\nexcept OSError as error:\n    os.write(2, repr(error).encode())\n"
        )
        code += "os.write(2, b'\\n--\\n')\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        **{"capture_output": True, "text": True, "env": environment, "timeout": 60},
    )
    assert done.returncode == 0, done.stderr
    found = done.stderr.split("\n--\n")[:-1]
    return [(TOLD.sub("", one).strip(), TOLD.findall(one)) for one in found]


def test_a_host_outside_the_table_is_refused_however_it_is_called(tmp_path: Path) -> None:
    for name, (error, lines) in zip(PROBES, under_audit(tmp_path, *PROBES.values()), strict=True):
        assert "it is not in the table of hosts" in error, (name, error, lines)
        assert len([line for line in lines if line.startswith("REFUSED: ")]) == 1, (name, lines)


def test_what_the_user_has_named_is_reached(tmp_path: Path, upstream: FakeUpstream) -> None:
    call = f"azt.Call('GET', {upstream.url!r}, {{}})"
    pool = "azt.ConnectionPool(azt.Egress(own_hosts=frozenset(['127.0.0.1'])))"

    [(error, lines)] = under_audit(tmp_path, f"azt.open_response({pool}, {call}, azt.Wire())")

    where = upstream.url.removeprefix("http://")
    assert (error, lines) == ("", [f"calls {where}", f"connects to {where} at 127.0.0.1"])


WRITES = {
    "open('{}', 'w')": "writes {}",
    "os.truncate('{}', 0)": "truncates {}",
    "Path('{}').write_text('')": "writes {}",
    "os.chmod('kept', 0o600)": "chmods kept",
    "os.open('{}', os.O_RDWR | os.O_CREAT)": "writes {}",
    "open('{}', 'w', opener=lambda path, flags: os.open(path, flags))": "writes {}",
    "os.remove('{}')": "removes {}",
    "os.mkdir('{}')": "mkdirs {}",
    "os.rmdir('{}')": "rmdirs {}",
    "open(os.devnull, 'w'), os.rename('kept', '{}')": "renames kept -> {}",
    "os.symlink('kept', 'link')": "symlinks kept -> link",
    "os.replace('{}', 'kept')": "renames {} -> kept",
    "__import__('sqlite3').connect('file:{}?mode=rwc', uri=True)": "writes {}",
    "os.remove('new', dir_fd=os.open('.', os.O_RDONLY))": "removes {}",
    "open('kept').read()": "",
    "subprocess.run(['true', 'secret'])": "starts true: what that does is not seen here",
}


@pytest.mark.parametrize("is_own", [True, False], ids=["own", "foreign"])
def test_every_change_of_a_file_and_every_program_is_told(is_own: bool, tmp_path: Path) -> None:
    own, foreign = tmp_path / "own", tmp_path / "own-not"
    own.mkdir()
    foreign.mkdir()
    where = own if is_own else foreign
    (where / "kept").write_text("")
    name = str(where / "new")
    pieces = [f"os.chdir({str(where)!r})", *(code.replace("{}", name) for code in WRITES)]

    found = under_audit(own, *pieces)[1:]

    for (code, wanted), (error, lines) in zip(WRITES.items(), found, strict=True):
        mark = "" if is_own or "starts" in wanted else "  <- not azt's own"
        assert (error, lines) == ("", [wanted.replace("{}", name) + mark] * bool(wanted)), code


def test_a_demo_under_audit_leaves_nothing_outside(tmp_path: Path, home: Path) -> None:
    where = ["--audit", "--demo", "--host", "127.0.0.1", "--port", "0"]
    demo = Gateway(home, {"TMPDIR": str(tmp_path)}, where).start()

    assert Client(demo.url).chat("hello").status == 200
    assert demo.stop() == 0
    assert "not azt's own" not in demo.log(), demo.log()
    assert told(demo.log(), "REFUSED:") == []
    assert told(demo.log(), "listens")
    assert set(told(demo.log(), "calls")) == {f"127.0.0.1:{port_of(demo.log())}"}


def port_of(log: str) -> str:
    """The port of the demo's upstream: the one that is called."""
    return told(log, "calls")[0].rpartition(":")[2]
