"""The command's front door: --version, at once and without the rest of the house."""

import json
import subprocess
import sys
from pathlib import Path

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
