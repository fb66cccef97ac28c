"""What the supervisor hears, on a path and on an abstract socket."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core import notify


@pytest.fixture(params=["path", "abstract"])
def hear(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    path = str(tmp_path / "notify") if request.param == "path" else f"@emissary-test-{os.getpid()}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(path.replace("@", "\0", 1) if path.startswith("@") else path)
    listening.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with listening:
        yield lambda: listening.recv(4096).decode()


def test_each_message_is_what_sd_notify_defines(hear: Callable[[], str]) -> None:
    notify.ready("3 roles run")
    assert hear() == "READY=1\nSTATUS=3 roles run"
    notify.stopping(60)
    assert hear() == "STOPPING=1\nEXTEND_TIMEOUT_USEC=60000000"
    notify.reloading()
    first, second = hear().splitlines()
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_without_a_supervisor_nothing_is_sent_and_a_dead_one_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.ready("nobody listens")
    assert not caplog.records
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.ready("to nobody")
    assert "supervisor not told message=READY=1" in caplog.text
