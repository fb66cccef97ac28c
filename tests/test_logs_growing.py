"""`agent logs scan --follow`: files that grow and rotate, until a signal."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.test_logscan import AFTER, RULES, TEXT


@contextmanager
def following(*arguments: Path | str) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-m", "agent", "logs", "scan", "--follow", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert process.stdout
    shown: dict[str, Any] = json.loads(process.stdout.readline())
    return shown


def add(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def test_files_are_followed_as_they_grow_and_rotate_until_a_signal(tmp_path: Path) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(RULES)
    log.write_bytes(TEXT)
    with following("--rules", rules, "-n", "--stats", log, tmp_path / "later") as process:
        first = told(process)
        assert (first["rule"], first["line"], first["context"]["before"]) == ("write", 4, ["begin b2", "x"])
        assert first["path"] == str(log)
        assert told(process)["line"] == 5
        add(log, b"begin b3\nother")
        add(log, b" two\n")
        assert (told(process)["line"]) == 7
        log.rename(tmp_path / "log.1")
        add(log, b"x\nwrite b3 failed\n")
        after = told(process)
        assert (after["generation"], after["line"], after["path"]) == (2, 2, str(log))
        assert after["context"]["anchors"][0]["text"] == "begin b3"
        add(tmp_path / "later", b"other\n")
        assert told(process)["path"] == str(tmp_path / "later")
        process.send_signal(signal.SIGINT)
        stats = told(process)["stats"]
        assert stats["pairs"] == 5
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"agent logs scan: {tmp_path}/later: is not there yet" in err.decode()
    # Looked at between the rename and the new file, it is gone.
    assert any(f"agent logs scan: {log}: {what}" in err.decode() for what in ("rotated", "removed"))


def test_what_follows_a_match_in_a_growing_file_is_waited_for(tmp_path: Path) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(AFTER.replace("after = 2", "after = 2\nwait_s = 60"))
    log.write_bytes(b"T\n boom\nat\n")
    with following("--rules", rules, log) as process:
        assert told(process)["record"] == ["T", " boom"]
        add(log, b"a\n")
        log.rename(tmp_path / "log.1")
        add(log, b"b\n")
        assert told(process)["after"] == ["a", "b"]


def test_counts_of_growing_files_come_at_the_end(tmp_path: Path) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(RULES)
    log.write_bytes(TEXT)
    with following("--rules", rules, "--count", log, tmp_path) as process:
        assert process.stderr
        assert process.stderr.readline().decode() == f"agent logs scan: {tmp_path}: unreadable: is a directory\n"
        process.send_signal(signal.SIGTERM)
        assert [told(process) for _ in range(2)] == [{"rule": "write", "lines": 1}, {"rule": "other", "lines": 1}]
        assert process.wait(30) == 1


def test_a_reader_that_goes_away_ends_following(tmp_path: Path) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(RULES)
    log.write_bytes(TEXT)
    with following("--rules", rules, log) as process:
        assert process.stdout
        assert process.stderr
        told(process)
        told(process)
        process.stdout.close()
        add(log, b"other\n")
        assert process.wait(30) == 1
        assert process.stderr.read() == b""
