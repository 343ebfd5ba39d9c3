"""Codex's own files: taken over and given back byte for byte, whatever stands in them."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from codex_configs import CONFIGS, NO_PLACE_FOR_A_TABLE
from fake_upstream import account_file
from harness import Claim
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

Json = dict[str, Any]

URL = "http://127.0.0.1:8787/codex/v1"
OTHER = "http://127.0.0.1:8788/codex/v1"
TRUSTED = '\n[projects."/srv/new"]\ntrust_level = "trusted"\n'
CASES = [
    pytest.param(CONFIGS[name], mode, id=f"{name}, {mode}")
    for name in CONFIGS
    for mode in azt.CODEX_MODES
    if mode == "openai" or name not in NO_PLACE_FOR_A_TABLE
]


# -- Set-up ---------------------------------------------------------------------------------------


class Codex:
    """A Codex home with azt's hand on it."""

    def __init__(self, folder: Path) -> None:
        self.paths = azt.Paths(folder / "azt", folder / "codex")
        azt.prepare_home(self.paths)
        self.files = azt.CodexFiles(self.paths)
        self.config, self.auth = self.paths.codex_config, self.paths.codex_auth

    def has(self, text: str) -> Codex:
        self.paths.codex_home.mkdir(exist_ok=True)
        self.config.write_bytes(text.encode())
        return self

    def change(self, mode: str, url: str = URL, moves: bool = False) -> Json:
        base = self.files.route(mode, url, moves, "")["base"]
        return self.files.route(mode, url, moves, base)

    @property
    def text(self) -> str:
        return self.config.read_bytes().decode()

    @property
    def route(self) -> tuple[str, str]:
        return azt.codex_route(azt.parse_toml(self.text))

    def look(self, url: str = URL) -> Json:
        state: Json = self.files.look(url)
        return state

    def backups(self, file: str = "") -> list[Json]:
        kept: list[Json] = self.files.kept()["backups"]
        return [one for one in kept if one["file"].startswith(file)]


@pytest.fixture
def codex(tmp_path: Path) -> Codex:
    return Codex(tmp_path)


def account(number: int = 1, **fields: Any) -> azt.Account:
    entry = account_file(f"acct-{number}", f"user-{number}", f"p{number}@example.com")
    [made] = azt.to_accounts([entry | fields], 0)
    return made


def refused(code: str) -> Any:
    return pytest.raises(azt.AztError, check=lambda error: error.code == code)


# -- Taken over and given back --------------------------------------------------------------------


def test_there_are_fifty_configs() -> None:
    assert len(CONFIGS) >= 50


@pytest.mark.parametrize(("text", "mode"), CASES)
def test_what_was_taken_over_is_given_back_byte_for_byte(
    codex: Codex, claim: Callable[[int, str], Claim], text: str, mode: str
) -> None:
    tries = claim(17, "Codex's config taken over and released: the original, byte for byte")
    codex.has(text)
    os.chmod(codex.config, 0o640)
    before = azt.parse_toml(text)

    codex.change(mode)

    assert codex.route == (mode, URL)
    taken = tomllib.loads(codex.text.removeprefix("\ufeff"))
    untouched = set(before) - {"model_provider", "model_providers", "openai_base_url"}
    assert {name: azt.parse_toml(codex.text)[name] for name in untouched} == {
        name: before[name] for name in untouched
    }
    if mode == "ai-zero-token":
        table = taken["model_providers"][mode]
        assert (table["wire_api"], table["supports_websockets"]) == ("responses", False)
    assert stat.S_IMODE(codex.config.stat().st_mode) == 0o640

    codex.change("")

    tries.check(codex.text == text, (text, mode))
    assert stat.S_IMODE(codex.config.stat().st_mode) == 0o640
    assert json.loads(codex.paths.codex.read_text())["takeover"] is None


@pytest.mark.parametrize(("text", "mode"), CASES)
def test_edits_of_the_person_survive_the_release(codex: Codex, text: str, mode: str) -> None:
    line_end = "\r\n" if "\r\n" in text else "\n"
    added = TRUSTED.replace("\n", line_end)
    first = text.startswith("\ufeff")
    codex.has(text).change(mode)
    now = codex.text
    codex.has(f"{now[:first]}# new{line_end}{now[first:]}{added}")

    codex.change("")

    assert codex.text == f"{text[:first]}# new{line_end}{text[first:]}{added}"


