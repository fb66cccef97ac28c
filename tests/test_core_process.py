"""Children of core/process.py: how they are started, what they are given, how they end. All of them are real."""

import os
import pwd
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from agent.core.errors import ProtocolMisuse
from agent.core.process import (
    Child,
    ChildFailedToStart,
    Exit,
    Limits,
    Reach,
    Spec,
    Step,
    adopt,
    drain,
    environ,
    open_child,
)
from agent.core.processtree import snapshot, stat_of, tree

MARK = f"run-of-test-core-process-{os.getpid()}"  # several test runs may share a machine

# Says "up", then notes the signals it gets; leaves at the ones it is told to. They wait for it: a handler's signal that
# comes just before pause() would be noted with the next one only.
WITNESS = """
import os, signal, sys
asked = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, asked)
os.write(1, b"up\\n")
while True:
    name = signal.Signals(signal.sigwait(asked)).name
    os.write(1, name.encode() + b"\\n")
    if name in sys.argv[1:]:
        sys.exit(7)
"""


def sh(script: str, **more: object) -> Spec:
    return spec("/bin/sh", "-c", script, **more)


def python(script: str, *args: str, **more: object) -> Spec:
    return spec(sys.executable, "-c", script, *args, **more)


def spec(*argv: str, **more: object) -> Spec:
    given = {"argv": argv, "cwd": Path("/"), "env": environ(os.environ), "mark": MARK, **more}
    return Spec(**given)  # type: ignore[arg-type]  # each test names the fields it means


async def ran(what: Spec, *, drain_s: float = 2.0) -> tuple[Exit, dict[str, str]]:
    """Start, read to the end, finish."""
    said: dict[str, bytearray] = {}
    async with open_child(what) as child, trio.open_nursery() as nursery:
        for name, pipe in child.streams.items():
            nursery.start_soon(drain, pipe, said.setdefault(name, bytearray()).extend)
        exit_ = await child.finish(drain_s=drain_s)
    return exit_, {name: text.decode() for name, text in said.items()}


async def said_up(child: Child) -> None:
    heard = b""
    while b"up\n" not in heard:
        heard += (chunk := await child.streams["stdout"].receive_some())
        assert chunk, "ended before it was up"


async def stopped(what: Spec, steps: Sequence[Step]) -> tuple[Exit, str]:
    """Start, wait until it is up, stop; the exit and what it said after it was up."""
    said = bytearray()
    async with open_child(what) as child, trio.open_nursery() as nursery:
        await said_up(child)
        nursery.start_soon(drain, child.streams["stdout"], said.extend)
        nursery.start_soon(drain, child.streams["stderr"], said.extend)
        exit_ = await child.stop(steps)
    return exit_, said.decode()


def open_files() -> int:
    """How many descriptors are open here. What earlier tests forgot may be closed at any time, so: at most as many."""
    return len(os.listdir("/proc/self/fd"))


async def reaped(pid: int) -> None:
    """Return when there is no such process, not even a zombie. Nothing tells of a reaping by another: so look."""
    while pid in snapshot():  # noqa: ASYNC110
        await trio.sleep(0.01)


@pytest.fixture
async def adopting(nursery: trio.Nursery) -> AsyncIterator[None]:
    await nursery.start(adopt)
    yield
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("script", "code", "by_signal"),
    [("exit 0", 0, None), ("exit 3", 3, None), ("kill -SEGV $$", None, "SIGSEGV"), ("kill -36 $$", None, "SIGRTMIN+2")],
)
async def test_the_exit_says_code_or_signal(script: str, code: int | None, by_signal: str | None) -> None:
    exit_, _ = await ran(sh(script))
    assert exit_ == Exit(code, by_signal, ended_by="self", oom=None)


