"""Taking, refusing, ending and recovering runs, with real processes."""

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.core.errors import ActionError
from agent.core.events import (
    RunReceived,
    RunRefused,
    RunStarted,
    SuiteFinished,
    TestFinished,
    TestStarted,
)
from agent.core.processtree import tree
from tests.suites_house import R, artifact, house, tap


async def test_a_run_that_is_known_starts_nothing_again(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        for _ in range(3):
            await here.order(command=tap("echo 1..1; echo ok; echo x >> started"))
        await here.finished()
        await here.order(command=tap("echo never"))
        assert (here.project / "started").read_text() == "x\n"
        assert len(await here.events(RunStarted)) == 1


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"runner": "avo"}, "bad_suite: suite: runner"),
        ({"command": ["true"], "source": None}, "bad_suite: suite: source: expected a table, got null"),
        ({"command": ["true"], "requires": {"labels": ["gpu"]}}, "labels: this machine has no gpu"),
        ({"command": ["true"], "requires": {"runners": {"cobol": ">=85"}}}, "no_runner: this machine has no cobol"),
        ({"command": ["true"], "requires": {"disk": 2**49}}, "space: "),
    ],
)
async def test_what_the_machine_cannot_take_is_refused_with_its_reason(
    tmp_path: Path, document: dict[str, Any], reason: str
) -> None:
    async with house(tmp_path) as here:
        await here.order(**document)
        (refused,) = await here.events(RunRefused)
        assert refused.reason.startswith(reason)
        assert await here.store.kept() == []
        with pytest.raises(ActionError) as caught:
            await here.bus.ask("run_suite", {"run": R[2], "suite": here.tree(**document)})
        assert caught.value.reason.split(":")[0] in ("bad_payload", "busy")


