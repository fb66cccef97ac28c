"""`agent install` from its command line."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import agent
from agent import cli
from agent.core import release
from agent.install import command
from agent.settings import Settings, StateSettings
from tests.release_folder import make_release, tree


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, and this process as version 1, frozen."""
    source = make_release(tmp_path / "source", "1")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(source / "agent"))
    monkeypatch.setattr(agent, "__version__", "1")
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


def run(image: Path, *words: str) -> int:
    return cli.main(["install", "--root", str(image), *words])


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_release_goes_into_an_image(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(image, "--init", "none", "--json") == 0
    result = told(capsys)
    assert (result["ok"], result["version"], result["state"]) == (True, "1", "PLACED")
    assert tree(image / "opt/agent/releases/1") == tree(image.parent / "source")
    assert run(image, "--list", "--json") == 0
    assert told(capsys) == [{"version": "1", "role": "current, on trial", "starts": 0}]
    assert run(image, "--list") == 0
    assert capsys.readouterr().out == "1  current, on trial, 0 of 3 starts\n"
    assert run(image, "--rollback", "--init", "none") == 1
    assert "no release to go back to" in capsys.readouterr().err
    assert run(image, "--uninstall", "--purge", "--init", "none") == 0
    assert [path for path in image.rglob("*") if not path.is_dir()] == []


def test_a_dry_run_says_each_step_and_does_none(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(image, "--init", "systemd", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "would: copy " in said
    assert f"would: write {image}/etc/systemd/system/agent.service\n" in said
    assert list(image.iterdir()) == []


def test_a_failure_names_what_and_what_to_do(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image.parent / "source/lib/code").write_text("bent")
    assert run(image, "--init", "none", "--json") == 1
    result = told(capsys)
    assert (result["ok"], result["state"], result["steps"]) == (False, "", [])
    assert result["error"].endswith("lib/code is damaged: its checksum is wrong")
    assert result["remedy"] == "Fetch the release again."


def test_broken_settings_of_the_image_are_named_and_nothing_is_done(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image / "etc/agent").mkdir(parents=True)
    (image / "etc/agent/agent.toml").write_text("[suites]\nslots = 0\n")
    assert run(image, "--init", "none") == 2
    assert "agent.toml:2: suites.slots: 0 is less than 1" in capsys.readouterr().err
    assert not (image / "opt").exists()


def test_broken_settings_are_not_in_the_way_of_going_back_and_removing(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(image, "--init", "systemd") == 0
    monkeypatch.setattr(sys, "executable", str(make_release(tmp_path / "two", "2") / "agent"))
    monkeypatch.setattr(agent, "__version__", "2")
    assert run(image, "--init", "systemd") == 0
    (image / "etc/agent/agent.toml").write_text("[suites]\nslots = 0\n")
    assert run(image, "--init", "systemd", "--rollback") == 0
    assert release.pointed(image / "opt/agent/current") == "1"
    assert run(image, "--init", "systemd", "--uninstall") == 0
    assert not (image / "opt/agent").exists()


@pytest.mark.parametrize("init", ["systemd", "openrc", "sysv"])
def test_whom_the_service_runs_as_stays_until_another_is_named(image: Path, init: str) -> None:
    (image / "etc").mkdir()
    users = "".join(f"{name}:x:{os.getuid()}:{os.getgid()}::/:/bin/false\n" for name in ("agent", "tester"))
    (image / "etc/passwd").write_text(users)
    file = image / ("etc/systemd/system/agent.service.d/machine.conf" if init == "systemd" else "etc/init.d/agent")
    first = "DynamicUser=yes" if init == "systemd" else "--user agent"
    tester = "User=tester" if init == "systemd" else "--user tester"
    for words, line in [((), first), (("--user", "tester"), tester), ((), tester), (("--user", "dynamic"), first)]:
        assert run(image, "--init", init, *words) == 0
        assert line in file.read_text()


def test_a_person_is_told_of_a_step_when_it_begins(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(release, "prune", lambda prefix: said.append(capsys.readouterr().out))
    assert run(image, "--init", "none") == 0
    assert said[0].endswith("\nremove older releases\n")


def test_what_an_image_is_is_found_out(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(image) == 1
    assert "no init is known" in capsys.readouterr().err
    (image / "etc/init.d").mkdir(parents=True)
    (image / "etc/passwd").write_text("agent:x:0:0::/:/bin/false\n")
    assert run(image) == 0
    assert (image / "etc/init.d/agent").exists()


def test_a_checkout_is_no_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--init", "none") == 1
    assert "a checkout is no release. make dist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--list", "--rollback"], "--rollback and --list do not go together"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--sha256", "12"], "--sha256 goes with --from"),
        (["--prefix", "opt"], "absolute"),
        (["--prefix", "/opt/a b"], "--prefix '/opt/a b' cannot stand in a service file"),
        (["--user", "agent;reboot"], "--user 'agent;reboot' is no user's name"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    image: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(image, *words) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_named_installs_itself(image: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent-2"
    file.write_text('#!/bin/sh\necho "$TMPDIR"; shift; echo "$@"; echo broken >&2; exit 1\n')
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    (image / "opt/agent/.from-killed").mkdir(parents=True)
    assert run(image, "--init", "none", "--now", "--json", "--from", str(file), "--sha256", sha256) == 1
    said = capfd.readouterr()
    where, words = said.out.splitlines()
    assert Path(where).parent == image / "opt/agent"
    assert words == f"--prefix /opt/agent --root {image} --init none --now --json"
    assert said.err == "broken\n"
    assert run(image, "--user", "root", "--from", str(file), "--sha256", sha256) == 1
    assert capfd.readouterr().out.endswith(f"--root {image} --init auto --user root\n")
    assert run(image, "--init", "none", "--from", str(file), "--sha256", "0" * 64) == 1
    assert "has the checksum" in capfd.readouterr().err
    assert list((image / "opt/agent").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x7fELF of another machine", "cannot be run: Exec format error"),
        (b"", "cannot be run: Exec format error"),
        (b"#!/bin/sh\nexit 255\n", "ended with 255"),
        (b"#!/bin/sh\nkill -9 $$\n", "ended with -9"),
    ],
)
def test_a_file_that_is_no_release_is_named(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, what: str
) -> None:
    file = tmp_path / "agent-2"
    file.write_bytes(content)
    words = ("--init", "none", "--from", str(file), "--sha256", hashlib.sha256(content).hexdigest())
    assert run(image, *words) == 1
    assert capsys.readouterr().err == f"{file} {what}. {command.OTHER_FILE}\n"
    assert run(image, "--json", *words) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["error"], result["steps"]) == (False, f"{file} {what}", [])
    assert list((image / "opt/agent").iterdir()) == []


def test_the_boot_check_is_of_the_release_that_asks(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(image, "--init", "none") == 0
    prefix = image / "opt/agent"
    monkeypatch.setattr(sys, "executable", str(prefix / "current/agent"))
    assert run(image, "--list") == 0
    assert "1  current" in capsys.readouterr().out
    assert cli.main(["install", "--boot-check"]) == 0
    pending = release.read_pending(prefix)
    assert pending is not None
    assert pending.starts == 1
    (prefix / "releases/0").mkdir()
    (prefix / "releases/0/agent").touch()
    release.write_pending(prefix, msgspec.structs.replace(pending, starts=3, previous="0"))
    assert cli.main(["install", "--boot-check"]) == 0
    assert f"{prefix}/current -> 0: the release before it did not prove itself" in capsys.readouterr().err


def test_only_root_installs_a_service(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(image, "--init", "systemd") == 1
    assert "only root can install a service" in capsys.readouterr().err


def test_the_service_files_are_printed_as_one_unit(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(image, "--print-service", "systemd") == 0
    said = capsys.readouterr().out
    assert (
        said.index("[Unit]")
        < said.index("# /etc/systemd/system/agent.service.d/machine.conf")
        < said.index("Delegate=")
    )


def test_what_the_settings_name_is_what_a_service_needs() -> None:
    toml = """
    labels = { serial = "usb", gpu = true }
    state.dir = "/data/agent"
    log.to = "/data/log/agent.log"
    seneschal = { url = "ws://x/seneschal", token_file = "lab.token" }
    mimir = { url = "ws://x/mimir", token_file = "lab.token", ca_file = "lab.pem" }
    control.tls = { cert = "cert.pem", key = "key.pem" }
    """
    needs = command.needs(msgspec.toml.decode(toml, type=Settings))
    assert needs.credentials == ("lab.token", "lab.pem", "token", "cert.pem", "key.pem")
    assert needs.writes == ("/data/agent", "/data/log")
    assert command.needs(Settings(state=StateSettings(dir="state"))).writes == ("/state",)  # the service starts in /
    assert needs.devices == ("char-ttyS", "char-ttyUSB", "char-ttyACM", "char-nvidia*", "char-drm")
    assert needs.groups == ("video", "render")
