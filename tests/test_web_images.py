"""Pictures by way of the ChatGPT web site: the plain calls, and what becomes of a refused one."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from fake_upstream import (
    CHALLENGE_PAGE,
    CODEX,
    PNG,
    FakeUpstream,
    Json,
    account_file,
    limit_reached,
    make_token,
    token_refused,
)
from harness import MODEL, Client, Gateway

import azt

OWN_HOSTS = frozenset({"127.0.0.1", "localhost"})
ME = azt.Credentials(make_token(plan="free"), "acct-1")
SITE = "/backend-api"


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azt, "WEB_POLL_S", 0.01)
    monkeypatch.setattr(azt, "WEB_POLLS_S", 0.5)


class Painter:
    """`web_images` against the scripted site."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        self.progress: list[str] = []

    async def images(self, prompt: str = "a fox", **how: Any) -> azt.ImageResult:
        pool = azt.ConnectionPool(azt.Egress(own_hosts=OWN_HOSTS))
        asked = azt.ImageRequest(prompt, **how)
        base = self.upstream.url + SITE
        try:
            workers = azt.WorkerPool("call", 8)
            return await azt.web_images(pool, workers, base, ME, asked, self.progress.append)
        finally:
            pool.close()

    def make(self, prompt: str = "a fox", **how: Any) -> azt.ImageResult:
        return asyncio.run(self.images(prompt, **how))

    def refused(self, **how: Any) -> azt.AztError:
        with pytest.raises(azt.AztError) as caught:
            self.make(**how)
        return caught.value

    @property
    def calls(self) -> list[str]:
        return [f"{one.method} {one.path}" for one in self.upstream.requests]

    @property
    def turn(self) -> Json:
        [seen] = [one for one in self.upstream.requests if one.path.endswith("/f/conversation")]
        body: Json = seen.body
        return body


@pytest.fixture
def painter(upstream: FakeUpstream) -> Iterator[Painter]:
    yield Painter(upstream)


def test_a_picture_takes_these_calls_and_no_other(painter: Painter) -> None:
    made = painter.make()

    assert [base64.b64decode(one) for one in made.images] == [PNG]
    assert made.revised_prompt == "a fox"
    assert painter.calls == [
        f"POST {SITE}/sentinel/chat-requirements",
        f"POST {SITE}/f/conversation/prepare",
        f"POST {SITE}/f/conversation",
        f"GET {SITE}/conversation/conv-1/attachment/conv-1-0/download",
        "GET /blob/conv-1-0",
    ]
    assert painter.turn["messages"][0]["content"]["parts"] == ["a fox"]


def test_azt_goes_by_its_own_name_and_shows_its_token_to_the_site_alone(painter: Painter) -> None:
    painter.make(references=((PNG, "image/png"),))

    for seen in painter.upstream.requests:
        assert seen.headers["user-agent"].startswith("azt/")
        assert not {"cookie", "origin", "referer", "sec-ch-ua"} & set(seen.headers)
        assert ("authorization" in seen.headers) == seen.path.startswith(SITE)


@pytest.mark.parametrize("check", ["proofofwork", "turnstile", "arkose"])
def test_a_demanded_browser_check_ends_it(painter: Painter, check: str) -> None:
    painter.upstream.web.check = check

    error = painter.refused(references=((PNG, "image/png"),))

    assert (error.status, error.code) == (403, "browser_check_required")
    assert "does not answer such checks" in error.message and "chatgpt.com" in error.message
    assert len(painter.calls) == 1  # and nothing of the person's was sent


@pytest.mark.parametrize("path", ["/chat-requirements", "/prepare", "/f/conversation", "/download"])
def test_a_challenge_page_anywhere_is_a_browser_check(painter: Painter, path: str) -> None:
    page = {"content-type": "text/html", "cf-mitigated": "challenge"}
    painter.upstream.script(path=path, status=403, body=CHALLENGE_PAGE, headers=page)

    error = painter.refused()

    assert (error.code, getattr(error, "fault", "")) == ("browser_check_required", "request")


@pytest.mark.parametrize("scheme", ["file-service", "sediment"])
def test_the_pictures_of_a_conversation_are_all_fetched(painter: Painter, scheme: str) -> None:
    painter.upstream.web.scheme, painter.upstream.web.pictures = scheme, 2

    assert len(painter.make().images) == 2


