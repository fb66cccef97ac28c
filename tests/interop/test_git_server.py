"""Suites out of git: fetched from git's own server over https and, by ssh's way of asking, from its upload-pack.

Source: protocols/suites.md, "The suite document" (`source`), "Limits and security".
"""

import os
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.core.events import TestFinished
from agent.core.processtree import tree
from agent.suites import prepare, sources
from agent.suites.messages import Source
from agent.suites.prepare import Blocked, fetch
from tests.certificates import Issued, authority, issue
from tests.interop.git_server import GitServer, git, git_server
from tests.suites_house import Log, R, house

pytestmark = pytest.mark.interop


def repository(folder: Path, name: str = "suite.git") -> Path:
    """Two commits on main, the first of them tagged; a branch with a slash; a submodule that nobody serves."""
    work = folder / f"{name}.work"
    git("init", "--quiet", work)
    for number in (1, 2):
        (work / "check.sh").write_text(f"echo 1..1; echo ok 1 - version {number}\n")
        (work / "with space").mkdir(exist_ok=True)
        (work / "with space/é.txt").write_text("x\n")
        git("-C", work, "add", "-A")
        git("-C", work, "commit", "--quiet", "-m", f"version {number}")
        if number == 1:
            git("-C", work, "tag", "-a", "-m", "first", "v1")
    git("-C", work, "branch", "topic/one", "v1")
    (work / ".gitmodules").write_text('[submodule "other"]\n\tpath = other\n\turl = https://127.0.0.1:1/other.git\n')
    git("-C", work, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},other")
    git("-C", work, "add", ".gitmodules")
    git("-C", work, "commit", "--quiet", "-m", "a submodule")
    git("clone", "--quiet", "--bare", work, folder / name)
    return folder / name


@pytest.fixture
def ca(tmp_path: Path) -> Issued:
    return authority(tmp_path)


@pytest.fixture
async def server(tmp_path: Path, ca: Issued, peer_command: Callable[[str], Path]) -> AsyncIterator[GitServer]:
    peer_command("git")
    (tmp_path / "served").mkdir()
    async with git_server(tmp_path / "served", issue(ca, tmp_path, "server")) as server:
        repository(server.folder)
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Git reads no configuration but that of the test."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "SSL_CERT_FILE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


async def get(folder: Path, ca: Issued | None, url: str, **source: Any) -> Path:
    given, ca_file = Source(git=url, **source), ca.cert if ca else None
    return await fetch(given, None, fresh(folder), (), mark=f"git-{os.getpid()}", log=Log(), ca_file=ca_file)


@pytest.mark.parametrize(("ref", "version"), [(None, 2), ("main", 2), ("v1", 1), ("topic/one", 1), ("refs/tags/v1", 1)])
async def test_a_branch_a_tag_or_the_head(
    server: GitServer, ca: Issued, tmp_path: Path, ref: str | None, version: int
) -> None:
    project = await get(tmp_path / "run", ca, server.url("git", "suite.git"), ref=ref)
    assert (project / "check.sh").read_text() == f"echo 1..1; echo ok 1 - version {version}\n"
    assert (project / "with space/é.txt").exists()


async def test_a_commit_by_its_whole_hash_and_as_many_commits_as_the_depth_says(
    server: GitServer, ca: Issued, tmp_path: Path
) -> None:
    first = git("-C", server.folder / "suite.git", "rev-parse", "v1^{commit}")
    project = await get(tmp_path / "run", ca, server.url("git", "suite.git"), ref=first)
    assert git("-C", project, "rev-parse", "HEAD") == first
    for depth in (1, 3):
        project = await get(tmp_path / "run", ca, server.url("git", "suite.git"), depth=depth)
        assert git("-C", project, "rev-list", "--count", "HEAD") == str(depth)


async def test_a_redirection_is_followed_within_https_and_not_out_of_it(
    server: GitServer, ca: Issued, tmp_path: Path
) -> None:
    assert (await get(tmp_path / "run", ca, server.url("away", "suite.git")) / "check.sh").exists()
    with pytest.raises(Blocked, match=r"(?i)protocol \W?http\W? .*(disabled|not supported|not allowed)"):
        await get(tmp_path / "run", ca, server.url("plain", "suite.git"))


@pytest.mark.parametrize(
    ("how", "name", "ref", "why"),
    [
        ("git", "suite.git", "nope", "couldn't find remote ref nope"),
        ("git", "suite.git", "0" * 39 + "1", "not our ref"),
        ("git", "none.git", None, "repository .* not found"),
        ("secret", "suite.git", None, "Authentication failed"),
        ("cut", "suite.git", None, "early EOF|unexpected disconnect|transfer closed"),
    ],
)
async def test_what_cannot_be_fetched_is_said_with_its_cause(
    server: GitServer, ca: Issued, tmp_path: Path, how: str, name: str, ref: str | None, why: str
) -> None:
    with pytest.raises(Blocked, match=why) as blocked:
        await get(tmp_path / "run", ca, server.url(how, name), ref=ref)
    assert str(blocked.value).startswith(f"source.git: {server.url(how, name)}: ")
    assert "\n" not in str(blocked.value)
    assert "protocol.allow" not in str(blocked.value)  # how we call git is no matter of who reads it
    assert not (tmp_path / "run/source").exists()


