"""Who holds a lock on a file, as the kernel tells.

Source: proc_locks(5).
"""

from pathlib import Path


def owner(file: Path, root: Path = Path("/")) -> int | None:
    """The process that has the file locked by flock(2); `root` is where the machine's files are.

    None: nobody, or one that we cannot know of, as in a container beside ours.
    """
    try:
        inode = str(file.stat().st_ino)
        locks = (root / "proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in locks:
        # 1: FLOCK  ADVISORY  WRITE 4711 08:02:131077 0 EOF; one who waits for it has "->" behind the number.
        # The device is not compared: that of stat(2) is another one on btrfs and overlays.
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
            return int(fields[4]) or None  # 0: of another PID namespace
    return None
