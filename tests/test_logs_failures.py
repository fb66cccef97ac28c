"""Failures among lines: which of them, by which expression, with which captures."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ConfigError
from agent.logs.failures import Failure, Failures
from agent.logs.regex import Matcher, Regex


def find(failures: Failures, lines: list[bytes]) -> dict[int, Failure]:
    starts, block = array("I"), b""
    for line in lines:
        starts.append(len(block))
        block += line + b"\n"
    starts.append(len(block))
    return failures.find(block, starts)


def test_a_failure_has_the_first_expression_s_captures() -> None:
    failures = Failures([r"unit (?<unit>u\d+) is (?:lost|(?<why>dead))", "dead"])
    lines = [b"unit u1 is up", b"unit u2 is lost\r", b"unit u3 is dead", b"", b"dead anyway"]
    first, second = r"unit (?<unit>u\d+) is (?:lost|(?<why>dead))", "dead"
    assert find(failures, lines) == {
        1: Failure(first, [b"u2"]),
        2: Failure(first, [b"u3", b"dead"]),
        4: Failure(second, []),
    }


def test_a_line_of_windows_is_one_failure() -> None:
    failures = Failures([r"fail (?<key>\w+)"])
    long = b"x" * 200_000
    assert find(failures, [b"up", long + b" fail k1 " + long + b" fail k2", b"fail k3"]) == {
        1: Failure(r"fail (?<key>\w+)", [b"k1"]),
        2: Failure(r"fail (?<key>\w+)", [b"k3"]),
    }


@given(st.lists(st.sampled_from([b"", b"a", b"ab", b"abc b", b"bbb", b"c\r"]), max_size=2000))
def test_it_finds_what_a_regex_finds_on_each_line(lines: list[bytes]) -> None:
    pattern, matcher = "(?<b>b+)", Matcher()
    regex = Regex(pattern)
    expected = {}
    for number, line in enumerate(lines):
        if found := matcher.match(regex, line.removesuffix(b"\r")):
            expected[number] = Failure(pattern, [value for value in found.values() if value])
    assert find(Failures([pattern]), lines) == expected


def test_a_pattern_that_cannot_be_used_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--failure: .*missing closing parenthesis"):
        Failures(["fine", "(not"])


def test_more_failures_than_one_call_of_the_scanner_returns() -> None:
    lines = [b"fail at %d" % n for n in range(3000)]
    found = find(Failures(["fail", "at", r"(?<n>\d+)"]), lines)
    assert found == dict.fromkeys(range(3000), Failure("fail", []))
