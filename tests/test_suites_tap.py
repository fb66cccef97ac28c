"""agent/suites/runners/tap.py: transcripts of TAP (`T`) and the records that must come at once (`=`)."""

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolMisuse
from agent.core.events import TestFinished, TestsSelected, TestStarted, Warned
from agent.suites.messages import Suite
from agent.suites.runners.driver import WARNINGS_MAX, CannotLaunch, DriverEvent, Only, Stop
from agent.suites.runners.tap import WAITING_MAX, TapDriver, launch


def shown(event: DriverEvent) -> str:
    """`state case`, with what is out of the ordinary: kind, count, message, rev."""
    match event:
        case Warned():
            return f"warning {event.code}"
        case TestStarted() | TestsSelected():
            raise AssertionError(f"TAP tells ends only, and this is {event}")
    text = f"{event.state} {event.case}"
    if event.kind != "test":
        text = f"{event.kind} {text}"
    if event.kind == "rest":
        text += f" x{event.count}"
    if event.message is not None and not event.name.endswith(event.message):
        text += f": {event.message}"
    return f"{text} rev {event.rev}" if event.rev > 1 else text


def play(
    transcript: str, *, code: int | None = 0, ended_by: str | None = None, reason: str | None = None
) -> list[DriverEvent]:
    """Feed the lines marked T, a byte at a time; compare what comes with the lines marked =. END ends the runner."""
    driver, due, events = TapDriver("r1", "s1"), list[DriverEvent](), list[DriverEvent]()
    for line in filter(str.strip, transcript.splitlines()):
        mark, _, text = line.lstrip().partition(" ")
        if mark == "=":
            assert due, f"nothing more came, but {text!r} is expected"
            assert shown(due.pop(0)) == text
            continue
        assert not due, f"not expected before {line!r}: {list(map(shown, due))}"
        if mark == "END":
            due = list(driver.finish(code, ended_by, reason, 9.0))
        else:
            assert mark == "T", f"what is {line!r}?"
            for byte in f"{text}\n".encode():
                due += driver.feed("stdout", bytes([byte]), 5.0)
        events += due
    assert not due, f"not in the transcript: {list(map(shown, due))}"
    return events


def test_results_are_told_as_their_lines_come() -> None:
    play(
        """
        T TAP version 13
        T 1..6
        T ok 1 - with a dash
        = passed with a dash
        T ok 2 without one
        = passed without one
        T ok
        = passed test 3
        T ok 4
        = passed test 4
        T ok - no number
        = passed no number
        T not ok 6 - five is not six
        T # a comment ends it
        = failed five is not six
        END
        """,
        code=1,
    )


def test_a_record_says_whose_it_is_and_when_it_ended() -> None:
    (record,) = TapDriver("r1", "s1").feed("stdout", b"ok 1 - a\n", 5.0)
    assert record == TestFinished(run="r1", suite="s1", case="a", name="a", file=None, state="passed", ended=5.0)


def test_the_plan_may_come_last() -> None:
    play(
        """
        T ok 1 - a
        = passed a
        T 1..1
        END
        """
    )


def test_what_is_no_tap_is_output() -> None:
    play(
        """
        T hello
        T okay
        T ok: no
        T   ok 1 - indented by two
        T notok 1
        T 1..1 tests
        T pragma +strict
        T 1..1
        T ok 1 - a
        = passed a
        END
        """
    )
    assert TapDriver("r1", "s1").feed("stderr", b"not ok 1 - faked\n", 5.0) == []


def test_directives_are_taken_in_any_case_with_their_reason() -> None:
    play(
        """
        T 1..9
        T ok 1 - a # SKIP no printer
        = skipped a: no printer
        T ok 2 - b # skip
        = skipped b
        T ok 3 - c # skipped: slow
        = skipped c: slow
        T not ok 4 - d # todo later
        T ok 5 # skip without a title
        = todo d: later
        = skipped test 5: without a title
        T ok 6 - e # TODO done
        = warning tap.directive
        = passed e: done
        T not ok 7 - f # SKIP
        = warning tap.directive
        = skipped f
        T ok 8 - g # TODO: no directive
        = passed g # TODO: no directive
        T ok 9 - issue #12
        = passed issue #12
        END
        """
    )


def test_a_todo_is_a_todo_even_with_a_block() -> None:
    play(
        """
        T 1..1
        T not ok 1 - a # TODO
        T   ---
        T   error: not yet
        T   ...
        = todo a: not yet
        END
        """
    )


