"""agent/coverage/sources/jacoco.py against an agent of JaCoCo that the test plays.

The real one: tests/interop/test_jacoco.py.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from agent.coverage.catalog import Catalog, Delta
from agent.coverage.jacoco import HEADER, Executed
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Source, Warned
from agent.coverage.sources.jacoco import Jacoco
from tests.test_coverage_jacoco import SESSION, executed

VALVE = Executed(0xA1, "com/acme/Valve", 3, 0b001)
MAIN = Executed(0xB2, "Main", 2, 0b11)


class Jvm:
    """What listens. Each dump is the next of `dumps`, all bytes of it; None hangs up instead, at the end of all too."""

    def __init__(self, *dumps: bytes | None) -> None:
        self.dumps = list(dumps)
        self.address = ""
        self.listens = trio.CancelScope()
        self.connections = 0
        self.is_left = trio.Event()  # the other side has said all
        self.hangs_up = trio.Event()  # it does then, not before
        self.hangs_up.set()
        self.commands: list[bytes] = []
        self._stream: trio.SocketStream | None = None
        self._came = trio.Event()

    async def listen(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        with self.listens:
            await trio.serve_listeners(self.serve, listeners, task_status=task_status)

    async def connected(self, times: int) -> None:
        with trio.fail_after(60):
            while self.connections < times:
                await self._came.wait()

    async def end(self, dump: bytes, *, is_last: bool = True) -> None:
        """The JVM ends: who is connected gets what ran since the last dump, or nothing where it is killed.

        The next is there at once, unless this was the last.
        """
        assert self._stream is not None
        await self._stream.send_all(dump)
        await self._stream.send_eof()
        if is_last:
            self.listens.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        heard = b""
        await stream.send_all(HEADER)
        self._stream = stream
        self.connections += 1
        self._came.set()
        self._came = trio.Event()
        async with stream:
            async for data in stream:
                heard += data
                while len(heard) >= 8:
                    assert heard[:5] == HEADER
                    self.commands.append(heard[5:8])
                    heard = heard[:5] + heard[8:]
                    dump = self.dumps.pop(0) if self.dumps else None
                    if dump is None:
                        return
                    await stream.send_all(dump)
            self.is_left.set()
            await self.hangs_up.wait()


def dumped(*classes: Executed) -> bytes:
    return SESSION + b"".join(map(executed, classes)) + b"\x20"


@asynccontextmanager
async def source_of(*jvms: Jvm) -> AsyncIterator[tuple[Jacoco, Catalog]]:
    async with trio.open_nursery() as nursery:
        for jvm in jvms:
            await nursery.start(jvm.listen)
        catalog = Catalog()
        source = Jacoco(CoverageSettings(jacoco=tuple(jvm.address for jvm in jvms)), catalog, Path())
        yield source, catalog
        await source.stop()
        nursery.cancel_scope.cancel()


async def test_what_ran_before_the_start_does_not_count_but_is_known() -> None:
    jvm = Jvm(dumped(VALVE), dumped(), dumped(VALVE, MAIN))
    async with source_of(jvm) as (jacoco, catalog):
        source: Source = jacoco
        await source.prepare([])
        assert source.env() == {}
        await source.start()
        assert source.alive()
        assert [*catalog.units] == ["com/acme/Valve"]
        assert await source.collect() == []
        assert source.why_empty() == "No class ran that JaCoCo covers."
        assert await source.collect(final=True) == [Delta("com/acme/Valve", 0b001), Delta("./Main", 0b11)]
        assert (source.why_empty(), source.told()) == ("", [])
        unit = catalog.units["com/acme/Valve"]
        assert [(method.name, method.probes, method.checksum) for method in unit.methods] == [
            ("<class>", (0, 1, 2), "00000000000000a1")
        ]
        assert (unit.lines, unit.file) == ((0, 0, 0), None)
        assert jvm.commands == [b"\x40\x01\x01"] * 3
        await source.stop()
        assert not source.alive()


async def test_one_more_session_does_not_drop_what_is_there() -> None:
    async with source_of(Jvm(dumped(), dumped(VALVE))) as (source, _):
        await source.start()
        await source.start()
        assert await source.collect() == [Delta("com/acme/Valve", 1)]


async def test_an_agent_that_has_gone_is_told_and_asked_again() -> None:
    jvm = Jvm(dumped(), None, dumped(MAIN))
    async with source_of(jvm) as (source, _):
        await source.start()
        assert await source.collect() == []
        assert not source.alive()
        (warned,) = source.told()
        assert isinstance(warned, Warned)
        assert "it has ended; what it ran last is not known" in warned.text
        assert await source.collect() == [Delta("./Main", 0b11)]
        assert source.told() == []


async def test_what_runs_until_a_jvm_ends_is_told_by_it() -> None:
    jvm = Jvm(dumped(), dumped(VALVE))
    async with source_of(jvm) as (source, _):
        await source.start()
        assert await source.collect() == [Delta("com/acme/Valve", 1)]
        await jvm.connected(3)
        await jvm.end(dumped(MAIN))
        assert await source.collect(final=True) == [Delta("./Main", 0b11)]
        assert not source.alive()
        assert await source.collect() == []
        assert (source.told(), source.why_empty()) == ([], "")  # that it is gone now is no news


async def test_a_jvm_that_is_killed_has_not_told_all() -> None:
    jvm = Jvm(dumped(), dumped(VALVE))
    async with source_of(jvm) as (source, _):
        await source.start()
        await source.collect()
        await jvm.connected(3)
        await jvm.end(b"")
        assert await source.collect() == []
        (warned,) = source.told()
        assert isinstance(warned, Warned)
        assert "it has ended; what it ran last is not known" in warned.text
        assert not warned.passes


async def test_jvms_that_live_from_one_look_to_the_next_are_reached_one_after_the_other() -> None:
    jvm = Jvm(dumped())
    async with source_of(jvm) as (source, _), trio.open_nursery() as nursery:
        await source.start()
        nursery.start_soon(source.attend)
        await jvm.connected(2)
        await jvm.end(dumped(VALVE), is_last=False)
        await jvm.connected(3)
        await jvm.end(dumped(MAIN))
        assert await source.collect(final=True) == [Delta("com/acme/Valve", 1), Delta("./Main", 0b11)]
        assert source.told() == []
        nursery.cancel_scope.cancel()


async def test_a_look_that_is_given_up_leaves_no_connection_open() -> None:
    jvm = Jvm(b"")
    jvm.hangs_up = trio.Event()
    async with source_of(jvm) as (source, _), trio.open_nursery() as nursery:
        nursery.start_soon(source.start)
        await jvm.connected(1)
        await wait_all_tasks_blocked()
        stream, theirs = source._agents[0]._stream, jvm._stream
        assert stream is not None
        assert theirs is not None
        await theirs.send_all(dumped(VALVE))
        with trio.fail_after(60):
            await jvm.is_left.wait()  # it has told all, and is waited for to hang up
        nursery.cancel_scope.cancel()
    assert stream.socket.fileno() == -1


async def test_what_came_before_it_broke_counts() -> None:
    async with source_of(Jvm(dumped(), SESSION + executed(VALVE) + b"\x12")) as (source, _):
        await source.start()
        assert await source.collect() == [Delta("com/acme/Valve", 0b001)]
        (warned,) = source.told()
        assert isinstance(warned, Warned)
        assert "byte 0x12 where a block was expected" in warned.text


async def test_one_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.coverage.sources.jacoco.MOST_EXECUTED", 2)
    async with source_of(Jvm(dumped(), SESSION + executed(VALVE) * 3)) as (source, _):
        await source.start()
        assert await source.collect() == [Delta("com/acme/Valve", 1), Delta("com/acme/Valve", 1)]
        (warned,) = source.told()
        assert isinstance(warned, Warned)
        assert "it tells of more than 2 classes" in warned.text


async def test_nobody_there_is_told_once_and_is_the_reason() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    await listener.aclose()
    source = Jacoco(CoverageSettings(jacoco=(address,)), Catalog(), Path())
    await source.start()
    assert await source.collect() == []
    (warned,) = source.told()
    assert isinstance(warned, Warned)
    assert warned.text == f"JaCoCo's agent at {address}: Connection refused; it is asked again at each look."
    assert warned.passes
    assert await source.collect() == []
    assert source.told() == []
    assert source.why_empty() == f"JaCoCo's agent at {address}: Connection refused."
    assert not source.alive()


async def test_one_that_is_slow_is_read_on_at_the_next_look(autojump_clock: MockClock) -> None:
    slow = Jvm(dumped(), b"")
    async with source_of(slow) as (source, _):
        await source.start()
        assert await source.collect() == []
        assert trio.current_time() == pytest.approx(5)
        assert source.alive()
        (warned,) = source.told()
        assert isinstance(warned, Warned)
        assert "no answer within 5 s" in warned.text
        assert await source.collect() == []
        assert len(slow.commands) == 2  # no third before the second is answered


async def test_all_agents_are_asked_and_classes_told_apart() -> None:
    other = Executed(0xC3, "Main", 4, 0b1000)
    async with source_of(Jvm(dumped(), dumped(MAIN)), Jvm(dumped(), dumped(other))) as (source, catalog):
        await source.start()
        found = await source.collect()
        names = {delta.class_id for delta in found}
        assert names in ({"./Main", "./Main@00000000000000c3"}, {"./Main", "./Main@00000000000000b2"})
        assert {catalog.units[delta.class_id].probe_count: delta.probes for delta in found} == {2: 0b11, 4: 0b1000}


async def test_one_class_with_two_numbers_of_probes_is_lost_and_told_once() -> None:
    strange = Executed(MAIN.id, MAIN.name, 9, 1)
    async with source_of(Jvm(dumped(MAIN), dumped(strange), dumped(strange))) as (source, _):
        await source.start()
        assert await source.collect() == []
        assert await source.collect() == []
        assert source.told() == [Lost(1, "class Main has two numbers of probes")]


async def test_more_classes_than_can_be_held_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.coverage.sources.jacoco.MOST_CLASSES", 1)
    async with source_of(Jvm(dumped(MAIN), dumped(VALVE, MAIN))) as (source, _):
        await source.start()
        assert await source.collect() == [Delta("./Main", 0b11)]
        assert source.told() == [Lost(1, "class com/acme/Valve is one more than 1")]
