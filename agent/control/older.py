"""The older services' endpoints on trio: their clients hear of the entitlement status and of files as they always did.

Source: protocols/emissary.md, "Older services' endpoints"; RedHatQE/rhsm-services@38ae860.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.control import compat
from agent.control.streams import Feed, Subscription, Topic
from agent.core.bus import Bus
from agent.core.channel import ungrouped
from agent.core.errors import ActionError
from agent.core.events import RoleChanged
from agent.core.head import Head
from agent.core.listen import Route

log = logging.getLogger(__name__)

PING_S = 20.0  # s between pings, and to answer one
FILES = "files"  # the role that watches files
REASON = 120  # characters of a reason that fit a close frame


class Older:
    """What the older clients of one server share. `ask` lets another role carry out an action, see Bus.ask."""

    def __init__(
        self, bus: Bus, feed: Feed, ident: str, ask: Callable[[str, dict[str, Any]], Awaitable[Mapping[str, Any]]]
    ) -> None:
        self._bus, self._feed, self._ident, self._ask = bus, feed, ident, ask

    def routes(self) -> list[Route]:
        """The endpoints that are theirs alone."""
        return [
            Route(compat.STATUS_PATH, websocket=self._tell_status, scope="read"),
            Route(f"{compat.MONITOR_PATH}*", websocket=self._tell_file, scope="control"),
        ]

    async def answer(self, message: Mapping[str, Any]) -> str | None:
        """Answer a frame of `/` with `op`; None: the client leaves. Raises ActionError."""
        match asked := compat.read_op(message):
            case compat.OpFrame(op="get-status"):
                return compat.op_status(asked, await self._status(), self._ident)
            case compat.OpFrame(op="quit" | "disconnect"):
                return None
            case _:
                raise ActionError("unknown_action", f"op {asked.op!r} is none of get-status, quit, disconnect")

    async def _status(self) -> int:
        """The last entitlement status, as its number."""
        try:
            return int((await self._bus.ask("entitlement", {}))["status"])
        except ActionError as err:
            log.debug("no entitlement status error=%s", err)
            return compat.UNKNOWN_STATUS

    async def _tell_status(self, head: Head, ws: WebSocketConnection) -> None:
        async def now() -> str:
            return compat.status_frame(await self._status(), time.time())

        await self._serve(ws, Topic(kinds=("EntitlementChanged",)), now, now, now)

    async def _tell_file(self, head: Head, ws: WebSocketConnection) -> None:
        path = compat.monitored(head.path)
        watch = ""

        async def looked(event: Literal["open", "change"]) -> str:
            try:
                found = await self._ask("look_file", {"path": path})
            except ActionError as err:  # it is gone, or nobody may see it
                log.debug("not read path=%s error=%s", path, err)
                found = {}
            return compat.file_frame(event, path, found.get("content"), time.time())

        async def pong() -> str:
            return compat.file_frame("pong", path, None, time.time())

        async def begin() -> None:
            nonlocal watch
            await end()
            watch = (await self._ask("watch_file", {"path": path, "content": True, "passing": True}))["watch"]

        async def end() -> None:
            if watch:
                with suppress(ActionError):  # the role that had it began anew, or does so just now
                    await self._ask("unwatch_file", {"watch": watch})

        async def begin_anew() -> None:
            async for role in roles:
                if role.name == FILES and role.state == "running":
                    await begin()
                    await ws.send_message(await looked("change"))  # what happened in between nobody has seen

        with self._bus.subscribe(RoleChanged) as roles:
            try:
                await begin()
                topic = Topic(kinds=("FileChanged",), path=path)
                await self._serve(ws, topic, partial(looked, "open"), partial(looked, "change"), pong, begin_anew)
            except ActionError as err:
                await ws.aclose(1008, err.reason[:REASON])
            finally:
                with trio.move_on_after(1, shield=True):
                    await end()

    async def _serve(
        self,
        ws: WebSocketConnection,
        topic: Topic,
        first: Callable[[], Awaitable[str]],
        changed: Callable[[], Awaitable[str]],
        answer: Callable[[], Awaitable[str]],
        *others: Callable[[], Awaitable[None]],
    ) -> None:
        """Say `first()`, `changed()` when events of the topic came, `answer()` to each frame, until the client leaves.

        The `others` run meanwhile. Raises ActionError as they do.
        """
        wakeup = _Wakeup()
        subscription = Subscription(0, topic, "drop_oldest", wakeup)
        with ungrouped():
            async with trio.open_nursery() as nursery:

                async def tell() -> None:
                    while True:
                        while subscription.take() is None:
                            await wakeup.wait()
                        await ws.send_message(await changed())

                async def reply() -> None:
                    while True:
                        await ws.get_message()
                        await ws.send_message(await answer())

                async def ping() -> None:
                    while True:
                        with trio.move_on_after(PING_S) as limit:
                            await ws.ping()
                        if limit.cancelled_caught:
                            log.info("older client did not answer pings")
                            nursery.cancel_scope.cancel()
                        await trio.sleep(PING_S)

                async def until_closed(task: Callable[[], Awaitable[None]]) -> None:
                    with suppress(ConnectionClosed):
                        await task()
                    nursery.cancel_scope.cancel()

                self._feed.attach(subscription)
                try:
                    nursery.start_soon(until_closed, ping)
                    await ws.send_message(await first())
                    for task in (tell, reply, *others):
                        nursery.start_soon(until_closed, task)
                    await trio.sleep_forever()
                finally:
                    self._feed.detach(subscription)


class _Wakeup:
    """Wakes who waits for it; called while nobody waits, it does nothing."""

    def __init__(self) -> None:
        self._lot = trio.lowlevel.ParkingLot()

    def __call__(self) -> None:
        self._lot.unpark_all()

    async def wait(self) -> None:
        await self._lot.park()
