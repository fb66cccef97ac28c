"""agent/suites/sources.py: git, run against a repository of the test's own."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.suites import sources
from agent.suites.messages import Source
from agent.suites.sources import Listing, git_checkout, git_commands, git_list

ENV = {"PATH": os.environ["PATH"], "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"}


def git(*words: str) -> str:
    me = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *me, *words], check=True, capture_output=True, text=True, env=ENV).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits; the first is tagged."""
    folder = tmp_path / "repository"
    git("init", "--quiet", str(folder))
    for number in (1, 2):
        (folder / "test.js").write_text(f"version {number}\n")
        git("-C", str(folder), "add", "test.js")
        git("-C", str(folder), "commit", "--quiet", "-m", f"version {number}")
        if number == 1:
            git("-C", str(folder), "tag", "first")
    return folder


def test_the_commands_are_run_in_order_and_ask_nobody(tmp_path: Path) -> None:
    commands = git_commands(Source(git="https://h/x.git", ref="v1", depth=3), tmp_path)
    assert [next(word for word in argv if word in ("init", "fetch")) for argv in commands] == ["init", "fetch"]
    assert commands[1][-3:] == ("--", "https://h/x.git", "v1")
    assert "--depth=3" in commands[1]
    for argv in (*commands, git_list(tmp_path), git_checkout(tmp_path)):
        assert argv[:3] == ("git", "-c", "protocol.allow=never")


@pytest.mark.parametrize(("ref", "content"), [("main", "version 2\n"), ("first", "version 1\n"), (None, "version 2\n")])
def test_a_branch_a_tag_or_the_head_is_fetched(repository: Path, tmp_path: Path, ref: str | None, content: str) -> None:
    target = tmp_path / "target"
    for argv in (*git_commands(Source(git=f"file://{repository}", ref=ref), target), git_checkout(target)):
        # The test's repository is a folder: only here is that transport allowed.
        here = ["git", "-c", "protocol.file.allow=always", *argv[1:]]
        subprocess.run(here, check=True, capture_output=True, env=ENV)
    assert (target / "test.js").read_text() == content
    assert git("-C", str(target), "rev-list", "--count", "HEAD") == "1"


def test_whom_it_trusts_is_told_to_what_goes_out(tmp_path: Path) -> None:
    _, fetch = git_commands(Source(git="https://h/x.git"), tmp_path, Path("/etc/lab ca.pem"))
    assert "http.sslCAInfo=/etc/lab ca.pem" in fetch
    assert not any(
        "sslCAInfo" in word for argv in git_commands(Source(git="https://h/x.git"), tmp_path) for word in argv
    )


@given(st.data())
def test_a_listing_is_counted_however_it_was_chunked(data: st.DataObject) -> None:
    said = b"".join(
        (
            b"100644 blob 5f2f16bfff90e6620509c0cf442e7a3586dad8fb       2\ttest.js\0",
            b"120000 blob 5f2f16bfff90e6620509c0cf442e7a3586dad8fb      40\ta\tb\nc/link\0",
            b"160000 commit 5f2f16bfff90e6620509c0cf442e7a3586dad8fb       -\tmodule 7\0",
            b"100755 blob 5f2f16bfff90e6620509c0cf442e7a3586dad8fb 1000000\t" + b"deep/" * 100 + b"\0",
        )
    )
    listing = Listing()
    while said:
        n = data.draw(st.integers(1, len(said)))
        listing.feed(said[:n])
        said = said[n:]
    assert (listing.files, listing.size) == (4, 1_000_042)


def test_what_is_out_of_bounds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Listing()
    listing.feed(b"100644 blob 5f2f16bf 4294967296\ta\0")
    assert listing.fault() is None
    listing.feed(b"100644 blob 5f2f16bf 1\tb\0")
    assert listing.fault() == "is larger than 4 GiB"
    monkeypatch.setattr(sources, "MAX_FILES", 1)
    assert listing.fault() == "holds more than 1 files"


def test_no_other_transport_is_allowed(repository: Path, tmp_path: Path) -> None:
    init, fetch = git_commands(Source(git=f"file://{repository}", ref="main"), tmp_path / "target")
    subprocess.run(init, check=True, env=ENV)
    done = subprocess.run(fetch, capture_output=True, text=True, env=ENV)
    assert done.returncode != 0
    assert "transport 'file' not allowed" in done.stderr
