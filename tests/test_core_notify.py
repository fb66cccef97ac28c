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


def test_the_rest_of_the_vocabulary(hear: Callable[[], str]) -> None:
    notify.starting(90)
    assert hear() == "EXTEND_TIMEOUT_USEC=90000000"
    notify.alive()
    assert hear() == "WATCHDOG=1"
    notify.status("overdue: logs by 5 s")
    assert hear() == "STATUS=overdue: logs by 5 s"


@pytest.mark.parametrize(
    ("usec", "pid", "limit"),
    [
        ("30000000", None, 30.0),
        pytest.param("30000000", str(os.getpid()), 30.0, id="ours"),
        ("30000000", "1", None),
        (None, None, None),
        ("0", None, None),
        ("soon", None, None),
        ("-1", None, None),
    ],
)
def test_the_watchdog_is_ours_where_it_names_us_or_nobody(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, limit: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert notify.watchdog_s() == limit