def test_several_pictures_are_as_many_conversations(painter: Painter) -> None:
    assert len(painter.make(n=3).images) == 3
    assert len([one for one in painter.calls if one.endswith("/f/conversation")]) == 3


def test_a_picture_that_comes_at_the_fifth_poll_is_waited_for(painter: Painter) -> None:
    painter.upstream.web.polls = 5
    polled = f"GET {SITE}/conversation/conv-1"
    painter.upstream.script(path="/conversation/conv-1", status=500, json={"detail": "again"})

    assert len(painter.make().images) == 1
    assert painter.calls.count(polled) == 6  # one failed, which is no reason to give up


def test_a_picture_that_never_comes_is_given_up(painter: Painter) -> None:
    painter.upstream.web.polls = 10_000

    error = painter.refused()

    assert (error.status, error.code) == (502, "image_generation_failed")


def test_what_the_model_said_instead_of_a_picture_is_told_at_once(painter: Painter) -> None:
    said = "You have reached your limit for pictures. It resets in 3 hours."
    painter.upstream.web.said, painter.upstream.web.idle = said, True

    error = painter.refused()

    assert (error.status, error.type) == (400, "image_generation_user_error")
    assert error.message == said
    assert f"GET {SITE}/conversation/conv-1" not in painter.calls


def test_a_request_that_moderation_blocks_says_so(painter: Painter) -> None:
    painter.upstream.web.moderated = True

    error = painter.refused()

    assert (error.status, error.code) == (400, "moderation_blocked")
    assert error.type == "image_generation_user_error"


def test_an_error_in_the_stream_keeps_its_text(painter: Painter) -> None:
    event = b'data: {"message": null, "conversation_id": "c", "error": "Something broke"}\n\n'
    painter.upstream.script([event], path="/f/conversation", vendor=False)

    error = painter.refused()

    assert "Something broke" in error.message
    assert getattr(error, "fault", "") == "request"  # what has begun is not begun elsewhere


def test_a_stream_that_breaks_off_is_asked_on_for_by_polls(painter: Painter) -> None:
    event = b'data: {"conversation_id": "conv-1"}\n\n'
    painter.upstream.script([event], path="/f/conversation", vendor=False, cut=True)
    painter.upstream.web._asked["conv-1"], painter.upstream.web.polls = 0, 1
    painter.upstream.web._parts.append(["a fox"])

    assert len(painter.make().images) == 1


@pytest.mark.parametrize("status", [403, 404, 302])
def test_a_refused_download_names_the_host_and_the_status(painter: Painter, status: int) -> None:
    where = {"location": "http://127.0.0.1:1/"}
    painter.upstream.script(path="/blob/conv-1-0", status=status, body=b"<Error/>", headers=where)

    error = painter.refused()

    assert (error.status, error.code) == (502, "image_generation_failed")
    assert f"localhost answered {status}" in error.message


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xd8\xff", b"RIFF", b"\x89PNG\r\n\x1a\n"])
def test_a_download_that_is_no_picture_is_refused(painter: Painter, body: bytes) -> None:
    painter.upstream.script(path="/blob/conv-1-0", body=body)

    assert painter.refused().code == "image_generation_failed"


def test_a_download_larger_than_20_mib_is_not_read_on(painter: Painter) -> None:
    for size, is_fine in ((20 * azt.MIB, True), (20 * azt.MIB + 1, False)):
        painter.upstream.reset()
        painter.upstream.script(path="/blob/conv-1-0", body=PNG.ljust(size, b"\0"))
        if is_fine:
            assert len(base64.b64decode(painter.make().images[0])) == size
        else:
            assert "larger than azt accepts" in painter.refused().message


@pytest.mark.parametrize(
    "blob",
    [
        "https://evil.example",
        "https://chatgpt.com.evil.example",
        "https://chatgpt.com@evil.example",
        "https://oaiusercontent.com.evil.example",
        "https://evil-oaiusercontent.com",
        "http://files.oaiusercontent.com",
        "https://files.oaiusercontent.com:8443",
        "https://169.254.169.254",
        "http://[::1",
        "http://127.0.0.1:99999",
        "ftp://127.0.0.1",
        "file:///etc/passwd?",
    ],
)
@pytest.mark.parametrize("is_upload", [True, False])
def test_a_hostile_address_is_never_called(painter: Painter, blob: str, is_upload: bool) -> None:
    painter.upstream.web.blob = blob

    error = painter.refused(references=((PNG, "image/png"),) if is_upload else ())

    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert "not in its table of hosts" in error.message


