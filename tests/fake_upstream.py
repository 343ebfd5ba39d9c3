"""A scripted Codex backend on loopback: token issuer, Codex base and ChatGPT base in one server.

    with FakeUpstream() as upstream:
        upstream.script(text("Hel", "lo"))                      # one answer for the next turn
        upstream.script(status=429, json=limit_reached(7200))   # then an error
        upstream.script(text("a", "b"), cut=True, after=5)      # then a stream that breaks off
        ...
        upstream.turns[-1].body                                 # what was received

It is strict where the real backend is: a request that the backend would refuse gets the backend's
400 here, so that a test fails at the field that is wrong. Turns that nothing was scripted for are
answered with `You said: <the last user text>`. Everything is switchable per answer (`Reply`).

By itself: `python tests/fake_upstream.py --port 0` prints its base URL; see `--help`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import gzip
import hashlib
import html
import itertools
import json as jsonlib
import re
import socket
import struct
import threading
import time
import urllib.parse
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Event = Json | bytes
"""A dict is sent as one SSE event; bytes go out as they are (comments, broken events)."""

CODEX = "/backend-api/codex"
CHATGPT = "/backend-api"
TOKEN_LIFE_S = 864_000
CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"
DEVICE = "/api/accounts/deviceauth"

_serial = itertools.count(1)


# -- Tokens and accounts --------------------------------------------------------------------------


def make_token(
    account_id: str = "acct-1",
    user_id: str = "user-1",
    email: str = "ada@example.com",
    plan: str = "plus",
    exp: float | None = None,
    iat: float | None = None,
) -> str:
    """An unsigned JWT with every claim that clients read; good as access token and as id token.

    exp  unix seconds, default ten days from now
    iat  unix seconds, default now
    """
    now = time.time()
    claims = {
        "iss": "https://auth.openai.com",
        "aud": ["https://api.openai.com/v1"],
        "sub": f"auth0|{user_id}",
        "client_id": CLIENT_ID,
        "scp": ["openid", "profile", "email", "offline_access"],
        "jti": _new_id("jti"),
        "iat": int(now if iat is None else iat),
        "exp": int(now + TOKEN_LIFE_S if exp is None else exp),
        "email": email,
        "https://api.openai.com/profile": {"email": email, "email_verified": True},
        "https://api.openai.com/auth": {
            "chatgpt_account_id": account_id,
            "chatgpt_plan_type": plan,
            "chatgpt_user_id": user_id,
            "user_id": user_id,
            "chatgpt_account_user_id": f"{user_id}__{account_id}",
            "chatgpt_account_is_fedramp": False,
            "organization_id": "org-1",
            "project_id": "proj-1",
            "completed_platform_onboarding": True,
            "is_org_owner": True,
            "organizations": [
                {"id": "org-1", "title": "Personal", "role": "owner", "is_default": True}
            ],
        },
    }
    return ".".join((_base64url({"alg": "none", "typ": "JWT"}), _base64url(claims), "fake"))


def account_file(
    account_id: str = "acct-1",
    user_id: str = "user-1",
    email: str = "ada@example.com",
    plan: str = "plus",
    exp: float | None = None,
) -> Json:
    """One account as `azt accounts import` takes it. Any FakeUpstream knows its tokens."""
    token = make_token(account_id, user_id, email, plan, exp)
    return {
        "access_token": token,
        "refresh_token": _refresh_token(account_id, user_id, email, plan),
        "id_token": make_token(account_id, user_id, email, plan, exp),
        "account_id": account_id,
        "email": email,
        "expires_at": token_claims(token)["exp"],
    }


def token_claims(token: str) -> Json:
    """The payload of a token of `make_token`, or {} for any other string."""
    parts = token.split(".")
    if len(parts) != 3 or parts[2] != "fake":
        return {}
    claims: Json = jsonlib.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    return claims


def _base64url(value: Any) -> str:
    return base64.urlsafe_b64encode(jsonlib.dumps(value).encode()).rstrip(b"=").decode()


def _refresh_token(account_id: str, user_id: str, email: str, plan: str) -> str:
    """A refresh token names its account, so that the issuer needs no list of those it gave out."""
    return "rt_" + _base64url([account_id, user_id, email, plan, next(_serial)])


# -- Event builders -------------------------------------------------------------------------------


@dataclass
class Item:
    """One output item: its events from `output_item.added` to `output_item.done`, unnumbered."""

    item: Json
    events: list[Json]


def usage(
    input_tokens: int = 12,
    output_tokens: int = 7,
    cached: int = 4,
    reasoning_tokens: int = 2,
    **extra: Any,
) -> Json:
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": input_tokens + output_tokens,
        **extra,
    }


def message(
    *deltas: str,
    phase: str = "final_answer",
    annotations: Iterable[Json] = (),
    id: str | None = None,
) -> Item:
    """An assistant message, one delta event per string."""
    item_id, said = id or _new_id("msg"), "".join(deltas)
    cited = list(annotations)
    at = {"item_id": item_id, "content_index": 0}
    part = {"type": "output_text", "text": said, "annotations": cited, "logprobs": []}
    head = {
        "id": item_id,
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    item = {**head, "status": "completed", "content": [part], "phase": phase}
    return Item(
        item,
        [
            {"type": "response.output_item.added", "item": {**head, "phase": phase}},
            {
                "type": "response.content_part.added",
                **at,
                "part": {**part, "text": "", "annotations": []},
            },
            *(
                {"type": "response.output_text.delta", **at, "delta": text, "logprobs": []}
                for text in deltas
            ),
            *(
                {
                    "type": "response.output_text.annotation.added",
                    **at,
                    "annotation_index": number,
                    "annotation": annotation,
                }
                for number, annotation in enumerate(cited)
            ),
            {"type": "response.output_text.done", **at, "text": said, "logprobs": []},
            {"type": "response.content_part.done", **at, "part": part},
            {"type": "response.output_item.done", "item": item},
        ],
    )


def citation(url: str, title: str, start: int, end: int) -> Json:
    """A flat `url_citation`, as the backend sends it."""
    return {
        "type": "url_citation",
        "url": url,
        "title": title,
        "start_index": start,
        "end_index": end,
    }


def refusal(*deltas: str) -> Item:
    item_id, said = _new_id("msg"), "".join(deltas)
    at = {"item_id": item_id, "content_index": 0}
    part = {"type": "refusal", "refusal": said}
    head = {
        "id": item_id,
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    item = {**head, "status": "completed", "content": [part]}
    return Item(
        item,
        [
            {"type": "response.output_item.added", "item": head},
            {
                "type": "response.content_part.added",
                **at,
                "part": {"type": "refusal", "refusal": ""},
            },
            *({"type": "response.refusal.delta", **at, "delta": delta} for delta in deltas),
            {"type": "response.refusal.done", **at, "refusal": said},
            {"type": "response.content_part.done", **at, "part": part},
            {"type": "response.output_item.done", "item": item},
        ],
    )


def reasoning(
    *parts: str | list[str], encrypted: str = "gAAAA-final", id: str | None = None
) -> Item:
    """A reasoning item, one summary part per argument (a list: its deltas); none: no summary."""
    item_id = id or _new_id("rs")
    head = {"id": item_id, "type": "reasoning", "summary": [], "encrypted_content": "gAAAA-early"}
    events: list[Json] = [{"type": "response.output_item.added", "item": head}]
    summary = []
    for number, deltas in enumerate([part] if isinstance(part, str) else part for part in parts):
        at = {"item_id": item_id, "summary_index": number}
        part = {"type": "summary_text", "text": "".join(deltas)}
        summary.append(part)
        kind = "response.reasoning_summary"
        events.append(
            {"type": f"{kind}_part.added", **at, "part": {"type": "summary_text", "text": ""}}
        )
        events += [{"type": f"{kind}_text.delta", **at, "delta": delta} for delta in deltas]
        events.append({"type": f"{kind}_text.done", **at, "text": part["text"]})
        events.append({"type": f"{kind}_part.done", **at, "part": part})
    item = {**head, "summary": summary, "encrypted_content": encrypted}
    return Item(item, [*events, {"type": "response.output_item.done", "item": item}])


def call(
    name: str, *deltas: str, call_id: str | None = None, id: str | None = None, **extra: Any
) -> Item:
    """A function call, its arguments in the given fragments."""
    return _tool_call(
        "function_call",
        "arguments",
        "function_call_arguments",
        "fc",
        name,
        deltas,
        call_id,
        id,
        extra,
    )


def custom_call(
    name: str, *deltas: str, call_id: str | None = None, id: str | None = None, **extra: Any
) -> Item:
    """A custom (freeform) tool call, its raw input in the given fragments."""
    return _tool_call(
        "custom_tool_call",
        "input",
        "custom_tool_call_input",
        "ctc",
        name,
        deltas,
        call_id,
        id,
        extra,
    )


def _tool_call(
    kind: str,
    key: str,
    event: str,
    prefix: str,
    name: str,
    deltas: tuple[str, ...],
    call_id: str | None,
    id: str | None,
    extra: Json,
) -> Item:
    item_id, whole = id or _new_id(prefix), "".join(deltas)
    head = {
        "id": item_id,
        "type": kind,
        "status": "in_progress",
        "call_id": call_id or _new_id("call"),
        "name": name,
        **extra,
        key: "",
    }
    item = {**head, "status": "completed", key: whole}
    return Item(
        item,
        [
            {"type": "response.output_item.added", "item": head},
            *(
                {"type": f"response.{event}.delta", "item_id": item_id, "delta": delta}
                for delta in deltas
            ),
            {"type": f"response.{event}.done", "item_id": item_id, key: whole},
            {"type": "response.output_item.done", "item": item},
        ],
    )


def web_search(query: str) -> Item:
    item_id = _new_id("ws")
    head = {
        "id": item_id,
        "type": "web_search_call",
        "status": "in_progress",
        "action": {"type": "search", "query": query},
    }
    item = {
        **head,
        "status": "completed",
        "action": {"type": "search", "query": query, "queries": [query]},
    }
    steps = ("in_progress", "searching", "completed")
    return Item(
        item,
        [
            {"type": "response.output_item.added", "item": head},
            *({"type": f"response.web_search_call.{step}", "item_id": item_id} for step in steps),
            {"type": "response.output_item.done", "item": item},
        ],
    )


def compaction(account: str) -> Item:
    """A history made small; only the account that it was made for can read it again."""
    item = {"id": _new_id("cmp"), "type": "compaction", "encrypted_content": f"gAAAA-cmp-{account}"}
    return Item(item, [{"type": "response.output_item.done", "item": item}])


def image(result: str, partials: Iterable[str] = (), **metadata: Any) -> Item:
    """A generated picture; `result` and `partials` are bare base64."""
    item_id = _new_id("ig")
    looks = {
        "size": "1024x1024",
        "quality": "low",
        "background": "opaque",
        "output_format": "png",
        **metadata,
    }
    head = {"id": item_id, "type": "image_generation_call", "status": "in_progress"}
    item = {
        **head,
        "status": "completed",
        "action": "generate",
        "result": result,
        "revised_prompt": "a picture",
        **looks,
    }
    kind = "response.image_generation_call"
    return Item(
        item,
        [
            {"type": "response.output_item.added", "item": head},
            {"type": f"{kind}.in_progress", "item_id": item_id},
            {"type": f"{kind}.generating", "item_id": item_id},
            *(
                {
                    "type": f"{kind}.partial_image",
                    "item_id": item_id,
                    "partial_image_index": number,
                    "partial_image_b64": partial,
                    **looks,
                }
                for number, partial in enumerate(partials)
            ),
            {"type": f"{kind}.completed", "item_id": item_id},
            {"type": "response.output_item.done", "item": item},
        ],
    )


def answer(
    *items: Item, interleaved: bool = False, filled: bool = False, **response: Any
) -> list[Event]:
    """A whole stream, from `response.created` to `response.completed`.

    interleaved  the events of the items take turns
    filled       `response.completed` repeats the output (the real backend leaves it empty)
    response     fields of the final response object, for example `usage=None` or `model="other"`
    """
    streams = [
        [{**event, "output_index": index} for event in item.events]
        for index, item in enumerate(items)
    ]
    body = (
        list(_in_turns(streams))
        if interleaved
        else [event for events in streams for event in events]
    )
    output = [item.item for item in items] if filled else []
    final: Json = {"status": "completed", "output": output, "usage": usage(), **response}
    return [*_opening(response), *body, {"type": "response.completed", "response": final}]


def text(*deltas: str, **response: Any) -> list[Event]:
    """A plain answer in the given deltas."""
    return answer(message(*deltas), **response)


def incomplete(*items: Item, reason: str = "max_output_tokens", **response: Any) -> list[Event]:
    final = {
        "status": "incomplete",
        "output": [],
        "incomplete_details": {"reason": reason},
        "usage": usage(),
        **response,
    }
    return [*answer(*items)[:-1], {"type": "response.incomplete", "response": final}]


def failed(code: str, message: str, *items: Item) -> list[Event]:
    """A stream that fails after the deltas of `items`, none of which gets finished."""
    started = without(answer(*items)[:-1], ".done")
    error = {"code": code, "message": message}
    final = {"status": "failed", "output": [], "error": error, "usage": None}
    return [*started, {"type": "response.failed", "response": final}]


def flat_error(code: str, message: str, param: str | None = None) -> Json:
    """The `error` event of the public API."""
    return {"type": "error", "code": code, "message": message, "param": param}


def nested_error(status: int, error: Json) -> Json:
    """The `error` event in the form of an HTTP answer."""
    return {"type": "error", "status": status, "error": error}


def events(*given: Any) -> list[Event]:
    """Events one by one, or lists of them, as one stream."""
    return [event for each in given for event in (each if isinstance(each, list) else [each])]


def without(stream: list[Event], *types: str) -> list[Event]:
    """A stream that lacks events: full type names, or endings that begin with a dot."""
    return [
        event for event in stream if isinstance(event, bytes) or not event["type"].endswith(types)
    ]


def _opening(response: Json) -> list[Json]:
    kept = {name: response[name] for name in ("model", "created_at") if name in response}
    opened = {**kept, "status": "in_progress", "output": [], "usage": None}
    return [
        {"type": f"response.{state}", "response": opened} for state in ("created", "in_progress")
    ]


def _in_turns(streams: list[list[Json]]) -> Iterator[Json]:
    for row in itertools.zip_longest(*streams):
        yield from (event for event in row if event is not None)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{next(_serial):012x}"


# -- Error bodies ---------------------------------------------------------------------------------


def error_json(message: str, type: str = "invalid_request_error", **members: Any) -> Json:
    return {"error": {"message": message, "type": type, "param": None, "code": None, **members}}


def limit_reached(
    resets_in_s: int | None = 3600, *, absolute: bool = True, plan: str = "plus"
) -> Json:
    """The 429 body of an exhausted plan, with or without the time of its reset."""
    error: Json = {
        "type": "usage_limit_reached",
        "message": "The usage limit has been reached",
        "plan_type": plan,
        "eligible_promo": None,
    }
    if resets_in_s is not None:
        error["resets_in_seconds"] = resets_in_s
        if absolute:
            error["resets_at"] = int(time.time()) + resets_in_s
    return {"error": error}


def token_refused(code: str = "token_expired") -> Json:
    return error_json(
        "Provided authentication token is expired. Please try signing in again.", code=code
    )


def refresh_refused(code: str = "refresh_token_reused") -> Json:
    told = "Your refresh token has already been used to generate a new access token."
    return error_json(f"{told} Please try signing in again.", code=code)


CHALLENGE_PAGE = b"<!DOCTYPE html><html><title>Just a moment...</title><p>Cloudflare</p></html>"


# -- What the backend refuses ---------------------------------------------------------------------

PARAMETERS = frozenset(
    "model instructions input tools tool_choice parallel_tool_calls reasoning text include stream "
    "store prompt_cache_key service_tier client_metadata".split()
)
INCLUDES = frozenset(
    "reasoning.encrypted_content web_search_call.action.sources message.input_image.image_url "
    "file_search_call.results computer_call_output.output.image_url "
    "code_interpreter_call.outputs".split()
)
TOOL_KEYS = {
    "function": {"type", "name", "description", "strict", "parameters"},
    "custom": {"type", "name", "description", "format"},
    "namespace": None,
    "web_search": None,
    "image_generation": None,
    "tool_search": None,
    "local_shell": None,
}
_MESSAGE_KEYS = {
    "type",
    "id",
    "role",
    "content",
    "phase",
    "status",
}
ITEM_KEYS = {
    "message": _MESSAGE_KEYS,
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
    "function_call": {"type", "id", "call_id", "name", "namespace", "arguments", "status"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
    "custom_tool_call": {"type", "id", "call_id", "name", "namespace", "input", "status"},
    "custom_tool_call_output": {"type", "id", "call_id", "output", "status"},
    "local_shell_call": None,
    "local_shell_call_output": None,
    "web_search_call": None,
    "image_generation_call": None,
    "tool_search_call": None,
    "tool_search_output": None,
    "additional_tools": None,
    "compaction": None,
    "compaction_trigger": None,
}
PART_KEYS = {
    "input_text": {"type", "text"},
    "input_image": {"type", "image_url", "detail"},
    "input_file": {"type", "file_data", "filename", "file_id", "file_url"},
    "output_text": {"type", "text", "annotations", "logprobs"},
    "refusal": {"type", "refusal"},
}
_CALL_TYPES = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Refused(Exception):
    """The backend's answer to a request that it does not take."""

    def __init__(self, status: int, json: Json) -> None:
        super().__init__(jsonlib.dumps(json))
        self.status, self.json = status, json


