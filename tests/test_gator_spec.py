"""Specs: what is read, what is refused and where, and back to YAML."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import DocumentError
from agent.gator import spec as specs
from agent.gator.spec import Cores, Group, Job, License, Memory, Size

NIGHTLY = """\
!JobGroup
ident: nightly
env: { MODE: fast }
cwd: /work
jobs:
  - !Job
    ident: build
    command: make
    args: [all, 3, yes, 1.50]
    env: { JOBS: 8 }
    resources: [!Cores [2], !Memory [1.5, GB], !License [sim], !License { name: lint, count: 2 }]
    timeout: 60
    retries: 2
  - !JobArray
    ident: tests
    repeats: 3
    on_pass: [build]
    on_done: []
    jobs:
      - !Job { command: ./test, args: ["$GATOR_ARRAY_INDEX"] }
"""


def test_a_spec_with_everything_is_read() -> None:
    spec = specs.load(NIGHTLY, "nightly.yaml")
    build = Job(
        ident="build",
        command="make",
        args=("all", "3", "yes", "1.50"),  # as written: a command line is text
        env={"JOBS": "8"},
        resources=(Cores(2), Memory(1.5, "GB"), License("sim"), License("lint", 2)),
        timeout=60,
        retries=2,
    )
    test = Job(ident="T0", command="./test", args=("$GATOR_ARRAY_INDEX",))
    tests = Group(ident="tests", repeats=3, on_pass=("build",), jobs=(test,))
    assert spec.root == Group(ident="nightly", env={"MODE": "fast"}, cwd="/work", jobs=(build, tests))
    assert spec.lines[("nightly", "tests", "T0")] == 20
    assert specs.size(spec.root) == Size(jobs=4, tiers=2)
    assert specs.cores(build) == 2
    assert specs.memory(build) == 1_500_000_000
    assert specs.licenses(build) == {"sim": 1, "lint": 2}


def test_what_is_written_back_is_the_same() -> None:
    root = specs.load(NIGHTLY).root
    assert specs.load(specs.dump(root)).root == root
    oldest = specs.dump(root, named="id", ours=False)
    assert "ident" not in oldest
    assert "timeout" not in oldest
    assert specs.load(oldest).root.ident == "nightly"


def test_children_inherit_and_arrays_are_expanded() -> None:
    root = specs.load(NIGHTLY).root
    assert isinstance(root, Group)
    build, tests = (specs.child_spec(root, child) for child in specs.children(root))
    assert (build.env, build.cwd) == ({"MODE": "fast", "JOBS": "8"}, "/work")
    assert isinstance(tests, Group)
    children = list(specs.children(tests))
    assert [(child.ident, child.folder) for child in children] == [("T0_0", "T0/0"), ("T0_1", "T0/1"), ("T0_2", "T0/2")]
    second = specs.child_spec(tests, children[1])
    assert (second.ident, second.env, second.cwd) == ("T0_1", {"MODE": "fast", "GATOR_ARRAY_INDEX": "1"}, "/work")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$A-${A}", "1-1"),
        ("${B:-x y}", "x y"),
        ("${EMPTY:-x}", "x"),
        ("[$B]", "[]"),
        (r"\$A", "$A"),
        ("cost 5$", "cost 5$"),
    ],
)
def test_variables_are_expanded(text: str, expanded: str) -> None:
    assert specs.expand(text, {"A": "1", "EMPTY": ""}) == expanded


def test_merge_keys_and_aliases_are_understood() -> None:
    text = """\
!JobGroup
ident: g
jobs:
  - !Job &first { ident: a, command: "true", cwd: /tmp }
  - !Job { <<: *first, ident: b }
