"""Defaults < file < environment < flags, and what every key accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import azt


def environment(**variables: str) -> azt.Environment:
    return azt.read_environment({"HOME": "/people/ada", **variables})


def saved(values: Any) -> dict[str, Any]:
    return {"version": 1, "revision": 3, "values": values}


# -- Layers ---------------------------------------------------------------------------------------


def test_without_anything_the_defaults_are_in_force() -> None:
    settings = azt.load_settings(None, environment(), {})
    assert settings.values == {key: setting.default for key, setting in azt.SETTINGS.items()}
    assert settings.fixed == {}
    assert settings.revision == 0


@pytest.mark.parametrize(
    ("chosen", "name"),
    [("Asia/Shanghai", "Asia/Shanghai"), (":Europe/Berlin", "Europe/Berlin")],
)
def test_the_time_zone_of_the_machine_has_its_name(chosen: str, name: str) -> None:
    assert environment(TZ=chosen).time_zone == name


@pytest.mark.parametrize("chosen", ["CET-1CEST", "/etc/passwd", "../secret"])
def test_a_time_zone_may_have_none(chosen: str) -> None:
    assert environment(TZ=chosen).time_zone == ""


def test_each_layer_wins_over_the_one_below() -> None:
    file = saved({"server.port": 1111})
    pinned = environment(AZT_PORT="2222")
    port = [
        azt.load_settings(None, environment(), {}).number("server.port"),
        azt.load_settings(file, environment(), {}).number("server.port"),
        azt.load_settings(file, pinned, {}).number("server.port"),
        azt.load_settings(file, pinned, {"server.port": 3333}).number("server.port"),
    ]
    assert port == [8787, 1111, 2222, 3333]


def test_what_pins_a_value_is_named() -> None:
    settings = azt.load_settings(
        None, environment(AZT_PORT="1", AZT_HOST="::1"), {"server.port": 2}
    )
    assert settings.fixed == {"server.host": "AZT_HOST", "server.port": "command line"}


def test_the_revision_of_the_file_is_kept() -> None:
    assert azt.load_settings(saved({}), environment(), {}).revision == 3


@pytest.mark.parametrize("revision", ["3", None, [], 1.5])
def test_a_revision_of_another_type_counts_from_zero(revision: Any) -> None:
    file = {"version": 1, "revision": revision, "values": {}}
    assert azt.load_settings(file, environment(), {}).revision == 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("server.port", "8787"),
        ("server.port", -1),
        ("server.lanApi", "yes"),
        ("server.corsOrigins", "https://a.example"),
        ("no.such.key", 1),
    ],
)
def test_a_saved_value_that_does_not_fit_is_named_and_left_out(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = azt.load_settings(saved({key: value, "log.level": "debug"}), environment(), {})
    assert key in caplog.text
    assert settings["log.level"] == "debug"
    assert settings.values.get(key) == (azt.SETTINGS[key].default if key in azt.SETTINGS else None)


@pytest.mark.parametrize("values", [None, [], "text", 7])
def test_a_file_without_values_changes_nothing(values: Any) -> None:
    settings = azt.load_settings(saved(values), environment(), {})
    assert settings.values == azt.load_settings(None, environment(), {}).values


def test_the_getters_return_their_types() -> None:
    settings = azt.load_settings(saved({"server.allowedHosts": ["a", "b"]}), environment(), {})
    assert settings.text("log.level") == "info"
    assert settings.flag("server.lanApi") is True
    assert settings.number("server.port") == 8787
    assert settings.words("server.allowedHosts") == frozenset({"a", "b"})


# -- Keys -----------------------------------------------------------------------------------------

WORDS = ([], ["a"], ["a", "b"]), ("a", None, [1], [""], ["a\nb"], [["a"]], {"a": 1}, ["a"] * 257)
YES_NO = (True, False), (0, 1, "true", None, [], "")
TEXT = ("", "gpt-5.5"), (None, 5, True, [], "line\nbreak", "x" * 2049)

KEYS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "apiKeys.loopbackExempt": YES_NO,
    "autoSwitch.beforePercent": ((0, 3, 99), (-1, 100, 1.5, "3", True, None)),
    "autoSwitch.enabled": YES_NO,
    "autoSwitch.excludedIds": WORDS,
    "autoSwitch.order": (("most_left", "soonest_reset", "priority"), ("", "random", None, 1)),
    "defaultModel": TEXT,
    "image.freeAccountWebGenerationEnabled": YES_NO,
    "image.orchestratorModel": TEXT,
    "limits.bodyMb": ((1, 128, 4096), (0, 4097, -1, 1.5, "128", True, None)),
    "log.keepDays": ((1, 30, 3650), (0, 3651, 1.5, "30", True, None)),
    "log.keepRows": ((0, 2000, 100_000), (-1, 100_001, 0.5, "5", True, None)),
    "log.level": (("debug", "info", "warning", "error"), ("INFO", "trace", "", None, 1)),
    "networkProxy.enabled": YES_NO,
    "networkProxy.noProxy": TEXT,
    "networkProxy.url": (
        ("", "http://proxy:3128", "https://proxy.corp:8443/", "http://user:pw@proxy:1"),
        ("proxy:3128", "socks5://proxy:1080", "http://", "http://a b", "http://a/b", None, 1),
    ),
    "quota.concurrency": ((1, 16, 32), (0, 33, "16", True, None)),
    "quota.everyMinutes": ((0, 5, 10_080), (-1, 10_081, 0.5, "5", True, None)),
    "server.allowedHosts": WORDS,
    "server.corsOrigins": (
        ([], ["*"], ["https://app.example"], ["http://a:1", "chrome-extension://abcdef"]),
        (["app.example"], ["https://a/b"], ["https://a/"], ["null"], ["https://*"], "*", [1]),
    ),
    "server.host": (("0.0.0.0", "::1", "127.0.0.1"), (None, 5, True, "a\0b")),
    "server.lanApi": YES_NO,
    "server.lanConsole": YES_NO,
    "server.port": ((0, 1, 8787, 65535), (-1, 65536, "1", 1.0, True, None)),
    "server.tokenOnLoopback": YES_NO,
    "ui.maskEmails": (("lan", "always", "never"), ("", "sometimes", True, None)),
    "usage.keepDays": ((1, 365, 3650), (0, 3651, 1.5, "30", True, None)),
    "usage.keepMb": ((1, 512, 100_000), (0, 100_001, 0.5, "5", True, None)),
}
GOOD = [(key, value) for key, (good, _) in KEYS.items() for value in good]
BAD = [(key, value) for key, (_, bad) in KEYS.items() for value in bad]


def test_every_key_has_its_cases_here() -> None:
    assert list(KEYS) == list(azt.SETTINGS)


def test_the_table_is_sorted() -> None:
    assert list(azt.SETTINGS) == sorted(azt.SETTINGS)


@pytest.mark.parametrize("key, setting", azt.SETTINGS.items(), ids=azt.SETTINGS)
def test_every_default_passes_its_own_check(key: str, setting: azt.Setting) -> None:
    assert azt.check_setting(key, setting.default) == setting.default


@pytest.mark.parametrize("key, value", GOOD)
def test_a_good_value_is_accepted_and_survives_json(key: str, value: Any) -> None:
    assert azt.check_setting(key, value) == value
    assert azt.parse_setting(key, json.dumps(value)) == value


@pytest.mark.parametrize("key, value", BAD)
def test_a_bad_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(azt.BadRequest) as caught:
        azt.check_setting(key, value)
    assert key in caught.value.message
    assert azt.SETTINGS[key].allowed in caught.value.message
    assert caught.value.param == key


def test_an_unknown_key_is_refused_with_the_way_to_the_list() -> None:
    with pytest.raises(azt.BadRequest, match=r"no setting 'server\.prot'.*azt settings get"):
        azt.check_setting("server.prot", 1)
    with pytest.raises(azt.BadRequest, match="no setting"):
        azt.parse_setting("server.prot", "1")


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("server.port", "9000", 9000),
        ("server.lanApi", "false", False),
        ("defaultModel", "gpt-5.5", "gpt-5.5"),
        ("defaultModel", '"gpt-5.5"', "gpt-5.5"),
        ("defaultModel", "5", "5"),
        ("defaultModel", "true", "true"),
        ("server.host", "127.0.0.1", "127.0.0.1"),
        ("server.allowedHosts", "a.example, b.example", ["a.example", "b.example"]),
        ("server.allowedHosts", '["a.example"]', ["a.example"]),
        ("server.allowedHosts", "", []),
        ("server.corsOrigins", "https://a.example", ["https://a.example"]),
        ("server.corsOrigins", "*", ["*"]),
    ],
)
def test_bare_words_need_no_quotes(key: str, text: str, value: Any) -> None:
    assert azt.parse_setting(key, text) == value


@pytest.mark.parametrize("text", ["NaN", "1e999", "9" * 5000, "[" * 100_000, "{}", "8787 "])
def test_odd_text_is_refused_and_never_crashes(text: str) -> None:
    if text == "8787 ":
        assert azt.parse_setting("server.port", text) == 8787
        return
    with pytest.raises(azt.BadRequest):
        azt.parse_setting("server.port", text)


# -- Environment ----------------------------------------------------------------------------------


def test_an_empty_environment_gives_the_public_addresses_and_home() -> None:
    env = environment()
    assert env.paths.state == Path("/people/ada/.ai-zero-token/.state")
    assert env.paths.codex_models == Path("/people/ada/.codex/models_cache.json")
    assert env.codex_base_url == "https://chatgpt.com/backend-api/codex"
    assert env.chatgpt_base_url == "https://chatgpt.com/backend-api"
    assert env.auth_base_url == "https://auth.openai.com"
    assert (env.ca_file, env.proxy_url, env.no_proxy) == ("", "", "")
    assert env.fast
    assert env.pinned == {}


def test_every_variable_is_read() -> None:
    env = environment(
        AI_ZERO_TOKEN_HOME="/srv/azt",
        CODEX_HOME="/srv/codex",
        AZT_CODEX_BASE_URL="http://127.0.0.1:9/codex/",
        AZT_CHATGPT_BASE_URL="http://127.0.0.1:9/backend-api",
        AZT_AUTH_BASE_URL="http://127.0.0.1:9",
        AZT_CA_FILE="/etc/corp.pem",
        HTTPS_PROXY="http://proxy:3128",
        NO_PROXY="localhost,.corp",
        AZT_SLOW_PATHS="1",
    )
    assert env.paths.accounts == Path("/srv/azt/.state/accounts.json")
    assert env.paths.codex_models == Path("/srv/codex/models_cache.json")
    assert env.codex_base_url == "http://127.0.0.1:9/codex"
    assert env.chatgpt_base_url == "http://127.0.0.1:9/backend-api"
    assert env.auth_base_url == "http://127.0.0.1:9"
    assert env.ca_file == "/etc/corp.pem"
    assert env.proxy_url == "http://proxy:3128"
    assert env.no_proxy == "localhost,.corp"
    assert not env.fast


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_usual_proxy_variables_are_known(name: str) -> None:
    assert environment(**{name: "http://proxy:1"}).proxy_url == "http://proxy:1"


def test_the_proxy_for_https_wins_over_the_one_for_all() -> None:
    env = environment(ALL_PROXY="http://all:1", HTTPS_PROXY="http://https:1")
    assert env.proxy_url == "http://https:1"


def test_a_tilde_means_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ada")
    assert azt.read_environment().paths.home.is_absolute()
    env = environment(AI_ZERO_TOKEN_HOME="~/azt")
    assert env.paths.home == Path("/people/ada/azt")


def test_the_home_of_nobody_is_a_name_like_any_other() -> None:
    assert environment(AI_ZERO_TOKEN_HOME="~nobody-of-that-name/azt").paths.home.name == "azt"


def test_a_machine_without_home_still_starts() -> None:
    env = azt.read_environment({})
    assert env.paths.home.is_absolute()


@pytest.mark.parametrize(
    "name", ["AZT_CODEX_BASE_URL", "AZT_CHATGPT_BASE_URL", "AZT_AUTH_BASE_URL"]
)
@pytest.mark.parametrize(
    "url",
    [
        *("chatgpt.com", "ftp://a", "http://", "https://a b/c", "http:///x"),
        *("http://a:port", "http://a:99999", "http://a:0", "http://[::1", "http://?x"),
    ],
)
def test_a_base_url_that_is_none_is_named(name: str, url: str) -> None:
    with pytest.raises(azt.BadRequest, match=name):
        environment(**{name: url})


VARIABLES = {setting.env: key for key, setting in azt.SETTINGS.items() if setting.env}


def test_these_settings_can_be_pinned_by_the_environment() -> None:
    assert VARIABLES == {
        "AZT_BODY_LIMIT_MB": "limits.bodyMb",
        "AZT_CORS_ORIGIN": "server.corsOrigins",
        "AZT_HOST": "server.host",
        "AZT_LOG_LEVEL": "log.level",
        "AZT_PORT": "server.port",
    }


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("AZT_BODY_LIMIT_MB", "256", 256),
        ("AZT_CORS_ORIGIN", "https://a.example,http://b:1", ["https://a.example", "http://b:1"]),
        ("AZT_HOST", "127.0.0.1", "127.0.0.1"),
        ("AZT_LOG_LEVEL", "debug", "debug"),
        ("AZT_PORT", "0", 0),
    ],
)
def test_a_variable_pins_its_key(name: str, text: str, value: Any) -> None:
    assert environment(**{name: text}).pinned == {VARIABLES[name]: value}


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_pins_nothing(name: str) -> None:
    assert environment(**{name: ""}).pinned == {}


@pytest.mark.parametrize(
    "name, text",
    [
        ("AZT_BODY_LIMIT_MB", "lots"),
        ("AZT_CORS_ORIGIN", "a.example"),
        ("AZT_LOG_LEVEL", "loud"),
        ("AZT_PORT", "99999"),
        ("AZT_PORT", "eighty"),
        ("AZT_PORT", "[" * 100_000),
    ],
)
def test_a_variable_with_a_bad_value_is_named(name: str, text: str) -> None:
    with pytest.raises(azt.BadRequest, match=f"{name} accepts"):
        environment(**{name: text})


# -- The shapes of the admin API ------------------------------------------------------------------


def test_nesting_and_flattening_undo_each_other() -> None:
    values = {"server.port": 1, "server.host": "h", "log.level": "info", "defaultModel": "m"}
    tree = {"server": {"port": 1, "host": "h"}, "log": {"level": "info"}, "defaultModel": "m"}
    assert azt.nested(values) == tree
    assert azt.flattened(tree) == values


def test_flattening_takes_dotted_keys_as_they_are() -> None:
    assert azt.flattened({"server.port": 1, "log": {"level": "x"}}) == {
        "server.port": 1,
        "log.level": "x",
    }
