"""Which init there is, what its files say, and how a user comes to be."""

import tomllib
from pathlib import Path

import pytest

from agent.core.profile import BUNDLED
from agent.install import service
from agent.install.service import Needs, Service
from agent.install.stage import InstallFailed
from agent.settings import DEVICES


def made(root: Path, init: service.Init = "systemd", user: str = "dynamic", **needs: object) -> Service:
    return Service(init=init, user=user, prefix=Path("/opt/agent"), root=root, needs=Needs(**needs))  # type: ignore[arg-type]


def machine(of: Service) -> list[str]:
    return of.files()[Path("/etc/systemd/system/agent.service.d/machine.conf")][0].splitlines()


@pytest.mark.parametrize(
    ("files", "init"),
    [
        (["usr/lib/systemd/systemd", "etc/init.d/x"], "systemd"),
        (["lib/systemd/systemd"], "systemd"),
        (["sbin/openrc-run", "etc/init.d/x"], "openrc"),
        (["etc/init.d/x"], "sysv"),
    ],
)
def test_the_init_of_an_image_is_known_by_its_files(tmp_path: Path, files: list[str], init: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert service.detect(tmp_path) == init


def test_an_image_without_an_init_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InstallFailed, match=r"no init is known .* \(--init none\)"):
        service.detect(tmp_path)


@pytest.mark.parametrize(
    ("library", "version", "user"),
    [
        ("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so", 252, "dynamic"),
        ("usr/lib/systemd/libsystemd-shared-239.so", 239, "agent"),
        ("lib/systemd/libsystemd-shared-257.9-1.fc42.so", 257, "dynamic"),
        ("etc/hostname", None, "dynamic"),
    ],
)
def test_an_old_systemd_gets_a_static_user(tmp_path: Path, library: str, version: int | None, user: str) -> None:
    (tmp_path / library).parent.mkdir(parents=True)
    (tmp_path / library).touch()
    assert service.systemd_version(tmp_path) == version
    assert service.user_for("systemd", "dynamic", tmp_path) == user
    assert service.user_for("sysv", "dynamic", tmp_path) == "agent"
    assert service.user_for("openrc", "root", tmp_path) == "root"


def test_every_place_in_the_templates_is_filled(tmp_path: Path) -> None:
    for init in ("systemd", "openrc", "sysv"):
        of = made(tmp_path, init, service.user_for(init, "dynamic", tmp_path))
        for text, _ in of.files().values():
            assert "@" not in text.replace("@system-service", "").replace("@privileged @resources", "")
    assert "--user agent" in made(tmp_path, "sysv", "agent").files()[Path("/etc/init.d/agent")][0]
    assert "/opt/agent/current/agent run" in made(tmp_path).files()[Path("/etc/systemd/system/agent.service")][0]


def test_systemd_hands_over_the_secrets_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "etc/agent/secrets").mkdir(parents=True)
    (tmp_path / "etc/agent/token").touch()
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv/lab.token").touch()
    of = made(tmp_path, credentials=("token", "/srv/lab.token", "not-there"), secrets="/etc/agent/secrets")
    assert [line for line in machine(of) if line.startswith("LoadCredential")] == [
        "LoadCredential=token:/etc/agent/token",
        "LoadCredential=srv_lab.token:/srv/lab.token",
        "LoadCredential=secrets:/etc/agent/secrets",
    ]
    assert "LoadCredential" not in "".join(machine(made(tmp_path, user="agent", credentials=("token",))))


def test_the_groups_are_those_that_exist(tmp_path: Path) -> None:
    assert "SupplementaryGroups" not in "".join(machine(made(tmp_path)))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/group").write_text("root:x:0:\nadm:x:4:syslog\ndialout:x:20:\n")
    assert "SupplementaryGroups=adm dialout" in machine(made(tmp_path))
    (tmp_path / "etc/group").write_text("adm:x:4:\nvideo:x:44:\n")
    assert "SupplementaryGroups=adm video" in machine(made(tmp_path, groups=("video", "render")))


def test_users_folders_and_serial_lines_are_the_machines_own(tmp_path: Path) -> None:
    assert "User=tester" in machine(made(tmp_path, user="tester"))
    assert {"User=root", "CapabilityBoundingSet=~"} <= set(machine(made(tmp_path, user="root")))
    of = made(tmp_path, devices=("char-ttyUSB",), writes=("/data/agent", "/data/100 %"))
    assert {'ReadWritePaths=-/data/agent "-/data/100 %%"', "PrivateDevices=no", "DeviceAllow=char-ttyUSB rw"} <= set(
        machine(of)
    )


def test_an_account_is_looked_for_in_the_image(tmp_path: Path) -> None:
    assert service.account(tmp_path, "agent") is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nagent:x:990:991::/var/lib/agent:/bin/false\n")
    assert service.account(tmp_path, "agent") == (990, 991)


def test_an_init_that_fails_or_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "rc-service").write_text("#!/bin/sh\necho agent: cannot $2 >&2; exit 7\n")
    (tmp_path / "rc-service").chmod(0o755)
    with pytest.raises(InstallFailed, match=r"rc-service agent stop ended with 7: agent: cannot stop. See /var/log"):
        made(tmp_path, "openrc").ask("stop")
    (tmp_path / "rc-service").unlink()
    with pytest.raises(InstallFailed, match=r"rc-service: No such file.*right --init"):
        made(tmp_path, "openrc").ask("stop")


def test_the_labels_that_hardware_profiles_set_open_devices_to_the_service() -> None:
    said = [tomllib.loads(path.read_text()) for path in BUNDLED.glob("*.toml")]
    tables = [table for each in said for table in (each, *each.get("when", ()))]
    labels = {label for table in tables for label in table.get("settings", {}).get("labels", {})}
    assert labels == DEVICES.keys()
