"""agent/suites/runners/ava_tap.py: records out of what AVA's TAP reporter writes."""

import signal

import pytest

from agent.core.events import TestFinished, Warned
from agent.suites.messages import Limits, Suite
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.driver import DriverEvent, Only, Stop
from tests.ava_rows import DATA, ROWS, Row, final, shown


def drive(
    wire: bytes | str,
    *,
    files: tuple[str, ...] = ("test.js",),
    code: int | None = 1,
    died_of: str | None = None,
    reason: str | None = None,
    stderr: bytes = b"",
) -> list[DriverEvent]:
    """All that comes of a run whose standard output was `wire`; `reason`: it was stopped before its last byte came."""
    driver = AvaTap(Suite(id="s", runner="ava", files=files), "r1")
    events = driver.feed("stderr", stderr, 1.0)
    if reason is not None:
        driver.stop(reason)
    events += driver.feed("stdout", wire.encode() if isinstance(wire, str) else wire, 2.0)
    return events + driver.finish(code, died_of, reason, 3.0)


def wire(*results: str, plan: int, passed: int = 0, skip: int = 0, fail: int = 0) -> str:
    """A whole TAP document. `results` may be of several lines."""
    totals = [f"# tests {plan}", f"# pass {passed}", *([f"# skip {skip}"] if skip else []), f"# fail {fail}"]
    return "\n".join(["TAP version 13", *results, "", f"1..{plan}", *totals, "", ""])


def failure(title: str, message: str = "no", name: str = "AssertionError") -> str:
    return f"not ok 9 - {title}\n  ---\n    name: {name}\n    message: {message!r}\n  ..."


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_avas_own_output_becomes(row: Row) -> None:
    driver = AvaTap(row.suite("tap"), "r1")
    events = []
    if row.stopped:
        driver.stop(row.stopped)
    for at, byte in enumerate(row.wire("tap")):
        events += driver.feed("stdout", bytes([byte]), at)
    events += driver.finish(row.code, None, row.stopped, 9e9)
    assert shown(final(events).values()) == row.expected("tap")
    assert not [event for event in events if isinstance(event, Warned)]


def test_a_result_is_told_with_its_line_and_its_log_follows() -> None:
    driver = AvaTap(Suite(id="s", runner="ava", files=("a.js",)), "r1", attempt=2)
    (passed,) = driver.feed("stdout", b"TAP version 13\nok 1 - works\n", 5.0)
    assert passed == TestFinished(
        run="r1", suite="s", case="a.js › works@2", name="works", file="a.js", state="passed", ended=5.0, attempt=2
    )
    assert driver.feed("stdout", b"#   said\n\n#     more\n", 6.0) == []
    (logged,) = driver.feed("stdout", b"# a hook\n#   of the hook\n", 7.0)
    assert isinstance(logged, TestFinished)
    assert (logged.rev, logged.ended, logged.log) == (2, 5.0, ("said", "", "  more"))
    assert driver.running() is None


def test_a_failure_says_what_and_where() -> None:
    records = final(drive((DATA / "states.tap").read_bytes(), files=("states.js",)))
    thrown = records["states.js › throws"]
    assert thrown.message == "Error thrown in test: TypeError { message: 'thrown: on purpose', }"
    assert thrown.at == "/project/states.js:24:8"
    told = records["states.js › a wrong value and a message"]
    assert told.message == "the two"
    assert told.at is None  # AVA's own place
    assert told.details["assertion"] == "t.deepEqual()"
    assert told.log == ("before the failure", "  ...", "not ok 99 - faked")
    assert records["states.js › a wrong value"].message == "t.is()"
    assert records["states.js › plan"].message == "Planned for 2 assertions, but got 1."


def test_sigint_first_then_sigterm() -> None:
    driver = AvaTap(Suite(id="s", runner="ava", limits=Limits(grace=3)), "r1")
    assert driver.stop("cancel: by hand") == (Stop(signal.SIGINT, 3, alone=True), Stop(signal.SIGTERM, 5.0))


@pytest.mark.parametrize(
    ("code", "died_of", "said"),
    [(1, None, "with exit code 1"), (None, "SIGKILL", "by SIGKILL"), (0, None, "with exit code 0")],
)
def test_without_a_plan_the_run_is_lost(code: int | None, died_of: str | None, said: str) -> None:
    events = drive(
        "TAP version 13\nok 1 - a\nok 2 - half a ti", code=code, died_of=died_of, stderr=b"x" * 9000 + b"end\n"
    )
    first, noise, rest = events
    assert isinstance(first, TestFinished)
    assert noise == Warned("ava.noise", "not AVA's, on its standard output: ok 2 - half a ti")
    assert isinstance(rest, TestFinished)
    assert (rest.kind, rest.state, rest.count) == ("rest", "lost", None)
    assert rest.message == f"lost: AVA ended {said} without a plan"
    assert rest.output.endswith("xend")
    assert len(rest.output) < 5000


