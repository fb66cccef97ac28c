"""The lab's strict reader of an xUnit document: what an importer takes, and every reason why it does not. Pure.

Only what the sheet lists may stand in a document: importers refuse unknown elements (submariner-io/shipyard#48).

Source: protocols/suites.md, "xUnit".
"""

import re
from collections.abc import Iterable
from typing import Literal, NoReturn
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

import msgspec

from agent.core.errors import DocumentError

Verdict = Literal["Passed", "Failed", "Blocked", "Waiting"]

_RUN_PROPERTY = re.compile(
    r"polarion-(project-id|testrun-(id|title|template-id|type-id|status-id)|lookup-method|set-testrun-finished"
    r"|include-skipped|dry-run|user-id|group-id|project-span-ids|response-[^-]+|custom-.+)"
)
_CASE_PROPERTY = re.compile(r"polarion-(testcase-id|testcase-comment|parameter-.+)")
_VERDICTS: dict[str, Verdict] = {"failure": "Failed", "error": "Blocked", "skipped": "Waiting"}
_COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


class Case(msgspec.Struct, frozen=True):
    """One test: `id` is its work item, or its name where the document gives none."""

    name: str
    id: str
    verdict: Verdict


class Document(msgspec.Struct, frozen=True):
    """What the lab keeps of a document; `response` is the name and value that a completion carries."""

    project: str
    testrun: str
    response: tuple[str, str]
    cases: tuple[Case, ...]


def read(xml: bytes) -> Document:
    """Check a document and read it. Raises DocumentError with the first thing that does not fit."""
    parser = XMLParser(target=_Builder())
    try:
        parser.feed(xml)
        root = parser.close()
    except (ParseError, LookupError, ValueError) as err:  # the last two: an encoding that is unknown, or is not read
        line = err.position[0] if isinstance(err, ParseError) else 0
        raise DocumentError("xunit", line, "", f"no XML: {err}", remedy=_REMEDY) from err
    if root.tag != "testsuites":
        _no(f"its root is <{root.tag}>, not <testsuites>")
    given = _properties(root, _RUN_PROPERTY)
    for name in ("project-id", "testrun-id", "lookup-method"):
        if not given.get(f"polarion-{name}"):
            _no(f"the property polarion-{name} is missing")
    if given["polarion-lookup-method"] not in ("id", "name", "custom"):
        _no(f"polarion-lookup-method is {given['polarion-lookup-method']!r}, not id, name or custom")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", given["polarion-testrun-id"]):
        _no(f"polarion-testrun-id {given['polarion-testrun-id']!r} has other characters than A-Za-z0-9_-")
    responses = [(name.removeprefix("polarion-response-"), given[name]) for name in given if "-response-" in name]
    if len(responses) != 1:
        _no(f"{len(responses)} properties polarion-response-NAME, not 1")
    suites = [child for child in root if child.tag != "properties"]
    if not suites:
        _no("a <testsuites> without a <testsuite>")
    cases = tuple(case for suite in suites for case in _suite(suite))
    return Document(given["polarion-project-id"], given["polarion-testrun-id"], responses[0], cases)


class _Builder(TreeBuilder):
    def doctype(self, *_: object) -> NoReturn:
        _no("a document type declaration, which may hide entities")


def _suite(suite: Element) -> Iterable[Case]:
    if suite.tag != "testsuite":
        _no(f"<{suite.tag}> in <testsuites>")
    if not suite.get("name"):
        _no("a <testsuite> without a name")
    for child in suite:
        if child.tag != "testcase":
            _no(f"<{child.tag}> in <testsuite>")
    counts = {name: len(suite.findall(f"testcase/{tag}")) for name, tag in _COUNTS.items()}
    for name, count in {"tests": len(suite), **counts}.items():
        if suite.get(name) != str(count):
            _no(f"testsuite {suite.get('name')!r} says {name}={suite.get(name)!r} and has {count}")
    return [_case(case) for case in suite]


def _case(case: Element) -> Case:
    name = case.get("name")
    if not name or case.get("classname") is None:
        _no("a <testcase> without a name or classname")
    given = _properties(case, _CASE_PROPERTY)
    outcomes = [child for child in case if child.tag in _VERDICTS]
    for child in case:
        if child.tag not in (*_VERDICTS, "properties", "system-out"):
            _no(f"<{child.tag}> in <testcase>")
    if len(outcomes) > 1:
        _no(f"testcase {name!r} has {len(outcomes)} outcomes")
    verdict: Verdict = "Passed"
    if outcomes:
        verdict = _VERDICTS[outcomes[0].tag]
        if outcomes[0].get("type") != outcomes[0].tag:
            _no(f"testcase {name!r}: type of <{outcomes[0].tag}> is {outcomes[0].get('type')!r}")
        if "polarion-testcase-comment" in given:
            _no(f"testcase {name!r} has a comment, which only passes may have")
    return Case(name, given.get("polarion-testcase-id") or name, verdict)


def _properties(parent: Element, known: re.Pattern[str]) -> dict[str, str]:
    """The properties of an element, which must come first in it."""
    if any(child.tag == "properties" for child in parent[1:]):
        _no(f"<properties> is not the first in <{parent.tag}>")
    found: dict[str, str] = {}
    for item in parent[0] if len(parent) and parent[0].tag == "properties" else ():
        name = item.get("name") or ""
        if item.tag != "property" or not known.fullmatch(name) or item.get("value") is None or name in found:
            _no(f"<{item.tag} name={name!r}> in the properties of <{parent.tag}>")
        found[name] = item.get("value") or ""
    return found


_REMEDY = "It was not imported; protocols/suites.md says what a document holds."


def _no(what: str) -> NoReturn:
    raise DocumentError("xunit", 0, "", what[:500], remedy=_REMEDY)
