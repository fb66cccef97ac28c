"""Replies of Polarize, Polarion and the CI Bus: any bytes give a reply, never an exception."""

import json

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import DocumentError
from agent.polarize import submit
from tests import no_json

KEYS = st.sampled_from(
    ["status", "errors", "files", "r.xml", "job-ids", "error-message", "jobs", "id", "data", "op", "message", "result"]
)
WORDS = st.sampled_from(["SUCCESS", "PENDING", "failed", "passed", "partial", "READY", "-response", ""])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
BODIES = st.one_of(
    st.binary(max_size=100),
    VALUES.map(lambda value: json.dumps(value).encode()),
    no_json.objects("status", "files", "jobs", "data", "message"),
)
STATUSES = st.one_of(st.sampled_from([200, 302, 404, 429, 500]), st.integers(100, 599))


@given(STATUSES, BODIES)
def test_every_reply_is_understood_or_tried_again(status: int, body: bytes) -> None:
    replies = [
        submit.read_polarize(status, body),
        submit.read_accepted(status, body, "r.xml"),
        submit.read_queue(status, body, [1]),
        submit.read_log(status, body),
    ]
    assert all(isinstance(reply, submit.Reply) for reply in replies)
    if not 200 <= status < 300:
        assert all(isinstance(reply, submit.Refused | submit.Later) for reply in replies)


@given(BODIES)
def test_every_frame_and_message_is_understood_or_passed_over(body: bytes) -> None:
    assert isinstance(submit.read_ws(body.decode(errors="replace"), "tag"), submit.Reply | None)
    assert isinstance(submit.read_completion(body), submit.Finished | None)


TAGS = st.sampled_from(
    [
        *(b"<testsuites>", b"</testsuites>", b"<properties>", b"</properties>", b'<property name="a" value="b"/>'),
        *(b"<testsuite>", b"<!-- x -->", b"\n", b"<![CDATA[", b"&amp;", b"\xff"),
    ]
)


@given(st.one_of(st.binary(max_size=100), st.lists(TAGS, max_size=12).map(b"".join)))
def test_any_document_is_prepared_or_refused(xml: bytes) -> None:
    try:
        report = submit.prepare(xml, "r-1", "P", ("emissary", "lab.x"))
    except DocumentError:
        return
    again = submit.prepare(report.xml, "r-1", "P", ("emissary", "lab.x"))
    assert again.properties == report.properties
