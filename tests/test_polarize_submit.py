"""What each mode sends, and what each reply means."""

import email
import json
from email.message import Message
from random import Random
from xml.etree import ElementTree

import msgspec
import pytest

from agent.core.errors import DocumentError
from agent.polarize import submit
from agent.polarize.settings import CibusSettings, Mode, PolarizeSettings
from agent.polarize.submit import (
    Accepted,
    Finished,
    JobsEnded,
    Later,
    Pending,
    Refused,
    Reply,
    Report,
    Running,
    Unmatched,
)

TESTS = b'<testsuite name="login" tests="1"><testcase classname="a.js" name="\xe2\x9c\x93 &lt;ok&gt;"/></testsuite>'
PLAIN = b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n' + TESTS + b"</testsuites>\n"
FULL = PLAIN.replace(
    b"<testsuites>\n",
    b"""<testsuites><properties>
<property name="polarion-project-id" value="RHEL9"/><property name="polarion-lookup-method" value="custom"/>
<property name="polarion-testrun-id" value="by hand"/><property name="polarion-testrun-title" value="A &quot;B&quot;"/>
<property name="polarion-testrun-template-id" value="T1"/><property name="polarion-testrun-type-id" value="regression"/>
<property name="polarion-dry-run" value="true"/><property name="polarion-include-skipped" value="false"/>
<property name="polarion-custom-arch" value="s390x"/><property name="polarion-response-old" value="x.y"/>
</properties>""",
)
RESPONSE = ("emissary", "lab-07.abcdefghijkl")


def settings(mode: Mode = "polarize-http", **more: str) -> PolarizeSettings:
    return msgspec.convert({"mode": mode, "url": "https://lab.example/p/", **more}, PolarizeSettings)


def report(xml: bytes = FULL) -> Report:
    return submit.prepare(xml, "r-9.a", "DEFAULT", RESPONSE)


def properties(xml: bytes) -> dict[str, str]:
    found = ElementTree.fromstring(xml).findall("./properties/property")
    return {item.attrib["name"]: item.attrib["value"] for item in found}


def parts(request: submit.HttpRequest) -> dict[str, Message]:
    head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
    found = email.message_from_bytes(head + b"".join(request.body)).get_payload()
    assert isinstance(found, list)
    messages = [part for part in found if isinstance(part, Message)]
    return {str(part.get_param("name", header="content-disposition")): part for part in messages}


# ---- the document ----------------------------------------------------------------------------------------------------


def test_a_document_gets_our_test_run_id_and_a_response_and_stays_as_it_was() -> None:
    prepared = report()
    assert prepared.xml.endswith(TESTS + b"</testsuites>\n")
    assert properties(prepared.xml) == {
        "polarion-project-id": "RHEL9",
        "polarion-lookup-method": "custom",
        "polarion-testrun-id": "r-9_a",
        "polarion-testrun-title": 'A "B"',
        "polarion-testrun-template-id": "T1",
        "polarion-testrun-type-id": "regression",
        "polarion-dry-run": "true",
        "polarion-include-skipped": "false",
        "polarion-custom-arch": "s390x",
        "polarion-response-emissary": "lab-07.abcdefghijkl",
    }
    assert prepared.properties == properties(prepared.xml)


def test_a_plain_document_gets_what_an_import_needs() -> None:
    assert properties(report(PLAIN).xml) == {
        "polarion-project-id": "DEFAULT",
        "polarion-lookup-method": "name",
        "polarion-testrun-id": "r-9_a",
        "polarion-response-emissary": "lab-07.abcdefghijkl",
    }


@pytest.mark.parametrize(("xml", "project"), [(FULL, "RHEL9"), (PLAIN, None)])
def test_the_documents_own_project_is_found(xml: bytes, project: str | None) -> None:
    assert submit.project_of(xml) == project


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        (b"", "no XML: no element found"),
        (b"<html/>", "its root is <html>"),
        (b"<testsuites></testsuites>", "without a <testsuite>"),
        (b"<testsuites>\n\n<prop", r"xunit.xml:3: no XML"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><testsuites>&b;</testsuites>', "document type declaration"),
    ],
)
def test_what_is_no_xunit_document_is_said(xml: bytes, complaint: str) -> None:
    with pytest.raises(DocumentError, match=complaint):
        report(xml)


