"""What core/processtree.py reads in /proc, and whom it signals. Kills of whole trees are in tests/faults."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent.core.processtree import (
    Proc,
    Stat,
    TreeSurvived,
    kill,
    mark_of,
    nested,
    no_strangers,
    reap,
    send,
    snapshot,
    stat_of,
    sweep,
    tree,
)

MARK = f"run-of-test-core-processtree-{os.getpid()}"  # several test runs may share a machine


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A marked process in our session."""
    child = subprocess.Popen(["sleep", "1000"], env={**os.environ, "EMISSARY_RUN": MARK})
    until_mark(child.pid, MARK)
    yield child
    child.kill()
    child.wait()


def until_mark(pid: int, mark: str) -> None:
    """Return when it has the environment that it was given: Popen's and a shell's wait end a moment before."""
    while mark_of(pid) != mark:
        stat = stat_of(pid)
        assert stat is not None
        assert not stat.ended


def proc_of(pid: int) -> Proc:
    stat = stat_of(pid)
    assert stat is not None
    return stat.proc


def test_a_process_is_read_whatever_it_is_called() -> None:
    # The name in /proc/PID/stat is what the program chose, here the look of a zombie's line.
    script = "import ctypes; ctypes.CDLL(None).prctl(15, b'x) Z 1 (y'); input()"
    with subprocess.Popen([sys.executable, "-c", script, "in"], stdin=subprocess.PIPE) as child:
        stat = stat_of(child.pid)
        assert stat is not None
        assert (stat.proc.pid, stat.parent, stat.session, stat.ended) == (child.pid, os.getpid(), os.getsid(0), False)
        assert stat.proc.start >= proc_of(os.getpid()).start


def test_a_zombie_has_ended_and_a_reaped_one_is_not_there() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    stat = stat_of(child.pid)
    assert stat is not None
    assert stat.ended
    assert mark_of(child.pid) in {"", None}
    child.wait()
    assert stat_of(child.pid) is None
    assert mark_of(child.pid) is None


