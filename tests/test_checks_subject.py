"""What checks share."""

from pathlib import Path

from agent.checks.subject import Subject, date_of, text_of
from agent.settings import Settings, StateSettings


def test_the_state_directory_is_that_of_the_settings(tmp_path: Path) -> None:
    assert Subject(settings=Settings(state=StateSettings(dir=str(tmp_path)))).folder == tmp_path


def test_a_file_that_cannot_be_read_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n")
    assert (text_of(tmp_path / "a"), text_of(tmp_path / "b"), text_of(tmp_path)) == ("1", None, None)


def test_a_date_for_people() -> None:
    assert date_of(0) == "1970-01-01 00:00:00"
