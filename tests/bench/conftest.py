"""Benches hand their figures in; the last lines of `make bench` are a table of them, ready for the README."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.conftest import peer  # noqa: F401 - the fixture: absent peers fail under CI here too

FIGURES = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str, str, str], None]:
    """`figure(what, measured, goal)`: one row of the table, all as text with units."""
    rows = pytestconfig.stash.setdefault(FIGURES, [])
    return lambda what, measured, goal: rows.append((what, measured, goal))


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash.get(FIGURES, []):
        terminalreporter.section(machine())
        terminalreporter.write_line("| what | measured | goal |\n|---|---|---|")
        for row in rows:
            terminalreporter.write_line(f"| {' | '.join(row)} |")
