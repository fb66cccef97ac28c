"""Products on a JVM with JaCoCo's agent, which listens (`output=tcpserver`): each look is a dump with a reset.

Between two looks a connection waits for the dump that an agent tells at its JVM's end, to whoever is connected then. It
is another one after each look: an agent serves one at a time, and other tools of its users get their turn so. Of a JVM
that is killed, what ran since the last look is gone.

A class is known once it ran, as a unit with the one method `<class>`; its lines are not known.

Source: drill sheet, "Probe sources", JaCoCo; the bytes: agent/coverage/jacoco.py.
"""

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

import trio

from agent.core.errors import PeerBrokeProtocol, unwrap
from agent.coverage.catalog import Catalog, Delta, Method, Unit
from agent.coverage.jacoco import HEADER, Dumped, Executed, Reader, dump
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Warned

log = logging.getLogger(__name__)

CONNECT_S = 2.0
ANSWER_S = 5.0  # what takes longer is read at the next look
GOODBYE_S = 0.5
REACH_S = 0.1  # s between two tries, of JVMs that live for no longer than from one look to the next
READ_SIZE = 65_536
METHOD = "<class>"
MOST_CLASSES = 100_000
MOST_EXECUTED = 2 * MOST_CLASSES  # of one agent from one look to the next


class _Agent:
    """One JVM's agent. `executed` is what it has told and nobody has taken; `why` is why the last look failed.

    A connection brings one dump: that which was asked for, or that of the JVM's end.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address, self._host, self._port = address, host.strip("[]"), int(port)
        self._one = trio.Lock()  # who uses the connection
        self._stream: trio.SocketStream | None = None
        self._reader = Reader()
        self._is_asked = self._has_dumped = False  # on this connection
        self._has_told_all = False  # its JVM has ended, and was heard to the end
        self.executed: list[Executed] = []
        self.was_there = self.is_alive = False
        self.why = ""
        self.is_new = False  # has `why` not been told?

    async def look(self) -> None:
        """Have it tell what ran, and forget it. An agent that is slow is left to talk on until the next look."""
        async with self._one, self._losing():
            if self._stream is None:
                await self._connect()
            if await self._dump():
                await self.close()
                await self._wait_for_its_end()

    async def reach(self) -> None:
        """Between two looks: hear of its JVM's end, and connect to the next, which may be over before the next look."""
        async with self._one, self._losing():
            if self._stream is not None and self._has_ended(self._stream):
                await self.close()
            if self._stream is None:
                await self._wait_for_its_end()

    @asynccontextmanager
    async def _losing(self) -> AsyncIterator[None]:
        try:
            yield
        except trio.TooSlowError:
            await self._lose(f"no connection within {CONNECT_S:g} s")
        except (OSError, trio.BrokenResourceError) as error:
            cause = unwrap(error.__cause__ or error)  # one for each address of the host
            number = getattr(cause, "errno", None) or 0
            await self._lose(os.strerror(number) if number > 0 else str(cause) or str(error))
        except PeerBrokeProtocol as error:
            await self._lose(error.what)

    async def _connect(self) -> None:
        with trio.fail_after(CONNECT_S):
            self._stream = await trio.open_tcp_stream(self._host, self._port)
        self._reader = Reader()
        self._is_asked = self._has_dumped = self._has_told_all = False

    async def _dump(self) -> bool:
        """Read until the end of a dump; False when that has not come yet."""
        assert self._stream is not None
        with trio.move_on_after(ANSWER_S) as limit:
            if not self._is_asked:
                self._is_asked = True
                with suppress(trio.BrokenResourceError):  # it has ended: what it said last is there to be read
                    await self._stream.send_all(HEADER + dump(reset=True))
            while not self._has_dumped:
                self._take(await self._stream.receive_some(READ_SIZE))
        if limit.cancelled_caught:
            self._explain(f"no answer within {ANSWER_S:g} s")
            return False
        self.was_there, self.is_alive, self.why = True, True, ""
        return True

    def _has_ended(self, stream: trio.SocketStream) -> bool:
        """Take what has come without being asked for, up to the end of the stream, if that has come."""
        while True:
            try:
                data = os.read(stream.socket.fileno(), READ_SIZE)
            except BlockingIOError:
                return False
            if not data and self._has_dumped:
                return True
            self._take(data)

    def _take(self, data: bytes | bytearray) -> None:
        if not data:
            raise trio.BrokenResourceError("it has ended; what it ran last is not known")
        for event in self._reader.feed(data):
            if isinstance(event, Dumped):
                self._has_dumped = True
            elif len(self.executed) < MOST_EXECUTED:
                self.executed.append(event)
            else:
                remedy = "See what listens there; it is asked again at each look."
                raise PeerBrokeProtocol(f"it tells of more than {MOST_EXECUTED} classes", remedy=remedy)

    async def _wait_for_its_end(self) -> None:
        """A connection for its last dump. There is none when its JVM has ended by now, and has told that."""
        try:
            await self._connect()
        except (OSError, trio.TooSlowError):
            self._has_told_all = self._has_told_all or self._has_dumped
            self.is_alive = False

    async def close(self) -> None:
        """Hear the agent out. One whose words nobody reads would print a stack trace into its product's stderr."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.move_on_after(GOODBYE_S, shield=True):  # also where the look is given up
                with suppress(OSError, trio.BrokenResourceError, PeerBrokeProtocol):
                    await stream.send_eof()
                    while data := await stream.receive_some(READ_SIZE):
                        self._take(data)
            await trio.aclose_forcefully(stream)

    async def _lose(self, why: str) -> None:
        self.is_alive = False
        await self.close()
        self._explain(why)

    def _explain(self, why: str) -> None:
        self.is_new = self.is_new or (why != self.why and not self._has_told_all)
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

    async def attend(self) -> NoReturn:
        """Between two looks: reach JVMs that may end before the next. It is cancelled at any time."""
        while True:
            await trio.sleep(REACH_S)
            async with trio.open_nursery() as nursery:
                for agent in self._agents:
                    nursery.start_soon(agent.reach)

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
                text = f"JaCoCo's agent at {agent.address}: {agent.why}; it is asked again at each look."
                told.append(Warned(text, passes=not agent.was_there))
            agent.is_new = False
        return told

    def why_empty(self) -> str:
        if not self._is_empty:
            return ""
        reasons = [f"JaCoCo's agent at {agent.address}: {agent.why}." for agent in self._agents if agent.why]
        return " ".join(reasons) or "No class ran that JaCoCo covers."

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
