"""Installing, upgrading, going back and removing, into an image and with a service that runs."""

import fcntl
import json
import os
import sqlite3
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from agent.core import release
from agent.core.release import pointed, read_pending
from agent.install import steps
from agent.install.service import Needs, Service
from agent.install.stage import InstallFailed
from agent.install.steps import Job, Step
from tests.release_folder import install, job, make_release, tree


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image/etc").mkdir(parents=True)
    (tmp_path / "image/etc/passwd").write_text(f"agent:x:{os.getuid()}:{os.getgid()}::/:/bin/false\n")
    return tmp_path / "image"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make_release(tmp_path / "one", "1")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_release(tmp_path / "two", "2")


def run(todo: Iterator[Step]) -> None:
    for _, do in todo:
        do()


def confirm(image: Path) -> None:
    """What the agent does after a good minute."""
    pending = read_pending(image / "opt/agent")
    assert pending is not None
    Path(pending.confirm).parent.mkdir(parents=True, exist_ok=True)
    Path(pending.confirm).write_text(pending.id)


def versions(image: Path) -> list[str]:
    return sorted(path.name for path in (image / "opt/agent/releases").iterdir())


def test_a_first_installation_lays_out_everything(image: Path, one: Path) -> None:
    of = job(image, "sysv")
    install(of, one, "1")
    prefix = image / "opt/agent"
    assert tree(prefix / "releases/1") == tree(one)
    assert os.readlink(prefix / "current") == "releases/1"
    assert os.readlink(image / "usr/local/bin/agent") == "/opt/agent/current/agent"
    assert (image / "etc/agent/agent.toml").read_text().startswith("# Emissary's settings")
    assert (image / "etc/agent/conf.d").is_dir()
    token = image / "etc/agent/token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text().strip()) == 43  # 256 bits
    assert (image / "var/lib/agent").stat().st_mode & 0o777 == 0o700
    assert (image / "usr/share/emissary/monitors/sdk.py").read_text() == "# the library\n"
    assert os.access(image / "usr/share/emissary/monitors/examples/look.sh", os.X_OK)
    assert (image / "etc/init.d/agent").stat().st_mode & 0o777 == 0o755
    assert os.readlink(image / "etc/rc2.d/S20agent") == "../init.d/agent"
    assert os.readlink(image / "etc/rc6.d/K01agent") == "../init.d/agent"
    assert of.state == "PLACED"  # nothing of an image is started


def test_a_library_that_a_monitor_reads_is_replaced_and_not_written_into(
    image: Path, one: Path, tmp_path: Path
) -> None:
    install(job(image), one, "1")
    library = image / "usr/share/emissary/monitors/sdk.py"
    with library.open() as running:
        install(job(image), make_release(tmp_path / "two", "2", **{"agent/monitors/sdk.py": "# another\n"}), "2")
        assert running.read() == "# the library\n"
    assert library.read_text() == "# another\n"


def test_systemd_and_openrc_start_it_at_boot(image: Path, one: Path) -> None:
    install(job(image, "systemd"), one, "1")
    units = image / "etc/systemd/system"
    assert (units / "multi-user.target.wants/agent.service").resolve() == units / "agent.service"
    assert (units / "agent.service.d/suites.conf").exists()
    install(job(image, "openrc"), one, "1")
    assert os.readlink(image / "etc/runlevels/default/agent") == "/etc/init.d/agent"


def test_a_second_time_changes_nothing(image: Path, one: Path) -> None:
    install(job(image, "systemd"), one, "1")
    before = tree(image)
    install(job(image, "systemd"), one, "1")
    assert tree(image) == before


def test_settings_and_token_are_never_overwritten(image: Path, one: Path) -> None:
    (image / "etc/agent").mkdir()
    (image / "etc/agent/agent.toml").write_text('ident = "mine"\n')
    (image / "etc/agent/token").write_text("my-own-token\n")
    install(job(image), one, "1")
    assert (image / "etc/agent/agent.toml").read_text() == 'ident = "mine"\n'
    assert (image / "etc/agent/token").read_text() == "my-own-token\n"


