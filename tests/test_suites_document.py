"""agent/suites/document.py: what a document says, and each way in which one can be bad."""

import msgspec
import pytest

from agent.core.errors import DocumentError
from agent.suites.document import MAX_DOCUMENT, SuiteErrors, detect, from_tree, load
from agent.suites.messages import Limits, Polarion, Report, Requires, Source, Suite, Watch

SHEET = b"""\
id = "login"
runner = "ava"
files = ["test/**/*.js"]
setup = [["npm", "ci", "--ignore-scripts"]]
requires = { labels = ["rhel9"] }
watch = { logs = ["/var/log/secure"] }
[report.polarion]
project = "RHEL9"
cases = { "refuses a wrong password" = "RHEL9-51603" }      # by name or case
"""
SHEET_SUITE = Suite(
    id="login",
    runner="ava",
    files=("test/**/*.js",),
    setup=(("npm", "ci", "--ignore-scripts"),),
    requires=Requires(labels=("rhel9",)),
    watch=Watch(logs=("/var/log/secure",)),
    report=Report(polarion=Polarion(project="RHEL9", cases={"refuses a wrong password": "RHEL9-51603"})),
)

ALL = b"""\
id = "all"
title = "Everything"
runner = "command"
cwd = "sub/folder"
files = ["a"]
command = ["make", "check"]
args = ["-k", ""]
env = { LANG = "C", EMPTY = "" }
env_pass = ["HTTP_PROXY"]
setup = [["true"]]
teardown = [["rm", "-rf", "x"]]
min_tests = 0
coverage = true
codes = { 3 = "skipped", 0 = "passed" }
[source]
git = "https://host/repo.git"
ref = "v1.2"
depth = 5
[limits]
setup = 1
run = 2.5
stall = 0
test = 4
grace = 5
output = "1KiB"
test_output = 10
memory = "2GiB"
processes = 100
[requires]
runners = { node = ">=20.19, <23" }
disk = "10GiB"
[watch]
rules = ["kernel"]
files = ["/etc/hosts"]
[report]
mimir = false
polarize = false
[report.polarion]
title = "Nightly"
template = "T1"
lookup = "custom"
[report.polarion.properties]
testrun-type-id = "regression"
dry-run = true
custom-arch = "x86"
parameter-browser = "firefox"
"""
ALL_SUITE = Suite(
    id="all",
    title="Everything",
    runner="command",
    cwd="sub/folder",
    files=("a",),
    command=("make", "check"),
    args=("-k", ""),
    env={"LANG": "C", "EMPTY": ""},
    env_pass=("HTTP_PROXY",),
    setup=(("true",),),
    teardown=(("rm", "-rf", "x"),),
    min_tests=0,
    coverage=True,
    codes={"3": "skipped", "0": "passed"},
    source=Source(git="https://host/repo.git", ref="v1.2", depth=5),
    limits=Limits(
        setup=1, run=2.5, stall=0, test=4, grace=5, output=1024, test_output=10, memory=2 << 30, processes=100
    ),
    requires=Requires(runners={"node": ">=20.19, <23"}, disk=10 << 30),
    watch=Watch(rules=("kernel",), files=("/etc/hosts",)),
    report=Report(
        mimir=False,
        polarize=False,
        polarion=Polarion(
            title="Nightly",
            template="T1",
            lookup="custom",
            properties={
                "testrun-type-id": "regression",
                "dry-run": True,
                "custom-arch": "x86",
                "parameter-browser": "firefox",
            },
        ),
    ),
)


@pytest.mark.parametrize(("text", "suite"), [(SHEET, SHEET_SUITE), (ALL, ALL_SUITE)])
def test_a_document_is_read_and_its_tree_too(text: bytes, suite: Suite) -> None:
    assert load(text, "suite.toml") == suite
    assert from_tree(msgspec.to_builtins(suite)) == suite
    assert load(msgspec.json.encode(suite), "suite.json") == suite


