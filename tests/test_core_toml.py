"""Every key of a TOML file is found at its line, and what is no TOML is said with line, key and remedy."""

import os
from pathlib import Path

import pytest

from agent.core import toml

TEXT = '''\
# [not.a.header]
ident = "a # b"   # = no key
clock.wait_sync_s = 0
labels = { os = "rhel9", "with.dot".gpu = true }
[state]
dir = """
[no.header]
no = "key" \\"""
"""
'it''s' = 1
"\\u00e9" = 1979-05-27 07:32:00
[[logs.watch]]
name = "kernel"
rules = [
    "a]", # ]
    'b', [
        1,
    ]]
[logs.watch.more]
deep = 1
[[ logs . watch ]]
name = """"quoted"""""
tokens = [{ file = "t" },
          { file = "u" }]
'''.replace("'it''s'", "'its'")

LINES: dict[toml.At, int] = {
    ("ident",): 2,
    ("clock",): 3,
    ("clock", "wait_sync_s"): 3,
    ("labels", "os"): 4,
    ("labels", "with.dot", "gpu"): 4,
    ("state",): 5,
    ("state", "dir"): 6,
    ("state", "its"): 10,
    ("state", "é"): 11,
    ("logs",): 12,
    ("logs", "watch"): 12,
    ("logs", "watch", 0, "name"): 13,
    ("logs", "watch", 0, "rules"): 14,
    ("logs", "watch", 0, "rules", 0): 15,
    ("logs", "watch", 0, "rules", 2): 16,
    ("logs", "watch", 0, "rules", 2, 0): 17,
    ("logs", "watch", 0, "more"): 19,
    ("logs", "watch", 0, "more", "deep"): 20,
    ("logs", "watch", 1): 21,
    ("logs", "watch", 1, "name"): 22,
    ("logs", "watch", 1, "tokens", 0, "file"): 23,
    ("logs", "watch", 1, "tokens", 1, "file"): 24,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_key_has_its_line(newline: str) -> None:
    document = toml.parse("\ufeff" + TEXT.replace("\n", newline))
    assert {at: document.line(at) for at in LINES} == LINES
    assert document.data["state"]["dir"].startswith("[no.header]")


def test_what_has_no_line_of_its_own_has_that_of_its_container() -> None:
    document = toml.parse("\na = [1,\n2]")
    assert [document.line(at) for at in [(), ("a", 0), ("a", 1), ("a", 1, "none"), ("b",)]] == [1, 2, 3, 3, 1]


@pytest.mark.parametrize(
    ("text", "line", "key", "what", "remedy"),
    [
        ("a = 1\nslots 3", 2, "slots", "not TOML: expected '=' after a key", "Correct the line."),
        ("[suites]\nurl = ws://host", 2, "suites.url", "not TOML: invalid value in column 7", "Write text in quotes."),
        ("ident = some host", 1, "ident", "not TOML: invalid value in column 9", "Write text in quotes."),
        ("a = 1\nb = 2\na = 3", 3, "a", "not TOML: cannot overwrite a value", "Say it once."),
        ("[a]\nb = 1\n[a]", 3, "a", "not TOML: cannot declare ('a',) twice", "Say it once."),
        ('a = 1\nb = "C:\\dir"', 2, "b", "not TOML: unescaped", "Write text with a backslash in single quotes."),
        ("a = [\n1,\n2 3]", 3, "a", "not TOML: unclosed array in column 3", "Correct the line."),
        ("a = 1\nb = [\n1,\n2\n", 2, "b", "not TOML: unclosed array at the end of the file", "Correct the line."),
        ("= 1", 1, "", "not TOML: invalid statement in column 1", "Correct the line."),
        ("a = 1\nb = " + "9" * 5000, 2, "b", "a value of more than 100 characters", "Write text in quotes"),
        ("\na" + ".a" * 40 + " = 1", 2, "", "a key of more than 32 parts", "nest less."),
        ("\na = " + "[" * 100_000, 2, "a", "nested deeper than 32", "nest less."),
        ("\na = " + "{a = " * 100_000, 2, "a.a.a.a.a.a.a.a.a.a.", "a key of more than 32 parts", "nest less."),
        ("a = 1\n[" + "a." * 500_000 + "a]", 2, "", "a key of more than 32 parts", "nest less."),
        ('"\\q" = 1', 1, "", "not TOML: unescaped", "single quotes."),
    ],
)
def test_what_is_no_toml_is_said_with_line_and_key(text: str, line: int, key: str, what: str, remedy: str) -> None:
    with pytest.raises(toml.TomlError) as caught:
        toml.parse(text)
    assert (caught.value.line, caught.value.key[:20]) == (line, key)
    assert caught.value.what.startswith(what)
    assert caught.value.remedy.endswith(remedy) or remedy in caught.value.remedy


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"#" * (toml.MAX_FILE + 1))
    (tmp_path / "latin").write_bytes(b"a = 1\nb = '\xe9'")
    (tmp_path / "link").symlink_to(tmp_path / "latin")
    os.mkfifo(tmp_path / "pipe")
    said = {}
    for name in ("none", "large", "latin", "link", "pipe", "."):
        with pytest.raises(toml.TomlError) as caught:
            toml.read(tmp_path / name, follow_links=False)
        said[name] = (caught.value.line, str(caught.value))
    assert said == {
        "none": (0, "there is no such file. Create it, or name the right one."),
        "large": (0, "is larger than 1 MiB. Split it."),
        "latin": (2, "byte 0xe9 is not UTF-8. Save it as UTF-8."),
        "link": (0, "is a symbolic link. Name the file that it points to."),
        "pipe": (0, "is not a regular file. Put the content into one."),
        ".": (0, "is not a regular file. Put the content into one."),
    }


def test_a_link_is_followed_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a = 1")
    (tmp_path / "link").symlink_to("file")
    assert toml.read(tmp_path / "link").data == {"a": 1}


def test_a_path_is_written_as_toml_writes_it() -> None:
    at: toml.At = ("logs", "watch", 0, "a b", "")
    assert toml.joined([toml.name(step) for step in at]) == 'logs.watch[0]."a b".""'
    assert toml.quoted('"\n\x7f\udc80é') == '"\\"\\n\\u007f\\\\udc80é"'