async def test_what_it_writes_comes_by_name_and_extra_pipes_by_number() -> None:
    script = "echo out; echo err >&2; echo one >/dev/fd/$EMISSARY_PIPE_EVENTS; echo two >/dev/fd/$1; echo $2"
    _, said = await ran(spec("/bin/sh", "-c", script, "sh", "@pipe:trace", "@pipe:none", pipes=("events", "trace")))
    assert said == {"stdout": "out\n@pipe:none\n", "stderr": "err\n", "events": "one\n", "trace": "two\n"}


async def test_it_leads_a_session_of_its_own() -> None:
    _, said = await ran(python("import os; print(os.getpid() == os.getsid(0) == os.getpgrp())"))
    assert said["stdout"] == "True\n"


async def test_its_stdin_is_at_the_end_unless_asked_for() -> None:
    exit_, _ = await ran(spec("cat"))
    assert exit_.code == 0
    async with open_child(spec("cat", stdin=True)) as child:
        assert child.stdin is not None
        await child.stdin.send_all(b"hello")
        await child.stdin.aclose()
        assert await child.streams["stdout"].receive_some() == b"hello"
        assert (await child.wait()).code == 0


async def test_it_inherits_no_descriptor_but_its_pipes(tmp_path: Path) -> None:
    ours = os.open(tmp_path, os.O_RDONLY)
    try:
        os.set_inheritable(ours, True)
        _, said = await ran(python("import os; print(*os.listdir('/proc/self/fd'))", pipes=("events",)))
    finally:
        os.close(ours)
    assert len(said["stdout"].split()) == 3 + 1 + 1  # listing the folder opens one itself


async def test_its_environment_is_the_given_one_the_mark_and_the_pipes() -> None:
    _, said = await ran(
        spec("/usr/bin/env", env={"PATH": "/bin"}, pipes=("events",)),
    )
    names = {line.partition("=")[0]: line.partition("=")[2] for line in said["stdout"].splitlines()}
    number = names.pop("EMISSARY_PIPE_EVENTS")
    assert number.isdecimal()
    assert names == {"PATH": "/bin", "EMISSARY_RUN": MARK}


async def test_an_agent_within_a_run_marks_its_own_runs_below_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMISSARY_RUN", "outer")
    _, said = await ran(sh('echo "$EMISSARY_RUN"'))
    assert said["stdout"] == f"outer/{MARK}\n"


CALLER = {"PATH": "/bin", "HOME": "/root", "LC_TIME": "C", "SECRET": "x", "LD_PRELOAD": "y"}


@pytest.mark.parametrize(
    ("more", "keep", "child"),
    [
        ({}, (), {}),
        ({}, ("SECRET",), {"SECRET": "x"}),
        ({}, ("SEC*", "LD_*"), {"SECRET": "x", "LD_PRELOAD": "y"}),
        ({"LD_LIBRARY_PATH": "/caller"}, (), {}),
        ({"LD_LIBRARY_PATH": "/caller"}, ("LD_LIBRARY_*",), {"LD_LIBRARY_PATH": "/caller"}),
        ({"LD_LIBRARY_PATH": "/bundle", "_PYI_ARCHIVE_FILE": "a"}, ("LD_LIBRARY_*", "_*"), {}),
        (
            {"LD_LIBRARY_PATH": "/bundle", "LD_LIBRARY_PATH_ORIG": "/caller", "_PYI_ARCHIVE_FILE": "a"},
            ("LD_LIBRARY_*", "_*"),
            {"LD_LIBRARY_PATH": "/caller"},
        ),
    ],
)
def test_environ_passes_little_and_nothing_of_the_bundle(
    more: dict[str, str], keep: tuple[str, ...], child: dict[str, str]
) -> None:
    usual = {"PATH": "/bin", "HOME": "/root", "LC_TIME": "C"}
    assert environ({**CALLER, **more}, keep=keep) == {**usual, **child}


