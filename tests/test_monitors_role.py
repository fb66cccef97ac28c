"""The role: ticks, slots, reload, what is kept, and what a killed agent left behind."""

import errno
import os
import shutil
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from agent.control.exposition import exposition
from agent.core.bus import Bus
from agent.core.errors import ActionError
from agent.core.events import MonitorLog, MonitorSkipped, MonitorStep, Reloaded
from agent.core.metrics import Metrics
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.monitors import role
from agent.monitors.execute import execute
from agent.monitors.history import History
from agent.monitors.role import MARK
from agent.monitors.session import Act, Session
from agent.monitors.settings import MonitorsSettings, Step
from tests.monitors_house import ID, house, monitor, program

GOOD = "shake()\nwhile hear().startswith('Run'): say('Step Time 5')"


async def until_known(bus: Bus) -> None:
    """Until there is a monitor: what the store has of one that is new is read in a thread."""
    with trio.fail_after(60):
        while not (await bus.ask("monitors", {}))["monitors"]:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_ticks_come_by_themselves(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(program(tmp_path, GOOD), interval=1.0)) as here:
        await here.until(lambda: len(here.runs()) >= 3)
        assert [step.state for step in here.steps()[:3]] == ["ok"] * 3
        assert [run.run for run in here.runs()[:2]] == [f"{ID}-000001", f"{ID}-000002"]
        starts = [step.started_at or 0.0 for step in here.steps()]
        assert starts == sorted(starts)


async def test_a_run_that_we_cannot_go_on_with_has_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(session: Session, now: float) -> list[Act]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Session, "tick", fail)
    body = "shake(); hear(); say('Step OK'); hear(); time.sleep(600)"
    given = monitor(program(tmp_path, body), steps=("A", Step(name="B", timeout=0.1), "C"))
    async with house(tmp_path, given) as here:
        steps = await here.run_once()
        [run] = here.runs()
    assert [(step.step, step.state) for step in steps] == [("A", "ok"), ("B", "not_run"), ("C", "not_run")]
    assert (run.ended_by, run.signal) == ("kill", "SIGKILL")
    assert f"monitor given up monitor={ID} error=[Errno 5] Input/output error" in caplog.text


async def test_a_run_longer_than_its_interval_is_not_run_twice(tmp_path: Path) -> None:
    over = tmp_path / "over"
    body = "shake(); hear()\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsay('Step OK'); hear()"
    async with house(tmp_path, monitor((*program(tmp_path, body), str(over)), interval=1.0)) as here:
        with trio.fail_after(60):
            while (await here.bus.ask("monitors", {}))["monitors"][0]["skipped"].get("overlap", 0) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        over.touch()
        await here.until(lambda: any(isinstance(event, MonitorSkipped) for event in here.events))
        [skipped] = [event for event in here.events if isinstance(event, MonitorSkipped)]
        assert skipped.reason == "overlap"
        assert skipped.count >= 2
        assert len(here.runs()) == 1


async def test_what_the_role_answers(tmp_path: Path) -> None:
    given = monitor(program(tmp_path, GOOD), steps=("A", Step(name="B", timeout=3.0)))
    async with house(tmp_path, given) as here:
        await here.run_once()
        [shown] = (await here.bus.ask("monitors", {}))["monitors"]
        msgspec.json.encode(shown)
        assert (shown["id"], shown["state"], shown["run"], shown["interval"]) == (ID, "idle", None, 86_400.0)
        step = shown["steps"]["A"]
        assert (step["states"], step["last"], step["at"]) == ({"ok": 1}, "ok", here.steps()[0].ended_at)
        assert [step[name] for name in ("ms", "p50", "p95", "p99")] == [5.0] * 4
        text = exposition(here.metrics)
        assert f'emissary_monitors_steps_total{{monitor="{ID}",state="ok",step="A"}} 1' in text
        assert f'emissary_monitors_step_seconds{{monitor="{ID}",quantile="0.95",step="B"}} 0.005' in text
        with pytest.raises(ActionError, match="no monitor 'none'"):
            await here.bus.ask("run_monitor", {"id": "none"})


