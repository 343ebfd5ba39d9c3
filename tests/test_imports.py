"""Accounts in and out over HTTP and by command: previews, imports, exports, labels, undo."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import stat
import struct
import subprocess
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Seen, account_file, make_token
from harness import Answer, Claim, Client, Gateway, make_gateway
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

Json = dict[str, Any]
File = tuple[str, bytes]

ADMIN = "/_gateway/admin"
NOW = 1_800_000_000.0
ADA = account_file()
BO = account_file("acct-2", "user-2", "bo@example.com", "pro")
CY = account_file("acct-3", "user-3", "cy@example.com", "free")
OVER = account_file("acct-4", "user-4", "over@example.com", exp=1_700_000_000)


class Admin(Client):
    """Calls below the administration, with the mark that changes need."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.url)
        self.state = gateway.state
        self.proof = gateway.proof()

    def call(self, method: str, path: str, json: Any = None) -> Answer:
        return self.request(method, ADMIN + path, json, headers=self.proof)

    def send(self, *files: File, query: str = "") -> Answer:
        """An import as the page sends it: a form with files."""
        raw = b"".join(
            b'--b0\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n'
            % (name.encode(), content)
            for name, content in files
        )
        headers = {**self.proof, "Content-Type": "multipart/form-data; boundary=b0"}
        path = f"{ADMIN}/accounts/import{query}"
        return self.request("POST", path, body=raw + b"--b0--\r\n", headers=headers)

    def load(self, payload: Any, query: str = "", **fields: Any) -> Answer:
        return self.call("POST", f"/accounts/import{query}", {"payload": payload, **fields})

    def ids(self, *accounts: Json) -> list[str]:
        done = self.load(list(accounts))
        assert done.status == 200, done.body
        return [one["id"] for one in done.json["items"]]

    def accounts(self) -> list[Json]:
        items: list[Json] = self.call("GET", "/accounts").json["items"]
        return items

    def saved(self) -> dict[str, Json]:
        document = json.loads((self.state / "accounts.json").read_text())
        return {one["email"]: one for one in document["accounts"]}


@pytest.fixture(scope="module")
def running(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path_factory.mktemp("imports"), shared_upstream, accounts=[])
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def admin(running: Gateway, upstream: FakeUpstream) -> Iterator[Admin]:
    """A gateway without accounts; cleared again after the test."""
    made = Admin(running)
    yield made
    if ids := [one["id"] for one in made.accounts()]:
        assert made.call("POST", "/accounts/remove", {"ids": ids}).status == 200


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def zipped(files: dict[str, bytes], **how: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **{"compression": zipfile.ZIP_DEFLATED, **how}) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def refused(answer: Answer, status: int, code: str) -> str:
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    return str(answer.error["message"])


def results(answer: Answer) -> list[str]:
    assert answer.status == 200, answer.body
    assert Counter(answer.json["summary"]) == Counter(
        {"new": 0, "update": 0, "same": 0, "expired": 0, "unreadable": 0}
    ) + Counter(one["result"] for one in answer.json["items"])
    return [one["result"] for one in answer.json["items"]]


# -- Verdicts -------------------------------------------------------------------------------------


def newer(account: Json) -> Json:
    """The same sign-in as the provider gives it a day later."""
    old = json.loads(base64.urlsafe_b64decode(account["access_token"].split(".")[1] + "=="))
    auth = old["https://api.openai.com/auth"]
    who = (auth["chatgpt_account_id"], auth["user_id"], old["email"], auth["chatgpt_plan_type"])
    return account_file(*who, exp=old["exp"] + 86_400)


def test_a_preview_says_what_each_entry_would_do_and_changes_nothing(admin: Admin) -> None:
    admin.ids(ADA, BO)
    before = admin.saved()

    shown = admin.load([ADA, newer(BO), CY, OVER, {**CY, "refresh_token": ""}, 5], "?dryRun=1")

    assert results(shown) == ["same", "update", "new", "expired", "unreadable", "unreadable"]
    assert [one.get("code") for one in shown.json["items"]][4:] == [
        "no_refresh_token",
        "unknown_format",
    ]
    assert shown.json["items"][2] == {
        "index": 2,
        "file": None,
        "id": azt.account_id_of("acct-3", "user-3"),
        "email": "cy@example.com",
        "plan": "free",
        "result": "new",
    }
    assert shown.json["dryRun"] is True
    assert admin.saved() == before
    for account in (ADA, CY, OVER):
        assert account["access_token"] not in shown.body.decode()
        assert account["refresh_token"] not in shown.body.decode()


def test_the_chosen_entries_of_a_preview_are_imported(admin: Admin) -> None:
    shown = admin.load([ADA, {"access_token": "x"}, BO, CY], "?dryRun=1").json

    wanted = {"previewId": shown["previewId"], "indexes": [2, 0]}
    done = admin.call("POST", "/accounts/import", wanted)

    assert results(done) == ["new", "new"]
    assert [one["index"] for one in done.json["items"]] == [2, 0]
    assert [one["email"] for one in admin.accounts()] == ["bo@example.com", "ada@example.com"]
    assert 0 < shown["expiresAt"] - time.time() * 1000 < 901_000


