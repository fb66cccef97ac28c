"""The CI Bus on real brokers, with stomp.py as the other client (protocols/emissary.md, acceptance 11)."""

import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import httpx
import pytest
import trio

from agent.core.bus import Bus
from agent.core.events import ImportFinished, LinkChanged
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.polarize import role
from agent.polarize.settings import CibusSettings, PolarizeSettings
from tests.ended_run import finished, started

pytestmark = pytest.mark.interop

START_S = 60.0  # a JVM on a busy machine
STOMP_PY = "stomp-py==9.0.0"
XML = b'<testsuites>\n<testsuite name="login" tests="1"><testcase name="a"/></testsuite></testsuites>'

# What a stock instance has, with STOMP instead of OpenWire, on a free port.
ACTIVEMQ_XML = """<beans xmlns="http://www.springframework.org/schema/beans"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xsi:schemaLocation="http://www.springframework.org/schema/beans
 http://www.springframework.org/schema/beans/spring-beans-2.0.xsd
 http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
<broker xmlns="http://activemq.apache.org/schema/core" useJmx="false" brokerName="localhost" dataDirectory="{0}/data">
<persistenceAdapter><kahaDB directory="{0}/data/kahadb"/></persistenceAdapter>
<transportConnectors><transportConnector name="stomp" uri="stomp://127.0.0.1:0"/></transportConnectors>
</broker></beans>
"""

# Sends what it reads: lines of JSON, [destination, headers, body].
SENDER = """
import json, sys, stomp
connection = stomp.Connection12([("127.0.0.1", int(sys.argv[1]))], vhost=sys.argv[2])
connection.connect(wait=True)
for number, line in enumerate(sys.stdin):
    destination, headers, body = json.loads(line)
    connection.send(destination, body, headers=headers)
connection.disconnect(receipt="all")
"""

# Prints the first message of a topic as JSON: [headers, body]; says on standard error when it is subscribed.
LISTENER = """
import json, sys, threading, stomp
came = threading.Event()
class Listener(stomp.ConnectionListener):
    def on_receipt(self, frame):
        print("subscribed", file=sys.stderr, flush=True)
    def on_message(self, frame):
        print(json.dumps([frame.headers, frame.body]), flush=True)
        came.set()
connection = stomp.Connection12([("127.0.0.1", int(sys.argv[1]))], vhost=sys.argv[2])
connection.set_listener("", Listener())
connection.connect(wait=True)
connection.subscribe(sys.argv[3], id="1", ack="auto", headers={"receipt": "up"})
assert came.wait(30)
connection.disconnect()
"""


@asynccontextmanager
async def broker(argv: Sequence[str | Path], folder: Path, listening: str) -> AsyncIterator[int]:
    """A broker process, ended with the context; its port, as `listening` finds it in what it says."""
    process = await trio.lowlevel.open_process(
        list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
    )
    assert process.stdout
    said = b""
    try:
        with trio.fail_after(START_S):
            while not (found := re.search(listening.encode(), said)):
                chunk = await process.stdout.receive_some()
                assert chunk, f"the broker ended: {said.decode()[-2000:]}"
                said += chunk
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, process.stdout)
            yield int(found[1])
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            with trio.move_on_after(10):
                await process.wait()
            process.kill()
            await process.wait()
            await process.stdout.aclose()


async def drain(stream: trio.abc.ReceiveStream) -> None:
    while await stream.receive_some():
        pass


