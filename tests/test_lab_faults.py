"""The switches do what they say, so that a test which turns one tests something."""

import pytest
import trio
from trio.testing import MockClock

from agent.core.errors import ActionError
from agent.lab.faults import Faults


async def test_late_is_late_and_cuts_are_counted(autojump_clock: MockClock) -> None:
    faults = Faults(late_s=7, cut=1)
    assert await faults.after()
    assert trio.current_time() == pytest.approx(7)
    assert not await faults.after()
    assert faults.cut == 0


async def test_silent_does_nothing_at_all(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1e6) as gave_up:
        await Faults(silent=True).before("")
    assert gave_up.cancelled_caught


async def test_only_what_holds_the_text_is_refused() -> None:
    await Faults().before("anything")
    await Faults(refuse="poison").before("good")
    with pytest.raises(ActionError, match="told to refuse what holds 'poison'"):
        await Faults(refuse="poison").before('{"a":"poisoned"}')
