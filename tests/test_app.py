"""The service: settings to roles, reload, and its ends, as an init script sees them."""

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent import app
from agent.app import ROLE_TABLES, Service
from agent.core.config import ConfigErrors, Effective
from agent.core.events import RoleChanged, RunChanged, SlotsChanged
from agent.settings import Given, Settings, StateSettings, load_settings, state_dir
from tests.monitors_house import program

SETTINGS = """\
ident = "lab-07"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[control]
listen = ["127.0.0.1:0"]
"""


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


@pytest.fixture
def service(tmp_path: Path, notified: socket.socket) -> Iterator["subprocess.Popen[str]"]:
    """`agent run`, up."""
    (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path))
    argv = [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "agent.toml")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        ready, status = notified.recv(4096).decode().splitlines()
        assert (ready, status.startswith("STATUS=lab-07: control running")) == ("READY=1", True)
        yield process
        process.kill()


def heard(notified: socket.socket) -> str:
    return notified.recv(4096).decode().splitlines()[0]


def test_sigterm_ends_it_orderly_with_0(service: "subprocess.Popen[str]", notified: socket.socket) -> None:
    service.send_signal(signal.SIGTERM)
    assert heard(notified) == "STOPPING=1"
    _, err = service.communicate(timeout=60)
    assert service.returncode == 0
    assert "Traceback" not in err


def test_sighup_reloads_and_a_broken_file_changes_nothing(
    service: "subprocess.Popen[str]", notified: socket.socket, tmp_path: Path
) -> None:
    config = tmp_path / "agent.toml"
    good = config.read_text()
    config.write_text(f"{good}[suites]\nslots = 0\n")
    service.send_signal(signal.SIGHUP)
    assert [heard(notified), heard(notified)] == ["RELOADING=1", "READY=1"]
    config.write_text(f"{good}[suites]\nslots = 3\n")
    service.send_signal(signal.SIGHUP)
    assert [heard(notified), heard(notified)] == ["RELOADING=1", "READY=1"]
    service.send_signal(signal.SIGTERM)
    _, err = service.communicate(timeout=60)
    assert "suites.slots: 0 is less than 1" in err
    assert "reloaded changed=suites.slots" in err
    assert service.returncode == 0


async def test_reloads_at_once_come_one_after_the_other(tmp_path: Path) -> None:
    file, numbers = tmp_path / "agent.toml", itertools.count()
    given = Given((file,))

    def load() -> Effective[Settings]:
        """Each time other settings of one role."""
        file.write_text(f'{SETTINGS.format(folder=tmp_path)}[files]\ncontent_allow = ["/etc/{next(numbers)}"]\n')
        return load_settings(given)

    service = Service(load(), load, given)
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        with service.bus.subscribe(RoleChanged) as changes:
            async with trio.open_nursery() as asking:
                for _ in range(4):
                    asking.start_soon(service.bus.ask, "reload", {})
            states: list[str] = []
            with trio.fail_after(60):
                while len(states) < 8:
                    change = await anext(changes)
                    states += [change.state] if change.name == "files" else []
            assert states == ["stopped", "running"] * 4
            await service.supervisor.stop("gator")  # as by a reload whose client went away in the middle
            await service.bus.ask("reload", {})
            assert service.supervisor.runs("gator")
        assert service.supervisor.status["files"].restarts == 0
        nursery.cancel_scope.cancel()


async def test_a_peer_that_a_reload_takes_out_is_owed_nothing_more(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'{SETTINGS.format(folder=tmp_path)}[mimir]\nurl = "ws://127.0.0.1:1/mimir"\n')
    given = Given((file,))
    service = Service(load_settings(given), lambda: load_settings(given), given)
    owed = list[int]()
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        for run in ("r-1", "r-2"):
            service.bus.publish(RunChanged(run=run, state="running"))
            await service.store.commit()
            owed.append((await service.store.depths())["mimir"].waiting)
            file.write_text(SETTINGS.format(folder=tmp_path))
            await service.bus.ask("reload", {})
        nursery.cancel_scope.cancel()
    assert owed[0] > 0
    assert owed[1] == owed[0]


async def test_its_end_waits_for_no_peer_that_the_settings_do_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "STUCK_S", 3600)
    given = Given((tmp_path / "agent.toml",))
    given.config[0].write_text(SETTINGS.format(folder=tmp_path))
    service = Service(load_settings(given), lambda: load_settings(given), given)
    async with trio.open_nursery() as nursery:
        await nursery.start(service.store.run)
        service.store.owe("mimir", lambda event: True)  # as before mimir.url was taken out
        service.store.append(SlotsChanged(free=1, total=1, draining=False), 0.0)
        await service.store.commit()
        assert (await service.store.depths())["mimir"].waiting == 1
        with trio.fail_after(60):
            await service.deliver()
        nursery.cancel_scope.cancel()
    service.store.close()


