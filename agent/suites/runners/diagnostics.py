"""A TAP diagnostic block: the YAML between `---` and `...`, read safely, and never larger than agreed.

The block is read from the parser's events, not by a constructor: no tag makes an object, an alias is refused, depth and
number of values are bounded, and every value that comes out can be written as JSON.

Source: protocols/suites.md, "AVA, driver tap" row 10.
"""

from __future__ import annotations  # those of PyYAML's events: it is loaded when a block is read

import re
from contextlib import suppress
from typing import Any, Final

import yaml

from agent.suites.runners.driver import TEXT_MAX, YAML_MAX, clip

DEPTH_MAX: Final = 32
VALUES_MAX: Final = 20_000
FIELDS_MAX: Final = 1000

_INT = re.compile(r"[-+]?[0-9]{1,15}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,15}\.[0-9]{0,20}|\.[0-9]{1,20}|[0-9]{1,15})(?:[eE][-+]?[0-9]{1,2})?")
# What YAML holds neither as it is nor escaped, though runners write it: control characters, half a surrogate pair.
_NO_TEXT = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}


class _Unreadable(Exception):
    """The block is no YAML that we take."""


class _Builder:
    """Values from events, `room` bytes of text at the most: beyond it texts are cut, and what is small stays."""

    def __init__(self, text: str, room: int) -> None:
        self._events = iter(yaml.parse(text, Loader=yaml.CSafeLoader))
        self._room, self._values = room, 0

    def document(self) -> object:
        """The first document's value. Raises _Unreadable, yaml.YAMLError."""
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                return self._value(next(self._events), 0)
        return None

    def _value(self, event: yaml.Event, depth: int) -> object:
        self._values += 1
        if depth > DEPTH_MAX or self._values > VALUES_MAX:
            raise _Unreadable
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, depth + 1))
            return items
        if isinstance(event, yaml.MappingStartEvent):
            fields: dict[str, object] = {}
            while not isinstance(event := next(self._events), yaml.MappingEndEvent):
                if not isinstance(event, yaml.ScalarEvent):
                    raise _Unreadable
                key = self._text(event.value)
                fields[key] = self._value(next(self._events), depth + 1)
            return fields
        raise _Unreadable  # an alias

    def _scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        value: str = event.value
        if event.implicit[0] and len(value) < 48:
            if value.lower() in _WORDS:
                return _WORDS[value.lower()]
            if _INT.fullmatch(value):
                return int(value)
            if _FLOAT.fullmatch(value):
                return float(value)
        return self._text(value)

    def _text(self, value: str) -> str:
        kept = clip(value, max(self._room, 256))
        self._room -= len(kept.encode())
        return kept


def read(block: str) -> dict[str, Any]:
    """The mapping in a diagnostic block; what no YAML may hold is U+FFFD in it.

    Anything else (broken YAML, an alias, too deep, too large, no mapping) is kept as `{"text": block}`, cut to TEXT_MAX
    bytes; so are the mapping's texts, all together.
    """
    if len(block) <= YAML_MAX:
        for text in dict.fromkeys((block, _NO_TEXT.sub("\ufffd", block))):
            with suppress(_Unreadable, yaml.YAMLError):
                value = _Builder(text, TEXT_MAX).document()
                if isinstance(value, dict):
                    return value
    return {"text": clip(block, TEXT_MAX)}


def bounded(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object made small: its texts cut as those of a block, FIELDS_MAX values, no deeper than DEPTH_MAX."""
    room, left = TEXT_MAX, FIELDS_MAX

    def cut(value: Any, depth: int) -> Any:
        nonlocal room, left
        left -= 1
        if isinstance(value, str):
            kept = clip(value, max(room, 256))
            room -= len(kept.encode("utf-8", "replace"))
            return kept
        if isinstance(value, list) and depth < DEPTH_MAX:
            return [cut(item, depth + 1) for item in value if left > 0]
        if isinstance(value, dict) and depth < DEPTH_MAX:
            return {clip(key, 256): cut(item, depth + 1) for key, item in value.items() if left > 0}
        return value if isinstance(value, int | float | None) else clip(repr(value), 256)

    return {clip(key, 256): cut(value, 0) for key, value in fields.items() if left > 0}
