"""Literals: what a line must hold when a regex matches, and which of them the scanner searches for."""

import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.literals import Clause, Frequencies, Literal, choose, clauses, may_match_a_line
from agent.logs.regex import Matcher, Regex, RegexError
from tests.patterns import line, pattern

MATCHER = Matcher()


def texts(pattern: str, *, utf: bool = False) -> list[set[str]]:
    """The clauses as sets of text; a caseless literal ends in "/i"."""
    found = clauses(pattern, utf=utf)
    return [{lit.text.decode(errors="backslashreplace") + "/i" * lit.caseless for lit in clause} for clause in found]


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (r"authentication failure; .*rhost=[^ \n]+", [{"authentication failure; "}, {"rhost="}]),
        (r"(?:Kerberos a|A)uthentication failed", [{"uthentication failed"}]),
        (r"blk_-?\d+", [{"blk_"}, {"blk_", "blk_-"} - {"blk_-"}]),
        (r"foo+bar", [{"foo"}, {"obar"}]),
        (r"a{2}b{1,}cd", [{"aab"}, {"bcd"}]),
        (r"(?:un|re)do (?:ok|no)", [{"do "}, {"undo ", "redo "}, {"undo ok", "undo no", "redo ok", "redo no"}]),
        (r"[Oo]ut of [Mm]emory", [{"out of memory/i"}]),
        (r"(?i)Panic: x", [{"panic: x/i"}]),
        (r"(?i:ab)CD", [{"abcd/i"}]),
        (r"gen[12]up", [{"gen"}, {"up"}, {"gen1up", "gen2up"}]),
        (r"a\.b\x41\tq", [{"a.bA\tq"}]),
        (r"\Qa.b|c\E!", [{"a.b|c!"}]),
        (r"(?x) a b # not this" + "\n c", [{"abc"}]),
        (r"ab(?=cdef)", [{"cdef"}, {"ab"}]),
        (r"(?<n>ab)(?'m'cd)(?P<o>ef)", [{"abcdef"}]),
        (r"timed? ?out", [{"time"}, {"out"}, {"timeout", "time out", "timedout", "timed out"}]),
    ],
)  # fmt: skip
def test_a_regex_gives_these_clauses(regex: str, expected: list[set[str]]) -> None:
    found = texts(regex)
    assert all(clause in found for clause in expected), found


@pytest.mark.parametrize(
    "regex",
    [
        *(r".*", r"\d+ \w+", r"a?b?", r"(?:error)?", r"(error)*", r"(?!error)x", r"error|.", r"[^abc]+", r"x"),
        *(r"ab(*ACCEPT)cdef", r"(?(1)error|fatal)", r"(a)\1", r"(?R)?", r"(?<!error)x", r"(?C1)error"),
        r"\p{L}\N{U+41}",
    ],
)  # fmt: skip
def test_the_unknown_gives_none(regex: str) -> None:
    assert texts(regex) == []


def test_case_in_utf_mode_is_more_than_two_letters() -> None:
    assert texts("(?i)disk", utf=True) == [{"di/i"}]  # the long s and the Kelvin sign match s and k
    assert texts("(?i)disk") == [{"disk/i"}]
    assert texts("(?i)é!") == texts("é!") == [{"é!"}]  # bytes have no case above 127
    assert texts("(?i)é!", utf=True) == []


def test_a_class_counts_bytes_unless_utf() -> None:
    assert texts("ab[é]", utf=True) == [{"ab\xe9"}]
    assert texts("ab[é]") == [{"ab"}, {"ab\\xc3", "ab\\xa9"}]


def test_a_literal_is_cut_to_what_the_engine_takes() -> None:
    assert clauses("x" * 300) == [(Literal(b"x" * 64),)]


@given(st.randoms(use_true_random=False), st.booleans())
def test_every_line_that_matches_holds_one_of_each_clause(rng: random.Random, utf: bool) -> None:
    regex, text = pattern(rng)
    try:
        compiled = Regex(regex, utf=utf)
    except RegexError:
        return
    found = clauses(regex, utf=utf)
    for _ in range(8):
        subject = line(rng, [text])
        if MATCHER.match(compiled, subject) is not None:
            assert all(holds(clause, subject) for clause in found), (regex, subject, found)


def holds(clause: Clause, subject: bytes) -> bool:
    return any(lit.text in (subject.lower() if lit.caseless else subject) for lit in clause)


@given(st.text(max_size=60), st.booleans())
def test_any_pattern_that_pcre2_takes_is_read_or_given_up(regex: str, utf: bool) -> None:
    try:
        Regex(regex, utf=utf)
    except RegexError:
        return
    assert all(2 <= len(literal.text) <= 64 for clause in clauses(regex, utf=utf) for literal in clause)