async def test_a_reload_leaves_others_alone_and_leads_out_what_is_gone(tmp_path: Path) -> None:
    waits = program(tmp_path, "shake(); hear(); say('Step OK'); hear(); say('Log Info begun'); hear()", "waits.py")
    slow = program(tmp_path, "shake(); hear(); time.sleep(1); say('Step OK'); hear()", "slow.py")
    one, other = monitor(waits, id=f"{ID}-one", steps=("A", "B")), monitor(slow, id=f"{ID}-other")
    async with house(tmp_path, one, other) as here:
        for name in (one.id, other.id):
            await here.bus.ask("run_monitor", {"id": name})
        await here.until(lambda: any(isinstance(event, MonitorLog) for event in here.events))
        await here.reload(monitor=(other, monitor(slow, id=f"{ID}-third")))
        await here.until(lambda: {run.monitor for run in here.runs()} == {one.id, other.id})
        assert [(step.state, step.cause) for step in here.steps() if step.monitor == one.id] == [
            ("ok", None),
            ("not_run", "stopped"),
        ]
        assert [step.state for step in here.steps() if step.monitor == other.id] == ["ok"]
        assert [shown["id"] for shown in (await here.bus.ask("monitors", {}))["monitors"]] == [other.id, f"{ID}-third"]
        assert f'monitor="{other.id}"' in exposition(here.metrics)
        assert one.id not in exposition(here.metrics)


async def test_a_reload_while_the_role_comes_up_is_not_missed(tmp_path: Path) -> None:
    bus, store, reads = Bus(), open_store(tmp_path, reserve=4096), 0
    after = MonitorsSettings(monitor=(monitor(("/bin/true",)),))

    def settings() -> MonitorsSettings:
        nonlocal reads
        reads += 1
        if reads == 2:  # the first was for what the schedule begins with
            bus.publish(Reloaded())
        return after if reads > 2 else MonitorsSettings()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                health = Health("monitors")
                await role.run(bus, store, settings, "lab-07", health, metrics=Metrics(), task_status=task_status)

            await nursery.start(serve)
            await until_known(bus)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def test_one_that_is_removed_and_comes_back_gives_no_run_the_id_of_an_earlier_one(tmp_path: Path) -> None:
    given = monitor(program(tmp_path, "shake(); hear(); say('Step OK'); hear()"))
    ids: list[str] = []
    for _ in range(2):  # the second agent has the numbers from the disk
        async with house(tmp_path) as here:
            for _ in range(2):
                await here.reload(monitor=(given,))
                await until_known(here.bus)
                ids += {step.run for step in await here.run_once()}
                await here.reload()
            assert (await here.bus.ask("monitors", {}))["monitors"] == []
    assert len({*ids}) == 4


async def test_a_run_that_somebody_asked_for_and_that_gets_no_slot_any_more_has_its_lines(tmp_path: Path) -> None:
    waits = program(tmp_path, "shake(); say('Log Info begun'); hear(); hear()")
    first, removed, waiting = (monitor(waits, id=f"{ID}-{n}", steps=("A", "B")) for n in range(3))
    async with house(tmp_path, first, removed, waiting, max_concurrent=1) as here:
        runs = [(await here.bus.ask("run_monitor", {"id": each.id}))["run"] for each in (first, removed, waiting)]
        await here.until(here.logs)
        await here.reload(monitor=(first, waiting), max_concurrent=1)
        ended = here.ended(runs[1])
    for run, what in ((runs[1], "the monitor was removed"), (runs[2], "the agent ended")):
        assert [(step.state, step.cause, step.text) for step in here.steps(run)] == [
            ("not_run", "stopped", f"{what} while the run waited for a slot")
        ] * 2
    assert ended is not None
    assert [run.run for run in here.runs()].count(runs[2]) == 1
    assert len(here.runs()) == 3


async def test_one_of_a_profile_that_is_not_installed_is_left_out_and_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent = monitor((f"{role.SHARE}examples/no-such.sh",), id=f"{ID}-absent", interval=1.0)
    there = monitor((f"{role.SHARE}examples/hello.sh",), steps=("Greet",), config={"Name": "Ann"})
    async with house(tmp_path, absent, there) as here:
        await here.reload(monitor=(absent, there))
        assert [step.state for step in await here.run_once()] == ["ok"]  # beside the role, in a checkout
        assert [shown["id"] for shown in (await here.bus.ask("monitors", {}))["monitors"]] == [ID]
        with pytest.raises(ActionError, match="no monitor"):
            await here.bus.ask("run_monitor", {"id": absent.id})
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        f"monitor left out monitor={absent.id} file={role.SHARE}examples/no-such.sh: it is not installed."
        " Install the package."
    ]


