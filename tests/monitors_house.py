"""A monitors role in a temporary folder, with real programs, and what it published."""

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent, MonitorLog, MonitorRun, MonitorStep, Reloaded
from agent.core.metrics import Metrics
from agent.core.process import adopt
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.monitors import role, schedule
from agent.monitors.settings import Monitor, MonitorsSettings

SDK = Path(role.__file__).parent
# The process tree is found by the run, on the whole machine: each test process needs ids of its own.
ID = f"t{os.getpid()}"

# What every test program begins with: say and hear, and the handshake as a function.
PRELUDE = """
import json, os, signal, subprocess, sys, time
def say(text):
    body = text.encode()
    os.write(1, b"%05d %b" % (len(body), body))
def hear():
    head = sys.stdin.buffer.read(6)
    if not head:
        sys.exit(1)
    return sys.stdin.buffer.read(int(head)).decode()
def shake():
    say("Started 1.1"); hear(); say("Ready"); config = json.loads(hear()[7:]); say("Configured")
    return config
"""


def program(folder: Path, body: str, name: str = "monitor.py") -> tuple[str, ...]:
    """The argv of a program in Python that has PRELUDE."""
    path = folder / name
    path.write_text(PRELUDE + body)
    return (sys.executable, "-S", str(path))


def monitor(command: tuple[str, ...], **changes: Any) -> Monitor:
    plain: dict[str, Any] = {"id": ID, "command": command, "steps": ("A",), "interval": 86_400.0}
    return Monitor(**(plain | changes))


class House:
    """The role, and every event that it published."""

    def __init__(self, bus: Bus, store: Store, settings: list[MonitorsSettings], metrics: Metrics) -> None:
        self.bus, self.store, self.settings, self.metrics = bus, store, settings, metrics
        self.events: list[AnyEvent] = []
        self.keeps_logs = True
        self._came = trio.Event()

    def append(self, event: AnyEvent, at: float) -> None:
        if self.keeps_logs or not isinstance(event, MonitorLog):
            self.events.append(event)
        self._came.set()
        self._came = trio.Event()

    async def until(self, is_so: Callable[[], object]) -> None:
        with trio.fail_after(60):
            while not is_so():
                await self._came.wait()

    async def run_once(self, name: str = ID) -> list[MonitorStep]:
        """The steps of a run that is ordered now, once it is over."""
        run = (await self.bus.ask("run_monitor", {"id": name}))["run"]
        await self.until(lambda: self.ended(run))
        return self.steps(run)

    def ended(self, run: str) -> MonitorRun | None:
        return next((event for event in self.events if isinstance(event, MonitorRun) and event.run == run), None)

    def steps(self, run: str | None = None) -> list[MonitorStep]:
        return [event for event in self.events if isinstance(event, MonitorStep) and run in (None, event.run)]

    def logs(self) -> list[MonitorLog]:
        return [event for event in self.events if isinstance(event, MonitorLog)]

    def runs(self) -> list[MonitorRun]:
        return [event for event in self.events if isinstance(event, MonitorRun)]

    async def reload(self, **changes: Any) -> None:
        self.settings[0] = MonitorsSettings(**changes)
        self.bus.publish(Reloaded())
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def house(folder: Path, *monitors: Monitor, **settings: Any) -> AsyncIterator[House]:
    """Monitors have no first tick soon after the start, but a day's: a test orders its runs, or sets an interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "FIRST_WITHIN_S", 86_400.0)
        async with _house(folder, *monitors, **settings) as here:
            yield here


@asynccontextmanager
async def _house(folder: Path, *monitors: Monitor, **settings: Any) -> AsyncIterator[House]:
    graces: dict[str, Any] = {"handshake_timeout": 30.0, "exit_grace": 30.0, "eof_grace": 0.5}
    given = [MonitorsSettings(monitor=monitors, **(graces | settings))]
    store, metrics = open_store(folder / "state", reserve=4096), Metrics()
    here = House(Bus(), store, given, metrics)
    here.bus = Bus(here)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await nursery.start(adopt)

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                await role.run(
                    here.bus, store, lambda: given[0], "lab-07", Health("monitors"), metrics=metrics,
                    task_status=task_status,
                )  # fmt: skip

            async with trio.open_nursery() as roles:
                await roles.start(serve)
                yield here
                roles.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    finally:
        store.close()
