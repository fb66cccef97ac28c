"""What the Seneschal is told of runs."""

from typing import Any

import pytest

from agent.core.events import Artifact, Counts, RunRefused, RunStarted, SuiteFinished
from agent.core.payload import read
from agent.seneschal import reports
from agent.seneschal.messages import RunReport

COUNTS = Counts(total=16, passed=3, failed=1, blocked=2, skipped=1, todo=1, aborted=1, lost=7)


def finished(**changes: Any) -> SuiteFinished:
    fields: dict[str, Any] = {
        "run": "r-1", "suite": "login", "runner": "ava", "driver": "tap", "verdict": "failed", "result": "FAILURE",
        "code": 1, "signal": None, "reason": None, "started": 10.0, "ended": 20.0, "counts": COUNTS,
    }  # fmt: skip
    return SuiteFinished(**{**fields, **changes})


def test_complete_counts_tests_and_links_artifacts_at_the_control_port() -> None:
    artifact = Artifact(path="/state/runs/r-1/xunit.xml", sha256="ab", size=12)
    event = finished(artifacts={"xunit.xml": artifact, "core dump": artifact})
    told = reports.complete(7, event, "lab-07", "wss://lab-07:13172/", late=False)
    assert (told.seq, told.ident, told.run, told.result, told.verdict, told.code) == (
        7, "lab-07", "r-1", "FAILURE", "failed", 1,
    )  # fmt: skip
    assert told.counts == COUNTS
    assert told.metrics == {"sub_total": 16, "sub_active": 0, "sub_passed": 3, "sub_failed": 11}
    assert (told.started, told.ended, told.late) == (10.0, 20.0, False)
    assert [link.url for link in told.artifacts.values()] == [
        "https://lab-07:13172/runs/r-1/xunit.xml",
        "https://lab-07:13172/runs/r-1/core%20dump",
    ]
    assert told.artifacts["xunit.xml"].sha256 == "ab"
    assert told.artifacts["xunit.xml"].size == 12


@pytest.mark.parametrize(
    ("code", "signal", "told"),
    [(0, None, 0), (3, None, 3), (None, "SIGKILL", 137), (None, None, -1), (None, "SIGNONSENSE", -1)],
)
def test_code_is_the_exit_or_128_and_the_signal(code: int | None, signal: str | None, told: int) -> None:
    assert reports.complete(1, finished(code=code, signal=signal), "a", "", late=False).code == told


def test_a_long_reason_is_cut() -> None:
    told = reports.complete(1, finished(reason="x" * 9000), "a", "", late=True)
    assert told.reason == "x" * reports.MAX_REASON
    assert told.late
    refusal = RunRefused(run="r", reason="bad_suite: " + "x" * 9000, origin="seneschal")
    assert len(reports.refused(1, refusal).reason) == reports.MAX_REASON


def test_accepted_names_the_offer() -> None:
    event = RunStarted(
        run="r-1", suite="s", title="S", runner="tap", driver="tap", source=".", origin="seneschal", slot=0,
        reservation="lab/0/1",
    )  # fmt: skip
    told = reports.accepted(4, event)
    assert (told.seq, told.run, told.reservation) == (4, "r-1", "lab/0/1")


def test_a_run_that_is_not_known_was_aborted_by_a_restart() -> None:
    told = reports.unknown(5, "r-1", "lab-07")
    assert (told.seq, told.run, told.ident, told.result, told.reason) == (
        5, "r-1", "lab-07", "ABORTED", "unknown after restart",
    )  # fmt: skip
    assert told.counts == Counts()


def test_the_heartbeat_counts_all_tests_and_names_the_seneschals_runs() -> None:
    live = read(
        {
            "slots": 3,
            "free": 1,
            "draining": False,
            "runs": [
                {
                    "run": "r-1", "suite": "a", "state": "running", "test": "x", "since": 5.0,
                    "counts": {"passed": 3, "failed": 1, "skipped": 2}, "reservation": "l/0/1", "origin": "seneschal",
                },
                {
                    "run": "mine", "suite": "b", "state": "running", "test": "y", "since": 6.0,
                    "counts": {"blocked": 1, "lost": 4, "aborted": 8, "todo": 16, "total": 29},
                    "reservation": None, "origin": "control",
                },
                {
                    "run": "next", "suite": "b", "state": "preparing", "test": None, "since": 7.0, "counts": {},
                    "reservation": None, "origin": "control",
                },
            ],
        },
        reports.Live,
    )  # fmt: skip
    assert live.reports() == (RunReport(run="r-1", state="running", since=5.0, test="x"),)
    assert live.metrics() == {"sub_total": 37, "sub_active": 2, "sub_passed": 3, "sub_failed": 14}
    assert reports.Live().metrics() == {"sub_total": 0, "sub_active": 0, "sub_passed": 0, "sub_failed": 0}
