"""The memory of lines that cannot be read again: the same context as a file gives, fields, limits."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs import recent, rules
from agent.logs.context import RECENT, Around, Ask, Place, Size, look_back, record_before
from agent.logs.matched import finish
from agent.logs.recent import Recent, with_fields
from agent.logs.regex import Matcher
from agent.logs.rules import CompiledRule


def rule_of(**context: Any) -> CompiledRule:
    (rule,) = rules.from_tables("test", [{"id": "r", "regex": r"end(?<n>\d)?(?<PID>)", "context": context}]).rules
    return rule


def remembering(lines: Sequence[bytes], **fields: bytes) -> Recent:
    memory = Recent()
    memory.is_whole = True
    for number, line in enumerate(lines):
        memory.add(number, line, fields)
    return memory


def of_file(lines: Sequence[bytes], rule: CompiledRule, captures: dict[str, bytes | None]) -> Around:
    data = b"".join(line + b"\n" for line in lines)

    def answer(wish: Ask | Size) -> bytes | None:
        return data[wish.start : wish.start + wish.size] if isinstance(wish, Ask) else None

    return finish(look_back(rule, Place(1, len(data)), captures), answer)


LINES = st.lists(st.sampled_from([b"begin1", b"begin2", b"mid1", b"mid2 begin1", b"", b"x"]), max_size=12)


@given(
    LINES,
    st.sampled_from([b"1", b"2", None]),
    st.sampled_from([[r"begin(?<n>\d)"], [r"mid(?<n>\d)", r"begin(?<n>\d)"], []]),
    st.integers(0, 3),
    st.sampled_from(["all", "same"]),
)
def test_it_finds_what_a_file_of_the_same_lines_gives(
    lines: list[bytes], n: bytes | None, until: list[str], before: int, which: str
) -> None:
    rule = rule_of(until=until, same=["n"] if until else [], before=before, lines=which if until else "all")
    found, is_cut = remembering(lines).around(rule, {"n": n, "PID": b""})
    expected = of_file(lines, rule, {"n": n, "PID": b""})
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert (found.found, found.before, found.elided) == (expected.found, expected.before, expected.elided)
    assert [(a.text, starts[a.place.offset]) for a in found.anchors] == [
        (a.text, a.place.offset) for a in expected.anchors
    ]
    assert not is_cut


def test_a_group_that_is_named_as_a_field_has_its_value() -> None:
    captures = {"PID": b"", "n": None, "UNIT": b"own"}
    assert with_fields(captures, {"PID": b"7", "UNIT": b"u"}) == {"PID": b"7", "n": None, "UNIT": b"own"}


def test_anchors_agree_in_fields() -> None:
    rule, memory = rule_of(until="begin(?<PID>)", same=["PID"]), Recent()
    for number, pid in enumerate([b"1", b"2", b"2", b"1", b"3"]):
        memory.add(number, b"begin", {"PID": pid})
    around, is_cut = memory.around(rule, {"n": None, "PID": b"2"})
    assert [anchor.place.offset for anchor in around.anchors] == [2]
    assert not is_cut


def test_a_search_that_the_memory_ended_says_so() -> None:
    rule, near = rule_of(until="gone"), rule_of(before=2)
    memory = remembering([b"a", b"b"])
    assert not memory.around(rule, {})[1]
    memory.is_whole = False
    around, is_cut = memory.around(rule, {})
    assert (around.found, is_cut) == (False, True)
    assert memory.around(near, {}) == (Around(True, [], [b"a", b"b"], 0, 4), False)
    assert memory.around(rule_of(before=3), {})[1]
    assert Recent().around(near, {}) == (Around(True, [], [], 0, 0), True)


def test_it_remembers_no_more_than_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = remembering([b"begin" if number == 0 else b"x" for number in range(RECENT)])
    assert memory.around(rule_of(until="begin"), {})[0].found
    memory.add(RECENT, b"x", {})
    around, is_cut = memory.around(rule_of(until="begin"), {})
    assert (around.found, is_cut) == (False, True)
    monkeypatch.setattr(recent, "MAX_BYTES", 100)
    memory.add(RECENT + 1, b"y" * 60, {"PID": b"z" * 38})
    assert memory.around(rule_of(before=5), {})[0].before == [b"x", b"x", b"y" * 60]


@given(st.lists(st.sampled_from([b"T", b" a", b"x"]), max_size=8), st.sampled_from([b"T", b" a", b"x"]))
def test_the_record_before_a_line_is_that_of_a_file(lines: list[bytes], line: bytes) -> None:
    table = {"id": "r", "regex": "a", "multiline": {"start": "^T", "continuation": "^ "}}
    (rule,) = rules.from_tables("test", [table]).rules
    assert rule.spec.multiline
    assert rule.start
    assert rule.continuation
    data = b"".join(line + b"\n" for line in lines)
    search = record_before(rule.spec.multiline, rule.start, rule.continuation, Matcher(), Place(1, len(data)), line)
    expected = finish(search, lambda wish: data[wish.start : wish.start + wish.size] if isinstance(wish, Ask) else None)
    assert remembering(lines).record_before(rule, line) == expected


def test_other_rules_match_afresh() -> None:
    memory = remembering([b"begin"])
    rule = rule_of(until="begin")
    assert memory.around(rule, {})[0].found
    memory.forget_matches()
    assert memory.around(rule, {})[0].found