def wrong(text: str, name: str = "suite.toml") -> str:
    with pytest.raises(DocumentError) as caught:
        load(text.encode(), name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("runer = 'ava'", "runer: unknown key. Did you mean runner?"),
        ("limits = { stal = 1 }", "limits.stal: unknown key. Did you mean limits.stall?"),
        ("title = 3", "title: expected text, got the number 3. "),
        ("title = 2026-01-01", "title: expected text, got a date or time. "),
        ("files = 'a'", 'files: expected a list, got text "a". Write it in [ ].'),
        ("coverage = 1", "coverage: expected true or false, got the number 1. "),
        ("setup = ['npm ci']", 'setup[0]: expected a list, got text "npm ci". Write it in [ ].'),
        ("setup = [[]]", "setup[0]: has 0 entries, less than 1. "),
        ("setup = [['']]", "setup[0]: names no program. Put the program's name first."),
        ("limits.run = -1", "limits.run: -1 is less than 0. "),
        ("limits.run = nan", "limits.run: nan is not a finite number. "),
        ("limits.output = '1MB'", 'limits.output: expected a size, got text "1MB". '),
        ("limits.memory = -1", "limits.memory: -1 is less than 0. "),
        ("retries = 1.5", "retries: expected a whole number, got the number 1.5. "),
        ("env = { 'A=B' = 'x' }", "env.\"A=B\": "),
        ('args = ["a\\u0000b"]', "args[0]: "),
        ("driver = 'event'", 'driver: expected "events" or "tap", got text "event". Did you mean "events"?'),
        ("cwd = '../x'", "cwd: '../x' leaves the work directory. "),
        ("cwd = '/x'", "cwd: '/x' is absolute. Write it relative to the source."),
        ("cwd = ''", "cwd: is empty. "),
        ("files = ['a', 'b/../../c']", "files[1]: 'b/../../c' leaves the work directory. "),
        ("files = ['--tap']", "files[0]: '--tap' would be read as an option. "),
        ("files = ['" + 100 * "a/" + "*']", "files[0]: 'a/a/a/"),
        ("args = ['--tap']", "args[0]: --tap cannot be given to AVA: "),
        ("args = ['-v', '--watch']", "args[1]: --watch cannot be given to AVA: "),
        ("args = ['-vw']", "args[0]: -vw cannot be given to AVA: "),
        ("args = ['--timeout=5s']", "args[0]: --timeout=5s cannot be given to AVA: "),
        ("args = ['debug']", "args[0]: 'debug' is a command of AVA's, no test run. Take it out."),
        ("retries = 1", 'retries: failed tests cannot be run again here. Use runner pytest, or ava with'),
        ("codes = { 3 = 'skipped' }", "codes: runner ava is not judged by its exit code. "),
        ("codes = { 256 = 'skipped' }", "codes.256: "),
        ("requires.runners.ava = 'six'", "requires.runners.ava: a version bound reads like >=6"),
        ("source = {}", "source: says neither dir nor archive nor git. "),
        ("source = { dir = 'a', git = 'b' }", "source: dir and git exclude each other. "),
        ("source = { dir = '' }", "source.dir: is empty. "),
        ("source = { dir = 'a', sha256 = '" + 64 * "0" + "' }", "source.sha256: is that of an archive"),
        ("source = { dir = 'a', ref = 'x' }", "source.ref: goes with git, and there is none. "),
        ("source = { archive = 'https://h/a.zip' }", "source.sha256: is missing. Give the digest"),
        ("source = { archive = 'a', sha256 = 'abc' }", "source.sha256: "),
        ("source = { archive = 'ftp://h/a', sha256 = '" + 64 * "0" + "' }", "source.archive: 'ftp://h/a' is not"),
        ("source = { git = 'file:///x' }", "source.git: 'file:///x' is not fetched by https or ssh. "),
        ("source = { git = '/x' }", "source.git: '/x' is not fetched by https or ssh. "),
        ("source = { git = 'ext::sh -c x' }", "source.git: 'ext::sh -c x' is not fetched by https or ssh. "),
        ("source = { git = 'ssh://-oProxyCommand=x/y' }", "source.git: is no address of a host. "),
        ("source = { git = 'https://[x' }", "source.git: is no address: "),
        ("source = { git = 'https://u:p@h/x' }", "source.git: has a user's secret in it"),
        ("source = { git = 'https://token@h/x' }", "source.git: has a user's secret in it"),
        ("source = { git = 'ssh://u:p@h/x' }", "source.git: has a user's secret in it"),
        ("source = { git = 'git@h:x', ref = '--upload-pack=x' }", "source.ref: '--upload-pack=x' names no"),
        ("source = { git = 'git@h:x', depth = 0 }", "source.depth: 0 is less than 1. "),
        ("report.polarion.properties.dry-rum = 'x'", "report.polarion.properties.dry-rum: unknown property. Did you"),
        ("report.polarion.properties.polarion-testrun-title = 'x'",
         "report.polarion.properties.polarion-testrun-title: has a key of its own. Use report.polarion.title."),
        ("report.polarion.properties.colour = 'x'", "report.polarion.properties.colour: unknown property. Kn"),
        ("report.polarion.lookup = 'title'", 'report.polarion.lookup: expected "custom", "id" or "name"'),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_its_line_its_key_and_what_would_be_right(line: str, error: str) -> None:
    text = f'id = "a"\nrunner = "ava"\n{line}\n'
    assert wrong(text).startswith(f"suite.toml:3: {error}")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("runner = 'ava'", ":1: id: is missing. Add it: text."),
        ("id = 'a'", ':1: runner: is missing. Add it: "ava", "command", "gator", "pytest" or "tap".'),
        ("id = 'a'\nrunner = 'pytest'\nfiles = ['a/**_test.py']", ":3: files[0]: 'a/**_test.py': ** stands for whole"),
        ("id = 'a b'\nrunner = 'ava'", ':1: id: text "a b" does not fit. Use 1 to 128 of the characters'),
        ("id = \"a\\n\"\nrunner = 'ava'", ':1: id: text "a\\n" does not fit. '),
        ("id = 'a'\nrunner = 'jest'", ':2: runner: expected "ava", "command", "gator", "pytest" or "tap"'),
        ("id = 'a'\nrunner = 'pytst'", ':2: runner: expected "ava", '),
        ("id = 'a'\nrunner = 'tap'", ":1: command: is missing, and runner tap runs it. Add it as a list"),
        ("id = 'a'\nrunner = 'command'\ncommand = ['']", ":3: command[0]: is empty. Name a program."),
        ("id = 'a'\nrunner = 'gator'", ":1: files: runner gator needs one file, its spec. "),
        ("id = 'a'\nrunner = 'gator'\nfiles = ['*.yaml']", ":3: files: runner gator needs one file, its spec. "),
        ("id = 'a'\nrunner = 'gator'\nfiles = ['a']\ncommand = ['b']", ":4: command: runner gator is the agent "),
        ("id = 'a'\nrunner = 'pytest'\ndriver = 'events'", ':3: driver: "events" is for runner ava, not for py'),
        ("id = 'a'\nrunner = 'tap'\ncommand = ['a']\nresumable = true", ":4: resumable: runner tap cannot go on "),
        ("id = 'a'\nrunner = 'tap'\ncommand = ['a']\nmatch = ['b']", ":4: match: runner tap has no selection by "),
        ("id = 'a'\nid = 'b'", ":2: id: not TOML: cannot overwrite a value "),
        ("id = 'a", ":1: id: not TOML: "),
        ('{"id": "a", "runner": "jest"}', ': runner: expected "ava", '),
        ('{"id": ', ": is no JSON: "),
        ("[" * 3000 + "]" * 3000, ":1: "),
        ("", ":1: id: is missing. "),
    ],
)  # fmt: skip
def test_a_document_that_is_none(text: str, error: str) -> None:
    assert wrong(text).startswith(f"suite.toml{error}")


