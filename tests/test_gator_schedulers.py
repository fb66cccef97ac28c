"""Children as processes of this machine."""

import sys
from pathlib import Path

import pytest
import trio

from agent.core.process import adopt
from agent.gator.schedulers import CannotSchedule, Local, Order, choose, own_command
from tests.gator_tree import WITHIN_S


def order(folder: Path, *flags: str) -> Order:
    return Order("a", folder, "127.0.0.1:1", ("--id", "a", *flags), 1, 0, (), None)


def nothing() -> None:
    raise AssertionError("a process of this machine never queues")


async def test_a_child_gets_its_parent_and_flags_and_what_it_prints_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys; print(*sys.argv[1:])")
    scheduler = Local({"PATH": "/usr/bin:/bin"}, f"{sys.executable} {script}")
    async with trio.open_nursery() as nursery:
        await nursery.start(adopt)
        with trio.fail_after(WITHIN_S):
            await scheduler.run(order(tmp_path / "a", "--quiet"), nothing)
        nursery.cancel_scope.cancel()
    assert (tmp_path / "a/layer.log").read_text() == "--parent 127.0.0.1:1 --id a --quiet\n"


async def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotSchedule, match="no-such-gator"):
        await Local({}, "no-such-gator").run(order(tmp_path), nothing)


def test_schedulers_are_chosen_by_name() -> None:
    assert choose("local", {}, {}).name == "local"
    with pytest.raises(ValueError, match="there is no scheduler 'lsf'"):
        choose("lsf", {}, {})
    assert own_command()[-1] == "gator"
