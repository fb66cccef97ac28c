"""Real peers of the bus: Socket.IO 1 to 4 of npm and PyPI, as services of our hub and as hubs of our service."""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.bus import Bus
from agent.core.events import LinkChanged, SlotsChanged
from agent.core.link import Dial
from agent.core.metrics import Metrics
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.eman import role
from agent.eman.settings import EmanSettings
from agent.eman.shake import md5_key
from tests.eman_hub import SALT, hub

pytestmark = pytest.mark.interop

TEXT = 'é漢😀"\\'
CLIENTS = ("socket.io-client@1.7.4", "socket.io-client@2.5.0", "socket.io-client@4.8.4")
TRANSPORTS = ("default", "websocket", "polling")
LIMIT_S = 250  # pytest ends a test after 300 s

# Two services of a seed-shaped lab: `worker` answers messages.post, `asker` asks thrice and prints what it gets.
SERVICES = """
const found = require('socket.io-client')
const io = found.io || found
const [url, transport, text, salt] = process.argv.slice(2)
const crypto = require('crypto')
const options = {forceNew: true, reconnection: false}
if (transport !== 'default') options.transports = [transport]
function service(name, ready, key) {
  const socket = io(url + '/communication', options)
  let id
  key = key || crypto.createHash('md5').update(name + '.' + salt).digest('hex')
  socket.on('shake_who', () => socket.emit('shake_i_am', {name, key}))
  socket.on('shake_id', payload => { id = payload.id; socket.emit('shake_ready', {id}) })
  socket.on('shake_online', () => ready(socket, id))
  socket.on('shake_error', payload => console.log(JSON.stringify({refused: payload.error.code})))
  socket.on('_service:error', payload => console.log(JSON.stringify({complaint: payload})))
  return socket
}
let open = 2
const over = () => { if (!--open) setTimeout(() => process.exit(0), 100) }
service('wrong', () => {}, 'a wrong key').on('disconnect', () => { console.log(JSON.stringify({left: true})); over() })
service('worker', (socket, id) => {
  socket.emit('_service:api:request:subscribe', {name: 'messages.post'})
  socket.on('messages.post', request => {
    if (request.sender_id === id) return asker()  // its own: the hub has read what was sent before, the subscription
    const answer = {name: request.name, request_id: request.request_id, sender_id: request.sender_id, recipient_id: id}
    const error = {message: 'Query failed', code: 'database_query_failed', status: 500, list: [{message: text}]}
    if (request.data.fail) answer.error = error
    else answer.data = {echo: request.data.text}
    socket.emit('api:response', answer)
  })
  socket.emit('api:request', {name: 'messages.post', request_id: '0', sender_id: id})
  const asker = () => service('asker', (socket, id) => {
    const ask = (request_id, name, data) => socket.emit('api:request', {name, request_id, sender_id: id, data})
    socket.on('api:response', answer => {
      console.log(JSON.stringify(answer))
      if (answer.request_id === 'a') ask('b', 'messages.post', {fail: true})
      if (answer.request_id === 'b') ask('c', 'nobody.listens', {})
      if (answer.request_id === 'c') over()
    })
    ask('a', 'messages.post', {text})
  })
})
setTimeout(() => { console.log(JSON.stringify({late: true})); process.exit(3) }, 200000)
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pin", CLIENTS)
async def test_unmodified_clients_complete_the_seeds_flow(
    pin: str, transport: str, npm_project: Callable[..., Path], node: Path, tmp_path: Path
) -> None:
    folder = npm_project(pin)
    script = tmp_path / "services.js"
    script.write_text(SERVICES)
    env = {**os.environ, "NODE_PATH": str(folder / "node_modules")}
    async with hub() as address:
        argv = [str(node), str(script), f"http://{address}", transport, TEXT, SALT]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(argv, capture_stdout=True, check=False, env=env)
    said = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0, said
    assert {"refused": "invalid_key"} in said
    assert {"left": True} in said
    first, second, third = [each for each in said if "request_id" in each]
    assert first["data"] == {"echo": TEXT}
    assert first["recipient_id"].startswith("worker.")
    assert first["sender_id"].startswith("asker.")
    assert (second["error"]["status"], second["error"]["list"]) == (500, [{"message": TEXT}])
    assert (third["error"]["code"], third["error"]["status"], third["recipient_id"]) == ("no_listeners", 404, "eman")


PYTHON_CLIENT = """
import sys, json, threading, hashlib, socketio
url, text, salt = sys.argv[1:]
over = threading.Event()
def service(name, ready):
    io = socketio.Client(reconnection=False)
    ids = {}
    ns = '/communication'
    @io.on('shake_who', namespace=ns)
    def who():
        key = hashlib.md5(f'{name}.{salt}'.encode()).hexdigest()
        io.emit('shake_i_am', {'name': name, 'key': key}, namespace=ns)
    @io.on('shake_id', namespace=ns)
    def shake_id(payload): ids['id'] = payload['id']; io.emit('shake_ready', payload, namespace=ns)
    @io.on('shake_online', namespace=ns)
    def online(): ready(io, ids['id'])
    io.connect(url, namespaces=[ns])
    return io