def test_a_whole_preview_with_something_unreadable_imports_nothing(admin: Admin) -> None:
    shown = admin.load([ADA, {"access_token": "x"}], "?dryRun=1").json
    preview = {"previewId": shown["previewId"]}

    told = refused(admin.call("POST", "/accounts/import", preview), 400, "no_refresh_token")

    assert told == "Entry 2: It has no refresh_token. Nothing was imported."
    assert admin.accounts() == []


@pytest.mark.parametrize("name", ["imp_gone", "", None, 5, ["a"]])
def test_a_preview_that_is_gone_says_so(admin: Admin, name: Any) -> None:
    refused(admin.call("POST", "/accounts/import", {"previewId": name}), 404, "preview_expired")


def test_only_the_newest_previews_are_kept(admin: Admin) -> None:
    names = [admin.load(ADA, "?dryRun=1").json["previewId"] for _ in range(azt.SHELF_MAX + 1)]

    first, last = (
        admin.call("POST", "/accounts/import", {"previewId": name}).status
        for name in (names[0], names[-1])
    )

    assert (first, last) == (404, 200)


@pytest.mark.parametrize("indexes", [[1], [-1], [True], ["0"], 0, "0", {"0": 0}, None, [[]]])
def test_an_index_that_is_none_is_refused(admin: Admin, indexes: Any) -> None:
    refused(admin.load(ADA, indexes=indexes), 400, "bad_field")
    assert admin.accounts() == []


def test_no_index_at_all_imports_nothing(admin: Admin) -> None:
    refused(admin.load(ADA, indexes=[]), 400, "nothing_to_import")


def test_an_older_sign_in_never_replaces_a_newer_one(admin: Admin) -> None:
    admin.ids(newer(ADA))
    before = admin.saved()

    done = admin.load([ADA])

    assert results(done) == ["same"]
    assert done.json["items"][0]["code"] == "older"
    assert admin.saved() == before


def test_any_other_sign_in_replaces_a_dead_one() -> None:
    store = azt.AccountStore()
    [dead], [older] = (azt.to_accounts([one], NOW) for one in (newer(ADA), ADA))
    dead.rejected = "refresh_token_reused"
    store.add(dead)
    assert store.add(older, unless_newer=True) == "update"
    assert store.accounts[older.id].rejected == ""
    assert store.accounts[older.id].refresh_token == ADA["refresh_token"]


def test_the_same_sign_in_does_not_revive_a_dead_one() -> None:
    store = azt.AccountStore()
    [dead], [same] = (azt.to_accounts([ADA], NOW) for _ in range(2))
    dead.rejected = "refresh_token_reused"
    store.add(dead)
    store.add(same)
    assert store.accounts[dead.id].rejected == "refresh_token_reused"


@pytest.mark.parametrize("turned", [False, True])
def test_of_one_account_twice_the_newest_is_imported(admin: Admin, turned: bool) -> None:
    both = [ADA, newer(ADA)]

    done = admin.load(both[::-1] if turned else both)

    assert results(done) == ["new", "same" if turned else "update"]
    assert done.json["items"][1].get("code") == ("older" if turned else None)
    assert admin.saved()["ada@example.com"]["access_token"] == both[1]["access_token"]


def test_a_sign_in_always_replaces_what_is_here() -> None:
    store = azt.AccountStore()
    [later], [sooner] = (azt.to_accounts([one], NOW) for one in (newer(ADA), ADA))
    store.add(later)
    assert store.add(sooner) == "update"
    assert store.accounts[sooner.id].access_token == ADA["access_token"]


def test_an_expired_entry_is_imported_all_the_same(admin: Admin) -> None:
    assert results(admin.load(OVER)) == ["expired"]
    assert admin.saved()["over@example.com"]["refresh_token"] == OVER["refresh_token"]


def test_members_of_one_workspace_stay_two(admin: Admin) -> None:
    both = [account_file("team", f"user-{n}", f"m{n}@example.com") for n in (1, 2)]
    assert results(admin.load(both)) == ["new", "new"]
    assert len({one["id"] for one in admin.accounts()}) == 2


def test_what_was_imported_is_checked_when_asked(admin: Admin, upstream: FakeUpstream) -> None:
    done = admin.load([ADA, BO], check=True)

    assert (done.status, done.json["summary"]["new"]) == (202, 2)
    job, until = done.json["job"], time.monotonic() + 10
    while job["state"] == "running" and time.monotonic() < until:
        job = admin.call("GET", f"/jobs/{job['id']}").json
    assert (job["state"], job["done"], job["total"]) == ("done", 2, 2)
    asked = {seen.account for seen in upstream.requests if seen.path.endswith("/wham/usage")}
    assert asked == {"acct-1", "acct-2"}


# -- Files ----------------------------------------------------------------------------------------

NODE = {
    "version": 1,
    "activeProfileId": "openai-codex:acct-3",
    "profiles": {
        "openai-codex:acct-3": {
            "provider": "openai-codex",
            "access": CY["access_token"],
            "refresh": CY["refresh_token"],
            "expires": CY["expires_at"] * 1000,
            "accountId": "acct-3",
        }
    },
}


