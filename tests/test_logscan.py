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
from agent.logs.classify import Classifier
from agent.logs.model import Model
from agent.logs.modelfile import write as write_model
from agent.logs.regex import version
from agent.logs.scanner import LINE_MAX
from agent.logs.templates import Miner

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


def scan(rules: Path, *paths: Path | str, **options: Any) -> list[dict[str, Any]]:
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
            "limit_errors": 0,
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
    assert (stats["bytes"], stats["pairs"], stats["lookup"], stats["slow_rules"]) == (42, 2, native_engine(), [])
    assert stats["engine"] in ("avx2", "ssse3", "neon", "scalar")
    assert (stats["pcre2"], stats["jit"]) == (version(), True)
    assert 0 < stats["scan_cpu_s"] <= stats["cpu_s"]


@pytest.mark.parametrize("option", ["-n", "--count", "--follow"])
def test_an_output_that_takes_nothing_is_told_once(tmp_path: Path, rules: Path, option: str) -> None:
    log = tmp_path / "log"
    log.write_bytes(TEXT)
    with open("/dev/full", "wb") as full:
        argv: list[str | Path] = [sys.executable, "-m", "agent", "logs", "scan", option, "--rules", rules, log]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, timeout=30)
    said = b"standard output: No space left on device. Make room, or write elsewhere.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_standard_input_that_is_closed_is_told(rules: Path) -> None:
    argv = ["sh", "-c", f"{sys.executable} -m agent logs scan --count --rules {rules} - <&-"]
    done = subprocess.run(argv, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, b"agent logs scan: -: standard input is closed\n")
    assert done.stdout.count(b'"lines":0') == 2


def command(*arguments: Path | str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "agent", "logs", "scan", *arguments], input=stdin, capture_output=True, timeout=30
    )


def test_standard_input_is_scanned(rules: Path) -> None:
    done = command("--rules", rules, "-", stdin=TEXT)
    write, other = map(json.loads, done.stdout.splitlines())
    assert (write["path"], write["offset"], other["offset"]) == ("-", 20, 36)
    assert (write["context"]["anchors"], write["context"]["cut"]) == ([{"offset": 0, "text": "begin b1"}], False)
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


def test_all_matches_have_the_same_keys_in_the_same_order(tmp_path: Path) -> None:
    """Whether they are written by the native formatter or not."""
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(AFTER + "[[rule]]\nid = 'plain'\nregex = 'p(?<n>.)'\nclass = 'c'\n")
    log.write_bytes(b"p\xe9\n" * 3 + b"at\n" + b"p\xe9\n")
    lines = {}
    for text in (b"p\xe9\n", b"at\np\xe9\n"):
        log.write_bytes(text)
        out = io.BytesIO()
        assert logscan.run([rules], [str(log)], numbers=True, out=out)
        lines[text] = out.getvalue().splitlines()[-1]
    native, python = map(json.loads, lines.values())
    assert list(native) == list(python)
    assert {**native, "id": "", "offset": 0, "line": 0} == {**python, "id": "", "offset": 0, "line": 0}


AFTER = r"""
version = 1
[[rule]]
id = "at"
regex = '^at'
[rule.context]
after = 2
[[rule]]
id = "trace"
regex = 'boom'
[rule.multiline]
start = '^T'
continuation = '^ '
"""


def written(tmp_path: Path, text: bytes, **options: Any) -> list[dict[str, Any]]:
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(AFTER)
    log.write_bytes(text)
    return scan(rules, log, **options)


def test_what_follows_a_match_is_in_it_and_the_order_stays(tmp_path: Path) -> None:
    text = b"at 1\r\nT one\r\n boom\n boom too\n more\nat 2\nT boom\nat 3\nlast"
    told = [
        (match["offset"], match["count"], match.get("after"), match.get("record")) for match in written(tmp_path, text)
    ]
    assert told == [
        (0, 1, ["T one", " boom"], None),
        (text.index(b" boom"), 2, None, ["T one", " boom", " boom too", " more"]),
        (text.index(b"at 2"), 1, ["T boom", "at 3"], None),
        (text.index(b"T boom"), 1, None, ["T boom"]),
        (text.index(b"at 3"), 1, ["last"], None),
    ]
    assert [counted["lines"] for counted in written(tmp_path, text, count=True)] == [3, 3]


