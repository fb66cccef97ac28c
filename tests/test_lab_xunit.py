"""What the lab's importer takes, and what it says of what it does not."""

import pytest

from agent.core.errors import DocumentError
from agent.core.events import State, TestFinished
from agent.lab.xunit import Case, Document, read
from agent.polarize.submit import prepare
from agent.suites.document import from_tree
from agent.suites.xunit import document as document_of
from tests.ended_run import finished

PROPERTIES = """<properties>
<property name="polarion-project-id" value="RHEL9"/><property name="polarion-lookup-method" value="name"/>
<property name="polarion-testrun-id" value="r-9"/><property name="polarion-response-emissary" value="lab.abc"/>
<property name="polarion-custom-arch" value="x86_64"/></properties>"""
CASES = """<testcase classname="a.js" name="one" time="0.1"><properties>
<property name="polarion-testcase-id" value="RHEL9-1"/></properties><system-out>x</system-out></testcase>
<testcase classname="a.js" name="two"><failure type="failure" message="m">t</failure></testcase>
<testcase classname="a.js" name="three"><error type="error"/></testcase>
<testcase classname="a.js" name="four"><skipped type="skipped"/></testcase>"""


def document(
    properties: str = PROPERTIES, cases: str = CASES, counts: str = 'tests="4" failures="1" errors="1" skipped="1"'
) -> bytes:
    suite = f'<testsuite name="login" {counts} time="4.2" timestamp="2026-11-21T21:00:00" hostname="lab7">'
    return f"<testsuites>{properties}{suite}{cases}</testsuite></testsuites>".encode()


def test_a_good_document_is_read() -> None:
    assert read(document()) == Document(
        project="RHEL9",
        testrun="r-9",
        response=("emissary", "lab.abc"),
        cases=(
            Case("one", "RHEL9-1", "Passed"),
            Case("two", "two", "Failed"),
            Case("three", "three", "Blocked"),
            Case("four", "four", "Waiting"),
        ),
    )


ONE = 'tests="1" failures="0" errors="0" skipped="0"'


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        (b"<html></html>", "its root is <html>"),
        (b"<testsuites>", "no XML"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><testsuites/>', "document type declaration"),
        (document(properties=""), "polarion-project-id is missing"),
        (document(PROPERTIES.replace('value="name"', 'value="guess"')), "polarion-lookup-method is 'guess'"),
        (document(PROPERTIES.replace('"r-9"', '"r.9"')), "has other characters"),
        (document(PROPERTIES.replace("response-emissary", "response-a-b")), "'polarion-response-a-b'"),
        (document(PROPERTIES.replace("response-emissary", "custom-x")), "0 properties polarion-response-NAME"),
        (document(PROPERTIES.replace("custom-arch", "flavour")), "'polarion-flavour'"),
        (document(PROPERTIES + "<properties/>"), "is not the first"),
        (document().replace(b"testsuite ", b"suite ").replace(b"</testsuite>", b"</suite>"), "<suite> in <testsuites>"),
        (document().split(b"<testsuite ")[0] + b"</testsuites>", "without a <testsuite>"),
        (document().replace(b' name="login"', b""), "without a name"),
        (document(counts=ONE), "says tests='1' and has 4"),
        (document(cases="<flaky/>", counts=ONE), "<flaky> in <testsuite>"),
        (document(cases='<testcase name="a"/>', counts=ONE), "without a name or classname"),
        (document(cases='<testcase classname="a" name="b"><flakyFailure/></testcase>', counts=ONE), "<flakyFailure>"),
        (document(cases='<testcase classname="a" name="b"><failure/></testcase>', counts=ONE), "failures='0' and has"),
        (
            document(
                cases='<testcase classname="a" name="b"><failure type="f"/></testcase>',
                counts='tests="1" failures="1" errors="0" skipped="0"',
            ),
            "type of <failure> is 'f'",
        ),
        (
            document(
                cases='<testcase classname="a" name="b"><failure/><error/></testcase>',
                counts='tests="1" failures="1" errors="1" skipped="0"',
            ),
            "has 2 outcomes",
        ),
    ],
)
def test_what_an_importer_would_refuse_is_said(xml: bytes, complaint: str) -> None:
    with pytest.raises(DocumentError, match=complaint):
        read(xml)


@pytest.mark.parametrize(
    "polarion", [None, {"project": "RHEL9", "title": "T", "cases": {"one": "RHEL9-1"}, "properties": {"dry-run": True}}]
)
def test_what_the_agent_writes_and_submits_is_taken(polarion: dict[str, object] | None) -> None:
    report = {"report": {"polarion": polarion}} if polarion else {}
    suite = from_tree({"id": "login", "runner": "ava", **report})
    states: tuple[State, ...] = ("passed", "failed", "blocked", "skipped", "todo", "aborted", "lost")
    records = [
        TestFinished(run="r.9", suite="login", case=f"c{n}", name=state, file="a.js", state=state, ended=2.0)
        for n, state in enumerate(states)
    ]
    xml = b"".join(document_of(suite, finished("r.9"), lambda: records, hostname="lab7"))
    taken = read(prepare(xml, "r.9", "SAMPLE", ("emissary", "lab-07.abc")).xml)
    assert taken.project == ("RHEL9" if polarion else "SAMPLE")
    assert taken.testrun == "r_9"
    assert [case.verdict for case in taken.cases] == [
        *("Passed", "Failed", "Blocked", "Waiting", "Waiting", "Blocked", "Blocked"),
    ]
