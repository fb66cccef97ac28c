"""The release that a frozen agent runs from: its files with their checksums, and what it was made from.

A release folder holds the executable `agent` and `lib/`. The single file unpacks itself into one whose `lib` is a
link: so either form is copied file by file, as `checksums` names them, and the copy equals dist/onedir.

Source: protocols/packaging.md 3. Imports little: --version reads this.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict


class Made(TypedDict):
    """`commit` is None where there was no git, and ends in `+` when the tree held changes. `built`: s since 1970.

    `glibc` is the oldest release that has all that the binaries ask for.
    """

    commit: str | None
    built: int
    glibc: str


def release() -> Path | None:
    """The folder of the running release; None in a checkout."""
    return Path(sys.executable).parent if getattr(sys, "frozen", False) else None


def is_unpacked(folder: Path) -> bool:
    """Is this what the single file has unpacked, to go when it ends?"""
    return (folder / "lib").is_symlink()


def made(folder: Path) -> Made:
    """What the release was made from."""
    facts: Made = json.loads((folder / "lib/build.json").read_text())
    return facts


def built() -> float:
    """When this release was made; of a checkout, when its first file was written. Seconds since 1970."""
    folder = release()
    return float(made(folder)["built"]) if folder else (Path(__file__).parents[1] / "__init__.py").stat().st_mtime


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the release, but for the list itself (`lib/SHA256SUMS`)."""
    lines = (folder / "lib/SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def damaged(folder: Path) -> list[str]:
    """The files that are missing or not what was built, by their paths in the release."""
    import hashlib

    def is_good(path: Path, digest: str) -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest

    return [name for name, digest in checksums(folder).items() if not is_good(folder / name, digest)]


def callers_environ(base: Mapping[str, str]) -> dict[str, str]:
    """`base` without what the boot loader has put there: a child would else load our libraries (pyinstaller#1759)."""
    callers = {name: value for name, value in base.items() if not name.startswith("_PYI_")}
    original = callers.pop("LD_LIBRARY_PATH_ORIG", None)
    if original is not None:
        callers["LD_LIBRARY_PATH"] = original
    elif len(callers) < len(base):  # the boot loader was here, and had nothing to save
        callers.pop("LD_LIBRARY_PATH", None)
    return callers
