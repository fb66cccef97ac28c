"""The tokenizer against texts written for it; against V8 and a whole parser: tests/interop/test_coverage_v8.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.coverage.javascript import GLOBAL, NotFollowed, Script, functions, script, utf16


def shown(text: str) -> list[str]:
    """Each function's name, parameters and text."""
    return [f"{f.name}({', '.join(f.params)}) {text[f.start : f.end]}" for f in functions(text)]


def read(text: str | bytes) -> Script:
    return script(text.encode() if isinstance(text, str) else text, "src/a.js", "/p/src/a.js")


def lines_of(text: str) -> dict[str, list[int]]:
    """The lines of each method's probes, the entry's first."""
    unit = read(text).unit
    return {method.name: [unit.lines[probe] for probe in method.probes] for method in unit.methods}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("function f(a, b) {}", "f(a, b) function f(a, b) {}"),
        ("async function* f() { yield 1 }", "f() async function* f() { yield 1 }"),
        ("export default async function () {}", "() async function () {}"),
        ("const f = function () {}", "f() function () {}"),
        ("exports.f = function g() {}", "g() function g() {}"),
        ("const f = x => x + 1;", "f(x) x => x + 1"),
        ("const f = async x => x\ng()", "f(x) async x => x"),
        ("const f = async (x) => {}", "f(x) async (x) => {}"),
        ("f(a => b => a + b, c)", "(a) a => b => a + b | (b) b => a + b"),
        ("x ? y => y : z", "(y) y => y"),
        ("const f = x =>\n  x\n  .y\nz", "f(x) x =>\n  x\n  .y"),
        ("const f = x => x ? 1 : 2", "f(x) x => x ? 1 : 2"),
        ("const f = () => ({a: 1})", "f() () => ({a: 1})"),
        ("f`${() => 1}${{a: () => 2}}`", "() () => 1 | a() () => 2"),
        (
            "({f() {}, get g() { return 1 }, set g(x) {}, async *h() {}, [k]() {}})",
            "f() f() {} | get g() get g() { return 1 } | set g(x) set g(x) {} | h() async *h() {} | [k]() [k]() {}",
        ),
        (
            "({get: 1, set, async() {}, static: function() {}, 'l'() {}})",
            "async() async() {} | static() function() {} | l() 'l'() {}",
        ),
        ("({function: 1, class() {}, if: () => 1})", "class() class() {} | if() () => 1"),
        (
            "class A { static f() {} static async g() {} #h() {} static { i() } }",
            "f() f() {} | g() async g() {} | #h() #h() {}",
        ),
        ("class A { x = 1\n y = () => 2\n z\n [w]() {} }", "y() () => 2 | [w]() [w]() {}"),
        ("class A { get\n f() {} static\n async\n g() {} }", "get f() get\n f() {} | g() g() {}"),
        ("class A extends f({m() {}}) { n() {} }", "m() m() {} | n() n() {}"),
        ("x = class extends (class { a() {} }) { b() {} }", "a() a() {} | b() b() {}"),
        ("function f({a, b: [c] = []}, ...d) {}", "f({a, b: [c] = []}, ...d) function f({a, b: [c] = []}, ...d) {}"),
        ("function f(a = () => 1, b = {c: 2}) {}", "f(a, b) function f(a = () => 1, b = {c: 2}) {} | a() () => 1"),
        ("a.function(b.class, c.if)", ""),
    ],
)
def test_functions_are_found_as_v8_reports_them(text: str, expected: str) -> None:
    assert " | ".join(shown(text)) == expected


@pytest.mark.parametrize(
    "before",
    [
        "if (a) /{/.test(b);",
        "a = b / c; /}/g;",
        "a = (b) / c / d;",
        "a++ / 2; x = b[0] / 2 / 1;",
        "return /[/}]/.test(x);",
        "{} /{/.test(x);",
        "a = {} / 2 / 1;",
        "function g() {} /{/.test(x);",
        "a = function () {} / 2;",
        "x = `{${`}${/}/}`}`;",
        "x = '}' + \"\\\"}\" + '\\\n}';",
        "/* } */ // }\n",
        "x = a?.b ?? c ? .5 : 1 / 2;",
        "switch (a) { case /{/.test(b): {} default: {} }",
        "label: { break label }",
        "for (const [a, {b}] of [/}/]) {}",
        "for (const a of {[Symbol.iterator]: 1}) {}",
        "for await (const a of /}/[Symbol.split]('')) ;",
        "do {} while (a) /}/.test(b);",
        "import {a as b} from 'c' with {type: 'json'}; export {b}; export * from 'd';",
        "import('a').then(/}/); x = import.meta.url / 2;",
        "let {a, ...b} = c, [d] = e; var \\u0061b, \\u{61}c, π;",
        "try {} catch {} try {} catch ({a}) {} finally {}",
        "x = 0x1F / 1_000n / .5e-3 / 5. / 0b11;",
        "a\n/b/g\n;a\n{}",
        "new.target / 2; x = typeof /}/; y = void {} / 1;",
        "x = a <!-- b\n",
    ],
)
def test_what_stands_before_a_function_does_not_hide_it(before: str) -> None:
    text = f"{before} function f() {{ return 1 }}"
    assert any(each.endswith("function f() { return 1 }") for each in shown(text)), shown(text)


@pytest.mark.parametrize(
    "text", ["}", "(", "f(]", "'a", "`a", "`${", "/a\n/", "x = /", "function", "function f", "\\x", "=> 1"]
)
def test_a_text_that_is_no_javascript_is_one_method(text: str) -> None:
    with pytest.raises(NotFollowed):
        functions(text)
    (lines,) = lines_of(f"{text}\n\n  \nb").values()
    assert (lines[0], lines[-1]) == (1, 4 + text.count("\n"))