def _detail(message: str) -> Refused:
    return Refused(400, {"detail": message})


def _invalid(message: str, param: str, code: str = "invalid_value") -> Refused:
    return Refused(400, error_json(message, param=param, code=code))


def _known_keys(value: Json, allowed: set[str] | None, path: str) -> None:
    for name in value if allowed is not None else ():
        # Codex adds this to any item where its provider is OpenAI.
        is_codexs = name == "internal_chat_message_metadata_passthrough"
        if name not in allowed and not (is_codexs and re.fullmatch(r"input\[\d+\]", path)):
            raise _invalid(
                f"Unknown parameter: '{path}.{name}'.", f"{path}.{name}", "unknown_parameter"
            )


def check_request(body: Any, headers: dict[str, str], upstream: FakeUpstream) -> None:
    """Raise `Refused` where the real backend would refuse."""
    if not isinstance(body, dict):
        raise _detail("Input should be a valid dictionary")
    _check_parameters(body, upstream)
    model = _check_model(body, headers, upstream)
    for index, item in enumerate(body["input"]):
        _check_item(item, f"input[{index}]")
    _check_pairs(body["input"])
    _check_tools(body.get("tools"), body.get("tool_choice"))
    _check_reasoning(body.get("reasoning"), model)
    _check_text(body.get("text"), body["input"])