def test_monitors_follow_their_file_without_a_signal(
    service: "subprocess.Popen[str]", notified: socket.socket, tmp_path: Path
) -> None:
    config = tmp_path / "agent.toml"
    monitor = '[[monitors.monitor]]\nid = "m"\ncommand = ["true"]\nsteps = ["A"]\ninterval = 86400\n'
    config.write_text(f"{config.read_text()}{monitor}")
    assert [heard(notified), heard(notified)] == ["RELOADING=1", "READY=1"]
    service.send_signal(signal.SIGTERM)
    _, err = service.communicate(timeout=60)
    assert "reloaded changed=monitors.monitor" in err


def test_the_last_monitor_that_is_removed_is_led_out_too(
    service: "subprocess.Popen[str]", notified: socket.socket, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "says")
    says_to = repr(str(tmp_path / "says"))
    body = f"shake(); hear(); out = open({says_to}, 'wb', 0); out.write(b'begun')\nhear(); out.write(b'led')"
    command = json.dumps(program(tmp_path, body))
    config = tmp_path / "agent.toml"
    # A profile without a monitor of its own: the role is there for the one of the file alone.
    without = f'profile = "beaglebone"\n{config.read_text()}'
    steps = 'steps = ["A"]\ninterval = 1\ntimeout = 600\n'
    with open(os.open(tmp_path / "says", os.O_RDWR), "rb", 0) as says:

        def said() -> bytes:
            assert select.select([says], [], [], 60)[0]
            return says.read(5)

        config.write_text(f'{without}[[monitors.monitor]]\nid = "m{os.getpid()}"\ncommand = {command}\n{steps}')
        assert [heard(notified), heard(notified)] == ["RELOADING=1", "READY=1"]
        assert said() == b"begun"
        config.write_text(without)
        assert said() == b"led"
    service.send_signal(signal.SIGTERM)
    service.communicate(timeout=60)
    assert service.returncode == 0


@pytest.fixture
def waiting(
    tmp_path: Path, held_port: int, notified: socket.socket
) -> Iterator[tuple["subprocess.Popen[str]", socket.socket]]:
    """`agent run` whose port is taken, as its supervisor has heard; and who has taken it."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", held_port))
        taken.listen()
        (tmp_path / "agent.toml").write_text(SETTINGS.format(folder=tmp_path).replace(":0", f":{held_port}"))
        argv = [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "agent.toml")]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
            said = f"STATUS=not ready: control.listen: 127.0.0.1:{held_port}: Address already in use. End what uses"
            assert heard(notified).startswith(said)
            yield process, taken
            process.kill()


def test_it_is_not_ready_while_its_port_is_taken(
    waiting: tuple["subprocess.Popen[str]", socket.socket], notified: socket.socket, tmp_path: Path
) -> None:
    process, taken = waiting
    with (tmp_path / "agent.toml").open("a") as file:
        file.write("[suites]\nslots = 3\n")
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    before = list(itertools.takewhile(lambda line: "reloaded changed=suites.slots" not in line, process.stderr))
    taken.close()
    assert heard(notified) == "READY=1"
    process.send_signal(signal.SIGTERM)
    _, after = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in "".join(before) + after
    assert ["state=running" in line for line in before] == [False] * len(before)  # without the port, no role
    assert "role=suites state=running" in after


def test_it_ends_while_its_port_is_taken(waiting: tuple["subprocess.Popen[str]", socket.socket]) -> None:
    process, _ = waiting
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "role=suites" in err, "Traceback" in err) == (0, False, False)


def test_every_role_has_the_tables_that_restart_it() -> None:
    tables = {field for names in ROLE_TABLES.values() for field in names}
    assert tables <= set(Settings.__struct_fields__)


def test_the_state_directory_is_the_users_own_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/x/.state")
    assert state_dir(Settings()) == Path("/home/x/.state/agent")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/x")
    assert state_dir(Settings()) == Path("/home/x/.local/state/agent")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # whom nobody knows
    assert state_dir(Settings()) == Path("/var/lib/agent")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_dir(Settings()) == Path("/var/lib/agent")


def test_a_relative_state_directory_is_told_to_runners_as_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert state_dir(Settings(state=StateSettings(dir="state"))) == tmp_path / "state"


def test_the_ident_is_the_host_name_unless_set(tmp_path: Path) -> None:
    assert Settings().name == socket.gethostname()
    (tmp_path / "agent.toml").write_text('ident = "lab-07"\n')
    assert load_settings(Given((tmp_path / "agent.toml",))).settings.name == "lab-07"


def test_a_watch_is_of_one_thing(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('[[logs.watch]]\nname = "kernel"\nkmsg = true\n')
    assert load_settings(Given((path,))).settings.logs.watch[0].kmsg
    path.write_text('[[logs.watch]]\nname = "kernel"\nkmsg = true\njournal = true\n')
    with pytest.raises(ConfigErrors, match=r"kernel has to watch one thing. Set one of path, glob, journal, kmsg"):
        load_settings(Given((path,)))
