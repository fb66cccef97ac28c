"""Rows of the sheet's table of tailing, on real files through the role: slow disks, bad files, lost events, restarts.

Rotation, cuts, restarts and copies are in test_logs_role.py and tests/faults/test_log_soak.py. Source: logs.md 5.
"""

import errno
import os
import resource
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from agent._native import lib
from agent.core.events import LogGap, LogMatched, LogSource
from agent.core.store import Store
from agent.logs import follow, tail, wake
from agent.logs.settings import LogWatch
from tests.test_logs_role import RULES, House, first, house, numbers

WAIT_S = 20.0
MOST = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
MANY = 20_000  # lines, 2 MB: more than is matched before the disk must take it, in blocks of 1 MiB


def write_much(here: House) -> None:
    with here.log.open("a") as file:
        file.writelines(f"line {n} {'x' * 100}\n" for n in range(MANY))


@asynccontextmanager
async def hanging(store: Store) -> AsyncIterator[None]:
    """Its disk hangs meanwhile."""
    await store._one_writer.acquire_on_behalf_of("the disk")
    try:
        yield
    finally:
        store._one_writer.release_on_behalf_of("the disk")


async def listed(here: House, path: Path) -> dict[str, Any]:
    sources = (await here.bus.ask("list_logs", {}))["sources"]
    return next(source for source in sources if source["path"] == str(path))


async def until(here: House, path: Path, state: str) -> dict[str, Any]:
    with trio.fail_after(WAIT_S):
        while (source := await listed(here, path))["state"] != state:
            await trio.lowlevel.checkpoint()
        return source


async def until_dropped(here: House, path: Path) -> None:
    """Wait until it is followed no more."""
    with trio.fail_after(WAIT_S):
        while str(path) in [source["path"] for source in (await here.bus.ask("list_logs", {}))["sources"]]:
            await trio.lowlevel.checkpoint()


async def test_a_slow_disk_stops_reading_and_rotation_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "LAGGING", 1 << 16)
    monkeypatch.setattr(tail, "BLOCK", 1 << 20)
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogSource) as told, here.bus.subscribe(LogMatched, limit=100_000) as events:
            async with hanging(here.store):
                write_much(here)
                source = await until(here, here.log, "PAUSED")
                assert source["lag"] > 1 << 16
                assert [(await first(told)).what for _ in range(2)] == ["found", "lagging"]
                pending = here.store._pending_bytes
                assert pending < 4 << 20
                here.log.rename(f"{here.log}.1")
                here.write(MANY)
                while (event := await first(told)).what != "rotated":
                    assert event.what == "lagging"
                assert here.store._pending_bytes < pending + 4096
            assert await numbers(events, MANY + 1) == [str(n) for n in range(MANY + 1)]
            while (event := await first(told)).what != "recovered":
                assert event.what in ("lagging", "found")
        assert await here.journal(LogGap) == []


async def test_deleted_files_that_hold_too_much_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "MAX_HELD", 1 << 16)
    monkeypatch.setattr(tail, "BLOCK", 1 << 20)
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogGap) as gaps:
            async with hanging(here.store):
                write_much(here)
                offset = (await until(here, here.log, "PAUSED"))["offset"]
                size = here.log.stat().st_size
                here.log.unlink()
                gap = await first(gaps)
            assert (gap.generation, gap.from_, gap.to) == (1, offset, None)
            assert gap.why == f"deleted, and too much is waiting: {size - offset} bytes were there"
        assert (await until(here, here.log, "ABSENT"))["lag"] == 0


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device", "socket"])
async def test_what_is_no_file_is_told_and_does_no_harm(tmp_path: Path, kind: str) -> None:
    async with house(tmp_path) as here:
        bad = tmp_path / "logs/bad"
        match kind:
            case "FIFO":
                os.mkfifo(bad)
            case "directory":
                bad.mkdir()
            case "device":
                bad.symlink_to("/dev/zero")
            case "socket":
                with trio.socket.socket(trio.socket.AF_UNIX) as socket:
                    await socket.bind(str(bad))
        with here.bus.subscribe(LogSource) as told, here.bus.subscribe(LogMatched) as events:
            await here.start(LogWatch(name="bad", path=str(bad)), LogWatch(name="a", path=str(here.log)))
            event = await first(told)
            assert (event.path, event.what, event.detail) == (str(bad), "unreadable", f"is a {kind}")
            assert (await listed(here, bad))["state"] == "ERROR"
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            bad.rename(bad.with_name("gone"))
            bad.write_text("line 2\n")  # it is looked at again
            assert await numbers(events, 1) == ["2"]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
