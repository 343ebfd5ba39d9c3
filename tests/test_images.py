"""Room 11c and its routes: pictures and edits, made by the image tool or the direct endpoint."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import (
    FakeUpstream,
    Json,
    account_file,
    answer,
    error_json,
    failed,
    image,
    limit_reached,
    message,
    model_info,
    refusal,
)
from harness import Answer, Client, Gateway, decode_png, eventually, make_gateway, make_png

import azt

NewGateway = Callable[..., Gateway]
PNG = make_png(64, 48)
BASE64 = base64.b64encode(PNG).decode()
DATA = f"data:image/png;base64,{BASE64}"
ASK = {"prompt": "a red fox"}
MAKE, EDIT = "/v1/images/generations", "/v1/images/edits"
LINK = "https://example.com/fox.png"
USED = {"input_tokens": 40, "output_tokens": 100, "total_tokens": 140}
COUNTED = {
    **USED,
    "input_tokens_details": {"image_tokens": 30, "text_tokens": 10},
    "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
TOLD = {"image_gen": {**USED, "input_tokens_details": COUNTED["input_tokens_details"]}}


@pytest.fixture(scope="module")
def free_gateway(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("free")
    gateway = make_gateway(home, shared_upstream, accounts=[account_file(plan="free")])
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def tool(upstream: FakeUpstream, free_gateway: Gateway) -> FakeUpstream:
    """The upstream of an account whose pictures are the tool's work alone."""
    return upstream


@pytest.fixture
def client(request: pytest.FixtureRequest, gateway: Gateway) -> Client:
    if "tool" in request.fixturenames:
        gateway = request.getfixturevalue("free_gateway")
    return Client(gateway.url)


def picture(*partials: str, **how: Any) -> list[Any]:
    return answer(image(BASE64, partials, **how), tool_usage=TOLD)


def form(*parts: tuple[str, str, str, bytes]) -> dict[str, Any]:
    """A form out of (name, file name, content type, content)."""
    body = b""
    for name, file, kind, content in parts:
        named = f'; filename="{file}"' if file else ""
        typed = f"\r\nContent-Type: {kind}" if kind else ""
        head = f'Content-Disposition: form-data; name="{name}"{named}{typed}'
        body += f"--mark\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=mark"}
    return {"body": body + b"--mark--\r\n", "headers": headers}


def refused(body: Json, is_edit: bool = False) -> tuple[int, str | None, str | None]:
    with pytest.raises(azt.BadRequest) as caught:
        azt.images_to_request(body, is_edit)
    return caught.value.status, caught.value.param, caught.value.code


# -- Pure: the request -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({"prompt": ""}, "prompt", "missing_required_parameter"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"model": "gpt-5.5"}, "model", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 5}, "n", "unsupported_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 2, "stream": True}, "n", "unsupported_value"),
        ({"size": "1000x1000"}, "size", "invalid_value"),
        ({"size": "3840x1024"}, "size", "invalid_value"),
        ({"size": "512x1024"}, "size", "invalid_value"),
        ({"model": "gpt-image-1", "size": "2048x2048"}, "size", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"partial_images": 4, "stream": True}, "partial_images", "invalid_value"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"moderation": "none"}, "moderation", "invalid_value"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(fields: Json, param: str, code: str) -> None:
    assert refused({**ASK, **fields}) == (400, param, code)


@pytest.mark.parametrize(
    "given, param, code",
    [
        ({}, "image", "missing_required_parameter"),
        ({"images": []}, "images", "missing_required_parameter"),
        ({"image": [DATA] * 17}, "image", "invalid_value"),
        ({"image": "http://example.com/a.png"}, "image", "invalid_value"),
        ({"image": "data:image/gif;base64,R0lGODlh"}, "image", "invalid_value"),
        ({"image": "data:image/png;base64,***"}, "image", "invalid_base64_image"),
        ({"images": [{"file_id": "f1"}]}, "images[0].image_url", "missing_required_parameter"),
        ({"image": DATA, "mask": 5}, "mask", "invalid_type"),
    ],
)
def test_a_reference_that_cannot_be_sent_is_named(given: Json, param: str, code: str) -> None:
    assert refused({**ASK, **given}, True) == (400, param, code)


