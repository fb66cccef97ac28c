"""PyPI's gator-eda, the oldest of Gator's dialects: its wrappers and tiers below ours, ours below its."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Without its own dependencies: half of them, a web server's, no layer loads.
GATOR_EDA = (
    "--no-deps", "gator-eda==0.1", "websockets==11.0.3", "click==8.5.1", "rich==13.9.4", "markdown-it-py==4.3.0",
    "mdurl==0.1.2", "pygments==2.21.0", "pyyaml==6.0.3", "aiosqlite==0.19.0", "psutil==5.9.8", "plotly==5.24.1",
    "tenacity==9.2.1", "packaging==26.3", "expandvars==0.9.0", "tabulate==0.10.0", "requests==2.34.2",
    "urllib3==2.8.0", "idna==3.20", "certifi==2026.10.18", "charset-normalizer==3.5.2",
)  # fmt: skip
AGENT = (sys.executable, "-P", "-m", "agent", "gator")
WITHIN_S = 120

pytestmark = pytest.mark.interop


@pytest.fixture
def peer_python(python_peer: Callable[..., Path]) -> Path:
    return python_peer(*GATOR_EDA)


def command(folder: Path, script: str) -> dict[str, str]:
    """An environment whose `python3` is that script: real tiers start `python3 -m gator`."""
    (folder / "bin").mkdir()
    (folder / "bin/python3").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/python3").chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def rows(file: Path, query: str) -> list[Any]:
    db = sqlite3.connect(file)
    found = db.execute(query).fetchall()
    db.close()
    return found


def test_its_wrappers_and_tiers_complete_below_our_tier(tmp_path: Path, peer_python: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        """\
!JobGroup
ident: g
jobs:
  - !Job { ident: good, command: echo, args: [hello] }
  - !Job { ident: bad, command: "false" }
  - !JobGroup
    ident: below
    jobs:
      - !Job { ident: x, command: "true" }
      - !Job { ident: y, command: "true" }
      - !Job { ident: pruned, command: "true", on_fail: [x] }
"""
    )
    (tmp_path / "agent.toml").write_text('[gator]\ndialect = "d0"\n')
    flags = ("--interval", "2", "--tracking", str(tmp_path / "t"), "--sched-arg", f"command={peer_python} -m gator")
    argv = (*AGENT, "--config", str(tmp_path / "agent.toml"), *flags, str(tmp_path / "spec.yaml"))
    env = command(tmp_path, f'exec {peer_python} "$@"')
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S, env=env)
    assert "FAILURE: 3 of 4 jobs passed, 1 failed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1
    assert rows(tmp_path / "t/db.sqlite", "SELECT ident, result FROM ChildEntry") == [
        ("good", "1"),
        ("bad", "2"),
        ("below", "1"),
    ]
    assert rows(tmp_path / "t/below/y/db.sqlite", "SELECT value FROM Attribute WHERE name='exit'") == [("0",)]


def test_our_wrapper_whose_task_tells_a_metric_completes_below_its_tier(tmp_path: Path, peer_python: Path) -> None:
    # It reads `id`; and it dies of metrics that it does not have itself.
    report = (
        "import asyncio, os, sys\n"
        "from gator.common.ws_client import WebsocketClient\n"
        "async def main():\n"
        "    client = await WebsocketClient().start()\n"
        "    await client.metric(name='lint_warnings', value=7)\n"
        "    await client.log(message='from the task', severity='WARNING')\n"
        "    os._exit(0)\n"
        "asyncio.run(main())\n"
    )
    (tmp_path / "report.py").write_text(report)
    (tmp_path / "spec.yaml").write_text(
        f"""\
!JobGroup
id: g
jobs:
  - !Job {{ id: plain, command: echo, args: [hello] }}
  - !Job {{ id: metric, command: {peer_python}, args: [{tmp_path / "report.py"}] }}
"""
    )
    agent = " ".join(AGENT)
    env = command(tmp_path, f'if [ "$1 $2" = "-m gator" ]; then shift 2; exec {agent} "$@"; fi; exit 99')
    argv = (peer_python, "-m", "gator", "--interval", "2", "--tracking", tmp_path / "t", tmp_path / "spec.yaml")
    tier = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S, env=env)
    assert tier.returncode == 0, tier.stdout + tier.stderr
    assert "T: 2, A: 0, P: 2, F: 0" in tier.stdout
    assert "Traceback" not in tier.stderr
    metrics = rows(tmp_path / "t/metric/db.sqlite", "SELECT name, value FROM Metric WHERE name='lint_warnings'")
    assert metrics == [("lint_warnings", 7)]
    assert rows(tmp_path / "t/metric/db.sqlite", "SELECT severity, message FROM LogEntry") == [("30", "from the task")]