ns = '/communication'
def worker(io, id):
    @io.on('messages.post', namespace=ns)
    def post(request):
        if request['sender_id'] == id:  # its own: the hub has read what was sent before, the subscription
            return listening.set()
        ids = {k: request[k] for k in ('name', 'request_id', 'sender_id')}
        io.emit('api:response', {**ids, 'recipient_id': id, 'data': request['data']}, namespace=ns)
    io.emit('_service:api:request:subscribe', {'name': 'messages.post'}, namespace=ns)
    io.emit('api:request', {'name': 'messages.post', 'request_id': '0', 'sender_id': id}, namespace=ns)
def asker(io, id):
    @io.on('api:response', namespace=ns)
    def answer(payload): print(json.dumps(payload)); over.set()
    io.emit('api:request', {'name': 'messages.post', 'request_id': '1', 'sender_id': id, 'data': text}, namespace=ns)
listening = threading.Event()
one = service('worker', worker)
listening.wait(120)
two = service('asker', asker)
ok = over.wait(120)
two.disconnect(); one.disconnect()
sys.exit(not ok)
"""


@pytest.mark.parametrize(
    "pins",
    [("python-socketio[client]==4.6.1", "python-engineio==3.14.2"), ("python-socketio[client]==5.18.1",)],
    ids=["4.6.1", "5.18.1"],
)
async def test_services_in_python(pins: tuple[str, ...], python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python = python_peer(*pins)
    script = tmp_path / "services.py"
    script.write_text(PYTHON_CLIENT)
    async with hub() as address:
        argv = [str(python), str(script), f"http://{address}", TEXT, SALT]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(argv, capture_stdout=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["data"] == TEXT


# A seed-shaped hub: the shake, subscriptions, one request to the agent, and what the agent tells.
SEED_HUB = """
const server = require('http').createServer()
const found = require('socket.io')
const io = found.Server ? new found.Server(server) : found(server)
const [text, key] = process.argv.slice(2)
const say = what => console.log(JSON.stringify(what))
let count = 0
io.of('/communication').on('connection', socket => {
  const id = 'agent-lab7.' + (++count)
  socket.on('shake_i_am', given => {
    if (given.key !== key) {
      socket.emit('shake_error', {error: {message: 'Invalid key', code: 'invalid_key', status: 403}})
      return socket.disconnect()
    }
    socket.emit('shake_id', {id})
  })
  socket.on('shake_ready', given => { say({ready: given.id === id}); socket.emit('shake_online') })
  const names = []
  socket.on('_service:api:request:subscribe', ({name}) => {
    names.push(name)
    if (name === 'agent.search_log') {
      say({names})
      socket.emit('agent.status', {name: 'agent.status', request_id: 'r' + count, sender_id: 'me', data: {text}})
      socket.emit('agent-lab7.cancel', {name: 'agent-lab7.cancel', request_id: 'c' + count, sender_id: 'me', data: {}})
    }
  })
  socket.on('api:response', answer => {
    say({answer})
    if (answer.data && count === 1) setTimeout(() => socket.disconnect(true), 300)
  })
  socket.on('api:request', request => say({request}))
  socket.emit('shake_who')
})
server.listen(0, '127.0.0.1', () => say({port: server.address().port}))
"""


@asynccontextmanager
async def seed_hub(folder: Path, node: Path, script: Path, key: str) -> AsyncIterator[tuple[int, "Lines"]]:
    """The port of the hub in Node, and the lines that it prints."""
    env = {**os.environ, "NODE_PATH": str(folder / "node_modules")}
    await trio.Path(script).write_text(SEED_HUB)
    async with trio.open_nursery() as nursery:
        argv = [str(node), str(script), TEXT, key]
        process = await nursery.start(partial(trio.run_process, argv, stdout=subprocess.PIPE, check=False, env=env))
        lines = Lines(process.stdout)
        with trio.fail_after(LIMIT_S):
            yield (await lines.next())["port"], lines
        process.kill()


class Lines:
    """JSON lines of a process."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream, self._text = stream, b""

    async def next(self) -> Any:
        while b"\n" not in self._text:
            data = await self._stream.receive_some()
            assert data, "the process has ended"
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)