def test_a_form_of_files_of_every_shape_is_imported(admin: Admin) -> None:
    done = admin.send(
        ("ada.json", raw(ADA)),
        ("many.zip", zipped({"old/b.json": raw([BO]), "__MACOSX/._b.json": b"x"})),
        ("store.json", raw(NODE)),
    )

    assert results(done) == ["new"] * 3
    assert [one["file"] for one in done.json["items"]] == [
        "ada.json",
        "many.zip/old/b.json",
        "store.json",
    ]
    assert [one["email"] for one in admin.accounts()] == [
        "ada@example.com",
        "bo@example.com",
        "cy@example.com",
    ]


def test_each_unreadable_file_of_a_form_is_named(admin: Admin) -> None:
    done = admin.send(
        ("a.json", raw(ADA)),
        ("b.json", b"hello"),
        ("c.zip", b"PK\x03\x04broken"),
        ("d.zip", zipped({"x.json": raw(BO), "y.json": b"torn{"})),
        query="?dryRun=1",
    )

    assert results(done) == ["new", "unreadable", "unreadable", "new", "unreadable"]
    told = [(one["file"], one.get("code")) for one in done.json["items"]]
    assert told[1:3] == [("b.json", "not_json"), ("c.zip", "unknown_format")]
    assert told[4] == ("d.zip/y.json", "not_json")


def test_51_files_are_too_many(admin: Admin) -> None:
    refused(admin.send(*[("a.json", raw(ADA))] * 51), 400, "invalid_body")
    assert results(admin.send(*[("a.json", raw(ADA))] * 50)).count("new") == 1


@pytest.mark.parametrize("path", ["/accounts/export", "/accounts/remove", "/settings"])
def test_no_other_change_takes_a_form(admin: Admin, path: str) -> None:
    headers = {**admin.proof, "Content-Type": "multipart/form-data; boundary=b0"}
    method = "PATCH" if path == "/settings" else "POST"
    answer = admin.request(method, ADMIN + path, body=b"--b0--\r\n", headers=headers)
    refused(answer, 415, "unsupported_media_type")


def test_the_template_is_a_file_that_would_be_read(admin: Admin) -> None:
    template = admin.call("GET", "/accounts/import/template").json
    assert results(admin.load(template, "?dryRun=1")) == ["new"]


# -- Hostile imports ------------------------------------------------------------------------------


def member(name: str, mode: int = 0, content: bytes = b"{}") -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, content)
    return buffer.getvalue()


def patched(mark: bytes, offset: int, value: bytes, content: bytes = b"") -> bytes:
    """A ZIP of one account with some bytes of a header replaced."""
    made = bytearray(zipped({"a.json": content or raw(ADA)}))
    at = made.index(mark) + offset
    made[at : at + len(value)] = value
    return bytes(made)


def overlapping(members: int) -> bytes:
    made = zipped({"a.json": raw(ADA)})
    directory, end = made.index(b"PK\x01\x02"), made.index(b"PK\x05\x06")
    entries = made[directory:end] * members
    counts = struct.pack("<HHIIH", members, members, len(entries), directory, 0)
    return made[:directory] + entries + made[end : end + 8] + counts


def field(name: str, value: Any) -> bytes:
    return raw([{**ADA, name: value}])


