"""Reports of V8. tests/data/coverage/v8 has two of one process, as Node 20 wrote them, without most of its own."""

import json
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.coverage.javascript import Script, script
from agent.coverage.v8profile import (
    Loaded,
    NotAProfile,
    Transformed,
    covered,
    file_of,
    is_test,
    loaded,
    session_data,
)
from tests import no_json

DATA = Path(__file__).parent / "data/coverage/v8"
QUEUE = script((DATA / "queue.mjs").read_bytes(), "queue.mjs", "/product/queue.mjs")


def of_queue(report: bytes) -> Loaded:
    (found,) = (each for each in loaded(report) if file_of(each.url) == "/product/queue.mjs")
    return found


def functions(*ranges: list[tuple[int, int, int]], name: str = "f") -> Loaded:
    """One script whose functions have these ranges."""
    told = [
        {
            "functionName": name,
            "ranges": [{"startOffset": start, "endOffset": end, "count": count} for start, end, count in of_one],
        }
        for of_one in ranges
    ]
    return Loaded("file:///a.js", msgspec.Raw(json.dumps(told).encode()))


def lines(bits: int, of: Script) -> dict[str, list[int]]:
    """The lines of each method's covered probes, of the methods that have any."""
    unit = of.unit
    found = {m.name: [unit.lines[probe] for probe in m.probes if bits >> probe & 1] for m in unit.methods}
    return {name: of_method for name, of_method in found.items() if of_method}


def test_a_report_tells_what_was_run_since_the_last() -> None:
    first, second = (covered(of_queue((DATA / f"report{n}.json").read_bytes()), QUEUE) for n in (1, 2))
    assert lines(first, QUEUE) == {
        "GLOBAL": [3, 5, 7, 8, 9, 11, 16, 33, 42, 44],
        "push": [11, 12, 13],
        "drain": [16, 17, 18, 19, 20, 21, 24, 27],
        "shout": [42],
    }
    # The module and the loop's function began before: count 0, with blocks in them that went on.
    assert lines(second, QUEUE) == {
        "sleep": [5],
        "<anonymous>": [5],
        "drain": [18, 19, 22, 24, 27, 30],
        "shout": [42],
    }
    assert set(lines(first | second, QUEUE)) == {"GLOBAL", "push", "drain", "sleep", "<anonymous>", "shout"}


SMALL = script(b"function f() {\n  a();\n  b();\n}\n", "a.js", "/a.js")  # probes: entry, lines 2 and 3


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (functions([(0, 30, 1)]), 0b111),
        (functions([(0, 30, 0)]), 0),
        (functions(), 0),
        (functions([]), 0),
        (functions([(0, 30, 1), (21, 30, 0)]), 0b011),
        (functions([(0, 30, 0), (21, 30, 7)]), 0b100),
        (functions([(0, 30, 1), (15, 29, 0), (22, 28, 1)]), 0b101),
        # a range that does not hold the whole line says nothing of it
        (functions([(0, 30, 1), (17, 20, 0)]), 0b111),
        # of equal ranges the later is the inner
        (functions([(0, 30, 1)], [(0, 30, 0)]), 0),
        (functions([(0, 30, 0)], [(0, 30, 1)]), 0b111),
        # apart and out of order
        (functions([(21, 30, 1)], [(14, 21, 1)]), 0b110),
    ],
)
def test_a_probe_counts_what_the_innermost_range_around_it_does(told: Loaded, expected: int) -> None:
    assert covered(told, SMALL) == expected


@pytest.mark.parametrize(
    "told",
    [functions([(0, 99, 1)]), functions([(0, 30, 1)], name=""), functions([(-1, 30, 1)]), functions([(9, 2, 1)])],
)
def test_another_text_than_the_files_is_refused(told: Loaded) -> None:
    with pytest.raises(Transformed, match=r"^/a.js: what Node ran has another length"):
        covered(told, SMALL)


