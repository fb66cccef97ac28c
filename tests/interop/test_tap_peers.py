"""Real producers of TAP against runner `tap`, and another reader of TAP against ours."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.events import TestFinished, Warned
from agent.suites.messages import Suite
from agent.suites.runners.driver import DriverEvent
from agent.suites.runners.tap import TapDriver, launch
from tests.runner_process import run, states

pytestmark = pytest.mark.interop

TAPE = """\
const test = require('tape');
test('first', t => { t.equal(1, 1); t.equal(1, 2, 'one is two'); t.skip('not now'); t.end(); });
test('todo', { todo: true }, t => { t.ok(false, 'later'); t.end(); });
test('nested', t => { t.test('inner', s => { s.pass('deep # 1'); s.end(); }); t.end(); });
"""
TAP = """\
const t = require('tap');
t.test('first', t => { t.equal(1, 1); t.equal(1, 2, 'one is two'); t.end(); });
t.test('todo', { todo: 'later' }, t => { t.ok(false); t.end(); });
t.test('skipped', { skip: 'no' }, t => { t.end(); });
t.test('nested', t => { t.test('inner # hash', s => { s.pass('deep'); s.end(); }); t.end(); });
"""
NODE = """\
import test, { describe, it } from 'node:test';
import assert from 'node:assert';
test('passes', () => {});
test('fails # not', () => { assert.equal(1, 2); });
test('back \\\\ slash', () => {});
test('skipped', { skip: 'why # not' }, () => {});
test('todo fails', { todo: 'later' }, () => { throw new Error('x'); });
test('parent', async t => {
  await t.test('good', () => {});
  await t.test('bad', () => { throw new Error('boom'); });
});
test('fails itself', async t => { await t.test('fine', () => {}); throw new Error('own'); });
describe('suite', () => { it('a', () => {}); describe('inner', () => { it('b', { skip: true }, () => {}); }); });
"""
PYTEST = """\
import pytest
def test_ok(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not now")
def test_skip(): pass
@pytest.mark.xfail(reason="known")
def test_xfail(): assert 0
"""


def played(project: Path, *command: str | Path) -> list[DriverEvent]:
    suite = Suite(id="s1", runner="tap", command=tuple(map(str, command)))
    return run(launch(suite, project, project, "r1"), TapDriver("r1", "s1"), project, project)


def only(events: list[DriverEvent], name: str) -> TestFinished:
    """The record of that name that holds."""
    return [event for event in events if isinstance(event, TestFinished) and event.name.endswith(name)][-1]


def with_packages(installed: Path, tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / "node_modules").symlink_to(installed / "node_modules")
    (tmp_path / name).write_text(text)
    return tmp_path


def test_tape(node: Path, npm_project: Callable[..., Path], tmp_path: Path) -> None:
    project = with_packages(npm_project("tape@5.10.2"), tmp_path, "test.js", TAPE)
    events = played(project, node, "test.js")
    assert states(events) == {
        "should be strictly equal": "passed",
        "one is two": "failed",
        "not now": "skipped",
        "later": "todo",
        "deep # 1": "passed",
    }
    failed = only(events, "one is two")
    assert (failed.details["expected"], failed.details["actual"]) == (2, 1)
    assert "test.js:2:" in (failed.at or "")


def test_node_tap(node: Path, npm_project: Callable[..., Path], tmp_path: Path) -> None:
    project = with_packages(npm_project("tap@21.8.0"), tmp_path, "test.js", TAP)
    events = played(project, node, "test.js")
    assert states(events) == {
        "first › should be equal": "passed",
        "first › one is two": "failed",
        "todo": "passed",  # it says ok, with a directive: see the warning
        "skipped": "skipped",
        "nested › inner # hash › deep": "passed",
    }
    assert [event.code for event in events if isinstance(event, Warned)] == ["tap.directive"]
    failed = only(events, "one is two")
    assert (failed.at or "").startswith("test.js:2:")
    assert failed.details["diff"]


@pytest.mark.parametrize("arguments", [["--test", "--test-reporter=tap"], ["--test-reporter=tap"]])
def test_nodes_own_runner(node: Path, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "a.test.mjs").write_text(NODE)
    events = played(tmp_path, node, *arguments, "a.test.mjs")
    # Older ones tell the file as the parent of all.
    found = {case.removeprefix(f"{tmp_path}/a.test.mjs › "): state for case, state in states(events).items()}
    assert found == {
        "passes": "passed",
        "fails # not": "failed",
        "back \\ slash": "passed",
        "skipped": "skipped",
        "todo fails": "todo",
        "parent › good": "passed",
        "parent › bad": "failed",
        "fails itself › fine": "passed",
        "fails itself": "failed",
        "suite › a": "passed",
        "suite › inner › b": "skipped",
    }
    failed = only(events, "fails # not")
    assert failed.message is not None
    assert "1 == 2" in failed.message
    assert failed.duration is not None
    assert only(events, "skipped").message == "why # not"


def test_pytest_tap(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(PYTEST)
    python = python_peer("pytest==8.4.2", "pytest-tap==3.5")  # with pytest 9.2 it does not load
    # pytest's own lines stand between those of TAP, and are output.
    events = played(tmp_path, python, "-m", "pytest", "-p", "no:cacheprovider", "--tap")
    assert states(events) == {
        "test_a.py::test_ok": "passed",
        "test_a.py::test_bad": "failed",
        "test_a.py::test_skip": "skipped",
        "test_a.py::test_xfail": "todo",
    }


TAP_PY = """\
import sys
from tap.parser import Parser
for line in Parser().parse_text(sys.stdin.read()):
    if line.category == "test":
        print("skipped" if line.skip else "todo" if line.todo and not line.ok else "passed" if line.ok else "failed",
              line.description.removeprefix("- ").strip(), sep="\\t")
"""
STREAM = """\
TAP version 13
1..6
ok 1 - plain
not ok 2 - failed
# a comment
ok 3 - skipped # SKIP why
not ok 4 - later # TODO why
some output
ok 5 without a dash
not ok
"""


def test_tap_py_reads_the_same_from_a_plain_stream(python_peer: Callable[..., Path]) -> None:
    python = python_peer("tap.py==3.2.1")
    done = subprocess.run([python, "-c", TAP_PY], input=STREAM, capture_output=True, text=True, check=True)
    theirs = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]  # it warns there, too
    driver = TapDriver("r1", "s1")
    events = [*driver.feed("stdout", STREAM.encode(), 5.0), *driver.finish(1, None, None, 9.0)]
    ours = [[event.state, event.name] for event in events if isinstance(event, TestFinished)]
    assert [state for state, _ in ours] == [state for state, _ in theirs]
    assert [name for _, name in ours[:-1]] == [name for _, name in theirs[:-1]]
    assert (ours[-1][1], theirs[-1][1]) == ("test 6", "")
