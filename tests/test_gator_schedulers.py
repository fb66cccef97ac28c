"""Children as processes of this machine."""

import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.core.process import adopt
from agent.gator.schedulers import CannotSchedule, Local, Need, Order, Slurm, choose, own_command
from tests.gator_tree import WITHIN_S, until


def order(folder: Path, *flags: str) -> Order:
    return Order("a", folder, Need("127.0.0.1:1", flags))


def nothing() -> None:
    raise AssertionError("a process of this machine never queues")


async def test_a_child_gets_its_parent_and_flags_and_what_it_prints_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys; print(*sys.argv[1:])")
    scheduler = Local({"PATH": "/usr/bin:/bin"}, f"{sys.executable} {script}")
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            how = await scheduler.run(order(tmp_path / "a", "--quiet"), nothing, trio.Event())
        nursery.cancel_scope.cancel()
    assert how == "with code 0"
    assert (tmp_path / "a/layer.log").read_text() == f"--parent 127.0.0.1:1 --id a --tracking {tmp_path}/a --quiet\n"


async def test_a_child_that_has_told_its_end_and_stays_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agent.gator.schedulers.STAY_S", 0.1)
    over = trio.Event()
    over.set()
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            how = await Local({"PATH": "/usr/bin:/bin"}, "sh -c 'sleep 600'").run(order(tmp_path / "a"), nothing, over)
        nursery.cancel_scope.cancel()
    assert how == "by us, 0.1 s behind its own word"
    assert "ended: it has told its end, and stayed for 0.1 s ident=a" in caplog.text


async def test_the_last_words_of_a_child_that_is_given_up_are_kept(tmp_path: Path) -> None:
    script = "trap 'echo last words; exit' TERM; echo up; while :; do sleep 0.02; done"
    said = tmp_path / "a/layer.log"
    scheduler = Local({"PATH": "/usr/bin:/bin"}, shlex.join(["sh", "-c", script]))
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        async with trio.open_nursery() as running:
            running.start_soon(scheduler.run, order(tmp_path / "a"), nothing, trio.Event())
            await until(lambda: said.exists() and said.read_text() == "up\n")
            running.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    assert said.read_text() == "up\nlast words\n"


async def test_what_a_child_prints_need_not_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a/layer.log").mkdir(parents=True)
    scheduler = Local({"PATH": "/usr/bin:/bin"}, "echo")
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            await scheduler.run(order(tmp_path / "a"), nothing, trio.Event())
        nursery.cancel_scope.cancel()
    assert "what a child prints is not kept" in caplog.text


async def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotSchedule, match="no-such-gator"):
        await Local({}, "no-such-gator").run(order(tmp_path), nothing, trio.Event())


def test_schedulers_are_chosen_by_name() -> None:
    assert choose("local", {}, {}).name == "local"
    assert choose("slurm", {"partition": "main"}, {}).name == "slurm"
    with pytest.raises(ValueError, match="there is no scheduler 'lsf'"):
        choose("lsf", {}, {})
    assert own_command()[-1] == "gator"


SLURM = """\
#!/bin/sh
echo "$GATOR_PARENT" "$0" "$@" >> "$HOME/calls"
case ${0##*/} in
sbatch) [ -z "$BROKEN" ] || { echo "sbatch: error: Memory specification can not be satisfied" >&2; exit 1; }
    echo "42;house" ;;
squeue) [ ! -e "$HOME/slow" ] || exec sleep 600; [ ! -e "$HOME/down" ] || exit 1; cat "$HOME/queue" ;;
esac
"""


def slurm(folder: Path, batch: int = 1, **env: str) -> Slurm:
    """Slurm's commands, as scripts that write down how they were called and show what the file `queue` says."""
    for name in ("sbatch", "squeue", "scancel"):
        (folder / name).write_text(SLURM)
        (folder / name).chmod(0o755)
    return Slurm({"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), **env}, "main", batch)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().replace(f"{folder}/", "").splitlines()


async def test_a_job_of_slurm_is_submitted_and_watched_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.schedulers.POLL_S", 0.1)
    need = Need("127.0.0.1:1/t/x", ("--quiet",), 2, 100_000_001, (("sim", 1),), 90.0)
    asked = Order("a b", tmp_path / "a", need)
    (tmp_path / "queue").write_text("41|RUNNING|None\n42|PENDING|Resources\n")
    waited = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slurm(tmp_path, AGENT_GATOR__ENV="replace").run, asked, waited.set, trio.Event())
        with trio.fail_after(WITHIN_S):
            await waited.wait()
        (tmp_path / "down").touch()  # a squeue that fails proves nothing
        (tmp_path / "queue").write_text("41|RUNNING|None\n")
        await trio.sleep(0.3)
        assert nursery.child_tasks
        (tmp_path / "down").unlink()
    first = calls(tmp_path)[0]
    assert first.startswith(
        "127.0.0.1:1/t/x sbatch --parsable --no-requeue --export=GATOR_PARENT,PATH,AGENT_GATOR__ENV --job-n"
    )
    assert " --job-name=a b " in first
    assert "--cpus-per-task=2 --mem=96M --licenses=sim:1 --time=3 --partition=main --wrap=exec " in first
    assert first.endswith("agent gator --id 'a b' --tracking a --quiet")
    assert "127.0.0.1" not in first.partition("sbatch")[2]  # arguments are seen by all


def asked(folder: Path) -> bool:
    return (folder / "calls").exists() and any("squeue" in line for line in calls(folder))


@pytest.mark.parametrize("moment", ["between two looks", "during a look"])
async def test_a_job_that_is_given_up_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "queue").write_text("42|RUNNING|None\n")
    if moment == "during a look":
        monkeypatch.setattr("agent.gator.schedulers.POLL_S", 0.1)
        (tmp_path / "slow").touch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slurm(tmp_path).run, order(tmp_path / "a"), nothing, trio.Event())
        await until(lambda: (tmp_path / "calls").exists() if moment == "between two looks" else asked(tmp_path))
        nursery.cancel_scope.cancel()
    assert calls(tmp_path)[-1].endswith("scancel 42")


