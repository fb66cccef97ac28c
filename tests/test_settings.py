"""The hardware profile below the settings: which is taken, what it may not break, and what is told of it."""

import os
from pathlib import Path

import pytest

from agent import settings
from agent.core import facts
from agent.core.config import ConfigErrors
from agent.core.token import TokenUnusable, read_token
from agent.logs.settings import LogWatch
from agent.settings import Given, load_settings, survey


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of profiles, of a machine with arch "x"."""
    folder = tmp_path / "hw-profiles"
    folder.mkdir()
    monkeypatch.setattr(settings, "FOLDERS", (folder,))
    monkeypatch.setattr(facts, "detect", lambda: {"arch": "x", "devices": ("/dev/ttyUSB0",)})
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_profile_lies_below_the_files_and_its_name_is_known(profiles: Path, tmp_path: Path) -> None:
    write(
        profiles / "board.toml",
        """\
name = "board"
match.arch = "x"
[settings]
suites = { slots = 4, keep_runs = 7 }
[[settings.logs.watch]]
name = "kernel"
path = "/var/log/kern.log"
[[when]]
match.devices = "/dev/ttyUSB*"
settings.labels.serial = "usb"
""",
    )
    own = write(tmp_path / "agent.toml", '[suites]\nslots = 2\n[[logs.watch]]\nname = "kernel"\nenabled = false\n')
    effective = load_settings(Given((own,)))
    assert effective.profile == "board"
    assert (effective.settings.suites.slots, effective.settings.suites.keep_runs) == (2, 7)
    assert effective.settings.labels == {"serial": "usb"}
    assert effective.settings.logs.watch == ()
    assert effective.origins["suites.slots"].text == f"{own}:2"
    assert effective.origins["suites.slots"].over == (("hw-profile board", 4),)
    assert effective.origins["labels.serial"].text == "hw-profile board"
    assert survey(Given((own,)))[1].settings == {"labels.serial": "usb", "suites.keep_runs": 7}


def test_without_a_profile_that_fits_the_defaults_hold(profiles: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "agent.toml", "")
    assert (load_settings(Given((own,))).profile, survey(Given((own,)))[1].profile) == ("", None)


def test_a_refused_profile_is_a_warning_and_the_generic_one_is_used(profiles: Path, tmp_path: Path) -> None:
    write(
        profiles / "board.toml", 'name = "board"\nmatch.arch = "x"\nmatch.devices = "*"\nsettings.mimir.url = "ws://x"'
    )
    write(profiles / "generic.toml", 'name = "generic"\nmatch.arch = "x"')
    effective = load_settings(Given((write(tmp_path / "agent.toml", ""),)))
    assert effective.profile == "generic"
    (warning,) = effective.warnings
    assert warning.startswith(f"{profiles}/board.toml:4: mimir: a hardware profile may not set it")


def test_the_settings_watch_another_thing_by_the_name_of_a_profiles_watch(profiles: Path, tmp_path: Path) -> None:
    watch = '[[settings.logs.watch]]\nname = "kernel"\npath = "/var/log/kern.log"\nrules = ["kernel"]\n'
    write(profiles / "board.toml", f'name = "board"\nmatch.arch = "x"\nsettings.timeout_factor = 2\n{watch}')
    own = write(tmp_path / "agent.toml", '[[logs.watch]]\nname = "kernel"\nkmsg = true\n')
    effective = load_settings(Given((own,)))
    assert (effective.profile, effective.settings.timeout_factor, effective.warnings) == ("board", 2, [])
    assert effective.settings.logs.watch == (LogWatch(name="kernel", kmsg=True, rules=("kernel",)),)
    assert effective.origins["logs.watch[kernel].kmsg"].text == f"{own}:3"


def test_a_profile_that_names_rules_nobody_has_is_left_out(profiles: Path, tmp_path: Path) -> None:
    watch = '[[settings.logs.watch]]\nname = "kernel"\npath = "/l"\nrules = ["kernel", "bench"]\n'
    write(profiles / "board.toml", f'name = "board"\nmatch.arch = "x"\n{watch}')
    own = write(tmp_path / "agent.toml", f'logs.rules = ["{tmp_path}/rules/*.toml"]\n')
    effective = load_settings(Given((own,)))
    assert effective.profile == ""
    (warning,) = effective.warnings
    assert warning.startswith("hardware profile board does not go with the settings and is not used: ")
    assert "hw-profile board: logs.watch[kernel].rules: no rule set is called 'bench'" in warning
    assert survey(Given((own,)))[1].warnings == (warning,)
    (tmp_path / "rules").mkdir()
    write(tmp_path / "rules/bench.toml", "")
    assert load_settings(Given((own,))).profile == "board"


@pytest.mark.parametrize(("by", "origin"), [("file", "agent.toml:1"), ("flag", "--profile"), ("env", "AGENT_PROFILE")])
def test_a_profile_that_is_asked_for_must_be_there_and_good(
    profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, origin: str
) -> None:
    write(profiles / "board.toml", 'name = "board"\nsettings.suites.slots = 0')
    own = write(tmp_path / "agent.toml", 'profile = "board"\n' if by == "file" else "")
    if by == "env":
        monkeypatch.setenv("AGENT_PROFILE", "board")
    with pytest.raises(ConfigErrors) as broken:
        load_settings(Given((own,), "board" if by == "flag" else None))
    bad, missing = map(str, broken.value.errors)
    assert bad == f"{profiles}/board.toml:2: suites.slots: 0 is less than 1. Use a number from 1 to 64."
    assert missing.removeprefix(f"{tmp_path}/").startswith(
        f"{origin}: profile: the hardware profile 'board' has errors."
    )
    write(profiles / "board.toml", 'name = "board"\nsettings.suites.slots = 3')
    effective = load_settings(Given((own,), "board" if by == "flag" else None))
    assert (effective.profile, effective.settings.suites.slots) == ("board", 3)


def test_settings_with_errors_are_told_without_a_profile(profiles: Path, tmp_path: Path) -> None:
    write(profiles / "board.toml", 'name = "board"\nmatch.arch = "x"\nsettings.suites.slots = 3')
    own = write(tmp_path / "agent.toml", "[suites]\nslots = 99\nslotz = 1\n")
    with pytest.raises(ConfigErrors) as broken:
        load_settings(Given((own,)))
    assert [error.line for error in broken.value.errors] == [2, 3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[control]\nlisten = ["127.0.0.1:65536"]', 'control.listen[0]: text "127.0.0.1:65536" does not fit.'),
        (
            '[coverage]\nagent_id = "a/b"',
            'coverage.agent_id: text "a/b" does not fit. Use up to 128 characters, no slash',
        ),
        ('[lab]\nlisten = "127.0.0.1:99999"', 'lab.listen: text "127.0.0.1:99999" does not fit. Use HOST:PORT, or'),
        ('[control]\norigins = ["lab.example"]', 'control.origins[0]: text "lab.example" does not fit. Use http(s)://'),
        ('[eman]\nurl = "hub.lab:9001"', 'eman.url: text "hub.lab:9001" does not fit. Use http(s)://HOST:9001/'),
        ("[eman.hub]\nrate = 10", "eman.hub.rate: 10 is less than 100."),
        (
            '[control]\nlisten = ["::1:13172"]',
            'control.listen[0]: text "::1:13172" does not fit. Use HOST:PORT, or [IPV6]:',
        ),
        ('[log]\nto = "stderr"', 'log.to: text "stderr" does not fit. Use "auto" or an absolute path.'),
        ("[log]\nmax = 0", "log.max: 0 is less than 1024. Use a size that is at least 1KiB."),
        ("[state]\nreserve = 0", "state.reserve: 0 is less than 4096. Use a size from 4KiB to 1GiB."),
        ('[state]\nreserve = "2GiB"', "state.reserve: 2GiB is more than 1GiB."),
        ("[state]\njournal_max = -1", "state.journal_max: -1 is less than 4096."),
        ('[labels]\n"" = true', 'labels."": text "" does not fit. Use a name of 1 to 128 characters without =.'),
        ('[labels]\n"a=b" = "c"', 'labels."a=b": text "a=b" does not fit. Use a name of 1 to 128'),
        ('[suites]\nroots = ["suites"]', 'suites.roots[0]: text "suites" does not fit. Use an absolute path.'),
    ],
)
def test_what_could_never_work_is_told_with_its_line(profiles: Path, tmp_path: Path, text: str, told: str) -> None:
    own = write(tmp_path / "agent.toml", text)
    with pytest.raises(ConfigErrors) as broken:
        load_settings(Given((own,)))
    (error,) = broken.value.errors
    assert str(error).startswith(f"{own}:2: {told}")


MONITOR = '[[monitors.monitor]]\nid = "m"\ncommand = ["x"]\nsteps = ["A"]\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[eman]\nname = "connect"',
            "eman.name: 'connect' cannot be a service's name: 'connect.run_suite' is",
        ),
        ('[eman]\nemit = ["TestFnished"]', "eman.emit: 'TestFnished' is no kind of event."),
        ('[eman]\nkey_file = "a"\nsalt_file = "b"', "eman: key_file and salt_file are two ways to the one key."),
        ('[mimir]\nurl = "ws://lab:99999"', "mimir.url: 'ws://lab:99999' cannot be reached: its port is no number"),
        ('[seneschal]\nurl = "ws://a:pw@lab"', "seneschal.url: 'ws://***@lab' cannot be reached: it has a user name"),
        ('[eman]\nurl = "http://[::1"', "eman.url: 'http://[::1' cannot be reached: its host is neither a name nor"),
        ('[coverage]\nadmin = "http://lab"', "coverage.admin: 'http://lab' cannot be reached: it does not begin with"),
        ('[coverage]\nheaders = { "X Y" = "a" }', "coverage.headers: 'X Y' is no header that can be added."),
        ('[coverage]\nheaders = { NeedSync = "true" }', "coverage.headers: 'NeedSync' is no header that can be added."),
        ('[coverage]\nheaders = { X = "a\\nb" }', "coverage.headers: the value of X cannot be sent. Use ASCII,"),
        ('[coverage]\njacoco = ["lab:99999"]', "coverage.jacoco: 'lab:99999' cannot be reached: its port is no number"),
        (
            '[polarize]\nurl = "lab.example"',
            "polarize.url: 'lab.example' is no address for mode polarize-http: it",
        ),
        ('[cibus]\nurl = "stomp://lab"', "cibus.url: 'stomp://lab' is no address of a broker: host and port are"),
        (
            f"{MONITOR}config = {{ a = [{{ b = 1979-05-27 }}] }}",
            "monitors.monitor[m].config: JSON has no date like 1979-",
        ),
        (f"{MONITOR}config.at = 07:32:00", "monitors.monitor[m].config: JSON has no time like 07:32:00. Write it in"),
        (f'{MONITOR}env = {{ "A=B" = "" }}', "monitors.monitor[m].env: 'A=B' is no name of a variable."),
        (f'{MONITOR}env = {{ A = "\\u0000" }}', "monitors.monitor[m]: command or env has a NUL character."),
        ('[eman.hub]\ntls = { key = "k" }', "eman.hub.tls: key and client_ca mean nothing without cert."),
    ],
)
def test_what_no_type_can_say_is_told_with_its_key_or_table(
    profiles: Path, tmp_path: Path, text: str, told: str
) -> None:
    own = write(tmp_path / "agent.toml", text)
    with pytest.raises(ConfigErrors) as broken:
        load_settings(Given((own,)))
    (error,) = broken.value.errors
    assert told in str(error)


def test_ports_and_origins_that_work_are_taken(profiles: Path, tmp_path: Path) -> None:
    text = '[control]\nlisten = ["[::1]:65535", "localhost:0"]\norigins = ["https://lab.example:8443", "http://[::1]"]'
    control = load_settings(Given((write(tmp_path / "agent.toml", text),))).settings.control
    assert (len(control.listen), len(control.origins)) == (2, 2)


def test_a_credential_that_cannot_be_looked_at_is_meant_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = tmp_path / ("n" * 300)  # as a folder of another user would be, for root too
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(unseen))
    assert settings.find("token", tmp_path) == unseen / "token"
    with pytest.raises(TokenUnusable, match="/token: File name too long"):
        read_token(settings.find("token", tmp_path))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "none"))
    assert settings.find("token-of-a-test", tmp_path) == tmp_path / "token-of-a-test"


@pytest.mark.parametrize("handed_over", ["", "/run/credentials/agent.service"])
def test_a_file_that_is_nowhere_is_named_where_it_is_to_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_over: str
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", handed_over)
    name = f"token-of-test-{os.getpid()}"
    machines = Path("/var/lib/agent")
    assert settings.find(name, machines) == Path("/etc/agent") / name
    assert settings.find(f"/srv/{name}", machines) == Path("/srv") / name
    assert settings.find(name, tmp_path) == tmp_path / name
    monkeypatch.setattr(settings, "DEFAULT_TOKEN", name)
    assert settings.find(name, machines) == machines / name


@pytest.mark.parametrize("table", ["tls", "seneschal", "mimir", "polarize", "cibus"])
def test_a_key_without_its_certificate_is_named(table: str, tmp_path: Path) -> None:
    own = write(tmp_path / "agent.toml", f'[{table}]\nkey_file = "key.pem"\n')
    with pytest.raises(ConfigErrors) as broken:
        load_settings(Given((own,)))
    assert str(broken.value) == (
        f"{own}:1: {table}: key_file means nothing without cert_file. Set cert_file too, or neither."
    )
    write(own, f'[{table}]\nkey_file = "key.pem"\ncert_file = "cert.pem"\n')
    load_settings(Given((own,)))