def test_escapes_stay_below_version_14() -> None:
    play(
        r"""
        T TAP version 13
        T ok 1 - C:\\dir \# 1
        = passed C:\\dir \# 1
        T 1..1
        END
        """
    )


@pytest.mark.parametrize("before", ["TAP version 14", "# Subtest: x"])
def test_escapes_are_undone_under_version_14_and_after_a_subtest_comment(before: str) -> None:
    play(
        rf"""
        T {before}
        T ok 1 - C:\\dir \# SKIP it not
        = passed C:\dir # SKIP it not
        T ok 2 - b # SKIP \# 1
        = skipped b: # 1
        T 1..2
        END
        """
    )


def test_a_block_gives_message_place_and_duration() -> None:
    events = play(
        """
        T 1..3
        T not ok 1 - tape
        T   ---
        T     operator: equal
        T     at: Test.<anonymous> (/t.js:2:38)
        T   ...
        = failed tape
        T not ok 2 - node
        T   ---
        T   duration_ms: 12.5
        T   location: '/t.mjs:4:1'
        T   error: |-
        T     one
        T     two
        T   ...
        = failed node: one
        T not ok 3 - node-tap # time=3.5ms
        T   ---
        T   at:
        T     fileName: t.js
        T     lineNumber: 2
        T     columnNumber: 40
        T   ...
        = failed node-tap
        END
        """,
        code=1,
    )
    records = [event for event in events if isinstance(event, TestFinished)]
    assert [record.at for record in records] == ["Test.<anonymous> (/t.js:2:38)", "/t.mjs:4:1", "t.js:2:40"]
    assert [record.duration for record in records] == [None, 0.0125, 0.0035]
    assert records[1].details["error"] == "one\ntwo"


def test_a_result_waits_only_where_a_block_is_likely() -> None:
    play(
        """
        T 1..8
        T ok 1 - told at once, corrected
        = passed told at once, corrected
        T   ---
        T   duration_ms: 1
        T   ...
        = passed told at once, corrected rev 2
        T ok 2 - waits
        T   ---
        T   duration_ms: 1
        T   ...
        = passed waits
        T ok 3 - in vain
        T ok 4 - at once again
        = passed in vain
        = passed at once again
        T not ok 5 - waits
        T not ok 6 - at once
        = failed waits#2
        = failed at once
        T   ---
        T   message: too late
        T   ...
        = failed at once: too late rev 2
        T not ok 7 - waits
        T   ---
        T   message: x
        T   ...
        = failed waits#3: x
        T not ok 8 - at the end
        END
        = failed at the end
        """,
        code=1,
    )


def test_comments_between_a_result_and_its_block_are_its_log() -> None:
    (record,) = play(
        """
        T 1..1
        T not ok 1 - a
        T #   tried twice
        T #   gave up
        T   ---
        T   message: no
        T   ...
        = failed a: no
        END
        """,
        code=1,
    )
    assert isinstance(record, TestFinished)
    assert record.log == ("tried twice", "gave up")


def test_a_block_without_an_end_does_not_swallow_the_rest() -> None:
    play(
        """
        T 1..2
        T not ok 1 - a
        T   ---
        T   message: cut
        T ok 2 - b
        = failed a: cut
        = passed b
        END
        """,
        code=1,
    )


def test_subtests_are_flattened_and_speak_for_their_parent() -> None:
    play(
        """
        T # Subtest: parent
        T     # Subtest: child
        T     ok 1 - child
        = passed parent › child
        T     # Subtest: inner
        T         ok 1 - deep
        = passed parent › inner › deep
        T         1..1
        T     ok 2 - inner
        T     1..2
        T ok 1 - parent
        T 1..1
        END
        """
    )


def test_a_parent_that_fails_while_no_child_does_is_a_record() -> None:
    play(
        """
        T # Subtest: parent
        T     ok 1 - child
        = passed parent › child
        T     1..1
        T not ok 1 - parent
        T   ---
        T   error: after hook
        T   ...
        = failed parent: after hook
        T # Subtest: other
        T     not ok 1 - child
        T     1..1
        = failed other › child
        T not ok 2 - other
        T   ---
        T   error: 1 subtest failed
        T   ...
        T 1..2
        END
        """,
        code=1,
    )


