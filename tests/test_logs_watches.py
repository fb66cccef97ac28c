"""Watches: what clients and suites asked for."""

from pathlib import Path

from agent.logs.messages import WatchLog
from agent.logs.watches import MAX_OF_RUN, of_client, of_run


def test_a_path_is_that_of_the_file_now(tmp_path: Path) -> None:
    (tmp_path / "a.log").touch()
    (tmp_path / "link").symlink_to("a.log")
    watch = of_client("m1", WatchLog(path=str(tmp_path / "link"), rules="mine", from_=7))
    assert (watch.pattern, watch.is_glob, watch.start) == (str(tmp_path / "a.log"), False, 7)
    assert (watch.is_remote, list(watch.sets), watch.tables) == (True, ["mine"], None)


def test_rules_may_stand_in_the_request() -> None:
    rules = [{"id": "a", "regex": "x"}]
    watch = of_client("m1", WatchLog(glob="/var/log/*.log", rules=rules))
    assert (watch.pattern, watch.is_glob, watch.tables, watch.sets) == ("/var/log/*.log", True, rules, ())


def test_a_suite_names_paths_and_globs_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("there\n")
    wanted = {"logs": ["*.log", "b/../c.log", 7, "", "/var/log/" + 4096 * "x"], "rules": ["mine.toml"]}
    watches, refused = of_run("r", str(tmp_path), wanted)
    assert [(watch.id, watch.pattern, watch.is_glob) for watch in watches] == [
        ("r/0", f"{tmp_path}/*.log", True),
        ("r/1", f"{tmp_path}/c.log", False),
    ]
    assert watches[0].sizes == {f"{tmp_path}/a.log": 6}
    assert {(watch.run, watch.base, watch.start, *watch.sets) for watch in watches} == {
        ("r", str(tmp_path), "start", "mine.toml")
    }
    assert len(refused) == 3
    assert refused[0] == "7 is not watched: it is no path of 1 to 4096 characters"


def test_a_suite_has_no_more_than_its_share() -> None:
    watches, refused = of_run("r", "/", {"logs": ["a"] * (MAX_OF_RUN + 2)})
    assert (len(watches), refused) == (MAX_OF_RUN, ["2 logs are not watched: a run has 64 at most"])
