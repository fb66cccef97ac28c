"""The agent's own log goes where the settings say."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.errors import ConfigError
from agent.ownlog import MAX_LINE, log_to
from agent.settings import LogSettings

log = logging.getLogger("agent.test")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = handlers, level


def test_to_a_file_that_is_rotated(tmp_path: Path) -> None:
    log_to(LogSettings(to=str(tmp_path / "log"), max=200, level="warning"))
    log.info("not wanted")
    for i in range(20):
        log.warning("number %d", i)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith(" WARNING agent.test number 19")


def test_a_file_that_cannot_be_written_is_a_setting_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.to: .*/none/log: No such file or directory\. Name a file to write"):
        log_to(LogSettings(to=str(tmp_path / "none/log")))


def test_to_the_journal_with_its_priority_and_without_a_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        stat = os.fstat(journal.fileno())
        monkeypatch.setattr(sys, "stderr", journal)
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        log_to(LogSettings(level="debug"))
        log.debug("a")
        log.info("b")
        log.warning("c")
        log.error("d")
        journal.seek(0)
        assert journal.read() == "<7>agent.test a\n<6>agent.test b\n<4>agent.test c\n<3>agent.test d\n"


def test_what_a_peer_said_stays_on_one_line(tmp_path: Path) -> None:
    log_to(LogSettings(to=str(tmp_path / "log")))
    log.warning("the hub refuses us: %s", "M\n2026-11-22 WARNING \x1b[31mforged\u2028\té")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith(r"the hub refuses us: M\n2026-11-22 WARNING \x1b[31mforged\u2028" + "\té")


def test_what_a_peer_said_at_length_is_cut(tmp_path: Path) -> None:
    log_to(LogSettings(to=str(tmp_path / "log")))
    log.warning("cannot be read error=%s", "%s\x1b" * 1_000_000)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert len(line) < 4 * MAX_LINE
    assert line.endswith(r"%s\x1b%... (3000021 characters)")


def test_to_standard_error_with_a_date_also_where_the_journal_is_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "err").open("w+") as err:
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        log_to(LogSettings())
        log.info("x")
        err.seek(0)
        said = err.read()
    assert said[:2] == "20"
    assert said.endswith(" INFO agent.test x\n")
