"""Lines behind a match: however the bytes come, over generations, records."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.logs import rules
from agent.logs.behind import Behind
from agent.logs.context import Following, Place
from agent.logs.regex import Matcher


def behind(**table: Any) -> Behind:
    (rule,) = rules.from_tables("test", [{"id": "r", "regex": "x", **table}]).rules
    return Behind("lm-1", Following(rule, Matcher(), 0.0), [], Place(1, 10))


@given(st.lists(st.integers(1, 8)), st.integers(0, 10))
def test_chunking_never_changes_the_lines(sizes: list[int], start: int) -> None:
    data, one = b"0123456789matched\r\na\r\n\nb\nc\n", behind(context={"after": 3})
    ends = [start]
    for size in sizes:
        end = data.find(b"\n", ends[-1] + size) + 1
        ends.append(end or len(data))
    for at, end in zip(ends, [*ends[1:], len(data)], strict=True):
        one.feed(data[at:end], 1, at)
    assert (one.following.after, one.following.is_complete) == ([b"a", b"", b"b"], True)


def test_what_was_fed_is_not_taken_again() -> None:
    one = behind(context={"after": 5})
    one.feed(b"matched\na\n", 1, 10)
    one.feed(b"matched\na\nb\n", 1, 10)
    assert one.following.after == [b"a", b"b"]


def test_lines_go_on_in_the_next_file() -> None:
    one = behind(context={"after": 5})
    one.feed(b"matched\na\n", 1, 10)
    one.feed(b"b\n", 2, 0)
    one.feed(b"late\n", 1, 20)
    assert one.following.after == [b"a", b"b"]


def test_a_line_of_the_record_is_taken_and_another_is_not() -> None:
    one = behind(multiline={"start": "^T", "continuation": "^ "})
    data = b"T\n a\nT\n b\n"
    assert one.takes("r", data, 1, 10, 2)
    assert not one.takes("other", data, 1, 10, 7)
    assert not one.takes("r", data, 1, 10, 7)
    assert not behind(context={"after": 1}).takes("r", data, 1, 10, 2)
    assert one.following.record == [b" a"]
