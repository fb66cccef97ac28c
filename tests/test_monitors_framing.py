"""Frames and noise: how the bytes are cut never changes what comes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolMisuse
from agent.monitors.framing import MAX_BODY, MAX_LINE, MAX_LINES, PATIENCE_S, Lines, Reader, frame
from agent.monitors.messages import (
    Configured,
    Exit,
    Log,
    Message,
    Noise,
    Ready,
    Started,
    StepError,
    StepOk,
    StepTime,
    WebhookWait,
)


def read(data: bytes) -> list[Message | Noise]:
    reader = Reader()
    return [*reader.feed(data, 0.0), *reader.eof()]


def test_a_frame_is_five_digits_a_space_and_bytes() -> None:
    assert frame('Config {"a":"é"}') == b'00017 Config {"a":"\xc3\xa9"}'
    with pytest.raises(ProtocolMisuse, match="does not fit"):
        frame("x" * (MAX_BODY + 1))


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"00011 Started 1.1", [Started("1.1")]),
        (b"00005 Ready00010 Configured", [Ready(), Configured()]),
        (b"5 Ready", [Ready()]),  # not padded
        (b"000005 Ready", [Ready()]),
        (b"00006 Ready\n", [Ready()]),
        (b"00008 Exit\r\n  ", [Exit()]),
        (b"00007 Step OK", [StepOk()]),
        (b"00011 Step OK a=1", [StepOk("a=1")]),
        (b"00015 Step Time 12.5\n", [StepTime("12.5")]),
        (b"00018 Step Time k=v 12.5", [StepTime("12.5", "k=v")]),
        (b"00010 Step Time ", [StepTime("")]),  # no time: a result that cannot be read, and no noise
        (b"00018 Step Error a\nb \xff\n\n", [StepError("a\nb \ufffd")]),
        (b"00021 Log Warning it is hot", [Log("warning", "it is hot")]),
        (b"00015 Log Fatal gone\n", [Log("info", "Fatal gone")]),
        (b"00020 Wait For Webhook u-1", [WebhookWait("u-1")]),
    ],
)
def test_messages(data: bytes, events: list[Message]) -> None:
    assert read(data) == events


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"hello\n\n  \nworld", [Noise("hello"), Noise("world")]),
        (b"plain print00007 Step OK\nmore\n", [Noise("plain print"), StepOk(), Noise("more")]),
        (b"took 900 ms\n00007 Step OK", [Noise("took 900 ms"), StepOk()]),
        (b"count 12300005 Ready", [Noise("count 123"), Ready()]),  # glued to digits: the last five are tried
        (b"100029 Log Info ab00029", [Noise("100029 Log Info ab00029")]),
        (b"3 Ready\n00005 Ready", [Noise("3 Ready"), Ready()]),  # the length does not suit the word
        (b"00900 Started 1.1\n00005 Ready", [Noise("00900 Started 1.1"), Ready()]),
        (b"00007 Ready!!\n00005 Ready", [Noise("00007 Ready!!"), Ready()]),  # it only begins like a message
        (b"00050 Log Info cut off", [Noise("00050 Log Info cut off")]),
        (b"00050 Log Info cut00005 Ready", [Noise("00050 Log Info cut"), Ready()]),
    ],
)
def test_noise(data: bytes, events: list[Message | Noise]) -> None:
    assert read(data) == events


def test_a_body_that_does_not_arrive_is_waited_for_three_seconds() -> None:
    reader = Reader()
    assert reader.feed(b"00029 Log Info cut\n00005 Rea", 1.0) == []
    assert reader.due() == 1.0 + PATIENCE_S
    assert reader.tick(3.9) == []
    assert reader.tick(4.0) == [Noise("00029 Log Info cut")]
    assert reader.feed(b"dy", 9.0) == [Ready()]
    assert reader.due() is None


def test_a_long_line_is_cut_and_the_rest_counted() -> None:
    assert read(b"x" * (MAX_LINE + 5) + b"\nend") == [Noise("x" * MAX_LINE, 5), Noise("end")]
    lines = Lines(4)
    assert lines.feed(b"abcdef\ngh") == [Noise("abcd", 2)]
    assert lines.end() == [Noise("gh")]


def test_of_a_flood_of_lines_the_rest_is_counted_together() -> None:
    reader = Reader()
    *lines, rest = reader.feed(b"yes\n" * 10_000, 0.0)
    assert lines == [Noise("yes")] * MAX_LINES
    assert rest == Noise("", 3 * (10_000 - MAX_LINES))
    assert reader.feed(frame("Step OK"), 0.0) == [StepOk()]


def test_sixty_four_mebibytes_of_noise_are_linear_and_leave_nothing() -> None:
    reader = Reader()
    for _ in range(1024):
        assert reader.feed(b"7" * 65_536, 0.0) == []
    assert reader.feed(b"00007 Step OK", 0.0) == [Noise("7" * MAX_LINE, 1024 * 65_536 - MAX_LINE), StepOk()]


PIECES = st.one_of(
    st.sampled_from(
        [
            *(b"00005 Ready", b"00007 Step OK", b"00012 Step Time 1", b"00014 Log Info a\nb", b"00012 Step Error "),
            *(
                b"\n",
                b"12",
                b"0",
                b" ",
                b"noise",
                b"00029 Log ",
                b"999999 Log ",
                b"7 Step OKx",
                b"00010 Wait For Webhook",
            ),
        ]
    ),
    st.binary(max_size=12),
)


@given(st.lists(PIECES, max_size=12), st.data())
def test_chunking_never_changes_the_events(pieces: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(pieces)
    whole = read(wire)
    reader, got = Reader(), list[Message | Noise]()
    while wire:
        n = data.draw(st.integers(1, len(wire)))
        got += reader.feed(wire[:n], 0.0)
        wire = wire[n:]
    assert [*got, *reader.eof()] == whole


@given(st.lists(st.sampled_from([b"Ready", b"Configured", b"Step OK", b"Log Info hello", b"Exit"]), max_size=8))
def test_no_noise_before_or_behind_a_frame_costs_it(bodies: list[bytes]) -> None:
    wire = b"".join(b"some noise, %05d %b and\n" % (len(body), body) for body in bodies)
    messages = [event for event in read(wire) if not isinstance(event, Noise)]
    assert len(messages) == len(bodies)
