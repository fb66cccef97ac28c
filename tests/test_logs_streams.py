"""The journal by a `journalctl` that plays entries, and the kernel's records by a pipe, as the role has them."""

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.bus import Subscription
from agent.core.events import Alert, AlertCleared, LogGap, LogMatched, LogSource
from agent.core.supervise import Health
from agent.logs import role, streams
from agent.logs.journal import kernel_record
from agent.logs.settings import LogsSettings, LogWatch
from tests.logs_records_house import FakeJournal, House, house
from tests.restarted import Restarted

FIRST_S = 30.0
RULES = r"""
version = 1
[[rule]]
id = "line"
regex = 'line (?<n>\d+)(?<_PID>)'
rate = { burst = 1000000, per_s = 0 }
[rule.context]
before = 1
"""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJournal:
    journal = FakeJournal(tmp_path / "journal")
    monkeypatch.setenv("PATH", journal.path)
    return journal


class Monitor:
    """The role with one watch on a house; it can be stopped and started again."""

    def __init__(self, here: House, folder: Path, watch: LogWatch, nursery: trio.Nursery) -> None:
        self.bus, self.told = here.bus, here.told
        self._here, self._watch = here, watch
        self._rules = folder / "rules.toml"
        self._rules.write_text(RULES)
        self._role = Restarted(nursery)

    async def start(self) -> None:
        settings = LogsSettings(rules=(str(self._rules),), watch=(self._watch,))
        here, model = self._here, self._rules.with_name("logs.model")
        start = partial(role.run, self.bus, here.store, settings, Health("logs"), model=model, metrics=here.metrics)
        await self._role.start(start)

    async def begin(self) -> None:
        """Start it for the first time: returns when records that come are new."""
        with self.bus.subscribe(LogSource) as sources:
            await self.start()
            with trio.fail_after(FIRST_S):
                assert (await anext(sources)).what == "found"

    async def stop(self) -> None:
        """Returns when it has ended."""
        await self._role.stop()

    async def source(self) -> dict[str, Any]:
        (source,) = (await self.bus.ask("list_logs", {}))["sources"]
        shown: dict[str, Any] = source
        return shown


@asynccontextmanager
async def monitor(folder: Path, **watch: bool) -> AsyncIterator[Monitor]:
    async with house(folder) as here, trio.open_nursery() as nursery:
        yield Monitor(here, folder, LogWatch(name="w", **watch), nursery)  # type: ignore[arg-type]  # both are bools
        nursery.cancel_scope.cancel()


async def texts(events: Subscription[LogMatched], count: int) -> list[str]:
    with trio.fail_after(FIRST_S):
        return [(await anext(events)).text for _ in range(count)]


# ---- the journal -----------------------------------------------------------------------------------------------------


async def test_entries_are_told_from_the_end_on(tmp_path: Path, journal: FakeJournal) -> None:
    journal.write("line 1", "line 2")
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            assert (await watching.source())["state"] == "IDLE"
            journal.write("line 3", _PID="712")
            with trio.fail_after(FIRST_S):
                event = await anext(events)
        assert (event.path, event.offset, event.captures) == ("journal:", 3, {"n": "3", "_PID": "712"})
        assert event.context
        assert (event.context.before, event.context.cut) == (("line 2",), False)
        source = await watching.source()
        assert (source["path"], source["offset"], source["generation"]) == ("journal:", 3, 1)
    assert journal.asked()[1:] == [f"--output=export --follow --no-tail --after-cursor={journal.cursor(2)}"]


async def test_after_a_restart_it_goes_on_behind_the_cursor(tmp_path: Path, journal: FakeJournal) -> None:
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            journal.write("line 1", "line 2")
            assert await texts(events, 2) == ["line 1", "line 2"]
            await watching.stop()
            journal.write("line 3")
            await watching.start()
            journal.write("line 4")
            assert await texts(events, 2) == ["line 3", "line 4"]
        told = await watching.told(LogMatched)
        assert len({event.id for event in told}) == 4
        assert [event.context.before for event in told] == [(), ("line 1",), ("line 2",), ("line 3",)]
        assert await watching.told(LogGap) == []


