"""The scanner: every rule on every line, whatever the engine, the block or the length of the line."""

import itertools
import random
import tracemalloc
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent._native import lib
from agent.core.engine import ENGINE, available_engines
from agent.logs.literals import Clause, Literal, clauses
from agent.logs.regex import Matcher, Regex
from agent.logs.scanner import LIMIT, LINE_MAX, MEASURED, PARTIAL, PIECE, WINDOW, WINDOW_STEP, End, Scanner, Worker

ENGINES = pytest.mark.parametrize("engine", available_engines().values(), ids=available_engines())
MATCHER = Matcher()


class Row(NamedTuple):
    """A match as text: the rule, the line, its captures."""

    rule: int
    line: bytes
    captures: tuple[bytes | None, ...]


def worker(patterns: Sequence[str], engine: int = ENGINE, *, sample: bytes = b"", interpret: bool = False) -> Worker:
    regexes = [Regex(pattern, interpret=interpret) for pattern in patterns]
    return Worker(Scanner(regexes, [clauses(pattern) for pattern in patterns], sample, engine))


def rows(scanning: Worker, block: bytes, *, end: End = End.LINE) -> list[Row]:
    """All matches of a block, however often the results are full."""
    found: list[Row] = []
    at = before = 0
    while at < len(block):
        part = block[at:]
        result = scanning.scan(part, before=before, end=end)
        for match in result:
            line = part[match.line_at : match.line_at + match.line_size]
            captures = result.captured(match, line, scanning.scanner.regexes[match.rule].groups)
            spans = result.spans(match)
            assert list(captures.values()) == [None if span is None else line[span[0] : sum(span)] for span in spans]
            found.append(Row(match.rule, line, tuple(captures.values())))
        if not result.consumed:
            break
        at, before = at + result.consumed, result.before
    return found