@pytest.mark.parametrize(
    "size, model, sent",
    [
        ("auto", "gpt-image-2", None),
        ("1920x1088", "gpt-image-2", "1920x1088"),
        ("3840x2160", "gpt-image-2", "3840x2160"),
        ("1792x1024", "gpt-image-2", "1792x1024"),
        ("1792x1024", "gpt-image-1", "1536x1024"),
        ("256x256", "dall-e-2", "1024x1024"),
    ],
)
def test_sizes_become_what_the_model_takes(size: str, model: str, sent: str | None) -> None:
    asked = azt.images_to_request({**ASK, "size": size, "model": model}, False)

    assert asked.looks.get("size") == sent


def test_old_names_get_the_default_model_and_quality() -> None:
    asked = azt.images_to_request(
        {**ASK, "model": "dall-e-3", "quality": "hd", "style": "vivid", "user": "me"}, False
    )

    assert asked.looks == {"model": "gpt-image-2", "quality": "high"}
    assert asked.ignored == ("style", "user")


@pytest.mark.parametrize(
    "given",
    [
        {"image": DATA},
        {"image": BASE64},
        {"image": [DATA]},
        {"images": [{"image_url": DATA}]},
    ],
)
def test_every_way_to_give_a_picture_is_the_same_upstream(given: Json) -> None:
    assert azt.images_to_request({**ASK, **given}, True).images == [DATA]


def test_all_fields_reach_the_tool() -> None:
    fields = {
        "size": "1536x1024",
        "quality": "low",
        "background": "opaque",
        "output_format": "webp",
        "output_compression": 50,
        "moderation": "low",
        "partial_images": 2,
    }
    given = {"image": [DATA, LINK], "mask": DATA, "stream": True, "model": "gpt-image-1.5"}
    body = {**ASK, **fields, **given, "input_fidelity": "high"}

    asked = azt.images_to_request(body, True)
    sent = azt.picture_to_responses(asked, "gpt-5.5")

    tool = {"type": "image_generation", "action": "edit", "model": "gpt-image-1.5"}
    tool |= {"input_fidelity": "high", "input_image_mask": {"image_url": DATA}}
    assert sent["tools"] == [{**tool, **fields}]
    assert [part.get("image_url") for part in sent["input"][0]["content"]] == [None, DATA, LINK]


# -- Pure: the stream ------------------------------------------------------------------------------


def read(asked: Json, *events: Json) -> tuple[bytes, azt.ImageStream]:
    stream = azt.ImageStream(azt.images_to_request({**ASK, **asked}, False), 1_700_000_000.0)
    return b"".join(stream.feed(azt.encode_json(event)) for event in events), stream


def test_a_preview_stands_in_where_nothing_else_came() -> None:
    preview = {"partial_image_b64": BASE64, "partial_image_index": 0, "size": "1024x1024"}
    kind = "response.image_generation_call.partial_image"

    _, stream = read({}, {"type": kind, **preview}, {"type": "response.completed", "response": {}})

    assert stream.result()["data"] == [{"b64_json": BASE64}]


def test_a_preview_never_hides_a_failure() -> None:
    preview = {"type": "response.image_generation_call.partial_image", "partial_image_b64": BASE64}
    error = {"code": "moderation_blocked", "message": "Blocked."}

    _, stream = read({}, preview, {"type": "response.failed", "response": {"error": error}})

    assert stream.failure is not None
    assert (stream.failure.code, stream.failure.message) == ("moderation_blocked", "Blocked.")


def test_a_picture_that_is_whole_outlives_a_cut() -> None:
    item = {"type": "image_generation_call", "result": BASE64}
    _, stream = read({}, {"type": "response.output_item.done", "item": item})

    stream.fail(azt.UpstreamError(502, "upstream_stream_truncated", "cut"))

    assert stream.failure is None
    assert stream.result()["data"] == [{"b64_json": BASE64}]


# -- Acceptance cases (openai-api.md 10.5) ---------------------------------------------------------