@pytest.mark.parametrize(("pin", "eio"), [("socket.io@1.7.4", 3), ("socket.io@2.5.1", 3), ("socket.io@4.8.4", 4)])
async def test_our_service_on_real_servers(
    pin: str, eio: Any, npm_project: Callable[..., Path], node: Path, tmp_path: Path
) -> None:
    key = md5_key("agent-lab7", SALT)
    store = open_store(tmp_path / "state", reserve=4096)
    bus = Bus(store)
    asked: list[dict[str, Any]] = []

    async def status(payload: dict[str, Any]) -> dict[str, Any]:
        asked.append(payload)
        return {"said": TEXT}

    try:
        async with seed_hub(npm_project(pin), node, tmp_path / "hub.js", key) as (port, lines):
            settings = EmanSettings(url=f"http://127.0.0.1:{port}/communication", eio=eio, emit=("SlotsChanged",))
            dial = Dial(url=role.dial_url(settings.url, eio))
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                with bus.answer("status", status), bus.subscribe(LinkChanged) as links:
                    start = partial(role.run, bus, store, settings, key, "agent-lab7", Health("eman"), dial=dial)
                    await nursery.start(partial(start, metrics=Metrics()))
                    bus.publish(SlotsChanged(free=1, total=1, draining=False))
                    said: list[Any] = []

                    def count(what: str) -> int:
                        return sum(what in each or what in each.get("answer", {}) for each in said)

                    while not count("request") or not count("error") or count("ready") < 2:
                        said.append(await lines.next())
                    while (await anext(links)).state != "ready":
                        pass
                nursery.cancel_scope.cancel()
    finally:
        store.close()
    assert [each for each in said if "ready" in each] == [{"ready": True}] * 2  # the link was cut, and it came back
    names = next(each["names"] for each in said if "names" in each)
    assert {"agent-lab7.status", "agent.status", "agent-lab7.run_suite", "agent.search_log"} <= set(names)
    answers = [each["answer"] for each in said if "answer" in each]
    good = next(each for each in answers if "data" in each)
    assert (good["data"], good["recipient_id"]) == ({"said": TEXT}, "agent-lab7.1")
    refused = next(each for each in answers if "error" in each)
    assert (refused["error"]["code"], refused["error"]["status"]) == ("forbidden", 403)
    assert asked[0] == {"text": TEXT}
    request = next(each["request"] for each in said if "request" in each)
    assert (request["name"], request["timeout_ms"]) == ("agent.event.SlotsChanged", 0)
    assert request["data"]["data"] == {"free": 1, "total": 1, "draining": False}
    assert request["request_id"] == f"{store.instance}-{request['data']['seq']}"
