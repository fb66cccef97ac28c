"""A real dbus-daemon of the test's own, and a service on it that says what the test wants."""

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from jeepney import DBusAddress, message_bus, new_error, new_method_return, new_signal
from jeepney.io.trio import DBusConnection, open_dbus_connection
from jeepney.low_level import HeaderFields, MessageType

START_S = 30.0
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/><allow send_destination="*"/><allow send_type="signal"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""
OLD = DBusAddress("/EntitlementStatus", interface="com.redhat.SubscriptionManager.EntitlementStatus")
NEW = DBusAddress("/com/redhat/RHSM1/Entitlement", interface="com.redhat.RHSM1.Entitlement")


class Daemon:
    """A dbus-daemon that can be stopped and started again at the same address."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.address = f"unix:path={folder}/bus"
        self._socket = folder / "bus"
        (folder / "bus.conf").write_text(CONFIG.format(self._socket))
        self._argv = [str(program), f"--config-file={folder}/bus.conf", "--nofork", "--print-address"]
        self._process: trio.Process | None = None

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._process = await trio.lowlevel.open_process(
            self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout
        with trio.fail_after(START_S):
            assert await self._process.stdout.receive_some(), "it ended before it listened"

    async def stop(self) -> None:
        if self._process is None:
            return
        with trio.CancelScope(shield=True):
            self._process.kill()
            await self._process.wait()
            assert self._process.stdout
            await self._process.stdout.aclose()
        self._process = None


class Service:
    """Answers check_status or GetStatus with `status`, under a name of its own."""

    def __init__(self, connection: DBusConnection, status: Any) -> None:
        self.status, self._connection = status, connection
        self.asked = 0
        self._named = trio.Event()

    async def take(self, name: str) -> None:
        """Have the name, while serve() runs: who sees it may ask at once."""
        await self._connection.send(message_bus.RequestName(name))
        await self._named.wait()

    async def serve(self) -> None:
        while True:
            message = await self._connection.receive()
            if message.header.message_type is MessageType.method_return:
                self._named.set()
            if message.header.message_type is not MessageType.method_call:
                continue
            self.asked += 1
            match message.header.fields[HeaderFields.member]:
                case "check_status":
                    await self._connection.send(new_method_return(message, "i", (self.status,)))
                case "GetStatus":
                    assert message.body == ("", "")
                    await self._connection.send(new_method_return(message, "s", (json.dumps(self.status),)))
                case _:
                    await self._connection.send(new_error(message, "org.freedesktop.DBus.Error.UnknownMethod"))

    async def signal(self, address: DBusAddress, member: str, signature: str | None = None, body: Any = ()) -> None:
        await self._connection.send(new_signal(address, member, signature, body))


@asynccontextmanager
async def service(daemon: Daemon, name: str, status: Any) -> AsyncIterator[Service]:
    connection = await open_dbus_connection(daemon.address)
    async with connection:
        served = Service(connection, status)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.serve)
            await served.take(name)
            try:
                yield served
            finally:
                nursery.cancel_scope.cancel()