def hostile() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for name in (
        *("../a.json", "../../../../tmp/azt-slip.json", "/tmp/azt-slip.json", "..\\a.json"),
        *("C:\\a.json", "a/../../b.json", "\x1b[2J.json", "a\r\nb.json", "x" * 9000 + ".json"),
        *("NUL.json", ".json", "a\0b.json", "accounts.json", ".state/accounts.json"),
    ):
        made[f"a slip: {name[:20]!r}"] = member(name, content=raw(ADA))
    for mode in (0o120777, 0o020666, 0o060666, 0o010666, 0o140777, 0o040755):
        made[f"a member of mode {mode:o}"] = member("a.json", mode, b"/etc/passwd")
    inner = zipped({"a.json": raw(ADA)})
    for depth in (1, 3):
        for name in ("a.zip", "a.json"):
            made[f"{depth} nested {name}"] = zipped({name: inner})
        inner = zipped({"a.json": zipped({"a.json": inner})})
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        made[f"method {method}"] = zipped({"a.json": raw(ADA)}, compression=method)
    for number in (1, 9, 12, 93, 95, 98, 99, 0xFFFF):
        made[f"a lie about method {number}"] = patched(b"PK\x01\x02", 10, struct.pack("<H", number))
    for flag in (1, 0x40, 0x2000, 0xFFFF):
        made[f"flags {flag:x}"] = patched(b"PK\x01\x02", 8, struct.pack("<H", flag))
    for offset in (20, 24, 42):
        for number in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            changed = patched(b"PK\x01\x02", offset, struct.pack("<I", number))
            made[f"field {offset} is {number:x}"] = changed
    for offset, size in ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)):
        changed = patched(b"PK\x05\x06", offset, b"\xff" * size)
        made[f"field {offset} of the end is too large"] = changed
    for members in (2, 500, 65_000):
        made[f"{members} overlapping members"] = overlapping(members)
    made |= {
        "a bomb in one member": zipped({"a.json": bytes(50_000_000)}),
        "a bomb of spaces": zipped({"a.json": b" " * 1_048_577}),
        "a bomb in many members": zipped({f"{n}.json": b" " * 1_000_000 for n in range(40)}),
        "1001 members": zipped({f"{n}.json": raw(ADA) for n in range(1001)}),
        "60,000 empty members": zipped({f"{n}.json": b"" for n in range(60_000)}),
        "a script beside it": zipped({"a.json": raw(ADA), "run.sh": b"rm -rf ~"}),
        "only two letters": b"PK",
        "only the end": b"PK\x05\x06" + bytes(18),
        "a torn zip": zipped({"a.json": raw(ADA)})[:-9],
        "deep lists": b"[" * 60_000 + b"]" * 60_000,
        "deep objects": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
        "65 levels": b"[" * 65 + b"]" * 65,
        "nan expiry": b'[{"expires_at": NaN}]',
        "infinite expiry": b'{"expires_at": -Infinity}',
        "a number of 5,000 digits": b"[%b]" % (b"9" * 5000),
        "1e999999": b'{"access_token": "a", "refresh_token": "b", "expires_at": 1e999999}',
        "not utf-8": b'{"access_token": "\xff\xfe"}',
        "utf-16": json.dumps(ADA).encode("utf-16"),
        "nothing": b"",
        "nulls": bytes(1000),
        "a lone surrogate": b'{"access_token": "\\ud800", "refresh_token": "b"}',
        "a key twice": b'{"access_token": "a", "access_token": {}, "refresh_token": "b"}',
        "1001 accounts": raw([ADA] * 1001),
        "a million nulls": b"[" + b"null," * 1_000_000 + b"null]",
        "profiles of profiles": raw({"profiles": {"profiles": {"profiles": 5}}}),
        "tokens of tokens": raw({"tokens": {"tokens": {"access_token": "a"}}}),
        "an api key": raw({"auth_mode": "apikey", "OPENAI_API_KEY": "sk-secret"}),
        "an agent": raw({"auth_mode": "agentIdentity", "agent_identity": "a.b.c"}),
    }
    for value in (
        None,
        5,
        True,
        [],
        {},
        "",
        "a b",
        "a\r\nx-evil: 1",
        "a\0",
        "ä",
        "猫",
        "a" * 16_385,
    ):
        for name in ("access_token", "refresh_token"):
            made[f"{name} is {value!r:.20}"] = field(name, value)
    for value in (-1, 10**18, 10**400, 1e300, "soon", "9" * 400, [], {}, "9999-12-31", "nan"):
        entry = {"access_token": "a", "refresh_token": "b", "account_id": "c", "expires_at": value}
        made[f"expiry {value!r:.20}"] = raw(entry)
    for value in ("", "../x", "a\r\nb", "a.b", "a" * 129, 5, [], "é"):
        entry = {"access_token": "a", "refresh_token": "b", "account_id": value}
        made[f"account id {value!r:.20}"] = raw(entry)
    return made


HOSTILE = hostile()
SLIPS_IN_NAMES = [name for name in HOSTILE if name.startswith(("a slip", "field", "flags"))]


def test_there_are_at_least_a_hundred_hostile_imports() -> None:
    assert len(HOSTILE) >= 100


