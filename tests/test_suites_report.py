"""What is left of a run in its folder: written whole, from the journal, with corrections applied."""

import json
from pathlib import Path

import msgspec
import trio

from agent.core.events import Counts, SuiteFinished, TestFinished
from agent.core.store import open_store
from agent.suites.messages import Suite
from agent.suites.report import write_report

FINISHED = SuiteFinished(
    run="r-1", suite="login", runner="tap", driver="tap", verdict="blocked", result="FAILURE", code=0, signal=None,
    reason=None, started=1.0, ended=3.0, counts=Counts(),
)  # fmt: skip


def record(case: str, rev: int = 1, message: str | None = None) -> TestFinished:
    return TestFinished(
        run="r-1", suite="login", case=case, name=case, file=None, state="failed" if message else "passed", ended=2.0,
        rev=rev, message=message,
    )  # fmt: skip


async def test_the_report_holds_what_the_journal_holds(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state", reserve=4096)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stdout.log").write_text("said\n")
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for event in (record("a"), record("b"), record("b", 2, "expected 401"), record("c")):
            store.append(event, 2.0)
        store.append(msgspec.structs.replace(record("other"), run="r-2"), 2.0)
        await store.commit()
        nursery.cancel_scope.cancel()
    done = write_report(store, Suite(id="login", runner="tap"), FINISHED, folder, "lab-07")
    store.close()
    assert (done.verdict, done.result, done.counts) == ("failed", "FAILURE", Counts(total=3, passed=2, failed=1))
    result = json.loads((folder / "result.json").read_bytes())
    assert [(test["case"], test["state"], test["rev"]) for test in result["tests"]] == [
        ("a", "passed", 1), ("b", "failed", 2), ("c", "passed", 1),
    ]  # fmt: skip
    assert sorted(done.artifacts) == sorted(result["artifacts"]) == ["stdout.log", "xunit.xml"]
    assert done.artifacts["stdout.log"].size == 5
    assert b'hostname="lab-07"' in (folder / "xunit.xml").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"result.json", "stdout.log", "xunit.xml"}
