"""agent/coverage/python.py: which lines are probes, and of which method."""

import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.coverage.python import Module, read_module

ROOT = Path(__file__).parents[1]


def read(source: str, path: str = "pkg/mod.py") -> Module:
    return read_module(textwrap.dedent(source).encode(), path, f"/r/{path}")


def methods(module: Module) -> dict[str, list[int]]:
    """The lines of each method."""
    return {method.name: [module.unit.lines[probe] for probe in method.probes] for method in module.unit.methods}


def test_each_function_is_a_method_with_the_lines_of_its_body() -> None:
    module = read(
        '''\
        """Adds."""
        import os

        def add(a, *rest, b=1, **more) -> int:
            """Adds."""
            total = a + b
            return total

        class Adder:
            """Adds."""
            base = 1

            @property
            def value(self):
                def inner():
                    return 1
                return inner()

            @value.setter
            def value(self, value): self.base = value
        '''
    )
    assert module.why == ""
    assert (module.unit.path, module.unit.name, module.unit.file) == ("pkg", "mod.py", "/r/pkg/mod.py")
    assert methods(module) == {
        "<module>": [2, 4, 9, 11, 13, 14, 19, 20],
        "add": [6, 7],
        "Adder.value": [15, 17],
        "Adder.value.<locals>.inner": [16],
    }
    add = module.unit.methods[1]
    assert (add.params, add.return_type) == (("a", "*rest", "b", "**more"), "int")
    assert [probe for method in module.unit.methods for probe in method.probes] == list(range(13))


def test_methods_of_one_name_are_numbered() -> None:
    module = read("def f():\n    return 1\n\ndef f():\n    return 2\n")
    assert methods(module) == {"<module>": [1, 4], "f": [2], "f#2": [5]}


def test_a_statement_of_several_lines_is_one_probe() -> None:
    module = read(
        """\
        @decorator(
            1,
        )
        def f(
            a=1,
        ):
            match a:
                case (
                    1
                    | 2
                ):
                    return [
                        each
                        for each in range(3)
                    ]
            try:
                g(1,
                  2); h(3,
                        4)
            except (
                OSError,
                ValueError,
            ):
                pass
            if (a and
                b): return (1 +
                            2)
        """
    )
    assert methods(module) == {"<module>": [1, 4], "f": [7, 8, 12, 16, 17, 20, 24, 25]}
    first = {line: module.unit.lines[probe] for line, probe in module.probe_of.items()}
    assert (first[3], first[5], first[10], first[14], first[18], first[19], first[22], first[26], first[27]) == (
        *(1, 4, 8, 12, 17, 17, 20, 25, 25),
    )


def test_what_python_compiles_away_is_no_probe() -> None:
    assert methods(read("if 0:\n    never()\nx = 1\n")) == {"<module>": [1, 3]}


def test_assertions_are_probes_however_this_python_was_started() -> None:
    assert methods(read("def f(a):\n    assert a\n")) == {"<module>": [1], "f": [2]}


def test_a_file_without_statements_has_no_probes() -> None:
    assert read("# nothing\n").unit.probe_count == 0
    assert read('"""Only this."""\n').unit.probe_count == 0
    assert read("").unit.methods == ()


def test_a_file_of_the_root_is_in_the_root() -> None:
    assert read("x = 1\n", "mod.py").unit.class_id == "./mod.py"


def test_a_checksum_changes_with_the_text_of_its_own_method_only() -> None:
    before = read("def f():\n    return 1\n\ndef g():\n    return 1\n").unit
    after = read("def f():\n    return 2\n\ndef g():\n    return 1\n").unit
    same = [one.checksum == other.checksum for one, other in zip(before.methods, after.methods, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("print 'x'\n\n# y\nz = 1\n", "line 1: Missing parentheses"),
        ("x = (\n\n# y\nz = 1\n", "line 1: '(' was never closed"),
        ("x = 1\n\n# y\n\0\n", "null bytes"),
    ],
)
def test_what_cannot_be_compiled_here_is_known_by_its_lines(source: str, why: str) -> None:
    module = read(source)
    assert why in module.why
    assert methods(module) == {"<module>": [1, 4]}
    assert module.probe_of == {1: 0, 4: 1}


def test_too_deep_a_file_is_known_by_its_lines() -> None:
    module = read("x = " + "-" * 100_000 + "1\n")
    assert module.why
    assert methods(module) == {"<module>": [1]}


def test_a_warning_of_the_compiler_is_not_the_agents(recwarn: pytest.WarningsRecorder) -> None:
    assert methods(read("x = '\\d' is 1\n")) == {"<module>": [1]}
    assert not recwarn.list


def test_each_line_that_can_run_has_a_probe_in_our_own_files() -> None:
    for path in sorted(ROOT.glob("agent/coverage/**/*.py")):
        module = read_module(path.read_bytes(), path.name, str(path))
        assert module.why == ""
        assert set(module.unit.lines) <= set(module.probe_of)
        assert sorted(probe for method in module.unit.methods for probe in method.probes) == [
            *range(module.unit.probe_count)
        ]
        assert len(set(module.unit.lines)) == module.unit.probe_count


PIECES = st.sampled_from(
    [
        "def f(a):",
        "class C:",
        "    ",
        "\n",
        "x = 1",
        "return x",
        "if x:",
        "else:",
        "(",
        ")",
        ";",
        "'''",
        "\\",
        "#",
        "@d",
    ]
)


@given(st.binary(max_size=200) | st.lists(PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode()))
def test_any_bytes_are_a_module(source: bytes) -> None:
    module = read_module(source, "a.py", "/r/a.py")
    assert set(module.probe_of.values()) == set(range(module.unit.probe_count))
    assert [probe for method in module.unit.methods for probe in method.probes] == [*range(module.unit.probe_count)]
