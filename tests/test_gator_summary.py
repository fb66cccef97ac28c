"""The sums that a tier keeps, child by child."""

import msgspec
import pytest

from agent.gator.messages import MAX_PATHS
from agent.gator.spec import Size
from agent.gator.summary import Summary, Sums, Total, expected, given_up, job_summary


def test_a_childs_newest_summary_replaces_its_last() -> None:
    total = Total()
    total.put("a", expected(Size(1, 0)))
    total.put("b", expected(Size(3, 1)))
    assert (total.jobs, total.tiers) == (Sums(total=4), Sums(total=1))
    total.put("a", job_summary("a", {"msg_error": 2, "lint": 3}, passed=None))
    total.put("b", Summary(jobs=Sums(3, 1, 1, 1), tiers=Sums(1, 1), metrics={"lint": 4}, failed=(("b", "x"),)))
    assert (total.jobs, total.metrics) == (Sums(4, 2, 1, 1), {"msg_error": 2, "lint": 7})
    assert total.running("g") == (("g", "a"),)
    total.put("a", job_summary("a", {"msg_error": 5}, passed=False))
    assert (total.jobs, total.metrics["msg_error"], total.metrics["lint"]) == (Sums(4, 1, 1, 2), 5, 4)
    assert set(total.failed("g")) == {("g", "b", "x"), ("g", "a")}


@pytest.mark.parametrize("passed", [None, True, False])
def test_a_job_is_counted_in_numbers(passed: bool | None) -> None:
    counts = msgspec.json.encode(job_summary("a", {}, passed=passed).jobs)
    own = passed is None, passed is True, passed is False
    assert counts == b'{"total":1,"active":%d,"passed":%d,"failed":%d}' % own


def test_what_is_pruned_counts_no_more() -> None:
    total = Total()
    for told in (expected(Size(5, 2)), job_summary("a", {}, passed=None), job_summary("a", {}, passed=False)):
        total.put("a", told)
        total.put("a", None)
        assert (total.jobs, total.tiers) == (Sums(), Sums())
        assert (total.failed("g"), total.running("g")) == ((), ())


def test_lists_of_paths_are_bounded() -> None:
    total = Total()
    for n in range(MAX_PATHS + 5):
        total.put(str(n), job_summary(str(n), {}, passed=False))
    assert len(total.failed("g")) == MAX_PATHS


def test_of_a_lost_tier_what_had_passed_has() -> None:
    last = Summary(jobs=Sums(5, 2, 2, 1), tiers=Sums(2, 2), failed=(("t", "x"),), running=(("t", "y"), ("t", "z")))
    lost = given_up(Size(5, 2), "t", last)
    assert (lost.jobs, lost.tiers, lost.running) == (Sums(5, 0, 2, 3), Sums(2, 0, 0, 2), ())
    assert lost.failed == (("t", "x"), ("t", "y"), ("t", "z"))
    silent = given_up(Size(5, 3), "t", Summary(jobs=Sums(5, 2, 3), tiers=Sums(3, 2, 1)))
    assert (silent.jobs, silent.tiers, silent.failed) == (Sums(5, 0, 3, 2), Sums(3, 0, 1, 2), (("t",),))
