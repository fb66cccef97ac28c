"""A release's copy, what refuses it, and where a file named by --from is checked."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.install import stage
from agent.install.stage import InstallFailed
from tests.release_folder import make_release, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_release(tmp_path / "source", "1.2")


def test_the_copy_equals_its_source_file_by_file_whatever_the_umask_is(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        stage.copy(source, tmp_path / "opt/releases/.1.2.new")
    finally:
        os.umask(before)
    assert tree(tmp_path / "opt/releases/.1.2.new") == tree(source)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("opt/**/") if path.is_dir()} == {0o755}


def test_what_the_single_file_has_unpacked_is_copied_as_the_folder_it_stands_for(source: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "_MEI123"
    shutil.copytree(source / "lib", unpacked, symlinks=True)
    (unpacked / "run").mkdir()
    (unpacked / "agent/monitors/examples/look.sh").chmod(0o600)  # the boot loader's modes are its own
    shutil.copy(source / "agent", unpacked / "run/agent")
    (unpacked / "run/lib").symlink_to("..")
    stage.copy(unpacked / "run", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)


def test_a_file_that_is_not_what_was_built_is_named_and_nothing_stays(source: Path, tmp_path: Path) -> None:
    (source / "lib/code").write_text("bent")
    with pytest.raises(InstallFailed, match=r"lib/code is damaged"):
        stage.copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_that_is_missing_is_named_and_nothing_stays(source: Path, tmp_path: Path) -> None:
    (source / "lib/code").unlink()
    with pytest.raises(InstallFailed, match=r"lib/code: No such file"):
        stage.copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SPARE", 2**60)
    with pytest.raises(InstallFailed, match=r"MiB are needed. Make room"):
        stage.copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_it_is_the_same_only_when_every_file_is(source: Path, tmp_path: Path) -> None:
    stage.copy(source, tmp_path / "copy")
    assert stage.is_same(source, tmp_path / "copy")
    (tmp_path / "copy/lib/code").write_text("bent")
    assert not stage.is_same(source, tmp_path / "copy")
    assert not stage.is_same(source, tmp_path / "nothing")


def test_a_good_release_is_asked_for_the_checks_that_were_named(source: Path, tmp_path: Path) -> None:
    stage.probe(source, "1.2", only="native.*,config", config=[Path("/etc/x.toml")])
    assert (source / "asked").read_text() == "--selftest --json --only native.*,config --config /etc/x.toml\n"


FAILING = """{"ok": false, "checks": [
 {"name": "clock", "status": "ok", "detail": "synchronised", "remedy": ""},
 {"name": "state.disk", "status": "fail", "detail": "no byte is free", "remedy": "Make room."}]}"""


@pytest.mark.parametrize(
    ("said", "told"), [(FAILING, "fails: state.disk: no byte is free. Make room."), ("?", "fails: ?")]
)
def test_a_selftest_that_fails_is_told_with_its_remedies(tmp_path: Path, said: str, told: str) -> None:
    source = make_release(tmp_path / "source", "1.2", selftest=said)
    with pytest.raises(InstallFailed) as failed:
        stage.probe(source, "1.2", only="*", config=[])
    assert told in str(failed.value)


def test_a_release_that_is_another_one_or_does_not_start_is_refused(source: Path) -> None:
    with pytest.raises(InstallFailed, match=r"--version says '1.2', not '1.3'"):
        stage.probe(source, "1.3", only="*", config=[])
    (source / "agent").write_text("#!/bin/sh\necho version GLIBC_2.99 not found >&2; exit 127\n")
    with pytest.raises(InstallFailed, match=r"GLIBC_2.99 not found. Is it built for this machine"):
        stage.probe(source, "1.2", only="*", config=[])
    (source / "agent").chmod(0o644)
    with pytest.raises(InstallFailed, match=r"cannot be run: Permission denied. Is it built for this machine"):
        stage.probe(source, "1.2", only="*", config=[])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts what others could write")
def test_a_prefix_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    stage.check_place(tmp_path)
    (tmp_path / "releases").chmod(0o777)
    with pytest.raises(InstallFailed, match=r"releases belongs to user 0, mode 0777"):
        stage.check_place(tmp_path)
    os.chown(tmp_path, 1234, 1234)
    with pytest.raises(InstallFailed, match=r"chown root"):
        stage.check_place(tmp_path)


def test_a_program_sees_nothing_of_ours() -> None:
    ours = {"AGENT_LOG__LEVEL": "debug", "NOTIFY_SOCKET": "@x", "_PYI_X": "1", "LD_LIBRARY_PATH": "/bundle"}
    ours |= {"TMPDIR": "/opt/agent/.from-x"}  # as of `--from`, which removes it
    assert stage.environ_for({**ours, "LANG": "C", "PATH": "/bin"}) == {"LANG": "C", "PATH": "/bin"}


def test_a_program_that_hangs_is_ended() -> None:
    told = stage.call(["sleep", "1000"], limit_s=0.1)
    assert (told.returncode, told.stderr) == (124, "it took more than 0.1 s")


# ---- --from ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "agent-1.2").write_bytes(b"the single file")
    return tmp_path / "agent-1.2"


def folder(tmp_path: Path) -> Path:
    made = tmp_path / "taken"
    made.mkdir(exist_ok=True)
    return made


def test_a_file_with_the_right_checksum_is_taken(file: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest().upper()
    taken = stage.take(file, folder(tmp_path), sha256=sha256, keys=tmp_path / "none")
    assert taken.read_bytes() == b"the single file"
    assert os.access(taken, os.X_OK)


def test_a_wrong_checksum_or_none_and_no_signature_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InstallFailed, match=r"has the checksum [0-9a-f]{64}, not 1234"):
        stage.take(file, folder(tmp_path), sha256="1234", keys=tmp_path / "none")
    with pytest.raises(InstallFailed, match=r"without --sha256 and without agent-1.2.sig"):
        stage.take(file, folder(tmp_path), sha256=None, keys=tmp_path / "none")
    with pytest.raises(InstallFailed, match="there is no such file"):
        stage.take(tmp_path / "gone", folder(tmp_path), sha256="1234", keys=tmp_path / "none")


def test_what_would_be_read_for_ever_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(InstallFailed, match="is no regular file"):
            stage.take(path, folder(tmp_path), sha256="1234", keys=tmp_path / "none")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_a_signature_must_be_of_this_file_by_a_release_key(file: Path, tmp_path: Path) -> None:
    for name in ("maker", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    keys = tmp_path / "release-keys"

    def sign(by: str, namespace: str = stage.NAMESPACE) -> None:
        file.with_suffix(".2.sig").unlink(missing_ok=True)
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(tmp_path / by), "-n", namespace, str(file)]
        subprocess.run(argv, check=True, capture_output=True)

    def take() -> Path:
        return stage.take(file, folder(tmp_path), sha256=None, keys=keys)

    sign("maker")
    with pytest.raises(InstallFailed, match=r"no .*release-keys to check agent-1.2.sig with"):
        take()
    keys.write_text(f"maker@example {(tmp_path / 'maker.pub').read_text()}")
    assert take().read_bytes() == b"the single file"
    sign("stranger")
    with pytest.raises(InstallFailed, match="is no signature of this file by a key"):
        take()
    sign("maker", "another-purpose")
    with pytest.raises(InstallFailed, match="is no signature of this file by a key"):
        take()
    sign("maker")
    file.write_bytes(b"the single file, bent")
    with pytest.raises(InstallFailed, match="is no signature of this file by a key"):
        take()
