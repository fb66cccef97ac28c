"""The envelope on a websocket: both ends in memory, time by the mock clock."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair
from trio_websocket import WebSocketConnection, wrap_client_stream, wrap_server_stream

from agent.core.channel import Channel, Refused, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.metrics import Metrics


@asynccontextmanager
async def websockets() -> AsyncIterator[tuple[WebSocketConnection, WebSocketConnection]]:
    """A client's and a server's end of one connection in memory."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        ends: dict[str, WebSocketConnection] = {}

        async def client() -> None:
            ends["client"] = await wrap_client_stream(nursery, ours, "lab:1", "/")  # type: ignore[arg-type]  # any stream

        async def server() -> None:
            ends["server"] = await (await wrap_server_stream(nursery, theirs)).accept()

        async with trio.open_nursery() as opening:
            opening.start_soon(client)
            opening.start_soon(server)
        yield ends["client"], ends["server"]
        nursery.cancel_scope.cancel()


async def echo(request: Request) -> Mapping[str, Any]:
    match request.action:
        case "echo":
            return request.payload
        case "break":
            raise ZeroDivisionError("on purpose")
        case action:
            raise ActionError("unknown_action", f"nothing here answers {action!r}")


async def idle(channel: Channel) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def talking(talk: Callable[[Channel], Awaitable[None]]) -> AsyncIterator[None]:
    async with websockets() as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: converse(server, echo, idle, metrics=Metrics()))
        await converse(client, echo, talk, metrics=Metrics())
        yield
        nursery.cancel_scope.cancel()


async def test_an_answer_finds_its_request() -> None:
    async def talk(channel: Channel) -> None:
        assert await channel.ask("echo", {"a": 1}) == {"a": 1}
        with pytest.raises(Refused) as refused:
            await channel.ask("nonsense", {})
        assert refused.value.code == "unknown_action"
        assert refused.value.reason == "unknown_action: nothing here answers 'nonsense'"

    async with talking(talk):
        pass


async def test_a_big_message_goes_through_in_fragments() -> None:
    async def talk(channel: Channel) -> None:
        big = {"text": "é" * 300_000}
        assert await channel.ask("echo", big) == big

    async with talking(talk):
        pass
