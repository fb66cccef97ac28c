"""Tasks whose root was killed end; children that are processes of their own go on; who ends well leaves nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from agent.gator.orphans import task_mark
from tests.gator_tree import until

AGENT = (sys.executable, "-P", "-m", "agent", "gator", "--quiet")
WITHIN_S = 120.0


@contextmanager
def root_of(folder: Path, script: str, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A root with one job, in a tier."""
    (folder / "spec.yaml").write_text(
        f"!JobGroup {{ident: g, jobs: [!Job {{ident: j, command: sh, args: [{script}]}}]}}"
    )
    argv = (*AGENT, *flags, "--tracking", str(folder / "t"), str(folder / "spec.yaml"))
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as root:
        try:
            yield root
        finally:
            root.kill()


def words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def lives(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def about(folder: Path) -> list[str]:
    """The layers that were started for it, and what guards them, by their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes()
                if b"\0gator\0" in argv and str(folder).encode() in argv:
                    found.append(entry.name)
            except OSError:
                continue
    return found


async def test_tasks_of_a_killed_root_end_with_all_they_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"-c, 'setsid sleep 600 & echo $! $$ > {pids}; exec sleep 600'"
    with root_of(tmp_path, script) as root:
        await until(lambda: len(words(pids)) == 2, within_s=WITHIN_S)
        assert all(map(lives, words(pids)))
        root.send_signal(signal.SIGKILL)
        await until(lambda: not any(map(lives, words(pids))), within_s=WITHIN_S)
        await until(lambda: not about(tmp_path), within_s=WITHIN_S)
    assert (tmp_path / "t/messages.log").read_text().endswith("[CRITICAL] this root was killed: its tasks were ended\n")


async def test_a_child_of_its_own_goes_on_without_its_root(tmp_path: Path) -> None:
    began, go, ended = (tmp_path / name for name in ("began", "go", "ended"))
    script = f"-c, 'echo x > {began}; while [ ! -e {go} ]; do sleep 0.1; done; echo x > {ended}'"
    with root_of(tmp_path, script, "--isolate", "--resume-wait", "0.5") as root:
        await until(lambda: bool(words(began)), within_s=WITHIN_S)
        root.send_signal(signal.SIGKILL)
        root.wait()
        await until(lambda: len(about(tmp_path)) == 1, within_s=WITHIN_S)  # the root's guard has ended
        go.touch()
        await until(lambda: bool(words(ended)), within_s=WITHIN_S)
        await until(lambda: not about(tmp_path), within_s=WITHIN_S)


async def test_who_ends_well_leaves_nobody_and_each_root_has_a_mark_of_its_own(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    for _ in range(2):
        with root_of(tmp_path, f"-c, 'printenv EMISSARY_RUN >> {marks}'") as root:
            with trio.fail_after(WITHIN_S):
                out, _ = await trio.to_thread.run_sync(root.communicate)  # its output ends with it
            assert (out, root.returncode) == (b"", 0)
        await until(lambda: not about(tmp_path), within_s=WITHIN_S)
    first, second = words(marks)
    assert first != second
    own = f"/{task_mark(('g',), 'j')}"
    assert first.endswith(own)
    assert second.endswith(own)
    outer = os.environ.get("EMISSARY_RUN", "")
    assert first.startswith(outer)
