"""junitparser reads our xUnit documents: the same counts, the same texts."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from agent.core.events import Counts, State, SuiteFinished, TestFinished
from agent.suites import result, xunit
from agent.suites.messages import Polarion, Report, Suite

pytestmark = pytest.mark.interop

READER = """\
import json, sys
from junitparser import JUnitXml
found = JUnitXml.fromfile(sys.argv[1])
(suite,) = list(found)
said = {"tests": suite.tests, "failures": suite.failures, "errors": suite.errors, "skipped": suite.skipped}
suite.update_statistics()
counted = {"tests": suite.tests, "failures": suite.failures, "errors": suite.errors, "skipped": suite.skipped}
cases = [{"name": case.name, "classname": case.classname, "time": case.time, "out": case.system_out,
          "result": [[type(each).__name__, each.type, each.message, each.text] for each in case.result]}
         for case in suite]
print(json.dumps({"said": said, "counted": counted, "cases": cases}))
"""
HARD = "\x1b[31mred\x1b[0m ]]> <&\"' 🦊 bell \x07"
SHOWN = "red ]]> <&\"' 🦊 bell \\x07"


def record(name: str, state: str, **more: Any) -> TestFinished:
    fields = {"run": "r1", "suite": "s1", "case": name, "name": name, "file": "a.js", "state": state, "ended": 2.0}
    return msgspec.convert(fields | more, TestFinished)


def test_counts_and_texts_are_read_as_they_were_meant(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    records = [record(state, state, message=state, duration=0.25) for state in get_args(State)]
    records += [
        record("hook", "blocked", kind="hook"),
        record("crash", "lost", kind="crash"),
        record("(not reported)", "aborted", kind="rest", count=3, file=None),
        record(HARD, "failed", message=HARD, details={"stack": HARD}, output=HARD),
        record("passed", "passed", case="passed@2", attempt=2, duration=0.25),
    ]
    tally = result.Tally(1)
    for each in records:
        tally.add(each)
    finished = SuiteFinished(
        run="r1", suite="s1", runner="ava", driver="tap", verdict="failed", result="FAILURE", code=1, signal=None,
        reason=None, started=0.0, ended=1.0, counts=Counts(),
    )  # fmt: skip
    suite = Suite(id="s1", runner="ava", report=Report(polarion=Polarion(project="P")))
    path = tmp_path / "xunit.xml"
    path.write_bytes(b"".join(xunit.document(suite, finished, lambda: tally.last(records), hostname="lab7")))
    python = python_peer("junitparser==5.0.3")
    done = subprocess.run([python, "-c", READER, path], capture_output=True, text=True, check=True)
    read = json.loads(done.stdout)

    assert read["said"] == read["counted"] == {"tests": 11, "failures": 2, "errors": 6, "skipped": 2}
    cases = {case["name"]: case for case in read["cases"]}
    assert len(cases) == 11
    assert cases["passed"]["result"] == []
    assert cases["failed"]["result"] == [["Failure", "failure", "failed", None]]
    assert cases["lost"]["result"] == [["Error", "error", "lost: lost", None]]
    assert cases["todo"]["result"] == [["Skipped", "skipped", "todo", None]]
    assert (cases["skipped"]["time"], cases["skipped"]["classname"]) == (0.25, "a.js")
    assert "3 tests not reported" in cases
    assert cases[SHOWN]["out"] == SHOWN
    assert cases[SHOWN]["result"] == [["Failure", "failure", SHOWN, f"stack: {SHOWN}"]]
