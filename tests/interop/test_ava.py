"""The drivers and the observer (emissary_ava.mjs) against real AVAs: 6.4 and 7 on the system's Node, 8 on Node 22."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest

from agent.core.events import TestFinished, Warned
from agent.suites.messages import Suite
from agent.suites.runners.ava import EVENTS, launch
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.driver import Driver, DriverEvent, Launch, Only
from tests.ava_rows import DATA, ROWS, Row, final, shown

pytestmark = pytest.mark.interop

VERSIONS = ("6.4.1", "7.0.0", "8.0.1")
DRIVERS = ("tap", "events")
LIMIT_S = 60


class Project(NamedTuple):
    """A copy of tests/data/ava/project with one AVA beside it."""

    folder: Path
    scratch: Path
    node: Path


@pytest.fixture(params=VERSIONS)
def project(request: pytest.FixtureRequest, tmp_path: Path, npm_project: Callable[..., Path], node: Path) -> Project:
    installed = npm_project(f"ava@{request.param}") / "node_modules/ava"
    if request.param.startswith("8"):
        node = request.getfixturevalue("node22")
    folder, scratch = tmp_path / "project", tmp_path / "scratch"
    shutil.copytree(DATA / "project", folder)
    scratch.mkdir()
    (folder / "node_modules").mkdir()
    (folder / "node_modules/ava").symlink_to(installed)
    return Project(folder, scratch, node)


class Run:
    """One AVA with both drivers, without the role: pipes, threads, a process."""

    def __init__(self, project: Project, suite: Suite, *, attempt: int = 1, only: tuple[Only, ...] = ()) -> None:
        self.drivers: dict[str, Driver] = {
            "tap": AvaTap(suite, "r1", attempt=attempt, only=only),
            "events": AvaEvents(suite, "r1", attempt=attempt, only=only),
        }
        self.told: dict[str, list[DriverEvent]] = {name: [] for name in self.drivers}
        self._news = threading.Condition()
        scratch = Path(mkdtemp(dir=project.scratch))  # of its own: AVA reads its configuration from there
        started = launch(suite, project.folder, scratch, "r1", only=only)
        for name, content in started.files.items():
            (scratch / name).write_bytes(content)
        ends = {name: os.pipe() for name in started.pipes}
        self.process = subprocess.Popen(
            [project.node, *started.argv[1:]],
            cwd=project.folder,
            env=environment(started, {name: writing for name, (_, writing) in ends.items()}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing for _, writing in ends.values()],
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        streams = {"stdout": self.process.stdout.fileno(), "stderr": self.process.stderr.fileno()}
        for name, (reading, writing) in ends.items():
            os.close(writing)
            streams[name] = reading
        self._threads = [threading.Thread(target=self._read, args=stream) for stream in streams.items()]
        self._own = [reading for reading, _ in ends.values()]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: str, number: int) -> None:
        while data := os.read(number, 65_536):
            with self._news:
                for name, driver in self.drivers.items():
                    if name == "events" or stream != EVENTS:
                        self.told[name] += driver.feed(stream, data, time.time())
                self._news.notify_all()

    def wait_until_finished(self, count: int) -> None:
        """Until both drivers have told that many records, and the last test that hangs has begun."""
        with self._news:
            for name in self.drivers:
                self._news.wait_for(lambda name=name: self._finished(name) >= count, LIMIT_S)  # type: ignore[misc]
            self._news.wait_for(lambda: self.drivers["events"].running() is not None, LIMIT_S)

    def _finished(self, name: str) -> int:
        return sum(isinstance(event, TestFinished) for event in self.told[name])

    def interrupt(self, reason: str) -> None:
        with self._news:
            first = [driver.stop(reason)[0] for driver in self.drivers.values()]
        self.process.send_signal(first[0].signal)

    def finish(self, reason: str | None = None) -> dict[str, dict[str, TestFinished]]:
        """The records by driver and case."""
        try:
            code = self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            for thread in self._threads:
                thread.join()
            for number in self._own:
                os.close(number)
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()
        died_of = signal.Signals(-code).name if code < 0 else None
        for name, driver in self.drivers.items():
            self.told[name] += driver.finish(None if code < 0 else code, died_of, reason, time.time())
        return {name: final(told) for name, told in self.told.items()}

    def warnings(self) -> list[str]:
        return [event.text for told in self.told.values() for event in told if isinstance(event, Warned)]


def environment(started: Launch, pipes: dict[str, int]) -> dict[str, str]:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"LANG": "C.UTF-8"}
    env |= {f"EMISSARY_PIPE_{name.upper()}": str(number) for name, number in pipes.items()}
    return env | started.set_env


def suite_of(*files: str, **more: Any) -> Suite:
    return Suite(id="s", runner="ava", driver="events", files=files, **more)


def both(records: dict[str, dict[str, TestFinished]]) -> dict[str, list[str]]:
    return {name: shown(of_driver.values()) for name, of_driver in records.items()}


def test_every_row(project: Project) -> None:
    """All scenarios of tests/ava_rows.py but the one that is stopped; two AVAs at a time."""

    def check(row: Row) -> None:
        run = Run(project, row.suite("events"))
        records = both(run.finish())
        for driver in DRIVERS:
            # The rows call the project's folder /project.
            expected = sorted(line.replace("/project/", f"{project.folder}/") for line in row.expected(driver))
            told = records[driver]
            if driver == "tap" and row.tap_race in told:
                told.remove(row.tap_race)
            assert told == expected, f"{row.name}, {driver}"
        assert run.warnings() == [], row.name
        assert run.process.returncode == row.code, row.name

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, [row for row in ROWS if row.stopped is None]))


def test_without_the_observer(project: Project) -> None:
    """Driver `tap`, as it is launched: no pipe, no configuration of ours."""
    row = next(row for row in ROWS if row.name == "prefixes")
    assert launch(row.suite("tap"), project.folder, project.scratch, "r1").pipes == ()
    run = Run(project, row.suite("tap"))
    assert both(run.finish())["tap"] == row.expected("tap")
    assert run.warnings() == ["AVA told no events: its results are read as TAP"]


def test_a_hanging_test_is_stopped_and_the_others_keep_their_states(project: Project) -> None:
    row = next(row for row in ROWS if row.stopped)
    run = Run(project, row.suite("events"))
    run.wait_until_finished(2)
    assert run.drivers["events"].running() == "hang.js › hangs"
    run.interrupt(row.stopped or "")
    assert both(run.finish(row.stopped)) == {driver: row.expected(driver) for driver in DRIVERS}


def test_a_killed_runner_is_lost(project: Project) -> None:
    run = Run(project, suite_of("hang.js"))
    run.wait_until_finished(1)
    run.process.kill()
    assert both(run.finish()) == {
        "tap": ["lost/rest (not reported) x?", "passed hang.js › done before"],
        "events": ["lost hang.js › hangs", "lost hang.js › never starts", "passed hang.js › done before"],
    }


def test_much_of_everything_stays_small(project: Project) -> None:
    """Acceptance 5: four mebibytes of output, a line of one, a difference of 20,000 items."""
    for records in Run(project, suite_of("large.js")).finish().values():
        states = [record.state for record in records.values()]
        assert states == ["passed", "failed", "failed", "passed", "failed", "passed"]
        difference = records["large.js › a difference of 20,000 items"]
        assert difference.message == "t.deepEqual()"
        assert "Difference" in str(difference.details)
        assert sum(len(str(record)) for record in records.values()) < 2 * 1024 * 1024


def test_half_a_character_hides_no_result(project: Project) -> None:
    """In a title, a log, a message, and where a text is cut."""
    run = Run(project, suite_of("odd.js"))
    for records in run.finish().values():
        assert shown(records.values()) == [
            "failed odd.js › a cut between two halves",
            "failed odd.js › half of a message",
            "passed odd.js › half of a log",
            "passed odd.js › half \ufffd of a title",
        ]
        assert records["odd.js › half of a message"].message == "half \ufffd of it"
        assert str(records["odd.js › a cut between two halves"].message).startswith("a\U0001f600")
    assert run.warnings() == []


@pytest.mark.parametrize("project", ["7.0.0"], indirect=True)
def test_twelve_quiet_seconds_pass(project: Project) -> None:
    """Acceptance 2: AVA's own default of ten seconds is not in force."""
    passed = ["passed quiet.js › twelve quiet seconds"]
    assert both(Run(project, suite_of("quiet.js")).finish()) == {"tap": passed, "events": passed}