def test_the_hosts_of_pictures_are_known_by_the_end_of_their_name() -> None:
    pool = azt.ConnectionPool(azt.Egress())

    assert pool.key("https://files.oaiusercontent.com/file-1?sig=x")[1:] == (
        "files.oaiusercontent.com",
        443,
    )
    with pytest.raises(azt.UpstreamError):
        pool.key("https://a.b.oaiusercontent.com/")


JPEG = (
    b"\xff\xd8\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0\xff\xc0\x00\x0b\x08"
    + struct.pack(">HH", 20, 30)
    + b"\x01\x01\x11\0"
)
WEBP = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\x1d\0\0" + b"\x13\0\0"
LOSSLESS = b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + (29 | 19 << 14).to_bytes(4, "little")
LOSSY = b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 30, 20)


@pytest.mark.parametrize(
    ("content", "kind", "size"),
    [
        (PNG, "png", (1, 1)),
        (JPEG, "jpeg", (30, 20)),
        (WEBP, "webp", (30, 20)),
        (LOSSLESS, "webp", (30, 20)),
        (LOSSY, "webp", (30, 20)),
    ],
)
def test_a_reference_is_uploaded_and_attached(
    painter: Painter, content: bytes, kind: str, size: tuple[int, int]
) -> None:
    painter.make(references=((content, f"image/{kind}"),))

    assert painter.calls[1:4] == [
        f"POST {SITE}/files",
        "PUT /blob/file-1",
        f"POST {SITE}/files/file-1/uploaded",
    ]
    assert painter.upstream.web.stored == {"file-1": content}
    [pointer, prompt] = painter.turn["messages"][0]["content"]["parts"]
    assert (pointer["width"], pointer["height"]) == size
    assert (pointer["size_bytes"], prompt) == (len(content), "a fox")


def test_a_head_that_never_ends_is_given_up_soon() -> None:
    began = time.monotonic()

    for segment in (b"\0\0", b"\xff\xfe\0\2"):
        head = b"\xff\xd8" + segment * (5 * azt.MIB)
        assert azt._picture_size(head) == (0, 0)

    assert time.monotonic() - began < 0.5


def test_a_mask_goes_last_and_the_prompt_says_what_it_is(painter: Painter) -> None:
    painter.make(references=((PNG, "image/png"), (JPEG, "image/jpeg")), mask=(PNG, "image/png"))

    *pictures, prompt = painter.turn["messages"][0]["content"]["parts"]
    assert len(pictures) == 3
    assert prompt.startswith("a fox\n\n") and "mask" in prompt


@pytest.mark.parametrize("content", [b"GIF89a", PNG.ljust(20 * azt.MIB + 1, b"\0")])
def test_a_reference_that_the_site_does_not_take_is_refused(
    painter: Painter, content: bytes
) -> None:
    error = painter.refused(references=((content, "image/png"),))

    assert (error.status, error.code, error.param) == (400, "unsupported_value", "image")


@pytest.mark.parametrize(
    ("size", "ratio"), [("1536x1024", "3:2"), ("1024x1024", "1:1"), ("auto", None)]
)
def test_a_size_becomes_a_sentence(painter: Painter, size: str, ratio: str | None) -> None:
    painter.make(size=size)

    [prompt] = painter.turn["messages"][0]["content"]["parts"]
    assert prompt == ("a fox" if ratio is None else f"a fox\n\nAspect ratio: {ratio}.")


@pytest.mark.parametrize("name", ["token", "conduit_token", "download_url"])
def test_an_answer_without_what_the_next_call_needs_is_an_error(
    painter: Painter, name: str
) -> None:
    path = {"token": "/chat-requirements", "conduit_token": "/prepare"}.get(name, "/download")
    for value in ({}, {name: ""}, {name: ["x"]}):
        painter.upstream.reset()
        painter.upstream.script(path=path, json=value)
        error = painter.refused()
        assert (error.status, error.code) == (502, "upstream_error")
        assert name in error.message


def test_a_limit_keeps_its_wait(painter: Painter) -> None:
    told = {"detail": {"code": "rate_limit_exceeded", "message": "Slow down"}}
    painter.upstream.script(path="/prepare", status=429, json=told, headers={"retry-after": "40"})

    error = painter.refused()

    assert (error.status, error.headers["retry-after"]) == (429, "40")


