"""Clients written with other libraries: the older services' endpoints by npm `ws`, streams by `websockets`, the numbers
by Prometheus's own parser.
"""

import base64
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.events import EntitlementChanged, FileChanged
from agent.core.supervise import Health
from agent.files.entitlement import SUBSCRIPTION_MANAGER
from agent.files.role import run_entitlement, run_files
from agent.files.settings import EntitlementSettings, FilesSettings
from tests.control_house import House, client, house
from tests.dbus_daemon import OLD, Daemon, service
from tests.test_control_http import get
from tests.test_control_older import Roles

pytestmark = pytest.mark.interop

LIMIT_S = 60

# Says what it is told; a line on its standard input goes out as a frame.
OLDER = """
const WebSocket = require('ws')
const [url, ca] = process.argv.slice(2)
const options = {headers: {Authorization: 'Bearer sesame'}}
if (ca) options.ca = require('fs').readFileSync(ca)
const ws = new WebSocket(url, options)
ws.on('message', data => console.log(String(data)))
ws.on('close', code => { console.log(JSON.stringify({code})); process.exit(0) })
ws.on('open', () => require('readline').createInterface({input: process.stdin}).on('line', line => ws.send(line)))
"""

STREAMING = """
import asyncio, json, sys
from websockets.asyncio.client import connect

async def main(url):
    seen = []
    async with connect(url, additional_headers={"Authorization": "Bearer peek"}) as ws:
        await ws.send(json.dumps({"action": "subscribe", "req_id": 1, "payload": {"kinds": ["Logged"], "since": 0}}))
        async for frame in ws:
            message = json.loads(frame)
            if message["action"] == "events":
                seen += [event["seq"] for event in message["payload"]["events"]]
            if len(seen) == 1000:
                break
        await ws.send(json.dumps({"action": "stop", "req_id": 2}))
        print(json.dumps({"seen": seen, "stop": json.loads(await ws.recv())["reason"]}))

asyncio.run(main(sys.argv[1]))
"""

PARSING = """
import json, sys
from prometheus_client.parser import text_string_to_metric_families
print(json.dumps({
    sample.name: [family.type, sample.value]
    for family in text_string_to_metric_families(sys.stdin.read()) for sample in family.samples
}))
"""


