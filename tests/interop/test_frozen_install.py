"""The frozen forms install themselves: what is laid out is the folder that was frozen, and it works from there.

Source: protocols/packaging.md 3, 8, acceptance 4.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.core.release import read_pending
from tests.release_folder import tree

pytestmark = pytest.mark.interop


def run(argv: Sequence[str | Path], code: int = 0, **environ: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=120, check=False, env={"PATH": os.environ["PATH"], **environ}
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Failed to remove" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


def install(agent: Path, image: Path, *words: str | Path) -> Any:
    return json.loads(run([agent, "install", "--root", image, "--init", "none", "--json", *words]))


@pytest.mark.parametrize("form", ["agent", "onedir/agent"])
def test_either_form_lays_out_the_folder_that_was_frozen(frozen: Path, image: Path, form: str) -> None:
    version = json.loads(run([frozen / form, "--version", "--json"]))["version"]
    assert install(frozen / form, image)["state"] == "PLACED"
    placed = image / "opt/agent/releases" / version
    assert tree(placed) == tree(frozen / "onedir")
    assert (image / "usr/share/emissary/monitors/sdk.py").exists()
    installed = image / "opt/agent/current/agent"
    asked = '[[monitors.monitor]]\nid = "hello"\nsteps = ["Greet"]\n'
    asked += f'command = ["{image}/usr/share/emissary/monitors/examples/hello.sh"]\n'
    (image / "hello.toml").write_text(asked)
    assert json.loads(run([installed, "monitors", "run", "--once", image / "hello.toml"]))["state"] == "ok"
    assert json.loads(run([installed, "install", "--root", image, "--list", "--json"]))[0]["version"] == version

    before = tree(image)
    assert install(installed, image)["steps"][0] == f"selftest of {placed}, which is there"
    sha256 = hashlib.sha256((frozen / "agent").read_bytes()).hexdigest()
    assert install(installed, image, "--from", frozen / "agent", "--sha256", sha256)["ok"]
    assert tree(image) == before


def test_the_installed_release_counts_its_own_starts(frozen: Path, tmp_path: Path, image: Path) -> None:
    install(frozen / "onedir/agent", image)
    installed = image / "opt/agent/current/agent"
    for starts in range(1, 4):
        run([installed, "install", "--boot-check"])
        pending = read_pending(image / "opt/agent")
        assert pending is not None
        assert pending.starts == starts


def test_the_single_file_is_no_service(frozen: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text(f'state.dir = "{tmp_path}/state"\n')
    said = run([frozen / "agent", "run", "--respawn", "--config", tmp_path / "agent.toml"], code=1)
    assert "the single file is no service: it is unpacked anew for each start. Run its `agent install`." in said
