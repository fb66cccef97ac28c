"""What the disk says of logs: names that change, what is new, what has no disk."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.logs import disk
from agent.logs.identity import Checkpoint, File, Stat


def done(path: Path) -> Checkpoint:
    """It was read to its end."""
    data, stat = path.read_bytes(), disk.look(str(path))
    assert isinstance(stat, tuple)
    file = File(1, stat, 1, 0.0)
    assert file.knows(data, memoryview(b""))
    file.go_on(len(data), 0, memoryview(data))
    return file.checkpoint()


def test_names_that_change_while_they_are_listed_hide_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, list_names = tmp_path / "log", disk._names_beside
    path.write_bytes(b"a\nb\n")
    known = [done(path)]
    (tmp_path / "log.1").write_bytes(b"a\nb\n")

    def rename_meanwhile(path: str, known: Sequence[Checkpoint]) -> dict[tuple[str, str, int], float]:
        (tmp_path / "log.1").rename(tmp_path / "log.2")
        monkeypatch.setattr(disk, "_names_beside", list_names)
        return {}

    monkeypatch.setattr(disk, "_names_beside", rename_meanwhile)
    path.write_bytes(b"c\n")
    found = {sibling.path: sibling.fits for sibling in disk.siblings(str(path), known)}
    assert found == {str(path): frozenset(), f"{path}.2": {0}}


def test_what_is_there_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    kinds = [disk.look(str(path)) for path in (tmp_path / "fifo", tmp_path, tmp_path / "file", Path(os.devnull))]
    assert [found.kind for found in kinds if isinstance(found, Stat)] == ["FIFO", "directory", "file", "device"]
    assert disk.look(str(tmp_path / "none")) is disk.look(str(tmp_path / "file/none")) is None
    assert disk.look_into(str(tmp_path / "fifo"), []) is disk.look_into(str(tmp_path / "none"), []) is None


def test_a_renamed_log_and_the_copy_of_a_rotation_are_not_new(tmp_path: Path) -> None:
    path, passed = tmp_path / "a.log", dict[str, tuple[int, int, int]]()
    path.write_bytes(b"1\n")
    logs = [(str(path), done(path))]
    for name, data, new in (("a.log.1", b"1\n", False), ("b.log", b"1\n", True), ("c.log", b"2\n", True)):
        (tmp_path / name).write_bytes(data)
        assert disk.is_new(str(tmp_path / name), logs, passed) == new
    path.rename(tmp_path / "d.log")
    assert not disk.is_new(str(tmp_path / "d.log"), logs, passed)
    assert passed.keys() == {str(tmp_path / "a.log.1"), str(tmp_path / "d.log")}
