"""The file monitor on trio: real inotify, real threads."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core import inotify
from agent.core.events import FileChanged, FileGap
from agent.core.supervise import Health
from agent.files import disk, follow
from agent.files import watch as files_watch
from agent.files.follow import Follower
from agent.files.looks import Surveyed, Watch
from tests.files_eyes import say

MOUNTS = """
import subprocess, sys
import trio
from agent.core.supervise import Health
from agent.files import follow
from agent.files.looks import Watch
from tests.files_eyes import say

async def main(folder):
    send, told = trio.open_memory_channel(100)

    async def tell(event):
        await send.send(say(event).replace(folder, ""))

    async def hear(wanted):
        while await told.receive() != wanted:
            pass

    follower = follow.Follower(tell, Health("files"))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(follower.run)
            await follower.watch(Watch(id="w", path=folder))
            for name in ("one", "two"):
                subprocess.run(["mount", "-t", "tmpfs", name, folder], check=True)
                open(f"{folder}/{name}", "w").close()
                await hear(f"created /{name}")
            subprocess.run(["umount", "--lazy", folder], check=True)
            await hear("deleted /two")
            nursery.cancel_scope.cancel()

follow.POLL_S = 0.05
trio.run(main, sys.argv[1])
"""


class Heard:
    """`next()` is what was told next."""

    def __init__(self) -> None:
        self._send, self._told = trio.open_memory_channel[str](1000)
        self.short: list[int] = []
        self.all_watched = trio.Event()
        self.health = Health("files")
        self.follower = Follower(self._tell, self.health, lack=self._lack)

    def _lack(self, short: int) -> None:
        self.short.append(short)
        if not short:
            self.all_watched.set()

    async def _tell(self, event: FileChanged | FileGap) -> None:
        await self._send.send(say(event))

    async def next(self) -> str:
        return await self._told.receive()

    async def hear(self, told: str) -> None:
        """Until it is told."""
        while await self.next() != told:
            pass

    def rest(self) -> list[str]:
        told = []
        try:
            while True:
                told.append(self._told.receive_nowait())
        except trio.WouldBlock:
            return told


@asynccontextmanager
async def following(*watches: Watch) -> AsyncIterator[Heard]:
    heard = Heard()
    async with trio.open_nursery() as nursery:
        await nursery.start(heard.follower.run)
        for watch in watches:
            await heard.follower.watch(watch)
        yield heard
        nursery.cancel_scope.cancel()


async def test_what_happens_after_watch_returned_is_told(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    async with following(Watch(id="w", path=str(tmp_path))) as heard:
        (tmp_path / "new").write_text("x")
        (tmp_path / "old").unlink()
        assert {await heard.next(), await heard.next()} == {f"created {tmp_path}/new", f"deleted {tmp_path}/old"}
        heard.follower.unwatch("w")
        (tmp_path / "more").write_text("x")
        await heard.follower.settle()
        assert heard.rest() == []


async def test_settling_tells_what_has_happened_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_watch, "SETTLE_S", 3600.0)
    monkeypatch.setattr(files_watch, "LONGEST_SETTLE_S", 3600.0)
    async with following(Watch(id="w", path=str(tmp_path), recursive=True)) as heard:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/file").write_text("x")
        await heard.follower.settle()
        assert heard.rest() == [f"created {tmp_path}/a", f"created {tmp_path}/a/file"]


async def test_settling_tells_of_more_than_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "READ", 8192)
    monkeypatch.setattr(files_watch, "SETTLE_S", 3600.0)
    async with following(Watch(id="w", path=str(tmp_path))) as heard:
        for number in range(300):
            (tmp_path / str(number)).touch()
        await heard.follower.settle()
        assert len(heard.rest()) == 300


def test_a_file_system_that_is_mounted_over_what_is_watched_is_watched_in_its_place(tmp_path: Path) -> None:
    alone = ["unshare", "-Urm"]
    tried = [*alone, "mount", "-t", "tmpfs", "tried", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode != 0:
        pytest.skip("an unprivileged mount namespace is refused here")
    subprocess.run([*alone, sys.executable, "-c", MOUNTS, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])


async def test_whoever_waits_for_a_watch_is_released_when_it_is_unwatched(tmp_path: Path) -> None:
    heard = Heard()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heard.follower.watch, Watch(id="w", path=str(tmp_path)))  # nobody takes looks yet
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        heard.follower.unwatch("w")
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
        nursery.cancel_scope.cancel()


async def test_without_an_inotify_instance_everything_is_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nonblocking: bool) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(inotify, "INotify", none_left)
    monkeypatch.setattr("agent.files.watch.POLL_S", 0.05)
    async with following(Watch(id="w", path=str(tmp_path))) as heard:
        (tmp_path / "new").write_text("x")
        assert await heard.next() == f"created {tmp_path}/new"
        assert heard.short == [heard.follower.monitor.directories]


async def test_when_the_kernel_has_no_watches_left_it_is_said_and_it_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.carry_out

    def without_watches(*args: Any) -> list[Any]:
        results = list(real(*args))
        return [
            Surveyed(survey=result.survey, entries=result.entries, is_short=True)
            if isinstance(result, Surveyed)
            else result
            for result in results
        ]

    monkeypatch.setattr(follow, "carry_out", without_watches)
    monkeypatch.setattr("agent.files.watch.POLL_S", 0.05)
    async with following(Watch(id="w", path=str(tmp_path))) as heard:
        (tmp_path / "new").write_text("x")
        assert await heard.next() == f"created {tmp_path}/new"
        monkeypatch.setattr(follow, "carry_out", real)
        (tmp_path / "more").write_text("x")
        await heard.hear(f"created {tmp_path}/more")  # "new" may have been seen before it was written
        await heard.all_watched.wait()
        assert heard.short[0] == len(tmp_path.parts)


async def test_a_mount_that_hangs_stops_no_other_watch_and_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, well = tmp_path / "hung", tmp_path / "well"
    hung.mkdir()
    well.mkdir()
    answers = threading.Event()
    seen = disk._seen

    def slow(path: str, *, follow: bool) -> Any:
        if path.startswith(f"{hung}/"):
            answers.wait()
        return seen(path, follow=follow)

    monkeypatch.setattr(disk, "_seen", slow)
    monkeypatch.setattr(follow, "HUNG_S", 0.3)
    monkeypatch.setattr("agent.core.supervise.HUNG_S", 0)
    (hung / "old").touch()  # what there is to ask for
    try:
        async with following(Watch(id="hung", path=str(hung)), Watch(id="well", path=str(well))) as heard:
            await heard.hear(f"gap {hung}: the disk does not answer")
            (hung / "new").touch()
            (well / "new").touch()
            await heard.hear(f"created {well}/new")
            assert list(heard.health.hung()) == [str(hung)]
            assert heard.health.overdue_s() == 0
            answers.set()
            await heard.hear(f"created {hung}/new")
    finally:
        answers.set()