def test_a_process_whose_first_thread_has_left_lives_on() -> None:
    script = """
import ctypes, sys, threading
threading.Thread(target=lambda: (print("up", flush=True), sys.stdin.read())).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        while "(zombie)" not in Path(f"/proc/{child.pid}/status").read_text():
            assert child.poll() is None
        stat = stat_of(child.pid)
        assert stat is not None
        assert not stat.ended
        child.kill()


def test_the_mark_is_read_from_the_environment(sleeper: "subprocess.Popen[bytes]") -> None:
    assert mark_of(sleeper.pid) == MARK
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"NO_EMISSARY_RUN": "x"}) as other:
        assert mark_of(other.pid) == ""


def test_a_tree_is_told_by_its_mark_alone(sleeper: "subprocess.Popen[bytes]") -> None:
    assert [stat.proc for stat in tree(MARK)] == [proc_of(sleeper.pid)]
    assert tree(MARK[:-1]) == []
    assert tree(f"{MARK}/inner") == []


def test_the_tree_of_an_agent_within_belongs_to_the_tree(sleeper: "subprocess.Popen[bytes]") -> None:
    inner = {**os.environ, "EMISSARY_RUN": f"{MARK}/inner"}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=inner, start_new_session=True) as child:
        until_mark(child.pid, inner["EMISSARY_RUN"])
        assert {stat.proc.pid for stat in tree(MARK)} == {sleeper.pid, child.pid}


def test_within_a_run_our_marks_are_below_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMISSARY_RUN", raising=False)
    assert nested("a") == "a"
    monkeypatch.setenv("EMISSARY_RUN", "outer")
    assert nested("a") == "outer/a"


def test_nobody_finds_himself_or_his_ancestors() -> None:
    script = "from agent.core.processtree import stat_of, tree; import os; print(tree('x', stat_of(os.getppid()).proc))"
    shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, script]  # it leads the session of both
    done = subprocess.run(shell, capture_output=True, text=True, check=True, start_new_session=True)
    assert done.stdout == "[]\n"


def test_nothing_older_than_the_root_belongs(sleeper: "subprocess.Popen[bytes]") -> None:
    later = Proc(1 << 30, proc_of(sleeper.pid).start + 1)
    assert tree(MARK, later) == []


def test_a_session_that_has_our_root_s_number_but_not_its_start_is_another(
    sleeper: "subprocess.Popen[bytes]",
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as child:
        now = proc_of(child.pid)
        assert [stat.proc for stat in tree("none", now)] == [now]
        assert tree("none", Proc(child.pid, now.start - 1)) == []


def test_a_signal_goes_to_the_very_process_or_to_nobody(sleeper: "subprocess.Popen[bytes]") -> None:
    now = proc_of(sleeper.pid)
    assert not send(Proc(now.pid, now.start - 1), signal.SIGKILL)
    assert sleeper.poll() is None
    assert send(now, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL
    assert not send(now, signal.SIGKILL)


async def test_what_outlives_the_kill_is_named(sleeper: "subprocess.Popen[bytes]") -> None:
    # Nobody, and in nobody's group: as unmoved by a signal as a process in state D.
    other = Stat(Proc(sleeper.pid, 0), parent=1, group=1 << 30, session=1 << 30, ended=False)
    assert await kill(lambda: [other], within_s=0.02) == [other]
    assert sleeper.poll() is None
    error = TreeSurvived("r42", (7, 8))
    assert error.pids == (7, 8)
    assert "r42: still alive after SIGKILL: pid 7,8. See `ps -o pid,user,stat,args -p 7,8`" in str(error)


async def test_who_was_stopped_is_killed_however_slow_the_machine(sleeper: "subprocess.Popen[bytes]") -> None:
    await kill(lambda: list(filter(None, [stat_of(sleeper.pid)])), within_s=0)
    assert sleeper.wait(60) == -signal.SIGKILL


async def test_all_are_stopped_before_any_is_killed(sleeper: "subprocess.Popen[bytes]") -> None:
    looks: list[str] = []

    def find() -> list[Stat]:
        stat = stat_of(sleeper.pid)
        assert stat is not None
        if stat.ended:
            looks.append("ended")
        elif not looks:
            looks.append("runs")
        else:  # our child's being stopped is told to us; a signal takes a moment to arrive
            told = os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert told is not None
            looks.append("stopped" if told.si_code == os.CLD_STOPPED else "killed")
        return [stat]

    assert await kill(find) == []
    assert looks == ["runs", "stopped", "ended", "ended"]
    assert sleeper.wait() == -signal.SIGKILL


async def test_nobody_at_one_look_is_not_enough(sleeper: "subprocess.Popen[bytes]") -> None:
    stat = stat_of(sleeper.pid)
    assert stat is not None
    looks: list[list[Stat]] = [[], [stat], []]
    assert await kill(lambda: looks.pop(0) if looks else []) == []
    assert sleeper.wait() == -signal.SIGKILL


@pytest.fixture
def zombie_and_member() -> Iterator[tuple[int, int]]:
    """The pids of the ended, unreaped leader of a group and of a process that lives in it."""
    argv = ["sh", "-c", "sleep 1000 & echo $!"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout is not None
        member = int(leader.stdout.readline())
        os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
        yield leader.pid, member


async def test_the_group_of_a_zombie_is_ended_with_whoever_is_in_it(zombie_and_member: tuple[int, int]) -> None:
    zombie, member = zombie_and_member
    handle = os.pidfd_open(member)
    try:
        assert await kill(lambda: list(filter(None, [stat_of(zombie)]))) == []
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)


# A shell that leads a session, and an orphan in it that has neither the mark nor a parent of the tree.
LEADER = ["sh", "-c", "orphan=$(env -i sh -c 'echo $$; exec sleep 1000 >&-' &); echo $orphan; read end"]


@pytest.mark.parametrize("with_root", [True, False])
def test_a_session_that_belongs_brings_its_orphans(with_root: bool) -> None:
    env = {**os.environ, "EMISSARY_RUN": MARK}
    with subprocess.Popen(
        LEADER, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        orphan = proc_of(int(leader.stdout.readline()))
        root = Proc(1 << 30, proc_of(leader.pid).start) if with_root else None
        assert {stat.proc for stat in tree(MARK, root)} == {proc_of(leader.pid), orphan}
        assert send(orphan, signal.SIGKILL)


def test_a_person_s_session_does_not_belong_for_a_marked_command_in_it() -> None:
    script = f"EMISSARY_RUN={MARK} sleep 1000 & echo $!; read end; kill $!"
    argv = ["sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as person:
        assert person.stdout is not None
        command = proc_of(int(person.stdout.readline()))
        until_mark(command.pid, MARK)
        assert [stat.proc for stat in tree(MARK)] == [command]


async def test_a_sweep_ends_what_has_the_mark(sleeper: "subprocess.Popen[bytes]") -> None:
    await sweep(MARK)
    assert sleeper.wait() == -signal.SIGKILL
    await sweep(MARK)  # there is nothing, and nothing happens


def test_only_the_exits_of_adopted_processes_are_taken() -> None:
    ours = subprocess.Popen(["true"])
    led = subprocess.Popen(["true"], start_new_session=True)
    young = subprocess.Popen(["true"], start_new_session=True)
    for child in (ours, led, young):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    these = {ours.pid, led.pid, young.pid}  # what earlier tests left may end, and be reaped, at any time
    assert these.isdisjoint(reap({led.pid, young.pid}))
    assert these.isdisjoint(reap({led.pid}, before=proc_of(young.pid).start))
    assert these.intersection(reap({led.pid})) == {young.pid}  # as an orphan would be: outside our session, unlisted
    assert young.pid not in snapshot()
    assert (ours.wait(), led.wait()) == (0, 0)
    young.returncode = 0


def test_a_child_that_we_do_not_know_is_a_stranger() -> None:
    """One of our first thread, as an orphan would be."""
    others = {pid for pid, stat in snapshot().items() if stat.parent == os.getpid()}
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert not no_strangers(others)
        assert no_strangers({child.pid, *others})
        child.kill()
