"""The administration as the console's pages take it: the fields of every answer, the events that
follow a change, jobs, and the Playground's real calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Json, account_file, limit_reached, text
from harness import Answer, Client, Gateway, Stream, chat_body, eventually, make_gateway

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
ADA = account_file()
BO = account_file("acct-2", "user-2", "bo@example.com", "pro")
CY = account_file("acct-3", "user-3", "cy@example.com", "free")


class Console(Client):
    """What the page does: marked changes, and events read as they come."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.url)
        self.gateway = gateway
        self.proof = gateway.proof()

    def call(self, method: str, path: str, json: Any = None) -> Answer:
        return self.request(method, ADMIN + path, json, headers=self.proof)

    def read(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def done(self, method: str, path: str, json: Any) -> Any:
        answer = self.call(method, path, json)
        assert answer.status < 300, answer.body
        return answer.json

    def set(self, **values: Any) -> None:
        named = {key.replace("__", "."): value for key, value in values.items()}
        self.done("PATCH", "/settings", {"values": named})

    def job(self, begun: Json) -> Json:
        def ended() -> Json | None:
            job: Json = self.read(f"/jobs/{begun['job']['id']}")
            return None if job["state"] == "running" else job

        job: Json = eventually(ended, 10)
        return job

    def watch(self, query: str = "") -> Watcher:
        return Watcher(self.open("GET", f"{ADMIN}/events{query}"))


class Watcher:
    """One stream of events."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.seen: list[tuple[str, Json]] = []
        self._rest = b""

    def until(self, name: str, is_it: Callable[[Json], bool] = lambda data: True) -> Json:
        """The data of the next event of that name that fits; those before it are in `seen`."""
        while True:
            while b"\n\n" not in self._rest:
                self._rest += self.stream.read_until(b"\n\n")
            block, _, self._rest = self._rest.partition(b"\n\n")
            lines = dict(
                line.split(": ", 1) for line in block.decode().split("\n") if line[0] != ":"
            )
            if "event" in lines:
                self.seen.append((lines["event"], json.loads(lines["data"])))
                if lines["event"] == name and is_it(self.seen[-1][1]):
                    return self.seen[-1][1]

    def __enter__(self) -> Watcher:
        self.until("hello")
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


@pytest.fixture
def console(new_gateway: NewGateway) -> Console:
    return Console(new_gateway(accounts=[ADA, BO, CY]))


@pytest.fixture
def ids(console: Console) -> dict[str, str]:
    """E-mail's first letter -> account id."""
    return {one["email"][0]: one["id"] for one in console.read("/accounts")["items"]}


# -- Shapes: every field of console.md 6 with its type --------------------------------------------

WORD, NUMBER, FLAG, LIST, OBJECT = (str,), (int, float), (bool,), (list,), (dict,)
MAYBE_WORD, MAYBE_NUMBER = (str, type(None)), (int, float, type(None))

WINDOW = {
    "key": WORD,
    "minutes": NUMBER,
    "usedPercent": NUMBER,
    "remainingPercent": NUMBER,
    "resetsAt": NUMBER,
    "pace": {"timeLeftPercent": NUMBER, "verdict": WORD, "emptyAt": MAYBE_NUMBER},
}
ACCOUNT: Json = {
    **dict.fromkeys(("id", "email", "accountId", "plan", "status"), WORD),
    **dict.fromkeys(("active", "inCodex", "excluded"), FLAG),
    "label": MAYBE_WORD,
    "createdAt": NUMBER,
    "auth": {"state": WORD, "checkedAt": MAYBE_NUMBER},
    "images": {"route": WORD, "ok": FLAG},
    "quota": {"capturedAt": NUMBER, "source": WORD, "trusted": FLAG, "windows": [WINDOW]},
}
ROW: Json = {
    **dict.fromkeys(("id", "method", "endpoint", "model", "requestedModel", "client"), WORD),
    **dict.fromkeys(("accountId", "account", "errorType"), MAYBE_WORD),
    **dict.fromkeys(("at", "status", "attempts", "durationMs", "images"), NUMBER),
    "result": WORD,
    "stream": FLAG,
    "firstTokenMs": MAYBE_NUMBER,
    "imageRoute": WORD,
    "tokens": dict.fromkeys(("input", "cached", "output", "reasoning", "total"), NUMBER),
}
JOB: Json = {
    **dict.fromkeys(("id", "kind", "state"), WORD),
    **dict.fromkeys(("done", "total", "failed", "startedAt"), NUMBER),
    "etaMs": MAYBE_NUMBER,
    "cancellable": FLAG,
    "failures": LIST,
    "result": (dict, type(None)),
}
ROUTING: Json = {
    "autoSwitch": FLAG,
    "order": WORD,
    "activeId": MAYBE_WORD,
    "queue": [{"id": WORD, "reason": WORD}],
    "skipped": LIST,
}
AGGREGATE = dict.fromkeys(
    "requestCount successCount failureCount cancelledCount inputTokens cachedInputTokens "
    "outputTokens reasoningTokens totalTokens unknownTokenCount imageCount totalDurationMs "
    "averageDurationMs p95DurationMs".split(),
    NUMBER,
) | {"durationBuckets": OBJECT, "firstTokenMedianMs": MAYBE_NUMBER}
USAGE_ROWS = [{"key": WORD, "label": WORD, "aggregate": AGGREGATE}]
LISTED = {name: ACCOUNT[name] for name in ("id", "email", "plan", "status", "auth", "images")}
STATE: Json = {
    "eventId": NUMBER,
    "now": NUMBER,
    "gateway": {
        **dict.fromkeys(
            ("version", "baseUrl", "codexBaseUrl", "adminUrl", "stateDir", "timeZone"), WORD
        ),
        **dict.fromkeys(("startedAt", "pid", "running"), NUMBER),
        "listen": [WORD],
    },
    "defaultModel": WORD,
    "routing": ROUTING,
    "accounts": [LISTED],
    "codex": {"takeover": {"on": FLAG}, "authAccountId": MAYBE_WORD},
    "today": AGGREGATE,
    "recent": [ROW],
    "notices": LIST,
    "jobs": LIST,
    "models": {"count": NUMBER, "syncedAt": MAYBE_NUMBER, "stale": FLAG},
    "firstRun": {"hasAccount": FLAG, "hasCalled": FLAG, "clientSeen": MAYBE_WORD},
    "removed": LIST,
}
DETAIL = ROW | {
    "attemptList": [
        {
            "n": NUMBER,
            "accountId": WORD,
            "account": WORD,
            "startedAt": NUMBER,
            "durationMs": NUMBER,
            "status": NUMBER,
            "action": WORD,
        }
    ],
    "timing": dict.fromkeys(
        ("queueMs", "connectMs", "firstByteMs", "firstTokenMs", "streamMs", "tokensPerSecond"),
        MAYBE_NUMBER,
    ),
    "request": {
        **dict.fromkeys(("bytes", "messages", "tools", "images"), NUMBER),
        "effort": MAYBE_WORD,
        "keys": [WORD],
    },
    "response": {"finish": WORD, "toolCalls": LIST, "bytes": NUMBER},
    "headers": {"user-agent": WORD, "content-type": WORD},
    "keyId": MAYBE_WORD,
    "remote": WORD,
    "upstreamRequestId": MAYBE_WORD,
    "sessionHint": MAYBE_WORD,
}
MODEL = {"id": WORD, "name": WORD, "input": [WORD], "default": FLAG, "efforts": [WORD]}
READS: dict[str, Json] = {
    "/accounts": {
        "items": [ACCOUNT],
        "next": MAYBE_WORD,
        "total": NUMBER,
        "counts": dict.fromkeys(
            ("all", "ready", "low", "empty", "unknown", "login_rejected", "excluded"), NUMBER
        ),
    },
    "/accounts/ada@example.com": {
        **ACCOUNT,
        "history": [{"at": NUMBER, "primary": NUMBER, "secondary": NUMBER}],
        "requests": [ROW],
        "statusParams": OBJECT,
        "excludedUntil": MAYBE_NUMBER,
        "priority": MAYBE_NUMBER,
        "lastUsedAt": MAYBE_NUMBER,
        "tokenExpiresAt": MAYBE_NUMBER,
    },
    "/codex": {
        "home": WORD,
        "installed": FLAG,
        "takeover": {"on": FLAG, "matchesGateway": FLAG, "path": WORD, "editedSince": FLAG},
        "auth": {"path": WORD, "exists": FLAG, "accountId": MAYBE_WORD, "email": MAYBE_WORD},
        "backups": LIST,
    },
    "/keys": {"items": LIST},
    "/models": {"items": [MODEL], "syncedAt": MAYBE_NUMBER},
    "/requests": {
        "items": [ROW],
        "next": MAYBE_WORD,
        "kept": NUMBER,
        "oldestAt": MAYBE_NUMBER,
        "facets": {"model": [WORD], "client": [WORD], "errorType": LIST},
    },
    "/settings": {"revision": NUMBER, "restartNeeded": LIST, "values": OBJECT, "fixed": OBJECT},
    "/state": STATE,
    "/usage": {
        **dict.fromkeys(("generatedAt", "startedAt"), NUMBER),
        **dict.fromkeys(("todayDate", "storageDir"), WORD),
        **dict.fromkeys(("startup", "today", "lifetime"), AGGREGATE),
        **dict.fromkeys(("byAccount", "byModel", "byEndpoint", "byImageRoute"), USAGE_ROWS),
        "bySource": USAGE_ROWS,
        "byError": LIST,
        "daily": [{"date": WORD, "aggregate": AGGREGATE}],
    },
    "/usage/series": {
        "bucketMs": NUMBER,
        "tz": WORD,
        "keys": [{"key": WORD, "label": MAYBE_WORD}],
        "points": [{"t": NUMBER, "v": LIST, "partial": FLAG}],
        "totals": [NUMBER],
    },
}


def misfits(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Where a value has not the shape: an object with these fields at least, a filled list of one
    shape, or one of some types."""
    if isinstance(shape, tuple):
        if not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape):
            yield f"{path}: {value!r}"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{path}: {value!r} is no filled list"
        for one in value if isinstance(value, list) else ():
            yield from misfits(one, shape[0], f"{path}[]")
    elif not isinstance(value, dict):
        yield f"{path}: {value!r} is no object"
    else:
        yield from (f"{path}.{name} is missing" for name in shape if name not in value)
        for name in shape.keys() & value.keys():
            yield from misfits(value[name], shape[name], f"{path}.{name}")


@pytest.fixture(scope="module")
def lived_in(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    """A gateway on which everything has happened once."""
    shared_upstream.reset()
    home = tmp_path_factory.mktemp("lived-in")
    gateway = make_gateway(home, shared_upstream, accounts=[ADA, BO])
    console = Console(gateway)
    headers = {"User-Agent": "OpenAI/Python 1.0"}
    assert console.post("/v1/chat/completions", chat_body(), headers=headers).status == 200
    console.job(console.done("POST", "/accounts/refresh-quotas", {}))
    eventually(lambda: console.read("/accounts/ada@example.com")["history"], 20)
    yield console
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


def test_an_import_is_a_job_when_it_is_checked(console: Console, upstream: FakeUpstream) -> None:
    new = [account_file(f"acct-{n}", f"user-{n}", f"p{n}@example.com") for n in range(4, 7)]
    preview = console.done("POST", "/accounts/import?dryRun=1", {"payload": [*new, {"a": 1}]})
    codes = [(one["result"], one.get("code")) for one in preview["items"]]
    asked = {"previewId": preview["previewId"], "indexes": [0, 2], "check": True}
    begun = console.call("POST", "/accounts/import", asked)
    job = console.job(begun.json)

    assert codes == [*[("new", None)] * 3, ("unreadable", "no_access_token")]
    assert begun.status == 202
    assert list(misfits(job, JOB)) == []
    assert (job["kind"], job["state"], job["done"]) == ("import", "done", 2)
    assert job["result"]["summary"]["new"] == 2
    assert [seen.path for seen in upstream.requests] == ["/backend-api/wham/usage"] * 2


# -- Accounts -------------------------------------------------------------------------------------


def test_accounts_are_filtered_searched_sorted_and_paged(
    console: Console, ids: dict[str, str]
) -> None:
    console.done("PATCH", f"/accounts/{ids['b']}", {"label": "Lab", "excluded": True})

    def names(query: str) -> str:
        return "".join(one["email"][0] for one in console.read(f"/accounts?{query}")["items"])

    first = console.read("/accounts?sort=name&limit=2")
    rest = console.read(f"/accounts?sort=name&limit=2&cursor={first['next']}")

    assert (names("status=excluded"), names("plan=plus"), names("q=LAB")) == ("b", "a", "b")
    assert names(f"q={ids['c']}") == "c"
    assert [one["email"][0] for one in first["items"]] == ["a", "c"]
    assert ([one["id"] for one in rest["items"]], rest["next"]) == ([ids["b"]], None)
    assert (first["total"], first["counts"]["all"], first["counts"]["excluded"]) == (3, 3, 1)
    assert console.call("GET", "/accounts?sort=size").error["code"] == "bad_field"


def test_the_state_of_300_accounts_stays_small(new_gateway: NewGateway) -> None:
    many = [account_file(f"account-{n:028}", f"u-{n}", f"name.{n}@example.com") for n in range(300)]
    console = Console(new_gateway(accounts=[]))
    console.done("POST", "/accounts/import", {"payload": many})
    console.job(console.done("POST", "/accounts/refresh-quotas", {}))

    raw = console.call("GET", "/state").body

    assert len(raw) < 200_000
    assert all(one["quota"]["windows"] for one in json.loads(raw)["accounts"])


def test_an_account_that_cannot_serve_is_activated_only_by_force(
    console: Console, ids: dict[str, str]
) -> None:
    console.done("PATCH", f"/accounts/{ids['b']}", {"excluded": True})
    path = f"/accounts/{ids['b']}/activate"

    refused = console.call("POST", path, {})
    forced = console.done("POST", path, {"force": True})

    assert (refused.status, refused.error["code"]) == (409, "account_unusable")
    assert (refused.error["params"]["id"], refused.error["params"]["reason"]) == (
        ids["b"],
        "excluded",
    )
    assert (forced["activeId"], forced["previousId"]) == (ids["b"], ids["a"])


def test_only_stale_quotas_are_read_when_that_is_asked_for(
    console: Console, ids: dict[str, str], upstream: FakeUpstream
) -> None:
    console.done("POST", f"/accounts/{ids['a']}/refresh-quota", {})

    job = console.job(console.done("POST", "/accounts/refresh-quotas", {"staleOnly": True}))

    assert job["total"] == 2
    assert [seen.account for seen in upstream.requests].count("acct-1") == 1


@pytest.mark.parametrize(("mode", "shown"), [("always", "a***@example.com"), ("lan", ADA["email"])])
def test_email_addresses_are_shortened_where_the_setting_says_so(
    console: Console, mode: str, shown: str
) -> None:
    console.set(ui__maskEmails=mode)
    with console.watch() as live:
        console.done("PATCH", "/accounts/ada@example.com", {"label": "Ada"})
        assert live.until("account")["email"] == shown
    assert console.read("/accounts")["items"][0]["email"] == shown
    exported = console.call("POST", "/accounts/export", {"ids": ["ada@example.com"]})
    assert exported.json["email"] == ADA["email"]


def test_cleared_statistics_stay_cleared_and_count_on(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    console = Console(gateway)
    console.chat()
    assert console.read("/usage")["lifetime"]["requestCount"] == 1
    assert console.call("DELETE", "/usage").status == 204
    console.chat()
    gateway.stop()

    usage = Console(gateway.start()).read("/usage")

    assert usage["lifetime"]["requestCount"] == usage["today"]["requestCount"] == 1


@pytest.mark.parametrize("path", READS)
def test_every_field_of_the_pages_api_is_there(lived_in: Console, path: str) -> None:
    assert list(misfits(lived_in.read(path), READS[path])) == []


def test_a_row_of_the_log_has_its_details(lived_in: Console) -> None:
    [row, *_] = lived_in.read("/requests")["items"]

    detail = lived_in.read(f"/requests/{row['id']}")

    assert list(misfits(detail, DETAIL)) == []
    assert row.items() <= detail.items()


def test_errors_name_their_parameters_and_the_request(lived_in: Console) -> None:
    refused = lived_in.call("PATCH", "/accounts/ada@example.com", {"label": "/"})

    assert refused.status == 400
    assert refused.error["code"] == "bad_field"
    assert refused.error["params"]["field"] == "label"
    assert refused.error["requestId"] == refused.headers["x-request-id"]


# -- State ----------------------------------------------------------------------------------------


def test_the_first_run_is_told_by_what_has_happened(new_gateway: NewGateway) -> None:
    console = Console(new_gateway(accounts=[]))
    browser = {"User-Agent": "Mozilla/5.0 (X11)", "Sec-Fetch-Dest": "image"}
    console.get("/favicon.ico", headers=browser)
    nothing = console.read("/state")
    console.done("POST", "/accounts/import", {"payload": ADA})
    headers = {"User-Agent": "OpenAI/Python 1.0"}
    console.post("/v1/chat/completions", chat_body(), headers=headers)

    state = console.read("/state")

    assert nothing["firstRun"] == {"hasAccount": False, "hasCalled": False, "clientSeen": None}
    assert nothing["recent"] == []
    begun = {"hasAccount": True, "hasCalled": True, "clientSeen": "OpenAI/Python"}
    assert state["firstRun"] == begun
    assert [row["client"] for row in state["recent"]] == ["OpenAI/Python"]


def test_a_dead_sign_in_is_a_notice_with_what_to_do(
    console: Console, ids: dict[str, str], upstream: FakeUpstream
) -> None:
    upstream.revoke("acct-1")
    with console.watch() as live:
        console.chat()
        account = live.until("account", lambda one: one["status"] == "login_rejected")
        notice = live.until("notice")

    assert (notice["code"], notice["level"]) == ("login_rejected", "warn")
    assert notice["action"] == {"kind": "login", "accountId": ids["a"]}
    assert notice in console.read("/state")["notices"]
    assert account["quota"] is None or account["quota"]["trusted"] is False


# -- Events ---------------------------------------------------------------------------------------


def test_a_change_of_one_page_is_told_to_the_others(console: Console, ids: dict[str, str]) -> None:
    with console.watch() as live:
        console.done("PATCH", f"/accounts/{ids['b']}", {"label": "Work"})
        assert live.until("account")["label"] == "Work"
        console.set(defaultModel="gpt-5.5")
        assert live.until("settings") == {"revision": console.read("/settings")["revision"]}
        console.done("POST", f"/accounts/{ids['b']}/activate", {})
        routing = live.until("routing")
        undo = console.done("POST", "/accounts/remove", {"ids": [ids["c"]]})["undo"]
        assert live.until("account.removed") == {"ids": [ids["c"]], "undo": undo}
        console.done("POST", "/accounts/restore", {"token": undo["token"]})
        assert live.until("account")["id"] == ids["c"]

    assert routing["activeId"] == ids["b"]
    assert "cause" not in routing
    assert list(misfits(routing, ROUTING)) == []


def test_an_automatic_switch_comes_with_its_cause(
    console: Console, ids: dict[str, str], upstream: FakeUpstream
) -> None:
    console.set(autoSwitch__enabled=True)
    upstream.script(account="acct-1", status=429, json=limit_reached(3600))
    with console.watch() as live:
        console.chat()
        routing = live.until("routing", lambda data: data["activeId"] != ids["a"])

    assert routing["cause"]["code"] == "quota_exhausted"
    assert (routing["cause"]["from"], routing["cause"]["to"]) == (ids["a"], routing["activeId"])


def test_a_running_request_is_seen_before_it_ends(console: Console, upstream: FakeUpstream) -> None:
    upstream.script(text("one", "two"), delay=1.0)
    with console.watch() as live:
        with console.open("POST", "/v1/chat/completions", chat_body(stream=True)) as stream:
            started = live.until("request.started")
            assert live.until("gateway", lambda data: data["running"] == 1)["status"] == "running"
            stream.read_rest()
        finished = live.until("request.finished")
        usage = live.until("usage")

    assert started["id"] == finished["id"]
    assert (started["result"], finished["result"]) == ("running", "ok")
    assert usage["today"]["requestCount"] == 1
    assert usage["minute"]["ok"] == 1


def test_the_progress_of_a_job_is_told_to_its_end(console: Console) -> None:
    with console.watch() as live:
        job = console.done("POST", "/accounts/refresh-quotas", {})["job"]
        told = live.until("job", lambda data: data["state"] == "done")

    assert (told["id"], told["done"], told["total"]) == (job["id"], 3, 3)
    assert list(misfits(told, JOB)) == []


def test_a_change_of_codex_files_is_seen_and_revives_a_dead_sign_in(
    console: Console, ids: dict[str, str], upstream: FakeUpstream
) -> None:
    upstream.revoke("acct-1")
    assert console.chat().status == 401
    upstream.revoked.clear()
    newer = account_file()
    names = ("id_token", "access_token", "refresh_token", "account_id")
    with console.watch() as live:
        tokens = {name: newer[name] for name in names}
        file = console.gateway.home / ".codex" / "auth.json"
        file.write_text(json.dumps({"auth_mode": "chatgpt", "tokens": tokens}))
        account = live.until("account", lambda one: one["id"] == ids["a"] and one["inCodex"])
        codex = live.until("codex")

    assert codex["auth"]["accountId"] == ids["a"]
    assert "backups" not in codex
    assert account["auth"]["state"] == "ok"
    assert console.chat().status == 200


def test_who_returns_is_told_what_it_missed_by_header_or_query(console: Console) -> None:
    number = console.read("/state")["eventId"]
    console.chat()
    eventually(lambda: console.read("/state")["eventId"] > number)

    with console.watch(f"?lastEventId={number}") as live:
        assert live.until("request.finished")["result"] == "ok"
    with console.watch("?lastEventId=0") as live:
        assert live.until("resync") == {}


def test_a_gateway_that_stops_says_so_and_ends_the_stream(new_gateway: NewGateway) -> None:
    gateway = new_gateway()
    with Console(gateway).watch() as live:
        gateway.process.terminate()
        assert live.until("gateway")["status"] == "draining"
        assert live.until("bye") == {"reason": "shutdown"}
    assert gateway.process.wait(10) == 0


# -- Playground -----------------------------------------------------------------------------------

CHAT = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}
PLAYED: list[tuple[str, Json]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/responses", {"model": "gpt-5.5", "input": "hi", "stream": True}),
    ("/v1/chat/completions", {**CHAT, "n": 2}),
]


def unsteady(answer: Answer) -> bytes:
    """The answer without ids and times, which no two answers share."""
    return re.sub(
        rb'(resp|msg|chatcmpl|req)[_-]\w+|"\w+_at":[\d.]+|"created":\d+', b"", answer.body
    )


@pytest.mark.parametrize(("path", "body"), PLAYED)
def test_a_played_call_gets_what_the_endpoint_answers(
    lived_in: Console, path: str, body: Json
) -> None:
    played = lived_in.call("POST", "/playground", {"path": path, "accountId": None, "body": body})
    direct = lived_in.post(path, body)

    assert played.status == direct.status
    assert played.headers["content-type"] == direct.headers["content-type"]
    assert unsteady(played) == unsteady(direct)


def test_a_played_call_is_made_by_the_chosen_account_and_logged_as_such(
    console: Console, ids: dict[str, str], upstream: FakeUpstream
) -> None:
    console.set(autoSwitch__enabled=True)
    asked = {"path": "/v1/chat/completions", "accountId": ids["b"], "body": CHAT}

    played = console.call("POST", "/playground", asked)
    upstream.script(account="acct-2", status=429, json=limit_reached(3600))
    refused = console.call("POST", "/playground", asked)

    assert (played.status, played.headers["x-azt-account"]) == (200, ids["b"])
    assert played.headers["x-azt-attempts"] == "1"
    assert refused.status == 429
    assert {seen.account for seen in upstream.turns} == {"acct-2"}
    rows = console.read("/requests")["items"]
    assert [(row["client"], row["endpoint"], row["result"]) for row in rows] == [
        ("Playground", "/v1/chat/completions", "failed"),
        ("Playground", "/v1/chat/completions", "ok"),
    ]
    assert rows[1]["id"] == played.headers["x-request-id"]
    assert console.read("/state")["routing"]["activeId"] == ids["a"]


def test_leaving_the_playground_ends_the_call(console: Console, upstream: FakeUpstream) -> None:
    upstream.script(text("one", "two", "three"), stall=True, after=5)
    asked = {"path": "/v1/chat/completions", "body": {**CHAT, "stream": True}}
    with console.open("POST", f"{ADMIN}/playground", asked, headers=console.proof) as stream:
        stream.read_until(b"one")
    upstream.wait_until(lambda: upstream.turns[-1].closed_at)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"path": "/v1/files", "body": {}}, 400, "bad_field"),
        ({"path": "/v1/responses", "body": []}, 400, "bad_field"),
        ({"path": "/v1/models", "accountId": "nobody"}, 404, "account_not_found"),
    ],
)
def test_odd_calls_of_the_playground_are_refused(
    lived_in: Console, asked: Json, status: int, code: str
) -> None:
    refused = lived_in.call("POST", "/playground", asked)

    assert (refused.status, refused.error["code"]) == (status, code)


def test_the_playground_lists_models(lived_in: Console) -> None:
    played = lived_in.call("POST", "/playground", {"path": "/v1/models"})

    assert played.json == lived_in.get("/v1/models").json