@pytest.mark.parametrize("phase", ["stream", "poll"])
def test_a_caller_that_leaves_ends_the_upstream_call_at_once(painter: Painter, phase: str) -> None:
    upstream = painter.upstream
    if phase == "stream":
        event = b'data: {"conversation_id": "conv-1"}\n\n'
        upstream.script([event], path="/f/conversation", vendor=False, stall=True)
    else:
        upstream.web.polls = 10_000
        upstream.script(path="/conversation/conv-1", json={}, delay=60.0)
    path = "/f/conversation" if phase == "stream" else "/conversation/conv-1"

    async def leave() -> float:
        task = asyncio.create_task(painter.images())
        await asyncio.to_thread(
            upstream.wait_until,
            lambda: upstream.requests and upstream.requests[-1].path == SITE + path,
        )
        await asyncio.sleep(0.05)
        task.cancel()
        left = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return left

    left = asyncio.run(leave())
    closed = upstream.wait_until(lambda: upstream.requests[-1].closed_at)
    assert closed - left < 0.25


# -- Codex asks for a picture ---------------------------------------------------------------------

TOOL = {"type": "image_generation", "size": "1536x1024"}
SETTING = "image.freeAccountWebGenerationEnabled"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
FREE = account_file(plan="free")
NewGateway = Callable[..., Gateway]


def wish(*parts: Json, **fields: Any) -> Json:
    content = [{"type": "input_text", "text": "a fox"}, *parts]
    item = {"type": "message", "role": "user", "content": content}
    shared = {"model": MODEL, "stream": True, "store": False, "input": [item], "tools": [TOOL]}
    return shared | fields


class Studio:
    """A gateway for pictures, as Codex meets it."""

    def __init__(self, new_gateway: NewGateway, upstream: FakeUpstream) -> None:
        # The host of the blobs is known as that of another base URL.
        self.variables = {"AZT_AUTH_BASE_URL": upstream.url.replace("127.0.0.1", "localhost")}
        self._new_gateway = new_gateway

    def open(self, *accounts: Json, is_on: bool = True) -> Client:
        self.gateway = self._new_gateway(accounts=[*accounts] or [FREE], variables=self.variables)
        self.set(SETTING, str(is_on).lower())
        return Client(self.gateway.url)

    def set(self, name: str, value: str) -> None:
        assert self.gateway.azt("settings", "set", name, value).returncode == 0


@pytest.fixture
def studio(new_gateway: NewGateway, upstream: FakeUpstream) -> Studio:
    return Studio(new_gateway, upstream)


def asked(upstream: FakeUpstream) -> list[str]:
    """Which of the two ways was taken, call for call."""
    ways = {f"{CODEX}/responses": "codex", f"{SITE}/f/conversation": "web"}
    return [ways[seen.path] for seen in upstream.requests if seen.path in ways]


def test_codex_gets_the_events_of_a_response(studio: Studio, upstream: FakeUpstream) -> None:
    client = studio.open()
    upstream.web.pictures = 2

    answer = client.post(
        "/codex/v1/responses", wish({"type": "input_image", "image_url": DATA_URL})
    )

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.types == [
        "response.created",
        "response.output_item.added",
        "response.output_item.done",
        "response.output_item.added",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in answer.events] == list(range(6))
    first, last = answer.events[2], answer.events[-1]["response"]
    assert first["item"]["type"] == "image_generation_call"
    assert base64.b64decode(first["item"]["result"]) == PNG
    assert (last["status"], last["id"]) == ("completed", answer.events[0]["response"]["id"])
    assert last["output"][0] == first["item"]
    assert upstream.web.stored == {"file-1": PNG}
    assert asked(upstream) == ["web"]


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_a_compressed_wish_is_looked_into_where_a_decoder_is(
    studio: Studio, upstream: FakeUpstream, coding: str
) -> None:
    pack = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}.get(coding, bytes)
    client = studio.open()

    raw = pack(json.dumps(wish()).encode())
    answer = client.post("/codex/v1/responses", body=raw, headers={"Content-Encoding": coding})

    can_read = coding != "zstd" or azt.find_zstd() is not None
    assert asked(upstream) == ["web" if can_read else "codex"]
    assert answer.types[-1] == "response.completed"


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({}, "web"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "codex"),
        ({"tools": [TOOL, {"type": "web_search"}], "tool_choice": TOOL}, "web"),
        ({"tool_choice": "none"}, "codex"),
        ({"tools": [{"type": "web_search"}]}, "codex"),
        ({"tools": []}, "codex"),
    ],
)
def test_only_a_wish_for_nothing_but_a_picture_takes_the_web_way(fields: Json, way: str) -> None:
    picture = azt.codex_picture(wish(**fields))

    assert (picture is not None) == (way == "web")
    if picture is not None:
        assert (picture.prompt, picture.size) == ("a fox", "1536x1024")


