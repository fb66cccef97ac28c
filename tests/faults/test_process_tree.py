"""Trees that do not want to end, floods, and an agent killed in the middle: real processes, as bad as suites make them.

Source: protocols/suites.md, acceptance 3, 4 and 5; protocols/monitors.md, acceptance 4.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.core.process import Child, Exit, Limits, Spec, Step, adopt, drain, environ, open_child
from agent.core.processtree import Proc, stat_of, sweep, tree
from tests.faults.station import LIMIT_S

MARK = f"run-of-test-process-tree-{os.getpid()}"  # several test runs may share a machine

IDLE = "import signal; signal.pause()"

# A daemon by the book: forked twice, a session of its own, deaf to all that can be ignored. Arguments: the environment
# it keeps ("keep", "empty"; it has no other when it says its number), and whether it keeps the pipe ("hold", "close").
DAEMON = """
import os, signal, sys
if os.fork():
    os.wait()
    sys.exit(0)
os.setsid()
if os.fork():
    sys.exit(0)
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
closes = "exec <&- >&- 2>&-; " if sys.argv[2] == "close" else ""
env = dict(os.environ) if sys.argv[1] == "keep" else {}
os.execve("/bin/sh", ["sh", "-c", "echo $$; " + closes + "while :; do sleep 1000; done"], env)
"""

# 57 processes: one makes seven, each of them seven. Every other one has a session of its own, and all ignore SIGTERM.
FIFTY_SEVEN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
for level in range(2):
    for number in range(7):
        if not os.fork():
            if number % 2:
                os.setsid()
            break
    else:
        break
os.write(1, b"%d\\n" % os.getpid())
while True:
    signal.pause()
"""

# Never the same process for long: it forks, and the parent ends. For twenty seconds, should we fail to end it.
RUNAWAY = """
import os, sys, time
end = time.monotonic() + 20
if os.fork():
    sys.exit(0)
if sys.argv[1] == "session":
    os.setsid()
os.write(1, b"%d\\n" % os.getpid())
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
"""

Repeat = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]


@pytest.fixture
def repeat(soak_s: float) -> Repeat:
    """Run a scenario once, or for as long as `--soak` says."""

    async def again(scenario: Callable[[], Awaitable[None]]) -> None:
        until = trio.current_time() + soak_s
        await scenario()
        while trio.current_time() < until:
            await scenario()

    return again


@pytest.fixture
async def adopting(nursery: trio.Nursery) -> AsyncIterator[None]:
    await nursery.start(adopt)
    yield
    nursery.cancel_scope.cancel()


def python(script: str, *args: str, mark: str = MARK) -> Spec:
    return Spec(
        argv=(sys.executable, "-c", script, *args),
        cwd=Path("/"),
        env=environ(os.environ),
        mark=mark,
        limits=Limits(nice=0),  # the tests wait for what these do
    )


async def pids_from(child: Child, count: int) -> list[Proc]:
    """The processes that name themselves on stdout, a line each."""
    said = b""
    while said.count(b"\n") < count:
        said += (chunk := await child.streams["stdout"].receive_some())
        assert chunk, f"ended after {said!r}"
    return [stat.proc for line in said.split() if (stat := stat_of(int(line)))]


def living(procs: list[Proc]) -> list[int]:
    return [proc.pid for proc in procs if (stat := stat_of(proc.pid)) and stat.proc == proc and not stat.ended]


@pytest.mark.parametrize("pipe", ["hold", "close"])
async def test_a_daemon_that_ignores_everything_is_dead_when_the_run_is(repeat: Repeat, pipe: str) -> None:
    async def scenario() -> None:
        async with open_child(python(DAEMON, "keep", pipe)) as child:
            daemon = await pids_from(child, 1)
            assert len(living(daemon)) == 1
            with trio.fail_after(LIMIT_S):
                assert (await child.finish(drain_s=0.02)).code == 0
            assert living(daemon) == []

    await repeat(scenario)


async def test_a_daemon_that_emptied_its_environment_is_known_by_its_adoption(adopting: None, repeat: Repeat) -> None:
    async def scenario() -> None:
        async with open_child(python(DAEMON, "empty", "close")) as child:
            daemon = await pids_from(child, 1)
            await child.wait()
        assert len(daemon) == 1
        assert living(daemon) == []

    await repeat(scenario)