def check_origin(seen: Seen, upstream: FakeUpstream) -> None:
    """Nothing that was given out to one account may come back with another one."""
    owner = upstream.turn_states.get(seen.turn_state, seen.account)
    if owner != seen.account or (seen.turn_state and seen.turn_state not in upstream.turn_states):
        raise _detail("Invalid turn state")
    items = seen.body.get("input") if isinstance(seen.body, dict) else None
    for item in items if isinstance(items, list) else ():
        sealed = str(item.get("encrypted_content")) if isinstance(item, dict) else ""
        if sealed.startswith("gAAAA-cmp-") and sealed != f"gAAAA-cmp-{seen.account}":
            told = "The encrypted content could not be verified."
            raise Refused(400, error_json(told, code="invalid_encrypted_content"))


def _check_parameters(body: Json, upstream: FakeUpstream) -> None:
    for name, value in body.items():
        delivery = name == "stream_options" and set(value or ()) == {"reasoning_summary_delivery"}
        tier = name == "service_tier" and value != "priority"
        if (name not in PARAMETERS and not delivery) or tier:
            raise _detail(f"Unsupported parameter: {name}")
    if body.get("stream") is not True:
        raise _detail("Stream must be set to true")
    if body.get("store") is not False:
        raise _detail("Store must be set to false")
    if not isinstance(body.get("input"), list):
        raise _detail("Input must be a list")
    if not isinstance(body.get("instructions", ""), str):
        raise _detail("Instructions are not valid")
    if upstream.instructions_required and not body.get("instructions"):
        raise _detail("Instructions are required")
    if not isinstance(body.get("parallel_tool_calls", True), bool):
        raise _invalid("Expected a boolean.", "parallel_tool_calls", "invalid_type")
    if not isinstance(body.get("prompt_cache_key", ""), str):
        raise _invalid("Expected a string.", "prompt_cache_key", "invalid_type")
    for index, name in enumerate(body.get("include", [])):
        if name not in INCLUDES:
            raise _invalid(f"Invalid value: '{name}'.", f"include[{index}]")
    for name, value in body.get("client_metadata", {}).items():
        if not isinstance(value, str):
            raise _invalid("Expected a string.", f"client_metadata.{name}", "invalid_type")


def _check_model(body: Json, headers: dict[str, str], upstream: FakeUpstream) -> Json:
    slug = body.get("model")
    model = next((model for model in upstream.models if model["slug"] == slug), None)
    if model is None:
        raise _detail(
            f"The '{slug}' model is not supported when using Codex with a ChatGPT account."
        )
    lite = headers.get("x-openai-internal-codex-responses-lite") == "true"
    if lite and not model["use_responses_lite"]:
        raise _detail(
            "This model is not supported when using X-OpenAI-Internal-Codex-Responses-Lite."
        )
    if upstream.lite_required and model["use_responses_lite"] and not lite:
        told = f"The model `{slug}` does not exist or you do not have access to it."
        raise Refused(404, error_json(told, code="model_not_found"))
    return model


def _check_item(item: Any, path: str) -> None:
    if not isinstance(item, dict):
        raise _invalid("Expected an object.", path, "invalid_type")
    kind = item.get("type", "message" if "role" in item else None)
    if kind not in ITEM_KEYS:
        raise _invalid(f"Invalid value: '{kind}'.", f"{path}.type")
    _known_keys(item, ITEM_KEYS[kind], path)
    if kind == "message":
        _check_message(item, path)
    elif kind == "reasoning" and not isinstance(item.get("encrypted_content"), str):
        told = f"Item with id '{item.get('id')}' not found: nothing is persisted without `store`."
        raise Refused(404, error_json(told, param="input"))
    elif "call_id" in (ITEM_KEYS[kind] or ()):
        _check_call(item, kind, path)


def _check_message(item: Json, path: str) -> None:
    role = item.get("role")
    if role == "system":
        raise _detail("System messages are not allowed")
    if role not in ("user", "assistant", "developer"):
        raise _invalid(f"Invalid value: '{role}'.", f"{path}.role")
    if not isinstance(item.get("content"), list):
        raise _invalid("Expected an array of content parts.", f"{path}.content", "invalid_type")
    allowed = (
        ("output_text", "refusal")
        if role == "assistant"
        else ("input_text", "input_image", "input_file")
    )
    for index, part in enumerate(item["content"]):
        _check_part(part, allowed, f"{path}.content[{index}]")


def _check_part(part: Any, allowed: tuple[str, ...], path: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in allowed:
        choices = ", ".join(repr(name) for name in allowed)
        raise _invalid(f"Invalid value: '{kind}'. Supported values are: {choices}.", f"{path}.type")
    _known_keys(part, PART_KEYS[kind], path)
    if kind == "input_image":
        url = part.get("image_url")
        if not isinstance(url, str) or not url.startswith(("data:image/", "https://", "http://")):
            raise _invalid("Expected a data or http URL.", f"{path}.image_url")
        if part.get("detail", "auto") not in ("auto", "low", "high", "original"):
            raise _invalid("Invalid detail.", f"{path}.detail")
    elif kind == "input_file":
        if "file_data" in part and not part.get("filename"):
            missing = f"{path}.filename"
            raise _invalid(
                f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter"
            )
    else:
        key = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(key), str):
            raise _invalid("Expected a string.", f"{path}.{key}", "invalid_type")


def _check_call(item: Json, kind: str, path: str) -> None:
    call_id = item.get("call_id")
    if not isinstance(call_id, str) or not 1 <= len(call_id) <= 64:
        raise _invalid(
            "Expected a string with a maximum length of 64.",
            f"{path}.call_id",
            "string_above_max_length",
        )
    if kind in _CALL_TYPES:
        if not isinstance(item.get("name"), str) or not _NAME.fullmatch(item["name"]):
            raise _invalid("Expected a name of [a-zA-Z0-9_-]{1,64}.", f"{path}.name")
        key = "arguments" if kind == "function_call" else "input"
        if not isinstance(item.get(key), str):
            raise _invalid("Expected a string.", f"{path}.{key}", "invalid_type")
    elif isinstance(item.get("output"), list):
        for index, part in enumerate(item["output"]):
            _check_part(
                part, ("input_text", "input_image", "input_file"), f"{path}.output[{index}]"
            )
    elif not isinstance(item.get("output"), str):
        raise _invalid("Expected a string or an array.", f"{path}.output", "invalid_type")


def _check_pairs(items: list[Json]) -> None:
    """Calls and outputs pair up, the call first; a call with an id follows its reasoning."""
    open_calls: dict[str, str] = {}
    answered: set[str] = set()
    before = None
    for item in items:
        kind = item.get("type", "message")
        if kind in _CALL_TYPES:
            if "id" in item and before not in ("reasoning", kind):
                told = f"Item '{item['id']}' was provided without its required 'reasoning' item."
                raise _invalid(told, "input")
            open_calls[item["call_id"]] = _CALL_TYPES[kind]
        elif kind in _CALL_TYPES.values():
            call_id = item["call_id"]
            if open_calls.get(call_id) != kind or call_id in answered:
                raise _invalid(
                    f"No tool call found for function call output with call_id {call_id}.", "input"
                )
            answered.add(call_id)
        before = kind
    for call_id in open_calls.keys() - answered:
        raise _invalid(f"No tool output found for function call {call_id}.", "input")


def _check_tools(tools: Any, choice: Any) -> None:
    if tools is not None and not isinstance(tools, list):
        raise _invalid("Expected an array.", "tools", "invalid_type")
    names = []
    for index, tool in enumerate(tools or []):
        kind = tool.get("type")
        if kind not in TOOL_KEYS:
            raise _detail(f"Unsupported tool type: {kind}")
        path = f"tools[{index}]"
        if kind in ("function", "custom"):
            _check_named_tool(tool, path)
            names.append(tool["name"])
        _known_keys(tool, TOOL_KEYS[kind], path)
    if len(set(names)) != len(names):
        raise _invalid("Tool names must be unique.", "tools")
    _check_choice(choice, names, [tool["type"] for tool in tools or []])


def _check_named_tool(tool: Json, path: str) -> None:
    if "name" not in tool:
        told = f"Missing required parameter: '{path}.name'."
        raise _invalid(told, f"{path}.name", "missing_required_parameter")
    if not isinstance(tool["name"], str) or not _NAME.fullmatch(tool["name"]):
        raise _invalid("Expected a name of [a-zA-Z0-9_-]{1,64}.", f"{path}.name")
    if tool["type"] == "custom":
        form = tool.get("format", {"type": "text"})
        if form.get("type") == "grammar" and not {"syntax", "definition"} <= set(form):
            raise _invalid("A grammar needs 'syntax' and 'definition'.", f"{path}.format")
        return
    if not isinstance(tool.get("strict", False), bool):
        raise _invalid("Expected a boolean.", f"{path}.strict", "invalid_type")
    schema = tool.get("parameters")
    told = f"Invalid schema for function '{tool['name']}'"
    if not isinstance(schema, dict) or schema.get("type") != "object" or "properties" not in schema:
        raise _invalid(
            f"{told}: not an object schema.", f"{path}.parameters", "invalid_function_parameters"
        )
    if tool.get("strict") and not _strict_schema(schema):
        raise _invalid(f"{told}: not strict.", f"{path}.parameters", "invalid_function_parameters")


