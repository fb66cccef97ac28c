"""The file monitor under a storm: every end state is told, and what it costs."""

import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.core.bus import Bus
from agent.core.events import FileChanged, FileGap
from agent.core.metrics import Metrics
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.files import role
from agent.files.settings import FilesSettings

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]
FILES, DIRECTORIES = 50_000, 100

# Another process, as it would be: creates or rewrites the files within about 2 s, and says how long it took.
STORM = """
import os, sys, time
root, files, directories, text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
began = time.perf_counter()
for n in range(files):
    fd = os.open(f"{root}/{n % directories:03}/{n:05}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, text.encode() + str(n).encode())
    os.close(fd)
    ahead = n / files * 1.9 - (time.perf_counter() - began)
    if ahead > 0.01:
        time.sleep(ahead)
print(time.perf_counter() - began)
"""


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


async def test_fifty_thousand_files_change_within_two_seconds(tmp_path: Path, figure: Figure) -> None:
    root = tmp_path / "root"
    for n in range(DIRECTORIES):
        (root / f"{n:03}").mkdir(parents=True)
    store = open_store(tmp_path / "state")
    bus, known, gaps = Bus(store), dict[str, int | None](), list[str]()
    most = [0.0]

    async def follow(task_status: trio.TaskStatus[None]) -> None:
        with bus.subscribe(FileChanged, FileGap, limit=200_000) as events:
            task_status.started()
            async for event in events:
                match event:
                    case FileChanged(path=path, size=size):
                        known[path] = size
                    case FileGap(why=why):
                        gaps.append(why)

    async def weigh() -> None:
        while True:
            most[0] = max(most[0], rss_mib())
            await trio.sleep(0.05)

    async def storm(text: str) -> tuple[float, float]:
        """How long it took, and how long after its end the last end state was told."""
        known.clear()
        argv = [sys.executable, "-c", STORM, str(root), str(FILES), str(DIRECTORIES), text]
        done = await trio.run_process(argv, capture_stdout=True)
        ended = time.perf_counter()
        expected = {f"{root}/{n % DIRECTORIES:03}/{n:05}": len(text) + len(str(n)) for n in range(FILES)}
        while known != expected:
            with trio.fail_after(120):
                await trio.sleep(0.02)
        return float(done.stdout), time.perf_counter() - ended

    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        settings = FilesSettings()
        start = partial(role.run_files, bus, store, settings, Health("files"), metrics=Metrics())
        await nursery.start(start)
        await bus.ask("watch_file", {"path": str(root), "recursive": True})
        await nursery.start(follow)
        gc.collect()
        before = rss_mib()
        nursery.start_soon(weigh)
        for what, text in (("created", "x"), ("rewritten", "yy")):
            gaps.clear()
            took, late = await storm(text)
            figure(
                f"files: {FILES:,} {what} under watch in {took:.1f} s, every end state told",
                f"{late:.1f} s after the last, {len(gaps)} gaps",
                "all, after <= 2 s",
            )
        figure(f"files: memory for {FILES:,} watched files in that storm", f"+{most[0] - before:.0f} MiB", "bounded")
        nursery.cancel_scope.cancel()
    store.close()
