"""The place that hangs with a path, from the words of the table of mounts."""

from agent.core.mounts import MOUNTS, is_within, place_of


def test_a_path_hangs_with_the_mount_that_its_words_lead_to_or_alone() -> None:
    mounts = "\n".join(
        [
            "21 1 8:1 / / rw - ext4 /dev/sda1 rw",
            "40 21 0:44 / /mnt/lab\\040share rw,relatime shared:1 - nfs4 lab:/share rw",
            "41 40 0:45 / /mnt/lab\\040share/deep rw - nfs4 lab:/deep rw",
            "42 21 0:46 / /mnt/lab rw - tmpfs tmpfs rw",
        ]
    )
    asked = ["/", "/etc/hosts", "/mnt/lab share/a", "/mnt/lab share/deep", "/mnt/lab shared", "/mnt/lab/x", "/mnt/*/x"]
    assert [place_of(path, mounts) for path in asked] == [
        *("/", "/etc/hosts", "/mnt/lab share", "/mnt/lab share/deep", "/mnt/lab shared", "/mnt/lab", "/mnt/*/x"),
    ]


def test_the_table_of_this_machine_is_read() -> None:
    assert place_of("/proc/self/stat", MOUNTS.read_text(errors="surrogateescape")) == "/proc"


def test_a_name_that_begins_alike_is_not_within() -> None:
    assert [is_within(path, "/a") for path in ("/a", "/a/b", "/ab", "/")] == [True, True, False, False]
    assert is_within("/a", "/")
