"""The pytest of a project, with and without pytest-xdist, against runner `pytest`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.events import TestFinished, TestStarted, Warned
from agent.suites.messages import Suite
from agent.suites.runners.driver import DriverEvent, Only
from agent.suites.runners.pytest import PytestDriver, launch
from tests.runner_process import run, states

pytestmark = pytest.mark.interop

PINS = ("pytest==9.2.0", "pytest-xdist==3.8.0")
PROJECT = """\
import pytest, unittest

def test_passes(): print("hello")
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not now")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_xfails(): assert 0
@pytest.mark.xfail(strict=True)
def test_xpasses_strictly(): pass
@pytest.fixture
def broken(): raise ValueError("fixture broke")
def test_blocked(broken): pass
@pytest.fixture
def late():
    yield
    raise ValueError("teardown broke")
def test_late(late): pass
class TestUnit(unittest.TestCase):
    def test_u(self): self.assertEqual(1, 1)
"""
ROWS = {
    "test_a.py › test_passes": "passed",
    "test_a.py › test_fails": "failed",
    "test_a.py › test_skipped": "skipped",
    "test_a.py › test_xfails": "todo",
    "test_a.py › test_xpasses_strictly": "failed",
    "test_a.py › test_blocked": "blocked",
    "test_a.py › test_late": "passed",
    "test_a.py › teardown of test_late": "hook blocked",
    "test_a.py › TestUnit::test_u": "passed",
}
DYING = """\
import os, pytest
@pytest.mark.parametrize("n", range(6))
def test_n(n):
    if n == 3:
        os._exit(9)
"""
SUBTESTS = """\
def test_all(subtests):
    for i in range(3):
        with subtests.test("number", i=i):
            assert i != 1
"""


@pytest.fixture
def play(python_peer: Callable[..., Path], tmp_path: Path) -> Callable[..., list[DriverEvent]]:
    def played(text: str, *args: str, only: tuple[Only, ...] = ()) -> list[DriverEvent]:
        project, scratch = tmp_path / "project", tmp_path / "scratch"
        project.mkdir()
        scratch.mkdir()
        (project / "test_a.py").write_text(text)
        command = (str(python_peer(*PINS)), "-m", "pytest")
        suite = Suite(id="s1", runner="pytest", command=command, args=("-p", "no:cacheprovider", *args))
        return run(launch(suite, project, scratch, "r1", only=only), PytestDriver(suite, "r1"), project, scratch)

    return played


@pytest.mark.parametrize("args", [[], ["-n2"], ["-n2", "--dist=loadfile"]])
def test_the_states_are_the_same_with_workers(play: Callable[..., list[DriverEvent]], args: list[str]) -> None:
    events = play(PROJECT, *args)
    assert states(events) == ROWS
    assert not [event for event in events if isinstance(event, Warned)]
    by_name = {event.name: event for event in events if isinstance(event, TestFinished)}
    assert by_name["test_fails"].message == "AssertionError: one is not two"
    assert by_name["test_passes"].output == "hello\n"
    assert len([event for event in events if isinstance(event, TestStarted)]) == 8


def test_a_worker_that_dies_blocks_its_test_and_the_others_go_on(play: Callable[..., list[DriverEvent]]) -> None:
    expected = {f"test_a.py › test_n[{n}]": "blocked" if n == 3 else "passed" for n in range(6)}
    assert states(play(DYING, "-n2")) == expected


def test_workers_too_run_only_what_is_wanted(play: Callable[..., list[DriverEvent]]) -> None:
    only = (Only("test_a.py", "test_passes"), Only("test_a.py", "TestUnit::test_u"))
    assert states(play(PROJECT, "-n2", only=only)) == {
        "test_a.py › test_passes": "passed",
        "test_a.py › TestUnit::test_u": "passed",
    }


def test_stopping_at_a_failure_skips_the_rest(play: Callable[..., list[DriverEvent]]) -> None:
    found = states(play("def test_w(): 1/0\ndef test_x(): pass\ndef test_y(): pass", "-x"))
    assert found == {"test_a.py › test_w": "failed", "test_a.py › test_x": "skipped", "test_a.py › test_y": "skipped"}


def test_subtests_of_pytest_itself(play: Callable[..., list[DriverEvent]]) -> None:
    assert states(play(SUBTESTS)) == {
        "test_a.py › test_all › [number] (i=0)": "passed",
        "test_a.py › test_all › [number] (i=1)": "failed",
        "test_a.py › test_all › [number] (i=2)": "passed",
        "test_a.py › test_all": "failed",
    }
