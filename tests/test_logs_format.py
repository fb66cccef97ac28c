"""Matches as JSON lines: the native formatter against a twin in Python."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.core import toml
from agent.logs import rules
from agent.logs.format import Formatter
from agent.logs.matched import identify
from agent.logs.regex import Matcher
from agent.logs.scanner import WINDOW_STEP, End, Scanner, Worker

RULES = rules.from_documents(
    [
        (
            "x.toml",
            toml.parse(
                "version = 1\n"
                "[[rule]]\nid = 'all'\nregex = '(?s)^(?<first>.)?(?<rest>.*)$'\nseverity = 'error'\nclass = 'a\"b'\n"
                "[[rule]]\nid = 'err'\nregex = 'err(?<code>\\d)?'\n"
            ),
        )
    ]
).rules
PATH = '/var/log/"x"'
ORIGIN, GENERATION, OFFSET = (66, 1 << 40), 3, 1 << 33


def formatted(block: bytes, numbers: list[int] | None = None) -> bytes:
    worker = Worker(Scanner([rule.regex for rule in RULES], [rule.clauses for rule in RULES]))
    formatter = Formatter(RULES, PATH, ORIGIN, GENERATION)
    found = worker.scan(block, end=End.LINE)
    assert found.consumed == len(block)
    return b"".join(map(bytes, formatter.lines(found, block, OFFSET, numbers)))


def shown(text: bytes | None) -> str | None:
    return None if text is None else text.decode(errors="backslashreplace")


def twin(block: bytes, numbers: list[int] | None = None) -> bytes:
    out, at, number = b"", 0, 0
    for line in block.split(b"\n") if not block.endswith(b"\n") else block[:-1].split(b"\n"):
        text = line.removesuffix(b"\r")
        for rule in RULES:
            captures = Matcher().match(rule.regex, text)
            if captures is None or (not block):
                continue
            flags = ["nul"] if b"\0" in text else []
            try:
                text.decode()
            except UnicodeDecodeError:
                flags.append("invalid_utf8")
            by_rule = rule.spec.class_ is not None
            event: dict[str, Any] = {
                **{"id": identify(ORIGIN, GENERATION, OFFSET + at, rule.spec.id), "path": PATH},
                **{"generation": GENERATION, "offset": OFFSET + at, "length": len(text)},
                **{"line": numbers[number] if numbers else None, "rule": rule.spec.id},
                **{"severity": rule.spec.severity, "class": rule.spec.class_},
                **{"class_by": "rule" if by_rule else None, "confidence": 1.0 if by_rule else None, "template": None},
                **{"text": shown(text), "captures": {name: shown(value) for name, value in captures.items()}},
                **{"count": 1, "suppressed": 0, "flags": flags},
            }
            out += msgspec.json.encode(event) + b"\n"
            number += 1
        at += len(line) + 1
    return out


TEXT = st.lists(
    st.sampled_from([b"err", b"err7", b'"', b"\\", b"\0", b"\t", b"\x1f\x7f", "é日😀".encode(), b"\xed\xa0\x80"])
    | st.binary(max_size=4),
    max_size=8,
).map(b"".join)


@given(st.lists(TEXT, min_size=1, max_size=5).map(b"\n".join).filter(bool))
def test_it_writes_what_the_twin_writes(block: bytes) -> None:
    assert formatted(block) == twin(block)


def test_line_numbers_where_they_are_asked_for() -> None:
    assert formatted(b"err\n\nerr", [1, 1, 2, 3, 3]) == twin(b"err\n\nerr", [1, 1, 2, 3, 3])


def test_more_than_one_buffer() -> None:
    block = (b"\x01" * 30_000 + b"\n") * 100
    assert formatted(block) == twin(block)


def test_groups_in_each_other_get_the_room_that_they_need() -> None:
    (rule,) = rules.from_tables("x", [{"id": "r", "regex": "error(?<a>(?<b>(?<c>.*)))"}]).rules
    block = b"error\nerror" + b"\x01" * 60_000 + b"\nerror\n"
    found = Worker(Scanner([rule.regex], [rule.clauses])).scan(block)
    written = b"".join(map(bytes, Formatter([rule], PATH, ORIGIN, 1).lines(found, block, 0)))
    matches = [msgspec.json.decode(match) for match in written.splitlines()]
    assert [len(match["captures"]["c"]) for match in matches] == [0, 60_000, 0]


def test_an_id_is_that_of_the_line_and_the_rule() -> None:
    one = identify((1, 2), 3, 4, "rule")
    assert one == identify((1, 2), 3, 4, "rule")
    others = {identify((2, 2), 3, 4, "rule"), identify((1, 3), 3, 4, "rule"), identify((1, 2), 4, 4, "rule")}
    others |= {identify((1, 2), 3, 5, "rule"), identify((1, 2), 3, 4, "other"), identify((2, 1), 3, 4, "rule")}
    assert len(others | {one}) == 7
    assert len({identify((1, 2), 3, offset, "rule") for offset in range(10_000)}) == 10_000


def test_a_window_is_at_the_offset_of_its_line() -> None:
    lines = formatted(b"x\n" + b"y" * 100_000 + b"err1").splitlines()
    windows = [msgspec.json.decode(line) for line in lines if b'"window"' in line]
    assert [(window["rule"], window["offset"] - OFFSET) for window in windows] == [("err", 2)]
    assert windows[0]["captures"] == {"code": "1"}


def test_a_window_is_at_the_offset_of_its_line_beyond_4_gib() -> None:
    (rule,) = rules.from_tables("x", [{"id": "r", "regex": "error"}]).rules
    before = WINDOW_STEP * 80_000
    found = Worker(Scanner([rule.regex], [rule.clauses])).scan(b"the error\n", before=before)
    assert [match.window_at for match in found] == [before]
    (written,) = Formatter([rule], PATH, ORIGIN, 1).lines(found, b"the error\n", OFFSET + before)
    assert msgspec.json.decode(bytes(written))["offset"] == OFFSET


def test_what_gave_up_is_no_match() -> None:
    (rule,) = rules.from_tables("x", [{"id": "r", "regex": "(a+)+$"}]).rules
    block = b"a" * 5000 + b"!\n"
    found = Worker(Scanner([rule.regex], [rule.clauses])).scan(block)
    assert found.count == 1
    assert b"".join(map(bytes, Formatter([rule], PATH, ORIGIN, 1).lines(found, block, 0))) == b""
