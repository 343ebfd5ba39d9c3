"""The administration over HTTP: what it answers, what it changes, and whom it refuses."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_upstream import FakeUpstream, Json, account_file, limit_reached, text
from harness import Answer, Client, Gateway, make_gateway

import azt

NewGateway = Callable[..., Gateway]

ADMIN = "/_gateway/admin"
MARK = {"X-AZT-Admin": "1"}
JSON_TYPE = {"Content-Type": "application/json"}
# The stream of events has no end.
READS = sorted({one.path for one in azt.ROUTES if one.access == "admin_read"} - {f"{ADMIN}/events"})
CHANGES = sorted(
    (one.method, one.path.replace("{id}", "nobody"))
    for one in azt.ROUTES
    if one.access.startswith("admin") and one.method != "GET"
)

ADA = account_file()
BO = account_file("acct-2", "user-2", "bo@example.com", "pro")
CY = account_file("acct-3", "user-3", "cy@example.com", "free")


# -- Set-up ---------------------------------------------------------------------------------------


class Admin(Client):
    """Calls below the administration, with the mark that changes need."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.url)
        self.state = gateway.state
        self.proof = gateway.proof()

    def call(self, method: str, path: str, json: Any = None, *, proof: bool = False) -> Answer:
        headers = self.proof if proof else MARK
        return self.request(method, ADMIN + path, json, headers=headers)

    def read(self, path: str) -> Any:
        return self.call("GET", path).json

    def imported(self, *accounts: Json) -> list[str]:
        """The ids that these accounts got."""
        done = self.call("POST", "/accounts/import", {"payload": list(accounts)})
        assert done.status == 200, done.body
        return [one["id"] for one in done.json["items"]]

    def saved(self, name: str) -> Json:
        value: Json = json.loads((self.state / name).read_text())
        return value


@pytest.fixture(scope="module")
def running(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path_factory.mktemp("admin"), shared_upstream, accounts=[])
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def admin(running: Gateway, upstream: FakeUpstream) -> Iterator[Admin]:
    """A gateway without accounts, keys or changed settings; cleared again after the test."""
    made = Admin(running)
    yield made
    for key in made.read("/keys")["items"]:
        assert made.call("DELETE", f"/keys/{key['id']}", proof=True).status == 204
    if ids := [one["id"] for one in made.read("/accounts")["items"]]:
        assert made.call("POST", "/accounts/remove", {"ids": ids}).status == 200
    free = {
        key: one.default
        for key, one in azt.SETTINGS.items()
        if one.env not in ("AZT_HOST", "AZT_PORT")
    }
    assert made.call("PATCH", "/settings", {"values": free}, proof=True).status == 200


def refused(answer: Answer, status: int, code: str) -> str:
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    return str(answer.error["message"])


# -- State and accounts ---------------------------------------------------------------------------


def test_the_state_describes_the_gateway(admin: Admin, running: Gateway) -> None:
    (ada,) = admin.imported(ADA)

    state = admin.read("/state")

    gateway = state["gateway"]
    assert gateway["version"] == azt.VERSION
    assert gateway["pid"] == running.process.pid
    assert gateway["baseUrl"] == f"{running.url}/v1"
    assert gateway["adminUrl"] == f"{running.url}/"
    assert gateway["listen"][0] == running.url.removeprefix("http://")
    assert gateway["stateDir"] == str(running.state)
    assert (gateway["lanApi"], gateway["keys"]) == (True, 0)
    assert 0 <= state["now"] - gateway["startedAt"] < 600_000
    assert state["routing"]["activeId"] == ada
    assert state["defaultModel"] == "gpt-5.4"
    assert state["models"]["count"] == 4
    assert [one["id"] for one in state["accounts"]] == [ada]


def test_an_account_is_described_without_its_tokens(admin: Admin) -> None:
    (ada,) = admin.imported(ADA)

    (shown,) = admin.read("/accounts")["items"]

    assert shown["id"] == ada
    assert (shown["email"], shown["plan"]) == ("ada@example.com", "plus")
    assert (shown["accountId"], shown["label"]) == ("acct-1", None)
    assert (shown["status"], shown["active"]) == ("unknown", True)
    assert shown["tokenExpiresAt"] == ADA["expires_at"] * 1000


