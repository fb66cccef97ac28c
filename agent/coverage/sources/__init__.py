"""Probe sources: what sees which code of the product runs. All have one shape, `Source`.

A source is made with the settings, the catalog, a folder of the run that only the agent may read, and `asking`.
Source: drill sheet, "Probe sources".
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec

from agent.coverage.catalog import Delta


class Warned(msgspec.Struct, frozen=True):
    """Something a person should know about the coverage, as one sentence; the role makes a CoverageWarning of it.

    `passes`: it may be over soon, and is nothing for the result of a run.
    """

    text: str
    passes: bool = False


class Lost(msgspec.Struct, frozen=True):
    """Coverage of some classes is gone for good, and why; the role makes a CoverageLost of it."""

    classes: int
    why: str


Asking: TypeAlias = Callable[[str], AbstractContextManager[object]]  # in it a thread waits for the disk of that path

MOST_NAMED = 5  # of what one warning is about


def listed(names: Iterable[str]) -> str:
    """A few of the names, in order, and how many more there are: for a warning."""
    names = sorted(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class Source(Protocol):
    """Where deltas come from. All is called from one task."""

    def env(self) -> dict[str, str]:
        """For runners started from now on. NODE_OPTIONS and PYTHONPATH are to be added to what is there."""

    async def prepare(self, roots: Sequence[Path]) -> None:
        """Read the product's files below the roots into the catalog. When it is cancelled nothing is read."""

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
