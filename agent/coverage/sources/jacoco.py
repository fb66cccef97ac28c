"""Products on a JVM with JaCoCo's agent, which listens (`output=tcpserver`): each look is a dump with a reset.

Each has a connection of its own: an agent serves one at a time, and other tools of its users want to ask it too.
A class is known once it ran, as a unit with the one method `<class>`; its lines are not known. What ran since the last
look is gone when a JVM ends, as its agent then only hangs up.

Source: drill sheet, "Probe sources", JaCoCo; the bytes: agent/coverage/jacoco.py.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from agent.core.errors import PeerBrokeProtocol, unwrap
from agent.coverage.catalog import Catalog, Delta, Method, Unit
from agent.coverage.jacoco import HEADER, Dumped, Executed, Reader, dump
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Warned

log = logging.getLogger(__name__)

CONNECT_S = 2.0
ANSWER_S = 5.0  # what takes longer is read at the next look
READ_SIZE = 65_536
METHOD = "<class>"
MOST_CLASSES = 100_000


class _Agent:
    """One JVM's agent. `executed` is what it has told and nobody has taken; `why` is why the last look failed."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address, self._host, self._port = address, host.strip("[]"), int(port)
        self._stream: trio.SocketStream | None = None
        self._reader = Reader()
        self._is_asked = False  # the end of a dump has not come yet
        self.executed: list[Executed] = []
        self.is_alive = False
        self.why = ""
        self.is_new = False  # has `why` not been told?

    async def look(self) -> None:
        """Have it tell what ran, and forget it. An agent that is slow is left to talk on until the next look."""
        try:
            if self._stream is None:
                await self._connect()
            if self._stream is not None:
                await self._dump(self._stream)
        except (OSError, trio.BrokenResourceError) as error:
            cause = unwrap(error.__cause__ or error)  # one for each address of the host
            number = getattr(cause, "errno", None) or 0
            await self._lose(os.strerror(number) if number > 0 else str(cause) or str(error))
        except PeerBrokeProtocol as error:
            await self._lose(error.what)

    async def _connect(self) -> None:
        with trio.move_on_after(CONNECT_S) as limit:
            stream = await trio.open_tcp_stream(self._host, self._port)
            self._stream, self._reader, self._is_asked = stream, Reader(), False
            await stream.send_all(HEADER)
        if limit.cancelled_caught:
            await self._lose(f"no connection within {CONNECT_S:g} s")

    async def _dump(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(ANSWER_S) as limit:
            if not self._is_asked:
                self._is_asked = True
                await stream.send_all(dump(reset=True))
            while self._is_asked:
                data = await stream.receive_some(READ_SIZE)
                if not data:
                    raise trio.BrokenResourceError("it has ended; what it ran last is not known")
                for event in self._reader.feed(data):
                    if isinstance(event, Dumped):
                        self._is_asked = False
                    else:
                        self.executed.append(event)
        if limit.cancelled_caught:
            self._explain(f"no answer within {ANSWER_S:g} s")
            return
        await self.close()
        self.is_alive, self.why = True, ""

    async def close(self) -> None:
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None

    async def _lose(self, why: str) -> None:
        self.is_alive = False
        await self.close()
        self._explain(why)

    def _explain(self, why: str) -> None:
        self.is_new = self.is_new or why != self.why
        self.why = why


class Jacoco:
    """The source `jacoco`: see `Source`."""

    def __init__(self, settings: CoverageSettings, catalog: Catalog, run_dir: Path) -> None:
        self._catalog = catalog
        self._agents = [_Agent(address) for address in settings.jacoco]
        self._known: dict[int, Unit] = {}  # by the class's id
        self._refused: set[int] = set()
        self._told: list[Warned | Lost] = []
        self._is_started = False
        self._is_empty = True

    def env(self) -> dict[str, str]:
        return {}  # a JVM is started with its agent by whoever starts it

    async def prepare(self, roots: Sequence[Path]) -> None:
        await trio.lowlevel.checkpoint()

    async def start(self) -> None:
        if self._is_started:  # for one more session; what a dump has told it tells again when that runs again
            return
        self._is_started, self._is_empty = True, True
        await self._look()
        for executed in self._taken():
            self._unit(executed)

    async def collect(self, *, final: bool = False) -> list[Delta]:
        await self._look()
        deltas = []
        for executed in self._taken():
            unit = self._unit(executed)
            if unit is not None and executed.probes:
                self._is_empty = False
                deltas.append(Delta(unit.class_id, executed.probes))
        return deltas

    async def stop(self) -> None:
        self._is_started = False
        for agent in self._agents:
            await agent.close()
            agent.is_alive = False

    def alive(self) -> bool:
        return any(agent.is_alive for agent in self._agents)

    def told(self) -> list[Warned | Lost]:
        told, self._told = self._told, []
        for agent in self._agents:
            if agent.is_new and agent.why:
                told.append(Warned(f"JaCoCo's agent at {agent.address}: {agent.why}; it is asked again at each look"))
            agent.is_new = False
        return told

    def why_empty(self) -> str:
        if not self._is_empty:
            return ""
        reasons = [f"JaCoCo's agent at {agent.address}: {agent.why}" for agent in self._agents if agent.why]
        return "; ".join(reasons) or "no class ran that JaCoCo covers"

    async def _look(self) -> None:
        async with trio.open_nursery() as nursery:
            for agent in self._agents:
                nursery.start_soon(agent.look)

    def _taken(self) -> list[Executed]:
        taken = []
        for agent in self._agents:
            taken += agent.executed
            agent.executed = []
        return taken

    def _unit(self, executed: Executed) -> Unit | None:
        """Its unit, made when it is first seen; None where it cannot be told from another."""
        unit = self._known.get(executed.id)
        if unit is None and len(self._known) < MOST_CLASSES:
            path, _, name = executed.name.rpartition("/")
            method = Method(METHOD, (), "", tuple(range(executed.count)), f"{executed.id:016x}")
            unit = Unit(path=path or ".", name=name, methods=(method,), lines=(0,) * executed.count)
            if unit.class_id in self._catalog.units:  # by another class loader, or another version of it
                name = f"{name}@{executed.id:016x}"
                unit = Unit(path=unit.path, name=name, methods=unit.methods, lines=unit.lines)
            self._catalog.add([unit])
            self._known[executed.id] = unit
        if unit is not None and unit.probe_count == executed.count:
            return unit
        if executed.id not in self._refused and len(self._refused) < MOST_CLASSES:
            self._refused.add(executed.id)
            why = "has two numbers of probes" if unit is not None else f"is one more than {MOST_CLASSES}"
            self._told.append(Lost(1, f"class {executed.name} {why}"))
        return None
