"""The events of coverage: what is covered from now on, what was reached, and what could not be measured or kept.

Source: protocols/drill.md, "Purpose and place", "Failure behaviour".
"""

from typing import Literal

from agent.core.event import Event


class CoverageArmed(Event, frozen=True, kw_only=True):
    """Runners started from now on are covered by these sources; `coverage_open` gives each its environment."""

    sources: tuple[str, ...]


class CoverageDisarmed(Event, frozen=True, kw_only=True):
    """Runners started from now on are not covered."""


class CoverageSession(Event, frozen=True, kw_only=True):
    """A session of the Drill admin went to another state. `owed`: its end could not be told to the admin yet."""

    session: str
    state: Literal["running", "stopping", "owed", "done", "cancelled"]


class CoverageWarning(Event, frozen=True, kw_only=True):
    """A session, or a run that asked for coverage, gets less than it asked for; `text` says why and what to do."""

    session: str
    text: str


class CoverageLost(Event, frozen=True, kw_only=True):
    """Coverage of `classes` classes was seen and is not told, for the reason in `why`. Without a `session`: of all."""

    session: str
    classes: int
    why: str


class CoverageReport(Event, frozen=True, kw_only=True):
    """The coverage of a run that asked for it: how many source lines its `files` have, and how many were reached."""

    run: str
    files: int
    lines: int
    covered: int
