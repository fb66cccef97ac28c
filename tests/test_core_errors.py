"""Every error says what, where and what to do."""

import os
from pathlib import Path

from agent.core.errors import ActionError, ConfigError, DocumentError, PeerRefused, shown, told, unwrap


def test_a_config_error_names_file_line_key_and_remedy() -> None:
    err = ConfigError(
        Path("/etc/agent/agent.toml"), 7, "suites.slots", "0 is less than 1", remedy="Use a number from 1 to 64."
    )
    assert str(err) == "/etc/agent/agent.toml:7: suites.slots: 0 is less than 1. Use a number from 1 to 64."


def test_a_document_that_came_over_a_link_has_no_line() -> None:
    assert str(DocumentError("suite", 0, "runner", "unknown runner 'avo'", remedy="Did you mean ava?")) == (
        "suite: runner: unknown runner 'avo'. Did you mean ava?"
    )


def test_a_sentence_that_ends_is_ended_once() -> None:
    assert str(ActionError("busy", "bad. Use 1.")) == "bad. Use 1. Nothing was changed."
    assert str(ActionError("busy", "Did you mean ava?")) == "Did you mean ava? Nothing was changed."


def test_an_error_that_quotes_a_peer_steers_no_terminal() -> None:
    error = PeerRefused("lab:1 answered 404: \x1b[2J\r\x9b31m\tno\n", remedy="Look at the url.")
    assert error.what == "lab:1 answered 404: \\x1b[2J\\r\\x9b31m\tno\n"
    assert str(error) == f"{error.what}. Look at the url."


def test_an_action_error_travels_as_code_and_text() -> None:
    assert ActionError("no_such_run", "r-12 is not known here").reason == "no_such_run: r-12 is not known here"


def test_unwrap_finds_the_one_error() -> None:
    inner = ValueError("x")
    assert unwrap(ExceptionGroup("a", [ExceptionGroup("b", [inner])])) is inner
    two = ExceptionGroup("a", [inner, ValueError("y")])
    assert unwrap(two) is two


def test_of_a_bug_only_its_type_is_told() -> None:
    assert told(DocumentError("suite", 0, "", "is cut", remedy="Mend it.")) == "suite: is cut. Mend it."
    assert told(FileNotFoundError(2, "No such file or directory", "/x")) == "[Errno 2] No such file or directory: '/x'"
    assert told(ValueError("Illegal header value b'Bearer sesame'")) == "ValueError; the log says where"
    assert told(OSError()) == "OSError; the log says where"


def test_bytes_that_are_no_text_are_shown() -> None:
    assert shown(os.fsdecode(b"/a\xff\xc3\xa9")) == "/a\\xffé"