@pytest.mark.parametrize("name", sorted(NO_PLACE_FOR_A_TABLE))
def test_a_config_that_cannot_be_edited_safely_is_left_alone(codex: Codex, name: str) -> None:
    codex.has(CONFIGS[name])

    with refused("config_unusable") as error:
        codex.change("ai-zero-token")

    assert 'model_provider = "ai-zero-token"' in error.value.message
    assert codex.text == CONFIGS[name]
    assert not codex.paths.codex.exists()


@pytest.mark.parametrize(("text", "mode"), CASES)
def test_every_comment_and_line_stays_but_for_our_keys(text: str, mode: str) -> None:
    ours = re.compile(r"model_provider|base_url|wire_api|supports_websockets|name|^\[.*zero-token")
    after = azt.take_over(text, mode, URL).removeprefix("\ufeff").splitlines()

    kept = [line for line in text.removeprefix("\ufeff").splitlines() if not ours.search(line)]

    assert [line for line in after if line in kept][: len(kept)] == kept
    assert all(comment in "\n".join(after) for comment in re.findall(r"# [a-z ]+$", text, re.M))


def test_a_missing_file_and_folder_are_made_and_go_again(codex: Codex) -> None:
    codex.change("openai")

    assert codex.route == ("openai", URL)
    assert stat.S_IMODE(codex.config.stat().st_mode) == 0o600
    assert stat.S_IMODE(codex.paths.codex_home.stat().st_mode) == 0o700

    codex.change("")

    assert not codex.paths.codex_home.exists()


def test_a_folder_that_was_there_or_is_in_use_stays(codex: Codex) -> None:
    codex.paths.codex_home.mkdir()
    codex.change("openai")
    codex.change("")
    assert list(codex.paths.codex_home.iterdir()) == []

    codex.paths.codex_home.rmdir()
    codex.change("openai")
    (codex.paths.codex_home / "history.jsonl").write_text("{}")
    codex.change("")
    assert [path.name for path in codex.paths.codex_home.iterdir()] == ["history.jsonl"]


def test_what_codex_wrote_into_a_made_file_stays(codex: Codex) -> None:
    codex.change("ai-zero-token")
    codex.has(codex.text + TRUSTED)

    codex.change("")

    assert codex.text == TRUSTED


def test_a_link_stays_a_link_and_its_target_is_written(codex: Codex, tmp_path: Path) -> None:
    dotfiles = tmp_path / "home" / "dotfiles"
    dotfiles.mkdir()
    target = dotfiles / "codex.toml"
    target.write_text(CONFIGS["comments"])
    codex.paths.codex_home.mkdir()
    codex.config.symlink_to(target)

    codex.change("openai")
    assert codex.config.is_symlink()
    assert azt.codex_route(azt.parse_toml(target.read_text())) == ("openai", URL)

    codex.change("")
    assert codex.config.is_symlink()
    assert target.read_text() == CONFIGS["comments"]
    assert [path.name for path in dotfiles.iterdir()] == ["codex.toml"]


def test_a_link_out_of_the_home_is_not_written(codex: Codex, tmp_path: Path) -> None:
    outside = tmp_path / "outside.toml"
    outside.write_text("a = 1\n")
    codex.paths.codex_home.mkdir()
    codex.config.symlink_to(outside)

    with refused("not_writable"):
        codex.change("openai")

    assert outside.read_text() == "a = 1\n"


@pytest.mark.parametrize("first", azt.CODEX_MODES)
@pytest.mark.parametrize("second", azt.CODEX_MODES)
def test_a_second_take_over_still_goes_back_to_the_first_text(
    codex: Codex, first: str, second: str
) -> None:
    codex.has(CONFIGS["providers"])
    codex.change(first)
    codex.change(second, OTHER)

    assert codex.route == (second, OTHER)
    codex.change("")
    assert codex.text == CONFIGS["providers"]


def test_a_value_that_the_person_changed_meanwhile_stays(codex: Codex) -> None:
    codex.has('model = "m"\nmodel_provider = "local" # mine\n').change("openai")
    codex.has(codex.text.replace('"openai" # mine', '"other" # now'))

    codex.change("")

    assert codex.text == 'model = "m"\nmodel_provider = "other" # now\n'