async def test_limits_hold_from_the_first_instruction() -> None:
    sizes = Limits(memory=1 << 30, address_space=1 << 33, file_size=1 << 20)
    limits = msgspec.structs.replace(sizes, processes=4000, nofile=50, cpu=9, nice=7, oom_score_adj=600)
    script = "cat /proc/self/limits /proc/self/oom_score_adj; nice; cut -d' ' -f19 /proc/self/stat"
    _, said = await ran(sh(script, limits=limits))
    *lines, oom_score_adj, nice, _ = said["stdout"].splitlines()
    held = {line[:26].strip(): tuple(line[26:68].split()) for line in lines}
    assert held["Max data size"] == (str(1 << 30),) * 2
    assert held["Max address space"] == (str(1 << 33),) * 2
    assert held["Max processes"] == ("4000", "4000")
    assert held["Max open files"] == ("50", "50")
    assert held["Max file size"] == (str(1 << 20),) * 2
    assert held["Max cpu time"] == ("9", "10")
    assert held["Max core file size"] == ("0", "0")
    assert (oom_score_adj, int(nice)) == ("600", os.nice(0) + 7)


async def test_a_limit_above_our_own_is_our_own() -> None:
    _, said = await ran(sh("ulimit -Hn", limits=Limits(nofile=1 << 40)))
    _, ours = await ran(sh("ulimit -Hn"))
    assert said == ours


async def test_memory_beyond_the_limit_is_refused_to_it() -> None:
    exit_, said = await ran(python("bytearray(1 << 28)", limits=Limits(memory=1 << 27)))
    assert exit_.code == 1
    assert said["stderr"].endswith("MemoryError\n")


async def test_a_signal_that_we_ignore_is_not_ignored_by_it() -> None:
    old = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        exit_, _ = await ran(sh("kill -QUIT $$"))
    finally:
        signal.signal(signal.SIGQUIT, old)
    assert exit_.signal == "SIGQUIT"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
async def test_it_runs_as_the_user_named_with_his_groups_alone() -> None:
    _, said = await ran(sh("id -un; id -G; cat /proc/self/oom_score_adj", user="nobody"))
    account = pwd.getpwnam("nobody")
    assert said["stdout"].splitlines() == ["nobody", str(account.pw_gid), "500"]


async def test_another_user_s_name_is_refused_to_all_but_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ChildFailedToStart, match="true: only root can run it as 'root'"):
        await ran(spec("true", user="root"))


async def test_a_user_that_is_not_there_is_named() -> None:
    with pytest.raises(ChildFailedToStart, match="true: there is no user 'n\\.n\\.'"):
        await ran(spec("true", user="n.n."))
    exit_, _ = await ran(spec("true", user=pwd.getpwuid(os.geteuid()).pw_name))
    assert exit_.code == 0


@pytest.mark.parametrize(
    ("argv", "cwd", "env", "text"),
    [
        (["no-such-program"], "", {}, "no-such-program: No such file or directory. Install it, or name its path; PATH"),
        (["./none"], "", {}, "./none: No such file or directory. Install it, or correct the path."),
        (["./script"], "", {}, "./script: No such file or directory. It is there, but the interpreter"),
        (["./plain"], "", {}, "./plain: Permission denied. Make it executable"),
        (["./text"], "", {}, "./text: Exec format error. Begin it with a line like #!/bin/sh"),
        (["true"], "none", {}, r"/none: No such file or directory \(the folder to run true in\). Make the folder."),
        (["true"], "plain", {}, r"/plain: Not a directory \(the folder to run true in\)"),
        (["true", "x" * 3_000_000], "", {}, "true: Argument list too long. Pass fewer"),
        ([], "", {}, "argv: it is empty"),
        (["true", "a\0b"], "", {}, "true: argument 1 cannot be passed"),
        (["true", "\ud800"], "", {}, "true: argument 1 cannot be passed"),
        (["true"], "", {"A": "\0"}, "true: the value of 'A' in the environment cannot be passed"),
        (["true"], "", {"A=B": ""}, "true: the name 'A=B' in the environment cannot be passed"),
        (["true"], "", {"": ""}, "true: the name '' in the environment cannot be passed"),
    ],
)
async def test_what_cannot_start_says_why_and_leaves_nothing(
    tmp_path: Path, argv: list[str], cwd: str, env: dict[str, str], text: str
) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "text").write_text("no first line\n")
    (tmp_path / "text").chmod(0o755)
    await ran(sh("exit 0"))  # trio's thread and its wakeup pipe are there
    before = open_files()
    with pytest.raises(ChildFailedToStart, match=text):
        await ran(spec(*argv, cwd=tmp_path / cwd, env={**environ(os.environ), **env}))
    assert open_files() <= before