@pytest.mark.parametrize(
    "text",
    [
        "runner = 'ava'\nsource = { git = 'ssh://git@h/x' }",
        "runner = 'ava'\nsource = { git = 'git@h:x' }",
        f"runner = 'ava'\nsource = {{ archive = 'a.zip', sha256 = '{64 * '0'}' }}",
        f"runner = 'ava'\nsource = {{ archive = 'http://h/a.zip', sha256 = '{64 * '0'}' }}",
        "runner = 'ava'\ndriver = 'events'\nretries = 1",
        "runner = 'pytest'\nretries = 1",
    ],
)
def test_what_is_nearly_a_fault_is_none(text: str) -> None:
    assert load(f"id = 'a'\n{text}\n".encode(), "suite.toml").id == "a"


def test_the_limits_of_the_sheet_may_be_written_out() -> None:
    times = "setup = 600\nrun = 3600\nstall = 600\ntest = 0\ngrace = 10\n"
    sizes = 'output = "64MiB"\ntest_output = "64KiB"\nmemory = ""\nprocesses = 0\n'
    text = f'id = "x"\nrunner = "tap"\ncommand = ["a"]\n[limits]\n{times}{sizes}'
    assert load(text.encode(), "suite.toml").limits == Limits()


def test_all_faults_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = "id = 'a'\nrunner = 'ava'\n[limits]\nrun = -1\nstal = 2\n[watch]\nlog = []\n"
    with pytest.raises(SuiteErrors) as caught:
        load(text.encode(), "suite.toml")
    assert [(error.line, error.key) for error in caught.value.errors] == [
        (4, "limits.run"),
        (5, "limits.stal"),
        (7, "watch.log"),
    ]
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "suite.toml:4:",
        "suite.toml:5:",
        "suite.toml:7:",
    ]
    assert (caught.value.file, caught.value.line, caught.value.key) == ("suite.toml", 4, "limits.run")


