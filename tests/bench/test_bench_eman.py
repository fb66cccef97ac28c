"""The hub beside Socket.IO's own on Node: requests through it, fan-out, idle services."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.interop.conftest import find_command, install_npm

pytestmark = pytest.mark.bench
Figure = Callable[[str, str, str], None]

PIN, CLIENT = "socket.io@4.8.4", "socket.io-client@4.8.4"
HUB = """
import sys, trio
from functools import partial
from agent.core.metrics import Metrics
from agent.eman.hub import any_key, serve_hub
from agent.eman.settings import HubSettings
async def main():
    async with trio.open_nursery() as nursery:
        settings = HubSettings(auth="any", max_connections=2000)
        start = partial(serve_hub, "127.0.0.1:0", settings, any_key, metrics=Metrics())
        print(await nursery.start(start), flush=True)
trio.run(main)
"""
# The seed's flow in the way a Node service would write it: subscriptions in a map, requests to who subscribed.
NODE_HUB = """
const server = require('http').createServer()
const io = new (require('socket.io').Server)(server)
const listeners = new Map(), online = new Map()
io.of('/communication').on('connection', socket => {
  let id
  socket.on('shake_i_am', ({name}) => {
    id = name + '.' + Date.now() + '.' + Math.random()
    socket.emit('shake_id', {id})
  })
  socket.on('shake_ready', () => { online.set(id, socket); socket.emit('shake_online') })
  socket.on('_service:api:request:subscribe', ({name}) => {
    if (!listeners.has(name)) listeners.set(name, new Set())
    listeners.get(name).add(socket)
  })
  socket.on('api:request', request => {
    request.sender_id = id
    for (const listener of listeners.get(request.name) ?? []) listener.emit(request.name, request)
  })
  socket.on('api:response', answer => online.get(answer.sender_id)?.emit('api:response', answer))
  socket.emit('shake_who')
})
server.listen(0, '127.0.0.1', () => console.log('127.0.0.1:' + server.address().port))
"""
# The same clients for both: `paced` asks at 500/s and times each, `flood` keeps 100 under way for a while.
CLIENTS = """
const {io} = require('socket.io-client')
const [url, mode, count] = process.argv.slice(2)
const now = () => Number(process.hrtime.bigint()) / 1e6
function service(name) {
  return new Promise(done => {
    const socket = io(url + '/communication', {forceNew: true, transports: ['websocket']})
    let id
    socket.on('shake_who', () => socket.emit('shake_i_am', {name, key: 'x'}))
    socket.on('shake_id', given => { id = given.id; socket.emit('shake_ready', {id}) })
    socket.on('shake_online', () => done({socket, id}))
  })
}
// Each asks each other in turn, 500 times a second in all.
async function many(services, count) {
  const all = [], asked = new Map(), times = []
  for (let n = 0; n < services; n++) {
    const {socket, id} = await service('m' + n)
    socket.emit('_service:api:request:subscribe', {name: 'post' + n})
    socket.on('post' + n, r => socket.emit('api:response', {...r, recipient_id: id}))
    socket.on('api:response', a => { times.push(now() - asked.get(a.request_id)); asked.delete(a.request_id) })
    all.push({socket, id})
  }
  await new Promise(done => setTimeout(done, 500))
  const began = now()
  let next = 0
  const timer = setInterval(() => {
    for (; next < count && next < (now() - began) / 2; next++) {
      const {socket, id} = all[next % services], name = 'post' + (next * 7 + 1) % services
      asked.set(String(next), now())
      socket.emit('api:request', {name, request_id: String(next), sender_id: id, data: {text: 'x'.repeat(100)}})
    }
    if (next < count || (asked.size && now() - began < 2 * count + 10000)) return
    clearInterval(timer)
    times.sort((a, b) => a - b)
    const at = q => times[Math.floor(q * (times.length - 1))]
    console.log(JSON.stringify({p50: at(0.5), p99: at(0.99), lost: asked.size}))
    process.exit(0)
  }, 1)
}
async function main() {
  if (mode === 'idle') {
    for (let n = 0; n < count; n++) await service('s' + n)
    console.log(JSON.stringify({online: count}))
    return
  }
  if (mode === 'many') return many(300, Number(count))
  const listeners = mode === 'fan' ? Number(count) : 1
  let heard = 0, allHeard
  for (let n = 0; n < listeners; n++) {
    const {socket, id} = await service('worker' + n)
    socket.emit('_service:api:request:subscribe', {name: 'post'})
    socket.on('post', r => {
      if (mode === 'fan') { if (++heard === listeners) allHeard() } else {
        socket.emit('api:response', {...r, recipient_id: id})
      }
    })
  }
  const {socket, id} = await service('asker')
  await new Promise(done => setTimeout(done, 500))
  const data = {text: 'x'.repeat(100)}
  const ask = n => socket.emit('api:request', {name: 'post', request_id: String(n), sender_id: id, data})
  if (mode === 'fan') {
    const times = []
    for (let round = 0; round < 10; round++) {
      heard = 0
      const began = now(), all = new Promise(done => { allHeard = done })
      socket.emit('api:request', {name: 'post', request_id: 'f' + round, sender_id: id, data: {}, timeout_ms: 0})
      await all
      times.push(now() - began)
    }
    console.log(JSON.stringify({ms: times.sort((a, b) => a - b)[5]}))
    process.exit(0)
  }
  const asked = new Map(), times = []
  let next = 0, answered = 0
  const began = now()
  socket.on('api:response', answer => {
    times.push(now() - asked.get(answer.request_id)); asked.delete(answer.request_id); answered++
    if (mode === 'flood' && next < count) { asked.set(String(next), now()); ask(next++) }
    if (answered === Number(count)) {
      times.sort((a, b) => a - b)
      const at = q => times[Math.floor(q * (times.length - 1))]
      console.log(JSON.stringify({p50: at(0.5), p99: at(0.99), rate: 1000 * count / (now() - began)}))
      process.exit(0)
    }
  })
  if (mode === 'flood') while (next < 100) { asked.set(String(next), now()); ask(next++) }
  else {
    const timer = setInterval(() => {
      while (next < count && next < (now() - began) / 2) { asked.set(String(next), now()); ask(next++) }
      if (next >= count) clearInterval(timer)
    }, 1)
  }
}
main()
"""


@asynccontextmanager
async def running(*argv: str, env: dict[str, str]) -> AsyncIterator[tuple[str, int]]:
    """A hub's address, and its pid."""
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, argv, stdout=subprocess.PIPE, check=False, env=env)
        process = await nursery.start(start)
        yield (await process.stdout.receive_some()).decode().strip(), process.pid
        process.kill()


