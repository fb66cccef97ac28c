import os
from pathlib import Path

import pytest

from agent.coverage.sources.product import Chosen, files_below

FILES = ("main.js", "src/a.js", "src/deep/b.mjs", "src/a.css", "test/a.js", "node_modules/x/index.js")


def found(root: Path, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    return [path for path, _ in files_below(root, Chosen(include, exclude), (".js", ".mjs"))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), ("**/node_modules/**",), ["main.js", "src/a.js", "src/deep/b.mjs", "test/a.js"]),
        ((), (), ["main.js", "node_modules/x/index.js", "src/a.js", "src/deep/b.mjs", "test/a.js"]),
        (("src/**",), (), ["src/a.js", "src/deep/b.mjs"]),
        (("src/*",), (), ["src/a.js"]),
        (("/src/*.js", "./main.js"), (), ["main.js", "src/a.js"]),
        (("a.js",), ("test/**",), ["src/a.js"]),
        (("**/?.js",), (), ["src/a.js", "test/a.js"]),
        ((), ("**/*.js",), ["src/deep/b.mjs"]),
    ],
)
def test_patterns_choose(root: Path, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    assert found(root, include, exclude) == expected


def test_excluded_folders_are_not_entered(root: Path) -> None:
    chosen = Chosen((), ("**/node_modules/**", "test/*.js"))
    assert not chosen.enters("node_modules")
    assert not chosen.enters("a/node_modules")
    assert chosen.enters("test")
    assert Chosen((), ("test/*",)).enters("test")


def test_a_name_that_is_no_utf8_is_left_out(root: Path) -> None:
    (root / os.fsdecode(b"src/\xff.js")).write_text("")
    assert len(found(root, ("src/**",), ())) == 2


def test_a_link_to_a_folder_is_not_followed(root: Path) -> None:
    (root / "src/again").symlink_to(root)
    assert "src/again/main.js" not in found(root, (), ())


def test_a_file_is_told_by_its_absolute_path_too(root: Path) -> None:
    assert list(files_below(root, Chosen(("src/a.js",), ()), (".js",))) == [("src/a.js", str(root / "src/a.js"))]


def test_a_virtual_environment_is_not_the_product(root: Path) -> None:
    for name in ("src/env/pyvenv.cfg", "src/env/lib/x.js"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    assert found(root, ("src/**",), ()) == ["src/a.js", "src/deep/b.mjs"]
    assert [path for path, _ in files_below(root / "src/env", Chosen((), ()), (".js",))] == ["lib/x.js"]
