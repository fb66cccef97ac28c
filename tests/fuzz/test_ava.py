"""Any bytes in any chunks: AVA's drivers never raise, tell the same, and leave no planned test without a state."""

from collections.abc import Callable

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import TestFinished, TestStarted
from agent.suites.messages import Suite
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_lines import AvaLines, Plan
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.driver import Driver, DriverEvent
from tests import no_json
from tests.ava_rows import ROWS, Row, final

SUITE = Suite(id="s", runner="ava", driver="events", files=("a.js", "b.js"))

WORDS = st.sampled_from(
    [
        *("", "a", "a › x", "b › y # SKIP", "z # TODO", "before hook", "b › beforeEach hook for y", "Error: m", "1..2"),
        *("a.js exited with a non-zero exit code: 1", "b.js exited due to SIGTERM", "exited due to undefined"),
        *("No tests found in a.js", "uncaught-exception", "\x1b[31mred", "é" * 600),
    ]
)
LINES = st.one_of(
    st.builds("ok {} - {}".format, st.integers(0, 99), WORDS),
    st.builds("not ok {} - {}".format, st.integers(0, 99), WORDS),
    st.builds("#   {}".format, WORDS),
    st.builds("# {}".format, WORDS),
    st.builds("# {} tests remaining in {}.js".format, st.integers(0, 9), st.sampled_from("abc")),
    st.builds("1..{}".format, st.integers(0, 30)),
    st.builds("# {} {}".format, st.sampled_from(["tests", "pass", "skip", "fail"]), st.integers(0, 30)),
    st.sampled_from(
        [
            *("  ---", "  ...", "    name: Error", "    message: m", "    message: [", "    code: ERR_WORKER_X", ""),
            *("    at: 'file:///p/a.js:1:1'", "    details: {a: b}", "    a: &b [*b]", "TAP version 13", "Bail out!"),
        ]
    ),
)
TAP = st.lists(LINES, max_size=30).map(lambda lines: "\n".join(lines).encode()) | st.binary(max_size=200)

TYPES = (
    *("declared-test", "selected-test", "test-register-log-reference", "test-passed", "test-failed", "hook-failed"),
    *("uncaught-exception", "process-exit", "timeout", "worker-failed", "worker-finished", "worker-stdout", "end"),
    *("missing-ava-import", "unusable", "line-number-selection-error", "something new"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
TOLD = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES)},
    optional={
        "testFile": st.sampled_from(["a.js", "b.js"]),
        "title": st.sampled_from(["x", "y", " y "]),
        "skip": st.booleans(),
        "todo": st.booleans(),
        "duration": st.floats(0, 1e9),
        "logs": st.lists(st.text(max_size=5), max_size=3),
        "err": st.dictionaries(st.sampled_from(["name", "message", "details", "assertion", "at", "line"]), JSON),
        "nonZeroExitCode": st.integers(0, 3),
        "signal": st.sampled_from(["SIGTERM", "SIGKILL"]),
        "pendingTests": st.dictionaries(st.sampled_from(["a.js", "c.js"]), st.lists(st.sampled_from(["x", "y"]))),
        "chunk": st.sampled_from(["", "aGk=", "no base64", "é"]),
        "reason": st.text(max_size=5),
    },
)
NO_JSON = no_json.objects("type", "err", "chunk")
EVENTS = st.lists(TOLD.map(msgspec.json.encode) | st.binary(max_size=20) | NO_JSON, max_size=30).map(b"\n".join)

ENDS = st.sampled_from([(0, None, None), (1, None, None), (None, "SIGKILL", None), (1, None, "cancel: by hand")])


def play(
    make: Callable[[Suite, str], Driver],
    stream: str,
    chunks: list[bytes],
    end: tuple[int | None, str | None, str | None],
) -> list[DriverEvent]:
    driver = make(SUITE, "r1")
    told: list[DriverEvent] = []
    if end[2] is not None:
        driver.stop(end[2])
    for chunk in chunks:
        told += driver.feed(stream, chunk, 1.0)
        driver.running()
    told += driver.finish(*end, 2.0)
    return told


def timeless(told: list[DriverEvent]) -> list[DriverEvent]:
    """How a last line without its end is told depends on when the end came: at finish() it has another time."""
    events: list[DriverEvent] = []
    for event in told:
        if isinstance(event, TestFinished):
            event = msgspec.structs.replace(event, ended=0.0, started=None)
        events.append(event)
    return events


def cut(wire: bytes, data: st.DataObject) -> list[bytes]:
    chunks = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        chunks.append(wire[:size])
        wire = wire[size:]
    return chunks


def check_records(told: list[DriverEvent]) -> dict[str, TestFinished]:
    """Every event can be written as JSON and read again, and has the bounds of the sheet."""
    for event in told:
        data = msgspec.json.encode(event)
        assert msgspec.json.decode(data, type=type(event)) is not None
        if isinstance(event, TestFinished):
            assert len(event.name.encode()) <= 1024
            assert len((event.message or "").encode()) <= 1024
    return final(told)


@given(TAP, ENDS, st.data())
def test_tap(wire: bytes, end: tuple[int | None, str | None, str | None], data: st.DataObject) -> None:
    told = play(AvaTap, "stdout", [wire], end)
    assert timeless(play(AvaTap, "stdout", cut(wire, data), end)) == timeless(told)
    records = check_records(told).values()
    if end[0] != 0 or end[2] is not None:
        assert {record.state for record in records} - {"passed", "skipped", "todo"}  # nothing bad is swallowed
    lines = AvaLines()
    plans = [item.count for item in lines.feed(wire) + lines.eof() if isinstance(item, Plan)]
    if plans and None not in [record.count for record in records if record.kind == "rest"]:
        tests = sum(record.kind == "test" for record in records)
        rest = sum(record.count or 0 for record in records if record.kind == "rest")
        assert tests + rest == max(plans[0], tests)


@given(EVENTS, TAP, ENDS, st.data())
def test_events(wire: bytes, tap: bytes, end: tuple[int | None, str | None, str | None], data: st.DataObject) -> None:
    told = play(AvaEvents, "events", [wire], end)
    assert timeless(play(AvaEvents, "events", cut(wire, data), end)) == timeless(told)
    records = check_records(told)
    assert {event.case for event in told if isinstance(event, TestStarted)} <= set(records)
    driver = AvaEvents(SUITE, "r1")
    mixed = driver.feed("stdout", tap, 1.0) + driver.feed("events", wire, 2.0) + driver.feed("stdout", tap, 9.0)
    mixed += driver.finish(*end, 9.0)
    check_records(mixed)


@given(st.sampled_from(ROWS), st.data())
def test_a_run_that_is_cut_anywhere_keeps_what_it_told_and_says_that_it_was_cut(row: Row, data: st.DataObject) -> None:
    for make, stream in ((AvaTap, "tap"), (AvaEvents, "events")):
        wire = row.wire(stream)
        driver: Driver = make(row.suite(stream), "r1")
        whole: Driver = make(row.suite(stream), "r1")
        at = data.draw(st.integers(0, len(wire)))
        name = "stdout" if stream == "tap" else stream
        told = driver.feed(name, wire[:at], 1.0)
        assert told == whole.feed(name, wire, 1.0)[: len(told)]
        told += driver.finish(None, "SIGKILL", None, 2.0)
        assert {record.state for record in final(told).values()} - {"passed", "skipped", "todo"}