def test_without_a_plan_because_we_stopped_it_the_rest_is_aborted() -> None:
    (_, rest) = drive("TAP version 13\nok 1 - a\n", reason="cancel: by hand")
    assert isinstance(rest, TestFinished)
    assert (rest.state, rest.count, rest.message) == ("aborted", None, "aborted: cancel: by hand")


def test_a_stopped_run_whose_plan_is_fulfilled_is_not_complete() -> None:
    """Files that had not begun are in no plan."""
    events = drive(wire("ok 1 - a", plan=1, passed=1), reason="cancel: by hand")
    assert shown(final(events).values()) == ["aborted/rest (not reported) x?", "passed test.js › a"]


def test_a_run_that_ended_as_we_stopped_it_is_complete() -> None:
    driver = AvaTap(Suite(id="s", runner="ava", files=("a.js",)), "r1")
    events = driver.feed("stdout", wire("ok 1 - a", plan=1, passed=1).encode(), 1.0)
    driver.stop("cancel: by hand")
    events += driver.finish(0, None, "cancel: by hand", 2.0)
    assert shown(final(events).values()) == ["passed a.js › a"]


def test_a_file_that_our_signal_ended_is_aborted() -> None:
    said = "not ok 2 - test.js exited due to SIGTERM"
    events = drive(wire("ok 1 - a", said, plan=2, passed=1, fail=2), reason="stop")
    assert shown(final(events).values()) == [
        "aborted/crash test.js › test.js exited due to SIGTERM",
        "aborted/rest (not reported) x1",
        "passed test.js › a",
    ]


def test_planned_and_never_told_without_a_cause_is_lost() -> None:
    events = drive(wire("ok 1 - a", plan=3, passed=1, fail=2))
    assert shown(final(events).values()) == ["lost/rest test.js › (not reported) x2", "passed test.js › a"]


@pytest.mark.parametrize(("code", "died_of"), [(1, None), (3, None), (None, "SIGSEGV")])
def test_an_end_that_no_record_explains_is_a_crash_of_the_runner(code: int | None, died_of: str | None) -> None:
    _, crash = drive(wire("ok 1 - a", plan=1, passed=1), code=code, died_of=died_of, stderr=b"why\n")
    assert isinstance(crash, TestFinished)
    assert (crash.kind, crash.state, crash.file, crash.output) == ("crash", "blocked", None, "why")
    assert str(died_of or code) in crash.name


def test_a_worker_thread_out_of_memory_is_a_crash() -> None:
    """AVA says `exited due to undefined` then, with YAML."""
    records = final(drive((DATA / "crash-memory.tap").read_bytes(), files=("crash-memory.js", "b.js")))
    crash = records["crash-memory.js › crash-memory.js exited due to undefined"]
    assert (crash.kind, crash.file) == ("crash", "crash-memory.js")
    assert crash.message == "Worker terminated due to reaching memory limit: JS heap out of memory"
    assert records["crash-memory.js › (not reported)"].count == 1


def test_an_exited_line_goes_to_the_crash_that_names_the_file_else_to_the_oldest() -> None:
    first = failure("Error: one", "one", "Error")
    second = "not ok 2 - Error: two\n  ---\n    name: Error\n    message: two\n    at: 'file:///p/b.js:1:1'\n  ..."
    exits = [f"not ok 3 - {file}.js exited with a non-zero exit code: 1" for file in "bac"]
    events = drive(wire(first, second, *exits, plan=0, fail=5), files=("a.js", "b.js", "c.js"))
    assert shown(final(events).values()) == [
        "blocked/crash a.js › Error: one",
        "blocked/crash b.js › Error: two",
        "blocked/crash c.js › c.js exited with a non-zero exit code: 1",
    ]


def test_a_test_that_throws_is_no_crash_whatever_its_title() -> None:
    thrown = failure("Error: one", "Error thrown in test")
    assert shown(final(drive(wire(thrown, plan=1, fail=1))).values()) == ["failed test.js › Error: one"]


def test_skips_are_the_first_ones_only() -> None:
    events = drive(wire("ok 1 - a # SKIP", "ok 2 - b # SKIP", "ok 3 - c # SKIP", plan=3, passed=2, skip=1), code=0)
    assert shown(final(events).values()) == [
        "passed test.js › b # SKIP",
        "passed test.js › c # SKIP",
        "skipped test.js › a",
    ]


