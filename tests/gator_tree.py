"""A Gator tree on a table: layers without a command line, children and parents played by the test."""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel, converse
from agent.core.envelope import MAX_MESSAGE, Request
from agent.core.errors import ActionError
from agent.core.guard import Guard
from agent.core.head import Scope
from agent.core.link import Dial, connect
from agent.core.listen import Route, serve
from agent.core.metrics import Metrics
from agent.gator import spec as specs
from agent.gator.layer import Options, Place, Shared
from agent.gator.messages import MAX_MESSAGE_IN, Result, Severity
from agent.gator.pool import Pool
from agent.gator.schedulers import Order
from agent.gator.settings import GatorSettings
from agent.gator.spec import Group
from agent.gator.summary import Summary
from agent.gator.tier import Tier

WITHIN_S = 120.0  # for what comes in no time; a slow machine may need more than a fast one


async def until(holds: Callable[[], bool], *, within_s: float = WITHIN_S) -> None:
    """Wait until that is so; fails when it does not come."""
    with trio.fail_after(within_s):
        while True:
            if holds():
                return
            await trio.sleep(0.01)


def shared_of(
    *,
    options: Options | None = None,
    settings: GatorSettings | None = None,
    pool: Pool | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Shared:
    return Shared(
        options=options or Options(interval_s=5.0),
        settings=settings or GatorSettings(),
        pool=pool or Pool(4, 1 << 40, {}),
        env=dict(os.environ),
        metrics=Metrics(),
        clock=time.time,
        tell=tell,
        host="lab-07",
    )


class Above:
    """The layer above, which remembers what it is told."""

    def __init__(self, path: tuple[str, ...] = ("root",), uidx: int = 2) -> None:
        self.place = Place(path, uidx)
        self.address = ""
        self.registered = trio.Event()
        self.updates: list[tuple[Summary, Result]] = []
        self.end: tuple[Summary, Result, int] | None = None
        self.messages: list[tuple[Severity, str]] = []
        self.before_end: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def register(self, server: str) -> Place:
        self.address = server
        self.registered.set()
        return self.place

    def update(self, summary: Summary, result: Result) -> None:
        self.updates.append((summary, result))

    async def complete(self, summary: Summary, result: Result, code: int) -> None:
        await self.before_end()
        self.end = (summary, result, code)

    def log(self, severity: Severity, message: str, at: float) -> None:
        self.messages.append((severity, message))


class Hands:
    """A scheduler that starts nothing: the test plays the children. Who is killed is dead once `may_die` is set."""

    name = "local"

    def __init__(self) -> None:
        self.may_die = trio.Event()
        self.may_die.set()
        self.orders: dict[str, Order] = {}
        self.ended: dict[str, trio.Event] = {}
        self.killed: list[str] = []
        self._changed = trio.Event()

    async def run(self, order: Order, waits: Callable[[], None], over: trio.Event) -> str:
        self.orders[order.ident] = order
        self.ended[order.ident] = trio.Event()
        self._changed.set()
        self._changed = trio.Event()
        try:
            await self.ended[order.ident].wait()
        except trio.Cancelled:
            self.killed.append(order.ident)
            with trio.CancelScope(shield=True), trio.fail_after(WITHIN_S):
                await self.may_die.wait()
            raise
        return "with code 7"

    async def started(self, ident: str) -> Order:
        with trio.fail_after(WITHIN_S):
            while ident not in self.orders:
                await self._changed.wait()
        return self.orders[ident]


@asynccontextmanager
async def tier_of(
    text: str, folder: Path, *, shared: Shared | None = None, above: Above | None = None, ends: bool = True
) -> AsyncIterator[tuple[Tier, Hands, Above]]:
    """A tier whose children are the test's; it must have ended when the block does, unless `ends` is False."""
    root = specs.load(text).root
    assert isinstance(root, Group)
    above, hands = above or Above(path=()), Hands()
    tier = Tier(root, folder, above, shared or shared_of(), hands, forward=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        with trio.fail_after(WITHIN_S):
            await above.registered.wait()
        yield tier, hands, above
        if ends:
            await until(lambda: above.end is not None)
        nursery.cancel_scope.cancel()


Answers = Mapping[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]


@asynccontextmanager
async def dialled(
    address: str, answers: Answers | None = None, max_message: int = MAX_MESSAGE
) -> AsyncIterator[Channel]:
    """A connection to a layer's port, as a child or a task has it. `answers` are what it answers to the layer."""

    async def answer(request: Request) -> Mapping[str, Any]:
        handler = (answers or {}).get(request.action)
        if handler is None:
            raise ActionError("", f"Unknown action '{request.action}'")
        return await handler(request.payload)

    opened: list[Channel] = []
    ready = trio.Event()

    async def talk(channel: Channel) -> None:
        opened.append(channel)
        ready.set()
        await trio.sleep_forever()

    dial = Dial(url=f"ws://{address}" if "/" in address else f"ws://{address}/")
    async with connect(dial, max_message=max_message) as ws, trio.open_nursery() as nursery:
        nursery.start_soon(_converse, ws, answer, talk)
        with trio.fail_after(WITHIN_S):
            await ready.wait()
        yield opened[0]
        await opened[0].close()
        nursery.cancel_scope.cancel()


async def _converse(ws: WebSocketConnection, answer: Any, talk: Any) -> None:
    await converse(ws, answer, talk, metrics=Metrics(), deadline_s=60, ping_s=20)  # as every child of ours


class Parent:
    """A tier of another make: answers as told, and remembers every request in order. It may let nobody in."""

    def __init__(self, answers: Mapping[str, Any], *, lets_in: bool = True) -> None:
        self.answers = dict(answers)
        self._scope: Scope = "open" if lets_in else "control"
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.channel: Channel | None = None
        self.address = ""
        self._changed = trio.Event()
        self.server = trio.CancelScope()

    async def heard(self, action: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`-th request of that action; its payload."""
        with trio.fail_after(WITHIN_S):
            while len(found := [payload for name, payload in self.requests if name == action]) < count:
                await self._changed.wait()
        return found[count - 1]

    def actions(self) -> list[str]:
        """What was asked, without repetitions of updates."""
        return [name for at, (name, _) in enumerate(self.requests) if not at or self.requests[at - 1][0] != name]

    async def _answer(self, request: Request) -> Mapping[str, Any]:
        self.requests.append((request.action, request.payload))
        self._changed.set()
        self._changed = trio.Event()
        answer = self.answers.get(request.action, {})
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = await answer(request.payload)
        told: dict[str, Any] = answer
        return told

    async def _opened(self, head: Any, ws: WebSocketConnection) -> None:
        self.connections += 1

        async def talk(channel: Channel) -> None:
            self.channel = channel
            await trio.sleep_forever()

        await converse(ws, self._answer, talk, metrics=Metrics(), deadline_s=60)

    async def run(self, *, listen: str = "127.0.0.1:0", task_status: trio.TaskStatus[str]) -> None:
        routes = [Route("/*", websocket=self._opened, scope=self._scope)]
        guard = Guard((), {}, False, (), trio.current_time)
        with self.server:
            async with trio.open_nursery() as nursery:
                metrics = Metrics()

                async def start(*, task_status: trio.TaskStatus[list[str]]) -> None:
                    await serve(
                        [listen], routes, guard, metrics=metrics, max_message=MAX_MESSAGE_IN, task_status=task_status
                    )

                (self.address,) = await nursery.start(start)
                task_status.started(self.address)
                await trio.sleep_forever()
