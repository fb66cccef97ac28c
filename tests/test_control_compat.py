"""The frames of the older services' endpoints."""

import json

import pytest

from agent.control import compat

AT = 1795295127.5


@pytest.mark.parametrize(
    ("status", "word"),
    [(0, "Current"), (1, "Invalid"), (5, "Unknown"), (-1, "Unknown status number"), (4, "Unknown status number")],
)
def test_a_status_has_the_word_of_the_original(status: int, word: str) -> None:
    assert json.loads(compat.status_frame(status, AT)) == {
        "time": "2026-11-21T21:05:27.500+00:00", "entitlementStatus": status, "overallStatus": word,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "file"),
    [("/ws/monitor//etc/rhsm", "/etc/rhsm"), ("/ws/monitor/etc/rhsm", "/etc/rhsm"), ("/ws/monitor/", "/")],
)
def test_a_monitored_path_is_absolute(path: str, file: str) -> None:
    assert compat.monitored(path) == file


def test_content_is_base64_and_absent_content_is_empty() -> None:
    assert json.loads(compat.file_frame("open", "/x", b"\xff", AT))["content"] == "/w=="
    assert json.loads(compat.file_frame("open", "/x", "/w==", AT))["content"] == "/w=="
    assert json.loads(compat.file_frame("pong", "/x", None, AT)) == {
        "time": "2026-11-21T21:05:27.500+00:00", "event": "pong", "file": "/x", "content": "",
    }  # fmt: skip
