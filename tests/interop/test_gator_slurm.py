"""Debian's Slurm, one node on loopback: jobs by sbatch that complete over the websocket, and what scancel does."""

import getpass
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

AGENT = (sys.executable, "-P", "-m", "agent", "gator", "--scheduler", "slurm", "--interval", "1")
WITHIN_S = 120

pytestmark = pytest.mark.interop


def held_port(stack: ExitStack) -> int:
    """A port that is given to nobody but who names it."""
    held = stack.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    return port


def conf(folder: Path, stack: ExitStack) -> str:
    host = socket.gethostname().partition(".")[0]
    values = {
        "ClusterName": "house",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "SlurmctldPort": held_port(stack),
        "SlurmdPort": held_port(stack),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": 2,
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0",
    }
    lines = [f"{name}={value}" for name, value in values.items()]
    lines.append(f"NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN")
    lines.append("PartitionName=main Nodes=ALL Default=YES State=UP")
    return "\n".join(lines) + "\n"


def pause() -> None:
    trio.run(trio.sleep, 0.1)


@pytest.fixture
def slurm(
    tmp_path: Path, peer_command: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """The environment in which its commands find it."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")  # where the daemons are; not every user looks there
    munged, slurmctld, slurmd = (str(peer_command(name)) for name in ("munged", "slurmctld", "slurmd"))
    folder = tmp_path / "slurm"
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{name}-file={folder / name}" for name in ("pid", "log", "seed")]
    files += [f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'munge.sock'}"]
    daemons = [
        [munged, "--force", "--foreground", *files],
        [slurmctld, "-D", "-f", env["SLURM_CONF"]],
        [slurmd, "-D", "-N", "node1", "-f", env["SLURM_CONF"]],
    ]
    with ExitStack() as stack:
        (folder / "slurm.conf").write_text(conf(folder, stack))
        for number, argv in enumerate(daemons):
            log = stack.enter_context(open(folder / f"{number}.out", "wb"))
            daemon = stack.enter_context(subprocess.Popen(argv, stdout=log, stderr=log, env=env))
            stack.callback(daemon.terminate)
            while number == 0 and not (folder / "munge.sock").exists():
                assert daemon.poll() is None, (folder / "0.out").read_text()
                pause()
        until = time.monotonic() + WITHIN_S
        while "idle" not in (told := command("sinfo", "-h", "-o", "%t", env=env)):
            assert time.monotonic() < until, told + "".join(file.read_text() for file in folder.glob("*.out"))
            pause()
        yield env


def command(*argv: str, env: dict[str, str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S, env=env)
    return done.stdout + done.stderr


def root_of(spec: str, folder: Path, env: dict[str, str], *flags: str) -> tuple["subprocess.Popen[str]", int]:
    (folder / "spec.yaml").write_text(spec)
    reading, writing = os.pipe()
    argv = (*AGENT, *flags, "--tracking", str(folder / "t"), "--events-fd", str(writing), str(folder / "spec.yaml"))
    root = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=(writing,), env=env)
    os.close(writing)
    return root, reading


def ends(pipe: Any) -> list[tuple[str, str, int]]:
    events = [json.loads(line) for line in pipe]
    return sorted((event["ident"], event["result"], event["code"]) for event in events if event["event"] == "end")


def test_jobs_complete_over_the_websocket_and_what_cannot_be_is_told(tmp_path: Path, slurm: dict[str, str]) -> None:
    spec = """\
!JobGroup
ident: g
jobs:
  - !Job { ident: good, command: hostname, resources: [!Cores [2], !Memory [100, MB]] }
  - !Job { ident: bad, command: sh, args: [-c, "exit 3"] }
  - !Job { ident: huge, command: "true", resources: [!Memory [1, TB]] }
  - !JobArray { ident: t, repeats: 2, jobs: [!Job { ident: x, command: "true" }] }
"""
    root, reading = root_of(spec, tmp_path, slurm)
    with root, open(reading) as pipe:
        found = ends(pipe)
        out, _ = root.communicate(timeout=WITHIN_S)
    assert root.returncode == 1
    assert found == [
        ("bad", "FAILURE", 3),
        ("good", "SUCCESS", 0),
        ("huge", "FAILURE", 254),
        ("x_0", "SUCCESS", 0),
        ("x_1", "SUCCESS", 0),
    ]
    assert "Child 'huge' is lost: it cannot be started: sbatch: sbatch: error: Memory specification can not be" in out


def test_like_jobs_share_an_allocation(tmp_path: Path, slurm: dict[str, str]) -> None:
    task = "sh, args: [-c, 'echo {name} $SLURM_JOB_ID >> {folder}/ran; exit {code}']"
    jobs = ((name, task.format(name=name, folder=tmp_path, code=code)) for name, code in (("a", 0), ("b", 4), ("c", 0)))
    lines = (f"  - !Job {{ ident: {name}, command: {command} }}\n" for name, command in jobs)
    spec = "!JobGroup\nident: g\njobs:\n" + "".join(lines)
    root, reading = root_of(spec, tmp_path, slurm, "--sched-arg", "batch=3")
    with root, open(reading) as pipe:
        assert ends(pipe) == [("a", "SUCCESS", 0), ("b", "FAILURE", 4), ("c", "SUCCESS", 0)]
        root.communicate(timeout=WITHIN_S)
    names, allocations = zip(*(line.split() for line in (tmp_path / "ran").read_text().splitlines()), strict=True)
    assert sorted(names) == ["a", "b", "c"]
    assert len(set(allocations)) == 1


def test_a_job_that_scancel_ends_is_told_as_stopped_within_30_s(tmp_path: Path, slurm: dict[str, str]) -> None:
    spec = (
        f"!JobGroup {{ident: g, jobs: [!Job {{ident: a, command: sh, args: [-c, 'echo > {tmp_path}/up; sleep 600']}}]}}"
    )
    root, reading = root_of(spec, tmp_path, slurm)
    with root, open(reading) as pipe:
        until = time.monotonic() + WITHIN_S
        while not (tmp_path / "up").exists():
            assert time.monotonic() < until
            pause()
        (job,) = command("squeue", "-h", "-o", "%i", env=slurm).split()
        command("scancel", job, env=slurm)
        cancelled = time.monotonic()
        assert ends(pipe) == [("a", "FAILURE", 255)]
        assert time.monotonic() - cancelled < 30
        root.communicate(timeout=WITHIN_S)
    assert root.returncode == 1
