"""Watches: what a client asked for."""

from pathlib import Path

from agent.logs.messages import WatchLog
from agent.logs.watches import of_client


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