async def test_what_slurm_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(CannotSchedule, match="Memory specification can not be satisfied"):
        await slurm(tmp_path, BROKEN="1").run(order(tmp_path / "a"), nothing, trio.Event())
    with pytest.raises(CannotSchedule, match="no answer"):
        await Slurm({"PATH": str(tmp_path / "none")}, None).run(order(tmp_path / "a"), nothing, trio.Event())


async def test_who_has_told_its_end_is_not_waited_for_in_the_queue(tmp_path: Path) -> None:
    over = trio.Event()
    (tmp_path / "queue").write_text("42|RUNNING|None\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slurm(tmp_path).run, order(tmp_path / "a"), nothing, over)
        over.set()
    assert len(calls(tmp_path)) == 1  # neither squeue nor scancel


async def test_like_jobs_share_an_allocation_and_wait_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.schedulers.POLL_S", 0.05)
    (tmp_path / "queue").write_text("42|RUNNING|None\n")
    scheduler = slurm(tmp_path, batch=2)
    like, other = Need("h:1", ("--quiet",), timeout_s=60.0), Need("h:1", ("--quiet",), is_job=False)
    wants = [("a", like), ("t", other), ("b", like), ("c", like), ("u", other)]
    overs = {name: trio.Event() for name, _ in wants}
    waited: dict[str, int] = {name: 0 for name, _ in wants}

    def waits(name: str) -> None:
        waited[name] += 1

    async with trio.open_nursery() as nursery:
        for name, need in wants:
            monkeypatch.setattr("agent.gator.schedulers.GATHER_S", WITHIN_S if name == "a" else 0.0)  # b comes in time
            order = Order(name, tmp_path / name, need)
            nursery.start_soon(scheduler.run, order, partial(waits, name), overs[name])
            await trio.testing.wait_all_tasks_blocked()  # they join in this order
        await until(lambda: waited["b"] > 1)
        assert {name for name, times in waited.items() if times} == {"b"}  # behind a
        overs["a"].set()
        await until(lambda: len(nursery.child_tasks) == 4)
        before = waited["b"]
        await trio.sleep(0.2)
        assert waited["b"] <= before + 1  # its time to register runs
        for over in overs.values():
            over.set()
    submitted = sorted(line.rpartition("gator ")[2] for line in calls(tmp_path) if " sbatch " in line)
    assert submitted == [
        "--id a --tracking a --id b --tracking b --quiet",
        "--id c --tracking c --quiet",
        "--id t --tracking t --quiet",
        "--id u --tracking u --quiet",
    ]
    assert any("--job-name=a " in line and "--time=3 " in line for line in calls(tmp_path))


async def test_an_allocation_is_cancelled_with_the_last_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.gator.schedulers.POLL_S", 0.1)
    (tmp_path / "queue").write_text("42|RUNNING|None\n")
    scheduler, need = slurm(tmp_path, batch=2), Need("h:1", ())
    scopes = [trio.CancelScope() for _ in range(2)]

    async def run(name: str, scope: trio.CancelScope) -> None:
        with scope:
            await scheduler.run(Order(name, tmp_path / name, need), lambda: None, trio.Event())

    async with trio.open_nursery() as nursery:
        for name, scope in zip("ab", scopes, strict=True):
            nursery.start_soon(run, name, scope)
        await until(lambda: asked(tmp_path))
        scopes[0].cancel()
        await until(lambda: len(nursery.child_tasks) == 1)
        assert not any("scancel" in line for line in calls(tmp_path))
        scopes[1].cancel()
    assert calls(tmp_path)[-1].endswith("scancel 42")


async def test_what_slurm_refuses_is_told_to_each_of_a_batch(tmp_path: Path) -> None:
    scheduler, need = slurm(tmp_path, batch=2, BROKEN="1"), Need("h:1", ())
    refused: list[str] = []

    async def run(name: str) -> None:
        try:
            await scheduler.run(Order(name, tmp_path / name, need), nothing, trio.Event())
        except CannotSchedule as err:
            refused.append(str(err))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "a")
        nursery.start_soon(run, "b")
    assert len(refused) == 2
    assert len(calls(tmp_path)) == 1
