"""Trees whose tiers are killed and whose lines are cut: every job's result is at the root exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

AGENT = (sys.executable, "-P", "-m", "agent", "gator")
WITHIN_S = 120

# Started in place of `agent gator`: a proxy before the parent, which cuts every line that it has had for a while.
CUTTING = """\
import os, socket, subprocess, sys, threading, time

argv = sys.argv[1:]
at = argv.index("--parent") + 1
host, port = argv[at].rsplit(":", 1)
server = socket.create_server(("127.0.0.1", 0))
argv[at] = "127.0.0.1:%d" % server.getsockname()[1]

def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass

def serve():
    for cut in range(1000):
        ours, _ = server.accept()
        theirs = socket.create_connection((host, int(port)))
        for pair in ((ours, theirs), (theirs, ours)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
        if cut < int(os.environ["CUTS"]):
            threading.Event().wait(0.4)
            for line in (ours, theirs):
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
                line.close()

threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run([sys.executable, "-P", "-m", "agent", "gator", *argv]).returncode)
"""


@contextmanager
def running(spec: str, folder: Path, *flags: str, **env: str) -> Iterator[tuple["subprocess.Popen[str]", Any]]:
    """A root, and the pipe that tells of its jobs."""
    (folder / "spec.yaml").write_text(spec)
    reading, writing = os.pipe()
    argv = (*AGENT, "--tracking", str(folder / "t"), "--events-fd", str(writing), *flags, str(folder / "spec.yaml"))
    root = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=(writing,), env={**os.environ, **env})
    os.close(writing)
    try:
        with root, open(reading) as pipe:
            yield root, pipe
    finally:
        root.kill()


def ends(pipe: Any, until: str = "") -> list[tuple[str, str, int]]:
    """Every job's end, in the order of idents; or those up to that of the job `until`."""
    found = []
    for line in pipe:
        event = json.loads(line)
        if event["event"] == "end":
            found.append((event["ident"], event["result"], event["code"]))
            if event["ident"] == until:
                break
    return sorted(found)


def wait_for(holds: Any) -> None:
    until = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < until, "it did not come"
        os.sched_yield()
        _pause()


def _pause() -> None:
    trio.run(trio.sleep, 0.02)


def pid_of(folder: Path) -> int:
    """The process of the layer that keeps its files there."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--parent" in argv and str(folder).encode() in argv:
                return int(entry.name)
    raise AssertionError(f"no layer of {folder}")


KILLED = """\
!JobGroup
ident: g
jobs:
  - !Job {{ ident: before, command: "true" }}
  - !JobGroup
    ident: mid
    jobs:
      - !Job {{ ident: quick, command: "true" }}
      - !Job {{ ident: slow, command: sh, args: [-c, "echo $$ > {folder}/slow; exec sleep 600"], on_done: [quick] }}
      - !Job {{ ident: never, command: "true", on_done: [slow] }}
  - !Job {{ ident: after, command: "true", on_done: [mid] }}
"""


def test_a_tier_killed_in_the_middle_of_the_tree_loses_no_result_and_leaves_no_process(tmp_path: Path) -> None:
    spec = KILLED.format(folder=tmp_path)
    with running(spec, tmp_path, "--isolate", "--quiet", "--interval", "0.5") as (root, pipe):
        slow = tmp_path / "slow"
        wait_for(lambda: slow.exists() and slow.read_text().strip())
        task = int(slow.read_text())
        found = ends(pipe, until="quick")
        os.kill(pid_of(tmp_path / "t/mid"), signal.SIGKILL)
        found += ends(pipe)
        assert root.wait(WITHIN_S) == 1
    assert sorted(found) == [
        ("after", "SUCCESS", 0),
        ("before", "SUCCESS", 0),
        ("never", "FAILURE", 254),
        ("quick", "SUCCESS", 0),
        ("slow", "FAILURE", 254),
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(task, 0)


def test_a_wrapper_killed_by_its_parents_side_is_started_again(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) = 2 ] || exec sleep 600"
    spec = f'!JobGroup {{ident: g, jobs: [!Job {{ident: a, retries: 1, command: sh, args: [-c, "{script}"]}}]}}'
    with running(spec, tmp_path, "--isolate", "--quiet", "--interval", "0.5") as (root, pipe):
        wait_for((tmp_path / "runs").exists)
        os.kill(pid_of(tmp_path / "t/a"), signal.SIGKILL)
        assert ends(pipe) == [("a", "SUCCESS", 0)]
        assert root.wait(WITHIN_S) == 0
    assert (tmp_path / "t/a/attempt_1/db.sqlite").exists()


def test_lines_that_are_cut_again_and_again_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "cutting.py").write_text(CUTTING)
    spec = """\
!JobGroup
ident: g
jobs:
  - !JobArray { ident: t, repeats: 12, jobs: [!Job { ident: x, command: sh, args: [-c, "sleep 0.2; exit $((GATOR_ARRAY_INDEX == 7))"] }] }
  - !Job { ident: a, command: sleep, args: [1] }
"""  # noqa: E501 - one line of YAML
    flags = ("--quiet", "--interval", "0.3", "--sched-arg", f"command={sys.executable} {tmp_path / 'cutting.py'}")
    with running(spec, tmp_path, *flags, CUTS="2") as (root, pipe):
        found = ends(pipe)
        assert root.wait(WITHIN_S) == 1
    assert found == sorted(
        [("a", "SUCCESS", 0), *((f"x_{n}", "FAILURE" if n == 7 else "SUCCESS", int(n == 7)) for n in range(12))]
    )
