"""Which part of the tree of files hangs when one path does: what the table of mounts tells, without asking a disk.

Source: proc(5), /proc/self/mountinfo.
"""

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

_OCTAL = re.compile(r"\\([0-7]{3})")


def place_of(path: str, mountinfo: str) -> str:
    """Where the file system is mounted that the path is on, as far as its words tell; the path, if that is the root.

    What hangs there is behind a link, for we stand on the root ourselves.
    """
    found = "/"
    for line in mountinfo.splitlines():
        point = point_of(line)
        if is_within(path, point) and len(point) > len(found):
            found = point
    return path if found == "/" else found


def point_of(line: str) -> str:
    """Where the file system of this line is mounted."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split(" ", 5)[4])


def is_within(path: str, folder: str) -> bool:
    """Is it that, or below it?"""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