def outside(running: Gateway) -> set[str]:
    """Every file in the home that is not azt's state, and what a slip would have made."""
    files = (path for path in running.home.rglob("*") if running.state not in path.parents)
    return {str(path) for path in files} | {str(path) for path in Path("/tmp").glob("azt-slip*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_import_is_refused_and_writes_nothing(
    admin: Admin, running: Gateway, claim: Callable[[int, str], Claim], name: str
) -> None:
    refused = claim(6, "hostile imports refused, nothing written outside the state")
    before, started = outside(running), time.monotonic()

    shown = admin.send(("evil", HOSTILE[name]), query="?dryRun=1")
    done = admin.send(("evil", HOSTILE[name]))

    assert time.monotonic() - started < 5
    is_told = {shown.status, done.status} <= {200, 400, 413}
    refused.check(is_told and outside(running) == before, name)
    assert is_told, done.body
    if name not in SLIPS_IN_NAMES:
        assert done.status in (400, 413), done.body
        assert admin.accounts() == []
    assert outside(running) == before
    files = [path for path in running.state.iterdir() if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    for file in running.state.glob("*.json"):
        assert isinstance(json.loads(file.read_text()), dict)
    for answer in (shown, done):
        assert "sk-secret" not in answer.body.decode()
        assert "\x1b" not in answer.body.decode()


def test_a_hostile_payload_is_refused_as_well(admin: Admin) -> None:
    for name, content in HOSTILE.items():
        try:
            payload = json.loads(content.decode())
        except (ValueError, RecursionError):
            continue
        if len(content) < 100_000:
            answer = admin.load(payload)
            assert answer.status in (400, 413), (name, answer.body)
    assert admin.accounts() == []


def test_many_bombs_in_one_form_stay_within_the_memory(admin: Admin, running: Gateway) -> None:
    bomb = zipped({f"{n}.json": b" " * 1_000_000 for n in range(15)})

    def peak_kib() -> int:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    before = peak_kib()
    answer = admin.send(*[("bomb.zip", bomb)] * 50)
    assert answer.status == 400
    assert peak_kib() - before < 100_000


# -- Export ---------------------------------------------------------------------------------------


def export(admin: Admin, **body: Any) -> Answer:
    return admin.call("POST", "/accounts/export", body)


def test_one_account_is_exported_as_an_object_and_several_as_a_bundle(admin: Admin) -> None:
    ada, bo = admin.ids(ADA, BO)

    one, both = export(admin, ids=["ada@example.com"]), export(admin, all=True)

    assert one.json["refresh_token"] == ADA["refresh_token"]
    assert [entry["account_id"] for entry in both.json["profiles"]] == ["acct-1", "acct-2"]
    day = time.strftime("%Y-%m-%d")
    assert one.headers["content-disposition"] == f'attachment; filename="azt-accounts-{day}.json"'
    assert (one.headers["content-type"], one.headers["cache-control"]) == (
        "application/json",
        "no-store",
    )
    exports = {entry["id"]: entry["exports"] for entry in admin.accounts()}
    assert (exports[ada]["count"], exports[ada]["lastKind"]) == (2, "batch")
    assert (exports[bo]["count"], exports[bo]["lastKind"]) == (1, "batch")
    assert abs(exports[bo]["lastAt"] / 1000 - time.time()) < 60


def test_a_zip_has_one_private_file_for_each_account(admin: Admin) -> None:
    ids = admin.ids(ADA, BO)

    answer = export(admin, ids=ids, format="zip")

    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.namelist() == [f"{one}.json" for one in ids]
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o600}
        assert json.loads(archive.read(f"{ids[0]}.json"))["email"] == "ada@example.com"


def test_an_export_is_one_line_in_the_log_without_a_secret(admin: Admin, running: Gateway) -> None:
    (ada,) = admin.ids(ADA)
    before = len(running.log())
    export(admin, ids=[ada])
    audit = [line for line in running.log()[before:].splitlines() if "audit" in line]
    assert len(audit) == 1 and f"exported as json: {ada}" in audit[0]
    for secret in ("access_token", "refresh_token", "id_token"):
        assert ADA[secret] not in running.log()


@pytest.mark.parametrize("body", [{}, {"ids": []}, {"ids": [""]}, {"all": 1}, {"ids": "a"}])
def test_an_export_of_nobody_in_particular_is_refused(admin: Admin, body: Json) -> None:
    admin.ids(ADA)
    refused(export(admin, **body), 400, "bad_field")
    assert admin.accounts()[0]["exports"] is None


def test_an_export_of_everyone_needs_someone(admin: Admin) -> None:
    refused(export(admin, all=True), 400, "bad_field")


def test_an_unknown_format_or_name_exports_nothing(admin: Admin) -> None:
    (ada,) = admin.ids(ADA)
    refused(export(admin, ids=[ada], format="xml"), 400, "bad_field")
    refused(export(admin, ids=[ada, "nobody"]), 404, "account_not_found")
    assert admin.accounts()[0]["exports"] is None


def test_an_export_needs_proof(admin: Admin) -> None:
    answer = admin.request(
        "POST", f"{ADMIN}/accounts/export", {"all": True}, headers={"X-AZT-Admin": "1"}
    )
    refused(answer, 401, "proof_needed")


token = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
name = st.text(st.characters(codec="utf-8"), max_size=70)
claims = st.fixed_dictionaries(
    {},
    optional={
        "exp": st.integers(-5, 8_000_000_000),
        "email": name,
        "https://api.openai.com/auth": st.fixed_dictionaries(
            {},
            optional={
                "chatgpt_account_id": st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
                "chatgpt_user_id": name,
                "chatgpt_plan_type": name,
            },
        ),
    },
)


def as_token(value: Any) -> str:
    part = base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()
    return f"eyJh.{part}.x"


entries = st.fixed_dictionaries(
    {
        "access_token": token | claims.map(as_token),
        "refresh_token": token,
        "account_id": st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True),
    },
    optional={
        "id_token": token | claims.map(as_token),
        "user_id": name,
        "email": name,
        "plan": name,
        "label": name,
        "priority": st.integers(-1, 1001),
        "expires_at": st.integers(0, 7_258_118_399),
    },
)


def store_of(found: list[Json]) -> azt.AccountStore:
    store = azt.AccountStore()
    for account in azt.to_accounts(found, NOW):
        store.add(account)
    return store


@settings(max_examples=40)
@given(st.lists(entries, min_size=1, max_size=3), st.booleans())
def test_what_is_exported_comes_back_identical(found: list[Json], as_zip: bool) -> None:
    store = store_of(found)
    accounts = list(store.accounts.values())

    back = azt.read_accounts([("", azt.export_accounts(accounts, as_zip))], NOW)

    again = azt.AccountStore()
    for _, account in back:
        assert isinstance(account, azt.Account), account
        again.add(account)
    assert again.accounts == store.accounts