async def test_permission_that_is_lost_in_mid_file_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogSource) as told, here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            pread, open_ = os.pread, os.open

            def refused(*args: Any, **more: Any) -> Any:
                raise OSError(error, os.strerror(error))

            unread = SimpleNamespace(read_news=lambda *_: 0, file_in_memory=lib.file_in_memory)
            monkeypatch.setattr(follow, "lib", unread)
            monkeypatch.setattr(os, "pread", refused)
            monkeypatch.setattr(os, "open", refused)
            here.write(2)
            with trio.fail_after(WAIT_S):
                while (await first(told)).what != "unreadable":
                    pass
            monkeypatch.setattr(os, "pread", pread)
            monkeypatch.setattr(os, "open", open_)
            assert (await first(told)).what == "recovered"
            here.write(3)
            assert await numbers(events, 2) == ["2", "3"]
        assert await here.journal(LogGap) == []
        assert len({event.id for event in await here.journal(LogMatched)}) == 3


async def test_a_line_of_256_mib_takes_no_memory_and_hides_nothing(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with here.log.open("wb") as file:
                file.write(b"line 1 ")
                file.seek(1 << 28)
                file.write(b" line 2\nline 3\n")
            with trio.fail_after(3 * WAIT_S):
                told = [await anext(events) for _ in range(2)]
        assert [(event.captures["n"], event.offset) for event in told] == [("1", 0), ("3", (1 << 28) + 8)]
        assert set(told[0].flags) == {"window", "nul"}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


async def test_an_overflow_of_inotify_has_everything_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "POLL_S", 1000)
    names = [tmp_path / "logs/x", tmp_path / "logs/y"]
    async with house(tmp_path) as here:
        for name in names:
            name.touch()
        await here.start(LogWatch(name="all", glob=f"{tmp_path}/logs/*.log"))
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            for number in range(MOST + 1):  # equal events in a row are told once: two names in turn
                os.chmod(names[number % 2], 0o600)
            here.write(2)
            here.write(3, name="new.log")
            assert sorted(map(str, await numbers(events, 2))) == ["2", "3"]
            for number in range(MOST + 1):
                os.chmod(names[number % 2], 0o600)
            here.log.unlink()
            here.write(4)  # and others perhaps before it: the queue is full
            assert await numbers(events, 1) == ["4"]
        (gap,) = await here.journal(LogGap)
        assert (gap.path, gap.why) == (str(here.log), "a file came and went before it was looked at")


async def test_two_watches_of_a_path_follow_it_once(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write(1)
        await here.start(LogWatch(name="a", path=str(here.log)), LogWatch(name="all", glob=f"{tmp_path}/logs/*.log"))
        asked = {"path": str(here.log), "from": "start", "rules": [{"id": "mine", "regex": "line"}]}
        with here.bus.subscribe(LogMatched) as events:
            assert await here.bus.ask("watch_log", asked) == {"watch": "m1", "sources": 1}
            here.write(2)
            told = [await first(events) for _ in range(3)]
            assert sorted((event.rule, event.offset) for event in told) == [("line", 7), ("mine", 0), ("mine", 7)]
            assert len((await here.bus.ask("list_logs", {}))["sources"]) == 1
            await here.bus.ask("unwatch_log", {"watch": "m1"})
            here.write(3)
            assert (await first(events)).rule == "line"
        assert len(await here.journal(LogMatched)) == 4


async def test_the_generation_before_is_known_after_a_restart(tmp_path: Path) -> None:
    rules = RULES + "[rule.context]\nuntil = 'begin (?<n>\\d+)'\nsame = ['n']\n"
    async with house(tmp_path, rules) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events, here.bus.subscribe(LogSource) as told:
            here.log.write_text("begin 7\nline 1\n")
            assert await numbers(events, 1) == ["1"]
            here.log.rename(f"{here.log}.1")
            here.write(2)
            assert await numbers(events, 1) == ["2"]
            while (await first(told)).generation < 2:
                pass
    async with house(tmp_path, rules) as here:
        await here.start()
        with here.bus.subscribe(LogMatched) as events:
            here.write(7)
            context = (await first(events)).context
            assert context
            assert [anchor.text for anchor in context.anchors] == ["begin 7"]


async def test_a_glob_takes_no_rotated_file_for_a_new_one_and_lets_go_of_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.05)
    monkeypatch.setattr(tail, "QUIET_S", 0.1)
    watch = LogWatch(name="all", glob=f"{tmp_path}/logs/*.log*")
    async with house(tmp_path) as here:
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            here.log.rename(f"{here.log}.2")
            here.write(2)
            assert await numbers(events, 1) == ["2"]
            shutil.copy(here.log, f"{here.log}.1")
            os.truncate(here.log, 0)
            here.write(3)
            assert await numbers(events, 1) == ["3"]
            here.write(4, name="b.log")
            assert await numbers(events, 1) == ["4"]
            (tmp_path / "logs/b.log").unlink()
            await until_dropped(here, tmp_path / "logs/b.log")
    async with house(tmp_path) as here:
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            here.write(5)
            assert await numbers(events, 1) == ["5"]
        assert {event.path for event in await here.journal(LogMatched)} == {str(here.log), f"{tmp_path}/logs/b.log"}
        assert len(await here.journal(LogMatched)) == 5


