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

import trio

from agent.core.processtree import stat_of

AGENT = (sys.executable, "-P", "-m", "agent", "gator")
WITHIN_S = 120

# Started in place of `agent gator`: a proxy before the parent. `CUTS` tells by child at which messages its lines are
# cut, one after the other: "register>" when the request is about to pass, "register<" when its answer is.
CUTTING = """\
import json, os, re, socket, subprocess, sys, threading

argv = sys.argv[1:]
at, ident = argv.index("--parent") + 1, argv[argv.index("--id") + 1]
host, port = argv[at].rsplit(":", 1)
server = socket.create_server(("127.0.0.1", 0))
argv[at] = "127.0.0.1:%d" % server.getsockname()[1]
cuts = json.loads(os.environ["CUTS"])[ident]
lock = threading.Lock()

def actions(data):  # of the messages that are whole, and what is behind them
    found = []
    while len(data) > 1:
        size, begin = data[1] & 127, 2
        if size > 125:
            begin = 4 if size == 126 else 10
            size = int.from_bytes(data[2:begin], "big")
        mask = bytes(4)
        if data[1] & 128:
            mask, begin = data[begin : begin + 4], begin + 4
        if len(data) < begin + size:
            break
        text = bytes(byte ^ mask[n % 4] for n, byte in enumerate(data[begin : begin + size]))
        found += re.findall(rb'"action": ?"([a-z]+)"', text)
        data = data[begin + size :]
    return found, data

def is_cut(found, mark):
    with lock:
        if cuts and cuts[0] in [name.decode() + mark for name in found]:
            with open(os.environ["CUT"] + ident, "a") as told:
                print(cuts.pop(0), file=told)
            return True
        return False

def pump(source, target, mark, line):
    came, is_open, found = b"", b"", []
    try:
        while data := source.recv(1 << 20):
            came += data
            if not is_open:
                head, is_open, came = came.partition(b"\\r\\n\\r\\n")
                came = came if is_open else head
            if is_open:
                found, came = actions(came)
            if is_cut(found, mark):
                break
            target.sendall(data)
    except OSError:
        pass
    for end in line:  # without a word: the other thread's read ends first, or the line would stay open until then
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
            end.shutdown(socket.SHUT_RD)
        except OSError:
            pass
        end.close()

def serve():
    while True:
        ours, _ = server.accept()
        try:
            theirs = socket.create_connection((host, int(port)))
        except OSError:
            ours.close()
            continue
        for source, target, mark in ((ours, theirs, ">"), (theirs, ours, "<")):
            threading.Thread(target=pump, args=(source, target, mark, (ours, theirs)), daemon=True).start()

threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run([sys.executable, "-P", "-m", "agent", "gator", *argv]).returncode)
"""
MOMENTS = [f"{action}{mark}" for action in ("spec", "register", "update", "complete") for mark in "><"]


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
    with running(spec, tmp_path, "--isolate", "--quiet") as (root, pipe):
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
    stat = stat_of(task)
    assert stat is None or stat.ended  # a zombie, where nobody has reaped it yet


def test_a_wrapper_killed_by_its_parents_side_is_started_again(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) = 2 ] || exec sleep 600"
    spec = f'!JobGroup {{ident: g, jobs: [!Job {{ident: a, retries: 1, command: sh, args: [-c, "{script}"]}}]}}'
    with running(spec, tmp_path, "--isolate", "--quiet") as (root, pipe):
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
  - !JobArray { ident: t, repeats: 8, jobs: [!Job { ident: x, command: sh, args: [-c, "exit $((GATOR_ARRAY_INDEX == 7))"] }] }
  - !Job { ident: a, command: "true" }
"""  # noqa: E501 - one line of YAML
    flags = ("--quiet", "--sched-arg", f"command={sys.executable} {tmp_path / 'cutting.py'}")
    # What comes with every connection can be the second cut: who has its spec does not ask for it again.
    cuts = {f"x_{n}": [MOMENTS[n], MOMENTS[2 + n % 6]] for n in range(8)}
    cuts |= {"t": ["register<", "update<"], "a": ["update>", "complete<"]}
    with running(spec, tmp_path, *flags, CUTS=json.dumps(cuts), CUT=str(tmp_path / "cut-")) as (root, pipe):
        found = ends(pipe)
        assert root.wait(WITHIN_S) == 1
    assert found == sorted(
        [("a", "SUCCESS", 0), *((f"x_{n}", "FAILURE" if n == 7 else "SUCCESS", int(n == 7)) for n in range(8))]
    )
    assert {ident: (tmp_path / f"cut-{ident}").read_text().split() for ident in cuts} == cuts
