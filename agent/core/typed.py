"""Plain data against a type: the value as a msgspec struct holds it, or every reason why not, in words, with its line.

msgspec stops at the first error and speaks of JSON types; who wrote a file wants them all, each at its line, and what
to write instead. Serves config.py, which says what a settings struct may be made of.

Source: protocols/packaging.md 6.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import inspect

from agent.core import toml
from agent.core.errors import ConfigError

BYTES = {"unit": "bytes"}  # the `extra` of a Meta: the number may be written "16MiB"

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "": 1}
_SUGGESTIONS = (
    100  # per source; the nearest key takes a millisecond to find, and nonsense has thousands of unknown ones
)
_Number = inspect.IntType | inspect.FloatType
_Row = inspect.ListType | inspect.VarTupleType


class Source:
    """Where values come from (a file, a variable, a flag, a profile) and all that is wrong there."""

    def __init__(self, name: str, document: toml.Document | None = None) -> None:
        self.name, self.document = name.encode(errors="backslashreplace").decode(), document
        self.errors: list[ConfigError] = []


class Place(NamedTuple):
    """A value in its source: `at` is the way through the document, `names` that for people, entries by their names."""

    source: Source
    at: toml.At = ()
    names: tuple[str, ...] = ()

    def inner(self, step: str | int, name: str = "") -> "Place":
        return Place(self.source, (*self.at, step), (*self.names, name or toml.name(step)))

    @property
    def line(self) -> int:
        """0 where the source has no lines."""
        return self.source.document.line(self.at) if self.source.document else 0

    @property
    def origin(self) -> str:
        return f"{self.source.name}:{self.line}" if self.line else self.source.name

    def no(self, what: str, remedy: str) -> None:
        key = toml.joined(self.names)[: toml.MAX_SHOWN]
        self.source.errors.append(ConfigError(self.source.name, self.line, key, what, remedy=remedy))


def fits(kind: inspect.Type, value: object) -> bool:
    trial = Source("")
    convert(kind, value, Place(trial))
    return not trial.errors


def convert(kind: inspect.Type, value: Any, place: Place) -> Any:
    """The value as a field of `kind` holds it. What does not fit goes to the source's errors, and None comes back."""
    described, core = unwrapped(kind)
    hint = f"Use {described}." if described else _hint(kind)
    if what := _unusable(value):
        return place.no(what, hint)
    match core:
        case inspect.UnionType():
            return _either(core, value, place, hint)
        case inspect.LiteralType() | inspect.EnumType():
            return _member(core, value, place, hint)
        case inspect.AnyType():
            return _any(core, value, place)
        case inspect.StructType() if isinstance(value, dict):
            return _struct(core, value, place)
        case inspect.DictType() if isinstance(value, dict):
            pairs = [(convert(core.key_type, k, place.inner(k)), k, v) for k, v in value.items()]
            return {name: convert(core.value_type, v, place.inner(k)) for name, k, v in pairs}
        case inspect.ListType() | inspect.VarTupleType() if isinstance(value, list | tuple):
            items = [convert(core.item_type, item, place.inner(i)) for i, item in enumerate(value)]
            return row(core, items) if _has_length(core, value, "entries", place, described) else None
        case inspect.BoolType() if isinstance(value, bool):
            return value
        case inspect.IntType() if isinstance(value, float):
            return place.no(f"expected a whole number, got {_got(value, place)}", hint)
        case inspect.IntType() if is_size(kind) and (size := _size(value)) is not None:
            return _within(core, size, size_text, place, hint)
        case inspect.IntType() if isinstance(value, int) and not isinstance(value, bool):
            return _within(core, value, str, place, hint)
        case inspect.FloatType() if isinstance(value, int | float) and not isinstance(value, bool):
            return _within(core, float(value), _digits, place, hint)
        case inspect.StrType() if isinstance(value, str):
            if core.pattern is None or re.search(core.pattern, value):
                return value if _has_length(core, value, "characters", place, described) else None
            remedy = hint if described else f"Use text that matches {core.pattern}."
            return place.no(f"{_got(value, place)} does not fit", remedy)
        case inspect.CustomType() if core.cls is Path and isinstance(value, str) and "\0" not in value:
            return Path(value)
        case _:
            return place.no(f"expected {_or(_choices(kind))}, got {_got(value, place)}", hint)


