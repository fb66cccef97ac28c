"""The peers themselves: what the fixtures of this folder hand out does run."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop

TEST_FILE = "import test from 'ava';\ntest('adds', t => t.is(1 + 1, 2));\n"


def run_ava(node: Path, installed: Path, project: Path) -> str:
    (project / "node_modules").symlink_to(installed / "node_modules")
    (project / "package.json").write_text('{"type": "module"}')
    (project / "test.js").write_text(TEST_FILE)
    (cli,) = [path for name in ("cli.js", "cli.mjs") for path in installed.glob(f"node_modules/ava/entrypoints/{name}")]
    done = subprocess.run(
        [node, cli, "--tap"], cwd=project, capture_output=True, text=True, env={"CI": "1"}, timeout=60
    )
    return done.stdout + done.stderr


def test_ava_6_runs_on_the_systems_node(node: Path, npm_project: Callable[..., Path], tmp_path: Path) -> None:
    assert "ok 1 - adds" in run_ava(node, npm_project("ava@6.4.1"), tmp_path)


def test_ava_8_runs_on_node_22(node22: Path, npm_project: Callable[..., Path], tmp_path: Path) -> None:
    assert "ok 1 - adds" in run_ava(node22, npm_project("ava@8.0.1"), tmp_path)


def test_a_python_peer_has_its_pins(python_peer: Callable[..., Path]) -> None:
    version = "import importlib.metadata as m; print(m.version('junitparser'))"
    done = subprocess.run(
        [python_peer("junitparser==5.0.3"), "-c", version], capture_output=True, text=True, check=True
    )
    assert done.stdout == "5.0.3\n"


def test_an_absent_peer_fails_in_ci_and_skips_by_name_elsewhere(
    peer_command: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="peer no-such-broker: no command"):
        peer_command("no-such-broker")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="peer no-such-broker: no command"):
        peer_command("no-such-broker")