def test_hooks_are_as_many_as_the_plan_lacks_by_their_titles() -> None:
    several = [failure(title) for title in ("before hook", "setup for a", "tidy", "x for nobody")]
    # Five results, four planned: one hook; and the title decides which.
    one = drive(wire("ok 1 - a", *several, plan=4, passed=1, fail=3))
    assert [event.name for event in one if isinstance(event, TestFinished) and event.kind == "hook"] == ["before hook"]
    two = drive(wire("ok 1 - a", *several, plan=3, passed=1, fail=2))
    assert {event.name for event in two if isinstance(event, TestFinished) and event.kind == "hook"} == {
        "before hook",
        "setup for a",
    }
    none = drive(wire("ok 1 - a", *several, plan=5, passed=1, fail=4))
    assert not [event for event in none if isinstance(event, TestFinished) and event.kind == "hook"]


def test_a_hook_of_a_file_with_tests_remaining_is_chosen_before_other_failures() -> None:
    told = [failure("a › first"), failure("b › prepare"), "# 2 tests remaining in b.js"]
    records = final(drive(wire(*told, plan=3, fail=3), files=("a.js", "b.js")))
    assert shown(records.values()) == [
        "blocked/hook b.js › prepare",
        "blocked/rest b.js › (not reported) x2",
        "failed a.js › first",
    ]


def test_beside_a_crash_the_plan_cannot_count_hooks_and_avas_own_titles_tell_them() -> None:
    told = [failure("beforeEach hook for a"), failure("Error: one", "one", "Error"), failure("mine")]
    assert shown(final(drive(wire(*told, plan=9, fail=10))).values()) == [
        "blocked/crash test.js › Error: one",
        "blocked/hook test.js › beforeEach hook for a",
        "blocked/rest test.js › (not reported) x8",
        "failed test.js › mine",
    ]


def test_what_ava_does_not_write_is_a_warning_and_warnings_are_few() -> None:
    events = drive("  warning Using configuration from /p/c.mjs\n" + "noise\n" * 1000 + wire(plan=0), code=0)
    warnings = [event for event in events if isinstance(event, Warned)]
    assert len(warnings) == 6
    assert warnings[-1].text == "1000 lines on AVA's standard output are not AVA's"


def test_totals_that_do_not_agree_are_a_warning() -> None:
    events = drive(wire("ok 1 - a", plan=1, passed=1, fail=3), code=1)
    assert Warned("ava.counts", "AVA counted 3 crashes, its lines tell 0: see the crashes") in events
    cut = drive("TAP version 13\nok 1 - a\n\n1..1\n", code=0)
    assert Warned("ava.counts", "AVA's totals after the plan are missing") in cut


def test_a_block_that_ends_in_the_middle_of_nowhere() -> None:
    events = drive("TAP version 13\nnot ok 1 - a\n  ---\n    name: X\n    message: cut\nok 2 - b\n")
    assert shown(final(events).values()) == ["failed test.js › a", "lost/rest (not reported) x?", "passed test.js › b"]


def test_a_long_difference_is_cut_and_the_message_stays() -> None:
    """Acceptance 5: twenty thousand lines."""
    difference = "\n".join(f"        -   {number}" for number in range(40_000))
    block = f"    name: E\n    details:\n      'Difference:': |-\n{difference}\n    message: they differ\n"
    result = f"not ok 1 - a\n  ---\n{block}  ..."
    record = final(drive(wire(result, plan=1, fail=1)))["test.js › a"]
    assert record.message == "they differ"
    assert record.details["details"]["Difference:"].endswith("(cut)")
    assert len(str(record.details)) < 80_000


def test_a_line_and_a_log_of_a_mebibyte_are_cut() -> None:
    long = "z" * 1024 * 1024
    record = final(drive(wire(f"ok 1 - {long}\n#   {long}\n#   more", plan=1, passed=1), code=0))
    (only,) = record.values()
    assert len(only.name.encode()) == 1024
    assert sum(map(len, only.log)) <= 65_536


def test_a_resumed_run_knows_its_one_file() -> None:
    suite = Suite(id="s", runner="ava", files=("a.js", "b.js"))
    driver = AvaTap(suite, "r1", attempt=2, only=[Only("b.js")])
    (record,) = driver.feed("stdout", b"ok 1 - x\n", 1.0)
    assert isinstance(record, TestFinished)
    assert (record.file, record.case) == ("b.js", "b.js › x@2")


def test_a_crash_told_before_our_stop_is_not_ours_though_its_line_ends_after_it() -> None:
    driver = AvaTap(Suite(id="s", runner="ava", files=("a.js", "b.js")), "r-1")
    assert driver.feed("stdout", b"TAP version 13\nnot ok 1 - a.js exited due to SIGKILL\n", 1.0) == []
    driver.stop("limits.stall")
    (crash,) = driver.feed("stdout", b"not ok 2 - b.js exited due to SIGINT\n\n", 2.0)[:1]
    assert isinstance(crash, TestFinished)
    assert (crash.file, crash.state) == ("a.js", "blocked")
    ours = next(event for event in driver.finish(1, None, "limits.stall", 3.0) if isinstance(event, TestFinished))
    assert (ours.name, ours.state) == ("b.js exited due to SIGINT", "aborted")
