"""The generic TAP reader takes anything: it never raises, and what it says can be written as JSON and read back."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import TestFinished, decode
from agent.suites.runners.driver import MESSAGE_MAX, TITLE_MAX
from agent.suites.runners.tap import TapDriver

WORDS = st.sampled_from(
    [
        b"ok",
        b"not ok",
        b" ",
        b"    ",
        b"  ---\n",
        b"  ...\n",
        b"\n",
        b"\r\n",
        b"# SKIP",
        b"# TODO x",
        b"1..",
        b"3",
        b"- ",
        b"Bail out!",
        b"TAP version 14\n",
        b"# Subtest: ",
        b"\\#",
        b"\x1b[31m",
        b"\xff",
        b"duration_ms: 1e999",
        b"&a *a",
        "é\u2028".encode(),
        b"#   log",
        b"message: x",
        b"\x00",
        b"# time=1ms",
    ]
)
TAP = st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=40).map(b"".join))


@given(TAP, st.integers(1, 50), st.sampled_from([0, 1, None]), st.sampled_from([None, "cancel"]))
def test_anything(wire: bytes, size: int, code: int | None, reason: str | None) -> None:
    driver, events = TapDriver("r1", "s1"), []
    for at in range(0, len(wire), size):
        events += driver.feed("stdout", wire[at : at + size], 5.0)
    events += driver.finish(code, None if code is not None else "SIGKILL", reason, 9.0)
    records = [event for event in events if isinstance(event, TestFinished)]
    cases = [record.case for record in records if record.rev == 1]
    assert len(cases) == len(set(cases))
    for record in records:
        assert decode("TestFinished", msgspec.json.encode(record)) == record
        assert record.case
        assert len(record.name.encode()) <= TITLE_MAX
        assert len((record.message or "").encode()) <= MESSAGE_MAX