async def test_files_of_a_glob_that_were_gone_at_the_start_are_read_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.05)
    monkeypatch.setattr(tail, "QUIET_S", 0.1)
    watch = LogWatch(name="all", glob=f"{tmp_path}/logs/*.log")
    renamed, deleted = tmp_path / "logs/a.log", tmp_path / "logs/b.log"
    async with house(tmp_path) as here:
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            here.write(1, name="b.log")
            assert await numbers(events, 2) == ["1", "1"]
    renamed.rename(tmp_path / "logs/a.log.1")
    here.write(2, name="a.log.1")
    deleted.unlink()
    async with house(tmp_path) as here:
        with here.bus.subscribe(LogMatched) as events, here.bus.subscribe(LogGap) as gaps:
            await here.start(watch)
            assert await numbers(events, 1) == ["2"]
            gap = await first(gaps)
        assert (gap.path, gap.from_, gap.to, gap.why) == (str(deleted), 7, None, "gone while no agent ran")
        await until_dropped(here, deleted)
        assert len(await here.journal(LogGap)) == 1


async def test_the_first_file_of_a_path_may_come_and_be_rotated_while_no_agent_runs(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start()
    here.write(1)
    here.log.rename(f"{here.log}.1")
    here.write(2)
    async with house(tmp_path) as here:
        with here.bus.subscribe(LogMatched) as events:
            await here.start()
            assert await numbers(events, 2) == ["1", "2"]


async def test_files_of_a_glob_may_come_and_be_rotated_while_no_agent_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.05)
    monkeypatch.setattr(tail, "QUIET_S", 0.1)
    watch = LogWatch(name="all", glob=f"{tmp_path}/logs/*.log")

    def rotate(name: str) -> None:
        (tmp_path / "logs" / name).rename(tmp_path / "logs" / f"{name}.1")

    async with house(tmp_path) as here:
        here.write(0, name="old.log")
        rotate("old.log")  # before all: it was never watched
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
    here.write(2, name="b.log")
    rotate("b.log")
    here.write(3, name="c.log")
    rotate("c.log")
    here.write(4, name="c.log")
    for due in ("2", "3", "4", "5"), ("5",):
        async with house(tmp_path) as here:
            with here.bus.subscribe(LogMatched) as events:
                await here.start(watch)
                here.write(5)
                assert sorted(map(str, await numbers(events, len(due)))) == [*due]
            await until_dropped(here, tmp_path / "logs/b.log")
            told = [event for event in await here.journal(LogMatched) if event.captures["n"] != "5"]
            paths = [f"{tmp_path}/logs/{name}.log" for name in "abcc"]
            assert sorted((event.captures["n"], event.path) for event in told) == list(zip("1234", paths, strict=True))
            gaps = [(gap.path, gap.why) for gap in await here.journal(LogGap)]
            assert sorted(gaps) == [(path, "rotated before it was seen") for path in paths[1:3]]


async def test_logs_that_begin_alike_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.05)
    watch = LogWatch(name="all", glob=f"{tmp_path}/logs/*.log*")
    async with house(tmp_path) as here:
        here.write(1)
        await here.start(watch)
        with here.bus.subscribe(LogMatched) as events:
            for name in ("b.log", "a-1.log", "b-1.log", "c.log.1"):  # some named as rotations are
                here.write(1, name=name)
            assert len(await numbers(events, 2)) == 2  # b.log and c.log.1; the others may become copies
            here.write(2, name="a-1.log")
            here.write(2, name="b-1.log")
            assert sorted(map(str, await numbers(events, 4))) == ["1", "1", "2", "2"]
            here.log.unlink()  # what another log has is none of its rest
            here.write(3, name="b.log")
            assert await numbers(events, 1) == ["3"]
            here.write(4, name="c.log.1")
            assert await numbers(events, 1) == ["4"]


async def test_a_file_that_came_and_went_before_a_look_is_told(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.start(LogWatch(name="x", path=str(here.log)))
        with here.bus.subscribe(LogMatched) as events, here.bus.subscribe(LogGap) as gaps:
            here.write(1)
            assert await numbers(events, 1) == ["1"]
            here.log.unlink()
            here.write(2)
            here.log.unlink()
            gap = await first(gaps)
            assert (gap.path, gap.to, gap.why) == (str(here.log), None, "a file came and went before it was looked at")
