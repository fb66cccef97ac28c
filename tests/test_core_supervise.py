"""Roles: restarted with backoff, alone; health; orderly stop."""

import pytest
import trio
from trio.testing import MockClock

from agent.core.errors import PeerRefused, ProtocolMisuse
from agent.core.events import RoleChanged
from agent.core.supervise import Health, Role, Supervisor


class Journal:
    def __init__(self) -> None:
        self.rows: list[str] = []

    def __call__(self, event: RoleChanged) -> None:
        self.rows.append(f"{trio.current_time():.0f} {event.name} {event.state} {event.error or ''}".strip())


async def steady(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep_forever()


def longest(low: float, high: float) -> float:
    """No jitter, so that the seconds can be told."""
    return high


async def test_a_failing_role_restarts_with_backoff_and_the_others_go_on(autojump_clock: MockClock) -> None:
    said = Journal()
    supervisor = Supervisor(said, jitter=longest)

    async def broken(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        raise OSError("cable pulled")

    with trio.move_on_after(10):
        await supervisor.run([Role("steady", steady), Role("broken", broken)])
    assert sorted(said.rows[:3]) == ["0 broken backoff cable pulled", "0 broken running", "0 steady running"]
    assert [row for row in said.rows if "broken backoff" in row] == [
        "0 broken backoff cable pulled",
        "1 broken backoff cable pulled",
        "3 broken backoff cable pulled",
        "7 broken backoff cable pulled",
    ]
    assert supervisor.status["broken"].restarts == 4
    assert supervisor.status["steady"].restarts == 0


async def test_a_role_that_fails_before_it_is_up_does_not_hold_up_the_start(autojump_clock: MockClock) -> None:
    said = Journal()

    async def never_up(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        raise OSError("no such device")

    supervisor = Supervisor(said, jitter=longest)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run, [Role("files", never_up)])
        assert supervisor.status["files"].state == "backoff"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("failure", "has_traceback"),
    [
        (PeerRefused("no", remedy="Ask."), False),
        (ProtocolMisuse("our bug", remedy="Tell us."), True),
        (OSError("cable pulled"), True),
    ],
)
async def test_what_was_raised_on_purpose_is_one_line_in_the_log(
    failure: Exception, has_traceback: bool, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        raise failure

    with trio.move_on_after(0.1):
        await Supervisor(lambda event: None).run([Role("r", broken)])
    (told,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert told.getMessage() == f"role failed role=r error={failure}"
    assert bool(told.exc_info) == has_traceback


async def test_a_failure_beside_the_stop_is_in_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def cannot_close() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("cannot be closed")

    async def fails_at_its_end(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cannot_close)
            nursery.start_soon(trio.sleep_forever)
            task_status.started()

    said = Journal()
    supervisor = Supervisor(said)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run, [Role("r", fails_at_its_end)])
        await supervisor.stop("r")
        nursery.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "role failed role=r error=cannot be closed"
    ]
    assert said.rows == ["0 r running", "0 r stopped"]


async def test_an_hour_of_good_work_resets_the_backoff(autojump_clock: MockClock) -> None:
    said = Journal()

    async def fails_after_an_hour(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep(3600)
        raise OSError("again")

    with trio.move_on_after(3 * 3600 + 30):
        await Supervisor(said, jitter=longest).run([Role("r", fails_after_an_hour)])
    assert [row for row in said.rows if "backoff" in row] == [
        "3600 r backoff again", "7201 r backoff again", "10802 r backoff again",
    ]  # fmt: skip


async def test_a_role_can_be_stopped_and_started_again(autojump_clock: MockClock) -> None:
    said = Journal()
    supervisor = Supervisor(said)
    async with trio.open_nursery() as nursery:
        assert not supervisor.runs("r")
        await nursery.start(supervisor.run, [Role("r", steady)])
        assert supervisor.runs("r")
        await supervisor.stop("r")
        assert not supervisor.runs("r")
        await supervisor.start(Role("r", steady))
        nursery.cancel_scope.cancel()
    assert said.rows == ["0 r running", "0 r stopped", "0 r running"]


async def test_a_role_that_returns_has_ended_and_is_not_restarted(autojump_clock: MockClock) -> None:
    async def once(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()

    supervisor = Supervisor(lambda event: None)
    with trio.move_on_after(100):
        await supervisor.run([Role("once", once)])
    assert supervisor.status["once"].state == "ended"
    assert supervisor.status["once"].restarts == 0


async def test_a_unit_of_work_is_overdue_only_while_it_lasts(autojump_clock: MockClock) -> None:
    health = Health("logs")
    assert health.overdue_s() == 0
    with health.busy(limit=5):
        await trio.sleep(4)
        assert health.overdue_s() == 0
        await trio.sleep(3)
        assert health.overdue_s() == pytest.approx(2)
    assert health.overdue_s() == 0


async def test_a_thread_that_does_more_than_ask_the_disk_hangs_when_its_time_is_over(autojump_clock: MockClock) -> None:
    health, asked = Health("logs"), [None, "/mnt/log", "/mnt/log", None]
    with health.asking(lambda: asked.pop(0), within_s=5):
        await trio.sleep(14.5)
        assert health.hung() == {}
        await trio.sleep(0.5)
        assert [health.hung() for _ in range(3)] == [{}, {"/mnt/log": 10}, {"/mnt/log": 10}]
        assert health.hung() == {}
    assert health.hung() == {}