async def test_an_error_of_a_start_tells_no_value_of_the_environment() -> None:
    with pytest.raises(ChildFailedToStart) as failure:
        await ran(spec("true", env={"TOKEN": "geheim\0"}))
    assert "geheim" not in str(failure.value)


@pytest.mark.parametrize(
    "wrong", [{"mark": ""}, {"pipes": ("stdout",)}, {"pipes": ("a", "a")}, {"pipes": ("A-B",)}, {"pipes": ("",)}]
)
async def test_a_pipe_or_mark_that_cannot_be_is_our_own_mistake(wrong: dict[str, object]) -> None:
    with pytest.raises(ProtocolMisuse):
        await ran(spec("true", **wrong))


async def test_the_ladder_goes_down_step_by_step() -> None:
    steps = [Step(signal.SIGINT, 0.05), Step(signal.SIGTERM, 60)]
    exit_, said = await stopped(python(WITNESS, "SIGTERM"), steps)
    assert said == "SIGINT\nSIGTERM\n"
    assert exit_ == Exit(7, None, ended_by="SIGTERM", oom=None)


async def test_the_ladder_ends_with_the_child() -> None:
    exit_, said = await stopped(python(WITNESS, "SIGINT"), [Step(signal.SIGINT, 60), Step(signal.SIGTERM, 60)])
    assert (said, exit_.ended_by, exit_.code) == ("SIGINT\n", "SIGINT", 7)


async def test_below_the_last_step_is_sigkill() -> None:
    exit_, _ = await stopped(python(WITNESS), [Step(signal.SIGINT, 0.02), Step(signal.SIGTERM, 0.02)])
    assert exit_ == Exit(None, "SIGKILL", ended_by="SIGKILL", oom=None)


async def test_a_child_that_ended_by_itself_is_not_said_to_be_stopped() -> None:
    async with open_child(sh("exit 4")) as child:
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(child._handle)  # it has ended, and nobody has asked yet
        for pipe in child.streams.values():
            pipe.close()
        child.send(signal.SIGTERM)
        assert await child.stop([Step(signal.SIGINT, 60)]) == Exit(4, None, ended_by="self", oom=None)


async def test_a_child_that_stands_stopped_still_gets_its_signal() -> None:
    async with open_child(python(WITNESS, "SIGTERM")) as child:
        await said_up(child)
        os.kill(child.pid, signal.SIGSTOP)
        assert (await child.stop([Step(signal.SIGTERM, 60)], drain_s=0)).ended_by == "SIGTERM"


