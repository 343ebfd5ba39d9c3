"""What may leave: masked messages, masked log lines, the error envelope."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from fake_upstream import make_token
from hypothesis import given
from hypothesis import strategies as st

import azt

JWT = make_token()
BASIC = base64.b64encode(b"user:hunter2hunter2").decode()

SECRETS = {
    "bearer": ("Authorization: Bearer s3cr3t-value", "s3cr3t-value"),
    "bearer in any case": ("sent authorization=bearer s3cr3t/value+x==", "s3cr3t"),
    "basic": (f"authorization: Basic {BASIC}", BASIC),
    "proxy basic": (f"Proxy-Authorization: Basic {BASIC}", BASIC),
    "jwt": (f"the token {JWT} was refused", JWT.split(".")[1]),
    "jwt of five parts": ("eyJhbGciOiJSU0Ei.abcdef.s3cr3tpart.more5ecret.tag", "more5ecret"),
    "api key": ("key sk-proj-s3cr3t_abc-def is wrong", "s3cr3t"),
    "refresh token": ("rt_s3cr3tabcdef", "s3cr3t"),
    "own key": ("azt_s3cr3tabcdef", "s3cr3t"),
    "json access token": ('{"access_token": "s3cr3t", "a": 1}', "s3cr3t"),
    "json in json": (r'"{\"refresh_token\":\"s3cr3t\"}"', "s3cr3t"),
    "python dict": ("{'refresh_token': 's3cr3t'}", "s3cr3t"),
    "camel case": ('{"accessToken":"s3cr3t","refreshToken":"s3cr3t"}', "s3cr3t"),
    "form": ("grant_type=refresh_token&refresh_token=s3cr3t&id_token=s3cr3t", "s3cr3t"),
    "prefixed name": ("openai_api_key=s3cr3t", "s3cr3t"),
    "header key": ("x-api-key: s3cr3t", "s3cr3t"),
    "verifier": ("code_verifier=s3cr3t", "s3cr3t"),
    "client secret": ("client_secret: s3cr3t", "s3cr3t"),
    "password": ("password=s3cr3t", "s3cr3t"),
    "authorization code": ("GET /auth/callback?code=s3cr3t&scope=a", "s3cr3t"),
    "code in a form": ("code=s3cr3t&grant_type=authorization_code", "s3cr3t"),
    "state": ("http://localhost/cb?scope=a&state=s3cr3t", "s3cr3t"),
    "fragment": ("http://localhost/#token=s3cr3t", "s3cr3t"),
    "cookie": ("Cookie: first=1; azt=s3cr3t", "s3cr3t"),
    "set-cookie": ("set-cookie: __cf_bm=s3cr3t; path=/; HttpOnly", "s3cr3t"),
    "proxy password": ("http://user:s3cr3t@proxy.corp:3128 refused", "s3cr3t"),
    "proxy password with an at": ("http://user:p@s3cr3t@proxy.corp:3128", "s3cr3t"),
}


@pytest.mark.parametrize("text, secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_of_every_form_is_starred_out(text: str, secret: str) -> None:
    assert secret in text
    masked = azt.mask(text)
    assert secret not in masked
    assert "***" in masked


@pytest.mark.parametrize("text, secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_starred_out_in_the_middle_of_other_text(text: str, secret: str) -> None:
    assert secret not in azt.mask(f"before ({text}) after\nnext line")


def test_what_is_around_a_secret_stays_readable() -> None:
    assert (
        azt.mask("http://user:pw@proxy.corp:3128 refused") == "http://***@proxy.corp:3128 refused"
    )
    assert azt.mask('{"refresh_token": "abc", "plan": "plus"}').endswith('"plan": "plus"}')
    assert azt.mask("see https://example.com/a?b=c") == "see https://example.com/a?b=c"


@pytest.mark.parametrize(
    "text",
    [
        "Account work needs to sign in again (refresh_token_reused): run `azt login`.",
        "Entry 1 has no access_token.",
        "The model 'gpt-5.5' is not in the list: gpt-5.4, gpt-5.5.",
        "a risk-free task-force",
        "messages[2].content[0].type: expected one of 'text', 'image_url'",
    ],
)
def test_ordinary_sentences_pass_unchanged(text: str) -> None:
    assert azt.mask(text) == text


@pytest.mark.parametrize("code", [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029])
def test_control_characters_are_escaped(code: int) -> None:
    assert azt.mask(f"a{chr(code)}b") == f"a\\x{code:02x}b"


def test_newlines_and_tabs_become_spaces() -> None:
    assert azt.mask("a\nb\tc") == "a b c"


@given(st.text())
def test_masked_text_is_one_line_without_controls(text: str) -> None:
    masked = azt.mask(text)
    assert len(masked.splitlines()) <= 1
    assert not any(ord(one) < 32 or 127 <= ord(one) < 160 for one in masked)


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_token_never_survives_whatever_stands_around_it(before: str, after: str) -> None:
    assert JWT.split(".")[1] not in azt.mask(f"{before} {JWT} {after}")


LETTERS = st.characters(codec="ascii", categories=("L", "Nd"))
NOISE = st.text(st.sampled_from(" \n\t\0\"',;&?(){}[]<>|é\u2028"), max_size=12)
FORMS = [
    "Authorization: Bearer {}",
    "authorization: basic {}",
    "Proxy-Authorization: Basic {}",
    "sk-{}",
    "rt_{}",
    "azt_{}",
    "azt_admin_{}",
    "eyJ{0}.{0}.{0}",
    "Cookie: a=1; azt_session={}",
    "azt_session={}",
    "Set-Cookie: s={}; Path=/",
    "code={}",
    "http://localhost/cb?state={}&x=1",
    "http://user:{}@proxy.corp:3128",
    *('"{0}": "{1}"'.replace("{0}", name) for name in (
        "access_token", "refresh_token", "id_token", "session_token", "token", "accessToken",
        "api_key", "client_secret", "code_verifier", "authorization_code", "user_code", "password",
    )),
]  # fmt: skip


@pytest.mark.parametrize("form", [form.replace("{1}", "{}") for form in FORMS])
@given(before=NOISE, secret=st.text(LETTERS, min_size=12, max_size=60), after=NOISE)
def test_no_secret_of_any_form_survives_the_scrubber(
    form: str, before: str, secret: str, after: str
) -> None:
    masked = azt.mask(f"{before} {form.format(secret)} {after}")

    assert secret not in masked
    assert len(masked.splitlines()) == 1


# -- The log --------------------------------------------------------------------------------------


@pytest.fixture
def log_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """Call it for the lines that `start_logging` sent to stderr."""
    kept = (azt.log.handlers[:], azt.log.propagate, azt.log.level, logging.raiseExceptions)
    yield lambda: capsys.readouterr().err.splitlines()
    azt.log.handlers[:], azt.log.propagate, level, logging.raiseExceptions = kept
    azt.log.setLevel(level)


def test_log_lines_are_masked(log_lines: Callable[[], list[str]]) -> None:
    azt.start_logging("info")
    azt.log.info("sent %s", "Bearer s3cr3t-value")
    assert log_lines()[0].endswith("INFO sent Bearer ***")


def test_a_message_cannot_forge_a_second_log_line(log_lines: Callable[[], list[str]]) -> None:
    azt.start_logging("info")
    for end in ("\n", "\r", "\r\n", "\x0b", "\x85", "\u2028"):
        azt.log.warning("path %s", f"/v1{end}2026-01-01 INFO all is well")
    lines = log_lines()
    assert len(lines) == 6
    assert not any(line.startswith("2026-01-01 INFO") for line in lines)


def test_a_traceback_keeps_its_lines_and_loses_its_secrets(
    log_lines: Callable[[], list[str]],
) -> None:
    azt.start_logging("info")
    try:
        raise ValueError("refresh_token=s3cr3t\n2026-01-01 INFO all is well")
    except ValueError:
        azt.log.exception("it failed")
    lines = log_lines()
    assert lines[0].endswith("ERROR it failed")
    assert "Traceback (most recent call last):" in lines[1]
    assert "s3cr3t" not in str(lines)
    assert not any(line.startswith("2026-01-01 INFO") for line in lines)


def test_the_level_is_the_one_asked_for(log_lines: Callable[[], list[str]]) -> None:
    azt.start_logging("warning")
    azt.log.info("quiet")
    azt.log.warning("loud")
    [line] = log_lines()
    assert line.endswith("WARNING loud")


def test_a_closed_stderr_takes_nothing_down(log_lines: Callable[[], list[str]]) -> None:
    azt.start_logging("info")
    closed = io.StringIO()
    closed.close()
    handler = azt.log.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(closed)
    azt.log.info("nobody reads this")
    assert log_lines() == []


# -- The error tree -------------------------------------------------------------------------------


def test_all_four_keys_are_always_there() -> None:
    assert azt.error_body(azt.AztError(500, None, "It failed.")) == {
        "error": {"message": "It failed.", "type": "server_error", "param": None, "code": None}
    }


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
        (507, "server_error"),
    ],
)
def test_the_type_follows_the_status(status: int, kind: str) -> None:
    assert azt.error_body(azt.AztError(status, "x", "y"))["error"]["type"] == kind


def test_a_given_type_wins() -> None:
    error = azt.AztError(401, "x", "y", type="authentication_error")
    assert azt.error_body(error)["error"]["type"] == "authentication_error"


def test_extra_keys_stand_inside_the_error() -> None:
    error = azt.AztError(429, "usage_limit_reached", "y", extra={"resets_at": 7})
    assert azt.error_body(error)["error"]["resets_at"] == 7


def test_a_secret_in_a_message_never_reaches_the_client() -> None:
    error = azt.UpstreamError(502, "upstream_error", f"failed: {JWT}\r\nSet-Cookie: a=s3cr3t")
    sent = json.dumps(azt.error_body(error))
    assert JWT.split(".")[1] not in sent
    assert "s3cr3t" not in sent


def test_a_bad_request_names_its_field() -> None:
    error = azt.error_body(azt.BadRequest("No.", "messages[0].role"))["error"]
    assert error["param"] == "messages[0].role"
    assert error["code"] == "invalid_value"


def test_unusable_state_is_a_server_error_of_its_own() -> None:
    error = azt.StateError("It is damaged.")
    assert (error.status, error.code) == (500, "state_unusable")
