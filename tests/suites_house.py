"""A suites role with its bus and store in a temporary folder, and real processes."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from agent.core.bus import Bus
from agent.core.events import (
    AnyEvent,
    SlotsChanged,
    SuiteFinished,
    TestFinished,
    decode,
)
from agent.core.process import adopt
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.suites import role
from agent.suites.prepare import Machine
from agent.suites.settings import SuitesSettings

# The process tree is found by the run, on the whole machine: each test process needs ids of its own.
R = [f"r-{os.getpid()}-{n}" for n in range(5)]


class Log:
    """What a run captures, in memory."""

    path = Path("setup.log")

    def __init__(self) -> None:
        self.text = b""

    def write(self, data: bytes) -> None:
        self.text += data


class House:
    """A suites role with its bus and store, in a temporary folder."""

    def __init__(self, folder: Path, bus: Bus, store: Store) -> None:
        self.folder, self.bus, self.store = folder, bus, store
        self.project = folder / "project"

    def write(self, name: str, text: str) -> None:
        path = self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def tree(self, **document: Any) -> dict[str, Any]:
        return {"id": "s", "runner": "tap", "source": {"dir": str(self.project)}, **document}

    async def order(self, run: str = R[1], **document: Any) -> str:
        answer = await self.bus.ask("run_suite", {"run": run, "suite": self.tree(**document), "origin": "seneschal"})
        return str(answer["run"])

    async def finished(self, run: str = R[1]) -> SuiteFinished:
        """Its result, once its slot is free again. A refused run would have none."""
        kinds = ("SuiteFinished", "RunRefused")
        with self.bus.subscribe(SlotsChanged) as slots:
            while True:
                committed = self.store._committed
                if rows := await self.store.read(run=run, kinds=kinds):
                    break
                await committed.wait()
            while run in [each["run"] for each in (await self.bus.ask("runs", {}))["runs"]]:
                await anext(slots)
        event = decode(rows[0].kind, rows[0].data)
        assert isinstance(event, SuiteFinished), event
        return event

    async def events(self, *kinds: type[AnyEvent], run: str = R[1]) -> list[Any]:
        rows = await self.store.read(run=run, kinds=[kind.__name__ for kind in kinds], limit=10_000)
        return [decode(row.kind, row.data) for row in rows]

    async def states(self, run: str = R[1]) -> dict[str, str]:
        return {event.case: event.state for event in await self.events(TestFinished, run=run)}

    def result(self, run: str = R[1]) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "state/runs" / run / "result.json").read_text())
        return loaded


@asynccontextmanager
async def house(
    folder: Path, project: str | None = None, ca_file: Path | None = None, **settings: Any
) -> AsyncIterator[House]:
    (folder / "project").mkdir(exist_ok=True)
    store = open_store(folder / "state", reserve=4096)
    bus = Bus(store)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await nursery.start(adopt)
            start = partial(
                role.run,
                bus,
                store,
                lambda: SuitesSettings(roots=(str(folder / "project"),), **settings),
                lambda: Machine(ident="lab-07", labels={"os": "rhel9"}, project=project, ca_file=ca_file),
                Health("suites"),
            )
            await nursery.start(start)
            yield House(folder, bus, store)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def artifact(finished: SuiteFinished, name: str) -> bytes:
    return Path(finished.artifacts[name].path).read_bytes()


def tap(body: str) -> list[str]:
    return ["sh", "-c", body]
