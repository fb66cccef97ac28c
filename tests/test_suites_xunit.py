"""agent/suites/xunit.py: the document of the sheet, whatever the texts hold."""

import xml.etree.ElementTree as ET
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import Counts, SuiteFinished, TestFinished
from agent.suites import xunit
from agent.suites.messages import Polarion, Report, Suite

PLAIN = Suite(id="login", runner="ava")
FINISHED = SuiteFinished(
    run="lab7:1",
    suite="login",
    runner="ava",
    driver="tap",
    verdict="failed",
    result="FAILURE",
    code=1,
    signal=None,
    reason=None,
    started=1_795_294_800.0,  # 2026-11-21 21:00 UTC
    ended=1_795_294_804.2,
    counts=Counts(),
)


def record(name: str, state: str = "passed", **more: Any) -> TestFinished:
    fields = {"run": "lab7:1", "suite": "login", "case": name, "name": name, "file": None, "state": state, "ended": 2.0}
    return msgspec.convert(fields | more, TestFinished)


def written(*records: TestFinished, suite: Suite = PLAIN) -> bytes:
    return b"".join(xunit.document(suite, FINISHED, lambda: iter(records), hostname="lab7"))


def suite_of(*records: TestFinished, suite: Suite = PLAIN) -> ET.Element:
    found = ET.fromstring(written(*records, suite=suite)).find("testsuite")
    assert found is not None
    return found


def case_of(only: TestFinished, suite: Suite = PLAIN) -> ET.Element:
    found = suite_of(only, suite=suite).find("testcase")
    assert found is not None
    return found


def properties(element: ET.Element) -> dict[str, str]:
    return {each.attrib["name"]: each.attrib["value"] for each in element.iterfind("properties/property")}


def test_the_document_of_the_sheet() -> None:
    polarion = Polarion(project="RHEL9", cases={"refuses a wrong password": "RHEL9-51603"})
    suite = Suite(id="login", runner="ava", report=Report(polarion=polarion))
    refused = record("refuses a wrong password", "failed", file="test/login.js", duration=0.031, message="expected 401")
    assert written(refused, suite=suite).decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<testsuites><properties><property name="polarion-project-id" value="RHEL9"/>'
        '<property name="polarion-testrun-id" value="lab7_1"/>'
        '<property name="polarion-lookup-method" value="name"/></properties>\n'
        '<testsuite name="login" tests="1" failures="1" errors="0" skipped="0" time="4.200" '
        'timestamp="2026-11-21T21:00:00" hostname="lab7">\n'
        '<testcase classname="test/login.js" name="refuses a wrong password" time="0.031">'
        '<properties><property name="polarion-testcase-id" value="RHEL9-51603"/></properties>\n'
        '<failure type="failure" message="expected 401"></failure></testcase>\n'
        "</testsuite></testsuites>\n"
    )


@pytest.mark.parametrize(
    ("state", "message", "child"),
    [
        ("passed", None, None),
        ("failed", "no", ("failure", {"type": "failure", "message": "no"})),
        ("failed", None, ("failure", {"type": "failure"})),
        ("blocked", "hook", ("error", {"type": "error", "message": "hook"})),
        ("skipped", None, ("skipped", {"type": "skipped"})),
        ("skipped", "slow", ("skipped", {"type": "skipped", "message": "slow"})),
        ("todo", "later", ("skipped", {"type": "skipped", "message": "todo"})),
        ("aborted", "cancelled", ("error", {"type": "error", "message": "aborted: cancelled"})),
        ("aborted", "aborted: cancelled", ("error", {"type": "error", "message": "aborted: cancelled"})),
        ("lost", None, ("error", {"type": "error", "message": "lost"})),
    ],
)
def test_each_state_is_the_element_of_the_table(state: str, message: str | None, child: Any) -> None:
    case = case_of(record("a", state, message=message))
    assert [(each.tag, each.attrib) for each in case] == ([child] if child else [])


def test_every_record_is_a_case_and_the_sums_agree() -> None:
    suite = suite_of(
        record("a"),
        record("b", "failed"),
        record("c", "todo"),
        record("beforeEach hook", "blocked", kind="hook"),
        record("it fell over", "lost", kind="crash"),
        record("parent › (not reported)", "aborted", kind="rest", count=3),
        record("(not reported)", "blocked", kind="rest", count=1),
        record("(not reported)", "lost", kind="rest"),
    )
    sums = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert sums == {"tests": 8, "failures": 1, "errors": 5, "skipped": 1}
    assert [len(suite.findall(f"testcase{inner}")) for inner in ("", "/failure", "/error", "/skipped")] == [8, 1, 5, 1]
    assert [case.attrib["name"] for case in suite.iterfind("testcase")][5:] == [
        "parent › 3 tests not reported",
        "1 test not reported",
        "tests not reported",
    ]


def test_details_and_output_are_texts() -> None:
    case = case_of(
        record(
            "a",
            "failed",
            at="a.js:3",
            details={"expected": 2, "stack": "one\ntwo", "name": "Error"},
            log=["said"],
            output="printed\n",
            started=1.5,
        )
    )
    assert case.findtext("failure") == "at: a.js:3\nexpected: 2\nstack:\none\ntwo\nname: Error"
    assert case.findtext("system-out") == "said\nprinted"
    assert (case.attrib["classname"], case.attrib["time"]) == ("login", "0.500")