def test_each_submission_has_a_response_of_its_own() -> None:
    random = Random(1)
    values = {submit.new_response("lab-07", random) for _ in range(100)}
    assert len(values) == 100
    assert all(value.startswith("lab-07.") and value[7:].isalpha() and len(value) == 19 for value in values)


# ---- requests --------------------------------------------------------------------------------------------------------

XARGS = {
    "project": "RHEL9",
    "xunit": {
        "testrun": {"id": "r-9_a", "title": 'A "B"', "template-id": "T1", "testrun-type": "regression"},
        "custom": {
            "test-suite": {"dry-run": True, "set-testrun-finished": True, "include-skipped": False},
            "properties": {"arch": "s390x"},
        },
        "selector": {"name": "emissary", "value": "lab-07.abcdefghijkl"},
        "timeout": 300000,
        "enabled": True,
    },
}


def test_polarize_gets_both_parts() -> None:
    request = submit.polarize_http(settings(), report(), "", Random(1))
    assert (request.method, request.url) == ("POST", "https://lab.example/p/xunit/import")
    xunit, xargs = (parts(request)[name] for name in ("xunit", "xargs"))
    assert xunit.get_payload(decode=True) == report().xml
    assert xunit.get_filename() == "r-9.a.xml"
    assert json.loads(str(xargs.get_payload())) == XARGS


def test_credentials_go_along_only_when_they_are_set() -> None:
    request = submit.polarize_http(settings(user="u", password_file="f"), report(), "geheim", Random(1))
    xargs = json.loads(str(parts(request)["xargs"].get_payload()))
    assert xargs == {**XARGS, "servers": {"polarion": {"user": "u", "password": "geheim"}}}


@pytest.mark.parametrize("ws_data", ["string", "object"])
def test_polarizes_websocket_gets_one_frame(ws_data: str) -> None:
    request = submit.polarize_ws(settings("polarize-ws", ws_data=ws_data), report(), "", Random(1))
    assert request.url == "wss://lab.example/p/ws/xunit/import"
    frame = json.loads(request.text)
    data = json.loads(frame.pop("data")) if ws_data == "string" else frame.pop("data")
    assert frame == {"op": "xunit-import-ws", "type": "na", "tag": request.tag, "ack": True}
    assert request.tag.startswith("xunit-import-")
    assert data["xunit"].encode() == report().xml
    assert json.loads(data["xargs"]) == XARGS


def test_polarions_importer_gets_one_file() -> None:
    ours = settings("polarion", user="u", password_file="f")
    request = submit.polarion_import(ours, report(), Random(1))
    assert request.url == "https://lab.example/p/import/xunit"
    (part,) = parts(request).values()
    assert part.get_param("name", header="content-disposition") == "file"
    assert part.get_filename() == "r-9.a.xml"
    assert submit.polarion_queue(ours, [7, 8]).url == (
        "https://lab.example/p/import/xunit-queue?jobtype=completed&jobIds=7,8"
    )
    assert submit.polarion_log(ours, 7).url == "https://lab.example/p/import/xunit-log?jobId=7"
    assert submit.polarion_testrun_url(ours, "A/B", "r.9") == "https://lab.example/p/#/project/A%2FB/testrun?id=r_9"


def test_polarions_login_is_the_form_or_basic() -> None:
    ours = settings("polarion", user="u", password_file="f")
    request = submit.polarion_login(ours, "a&b")
    assert request.url == "https://lab.example/p/j_security_check"
    assert request.body == (b"j_username=u&j_password=a%26b&submit=Log+In&rememberme=true",)
    assert submit.basic(ours, "a&b") == {"authorization": "Basic dTphJmI="}


# ---- replies ---------------------------------------------------------------------------------------------------------

LOGIN_PAGE = b"<!DOCTYPE html><html><form><input name=j_password></form></html>"