def test_i01_a_picture_is_made_by_the_forced_tool(client: Client, tool: FakeUpstream) -> None:
    tool.script(picture())

    made = client.post(MAKE, ASK).json

    sent = tool.sent
    assert made["data"] == [{"b64_json": BASE64, "revised_prompt": "a picture"}]
    assert isinstance(made["created"], int)
    assert made["usage"] == COUNTED
    looks = ("background", "output_format", "quality", "size")
    assert [made[name] for name in looks] == ["opaque", "png", "low", "1024x1024"]
    assert sent["tools"] == [
        {"type": "image_generation", "action": "generate", "model": "gpt-image-2"}
    ]
    assert sent["tool_choice"] == {"type": "image_generation"}
    assert sent["input"][0]["content"] == [{"type": "input_text", "text": "a red fox"}]


def test_i02_a_url_is_a_data_url_of_the_right_type(client: Client, tool: FakeUpstream) -> None:
    tool.script(picture(output_format="webp"))

    made = client.post(MAKE, {**ASK, "response_format": "url", "output_format": "webp"}).json

    (one,) = made["data"]
    assert one == {"url": f"data:image/webp;base64,{BASE64}", "revised_prompt": "a picture"}


@pytest.mark.parametrize(
    "path, given, kind",
    [(MAKE, {}, "image_generation"), (EDIT, {"image": DATA}, "image_edit")],
)
def test_i03_previews_come_before_the_picture(
    client: Client, upstream: FakeUpstream, path: str, given: Json, kind: str
) -> None:
    upstream.script(picture("UDE=", "UDI="))

    seen = client.post(path, {**ASK, **given, "stream": True, "partial_images": 2})

    assert seen.types == [*[f"{kind}.partial_image"] * 2, f"{kind}.completed"]
    first, second, last = seen.events
    assert (first["b64_json"], first["partial_image_index"]) == ("UDE=", 0)
    assert (second["b64_json"], second["partial_image_index"]) == ("UDI=", 1)
    assert (last["b64_json"], last["usage"]) == (BASE64, COUNTED)
    for event in seen.events:
        assert isinstance(event["created_at"], int)
        assert (event["size"], event["quality"]) == ("1024x1024", "low")
        assert (event["background"], event["output_format"]) == ("opaque", "png")
    assert upstream.sent["tools"][0]["partial_images"] == 2


def test_i03_a_preview_arrives_before_the_next_one_is_made(
    client: Client, upstream: FakeUpstream
) -> None:
    events = picture("UDE=", "UDI=")
    upto = [event["type"] for event in events].index("response.image_generation_call.partial_image")
    upstream.script(events, stall=True, after=upto + 1)

    with client.open("POST", MAKE, {**ASK, "stream": True, "partial_images": 2}) as stream:
        assert b'"UDE="' in stream.read_until(b"\n\n")
        upstream.release()
        assert b"image_generation.completed" in stream.read_rest().body


FILES = [
    [("image", "a.png", "image/png", PNG)],
    [("image[]", "a.png", "image/png", PNG), ("image[]", "b.jpg", "image/jpeg", b"\xff\xd8\xff")],
    [("image[0]", "blob", "application/octet-stream", PNG)],
    [("image", "blob", "", PNG), ("mask", "m.png", "image/png", PNG)],
]


@pytest.mark.parametrize("files", FILES)
def test_i04_files_of_a_form_become_data_urls(
    client: Client, tool: FakeUpstream, files: list[tuple[str, str, str, bytes]]
) -> None:
    tool.script(picture())
    words = [("prompt", "", "", b"a red fox"), ("n", "", "", b"1"), ("size", "", "", b"auto")]

    made = client.post(EDIT, **form(*files, *words))

    assert made.status == 200, made.body
    parts = tool.sent["input"][0]["content"]
    masks = [tool.sent["tools"][0].get("input_image_mask", {}).get("image_url")]
    urls = [part["image_url"] for part in parts[1:]] + [one for one in masks if one]
    contents = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert contents == [content for _, _, _, content in files]
    assert [url[:15] for url in urls] == [
        "data:image/jpeg" if content.startswith(b"\xff") else "data:image/png;"
        for content in contents
    ]