def _strict_schema(schema: Json) -> bool:
    properties = set(schema.get("properties", ()))
    return schema.get("additionalProperties") is False and properties == set(
        schema.get("required", ())
    )


def _check_choice(choice: Any, names: list[str], types: list[str]) -> None:
    if choice is None or choice in ("auto", "none"):
        return
    if choice == "required":
        if not types:
            raise _invalid(
                "Tool choice 'required' must be specified with 'tools' parameter.", "tool_choice"
            )
        return
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        if choice.get("mode") not in ("auto", "required"):
            raise _invalid("Invalid mode.", "tool_choice.mode")
        for allowed in choice["tools"]:
            _check_choice(allowed, names, types)
    elif kind in ("function", "custom"):
        if "name" not in choice:
            told = "Missing required parameter: 'tool_choice.name'."
            raise _invalid(told, "tool_choice.name", "missing_required_parameter")
        if choice["name"] not in names:
            raise _invalid(
                f"Tool choice '{choice['name']}' not found in 'tools' parameter.", "tool_choice"
            )
    elif kind not in types:
        raise _invalid(f"Invalid value: '{choice}'.", "tool_choice")


def _check_reasoning(given: Any, model: Json) -> None:
    if given is None:
        return
    _known_keys(given, {"effort", "summary", "context"}, "reasoning")
    effort = given.get("effort")
    levels = [level["effort"] for level in model["supported_reasoning_levels"]]
    if effort is not None and effort not in levels:
        told = f"Unsupported value: '{effort}' is not supported with the '{model['slug']}' model."
        raise _invalid(told, "reasoning.effort", "unsupported_value")
    if given.get("summary") not in (None, "auto", "concise", "detailed"):
        raise _invalid("Invalid value.", "reasoning.summary")


def _check_text(given: Any, items: list[Json]) -> None:
    if given is None:
        return
    _known_keys(given, {"verbosity", "format"}, "text")
    if given.get("verbosity", "low") not in ("low", "medium", "high"):
        raise _invalid("Invalid value.", "text.verbosity")
    form = given.get("format", {"type": "text"})
    kind = form.get("type")
    if kind == "json_object":
        if "json" not in jsonlib.dumps([item.get("content") for item in items]).lower():
            told = "Response input messages must contain the word 'json' to use 'json_object'."
            raise _invalid(told, "input")
    elif kind == "json_schema":
        _known_keys(form, {"type", "name", "schema", "strict", "description"}, "text.format")
        if not isinstance(form.get("name"), str) or not _NAME.fullmatch(form["name"]):
            raise _invalid("Invalid name.", "text.format.name")
        if not isinstance(form.get("schema"), dict) or (
            form.get("strict") and not _strict_schema(form["schema"])
        ):
            raise _invalid("Invalid schema.", "text.format.schema", "invalid_json_schema")
    elif kind != "text":
        raise _invalid(f"Invalid value: '{kind}'.", "text.format.type")


# -- The model list -------------------------------------------------------------------------------


def model_info(slug: str, efforts: str = "low medium high xhigh", **changes: Any) -> Json:
    """One entry of the catalogue with the fields that clients read."""
    levels = efforts.split()
    return {
        "slug": slug,
        "display_name": slug,
        "description": f"The model {slug}",
        "visibility": "list",
        "priority": 10,
        "supported_in_api": True,
        "available_in_plans": [
            "free",
            "go",
            "plus",
            "pro",
            "team",
            "business",
            "enterprise",
            "edu",
        ],
        "minimal_client_version": "0.98.0",
        "upgrade": None,
        "availability_nux": None,
        "default_reasoning_level": "medium",
        "supported_reasoning_levels": [{"effort": level, "description": level} for level in levels],
        "supports_reasoning_summaries": True,
        "support_verbosity": True,
        "default_verbosity": "low",
        "service_tiers": [{"id": "priority", "name": "Fast", "description": "Faster"}],
        "context_window": 272_000,
        "max_context_window": 272_000,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "input_modalities": ["text", "image"],
        "supports_parallel_tool_calls": True,
        "use_responses_lite": False,
        "base_instructions": "You are a coding agent.",
        "additional_speed_tiers": [],
        "apply_patch_tool_type": "freeform",
        "default_reasoning_summary": "none",
        "effective_context_window_percent": 95,
        "experimental_supported_tools": [],
        "shell_type": "unified_exec",
        "supports_search_tool": False,
        **changes,
    }


def default_models() -> list[Json]:
    return [
        model_info("gpt-5.5", priority=1),
        model_info("gpt-5.4", "low medium high", priority=2),
        model_info("gpt-6-luna", "low medium high xhigh max", priority=3, use_responses_lite=True),
        model_info("gpt-9-preview", priority=4, minimal_client_version="9.0.0"),
        model_info("codex-auto-review", priority=9, visibility="hide"),
    ]


def codex_models_cache(models: list[Json] | None = None) -> Json:
    """The content of Codex's own `models_cache.json`."""
    fetched = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    listed = models or default_models()
    return {
        "fetched_at": fetched,
        "etag": 'W/"models-1"',
        "client_version": "0.169.0",
        "models": listed,
    }


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


# -- Scripts and records --------------------------------------------------------------------------


@dataclass(eq=False)
class Seen:
    """One request as it arrived, and what became of its answer. Times are monotonic seconds."""

    method: str
    path: str
    """Without the query."""
    query: dict[str, str]
    headers: dict[str, str]
    """Lower-case names; a repeated header keeps its last value."""
    raw: bytes
    body: Any
    """The parsed JSON body or form; None without one, or where its coding cannot be decoded."""
    connection: int
    """Counts the connections from 1."""
    at: float
    account: str | None = None
    """The account id of the bearer token."""
    turn_state: str = ""
    """The `x-codex-turn-state` that came, else the one that this answer gives out."""
    status: int = 0
    finished_at: float | None = None
    """When the last byte of the answer was handed to the kernel."""
    closed_at: float | None = None
    """When the client closed the connection before the answer was finished."""

    @property
    def user_text(self) -> str:
        """The text parts of the last user message."""
        for item in reversed(self.body["input"] if isinstance(self.body, dict) else []):
            if item.get("role") == "user":
                return "".join(part.get("text", "") for part in item["content"])
        return ""


@dataclass(eq=False)
class Reply:
    """One scripted answer. `after`, `delays` and `cut` count scripted events, not vendor events."""

    events: list[Event] = field(default_factory=list)
    path: str = "/responses"
    """Which requests it is for: an ending of the path."""
    account: str | None = None
    """Only for requests of this account."""
    when: Callable[[Seen], bool] | None = None
    """Only for requests that this accepts."""
    status: int = 200
    json: Any = None
    """A JSON answer instead of a stream; a function is called with the request."""
    body: bytes | None = None
    """Any other answer; its type is in `headers`."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before the head."""
    delays: float | dict[int, float] = 0.0
    """Seconds before each `.delta` event, or before the events with these numbers."""
    stall: bool = False
    """Send `after` events, then nothing until `upstream.release()`."""
    cut: bool = False
    """Send `after` events, then close without ending the transfer."""
    after: int | None = None
    """How many events; None: all that are scripted."""
    reset_after: int | None = None
    """Reset the connection after this many bytes, the head included."""
    pieces: int = 0
    """Write the body in chunks of this many bytes."""
    newline: str = "\n"
    vendor: bool = True
    """Interleave the backend's own events."""
    obfuscation: bool = True
    """Pad deltas with an `obfuscation` string."""
    done: bool = False
    """End with `data: [DONE]`."""
    framing: str = "chunked"
    """`chunked`, or `close`: the end of the connection ends the body."""
    before: bytes = b""
    """Sent before the head."""
    raw: bytes | None = None
    """All that is sent, head and body; then `end`."""
    end: str = "keep"
    """`keep`, `close` (without having said so) or `reset`: what becomes of the connection."""


class Gone(Exception):
    """The client closed the connection, or a script said to reset it."""


# -- The ChatGPT web site -------------------------------------------------------------------------

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


