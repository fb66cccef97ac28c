"""The conversation with the D-Bus services, on a bus of the test's own: what is asked, heard, and not believed."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.core.errors import unwrap
from agent.files import services
from agent.files.entitlement import RHSM1, SUBSCRIPTION_MANAGER, Status
from agent.files.services import RETRY_S, Asking, BusAway, converse
from tests.dbus_bus import OWNER, Answer, FakeBus, fake_bus

OLD_PATH, OLD = "/EntitlementStatus", "com.redhat.SubscriptionManager.EntitlementStatus"
NEW_PATH, NEW = "/com/redhat/RHSM1/Entitlement", "com.redhat.RHSM1.Entitlement"
ABSENT = "org.freedesktop.DBus.Error.ServiceUnknown"


def rhsm1(word: str) -> Answer:
    return lambda name, member, body: ("s", (json.dumps({"status": word}),)) if name == RHSM1 else ABSENT


def subscription_manager(number: int) -> Answer:
    return lambda name, member, body: ("i", (number,)) if name == SUBSCRIPTION_MANAGER else ABSENT


class Talk:
    """A conversation under way; `next()` is what was learned next."""

    def __init__(self, bus: FakeBus) -> None:
        self.bus, self.asking = bus, Asking()
        self._send, self._learned = trio.open_memory_channel[Status | None](100)
        self.error: BaseException | None = None
        self.over = trio.Event()

    async def run(self) -> None:
        async def registered() -> bool:
            return True

        try:
            await converse(self.bus.address, self.asking, self._send.send, registered)
        except* BusAway as group:
            self.error = unwrap(group)
        self.over.set()

    async def next(self) -> tuple[int, str] | None:
        status = await self._learned.receive()
        return None if status is None else (status.status, status.source)

    async def quiet(self) -> None:
        """Nothing was learned, though all was heard."""
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.WouldBlock):
            self._learned.receive_nowait()


@asynccontextmanager
async def talking(folder: Path, answer: Answer, *owned: str) -> AsyncIterator[Talk]:
    async with fake_bus(folder, answer) as bus, trio.open_nursery() as nursery:
        bus.owners |= dict.fromkeys(owned, OWNER)
        talk = Talk(bus)
        nursery.start_soon(talk.run)
        yield talk
        nursery.cancel_scope.cancel()


async def test_the_newer_service_is_asked_first(tmp_path: Path) -> None:
    async with talking(tmp_path, rhsm1("Current"), RHSM1) as talk:
        assert await talk.next() == (0, RHSM1)
        assert talk.bus.calls == [(RHSM1, "GetStatus", ("", ""))]
        talk.asking.wish()
        assert await talk.next() == (0, RHSM1)


async def test_then_the_older_one_and_then_nobody_knows(tmp_path: Path) -> None:
    async with talking(tmp_path, subscription_manager(4)) as talk:
        assert await talk.next() == (4, SUBSCRIPTION_MANAGER)
        assert [call[1] for call in talk.bus.calls] == ["GetStatus", "check_status"]
    (tmp_path / "bus").unlink()
    async with talking(tmp_path, lambda *call: ABSENT) as talk:
        assert await talk.next() is None


async def test_its_signals_are_believed_without_asking(tmp_path: Path) -> None:
    async with talking(tmp_path, subscription_manager(0), SUBSCRIPTION_MANAGER) as talk:
        assert await talk.next() == (0, SUBSCRIPTION_MANAGER)
        await talk.bus.signal(OLD_PATH, OLD, "entitlement_status_changed", "i", (5,))
        assert await talk.next() == (5, SUBSCRIPTION_MANAGER)
        changed: Any = (OLD, {"Status": ("i", 1)}, [])
        await talk.bus.signal(OLD_PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", changed)
        assert await talk.next() == (1, SUBSCRIPTION_MANAGER)
        await talk.bus.signal(OLD_PATH, OLD, "entitlement_status_changed", "s", ("nonsense",))
        assert await talk.next() == (0, SUBSCRIPTION_MANAGER)  # asked again


async def test_where_both_are_there_the_newer_one_counts(tmp_path: Path) -> None:
    async with talking(tmp_path, rhsm1("Invalid"), RHSM1, SUBSCRIPTION_MANAGER) as talk:
        assert await talk.next() == (1, RHSM1)
        await talk.bus.signal(OLD_PATH, OLD, "entitlement_status_changed", "i", (0,))
        assert await talk.next() == (1, RHSM1)
        await talk.bus.signal(NEW_PATH, NEW, "EntitlementChanged")
        assert await talk.next() == (1, RHSM1)


async def test_a_forged_signal_is_not_believed(tmp_path: Path) -> None:
    async with talking(tmp_path, subscription_manager(0), SUBSCRIPTION_MANAGER) as talk:
        assert await talk.next() == (0, SUBSCRIPTION_MANAGER)
        await talk.bus.signal(OLD_PATH, OLD, "entitlement_status_changed", "i", (5,), sender=":1.99")
        await talk.bus.signal("/elsewhere", OLD, "entitlement_status_changed", "i", (5,))
        await talk.bus.signal(
            "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameOwnerChanged", "sss",
            (SUBSCRIPTION_MANAGER, OWNER, ":1.99"), sender=":1.99",
        )  # fmt: skip
        await talk.quiet()
        assert len(talk.bus.calls) == 2


async def test_a_service_that_comes_is_asked_and_one_that_goes_only_where_that_starts_nothing(tmp_path: Path) -> None:
    async with talking(tmp_path, rhsm1("Current")) as talk:
        assert await talk.next() == (0, RHSM1)
        await talk.bus.own(RHSM1, OWNER)
        assert await talk.next() == (0, RHSM1)
        talk.bus.activatable = [RHSM1]
        await talk.bus.own(RHSM1, "")
        await talk.quiet()
        await talk.bus.own(RHSM1, OWNER)
        assert await talk.next() == (0, RHSM1)
        talk.bus.activatable = []
        await talk.bus.own(RHSM1, "")
        assert await talk.next() == (0, RHSM1)


@pytest.mark.parametrize("answer", [("s", ("no json",)), ("i", (7,)), "com.redhat.RHSM1.Error", None])
async def test_a_service_that_fails_is_asked_again_a_minute_later(
    answer: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with talking(tmp_path, lambda name, *call: answer if name == RHSM1 else ABSENT, RHSM1) as talk:
        assert await talk.next() is None
        began = trio.current_time()
        assert await talk.next() is None
        assert trio.current_time() - began >= RETRY_S


@pytest.mark.parametrize("wire", [b"\0" * 64, b"l\x09\x00\x01" + b"\xff" * 60, b"l" * 5000])
async def test_what_is_no_d_bus_ends_the_conversation(wire: bytes, tmp_path: Path) -> None:
    async with talking(tmp_path, rhsm1("Current")) as talk:
        assert await talk.next() == (0, RHSM1)
        await talk.bus.raw(wire)
        with trio.move_on_after(0.2):  # a length of 4 GiB is waited for
            await talk.over.wait()
            assert talk.error is not None


async def test_a_bus_that_goes_ends_the_conversation(tmp_path: Path) -> None:
    async with talking(tmp_path, rhsm1("Current")) as talk:
        assert await talk.next() == (0, RHSM1)
        talk.bus.hang_up()
        await talk.over.wait()
        assert isinstance(talk.error, BusAway)


@pytest.mark.parametrize("greeting", [b"", b"REJECTED EXTERNAL\r\n", b"x" * 9000])
async def test_a_bus_that_does_not_let_us_in(
    greeting: bytes, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(bus: FakeBus, stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if greeting:
            await stream.send_all(greeting)
        await trio.sleep_forever()

    monkeypatch.setattr(FakeBus, "serve", refuse)
    async with talking(tmp_path, rhsm1("Current")) as talk:
        await talk.over.wait()
        assert isinstance(talk.error, BusAway)
        assert trio.current_time() <= services.CALL_S


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/bus", "tcp:host=localhost,port=1", "nonsense"])
async def test_an_address_where_nobody_is(address: str, tmp_path: Path) -> None:
    bus = FakeBus(tmp_path / "bus", rhsm1("Current"))
    bus.address = address
    talk = Talk(bus)
    await talk.run()
    assert isinstance(talk.error, BusAway)
