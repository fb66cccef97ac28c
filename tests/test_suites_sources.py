"""git is given no option by a document, and no way to a repository but https and ssh."""

import os
import subprocess
from pathlib import Path

import pytest

from agent.suites.messages import Source
from agent.suites.sources import ENVIRONMENT, git_commands


def git(folder: Path, *args: str) -> None:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    subprocess.run(
        ["git", *args], cwd=folder, check=True, env={**os.environ, **ENVIRONMENT, **who}, capture_output=True
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "-b", "main")
    for n in (1, 2):
        (folder / "file").write_text(f"{n}\n")
        git(folder, "add", "file")
        git(folder, "commit", "--quiet", "-m", f"{n}")
        git(folder, "tag", f"v{n}")
    return folder


@pytest.mark.parametrize(("ref", "content"), [(None, "2\n"), ("v1", "1\n"), ("main", "2\n")])
def test_the_commands_fetch_the_ref(tmp_path: Path, repository: Path, ref: str | None, content: str) -> None:
    for argv in git_commands(Source(git=str(repository), ref=ref), tmp_path / "target"):
        allowed = ["-c", "protocol.file.allow=always"]  # what the test's repository needs and a document never gets
        subprocess.run([argv[0], *allowed, *argv[1:]], check=True, env={**os.environ, **ENVIRONMENT})
    assert (tmp_path / "target" / "file").read_text() == content


def test_another_way_than_https_and_ssh_is_refused_by_git_itself(tmp_path: Path, repository: Path) -> None:
    init, fetch, _ = git_commands(Source(git=str(repository)), tmp_path / "target")
    subprocess.run(init, check=True)
    done = subprocess.run(fetch, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "transport 'file' not allowed" in done.stderr


def test_an_address_or_ref_that_looks_like_an_option_is_none() -> None:
    _, fetch, _ = git_commands(Source(git="--upload-pack=x", ref="--help"), Path("t"))
    assert fetch[fetch.index("--") + 1 :] == ("--upload-pack=x", "--help")
