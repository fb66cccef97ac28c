"""agent/suites/runners/ava_files.py: which file a line of AVA's TAP speaks of."""

import pytest

from agent.suites.runners.ava_files import Files, literal


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("test.js", "test.js"),
        ("./test/../test/a.test.ts", "test/a.test.ts"),
        ("x.js:4,7-9", "x.js"),
        ("test", None),  # a folder, perhaps
        ("test/*.js", None),
        ("!test/a.js", None),
        ("test/{a,b}.js", None),
    ],
)
def test_what_names_a_file(pattern: str, file: str | None) -> None:
    assert literal(pattern) == file


def test_the_one_file_is_it() -> None:
    assert Files(["a.js:4"]).split("x › y") == ("a.js", "x › y")
    assert Files(["a.js", "./a.js"]).single == "a.js"
    assert Files([]).split("x › y") == (None, "x › y")
    assert Files(["*.js"]).split("x › y") == (None, "x › y")
    assert Files(["*.js", "a.js"]).split("a › y") == (None, "a › y")


@pytest.mark.parametrize(
    ("files", "title", "got"),
    [
        (["test/a.js", "test/b.js"], "a › x", ("test/a.js", "x")),
        (["test/a.js", "test/sub/b.js"], "sub › b › x › y", ("test/sub/b.js", "x › y")),
        (["test/a.js", "lib/b.js"], "test › a › x", ("test/a.js", "x")),
        (["__tests__/test-a.spec.mjs", "b.test.js"], "a › x", ("__tests__/test-a.spec.mjs", "x")),
        (["a.js", "b.js"], "c › x", (None, "c › x")),
        (["a.js", "b.js"], "a", (None, "a")),
        (["a.js", "a.test.js"], "a › x", (None, "a › x")),  # either
        (["a.js", "a/b.js"], "a › b › x", (None, "a › b › x")),  # either
        (["a.js", "a/b.js"], "a › x", ("a.js", "x")),
        (["/abs/a.js", "b.js"], "a › x", (None, "a › x")),
    ],
)
def test_a_prefix_means_a_file(files: list[str], title: str, got: tuple[str | None, str]) -> None:
    assert Files(files).split(title) == got


def test_a_path_from_the_package_is_the_suites_file() -> None:
    files = Files(["test/a.js", "b.js"])
    assert files.known("packages/one/test/a.js") == "test/a.js"
    assert files.known("other.js") == "other.js"
