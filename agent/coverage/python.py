"""Python's source files as units: each statement with code is a probe, at its first line; each function is a method.

Lines are those of the compiled code (`co_lines`), and a statement of several lines counts once, as coverage.py does it.
Classes and what stands in no function belong to the method `<module>`, lambdas and comprehensions to the function
around them, as do functions without a line of their own (`def f(): return 1`).

Nothing is imported or run. Source: drill sheet, "Probe sources", Python.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from types import CodeType

import msgspec

from agent.coverage.catalog import Method, Unit

TOP_LEVEL = "<module>"

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Body = Sequence[ast.stmt | ast.ExceptHandler | ast.match_case]
_Node = ast.mod | ast.stmt | ast.ExceptHandler | ast.match_case


class Module(msgspec.Struct, frozen=True):
    """A file as a unit. `probe_of` has the probe of each line of a statement. `why` it is by lines only, "" if not."""

    unit: Unit
    probe_of: dict[int, int]
    why: str = ""


def read_module(source: bytes, path: str, file: str) -> Module:
    """Read a file; `path` is its place below the root, with slashes. Takes the time of a compilation: for a thread.

    What this Python cannot compile (the syntax of a newer one, or of 2.7) becomes one method, with a probe for each
    line that is not empty and no comment; `why` says what it was.
    """
    text = source.splitlines()
    try:
        tree, code = _compiled(source, file)
        found = list(_statements(tree))
        functions = [(name, node) for name, node in found if isinstance(node, _Function)]
        heads = [(TOP_LEVEL, (), ""), *((name, _params(node), _returned(node)) for name, node in functions)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return _by_lines(text, path, file, error)
    first_of = _first_lines((node for _, node in found), text)
    wanted = {first_of.get(line, line) for line in _lines(code)} if tree.body else set()
    wanted -= _docstrings([tree, *(node for _, node in found)])
    owners = _owners([node for _, node in functions], max(wanted, default=0), text)
    statements: list[list[int]] = [[] for _ in heads]
    for line in sorted(wanted):
        statements[owners[line]].append(line)
    texts: list[list[bytes]] = [[] for _ in heads]
    for line, of_line in enumerate(text[: len(owners) - 1], 1):
        texts[owners[line]].append(of_line)
    methods: list[Method] = []
    lines: list[int] = []
    seen: dict[str, int] = {}
    for (name, params, returned), own, own_text in zip(heads, statements, texts, strict=True):
        if own:
            seen[name] = seen.get(name, 0) + 1
            probes = tuple(range(len(lines), len(lines) + len(own)))
            lines += own
            shown = name if seen[name] == 1 else f"{name}#{seen[name]}"
            methods.append(Method(shown, params, returned, probes, _checksum(*map(str.encode, params), *own_text)))
    at = {line: probe for probe, line in enumerate(lines)}
    probe_of = at | {line: at[first] for line, first in first_of.items() if first in at}
    return Module(_unit(path, file, methods, lines), probe_of)


def _unit(path: str, file: str, methods: Sequence[Method], lines: Sequence[int]) -> Unit:
    folder, _, name = path.rpartition("/")
    return Unit(path=folder or ".", name=name, methods=tuple(methods), lines=tuple(lines), file=file)


def _by_lines(text: Sequence[bytes], path: str, file: str, error: Exception) -> Module:
    lines = [number for number, line in enumerate(text, 1) if line.partition(b"#")[0].strip()]
    method = Method(TOP_LEVEL, (), "", tuple(range(len(lines))), _checksum(*text))
    what = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error) or "nested too deep"
    probe_of = {line: probe for probe, line in enumerate(lines)}
    return Module(_unit(path, file, [method] if lines else [], lines), probe_of, what)


def _compiled(source: bytes, file: str) -> tuple[ast.Module, CodeType]:
    with warnings.catch_warnings():  # the product's code is its own affair
        warnings.simplefilter("ignore")
        tree = compile(source, file, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        assert isinstance(tree, ast.Module)
        return tree, compile(tree, file, "exec", dont_inherit=True, optimize=0)


def _statements(tree: ast.Module) -> Iterator[tuple[str, _Node]]:
    """Each statement, handler and case with its qualified name, if it has one, in the order of the source."""
    pending: list[tuple[str, ast.AST]] = [("", node) for node in reversed(tree.body)]
    while pending:
        prefix, node = pending.pop()
        name = prefix + getattr(node, "name", "") if isinstance(node, _Function | ast.ClassDef) else ""
        assert isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case)
        yield name, node
        inner = f"{name}.<locals>." if isinstance(node, _Function) else f"{name}." if name else prefix
        for field in ("finalbody", "orelse", "handlers", "cases", "body"):
            pending += ((inner, below) for below in reversed(getattr(node, field, ())))


def _start(node: _Node, text: Sequence[bytes]) -> int:
    """The line it begins on, with its decorators."""
    if isinstance(node, ast.match_case):  # which knows where its pattern is
        above = range(node.pattern.lineno, 0, -1)
        return next((line for line in above if text[line - 1].lstrip().startswith(b"case")), node.pattern.lineno)
    decorators = getattr(node, "decorator_list", ())
    return min((node.lineno, *(each.lineno for each in decorators))) if not isinstance(node, ast.mod) else 1


def _is_inline(node: _Node, text: Sequence[bytes]) -> bool:
    """Does it stand behind the colon of what it is the body of?"""
    column: int = getattr(node, "col_offset", 0)
    return not isinstance(node, ast.match_case) and bool(text[_start(node, text) - 1][:column].strip())


def _first_lines(nodes: Iterator[_Node], text: Sequence[bytes]) -> dict[int, int]:
    """The first line of the statement that a line is of; in a compound one, of its head."""
    first_of: dict[int, int] = {}
    for node in nodes:
        for first, last in _stretches(node, text):
            begin = first_of.get(first, first)
            for line in range(first, last + 1):
                first_of.setdefault(line, begin)
    return first_of


def _stretches(node: _Node, text: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    for decorator in getattr(node, "decorator_list", ()):
        yield decorator.lineno, decorator.end_lineno
    first = _start(node, text) if isinstance(node, ast.match_case) else getattr(node, "lineno", 1)
    body: _Body = getattr(node, "cases", ()) or getattr(node, "body", ())
    if not body:
        yield first, getattr(node, "end_lineno", first)
    elif _is_inline(body[0], text):
        yield first, getattr(body[-1], "end_lineno", first)
    else:
        yield first, max(first, _start(body[0], text) - 1)


def _docstrings(nodes: Sequence[_Node]) -> set[int]:
    lines: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | _Function) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str())) as said:
                    lines.update(range(said.lineno, (said.end_lineno or said.lineno) + 1))
    return lines


def _lines(code: CodeType) -> set[int]:
    """All lines that code stands on, also that of the code in it."""
    lines: set[int] = set()
    pending = [code]
    while pending:
        each = pending.pop()
        lines.update(line for _, _, line in each.co_lines() if line)
        pending += (constant for constant in each.co_consts if isinstance(constant, CodeType))
    return lines


def _owners(functions: Sequence[_Function], last: int, text: Sequence[bytes]) -> list[int]:
    """For each line the innermost function whose body it is of: its place from 1, or 0."""
    owners = [0] * (max(last, len(text)) + 1)
    for number, function in enumerate(functions, 1):
        first, end = _start(function.body[0], text), function.end_lineno or function.lineno
        if not _is_inline(function.body[0], text):
            owners[first : end + 1] = [number] * (end + 1 - first)
    return owners


def _params(function: _Function) -> tuple[str, ...]:
    taken = function.args
    return (
        *(each.arg for each in (*taken.posonlyargs, *taken.args)),
        *([f"*{taken.vararg.arg}"] if taken.vararg else []),
        *(each.arg for each in taken.kwonlyargs),
        *([f"**{taken.kwarg.arg}"] if taken.kwarg else []),
    )


def _returned(function: _Function) -> str:
    return ast.unparse(function.returns) if function.returns else ""


def _checksum(*parts: bytes) -> str:
    return blake2b(b"\n".join(parts), digest_size=8).hexdigest()
