"""Pictures and edits through the official Python and Node libraries, files and masks included."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_upstream import FakeUpstream, answer, image, message
from harness import Gateway, decode_png, make_png

Call = Callable[..., Any]
ASK: Any = {"model": "gpt-image-2", "prompt": "a red fox"}
# Said so that the image tool is used: the direct endpoint is not known to take it.
LOOK: Any = {"moderation": "low"}
PNG, OTHER, MASK = make_png(64, 48), make_png(32, 32), make_png(64, 48, noise=b"mask")
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def node_images(node: Call, gateway: Gateway) -> Call:
    def call(function: str, **given: Any) -> Any:
        return node("openai_node.mjs", function, url=f"{gateway.url}/v1", **given)

    return call


def script(upstream: FakeUpstream, *partials: str) -> None:
    upstream.script(answer(image(BASE64, partials)))


def sent_pictures(upstream: FakeUpstream) -> list[bytes]:
    """What went upstream: the pictures, then the mask."""
    urls = [part["image_url"] for part in upstream.sent["input"][0]["content"][1:]]
    masks = [tool.get("input_image_mask") for tool in upstream.sent["tools"]]
    urls += [mask["image_url"] for mask in masks if mask]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_python_writes_a_picture(
    openai_client: openai.OpenAI, upstream: FakeUpstream, tmp_path: Path
) -> None:
    script(upstream)

    made = openai_client.images.generate(**ASK, **LOOK, size="1024x1024")

    assert made.data is not None
    file = tmp_path / "fox.png"
    file.write_bytes(base64.b64decode(made.data[0].b64_json or ""))
    assert decode_png(file.read_bytes()) == (64, 48)
    assert made.data[0].revised_prompt == "a picture"
    assert (made.quality, made.output_format) == ("low", "png")


def test_python_gets_a_picture_of_the_direct_endpoint(
    openai_client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    reply = {"created": 1_795_380_000, "data": [{"b64_json": BASE64}]}
    upstream.script(path="/images/generations", json=reply)

    made = openai_client.images.generate(**ASK)

    assert made.data is not None
    assert decode_png(base64.b64decode(made.data[0].b64_json or "")) == (64, 48)
    assert upstream.turns == []


def test_python_streams_previews(openai_client: openai.OpenAI, upstream: FakeUpstream) -> None:
    script(upstream, "UDE=", "UDI=")

    stream = openai_client.images.generate(**ASK, stream=True, partial_images=2)
    first, second, last = list(stream)

    assert first.type == second.type == "image_generation.partial_image"
    assert (first.partial_image_index, second.partial_image_index) == (0, 1)
    assert last.type == "image_generation.completed"
    assert decode_png(base64.b64decode(last.b64_json)) == (64, 48)
    assert last.usage.total_tokens == 0


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"image": PNG}, [PNG]),
        ({"image": ("fox.png", PNG, "image/png")}, [PNG]),
        ({"image": [("a.png", PNG), ("b.png", OTHER)]}, [PNG, OTHER]),
        ({"image": PNG, "mask": MASK}, [PNG, MASK]),
    ],
    ids=["bytes", "file", "several", "mask"],
)
def test_python_edits_files(
    openai_client: openai.OpenAI, upstream: FakeUpstream, files: Any, expected: list[bytes]
) -> None:
    script(upstream)

    made = openai_client.images.edit(**ASK, **files, extra_body=LOOK, n=1)

    assert made.data is not None
    assert decode_png(base64.b64decode(made.data[0].b64_json or "")) == (64, 48)
    assert sent_pictures(upstream) == expected


def test_python_streams_an_edit(openai_client: openai.OpenAI, upstream: FakeUpstream) -> None:
    script(upstream, "UDE=")

    stream = openai_client.images.edit(**ASK, image=PNG, stream=True, partial_images=1)

    assert [one.type for one in stream] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize("streams", [False, True])
def test_python_raises_the_refusal(
    openai_client: openai.OpenAI, upstream: FakeUpstream, streams: bool
) -> None:
    upstream.script(answer(message("I cannot draw that.")))

    with pytest.raises(openai.APIError, match=r"I cannot draw that\.") as caught:
        made: Any = openai_client.images.generate(**ASK, **LOOK, stream=streams)
        list(made)

    assert caught.value.code == "moderation_blocked"


def test_node_gets_a_picture(node_images: Call, upstream: FakeUpstream) -> None:
    script(upstream)

    made = node_images("image", body={**ASK, **LOOK})

    assert decode_png(base64.b64decode(made["data"][0]["b64_json"])) == (64, 48)


def test_node_streams_previews(node_images: Call, upstream: FakeUpstream) -> None:
    script(upstream, "UDE=", "UDI=")

    events = node_images("imageStream", body={**ASK, "partial_images": 2})

    kind = "image_generation"
    assert [one["type"] for one in events] == [*[f"{kind}.partial_image"] * 2, f"{kind}.completed"]
    assert decode_png(base64.b64decode(events[-1]["b64_json"])) == (64, 48)


@pytest.mark.parametrize("count", [1, 2])
def test_node_edits_files_with_a_mask(
    node_images: Call, upstream: FakeUpstream, count: int
) -> None:
    script(upstream)
    pictures = [base64.b64encode(one).decode() for one in (PNG, OTHER)[:count]]

    mask = base64.b64encode(MASK).decode()
    made = node_images("imageEdit", body=ASK, pictures=pictures, mask=mask)

    assert decode_png(base64.b64decode(made["data"][0]["b64_json"])) == (64, 48)
    assert sent_pictures(upstream) == [*(PNG, OTHER)[:count], MASK]
