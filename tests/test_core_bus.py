"""Publishing, bounded subscriptions, and one handler per action."""

from typing import Any

import pytest
import trio

from agent.core.bus import Bus
from agent.core.errors import ActionError
from agent.core.events import Alert, AlertCleared, AnyEvent, LinkChanged


class Kept:
    def __init__(self) -> None:
        self.events: list[tuple[AnyEvent, float]] = []

    def append(self, event: AnyEvent, at: float) -> None:
        self.events.append((event, at))


def alert(code: str) -> Alert:
    return Alert(code=code, text="it burns", remedy="Put it out.", since=17.0)


async def test_an_event_reaches_the_journal_and_the_subscriptions_of_its_kind() -> None:
    journal = Kept()
    bus = Bus(journal, clock=lambda: 17.0)
    with bus.subscribe(Alert) as cleared, bus.subscribe(LinkChanged, Alert) as both:
        bus.publish(LinkChanged(name="mimir", state="ready"))
        bus.publish(alert("x"))
        assert await cleared.__anext__() == alert("x")
        assert [type(await both.__anext__()) for _ in range(2)] == [LinkChanged, Alert]
    assert [(type(e), at) for e, at in journal.events] == [(LinkChanged, 17.0), (Alert, 17.0)]


def test_an_alert_that_nobody_raised_is_not_cleared() -> None:
    journal = Kept()
    bus = Bus(journal)
    for event in (AlertCleared(code="x"), alert("x"), alert("x"), AlertCleared(code="x"), AlertCleared(code="x")):
        bus.publish(event)
    assert [event for event, _ in journal.events] == [alert("x"), alert("x"), AlertCleared(code="x")]


async def test_a_slow_subscriber_loses_the_oldest_and_knows_how_many() -> None:
    bus = Bus()
    with bus.subscribe(Alert, limit=2) as events:
        for code in "abcd":
            bus.publish(alert(code))
        assert events.dropped == 2
        assert [(await events.__anext__()).code for _ in range(2)] == ["c", "d"]


async def test_a_waiting_subscriber_wakes_at_the_next_event(autojump_clock: object) -> None:
    bus, got = Bus(), []

    async def listen(*, task_status: trio.TaskStatus[None]) -> None:
        with bus.subscribe(Alert) as events:
            task_status.started()
            async for event in events:
                got.append(event.code)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        bus.publish(alert("first"))
        await trio.testing.wait_all_tasks_blocked()
        bus.publish(alert("second"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert got == ["first", "second"]


async def test_an_ended_subscription_gets_nothing_more() -> None:
    bus = Bus()
    with bus.subscribe(Alert) as events:
        pass
    bus.publish(alert("late"))
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


async def test_a_handler_that_fails_answers_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    journal = Kept()
    bus = Bus(journal, clock=lambda: 7.0)

    async def handler(payload: dict[str, Any]) -> dict[str, Any]:
        if payload.get("refuse"):
            raise ActionError("no_such_run", "there is none")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
            return {"got": payload["n"]}

    with bus.answer("count", handler):
        for _ in range(2):
            with pytest.raises(ActionError) as caught:
                await bus.ask("count", {})
            assert caught.value.reason == "internal: 'count' failed here; the log has the details"
        with pytest.raises(ActionError, match="there is none"):
            await bus.ask("count", {"refuse": True})
        raised = Alert(
            code="action.count",
            text="'count' failed: KeyError; the log says where",
            remedy="Look at the agent's log; it is over once the action is carried out again.",
            since=7.0,
        )
        assert [event for event, _ in journal.events] == [raised]
        assert await bus.ask("count", {"n": 3}) == {"got": 3}
    assert [event for event, _ in journal.events] == [raised, AlertCleared(code="action.count")]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
