"""Looks on a real disk: bounded, never a private key, never content from elsewhere."""

import errno
import hashlib
import os
from pathlib import Path
from typing import cast

import msgspec
import pytest
from inotify_simple import INotify

from agent.core.envelope import MAX_MESSAGE
from agent.files import disk
from agent.files.disk import MAX_CONTENT, carry_out, digest, look, survey
from agent.files.looks import Digest, Look, Looked, Seen, Survey, described

SEEN = Seen(1, 2, 3, 4, 0o100644, 0, 0)


def asking(path: Path, *, follow: bool = True, content: bool = False) -> Look:
    return Look(str(path), None, 0, None, follow=follow, digest=True, content=content)


def surveying(path: Path, *follow: str, every: bool = True) -> Survey:
    return Survey(str(path), 0x100, frozenset(follow), every, frozenset())


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "rhsm.conf").write_bytes(b"[server]\n")
    return folder


def test_content_only_below_the_allowed_directories(allowed: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"other")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "in").symlink_to(allowed / "rhsm.conf")
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2/file").write_bytes(b"x")

    def content(path: Path) -> bytes | str | None:
        found = digest(str(path), [str(allowed)])
        return found.content or found.no_content

    assert content(allowed / "rhsm.conf") == b"[server]\n"
    assert content(tmp_path / "in") == b"[server]\n"
    assert content(allowed / "link") == "not_allowed"
    assert content(tmp_path / "secret") == "not_allowed"
    assert content(tmp_path / "allowed2/file") == "not_allowed"
    assert content(tmp_path / "absent") == "unreadable"
    assert digest(str(allowed / "rhsm.conf"), []).no_content == "not_allowed"


def test_content_only_where_it_was_asked_for(allowed: Path) -> None:
    sha256 = hashlib.sha256(b"[server]\n").hexdigest()
    assert look(asking(allowed / "rhsm.conf"), [str(allowed)]).digest == Digest(sha256=sha256)
    asked = look(asking(allowed / "rhsm.conf", content=True), [str(allowed)]).digest
    assert asked == Digest(sha256=sha256, content=b"[server]\n")


def test_no_private_key_and_nothing_large_but_its_hash(allowed: Path) -> None:
    for name, data, why in (
        ("cert.pem", b"-----BEGIN PRIVATE KEY-----\n", "private_key"),
        ("key.pem", b"anything", "private_key"),
        ("large", b"x" * (MAX_CONTENT + 1), "too_big"),
    ):
        (allowed / name).write_bytes(data)
        found = digest(str(allowed / name), [str(allowed)])
        assert (found.sha256, found.content, found.no_content) == (hashlib.sha256(data).hexdigest(), None, why)
    (allowed / "innocent").symlink_to(allowed / "key.pem")
    assert digest(str(allowed / "innocent"), [str(allowed)]).no_content == "private_key"


def test_the_largest_content_fits_a_message_with_the_longest_names() -> None:
    path = "/" + "\udcff\x01" * 2047
    found = Looked(look=asking(Path("/")), seen=SEEN, digest=Digest(sha256="0" * 64, content=b"x" * MAX_CONTENT))
    assert len(msgspec.json.encode(described(path, "moved", found, path))) < MAX_MESSAGE - 2048


def test_hashing_is_bounded_in_size_and_time(allowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_HASHED", 8)
    assert digest(str(allowed / "rhsm.conf"), [str(allowed)]) == Digest(no_content="too_big")
    monkeypatch.undo()
    monkeypatch.setattr(disk, "HASH_S", -1.0)
    assert digest(str(allowed / "rhsm.conf"), None) == Digest()


def test_what_is_no_file_is_told_without_a_hash(allowed: Path, tmp_path: Path) -> None:
    os.mkfifo(allowed / "pipe")
    (allowed / "dangling").symlink_to(tmp_path / "nowhere")
    for name, kind in (("pipe", 0o010000), ("dangling", 0o120000), (".", 0o040000)):
        found = look(asking(allowed / name), [str(allowed)])
        assert found.seen
        assert (found.seen.mode & 0o170000, found.digest.sha256) == (kind, None)
    assert look(asking(allowed / "absent"), []).seen is None
    assert look(asking(allowed / "rhsm.conf/below"), []).seen is None


def test_names_that_nobody_has_are_numbers(allowed: Path) -> None:
    assert disk._user(4_000_000_000) == "4000000000"
    assert disk._group(4_000_000_000) == "4000000000"


class Unwilling:
    """An inotify that refuses each watch."""

    def __init__(self, error: int) -> None:
        self.error = error

    def add_watch(self, path: str, mask: int) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(("error", "is_short"), [(errno.ENOSPC, True), (errno.ENOMEM, True), (errno.EACCES, False)])
def test_a_directory_without_a_watch_is_listed_all_the_same(allowed: Path, error: int, is_short: bool) -> None:
    found = survey(surveying(allowed), cast(INotify, Unwilling(error)), frozenset())
    assert (found.is_short, found.is_deaf) == (is_short, not is_short)
    assert (found.wd, list(found.entries or ())) == (None, ["rhsm.conf"])


def test_other_errors_say_why() -> None:
    found = survey(surveying(Path("/")), cast(INotify, Unwilling(errno.EIO)), frozenset())
    assert (found.entries, found.why) == (None, "cannot be read: Input/output error")


def test_only_what_is_asked_for_is_listed(allowed: Path) -> None:
    (allowed / "other").write_text("x")
    found = survey(surveying(allowed, "rhsm.conf", "absent", every=False), None, frozenset())
    assert list(found.entries or ()) == ["rhsm.conf"]
    assert survey(surveying(allowed / "absent"), None, frozenset()).entries is None
    assert survey(surveying(allowed), None, frozenset({allowed.stat().st_dev})).is_deaf


def test_a_directory_with_too_many_entries_is_cut(allowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_KNOWN", 3)
    for n in range(9):
        (allowed / str(n)).touch()
    found = survey(surveying(allowed), None, frozenset())
    assert (len(found.entries or ()), found.is_cut) == (3, True)


def test_results_come_in_the_order_of_the_acts(allowed: Path) -> None:
    acts: list[Survey | Look] = [asking(allowed / "rhsm.conf"), surveying(allowed), asking(allowed / "absent")]
    results = list(carry_out(acts, None, []))
    assert [getattr(result, "look", None) or getattr(result, "survey", None) for result in results] == acts