def test_no_answer_holds_a_secret_and_no_cache_may_keep_one(admin: Admin) -> None:
    admin.imported({**ADA, "label": "Ada"})
    key = admin.call("POST", "/keys", {"name": "phone"}, proof=True).json["key"]
    secrets = [ADA[name] for name in ("access_token", "refresh_token", "id_token")]
    secrets += [
        key,
        admin.proof["Authorization"].split()[1],
        hashlib.sha256(key.encode()).hexdigest(),
    ]

    job = admin.call("POST", "/accounts/refresh-quotas", {}).json["job"]["id"]
    for path in READS:
        answer = admin.get(path.replace("{id}", job))

        if "{" in path and answer.status == 404:  # nothing has that name
            continue
        assert answer.status == 200, path
        assert answer.headers["cache-control"] == "no-store", path
        assert not [one for one in secrets if one.encode() in answer.body], path


def test_an_expired_account_says_so(admin: Admin) -> None:
    admin.imported(account_file(exp=1_700_000_000))

    assert admin.read("/accounts")["items"][0]["status"] == "expired"


@pytest.mark.parametrize(
    "payload",
    [ADA, [ADA], {"profiles": [ADA]}, {"tokens": {**ADA, "expires_at": None}}],
    ids=["object", "array", "profiles", "auth.json"],
)
def test_every_shape_of_an_import_is_taken(admin: Admin, payload: Any) -> None:
    done = admin.call("POST", "/accounts/import", {"payload": payload})

    assert +Counter(done.json["summary"]) == {"new": 1}
    assert done.headers["cache-control"] == "no-store"
    assert admin.read("/accounts")["items"][0]["email"] == "ada@example.com"


def test_importing_again_renews_and_keeps_the_serving_account(admin: Admin) -> None:
    ada, bo = admin.imported({**ADA, "label": "Mine"}, BO)
    renewed = account_file()

    done = admin.call("POST", "/accounts/import", {"payload": [renewed, BO, CY]})

    assert +Counter(done.json["summary"]) == {"new": 1, "update": 1, "same": 1}
    assert [one["result"] for one in done.json["items"]] == ["update", "same", "new"]
    shown = admin.read("/accounts")["items"]
    assert [(one["id"], one["label"], one["active"]) for one in shown][:2] == [
        (ada, "Mine", True),
        (bo, None, False),
    ]
    saved = admin.saved("accounts.json")["accounts"]
    assert saved[0]["refresh_token"] == renewed["refresh_token"]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({**BO, "refresh_token": ""}, "no_refresh_token"),
        ({**BO, "access_token": None}, "no_access_token"),
        ({**BO, "access_token": "two words"}, "unknown_format"),
        ({**BO, "refresh_token": "line\nbreak"}, "unknown_format"),
        ({"access_token": "opaque", "refresh_token": "rt"}, "no_account_id"),
        (
            {"access_token": "a", "refresh_token": "r", "account_id": "a", "expires_at": -5},
            "bad_expiry",
        ),
        ("text", "unknown_format"),
        (None, "unknown_format"),
    ],
)
def test_one_bad_entry_refuses_the_whole_import(admin: Admin, bad: Any, code: str) -> None:
    admin.imported(ADA)
    before = admin.saved("accounts.json")

    done = admin.call("POST", "/accounts/import", {"payload": [CY, bad]})

    assert "2" in refused(done, 400, code)
    assert [one["email"] for one in admin.read("/accounts")["items"]] == ["ada@example.com"]
    assert admin.saved("accounts.json") == before


@pytest.mark.parametrize("payload", [None, [], 5, "text", {}, {"profiles": []}, {"profiles": 5}])
def test_an_import_without_an_account_is_refused(admin: Admin, payload: Any) -> None:
    done = admin.call("POST", "/accounts/import", {"payload": payload})

    assert done.status == 400
    assert done.error["code"] in ("nothing_to_import", "unknown_format", "no_access_token")
    assert admin.read("/accounts")["items"] == []


def test_an_activated_account_serves_the_next_request(admin: Admin, upstream: FakeUpstream) -> None:
    ada, bo = admin.imported(ADA, BO)
    assert admin.chat().status == 200

    done = admin.call("POST", f"/accounts/{bo}/activate", {})
    assert admin.chat().status == 200

    assert (done.json["activeId"], done.json["previousId"]) == (bo, ada)
    assert (done.json["account"]["id"], done.json["account"]["active"]) == (bo, True)
    assert [turn.account for turn in upstream.turns] == ["acct-1", "acct-2"]
    assert admin.saved("accounts.json")["active_id"] == bo


@pytest.mark.parametrize("name", ["bo@example.com", "BO@EXAMPLE.COM", "Work%20account"])
def test_an_account_is_found_by_its_email_and_label(admin: Admin, name: str) -> None:
    _, bo = admin.imported(ADA, {**BO, "label": "Work account"})

    assert admin.call("POST", f"/accounts/{name}/activate", {}).json["activeId"] == bo


