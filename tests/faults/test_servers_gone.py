"""Servers that are killed in the run or ill for all of it, and come back: the end is the same as ever.

Source: protocols/emissary.md, acceptance 4, 9 and 10; "Real peers for tests" (the lab's switches).
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.faults.station import HERE, Bench, Station, bench, until

# Twenty tests; `limit` is how many it prints before it waits until the file `go` is in its folder.
SCRIPT = """
echo 1..20; n=0
while [ $n -lt 20 ]; do
  [ $n -eq {limit} ] && while [ ! -e go ]; do sleep 0.02; done
  [ $((n % 5)) -eq 4 ] && printf 'not '
  echo "ok - test $n"; n=$((n + 1))
done; exit 1
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Station]:
    made = Station(f"lab-{os.getpid()}", tmp_path / "machine")
    yield made
    made.kill()


def suite(machine: Station, limit: int) -> dict[str, Any]:
    (Path(machine.source()["dir"]) / "go").unlink(missing_ok=True)
    return machine.write_suite(SCRIPT.format(limit=limit))


def go_on(machine: Station) -> None:
    (Path(machine.source()["dir"]) / "go").touch()


@asynccontextmanager
async def lab_process(data: Path, project: Path, port: int) -> AsyncIterator[tuple[trio.Process, str, Path]]:
    """`agent lab` as a process, its address, its token's file."""
    argv = [sys.executable, "-m", "agent", "lab", "--listen", f"127.0.0.1:{port}", "--data", str(data)]
    argv = [*argv, "--suite", str(project)]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, argv, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        lab = await nursery.start(run)
        line = ""
        while not line.endswith("\n"):
            line += bytes(await lab.stdout.receive_some()).decode() or "ended\n"
        said = re.fullmatch(r"http://(\S+) token_file=(.*)\n", line)
        assert said is not None, line
        yield lab, said[1], Path(said[2])
        lab.kill()


@pytest.mark.parametrize("limit", [0, 10, 20], ids=["before the first test", "in the middle", "after the last test"])
async def test_a_lab_killed_in_the_run_and_back_after_its_end(
    machine: Station, tmp_path: Path, held_port: int, limit: int
) -> None:
    document = suite(machine, limit)
    project = Path(document["source"]["dir"])
    script = document["command"][2].replace("\\", "\\\\")
    (project / "suite.toml").write_text(f"id = 's'\nrunner = 'tap'\ncommand = ['sh', '-c', '''{script}''']\n")
    async with lab_process(tmp_path / "lab", project, held_port) as (lab, address, token):
        machine.configure(address, token)
        machine.start()
        (run,) = await until(lambda: found(machine, f"runs/*/{'stdout.log' if limit else 'scratch'}"))
        lab.kill()
        await lab.wait()
    go_on(machine)
    await until(lambda: found(machine, "runs/*/result.json"))
    async with bench(tmp_path / "lab", address) as lab_again:
        row = await lab_again.told(run)
        assert (row.run, row.state) == (run, "done")
        result = await lab_again.agree(machine, run)
    assert (result["verdict"], result["counts"]["failed"], result["counts"]["passed"]) == ("failed", 4, 16)


async def found(machine: Station, pattern: str) -> list[str]:
    """The runs that have such files."""
    return [path.relative_to(machine.state / "runs").parts[0] for path in machine.state.glob(pattern)]


async def switch(lab: Bench, faults: dict[str, Any]) -> None:
    """Turn the lab's switches, as a person would."""
    headers = {"Authorization": f"Bearer {lab.lab.token_file.read_text().strip()}"}
    async with httpx.AsyncClient(headers=headers, timeout=60) as client:
        (await client.post(f"{lab.lab.url}/lab/faults", json=faults)).raise_for_status()


@pytest.mark.parametrize(
    "faults",
    [
        {"mimir": {"late_s": 0.4}, "seneschal": {"late_s": 0.4}, "polarize": {"late_s": 0.4}},
        {"mimir": {"cut": 2}, "seneschal": {"cut": 2}},
        {"seneschal": {"duplicate": True}},
        {"polarize": {"html": 2}},
        {"polarize": {"error": 2}},
        {"polarize": {"half": 2}},
    ],
    ids=["late", "cut", "duplicate", "html", "error", "half"],
)
async def test_an_ill_lab_changes_nothing_in_the_end(machine: Station, tmp_path: Path, faults: dict[str, Any]) -> None:
    async with bench(tmp_path / "lab") as lab:
        await switch(lab, faults)
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        run = lab.lab.seneschal.enqueue(suite(machine, limit=20))
        go_on(machine)
        assert (await lab.told(run)).run == run
        # Of a run that is ordered once more after its end, that is told once more.
        result = await lab.agree(machine, run, completes=(1, 2) if "duplicate" in faults.get("seneschal", {}) else (1,))
        assert len(result["tests"]) == 20
        assert not any(getattr(lab.lab.polarize.faults, name) for name in ("html", "error", "half"))


async def test_a_lab_that_answers_nothing_for_the_whole_run(machine: Station, tmp_path: Path) -> None:
    async with bench(tmp_path / "lab") as lab:
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        run = lab.lab.seneschal.enqueue(suite(machine, limit=10))
        await lab.begun(run)
        await switch(lab, {name: {"silent": True} for name in ("mimir", "seneschal", "polarize")})
        go_on(machine)
        await until(lambda: found(machine, "runs/*/result.json"))
        assert lab.heard.count(run) == {"Accepted": 1}
        await switch(lab, {name: {"silent": False} for name in ("mimir", "seneschal", "polarize")})
        # What was asked meanwhile has no answer within 10 s, Polarize none within 330 s: a new start asks again.
        await machine.end(by=signal.SIGKILL)
        machine.start()
        await lab.told(run)
        assert len((await lab.agree(machine, run))["tests"]) == 20


async def test_a_message_that_mimir_refuses_is_held_and_comes_again_at_reload(machine: Station, tmp_path: Path) -> None:
    async with bench(tmp_path / "lab") as lab:
        await switch(lab, {"mimir": {"refuse": "test 7"}})
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        run = lab.lab.seneschal.enqueue(suite(machine, limit=20))
        go_on(machine)
        await lab.told(run)
        assert set(await lab.outcomes(run)) == {f"test {n}" for n in range(20) if n != 7}
        await switch(lab, {"mimir": {"refuse": ""}})
        os.kill(machine.pid, signal.SIGHUP)
        await until(lambda: is_there(lab, run, "test 7"))
        await lab.agree(machine, run)


async def is_there(lab: Bench, run: str, case: str) -> bool:
    return case in await lab.outcomes(run)
