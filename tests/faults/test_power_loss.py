"""Power lost at any byte of what is being written: what was told is there, no number is given twice, files are whole.

Source: ARCHITECTURE.md, rule 4; protocols/settings.md, "Names that several folders share" (event id, durability).
"""

import os
import shutil
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import pytest
import trio

from agent.core import release
from agent.core.events import SuiteFinished, TestFinished
from agent.core.release import Pending
from agent.core.store import open_store
from agent.coverage.settings import CoverageSettings
from agent.coverage.watched import Watched
from agent.suites.capture import Capture
from agent.suites.messages import Suite
from agent.suites.report import write_report
from tests.coverage_house import Product
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


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is brought onto the disk and what gets its name, in this order; no file gets it before it is there."""
    synced: dict[Path, bytes] = {}
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_file():
            synced[path] = path.read_bytes()
        done.append(f"sync {path.name}")
        fsync(fd)

    def seen_replace(self: Path, target: Path) -> Path:
        assert self.is_symlink() or synced[self] == self.read_bytes(), "renamed before all of it was on the disk"
        done.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    return done


async def test_a_file_of_a_run_is_on_disk_before_it_has_its_name(tmp_path: Path, done: list[str]) -> None:
    store = open_store(tmp_path, reserve=4096)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for n in range(100):
            store.append(record(f"test {n}"), 1.0)
        await store.commit()
        (folder := tmp_path / "runs" / "r-1").mkdir(parents=True)
        done.clear()
        suite = Suite(id="login", runner="tap", command=("true",))
        told: SuiteFinished = write_report(store, suite, finished("r-1"), folder, "lab-07")
        nursery.cancel_scope.cancel()
    assert done == [
        "sync .xunit.xml.new", "rename xunit.xml", "sync r-1",
        "sync .result.json.new", "rename result.json", "sync r-1",
    ]  # fmt: skip
    store.close()
    assert told.counts.total == 100
    assert len(msgspec.json.decode((folder / "result.json").read_bytes())["tests"]) == 100


def test_the_output_of_a_run_is_on_disk_when_it_is_closed(tmp_path: Path, done: list[str]) -> None:
    for limit in (100, 10):  # whole, and cut
        output = Capture(tmp_path / "stdout.log", limit)
        output.write(b"what a runner says")
        assert done == []
        output.close()
        assert done.pop() == "sync stdout.log"


async def test_what_a_run_has_covered_is_on_disk_before_it_has_its_name(tmp_path: Path, done: list[str]) -> None:
    product = Product("./a.js")
    run = Watched(
        CoverageSettings(), ["v8"], tmp_path / "run", product.make, nullcontext, kept=tmp_path / "covered", report=True
    )
    await run.prepare([tmp_path])
    await run.let_count(True)
    product.reach("./a.js", "1", "t1")
    await run.collect(lambda deltas: None)
    await run.keep()
    assert done == ["sync .covered.new", "rename covered", f"sync {tmp_path.name}"]


def test_a_release_on_trial_is_on_disk_step_by_step(tmp_path: Path, done: list[str]) -> None:
    prefix = tmp_path / "agent"
    for version in ("1", "2"):
        (prefix / "releases" / version).mkdir(parents=True)
        (prefix / "releases" / version / "agent").touch()
    release.write_pending(prefix, Pending(version="2", previous="1", id="x", confirm=str(tmp_path / "confirm")))
    release.point(prefix / "current", "2")
    trial = ["sync .pending.json.new", "rename pending.json", "sync agent"]
    assert done == [*trial, "rename current", "sync agent"]
    done.clear()
    for _ in range(release.STARTS):
        assert release.boot_check(prefix) is None
    assert done == trial * release.STARTS
    done.clear()
    assert release.boot_check(prefix) == "1"
    assert done == ["rename current", "sync agent", "sync agent"]  # the last one: its trial is gone
    release.write_pending(prefix, Pending(version="1", previous="2", id="y", confirm=str(tmp_path / "confirm")))
    (tmp_path / "confirm").write_text("y")
    done.clear()
    assert release.boot_check(prefix) is None
    assert done == ["rename previous", "sync agent", "sync agent"]
