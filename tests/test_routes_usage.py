"""Usage, request log, live events and metrics of a running gateway, against independent counts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from fake_upstream import FakeUpstream, account_file, answer, limit_reached, message, text, usage
from harness import MODEL, Client, Gateway, chat_body

import azt

Json = dict[str, Any]
NewGateway = Callable[..., Gateway]
ADMIN = "/_gateway/admin"
CURL = {"User-Agent": "curl/8"}


def eventually(look: Callable[[], Any], timeout: float = 10.0) -> Any:
    until = time.monotonic() + timeout
    while not (found := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def rows(client: Client, query: str = "") -> list[Json]:
    return client.get(f"{ADMIN}/requests?limit=500{query}").json["items"]


def events_on_disk(gateway: Gateway) -> list[Json]:
    files = sorted((gateway.state / "usage" / "events").glob("*.jsonl"))
    lines = (json.loads(line) for file in files for line in file.read_bytes().splitlines())
    return [line for line in lines if "quota" not in line]


# -- The whole ------------------------------------------------------------------------------------


def test_a_mixed_run_is_counted_exactly_also_after_kill_and_restart(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    mine: Counter[str] = Counter()
    lock = threading.Lock()

    def call(number: int) -> None:
        kind = number % 20
        if kind == 0:  # one in twenty fails
            assert client.chat([{"role": "nobody", "content": "x"}]).status == 400
            told: Json = {}
        elif kind % 4 == 1:
            told = client.chat().json["usage"]
        elif kind % 4 == 2:
            told = client.chat_stream(stream_options={"include_usage": True}).usage or {}
        elif kind == 7:
            drawn = client.post("/v1/images/generations", {"prompt": "a lighthouse"})
            told = drawn.json["usage"]
        elif kind % 4 == 3:
            told = client.responses().json["usage"]
        elif kind % 8 == 4:
            told = client.responses_stream().response["usage"]
        else:
            said = [{"type": "input_text", "text": "hi"}]
            item = {"type": "message", "role": "user", "content": said}
            asked = {"model": MODEL, "stream": True, "store": False, "input": [item]}
            told = client.post("/codex/v1/responses", asked).response["usage"]
        with lock:
            mine["requests"] += 1
            mine["failed"] += kind == 0
            mine["total"] += told.get("total_tokens", 0)
            mine["input"] += told.get("prompt_tokens", told.get("input_tokens", 0))
            mine["responses"] += kind not in (0, 7) and (kind % 4 == 3 or kind % 8 == 4)
            mine["images"] += kind == 7
            mine["codex"] += kind != 0 and kind % 8 == 0

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(call, range(1000)))

    def numbers(view: Json) -> Counter[str]:
        total = view["lifetime"]
        by = {row["key"]: row["aggregate"]["requestCount"] for row in view["byEndpoint"]}
        return Counter(
            requests=total["requestCount"],
            failed=total["failureCount"],
            total=total["totalTokens"],
            input=total["inputTokens"],
            images=total["imageCount"],
            responses=by["POST /v1/responses"],
            codex=by["POST /codex/v1/responses"],
        )

    view = client.get(f"{ADMIN}/usage").json
    assert mine["requests"] == 1000 and mine["failed"] == 50
    assert numbers(view) == mine
    assert view["lifetime"]["unknownTokenCount"] == 0
    assert view["today"] == view["lifetime"] == view["startup"]
    told = json.loads(gateway.azt("usage", "--json").stdout)
    assert told["today"] == told["lifetime"] == told["7 days"] == view["lifetime"]

    assert eventually(lambda: len(events_on_disk(gateway)) == 1000)
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait()
    assert gateway.process.stdout is not None
    gateway.process.stdout.close()
    gateway.start()
    client = Client(gateway.url)
    again = client.get(f"{ADMIN}/usage").json
    assert numbers(again) == mine
    assert again["startup"]["requestCount"] == 0
    assert len(rows(client)) == 500 and client.get(f"{ADMIN}/requests").json["kept"] == 1000
    gateway.stop()
    offline = json.loads(gateway.azt("usage", "--json").stdout)
    assert offline["lifetime"] == again["lifetime"]


def test_tokens_are_those_that_the_upstream_returned(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway().url)
    spent = usage(1000, 50, cached=600, reasoning_tokens=20)
    for _ in range(2):
        upstream.script(answer(message("hi"), usage=spent))
    client.chat_stream()
    client.responses()
    found = rows(client)
    assert [row["endpoint"] for row in found] == ["/v1/responses", "/v1/chat/completions"]
    for row in found:
        assert row["tokens"] == {
            **{"input": 1000, "cached": 600, "output": 50, "reasoning": 20, "total": 1050}
        }
        assert (row["model"], row["result"], row["attempts"]) == (MODEL, "ok", 1)
        assert row["plan"] == "plus" and row["accountId"].startswith("acc_")
    total = client.get(f"{ADMIN}/usage").json["lifetime"]
    assert (total["cachedInputTokens"], total["reasoningTokens"]) == (1200, 40)


def test_streams_that_fail_or_are_left_or_tell_no_usage_land_in_their_place(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway().url)
    upstream.script(answer(message("hi"), usage=None))
    assert client.chat().status == 200
    upstream.script(text("one", "two"), cut=True, after=5)
    client.chat_stream()
    upstream.script(text("one", "two"), stall=True, after=5)
    with client.open("POST", "/v1/chat/completions", chat_body(stream=True)) as stream:
        stream.read_until(b"one")
    found = eventually(lambda: rows(client) if len(rows(client)) == 3 else None)
    results = [(row["result"], row["errorType"]) for row in reversed(found)]
    assert results[0] == ("ok", None)
    assert results[1][0] == "failed"
    assert results[2] == ("cancelled", "client_closed_request")
    total = client.get(f"{ADMIN}/usage").json["lifetime"]
    assert (total["successCount"], total["failureCount"], total["cancelledCount"]) == (1, 1, 1)
    assert total["unknownTokenCount"] == 3 and total["totalTokens"] == 0


# -- The request log ------------------------------------------------------------------------------


def test_a_row_explains_which_accounts_were_tried(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    accounts = [account_file("acct-1", "user-1"), account_file("acct-2", "user-2")]
    gateway = new_gateway(accounts=accounts)
    gateway.azt("settings", "set", "autoSwitch.enabled", "true")
    client = Client(gateway.url)
    upstream.script(status=429, json=limit_reached())
    assert client.chat(tools=[]).status == 200

    row = client.get(f"{ADMIN}/requests/{rows(client)[0]['id']}").json

    first, second = row["attemptList"]
    assert (first["n"], first["status"], first["action"]) == (1, 429, "switched")
    assert first["errorType"] == "usage_limit_reached"
    assert (second["n"], second["status"], second["action"]) == (2, 200, "done")
    assert first["accountId"] != second["accountId"] == row["accountId"]
    assert row["why"]["code"] == "recovered_by_switch"
    assert row["request"]["messages"] == 1
    assert {"messages", "model", "tools"} <= set(row["request"]["keys"])
    assert row["timing"]["firstByteMs"] <= row["durationMs"]
    assert 0 <= row["timing"]["queueMs"] < 5000
    assert 0 <= row["timing"]["connectMs"] <= row["timing"]["firstByteMs"]


def test_rows_of_one_conversation_have_the_same_hint_and_tell_nothing_else_of_it(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway().url)
    for name in ("my diary", "my diary", "another"):
        client.post("/v1/responses", {"input": "hi", "prompt_cache_key": name})
    client.get("/v1/models")

    details = [client.get(f"{ADMIN}/requests/{row['id']}").json for row in rows(client)]
    other, second, first = [one["sessionHint"] for one in details if one["model"] != "-"]
    assert first == second != other
    assert "diary" not in json.dumps(details)


def test_a_row_says_how_much_was_answered_and_how_the_provider_names_the_calls(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway().url)
    upstream.script(text("a", "b"), headers={"x-request-id": "up-1", "cf-ray": "ray-1"})
    plain = client.chat()
    upstream.script(text("a", "b"), headers={"x-request-id": "up-2"})
    streamed = client.chat(stream=True)
    upstream.script(status=400, json={"detail": "no"}, headers={"x-request-id": "up-3"})
    client.chat()

    details = [client.get(f"{ADMIN}/requests/{row['id']}").json for row in rows(client)]
    named = [one["upstreamRequestId"] for one in details]
    assert named == ["up-3", "up-2", "up-1"]
    assert [one["attemptList"][0]["upstreamRequestId"] for one in details] == named
    assert [one["response"]["bytes"] for one in details[1:]] == [
        len(streamed.body),
        len(plain.body),
    ]


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"x-request-id": "a", "x-oai-request-id": "b", "cf-ray": "c"}, "a"),
        ({"x-request-id": "", "x-oai-request-id": "b", "cf-ray": "c"}, "b"),
        ({"cf-ray": "c\x1b[2J"}, "c[2J"),
        ({"x-request-id": "d" * 200}, "d" * 80),
        ({}, None),
    ],
)
def test_the_provider_names_a_call(headers: dict[str, str], name: str | None) -> None:
    assert azt.upstream_id(headers) == name


def test_rows_are_filtered_paged_exported_and_deleted(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    for number in range(6):
        agent = {"User-Agent": "library/1", "X-Title": "Cline"} if number % 2 else CURL
        client.post("/v1/chat/completions", chat_body(), headers=agent)
    client.chat([{"role": "nobody"}])
    page = client.get(f"{ADMIN}/requests?limit=3").json
    assert page["items"][0]["result"] == "failed" and page["kept"] == 7
    rest = client.get(f"{ADMIN}/requests?limit=30&before={page['next']}").json
    assert len({row["id"] for row in page["items"] + rest["items"]}) == 7
    assert rest["next"] is None
    assert len(rows(client, "&client=Cline")) == 3
    assert len(rows(client, "&result=failed&status=400")) == 1
    assert len(rows(client, "&q=cline")) == 3
    assert page["facets"]["client"] == ["Cline", "curl", "unknown"]
    lines = client.get(f"{ADMIN}/requests/export?client=Cline").body.splitlines()
    assert [json.loads(one)["client"] for one in lines] == ["Cline"] * 3
    proof = gateway.proof() | {"Content-Type": "application/json"}
    gone = client.request("DELETE", f"{ADMIN}/requests", headers=proof)
    assert gone.json == {"deleted": 7}
    assert rows(client) == []
    assert (gateway.state / "requests.jsonl").read_bytes() == b""
    assert client.get(f"{ADMIN}/usage").json["lifetime"]["requestCount"] == 7
    missing = client.get(f"{ADMIN}/requests/req_none")
    assert (missing.status, missing.error["code"]) == (404, "request_not_found")


def test_odd_queries_are_bad_requests(client: Client) -> None:
    queries = "usage/series?bucket=week usage/series?tz=Mars/Base usage/series?from=x"
    queries += " usage/series?top=x requests?since=x requests?limit=-1"
    for query in queries.split():
        answer = client.get(f"{ADMIN}/{query}")
        assert (answer.status, answer.error["code"]) == (400, "bad_field"), query


# -- Nothing but metadata -------------------------------------------------------------------------


def test_no_word_of_a_request_or_answer_reaches_the_disk(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    word = "CANARY7421"
    picture = f"data:image/png;base64,{word}AAAA"
    said = [
        {"role": "system", "content": word},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]},
    ]
    tool = {"type": "function", "function": {"name": f"{word}_tool", "parameters": {}}}
    upstream.script(text(word, word))
    client.chat(said, tools=[tool], user=word, metadata={word: word})
    upstream.script(status=400, json={"error": {"message": word, "code": "odd"}})
    client.chat(said)
    client.responses_stream(word, instructions=word)
    client.post(f"/v1/chat/completions?key={word}", {**chat_body(word), word: word})
    client.get(f"/v1/responses/{word}")
    client.get(f"/{word}")
    bearer = {"Authorization": f"Bearer {word}", "Cookie": word, "X-Secret": word}
    client.post("/v1/chat/completions", chat_body(word), headers=bearer)
    assert eventually(lambda: len(events_on_disk(gateway)) == 7)
    gateway.stop()
    files = [path for path in gateway.state.rglob("*") if path.is_file()]
    assert any(path.name == "requests.jsonl" and path.stat().st_size for path in files)
    found = [path.name for path in files if word.lower().encode() in path.read_bytes().lower()]
    assert not found


# -- Charts, live events, metrics, commands -------------------------------------------------------


def test_charts_and_the_table_show_what_happened(new_gateway: NewGateway) -> None:
    client = Client(new_gateway().url)
    client.chat()
    client.chat()
    client.responses()
    query = "from=2020-01-01&to=2020-01-01"
    assert sum(client.get(f"{ADMIN}/usage/series?{query}").json["totals"]) == 0
    chart = client.get(f"{ADMIN}/usage/series?by=endpoint&measure=requests&bucket=minute").json
    by = dict(zip((key["key"] for key in chart["keys"]), chart["totals"], strict=True))
    assert by == {"/v1/chat/completions": 2, "/v1/responses": 1}
    assert chart["points"][-1]["partial"] is True
    table = client.get(f"{ADMIN}/usage/export?tz=Asia/Kolkata")
    assert table.headers["content-type"].startswith("text/csv")
    lines = table.body.decode().splitlines()
    assert lines[0].startswith("date,accountId,model,endpoint,client,requestCount")
    assert len(lines) == 3


def test_sums_and_chart_of_the_same_zone_are_of_the_same_requests(new_gateway: NewGateway) -> None:
    client = Client(new_gateway().url)
    client.chat()
    client.responses()
    for zone in ("UTC", "Asia/Shanghai", "America/Los_Angeles"):
        day = datetime.now(ZoneInfo(zone)).strftime("%Y-%m-%d")
        sums = client.get(f"{ADMIN}/usage?from={day}&tz={zone}").json
        chart = client.get(f"{ADMIN}/usage/series?from={day}&tz={zone}&measure=requests").json
        assert sums["range"]["requestCount"] == sum(chart["totals"]) == 2, zone
        assert [row["aggregate"]["requestCount"] for row in sums["byEndpoint"]] == [1, 1]
    soon = int(time.time() * 1000)
    client.chat()
    assert client.get(f"{ADMIN}/usage?from={soon}&tz=UTC").json["range"]["requestCount"] == 1


def test_requests_are_seen_live_and_those_missed_are_sent_again(new_gateway: NewGateway) -> None:
    client = Client(new_gateway().url)
    with client.open("GET", f"{ADMIN}/events") as live:
        assert live.headers["content-type"].startswith("text/event-stream")
        live.read_until(b"event: hello")
        client.chat()
        seen = live.read_until(b'"result":"ok"')
    number = int(seen.rpartition(b"id: ")[2].split(b"\n")[0])
    client.responses()
    with client.open("GET", f"{ADMIN}/events", headers={"Last-Event-ID": str(number)}) as live:
        assert b"/v1/responses" in live.read_until(b'"result":"ok"')
    with client.open("GET", f"{ADMIN}/events", headers={"Last-Event-ID": "999999"}) as live:
        live.read_until(b"event: hello")
        client.chat()
        live.read_until(b"event: request.finished")


def test_at_most_eight_watch_and_the_oldest_is_told(new_gateway: NewGateway) -> None:
    client = Client(new_gateway().url)
    streams = [client.open("GET", f"{ADMIN}/events") for _ in range(9)]
    try:
        assert b'"too_many"' in streams[0].read_rest().body
        client.chat()
        assert streams[8].read_until(b"request.finished")
    finally:
        for stream in streams:
            stream.close()


def test_metrics_are_prometheus_text(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    client.chat_stream()
    text_ = client.get("/metrics").body.decode()
    values = dict(
        line.rsplit(" ", 1) for line in text_.splitlines() if line and not line.startswith("#")
    )
    assert values['azt_requests_total{result="ok"}'] == "1"
    assert int(values['azt_tokens_total{kind="output"}']) > 0
    assert values['azt_first_token_seconds_bucket{le="+Inf"}'] == "1"
    assert int(values["azt_process_open_fds"]) > 3
    assert client.get("/metrics", headers={"X-Forwarded-For": "1.2.3.4"}).status == 403
    key = json.loads(gateway.azt("keys", "add", "scraper", "--json").stdout)["key"]
    relayed = {"X-Forwarded-For": "1.2.3.4", "Authorization": f"Bearer {key}"}
    assert client.get("/metrics", headers=relayed).status == 200


def test_the_commands_show_usage_and_the_log(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    Client(gateway.url).chat()
    told = gateway.azt("usage")
    assert told.returncode == 0 and "LIFETIME" in told.stdout
    assert [line.split()[-1] for line in told.stdout.splitlines() if "requests" in line] == ["1"]
    by = gateway.azt("usage", "--by", "client").stdout
    assert "unknown" in by
    for name in ("model", "account", "endpoint"):
        assert gateway.azt("usage", "--by", name).returncode == 0
    lines = gateway.azt("log").stdout.splitlines()
    assert len(lines) == 1 and "/v1/chat/completions" in lines[0] and lines[0].endswith("ok")
    status = gateway.azt("status").stdout
    assert "today" in status and "1 requests" in status


def test_the_log_goes_on_as_requests_end(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    client.chat()
    command = [sys.executable, "-m", "azt", "log", "-f"]
    log = subprocess.Popen(
        command, env=gateway.environment, cwd=gateway.home, stdout=subprocess.PIPE, text=True
    )
    assert log.stdout is not None
    try:
        assert "/v1/chat/completions" in log.stdout.readline()
        answered = threading.Event()

        def keep_calling() -> None:
            while not answered.wait(0.2):
                client.responses()

        caller = threading.Thread(target=keep_calling)
        caller.start()
        line = log.stdout.readline()
        answered.set()
        caller.join()
        assert "/v1/responses" in line
    finally:
        log.send_signal(signal.SIGINT)
        log.wait(10)
        log.stdout.close()


def test_events_that_are_too_old_or_too_many_go_and_the_sums_stay(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway()
    client = Client(gateway.url)
    client.chat()
    gateway.stop()
    folder = gateway.state / "usage" / "events"
    today = next(folder.iterdir())
    old = time.strftime("%Y-%m-%d", time.localtime(time.time() - 3 * 86_400))
    (folder / f"{old}.jsonl").write_bytes(today.read_bytes() * 3)
    (folder / "2020-01-01.jsonl").write_bytes(today.read_bytes())
    gateway.start()
    client = Client(gateway.url)
    assert client.get(f"{ADMIN}/usage").json["lifetime"]["requestCount"] == 5
    rounds = [("keepDays", "30", {today.name, f"{old}.jsonl"}), ("keepMb", "1", {today.name})]
    for setting, value, left in rounds:
        gateway.azt("settings", "set", f"usage.{setting}", value)
        client.chat()
        gateway.stop()
        assert {path.name for path in folder.iterdir()} == left
        with (folder / f"{old}.jsonl").open("ab") as file:
            file.truncate(2 * 1024 * 1024)
        gateway.start()
        client = Client(gateway.url)
    assert client.get(f"{ADMIN}/usage").json["lifetime"]["requestCount"] == 7