class WebSite:
    """The calls of codex-upstream.md 10, strict: each wants what the ones before it gave.

    check      "proofofwork", "turnstile" or "arkose": what only a browser can answer
    moderated  the stream says that the request was blocked
    polls      how many times the conversation is asked for before its picture is there
    idle       no tool was invoked
    said       what the assistant says in the stream
    scheme     of the pointers: "file-service" or "sediment"
    pictures   how many one conversation makes
    blob       where pictures are put and fetched; another host than that of the site
    """

    def __init__(self, url: str) -> None:
        self.check = self.said = ""
        self.moderated = self.idle = False
        self.polls = 0
        self.pictures = 1
        self.scheme = "sediment"
        self.blob = url.replace("127.0.0.1", "localhost")
        self.uploads: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        self._asked: dict[str, int] = {}
        self._parts: list[list[Any]] = []

    def find(self, seen: Seen) -> Callable[[Seen], Reply] | None:
        """What answers this call, if it is one of the site."""
        for method, pattern, answer in (
            ("POST", "/backend-api/sentinel/chat-requirements", self._requirements),
            ("POST", "/backend-api/files", self._file),
            ("PUT", "/blob/([\\w-]+)", self._put),
            ("GET", "/blob/([\\w-]+)", self._get),
            ("POST", "/backend-api/files/([\\w-]+)/uploaded", self._uploaded),
            ("POST", "/backend-api/f/conversation/prepare", self._prepare),
            ("POST", "/backend-api/f/conversation", self._conversation),
            ("GET", "/backend-api/conversation/([\\w-]+)", self._poll),
            ("GET", "/backend-api/files/([\\w-]+)/download", self._download),
            (
                "GET",
                "/backend-api/conversation/conv-\\d+/attachment/([\\w-]+)/download",
                self._download,
            ),
        ):
            found = re.fullmatch(pattern, seen.path)
            if found and seen.method == method:
                return functools.partial(answer, *found.groups())
        return None

    def _requirements(self, seen: Seen) -> Reply:
        _wants(seen.body, {"p"})
        checks: Json = {self.check: {"required": True}} if self.check else {}
        return Reply(json={"token": "admitted", "persona": "free", **checks})

    def _file(self, seen: Seen) -> Reply:
        _wants(seen.body, {"file_name", "file_size", "use_case", "width", "height"})
        name = f"file-{len(self.uploads) + 1}"
        self.uploads[name] = "named"
        return Reply(json={"file_id": name, "upload_url": f"{self.blob}/blob/{name}"})

    def _put(self, name: str, seen: Seen) -> Reply:
        _no_secret(seen)
        if self.uploads.get(name) != "named" or seen.headers.get("x-ms-blob-type") != "BlockBlob":
            raise Refused(400, {"detail": "no such blob"})
        if not seen.headers.get("x-ms-version") or "image/" not in seen.headers["content-type"]:
            raise Refused(400, {"detail": "no picture"})
        self.uploads[name], self.stored[name] = "put", seen.raw
        return Reply(status=201, body=b"")

    def _get(self, name: str, seen: Seen) -> Reply:
        _no_secret(seen)
        return Reply(body=PNG, headers={"content-type": "image/png"})

    def _uploaded(self, name: str, seen: Seen) -> Reply:
        if self.uploads.get(name) != "put" or seen.body != {}:
            raise Refused(404, {"detail": "File not found"})
        self.uploads[name] = "uploaded"
        return Reply(json={"status": "success"})

    def _check_turn(self, seen: Seen, *more: str) -> None:
        if seen.headers.get("openai-sentinel-chat-requirements-token") != "admitted":
            raise Refused(403, {"detail": "Unusual activity has been detected from your device."})
        _wants(
            seen.body,
            {"action", "conversation_mode", "model", "parent_message_id", "supported_encodings"}
            | {"supports_buffering", "system_hints", "timezone", "timezone_offset_min", *more},
        )
        if seen.body["action"] != "next" or seen.body["system_hints"] != ["picture_v2"]:
            raise Refused(422, {"detail": "no picture is asked for"})

    def _prepare(self, seen: Seen) -> Reply:
        self._check_turn(seen, "partial_query")
        return Reply(json={"status": "ok", "conduit_token": "conduit"})

    def _conversation(self, seen: Seen) -> Reply:
        self._check_turn(seen, "client_contextual_info", "messages")
        if seen.headers.get("x-conduit-token") != "conduit":
            raise Refused(403, {"detail": "no conduit"})
        [message] = seen.body["messages"]
        pointers = [one for one in message["content"]["parts"] if isinstance(one, dict)]
        attached = [f"file-service://{one['id']}" for one in message["metadata"]["attachments"]]
        known = [one for one in attached if self.uploads.get(one[15:]) == "uploaded"]
        if [one["asset_pointer"] for one in pointers] != known or known != attached:
            raise Refused(404, {"detail": "File not found"})
        self._parts.append(message["content"]["parts"])
        name = f"conv-{len(self._parts)}"
        self._asked[name] = 0
        shared = {"conversation_id": name, "error": None}
        told: list[Json] = [{"message": _web_message("user", "text", *message["content"]["parts"])}]
        if self.said:
            told.append({"message": _web_message("assistant", "text", self.said)})
        if self.moderated:
            told.append({"type": "moderation", "moderation_response": {"blocked": True}})
        if not (self.polls or self.idle or self.moderated):
            told.append({"message": self._picture_message(name)})
        about = {"tool_invoked": not self.idle, "turn_use_case": "image gen"}
        told.append({"type": "server_ste_metadata", "metadata": about})
        lines = [f"data: {jsonlib.dumps(one | shared)}\n\n".encode() for one in told]
        return Reply(events=[*lines], done=True, vendor=False)

    def _picture_message(self, name: str) -> Json:
        parts = [
            {"content_type": "image_asset_pointer", "asset_pointer": f"{self.scheme}://{name}-{at}"}
            for at in range(self.pictures)
        ]
        message = _web_message("tool", "multimodal_text", *parts)
        return message | {"metadata": {"async_task_type": "image_gen"}}

    def _poll(self, name: str, seen: Seen) -> Reply:
        if name not in self._asked:
            raise Refused(404, {"detail": "conversation_not_found"})
        self._asked[name] += 1
        is_there = 0 < self.polls <= self._asked[name]
        messages = [_web_message("user", "multimodal_text", *self._parts[-1])]
        messages += [self._picture_message(name)] if is_there else []
        mapping = {f"node-{at}": {"message": one} for at, one in enumerate(messages)}
        return Reply(
            json={"conversation_id": name, "mapping": {"root": {"message": None}, **mapping}}
        )

    def _download(self, name: str, seen: Seen) -> Reply:
        if ("/attachment/" in seen.path) != (self.scheme == "sediment"):
            raise Refused(404, {"detail": "File not found"})
        return Reply(json={"status": "success", "download_url": f"{self.blob}/blob/{name}"})


def _web_message(role: str, kind: str, *parts: Any) -> Json:
    content = {"content_type": kind, "parts": [*parts]}
    return {"id": _new_id("m"), "author": {"role": role}, "content": content, "metadata": {}}


def _wants(body: Any, keys: set[str]) -> None:
    if not isinstance(body, dict) or set(body) != keys:
        raise Refused(422, {"detail": f"Expected {sorted(keys)}, got {body}"})


def _no_secret(seen: Seen) -> None:
    secret = {"authorization", "chatgpt-account-id", "cookie"} & set(seen.headers)
    if secret:
        raise Refused(400, {"detail": f"{sorted(secret)} is for the site alone"})


# -- The server -----------------------------------------------------------------------------------


