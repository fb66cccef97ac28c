"""One connection to a Drill admin: acts go out in order, what is large is encoded in a thread; who is silent is dead.

Source: protocols/drill.md, "Limits and security" (slices, ping after 10 s idle, dead after 30 s).
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NoReturn

import msgspec
import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import ungrouped
from agent.core.errors import PeerUnreachable
from agent.coverage import messages
from agent.coverage.sessions import Announce, Part, Ping, Say

IDLE_S, DEAD_S = 10.0, 30.0
TICK_S = 0.01  # what is too short for the clock to move is not waited for
SLOWEST = 50_000  # bytes a second: an admin that reads a large frame has no time to answer a ping
MAX_WAITING = 1000  # acts that wait to be sent before nothing more is read


class Settle(msgspec.Struct, frozen=True):
    """What comes after this is said when what was kept before it is on the disk."""


Sent = Say | Announce | Part | Ping | Settle


class Attachment:
    """An open connection. `counts` are of the probes of each class.

    `pong` gets the number of an answered ping, `idle` gives what to send when nothing comes, `settle` waits for the
    disk.
    """

    def __init__(
        self,
        ws: WebSocketConnection,
        counts: Mapping[str, int],
        *,
        pong: Callable[[int], None],
        idle: Callable[[], Ping],
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        self._ws, self._counts, self._pong, self._idle = ws, counts, pong, idle
        self._settle = settle
        self._acts: deque[Sent] = deque()
        self._came, self._went = trio.Event(), trio.Event()
        self._is_sending = self._is_over = False
        self._heard = self._patient_until = trio.current_time()

    def put(self, acts: Iterable[Sent]) -> None:
        """Send these after what was put before. Nothing is put between them."""
        self._acts.extend(acts)
        self._came.set()

    async def drained(self, waiting: int = 0) -> None:
        """Wait until at most so many acts wait to be sent, or none can be any more."""
        while not self._is_over and len(self._acts) + self._is_sending > waiting:
            await self._went.wait()

    async def serve(self, receive: Callable[[str | bytes], Awaitable[None]]) -> NoReturn:
        """Give each message to `receive`, one after the other, until the connection breaks.

        Raises PeerUnreachable when nothing came for DEAD_S, and trio_websocket's ConnectionClosed.
        """
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, nursery)
                    nursery.start_soon(self._watch)
                    while True:
                        message = await self._ws.get_message()
                        self._heard = trio.current_time()
                        await self.drained(MAX_WAITING)
                        await receive(message)
        finally:
            self._is_over = True
            self._went.set()
        raise AssertionError("only an error ends it")

    async def _write(self, nursery: trio.Nursery) -> NoReturn:
        while True:
            while not self._acts:
                self._came = trio.Event()
                await self._came.wait()
            act = self._acts.popleft()
            self._is_sending = True
            match act:
                case Say(frame):
                    await self._send(frame)
                case Settle():
                    await self._settle()
                case Ping(number):
                    nursery.start_soon(self._ping, number)
                case Announce(units):
                    await self._send_all(messages.announcement(units))
                case Part(session, batches):
                    await self._send_all(messages.parts(session, batches, self._counts))
            self._is_sending = False
            self._went.set()
            self._went = trio.Event()

    async def _send_all(self, frames: Iterator[str]) -> None:
        while (frame := await trio.to_thread.run_sync(partial(next, frames, None))) is not None:
            await self._send(frame)

    async def _send(self, frame: str) -> None:
        self._patient_until = trio.current_time() + DEAD_S + len(frame) / SLOWEST
        await self._ws.send_message(frame)

    async def _ping(self, number: int) -> None:
        await self._ws.ping(str(number).encode())
        self._heard = trio.current_time()
        self._pong(number)

    async def _watch(self) -> NoReturn:
        while True:
            now = trio.current_time()
            silent = now - self._heard
            if silent >= DEAD_S and not (self._is_sending and now < self._patient_until):
                text = f"{self._ws.remote} sent nothing for {silent:.0f} s"
                raise PeerUnreachable(text, remedy="Look at the network and at the admin's log.")
            if silent >= IDLE_S:
                self.put([self._idle()])
            await trio.sleep(max(IDLE_S - silent % IDLE_S, TICK_S))
