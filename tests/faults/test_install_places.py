"""Installations where a disk is full, read-only or noexec, as root in a mount namespace: refused, and nothing changed.

Source: protocols/packaging.md 8; issue of the installer, "Bad input".
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.install import stage
from tests.release_folder import install, job, make_release, tree

# What was said is on standard error, what is there afterwards on standard output.
INSTALL = """
import sys
from pathlib import Path
from tests.release_folder import install, job, tree
from agent.install import stage
image, source, version, stage.SPARE = *sys.argv[1:4], int(sys.argv[4])
try:
    install(job(Path(image)), Path(source), version)
except stage.InstallFailed as err:
    sys.exit(str(err))
finally:
    print(*sorted(tree(Path(image))), sep="\\n")
"""

Attempt = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Install version 2 over version 1 where a shell command has mounted something; what is said, and what is there.

    The command has the image in $0.
    """
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"]).returncode != 0:
        pytest.skip("an unprivileged mount namespace is refused here")
    image = tmp_path / "image"
    image.mkdir()
    install(job(image), make_release(tmp_path / "one", "1"), "1")
    two = make_release(tmp_path / "two", "2", code="x" * 1_000_000)

    def attempted(mount: str, spare: int = stage.SPARE, apart: str = "-Urm") -> tuple[str, list[str]]:
        argv = ["unshare", apart, "sh", "-c", f'{mount}; exec "$@"', str(image), sys.executable, "-c", INSTALL]
        cwd = Path(__file__).parents[2]
        done = subprocess.run(
            [*argv, str(image), str(two), "2", str(spare)], cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr, done.stdout.splitlines()

    return attempted


MOVED = 'cp -a "$0/opt" "$0/copy"; mount -t tmpfs -o {options} tmpfs "$0/opt"; mv "$0/copy"/* "$0/opt"; rmdir "$0/copy"'


def test_without_room_it_says_how_much_is_needed(attempt: Attempt, tmp_path: Path) -> None:
    before = tree(tmp_path / "image")
    said, files = attempt(MOVED.format(options="size=2m"))
    assert "MiB are free, 17 MiB are needed. Make room, or choose another --prefix." in said
    assert files == sorted({*before, "opt/agent/.lock"})


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(attempt: Attempt, tmp_path: Path) -> None:
    before = tree(tmp_path / "image")
    said, files = attempt(MOVED.format(options="size=300k"), spare=-(2**40))  # it looked as if there were room
    assert "No space left on device. The disk is full: make room, or choose another --prefix." in said
    assert files == sorted({*before, "opt/agent/.lock"})


def test_a_read_only_root_is_named(attempt: Attempt, tmp_path: Path) -> None:
    before = tree(tmp_path / "image")
    said, files = attempt('mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"; cd /')
    assert "Read-only file system. The file system is read-only: remount it (mount -o remount,rw)" in said
    assert files == sorted(before)


def test_a_noexec_prefix_is_named(attempt: Attempt, tmp_path: Path) -> None:
    before = tree(tmp_path / "image")
    said, files = attempt(MOVED.format(options="size=64m,noexec"))
    assert ".2.new/agent cannot be run: Permission denied. The file system is mounted noexec" in said
    assert files == sorted({*before, "opt/agent/.lock"})


def test_without_rights_it_says_who_may(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "image/opt/agent/.lock").unlink()
    (tmp_path / "image/opt/agent").chmod(0o500)
    before = tree(tmp_path / "image")
    said, files = attempt("true", apart="-U")  # who has no user there may not what a mode forbids, not even root
    assert "Permission denied. Run it as root" in said
    assert files == sorted(before)