async def test_entries_of_an_empty_journal_are_new_even_after_a_restart(tmp_path: Path, journal: FakeJournal) -> None:
    async with monitor(tmp_path, journal=True) as watching:
        await watching.begin()
        await watching.stop()
        journal.write("line 1")
        with watching.bus.subscribe(LogMatched) as events:
            await watching.start()
            assert await texts(events, 1) == ["line 1"]


async def test_a_cursor_that_was_vacuumed_is_a_gap(tmp_path: Path, journal: FakeJournal) -> None:
    journal.write("x")
    async with monitor(tmp_path, journal=True) as watching:
        await watching.begin()
        await watching.stop()
        journal.write("line 2", "line 3")
        journal.forget(1)
        with watching.bus.subscribe(LogMatched) as events:
            await watching.start()
            assert await texts(events, 1) == ["line 3"]
        (gap,) = await watching.told(LogGap)
        assert (gap.from_, gap.to, gap.why) == (2, None, "the journal has no longer what was read last")


async def test_a_journalctl_that_ends_is_started_again(tmp_path: Path, journal: FakeJournal) -> None:
    async with monitor(tmp_path, journal=True) as watching:
        await watching.begin()
        alerts_and_more = watching.bus.subscribe(Alert, AlertCleared)
        with alerts_and_more as alerts, watching.bus.subscribe(LogMatched) as events:
            journal.write("line 1")
            assert await texts(events, 1) == ["line 1"]
            journal.end()
            with trio.fail_after(FIRST_S):
                alert = await anext(alerts)
            assert isinstance(alert, Alert)
            assert alert.code == "logs.watch.w"
            assert alert.text == "journal: cannot be followed: journalctl ended by exit code 0"
            journal.write("line 2")
            assert await texts(events, 1) == ["line 2"]
            with trio.fail_after(FIRST_S):
                assert isinstance(await anext(alerts), AlertCleared)
        assert [source.what for source in await watching.told(LogSource)] == ["found", "unreadable", "recovered"]


async def test_a_journal_that_cannot_be_read_is_told_with_what_journalctl_said(
    tmp_path: Path, journal: FakeJournal
) -> None:
    journal.fail("Failed to open journal: No such device")
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(Alert) as alerts, watching.bus.subscribe(LogSource) as sources:
            await watching.start()
            with trio.fail_after(FIRST_S):
                alert = await anext(alerts)
                assert alert.text.endswith("exit code 7: Failed to open journal: No such device")
                assert (await watching.source())["state"] == "ERROR"
                journal.work()
                assert [(await anext(sources)).what for _ in range(2)] == ["unreadable", "found"]


async def test_a_missing_journalctl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(Alert) as alerts, watching.bus.subscribe(AlertCleared) as cleared:
            await watching.start()
            with trio.fail_after(FIRST_S):
                alert = await anext(alerts)
                assert alert.text == "journal: cannot be followed: journalctl: No such file or directory"
                assert alert.remedy.startswith("Install systemd's journalctl")
                await watching.stop()
                while (await anext(cleared)).code != alert.code:
                    continue


async def test_what_is_no_export_stream_is_told_and_the_entries_before_it_are_matched(
    tmp_path: Path, journal: FakeJournal
) -> None:
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(Alert) as alerts, watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            journal.write("line 1")
            journal.write_raw(b"nonsense\r=\n")
            assert await texts(events, 1) == ["line 1"]
            with trio.fail_after(FIRST_S):
                assert "which is no field" in (await anext(alerts)).text


# ---- the kernel ------------------------------------------------------------------------------------------------------