def test_an_upgrade_is_on_trial_and_two_releases_are_kept(image: Path, tmp_path: Path, one: Path, two: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    install(job(image), two, "2")
    pending = read_pending(prefix)
    assert pending is not None
    assert (pending.version, pending.previous, pointed(prefix / "current")) == ("2", "1", "2")
    confirm(image)
    install(job(image), make_release(tmp_path / "three", "3"), "3")
    assert (pointed(prefix / "current"), pointed(prefix / "previous")) == ("3", "1")  # 2 is the trial's to go back to
    confirm(image)
    assert release.boot_check(prefix) is None
    assert (pointed(prefix / "current"), pointed(prefix / "previous")) == ("3", "2")
    assert versions(image) == ["2", "3"]


def test_a_first_release_need_not_prove_itself_to_be_gone_back_to(image: Path, one: Path, two: Path) -> None:
    install(job(image), one, "1")
    install(job(image), two, "2")
    run(steps.roll_back(job(image)))
    assert pointed(image / "opt/agent/current") == "1"


def test_over_a_release_that_has_not_proven_itself_the_proven_one_stays_to_go_back_to(
    image: Path, tmp_path: Path, one: Path, two: Path
) -> None:
    install(job(image), one, "1")
    confirm(image)
    install(job(image), two, "2")
    install(job(image), make_release(tmp_path / "three", "3"), "3")
    pending = read_pending(image / "opt/agent")
    assert pending is not None
    assert (pending.version, pending.previous) == ("3", "1")
    assert versions(image) == ["1", "3"]


def test_the_same_version_with_other_bytes_is_replaced_and_on_trial(image: Path, tmp_path: Path, one: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    again = make_release(tmp_path / "again", "1", code="another build\n")
    done = install(job(image), again, "1")
    assert f"{prefix}/current -> 1, on trial" in done
    assert tree(prefix / "releases/1") == tree(again)
    assert pointed(prefix / "current") == "1"
    assert [release.boot_check(prefix) for _ in range(4)] == [None, None, None, "1.replaced"]
    assert tree(prefix / "current/") == tree(one)


def test_the_proven_release_stays_to_go_back_to_however_often_its_version_comes_anew(
    image: Path, tmp_path: Path, one: Path
) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    for number in range(3):
        install(job(image), make_release(tmp_path / f"again{number}", "1", code=f"build {number}\n"), "1")
    assert tree(prefix / "releases/1") == tree(tmp_path / "again2")
    assert [release.boot_check(prefix) for _ in range(4)] == [None, None, None, "1.replaced"]
    assert tree(prefix / "current/") == tree(one)


def test_a_release_that_is_gone_back_to_may_be_replaced(image: Path, tmp_path: Path, one: Path, two: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    install(job(image), two, "2")  # on trial
    again = make_release(tmp_path / "again", "1", code="another build\n")
    install(job(image), again, "1")
    assert tree(prefix / "current/") == tree(again)
    run(steps.roll_back(job(image)))
    assert tree(prefix / "current/") == tree(one)


def test_a_proven_release_that_is_installed_again_is_not_on_trial(image: Path, one: Path, two: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    install(job(image), two, "2")  # on trial
    done = install(job(image), one, "1")
    assert f"{prefix}/current -> 1, which is proven" in done
    assert (pointed(prefix / "current"), read_pending(prefix)) == ("1", None)
    assert versions(image) == ["1"]


def test_a_trial_goes_on_when_an_installer_dies_while_it_gives_its_release_another_name(
    image: Path, tmp_path: Path, one: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    install(job(image), two, "2")  # on trial

    def dies(link: Path, version: str) -> None:
        raise OSError("killed")

    again = make_release(tmp_path / "again", "2", code="another build\n")
    with monkeypatch.context() as dying:
        dying.setattr(steps, "point", dies)
        with pytest.raises(OSError, match="killed"):
            install(job(image), again, "2")
    pending = read_pending(prefix)
    assert pending is not None
    assert (pending.version, pointed(prefix / "current")) == ("2.replaced", "2")
    assert [(item.version, item.role) for item in steps.listed(prefix)] == [
        ("1", "previous"),
        ("2", "current, on trial"),
        ("2.replaced", ""),
    ]
    assert [release.boot_check(prefix) for _ in range(4)] == [None, None, None, "1"]
    assert tree(prefix / "current/") == tree(one)


def test_both_trials_of_one_version_went_well(image: Path, tmp_path: Path, one: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    confirm(image)
    for number in range(2):
        install(job(image), make_release(tmp_path / f"again{number}", "1", code=f"build {number}\n"), "1")
        confirm(image)
    assert release.boot_check(prefix) is None
    assert versions(image) == ["1", "1.replaced1"]
    run(steps.roll_back(job(image)))
    assert tree(prefix / "current/") == tree(tmp_path / "again0")


def test_a_release_whose_selftest_fails_leaves_nothing(image: Path, tmp_path: Path, one: Path) -> None:
    install(job(image), one, "1")
    before = tree(image)
    bad = make_release(tmp_path / "bad", "2", selftest="native.engine: wrong answer")
    of = job(image)
    with pytest.raises(InstallFailed, match=r"the selftest of 2 fails: native.engine: wrong answer"):
        install(of, bad, "2")
    assert tree(image) == before
    assert of.state == ""


def test_a_package_that_is_in_its_place_is_taken_there(image: Path) -> None:
    placed = make_release(image / "opt/agent/releases/1", "1")
    done = install(job(image), placed, "1")
    assert not any(what.startswith(("copy", "rename")) for what in done)
    assert pointed(image / "opt/agent/current") == "1"


def test_going_back_and_forth(image: Path, one: Path, two: Path) -> None:
    prefix = image / "opt/agent"
    install(job(image), one, "1")
    with pytest.raises(InstallFailed, match="no release to go back to"):
        run(steps.roll_back(job(image)))
    confirm(image)
    install(job(image), two, "2")
    assert [(item.version, item.role, item.starts) for item in steps.listed(prefix)] == [
        ("1", "previous", None),
        ("2", "current, on trial", 0),
    ]
    run(steps.roll_back(job(image)))  # in the trial
    assert (pointed(prefix / "current"), pointed(prefix / "previous"), read_pending(prefix)) == ("1", "2", None)
    run(steps.roll_back(job(image)))
    assert pointed(prefix / "current") == "2"
    assert [(item.version, item.role) for item in steps.listed(prefix)] == [("1", "previous"), ("2", "current")]


def test_serial_numbers_become_labels_once(tmp_path: Path) -> None:
    dmi, file = tmp_path / "id", tmp_path / "00-machine.toml"
    steps.record_serials(dmi, file)
    dmi.mkdir()
    for name, text in {
        "product_serial": "To Be Filled By O.E.M.",
        "board_serial": "0000",
        "chassis_serial": " ",
    }.items():
        (dmi / name).write_text(f"{text}\n")
    steps.record_serials(dmi, file)
    assert not file.exists()
    (dmi / "product_serial").write_text('J7"X\\Y3\n')
    steps.record_serials(dmi, file)
    assert tomllib.loads(file.read_text()) == {"labels": {"product_serial": 'J7"X\\Y3'}}
    (dmi / "product_serial").write_text("another\n")
    steps.record_serials(dmi, file)
    assert "another" not in file.read_text()


def test_two_installers_do_not_meet(image: Path, one: Path) -> None:
    with steps.alone(job(image)), pytest.raises(InstallFailed, match="another `agent install` works"):
        install(job(image), one, "1")


def test_removing_leaves_settings_and_state_unless_purged(image: Path, one: Path) -> None:
    install(job(image, "systemd"), one, "1")
    (image / "var/lib/agent/store.db").touch()
    run(steps.uninstall(job(image, "systemd"), purge=False))
    assert sorted(str(path.relative_to(image)) for path in image.rglob("*") if not path.is_dir()) == [
        *("etc/agent/agent.toml", "etc/agent/token", "etc/passwd", "var/lib/agent/store.db"),
    ]
    assert not (image / "opt/agent").exists()
    run(steps.uninstall(job(image, "systemd"), purge=True))
    assert [str(path.relative_to(image)) for path in image.rglob("*") if not path.is_dir()] == ["etc/passwd"]


def test_removing_leaves_what_somebody_else_has_made(image: Path, one: Path) -> None:
    units = image / "etc/systemd/system"
    install(job(image, "systemd"), one, "1")
    (units / "agent.service.d/override.conf").write_text("[Service]\nNice=5\n")  # systemctl edit agent
    before = tree(image)
    own = job(image)
    own.service = msgspec.structs.replace(own.service, prefix=Path("/home/ann/agent"))
    own.is_root = False
    install(own, one, "1")
    run(steps.uninstall(own, purge=True))
    assert tree(image) == before
    own.is_root = True  # with --init none: the service is not its
    run(steps.uninstall(own, purge=False))
    assert tree(image).keys() == {path for path in before if not path.startswith("usr/share/emissary")}
    run(steps.uninstall(job(image, "systemd"), purge=False))
    left = ["agent.service.d/override.conf"]
    assert [str(path.relative_to(units)) for path in units.rglob("*") if not path.is_dir()] == left
    assert not (image / "usr/local/bin/agent").is_symlink()
    run(steps.uninstall(job(image, "systemd"), purge=True))
    assert not (units / "agent.service.d").exists()


def test_a_purge_says_which_state_is_not_where_it_is_by_itself(image: Path, one: Path, tmp_path: Path) -> None:
    of = job(image)
    install(of, one, "1")
    of.state_dir = tmp_path / "data"
    of.state_dir.mkdir()
    said = [what for what, _ in steps.uninstall(of, purge=True)]
    assert any(what.startswith(f"the state in {tmp_path}/data stays") for what in said)
    assert of.state_dir.exists()


def test_a_file_in_the_place_of_the_link_is_left(image: Path, one: Path) -> None:
    (image / "usr/local/bin").mkdir(parents=True)
    (image / "usr/local/bin/agent").write_text("another agent")
    with pytest.raises(InstallFailed, match="usr/local/bin/agent is a file that is not ours"):
        install(job(image), one, "1")


# ---- with a service that runs: its init is a script, and the releases say what an agent would ------------------------

# An agent that runs: `RUNNING` names its version, as the init has started it; `busy` names a run.
CTL = """\
running=$(cat "$here/../../../running" 2>/dev/null) || exit 3
runs=$(cat "$here/../../../busy" 2>/dev/null)
[ "$2" != status ] || echo '{"uptime": 0.0, "version": "'"$running"'", "runs": ['"$runs"']}'
exit 0
"""
# Whoever cannot run (`dead`) does not come up.
RC_SERVICE = """\
#!/bin/sh
opt=$(dirname "$0")/image/opt
echo "$2" >>"$opt/asked"
[ -e "$opt/agent/current/lib/dead" ] && rm -f "$opt/running" && exit 0
readlink "$opt/agent/current" | sed s,releases/,, >"$opt/running"
"""

SYSTEMCTL = """\
#!/bin/sh
opt=$(dirname "$0")/image/opt
echo "$@" >>"$opt/asked"
[ "$1" != restart ] || [ ! -e "$opt/agent/current/lib/dead" ] || { echo failed >&2; exit 1; }
"""


@pytest.fixture
def live(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """An OpenRC whose rc-service is RC_SERVICE."""
    (tmp_path / "rc-service").write_text(RC_SERVICE)
    (tmp_path / "rc-service").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(Service, "is_live", True)
    for name, value in {"READY_S": 0.2, "READY_LOOK_S": 0.01, "SLOT_S": 0.2, "SLOT_LOOK_S": 0.01}.items():
        monkeypatch.setattr(steps, name, value)
    return job(image, "openrc")


def of_version(tmp_path: Path, version: str, **files: str) -> Path:
    return make_release(tmp_path / f"r{version}", version, ctl=CTL, **files)


def test_the_service_is_restarted_and_answers_as_the_new_one(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    assert live.state == "TRIAL"
    install(live, of_version(tmp_path, "2"), "2")
    assert (image / "opt/running").read_text() == "2\n"
    assert (image / "opt/asked").read_text() == "restart\nrestart\n"


def test_a_release_that_does_not_come_up_is_gone_again(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    confirm(image)
    with pytest.raises(
        InstallFailed, match=r"2 does not come up, 1 runs again: 2 is not READY after 0 s.* See /var/log"
    ):
        install(live, of_version(tmp_path, "2", dead=""), "2")
    assert (image / "opt/running").read_text() == "1\n"
    assert (pointed(image / "opt/agent/current"), read_pending(image / "opt/agent")) == ("1", None)


def test_when_the_one_before_does_not_come_up_either_both_are_named(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    confirm(image)
    (image / "opt/agent/releases/1/lib/dead").touch()  # as with a port that another has taken
    why = r"2 does not come up, and 1 neither: 2 is not READY after 0 s.*; 1 is not READY after 0 s.* See /var/log"
    with pytest.raises(InstallFailed, match=why):
        install(live, of_version(tmp_path, "2", dead=""), "2")
    assert pointed(image / "opt/agent/current") == "1"


def test_systemd_is_asked_to_read_its_files_and_says_itself_whether_it_came_up(
    live: Job, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)
    install(job(image, "systemd"), of_version(tmp_path, "1"), "1")
    assert (image / "opt/asked").read_text() == "daemon-reload\nrestart agent.service\n"
    with pytest.raises(
        InstallFailed, match=r"2 does not come up, 1 runs again: .* ended with 1: failed. See journalctl"
    ):
        install(job(image, "systemd"), of_version(tmp_path, "2", dead=""), "2")
    assert pointed(image / "opt/agent/current") == "1"
    run(steps.uninstall(job(image, "systemd"), purge=False))
    assert (image / "opt/asked").read_text().splitlines()[-2:] == ["stop agent.service", "daemon-reload"]


def test_a_service_that_is_not_to_be_started_is_left_and_said(live: Job, image: Path, tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)
    of = job(image, "systemd")
    of.starts = False
    assert install(of, of_version(tmp_path, "1"), "1")[-1].startswith("the service is left as it is")
    assert not (image / "opt/asked").exists()  # systemd is not what this machine started with
    (image / "run/systemd/system").mkdir(parents=True)
    install(of, of_version(tmp_path, "2"), "2")
    assert (image / "opt/asked").read_text() == "daemon-reload\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_state_of_another_user_is_given_to_the_services_user(image: Path, one: Path, tmp_path: Path) -> None:
    (image / "etc/passwd").write_text("agent:x:4321:4321::/:/bin/false\n")
    (image / "var/lib/agent/runs/r-1").mkdir(parents=True)
    (image / "var/lib/agent/runs/r-1/result.json").touch()
    (tmp_path / "elsewhere").touch()
    (image / "var/lib/agent/runs/link").symlink_to(tmp_path / "elsewhere")
    install(job(image, "sysv", "dynamic"), one, "1")
    assert {path.lstat().st_uid for path in (image / "var/lib/agent").rglob("*")} == {4321}
    assert (image / "etc/agent/token").stat().st_uid == 4321
    assert (tmp_path / "elsewhere").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_state_of_a_dynamic_user_is_left_to_systemd(image: Path, one: Path) -> None:
    (image / "etc/passwd").write_text("tester:x:4321:4321::/:/bin/false\n")
    (image / "var/lib/private/agent").mkdir(parents=True)
    (image / "var/lib/private/agent/store.db").touch()
    (image / "var/lib/agent").symlink_to("private/agent")
    install(job(image, "systemd", "tester"), one, "1")
    # It gives away what is in a folder only where the folder is another's.
    assert {path.stat().st_uid for path in (image / "var/lib/private").rglob("*")} == {os.getuid()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_secrets_that_the_settings_name_are_given_to_a_user_who_is_not_handed_them(image: Path, one: Path) -> None:
    (image / "etc/passwd").write_text("agent:x:4321:4321::/:/bin/false\n")
    etc = image / "etc/agent"
    (etc / "secrets").mkdir(parents=True, mode=0o700)
    for name in ("lab.token", "secrets/web", "cert.pem", "other", "../shadow"):
        (etc / name).touch(0o600)
    (etc / "cert.pem").chmod(0o644)
    needs = Needs(credentials=("token", "lab.token", "cert.pem", "../shadow", "/etc/not-there"), secrets="secrets")
    of = job(image, "sysv", "dynamic")
    of.service = msgspec.structs.replace(of.service, needs=needs)
    done = install(of, one, "1")
    assert f"{etc}/lab.token to the user agent" in done
    given = {str(path.relative_to(etc)) for path in etc.rglob("*") if path.stat().st_uid == 4321}
    assert given == {"token", "lab.token", "secrets", "secrets/web"}
    assert (image / "etc/shadow").stat().st_uid == 0
    (etc / "secrets/later").touch(0o600)
    install(of, one, "1")
    assert (etc / "secrets/later").stat().st_uid == 4321


def test_a_first_release_that_does_not_come_up_stays_and_is_said(live: Job, image: Path, tmp_path: Path) -> None:
    with pytest.raises(InstallFailed, match=r"1 is not READY after 0 s, it says: nothing. See /var/log/agent.log"):
        install(live, of_version(tmp_path, "1", dead=""), "1")
    assert live.state == "STARTED"


def test_a_running_suite_is_waited_for_unless_now(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    (image / "opt/busy").write_text('{"run": "r-1"}')
    two = of_version(tmp_path, "2")
    with pytest.raises(InstallFailed, match=r"r-1 still runs after 0 s; the release is placed, and not started"):
        install(live, two, "2")
    assert (live.state, pointed(image / "opt/agent/current")) == ("PLACED", "1")
    live.now = True
    install(live, two, "2")
    assert pointed(image / "opt/agent/current") == "2"


@contextmanager
def agent_with(state: Path, *runs: str) -> Iterator[None]:
    """An agent has the state directory, with these runs under way."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock, closing(sqlite3.connect(state / "store.db")) as db:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with db:
            db.execute("CREATE TABLE kept(run TEXT PRIMARY KEY) WITHOUT ROWID")
            db.executemany("INSERT INTO kept VALUES(?)", [(run,) for run in runs])
        yield


@pytest.mark.parametrize("code", [1, 3])  # it refuses the token; it is not there where the settings say now
def test_an_agent_that_cannot_be_asked_has_its_runs_in_its_store(
    live: Job, image: Path, tmp_path: Path, code: int
) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    (image / "opt/agent/releases/1/lib/ctl").write_text(f"echo 'unauthorized: no such token' >&2; exit {code}")
    two = of_version(tmp_path, "2")
    with agent_with(live.state_dir, "r-7"), pytest.raises(InstallFailed, match="r-7 still runs after 0 s"):
        install(live, two, "2")
    assert pointed(image / "opt/agent/current") == "1"
    (live.state_dir / "store.db").write_text("no database, but a long enough text to be looked at")
    with (live.state_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        why = rf"\(pid {os.getpid()}\) does not say whether a suite runs: unauthorized: .*not a database\)\. Use --now"
        with pytest.raises(InstallFailed, match=why):
            install(live, two, "2")
    (live.state_dir / "store.db").unlink()
    with agent_with(live.state_dir):
        install(live, two, "2")
    assert pointed(image / "opt/agent/current") == "2"


def test_what_an_agent_has_left_that_does_not_run_is_not_waited_for(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    with agent_with(live.state_dir, "r-7"):
        pass
    (image / "opt/running").unlink()
    install(live, of_version(tmp_path, "2"), "2")
    assert pointed(image / "opt/agent/current") == "2"


def test_removing_stops_the_service_first(live: Job, image: Path, tmp_path: Path) -> None:
    install(live, of_version(tmp_path, "1"), "1")
    run(steps.uninstall(live, purge=True))
    assert (image / "opt/asked").read_text() == "restart\nstop\n"


def test_the_trial_is_written_for_the_agent_to_read(image: Path, one: Path) -> None:
    install(job(image), one, "1")
    pending = json.loads((image / "opt/agent/pending.json").read_text())
    assert pending == {
        "id": pending["id"],
        "version": "1",
        "previous": None,
        "confirm": f"{image}/var/lib/agent/confirmed",
        "starts": 0,
        "ended": 0,
    }
