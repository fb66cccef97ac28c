"""A wrapper: its task's environment, output, metrics, limits and end."""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.channel import Refused
from agent.core.process import Child, Exit, adopt
from agent.core.processtree import stat_of
from agent.gator.layer import Limits, Options
from agent.gator.pool import Demand, Grant
from agent.gator.settings import GatorSettings
from agent.gator.spec import Job, Memory
from agent.gator.wrapper import Wrapper
from tests.gator_tree import WITHIN_S, Above, dialled, shared_of, until

pytestmark = pytest.mark.usefixtures("own_mark")


def wrapper_of(job: Job, folder: Path, above: Above, **more: Any) -> Wrapper:
    return Wrapper(job, folder, above, shared_of(**more), Grant(Demand(1)), forward=True, is_many=False)


async def run(job: Job, folder: Path, **more: Any) -> tuple[str, int, Above]:
    """The job from start to end: result, code, what was told above."""
    above = Above()
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            await wrapper_of(job, folder, above, **more).run()
        nursery.cancel_scope.cancel()
    assert above.end is not None
    return above.end[1], above.end[2], above


def shell(script: str, **more: Any) -> Job:
    return Job(ident="j", command="sh", args=("-c", script), **more)


def messages(folder: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(folder / "db.sqlite") as db:
        rows = db.execute("SELECT severity, message FROM LogEntry ORDER BY db_uid").fetchall()
    db.close()
    return rows


def raw_log(folder: Path) -> bytes:
    (raw,) = folder.glob("raw_*.log")
    return raw.read_bytes()


def attributes(folder: Path) -> dict[str, str]:
    with sqlite3.connect(folder / "db.sqlite") as db:
        rows = dict(db.execute("SELECT name, value FROM Attribute"))
    db.close()
    return rows


async def test_a_task_that_ends_well_passes(tmp_path: Path) -> None:
    result, code, above = await run(Job(ident="j", command="true"), tmp_path / "j")
    assert (result, code) == ("SUCCESS", 0)
    assert above.end is not None
    assert (above.end[0].jobs.passed, above.end[0].failed) == (1, ())
    assert above.updates[0][0].running == (("j",),)
    told = attributes(tmp_path / "j")
    assert (told["ident"], told["path"], told["uidx"], told["root"]) == ("j", "root", "2", "0")
    assert (told["exit"], told["result"], told["host"], told["cmd"]) == ("0", "1", "lab-07", "true")
    assert float(told["started"]) <= float(told["stopped"])


async def test_output_becomes_messages_and_an_error_message_fails_the_job(tmp_path: Path) -> None:
    result, code, above = await run(shell("echo one; echo; echo two >&2"), tmp_path)
    assert (result, code) == ("FAILURE", 0)
    assert sorted(messages(tmp_path)) == [("20", "one"), ("40", "two")]
    assert sorted(above.messages) == [("ERROR", "two"), ("INFO", "one")]
    assert sorted(raw_log(tmp_path).decode().splitlines()) == ["", "one", "two"]
    assert "[ERROR  ] two" in (tmp_path / "messages.log").read_text()


@pytest.mark.parametrize(
    ("limits", "script", "result"),
    [
        (Limits(error=1), "echo a >&2", "SUCCESS"),
        (Limits(error=1), "echo a >&2; echo b >&2", "FAILURE"),
        (Limits(error=None), "echo a >&2; echo b >&2", "SUCCESS"),
        (Limits(error=None), "exit 3", "FAILURE"),
    ],
)
async def test_limits_say_how_many_messages_pass(tmp_path: Path, limits: Limits, script: str, result: str) -> None:
    assert (await run(shell(script), tmp_path, options=Options(limits=limits)))[0] == result


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (shell("exit 3"), 3),
        (shell("kill -9 $$"), -9),
        (Job(ident="j", command="no-such-program-here"), 127),
        (Job(ident="j", command="true", cwd="/no/such/folder"), 127),
        (shell("sleep 60", timeout=0.2), 124),
    ],
)
async def test_the_code_tells_the_end(tmp_path: Path, job: Job, code: int) -> None:
    assert (await run(job, tmp_path))[:2] == ("FAILURE", code)
    assert attributes(tmp_path)["exit"] == str(code)


