"""Watches: what the settings and clients ask for."""

from pathlib import Path

from agent.logs.messages import WatchLog
from agent.logs.settings import LogWatch
from agent.logs.watches import of_client, of_settings


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


def test_a_watch_of_the_settings_is_of_a_path_or_a_glob_or_of_no_file() -> None:
    asked = [LogWatch(name="p", path="/p", rules=("r",)), LogWatch(name="g", glob="/g/*")]
    asked += [LogWatch(name="j", journal=True), LogWatch(name="k", kmsg=True)]
    watches = [of_settings(one) for one in asked]
    assert [(watch.id, watch.pattern, watch.is_glob) for watch in watches] == [
        *(("s-p", "/p", False), ("s-g", "/g/*", True), ("s-j", "journal:", False), ("s-k", "kmsg:", False)),
    ]
    assert (watches[0].sets, watches[0].start, watches[0].is_remote) == (("r",), "end", False)
