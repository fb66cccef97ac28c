"""Writes the xUnit document of a run, in the form that Polarion's importer takes. Pure: records in, parts of UTF-8 out.

Every record is a test case: failed hooks, crashes and what was not reported too, so that the sums agree with what was
planned. Texts are bounded each and all together: beyond DOCUMENT_MAX the output of tests goes first, then the texts of
failures, then their messages; never a test.

Source: protocols/suites.md, "xUnit", "States"; protocols/emissary.md, "Polarize" (the test run id).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from agent.core import xmltext
from agent.core.events import SuiteFinished, TestFinished, of_all_attempts
from agent.suites.messages import Polarion, Suite
from agent.suites.runners.driver import MESSAGE_MAX, TEXT_MAX, UNREPORTED, clip, plain

DOCUMENT_MAX: Final = 64 * 1024 * 1024  # bytes

_PARAMETER = re.compile(r"polarion-parameter-[A-Za-z0-9._-]{1,128}")


class _Case(NamedTuple):
    """A rendered test case; what may be left out stands apart."""

    head: bytes
    child: str  # the element that says why it did not pass, or ""
    message: bytes
    text: bytes
    output: bytes
    tail: bytes = b"</testcase>\n"

    def parts(self, message: bytes, text: bytes, output: bytes) -> bytes:
        """The case with these of its three texts, each the case's own or empty."""
        why = b""
        if self.child:
            name = self.child.encode()
            why = b'<%b type="%b"%b>%b</%b>' % (name, name, message, text, name)
        return self.head + why + output + self.tail

    @property
    def size(self) -> int:
        """Bytes without the three texts."""
        return len(self.parts(b"", b"", b""))


_CHILD: Final = {
    "passed": "",
    "failed": "failure",
    "blocked": "error",
    "aborted": "error",
    "lost": "error",
    "skipped": "skipped",
    "todo": "skipped",
}


