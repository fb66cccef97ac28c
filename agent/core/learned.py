"""The events of what was learned from logs: forecasts of failures, what is unusual, and that classes no longer fit.

Source: protocols/logs.md 2.3 and 4.
"""

from typing import Literal

import msgspec

from agent.core.event import Event


class LogEvidence(msgspec.Struct, frozen=True):
    """A line that led to a forecast."""

    path: str
    offset: int
    text: str
    template: int


class LogForecast(Event, frozen=True, kw_only=True):
    """A failure is to be expected within `horizon_s`, or was: `state` says what became of the forecast of this `id`.

    `key` is what the failure's lines share (a unit, a volume; else the log). `expected_s` are the 10 % and 90 %
    quantiles of the time to the failure. `probability` is calibrated; `evidence` is oldest first. `sampled`: not every
    line was looked at. `suppressed` others were not made before it, for too many were open.
    """

    path: str
    id: str
    state: Literal["open", "hit", "expired"]
    class_: str = msgspec.field(name="class")
    probability: float
    horizon_s: float
    expected_s: tuple[float, float]
    key: str
    evidence: tuple[LogEvidence, ...] = ()
    sampled: bool = False
    suppressed: int = 0
    run: str | None = None
    test: str | None = None


class LogDrift(Event, frozen=True, kw_only=True):
    """Guessed classes were `wrong`, or `unknown`, far more often of late: shares of the last `window` and of before."""

    what: Literal["wrong", "unknown"]
    before: float
    now: float
    window: int


class LogNovelty(Event, frozen=True, kw_only=True):
    """A line of a template that was never seen on this machine, in a log that is well known by now.

    `pattern` is the template's text. `suppressed` others of the log were not told before it, for they came too fast.
    """

    path: str
    generation: int
    offset: int
    template: int
    pattern: str
    text: str
    suppressed: int = 0
    run: str | None = None
    test: str | None = None


class LogRate(Event, frozen=True, kw_only=True):
    """Lines of a template come far more often than they did (`rose`), or far less (`fell`).

    `count` is that of a window of `window_s` (of one that is not over yet, where it rose), `mean` the usual one.
    `suppressed` others of the log were not told before it, for they came too fast.
    """

    path: str
    template: int
    pattern: str
    what: Literal["rose", "fell"]
    count: int
    mean: float
    window_s: float
    suppressed: int = 0
