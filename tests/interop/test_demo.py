"""`agent demo` with real AVA and real pytest: each of the ways a test can end, from the lab's order to its graph."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.interop

GOOD = """
import test from 'ava';
test('passes', t => t.pass());
test('fails', t => t.is(1, 2));
test('throws', () => { throw new Error('boom'); });
test.failing('fails as expected', t => t.fail());
test.skip('is skipped', t => t.pass());
test.todo('is still to do');
test('logs', t => { t.log('a line'); t.pass(); });
"""
CRASHES = """
import test from 'ava';
test('before the crash', t => t.pass());
test('kills its process', () => new Promise(() => setTimeout(() => process.kill(process.pid, 'SIGKILL'), 1000)));
test.todo('never matters');
"""
HANGS = """
import test from 'ava';
test('ends in time', t => t.pass());
test('hangs', () => new Promise(resolve => setTimeout(resolve, 600_000)));
"""
SUITE = """
id = "ways-to-end"
runner = "ava"
driver = "{driver}"
files = ["good.js", "crashes.js", "hangs.js"]
args = ["--no-worker-threads"]
limits = {{ stall = 20, grace = 2 }}
"""


def demo(project: Path) -> tuple[int, dict[str, Any]]:
    env = {**os.environ, "XDG_CACHE_HOME": str(project.parent / "cache")}
    argv = [sys.executable, "-m", "agent", "demo", "--suite", str(project), "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=240, env=env)
    result: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, result


def states(result: dict[str, Any]) -> dict[str, str]:
    return {test["case"]: test["state"] for test in result["tests"] if test["kind"] == "test"}


def test_every_way_an_ava_test_ends(tmp_path: Path, npm_project: Callable[..., Path], node: Path) -> None:
    """With either driver, at the same time: a slow machine may need a while for the first results."""

    def project(driver: str) -> Path:
        folder = tmp_path / driver
        folder.mkdir()
        (folder / "node_modules").symlink_to(npm_project("ava@6.4.1") / "node_modules")
        (folder / "package.json").write_text('{"type": "module", "devDependencies": {"ava": "6.4.1"}}')
        for name, text in {"good.js": GOOD, "crashes.js": CRASHES, "hangs.js": HANGS}.items():
            (folder / name).write_text(text)
        (folder / "suite.toml").write_text(SUITE.format(driver=driver))
        return folder

    with ThreadPoolExecutor(2) as pool:
        (tap_code, tap), (events_code, events) = pool.map(demo, [project("tap"), project("events")])
    assert (tap_code, events_code) == (1, 1)
    for result in (tap, events):
        assert (result["verdict"], result["result"]) == ("aborted", "ABORTED")
        assert result["reason"] == "limits.stall: no new result for 20 s"
        got = states(result)
        assert {case: got.get(case) for case in KNOWN} == KNOWN
        crash = next(test for test in result["tests"] if test["kind"] == "crash")
        assert (crash["file"], crash["state"]) == ("crashes.js", "blocked")
    rest = {"crashes.js › kills its process": "aborted", "hangs.js › hangs": "aborted"}
    assert {case: states(events).get(case) for case in rest} == rest
    assert events["counts"]["total"] == len(states(events))
    # TAP knows the hung and the killed test by number only.
    assert not states(tap).keys() & rest.keys()
    unreported = {test["state"] for test in tap["tests"] if test["kind"] == "rest"}
    assert unreported
    assert unreported <= {"aborted", "blocked"}


KNOWN = {
    "good.js › passes": "passed",
    "good.js › fails": "failed",
    "good.js › throws": "failed",
    "good.js › fails as expected": "passed",
    "good.js › is skipped": "skipped",
    "good.js › is still to do": "todo",
    "good.js › logs": "passed",
    "crashes.js › before the crash": "passed",
    "crashes.js › never matters": "todo",
    "hangs.js › ends in time": "passed",
}


def test_every_way_a_pytest_test_ends(tmp_path: Path, python_peer: Callable[..., Path]) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_ways.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
        "@pytest.mark.xfail\ndef test_xfails(): assert False\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_without_its_fixture(broken): pass\n"
        "def test_zzz_kills_the_runner(): os.kill(os.getpid(), 9)\n"
        "def test_zzz_never_begins(): pass\n"
    )
    python = python_peer("pytest==9.2.0")
    (project / "suite.toml").write_text(
        f'id = "ways"\nrunner = "pytest"\ncommand = ["{python}", "-m", "pytest", "-p", "no:cacheprovider"]\n'
    )
    code, result = demo(project)
    assert (code, result["verdict"], result["signal"]) == (1, "lost", "SIGKILL")
    assert {case.removeprefix("test_ways.py › "): state for case, state in states(result).items()} == {
        "test_passes": "passed", "test_fails": "failed", "test_skipped": "skipped", "test_xfails": "todo",
        "test_without_its_fixture": "blocked", "test_zzz_kills_the_runner": "lost", "test_zzz_never_begins": "lost",
    }  # fmt: skip
