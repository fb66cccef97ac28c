"""All checks at once: one that hangs or breaks fails alone, and a running agent is not disturbed."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

import agent
from agent import selftest
from agent.checks.subject import Finding, Subject
from agent.cli import main
from agent.control.messages import Checked, Selftest
from agent.settings import Given, Settings, StateSettings
from tests.json_schema import check_action

SHEET = {
    *("native.engine", "native.jit", "native.rules", "inotify.limits", "state.disk", "state.fsync", "state.integrity"),
    *("os.entropy", "clock", "cgroup", "dbus", "runner.node", "runner.ava", "runner.pytest", "tls.roots", "config"),
    *("profile", "control.port", "control.token", "files.permissions", "bundle"),
    *("peer.seneschal", "peer.mimir", "peer.polarize", "peer.cibus", "peer.eman", "peer.coverage"),
}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(settings=Settings(state=StateSettings(dir=str(tmp_path))))


def test_every_check_of_the_sheet_is_there() -> None:
    assert set(selftest.NAMES) == SHEET


def test_globs_select(subject: Subject) -> None:
    assert selftest.select(["native.*", "config"]) == ["native.engine", "native.jit", "native.rules", "config"]
    assert selftest.select([]) == list(selftest.NAMES)
    with pytest.raises(ValueError, match=r"'naitve' is no check\. There are: native\.engine"):
        selftest.select(["naitve"])


async def test_a_check_that_hangs_or_breaks_fails_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def hangs(subject: Subject) -> Finding:
        end.wait(60)
        return Finding("ok", "")

    def breaks(subject: Subject) -> Finding:
        raise KeyError("x")

    monkeypatch.setitem(selftest.LOCAL, "native.jit", hangs)
    monkeypatch.setitem(selftest.LOCAL, "clock", breaks)
    monkeypatch.setattr(selftest, "LIMIT_S", 2)
    monkeypatch.setitem(selftest.LOCAL, "os.entropy", lambda subject: Finding("warn", "would block", "Wait.", {"a": 1}))
    report = await selftest.run(subject, ["native.jit", "clock", "os.entropy"])
    end.set()
    hung, broken, warned = report.checks
    assert not report.ok
    assert (hung.status, hung.ms, hung.detail) == ("fail", 2000.0, "not done within 2 s")
    assert (broken.status, broken.detail) == ("fail", "KeyError: 'x'")
    assert (warned.status, warned.detail, warned.remedy, warned.data) == ("warn", "would block", "Wait.", {"a": 1})


async def test_a_peer_that_hangs_fails_after_five_seconds(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def hangs(subject: Subject) -> Finding:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setitem(selftest.PEERS, "peer.mimir", hangs)
    report = await selftest.run(subject, ["peer.mimir", "peer.cibus"])
    assert [(check.status, check.detail) for check in report.checks] == [
        ("fail", "not done within 5 s"),
        ("ok", "not used"),
    ]
    assert trio.current_time() == pytest.approx(5)


async def test_warnings_are_no_failure(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selftest.LOCAL, "clock", lambda subject: Finding("warn", "x", "y"))
    assert (await selftest.run(subject, ["clock"])).ok


def test_a_table_for_people() -> None:
    checks = (
        Checked(name="clock", status="ok", ms=1.25, detail="synchronised", remedy="", data={}),
        Checked(name="config", status="fail", ms=0.1, detail="a:1: x\x1b[2J\na:2: y", remedy="Correct them.", data={}),
    )
    assert selftest.table(Selftest(ok=False, version="1", checks=checks)) == [
        "ok    clock       1.2 ms  synchronised",
        r"fail  config      0.1 ms  a:1: x\x1b[2J",
        "      a:2: y",
        "      Correct them.",
        "1 ok, 0 warn, 1 fail",
    ]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    state, log = f'[state]\ndir = "{tmp_path}/state"\n', f'[log]\nto = "{tmp_path}/log"\n'
    path.write_text(f'{state}{log}[control]\nlisten = ["127.0.0.1:0"]\n')
    return path


def test_json_is_as_the_sheet_shows_it_and_the_code_says_whether_any_failed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "os.entropy,config,control.*"
    assert main(["--selftest", "--json", "--only", only, "--config", str(config)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["version"]) == (True, agent.__version__)
    assert [check["name"] for check in report["checks"]] == ["os.entropy", "config", "control.port", "control.token"]
    assert report["checks"][0].keys() == {"name", "status", "ms", "detail", "remedy", "data"}
    config.write_text("x = 1\n")
    assert main(["--config", str(config), "--selftest", "--only", only]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^fail  config +\d+\.\d ms  {re.escape(str(config))}:1: x: unknown key", out, re.MULTILINE)


def test_a_check_that_does_not_exist_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--selftest", "--only", "nothing"]) == 2
    assert "agent --selftest: 'nothing' is no check" in capsys.readouterr().err


@pytest.fixture
def running(config: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`agent run`, up; its port is in the settings then."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(60)
        env = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        argv = [sys.executable, "-m", "agent", "run", "--config", str(config)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env) as process:
            try:
                while not notified.recv(4096).startswith(b"READY=1"):
                    pass
                port = re.findall(r"control listens addresses=127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())[0]
                config.write_text(config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
                yield process
            finally:
                process.kill()


def test_beside_a_running_agent_nothing_fails_and_the_agent_can_be_asked(
    running: "subprocess.Popen[str]", config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "native.*,state.disk,state.integrity,config,control.*,files.*"
    assert main(["--selftest", "--json", "--only", only, "--config", str(config)]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["control.port"]["detail"] == f"held by our own service, pid {running.pid}"
    assert checks["state.integrity"]["detail"] == "whole"
    assert main(["ctl", "--config", str(config), "selftest", 'only=["control.*", "os.*"]']) == 0
    answer = json.loads(capsys.readouterr().out)
    check_action("selftest", "answer", answer)
    assert [check["name"] for check in answer["checks"]] == ["os.entropy", "control.port", "control.token"]
    assert main(["ctl", "--config", str(config), "profile"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_action("profile", "answer", answer)
    assert main(["ctl", "--config", str(config), "selftest", 'only=["x"]']) == 1
    assert "bad_payload: 'x' is no check" in capsys.readouterr().err
    assert running.poll() is None


def test_the_settings_are_examined_even_when_broken(config: Path) -> None:
    config.write_text("x = 1\n")
    subject = selftest.examine(Given((config,)))
    assert (subject.effective, subject.report, len(subject.errors)) == (None, None, 1)