"""
    root = specs.load(text).root
    assert isinstance(root, Group)
    assert root.jobs[1] == Job(ident="b", command="true", cwd="/tmp")


def test_from_a_parent_unknown_keys_and_the_oldest_name_pass() -> None:
    text = "!Job\nid: a\nexpected_jobs: 1\ncommand: 'true'\n"
    assert specs.load(text, from_parent=True).root == Job(ident="a", command="true")


PAIR = "!JobGroup {ident: g, jobs: [!Job {ident: a, command: x},\n "

BAD = [
    ("", "s.yaml: nothing in it"),
    ("[1, 2", "s.yaml:2: no YAML"),
    ("!Job\nident: \x07", "s.yaml:2: no YAML: control characters are not allowed. Write it as UTF-8 text."),
    ("text", "s.yaml:1: column 1: expected a job or a group, got 'text' (str). Use !Job"),
    ("jobs: []", "s.yaml:1: column 1: expected a job or a group, got keys and values. Use !Job, !JobGroup or"),
    ("!Shell {ident: a}", "s.yaml:1: column 1: expected a job or a group, got the tag '!Shell'. Use !Job"),
    ("!!python/object/apply:os.system [id]", "got the tag '!!python/object/apply:os.system'"),
    ("!Job {ident: a, command: !!python/name:os.system x}", "a: column 26: command: expected text, got the tag '!!py"),
    ("!Job {ident: a, command: !!python/name:os.system [x]}", "command: expected text, got the tag '!!py"),
    ("!Job {ident: a}", "s.yaml:1: a: column 1: command is missing. Name the program to run."),
    ("!Job {ident: a, comand: y}", "the key 'comand' is not known here. Use ident, command,"),
    ("!Job {ident: a, command: x, ident: b}", "the key 'ident' is there twice"),
    ("!Job {ident: a/b, command: x}", "ident 'a/b': it has a /"),
    ("!Job {ident: .., command: x}", "ident '..': it is empty, or begins with a dot"),
    ("!Job {ident: ~, command: x}", "ident: expected text, got '~' (null)"),
    (f"!Job {{ident: {'x' * 129}, command: x}}", "it has more than 128 bytes"),
    ("!Job {ident: db.sqlite, command: x}", "ident 'db.sqlite': each layer has a file of that name"),
    ("!Job {ident: a, command: x, args: y}", "args: expected a list, got 'y' (str)"),
    ("!Job {ident: a, command: x, args: [[y]]}", "args: expected text, got a list"),
    ("!Job {ident: a, command: x, env: [y]}", "expected keys and values, got a list"),
    ("!Job {ident: a, command: x, timeout: soon}", "timeout: 'soon' is no number from 0.001 on"),
    ("!Job {ident: a, command: x, resources: [4]}", "resources: expected one, got '4' (int). Use !Cores, !Memory or"),
    ("!Job {ident: a, command: x, resources: [!Memory [4, MiB]]}", "!Memory: 'MIB' is no unit. Use KB, MB, GB or TB."),
    ("!Job {ident: a, command: x, resources: [!Cores [-1]]}", "!Cores: '-1' is no whole number from 0"),
    ("!Job {ident: a, command: x, resources: [!Cores [1], !Cores [2]]}", "the same resource twice"),
    ("!Job {ident: a, command: x, resources: [!License [l, 0]]}", "!License: '0' is no whole number from 1"),
    ("!JobArray {ident: a, repeats: -1}", "repeats: '-1' is no whole number from 0"),
    ("!JobArray {repeats: 9999, jobs: [!JobArray {repeats: 999, jobs: [!Job {command: x}]}]}", "at most 1000000"),
    ("!JobArray {repeats: 9999, jobs: [!JobArray {repeats: 999, jobs: [!JobGroup {}]}]}", "0 jobs and 9999001 tiers"),
    (f"!JobArray {{repeats: 11, jobs: [!Job {{ident: {'x' * 126}, command: x}}]}}", "and a number: it has more"),
    (f"{PAIR}!Job {{ident: a, command: x}}]}}", "s.yaml:2: g/a: column 2: the ident is taken in line 1"),
    (f"{PAIR}!Job {{ident: b, command: x, on_pass: [c]}}]}}", "g/b: column 2: on_pass: 'c' is no sibling. Use a or b."),
    (f"{PAIR}!Job {{ident: b, command: x, on_done: [b]}}]}}", "g/b: column 2: waits for itself: b -> b"),
    (f"{PAIR}!JobGroup {{ident: b, on_done: [c]}}, !JobArray {{ident: c, on_fail: [b]}}]}}", "itself: b -> c -> b"),
    ("&a !JobGroup {jobs: [*a]}", "nested deeper than 64"),
    ("[" * 70 + "]" * 70, "s.yaml:1: nested deeper than 64"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text[:40] for text, _ in BAD])
def test_a_bad_spec_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(DocumentError) as refused:
        specs.load(text, "s.yaml")
    assert said in str(refused.value)


def test_a_long_chain_is_no_cycle_until_it_is_closed() -> None:
    jobs = [f"- !Job {{ident: j{n}, command: x, on_done: [j{n + 1}]}}\n" for n in range(3000)]
    end = "- !Job {ident: j3000, command: x, on_done: [%s]}\n"
    assert specs.size(specs.load("!JobGroup\njobs:\n" + "".join(jobs) + end % "").root).jobs == 3001
    with pytest.raises(DocumentError, match=r"waits for itself: j7 -> j8 -> .* -> \(2988 others\) -> j3000 -> j7\."):
        specs.load("!JobGroup\njobs:\n" + "".join(jobs) + end % "j7")


def test_a_bomb_of_aliases_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "MAX_NODES", 5000)
    rows = [f"  - &g{n} !JobGroup {{jobs: [{', '.join([f'*g{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    text = "\n".join(["!JobGroup", "ident: r", "jobs:", "  - &g0 !JobGroup {}", *rows])
    with pytest.raises(DocumentError, match="more than 5000 values, aliases counted"):
        specs.load(text)


def test_a_spec_of_more_than_4_mib_is_refused() -> None:
    with pytest.raises(DocumentError, match="at most 4194304 are read"):
        specs.load(b"#" * (specs.MAX_SPEC + 1))


NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\0"), max_size=12)
JOBS = st.builds(
    Job,
    ident=NAMES.filter(lambda name: specs.bad_ident(name) is None),
    command=NAMES.filter(bool),
    args=st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)).map(
        tuple
    ),
    env=st.dictionaries(NAMES.filter(lambda name: name and "=" not in name and name != "<<"), NAMES, max_size=3),
    cwd=st.none() | NAMES,
    timeout=st.none() | st.floats(0.001, 1e6),
    resources=st.builds(Memory, st.floats(0, 1e6), st.sampled_from(["KB", "MB", "GB", "TB"])).map(lambda m: (m,)),
)


@given(JOBS)
def test_any_job_survives_the_way_through_yaml(job: Job) -> None:
    assert specs.load(specs.dump(job)).root == job


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_rubbish_is_refused_with_an_error_of_ours(data: bytes) -> None:
    with suppress(DocumentError):
        assert specs.load(data).root.ident
