"""systemd's own journald and journalctl: entries written to its socket are told, over a restart of ours too."""

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from agent.core.events import LogGap, LogMatched
from tests.test_logs_streams import monitor, texts

pytestmark = pytest.mark.interop

JOURNALD = Path("/lib/systemd/systemd-journald")
RUN = Path("/run/systemd")


class Journald:
    """A journal of a namespace of its own, in memory."""

    def __init__(self, name: str) -> None:
        self.socket = RUN / f"journal.{name}/socket"

    def write(self, message: bytes, **fields: str) -> None:
        """As sd_journal_send does."""
        entry = b"".join(f"{name}={value}\n".encode() for name, value in fields.items())
        entry += b"MESSAGE\n" + struct.pack("<Q", len(message)) + message + b"\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto(entry, str(self.socket))


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journald]:
    if os.geteuid() != 0:
        pytest.skip("only root can start a journald")
    journalctl = shutil.which("journalctl")
    if not JOURNALD.exists() or journalctl is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no systemd-journald here")
        pytest.skip("no systemd-journald here")
    name = f"emissary{os.getpid()}"
    settings = RUN / f"journald@{name}.conf.d"
    settings.mkdir(parents=True)
    (settings / "own.conf").write_text("[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/journalctl"
    wrapper.write_text(f'#!/bin/sh\nexec {journalctl} --namespace={name} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    try:
        with subprocess.Popen([JOURNALD, name], stderr=subprocess.PIPE) as process:
            try:
                journald = Journald(name)
                _until_it_listens(journald.socket, process)
                yield journald
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)
    finally:
        shutil.rmtree(settings)
        shutil.rmtree(RUN / f"journal.{name}", ignore_errors=True)
        for folder in Path("/run/log/journal").glob(f"*.{name}"):
            shutil.rmtree(folder)
        with suppress(OSError):  # the machine's own is there, or that of another test
            Path("/run/log/journal").rmdir()


def _until_it_listens(path: Path, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(3000):
        if path.exists():
            return
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        assert process.stderr
        pytest.skip(f"journald does not run here: {process.stderr.read().decode().strip()[-200:]}")
    pytest.fail("journald does not listen after 30 s")


async def test_entries_are_told_and_nothing_is_lost_or_told_twice_over_a_restart(
    tmp_path: Path, journald: Journald
) -> None:
    journald.write(b"line 0")
    async with monitor(tmp_path, journal=True) as watching:
        with watching.bus.subscribe(LogMatched) as events:
            await watching.begin()
            journald.write(b"line 1", UNIT="a.service")
            with trio.fail_after(30):
                event = await anext(events)
            assert event.captures == {"n": "1", "_PID": str(os.getpid())}
            assert event.context
            assert (event.context.before, event.context.cut) == (("line 0",), False)
            journald.write(b"two\nline 2\nline 2 again\n\xff")
            with trio.fail_after(30):
                event = await anext(events)
            assert (event.text, event.count) == ("line 2", 2)
            await watching.stop()
            for number in range(3, 10):
                journald.write(b"line %d" % number)
            await watching.start()
            journald.write(b"line 10")
            assert await texts(events, 8) == [f"line {number}" for number in range(3, 11)]
        told = await watching.told(LogMatched)
        assert len({event.id for event in told}) == len(told) == 10
        assert [event.offset for event in told] == sorted({event.offset for event in told})
        assert await watching.told(LogGap) == []
