"""`agent monitors run` as a person runs it, with the examples that come with it."""

import http.server
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitors_house import ID, SDK, program

EXAMPLES = SDK / "examples"


def agent(*argv: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent", "monitors", "run", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})})


def settings(folder: Path, *monitors: dict[str, Any]) -> Path:
    tables = ["[monitors]\nexit_grace = 60"]
    for each in monitors:
        keys = {"id": f"{ID}-fg"} | each
        pairs = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key != "config"]
        config = ", ".join(f"{key} = {json.dumps(value)}" for key, value in each.get("config", {}).items())
        tables.append("\n".join(["[[monitors.monitor]]", *pairs, f"config = {{ {config} }}"]))
    path = folder / "agent.toml"
    path.write_text("\n".join(tables))
    return path


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def web() -> Iterator[str]:
    """A web server on loopback."""

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"hello")

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_example_in_sh(tmp_path: Path) -> None:
    for dialect in ("metrist", "seed", "auto"):
        given = {"command": [str(EXAMPLES / "hello.sh")], "steps": ["Greet"], "dialect": dialect, "config": {"N": "é"}}
        done = agent("--once", "--all", settings(tmp_path, given))
        log, step, run = lines(done)
        assert done.returncode == 0, done.stderr
        assert log["text"] == 'Hello, my configuration is {"N":"\\u00e9"}'
        assert list(step) == [
            *("kind", "monitor", "run", "step", "state", "ms", "timed_by", "started_at", "ended_at", "text", "cause"),
            *("metadata", "rc", "signal", "stderr_tail"),
        ]
        assert (step["kind"], step["state"], step["timed_by"]) == ("step", "ok", "orchestrator")
        assert step["started_at"].endswith("Z")
        assert (run["kind"], run["ended_by"], run["rc"]) == ("run", "exit", 0)
        assert run["dialect"] == ("seed" if dialect == "seed" else "metrist")


def test_the_example_with_the_library(tmp_path: Path, web: str) -> None:
    copy = tmp_path / "copy"  # as a team would have it: the library next to the program
    copy.mkdir()
    shutil.copy(SDK / "sdk.py", copy)
    program = shutil.copy(EXAMPLES / "http_check.py", copy)
    given = {"command": [sys.executable, program], "steps": ["Get", "Head", "Nope"], "config": {"Url": web}}
    done = agent("--once", "--all", settings(tmp_path, given), env={"EMISSARY_SDK": str(copy)})
    get, log, head, nope, run = lines(done)
    assert done.returncode == 1
    assert (get["state"], get["timed_by"], get["metadata"]) == ("ok", "monitor", {"status": 200.0, "bytes": 5.0})
    assert log["text"].startswith("200 ")
    assert (head["state"], head["timed_by"]) == ("ok", "orchestrator")
    assert (nope["state"], nope["text"]) == ("error", "LookupError: there is no step 'Nope'; there are Get, Head")
    assert (run["ended_by"], run["rc"]) == ("exit", 0)


def test_without_once_it_runs_until_a_signal(tmp_path: Path) -> None:
    good = program(tmp_path, "shake()\nwhile hear().startswith('Run'): say('Step OK')")
    path = settings(tmp_path, {"command": good, "steps": ["A"], "interval": 1})
    argv = [sys.executable, "-m", "agent", "monitors", "run", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        runs = [json.loads(line)["run"] for line in itertools.islice(process.stdout, 2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert runs == [f"{ID}-fg-000001", f"{ID}-fg-000002"]


def test_a_reader_that_stands_still_holds_up_no_step_and_misses_none(tmp_path: Path) -> None:
    steps = [f"S{number}" for number in range(5)]
    reached = tmp_path / "reached"
    # A result is told some milliseconds after it came.
    body = "shake()\nwhile hear().startswith('Run'):\n time.sleep(0.05); say('Step Error ' + 'x' * 60_000)"
    body += f"\nos.close(os.open({str(reached)!r}, os.O_WRONLY))"
    given = {"command": program(tmp_path, body), "steps": steps, "on_error": "continue"}
    os.mkfifo(reached)
    argv = [sys.executable, "-m", "agent", "monitors", "run", "--once", str(settings(tmp_path, given))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            last = os.open(reached, os.O_RDONLY | os.O_NONBLOCK)
            assert select.select([last], [], [], 120)[0]  # five results are more than a pipe takes
            os.close(last)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert [json.loads(line)["step"] for line in out.splitlines()] == steps


def test_nobody_to_read_it_is_no_reason_to_run_on(tmp_path: Path) -> None:
    bad = program(tmp_path, "shake()\nhear()\nsay('Step OK'); hear()")
    path = settings(tmp_path, {"command": bad, "steps": ["A"], "interval": 1})
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "agent", "monitors", "run", str(path)]
    with subprocess.Popen(argv, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 1


def test_a_wrong_file_is_a_usage_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('[[monitors.monitor]]\nid = "web"\ncommand = ["web"]\nsteps = ["not ok"]\n')
    done = agent("--once", path)
    assert done.returncode == 2
    assert f"{path}:4: monitors.monitor[web].steps: " in done.stderr
    assert "'not ok' cannot be a step's name" in done.stderr


def test_a_file_without_a_monitor_is_a_usage_error_and_waits_for_nothing(tmp_path: Path) -> None:
    done = agent("--once", settings(tmp_path))
    assert done.returncode == 2
    assert "monitors.monitor: it names no monitor. Write [[monitors.monitor]]." in done.stderr
