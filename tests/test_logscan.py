"""`agent logs scan`: what is written for files and standard input, exit codes, what goes wrong."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent import logscan
from agent.cli import main
from agent.core.engine import native_engine
from agent.logs.scanner import LINE_MAX

RULES = r"""
version = 1
[[rule]]
id = "write"
regex = 'write (?<block>b\d+) failed'
severity = "error"
class = "disk"
[rule.context]
until = 'begin (?<block>b\d+)'
same = ["block"]
[[rule]]
id = "other"
regex = 'other'
"""
TEXT = b"begin b1\nbegin b2\nx\nwrite b1 failed\nother\n"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


def scan(rules: Path, *paths: Path | str, **options: bool) -> list[dict[str, Any]]:
    out = io.BytesIO()
    assert logscan.run([rules], list(map(str, paths)), out=out, **options)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_match_is_told_with_what_stands_before_it(tmp_path: Path, rules: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(TEXT)
    write, other = scan(rules, log, numbers=True)
    assert write.pop("id").startswith("lm-")
    assert write == {
        "path": str(log),
        "generation": 1,
        "offset": 20,
        "length": 15,
        "line": 4,
        "rule": "write",
        "severity": "error",
        "class": "disk",
        "class_by": "rule",
        "confidence": 1.0,
        "template": None,
        "text": "write b1 failed",
        "captures": {"block": "b1"},
        "count": 1,
        "suppressed": 0,
        "flags": [],
        "context": {
            "found": True,
            "anchors": [{"offset": 0, "text": "begin b1"}],
            "before": ["begin b2", "x"],
            "elided": 0,
            "looked": 20,
            "cut": False,
        },
    }
    assert (other["rule"], other["offset"], other["line"], other["class"]) == ("other", 36, 5, None)
    assert [match["line"] for match in scan(rules, log)] == [None, None]


def test_lines_are_counted_for_every_rule_over_all_files(tmp_path: Path, rules: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(TEXT)
    (tmp_path / "empty").touch()
    counts = scan(rules, tmp_path / "a", tmp_path / "empty", tmp_path / "b", count=True)
    assert counts == [{"rule": "write", "lines": 2}, {"rule": "other", "lines": 2}]
    assert scan(rules, tmp_path / "empty", count=True)[0] == {"rule": "write", "lines": 0}


def test_a_long_line_counts_once_and_lines_cross_blocks(tmp_path: Path, rules: Path) -> None:
    log = tmp_path / "log"
    long = b"other " * LINE_MAX + b"\n"
    log.write_bytes(long + b"no\n" * logscan.BLOCK + b"other\r\nlast other")
    assert scan(rules, log, count=True)[1] == {"rule": "other", "lines": 3}
    found = scan(rules, log, numbers=True)
    assert [match["offset"] for match in found] == [
        0, len(long) + 3 * logscan.BLOCK, len(long) + 3 * logscan.BLOCK + 7,
    ]  # fmt: skip
    assert [match["line"] for match in found] == [1, 2 + logscan.BLOCK, 3 + logscan.BLOCK]
    assert [match["flags"] for match in found] == [["window"], [], []]


def test_statistics_come_last(tmp_path: Path, rules: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(TEXT)
    stats = scan(rules, log, stats=True)[-1]["stats"]
    assert (stats["bytes"], stats["pairs"], stats["engine"], stats["slow_rules"]) == (42, 2, native_engine(), [])
    assert 0 < stats["scan_cpu_s"] <= stats["cpu_s"]


def command(*arguments: Path | str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "agent", "logs", "scan", *arguments], input=stdin, capture_output=True, timeout=30
    )


def test_standard_input_is_scanned(rules: Path) -> None:
    done = command("--rules", rules, "-", stdin=TEXT)
    write, other = map(json.loads, done.stdout.splitlines())
    assert (write["path"], write["offset"], write["context"], other["offset"]) == ("-", 20, None, 36)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_cannot_be_read_is_told_and_the_rest_is_scanned(tmp_path: Path, rules: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(TEXT)
    done = command("--rules", rules, tmp_path / "missing", tmp_path, log)
    assert done.stdout.count(b"\n") == 2
    assert done.stderr.decode().splitlines() == [
        f"agent logs scan: {tmp_path}/missing: No such file or directory",
        f"agent logs scan: {tmp_path}: Is a directory",
    ]
    assert done.returncode == 1


def test_a_regex_that_gives_up_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text("version = 1\n[[rule]]\nid = 'slow'\nregex = '^(a+)+$'\n")
    log.write_bytes(b"a" * 40 + b"!\naa\n")
    assert [match["offset"] for match in scan(rules, log)] == [42]
    assert capsys.readouterr().err == "agent logs scan: rule slow: gave up on 1 lines\n"


def test_bad_rules_are_named_with_file_line_and_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("version = 1\n[[rule]]\nid = 'broken'\nregex = '('\n")
    other = tmp_path / "missing.toml"
    assert main(["logs", "scan", "--rules", str(rules), "--rules", str(other), str(tmp_path / "log")]) == 2
    err = capsys.readouterr().err
    assert f"{rules}:4: rule[broken].regex: missing closing parenthesis" in err
    assert f"{other}: there is no such file." in err


def test_a_reader_that_goes_away_ends_it(tmp_path: Path, rules: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(TEXT * 10_000)
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "logs", "scan", "--rules", rules, log], stdout=writing, stderr=subprocess.PIPE
    ) as process:
        os.close(writing)
        assert os.read(reading, 5) == b'{"id"'
        os.close(reading)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, b"")