@pytest.mark.parametrize(
    ("status", "body", "reply"),
    [
        (200, b'{"status":"SUCCESS","result":"ok","errors":"","new-xunit-path":"/tmp/x"}', Finished(outcome="passed")),
        *(
            (200, b'{"status":"%b"}' % word, Pending(word.decode()))
            for word in (b"PENDING", b"QUEUED", b"TIMED_OUT", b"NO_MESSAGE", b"EMPTY_MESSAGE")
        ),
        (
            200,
            b'{"status":"failed","errors":"Error with upload"}',
            Finished(outcome="failed", reason="failed: Error with upload"),
        ),
        (200, b'{"status":"ERROR","result":{"a":1}}', Finished(outcome="failed", reason='ERROR: {"a":1}')),
        (404, b"", Refused("HTTP 404")),
        (400, b"bad\nxml", Refused("HTTP 400: 'bad xml'")),
        (429, b"", Later("HTTP 429")),
        (408, b"", Later("HTTP 408")),
        (500, b"oops", Later("HTTP 500: 'oops'")),
        (302, b"", Later("HTTP 302")),
    ],
)
def test_polarizes_reply(status: int, body: bytes, reply: Reply) -> None:
    assert submit.read_polarize(status, body) == reply


@pytest.mark.parametrize("body", [LOGIN_PAGE, b"", b'{"status":"SUCC', b"[]", b'{"result":"x"}', b"[" * 100_000])
def test_a_200_that_is_no_reply_is_tried_again(body: bytes) -> None:
    assert isinstance(submit.read_polarize(200, body), Later)
    assert isinstance(submit.read_accepted(200, body, "r.xml"), Later)
    assert isinstance(submit.read_queue(200, body, [1]), Later)


def frame(**more: object) -> str:
    return json.dumps({"op": "-response", "type": "na", "tag": "xunitImportWS", "ack": False, **more})


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (frame(op="xunit-import-ws-response", tag="t-1", data="Received message"), None),
        ('{"id":"c-1","message":"Listening to VirtualTopic.qe.ci.>"}', None),
        ('{"result":"Waiting for reply from Polarion"}', None),
        ('"text"', None),
        (frame(data={"status": "SUCCESS"}), Finished(outcome="passed")),
        (frame(data='{"status":"SUCCESS"}'), Finished(outcome="passed")),
        (frame(data={"status": "PENDING"}), None),
        (frame(data={"status": "NO_MESSAGE"}), Pending("NO_MESSAGE")),
        (frame(data={"status": "FAILED", "errors": "x"}), Finished(outcome="failed", reason="FAILED: x")),
        ('{"result":"error","message":"Failed uploading"}', Finished(outcome="failed", reason="Failed uploading")),
        (
            '{"id":"c","message":"Error getting messages from UMB","info":{}}',
            Pending("Error getting messages from UMB"),
        ),
        (
            json.dumps({"id": "c", "message": json.dumps({"status": "partial", "log-url": "http://l"}), "info": 1}),
            Finished(outcome="partial", log_url="http://l"),
        ),
        (json.dumps({"id": "c", "message": {"status": "passed"}}), Finished(outcome="passed")),
        (json.dumps({"id": "c", "message": {"other": 1}}), None),
    ],
)
def test_a_frame_of_polarizes_websocket(text: str, reply: Reply | None) -> None:
    assert submit.read_ws(text, "t-1") == reply


def test_a_cut_frame_of_the_websocket_is_tried_again() -> None:
    assert isinstance(submit.read_ws('{"op":"-resp', "t-1"), Later)


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        ({"files": {"r.xml": {"job-ids": [7, 8]}}}, Accepted((7, 8))),
        ({"files": {"results.xml": {"job-ids": [7]}}}, Accepted((7,))),
        ({"files": {"r.xml": {"job-ids": None}}}, Refused("it was not queued: job ids None")),
        ({"files": {"r.xml": {"job-ids": [0]}}}, Refused("it was not queued: job ids [0]")),
        ({"files": {"r.xml": {"job-ids": []}}}, Refused("it was not queued: job ids []")),
        ({"files": {"r.xml": {"job-ids": [1] * 5000}}}, Refused(f"it was not queued: job ids {[1] * 5000}"[:500])),
        ({"files": {"r.xml": {"error-message": "no such project", "job-ids": [7]}}}, Refused("no such project")),
        ({"files": {}}, Later("the reply does not name r.xml")),
    ],
)
def test_polarions_reply_to_an_upload(body: object, reply: Reply) -> None:
    assert submit.read_accepted(200, msgspec.json.encode(body), "r.xml") == reply


