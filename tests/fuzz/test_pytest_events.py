"""The pytest driver takes anything on its pipe: it never raises, and each record can be written and read back."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import TestFinished, decode
from agent.suites.messages import Limits, Suite
from agent.suites.runners.driver import MESSAGE_MAX, TITLE_MAX
from agent.suites.runners.pytest import PytestDriver
from tests import no_json

SUITE = Suite(id="s1", runner="pytest", limits=Limits(test_output=50))
IDS = st.sampled_from(["a.py::t", "a.py::C::t[1]", "a.py", "", "::", "b.py::t " + "x" * 2000])
TEXT = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "\x1b[31m", "\0", "x" * 2000]))
MAYBE = st.none() | TEXT
FACTS: dict[str, st.SearchStrategy[Any]] = {
    "id": IDS,
    "ids": st.lists(IDS, max_size=4),
    "pytest": TEXT,
    "sub": st.none() | st.just("[x]"),
    "when": st.sampled_from(["setup", "call", "teardown", "???", None]),
    "outcome": st.sampled_from(["passed", "failed", "skipped", "rerun", "odd"]),
    "xfail": MAYBE,
    "duration": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "message": MAYBE,
    "text": TEXT,
    "at": MAYBE,
    "output": TEXT,
    "properties": st.dictionaries(TEXT, TEXT | st.integers(), max_size=2),
    "exitstatus": st.integers(-1, 6),
    "failfast": st.booleans(),
}
EVENTS = st.sampled_from(["session", "collected", "ignored", "uncollected", "start", "phase", "phase", "finish", "end"])
LINES = st.one_of(
    st.fixed_dictionaries({"event": EVENTS, **FACTS}).map(lambda facts: json.dumps(facts).encode()),
    st.binary(max_size=20),
    no_json.objects("event", "id", "properties"),
)


SIZES = st.integers(10, 500) | st.just(10**6)


@given(st.lists(LINES, max_size=12).map(b"\n".join), SIZES, st.sampled_from([None, "cancel"]))
def test_anything(wire: bytes, size: int, reason: str | None) -> None:
    driver, events = PytestDriver(SUITE, "r1", attempt=2), []
    for at in range(0, len(wire), size):
        events += driver.feed("events", wire[at : at + size], 5.0)
        events += driver.feed("stderr", wire[at : at + size], 5.0)
    events += driver.finish(1, None, reason, 9.0)
    records = [event for event in events if isinstance(event, TestFinished)]
    cases = [record.case for record in records if record.rev == 1]
    assert len(cases) == len(set(cases))
    for record in records:
        assert decode("TestFinished", msgspec.json.encode(record)) == record
        assert len(record.name.encode()) <= TITLE_MAX
        assert len((record.message or "").encode()) <= MESSAGE_MAX
        assert len(record.output.encode()) <= 50