def twin(patterns: Sequence[str], block: bytes) -> list[Row]:
    """The same for whole lines, slowly: PCRE2 alone, every rule on every line."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    regexes = [Regex(pattern) for pattern in patterns]
    found = []
    for line in lines:
        line = line.removesuffix(b"\r")
        for rule, regex in enumerate(regexes):
            captures = MATCHER.match(regex, line)
            if captures is not None:
                found.append(Row(rule, line, tuple(captures.values())))
    return found


RULES = [
    r"error (?<code>\d+)(?: at (?<where>\w+))?",
    "timed? ?out",
    "(?i)PANIC",
    r"^$",
    r"blk_(?<b>-?\d+)$",
    "no such text",
]
LINES = [
    *(b"error 12 at rack", b"error 7", b"errors", b"timeout; timedout", b"kernel Panic - timed out", b"", b"blk_-42"),
    *(b"blk_1 error 1", b"\xff\xfeerror 3\x00", b"PANIC\r", b"x" * 300, b"\r", "日本 error 5".encode()),
]


@ENGINES
def test_every_engine_finds_what_pcre2_alone_finds(engine: int) -> None:
    rng = random.Random(7)
    for _ in range(50):
        block = b"".join(rng.choice(LINES) + b"\n" for _ in range(rng.randrange(200)))
        assert rows(worker(RULES, engine), block) == twin(RULES, block)


@ENGINES
def test_a_literal_is_found_at_every_offset_and_at_both_ends(engine: int) -> None:
    scanning = worker(["needle", "ab"], engine)
    for before, after in itertools.product(range(70), (0, 1, 7, 8, 9, 31, 33)):
        for text in (b"needle", b"ab"):
            block = b"." * before + text + b"." * after
            assert rows(scanning, block) == [Row(int(text == b"ab"), block, ())], (before, after)


@ENGINES
@pytest.mark.parametrize("count", [1, 30, 120, 300, 1200])
def test_any_number_of_rules(engine: int, count: int) -> None:
    rng = random.Random(count)
    words = ["".join(rng.choices("abcdefghij -_=", k=rng.randint(2, 20))) for _ in range(count)]
    patterns = [f"(?i){word}" if n % 3 == 0 else word for n, word in enumerate(words)]
    lines = [f"{'x' * rng.randrange(60)}{rng.choice(words)}{'y' * rng.randrange(60)}" for _ in range(200)]
    block = "\n".join(lines).encode()
    assert rows(worker(patterns, engine, sample=block), block) == twin(patterns, block)


@ENGINES
def test_text_that_is_not_ascii(engine: int) -> None:
    patterns = ["日本語のログ", "é", "ab", "\x7f\x80"]
    block = "\n".join(["日本語のログ出力", "é", "日ab本", "ab日", "なし", "\x7f\x80"] * 20).encode()
    assert rows(worker(patterns, engine), block) == twin(patterns, block)


def test_matches_come_by_line_and_then_by_rule() -> None:
    assert [(row.line, row.rule) for row in rows(worker(["cc", "bb", "aa"]), b"aa bb cc\nbb aa")] == [
        *((b"aa bb cc", 0), (b"aa bb cc", 1), (b"aa bb cc", 2)),
        *((b"bb aa", 1), (b"bb aa", 2)),
    ]


def test_a_rule_without_a_literal_sees_every_line() -> None:
    scanning = worker([r"^\d+$", "error", "^$"])
    assert scanning.scanner.slow == (0, 2)
    assert [(row.rule, row.line) for row in rows(scanning, b"1\nerror\n\n22\n")] == [
        *((0, b"1"), (1, b"error"), (2, b""), (0, b"22")),
    ]


def test_a_regex_runs_only_where_its_literal_stands() -> None:
    scanning = worker([r"error \d+", "panic"])
    rows(scanning, b"nothing\n" * 1000 + b"error x\nerror 1 error 2\n")
    assert scanning.tries == 2


def test_an_open_last_line_waits_and_a_partial_one_does_not_end() -> None:
    scanning = worker(["error$", "err"])
    found = scanning.scan(b"first error\nsecond error")
    assert ([match.line_at for match in found], found.consumed) == ([0, 0], 12)
    found = scanning.scan(b"second error", end=End.PARTIAL)
    assert [(match.rule, match.flags) for match in found] == [(1, PARTIAL)]
    assert found.consumed == 12


def test_a_crlf_cut_by_the_block_is_still_one_line_end() -> None:
    scanning = worker(["error$"])
    assert scanning.scan(b"error\r").consumed == 0
    assert [(m.line_size, m.flags) for m in scanning.scan(b"error\r\n")] == [(5, 0)]


def test_suspended_rules_are_left_out() -> None:
    scanning = worker(["err", "error"])
    assert [match.rule for match in scanning.scan(b"error\n", suspended=b"\1\0")] == [1]


def test_a_limit_is_never_no_match() -> None:
    scanning = worker(["(a+)+$", "a!"])
    found = scanning.scan(b"a" * 5000 + b"!\n")
    assert [(match.rule, match.flags, match.captures) for match in found] == [(0, LIMIT, 0), (1, 0, 0)]


def test_more_matches_than_one_call_returns() -> None:
    block = b"error 1 at x\n" * 10_000
    scanning = worker([r"(?<e>error) (?<n>\d)", "at"])
    assert rows(scanning, block) == [Row(0, b"error 1 at x", (b"error", b"1")), Row(1, b"error 1 at x", ())] * 10_000
    first = scanning.scan(block)
    assert (first.count, first.consumed) == (4096, 2048 * 13)


def long_line(size: int, *marks: tuple[int, bytes]) -> bytes:
    line = bytearray(b"." * size)
    for at, text in marks:
        line[at : at + len(text)] = text
    return bytes(line)


@pytest.mark.parametrize(
    ("line", "windows"),
    [
        (long_line(LINE_MAX, (10, b"error")), []),
        (long_line(LINE_MAX + 1, (10, b"error")), [(0, LINE_MAX)]),
        (long_line(LINE_MAX + 1, (LINE_MAX - 4, b"error")), [(WINDOW_STEP, LINE_MAX + 1 - WINDOW_STEP)]),
        (long_line(300_000, (LINE_MAX - 3, b"error")), [(WINDOW_STEP, LINE_MAX)]),
        (long_line(300_000, (0, b"error"), (200_000, b"error")), [(0, LINE_MAX)]),
        (long_line(300_000, (299_995, b"error")), [(4 * WINDOW_STEP, 300_000 - 4 * WINDOW_STEP)]),
    ],
)
def test_a_long_line_is_matched_by_windows_without_a_blind_spot(line: bytes, windows: list[tuple[int, int]]) -> None:
    block = b"error first\n" + line + b"\nerror last\n"
    found = list(worker(["error"]).scan(block))
    last = len(block) - 11
    whole = [] if windows else [(12, LINE_MAX)]
    assert [(m.line_at, m.line_size) for m in found if not m.flags] == [(0, 11), *whole, (last, 10)]
    assert [(m.line_at - 12, m.line_size) for m in found if m.flags == WINDOW] == windows


def test_only_the_ends_of_a_long_line_are_its_begin_and_end() -> None:
    line = b"begin" + b"." * 200_000 + b"end"
    scanning = worker(["^begin", "end$", r"^\.", r"\.$"])
    assert [match.rule for match in scanning.scan(line + b"\n")] == [0, 1]
    assert [match.rule for match in scanning.scan(line, end=End.PARTIAL)] == [0]


@given(
    size=st.integers(LINE_MAX - 3, 4 * LINE_MAX),
    mark=st.integers(0, 4 * LINE_MAX),
    cut=st.integers(LINE_MAX + 1, 200_000),
)
def test_how_a_long_line_is_read_changes_nothing(size: int, mark: int, cut: int) -> None:
    line = long_line(max(size, mark + 5), (mark, b"error"))[: max(size, mark + 5)]
    block = b"x\n" + line + b"\nerror\n"

    def read(step: int) -> list[tuple[int, int, int]]:
        scanning, got = worker(["error"]), []
        at = before = 0
        while at < len(block):
            found = scanning.scan(block[at : at + step], before=before, end=End.OPEN)
            got += [(at + m.line_at, m.line_size, m.flags) for m in found]
            at, before = at + found.consumed, found.before
        return got

    in_one, in_parts = read(len(block)), read(cut)
    # A long line gives a rule once a call: in more calls the windows' overlap may give it twice.
    assert in_one == [row for row in in_parts if row in in_one]
    assert {row[2] for row in in_parts} == {row[2] for row in in_one}


def test_jit_or_not_the_results_are_equal() -> None:
    block = b"\n".join(LINES)
    assert rows(worker(RULES, interpret=True), block) == rows(worker(RULES), block) == twin(RULES, block)


def test_literals_are_chosen_anew_by_what_was_scanned() -> None:
    pattern = r"request (?<n>\d+) of .* refused"
    block = b"served request 17 of client 10.0.0.1 in 3 ms\n" * 20_000 + b"request 18 of x refused\n"
    scanning = Worker(Scanner([Regex(pattern)], [clauses(pattern)], b" refused" * 100))
    for _ in range(MEASURED // len(block)):
        scanning.scan(block)
    assert scanning.tries > 10**6
    due = [scanning.scanner.is_due]
    scanning.scan(block)
    due.append(scanning.scanner.is_due)
    scanning.scanner.choose_anew()
    due.append(scanning.scanner.is_due)
    assert due == [False, True, False]
    before = scanning.tries
    assert rows(scanning, block) == [Row(0, b"request 18 of x refused", (b"18",))]
    assert scanning.tries == before + 1  # of " refused" it looks for now


def test_what_is_scanned_takes_no_more_memory_though_nobody_chooses_anew() -> None:
    scanning, block, taken = worker(["error"]), bytes(1 << 20), []
    tracemalloc.start()
    try:
        for _ in range(3):
            for _ in range(MEASURED // len(block)):
                scanning.scan(block)
            taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert taken[2] - taken[0] < PIECE


def test_a_scanner_without_rules_finds_nothing() -> None:
    found = worker([]).scan(b"error\n")
    assert (found.count, found.consumed) == (0, 6)


def test_literals_that_the_engine_cannot_take_are_refused() -> None:
    for bad in (b"x", b"x" * 65, b"a\nb"):
        with pytest.raises(MemoryError):
            Scanner([Regex("x")], [[(Literal(bad),)]])


def test_the_numbers_are_those_of_the_engine() -> None:
    assert (WINDOW, PARTIAL, LIMIT) == (lib.MATCH_WINDOW, lib.MATCH_PARTIAL, lib.MATCH_LIMIT)


def test_clauses_may_be_any_that_hold() -> None:
    either: Clause = (Literal(b"one"), Literal(b"two", caseless=True))
    scanning = Worker(Scanner([Regex("one|(?i:two)")], [[either]]))
    assert [row.line for row in rows(scanning, b"one\nTwO\nTWo one\nthree\n")] == [b"one", b"TwO", b"TWo one"]