def document(
    suite: Suite, finished: SuiteFinished, records: Callable[[], Iterable[TestFinished]], *, hostname: str
) -> Iterator[bytes]:
    """The document in parts. `records()` gives the records that count (Tally.last), and is called twice."""
    polarion = suite.report.polarion
    children = {"": 0, "failure": 0, "error": 0, "skipped": 0}
    size = messages = texts = outputs = 0
    for record in records():
        case = _case(record, suite)
        children[case.child] += 1
        size += case.size
        messages, texts, outputs = messages + len(case.message), texts + len(case.text), outputs + len(case.output)
    attributes = {
        "name": suite.id,
        "tests": sum(children.values()),
        "failures": children["failure"],
        "errors": children["error"],
        "skipped": children["skipped"],
        "time": f"{max(0.0, finished.ended - finished.started):.3f}",
        "timestamp": datetime.fromtimestamp(finished.started, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "hostname": hostname,
    }
    head = b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>'
    if polarion is not None:
        head += _properties(_of_run(polarion, finished.run))
    head += b"<testsuite%b>\n" % _attributes(attributes)
    tail = b"</testsuite></testsuites>\n"
    yield head
    room = DOCUMENT_MAX - len(head) - len(tail) - size
    left_messages = _share(messages, room)
    left_texts = _share(texts, room - messages)
    left_outputs = _share(outputs, room - messages - texts)
    for record in records():
        case = _case(record, suite)
        message = case.message if len(case.message) <= left_messages else b""
        text = case.text if len(case.text) <= left_texts else b""
        output = case.output if len(case.output) <= left_outputs else b""
        left_messages, left_texts, left_outputs = (
            left_messages - len(message),
            left_texts - len(text),
            left_outputs - len(output),
        )
        yield case.parts(message, text, output)
    yield tail


def _share(wanted: int, room: int) -> int:
    return max(0, min(wanted, room))


def testrun_id(run: str) -> str:
    """The id of the test run in Polarion: always the same for a run, so that importing twice updates."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", run)


def clean(text: str) -> str:
    """A text without ANSI sequences; characters that XML forbids become `\\xNN`, or `\\uNNNN`."""
    return xmltext.writable(_unstyled(text))


def _unstyled(text: str) -> str:
    return plain(text.encode("utf-8", "replace")) if "\x1b" in text else text


def _of_run(polarion: Polarion, run: str) -> Iterator[tuple[str, str]]:
    if polarion.project is not None:
        yield "polarion-project-id", polarion.project
    yield "polarion-testrun-id", testrun_id(run)
    yield "polarion-lookup-method", polarion.lookup
    if polarion.title is not None:
        yield "polarion-testrun-title", polarion.title
    if polarion.template is not None:
        yield "polarion-testrun-template-id", polarion.template
    for name, value in polarion.properties.items():
        if not name.startswith("parameter-"):
            yield f"polarion-{name}", _value(value)


def _of_case(record: TestFinished, polarion: Polarion) -> Iterator[tuple[str, str]]:
    known = polarion.cases.get(of_all_attempts(record.case, record.attempt)) or polarion.cases.get(record.name)
    if known is not None or record.kind == "test":
        yield "polarion-testcase-id", known or record.name
    for name, value in polarion.properties.items():
        if name.startswith("parameter-"):
            yield f"polarion-{name}", _value(value)
    own = record.details.get("properties")  # what a test said of itself: pytest's record_property
    if isinstance(own, dict):
        for name, value in own.items():
            if _PARAMETER.fullmatch(name) and isinstance(value, str | int | float):
                yield name, clip(_value(value), MESSAGE_MAX)
    if record.state == "passed" and record.message:
        yield "polarion-testcase-comment", record.message


def _value(value: str | bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _case(record: TestFinished, suite: Suite) -> _Case:
    duration = record.duration
    if duration is None:
        duration = 0.0 if record.started is None else record.ended - record.started
    head = b"<testcase%b>" % _attributes(
        {"classname": record.file or suite.id, "name": _name(record), "time": f"{max(0.0, duration):.3f}"}
    )
    if suite.report.polarion is not None:
        head += _properties(_of_case(record, suite.report.polarion))
    child = _CHILD[record.state]
    message = _message(record)
    text = _text(record) if child in ("failure", "error") else ""
    output = "\n".join((*record.log, record.output)).strip("\n") if record.log else record.output
    return _Case(
        head=head,
        child=child,
        message=_attributes({"message": clip(clean(message), MESSAGE_MAX)}) if child and message else b"",
        text=_escaped(text),
        output=b"<system-out>%b</system-out>" % _escaped(output) if output else b"",
    )


def _name(record: TestFinished) -> str:
    if record.kind != "rest":
        return record.name
    match record.count:
        case None:
            said = "tests not reported"
        case 1:
            said = "1 test not reported"
        case count:
            said = f"{count} tests not reported"
    return record.name.replace(UNREPORTED, said)


def _message(record: TestFinished) -> str:
    match record.state:
        case "todo":
            return "todo"
        case "aborted" | "lost":
            said = record.message or ""
            return said if said.startswith(f"{record.state}:") else f"{record.state}: {said}".rstrip(": ")
        case _:
            return record.message or ""


def _text(record: TestFinished) -> str:
    """What is known of a failure: where, and each detail under its name."""
    lines = [f"at: {record.at}"] if record.at else []
    for name, value in record.details.items():
        if isinstance(value, str):
            lines.append(f"{name}:\n{value}" if "\n" in value else f"{name}: {value}")
        else:
            lines.append(f"{name}: {_json(value)}")
    return "\n".join(lines)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _properties(pairs: Iterable[tuple[str, str]]) -> bytes:
    rendered = [b"<property%b/>" % _attributes({"name": name, "value": value}) for name, value in pairs]
    return b"<properties>%b</properties>\n" % b"".join(rendered) if rendered else b""


def _attributes(values: dict[str, Any]) -> bytes:
    pairs = [f' {name}="{xmltext.value(_unstyled(str(value)))}"' for name, value in values.items()]
    return "".join(pairs).encode()


def _escaped(text: str) -> bytes:
    """A text for an element's content, cut to TEXT_MAX bytes before it is escaped."""
    if not text:
        return b""
    return xmltext.content(clip(clean(text), TEXT_MAX)).encode()