async def test_the_history_outlives_the_agent(tmp_path: Path) -> None:
    given = monitor(program(tmp_path, GOOD))
    async with house(tmp_path, given) as here:
        await here.run_once()
        await here.store.commit()
    async with house(tmp_path, given) as here:
        await here.run_once()
        assert here.runs()[0].run == f"{ID}-000002"
        [shown] = (await here.bus.ask("monitors", {}))["monitors"]
        assert shown["steps"]["A"]["states"] == {"ok": 2}


async def test_a_run_that_the_agent_s_death_cut_off_has_all_its_lines_and_its_number_alone(tmp_path: Path) -> None:
    given = monitor(program(tmp_path, GOOD), steps=("A", "B", "A"))
    cut = f"{ID}-000003"
    folder = tmp_path / "state/monitors" / f"{MARK}{cut}-abc123"
    folder.mkdir(parents=True)
    store = open_store(tmp_path / "state", reserve=4096)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.put(f"monitors.{ID}", History(runs=2, reserved=7))
        store.append(MonitorStep(monitor=ID, run=cut, step="A", state="ok", metadata={}), 1.0)
        await store.commit()
        nursery.cancel_scope.cancel()
    store.close()
    async with house(tmp_path, given) as here:
        assert [(step.step, step.state, step.cause, step.text) for step in here.steps(cut)] == [
            (step, "not_run", "stopped", "the agent was ended in its midst") for step in ("B", "A")
        ]
        assert here.ended(cut)
        await here.run_once()
        assert here.runs()[-1].run == f"{ID}-000008"


async def test_a_run_that_was_promised_and_had_no_slot_when_the_agent_was_killed_has_its_lines(tmp_path: Path) -> None:
    waits = program(tmp_path, "shake(); say('Log Info begun'); hear(); hear()")
    first, promised = (monitor(waits, id=f"{ID}-{n}", steps=("A", "B")) for n in range(2))
    async with house(tmp_path, first, promised, max_concurrent=1) as here:
        await here.bus.ask("run_monitor", {"id": first.id})
        await here.until(here.logs)
        run = (await here.bus.ask("run_monitor", {"id": promised.id}))["run"]
        shutil.copytree(tmp_path / "state", tmp_path / "again/state")  # as it is on the disk at that moment
    for cut_off in (True, False):
        async with house(tmp_path / "again", first, promised) as here:
            steps = [(step.step, step.state, step.cause, step.text) for step in here.steps(run)]
            await here.store.commit()
        text = "the agent was ended while the run waited for a slot"
        assert steps == ([(step, "not_run", "stopped", text) for step in ("A", "B")] if cut_off else [])


async def test_a_run_that_the_agent_s_end_cuts_off_is_told_as_ended(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(program(tmp_path, "shake(); hear(); say('Log Info on'); hear()"))) as here:
        await here.bus.ask("run_monitor", {"id": ID})
        await here.until(here.logs)
    assert [(step.state, step.cause) for step in here.steps()] == [("not_run", "stopped")]
    assert [(run.ended_by, run.signal) for run in here.runs()] == [("kill", "SIGKILL")]


