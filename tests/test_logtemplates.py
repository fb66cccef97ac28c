"""`agent logs templates`, as a program and as a function."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import logtemplates
from agent.logtemplates import BLOCK, LINE_MAX, blocks


def told(*paths: Path | str, assign: bool = False) -> list[dict[str, Any]]:
    out = io.BytesIO()
    assert logtemplates.run([str(path) for path in paths], assign=assign, out=out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_templates_the_most_frequent_first(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"seldom\nopened 1\r\nopened 2\n\xff 3")
    assert told(log) == [
        {"template": 2, "count": 2, "text": "opened <*>"},
        {"template": 1, "count": 1, "text": "seldom"},
        {"template": 3, "count": 1, "text": "<*>"},
    ]


def test_each_line_has_what_its_template_became(tmp_path: Path) -> None:
    first, second = tmp_path / "a.log", tmp_path / "b.log"
    first.write_text("user ada logged in\nuser bob logged in\n")
    second.write_text("user eve logged in\n\nuser ada logged in")
    assert told(first, second, assign=True) == [
        {"line": line, "template": template} for line, template in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 1))
    ]


@given(st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_blocks_are_the_file_in_whole_lines(sizes: list[int], is_ended: bool) -> None:
    data = b"\n".join(b"x" * size * 20_000 for size in sizes) + b"\n" * is_ended
    found = list(blocks(io.BytesIO(data)))
    assert b"".join(found) == data
    assert all(block.endswith(b"\n") for block in found[:-1])


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"a\n" + b"x" * (LINE_MAX + 5 * BLOCK) + b"\nb\n")
    with io.FileIO(log) as file:
        found = b"".join(blocks(file)).split(b"\n")
    assert (found[0], found[2:]) == (b"a", [b"b", b""])
    assert LINE_MAX <= len(found[1]) <= LINE_MAX + BLOCK


def test_what_cannot_be_read_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.log"
    log.write_text("a\n")
    out = io.BytesIO()
    assert not logtemplates.run([str(tmp_path / "none"), str(tmp_path), str(log)], out=out)
    assert json.loads(out.getvalue()) == {"template": 1, "count": 1, "text": "a"}
    errors = capfd.readouterr().err.splitlines()
    assert [line.rsplit(": ", 1)[1] for line in errors] == ["No such file or directory", "Is a directory"]


def test_the_command_reads_standard_input() -> None:
    argv = [sys.executable, "-m", "agent", "logs", "templates", "--assign", "-"]
    done = subprocess.run(argv, input=b"took 5 ms\nhere\ntook 7 ms\n", capture_output=True, timeout=60, check=True)
    assert [json.loads(line)["template"] for line in done.stdout.splitlines()] == [1, 2, 1]
