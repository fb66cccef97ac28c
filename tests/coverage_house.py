"""A coverage role in a temporary folder: its product is a list of classes, and the test says what was reached."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent
from agent.core.link import Dial
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Health, Role, Supervisor
from agent.coverage import role
from agent.coverage.catalog import Catalog, Delta, Unit
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources import Asking, Lost, Source, Warned
from tests.drill_transcripts import bits, unit

E = TypeVar("E", bound=AnyEvent)


class Product:
    """What runs: classes, which of them were reached, and whether a process of it lives."""

    def __init__(self, *classes: str) -> None:
        self.units: list[Unit] = [unit(name) for name in classes]
        self.is_alive = False
        self.told: list[Warned | Lost] = []
        self.teller = ""  # the folder of the source that tells it; any, where it is empty
        self.broken: Exception | None = None
        self.hangs: set[str] = set()  # folders of sources whose product's disk does not answer
        self.hung = trio.Event()  # somebody waits for it
        self.fails: list[str] = []  # "look at r-1", "last look at r-1": these fail, once each
        self._reached: list[Delta] = []
        self._listeners: list[list[Delta]] = []

    def reach(self, class_id: str, flags: str, test: str = "t1.test.js") -> None:
        """Code of the product runs: every started source sees it once."""
        for listener in self._listeners:
            listener.append(Delta(class_id, bits(flags), test))

    def make(
        self, name: SourceName, settings: CoverageSettings, catalog: Catalog, folder: Path, asking: Asking
    ) -> Source:
        assert folder.stat().st_mode & 0o777 == 0o700
        return Probe(self, catalog, folder)


class Probe:
    """A source that sees what the product says it reached."""

    def __init__(self, product: Product, catalog: Catalog, folder: Path) -> None:
        self._product, self._catalog, self._folder = product, catalog, folder
        self._seen: list[Delta] = []
        self._has_seen = False

    def env(self) -> dict[str, str]:
        return {"PROBE": str(self._folder)}

    async def prepare(self, roots: Sequence[Path]) -> None:
        if self._product.broken is not None:
            raise self._product.broken
        if self._folder.name in self._product.hangs:
            self._product.hung.set()
            await trio.sleep_forever()
        if roots:
            self._catalog.add(self._product.units)

    async def start(self) -> None:
        if "runs" in self._folder.parts:  # and nothing of it runs by itself
            self._product._listeners.append(self._seen)

    async def collect(self, *, final: bool = False) -> list[Delta]:
        look = f"{'last ' if final else ''}look at {self._folder.name}"
        if look in self._product.fails:
            self._product.fails.remove(look)
            raise RuntimeError(f"no {look}")
        seen = list(self._seen)
        self._seen.clear()
        self._has_seen = self._has_seen or bool(seen)
        return seen

    async def stop(self) -> None:
        self._product._listeners = [each for each in self._product._listeners if each is not self._seen]
        self._seen.clear()

    def alive(self) -> bool:
        return self._product.is_alive

    def told(self) -> list[Warned | Lost]:
        if self._product.teller not in ("", self._folder.name):
            return []
        told, self._product.told = self._product.told, []
        return told

    def why_empty(self) -> str:
        return "" if self._has_seen else "The probe saw nothing."


class House:
    """The role under its supervisor, and every event that they published."""

    role: Role

    def __init__(self, store: Store, settings: CoverageSettings) -> None:
        self.store, self.settings = store, settings
        self.events: list[AnyEvent] = []
        self.bus = Bus(self)
        self.supervisor = Supervisor(self.bus.publish)
        self._came = trio.Event()

    def append(self, event: AnyEvent, at: float) -> None:
        self.events.append(event)
        self._came.set()
        self._came = trio.Event()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, is_so: Callable[[], object]) -> None:
        with trio.fail_after(200):
            while not is_so():
                await self._came.wait()

    async def reload(self, **changed: Any) -> None:
        """The settings change, and the role is started anew with them."""
        self.settings = msgspec.structs.replace(self.settings, **changed)
        await self.supervisor.stop("coverage")
        await self.supervisor.start(self.role)

    async def open(self, run: str, folder: Path, **asked: Any) -> dict[str, str]:
        """A runner is about to be started; what it gets."""
        env: dict[str, str] = (await self.bus.ask("coverage_open", {"run": run, "dir": str(folder)} | asked))["env"]
        return env


@asynccontextmanager
async def house(folder: Path, product: Product, url: str | None = None, **settings: Any) -> AsyncIterator[House]:
    """The role with its store in `folder`; leaving it is an orderly end of the agent."""
    store = open_store(folder / "state", reserve=4096)
    here = House(store, CoverageSettings(enabled=url is not None, **({"sources": ("v8",)} | settings)))
    dial = None if url is None else Dial(f"{url}/agent/attach")
    coverage = role.Coverage(here.bus, store, make=product.make, metrics=Metrics())

    async def run(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        await role.run(coverage, here.settings, "lab-07", health, dial=dial, task_status=task_status)

    here.role = Role("coverage", run)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            async with trio.open_nursery() as roles:
                await roles.start(here.supervisor.run, [here.role])
                yield here
                roles.cancel_scope.cancel()
            await coverage.leave()
            nursery.cancel_scope.cancel()
    finally:
        store.close()
