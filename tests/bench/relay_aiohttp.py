"""What most gateways do: an aiohttp relay that translates every event with json. A yardstick.

Run as `python relay_aiohttp.py UPSTREAM_URL`; prints its port on one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

SESSION = web.AppKey("session", ClientSession)
UPSTREAM = web.AppKey("upstream", str)


async def deltas(app: web.Application, chat: dict[str, Any]) -> AsyncIterator[str]:
    body = {"model": chat["model"], "input": chat["messages"], "stream": True, "store": False}
    async with app[SESSION].post(app[UPSTREAM], json=body) as answer:
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if event["type"] == "response.output_text.delta":
                yield event["delta"]


async def post_chat(request: web.Request) -> web.StreamResponse:
    chat = await request.json()
    if not chat.get("stream"):
        text = "".join([delta async for delta in deltas(request.app, chat)])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"object": "chat.completion", "choices": [choice]})
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    with contextlib.suppress(ConnectionResetError):  # the client left
        async for delta in deltas(request.app, chat):
            choice = {"index": 0, "delta": {"content": delta}, "finish_reason": None}
            chunk = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "choices": [choice]}
            await reply.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
    return reply


async def serve() -> None:
    app = web.Application(client_max_size=1 << 30)
    app[UPSTREAM] = sys.argv[1]
    app.router.add_post("/v1/chat/completions", post_chat)
    # The longest line of the upstream is an event with the whole text.
    async with ClientSession(connector=TCPConnector(limit=0), read_bufsize=1 << 20) as session:
        app[SESSION] = session
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
