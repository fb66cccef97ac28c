"""Rule files: what is read, and what is said of what cannot be."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import toml
from agent.logs import rules
from agent.logs.messages import Context, Multiline, Rate
from agent.logs.regex import Matcher
from agent.logs.rules import RuleErrors, RuleSet

SHEET = r"""
version = 1

[[rule]]
id = "hdfs-write"
regex = '''writeBlock (?<block>blk_-?\d+) received exception (?<ex>\S+)'''
severity = "error"
class = "hdfs.write"
files = ["/var/log/hadoop/*.log"]
utf = false
rate = { burst = 20, per_s = 5 }
multiline = { start = '^\d{4}-', continuation = '^(\s+at |Caused by:)', max_lines = 200, max_bytes = 65536, wait_s = 2 }

[rule.context]
before = 5
after = 3
until = 'Receiving block (?<block>blk_-?\d+)'
same = ["block"]
lines = "same"
max_lines = 500
max_bytes = 65536
wait_s = 2
"""


def read(*texts: str) -> RuleSet:
    return rules.from_documents([(f"{i}.toml", toml.parse(text)) for i, text in enumerate(texts)])


def errors(*texts: str) -> list[str]:
    with pytest.raises(RuleErrors) as raised:
        read(*texts)
    return str(raised.value).splitlines()


def rule(more: str = "", *, id: str = "a", regex: str = "error") -> str:
    return f"version = 1\n[[rule]]\nid = \"{id}\"\nregex = '''{regex}'''\n{more}\n"


def test_the_example_of_the_sheet() -> None:
    (only,) = read(SHEET).rules
    assert (only.spec.id, only.spec.severity, only.spec.class_) == ("hdfs-write", "error", "hdfs.write")
    assert only.regex.groups == ("block", "ex")
    assert only.spec.context.chain == [r"Receiving block (?<block>blk_-?\d+)"]
    assert only.until[0].groups == ("block",)
    assert only.start
    assert only.continuation
    assert only.clauses


def test_the_defaults() -> None:
    (only,) = read(rule("[rule.multiline]\nstart = 'a'\ncontinuation = 'b'")).rules
    assert (only.spec.severity, only.spec.class_, only.spec.files, only.spec.utf) == ("warning", None, [], False)
    assert only.spec.rate == Rate(burst=20, per_s=5)
    assert only.spec.context == Context(before=0, after=0, max_lines=200, max_bytes=65_536, wait_s=2)
    assert only.spec.multiline == Multiline(start="a", continuation="b", max_lines=200, max_bytes=65_536, wait_s=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0.toml:1: version: is missing. Add version = 1."),
        ("version = 2", "0.toml:1: version: is not one that this agent reads. Write version = 1."),
        ("version = 1\nrules = 3", "0.toml:2: rules: unknown key. Did you mean rule?"),
        ("version = 1\nrule = 3", "0.toml:2: rule: is not an array of tables. Begin each rule with [[rule]]."),
        ("version = 1\nrule = [3]", "0.toml:2: rule[0]: expected a table, got the number 3."),
        ("version = 1\n[[rule]]\nregex = 'x'", "0.toml:2: rule[0].id: is missing. Add it: text."),
        (rule(id="a b"), '0.toml:3: rule[a b].id: text "a b" does not fit. Use 1 to 64 letters, digits'),
        (rule("severty = 'error'"), "0.toml:5: rule[a].severty: unknown key. Did you mean rule[a].severity?"),
        (rule("severity = 'eror'"), '0.toml:5: rule[a].severity: expected "critical", "debug"'),
        (rule(regex="ab(c"), "0.toml:4: rule[a].regex: missing closing parenthesis, at the end. Correct the regex"),
        (rule(regex=r"error\r\n"), "0.toml:4: rule[a].regex: needs a line feed, and a line is matched without"),
        (rule("[rule.context]\nuntil = '\\n'"), "0.toml:6: rule[a].context.until: needs a line feed"),
        (rule("multiline = { start = '\\n', continuation = 'x' }"), "0.toml:5: rule[a].multiline.start: needs a line"),
        (rule(regex="(?J)(?<n>a)(?<n>b)"), "0.toml:4: rule[a].regex: names two groups n. Give each its own name."),
        (rule(regex="x" * 4097), "0.toml:4: rule[a].regex: has 4097 characters, more than 4096."),
        (rule(regex="é" * 4096), "0.toml:4: rule[a].regex: longer than 4096 bytes, at byte 0"),
        (rule("files = ['*.log', '']"), "0.toml:5: rule[a].files[1]: names no file. Write"),
        (rule("files = ['.']"), "0.toml:5: rule[a].files[0]: names no file. Write"),
        (rule("rate = { burst = 0 }"), "0.toml:5: rule[a].rate.burst: 0 is less than 1."),
        (rule("[rule.context]\nuntil = ['ok', '(']"), "0.toml:6: rule[a].context.until[1]: missing closing"),
        (rule("[rule.context]\nsame = ['n']"), "0.toml:6: rule[a].context.same[0]: n is a group of neither regex nor"),
        (rule("context.same = ['n']", regex="(?<n>x)"), "0.toml:5: rule[a].context.same[0]: n is a group of regex"),
        (rule("context.lines = 'same'"), '0.toml:5: rule[a].context.lines: "same" needs captures to compare.'),
        (rule("multiline.start = 'a'"), "0.toml:5: rule[a].multiline.continuation: is missing."),
    ],
)  # fmt: skip
def test_an_error_names_file_line_and_rule(text: str, message: str) -> None:
    (found,) = errors(text)
    assert found.startswith(message)


def test_all_errors_of_all_files_are_told_and_nothing_is_used() -> None:
    bad = rule("files = 3") + "[[rule]]\nid = 'b'\nregex = '('\n"
    assert [line.split(": ")[1] for line in errors(bad, rule("utf = 1", id="c"))] == [
        *("rule[a].files", "rule[b].regex", "rule[c].utf"),
    ]


def test_an_id_stands_for_one_rule_in_all_files() -> None:
    assert errors(rule(), rule()) == ["1.toml:3: rule[a].id: is that of the rule at 0.toml:2 too. Give each its own."]


def test_a_chain_may_bind_a_capture_on_its_way() -> None:
    text = rule("context.until = ['(?<n>a)(?<m>b)', '(?<m>c)']\ncontext.same = ['n', 'm']", regex="(?<n>x)")
    assert len(read(text).rules[0].until) == 2


def test_rules_over_a_link_have_no_lines() -> None:
    assert len(rules.from_tables("watch_log", [{"id": "x", "regex": "panic"}]).rules) == 1
    with pytest.raises(RuleErrors, match=r"^watch_log: \[x\].regex: missing closing parenthesis"):
        rules.from_tables("watch_log", [{"id": "x", "regex": "("}])


def test_slow_rules_are_named() -> None:
    assert read(rule(), rule(id="b", regex=r"\d+")).slow == ["b"]


@pytest.mark.parametrize(
    ("files", "path", "applies"),
    [
        ([], "/var/log/x", True),
        (["/var/log/*.log"], "/var/log/a.log", True),
        (["/var/log/*.log"], "/var/log/hadoop/a.log", False),
        (["/opt/x", "*.log"], "/srv/a.log", True),
        (["app/*.log"], "/srv/app/a.log", True),
        (["app/*.log"], "/srv/app/b/a.log", False),
        (["/var/**/*.log"], "/var/a.log", True),
        (["/var/**/*.log"], "/var/log/app/a.log", True),
        (["/var/**/*.log"], "/srv/var/a.log", False),
        (["/var/**/x/**/*.log"], "/var/a/x/b/x/c/d.log", True),
        (["/var/**"], "/var/log/a", True),
        (["**"], "journal:", True),
        (["journal:"], "journal:", True),
        (["/".join(["**", "a"] * 40)], "/a" * 60 + "/b", False),
        (["/A.log"], "/a.log", False),
    ],
)
def test_a_rule_is_for_its_files(files: list[str], path: str, applies: bool) -> None:
    (only,) = read(rule(f"files = {files}")).rules
    assert only.applies_to(path) == applies


def test_what_does_not_apply_to_a_file_is_masked() -> None:
    several = read(rule("files = ['*.log']"), rule(id="b"), rule(id="c"))
    assert several.mask("/var/log/messages") == b"\1\0\0"
    assert several.mask("/x.log") == b"\0\0\0"


def test_more_rules_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_RULES", 1)
    assert errors(rule(), rule(id="b")) == ["1.toml:2: rule[0]: is one more than 1 rules. Leave some out."]


@given(st.text(max_size=80))
def test_any_text_is_a_rule_set_or_an_error(text: str) -> None:
    try:
        document = toml.parse(rule(regex=text.replace("'", "")))
    except toml.TomlError:
        return
    try:
        found = rules.from_documents([("x", document)]).rules
    except RuleErrors as err:
        found, lines = (), [error.line for error in err.errors]
        assert all(lines)
    assert len(found) <= 1


def test_files_are_read_by_the_reader_of_all_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(rule())
    assert len(rules.from_documents([(str(path), toml.read(path))]).rules) == 1


def test_a_set_of_the_bundle_is_found_by_name_unless_the_settings_have_one(tmp_path: Path) -> None:
    own = tmp_path / "kernel.toml"
    assert rules.find_set("kernel", [own]) == [own]
    assert rules.find_set("kernel", [tmp_path / "others.toml"]) == [rules.BUNDLED / "kernel.toml"]
    assert rules.find_set("../kernel", []) == rules.find_set("no-such", []) == []


# A line as the kernel writes it, and the rule of the bundle that tells of it.
KERNEL = [
    ("kernel-panic", "Kernel panic - not syncing: Fatal exception in interrupt"),
    ("kernel-oops", "BUG: unable to handle page fault for address: ffffb0e2c0a00000"),
    ("kernel-oops", "Unable to handle kernel NULL pointer dereference at virtual address 0000000000000008"),
    ("kernel-bug", "kernel BUG at mm/slub.c:379!"),
    ("kernel-mce", "mce: [Hardware Error]: CPU 3: Machine Check: 0 Bank 8: cc00008000010090"),
    ("kernel-aer", "pcieport 0000:00:1c.0: AER: Corrected error received: 0000:01:00.0"),
    ("kernel-hung-task", "INFO: task kworker/u8:2:1043 blocked for more than 120 seconds."),
    ("kernel-lockup", "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [stress:2411]"),
    ("kernel-lockup", "rcu: INFO: rcu_sched self-detected stall on CPU"),
    ("kernel-oom", "Out of memory: Killed process 2411 (java) total-vm:9321212kB, anon-rss:7820012kB"),
    ("kernel-cgroup-oom", "Memory cgroup out of memory: Killed process 99 (node) total-vm:1212kB"),
    ("kernel-io-error", "blk_update_request: I/O error, dev sda, sector 2048 op 0x0:(READ) flags 0x0"),
    ("kernel-io-error", "Buffer I/O error on dev sdb1, logical block 0, async page read"),
    ("kernel-fs-error", "EXT4-fs error (device sda1): ext4_find_entry:1446: inode #2: comm ls: reading directory"),
    ("clocksource-unstable", "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable"),
    ("clocksource-jump", "hrtimer: interrupt took 2112341 ns"),
    ("mmc-removed", "mmc0: card 59b4 removed"),
    ("pi-thermal", "thermal thermal_zone0: critical temperature reached, shutting down"),
    ("tegra-throttled", "soctherm: OC ALARM 0x00000001"),
    ("mmc-error", "mmcblk0: error -110 sending status command, retrying"),
    ("mmc-error", "mmc0: Timeout waiting for hardware interrupt."),
    ("pi-under-voltage", "hwmon hwmon1: Undervoltage detected!"),
    ("pi-under-voltage", "Under-voltage detected! (0x00050005)"),
    ("pi-voltage-normal", "hwmon hwmon1: Voltage normalised"),
    ("edac-corrected", "EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0 (channel:1 slot:0)"),
    ("edac-uncorrected", "EDAC MC1: 1 UE memory scrubbing error on CPU_SrcID#1_MC#0_Chan#0_DIMM#0"),
    ("megaraid-event", "megaraid_sas 0000:03:00.0: 6528 (579892934s/0x0002/FATAL) - Unrecoverable medium error"),
    ("megaraid-reset", "megaraid_sas 0000:18:00.0: resetting fusion adapter scsi0."),
    ("tegra-mc", "tegra-mc 2c00000.memory-controller: gpusrd: secure read @0x00: EMEM address decode error"),
    ("tegra-nvgpu", "nvgpu: 17000000.gv11b gv11b_fb_mmu_fault_info_dump:260 [ERR] [MMU FAULT] mmu_fault engine"),
]


@pytest.mark.parametrize(("id", "line"), KERNEL)
def test_the_bundled_rules_tell_of_what_the_kernel_writes(id: str, line: str) -> None:
    bundled = rules.read_files(sorted(rules.BUNDLED.glob("*.toml")))
    matcher = Matcher()
    logged = f"Nov 22 04:10:01 lab-07 kernel: [ 1043.120034] {line}".encode()
    assert [rule.spec.id for rule in bundled.rules if matcher.match(rule.regex, logged) is not None] == [id]
    assert not bundled.slow
    assert {rule.spec.id for rule in bundled.rules} == {id for id, _ in KERNEL}
