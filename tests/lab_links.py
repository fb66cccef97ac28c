"""The lab's Seneschal and Mimir on loopback, an agent's side of both, and a stand-in for the suites role.

For tests of agent/seneschal, agent/mimir and agent/lab: real websockets, a real bus and store. The clock may be a mock
one; `epoch` is the date that both sides believe in.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio
from trio.testing import MockClock
from trio_websocket import WebSocketConnection

from agent.core import listen
from agent.core.bus import Bus
from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.events import (
    KINDS,
    AgentStarted,
    Alert,
    AlertCleared,
    AnyEvent,
    Counts,
    LinkChanged,
    RunReceived,
    RunRefused,
    RunStarted,
    SlotsChanged,
    SuiteFinished,
    TestFinished,
    TestStarted,
    decode,
)
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial, connect
from agent.core.listen import Route
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.lab.mimir import Mimir
from agent.lab.seneschal import Seneschal
from agent.mimir import role as mimir_role
from agent.seneschal import role as seneschal_role
from agent.seneschal.settings import SeneschalSettings

PATIENCE_S = 120.0  # mock seconds that a test waits for what must come: a link may wait 30 s and fail again
START = time.time()
DEFAULTS = SeneschalSettings()


def epoch() -> float:
    """The date, by trio's clock: it jumps where a test's clock does."""
    return START + trio.current_time()


def jump(clock: MockClock) -> None:
    """Let time jump when all sockets and the disk have been quiet for a moment."""
    clock.autojump_threshold = 0.01


async def until(holds: Callable[[], bool]) -> float:
    """Let time jump until it holds, while nobody is connected; how long that was. Raises trio.TooSlowError."""
    began = trio.current_time()
    with trio.fail_after(100_000):
        while True:
            if holds():
                return trio.current_time() - began
            await trio.sleep(1)


class Lab:
    """A lab in a folder; `up` may be entered again and again, each time on another port where none is given."""

    def __init__(self, data: Path, *, lease_s: float = 600.0, port: int = 0) -> None:
        self._data, self._lease_s, self._port = data, lease_s, port
        self._address = f"127.0.0.1:{port}"
        self.metrics = Metrics()
        self.websockets: list[WebSocketConnection] = []

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Lab"]:
        """The servers run; leaving kills them, connections and all."""
        self.mimir = Mimir(self._data, metrics=self.metrics, clock=epoch)
        self.seneschal = Seneschal(self._data, self.mimir, metrics=self.metrics, lease_s=self._lease_s, clock=epoch)
        guard = Guard([], {}, True, (), trio.current_time)
        routes = [Route("/seneschal", websocket=self._seneschal), Route("/mimir", websocket=self.mimir.serve)]
        async with trio.open_nursery() as nursery:
            await nursery.start(self.mimir.run)
            await nursery.start(self.seneschal.run)
            serve = partial(listen.serve, [f"127.0.0.1:{self._port}"], routes, guard, metrics=self.metrics)
            (self._address,) = await nursery.start(serve)
            yield self
            nursery.cancel_scope.cancel()

    def dial(self, path: str) -> Dial:
        return Dial(url=f"ws://{self._address}/{path}")

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until it is true of the Seneschal's runs; raises trio.TooSlowError."""
        with trio.fail_after(PATIENCE_S):
            while not holds():
                await self.seneschal.changed()

    async def _seneschal(self, head: Head, ws: WebSocketConnection) -> None:
        self.websockets.append(ws)
        await self.seneschal.serve(head, ws)


@asynccontextmanager
async def client(lab: Lab, path: str) -> AsyncIterator[tuple[Channel, list[Request]]]:
    """A channel to the lab that answers every request with {}, and what was asked."""
    asked: list[Request] = []

    async def answer(request: Request) -> dict[str, Any]:
        asked.append(request)
        return {}

    async with connect(lab.dial(path)) as ws, trio.open_nursery() as nursery:
        opened, channels = trio.Event(), []

        async def talk(channel: Channel) -> None:
            channels.append(channel)
            opened.set()
            await trio.sleep_forever()

        nursery.start_soon(partial(converse, ws, answer, talk, metrics=lab.metrics))
        await opened.wait()
        yield channels[0], asked
        nursery.cancel_scope.cancel()


