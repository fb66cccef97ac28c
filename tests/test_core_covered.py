"""The events of coverage survive the journal, and those of a run are shown under it."""

import msgspec
import pytest

from agent.core.covered import CoverageArmed, CoverageLost, CoverageReport, CoverageSession
from agent.core.events import AnyEvent, decode, scope


@pytest.mark.parametrize(
    "event",
    [
        CoverageArmed(sources=("v8", "python")),
        CoverageSession(session="s1", state="owed"),
        CoverageLost(session="s1", classes=3, why="max_pending_mib"),
        CoverageReport(run="r-1", files=2, lines=40, covered=31),
    ],
)
def test_it_survives_the_journal(event: AnyEvent) -> None:
    assert decode(type(event).__name__, msgspec.json.encode(event)) == event


def test_the_report_is_shown_under_its_run() -> None:
    assert scope(CoverageReport(run="r-1", files=2, lines=40, covered=31)) == ("r-1", None)