@pytest.mark.parametrize("body", [[], None, "x", {"tools": TOOL}, {"tools": [TOOL], "input": [[]]}])
def test_a_body_of_another_shape_is_no_wish(body: Any) -> None:
    assert azt.codex_picture(body) is None


def test_a_linked_picture_is_refused_by_the_name_of_its_field() -> None:
    linked = {"type": "input_image", "image_url": "https://example.com/x.png"}

    with pytest.raises(azt.BadRequest) as caught:
        azt.codex_picture(wish(linked))

    assert (caught.value.status, caught.value.code) == (400, "unsupported_value")
    assert caught.value.param == "input[0].content[1].image_url"


def test_a_linked_picture_is_a_matter_of_free_accounts_only(
    studio: Studio, upstream: FakeUpstream
) -> None:
    linked = wish({"type": "input_image", "image_url": "https://example.com/x.png"})
    client = studio.open()
    assert client.post("/codex/v1/responses", linked).error["code"] == "unsupported_value"

    studio.gateway.import_account(account_file("acct-2", "user-2", "b@example.com", "plus"))
    assert studio.gateway.azt("accounts", "use", "b@example.com").returncode == 0
    client.post("/codex/v1/responses", linked)

    assert asked(upstream) == ["codex"]


def test_an_expired_token_is_renewed_for_the_site_too(
    studio: Studio, upstream: FakeUpstream
) -> None:
    client = studio.open()
    upstream.script(path="/chat-requirements", status=401, json=token_refused())

    answer = client.post("/codex/v1/responses", wish())

    assert answer.types[-1] == "response.completed"
    assert len(upstream.rotations) == 1


def test_with_the_setting_off_codex_is_relayed(studio: Studio, upstream: FakeUpstream) -> None:
    client = studio.open(is_on=False)

    client.post("/codex/v1/responses", wish())

    assert asked(upstream) == ["codex"]


def test_a_paid_plan_is_relayed(studio: Studio, upstream: FakeUpstream) -> None:
    client = studio.open(account_file(), account_file("acct-2", "user-2", "b@example.com", "free"))

    client.post("/codex/v1/responses", wish())

    assert asked(upstream) == ["codex"]


def test_a_limit_of_the_site_moves_on_to_the_next_account(
    studio: Studio, upstream: FakeUpstream
) -> None:
    client = studio.open(FREE, account_file("acct-2", "user-2", "b@example.com", "plus"))
    studio.set("autoSwitch.enabled", "true")
    upstream.script(path="/chat-requirements", status=429, json=limit_reached(7200))

    answer = client.post("/codex/v1/responses", wish())

    assert answer.status == 200
    assert asked(upstream) == ["codex"]
    assert [one.account for one in upstream.requests][-2:] == ["acct-1", "acct-2"]


def test_codex_is_told_of_a_browser_check_with_a_status(
    studio: Studio, upstream: FakeUpstream
) -> None:
    client = studio.open()
    upstream.web.check = "turnstile"

    answer = client.post("/codex/v1/responses", wish())

    assert (answer.status, answer.error["code"]) == (403, "browser_check_required")


def test_codex_that_leaves_ends_the_conversation(studio: Studio, upstream: FakeUpstream) -> None:
    client = studio.open()
    upstream.script([], path="/f/conversation", vendor=False, stall=True)

    connection = client.connect()
    connection.request("POST", "/codex/v1/responses", json.dumps(wish()))
    upstream.wait_until(lambda: asked(upstream))
    connection.close()
    left = time.monotonic()

    closed = upstream.wait_until(lambda: upstream.requests[-1].closed_at)
    assert closed - left < 0.5


