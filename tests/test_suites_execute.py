"""One run from its slot to its result, with real processes: every test has a state, nothing of it stays alive."""

import hashlib
import os
import sys
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.core.errors import ActionError
from agent.core.events import (
    RunChanged,
    RunReceived,
    RunStarted,
    TestFinished,
    TestStarted,
    Warned,
)
from agent.core.processtree import tree
from tests.suites_house import R, artifact, house, tap


async def test_a_good_run_goes_through_its_states_and_leaves_its_files(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(command=tap("echo 1..2; echo ok 1 - a; echo noise >&2; echo ok 2 - b"))
        finished = await here.finished()
        assert (finished.verdict, finished.result, finished.code) == ("passed", "SUCCESS", 0)
        assert (finished.counts.total, finished.counts.passed) == (2, 2)
        await here.store.commit()
        assert [e.state for e in await here.events(RunChanged)] == ["preparing", "running", "reporting", "done"]
        assert [type(e).__name__ for e in await here.events(RunReceived, RunStarted)] == ["RunReceived", "RunStarted"]
        assert [test["case"] for test in here.result()["tests"]] == ["a", "b"]
        assert artifact(finished, "stderr.log") == b"noise\n"
        assert b"testcase" in artifact(finished, "xunit.xml")


async def test_a_run_in_which_the_date_is_set_lasts_as_long_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, real = 56 * 365 * 86_400, time.time
    monkeypatch.setattr(time, "time", lambda: real() - late)  # a machine without a battery begins in 1970
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=tap("echo 1..2; echo ok; until [ -e go ]; do sleep 0.01; done; echo ok"))
            await anext(results)
        monkeypatch.setattr(time, "time", real)
        here.write("go", "")
        finished = await here.finished()
        assert 0 < finished.ended - finished.started < 3600
        assert real() - finished.started < 3600


async def test_cancel_ends_the_whole_tree_and_keeps_what_had_passed(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write("daemon.py", DAEMON)
        hangs = tap(f"echo 1..3; echo ok 1 - early; {sys.executable} daemon.py; sleep 600")
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=hangs, limits={"grace": 0.2})
            await anext(results)
        await here.bus.ask("cancel", {"run": R[1], "reason": "by a test"})
        finished = await here.finished()
        assert (finished.verdict, finished.result, finished.reason) == ("aborted", "ABORTED", "cancel: by a test")
        assert (await here.states())["early"] == "passed"
        assert finished.counts.passed == 1
        assert tree(R[1]) == []


async def test_a_run_whose_files_are_looked_for_without_end_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, released, real = trio.Event(), threading.Event(), Path.glob

    def hung(path: Path, pattern: str) -> Iterable[Path]:
        if pattern == "*.t":
            trio.from_thread.run_sync(looking.set)
            released.wait()
        return real(path, pattern)

    monkeypatch.setattr(Path, "glob", hung)  # a disk that does not answer, or a tree without end
    async with house(tmp_path) as here:
        await here.order(command=["true"], files=["*.t"])
        await looking.wait()
        await here.bus.ask("cancel", {"run": R[1], "reason": "by a test"})
        finished = await here.finished()
        assert (finished.verdict, finished.reason) == ("aborted", "cancel: by a test")
        assert await here.states() == {"(not reported)": "aborted"}
        released.set()


async def test_a_suite_on_a_mount_that_hangs_holds_up_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, released, real = trio.Event(), threading.Event(), os.path.realpath

    def hung(path: str | Path) -> str:
        if str(path).endswith("/hung"):
            trio.from_thread.run_sync(looking.set)
            released.wait()
        return real(path)

    monkeypatch.setattr(os.path, "realpath", hung)
    async with house(tmp_path, slots=2) as here, trio.open_nursery() as nursery:
        hangs = str(here.project / "hung")
        await here.order(command=["true"], source={"dir": hangs})
        await looking.wait()
        looking = trio.Event()
        nursery.start_soon(here.bus.ask, "run_suite", {"path": hangs})
        await looking.wait()
        await here.order(R[2], command=tap("echo 1..1; echo ok"))
        assert (await here.finished(R[2])).verdict == "passed"
        await here.bus.ask("cancel", {"run": R[1], "reason": "by a test"})
        assert (await here.finished()).reason == "cancel: by a test"
        released.set()
        nursery.cancel_scope.cancel()