@settings(max_examples=40)
@given(entries, entries)
def test_importing_again_keeps_what_the_person_set(first: Json, second: Json) -> None:
    store = store_of([{**first, "access_token": "a", "user_id": "u", "id_token": ""}])
    [account] = store.accounts.values()
    account.label, account.priority, account.created_at = "Mine", 7, 5
    account.quota, account.exports = {"windows": []}, {"count": 3}
    account.cooldown_until, account.cooldown_reason = int(NOW) + 60, "rate_limited"
    account.rejected, account.last_used_at = "token_revoked", 9
    kept = ("label", "priority", "created_at", "quota", "exports", "cooldown_until", "last_used_at")
    before = {one: getattr(account, one) for one in kept}
    again = {**second, "account_id": first["account_id"], "access_token": "b", "user_id": "u"}

    [newcomer] = azt.to_accounts([{**again, "id_token": ""}], NOW)
    store.add(newcomer)

    [account] = store.accounts.values()
    assert {one: getattr(account, one) for one in kept} == before
    assert (account.access_token, account.rejected) == ("b", "")
    assert account.refresh_token == second["refresh_token"]


# -- Labels and priority --------------------------------------------------------------------------


def patch(admin: Admin, account: str, **fields: Any) -> Answer:
    return admin.call("PATCH", f"/accounts/{account}", fields)


def test_a_label_names_the_account_everywhere(admin: Admin) -> None:
    ada, bo = admin.ids(ADA, BO)

    assert patch(admin, "bo@example.com", label="Büro & 🏠").json["label"] == "Büro & 🏠"

    assert patch(admin, "B%C3%BCRO%20%26%20%F0%9F%8F%A0", priority=3).json["priority"] == 3
    assert admin.call("POST", "/accounts/remove", {"ids": ["büro & 🏠"]}).json["removed"] == 1
    assert [one["id"] for one in admin.accounts()] == [ada]
    assert bo != ada


def test_null_takes_label_and_priority_away(admin: Admin) -> None:
    (ada,) = admin.ids({**ADA, "label": "Work", "priority": 2})
    assert admin.accounts()[0]["label"] == "Work"
    shown = patch(admin, ada, label=None, priority=None).json
    assert (shown["label"], shown["priority"]) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"label": one}
            for one in (5, [], " a", "a ", "a\nb", "\x1b[2J", "a/b", "a\\b", ".", "..")
        ),
        *(
            {"label": one}
            for one in ("x" * 65, "bo@example.com", "BO@example.com", "Taken", "taken")
        ),
        *({"priority": one} for one in (-1, 1001, 1.5, "1", True, [])),
        {"nonsense": 1},
        {"access_token": "x"},
        {"label": "good", "priority": "bad"},
    ],
)
def test_a_label_or_priority_that_is_none_changes_nothing(admin: Admin, fields: Json) -> None:
    ada, bo = admin.ids(ADA, BO)
    patch(admin, bo, label="Taken")
    before = admin.saved()

    refused(patch(admin, ada, **fields), 400, "bad_field")

    assert admin.saved() == before


def test_an_account_keeps_its_own_label_and_may_change_its_case(admin: Admin) -> None:
    (ada,) = admin.ids({**ADA, "label": "work"})
    assert patch(admin, ada, label="Work").json["label"] == "Work"
    assert patch(admin, ada, label="ada@example.com").status == 200


def test_a_label_that_is_taken_is_not_imported(admin: Admin) -> None:
    admin.ids({**ADA, "label": "Work"}, {**BO, "label": "WORK"})
    assert [one["label"] for one in admin.accounts()] == ["Work", None]


# -- Undo -----------------------------------------------------------------------------------------


def test_a_removal_is_undone_with_everything_that_was_set(admin: Admin) -> None:
    ada, bo = admin.ids(ADA, BO)
    patch(admin, ada, label="Mine", priority=4)
    before = admin.saved()
    removed = admin.call("POST", "/accounts/remove", {"ids": [ada]}).json
    state = admin.call("GET", "/state").json

    done = admin.call("POST", "/accounts/restore", {"token": removed["undo"]["token"]})

    assert removed["activeId"] == bo
    assert state["removed"][-1] == {"label": "Mine", "count": 1, **removed["undo"]}
    assert (done.json["restored"], done.json["accounts"][0]["label"]) == (1, "Mine")
    assert admin.saved() == before
    assert [one["active"] for one in admin.accounts() if one["id"] == ada] == [True]
    assert removed["undo"]["token"] not in json.dumps(admin.call("GET", "/state").json)


def test_an_undo_leaves_the_choice_that_was_made_since(admin: Admin) -> None:
    ada, _, cy = admin.ids(ADA, BO, CY)
    token = admin.call("POST", "/accounts/remove", {"ids": [ada]}).json["undo"]["token"]
    admin.call("POST", f"/accounts/{cy}/activate", {})

    admin.call("POST", "/accounts/restore", {"token": token})

    assert [one["id"] for one in admin.accounts() if one["active"]] == [cy]


