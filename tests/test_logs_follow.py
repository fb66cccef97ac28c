"""What a Tail asks for, carried out on real files: reads, errors, searches back into a file that was renamed."""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from agent._native import lib
from agent.core.supervise import Health
from agent.logs import disk
from agent.logs import follow as following
from agent.logs.acts import Gap, Report, Scan
from agent.logs.context import BLOCK, Ask, Search, Size
from agent.logs.follow import Blocks, Followed
from agent.logs.identity import HEAD, Checkpoint
from agent.logs.tail import Tail

WAIT_S = 20.0


class Taking:
    """Takes whole lines, and keeps what it was told."""

    tail: Tail

    def __init__(self) -> None:
        self.text = b""
        self.told: list[Report | Gap] = []
        self.kept: Sequence[Checkpoint] = ()
        self.hidden = set[int]()  # generations that were given up in a checkpoint before that was told

    async def scan(self, act: Scan) -> tuple[int, int]:
        consumed = bytes(act.data).rfind(b"\n") + 1
        self.text += act.data[:consumed]
        return consumed, 0

    def tell(self, act: Report | Gap) -> None:
        self.told.append(act)

    def keep(self) -> None:
        self.kept = self.tail.checkpoints()
        told = {act.generation for act in self.told if isinstance(act, Gap)}
        self.hidden |= {done.generation for done in self.tail.past} - told

    def due(self) -> float:
        return float("inf")

    def tick(self, now: float) -> None:
        pass


def has_room() -> bool:
    return True


def follow(
    path: Path,
    taking: Taking,
    *,
    links: bool = True,
    health: Health | None = None,
    room: Callable[[], bool] = has_room,
) -> Followed:
    health, taking.tail = health or Health("logs"), Tail(str(path), start="start")
    return Followed(taking.tail, taking, health, links=links, room=room, blocks=Blocks())


def look(generation: int) -> Search[bytes]:
    size = yield Size(generation)
    data = yield Ask(generation, 0, BLOCK)
    assert isinstance(data, bytes)
    assert size in (None, 400_104)
    return data


async def test_large_and_small_blocks_are_taken_and_a_renamed_file_is_found_again(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    path, taking = tmp_path / "log", Taking()
    path.write_bytes(b"x" * 99 + b"\n" + b"y\n" * 200_000 + b"half")
    source = follow(path, taking)
    nursery.start_soon(source.run)
    await source.settle()
    assert taking.text == path.read_bytes()[:-4]
    assert taking.kept[0].offset == len(taking.text)
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"new\n")
    (tmp_path / "log.2.gz").write_bytes(b"no log")
    await source.settle()
    assert [report.what for report in taking.told if isinstance(report, Report)] == ["found", "rotated", "found"]
    assert (await source.search(look(1)))[:3] == b"xxx"
    assert await source.search(look(7)) == b""


async def test_all_who_wait_for_what_is_there_go_on_when_it_was_matched(tmp_path: Path, nursery: trio.Nursery) -> None:
    path, taking = tmp_path / "log", Taking()
    source = follow(path, taking)
    nursery.start_soon(source.run)
    await source.settle()
    path.write_bytes(b"a\n")
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as waiting:
            waiting.start_soon(source.settle)
            waiting.start_soon(source.settle)
    assert taking.text == b"a\n"


async def test_reading_goes_on_by_itself_once_there_is_room(tmp_path: Path, nursery: trio.Nursery) -> None:
    path, taking, full = tmp_path / "log", Taking(), iter([True] * 4)
    path.write_bytes(b"y\n" * 5 * BLOCK)  # more than is read at once
    nursery.start_soon(follow(path, taking, room=lambda: not next(full, False)).run)
    with trio.fail_after(WAIT_S):
        while len(taking.text) < 10 * BLOCK:  # nobody looks at it, and nothing tells of it
            await trio.lowlevel.checkpoint()
    assert list(full) == []


@pytest.mark.parametrize("links", [True, False])
async def test_what_cannot_be_followed_is_told(tmp_path: Path, nursery: trio.Nursery, links: bool) -> None:
    folder, taking = tmp_path / "folder", Taking()
    folder.mkdir()
    source = follow(folder, taking)
    nursery.start_soon(source.run)
    await source.settle()
    assert taking.told == [Report("unreadable", 0, "is a directory")]
    path, linked = tmp_path / "link", Taking()
    (tmp_path / "log").write_bytes(b"a\n")
    path.symlink_to("log")
    source = follow(path, linked, links=links)
    nursery.start_soon(source.run)
    await source.settle()
    assert linked.text == (b"a\n" if links else b"")
    assert [report.what for report in linked.told if isinstance(report, Report)] == ["found" if links else "unreadable"]


async def test_a_loss_is_told_before_a_checkpoint_forgets_of_it(tmp_path: Path, nursery: trio.Nursery) -> None:
    path, taking = tmp_path / "log", Taking()
    path.write_bytes(b"a\n")
    source = follow(path, taking)
    nursery.start_soon(source.run)
    await source.settle()
    path.write_bytes(b"other\n")
    await source.settle()
    assert taking.told[-1] == Gap(1, 2, None, "cut off, and no copy is found")
    assert taking.hidden == set()


