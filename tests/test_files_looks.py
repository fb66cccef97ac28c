"""What follows from two looks at one thing, and which file systems others may change."""

import os

import msgspec
import pytest

from agent.files.looks import ATTRIB, MODIFY, Seen, change, remote_devices

FILE = Seen(1, 10, 3, 1000, 0o100644, 0, 0)
FOLDER = Seen(1, 11, 4096, 1000, 0o040755, 0, 0)


@pytest.mark.parametrize(
    ("known", "changes", "hint", "what"),
    [
        (None, {}, 0, "created"),
        (FILE, {}, 0, None),
        (FILE, {}, ATTRIB, None),
        (FILE, {}, MODIFY, "modified"),
        (FILE, {"size": 4}, ATTRIB, "modified"),
        (FILE, {"mtime_ns": 2000}, 0, "modified"),
        (FILE, {"mtime_ns": 2000}, ATTRIB, "attributes"),
        (FILE, {"mtime_ns": 2000}, ATTRIB | MODIFY, "modified"),
        (FILE, {"mode": 0o100600}, 0, "attributes"),
        (FILE, {"uid": 5}, ATTRIB, "attributes"),
        (FILE, {"gid": 5}, 0, "attributes"),
        (FILE, {"ino": 99}, 0, "modified"),
        (FILE, {"mode": 0o120777}, 0, "modified"),
        (FOLDER, {"mtime_ns": 2000, "size": 8192}, 0, None),
        (FOLDER, {"mode": 0o040700}, 0, "attributes"),
        (FOLDER, {"ino": 99}, 0, "modified"),
    ],
)
def test_what_became_of_it(known: Seen | None, changes: dict[str, int], hint: int, what: str | None) -> None:
    assert change(known, msgspec.structs.replace(known or FILE, **changes), hint) == what


def test_filesystems_that_others_may_change_are_found_by_their_device() -> None:
    mountinfo = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:45 / /mnt/nfs rw,relatime shared:1 master:2 - nfs4 server:/export rw
31 27 0:46 / /mnt/with\\040space rw - fuse.sshfs me@host: rw
32 27 8:1 / /mnt/usb rw - fuseblk /dev/sda1 rw
"""
    assert remote_devices(mountinfo) == {os.makedev(0, 45), os.makedev(0, 46), os.makedev(8, 1)}
    assert remote_devices("") == frozenset()
