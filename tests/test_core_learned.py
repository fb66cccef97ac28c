"""What was learned from logs, as events: each comes back from the journal as it was."""

import msgspec

from agent.core.events import decode
from agent.core.learned import LogDrift, LogEvidence, LogForecast, LogNovelty, LogRate


def test_they_come_back_from_the_journal() -> None:
    evidence = LogEvidence("/var/log/a", 10, "disk is slow", 7)
    for event in (
        LogForecast(
            path="/var/log/a",
            id="lf-1",
            state="open",
            class_="disk",
            probability=0.9,
            horizon_s=300.0,
            expected_s=(10.0, 60.0),
            key="sda",
            evidence=(evidence,),
        ),
        LogDrift(what="wrong", before=0.1, now=0.5, window=64),
        LogNovelty(path="/var/log/a", generation=1, offset=0, template=3, pattern="x <*>", text="x 1"),
        LogRate(path="/var/log/a", template=3, pattern="x <*>", what="rose", count=100, mean=2.5, window_s=60.0),
    ):
        data = msgspec.json.encode(event)
        assert decode(type(event).__name__, data) == event


def test_the_names_on_the_wire() -> None:
    event = LogRate(path="a", template=3, pattern="x", what="fell", count=1, mean=2.5, window_s=60.0)
    assert msgspec.to_builtins(event) == {
        **{"path": "a", "template": 3, "pattern": "x", "what": "fell"},
        **{"count": 1, "mean": 2.5, "window_s": 60.0, "suppressed": 0},
    }
