"""Room 13: sums equal a plain fold over the events, whatever happens in between; and what each
request leaves in the log."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import azt

Json = dict[str, Any]
DAY_MS = 86_400_000
NOON_MS = 1_795_348_800_000  # 2026-11-22 12:00 UTC


def paths_in(folder: Path) -> azt.Paths:
    paths = azt.Paths(folder, folder / "codex")
    azt.prepare_home(paths)
    return paths


def record(at_ms: int, **fields: Any) -> azt.RequestRecord:
    made = azt.RequestRecord("req_1", "POST", "/v1/x?secret=1", 0.0, at_ms / 1000)
    made.route, made.total_ms, made.result, made.status = "/v1/x", 10, "ok", 200
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def event(at_ms: int, **fields: Any) -> Json:
    return record(at_ms, **fields).event()


def line(one: Json) -> bytes:
    return azt.encode_json(one) + b"\n"


# -- The sums -------------------------------------------------------------------------------------

RECORDS = st.builds(
    lambda day, model, account, result, tokens, images, took, ttft, client: record(
        NOON_MS - day * DAY_MS,
        model=model,
        account_id=account,
        account=account or "-",
        result=result,
        error_code=None if result == "ok" else "server_error",
        attempts=1,
        usage=tokens and {"input_tokens": tokens, "output_tokens": 2 * tokens},
        images=images,
        total_ms=took,
        ttft_ms=ttft,
        client=client,
    ),
    st.integers(0, 4),
    st.sampled_from(["gpt-5.4", "gpt-5.5"]),
    st.sampled_from(["acc_1", "acc_2", ""]),
    st.sampled_from(["ok", "ok", "failed", "cancelled"]),
    st.one_of(st.none(), st.integers(1, 10**9)),
    st.integers(0, 4),
    st.integers(0, 200_000),
    st.one_of(st.none(), st.integers(0, 100_000)),
    st.sampled_from(["curl", "Codex"]),
)


def plain(events: list[Json]) -> Counter[tuple[str, ...]]:
    """The same sums, counted in the plainest way."""
    sums: Counter[tuple[str, ...]] = Counter()
    for one in events:
        day = time.strftime("%Y-%m-%d", time.localtime(one["at"] / 1000))
        tokens = one["tokens"] or {}
        amounts = {
            "requestCount": 1,
            "successCount": one["result"] == "ok",
            "failureCount": one["result"] == "failed",
            "cancelledCount": one["result"] == "cancelled",
            "inputTokens": tokens.get("input", 0),
            "outputTokens": tokens.get("output", 0),
            "totalTokens": tokens.get("total", 0),
            "unknownTokenCount": one["attempts"] > 0 and not tokens,
            "imageCount": one["images"],
            "totalDurationMs": one["durationMs"],
        }
        rows = [
            *[("total",), ("byModel", one["model"]), ("bySource", one["client"])],
            *[("byAccount", one["accountId"] or "-"), ("byImageRoute", one["imageRoute"])],
            ("byEndpoint", f"{one['method']} {one['endpoint']}"),
            *([("byError", one["errorType"])] if one["errorType"] else []),
        ]
        for name, amount in amounts.items():
            for row in rows:
                sums[("lifetime", *row, name)] += amount
                sums[(day, *row, name)] += amount
    return +sums


def counted(usage: azt.UsageStats) -> Counter[tuple[str, ...]]:
    sums: Counter[tuple[str, ...]] = Counter()
    for period in ("lifetime", *usage.days):
        tally = usage.lifetime if period == "lifetime" else usage.day(period)
        rows = {("total",): tally.total}
        rows |= {(name, key): row for name, some in tally.by.items() for key, row in some.items()}
        for row, aggregate in rows.items():
            for name, amount in ((name, aggregate[name]) for name in azt.SUMS):
                sums[(period, *row, name)] += amount
    return +sums


def on_disk(paths: azt.Paths) -> list[Json]:
    files = sorted(paths.usage_events.glob("*.jsonl"))
    return [one for file in files for one in azt.read_events(file)]


STEPS = st.lists(
    st.one_of(
        st.lists(RECORDS, max_size=6),
        st.sampled_from(["flush", "save", "restart", "crash"]),
    ),
    max_size=14,
)


@given(STEPS, st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=60)
def test_the_sums_equal_a_plain_fold_over_the_events(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], chance: random.Random
) -> None:
    """Across restarts, and across crashes that lose what was not on disk or tear the last line."""
    paths = paths_in(tmp_path_factory.mktemp("home"))
    usage = azt.UsageStats()
    usage.load(paths)
    kept: list[Json] = []  # on disk
    waiting: list[Json] = []

    def flush(with_sums: bool) -> None:
        lines, usage.pending = usage.pending, []
        usage.save(paths, lines, usage.snapshot() if with_sums else ())
        kept.extend(waiting)
        waiting.clear()

    for step in steps:
        if isinstance(step, list):
            usage.add(azt.Batch(step))
            waiting += [one.event() for one in step]
        elif step in ("flush", "save"):
            flush(step == "save")
        else:
            if step == "restart":
                flush(True)
            elif kept and waiting and chance.random() < 0.7:  # killed in the middle of a line
                whole = line(waiting[0])
                file = paths.usage_events / f"{azt._day(waiting[0]['at'])}.jsonl"
                with file.open("ab") as torn:
                    torn.write(whole[: chance.randrange(1, len(whole) - 1)])
            waiting.clear()
            usage = azt.UsageStats()
            usage.load(paths)
    assert counted(usage) == plain(kept + waiting)
    assert sorted(map(str, on_disk(paths))) == sorted(map(str, kept))


@pytest.mark.parametrize("file", ["lifetime.json", "daily.json"])
def test_damaged_sums_are_made_anew_from_the_events(tmp_path: Path, file: str) -> None:
    paths, usage = paths_in(tmp_path), azt.UsageStats()
    records = [record(NOON_MS + n, attempts=1) for n in range(5)]
    usage.add(azt.Batch(records))
    usage.save(paths, usage.pending, usage.snapshot())
    for name in (file, f"{file}.bak"):
        (paths.usage_events.parent / name).write_bytes(b'{"version": 1, "aggr')

    again = azt.UsageStats()
    again.load(paths)

    assert counted(again) == plain([one.event() for one in records])


def test_names_that_callers_invent_do_not_fill_the_memory() -> None:
    usage = azt.UsageStats()
    for start in range(0, 1000, 40):
        usage.add(
            azt.Batch(record(NOON_MS, model=f"model-{start + number}") for number in range(40))
        )
    rows = usage.lifetime.by["byModel"]
    assert len(rows) == azt.USAGE_KEYS_MAX + 1
    assert sum(row["requestCount"] for row in rows.values()) == 1000
    assert rows["other"]["requestCount"] == 1000 - azt.USAGE_KEYS_MAX


def test_a_disk_that_stays_full_costs_the_oldest_lines_and_no_more_memory() -> None:
    usage = azt.UsageStats()
    batch = azt.Batch([])
    batch.lines = [("2026-11-22", b"%d\n" % number) for number in range(azt.USAGE_PENDING_MAX)]
    usage.add(batch)
    batch.lines = [("2026-11-22", b"new\n")] * 5
    usage.add(batch)
    assert len(usage.pending) == azt.USAGE_PENDING_MAX
    assert usage.pending[0][1] == b"5\n" and usage.pending[-1][1] == b"new\n"


def test_days_too_long_ago_lose_their_detail_and_then_go() -> None:
    usage = azt.UsageStats()
    for day in range(azt.USAGE_DAYS_MAX + 10):
        usage.add(azt.Batch([record(NOON_MS - day * DAY_MS)]))
    _lifetime, daily = usage.snapshot()
    days = daily["days"]
    assert len(days) == azt.USAGE_DAYS_MAX
    assert sum("byModel" in day for day in days.values()) == azt.USAGE_DETAIL_DAYS
    assert "byModel" in days[max(days)] and "byModel" not in days[min(days)]
    assert usage.lifetime.total["requestCount"] == azt.USAGE_DAYS_MAX + 10


def test_what_the_node_program_counted_goes_on(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    aggregate = {
        **{"requestCount": 7, "successCount": 5, "failureCount": 2, "inputTokens": 100},
        **{"outputTokens": 50, "totalTokens": 150, "unknownTokenCount": 1, "imageCount": 3},
        **{"totalDurationMs": 9000, "averageDurationMs": 1285.7, "p95DurationMs": 5000},
        "durationBuckets": {"1000": 6, "5000": 1},
    }
    row = {"key": "gpt-5.4", "label": "gpt-5.4", "aggregate": aggregate}
    rows = {name: {} for name in azt.DIMENSIONS} | {"byModel": {"gpt-5.4": row}}
    lifetime = {"version": 1, "updatedAt": 1, "aggregate": aggregate, **rows}
    daily = {"version": 1, "updatedAt": 1, "days": {"2026-11-01": aggregate}}
    (paths.before / "usage").mkdir(parents=True)
    (paths.before / "usage" / "lifetime.json").write_text(json.dumps(lifetime))
    (paths.before / "usage" / "daily.json").write_text(json.dumps(daily))

    usage = azt.UsageStats()
    usage.load(paths)
    one = record(NOON_MS, model="gpt-5.4", usage={"input_tokens": 1}, attempts=1)
    usage.add(azt.Batch([one]))
    usage.save(paths, usage.pending, usage.snapshot())
    again = azt.UsageStats()
    again.load(paths)

    for stats in (usage, again):
        view = azt.sums_view(stats.lifetime.total)
        assert (view["requestCount"], view["totalTokens"], view["imageCount"]) == (8, 151, 3)
        assert stats.lifetime.by["byModel"]["gpt-5.4"]["requestCount"] == 8
        assert azt.sums_view(stats.day("2026-11-01").total)["durationBuckets"] == {
            "1000": 6,
            "5000": 1,
        }


# -- Charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "hours"),
    [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)],
    ids=["spring", "autumn", "summer"],
)
def test_a_day_is_as_long_as_its_zone_makes_it(first: str, hours: int) -> None:
    zone = ZoneInfo("Europe/Berlin")
    begin = datetime.fromisoformat(first).replace(tzinfo=zone)
    first_ms = int(begin.timestamp() * 1000)
    days = azt.bucket_starts(first_ms, first_ms + 3 * DAY_MS, "day", zone)
    assert days[1] - days[0] == hours * 3_600_000
    assert all(datetime.fromtimestamp(at / 1000, zone).hour == 0 for at in days)
    in_hours = azt.bucket_starts(days[0], days[1], "hour", zone)
    assert len(in_hours) == hours
    assert {b - a for a, b in zip(in_hours, in_hours[1:], strict=False)} == {3_600_000}


@given(st.lists(RECORDS, max_size=40), st.sampled_from(["model", "client", "result"]))
def test_a_chart_shows_every_event_once(records: list[azt.RequestRecord], by: str) -> None:
    events = [one.event() for one in records]
    first, last = NOON_MS - 5 * DAY_MS, NOON_MS + DAY_MS
    starts = azt.bucket_starts(first, last, "hour", UTC)
    chart = azt.series(events, starts, by, "requests", 1)
    assert sum(chart["totals"]) == len(events)
    assert sum(value for point in chart["points"] for value in point["v"]) == len(events)
    assert len(chart["keys"]) == min(2, len({one[by] for one in events}))
    for one in events:
        point = max((p for p in chart["points"] if p["t"] <= one["at"]), key=lambda p: p["t"])
        assert sum(point["v"]) >= 1


def test_too_many_points_are_refused() -> None:
    with pytest.raises(azt.BadRequest, match="Too many points"):
        azt.bucket_starts(NOON_MS - 30 * DAY_MS, NOON_MS, "minute", UTC)


# -- Who calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        ("codex_cli_rs/0.142.0 (Debian 12; x86_64) xterm", "Codex"),
        ("Codex Desktop/1.0", "Codex"),
        ("OpenClaw/2026.3", "OpenClaw"),
        ("Cline/3.2.1", "Cline"),
        ("RooCode/3.9", "Roo Code"),
        ("OpenAI/Python 2.8.0", "OpenAI/Python"),
        ("AsyncOpenAI/Python 2.8.0", "OpenAI/Python"),
        ("OpenAI/JS 6.9.0", "OpenAI/JS"),
        ("ai/6.0.3 ai-sdk/provider-utils/4.0", "AI SDK"),
        ("langchain-openai/1.0", "LangChain"),
        ("litellm/1.100.0", "LiteLLM"),
        ("Cursor/1.7", "Cursor"),
        ("Continue/1.2", "Continue"),
        ("curl/8.5.0", "curl"),
        ("azt-cli/0.1.0", "azt"),
        ("MyTool/9 (x)", "MyTool"),
        ("", "unknown"),
    ],
)
def test_clients_are_known_by_what_they_say(marks: str, name: str) -> None:
    assert azt.client_name(marks) == name


def test_clients_behind_a_common_library_are_known_by_their_other_headers() -> None:
    assert azt.client_name("Python/3.11 aiohttp/3.13", "", "Open WebUI", "") == "Open WebUI"
    assert azt.client_name("litellm/1.1", "", "Aider", "https://aider.chat") == "aider"
    assert azt.client_name("", "codex_vscode", "", "") == "Codex"
    assert azt.client_name("", "", "", "https://somebody.example/page") == "unknown"


# -- The request log ------------------------------------------------------------------------------


def test_the_log_keeps_the_newest_rows_and_its_file_stays_small(tmp_path: Path) -> None:
    file = paths_in(tmp_path).requests
    log = azt.RequestLog(200)
    for number in range(1500):
        log.add([line({"id": f"req_{number}", "at": NOON_MS + number})])
        if number % 50 == 49:
            new, log.pending = log.pending, []
            log.save(file, new, list(log.lines))
    again = azt.RequestLog(200)
    with file.open("ab") as torn:
        torn.write(b'{"id": "req_torn", "a')
    again.load(file, 0)
    assert [row["id"] for row in again.rows()] == [f"req_{n}" for n in range(1499, 1299, -1)]
    assert len(file.read_bytes().splitlines()) <= 401
    assert file.stat().st_mode & 0o777 == 0o600
    old = azt.RequestLog(200)
    old.load(file, NOON_MS + 1490)
    assert len(list(old.rows())) == 10


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (
            {
                "result": "failed",
                "status": 429,
                "error_code": "usage_limit_reached",
                "tries": [{"accountId": "acc_1", "account": "first"}],
            },
            "quota_exhausted",
        ),
        (
            {"result": "failed", "status": 401, "error_code": "account_auth_expired"},
            "login_rejected",
        ),
        ({"result": "failed", "status": 400, "error_code": "invalid_type"}, "bad_request"),
        ({"result": "failed", "status": 502, "error_code": "upstream_error"}, "upstream_5xx"),
        (
            {"result": "cancelled", "status": 499, "error_code": "client_closed_request"},
            "client_gone",
        ),
        (
            {"result": "failed", "status": 200, "error_code": "upstream_stream_truncated"},
            "stream_cut",
        ),
        (
            {
                "account_id": "acc_2",
                "account": "second",
                "tries": [
                    {"accountId": "acc_1", "account": "first", "errorType": "usage_limit_reached"},
                    {"accountId": "acc_2", "account": "second"},
                ],
            },
            "recovered_by_switch",
        ),
        ({"left": "acc_1", "account_id": "acc_2"}, "sticky_lost"),
        (
            {"result": "failed", "status": 429, "error_code": "usage_limit_reached"},
            "all_exhausted",
        ),
        (
            {
                "result": "failed",
                "status": 429,
                "error_code": "usage_limit_reached",
                "account_id": "acc_1",
                "tries": [{"accountId": "acc_1", "account": "first"}] * 2,
            },
            "quota_exhausted",
        ),
        (
            {
                "result": "failed",
                "status": 502,
                "error_code": "upstream_unreachable",
                "account_id": "acc_1",
            },
            "token_expired_offline",
        ),
        (
            {"result": "failed", "status": 404, "error_code": "model_not_found"},
            "model_not_available",
        ),
        (
            {
                "result": "failed",
                "status": 404,
                "error_code": "model_not_found",
                "is_listed": False,
            },
            "model_unknown",
        ),
        ({"result": "failed", "status": 418, "error_code": "odd"}, "bad_request"),
        ({"result": "failed", "status": 503, "error_code": "odd"}, "upstream_5xx"),
    ],
)
def test_what_went_wrong_is_said_in_words(fields: Json, code: str) -> None:
    why = azt.explain(record(NOON_MS, **fields))
    assert why is not None and why["code"] == code
    assert why["text"] and "{" not in why["text"]


def test_what_may_help_is_about_the_account_that_failed() -> None:
    failed = {"accountId": "acc_1", "account": "first", "errorType": "usage_limit_reached"}
    tries = [failed, {"accountId": "acc_2", "account": "second"}]
    why = azt.explain(record(NOON_MS, account_id="acc_2", account="second", tries=tries))

    assert why is not None
    assert {fix["accountId"] for fix in why["fixes"]} == {"acc_1"}


def test_a_failure_is_kept_as_values_that_its_verdict_shows() -> None:
    limit = azt.AztError(
        429, "rate_limit_exceeded", "wait", extra={"resets_at": NOON_MS // 1000 + 9}
    )
    far = azt.UpstreamError(502, "upstream_unreachable", "no", host="chatgpt.com")
    far.__context__ = socket.gaierror()
    bad = azt.BadRequest("no", "messages[2].content", "odd")
    wordy = azt.BadRequest("no", "what the person said", "odd")
    params = []
    for error in (limit, far, bad, wordy):
        one = record(NOON_MS, result="failed", status=error.status, error_code="")
        one.account_id, one.tries = "acc_1", [{"accountId": "acc_1", "account": "first"}]
        one.fail(error)
        why = azt.explain(one) or {}
        params.append((why["code"], why["params"]))
    assert params[0][0] == "rate_limited_short"
    assert (params[0][1]["d"], params[0][1]["until"]) == (9000, NOON_MS + 9000)
    assert (params[1][0], params[1][1]["host"]) == ("network_dns", "chatgpt.com")
    assert (params[2][0], params[2][1]["field"]) == ("bad_request", "messages[2].content")
    assert "field" not in params[3][1]


def test_every_verdict_can_be_said() -> None:
    for code in azt._VERDICTS:
        why = azt.explain(record(NOON_MS, result="failed", status=500, error_code=code))
        assert why is not None and why["text"].endswith(".")


def test_a_summary_of_a_request_has_counts_and_names_and_no_words() -> None:
    secret = "CANARY-words"
    body = {
        "model": "gpt-5.4",
        "messages": [
            {"role": "user", "content": secret},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": secret}}]},
        ],
        "tools": [{"type": "function", "function": {"name": secret}}],
        "reasoning_effort": "high",
        secret: secret,
    }
    summary = azt.request_summary(body)
    assert summary == {
        "messages": 2,
        "tools": 1,
        "images": 1,
        "effort": "high",
        "keys": ["messages", "model", "reasoning_effort", "tools"],
    }


@given(
    st.dictionaries(
        st.sampled_from(["messages", "input", "tools", "reasoning"]),
        st.one_of(
            st.none(),
            st.integers(),
            st.text(),
            st.lists(
                st.one_of(
                    st.none(),
                    st.text(),
                    st.dictionaries(
                        st.sampled_from(["content", "type"]),
                        st.one_of(st.text(), st.lists(st.integers())),
                    ),
                )
            ),
        ),
    )
)
def test_any_body_has_a_summary(body: Json) -> None:
    assert azt.request_summary(body)["messages"] >= 0


def test_files_of_usage_are_for_their_owner_alone(tmp_path: Path) -> None:
    paths, usage = paths_in(tmp_path), azt.UsageStats()
    usage.add(azt.Batch([record(NOON_MS)]))
    usage.save(paths, usage.pending, usage.snapshot())
    files = [path for path in paths.usage_events.parent.rglob("*") if path.is_file()]
    assert len(files) == 5  # two sums with their copies, one day of events
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert os.stat(paths.usage_events).st_mode & 0o777 == 0o700