def test_i05_an_edit_as_json_is_accepted(client: Client, tool: FakeUpstream) -> None:
    tool.script(picture())

    made = client.post(EDIT, {**ASK, "images": [{"image_url": DATA}, {"image_url": LINK}]})

    assert made.json["data"][0]["b64_json"] == BASE64
    urls = [part.get("image_url") for part in tool.sent["input"][0]["content"]]
    assert urls == [None, DATA, LINK]
    assert tool.sent["tools"][0]["action"] == "edit"


def test_i06_three_pictures_are_three_calls_joined(client: Client, tool: FakeUpstream) -> None:
    tool.script(picture(), times=3)

    made = client.post(MAKE, {**ASK, "n": 3}).json

    assert [one["b64_json"] for one in made["data"]] == [BASE64] * 3
    assert len(tool.turns) == 3
    assert made["usage"]["total_tokens"] == 3 * USED["total_tokens"]
    assert made["usage"]["input_tokens_details"]["image_tokens"] == 90


def test_i06_one_of_three_that_fails_ends_the_others(client: Client, tool: FakeUpstream) -> None:
    tool.script(picture(), stall=True, after=3)
    tool.script(failed("moderation_blocked", "Not this.", image(BASE64)))
    tool.script(picture(), stall=True, after=3)

    seen = client.post(MAKE, {**ASK, "n": 3})

    assert (seen.status, seen.error["code"]) == (400, "moderation_blocked")
    tool.wait_until(lambda: sum(one.closed_at is not None for one in tool.turns) >= 2)


def test_i07_what_is_too_much_is_refused(client: Client, upstream: FakeUpstream) -> None:
    size = client.post(MAKE, {**ASK, "size": "1000x1000"})
    many = client.post(EDIT, {**ASK, "image": [BASE64] * 17})
    large = client.post(
        EDIT, **form(("prompt", "", "", b"x"), ("image", "a", "image/png", b"x" * 60_000_000))
    )

    assert [(one.status, one.error["param"]) for one in (size, many, large)] == [
        (400, "size"),
        (400, "image"),
        (413, "image[0]"),
    ]
    assert upstream.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [message("I cannot draw that."), refusal("I cannot draw that.")])
def test_i08_text_in_place_of_a_picture_is_the_reason(
    client: Client, tool: FakeUpstream, said: Any, stream: bool
) -> None:
    tool.script(answer(said))

    seen = client.post(MAKE, {**ASK, "stream": stream})

    error = seen.stream_error if stream else seen.error
    assert error is not None
    assert seen.status == (200 if stream else 400)
    assert error["message"] == "I cannot draw that."
    assert (error["type"], error["code"]) == ("image_generation_user_error", "moderation_blocked")


# -- Which way -------------------------------------------------------------------------------------


def direct(seen: Any) -> bool:
    return "/images/" in seen.path


def test_the_direct_endpoint_comes_first(client: Client, upstream: FakeUpstream) -> None:
    data = [{"b64_json": BASE64}, {"b64_json": "Mg=="}]
    upstream.script(
        path="/images/generations",
        json={
            "created": 5,
            "data": data,
            "quality": "low",
            "size": "auto",
            "usage": TOLD["image_gen"],
        },
    )

    made = client.post(MAKE, {**ASK, "n": 2}).json

    assert made == {"created": 5, "quality": "low", "data": data, "usage": COUNTED}
    (seen,) = upstream.requests
    assert seen.body == {
        **ASK,
        **{"model": "gpt-image-2", "n": 2},
        **{"background": "auto", "quality": "auto", "size": "auto"},
    }


def test_an_edit_goes_there_as_json(client: Client, upstream: FakeUpstream) -> None:
    made = client.post(EDIT, {**ASK, "image": DATA, "quality": "high"})

    assert made.status == 200
    (seen,) = upstream.requests
    assert seen.path.endswith("/codex/images/edits")
    assert (seen.body["images"], seen.body["quality"]) == ([{"image_url": DATA}], "high")


@pytest.mark.parametrize("status", [403, 404, 405])
def test_where_it_is_not_open_the_tool_serves_and_it_is_not_asked_again(
    new_gateway: NewGateway, upstream: FakeUpstream, status: int
) -> None:
    client = Client(new_gateway().url)
    upstream.script(path="/images/generations", status=status, json={"detail": "Not here"})
    upstream.script(picture(), times=2)

    made = [client.post(MAKE, ASK) for _ in range(2)]

    assert [one.status for one in made] == [200, 200]
    assert [direct(seen) for seen in upstream.requests] == [True, False, False]