class Kernel:
    """A pipe that keeps records apart, as /dev/kmsg does."""

    def __init__(self, folder: Path) -> None:
        self.path, self.boot = folder / "kmsg", folder / "boot_id"
        os.mkfifo(self.path)
        self.boot.write_text("boot1\n")
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)

    def write(self, *numbers: int, **fields: str) -> None:
        more = "".join(f" {name}={value}\n" for name, value in fields.items())
        for number in numbers:
            os.write(self._fd, f"6,{number},1000,-;line {number}\n{more}".encode())

    def write_raw(self, data: bytes) -> None:
        os.write(self._fd, data)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(streams, "KMSG", str(kernel.path))
    monkeypatch.setattr(streams, "BOOT_ID", str(kernel.boot))
    yield kernel
    kernel.close()


async def test_records_of_the_kernel_are_told_from_the_end_on(tmp_path: Path, kernel: Kernel) -> None:
    kernel.write(0, 1)
    async with monitor(tmp_path, kmsg=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            kernel.write(2, SUBSYSTEM="net", _PID="4")
            kernel.write_raw(b"<6>no record")
            kernel.write(3)
            with trio.fail_after(FIRST_S):
                event = await anext(events)
            assert (event.path, event.generation, event.offset) == ("kmsg:", 1, 2)
            assert event.captures == {"n": "2", "_PID": "4"}
            assert event.context
            assert (event.context.before, event.context.cut) == (("line 1",), False)
            assert await texts(events, 1) == ["line 3"]


async def test_what_the_kernel_has_still_is_told_after_a_restart_once(tmp_path: Path, kernel: Kernel) -> None:
    async with monitor(tmp_path, kmsg=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            kernel.write(0, 1)
            assert await texts(events, 2) == ["line 0", "line 1"]
            await watching.stop()
            kernel.write(0, 1, 2)  # all that it has, again
            await watching.start()
            assert await texts(events, 1) == ["line 2"]
            await watching.stop()
        assert len({event.id for event in await watching.told(LogMatched)}) == 3


async def test_a_boot_begins_a_generation_and_numbers_that_are_missing_are_a_gap(
    tmp_path: Path, kernel: Kernel
) -> None:
    async with monitor(tmp_path, kmsg=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            kernel.write(0, 5)
            assert await texts(events, 2) == ["line 0", "line 5"]
            await watching.stop()
            kernel.boot.write_text("boot2\n")
            kernel.write(2, 3)
            await watching.start()
            assert await texts(events, 2) == ["line 2", "line 3"]
        gaps = [(gap.generation, gap.from_, gap.to) for gap in await watching.told(LogGap)]
        assert gaps == [(1, 1, 5), (2, 0, 2)]
        ids = {event.id for event in await watching.told(LogMatched)}
        assert len(ids) == 4


async def test_records_that_were_overwritten_do_not_end_it(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[bytes | OSError] = [BrokenPipeError(), b"6,9,1,-;line 9\n", BlockingIOError()]

    def read(fd: int, size: int) -> bytes:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", read)
        assert [record.offset for record in streams._read(0, "boot")] == [9]
    assert results == []


async def test_a_kernel_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KMSG", str(tmp_path / "none"))
    async with monitor(tmp_path, kmsg=True) as watching:
        with watching.bus.subscribe(Alert) as alerts:
            await watching.start()
            with trio.fail_after(FIRST_S):
                alert = await anext(alerts)
        assert alert.text == f"kmsg: cannot be followed: [Errno 2] No such file or directory: '{tmp_path}/none'"
        assert alert.remedy == "Run the agent as root, or with CAP_SYSLOG; or take the watch out."


@pytest.mark.interop
async def test_the_kernel_of_this_machine_is_read() -> None:
    try:
        fd = os.open(streams.KMSG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as err:
        pytest.skip(f"{streams.KMSG}: {err.strerror}")
    try:
        first = kernel_record(os.read(fd, streams.RECORD_MAX))
        records = streams._read(fd, "boot")
    except BlockingIOError:
        pytest.skip("the kernel has no record")
    finally:
        os.close(fd)
    assert [record.offset for record in records] == sorted({record.offset for record in records} - {first.sequence})
    assert all(record.cursor == f"boot:{record.offset}" for record in records)
