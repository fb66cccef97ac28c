"""`agent demo`, whole: a lab, an agent, a real suite, its report."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.demo import Progress


def demo(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    argv = [sys.executable, "-m", "agent", "demo", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def write_suite(project: Path, script: str) -> None:
    (project / "suite.toml").write_text(f'id = "own"\nrunner = "tap"\ncommand = ["sh", "-c", """{script}"""]\n')


def test_a_good_suite_ends_with_0_and_a_table(project: Path) -> None:
    write_suite(project, "echo 1..2; echo ok 1 - first; echo 'ok 2 - second # SKIP later'")
    done = demo(project.parent, "--suite", str(project))
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines() if line)
    assert rows["verdict"] == "passed"
    assert rows["tests"] == "2: 1 passed, 1 skipped"
    assert rows["Mimir"] == "outcomes: 1 PASSED, 1 SKIPPED"
    assert rows["Polarize"] == "import passed"
    assert "<testsuites>" in Path(rows["xUnit"]).read_text()
    assert "ok      first" in done.stderr


def test_a_log_is_watched_meanwhile_and_a_match_is_told_with_what_led_to_it(project: Path) -> None:
    write_suite(project, "echo 1..1; echo ok 1 - first")
    done = demo(project.parent, "--suite", str(project))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    failed = "ERROR write to vol-3 failed: no space left"
    at = lines.index(f"log     {failed}  (class volume.full by template, rule volume-full, device.log)")
    assert lines[at + 1] == "before  INFO  opened vol-3 on sdb"
    assert "vol-3" not in done.stdout
    (told,) = (
        n for n, line in enumerate(lines) if re.match(r"log     forecast: vol-3 will probably fail \(\d+% ", line)
    )
    assert told < lines.index("log     forecast: vol-3 failed, as was foretold")


def test_json_is_exactly_the_result_document_and_a_failing_suite_ends_with_1(project: Path) -> None:
    write_suite(project, "echo 1..2; echo ok 1 - first; echo not ok 2 - second; exit 1")
    done = demo(project.parent, "--suite", str(project), "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert [*result] == [
        "run", "suite", "runner", "driver", "verdict", "result", "code", "signal", "reason", "started", "ended",
        "counts", "tests", "warnings", "artifacts",
    ]  # fmt: skip
    assert {test["name"]: test["state"] for test in result["tests"]} == {"first": "passed", "second": "failed"}


def test_keep_leaves_a_folder_with_everything(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_suite(project, "echo 1..1; echo ok 1")
    monkeypatch.chdir(tmp_path)
    assert demo(project.parent, "--suite", str(project), "--keep").returncode == 0
    (kept,) = tmp_path.glob("emissary-demo-*")
    assert list(kept.glob("agent/runs/*/xunit.xml"))
    assert (kept / "lab").is_dir()


def test_a_folder_that_is_no_suite_ends_with_1_and_says_what_is_missing(project: Path) -> None:
    done = demo(project.parent, "--suite", str(project))
    assert done.returncode == 1
    assert "holds no suite.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_keeps_a_suite_from_running_is_told_once(project: Path) -> None:
    (project / "suite.toml").write_text('id = "own"\nrunner = "tap"\ncommand = ["/nonexistent/runner"]\n')
    done = demo(project.parent, "--suite", str(project))
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("BLOCKED"))
    assert line.count("/nonexistent/runner: No such file or directory") == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_what_the_suite_has_started(project: Path, sent: signal.Signals) -> None:
    write_suite(project, "echo 1..2; echo ok 1 - $$; exec sleep 1000")
    argv = [sys.executable, "-m", "agent", "demo", "--suite", str(project)]
    env = {**os.environ, "XDG_CACHE_HOME": str(project.parent / "cache")}
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        runner = next(line.split()[1] for line in running.stderr if line.startswith("ok "))
        assert Path("/proc", runner).exists()
        running.send_signal(sent)
        told = running.stderr.read()
    assert (running.returncode, "Traceback" in told) == (1, False)
    assert not Path("/proc", runner).exists()


def test_titles_cannot_steer_the_terminal(project: Path) -> None:
    write_suite(project, "echo 1..1; printf 'ok 1 - \\\\033[2Jevil\\\\007\\n'")
    done = demo(project.parent, "--suite", str(project))
    assert done.returncode == 0, done.stderr
    assert "evil" in done.stderr
    assert not any(char in done.stderr + done.stdout for char in "\x1b\x07")


class Terminal(io.StringIO):
    def isatty(self) -> bool:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        return True


def test_the_test_that_runs_is_shown_on_a_terminal_and_cannot_steer_it_either() -> None:
    terminal = Terminal()
    say = Progress(terminal)
    say.now("\x1b[2Jevil ...")
    assert terminal.getvalue() == " [2Jevil ..."
    say.line("refused: \x07")
    assert terminal.getvalue() == " [2Jevil ...\r\x1b[Krefused:  \n"


def test_without_node_the_sample_is_pytests_or_the_shells(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "env"):
        (tools / name).symlink_to(f"/bin/{name}" if name == "sh" else "/usr/bin/env")
    env = {"PATH": str(tools), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    argv = [sys.executable, "-m", "agent", "demo", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert "sample  not ava: node and npm are not both here" in done.stderr
    assert "sample  not pytest: python3 is not here" in done.stderr
    assert json.loads(done.stdout)["suite"] == "sample-command"