@pytest.mark.parametrize("name", ["nobody", "acc_zz", "%2e%2e%2fadmin", "acc_"])
def test_a_name_that_fits_no_single_account_changes_nothing(admin: Admin, name: str) -> None:
    ada, _ = admin.imported(ADA, BO)

    assert admin.call("POST", f"/accounts/{name}/activate", {}).status in (400, 404)
    assert admin.read("/state")["routing"]["activeId"] == ada


def test_removing_the_serving_account_hands_over_to_the_next(admin: Admin) -> None:
    ada, bo, cy = admin.imported(ADA, BO, CY)

    done = admin.call("POST", "/accounts/remove", {"ids": [ada, "cy@example.com", cy]})

    assert (done.json["removed"], done.json["activeId"]) == (2, bo)
    assert [one["id"] for one in admin.read("/accounts")["items"]] == [bo]
    assert ADA["refresh_token"] not in (admin.state / "accounts.json").read_text()


def test_one_unknown_name_removes_nothing(admin: Admin) -> None:
    ada, _ = admin.imported(ADA, BO)

    refused(
        admin.call("POST", "/accounts/remove", {"ids": [ada, "nobody"]}), 404, "account_not_found"
    )

    assert admin.read("/accounts")["total"] == 2


@pytest.mark.parametrize("ids", [None, [], "acc", [""], [None], 5])
def test_removing_nobody_in_particular_is_refused(admin: Admin, ids: Any) -> None:
    admin.imported(ADA)

    refused(admin.call("POST", "/accounts/remove", {"ids": ids}), 400, "bad_field")

    assert admin.read("/accounts")["total"] == 1


# -- Quota and rotation ---------------------------------------------------------------------------


def wait_for_job(admin: Admin, job: Json) -> Json:
    until = time.monotonic() + 10
    while job["state"] == "running":
        assert time.monotonic() < until, job
        time.sleep(0.01)
        job = admin.read(f"/jobs/{job['id']}")
    return job


def windows(account: Json) -> list[tuple[str, int, int, str]]:
    return [
        (one["key"], one["minutes"], one["remainingPercent"], one["pace"]["verdict"])
        for one in account["quota"]["windows"]
    ]


def test_the_quota_of_an_account_is_read_without_a_model_call(
    admin: Admin, upstream: FakeUpstream
) -> None:
    (ada,) = admin.imported(ADA)
    assert admin.read("/accounts")["items"][0]["quota"] is None

    shown = admin.call("POST", f"/accounts/{ada}/refresh-quota", {}).json

    assert windows(shown) == [("primary", 300, 90, "ok"), ("secondary", 10_080, 80, "ok")]
    assert (shown["status"], shown["quota"]["source"]) == ("ready", "usage_endpoint")
    assert shown["quota"]["credits"] == {"has": False, "unlimited": False, "balance": "0"}
    assert shown["quota"]["windows"][0]["pace"]["timeLeftPercent"] == 5
    assert shown["quota"]["windows"][0]["resetsAt"] == pytest.approx(
        (time.time() + 900) * 1000, abs=5000
    )
    assert upstream.turns == []


def test_an_answer_tells_the_quota_too(admin: Admin, upstream: FakeUpstream) -> None:
    admin.imported(ADA)
    upstream.script(
        text("hi"),
        vendor=False,
        headers={
            "x-codex-primary-used-percent": "85",
            "x-codex-bengalfox-primary-used-percent": "40",
            "x-codex-bengalfox-primary-window-minutes": "300",
        },
    )

    assert admin.chat().status == 200

    (shown,) = admin.read("/accounts")["items"]
    assert windows(shown) == [("primary", 300, 15, "ok")]
    assert [one["key"] for one in shown["quota"]["extra"]] == ["codex-bengalfox"]
    assert (shown["status"], shown["quota"]["source"]) == ("low", "response_headers")
    assert shown["lastUsedAt"] == pytest.approx(time.time() * 1000, abs=5000)


def test_a_failed_reading_keeps_the_old_one(admin: Admin, upstream: FakeUpstream) -> None:
    (ada,) = admin.imported(ADA)
    before = admin.call("POST", f"/accounts/{ada}/refresh-quota", {}).json["quota"]
    for how in ({"status": 500, "json": {}}, {"json": {"plan_type": None}}, {"body": b"<html>"}):
        upstream.script(path="/wham/usage", **how)

        refused(admin.call("POST", f"/accounts/{ada}/refresh-quota", {}), 502, "upstream_error")

        assert admin.read("/accounts")["items"][0]["quota"]["capturedAt"] == before["capturedAt"]