def stream_of(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[], Any]
) -> tuple[bytes, azt.RequestRecord]:
    """What Codex reads while pictures are made slowly."""
    monkeypatch.setattr(azt, "HEARTBEAT_S", 0.02)
    record = azt.RequestRecord("req_1", "POST", "/codex/v1/responses", 0.0)

    async def slowly() -> azt.ImageResult:
        await asyncio.sleep(0.5)  # many heartbeats, also on a busy machine
        result: azt.ImageResult = made()
        return result

    async def read() -> bytes:
        task = asyncio.create_task(slowly())
        return b"".join([piece async for piece in azt.web_stream(record, task)])

    return asyncio.run(read()), record


def test_comments_are_the_heartbeat_while_a_picture_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent, record = stream_of(monkeypatch, lambda: azt.ImageResult(("aGk=",), "a fox"))

    created, *beats, rest = sent.split(azt.HEARTBEAT)
    assert created.startswith(b"event: response.created\n")
    assert len(beats) >= 2 and not any(beats)
    assert rest.startswith(b"event: response.output_item.added\n")
    assert record.images == 1


def test_codex_that_leaves_later_ends_the_making() -> None:
    record = azt.RequestRecord("req_1", "POST", "/codex/v1/responses", 0.0)

    async def leave() -> asyncio.Task[Any]:
        made = asyncio.create_task(asyncio.sleep(60))
        body = azt.web_stream(record, made)  # type: ignore[arg-type]
        assert (await anext(body)).startswith(b"event: response.created")
        await body.aclose()
        await asyncio.wait({made})
        return made

    assert asyncio.run(leave()).cancelled()


def test_a_late_failure_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise azt.UpstreamError(400, "moderation_blocked", "No. rt_secretsecret")

    sent, record = stream_of(monkeypatch, fail)

    *_, last = [json.loads(one) for one in azt.SSEParser().feed(sent)]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "moderation_blocked", "message": "No. rt_***"}
    assert (record.result, record.error_code) == ("failed", "moderation_blocked")


# -- The Images API on free accounts --------------------------------------------------------------

MAKE, EDIT = "/v1/images/generations", "/v1/images/edits"
ASK = {"prompt": "a red fox"}
RESULT = base64.b64encode(PNG).decode()


def test_the_images_api_takes_the_web_way(studio: Studio, upstream: FakeUpstream) -> None:
    client = studio.open()
    upstream.web.pictures = 2  # more than was asked for

    made = client.post(MAKE, {**ASK, "size": "1536x1024", "quality": "low", "n": 3})

    about = {"b64_json": RESULT, "revised_prompt": "a red fox"}
    assert made.json["data"] == [about] * 3
    assert made.json["output_format"] == "png" and "quality" not in made.json
    assert made.headers["x-azt-ignored-params"] == "quality"
    assert asked(upstream) == ["web"] * 3
    rows = client.get("/_gateway/admin/requests", headers=studio.gateway.proof()).json["items"]
    [row] = [one for one in rows if one["id"] == made.headers["x-request-id"]]
    assert (row["imageRoute"], row["images"]) == ("chatgpt-web", 3)


def test_an_edit_uploads_its_files(studio: Studio, upstream: FakeUpstream) -> None:
    head = b'--mark\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = [(b"image", b'; filename="a.png"', PNG), (b"mask", b'; filename="m.png"', PNG)]
    body = b"".join(head % one for one in [*parts, (b"prompt", b"", b"a red fox")])
    kind = {"Content-Type": "multipart/form-data; boundary=mark"}

    made = studio.open().post(EDIT, body=body + b"--mark--\r\n", headers=kind)

    assert made.json["data"][0]["b64_json"] == RESULT
    assert upstream.web.stored == {"file-1": PNG, "file-2": PNG}