def test_a_later_attempt_has_the_id_of_its_case() -> None:
    suite = Suite(id="login", runner="ava", report=Report(polarion=Polarion(cases={"x.js › a": "P-1"})))
    root = ET.fromstring(written(record("a", file="x.js", case="x.js › a@2", attempt=2), suite=suite))
    assert [properties(case)["polarion-testcase-id"] for case in root.iter("testcase")] == ["P-1"]


def test_polarion_properties_stand_first() -> None:
    polarion = Polarion(
        title="Nightly",
        template="T1",
        lookup="custom",
        properties={"testrun-type-id": "regression", "dry-run": True, "custom-arch": "x86", "parameter-browser": "fox"},
        cases={"x.py › a": "P-1", "a": "P-2"},
    )
    suite = Suite(id="login", runner="pytest", report=Report(polarion=polarion))
    own = {"polarion-parameter-user": "root", "polarion-parameter-": "no", "polarion-project-id": "no", "x": 1}
    records = [
        record("a", file="x.py", case="x.py › a", message="as expected", details={"properties": own}),
        record("a", "failed", message="no"),
        record("b"),
        record("crash", "blocked", kind="crash"),
    ]
    root = ET.fromstring(written(*records, suite=suite))
    assert root[0].tag == "properties"
    assert properties(root) == {
        "polarion-testrun-id": "lab7_1",
        "polarion-lookup-method": "custom",
        "polarion-testrun-title": "Nightly",
        "polarion-testrun-template-id": "T1",
        "polarion-testrun-type-id": "regression",
        "polarion-dry-run": "true",
        "polarion-custom-arch": "x86",
    }
    everyone = {"polarion-parameter-browser": "fox"}
    assert [properties(case) for case in root.iter("testcase")] == [
        {"polarion-testcase-id": "P-1", "polarion-parameter-user": "root", "polarion-testcase-comment": "as expected"}
        | everyone,
        {"polarion-testcase-id": "P-2"} | everyone,
        {"polarion-testcase-id": "b"} | everyone,
        everyone,
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("]]> <a> & \"'", "]]> <a> & \"'"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("nul \x00 bell \x07 \ufffe esc \x1b", "nul \\x00 bell \\x07 \\ufffe esc \\x1b"),
        ("emoji 🦊, tab\t, end", "emoji 🦊, tab\t, end"),
        ("a\r\nb\rc\n\u2028", "a\r\nb\rc\n\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_hard_texts_survive_or_are_replaced(text: str, shown: str) -> None:
    case = case_of(record(text, "failed", message=text, details={"x": text}, output=text))
    failure = case.find("failure")
    assert failure is not None
    assert (case.attrib["name"], failure.attrib["message"], case.findtext("system-out")) == (shown, shown, shown)
    assert failure.text == (f"x:\n{shown}" if "\n" in text else f"x: {shown}")


def test_texts_are_bounded_and_the_cut_is_told() -> None:
    case = case_of(record("a", "failed", message="m" * 5000, details={"x": "é" * 70_000}, output="o" * 70_000))
    failure = case.find("failure")
    assert failure is not None
    assert len(failure.attrib["message"].encode()) <= 1024
    for text in (failure.text, case.findtext("system-out")):
        assert text is not None
        assert 65_000 < len(text.encode()) <= 65_536
        assert text.endswith("… (cut)")


@pytest.mark.parametrize(
    ("room", "output", "text", "message"),
    [(900, True, True, True), (650, False, True, True), (450, False, False, True)],
)
def test_beyond_the_limit_texts_go_first_and_never_a_test(
    monkeypatch: pytest.MonkeyPatch, room: int, output: bool, text: bool, message: bool
) -> None:
    monkeypatch.setattr(xunit, "DOCUMENT_MAX", room)
    only = record("a", "failed", message="m" * 50, details={"x": "t" * 200}, output="o" * 200)
    assert len(written(only)) <= room
    case = case_of(only)
    failure = case.find("failure")
    assert failure is not None
    assert (case.find("system-out") is not None, bool(failure.text), "message" in failure.attrib) == (
        output,
        text,
        message,
    )
    monkeypatch.setattr(xunit, "DOCUMENT_MAX", 10)
    assert case_of(only).find("failure") is not None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_beyond_the_limit_the_first_tests_keep_their_texts(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    records = [
        record(str(n), "failed", message="m" * 50, details={"x": "t" * 200}, output="o" * 200) for n in range(10)
    ]
    whole = len(written(*records))
    bare = len(written(*(record(str(n), "failed") for n in range(10))))
    room = bare + round(share * (whole - bare))
    monkeypatch.setattr(xunit, "DOCUMENT_MAX", room)
    assert room - 250 < len(written(*records)) <= room  # another text would not fit
    cases = suite_of(*records).findall("testcase")
    failures = [failure for case in cases if (failure := case.find("failure")) is not None]
    there = [
        ["message" in failure.attrib for failure in failures],
        [bool(failure.text) for failure in failures],
        [case.find("system-out") is not None for case in cases],
    ]
    assert [len(texts) for texts in there] == [10, 10, 10]
    assert all(texts == sorted(texts, reverse=True) for texts in there), "those of the first tests"
    messages, blocks, outputs = map(sum, there)
    assert messages == 10 or blocks == 0
    assert blocks == 10 or outputs == 0


TEXTS = st.text(max_size=30)


@given(TEXTS, st.sampled_from(["passed", "failed", "lost", "skipped"]), TEXTS, TEXTS, TEXTS)
def test_any_text_is_written_as_xml(name: str, state: str, message: str, detail: str, output: str) -> None:
    case = case_of(record(name, state, message=message, details={detail: detail}, output=output))
    assert case.attrib["name"] == xunit.clean(name)
