"""What every test shares: hypothesis profiles and how long a soak lasts."""

import os

import pytest
from hypothesis import settings

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
