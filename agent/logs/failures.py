"""Which lines are failures, by the expressions of `--failure`.

Source: protocols/logs.md 2.4.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from agent.core.errors import ConfigError
from agent.logs.literals import clauses
from agent.logs.regex import Regex, RegexError
from agent.logs.scanner import LIMIT, End, Scanner, Worker


class Failure(NamedTuple):
    """`pattern` is the first expression that matches the line, `captures` what its named groups took."""

    pattern: str
    captures: Sequence[bytes]


class Failures:
    """Looks for failures. Raises ConfigError for a pattern that cannot be used."""

    def __init__(self, patterns: Sequence[str]) -> None:
        try:
            regexes = [Regex(pattern) for pattern in patterns]
        except RegexError as err:
            raise ConfigError("--failure", 0, "", err.what, remedy=err.remedy) from err
        self._patterns = tuple(patterns)
        self._worker = Worker(Scanner(regexes, [clauses(pattern) for pattern in patterns]))

    def find(self, block: bytes, starts: "array[int]") -> dict[int, Failure]:
        """The failures in a block, by the number of their line in it; line n begins at starts[n]."""
        found: dict[int, Failure] = {}
        at = before = 0
        while at < len(block):
            result = self._worker.scan(memoryview(block)[at:], before=before, end=End.LINE)
            for match in result:
                number = bisect_right(starts, at + match.line_at) - 1
                if match.flags & LIMIT or number in found:
                    continue
                begin = at + match.line_at
                spans = [span for span in result.spans(match) if span]
                captures = [block[begin + start : begin + start + size] for start, size in spans]
                found[number] = Failure(self._patterns[match.rule], captures)
            at, before = at + result.consumed, result.before
        return found
