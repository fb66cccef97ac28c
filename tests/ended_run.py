"""The events of a run that has ended, for whoever reports it."""

from pathlib import Path
from typing import Any

import msgspec

from agent.core.events import Artifact, Counts, RunStarted, SuiteFinished


def started(run: str, **more: Any) -> RunStarted:
    """A run of the suite `login` was accepted; `more` are fields of the event."""
    event = RunStarted(
        run=run, suite="login", title="Login", runner="ava", driver="tap", source="dir", origin="control", slot=0
    )
    return msgspec.structs.replace(event, **more)


def finished(run: str, xunit: Path | None = None) -> SuiteFinished:
    """It has passed, and left an xUnit document at `xunit`."""
    return SuiteFinished(
        run=run,
        suite="login",
        runner="ava",
        driver="tap",
        verdict="passed",
        result="SUCCESS",
        code=0,
        signal=None,
        reason=None,
        started=1.0,
        ended=2.0,
        counts=Counts(total=1, passed=1),
        artifacts={"xunit.xml": Artifact(path=str(xunit), sha256="0" * 64, size=_size(xunit))} if xunit else {},
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
