"""Token files: what is read, what is refused."""

import os
import resource
import signal
from pathlib import Path

import pytest

from agent.core.token import MAX_TOKEN, TokenUnusable, own_token, read_token


def write(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"s3same", b"s3same\n", b"  s3same \r\n"])
def test_a_token_is_the_one_line_of_its_file(tmp_path: Path, content: bytes) -> None:
    assert read_token(write(tmp_path, content)) == "s3same"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, b"s3same", mode)
    with pytest.raises(TokenUnusable, match=rf"may be read by others \(mode {mode:04o}\). chmod 600 ") as refused:
        read_token(path)
    assert "s3same" not in str(refused.value)


def test_a_credential_of_systemd_may_have_group_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_token(write(tmp_path, b"s3same", 0o440)) == "s3same"
    with pytest.raises(TokenUnusable, match="may be read by others"):
        read_token(write(tmp_path, b"s3same", 0o444))


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", b"\xff\xfe", b"a" * (MAX_TOKEN + 1)])
def test_what_is_no_token_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TokenUnusable, match="holds no token: one line"):
        read_token(write(tmp_path, content))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        TokenUnusable, match=r"/token: No such file or directory. Write the token into it, readable by the agent"
    ):
        read_token(tmp_path / "token")


def test_a_fifo_does_not_stop_the_agent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "token", 0o600)
    with pytest.raises(TokenUnusable, match="is no regular file"):
        read_token(tmp_path / "token")


def test_our_own_token_is_made_once_for_its_user_alone(tmp_path: Path) -> None:
    token = own_token(tmp_path / "token")
    assert len(token) == 43  # 256 bits in base64
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert own_token(tmp_path / "token") == token
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(TokenUnusable, match="may be read by others"):
        own_token(tmp_path / "token")


def test_a_token_of_our_own_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenUnusable, match=r"none/token cannot be made: No such file or directory. Let the agent's"):
        own_token(tmp_path / "none/token")
    monkeypatch.setattr("agent.core.token.secrets.token_urlsafe", lambda _: "s3same" * 10_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: the first bytes are taken
    try:
        with pytest.raises(TokenUnusable, match="token cannot be made: File too large"):
            own_token(tmp_path / "token")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_a_token_of_our_own_has_its_name_only_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(fd: int) -> None:
        assert os.fstat(fd).st_size == 44  # all of it was given to the system
        assert not (tmp_path / "token").exists()
        raise KeyboardInterrupt

    (tmp_path / ".token.new").write_text("half")  # of such a start before
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", power_cut)
        with pytest.raises(KeyboardInterrupt):
            own_token(tmp_path / "token")
    assert len(own_token(tmp_path / "token")) == 43
