"""The outbox: durable events a second, how late a commit is, and what a long queue costs at start-up."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent, TestFinished
from agent.core.store import open_store

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]


def record(n: int) -> TestFinished:
    name = f"test/login.js › refuses password number {n}"
    return TestFinished(run="r-1", suite="login", case=name, name=name, file="test/login.js", state="passed", ended=1.0)


def everything(event: AnyEvent) -> bool:
    return True


async def test_durable_events_a_second(tmp_path: Path, figure: Figure) -> None:
    events = 50_000
    store = open_store(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        bus = Bus(store)
        store.owe("mimir", everything)
        began = time.perf_counter()
        for n in range(events):
            bus.publish(record(n))
            if n % 100 == 0:
                await store.room()
                await trio.lowlevel.checkpoint()
        await store.commit()
        took = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    store.close()
    figure("outbox: durable events, one sink", f"{events / took:,.0f}/s", ">= 5,000/s")


async def test_how_late_an_event_is_durable_at_500_a_second(tmp_path: Path, figure: Figure) -> None:
    late: list[float] = []
    store = open_store(tmp_path)

    async def one(n: int) -> None:
        began = time.perf_counter()
        store.append(record(n), 1.0)
        await store.commit()
        late.append(time.perf_counter() - began)

    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        async with trio.open_nursery() as events:
            for n in range(1500):
                events.start_soon(one, n)
                await trio.sleep(0.002)
        nursery.cancel_scope.cancel()
    store.close()
    p50, p99 = (statistics.quantiles(late, n=100)[q - 1] * 1000 for q in (50, 99))
    figure("outbox: publish -> durable at 500/s", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", "p99 <= 10 ms and a sync")


async def test_a_million_queued_events_at_start(tmp_path: Path, figure: Figure) -> None:
    store = open_store(tmp_path, journal_max=2**40)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.owe("mimir", everything)
        for n in range(1_000_000):
            store.append(record(n), 1.0)
            if n % 1000 == 0:
                await store.room()
                await trio.lowlevel.checkpoint()
        await store.commit()
        nursery.cancel_scope.cancel()
    store.close()
    began = time.perf_counter()
    store = open_store(tmp_path, journal_max=2**40)
    box = store.owe("mimir", everything)
    first = await box.peek()
    opened = time.perf_counter() - began
    depth = (await store.depths())["mimir"]
    counted = time.perf_counter() - began
    store.close()
    assert (len(first), depth.waiting) == (256, 1_000_000)
    figure("outbox: 1,000,000 queued, start to first delivery", f"{opened * 1000:.0f} ms", "< 1 s")
    figure("outbox: 1,000,000 queued, counted for status", f"{counted * 1000:.0f} ms", "< 1 s")
