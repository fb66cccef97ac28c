"""The command line: exit codes, where errors go, what `config` prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli import main


def test_config_check_names_every_error_with_file_line_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('ident = "lab-07"\n\n[suites]\nslots = 0\n[mimir]\nurl = "http://x"\nurll = 1\n')
    assert main(["config", "check", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:4: suites.slots: 0 is less than 1. Use a number from 1 to 64." in err
    assert f"{file}:6: mimir.url" in err
    assert f"{file}:7: mimir.urll" in err


def test_config_check_of_a_good_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("[suites]\nslots = 2\n")
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: good\n"


def test_config_check_reads_the_rules_that_the_settings_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rules = tmp_path / "agent.toml", tmp_path / "rules.toml"
    file.write_text(
        f'[logs]\nrules = ["{rules}"]\n[[logs.watch]]\nname = "a"\npath = "/l"\nrules = ["rules", "none"]\n'
    )
    rules.write_text("version = 1\n[[rule]]\nid = 'x'\nregex = '('\n[[rule]]\nid = 'y'\nregexp = 'a'\n")
    assert main(["config", "check", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        [f"{file}:6", "logs.watch[a].rules"],
        [f"{rules}:4", "rule[x].regex"],
        [f"{rules}:5", "rule[y].regex"],
        [f"{rules}:7", "rule[y].regexp"],
    ]
    file.write_text(f'[logs]\nrules = ["{rules}"]\n')
    rules.write_text("version = 1\n[[rule]]\nid = 'x'\nregex = 'word'\n[[rule]]\nid = 'y'\nregex = '\\d'\n")
    assert main(["config", "check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{file}: good\n"
    slow = rf"{re.escape(str(rules))}:5: rule\[y\]\.regex: no literal, so it runs on every line \(\d+ ns each\)\n"
    assert re.fullmatch(slow, err)


def test_config_check_takes_rule_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rules = tmp_path / "agent.toml", tmp_path / "rules.toml"
    file.write_text("[suites]\nslots = 0\n")
    rules.write_text("version = 1\n[[rule]]\nid = 'x'\nregex = '('\n")
    assert main(["config", "check", str(rules)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{rules}:4: rule[x].regex: ")
    assert main(["config", "check", str(rules), str(file)]) == 2
    assert f"{file}:2: suites.slots" in capsys.readouterr().err
    rules.write_text("version = 1\n[[rule]]\nid = 'x'\nregex = 'word'\n")
    assert main(["config", "check", str(rules)]) == 0
    assert capsys.readouterr().out == f"{rules}: good\n"


def test_config_show_tells_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("[suites]\nslots = 2\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/20-lab.toml").write_text("[suites]\nslots = 4\n")
    monkeypatch.setenv("AGENT_SUITES__KEEP_RUNS", "7")
    assert main(["config", "show", "--origin", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (slots,) = [line for line in lines if line.startswith("suites.slots")]
    assert slots.split("#")[0].strip() == "suites.slots = 4"
    assert f"{tmp_path}/conf.d/20-lab.toml:2, over {file}:2 (2)" in slots
    (keep,) = [line for line in lines if line.startswith("suites.keep_runs")]
    assert keep.endswith("# AGENT_SUITES__KEEP_RUNS")
    assert main(["config", "show", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["suites.slots"]["value"] == 4


def test_a_service_with_broken_settings_ends_with_2_at_once(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("[suites]\nslots = 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "agent", "run", "--config", str(file)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert f"{file}:2: suites.slots: 0 is less than 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unusable_state_directory_ends_with_1_and_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    file = tmp_path / "agent.toml"
    file.write_text(f'[state]\ndir = "{tmp_path}/taken"\n')
    done = subprocess.run(
        [sys.executable, "-m", "agent", "run", "--config", str(file)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "cannot be used as state directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["frobnicate"], ["run", "--no-such"], ["config"], ["config", "check"]),
        *(["eman", "hub", "--listen", "9001"], ["lab", "--listen", "127.0.0.1:99999"]),
    ],
)
def test_a_wrong_command_line_ends_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


@pytest.mark.parametrize("value", ["x", "nan", "1"])
def test_a_number_that_does_not_fit_is_told_in_words(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["logs", "evaluate", "--split", value, "some.log"])
    assert f"argument --split: '{value}' is no number from 0 to below 1" in capfd.readouterr().err


def test_a_hub_that_cannot_be_opened_safely_ends_with_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('[eman.hub]\nauth = "any"\n')
    assert main(["eman", "hub", "--listen", "0.0.0.0:0", "--config", str(file)]) == 2
    assert capfd.readouterr().err.startswith('eman.hub.auth = "any" takes every key, and 0.0.0.0:0 is not loopback.')


@pytest.mark.parametrize(
    "argv", [["lab", "--listen", "127.0.0.1:0", "--data", "lab"], ["eman", "hub", "--listen", "127.0.0.1:0"]]
)
def test_a_server_in_the_foreground_ends_with_0_when_it_is_told_to(tmp_path: Path, argv: list[str]) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'state.dir = "{tmp_path}/state"\n[eman.hub]\nauth = "any"\n')
    command = [sys.executable, "-m", "agent", *argv, "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://127.0.0.1:")
        server.terminate()
        assert server.wait(60) == 0


def test_output_to_a_closed_pipe_is_no_traceback() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    show = [sys.executable, "-m", "agent", "config", "show"]
    done = subprocess.run(show, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(theirs)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_a_hardware_profile_that_is_not_there_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--profile", "raspberry-pi-9"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "--profile: profile: no hardware profile is called 'raspberry-pi-9'. Use \"auto\", beaglebone,"
    )


def test_a_hardware_profile_that_is_asked_for_is_shown_with_what_it_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.toml").write_text('profile = "beaglebone"\n[suites]\nslots = 2\n')
    assert main(["profile", "--json", "--config", str(tmp_path / "agent.toml")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["profile"], report["forced"], report["refused"]) == ("beaglebone", True, [])
    assert report["facts"]["kernel"] == os.uname().release
    assert report["settings"]["state.journal_max"] == 32 * 2**20
    assert "suites.slots" not in report["settings"]
    assert main(["profile", "--config", str(tmp_path / "agent.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "profile  beaglebone, as asked for" in lines
    assert "  state.journal_max = 33554432" in lines
    assert main(["config", "show", "--origin", "--config", str(tmp_path / "agent.toml")]) == 0
    (slots,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("suites.slots")]
    assert slots.endswith(f"{tmp_path}/agent.toml:3, over hw-profile beaglebone (1)")


def test_who_stops_reading_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        argv = [sys.executable, "-m", "agent", "config", "show"]
        done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_the_system_refuses_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder has to be")
    (tmp_path / "state").write_text("")
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def said(*words: str) -> tuple[int, str]:
        argv = [sys.executable, "-m", "agent", *words]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert said("lab", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "state")) == (
        1,
        f"{tmp_path}/state: File exists\n",
    )
    demo = ("demo", "--suite", "agent/lab/samples/command")
    code, told = said(*demo)
    assert code == 1
    assert told == f"{tmp_path}/cache/emissary: Not a directory. Set XDG_CACHE_HOME to a folder that you may write.\n"
    environ["XDG_CACHE_HOME"] = "cache"
    assert said(*demo) == (1, "cache is no whole path of a folder. Set HOME or XDG_CACHE_HOME to one.\n")


@pytest.mark.parametrize("word", ["--version", "profile"])
def test_a_full_disk_behind_standard_output_ends_a_command_with_1(word: str) -> None:
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-X", "utf8=1", "-m", "agent", word]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "No space left on device\n")