def test_a_free_plan_is_not_asked_for_the_direct_endpoint(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    client = Client(new_gateway(accounts=[account_file(plan="free")]).url)
    upstream.script(picture())

    assert client.post(MAKE, ASK).status == 200
    assert not any(map(direct, upstream.requests))


def test_a_refusal_of_the_direct_endpoint_is_final(client: Client, upstream: FakeUpstream) -> None:
    told = error_json("Blocked by safety.", code="moderation_blocked")
    upstream.script(path="/images/generations", status=400, json=told)

    seen = client.post(MAKE, ASK)

    assert (seen.status, seen.error["message"]) == (400, "Blocked by safety.")
    assert seen.error["type"] == "image_generation_user_error"
    assert len(upstream.requests) == 1


def test_the_first_listed_model_that_takes_the_tool_is_remembered(
    new_gateway: NewGateway, tool: FakeUpstream
) -> None:
    client = Client(new_gateway(accounts=[account_file(plan="free")]).url)
    tool.models = [one for one in tool.models if one["slug"] != "gpt-5.5"]
    tool.script(picture(), times=2)

    made = [client.post(MAKE, ASK) for _ in range(2)]

    assert [one.status for one in made] == [200, 200]
    assert [seen.body["model"] for seen in tool.turns] == ["gpt-5.5", "gpt-5.4", "gpt-5.4"]


def test_the_setting_names_the_model(new_gateway: NewGateway, tool: FakeUpstream) -> None:
    gateway = new_gateway(accounts=[account_file(plan="free")])
    gateway.azt("settings", "set", "image.orchestratorModel", "gpt-7-draw")
    tool.models.append(model_info("gpt-7-draw"))
    tool.script(picture())

    assert Client(gateway.url).post(MAKE, ASK).status == 200
    assert tool.sent["model"] == "gpt-7-draw"


def test_a_plan_without_the_tool_is_told(client: Client, tool: FakeUpstream) -> None:
    told = {"detail": "Tool 'image_generation' is not supported with this plan."}
    tool.script(status=400, json=told, times=3)

    seen = client.post(MAKE, ASK)

    assert (seen.status, seen.error["code"]) == (403, "image_generation_unavailable")
    assert "azt accounts use" in seen.error["message"]


def test_another_account_makes_the_picture(new_gateway: NewGateway, upstream: FakeUpstream) -> None:
    second = account_file("acct-2", "user-2", "bea@example.com")
    gateway = new_gateway(accounts=[account_file("acct-1"), second])
    gateway.azt("settings", "set", "autoSwitch.enabled", "true")
    upstream.script(path="/images/generations", account="acct-1", status=429, json=limit_reached())

    seen = Client(gateway.url).post(MAKE, ASK)

    assert seen.status == 200
    assert [one.account for one in upstream.requests] == ["acct-1", "acct-2"]


def test_no_picture_and_no_reason_is_a_502(client: Client, tool: FakeUpstream) -> None:
    tool.script(answer(), times=2)

    seen = client.post(MAKE, ASK)

    assert (seen.status, seen.error["code"]) == (502, "image_generation_failed")
    assert seen.error["type"] == "server_error"


def test_a_failed_call_keeps_its_reason(client: Client, tool: FakeUpstream) -> None:
    broken = image("")
    broken.item |= {"status": "failed", "error": {"code": "invalid_prompt", "message": "Too odd."}}
    tool.script(answer(broken))

    seen = client.post(MAKE, ASK)

    assert (seen.status, seen.error["message"]) == (400, "Too odd.")


# -- Records, leaving, size ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, route, count",
    [({"n": 2}, "codex-images", 1), ({"stream": True}, "codex-tool", 1)],
)
def test_a_picture_is_counted_with_its_way(
    gateway: Gateway, client: Client, upstream: FakeUpstream, given: Json, route: str, count: int
) -> None:
    upstream.script(picture(), times=count)
    seen = client.post(MAKE, {**ASK, **given})
    gateway.log_line(seen.headers["x-request-id"])

    def row() -> Any:
        rows = client.get("/_gateway/admin/requests", headers=gateway.proof()).json["items"]
        return next((one for one in rows if one["id"] == seen.headers["x-request-id"]), None)

    found = eventually(row)
    assert (found["imageRoute"], found["images"]) == (route, count)
    assert (found["endpoint"], found["model"]) == (MAKE, "gpt-image-2")


