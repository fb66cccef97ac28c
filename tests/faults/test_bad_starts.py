"""`agent run` where something is wrong: one line says what, and what to do; or it runs all the same.

Source: the issue of the binary, "Bad input"; protocols/settings.md, "Ends".
"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = """\
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
"""

Refuse = Callable[..., str]
Run = Callable[..., str]


def argv_of(folder: Path, before: str, options: Sequence[str] = (), apart: str = "-Urm") -> list[str]:
    """`agent run` after a shell command in namespaces of its own, with the state directory in $0. Skips without."""
    argv = [sys.executable, "-m", "agent", "run", "--config", str(folder / "agent.toml"), *options]
    if not before:
        return argv
    if subprocess.run(["unshare", apart, "true"], check=False).returncode != 0:
        pytest.skip(f"unshare {apart} is refused here")
    return ["unshare", apart, "sh", "-c", f'{before}; exec "$@"', str(folder / "state"), *argv]


@pytest.fixture
def refused(tmp_path: Path) -> Refuse:
    """Start the agent after `before`, a shell command with the state directory in $0; the last line it says."""
    (tmp_path / "state").mkdir()
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))

    def start(before: str = "", code: int = 1, options: Sequence[str] = ()) -> str:
        argv = argv_of(tmp_path, before, options)
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done.stderr.splitlines()[-1]

    return start


@pytest.fixture
def runs(tmp_path: Path) -> Run:
    """Start the agent after `before`, wait until it says `mark` and all its roles run, end it; all it said."""
    (tmp_path / "state").mkdir()
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))

    def start(before: str = "", mark: str = "role=suites state=running", apart: str = "-Urm", **environ: str) -> str:
        argv, env = argv_of(tmp_path, before, apart=apart), {**os.environ, **environ}
        with subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as agent:
            assert agent.stderr is not None
            said: list[str] = []
            while not all(any(text in line for line in said) for text in (mark, "role=suites state=running")):
                said.append(agent.stderr.readline())
                assert said[-1], "".join(said)
            agent.terminate()
            said += agent.stderr
            assert (agent.wait(60), "Traceback" in "".join(said)) == (0, False), "".join(said)
        return "".join(said)

    return start


def test_a_read_only_disk_is_named(refused: Refuse) -> None:
    said = refused('mount -t tmpfs -o ro tmpfs "$0"')
    assert said.endswith(
        "/state: cannot be used as state directory: Read-only file system. Set state.dir to a writable directory."
    )


def test_a_disk_that_is_full_before_the_store_is_made_is_named(refused: Refuse) -> None:
    said = refused('mount -t tmpfs -o size=16k tmpfs "$0"')
    assert said.endswith("Make room on the disk, or set state.dir to another one.")


def test_a_state_directory_of_somebody_else_is_named(refused: Refuse, tmp_path: Path) -> None:
    # A directory whose owner the namespace does not know is nobody's: its root may not write it.
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    (tmp_path / "state/lock").touch()
    shutil.chown(tmp_path / "state", 1234, 1234)
    shutil.chown(tmp_path / "state/lock", 1234, 1234)
    (tmp_path / "state/lock").chmod(0o600)
    said = refused("true")
    assert said.endswith(
        "cannot be used as state directory: Permission denied. Give it, with all that is in it, to the user who runs"
        " the agent (chown -R), or set another state.dir."
    )


def test_a_store_of_somebody_else_is_named(refused: Refuse, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
    shutil.chown(tmp_path / "state/store.db", 1234, 1234)
    (tmp_path / "state/store.db").chmod(0o600)
    assert "to the user who runs the agent (chown -R)" in refused("true")


def test_a_newer_store_and_one_that_is_none_are_named(refused: Refuse, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db:
        db.execute("PRAGMA user_version = 99")
    assert refused().endswith("schema 99 is newer than this agent's 1. Install the newer release again.")
    (tmp_path / "state/store.db").write_text("no database, but a long enough text to be looked at")
    assert refused().endswith("Move the file away to begin with an empty store; keep it for analysis.")


def test_a_store_with_what_this_release_does_not_know_is_used(runs: Run, tmp_path: Path) -> None:
    runs()
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db, db:  # as another release of the schema wrote it
        db.execute("INSERT INTO journal(at, kind, data) VALUES(1.0, 'OfAnotherRelease', '{\"a\": 1}')")
        db.execute("INSERT INTO journal(at, kind, data) VALUES(2.0, 'AgentStarted', '{\"version\": \"0.0.1\"}')")
    runs()
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db:
        kinds = [kind for (kind,) in db.execute("SELECT kind FROM journal ORDER BY seq")]
    assert "AgentStarted" in kinds[kinds.index("OfAnotherRelease") + 2 :]


def test_without_var_lib_it_is_made(runs: Run, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[state]\nreserve = "4KiB"\n[control]\nlisten = ["127.0.0.1:0"]\n')
    runs("mount -t tmpfs tmpfs /var && [ ! -e /var/lib ]", STATE_DIRECTORY="")


def test_without_a_network_it_runs_and_says_what_it_cannot_reach(runs: Run, tmp_path: Path) -> None:
    with (tmp_path / "agent.toml").open("a") as file:
        file.write('[eman]\nurl = "http://192.0.2.1:9001"\n')
    runs("true", "link=eman state=offline error=192.0.2.1:9001 cannot be reached: Network is unreachable", apart="-Urn")


def test_settings_of_somebody_else_are_named(refused: Refuse, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    shutil.chown(tmp_path / "agent.toml", 1234, 1234)
    (tmp_path / "agent.toml").chmod(0o600)
    assert refused("true", 2).endswith("agent.toml: cannot be read: Permission denied. Let the agent's user read it.")


def test_broken_settings_are_named_with_their_line(refused: Refuse, tmp_path: Path) -> None:
    with (tmp_path / "agent.toml").open("a") as file:
        file.write("tokns = []\n")
    assert re.search(r"agent.toml:6: control.tokns: .*tokens", refused(code=2))


def test_a_log_that_cannot_be_written_is_named(refused: Refuse, tmp_path: Path) -> None:
    with (tmp_path / "agent.toml").open("a") as file:
        file.write('[log]\nto = "/nonexistent/agent.log"\n')
    said = refused(code=2)
    assert said.endswith('log.to: /nonexistent/agent.log: No such file or directory. Name a file to write, or "auto".')


def test_a_second_agent_on_one_state_directory_is_refused_and_the_first_goes_on(
    refused: Refuse, tmp_path: Path
) -> None:
    argv = [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "agent.toml")]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        assert any("role=suites state=running" in line for line in first.stderr)
        said = refused()
        who = f"another agent (pid {first.pid}) uses this state directory"
        assert said.endswith(f"{who}. Stop it, or give this one its own state.dir.")
        assert first.poll() is None
        first.terminate()
        assert first.wait(60) == 0


# `agent run` in the first minutes of 1970, as on a board without a clock.
IN_1970 = """
import sys, time
now, began = time.time, time.time()
time.time = lambda: now() - began + 60
from agent.__main__ import main
sys.exit(main())
"""


def test_in_1970_it_runs_and_keeps_events_in_order(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))
    argv = [sys.executable, "-c", IN_1970, "run", "--config", str(tmp_path / "agent.toml")]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        lines = iter(agent.stderr)
        address = next(line for line in lines if "control listens" in line).split("addresses=")[1].split()[0]
        due = {"1970, before this was built: events bear that date. Set the clock.", "role=suites state=running"}
        while due:  # in either order
            line = next(lines)
            due = {text for text in due if text not in line}
        client = [sys.executable, "-m", "agent", "ctl", "--url", f"ws://{address}/"]
        client += ["--token-file", str(tmp_path / "state/token"), "status"]
        status = json.loads(subprocess.run(client, cwd=ROOT, capture_output=True, check=True).stdout)
        assert {role["state"] for role in status["roles"].values()} == {"running"}
        agent.terminate()
        assert agent.wait(60) == 0
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db:
        times = [at for (at,) in db.execute("SELECT at FROM journal ORDER BY seq")]
    assert times == sorted(times)
    assert times[-1] < 600
