"""The three dialects of Gator: their recorded frames in, and what we send to each."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent
from agent.core.errors import ActionError
from agent.gator import dialects
from agent.gator.messages import ApiJob
from agent.gator.spec import Size
from agent.gator.summary import Summary, Sums

JOB = Size(1, 0)
SEED_METRICS = {
    "msg_debug": 3,
    "msg_info": 5,
    "msg_warning": 2,
    "msg_error": 3,
    "msg_critical": 0,
    "lint_warnings": 123,
}
D2_UPDATE = json.loads(
    '{"ident":"job_env","summary":{"metrics":{"sub_total":1,"sub_active":0,"sub_passed":0,"sub_failed":1,"msg_critical":0,'
    '"msg_error":3,"msg_warning":0,"msg_info":6,"msg_debug":2},"failed_ids":[["job_env"]],"running_ids":[]},"result":2}'
)


def test_the_name_tells_d0_and_the_summary_d2() -> None:
    assert dialects.named("spec", {"ident": "a"}) == ("a", False)
    assert dialects.named("spec", {"id": "a"}) == ("a", True)
    assert dialects.named("spec", {"id": "b", "ident": "a"}) == ("a", False)
    assert dialects.child_dialect(False, D2_UPDATE) == "d2"
    assert dialects.child_dialect(False, {"metrics": {}}) == "d1"
    assert dialects.child_dialect(True, {"metrics": {}}) == "d0"
    with pytest.raises(ActionError, match="missing required field `ident`"):
        dialects.named("spec", {})


def test_the_seeds_update_is_read_with_its_sums_inside_or_beside() -> None:
    sums = {"sub_total": 10, "sub_active": 4, "sub_passed": 2, "sub_failed": 1}
    inside = {"ident": "child_a", "metrics": {**sums, **SEED_METRICS}}
    beside = {"ident": "child_a", "metrics": SEED_METRICS, **sums}
    for payload in (inside, beside):
        summary, result = dialects.read_update(payload, Size(10, 1))
        assert (summary.jobs, dict(summary.metrics), result) == (Sums(10, 4, 2, 1), SEED_METRICS, "UNKNOWN")


def test_d2s_recorded_update_is_read() -> None:
    summary, result = dialects.read_update(D2_UPDATE, JOB)
    assert (summary.jobs, summary.tiers, result) == (Sums(1, 0, 0, 1), Sums(), "FAILURE")
    assert summary.failed == (("job_env",),)
    assert "sub_total" not in summary.metrics
    assert summary.metrics["msg_error"] == 3


def test_d2s_tiers_are_told_from_its_jobs_by_the_spec() -> None:
    metrics = {"sub_total": 2, "sub_active": 0, "sub_passed": 2, "sub_failed": 0}  # a group of one job
    payload = {"ident": "g", "code": 0, "result": 1, "summary": {"metrics": metrics}}
    summary, result, code = dialects.read_complete("g", payload, Size(1, 1))
    assert (summary.jobs, summary.tiers, result, code) == (Sums(1, 0, 1, 0), Sums(1, 0, 1, 0), "SUCCESS", 0)


@pytest.mark.parametrize(
    ("sums", "size", "tiers"),
    [
        ((5, 1, 2, 1), Size(5, 2), Sums(2, 1, 0, 1)),
        ((5, 0, 3, 1), Size(5, 2), Sums(2, 1, 0, 1)),  # the last of its jobs has not begun
        ((5, 1, 4, 0), Size(5, 2), Sums(2, 1, 0, 0)),
        ((5, 0, 5, 0), Size(5, 2), Sums(2, 0, 2, 0)),
        ((5, 0, 4, 1), Size(5, 2), Sums(2, 0, 1, 1)),
        ((5, 0, 3, 2), Size(5, 2), Sums(2, 0, 1, 1)),
        ((1, 0, 1, 0), JOB, Sums()),
        ((1, 1, 0, 0), JOB, Sums()),
    ],
)
def test_d1s_tiers_are_done_when_all_of_its_jobs_are(sums: tuple[int, ...], size: Size, tiers: Sums) -> None:
    given = dict(zip(("sub_total", "sub_active", "sub_passed", "sub_failed"), sums, strict=True))
    summary, _ = dialects.read_update({"ident": "g", "metrics": {}, **given}, size)
    assert (summary.jobs, summary.tiers) == (Sums(*sums), tiers)


@pytest.mark.parametrize(
    ("sums", "failed", "running", "size", "jobs", "tiers"),
    [
        ((7, 3, 2, 1), 1, 1, Size(5, 2), Sums(5, 1, 1, 1), Sums(2, 2, 1, 0)),
        ((7, 2, 1, 0), 0, 1, Size(5, 2), Sums(5, 1, 0, 0), Sums(2, 1, 1, 0)),  # what has passed may be its inner tier
        ((7, 2, 4, 0), 0, 0, Size(5, 2), Sums(5, 0, 3, 0), Sums(2, 2, 1, 0)),  # nobody says what runs
        ((7, 0, 7, 0), 0, 0, Size(5, 2), Sums(5, 0, 5, 0), Sums(2, 0, 2, 0)),
        ((7, 0, 0, 7), 5, 0, Size(5, 2), Sums(5, 0, 0, 5), Sums(2, 0, 0, 2)),
        ((7, 3, 0, 4), 6, 3, Size(5, 2), Sums(5, 1, 0, 4), Sums(2, 2, 0, 0)),  # more paths than jobs
        ((9, 0, 0, 9), 9, 0, Size(5, 2), Sums(5, 0, 0, 5), Sums(4, 0, 0, 4)),
        ((3, 0, 3, 0), 0, 0, Size(5, 2), Sums(3, 0, 3, 0), Sums(0, 0, 0, 0)),
        ((1, 1, 0, 0), 0, 1, JOB, Sums(1, 1, 0, 0), Sums()),
    ],
)
def test_d2s_jobs_that_run_are_told_from_its_tiers_by_the_spec(
    sums: tuple[int, ...], failed: int, running: int, size: Size, jobs: Sums, tiers: Sums
) -> None:
    given = dict(zip(("sub_total", "sub_active", "sub_passed", "sub_failed"), sums, strict=True))
    paths = {"failed_ids": [["g", "x"]] * failed, "running_ids": [["g", "y"]] * running}
    summary, _ = dialects.read_update({"ident": "g", "result": 0, "summary": {"metrics": given, **paths}}, size)
    assert (summary.jobs, summary.tiers) == (jobs, tiers)
    assert summary.jobs + summary.tiers == Sums(*sums)


def d1_end(result: str, total: int, passed: int, failed: int) -> dict[str, Any]:
    return {"result": result, "code": 0, "metrics": {}, "sub_total": total, "sub_passed": passed, "sub_failed": failed}


def d2_end(result: int, total: int, passed: int, failed: int, *paths: list[str]) -> dict[str, Any]:
    sums = {"sub_total": total, "sub_active": 0, "sub_passed": passed, "sub_failed": failed}
    return {"result": result, "code": 0, "summary": {"metrics": sums, "failed_ids": list(paths)}}


@pytest.mark.parametrize(
    ("payload", "size", "jobs", "tiers", "result"),
    [
        # One of five was pruned, as a real D0 tier tells it: in the total, and SUCCESS with failed jobs.
        (d1_end("SUCCESS", 5, 3, 1), Size(5, 1), Sums(4, 0, 3, 1), Sums(1, 0, 0, 1), "FAILURE"),
        (d1_end("SUCCESS", 5, 4, 0), Size(5, 2), Sums(4, 0, 4, 0), Sums(2, 0, 2, 0), "SUCCESS"),
        (d1_end("FAILURE", 5, 4, 0), Size(5, 1), Sums(4, 0, 4, 0), Sums(1, 0, 0, 1), "FAILURE"),
        (d2_end(1, 7, 6, 0), Size(5, 2), Sums(4, 0, 4, 0), Sums(2, 0, 2, 0), "SUCCESS"),
        (d2_end(2, 7, 4, 2, ["g", "x"]), Size(5, 2), Sums(4, 0, 3, 1), Sums(2, 0, 1, 1), "FAILURE"),
        (d2_end(3, 7, 6, 0), Size(5, 2), Sums(5, 0, 5, 0), Sums(2, 0, 1, 1), "ABORTED"),
        # A job is what its result says, whatever it counts.
        ({"result": "SUCCESS", "code": 0, "metrics": {}}, JOB, Sums(1, 0, 1, 0), Sums(), "SUCCESS"),
        (d1_end("FAILURE", 1, 1, 0), JOB, Sums(1, 0, 0, 1), Sums(), "FAILURE"),
        (d2_end(3, 1, 0, 0), JOB, Sums(1, 0, 0, 1), Sums(), "ABORTED"),
        # Who has ended has failed or passed.
        (d2_end(0, 1, 0, 0), JOB, Sums(1, 0, 0, 1), Sums(), "FAILURE"),
        (d1_end("UNKNOWN", 1, 0, 0), JOB, Sums(1, 0, 0, 1), Sums(), "FAILURE"),
    ],
)
def test_what_a_foreign_child_came_to_is_told_by_its_result(
    payload: dict[str, Any], size: Size, jobs: Sums, tiers: Sums, result: str
) -> None:
    summary, told, _ = dialects.read_complete("g", payload, size)
    assert (summary.jobs, summary.tiers, told) == (jobs, tiers, result)
    assert bool(summary.failed) == (result != "SUCCESS")


def test_ours_tell_their_jobs_apart() -> None:
    done = Summary(Sums(4, 0, 3, 1), Sums(2, 0, 1, 1), {}, (("g", "x"),))  # one of five jobs was pruned
    told = dialects.completion("emissary", "g", done, "FAILURE", 0, plain=False)
    assert dialects.read_complete("g", told, Size(5, 2))[0] == done


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"ident": "a", "code": 0, "metrics": {}}, "missing required field `result`"),
        ({"ident": "a", "result": "SUCCESS", "metrics": {}}, "missing required field `code`"),
        ({"ident": "a", "result": "SUCCESS", "code": 0}, "missing required field `metrics`"),
        ({"ident": "a", "result": "FINE", "code": 0, "metrics": {}}, "'FINE' is not a valid result"),
        ({"ident": "a", "result": "SUCCESS", "code": 0, "metrics": {"x": "y"}}, "Expected `int | float`"),
        ({"ident": "a", "result": "SUCCESS", "code": 0, "metrics": {}, "sub_active": 2}, "2 jobs are still active"),
        ({"ident": "a", "summary": {"metrics": {"sub_active": 1}}, "result": 1, "code": 0}, "1 jobs are still active"),
        ({"ident": "a", "summary": {"metrics": {}}, "result": "SUCCESS", "code": 0}, "Expected `int`"),
        ({"ident": "a", "summary": {"metrics": {}}, "code": 0}, "`result` or `code`"),
        (
            {"ident": "a", "result": "SUCCESS", "code": 0, "metrics": {"sub_failed": -1}},
            "sub_failed is -1, which is no",
        ),
        (
            {"ident": "a", "summary": {"metrics": {"sub_passed": 0.5}}, "result": 1, "code": 0},
            "sub_passed is 0.5, which",
        ),
    ],
)
def test_a_bad_completion_is_refused(payload: dict[str, Any], said: str) -> None:
    with pytest.raises(ActionError, match=said):
        dialects.read_complete("a", payload, JOB)


def test_a_parent_is_told_by_its_answer_to_register() -> None:
    ours = dialects.register_answer(["root"], 2)
    assert ours == {"path": ["root"], "root": 0, "uidx": 2, "emissary": {"version": agent.__version__, "resume": True}}
    assert dialects.parent_dialect(ours, spec_says_id=False) == "emissary"
    assert dialects.parent_dialect({"path": [], "root": 0, "uidx": 1}, spec_says_id=False) == "d2"
    assert dialects.parent_dialect({}, spec_says_id=False) == "d1"
    assert dialects.parent_dialect({}, spec_says_id=True) == "d0"


FULL = Summary(Sums(3, 1, 1, 1), Sums(2, 1, 1, 0), {"msg_error": 1, "lint": 4}, (("g", "x"),), (("g", "y"),))


def test_each_dialect_is_told_in_its_form() -> None:
    assert dialects.report("d2", "g", FULL, "UNKNOWN", plain=False) == {
        "ident": "g",
        "id": "g",
        "summary": {
            "metrics": {"msg_error": 1, "lint": 4, "sub_total": 5, "sub_active": 2, "sub_passed": 2, "sub_failed": 1},
            "failed_ids": [["g", "x"]],
            "running_ids": [["g", "y"]],
        },
        "result": 0,
    }
    ours = dialects.report("emissary", "g", FULL, "UNKNOWN", plain=False)
    assert ours == {**dialects.report("d2", "g", FULL, "UNKNOWN", plain=False), "emissary": {"jobs": (3, 1, 1, 1)}}
    assert dialects.read_update(json.loads(json.dumps(ours)), Size(9, 9))[0] == FULL
    seed = dialects.report("d1", "g", FULL, "UNKNOWN", plain=False)
    assert seed["sub_total"] == seed["metrics"]["sub_total"] == 3
    assert seed["failed_ids"] == [["g", "x"]]  # a real D1 tier crashes without it
    plain = dialects.report("d0", "g", FULL, "UNKNOWN", plain=True)
    assert (plain["metrics"], plain["sub_failed"]) == ({"msg_error": 1}, 1)


def test_a_metric_that_is_beyond_all_sums_is_left_out() -> None:
    summary, _ = dialects.read_update({"ident": "a", "metrics": {"x": 10**400, "y": -1e301, "z": 1}}, JOB)
    assert summary.metrics == {"z": 1}


def test_no_report_is_larger_than_a_real_peer_takes() -> None:
    path = tuple("x" * 120 for _ in range(64))
    metrics = {"msg_error": 1, **{f"{number:0250}": 1 for number in range(3000)}}
    large = Summary(Sums(5000), Sums(), metrics, (path,) * 1000, (path,) * 1000)
    for dialect in ("d1", "d2"):
        told = dialects.report(dialect, "g", large, "UNKNOWN", plain=False)
        assert len(json.dumps(told)) < 2**20
        assert told.get("summary", told)["metrics"]["msg_error"] == 1
        assert told.get("summary", told)["failed_ids"]


def test_the_end_is_told_in_words_to_d1_and_in_numbers_to_d2() -> None:
    done = Summary(jobs=Sums(1, 0, 0, 1))
    assert dialects.completion("d2", "a", done, "ABORTED", 255, plain=False)["result"] == 3
    d1 = dialects.completion("d1", "a", done, "ABORTED", 255, plain=False)
    assert (d1["result"], d1["code"]) == ("FAILURE", 255)
    assert "sub_active" not in d1


def test_only_old_servers_of_d1_need_plain_metrics() -> None:
    assert dialects.is_plain_dialect("d0", "")
    assert dialects.is_plain_dialect("d1", "Python/3.10 websockets/11.0.3")
    assert not dialects.is_plain_dialect("d1", "Python/3.12 websockets/14.1")
    assert not dialects.is_plain_dialect("d2", "Python/3.10 websockets/11.0.3")


CHILD = {
    "state": "STARTED",
    "result": "UNKNOWN",
    "server": "192.168.0.123:12356",
    "metrics": {"msg_debug": 10, "msg_info": 4, "lint_warnings": 123},
    "exitcode": 0,
    "started": 1684696100,
    "updated": 1684696137,
    "completed": 0,
}


def test_children_are_read_in_all_three_shapes() -> None:
    flat = dialects.read_children({"child_a": CHILD})["child_a"]
    by_state = dialects.read_children({"launched": {"child_a": CHILD}, "pending": {}, "completed": {}})["child_a"]
    job = {
        "uidx": 1, "root": 0, "path": ["g"], "ident": "child_a", "status": 2, "metrics": CHILD["metrics"],
        "server_url": CHILD["server"], "db_file": "", "started": 1684696100.5, "updated": 1684696137, "stopped": None,
        "result": 0, "owner": None, "children": [], "expected_children": 0,
    }  # fmt: skip
    as_d2 = dialects.read_children({"children": [job], "status": 2})["child_a"]
    assert flat == by_state == as_d2
    assert ApiJob.__struct_fields__ == tuple(job)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sub_total", "x", "msg_info"]), inner),
    max_leaves=6,
)
KEYS = ("ident", "id", "metrics", "summary", "result", "code", "sub_total", "sub_active", "failed_ids", "children")


@pytest.mark.parametrize("payload", [{"launched": "x"}, {"launched": {}, "completed": [1]}, {"pending": None}])
def test_children_by_state_that_are_none_are_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(ActionError):
        dialects.read_children(payload)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.integers(0, 3), st.integers(0, 2))
def test_whatever_a_peer_sends_is_read_or_refused(payload: dict[str, Any], jobs: int, tiers: int) -> None:
    with suppress(ActionError):
        assert all(isinstance(name, str) for name in dialects.read_update(payload, Size(jobs, tiers))[0].metrics)
    with suppress(ActionError):
        assert dialects.read_complete("a", payload, Size(jobs, tiers))[0].jobs.active == 0
    with suppress(ActionError):
        assert all(child.state for child in dialects.read_children(payload).values())