def test_a_method_has_its_entry_and_the_lines_that_are_its_own() -> None:
    text = """\
#!/usr/bin/env node
import a from 'a';  // 2

function add(a, b) {
  const sum = a + b;
  return [1, 2].map(x => {
    return x + sum;
  });
}

export class Box {
  size = 1;
  open(
    how,
  ) {
    if (how) {
      go();
    } else {
      stop();
    }
  }
}
const half = x => x / 2;
const text = `
  ${half(2)}
`;
"""
    assert lines_of(text) == {
        GLOBAL: [2, 11, 12, 13, 23, 24, 25],
        "add": [4, 5, 6],
        "<anonymous>": [6, 7],
        "open": [15, 14, 16, 17, 19],
        "half": [23],
    }


def test_probes_are_counted_through_the_class() -> None:
    unit = read("function f() { g() }\nf()\nfunction h() {}\n").unit
    assert [(method.name, method.probes) for method in unit.methods] == [(GLOBAL, (0,)), ("f", (1,)), ("h", (2,))]
    assert (unit.class_id, unit.file, unit.lines) == ("src/a.js", "/p/src/a.js", (2, 1, 3))


def test_two_methods_of_one_name_are_told_apart() -> None:
    names = [method.name for method in read("class A { f() {} }\nclass B { f() {} }\ng(() => 1, () => 2)").unit.methods]
    assert names == [GLOBAL, "f", "f#2", "<anonymous>", "<anonymous>#2"]


def test_a_file_without_code_has_no_method() -> None:
    for text in ("", "// nothing\n", "\ufeff", "\n;\n"):
        assert read(text).unit.methods == ()


def test_a_change_changes_the_checksum_of_its_method_alone() -> None:
    def checksums(text: str) -> dict[str, str]:
        return {method.name: method.checksum for method in read(text).unit.methods}

    text = "f();\nfunction f() { return () => 1 }\nfunction g() {}\n"
    before, after = checksums(text), checksums(text.replace("() => 1", "() => 2"))
    assert len(set(before.values())) == 4
    assert {name for name in before if before[name] != after[name]} == {"<anonymous>"}
    assert checksums(text.replace("f();", "h();"))["f"] == before["f"]


def test_offsets_are_utf16_units_of_the_text_without_its_mark() -> None:
    text = utf16("\ufeff'\U0001d569'; function f() {}".encode())
    (function,) = functions(text)
    assert (function.start, function.end, len(text)) == (6, 21, 21)
    assert utf16(b"'\xf0\x9d'") == "'\ufffd'"  # what is no UTF-8 is read as Node reads it
    names = [method.name for method in read("const \U0001d4bb = () => 1").unit.methods]
    assert names[0] == GLOBAL


def test_lines_end_with_lf_or_crlf() -> None:
    assert lines_of("f()\r\ng()\r\n") == {GLOBAL: [1, 2]}
    assert read("f()\r\ng()\n").anchors == ((0, 3, 0), (5, 8, 1))


WORDS = st.sampled_from(
    [
        *(
            "function",
            "class",
            "async",
            "get",
            "static",
            "=>",
            "=",
            "if",
            "return",
            "of",
            "case",
            "a",
            "b1",
            "#p",
            "new",
        ),
        *(
            "{",
            "}",
            "(",
            ")",
            "[",
            "]",
            ";",
            ",",
            ":",
            "?",
            "?.",
            ".",
            "...",
            "`",
            "${",
            "/",
            "/=",
            "'",
            '"',
            "\\",
            "++",
        ),
        *(
            "\n",
            "\r\n",
            "\u2028",
            "//",
            "/*",
            "*/",
            "1",
            "0x",
            ".5",
            "\U0001d569",
            "\ud800",
            "#!",
            "*",
            "extends",
            "else",
            "await",
        ),
    ]
)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=60).map(" ".join), st.lists(WORDS, max_size=60).map("".join)))
def test_any_text_becomes_a_class(text: str) -> None:
    made = read(text.encode("utf-8", "surrogatepass"))
    unit = made.unit
    assert [probe for method in unit.methods for probe in method.probes] == list(range(unit.probe_count))
    assert sorted(probe for _, _, probe in made.anchors) == list(range(unit.probe_count))
    assert all(0 <= start < end <= made.length for start, end, _ in made.anchors)
    assert list(made.anchors) == sorted(made.anchors)
    assert len({method.name for method in unit.methods}) == len(unit.methods)


@given(st.lists(WORDS, max_size=60).map("".join))
def test_functions_lie_in_each_other_or_apart(text: str) -> None:
    try:
        found = functions(text)
    except NotFollowed:
        return
    open_ends: list[int] = []
    for function in found:
        while open_ends and open_ends[-1] <= function.start:
            open_ends.pop()
        assert function.start <= function.entry < function.end <= (open_ends[-1] if open_ends else len(text))
        open_ends.append(function.end)


@pytest.mark.parametrize(
    "piece", ["(", "{", "[", "`${", "a => ", "function f() {", "({a: ", "'x' + ", "/x/.y(", "x ? y : "]
)
def test_deep_texts_are_read(piece: str) -> None:
    assert read(piece * 5_000).unit.probe_count == 1


@pytest.mark.parametrize("text", ["'{}'", "/*{}*/ f()", "`{}`", "f(/{}/)", "// {}\nf()", "{}"])
def test_long_tokens_are_read(text: str) -> None:
    assert read(text.format("x" * 1_000_000)).unit.probe_count == 1
