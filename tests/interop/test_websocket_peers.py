"""npm `ws`, `wscat` and PyPI `websockets` as clients of a listening port that speaks the envelope."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import WebSocketConnection

import agent
from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.listen import Body, Response, Route, serve
from agent.core.metrics import Metrics

pytestmark = pytest.mark.interop

LIMIT_S = 60

# Each client does the same and prints one JSON line: the answers it got, the close code, how a wrong token ended.
WS_CLIENT = """
const WebSocket = require('ws')
const [url] = process.argv.slice(2)
const open = (token, on) => {
  const ws = new WebSocket(url, {headers: {Authorization: 'Bearer ' + token}})
  for (const [event, handler] of Object.entries(on)) ws.on(event, handler)
  return ws
}
const got = [], say = (ws, message) => ws.send(typeof message === 'string' ? message : JSON.stringify(message))
const ws = open('sesame', {
  open: () => {
    say(ws, {action: 'echo', req_id: 'a', payload: {text: 'é'.repeat(200000)}})
    say(ws, {action: '', req_id: 1.5})
    say(ws, {action: 'nonsense', req_id: 2})
    say(ws, '[]')
    ws.send(Buffer.from('{}'))
    ws.ping()
    say(ws, {action: 'echo', req_id: 3, posted: true})
    say(ws, {action: 'echo', req_id: 4, payload: {last: true}})
  },
  message: data => {
    const message = JSON.parse(data)
    if (message.action === 'echo' && message.payload.text) message.payload.text = message.payload.text.length
    const answer = {action: 'asked', rsp_id: message.req_id, result: 'success', payload: {by: 'ws'}}
    if (message.action === 'asked') say(ws, answer)
    else got.push(message)
    if (message.rsp_id === 4) ws.send('x'.repeat(1048577))
  },
  pong: () => got.push('pong'),
  close: code => {
    const refused = open('wrong', {
      error: () => {},
      'unexpected-response': (_, response) => {
        console.log(JSON.stringify({got, code, refused: response.statusCode}))
        process.exit(0)
      }
    })
  }
})
"""

WEBSOCKETS_CLIENT = """
import asyncio, json, sys
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

async def main(url):
    got = []
    async with connect(url, additional_headers={"Authorization": "Bearer sesame"}) as ws:
        async def say(message):
            await ws.send(message if isinstance(message, str) else json.dumps(message, ensure_ascii=False))
        await say({"action": "echo", "req_id": "a", "payload": {"text": "é" * 200000}})
        await say({"action": "", "req_id": 1.5})
        await say({"action": "nonsense", "req_id": 2})
        await say("[]")
        await ws.send(b"{}")
        await (await ws.ping())
        got.append("pong")
        await say({"action": "echo", "req_id": 3, "posted": True})
        await say({"action": "echo", "req_id": 4, "payload": {"last": True}})
        try:
            async for data in ws:
                message = json.loads(data)
                if message.get("action") == "echo" and "text" in message["payload"]:
                    message["payload"]["text"] = len(message["payload"]["text"])
                if message.get("action") == "asked":
                    answer = {"action": "asked", "rsp_id": message["req_id"], "result": "success"}
                    await say(answer | {"payload": {"by": "websockets"}})
                else:
                    got.append(message)
                if message.get("rsp_id") == 4:
                    await ws.send("x" * 1048577)
        except ConnectionClosed:
            pass
        code = ws.close_code
    try:
        async with connect(url, additional_headers={"Authorization": "Bearer wrong"}):
            refused = None
    except InvalidStatus as err:
        refused = err.response.status_code
    print(json.dumps({"got": got, "code": code, "refused": refused}))