@pytest.fixture
async def activemq(peer_command: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[int]:
    peer_command("activemq")
    folder = tmp_path / "activemq"
    folder.mkdir()
    (folder / "activemq.xml").write_text(ACTIVEMQ_XML.format(folder))
    jars = "/usr/share/java"  # where Debian's package has them; slf4j-simple first, or it says nothing
    argv: list[str | Path] = [
        *(peer_command("java"), "-Xms32m", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        *("-cp", f"{jars}/slf4j-simple.jar:{jars}/*", f"-Dactivemq.base={folder}", f"-Dactivemq.home={folder}"),
        *("org.apache.activemq.console.Main", "start", f"xbean:file:{folder}/activemq.xml"),
    ]
    async with broker(argv, folder, r"Listening for connections at: stomp://\S+:(\d+)") as port:
        yield port


class Agent:
    """An agent whose Polarize takes everything and leaves the telling to the bus."""

    def __init__(self, folder: Path, cibus: CibusSettings) -> None:
        self.folder, self.cibus = folder, cibus
        self.submitted: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        found = re.search(rb'polarion-response-emissary" value="([^"]+)"', request.content)
        assert found
        self.submitted.append(found[1].decode())
        return httpx.Response(200, json={"status": "PENDING"})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[Bus, Store]]:
        """The role, connected to the bus."""
        store = open_store(self.folder / "state", reserve=4096)
        bus = Bus(store)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            with bus.subscribe(LinkChanged) as links:
                await nursery.start(
                    lambda task_status: role.run(
                        bus,
                        store,
                        PolarizeSettings(url="http://polarize.lab", project="RHEL9"),
                        self.cibus,
                        "lab-07",
                        Health("polarize"),
                        random=Random(1),
                        metrics=Metrics(),
                        transport=httpx.MockTransport(self.answer),
                        task_status=task_status,
                    )
                )
                with trio.fail_after(30):
                    while (await anext(links)).state != "ready":
                        pass
            yield bus, store
            nursery.cancel_scope.cancel()
        store.close()

    def finish_a_run(self, bus: Bus, run: str) -> None:
        path = self.folder / f"{run}.xml"
        path.write_bytes(XML)
        bus.publish(started(run))
        bus.publish(finished(run, path))

    async def wait_until_only_the_bus_can_tell(self, store: Store, run: str) -> str:
        """The response value by which it will."""
        with trio.fail_after(30):
            while (await store.get(f"polarize.{run}", dict[str, object]) or {}).get("phase") != "listening":
                await trio.lowlevel.checkpoint()
        return self.submitted[-1]


def completion(destination: str, response: str | None, status: str) -> tuple[str, dict[str, str], str]:
    headers = {"emissary": response} if response else {"other": "1"}
    body = {"testrun-url": "http://t", "import-results": [], "status": status, "log-url": "http://l"}
    return destination, headers, json.dumps(body)


async def send(python: Path, port: int, vhost: str, messages: Sequence[tuple[str, dict[str, str], str]]) -> None:
    lines = "".join(f"{json.dumps(message)}\n" for message in messages)
    with trio.fail_after(60):
        await trio.run_process([str(python), "-c", SENDER, str(port), vhost], stdin=lines.encode())


def among_foreign(destination: str, ours: str, count: int) -> list[tuple[str, dict[str, str], str]]:
    """Our completion in the middle of others': of other agents, of names that only begin alike, of none."""
    others = ["lab-08.abcdefghijkl", "lab-070.abcdefghijkl", "lab-07", "xlab-07.abcdefghijkl", None]
    messages = [completion(destination, others[n % len(others)], "failed") for n in range(count)]
    messages.insert(count // 2, completion(destination, ours, "partial"))
    return messages


PARTIAL = ImportFinished(run="r-1", mode="polarize-http", outcome="partial", testrun_url="http://t", log_url="http://l")
TOPIC = "/topic/VirtualTopic.qe.ci.polarion"


@pytest.mark.parametrize("destination", ["", "/queue/Consumer.emissary.VirtualTopic.qe.ci.>"], ids=["topic", "queue"])
async def test_activemq_a_completion_is_found_among_500_foreign_messages(
    activemq: int, python_peer: Callable[..., Path], tmp_path: Path, destination: str
) -> None:
    python = python_peer(STOMP_PY)
    agent = Agent(tmp_path, CibusSettings(url=f"stomp://127.0.0.1:{activemq}", destination=destination))
    async with agent.running() as (bus, store):
        with bus.subscribe(ImportFinished) as events:
            agent.finish_a_run(bus, "r-1")
            ours = await agent.wait_until_only_the_bus_can_tell(store, "r-1")
            await send(python, activemq, "localhost", among_foreign(TOPIC, ours, 500))
            with trio.fail_after(30):
                assert await anext(events) == PARTIAL


async def test_activemq_what_is_published_while_the_agent_is_offline_is_found_after_it_is_back(
    activemq: int, python_peer: Callable[..., Path], tmp_path: Path
) -> None:
    python = python_peer(STOMP_PY)
    agent = Agent(tmp_path, CibusSettings(url=f"stomp://127.0.0.1:{activemq}"))
    async with agent.running() as (bus, store):
        agent.finish_a_run(bus, "r-1")
        ours = await agent.wait_until_only_the_bus_can_tell(store, "r-1")
    await send(python, activemq, "localhost", among_foreign(TOPIC, ours, 20))
    async with agent.running() as (bus, store):
        with trio.fail_after(30):
            while not (found := await store.read(run="r-1", kinds=("ImportFinished",))):
                await trio.lowlevel.checkpoint()
    assert json.loads(bytes(found[0].data))["outcome"] == "partial"
    assert len(agent.submitted) == 1


async def test_activemq_an_ended_run_is_published(
    activemq: int, python_peer: Callable[..., Path], tmp_path: Path
) -> None:
    argv = [str(python_peer(STOMP_PY)), "-c", LISTENER, str(activemq), "localhost", "/topic/VirtualTopic.qe.ci.jenkins"]
    agent = Agent(tmp_path, CibusSettings(url=f"stomp://127.0.0.1:{activemq}", publish=True))
    with (tmp_path / "message").open("wb") as out:
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, argv, stdout=out, stderr=subprocess.PIPE)
            listener: trio.Process = await nursery.start(run)
            assert listener.stderr
            async with agent.running() as (bus, store):
                with trio.fail_after(60):
                    assert (await listener.stderr.receive_some()).startswith(b"subscribed")
                    agent.finish_a_run(bus, "r-1")
                    await listener.wait()
                    while (await store.depths())["cibus"].waiting:
                        await trio.lowlevel.checkpoint()
    headers, body = json.loads((tmp_path / "message").read_text())
    assert (headers["run"], headers["ident"]) == ("r-1", "lab-07")
    assert json.loads(body) == {"import-results": [{"suite-name": "login", "status": "passed"}], "status": "passed"}


async def test_coilmq_without_selectors_is_filtered_here(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    coilmq = python_peer("coilmq==1.1.0").with_name("coilmq")
    vhost = socket.getfqdn()  # it refuses STOMP 1.2 for another host
    python = python_peer(STOMP_PY)
    async with broker([coilmq, "--port", "0"], tmp_path, r"listening on 127.0.0.1:(\d+)") as port:
        agent = Agent(tmp_path, CibusSettings(url=f"stomp://127.0.0.1:{port}", vhost=vhost, destination=TOPIC))
        async with agent.running() as (bus, store):
            with bus.subscribe(ImportFinished) as events:
                agent.finish_a_run(bus, "r-1")
                ours = await agent.wait_until_only_the_bus_can_tell(store, "r-1")
                await send(python, port, vhost, among_foreign(TOPIC, ours, 100))
                with trio.fail_after(30):
                    assert await anext(events) == PARTIAL
