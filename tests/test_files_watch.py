"""The file monitor on a real directory: what is told of each thing that can happen to a file."""

import os
import struct
from pathlib import Path

import pytest

from agent.files import watch as module
from agent.files.looks import Q_OVERFLOW, Look, Looked, Seen, Survey, Surveyed, Watch
from agent.files.watch import LONGEST_SETTLE_S, POLL_S, SETTLE_S, Monitor
from tests.files_eyes import Eyes

OVERFLOW = struct.pack("iIII", -1, Q_OVERFLOW, 0, 0)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def watching(path: Path | str, **options: object) -> Watch:
    return Watch(id="w", path=str(path), **options)  # type: ignore[arg-type]  # of several types


def names(told: list[str], root: Path) -> list[str]:
    return [line.replace(str(root), "") for line in told]


def test_what_is_there_at_the_beginning_is_no_event(etc: Path) -> None:
    with Eyes(watching(etc, recursive=True)) as eyes:
        assert (eyes.told(), eyes.ready) == ([], ["w"])


@pytest.mark.parametrize("batch", range(12))
@pytest.mark.parametrize("other", ["etc", "etc/sub", "etc/sub/file", "var", "*/old"])
def test_a_watch_that_begins_while_another_one_s_directories_are_looked_at_is_no_event(
    etc: Path, other: str, batch: int
) -> None:
    for folder in (etc / "sub", etc.parent / "var/sub"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    with Eyes() as eyes:
        eyes.monitor.watch(watching(etc, recursive=True))
        for _ in range(batch):
            eyes.act()
        eyes.act(lambda: eyes.monitor.watch(Watch(id="other", path=f"{etc.parent}/{other}", recursive=True)))
        eyes.settle()
        assert (eyes.told(), sorted(eyes.ready)) == ([], ["other", "w"])
        (etc.parent / "var/sub/file").write_text("changed")
        (etc / "sub/file").write_text("changed")
        eyes.settle()
        changed = {f"modified {etc}/sub/file"} | ({f"modified {etc.parent}/var/sub/file"} if other == "var" else set())
        assert set(eyes.told()) == changed


def test_created_modified_attributes_deleted(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "new").write_text("1")
        eyes.settle()
        (etc / "new").write_text("2")
        eyes.settle()
        (etc / "new").chmod(0o444)  # which no usual umask gives
        eyes.settle()
        os.utime(etc / "new", (1, 1))
        eyes.settle()
        (etc / "new").unlink()
        eyes.settle()
        assert names(eyes.told(), etc) == [
            "created /new", "modified /new", "attributes /new", "attributes /new", "deleted /new",
        ]  # fmt: skip


def test_what_an_event_says_of_the_file(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "new").write_text("hello")
        (etc / "new").chmod(0o640)
        os.utime(etc / "new", (5, 12.5))
        eyes.settle()
        (event,) = eyes.events
        owner = f"{(etc / 'new').owner()}:{(etc / 'new').group()}"
        assert [getattr(event, field) for field in ("size", "mtime", "mode", "owner", "content")] == [
            5, 12.5, "100640", owner, None,
        ]  # fmt: skip
        assert getattr(event, "sha256", "") == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_a_burst_is_told_once_and_a_file_that_is_always_written_every_two_seconds(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes, (etc / "log").open("w") as log:
        began = eyes.now
        while eyes.now < began + 3 * LONGEST_SETTLE_S:
            log.write("line\n")
            log.flush()
            eyes.hear()
            eyes.act()
            eyes.now += SETTLE_S / 4
        assert names(eyes.told(), etc) == ["created /log", "modified /log"]
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /log"]


def test_a_file_that_an_editor_replaces_is_modified(etc: Path) -> None:
    with Eyes(watching(etc / "old")) as eyes:
        (etc / ".old.swp").write_text("new content")
        eyes.settle()
        (etc / ".old.swp").rename(etc / "old")
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /old"]


def test_a_write_that_leaves_size_and_time_alone_is_seen(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        before = (etc / "old").stat()
        (etc / "old").write_text("dlo")
        os.utime(etc / "old", ns=(before.st_atime_ns, before.st_mtime_ns))
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /old"]


def test_opening_for_writing_without_a_write_is_nothing(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "old").open("a").close()
        eyes.settle()
        assert eyes.told() == []


def test_what_comes_and_goes_within_the_settle_time_is_nothing(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "brief").write_text("x")
        (etc / "brief").unlink()
        eyes.settle()
        assert eyes.told() == []


def test_a_move_is_one_event(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "old").rename(etc / "b")
        (etc / "b").rename(etc / "c")
        eyes.settle()
        assert names(eyes.told(), etc) == ["moved /c from /old"]


def test_moved_in_and_out_is_created_and_deleted(etc: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    with Eyes(watching(etc)) as eyes:
        (tmp_path / "outside").rename(etc / "in")
        (etc / "old").rename(tmp_path / "out")
        eyes.settle()
        assert sorted(names(eyes.told(), etc)) == ["created /in", "deleted /old"]


def test_moved_away_and_back_is_nothing(etc: Path) -> None:
    (etc / "sub").mkdir()
    (etc / "sub/file").touch()
    with Eyes(watching(etc, recursive=True)) as eyes:
        for name in ("old", "sub"):
            (etc / name).rename(etc / "aside")
            (etc / "aside").rename(etc / name)
        eyes.settle()
        assert eyes.told() == []
        (etc / "old").rename(etc / "sub/file")
        (etc / "sub/file").rename(etc / "old")
        eyes.settle()
        assert names(eyes.told(), etc) == ["deleted /sub/file"]
        (etc / "sub/more").write_text("x")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created /sub/more"]


def test_what_stood_in_its_place_for_a_while_does_not_change_a_file(etc: Path, tmp_path: Path) -> None:
    for aside in (etc / "aside", tmp_path / "aside"):
        with Eyes(watching(etc)) as eyes:
            (etc / "old").rename(aside)
            (etc / "old").write_text("another")
            aside.rename(etc / "old")
            eyes.settle()
            assert eyes.told() == []


def test_where_a_moved_file_stood_a_new_one_may_stand(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "old").rename(etc / "old~")
        (etc / "old").write_text("new")
        eyes.settle()
        assert sorted(names(eyes.told(), etc)) in (["created /old", "moved /old~ from /old"],
                                                   ["created /old~", "modified /old"])  # fmt: skip


def test_two_files_change_places(etc: Path) -> None:
    (etc / "other").write_text("other")
    with Eyes(watching(etc)) as eyes:
        (etc / "old").rename(etc / "tmp")
        (etc / "other").rename(etc / "old")
        (etc / "tmp").rename(etc / "other")
        eyes.settle()
        told = names(eyes.told(), etc)
        assert {line.split()[1] for line in told} >= {"/old", "/other"}
        assert not [line for line in told if line.startswith("deleted")]


def test_a_directory_moves_with_all_that_is_in_it(etc: Path) -> None:
    (etc / "a/b").mkdir(parents=True)
    (etc / "a/b/file").write_text("1")
    with Eyes(watching(etc, recursive=True)) as eyes:
        (etc / "a").rename(etc / "z")
        eyes.settle()
        assert sorted(names(eyes.told(), etc)) == [
            "moved /z from /a", "moved /z/b from /a/b", "moved /z/b/file from /a/b/file",
        ]  # fmt: skip
        (etc / "z/b/file").write_text("2")
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /z/b/file"]


def test_a_directory_moves_to_where_more_of_it_matters(etc: Path) -> None:
    (etc / "a").mkdir()
    for name in ("only", "more"):
        (etc / "a" / name).write_text(name)
    with Eyes(watching(etc / "a/only"), Watch(id="x", path=f"{etc}/b", recursive=True)) as eyes:
        (etc / "a").rename(etc / "b")
        eyes.settle()
        assert names(eyes.told(), etc) == ["moved /b from /a", "moved /b/only from /a/only", "created /b/more"]


def test_a_tree_is_watched_as_it_grows_and_falls(etc: Path, tmp_path: Path) -> None:
    with Eyes(watching(etc, recursive=True)) as eyes:
        (etc / "a/b").mkdir(parents=True)
        (etc / "a/b/file").write_text("1")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created /a", "created /a/b", "created /a/b/file"]
        (etc / "a").rename(tmp_path / "gone")
        eyes.settle()
        assert names(eyes.told(), etc) == ["deleted /a/b/file", "deleted /a/b", "deleted /a"]
        assert eyes.monitor.directories == len(etc.parts)


def test_the_watched_directory_is_deleted_and_comes_back(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "old").unlink()
        etc.rmdir()
        eyes.settle()
        assert names(eyes.told(), etc) == ["deleted /old", "deleted "]
        etc.mkdir()
        (etc / "new").write_text("x")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created ", "created /new"]


def test_it_comes_back_within_the_settle_time(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        (etc / "old").unlink()
        etc.rmdir()
        etc.mkdir()
        (etc / "new").write_text("x")
        eyes.settle()
        assert {"deleted /old", "created /new"} <= set(names(eyes.told(), etc))
        (etc / "more").write_text("x")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created /more"]


def test_an_ancestor_is_moved_away_and_another_one_comes(etc: Path, tmp_path: Path) -> None:
    deep = etc / "a/b"
    deep.mkdir(parents=True)
    with Eyes(watching(deep / "file")) as eyes:
        etc.rename(tmp_path / "away")
        eyes.settle()
        deep.mkdir(parents=True)
        (deep / "file").write_text("x")
        eyes.settle()
        (tmp_path / "away/a/b/file").write_text("elsewhere")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created /a/b/file"]


def test_what_is_not_there_yet_is_found_when_it_comes(tmp_path: Path) -> None:
    with Eyes(watching(tmp_path / "a/b/file")) as eyes:
        assert eyes.ready == ["w"]
        (tmp_path / "a/b").mkdir(parents=True)
        eyes.settle()
        (tmp_path / "a/b/file").write_text("x")
        eyes.settle()
        assert names(eyes.told(), tmp_path) == ["created /a/b/file"]


def test_a_glob_means_what_matches_and_nothing_else(etc: Path) -> None:
    with Eyes(watching(etc / "*/[ab]*.conf")) as eyes:
        (etc / "x").mkdir()
        for name in ("a.conf", "b1.conf", "c.conf", "a.txt"):
            (etc / "x" / name).write_text("x")
        (etc / "a.conf").write_text("x")
        eyes.settle()
        assert sorted(names(eyes.told(), etc)) == ["created /x/a.conf", "created /x/b1.conf"]


def test_links(etc: Path, tmp_path: Path) -> None:
    """A watched name is followed, also where inotify hears nothing of its target; other entries are not."""
    (tmp_path / "target").write_text("x")
    (etc / "link").symlink_to(tmp_path / "target")
    with Eyes(watching(etc / "link")) as one, Eyes(watching(etc)) as all_of_them:
        (tmp_path / "target").write_text("longer")
        one.settle()
        one.now += POLL_S
        one.settle()
        assert names(one.told(), etc) == ["modified /link"]
        all_of_them.settle()
        assert all_of_them.told() == []


def test_what_a_link_to_a_directory_leads_to_may_become_another_directory(etc: Path, tmp_path: Path) -> None:
    for name, text in (("current", "1"), ("next", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "conf").write_text(text)
    (etc / "app").symlink_to(tmp_path / "current")
    with Eyes(watching(etc / "app/conf")) as eyes:
        (tmp_path / "current").rename(tmp_path / "former")
        (tmp_path / "next").rename(tmp_path / "current")
        eyes.settle()
        eyes.now += POLL_S
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /app/conf"]
        (tmp_path / "former/conf").write_text("of no interest")
        eyes.settle()
        assert eyes.told() == []
        (tmp_path / "current/conf").write_text("of interest")
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /app/conf"]


def test_one_directory_by_two_ways(etc: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(etc)
    with Eyes(watching(etc), Watch(id="x", path=f"{tmp_path}/run/old")) as eyes:
        (etc / "old").write_text("new")
        eyes.settle()
        assert sorted(names(eyes.told(), tmp_path)) == ["modified /etc/old", "modified /run/old"]
        eyes.monitor.unwatch("x")
        eyes.settle()
        (etc / "old").write_text("newer")
        eyes.settle()
        assert names(eyes.told(), tmp_path) == ["modified /etc/old"]


def test_a_change_is_told_to_each_run_that_watches(etc: Path) -> None:
    whole, first, second = (Watch(id=id, path=str(etc), run=run) for id, run in (("w", None), ("1", "r1"), ("2", "r2")))
    with Eyes(whole, first, second) as eyes:
        (etc / "old").write_text("1")
        eyes.settle()
        for id in ("1", "2"):
            eyes.monitor.unwatch(id)
        (etc / "old").write_text("2")
        eyes.settle()
        assert names(eyes.told(), etc) == ["modified /old [r1]", "modified /old [r2]", "modified /old"]


def test_unwatching_forgets_everything(etc: Path) -> None:
    (etc / "a/b").mkdir(parents=True)
    with Eyes(watching(etc, recursive=True)) as eyes:
        eyes.monitor.unwatch("w")
        (etc / "a/new").write_text("x")
        eyes.settle()
        assert (eyes.told(), eyes.monitor.directories, eyes.monitor.known) == ([], 0, 0)
        assert eyes.monitor.next_at() == float("inf")


def test_an_overflow_is_told_and_the_end_state_too(etc: Path) -> None:
    (etc / "gone").write_text("x")
    with Eyes(watching(etc, recursive=True)) as eyes:
        (etc / "gone").unlink()
        (etc / "old").write_text("changed")
        (etc / "sub").mkdir()
        (etc / "sub/new").write_text("x")
        unheard = os.read(eyes._notify.fileno(), 1 << 20) if eyes._notify else b""
        assert unheard
        eyes.monitor.feed(OVERFLOW, eyes.now)
        eyes.settle()
        told = names(eyes.told(), etc)
        assert told[0].startswith("gap : more happened at once")
        assert sorted(told[1:]) == ["created /sub", "created /sub/new", "deleted /gone", "modified /old"]


def test_more_changes_at_once_than_are_kept_are_compared(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNSETTLED", 5)
    with Eyes(watching(etc)) as eyes:
        for n in range(12):
            (etc / f"{n:02}").write_text("x")
        eyes.settle()
        told = names(eyes.told(), etc)
        assert [line for line in told if line.startswith("gap")] == ["gap : more than 5 changes at once"]
        assert sorted({line for line in told if line.startswith("created")}) == [f"created /{n:02}" for n in range(12)]


def test_more_files_than_are_kept_are_told_once(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN", 20)
    for n in range(30):
        (etc / f"{n:02}").write_text("x")
    with Eyes(watching(etc)) as eyes:
        assert eyes.monitor.known == 20
        assert names(eyes.told(), etc) == ["gap : more than 20 files are watched; watch less"]


@pytest.mark.parametrize("wire", [b"\0" * 15, struct.pack("iIII", 1, 2, 0, 400) + b"x"])
def test_a_cut_message_means_to_compare_everything(etc: Path, wire: bytes) -> None:
    with Eyes(watching(etc)) as eyes:
        eyes.monitor.feed(wire, eyes.now)
        eyes.settle()
        assert names(eyes.told(), etc) == ["gap : inotify's message was cut short"]


def test_without_inotify_it_looks_every_five_seconds(etc: Path) -> None:
    with Eyes(watching(etc, recursive=True), inotify=False) as eyes:
        assert eyes.monitor.short == eyes.monitor.directories
        (etc / "old").write_text("changed")
        (etc / "sub").mkdir()
        (etc / "sub/new").write_text("x")
        eyes.settle()
        assert eyes.told() == []
        for _ in range(3):
            eyes.now += POLL_S
            eyes.settle()
        assert sorted(names(eyes.told(), etc)) == ["created /sub", "created /sub/new", "modified /old"]


def test_a_directory_that_others_may_change_is_watched_and_polled(etc: Path) -> None:
    monitor, seen = Monitor(), Seen(1, 2, 3, 4, 0o100644, 0, 0)
    monitor.watch(watching("/a"))
    answers: dict[str, dict[str, Seen]] = {"/": {"a": Seen(1, 1, 0, 0, 0o040755, 0, 0)}, "/a": {"f": seen}}

    def play(now: float) -> list[object]:
        told: list[object] = []
        while acts := monitor.acts(now):
            for act in acts:
                match act:
                    case Survey(path):
                        found = Surveyed(survey=act, wd=len(path), entries=answers[path], is_deaf=path == "/a")
                        monitor.surveyed(found, now)
                    case Look():
                        monitor.looked(Looked(look=act, seen=answers["/a"]["f"]), now)
                    case event:
                        told.append(event)
        return told

    play(0.0)
    assert monitor.next_at() == POLL_S
    assert play(POLL_S) == []
    answers["/a"] = {"f": Seen(1, 2, 9, 9, 0o100644, 0, 0)}
    (event,) = play(2 * POLL_S)
    assert (getattr(event, "what", ""), getattr(event, "path", "")) == ("modified", "/a/f")


def test_between_two_looks_at_what_is_polled_there_is_time_however_long_one_takes() -> None:
    monitor, now = Monitor(), 0.0
    monitor.watch(watching("/a"))
    for _ in range(10):
        for act in monitor.acts(now):
            if isinstance(act, Survey):
                now += 2 * POLL_S  # so long does it take
                entries = {"/": {"a": Seen(1, 1, 0, 0, 0o040755, 0, 0)}, "/a": {}}[act.path]
                monitor.surveyed(Surveyed(survey=act, entries=entries, is_short=True), now)
    assert monitor.acts(now) == []
    assert monitor.next_at() == now + POLL_S


def test_an_unreadable_directory_is_told_once_and_looked_at_again() -> None:
    monitor = Monitor()
    monitor.watch(watching("/a"))
    told = []
    for now in (0.0, POLL_S, 2 * POLL_S):
        for _ in range(2):
            for act in monitor.acts(now):
                if isinstance(act, Survey):
                    monitor.surveyed(Surveyed(survey=act, why="cannot be read: Permission denied"), now)
                else:
                    told.append(act)
    assert [getattr(event, "why", "ready") for event in told] == ["cannot be read: Permission denied", "ready"]


def test_a_name_that_is_no_text_is_shown_with_its_bytes(etc: Path) -> None:
    with Eyes(watching(etc)) as eyes:
        Path(os.fsdecode(os.fsencode(etc) + b"/\xff\xfe")).write_text("x")
        eyes.settle()
        assert names(eyes.told(), etc) == ["created /\\xff\\xfe"]