def test_what_follows_comes_over_the_end_of_a_block(tmp_path: Path) -> None:
    text = b"x\n" * (logscan.BLOCK // 2 - 2) + b"at\na\nb\nc\n"
    (match,) = written(tmp_path, text)
    assert match["after"] == ["a", "b"]


def test_matches_that_wait_take_no_more_memory_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.logs.written.MAX_HELD", 1000)
    rules, log = tmp_path / "rules.toml", tmp_path / "log"
    rules.write_text(AFTER.replace("after = 2", "after = 10000") + "[[rule]]\nid = 'x'\nregex = '^x'\n")
    log.write_bytes(b"at\n" + b"x\n" * 50)
    told = scan(rules, log)
    assert [match["offset"] for match in told] == [0, *range(3, 103, 2)]
    assert len(told[0]["after"]) <= 50


def test_through_a_pipe_only_the_last_megabyte_is_known(rules: Path) -> None:
    far = b"begin b1\n" + b"x" * 99 + b"\n" + (b"y" * 99 + b"\n") * (logscan.PAST // 100 + 5000) + b"write b1 failed\n"
    near = b"begin b2\nz\nwrite b2 failed\n"
    done = command("--rules", rules, "-", stdin=far + near)
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["context"]["found"], first["context"]["cut"]) == (False, True)
    assert second["context"]["anchors"] == [{"offset": len(far), "text": "begin b2"}]
    assert (second["context"]["before"], second["context"]["cut"]) == (["z"], False)


def test_a_pipe_that_waits_holds_no_match_back_longer_than_its_rule_says(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(AFTER.replace("after = 2", "after = 2\nwait_s = 0.1"))
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "logs", "scan", "--rules", rules, "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"at\na\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["after"] == ["a"]
        process.stdin.close()
        assert process.wait(30) == 0


def test_standard_input_is_not_followed(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "scan", "--rules", str(rules), "--follow", "-"]) == 2
    assert capsys.readouterr().err == "agent logs scan: standard input is read to its end; leave --follow out\n"


# ---- what goes wrong -------------------------------------------------------------------------------------------------


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


def test_a_model_tells_templates_and_the_classes_that_rules_leave_open(tmp_path: Path, rules: Path) -> None:
    log, model = tmp_path / "log", tmp_path / "logs.model"
    log.write_bytes(TEXT + b"another thing\nstranger unlike all other\n")
    miner, classifier = Miner(), Classifier()
    for n in range(5):
        classifier.learn(miner.mine_line(b"other"), b"other", "odd")
        classifier.learn(miner.mine_line(b"number %d" % n), b"number %d" % n, None)
    write_model(model, Model(classes=("odd",), templates=miner.dump()[0], weights=classifier.dump()))
    before = model.read_bytes()
    said = [(each["text"], each["class"], each["class_by"], each["template"]) for each in scan(rules, log, model=model)]
    assert said[:2] == [("write b1 failed", "disk", "rule", 3), ("other", "odd", "template", 1)]
    assert said[2][:1] == ("another thing",)
    assert said[3][0] == "stranger unlike all other"
    assert model.read_bytes() == before


def test_a_model_that_cannot_be_used_is_told(capsys: pytest.CaptureFixture[str], rules: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"EMLM\x02\0" + bytes(64))
    for name, said in (("bad", "of version 2"), ("gone", "there is no such file")):
        assert main(["logs", "scan", "--rules", str(rules), "--model", str(tmp_path / name), str(rules)]) == 2
        assert said in capsys.readouterr().err