asyncio.run(main(sys.argv[1]))
"""


class Port:
    """A port that echoes, and asks each client one thing itself; run by `client` in another process."""

    def __init__(self) -> None:
        self.answered: list[Mapping[str, Any]] = []

    async def answer(self, request: Request) -> Mapping[str, Any]:
        if request.action != "echo":
            raise ActionError("unknown_action", f"nothing here answers {request.action!r}")
        return request.payload

    async def talk(self, channel: Channel) -> None:
        self.answered.append(await channel.ask("asked", {}))
        await trio.sleep_forever()

    async def hold(self, head: Head, ws: WebSocketConnection) -> None:
        await converse(ws, self.answer, self.talk, metrics=Metrics())

    async def page(self, head: Head, body: Body) -> Response:
        return Response(200, (("Content-Type", "text/plain"),), b"up\n")

    async def run(self, client: Callable[[str], list[str | Path]], **more: Any) -> str:
        """What the client wrote on its standard output."""
        guard = Guard([("sesame", "control")], {}, False, [], trio.current_time)
        route = Route("/", self.page, self.hold, scope="control")
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                (address,) = await nursery.start(partial(serve, ["127.0.0.1:0"], [route], guard, metrics=Metrics()))
                done = await trio.run_process(
                    client(address), capture_stdout=True, capture_stderr=True, check=False, **more
                )
                nursery.cancel_scope.cancel()
        assert done.returncode == 0, done.stderr.decode()
        return str(done.stdout.decode())


EXPECTED = {
    '"a"': {"action": "echo", "rsp_id": "a", "result": "success", "payload": {"text": 200_000}},
    "1.5": {
        "action": "identify",
        "rsp_id": 1.5,
        "result": "success",
        "payload": {"tool": "emissary", "version": agent.__version__},
    },
    "2": {"result": "error", "rsp_id": 2, "reason": "unknown_action: nothing here answers 'nonsense'"},
    "4": {"action": "echo", "rsp_id": 4, "result": "success", "payload": {"last": True}},
}


def check(printed: str, port: Port, name: str) -> None:
    said = json.loads(printed)
    messages = [message for message in said["got"] if message != "pong"]
    answers = {json.dumps(m["rsp_id"]): m for m in messages if m["rsp_id"] is not None}
    assert answers == EXPECTED
    assert [m["reason"] for m in messages if m["rsp_id"] is None] == [
        "bad_json: not a JSON object: Expected `object`, got `array`",
        "bad_json: a binary frame; messages are JSON in text frames",
    ]
    assert "pong" in said["got"]
    assert said["code"] == 1009
    assert said["refused"] == 401
    assert port.answered == [{"by": name}]


async def test_ws_of_npm(node: Path, npm_project: Callable[..., Path], tmp_path: Path) -> None:
    project, port = npm_project("ws@8.23.0"), Port()
    script = tmp_path / "client.cjs"
    script.write_text(WS_CLIENT)
    printed = await port.run(
        lambda address: [node, script, f"ws://{address}/"], env={"NODE_PATH": str(project / "node_modules")}
    )
    check(printed, port, "ws")


async def test_websockets_of_pypi(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python, port = python_peer("websockets==17.4"), Port()
    script = tmp_path / "client.py"
    script.write_text(WEBSOCKETS_CLIENT)
    check(await port.run(lambda address: [python, script, f"ws://{address}/"]), port, "websockets")


async def test_wscat_of_npm(node: Path, npm_project: Callable[..., Path]) -> None:
    project, port = npm_project("wscat@6.1.0"), Port()
    (cat,) = (project / "node_modules/wscat/bin").glob("wscat")
    said = '{"action":"echo","req_id":7,"payload":{"a":1}}'
    options = ["-H", "Authorization: Bearer sesame", "-x", said, "-w", "3"]
    stdin, held_open = os.pipe()  # it ends with its standard input
    try:
        printed = await port.run(lambda address: [node, cat, "-c", f"ws://{address}/", *options], stdin=stdin)
    finally:
        os.close(stdin)
        os.close(held_open)
    assert '{"action":"echo","rsp_id":7,"result":"success","payload":{"a":1}}' in printed


async def test_curl(peer_command: Callable[[str], Path]) -> None:
    curl = peer_command("curl")
    headers = ["-H", "Authorization: Bearer sesame"]
    printed = await Port().run(
        lambda address: [curl, "-sS", "--max-time", "10", *headers, f"http://{address}/", f"http://{address}/"]
    )
    assert printed == "up\nup\n"
    printed = await Port().run(
        lambda address: [curl, "-sS", "-o", "-", "-w", "%{http_code}", "-d", "x", *headers, f"http://{address}/"]
    )
    assert printed == "POST does not work here\n405"