async def test_an_orphan_that_may_be_another_s_is_left_to_the_last_who_may_own_it(adopting: None) -> None:
    async with AsyncExitStack() as outer, AsyncExitStack() as inner:
        older = await outer.enter_async_context(open_child(python(IDLE, mark=f"{MARK}-older")))
        child = await inner.enter_async_context(open_child(python(DAEMON, "empty", "close")))
        daemon = await pids_from(child, 1)
        await child.wait()
        await inner.aclose()
        assert len(living(daemon)) == 1  # it may be of `older`
        assert living([Proc(older.pid, older.started)]) == [older.pid]
        await outer.aclose()
        assert living(daemon) == []


async def test_a_child_that_began_later_has_no_claim_to_an_orphan(adopting: None) -> None:
    async with AsyncExitStack() as ours, AsyncExitStack() as others:
        child = await ours.enter_async_context(open_child(python(DAEMON, "empty", "close")))
        daemon = await pids_from(child, 1)
        ended = (await child.wait()).code
        while time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") < daemon[0].start + 1:
            await trio.lowlevel.checkpoint()  # starts are told apart by clock ticks, 10 ms as a rule
        later = await others.enter_async_context(open_child(python(IDLE, mark=f"{MARK}-later")))
        await ours.aclose()
        assert (ended, living(daemon)) == (0, [])
        assert living([Proc(later.pid, later.started)]) == [later.pid]


async def test_a_tree_of_57_that_ignores_sigterm(repeat: Repeat) -> None:
    async def scenario() -> None:
        async with open_child(python(FIFTY_SEVEN)) as child:
            procs = await pids_from(child, 57)
            assert len(living(procs)) == 57
            with trio.fail_after(LIMIT_S):
                exit_ = await child.stop([Step(signal.SIGINT, 0.01), Step(signal.SIGTERM, 0.01)], drain_s=0)
            assert exit_ == Exit(None, "SIGKILL", ended_by="SIGKILL", oom=None)
            assert living(procs) == []

    await repeat(scenario)


@pytest.mark.parametrize("where", ["group", "session"])
async def test_a_process_that_forks_and_ends_all_the_time_is_caught(adopting: None, repeat: Repeat, where: str) -> None:
    async def scenario() -> None:
        async with open_child(python(RUNAWAY, where)) as child:
            await pids_from(child, 1)
            await child.wait()
        assert [stat for stat in tree(MARK) if not stat.ended] == []

    await repeat(scenario)


def peak_kib(*, forget: bool = False) -> int:
    """The most memory we have had resident, since it was last forgotten."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1])


async def test_a_flood_on_stderr_does_not_grow_the_agent(repeat: Repeat) -> None:
    script = "import os\nblock = b'x' * 65536\nfor _ in range(3200):\n os.write(2, block)"
    counted = 0

    def count(chunk: bytes) -> None:
        nonlocal counted
        counted += len(chunk)

    async def scenario() -> None:
        nonlocal counted
        counted, before = 0, peak_kib(forget=True)
        began = trio.current_time()
        async with open_child(python(script)) as child, trio.open_nursery() as nursery:
            nursery.start_soon(drain, child.streams["stdout"], count)
            nursery.start_soon(drain, child.streams["stderr"], count)
            await child.finish()
        print(f"{counted / (trio.current_time() - began) / 1e6:.0f} MB/s")
        assert counted == 3200 * 65536
        assert peak_kib() - before < 20_480  # a tenth of the flood

    await repeat(scenario)


# An agent in small: it starts the daemons, says their pids, and waits.
AGENT = """
import os, sys, trio
from pathlib import Path
from agent.core.process import Spec, adopt, environ, open_child
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        argv = (sys.executable, "-c", sys.argv[2], "keep", "close")
        async with open_child(Spec(argv=argv, cwd=Path("/"), env=environ(os.environ), mark=sys.argv[1])) as child:
            os.write(1, await child.streams["stdout"].receive_some())
            await trio.sleep_forever()
trio.run(main)
"""


async def test_what_an_agent_left_that_was_killed_is_swept_by_the_next(repeat: Repeat) -> None:
    async def scenario() -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        async with trio.open_nursery() as nursery:
            argv = [sys.executable, "-c", AGENT, MARK, DAEMON]
            agent = await nursery.start(partial(trio.run_process, argv, env=env, check=False, stdout=subprocess.PIPE))
            pid = int(await agent.stdout.receive_some())
            agent.kill()
        daemon = stat_of(pid)
        assert daemon is not None
        assert living([daemon.proc]) == [pid]
        await sweep("another-mark")
        assert living([daemon.proc]) == [pid]
        await sweep(MARK)
        assert living([daemon.proc]) == []

    await repeat(scenario)
