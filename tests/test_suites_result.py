"""agent/suites/result.py: verdicts, counts, corrections, attempts, and a document that is never held."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import Counts, SuiteFinished, TestFinished, Warned
from agent.suites.result import Tally, document

FINISHED = SuiteFinished(
    run="r1",
    suite="s1",
    runner="ava",
    driver="tap",
    verdict="blocked",
    result="FAILURE",
    code=1,
    signal=None,
    reason=None,
    started=1.0,
    ended=5.0,
    counts=Counts(),
    warnings=(Warned("a", "b"),),
)


def record(case: str, state: str = "passed", **more: Any) -> TestFinished:
    fields = {"run": "r1", "suite": "s1", "case": case, "name": case, "file": None, "state": state, "ended": 2.0} | more
    return msgspec.convert(fields, TestFinished)


def tally(*records: TestFinished, min_tests: int = 1) -> Tally:
    tally = Tally(min_tests)
    for each in records:
        tally.add(each)
    return tally


@pytest.mark.parametrize(
    ("states", "verdict", "result"),
    [
        ("passed", "passed", "SUCCESS"),
        ("passed skipped todo", "passed", "SUCCESS"),
        ("passed blocked", "blocked", "FAILURE"),
        ("passed blocked failed", "failed", "FAILURE"),
        ("failed aborted blocked", "aborted", "ABORTED"),
        ("failed aborted lost", "lost", "FAILURE"),
        ("skipped", "skipped", "FAILURE"),
        ("todo", "skipped", "FAILURE"),
        ("", "blocked", "FAILURE"),
    ],
)
def test_the_verdict_is_the_first_of_the_worst_present(states: str, verdict: str, result: str) -> None:
    finished = tally(*(record(state, state) for state in states.split())).finish(FINISHED)
    assert (finished.verdict, finished.result) == (verdict, result)


@pytest.mark.parametrize(("passed", "verdict"), [(0, "skipped"), (1, "skipped"), (2, "passed")])
def test_so_many_tests_must_have_passed(passed: int, verdict: str) -> None:
    records = [record(f"p{n}") for n in range(passed)]
    assert tally(*records, record("s", "skipped"), min_tests=2).verdict() == verdict


def test_counts_are_over_tests_and_what_was_not_reported() -> None:
    found = tally(
        record("a"),
        record("b", "failed"),
        record("rest", "aborted", kind="rest", count=7),
        record("who knows", "lost", kind="rest"),
        record("hook", "blocked", kind="hook"),
        record("crash", "blocked", kind="crash"),
    )
    assert found.counts() == Counts(total=10, passed=1, failed=1, aborted=7, lost=1)


def test_crashes_and_hooks_weigh_in_the_verdict() -> None:
    assert tally(record("a"), record("crash", "lost", kind="crash")).verdict() == "lost"
    assert tally(record("a"), record("hook", "blocked", kind="hook")).verdict() == "blocked"


def test_a_correction_replaces_its_record_in_any_order() -> None:
    first, second = record("a", "failed"), record("a", "blocked", kind="hook", rev=2)
    for records in ([first, second], [second, first]):
        found = tally(*records)
        assert found.counts() == Counts()
        assert list(found.last(records)) == [second]
        assert list(found.newest(records)) == [second]


def test_the_last_attempt_counts_and_all_are_in_the_document() -> None:
    records = [
        record("a", "lost"),
        record("a", "failed", rev=2),
        record("b"),
        record("a@2", "failed", attempt=2),
        record("a@2", "passed", attempt=2, rev=2),
    ]
    found = tally(*records)
    assert found.counts() == Counts(total=2, passed=2)
    assert found.verdict() == "passed"
    assert list(found.last(records)) == [records[2], records[4]]
    assert list(found.newest(records)) == [records[1], records[2], records[4]]


def test_a_name_that_looks_like_an_attempt_is_a_test_of_its_own() -> None:
    assert tally(record("a"), record("a@2", "failed")).counts() == Counts(total=2, passed=1, failed=1)
    retried = tally(record("a", "failed"), record("a@2", attempt=2), record("a@1", "failed"))
    assert retried.counts() == Counts(total=2, passed=1, failed=1)


def test_the_document_is_one_line_of_the_fields_of_the_sheet() -> None:
    records = [record("a", details={"x": [1]}, log=["l"]), record("r", "lost", kind="rest", count=2)]
    text = b"".join(document(tally(*records).finish(FINISHED), records))
    assert text.endswith(b"}\n")
    assert text.count(b"\n") == 1
    read = msgspec.json.decode(text)
    assert list(read) == [
        *("run", "suite", "runner", "driver", "verdict", "result", "code", "signal", "reason", "started", "ended"),
        *("counts", "tests", "warnings", "artifacts"),
    ]
    assert read["verdict"] == "lost"
    assert read["counts"]["lost"] == 2
    assert read["warnings"] == [{"code": "a", "text": "b"}]
    first, rest = read["tests"]
    assert list(first) == [
        *("case", "name", "file", "kind", "state", "started", "ended", "duration", "attempt", "message", "details"),
        *("at", "log", "output", "known_failure", "rev"),
    ]
    assert (first["details"], first["log"], rest["count"]) == ({"x": [1]}, ["l"], 2)


def test_a_document_without_tests() -> None:
    assert msgspec.json.decode(b"".join(document(FINISHED, [])))["tests"] == []


def test_a_hundred_thousand_tests_take_little_memory() -> None:
    def records() -> Iterator[TestFinished]:
        return (record(f"test/some/folder/file{n % 100}.js › a title of usual length {n}") for n in range(100_000))

    tracemalloc.start()
    try:
        found = Tally(1)
        for each in records():
            found.add(each)
        size = sum(map(len, document(found.finish(FINISHED), found.newest(records()))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 20_000_000
    assert peak < 32 * 1024 * 1024


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["passed", "failed"])),
        max_size=20,
        unique_by=lambda drawn: drawn[:3],
    )
)
def test_the_last_records_are_those_that_are_counted(drawn: list[tuple[str, int, int, str]]) -> None:
    records = [
        record(f"{case}@{attempt}" if attempt > 1 else case, state, attempt=attempt, rev=rev)
        for case, attempt, rev, state in drawn
    ]
    found = tally(*records)
    last = list(found.last(records))
    assert len(last) == found.counts().total == len({case for case, *_ in drawn})
    assert sum(each.state == "passed" for each in last) == found.counts().passed