def test_quotas_of_all_accounts_are_read_as_a_job(admin: Admin, upstream: FakeUpstream) -> None:
    ids = admin.imported(ADA, BO, CY)
    upstream.script(path="/wham/usage", account="acct-2", status=500, json={})
    begun = admin.call("POST", "/accounts/refresh-quotas", {})
    job = wait_for_job(admin, begun.json["job"])

    assert begun.status == 202
    assert (job["state"], job["done"], job["total"], job["failed"]) == ("done", 3, 3, 1)
    assert [(one["id"], one["code"]) for one in job["failures"]] == [(ids[1], "upstream_error")]
    known = [one["quota"] is not None for one in admin.read("/accounts")["items"]]
    assert known == [True, False, True]
    assert (job["cancellable"], job["kind"]) == (False, "refresh_quotas")
    assert job in admin.read("/state")["jobs"]


def test_a_job_of_many_accounts_keeps_to_its_concurrency_and_can_be_cancelled(
    admin: Admin, upstream: FakeUpstream
) -> None:
    admin.imported(*(account_file(f"acct-{n}", f"user-{n}") for n in range(12)))
    assert admin.call("PATCH", "/settings", {"values": {"quota.concurrency": 3}}).status == 200
    upstream.script(path="/wham/usage", json={}, delay=30, times=12)
    job = admin.call("POST", "/accounts/refresh-quotas", {}).json["job"]
    upstream.wait_until(lambda: len(upstream.requests) == 3)

    again = admin.call("POST", "/accounts/refresh-quotas", {})
    gone = admin.call("DELETE", f"/jobs/{job['id']}")

    refused(again, 409, "already_running")
    assert again.error["params"] == {"jobId": job["id"]}
    assert gone.status == 202
    assert wait_for_job(admin, gone.json)["state"] == "cancelled"
    assert len(upstream.requests) == 3
    refused(admin.get(f"{ADMIN}/jobs/nothing"), 404, "job_not_found")
    for ids in ([""], "all", [[]]):
        body = {"ids": ids}
        refused(admin.call("POST", "/accounts/refresh-quotas", body), 400, "bad_field")


def test_an_excluded_account_is_skipped_and_comes_back(admin: Admin) -> None:
    ada, bo = admin.imported(ADA, BO)

    shown = admin.call("PATCH", f"/accounts/{bo}", {"excluded": True}).json
    routing = admin.read("/state")["routing"]
    settings = admin.read("/settings")["values"]["autoSwitch"]
    again = admin.call("PATCH", f"/accounts/{bo}", {"excluded": False}).json

    assert (shown["excluded"], shown["status"]) == (True, "excluded")
    assert (routing["activeId"], routing["queue"]) == (ada, [])
    assert routing["skipped"] == [{"id": bo, "reason": "excluded", "until": None}]
    assert settings["excludedIds"] == [bo]
    assert (again["excluded"], again["status"]) == (False, "unknown")
    assert admin.read("/state")["routing"]["queue"] == [{"id": bo, "reason": "most_left"}]


def test_an_exclusion_can_end_by_itself(admin: Admin) -> None:
    _, bo = admin.imported(ADA, BO)
    until = (int(time.time()) + 3600) * 1000

    shown = admin.call("PATCH", f"/accounts/{bo}", {"excludedUntil": until}).json

    assert (shown["excluded"], shown["excludedUntil"]) == (True, until)
    assert (shown["status"], shown["statusParams"]["until"]) == ("excluded", until)
    assert not admin.call("PATCH", f"/accounts/{bo}", {"excluded": False}).json["excluded"]
    over = {"excludedUntil": int(time.time() - 1) * 1000}
    assert not admin.call("PATCH", f"/accounts/{bo}", over).json["excluded"]


@pytest.mark.parametrize(
    "change", [{"excluded": "yes"}, {"excluded": 1.5}, {"excludedUntil": "soon"}]
)
def test_an_exclusion_that_says_nothing_is_refused(admin: Admin, change: Json) -> None:
    (ada,) = admin.imported(ADA)
    refused(admin.call("PATCH", f"/accounts/{ada}", change), 400, "bad_field")


