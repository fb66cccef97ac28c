"""The trees that run as suites, as the control server tells them."""

from agent.core.events import Counts, RunStarted, SuiteFinished, TestFinished, TestsSelected, TestStarted
from agent.gator.trees import MAX_ENDED, Trees


def started(run: str, runner: str = "gator") -> RunStarted:
    return RunStarted(
        run=run,
        suite="tree",
        title="",
        runner=runner,
        driver="tap",
        source="",
        origin="control",
        slot=0,
        reservation=None,
    )


def finished(name: str, state: str, file: str = "g/t", **details: object) -> TestFinished:
    return TestFinished(
        run="r-1",
        suite="tree",
        case=name,
        name=name,
        file=file,
        state=state,  # type: ignore[arg-type]  # a literal
        ended=5.0,
        details=details,
    )


def over(run: str) -> SuiteFinished:
    return SuiteFinished(
        run=run, suite="tree", runner="gator", driver="tap", verdict="failed", result="FAILURE", code=1, signal=None,
        reason=None, started=1.0, ended=9.0, counts=Counts(), warnings=(),
    )  # fmt: skip


def test_a_tree_is_told_as_the_seed_tells_it() -> None:
    trees = Trees()
    trees.feed(started("r-0", "ava"), 1.0)
    trees.feed(started("r-1"), 1.5)
    jobs = (("g", "a"), ("g/t", "x_0"), ("g/t", "x_1"), ("g/t", "x_2"))
    trees.feed(TestsSelected(run="r-1", suite="tree", tests=jobs), 2.0)
    trees.feed(TestStarted(run="r-1", suite="tree", case="x_1", name="x_1", file="g/t", started=3.0), 3.0)
    trees.feed(finished("x_0", "passed", metrics={"lint": 3}), 4.0)
    trees.feed(finished("x_2", "skipped"), 4.5)
    assert trees.states() == {
        "r-1": {"g": {"a": "PENDING", "t": {"x_0": "COMPLETE", "x_1": "STARTED", "x_2": "COMPLETE"}}}
    }
    assert trees.children() == {
        "r-1": {
            "state": "STARTED",
            "result": "UNKNOWN",
            "server": "",
            "metrics": {"lint": 3, "sub_total": 3, "sub_active": 1, "sub_passed": 1, "sub_failed": 0},
            "exitcode": 0,
            "started": 1,
            "updated": 4,
            "completed": 0,
            "pruned": False,
        }
    }
    trees.feed(over("r-1"), 9.0)
    child = trees.children()["r-1"]
    assert isinstance(child, dict)
    assert (child["state"], child["result"], child["exitcode"], child["completed"]) == ("COMPLETE", "FAILURE", 1, 9)


def test_of_trees_that_have_ended_only_the_newest_are_kept() -> None:
    trees = Trees()
    for n in range(MAX_ENDED + 3):
        trees.feed(started(f"r-{n}"), n)
        trees.feed(over(f"r-{n}"), n)
    assert len(trees.children()) == MAX_ENDED + 1