CONFIGS = {
    "ava.config.js": "export default {files: ['mine/*.js']};",
    "ava.config.mjs": "export default ({projectDir}) => ({files: [projectDir ? 'mine/*.js' : 'no']});",
    "ava.config.cjs": "module.exports = {files: ['mine/*.js']};",
    "package.json": '{"type": "module", "ava": {"files": ["mine/*.js"]}}',
    "other.mjs": "export default {files: ['mine/*.js']};",
}


@pytest.mark.parametrize("project", ["7.0.0"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_projects_own_configuration_counts_with_the_observer(project: Project, name: str) -> None:
    (project.folder / name).write_text(CONFIGS[name])
    (project.folder / "mine").mkdir()
    (project.folder / "mine/a.js").write_text("import test from 'ava';\ntest('mine', t => t.pass());\n")
    args = ("--config", name) if name == "other.mjs" else ()
    run = Run(project, suite_of(args=args))
    assert both(run.finish())["events"] == ["passed mine/a.js › mine"]
    assert run.warnings() == []


@pytest.mark.parametrize("project", ["7.0.0"], indirect=True)
def test_conflicting_configurations_are_told(project: Project) -> None:
    for name in ("ava.config.js", "ava.config.cjs"):
        (project.folder / name).write_text(CONFIGS[name])
    (rest,) = Run(project, suite_of()).finish()["events"].values()
    assert (rest.kind, rest.state) == ("rest", "lost")
    assert "Conflicting configuration" in rest.output


@pytest.mark.parametrize("project", ["7.0.0"], indirect=True)
def test_a_project_with_its_own_observer_is_read_as_tap(project: Project) -> None:
    own = "export default {nonSemVerExperiments: {observeRunsFromConfig: true}, async observeRun() {}};"
    (project.folder / "ava.config.js").write_text(own)
    run = Run(project, suite_of("good.js"))
    assert both(run.finish())["events"] == ["passed good.js › good"]
    assert run.warnings() == ["the project has an observeRun of its own: its results are read as TAP"]


def test_failed_tests_again(project: Project) -> None:
    only = (Only("titles.js", "fails # TODO"), Only("states.js", "throws"))
    run = Run(project, suite_of("titles.js", "states.js"), attempt=2, only=only)
    assert sorted(run.finish()["events"]) == ["states.js › throws@2", "titles.js › fails # TODO@2"]
