"""Lines: any bytes in any chunks, bounded; the native line index against its Python twin, in every engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent._native import ffi, lib
from agent.core.engine import available_engines
from agent.core.lines import CutLine, Lines

# Mostly newlines and NULs, with runs longer than any vector register.
BLOCK = st.lists(st.sampled_from([b"\n", b"\r\n", b"\0", b"\x8a", b"a", b"x" * 31, b"y" * 70]), max_size=40).map(
    b"".join
)


def twin(block: bytes, start: int, capacity: int) -> list[int]:
    """What line_ends must give, slowly."""
    return [at for at in range(start, len(block)) if block[at] == 10][:capacity]


@pytest.mark.parametrize("engine", available_engines().values(), ids=available_engines())
@given(block=BLOCK, start=st.integers(0, 100), capacity=st.integers(0, 50))
def test_every_engine_finds_what_the_python_twin_finds(engine: int, block: bytes, start: int, capacity: int) -> None:
    ends = ffi.new(f"size_t[{capacity}]")
    found = lib.line_ends(engine, block, start, len(block), ends, capacity)
    assert ffi.unpack(ends, found) == twin(block, start, capacity)


def test_lines_end_with_lf_and_the_cr_is_left_to_the_caller() -> None:
    lines = Lines(limit=100)
    assert lines.feed(b"ok 1\r\n\nnot ok 2\nok") == [b"ok 1\r", b"", b"not ok 2"]
    assert lines.feed(b" 3\n") == [b"ok 3"]
    assert lines.eof() == []


def test_what_has_no_newline_at_the_end_is_a_line_too() -> None:
    lines = Lines(limit=100)
    assert lines.feed(b"ok 1\n# half") == [b"ok 1"]
    assert lines.eof() == [b"# half"]
    assert lines.eof() == []


def test_more_lines_than_one_native_call_returns() -> None:
    assert Lines(limit=10).feed(b"ab\n" * 10_000) == [b"ab"] * 10_000


def test_a_line_at_the_limit_is_whole_and_one_beyond_says_what_it_lost() -> None:
    whole, cut = Lines(limit=4).feed(b"four\nfive!\n")
    assert (whole, cut) == (b"four", b"five")
    assert not isinstance(whole, CutLine)
    assert isinstance(cut, CutLine)
    assert cut.dropped == 1


def test_an_endless_line_takes_no_more_memory_than_the_limit() -> None:
    lines = Lines(limit=1000)
    for _ in range(100):
        assert lines.feed(b"z" * 500) == []
        assert len(lines._pending) <= 1000
    (cut,) = lines.feed(b"\n")
    assert isinstance(cut, CutLine)
    assert (cut, cut.dropped) == (b"z" * 1000, 49_000)


def test_a_trio_stream_gives_bytearrays() -> None:
    (line,) = Lines(limit=10).feed(bytearray(b"abc\n"))
    assert type(line) is bytes


@given(wire=st.binary(max_size=300) | BLOCK, limit=st.integers(1, 80), data=st.data())
def test_chunking_never_changes_the_lines(wire: bytes, limit: int, data: st.DataObject) -> None:
    expected = [(line[:limit], len(line) - limit if len(line) > limit else None) for line in wire.split(b"\n")]
    if expected[-1] == (b"", None):
        expected.pop()  # nothing after the last newline is no line
    lines, got = Lines(limit), []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        got += lines.feed(wire[:size])
        wire = wire[size:]
    got += lines.eof()
    assert [(bytes(line), line.dropped if isinstance(line, CutLine) else None) for line in got] == expected
