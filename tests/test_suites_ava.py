"""agent/suites/runners/ava.py: how AVA is launched."""

import json
from pathlib import Path
from typing import Any

import pytest

from agent.core.errors import DocumentError
from agent.suites.messages import Limits, Requires, Suite
from agent.suites.runners import ava
from agent.suites.runners.ava import launch, pattern
from agent.suites.runners.driver import CannotLaunch, Launch, Only

SCRATCH = Path("/scratch")


def install(project: Path, version: str = "7.0.0", program: str = "entrypoints/cli.mjs") -> str:
    package = project / "node_modules/ava"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": version, "bin": {"ava": program}}))
    return str(package / program)


def start(project: Path, *, only: tuple[Only, ...] = (), **fields: Any) -> Launch:
    return launch(Suite(id="s", runner="ava", **fields), project, SCRATCH, "r1", only=only)


def test_the_command_line(tmp_path: Path) -> None:
    cli = install(tmp_path)
    started = start(
        tmp_path,
        files=("a.js", "b/*.js"),
        match=("*x", "y"),
        args=("--serial", "--config=c.mjs", "--", "--mine"),
        limits=Limits(run=90.5),
    )
    assert started.argv == (
        *("node", cli, "--tap", "--timeout=3690s", "--match=*x", "--match=y", "--serial", "--config=c.mjs"),
        *("a.js", "b/*.js", "--", "--mine"),
    )
    assert started.set_env == {"CI": "1", "NO_COLOR": "1", "EMISSARY_RUN": "r1", "EMISSARY_SUITE": "s"}
    assert {"CI_NODE_INDEX", "SEMAPHORE_JOB_COUNT", "BITBUCKET_PARALLEL_STEP_COUNT"} <= set(started.unset_env)
    assert (started.pipes, started.files) == ((), {})


@pytest.mark.parametrize(("run", "timeout"), [(0, 2_147_483), (1e9, 2_147_483), (60, 3660)])
def test_avas_own_timeout_never_comes_first(tmp_path: Path, run: float, timeout: int) -> None:
    install(tmp_path)
    assert f"--timeout={timeout}s" in start(tmp_path, limits=Limits(run=run)).argv


def test_ava_is_found_where_node_finds_it(tmp_path: Path) -> None:
    cli = install(tmp_path, "8.0.1", "cli.js")
    (tmp_path / "packages/one").mkdir(parents=True)
    assert start(tmp_path / "packages/one").argv[:2] == ("node", cli)


def test_without_ava_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CannotLaunch, match=r"there is no AVA in .*Let `setup` install it"):
        start(tmp_path)


@pytest.mark.parametrize(
    "text", ["not json", "[]", "{}", '{"version": "7", "bin": "c.js"}', '{"bin": "c.js"}', "[" * 10**5], ids=range(6)
)
def test_an_ava_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    install(tmp_path)
    (tmp_path / "node_modules/ava/package.json").write_text(text)
    with pytest.raises(CannotLaunch, match=r"node_modules/ava/package\.json cannot be used"):
        start(tmp_path)


def test_a_required_version(tmp_path: Path) -> None:
    with pytest.raises(CannotLaunch, match=r"AVA is not in node_modules, the suite requires >=6"):
        start(tmp_path, command=("x",), requires=Requires(runners={"ava": ">=6"}))
    cli = install(tmp_path, "6.4.1")
    assert start(tmp_path, requires=Requires(runners={"ava": ">=6, <7"})).argv[1] == cli
    with pytest.raises(CannotLaunch, match=r"AVA is 6\.4\.1, the suite requires >=7"):
        start(tmp_path, requires=Requires(runners={"ava": ">=7"}))


def test_command_stands_in_for_node_and_ava(tmp_path: Path) -> None:
    assert start(tmp_path, command=("yarn", "ava")).argv[:3] == ("yarn", "ava", "--tap")


@pytest.mark.parametrize(
    "arg",
    ["--tap", "--no-tap", "-t", "--watch", "-w", "-sw", "--timeout", "--timeout=5s", "-T5s", "-vT"],
)
def test_arguments_that_would_break_the_reading_are_refused(tmp_path: Path, arg: str) -> None:
    install(tmp_path)
    with pytest.raises(DocumentError, match=rf"suite: args: {arg} cannot be given to AVA"):
        start(tmp_path, args=("--serial", arg))


@pytest.mark.parametrize("arg", ["-c4", "-mtest", "-m=*w*", "--match=t", "-s", "-v", "--node-arguments=--watch"])
def test_other_arguments_are_not(tmp_path: Path, arg: str) -> None:
    install(tmp_path)
    assert arg in start(tmp_path, args=(arg,)).argv
    assert "--watch" in start(tmp_path, args=("--", "--watch")).argv  # the tests' own


@pytest.mark.parametrize("word", ["debug", "reset-cache"])
def test_avas_commands_are_refused(tmp_path: Path, word: str) -> None:
    install(tmp_path)
    with pytest.raises(DocumentError, match="is a command of AVA's"):
        start(tmp_path, args=(word,))


@pytest.mark.parametrize("version", ["6.4.1", "7.0.0", "8.0.1", "8.9.9"])
@pytest.mark.parametrize("config", [("--config", "my.mjs"), ("--config=my.mjs",)])
def test_driver_events_puts_the_observer_between(tmp_path: Path, version: str, config: tuple[str, ...]) -> None:
    install(tmp_path, version)
    started = start(tmp_path, driver="events", args=("--serial", *config), files=("a.js",))
    assert started.argv[4:] == ("--serial", "--config", "/scratch/config.mjs", "a.js")
    assert started.set_env["EMISSARY_AVA_CONFIG"] == "my.mjs"
    assert started.pipes == ("events",)
    plugin = Path(ava.__file__).with_name("plugins") / "emissary_ava.mjs"
    assert started.files == {"config.mjs": plugin.read_bytes()}
    assert "EMISSARY_AVA_CONFIG" not in start(tmp_path, driver="events").set_env


@pytest.mark.parametrize("version", ["6.3.0", "5.3.1", "9.0.0"])
def test_an_ava_without_the_experiment_is_read_as_tap(tmp_path: Path, version: str) -> None:
    install(tmp_path, version)
    started = start(tmp_path, driver="events", args=("--config=my.mjs",))
    assert started.argv[4:] == ("--config=my.mjs",)
    assert (started.pipes, started.files) == ((), {})


def test_to_run_again(tmp_path: Path) -> None:
    install(tmp_path)
    only = (Only("a.js", "x"), Only("b.js", "y"), Only("a.js", "y"))
    assert start(tmp_path, files=("*.js",), only=only).argv[4:] == ("--match=x", "--match=y", "a.js", "b.js")
    assert start(tmp_path, files=("*.js",), only=(Only("b.js"),)).argv[4:] == ("b.js",)
    assert start(tmp_path, files=("*.js",), only=(Only(None, "x"),)).argv[4:] == ("--match=x", "*.js")
    assert start(tmp_path, match=("*l*",), only=(Only("a.js", "x"),)).argv[4:] == ("--match=x", "a.js")
    assert start(tmp_path, match=("*l*",), only=(Only("a.js"),)).argv[4:] == ("--match=*l*", "a.js")


@pytest.mark.parametrize(
    ("name", "got"), [("a b", "a b"), ("a*b", "a*b"), (r"a\*b\c", "a*b*c"), ("!a", "*a"), ("a… (cut)", "a*")]
)
def test_a_title_as_a_pattern(name: str, got: str) -> None:
    assert pattern(name) == got