async def test_what_a_killed_agent_left_is_cleared_up(tmp_path: Path) -> None:
    run = f"{ID}-000007"
    folder = tmp_path / "state/monitors" / f"{MARK}{run}-abc123"
    folder.mkdir(parents=True)
    env = {"EMISSARY_RUN": f"{MARK}{run}", "PATH": "/usr/bin:/bin"}
    # Its first output is there once it is what it is started as, and can be found by its mark.
    start = partial(
        trio.run_process, ["sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE, check=False, env=env
    )
    async with trio.open_nursery() as nursery:
        left = await nursery.start(partial(start, start_new_session=True))
        assert await left.stdout.receive_some() == b"\n"
        async with house(tmp_path):
            assert not folder.exists()
            with trio.fail_after(60):
                assert await left.wait() == -9


async def test_a_configuration_too_long_for_a_frame_refuses_the_run(tmp_path: Path) -> None:
    given = monitor(program(tmp_path, GOOD), config={"big": "x" * 100_000})
    async with house(tmp_path, given) as here:
        [step] = await here.run_once()
        assert (step.state, step.cause) == ("not_run", "start_failed")
        assert "do not fit a frame" in str(step.text)


async def test_a_webhook_that_is_called_goes_on(tmp_path: Path) -> None:
    body = (
        "shake(); hear(); say('Wait For Webhook u 1'); said = hear(); say('Log Info ' + said); say('Step OK'); hear()"
    )
    asked: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append((await stream.receive_some()).split(b"\r\n")[0])
            found = len(asked) > 1
            content = '{"ä":"😀"}'.encode() if found else b"nothing yet"
            head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            await stream.send_all(head % (200 if found else 404, len(content)) + content)

    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(trio.serve_tcp, answer, 0)
        port = listeners[0].socket.getsockname()[1]
        url = f"http://127.0.0.1:{port}/{{monitor}}/{{uid}}"
        async with house(tmp_path, monitor(program(tmp_path, body), webhook_url=url)) as here:
            [step] = await here.run_once()
            assert step.state == "ok"
            assert [line.text for line in here.logs()] == [
                r'Webhook Wait Response {"\u00e4":"\ud83d\ude00"}'  # in ASCII: a real library counts characters
            ]
            assert {*asked} == {f"GET /{ID}/u%201 HTTP/1.1".encode()}
            assert len(asked) >= 2  # an answer that is too slow is asked for again
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n" + b"1" * 70_000, "more than 65536 bytes"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 3\r\n\r\nyes", "JSON is malformed"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 50000\r\n\r\n" + b"[" * 50_000, "webhook not called yet"),
        (b"HTTP/1.1 302 X\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"220 SMTP\r\n\r\n", "illegal status line"),
    ],
    ids=["too much", "no JSON", "nested", "elsewhere", "no HTTP"],
)
async def test_a_webhook_service_that_gives_no_json_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: bytes, why: str
) -> None:
    asked = trio.Event()

    async def give(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
                await stream.send_all(answer)
            asked.set()

    # Its step ends once the answer, which is none, was told.
    told, done = tmp_path / "told", "while not os.path.exists(sys.argv[1]): time.sleep(0.01)"
    body = f"shake(); hear(); say('Wait For Webhook u')\n{done}\nsay('Step OK'); hear()"
    caplog.set_level("INFO", "agent.monitors.execute")
    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(trio.serve_tcp, give, 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/{{uid}}"
        given = monitor((*program(tmp_path, body), str(told)), webhook_url=url)
        async with house(tmp_path, given) as here:
            run = (await here.bus.ask("run_monitor", {"id": ID}))["run"]
            with trio.fail_after(60):
                while not any(why in record.getMessage() for record in caplog.records):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            told.touch()
            await here.until(lambda: here.ended(run))
            assert [step.state for step in here.steps()] == ["ok"]
            assert here.runs()[0].stray_results == 0
        nursery.cancel_scope.cancel()
    assert asked.is_set()


async def test_one_that_is_removed_before_its_second_start_has_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first start ended with the proof that it speaks the other spelling; then it was removed, and then begun."""
    body = """
shake()
order = hear()
say(f'Log Error Unexpected message "{order}", assuming we have to exit')
"""
    given = monitor(program(tmp_path, body), dialect="auto", steps=("A", "B"))
    starts = []
    async with house(tmp_path, given) as here:

        async def and_removed(*args: Any, **more: Any) -> Any:
            starts.append(await execute(*args, **more))
            await here.reload()
            return starts[-1]

        monkeypatch.setattr(role, "execute", and_removed)
        steps = await here.run_once()
        assert [(step.step, step.state, step.cause) for step in steps] == [
            ("A", "not_run", "stopped"), ("B", "not_run", "stopped"),
        ]  # fmt: skip
        assert [start.again for start in starts] == ["seed"]
        assert len(here.runs()) == 1
        assert await here.bus.ask("monitors", {}) == {"monitors": []}