async def test_a_task_sees_its_environment_over_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "1")
    job = Job(ident="j", command="env", env={"MODE": "fast", "HOME": "/nowhere"}, cwd=str(tmp_path))
    _, _, above = await run(job, tmp_path / "j")
    seen = dict(text.partition("=")[::2] for _, text in above.messages)
    assert (seen["KEPT"], seen["MODE"], seen["HOME"], seen["PYTHONUNBUFFERED"]) == ("1", "fast", "/nowhere", "1")
    assert seen["GATOR_PARENT"] == seen["GATOR_SERVER"] == above.address
    _, _, above = await run(job, tmp_path / "k", settings=GatorSettings(env="replace"))
    seen = dict(text.partition("=")[::2] for _, text in above.messages)
    assert "KEPT" not in seen
    assert seen["MODE"] == "fast"


async def test_variables_in_command_and_arguments_are_expanded(tmp_path: Path) -> None:
    job = Job(ident="j", command="$SHOW", args=("${WHAT:-nothing}", "$UNSET"), env={"SHOW": "echo", "WHAT": "a b"})
    assert (await run(job, tmp_path))[2].messages == [("INFO", "a b")]
    _, _, above = await run(Job(ident="j", command="echo", args=("$GATOR_PARENT", r"\$HOME")), tmp_path)
    assert above.messages == [("INFO", f"{above.address} $HOME")]


async def test_a_line_of_a_mebibyte_is_one_message_cut(tmp_path: Path) -> None:
    script = "import sys; sys.stdout.write('x' * 1048576 + '\\n' + 'after\\n')"
    result, _, above = await run(Job(ident="j", command=sys.executable, args=("-c", script)), tmp_path)
    assert result == "SUCCESS"
    (first, second) = [text for _, text in above.messages]
    assert first == "x" * 65_536 + "… (983040 bytes cut)"
    assert second == "after"
    assert len(raw_log(tmp_path)) == 1_048_576 + len("\nafter\n")


async def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    _, _, above = await run(shell(r"printf 'a\377b\n'"), tmp_path)
    assert above.messages == [("INFO", "a\ufffdb")]