class FakeUpstream:
    """The server and its script. Runs on a thread of its own; call its methods from any thread.

    default                answers the turns that nothing is scripted for
    models                 the catalogue
    etag                   of the catalogue; also sent as `x-models-etag`
    instructions_required  behave as until spring 2026
    lite_required          refuse Lite models in the classic shape
    rotations              (refresh token, the one given for it), in order
    person                 (account id, user id, e-mail, plan) of whoever signs in at the issuer
    device_answer          what the issuer adds to the code for a device (`interval`, `expires_in`)
    quotas                 account id -> (used percent, seconds to the reset) of its two windows
    codes                  code -> what it was given out for; a used one is None
    devices                user code -> "pending", "approved" or "used"
    web                    the ChatGPT web site and its pictures
    issuer                 the address by which azt knows this server as the issuer
    """

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.changed = threading.Condition()
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fake-upstream", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._released: asyncio.Event
        self.reset()

    def reset(self) -> None:
        """Forget scripts, requests and revoked tokens; end the streams that still run."""
        self.requests: list[Seen] = []
        self.default: Callable[[Seen], Reply] = default_reply
        self.models = default_models()
        self.etag = 'W/"models-1"'
        self.instructions_required = False
        self.lite_required = False
        self.person = ("acct-1", "user-1", "ada@example.com", "plus")
        self.device_answer: Json = {"interval": "1"}
        self.quotas: dict[str, list[tuple[int, int]]] = {}
        self.codes: dict[str, Json | None] = {}
        self.devices: dict[str, str] = {}
        self.web = WebSite(self.url)
        self.issuer = self.url
        self.revoked: set[str] = set()
        self.turn_states: dict[str, str | None] = {}
        self._used: set[str] = set()
        self.rotations: list[tuple[str, str]] = []
        self._script: deque[Reply] = deque()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end_answers)

    def script(self, events: list[Event] | None = None, *, times: int = 1, **how: Any) -> None:
        """Queue an answer (fields of `Reply`) for the next request that it is for, `times` over."""
        self._script.extend([Reply(events=events or [], **how)] * times)

    @property
    def turns(self) -> list[Seen]:
        """The model calls, refused ones included."""
        return [seen for seen in self.requests if seen.path == f"{CODEX}/responses"]

    @property
    def sent(self) -> Json:
        """The body of the last model call."""
        body: Json = self.turns[-1].body
        return body

    def environment(self) -> dict[str, str]:
        """The variables that point azt at this server."""
        return {
            "AZT_CODEX_BASE_URL": self.url + CODEX,
            "AZT_CHATGPT_BASE_URL": self.url + CHATGPT,
            "AZT_AUTH_BASE_URL": self.url,
        }

    def revoke(self, account_id: str) -> None:
        """Refuse every token of this account from now on."""
        self.revoked.add(account_id)

    def release(self) -> None:
        """Let the stalled answers go on."""
        self._loop.call_soon_threadsafe(self._release)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 5.0) -> Any:
        """Wait until the condition on the records holds and return its value, else fail."""
        with self.changed:
            value = self.changed.wait_for(condition, timeout)
        assert value, f"not within {timeout} s: {self.requests}"
        return value

    def wait_turns(self, count: int = 1, timeout: float = 5.0) -> list[Seen]:
        """Wait for this many model calls."""
        return self.wait_until(lambda: len(self.turns) >= count and self.turns, timeout)

    def wait_closed(self, number: int = -1, timeout: float = 5.0) -> float:
        """When the client closed the connection of that model call in the middle of its answer."""
        return self.wait_until(lambda: self.turns and self.turns[number].closed_at, timeout)

    # Life

    def start(self) -> FakeUpstream:
        started = threading.Event()
        self._loop.call_soon(started.set)
        self._thread.start()
        started.wait()
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> FakeUpstream:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._released = asyncio.Event()
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Connection(self), sock=self._listener)
        )
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self._loop.run_until_complete(self._end())
            self._loop.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets the transports report that they are closed

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _end_answers(self) -> None:
        for task in list(self._tasks):
            connection = getattr(task, "connection", None)
            if connection and connection.answering:
                connection.abort()

    def spawn(self, connection: _Connection) -> None:
        task = self._loop.create_task(connection.serve())
        task.connection = connection  # type: ignore[attr-defined]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note(self) -> None:
        with self.changed:
            self.changed.notify_all()

    # Choice of the answer

    def reply_to(self, seen: Seen) -> Reply:
        """The checks of the backend, then the script, then the default answer."""
        try:
            if not seen.path.startswith(("/oauth/", "/codex/", "/blob/", "/pypi/", DEVICE)):
                self._check_token(seen)
                seen.turn_state = seen.headers.get("x-codex-turn-state", "")
                check_origin(seen, self)
                seen.turn_state = seen.turn_state or _new_id("ts")
                self.turn_states[seen.turn_state] = seen.account
            if (
                seen.path == f"{CODEX}/responses"
                and seen.method == "POST"
                and seen.body is not None
            ):
                check_request(seen.body, seen.headers, self)
        except Refused as refused:
            return Reply(status=refused.status, json=refused.json)
        for reply in list(self._script):
            if _is_for(reply, seen):
                self._script.remove(reply)
                return reply
        builtin = self._builtins().get((seen.method, seen.path)) or self.web.find(seen)
        try:
            return builtin(seen) if builtin else Reply(status=404, json={"detail": "Not Found"})
        except Refused as refused:
            return Reply(status=refused.status, json=refused.json)

    def _builtins(self) -> dict[tuple[str, str], Callable[[Seen], Reply]]:
        return {
            ("GET", f"{CHATGPT}/wham/accounts/check"): self._accounts_check,
            ("GET", f"{CHATGPT}/wham/usage"): self._usage,
            ("GET", f"{CODEX}/models"): self._models,
            ("GET", f"{CODEX}/responses"): lambda seen: Reply(status=426, body=b""),
            ("POST", f"{CODEX}/alpha/search"): _search,
            ("POST", f"{CODEX}/images/edits"): _picture,
            ("POST", f"{CODEX}/images/generations"): _picture,
            ("POST", f"{CODEX}/memories/trace_summarize"): _memories,
            ("POST", f"{CODEX}/responses/compact"): self._compact,
            ("GET", "/codex/device"): self._device_page,
            ("GET", "/oauth/authorize"): self._authorize_page,
            ("POST", "/codex/device"): self._enter_device_code,
            ("POST", "/oauth/authorize"): self._redirect,
            ("POST", "/oauth/revoke"): self._revoke,
            ("POST", "/oauth/token"): lambda seen: Reply(json=self._token),
            ("POST", f"{CODEX}/responses"): self.default,
            ("POST", f"{DEVICE}/token"): self._device_token,
            ("POST", f"{DEVICE}/usercode"): self._user_code,
        }

    def _check_token(self, seen: Seen) -> None:
        bearer = seen.headers.get("authorization", "").removeprefix("Bearer ")
        claims = token_claims(bearer)
        if not claims:
            raise Refused(401, {"detail": "Unauthorized"})
        seen.account = claims["https://api.openai.com/auth"]["chatgpt_account_id"]
        if claims["exp"] <= time.time():
            raise Refused(401, token_refused())
        if seen.account in self.revoked:
            told = "Your authentication token has been invalidated. Please try signing in again."
            raise Refused(401, {**error_json(told, code="token_invalidated"), "status": 401})
        if seen.headers.get("chatgpt-account-id") != seen.account:
            raise Refused(401, {"detail": "Unauthorized"})

    # Signing in: strict where the real issuer is (codex-upstream.md 1 and 13)

    def sign_in(self, authorize_url: str) -> str:
        """Press the button of the page at this link without a browser: where it redirects to."""
        query = urllib.parse.urlsplit(authorize_url).query
        seen = Seen("POST", "/oauth/authorize", _one_of_each(query), {}, b"", None, 0, 0.0)
        return self._redirect(seen).headers["location"]

    def enter(self, user_code: str, state: str = "approved") -> None:
        """Enter a device code without a browser."""
        assert self.devices[user_code] == "pending"
        self.devices[user_code] = state

    def _authorize_page(self, seen: Seen) -> Reply:
        _check_authorize(seen.query)
        return _page(f"<h1>Sign in as {self.person[2]}</h1><button>Continue</button>", seen)

    def _redirect(self, seen: Seen) -> Reply:
        _check_authorize(seen.query)
        code = _new_id("ac_code")
        self.codes[code] = {
            "challenge": seen.query["code_challenge"],
            "redirect_uri": seen.query["redirect_uri"],
            "person": self.person,
        }
        answer = urllib.parse.urlencode(
            {"code": code, "scope": seen.query["scope"], "state": seen.query["state"]}
        )
        location = f"{seen.query['redirect_uri']}?{answer}"
        return Reply(status=302, body=b"", headers={"location": location})

    def _token(self, seen: Seen) -> Json:
        form = seen.body if isinstance(seen.body, dict) else {}
        if form.get("grant_type") == "refresh_token":
            return self.rotate(seen)
        if not seen.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            raise Refused(415, {"error": "invalid_request", "error_description": "not a form"})
        wanted = {"grant_type", "code", "redirect_uri", "client_id", "code_verifier"}
        if set(form) != wanted or (form["grant_type"], form["client_id"]) != (
            "authorization_code",
            CLIENT_ID,
        ):
            raise Refused(400, {"error": "invalid_request", "error_description": "wrong fields"})
        given = self.codes.get(form["code"])
        if given is None:
            told = "authorization code is unknown, expired or used"
            raise Refused(400, {"error": "invalid_grant", "error_description": told})
        self.codes[form["code"]] = None  # whatever comes of it: a code is single use
        if given["redirect_uri"] != form["redirect_uri"]:
            raise Refused(400, error_json("redirect_uri differs", code="token_exchange_user_error"))
        if given["challenge"] != challenge_of(form["code_verifier"]):
            raise Refused(400, error_json("code_verifier is wrong", code="invalid_grant"))
        return self._new_tokens(given["person"])

    def _new_tokens(self, account: Iterable[str]) -> Json:
        return {
            "access_token": make_token(*account),
            "id_token": make_token(*account),
            "refresh_token": _refresh_token(*account),
            "token_type": "Bearer",
            "expires_in": TOKEN_LIFE_S,
        }

    def _user_code(self, seen: Seen) -> Reply:
        if seen.body != {"client_id": CLIENT_ID}:
            raise Refused(400, {"error": "invalid_request"})
        code = f"ABCD-{next(_serial):05d}"
        self.devices[code] = "pending"
        return Reply(
            json={"device_auth_id": f"dev_{code}", "user_code": code, **self.device_answer}
        )

    def _device_page(self, seen: Seen) -> Reply:
        return _page('<label>Code <input name="code"></label><button>Continue</button>', seen)

    def _enter_device_code(self, seen: Seen) -> Reply:
        code = seen.body["code"].strip().upper()
        if self.devices.get(code) != "pending":
            return _page("<p>This code is not known.</p>", seen)
        self.devices[code] = "approved"
        return _page("<p>Device connected</p>", seen)

    def _device_token(self, seen: Seen) -> Reply:
        code = seen.body.get("user_code")
        known = {"device_auth_id": f"dev_{code}", "user_code": code}
        state = self.devices.get(code, "unknown")
        if seen.body != known or state in ("unknown", "used"):
            raise Refused(400, {"error": "invalid_request"})
        if state != "approved":
            refused = {"denied": "access_denied", "expired": "expired_token"}
            code = refused.get(state, "deviceauth_authorization_unknown")
            raise Refused(403, error_json("Device authorization is unknown.", code=code))
        self.devices[code] = "used"
        verifier, grant = _new_id("device_verifier_" + "v" * 40), _new_id("ac_device")
        self.codes[grant] = {
            "challenge": challenge_of(verifier),
            "redirect_uri": f"{self.issuer}/deviceauth/callback",
            "person": self.person,
        }
        return Reply(
            json={
                "authorization_code": grant,
                "code_challenge": challenge_of(verifier),
                "code_verifier": verifier,
            }
        )

    def _revoke(self, seen: Seen) -> Reply:
        form = seen.body if isinstance(seen.body, dict) else {}
        given = str(form.get("token"))
        known = {"token": given, "token_type_hint": "refresh_token", "client_id": CLIENT_ID}
        if form != known or not given.startswith("rt_"):
            raise Refused(400, {"error": "invalid_request"})
        self.revoke(jsonlib.loads(base64.urlsafe_b64decode(given[3:] + "=="))[0])
        return Reply(json={})

    def rotate(self, seen: Seen) -> Json:
        """The refresh: new tokens for a refresh token that was not used before, or `Refused`."""
        form = seen.body if isinstance(seen.body, dict) else {}
        given = str(form.get("refresh_token", ""))
        if form.get("grant_type") != "refresh_token" or not form.get("client_id"):
            raise Refused(400, {"error": "invalid_request", "error_description": "not a refresh"})
        if not given.startswith("rt_"):
            raise Refused(
                400, {"error": "invalid_grant", "error_description": "unknown refresh token"}
            )
        if given in self._used:
            raise Refused(401, refresh_refused())
        account = jsonlib.loads(base64.urlsafe_b64decode(given[3:] + "=="))[:4]
        if account[0] in self.revoked:
            raise Refused(401, refresh_refused("refresh_token_invalidated"))
        self._used.add(given)
        tokens = self._new_tokens(account)
        self.rotations.append((given, tokens["refresh_token"]))
        return tokens

    def _models(self, seen: Seen) -> Reply:
        asked = seen.query.get("client_version")
        if not asked:
            return Reply(status=400, json={"detail": "client_version is required"})
        if seen.headers.get("if-none-match") == self.etag:
            return Reply(status=304, body=b"", headers={"etag": self.etag})
        listed = [
            model
            for model in self.models
            if _version(model["minimal_client_version"]) <= _version(asked)
        ]
        return Reply(json={"models": listed}, headers={"etag": self.etag})

    def _compact(self, seen: Seen) -> Reply:
        """Compaction v1: the user's messages stay, the rest becomes one item."""
        body = seen.body if isinstance(seen.body, dict) else {}
        if not isinstance(body.get("input"), list) or "stream" in body or "store" in body:
            return Reply(status=400, json={"detail": "Unsupported parameter: stream"})
        if body.get("model") not in [model["slug"] for model in self.models]:
            return Reply(status=404, json=error_json("No such model", code="model_not_found"))
        kept = [item for item in body["input"] if item.get("role") == "user"]
        output = [*kept, compaction(str(seen.account)).item]
        made = {"id": _new_id("resp"), "object": "response.compaction", "created_at": 1_795_380_000}
        return Reply(json={**made, "output": output, "usage": usage()})

    def _usage(self, seen: Seen) -> Reply:
        now, account = int(time.time()), str(seen.account)
        primary, secondary = (
            {
                "used_percent": used,
                "limit_window_seconds": length,
                "reset_after_seconds": after,
                "reset_at": now + after,
            }
            for length, (used, after) in zip(
                (18_000, 604_800), self.quotas.get(account, [(10, 900), (20, 90_000)]), strict=True
            )
        )
        return Reply(
            json={
                "plan_type": _plan(seen),
                "account_id": seen.account,
                "rate_limit": {
                    "allowed": True,
                    "limit_reached": False,
                    "primary_window": primary,
                    "secondary_window": secondary,
                },
                "code_review_rate_limit": None,
                "additional_rate_limits": None,
                "credits": {"has_credits": False, "unlimited": False, "balance": "0"},
                "promo": None,
            }
        )

    def _accounts_check(self, seen: Seen) -> Reply:
        entry = {
            "id": seen.account,
            "name": None,
            "structure": "personal",
            "workspace_backend_origin": "https://chatgpt.com",
            "account_routing_override": "NO_CONSTRAINT",
        }
        listed = {
            "accounts": [entry],
            "account_ordering": [seen.account],
            "default_account_id": seen.account,
        }
        return Reply(json=listed)