def test_the_state_tells_why_it_switched(admin: Admin, upstream: FakeUpstream) -> None:
    ada, bo, cy = admin.imported(ADA, BO, CY)
    assert admin.call("PATCH", "/settings", {"values": {"autoSwitch.enabled": True}}).status == 200
    upstream.script(account="acct-1", status=429, json=limit_reached(3600))

    answer = admin.chat()

    state = admin.read("/state")
    routing, account = state["routing"], state["accounts"][0]
    until = account["statusParams"]["until"]
    assert (answer.status, answer.headers["x-azt-attempts"]) == (200, "2")
    assert answer.headers["x-azt-account"] == bo
    assert (account["status"], account["active"]) == ("empty", False)
    assert until == pytest.approx((time.time() + 3600) * 1000, abs=5000)
    assert (routing["autoSwitch"], routing["activeId"]) == (True, bo)
    assert routing["queue"] == [{"id": cy, "reason": "most_left"}]
    assert routing["skipped"] == [{"id": ada, "reason": "quota_exhausted", "until": until}]
    [switch] = [{**one, "at": 0} for one in routing["switches"][-1:]]
    told = {"at": 0, "from": ada, "to": bo, "reason": "quota_exhausted", "until": until}
    assert switch == told


# -- Settings -------------------------------------------------------------------------------------


def test_settings_are_shown_nested_with_what_fixes_them(admin: Admin) -> None:
    shown = admin.read("/settings")

    values = azt.flattened(shown["values"])
    assert {*values} == {*azt.SETTINGS, "networkProxy.hasPassword"}
    assert shown["values"]["server"]["allowedHosts"] == []
    assert shown["fixed"] == {"server.host": "command line", "server.port": "command line"}
    assert shown["restartNeeded"] == []


@pytest.mark.parametrize("values", [{"log": {"level": "debug"}}, {"log.level": "debug"}])
def test_a_change_is_answered_with_the_new_values(admin: Admin, values: Json) -> None:
    before = admin.read("/settings")

    done = admin.call("PATCH", "/settings", {"revision": before["revision"], "values": values})

    assert done.status == 200
    assert done.json == admin.read("/settings")
    assert done.json["revision"] == before["revision"] + 1
    assert done.json["values"]["log"]["level"] == "debug"
    assert admin.saved("settings.json")["values"]["log.level"] == "debug"


def test_a_stale_revision_changes_nothing(admin: Admin) -> None:
    revision = admin.read("/settings")["revision"]
    change = {"revision": revision, "values": {"defaultModel": "gpt-5.5"}}
    assert admin.call("PATCH", "/settings", change).status == 200

    late = {"revision": revision, "values": {"defaultModel": "gpt-6-luna"}}
    refused(admin.call("PATCH", "/settings", late), 409, "stale_revision")

    assert admin.read("/settings")["values"]["defaultModel"] == "gpt-5.5"
    assert admin.read("/settings")["revision"] == revision + 1


@pytest.mark.parametrize(
    "values",
    [
        {"defaultModel": "gpt-5.5", "no.such": 1},
        {"defaultModel": "gpt-5.5", "limits.bodyMb": 0},
        {"defaultModel": "gpt-5.5", "limits": {"bodyMb": "many"}},
        {"defaultModel": "gpt-5.5", "networkProxy.hasPassword": True},
        {"defaultModel": "gpt-5.5", "log": "debug"},
        {"defaultModel": 5},
        "defaultModel",
        None,
    ],
    ids=str,
)
def test_one_bad_value_refuses_the_whole_change(admin: Admin, values: Any) -> None:
    before = admin.read("/settings")

    assert admin.call("PATCH", "/settings", {"values": values}).status == 400

    assert admin.read("/settings") == before


@pytest.mark.parametrize("key", [key for key, one in azt.SETTINGS.items() if one.widens])
def test_a_setting_that_lets_more_in_needs_the_admin_token(admin: Admin, key: str) -> None:
    change = {"values": {"defaultModel": "gpt-5.5", key: azt.SETTINGS[key].default}}

    bare = admin.call("PATCH", "/settings", change)
    proven = admin.call("PATCH", "/settings", change, proof=True)

    assert bare.status == 401
    assert "azt settings set" in bare.error["message"]
    fixed = key in ("server.host", "server.port")
    assert proven.status == (409 if fixed else 200)
    assert not fixed or "command line" in refused(proven, 409, "setting_fixed")


def test_these_settings_need_proof() -> None:
    """trust.md row 9: everything below `server`, `apiKeys` and `networkProxy`."""
    groups = ("apiKeys.", "networkProxy.", "server.")

    assert [key for key, one in azt.SETTINGS.items() if one.widens] == [
        key for key in azt.SETTINGS if key.startswith(groups)
    ]