@pytest.mark.parametrize(
    ("jobs", "reply"),
    [
        ([], Running()),
        ([(7, "READY"), (8, "SUCCESS")], Running()),
        ([(7, "running"), (8, "SUCCESS")], Running()),
        ([(7, "success"), (8, "Success")], JobsEnded(None)),
        ([(7, "SUCCESS"), (8, "ERROR")], JobsEnded("job 8: ERROR")),
    ],
)
def test_polarions_queue(jobs: list[tuple[int, str]], reply: Reply) -> None:
    body = msgspec.json.encode({"jobs": [{"id": id_, "status": status} for id_, status in jobs]})
    assert submit.read_queue(200, body, [7, 8]) == reply


def test_the_log_tells_what_was_not_found() -> None:
    log = """2026-11-21 INFO Starting import of XUnit results
2026-11-21 INFO Work item: 'test_a' (RHEL9-1)
2026-11-21 WARN Unable to find work item for 'test_b'.
2026-11-21 WARN Unable to find *unique* work item for 'it isn't › here' (RHEL9-2).
2026-11-21 WARN Unable to find work item for 'test_b'.
"""
    assert submit.read_log(200, log.encode()) == Unmatched(("test_b", "it isn't › here"))
    assert isinstance(submit.read_log(200, LOGIN_PAGE), Later)
    assert submit.read_log(404, b"") == Refused("HTTP 404")


@pytest.mark.parametrize(
    ("status", "body", "reply"),
    [
        (200, b"welcome", "session"),
        (302, b"", "session"),
        (404, b"", "basic"),
        (405, b"", "basic"),
        (200, LOGIN_PAGE, Refused("the login was refused: the form came again")),
        (401, b"", Refused("HTTP 401")),
        (503, b"", Later("HTTP 503")),
    ],
)
def test_polarions_login(status: int, body: bytes, reply: object) -> None:
    assert submit.read_login(status, body) == reply


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (
            {
                "testrun-url": "http://t",
                "import-results": [{"suite-name": "login", "status": "passed"}],
                "status": "passed",
                "log-url": "http://l",
            },
            Finished(outcome="passed", testrun_url="http://t", log_url="http://l"),
        ),
        ({"status": "failed", "log-url": "http://l"}, Finished(outcome="failed", log_url="http://l")),
        ({"message": "no project"}, Finished(outcome="failed", reason="no project")),
        ({"status": "passed", "message": "but no"}, Finished(outcome="failed", reason="but no")),
        ({"status": "built"}, None),
        ({}, None),
        ([], None),
    ],
)
def test_a_completion_on_the_bus(body: object, reply: Finished | None) -> None:
    assert submit.read_completion(msgspec.json.encode(body)) == reply


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "value", "complaint"),
    [
        (PolarizeSettings, {"url": "lab.example"}, "is no address for mode polarize-http"),
        (PolarizeSettings, {"url": "ws://lab", "mode": "polarion"}, "is no address for mode polarion"),
        (PolarizeSettings, {"user": "u"}, "go together"),
        (PolarizeSettings, {"response_name": "emissary-2"}, "matching regex"),
        (CibusSettings, {"url": "tcp://bus:61616"}, "is no address of a broker"),
        (CibusSettings, {"url": "stomp://bus"}, "is no address of a broker"),
        (CibusSettings, {"login": "u"}, "go together"),
        (CibusSettings, {"destination": "VirtualTopic.qe.ci.>"}, "begins with /topic/ or /queue/"),
    ],
)
def test_settings_that_cannot_work_are_refused(table: type, value: object, complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(value, table)


def test_the_settings_of_the_sheet_are_taken() -> None:
    assert settings("polarize-ws").url
    for url in ("stomp+ssl://host:61612", "stomp://[::1]:61613"):
        assert msgspec.convert({"url": url}, CibusSettings).url == url
