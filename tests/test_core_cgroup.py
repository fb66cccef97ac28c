"""cgroup v2 leaves: found and claimed in a fake tree, used in the real one where this machine lets us make one."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.core import cgroup
from agent.core.cgroup import Leaf, Leaves, claim
from agent.core.errors import AgentError
from agent.core.process import Limits, Spec, environ, open_child
from agent.core.processtree import stat_of

HYBRID = "9:name=systemd:/x\n4:memory:/a\n0::/system.slice/agent.service\n"


def mounts(*lines: str) -> str:
    return "".join(f"36 35 0:31 {line}\n" for line in ("/ /proc rw - proc proc rw", *lines))


@pytest.mark.parametrize(
    ("own", "mountinfo", "folder"),
    [
        (HYBRID, mounts("/ /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw"), "/sys/fs/cgroup/{}"),
        (HYBRID, mounts("/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"), "/sys/fs/cgroup/unified/{}"),
        (HYBRID, mounts("/ /mnt/a\\040b rw - cgroup2 none rw"), "/mnt/a b/{}"),
        ("0::/pod/7/x\n", mounts("/pod/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw"), "/sys/fs/cgroup/x"),
        ("0::/pod/7/x\n", mounts("/pod/8 /sys/fs/cgroup rw - cgroup2 cgroup2 rw"), None),
        ("0::/../other\n", mounts("/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw"), None),
        (HYBRID, mounts("/ /sys/fs/cgroup rw - cgroup cgroup rw,memory"), None),
        ("4:memory:/a\n", mounts("/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw"), None),
    ],
)
def test_our_folder_follows_from_two_files_of_proc(
    tmp_path: Path, own: str, mountinfo: str, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(own)
    (tmp_path / "mountinfo").write_text(mountinfo)
    asked: list[Path] = []
    monkeypatch.setattr(cgroup, "_is_delegated", lambda home: asked.append(home))
    assert claim(tmp_path) is None
    assert asked == ([] if folder is None else [Path(folder.format("system.slice/agent.service"))])


class FakeKernel:
    """A delegated cgroup as files below `home`; `proc` leads there. What is written is noted, and has its effect."""

    def __init__(self, root: Path) -> None:
        self.home, self.proc = root / "cg" / "agent.service", root
        self.written: list[tuple[str, str]] = []
        self.busy = False  # a process is left in home: controllers are refused
        self.make(self.home)
        (self.home / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
        (root / "cgroup").write_text("0::/agent.service\n")
        (root / "mountinfo").write_text(mounts(f"/ {root}/cg rw - cgroup2 cgroup2 rw"))

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in ("cgroup.procs", "cgroup.kill", "cgroup.subtree_control"):
            (folder / name).write_text("")

    def write(self, file: Path, text: str) -> None:
        if file.name == "cgroup.subtree_control":
            if self.busy:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            file.write_text(f"{file.read_text()} {text[1:]}")
        elif file.name.split(".")[0] not in {"cgroup", *(self.home / "cgroup.subtree_control").read_text().split()}:
            raise FileNotFoundError(file)
        self.written.append((str(file.relative_to(self.home)), text))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel(tmp_path)
    monkeypatch.setattr(cgroup, "_write", fake.write)
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if name == "trusted.delegate" else b"")
    return fake


def test_claiming_moves_us_aside_asks_for_controllers_and_ends_what_was_left(kernel: FakeKernel) -> None:
    kernel.make(kernel.home / "run-3-r41")
    leaves = claim(kernel.proc)
    assert leaves is not None
    assert leaves.home == kernel.home
    assert leaves.controllers == {"cpu", "memory", "pids"}
    assert kernel.written == [
        ("emissary-agent/cgroup.procs", "0"),
        ("cgroup.subtree_control", "+cpu"),
        ("cgroup.subtree_control", "+memory"),
        ("cgroup.subtree_control", "+pids"),
        ("run-3-r41/cgroup.kill", "1"),
    ]


def test_claimed_again_from_within_our_leaf_it_is_the_same_home(kernel: FakeKernel) -> None:
    (kernel.proc / "cgroup").write_text("0::/agent.service/emissary-agent\n")
    leaves = claim(kernel.proc)
    assert leaves is not None
    assert leaves.home == kernel.home


def test_where_controllers_are_refused_leaves_hold_no_limits(kernel: FakeKernel) -> None:
    kernel.busy = True
    leaves = claim(kernel.proc)
    assert leaves is not None
    assert leaves.controllers == frozenset()
    leaf = leaves.leaf("r42", memory=1 << 30, processes=7, cpus=1.5)
    assert leaf.oom() is None
    assert kernel.written == [("emissary-agent/cgroup.procs", "0")]


def test_a_leaf_whose_limits_are_refused_does_not_stay(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = claim(kernel.proc)
    assert leaves is not None

    def refuse(file: Path, text: str) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(cgroup, "_write", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        leaves.leaf("r42", memory=1 << 62, processes=None, cpus=None)
    assert list(kernel.home.glob("run-*")) == []


def test_a_cgroup_that_goes_while_its_leaf_is_looked_at_has_nobody(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf, listed = Leaf(kernel.home / "run-1-r42"), os.walk
    for folder, pid in ((leaf.folder, "42\n"), (leaf.folder / "container", "43\n")):
        kernel.make(folder)
        (folder / "cgroup.procs").write_text(pid)

    def walk(top: Path, *, topdown: bool) -> list[tuple[str, list[str], list[str]]]:
        found = list(listed(top, topdown=topdown))
        shutil.rmtree(leaf.folder / "container")
        return found

    monkeypatch.setattr(os, "walk", walk)
    assert leaf.pids() == [42]


def test_limits_are_written_in_the_kernel_s_words(kernel: FakeKernel) -> None:
    leaves = claim(kernel.proc)
    assert leaves is not None
    kernel.written.clear()
    leaf = leaves.leaf("outer/r 42", memory=1 << 30, processes=7, cpus=1.5)
    assert leaf.folder == kernel.home / "run-1-outer-r-42"
    assert kernel.written == [
        ("run-1-outer-r-42/memory.max", "1073741824"),
        ("run-1-outer-r-42/memory.swap.max", "0"),
        ("run-1-outer-r-42/pids.max", "7"),
        ("run-1-outer-r-42/cpu.max", "150000 100000"),
    ]
    (leaf.folder / "memory.events").write_text("low 0\noom 2\noom_kill 0\n")
    assert leaf.oom() is False
    (leaf.folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert leaf.oom() is True


def test_what_another_agent_has_claimed_is_not_taken_from_it(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    assert claim(kernel.proc) is not None
    kernel.make(kernel.home / "run-1-r42")
    kernel.written.clear()
    assert claim(kernel.proc) is None
    assert kernel.written == []
    assert "another agent has it" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="to another user the folder's ownership is the delegation")
def test_a_leaf_of_an_agent_is_delegated_to_what_runs_in_it(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = kernel.home / "run-7-r42"
    kernel.make(leaf)
    (leaf / "cgroup.controllers").write_text("")
    (kernel.proc / "cgroup").write_text(f"0::/agent.service/{leaf.name}\n")
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"0")
    assert claim(kernel.proc) is None  # anybody may call a cgroup so
    kernel.make(kernel.home / cgroup.OWN_LEAF)
    leaves = claim(kernel.proc)
    assert leaves is not None
    assert leaves.home == leaf


@pytest.mark.parametrize("name", ["cgroup.kill", "cgroup.procs"])
def test_what_cannot_be_ordered_is_not_claimed(kernel: FakeKernel, name: str) -> None:
    (kernel.home / name).unlink()  # an old kernel, or a mount for reading
    assert claim(kernel.proc) is None
    assert kernel.written == []


@pytest.mark.skipif(os.geteuid() != 0, reason="to another user the folder's ownership is the delegation")
def test_what_is_root_s_is_not_therefore_ours(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"0")
    assert claim(kernel.proc) is None
    assert kernel.written == []


def leaves_in(home: Path) -> list[Path]:
    return list(home.glob("run-*"))


# A daemon without the child's session, parent or environment. It says when it is there.
DAEMON = """
import os
if os.fork():
    os.wait()