def test_the_password_of_a_proxy_is_never_shown(admin: Admin) -> None:
    url = "http://me:hunter2@proxy.example:3128"

    done = admin.call("PATCH", "/settings", {"values": {"networkProxy.url": url}}, proof=True)

    assert done.json["values"]["networkProxy"]["url"] == "http://proxy.example:3128"
    assert done.json["values"]["networkProxy"]["hasPassword"] is True
    assert b"hunter2" not in admin.get(f"{ADMIN}/settings").body


# -- Keys and models ------------------------------------------------------------------------------


def test_a_key_is_made_listed_and_revoked(admin: Admin) -> None:
    made = admin.call("POST", "/keys", {"name": "phone"}, proof=True)
    other = admin.call("POST", "/keys", {"name": "tablet"}, proof=True)
    listed = admin.read("/keys")["items"]
    revoked = admin.call("DELETE", f"/keys/{made.json['item']['id']}", proof=True)

    assert (made.status, made.json["first"], other.json["first"]) == (201, True, False)
    assert made.json["key"].startswith(made.json["item"]["prefix"])
    assert [one["id"] for one in listed] == [one.json["item"]["id"] for one in (made, other)]
    assert made.json["item"].items() <= listed[0].items()
    assert made.json["key"] not in str(listed)
    assert "hash" not in listed[0]
    assert (revoked.status, revoked.body) == (204, b"")
    assert [one["name"] for one in admin.read("/keys")["items"]] == ["tablet"]


@pytest.mark.parametrize("name", [None, "", "a/b", "x" * 65, "line\nbreak", 5])
def test_a_key_needs_a_plain_name(admin: Admin, name: Any) -> None:
    refused(admin.call("POST", "/keys", {"name": name}, proof=True), 400, "bad_field")
    assert admin.read("/keys")["items"] == []


def test_an_unknown_key_cannot_be_revoked(admin: Admin) -> None:
    admin.call("POST", "/keys", {"name": "phone"}, proof=True)

    refused(admin.call("DELETE", "/keys/tablet", proof=True), 404, "key_not_found")

    assert len(admin.read("/keys")["items"]) == 1


def test_models_are_listed_and_refreshed(admin: Admin, upstream: FakeUpstream) -> None:
    admin.imported(ADA)
    upstream.etag = 'W/"new"'
    upstream.models = upstream.models[:2]

    begun = admin.call("POST", "/models/refresh", {})

    assert begun.status == 202
    job = wait_for_job(admin, begun.json["job"])
    assert (job["kind"], job["state"]) == ("models", "done")
    assert job["result"] == {"changed": True, "count": 2}
    assert admin.read("/models")["source"] == "azt"
    assert [one["id"] for one in admin.read("/models")["items"]] == ["gpt-5.5", "gpt-5.4"]
    assert admin.read("/models")["items"][1] == {
        "id": "gpt-5.4",
        "name": "gpt-5.4",
        "input": ["text", "image"],
        "default": True,
        "efforts": ["low", "medium", "high"],
        "source": "synced",
    }
    listed = [one["id"] for one in admin.get("/v1/models").json["data"]]
    assert listed == ["gpt-5.5", "gpt-5.4", "gpt-image-2"]


def test_a_refresh_without_an_account_says_what_to_do(admin: Admin) -> None:
    job = wait_for_job(admin, admin.call("POST", "/models/refresh", {}).json["job"])

    [failure] = job["failures"]
    assert (job["state"], failure["code"]) == ("failed", "no_account")
    assert "azt accounts import" in failure["message"]


# -- Who may: rows 6 to 11 of the decision table --------------------------------------------------


def ask(client: Client, method: str, path: str, **headers: str) -> Answer:
    body = None if method == "DELETE" else b"{}"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, body=body, headers=sent)


def state_files(admin: Admin) -> dict[str, bytes]:
    """What only a change changes; the log and the sums of usage are written at any time."""
    names = ("accounts.json", "admin-token", "codex.json", "keys.json", "settings.json")
    files = (admin.state / name for name in names)
    return {path.name: path.read_bytes() for path in files if path.exists()}


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_no_change_without_the_header_that_pages_cannot_send(
    admin: Admin, method: str, path: str
) -> None:
    before = state_files(admin)

    bare = ask(admin, method, path, Authorization=admin.proof["Authorization"])

    refused(bare, 403, "csrf_header_missing")
    assert state_files(admin) == before