def test_an_undo_keeps_what_was_imported_since(admin: Admin) -> None:
    (ada,) = admin.ids(ADA)
    token = admin.call("POST", "/accounts/remove", {"ids": [ada]}).json["undo"]["token"]
    later = newer(ADA)
    admin.ids(later)

    done = admin.call("POST", "/accounts/restore", {"token": token})

    assert done.json["restored"] == 0
    assert admin.saved()["ada@example.com"]["access_token"] == later["access_token"]


@pytest.mark.parametrize("token", ["und_gone", "", None, 5, {}])
def test_an_undo_that_is_gone_says_so(admin: Admin, token: Any) -> None:
    refused(admin.call("POST", "/accounts/restore", {"token": token}), 404, "undo_expired")


def test_an_undo_works_once(admin: Admin) -> None:
    (ada,) = admin.ids(ADA)
    token = admin.call("POST", "/accounts/remove", {"ids": [ada]}).json["undo"]["token"]
    answers = [admin.call("POST", "/accounts/restore", {"token": token}) for _ in range(2)]
    assert [one.status for one in answers] == [200, 404]


def test_what_is_kept_for_a_while_goes_by_itself() -> None:
    async def main() -> tuple[int, int]:
        shelf: dict[str, Any] = {}
        names = {azt._shelve(shelf, "a", 0.01)["token"] for _ in range(azt.SHELF_MAX + 1)}
        kept = len(shelf)
        assert len(names) == azt.SHELF_MAX + 1 and set(shelf) < names
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, later.set)
        await later.wait()
        return kept, len(shelf)

    assert asyncio.run(main()) == (azt.SHELF_MAX, 0)


# -- Beside a renewal -----------------------------------------------------------------------------


def renewing(
    admin: Admin, upstream: FakeUpstream, meanwhile: Any, account: Json
) -> tuple[str, Answer]:
    """Do something while the sign-in of `account` is being renewed; the new refresh token."""
    begun, go, given = threading.Event(), threading.Event(), []

    def rotate(seen: Seen) -> Json:
        begun.set()
        assert go.wait(10)
        tokens = upstream.rotate(seen)
        given.append(tokens["refresh_token"])
        return tokens

    upstream.script(path="/oauth/token", json=rotate)
    asking = threading.Thread(target=admin.chat)
    asking.start()
    assert begun.wait(10)
    try:
        answer = meanwhile()
    finally:
        go.set()
        asking.join()
    return given[0], answer


EXPIRING = account_file(exp=1_700_000_000)


def test_a_label_set_during_a_renewal_loses_neither(admin: Admin, upstream: FakeUpstream) -> None:
    (ada,) = admin.ids(EXPIRING)
    new, _ = renewing(admin, upstream, lambda: patch(admin, ada, label="Mine"), EXPIRING)
    saved = admin.saved()["ada@example.com"]
    assert (saved["refresh_token"], saved["label"]) == (new, "Mine")


def test_an_account_removed_during_its_renewal_does_not_come_back_but_can_be_restored(
    admin: Admin, upstream: FakeUpstream
) -> None:
    (ada,) = admin.ids(EXPIRING)
    remove = {"ids": [ada]}
    new, done = renewing(
        admin, upstream, lambda: admin.call("POST", "/accounts/remove", remove), EXPIRING
    )
    assert admin.saved() == {}
    admin.call("POST", "/accounts/restore", {"token": done.json["undo"]["token"]})
    assert admin.saved()["ada@example.com"]["refresh_token"] == new


def test_a_new_sign_in_imported_during_a_renewal_stays(
    admin: Admin, upstream: FakeUpstream
) -> None:
    admin.ids(EXPIRING)
    fresh = account_file()
    renewing(admin, upstream, lambda: admin.load(fresh), EXPIRING)
    assert admin.saved()["ada@example.com"]["refresh_token"] == fresh["refresh_token"]


def test_another_access_token_imported_during_a_renewal_does_not_lose_the_new_refresh_token(
    admin: Admin, upstream: FakeUpstream
) -> None:
    admin.ids(EXPIRING)
    shared = {**account_file(), "refresh_token": EXPIRING["refresh_token"]}
    new, _ = renewing(admin, upstream, lambda: admin.load(shared), EXPIRING)
    assert admin.saved()["ada@example.com"]["refresh_token"] == new


# -- Commands -------------------------------------------------------------------------------------


@pytest.fixture(params=["with a server", "without a server"])
def place(request: pytest.FixtureRequest, home: Path, upstream: FakeUpstream) -> Iterator[Gateway]:
    gateway = Gateway(home, upstream.environment(), ["--host", "127.0.0.1", "--port", "0"])
    if request.param == "with a server":
        gateway.start()
    yield gateway
    if gateway.url:
        gateway.stop()


@pytest.fixture
def idle(home: Path, upstream: FakeUpstream) -> Gateway:
    """A home without a server."""
    return Gateway(home, upstream.environment(), [])


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    return done.stdout


