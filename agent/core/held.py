"""What a sink refused: held, told by an alert, offered again hourly and at reload.

Source: protocols/emissary.md, "The envelope" (`seq` in a payload); protocols/settings.md, "loud event".
"""

import logging
import time
from collections.abc import Callable
from typing import NoReturn

import trio

from agent.core.bus import Bus
from agent.core.events import Alert, AlertCleared, Reloaded
from agent.core.store import HELD_RETRY_S, Outbox, Store

log = logging.getLogger(__name__)

LOOK_S = 60.0  # how often a held delivery's hour is looked at


class Held:
    """The held deliveries of one outbox; `run` must be running. `clock` gives epoch seconds."""

    def __init__(self, bus: Bus, store: Store, box: Outbox, *, clock: Callable[[], float] = time.time) -> None:
        self._bus, self._store, self._box, self._clock = bus, store, box, clock
        self._is_alerting = False

    def hold(self, n: int, reason: str) -> None:
        """The sink answered delivery `n` by an error: the queue goes on without it."""
        log.warning("delivery refused sink=%s n=%d reason=%s", self._box.sink, n, reason)
        self._box.hold(n, reason, self._clock())
        self._alert(reason)

    async def settle(self) -> None:
        """Nothing waits to be sent: where nothing is held either, the alert is over."""
        if self._is_alerting:
            await self._store.commit()  # what was just held is seen only then
            if not await self._box.held():
                self._is_alerting = False
                self._bus.publish(AlertCleared(code=self._code))

    async def run(self) -> NoReturn:
        """Offer what is held again, under new numbers."""
        await self._store.commit()
        if left := await self._box.held():
            self._alert(left[0][2])
        with self._bus.subscribe(Reloaded) as reloads:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hourly)
                    async for _ in reloads:
                        await self._box.retry_held(float("inf"))
            finally:
                self._bus.publish(AlertCleared(code=self._code))  # until the next start finds it held
        raise AssertionError("a subscription never ends")

    async def _hourly(self) -> NoReturn:
        while True:
            await trio.sleep(LOOK_S)
            if self._is_alerting:
                await self._box.retry_held(self._clock() - HELD_RETRY_S)

    @property
    def _code(self) -> str:
        return f"held.{self._box.sink}"

    def _alert(self, reason: str) -> None:
        self._is_alerting = True
        text = f"{self._box.sink} refused a message: {reason}"
        remedy = "Look at its log; the message is kept, and offered again hourly and at reload."
        self._bus.publish(Alert(code=self._code, text=text, remedy=remedy, since=self._clock()))
