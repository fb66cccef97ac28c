"""A control server on a bus and a store of its own, for tests: real sockets, plain and TLS.

Every message that a client here sees is checked against `agent schema`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from agent.control import role
from agent.control.board import HEARD, Board
from agent.control.messages import ACTIONS
from agent.control.settings import ControlSettings
from agent.core.bus import Bus
from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.events import AnyEvent
from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from agent.core.store import Store, open_store
from agent.core.supervise import Role, Supervisor
from agent.core.tls import TlsSettings, server_context
from tests.certificates import authority, issue
from tests.json_schema import check_action, check_frame

TOKENS = (("sesame", "control"), ("peek", "read"))
LOOPBACK = ControlSettings(listen=("127.0.0.1:0",))
AT = 1795295127.5


class House:
    """The server and what it stands on. `url` ends with a slash; `http` is the same for HTTP."""

    def __init__(self, folder: Path, bus: Bus, store: Store, *, has_tls: bool) -> None:
        self.bus, self.store, self.folder = bus, store, folder
        self.board, self.metrics, self.up = Board(), Metrics(), trio.Event()
        self.supervisor = Supervisor(bus.publish)
        self.url = ""
        self.serve: Callable[..., Awaitable[None]]
        self.tls = TlsSettings(ca_file=folder / "ca.pem") if has_tls else TlsSettings()

    @property
    def http(self) -> str:
        return self.url.replace("ws", "http", 1).rstrip("/")

    @property
    def address(self) -> str:
        return self.url.split("://")[1].rstrip("/")

    def dial(self, token: str | None = "sesame", **headers: str) -> Dial:
        """How a client with this token reaches it."""
        shown = {"authorization": f"Bearer {token}"} if token else {}
        return Dial(self.url, tls=self.tls, headers=tuple((shown | headers).items()))

    def publish(self, *events: AnyEvent) -> None:
        for event in events:
            self.bus.publish(event)

    async def restart(self, settings: ControlSettings) -> None:
        """Start the server again, after `supervisor.stop`."""
        await self.supervisor.start(Role("control", partial(self.serve, settings)))

    def set_url(self, url: str) -> None:
        self.url = url


class Client:
    """A client, and what it was told: the payloads of `events`, and the events in them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.post, self.close = channel.post, channel.close
        self.messages: list[dict[str, Any]] = []
        self.came = trio.Event()

    async def ask(self, action: str, payload: dict[str, Any]) -> dict[str, Any]:
        """A request; that and its answer must fit `agent schema`."""
        answer = await self._channel.ask(action, payload)
        if action in ACTIONS:
            check_action(action, "payload", payload)
            check_action(action, "answer", answer)
        return answer

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for message in self.messages for event in message["events"]]

    async def told(self, count: int) -> list[dict[str, Any]]:
        """The events, once there are so many."""
        with trio.fail_after(60):
            while len(self.events) < count:
                await self.came.wait()
        return self.events

    def take(self, payload: dict[str, Any]) -> None:
        self.messages.append(payload)
        self.came.set()
        self.came = trio.Event()


@asynccontextmanager
async def house(
    folder: Path,
    settings: ControlSettings = LOOPBACK,
    *,
    tls: bool = False,
    tokens: Any = TOKENS,
    is_up: bool = True,
    handlers: Mapping[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] | None = None,
) -> AsyncIterator[House]:
    """A control server that runs; `handlers` stand for the other roles."""
    context = None
    if tls:
        server = issue(authority(folder), folder, "lab-07")
        client_ca = folder / "ca.pem" if settings.tls.client_ca else None
        context = server_context(server.cert, server.key, client_ca)
    store = open_store(folder / "state", reserve=4096)
    bus = Bus(store)
    built = House(folder, bus, store, has_tls=tls)
    async with trio.open_nursery() as outer:
        await outer.start(store.run)
        async with trio.open_nursery() as nursery:

            async def keep_board(*, task_status: trio.TaskStatus[None]) -> None:
                with bus.subscribe(*HEARD) as events:
                    task_status.started()
                    async for event in events:
                        built.board.feed(event, AT)

            async def serve(settings: ControlSettings, health: Any, *, task_status: trio.TaskStatus[None]) -> None:
                await role.run(
                    bus, store, settings, "lab-07", health, tokens=tokens, tls=context, board=built.board,
                    supervisor=built.supervisor, up=built.up, metrics=built.metrics, tell_url=built.set_url,
                    task_status=task_status,
                )  # fmt: skip

            built.serve = serve
            await nursery.start(keep_board)
            for action, handler in (handlers or {}).items():
                nursery.start_soon(_answer, bus, action, handler)
            await nursery.start(built.supervisor.run, [Role("control", partial(serve, settings))])
            if is_up:
                built.up.set()
            await store.commit()  # number 1 is the RoleChanged of the start
            yield built
            nursery.cancel_scope.cancel()
        outer.cancel_scope.cancel()
    store.close()


async def _answer(bus: Bus, action: str, handler: Any) -> None:
    with bus.answer(action, handler):
        await trio.sleep_forever()


@asynccontextmanager
async def client(dial: Dial) -> AsyncIterator[Client]:
    """A connection to it."""
    clients: list[Client] = []
    opened = trio.Event()

    async def answer(request: Request) -> dict[str, Any]:
        clients[0].take(request.payload)
        return {}

    async def talk(channel: Channel) -> None:
        clients.append(Client(channel))
        opened.set()
        await trio.sleep_forever()

    async with connect(dial) as ws, trio.open_nursery() as nursery:
        read = ws.get_message

        async def get_message() -> str | bytes:
            frame = await read()
            check_frame(frame if isinstance(frame, str) else "a binary frame")
            return frame

        ws.get_message = get_message  # type: ignore[method-assign]  # all that is heard is checked
        nursery.start_soon(partial(converse, ws, answer, talk, metrics=Metrics()))
        await opened.wait()
        yield clients[0]
        nursery.cancel_scope.cancel()


def data(events: list[dict[str, Any]]) -> list[Any]:
    """The events' codes, names or messages, for a short look."""
    return [event["data"].get("code") or event["data"].get("name") or event["data"].get("message") for event in events]
