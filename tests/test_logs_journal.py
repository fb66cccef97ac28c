"""The journal's export stream and /dev/kmsg: recorded bytes, any chunking, bounded memory."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PeerBrokeProtocol
from agent.logs import journal
from agent.logs.journal import Entry, JournalReader, KernelRecord, kernel_record

RECORDED = (
    b"__CURSOR=s=6d1f;i=3f2;b=a1;m=9c;t=64f;x=1\n"
    b"__REALTIME_TIMESTAMP=1767600000123456\n"
    b"PRIORITY=3\n_PID=712\nSYSLOG_IDENTIFIER=mdadm\n"
    b"MESSAGE=array md0 degraded\n\n"
    b"__CURSOR=s=6d1f;i=3f3;b=a1;m=9d;t=650;x=2\n"
    b"MESSAGE\n" + struct.pack("<Q", 12) + b"two\nlines \xff=" + b"\n"
    b"_PID=1\n_PID=2\n\n"
)


def test_a_recorded_stream() -> None:
    first, second = JournalReader().feed(RECORDED)
    assert (first.cursor, first.message) == ("s=6d1f;i=3f2;b=a1;m=9c;t=64f;x=1", b"array md0 degraded")
    assert (first.fields["_PID"], first.fields["PRIORITY"]) == (b"712", b"3")
    assert (second.message, second.fields["_PID"]) == (b"two\nlines \xff=", b"1")
    assert (first.sequence, second.sequence) == (0x3F2, 0x3F3)


@pytest.mark.parametrize("cursor", ["", "x=1", "i=", "si=12", "i=g", "i=" + "f" * 17])
def test_a_cursor_that_is_written_otherwise_has_no_number(cursor: str) -> None:
    assert Entry(cursor, b"", {}).sequence == 0


def read(chunks: list[bytes]) -> tuple[list[Entry], str]:
    reader, entries = JournalReader(), list[Entry]()
    for chunk in chunks:
        entries += reader.feed(chunk)
    return entries, str(reader.broken)


PIECES = [
    b"__CURSOR=a\n",
    b"MESSAGE=x\n",
    b"MESSAGE\n",
    b"\n",
    struct.pack("<Q", 3),
    b"abc\n",
    b"A=",
    b"\0",
    b"=",
    b"a",
]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=30).map(b"".join), st.data())
def test_chunking_never_changes_the_entries(wire: bytes, data: st.DataObject) -> None:
    chunks, rest = [], wire
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        chunks.append(rest[:size])
        rest = rest[size:]
    assert read(chunks) == read([wire])


def test_an_entry_that_has_no_end_yet_waits() -> None:
    reader = JournalReader()
    assert reader.feed(RECORDED[:100]) == []
    assert len(reader.feed(RECORDED[100:])) == 2


def test_a_core_dump_takes_no_more_memory_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_FIELD", 1000)
    reader = JournalReader()
    reader.feed(b"__CURSOR=c\nCOREDUMP\n" + struct.pack("<Q", 1_000_000))
    for _ in range(1000):
        reader.feed(b"z" * 1000)
        assert len(reader._buf) + len(reader._kept) < 3000
    (entry,) = reader.feed(b"\nMESSAGE=after\n\n")
    assert (entry.message, entry.fields["COREDUMP"]) == (b"after", b"z" * 1000)


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (b"no field\n", "which is no field"),
        (b"=x\n", "which is no field"),
        (b"A\n" + struct.pack("<Q", 2) + b"abc", "longer than its size"),
        (b"A\n" + struct.pack("<Q", 1 << 40), "a A of 1099511627776 bytes"),
        (b"MESSAGE=x\n\n", "an entry without __CURSOR"),
    ],
)
def test_what_is_no_export_stream_is_told_behind_the_entries_before_it(wire: bytes, message: str) -> None:
    reader = JournalReader()
    assert len(reader.feed(RECORDED + wire + RECORDED)) == 2
    assert message in str(reader.broken)
    assert reader.feed(RECORDED) == []


def test_an_entry_with_too_much_in_it_keeps_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRY", 10)
    (entry,) = JournalReader().feed(b"A=12345\nB=123456\n__CURSOR=123456\nC=1\nMESSAGE=123456\n\n")
    assert entry.fields.keys() == {"A", "__CURSOR", "MESSAGE"}


def test_a_kernel_record() -> None:
    wire = b"6,339,5140900,-;NET: Registered \\x09protocol\n SUBSYSTEM=net\n DEVICE=+net:eth0\n"
    assert kernel_record(wire) == KernelRecord(
        339, 6, 5_140_900, b"NET: Registered \tprotocol", {"SUBSYSTEM": b"net", "DEVICE": b"+net:eth0"}
    )
    assert kernel_record(b"4,1,2,c,caller=T1;").message == b""


@pytest.mark.parametrize("wire", [b"", b"6,339;x", b"<6>old style", b"a,b,c,-;x"])
def test_what_is_no_kernel_record_is_refused(wire: bytes) -> None:
    with pytest.raises(PeerBrokeProtocol, match="which is no record"):
        kernel_record(wire)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_record_or_refused(wire: bytes) -> None:
    try:
        assert kernel_record(b"6,1,2,-;" + wire).sequence == 1
    except PeerBrokeProtocol:
        pytest.fail("the head is good")
