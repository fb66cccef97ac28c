"""The release that a frozen agent runs from: which files it has, whether they are what was built."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from agent.core.bundle import callers_environ, checksums, damaged, is_unpacked, made, release


def build(folder: Path) -> Path:
    """A release of three files, as make dist lays it out."""
    files = {"agent": b"\x7fELF", "lib/build.json": b'{"commit": "ec9b075360ec", "built": 1, "glibc": "2.36"}'}
    (folder / "lib").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    (folder / "lib/SHA256SUMS").write_text("".join(sums))
    return folder


def test_a_checkout_is_no_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert release() is None
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "agent"))
    assert release() == tmp_path


def test_a_release_says_what_it_is_made_of(tmp_path: Path) -> None:
    folder = build(tmp_path / "0.1.0")
    assert made(folder) == json.loads((folder / "lib/build.json").read_text())
    assert list(checksums(folder)) == ["agent", "lib/build.json"]
    assert damaged(folder) == []


def test_what_differs_from_the_build_is_named(tmp_path: Path) -> None:
    folder = build(tmp_path / "0.1.0")
    (folder / "agent").write_bytes(b"\x7fELG")
    (folder / "lib/build.json").unlink()
    assert damaged(folder) == ["agent", "lib/build.json"]


def test_what_the_single_file_unpacks_has_a_link(tmp_path: Path) -> None:
    folder = build(tmp_path / "0.1.0")
    assert not is_unpacked(folder)
    unpacked = tmp_path / "run"
    unpacked.mkdir()
    (unpacked / "lib").symlink_to(folder / "lib")
    assert is_unpacked(unpacked)


@pytest.mark.parametrize(
    ("base", "callers"),
    [
        ({"A": "1", "LD_LIBRARY_PATH": "/caller"}, {"A": "1", "LD_LIBRARY_PATH": "/caller"}),
        ({"LD_LIBRARY_PATH": "/bundle", "_PYI_ARCHIVE_FILE": "a"}, {}),
        (
            {"LD_LIBRARY_PATH": "/bundle", "LD_LIBRARY_PATH_ORIG": "/caller", "_PYI_ARCHIVE_FILE": "a"},
            {"LD_LIBRARY_PATH": "/caller"},
        ),
    ],
)
def test_a_child_is_given_what_our_caller_gave_us(base: dict[str, str], callers: dict[str, str]) -> None:
    assert callers_environ(base) == callers
