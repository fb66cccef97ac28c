"""agent/suites/runners/driver.py: what all drivers share."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.suites.messages import Suite
from agent.suites.runners import ava, driver
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.driver import Cases, Driver, Launcher, clip, first_line, plain, title


def test_avas_drivers_have_the_form() -> None:
    suite = Suite(id="s", runner="ava")
    drivers: list[Driver] = [AvaTap(suite, "r"), AvaEvents(suite, "r")]
    assert [one.running() for one in drivers] == [None, None]
    launcher: Launcher = ava.launch
    launched = launcher(Suite(id="s", runner="ava", command=("x",)), Path("/p"), Path("/s"), "r")
    assert launched.argv[0] == "x"


def test_cases_are_unique() -> None:
    cases = Cases()
    given_out = [cases.case("a.js", "x"), cases.case(None, "x"), cases.case("a.js", "x"), cases.case(None, "a.js › x")]
    assert given_out == ["a.js › x", "x", "a.js › x#2", "a.js › x#3"]
    assert Cases(2).case("a.js", "x") == "a.js › x@2"
    assert cases.is_known("a.js", "x")
    assert not cases.is_known("a.js", "y")


@given(st.lists(st.sampled_from(["a", "a#2", "a#3", "a#2#2", "#2", "#", "a #1"]), max_size=12))
def test_a_name_that_looks_like_a_repetition_has_a_case_of_its_own(names: list[str]) -> None:
    cases = Cases()
    assert len({cases.case(None, name) for name in names}) == len(names)


def test_cases_beyond_what_is_remembered_are_unique_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CASES_MAX", 2)
    cases = Cases()
    assert [cases.case(None, name) for name in "abcacc"] == ["a", "b", "c#3", "a#2", "c#4", "c#5"]


@given(st.text(), st.integers(16, 64))
def test_clipped_text_fits_and_is_a_beginning(text: str, limit: int) -> None:
    got = clip(text, limit)
    assert len(got.encode("utf-8", "replace")) <= limit
    assert text.startswith(got.removesuffix("… (cut)"))
    if len(text.encode("utf-8", "replace")) <= limit:
        assert got == text


@given(st.binary())
def test_any_bytes_are_text(data: bytes) -> None:
    plain(data).encode()


def test_ansi_is_removed() -> None:
    wire = b"\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x1b\\ \x1b7end\xff"
    assert plain(wire) == "red link end\ufffd"


def test_titles_are_in_one_line() -> None:
    assert title(" \x1b[2ma\t b\n\u2028c ") == "a b c"
    assert len(title("é" * 5000).encode()) <= 1024


def test_the_first_line_that_says_something() -> None:
    assert first_line("\n  \n  said \nmore") == "said"
    assert first_line("  \n") is None