async def test_a_disk_that_does_not_answer_is_told_and_is_no_hang_of_ours(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.core.supervise.HUNG_S", 0)
    path, taking, health = tmp_path / "log", Taking(), Health("logs")
    path.write_bytes(b"a\n")
    asked, answers = trio.Event(), threading.Event()
    look = disk.look

    def slow(name: str) -> object:
        trio.from_thread.run_sync(asked.set)
        answers.wait()
        return look(name)

    monkeypatch.setattr(disk, "look", slow)
    source = follow(path, taking, health=health)
    nursery.start_soon(source.run)
    try:
        await asked.wait()
        assert (list(health.hung()), health.overdue_s()) == ([str(path)], 0)
    finally:
        answers.set()
    await source.settle()
    assert taking.text == b"a\n"


async def test_what_is_heard_of_is_matched_in_the_same_turn(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, taking, preadv = tmp_path / "log", Taking(), os.preadv
    # Not every file system can say that it has what was just written.
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, flags=0: preadv(fd, buffers, offset))
    path.write_bytes(b"a\n")
    source = follow(path, taking)
    nursery.start_soon(source.run)
    await source.settle()
    with path.open("ab") as file:
        file.write(b"b\n")
    source.wake()
    source.go_on()
    assert (taking.text, source.tail.lag, taking.kept[0].offset) == (b"a\nb\n", 0, 4)
    with path.open("ab") as file:
        file.write(b"c" * following.DIRECT + b"\n")
    source.wake()
    source.go_on()
    assert len(taking.text) == 4
    source.wake()
    source.go_on()  # its task has work already, and looks again behind it
    await source.settle()
    assert len(taking.text) == 4 + following.DIRECT + 1


@pytest.mark.parametrize("kind", ["tmpfs", "nfs"])
async def test_a_file_that_is_on_no_disk_is_read_in_the_same_turn(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, taking, preadv = tmp_path / "log", Taking(), os.preadv
    path.write_bytes(b"a\n")

    def waiting(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(following, "lib", SimpleNamespace(file_in_memory=lambda _: kind == "tmpfs"))
    monkeypatch.setattr(os, "preadv", waiting)
    source = follow(path, taking)
    nursery.start_soon(source.run)
    await source.settle()
    for line in (b"b\n", b"c\n"):
        before = taking.text
        with path.open("ab") as file:
            file.write(line)
        source.wake()
        source.go_on()
        assert taking.text == (before + line if kind == "tmpfs" else before)
        await source.settle()
        assert taking.text == before + line


def test_what_has_no_disk_is_known() -> None:
    for path, is_in_memory in (("/dev/shm", True), ("/proc/self/status", False)):
        fd = os.open(path, os.O_RDONLY)
        assert lib.file_in_memory(fd) == is_in_memory
        os.close(fd)
    assert not lib.file_in_memory(-1)


@pytest.mark.parametrize("folder", ["/dev/shm", None], ids=["memory", "disk"])
def test_what_a_file_grew_by_is_read_at_once(tmp_path: Path, folder: str | None) -> None:
    path = Path(folder or tmp_path) / f"emissary-{os.getpid()}.log"
    path.write_bytes(b"x" * 2 * HEAD + b"news\n")
    try:
        fd, blocks = os.open(path, os.O_RDONLY), Blocks()
        size, written, data, head = blocks.news(fd, 2 * HEAD - 1) or (0, 0.0, b"", b"")
        assert (size, written, data) == (2 * HEAD + 5, path.stat().st_mtime, b"xnews\n")
        assert head == b"x" * HEAD
        assert blocks.news(fd, size + 9) == (size, written, b"", head)
        os.truncate(path, 3)
        assert blocks.news(fd, 0) == (3, path.stat().st_mtime, b"xxx", b"xxx")
        os.truncate(path, following.DIRECT + 1)
        assert blocks.news(fd, 0) is None  # it is for a thread
        os.close(fd)
        assert blocks.news(fd, 0) is None
    finally:
        path.unlink()


class Waiting(Taking):
    """Waits in each scan."""

    source: Followed

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on, self.scans = trio.Event(), 0

    async def scan(self, act: Scan) -> tuple[int, int]:  # type: ignore[explicit-override]  # typing's needs 3.12
        self.scans += 1
        try:
            await self.source.own_turn()
            await self.may_go_on.wait()
        finally:
            self.scans -= 1
        return await super().scan(act)


@pytest.mark.parametrize("ends", [False, True])
async def test_what_has_to_wait_goes_on_in_the_task_of_its_log(
    tmp_path: Path, nursery: trio.Nursery, ends: bool
) -> None:
    path, taking, scope = tmp_path / "log", Waiting(), trio.CancelScope()
    path.write_bytes(b"")
    taking.source = source = follow(path, taking)

    async def run() -> None:
        with scope:
            await source.run()

    nursery.start_soon(run)
    await source.settle()
    path.write_bytes(b"a\n")
    source.wake()
    source.go_on()
    assert (taking.scans, taking.text) == (1, b"")
    if ends:
        scope.cancel()
    else:
        taking.may_go_on.set()
        await source.settle()
    await trio.testing.wait_all_tasks_blocked()
    assert (taking.scans, taking.text) == (0, b"" if ends else b"a\n")
