"""Gator: jobs a second, memory, what many connected children cost, how soon a large tree is told."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.gator import spec as specs
from agent.gator.layer import Options
from agent.gator.pool import Pool
from agent.gator.spec import Group
from agent.gator.tier import Tier
from agent.gator.tree import Times, Tree
from agent.gator.view import View
from tests.faults.station import peak_mib
from tests.gator_tree import Above, shared_of, tier_of, until

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

AGENT = (sys.executable, "-P", "-m", "agent", "gator", "--quiet")
ARRAY = '!JobArray {{ident: {}, repeats: {}, jobs: [!Job {{ident: x, command: "true"}}]}}'
CHILDREN, WATCHED_S = 1000, 20


def run(text: str, folder: Path) -> tuple[float, float]:
    """Seconds that a spec took, and the root's peak in MiB."""
    (folder / "spec.yaml").write_text(text)
    began = time.perf_counter()
    peak = 0.0
    with subprocess.Popen((*AGENT, "--tracking", str(folder / "t"), str(folder / "spec.yaml"))) as root:
        while root.poll() is None:
            try:
                peak = max(peak, peak_mib(root.pid))
            except (OSError, ValueError):  # it has just ended
                break
            trio.run(trio.sleep, 0.05)
    assert root.returncode == 0
    return time.perf_counter() - began, peak


def test_24_jobs_in_three_nested_groups(tmp_path: Path, figure: Figure) -> None:
    inner = f"!JobGroup {{ident: c, jobs: [{ARRAY.format('c8', 8)}]}}"
    middle = f"!JobGroup {{ident: b, jobs: [{ARRAY.format('b8', 8)}, {inner}]}}"
    took, _ = run(f"!JobGroup {{ident: a, jobs: [{ARRAY.format('a8', 8)}, {middle}]}}", tmp_path)
    figure("gator: 24 jobs of `true` in three nested groups", f"{took:.2f} s", "< 1 s")


def test_an_array_of_10_000_jobs(tmp_path: Path, figure: Figure) -> None:
    took, peak = run(ARRAY.format("many", 10_000), tmp_path)
    figure("gator: an array of 10,000 jobs of `true`", f"{10_000 / took:.0f} jobs/s", ">= 200 jobs/s")
    figure("gator: the root's memory meanwhile", f"{peak:.0f} MiB", "< 100 MiB")


async def test_a_tree_of_10_000_jobs_is_told(tmp_path: Path, figure: Figure) -> None:
    root = specs.load(ARRAY.format("many", 10_000)).root
    assert isinstance(root, Group)
    tree = Tree(root, Times())
    tree.start(0)
    tier = Tier(root, tmp_path, Above(), shared_of(pool=Pool(1, 0, {})), None, forward=False)
    uids = {ident: uid for uid, ident in enumerate(tree.kids, 1)}
    view = View(tree, {}, None, tmp_path, [], uids, tier._own_job)
    began = time.perf_counter()
    states = await view.states()
    took = time.perf_counter() - began
    assert len(states) == 10_000
    figure("gator: get_tree over 10,000 jobs", f"{1000 * took:.1f} ms", "< 100 ms")


async def test_a_thousand_connected_children(tmp_path: Path, figure: Figure) -> None:
    text = ARRAY.format("many", CHILDREN)
    shared = shared_of(options=Options(interval_s=5.0), pool=Pool(CHILDREN, 0, {}))
    update = {"metrics": {"sub_total": 1, "sub_active": 1, "msg_info": 3}, "failed_ids": []}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sender = f"""
import sys, trio
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.gator_tree import dialled
update = {update!r}
async def child(address, n):
    async with dialled(address) as channel:
        await channel.ask("register", {{"ident": f"x_{{n}}", "server": "127.0.0.1:1"}}, timeout_s=60)
        await trio.sleep(5 * n / {CHILDREN})
        while True:
            await channel.ask("update", {{"ident": f"x_{{n}}", **update}}, timeout_s=60)
            await trio.sleep(5)
async def main():
    async with trio.open_nursery() as nursery:
        for n in range({CHILDREN}):
            nursery.start_soon(child, sys.argv[1], n)
            await trio.sleep(0.005)
trio.run(main)
"""
    async with tier_of(text, tmp_path, shared=shared, ends=False) as (tier, hands, above):
        await hands.started(f"x_{CHILDREN - 1}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.run_process, [sys.executable, "-c", sender, above.address])
            await until(
                lambda: sum(kid.state == "STARTED" for kid in tier.tree.kids.values()) == CHILDREN, within_s=120
            )
            await trio.sleep(6)
            began, cpu = time.perf_counter(), time.process_time()
            await trio.sleep(WATCHED_S)
            share = (time.process_time() - cpu) / (time.perf_counter() - began)
            nursery.cancel_scope.cancel()
    figure(f"gator: a tier with {CHILDREN} children, an update each 5 s", f"{100 * share:.1f} % of a core", "< 10 %")
