"""A bus of the test's own on a unix socket: enough of dbus-daemon for one client, and what a broken one would do."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from jeepney import DBusAddress, new_error, new_method_return, new_signal
from jeepney.low_level import HeaderFields, Message, MessageType, Parser

OWNER = ":1.7"
Said = tuple[str | None, tuple[Any, ...]] | str | None
Answer = Callable[[str, str, tuple[Any, ...]], Said]


class FakeBus:
    """`answer(destination, member, body)` gives (signature, body), an error's name, or None for no answer at all."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.address = f"unix:path={path}"
        self.owners: dict[str, str] = {}
        self.activatable: list[str] = []
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.rules: list[str] = []
        self._answer, self._serial = answer, 0
        self._stream: trio.SocketStream | None = None

    async def serve(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        line = b""
        while not line.endswith(b"\r\n"):
            line += await stream.receive_some()
        assert line.startswith(b"\0AUTH EXTERNAL ")
        await stream.send_all(b"OK 1234deadbeef\r\n")
        data = b""
        while len(data) < 7:
            data += await stream.receive_some()
        assert data.startswith(b"BEGIN\r\n")
        parser = Parser()
        parser.add_data(data[7:])
        while True:
            while (message := parser.get_next_message()) is not None:
                if message.header.message_type is MessageType.method_call:
                    await self._reply(message)
            data = await stream.receive_some()
            if not data:
                return
            parser.add_data(data)

    async def _reply(self, message: Message) -> None:
        fields = message.header.fields
        said: Said = self._own(fields[HeaderFields.member], message.body)
        if said is None:
            call = (fields[HeaderFields.destination], fields[HeaderFields.member], message.body)
            self.calls.append(call)
            said = self._answer(*call)
        if said is None:
            return
        if isinstance(said, str):
            await self.send(new_error(message, said, "s", ("it says no",)), OWNER)
        elif isinstance(said, tuple):
            await self.send(new_method_return(message, *said), OWNER)

    def _own(self, member: str, body: tuple[Any, ...]) -> tuple[str | None, tuple[Any, ...]] | None:
        match member:
            case "Hello":
                return "s", (":1.2",)
            case "AddMatch":
                self.rules.append(body[0])
                return None, ()
            case "NameHasOwner":
                return "b", (body[0] in self.owners,)
            case "GetNameOwner":
                return "s", (self.owners[body[0]],)
            case "ListActivatableNames":
                return "as", (self.activatable,)
        return None

    async def send(self, message: Message, sender: str) -> None:
        assert self._stream is not None
        message.header.fields[HeaderFields.sender] = sender
        self._serial += 1
        await self._stream.send_all(message.serialise(self._serial))

    async def signal(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str | None = None,
        body: Any = (),
        *,
        sender: str = OWNER,
    ) -> None:
        await self.send(new_signal(DBusAddress(path, interface=interface), member, signature, body), sender)

    async def own(self, name: str, owner: str) -> None:
        """The name gets another owner, or none."""
        old = self.owners.pop(name, "")
        if owner:
            self.owners[name] = owner
        bus = "org.freedesktop.DBus"
        await self.signal("/org/freedesktop/DBus", bus, "NameOwnerChanged", "sss", (name, old, owner), sender=bus)

    def hang_up(self) -> None:
        assert self._stream is not None
        self._stream.socket.shutdown(trio.socket.SHUT_RDWR)

    async def raw(self, data: bytes) -> None:
        assert self._stream is not None
        await self._stream.send_all(data)


@asynccontextmanager
async def fake_bus(folder: Path, answer: Answer) -> AsyncIterator[FakeBus]:
    path = folder / "bus"
    bus = FakeBus(path, answer)
    with trio.socket.socket(trio.socket.AF_UNIX) as listening:
        await listening.bind(str(path))
        listening.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, bus.serve, [trio.SocketListener(listening)])
            yield bus
            nursery.cancel_scope.cancel()