def test_perl_names_a_subtest_inside_it() -> None:
    play(
        """
        T     # Subtest: foo
        T     ok 1 - a
        = passed foo › a
        T         # Subtest: inner
        T         ok 1 - b
        = passed foo › inner › b
        T         1..1
        T     ok 2 - inner
        T     1..2
        T ok 1 - foo
        T     # Subtest: bar
        T     ok 1 - a
        = passed bar › a
        T     1..1
        T ok 2 - bar
        T 1..2
        END
        """
    )


def test_children_of_an_unnamed_subtest_wait_for_their_parent() -> None:
    play(
        """
        T     ok 1 - a
        T         ok 1 - deep
        T         1..1
        T     ok 2 - b
        T     1..2
        T ok 1 - parent
        = passed parent › a
        = passed parent › b › deep
        T     ok 1 - never closed
        T 1..1
        END
        = passed never closed
        """
    )


def test_too_many_children_of_an_unnamed_subtest_are_told_without_it() -> None:
    driver = TapDriver("r1", "s1")
    lines = b"".join(b"    ok %d - child %d\n" % (n, n) for n in range(WAITING_MAX))
    assert driver.feed("stdout", lines, 5.0) == []
    assert len(driver.feed("stdout", b"    ok - one more\n", 5.0)) == WAITING_MAX + 1


def test_a_subtest_keeps_its_own_plan() -> None:
    play(
        """
        T # Subtest: short
        T     1..3
        T     ok 1 - a
        = passed short › a
        T not ok 1 - short
        = rest lost short › (not reported) x2: lost: 2 of 3 planned tests were not reported
        T # Subtest: long
        T     1..1
        T     ok 1 - a
        = passed long › a
        T     ok 2 - b
        = passed long › b
        T ok 2 - long
        = crash blocked long › 2 tests reported, 1 planned
        T # Subtest: none
        T     ok 1 - a
        = passed none › a
        T ok 3 - none
        = warning tap.plan
        T # Subtest: skipped
        T     1..0 # SKIP no network
        T ok 4 - skipped
        = skipped skipped: no network
        T 1..4
        END
        """,
        code=1,
    )


def test_a_plan_of_none_with_a_reason_is_a_skip() -> None:
    play(
        """
        T 1..0 # Skipped: no database
        END
        = rest skipped (not reported) xNone: no database
        """
    )


def test_a_plan_of_none_without_a_reason_is_no_tests() -> None:
    play(
        """
        T 1..0
        END
        = crash blocked no tests
        """
    )


def test_a_second_plan_is_a_warning() -> None:
    play(
        """
        T 1..1
        T 1..2
        = warning tap.plan
        T ok 1 - a
        = passed a
        END
        """
    )


def test_bail_out_blocks_the_planned_rest() -> None:
    play(
        """
        T 1..3
        T ok 1 - a
        = passed a
        T Bail out! no database
        T ok 2 - not any more
        END
        = rest blocked (not reported) x2: Bail out! no database
        """,
        code=255,
    )


def test_bail_out_without_a_plan_and_after_all_tests() -> None:
    play(
        """
        T Bail out!
        END
        = rest blocked (not reported) xNone: Bail out!
        """
    )
    play(
        """
        T 1..1
        T ok 1 - a
        = passed a
        T bail out! at the end
        END
        = crash blocked Bail out! at the end
        """
    )


MISSING = "(not reported) x1: %s1 of 2 planned tests were not reported"


@pytest.mark.parametrize(
    ("code", "ended_by", "reason", "record"),
    [
        (0, None, None, f"lost {MISSING % 'lost: '}; the runner exited with code 0"),
        (None, "SIGKILL", None, f"lost {MISSING % 'lost: '}; the runner was ended by SIGKILL"),
        (None, "SIGTERM", "cancelled by the lab", "aborted (not reported) x1: aborted: cancelled by the lab"),
    ],
)  # fmt: skip
def test_planned_but_missing(code: int | None, ended_by: str | None, reason: str | None, record: str) -> None:
    play(
        f"""
        T 1..2
        T ok 1 - a
        = passed a
        END
        = rest {record}
        """,
        code=code,
        ended_by=ended_by,
        reason=reason,
    )


def test_without_a_plan_nobody_knows_how_many_are_missing() -> None:
    play(
        """
        T ok 1 - a
        = passed a
        END
        = rest lost (not reported) xNone: lost: no plan; the runner exited with code 0
        """
    )


def test_more_than_planned_is_a_crash() -> None:
    play(
        """
        T 1..1
        T ok 1 - a
        = passed a
        T ok 2 - b
        = passed b
        END
        = crash blocked 2 tests reported, 1 planned
        """
    )


