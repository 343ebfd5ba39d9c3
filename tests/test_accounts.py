"""Who is signed in: every shape of an account file, hostile ones too, and finding accounts."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from fake_upstream import account_file, make_token
from hypothesis import given, settings
from hypothesis import strategies as st

import azt

Json = dict[str, Any]

NOW = 1_800_000_000.0
EXP = 1_900_000_000


def entry(**fields: Any) -> Json:
    return {**account_file(exp=EXP), **fields}


def opaque(**fields: Any) -> Json:
    """An entry whose tokens say nothing about themselves."""
    plain = {"access_token": "opaque-a", "refresh_token": "opaque-r", "account_id": "acct-9"}
    return {**plain, **fields}


def found(document: Any) -> list[Any]:
    """An account, or why there is none, for each entry of a file."""
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return [one for _, one in azt.read_accounts([("", raw)], NOW)]


def read(document: Any) -> list[azt.Account]:
    accounts = found(document)
    assert all(isinstance(one, azt.Account) for one in accounts), accounts
    return accounts


def refused(document: Any) -> azt.BadRequest:
    """Why the one entry, or the whole file, is unreadable."""
    try:
        [error] = found(document)
    except azt.BadRequest as whole:
        return whole
    assert isinstance(error, azt.BadRequest), error
    return error


def zipped(files: dict[str, Any], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(
                name, content if isinstance(content, bytes) else json.dumps(content).encode()
            )
    return raw.getvalue()


def jwt(claims: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part(claims)}.x"


# -- Shapes ---------------------------------------------------------------------------------------

ONE = entry()
CODEX = {
    "auth_mode": "chatgpt",
    "OPENAI_API_KEY": None,
    "tokens": {
        "id_token": make_token(exp=EXP),
        "access_token": make_token(exp=EXP),
        "refresh_token": "rt_codex",
        "account_id": "acct-1",
    },
    "last_refresh": "2026-11-22T20:07:07.344251161Z",
}

SHAPES: dict[str, Any] = {
    "one object": ONE,
    "an array": [ONE],
    "profiles": {"profiles": [ONE], "activeProfileId": "x"},
    "codex": CODEX,
    "codex without an account id": {**CODEX, "tokens": {**CODEX["tokens"], "account_id": None}},
    "an array of codex files": [CODEX],
    "camel case": {
        "accessToken": ONE["access_token"],
        "refreshToken": ONE["refresh_token"],
        "idToken": ONE["id_token"],
        "accountId": "acct-1",
        "expiresAt": EXP,
    },
    "node": {
        "access": ONE["access_token"],
        "refresh": ONE["refresh_token"],
        "accountId": "acct-1",
        "expires": EXP * 1000,
    },
    "without an id token": {name: ONE[name] for name in ("access_token", "refresh_token")},
    "with a byte order mark": b"\xef\xbb\xbf" + json.dumps(ONE).encode(),
    "a zip": zipped({"a.json": ONE}),
    "a stored zip": zipped({"a.json": ONE}, zipfile.ZIP_STORED),
    "a zip of a codex file in folders": zipped({"home/": b"", "home/.codex/auth.json": CODEX}),
    "a zip with what macs add": zipped({"a.json": ONE, "__MACOSX/._a.json": b"", "._b": b""}),
}


@pytest.mark.parametrize("document", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_the_same_account(document: Any) -> None:
    [account] = read(document)
    assert account.account_id == "acct-1"
    assert account.user_id == "user-1"
    assert account.id == azt.account_id_of("acct-1", "user-1")
    assert account.email == "ada@example.com"
    assert account.plan == "plus"
    assert account.expires_at == EXP
    assert account.created_at == int(NOW)
    assert account.access_token and account.refresh_token
    assert account.rejected == ""


def test_a_zip_of_many_files_gives_all_accounts_in_order() -> None:
    files = {f"{n}.json": [entry(account_id="x", label=f"l{n}")] for n in range(3)}
    assert [account.label for account in read(zipped(files))] == ["l0", "l1", "l2"]


def test_label_and_email_of_the_entry_are_taken_where_the_tokens_say_nothing() -> None:
    [account] = read(opaque(label="work", email="ada@example.com"))
    assert (account.label, account.email) == ("work", "ada@example.com")
    assert (account.account_id, account.user_id, account.plan) == ("acct-9", "", "unknown")


def test_the_email_of_the_tokens_wins() -> None:
    [account] = read(entry(email="other@example.com"))
    assert account.email == "ada@example.com"


def test_the_email_may_stand_in_the_profile_claim() -> None:
    claims = {
        "https://api.openai.com/profile": {"email": "p@example.com"},
        "https://api.openai.com/auth": {"chatgpt_account_id": "a"},
    }
    [account] = read(opaque(access_token=jwt(claims)))
    assert account.email == "p@example.com"


def test_proxy_and_base_url_of_an_entry_are_ignored() -> None:
    [account] = read(entry(proxy="http://evil:1", base_url="http://evil", rejected="x", id="acc_0"))
    assert "evil" not in repr(account)
    assert account.rejected == ""
    assert account.id == azt.account_id_of("acct-1", "user-1")


def test_no_token_shows_in_a_repr() -> None:
    [account] = read(ONE)
    shown = repr(account) + repr(azt.Credentials(account.access_token, "a"))
    for secret in (account.access_token, account.refresh_token, account.id_token):
        assert secret not in shown


# -- Identity -------------------------------------------------------------------------------------


def test_two_members_of_one_workspace_are_two_accounts() -> None:
    first, second = read(
        [account_file("team", "user-1", exp=EXP), account_file("team", "user-2", exp=EXP)]
    )
    assert first.account_id == second.account_id
    assert first.id != second.id


def test_one_person_in_two_workspaces_is_two_accounts() -> None:
    first, second = read([account_file("a", "u", exp=EXP), account_file("b", "u", exp=EXP)])
    assert first.id != second.id


def test_the_id_is_short_and_stable() -> None:
    assert azt.account_id_of("acct-1", "user-1") == azt.account_id_of("acct-1", "user-1")
    assert azt.account_id_of("a", "b").startswith("acc_")
    assert len(azt.account_id_of("a" * 100, "b" * 100)) == 14


def test_the_account_id_of_the_token_wins_over_that_of_the_file() -> None:
    [account] = read(entry(account_id="someone-else"))
    assert account.account_id == "acct-1"


# -- Expiry ---------------------------------------------------------------------------------------

EXPIRY = {
    "seconds": ({"expires_at": EXP}, EXP),
    "milliseconds": ({"expires_at": EXP * 1000}, EXP),
    "a float": ({"expires_at": EXP + 0.9}, EXP),
    "a text of digits": ({"expires_at": str(EXP)}, EXP),
    "an iso date": ({"expired": "2030-03-17T17:46:40Z"}, EXP),
    "an iso date with an offset": ({"expired": "2030-03-17T19:46:40+02:00"}, EXP),
    "an iso date with nanoseconds": ({"expired": "2030-03-17T17:46:40.344251161Z"}, EXP),
    "zero": ({"expires_at": 0}, 0),
    "null": ({"expires_at": None}, 0),
    "a boolean": ({"expired": False}, 0),
    "nothing": ({}, 0),
}


@pytest.mark.parametrize("fields, expires_at", EXPIRY.values(), ids=EXPIRY)
def test_the_expiry_is_read_in_every_form(fields: Json, expires_at: int) -> None:
    [account] = read(opaque(**fields))
    assert account.expires_at == expires_at


def test_the_expiry_of_the_token_wins() -> None:
    [account] = read(entry(expires_at=5))
    assert account.expires_at == EXP


@pytest.mark.parametrize(
    "value",
    [
        *(-1, 7_258_118_400, 10**15, 10**400, 1e300, -1e300, "soon", "", "nan", "inf", [], {}),
        *("9" * 400, "0001-01-01", "9999-12-31T23:59:59Z", "2030-13-01"),
    ],
)
def test_an_expiry_outside_of_1970_to_2200_is_refused(value: Any) -> None:
    assert refused(opaque(expires_at=value)).code == "bad_expiry"


@pytest.mark.parametrize(
    "exp", [float("nan"), float("inf"), -1e308, 10**400, -5, 10**18, "soon", True, None, [], {}]
)
def test_an_odd_expiry_inside_a_token_is_as_good_as_none(exp: Any) -> None:
    token = jwt({"exp": exp, "https://api.openai.com/auth": {"chatgpt_account_id": "a"}})
    [account] = read(opaque(access_token=token))
    assert account.expires_at == 0


# -- Claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token", ["", "a", "a.b", "a.b.c", "a.e30", "...", "é.é.é", jwt([1]), jwt(None), jwt("x")]
)
def test_a_token_that_is_no_jwt_has_no_claims(token: str) -> None:
    assert azt.token_claims(token) == {}


def test_a_deep_token_has_no_claims() -> None:
    deep = base64.urlsafe_b64encode(b'{"a":' + b"[" * 100_000).decode()
    assert azt.token_claims(f"x.{deep}.y") == {}


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_claims_of_any_type_never_crash_the_import(value: Any) -> None:
    claims = {
        "email": value,
        "exp": value,
        "https://api.openai.com/profile": value,
        "https://api.openai.com/auth": {
            "chatgpt_account_id": "a",
            "chatgpt_user_id": value,
            "chatgpt_plan_type": value,
        },
    }
    for token in (jwt(claims), jwt({**claims, "https://api.openai.com/auth": value})):
        [account] = read(opaque(access_token=token))
        assert len(account.email) <= 256 and len(account.plan) <= 64 and len(account.user_id) <= 256


@pytest.mark.parametrize("field", ["email", "label"])
def test_what_is_shown_holds_no_controls_and_is_short(field: str) -> None:
    [account] = read(opaque(**{field: "\x1b[31mada\r\n\u2028" + "x" * 1000}))
    assert getattr(account, field).startswith("[31mada")
    assert getattr(account, field).isprintable()
    assert len(getattr(account, field)) == {"email": 256, "label": 64}[field]


def test_what_the_tokens_say_holds_no_controls_either() -> None:
    auth = {"chatgpt_account_id": "a", "chatgpt_plan_type": "pl\x1b[31mus\n"}
    token = jwt({"email": "\x1b[2Jada@example.com\n", "https://api.openai.com/auth": auth})
    [account] = read(opaque(access_token=token))
    assert account.email == "[2Jada@example.com"
    assert account.plan == "pl[31mus"


# -- Refused entries ------------------------------------------------------------------------------

BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "an empty object": ({}, "no_access_token"),
    "no refresh token": ({"access_token": "a"}, "no_refresh_token"),
    "an empty refresh token": (opaque(refresh_token=""), "no_refresh_token"),
    "an api key file": ({"OPENAI_API_KEY": "sk-x", "tokens": None}, "no_access_token"),
    "a token with a line end": (opaque(access_token="a\r\nx: y"), "unknown_format"),
    "a token with a space": (opaque(refresh_token="a b"), "unknown_format"),
    "a token with an umlaut": (opaque(access_token="ä"), "unknown_format"),
    "a token with a nul": (opaque(access_token="a\0"), "unknown_format"),
    "a number as a token": (opaque(access_token=5), "unknown_format"),
    "a list as a token": (opaque(refresh_token=["a"]), "unknown_format"),
    "an object as an id token": (opaque(id_token={"a": 1}), "unknown_format"),
    "a huge token": (opaque(access_token="a" * 16_385), "unknown_format"),
    "no account id": (opaque(account_id=None), "no_account_id"),
    "an account id with a line end": (opaque(account_id="a\r\nb"), "no_account_id"),
    "an account id with a dot": (opaque(account_id="a.b"), "no_account_id"),
    "a long account id": (opaque(account_id="a" * 129), "no_account_id"),
    "a number as an account id": (opaque(account_id=5), "no_account_id"),
    "a number": (5, "unknown_format"),
    "a text": ("hello", "unknown_format"),
    "null": (None, "unknown_format"),
    "an array of texts": (["a"], "unknown_format"),
    "profiles of numbers": ({"profiles": [5]}, "unknown_format"),
    "too many": ([opaque()] * 1001, "too_large"),
}


@pytest.mark.parametrize("document, code", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_refused_with_its_reason(document: Any, code: str) -> None:
    error = refused(document)
    assert (error.status, error.code, error.param) == (400, code, "file")


def test_a_bad_entry_stands_in_its_place_among_good_ones() -> None:
    first, second, third = found([opaque(), opaque(access_token="a b"), opaque()])
    assert (first.account_id, second.code, third.account_id) == (
        "acct-9",
        "unknown_format",
        "acct-9",
    )


def test_no_token_stands_in_an_error() -> None:
    assert "s3cr3t" not in refused([opaque(access_token="s3cr3t\n")]).message


def test_a_thousand_accounts_fit() -> None:
    assert len(read([opaque()] * 1000)) == 1000


BAD_DOCUMENTS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"hello",
    "torn": json.dumps(ONE).encode()[:-5],
    "two": json.dumps(ONE).encode() * 2,
    "not utf-8": b'{"a": "\xff"}',
    "utf-16": json.dumps(ONE).encode("utf-16"),
    "deep": b"[" * 100_000,
    "65 levels": b"[" * 65 + b"]" * 65,
    "nan": b'{"expires_at": NaN}',
    "infinity": b'[{"expires_at": Infinity}]',
    "a huge number": b'{"expires_at": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("raw", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    assert refused(raw).code == "not_json"
    assert refused(zipped({"a.json": raw})).code == "not_json"


def test_a_number_of_4000_digits_crashes_nothing() -> None:
    assert refused(b'[{"access_token": %b}]' % (b"9" * 4000)).code in (
        "no_refresh_token",
        "unknown_format",
    )


def test_a_file_above_16_mib_is_refused_unread() -> None:
    assert refused(b"[" + b" " * (16 * azt.MIB)).code == "too_large"


# -- Hostile archives -----------------------------------------------------------------------------


def patched(raw: bytes, change: Callable[[zipfile.ZipInfo], None]) -> bytes:
    """The archive with one more member whose description `change` has altered."""
    buffer = io.BytesIO(raw)
    with zipfile.ZipFile(buffer, "a") as archive:
        info = zipfile.ZipInfo("x.json")
        archive.writestr(info, json.dumps(ONE))
        change(info)
    return buffer.getvalue()


def with_mode(mode: int) -> bytes:
    def change(info: zipfile.ZipInfo) -> None:
        info.external_attr = mode << 16

    return patched(zipped({}), change)


def overlapping(members: int) -> bytes:
    """Many directory entries that point at one and the same data."""
    raw = zipped({"a.json": ONE})
    directory = raw.index(b"PK\x01\x02")
    end = raw.index(b"PK\x05\x06")
    entries = raw[directory:end] * members
    counts = struct.pack("<HHIIH", members, members, len(entries), directory, 0)
    return raw[:directory] + entries + raw[end : end + 8] + counts


def header_beyond_the_end() -> bytes:
    raw = bytearray(zipped({"a.json": ONE}))
    at = raw.index(b"PK\x01\x02") + 42
    raw[at : at + 4] = struct.pack("<I", len(raw) - 3)
    return bytes(raw)


def lying_about_its_size() -> bytes:
    raw = bytearray(zipped({"a.json": b" " * 5_000_000}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = raw.index(mark) + offset
        raw[at : at + 4] = struct.pack("<I", 100)
    return bytes(raw)


def encrypted() -> bytes:
    raw = bytearray(zipped({"a.json": ONE}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = raw.index(mark) + offset
        raw[at] |= 1
    return bytes(raw)


def nameless() -> bytes:
    """The directory calls the name of its only member a comment."""
    raw = bytearray(zipped({"a.json": ONE}))
    at = raw.index(b"PK\x01\x02")
    raw[at + 28 : at + 34] = struct.pack("<HHH", 0, 0, len("a.json"))
    return bytes(raw)


def corrupted() -> bytes:
    raw = bytearray(zipped({"a.json": ONE}))
    at = raw.index(b"PK\x03\x04") + 60
    raw[at : at + 20] = bytes(20)
    return bytes(raw)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "no zip after all": lambda: b"PK\x03\x04 hello",
    "only the two letters": lambda: b"PK",
    "cut": lambda: zipped({"a.json": ONE})[:-10],
    "a bomb in one member": lambda: zipped({"a.json": b" " * (1024 * 1024 + 1)}),
    "a bomb of 15 MiB": lambda: zipped({"a.json": bytes(15_000_000)}),
    "a bomb in many members": lambda: zipped(
        {f"{n}.json": b" " * 1_000_000 + json.dumps(ONE).encode() for n in range(20)}
    ),
    "too many members": lambda: zipped({f"{n}.json": ONE for n in range(1001)}),
    "overlapping members": lambda: overlapping(2),
    "hundreds of overlapping members": lambda: overlapping(999),
    "a lie about its size": lying_about_its_size,
    "encrypted": encrypted,
    "bzip2": lambda: zipped({"a.json": ONE}, zipfile.ZIP_BZIP2),
    "lzma": lambda: zipped({"a.json": ONE}, zipfile.ZIP_LZMA),
    "a zip in a zip": lambda: zipped({"b.zip": zipped({"a.json": ONE})}),
    "a zip that calls itself json": lambda: zipped({"b.json": zipped({"a.json": ONE})}),
    "another file beside it": lambda: zipped({"a.json": ONE, "run.sh": b"rm -rf /"}),
    "a symlink": lambda: with_mode(0o120777),
    "a device": lambda: with_mode(0o020666),
    "a pipe": lambda: with_mode(0o010666),
    "a header beyond the end": header_beyond_the_end,
    "corrupted data": corrupted,
    "a member without a name": nameless,
    "nothing in it": lambda: zipped({}),
    "only folders": lambda: zipped({"a/": b"", "a/b/": b""}),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_at_once(make: Callable[[], bytes]) -> None:
    raw = make()
    started = time.monotonic()
    accounts = found(raw)
    assert time.monotonic() - started < 2
    assert all(isinstance(one, azt.BadRequest) and one.status == 400 for one in accounts)


SLIPS = [
    *(
        "../../etc/passwd.json",
        "/etc/passwd.json",
        "..\\..\\x.json",
        "C:\\x.json",
        "a/../../x.json",
    ),
    *("con.json", ".json", "\x1b[2Jx.json", "a\r\nSet-Cookie: x.json", "x" * 5000 + ".json"),
]


@pytest.mark.parametrize("name", SLIPS)
def test_the_names_in_an_archive_reach_no_file_system(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def no_file(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a file was opened")

        raw = zipped({name: ONE})
        patch.setattr("builtins.open", no_file)
        patch.setattr("io.open", no_file)
        patch.setattr("os.open", no_file)
        assert len(read(raw)) == 1


@pytest.mark.parametrize("name", SLIPS)
def test_a_name_in_a_message_is_short_and_harmless(name: str) -> None:
    told = refused(zipped({name: b"not json"})).message
    assert told.isprintable()
    assert len(told) < 200


@pytest.mark.parametrize("name", SLIPS)
def test_a_name_in_a_message_about_the_archive_is_short_too(name: str) -> None:
    raw = bytearray(zipped({name: ONE}, zipfile.ZIP_STORED))
    at = raw.index(b"access_token")
    raw[at] ^= 1
    told = refused(bytes(raw)).message
    assert told.isprintable()
    assert len(told) < 200


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_a_damaged_archive_gives_accounts_or_a_refusal(seed: int) -> None:
    chance = random.Random(seed)
    raw = bytearray(zipped({"a.json": ONE, "b.json": [ONE]}, chance.choice((0, 8))))
    for _ in range(chance.randint(1, 4)):
        raw[chance.randrange(2, len(raw))] = chance.randrange(256)
    if chance.random() < 0.3:
        del raw[chance.randrange(2, len(raw)) :]
    kinds = {type(one) for one in found(bytes(raw))}
    assert kinds <= {azt.Account, azt.BadRequest}


# -- The store ------------------------------------------------------------------------------------


def store_of(*entries: Json) -> azt.AccountStore:
    store = azt.AccountStore()
    for account in read(list(entries)):
        store.add(account)
    return store


def test_the_first_account_serves_and_stays_when_others_come() -> None:
    store = store_of(opaque(label="a"), opaque(account_id="acct-10", label="b"))
    assert store.active is not None and store.active.label == "a"


def test_adding_says_what_came_of_it() -> None:
    store = azt.AccountStore()
    words = []
    for tokens in ("opaque-r", "opaque-r", "newer"):
        [account] = read(opaque(refresh_token=tokens))
        words.append(store.add(account))
    assert words == ["new", "same", "update"]
    assert len(store.accounts) == 1


def test_a_renewed_sign_in_keeps_what_the_person_set() -> None:
    store = azt.AccountStore()
    [first] = azt.to_accounts([opaque(label="work", email="a@b.c", id_token="id")], 5)
    first.rejected = "token_revoked"
    store.add(first)
    store.add(read(opaque(access_token="newer"))[0])
    [kept] = store.accounts.values()
    assert (kept.label, kept.email, kept.id_token, kept.created_at) == ("work", "a@b.c", "id", 5)
    assert kept.access_token == "newer"
    assert kept.rejected == ""


def test_when_the_serving_account_goes_another_serves() -> None:
    store = store_of(opaque(label="a"), opaque(account_id="acct-10", label="b"))
    store.remove(store.find("a"))
    assert store.active is not None and store.active.label == "b"
    store.remove(store.find("b"))
    assert store.active is None
    assert store.active_id is None


def test_removing_another_account_leaves_the_serving_one() -> None:
    store = store_of(opaque(label="a"), opaque(account_id="acct-10", label="b"))
    store.remove(store.find("b"))
    assert store.active is not None and store.active.label == "a"


PEOPLE = (
    opaque(label="Work", email="ada@example.com"),
    opaque(account_id="acct-10", label="home", email="ada@example.org"),
    opaque(account_id="acct-11", email="bob@example.com"),
)


@pytest.mark.parametrize(
    "name, account_id",
    [
        ("Work", "acct-9"),
        ("work", "acct-9"),
        ("HOME", "acct-10"),
        ("ada@example.com", "acct-9"),
        ("Bob@Example.com", "acct-11"),
        (azt.account_id_of("acct-11", ""), "acct-11"),
        (azt.account_id_of("acct-11", "")[:8], "acct-11"),
        (azt.account_id_of("acct-11", "").removeprefix("acc_")[:5], "acct-11"),
    ],
)
def test_an_account_is_found_by_label_email_or_id(name: str, account_id: str) -> None:
    assert store_of(*PEOPLE).find(name).account_id == account_id


@pytest.mark.parametrize("name", ["", "acc_", "nobody", "ada", "example.com", "acc_zzz", "acct-9"])
def test_what_matches_nothing_or_too_much_is_not_found(name: str) -> None:
    with pytest.raises(azt.AztError) as caught:
        store_of(*PEOPLE).find(name)
    assert (caught.value.status, caught.value.code) == (404, "account_not_found")
    assert "azt accounts list" in caught.value.message


@pytest.mark.parametrize("name", ["", "acc_"])
def test_nothing_matches_nothing_even_when_there_is_only_one(name: str) -> None:
    with pytest.raises(azt.AztError):
        store_of(opaque()).find(name)


def test_an_ambiguous_name_says_so() -> None:
    store = store_of(opaque(email="x@y.z"), opaque(account_id="acct-10", email="x@y.z"))
    with pytest.raises(azt.AztError, match="Several accounts match"):
        store.find("x@y.z")


def test_a_label_wins_over_the_beginning_of_an_id() -> None:
    other = azt.account_id_of("acct-10", "").removeprefix("acc_")[:3]
    store = store_of(opaque(label=other), opaque(account_id="acct-10"))
    assert store.find(other).label == other


def test_logs_show_the_label_else_the_short_id() -> None:
    store = store_of(*PEOPLE)
    assert store.find("work").name == "Work"
    assert store.find("bob@example.com").name == azt.account_id_of("acct-11", "")


def test_a_store_survives_the_disk() -> None:
    store = store_of(*PEOPLE)
    store.active_id = store.find("home").id
    store.find("work").rejected = "token_revoked"
    again = azt.AccountStore.from_json(json.loads(json.dumps(store.to_json())))
    assert again.accounts == store.accounts
    assert again.active_id == store.active_id


def test_no_file_is_an_empty_store() -> None:
    assert azt.AccountStore.from_json(None).accounts == {}


def test_unknown_fields_of_an_account_are_dropped() -> None:
    saved = store_of(opaque()).to_json()
    saved["accounts"][0]["from_another_version"] = 1
    assert len(azt.AccountStore.from_json(saved).accounts) == 1


def test_an_active_account_that_is_gone_is_replaced() -> None:
    saved = {**store_of(opaque()).to_json(), "active_id": "acc_gone"}
    assert azt.AccountStore.from_json(saved).active is not None


def broken_stores() -> dict[str, Any]:
    good = store_of(opaque()).to_json()
    [account] = good["accounts"]

    def having(**fields: Any) -> Json:
        return {**good, "accounts": [{**account, **fields}]}

    return {
        "no accounts": {"version": 1},
        "no active id": {"version": 1, "accounts": []},
        "accounts is null": {**good, "accounts": None},
        "accounts is an object": {**good, "accounts": {"a": account}},
        "an account is a text": {**good, "accounts": ["a"]},
        "an account without tokens": {**good, "accounts": [{"id": "a"}]},
        "an id that is a list": having(id=[]),
        "a token that is null": having(access_token=None),
        "an expiry that is a text": having(expires_at="soon"),
        "a label that is a number": having(label=5),
        "active id is a list": {**good, "active_id": []},
    }


@pytest.mark.parametrize("name", broken_stores())
def test_a_store_of_another_shape_is_an_error_and_never_empty(name: str) -> None:
    with pytest.raises(azt.StateError, match=r"accounts\.json"):
        azt.AccountStore.from_json(broken_stores()[name])


# -- Quota ----------------------------------------------------------------------------------------

HEADERS = {
    "x-codex-active-limit": "codex",
    "x-codex-plan-type": "pro",
    "x-codex-primary-used-percent": "10.5",
    "x-codex-primary-window-minutes": "300",
    "x-codex-primary-reset-after-seconds": "900",
    "x-codex-primary-reset-at": "1",
    "x-codex-secondary-used-percent": "40",
    "x-codex-secondary-window-minutes": "10080",
    "x-codex-secondary-reset-at": str(int(NOW) + 90_000),
    "x-codex-primary-over-secondary-limit-percent": "5",
    "x-codex-credits-has-credits": "True",
    "x-codex-credits-unlimited": "False",
    "x-codex-credits-balance": "7.5",
    "x-codex-bengalfox-primary-used-percent": "99",
    "x-codex-bengalfox-primary-window-minutes": "60",
    "x-codex-bengalfox-limit-name": "Spark",
}
PRIMARY = {"key": "primary", "minutes": 300, "used": 10.5, "resets_at": int(NOW) + 900}
SECONDARY = {"key": "secondary", "minutes": 10_080, "used": 40.0, "resets_at": int(NOW) + 90_000}
SPARK = {"key": "codex-bengalfox", "minutes": 60, "used": 99.0, "resets_at": int(NOW) + 3600}
EVENT: Json = {
    "type": "codex.rate_limits",
    "plan_type": "pro",
    "rate_limits": {
        "allowed": True,
        "primary": {"used_percent": 10.5, "window_minutes": 300, "reset_after_seconds": 900},
        "secondary": {"used_percent": 40, "window_minutes": 10_080, "reset_at": NOW + 90_000},
    },
    "code_review_rate_limits": None,
    "additional_rate_limits": {
        "codex-bengalfox": {"primary": {"used_percent": 99, "window_minutes": 60}}
    },
    "credits": {"has_credits": True, "unlimited": False, "balance": "7.5"},
}
USAGE: Json = {
    "plan_type": "pro",
    "rate_limit": {
        "allowed": True,
        "primary_window": {
            "used_percent": 10.5,
            "limit_window_seconds": 17_950,
            "reset_after_seconds": 900,
        },
        "secondary_window": {
            "used_percent": 40,
            "limit_window_seconds": 604_800,
            "reset_at": NOW + 90_000,
        },
    },
    "code_review_rate_limit": None,
    "additional_rate_limits": [
        {
            "limit_name": "Spark",
            "metered_feature": "codex-bengalfox",
            "rate_limit": {"primary_window": {"used_percent": 99, "limit_window_seconds": 3600}},
        }
    ],
    "credits": {"has_credits": True, "unlimited": False, "balance": "7.5"},
}


def test_headers_events_and_the_usage_answer_say_the_same() -> None:
    readings = {
        "response_headers": azt.quota_from_headers(HEADERS, NOW),
        "rate_limit_event": azt.quota_from_body(EVENT, NOW),
        "usage_endpoint": azt.quota_from_body(USAGE, NOW),
    }
    for source, reading in readings.items():
        assert reading == {
            "windows": [PRIMARY, SECONDARY],
            "extra": [SPARK],
            "credits": {"has": True, "unlimited": False, "balance": "7.5"},
            "plan": "pro",
            "source": source,
            "captured_at": int(NOW),
        }


def test_names_of_headers_may_be_in_any_case() -> None:
    nested = {name.title(): value for name, value in HEADERS.items()}
    assert azt.quota_from_headers(nested, NOW)["windows"] == [PRIMARY, SECONDARY]


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"used_percent": ""},
        {"used_percent": None, "window_minutes": 300},
        {"used_percent": 0, "window_minutes": 0, "reset_at": 0},
        {"used_percent": "0", "window_minutes": "", "reset_at": ""},
        {"used_percent": "nan", "window_minutes": 300},
        {"used_percent": -1, "window_minutes": 300},
        {"used_percent": True, "window_minutes": 300},
        {"used_percent": [5], "window_minutes": 300},
        "5",
        None,
    ],
)
def test_a_window_that_says_nothing_is_none(window: Any) -> None:
    assert azt.quota_from_body({"rate_limits": {"primary": window}}, NOW) == {}


@pytest.mark.parametrize(
    "raw, resets_in_s",
    [
        ({"reset_after_seconds": 50, "reset_at": 5}, 50),
        ({"reset_at": NOW + 50}, 50),
        ({}, 18_000),
        ({"reset_at": NOW + 10**9}, 18_000),
        ({"reset_after_seconds": "1e12"}, 18_000),
    ],
)
def test_no_window_outlasts_its_length(raw: Json, resets_in_s: int) -> None:
    window = {"used_percent": 250, "window_minutes": 300, **raw}
    [read] = azt.quota_from_body({"rate_limits": {"primary": window}}, NOW)["windows"]
    assert (read["used"], read["resets_at"]) == (100, int(NOW) + resets_in_s)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = (
    "used_percent window_minutes limit_window_seconds reset_at reset_after_seconds primary "
    "secondary primary_window rate_limit rate_limits additional_rate_limits credits has_credits "
    "unlimited balance plan_type metered_limit_name limit_name metered_feature"
).split()
BODIES = st.recursive(
    VALUES,
    lambda inner: st.dictionaries(st.sampled_from(FIELDS), inner) | st.lists(inner, max_size=2),
)


@given(
    st.dictionaries(st.sampled_from(FIELDS), BODIES),
    st.dictionaries(st.sampled_from([*HEADERS]), st.text(max_size=6)),
)
@settings(max_examples=50)
def test_no_reading_can_break_an_account(body: Json, headers: dict[str, str]) -> None:
    [account] = read(entry())
    for reading in (azt.quota_from_body(body, NOW), azt.quota_from_headers(headers, NOW)):
        if reading:
            azt.learn_quota(account, reading)
            for window in account.quota.get("windows", []):
                assert 0 <= window["used"] <= 100 and window["resets_at"] > NOW - 1
                azt.pace(window, NOW)
            json.dumps(account.quota, allow_nan=False)
    store = azt.AccountStore()
    store.add(account)
    assert azt.AccountStore.from_json(json.loads(json.dumps(store.to_json()))).active == account


def test_a_reading_keeps_what_it_does_not_speak_of() -> None:
    [account] = read(entry())
    azt.learn_quota(account, azt.quota_from_body(USAGE, NOW))
    assert (account.plan, account.quota["left"], account.quota["until"]) == ("pro", 60, NOW + 900)
    primary = {"x-codex-primary-used-percent": "80", "x-codex-primary-window-minutes": "300"}
    azt.learn_quota(account, azt.quota_from_headers(primary, NOW + 10))
    assert (account.quota["left"], account.quota["extra"]) == (20, [SPARK])
    assert account.quota["credits"]["balance"] == "7.5"


def test_a_window_that_headers_are_silent_about_stays_until_it_is_over() -> None:
    [account] = read(entry())
    azt.learn_quota(account, azt.quota_from_body(USAGE, NOW))
    both = [one["key"] for one in account.quota["windows"]]
    primary = {"x-codex-primary-used-percent": "80", "x-codex-primary-window-minutes": "300"}
    azt.learn_quota(account, azt.quota_from_headers(primary, NOW + 10))
    assert [one["key"] for one in account.quota["windows"]] == both == ["primary", "secondary"]
    azt.learn_quota(account, azt.quota_from_headers(primary, NOW + 40 * 86_400))
    assert [one["key"] for one in account.quota["windows"]] == ["primary"]


def test_a_window_counts_as_full_again_after_its_reset() -> None:
    [account] = read(entry())
    assert azt.percent_left(account.quota, NOW) == -1
    azt.learn_quota(account, azt.quota_from_body(EVENT, NOW))
    left = [azt.percent_left(account.quota, NOW + later) for later in (0, 899, 90_000, 90_001)]
    assert left == [60, 60, 100, 100]
    azt.learn_quota(account, {"windows": [{**PRIMARY, "used": 100.0}], "captured_at": NOW})
    assert [azt.percent_left(account.quota, NOW + later) for later in (0, 900)] == [0, 100]
    azt.learn_quota(account, {"credits": {"unlimited": True}, "captured_at": NOW})
    assert azt.percent_left(account.quota, NOW) == 100


@pytest.mark.parametrize("quota", [{"windows": 5}, {"left": 1}, {"windows": [{}]}, {"until": "x"}])
def test_a_quota_of_another_shape_is_never_taken_for_a_good_one(quota: Json) -> None:
    store = azt.AccountStore()
    store.add(read(entry())[0])
    saved = store.to_json()
    saved["accounts"][0]["quota"] = quota
    with pytest.raises(azt.StateError):
        azt.AccountStore.from_json(saved)


@pytest.mark.parametrize(
    "used, to_go_s, expected",
    [
        (38, 11_160, (62, "ok", None)),
        (0, 9000, (50, "ok", None)),
        (3, 9000, (50, "ok", None)),
        (50, 17_900, (99, "ok", None)),
        (50, 9000, (50, "ok", 9000)),
        (52, 9000, (50, "ok", 8307)),
        (60, 9000, (50, "fast", 6000)),
        (100, 9000, (50, "empty", 0)),
        (50, 0, (None, "unknown", None)),
        (100, -5, (None, "unknown", None)),
    ],
)
def test_the_pace_tells_whether_a_window_lasts(
    used: float, to_go_s: int, expected: tuple[int | None, str, int | None]
) -> None:
    window = {"key": "primary", "minutes": 300, "used": used, "resets_at": NOW + to_go_s}
    time_left, verdict, empty_in_s = expected
    found = azt.pace(window, NOW)
    assert (found["timeLeftPercent"], found["verdict"]) == (time_left, verdict)
    if used != 38:
        empty_at = None if empty_in_s is None else int((NOW + empty_in_s) * 1000)
        assert found["emptyAt"] == pytest.approx(empty_at, abs=1000)
