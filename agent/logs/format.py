"""Matches as JSON lines, and their identity: the same line read again has the same id.

Source: protocols/logs.md 2.3 (`LogMatched` and its id) and 2.4 (`agent logs scan`).
"""

import copy
from collections.abc import Iterator, Sequence

import msgspec

from agent._native import ffi, lib
from agent.core.engine import room
from agent.core.errors import shown
from agent.logs.matched import rule_hash
from agent.logs.rules import CompiledRule
from agent.logs.scanner import Found

CAPACITY = 1 << 20  # bytes written by one native call; a line of LINE_MAX takes 6 times its size at most


class Formatter:
    """Writes matches of a rule set on one source as JSON lines. Text that is not UTF-8 shows as backslash escapes."""

    def __init__(self, rules: Sequence[CompiledRule], path: str, origin: tuple[int, int], generation: int) -> None:
        self._texts = [ffi.from_buffer("uint8_t[]", _of_rule(rule)) for rule in rules]
        self._names = [
            ffi.from_buffer("uint8_t[]", b"".join(msgspec.json.encode(name) + b":\0" for name in rule.regex.groups))
            for rule in rules
        ]
        self._rules = ffi.new(
            "struct rule_format[]",
            [
                (text, names, len(text), len(names), rule_hash(rule.spec.id))
                for text, names, rule in zip(self._texts, self._names, rules, strict=True)
            ],
        )
        self._out = room("uint8_t[]", CAPACITY)
        self._written = memoryview(ffi.buffer(self._out))
        self._done = ffi.new("size_t *")
        self._stand(path, origin, generation)

    def elsewhere(self, path: str, origin: tuple[int, int], generation: int) -> "Formatter":
        """The same for another source; it shares this one's memory, so use one of them at a time."""
        other = copy.copy(self)
        other._stand(path, origin, generation)
        return other

    def _stand(self, path: str, origin: tuple[int, int], generation: int) -> None:
        source = b'"path":%b,"generation":%d' % (msgspec.json.encode(shown(path)), generation)
        self._source = ffi.from_buffer("uint8_t[]", source)
        seed = lib.match_seed(*origin, generation)
        self._format = ffi.new("struct line_format *", (self._source, len(source), seed, self._rules))

    def lines(
        self, found: Found, block: bytes | bytearray | memoryview, offset: int, numbers: Sequence[int] | None = None
    ) -> Iterator[memoryview]:
        """A scan's matches as JSON lines, in pieces, each good until the next is asked for.

        `offset`: where the block stands; `numbers`: of their lines.
        """
        given = ffi.NULL if numbers is None else ffi.new("uint64_t[]", list(numbers))
        data, done = ffi.from_buffer("uint8_t[]", block), 0
        out, written = self._out, self._written
        while done < found.count:
            size = lib.format_matches(
                self._format,
                found.matches + done,
                found.count - done,
                found.captures,
                data,
                offset,
                ffi.NULL if numbers is None else given + done,
                out,
                len(written),
                self._done,
            )
            if not self._done[0]:  # not even one: groups in each other capture a long line again and again
                out = room("uint8_t[]", 2 * len(written))
                written = memoryview(ffi.buffer(out))
                continue
            done += self._done[0]
            yield written[:size]


def _of_rule(rule: CompiledRule) -> bytes:
    """What every match of a rule says of it."""
    by_rule = rule.spec.class_ is not None
    members = {
        "rule": rule.spec.id,
        "severity": rule.spec.severity,
        "class": rule.spec.class_,
        "class_by": "rule" if by_rule else None,
        "confidence": 1.0 if by_rule else None,
        "template": None,
    }
    return msgspec.json.encode(members)[1:-1]