async def test_a_stopped_task_that_ignores_sigterm_and_double_forks_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.wrapper.GRACE_S", 0.3)
    pids = tmp_path / "pids"
    script = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note():
    with open({str(pids)!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note()
        time.sleep(600)
    os._exit(0)
note()
print("up", flush=True)
time.sleep(600)
"""
    above = Above()
    wrapper = wrapper_of(Job(ident="j", command=sys.executable, args=("-c", script)), tmp_path / "j", above)
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        async with trio.open_nursery() as running:
            running.start_soon(wrapper.run)
            await until(lambda: ("INFO", "up") in above.messages and len(pids.read_text().split()) == 2)
            await wrapper.stop()
        nursery.cancel_scope.cancel()
    assert above.end is not None
    assert above.end[1:] == ("FAILURE", 255)
    left = [stat_of(pid) for pid in map(int, pids.read_text().split())]
    assert all(stat is None or stat.ended for stat in left)  # a zombie is dead


async def test_more_memory_than_asked_for_ends_the_task_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.wrapper.GRACE_S", WITHIN_S)
    script = "held = bytearray(200_000_000); import time; time.sleep(600)"
    job = Job(ident="j", command=sys.executable, args=("-c", script), resources=(Memory(100, "MB"),))
    result, code, above = await run(job, tmp_path)
    assert (result, code) == ("FAILURE", -15)
    assert any("asked for 100000000: killed" in text for _, text in above.messages)


async def test_who_is_killed_for_its_memory_has_not_passed_whatever_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.wrapper.GRACE_S", WITHIN_S)
    script = """if True:
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    held = bytearray(200_000_000)
    time.sleep(600)
    """
    job = Job(ident="j", command=sys.executable, args=("-c", script), resources=(Memory(100, "MB"),))
    any_number = Options(limits=Limits(error=None))
    result, code, _ = await run(job, tmp_path, options=any_number)
    assert (result, code) == ("FAILURE", 0)


async def test_a_task_tells_messages_and_metrics_to_its_wrapper(tmp_path: Path) -> None:
    above = Above()
    wrapper = wrapper_of(shell("read x < wait", cwd=str(tmp_path)), tmp_path / "j", above)
    os.mkfifo(tmp_path / "wait")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wrapper.run)
        with trio.fail_after(WITHIN_S):
            await above.registered.wait()
        async with dialled(above.address) as task:
            # As the seed prints them.
            assert await task.ask("metric", {"name": "lint_warnings", "value": 131}) == {"result": "success"}
            await task.post("metric", {"name": "lint_warnings", "value": 132})
            await task.post(
                "log", {"timestamp": 1684696137, "severity": "WARNING", "message": "This is a warning message"}
            )
            await task.ask("log", {"message": "no severity, no time"})
            await task.ask("log", {"message": "an unknown one", "severity": "LOUD"})
            with pytest.raises(Refused) as refused:
                await task.ask("metric", {"name": "msg_error", "value": 1})
            assert refused.value.reason == "Reserved metric name 'msg_error'"
            with pytest.raises(Refused, match="missing required field `message`"):
                await task.ask("log", {"severity": "INFO"})
            with pytest.raises(Refused) as refused:
                await task.ask("paint", {})
            assert refused.value.reason == "Unknown action 'paint'"
            identity = await task.ask("", {})
            assert (identity["tool"], identity["version"]) == ("gator", "1.0")
            told = await task.ask("get_messages", {"after": 1, "limit": 1})
            assert told["messages"] == [
                {
                    "uid": 2,
                    "severity": 20,
                    "message": "no severity, no time",
                    "timestamp": told["messages"][0]["timestamp"],
                }
            ]
            assert (told["total"], told["status"]) == (3, 2)
            assert await task.ask("get_tree", {}) == {"j": "STARTED"}
            job = await task.ask("resolve", {"root_path": [], "nest_path": [], "depth": 0})
            assert (job["ident"], job["status"], job["metrics"]["lint_warnings"]) == ("j", 2, 132)
            seeds = await task.ask("resolve", {"path": []})
            assert seeds.keys() == {"ident", "server_url", "metrics", "children"}
            with pytest.raises(Refused, match="has no child 'x'"):
                await task.ask("resolve", {"root_path": ["x"]})
            assert await task.ask("stop", {}) == {}
    assert above.end is not None
    assert above.end[1:] == ("FAILURE", 255)
    assert above.end[0].metrics["lint_warnings"] == 132
    with sqlite3.connect(tmp_path / "j/db.sqlite") as db:
        assert db.execute("SELECT value FROM Metric WHERE name='lint_warnings'").fetchall() == [(132,)]
        assert db.execute("SELECT timestamp FROM LogEntry WHERE db_uid=1").fetchall() == [(1684696137,)]
    db.close()


async def test_numbers_that_nothing_takes_are_refused_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.messages.MAX_METRICS", 3)
    above = Above()
    wrapper = wrapper_of(shell("read x < wait", cwd=str(tmp_path)), tmp_path / "j", above)
    os.mkfifo(tmp_path / "wait")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wrapper.run)
        with trio.fail_after(WITHIN_S):
            await above.registered.wait()
        async with dialled(above.address) as task:
            for value in (2**70, -(2**70), 1e301):
                with pytest.raises(Refused, match="value"):
                    await task.ask("metric", {"name": "huge", "value": value})
            for name in ("a", "b", "c", "a"):
                await task.ask("metric", {"name": name, "value": 2**62})
            with pytest.raises(Refused, match="Metric 'd' is one too many: a job has at most 3"):
                await task.ask("metric", {"name": "d", "value": 1})
            for at in (1e300, -1, 2**70):
                await task.ask("log", {"message": "when?", "timestamp": at})
            assert (await task.ask("get_messages", {}))["total"] == 3
            await task.ask("stop", {})
    assert above.end is not None
    with sqlite3.connect(tmp_path / "j/db.sqlite") as db:
        assert len(db.execute("SELECT * FROM LogEntry WHERE timestamp BETWEEN 1.6e9 AND 1e11").fetchall()) == 3
    db.close()


async def test_a_metric_behind_the_end_is_refused_and_a_message_is_passed_on(tmp_path: Path) -> None:
    above = Above()

    async def late() -> None:
        async with dialled(above.address) as task:
            with pytest.raises(Refused, match="Metric 'm' comes behind the end of the job"):
                await task.ask("metric", {"name": "m", "value": 1})
            await task.ask("log", {"message": "late"})

    above.before_end = late
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        await wrapper_of(Job(ident="j", command="true"), tmp_path, above).run()
        nursery.cancel_scope.cancel()
    assert above.end is not None
    assert (above.end[1], above.messages) == ("SUCCESS", [("INFO", "late")])


@pytest.mark.parametrize(
    ("script", "result", "code"),
    [
        ("exit 0", "SUCCESS", 0),
        ("exit 3", "FAILURE", 3),
        ("kill $$", "FAILURE", 255),
        ("sh -c 'kill $$'; exit", "FAILURE", 255),
    ],
)
async def test_a_stop_behind_the_end_of_the_task_changes_nothing_unless_a_signal_ended_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, result: str, code: int
) -> None:
    above, finish = Above(), Child.finish
    wrapper = wrapper_of(shell(script), tmp_path, above)

    async def stopped_meanwhile(child: Child) -> Exit:
        await wrapper.stop()
        return await finish(child)

    monkeypatch.setattr(Child, "finish", stopped_meanwhile)
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        await wrapper.run()
        nursery.cancel_scope.cancel()
    assert (wrapper.result, wrapper.code) == (result, code)


async def test_processes_are_counted_each_interval(tmp_path: Path) -> None:
    def looks() -> list[Any]:
        with closing(sqlite3.connect(tmp_path / "db.sqlite")) as db:
            return db.execute("SELECT nproc, mem, vmem FROM ProcStat").fetchall()

    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        above = Above()
        wrapper = wrapper_of(shell("sleep 600 & wait"), tmp_path, above, options=Options(interval_s=0.1))
        nursery.start_soon(wrapper.run)
        with trio.fail_after(WITHIN_S):
            await above.registered.wait()
        await until(lambda: any(nproc == 2 and vmem > mem > 0 for nproc, mem, vmem in looks()))  # the shell, its child
        await wrapper.stop()
        await until(lambda: above.end is not None)
        nursery.cancel_scope.cancel()


async def test_the_time_of_processes_that_have_ended_counts(tmp_path: Path) -> None:
    burn = "import os\nwhile sum(os.times()[:2]) < 0.1: pass"
    task = f"for i in 1 2 3 4 5 6 7 8; do {sys.executable} -c '{burn}'; done; exec sleep 600"

    def seconds() -> float:
        with closing(sqlite3.connect(tmp_path / "db.sqlite")) as db:
            told = db.execute("SELECT value FROM Attribute WHERE name = 'started'").fetchone()
            looks = db.execute("SELECT cpu, timestamp FROM ProcStat").fetchall()
        times = [float(told[0]) if told else 0.0, *(at for _, at in looks)]
        return float(sum(cpu / 100 * (at - before) for (cpu, at), before in zip(looks, times, strict=False)))

    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        above = Above()
        wrapper = wrapper_of(shell(task), tmp_path, above, options=Options(interval_s=0.3))
        nursery.start_soon(wrapper.run)
        with trio.fail_after(WITHIN_S):
            await above.registered.wait()
        await until(lambda: seconds() > 0.7)
        await wrapper.stop()
        await until(lambda: above.end is not None)
        nursery.cancel_scope.cancel()


async def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        await wrapper_of(Job(ident="j", command="true"), tmp_path / "file/j", Above()).run()
