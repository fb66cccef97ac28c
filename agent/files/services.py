"""The D-Bus services that know the entitlement status, through jeepney: asked, and listened to.

Only the owner of a service's name is believed: any client of the bus may send a signal that looks like its own.

Source: protocols/emissary.md, "Entitlement and file monitor"; D-Bus specification, "Match Rules", "NameOwnerChanged".
"""

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import trio
from jeepney import DBusAddress, DBusErrorResponse, MatchRule, message_bus, new_method_call
from jeepney.auth import BEGIN, Authenticator
from jeepney.bus import get_bus
from jeepney.io.common import RouterClosed
from jeepney.io.trio import DBusConnection, DBusRouter, Proxy
from jeepney.low_level import HeaderFields, Message
from jeepney.wrappers import unwrap_msg

from agent.files.entitlement import RHSM1, SUBSCRIPTION_MANAGER, Status, from_json, from_number, from_properties

log = logging.getLogger(__name__)

CALL_S = 5.0
RETRY_S = 60.0  # after a service that is there did not answer
MAX_HEARD = 256  # signals that wait

# What ends a conversation. ValueError, LookupError, TypeError, struct.error: jeepney could not read what came, or had
# an answer to wait for when the bus went. RuntimeError: an address that it does not support.
BusAway = (
    *(trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, RouterClosed),
    *(DBusErrorResponse, OSError, ValueError, LookupError, TypeError, RuntimeError, struct.error),
)

# The service does not exist here, or is one without this interface.
_ABSENT = (
    *("ServiceUnknown", "NameHasNoOwner", "UnknownMethod", "UnknownObject", "UnknownInterface"),
    *("Spawn.ServiceNotFound", "Spawn.ChildExited", "Spawn.ExecFailed"),
)
_OLD = DBusAddress(
    "/EntitlementStatus", bus_name=SUBSCRIPTION_MANAGER, interface=f"{SUBSCRIPTION_MANAGER}.EntitlementStatus"
)
_NEW = DBusAddress("/com/redhat/RHSM1/Entitlement", bus_name=RHSM1, interface=f"{RHSM1}.Entitlement")
_DBUS = "org.freedesktop.DBus"

# A status; None where no service knows it.
Learn: TypeAlias = Callable[[Status | None], Awaitable[None]]


class Asking:
    """The wish to ask again; wishes that come before the asking are one."""

    def __init__(self) -> None:
        self._wished = trio.Event()

    def wish(self) -> None:
        """Ask soon."""
        self._wished.set()

    async def wait(self) -> None:
        """Wait for a wish, and take it."""
        await self._wished.wait()
        self._wished = trio.Event()


async def converse(
    address: str, asking: Asking, learn: Learn, is_registered: Callable[[], Awaitable[bool]]
) -> NoReturn:
    """Ask the services now and at each wish, and tell what they say by themselves. `address` as jeepney takes it.

    Raises one of BusAway, perhaps in a group, when the bus cannot be reached or goes away.
    """
    with trio.fail_after(CALL_S):
        stream = await trio.open_unix_socket(get_bus(address))
    async with stream:
        with trio.fail_after(CALL_S):
            await _authenticate(stream)
        await _talk(DBusConnection(stream.socket), asking, learn, is_registered)
    raise AssertionError("a conversation ends with an error")


async def _authenticate(stream: trio.SocketStream) -> None:
    """What jeepney's open_dbus_connection does, which leaves the socket open where the bus refuses."""
    await stream.send_all(b"\0")
    authenticator = Authenticator(inc_null_byte=False)
    for line in authenticator:
        await stream.send_all(line)
        answer = await stream.receive_some()
        if not answer:
            raise trio.EndOfChannel("the bus closed the connection before it was let in")
        authenticator.feed(answer)
    await stream.send_all(BEGIN)


async def _talk(
    connection: DBusConnection, asking: Asking, learn: Learn, is_registered: Callable[[], Awaitable[bool]]
) -> None:
    async with connection.router() as router:
        talk = _Conversation(router, asking, learn, is_registered)
        # One filter for all signals: the bus sends those alone that were asked for, and what is forged is found below.
        async with (
            router.filter(MatchRule(type="signal"), bufsize=MAX_HEARD) as signals,
            trio.open_nursery() as nursery,
        ):
            with trio.fail_after(CALL_S):
                await talk.subscribe()
            nursery.start_soon(talk.ask_for_ever)
            async for message in signals:
                await talk.hear(message)
            raise trio.EndOfChannel("the bus closed the connection")


