"""agent/suites/runners/diagnostics.py: the YAML block of a TAP line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.suites.runners import diagnostics
from agent.suites.runners.driver import TEXT_MAX, YAML_MAX


def test_a_block_becomes_plain_values() -> None:
    block = (
        "name: AssertionError\nmessage: |-\n  two\n  lines\nduration_ms: 1.5\nn: -3\nno: ~\nyes: true\nat: ['a:1', '2']"
    )
    assert diagnostics.read(block) == {
        "name": "AssertionError",
        "message": "two\nlines",
        "duration_ms": 1.5,
        "n": -3,
        "no": None,
        "yes": True,
        "at": ["a:1", "2"],
    }


@pytest.mark.parametrize(
    "block",
    [
        "a: &x [1]\nb: *x",  # an alias
        "a: [",
        "just words",
        "- a\n- b",
        "? [a]\n: b",
        "- " * 5000 + "x",
        "[" * 5000,
        "a: " + "[" * 40 + "]" * 40,
        "a: [" + "1," * 30_000 + "]",
        "",
    ],
)
def test_what_is_no_mapping_that_we_take_is_kept_as_text(block: str) -> None:
    assert diagnostics.read(block) == {"text": block}


def test_one_character_that_yaml_cannot_hold_hides_nothing_else() -> None:
    """js-yaml writes half a surrogate pair so; Node's own runner writes control characters as they are."""
    assert diagnostics.read('message: "half \\uD83D of it"\ncode: E1') == {"message": "half \ufffd of it", "code": "E1"}
    assert diagnostics.read("duration_ms: 2\nerror: 'a bell\x07'") == {"duration_ms": 2, "error": "a bell\ufffd"}
    assert diagnostics.read(r"a: it says \ud83d") == {"a": r"it says \ud83d"}


def test_no_tag_makes_an_object() -> None:
    assert diagnostics.read("a: !!python/object/apply:os.getcwd []\nb: !!timestamp 2026-01-01\nc: !!binary aGk=") == {
        "a": [],
        "b": "2026-01-01",
        "c": "aGk=",
    }


def test_odd_numbers_stay_text() -> None:
    assert diagnostics.read("a: 1:30\nb: 0x10\nc: .nan\nd: " + "9" * 5000 + "\ne: 2026-01-01") == {
        "a": "1:30",
        "b": "0x10",
        "c": ".nan",
        "d": "9" * 5000,
        "e": "2026-01-01",
    }


def test_a_large_text_is_cut_and_what_is_small_stays() -> None:
    got = diagnostics.read(f"details: {'é' * (YAML_MAX // 4)}\nmessage: short\n")
    assert len(got["details"].encode()) <= TEXT_MAX
    assert got["details"].endswith("(cut)")
    assert got["message"] == "short"


def test_a_block_beyond_the_limit_is_text_and_cut() -> None:
    got = diagnostics.read("a: " + "x" * YAML_MAX)
    assert list(got) == ["text"]
    assert len(got["text"].encode()) <= TEXT_MAX


@given(st.text(max_size=200) | st.text("ab:-[]{}&*!|>'\"\n #?,", max_size=60))
def test_any_text_gives_something_that_is_json(block: str) -> None:
    json.dumps(diagnostics.read(block), allow_nan=False)


def test_an_object_is_bounded_as_a_block_is() -> None:
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    large = {"a": "y" * 100_000, "b": {"c": 1, "d": None}, "deep": deep, "many": ["z" * 999] * 100_000}
    got = diagnostics.bounded(large)
    assert got["a"].endswith("(cut)")
    assert got["b"] == {"c": 1, "d": None}
    assert len(got["many"]) < 1000
    assert len(json.dumps(got)) < TEXT_MAX + 1000 * 300
    assert diagnostics.bounded({"small": [1, "a", True]}) == {"small": [1, "a", True]}
