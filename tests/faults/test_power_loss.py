"""Power lost at any byte of what is being written: what was told is there, no number is given twice, files are whole.

Source: ARCHITECTURE.md, rule 4; protocols/settings.md, "Names that several folders share" (event id, durability).
"""

import os
import shutil
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import pytest
import trio

from agent.core.events import SuiteFinished, TestFinished
from agent.core.store import open_store
from agent.suites.messages import Suite
from agent.suites.report import write_report
from tests.ended_run import finished

ROUNDS, LOSSES = 120, 50


def record(case: str, attempt: int = 1) -> TestFinished:
    return TestFinished(
        run="r-1", suite="login", case=case, name=case, file=None, state="passed", ended=2.0, attempt=attempt
    )


class Known(NamedTuple):
    """What was on disk, and could be told, when a commit returned."""

    wal: int  # bytes of the write-ahead log
    seq: int
    n: int
    kept: int | None


async def write(folder: Path, random: Random) -> list[Known]:
    """Write to a store as an agent does, in commits of any size; what was known after each."""
    known = [Known(0, 0, 0, None)]
    store = open_store(folder, reserve=4096)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        box = store.owe("mimir", lambda event: isinstance(event, TestFinished) and event.attempt == 1)
        for kept in range(ROUNDS):
            for _ in range(random.randint(1, 20)):
                store.append(record(f"test {random.random()}", attempt=random.randint(1, 2)), 1.0)
            store.put("a", kept)
            if random.random() < 0.5:
                box.ack(random.randint(0, known[-1].n))
            await store.commit()
            known.append(Known((folder / "store.db-wal").stat().st_size, store.seq, store._n, kept))
        shutil.copytree(folder, folder.with_name("at the loss"))
        nursery.cancel_scope.cancel()
    store.close()
    return known


async def test_a_log_cut_at_any_byte_is_a_prefix_that_holds_all_that_was_told(tmp_path: Path, soak_s: float) -> None:
    random, until = Random(1), time.monotonic() + soak_s
    known = await write(tmp_path / "state", random)
    log = (tmp_path / "at the loss/store.db-wal").read_bytes()
    assert len(log) == known[-1].wal
    assert all(one.wal <= other.wal for one, other in pairwise(known)), "no checkpoint meanwhile"
    losses = 0
    while losses < LOSSES or time.monotonic() < until:
        losses += 1
        cut = random.randint(known[1].wal, len(log))
        folder = tmp_path / f"after {losses}"
        shutil.copytree(tmp_path / "at the loss", folder, ignore=shutil.ignore_patterns("*-shm", "*-wal"))
        torn = random.randbytes(random.randint(0, 5000)) if random.random() < 0.5 else b""
        (folder / "store.db-wal").write_bytes(log[:cut] + torn)
        told = max((one for one in known if one.wal <= cut), key=lambda one: one.seq)

        store = open_store(folder, reserve=4096)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            box = store.owe("mimir", lambda event: True)
            assert (store.seq, await store.get("a", int)) == (told.seq, told.kept)
            assert [row.seq for row in await store.read(limit=10_000)] == list(range(1, told.seq + 1))
            before = await box.peek(limit=10_000)
            assert store._n == told.n
            store.append(record("after"), 1.0)
            assert await store.commit() == told.seq + 1
            (new,) = (await box.peek(limit=10_000))[len(before) :]
            assert (new.n, new.event.seq) == (told.n + 1, told.seq + 1)
            nursery.cancel_scope.cancel()
        store.close()
        shutil.rmtree(folder)


async def test_a_file_of_a_run_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, bytes] = {}
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_file():
            synced[path.name] = path.read_bytes()
        done.append(f"sync {path.name}")
        fsync(fd)

    def seen_replace(self: Path, target: Path) -> Path:
        assert synced[self.name] == self.read_bytes(), "renamed before all of it was on the disk"
        assert not target.exists()
        done.append(f"rename {target.name}")
        return replace(self, target)

    store = open_store(tmp_path, reserve=4096)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for n in range(100):
            store.append(record(f"test {n}"), 1.0)
        await store.commit()
        (folder := tmp_path / "runs" / "r-1").mkdir(parents=True)
        monkeypatch.setattr(os, "fsync", seen_fsync)
        monkeypatch.setattr(Path, "replace", seen_replace)
        suite = Suite(id="login", runner="tap", command=("true",))
        told: SuiteFinished = write_report(store, suite, finished("r-1"), folder, "lab-07")
        nursery.cancel_scope.cancel()
    store.close()
    assert told.counts.total == 100
    assert len(msgspec.json.decode((folder / "result.json").read_bytes())["tests"]) == 100
    assert done == [
        "sync .xunit.xml.new", "rename xunit.xml", "sync r-1",
        "sync .result.json.new", "rename result.json", "sync r-1",
    ]  # fmt: skip
