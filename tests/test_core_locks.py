"""Who holds a lock."""

import fcntl
import os
from pathlib import Path

from agent.core.locks import owner


def test_who_has_a_file_locked_is_known_for_as_long_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert owner(file) is None
    with file.open("w") as held:
        assert owner(file) is None
        fcntl.flock(held, fcntl.LOCK_EX)
        assert owner(file) == os.getpid()
    assert owner(file) is None


def test_another_file_another_kind_and_who_waits_do_not_count(tmp_path: Path) -> None:
    file, root = tmp_path / "lock", tmp_path / "root"
    file.touch()
    inode = file.stat().st_ino
    (root / "proc").mkdir(parents=True)
    assert owner(file, root) is None  # a kernel that does not tell
    lines = [
        "1: FLOCK",
        f"1: POSIX  ADVISORY  WRITE 11 08:02:{inode} 0 EOF",
        f"2: FLOCK  ADVISORY  WRITE 12 08:02:{inode}9 0 EOF",
        f"2: -> FLOCK  ADVISORY  WRITE 13 08:02:{inode} 0 EOF",
        f"3: FLOCK  ADVISORY  WRITE 4711 00:1d:{inode} 0 EOF",
    ]
    (root / "proc/locks").write_text("\n".join(lines[:4]) + "\n")
    assert owner(file, root) is None
    (root / "proc/locks").write_text("\n".join(lines) + "\n")
    assert owner(file, root) == 4711
    (root / "proc/locks").write_text(f"1: FLOCK  ADVISORY  WRITE 0 00:1d:{inode} 0 EOF\n")
    assert owner(file, root) is None
