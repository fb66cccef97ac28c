"""Standard input and output that are closed, full, or of descriptors that never wait."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.standard import Output, OutputFailed, fill, opened


def test_a_read_waits_where_the_descriptor_does_not() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    room = memoryview(bytearray(10))

    def write() -> None:
        os.write(writing, b"abc")
        os.close(writing)

    with io.FileIO(reading) as file:
        assert file.readinto(room) is None
        writer = threading.Timer(0.05, write)
        writer.start()
        assert (fill(file, room), bytes(room[:3])) == (3, b"abc")
        assert fill(file, room) == 0
        writer.join()


def test_a_file_is_read_by_its_path_and_what_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"ab")
    with opened(str(path)) as file:
        assert file.read() == b"ab"
    with pytest.raises(IsADirectoryError):
        opened(str(tmp_path))


def test_output_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OutputFailed, match="No space left on device"):
        Output(full).write(b"a\n")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputFailed, match="standard output is closed"):
        Output(None)


def test_what_stands_for_a_command_is_told_in_a_sentence() -> None:
    argv = [sys.executable, "-m", "agent", "logs", "templates", "-"]
    for closing, said in (
        ("<&-", "agent logs templates: -: standard input is closed\n"),
        (">&-", "standard output is closed. Name a place to write to.\n"),
        (">/dev/full", "standard output: No space left on device. Make room, or write elsewhere.\n"),
    ):
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh", *argv]
        done = subprocess.run(shell, input="error 1\n", capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (1, said)
