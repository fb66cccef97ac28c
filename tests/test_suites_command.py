"""agent/suites/runners/command.py: one program, one test."""

import signal
from pathlib import Path

import pytest

from agent.core.errors import ProtocolMisuse
from agent.core.events import TestFinished, TestStarted
from agent.suites.messages import Suite
from agent.suites.runners.command import CommandDriver, launch
from agent.suites.runners.driver import Only, Stop


def judged(code: int | None, signal: str | None = None, reason: str | None = None) -> tuple[str, str | None]:
    (record,) = CommandDriver("r1", "s1", "It works", codes={3: "skipped"}).finish(code, signal, reason, 9.0)
    assert isinstance(record, TestFinished)
    return record.state, record.message


@pytest.mark.parametrize(
    ("code", "state", "message"),
    [
        (0, "passed", None),
        (1, "failed", "exited with code 1"),
        (77, "skipped", "exited with code 77"),
        (99, "blocked", "exited with code 99"),
        (126, "blocked", "the command cannot be executed"),
        (127, "blocked", "the command was not found"),
        (3, "skipped", "exited with code 3"),
    ],
)
def test_the_exit_code_is_the_state(code: int, state: str, message: str | None) -> None:
    assert judged(code) == (state, message)


def test_other_ends() -> None:
    assert judged(None, "SIGSEGV") == ("blocked", "ended by SIGSEGV")
    assert judged(None, "SIGTERM", "cancelled by the lab") == ("aborted", "aborted: cancelled by the lab")
    assert judged(None) == ("lost", "lost: it ended, and nobody knows how")


def test_the_test_begins_with_the_first_block() -> None:
    driver = CommandDriver("r1", "s1", "It works")
    assert driver.running() is None
    assert driver.feed("stdout", b"", 5.0) == [
        TestStarted(run="r1", suite="s1", case="It works", name="It works", file=None, started=5.0)
    ]
    assert driver.running() == "It works"
    assert driver.feed("stderr", b"\x1b[31mred\x1b[0m", 6.0) == []
    assert driver.finish(0, None, None, 9.0) == [
        TestFinished(
            run="r1",
            suite="s1",
            case="It works",
            name="It works",
            file=None,
            state="passed",
            started=5.0,
            ended=9.0,
            output="red",
        )
    ]
    assert driver.running() is None


def test_without_a_title_the_suite_names_the_test() -> None:
    (record,) = CommandDriver("r1", "s1", "").finish(0, None, None, 9.0)
    assert isinstance(record, TestFinished)
    assert record.name == "s1"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_only_the_end_of_much_output_is_kept_however_it_was_cut(size: int) -> None:
    wire = b"".join(b"%05d\n" % n for n in range(100))
    driver = CommandDriver("r1", "s1", "x", output_max=12)
    for at in range(0, len(wire), size):
        driver.feed("stdout", wire[at : at + size], 5.0)
    (record,) = driver.finish(0, None, None, 9.0)
    assert isinstance(record, TestFinished)
    assert record.output == "[588 bytes cut here]\n00098\n00099\n"


def test_it_is_stopped_by_sigterm() -> None:
    assert CommandDriver("r1", "s1", "x", grace_s=7).stop("cancel") == (Stop(signal.SIGTERM, 7),)


def test_the_launch(tmp_path: Path) -> None:
    suite = Suite(id="s1", runner="command", command=("make", "check"), args=("-k",))
    got = launch(suite, tmp_path, tmp_path, "r1")
    assert (got.argv, got.set_env) == (("make", "check", "-k"), {"EMISSARY_RUN": "r1", "EMISSARY_SUITE": "s1"})
    with pytest.raises(ProtocolMisuse):
        launch(suite, tmp_path, tmp_path, "r1", only=[Only(None, "a")])
