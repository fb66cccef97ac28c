"""agent/coverage/jacoco.py: the bytes of JaCoCo's remote control."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PeerBrokeProtocol
from agent.coverage.jacoco import HEADER, MOST_PROBES, Dumped, Event, Executed, Reader, dump

SESSION = b"\x10\x00\x04host" + struct.pack(">qq", 1, 2)


def executed(event: Executed) -> bytes:
    """The block of a class, whose name has no NUL and nothing beyond 16 bits."""
    name = event.name.encode()
    number, count = b"", event.count
    while count > 0x7F:
        number += bytes((count & 0x7F | 0x80,))
        count >>= 7
    number += bytes((count,))
    probes = event.probes.to_bytes((event.count + 7) // 8, "little")
    return b"\x11" + struct.pack(">QH", event.id, len(name)) + name + number + probes


def read(data: bytes) -> list[Event]:
    return list(Reader().feed(data))


def test_a_dump_is_its_classes_and_an_end() -> None:
    block = bytes.fromhex("11 8000000000000001 000e") + b"com/acme/Valve" + bytes.fromhex("0a 05 02")
    assert read(HEADER + SESSION + block + b"\x20") == [
        Executed(id=0x8000000000000001, name="com/acme/Valve", count=10, probes=0b10_0000_0101),
        Dumped(),
    ]


def test_an_exec_file_is_read_too() -> None:
    """It may hold several headers: JaCoCo appends."""
    event = Executed(1, "A", 1, 1)
    assert read((HEADER + SESSION + executed(event)) * 2) == [event, event]


def test_commands() -> None:
    assert (dump(reset=True), dump(reset=False)) == (b"\x40\x01\x01", b"\x40\x01\x00")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"a\xc0\x80b", "a\0b"),
        (b"\xed\xa0\xbd\xed\xb8\x80", "\U0001f600"),
        (b"\xed\xa0\xbd", "\ufffd"),
        (b"\xff", "\ufffd"),
        ("é".encode(), "é"),
    ],
)
def test_names_are_javas_utf8(written: bytes, name: str) -> None:
    block = b"\x11" + bytes(8) + struct.pack(">H", len(written)) + written + b"\x00"
    assert read(HEADER + block) == [Executed(0, name, 0, 0)]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"HTTP/1.1 400 Bad Request", "byte 0x48 where a header was expected"),
        (b"\x01\xc0\xc0\x10\x06", "header 01 c0 c0 10 06, and 01 c0 c0 10 07 was expected"),
        (b"\x20", "byte 0x20 where a header"),
        (HEADER + b"\x12", "byte 0x12 where a block was expected"),
        (HEADER + b"\x11" + bytes(8) + b"\x00\x01A\xff\xff\xff\xff\x01", "probes of class 'A'"),
        (HEADER + b"\x11" + bytes(8) + b"\x00\x01A\xff\xff\xff\xff\xff", "a number of more than 5 bytes"),
    ],
)
def test_what_is_no_jacoco_is_named(data: bytes, what: str) -> None:
    with pytest.raises(PeerBrokeProtocol, match=what):
        read(data)


CLASSES = st.integers(0, 300).flatmap(
    lambda count: st.builds(
        Executed,
        id=st.integers(0, 2**64 - 1),
        name=st.text(st.characters(min_codepoint=1, max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=30),
        count=st.just(count),
        probes=st.integers(0, (1 << count) - 1),
    )
)
EVENTS: st.SearchStrategy[Event] = CLASSES | st.just(Dumped())


@given(st.lists(EVENTS, max_size=4), st.data())
def test_chunking_never_changes_the_events(events: list[Event], data: st.DataObject) -> None:
    wire = HEADER + b"".join(SESSION + executed(each) if isinstance(each, Executed) else b"\x20" for each in events)
    reader = Reader()
    found: list[Event] = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += reader.feed(wire[:size])
        wire = wire[size:]
    assert found == events


@given(st.lists(st.binary(max_size=40) | st.sampled_from([HEADER, SESSION, b"\x11", b"\x20"]), max_size=10))
def test_any_bytes_are_events_or_named(chunks: list[bytes]) -> None:
    reader = Reader()
    with suppress(PeerBrokeProtocol):
        for chunk in [HEADER, *chunks]:
            for event in reader.feed(chunk):
                if isinstance(event, Executed):
                    assert event.count <= MOST_PROBES
                    assert event.probes >> event.count == 0
