"""Which runner and driver of a suite document is which module, imported when a suite first asks for it. Pure.

Source: protocols/suites.md, "The suite document" (`runner`, `driver`), "A run" (restart and power loss).
"""

from collections.abc import Sequence
from pathlib import Path

from agent.suites.messages import Suite
from agent.suites.runners.driver import Driver, Launch, Only


def remaining(suite: Suite, left: Sequence[tuple[str | None, str]], *, is_complete: bool) -> tuple[Only, ...] | None:
    """What a resumed run has to run, of which `left` (file, name) was selected and has not ended; (): all of it.

    None: nothing, all had ended. `is_complete`: the runner had told what it would run.

    pytest tells all that it will run before it begins. AVA tells of a file when it comes to it, if at all: so all of
    its files are run again, and what they give is what counts.
    """
    if suite.runner == "pytest" and is_complete:
        return tuple(Only(file, name) for file, name in left) or None
    return ()


def prepare(
    suite: Suite, project: Path, scratch: Path, run: str, attempt: int, only: Sequence[Only]
) -> tuple[Launch, Driver]:
    """How to start an attempt of the suite, and the driver that reads it. Raises CannotLaunch, DocumentError."""
    match suite.runner:
        case "ava":
            from agent.suites.runners import ava
            from agent.suites.runners.ava_events import AvaEvents
            from agent.suites.runners.ava_tap import AvaTap

            ava_driver = AvaEvents if suite.driver == "events" else AvaTap
            launch = ava.launch(suite, project, scratch, run, only=only)
            return launch, ava_driver(suite, run, attempt=attempt, only=only)
        case "pytest":
            from agent.suites.runners import pytest

            launch = pytest.launch(suite, project, scratch, run, only=only)
            return launch, pytest.PytestDriver(suite, run, attempt=attempt)
        case "tap":
            from agent.suites.runners import tap

            launch = tap.launch(suite, project, scratch, run)
            return launch, tap.TapDriver(run, suite.id, grace_s=suite.limits.grace)
        case "command":
            from agent.suites.runners import command

            launch = command.launch(suite, project, scratch, run)
            driver = command.CommandDriver(
                run,
                suite.id,
                suite.title or suite.id,
                codes={int(code): state for code, state in suite.codes.items()},
                grace_s=suite.limits.grace,
                output_max=suite.limits.test_output,
            )
            return launch, driver
        case "gator":
            from agent.suites.runners import gator

            launch = gator.launch(suite, project, scratch, run, only=only)
            return launch, gator.GatorDriver(suite, run, attempt=attempt)
