"""Mimir's conditions: each operator, types that do not compare, and what is no condition."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ActionError
from agent.lab.where import OPERATORS, matches, parse

PROPS = {"state": "lost", "code": 3, "ok": True, "labels": ["a"]}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ({}, True),
        ({"state": "lost"}, True),
        ({"state": "lost", "code": 4}, False),
        ({"code": 3.0}, True),
        ({"ok": 1}, False),
        ({"ok": True}, True),
        ({"labels": ["a"]}, True),
        ({"absent": None}, True),
        ({"state": None}, False),
        ({"state": {"eq": "lost", "ne": "done"}}, True),
        ({"state": {"ne": "lost"}}, False),
        ({"absent": {"ne": 1}}, True),
        ({"code": {"lt": 4, "ge": 3}}, True),
        ({"code": {"lt": 3}}, False),
        ({"code": {"le": 3}}, True),
        ({"code": {"gt": 3}}, False),
        ({"code": {"gt": 2}}, True),
        ({"code": {"ge": 4}}, False),
        ({"code": {"le": 2}}, False),
        ({"state": {"gt": "a"}}, True),
        ({"state": {"gt": 1}}, False),
        ({"code": {"lt": "9"}}, False),
        ({"ok": {"lt": 9}}, False),
        ({"absent": {"lt": 9}}, False),
        ({"state": {"in": ["done", "lost"]}}, True),
        ({"code": {"in": []}}, False),
        ({"state": {"prefix": "lo"}}, True),
        ({"code": {"prefix": "3"}}, False),
    ],
)
def test_all_conditions_must_hold(where: dict[str, Any], holds: bool) -> None:
    assert matches(parse(where), PROPS) is holds


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"state": {"like": "x"}}, "bad_payload: key where.state.like: no such operator; eq ne lt le gt ge in prefix"),
        ({"state": {}}, "bad_payload: key where.state: no operator; eq ne"),
        ({"state": {"in": "lost"}}, "bad_payload: key where.state.in: expected a list"),
        ({"state": {"prefix": 3}}, "bad_payload: key where.state.prefix: expected text"),
        ({str(n): n for n in range(33)}, "too_big: 33 conditions in where; at most 32 are allowed"),
    ],
)
def test_what_is_no_condition_is_named(where: dict[str, Any], reason: str) -> None:
    with pytest.raises(ActionError) as refused:
        parse(where)
    assert refused.value.reason.startswith(reason)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*OPERATORS, "x"]), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from("abc"), JSON), st.dictionaries(st.sampled_from("abc"), JSON))
def test_any_where_is_refused_by_name_or_answers(where: dict[str, Any], props: dict[str, Any]) -> None:
    try:
        terms = parse(where)
    except ActionError as err:
        assert err.reason.startswith("bad_payload: key where.")  # noqa: PT017 - either outcome is right
    else:
        assert matches(terms, props) in (True, False)
