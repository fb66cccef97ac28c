"""Paths as people and clients write them."""

import os
from pathlib import Path

import pytest

from agent.logs import paths


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [("/var/log/*.log", "/var/log"), ("/var/*/x.log", "/var"), ("/*/x", "/"), ("/var/log/x", "/var/log")],
)
def test_where_a_glob_begins(pattern: str, folder: str) -> None:
    assert paths.fixed(pattern) == folder


def test_a_glob_finds_files_and_no_compressed_ones(tmp_path: Path) -> None:
    for name in ("b.log", "a.log", "a.log.1.gz", "a.log.1"):
        (tmp_path / name).touch()
    (tmp_path / "folder.log").mkdir()
    os.mkfifo(tmp_path / "pipe.log")
    assert paths.matching(f"{tmp_path}/*.log*") == [f"{tmp_path}/{name}" for name in ("a.log", "a.log.1", "b.log")]


def test_relative_paths_are_seen_from_the_suite(tmp_path: Path) -> None:
    assert paths.joined("/srv/suite", "log/../x.log") == "/srv/suite/x.log"
    assert paths.joined("/srv/suite", "/var/log/x") == "/var/log/x"
    (tmp_path / "x").write_text("1234")
    assert (paths.size(str(tmp_path / "x")), paths.size(str(tmp_path / "y"))) == (4, 0)


def test_clients_have_regular_files_below_the_roots(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "logs/link").symlink_to("../secret")
    roots = [str(tmp_path / "logs")]
    assert paths.refused(f"{tmp_path}/logs/x", roots) is None
    assert paths.refused(f"{tmp_path}/logs/not/yet", roots) is None
    assert paths.refused(f"{tmp_path}/logs/link", roots) == f"is not below {roots[0]}"
    assert paths.refused(f"{tmp_path}/logs", roots) == "is not a regular file"
    assert paths.refused(f"{tmp_path}/logs/x", []) == "is not below any of logs.roots, which is empty"


def test_a_directory_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(pattern: str) -> list[str]:
        read.append(pattern)
        return found(pattern)

    found, at, put_back = paths.matching, 1_000_000.0, 0.0
    monkeypatch.setattr(paths, "matching", counted)
    monkeypatch.setattr("agent.logs.paths.time.monotonic", lambda: at)
    monkeypatch.setattr("agent.logs.paths.time.time", lambda: at - put_back)
    globs, pattern = paths.Globs(), f"{tmp_path}/*.log"

    def ask(changed: float) -> list[str]:
        os.utime(tmp_path, (changed, changed))
        return [os.path.basename(path) for path in globs.find([pattern])[pattern]]

    (tmp_path / "a.log").touch()
    assert (ask(at - 1), ask(at - 1)) == (["a.log"], ["a.log"])
    assert len(read) == 2  # it may change again, and say the same
    assert (ask(at - 9), ask(at - 9)) == (["a.log"], ["a.log"])
    assert len(read) == 3
    (tmp_path / "b.log").touch()
    assert ask(at - 8) == ["a.log", "b.log"]
    (tmp_path / "c.log").touch()
    assert ask(at - 8) == ["a.log", "b.log"]
    at, put_back = at + paths.RELIST_S, 86_400.0  # the date says nothing of how long ago it was read
    assert ask(at - 18) == ["a.log", "b.log", "c.log"]
    assert globs.find([f"{tmp_path}/none/*.log"]) == {f"{tmp_path}/none/*.log": []}


def test_a_suite_names_paths_and_globs_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("there\n")
    wanted = {"logs": ["*.log", "b/../c.log", 7, "", "journal:", "/var/log/" + 4096 * "x"], "rules": ["mine.toml"]}
    watches, refused = paths.of_run("r", {"watch": wanted}, str(tmp_path))
    assert [(watch.id, watch.pattern, watch.is_glob) for watch in watches] == [
        ("r/0", f"{tmp_path}/*.log", True),
        ("r/1", f"{tmp_path}/c.log", False),
    ]
    assert watches[0].sizes == {f"{tmp_path}/a.log": 6}
    assert {(watch.run, watch.base, watch.start, *watch.sets) for watch in watches} == {
        ("r", str(tmp_path), "start", "mine.toml")
    }
    assert len(refused) == 4
    assert refused[0] == "7 is not watched: it is no path of 1 to 4096 characters"
    assert refused[2] == "journal: is not watched for a run alone: name it in a [[logs.watch]] of the settings"


def test_a_suite_has_no_more_than_its_share() -> None:
    watches, refused = paths.of_run("r", {"watch": {"logs": ["a"] * (paths.MAX_OF_RUN + 2)}}, "/")
    assert (len(watches), refused) == (paths.MAX_OF_RUN, ["2 logs are not watched: a run has 64 at most"])


def test_a_suite_that_came_over_a_link_has_the_folder_of_its_source(tmp_path: Path) -> None:
    folder = tmp_path / "a [b]"
    folder.mkdir()
    (folder / "x.log").touch()
    watch = {"logs": ["x.log", "*.log", "/var/log/x"]}
    watches, refused = paths.of_run("r", {"source": {"dir": str(folder)}, "watch": watch}, None)
    assert [(watch.pattern, watch.is_glob) for watch in watches] == [
        (f"{folder}/x.log", False),
        (f"{tmp_path}/a [[]b]/*.log", True),
        ("/var/log/x", False),
    ]
    assert [list(watch.sizes) for watch in watches[:2]] == [[f"{folder}/x.log"]] * 2
    assert (watches[0].base, refused) == (str(folder), [])
    watches, refused = paths.of_run("r", {"source": {"git": "https://x/y", "ref": "main"}, "watch": watch}, None)
    assert [watch.pattern for watch in watches] == ["/var/log/x"]
    assert refused[1] == "*.log is not watched: the suite has no folder here yet that it could be in; name it from /"


def test_what_came_and_was_rotated_is_named_by_what_it_was_called(tmp_path: Path) -> None:
    for name in ("a.log.1", "a.log.2.gz", "b.log", "b.log.1", "c.log.old", "d.txt.1", ".1", "sub/e-20260105.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100, 50 if name == "c.log.old" else 100))
    (tmp_path / "f.log.1").mkdir()
    assert paths.rotated(f"{tmp_path}/*.log", 100) == [f"{tmp_path}/a.log", f"{tmp_path}/b.log"]
    assert paths.rotated(f"{tmp_path}/*.log", 50)[2:] == [f"{tmp_path}/c.log"]
    assert paths.rotated(f"{tmp_path}/*.log*", 0) == []  # it finds all of them itself
    assert paths.rotated(f"{tmp_path}/s*/e.log", 100) == [f"{tmp_path}/sub/e.log"]
    assert paths.rotated(f"{tmp_path}/none/*.log", 0) == []