async def test_a_document_that_came_over_a_link_needs_a_source(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        tree = here.tree(command=["true"])
        del tree["source"]
        await here.bus.ask("run_suite", {"run": R[1], "suite": tree, "origin": "seneschal"})
        (refused,) = await here.events(RunRefused)
        assert refused.reason.startswith("bad_suite: suite: source: is missing. It came over a link")


async def test_a_second_run_is_refused_while_the_slot_is_taken_or_drained(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(command=tap("echo 1..1; echo ok; sleep 600"))
        await here.order(R[2], command=["true"])
        (busy,) = await here.events(RunRefused, run=R[2])
        assert busy.reason == "busy: every slot is taken"
        await here.bus.ask("cancel", {"run": R[1], "reason": "enough"})
        await here.finished()
        await here.bus.ask("drain", {})
        await here.order(R[3], command=["true"])
        (drained,) = await here.events(RunRefused, run=R[3])
        assert drained.reason == "draining"
        await here.bus.ask("shut_down", {})
    async with house(tmp_path) as here:
        assert (await here.bus.ask("runs", {}))["draining"] is True  # a restart does not end it
        await here.bus.ask("undrain", {})
        await here.order(R[4], command=tap("echo 1..1; echo ok"))
        assert (await here.finished(R[4])).verdict == "passed"
        await here.bus.ask("shut_down", {})
    async with house(tmp_path) as here:
        assert (await here.bus.ask("runs", {}))["draining"] is False  # and the end of the service begins none


async def test_one_order_that_comes_from_two_sides_at_once_starts_once(tmp_path: Path) -> None:
    async with house(tmp_path, slots=3) as here:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(partial(here.order, command=tap("echo 1..1; echo ok")))
        await here.finished()
        assert len(await here.events(RunReceived)) == len(await here.events(RunStarted)) == 1


async def test_shutting_down_aborts_runs_and_leaves_resumable_ones(tmp_path: Path) -> None:
    async with house(tmp_path, slots=2) as here:
        await here.order(R[1], command=tap("echo 1..1; sleep 600"), limits={"grace": 0.2})
        await here.order(R[2], runner="pytest", command=["sleep", "600"], resumable=True)
        with trio.fail_after(60):
            await here.bus.ask("shut_down", {})
        assert (await here.finished(R[1])).reason == "shutdown"
        assert await here.events(SuiteFinished, run=R[2]) == []
        assert await here.store.kept() == [R[2]]


async def test_an_interrupted_run_is_reported_once_with_what_had_finished(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=tap("echo 1..2; echo ok 1 - a; sleep 600"))
            await anext(results)
    async with house(tmp_path) as here:
        finished = await here.finished()
        assert (finished.verdict, finished.reason) == ("aborted", "interrupted")
        assert await here.states() == {"a": "passed", "(not reported)": "aborted"}
        assert tree(R[1]) == []
    async with house(tmp_path) as here:
        assert len(await here.events(SuiteFinished)) == 1


async def test_an_interrupted_run_is_torn_down_once_before_it_is_reported(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestFinished) as results:
            await here.order(
                command=tap("echo 1..2; echo ok 1 - a; sleep 600"),
                setup=[["sh", "-c", "echo $MARK up; touch up"]],
                teardown=[["sh", "-c", "rm up; echo $MARK torn >> torn"], ["sh", "-c", "echo also; exit 4"]],
                env={"MARK": "it is"},
            )
            await anext(results)
        assert (here.project / "up").exists()
    for _ in range(2):
        async with house(tmp_path) as here:
            finished = await here.finished()
            assert (finished.verdict, finished.reason) == ("aborted", "interrupted")
            assert [(warning.code, "exit code 4" in warning.text) for warning in finished.warnings] == [
                ("teardown", True)
            ]
            assert artifact(finished, "setup.log") == b"it is up\n"
            assert artifact(finished, "teardown.log") == b"also\n"
        assert not (here.project / "up").exists()
        assert (here.project / "torn").read_text() == "it is torn\n"


async def test_a_run_whose_folder_was_removed_while_the_agent_was_down_is_reported(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=tap("echo 1..2; echo ok 1 - a; sleep 600"))
            await anext(results)
    shutil.rmtree(tmp_path / "state/runs")
    with trio.fail_after(60):
        async with house(tmp_path) as here:
            assert (await here.finished()).reason == "interrupted"
            assert [test["case"] for test in here.result()["tests"]] == ["a", "(not reported)"]


async def test_a_run_that_a_newer_version_took_is_reported_as_interrupted(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestStarted) as starts:
            await here.order(runner="command", command=["sleep", "600"])
            await anext(starts)
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db, db:  # as if the release had been gone back from
        ((seq, data),) = db.execute("SELECT seq, data FROM journal WHERE kind = 'RunReceived'").fetchall()
        received = json.loads(data)
        received["suite"]["newer"] = True
        db.execute("UPDATE journal SET data = ? WHERE seq = ?", (json.dumps(received).encode(), seq))
    async with house(tmp_path) as here:
        finished = await here.finished()
        assert (finished.runner, finished.verdict, finished.reason) == ("command", "aborted", "interrupted")


async def test_the_answer_of_runs_tells_what_runs_now(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        idle = await here.bus.ask("runs", {})
        assert (idle["slots"], idle["free"], idle["draining"], idle["runs"]) == (1, 1, False, [])
        assert "python3" in idle["runners"]
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=tap("echo 1..2; echo ok 1 - a; sleep 600"))
            await anext(results)
        (busy,) = (await here.bus.ask("runs", {}))["runs"]
        assert (busy["run"], busy["state"], busy["counts"]) == (R[1], "running", {"passed": 1})


async def test_only_the_newest_folders_are_kept_though_the_date_goes_back(tmp_path: Path) -> None:
    async with house(tmp_path, keep_runs=2) as here:
        for n in range(4):
            await here.order(R[n], command=tap("echo 1..1; echo ok"))
            await here.finished(R[n])
            os.utime(tmp_path / "state/runs" / R[n], (0, 4e9 - n))
            while (await here.bus.ask("runs", {}))["runs"]:
                await trio.lowlevel.checkpoint()
        with trio.fail_after(60):
            while sorted(os.listdir(tmp_path / "state/runs")) != [R[2], R[3]]:  # noqa: ASYNC110  # a thread removes them
                await trio.sleep(0.01)


@pytest.mark.parametrize(
    "payload",
    [
        *(
            {},
            {"path": "/etc"},
            {"path": "a\0b"},
            {"suite": 3},
            {"suite": {}, "run": "../x"},
            {"suite": {}, "run": ".x"},
        ),
        *({"suite": {}, "deadline": "soon"}, {"suite": {}, "reservation": 7}),
    ],
)
async def test_a_bad_order_is_answered_by_bad_payload(tmp_path: Path, payload: dict[str, Any]) -> None:
    async with house(tmp_path) as here:
        with pytest.raises(ActionError) as caught:
            await here.bus.ask("run_suite", payload)
        assert caught.value.code == "bad_payload"


async def test_a_document_and_a_path_at_once_are_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        with pytest.raises(ActionError, match="key path: suite stands beside it; give a document, or the path of one"):
            await here.bus.ask("run_suite", {"suite": {"id": "s"}, "path": "s"})


PYTEST = """
import os, time

def test_first():
    pass

def test_hangs_the_first_time():
    if os.path.exists("first time"):
        time.sleep(600)

def test_last():
    pass
"""


@pytest.mark.parametrize("resumable", [True, False])
async def test_after_an_interruption_what_was_left_runs_again_or_is_aborted_by_name(
    tmp_path: Path, resumable: bool
) -> None:
    async with house(tmp_path) as here:
        here.write("test_it.py", PYTEST)
        here.write("first time", "")
        with here.bus.subscribe(TestStarted) as starts:
            await here.order(
                runner="pytest", command=[sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], resumable=resumable
            )
            assert [(await anext(starts)).name for _ in range(2)] == ["test_first", "test_hangs_the_first_time"]
    (tmp_path / "project/first time").unlink()
    async with house(tmp_path) as here:
        finished = await here.finished()
        states = {case.removeprefix("test_it.py › "): state for case, state in (await here.states()).items()}
        if resumable:
            assert states == {
                "test_first": "passed", "test_hangs_the_first_time": "aborted",
                "test_hangs_the_first_time@2": "passed", "test_last@2": "passed",
            }  # fmt: skip
            assert (finished.verdict, finished.counts.total) == ("passed", 3)
            assert {"stdout.log", "stdout.2.log"} <= finished.artifacts.keys()  # each attempt's
        else:
            assert states == {
                "test_first": "passed", "test_hangs_the_first_time": "aborted", "test_last": "aborted",
            }  # fmt: skip
            assert (finished.verdict, finished.reason) == ("aborted", "interrupted")
        assert not tree(R[1])


AGAIN = """
import pathlib, time
def test_good(): pass
def test_hangs_the_second_time():
    ran = pathlib.Path("ran"); times = len(ran.read_text()) if ran.exists() else 0
    ran.write_text("x" * (times + 1))
    assert times
    if times == 1: time.sleep(600)
def test_passes_the_second_time(): assert pathlib.Path("ran").read_text() != "x"
"""


@pytest.mark.parametrize("resumable", [True, False])
async def test_a_run_that_is_interrupted_in_its_retries_has_each_test_once(tmp_path: Path, resumable: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    async with house(tmp_path) as here:
        here.write("test_it.py", AGAIN)
        with here.bus.subscribe(TestStarted) as starts:
            await here.order(runner="pytest", command=command, resumable=resumable, retries=1)
            while (await anext(starts)).attempt == 1:
                pass
            with trio.fail_after(60):  # it is told before the test itself has begun
                while (here.project / "ran").read_text() != "xx":  # noqa: ASYNC110  # nothing tells of it
                    await trio.sleep(0.01)
    async with house(tmp_path) as here:
        counts = (await here.finished()).counts
        states = {case.removeprefix("test_it.py › test_"): state for case, state in (await here.states()).items()}
        assert states == {
            "good": "passed", "hangs_the_second_time": "failed", "passes_the_second_time": "failed",
            "hangs_the_second_time@2": "aborted",
            **(
                {"hangs_the_second_time@3": "passed", "passes_the_second_time@3": "passed"}
                if resumable
                else {"passes_the_second_time@2": "aborted"}
            ),
        }  # fmt: skip
        assert len(here.result()["tests"]) == len(states)
        assert (counts.total, counts.passed) == (3, 3 if resumable else 1)


STOPS = """
import pathlib
def test_a(): pass
def test_flaky():
    if not pathlib.Path("ran").exists():
        pathlib.Path("ran").touch()
        assert False
def test_last(): assert False
"""


async def test_what_a_failure_kept_from_running_runs_with_the_retries(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write("test_it.py", STOPS)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        await here.order(runner="pytest", command=command, args=["-x"], retries=1)
        assert (await here.finished()).verdict == "failed"
        assert {case.removeprefix("test_it.py › test_"): state for case, state in (await here.states()).items()} == {
            "a": "passed", "flaky": "failed", "last": "skipped", "flaky@2": "passed", "last@2": "failed",
        }  # fmt: skip


async def test_nothing_runs_again_where_a_failure_kept_from_running_what_has_no_name(tmp_path: Path) -> None:
    told = [
        {"type": "files", "total": 2},
        {"type": "selected-test", "testFile": "a.js", "title": "bad"},
        {"type": "test-failed", "testFile": "a.js", "title": "bad", "err": {"name": "E"}},
        {"type": "end"},
    ]
    async with house(tmp_path) as here:
        here.write("told", "".join(json.dumps(event) + "\n" for event in told))
        ava = ["sh", "-c", "cat told > /dev/fd/$EMISSARY_PIPE_EVENTS; exit 1"]
        await here.order(runner="ava", driver="events", command=ava, retries=1)
        finished = await here.finished()
        assert [warning.code for warning in finished.warnings] == ["retries"]
        assert await here.states() == {"a.js › bad": "failed", "(not reported)": "skipped"}


HANGS = [["sh", "-c", "test ! -p torn || { echo > torn; sleep 600; }"]]


async def hangs(project: Path) -> None:
    """Wait until a teardown as HANGS does, beside a pipe `torn`; the next one will not."""
    with trio.fail_after(60):
        await trio.to_thread.run_sync((project / "torn").read_bytes, abandon_on_cancel=True)
    (project / "torn").unlink()


async def test_a_run_that_is_interrupted_when_all_had_ended_runs_nothing_again(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write("test_it.py", "def test_it(): open('ran', 'a').write('x')\n")
        os.mkfifo(here.project / "torn")
        with here.bus.subscribe(TestFinished) as results:
            await here.order(
                runner="pytest", command=[sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], resumable=True,
                teardown=HANGS,
            )  # fmt: skip
            await anext(results)
            await hangs(here.project)
    async with house(tmp_path) as here:
        assert (await here.finished()).verdict == "passed"
        assert await here.states() == {"test_it.py › test_it": "passed"}
    assert (here.project / "ran").read_text() == "x"


async def test_an_interrupted_report_is_told_once(tmp_path: Path) -> None:
    """The machine goes down again while what it had interrupted is torn down."""
    async with house(tmp_path) as here:
        here.write("test_it.py", "import time\ndef test_it(): time.sleep(600)\n")
        os.mkfifo(here.project / "torn")
        with here.bus.subscribe(TestStarted) as starts:
            await here.order(
                runner="pytest", command=[sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
                teardown=HANGS,
            )  # fmt: skip
            await anext(starts)
    with trio.move_on_after(60) as life:
        async with trio.open_nursery() as nursery:

            async def end_it() -> None:
                await hangs(here.project)
                life.cancel()

            nursery.start_soon(end_it)
            async with house(tmp_path):
                raise AssertionError("it is up before it has torn down")
    async with house(tmp_path) as here:
        await here.finished()
        assert [test["case"] for test in here.result()["tests"]] == ["test_it.py › test_it"]


async def test_no_slot_is_offered_without_room_and_an_order_is_refused_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path) as here:
        assert (await here.bus.ask("runs", {}))["free"] == 1
        monkeypatch.setattr("agent.suites.requirements.FREE_DISK", 2**60)
        assert (await here.bus.ask("runs", {}))["free"] == 0
        await here.order(command=["true"])
        (refused,) = await here.events(RunRefused)
        assert refused.reason.startswith("space: ")
