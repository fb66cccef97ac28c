"""A machine without a real-time clock waits for the date, and not for ever."""

import ctypes

import pytest
import trio
from trio.testing import MockClock

from agent.core import clock


def test_the_kernel_is_asked() -> None:
    libc = ctypes.CDLL(None)
    assert clock.is_synchronised() is (libc.adjtimex(ctypes.create_string_buffer(256)) != 5)


async def test_waiting_ends_when_the_clock_is_synchronised(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "is_synchronised", lambda: trio.current_time() >= 30)
    assert await clock.wait_synchronised(120)
    assert trio.current_time() == pytest.approx(30)


async def test_waiting_ends_when_it_has_lasted_long_enough(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    assert not await clock.wait_synchronised(120)
    assert trio.current_time() == pytest.approx(120)
