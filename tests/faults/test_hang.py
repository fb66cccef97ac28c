"""A role that hangs, and one that stops the whole loop, below `--respawn`: named, its stack logged, restarted.

Source: protocols/packaging.md 4, acceptance 7.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WATCHDOG_S = 6  # a machine that is busy may stand still for a second or two

# `agent run --respawn` of this checkout, whose child is AGENT.
PARENT = """
import sys
from agent.core import respawn
child = sys.argv.pop(1)
respawn._program = lambda: [sys.executable, "-c", child]
from agent.__main__ import main
sys.exit(main())
"""

# `agent run` with an entitlement role that hangs as soon as a file is there, once.
AGENT = """
import os, sys, time
import trio
from agent.files import role

async def hang(bus, store, settings, health, *, task_status=trio.TASK_STATUS_IGNORED):
    task_status.started()
    while not os.path.exists("{marker}"):
        await trio.sleep(0.05)
    os.unlink("{marker}")
    with health.busy(limit=0.5):
        await {how}

async def block():
    time.sleep(1000)

role.run_entitlement = hang
from agent.__main__ import main
sys.exit(main())
"""

SETTINGS = """\
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
"""


class Service:
    """The parent, its log, and what `agent ctl` answers."""

    def __init__(self, folder: Path, how: str) -> None:
        self.marker, self._log = folder / "hang", folder / "log"
        (folder / "agent.toml").write_text(SETTINGS.format(folder=folder))
        agent = AGENT.format(marker=self.marker, how=how)
        argv = [sys.executable, "-c", PARENT, agent, "run", "--respawn", "--config", str(folder / "agent.toml")]
        environ = {**os.environ, "WATCHDOG_USEC": str(WATCHDOG_S * 1_000_000)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, env=environ, stdout=log, stderr=log)
        self._token = folder / "state/token"

    def log(self) -> str:
        return self._log.read_text()

    def until(self, text: str, times: int = 1) -> str:
        """Wait until the log has this so often; the log."""
        for _ in range(600):
            if self.log().count(text) >= times:
                return self.log()
            assert self.process.poll() is None, self.log()
            assert "restart_in_s=8" not in self.log(), self.log()
            time.sleep(0.1)  # noqa: TID251 - only the log can tell
        raise AssertionError(self.log())

    def ctl(self, *words: str) -> Any:
        """An answer of the agent that runs now."""
        address = re.findall(r"control listens addresses=(\S+)", self.log())[-1]
        argv = [sys.executable, "-m", "agent", "ctl", "--url", f"ws://{address}/", "--token-file", str(self._token)]
        return json.loads(subprocess.run([*argv, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[[str], Service]]:
    made: list[Service] = []

    def start(how: str) -> Service:
        made.append(Service(tmp_path, how))
        return made[-1]

    yield start
    for one in made:
        one.process.terminate()
        one.process.wait(60)


@pytest.mark.parametrize(("how", "named"), [("trio.sleep_forever()", True), ("block()", False)])
def test_what_hangs_is_named_and_restarted_and_no_event_is_lost(
    service: Callable[[str], Service], how: str, named: bool
) -> None:
    hung = service(how)
    hung.until("agent ready")
    for n in range(3):
        hung.ctl("log", f"message=before-{n}")
    seq = hung.ctl("status")["seq"]
    hung.marker.touch()
    log = hung.until("agent ended signal=SIGABRT")
    assert "watchdog missed, aborting" in log
    if named:
        assert "overdue name=entitlement" in log
        assert re.search(r'File "<string>", line \d+, in hang', log)
    else:  # the loop itself stands: the threads' stacks say where
        assert re.search(r'Fatal Python error: Aborted(?s:.*)File "<string>", line \d+ in block', log)
    hung.until("agent ready", times=2)
    status = hung.ctl("status")
    assert status["roles"]["entitlement"]["state"] == "running"
    assert status["seq"] > seq
    metrics = hung.ctl("metrics")
    assert metrics["journal_seq"] >= status["seq"]
