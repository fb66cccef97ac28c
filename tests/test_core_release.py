"""Links that are replaced whole, the trial of a release, and the check before each start."""

import fcntl
import os
import sys
from pathlib import Path

import msgspec
import pytest

from agent.core import release
from agent.core.release import Pending


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Releases 1, 2 and 3 of which 2 is current."""
    for version in "123":
        (tmp_path / "releases" / version).mkdir(parents=True)
        (tmp_path / "releases" / version / "agent").touch()
    release.point(tmp_path / "current", "2")
    return tmp_path


def begin(prefix: Path, version: str, previous: str | None) -> Pending:
    pending = Pending(id="ab" * 16, version=version, previous=previous, confirm=str(prefix / "confirmed"))
    release.write_pending(prefix, pending)
    release.point(prefix / "current", version)
    return pending


def test_without_a_trial_nothing_is_done_before_a_start(prefix: Path) -> None:
    before = sorted(prefix.rglob("*"))
    assert release.boot_check(prefix) is None
    assert sorted(prefix.rglob("*")) == before


def test_the_fourth_start_without_a_confirmation_gets_the_previous_release(prefix: Path) -> None:
    begin(prefix, "3", "2")
    assert [release.boot_check(prefix) for _ in range(4)] == [None, None, None, "2"]
    assert release.pointed(prefix / "current") == "2"
    assert release.read_pending(prefix) is None
    assert release.boot_check(prefix) is None


def test_a_confirmation_ends_the_trial_and_keeps_two_releases(prefix: Path) -> None:
    pending = begin(prefix, "3", "2")
    release.boot_check(prefix)
    (prefix / "confirmed").write_text(f"{pending.id}\n")
    assert [release.boot_check(prefix) for _ in range(5)] == [None] * 5
    assert release.pointed(prefix / "current") == "3"
    assert release.pointed(prefix / "previous") == "2"
    assert sorted(path.name for path in (prefix / "releases").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("written", ["", "other", "fifo", "link", "huge"])
def test_what_is_no_confirmation_of_this_trial_confirms_nothing(prefix: Path, written: str) -> None:
    pending = begin(prefix, "3", "2")
    match written:
        case "fifo":
            os.mkfifo(prefix / "confirmed")
        case "link":
            (prefix / "elsewhere").write_text(pending.id)
            (prefix / "confirmed").symlink_to("elsewhere")
        case "huge":
            (prefix / "confirmed").write_text(pending.id + "x" * 100_000)
        case text:
            (prefix / "confirmed").write_text(text)
    assert not release.is_confirmed(pending)


def test_a_start_that_was_ended_as_it_was_asked_does_not_count(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(prefix / "current/agent"))
    begin(prefix, "3", "2")
    for _ in range(5):
        assert release.boot_check(prefix) is None
        release.end_own_trial()
    assert [release.boot_check(prefix) for _ in range(4)] == [None, None, None, "2"]


def test_the_end_of_a_trial_that_went_well_changes_nothing(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(prefix / "current/agent"))
    pending = begin(prefix, "3", "2")
    release.boot_check(prefix)
    (prefix / "confirmed").write_text(pending.id)
    release.end_own_trial()
    assert release.is_confirmed(pending)


def test_an_end_that_cannot_be_written_is_said(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(prefix / "current/agent"))
    release.write_pending(
        prefix, msgspec.structs.replace(begin(prefix, "3", "2"), confirm=str(prefix / "gone/confirmed"))
    )
    release.end_own_trial()
    assert "the end of a start on trial is not kept" in caplog.text


def test_the_first_release_has_none_to_go_back_to(prefix: Path) -> None:
    begin(prefix, "3", None)
    assert [release.boot_check(prefix) for _ in range(6)] == [None] * 6
    assert release.pointed(prefix / "current") == "3"


def test_a_previous_release_that_is_gone_is_not_gone_back_to(prefix: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(prefix, "3", "0.9")
    assert [release.boot_check(prefix) for _ in range(6)] == [None] * 6
    assert "no release to go back to" in caplog.text


def test_a_trial_that_was_written_and_not_begun_changes_nothing(prefix: Path) -> None:
    begin(prefix, "3", "2")
    release.point(prefix / "current", "2")  # killed between the two
    assert [release.boot_check(prefix) for _ in range(6)] == [None] * 6
    assert release.pointed(prefix / "current") == "2"


@pytest.mark.parametrize("broken", [b"", b"{}", b'{"id": 7}', b"\xff"])
def test_a_broken_pending_file_is_said_and_stops_no_start(
    prefix: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (prefix / "pending.json").write_bytes(broken)
    assert release.boot_check(prefix) is None
    assert "pending.json is left alone" in caplog.text


def test_a_frozen_process_knows_its_release(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (release.own_folder(), release.own_prefix(), release.own_trial()) == (None, None, None)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(prefix / "current/agent"))
    pending = begin(prefix, "3", "2")
    assert release.own_folder() == prefix / "releases/3"
    assert release.own_prefix() == prefix
    assert release.own_trial() == pending
    renamed = msgspec.structs.replace(pending, version="3.replaced")  # and the installer was killed
    release.write_pending(prefix, renamed)
    assert (release.own_trial(), release.trial(prefix)) == (renamed, renamed)
    release.point(prefix / "current", "2")
    assert release.own_trial() is None  # the trial is another's


def test_while_an_installer_works_nothing_is_removed(prefix: Path) -> None:
    pending = begin(prefix, "3", "2")
    (prefix / "confirmed").write_text(pending.id)
    with (prefix / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert release.boot_check(prefix) is None
        assert release.pointed(prefix / "previous") == "2"
        assert (prefix / "releases/1").exists()


def test_a_file_is_whole_or_not_there_with_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    release.write(tmp_path / "token", b"one\n", 0o600)
    (tmp_path / ".token.new").write_text("what a kill has left")
    release.write(tmp_path / "token", b"two\n", 0o600)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("token", "two\n")]
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