class _Conversation:
    def __init__(
        self, router: DBusRouter, asking: Asking, learn: Learn, is_registered: Callable[[], Awaitable[bool]]
    ) -> None:
        self._router, self._asking, self._learn, self._is_registered = router, asking, learn, is_registered
        self._bus = Proxy(message_bus, router)
        self._owners: dict[str, str] = {}
        self._last: Status | None = None
        self._told = 0  # how often the older service told by itself

    async def subscribe(self) -> None:
        """Greet the bus, have the signals sent here, then see who owns the names: in this order none is missed."""
        rules = [
            MatchRule(type="signal", sender=SUBSCRIPTION_MANAGER, path=_OLD.object_path),
            MatchRule(type="signal", sender=RHSM1, path=_NEW.object_path),
        ]
        for name in (SUBSCRIPTION_MANAGER, RHSM1):
            rule = MatchRule(type="signal", sender=_DBUS, interface=_DBUS, member="NameOwnerChanged")
            rule.add_arg_condition(0, name)
            rules.append(rule)
        await self._bus.Hello()
        for rule in rules:
            await self._bus.AddMatch(rule)
        for name in (SUBSCRIPTION_MANAGER, RHSM1):
            if (await self._bus.NameHasOwner(name))[0]:
                self._owners[name] = (await self._bus.GetNameOwner(name))[0]

    async def ask_for_ever(self) -> NoReturn:
        """Ask now, at each wish, and again after a failure."""
        while True:
            answered = await self._ask()
            with trio.move_on_after(float("inf") if answered else RETRY_S):
                await self._asking.wait()

    async def _ask(self) -> bool:
        """Ask the newer service, then the older one. False: one of them is there and did not say."""
        failed, told = False, self._told
        for address, method, signature, body in ((_NEW, "GetStatus", "ss", ("", "")), (_OLD, "check_status", None, ())):
            try:
                answer = await self._call(address, method, signature, body)
            except DBusErrorResponse as err:
                if err.name.removeprefix("org.freedesktop.DBus.Error.") not in _ABSENT:
                    failed = True
                    log.warning("no entitlement status service=%s error=%s", address.bus_name, str(err)[:500])
                continue
            except trio.TooSlowError:
                failed = True
                log.warning("no entitlement status service=%s error=no answer in %g s", address.bus_name, CALL_S)
                continue
            status = from_json(answer, await self._is_registered()) if address is _NEW else from_number(answer)
            if status is not None:
                if told == self._told:  # else what it told meanwhile is newer
                    await self._tell(status)
                return True
            failed = True
            log.warning("no entitlement status service=%s error=it said %.200r", address.bus_name, answer)
        await self._tell(None)
        return not failed

    async def _call(self, address: DBusAddress, method: str, signature: str | None, body: tuple[str, ...]) -> Any:
        with trio.fail_after(CALL_S):
            return unwrap_msg(await self._router.send_and_get_reply(new_method_call(address, method, signature, body)))

    async def _tell(self, status: Status | None) -> None:
        self._last = status
        await self._learn(status)

    async def hear(self, message: Message) -> None:
        """Take a signal."""
        fields, body = message.header.fields, message.body
        sender = fields.get(HeaderFields.sender, "")
        told = tuple(fields.get(field) for field in (HeaderFields.path, HeaderFields.interface, HeaderFields.member))
        match told:
            case (_, "org.freedesktop.DBus", "NameOwnerChanged") if sender == _DBUS and len(body) == 3:
                await self._owner_changed(*body)
            case (_NEW.object_path, _NEW.interface, "EntitlementChanged") if sender == self._owners.get(RHSM1):
                self._asking.wish()
            case (_OLD.object_path, _, _) if sender != self._owners.get(SUBSCRIPTION_MANAGER):
                log.warning("a signal of somebody else sender=%s", sender)
            case (_OLD.object_path, _OLD.interface, "entitlement_status_changed"):
                await self._take(from_number(body))
            case (_OLD.object_path, "org.freedesktop.DBus.Properties", "PropertiesChanged"):
                await self._take(from_properties(body, self._last))

    async def _take(self, status: Status | None) -> None:
        """The older service told by itself. Where the newer one is there, what that says counts."""
        if status is None or RHSM1 in self._owners:
            self._asking.wish()
        else:
            self._told += 1
            await self._tell(status)

    async def _owner_changed(self, name: str, old: str, new: str) -> None:
        if new:
            self._owners[name] = new
            self._asking.wish()
            return
        self._owners.pop(name, None)
        with trio.fail_after(CALL_S):
            activatable = (await self._bus.ListActivatableNames())[0]
        if name not in activatable:  # to ask would start it again each time that it ends for want of work
            self._asking.wish()
