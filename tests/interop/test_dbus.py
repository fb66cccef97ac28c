"""The entitlement status over a real dbus-daemon, from a service of the test's own (protocols/emissary.md, 12)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from jeepney import DBusAddress
from jeepney.io.trio import open_dbus_connection

from agent.core.bus import Bus, Subscription
from agent.core.events import EntitlementChanged
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.files import role
from agent.files.entitlement import RHSM1, SUBSCRIPTION_MANAGER
from agent.files.settings import EntitlementSettings
from tests.dbus_daemon import NEW, OLD, START_S, Daemon, Service, service

pytestmark = pytest.mark.interop


class Heard:
    def __init__(self, bus: Bus, events: Subscription[EntitlementChanged], pki: Path) -> None:
        self.bus, self.pki, self._events = bus, pki, events

    async def next(self) -> tuple[int, str]:
        with trio.fail_after(START_S):
            event = await anext(self._events)
        return event.status, event.source


@asynccontextmanager
async def agent(daemon: Daemon, folder: Path) -> AsyncIterator[Heard]:
    pki = folder / "pki"
    for name in ("entitlement", "product", "consumer"):
        (pki / name).mkdir(parents=True)
    store = open_store(folder / "state", reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            bus = Bus(store)
            settings = EntitlementSettings(bus=daemon.address)
            with bus.subscribe(EntitlementChanged) as events:
                await nursery.start(partial(role.run_entitlement, bus, store, settings, Health("entitlement"), pki=pki))
                yield Heard(bus, events, pki)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def test_the_older_service(daemon: Daemon, tmp_path: Path) -> None:
    async with service(daemon, SUBSCRIPTION_MANAGER, 0) as served, agent(daemon, tmp_path) as heard:
        assert await heard.next() == (0, SUBSCRIPTION_MANAGER)
        await served.signal(OLD, "entitlement_status_changed", "i", (4,))
        assert await heard.next() == (4, SUBSCRIPTION_MANAGER)
        row = ("RHEL", "subscribed", "")
        changed: Any = (OLD.interface, {"Status": ("i", 2), "Entitlements": ("a{s(sss)}", {"69": row})}, [])
        properties = DBusAddress(OLD.object_path, interface="org.freedesktop.DBus.Properties")
        await served.signal(properties, "PropertiesChanged", "sa{sv}as", changed)
        assert await heard.next() == (2, SUBSCRIPTION_MANAGER)
        assert (await heard.bus.ask("entitlement", {}))["entitlements"] == {"69": row}


async def test_the_newer_service_and_its_restart(daemon: Daemon, tmp_path: Path) -> None:
    invalid = {"status": "Invalid", "valid": False, "reasons": {"RHEL": ["not covered"]}, "status_id": "invalid"}
    current = {"status": "Aktuell", "valid": True, "reasons": {}}
    async with agent(daemon, tmp_path) as heard:
        assert await heard.next() == (5, "certificates")
        async with service(daemon, RHSM1, invalid) as served:
            assert await heard.next() == (1, RHSM1)
            served.status = current
            await served.signal(NEW, "EntitlementChanged")
            assert await heard.next() == (0, RHSM1)
        assert await heard.next() == (5, "certificates")  # the service is away
        async with service(daemon, RHSM1, current):
            assert await heard.next() == (0, RHSM1)


async def test_dbus_daemon_restarts(daemon: Daemon, tmp_path: Path) -> None:
    async with agent(daemon, tmp_path) as heard:
        assert await heard.next() == (5, "certificates")
        connection = await open_dbus_connection(daemon.address)  # its end is no error of this test
        async with connection:
            served = Service(connection, 0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_until_the_bus_goes, served)
                await served.take(SUBSCRIPTION_MANAGER)
                assert await heard.next() == (0, SUBSCRIPTION_MANAGER)
                await daemon.stop()
        assert await heard.next() == (5, "certificates")
        await daemon.start()
        async with service(daemon, SUBSCRIPTION_MANAGER, 1):
            assert await heard.next() == (1, SUBSCRIPTION_MANAGER)


async def serve_until_the_bus_goes(served: Service) -> None:
    with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
        await served.serve()


async def test_touching_a_certificate_asks_again(daemon: Daemon, tmp_path: Path) -> None:
    async with service(daemon, SUBSCRIPTION_MANAGER, 0) as served, agent(daemon, tmp_path) as heard:
        assert await heard.next() == (0, SUBSCRIPTION_MANAGER)
        served.status = 1  # nobody tells
        (heard.pki / "entitlement/1.pem").touch()
        assert await heard.next() == (1, SUBSCRIPTION_MANAGER)


async def test_a_signal_of_another_client_is_not_believed(daemon: Daemon, tmp_path: Path) -> None:
    async with (
        service(daemon, SUBSCRIPTION_MANAGER, 0) as served,
        service(daemon, "org.example.Forger", 0) as forger,
        agent(daemon, tmp_path) as heard,
    ):
        assert await heard.next() == (0, SUBSCRIPTION_MANAGER)
        await forger.signal(OLD, "entitlement_status_changed", "i", (5,))
        await served.signal(OLD, "entitlement_status_changed", "i", (3,))
        assert await heard.next() == (3, SUBSCRIPTION_MANAGER)