@pytest.mark.parametrize(("reach", "heard"), [("child", 1), ("group", 2), ("tree", 3)])
async def test_a_signal_reaches_child_group_or_tree(reach: Reach, heard: int) -> None:
    # Three witnesses: the child, one of its group, one in a session of its own.
    script = """
import os, subprocess, sys
for alone in (False, True):
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=alone)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
    said = bytearray()
    async with open_child(python(script, WITNESS)) as child:
        while said.count(b"up\n") < 3:
            said += await child.streams["stdout"].receive_some()
        child.send(signal.SIGINT, reach)
        child.send(signal.SIGTERM, "tree")  # heard by all, and after the first
        while said.count(b"SIGTERM\n") < 3:
            said += await child.streams["stdout"].receive_some()
    assert said.count(b"SIGINT\n") == heard


async def test_the_end_is_the_exit_and_not_the_end_of_the_pipes() -> None:
    with trio.fail_after(60):
        exit_, said = await ran(sh("sleep 1000 & echo done"), drain_s=0.05)
    assert (exit_.code, said["stdout"]) == (0, "done\n")
    assert tree(MARK) == []


async def test_what_it_leaves_behind_may_write_while_the_pipes_are_drained() -> None:
    _, said = await ran(sh("(sleep 0.05; echo late) & echo done"), drain_s=60)
    assert said["stdout"] == "done\nlate\n"


async def test_its_number_stays_its_own_until_the_block_ends() -> None:
    async with open_child(spec("true")) as child:
        await child.wait()
        stat = stat_of(child.pid)
        assert stat is not None
        assert stat.ended
    assert stat_of(child.pid) is None


async def test_a_pipe_held_outside_the_tree_does_not_hold_us_up() -> None:
    async with open_child(spec("cat", stdin=True)) as child:
        outsider = os.open(f"/proc/{child.pid}/fd/1", os.O_WRONLY)
        try:
            assert child.stdin is not None
            await child.stdin.aclose()
            with trio.fail_after(60):
                await child.finish(drain_s=0.02)
        finally:
            os.close(outsider)
        with pytest.raises(trio.ClosedResourceError):
            await child.streams["stdout"].receive_some()


async def test_any_number_of_tasks_may_wait() -> None:
    async with open_child(spec("cat", stdin=True)) as child:
        ends: list[Exit] = []

        async def wait() -> None:
            ends.append(await child.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert child.stdin is not None
            await child.stdin.aclose()
    assert [e.code for e in ends] == [0, 0, 0]


async def test_an_error_in_the_block_ends_the_tree() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_child(sh("sleep 1000 & setsid sleep 1000 & wait")) as child:
            raise ZeroDivisionError
    assert tree(MARK) == []
    assert child.pid not in snapshot()


@pytest.mark.parametrize("after_s", [0, 0.001, 0.002, 0.005, 0.02])
async def test_a_start_that_is_cancelled_leaves_nothing(after_s: float) -> None:
    await ran(sh("exit 0"))
    before = open_files()
    with trio.move_on_after(after_s):
        async with open_child(spec("sleep", "1000")):
            await trio.sleep_forever()
    assert tree(MARK) == []
    assert open_files() <= before


async def test_a_stop_that_is_cancelled_leaves_nothing() -> None:
    await ran(sh("exit 0"))
    before = open_files()
    async with trio.open_nursery() as nursery, open_child(python(WITNESS)) as child:
        await said_up(child)
        nursery.start_soon(child.stop, [Step(signal.SIGINT, 60)])
        assert await child.streams["stdout"].receive_some() == b"SIGINT\n"
        nursery.cancel_scope.cancel()
    assert tree(MARK) == []
    assert open_files() <= before


async def test_a_hundred_starts_leave_no_descriptor_and_no_zombie() -> None:
    await ran(sh("exit 0"))
    before, others = open_files(), {stat.proc for stat in snapshot().values()}
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(partial(ran, spec("true", pipes=("events",))))
    assert open_files() <= before
    left = {stat.proc for stat in snapshot().values() if stat.parent == os.getpid() and stat.ended}
    assert left <= others  # what earlier tests left has nobody to reap it


async def test_orphans_are_reaped_and_no_exit_of_trio_s_is_taken(adopting: None) -> None:
    # The shell ends at once; its child is given to us, and ends a moment after.
    orphans = sh("for i in 1 2 3; do (setsid sh -c 'echo $$; sleep 0.2' &); done", env=environ(os.environ))
    async with open_child(orphans) as child, trio.open_nursery() as nursery:
        said = bytearray()
        nursery.start_soon(drain, child.streams["stdout"], said.extend)
        for _ in range(10):
            assert (await trio.run_process(["sh", "-c", "exit 5"], check=False)).returncode == 5
        await child.wait()
        with trio.fail_after(60):
            await child.streams["stdout"].ended.wait()  # the orphans held it
            for pid in map(int, said.split()):
                await reaped(pid)
    assert len(said.split()) == 3