async def resident_mib(pid: int) -> float:
    return int((await trio.Path(f"/proc/{pid}/statm").read_text()).split()[1]) * 4096 / 2**20


async def test_the_hub_beside_the_one_of_node(figure: Figure, tmp_path: Path, peer: Callable[..., Path]) -> None:
    node, modules = str(peer(find_command, "node")), peer(install_npm, PIN, CLIENT) / "node_modules"
    env = {**os.environ, "NODE_PATH": str(modules)}
    for name, text in (("hub.js", NODE_HUB), ("clients.js", CLIENTS), ("hub.py", HUB)):
        (tmp_path / name).write_text(text)

    async def clients(address: str, mode: str, count: int) -> dict[str, float]:
        argv = [node, str(tmp_path / "clients.js"), f"http://{address}", mode, str(count)]
        done = await trio.run_process(argv, capture_stdout=True, env=env)
        return dict(json.loads(done.stdout))

    ours, theirs = (sys.executable, str(tmp_path / "hub.py")), (node, str(tmp_path / "hub.js"))
    async with running(*ours, env=env) as (mine, pid), running(*theirs, env=env) as (other, _):
        paced = await clients(mine, "paced", 2500)
        figure("Eman hub, 500 requests/s, p50 / p99", f"{paced['p50']:.1f} / {paced['p99']:.1f} ms", "< 10 ms p99")
        rates = [((await clients(mine, "flood", 10_000))["rate"], (await clients(other, "flood", 10_000))["rate"])]
        rates.append(((await clients(mine, "flood", 10_000))["rate"], (await clients(other, "flood", 10_000))["rate"]))
        best = max(mine for mine, _ in rates), max(other for _, other in rates)
        what = f"the same, 100 under way, ours {best[0]:.0f}/s, Node's {best[1]:.0f}/s"
        figure(what, f"{best[0] / best[1]:.2f}x", ">= 0.5x")
        fan = await clients(mine, "fan", 1000)
        figure("the same, one event to 1,000 listeners", f"{fan['ms']:.0f} ms", "< 50 ms")
        many = [(await clients(mine, "many", 5000), await resident_mib(pid)) for _ in range(2)]
        (first, before), (second, after) = many
        what = "Eman hub, 300 services, 500 requests/s for 10 s, p50 / p99 / lost"
        quiet = min(first, second, key=lambda run: run["p99"])
        figure(what, f"{quiet['p50']:.1f} / {quiet['p99']:.1f} ms / {first['lost'] + second['lost']:.0f}", "none lost")
        figure("the same, RSS after the first and after the second time", f"{before:.0f}, {after:.0f} MiB", "flat")
    async with running(*ours, env=env) as (mine, pid), trio.open_nursery() as nursery:
        argv = [node, str(tmp_path / "clients.js"), f"http://{mine}", "idle", "1000"]
        crowd = await nursery.start(partial(trio.run_process, argv, stdout=subprocess.PIPE, check=False, env=env))
        await crowd.stdout.receive_some()
        figure("the same, 1,000 idle services, RSS", f"{await resident_mib(pid):.0f} MiB", "< 60 MiB")
        crowd.kill()