@pytest.mark.parametrize("given", [{}, {"stream": True}, {"n": 2}])
def test_a_client_that_leaves_stops_the_calls_within_250_ms(
    client: Client, tool: FakeUpstream, given: Json
) -> None:
    calls = given.get("n", 1)
    tool.script(picture(), stall=True, after=3, times=calls)
    connection = client.connect()
    connection.request("POST", MAKE, azt.encode_json({**ASK, **given}))
    tool.wait_turns(calls)
    time.sleep(0.1)

    left_at = time.monotonic()
    connection.close()

    closed = [tool.wait_closed(-number) for number in range(1, calls + 1)]
    assert max(closed) - left_at < 0.25


def test_a_client_that_leaves_stops_the_direct_call(client: Client, upstream: FakeUpstream) -> None:
    upstream.script(path="/images/generations", delay=30.0)
    connection = client.connect()
    connection.request("POST", MAKE, azt.encode_json(ASK))
    (seen,) = upstream.wait_until(lambda: upstream.requests)

    left_at = time.monotonic()
    connection.close()

    assert upstream.wait_until(lambda: seen.closed_at) - left_at < 0.25


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_of_20_mb_comes_through(
    client: Client, upstream: FakeUpstream, stream: bool
) -> None:
    large = make_png(64, 48, noise=bytes(20_000_000))
    upstream.script(answer(image(base64.b64encode(large).decode())))

    # `moderation` is for the tool alone.
    seen = client.post(MAKE, {**ASK, "stream": stream, "moderation": "low"})

    made = seen.events[-1] if stream else seen.json["data"][0]
    assert decode_png(base64.b64decode(made["b64_json"])) == (64, 48)


def test_64_at_once_do_not_mix(client: Client, tool: FakeUpstream) -> None:
    for number in range(64):
        tool.script(
            answer(image(f"{number:04}")),
            when=lambda seen, text=f"fox {number}": seen.user_text == text,
        )
    made: dict[int, Answer] = {}

    def ask(number: int) -> None:
        made[number] = client.post(MAKE, {"prompt": f"fox {number}"})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert {number: one.json["data"][0]["b64_json"] for number, one in made.items()} == {
        number: f"{number:04}" for number in range(64)
    }


def test_64_large_pictures_at_once_stay_within_the_memory_of_one_large_body(
    new_gateway: NewGateway, upstream: FakeUpstream
) -> None:
    gateway = new_gateway(accounts=[account_file(plan="free")])
    client, large = Client(gateway.url, timeout=60), base64.b64encode(bytes(1_000_000)).decode()
    for _ in range(64):
        upstream.script(answer(image(large)))

    with ThreadPoolExecutor(64) as threads:
        sizes = list(
            threads.map(lambda _: len(client.post(MAKE, {"prompt": "fox"}).body), range(64))
        )

    assert min(sizes) > len(large)
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kib * 1024 < azt.MAX_BODY_BYTES + 100_000_000, peak_kib


def test_the_image_model_is_listed_and_found(client: Client) -> None:
    assert "gpt-image-2" in [one["id"] for one in client.get("/v1/models").json["data"]]
    assert client.get("/v1/models/gpt-image-2").json["object"] == "model"


# -- The command -----------------------------------------------------------------------------------


def test_ask_writes_a_picture_and_tells_how_far_it_is(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script(picture("UDE="))

    done = gateway.azt("ask", "--image", "a fox", "-o", "fox.png")

    assert done.returncode == 0, done.stderr
    assert decode_png((gateway.home / "fox.png").read_bytes()) == (64, 48)
    assert done.stderr.splitlines()[1:] == ["partial image", "completed"]
    again = gateway.azt("ask", "--image", "a fox", "-o", "fox.png")
    assert (again.returncode, "--force" in again.stderr) == (2, True)
