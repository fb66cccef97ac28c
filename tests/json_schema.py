"""JSON Schema, as much of it as `agent schema` uses: says where a value does not fit."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from agent.schema import schema

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip
# What says nothing about a value.
SILENT = {"title", "description", "default", "contentEncoding", "$schema"}

BOUNDS = {
    *("properties", "required", "additionalProperties", "propertyNames", "items", "prefixItems", "pattern"),
    *("minimum", "exclusiveMinimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
}


@cache
def document() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(json.dumps(schema()))
    return whole


def faults(value: Any, *where: str) -> list[str]:
    """What of a value does not fit the schema at `where`, as ("events", "Alert")."""
    rule = document()
    for step in where:
        rule = rule[step]
    return list(_faults(value, rule, "$"))


def check_event(event: dict[str, Any]) -> None:
    found = faults(event, "events", event["kind"])
    assert not found, f"{found} in {json.dumps(event)[:2000]}"


def check_action(action: str, part: str, payload: Any) -> None:
    found = faults(payload, "actions", action, part)
    assert not found, f"{found} in the {part} of {action}: {json.dumps(payload)[:2000]}"


def check_frame(text: str) -> dict[str, Any]:
    """A frame of the control server, whatever it is: an answer, or events, each of which fits its kind."""
    message: dict[str, Any] = json.loads(text)
    if "rsp_id" in message:
        found = faults(message, "messages", "error" if message.get("result") == "error" else "success")
    else:
        events = message["payload"].pop("events")  # each by its own kind: to try all takes long
        found = faults(message | {"payload": message["payload"] | {"events": []}}, "messages", "events")
        for event in events:
            check_event(event)
        message["payload"]["events"] = events
    assert not found, f"{found} in {text[:2000]}"
    return message


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name]) or (name == "integer" and isinstance(value, float) and value.is_integer())


def _faults(value: Any, rule: dict[str, Any], at: str) -> Iterator[str]:
    for word, wanted in rule.items():
        match word:
            case "$ref":
                found: Any = document()
                for step in wanted.removeprefix("#/").split("/"):
                    found = found[step]
                yield from _faults(value, found, at)
            case "type":
                names = [wanted] if isinstance(wanted, str) else wanted
                if not any(_is(value, name) for name in names):
                    yield f"{at}: {value!r} is no {' or '.join(names)}"
            case "const" | "enum":
                if value not in ([wanted] if word == "const" else wanted):
                    yield f"{at}: {value!r} is not {wanted!r}"
            case "anyOf":
                if all(list(_faults(value, one, at)) for one in wanted):
                    yield f"{at}: {value!r} fits none of {len(wanted)}"
            case _:
                yield from _within(value, word, wanted, rule, at)


def _within(value: Any, word: str, wanted: Any, rule: dict[str, Any], at: str) -> Iterator[str]:
    match word, value:
        case "properties", dict():
            for name, inner in wanted.items():
                if name in value:
                    yield from _faults(value[name], inner, f"{at}.{name}")
        case "required", dict():
            yield from (f"{at}.{name} is missing" for name in wanted if name not in value)
        case "additionalProperties", dict():
            for name in value.keys() - rule.get("properties", {}).keys():
                yield from (_faults(value[name], wanted, f"{at}.{name}") if wanted else [f"{at}.{name} is too much"])
        case "propertyNames", dict():
            for name in value:
                yield from _faults(name, wanted, f"{at}.{name}")
        case "items", list() if wanted is not False:
            for n, item in enumerate(value[len(rule.get("prefixItems", ())) :]):
                yield from _faults(item, wanted, f"{at}[{n}]")
        case "prefixItems", list():
            for n, (item, inner) in enumerate(zip(value, wanted, strict=False)):
                yield from _faults(item, inner, f"{at}[{n}]")
        case "pattern", str():
            if not re.search(wanted, value):
                yield f"{at}: {value!r} does not match {wanted}"
        case (("minimum" | "exclusiveMinimum" | "maximum"), (int() | float())):
            low, high = rule.get("minimum", value), rule.get("maximum", value)
            if not low <= value <= high or value == rule.get("exclusiveMinimum"):
                yield f"{at}: {value!r} is out of its bounds"
        case (("minLength" | "maxLength"), str()):
            if not rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", len(value)):
                yield f"{at}: {len(value)} characters"
        case (("minItems" | "maxItems"), list()):
            if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
                yield f"{at}: {len(value)} items"
        case _:
            known = SILENT | BOUNDS
            assert word in known, f"{at}: this test does not know {word}"
