"""Matches as lines of JSON: however the blocks come, the same lines; order; what waits; files of one path."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs import rules
from agent.logs.context import Ask, Size
from agent.logs.matched import finish
from agent.logs.scanner import End, Match
from agent.logs.written import Log, Written

TABLES: list[dict[str, Any]] = [
    {"id": "plain", "regex": "p(?<n>.)?", "class": "c"},
    {"id": "after", "regex": "^a", "context": {"after": 2}},
    {"id": "trace", "regex": "b", "multiline": {"start": "^T", "continuation": "^ "}},
    {"id": "near", "regex": "^n", "context": {"until": "^T", "before": 1}},
]


class Reader:
    """A log in memory that is scanned piece by piece."""

    def __init__(self, *, counts: bool = False, numbers: bool = True) -> None:
        self.out: list[bytes] = []
        self.written = Written(
            rules.from_tables("x", TABLES), lambda line: self.out.append(bytes(line)), counts=counts, numbers=numbers
        )
        self.log = Log(self.written, "/l", "/l")
        self.log.at((1, 2), 1)
        self._text, self._done, self._before = b"", 0, 0

    def more(self, text: bytes, *, is_last: bool = False) -> None:
        self._text += text
        data = memoryview(self._text)[self._done :]
        found = self.written.worker.scan(
            data, before=self._before, end=End.LINE if is_last else End.OPEN, suspended=self.log.mask
        )
        searches = self.log.take(found, data, self._done, lambda line, match: True, 0.0, is_last=is_last)
        try:
            search = next(searches)
            while True:
                search = searches.send(finish(search, self._answer))
        except StopIteration:
            self._done, self._before = self._done + found.consumed, found.before
        if is_last:
            self.log.tick(math.inf)

    def _answer(self, wish: Ask | Size) -> bytes | None:
        return self._text[wish.start : wish.start + wish.size] if isinstance(wish, Ask) else None

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in b"".join(self.out).splitlines()]


LINES = st.lists(st.sampled_from([b"p1", b"a", b"T", b" b", b" bp", b"n", b"", b"x\r", b"p\xff"]), max_size=14)


@given(LINES, st.lists(st.integers(1, 9)), st.booleans())
def test_chunking_never_changes_what_is_written(lines: list[bytes], sizes: list[int], has_end: bool) -> None:
    text = b"\n".join(lines) + (b"\n" if has_end else b"")
    whole, pieces = Reader(), Reader()
    whole.more(text, is_last=True)
    at = 0
    for size in sizes:
        pieces.more(text[at : at + size])
        at += size
    pieces.more(text[at:], is_last=True)
    assert b"".join(pieces.out) == b"".join(whole.out)
    assert pieces.written.lines == whole.written.lines
    told = whole.told()
    assert [match["offset"] for match in told] == sorted(match["offset"] for match in told)
    for match in told:
        assert text[match["offset"] :].startswith(match["text"].encode()) or match["flags"]
        assert match["line"] == 1 + text[: match["offset"]].count(b"\n")
    counting = Reader(counts=True)
    counting.more(text, is_last=True)
    assert (counting.out, counting.written.lines) == ([], whole.written.lines)


def test_a_match_that_waits_holds_back_those_behind_it() -> None:
    reader = Reader()
    reader.more(b"p1\na\np2\n")
    assert [match["text"] for match in reader.told()] == ["p1"]
    reader.more(b"p3\np4\n")
    assert [match["text"] for match in reader.told()] == ["p1", "a", "p2", "p3", "p4"]
    assert reader.told()[1]["after"] == ["p2", "p3"]


def test_what_is_due_is_written() -> None:
    reader = Reader()
    assert reader.log.due() == math.inf
    reader.more(b"a\nx\n")
    assert reader.log.due() == 2
    reader.log.tick(1.9)
    assert reader.told() == []
    reader.log.tick(2.0)
    assert reader.told()[0]["after"] == ["x"]


def test_numbers_are_those_of_each_file_of_a_path() -> None:
    reader = Reader()
    reader.more(b"x\nx\np1\n")
    reader.log.at((1, 3), 2)
    reader.more(b"p2\n")
    reader.log.at((1, 2), 1)
    reader.more(b"p3\n")
    assert [(match["generation"], match["line"]) for match in reader.told()] == [(1, 3), (2, 1), (1, 4)]
    assert len({match["id"] for match in reader.told()}) == 3


def test_a_line_that_was_told_is_left_out() -> None:
    reader = Reader(numbers=False)
    found = reader.written.worker.scan(b"p1\nn\n", end=End.LINE, suspended=reader.log.mask)

    def is_new(line: int, match: Match) -> bool:
        return line == 0

    assert list(reader.log.take(found, memoryview(b"p1\nn\n"), 0, is_new, 0.0)) == []
    assert [(match["rule"], match["line"]) for match in reader.told()] == [("plain", None)]


def test_no_more_waits_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.logs.written.MAX_HELD", 2000)
    reader = Reader()
    for _ in range(20):
        reader.more(b" p\na\n")  # the last always waits
        assert len(b"".join(reader.out)) > 0 or len(reader.written.lines) < 3
    assert reader.written._held <= 2000