def made(kind: inspect.StructType, values: dict[str, Any], place: Place, keys: Mapping[str, Place]) -> Any:
    """The struct; what its __post_init__ says ("What is wrong. What to do.") goes to the source's errors.

    When it begins with one of the `keys` that were given ("url: What ..."), to that key's place, else to the table's.
    """
    try:
        return kind.cls(**values)
    except ValueError as err:
        key, _, text = str(err).partition(": ")
        if key not in keys:
            key, text = "", str(err)
        what, _, remedy = text.partition(". ")
        return keys.get(key, place).no(what.removesuffix("."), remedy or "Correct one of its keys.")


def missing(field: inspect.Field, place: Place) -> None:
    """Say that the table at `place` lacks a required key."""
    place.inner(field.encode_name).no("is missing", f"Add it: {_or(_choices(field.type))}.")


def unknown(name: str, known: Sequence[str], place: Place, elsewhere: Iterable[str] = ()) -> None:
    """Say that the table at `place` has no such key: the nearest of `known`, else the one of that name `elsewhere`."""
    near = nearest(name, known, place.source)
    if near:
        near = toml.joined((*place.names, toml.name(near)))
    elif len(place.source.errors) < _SUGGESTIONS:
        near = next((key for key in elsewhere if key.rpartition(".")[2] == name), None)
    remedy = f"Did you mean {near}?" if near else f"Known here: {', '.join(known)}."
    place.inner(name).no("unknown key", remedy)


def nearest(text: str, known: Sequence[str], source: Source) -> str | None:
    """What was probably meant; None after many errors, since it takes its time."""
    if len(source.errors) >= _SUGGESTIONS:
        return None
    return next(iter(difflib.get_close_matches(text[:64], known, 1, 0.7)), None)


def row(kind: _Row, items: Iterable[Any]) -> Any:
    """The items in the field's own container."""
    return list(items) if isinstance(kind, inspect.ListType) else tuple(items)


def unwrapped(kind: inspect.Type) -> tuple[str, inspect.Type]:
    """The description of its Meta, or "", and the type in it."""
    described = ""
    while isinstance(kind, inspect.Metadata):
        described = described or str((kind.extra_json_schema or {}).get("description", ""))
        kind = kind.type
    return described, kind


def without_none(kind: inspect.UnionType) -> list[inspect.Type]:
    """The members that a file can mean: TOML has no null."""
    return [member for member in kind.types if not isinstance(member, inspect.NoneType)]


def is_size(kind: inspect.Type) -> bool:
    """Is it a number of bytes?"""
    if isinstance(kind, inspect.UnionType):
        return any(map(is_size, kind.types))
    return isinstance(kind, inspect.Metadata) and (kind.extra == BYTES or is_size(kind.type))


def size_text(size: int) -> str:
    """A size as a person writes it: "16MiB", "1500"."""
    unit = next(unit for unit, factor in _UNITS.items() if size % factor == 0)
    return f"{size // _UNITS[unit]}{unit}" if size else "0"


def masked(names: Sequence[str], value: Any) -> Any:
    """The value at `names`, with "***" for what is secret in it: tokens and passwords that were written out."""
    match value:
        case dict():
            return {name: masked((*names, name), inner) for name, inner in value.items()}
        case list() | tuple():
            return [masked(names, item) for item in value]
        case str() if value and not _is_secret(names):
            return re.sub(r"(://[^/@\s:]*:)[^/@\s]+@", r"\1***@", value)  # https://user:password@proxy
        case None | "" | bool():
            return value
        case _:
            return "***" if _is_secret(names) else value