def test_edits_inside_of_our_own_table_are_not_torn(codex: Codex) -> None:
    codex.has('model = "m"\n').change("ai-zero-token")
    edited = codex.text.replace("wire_api", "request_max_retries = 9\nwire_api")
    codex.has(edited)

    with refused("config_unusable"):
        codex.change("")

    assert codex.text == edited
    assert codex.change("ai-zero-token")["changed"] is False


def test_a_url_that_somebody_else_wrote_there_is_not_ours_to_release(codex: Codex) -> None:
    codex.has(f'openai_base_url = "{URL}"\n')

    with refused("not_ours"):
        codex.change("")


def test_a_release_without_a_take_over_changes_nothing(codex: Codex) -> None:
    done = codex.has(CONFIGS["own table"]).change("")

    assert (done["changed"], done["diff"]) == (False, [])
    assert codex.text == CONFIGS["own table"]
    assert codex.backups() == []


# -- Any TOML -------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    "model model_provider openai_base_url name base_url wire_api tui x-y 1 'a.b' \"ai-zero-token\" "
    "model_providers ai-zero-token supports_websockets".split()
)
STRINGS = st.sampled_from(
    [
        '"x"',
        "'y'",
        '"[model_providers.ai-zero-token]"',
        '"""\n[fake]\nmodel_provider = "z"\n"""',
        "'''\nopenai_base_url = 'q' # no\n'''",
        '"\\u00e4 # \\" ="',
        f'"{URL}"',
    ]
)
VALUES = st.recursive(
    st.one_of(STRINGS, st.sampled_from("1 true nan -inf 1e9 1979-05-27 0x1F".split())),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda many: f"[\n  {', '.join(many)}\n]"),
        st.dictionaries(WORDS, inner.filter(lambda one: "\n" not in one), max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {table[key]}" for key in table) + "}"
        ),
    ),
    max_leaves=4,
)
KEYS = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
COMMENTS = st.sampled_from(["", " # why", "\t#"])
LINES = st.one_of(
    st.builds("{} = {}{}".format, KEYS, VALUES, COMMENTS),
    st.builds("[{}]{}".format, KEYS, COMMENTS),
    st.builds("[[{}]]{}".format, KEYS, COMMENTS),
    st.sampled_from(["", "# model_provider = 'no'", "  "]),
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Lines that are valid together: one that would break the text is left out."""
    text = ""
    for line in draw(st.lists(LINES, max_size=12)):
        try:
            tomllib.loads(f"{text}{line}\n")
        except ValueError:
            continue
        text += f"{line}\n"
    text = text.replace("\n", "\r\n") if draw(st.booleans()) else text
    mark = "\ufeff" if draw(st.booleans()) else ""
    return mark + (text.rstrip("\r\n") if draw(st.booleans()) else text)


@settings(max_examples=int(os.environ.get("AZT_TEST_CONFIGS", "300")))
@given(text=documents(), mode=st.sampled_from(azt.CODEX_MODES))
def test_any_config_says_the_same_but_for_our_keys_and_goes_back(text: str, mode: str) -> None:
    try:
        after = azt.take_over(text, mode, URL)
    except azt.AztError as error:
        assert error.code == "config_unusable"
        # Only what stands in the way of our own keys is a reason to refuse.
        assert "model_provider" in text or "openai_base_url" in text
        return
    before, now = azt.parse_toml(text), azt.parse_toml(after)
    assert azt.codex_route(now) == (mode, URL)
    for name in set(before) | set(now):
        if name not in ("model_provider", "model_providers", "openai_base_url"):
            assert now[name] == before[name]
    assert azt.put_back(after, after, text) == text
    line_end = "\r\n" if "\r\n" in text else "\n"
    added = TRUSTED.replace("\n", line_end)
    assert azt.put_back(after + added, after, text).endswith(added)


# -- Crashes --------------------------------------------------------------------------------------

CRASHER = """
import os, pathlib, sys, azt
folder, text, mode = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
URL = "http://127.0.0.1:8787/codex/v1"
dying = ("open", "fsync", "fchmod", "replace", "close", "unlink", "mkdir")

def die_at(number):
    count = 0
    def guard(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)
        return call
    for name in dying:
        setattr(os, name, guard(getattr(os, name)))

def change(files, mode):
    files.route(mode, URL, False, files.route(mode, URL, False, "")["base"])

for step in ("takeover", "release"):
    for number in range(1, 200):
        home = folder / f"{step}{number}"
        paths = azt.Paths(home / "azt", home / "codex")
        azt.prepare_home(paths)
        paths.codex_home.mkdir()
        paths.codex_config.write_bytes(text.encode())
        files = azt.CodexFiles(paths)
        if step == "release":
            change(files, mode)
        taken = azt.take_over(text, mode, URL)
        child = os.fork()
        if child == 0:
            die_at(number)
            change(files, "" if step == "release" else mode)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = paths.codex_config.read_bytes().decode()
        assert now in (text, taken), (step, number, now)
        assert files.look(URL)["takeover"]["on"] is (now == taken), (step, number)
        change(files, "")
        assert paths.codex_config.read_bytes().decode() == text, (step, number)
        rest = [path.name for path in paths.codex_home.iterdir() if path.suffix != ".tmp"]
        assert rest == ["config.toml"], rest
        print(step, status, "old" if now == text else "new", flush=True)
        if status == 0:
            break
"""


@pytest.mark.parametrize("mode", azt.CODEX_MODES)
def test_a_change_that_is_killed_at_any_call_leaves_old_or_new_and_can_be_released(
    tmp_path: Path, claim: Callable[[int, str], Claim], mode: str
) -> None:
    tries = claim(17, "the same killed at any call: old or new, and releasable")
    command = [sys.executable, "-c", CRASHER, str(tmp_path), CONFIGS["providers"], mode]
    where = {**os.environ, "PYTHONPATH": str(Path(azt.__file__).parent), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    for step, kinds in (("takeover", {"old", "new"}), ("release", {"new", "old"})):
        codes = [code for name, code, _ in outcomes if name == step]
        assert len(codes) > 12
        assert codes[:-1] == ["-9"] * (len(codes) - 1)
        assert {kind for name, _, kind in outcomes if name == step} == kinds
        for name, _, kind in outcomes:
            tries.check(kind in kinds, (name, kind))


def test_a_leftover_of_a_killed_write_goes_with_the_next_one(codex: Codex) -> None:
    codex.has(CONFIGS["comments"])
    leftover = codex.paths.codex_home / ".config.toml.0123456789abcdef.tmp"
    other = codex.paths.codex_home / ".config.toml.tmp"
    leftover.touch()
    other.touch()

    codex.change("openai")

    assert not leftover.exists()
    assert other.exists()


# -- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"model = \n", "config_unusable"),
        (b"model = 'caf\xe9'\n", "config_unusable"),
        (b"a = 1\na = 2\n", "config_unusable"),
        (b"a = " + b"[" * 5000, "config_unusable"),
        (b"#" * (2 * azt.MIB), "not_readable"),
    ],
)
def test_a_broken_config_is_refused_and_said_in_the_status(
    codex: Codex, content: bytes, code: str
) -> None:
    codex.has("").config.write_bytes(content)

    with refused(code) as error:
        codex.change("openai")

    assert "try again" in error.value.message
    assert codex.look()["problem"] == error.value.message
    assert codex.config.read_bytes() == content


def test_a_read_only_config_is_refused_with_what_to_do(codex: Codex) -> None:
    codex.has(CONFIGS["comments"])
    codex.config.chmod(0o444)

    with refused("not_writable") as error:
        codex.change("openai")

    assert "chmod u+w" in error.value.message
    assert codex.text == CONFIGS["comments"]
    assert codex.look()["takeover"]["on"] is False
    codex.change("")
    assert codex.text == CONFIGS["comments"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_in_place_of_the_config_is_refused_at_once(codex: Codex, make: Any) -> None:
    codex.paths.codex_home.mkdir()
    make(codex.config)

    with refused("not_readable"):
        codex.change("openai")


def test_a_file_that_changed_since_the_dry_run_is_not_written(codex: Codex) -> None:
    base = codex.has("a = 1\n").files.route("openai", URL, False, "")["base"]
    codex.has("a = 2\n")

    with refused("file_changed"):
        codex.files.route("openai", URL, False, base)

    assert codex.text == "a = 2\n"


def test_a_file_that_changes_at_the_last_moment_is_not_written(
    codex: Codex, monkeypatch: pytest.MonkeyPatch
) -> None:
    codex.has("a = 1\n")
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (codex.has("a = 2\n"), flush(handle)))

    with refused("file_changed"):
        codex.change("openai")

    assert codex.text == "a = 2\n"
    assert [path.name for path in codex.paths.codex_home.iterdir()] == ["config.toml"]


# -- The status tells the truth -------------------------------------------------------------------


def test_the_status_of_a_codex_that_was_never_there(codex: Codex) -> None:
    state = codex.look()

    assert (state["installed"], state["problem"]) == (False, None)
    assert state["takeover"]["on"] is False
    assert state["takeover"]["baseUrl"] is None
    assert (state["auth"]["exists"], state["auth"]["mode"]) == (False, None)


def test_the_status_knows_on_elsewhere_edited_and_off(codex: Codex) -> None:
    def seen(url: str = URL) -> tuple[Any, ...]:
        route = codex.look(url)["takeover"]
        return tuple(route[name] for name in ("on", "matchesGateway", "editedSince", "baseUrl"))

    codex.has(CONFIGS["comments"])
    assert seen() == (False, False, False, None)
    codex.change("ai-zero-token")
    assert seen() == (True, True, False, URL)
    assert seen(OTHER) == (True, False, False, URL)
    codex.has(codex.text + TRUSTED)
    assert seen() == (True, True, True, URL)
    codex.has(codex.text.replace(URL, "https://elsewhere.example/v1"))
    assert seen() == (False, False, False, "https://elsewhere.example/v1")
    codex.has(CONFIGS["comments"])
    assert seen() == (False, False, False, None)


def test_a_diff_shows_the_change_and_no_secret_beside_it(codex: Codex) -> None:
    codex.has('model_provider = "x" # mine\napi_key = "very-secret-thing"\n[tui]\n')

    diff = codex.files.route("openai", URL, False, "")["diff"]

    assert {"op": "-", "text": 'model_provider = "x" # mine'} in diff
    assert {"op": "+", "text": 'model_provider = "openai" # mine'} in diff
    assert {"op": "+", "text": f'openai_base_url = "{URL}"'} in diff
    assert "very-secret-thing" not in json.dumps(diff)
    assert not codex.paths.codex_backups.exists()


# -- The history of conversations -----------------------------------------------------------------


@pytest.fixture
def history(codex: Codex) -> Iterator[sqlite3.Connection]:
    """The state of a running Codex: two conversations of ours, one of the provider's."""
    codex.has("")
    database = sqlite3.connect(codex.paths.codex_home / "state_5.sqlite")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE threads (id TEXT PRIMARY KEY, model_provider TEXT NOT NULL)")
    database.execute("CREATE INDEX idx ON threads(model_provider)")
    rows = [("a", "ai-zero-token"), ("b", "openai"), ("c", "ai-zero-token"), ("d", "local")]
    database.executemany("INSERT INTO threads VALUES (?, ?)", rows)
    database.commit()
    yield database
    database.close()


def providers(database: sqlite3.Connection) -> dict[str, str]:
    return dict(database.execute("SELECT id, model_provider FROM threads"))


def test_conversations_move_only_when_asked(codex: Codex, history: sqlite3.Connection) -> None:
    assert codex.change("openai")["history"] == {"toMigrate": 2, "note": None}
    codex.change("")
    assert providers(history)["a"] == "ai-zero-token"
    assert codex.backups("state") == []

    assert codex.change("openai", moves=True)["history"]["toMigrate"] == 0

    assert providers(history) == {"a": "openai", "b": "openai", "c": "openai", "d": "local"}
    [copy] = codex.backups("state_5.sqlite")
    path = codex.paths.codex_backups / copy["id"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as kept:
        assert providers(kept)["a"] == "ai-zero-token"
    kept.close()


def test_a_dry_run_moves_nothing(codex: Codex, history: sqlite3.Connection) -> None:
    codex.files.route("openai", URL, True, "")

    assert providers(history)["a"] == "ai-zero-token"


def test_a_locked_history_is_refused_before_anything_is_written(
    codex: Codex, history: sqlite3.Connection
) -> None:
    history.execute("BEGIN IMMEDIATE")

    with refused("history_unusable") as error:
        codex.change("openai", moves=True)

    assert "Close Codex" in error.value.message
    assert codex.text == ""
    history.rollback()
    assert providers(history)["a"] == "ai-zero-token"


def test_a_damaged_history_is_refused(codex: Codex, history: sqlite3.Connection) -> None:
    history.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    history.close()
    path = codex.paths.codex_home / "state_5.sqlite"
    raw = bytearray(path.read_bytes())
    page = raw.rindex(b"ai-zero-token")
    raw[page - 4000 & ~4095 : page + 20] = b"\xff" * len(raw[page - 4000 & ~4095 : page + 20])
    path.write_bytes(raw)

    with refused("history_unusable"):
        codex.change("openai", moves=True)

    assert path.read_bytes() == raw


def test_a_history_whose_pages_disagree_is_refused(
    codex: Codex, history: sqlite3.Connection
) -> None:
    history.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    history.close()
    path = codex.paths.codex_home / "state_5.sqlite"
    raw = bytearray(path.read_bytes())
    raw[36:40] = (7).to_bytes(4, "big")  # so many free pages, says its head
    path.write_bytes(raw)

    with refused("history_unusable") as error:
        codex.change("openai", moves=True)

    assert "it is damaged" in error.value.message
    assert path.read_bytes() == raw


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_an_unknown_history_is_refused_and_noted(codex: Codex, content: bytes) -> None:
    path = codex.has("").paths.codex_home / "state_9.sqlite"
    path.write_bytes(content)

    assert codex.change("openai")["history"]["note"]
    with refused("history_unusable"):
        codex.change("openai", moves=True)

    assert path.read_bytes() == content


# -- The sign-in ----------------------------------------------------------------------------------

SIGN_IN = {"auth_mode": "apikey", "OPENAI_API_KEY": "sk-kept", "agent_identity": "kept", "new": [1]}


def signed_in(codex: Codex, **how: Any) -> Json:
    value: Json = json.loads(codex.auth.read_text())
    return value


def apply(codex: Codex, one: azt.Account) -> Json:
    base = codex.files.apply(one, "")["base"]
    return codex.files.apply(one, base)


def test_an_account_is_written_as_codex_writes_it(codex: Codex) -> None:
    codex.has("")
    one = account()
    one.refreshed_at = 1_763_820_000

    told = apply(codex, one)

    assert signed_in(codex) == {
        "OPENAI_API_KEY": None,
        "auth_mode": "chatgpt",
        "tokens": {
            "id_token": one.id_token,
            "access_token": one.access_token,
            "refresh_token": one.refresh_token,
            "account_id": "acct-1",
        },
        "last_refresh": "2025-11-22T14:00:00Z",
    }
    assert stat.S_IMODE(codex.auth.stat().st_mode) == 0o600
    assert (told["from"], told["to"]) == (None, {"email": "p1@example.com"})
    state = codex.look()["auth"]
    assert (state["accountId"], state["mode"], state["applied"]) == (one.id, "chatgpt", True)
    assert state["lastRefresh"] == 1_763_820_000_000


def test_a_key_and_unknown_fields_stay_and_come_back(codex: Codex) -> None:
    codex.has("")
    codex.auth.write_text(json.dumps(SIGN_IN))
    codex.auth.chmod(0o640)
    raw = codex.auth.read_bytes()

    apply(codex, account())

    now = signed_in(codex)
    assert {name: now[name] for name in SIGN_IN} == SIGN_IN | {"auth_mode": "chatgpt"}
    codex.files.restore("auth.json")
    assert codex.auth.read_bytes() == raw
    assert codex.look()["auth"]["applied"] is False


def test_the_restore_of_a_file_that_was_not_there_takes_it_away(codex: Codex) -> None:
    codex.has("")
    apply(codex, account())

    codex.files.restore("auth.json")

    assert not codex.auth.exists()


def test_a_restore_can_be_undone(codex: Codex) -> None:
    codex.has("")
    apply(codex, account(1))
    apply(codex, account(2))
    raw = codex.auth.read_bytes()

    codex.files.restore("auth.json")
    assert codex.look()["auth"]["email"] == "p1@example.com"
    codex.files.restore("auth.json")

    assert codex.auth.read_bytes() == raw


def test_the_sign_in_before_comes_back_though_one_is_applied_twice(codex: Codex) -> None:
    codex.has("")
    apply(codex, account(1))
    before, second = codex.auth.read_bytes(), account(2)
    for _ in range(2):
        apply(codex, second)

    codex.files.restore("auth.json")

    assert codex.auth.read_bytes() == before


def test_five_backups_are_kept_and_the_first_always(codex: Codex) -> None:
    codex.has("# first\n")
    for mode in ("openai", "") * 5:
        codex.change(mode)

    kept = codex.backups("config.toml")

    assert len(kept) == 5
    first = codex.paths.codex_backups / kept[-1]["id"]
    assert first.read_text() == "# first\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in first.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


def test_a_backup_is_found_by_its_id_and_can_be_deleted(codex: Codex) -> None:
    codex.has("# first\n").change("openai")
    [one] = codex.backups()

    assert codex.files.restore(one["id"])["restored"] == "config.toml"
    assert codex.text == "# first\n"
    codex.files.restore(one["id"], True)
    assert one["id"] not in [kept["id"] for kept in codex.backups()]
    for name in (one["id"], "../../accounts.json", ""):
        with refused("backup_not_found"):
            codex.files.restore(name)


@pytest.mark.parametrize("fields", [{"id_token": ""}, {"id_token": "opaque"}])
def test_an_account_that_codex_could_not_load_is_refused(codex: Codex, fields: Json) -> None:
    codex.has("")

    with refused("account_unusable"):
        apply(codex, account(**fields))

    assert not codex.auth.exists()


def test_an_account_that_has_to_sign_in_again_is_refused(codex: Codex) -> None:
    one = account()
    one.rejected = "refresh_token_reused"

    with refused("account_unusable"):
        codex.files.apply(one, "")


@pytest.mark.parametrize(
    ("store", "there", "is_file"),
    [("file", 0, 1), ("auto", 1, 1), ("auto", 0, 0), ("keyring", 1, 0), ("ephemeral", 1, 0)],
)
def test_a_sign_in_that_codex_keeps_elsewhere_is_not_written(
    codex: Codex, store: str, there: int, is_file: int
) -> None:
    codex.has(f'cli_auth_credentials_store = "{store}"\n')
    if there:
        codex.auth.write_text("{}")

    if is_file:
        assert apply(codex, account())["changed"] is True
    else:
        with refused("not_supported"):
            apply(codex, account())


def test_a_broken_sign_in_file_is_refused(codex: Codex) -> None:
    codex.has("").auth.write_text("{")

    with refused("auth_unusable"):
        apply(codex, account())
    assert codex.look()["problem"]


@pytest.mark.parametrize("content", ['{"last_refresh": "soon"}', '{"tokens": 1}', "[]", ""])
def test_any_sign_in_file_can_be_looked_at(codex: Codex, content: str) -> None:
    codex.has("").auth.write_text(content)

    assert codex.look()["auth"]["lastRefresh"] is None


# -- One sign-in, two programs --------------------------------------------------------------------


def renewed(one: azt.Account) -> azt.Account:
    new = account_file(one.account_id, one.user_id, one.email)
    one.access_token, one.refresh_token = new["access_token"], new["refresh_token"]
    one.refreshed_at += 60
    return one


def test_an_applied_account_is_kept_fresh_without_a_backup(codex: Codex) -> None:
    codex.has("")
    codex.auth.write_text(json.dumps(SIGN_IN))
    one = account()
    apply(codex, one)
    kept, used = codex.backups(), one.refresh_token

    codex.files.follow(renewed(one), used)

    now = signed_in(codex)
    assert now["tokens"]["refresh_token"] == one.refresh_token != used
    assert now["OPENAI_API_KEY"] == "sk-kept"
    assert codex.backups() == kept


def test_only_the_used_up_token_of_an_applied_account_is_replaced(codex: Codex) -> None:
    codex.has("")
    one, two = account(1), account(2)
    apply(codex, one)
    raw, used = codex.auth.read_bytes(), one.refresh_token

    codex.files.follow(two, two.refresh_token)  # another account
    codex.files.follow(renewed(one), "rt_older")  # Codex has renewed it meanwhile
    assert codex.auth.read_bytes() == raw

    codex.files.restore("auth.json")  # taken back: no longer applied
    codex.auth.write_bytes(raw)
    codex.files.follow(one, used)
    assert codex.auth.read_bytes() == raw
    codex.auth.unlink()
    codex.files.follow(one, used)
    assert not codex.auth.exists()


def test_an_imported_sign_in_is_never_written_to_codex_unasked(codex: Codex) -> None:
    one = account()
    codex.has("").auth.write_text(json.dumps(azt.codex_auth({}, one, 0)))
    raw, used = codex.auth.read_bytes(), one.refresh_token

    codex.files.follow(renewed(one), used)

    assert codex.auth.read_bytes() == raw