DAEMON = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
time.sleep(600)
"""


async def test_a_daemon_left_behind_by_a_good_run_is_gone_when_it_is_done(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write("daemon.py", DAEMON)
        await here.order(command=tap(f"echo 1..1; echo ok 1 - a; {sys.executable} daemon.py"))
        assert (await here.finished()).verdict == "passed"
        assert tree(R[1]) == []


@pytest.fixture
def passing_clock() -> MockClock:
    """It goes on as time does, and where the test makes it jump."""
    return MockClock(rate=1.0)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"run": 600}, "limits.run: not over within 600 s"),
        ({"stall": 600}, "limits.stall: no new result for 600 s"),
    ],
)
async def test_beyond_a_limit_the_run_is_aborted_by_name(
    tmp_path: Path, limits: dict[str, float], reason: str, passing_clock: MockClock
) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestFinished) as results:
            await here.order(command=tap("echo 1..2; echo ok 1 - a; sleep 1000"), limits={"grace": 0.2, **limits})
            await anext(results)
        passing_clock.jump(600)
        finished = await here.finished()
        assert (finished.verdict, finished.reason) == ("aborted", reason)
        assert await here.states() == {"a": "passed", "(not reported)": "aborted"}


async def test_a_deadline_of_the_lab_ends_the_run(tmp_path: Path, passing_clock: MockClock) -> None:
    async with house(tmp_path) as here:
        suite = here.tree(command=tap("echo 1..1; sleep 1000"), limits={"grace": 0.2})
        with here.bus.subscribe(RunStarted) as starts:
            await here.bus.ask("run_suite", {"run": R[1], "suite": suite, "deadline": time.time() + 600})
            await anext(starts)
        passing_clock.jump(600)
        assert (await here.finished()).reason == "deadline: the lab's deadline has passed"


async def test_a_runner_killed_from_outside_loses_what_was_planned(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(command=tap("echo 1..3; echo ok 1 - a; kill -9 $$"))
        finished = await here.finished()
        assert (finished.verdict, finished.result, finished.signal) == ("lost", "FAILURE", "SIGKILL")
        assert finished.counts.lost == 2


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"command": ["/no/such/program"]}, "/no/such/program"),
        ({"command": ["true"], "cwd": "nowhere"}, "nowhere is not a directory"),
        ({"command": ["true"], "source": {"dir": "/"}}, "is not below suites.roots"),
        ({"command": ["true"], "setup": [["sh", "-c", "exit 3"]]}, "ended with exit code 3"),
        ({"command": ["true"], "setup": [["sleep", "600"]], "limits": {"setup": 0.3}}, "limits.setup: not prepared"),
        ({"runner": "ava", "command": []}, "ava"),
    ],
)
async def test_what_cannot_be_started_is_blocked_and_says_why(
    tmp_path: Path, document: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "bin/node"  # without one, AVA is refused and not blocked
    node.parent.mkdir()
    node.write_text("#!/bin/sh\necho v20.0.0\n")
    node.chmod(0o755)
    monkeypatch.setenv("PATH", f"{node.parent}:{os.environ['PATH']}")
    async with house(tmp_path) as here:
        await here.order(**document)
        finished = await here.finished()
        assert finished.verdict == "blocked"
        (record,) = here.result()["tests"]
        assert (record["state"], record["kind"]) == ("blocked", "crash")
        assert said in record["message"]


async def test_teardown_runs_after_a_failed_setup_and_its_failure_is_a_warning(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(command=["true"], setup=[["false"]], teardown=[["sh", "-c", "echo done > torn\nexit 4"]])
        finished = await here.finished()
        assert finished.verdict == "blocked"
        assert (here.project / "torn").read_text() == "done\n"
        (warning,) = finished.warnings
        assert warning.code == "teardown"
        assert warning.text.startswith("sh -c echo done > torn exit 4: ended with exit code 4. See setup.log")


async def test_the_runner_sees_its_own_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_SECRET", "x")
    monkeypatch.setenv("PASSED_ON", "yes")
    async with house(tmp_path) as here:
        await here.order(command=tap("echo 1..1; echo ok; env > seen"), env={"OWN": "1"}, env_pass=["PASSED_*"])
        await here.finished()
        seen = dict(line.split("=", 1) for line in (here.project / "seen").read_text().splitlines() if "=" in line)
        assert "AGENT_SECRET" not in seen
        assert (seen["OWN"], seen["PASSED_ON"], seen["EMISSARY_RUN"]) == ("1", "yes", R[1])


async def test_output_beyond_its_limit_is_cut_in_the_middle_and_told(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(
            command=tap("echo 1..1; echo ok; head -c 4000000 /dev/zero | tr '\\0' x >&2; echo END >&2"),
            limits={"output": 10_000},
        )
        finished = await here.finished()
        assert [warning.code for warning in finished.warnings] == ["output_cut"]
        kept = artifact(finished, "stderr.log")
        assert len(kept) < 10_100
        assert kept.endswith(b"END\n")


async def test_the_copy_of_the_suites_files_goes_with_the_run(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        here.write("all.sh", "echo 1..1; echo ok")
        with tarfile.open(here.project / "suite.tar", "w") as archive:
            archive.add(here.project / "all.sh", "login/all.sh")
        path = here.project / "suite.tar"
        source = {"archive": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        await here.order(command=["sh", "all.sh"], source=source)
        assert (await here.finished()).verdict == "passed"
        left = {entry.name for entry in (tmp_path / "state/runs" / R[1]).iterdir()}
        assert left == {"result.json", "setup.log", "stderr.log", "stdout.log", "xunit.xml"}


async def test_a_teardown_whose_output_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        folder = tmp_path / "state/runs" / R[1]
        folder.mkdir(parents=True)
        (folder / "setup.log").symlink_to("/dev/full")
        await here.order(command=tap("echo 1..1; echo ok"), teardown=[["echo", "bye"]])
        finished = await here.finished()
        assert finished.verdict == "passed"
        assert "No space left on device" in next(w.text for w in finished.warnings if w.code == "teardown")


async def test_a_silent_command_is_ended_when_its_one_test_takes_too_long(
    tmp_path: Path, passing_clock: MockClock
) -> None:
    async with house(tmp_path) as here:
        with here.bus.subscribe(TestStarted) as starts:
            await here.order(runner="command", command=["sleep", "1000"], limits={"test": 60, "grace": 0.2})
            await anext(starts)
        passing_clock.jump(60)
        finished = await here.finished()
        assert finished.verdict == "aborted"
        assert str(finished.reason).startswith("limits.test: ")
        assert list((await here.states()).values()) == ["aborted"]


async def test_coverage_that_is_asked_for_and_not_there_is_a_warning_in_the_result(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        await here.order(command=tap("echo 1..1; echo ok"), coverage=True)
        finished = await here.finished()
        assert finished.verdict == "passed"
        assert [warning.code for warning in finished.warnings] == ["coverage.unavailable"]


async def test_a_run_that_waits_for_its_coverage_can_be_cancelled(tmp_path: Path) -> None:
    waits = trio.Event()

    async def cover(payload: dict[str, Any]) -> dict[str, Any]:
        waits.set()
        await trio.sleep_forever()
        raise AssertionError

    async with house(tmp_path) as here:
        with here.bus.answer("coverage_open", cover):
            await here.order(command=tap("echo 1..1; echo ok"), coverage=True)
            with trio.fail_after(60):
                await waits.wait()
            await here.bus.ask("cancel", {"run": R[1]})
            finished = await here.finished()
        assert finished.verdict == "aborted"
        assert not (tmp_path / "state/runs" / R[1] / "stdout.log").exists()


async def test_covered_runners_get_their_environment_and_the_report_is_an_artifact(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def cover(payload: dict[str, Any]) -> dict[str, Any]:
        asked.append(payload)
        return {"env": {"NODE_OPTIONS": "--ours", "PYTHONPATH": "/ours", "NODE_V8_COVERAGE": "/ours", "PROBE": "p"}}

    async def close(payload: dict[str, Any]) -> dict[str, Any]:
        asked.append(payload)
        (Path(payload["artifacts"]) / "lcov.info").write_text("TN:\n")
        return {"files": 1, "lines": 1, "covered": 1, "warnings": ["careful"]}

    own = {"NODE_OPTIONS": "--own", "PYTHONPATH": "/own", "NODE_V8_COVERAGE": "/own"}
    body = "echo 1..1; echo ok 1 - $NODE_OPTIONS $PYTHONPATH $NODE_V8_COVERAGE $PROBE"
    async with house(tmp_path) as here:
        with here.bus.answer("coverage_open", cover), here.bus.answer("coverage_close", close):
            await here.order(command=tap(body), env=own, coverage=True)
            finished = await here.finished()
        assert list(await here.states()) == ["--own --ours /ours:/own /own p"]
        assert artifact(finished, "lcov.info") == b"TN:\n"
        assert finished.warnings == (Warned("coverage", "careful"),)
        folder = tmp_path / "state/runs" / R[1]
        assert asked == [
            {"run": R[1], "dir": str(here.project), "report": True, "kept": str(folder / "scratch/coverage.json")},
            {"run": R[1], "artifacts": str(folder), "resumes": False},
        ]


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        (True, "no report: cannot write the coverage"),
        (False, "no report: the coverage of the agent was started anew during the run"),
    ],
)
async def test_coverage_that_is_lost_takes_nothing_from_the_run(tmp_path: Path, fails: bool, text: str) -> None:
    async def cover(payload: dict[str, Any]) -> dict[str, Any]:
        return {"env": {}}

    async def close(payload: dict[str, Any]) -> dict[str, Any]:
        if fails:
            raise ActionError("internal", "cannot write the coverage")
        return {}

    async with house(tmp_path) as here:
        with here.bus.answer("coverage_open", cover), here.bus.answer("coverage_close", close):
            await here.order(command=tap("echo 1..1; echo ok"), coverage=True)
            finished = await here.finished()
        assert finished.verdict == "passed"
        assert finished.warnings == (Warned("coverage.lost", text),)


async def test_a_report_for_no_project_is_a_warning_in_the_result(tmp_path: Path) -> None:
    async with house(tmp_path, project="") as here:
        await here.order(command=tap("echo 1..1; echo ok"))
        assert [warning.code for warning in (await here.finished()).warnings] == ["polarize.project"]
        await here.order(R[2], command=tap("echo 1..1; echo ok"), report={"polarion": {"project": "RHEL9"}})
        assert (await here.finished(R[2])).warnings == ()