def failed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode in (1, 2) and not done.stdout, (done.stdout, done.stderr)
    assert done.stderr.startswith("azt: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_the_way_of_accounts_from_one_machine_to_another(place: Gateway, tmp_path: Path) -> None:
    (place.home / "both.json").write_bytes(raw([ADA, BO]))
    (place.home / "bad.json").write_bytes(raw({"access_token": "x"}))

    preview = good(place.azt("accounts", "import", "both.json", "bad.json", "--dry-run"))
    assert [line.split()[0] for line in preview.splitlines()] == [
        *("RESULT", "new", "new", "unreadable")
    ]
    assert "It has no refresh_token." in preview
    assert json.loads(good(place.azt("accounts", "list", "--json")))["total"] == 0

    good(place.azt("accounts", "import", "both.json"))
    assert " Büro " in good(place.azt("accounts", "label", "bo@example.com", "Büro"))
    assert " ada@example.com " in good(place.azt("accounts", "label", "ada@example.com", ""))
    printed = good(place.azt("accounts", "export", "--all", "-o", "-"))

    other = Gateway(tmp_path / "other", {}, [])
    other.home.mkdir()
    good(other.azt("accounts", "import", "-", input=printed))
    listed = json.loads(good(other.azt("accounts", "list", "--json")))["items"]
    assert [(one["email"], one["label"]) for one in listed] == [
        ("ada@example.com", None),
        ("bo@example.com", "Büro"),
    ]
    saved = json.loads((other.state / "accounts.json").read_text())["accounts"]
    assert [one["refresh_token"] for one in saved] == [
        ADA["refresh_token"],
        BO["refresh_token"],
    ]


def test_an_exported_file_is_private_and_never_written_over(idle: Gateway) -> None:
    (idle.home / "both.json").write_bytes(raw([ADA, BO]))
    good(idle.azt("accounts", "import", "both.json"))
    day = time.strftime("%Y-%m-%d")
    before = os.umask(0)
    try:
        told = good(idle.azt("accounts", "export", "ada@example.com"))
    finally:
        os.umask(before)
    file = idle.home / f"azt-accounts-{day}.json"

    assert file.name in told
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["email"] == "ada@example.com"
    assert "--force" in failed(idle.azt("accounts", "export", "bo@example.com"))
    assert json.loads(file.read_text())["email"] == "ada@example.com"
    shown = good(idle.azt("accounts", "export", "bo@example.com", "--force", "--json"))
    assert json.loads(shown) == {"file": file.name, "format": "json"}
    assert json.loads(file.read_text())["email"] == "bo@example.com"
    good(idle.azt("accounts", "export", "--all", "--zip", "-o", "all.zip"))
    assert zipfile.is_zipfile(idle.home / "all.zip")
    listed = json.loads(good(idle.azt("accounts", "list", "--json")))["items"]
    assert [one["exports"]["count"] for one in listed] == [2, 2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export", "Name the accounts"),
        ("export --all ada", "Name the accounts"),
        ("export --all --zip -o -", "Name the accounts"),
        ("export nobody -o x.json", "No account matches"),
        ("label nobody x", "No account matches"),
        ("label ada@example.com a/b", "without slashes"),
        ("import missing.json", "cannot be read"),
        ("import .", "cannot be read"),
    ],
)
def test_wrong_use_is_explained_and_writes_nothing(idle: Gateway, words: str, told: str) -> None:
    (idle.home / "ada.json").write_bytes(raw(ADA))
    good(idle.azt("accounts", "import", "ada.json"))
    before = {path.name for path in idle.home.iterdir()}

    assert told in failed(idle.azt("accounts", *words.split()))

    assert {path.name for path in idle.home.iterdir()} == before


def test_a_closed_input_is_explained(idle: Gateway) -> None:
    command = "exec 0<&-; exec python3 -m azt accounts import -"
    done = subprocess.run(
        ["bash", "-c", command.replace("python3", os.sys.executable)],
        env=idle.environment,
        cwd=idle.home,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "cannot be read" in failed(done)


def test_two_commands_at_once_lose_nothing(place: Gateway) -> None:
    people = [account_file(f"acct-{n}", f"user-{n}", f"p{n}@example.com") for n in range(4)]
    for number, one in enumerate(people):
        (place.home / f"{number}.json").write_bytes(raw(one))
    command = ["accounts", "import"]

    def run(number: int) -> None:
        done.append(place.azt(*command, f"{number}.json"))

    done: list[Any] = []
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 4
    assert json.loads(good(place.azt("accounts", "list", "--json")))["total"] == 4


def test_a_file_with_a_strange_name_is_imported(idle: Gateway) -> None:
    names = ['a"b.json', "ü 猫.json", "a;b\\c.json", f"{'x' * 200}.json"]
    for number, file in enumerate(names):
        (idle.home / file).write_bytes(raw(account_file(f"a-{number}", "u", "x@example.com")))
    items = json.loads(good(idle.azt("accounts", "import", *names, "--json")))["items"]
    assert [one["file"] for one in items] == [*names[:3], names[3][-80:]]


def test_random_bytes_never_fail_the_server(admin: Admin) -> None:
    chance = random.Random(5)
    good_zip = zipped({"a.json": raw(ADA), "b.json": raw([make_token()])})
    for _ in range(60):
        content = bytearray(good_zip)
        for _ in range(chance.randint(1, 6)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        answer = admin.send(("x", bytes(content)), query="?dryRun=1")
        assert answer.status in (200, 400), answer.body
