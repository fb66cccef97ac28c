"""Each runner of a suite document has its launch and its driver."""

import sys
from pathlib import Path

import pytest

from agent.suites.messages import Suite
from agent.suites.runners import registry
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.command import CommandDriver
from agent.suites.runners.driver import Only
from agent.suites.runners.gator import GatorDriver
from agent.suites.runners.pytest import PytestDriver
from agent.suites.runners.tap import TapDriver


@pytest.fixture
def project(tmp_path: Path) -> Path:
    ava = tmp_path / "node_modules/ava"
    ava.mkdir(parents=True)
    (ava / "package.json").write_text('{"name": "ava", "version": "6.4.1", "bin": {"ava": "entrypoints/cli.mjs"}}')
    (ava / "entrypoints").mkdir()
    (ava / "entrypoints/cli.mjs").write_text("")
    (tmp_path / "spec.yaml").write_text("!Job {command: x}")
    return tmp_path


@pytest.mark.parametrize(
    ("suite", "driver", "program"),
    [
        (Suite(id="s", runner="ava"), AvaTap, "node"),
        (Suite(id="s", runner="ava", driver="events"), AvaEvents, "node"),
        (Suite(id="s", runner="pytest"), PytestDriver, "python3"),
        (Suite(id="s", runner="tap", command=("prove",)), TapDriver, "prove"),
        (Suite(id="s", runner="command", command=("true",)), CommandDriver, "true"),
        (Suite(id="s", runner="gator", files=("spec.yaml",)), GatorDriver, Path(sys.executable).name),
    ],
)
def test_a_runner_has_its_driver(project: Path, suite: Suite, driver: type, program: str) -> None:
    launch, made = registry.prepare(suite, project, project / "scratch", "r-1", 1, ())
    assert isinstance(made, driver)
    assert Path(launch.argv[0]).name == program
    assert launch.set_env["EMISSARY_RUN"] == "r-1"


def test_a_second_attempt_is_narrowed_and_numbered(project: Path) -> None:
    suite = Suite(id="s", runner="pytest")
    launch, driver = registry.prepare(suite, project, project, "r-1", 2, [Only("test_a.py", "test_x")])
    assert launch.files["only.json"] == b'[["test_a.py", "test_x"]]'
    assert isinstance(driver, PytestDriver)
