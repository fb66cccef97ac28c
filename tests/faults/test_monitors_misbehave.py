"""Fifty monitors that lie, hang, flood, daemonize and die, for a minute: every step told once, and nothing left."""

import gc
import os
from collections import Counter
from pathlib import Path

import trio

from agent.core.events import MonitorOrphan
from agent.core.processtree import mark_of, snapshot
from agent.monitors.role import MARK
from tests.monitors_house import ID, house, monitor, program

CUT_S = 60.0  # of what `make soak` does for longer
GROWTH_MIB = 24  # the journal of a long soak is on the disk; this is the allocator's play

DAEMON = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.environ.clear()
        while True: time.sleep(60)
    os._exit(0)
"""
BODIES = {
    "good": "shake()\nwhile hear().startswith('Run'): say('Step Time 1')",
    "dies": "sys.exit(3)",
    "crashes": "shake(); hear(); os.kill(os.getpid(), signal.SIGSEGV)",
    "silent": "time.sleep(600)",
    "hangs": DAEMON + "shake(); hear()\nwhile True: time.sleep(60)",
    "leaves": DAEMON + "shake(); hear(); say('Step OK'); hear(); say('Step OK'); hear()",
    "floods": """shake(); hear()
for _ in range(8):
    os.write(1, b'noise 12\\n' * 8000); os.write(2, b'x' * 60000)
say('Step OK')""",
    "lies": """shake()
while hear().startswith('Run'):
    say('Step OK'); say('Step OK'); say('Step Time NaN'); say('Ready')""",
    "garbles": "shake(); hear(); os.write(1, b'00900 Log Info and no more\\xff\\xfe00012 Step Tim'); time.sleep(600)",
    "litters": """shake(); hear()
with open(os.environ['TMPDIR'] + '/core', 'wb') as file:
    file.write(b'x' * 100000)
say('Step Error full'); hear()""",
}


ENOUGH = {"timeout": 30.0, "handshake_timeout": 60.0}  # on any machine
WAITED = {"silent": {"handshake_timeout": 1.0}, "hangs": {"timeout": 0.5}, "garbles": {"timeout": 0.5}}


async def test_fifty_misbehaving_monitors_leave_nothing_behind(tmp_path: Path, soak_s: float) -> None:
    programs = {name: program(tmp_path, body, f"{name}.py") for name, body in BODIES.items()}
    monitors = [
        monitor(
            argv,
            id=f"{ID}-{name}-{n}",
            steps=("A", "B"),
            interval=4.0,
            on_error="continue",
            **ENOUGH | WAITED.get(name, {}),
        )
        for name, argv in programs.items()
        for n in range(5)
    ]
    descriptors, memory = len(os.listdir("/proc/self/fd")), 0.0
    async with house(tmp_path, *monitors, max_concurrent=16, exit_grace=0.3, eof_grace=0.2) as here:
        here.keeps_logs = False
        for part in range(3):
            await trio.sleep(max(soak_s, CUT_S) / 3)
            if part == 0:
                await here.until(lambda: len({run.monitor for run in here.runs()}) == len(monitors))
                memory = _resident_mib()
    lines = Counter(step.run for step in here.steps())
    ended = {run.run for run in here.runs()}
    assert set(lines.values()) == {2}
    assert ended <= lines.keys()
    states = {name: {s.state for s in here.steps() if s.monitor.startswith(f"{ID}-{name}-")} for name in BODIES}
    assert states["good"] <= {"ok", "not_run"}  # not_run: what ran when the role ended
    # A second "Step OK" before the next step is asked is noise; then "Step Time NaN" may be that step's answer.
    assert "ok" in states["lies"]
    assert states["lies"] <= {"ok", "not_run", "protocol_error"}
    assert "crashed" in states["crashes"]
    assert "timeout" in states["hangs"]
    assert "error" in states["litters"]
    assert not [event for event in here.events if isinstance(event, MonitorOrphan)]
    left = {pid: mark for pid in snapshot() if (mark := mark_of(pid)) and mark.startswith(f"{MARK}{ID}")}
    assert left == {}
    assert list((tmp_path / "state/monitors").iterdir()) == []
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    here.events.clear()
    assert _resident_mib() - memory < GROWTH_MIB


def _resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