@pytest.mark.parametrize(
    ("code", "ended_by", "record"),
    [
        (3, None, "blocked the runner exited with code 3, and no test failed"),
        (None, "SIGSEGV", "lost the runner was ended by SIGSEGV: lost: the runner was ended by SIGSEGV"),
    ],
)
def test_an_exit_that_no_failure_explains_is_a_crash(code: int | None, ended_by: str | None, record: str) -> None:
    play(
        f"""
        T 1..1
        T ok 1 - a
        = passed a
        END
        = crash {record}
        """,
        code=code,
        ended_by=ended_by,
    )


def test_names_are_bounded_and_repetitions_numbered() -> None:
    driver = TapDriver("r1", "s1")
    first, again, long = driver.feed("stdout", b"ok - a\nok - \x1b[31ma\x1b[0m\nok - " + b"x" * 5000 + b"\n", 5.0)
    assert isinstance(first, TestFinished)
    assert isinstance(again, TestFinished)
    assert isinstance(long, TestFinished)
    assert (first.case, again.case, again.name) == ("a", "a#2", "a")
    assert len(long.name.encode()) <= 1024


def test_warnings_are_bounded() -> None:
    events = TapDriver("r1", "s1").feed("stdout", b"ok # TODO\n" * (WARNINGS_MAX + 5), 5.0)
    assert sum(isinstance(event, Warned) for event in events) == WARNINGS_MAX


def test_carriage_returns_and_a_byte_order_mark_are_no_text() -> None:
    driver = TapDriver("r1", "s1")
    events = driver.feed("stdout", b"\xef\xbb\xbf1..1\r\nok 1 - a # SKIP b\r\n", 5.0)
    assert [shown(event) for event in events] == ["skipped a: b"]
    assert driver.finish(0, None, None, 9.0) == []


def test_it_is_stopped_by_sigterm() -> None:
    driver = TapDriver("r1", "s1", grace_s=7)
    assert driver.stop("cancel") == (Stop(signal.SIGTERM, 7),)
    assert driver.running() is None


def test_the_command_gets_arguments_and_files(tmp_path: Path) -> None:
    for name in ("b.t", "a.t", "--exec=sh.t"):
        (tmp_path / name).touch()
    suite = Suite(id="s1", runner="tap", command=("prove", "-v"), args=("--merge",), files=("*.t", "a.t", "odd name"))
    got = launch(suite, tmp_path, tmp_path, "r1")
    assert got.argv == ("prove", "-v", "--merge", "./--exec=sh.t", "a.t", "b.t", "odd name")
    assert got.set_env == {"EMISSARY_RUN": "r1", "EMISSARY_SUITE": "s1"}


def test_files_that_are_not_there_cannot_be_run(tmp_path: Path) -> None:
    suite = Suite(id="s1", runner="tap", command=("prove",), files=("t/*.t",))
    with pytest.raises(CannotLaunch, match=r"no file matches 't/\*\.t'"):
        launch(suite, tmp_path, tmp_path, "r1")


def test_a_part_of_the_tests_cannot_be_asked_for(tmp_path: Path) -> None:
    suite = Suite(id="s1", runner="tap", command=("prove",))
    with pytest.raises(ProtocolMisuse):
        launch(suite, tmp_path, tmp_path, "r1", only=[Only(None, "a")])


LINES = st.sampled_from(
    [b"ok 1 - a", b"not ok 2 - b", b"  ---", b"  message: x", b"  ...", b"# Subtest: p", b"    ok 1 - c", b"    not ok",
     b"    1..2", b"1..3", b"Bail out! x", b"noise", b"        ok", b"#   log", b"ok # SKIP", b"not ok # TODO t", b""]
)  # fmt: skip


@given(st.lists(LINES, max_size=12), st.data())
def test_chunking_never_changes_the_records(lines: list[bytes], data: st.DataObject) -> None:
    wire = b"\n".join(lines)
    whole, cut, got = TapDriver("r1", "s1"), TapDriver("r1", "s1"), list[DriverEvent]()
    expected = whole.feed("stdout", wire, 5.0)
    while wire:
        n = data.draw(st.integers(1, len(wire)))
        got += cut.feed("stdout", wire[:n], 5.0)
        wire = wire[n:]
    assert got == expected
    assert cut.finish(0, None, None, 9.0) == whole.finish(0, None, None, 9.0)
