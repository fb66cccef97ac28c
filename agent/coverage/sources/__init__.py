"""Probe sources: what sees which code of the product runs. All have one shape, `Source`.

A source is made with the settings, the catalog and a folder of the run that only the agent may read.
Source: drill sheet, "Probe sources".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent.coverage.catalog import Delta


class Warned(msgspec.Struct, frozen=True):
    """Something a person should know about the coverage, as one sentence; the role makes a CoverageWarning of it."""

    text: str


class Lost(msgspec.Struct, frozen=True):
    """Coverage of some classes is gone for good, and why; the role makes a CoverageLost of it."""

    classes: int
    why: str


class Source(Protocol):
    """Where deltas come from. All is called from one task."""

    def env(self) -> dict[str, str]:
        """For runners started from now on. NODE_OPTIONS and PYTHONPATH are to be added to what is there."""

    async def prepare(self, roots: Sequence[Path]) -> None:
        """Read the product's files below the roots into the catalog."""

    async def start(self) -> None:
        """From now on probes count; what was seen before does not."""

    async def collect(self, *, final: bool = False) -> list[Delta]:
        """What was seen since the last call; none of it counts while the source is not started.

        `final`: the session ends, and nothing may wait for a next call. Call it each period as long as runners may
        live that were started with `env`, also when no session is open: files would pile up.
        """

    async def stop(self) -> None:
        """No probe counts any more. `start` may follow."""

    def alive(self) -> bool:
        """Does a covered process live? Then the last of its probes may be one period behind."""

    def told(self) -> list[Warned | Lost]:
        """What is to be said, new since the last call."""

    def why_empty(self) -> str:
        """Why nothing was collected since the start, as one sentence; "" when something was."""