async def test_a_server_that_the_machine_does_not_trust_is_not_fetched_from(
    server: GitServer, ca: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("git", "suite.git")
    with pytest.raises(Blocked, match=r"(?i)source\.git: https://.* certificate"):
        await get(tmp_path / "run", None, url)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.cert))  # what all else that goes out follows too
    assert (await get(tmp_path / "run", None, url) / "check.sh").exists()


async def test_a_password_comes_from_gits_own_store(server: GitServer, ca: Issued, tmp_path: Path, home: Path) -> None:
    (home / ".gitconfig").write_text("[credential]\n\thelper = store\n")
    (home / ".git-credentials").write_text(f"https://reader:open%20sesame@127.0.0.1:{server.port}\n")
    (home / ".git-credentials").chmod(0o600)
    assert (await get(tmp_path / "run", ca, server.url("secret", "suite.git")) / "check.sh").exists()


async def test_a_submodule_is_not_fetched_whatever_the_machine_prefers(
    server: GitServer, ca: Issued, tmp_path: Path, home: Path
) -> None:
    (home / ".gitconfig").write_text("[submodule]\n\trecurse = true\n\tactive = .\n")
    project = await get(tmp_path / "run", ca, server.url("git", "suite.git"))
    assert list((project / "other").iterdir()) == []


@pytest.mark.parametrize("to", ["/etc", "../outside", "with space/../../.."])
async def test_a_link_out_of_the_repository_is_blocked(server: GitServer, ca: Issued, tmp_path: Path, to: str) -> None:
    work = server.folder / "suite.git.work"
    (work / "with space/out").symlink_to(to if to.startswith("/") else f"../{to}")
    (work / "with space/in").symlink_to("../check.sh")
    git("-C", work, "add", "-A")
    git("-C", work, "commit", "--quiet", "-m", "a link")
    git("-C", work, "push", "--quiet", server.folder / "suite.git", "HEAD:refs/heads/linked")
    with pytest.raises(Blocked, match="'with space/out' is a link out of the repository"):
        await get(tmp_path / "run", ca, server.url("git", "suite.git"), ref="linked")
    assert not (tmp_path / "run/source").exists()


async def test_a_repository_that_is_too_large_is_not_checked_out(
    server: GitServer, ca: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, checked_out = server.url("git", "suite.git"), tmp_path / "run/scratch/source/check.sh"
    monkeypatch.setattr(sources, "MAX_FILES", 3)
    with pytest.raises(Blocked, match="holds more than 3 files"):
        await get(tmp_path / "run", ca, url)
    monkeypatch.undo()
    work = server.folder / "suite.git.work"
    for name, content in (("zeros", bytes(3_000_000)), ("noise", os.urandom(3_000_000))):
        (work / "large").write_bytes(content)
        git("-C", work, "add", "-A")
        git("-C", work, "commit", "--quiet", "-m", name)
        git("-C", work, "push", "--quiet", server.folder / "suite.git", f"HEAD:refs/heads/{name}")
    for module in (prepare, sources):
        monkeypatch.setattr(module, "MAX_BYTES", 2_000_000)
    with pytest.raises(Blocked, match="is larger than"):  # 3 kB on the way
        await get(tmp_path / "run", ca, url, ref="zeros")
    with pytest.raises(Blocked, match=r"(?i)file too large|signal 25|index-pack"):  # and not all of it gets here
        await get(tmp_path / "run", ca, url, ref="noise")
    assert not checked_out.exists()


async def test_ssh_asks_nobody_and_is_named_the_host_and_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer_command: Callable[[str], Path]
) -> None:
    peer_command("git")
    repository(tmp_path)
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" >> '{tmp_path}/asked'
for last; do :; done
case $last in *none.git*) echo 'no such repository here' >&2; exit 1; esac
cd '{tmp_path}' && eval "exec $last"
"""
    )
    ssh.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    for url in ("git@lab.example:suite.git", f"ssh://git@lab.example:2222{tmp_path}/suite.git"):
        assert (await get(tmp_path / "run", None, url, ref="v1") / "check.sh").exists()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"-oBatchMode=yes", "git@lab.example", "2222", "git-upload-pack 'suite.git'"} <= {*asked}
    with pytest.raises(Blocked, match=r"source\.git: git@lab\.example:none\.git: no such repository here"):
        await get(tmp_path / "run", None, "git@lab.example:none.git")


async def test_a_run_out_of_git_and_one_of_a_server_that_falls_silent(
    server: GitServer, ca: Issued, tmp_path: Path
) -> None:
    async with house(tmp_path, ca_file=ca.cert, slots=2) as at:
        script = {"command": ["sh", "check.sh"]}
        await at.order(R[1], source={"git": server.url("git", "suite.git"), "ref": "v1"}, **script)
        await at.order(R[2], source={"git": server.url("silent", "suite.git")}, limits={"setup": 1}, **script)
        assert (await at.finished(R[1])).verdict == "passed"
        assert await at.states(R[1]) == {"version 1": "passed"}
        assert (await at.finished(R[2])).verdict == "blocked"
        (record,) = await at.events(TestFinished, run=R[2])
        assert record.message == "limits.setup: not prepared within 1 s"
        assert tree(R[2]) == []  # git, and its own helper that waited
