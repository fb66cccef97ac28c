"""What a sink refused is told, kept, offered again, and the alert ends with it."""

import time
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent.core.bus import Bus
from agent.core.event import Event
from agent.core.events import Alert, AlertCleared, Reloaded, RunChanged
from agent.core.held import Held
from agent.core.store import Outbox, Store, open_store

START = time.time()


def epoch() -> float:
    return START + trio.current_time()


class Sink:
    """A store with one sink that is owed one event."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_store(folder, reserve=4096)
        self.bus = Bus(self.store)
        self.box: Outbox = self.store.owe("mimir", lambda event: isinstance(event, RunChanged))
        self.held = Held(self.bus, self.store, self.box, clock=epoch)


@pytest.fixture
async def sink(tmp_path: Path, nursery: trio.Nursery) -> Sink:
    sink = Sink(tmp_path)
    await nursery.start(sink.store.run)
    return sink


async def alerts(sink: Sink, nursery: trio.Nursery) -> list[Event]:
    got: list[Event] = []

    async def listen(*, task_status: trio.TaskStatus[None]) -> None:
        with sink.bus.subscribe(Alert, AlertCleared) as events:
            task_status.started()
            async for event in events:
                got.append(event)

    await nursery.start(listen)
    nursery.start_soon(sink.held.run)
    return got


async def refuse_one(sink: Sink) -> int:
    sink.bus.publish(RunChanged(run="r", state="running"))
    (owed,) = await sink.box.due()
    sink.held.hold(owed.n, "bad_payload: poison")
    return owed.n


async def test_a_refusal_is_an_alert_until_it_was_delivered_after_all(sink: Sink, nursery: trio.Nursery) -> None:
    got = await alerts(sink, nursery)
    n = await refuse_one(sink)
    await sink.held.settle()
    await trio.testing.wait_all_tasks_blocked()
    (alert,) = got
    assert isinstance(alert, Alert)
    assert (alert.code, alert.text) == ("held.mimir", "mimir refused a message: bad_payload: poison")
    sink.bus.publish(Reloaded())
    (again,) = await sink.box.due(n)
    assert again.n > n
    sink.box.ack(again.n)
    await sink.store.commit()
    await sink.held.settle()
    await trio.testing.wait_all_tasks_blocked()
    assert got[1:] == [AlertCleared(code="held.mimir")]


async def test_it_is_offered_again_after_an_hour_and_not_before(
    sink: Sink, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.01
    await alerts(sink, nursery)
    n = await refuse_one(sink)
    since = trio.current_time()
    (again,) = await sink.box.due(n)
    assert 3540 <= trio.current_time() - since <= 3720
    assert again.n > n


async def test_a_clock_that_is_put_back_by_a_day_holds_nothing_for_longer(
    sink: Sink, nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    autojump_clock.autojump_threshold = 0.01
    await alerts(sink, nursery)
    n = await refuse_one(sink)
    since = trio.current_time()
    monkeypatch.setitem(globals(), "START", START - 86_400)
    await sink.box.due(n)
    assert trio.current_time() - since <= 3720


async def test_what_was_held_before_a_restart_is_an_alert_again(sink: Sink, nursery: trio.Nursery) -> None:
    await refuse_one(sink)
    sink.held = Held(sink.bus, sink.store, sink.box, clock=epoch)
    got = await alerts(sink, nursery)
    with trio.fail_after(60):
        while not got:
            await sink.box.held()
    assert [event.code for event in got if isinstance(event, Alert)] == ["held.mimir"]