@pytest.mark.parametrize(
    "regex",
    [
        *(r"a\nb", "a\nb", r"error\r\n", r"\x0a", r"\x{A}", r"\012", r"\o{12}", r"\cJ", r"[\n]", r"(?:a|b)\n{2,}"),
        *(r"(?=.*\n)a", r"(?<=\n)a", r"a\n|b\n$", r"(?<x>\n)+", r"(?i)ERROR\n", "(?x) a\n\\n", r"\Qa\E\n", r"(?>\n)a?"),
    ],
)  # fmt: skip
def test_a_regex_that_needs_a_line_feed_matches_no_line(regex: str) -> None:
    assert not may_match_a_line(regex)
    assert not may_match_a_line(regex, utf=True)


@pytest.mark.parametrize(
    "regex",
    [
        *(r"[^x]", r"\s", r"\v", r"\R", r"[\n]?", r"\n*", r"\n{0,5}", r"(?:^|\n)err", r"err(?:\n|$)", r"err(?=\n|$)"),
        *(r"(?!\n)a", r"(?<!\n)a", r"[^\n]+", r"[\r\n]", r"[\n-\r]", r"a|b\n", r"(?(1)\n|b)", r"(?(DEFINE)(?<x>\n))a"),
        *(r"(?:a\n)?+b", "(?x) a # b\n c", "(?#\n)a", r"\Qa\nb\E", r"\\n", r"(\n)??a", r"\N", r"(*COMMIT)\n|a", r"\12"),
        *(r"(?:\n){0}a", r"(?=\n)?a", r"(\n|(a))(?2)", r"\N{U+41}", r"\x0A?", r"(?:\n+)*a", r".", r""),
    ],
)  # fmt: skip
def test_a_regex_that_can_do_without_a_line_feed_is_one_for_lines(regex: str) -> None:
    assert may_match_a_line(regex)
    assert may_match_a_line(regex, utf=True)


@given(st.randoms(use_true_random=False), st.booleans())
def test_no_regex_that_matches_a_line_is_said_to_need_a_line_feed(rng: random.Random, utf: bool) -> None:
    odd, text = pattern(rng)
    for piece in rng.choices(
        [r"\n", r"\n?", r"|\n", r"(?:\n|)", r"[\n]", r"(?=\n)", r"(?<!\n)", "\n"], k=rng.randint(1, 3)
    ):
        at = rng.randrange(len(odd) + 1)
        odd = odd[:at] + piece + odd[at:]
    if may_match_a_line(odd, utf=utf):
        return
    with pytest.MonkeyPatch.context() as patch, suppress(RegexError):
        patch.setattr("agent.logs.regex.may_match_a_line", lambda *_, **__: True)
        compiled = Regex(odd, utf=utf)
        assert all(MATCHER.match(compiled, line(rng, [text, ""])) is None for _ in range(8)), odd


def test_rates_count_letters_in_either_case_and_what_was_not_seen_is_rarer_the_longer_it_is() -> None:
    error, once, unseen, long = Literal(b"Error"), Literal(b"no"), Literal(b"nothing", True), Literal(b"x" * 64)
    sample = b"error ERROR\n" * 1000 + b"no"
    rates = Frequencies(sample).rates([error, once, unseen, long])
    assert rates[error] / rates[once] == pytest.approx(2000, rel=0.2)
    assert rates[error] == pytest.approx(2000 / (len(sample) + 65_536), rel=0.01)
    assert rates[once] > rates[unseen] > rates[long] > 0


def test_what_is_frequent_in_the_sample_is_not_searched_for() -> None:
    frequencies = Frequencies(b"INFO error count 0\n" * 100)
    assert choose([clauses("error .*rack")], frequencies) == [(Literal(b"rack"),)]
    assert choose([clauses("error .*rack")], Frequencies(b"rack 1\n" * 100)) == [(Literal(b"error "),)]


def test_what_rules_share_is_searched_for_once() -> None:
    rules = [clauses(f"{unit}.{{0,40}}no answer") for unit in ("spindle", "actuator", "conveyor belt")]
    assert choose(rules, Frequencies(b"")) == [(Literal(b"no answer"),)] * 3


def test_short_literals_and_many_are_taken_only_where_nothing_else_is() -> None:
    assert choose([clauses(r"(?:ab|cd|ef|gh)\d+stalled"), clauses("ab"), clauses(".")], Frequencies(b"")) == [
        (Literal(b"stalled"),),
        (Literal(b"ab"),),
        (),
    ]
