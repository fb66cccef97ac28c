"""Publishing, bounded subscriptions, and one handler per action."""

from typing import Any

import pytest
import trio

from agent.core.bus import Bus
from agent.core.errors import ActionError
from agent.core.events import AlertCleared, AnyEvent, LinkChanged


class Kept:
    def __init__(self) -> None:
        self.events: list[tuple[AnyEvent, float]] = []

    def append(self, event: AnyEvent, at: float) -> None:
        self.events.append((event, at))


async def test_an_event_reaches_the_journal_and_the_subscriptions_of_its_kind() -> None:
    journal = Kept()
    bus = Bus(journal, clock=lambda: 17.0)
    with bus.subscribe(AlertCleared) as cleared, bus.subscribe(LinkChanged, AlertCleared) as both:
        bus.publish(LinkChanged(name="mimir", state="ready"))
        bus.publish(AlertCleared(code="x"))
        assert await cleared.__anext__() == AlertCleared(code="x")
        assert [type(await both.__anext__()) for _ in range(2)] == [LinkChanged, AlertCleared]
    assert [(type(e), at) for e, at in journal.events] == [(LinkChanged, 17.0), (AlertCleared, 17.0)]


async def test_a_slow_subscriber_loses_the_oldest_and_knows_how_many() -> None:
    bus = Bus()
    with bus.subscribe(AlertCleared, limit=2) as events:
        for code in "abcd":
            bus.publish(AlertCleared(code=code))
        assert events.dropped == 2
        assert [(await events.__anext__()).code for _ in range(2)] == ["c", "d"]


async def test_a_waiting_subscriber_wakes_at_the_next_event(autojump_clock: object) -> None:
    bus, got = Bus(), []

    async def listen(*, task_status: trio.TaskStatus[None]) -> None:
        with bus.subscribe(AlertCleared) as events:
            task_status.started()
            async for event in events:
                got.append(event.code)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        bus.publish(AlertCleared(code="first"))
        await trio.testing.wait_all_tasks_blocked()
        bus.publish(AlertCleared(code="second"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert got == ["first", "second"]


async def test_an_ended_subscription_gets_nothing_more() -> None:
    bus = Bus()
    with bus.subscribe(AlertCleared) as events:
        pass
    bus.publish(AlertCleared(code="late"))
    with trio.move_on_after(0):
        await events.__anext__()
        pytest.fail("an event came after the end")


async def test_an_action_has_one_handler_and_is_unknown_without() -> None:
    bus = Bus()

    async def handler(payload: dict[str, Any]) -> dict[str, Any]:
        return {"got": payload["n"]}

    with bus.answer("count", handler):
        assert await bus.ask("count", {"n": 3}) == {"got": 3}
        with pytest.raises(ValueError, match="count has a handler already"), bus.answer("count", handler):
            pass
    with pytest.raises(ActionError, match="nothing here answers 'count'") as caught:
        await bus.ask("count", {})
    assert caught.value.reason == "unknown_action: nothing here answers 'count'"