class Older:
    """The client in Node, on one of the older endpoints."""

    def __init__(self, process: trio.Process) -> None:
        self._process, self._said = process, b""

    async def heard(self) -> Any:
        assert self._process.stdout is not None
        with trio.fail_after(LIMIT_S):
            while b"\n" not in self._said:
                self._said += await self._process.stdout.receive_some()
        line, _, self._said = self._said.partition(b"\n")
        return json.loads(line)

    async def say(self, frame: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{frame}\n".encode())


@pytest.fixture
def connect(node: Path, npm_project: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """`await connect(server, path, nursery)`: an Older on that path."""
    script = tmp_path / "client.cjs"
    script.write_text(OLDER)
    env = {"NODE_PATH": str(npm_project("ws@8.23.0") / "node_modules")}

    async def on(server: House, path: str, nursery: trio.Nursery) -> Older:
        ca = [str(server.tls.ca_file)] if server.tls.ca_file else []
        argv = [str(node), str(script), server.url.rstrip("/") + path, *ca]

        async def start(*, task_status: trio.TaskStatus[trio.Process]) -> None:
            pipe = subprocess.PIPE
            await trio.run_process(argv, env=env, stdin=pipe, stdout=pipe, task_status=task_status)

        return Older(await nursery.start(start))

    return on


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_older_endpoints_by_ws_of_npm(connect: Callable[..., Any], tmp_path: Path, tls: bool) -> None:
    on, roles = connect, Roles()
    async with house(tmp_path, tls=tls, handlers=roles.handlers) as server, trio.open_nursery() as nursery:
        root = await on(server, "/", nursery)
        await root.say('{"op":"get-status","from":"me"}')
        assert await root.heard() == {"op": "get-status", "body": "0", "to": "me", "from": "lab-07"}
        await root.say('{"op":"disconnect"}')
        assert await root.heard() == {"code": 1000}

        status = await on(server, "/ws/rhsm/status", nursery)
        assert (await status.heard())["overallStatus"] == "Current"
        roles.status = 5
        server.publish(EntitlementChanged(status=5, name="unregistered", raw="Unknown", source="rhsm1"))
        assert (await status.heard())["overallStatus"] == "Unknown"
        await status.say("x")
        assert (await status.heard())["entitlementStatus"] == 5

        monitor = await on(server, "/ws/monitor//etc/rhsm/rhsm.conf", nursery)
        assert (await monitor.heard())["event"] == "open"
        server.publish(FileChanged(path="/etc/rhsm/rhsm.conf", what="modified"))
        assert (await monitor.heard())["event"] == "change"
        await monitor.say("x")
        assert (await monitor.heard())["event"] == "pong"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_older_endpoints_on_real_files_and_a_real_dbus(
    connect: Callable[..., Any], daemon: Daemon, tmp_path: Path, tls: bool
) -> None:
    etc, pki = tmp_path / "etc", tmp_path / "pki"
    etc.mkdir()
    (pki / "consumer").mkdir(parents=True)
    (etc / "rhsm.conf").write_text("one")
    (tmp_path / "secret").write_text("nobody's")
    async with (
        service(daemon, SUBSCRIPTION_MANAGER, 0) as served,
        house(tmp_path, tls=tls) as server,
        trio.open_nursery() as nursery,
    ):
        bus, store = server.bus, server.store
        settings = FilesSettings(content_allow=(str(etc),))
        await nursery.start(partial(run_files, bus, store, settings, Health("files"), metrics=server.metrics))
        on_bus = EntitlementSettings(bus=daemon.address)
        await nursery.start(partial(run_entitlement, bus, store, on_bus, Health("entitlement"), pki=pki))

        status = await connect(server, "/ws/rhsm/status", nursery)
        first = await status.heard()
        if first["overallStatus"] != "Current":  # it came before the service's first answer did
            first = await status.heard()
        assert (first["entitlementStatus"], first["overallStatus"]) == (0, "Current")
        served.status = 1
        await served.signal(OLD, "entitlement_status_changed", "i", (1,))
        assert (await status.heard())["overallStatus"] == "Invalid"
        root = await connect(server, "/", nursery)
        await root.say('{"op":"get-status","from":"me"}')
        assert (await root.heard())["body"] == "1"

        monitor = await connect(server, f"/ws/monitor/{etc}/rhsm.conf", nursery)
        assert _shown(await monitor.heard()) == ("open", f"{etc}/rhsm.conf", b"one")
        (etc / "new").write_text("two")
        (etc / "new").rename(etc / "rhsm.conf")  # as editors do
        assert _shown(await monitor.heard()) == ("change", f"{etc}/rhsm.conf", b"two")
        (etc / "rhsm.conf").write_bytes(b"x" * 2**20)  # more than fits a message
        assert _shown(await monitor.heard()) == ("change", f"{etc}/rhsm.conf", b"")
        (etc / "rhsm.conf").unlink()
        assert _shown(await monitor.heard()) == ("change", f"{etc}/rhsm.conf", b"")
        await monitor.say("x")
        assert (await monitor.heard())["event"] == "pong"

        elsewhere = await connect(server, f"/ws/monitor/{tmp_path}/secret", nursery)
        assert _shown(await elsewhere.heard()) == ("open", f"{tmp_path}/secret", b"")
        nowhere = await connect(server, "/ws/monitor/" + "x" * 5000, nursery)
        assert await nowhere.heard() == {"code": 1008}
        nursery.cancel_scope.cancel()


def _shown(frame: dict[str, Any]) -> tuple[str, str, bytes]:
    return frame["event"], frame["file"], base64.b64decode(frame["content"])


async def test_a_stream_by_websockets_of_pypi(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python, script = python_peer("websockets==17.4"), tmp_path / "client.py"
    script.write_text(STREAMING)
    async with house(tmp_path) as server, client(server.dial()) as ours:
        for n in range(500):
            await ours.post("log", {"message": f"first {n}"})
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                for n in range(500):
                    await ours.post("log", {"message": f"then {n}"})

            nursery.start_soon(go_on)
            with trio.fail_after(LIMIT_S):
                done = await trio.run_process([str(python), str(script), server.url], capture_stdout=True)
    told = json.loads(done.stdout)
    assert told["seen"] == list(range(2, 1002))
    assert told["stop"] == "forbidden: stop takes a token with the scope control; yours has read"


async def test_the_numbers_by_the_parser_of_prometheus(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python = python_peer("prometheus-client==0.26.0")
    async with house(tmp_path) as server:
        server.metrics.count("odd_total", cause='a "b"\\ \n')
        await get(server, "/metrics", None)  # is refused, and counted
        text = (await get(server, "/metrics")).content
    with trio.fail_after(LIMIT_S):
        done = await trio.run_process([str(python), "-c", PARSING], stdin=text, capture_stdout=True)
    parsed = json.loads(done.stdout)
    assert parsed["emissary_http_refused_total"] == ["counter", 1.0]
    assert parsed["emissary_odd_total"] == ["counter", 1.0]
    assert parsed["emissary_role_up"] == ["gauge", 1.0]
