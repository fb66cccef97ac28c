"""Each runner of a suite document has its launch and its driver."""

from pathlib import Path

import pytest

from agent.suites.messages import Suite
from agent.suites.runners import registry
from agent.suites.runners.ava_events import AvaEvents
from agent.suites.runners.ava_tap import AvaTap
from agent.suites.runners.command import CommandDriver
from agent.suites.runners.driver import CannotLaunch, Only
from agent.suites.runners.pytest import PytestDriver
from agent.suites.runners.tap import TapDriver


@pytest.fixture
def project(tmp_path: Path) -> Path:
    ava = tmp_path / "node_modules/ava"
    ava.mkdir(parents=True)
    (ava / "package.json").write_text('{"name": "ava", "version": "6.4.1", "bin": {"ava": "entrypoints/cli.mjs"}}')
    (ava / "entrypoints").mkdir()
    (ava / "entrypoints/cli.mjs").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("suite", "driver", "program"),
    [
        (Suite(id="s", runner="ava"), AvaTap, "node"),
        (Suite(id="s", runner="ava", driver="events"), AvaEvents, "node"),
        (Suite(id="s", runner="pytest"), PytestDriver, "python3"),
        (Suite(id="s", runner="tap", command=("prove",)), TapDriver, "prove"),
        (Suite(id="s", runner="command", command=("true",)), CommandDriver, "true"),
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


def test_a_runner_of_a_later_release_is_refused_by_name(project: Path) -> None:
    with pytest.raises(CannotLaunch, match="runner gator is not part of this agent"):
        registry.prepare(Suite(id="s", runner="gator", files=("spec.yaml",)), project, project, "r-1", 1, ())