class Suites:
    """Stands in for the suites role: takes every order while a slot is free; the test ends the runs."""

    def __init__(self, bus: Bus, store: Store, slots: int = 1) -> None:
        self.bus, self.store, self.slots, self.draining = bus, store, slots, False
        self.active: dict[str, RunReceived] = {}
        self.orders: list[dict[str, Any]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.decides = True

    async def run_suite(self, payload: dict[str, Any]) -> dict[str, Any]:
        run = payload["run"]
        self.orders.append(payload)
        if await self.store.read(run=run, limit=1):
            return {"run": run}
        received = RunReceived(
            run=run,
            suite=payload["suite"],
            origin=payload.get("origin", "control"),
            reservation=payload.get("reservation"),
            deadline=payload.get("deadline"),
        )
        self.store.keep(run)
        self.bus.publish(received)
        if self.decides:
            self.decide(received)
        await self.store.commit()
        return {"run": run}

    def decide(self, received: RunReceived, attempt: int = 1) -> None:
        if len(self.active) == self.slots:
            self.bus.publish(
                RunRefused(
                    run=received.run,
                    reason="busy: every slot is taken",
                    origin=received.origin,
                    reservation=received.reservation,
                )
            )
            return
        self.active[received.run] = received
        self.bus.publish(
            RunStarted(
                run=received.run,
                suite=received.suite["id"],
                title="A suite",
                runner="tap",
                driver="tap",
                source="dir",
                origin=received.origin,
                slot=0,
                reservation=received.reservation,
                to_mimir=received.suite.get("to_mimir", True),
                attempt=attempt,
            )
        )
        self.tell_slots()

    def test(self, run: str, name: str, *, tells_start: bool = True) -> None:
        """One test begins and ends."""
        suite = self.active[run].suite["id"]
        started = epoch() if tells_start else None
        if started is not None:
            self.bus.publish(TestStarted(run=run, suite=suite, case=name, name=name, file="f", started=started))
        self.bus.publish(
            TestFinished(
                run=run, suite=suite, case=name, name=name, file="f", state="passed", started=started, ended=epoch()
            )
        )

    def finish(self, run: str, *, reason: str | None = None) -> None:
        received = self.active.pop(run)
        aborted = reason is not None
        self.bus.publish(
            SuiteFinished(
                run=run,
                suite=received.suite["id"],
                runner="tap",
                driver="tap",
                verdict="aborted" if aborted else "passed",
                result="ABORTED" if aborted else "SUCCESS",
                code=None if aborted else 0,
                signal="SIGKILL" if aborted else None,
                reason=reason,
                started=epoch(),
                ended=epoch(),
                counts=Counts(total=1, aborted=1) if aborted else Counts(total=1, passed=1),
            )
        )
        self.store.release(run)
        self.tell_slots()

    def tell_slots(self) -> None:
        self.bus.publish(SlotsChanged(free=self.free, total=self.slots, draining=self.draining))

    @property
    def free(self) -> int:
        return 0 if self.draining else self.slots - len(self.active)

    async def runs(self, payload: dict[str, Any]) -> dict[str, Any]:
        running = [
            {"run": r.run, "suite": r.suite["id"], "state": "running", "test": None, "since": 1.0, "origin": r.origin}
            for r in self.active.values()
        ]
        return {"slots": self.slots, "free": self.free, "draining": self.draining, "runs": running, "runners": {}}

    async def cancel(self, payload: dict[str, Any]) -> dict[str, Any]:
        if payload["run"] not in self.active:
            raise ActionError("no_such_run", f"{payload['run']} is not running here")
        self.cancelled.append((payload["run"], payload["reason"]))
        self.finish(payload["run"], reason=f"cancel: {payload['reason']}")
        return {}

    async def stop(self, payload: dict[str, Any]) -> dict[str, Any]:
        for run in list(self.active):
            self.finish(run, reason="stop")
        return {}

    async def recover(self) -> None:
        """After a restart: what was left unfinished was interrupted."""
        for run in await self.store.kept():
            rows = await self.store.read(run=run, kinds=["RunReceived", "RunStarted", "SuiteFinished"])
            kinds = [row.kind for row in rows]
            received = decode(rows[0].kind, rows[0].data)
            assert isinstance(received, RunReceived)
            if "SuiteFinished" in kinds:
                continue
            if "RunStarted" in kinds:
                self.active[run] = received
                self.finish(run, reason="interrupted")
            else:
                self.decide(received)


class HasDial(Protocol):
    """Where a lab listens, by path."""

    def dial(self, path: str) -> Dial: ...


class Agent:
    """An agent with the roles named; leaving `up` kills it, what is on disk stays."""

    def __init__(
        self,
        folder: Path,
        lab: "HasDial",
        *,
        ident: str = "lab-07",
        slots: int = 1,
        roles: tuple[str, ...] = ("mimir", "seneschal"),
        settings: SeneschalSettings = DEFAULTS,
    ) -> None:
        self._folder, self._ident, self._slots, self._roles = folder, ident, slots, roles
        self._dial = lab.dial
        self._settings = settings
        self.link: dict[str, str] = {}
        self.alerts: dict[str, Alert] = {}
        self.events: list[AnyEvent] = []
        self._heard = trio.Event()

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Agent"]:
        self.store = open_store(self._folder, reserve=4096)
        self.bus = Bus(self.store, clock=epoch)
        self.suites = Suites(self.bus, self.store, self._slots)
        self.metrics = Metrics()
        try:
            async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
                await nursery.start(self.store.run)
                inner.start_soon(self._watch)
                await trio.testing.wait_all_tasks_blocked()
                for name in self._roles:  # Mimir first: what the others publish at their start is owed to it
                    await inner.start(getattr(self, f"_{name}"))
                with ExitStack() as answering:
                    for action in ("run_suite", "cancel", "stop", "runs"):
                        answering.enter_context(self.bus.answer(action, getattr(self.suites, action)))
                    self.bus.publish(AgentStarted(version="1", ident=self._ident, instance=self.store.instance))
                    await self.suites.recover()
                    self.suites.tell_slots()
                    yield self
                nursery.cancel_scope.cancel()
        finally:
            self.store.close()

    async def delivered(self) -> None:
        """Wait until nothing is owed but what is held."""
        with trio.fail_after(PATIENCE_S):
            await self.store.commit()
            while True:
                committed = self.store._committed
                depths = await self.store.depths()
                if not any(depth.waiting - depth.held for depth in depths.values()):
                    return
                await committed.wait()

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until it is true, looking after each event; raises trio.TooSlowError."""
        with trio.fail_after(PATIENCE_S):
            while not holds():
                await self._heard.wait()

    async def _watch(self) -> None:
        with self.bus.subscribe(*KINDS.values()) as events:
            async for event in events:
                self.events.append(event)
                heard, self._heard = self._heard, trio.Event()
                heard.set()
                match event:
                    case LinkChanged():
                        self.link[event.name] = event.state
                    case Alert():
                        self.alerts[event.code] = event
                    case AlertCleared():
                        self.alerts.pop(event.code, None)

    async def _seneschal(self, *, task_status: trio.TaskStatus[None]) -> None:
        await seneschal_role.run(
            self.bus,
            self.store,
            self._settings,
            self._ident,
            Health("seneschal"),
            dial=self._dial("seneschal"),
            about=seneschal_role.About(server="ws://127.0.0.1:13172/", labels=("rhel9",)),
            metrics=self.metrics,
            clock=epoch,
            task_status=task_status,
        )

    async def _mimir(self, *, task_status: trio.TaskStatus[None]) -> None:
        await mimir_role.run(
            self.bus,
            self.store,
            self._ident,
            Health("mimir"),
            dial=self._dial("mimir"),
            platform={"hostname": "host", "os": "os"},
            metrics=self.metrics,
            clock=epoch,
            task_status=task_status,
        )
