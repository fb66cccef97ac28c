"""The watchdog is fed from progress; what is overdue is named; a trial ends after a minute that was good."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent.core import heartbeat, notify
from agent.core.events import Alert, AlertCleared, RoleChanged
from agent.core.release import Pending
from agent.core.store import Store, open_store
from agent.core.supervise import Health, Role, Supervisor


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "state", reserve=4096)
    yield opened
    opened.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the supervisor is told, with the second."""
    told: list[str] = []
    monkeypatch.setattr(notify, "_send", lambda message: told.append(f"{trio.current_time():.0f} {message}"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    return told


def quiet(event: RoleChanged) -> None:
    pass


async def work_from_5_to_43(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep(5)
    with health.busy(limit=10):
        await trio.sleep(38)
    await trio.sleep_forever()


async def idle(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep_forever()


async def live(store: Store, role: Callable[..., object], seconds: float) -> list[Alert | AlertCleared]:
    """The alerts of so long a life."""
    supervisor, told = Supervisor(quiet), list[Alert | AlertCleared]()
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run, [Role("worker", role)])  # type: ignore[arg-type] # a test's role
            nursery.start_soon(heartbeat.beat, supervisor, store, told.append)
    return told


async def test_an_idle_agent_is_fed_for_ever(store: Store, said: list[str], autojump_clock: MockClock) -> None:
    await live(store, idle, 3601)
    assert said == [f"{second} WATCHDOG=1" for second in range(0, 3601, 10)]


async def test_a_role_that_is_overdue_is_named_with_its_stack_and_starves_the_watchdog(
    store: Store, said: list[str], autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await live(store, work_from_5_to_43, 55)
    assert said == [
        "0 WATCHDOG=1",
        "10 WATCHDOG=1",
        "20 STATUS=overdue: worker by 5 s",
        "30 STATUS=overdue: worker by 15 s",
        "40 STATUS=overdue: worker by 25 s",
        "50 STATUS=well again",
        "50 WATCHDOG=1",
    ]
    assert caplog.text.count("overdue name=worker") == 1
    assert "in work_from_5_to_43" in caplog.text
    assert "no longer overdue names=worker" in caplog.text


async def test_a_store_that_is_behind_starves_it_but_a_full_disk_does_not(
    store: Store, said: list[str], autojump_clock: MockClock
) -> None:
    store.put("a", 1)  # and no writer runs
    await live(store, idle, 15)
    assert said == ["0 WATCHDOG=1", "10 STATUS=overdue: store by 10 s"]
    store.full = True
    await live(store, idle, 15)
    assert said[2:] == ["15 WATCHDOG=1", "25 WATCHDOG=1"]
    await live(store, work_from_5_to_43, 45)  # what waits for room is in memory: no restart
    assert [line.split()[1] for line in said[4:]] == ["WATCHDOG=1"] * 5


async def test_a_loop_that_was_late_starves_it_once(
    store: Store, said: list[str], mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, told = Supervisor(quiet), list[Alert | AlertCleared]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heartbeat.beat, supervisor, store, told.append)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(17)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(10)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert said == ["0 WATCHDOG=1", "17 STATUS=overdue: loop by 7 s", "27 STATUS=well again", "27 WATCHDOG=1"]


async def test_without_a_watchdog_it_still_names_what_hangs(
    store: Store, said: list[str], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC")
    await live(store, work_from_5_to_43, 25)
    assert said == ["20 STATUS=overdue: worker by 5 s"]


async def test_a_disk_that_hangs_is_told_and_starves_nothing(
    store: Store, said: list[str], autojump_clock: MockClock
) -> None:
    async def two_mounts(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        async def ask(path: str, seconds: float) -> None:
            with health.asking(path):
                await trio.sleep(seconds)

        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "/mnt/quick", 9)
            nursery.start_soon(ask, "/mnt/b\udcff", 25)
            nursery.start_soon(ask, "/mnt/a", 95)
            for number in range(12):
                nursery.start_soon(ask, f"/srv/{number:02d}", 35)
        await trio.sleep_forever()

    told = await live(store, two_mounts, 121)
    assert said == [f"{second} WATCHDOG=1" for second in range(0, 121, 10)]
    texts = [alert.text if isinstance(alert, Alert) else f"{alert.code} cleared" for alert in told]
    some = ", ".join(f"/srv/{number:02d}" for number in range(7))
    assert texts == [
        f"the disk does not answer for /mnt/a, /mnt/b\\xff, {some[:-9]} and 6 more",
        f"the disk does not answer for /mnt/a, {some} and 5 more",
        "the disk does not answer for /mnt/a",
        "disk.hung cleared",
    ]


@pytest.mark.usefixtures("said")
async def test_a_trial_ends_after_a_minute_with_all_roles_healthy(
    store: Store, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pending = Pending(id="ab" * 16, version="2", previous="1", confirm=str(tmp_path / "confirmed"))
    supervisor = Supervisor(quiet)
    lives = 0

    async def fails_twice(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        nonlocal lives
        lives += 1
        if lives < 3:
            await trio.sleep(20)
            raise OSError("not yet")
        await idle(health, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run, [Role("worker", fails_twice)])
        await heartbeat.confirm(supervisor, store, pending)
        nursery.cancel_scope.cancel()
    assert trio.current_time() > 40 + 60
    assert (tmp_path / "confirmed").read_text() == pending.id + "\n"


@pytest.mark.usefixtures("said")
async def test_a_trial_that_cannot_be_confirmed_is_said_and_tried_again(
    store: Store, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    pending = Pending(id="ab" * 16, version="2", previous="1", confirm=str(tmp_path / "gone/confirmed"))

    async def make_room() -> None:
        await trio.sleep(100)
        (tmp_path / "gone").mkdir()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_room)
        await heartbeat.confirm(Supervisor(quiet), store, pending)
    assert caplog.text.count("release cannot be confirmed version=2") == 1
    assert trio.current_time() == pytest.approx(120)
    assert (tmp_path / "gone/confirmed").exists()