@pytest.mark.parametrize(
    ("path", "given", "kind"),
    [(MAKE, {}, "image_generation"), (EDIT, {"image": DATA_URL}, "image_edit")],
)
def test_a_stream_ends_with_the_picture(
    studio: Studio, upstream: FakeUpstream, path: str, given: Json, kind: str
) -> None:
    wanted = {"stream": True, "output_format": "webp", "quality": "low"}
    answer = studio.open().post(path, {**ASK, **given, **wanted})

    assert answer.types == [f"{kind}.completed"]
    [event] = answer.events
    assert (event["b64_json"], event["output_format"]) == (RESULT, "png")
    assert (event["quality"], asked(upstream)) == ("auto", ["web"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("site", "status", "code"),
    [
        ({"check": "turnstile"}, 403, "browser_check_required"),
        ({"said": "I cannot draw that.", "idle": True}, 400, "image_refused"),
        ({"moderated": True}, 400, "moderation_blocked"),
    ],
)
def test_why_there_is_no_picture_is_told(
    studio: Studio, upstream: FakeUpstream, site: Json, status: int, code: str, stream: bool
) -> None:
    client = studio.open()
    vars(upstream.web).update(site)

    answer = client.post(MAKE, {**ASK, "stream": stream})

    assert (answer.status, answer.error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"image": [DATA_URL, "https://example.com/x.png"]}, "image[1]"),
        ({"images": [{"image_url": "https://example.com/x.png"}]}, "images[0].image_url"),
        ({"image": DATA_URL, "mask": "https://example.com/x.png"}, "mask"),
    ],
)
def test_a_link_is_refused_by_the_name_of_its_field(
    studio: Studio, upstream: FakeUpstream, given: Json, param: str
) -> None:
    answer = studio.open().post(EDIT, {**ASK, **given})

    assert answer.status == 400
    assert (answer.error["code"], answer.error["param"]) == ("unsupported_value", param)
    assert asked(upstream) == []


@pytest.mark.parametrize("account", [FREE, account_file()])
def test_the_images_api_asks_the_backend_where_that_is_off_or_paid(
    studio: Studio, upstream: FakeUpstream, account: Json
) -> None:
    studio.open(account, is_on=account is not FREE).post(MAKE, ASK)

    assert upstream.requests
    assert "web" not in asked(upstream)


def test_a_caller_of_the_images_api_that_leaves_ends_the_conversation(
    studio: Studio, upstream: FakeUpstream
) -> None:
    client = studio.open()
    upstream.script([], path="/f/conversation", vendor=False, stall=True)

    connection = client.connect()
    connection.request("POST", MAKE, json.dumps(ASK))
    upstream.wait_until(lambda: asked(upstream))
    connection.close()
    left = time.monotonic()

    assert upstream.wait_until(lambda: upstream.requests[-1].closed_at) - left < 0.5


def late_stream(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What a client of the Images API reads when nothing has come while it could be held back."""
    monkeypatch.setattr(azt, "HEARTBEAT_S", 0.02)
    record = azt.RequestRecord("req_1", "POST", MAKE, 0.0)
    asked = azt.images_to_request({**ASK, "stream": True}, False)
    base_url = painter.upstream.url + SITE

    async def read() -> bytes:
        pool = azt.ConnectionPool(azt.Egress(own_hosts=OWN_HOSTS))
        workers = azt.WorkerPool("call", 8)
        where = SimpleNamespace(chatgpt_base_url=base_url)
        gw: Any = SimpleNamespace(short=workers, calls=workers, pool=pool, environment=where)
        account: Any = SimpleNamespace(access_token=ME.access_token, account_id="acct-1")
        turn: Any = None
        try:
            drawing = azt._Drawing(gw, record, turn, asked)
            stream: Any = await drawing._from_web(account, 0.0)
            return b"".join([piece async for piece in stream])
        finally:
            pool.close()

    return asyncio.run(read())


def test_the_images_api_has_heartbeats_too(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter.upstream.web.polls = 15

    *beats, last = late_stream(painter, monkeypatch).split(azt.HEARTBEAT)

    assert len(beats) >= 3 and not any(beats)
    assert last.startswith(b"event: image_generation.completed\n")


@pytest.mark.parametrize(
    ("site", "code"),
    [
        ({"check": "turnstile"}, "browser_check_required"),
        ({"said": "I cannot draw that.", "idle": True}, "image_refused"),
        ({"moderated": True}, "moderation_blocked"),
    ],
)
def test_a_late_failure_of_the_images_api_keeps_its_code(
    painter: Painter, monkeypatch: pytest.MonkeyPatch, site: Json, code: str
) -> None:
    vars(painter.upstream.web).update(site)

    sent = late_stream(painter, monkeypatch).replace(azt.HEARTBEAT, b"")

    assert sent.startswith(b"event: error\n") and sent.count(b"data: ") == 1
    assert json.loads(sent.partition(b"data: ")[2])["error"]["code"] == code


def test_setting_it_warns(studio: Studio) -> None:
    studio.open()

    on, off = (studio.gateway.azt("settings", "set", SETTING, one) for one in ("true", "false"))

    assert "ChatGPT web site" in on.stderr and "browser_check_required" in on.stderr
    assert off.stderr == ""