else:
    os.setsid()
    if not os.fork():
        os.execve("/bin/sh", ["sh", "-c", "echo up; exec sleep 1000"], {})
"""


async def test_a_leaf_holds_the_whole_tree_and_goes_with_it(cgroup_home: Path) -> None:
    spec = Spec(argv=(sys.executable, "-c", DAEMON), cwd=Path("/"), env=environ(os.environ), mark=f"r/{os.getpid()}")
    before = len(os.listdir("/proc/self/fd"))
    async with open_child(spec, leaves=Leaves(cgroup_home)) as child:
        assert await child.streams["stdout"].receive_some() == b"up\n"
        assert (await child.wait()).oom is None
        (leaf,) = leaves_in(cgroup_home)
        (daemon,) = (stat for stat in child.tree() if not stat.ended)
        assert daemon.proc.pid in Leaf(leaf).pids()
        os.mkdir(leaf / "made-by-the-suite")
    stat = stat_of(daemon.proc.pid)
    assert stat is None or stat.ended
    assert leaves_in(cgroup_home) == []
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_start_that_fails_leaves_no_leaf(cgroup_home: Path) -> None:
    spec = Spec(argv=("./none",), cwd=Path("/"), env={}, mark="r42", limits=Limits(memory=1 << 30))
    with pytest.raises(AgentError, match="none: No such file"):
        async with open_child(spec, leaves=Leaves(cgroup_home)):
            pass
    assert leaves_in(cgroup_home) == []


def test_a_claim_in_the_real_tree(cgroup_home: Path) -> None:
    os.setxattr(cgroup_home, "user.delegate", b"1")
    (cgroup_home / "run-9-left").mkdir()
    script = """
import sys
from pathlib import Path
from agent.core.cgroup import claim
Path(sys.argv[1], "cgroup.procs").write_text("0")
print(claim().home == Path(sys.argv[1]), *Path(sys.argv[1]).glob("run-*"))
print(Path("/proc/self/cgroup").read_text().split("0::")[1])
"""
    argv = [sys.executable, "-c", script, str(cgroup_home)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", f"/{cgroup_home.name}/{cgroup.OWN_LEAF}"]
