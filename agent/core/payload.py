"""A request's payload as a struct, or the error answer that says which key does not fit.

Source: protocols/emissary.md, "The envelope" ("payload fields").
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from agent.core.errors import ActionError

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `(\w+)`")
_WHERE = re.compile(r"^(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?$", re.DOTALL)


def read(payload: Mapping[str, Any], kind: type[T]) -> T:
    """The payload as `kind`; unknown fields are ignored.

    Raises ActionError `bad_payload`: "key ident is missing", or "key runs[0].since: Expected `float`, got `str`".
    """
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as err:
        raise ActionError("bad_payload", _say(str(err))) from err


def _say(text: str) -> str:
    found = _WHERE.match(text)
    what, where = (found[1], found[2] or "") if found else (text, "")
    if missing := _MISSING.match(what):
        return f"key {where}{'.' if where else ''}{missing[1]} is missing"
    return f"key {where}: {what}" if where else what