def _is_secret(names: Sequence[str]) -> bool:
    """By the last name; in a table or list of `tokens` all is secret that does not say where, what for and whose.

    All `headers` of a request are: by any of them a proxy may let us in.
    """
    *outer, name = [name.strip('"').lower() for name in names if not name.startswith("[")] or [""]
    if name in ("token", "tokens", "password", "secret") or name.endswith(("_token", "_password", "_secret")):
        return True
    if "headers" in outer:
        return True
    return "tokens" in outer and name not in ("file", "scope", "name") and not name.endswith("_file")


def _unusable(value: object) -> str:
    """What TOML or the bytes of a variable can say and JSON cannot; "" if it can."""
    match value:
        case int() if not -(2**63) <= value < 2**63:
            return "the number does not fit 64 bits"
        case float() if not math.isfinite(value):
            return f"{value} is not a finite number"
        case str() if value != value.encode(errors="replace").decode():
            return "the text is not UTF-8"
        case _:
            return ""


def _any(kind: inspect.AnyType, value: Any, place: Place) -> Any:
    if isinstance(value, dict):
        return {name: convert(kind, inner, place.inner(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [convert(kind, item, place.inner(i)) for i, item in enumerate(value)]
    return value


def _either(kind: inspect.UnionType, value: object, place: Place, hint: str) -> Any:
    members = without_none(kind)
    close = [member for member in members if len(members) == 1 or type(value) in _shapes(member)]
    for member in close:
        if fits(member, value):
            return convert(member, value, place)
    if len(close) == 1 and not isinstance(unwrapped(close[0])[1], inspect.LiteralType | inspect.EnumType):
        return convert(close[0], value, place)  # it can only be this one, which says better what is wrong
    return place.no(f"expected {_or(_choices(kind))}, got {_got(value, place)}", hint)


def _member(kind: inspect.LiteralType | inspect.EnumType, value: object, place: Place, hint: str) -> Any:
    members = _members(kind)
    for written, member in members:
        if type(written) is type(value) and written == value:
            return member
    words = [written for written, _ in members if isinstance(written, str)]
    if isinstance(value, str) and (near := nearest(value, words, place.source)):
        hint = f"Did you mean {toml.quoted(near)}?"
    return place.no(f"expected {_or(_choices(kind))}, got {_got(value, place)}", hint)


def _struct(kind: inspect.StructType, table: dict[str, Any], place: Place) -> Any:
    known, values, before = [field.encode_name for field in kind.fields], {}, len(place.source.errors)
    for name in table:
        if name not in known:
            unknown(name, known, place)
    for field in kind.fields:
        if field.encode_name in table:
            values[field.name] = convert(field.type, table[field.encode_name], place.inner(field.encode_name))
        elif field.required:
            missing(field, place)
    keys = {name: place.inner(name) for name in table}
    return made(kind, values, place, keys) if len(place.source.errors) == before else None


def _within(kind: _Number, number: Any, show: Callable[[Any], str], place: Place, hint: str) -> Any:
    for bound, holds, word in (
        (kind.ge, operator.ge, "is less than"),
        (kind.gt, operator.gt, "is not above"),
        (kind.le, operator.le, "is more than"),
        (kind.lt, operator.lt, "is not below"),
    ):
        if bound is not None and not holds(number, bound):
            return place.no(f"{show(number)} {word} {show(bound)}", hint)
    return number


def _has_length(kind: inspect.StrType | _Row, value: Sized, unit: str, place: Place, described: str) -> bool:
    least, most, there = kind.min_length, kind.max_length, len(value)
    if least is not None and there < least:
        place.no(f"has {there} {unit}, less than {least}", f"Use {described or f'at least {least}'}.")
        return False
    if most is not None and there > most:
        place.no(f"has {there} {unit}, more than {most}", f"Use {described or f'at most {most}'}.")
        return False
    return True


def _size(value: object) -> int | None:
    found = re.fullmatch(r"([0-9]{1,9}) ?([KMG]iB|)", value) if isinstance(value, str) else None
    return int(found[1]) * _UNITS[found[2]] if found else None


def _members(kind: inspect.LiteralType | inspect.EnumType) -> list[tuple[object, object]]:
    """Each as it is written, and as it is held."""
    if isinstance(kind, inspect.EnumType):
        return [(member.value, member) for member in kind.cls]
    return [(value, value) for value in kind.values]


def _shapes(kind: inspect.Type) -> tuple[type, ...]:
    """The types of plain data that may be meant for it."""
    match unwrapped(kind)[1]:
        case inspect.BoolType():
            return (bool,)
        case inspect.IntType():
            return (int, str) if is_size(kind) else (int,)
        case inspect.FloatType():
            return (int, float)
        case inspect.StrType() | inspect.CustomType():
            return (str,)
        case inspect.LiteralType() | inspect.EnumType() as core:
            return tuple(type(written) for written, _ in _members(core))
        case inspect.ListType() | inspect.VarTupleType():
            return (list, tuple)
        case _:
            return (dict,)


def _choices(kind: inspect.Type) -> list[str]:
    """What is expected, as nouns."""
    match unwrapped(kind)[1]:
        case inspect.UnionType() as core:
            return [choice for member in without_none(core) for choice in _choices(member)]
        case inspect.BoolType():
            return ["true", "false"]
        case inspect.IntType():
            return ["a size" if is_size(kind) else "a number"]
        case inspect.FloatType():
            return ["a number"]
        case inspect.StrType():
            return ["text"]
        case inspect.LiteralType() | inspect.EnumType() as core:
            return [toml.quoted(written) if isinstance(written, str) else str(written) for written, _ in _members(core)]
        case inspect.ListType() | inspect.VarTupleType():
            return ["a list"]
        case inspect.StructType() | inspect.DictType():
            return ["a table"]
        case inspect.AnyType():
            return ["anything"]
        case inspect.CustomType(cls=cls) if cls is Path:
            return ["a path"]
        case core:
            raise TypeError(f"a setting cannot be of type {core}")


def _hint(kind: inspect.Type) -> str:
    """What to write, where no description says it."""
    match unwrapped(kind)[1]:
        case inspect.IntType() as core if is_size(kind):
            return f"Use a size{_range(core, size_text) or ', such as 16MiB in quotes'}."
        case inspect.IntType() as core:
            return f"Use a number{_range(core, str)}."
        case inspect.FloatType() as core:
            return f"Use a number{_range(core, _digits)}."
        case inspect.StrType() | inspect.CustomType():
            return "Write it in quotes."
        case inspect.BoolType():
            return "Write true or false without quotes."
        case inspect.ListType() | inspect.VarTupleType():
            return "Write it in [ ]."
        case inspect.AnyType():
            return "Use another value."
        case inspect.StructType() | inspect.DictType():
            return "Write it as { key = value } or below a [table] header."
        case _:
            return f"Use {_or(_choices(kind))}."


def _range(kind: _Number, show: Callable[[Any], str]) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {show(kind.ge)} to {show(kind.le)}"
    bounds = {"at least": kind.ge, "above": kind.gt, "at most": kind.le, "below": kind.lt}
    words = [f"{word} {show(bound)}" for word, bound in bounds.items() if bound is not None]
    return f" that is {' and '.join(words)}" if words else ""


def _digits(number: float) -> str:
    return f"{number:.15g}"


def _or(choices: Sequence[str]) -> str:
    *most, last = dict.fromkeys(choices)
    return f"{', '.join(most)} or {last}" if most else last


def _got(value: object, place: Place) -> str:
    """The value as it was written; of secrets only what kind of value it is."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number" if _is_secret(place.names) else f"the number {value}"
        case str():
            if masked(place.names, value) != value:
                return "text"
            return f"text {toml.quoted(value if len(value) <= 60 else value[:60] + '...')}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a table"
        case None:
            return "null"
        case _:
            return "a date or time"