def test_a_title_of_ten_megabytes_is_refused_and_not_repeated() -> None:
    error = wrong(f"id = 'a'\nrunner = 'ava'\ntitle = '{'x' * 10_000_000}'")
    assert error.startswith("suite.toml:3: title: has 10000000 characters, more than 1024.")
    assert len(error) < 500


def test_a_document_too_large_or_not_utf8_is_refused() -> None:
    assert wrong("#" * (MAX_DOCUMENT + 1)).startswith("suite.toml: is larger than 16 MiB. ")
    with pytest.raises(DocumentError, match=r"suite\.toml:2: byte 0xff is not UTF-8"):
        load(b"id = 'a'\n# \xff", "suite.toml")


def test_a_tree_has_no_lines() -> None:
    with pytest.raises(DocumentError, match=r"^suite: runner: expected"):
        from_tree({"id": "a", "runner": "jest"})
    with pytest.raises(DocumentError, match=r"^suite: expected a table"):
        from_tree(["id"])


def test_ava_options_behind_two_dashes_are_the_tests_own() -> None:
    suite = load(b"id = 'a'\nrunner = 'ava'\nargs = ['-mtest', '--', '--watch']", "suite.toml")
    assert suite.args == ("-mtest", "--", "--watch")


@pytest.mark.parametrize("git", ["https://h/x.git", "ssh://git@h/x", "git@h:org/x.git"])
def test_git_is_fetched_by_https_and_ssh(git: str) -> None:
    suite = from_tree({"id": "a", "runner": "ava", "source": {"git": git, "ref": "main"}})
    assert suite.source == Source(git=git, ref="main")


@pytest.mark.parametrize("key", ["dependencies", "devDependencies", "peerDependencies", "ava"])
def test_a_folder_whose_package_names_ava_is_an_ava_suite(key: str) -> None:
    package = msgspec.json.encode({key: {"ava": "^6"}})
    suite = detect("my login tests", ["package.json", "test_a.py"], package)
    assert suite == Suite(id="my-login-tests", title="my login tests", runner="ava")


@pytest.mark.parametrize("package", [None, b"{}", b"[]", b'{"dependencies": ["ava"]}'])
def test_a_folder_with_python_tests_is_a_pytest_suite(package: bytes | None) -> None:
    assert detect("x", ["tests/test_a.py"], package) == Suite(id="x", title="x", runner="pytest")


def test_a_folder_of_neither_kind_says_what_it_lacks() -> None:
    with pytest.raises(DocumentError, match=r"^x: holds no suite\.toml, no package\.json that names ava, and no test_"):
        detect("x", ["tests/testing.py", "conftest.py"], b"{}")
    with pytest.raises(DocumentError, match=r"^x/package\.json: is no JSON"):
        detect("x", [], b"{")


@pytest.mark.parametrize("folder", ["", "---", "äöü", "x" * 2000])
def test_any_folder_gives_an_id(folder: str) -> None:
    suite = detect(folder, ["test_a.py"])
    assert from_tree(msgspec.to_builtins(suite)) == suite
