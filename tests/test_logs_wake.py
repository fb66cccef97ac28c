"""What wakes the logs: the look at all paths without inotify, globs, and nothing at all where nothing is followed."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from inotify_simple import INotify
from trio.testing import MockClock

from agent._native import ffi, lib
from agent.core.supervise import HUNG_S, Health
from agent.logs import paths, wake
from agent.logs.acts import Gap
from agent.logs.follow import DISK, Blocks, Followed
from agent.logs.paths import Globs
from agent.logs.tail import Tail
from agent.logs.wake import Follower
from tests.test_logs_follow import Taking, has_room

if TYPE_CHECKING:
    from agent._native import CData

WAIT_S = 20.0


@contextmanager
def no_inotify() -> Iterator[INotify | None]:
    yield None


def log(path: Path, taking: Taking, blocks: Blocks) -> Followed:
    taking.tail = Tail(str(path), start="start")
    return Followed(taking.tail, taking, Health("logs"), links=True, room=has_room, blocks=blocks)


async def until(taking: Taking, text: bytes) -> None:
    with trio.fail_after(WAIT_S):
        while taking.text != text:
            await trio.lowlevel.checkpoint()


async def comes(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT_S  # also where the loop's time stands still
    while not condition():
        assert time.monotonic() < limit
        await trio.lowlevel.checkpoint()


async def watches(follower: Follower, *folders: Path) -> None:
    """Returns when it does, and is about to watch no other."""
    await comes(lambda: list(follower._folders.values()) == list(map(str, folders)) and not follower._watching)


async def knows_all_places(follower: Follower) -> None:
    await comes(lambda: follower._places.keys() == {*follower._looks, *follower._sought} and not follower._watching)


def is_below(folder: Path, look: "CData") -> bool:
    """Else a thread asks that an earlier test has left."""
    path: bytes = ffi.string(look.path)
    return path.startswith(os.fsencode(folder))


def changed(*looks: "CData") -> list[int]:
    again, numbers = ffi.new("struct look *[]", list(looks)), ffi.new("uint32_t[]", len(looks))
    return ffi.unpack(numbers, lib.look_again(again, len(looks), numbers))


def test_a_look_tells_of_which_paths_there_is_something_new(tmp_path: Path) -> None:
    texts = [ffi.new("char[]", os.fsencode(tmp_path / name)) for name in ("a", "b", "none")]
    looks = [ffi.new("struct look *", {"path": text}) for text in texts]
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert changed(*looks) == [0, 1, 2]
    assert changed(*looks) == []
    (tmp_path / "b").write_bytes(b"12")
    assert changed(*looks) == [1]
    os.utime(tmp_path / "a", ns=(1, 1))
    (tmp_path / "none").mkdir()
    assert changed(*looks) == [0, 2]
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "a").write_bytes(b"1")
    os.utime(tmp_path / "a", ns=(1, 1))
    (tmp_path / "none").rmdir()
    assert changed(*looks) == [0, 2]
    assert changed() == []


async def test_without_inotify_what_changed_is_seen_by_a_look(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "open_inotify", no_inotify)
    monkeypatch.setattr(wake, "POLL_S", 0.05)
    found: list[dict[str, list[str]]] = []

    async def rescan(files: dict[str, list[str]]) -> None:
        found.append(files)

    follower, takings = Follower(rescan, Health("logs")), {name: Taking() for name in ("a.log", "b.log")}
    await nursery.start(follower.run)
    pattern = f"{tmp_path}/*.log"
    follower.seek(pattern)
    sources = {name: log(tmp_path / name, taking, follower.blocks) for name, taking in takings.items()}
    for source in sources.values():
        follower.add(source)
        with trio.fail_after(WAIT_S):
            await follower.hears(source)
        nursery.start_soon(source.run)
    (tmp_path / "a.log").write_bytes(b"one\n")
    await until(takings["a.log"], b"one\n")
    with (tmp_path / "a.log").open("ab") as file:
        file.write(b"two\n")
    (tmp_path / "b.log").write_bytes(b"three\n")
    await until(takings["a.log"], b"one\ntwo\n")
    await until(takings["b.log"], b"three\n")
    with trio.fail_after(WAIT_S):
        while found[-1] != {pattern: [f"{tmp_path}/a.log", f"{tmp_path}/b.log"]}:
            await trio.lowlevel.checkpoint()
        follower.seek_no_more(pattern)
        follower.drop(sources["b.log"])
        while found[-1] != {}:
            await trio.lowlevel.checkpoint()


async def test_once_a_path_is_heard_of_nothing_comes_and_goes_unseen(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    follower, takings = Follower(rescan, Health("logs")), [Taking(), Taking()]
    await nursery.start(follower.run)
    paths = [tmp_path / "a.log", tmp_path / "b.log"]  # of one folder, which is watched once
    sources = [log(path, taking, follower.blocks) for path, taking in zip(paths, takings, strict=True)]
    with trio.fail_after(WAIT_S):
        for source in sources:
            follower.add(source)
        for path, source, taking in zip(paths, sources, takings, strict=True):
            await follower.hears(source)
            nursery.start_soon(source.run)
            await source.begun.wait()
            path.write_bytes(b"one\n")
            path.unlink()
            while Gap(0, 0, None, "a file came and went before it was looked at") not in taking.told:
                await trio.lowlevel.checkpoint()


async def test_where_nothing_is_followed_nothing_wakes(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.0)
    found: list[dict[str, list[str]]] = []

    async def rescan(files: dict[str, list[str]]) -> None:
        found.append(files)

    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    for _ in range(20):  # it would have had the time
        await trio.to_thread.run_sync(os.getpid)
    assert not found
    follower.seek("/nowhere/*")
    with trio.fail_after(WAIT_S):
        while not found:
            await trio.lowlevel.checkpoint()


async def test_what_is_new_before_a_look_begins_is_looked_at_at_once(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "POLL_S", 3600.0)
    patterns = [f"{tmp_path}/{name}*" for name in "abc"]
    found: list[dict[str, list[str]]] = []

    async def rescan(files: dict[str, list[str]]) -> None:
        found.append(files)
        if patterns:
            follower.seek(patterns.pop(0))

    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    follower.seek(patterns.pop(0))
    with trio.fail_after(WAIT_S):
        while not found or len(found[-1]) < 3:
            await trio.lowlevel.checkpoint()


def test_a_look_comes_back_when_there_is_something_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "POLL_S", 0.0)
    waits: list[float | None] = []

    class New(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:  # type: ignore[explicit-override]  # typing's needs 3.12
            waits.append(timeout)
            return super().wait(timeout)

    source, new, pattern = log(tmp_path / "log", Taking(), Blocks()), New(), f"{tmp_path}/*"
    path = ffi.new("char[]", os.fsencode(tmp_path / "log"))
    looks = [(ffi.new("struct look *", {"path": path}), path)]
    found: dict[str, list[str]] = {}

    def look(patterns: list[str]) -> tuple[int, list[int]]:
        """How often it looked, and the numbers of the paths where something changed."""
        nonlocal found
        waits.clear()
        found, changed = wake._look(Globs(), patterns, [source], looks, found, new, at_once=False)
        return len(waits), changed

    source.is_waiting = False
    assert look([]) == (1, [0])
    assert look([]) == (wake.RESCAN, [])
    assert look([pattern]) == (1, [])
    assert look([pattern]) == (wake.RESCAN, [])
    (tmp_path / "log").write_bytes(b"1")
    assert look([pattern]) == (1, [0])
    assert found == {pattern: [f"{tmp_path}/log"]}
    source.is_waiting = True
    assert look([pattern]) == (1, [])
    source.is_waiting = False
    new.set()
    assert look([pattern]) == (1, [])


@pytest.mark.parametrize("is_glob", [False, True], ids=["file", "glob"])
async def test_a_disk_that_does_not_answer_a_look_is_told(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, is_glob: bool
) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    asked, answers, health = threading.Event(), threading.Event(), Health("logs")

    def hang(looks: "CData", count: int, changed: "CData") -> int:
        if not count or not is_below(tmp_path, looks[0]):
            return 0
        looks[0].asked = 1
        asked.set()
        answers.wait(WAIT_S)
        looks[0].asked = 0
        return 0

    def hang_too(pattern: str) -> list[str]:
        if pattern != f"{tmp_path}/*":
            return []
        asked.set()
        answers.wait(WAIT_S)
        return []

    follower = Follower(rescan, health)
    await nursery.start(follower.run)
    if is_glob:
        monkeypatch.setattr(paths, "matching", hang_too)
        follower.seek(f"{tmp_path}/*")
    else:
        monkeypatch.setattr(wake, "lib", SimpleNamespace(look_again=hang))
        follower.add(log(tmp_path / "log", Taking(), follower.blocks))
    await trio.to_thread.run_sync(asked.wait, abandon_on_cancel=True)
    await knows_all_places(follower)
    mock_clock.jump(wake.RESCAN * wake.POLL_S + 9)
    assert not health.hung()
    mock_clock.jump(1)
    assert list(health.hung()) == [f"{tmp_path}/{'*' if is_glob else 'log'}"]
    answers.set()


async def test_what_is_followed_no_longer_is_watched_no_longer(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    sources = [log(tmp_path / name, Taking(), follower.blocks) for name in ("a", "b")]
    for source in sources:
        follower.add(source)
    follower.seek(f"{tmp_path}/*")
    await knows_all_places(follower)
    for forget in (partial(follower.drop, sources[0]), partial(follower.seek_no_more, f"{tmp_path}/*")):
        forget()
        assert list(follower._folders.values()) == [str(tmp_path)]
    follower.drop(sources[1])
    assert not follower._folders
    assert not follower._names
    (tmp_path / "a").write_bytes(b"1\n")
    await trio.testing.wait_all_tasks_blocked()


async def test_what_is_dropped_before_its_place_is_known_is_not_watched(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    source = log(tmp_path / "gone/a", Taking(), follower.blocks)
    follower.add(source)
    follower.drop(source)
    await follower.hears(source)  # its task may begin only then, to be cancelled
    follower.seek(f"{tmp_path}/gone/*")
    follower.seek_no_more(f"{tmp_path}/gone/*")
    follower.add(log(tmp_path / "b", Taking(), follower.blocks))
    await watches(follower, tmp_path)
    assert list(follower._wanted) == [str(tmp_path)]


async def test_a_folder_with_two_names_is_heard_by_both(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    for place in ("real/a", "link/b"):
        follower.add(log(tmp_path / place, Taking(), follower.blocks))
    follower.seek(f"{tmp_path}/link/*")
    await knows_all_places(follower)
    assert set(follower._names) == {(f"{tmp_path}/real", "a"), (f"{tmp_path}/real", "b")}
    assert list(follower._folders.values()) == [f"{tmp_path}/real"]


async def test_a_mount_that_hangs_holds_up_neither_the_loop_nor_other_logs(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    real, answers = os.path.realpath, threading.Event()

    def slow(path: str) -> str:
        if "mnt" in path:
            answers.wait(WAIT_S)
        return real(path)

    monkeypatch.setattr(os.path, "realpath", slow)
    follower = Follower(rescan, Health("logs"))
    await nursery.start(follower.run)
    follower.add(log(tmp_path / "mnt/a", Taking(), follower.blocks))
    follower.seek(f"{tmp_path}/mnt/*")
    (tmp_path / "here").mkdir()
    follower.add(log(tmp_path / "here/b", Taking(), follower.blocks))
    await watches(follower, tmp_path / "here")
    (tmp_path / "mnt").mkdir()
    answers.set()
    await watches(follower, tmp_path / "here", tmp_path / "mnt")


async def test_many_logs_on_a_mount_that_hangs_leave_threads_to_others(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    real, stat, answers = os.path.realpath, os.stat, threading.Event()
    mounted = f"{tmp_path}/mnt/"

    def slow(path: str) -> str:
        if path.startswith(mounted):
            answers.wait(WAIT_S)
        return real(path)

    def slow_stat(path: Any, **more: Any) -> os.stat_result:
        if isinstance(path, str) and path.startswith(mounted):
            answers.wait(WAIT_S)
        return stat(path, **more)

    for name in ("mnt", "here", "mounts"):
        (tmp_path / name).mkdir()
    (tmp_path / "mounts/mountinfo").write_text(f"40 21 0:44 / {tmp_path}/mnt rw - nfs4 lab:/share rw")
    monkeypatch.setattr(wake, "MOUNTS", tmp_path / "mounts/mountinfo")
    monkeypatch.setattr(os.path, "realpath", slow)
    monkeypatch.setattr(os, "stat", slow_stat)
    follower, taking = Follower(rescan, Health("logs")), Taking()
    await nursery.start(follower.run)
    for number in range(int(DISK.total_tokens)):
        there = log(tmp_path / f"mnt/{number}", Taking(), follower.blocks)
        follower.add(there)
        nursery.start_soon(there.run)
    source = log(tmp_path / "here/a", taking, follower.blocks)
    follower.add(source)
    nursery.start_soon(source.run)
    await watches(follower, tmp_path / "here")
    (tmp_path / "here/a").write_bytes(b"one\n")
    await until(taking, b"one\n")
    answers.set()


async def test_a_look_that_hangs_leaves_those_elsewhere_to_another(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers, health = threading.Event(), threading.Event(), Health("logs")
    found: list[dict[str, list[str]]] = []

    async def rescan(files: dict[str, list[str]]) -> None:
        found.append(files)

    def hang(looks: "CData", count: int, changed: "CData") -> int:
        for look in (looks[number] for number in range(count)):
            if is_below(tmp_path / "mnt", look):
                look.asked = 1
                asked.set()
                answers.wait(WAIT_S)
                look.asked = 0
        news: int = lib.look_again(looks, count, changed)
        return news

    for name in ("mnt", "here", "mounts"):
        (tmp_path / name).mkdir()
    (tmp_path / "mounts/mountinfo").write_text(f"40 21 0:44 / {tmp_path}/mnt rw - nfs4 lab:/share rw")
    monkeypatch.setattr(wake, "open_inotify", no_inotify)
    monkeypatch.setattr(wake, "POLL_S", 0.01)
    monkeypatch.setattr(wake, "MOUNTS", tmp_path / "mounts/mountinfo")
    monkeypatch.setattr(wake, "lib", SimpleNamespace(look_again=hang))
    follower, takings = Follower(rescan, health), [Taking() for _ in range(3)]
    await nursery.start(follower.run)
    names = ("here/a.log", "mnt/b.log", "mnt/c.log")
    sources = [log(tmp_path / name, taking, follower.blocks) for name, taking in zip(names, takings, strict=True)]
    for pattern in ("here/*", "mnt/*"):
        follower.seek(f"{tmp_path}/{pattern}")
    for source in sources[:2]:
        follower.add(source)
        nursery.start_soon(source.run)
    await trio.to_thread.run_sync(asked.wait, abandon_on_cancel=True)
    await knows_all_places(follower)
    found.clear()
    mock_clock.jump(wake.RESCAN * wake.POLL_S + HUNG_S)
    (tmp_path / "here/a.log").write_bytes(b"one\n")
    await comes(lambda: takings[0].text == b"one\n")
    here, there = f"{tmp_path}/here/*", f"{tmp_path}/mnt/*"
    await comes(lambda: {here: [f"{tmp_path}/here/a.log"]} in found)  # and nothing of the disk that hangs
    assert list(health.hung()) == [f"{tmp_path}/mnt/b.log"]
    follower.add(sources[2])  # for who hangs, too
    nursery.start_soon(sources[2].run)
    (tmp_path / "here/a.log").write_bytes(b"one\ntwo\n")
    await comes(lambda: takings[0].text == b"one\ntwo\n")
    for name in ("b", "c"):
        (tmp_path / f"mnt/{name}.log").write_bytes(b"three\n")
    answers.set()
    await comes(lambda: takings[1].text == takings[2].text == b"three\n")
    mounted = [f"{tmp_path}/mnt/b.log", f"{tmp_path}/mnt/c.log"]
    await comes(lambda: {there: mounted} in found)
    assert follower.found == {here: [f"{tmp_path}/here/a.log"], there: mounted}
    assert not health.hung()


async def test_a_disk_that_does_not_hang_answers_before_anything_else_goes_on(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rescan(files: dict[str, list[str]]) -> None: ...

    async def go_on() -> None:
        order.append("went on")

    def late() -> str:
        answers.wait()
        return "late"

    order: list[str] = []
    answers, follower = threading.Event(), Follower(rescan, Health("logs"))
    monkeypatch.setattr(wake, "AT_ONCE_S", WAIT_S)
    nursery.start_soon(go_on)
    await follower.ask_first(str(tmp_path), order.append, "asked")
    assert order == ["asked"]
    with pytest.raises(FileNotFoundError):
        await follower.ask_first(str(tmp_path), os.stat, tmp_path / "none")
    monkeypatch.setattr(wake, "AT_ONCE_S", 0.0)
    nursery.start_soon(lambda: trio.to_thread.run_sync(answers.set))
    assert await follower.ask_first(str(tmp_path), late) == "late"
    assert order == ["asked", "went on"]
