"""Searching a log's history: back and forth, over rotations and compressed files, in parts, within limits."""

import gzip
import itertools
import lzma
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ActionError
from agent.logs import search
from agent.logs.messages import Context, Rule, Searched, SearchLog
from agent.logs.search import rule_of


def lay(folder: Path, *files: bytes, packed: int = 0) -> Path:
    """The generations of folder/x, oldest first; the `packed` oldest are compressed."""
    for at, data in enumerate(files):
        number = len(files) - 1 - at
        path = folder / ("x" if number == 0 else f"x.{number}")
        if at < packed:
            path = path.with_name(f"{path.name}.gz")
            data = gzip.compress(data)
        path.write_bytes(data)
        os.utime(path, (1000 + at, 1000 + at))
    return folder / "x"


def look(path: Path, **asked: Any) -> Searched:
    given = msgspec.convert({"path": str(path), "budget_s": 60, **asked}, SearchLog)
    return search.search(given, str(path), rule_of(given, ()))


def texts(found: Searched) -> list[str]:
    return [match["text"] for match in found.matches]


def all_of(path: Path, **asked: Any) -> list[dict[str, Any]]:
    """Every match, asked for in parts."""
    found = look(path, **asked)
    matches = found.matches
    while found.next is not None:
        found = look(path, **{**asked, "from": found.next})
        matches += found.matches
    assert found.complete
    return matches


def test_the_newest_lines_come_first_over_all_generations(tmp_path: Path) -> None:
    path = lay(tmp_path, b"fail 1\nok\n", b"fail 2\nfail 3\n", b"", b"ok\nfail 4\r\nfail 5", packed=1)
    found = look(path, regex="fail (?<n>\\d)")
    assert texts(found) == ["fail 5", "fail 4", "fail 3", "fail 2", "fail 1"]
    assert (found.complete, found.next, found.scanned) == (True, None, 41)
    assert found.matches[1] == {
        "rule": "search_log", "path": str(path), "offset": 3, "length": 6, "text": "fail 4", "captures": {"n": "4"},
        "flags": (), "context": None, "position": 3,
    }  # fmt: skip
    assert [match["position"] for match in found.matches] == [11, 3, -7, -14, -24]
    assert [Path(match["path"]).name for match in found.matches] == ["x", "x", "x.2", "x.2", "x.3.gz"]
    assert texts(look(path, regex="fail", rotated=False)) == ["fail 5", "fail 4"]
    assert texts(look(path, regex="fail", direction="forward")) == [f"fail {n}" for n in range(1, 6)]


def test_a_position_bounds_it(tmp_path: Path) -> None:
    path = lay(tmp_path, b"a 1\na 2\n", b"a 3\na 4\n")
    assert texts(look(path, regex="a", **{"from": 4})) == ["a 3", "a 2", "a 1"]
    assert texts(look(path, regex="a", **{"from": 5})) == ["a 4", "a 3", "a 2", "a 1"]
    assert texts(look(path, regex="a", **{"from": -5})) == ["a 1"]
    assert texts(look(path, regex="a", **{"from": -99})) == []
    assert texts(look(path, regex="a", direction="forward", **{"from": -4})) == ["a 2", "a 3", "a 4"]
    assert texts(look(path, regex="a", direction="forward", **{"from": 1})) == ["a 4"]
    assert texts(look(path, regex="a", direction="forward", **{"from": 99})) == []


def test_context_is_looked_for_in_earlier_files_and_later_ones(tmp_path: Path) -> None:
    path = lay(tmp_path, b"begin a\nbegin b\n", b"x\nfail a\n", b"y\nz\n", packed=1)
    asked = {"regex": "fail (?<u>.)", "before": 1, "after": 2, "until": "begin (?<u>.)", "same": ["u"]}
    (match,) = look(path, **asked).matches
    assert match["context"]["found"]
    assert [anchor["text"] for anchor in match["context"]["anchors"]] == ["begin a"]
    assert match["context"]["before"] == ("begin b", "x")
    assert match["after"] == ["y", "z"]


