"""agent/suites/archive.py: what is unpacked, and what never is."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import AgentError
from agent.suites import archive
from agent.suites.archive import BadArchive, inside, unpack


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> bytes:
    """One entry of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(content), link, mode
    padding = b"\0" * (-len(content) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + content + padding


def tar(*members: bytes) -> bytes:
    return b"".join(members) + b"\0" * 1024


def zipped(*files: tuple[str, bytes, int]) -> bytes:
    wire = io.BytesIO()
    with zipfile.ZipFile(wire, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, mode in files:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content)
    return wire.getvalue()


SYM, HARD, DIR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
TAR = tar(
    member("./", kind=DIR),
    member("./a/run.sh", b"#!/bin/sh\n", mode=0o6777),
    member("a/empty"),
    member("./a/run.sh", b"#!/bin/true\n", mode=0o700),
    member("a/link", kind=SYM, link="../a/empty"),
    member("hard", kind=HARD, link="a/run.sh"),
    member("b", kind=DIR),
)
ZIP = zipped(
    ("a/run.sh", b"#!/bin/true\n", 0o100700),
    ("a/empty", b"", 0),
    ("a/link", b"../a/empty", 0o120777),
    ("hard", b"#!/bin/true\n", 0o100644),
    ("b/", b"", 0o40755),
)


def unpacked(wire: bytes, tmp_path: Path) -> Path:
    path, target = tmp_path / "archive", tmp_path / "target"
    path.write_bytes(wire)
    unpack(path, target)
    return target


@pytest.mark.parametrize("wire", [TAR, gzip.compress(TAR), ZIP], ids=["tar", "tar.gz", "zip"])
def test_files_folders_and_links_inside_are_unpacked(wire: bytes, tmp_path: Path) -> None:
    target = unpacked(wire, tmp_path)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == [
        *("a", "a/empty", "a/link", "a/run.sh", "b", "hard")
    ]
    assert (target / "a/run.sh").read_bytes() == (target / "hard").read_bytes() == b"#!/bin/true\n"
    assert (target / "a/link").readlink() == Path("../a/empty")
    assert os.access(target / "a/run.sh", os.X_OK)
    assert not os.access(target / "a/empty", os.X_OK)


def test_no_bit_of_a_mode_gives_rights(tmp_path: Path) -> None:
    target = unpacked(tar(member("a", b"x", mode=0o7777)), tmp_path)
    assert (target / "a").stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (tar(member("../a", b"x")), "'../a' leaves the archive's folder"),
        (tar(member("/tmp/a", b"x")), "'/tmp/a' leaves the archive's folder"),
        (zipped(("a/../../b", b"x", 0)), "'a/../../b' leaves the archive's folder"),
        (tar(member("l", kind=SYM, link="/etc/passwd")), "'l' is a link out of the archive, to '/etc/passwd'"),
        (tar(member("l", kind=SYM, link="..")), "'l' is a link out of the archive, to '..'"),
        # Each target looks harmless by itself.
        (
            tar(member("a/b/up", kind=SYM, link="../.."), member("out", kind=SYM, link="a/b/up/..")),
            "'out' is a link out",
        ),
        (zipped(("l", b"../../x", 0o120777)), "'l' is a link out of the archive, to '../../x'"),
        (zipped(("l", b"x" * 5000, 0o120777)), "'l' is no link"),
        (tar(member("h", kind=HARD, link="../x")), "'../x' leaves the archive's folder"),
        (tar(member("h", kind=HARD, link="later")), "'h' is a link to 'later', which is not before it"),
        (tar(member("dev", kind=tarfile.CHRTYPE)), "'dev' is a device or a pipe"),
        (tar(member("pipe", kind=tarfile.FIFOTYPE)), "'pipe' is a device or a pipe"),
        (b"just text", "is neither tar, tar.gz nor zip"),
        (b"", "is neither tar, tar.gz nor zip"),
        (tar(member("a", b"x" * 5000))[:2000], "cannot be read: unexpected end of data"),
        (gzip.compress(TAR)[:60], "cannot be read: "),
        (ZIP[:-30], "cannot be read: "),
        (b"\x1f\x8bgarbage", "cannot be read: "),
    ],
    ids=lambda given: given if isinstance(given, str) else "",  # an archive holds the time
)
def test_what_is_not_taken_leaves_nothing(wire: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadArchive) as caught:
        unpacked(wire, tmp_path)
    assert str(caught.value).startswith(why)
    assert not (tmp_path / "target").exists()


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(OSError, match="File exists"):
        unpacked(tar(member("l", kind=SYM, link=str(outside)), member("l/a", b"x")), tmp_path)
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "target").exists()


def test_no_link_is_made_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    links = member("l", kind=SYM, link=str(outside)), member("l/new/a", kind=SYM, link="/etc/passwd")
    with pytest.raises(BadArchive, match="'l/new/a' is in a folder that is a link"):
        unpacked(tar(*links), tmp_path)
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "target").exists()


def test_an_encrypted_zip_is_not_taken(tmp_path: Path) -> None:
    wire = bytearray(zipped(("a", b"x", 0)))
    wire[6] |= 1  # the flag, in the file's header and in the directory
    wire[wire.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(BadArchive, match="'a' is encrypted"):
        unpacked(bytes(wire), tmp_path)


MANY = {"tar": tar(*(member(f"f{n}") for n in range(4))), "zip": zipped(*((f"f{n}", b"", 0) for n in range(4)))}


@pytest.mark.parametrize("kind", MANY)
def test_too_many_files_are_not_taken(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_FILES", 3)
    with pytest.raises(BadArchive, match="holds more than 3 files"):
        unpacked(MANY[kind], tmp_path)


def test_too_many_bytes_are_not_taken_however_well_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1024**2)
    with pytest.raises(BadArchive, match="is larger than"):
        unpacked(gzip.compress(tar(member("a", b"\0" * 2**20), member("b", b"x"))), tmp_path)


def test_a_header_cannot_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with pytest.raises(BadArchive, match="has a header of 1073741824 bytes"):
        unpacked(gzip.compress(tar(info.tobuf(tarfile.GNU_FORMAT))), tmp_path)


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").touch()
    with pytest.raises(FileExistsError):
        unpacked(TAR, tmp_path)
    assert (tmp_path / "target/mine").exists()


def test_names_are_relative_paths() -> None:
    assert [inside(name) for name in ("a", "./a//b/", ".", "a..b")] == ["a", "a/b", "", "a..b"]


@given(
    st.sampled_from([TAR, gzip.compress(TAR, mtime=0), ZIP]),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
)
def test_a_damaged_archive_is_unpacked_or_refused(
    tmp_path_factory: pytest.TempPathFactory, wire: bytes, damage: list[tuple[int, int]]
) -> None:
    hurt, folder = bytearray(wire), tmp_path_factory.mktemp("hurt")
    for at, byte in damage:
        hurt[at % len(hurt)] = byte
    try:
        target = unpacked(bytes(hurt), folder)
    except (AgentError, OSError):
        assert not (folder / "target").exists()
    else:
        assert all(path.resolve().is_relative_to(target) for path in target.rglob("*"))
    assert sorted(path.name for path in folder.iterdir()) in (["archive"], ["archive", "target"])
