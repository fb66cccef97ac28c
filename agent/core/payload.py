"""A request's payload as a struct, or the error answer that says which key does not fit.

Source: protocols/emissary.md, "The envelope" ("payload fields").
"""

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from agent.core.errors import ActionError

T = TypeVar("T")

# What msgspec raises where bytes or text are no JSON, or not the JSON that is expected: also for what is no UTF-8, and
# for a thousand brackets in each other.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeError, RecursionError)

MAX_NESTED: Final = 256  # what is decoded could be nested so deeply that it can be neither shown nor encoded again
MAX_SHOWN: Final = 300  # characters of what is said of a wrong value

_NESTS: Final = frozenset((dict, list))
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_STEP = re.compile(r"[^\W\d]\w*|\[")
_WHERE = re.compile(r"^(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?$", re.DOTALL)


def is_too_deep(text: str, tree: Any) -> bool:
    """Has the tree, decoded from that JSON, more than MAX_NESTED objects and lists in each other?"""
    if text.count("{") + text.count("[") <= MAX_NESTED:
        return False
    level = [tree]
    for _ in range(MAX_NESTED):
        within = (each.values() if type(each) is dict else each for each in level)
        level = [each for several in within for each in several if type(each) in _NESTS]
        if not level:
            return False
    return True


def read(payload: Mapping[str, Any], kind: type[T]) -> T:
    """The payload as `kind`; unknown fields are ignored.

    Raises ActionError `bad_payload`: "key ident is missing", "key runs[0].since: Expected `float`, got `str`", or "key
    policy: Invalid enum value 'x', expected one of drop_oldest, disconnect".
    """
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as err:
        raise ActionError("bad_payload", _say(str(err), kind)) from err


def _say(text: str, kind: type) -> str:
    found = _WHERE.match(text)
    what, where = (found[1], found[2] or "") if found else (text, "")
    if missing := _MISSING.match(what):
        return f"key {where}{'.' if where else ''}{missing[1]} is missing"
    if len(what) > MAX_SHOWN:  # it repeats a word that is none of those that may stand there
        what = f"{what[:MAX_SHOWN]}..."
    if where and what.startswith("Invalid enum value"):
        what += f", expected one of {', '.join(_words(inspect.type_info(kind), _STEP.findall(where)))}"
    return f"key {where}: {what}" if where else what


def _words(kind: inspect.Type, way: list[str]) -> list[str]:
    """The words that may stand there: `way` has names of fields, and "[" for what is in a list or an object."""
    match kind:
        case inspect.UnionType(types=kinds):
            return [word for one in kinds for word in _words(one, way)]
        case inspect.StructType(fields=fields) if way:
            return [word for field in fields if field.encode_name == way[0] for word in _words(field.type, way[1:])]
        case inspect.ListType() | inspect.VarTupleType() if way:
            return _words(kind.item_type, way[1:])
        case inspect.DictType() if way:
            return _words(kind.value_type, way[1:])
        case inspect.LiteralType(values=values) if not way:
            return [str(value) for value in values]
        case inspect.IntType() if not way:  # beside words
            return ["a number"]
        case _:
            return []
