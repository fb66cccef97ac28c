"""The agent as a whole: from a line of the runner to the bus and to Mimir, and what tests cost in time and memory."""

import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.app import Service
from agent.core import config
from agent.core.channel import Channel
from agent.core.events import SuiteFinished, TestFinished
from agent.settings import Given, Settings
from tests.faults.station import HERE, Station, bench, peak_mib

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

RATE, TESTS = 500, 3000

# Each title ends in the time at which its line was written.
PACED = f"""
import sys, time
print("1..{TESTS}", flush=True)
began = time.monotonic()
for n in range({TESTS}):
    time.sleep(max(0, began + n / {RATE} - time.monotonic()))
    sys.stdout.write(f"ok {{n + 1}} - test {{n}} at {{time.monotonic_ns()}}\\n")
    sys.stdout.flush()
"""


def percentiles(late: list[float]) -> str:
    p50, p99 = (statistics.quantiles(late, n=100)[q - 1] for q in (50, 99))
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"


def late_ms(text: str) -> float:
    """How long ago a title's line was written."""
    return (time.monotonic_ns() - int(text.rpartition(" at ")[2])) / 1e6


@asynccontextmanager
async def lab_process(data: Path) -> AsyncIterator[tuple[str, str]]:
    """`agent lab` in a process of its own; its address and its token's file."""
    argv = [sys.executable, "-m", "agent", "lab", "--listen", "127.0.0.1:0", "--data", str(data)]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, argv, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        lab = await nursery.start(run)
        said = ""
        while not said.endswith("\n"):
            said += bytes(await lab.stdout.receive_some()).decode() or "ended\n"
        found = re.fullmatch(r"http://(\S+) token_file=(.*)\n", said)
        assert found is not None, said
        yield found[1], found[2]
        lab.kill()


async def test_from_the_runner_to_the_bus_and_to_mimir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    on_bus: list[float] = []
    acknowledged: list[float] = []
    ask = Channel.ask

    async def timed(self: Channel, action: str, payload: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        answer = await ask(self, action, payload, **more)
        vertices = payload.get("vertices", ()) if action == "upsert" else ()
        acknowledged.extend(late_ms(vertex["id"]) for vertex in vertices if vertex["label"] == "TestOutcome")
        return answer

    monkeypatch.setattr(Channel, "ask", timed)
    async with lab_process(tmp_path / "lab") as (address, token), trio.open_nursery() as nursery:
        flags = {
            "ident": "lab-07", "state.dir": str(tmp_path / "state"), "suites.roots": [str(tmp_path)],
            "control.listen": ["127.0.0.1:0"], "mimir.url": f"ws://{address}/mimir", "mimir.token_file": token,
        }  # fmt: skip
        settings = config.load(Settings, [], env={}, flags=flags)
        service = Service(settings, lambda: settings, Given())
        with service.bus.subscribe(TestFinished, SuiteFinished) as events:
            await nursery.start(service.run)
            gc.freeze()  # as app.serve does
            argv = [sys.executable, "-c", PACED]
            suite = {"id": "s", "runner": "tap", "command": argv, "source": {"dir": str(tmp_path)}}
            await service.bus.ask("run_suite", {"suite": suite, "run": f"r-{os.getpid()}-paced"})
            async for event in events:
                if isinstance(event, SuiteFinished):
                    break
                if isinstance(event, TestFinished):
                    on_bus.append(late_ms(event.name))
        await service.store.commit()
        await service.deliver()
        nursery.cancel_scope.cancel()
    gc.unfreeze()
    assert (len(on_bus), len(acknowledged)) == (TESTS, TESTS)
    figure(f"a line of the runner -> the bus, {RATE} tests/s", percentiles(on_bus), "p99 < 2 ms")
    figure(f"a line of the runner -> acknowledged by Mimir, {RATE} tests/s", percentiles(acknowledged), "p99 < 20 ms")


def cpu_s(pid: int) -> float:
    """What a process has used of the processors, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("tests", [1000, 100_000])
async def test_what_a_suite_costs(tmp_path: Path, figure: Figure, tests: int) -> None:
    machine = Station(f"lab-{os.getpid()}", tmp_path / "machine")
    script = f"print('1..{tests}')\nfor n in range({tests}): print(f'ok {{n + 1}} - lets user number {{n}} in')"
    suite = machine.write_suite("") | {"command": [sys.executable, "-c", script]}
    async with bench(tmp_path / "lab") as lab:
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        try:
            first = lab.lab.seneschal.enqueue(machine.write_suite("echo 1..1; echo ok"))
            await lab.told(first)
            before, began = cpu_s(machine.pid), time.monotonic()
            run = lab.lab.seneschal.enqueue(suite)
            await lab.told(run, within_s=600)
            took, used = time.monotonic() - began, cpu_s(machine.pid) - before
            peak = peak_mib(machine.pid)
        finally:
            machine.kill()
    what = f"a suite of {tests:,} tests, told to all"
    goals = {1000: ("< 0.5 s", "-"), 100_000: ("-", "< 80 MiB")}[tests]
    figure(f"{what} in {took:.1f} s: the agent's CPU", f"{used:.2f} s", goals[0])
    figure(f"{what}: the agent's memory at most", f"{peak:.0f} MiB", goals[1])