@given(rng=st.randoms(use_true_random=False), forward=st.booleans())
def test_parts_are_the_whole(tmp_path_factory: pytest.TempPathFactory, rng: random.Random, forward: bool) -> None:
    lines = [
        b"%s %d %s\n" % (rng.choice([b"fail", b"ok"]), n, b"x" * rng.choice([0, 5, 200, 70_000]))
        for n in range(rng.randrange(40))
    ]
    cuts = sorted(rng.choices(range(len(lines) + 1), k=rng.randrange(3)))
    files = [b"".join(lines[a:b]) for a, b in zip([0, *cuts], [*cuts, len(lines)], strict=True)]
    path = lay(tmp_path_factory.mktemp("log"), *files, packed=rng.randint(0, len(files) - 1))
    expected = [line.split()[1].decode() for line in lines if line.startswith(b"fail")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK", rng.choice([1 << 17, 1 << 18]))
        direction = "forward" if forward else "backward"
        found = all_of(path, regex="^fail (?<n>\\d+)", direction=direction, limit=rng.randint(1, 9))
    assert [match["captures"]["n"] for match in found] == (expected if forward else expected[::-1])


def test_an_answer_fits_a_message(tmp_path: Path) -> None:
    line = b"fail \x01" + b"\xff" * 30_000 + b"\n"
    path = lay(tmp_path, line * 20)
    found = look(path, regex="fail", before=2)
    assert 0 < len(found.matches) < 20
    assert len(msgspec.json.encode(found)) < 1 << 20
    assert len(all_of(path, regex="fail", before=2)) == 20
    (tmp_path / "x").write_bytes(b"fail " + b"\x01" * 65_000 + b"\n")
    (match,) = look(path, regex="(?<all>.*)").matches
    assert (match["cut"], match["captures"], len(match["text"])) == (True, {}, 16_384)


def test_time_is_bounded_and_what_is_left_can_be_asked_for(tmp_path: Path) -> None:
    path = lay(tmp_path, b"fail\n" * 200_000)
    for direction, start in (("backward", 1_000_000), ("forward", 0)):
        found = look(path, regex="never", direction=direction, budget_s=1e-9)
        assert (found.complete, found.next, found.matches) == (False, start, [])


def test_time_goes_by_while_the_context_of_matches_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay(tmp_path, b"".join(b"fail %d\nok\n" % n for n in range(10)))
    looked = itertools.count()
    monkeypatch.setattr("agent.logs.search.time", SimpleNamespace(monotonic=lambda: next(looked)))
    for direction in ("backward", "forward"):
        asked = {"regex": "fail", "until": "ok", "budget_s": 6, "direction": direction}
        found = look(path, **asked)
        assert 0 < len(found.matches) < 10
        assert (found.complete, found.next is None) == (False, False)
        order = range(10) if direction == "forward" else reversed(range(10))
        assert [match["text"] for match in all_of(path, **asked)] == [f"fail {n}" for n in order]


def test_lines_behind_a_match_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lay(tmp_path, b"fail\r\n" + b"\n" * 5000 + b"a\r\n", b"b\nc")
    reads, read = itertools.count(), search._History.read

    def counted(history: search._History, number: int, at: int, size: int) -> bytes:
        next(reads)
        return read(history, number, at, size)

    monkeypatch.setattr(search._History, "read", counted)
    (match,) = look(path, regex="fail", after=10_000).matches
    assert match["after"] == [*[""] * 5000, "a", "b", "c"]
    assert next(reads) < 20
    assert look(path, regex="fail", after=5002).matches[0]["after"] == [*[""] * 5000, "a", "b"]


def test_a_regex_that_gives_up_is_counted(tmp_path: Path) -> None:
    path = lay(tmp_path, b"a" * 40 + b"!\nok\n")
    assert look(path, regex="^(a+)+$").limit_errors == 1


def test_files_that_cannot_be_read_end_it_and_are_named(tmp_path: Path) -> None:
    path = lay(tmp_path, b"fail 0\n", b"fail 1\n", b"fail 2\n", packed=2)
    packed = (tmp_path / "x.1.gz").read_bytes()
    (tmp_path / "x.1.gz").write_bytes(packed[:12] + b"\0\0" + packed[14:])
    os.utime(tmp_path / "x.1.gz", (1001, 1001))
    found = look(path, regex="fail")
    assert (texts(found), found.complete, found.next) == (["fail 2"], False, None)
    assert found.stopped
    assert found.stopped.startswith(f"{tmp_path}/x.1.gz cannot be unpacked: ")
    name, why = tmp_path / "x.1.gz", {".xz": "is no .xz file", ".bz2": "is not read: only .gz and .xz are"}
    for ending, said in why.items():
        name = name.rename(tmp_path / f"x.1{ending}")
        for direction in ("backward", "forward"):
            found = look(path, regex="fail", direction=direction)
            assert (texts(found), found.stopped) == (["fail 2"], f"{name} {said}")
    with pytest.raises(OSError, match="No such file"):
        look(tmp_path / "gone", regex="fail")
    with pytest.raises(OSError, match="is not a regular file"):
        look(tmp_path, regex="fail")


def test_xz_files_are_read_too(tmp_path: Path) -> None:
    path = lay(tmp_path, b"fail 0\n", b"fail 1\n" * 100_000, b"fail 2\n")
    for number in (1, 2):
        old = tmp_path / f"x.{number}"
        (tmp_path / f"x.{number}.xz").write_bytes(lzma.compress(old.read_bytes()))
        os.utime(tmp_path / f"x.{number}.xz", (old.stat().st_mtime,) * 2)
        old.unlink()
    found = all_of(path, regex="fail [02]")
    assert [(match["text"], match["position"]) for match in found] == [("fail 2", 0), ("fail 0", -700_007)]
    packed = (tmp_path / "x.1.xz").read_bytes()
    for bad in (packed[:40] + b"\0\0" + packed[42:], lzma.compress(b"", preset=9)[:24] + packed[24:]):
        (tmp_path / "x.1.xz").write_bytes(bad)
        os.utime(tmp_path / "x.1.xz", (1001, 1001))
        stopped = look(path, regex="fail").stopped
        assert stopped
        assert stopped.startswith(f"{tmp_path}/x.1.xz cannot be unpacked: ")


@given(st.one_of(st.binary(), st.binary().map(lambda data: data + lzma.compress(data)[-28:])))
def test_any_file_may_be_called_xz(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        size = search._xz_size(file.fileno(), len(data))
    assert size is None or size >= 0


def test_a_large_compressed_file_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lay(tmp_path, b"fail 1\n" * 1000, b"fail 2\n", packed=1)
    monkeypatch.setattr(search, "UNPACKED_MAX", 1 << 12)
    assert look(path, regex="fail").stopped == f"{tmp_path}/x.1.gz is not read: it holds more than 0 MiB"


def test_what_stands_twice_is_found_once(tmp_path: Path) -> None:
    path = lay(tmp_path, b"fail 1\n", b"fail 2\n", packed=1)
    (tmp_path / "x.1").write_bytes(b"fail 1\n")  # it is being compressed
    (tmp_path / "x.2").write_bytes(b"fail 2\n")  # it is being copied
    os.utime(tmp_path / "x.1", (1000, 1000))
    (tmp_path / "x.bak").write_bytes(b"fail 3\n")
    assert texts(look(path, regex="fail")) == ["fail 2", "fail 1"]


RULE = Rule(id="known", regex="fail", context=Context(before=2))


def test_a_known_rule_is_searched_for_with_its_context_or_another(tmp_path: Path) -> None:
    def rule(**asked: Any) -> Rule:
        return rule_of(msgspec.convert({"path": "/x", **asked}, SearchLog), [RULE]).spec

    assert rule(rule="known").context.before == 2
    assert (rule(rule="known", before=3, after=1).context.before, rule(rule="known", after=1).context.after) == (3, 1)
    with pytest.raises(ActionError, match="no rule of a watched log is called 'other'"):
        rule(rule="other")
    with pytest.raises(ActionError, match="missing closing parenthesis"):
        rule(regex="(")
    with pytest.raises(ActionError, match="same"):
        rule(regex="a", until="b", same=["c"])
