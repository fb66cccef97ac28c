"""What is sent to the lab's importer: any document and any form is read, or refused in words."""

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import DocumentError
from agent.core.head import HttpError
from agent.lab.polarize import read_multipart
from agent.lab.xunit import read

PIECES = st.sampled_from(
    [
        *(b"<testsuites>", b"</testsuites>", b"<properties>", b"</properties>", b'<testsuite name="a" tests="1">'),
        *(b"</testsuite>", b'<testcase name="a" classname="b">', b"</testcase>", b'<failure type="failure"/>', b"<a>"),
        *(b'<property name="polarion-project-id" value="P"/>', b'<property name="polarion-lookup-method" value="id"/>'),
        *(b'<property name="polarion-testrun-id" value="r"/>', b'<property name="polarion-response-a" value="b"/>'),
        *(b"<!-- x -->", b"<!DOCTYPE a>", b"<![CDATA[", b"&amp;", b"&b;", b"\xff", b"\xff\xfe"),
    ]
)
HEADS = st.sampled_from(["", "utf-8", "utf-16", "latin-1", "shift_jis", "utf-7", "idna", "rot13", "none"]).map(
    lambda name: b'<?xml version="1.0" encoding="%b"?>' % name.encode() if name else b""
)
XML = st.tuples(HEADS, st.lists(PIECES, max_size=15).map(b"".join)).map(b"".join)


@given(XML | st.binary(max_size=60))
def test_any_document_is_read_or_refused(xml: bytes) -> None:
    with suppress(DocumentError):
        assert read(xml).project


LINES = st.sampled_from(
    [
        *(b"--x", b"--x--", b"--y", b"", b"Content-Disposition: form-data; name=xunit", b"content-type: text/xml"),
        *(b'Content-Disposition: form-data; name="xunit"; filename="a"', b'content-disposition: form-data;name="\xff"'),
    ]
)
TYPES = st.sampled_from(["multipart/form-data; boundary=x", 'Multipart/Form-Data;a;boundary="x"', "text/xml"])


@given(TYPES | st.text(max_size=40), st.lists(LINES | st.binary(max_size=10), max_size=12).map(b"\r\n".join))
def test_any_form_is_read_or_refused(content_type: str, body: bytes) -> None:
    with suppress(HttpError):
        assert all(isinstance(part, bytes) for part in read_multipart(content_type, body).values())


@given(st.dictionaries(st.sampled_from(["xunit", "xargs", "file"]), st.binary(max_size=30)))
def test_each_part_of_a_form_is_as_it_was_sent(parts: dict[str, bytes]) -> None:
    wire = b"".join(
        b'--xYz\r\nContent-Disposition: form-data; name="%b"; filename="a.xml"\r\n\r\n%b\r\n' % (name.encode(), part)
        for name, part in parts.items()
    )
    assert read_multipart("multipart/form-data; boundary=xYz", wire + b"--xYz--\r\n") == parts
