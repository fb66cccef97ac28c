"""What every test shares: hypothesis profiles and how long a soak lasts."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import settings

T = TypeVar("T")

# No deadline: the machines are shared. In CI the same examples each time, so that a failure there can be repeated.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=0, metavar="SECONDS", help="how long each test of tests/faults lasts"
    )


@pytest.fixture
def soak_s(pytestconfig: pytest.Config) -> float:
    """How long a test of tests/faults goes on repeating its scenario; 0: once."""
    seconds: float = pytestconfig.getoption("--soak")
    return seconds


@pytest.fixture(autouse=True)
def virtual_time_waits_for_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autojump clock would run on while a thread works, by as much as the machine is busy: so there is none."""
    if "autojump_clock" not in request.fixturenames:
        return

    async def in_place(function: Callable[..., T], *args: Any, **options: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", in_place)
