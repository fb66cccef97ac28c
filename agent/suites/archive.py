"""Unpacks a suite's archive (tar, tar.gz, zip) into a folder of its own, and nothing outside of it.

Blocking file I/O, for a thread. Entries are written in two rounds, files first and links after them: nothing is ever
written through a link. A link may point to anything inside the folder, also by way of other links.

    AgentError
    └── BadArchive          it is not taken; nothing of it is left on the disk

Source: protocols/suites.md, "Limits and security" (no `..`, no links out, at most 4 GiB and 200,000 files).
"""

import gzip
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, NamedTuple

from agent.core.errors import AgentError
from agent.suites.sources import MAX_BYTES, MAX_FILES

_BLOCK: Final = 256 * 1024
_HEADER_MAX: Final = 1024 * 1024  # bytes that a tar header may make its reader hold


# What tarfile and zipfile raise for broken archives, beside what they say they do.
_UNREADABLE: Final = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError),
    *(struct.error, ValueError, OverflowError),
)


class BadArchive(AgentError):
    """The archive is not taken."""


class _Entry(NamedTuple):
    """What an archive says of one thing in it. `content` of a file, `link` of a link; neither of a folder."""

    name: str
    mode: int
    content: IO[bytes] | None = None
    link: str | None = None
    is_hard: bool = False


def unpack(path: Path, target: Path) -> None:
    """Fill `target`, which must not exist. Raises BadArchive, OSError; `target` then does not exist either."""
    target.mkdir()
    try:
        _fill(path, target)
    except _UNREADABLE as err:
        shutil.rmtree(target)
        raise BadArchive(f"cannot be read: {err}", remedy="Make the archive anew.") from err
    except BaseException:
        shutil.rmtree(target)
        raise


def link_out(folder: Path, names: Iterable[str]) -> str | None:
    """The first of these links in a folder that leads out of it, or None."""
    root = os.path.realpath(folder)
    for name in names:
        real = os.path.realpath(folder / name)
        if real != root and not real.startswith(f"{root}/"):
            return name
    return None


def inside(name: str) -> str:
    """An entry's name as a relative path without `.` and empty parts; "" is the folder itself. Raises BadArchive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise BadArchive(f"{name[:200]!r} leaves the archive's folder", remedy="Use relative names without ..")
    return "/".join(parts)


def _fill(path: Path, target: Path) -> None:
    links: list[tuple[str, str]] = []
    left, count = MAX_BYTES, 0
    with ExitStack() as stack:
        for entry in _entries(path, stack):
            count += 1
            if count > MAX_FILES:
                raise BadArchive(f"holds more than {MAX_FILES} files", remedy="Leave out what can be installed.")
            name = inside(entry.name)
            place = target / name
            if entry.link is not None and not entry.is_hard:
                links.append((name, entry.link))
            elif entry.link is not None:
                _hard_link(target, name, entry.link)
            elif entry.content is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                left = _write(entry, place, left)
            else:
                place.mkdir(parents=True, exist_ok=True)
    root = os.path.realpath(target)
    for name, link in links:
        parent = os.path.dirname(os.path.join(root, name))
        if os.path.realpath(parent) != parent:
            raise BadArchive(f"{name[:200]!r} is in a folder that is a link", remedy="Make the archive anew.")
        os.makedirs(parent, exist_ok=True)
        (target / name).symlink_to(link)
    if out := link_out(target, (name for name, _ in links)):
        raise BadArchive(f"{out!r} is a link out of the archive, to {dict(links)[out][:200]!r}", remedy="Leave it out.")


def _hard_link(target: Path, name: str, link: str) -> None:
    first = target / inside(link)
    if not first.is_file():
        raise BadArchive(
            f"{name!r} is a link to {link[:200]!r}, which is not before it", remedy="Make the archive anew."
        )
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    os.link(first, target / name)


def _write(entry: _Entry, place: Path, left: int) -> int:
    """Write a file of at most `left` bytes; returns what is left then."""
    assert entry.content is not None
    place.unlink(missing_ok=True)  # of two entries of one name the last counts, as with tar
    mode = 0o644 | entry.mode & 0o111  # whatever else the archive says, nobody else may write, and no bit gives rights
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
        while block := entry.content.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise BadArchive(
                    f"is larger than {MAX_BYTES >> 30} GiB unpacked", remedy="Leave out what is not needed."
                )
            file.write(block)
    return left


def _entries(path: Path, stack: ExitStack) -> Iterator[_Entry]:
    file = stack.enter_context(path.open("rb"))
    magic = file.read(262)
    file.seek(0)
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_entries(stack.enter_context(zipfile.ZipFile(file)))
    if magic.startswith(b"\x1f\x8b"):
        return _tar_entries(_Reader(stack.enter_context(gzip.GzipFile(fileobj=file))), stack)
    if magic[257:] == b"ustar":
        return _tar_entries(_Reader(file), stack)
    raise BadArchive("is neither tar, tar.gz nor zip", remedy="Pack it as one of these.")


class _Reader:
    """A stream for tarfile, which asks for a header's whole length at once, however long the archive says it is."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        if size > _HEADER_MAX:
            raise BadArchive(f"has a header of {size} bytes", remedy="Make the archive anew, with shorter names.")
        return self._stream.read(size)

    def seek(self, offset: int) -> int:
        """Go to an absolute offset."""
        return self._stream.seek(offset)

    def tell(self) -> int:
        """The absolute offset."""
        return self._stream.tell()


def _tar_entries(reader: _Reader, stack: ExitStack) -> Iterator[_Entry]:
    archive = stack.enter_context(tarfile.TarFile(fileobj=reader, errorlevel=2))  # type: ignore[arg-type]  # duck-typed
    for member in archive:
        if member.isdir():
            yield _Entry(member.name, member.mode)
        elif member.issym() or member.islnk():
            yield _Entry(member.name, member.mode, link=member.linkname, is_hard=member.islnk())
        elif member.isreg():
            yield _Entry(member.name, member.mode, content=archive.extractfile(member))
        else:
            raise BadArchive(f"{member.name[:200]!r} is a device or a pipe", remedy="Leave it out.")
        archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[_Entry]:
    if len(archive.infolist()) > MAX_FILES:
        raise BadArchive(f"holds more than {MAX_FILES} files", remedy="Leave out what can be installed.")
    for member in archive.infolist():
        mode = member.external_attr >> 16
        if member.filename.endswith("/"):  # is_dir() raises where there is no name
            yield _Entry(member.filename, mode)
        elif member.flag_bits & 1:
            raise BadArchive(f"{member.filename[:200]!r} is encrypted", remedy="Pack it without a password.")
        elif stat.S_ISLNK(mode):
            if member.file_size > 4096:
                raise BadArchive(f"{member.filename[:200]!r} is no link", remedy="Make the archive anew.")
            yield _Entry(member.filename, mode, link=os.fsdecode(archive.read(member)))
        else:
            with archive.open(member) as content:
                yield _Entry(member.filename, mode, content=content)
