"""The vocabulary: every kind survives the journal, and is shown as ARCHITECTURE.md says."""

import msgspec
import pytest

from agent.core.events import KINDS, Alert, Recorded, SuiteFinished, TestFinished, decode, scope

RECORD = TestFinished(run="r-9", suite="login", case="a › ok", name="ok", file="a", state="passed", ended=12.5)


def test_a_record_is_shown_with_its_run_and_test_outside_of_its_data() -> None:
    run, test = scope(RECORD)
    shown = msgspec.json.encode(
        Recorded(
            seq=4711, at=12.5, kind="TestFinished", run=run, test=test, data=msgspec.Raw(msgspec.json.encode(RECORD))
        )
    )
    tree = msgspec.json.decode(shown)
    assert {k: tree[k] for k in ("seq", "at", "kind", "run", "test")} == {
        "seq": 4711, "at": 12.5, "kind": "TestFinished", "run": "r-9", "test": "r-9:a › ok",
    }  # fmt: skip
    assert tree["data"]["kind"] == "test"
    assert tree["data"]["state"] == "passed"


def test_what_has_no_run_has_none_in_its_envelope() -> None:
    alert = Alert(code="disk", text="full", remedy="Make room.", since=1.0)
    shown = msgspec.json.encode(Recorded(seq=1, at=1.0, kind="Alert", data=msgspec.Raw(msgspec.json.encode(alert))))
    assert scope(alert) == (None, None)
    assert set(msgspec.json.decode(shown)) == {"seq", "at", "kind", "data"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_found_by_its_struct_name(kind: str) -> None:
    assert KINDS[kind].__name__ == kind


def test_events_survive_the_journal() -> None:
    assert decode("TestFinished", msgspec.json.encode(RECORD)) == RECORD


def test_a_kind_of_a_newer_version_and_broken_data_are_errors() -> None:
    with pytest.raises(KeyError):
        decode("FromTheFuture", b"{}")
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        decode("Alert", b"{}")


def test_a_result_document_without_tests_is_what_suite_finished_holds() -> None:
    assert [field.name for field in msgspec.structs.fields(SuiteFinished)] == [
        "run", "suite", "runner", "driver", "verdict", "result", "code", "signal", "reason", "started", "ended",
        "counts", "warnings", "artifacts",
    ]  # fmt: skip
