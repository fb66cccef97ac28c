"""The command's front door: --version, at once and without the rest of the house."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import agent
from agent.__main__ import version
from agent.core.engine import native_engine

AGENT = Path(sys.executable).with_name("agent")


def test_version_names_version_build_and_engine() -> None:
    done = subprocess.run([AGENT, "--version"], capture_output=True, text=True, check=True)
    for fact in version().values():
        assert fact in done.stdout
    assert version()["version"] == agent.__version__
    assert version()["native"] == native_engine()


def test_version_as_json() -> None:
    done = subprocess.run([AGENT, "--version", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout) == version()


def test_version_imports_no_trio() -> None:
    script = (
        "import sys; sys.argv = ['agent', '--version']; from agent.__main__ import main; main(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "agent.core.engine" in loaded
    assert not {"trio", "msgspec", "ssl", "sqlite3"} & set(loaded)


def test_the_build_is_the_commit_that_git_names() -> None:
    root = Path(agent.__file__).parent.parent
    git = subprocess.run(["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    expected = git.stdout.strip() if git.returncode == 0 else "without git"
    assert version()["build"].startswith(f"checkout {expected}, ")


@pytest.mark.parametrize("words", ["--version", "--version --json"])
def test_a_reader_that_has_gone_ends_version_without_a_traceback(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([AGENT, *words.split()], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_standard_error_ends_no_command(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text('[eman.hub]\nauth = "any"\n')
    words = ["eman", "hub", "--listen", "127.0.0.1:0", "--config", str(tmp_path / "hub.toml")]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", str(AGENT), *words]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        assert hub.stdout.readline().startswith("http://127.0.0.1:")
        hub.terminate()
    assert hub.returncode == 0


def test_what_is_opened_takes_no_place_of_a_closed_standard_descriptor() -> None:
    opens = "from agent.standard import hold_closed; hold_closed(); print(open('/etc/passwd').fileno() > 2)"
    shell = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", opens]
    assert subprocess.run(shell, stdout=subprocess.PIPE, text=True).stdout == "True\n"
