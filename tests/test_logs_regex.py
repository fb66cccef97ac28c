"""Regexes: PCRE2 on one line, with limits and without JIT."""

import re
import subprocess
import sys
import time

import pytest

from agent.logs.regex import Matcher, Regex, RegexError, version

HOSTILE = b"a" * 5000 + b"!"


def test_it_tells_which_pcre2_it_is() -> None:
    assert re.fullmatch(r"10\.\d+", version())


def test_named_captures_come_by_name_and_those_that_took_no_part_are_none() -> None:
    regex = Regex(r"(?<a>x+)(?:(?P<b>y)|(?'c'z))?")
    assert regex.groups == ("a", "b", "c")
    assert Matcher().match(regex, b"..xxz") == {"a": b"xx", "b": None, "c": b"z"}
    assert Matcher().match(regex, b"yz") is None


def test_a_capture_may_be_empty_or_last() -> None:
    assert Matcher().match(Regex("x(?<a>q*)"), b"x") == {"a": b""}
    assert Matcher().match(Regex("(?:(?<a>q)|x)"), b"x") == {"a": None}


def test_a_capture_may_stand_among_as_many_groups_as_a_pattern_has_room_for() -> None:
    regex = Regex("(?<a>x)" + "()" * 2030 + "(?<b>y)")
    assert Matcher().match(regex, b"xy") == {"a": b"x", "b": b"y"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ab(c", r"missing closing parenthesis, at the end"),
        ("a**", r"quantifier does not follow a repeatable item, at byte \d"),
        (r"a\C", r"using \\C is disabled"),
        ("(*UTF)a", "using UTF is disabled"),
        ("a" * 4097, "longer than 4096 bytes"),
        ("(?<n>a)(?<n>b)", "two named subpatterns have the same name"),
        (r"a\nb", r"needs a line feed, .*: it would never match.* Leave the line feed out, or write \$"),
    ],
)
def test_a_pattern_is_refused_with_the_place(pattern: str, message: str) -> None:
    with pytest.raises(RegexError, match=message):
        Regex(pattern)


def test_bytes_or_utf_8() -> None:
    assert Matcher().match(Regex("^.$"), "é".encode()) is None
    assert Matcher().match(Regex("^.$", utf=True), "é".encode()) == {}
    assert Matcher().match(Regex("b.?$", utf=True), b"\xffb") == {}  # invalid bytes match nothing, and break nothing
    assert Matcher().match(Regex("a.b", utf=True), b"a\xffb") is None
    assert Matcher().match(Regex("a.b"), b"a\xffb") == {}


@pytest.mark.parametrize("interpret", [False, True])
def test_an_exploding_search_ends_soon(interpret: bool) -> None:
    regex, matcher = Regex("(a+)+$", interpret=interpret), Matcher()
    started = time.thread_time()
    for _ in range(10):
        assert matcher.match(regex, HOSTILE) is None
    assert (time.thread_time() - started) / 10 < 0.1  # 0.4 and 4 ms on an idle machine


def test_a_long_line_may_need_all_of_the_stack_and_beyond_is_a_limit() -> None:
    regex = Regex(r"^(?:(a)|b)*(?<end>c)$")
    assert Matcher().match(regex, b"ab" * 15_000 + b"c") == {"end": b"c"}  # close to 1 MiB
    assert Matcher().match(regex, b"ab" * 30_000 + b"c") is None


NO_JIT = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, since Linux 6.3: what MemoryDenyWriteExecute= does
    sys.exit(77)
from agent.logs.regex import Matcher, Regex
regex = Regex("x(?<n>[0-9]+)")
print(regex.jit, Matcher().match(regex, b"..x12"))
"""


def test_a_system_without_executable_memory_gets_the_same_results() -> None:
    done = subprocess.run([sys.executable, "-c", NO_JIT], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("PR_SET_MDWE: this kernel has none")
    assert (done.stdout, done.stderr) == ("False {'n': b'12'}\n", "")
