"""Lines for somebody who reads them, or does not."""

import os
import select
import threading

import pytest
import trio

from agent.core.outflow import Outflow
from tests.test_core_spawn import pipe

WITHIN_S = 120.0
LONG = b"x" * 100_000 + b"\n"  # more than a pipe takes


def to(fd: int) -> Outflow:
    return Outflow(fd, "the pipe", lambda count: b"%d dropped\n" % count)


async def test_nobody_waits_and_all_arrives_in_order() -> None:
    lines = [b"%d\n" % number for number in range(50_000)]
    with pipe() as (reading, writing):
        out, got = to(writing), bytearray()
        for line in lines:
            out.put(line, 10**6)
        out.close()
        with trio.fail_after(WITHIN_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(out.keep_writing)
                while len(got) < sum(map(len, lines)):
                    await trio.lowlevel.wait_readable(reading)
                    got += os.read(reading, 65_536)
    assert bytes(got) == b"".join(lines)


async def test_what_is_beyond_the_room_is_dropped_and_counted_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with pipe() as (reading, writing):
        out = to(writing)
        for room in (8, 8, 8, 8, 100, 8):
            out.put(b"a b\n", room)
        out.close()
        with trio.fail_after(WITHIN_S):
            await out.keep_writing()
        assert os.read(reading, 65_536) == b"a b\na b\n2 dropped\na b\n1 dropped\n"
    assert caplog.messages == ["the pipe is read too slowly: lines are dropped"] * 2


async def test_a_reader_that_stands_still_is_given_up_when_all_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    out = to(writing)
    out.put(LONG, 10**6)
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.keep_writing)
            await trio.lowlevel.wait_readable(reading)
            out.close(0.1)
    assert caplog.messages == ["the pipe is not read: 1 lines dropped"]
    os.close(reading)  # the thread that writes is told so
    os.close(writing)


async def test_a_reader_that_went_away_is_an_error_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    out = to(writing)
    out.put(b"a\n", 100)
    with trio.fail_after(WITHIN_S), pytest.raises(BrokenPipeError):
        await out.keep_writing()
    out.put(b"b\n", 100)
    out.close()
    os.close(writing)


async def test_a_descriptor_that_never_waits_is_waited_for() -> None:
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        while select.select([], [writing], [], 0)[1]:
            os.write(writing, b" " * select.PIPE_BUF)
        out = to(writing)
        out.put(b"a\n", 100)
        out.close()
        read = bytearray()

        def drain() -> None:
            while not read.endswith(b"a\n"):
                read.extend(os.read(reading, 65_536))

        reader = threading.Thread(target=drain)
        with trio.fail_after(WITHIN_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(out.keep_writing)
                await trio.testing.wait_all_tasks_blocked()
                reader.start()
        reader.join(WITHIN_S)
    assert read.endswith(b" a\n")