def challenge_of(verifier: str) -> str:
    """PKCE S256."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


_REDIRECT = re.compile(r"http://(?:localhost|127\.0\.0\.1):(?:1455|1457)/auth/callback")


def _check_authorize(query: dict[str, str]) -> None:
    """Raises `Refused` where the issuer would show an error page instead of a sign-in."""
    checks = {
        "client_id": lambda value: value == CLIENT_ID,
        "code_challenge": re.compile(r"[\w-]{43}").fullmatch,
        "code_challenge_method": lambda value: value == "S256",
        "codex_cli_simplified_flow": lambda value: value == "true",
        "id_token_add_organizations": lambda value: value == "true",
        "originator": str.isprintable,
        "redirect_uri": _REDIRECT.fullmatch,
        "response_type": lambda value: value == "code",
        "scope": lambda value: {"openid", "offline_access"} <= set(value.split()),
        "state": re.compile(r"[\w-]{43,}").fullmatch,
    }
    wrong = [name for name, is_good in checks.items() if not is_good(query.get(name, ""))]
    if wrong or set(query) - set(checks):
        raise Refused(400, {"error": "invalid_request", "error_description": f"bad {wrong}"})


def _one_of_each(query: str) -> dict[str, str]:
    """The parameters; a repeated one is refused, as a strict server does."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    assert len(pairs) == len(dict(pairs)), query
    return dict(pairs)


def _page(inner: str, seen: Seen) -> Reply:
    """A page of the issuer whose one form comes back to the same address."""
    again = html.escape(f"{seen.path}?{urllib.parse.urlencode(seen.query)}")
    form = f'<form method="post" action="{again}">{inner}</form>'
    page = f"<!doctype html><title>Issuer</title>{form}"
    return Reply(body=page.encode(), headers={"content-type": "text/html; charset=utf-8"})


def default_reply(seen: Seen) -> Reply:
    """What a turn gets that nothing was scripted for."""
    items = seen.body["input"] if isinstance(seen.body, dict) else []
    if items and items[-1].get("type") == "compaction_trigger":
        return Reply(answer(compaction(str(seen.account))))
    return Reply(text("You said: ", seen.user_text))


def _search(seen: Seen) -> Reply:
    missing = {"id", "model"} - set(seen.body if isinstance(seen.body, dict) else ())
    if missing:
        return Reply(status=422, json={"detail": f"Field required: {sorted(missing)[0]}"})
    return Reply(json={"output": "Found: nothing", "encrypted_output": "gAAAA-found"})


def _memories(seen: Seen) -> Reply:
    traces = seen.body.get("traces", []) if isinstance(seen.body, dict) else []
    summaries = [{"trace_summary": trace["id"], "memory_summary": "short"} for trace in traces]
    return Reply(json={"output": summaries})


def _picture(seen: Seen) -> Reply:
    """The direct image endpoints: JSON only, edits with data URLs."""
    body = seen.body if isinstance(seen.body, dict) else {}
    is_edit = seen.path.endswith("/edits")
    urls = [image.get("image_url", "") for image in body.get("images", [])]
    if not isinstance(body.get("prompt"), str) or is_edit != bool(urls):
        return Reply(status=400, json=error_json("Missing required parameter: 'prompt'."))
    if not all(url.startswith("data:image/") for url in urls):
        return Reply(status=400, json=error_json("Invalid image.", code="invalid_value"))
    looks = {"background": "opaque", "output_format": "png", "quality": "low", "size": "1024x1024"}
    spent = {"input_tokens": 31, "output_tokens": 439, "total_tokens": 470}
    return Reply(
        json={"created": 1_795_380_000, "data": [{"b64_json": "aGk="}], **looks, "usage": spent},
        headers={"x-codex-imagegen-request-id": _new_id("img")},
    )


def _is_for(reply: Reply, seen: Seen) -> bool:
    if not seen.path.endswith(reply.path) or reply.account not in (None, seen.account):
        return False
    return reply.when is None or reply.when(seen)