@given(st.lists(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31), st.integers(0, 2)), max_size=4), max_size=6))
def test_the_sweep_finds_what_a_look_at_all_ranges_finds(told: list[list[tuple[int, int, int]]]) -> None:
    told = [[(min(r[:2]), max(r[:2]), r[2]) for r in of_one] for of_one in told]
    try:
        bits = covered(functions(*told), SMALL)
    except Transformed:
        return
    ranges = sorted(((start, -end, count) for of_one in told for start, end, count in of_one), key=lambda r: r[:2])
    for start, end, probe in SMALL.anchors:
        around = [count for range_start, minus_end, count in ranges if range_start <= start and -minus_end >= end]
        assert bool(bits >> probe & 1) == bool(around and around[-1] > 0)


@given(st.integers(0, (DATA / "report1.json").stat().st_size - 1))
def test_half_a_report_is_no_report(length: int) -> None:
    with pytest.raises(NotAProfile, match="not a V8 profile"):
        loaded((DATA / "report1.json").read_bytes()[:length])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["result", "url", "functions", "ranges", "functionName", "coverage"]), inner)
    ),
)


@given(
    st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | no_json.objects("result", "coverage", "testId")
)
def test_any_bytes_are_a_profile_or_refused(data: bytes) -> None:
    with suppress(NotAProfile, Transformed):
        for each in loaded(data):
            file_of(each.url)
            covered(each, QUEUE)
    with suppress(NotAProfile):
        session_data(data.decode("utf-8", "surrogateescape"))


@given(
    JSON.map(lambda value: json.dumps(value).encode())
    | no_json.objects("functionName", "ranges").map(lambda one: b"[%b]" % one)
)
def test_any_functions_are_counted_or_refused(value: bytes) -> None:
    with suppress(NotAProfile, Transformed):
        covered(Loaded("file:///a.js", msgspec.Raw(value)), SMALL)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("file:///p/a.js", "/p/a.js"),
        ("file:///p/a%20b%23.js?v=2#x", "/p/a b#.js"),
        ("file:///p/%C3%A4.js", "/p/ä.js"),
        ("node:fs", None),
        ("", None),
        ("file://host/p/a.js", None),
        ("file:///p/%00.js", None),
        ("evalmachine.<anonymous>", None),
        ("https://host/a.js", None),
    ],
)
def test_a_files_address_is_its_path(url: str, file: str | None) -> None:
    assert file_of(url) == file


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("test.js", True),
        ("src/t3.test.mjs", True),
        ("src/a.spec.cjs", True),
        ("test-login.js", True),
        ("login-test.js", True),
        ("login_test.js", True),
        ("test/login.js", True),
        ("a/tests/deep/login.js", True),
        ("src/__tests__/login.js", True),
        ("src/login.js", False),
        ("src/contest.js", False),
        ("src/testing.js", False),
        ("test/_shared.js", False),
        ("test/helpers/login.js", False),
        ("src/__tests__/__fixtures__/a.js", False),
        ("node_modules/ava/lib/test.js", False),
    ],
)
def test_test_files_are_known_as_runners_know_them(path: str, expected: bool) -> None:
    assert is_test(path) is expected


def test_session_data_is_a_test_and_a_profile() -> None:
    coverage = json.loads((DATA / "report2.json").read_bytes())
    test, scripts = session_data(json.dumps({"testId": "t-1", "coverage": coverage, "scripts": [{"url": "x"}]}))
    assert test == "t-1"
    assert [each.url for each in scripts] == ["file:///product/queue.mjs"]
    assert session_data('{"coverage":{"result":[]},"testId":null}') == ("", [])
    as_text = json.dumps({"testId": "t-1", "coverage": json.dumps(coverage), "scripts": "[]"})
    assert [each.url for each in session_data(as_text)[1]] == [each.url for each in scripts]


@pytest.mark.parametrize("data", ["", "{}", "[]", '{"coverage":[]}', '{"coverage":{"result":1}}', "\ud800"])
def test_session_data_without_a_profile_is_refused(data: str) -> None:
    with pytest.raises(NotAProfile):
        session_data(data)
