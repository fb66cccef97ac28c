"""A line that is cut without FIN, or stalls: both ends notice in time, others never, and the link comes back."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import PeerUnreachable
from agent.core.events import Alert, AlertCleared, LinkChanged
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial, keep
from agent.core.listen import Route, serve
from agent.core.metrics import Metrics

DEADLINE_S = 20.0


@pytest.fixture
def clock() -> MockClock:
    """Jumps when nothing has happened for 20 ms: what is on its way through the loopback is no silence."""
    return MockClock(autojump_threshold=0.02)


class Line:
    """A proxy between a link and its server that can lose all bytes, or stop taking them."""

    def __init__(self) -> None:
        self.is_cut = False
        self.flows = trio.Event()
        self.flows.set()
        self._target = 0

    async def run(self, target: int, *, task_status: trio.TaskStatus[int]) -> None:
        self._target = target
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, self._relay, 0, host="127.0.0.1"))
            task_status.started(listener.socket.getsockname()[1])

    async def _relay(self, near: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", self._target) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, near, far)
            nursery.start_soon(self._pass, far, near)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        lost = False
        while True:
            await self.flows.wait()
            try:
                data = await source.receive_some()
            except trio.BrokenResourceError:
                data = b""
            lost = lost or self.is_cut  # a lost packet does not come back when the line does
            if lost and not data:
                return  # nor does the other end hear of the close
            if not data:
                await sink.send_eof()
                return
            if not lost:
                await sink.send_all(data)


class Lab:
    """The server's end: what it answered, and how its conversations ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, str]] = []
        self.lost = trio.Event()

    async def answer(self, request: Request) -> Mapping[str, Any]:
        return request.payload

    async def hold(self, head: Head, ws: WebSocketConnection) -> None:
        try:
            await converse(ws, self.answer, self.flood if "flood" in head.query else idle, metrics=Metrics())
        except PeerUnreachable as err:
            self.ended.append((trio.current_time(), err.what))
            self.lost.set()
            raise

    async def flood(self, channel: Channel) -> None:
        while True:
            await channel.post("event", {"text": "x" * 100_000})


async def idle(channel: Channel) -> None:
    await trio.sleep_forever()


class Agent:
    """The link's end."""

    def __init__(self) -> None:
        self.told: list[tuple[float, LinkChanged]] = []
        self.slowest_s = 0.0
        self.ready = trio.Event()

    def publish(self, event: LinkChanged | Alert | AlertCleared) -> None:
        if isinstance(event, LinkChanged):
            self.told.append((trio.current_time(), event))
            if event.state == "offline" and self.ready.is_set():
                self.ready = trio.Event()

    async def talk(self, channel: Channel) -> None:
        await channel.ask("register", {})
        channel.state("ready")
        self.ready.set()
        while True:
            began = trio.current_time()
            await channel.ask("update", {"text": "x" * 50_000}, timeout_s=1000)
            self.slowest_s = max(self.slowest_s, trio.current_time() - began)
            await trio.sleep(1)

    async def answer(self, request: Request) -> Mapping[str, Any]:
        return {}


@asynccontextmanager
async def connected(query: str = "") -> AsyncIterator[tuple[Line, Lab, Agent, int]]:
    """A lab, a line and an agent whose link is ready; and the lab's own port."""
    line, lab, agent = Line(), Lab(), Agent()
    async with trio.open_nursery() as nursery:
        guard = Guard([], {}, False, [], trio.current_time)
        route = Route("/lab", websocket=lab.hold, scope="open")
        (address,) = await nursery.start(partial(serve, ["127.0.0.1:0"], [route], guard, metrics=Metrics()))
        port = int(address.rpartition(":")[2])
        through = await nursery.start(line.run, port)
        nursery.start_soon(partial(link, agent, f"ws://127.0.0.1:{through}/lab{query}"))
        await agent.ready.wait()
        yield line, lab, agent, port
        nursery.cancel_scope.cancel()


async def link(agent: Agent, url: str) -> None:
    await keep("lab", Dial(url), agent.answer, agent.talk, publish=agent.publish, metrics=Metrics(), random=Random(1))


async def test_both_ends_notice_a_cut_line_in_20_s_and_the_link_comes_back(clock: MockClock, soak_s: float) -> None:
    until = time.monotonic() + soak_s
    async with connected() as (line, lab, agent, _):
        while True:
            await trio.sleep(100.3)
            assert agent.ready.is_set()
            line.is_cut, cut_at = True, trio.current_time()
            await trio.sleep(DEADLINE_S + 0.5)
            noticed, offline = agent.told[-2] if agent.told[-1][1].state == "connecting" else agent.told[-1]
            assert offline.error is not None
            assert offline.error.endswith("sent nothing for 20 s")
            assert noticed - cut_at <= DEADLINE_S + 0.1
            assert lab.ended[-1][1].endswith("sent nothing for 20 s")
            assert lab.ended[-1][0] - cut_at <= DEADLINE_S + 0.1
            line.is_cut = False
            with trio.fail_after(60):
                await agent.ready.wait()
            if time.monotonic() >= until:
                return


async def test_a_stalled_reader_is_given_up_and_others_are_not_held_up(clock: MockClock) -> None:
    async with connected("?flood=1") as (line, lab, _, port), trio.open_nursery() as nursery:
        other = Agent()
        nursery.start_soon(partial(link, other, f"ws://127.0.0.1:{port}/lab"))
        await other.ready.wait()
        line.flows, stalled_at = trio.Event(), trio.current_time()
        await lab.lost.wait()
        assert lab.ended[0][0] - stalled_at <= DEADLINE_S + 2
        assert other.slowest_s < 0.5
        assert other.ready.is_set()
        nursery.cancel_scope.cancel()