class _Connection(asyncio.Protocol):
    """One client connection: requests in order, one answer each."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        upstream.connections += 1
        self.number = upstream.connections
        self.answering: Seen | None = None
        self._buffer = bytearray()
        self._arrived = asyncio.Event()
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._bytes_left: int | None = None

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.upstream.spawn(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._arrived.set()

    def eof_received(self) -> bool:
        self.connection_lost(None)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost.is_set():
            return
        self._lost.set()
        self._arrived.set()
        self._writable.set()
        if self.answering:
            self.answering.closed_at = time.monotonic()
            self.upstream.note()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # Requests

    async def serve(self) -> None:
        with contextlib.suppress(Gone):
            while True:
                seen = await self._read_request()
                await self._answer(seen)
        self.transport.close()

    async def _read_request(self) -> Seen:
        head = (await self._take_until(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.split("\r\n")
        method, target, _ = line.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if headers.get("expect") == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = await self._take_body(headers)
        path, _, query = target.partition("?")
        return Seen(
            method,
            urllib.parse.unquote(path),
            dict(urllib.parse.parse_qsl(query)),
            headers,
            raw,
            _parse_body(raw, headers),
            self.number,
            time.monotonic(),
        )

    async def _take_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._take(int(headers.get("content-length", "0")))
        body = bytearray()
        while size := int(await self._take_until(b"\r\n"), 16):
            body += await self._take(size)
            await self._take(2)
        await self._take_until(b"\r\n")
        return bytes(body)

    async def _take_until(self, mark: bytes) -> bytes:
        searched = 0
        while (end := self._buffer.find(mark, searched)) < 0:
            searched = max(0, len(self._buffer) - len(mark))
            await self._more()
        taken = bytes(self._buffer[:end])
        del self._buffer[: end + len(mark)]
        return taken

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def _more(self) -> None:
        self._arrived.clear()
        if self._lost.is_set():
            raise Gone
        await self._arrived.wait()

    # Answers

    async def _answer(self, seen: Seen) -> None:
        self.answering = seen
        reply = self.upstream.reply_to(seen)
        self.upstream.requests.append(seen)
        self.upstream.note()
        await self._sleep(reply.delay)
        self._bytes_left = reply.reset_after
        status, payload = reply.status, reply.json
        if callable(payload):
            try:
                payload = payload(seen)
            except Refused as refused:
                status, payload = refused.status, refused.json
        seen.status = status
        if reply.before or reply.raw is not None:
            await self._write(reply.before + (reply.raw or b""))
        if reply.raw is not None:
            pass
        elif payload is not None or reply.body is not None or status != 200:
            await self._send_whole(seen, reply, status, payload)
        else:
            await self._send_stream(seen, reply)
        seen.finished_at = time.monotonic()
        self.answering = None
        self.upstream.note()
        if reply.end == "reset":
            self.abort()
        if reply.framing == "close" or reply.end != "keep":
            raise Gone

    async def _send_whole(self, seen: Seen, reply: Reply, status: int, payload: Any) -> None:
        body = reply.body if reply.body is not None else jsonlib.dumps(payload).encode()
        kind = {"content-type": "application/json"} if reply.body is None else {}
        headers = {
            **_quota_headers(self.upstream, seen),
            **kind,
            **reply.headers,
            "content-length": str(len(body)),
        }
        await self._write(_head(status, headers) + (b"" if status == 304 else body))

    async def _send_stream(self, seen: Seen, reply: Reply) -> None:
        chunked = reply.framing == "chunked"
        framing = {"transfer-encoding": "chunked"} if chunked else {"connection": "close"}
        kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._write(
            _head(200, {**_quota_headers(self.upstream, seen), **kind, **reply.headers, **framing})
        )
        numbers = itertools.count()
        fill = _filler(seen)
        for number, event in _interleave(reply, seen):
            if number is not None:
                await self._keep_to_script(reply, number, event)
            await self._send_event(event, reply, fill, numbers)
        await self._keep_to_script(reply, len(reply.events), b"")
        if reply.done:
            await self._send_body(f"data: [DONE]{reply.newline * 2}".encode(), reply)
        if chunked:
            await self._write(b"0\r\n\r\n")

    async def _keep_to_script(self, reply: Reply, number: int, event: Event) -> None:
        """Delays, stalls and cuts that stand before the event of that number."""
        if isinstance(reply.delays, dict):
            await self._sleep(reply.delays.get(number, 0.0))
        elif isinstance(event, dict) and event["type"].endswith(".delta"):
            await self._sleep(reply.delays)
        if number == (len(reply.events) if reply.after is None else reply.after):
            if reply.stall:
                await self._until(self.upstream._released)
            if reply.cut:
                self.answering = None
                raise Gone

    async def _send_event(
        self, event: Event, reply: Reply, fill: Callable[[Json], Json], numbers: Any
    ) -> None:
        if isinstance(event, dict):
            event = fill(event)
            if (
                event["type"].startswith(("response.", "error"))
                and event["type"] != "response.metadata"
            ):
                event.setdefault("sequence_number", next(numbers))
            if reply.obfuscation and event["type"].endswith(".delta"):
                event["obfuscation"] = "x" * (3 + 5 * event.get("sequence_number", 0) % 11)
            event = _encode(event, reply.newline)
        await self._send_body(event, reply)

    async def _send_body(self, data: bytes, reply: Reply) -> None:
        size = reply.pieces or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            await self._write(
                b"%x\r\n%b\r\n" % (len(piece), piece) if reply.framing == "chunked" else piece
            )
            if reply.pieces:
                await asyncio.sleep(0)

    async def _write(self, data: bytes) -> None:
        if self._lost.is_set() or self.transport.is_closing():
            raise Gone
        if self._bytes_left is not None:
            data = data[: self._bytes_left]
            self._bytes_left -= len(data)
        self.transport.write(data)
        await self._writable.wait()
        if self._bytes_left == 0:
            self.answering = None
            self.abort()
            raise Gone

    async def _sleep(self, seconds: float) -> None:
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), seconds)
            if self._lost.is_set():
                raise Gone

    async def _until(self, event: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._lost.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._lost.is_set():
            raise Gone

    def abort(self) -> None:
        """Close with a reset instead of an orderly end."""
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self.transport.abort()


def _parse_body(raw: bytes, headers: dict[str, str]) -> Any:
    data = _decoded(raw, headers.get("content-encoding", "identity").lower())
    if not data:
        return None
    if headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return dict(urllib.parse.parse_qsl(data.decode()))
    try:
        return jsonlib.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def _decoded(raw: bytes, coding: str) -> bytes | None:
    """The body without its content coding; None where this Python cannot decode it."""
    if coding == "gzip":
        return gzip.decompress(raw)
    if coding == "deflate":
        return zlib.decompress(raw)
    if coding == "zstd":
        try:
            from compression import zstd  # Python 3.14
        except ImportError:
            try:
                import zstandard as zstd
            except ImportError:
                return None
            return zstd.ZstdDecompressor().decompressobj().decompress(raw)
        return zstd.decompress(raw)
    return raw


def _interleave(reply: Reply, seen: Seen) -> Iterator[tuple[int | None, Event]]:
    """The scripted events with their numbers, and vendor events (None) around them."""
    if reply.vendor:
        yield None, {**_RATE_LIMITS, "plan_type": _plan(seen)}
    for number, event in enumerate(reply.events):
        kind = event["type"] if isinstance(event, dict) else ""
        if reply.vendor and kind == "response.completed":
            yield None, {"type": "keepalive", "sequence_number": number}
        yield number, event
        if reply.vendor and kind == "response.created":
            yield (
                None,
                {
                    "type": "response.metadata",
                    "headers": {"x-codex-turn-state": seen.turn_state},
                    "metadata": {},
                },
            )
            yield None, {"type": "codex.brand_new", "response": None, "delta": "not text"}


_RATE_LIMITS = {
    "type": "codex.rate_limits",
    "rate_limits": {
        "allowed": True,
        "limit_reached": False,
        "primary": {
            "used_percent": 10,
            "window_minutes": 300,
            "reset_after_seconds": 900,
            "reset_at": 2_000_000_000,
        },
        "secondary": None,
    },
    "code_review_rate_limits": None,
    "additional_rate_limits": None,
    "credits": {"has_credits": False, "unlimited": False, "balance": None},
    "promo": None,
}


def _filler(seen: Seen) -> Callable[[Json], Json]:
    """A function that completes the response object of lifecycle events from the request."""
    body = seen.body if isinstance(seen.body, dict) else {}
    whole = {
        "id": f"resp_{next(_serial):024x}",
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": body.get("model"),
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "prompt_cache_retention": None,
        "reasoning": {"effort": "medium", "summary": None, **body.get("reasoning", {})},
        "safety_identifier": None,
        "service_tier": "auto",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "low", **body.get("text", {})},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
        "metadata": {},
    }

    def fill(event: Json) -> Json:
        given = event.get("response")
        return {**event, "response": {**whole, **given}} if isinstance(given, dict) else {**event}

    return fill


def _encode(event: Json, newline: str) -> bytes:
    data = jsonlib.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}{newline}data: {data}{newline}{newline}".encode(
        "utf-8", "surrogatepass"
    )


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} Scripted",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _plan(seen: Seen) -> str:
    claims = token_claims(seen.headers.get("authorization", "").removeprefix("Bearer "))
    auth: Json = claims.get("https://api.openai.com/auth", {})
    return str(auth.get("chatgpt_plan_type", "plus"))


def _quota_headers(upstream: FakeUpstream, seen: Seen) -> dict[str, str]:
    """What the backend adds to every answer. No client may ever see the cookie."""
    return {
        "x-request-id": _new_id("req"),
        "cf-ray": "8f00-FRA",
        "set-cookie": "__cf_bm=secret-cookie; path=/; HttpOnly",
        "openai-model": "gpt-5.5",
        "x-models-etag": upstream.etag,
        "x-codex-turn-state": seen.turn_state,
        "x-codex-plan-type": _plan(seen),
        "x-codex-active-limit": "codex",
        "x-codex-primary-used-percent": "10.5",
        "x-codex-primary-window-minutes": "300",
        "x-codex-primary-reset-after-seconds": "900",
        "x-codex-primary-reset-at": str(int(time.time()) + 900),
        "x-codex-secondary-used-percent": "",
        "x-codex-credits-has-credits": "False",
        "x-codex-credits-unlimited": "False",
        "x-codex-credits-balance": "",
    }


# -- By itself ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted Codex backend on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--account", metavar="FILE", help="write an account that it knows, to import"
    )
    parser.add_argument(
        "--deltas", type=int, default=0, help="answer every turn with this many deltas"
    )
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each delta")
    options = parser.parse_args()
    if options.account:
        with open(options.account, "w", encoding="utf-8") as file:
            jsonlib.dump(account_file(), file, indent=1)
    upstream = FakeUpstream(options.port)
    if options.deltas:
        deltas = [f"word{number} " for number in range(options.deltas)]
        upstream.default = lambda seen: Reply(text(*deltas), delays=options.delay)
    with upstream, contextlib.suppress(KeyboardInterrupt):
        print(upstream.url, flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
