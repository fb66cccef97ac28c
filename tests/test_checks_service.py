"""Each check of the settings, the port and the files is good, and warns or fails where the sheet says so."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import settings as settings_module
from agent.checks import service
from agent.checks.subject import Subject
from agent.control.settings import ControlSettings, ControlTls, Token
from agent.core import facts, locks
from agent.logs.settings import LogsSettings, LogWatch
from agent.mimir.settings import MimirSettings
from agent.polarize.settings import PolarizeSettings
from agent.selftest import examine
from agent.settings import Given, Settings, StateSettings
from tests.certificates import authority

STRONG = "0123456789abcdef" * 4


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """agent.toml of a machine that the profile "board" fits."""
    (tmp_path / "hw-profiles").mkdir()
    (tmp_path / "hw-profiles/board.toml").write_text('name = "board"\nmatch.arch = "x"\n')
    (tmp_path / "agent.toml").write_text("")
    monkeypatch.setattr(settings_module, "FOLDERS", (tmp_path / "hw-profiles",))
    monkeypatch.setattr(facts, "detect", lambda: {"arch": "x"})
    return Given((tmp_path / "agent.toml",))


def subject(folder: Path, **tables: Any) -> Subject:
    return Subject(settings=Settings(state=StateSettings(dir=str(folder)), **tables))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


# ---- settings and profile --------------------------------------------------------------------------------------------


def test_good_settings_and_the_profile_that_fits(given: Given) -> None:
    checked = examine(given)
    assert service.config(checked) == ("ok", "good", "", {})
    assert service.profile(checked) == ("ok", "board", "", {"profile": "board", "forced": False})


def test_settings_with_errors_fail_with_every_line(given: Given) -> None:
    given.config[0].write_text("[suites]\nslots = 0\nslotz = 1\n")
    checked = examine(given)
    found = service.config(checked)
    assert found.status == "fail"
    assert found.detail.splitlines() == [
        f"{given.config[0]}:2: suites.slots: 0 is less than 1. Use a number from 1 to 64.",
        f"{given.config[0]}:3: suites.slotz: unknown key. Did you mean suites.slots?",
    ]
    assert service.profile(checked).status == "fail"
    assert checked.settings == Settings()


def test_a_variable_that_is_no_setting_is_a_warning(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_SUITES__SLOT", "2")
    checked = examine(given)
    assert service.config(checked).status == "warn"
    assert "AGENT_SUITES__SLOTS" in service.config(checked).detail
    assert service.profile(checked).status == "ok"


def test_a_tie_of_profiles_is_a_warning(given: Given, tmp_path: Path) -> None:
    (tmp_path / "hw-profiles/other.toml").write_text('name = "other"\nmatch.arch = "x"\n')
    found = service.profile(examine(given))
    assert (found.status, found.detail) == ("warn", "hardware profile board fits no better than other.")


def test_a_profile_with_an_error_fails_also_where_it_does_not_fit(given: Given, tmp_path: Path) -> None:
    (tmp_path / "hw-profiles/far.toml").write_text('name = "far"\nmatch.arch = "y"\nsettings.suites.slots = 0\n')
    found = service.profile(examine(given))
    assert found.status == "fail"
    assert found.detail.startswith(f"{tmp_path}/hw-profiles/far.toml:3: suites.slots: ")


def test_a_forced_profile_that_is_missing_fails(given: Given) -> None:
    checked = examine(msgspec.structs.replace(given, profile="none"))
    assert service.config(checked).detail.startswith("--profile: profile: no hardware profile is called 'none'")
    assert service.profile(checked).status == "fail"


# ---- the port --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of this process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_free_port(tmp_path: Path, listening: int) -> None:
    control = ControlSettings(listen=(f"127.0.0.2:{listening}", f"[::]:{listening}", "127.0.0.1:0"))
    assert service.control_port(subject(tmp_path, control=control)).status == "ok"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_another_holds_fails_with_its_name(tmp_path: Path, listening: int, host: str) -> None:
    found = service.control_port(subject(tmp_path, control=ControlSettings(listen=(f"{host}:{listening}",))))
    comm = Path("/proc/self/comm").read_text().strip()
    assert (found.status, found.data) == ("fail", {"pid": os.getpid()})
    assert found.detail == f"{host}:{listening} is held by pid {os.getpid()} ({comm})"


def test_a_port_that_another_holds_at_every_address_fails(tmp_path: Path) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        checked = subject(tmp_path, control=ControlSettings(listen=(f"127.0.0.1:{other.getsockname()[1]}",)))
        assert service.control_port(checked).data == {"pid": os.getpid()}


@pytest.mark.parametrize("host", ["192.0.2.1", "agent.invalid"])  # RFC 5737, RFC 6761
def test_an_address_that_is_none_of_this_machine_fails(tmp_path: Path, host: str) -> None:
    found = service.control_port(subject(tmp_path, control=ControlSettings(listen=(f"{host}:13172",))))
    assert found.status == "fail"
    assert found.detail.startswith(f"{host}:13172 is no address of this machine: ")


def test_a_port_of_the_agent_that_has_the_state_directory_is_a_warning(
    tmp_path: Path, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = subject(tmp_path, control=ControlSettings(listen=(f"127.0.0.1:{listening}",)))
    monkeypatch.setattr(locks, "owner", lambda lock, root: os.getpid())
    assert service.control_port(checked).detail == f"held by our own service, pid {os.getpid()}"
    monkeypatch.setattr(service, "_pid_of", lambda root, inode: None)
    assert service.control_port(checked).status == "warn"
    monkeypatch.setattr(locks, "owner", lambda lock, root: None)
    assert "held by a process of another user" in service.control_port(checked).detail


def test_a_port_without_its_certificate_fails(tmp_path: Path) -> None:
    tls = ControlTls(cert=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    found = service.control_port(subject(tmp_path, control=ControlSettings(listen=("127.0.0.1:0",), tls=tls)))
    assert (found.status, f"certificate {tmp_path}/cert.pem" in found.detail) == ("fail", True)
    issued = authority(tmp_path)
    tls = ControlTls(cert=str(issued.cert), key=str(issued.key))
    good = subject(tmp_path, control=ControlSettings(listen=("127.0.0.1:0",), tls=tls))
    assert service.control_port(good).status == "ok"


# ---- tokens and files ------------------------------------------------------------------------------------------------


def test_the_default_token_is_made_at_the_first_start(tmp_path: Path) -> None:
    found = service.control_token(subject(tmp_path))
    assert (found.status, found.detail) == ("ok", f"{tmp_path}/token is made at the first start")
    write(tmp_path / "token", STRONG)
    assert service.control_token(subject(tmp_path)).detail == "tokens: 1"


@pytest.mark.parametrize("weak", ["a" * 40, "12345678901234567890", "correct-horse", "deadbeefdeadbeef"])
def test_a_token_that_can_be_guessed_is_a_warning(tmp_path: Path, weak: str) -> None:
    write(tmp_path / "token", weak)
    assert service.control_token(subject(tmp_path)).status == "warn"


def test_a_token_that_others_may_read_fails(tmp_path: Path) -> None:
    write(tmp_path / "token", STRONG, 0o644)
    found = service.control_token(subject(tmp_path))
    assert (found.status, found.remedy) == ("fail", f"chmod 600 {tmp_path}/token")


def test_no_token_fails_and_nobody_asked_for_one_is_a_warning(tmp_path: Path) -> None:
    assert service.control_token(subject(tmp_path, control=ControlSettings(tokens=()))).status == "fail"
    open_to_all = ControlSettings(tokens=(), insecure_loopback=True)
    assert service.control_token(subject(tmp_path, control=open_to_all)).status == "warn"
    named = ControlSettings(tokens=(Token(file="elsewhere"),))
    assert service.control_token(subject(tmp_path, control=named)).status == "fail"


def test_keys_and_passwords_that_others_may_read_fail(tmp_path: Path) -> None:
    for name in ("token", "mimir", "password", "key"):
        write(tmp_path / name, STRONG, 0o600)
    checked = subject(
        tmp_path,
        mimir=MimirSettings(token_file=str(tmp_path / "mimir")),
        polarize=PolarizeSettings(user="u", password_file=str(tmp_path / "password")),
        control=ControlSettings(tls=ControlTls(cert="cert", key=str(tmp_path / "key"))),
    )
    assert service.files_permissions(checked).status == "ok"
    for name in ("token", "mimir", "password", "key"):
        (tmp_path / name).chmod(0o640)
        found = service.files_permissions(checked)
        assert (found.status, found.detail) == ("fail", f"others may read {tmp_path}/{name}")
        (tmp_path / name).chmod(0o600)


def test_a_credential_of_systemd_may_have_its_acl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    write(tmp_path / "token", STRONG, 0o440)
    assert service.files_permissions(subject(tmp_path)).status == "ok"


def test_a_credential_that_cannot_be_looked_at_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / ("n" * 300)))
    for found in (service.files_permissions(subject(tmp_path)), service.control_token(subject(tmp_path))):
        assert (found.status, found.detail.endswith("/token: File name too long")) == ("fail", True)


def test_a_log_that_cannot_be_read_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kern = write(tmp_path / "kern.log", "")
    logs = LogsSettings(
        watch=(
            LogWatch(name="a", path=str(kern)),
            LogWatch(name="b", glob=f"{tmp_path}/*.log"),
            LogWatch(name="c", path=f"{tmp_path}/absent"),
            LogWatch(name="d", journal=True),
        )
    )
    assert service.files_permissions(subject(tmp_path, logs=logs)).status == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = service.files_permissions(subject(tmp_path, logs=logs))
    assert found.status == "warn"
    assert str(kern) in found.detail
    assert "absent" not in found.detail


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> Subject:
    """A machine with a management controller, a serial line and a console, and labels that name them."""
    (tmp_path / "dev").mkdir()
    for name in ("ipmi0", "ttyS0", "ttyUSB0"):
        write(tmp_path / "dev" / name, "", 0o600)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/consoles").write_text("ttyS0                -W- (EC p a)    4:64\ntty0 -WU (E p) 4:1\n")
    settings = Settings(state=StateSettings(dir=str(tmp_path)), labels={"bmc": True, "serial": "usb", "gpu": False})
    return Subject(settings=settings, root=tmp_path)


def test_a_device_that_a_label_names_and_that_we_may_not_use_is_a_warning(
    board: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.files_permissions(board).status == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name == "token")
    found = service.files_permissions(board)
    mine = f"of user {os.getuid()}, group {os.getgid()}, mode 0600"
    assert found.status == "warn"
    assert found.detail.splitlines() == [
        f"label serial: the service's user may not use /dev/ttyUSB0 ({mine})",
        f"label bmc: the service's user may not use /dev/ipmi0 ({mine})",
    ]
    assert "udev" in found.remedy


def test_a_device_is_looked_at_with_the_eyes_of_the_agent_that_runs(
    board: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = board.root
    monkeypatch.setattr(locks, "owner", lambda lock, root: 4711)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (root / "proc/4711/root/dev").mkdir(parents=True)
    for name in ("ipmi0", "ttyUSB0"):
        (root / "proc/4711/root/dev" / name).symlink_to(root / "dev" / name)

    def found(uid: int, *groups: int) -> list[str]:
        four = "\t".join([str(uid)] * 4)
        (root / "proc/4711/status").write_text(
            f"Name:\tagent\nUid:\t{four}\nGid:\t{four}\nGroups:\t{' '.join(map(str, groups))}\n"
        )
        said = service.files_permissions(board)
        return [] if said.status == "ok" else said.detail.splitlines()

    group = os.getgid()
    assert found(0) == []
    assert found(os.getuid()) == []
    (root / "dev/ttyUSB0").chmod(0o660)
    (root / "dev/ipmi0").chmod(0o606)
    assert found(61000, group) == [
        f"label bmc: the service's user may not use /dev/ipmi0 (of user {os.getuid()}, group {group}, mode 0606)"
    ]
    assert [line.split(":")[0] for line in found(61000, group + 1)] == ["label serial"]
    (root / "proc/4711/root/dev/ipmi0").unlink()  # as systemd hides what it was not told to open
    assert found(0) == ["label bmc: the service sees none of /dev/ipmi*"]


def test_a_label_without_its_device_is_a_warning(board: Subject) -> None:
    for name in ("ipmi0", "ttyUSB0"):
        (board.root / "dev" / name).unlink()
    assert service.files_permissions(board).detail == "label bmc: the service sees none of /dev/ipmi*"
    (board.root / "dev/ttyS0").unlink()
    assert "label serial: the service sees none of /dev/ttyS*, /dev/ttyUSB*," in service.files_permissions(board).detail
