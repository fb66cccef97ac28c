"""STOMP under any bytes and any chunking."""

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PeerBrokeProtocol
from agent.polarize.stomp import Frame, Happening, Reader, Session, encode

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
HEADERS = st.dictionaries(TEXT.filter(lambda name: name not in ("", "content-length")), TEXT, max_size=4)
FRAMES = st.builds(Frame, st.sampled_from(["SEND", "MESSAGE", "RECEIPT", "ERROR"]), HEADERS, st.binary(max_size=60))
PIECES = st.sampled_from(
    [
        *(b"CONNECTED\nversion:1.2\n", b"MESSAGE\nack:1\n", b"ERROR\n", b"content-length:3\n"),
        *(b"\n", b"\r\n", b"\0", b"abc", b"\\c"),
    ]
)


def chunked(wire: bytes, data: st.DataObject) -> list[bytes]:
    chunks = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        chunks.append(wire[:size])
        wire = wire[size:]
    return chunks


@given(st.lists(FRAMES, max_size=4), st.sampled_from([b"", b"\n", b"\r\n\n"]), st.data())
def test_chunking_never_changes_the_frames(frames: list[Frame], beat: bytes, data: st.DataObject) -> None:
    reader, wire = Reader(), b"".join(encode(frame) + beat for frame in frames)
    got = [frame for chunk in chunked(wire, data) for frame in reader.feed(chunk)]
    lengths = [{"content-length": str(len(frame.body))} if frame.body else {} for frame in frames]
    assert got == [
        Frame(sent.command, sent.headers | length, sent.body) for sent, length in zip(frames, lengths, strict=True)
    ]


def read(chunks: list[bytes]) -> list[Happening] | None:
    """What a session that has just greeted makes of it; None: it refuses."""
    session, happenings = Session(vhost="h", client_id="c"), list[Happening]()
    session.connect()
    try:
        for chunk in chunks:
            happenings += session.feed(chunk)
    except PeerBrokeProtocol:
        return None
    return happenings


@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=20).map(b"".join)), st.data())
def test_any_bytes_are_read_or_refused_and_chunking_never_changes_which(wire: bytes, data: st.DataObject) -> None:
    assert read(chunked(wire, data)) == read([wire])