@pytest.mark.parametrize(("method", "path"), [one for one in CHANGES if one[0] != "DELETE"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_no_change_by_anything_but_json(admin: Admin, method: str, path: str, kind: str) -> None:
    before = state_files(admin)

    answer = admin.request(method, path, body=b"{}", headers={**admin.proof, "Content-Type": kind})

    refused(answer, 415, "unsupported_media_type")
    assert state_files(admin) == before


@pytest.mark.parametrize(
    ("method", "path"),
    sorted((one.method, one.path) for one in azt.ROUTES if one.access == "admin_proof"),
)
@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer azt_admin_wrong", "Basic {token}"])
def test_keys_are_made_and_revoked_only_with_the_admin_token(
    admin: Admin, method: str, path: str, sent: str
) -> None:
    bearer = sent.format(token=admin.proof["Authorization"].split()[1])
    headers = {**MARK, **({"Authorization": bearer} if bearer else {})}

    answer = admin.request(method, path, {"name": "x"}, headers=headers)

    refused(answer, 401, "proof_needed")
    assert admin.read("/keys")["items"] == []


STRANGERS = {
    "another page": {"Origin": "https://evil.example"},
    "a page of another port": {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
    "a listed page": {"Origin": "https://listed.example"},
    "a page without origin": {"Origin": "null"},
    "a cross-site request": {"Sec-Fetch-Site": "cross-site"},
    "a relay": {"X-Forwarded-For": "127.0.0.1"},
    "another relay": {"Forwarded": "for=127.0.0.1"},
    "a tunnel": {"CF-Connecting-IP": "127.0.0.1"},
    "a proxy": {"Via": "1.1 nginx"},
    "a rebound name": {"Host": "evil.example"},
    "a container": {"Host": "host.docker.internal"},
    "an address of the network": {"Host": "192.168.1.5:8787"},
}


@pytest.fixture
def listed_origin(admin: Admin) -> None:
    change = {"values": {"server.corsOrigins": ["https://listed.example"]}}
    assert admin.call("PATCH", "/settings", change, proof=True).status == 200


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_get_no_answer_of_the_administration(
    admin: Admin, listed_origin: None, stranger: str
) -> None:
    before = state_files(admin)

    answers = [
        ask(admin, method, path, **{**admin.proof, **JSON_TYPE, **STRANGERS[stranger]})
        for method, path in [*CHANGES, *(("GET", path) for path in READS)]
    ]

    assert {one.status for one in answers} == {403}
    assert len({one.error["message"] for one in answers}) == 1
    for one in answers:
        assert not [name for name in one.headers if name.startswith("access-control-")]
    assert state_files(admin) == before


def test_a_listed_page_reaches_the_api_all_the_same(admin: Admin, listed_origin: None) -> None:
    headers = {"Origin": "https://listed.example", "Sec-Fetch-Site": "cross-site"}

    answer = admin.get("/v1/models", headers=headers)

    assert (answer.status, answer.headers["vary"]) == (200, "Origin")
    assert answer.headers["access-control-allow-origin"] == "https://listed.example"


@pytest.mark.parametrize("method", ["PATCH", "POST"])
def test_no_preflight_opens_the_administration_to_a_page(admin: Admin, method: str) -> None:
    path = "/settings" if method == "PATCH" else "/keys"
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": method}

    answer = admin.request("OPTIONS", ADMIN + path, headers=headers)

    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_own_page_reads_and_changes(admin: Admin, running: Gateway) -> None:
    own = {"Origin": running.url, "Sec-Fetch-Site": "same-origin", **MARK, **JSON_TYPE}

    read = admin.get(f"{ADMIN}/state", headers=own)
    changed = ask(admin, "PATCH", f"{ADMIN}/settings", **own)
    body = {"values": {"defaultModel": "gpt-5.5"}}
    accepted = admin.request("PATCH", f"{ADMIN}/settings", body, headers=own)

    assert (read.status, accepted.status) == (200, 200)
    refused(changed, 400, "bad_field")


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-Method-Override"])
def test_no_method_is_overridden(admin: Admin, header: str) -> None:
    answer = ask(admin, "POST", f"{ADMIN}/keys", **{**admin.proof, **JSON_TYPE, header: "DELETE"})

    assert answer.status == 405


# -- Callers from the network ---------------------------------------------------------------------


class Neighbour(Client):
    """Calls from and to an address of this machine that is not loopback."""

    place: str
    """How azt sees it: `lan`, or `public`."""


def own_address(family: socket.AddressFamily) -> str | None:
    """An address that others see. Connecting a datagram socket sends nothing."""
    far = "198.51.100.1" if family == socket.AF_INET else "2001:db8::1"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


@pytest.fixture(scope="module")
def on_the_network(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
        host = "::"
    except OSError:
        host = "0.0.0.0"
    home = tmp_path_factory.mktemp("network")
    gateway = make_gateway(home, shared_upstream, arguments=("--host", host, "--port", "0"))
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture(params=["IPv4", "IPv6"])
def neighbour(
    request: pytest.FixtureRequest, on_the_network: Gateway, upstream: FakeUpstream
) -> Neighbour:
    address = own_address(socket.AF_INET if request.param == "IPv4" else socket.AF_INET6)
    if address is None or azt.peer_place(address, ()) == "own":
        pytest.skip(f"this machine has no {request.param} address but loopback")
    port = on_the_network.url.rpartition(":")[2]
    try:
        socket.create_connection((address, int(port)), 5).close()
    except OSError:
        pytest.skip(f"{address} does not answer here")
    client = Neighbour(
        f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    )
    mine = [own.network for _, own in azt.own_interfaces()]
    near = [one for one in mine if one.prefixlen >= (16 if one.version == 4 else 48)]
    client.place = azt.peer_place(address, near)
    return client


@pytest.mark.parametrize(
    "relayed", [{}, {"X-Forwarded-For": "127.0.0.1"}, {"Forwarded": "for=::1"}]
)
def test_the_network_never_reaches_the_administration(
    neighbour: Neighbour, on_the_network: Gateway, relayed: dict[str, str]
) -> None:
    for host in ({}, {"Host": "localhost"}, {"Host": "127.0.0.1"}):
        for method, path in [*CHANGES, *(("GET", path) for path in READS)]:
            headers = {**on_the_network.proof(), **JSON_TYPE, **relayed, **host}

            answer = ask(neighbour, method, path, **headers)

            assert refused(answer, 403, answer.error["code"]) == azt._LOCAL
            assert answer.error["code"] in ("lan_console_off", "local_only")


def test_the_network_uses_the_api_and_learns_no_account(
    neighbour: Neighbour, upstream: FakeUpstream
) -> None:
    answer = neighbour.chat()

    if neighbour.place == "public":
        refused(answer, 403, "api_key_needed")
        assert upstream.turns == []
    else:
        assert answer.message["content"] == "You said: hi"
        assert answer.headers["x-azt-attempts"] == "1"
        assert "x-azt-account" not in answer.headers


def test_the_network_sees_health_and_loses_the_api_when_it_is_off(
    neighbour: Neighbour, on_the_network: Gateway
) -> None:
    local = Admin(on_the_network)
    off, on = ({"values": {"server.lanApi": state}} for state in (False, True))

    assert neighbour.get("/_gateway/health").json == {"ok": True}
    assert local.call("PATCH", "/settings", off, proof=True).status == 200
    closed, here = neighbour.get("/v1/models"), local.get("/v1/models")
    assert local.call("PATCH", "/settings", on, proof=True).status == 200

    wanted = "lan_off" if neighbour.place == "lan" else "api_key_needed"
    refused(closed, 403, wanted)
    assert here.status == 200


def test_any_caller_gets_in_with_a_key(neighbour: Neighbour, on_the_network: Gateway) -> None:
    local = Admin(on_the_network)
    made = local.call("POST", "/keys", {"name": "phone"}, proof=True).json

    without = neighbour.get("/v1/models")
    wrong = neighbour.get("/v1/models", headers=local.proof)
    having = neighbour.get("/v1/models", headers={"x-api-key": made["key"]})
    local.call("DELETE", f"/keys/{made['item']['id']}", proof=True)

    assert (without.status, wrong.status, having.status) == (401, 401, 200)


# -- Oddities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nothing", "/accounts/x/y/z", "/keys/", "/settings/log"])
def test_an_unknown_administration_path_is_not_found(admin: Admin, path: str) -> None:
    assert admin.call("POST", path, {}, proof=True).status in (401, 404, 405, 400)
    assert admin.call("GET", path).status in (200, 404, 405)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused_by_every_change(admin: Admin, body: bytes) -> None:
    before = state_files(admin)
    headers = {**admin.proof, **JSON_TYPE}

    for method, path in CHANGES:
        if method == "DELETE" or path.endswith(("/activate", "/refresh", "/refresh-quota")):
            continue
        answer = admin.request(method, path, body=body, headers=headers)
        assert answer.status == 400, path

    assert state_files(admin) == before


def test_an_import_larger_than_its_limit_is_refused_unread(admin: Admin) -> None:
    connection = admin.connect()
    connection.putrequest("POST", f"{ADMIN}/accounts/import")
    for name, value in {**admin.proof, **JSON_TYPE}.items():
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(33 * azt.MIB))
    connection.endheaders()

    response: http.client.HTTPResponse = connection.getresponse()
    response.read()
    connection.close()

    assert response.status == 413
