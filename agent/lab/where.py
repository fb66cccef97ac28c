"""The `where` of Mimir's queries: {prop: value} or {prop: {operator: value}}, all of which must hold. Pure.

A missing prop is null. Numbers compare with numbers and text with text; other pairs are neither less nor greater.

Source: protocols/emissary.md, "Mimir".
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from agent.core.errors import ActionError

MAX_TERMS = 32


class Term(NamedTuple):
    """One condition."""

    prop: str
    holds: Callable[[Any, Any], bool]
    value: Any


Where = tuple[Term, ...]


def parse(where: Mapping[str, Any]) -> Where:
    """The conditions. Raises ActionError `bad_payload` for an unknown operator or a value it does not take."""
    terms: list[Term] = []
    for prop, wanted in where.items():
        named = wanted if isinstance(wanted, dict) else {"eq": wanted}
        if not named:
            raise ActionError("bad_payload", f"key where.{prop}: no operator; {_known()} are known")
        for name, value in named.items():
            if name not in OPERATORS:
                raise ActionError("bad_payload", f"key where.{prop}.{name}: no such operator; {_known()} are known")
            if name == "in" and not isinstance(value, list):
                raise ActionError("bad_payload", f"key where.{prop}.in: expected a list")
            if name == "prefix" and not isinstance(value, str):
                raise ActionError("bad_payload", f"key where.{prop}.prefix: expected text")
            terms.append(Term(prop, OPERATORS[name], value))
    if len(terms) > MAX_TERMS:
        raise ActionError("too_big", f"{len(terms)} conditions in where; at most {MAX_TERMS} are allowed")
    return tuple(terms)


def matches(where: Where, props: Mapping[str, Any]) -> bool:
    """Do all conditions hold?"""
    return all(term.holds(props.get(term.prop), term.value) for term in where)


def _equal(stored: Any, value: Any) -> bool:
    return isinstance(stored, bool) == isinstance(value, bool) and bool(stored == value)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def holds(stored: Any, value: Any) -> bool:
        return _rank(stored) == _rank(value) != "" and compare(stored, value)

    return holds


def _rank(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else ""


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": _equal,
    "ne": lambda stored, value: not _equal(stored, value),
    "lt": _ordered(lambda stored, value: bool(stored < value)),
    "le": _ordered(lambda stored, value: bool(stored <= value)),
    "gt": _ordered(lambda stored, value: bool(stored > value)),
    "ge": _ordered(lambda stored, value: bool(stored >= value)),
    "in": lambda stored, value: any(_equal(stored, one) for one in value),
    "prefix": lambda stored, value: isinstance(stored, str) and stored.startswith(value),
}


def _known() -> str:
    return " ".join(OPERATORS)
