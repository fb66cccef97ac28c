"""A hub on loopback, and a service that speaks to it packet by packet."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from agent.eman import messages
from agent.eman.hub import serve_hub
from agent.eman.settings import HubSettings
from agent.eman.shake import by_salt, md5_key

SALT = "a-salt-of-the-lab"


@asynccontextmanager
async def hub(address: str = "127.0.0.1:0", **settings: Any) -> AsyncIterator[str]:
    """The address of a hub that takes md5 keys made with SALT, and has patience."""
    given = HubSettings(**{"handshake_s": 60.0, **settings})
    async with trio.open_nursery() as nursery:
        start = partial(serve_hub, address, given, by_salt(SALT), metrics=Metrics())
        yield await nursery.start(start)
        nursery.cancel_scope.cancel()


class Peer:
    """A service of EIO 3 on a websocket, by hand."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self.ws, self.id = ws, ""

    async def hear(self) -> str:
        with trio.fail_after(60):
            return str(await self.ws.get_message())

    async def until_closed(self) -> None:
        """Read what is left, up to the close. Fails when it stays open."""
        with trio.fail_after(60):
            while self.ws.closed is None:
                with suppress(ConnectionClosed):
                    await self.ws.get_message()

    async def event(self) -> tuple[str, Any]:
        """The next event, what is none in between left out."""
        while not (text := await self.hear()).startswith(f"42{messages.NAMESPACE},"):
            pass
        name, *payload = msgspec.json.decode(text.removeprefix(f"42{messages.NAMESPACE},"))
        return name, payload[0] if payload else None

    async def emit(self, event: str, payload: Any) -> None:
        await self.ws.send_message(f"42{messages.NAMESPACE},{msgspec.json.encode([event, payload]).decode()}")

    async def shake(self, name: str, *listens: str, key: str | None = None) -> None:
        await self.ws.send_message("40/communication,")
        assert await self.event() == ("shake_who", None)
        await self.emit("shake_i_am", {"name": name, "key": md5_key(name, SALT) if key is None else key})
        event, payload = await self.event()
        assert event == "shake_id", payload
        self.id = payload["id"]
        await self.emit("shake_ready", {"id": self.id})
        assert await self.event() == ("shake_online", None)
        for each in listens:
            await self.emit("_service:api:request:subscribe", {"name": each})

    async def ask(self, name: str, request_id: str = "1", **more: Any) -> None:
        await self.emit("api:request", {"name": name, "request_id": request_id, "sender_id": self.id, **more})


@asynccontextmanager
async def peer(address: str, name: str | None = None, *listens: str) -> AsyncIterator[Peer]:
    url = f"ws://{address}/socket.io/?EIO=3&transport=websocket"
    async with connect(Dial(url=url), max_message=2**24) as ws:
        connected = Peer(ws)
        if name is not None:
            await connected.shake(name, *listens)
        yield connected
