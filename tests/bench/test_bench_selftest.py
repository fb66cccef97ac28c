"""How soon a person has an answer: from a broken configuration, and from the selftest, with peers and without."""

import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FROZEN = Path(__file__).parent.parent.parent / "dist/onedir/agent"
AGENT = [str(FROZEN)] if FROZEN.exists() else [sys.executable, "-m", "agent"]
FORM = "frozen" if FROZEN.exists() else "from the checkout"
TIMES = 15
PEERS = """
[seneschal]
url = "ws://127.0.0.1:{silent}/seneschal"
[mimir]
url = "ws://127.0.0.1:{closed}/mimir"
[polarize]
url = "http://127.0.0.1:{silent}"
[cibus]
url = "stomp://127.0.0.1:{silent}"
"""

Figure = Callable[[str, str, str], None]


def took_ms(*arguments: str, code: int) -> str:
    """Wall time, the least and the median of TIMES runs, and the CPU time of one."""
    walls = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(TIMES):
        began = time.perf_counter()
        done = subprocess.run([*AGENT, *arguments], capture_output=True, text=True, timeout=120)
        walls.append(1000 * (time.perf_counter() - began))
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / TIMES
    return f"{min(walls):.0f} ms, median {statistics.median(walls):.0f}, CPU {cpu:.0f}"


@pytest.mark.bench
def test_broken_settings_and_the_selftest(tmp_path: Path, figure: Figure) -> None:
    own = f'[state]\ndir = "{tmp_path}/state"\n[control]\nlisten = ["127.0.0.1:0"]\n'
    (tmp_path / "broken.toml").write_text("[suites]\nslots = 0\n")
    (tmp_path / "alone.toml").write_text(own)
    broken = took_ms("run", "--config", str(tmp_path / "broken.toml"), code=2)
    figure(f"a broken setting: exec -> file, line, key, exit 2, {FORM}", broken, "< 100 ms")
    only = "[!c]*,config,control.*"  # without what is the machine's: clock, cgroup
    alone = took_ms("--selftest", "--only", only, "--config", str(tmp_path / "alone.toml"), code=0)
    figure(f"--selftest without peers, {FORM}", alone, "< 1 s")
    with socket.socket() as silent, socket.socket() as closed:
        for sock in (silent, closed):
            sock.bind(("127.0.0.1", 0))
        silent.listen(64)
        ports = {"silent": silent.getsockname()[1], "closed": closed.getsockname()[1]}
        (tmp_path / "dead.toml").write_text(own + PEERS.format(**ports))
        dead = took_ms("--selftest", "--config", str(tmp_path / "dead.toml"), code=1)
    figure(f"--selftest with peers that never answer, {FORM}", dead, "< 3 s")
