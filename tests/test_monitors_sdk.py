"""The library for authors of monitors, in real programs: what a step may do, and what becomes of its mistakes."""

import ast
import sys
from pathlib import Path

import pytest

from tests.monitors_house import SDK, house, monitor


def written(folder: Path, steps: str) -> tuple[str, ...]:
    """The argv of a monitor with the library; `steps` are its functions, by whose names they are called."""
    path = folder / "monitor.py"
    names = [line[4:].partition("(")[0] for line in steps.splitlines() if line.startswith("def ")]
    table = ", ".join(f"{name!r}: {name}" for name in names)
    path.write_text(
        f"import os, subprocess, sys\nsys.path.insert(0, {str(SDK)!r})\nimport sdk\n{steps}\nsdk.run({{{table}}})\n"
    )
    return (sys.executable, "-S", str(path))


async def test_a_step_may_start_what_reads_its_input(tmp_path: Path) -> None:
    """As ssh does: the next order is not for it."""
    steps = """
def Reads(config): subprocess.run(["cat"], check=True); print(repr(sys.stdin.read()))
def Next(config): pass
"""
    async with house(tmp_path, monitor(written(tmp_path, steps), steps=("Reads", "Next"))) as here:
        assert [step.state for step in await here.run_once()] == ["ok", "ok"]


async def test_what_cannot_be_said_is_the_steps_error(tmp_path: Path) -> None:
    steps = """
def Key(config): return sdk.Timed(1, {"two words": 1})
def Time(config): return sdk.Timed(float("nan"))
def Many(config): return sdk.Timed(1, {f"k{n}": n for n in range(1000)})
def Name(config): open(os.fsdecode(b"/\\xff"))
def Long(config): raise ValueError("é" * 100_000)
def Good(config): return sdk.Timed(1.5, {"a.b-c": "é x"})
"""
    names = ("Key", "Time", "Many", "Name", "Long", "Good")
    given = monitor(written(tmp_path, steps), steps=names, on_error="continue")
    async with house(tmp_path, given) as here:
        key, time, many, name, long, good = await here.run_once()
    assert key.text == "ValueError: 'two words' cannot be a key of metadata. Use A-Z a-z 0-9 . _ -"
    assert time.text == "ValueError: nan is no time in seconds"
    assert many.text is not None
    assert many.text.startswith("ValueError: metadata of ")
    assert (name.state, "FileNotFoundError" in str(name.text)) == ("error", True)
    assert (long.state, str(long.text)[:13]) == ("error", "ValueError: é")
    assert (good.state, good.ms, good.metadata) == ("ok", 1500.0, {"a.b-c": "é x"})


@pytest.mark.parametrize("dialect", ["metrist", "seed", "auto"])
async def test_a_time_is_said_in_the_unit_of_who_asks(tmp_path: Path, dialect: str) -> None:
    steps = "def Good(config): return sdk.Timed(0.25)"
    async with house(tmp_path, monitor(written(tmp_path, steps), steps=("Good",), dialect=dialect)) as here:
        [step] = await here.run_once()
    assert (step.state, step.ms, step.timed_by) == ("ok", 250.0, "monitor")


def test_an_older_python_can_read_it() -> None:
    ast.parse((SDK / "sdk.py").read_text(), feature_version=(3, 7))
