"""A payload that does not fit is answered with the key that does not."""

from typing import Any, Literal

import msgspec
import pytest

from agent.core.errors import ActionError
from agent.core.payload import read


class Item(msgspec.Struct, frozen=True):
    since: float


class Payload(msgspec.Struct, frozen=True):
    ident: str
    items: tuple[Item, ...] = ()
    by_name: dict[str, int] = {}
    fruit: Literal["pear", "plum"] | None = None
    baskets: dict[str, list[Literal["fig", 1]]] = {}
    place: Literal["end", "start"] | int = 0


def test_unknown_fields_are_ignored() -> None:
    assert read({"ident": "lab-07", "new": 1, "items": [{"since": 2}]}, Payload) == Payload("lab-07", (Item(2.0),))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({}, "bad_payload: key ident is missing"),
        ({"ident": "a", "items": [{"since": 1}, {}]}, "bad_payload: key items[1].since is missing"),
        ({"ident": 7}, "bad_payload: key ident: Expected `str`, got `int`"),
        ({"ident": "a", "items": [{"since": "x"}]}, "bad_payload: key items[0].since: Expected `float`, got `str`"),
        ({"ident": "a", "by_name": {"x": "y"}}, "bad_payload: key by_name[...]: Expected `int`, got `str`"),
        (
            {"ident": "a", "fruit": "nut"},
            "bad_payload: key fruit: Invalid enum value 'nut', expected one of pear, plum",
        ),
        (
            {"ident": "a", "fruit": "n" * 1000},
            f"bad_payload: key fruit: Invalid enum value '{'n' * 280}..., expected one of pear, plum",
        ),
        (
            {"ident": "a", "baskets": {"x": ["fig", "fog"]}},
            "bad_payload: key baskets[...][1]: Invalid enum value 'fog', expected one of 1, fig",
        ),
        (
            {"ident": "a", "place": "middle"},
            "bad_payload: key place: Invalid enum value 'middle', expected one of end, start, a number",
        ),
    ],
)
def test_what_does_not_fit_is_named(payload: dict[str, Any], reason: str) -> None:
    with pytest.raises(ActionError) as refused:
        read(payload, Payload)
    assert refused.value.reason == reason
